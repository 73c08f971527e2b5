# SPDX-License-Identifier: GPL-3.0-or-later
"""In place of the forward of ComfyUI's audio-video block: the same modules in the same order, operators between them.

ComfyUI adds a gated output in one op, `x.addcmul_(y, gate)`, which rounds once; only the text attention's is a product
and then a sum. All of it is written into x. Here an operator returns the sum as a new tensor, and x itself is written
at the end of the block, where somebody could see it (`_seen`).

With frames of P tokens that share their AdaLN values (`CompressedTimestep`) ComfyUI adds table and timestep for each
frame and then copies the sum to each token. Here the tokens [B, F * P, D] are seen as [B * F, P, D], by a view, and an
operator reads the one row.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitfuse.core.operator import Operator
from bitfuse.hosts import ltx2
from bitfuse.hosts.ltx2 import ABSENT, AUDIO, BETWEEN, NATIVE, UNGATED, VIDEO, Ada, Fork, modulation
from bitfuse.hosts.part import Model
from bitfuse.ops.adaln import (
    GATED_RESIDUAL_ADDCMUL,
    MODULATE,
    RESIDUAL_ADDCMUL_RMS_NORM_MODULATE_NATIVE,
)
from bitfuse.run.swap import hooked_by_torch

from . import upstream
from .step import Frames, Step, frames_of, plain

EPS = 1e-6  # what comfy.rmsnorm.rms_norm adds where it is not told
_Block: Any = upstream.av_model.BasicAVTransformerBlock
METHODS = ("get_ada_values", "_apply_text_cross_attention")
OPERATORS = (*NATIVE, MODULATE, GATED_RESIDUAL_ADDCMUL, RESIDUAL_ADDCMUL_RMS_NORM_MODULATE_NATIVE)


def sites_of(block: Any) -> dict[str, Operator]:
    """The sites of a block by their names in it, and the operator that each calls unless an attention is left out."""
    of_each: dict[str, Operator] = {"norm1": NATIVE.norm, "norm2": RESIDUAL_ADDCMUL_RMS_NORM_MODULATE_NATIVE}
    of_each |= {"text": MODULATE} if block.cross_attention_adaln else {}
    of_each |= {"norm3": RESIDUAL_ADDCMUL_RMS_NORM_MODULATE_NATIVE, "output": GATED_RESIDUAL_ADDCMUL}
    found = {f"{stream}{site}": operator for site, operator in of_each.items() for stream in (VIDEO, AUDIO)}
    return found | dict.fromkeys(BETWEEN.values(), NATIVE.twice)


class Stream(ltx2.Stream):
    """One modality on its way through a block, whose gated outputs are added in one op.

    x        the tokens [B, T, D], or [B * F, P, D]
    frames   F and P where they are seen so
    once     whether what is pending is added by addcmul
    """

    __slots__ = ("_given", "batch", "frames", "once")

    def __init__(self, ours: BasicAVTransformerBlock, prefix: str, x: Tensor, frames: Frames | None):
        self._given, self.batch, self.frames, self.once = x, x.shape[0], frames, False
        super().__init__(ours, prefix, self._seen_by_frame(x), EPS)

    def values(self, table: Tensor, timestep: Any) -> list[Ada]:
        """What each row of a table and a timestep add up to, not yet added."""
        rows = self._ours.step.rows(timestep, self.frames, self.batch)
        return self._ours.values(plain(table).to(device=rows.device, dtype=rows.dtype), rows)

    def norm(self, site: str, scale: Ada, shift: Ada) -> Tensor:
        return self._as_given(super().norm(site, scale, shift))

    def add(self, y: Tensor, gate: tuple[Any, Any] = UNGATED, mask: None = None, *, once: bool = True) -> None:
        super().add(self._seen_by_frame(y), gate)
        self.once = once

    def feed_forward(self, module: Any) -> None:
        (n,) = self.add_and_norm("norm3", modulation(self.ada[4], self.ada[3]))
        self.add(module(n), self.ada[5])
        site = f"{self._prefix}output"
        self._settle(site)
        if self.pending is not None:
            self.x = self._ours.call(self._ours.named_sites[site], GATED_RESIDUAL_ADDCMUL, self.x, *self._taken())

    def _add_and_norm(self, site: str, *modulations: tuple[Any, ...]) -> list[Tensor]:
        self._settle(site)
        if self.pending is None or not self.once:
            return [self._as_given(n) for n in super()._add_and_norm(site, *modulations)]
        ours, found, operator = self._ours, self._ours.named_sites[site], RESIDUAL_ADDCMUL_RMS_NORM_MODULATE_NATIVE
        first, *more = modulations
        self.x, *normed = ours.call(found, operator, self.x, *self._taken(), *first, EPS)
        normed += [ours.call(found, NATIVE.norm, self.x, *m, EPS) for m in more]
        return [self._as_given(n) for n in normed]

    def _taken(self) -> tuple[Any, ...]:
        """y, gate and its table of what is pending, which then is no more."""
        (*taken, _mask), self.pending = self.pending, None  # type: ignore[misc]
        return tuple(taken)

    def _settle(self, site: str) -> None:
        """Add what is pending as stock does where an operator's sum would be of another dtype: into x, which stays."""
        given = [t for t in self.pending or () if t is not None]
        if all(t.dtype == self.x.dtype for t in given):
            return
        y, gate, table = self._taken()
        kinds = ", ".join(str(t.dtype) for t in given)
        self._ours.named_sites[site].fall(f"{self.x.dtype} is added to with {kinds}, and ComfyUI's sum keeps its dtype")
        gate = gate if table is None else table + gate
        added = self.x.clone()
        self.x = added.addcmul_(y, gate) if self.once else added.add_(y if gate is None else y * gate)

    def result(self, seen: bool) -> Tensor:
        """The tokens, in the memory of those that were given where somebody could see that."""
        x = self._as_given(self.x)
        if x is self._given or x.data_ptr() == self._given.data_ptr():
            return self._given
        return self._given.copy_(x) if seen else x

    def _seen_by_frame(self, t: Tensor) -> Tensor:
        if self.frames is None:
            return t
        count, per_frame = self.frames
        return t.reshape(self.batch * count, per_frame, t.shape[-1])  # a view, of what a block usually is given

    def _as_given(self, t: Tensor) -> Tensor:
        return t if self.frames is None else t.view(self._given.shape)


class BasicAVTransformerBlock(ltx2.AVBlock):
    """In place of `BasicAVTransformerBlock.forward`: its elementwise chains are fused."""

    __slots__ = ("step",)
    norms, host_class, whose, methods = NATIVE, _Block, "ComfyUI's", METHODS

    def __init__(self, block: Any, model: Model, *shared: Any):
        super().__init__(block, model, *shared)
        self.step: Step = model.step  # type: ignore[attr-defined]

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if (reason := super().why_stock(block, args, kwargs)) is not None:
            return reason
        return _why_values_differ(*args, **kwargs)

    def fused(
        self,
        block: Any,
        x: tuple[Tensor, Tensor],
        v_context: Any = None,
        a_context: Any = None,
        attention_mask: Any = None,
        v_timestep: Any = None,
        a_timestep: Any = None,
        v_pe: Any = None,
        a_pe: Any = None,
        v_cross_pe: Any = None,
        a_cross_pe: Any = None,
        v_cross_scale_shift_timestep: Any = None,
        a_cross_scale_shift_timestep: Any = None,
        v_cross_gate_timestep: Any = None,
        a_cross_gate_timestep: Any = None,
        transformer_options: Any = None,
        self_attention_mask: Any = None,
        v_prompt_timestep: Any = None,
        a_prompt_timestep: Any = None,
    ) -> tuple[Tensor, Tensor]:
        options = transformer_options
        vx, ax = x
        run_vx = options.get("run_vx", True)
        run_ax = options.get("run_ax", True) and ax.numel() > 0
        a2v = run_vx and options.get("a2v_cross_attn", True) and ax.numel() > 0
        v2a = run_ax and options.get("v2a_cross_attn", True)

        of_video = v_timestep, v_cross_scale_shift_timestep, v_cross_gate_timestep
        v = Stream(self, VIDEO, vx, frames_of(vx.shape[1], *of_video))
        a = Stream(self, AUDIO, ax, None)
        streams = self._fork(block, vx, options) if run_vx and run_ax else Fork(vx, None)

        # 1. attention to itself and to the text
        if run_vx:
            v.ada = v.values(block.scale_shift_table, v_timestep)
            n = v.norm("norm1", v.ada[1], v.ada[0])
            y = block.attn1(n, pe=v_pe, mask=self_attention_mask, transformer_options=options)
            v.add(y, v.ada[2])
            n = y = None
            self._attend_to_text(block, v, VIDEO, v_context, v_prompt_timestep, attention_mask, options)
        with streams.second:
            if run_ax:
                a.ada = a.values(block.audio_scale_shift_table, a_timestep)
                n = a.norm("norm1", a.ada[1], a.ada[0])
                y = block.audio_attn1(n, pe=a_pe, transformer_options=options)
                a.add(y, a.ada[2])
                n = y = None
                self._attend_to_text(block, a, AUDIO, a_context, a_prompt_timestep, attention_mask, options)

        # 2. attention between video and audio, each of the other as it was before
        if a2v or v2a:
            table = block.scale_shift_table_a2v_ca_video
            for_a2v, for_v2a = v.between(v.values(table[:4], v_cross_scale_shift_timestep), a2v, v2a)
            with streams.second:
                audio_table = block.scale_shift_table_a2v_ca_audio
                ada = a.values(audio_table[:4], a_cross_scale_shift_timestep)
                audio_for_a2v, audio_for_v2a = a.between(ada, a2v, v2a)
            streams.meet()
            if a2v:
                y = block.audio_to_video_attn(
                    for_a2v, context=audio_for_a2v, pe=v_cross_pe, k_pe=a_cross_pe, transformer_options=options
                )
                v.add(y, v.values(table[4:], v_cross_gate_timestep)[0])
            for_a2v = y = None  # memory for the feed-forward; what the other stream reads stays until it joins
            if v2a:
                with streams.second:
                    y = block.video_to_audio_attn(
                        audio_for_v2a, context=for_v2a, pe=a_cross_pe, k_pe=v_cross_pe, transformer_options=options
                    )
                    a.add(y, a.values(audio_table[4:], a_cross_gate_timestep)[0])
                    y = None

        # 3. feed-forward
        if run_vx:
            v.feed_forward(block.ff)
        with streams.second:
            if run_ax:
                a.feed_forward(block.audio_ff)
        streams.join()
        seen = _seen(block, options)
        return v.result(seen), a.result(seen)

    def _attend_to_text(
        self, block: Any, s: Stream, p: str, context: Tensor, prompt_timestep: Any, mask: Any, options: Any
    ) -> None:
        """A modality's attention to the text, still pending."""
        attn = getattr(block, f"{p}attn2")
        if not block.cross_attention_adaln:
            (n,) = s.add_and_norm("norm2", ABSENT)
            s.add(attn(n, context=context, mask=mask, transformer_options=options), once=False)
            return
        table = getattr(block, f"{p}prompt_scale_shift_table")
        shift, scale = self.values(plain(table).to(device=s.x.device, dtype=s.x.dtype), prompt_timestep)
        (n,) = s.add_and_norm("norm2", modulation(s.ada[7], s.ada[6]))
        text = s.modulate(context, scale, shift)
        s.add(attn(n, context=text, mask=mask, transformer_options=options), s.ada[8], once=False)

    def _fork(self, block: Any, vx: Tensor, options: Any) -> Fork:
        """Two CUDA streams where all weights are on the device: what streams them in takes the forward's to be one."""
        if not vx.is_cuda or "optimized_attention_override" in options or not self.step.resident(vx.device):
            return Fork(vx, None)
        return self.fork(block, vx)


def _seen(block: Any, options: Any) -> bool:
    """Whether somebody else could see that x was not written in place: who replaces a block, or hooks one."""
    return bool(options.get("patches_replace", {}).get("dit")) or hooked_by_torch(block)


def _why_values_differ(x: Any, *args: Any, **kwargs: Any) -> str | None:
    """Why the AdaLN values that a block is given can't be seen as its tokens are."""
    if args:
        return "the block was given more than its tokens by position"
    for name, value in kwargs.items():
        if name.endswith("timestep") and value is not None:
            t = value.data if isinstance(value, upstream.av_model.CompressedTimestep) else value
            if t.shape[0] != x[0].shape[0]:
                return f"{name} is of {t.shape[0]} samples and the tokens of {x[0].shape[0]}"
    return None
