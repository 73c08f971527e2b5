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

from bitfuse.hosts.common import ABSENT
from bitfuse.hosts.patch import Handle, Site, Swapped, hooked, named, swap_class, why_not_stock
from bitfuse.ops.residual_rms_norm import RESIDUAL_RMS_NORM_MODULATE_NATIVE

_Stock: Any = upstream.LTX2TransformerBlock1d

# Upstream source that was read and is restated here (`source_hash`).
_READ = {"LTX2TransformerBlock1d.forward": {"626a037be303cd63"}}  # 0.37 to 0.42.1


class _State:
    """What a block carries while it is accelerated."""

    def __init__(self, block: Any, site: Site):
        self.site, self.norm, self.eps = site, block.norm2, block.norm2.eps

    def why_stock(self, block: Any, given: tuple[Any, ...]) -> str | None:
        """Why upstream's own forward must run."""
        tensors = (*given, *block.parameters()) if torch.is_grad_enabled() else ()
        if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):  # a sum's depends on how it was formed
            return "a gradient is required of the block's inputs or weights"
        if block._modules["norm2"] is not self.norm or self.norm.eps != self.eps or self.norm.weight is not None:
            return "norm2 was replaced or changed meanwhile"
        if hooked(self.norm):
            return "a hook is attached to norm2, which is not called when it is fused"
        return None


class LTX2TransformerBlock1d(Swapped, _Stock):
    """Upstream's block, of the same name, with its first residual add and second norm fused."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        # a hook that wrapped this method may still call it when the block is stock again, or in a copy of it
        state = self.__dict__.get("_bitfuse")
        if state is None or torch.compiler.is_compiling():
            return _Stock.forward(self, hidden_states, attention_mask, rotary_emb)
        if (reason := state.why_stock(self, (hidden_states, *(rotary_emb or ())))) is not None:
            return state.site.leave(lambda: _Stock.forward(self, hidden_states, attention_mask, rotary_emb), reason)
        x = hidden_states
        attended = self.attn1(self.norm1(x), attention_mask=attention_mask, query_rotary_emb=rotary_emb)
        x, n = state.site.call(RESIDUAL_RMS_NORM_MODULATE_NATIVE, x, attended, None, None, None, *ABSENT, state.eps)
        return x + self.ff(n)


def blocks(connectors: Any) -> Iterator[tuple[str, Any]]:
    """(name, block) of every block of an `LTX2TextConnectors`."""
    for side in ("video_connector", "audio_connector"):
        for index, block in enumerate(getattr(connectors, side).transformer_blocks):
            yield f"connectors.{side}.transformer_blocks.{index}", block


def accelerate(connectors: Any, handle: Handle, host: str) -> None:
    """Give every block the forward above, noting each site in the handle."""
    for name, block in blocks(connectors):
        reason = next(_why_left_alone(block, host), None)
        site = Site(f"{name}.norm2", RESIDUAL_RMS_NORM_MODULATE_NATIVE.name, reason)
        handle.sites.append(site)
        if reason is None:
            swap_class(block, LTX2TransformerBlock1d, _State(block, site), handle)


def _why_left_alone(block: Any, host: str) -> Iterator[str]:
    sources = {"LTX2TransformerBlock1d.forward": _Stock.forward}
    yield from why_not_stock(block, _Stock, "block", host, _READ, sources)
    norm = block.norm2
    if type(norm) is not torch.nn.RMSNorm:
        yield f"norm2 is a {named(type(norm))}, not torch.nn.RMSNorm"
    elif norm.weight is not None or norm.eps is None:
        yield "norm2 has a weight, or no eps of its own; accepted: a norm without weight, with an eps"
