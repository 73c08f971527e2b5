"""What stands between two convolutions of LTX-2's video decoder, in one pass: from one's output to the other's input.

    x   = y + bias + noise + residual     y: the output of a convolution without its bias; each summand optional
    n   = x / sqrt(mean over channels of x^2 + eps), then * (1 + scale) + shift where there is one, then SiLU
    out = n, its first and last frame repeated in front and behind, and its edges mirrored by one pixel

A volume is [B, C, D, H, W] in channels_last_3d: the channels of a pixel lie side by side, as cuDNN's kernels take them.
The host's own volumes lie the other way round, with the pixels of a channel side by side, and the order of the
additions in its mean follows from that (`bitfuse.core.volume_mean`); what is computed is the host's, and only where
the results lie is ours. Exact versus diffusers 0.37-0.42.1, `autoencoder_kl_ltx2.py`:

    pixel_norm_silu_pad             between the two convolutions of a resnet, and before the first and the last one
    residual_pixel_norm_silu_pad    from a resnet to the next: the sum is handed on, too
    residual_pad                    from a resnet to an upsampler, which has no norm
    upsample                        after the convolution of an upsampler: channels to pixels, then its residual
    unpatchify                      after the last convolution: channels to pixels of the video

Roundings, in order, all to bf16:
    r1  y + bias      r2  noise * its scale     r3  ... + noise      r4  ... + residual
    r5  x^2           r6  the mean, formed in fp32      r7  + eps    r8  square root     r9  x / root
    r10 1 + scale     r11 n * (1 + scale)       r12  + shift         r13 SiLU, formed in fp32

NaN and infinities spread over the channels of their pixel where it is normed, as in the chain; signed zeros and
subnormals are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.conditions import fitting, plain, runnable
from bitfuse.core.kernel import interpreting, kernel, power_of_2
from bitfuse.core.launch import Out, Plan, named, strides
from bitfuse.core.numerics import added_number, divide, round_to, silu, square_root
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.reduction import vector_places
from bitfuse.core.volume_mean import Order, factor, fold_blocks, order_of

if TYPE_CHECKING:
    import triton.language as tl

CHANNELS_LAST = torch.channels_last_3d
_WIDEST = 1 << 15  # channels

# -- the references' steps ---------------------------------------------------------------------------------------------


def convolved(y: Tensor, bias: Tensor | None, noise: Tensor | None, noise_scale: Tensor | None) -> Tensor:
    """What the host has after a convolution, in its own layout."""
    y = y.contiguous()
    if bias is not None:
        y = y + bias.view(1, -1, 1, 1, 1)  # r1
    if noise is not None and noise_scale is not None:
        y = y + (noise * noise_scale)[None, :, None, ...]  # r2, r3
    return y


def mean_square(x: Tensor) -> Tensor:
    return torch.mean(x**2, dim=1, keepdim=True)  # r5, r6


def normed(x: Tensor, mean: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    n = x / torch.sqrt(mean + eps)  # r7, r8, r9
    if scale is not None and shift is not None:
        n = n * (1 + scale) + shift  # r10, r11, r12
    return F.silu(n)  # r13


def pixels_of(x: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Channels to pixels: [B, C * frames * height * width, D, H, W] -> [B, C, D * frames, H * height, W * width]."""
    x = x.unflatten(1, (-1, frames, height, width))
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def padded(x: Tensor, front: int, back: int, edge: int) -> Tensor:
    first, last = x[:, :, :1].repeat(1, 1, front, 1, 1), x[:, :, -1:].repeat(1, 1, back, 1, 1)
    x = torch.cat([first, x, last], dim=2)
    return F.pad(x, (edge, edge, edge, edge, 0, 0), mode="reflect") if edge else x


def laid(x: Tensor) -> Tensor:
    """x, dense in channels_last_3d. Not by that name: inside of vmap PyTorch knows no layout but the contiguous one."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


# -- references --------------------------------------------------------------------------------------------------------


def pixel_norm_silu_pad(
    y: Tensor,
    bias: Tensor | None = None,
    noise: Tensor | None = None,
    noise_scale: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    front: int = 0,
    back: int = 0,
    edge: int = 0,
    eps: float = 1e-8,
) -> Tensor:
    """The norm over channels of what a convolution gave, SiLU, and the padding of the next convolution.

    y               [B, C, D, H, W] in channels_last_3d, bf16
    bias            [C], of the convolution; None: y has it already
    noise           [1, H, W] with noise_scale [C, 1, 1]: noise that the decoder injects; None: none
    scale, shift    [B or 1, C, 1, 1, 1], channels next to each other or not; both or neither
    front, back     how often the first and the last frame are repeated
    edge            by how many pixels height and width are mirrored at each end: 0 or 1

    Returns [B, C, front + D + back, H + 2 * edge, W + 2 * edge] in channels_last_3d.
    """
    x = convolved(y, bias, noise, noise_scale)
    return laid(padded(normed(x, mean_square(x), scale, shift, eps), front, back, edge))


def residual_pixel_norm_silu_pad(
    y: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    noise: Tensor | None = None,
    noise_scale: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    front: int = 0,
    back: int = 0,
    edge: int = 0,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """(x, its norm, SiLU and padding): from the end of one resnet to the first convolution of the next.

    residual    the shape of y, its channels next to each other; the other strides may be any
    Other arguments as in `pixel_norm_silu_pad`. Both results are in channels_last_3d.
    """
    x = convolved(y, bias, noise, noise_scale) + residual.contiguous()  # r4
    return laid(x), laid(padded(normed(x, mean_square(x), scale, shift, eps), front, back, edge))


def residual_pad(
    y: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    noise: Tensor | None = None,
    noise_scale: Tensor | None = None,
    front: int = 0,
    back: int = 0,
    edge: int = 0,
) -> Tensor:
    """x, padded: from the end of a resnet to the convolution of an upsampler. Arguments as in the operators above."""
    return laid(padded(convolved(y, bias, noise, noise_scale) + residual.contiguous(), front, back, edge))  # r4


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
    x = pixels_of(convolved(y, bias, None, None), frames, height, width)[:, :, frames - 1 :]
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
    x = convolved(y, bias, None, None)
    x = x.unflatten(1, (-1, frames, patch, patch))
    return x.permute(0, 1, 5, 2, 6, 4, 7, 3).flatten(6, 7).flatten(4, 5).flatten(2, 3)


# -- the kernels -------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("pixels", "frames", "height", "width"))
def _pixel_kernel(
    y_ptr, residual_ptr, bias_ptr, noise_ptr, noise_scale_ptr, scale_ptr, shift_ptr,
    given_ptr, mean_ptr, sum_ptr, out_ptr,
    pixels, frames, height, width, eps, factor,
    residual_batch: tl.int64, residual_frame: tl.int64, residual_row: tl.int64, residual_pixel: tl.int64,
    scale_batch: tl.int64, scale_channel: tl.int64, shift_batch: tl.int64, shift_channel: tl.int64,
    C: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr,
    EDGE: tl.constexpr, NORM: tl.constexpr, HEIGHT: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr,
    HALVES: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """A program takes PIXELS pixels of the padded output. The pixels that a padding repeats are computed again.

    It reads CHANNELS of their channels at a time, and either keeps them in registers (KEPT) until their mean is known,
    or reads them again, from the cache.

    pixels, frames, height, width    of the padded output in all; of x, which is not padded
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    padded_width, padded_height, padded_frames = width + 2 * EDGE, height + 2 * EDGE, frames + FRONT + BACK
    column, rest = pixel % padded_width - EDGE, pixel // padded_width
    row, rest = rest % padded_height - EDGE, rest // padded_height
    frame, batch = rest % padded_frames - FRONT, (rest // padded_frames).to(tl.int64)

    # which pixel of x it is: the frame repeated, the edge mirrored
    d = tl.minimum(tl.maximum(frame, 0), frames - 1)
    h = height - 1 - tl.abs(height - 1 - tl.abs(row))
    w = width - 1 - tl.abs(width - 1 - tl.abs(column))
    own = inside & (d == frame) & (h == row) & (w == column)
    number = ((batch * frames + d) * height + h) * width + w
    residual_at = (batch * residual_batch + d.to(tl.int64) * residual_frame)[:, None]
    residual_at += (h.to(tl.int64) * residual_row + w.to(tl.int64) * residual_pixel)[:, None]
    x_at, noise_at, out_at = number[:, None] * C, (h * width + w)[:, None], pixel.to(tl.int64)[:, None] * C
    scale_at, shift_at = batch[:, None] * scale_batch, batch[:, None] * shift_batch
    lane, here = tl.arange(0, CHANNELS)[None, :], inside[:, None]

    scaled_by = 1.0
    kept = ()
    if NORM:
        if given_ptr is not None:
            mean = tl.load(given_ptr + number, mask=inside, other=0.0).to(tl.float32)
        else:
            # of each of ATen's threads one channel for each of its four accumulators
            THREADS: tl.constexpr = HEIGHT * BLOCKS
            slot, used = lane, here
            if THREADS != SLOTS:
                slot, used = lane // SLOTS * THREADS + lane % SLOTS, here & (lane % SLOTS < THREADS)
            total = tl.zeros((PIXELS,), tl.float32)
            for half in tl.static_range(HALVES):
                sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
                if KEPT:
                    for first in tl.static_range(0, C // HALVES, 4 * THREADS):
                        x = load_x(
                            y_ptr, residual_ptr, bias_ptr, noise_ptr, noise_scale_ptr, x_at, residual_at, noise_at,
                            half * (C // HALVES) + first + lane, here, dtype,
                        )  # fmt: skip
                        kept = kept + (x.to(dtype),)  # type: ignore[assignment]  # noqa: RUF005
                        sums += round_to(x * x, dtype)  # r5
                else:
                    for first in tl.range(0, C // HALVES, 4 * THREADS, loop_unroll_factor=4):
                        x = load_x(
                            y_ptr, residual_ptr, bias_ptr, noise_ptr, noise_scale_ptr, x_at, residual_at, noise_at,
                            half * (C // HALVES) + first + slot, used & (first + slot < C // HALVES), dtype,
                        )  # fmt: skip
                        sums += round_to(x * x, dtype)  # r5
                by_turns = tl.reshape(tl.trans(tl.reshape(sums, (PIXELS, 4, SLOTS)), (0, 2, 1)), (PIXELS, SLOTS * 4))
                sum0, sum1, sum2, sum3 = vector_places(by_turns, PIXELS, SLOTS)
                total += fold_blocks(((sum0 + sum1) + sum2) + sum3, PIXELS, SLOTS, HEIGHT, BLOCKS)
            mean = total * factor
            tl.store(mean_ptr + number, mean, mask=own)
            mean = round_to(mean, dtype)  # r6
        root = round_to(square_root(round_to(mean + eps, dtype)), dtype)  # r7, r8
        # Rounded to bf16, x * (1 / root) is x / root for every bf16 x and every root that there is (0, or 2^-67 and
        # more, as the least square is 2^-133): all 8 * 10^8 pairs were compared. A division takes 100 of 700 us.
        scaled_by = divide(1.0, root)[:, None]
    if KEPT:
        for i in tl.static_range(C // CHANNELS):
            store_x(
                kept[i].to(tl.float32), scaled_by, scale_ptr, shift_ptr, sum_ptr, out_ptr,
                scale_at, shift_at, x_at, out_at, scale_channel, shift_channel, i * CHANNELS + lane, here,
                own[:, None], NORM, dtype,
            )  # fmt: skip
    else:
        for first in tl.range(0, C, CHANNELS, loop_unroll_factor=4):
            channel = first + lane
            there = here & (channel < C)
            x = load_x(
                y_ptr, residual_ptr, bias_ptr, noise_ptr, noise_scale_ptr, x_at, residual_at, noise_at, channel, there,
                dtype,
            )  # fmt: skip
            store_x(
                x, scaled_by, scale_ptr, shift_ptr, sum_ptr, out_ptr, scale_at, shift_at, x_at, out_at,
                scale_channel, shift_channel, channel, there, own[:, None], NORM, dtype,
            )  # fmt: skip


@kernel
def load_x(
    y_ptr, residual_ptr, bias_ptr, noise_ptr, noise_scale_ptr, x_at, residual_at, noise_at, channel, here,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """x at these channels in fp32: y and its summands, rounded after every op."""
    x = tl.load(y_ptr + x_at + channel, mask=here, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x = round_to(x + tl.load(bias_ptr + channel, mask=here, other=0.0).to(tl.float32), DTYPE)  # r1
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + noise_at).to(tl.float32)  # of any pixel, whether it is there or not
        noise_scale = tl.load(noise_scale_ptr + channel, mask=here, other=0.0).to(tl.float32)
        noise = round_to(noise * noise_scale, DTYPE)  # r2
        x = round_to(x + noise, DTYPE)  # r3
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + residual_at + channel, mask=here, other=0.0).to(tl.float32)
        x = round_to(x + residual, DTYPE)  # r4
    return x


@kernel
def store_x(
    x, scaled_by, scale_ptr, shift_ptr, sum_ptr, out_ptr, scale_at, shift_at, x_at, out_at,
    scale_channel, shift_channel, channel, here, own, NORM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Write x where it is wanted, and what becomes of it."""
    if sum_ptr is not None:
        tl.store(sum_ptr + x_at + channel, x.to(DTYPE), mask=here & own)
    if NORM:
        x = round_to(x * scaled_by, DTYPE)  # r9
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + scale_at + channel * scale_channel, mask=here, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + shift_at + channel * shift_channel, mask=here, other=0.0).to(tl.float32)
            x = round_to(x * round_to(1.0 + scale, DTYPE), DTYPE)  # r10, r11
            x = round_to(x + shift, DTYPE)  # r12
        x = silu(x)  # r13
    tl.store(out_ptr + out_at + channel, x.to(DTYPE), mask=here)


@kernel(do_not_specialize=("pixels", "frames", "height", "width"))
def _upsample_kernel(
    y_ptr, residual_ptr, bias_ptr, out_ptr, pixels, frames, height, width,
    residual_batch: tl.int64, residual_frame: tl.int64, residual_row: tl.int64, residual_pixel: tl.int64,
    C: tl.constexpr, RESIDUAL: tl.constexpr, UP_FRAMES: tl.constexpr, UP_HEIGHT: tl.constexpr, UP_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program takes CHANNELS channels of what PIXELS pixels of y become. frames, height, width: of y."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    PARTS: tl.constexpr = UP_FRAMES * UP_HEIGHT * UP_WIDTH
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    w, rest = pixel % width, pixel // width
    h, rest = rest % height, rest // height
    d, batch = rest % frames, (rest // frames).to(tl.int64)
    lane = tl.program_id(1) * (CHANNELS * PARTS) + tl.arange(0, CHANNELS * PARTS)[None, :]
    here = (pixel < pixels)[:, None] & (lane < C * PARTS)
    x = tl.load(y_ptr + pixel.to(tl.int64)[:, None] * (C * PARTS) + lane, mask=here, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x = round_to(x + tl.load(bias_ptr + lane, mask=here, other=0.0).to(tl.float32), dtype)  # r1
    if residual_ptr is not None:
        residual_at = (batch * residual_batch + d.to(tl.int64) * residual_frame)[:, None]
        residual_at += (h.to(tl.int64) * residual_row + w.to(tl.int64) * residual_pixel)[:, None]
        if RESIDUAL % CHANNELS == 0:
            first = tl.program_id(1) * (CHANNELS * PARTS) % (RESIDUAL * PARTS)
            again = tl.multiple_of(first, CHANNELS * PARTS) + tl.arange(0, CHANNELS * PARTS)[None, :]
        else:
            again = lane % (RESIDUAL * PARTS)
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
    there = ((pixel < pixels) & (d >= 0))[:, None] & (channel < C)
    tl.store(out_ptr + at[:, None] * C + channel, x, mask=there)


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

_WARPS = 4
_MOST_KEPT = 16  # pieces of CHANNELS in registers: with 32 a kernel takes 15 s to compile, and registers run out
_UPSAMPLED_CHANNELS = 64
# That a program reads at once, 8 bytes for each thread: with 16 the norms took 5 to 50 % longer, as fewer programs fit
# on a multiprocessor (128, 256 and 512 channels, H200, 2026-11-29).
_ELEMENTS = 512
# The interpreter is fastest with few, large programs.
_INTERPRETED_ELEMENTS = 1 << 14


def _elements() -> int:
    return _INTERPRETED_ELEMENTS if interpreting() else _ELEMENTS


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Out:
    """The form of a dense volume of this shape in channels_last_3d."""
    _, channels, frames, height, width = shape
    pixel, row, frame = channels, channels * width, channels * width * height
    return Out(tuple(shape), (frame * frames, 1, frame, row, pixel), dtype)


def _plan(*args: Any, reference: Callable[..., Any], given_mean: bool = False) -> Plan | str:
    given = named(reference, args)
    y, residual, norm = given["y"], given.get("residual"), "eps" in given
    batch, channels, frames, height, width = y.shape
    front, back, edge = given["front"], given["back"], given["edge"]
    order = Order(1, 1, 1)
    if norm and not given_mean:
        found = order_of(tuple(y.shape), y.element_size(), y.device)
        if found is None:
            return "ATen adds up the channels of this volume in an order that is not reproduced here"
        order = found
    eps = added_number(y.device, y.dtype, given["eps"]) if norm else 0.0
    if eps is None:
        return "PyTorch adds a number here neither as fp32 nor rounded to bf16"
    threads = order.height * order.blocks
    slots = power_of_2(threads)
    channels_at_once = 4 * slots if norm and not given_mean else min(128, power_of_2(channels))
    whole = threads == slots and channels // order.halves % channels_at_once == 0
    kept = norm and not given_mean and whole and channels // channels_at_once <= _MOST_KEPT
    per_program = max(1, (_elements() if norm else 8 * _elements()) // channels_at_once)
    shape = (batch, channels, front + frames + back, height + 2 * edge, width + 2 * edge)
    pixels = batch * shape[2] * shape[3] * shape[4]
    outputs = [channels_last(shape, y.dtype)]
    if norm and residual is not None:
        outputs.insert(0, channels_last(tuple(y.shape), y.dtype))
    more: dict[str, Any] = {}
    added: tuple[str, ...] = ()
    if norm and given_mean:
        more, added = {"before": partial(mean_of, reference=reference), "extras": (y.dtype,)}, ("given_ptr",)
    elif norm:
        witness = channels_last((batch, 1, frames, height, width), torch.float32)
        more, added = {"witnesses": (witness,), "by_shape": True}, ("mean_ptr",)
    return Plan(
        _pixel_kernel,
        (-(-pixels // per_program), 1, 1),
        (
            *(pixels, frames, height, width, eps, factor(tuple(y.shape)), *_steps(residual)),
            *(*_value_strides(given.get("scale")), *_value_strides(given.get("shift"))),
        ),
        {
            **{"C": channels, "CHANNELS": channels_at_once, "PIXELS": per_program},
            **{"FRONT": front, "BACK": back, "EDGE": edge, "NORM": norm},
            **{"HEIGHT": order.height, "BLOCKS": order.blocks, "SLOTS": slots, "HALVES": order.halves, "KEPT": kept},
        },
        _WARPS,
        tuple(outputs),
        slots=(*_pointers(given), *added, *(("sum_ptr",) if len(outputs) > 1 else ()), "out_ptr"),
        **more,
    )


def _pointers(given: dict[str, Any]) -> Iterator[str]:
    """The pointers that a call's tensors go to, of those that are given and those that may be None."""
    return (f"{name}_ptr" for name in given if name in _TENSORS)


_TENSORS = ("y", "residual", "bias", "noise", "noise_scale", "scale", "shift")


def _steps(residual: Tensor | None) -> tuple[int, ...]:
    """(batch, frame, row, pixel) strides."""
    return (0, 0, 0, 0) if residual is None else tuple(strides(residual)[dim] for dim in (0, 2, 3, 4))


def _value_strides(value: Tensor | None) -> tuple[int, int]:
    """(batch, channel) strides of a scale or shift, 0 where one row serves all samples."""
    if value is None:
        return 0, 0
    batch, channel, *_ = strides(value)
    return (0 if value.shape[0] == 1 else batch), channel


def mean_of(*args: Any, reference: Callable[..., Any]) -> tuple[Tensor]:
    """The mean squares [B, 1, D, H, W] as the host has them."""
    given = named(reference, args)
    x = convolved(given["y"], given["bias"], given["noise"], given["noise_scale"])
    return (mean_square(x if "residual" not in given else x + given["residual"].contiguous()),)


def _upsample_plan(
    y: Tensor, residual: Tensor | None, bias: Tensor | None, frames: int, height: int, width: int
) -> Plan:
    batch, channels, *sides = y.shape
    parts = frames * height * width
    channels //= parts
    channels_at_once = min(_UPSAMPLED_CHANNELS, power_of_2(channels))
    per_program = max(1, 8 * _elements() // (channels_at_once * parts))
    pixels = batch * sides[0] * sides[1] * sides[2]
    shape = (batch, channels, sides[0] * frames - (frames - 1), sides[1] * height, sides[2] * width)
    return Plan(
        _upsample_kernel,
        (-(-pixels // per_program), -(-channels // channels_at_once), 1),
        (pixels, *sides, *_steps(residual)),
        {
            **{"C": channels, "RESIDUAL": 1 if residual is None else residual.shape[1] // parts},
            **{"UP_FRAMES": frames, "UP_HEIGHT": height, "UP_WIDTH": width},
            **{"CHANNELS": channels_at_once, "PIXELS": per_program},
        },
        _WARPS,
        (channels_last(shape, y.dtype),),
    )


def _unpatchify_plan(y: Tensor, bias: Tensor | None, frames: int, patch: int) -> Plan:
    batch, channels, depth, height, width = y.shape
    colours = channels // (frames * patch * patch)
    shape = (batch, colours, depth * frames, height * patch, width * patch)
    pixels, rows = batch * depth * height * width, power_of_2(colours * frames)
    per_program = max(1, 8 * _elements() // (rows * patch * patch))
    return Plan(
        _unpatchify_kernel,
        (-(-pixels // per_program), 1, 1),
        (pixels, depth, height, width),
        {"C": colours, "ROWS": rows, "PATCH_FRAMES": frames, "PATCH": patch, "PIXELS": per_program},
        _WARPS,
        (Out(shape, torch.empty(shape, device="meta").stride(), y.dtype),),
    )


# -- why a call can't be fused -----------------------------------------------------------------------------------------


def _why_not(*args: Any, reference: Callable[..., Any]) -> Iterator[str]:
    given = named(reference, args)
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    y = given["y"]
    if reasons := list(plain(tensors)):  # of which nothing further can be asked: inside of vmap, no layout
        yield from (*reasons, *runnable(tensors))
        return
    reasons += fitting(reference, given, next(_misfits(given), None))
    reasons += runnable(tensors)
    for name, t in tensors.items():
        if t.dtype != torch.bfloat16:
            reasons.append(f"{name} is {t.dtype}; accepted: torch.bfloat16")
    if y.ndim == 5 and not y.is_contiguous(memory_format=CHANNELS_LAST):
        reasons.append(f"y is not dense in channels_last_3d: its strides are {y.stride()}")
    residual = tensors.get("residual")
    if residual is not None and residual.ndim == 5 and residual.shape[1] > 1 and residual.stride(1) != 1:
        reasons.append(f"the channels of residual are {residual.stride(1)} elements apart; accepted: side by side")
    for name in ("bias", "noise", "noise_scale"):
        if name in tensors and not tensors[name].is_contiguous():
            reasons.append(f"{name} is not contiguous: its strides are {tensors[name].stride()}")
    if y.ndim == 5:
        added = (given.get("front", 0) + given.get("back", 0), *[2 * given.get("edge", 0)] * 2)
        pixels = y.shape[0] * math.prod(side + more for side, more in zip(y.shape[2:], added, strict=True))
        reasons += [f"there are {pixels} pixels with the padding; accepted: below 2^31"] if pixels >= 2**31 else []
        reasons += [f"y has {y.shape[1]} channels; accepted: up to {_WIDEST}"] if y.shape[1] > _WIDEST else []
    yield from reasons


_FACTORS = ("frames", "height", "width", "patch")


def _misfits(given: dict[str, Any]) -> Iterator[str]:
    y = given["y"]
    if y.ndim != 5:
        yield f"y is {list(y.shape)}; accepted: [B, C, D, H, W], five dimensions"
        return
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
    batch, channels, _, height, width = y.shape
    residual = given.get("residual")
    if residual is not None and "front" not in given:
        like = residual.ndim == 5 and (residual.shape[0], *residual.shape[2:]) == (batch, *y.shape[2:])
        if not like or not residual.shape[1] or residual.shape[1] % each or channels % residual.shape[1]:
            yield f"residual is {list(residual.shape)}; accepted: y {list(y.shape)}, or with a part of its channels"
    elif residual is not None and residual.shape != y.shape:
        yield f"residual is {list(residual.shape)}; accepted: the shape of y, {list(y.shape)}"
    if "front" not in given:
        return
    for name in ("front", "back"):
        if given[name] < 0:
            yield f"{name} is {given[name]}; accepted: 0 or more"
    if given["edge"] not in (0, 1) or (given["edge"] and min(height, width) < 2):
        yield f"edge is {given['edge']}; accepted: 0, or 1 where height and width are 2 or more"
    noise, noise_scale = given["noise"], given["noise_scale"]
    if (noise is None) != (noise_scale is None):
        yield "of noise and noise_scale one is None; accepted: both or neither"
    elif noise is not None and noise_scale is not None:
        if list(noise.shape) != [1, height, width]:
            yield f"noise is {list(noise.shape)}; accepted: [1, {height}, {width}]"
        if list(noise_scale.shape) != [channels, 1, 1]:
            yield f"noise_scale is {list(noise_scale.shape)}; accepted: [{channels}, 1, 1]"
    if (given.get("scale") is None) != (given.get("shift") is None):
        yield "of scale and shift one is None; accepted: both or neither"
    for name in ("scale", "shift"):
        t = given.get(name)
        if t is not None and (t.ndim != 5 or t.shape[0] not in (1, batch) or t.shape[1:] != (channels, 1, 1, 1)):
            yield f"{name} is {list(t.shape)}; accepted: [{batch} or 1, {channels}, 1, 1, 1]"


# -- the operators -----------------------------------------------------------------------------------------------------


def _operator(reference: Callable[..., Any], source: str) -> Operator:
    """Where the mean of the single pass is not ATen's (an order that is not known, a CPU), ATen computes it."""
    tiers = [Tier("single pass", partial(_plan, reference=reference))]
    if "eps" in named(reference, ()):
        tiers.append(Tier("ATen's mean", partial(_plan, reference=reference, given_mean=True)))
    why_not = partial(_why_not, reference=reference)
    return Operator(reference, f"diffusers 0.37-0.42.1: {source}", why_not=why_not, tiers=tuple(tiers))


PIXEL_NORM_SILU_PAD = _operator(pixel_norm_silu_pad, "LTX2VideoResnetBlock3d, LTX2VideoCausalConv3d")
RESIDUAL_PIXEL_NORM_SILU_PAD = _operator(residual_pixel_norm_silu_pad, "from one LTX2VideoResnetBlock3d to the next")
RESIDUAL_PAD = _operator(residual_pad, "from LTX2VideoResnetBlock3d to LTX2VideoUpsampler3d")
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
