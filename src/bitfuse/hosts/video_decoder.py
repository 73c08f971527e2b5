"""The convolutional decoder of LTX-2's video autoencoder: `video_coder.py` with upsamplers, and a video at its end.

diffusers and ltx-core have it, with other names and other ops around it: `diffusers_vae.py` and `ltx_core_vae.py`
derive from `VideoDecoder`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bitfuse.hosts.sources import Entry, of_operators
from bitfuse.hosts.video_coder import LEFT_OUT as _SHARED
from bitfuse.hosts.video_coder import Pending, VideoCoder, padding_of
from bitfuse.ops.depth_to_space import UNPATCHIFY, UPSAMPLE
from bitfuse.ops.pixel_norm import RESIDUAL_PAD

# The functions of PyTorch that a decoder's forward leaves out.
LEFT_OUT: list[Entry] = [*_SHARED, *of_operators((UPSAMPLE, UNPATCHIFY))]


class VideoDecoder(VideoCoder):
    """Base of what stands in place of the forward of a host's decoder."""

    __slots__ = ()
    kind, sampling = "decoder", UPSAMPLE

    def patches(self, decoder: Any) -> tuple[int, int]:
        """(frames, pixels a side) of the patches of the video that the last convolution gives."""
        raise NotImplementedError

    @classmethod
    def sites_of(cls, coder: Any) -> Iterator[tuple[str, str]]:
        yield from super().sites_of(coder)
        yield "unpatchify", UNPATCHIFY.name

    def _sampler(self, name: str, sampler: Any, pending: Pending, causal: bool) -> Pending:
        front, back, edge = padding_of(sampler.conv, causal)
        padded = self._call(f"{name}.pad", RESIDUAL_PAD, *pending.taken(), front, back, edge)
        residual = None
        if sampler.residual:
            frames, height, width = padded.shape[2:]
            residual = padded[:, :, front : frames - back, edge : height - edge, edge : width - edge]
        found = self._convolve(f"{name}.conv", padded, sampler.conv)
        del padded
        return Pending(self._call(f"{name}.upsample", UPSAMPLE, found.y, residual, found.bias, *sampler.stride))

    def _last(self, coder: Any, last: Pending) -> Tensor:
        return self._call("unpatchify", UNPATCHIFY, last.y, last.bias, *self.patches(coder))
