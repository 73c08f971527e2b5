"""Channels to pixels, after a convolution of LTX-2's video decoder: an upsampler's, and the last one.

Volumes are [B, C, D, H, W] in channels_last_3d, the video is contiguous. Exact versus diffusers 0.37-0.42.1,
`autoencoder_kl_ltx2.py`:

    upsample      after the convolution of an upsampler: channels to pixels, then its residual
    unpatchify    after the last convolution: channels to pixels of the video

Roundings, in order, all to bf16:    r1  y + bias    r4  ... + residual

NaN, infinities, signed zeros and subnormals are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitfuse.core.kernel import kernel, power_of_2
from bitfuse.core.launch import Out, Plan, named
from bitfuse.core.numerics import round_to
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.volumes import WARPS, biased, channels_last, elements, laid, steps, why_not_volumes

if TYPE_CHECKING:
    import triton.language as tl

# -- references --------------------------------------------------------------------------------------------------------


def pixels_of(x: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Channels to pixels: [B, C * frames * height * width, D, H, W] -> [B, C, D * frames, H * height, W * width]."""
    x = x.unflatten(1, (-1, frames, height, width))
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def upsample(y: Tensor, residual: Tensor | None, bias: Tensor | None, frames: int, height: int, width: int) -> Tensor:
    """Channels to pixels, and the upsampler's residual: after the convolution of an upsampler.

    y           [B, C * K, D, H, W] in channels_last_3d, where K = frames * height * width
    residual    [B, R * K, D, H, W] with R a divisor of C, its channels side by side: its pixels are added to those of
                y, again and again over the channels; None: there is none
    bias        [C * K]; None: y has it already
    frames, height, width    how many pixels a pixel becomes in each direction, together a power of two

    Returns [B, C, D * frames - (frames - 1), H * height, W * width] in channels_last_3d: the first frames - 1 frames
    are dropped.
    """
    x = pixels_of(biased(y, bias), frames, height, width)[:, :, frames - 1 :]  # r1
    if residual is None:
        return laid(x)
    more = pixels_of(residual.contiguous(), frames, height, width)
    return laid(x + more.repeat(1, x.shape[1] // more.shape[1], 1, 1, 1)[:, :, frames - 1 :])  # r4


def unpatchify(y: Tensor, bias: Tensor | None, frames: int, patch: int) -> Tensor:
    """The video from the decoder's last convolution: each pixel of y becomes `frames` patches of patch x patch pixels.

    y       [B, C * frames * patch * patch, D, H, W] in channels_last_3d
    bias    as many channels
    Returns [B, C, D * frames, H * patch, W * patch], contiguous. The first of the two patch indices of a channel is
    that of the width.
    """
    x = biased(y, bias)  # r1
    x = x.unflatten(1, (-1, frames, patch, patch))
    return x.permute(0, 1, 5, 2, 6, 4, 7, 3).flatten(6, 7).flatten(4, 5).flatten(2, 3)


# -- the kernels -------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("pixels", "frames", "height", "width"))
def _upsample_kernel(
    y_ptr, residual_ptr, bias_ptr, out_ptr, pixels, frames, height, width, channels, of_residual,
    residual_batch: tl.int64, residual_frame: tl.int64, residual_row: tl.int64, residual_pixel: tl.int64,
    WHOLE: tl.constexpr, UP_FRAMES: tl.constexpr, UP_HEIGHT: tl.constexpr, UP_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program takes CHANNELS channels of what PIXELS pixels of y become: one kernel for every width.

    frames, height, width    of y
    channels, of_residual    of the result, and of the residual once it is laid out as that
    WHOLE                    of_residual is a multiple of CHANNELS
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    PARTS: tl.constexpr = UP_FRAMES * UP_HEIGHT * UP_WIDTH
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    w, rest = pixel % width, pixel // width
    h, rest = rest % height, rest // height
    d, batch = rest % frames, (rest // frames).to(tl.int64)
    lane = tl.program_id(1) * (CHANNELS * PARTS) + tl.arange(0, CHANNELS * PARTS)[None, :]
    here = (pixel < pixels)[:, None] & (lane < channels * PARTS)
    x = tl.load(y_ptr + pixel.to(tl.int64)[:, None] * (channels * PARTS) + lane, mask=here, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x = round_to(x + tl.load(bias_ptr + lane, mask=here, other=0.0).to(tl.float32), dtype)  # r1
    if residual_ptr is not None:
        residual_at = (batch * residual_batch + d.to(tl.int64) * residual_frame)[:, None]
        residual_at += (h.to(tl.int64) * residual_row + w.to(tl.int64) * residual_pixel)[:, None]
        if WHOLE:
            first = tl.program_id(1) * (CHANNELS * PARTS) % (of_residual * PARTS)
            again = tl.multiple_of(first, CHANNELS * PARTS) + tl.arange(0, CHANNELS * PARTS)[None, :]
        else:
            again = lane % (of_residual * PARTS)
        x = x + tl.load(residual_ptr + residual_at + again, mask=here, other=0.0).to(tl.float32)  # r4
    # a row for each of the pixels
    x = tl.trans(tl.reshape(x.to(dtype), (PIXELS, CHANNELS, PARTS)), (0, 2, 1))
    x = tl.reshape(x, (PIXELS * PARTS, CHANNELS))
    row = tl.arange(0, PIXELS * PARTS)
    pixel, part = tl.program_id(0) * PIXELS + row // PARTS, row % PARTS
    w, rest = pixel % width * UP_WIDTH + part % UP_WIDTH, pixel // width
    h, rest = rest % height * UP_HEIGHT + part // UP_WIDTH % UP_HEIGHT, rest // height
    d, batch = rest % frames * UP_FRAMES + part // (UP_WIDTH * UP_HEIGHT) - (UP_FRAMES - 1), rest // frames
    at = (batch.to(tl.int64) * (frames * UP_FRAMES - (UP_FRAMES - 1)) + d) * (height * UP_HEIGHT) + h
    at = at * (width * UP_WIDTH) + w
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    there = ((pixel < pixels) & (d >= 0))[:, None] & (channel < channels)
    tl.store(out_ptr + at[:, None] * channels + channel, x, mask=there)


@kernel(do_not_specialize=("pixels", "height", "width"))
def _unpatchify_kernel(
    y_ptr, bias_ptr, out_ptr, pixels, frames, height, width,
    C: tl.constexpr, ROWS: tl.constexpr, PATCH_FRAMES: tl.constexpr, PATCH: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program takes PIXELS pixels of y with all their channels. frames, height, width: of y.

    ROWS    a power of two, C * PATCH_FRAMES or more
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    USED: tl.constexpr = C * PATCH_FRAMES
    EACH: tl.constexpr = PATCH * PATCH
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, ROWS * EACH)[None, :]
    here = (pixel < pixels)[:, None] & (channel < USED * EACH)
    x = tl.load(y_ptr + pixel.to(tl.int64)[:, None] * (USED * EACH) + channel, mask=here, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x = x + tl.load(bias_ptr + channel, mask=channel < USED * EACH, other=0.0).to(tl.float32)  # r1
    # as the video has them: the rows of a patch, in each all pixels side by side
    x = tl.trans(tl.reshape(x.to(dtype), (PIXELS, ROWS, PATCH, PATCH)), (1, 3, 0, 2))
    x = tl.reshape(x, (ROWS * PATCH, PIXELS * PATCH))
    row, column = tl.arange(0, ROWS * PATCH)[:, None], tl.arange(0, PIXELS * PATCH)[None, :]
    patch, inner = row // PATCH, row % PATCH
    pixel = tl.program_id(0) * PIXELS + column // PATCH
    w, rest = pixel % width, pixel // width
    h, rest = rest % height, rest // height
    d, batch = rest % frames, (rest // frames).to(tl.int64)
    at = (batch * C + patch // PATCH_FRAMES) * frames + d
    at = (at * PATCH_FRAMES + patch % PATCH_FRAMES) * height + h
    at = ((at * PATCH + inner) * width + w) * PATCH + column % PATCH
    tl.store(out_ptr + at, x, mask=(pixel < pixels) & (patch < USED))


# -- launches ----------------------------------------------------------------------------------------------------------

_UPSAMPLED_CHANNELS = 64


def _upsample_plan(
    y: Tensor, residual: Tensor | None, bias: Tensor | None, frames: int, height: int, width: int
) -> Plan:
    batch, channels, *sides = y.shape
    parts = frames * height * width
    channels //= parts
    channels_at_once = min(_UPSAMPLED_CHANNELS, power_of_2(channels))
    per_program = max(1, 8 * elements() // (channels_at_once * parts))
    pixels = batch * sides[0] * sides[1] * sides[2]
    shape = (batch, channels, sides[0] * frames - (frames - 1), sides[1] * height, sides[2] * width)
    of_residual = 1 if residual is None else residual.shape[1] // parts
    return Plan(
        _upsample_kernel,
        (-(-pixels // per_program), -(-channels // channels_at_once), 1),
        (pixels, *sides, channels, of_residual, *steps(residual)),
        {
            "WHOLE": of_residual % channels_at_once == 0,
            **{"UP_FRAMES": frames, "UP_HEIGHT": height, "UP_WIDTH": width},
            **{"CHANNELS": channels_at_once, "PIXELS": per_program},
        },
        WARPS,
        (channels_last(shape, y.dtype),),
        apart=(channels, of_residual),
    )


def _unpatchify_plan(y: Tensor, bias: Tensor | None, frames: int, patch: int) -> Plan:
    batch, channels, depth, height, width = y.shape
    colours = channels // (frames * patch * patch)
    shape = (batch, colours, depth * frames, height * patch, width * patch)
    pixels, rows = batch * depth * height * width, power_of_2(colours * frames)
    per_program = max(1, 8 * elements() // (rows * patch * patch))
    return Plan(
        _unpatchify_kernel,
        (-(-pixels // per_program), 1, 1),
        (pixels, depth, height, width),
        {"C": colours, "ROWS": rows, "PATCH_FRAMES": frames, "PATCH": patch, "PIXELS": per_program},
        WARPS,
        (Out(shape, torch.empty(shape, device="meta").stride(), y.dtype),),
    )


# -- why a call can't be fused -----------------------------------------------------------------------------------------

_FACTORS = ("frames", "height", "width", "patch")


def _why_not(*args: Any, reference: Any) -> Iterator[str]:
    yield from why_not_volumes(reference, named(reference, args), _misfits)


def _misfits(given: dict[str, Any]) -> Iterator[str]:
    y = given["y"]
    each = 1
    for name in _FACTORS:
        if name in given:
            if given[name] < 1:
                yield f"{name} is {given[name]}; accepted: 1 or more"
                return
            each *= given[name] ** (2 if name == "patch" else 1)
    if y.shape[1] % each:
        yield f"y has {y.shape[1]} channels; accepted: a multiple of {each}"
        return
    if each & (each - 1):
        yield f"{' * '.join(name for name in _FACTORS if name in given)} is {each}; accepted: a power of two"
    bias = given.get("bias")
    if bias is not None and list(bias.shape) != [y.shape[1]]:
        yield f"bias is {list(bias.shape)}; accepted: [{y.shape[1]}]"
    residual = given.get("residual")
    if residual is not None:
        like = residual.ndim == 5 and (residual.shape[0], *residual.shape[2:]) == (y.shape[0], *y.shape[2:])
        if not like or not residual.shape[1] or residual.shape[1] % each or y.shape[1] % residual.shape[1]:
            yield f"residual is {list(residual.shape)}; accepted: y {list(y.shape)}, or with a part of its channels"


# -- the operators -----------------------------------------------------------------------------------------------------

UPSAMPLE = Operator(
    upsample,
    "diffusers 0.37-0.42.1: LTX2VideoUpsampler3d, after its convolution",
    why_not=partial(_why_not, reference=upsample),
    tiers=(Tier("single pass", _upsample_plan),),
)
UNPATCHIFY = Operator(
    unpatchify,
    "diffusers 0.37-0.42.1: LTX2VideoDecoder3d, after its last convolution",
    why_not=partial(_why_not, reference=unpatchify),
    tiers=(Tier("single pass", _unpatchify_plan),),
)
