"""SGLang's LTX-2 transformer block (0.5.12 to 0.5.23): its forward, with every elementwise chain one operator.

The forward below restates `LTX2TransformerBlock.forward`: the same modules called in the same order, and between them
operators, each of which equals SGLang's PyTorch chain bit for bit or runs it. A block gets it as an attribute of its
own (`bitfuse.run.swap`).

SGLang runs under bf16 autocast, which operators decline. Its chains are of two kinds: the norms stand in
`autocast(enabled=False)` in SGLang's own code (from 0.5.18), and the rest are ops that autocast leaves alone. The first
is in the sources that were read; the second is tried here, in this process, before a kernel is run under autocast
(`why_autocast`). Then `call` enters the same guard around the whole chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.multimodal_gen.runtime.models.dits import ltx_2 as upstream
from torch import Tensor

from bitfuse.core.bits import compare
from bitfuse.core.operator import Operator
from bitfuse.hosts.ltx2 import ABSENT, Ada, Block, Entry, Model, Values, calls_of, modulation
from bitfuse.hosts.site import Site, own_method, source_hash, ways, why_not_stock
from bitfuse.ops.adaln import (
    GATED_RESIDUAL,
    MODULATE,
    RESIDUAL_RMS_NORM_MODULATE_NATIVE,
    RESIDUAL_RMS_NORM_MODULATE_TWICE_NATIVE,
    RMS_NORM_MODULATE_NATIVE,
)
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.rope import INTERLEAVED_PER_OP, SPLIT_PER_OP
from bitfuse.run.swap import hooked, named

_Stock: Any = upstream.LTX2TransformerBlock
_Norm: Any = getattr(upstream, "RMSNormNoWeight", None)  # up to 0.5.13 a function, rms_norm

# Upstream sources that were read and are restated here (`source_hash`).
_MASKS_THE_GATE = {"178784a524b06789"}  # LTX2TransformerBlock.forward of 0.5.23; before, it masks what is gated
_GUARDED = {"868f4f3666dc697f"}  # RMSNormNoWeight.forward_cuda from 0.5.18, which switches autocast off
_READ = {
    "LTX2TransformerBlock.forward": {
        *("016e10bd847c4ac9", "0089a59265c5029a", "72361511adf056ff"),  # 0.5.12, 0.5.13; 0.5.14; 0.5.15 to 0.5.17
        *("aa42aa6b67d14ee2", *_MASKS_THE_GATE),  # 0.5.18 to 0.5.22; 0.5.23
    },
    "LTX2TransformerBlock.get_ada_values": {"6a847d38327afa76", "80d1f7ff3381906e"},  # to 0.5.22; 0.5.23
    "RMSNormNoWeight.forward_native": {"9adf483c41201eea"},  # 0.5.14 to 0.5.23
    "RMSNormNoWeight.forward_cuda": {"683f3e445e588af4", *_GUARDED},  # 0.5.14 to 0.5.17; 0.5.18 to 0.5.23
    "rms_norm": {"7e44eb92ccf8254c"},  # 0.5.12, 0.5.13
}

COMPILED = "the block is compiled with torch.compile, and is left to that"

_SITES = {
    "norm1": RMS_NORM_MODULATE_NATIVE,
    "audio_norm1": RMS_NORM_MODULATE_NATIVE,
    "norm2": RESIDUAL_RMS_NORM_MODULATE_NATIVE,
    "audio_norm2": RESIDUAL_RMS_NORM_MODULATE_NATIVE,
    "text": MODULATE,
    "audio_text": MODULATE,
    "audio_to_video_norm": RESIDUAL_RMS_NORM_MODULATE_TWICE_NATIVE,
    "video_to_audio_norm": RESIDUAL_RMS_NORM_MODULATE_TWICE_NATIVE,
    "norm3": RESIDUAL_RMS_NORM_MODULATE_NATIVE,
    "audio_norm3": RESIDUAL_RMS_NORM_MODULATE_NATIVE,
    "output": GATED_RESIDUAL,
    "audio_output": GATED_RESIDUAL,
}


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
    chains = [SPLIT_PER_OP, INTERLEAVED_PER_OP, MODULATE, GATED_RESIDUAL, HEAD_GATE]
    chains += [] if guarded else [RMS_NORM_MODULATE_NATIVE]
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


# -- the block ---------------------------------------------------------------------------------------------------------


OPERATORS = tuple(dict.fromkeys(_SITES.values()))


def originals() -> list[Entry]:
    """The functions that the forward below leaves out, besides those of the operators' references."""
    found = [(_Stock, name, f"LTX2TransformerBlock.{name}") for name in ("forward", "get_ada_values")]
    if _Norm is None:
        return [*found, (upstream, "rms_norm", "rms_norm")]
    names = [name for name in ("forward_native", "forward_cuda", "forward_cpu") if hasattr(_Norm, name)]
    found += [(_Norm, name, f"RMSNormNoWeight.{name}") for name in names]
    return found + calls_of(_Norm, "RMSNormNoWeight")


class LTX2TransformerBlock(Block):
    """In place of the forward of upstream's block: its elementwise chains are fused."""

    __slots__ = ("_guarded", "_masks_the_gate", "_norm", "_values")

    def __init__(self, block: Any, model: Model, sites: dict[str, Site], values: Values):
        super().__init__(block, model, sites)
        self._values, self._norm = values, getattr(block, "rms_norm", None)
        self._guarded = _Norm is not None and source_hash(_Norm.forward_cuda) in _GUARDED
        self._masks_the_gate = source_hash(_Stock.forward) in _MASKS_THE_GATE

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if torch.is_grad_enabled():  # the gradient of a sum depends on how it was formed
            given = (*args, *kwargs.values(), *block.parameters())
            if any(isinstance(t, Tensor) and t.requires_grad for t in given):
                return "a gradient is required of the block's inputs or weights"
        if not own_method(block, "get_ada_values", _Stock):
            return f"the get_ada_values of this {named(type(block))} is another than that of SGLang's block"
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
        video_rotary_emb: tuple[Tensor, Tensor] | None = None,
        audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ca_video_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ca_audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
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
        site, eps, residual = self.named_sites, block.norm_eps, RESIDUAL_RMS_NORM_MODULATE_NATIVE
        x, y = hidden_states, audio_hidden_states
        video, audio = self._ada(block.scale_shift_table, temb), self._ada(block.audio_scale_shift_table, temb_audio)
        # what earlier versions don't know is handed on only where it is given
        prefix = {"context_replicated_prefix_len": video_memory_prefix_len} if video_memory_prefix_len else {}

        # 1. self-attention
        n = call(site["norm1"], RMS_NORM_MODULATE_NATIVE, x, *modulation(video[1], video[0]), eps)
        attended = block.attn1(
            n,
            mask=video_self_attention_mask,
            pe=video_rotary_emb,
            perturbation_mask=video_self_attn_perturbation_mask,
            all_perturbed=skip_video_self_attn,
            gather_context_kv_for_sp=audio_replicated_for_sp,
            **prefix,
        )
        n = call(site["audio_norm1"], RMS_NORM_MODULATE_NATIVE, y, *modulation(audio[1], audio[0]), eps)
        audio_attended = block.audio_attn1(
            n,
            mask=audio_self_attention_mask,
            pe=audio_rotary_emb,
            perturbation_mask=audio_self_attn_perturbation_mask,
            all_perturbed=skip_audio_self_attn,
            skip_sequence_parallel_override=audio_replicated_for_sp,
        )

        # 2. cross-attention to the text
        text, audio_text = encoder_hidden_states, audio_encoder_hidden_states
        query: Any = ABSENT
        audio_query: Any = ABSENT
        gate: Any = _NO_GATE  # of what is still to be added to each stream
        audio_gate: Any = _NO_GATE
        kept: dict[str, Any] = {}
        audio_kept: dict[str, Any] = {}
        if block.cross_attention_adaln:
            if temb_prompt is None or temb_audio_prompt is None:
                raise ValueError("cross_attention_adaln requires prompt modulation tensors.")  # upstream's words
            query, gate = modulation(video[7], video[6]), video[8]
            shift, scale = self._ada(block.prompt_scale_shift_table, temb_prompt)
            text = call(site["text"], MODULATE, text, *modulation(scale, shift))
            audio_query, audio_gate = modulation(audio[7], audio[6]), audio[8]
            shift, scale = self._ada(block.audio_prompt_scale_shift_table, temb_audio_prompt)
            audio_text = call(site["audio_text"], MODULATE, audio_text, *modulation(scale, shift))
        elif prompt_kv is not None:
            kept, audio_kept = {"context_kv": prompt_kv.video}, {"context_kv": prompt_kv.audio}
        x, n = call(site["norm2"], residual, x, attended, *video[2], None, *query, eps)
        attended = block.attn2(n, context=text, mask=encoder_attention_mask, **kept)
        y, n = call(site["audio_norm2"], residual, y, audio_attended, *audio[2], None, *audio_query, eps)
        audio_attended = block.audio_attn2(n, context=audio_text, mask=audio_encoder_attention_mask, **audio_kept)

        # 3. cross-attention between video and audio, each of the other as it was before
        if not (skip_a2v_cross_attn and skip_v2a_cross_attn):
            wanted = not skip_a2v_cross_attn, not skip_v2a_cross_attn
            ca = self._ada(block.video_a2v_cross_attn_scale_shift_table[:4], temb_ca_scale_shift)
            x, for_a2v, for_v2a = self._between(block, site["audio_to_video_norm"], x, attended, gate, ca, *wanted)
            ca = self._ada(block.audio_a2v_cross_attn_scale_shift_table[:4], temb_ca_audio_scale_shift)
            y, audio_for_a2v, audio_for_v2a = self._between(
                block, site["video_to_audio_norm"], y, audio_attended, audio_gate, ca, *wanted
            )
            attended = audio_attended = None
            if not skip_a2v_cross_attn:
                attended = block.audio_to_video_attn(
                    for_a2v,
                    context=audio_for_a2v,
                    pe=ca_video_rotary_emb,
                    k_pe=ca_audio_rotary_emb,
                    mask=a2v_cross_attention_mask,
                    skip_sequence_parallel_override=audio_replicated_for_sp,
                )
                table = block.video_a2v_cross_attn_scale_shift_table[4:]
                attended, gate = self._gated(block, attended, table, temb_ca_gate, a2v_cross_attn_perturbation_mask)
            if not skip_v2a_cross_attn:
                audio_attended = block.video_to_audio_attn(
                    audio_for_v2a,
                    context=for_v2a,
                    pe=ca_audio_rotary_emb,
                    k_pe=ca_video_rotary_emb,
                    mask=v2a_cross_attention_mask,
                    gather_context_kv_for_sp=audio_replicated_for_sp,
                    **prefix,
                )
                table = block.audio_a2v_cross_attn_scale_shift_table[4:]
                audio_attended, audio_gate = self._gated(
                    block, audio_attended, table, temb_ca_audio_gate, v2a_cross_attn_perturbation_mask
                )
            for_a2v = for_v2a = audio_for_a2v = audio_for_v2a = None  # memory for the feed-forward

        # 4. feed-forward
        x, n = self._before_feed_forward(block, site["norm3"], x, attended, gate, modulation(video[4], video[3]))
        attended = None
        x = call(site["output"], GATED_RESIDUAL, x, block.ff(n), *video[5])
        y, n = self._before_feed_forward(
            block, site["audio_norm3"], y, audio_attended, audio_gate, modulation(audio[4], audio[3])
        )
        y = call(site["audio_output"], GATED_RESIDUAL, y, block.audio_ff(n), *audio[5])
        return x, y

    def _ada(self, table: Tensor, temb: Tensor) -> list[Ada]:
        """(value, table row) of each row of a table, not yet added: `get_ada_values` before its sum."""
        table = table.to(device=temb.device, dtype=temb.dtype)
        return list(zip(self._values.of(temb, table.shape[0]), table.unbind(0), strict=True))

    def _between(
        self,
        block: Any,
        site: Site,
        x: Tensor,
        attended: Tensor,
        gate: Any,
        ca: list[Ada],
        use_a2v: bool,
        use_v2a: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The stream with `attended` added, and its norm modulated for the one, the other, or both attentions."""
        a2v, v2a, eps = modulation(ca[0], ca[1]), modulation(ca[2], ca[3]), block.norm_eps
        if use_a2v and use_v2a:
            return call(site, RESIDUAL_RMS_NORM_MODULATE_TWICE_NATIVE, x, attended, *gate, None, *a2v, *v2a, eps)
        only = a2v if use_a2v else v2a
        x, n = call(site, RESIDUAL_RMS_NORM_MODULATE_NATIVE, x, attended, *gate, None, *only, eps)
        return (x, n, None) if use_a2v else (x, None, n)

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

    def _before_feed_forward(
        self, block: Any, site: Site, x: Tensor, attended: Tensor | None, gate: Any, mlp: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        if attended is None:  # an attention that was left out: nothing to add
            return x, call(site, RMS_NORM_MODULATE_NATIVE, x, *mlp, block.norm_eps)
        return call(site, RESIDUAL_RMS_NORM_MODULATE_NATIVE, x, attended, *gate, None, *mlp, block.norm_eps)


_NO_GATE = (None, None)


# -- taking over -------------------------------------------------------------------------------------------------------


def accelerate(model: Any, shared: Model, host: str) -> None:
    """Give every block of a transformer the forward above, noting each site in the handle."""
    values = Values()  # and no Rehearsal: on several ranks it was not tried
    for index, block in enumerate(model.transformer_blocks):
        name, modulated = f"transformer_blocks.{index}", getattr(block, "cross_attention_adaln", False)
        reason = next(_why_left_alone(block, host), None)
        wanted = {site: op for site, op in _SITES.items() if modulated or "text" not in site}
        sites = {site: Site(f"{name}.{site}", op.name, reason) for site, op in wanted.items()}
        shared.handle.sites += sites.values()
        if reason is None:
            shared.handle.put(block, LTX2TransformerBlock(block, shared, sites, values))


def _is_own(norm: Any) -> bool:
    return isinstance(norm, _Norm) and ways(type(norm)) == ways(_Norm)


def _why_left_alone(block: Any, host: str) -> Iterator[str]:
    if block._compiled_call_impl is not None:
        yield COMPILED
    sources = {
        "LTX2TransformerBlock.forward": _Stock.forward,
        "LTX2TransformerBlock.get_ada_values": _Stock.get_ada_values,
    }
    if _Norm is None:
        sources["rms_norm"] = getattr(upstream, "rms_norm", None)
    else:
        sources["RMSNormNoWeight.forward_native"] = _Norm.forward_native
        sources["RMSNormNoWeight.forward_cuda"] = _Norm.forward_cuda
    yield from why_not_stock(block, _Stock, "block", host, _READ, sources)
    if _Norm is not None:
        norm = block.rms_norm
        way = getattr(getattr(norm, "_forward_method", None), "__name__", "no method")
        if not _is_own(norm):
            yield f"rms_norm is a {named(type(norm))}, not SGLang's RMSNormNoWeight"
        elif way not in ("forward_cuda", "forward_native", "forward_cpu"):
            yield f"rms_norm runs {way} on this platform, which was not read"
