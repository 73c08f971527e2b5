"""What stands between two convolutions of LTX-2's video autoencoder, in one pass: from one to the next one's input.

    x   = y + bias + noise + residual     y: the output of a convolution without its bias; each summand optional
    n   = x / sqrt(mean over channels of x^2 + eps), then * (1 + scale) + shift where there is one, then SiLU
    out = n, its first and last frame repeated in front and behind, and its edges mirrored by one pixel

A volume is [B, C, D, H, W] in channels_last_3d: the channels of a pixel lie side by side, as cuDNN's kernels take them.
The host's own volumes lie the other way round, with the pixels of a channel side by side, and the order of the
additions in its mean follows from that (`bitfuse.core.volume_mean`); what is computed is the host's, and only where
the results lie is ours. Exact versus diffusers 0.37-0.42.1, `autoencoder_kl_ltx2.py`:

    pixel_norm_silu_pad             between the two convolutions of a resnet, and before the first and the last one
    residual_pixel_norm_silu_pad    from a resnet to the next: the sum is handed on, too
    residual_pad                    from a resnet to an upsampler or downsampler, which has no norm

What follows an upsampler's convolution and the decoder's last one is in `depth_to_space.py`, what follows a
downsampler's in `space_to_depth.py`.

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

from bitfuse.core.kernel import kernel, power_of_2
from bitfuse.core.launch import Out, Plan, named, strides
from bitfuse.core.numerics import added_number, divide, round_to, silu, square_root
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.reduction import vector_places
from bitfuse.core.volume_mean import Order, factor, fold_blocks, order_of
from bitfuse.core.volumes import WARPS, channels_last, elements, laid, pieces, steps, why_not_volumes

if TYPE_CHECKING:
    import triton.language as tl

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


def padded(x: Tensor, front: int, back: int, edge: int) -> Tensor:
    first, last = x[:, :, :1].repeat(1, 1, front, 1, 1), x[:, :, -1:].repeat(1, 1, back, 1, 1)
    x = torch.cat([first, x, last], dim=2)
    return F.pad(x, (edge, edge, edge, edge, 0, 0), mode="reflect") if edge else x


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
    """x, padded: from the end of a resnet to the convolution of an upsampler or downsampler. Arguments as above."""
    return laid(padded(convolved(y, bias, noise, noise_scale) + residual.contiguous(), front, back, edge))  # r4


# -- the kernels -------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("pixels", "frames", "height", "width"))
def _pixel_kernel(
    y_ptr, residual_ptr, bias_ptr, noise_ptr, noise_scale_ptr, scale_ptr, shift_ptr,
    given_ptr, mean_ptr, sum_ptr, out_ptr,
    pixels, frames, height, width, eps, factor,
    residual_batch: tl.int64, residual_frame: tl.int64, residual_row: tl.int64, residual_pixel: tl.int64,
    scale_batch: tl.int64, scale_channel: tl.int64, shift_batch: tl.int64, shift_channel: tl.int64,
    C: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr,
    EDGE: tl.constexpr, HEIGHT: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, HALVES: tl.constexpr,
    KEPT: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A program takes PIXELS pixels of the padded output. The pixels that a padding repeats are computed again.

    It reads CHANNELS of their channels at a time, a piece, and either keeps them in registers (KEPT) until their mean
    is known, or reads them again, from the cache.

    pixels, frames, height, width    of the padded output in all; of x, which is not padded
    TOGETHER                         pieces that one operation of Triton's takes, 1 or 4, where they are kept
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    batch, d, h, w, own, number = padded_from(pixel, inside, frames, height, width, FRONT, BACK, EDGE)
    mean_at, mean_own, lane = number, own, tl.arange(0, CHANNELS)[None, :]
    lanes = tl.multiple_of(tl.max_contiguous(lane, [1, 4]), [1, 4])  # 4 channels of a piece for each thread
    if TOGETHER > 1:
        # A row for each piece of each pixel, those of a pixel as far apart as the rows of a thread. So a thread has the
        # same channels of them all, adds them up by itself, and needs one root. With the pieces in a dimension of their
        # own, Triton 3.7 gave each thread one piece of four pixels: four roots, and 218 registers for 128.
        row = tl.arange(0, TOGETHER * PIXELS)
        lanes += (row // PIXELS * CHANNELS)[:, None]
        pixel = tl.program_id(0) * PIXELS + row % PIXELS
        inside = pixel < pixels
        batch, d, h, w, own, number = padded_from(pixel, inside, frames, height, width, FRONT, BACK, EDGE)
    residual_at = residual_place(batch, d, h, w, residual_batch, residual_frame, residual_row, residual_pixel)
    x_at, noise_at, out_at = number[:, None] * C, (h * width + w)[:, None], pixel.to(tl.int64)[:, None] * C
    scale_at, shift_at = batch[:, None] * scale_batch, batch[:, None] * shift_batch
    here = inside[:, None]

    kept = ()
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
                for first in tl.static_range(0, C // HALVES, TOGETHER * CHANNELS):
                    x = load_x(
                        y_ptr, residual_ptr, bias_ptr, noise_ptr, noise_scale_ptr, x_at, residual_at, noise_at,
                        half * (C // HALVES) + first + lanes, here, dtype,
                    )  # fmt: skip
                    kept = kept + (x.to(dtype),)  # type: ignore[assignment]  # noqa: RUF005
                    squares = round_to(x * x, dtype)  # r5
                    if TOGETHER == 1:
                        sums += squares
                    else:  # piece after piece
                        by_turns = tl.trans(tl.reshape(squares, (4, PIXELS, CHANNELS)), (1, 2, 0))
                        by_turns = tl.reshape(by_turns, (PIXELS, CHANNELS * 4))
                        sum0, sum1, sum2, sum3 = vector_places(by_turns, PIXELS, CHANNELS)
                        sums = (((sums + sum0) + sum1) + sum2) + sum3
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
        tl.store(mean_ptr + mean_at, mean, mask=mean_own)
        mean = round_to(mean, dtype)  # r6
    root = round_to(square_root(round_to(mean + eps, dtype)), dtype)  # r7, r8
    # Rounded to bf16, x * (1 / root) is x / root for every bf16 x and every root that there is (0, or 2^-67 and
    # more, as the least square is 2^-133): all 8 * 10^8 pairs were compared. A division takes 100 of 700 us.
    scaled_by = divide(1.0, root)[:, None]
    if TOGETHER > 1:
        scaled_by = tl.reshape(tl.broadcast_to(scaled_by[None], (TOGETHER, PIXELS, 1)), (TOGETHER * PIXELS, 1))
    if KEPT:
        for i in tl.static_range(C // (TOGETHER * CHANNELS)):
            store_x(
                kept[i].to(tl.float32), scaled_by, scale_ptr, shift_ptr, sum_ptr, out_ptr, scale_at, shift_at,
                x_at, out_at, scale_channel, shift_channel, i * (TOGETHER * CHANNELS) + lanes, here, own[:, None],
                dtype,
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
                scale_channel, shift_channel, channel, there, own[:, None], dtype,
            )  # fmt: skip


@kernel(do_not_specialize=("pixels", "frames", "height", "width"))
def _pad_kernel(
    y_ptr, residual_ptr, bias_ptr, noise_ptr, noise_scale_ptr, out_ptr, pixels, frames, height, width, channels,
    residual_batch: tl.int64, residual_frame: tl.int64, residual_row: tl.int64, residual_pixel: tl.int64,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """A program takes CHANNELS channels of PIXELS pixels of the padded output: one kernel for every width.

    pixels, frames, height, width    of the padded output in all; of x, which is not padded
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    batch, d, h, w, _, number = padded_from(pixel, inside, frames, height, width, FRONT, BACK, EDGE)
    residual_at = residual_place(batch, d, h, w, residual_batch, residual_frame, residual_row, residual_pixel)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    here = inside[:, None] & (channel < channels)
    x = load_x(
        y_ptr, residual_ptr, bias_ptr, noise_ptr, noise_scale_ptr, number[:, None] * channels, residual_at,
        (h * width + w)[:, None], channel, here, dtype,
    )  # fmt: skip
    tl.store(out_ptr + pixel.to(tl.int64)[:, None] * channels + channel, x.to(dtype), mask=here)


@kernel
def padded_from(pixel, inside, frames, height, width, FRONT: tl.constexpr, BACK: tl.constexpr, EDGE: tl.constexpr):
    """(sample, frame, row, column in x of what a pixel of the padded output is, if it is no repetition, number)."""
    padded_width, padded_height, padded_frames = width + 2 * EDGE, height + 2 * EDGE, frames + FRONT + BACK
    column, rest = pixel % padded_width - EDGE, pixel // padded_width
    row, rest = rest % padded_height - EDGE, rest // padded_height
    frame, batch = rest % padded_frames - FRONT, (rest // padded_frames).to(tl.int64)
    # the frame repeated, the edge mirrored
    d = tl.minimum(tl.maximum(frame, 0), frames - 1)
    h = height - 1 - tl.abs(height - 1 - tl.abs(row))
    w = width - 1 - tl.abs(width - 1 - tl.abs(column))
    own = inside & (d == frame) & (h == row) & (w == column)
    return batch, d, h, w, own, ((batch * frames + d) * height + h) * width + w


@kernel
def residual_place(batch, d, h, w, batch_stride, frame_stride, row_stride, pixel_stride):
    """[pixels, 1]: where the residual of a pixel begins."""
    place = (batch * batch_stride + d.to(tl.int64) * frame_stride)[:, None]
    return place + (h.to(tl.int64) * row_stride + w.to(tl.int64) * pixel_stride)[:, None]


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
    scale_channel, shift_channel, channel, here, own, DTYPE: tl.constexpr,
):  # fmt: skip
    """Write x where it is wanted, and what becomes of it."""
    if sum_ptr is not None:
        tl.store(sum_ptr + x_at + channel, x.to(DTYPE), mask=here & own)
    x = round_to(x * scaled_by, DTYPE)  # r9
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + scale_at + channel * scale_channel, mask=here, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + shift_at + channel * shift_channel, mask=here, other=0.0).to(tl.float32)
        x = round_to(x * round_to(1.0 + scale, DTYPE), DTYPE)  # r10, r11
        x = round_to(x + shift, DTYPE)  # r12
    x = silu(x)  # r13
    tl.store(out_ptr + out_at + channel, x.to(DTYPE), mask=here)


# -- launches ----------------------------------------------------------------------------------------------------------

_MOST_AT_ONCE = 128  # channels, where nothing hangs on how many
_MOST_KEPT = 16  # pieces of CHANNELS in registers: with 32 registers run out


def _plan(*args: Any, reference: Callable[..., Any], given_mean: bool = False) -> Plan | str:
    given = named(reference, args)
    y, residual = given["y"], given.get("residual")
    batch, channels, frames, height, width = y.shape
    front, back, edge = given["front"], given["back"], given["edge"]
    order = Order(1, 1, 1)
    if not given_mean:
        found = order_of(tuple(y.shape), y.element_size(), y.device)
        if found is None:
            return "ATen adds up the channels of this volume in an order that is not reproduced here"
        order = found
    eps = added_number(y.device, y.dtype, given["eps"])
    if eps is None:
        return "PyTorch adds a number here neither as fp32 nor rounded to bf16"
    threads = order.height * order.blocks
    slots = power_of_2(threads)
    channels_at_once = min(_MOST_AT_ONCE, power_of_2(channels)) if given_mean else 4 * slots
    whole = threads == slots and channels // order.halves % channels_at_once == 0
    kept = not given_mean and whole and channels // channels_at_once <= _MOST_KEPT
    # To choose layouts, Triton walks all that hangs together once for each load and store: 2.2 s for the 16 pieces of
    # 256 channels with a residual, 0.2 s now that four share a load. With eight pieces, all of Triton takes 0.7 s.
    pieces = channels // order.halves // channels_at_once
    together = 4 if kept and pieces > 8 and pieces % 4 == 0 else 1
    per_program = max(1, elements() // channels_at_once)
    pixels, out = _padded(y, front, back, edge)
    outputs = [out]
    if residual is not None:
        outputs.insert(0, channels_last(tuple(y.shape), y.dtype))
    more: dict[str, Any] = {}
    added: tuple[str, ...] = ()
    if given_mean:
        more, added = {"before": partial(mean_of, reference=reference), "extras": (y.dtype,)}, ("given_ptr",)
    else:
        witness = channels_last((batch, 1, frames, height, width), torch.float32)
        more, added = {"witnesses": (witness,), "by_shape": True}, ("mean_ptr",)
    return Plan(
        _pixel_kernel,
        (-(-pixels // per_program), 1, 1),
        (
            *(pixels, frames, height, width, eps, factor(tuple(y.shape)), *steps(residual)),
            *(*_value_strides(given.get("scale")), *_value_strides(given.get("shift"))),
        ),
        {
            **{"C": channels, "CHANNELS": channels_at_once, "PIXELS": per_program},
            **{"FRONT": front, "BACK": back, "EDGE": edge},
            **{"HEIGHT": order.height, "BLOCKS": order.blocks, "SLOTS": slots, "HALVES": order.halves, "KEPT": kept},
            "TOGETHER": together,
        },
        WARPS,
        tuple(outputs),
        slots=(*_pointers(given), *added, *(("sum_ptr",) if len(outputs) > 1 else ()), "out_ptr"),
        **more,
    )


def _padded(y: Tensor, front: int, back: int, edge: int) -> tuple[int, Out]:
    """(number of pixels, form) of y when it is padded."""
    batch, channels, frames, height, width = y.shape
    sides = (front + frames + back, height + 2 * edge, width + 2 * edge)
    return batch * math.prod(sides), channels_last((batch, channels, *sides), y.dtype)


def _pad_plan(*args: Any) -> Plan:
    given = named(residual_pad, args)
    y, front, back, edge = given["y"], given["front"], given["back"], given["edge"]
    channels = y.shape[1]
    channels_at_once = min(_MOST_AT_ONCE, power_of_2(channels))
    per_program = max(1, 8 * elements() // channels_at_once)
    pixels, out = _padded(y, front, back, edge)
    return Plan(
        _pad_kernel,
        (-(-pixels // per_program), -(-channels // channels_at_once), 1),
        (pixels, *y.shape[2:], channels, *steps(given["residual"])),
        {"CHANNELS": channels_at_once, "PIXELS": per_program, "FRONT": front, "BACK": back, "EDGE": edge},
        WARPS,
        (out,),
        apart=(channels,),
    )


def _pointers(given: dict[str, Any]) -> Iterator[str]:
    """The pointers that a call's tensors go to, of those that are given and those that may be None."""
    return (f"{name}_ptr" for name in given if name in _TENSORS)


_TENSORS = ("y", "residual", "bias", "noise", "noise_scale", "scale", "shift")


def _value_strides(value: Tensor | None) -> tuple[int, int]:
    """(batch, channel) strides of a scale or shift, 0 where one row serves all samples."""
    if value is None:
        return 0, 0
    batch, channel, *_ = strides(value)
    return (0 if value.shape[0] == 1 else batch), channel


def mean_of(*args: Any, reference: Callable[..., Any]) -> tuple[Tensor]:
    """The mean squares [B, 1, D, H, W] as the host has them."""
    return (torch.mean(squares(named(reference, args)), dim=1, keepdim=True),)  # r6


def squares(given: dict[str, Any]) -> Tensor:
    """x^2, contiguous and whole, as ATen's order of additions hangs on its size; formed piece by piece."""
    y = given["y"]
    frames = list(pieces(y))
    if len(frames) == 1:
        return x_at(given, frames[0]) ** 2  # r5
    found = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    for some in frames:
        found[:, :, some] = x_at(given, some) ** 2  # r5
    return found


def x_at(given: dict[str, Any], frames: slice) -> Tensor:
    """x in these frames, in the host's layout."""
    x = convolved(given["y"][:, :, frames], given["bias"], given["noise"], given["noise_scale"])
    return x + given["residual"][:, :, frames].contiguous() if "residual" in given else x  # r4


# -- why a call can't be fused -----------------------------------------------------------------------------------------


def _why_not(*args: Any, reference: Callable[..., Any]) -> Iterator[str]:
    yield from why_not_volumes(reference, named(reference, args), _misfits)


def _misfits(given: dict[str, Any]) -> Iterator[str]:
    y = given["y"]
    batch, channels, _, height, width = y.shape
    bias, residual = given["bias"], given.get("residual")
    if bias is not None and list(bias.shape) != [channels]:
        yield f"bias is {list(bias.shape)}; accepted: [{channels}]"
    if residual is not None and residual.shape != y.shape:
        yield f"residual is {list(residual.shape)}; accepted: the shape of y, {list(y.shape)}"
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
    tiers = [Tier("single pass", _pad_plan)]
    if "eps" in named(reference, ()):
        tiers = [Tier("single pass", partial(_plan, reference=reference))]
        tiers.append(Tier("ATen's mean", partial(_plan, reference=reference, given_mean=True)))
    why_not = partial(_why_not, reference=reference)
    return Operator(reference, f"diffusers 0.37-0.42.1: {source}", why_not=why_not, tiers=tuple(tiers))


PIXEL_NORM_SILU_PAD = _operator(pixel_norm_silu_pad, "LTX2VideoResnetBlock3d, LTX2VideoCausalConv3d")
RESIDUAL_PIXEL_NORM_SILU_PAD = _operator(residual_pixel_norm_silu_pad, "from one LTX2VideoResnetBlock3d to the next")
RESIDUAL_PAD = _operator(residual_pad, "from LTX2VideoResnetBlock3d to LTX2VideoUpsampler3d")
