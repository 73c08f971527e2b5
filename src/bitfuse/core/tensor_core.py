"""A tensor core's arithmetic on the CPU, in integers: what a matmul's bits are made of, without a GPU.

One instruction adds its accumulator and a run of products in a single sum with one alignment. Every term is written
with the exponent of the largest one and loses what lies below a fixed number of fractional bits (towards zero, not
rounded); the sum of what is left is exact, and loses what fp32 can't hold, again towards zero:

    GPU                  products in a sum    fractional bits
    Hopper, Blackwell    16                   25
    Ampere, Ada          8, so two sums       24    for an instruction of 16

This is the published model MMA-Sim (P. Xie, Y. Wang, F. Yang, M. Yang, arXiv 2511.10909, 2025-11; for `mma`, `wgmma`
and `tcgen05` with operands of fp16 or bf16 and an fp32 sum), written anew here. Of a product the exponent is the sum of
its factors' exponents, so a product may be as large as just below four times that power; subnormal operands keep the
smallest exponent of their format, and so does a subnormal accumulator. What is zero takes no part in the alignment. NaN
and infinities are IEEE 754's; the sum of nothing but zeros is +0.

Limits: fp8 (13 fractional bits on Hopper) and tf32 are not modelled; which products share a sum, and in which order the
sums follow each other along K, is the matmul's and not the instruction's: `linear` takes them in the order of K, one
chain, as cuBLAS's kernels for Hopper were seen to where they don't split K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FRACTION = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}  # bits after the point
_SMALLEST = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}  # exponent of subnormals
_NAN = 0x7FFFFFFF
_NOTHING = -1 << 20  # exponent of what takes no part


@dataclass(frozen=True)
class TensorCore:
    """How one kind of GPU adds.

    products         in one sum, next to each other along K
    fractional_bits  kept of each term below the largest term's exponent
    """

    name: str
    products: int
    fractional_bits: int

    def add(self, total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """total + the sum of a * b over the last dimension, in one aligned sum.

        total    [...], fp32
        a, b     [..., n], both bf16 or both fp16, that broadcast to each other; n at most `products`
        """
        if a.dtype != b.dtype or a.dtype not in (torch.bfloat16, torch.float16) or total.dtype != torch.float32:
            raise TypeError(
                f"total, a, b are {total.dtype}, {a.dtype}, {b.dtype}; accepted: torch.float32 and twice one of "
                "torch.bfloat16 and torch.float16"
            )
        if a.shape[-1] != b.shape[-1] or a.shape[-1] > self.products:
            raise ValueError(
                f"a and b have {a.shape[-1]} and {b.shape[-1]} elements in the last dimension; accepted: the same "
                f"number, at most {self.products}"
            )
        (sa, ea), (sb, eb), (st, et) = _split(a), _split(b), _split(total)
        product, exponent = sa * sb, ea + eb
        largest = torch.where(product == 0, _NOTHING, exponent).amax(-1)
        largest = torch.maximum(largest, torch.where(st == 0, _NOTHING, et))
        kept = self.fractional_bits
        aligned = _shift(product, kept - 2 * _FRACTION[a.dtype] + exponent - largest[..., None]).sum(-1)
        aligned = aligned + _shift(st, kept - _FRACTION[torch.float32] + et - largest)
        finite = _truncated(aligned, largest - kept)
        special = (a.double() * b.double()).sum(-1) + total.double()  # products of fp16 and bf16 are finite in fp64
        bits = torch.where(special.isinf(), special.float().view(torch.int32), finite)
        return torch.where(special.isnan(), _NAN, bits).view(torch.float32)

    def chain(self, x: Tensor, w: Tensor, start: Tensor | None = None) -> Tensor:
        """start + the sum of x * w over the last dimension in fp32, one sum after another along K.

        x, w     [..., K], both bf16 or both fp16, that broadcast to each other; K a multiple of `products`
        start    [...], fp32; None: +0
        """
        if x.shape[-1] != w.shape[-1] or x.shape[-1] % self.products:
            raise ValueError(
                f"x and w have {x.shape[-1]} and {w.shape[-1]} elements in the last dimension; accepted: the same "
                f"multiple of {self.products}"
            )
        total = start
        if total is None:
            total = torch.zeros(torch.broadcast_shapes(x.shape[:-1], w.shape[:-1]), device=x.device)
        for a, b in zip(x.split(self.products, -1), w.split(self.products, -1), strict=True):
            total = self.add(total, a, b)
        return total

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of x [M, K] and w [N, K]: one chain along K, the bias [N] added in fp32, one rounding."""
        total = self.chain(x[:, None], w)
        return (total if bias is None else total + bias.float()).to(x.dtype)


HOPPER = TensorCore("Hopper, Blackwell", 16, 25)
AMPERE = TensorCore("Ampere, Ada", 8, 24)


def _split(t: Tensor) -> tuple[Tensor, Tensor]:
    """(signed integer significand, exponent) in int64: t is significand * 2^(exponent - bits after the point).

    Infinities and NaN give whatever their bits say; nobody looks at it.
    """
    fraction, smallest = _FRACTION[t.dtype], _SMALLEST[t.dtype]
    bits = t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32).to(torch.int64)
    width = 8 * t.element_size() - 1  # without the sign
    field = (bits >> fraction) & ((1 << (width - fraction)) - 1)
    significand = (bits & ((1 << fraction) - 1)) + torch.where(field == 0, 0, 1 << fraction)
    return torch.where(bits < 0, -significand, significand), field.clamp(min=1) + smallest - 1


def _shift(integer: Tensor, places: Tensor) -> Tensor:
    """integer * 2^places, towards zero."""
    size = integer.abs()
    moved = torch.where(places >= 0, size << places.clamp(0, 62), size >> (-places).clamp(0, 62))
    return torch.where(integer < 0, -moved, moved)


def _truncated(integer: Tensor, exponent: Tensor) -> Tensor:
    """The bits of integer * 2^exponent in fp32, towards zero, as int32; beyond its range infinity. Zero is +0."""
    size = integer.abs()
    length = torch.frexp(size.double())[1].to(torch.int64)  # exact below 2^53
    last = (exponent + length - 24).clamp(min=-149)  # exponent of the last bit that fp32 keeps
    significand = _shift(size, exponent - last)
    # a subnormal has no hidden bit and the exponent field 0, which adding the significand as it is amounts to
    bits = significand + (torch.where(significand >> 23 > 0, last + 149, 0) << 23)
    bits = torch.where(bits >= 0xFF << 23, 0xFF << 23, bits)
    return torch.where(integer < 0, bits - (1 << 31), bits).to(torch.int32)
