"""The made-up host's adapter: its attentions and blocks. A host's adapter need not have more in it than this one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

import made_up_host as upstream
from bitfuse.hosts import ltx2
from bitfuse.hosts.handle import Handle
from bitfuse.hosts.ltx2 import ABSENT, AUDIO, NATIVE, VIDEO, RotaryTrial, Stream, Tables
from bitfuse.hosts.part import Model, ModelForward, Part
from bitfuse.hosts.site import Site
from bitfuse.hosts.sources import Norms, entries, functions, of_operators, why_not_stock
from bitfuse.ops.qk_norm import QK_SPLIT_PER_OP
from bitfuse.ops.rope import SPLIT_PER_OP

NAME = f"made-up {upstream.__version__}"

_ROTARY = ltx2.Rotary(upstream, "rotate_halves", SPLIT_PER_OP, QK_SPLIT_PER_OP, lambda rotate, *given: rotate(*given))

# Upstream sources that were read and are restated here or in the operators' references (`source_hash`).
READ = {
    "rotate_halves": {"7b0c8ee7f8090d73"},
    "Attention.forward": {"ed1d6b976b84e63b"},
    "AVBlock.forward": {"e008316690465515"},
    "AVBlock.modulations": {"5a9da4d8967ab2df"},
    "AVBlock.norm": {"ea6de4b0abdc324b"},
}
_OF_AN_ATTENTION = ("rotate_halves", "Attention.forward")
_OF_A_BLOCK = ("AVBlock.forward", "AVBlock.modulations", "AVBlock.norm")
_QK_NORMS = Norms(("q_norm", "k_norm"), upstream.nn.RMSNorm, "torch.nn.RMSNorm", weighted=True)


class Attention(Part):
    """`Attention.forward`, with Q/K norms and rotary embedding fused."""

    __slots__ = ("_trial",)
    kind = "attention"

    def __init__(self, attn: Any, model: Model, site: Site, trial: RotaryTrial):
        super().__init__(attn, model, (site,))
        self._trial = trial

    def why_stock(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        return _QK_NORMS.why_called(attn) or self._trial.why_stock(attn)

    def fused(
        self,
        attn: Any,
        x: Tensor,
        context: Tensor | None = None,
        rope: Tables | None = None,
        context_rope: Tables | None = None,
    ) -> Tensor:
        context = x if context is None else context
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        (site,), norms = self.sites, (attn.q_norm, attn.k_norm)
        q, k = ltx2.norm_and_rotate(site.call, _ROTARY.qk, q, k, *norms, rope, context_rope)
        return attn.to_out(attn.attend(q, k, v))


class AVBlock(ltx2.AVBlock):
    """`AVBlock.forward`, with its elementwise chains fused."""

    __slots__ = ()
    norms, host_class, whose, methods = NATIVE, upstream.AVBlock, "the made-up host's", ("modulations", "norm")

    def fused(
        self, block: Any, video: Tensor, audio: Tensor, text: Tensor, audio_text: Tensor, temb: dict, ropes: dict
    ) -> tuple[Tensor, Tensor]:
        v, a = Stream(self, VIDEO, video, block.eps), Stream(self, AUDIO, audio, block.eps)
        v.ada = self.values(block.scale_shift_table, temb["video"])
        a.ada = self.values(block.audio_scale_shift_table, temb["audio"])
        streams = self.fork(block, video)
        self._attend(v, block.attn1, block.attn2, "video", text, ropes)
        with streams.second:
            self._attend(a, block.audio_attn1, block.audio_attn2, "audio", audio_text, ropes)

        cross = self.values(block.cross_table, temb["video_cross"])
        for_a2v, for_v2a = v.between(cross, True, True)
        with streams.second:
            audio_cross = self.values(block.audio_cross_table, temb["audio_cross"])
            audio_for_a2v, audio_for_v2a = a.between(audio_cross, True, True)
        streams.meet()
        both = ropes["video_cross"], ropes["audio_cross"]
        v.add(block.audio_to_video_attn(for_a2v, audio_for_a2v, *both), cross[4])
        with streams.second:
            a.add(block.video_to_audio_attn(audio_for_v2a, for_v2a, *both[::-1]), audio_cross[4])

        v.feed_forward(block.ff)
        with streams.second:
            a.feed_forward(block.audio_ff)
        streams.join()
        return v.x, a.x

    def _attend(self, s: Stream, to_itself: Any, to_text: Any, name: str, text: Tensor, ropes: dict) -> None:
        s.add(to_itself(s.norm("norm1", s.ada[1], s.ada[0]), rope=ropes[name]), s.ada[2])
        (n,) = s.add_and_norm("norm2", ABSENT)
        s.add(to_text(n, context=text))


def transformers(target: Any) -> list[Any]:
    return ltx2.models_in([target], upstream.Transformer)


def accelerate(model: Any, handle: Handle) -> None:
    """Take over every site of one transformer, noting each in the handle. ValueError for options it has not."""
    if handle.keep_text or handle.cuda_graph:
        raise ValueError("keep_text and cuda_graph are accepted for a made-up model as False only")
    of_attentions = entries(upstream, *_OF_AN_ATTENTION) + of_operators(ltx2.attention_operators([_ROTARY]))
    of_blocks = entries(upstream, *_OF_A_BLOCK) + of_operators(ltx2.block_operators(NATIVE))
    shared = Model(handle, {"attention": of_attentions, "block": of_blocks})
    for name, rotates, _, attn in ltx2.attentions(model):
        site, _ = ltx2.attention_sites(handle, name, _ROTARY if rotates else None, gated=False)
        trial = RotaryTrial(_difference)
        site.declined = next(_why_attention_stays(attn), None) or trial.at_first(attn)
        if site.declined is None:
            handle.put(attn, Attention(attn, shared, site, trial))
    blocks, sites = model.transformer_blocks, ltx2.block_sites(NATIVE, text=False)
    ltx2.take_over_blocks(blocks, shared, AVBlock, lambda block: sites, _why_block_stays)
    ModelForward.install(model, shared)


def _why_attention_stays(attn: Any) -> Iterator[str]:
    sources = functions(upstream, *_OF_AN_ATTENTION)
    yield from why_not_stock(attn, upstream.Attention, "attention", NAME, READ, sources)


def _why_block_stays(block: Any) -> Iterator[str]:
    yield from why_not_stock(block, upstream.AVBlock, "block", NAME, READ, functions(upstream, *_OF_A_BLOCK))


def _difference(attn: Any) -> str | None:
    return _ROTARY.difference(NAME, attn.heads, attn.head_dim, *ltx2.weights_of(attn))
