"""SGLang's LTX-2 transformer (0.5.12 to 0.5.23): its attentions and blocks, and the functions of its module.

An attention and a block get a forward of their own (`bitfuse.run.swap`), which restates upstream's: the same modules
called in the same order, and between them operators. The rotary function of the model, and `_ltx2_modulate` of the
output norm, are replaced in SGLang's module: whoever else calls them there gets them too, an attention that is left
alone, say. The last restore puts them back. All of it only for upstream code whose hash is listed here; any other is
left in place, and the report says why.

What is reproduced is SGLang's PyTorch chain, at every quality tier. SGLang's own kernels round otherwise in places (Q/K
norm with rotary embedding on SM100 and, from the tier "lossless" on, SM90; norm with modulation from "lossless" on).
The tiers themselves, and what else they switch, stay as they are.

SGLang runs under bf16 autocast, which operators decline. Its chains are of two kinds: the norms stand in
`autocast(enabled=False)` in SGLang's own code (from 0.5.18), and the rest are ops that autocast leaves alone. The first
is in the sources that were read; the second is tried here, in this process, before a kernel is run under autocast
(`why_autocast`). Then `call` enters the same guard around the whole chain.
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

from bitfuse.core.bits import compare
from bitfuse.core.operator import OPERATORS, Operator
from bitfuse.hosts import ltx2
from bitfuse.hosts.handle import Handle
from bitfuse.hosts.ltx2 import ABSENT, AUDIO, NATIVE, UNGATED, VIDEO, Ada, Rotary, Stream, Tables, modulation
from bitfuse.hosts.part import ENDED, Model, ModelForward, Part
from bitfuse.hosts.site import Site
from bitfuse.hosts.sources import (
    Norms,
    calls_of,
    entries,
    functions,
    of_operators,
    source_hash,
    ways,
    why_not_read,
    why_not_stock,
)
from bitfuse.ops.adaln import GATED_RESIDUAL, MODULATE
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.perturbed_attention import WEIGHTED_SUM_HEAD_GATE
from bitfuse.ops.qk_norm import QK_INTERLEAVED_PER_OP, QK_SPLIT_PER_OP
from bitfuse.ops.rope import INTERLEAVED_PER_OP, SPLIT_PER_OP
from bitfuse.run.swap import hooked, named

NAME = f"SGLang {__version__}"

_Attention: Any = upstream.LTX2Attention
_Block: Any = upstream.LTX2TransformerBlock
_Norm: Any = getattr(upstream, "RMSNormNoWeight", None)  # up to 0.5.13 a function, rms_norm


def _apply_interleaved(function: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return function(x, (cos, sin))


def _apply_split(function: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = x.unflatten(2, (cos.shape[1], -1)).swapaxes(1, 2)  # in this form SGLang runs no kernel of its own
    return function(heads, (cos, sin)).swapaxes(1, 2).flatten(2)


_ROTARY = {  # by a model's rope_type
    "split": Rotary(upstream, "apply_split_rotary_emb", SPLIT_PER_OP, QK_SPLIT_PER_OP, _apply_split),
    "interleaved": Rotary(
        *(upstream, "apply_interleaved_rotary_emb", INTERLEAVED_PER_OP, QK_INTERLEAVED_PER_OP),
        *(_apply_interleaved, True),
    ),
}
_MODULATE = "_ltx2_modulate"
_CONTEXT_KV = 11  # the place of this parameter of an attention's forward

# Upstream sources that were read and are restated here or in the operators' references (`source_hash`).
_GUARDED_ATTENTIONS = {"10f1793d45445185", "d28400a15876cb71", "6b8683142df03f36"}  # norms in autocast(enabled=False)
_MASKS_THE_GATE = {"178784a524b06789"}  # LTX2TransformerBlock.forward of 0.5.23; before, it masks what is gated
_GUARDED_NORMS = {"868f4f3666dc697f"}  # RMSNormNoWeight.forward_cuda from 0.5.18, which switches autocast off
READ = {
    "apply_split_rotary_emb": {
        *("f542fe0abde339f4", "e36408d67b07f753", "0e226642d9e60e3f"),  # 0.5.12; 0.5.17; 0.5.19 to 0.5.23
    },
    "apply_interleaved_rotary_emb": {"06f1683b35c5db4d"},  # 0.5.12 to 0.5.23
    _MODULATE: {"ecc79cf7829975df", "bbf521c3630ea3a3"},  # 0.5.18; 0.5.23
    "LTX2Attention.forward": {
        *("b13f7454f48a424b", "6cbdaae556f493df"),  # 0.5.12; 0.5.15
        *_GUARDED_ATTENTIONS,  # 0.5.18; 0.5.20; 0.5.23
    },
    "LTX2TransformerBlock.forward": {
        *("016e10bd847c4ac9", "0089a59265c5029a", "72361511adf056ff"),  # 0.5.12, 0.5.13; 0.5.14; 0.5.15 to 0.5.17
        *("aa42aa6b67d14ee2", *_MASKS_THE_GATE),  # 0.5.18 to 0.5.22; 0.5.23
    },
    "LTX2TransformerBlock.get_ada_values": {"6a847d38327afa76", "80d1f7ff3381906e"},  # to 0.5.22; 0.5.23
    "RMSNormNoWeight.forward_native": {"9adf483c41201eea"},  # 0.5.14 to 0.5.23
    "RMSNormNoWeight.forward_cuda": {"683f3e445e588af4", *_GUARDED_NORMS},  # 0.5.14 to 0.5.17; 0.5.18 to 0.5.23
    "rms_norm": {"7e44eb92ccf8254c"},  # 0.5.12, 0.5.13
}

_QK_NORMS = Norms(("q_norm", "k_norm"), torch.nn.RMSNorm, "torch.nn.RMSNorm", weighted=True)
_OF_A_NORM = ("rms_norm",) if _Norm is None else ("RMSNormNoWeight.forward_native", "RMSNormNoWeight.forward_cuda")
_OF_A_BLOCK = ("LTX2TransformerBlock.forward", "LTX2TransformerBlock.get_ada_values", *_OF_A_NORM)


# -- under autocast ----------------------------------------------------------------------------------------------------


_tried: dict[tuple, str | None] = {}


def why_autocast(x: Tensor, guarded: bool) -> str | None:
    """Why no kernel may stand in for a chain on x under the autocast that is on, if it is.

    guarded    SGLang switches autocast off around this chain's norm, if it has one
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return None
    dtype = torch.get_autocast_dtype(kind)
    if type(x) is not Tensor:
        return f"autocast is on and the tokens are a {type(x).__name__}, not a plain tensor"
    if x.dtype != dtype:
        return f"autocast is to {dtype} and the tokens are {x.dtype}"
    key = (x.device, dtype, guarded)
    if key not in _tried:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # trying would wait for the device
            return "what autocast changes was not tried yet and a CUDA graph is being captured"
        _tried[key] = _changed_by_autocast(x.device, dtype, guarded)
    return _tried[key]


def _changed_by_autocast(device: torch.device, dtype: torch.dtype, guarded: bool) -> str | None:
    chains = [SPLIT_PER_OP, INTERLEAVED_PER_OP, MODULATE, GATED_RESIDUAL, HEAD_GATE, WEIGHTED_SUM_HEAD_GATE]
    chains += [] if guarded else [NATIVE.norm]
    for operator in chains:
        case = operator.cases[0].arguments(device, tokens=5)
        args = [a.to(dtype) if isinstance(a, Tensor) else a for a in case]
        with torch.no_grad():
            on = operator.reference(*args)
            with torch.autocast(device.type, enabled=False):
                off = operator.reference(*args)
        if mismatch := compare(off, on):
            return f"autocast to {dtype} changes what {operator.name} computes: {mismatch.sentence}"
    return None


def unaffected(kind: str, run: Callable[..., Any], *args: Any) -> Any:
    """run(*args) with autocast off on this kind of device, in the guard that SGLang puts around its norms."""
    if not torch.is_autocast_enabled(kind):
        return run(*args)
    try:
        torch.set_autocast_enabled(kind, False)  # what torch.autocast does, in a tenth of its time
        return run(*args)
    finally:
        torch.set_autocast_enabled(kind, True)


def call(site: Site, operator: Operator, x: Tensor, *args: Any) -> Any:
    """`site.call` with autocast off. Only where `why_autocast` had nothing against it."""
    return unaffected(x.device.type, site.call, operator, x, *args)


# -- functions of SGLang's module --------------------------------------------------------------------------------------


@dataclass
class _Function:
    """A function of SGLang's module that ours stands in for, and the sites of the models that hold it replaced."""

    name: str
    operator: Operator
    sites: list[tuple[Site, Model]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stock = getattr(upstream, self.name)
        call = _modulate if self.name == _MODULATE else _rotate
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


def _replace_function(site: Site, model: Model) -> None:
    """Put ours in the place of the function of the site's name, for as long as a model holds it replaced."""
    name = site.name
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


def _rotate(function: _Function, x: Tensor, freqs: Tables) -> Tensor:
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
        self._guarded = source_hash(_Attention.forward) in _GUARDED_ATTENTIONS

    def why_stock(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        context_kv = args[_CONTEXT_KV] if len(args) > _CONTEXT_KV else kwargs.get("context_kv")
        if context_kv is not None:
            return "the text's keys are kept, normed; of the queries' norm alone nothing is left to fuse"
        if (reason := _QK_NORMS.why_called(attn)) is not None:
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
        pe: Tables | None = None,
        k_pe: Tables | None = None,
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
            out, perturbation_mask = v, None
        else:
            q, _ = attn.to_q(x)
            k, _ = attn.to_k(context)
            rotate = QK_INTERLEAVED_PER_OP if pe is not None and pe[0].dim() == 3 else QK_SPLIT_PER_OP
            of_site = functools.partial(call, self.site)
            q, k = ltx2.norm_and_rotate(of_site, rotate, q, k, attn.q_norm, attn.k_norm, pe, k_pe)
            q, k = (t.view(*t.shape[:-1], attn.local_heads, attn.dim_head) for t in (q, k))
            k_all, v_all, here = k, v, skip_sequence_parallel_override
            if gather_context_kv_for_sp:  # each rank has its own tokens, and looks at those of all
                k_all, v_all, mask = _gathered(k, v, mask, int(context_replicated_prefix_len))
                here = True
            more = {} if attn.use_local_attention else {"skip_sequence_parallel_override": here}
            out = attn.attn(q, k_all, v_all, attn_mask=mask, **more)
        # a blend without a head gate counts at the site of the norms
        site = self.site if attn.to_gate_logits is None else self.gate_site
        if perturbation_mask is not None and perturbation_mask.shape[1:] != (1, 1):  # of tokens or heads
            site.fall(f"perturbation_mask is {list(perturbation_mask.shape)}; accepted: one value for each sample")
            if perturbation_mask.ndim == out.ndim - 1:
                perturbation_mask = perturbation_mask.unsqueeze(-1)
            out, perturbation_mask = out * perturbation_mask + v * (1 - perturbation_mask), None
        out = out.flatten(2)
        logits = None if attn.to_gate_logits is None else attn.to_gate_logits(x)[0]
        if perturbation_mask is not None:
            out = call(site, WEIGHTED_SUM_HEAD_GATE, out, value, perturbation_mask, logits)
        elif logits is not None:
            out = call(self.gate_site, HEAD_GATE, out, logits)
        return attn.to_out[0](out)[0]


def _gathered(k: Tensor, v: Tensor, mask: Tensor | None, prefix: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of all ranks; the first `prefix` tokens are the same on each, and not gathered."""

    def gather(t: Tensor) -> Tensor:
        return upstream.sequence_model_parallel_all_gather(t.contiguous(), dim=1)

    if prefix > 0:
        k, v = (torch.cat([t[:, :prefix], gather(t[:, prefix:])], dim=1) for t in (k, v))
        return k, v, mask
    return gather(k), gather(v), None if mask is None else gather(mask)


# -- a block -----------------------------------------------------------------------------------------------------------


class LTX2TransformerBlock(ltx2.AVBlock):
    """In place of the forward of upstream's block: its elementwise chains are fused."""

    __slots__ = ("_guarded", "_masks_the_gate", "_norm")
    norms, host_class, whose, methods = NATIVE, _Block, "SGLang's", ("get_ada_values",)

    def __init__(self, block: Any, *shared: Any):
        super().__init__(block, *shared)
        self._norm = getattr(block, "rms_norm", None)
        self._guarded = _Norm is not None and source_hash(_Norm.forward_cuda) in _GUARDED_NORMS
        self._masks_the_gate = source_hash(_Block.forward) in _MASKS_THE_GATE

    def call(self, site: Site, operator: Operator, *args: Any) -> Any:
        return call(site, operator, *args)

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if (reason := super().why_stock(block, args, kwargs)) is not None:
            return reason
        norm = getattr(block, "rms_norm", None)
        if norm is not self._norm or (norm is not None and not _is_own(norm)):
            return "rms_norm was replaced meanwhile"
        if norm is not None and hooked(norm):
            return "a hook is attached to rms_norm, which is not called when it is fused"
        return why_autocast(args[0] if args else kwargs["hidden_states"], self._guarded)

    def fused(
        self,
        block: Any,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        temb: Tensor,
        temb_audio: Tensor,
        temb_prompt: Tensor | None,
        temb_audio_prompt: Tensor | None,
        temb_ca_scale_shift: Tensor,
        temb_ca_audio_scale_shift: Tensor,
        temb_ca_gate: Tensor,
        temb_ca_audio_gate: Tensor,
        video_rotary_emb: Tables | None = None,
        audio_rotary_emb: Tables | None = None,
        ca_video_rotary_emb: Tables | None = None,
        ca_audio_rotary_emb: Tables | None = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        video_self_attention_mask: Tensor | None = None,
        audio_self_attention_mask: Tensor | None = None,
        a2v_cross_attention_mask: Tensor | None = None,
        v2a_cross_attention_mask: Tensor | None = None,
        skip_video_self_attn: bool = False,
        skip_audio_self_attn: bool = False,
        skip_a2v_cross_attn: bool = False,
        skip_v2a_cross_attn: bool = False,
        video_self_attn_perturbation_mask: Tensor | None = None,
        audio_self_attn_perturbation_mask: Tensor | None = None,
        a2v_cross_attn_perturbation_mask: Tensor | None = None,
        v2a_cross_attn_perturbation_mask: Tensor | None = None,
        audio_replicated_for_sp: bool = False,
        video_memory_prefix_len: int = 0,
        prompt_kv: Any = None,
    ) -> tuple[Tensor, Tensor]:
        eps, replicated = block.norm_eps, audio_replicated_for_sp
        video, audio = Stream(self, VIDEO, hidden_states, eps), Stream(self, AUDIO, audio_hidden_states, eps)
        video.ada = self._ada(block.scale_shift_table, temb)
        audio.ada = self._ada(block.audio_scale_shift_table, temb_audio)
        # what earlier versions don't know is handed on only where it is given
        prefix = {"context_replicated_prefix_len": video_memory_prefix_len} if video_memory_prefix_len else {}

        # 1. self-attention
        n = video.norm("norm1", video.ada[1], video.ada[0])
        attended = block.attn1(
            n,
            mask=video_self_attention_mask,
            pe=video_rotary_emb,
            perturbation_mask=video_self_attn_perturbation_mask,
            all_perturbed=skip_video_self_attn,
            gather_context_kv_for_sp=replicated,
            **prefix,
        )
        video.add(attended, video.ada[2])
        n = audio.norm("norm1", audio.ada[1], audio.ada[0])
        attended = block.audio_attn1(
            n,
            mask=audio_self_attention_mask,
            pe=audio_rotary_emb,
            perturbation_mask=audio_self_attn_perturbation_mask,
            all_perturbed=skip_audio_self_attn,
            skip_sequence_parallel_override=replicated,
        )
        audio.add(attended, audio.ada[2])

        # 2. cross-attention to the text
        text, query, gate = encoder_hidden_states, ABSENT, UNGATED
        audio_text, audio_query, audio_gate = audio_encoder_hidden_states, ABSENT, UNGATED
        kept: dict[str, Any] = {}
        audio_kept: dict[str, Any] = {}
        if block.cross_attention_adaln:
            if temb_prompt is None or temb_audio_prompt is None:
                raise ValueError("cross_attention_adaln requires prompt modulation tensors.")  # upstream's words
            query, gate = modulation(video.ada[7], video.ada[6]), video.ada[8]
            shift, scale = self._ada(block.prompt_scale_shift_table, temb_prompt)
            text = video.modulate(text, scale, shift)
            audio_query, audio_gate = modulation(audio.ada[7], audio.ada[6]), audio.ada[8]
            shift, scale = self._ada(block.audio_prompt_scale_shift_table, temb_audio_prompt)
            audio_text = audio.modulate(audio_text, scale, shift)
        elif prompt_kv is not None:
            kept, audio_kept = {"context_kv": prompt_kv.video}, {"context_kv": prompt_kv.audio}
        (n,) = video.add_and_norm("norm2", query)
        video.add(block.attn2(n, context=text, mask=encoder_attention_mask, **kept), gate)
        (n,) = audio.add_and_norm("norm2", audio_query)
        audio.add(block.audio_attn2(n, context=audio_text, mask=audio_encoder_attention_mask, **audio_kept), audio_gate)

        # 3. cross-attention between video and audio, each of the other as it was before
        if not (skip_a2v_cross_attn and skip_v2a_cross_attn):
            wanted = not skip_a2v_cross_attn, not skip_v2a_cross_attn
            ada = self._ada(block.video_a2v_cross_attn_scale_shift_table[:4], temb_ca_scale_shift)
            for_a2v, for_v2a = video.between(ada, *wanted)
            ada = self._ada(block.audio_a2v_cross_attn_scale_shift_table[:4], temb_ca_audio_scale_shift)
            audio_for_a2v, audio_for_v2a = audio.between(ada, *wanted)
            if not skip_a2v_cross_attn:
                attended = block.audio_to_video_attn(
                    for_a2v,
                    context=audio_for_a2v,
                    pe=ca_video_rotary_emb,
                    k_pe=ca_audio_rotary_emb,
                    mask=a2v_cross_attention_mask,
                    skip_sequence_parallel_override=replicated,
                )
                table = block.video_a2v_cross_attn_scale_shift_table[4:]
                video.add(*self._gated(block, attended, table, temb_ca_gate, a2v_cross_attn_perturbation_mask))
            if not skip_v2a_cross_attn:
                attended = block.video_to_audio_attn(
                    audio_for_v2a,
                    context=for_v2a,
                    pe=ca_audio_rotary_emb,
                    k_pe=ca_video_rotary_emb,
                    mask=v2a_cross_attention_mask,
                    gather_context_kv_for_sp=replicated,
                    **prefix,
                )
                table = block.audio_a2v_cross_attn_scale_shift_table[4:]
                audio.add(*self._gated(block, attended, table, temb_ca_audio_gate, v2a_cross_attn_perturbation_mask))
            for_a2v = for_v2a = audio_for_a2v = audio_for_v2a = None  # memory for the feed-forward

        # 4. feed-forward
        del n, attended  # memory for the feed-forward
        video.feed_forward(block.ff)
        audio.feed_forward(block.audio_ff)
        return video.x, audio.x

    def _ada(self, table: Tensor, temb: Tensor) -> list[Ada]:
        return self.values(table.to(device=temb.device, dtype=temb.dtype), temb)

    def _gated(
        self, block: Any, attended: Tensor, table: Tensor, temb: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Ada]:
        """What an attention gave, and its gate; one of them masked for guidance by perturbation."""
        (gate,) = self._ada(table, temb)
        if mask is None:
            return attended, gate
        if not self._masks_the_gate:
            return attended * mask, gate
        (value,) = block.get_ada_values(table, attended.shape[0], temb, slice(None))
        return attended, (value * mask, None)


def _is_own(norm: Any) -> bool:
    return isinstance(norm, _Norm) and ways(type(norm)) == ways(_Norm)


def _why_block_stays(block: Any) -> Iterator[str]:
    if block._compiled_call_impl is not None:
        yield _COMPILED
    yield from why_not_stock(block, _Block, "block", NAME, READ, functions(upstream, *_OF_A_BLOCK))
    if _Norm is not None:
        norm = block.rms_norm
        way = getattr(getattr(norm, "_forward_method", None), "__name__", "no method")
        if not _is_own(norm):
            yield f"rms_norm is a {named(type(norm))}, not SGLang's RMSNormNoWeight"
        elif way not in ("forward_cuda", "forward_native", "forward_cpu"):
            yield f"rms_norm runs {way} on this platform, which was not read"


_COMPILED = "the block is compiled with torch.compile, and is left to that"


# -- taking over -------------------------------------------------------------------------------------------------------


def transformers(target: Any) -> list[Any]:
    """The LTX-2 transformers in a pipeline's modules, or in the one given; empty when there is none."""
    modules = getattr(target, "modules", None)
    parts = [target, *(modules.values() if isinstance(modules, dict) else ())]
    return ltx2.models_in(parts, upstream.LTX2VideoTransformer3DModel)


def accelerate(model: Any, handle: Handle) -> None:
    """Take over every site of one transformer, noting each in the handle. ValueError for options it has not."""
    if handle.keep_text:
        raise ValueError("keep_text is True; accepted for an SGLang model: False, SGLang keeps the text itself")
    if handle.cuda_graph:
        raise ValueError("cuda_graph is True; accepted for an SGLang model: False, SGLang captures its own graphs")
    kind = model.rope.rope_type
    rotary = _ROTARY[kind]
    attention = entries(upstream, "LTX2Attention.forward") + of_operators(
        ltx2.attention_operators(_ROTARY.values(), WEIGHTED_SUM_HEAD_GATE)
    )
    block = _of_blocks() + of_operators(ltx2.block_operators(NATIVE))
    function = of_operators((rotary.alone, MODULATE))
    shared = Model(handle, {"attention": attention, "block": block, "function": function})
    device = next((p.device for p in model.parameters() if p.is_cuda), torch.device("cpu"))
    not_rotated = _why_function_stays(rotary.name, kind, device)
    for name, rotates, of_block, attn in ltx2.attentions(model):
        gated = attn.to_gate_logits is not None
        site, gate_site = ltx2.attention_sites(handle, name, rotary if rotates else None, gated=gated)
        site.declined = gate_site.declined = next(_why_attention_stays(of_block, attn), not_rotated)
        if site.declined is None:
            handle.put(attn, LTX2Attention(attn, shared, site, gate_site, rotary.name))

    def sites_of(block: Any) -> dict[str, Operator]:
        return ltx2.block_sites(NATIVE, text=getattr(block, "cross_attention_adaln", False))

    ltx2.take_over_blocks(
        model.transformer_blocks, shared, LTX2TransformerBlock, sites_of, _why_block_stays, one_stream=True
    )
    _replace_function(Site(rotary.name, rotary.alone.name, not_rotated), shared)
    if hasattr(upstream, _MODULATE):  # before 0.5.18 the output's modulation is inline
        _replace_function(Site(_MODULATE, MODULATE.name, _why_function_stays(_MODULATE, kind, device)), shared)
    ModelForward.install(model, shared)


def _of_blocks() -> list[Any]:
    """The functions that a block's forward leaves out, besides those of the operators' references."""
    found = entries(upstream, *_OF_A_BLOCK, "RMSNormNoWeight.forward_cpu")
    return found if _Norm is None else found + calls_of(_Norm, "RMSNormNoWeight")


def _why_attention_stays(block: Any, attn: Any) -> Iterator[str]:
    if block._compiled_call_impl is not None:
        yield _COMPILED
    sources = functions(upstream, "LTX2Attention.forward")
    yield from why_not_stock(attn, _Attention, "attention", NAME, READ, sources)
    if (ranks := upstream.get_tp_world_size()) > 1:
        yield f"tensor parallelism of {ranks}: the norms of queries and keys add up over the ranks"
    if not attn.qk_norm:
        yield "it does not norm queries and keys"


def _why_function_stays(name: str, kind: str, device: torch.device) -> str | None:
    """Why a function of SGLang's module is not replaced."""
    if name in _functions:  # it was read and checked when it was
        return None
    if ltx2.dispatch_mode_is_on():
        return f"{name} of {NAME} can't be tried here: something sees every PyTorch op (FakeTensorMode, say)"
    stock = getattr(upstream, name)
    if reason := next(why_not_read(NAME, READ, {name: stock}), None):
        return reason
    return None if name == _MODULATE else _ROTARY[kind].difference(NAME, 4, 64, torch.bfloat16, device)
