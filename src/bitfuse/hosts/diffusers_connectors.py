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

from bitfuse.hosts import diffusers
from bitfuse.hosts.ltx2 import ABSENT, Tables, why_gradient
from bitfuse.hosts.part import Model, Part
from bitfuse.hosts.site import Site
from bitfuse.hosts.sources import Norms, entries, functions, of_operators, why_not_stock
from bitfuse.ops.adaln import RESIDUAL_RMS_NORM_MODULATE_NATIVE

_Block: Any = upstream.LTX2TransformerBlock1d
_FORWARD = "LTX2TransformerBlock1d.forward"

# Upstream source that was read and is restated here (`source_hash`).
READ = {_FORWARD: {"626a037be303cd63"}}  # 0.37 to 0.42.1

_NORMS = Norms(("norm2",), torch.nn.RMSNorm, "torch.nn.RMSNorm", weighted=False)

# The functions that the forward below leaves out.
LEFT_OUT = [
    *entries(upstream, _FORWARD),
    (torch.nn.RMSNorm, "forward", "torch.nn.RMSNorm.forward"),
    *of_operators((RESIDUAL_RMS_NORM_MODULATE_NATIVE,)),
]


class LTX2TransformerBlock1d(Part):
    """In place of the forward of upstream's block: its first residual add and second norm are fused."""

    __slots__ = ()
    kind = "block"

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if (reason := why_gradient(block, args, kwargs) or _NORMS.why_called(block)) is not None:
            return reason
        x = args[0] if args else kwargs["hidden_states"]
        if (shape := block.norm2.normalized_shape) != x.shape[-1:]:  # upstream has an error for it
            return f"the normalized_shape of norm2 is {shape} and the tokens are {x.shape[-1]} wide"
        return None

    def fused(
        self, block: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, rotary_emb: Tables | None = None
    ) -> Tensor:
        x, (site,), eps = hidden_states, self.sites, block.norm2.eps
        attended = block.attn1(block.norm1(x), attention_mask=attention_mask, query_rotary_emb=rotary_emb)
        x, n = site.call(RESIDUAL_RMS_NORM_MODULATE_NATIVE, x, attended, None, None, None, *ABSENT, eps)
        return x + block.ff(n)


def blocks(connectors: Any) -> Iterator[tuple[str, Any]]:
    """(name, block) of every block of an `LTX2TextConnectors`."""
    for side in ("video_connector", "audio_connector"):
        for index, block in enumerate(getattr(connectors, side).transformer_blocks):
            yield f"connectors.{side}.transformer_blocks.{index}", block


def accelerate(connectors: Any, shared: Model, host: str) -> None:
    """Take over the attention of every block, and give the block the forward above."""
    for name, block in blocks(connectors):
        diffusers.take_over(f"{name}.attn1", True, block.attn1, shared)
    for name, block in blocks(connectors):
        site = Site(f"{name}.norm2", RESIDUAL_RMS_NORM_MODULATE_NATIVE.name, next(_why_left_alone(block, host), None))
        shared.handle.sites.append(site)
        if site.declined is None:
            shared.handle.put(block, LTX2TransformerBlock1d(block, shared, (site,)))


def _why_left_alone(block: Any, host: str) -> Iterator[str]:
    yield from why_not_stock(block, _Block, "block", host, READ, functions(upstream, _FORWARD))
    if (reason := _NORMS.why_called(block, hooks=False)) is not None:
        yield reason
