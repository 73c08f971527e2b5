"""In which order ATen adds up the channels of a volume: `torch.mean(x, dim=1)` of a contiguous [B, C, D, H, W] on CUDA.

The channels of one position lie far apart in memory and its neighbours beside it, so ATen's generic reduction spreads
the positions over a warp's lanes and may spread a position's channels over `height` threads of a block, over `blocks`
blocks, and, of a tensor beyond 2^31 bytes, over `halves` launches one after the other (`Order`). With
L = height * blocks, a thread (t, k) of thread row t in block k takes the channels t + height * k + L * j for
j = 0, 1, 2, ... into four accumulators by turns (j mod 4), and adds those up as ((a0 + a1) + a2) + a3. The threads of a
block are folded in halves; of several blocks' sums thread row t adds up blocks t, t + height, ... and those are folded
in halves again; the halves are added one by one. The mean is the sum times 1/C in fp32.

After `setReduceConfig` and `ReduceOp` in `ATen/native/cuda/Reduce.cuh`. No version is trusted: each process compares
the mean itself, which kernels write out for the proof.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bitfuse.core.kernel import kernel
from bitfuse.core.reduction import fold, vector_places

if TYPE_CHECKING:
    import triton.language as tl

_LARGEST = 2**31 - 1  # bytes that one launch of ATen's addresses


class Order(NamedTuple):
    """How ATen spreads the channels of one position: see the head of this file."""

    height: int
    blocks: int
    halves: int


_here = threading.local()


@contextlib.contextmanager
def as_if(order: Order) -> Iterator[None]:
    """Inside, in this thread, every volume has this order: a small one launches the kernel of a large one."""
    before = getattr(_here, "order", None)
    _here.order = order
    try:
        yield
    finally:
        _here.order = before


def order_of(shape: tuple[int, ...], element_size: int, device: torch.device) -> Order | None:
    """The order for a contiguous volume of this shape [B, C, D, H, W]; None for one that is not reproduced here."""
    if (given := getattr(_here, "order", None)) is not None:
        return given
    batch, channels, *sides = shape
    positions = sides[0] * sides[1] * sides[2]
    halves = 1
    while channels % (2 * halves) == 0 and _bytes(batch, channels // halves, positions, element_size) > _LARGEST:
        if batch > 1:  # ATen may split the samples, in another way
            return None
        halves *= 2
    if _bytes(batch, channels // halves, positions, element_size) > _LARGEST:
        return None
    vector = next(n for n in (4, 2, 1) if positions % n == 0)
    height, blocks = _spread(batch * positions, channels // halves, vector, *_multiprocessors(device))
    return Order(height, blocks, halves) if blocks <= 8 * height else None


def _bytes(batch: int, channels: int, positions: int, element_size: int) -> int:
    """The offset of the last element in bytes, and 1; samples of a batch lie all their channels apart."""
    return batch * channels * positions * element_size - element_size + 1


def _spread(outputs: int, inputs: int, vector: int, processors: int, threads: int) -> tuple[int, int]:
    """(thread rows, blocks) over which `inputs` of each output are spread; `vector` outputs for each thread."""
    most = 512 // vector
    across = min(_power_of_2_up_to(outputs // vector), most)
    height = min(_power_of_2_up_to(inputs), most)
    width = min(across, 32)
    height = min(height, most // width)
    width = min(across, most // height)
    if inputs < min(height * 16, 256):
        return 1, 1
    each, grid = -(-inputs // height), -(-outputs // (vector * width))
    target = processors * (threads // (width * height))
    blocks = 1
    if each >= 256 and grid <= target:
        blocks = max(min(-(-target // grid), -(-each // 16)), -(-each // 256))
    return height, blocks


def _power_of_2_up_to(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)


@functools.cache
def _multiprocessors(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, threads on one of them at most); of a CPU those of an H100, for what emulates one."""
    if device.type != "cuda":
        return 132, 2048
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.max_threads_per_multi_processor


def factor(shape: tuple[int, ...]) -> float:
    """What ATen multiplies the sum by: the number of means as fp32, divided by the number of elements as fp32."""
    outputs = shape[0] * shape[2] * shape[3] * shape[4]
    counts = torch.tensor([outputs, outputs * shape[1]], dtype=torch.float32, device="cpu")
    return float(counts[0] / counts[1])


def emulated_mean(square: Tensor, order: Order) -> Tensor:
    """[B, C, D, H, W] -> [B, 1, D, H, W] fp32: the mean over channels in this order, in plain torch."""
    total = None
    for part in square.float().chunk(order.halves, dim=1):
        found = _emulated_sum(part, order)
        total = found if total is None else total + found
    assert total is not None
    return total * factor(tuple(square.shape))


def _emulated_sum(square: Tensor, order: Order) -> Tensor:
    lanes = order.height * order.blocks
    square = torch.nn.functional.pad(square.movedim(1, -1), (0, -square.shape[1] % (4 * lanes)))
    steps = square.unflatten(-1, (-1, 4, lanes))
    sums = torch.zeros_like(steps[..., 0, :, :])
    for step in steps.unbind(-3):
        sums = sums + step
    a0, a1, a2, a3 = sums.unbind(-2)
    found = _folded((((a0 + a1) + a2) + a3).unflatten(-1, (order.blocks, order.height)))
    if order.blocks > 1:
        found = torch.nn.functional.pad(found, (0, -order.blocks % order.height)).unflatten(-1, (-1, order.height))
        rows = found[..., 0, :]
        for row in found.unbind(-2)[1:]:
            rows = rows + row
        found = _folded(rows).unsqueeze(-1)
    return found.movedim(-1, 1)


def _folded(values: Tensor) -> Tensor:
    while values.shape[-1] > 1:
        first, second = values.chunk(2, dim=-1)
        values = first + second
    return values.squeeze(-1)


# -- in kernels --------------------------------------------------------------------------------------------------------


@kernel
def fold_threads(values, ROWS: tl.constexpr, HEIGHT: tl.constexpr):
    """[ROWS, HEIGHT] -> [ROWS], first half plus second half."""
    if HEIGHT > 1:
        values = fold(values, ROWS, HEIGHT)
    return tl.reshape(values, (ROWS,))


@kernel
def fold_blocks(values, ROWS: tl.constexpr, SLOTS: tl.constexpr, HEIGHT: tl.constexpr, BLOCKS: tl.constexpr):
    """[ROWS, SLOTS] -> [ROWS]: of lanes t + HEIGHT * k the sum over threads t of each block k, then over the blocks.

    SLOTS is a power of two not below HEIGHT * BLOCKS; lanes beyond that are zero. BLOCKS is at most 8 * HEIGHT.
    """
    if BLOCKS == 1:
        values = fold_threads(values, ROWS, HEIGHT)
    else:
        PADDED: tl.constexpr = SLOTS // HEIGHT
        of_blocks = fold_threads(tl.reshape(values, (ROWS * PADDED, HEIGHT)), ROWS * PADDED, HEIGHT)
        TURNS: tl.constexpr = (PADDED + HEIGHT - 1) // HEIGHT
        rows = tl.reshape(of_blocks, (ROWS, PADDED))
        if TURNS == 1:
            values = fold_threads(rows, ROWS, PADDED)
        elif TURNS == 2:
            row0, row1 = tl.split(tl.trans(tl.reshape(rows, (ROWS, 2, HEIGHT)), (0, 2, 1)))
            values = fold_threads(row0 + row1, ROWS, HEIGHT)
        elif TURNS == 4:
            row0, row1, row2, row3 = four_rows(rows, ROWS, HEIGHT)
            values = fold_threads(((row0 + row1) + row2) + row3, ROWS, HEIGHT)
        else:
            tl.static_assert(TURNS == 8)
            first, second = tl.split(tl.trans(tl.reshape(rows, (ROWS, 2, 4 * HEIGHT)), (0, 2, 1)))
            row0, row1, row2, row3 = four_rows(first, ROWS, HEIGHT)
            row4, row5, row6, row7 = four_rows(second, ROWS, HEIGHT)
            total = (((row0 + row1) + row2) + row3) + row4
            values = fold_threads(((total + row5) + row6) + row7, ROWS, HEIGHT)
    return values


@kernel
def four_rows(values, ROWS: tl.constexpr, HEIGHT: tl.constexpr):
    """[ROWS, 4 * HEIGHT] -> four of [ROWS, HEIGHT], each as it lies there."""
    by_turns = tl.reshape(tl.trans(tl.reshape(values, (ROWS, 4, HEIGHT)), (0, 2, 1)), (ROWS, HEIGHT * 4))
    row0, row1, row2, row3 = vector_places(by_turns, ROWS, HEIGHT)
    return row0, row1, row2, row3
