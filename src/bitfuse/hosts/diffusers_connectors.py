"""diffusers' LTX-2 text connectors (0.37 to 0.42.1): the blocks through which a prompt goes once, before denoising.

Two transformers, for video and for audio, of blocks that hold an attention of diffusers' LTX-2 transformer, which
`diffusers.py` takes over there as here, and a feed-forward. Of a block's own chains one is more than one kernel: the
residual add after the attention, with the norm that follows it. That norm is `torch.nn.RMSNorm`, so ATen's
`F.rms_norm`, not the norm of the transformer's blocks. A block gets the forward below as those blocks get theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.pipelines.ltx2 import connectors as upstream
from torch import Tensor

from bitfuse.hosts.ltx2 import ABSENT, Model, Norms, Part
from bitfuse.hosts.site import Site, ways, why_not_stock
from bitfuse.ops.adaln import RESIDUAL_RMS_NORM_MODULATE_NATIVE
from bitfuse.run.swap import named

_Stock: Any = upstream.LTX2TransformerBlock1d

# Upstream source that was read and is restated here (`source_hash`).
_READ = {"LTX2TransformerBlock1d.forward": {"626a037be303cd63"}}  # 0.37 to 0.42.1


OPERATORS = (RESIDUAL_RMS_NORM_MODULATE_NATIVE,)

# The functions that the forward below leaves out, besides those of the operator's reference.
ORIGINALS = [
    (_Stock, "forward", "LTX2TransformerBlock1d.forward"),
    (torch.nn.RMSNorm, "forward", "torch.nn.RMSNorm.forward"),
]


class LTX2TransformerBlock1d(Part):
    """In place of the forward of upstream's block: its first residual add and second norm are fused."""

    __slots__ = ("_eps", "_norms", "_site")
    kind = "block"

    def __init__(self, block: Any, model: Model, site: Site):
        super().__init__(block, model, (site,))
        self._site, self._norms, self._eps = site, Norms(block, ("norm2",)), block.norm2.eps

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        given = [*args, *kwargs.values(), *block.parameters()] if torch.is_grad_enabled() else []
        given += [table for pair in given if isinstance(pair, tuple) for table in pair]
        if any(isinstance(t, Tensor) and t.requires_grad for t in given):  # a sum's depends on how it was formed
            return "a gradient is required of the block's inputs or weights"
        return self._norms.changed(block)

    def fused(
        self,
        block: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        x = hidden_states
        attended = block.attn1(block.norm1(x), attention_mask=attention_mask, query_rotary_emb=rotary_emb)
        x, n = self._site.call(RESIDUAL_RMS_NORM_MODULATE_NATIVE, x, attended, None, None, None, *ABSENT, self._eps)
        return x + block.ff(n)


def blocks(connectors: Any) -> Iterator[tuple[str, Any]]:
    """(name, block) of every block of an `LTX2TextConnectors`."""
    for side in ("video_connector", "audio_connector"):
        for index, block in enumerate(getattr(connectors, side).transformer_blocks):
            yield f"connectors.{side}.transformer_blocks.{index}", block


def accelerate(connectors: Any, shared: Model, host: str) -> None:
    """Give every block the forward above, noting each site in the handle."""
    for name, block in blocks(connectors):
        reason = next(_why_left_alone(block, host), None)
        site = Site(f"{name}.norm2", RESIDUAL_RMS_NORM_MODULATE_NATIVE.name, reason)
        shared.handle.sites.append(site)
        if reason is None:
            shared.handle.put(block, LTX2TransformerBlock1d(block, shared, site))


def _why_left_alone(block: Any, host: str) -> Iterator[str]:
    sources = {"LTX2TransformerBlock1d.forward": _Stock.forward}
    yield from why_not_stock(block, _Stock, "block", host, _READ, sources)
    norm = block.norm2
    if not isinstance(norm, torch.nn.RMSNorm) or ways(type(norm)) != ways(torch.nn.RMSNorm):
        yield f"norm2 is a {named(type(norm))}, not torch.nn.RMSNorm"
    elif norm.weight is not None or norm.eps is None:
        yield "norm2 has a weight, or no eps of its own; accepted: a norm without weight, with an eps"
