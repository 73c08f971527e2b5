"""Operand values that tell a wrong rounding from a right one.

Each family gives one tensor per operand, element i of all of them together being one scalar computation. Random
normals alone prove little: they never meet a tie, a lost sign of zero, a flushed subnormal or a NaN. Seeds are
fixed, the generator is private (the user's random state is untouched) and everything is made on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INT = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def every_16_bit_pattern(dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """All 65,536 values of a 16-bit dtype, every NaN included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16).view(dtype)


def specials(dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros, the edges of the subnormals and normals, ones, the largest values, infinities and NaNs."""
    info = torch.finfo(dtype)
    edge = info.smallest_normal
    magnitudes = [0.0, edge * info.eps, edge * (1 - info.eps), edge, 1.0, 1.0 + info.eps, info.max, float("inf")]
    values = torch.tensor(magnitudes, dtype=torch.float64, device="cpu").to(dtype)
    infinity = int(values[-1:].view(_INT[dtype]))
    nans = torch.tensor([infinity + 1, -1], dtype=_INT[dtype], device="cpu").view(dtype)  # signaling; all bits set
    return torch.cat([values, -values, nans]).to(device)


def products_of_specials(dtypes: Sequence[torch.dtype], device: torch.device | str) -> list[Tensor]:
    """Every combination of special values of the operands (18^k of them for k operands)."""
    each = [specials(d, device) for d in dtypes]
    index = torch.meshgrid(*(torch.arange(v.numel(), device=device) for v in each), indexing="ij")
    return [v[i.reshape(-1)] for v, i in zip(each, index, strict=True)]


def live(dtypes: Sequence[torch.dtype], n: int, generator: torch.Generator) -> list[Tensor]:
    """What a model feeds: normals."""
    return [_normal(n, generator).to(d) for d in dtypes]


def wide(dtypes: Sequence[torch.dtype], n: int, generator: torch.Generator) -> list[Tensor]:
    """Normals times 2^k, k from -20 to 20: sums that absorb one addend, products far apart."""
    exponents = [torch.randint(-20, 21, (n,), device=generator.device, generator=generator) for _ in dtypes]
    return [torch.ldexp(_normal(n, generator), e).to(d) for d, e in zip(dtypes, exponents, strict=True)]


def uniform_bits(dtypes: Sequence[torch.dtype], n: int, generator: torch.Generator) -> list[Tensor]:
    """Every bit pattern equally likely: all exponents, subnormals, infinities and NaNs among them."""
    info = {d: torch.iinfo(_INT[d]) for d in dtypes}
    return [
        torch.randint(info[d].min, info[d].max + 1, (n,), device=generator.device, generator=generator)
        .to(_INT[d])
        .view(d)
        for d in dtypes
    ]


def significands(dtype: torch.dtype, n: int, generator: torch.Generator) -> Tensor:
    """Values in [1, 2) with random significands of the dtype."""
    steps = round(1 / torch.finfo(dtype).eps)
    return (1 + torch.randint(steps, (n,), device=generator.device, generator=generator) / steps).to(dtype)


def signs(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (n,), device=generator.device, generator=generator) * 2.0 - 1.0


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, device=generator.device, generator=generator)
