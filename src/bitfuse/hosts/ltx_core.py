"""Lightricks' ltx-core (1.0.0 to 1.2.0): the attentions of its LTX-2 transformer, and the grid of its rotary tables.

From 1.1.4 on ltx-core has seams: an attention calls its `preattention_function` (Q/K norms and rotary embedding) and
its `gated_attention_function` (the head gate), which `TransformerOpsConfig.from_functions` or anybody else fills. The
two callables below go in there. Before 1.1.4 there are none: there an attention gets a forward of its own
(`bitfuse.run.swap`), which restates upstream's with the same two callables. They stand in only for upstream code whose
hash is listed here; any other is left in place, and the report says why. The rest of a block is in `ltx_core_block.py`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import ltx_core
import torch
from ltx_core.model.transformer import attention, model, rope, transformer_args
from torch import Tensor

from bitfuse.core.conditions import around
from bitfuse.hosts import ltx_core_block
from bitfuse.hosts.ltx2 import (
    Entry,
    Model,
    ModelForward,
    Part,
    models_in,
    of_operators,
    rotary_difference,
    watched,
    weights_of,
)
from bitfuse.hosts.ltx_core_block import Seam, ops, why_seam_stays
from bitfuse.hosts.site import Handle, Site, not_own, source_hash, why_norms_are_called, why_not_read, why_not_stock
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.qk_norm import QK_INTERLEAVED_PER_OP, QK_RMS_NORM, QK_SPLIT_PER_OP
from bitfuse.ops.rope import INTERLEAVED_PER_OP, SPLIT_PER_OP
from bitfuse.run.graphs import graph_forward


def _name() -> str:
    """ltx-core and its version, where the installed version is the one that was imported."""
    try:
        installed = importlib.metadata.distribution("ltx-core")
    except importlib.metadata.PackageNotFoundError:
        return "ltx-core (a checkout)"
    files = [file.locate() for file in installed.files or () if str(file) == "ltx_core/__init__.py"]
    elsewhere = files and not any(str(file) == ltx_core.__file__ for file in files)
    return "ltx-core (a checkout)" if elsewhere else f"ltx-core {installed.version}"


NAME = _name()

_Tables = tuple[Tensor, Tensor]  # cos and sin
_Attention: Any = attention.Attention
_Preprocessor: Any = transformer_args.TransformerArgsPreprocessor

_OPERATORS = {"split": SPLIT_PER_OP, "interleaved": INTERLEAVED_PER_OP}
_QK_OPERATORS = {"split": QK_SPLIT_PER_OP, "interleaved": QK_INTERLEAVED_PER_OP}

# The attentions of a block; the queries and keys of attn2 and audio_attn2, to the text, are normed but not turned.
_ATTENTIONS = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

_OWN_BATCH = {"bb9c50a0985f415e", "c32c520ae778bf00"}  # split rotary up to 1.1.3: the tables' batch is x's

# Upstream sources that were read and are restated here or in the operators' references (`source_hash`).
_READ = {
    "apply_rotary_emb": {"a77f8dca37a629b4", "55a5c41a497f7219"},  # 1.0.0 to 1.1.2; 1.1.3 to 1.2.0
    "apply_split_rotary_emb": {*_OWN_BATCH, "d1f17ed1ffb90969"},  # 1.0.0 to 1.1.2, 1.1.3; 1.1.4 to 1.2.0
    "apply_interleaved_rotary_emb": {"41faef873dd4639d"},  # 1.0.0 to 1.2.0
    "Attention.forward": {"dfbde2bcf8b882b5"},  # 1.0.0 to 1.1.3; later ones have seams
    "tables": {"62391a558b4c82de"},  # TransformerArgsPreprocessor._prepare_positional_embeddings, 1.0.0 to 1.2.0
}


# -- what runs in an attention -----------------------------------------------------------------------------------------


class PreAttention(Seam):
    """ltx-core's `PreAttentionCallable`: Q/K norms and rotary embedding, in one kernel."""

    kind = "attention"

    def __init__(self, site: Site, stock: Any, model: Model, unchecked: bool):
        super().__init__(site, stock, model)
        self._own_batch = source_hash(rope.apply_split_rotary_emb) in _OWN_BATCH
        self._unchecked = unchecked  # somebody watched the ops when it was taken over

    def run(
        self,
        q: Tensor,
        k: Tensor,
        attn_module: Any,
        mask: Tensor | None,
        pe: _Tables | None,
        k_pe: _Tables | None,
    ) -> tuple[Tensor, Tensor]:
        attn = attn_module
        if (reason := next(self._why_stock(q, k, attn, pe, k_pe), None)) is not None:
            self.site.fall(reason)
            return self.chain(q, k, attn, mask, pe, k_pe)
        norms = (attn.q_norm.weight, attn.k_norm.weight)
        if pe is None:
            return self.site.call(QK_RMS_NORM, q, k, *norms, attn.q_norm.eps)
        own = (None, None) if k_pe is None else k_pe
        return self.site.call(_QK_OPERATORS[attn.rope_type.value], q, k, *norms, *pe, *own, attn.q_norm.eps)

    def chain(
        self, q: Tensor, k: Tensor, attn: Any, mask: Tensor | None, pe: _Tables | None, k_pe: _Tables | None
    ) -> tuple[Tensor, Tensor]:
        """The host's own chain, with its norms called as modules."""
        if self.stock is not None:
            return self.stock(q, k, attn, mask, pe, k_pe)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if pe is None:
            return q, k
        turn = _rotary_home().apply_rotary_emb
        return turn(q, pe, attn.rope_type), turn(k, pe if k_pe is None else k_pe, attn.rope_type)

    def _why_stock(self, q: Tensor, k: Tensor, attn: Any, pe: _Tables | None, k_pe: _Tables | None) -> Iterator[str]:
        yield from why_norms_are_called(q_norm=attn.q_norm, k_norm=attn.k_norm)
        if pe is None:
            return
        if self._unchecked:
            reason = next(around(), None) if watched() else _difference(attn)
            if reason is not None:
                yield reason
            self._unchecked = False
        if self._own_batch and attn.rope_type.value == "split":  # tables of another batch are an error there
            for x, (cos, _) in ((q, pe), (k, k_pe or pe)):
                if cos.shape[0] != x.shape[0]:
                    yield f"the tables have a batch of {cos.shape[0]} and the tokens of {x.shape[0]}"


class GatedAttention(Seam):
    """ltx-core's `GatedAttentionCallable`: the head gate."""

    kind = "attention"

    def run(self, x: Tensor, attn_out: Tensor, attn_module: Any) -> Tensor:
        return self.site.call(HEAD_GATE, attn_out, attn_module.to_gate_logits(x))


def _rotary_home() -> Any:
    """The module in which an attention finds `apply_rotary_emb`."""
    return ops or attention


class Attention(Part):
    """In place of an attention's forward before 1.1.4: the two callables above, where later versions have seams."""

    __slots__ = ("_gated_attention", "_pre_attention")
    kind = "attention"

    def __init__(self, attn: Any, model: Model, pre_attention: PreAttention, gated_attention: GatedAttention):
        gated = attn.to_gate_logits is not None
        super().__init__(attn, model, (pre_attention.site, gated_attention.site) if gated else (pre_attention.site,))
        self._pre_attention, self._gated_attention = pre_attention, gated_attention

    def fused(
        self,
        attn: Any,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        pe: _Tables | None = None,
        k_pe: _Tables | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool = False,
    ) -> Tensor:
        context = x if context is None else context
        v = attn.to_v(context)
        if all_perturbed:  # spatio-temporal guidance: the values stand in for the attention
            out = v
        else:
            q, k = attn.to_q(x), attn.to_k(context)
            q, k = self._pre_attention.run(q, k, attn, mask, pe, k_pe)
            out = attn.attention_function(q, k, v, attn.heads, mask)
            if perturbation_mask is not None:
                out = out * perturbation_mask + v * (1 - perturbation_mask)
        if attn.to_gate_logits is not None:
            out = self._gated_attention.run(x, out, attn)
        return attn.to_out(out)


# -- rotary tables -----------------------------------------------------------------------------------------------------


class Positions:
    """In place of a preprocessor's `_prepare_positional_embeddings`: the grid of frequencies is on the device already.

    The tables themselves are computed in each forward, as in stock.
    """

    def __init__(self, preprocessor: Any, model: Model):
        self._preprocessor, self._model = weakref.ref(preprocessor), model
        self.__signature__ = inspect.signature(preprocessor._prepare_positional_embeddings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found: Any = self._preprocessor()
        stock = type(found)._prepare_positional_embeddings
        if (
            torch.compiler.is_compiling()
            or self._model.why_stock("tables") is not None
            or next(around(), None) is not None
        ):
            return stock(found, *args, **kwargs)
        return self._tables(found, *args, **kwargs)

    def _tables(
        self,
        found: Any,
        positions: Tensor,
        inner_dim: int,
        max_pos: list[int],
        use_middle_indices_grid: bool,
        num_attention_heads: int,
        x_dtype: torch.dtype,
    ) -> _Tables:
        double = found.double_precision_rope
        grid = transformer_args.generate_freq_grid_np if double else transformer_args.generate_freq_grid_pytorch
        return transformer_args.precompute_freqs_cis(
            positions,
            dim=inner_dim,
            out_dtype=x_dtype,
            theta=found.positional_embedding_theta,
            max_pos=max_pos,
            use_middle_indices_grid=use_middle_indices_grid,
            num_attention_heads=num_attention_heads,
            rope_type=found.rope_type,
            freq_grid_generator=functools.partial(_grid_on, positions.device, grid),
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a copy or a pickle of the preprocessor: its own method."""
        return getattr, (self._preprocessor(), "_prepare_positional_embeddings")


@functools.lru_cache(maxsize=8)
def _grid_on(device: torch.device, grid: Callable[..., Tensor], *settings: Any) -> Tensor:
    """The frequencies on the device: from the CPU they would be copied, and waited for, in every forward."""
    return grid(*settings).to(device)


# -- taking over -------------------------------------------------------------------------------------------------------


def transformers(target: Any) -> list[Any]:
    """The LTX-2 transformer given, or the one inside (an `X0Model`, a wrapper); empty when there is none."""
    return models_in([target], model.LTXModel)


def unrecognised(target: Any) -> dict[str, str]:
    return {}


def accelerate(transformer: Any, handle: Handle) -> None:
    """Take over every site of one transformer, noting each in the handle. ValueError for options it has not."""
    if handle.keep_text:
        raise ValueError("keep_text is True; accepted for an ltx-core model: False, its text is not kept")
    of_blocks = ltx_core_block.originals() + of_operators(ltx_core_block.OPERATORS)
    shared = Model(handle, {"attention": _of_attentions(), "block": of_blocks, "tables": _OF_TABLES})
    for name, block, attn in _attentions(transformer):
        kind = str(getattr(attn.rope_type, "value", attn.rope_type))
        operator = QK_RMS_NORM if "attn2" in name else _QK_OPERATORS.get(kind, QK_RMS_NORM)
        site, gate_site = Site(name, operator.name), Site(f"{name}.gate", HEAD_GATE.name)
        handle.sites.append(site)
        if attn.to_gate_logits is not None:
            handle.sites.append(gate_site)
        _take_over(block, attn, site, gate_site, shared)
    ltx_core_block.accelerate(transformer, shared, NAME)
    _hold_grids(transformer, shared)
    ModelForward.install(transformer, shared)
    if handle.cuda_graph:
        graph_forward(transformer, handle, settings=lambda: tuple(shared.reasons().items()))


_USED = (*_OPERATORS.values(), *_QK_OPERATORS.values(), QK_RMS_NORM, HEAD_GATE)


def _of_attentions() -> list[Entry]:
    """The functions that the callables in an attention leave out."""
    found = [(_rotary_home(), "apply_rotary_emb", "apply_rotary_emb")]
    found += [(rope, name, name) for name in ("apply_split_rotary_emb", "apply_interleaved_rotary_emb")]
    found += [(_Attention, "forward", "Attention.forward")] if ops is None else []
    return found + ltx_core_block.of_seams() + of_operators(_USED)


_TABLES = "_prepare_positional_embeddings"
_OF_TABLES: list[Entry] = [(_Preprocessor, _TABLES, f"TransformerArgsPreprocessor.{_TABLES}")]


def _attentions(transformer: Any) -> Iterator[tuple[str, Any, Any]]:
    for index, block in enumerate(transformer.transformer_blocks):
        for name in _ATTENTIONS:
            if (attn := getattr(block, name, None)) is not None:
                yield f"transformer_blocks.{index}.{name}", block, attn


def _take_over(block: Any, attn: Any, site: Site, gate_site: Site, model: Model) -> None:
    reason = next(_why_left_alone(block, attn), None)
    unchecked = watched()
    if ops is None:  # one forward, so both or neither
        site.declined = gate_site.declined = reason or next(_why_not_turned(attn, unchecked), None)
        if site.declined is None:
            callables = PreAttention(site, None, model, unchecked), GatedAttention(gate_site, None, model)
            model.handle.put(attn, Attention(attn, model, *callables))
        return
    pre, gated = "preattention_function", "gated_attention_function"
    site.declined = reason or why_seam_stays(attn, pre) or next(_why_not_turned(attn, unchecked), None)
    gate_site.declined = reason or why_seam_stays(attn, gated)
    if site.declined is None:
        model.handle.fill(attn, pre, PreAttention(site, Seam.stock_of(attn.preattention_function), model, unchecked))
    if gate_site.declined is None:
        model.handle.fill(attn, gated, GatedAttention(gate_site, Seam.stock_of(attn.gated_attention_function), model))


def _why_left_alone(block: Any, attn: Any) -> Iterator[str]:
    if hasattr(block, "_orig_mod"):
        yield "its block was compiled with torch.compile, and is left to that"
    if ops is None:
        sources = {"Attention.forward": _Attention.forward}
        yield from why_not_stock(attn, _Attention, "attention", NAME, _READ, sources)
    elif not isinstance(attn, _Attention):  # its seams are filled, whatever its forward is
        yield not_own(attn, "attention", NAME)


def _why_not_turned(attn: Any, unchecked: bool) -> Iterator[str]:
    """Why its Q/K norms and rotary embedding stay."""
    kind = getattr(attn.rope_type, "value", attn.rope_type)
    if kind not in _OPERATORS:
        yield f"its rope_type is {kind!r}; known: {', '.join(_OPERATORS)}"
        return
    function = getattr(rope, name := f"apply_{kind}_rotary_emb")
    yield from why_not_read(NAME, _READ, {"apply_rotary_emb": _rotary_home().apply_rotary_emb, name: function})
    if not unchecked and (difference := _difference(attn)):
        yield difference


def _difference(attn: Any) -> str | None:
    """Why the host's rotary function and bitfuse's reference are not the same, tried in this process."""
    kind = attn.rope_type.value
    if difference := _differs_from_host(kind, attn.heads, attn.dim_head, *weights_of(attn)):
        return f"apply_{kind}_rotary_emb of {NAME} and bitfuse's reference part here: {difference}"
    return None


@functools.cache
def _differs_from_host(kind: str, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    host = getattr(rope, f"apply_{kind}_rotary_emb")
    return rotary_difference(host, _OPERATORS[kind], kind == "interleaved", heads, head_dim, dtype, dtype, device)


def _hold_grids(transformer: Any, model: Model) -> None:
    for name in ("video_args_preprocessor", "audio_args_preprocessor"):
        found = getattr(transformer, name, None)
        found = getattr(found, "simple_preprocessor", found)
        known = source_hash(_Preprocessor._prepare_positional_embeddings) in _READ["tables"]
        if known and type(found) is _Preprocessor and "_prepare_positional_embeddings" not in found.__dict__:
            model.handle.fill(found, "_prepare_positional_embeddings", Positions(found, model))
