"""The convolutional encoder of LTX-2's video autoencoder: `video_coder.py` with downsamplers.

Its volumes are largest at its beginning, so that is where most of its time goes. What comes before the first
convolution (pixels to patches) and after the last one (129 channels at the size of the latents, of which the last
stands for the variance of all others) is left to the host's own ops: three or four of them, on the smallest volumes.

diffusers and ltx-core have it, with other names and other ops around it: `diffusers_vae.py` and `ltx_core_vae.py`
derive from `VideoEncoder`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitfuse.hosts.sources import Entry, of_operators
from bitfuse.hosts.video_coder import LEFT_OUT as _SHARED
from bitfuse.hosts.video_coder import Pending, VideoCoder, padding_of
from bitfuse.ops.pixel_norm import RESIDUAL_PAD
from bitfuse.ops.space_to_depth import DOWNSAMPLE

# The functions of PyTorch that an encoder's forward leaves out.
LEFT_OUT: list[Entry] = [*_SHARED, *of_operators((DOWNSAMPLE,))]


class VideoEncoder(VideoCoder):
    """Base of what stands in place of the forward of a host's encoder."""

    __slots__ = ()
    kind, sampling = "encoder", DOWNSAMPLE

    def why_stock(self, coder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        given = self._given(args, kwargs)
        reason = super().why_stock(coder, args, kwargs) or self._why_not_divided(coder, given)
        return reason or self._why_not_worth_it(given)

    def _why_not_worth_it(self, video: Tensor) -> str | None:
        """A run of a pipeline encodes an image once. The first encode of a process takes seconds for its kernels (9.1 s
        with an empty Triton cache on an H200, where stock takes 1.0), and each wins 4 to 8 ms."""
        of_a_pipeline = len(self.model.handle.models) > 1
        if video.shape[2] > 1 or not of_a_pipeline or any(site.strict for site in self.sites):
            return None
        return (
            "it is one frame, in a pipeline: kernels that take seconds to compile and prove would win milliseconds; "
            'require=["encoder.*"] has it fused'
        )

    def patches(self, encoder: Any) -> tuple[int, int]:
        """(frames, pixels a side) of the patches of the video that the first convolution takes."""
        raise NotImplementedError

    def _why_not_divided(self, encoder: Any, video: Tensor) -> str | None:
        """Downsamplers can't halve what is odd: the host's own forward raises its own error."""
        frames, side = self.patches(encoder)
        sides = [video.shape[2] // frames, video.shape[3] // side, video.shape[4] // side]
        if [sides[0] * frames, sides[1] * side, sides[2] * side] != list(video.shape[2:]):
            return f"a video of {list(video.shape)} has no whole number of patches"
        for stage in self.stages(encoder):
            for name, module in stage.steps:
                if type(module) is not self.names.sampler:
                    continue
                sides[0] += module.stride[0] - 1  # its first frame again
                if any(n % by for n, by in zip(sides, module.stride, strict=True)):
                    return f"{name} gets {sides} pixels a side, no multiple of its stride {list(module.stride)}"
                sides = [n // by for n, by in zip(sides, module.stride, strict=True)]
        return None

    def _why_not_sampler(self, name: str, sampler: Any) -> str | None:
        if (reason := super()._why_not_sampler(name, sampler)) is not None:
            return reason
        if sampler.stride[0] > 2:
            return f"{name} makes one frame of {sampler.stride[0]}, and repeats more than the first; accepted: 1 or 2"
        if sampler.group_size not in (1, 2, 4, 8):
            return f"{name} has a mean of {sampler.group_size} channels for its residual; accepted: 1, 2, 4 or 8"
        channels, of_residual = sampler.conv.conv.weight.shape[:2]
        if channels * sampler.group_size != of_residual:  # what the operator takes it to be, by these
            return f"{name} has {of_residual} channels, and means of {sampler.group_size} for {channels} of them"
        return None

    def _sampler(self, name: str, sampler: Any, pending: Pending, causal: bool) -> Pending:
        front, back, edge = padding_of(sampler.conv, causal)
        again = sampler.stride[0] - 1  # how often the first frame is repeated before the convolution pads
        padded = self._call(f"{name}.pad", RESIDUAL_PAD, *pending.taken(), front + again, back, edge)
        frames, height, width = padded.shape[2:]
        residual = padded[:, :, front : frames - back, edge : height - edge, edge : width - edge]
        found = self._convolve(f"{name}.conv", padded, sampler.conv)
        del padded
        return Pending(self._call(f"{name}.downsample", DOWNSAMPLE, found.y, residual, found.bias, *sampler.stride))

    def _last(self, coder: Any, last: Pending) -> tuple[Tensor, Tensor | None]:
        """(y, bias): with its bias, y is what the host's last convolution gives."""
        return last.y, last.bias
