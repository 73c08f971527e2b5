"""SGLang's LTX-2 transformer (0.5.12 to 0.5.23): its attentions and blocks, and the functions of its module.

An attention gets its class changed to a subclass of the same name, whose forward restates upstream's with Q/K norms,
rotary embedding and head gate as operators; `sglang_block.py` does the same for the rest of a block, and says how it
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

from bitfuse.contract import OPERATORS, Operator
from bitfuse.hosts import sglang_block
from bitfuse.hosts.common import rotary_difference
from bitfuse.hosts.patch import (
    Handle,
    Site,
    Swapped,
    source_hash,
    swap_class,
    why_norms_are_called,
    why_not_read,
    why_not_stock,
)
from bitfuse.hosts.sglang_block import call, unaffected, why_autocast
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


# -- functions of SGLang's module --------------------------------------------------------------------------------------


@dataclass
class _Function:
    """A function of SGLang's module that ours stands in for, and the sites of the handles that hold it replaced."""

    name: str
    operator: Operator
    sites: list[Site] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stock = getattr(upstream, self.name)
        call = _modulate if self.name == _MODULATE else _turn
        self.ours = functools.wraps(self.stock)(functools.partial(call, self))

    def run(self, *args: Tensor, stock: Callable[[], Tensor]) -> Tensor:
        """The operator where it is fused, counted by the latest handle; else SGLang's own function."""
        if torch.compiler.is_compiling() or not self.sites:
            return stock()
        x, site = args[0], self.sites[-1]
        reason = why_autocast(x, guarded=True)  # there is no norm in any of these
        reason = reason or unaffected(x.device.type, self.operator.route, *args).reason
        return site.leave(stock, reason) if reason else call(site, self.operator, *args)


_functions: dict[str, _Function] = {}  # those that are replaced


def _replace_function(name: str, site: Site, handle: Handle) -> None:
    handle.sites.append(site)
    if site.declined is not None:
        return
    found = _functions.get(name)
    if found is None:
        found = _functions[name] = _Function(name, OPERATORS[site.operator])
        setattr(upstream, name, found.ours)
    found.sites.append(site)

    def undo() -> None:
        found.sites[:] = [other for other in found.sites if other is not site]
        if not found.sites and _functions.get(name) is found:
            del _functions[name]
            if getattr(upstream, name) is found.ours:  # somebody else's, put there since, is not ours to take away
                setattr(upstream, name, found.stock)

    handle.on_restore(undo)


def _turn(function: _Function, x: Tensor, freqs: _Tables) -> Tensor:
    return function.run(x, *freqs, stock=lambda: function.stock(x, freqs))


def _modulate(function: _Function, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return function.run(x, scale, shift, stock=lambda: function.stock(x, scale, shift))


# -- an attention ------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """What an attention carries while it is accelerated."""

    site: Site
    gate_site: Site
    function: str  # the rotary function
    guarded: bool

    def why_stock(self, attn: Any, x: Tensor, context_kv: Any) -> Iterator[str]:
        """Why upstream's own forward must run."""
        if context_kv is not None:
            yield "the text's keys are kept, normed; of the queries' norm alone nothing is left to fuse"
        yield from why_norms_are_called(q_norm=attn.q_norm, k_norm=attn.k_norm)
        function = _functions.get(self.function)
        if function is None or getattr(upstream, self.function) is not function.ours:
            yield f"{self.function} of {NAME} was replaced meanwhile"
        if reason := why_autocast(x, self.guarded):
            yield reason


class LTX2Attention(Swapped, _Attention):  # the same name as upstream's
    """Upstream's attention with Q/K norms, rotary embedding and head gate fused."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        state = self.__dict__.get("_bitfuse")
        if state is None or torch.compiler.is_compiling():
            return _Attention.forward(self, *args, **kwargs)
        x = args[0] if args else kwargs["x"]
        context_kv = args[_CONTEXT_KV] if len(args) > _CONTEXT_KV else kwargs.get("context_kv")
        if (reason := next(state.why_stock(self, x, context_kv), None)) is not None:
            for site in (state.site,) if self.to_gate_logits is None else (state.site, state.gate_site):
                site.fall(reason)
            return _Attention.forward(self, *args, **kwargs)
        return self._forward(state, *args, **kwargs)

    def _forward(
        self,
        state: _State,
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
        value, _ = self.to_v(context)
        v = value.view(*value.shape[:-1], self.local_heads, self.dim_head)
        if all_perturbed:  # spatio-temporal guidance: the values stand in for the attention
            out = v
        else:
            q, _ = self.to_q(x)
            k, _ = self.to_k(context)
            q, k = self._norm_and_turn(state.site, q, k, pe, k_pe)
            q, k = (t.view(*t.shape[:-1], self.local_heads, self.dim_head) for t in (q, k))
            k_all, v_all, here = k, v, skip_sequence_parallel_override
            if gather_context_kv_for_sp:  # each rank has its own tokens, and looks at those of all
                k_all, v_all, mask = _gathered(k, v, mask, int(context_replicated_prefix_len))
                here = True
            more = {} if self.use_local_attention else {"skip_sequence_parallel_override": here}
            out = self.attn(q, k_all, v_all, attn_mask=mask, **more)
            if perturbation_mask is not None:
                if perturbation_mask.ndim == out.ndim - 1:
                    perturbation_mask = perturbation_mask.unsqueeze(-1)
                out = out * perturbation_mask + v * (1 - perturbation_mask)
        out = out.flatten(2)
        if self.to_gate_logits is not None:
            logits, _ = self.to_gate_logits(x)
            out = call(state.gate_site, HEAD_GATE, out, logits)
        return self.to_out[0](out)[0]

    def _norm_and_turn(
        self, site: Site, q: Tensor, k: Tensor, pe: _Tables | None, k_pe: _Tables | None
    ) -> tuple[Tensor, Tensor]:
        norms = (self.q_norm.weight, self.k_norm.weight)
        if pe is None:
            return call(site, QK_RMS_NORM, q, k, *norms, self.q_norm.eps)
        operator = QK_INTERLEAVED_PER_OP if pe[0].dim() == 3 else QK_SPLIT_PER_OP
        own = (None, None) if k_pe is None else k_pe
        return call(site, operator, q, k, *norms, *pe, *own, self.q_norm.eps)


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
    """The LTX-2 transformers in a pipeline's modules, or the one given; empty when there is none."""
    modules = getattr(target, "modules", None)
    parts = [target, *(modules.values() if isinstance(modules, dict) else ())]
    parts = [getattr(part, "_orig_mod", part) for part in parts]  # torch.compile's wrapper
    return [part for part in parts if isinstance(part, upstream.LTX2VideoTransformer3DModel)]


def accelerate(model: Any, handle: Handle) -> None:
    """Take over every site of one transformer, noting each in the handle. ValueError for options it has not."""
    if handle.keep_text:
        raise ValueError("keep_text is True; accepted for an SGLang model: False, SGLang keeps the text itself")
    if handle.cuda_graph:
        raise ValueError("cuda_graph is True; accepted for an SGLang model: False, SGLang captures its own graphs")
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
            guarded = source_hash(_Attention.forward) in _GUARDED
            swap_class(attn, LTX2Attention, _State(site, gate_site, function, guarded), handle)
    sglang_block.accelerate(model, handle, NAME)
    _replace_function(function, Site(function, operator.name, unturned), handle)
    if hasattr(upstream, _MODULATE):  # before 0.5.18 the output's modulation is inline
        reason = _why_function_stays(_MODULATE, kind, device)
        _replace_function(_MODULATE, Site(_MODULATE, MODULATE.name, reason), handle)


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
