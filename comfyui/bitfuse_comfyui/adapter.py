# SPDX-License-Identifier: GPL-3.0-or-later
"""ComfyUI (0.24.1 to 0.30.0) as a host of bitfuse: its LTX-2 transformer, `LTXAVModel`.

`bitfuse.accelerate(model)` works as for any host. In a workflow the node's wrapper does the same for the duration of
one forward (`wrapper.py`), so that other branches, whose models share these modules, run ComfyUI's own code.

All of it only for sources whose hash is in `upstream.READ`: any other version runs its own code, and reports say why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from bitfuse.hosts import activation, ltx2
from bitfuse.hosts.handle import Handle
from bitfuse.hosts.part import Model, ModelForward, Part
from bitfuse.hosts.sources import Entry, entries, functions, of_operators, why_not_read, why_not_stock
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.qk_norm import QK_RMS_NORM
from bitfuse.run.swap import bound
from bitfuse.tools import packages

from . import block as blocks
from . import upstream
from .attention import CrossAttention, Forms, rotary_operators
from .graph import graph_blocks
from .step import Step

NAME = upstream.NAME
_av, _model, _ops = upstream.av_model, upstream.model, upstream.ops
TAKEN_OVER = _av.BasicAVTransformerBlock, _model.CrossAttention, _model.GELU_approx

_RESTATED = ("BasicAVTransformerBlock.forward", *(f"BasicAVTransformerBlock.{name}" for name in blocks.METHODS))
_OF_A_BLOCK = (
    *_RESTATED,
    "CompressedTimestep.expand",
    "CompressedTimestep.expand_for_computation",
    "apply_cross_attention_adaln",
)
_OF_TABLES = (
    "LTXAVModel._process_transformer_blocks",
    "LTXAVModel._prepare_positional_embeddings",
)
_OF_TABLES_BELOW = (
    "LTXBaseModel._prepare_positional_embeddings",
    "LTXBaseModel._precompute_freqs_cis",
    "LTXBaseModel._forward",
    *(("freqs_cis_matrix",) if upstream.BY_KITCHEN else ()),
)
_OF_AN_ATTENTION = ("CrossAttention.forward",)
_OF_AN_ACTIVATION = ("GELU_approx.forward",)
_OF_NORMS = ("disable_weight_init.RMSNorm.forward", "disable_weight_init.RMSNorm.forward_comfy_cast_weights")
_OF_ROTARY = ("apply_rotary_emb", "apply_rotary_emb_qk")
_OF_KITCHEN = ("apply_rope_split_half", "apply_rope_split_half1", "apply_rope", "apply_rope1")


_MAKING_TABLES = ("_forward", "_prepare_positional_embeddings", "_precompute_freqs_cis")


class Blocks(Part):
    """In place of `LTXAVModel._process_transformer_blocks`: it notes what all blocks are handed, and runs ComfyUI's.

    graph    runs it as a CUDA graph (`graph.py`), where that was asked for; `no_graph` counts why there is none
    """

    __slots__ = ("graph", "no_graph", "step")
    method = "_process_transformer_blocks"
    kind = "tables"

    def __init__(self, module: Any, model: Model):
        super().__init__(module, model)
        self.step: Step = model.step  # type: ignore[attr-defined]
        self.graph: Any = None
        self.no_graph: Counter[str] = Counter()

    def fall(self, reason: str) -> None:
        self.no_graph[reason] += 1

    def why_stock(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Tables of another's making may be any matrix: attentions then find none that are the model's."""
        if len(args) > 5:  # ComfyUI gives the options by their name
            return "what comes after pe was given by its place"
        replaced = (name for name in _MAKING_TABLES if not _own(module, name))
        return next((f"another node has replaced {name} of this model" for name in replaced), None)

    def fused(
        self, module: Any, x: Any, context: Any, attention_mask: Any, timestep: Any, pe: Any, **kwargs: Any
    ) -> Any:
        run = self.run if self.graph is None else self.graph
        return run(x, context, attention_mask, timestep, pe, **kwargs)

    def run(self, x: Any, context: Any, attention_mask: Any, timestep: Any, pe: Any, **kwargs: Any) -> Any:
        with self.step.of(self.module, pe):
            return self.stock(x, context, attention_mask, timestep, pe, **kwargs)


def _own(module: Any, name: str) -> bool:
    """Also where an object patch was taken back, which leaves a bound method of the class's own."""
    had = vars(module).get(name)
    return (had is None or had == bound(module, name)) and getattr(type(module), name) is getattr(_av.LTXAVModel, name)


def transformers(target: Any) -> list[Any]:
    """The LTX-2 transformers in a model, in a BaseModel or in a ModelPatcher that holds one."""
    held = getattr(target, "model", None)
    return ltx2.models_in([target, *([held] if isinstance(held, torch.nn.Module) else [])], _av.LTXAVModel)


def accelerate(transformer: Any, handle: Handle) -> None:
    """Take over every site of one transformer, noting each in the handle. ValueError for options that it has not."""
    if handle.keep_text:
        raise ValueError("keep_text is True; accepted for a ComfyUI model: False, its text is not kept")
    left_out = {
        "attention": _left_out_of_attentions(),
        "block": _left_out_of_blocks(),
        "activation": [*entries(_model, *_OF_AN_ACTIVATION), *activation.LEFT_OUT],
        "tables": _left_out_of_tables(),
    }
    shared = Model(handle, left_out)
    shared.step = Step()  # type: ignore[attr-defined]
    forms = Forms()
    for name, rotates, _, attn in ltx2.attentions(transformer):
        _take_over_attention(name, rotates, attn, shared, forms)
    ltx2.take_over_blocks(
        transformer.transformer_blocks, shared, blocks.BasicAVTransformerBlock, blocks.sites_of, _why_block_stays
    )
    sources = functions(_model, *_OF_AN_ACTIVATION)
    activation.activate_in_place(
        transformer.transformer_blocks, shared, _model.GELU_approx, NAME, upstream.READ, sources
    )
    _take_over_tables(transformer, shared)
    ModelForward.install(transformer, shared)


def _take_over_attention(name: str, rotates: bool, attn: Any, shared: Model, forms: Forms) -> None:
    gated = attn.to_gate_logits is not None
    site, gate_site = ltx2.attention_sites(shared.handle, name, FIRST if rotates else None, gated=gated)
    sources = functions(_model, *_OF_AN_ATTENTION) | functions(_ops, *_OF_NORMS)
    reason = next(why_not_stock(attn, _model.CrossAttention, "attention", NAME, upstream.READ, sources), None)
    site.declined = gate_site.declined = reason
    if reason is None:
        shared.handle.put(attn, CrossAttention(attn, shared, (site, gate_site) if gated else (site,), forms))


FIRST = rotary_operators()[0]


def _why_block_stays(block: Any) -> Iterator[str]:
    sources = functions(_av, *_OF_A_BLOCK)
    yield from why_not_stock(block, blocks._Block, "block", NAME, upstream.READ, sources)


def _take_over_tables(transformer: Any, shared: Model) -> None:
    """Without these each attention to something that is rotated keeps its own rotary embedding, and says so."""
    above = functions(_av, *_OF_TABLES)
    sources = above | functions(_model, *_OF_TABLES_BELOW)
    if next(why_not_read(NAME, upstream.READ, sources), None) is not None or Blocks.method in vars(transformer):
        return
    if any(getattr(type(transformer), name.partition(".")[2]) is not code for name, code in above.items()):
        return
    ours = Blocks(transformer, shared)
    shared.handle.put(transformer, ours)
    if shared.handle.cuda_graph:
        graph_blocks(transformer, ours, shared)


# -- what is left out --------------------------------------------------------------------------------------------------


def _left_out_of_attentions() -> list[Entry]:
    found = entries(_model, *_OF_AN_ATTENTION, *_OF_ROTARY, "apply_split_rotary_emb", "apply_interleaved_rotary_emb")
    found += entries(_ops, *_OF_NORMS)
    if upstream.BY_KITCHEN and upstream.kitchen is not None:
        found += entries(upstream.kitchen, *_OF_KITCHEN)
    used = [operator for one in rotary_operators() for operator in (one.alone, one.qk)]
    return found + of_operators((*used, QK_RMS_NORM, HEAD_GATE))


def _left_out_of_blocks() -> list[Entry]:
    found = entries(_av, *_OF_A_BLOCK) + entries(upstream.common_dit, "rms_norm")
    return found + of_operators(blocks.OPERATORS)


def _left_out_of_tables() -> list[Entry]:
    return entries(_av, *_OF_TABLES) + entries(_model, *_OF_TABLES_BELOW)


# -- for `bitfuse doctor` ----------------------------------------------------------------------------------------------


def look(device: torch.device) -> Iterator[tuple[str, str, str, str, str]]:
    """(what, ok or note, what was found, what it means, what to do) of all else that the bits depend on."""
    yield _look_at_kitchen(device)
    yield _look_at_attention(device)


def _look_at_kitchen(device: torch.device) -> tuple[str, str, str, str, str]:
    name = "comfy-kitchen"
    if not upstream.BY_KITCHEN:
        return name, "ok", "not asked", "up to 0.27 the rotary embedding is ComfyUI's own", "nothing"
    version = getattr(upstream.kitchen, "__version__", None) or packages.version("comfy-kitchen") or "unknown"
    states = upstream.kitchen.list_backends() if upstream.kitchen is not None else {}
    at_work = [backend for backend, of in states.items() if of["available"] and not of["disabled"]]
    form, reason = Forms().of(_Sizes(), True, torch.bfloat16, device)
    found = f"{version}, backends {', '.join(at_work) or 'none'}"
    if form is None:
        meaning = f"its rotary embedding equals no operator, and stays: {reason}"
        return name, "note", found, meaning, "norms and all else are fused; a newer bitfuse may know this form"
    meaning = f"its rotary embedding of a bf16 head of {_Sizes.dim_head} is equal to {form.qk.name}, tried here"
    return name, "ok", found, meaning, "nothing"


class _Sizes:
    """An attention's, of LTX-2's video."""

    heads, dim_head = 4, 128


def _look_at_attention(device: torch.device) -> tuple[str, str, str, str, str]:
    chosen, order = upstream.attention.optimized_attention, getattr(_ops, "SDPA_BACKEND_PRIORITY", None)
    found = getattr(chosen, "__name__", str(chosen))
    if device.type != "cuda" or order is None or found != "attention_pytorch":
        return "attention", "ok", found, "it is called by bitfuse as ComfyUI calls it", "nothing"
    names = [backend.name for backend in order]
    found = f"{found}, which asks PyTorch for {' before '.join(names[:2])}"
    if torch.cuda.get_device_capability(device)[0] != 9 or names[0] != "FLASH_ATTENTION":
        return "attention", "ok", found, "it is called by bitfuse as ComfyUI calls it", "nothing"
    meaning = (
        "on Hopper PyTorch's FlashAttention-2 takes 1.9 times as long as its cuDNN attention (H100, torch 2.11, 24576 "
        "tokens); the bits of the two differ, so bitfuse leaves the choice"
    )
    return "attention", "note", found, meaning, "a node that sets optimized_attention_override can choose another"
