"""Pixels to channels, after the convolution of a downsampler of LTX-2's video encoder, and the downsampler's residual.

    x   = y + bias                  y: the output of a convolution without its bias
    out = pixels_apart(x) + mean over `group` neighbouring channels of pixels_apart(residual)

Volumes are [B, C, D, H, W] in channels_last_3d. Exact versus diffusers 0.37-0.42.1, `autoencoder_kl_ltx2.py`:

    downsample    after the convolution of an `LTX2VideoDownsampler3d`

Roundings, in order, all to bf16:    r1  y + bias    r2  the mean, formed in fp32    r3  ... + the mean

ATen adds up a mean's channels on CUDA in four accumulators by turns, each beginning with 0, and those one by one: of up
to four channels in their order, of eight as (((a + e) + (b + f)) + (c + g)) + (d + h). A sum of negative zeros is 0.
NaN, infinities and subnormals are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bitfuse.core.kernel import kernel, power_of_2
from bitfuse.core.launch import Plan, named
from bitfuse.core.numerics import round_to
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.reduction import vector_places
from bitfuse.core.volumes import WARPS, biased, channels_last, elements, laid, steps, why_not_volumes

if TYPE_CHECKING:
    import triton.language as tl

# -- the reference -----------------------------------------------------------------------------------------------------


def pixels_apart(x: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Pixels to channels: [B, C, D * frames, H * height, W * width] -> [B, C * frames * height * width, D, H, W]."""
    x = x.unflatten(4, (-1, width)).unflatten(3, (-1, height)).unflatten(2, (-1, frames))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def downsample(y: Tensor, residual: Tensor, bias: Tensor | None, frames: int, height: int, width: int) -> Tensor:
    """Pixels to channels, and the downsampler's residual: after the convolution of a downsampler.

    y           [B, C, D * frames, H * height, W * width] in channels_last_3d
    residual    the volume that was convolved, with C * G channels side by side, where G is 1, 2, 4 or 8; its other
                strides may be any
    bias        [C]; None: y has it already
    frames, height, width    how many pixels become one in each direction, together a power of two

    Returns [B, C * frames * height * width, D, H, W] in channels_last_3d. To each of its channels the mean of G
    channels that the pixels of the residual give, neighbours, is added.
    """
    x = pixels_apart(biased(y, bias), frames, height, width)  # r1
    return laid(x + mean_of(y, residual, frames, height, width))  # r3


def mean_of(y: Tensor, residual: Tensor, frames: int, height: int, width: int) -> Tensor:
    more = pixels_apart(residual.contiguous(), frames, height, width)
    return more.unflatten(1, (-1, residual.shape[1] // y.shape[1])).mean(dim=2)  # r2


# -- the kernel --------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("pixels", "frames", "height", "width"))
def _downsample_kernel(
    y_ptr, residual_ptr, bias_ptr, given_ptr, out_ptr, pixels, frames, height, width, channels,
    residual_batch: tl.int64, residual_frame: tl.int64, residual_row: tl.int64, residual_pixel: tl.int64,
    GROUP: tl.constexpr, DOWN_FRAMES: tl.constexpr, DOWN_HEIGHT: tl.constexpr, DOWN_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program takes what CHANNELS channels of y become in PIXELS pixels: one kernel for every width.

    pixels, frames, height, width    of out; channels: of y
    given_ptr    the mean, as the result lies; None: it is computed here
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    PARTS: tl.constexpr = DOWN_FRAMES * DOWN_HEIGHT * DOWN_WIDTH
    # a row for each pixel of y
    row = tl.arange(0, PIXELS * PARTS)
    pixel, part = tl.program_id(0) * PIXELS + row // PARTS, row % PARTS
    w, rest = pixel % width * DOWN_WIDTH + part % DOWN_WIDTH, pixel // width
    h, rest = rest % height * DOWN_HEIGHT + part // DOWN_WIDTH % DOWN_HEIGHT, rest // height
    d, batch = rest % frames * DOWN_FRAMES + part // (DOWN_WIDTH * DOWN_HEIGHT), (rest // frames).to(tl.int64)
    inside = (pixel < pixels)[:, None]
    at = ((batch * (frames * DOWN_FRAMES) + d) * (height * DOWN_HEIGHT) + h) * (width * DOWN_WIDTH) + w
    residual_at = batch * residual_batch + d.to(tl.int64) * residual_frame
    residual_at += h.to(tl.int64) * residual_row + w.to(tl.int64) * residual_pixel
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    here = inside & (channel < channels)
    x = tl.load(y_ptr + at[:, None] * channels + channel, mask=here, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x = round_to(x + tl.load(bias_ptr + channel, mask=here, other=0.0).to(tl.float32), dtype)  # r1
    # a row for each pixel of out, in which the pixels of a channel stand side by side
    WIDE: tl.constexpr = CHANNELS * PARTS
    x = tl.reshape(tl.trans(tl.reshape(x.to(dtype), (PIXELS, PARTS, CHANNELS)), (0, 2, 1)), (PIXELS, WIDE))
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)[:, None]
    wide = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
    out_at, there = pixel.to(tl.int64) * (channels * PARTS) + wide, (pixel < pixels) & (wide < channels * PARTS)
    if given_ptr is not None:
        mean = tl.load(given_ptr + out_at, mask=there, other=0.0).to(tl.float32)
    else:
        lane = tl.program_id(1) * (CHANNELS * GROUP) + tl.arange(0, CHANNELS * GROUP)[None, :]
        of_residual = inside & (lane < channels * GROUP)
        more = tl.load(residual_ptr + residual_at[:, None] + lane, mask=of_residual, other=0.0)
        more = tl.trans(tl.reshape(more, (PIXELS, PARTS, CHANNELS * GROUP)), (0, 2, 1))
        more = tl.reshape(more, (PIXELS, WIDE * GROUP))
        if GROUP == 1:
            total = more.to(tl.float32)
        elif GROUP == 2:
            total = sum_of_neighbours(more, PIXELS, WIDE)
        elif GROUP == 4:
            first, second, third, fourth = vector_places(more.to(tl.float32), PIXELS, WIDE)
            total = ((first + second) + third) + fourth
        else:
            first, second, third, fourth = vector_places(
                sum_of_neighbours(tl.reshape(tl.trans(tl.reshape(more, (PIXELS * WIDE, 2, 4)), (0, 2, 1)),
                                             (PIXELS, WIDE * 8)), PIXELS, WIDE * 4), PIXELS, WIDE)  # fmt: skip
            total = ((first + second) + third) + fourth
        # ATen begins with 0, and 0 + -0 is 0; Triton 3.6 drops an addition to zeros
        total = tl.where(total == 0.0, 0.0, total)
        mean = round_to(total * (1.0 / GROUP), dtype)  # r2
    x = x.to(tl.float32) + mean  # r3
    tl.store(out_ptr + out_at, x.to(dtype), mask=there)


@kernel
def sum_of_neighbours(values, ROWS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS, LANES * 2] -> [ROWS, LANES] in fp32."""
    first, second = tl.split(tl.reshape(values, (ROWS, LANES, 2)))
    return first.to(tl.float32) + second.to(tl.float32)


# -- the launch --------------------------------------------------------------------------------------------------------

_CHANNELS = 64  # of y that a program takes at most
_GROUPS = (1, 2, 4, 8)


def _plan(
    y: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    frames: int,
    height: int,
    width: int,
    given_mean: bool = False,
) -> Plan:
    batch, channels, *sides = y.shape
    parts, group = frames * height * width, residual.shape[1] // channels
    sides = [side // down for side, down in zip(sides, (frames, height, width), strict=True)]
    channels_at_once = min(_CHANNELS, power_of_2(channels))
    per_program = max(1, 8 * elements() // (channels_at_once * parts * group))
    pixels = batch * sides[0] * sides[1] * sides[2]
    return Plan(
        _downsample_kernel,
        (-(-pixels // per_program), -(-channels // channels_at_once), 1),
        (pixels, *sides, channels, *steps(residual)),
        {
            **{"GROUP": group, "DOWN_FRAMES": frames, "DOWN_HEIGHT": height, "DOWN_WIDTH": width},
            **{"CHANNELS": channels_at_once, "PIXELS": per_program},
        },
        WARPS,
        (channels_last((batch, channels * parts, *sides), y.dtype),),
        before=_mean if given_mean else None,
        extras=(y.dtype,) if given_mean else (),
        slots=("y_ptr", "residual_ptr", "bias_ptr", *(("given_ptr",) if given_mean else ()), "out_ptr"),
        apart=(channels,),
    )


def _mean(y: Tensor, residual: Tensor, bias: Tensor | None, *down: int) -> tuple[Tensor]:
    return (laid(mean_of(y, residual, *down)),)


# -- why a call can't be fused -----------------------------------------------------------------------------------------


def _misfits(given: dict[str, Any]) -> Iterator[str]:
    y, residual, bias = given["y"], given["residual"], given["bias"]
    parts = 1
    for name, side in zip(("frames", "height", "width"), y.shape[2:], strict=True):
        if given[name] < 1 or side % given[name]:
            yield f"{name} is {given[name]}; accepted: a divisor of {side}"
            return
        parts *= given[name]
    if parts & (parts - 1):
        yield f"frames * height * width is {parts}; accepted: a power of two"
    if bias is not None and list(bias.shape) != [y.shape[1]]:
        yield f"bias is {list(bias.shape)}; accepted: [{y.shape[1]}]"
    like = residual.ndim == 5 and (residual.shape[0], *residual.shape[2:]) == (y.shape[0], *y.shape[2:])
    if not like or residual.shape[1] not in [group * y.shape[1] for group in _GROUPS]:
        yield f"residual is {list(residual.shape)}; accepted: {list(y.shape)}, or with 2, 4 or 8 times as many channels"


def _why_not(*args: Any) -> Iterator[str]:
    yield from why_not_volumes(downsample, named(downsample, args), _misfits)


# -- the operator ------------------------------------------------------------------------------------------------------

# Where the mean of the single pass is not ATen's (a CPU), ATen computes it.
DOWNSAMPLE = Operator(
    downsample,
    "diffusers 0.37-0.42.1: LTX2VideoDownsampler3d, after its convolution",
    why_not=_why_not,
    tiers=(Tier("single pass", _plan), Tier("ATen's mean", partial(_plan, given_mean=True))),
)
