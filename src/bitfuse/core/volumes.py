"""Volumes in channels_last_3d, as kernels take them: [B, C, D, H, W] with the channels of a pixel side by side.

What the operators of the video autoencoder share: the form, how much of a volume a program takes, and why a volume is
none that a kernel takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.conditions import fitting, plain, runnable
from bitfuse.core.kernel import interpreting
from bitfuse.core.launch import Out, strides

CHANNELS_LAST = torch.channels_last_3d
WARPS = 4
_WIDEST = 1 << 15  # channels
# That a program reads at once, 8 bytes for each thread: with 16 the norms took 5 to 50 % longer, as fewer programs fit
# on a multiprocessor (128, 256 and 512 channels, H200, 2026-11-29).
_ELEMENTS = 512
# The interpreter is fastest with few, large programs.
_INTERPRETED_ELEMENTS = 1 << 14


def elements() -> int:
    """How many elements a program reads at once."""
    return _INTERPRETED_ELEMENTS if interpreting() else _ELEMENTS


def laid(x: Tensor) -> Tensor:
    """x, dense in channels_last_3d. Not by that name: inside of vmap PyTorch knows no layout but the contiguous one."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def biased(y: Tensor, bias: Tensor | None) -> Tensor:
    """What the host has after a convolution, in its own layout; y is the convolution's output without its bias."""
    y = y.contiguous()
    return y if bias is None else y + bias.view(1, -1, 1, 1, 1)


def channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Out:
    """The form of a dense volume of this shape in channels_last_3d."""
    _, channels, frames, height, width = shape
    pixel, row, frame = channels, channels * width, channels * width * height
    return Out(tuple(shape), (frame * frames, 1, frame, row, pixel), dtype)


_PIECE, _PIECES = 1 << 26, 12  # elements, or a twelfth of the frames where that is more: each piece takes 30 ops


def pieces(volume: Tensor) -> Iterator[slice]:
    """Its frames, some at a time: as many as are computed at once where all at once would take too much memory."""
    batch, channels, frames, height, width = volume.shape
    some = max(1, _PIECE // max(1, batch * channels * height * width), frames // _PIECES)
    yield from (slice(first, min(first + some, frames)) for first in range(0, frames, some))


def steps(volume: Tensor | None) -> tuple[int, ...]:
    """(batch, frame, row, pixel) strides."""
    return (0, 0, 0, 0) if volume is None else tuple(strides(volume)[dim] for dim in (0, 2, 3, 4))


def why_not_volumes(
    reference: Callable[..., Any], given: dict[str, Any], misfits: Callable[[dict[str, Any]], Iterator[str]]
) -> Iterator[str]:
    """Why a call on volumes can't be fused; its arguments by name, `y` a volume, `residual` another.

    misfits    what does not fit in their shapes, in sentences, where y has five dimensions
    """
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    y = given["y"]
    if reasons := list(plain(tensors)):  # of which nothing further can be asked: inside of vmap, no layout
        yield from (*reasons, *runnable(tensors))
        return
    if y.ndim == 5:
        misfit = next(misfits(given), None)
    else:
        misfit = f"y is {list(y.shape)}; accepted: [B, C, D, H, W], five dimensions"
    reasons += fitting(reference, given, misfit)
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
