"""What a diffusers pipeline does with a decoded video (0.37 to 0.42.1): its frames, brought to the CPU.

`VideoProcessor.postprocess_video` copies the video into memory that is not pinned, widens it to fp32 and copies that
once more, with NumPy on one core: 1.7 of the 13.6 s of a two-stage run (121 frames of 1536x1024, H200, 2026-11-29).
Ours copies some planes at a time through pinned memory, from which all cores widen them to where they stay. Nothing is
computed in another way: `_denormalize_conditionally` is the host's own, widening to fp32 is exact, and the bytes of a
PIL image are the same product rounded to even by the same IEEE operations, on the GPU.

That the result is the host's is looked at in every call: the last frame of each sample is made by the host as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import image_processor, video_processor
from torch import Tensor

from bitfuse.core.bits import compare
from bitfuse.core.conditions import around
from bitfuse.hosts.part import Model, Part
from bitfuse.hosts.site import Site
from bitfuse.hosts.sources import entries, functions, not_own, why_not_read
from bitfuse.run.audit import BitfuseWarning

_Processor: Any = video_processor.VideoProcessor
_OF_VIDEO = ("VideoProcessor.postprocess_video",)
_OF_IMAGES = tuple(
    f"VaeImageProcessor.{name}"
    for name in ("postprocess", "_denormalize_conditionally", "denormalize", "pt_to_numpy", "numpy_to_pil")
)

# Upstream sources that were read and are restated here (`source_hash`), 0.37 to 0.42.1.
READ = {
    "VideoProcessor.postprocess_video": {"6851dd6b649f5c63"},
    "VaeImageProcessor.postprocess": {"bcc760d7b09d1403"},
    "VaeImageProcessor._denormalize_conditionally": {"a3abcda15d2e5619"},
    "VaeImageProcessor.denormalize": {"28a40648bfbf6129"},
    "VaeImageProcessor.pt_to_numpy": {"4879b336bc4066c2"},
    "VaeImageProcessor.numpy_to_pil": {"de0fda29bfeb858b"},
}

# The functions that ours leaves out.
LEFT_OUT = [*entries(video_processor, *_OF_VIDEO), *entries(image_processor, *_OF_IMAGES)]

_BROUGHT = ("np", "pil")
"""The output types for which frames are brought to the CPU."""
_STAGED = 64 << 20
"""Bytes of pinned memory through which frames are copied, twice: one half is widened while the other is filled."""


class PostprocessVideo(Part):
    """In place of `VideoProcessor.postprocess_video`."""

    __slots__ = ("_differed",)
    kind = "frames"
    method = "postprocess_video"

    def __init__(self, processor: Any, model: Model, site: Site):
        super().__init__(processor, model, (site,))
        self._differed: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_type", args[1] if len(args) > 1 else "np") not in _BROUGHT:  # it stays on the device
            return self.stock(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def why_stock(self, processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        return self._differed or next(_why_not(processor, *args, **kwargs), None)

    def fused(self, processor: Any, video: Tensor, output_type: str = "np") -> Any:
        """NumPy array [B, F, H, W, C] of fp32, or for each sample a list of PIL images.

        video          [B, 3, F, H, W], contiguous, bf16, fp16 or fp32
        output_type    "np" or "pil"
        """
        batch, channels, frames, height, width = video.shape
        if output_type == "np":  # in the strides of NumPy's stack, which keeps the order of the planes in memory
            planes = np.empty((batch, channels, frames, height, width), np.float32)
            out = np.empty_like(planes.transpose(0, 2, 3, 4, 1))  # not a view of another array, as NumPy's is none
            planes = out.transpose(0, 4, 1, 2, 3)
        else:
            out = np.empty((batch, frames, height, width, channels), np.uint8)
        for number, sample in enumerate(video):
            image = processor._denormalize_conditionally(sample.permute(1, 0, 2, 3))
            if output_type == "np":
                _bring(image.permute(1, 0, 2, 3).flatten(0, 1), torch.from_numpy(planes[number]).flatten(0, 1))
            elif image.sum().isnan():  # what NumPy makes of NaN is its own affair
                return self._stock_because("the video has a NaN, of which no byte can be made", video, output_type)
            else:
                _bring(image, torch.from_numpy(out[number]), _bytes)
        last = torch.from_numpy(np.ascontiguousarray(out[:, -1]))
        if (mismatch := compare(self._last_frames(video, output_type), last)) is not None:
            self._differed = f"the last frame was not the one that diffusers makes: {mismatch.sentence}"
            warnings.warn(f"bitfuse: {self._differed}; its own method makes them", BitfuseWarning, stacklevel=4)
            return self._stock_because(self._differed, video, output_type)
        (site,) = self.sites
        site.fused += 1
        site.tiers.add("pinned memory" if video.is_cuda else "all cores")
        if output_type == "np":
            return out
        return [[PIL.Image.fromarray(frame) for frame in pixels] for pixels in out]

    def _stock_because(self, reason: str, *args: Any) -> Any:
        self.fall(reason)
        return self.stock(*args)

    def _last_frames(self, video: Tensor, output_type: str) -> Tensor:
        """[B, H, W, C], as diffusers makes them."""
        found = self.stock(video[:, :, -1:], output_type)
        if output_type == "pil":
            found = np.stack([np.stack([np.asarray(frame) for frame in frames]) for frames in found])
        return torch.from_numpy(np.ascontiguousarray(found[:, 0]))


def _why_not(processor: Any, video: Any, output_type: Any = "np", **more: Any) -> Iterator[str]:
    """Why diffusers' own must make these frames, in sentences."""
    if more:
        yield f"{', '.join(sorted(more))} is given; accepted: video and output_type"
    if (
        type(video) is not Tensor
        or video.ndim != 5
        or video.dtype not in (torch.bfloat16, torch.float16, torch.float32)
    ):
        what = f"{video.dtype} {list(video.shape)}" if isinstance(video, Tensor) else type(video).__name__
        yield f"video is {what}; accepted: [B, C, F, H, W], a tensor of torch.bfloat16, torch.float16 or torch.float32"
        return
    if video.shape[1] != 3 or not video.numel():
        yield f"video is {list(video.shape)}; accepted: [B, 3, F, H, W], none of them 0"
    if not video.is_contiguous():
        yield f"video is not contiguous: its strides are {video.stride()}, which are seen in those of the frames"
    if video.requires_grad:
        yield "a gradient is required of the video"
    if not processor.config.do_normalize:
        yield "the processor's do_normalize is off: the video need not lie between 0 and 1"
    yield from around()


def _bring(image: Tensor, into: Tensor, make: Callable[[Tensor], Tensor] = Tensor.contiguous) -> None:
    """Copy what `make` makes of an image on any device, some of its first dimension at a time, to the CPU."""
    at_once = max(1, _STAGED // (image[0].numel() * image.element_size()))
    if not image.is_cuda:
        for part, there in zip(image.split(at_once), into.split(at_once), strict=True):
            there.copy_(make(part))
        return
    with torch.cuda.device(image.device):
        staged: list[Tensor] = []
        arrived = torch.cuda.Event(), torch.cuda.Event()
        waiting: tuple[int, Tensor] | None = None  # which of both halves holds what belongs there
        for number, (part, there) in enumerate(zip(image.split(at_once), into.split(at_once), strict=True)):
            made = make(part)
            if len(staged) < 2:
                staged.append(torch.empty(made.shape, dtype=made.dtype, pin_memory=True))
            staged[number % 2][: len(made)].copy_(made, non_blocking=True)
            arrived[number % 2].record()
            if waiting is not None:
                _arrive(arrived, staged, *waiting)
            waiting = number % 2, there
        if waiting is not None:
            _arrive(arrived, staged, *waiting)


def _arrive(arrived: Sequence[torch.cuda.Event], staged: list[Tensor], half: int, there: Tensor) -> None:
    arrived[half].synchronize()
    there.copy_(staged[half][: len(there)])


def _bytes(image: Tensor) -> Tensor:
    """[F, C, H, W] of 0 to 1 as [F, H, W, C] of 255ths: NumPy's (fp32 * 255).round().astype("uint8")."""
    return (image.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).contiguous()


def accelerate(processor: Any, shared: Model, host: str) -> Site:
    """Give a pipeline's `video_processor` the method above; its site."""
    site = Site("video_processor", "postprocess_video", next(_why_left_alone(processor, host), None))
    if site.declined is None:
        shared.handle.put(processor, PostprocessVideo(processor, shared, site))
    return site


def _why_left_alone(processor: Any, host: str) -> Iterator[str]:
    if type(processor) is not _Processor:
        yield not_own(processor, "video processor", host)
    elif any(path.rpartition(".")[2] in vars(processor) for path in READ):
        yield "a method of the video processor was replaced, and is left in place"
    sources = functions(video_processor, *_OF_VIDEO) | functions(image_processor, *_OF_IMAGES)
    yield from why_not_read(host, READ, sources)
