"""What a diffusers pipeline does with a decoded video (0.37 to 0.42.1): its frames, brought to the CPU.

`VideoProcessor.postprocess_video` copies the video into memory that is not pinned, widens it to fp32 and copies that
once more, with NumPy on one core: 1.7 of the 13.6 s of a two-stage run (121 frames of 1536x1024, H200, 2026-11-29).
Ours copies a part of the video at a time into pinned memory; from there all cores widen it to fp32, right into the
array that is returned. No value is computed in another way: `_denormalize_conditionally` is the host's own, widening to
fp32 is exact, and the bytes of a PIL image are the same products, rounded to even by the same IEEE operations, on the
GPU.

Every call compares the last frame of each sample with the one that the host's own method makes.
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
from bitfuse.core.conditions import FLOATS, around, described
from bitfuse.hosts.handle import Handle
from bitfuse.hosts.part import Model, Part
from bitfuse.hosts.site import Site
from bitfuse.hosts.sources import entries, functions, not_own, why_not_read
from bitfuse.run.audit import BitfuseWarning
from bitfuse.run.swap import Forward

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

# The functions that ours calls in another way, or not at all.
LEFT_OUT = [*entries(video_processor, *_OF_VIDEO), *entries(image_processor, *_OF_IMAGES)]

_ON_CPU = ("np", "pil")
"""The output types for which frames are brought to the CPU."""
_STAGED = 64 << 20
"""Bytes of each of two pinned buffers: from one of them frames are widened while the GPU fills the other."""


class NoPinnedMemory(RuntimeError):
    """CUDA could not allocate a pinned buffer: there is a limit to such memory in a container or in WSL, say."""


class PostprocessVideo(Part):
    """In place of `VideoProcessor.postprocess_video`."""

    __slots__ = ("_differed",)
    kind = "frames"
    method = "postprocess_video"

    def __init__(self, processor: Any, model: Model, site: Site):
        super().__init__(processor, model, (site,))
        self._differed: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            given = self.__signature__.bind(*args, **kwargs).arguments
        except TypeError:
            return self.stock(*args, **kwargs)  # which raises it in its own words
        if given.get("output_type", "np") not in _ON_CPU:
            return self.stock(*args, **kwargs)
        (site,) = self.sites
        timer, video = site.timer, given["video"]
        start = timer.start(video) if timer is not None and isinstance(video, Tensor) else None
        found = super().__call__(*args, **kwargs)
        if timer is not None and start is not None:
            timer.stop(site.name, video, start)
        return found

    def why_stock(self, processor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        reason = self._differed or next(_why_not_as_read(processor, self.model.handle.host), None)
        return reason or next(_why_not(processor, *args, **kwargs), None)

    def fused(self, processor: Any, video: Tensor, output_type: str = "np") -> Any:
        """NumPy array [B, F, H, W, C] of fp32, or for each sample a list of PIL images.

        video          [B, 3, F, H, W], contiguous, bf16, fp16 or fp32
        output_type    "np" or "pil"
        """
        batch, channels, frames, height, width = video.shape
        if output_type == "np":  # NumPy's stack keeps the order in memory, [B, C, F, H, W], and so does empty_like
            out = np.empty_like(np.empty(video.shape, np.float32).transpose(0, 2, 3, 4, 1))
            planes = out.transpose(0, 4, 1, 2, 3)
        else:
            out = np.empty((batch, frames, height, width, channels), np.uint8)
        try:
            for number, sample in enumerate(video):
                image = processor._denormalize_conditionally(sample.permute(1, 0, 2, 3))
                if output_type == "np":
                    _bring(image.permute(1, 0, 2, 3).flatten(0, 1), torch.from_numpy(planes[number]).flatten(0, 1))
                elif image.sum().isnan():  # what NumPy makes of NaN is its own affair
                    return self._stock_because("the video has a NaN, of which no byte can be made", video, output_type)
                else:
                    _bring(image, torch.from_numpy(out[number]), _bytes)
                del image  # before the next one is made: diffusers' own holds one at a time
        except NoPinnedMemory as error:
            return self._stock_because(str(error), video, output_type)
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


def _why_not(processor: Any, /, video: Any, output_type: Any = "np", **more: Any) -> Iterator[str]:
    """Why diffusers' own must make these frames, in sentences."""
    if more:
        yield f"{', '.join(sorted(more))} is given; accepted: video and output_type"
    if type(video) is not Tensor:
        yield f"video is {described(video)}, not a plain tensor"
        return
    if video.ndim != 5 or video.dtype not in FLOATS:
        accepted = "[B, 3, F, H, W] of torch.bfloat16, torch.float16 or torch.float32"
        yield f"video is {video.dtype} {list(video.shape)}; accepted: {accepted}"
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
    """Copy an image on any device to the CPU, a part of its first dimension at a time.

    image    [N, ...]
    into     [N, ...] on the CPU, of the shape of what is made of the image, and of any dtype
    make     what is made of each part on the image's device, a new tensor or not, before it is copied

    Raises NoPinnedMemory, of which nothing in `into` is to be used.
    """
    at_once = max(1, _STAGED // (image[0].numel() * image.element_size()))
    parts = zip(image.split(at_once), into.split(at_once), strict=True)
    if not image.is_cuda:
        for part, there in parts:
            there.copy_(make(part))
        return
    with torch.cuda.device(image.device):  # its current stream is the one on which the image was made
        buffers: list[Tensor] = []
        arrived = torch.cuda.Event(), torch.cuda.Event()
        waiting: tuple[int, Tensor] | None = None  # the buffer that is filled last, and where that belongs
        for number, (part, there) in enumerate(parts):
            made, which = make(part), number % 2
            if len(buffers) < 2:  # the first part is the largest; of a second one that is smaller there is no third
                buffers.append(_pinned(made))
            buffers[which][: len(made)].copy_(made, non_blocking=True)
            arrived[which].record()
            if waiting is not None:
                _arrive(arrived, buffers, *waiting)
            waiting = which, there
        if waiting is not None:
            _arrive(arrived, buffers, *waiting)


def _pinned(like: Tensor) -> Tensor:
    try:  # "cpu": torch.set_default_device("cuda") would have it on the GPU
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:
        size = like.numel() * like.element_size() / 2**20
        what = str(error).partition("\n")[0]
        raise NoPinnedMemory(f"{size:.0f} MiB of pinned memory could not be allocated: {what}") from error


def _arrive(arrived: Sequence[torch.cuda.Event], buffers: list[Tensor], which: int, there: Tensor) -> None:
    """Wait until a buffer is filled, and copy what is in it to where it belongs."""
    arrived[which].synchronize()
    there.copy_(buffers[which][: len(there)])


def _bytes(image: Tensor) -> Tensor:
    """[F, C, H, W] of 0 to 1 as [F, H, W, C] of 255ths: NumPy's (fp32 * 255).round().astype("uint8").

    An image of fp32 is overwritten, which is nobody else's: less memory than diffusers' own needs.
    """
    return image.float().mul_(255).round_().permute(0, 2, 3, 1).to(torch.uint8, memory_format=torch.contiguous_format)


def accelerate(processor: Any, handle: Handle, host: str) -> Site:
    """Give a pipeline's `video_processor` the method above; its site, which is not in the handle yet."""
    there = vars(processor).get(PostprocessVideo.method)
    if isinstance(there, PostprocessVideo) and there.model.handle is handle:  # an interrupt came right after it
        return there.sites[0]
    site = Site("video_processor", PostprocessVideo.method, next(_why_left_alone(processor, host), None))
    if site.declined is None:
        shared = Model(handle, {PostprocessVideo.kind: LEFT_OUT})
        handle.put(processor, PostprocessVideo(processor, shared, site))
    return site


def _why_left_alone(processor: Any, host: str) -> Iterator[str]:
    yield from _why_not_as_read(processor, host)
    there = vars(processor).get(PostprocessVideo.method)
    if isinstance(there, Forward):
        if not there.ended:  # else somebody has kept ours and put it back after its restore: it runs the class's own
            yield "the video processor is accelerated already, with another pipeline"
    elif there is not None:
        yield _replaced(PostprocessVideo.method)
    sources = functions(video_processor, *_OF_VIDEO) | functions(image_processor, *_OF_IMAGES)
    yield from why_not_read(host, READ, sources)


def _why_not_as_read(processor: Any, host: str) -> Iterator[str]:
    """Why what a processor would call is not what was read, but for functions replaced in its classes (`Model`)."""
    if type(processor) is not _Processor:
        yield not_own(processor, "video processor", host)
    for path in _OF_IMAGES:
        if (name := path.rpartition(".")[2]) in vars(processor):
            yield _replaced(name)


def _replaced(name: str) -> str:
    return f"the video processor's {name} was replaced, and is left in place"
