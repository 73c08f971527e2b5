"""In which order ATen adds up a row: the orders that kernels here reproduce, each with an emulator in plain torch.

Floating-point sums depend on their order, and ATen's CUDA kernels have orders of their own, fixed by how they
spread a row over threads. Both orders below read vectors of four neighbouring elements and fold the threads'
sums "in halves": the first half of the lanes plus the second half, until one is left.

    LAYER_NORM    `F.rms_norm` (vectorised layer-norm kernel): 128 lanes, one accumulator each. Lane t takes the
                  vectors t, t + 128, t + 256, ... and adds their squares one by one. The 32 lanes of a warp are
                  folded, then the four warps. Mean square: sum / N, a true division.
    MEAN          `x.pow(2).mean(-1)` over fp32 rows (the generic reduction): 32 lanes, four accumulators each,
                  one per place in the vector; lane l takes the vectors l, l + 32, ... A lane's sum is
                  ((a0 + a1) + a2) + a3. Mean square: sum * (1/N). Fewer than 16 rows get more lanes:
                  `mean_lanes`.

A lane that has run out of vectors adds nothing; adding the square of a zero instead changes no bit. Seen equal
on one H100 with torch 2.11 (2026-11-23); no version is trusted, each process compares the statistic itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfuse.core.kernel import kernel
from bitfuse.core.numerics import divide, reciprocal_root, sum_of_two

if TYPE_CHECKING:
    import triton.language as tl

LAYER_NORM, MEAN, GIVEN = "layer norm", "mean", "given"
"""Names of the orders, for kernels' constants. GIVEN: ATen's own statistic is handed to the kernel."""


def mean_lanes(rows: int, width: int) -> int | None:
    """Lanes over which ATen spreads a row of `mean(-1)`, fp32; None where it also splits rows between warps.

    After `setReduceConfig` in `ATen/native/cuda/Reduce.cuh`: 512 threads, the rows' share of them first.
    """
    if width >= 8192 - 31:  # 256 vectors per lane and more: split, in an order that is not reproduced here
        return None
    vectors = _power_of_2_up_to(width // 4)
    block_rows = min(_power_of_2_up_to(rows), 512 // min(vectors, 32))
    return min(vectors, 512 // block_rows)


def layer_norm_lanes(width: int) -> int:
    """Of the 128 lanes of `F.rms_norm` those that a kernel needs for a row: warps that only add zeros are left out."""
    return next((lanes for lanes in (32, 64) if width <= 4 * lanes), 128)


def _power_of_2_up_to(n: int) -> int:
    return 1 << (n.bit_length() - 1)


# -- in kernels ---------------------------------------------------------------------------------------------------


@kernel
def fold(values, ROWS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS, LANES] -> [ROWS], first half plus second half. LANES: a power of two up to 512."""
    if LANES >= 512:
        values = sum_of_two(tl.reshape(values, (ROWS, 2, 256)))
    if LANES >= 256:
        values = sum_of_two(tl.reshape(values, (ROWS, 2, 128)))
    if LANES >= 128:
        values = sum_of_two(tl.reshape(values, (ROWS, 2, 64)))
    if LANES >= 64:
        values = sum_of_two(tl.reshape(values, (ROWS, 2, 32)))
    if LANES >= 32:
        values = sum_of_two(tl.reshape(values, (ROWS, 2, 16)))
    if LANES >= 16:
        values = sum_of_two(tl.reshape(values, (ROWS, 2, 8)))
    if LANES >= 8:
        values = sum_of_two(tl.reshape(values, (ROWS, 2, 4)))
    if LANES >= 4:
        values = sum_of_two(tl.reshape(values, (ROWS, 2, 2)))
    values = sum_of_two(tl.reshape(values, (ROWS, 2, 1)))
    return tl.reshape(values, (ROWS,))


@kernel
def vector_places(values, ROWS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS, LANES * 4] -> four of [ROWS, LANES]: the elements at place 0, 1, 2 and 3 of each lane's vector."""
    even, odd = tl.split(tl.reshape(values, (ROWS, LANES * 2, 2)))
    place0, place2 = tl.split(tl.reshape(even, (ROWS, LANES, 2)))
    place1, place3 = tl.split(tl.reshape(odd, (ROWS, LANES, 2)))
    return place0, place1, place2, place3


@kernel
def mean_square(row_ptr, inside, rows, N: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, LANES: tl.constexpr):
    """Mean of the squares of each row, fp32 [ROWS], in ATen's ORDER over LANES.

    row_ptr   [ROWS, 1] pointers to the first elements of rows of N; inside: [ROWS, 1], which of them exist
    rows      how many the whole tensor has (ATen's 1/N comes from counts of the whole tensor)
    """
    element = tl.arange(0, 4 * LANES)[None, :]
    lane_sum, place_sum = 0.0, 0.0
    for step in tl.static_range((N + 4 * LANES - 1) // (4 * LANES)):
        at = step * 4 * LANES + element
        x = tl.load(row_ptr + at, mask=inside & (at < N), other=0.0).to(tl.float32)
        # the first step starts the sums: an addition to zeros would be dropped by Triton 3.6 and kept by 3.7
        if ORDER == "layer norm":
            square0, square1, square2, square3 = vector_places(x * x, ROWS, LANES)
            lane_sum = square0 if step == 0 else lane_sum + square0
            lane_sum = ((lane_sum + square1) + square2) + square3
        else:
            place_sum = x * x if step == 0 else place_sum + x * x
    if ORDER == "layer norm":
        WARPS: tl.constexpr = LANES // 32
        total = fold(tl.reshape(lane_sum, (ROWS * WARPS, 32)), ROWS * WARPS, 32)
        if WARPS > 1:
            total = fold(tl.reshape(total, (ROWS, WARPS)), ROWS, WARPS)
        mean = divide(total, N * 1.0)
    else:
        sum0, sum1, sum2, sum3 = vector_places(place_sum, ROWS, LANES)
        total = fold(((sum0 + sum1) + sum2) + sum3, ROWS, LANES)
        # as MeanOps has it: (number of rows as fp32) / (number of elements as fp32), not always fl(1/N)
        mean = total * divide(rows.to(tl.float32), (rows.to(tl.int64) * N).to(tl.float32))
    return mean


@kernel
def mean_square_of_head(x, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Mean of the squares of each row of an fp32 tile [ROWS, WIDTH], zeros beyond N: fp32 [ROWS], in the LAYER_NORM
    order of rows of up to 128 elements. These are no more than the vectors of one warp: the other warps add zeros."""
    square0, square1, square2, square3 = vector_places(x * x, ROWS, WIDTH // 4)
    lane_sum = ((square0 + square1) + square2) + square3
    return divide(fold(lane_sum, ROWS, WIDTH // 4), N * 1.0)


@kernel
def rstd_of_head(square, eps):
    return reciprocal_root(square + eps)


@kernel
def row_rstd(
    row_ptr, rstd_ptr, row, rows, eps, N: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, LANES: tl.constexpr
):
    """1 / sqrt(mean square + eps) of each row, fp32 [ROWS, 1]: found in ATen's ORDER, or GIVEN, and then read.

    What was found is also written to rstd_ptr [rows]: the proof looks at it, as a wrong order shows there in
    one row of five and in the rounded output in one of two thousand.
    """
    if ORDER == "given":
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    else:
        square = mean_square(row_ptr, (row < rows)[:, None], rows, N, ROWS, ORDER, LANES)
        rstd = reciprocal_root(square + eps)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
    return rstd[:, None]
