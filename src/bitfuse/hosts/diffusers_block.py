"""diffusers' LTX-2 transformer block (0.38 to 0.42.1): its forward, with every elementwise chain one operator.

The forward below restates `LTX2VideoTransformerBlock.forward`: the same modules called in the same order (hooks, LoRA
and dropout notice the order), and between them operators, each of which equals its chain bit for bit or runs it. A
block gets it as an attribute of its own (`bitfuse.run.swap`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models import normalization
from diffusers.models.transformers import transformer_ltx2 as upstream
from torch import Tensor

from bitfuse.hosts.ltx2 import ABSENT, Ada, Beside, Block, Model, Norms, Quiet, Rehearsal, Values, calls_of, modulation
from bitfuse.hosts.site import Site, own_method, ways, why_not_stock
from bitfuse.ops.adaln import (
    GATED_RESIDUAL,
    MODULATE,
    RESIDUAL_RMS_NORM_MODULATE_COMPOSED,
    RESIDUAL_RMS_NORM_MODULATE_TWICE_COMPOSED,
    RMS_NORM_MODULATE_COMPOSED,
)
from bitfuse.run.swap import named

_Stock: Any = upstream.LTX2VideoTransformerBlock

# Upstream sources that were read and are restated here (`source_hash`).
_READ = {
    "LTX2VideoTransformerBlock.forward": {"0d8ee8e289450336", "dd764490abd818e1"},  # 0.38, 0.39; 0.40 to 0.42.1
    "LTX2VideoTransformerBlock.get_mod_params": {"3d9b3e7509fc6dd4"},  # 0.38 to 0.42.1
    "RMSNorm.forward": {"189c32f1ae7bb9b6", "25f4c6d067d464a9"},  # to 0.40; 0.41 to 0.42.1
}

_VIDEO_NORMS = ("norm1", "norm2", "audio_to_video_norm", "norm3")
_AUDIO_NORMS = ("audio_norm1", "audio_norm2", "video_to_audio_norm", "audio_norm3")
_SITES = {
    "norm1": RMS_NORM_MODULATE_COMPOSED,
    "audio_norm1": RMS_NORM_MODULATE_COMPOSED,
    "norm2": RESIDUAL_RMS_NORM_MODULATE_COMPOSED,
    "audio_norm2": RESIDUAL_RMS_NORM_MODULATE_COMPOSED,
    "text": MODULATE,
    "audio_text": MODULATE,
    "audio_to_video_norm": RESIDUAL_RMS_NORM_MODULATE_TWICE_COMPOSED,
    "video_to_audio_norm": RESIDUAL_RMS_NORM_MODULATE_TWICE_COMPOSED,
    "norm3": RESIDUAL_RMS_NORM_MODULATE_COMPOSED,
    "audio_norm3": RESIDUAL_RMS_NORM_MODULATE_COMPOSED,
    "output": GATED_RESIDUAL,
    "audio_output": GATED_RESIDUAL,
}


def _sites(block: Any) -> dict[str, Any]:
    modulated = getattr(block, "cross_attn_adaln", False)  # the text, in LTX-2.3
    return {site: op for site, op in _SITES.items() if modulated or "text" not in site}


OPERATORS = tuple(dict.fromkeys(_SITES.values()))

# The functions that the forward below leaves out, besides those of the operators' references.
ORIGINALS = [
    (_Stock, "forward", "LTX2VideoTransformerBlock.forward"),
    *calls_of(normalization.RMSNorm, "diffusers' RMSNorm"),
]
if hasattr(_Stock, "get_mod_params"):  # from 0.38
    ORIGINALS.append((_Stock, "get_mod_params", "LTX2VideoTransformerBlock.get_mod_params"))


class LTX2VideoTransformerBlock(Block):
    """In place of the forward of upstream's block: its elementwise chains are fused."""

    __slots__ = ("_beside", "_eps", "_norms", "_quiet", "_values")

    def __init__(self, block: Any, name: str, model: Model, values: Values, beside: Beside):
        sites = {site: Site(f"{name}.{site}", op.name) for site, op in _sites(block).items()}
        super().__init__(block, model, sites)
        self._values, self._beside, self._quiet = values, beside, Quiet(block)
        self._norms, self._eps = Norms(block, _VIDEO_NORMS + _AUDIO_NORMS), block.norm1.eps
        model.handle.sites += sites.values()

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if torch.is_grad_enabled():  # the gradient of a sum depends on how it was formed
            given = (*args, *kwargs.values(), *block.parameters())
            if any(isinstance(t, Tensor) and t.requires_grad for t in given):
                return "a gradient is required of the block's inputs or weights"
        if not own_method(block, "get_mod_params", _Stock):
            return f"the get_mod_params of this {named(type(block))} is another than that of diffusers' block"
        return self._norms.changed(block)

    def fused(
        self,
        block: Any,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        temb: Tensor,
        temb_audio: Tensor,
        temb_ca_scale_shift: Tensor,
        temb_ca_audio_scale_shift: Tensor,
        temb_ca_gate: Tensor,
        temb_ca_audio_gate: Tensor,
        temb_prompt: Tensor | None = None,
        temb_prompt_audio: Tensor | None = None,
        video_rotary_emb: tuple[Tensor, Tensor] | None = None,
        audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ca_video_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ca_audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        audio_self_attention_mask: Tensor | None = None,
        a2v_cross_attention_mask: Tensor | None = None,
        v2a_cross_attention_mask: Tensor | None = None,
        use_a2v_cross_attention: bool = True,
        use_v2a_cross_attention: bool = True,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        site, eps = self.named_sites, self._eps
        residual = RESIDUAL_RMS_NORM_MODULATE_COMPOSED
        x, y = hidden_states, audio_hidden_states
        perturbed = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
        perturbed = perturbed if block.perturbed_attn else {}
        video = self._ada(block.scale_shift_table, temb)
        audio = self._ada(block.audio_scale_shift_table, temb_audio)
        main: Any = None
        side = self._beside.of(x, self._quiet)
        on_side: Any = contextlib.nullcontext() if side is None else torch.cuda.stream(side)
        if side is not None:
            main = torch.cuda.current_stream(x.device)
            side.wait_stream(main)

        # 1. self-attention
        n = site["norm1"].call(RMS_NORM_MODULATE_COMPOSED, x, *modulation(video[1], video[0]), eps)
        attended = block.attn1(
            hidden_states=n,
            encoder_hidden_states=None,
            query_rotary_emb=video_rotary_emb,
            attention_mask=self_attention_mask,
            **perturbed,
        )
        with on_side:
            n = site["audio_norm1"].call(RMS_NORM_MODULATE_COMPOSED, y, *modulation(audio[1], audio[0]), eps)
            audio_attended = block.audio_attn1(
                hidden_states=n,
                encoder_hidden_states=None,
                query_rotary_emb=audio_rotary_emb,
                attention_mask=audio_self_attention_mask,
                **perturbed,
            )

        # 2. cross-attention to the text
        text, audio_text = encoder_hidden_states, audio_encoder_hidden_states
        if block.cross_attn_adaln:
            shift, scale = self._prompt(block.prompt_scale_shift_table, temb_prompt, x)
            text = site["text"].call(MODULATE, text, *modulation(scale, shift))
            with on_side:
                shift, scale = self._prompt(block.audio_prompt_scale_shift_table, temb_prompt_audio, y)
                audio_text = site["audio_text"].call(MODULATE, audio_text, *modulation(scale, shift))
        query = modulation(video[7], video[6]) if block.video_cross_attn_adaln else ABSENT
        x, n = site["norm2"].call(residual, x, attended, *video[2], None, *query, eps)
        attended = block.attn2(
            n, encoder_hidden_states=text, query_rotary_emb=None, attention_mask=encoder_attention_mask
        )
        with on_side:
            query = modulation(audio[7], audio[6]) if block.audio_cross_attn_adaln else ABSENT
            y, n = site["audio_norm2"].call(residual, y, audio_attended, *audio[2], None, *query, eps)
            audio_attended = block.audio_attn2(
                n, encoder_hidden_states=audio_text, query_rotary_emb=None, attention_mask=audio_encoder_attention_mask
            )
        # what is still to be added to each stream, and its gate
        gate = video[8] if block.video_cross_attn_adaln else (None, None)
        audio_gate = audio[8] if block.audio_cross_attn_adaln else (None, None)

        # 3. cross-attention between video and audio, each of the other as it was before
        if use_a2v_cross_attention or use_v2a_cross_attention:
            wanted = use_a2v_cross_attention, use_v2a_cross_attention
            ca = self._ada(block.video_a2v_cross_attn_scale_shift_table[:4], temb_ca_scale_shift)
            x, for_a2v, for_v2a = self._between(site["audio_to_video_norm"], x, attended, gate, ca, *wanted)
            with on_side:
                ca = self._ada(block.audio_a2v_cross_attn_scale_shift_table[:4], temb_ca_audio_scale_shift)
                y, audio_for_a2v, audio_for_v2a = self._between(
                    site["video_to_audio_norm"], y, audio_attended, audio_gate, ca, *wanted
                )
            if side is not None:
                met = side.record_event()
                side.wait_stream(main)
                main.wait_event(met)
            attended = audio_attended = None
            if use_a2v_cross_attention:
                (gate,) = self._ada(block.video_a2v_cross_attn_scale_shift_table[4:], temb_ca_gate)
                attended = block.audio_to_video_attn(
                    for_a2v,
                    encoder_hidden_states=audio_for_a2v,
                    query_rotary_emb=ca_video_rotary_emb,
                    key_rotary_emb=ca_audio_rotary_emb,
                    attention_mask=a2v_cross_attention_mask,
                )
            for_a2v = None  # memory for the feed-forward; what the other stream reads stays until it has joined
            if use_v2a_cross_attention:
                with on_side:
                    (audio_gate,) = self._ada(block.audio_a2v_cross_attn_scale_shift_table[4:], temb_ca_audio_gate)
                    audio_attended = block.video_to_audio_attn(
                        audio_for_v2a,
                        encoder_hidden_states=for_v2a,
                        query_rotary_emb=ca_audio_rotary_emb,
                        key_rotary_emb=ca_video_rotary_emb,
                        attention_mask=v2a_cross_attention_mask,
                    )

        # 4. feed-forward
        mlp = modulation(video[4], video[3])
        x, n = self._before_feed_forward(site["norm3"], x, attended, gate, mlp)
        attended = None
        x = site["output"].call(GATED_RESIDUAL, x, block.ff(n), *video[5])
        with on_side:
            mlp = modulation(audio[4], audio[3])
            y, n = self._before_feed_forward(site["audio_norm3"], y, audio_attended, audio_gate, mlp)
            y = site["audio_output"].call(GATED_RESIDUAL, y, block.audio_ff(n), *audio[5])
        if side is not None:
            main.wait_stream(side)
        return x, y

    def _ada(self, table: Tensor, temb: Tensor) -> list[Ada]:
        """(value, table row) of each row of a table, not yet added: `get_mod_params` before its sum."""
        if table.device != temb.device:  # offloaded: upstream moves it
            table = table.to(temb.device)
        return list(zip(self._values.of(temb, table.shape[0]), table.unbind(0), strict=True))

    def _prompt(self, table: Tensor, temb: Tensor | None, x: Tensor) -> list[Ada]:
        if temb is not None:
            return self._ada(table, temb)
        # the text's modulation does not depend on the timestep
        rows = table[None, None].to(device=x.device, dtype=x.dtype).unbind(dim=2)
        return [(row, None) for row in rows]

    def _between(
        self, site: Site, x: Tensor, attended: Tensor, gate: Any, ca: list[Ada], use_a2v: bool, use_v2a: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The stream with `attended` added, and its norm modulated for the one, the other, or both attentions."""
        a2v, v2a, eps = modulation(ca[0], ca[1]), modulation(ca[2], ca[3]), self._eps
        if use_a2v and use_v2a:
            return site.call(RESIDUAL_RMS_NORM_MODULATE_TWICE_COMPOSED, x, attended, *gate, None, *a2v, *v2a, eps)
        only = a2v if use_a2v else v2a
        x, n = site.call(RESIDUAL_RMS_NORM_MODULATE_COMPOSED, x, attended, *gate, None, *only, eps)
        return (x, n, None) if use_a2v else (x, None, n)

    def _before_feed_forward(
        self, site: Site, x: Tensor, attended: Tensor | None, gate: Any, mlp: tuple
    ) -> tuple[Tensor, Tensor]:
        eps = self._eps
        if attended is None:  # an attention that was left out: nothing to add
            return x, site.call(RMS_NORM_MODULATE_COMPOSED, x, *mlp, eps)
        return site.call(RESIDUAL_RMS_NORM_MODULATE_COMPOSED, x, attended, *gate, None, *mlp, eps)


# -- taking over -----------------------------------------------------------------------------------------------------


def accelerate(model: Any, shared: Model, host: str) -> None:
    """Give every block of a transformer the forward above, noting each site in the handle."""
    values, beside, handle = Values(), Beside(), shared.handle
    for index, block in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{index}"
        reason = next(_why_left_alone(block, host), None)
        if reason is not None:
            handle.sites += [Site(f"{name}.{site}", op.name, reason) for site, op in _sites(block).items()]
            continue
        handle.put(block, LTX2VideoTransformerBlock(block, name, shared, values, beside))
    Rehearsal.of_first(model.transformer_blocks, handle)


def _why_left_alone(block: Any, host: str) -> Iterator[str]:
    sources = {
        "LTX2VideoTransformerBlock.forward": _Stock.forward,
        "LTX2VideoTransformerBlock.get_mod_params": getattr(_Stock, "get_mod_params", None),
        "RMSNorm.forward": normalization.RMSNorm.forward,
    }
    yield from why_not_stock(block, _Stock, "block", host, _READ, sources)
    for name in _VIDEO_NORMS + _AUDIO_NORMS:
        norm = getattr(block, name)
        if not isinstance(norm, normalization.RMSNorm) or ways(type(norm)) != ways(normalization.RMSNorm):
            yield f"{name} is a {named(type(norm))}, not diffusers' RMSNorm"
        elif norm.weight is not None or norm.bias is not None:
            yield f"{name} has a weight; accepted: norms without"
        elif norm.eps != block.norm1.eps:
            yield f"the eps of {name} is {norm.eps} and that of norm1 {block.norm1.eps}"
