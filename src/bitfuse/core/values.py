"""Operand values that tell a wrong rounding from a right one.

Each family gives one tensor per operand, element i of all of them together being one scalar computation. Random
normals alone prove little: they never meet a tie, a lost sign of zero, a flushed subnormal or a NaN. Seeds are
fixed, the generator is private (the user's random state is untouched) and everything is made on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitfuse.core.inputs import guarded
from bitfuse.core.launch import strides

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


def _normal(shape: int | list[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, device=generator.device, generator=generator)


# -- rows that are normed, added and modulated -------------------------------------------------------------------------
#
# Each family draws one operand of a kernel on rows, and is told what that operand is: "x" (rows that are normed), "y"
# (rows that are added), "mask", or anything else: values that rows are multiplied with and added to.


def _mask(shape: list[int], generator: torch.Generator) -> Tensor:
    """Zeros and ones; by turns where there is one for each sample, so that no two neighbours are alike."""
    if list(shape[1:]) == [1, 1]:
        return (torch.arange(shape[0], device=generator.device) % 2).float().view(shape)
    return torch.randint(0, 2, shape, generator=generator, device=generator.device).float()


def _some_special(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Special values, drawn one by one: zeros of both signs, subnormals, the largest values, infinities, NaN."""
    few = specials(dtype, generator.device)
    return few[torch.randint(few.numel(), shape, generator=generator, device=generator.device)]


def _rows_live(what: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if what == "mask":
        return _mask(shape, generator)
    return _normal(shape, generator) * (1.0 if what in "xy" else 0.5)


def _rows_wide(what: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Elements, rows and values of very different sizes; a mask that is no mere yes or no."""
    if what == "mask":
        return 1 + _normal(shape, generator)
    exponent = torch.randint(-12, 13, shape, generator=generator, device=generator.device)
    if what in "xy" and dtype != torch.float16:
        exponent = exponent + torch.randint(-20, 21, [*shape[:-1], 1], generator=generator, device=generator.device)
    return torch.ldexp(_normal(shape, generator), exponent)


def _rows_absorption(what: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One element of a row so large that what is added after it, one by one, is lost: the order shows."""
    drawn = _rows_live(what, shape, dtype, generator)
    if what == "x":
        where = torch.randint(shape[-1], [*shape[:-1], 1], generator=generator, device=generator.device)
        drawn.scatter_(-1, where, 2.0**12)
    return drawn


def _rows_ties(what: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Sums and products that end half-way between two values of the dtype."""
    n, unit = torch.Size(shape).numel(), torch.finfo(dtype).eps
    if what == "mask":
        return torch.ones(shape, device=generator.device)
    if what == "x":  # y * gate is near 1; half a unit of it is a tie
        return (signs(n, generator) * unit / 2).view(shape)
    if what == "y":
        return significands(dtype, n, generator).view(shape)
    odd = 2 * torch.randint(0, 64, shape, generator=generator, device=generator.device) + 1
    return odd * unit / 2  # 1 + this is a tie


def _rows_specials(what: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Special values and gates on live rows."""
    if what == "mask":
        return _mask(shape, generator)
    live = _normal(shape, generator).to(dtype)
    if what == "x":
        return live
    return torch.where(_mask(shape, generator) > 0, live, _some_special(shape, dtype, generator))


def _rows_of_one_kind(what: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows of zeros, of subnormals, of the largest values, with one special value; single tokens of everything."""
    if what == "y":
        return -torch.zeros(shape, device=generator.device)
    if what != "x":  # zeros among the shifts let the smallest results through
        return _rows_live(what, shape, dtype, generator) * _mask(shape, generator)
    tiny = torch.finfo(dtype).smallest_normal
    live = _normal(shape, generator)
    number = torch.arange(shape[0] * shape[1], device=generator.device).view(shape[0], shape[1], 1)
    kind = number % 8
    one = torch.zeros(shape, device=generator.device)
    one[..., 7::61] = 1.0
    few = specials(dtype, generator.device).flip(0)  # each in its turn, NaN first: 32 rows of 128 are for 18 values
    some = few[(number // 8 * 2 + (kind == 6)) % few.numel()]
    rows = torch.where(kind == 0, -torch.zeros_like(live), live)
    rows = torch.where(kind == 1, live * tiny, rows)
    rows = torch.where(kind == 2, live.sign() * torch.finfo(dtype).max, rows)
    rows = torch.where(kind == 3, one, rows)
    rows = torch.where(kind == 4, live * 2.0**-20, rows).to(dtype)
    at = torch.arange(shape[-1], device=generator.device) == shape[-1] // 3
    return torch.where(((kind == 5) | (kind == 6)) & at, some, rows)


ROW_FAMILIES: dict[str, Callable[..., Tensor]] = {
    "live": _rows_live,
    "wide": _rows_wide,
    "absorption": _rows_absorption,
    "ties": _rows_ties,
    "specials": _rows_specials,
    "special rows": _rows_of_one_kind,
}
"""By name: draw(what the operand is, shape, dtype, generator) -> fp32, or the dtype, to be rounded to it."""


def battery_shape(batch: int, tokens: int, few: bool = False) -> tuple[int, int]:
    """(B, T) of a battery: 126 rows of two samples, whatever the call's own shape, as its signature also serves calls
    of more samples and tokens; with `few`, as few as the call's own below 16, where ATen's mean adds up in another
    order (`bitfuse.core.reduction`)."""
    return (batch, tokens) if few and batch * tokens < 16 else (2, 63)


# -- in memory like a user's own -------------------------------------------------------------------------------------


def lookalike(like: Tensor, values: Tensor, gap: int = 0) -> Tensor:
    """A tensor that holds `values` and looks to a kernel like `like`, poison around it and between its elements.

    Same dtype, same order of dimensions in memory, each stride in the same class (0, 1, multiple of 16 or not)
    and the base address as far from a multiple of 16 bytes as in `like`. Where `like` is expanded (stride 0), the
    values of index 0 are expanded. `values` has as many dimensions as `like` and any sizes.

    gap    times 16 elements are left free in every stride but that of 1: operands with different gaps have different
           strides, so that a kernel that reads one with the strides of another goes wrong
    """
    wanted = strides(like)
    expanded = [s == 0 and n > 1 for s, n in zip(wanted, like.shape, strict=True)]
    shape = list(values.shape)
    for dim, is_expanded in enumerate(expanded):
        if is_expanded:
            values = values.narrow(dim, 0, 1)
    found, span = [0] * like.ndim, 1
    for dim in sorted(range(like.ndim), key=lambda d: (wanted[d] != 1, wanted[d], -d)):
        if not expanded[dim]:
            if wanted[dim] != 1:
                span += 16 * gap
            if wanted[dim] % 16 == 0:
                span += -span % 16
            elif wanted[dim] != 1 and span % 16 in (0, 1):
                span += 2
            found[dim] = span
            span *= values.shape[dim]
    offset = like.data_ptr() % 16 // like.element_size()
    out = guarded(tuple(values.shape), tuple(found), like.dtype, like.device, offset)
    out.copy_(values)
    return out.expand(shape)
