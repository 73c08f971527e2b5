"""What ATen computes on CUDA, in plain torch on any device: the mean squares of `core/reduction.py`, by the same
additions in the same order, and a product and a sum that are rounded once.

A CPU, whose ATen computes otherwise, is held against these where a kernel takes CUDA's way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfuse.core.reduction import mean_lanes


def layer_norm_mean_square(x: Tensor) -> Tensor:
    """[..., N] -> [..., 1] fp32: the mean square as `F.rms_norm` forms it on CUDA."""
    vectors = _vectors(x, 128)
    lane_sum = torch.zeros_like(vectors[..., 0, :, 0])
    for step in range(vectors.shape[-3]):
        for place in range(4):
            lane_sum = lane_sum + vectors[..., step, :, place]
    warp_sum = _fold(lane_sum.unflatten(-1, (4, 32)))
    return (_fold(warp_sum) / x.shape[-1]).unsqueeze(-1)


def mean_mean_square(x: Tensor) -> Tensor:
    """[..., N] -> [..., 1] fp32: the mean square as `x.float().pow(2).mean(-1, keepdim=True)` forms it on CUDA."""
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    lanes = mean_lanes(rows, width)
    if lanes is None:
        raise ValueError(f"x is {list(x.shape)}; the order of rows of 8192 and more is not emulated")
    vectors = _vectors(x, lanes)
    place_sum = torch.zeros_like(vectors[..., 0, :, :])
    for step in range(vectors.shape[-3]):
        place_sum = place_sum + vectors[..., step, :, :]
    sum0, sum1, sum2, sum3 = place_sum.unbind(-1)
    counts = torch.tensor([rows, rows * width], dtype=torch.float32, device=x.device)
    return (_fold(((sum0 + sum1) + sum2) + sum3) * (counts[0] / counts[1])).unsqueeze(-1)


def _vectors(x: Tensor, lanes: int) -> Tensor:
    """[..., N] -> squares [..., steps, lanes, 4], zeros after the end."""
    square = x.float() * x.float()
    square = torch.nn.functional.pad(square, (0, -x.shape[-1] % (4 * lanes)))
    return square.unflatten(-1, (-1, lanes, 4))


def _fold(values: Tensor) -> Tensor:
    while values.shape[-1] > 1:
        first, second = values.chunk(2, dim=-1)
        values = first + second
    return values.squeeze(-1)


def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32 tensors, rounded once, as `fma.rn.f32` does.

    In fp64 the product is exact. The sum is rounded there to odd: an inexact one whose last bit is even moves towards
    what was lost, so that the rounding to fp32 sees on which side of a tie it lies.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    even = total.isfinite() & (lost != 0) & (bits & 1 == 0)
    bits = torch.where(even, torch.where((lost > 0) == (total > 0), bits + 1, bits - 1), bits)
    return bits.view(torch.float64).float()
