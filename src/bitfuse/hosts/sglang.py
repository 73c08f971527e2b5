"""SGLang's LTX-2 transformer (0.5.12 to 0.5.23): its attentions and blocks, and the functions of its module.

An attention gets a forward of its own (`run.swap`), which restates upstream's with Q/K norms, rotary embedding and
head gate as operators; `sglang_block.py` does the same for the rest of a block, and says how it
goes under SGLang's autocast. The rotary function of the model, and `_ltx2_modulate` of the output norm, are replaced in
SGLang's module: whoever else calls them there gets them too, an attention that is left alone, say. The last restore
puts them back. All of it only for upstream code whose hash is listed here; any other is left in place, and the report
says why.

What is reproduced is SGLang's PyTorch chain, at every quality tier. SGLang's own kernels round otherwise in places (Q/K
norm with rotary embedding on SM100 and, from the tier "lossless" on, SM90; norm with modulation from "lossless" on).
The tiers themselves, and what else they switch, stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.multimodal_gen.runtime.models.dits import ltx_2 as upstream
from sglang.version import __version__
from torch import Tensor

from bitfuse.core.operator import OPERATORS, Operator
from bitfuse.hosts import sglang_block
from bitfuse.hosts.ltx2 import ENDED, Model, ModelForward, Part, models_in, of_operators, rotary_difference, watched
from bitfuse.hosts.sglang_block import call, unaffected, why_autocast
from bitfuse.hosts.site import Handle, Site, source_hash, why_norms_are_called, why_not_read, why_not_stock
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.interleaved_rotary import INTERLEAVED_PER_OP
from bitfuse.ops.modulate import MODULATE
from bitfuse.ops.qk_norm import QK_INTERLEAVED_PER_OP, QK_RMS_NORM, QK_SPLIT_PER_OP
from bitfuse.ops.split_rotary import SPLIT_PER_OP

NAME = f"SGLang {__version__}"

_Tables = tuple[Tensor, Tensor]  # cos and sin
_Attention: Any = upstream.LTX2Attention

# By a model's rope_type: SGLang's function, its operator, and that with the norms of queries and keys before it.
_ROTARY = {
    "split": ("apply_split_rotary_emb", SPLIT_PER_OP, QK_SPLIT_PER_OP),
    "interleaved": ("apply_interleaved_rotary_emb", INTERLEAVED_PER_OP, QK_INTERLEAVED_PER_OP),
}
_MODULATE = "_ltx2_modulate"
_CONTEXT_KV = 11  # the place of this parameter of an attention's forward

# The attentions of a block; the queries and keys of attn2 and audio_attn2, to the text, are normed but not turned.
_ATTENTIONS = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

# Upstream sources that were read and are restated here or in the operators' references (`source_hash`).
_GUARDED = {"10f1793d45445185", "d28400a15876cb71", "6b8683142df03f36"}  # the norms stand in autocast(enabled=False)
_READ = {
    "apply_split_rotary_emb": {
        *("f542fe0abde339f4", "e36408d67b07f753", "0e226642d9e60e3f"),  # 0.5.12; 0.5.17; 0.5.19 to 0.5.23
    },
    "apply_interleaved_rotary_emb": {"06f1683b35c5db4d"},  # 0.5.12 to 0.5.23
    _MODULATE: {"ecc79cf7829975df", "bbf521c3630ea3a3"},  # 0.5.18; 0.5.23
    "LTX2Attention.forward": {
        *("b13f7454f48a424b", "6cbdaae556f493df"),  # 0.5.12; 0.5.15
        *_GUARDED,  # 0.5.18; 0.5.20; 0.5.23
    },
}


_READ |= sglang_block._READ
READ = _READ


# -- functions of SGLang's module --------------------------------------------------------------------------------------


@dataclass
class _Function:
    """A function of SGLang's module that ours stands in for, and the sites of the models that hold it replaced."""

    name: str
    operator: Operator
    sites: list[tuple[Site, Model]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stock = getattr(upstream, self.name)
        call = _modulate if self.name == _MODULATE else _turn
        self.ours = functools.wraps(self.stock)(functools.partial(call, self))

    def run(self, *args: Tensor, stock: Callable[[], Tensor]) -> Tensor:
        """The operator where it is fused, counted by the latest handle; else SGLang's own function."""
        if torch.compiler.is_compiling() or not (sites := tuple(self.sites)):
            return stock()
        x, (site, model) = args[0], sites[-1]
        reason = model.why_stock("function")
        if reason is ENDED:
            return stock()
        reason = reason or why_autocast(x, guarded=True)  # there is no norm in any of these
        reason = reason or unaffected(x.device.type, self.operator.routed, *args).reason
        if reason is None:
            return call(site, self.operator, *args)
        site.fall(reason)
        return stock()


_functions: dict[str, _Function] = {}  # those that are replaced


def _replace_function(name: str, site: Site, model: Model) -> None:
    model.handle.sites.append(site)
    if site.declined is not None:
        return
    found = _functions.get(name) or _Function(name, OPERATORS[site.operator])

    def undo() -> None:
        found.sites[:] = [entry for entry in found.sites if entry[0] is not site]
        if not found.sites:
            if getattr(upstream, name) is found.ours:  # somebody else's, put there since, is not ours to take away
                setattr(upstream, name, found.stock)
            if _functions.get(name) is found:
                del _functions[name]

    model.handle.on_restore(undo)
    _functions[name] = found
    found.sites.append((site, model))
    if getattr(upstream, name) is found.stock:
        setattr(upstream, name, found.ours)


def _turn(function: _Function, x: Tensor, freqs: _Tables) -> Tensor:
    return function.run(x, *freqs, stock=lambda: function.stock(x, freqs))


def _modulate(function: _Function, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return function.run(x, scale, shift, stock=lambda: function.stock(x, scale, shift))


# -- an attention ------------------------------------------------------------------------------------------------------


class LTX2Attention(Part):
    """In place of the forward of upstream's attention: Q/K norms, rotary embedding and head gate are fused.

    function    the name of the rotary function
    """

    __slots__ = ("_function", "_guarded", "gate_site", "site")
    kind = "attention"

    def __init__(self, attn: Any, model: Model, site: Site, gate_site: Site, function: str):
        super().__init__(attn, model, (site,) if attn.to_gate_logits is None else (site, gate_site))
        self.site, self.gate_site, self._function = site, gate_site, function
        self._guarded = source_hash(_Attention.forward) in _GUARDED

    def why_stock(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        context_kv = args[_CONTEXT_KV] if len(args) > _CONTEXT_KV else kwargs.get("context_kv")
        if context_kv is not None:
            return "the text's keys are kept, normed; of the queries' norm alone nothing is left to fuse"
        if (reason := next(why_norms_are_called(q_norm=attn.q_norm, k_norm=attn.k_norm), None)) is not None:
            return reason
        function = _functions.get(self._function)
        if function is None or getattr(upstream, self._function) is not function.ours:
            return f"{self._function} of {NAME} was replaced meanwhile"
        return why_autocast(args[0] if args else kwargs["x"], self._guarded)

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
        skip_sequence_parallel_override: bool = False,
        gather_context_kv_for_sp: bool = False,
        context_replicated_prefix_len: int = 0,
        context_kv: None = None,
    ) -> Tensor:
        context = x if context is None else context
        value, _ = attn.to_v(context)
        v = value.view(*value.shape[:-1], attn.local_heads, attn.dim_head)
        if all_perturbed:  # spatio-temporal guidance: the values stand in for the attention
            out = v
        else:
            q, _ = attn.to_q(x)
            k, _ = attn.to_k(context)
            q, k = self._norm_and_turn(attn, q, k, pe, k_pe)
            q, k = (t.view(*t.shape[:-1], attn.local_heads, attn.dim_head) for t in (q, k))
            k_all, v_all, here = k, v, skip_sequence_parallel_override
            if gather_context_kv_for_sp:  # each rank has its own tokens, and looks at those of all
                k_all, v_all, mask = _gathered(k, v, mask, int(context_replicated_prefix_len))
                here = True
            more = {} if attn.use_local_attention else {"skip_sequence_parallel_override": here}
            out = attn.attn(q, k_all, v_all, attn_mask=mask, **more)
            if perturbation_mask is not None:
                if perturbation_mask.ndim == out.ndim - 1:
                    perturbation_mask = perturbation_mask.unsqueeze(-1)
                out = out * perturbation_mask + v * (1 - perturbation_mask)
        out = out.flatten(2)
        if attn.to_gate_logits is not None:
            logits, _ = attn.to_gate_logits(x)
            out = call(self.gate_site, HEAD_GATE, out, logits)
        return attn.to_out[0](out)[0]

    def _norm_and_turn(
        self, attn: Any, q: Tensor, k: Tensor, pe: _Tables | None, k_pe: _Tables | None
    ) -> tuple[Tensor, Tensor]:
        norms = (attn.q_norm.weight, attn.k_norm.weight)
        if pe is None:
            return call(self.site, QK_RMS_NORM, q, k, *norms, attn.q_norm.eps)
        operator = QK_INTERLEAVED_PER_OP if pe[0].dim() == 3 else QK_SPLIT_PER_OP
        own = (None, None) if k_pe is None else k_pe
        return call(self.site, operator, q, k, *norms, *pe, *own, attn.q_norm.eps)


def _gathered(k: Tensor, v: Tensor, mask: Tensor | None, prefix: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of all ranks; the first `prefix` tokens are the same on each, and not gathered."""

    def gather(t: Tensor) -> Tensor:
        return upstream.sequence_model_parallel_all_gather(t.contiguous(), dim=1)

    if prefix > 0:
        k, v = (torch.cat([t[:, :prefix], gather(t[:, prefix:])], dim=1) for t in (k, v))
        return k, v, mask
    return gather(k), gather(v), None if mask is None else gather(mask)


# -- taking over -------------------------------------------------------------------------------------------------------


def transformers(target: Any) -> list[Any]:
    """The LTX-2 transformers in a pipeline's modules, or in the one given; empty when there is none."""
    modules = getattr(target, "modules", None)
    parts = [target, *(modules.values() if isinstance(modules, dict) else ())]
    return models_in(parts, upstream.LTX2VideoTransformer3DModel)


def unrecognised(target: Any) -> dict[str, str]:
    return {}


def accelerate(model: Any, handle: Handle) -> None:
    """Take over every site of one transformer, noting each in the handle. ValueError for options it has not."""
    if handle.keep_text:
        raise ValueError("keep_text is True; accepted for an SGLang model: False, SGLang keeps the text itself")
    if handle.cuda_graph:
        raise ValueError("cuda_graph is True; accepted for an SGLang model: False, SGLang captures its own graphs")
    of_attentions = [(_Attention, "forward", "LTX2Attention.forward"), *of_operators(_USED)]
    of_blocks = sglang_block.originals() + of_operators(sglang_block.OPERATORS)
    of_functions = of_operators((_ROTARY[model.rope.rope_type][1], MODULATE))
    shared = Model(handle, {"attention": of_attentions, "block": of_blocks, "function": of_functions})
    kind = model.rope.rope_type
    function, operator, with_norms = _ROTARY[kind]
    device = next((p.device for p in model.parameters() if p.is_cuda), torch.device("cpu"))
    unturned = _why_function_stays(function, kind, device)
    for name, block, attn in _attentions(model):
        reason = next(_why_left_alone(block, attn), unturned)
        site = Site(name, (QK_RMS_NORM if "attn2" in name else with_norms).name, reason)
        gate_site = Site(f"{name}.gate", HEAD_GATE.name, reason)
        handle.sites += [site] if attn.to_gate_logits is None else [site, gate_site]
        if reason is None:
            handle.put(attn, LTX2Attention(attn, shared, site, gate_site, function))
    sglang_block.accelerate(model, shared, NAME)
    _replace_function(function, Site(function, operator.name, unturned), shared)
    if hasattr(upstream, _MODULATE):  # before 0.5.18 the output's modulation is inline
        reason = _why_function_stays(_MODULATE, kind, device)
        _replace_function(_MODULATE, Site(_MODULATE, MODULATE.name, reason), shared)
    ModelForward.install(model, shared)


_USED = (*(operator for _, *both in _ROTARY.values() for operator in both), QK_RMS_NORM, HEAD_GATE)


def _attentions(model: Any) -> Iterator[tuple[str, Any, Any]]:
    for index, block in enumerate(model.transformer_blocks):
        for name in _ATTENTIONS:
            if (attn := getattr(block, name, None)) is not None:
                yield f"transformer_blocks.{index}.{name}", block, attn


def _why_left_alone(block: Any, attn: Any) -> Iterator[str]:
    if block._compiled_call_impl is not None:
        yield sglang_block.COMPILED
    sources = {"LTX2Attention.forward": _Attention.forward}
    yield from why_not_stock(attn, _Attention, "attention", NAME, _READ, sources)
    if (ranks := upstream.get_tp_world_size()) > 1:
        yield f"tensor parallelism of {ranks}: the norms of queries and keys add up over the ranks"
    if not attn.qk_norm:
        yield "it does not norm queries and keys"


def _why_function_stays(name: str, kind: str, device: torch.device) -> str | None:
    """Why a function of SGLang's module is not replaced."""
    if name in _functions:  # it was read and checked when it was
        return None
    if watched():
        return f"{name} of {NAME} can't be tried here: something sees every PyTorch op (FakeTensorMode, say)"
    stock = getattr(upstream, name)
    if reason := next(why_not_read(NAME, _READ, {name: stock}), None):
        return reason
    if name != _MODULATE and (difference := _differs_from_host(kind, device)):
        return f"{name} of {NAME} and bitfuse's reference part here: {difference}"
    return None


@functools.cache
def _differs_from_host(kind: str, device: torch.device) -> str | None:
    name, operator, _ = _ROTARY[kind]
    host = getattr(upstream, name)

    def chain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if kind == "interleaved":
            return host(x, (cos, sin))
        heads = x.unflatten(2, (cos.shape[1], -1)).swapaxes(1, 2)  # in this form SGLang runs no kernel of its own
        return host(heads, (cos, sin)).swapaxes(1, 2).flatten(2)

    dtype = torch.bfloat16
    return rotary_difference(chain, operator, kind == "interleaved", 4, 64, dtype, dtype, device)
