"""The model of the tensor core: vectors worked out by hand, rational arithmetic, and the interpreter's `tl.dot`."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from bitfuse.core.bits import differing
from bitfuse.core.kernel import interpreting, kernel
from bitfuse.core.tensor_core import AMPERE, HOPPER, TensorCore

if TYPE_CHECKING:
    import triton.language as tl

CORES = [pytest.param(core, id=core.name.split(",")[0]) for core in (HOPPER, AMPERE)]
BF16 = torch.bfloat16
INF, NAN = math.inf, math.nan
MAX = 1.9921875 * 2.0**127  # of bf16


def add(core: TensorCore, total: float, *products: tuple[float, float], dtype: torch.dtype = BF16) -> float:
    a, b = (torch.tensor([p[i] for p in products], dtype=dtype) for i in (0, 1))
    for given, kept in ((p[i], t[j].item()) for i, t in ((0, a), (1, b)) for j, p in enumerate(products)):
        assert given == kept or given != given, f"{given} is no value of {dtype}"
    return core.add(torch.tensor(total), a, b).item()


# -- by hand -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("core", "bits"), [(HOPPER, 25), (AMPERE, 24)])
def test_the_last_bit_that_an_alignment_keeps(core, bits):
    inside, outside = 2.0**-bits, 2.0 ** -(bits + 1)
    assert add(core, 1.0, (-1.0, 1.0), (inside, 1.0)) == inside
    assert add(core, 1.0, (-1.0, 1.0), (outside, 1.0)) == 0.0
    assert add(core, 0.0, (1.0, 1.0), (-1.0, 1.0), (inside, -1.0)) == -inside
    assert add(core, inside, (1.0, 1.0), (-1.0, 1.0)) == inside, "the accumulator is a term like the others"
    assert add(core, outside, (1.0, 1.0), (-1.0, 1.0)) == 0.0


@pytest.mark.parametrize("core", CORES)
def test_terms_are_cut_towards_zero_one_by_one(core):
    last = 2.0**-core.fractional_bits
    assert add(core, 1.0, (-1.0, 1.0), (1.75 * last, 1.0)) == last
    assert add(core, 1.0, (-1.0, 1.0), (1.75 * last, -1.0)) == -last
    assert add(core, 1.0, (-1.0, 1.0), (last / 2, 1.0), (last / 2, 1.0)) == 0.0, "two halves are lost, not added"


@pytest.mark.parametrize("core", CORES)
def test_the_sum_is_cut_to_fp32_towards_zero(core):
    assert add(core, 1.0, (1.5 * 2.0**-23, 1.0)) == 1 + 2.0**-23, "to nearest it would be 1 + 2^-22"
    assert add(core, -1.0, (1.5 * 2.0**-23, -1.0)) == -1 - 2.0**-23
    assert add(core, 1.0, (2.0**-24, 1.0)) == 1.0
    assert add(core, 1.0, (2.0**-24, 1.0), (2.0**-24, 1.0)) == 1 + 2.0**-23, "exact before it is cut"


def test_a_products_exponent_is_the_sum_of_its_factors_exponents():
    """1.5 * 1.5 is 2.25, but aligns as 2^0: what lies 25 bits below is kept."""
    assert add(HOPPER, 0.0, (1.5, 1.5), (1.5, -1.5), (2.0**-25, 1.0)) == 2.0**-25
    assert add(HOPPER, 2.25, (1.5, -1.5), (2.0**-25, 1.0)) == 0.0, "an accumulator of 2.25 aligns as 2^1"


def test_cancellation_leaves_what_was_kept():
    assert add(HOPPER, 2.0**30, (-(2.0**30), 1.0), (2.0**5, 1.0), (2.0**4, 1.0)) == 2.0**5


@pytest.mark.parametrize("core", CORES)
def test_zeros(core):
    zero = add(core, -0.0, (-0.0, 1.0), (0.0, -1.0))
    assert zero == 0.0
    assert math.copysign(1.0, zero) == 1.0, "the sum of nothing but zeros is +0"
    assert math.copysign(1.0, add(core, -1.0, (1.0, 1.0))) == 1.0
    assert add(core, 0.0, (0.0, 2.0**127), (2.0**-20, 1.0)) == 2.0**-20, "a product that is zero aligns nothing"


@pytest.mark.parametrize("core", CORES)
def test_subnormals(core):
    least = 2.0**-149
    assert add(core, least, (0.0, 1.0)) == least
    assert add(core, 3 * least, (least * 2.0**16, 2.0**-16)) == 4 * least, "an operand may be subnormal: 2^-133"
    assert add(core, 0.0, (2.0**-100, 2.0**-50)) == 0.0
    quarter = (2.0**-100, 2.0**-51)  # of the least
    assert add(core, 0.0, *[quarter] * 4) == least, "zero takes no part in the alignment (seen on an H200)"
    assert add(core, 0.0, *[quarter] * 3) == 0.0
    kept = 2.0**-126 * 2.0**-core.fractional_bits <= least / 4
    assert add(core, least, *[quarter] * 4) == (2 * least if kept else least), "a subnormal accumulator does, as 2^-126"
    assert add(core, 2.0**-126, (2.0**-126, -0.5)) == 2.0**-127, "a result may be subnormal"


@pytest.mark.parametrize("core", CORES)
def test_infinities_and_nan(core):
    assert add(core, 1.0, (INF, 2.0), (1.0, 1.0)) == INF
    assert add(core, -INF, (1.0, 1.0)) == -INF
    for total, *products in ((0.0, (INF, 0.0)), (0.0, (INF, 1.0), (INF, -1.0)), (INF, (INF, -1.0)), (0.0, (NAN, 0.0))):
        assert math.isnan(add(core, total, *products))
    assert math.isnan(add(core, NAN, (1.0, 1.0)))


@pytest.mark.parametrize("core", CORES)
def test_beyond_the_range_of_fp32(core):
    assert add(core, 0.0, (2.0**127, 2.0)) == INF
    assert add(core, 0.0, (2.0**127, -2.0)) == -INF
    assert add(core, 0.0, (MAX, 1.0), (2.0**120, 1.0)) == INF, "the carry reaches 2^128"
    assert add(core, 0.0, (2.0**100, 2.0**100), (2.0**100, -(2.0**100)), (1.0, 1.0)) == 0.0, "it is the sum that counts"
    largest = torch.finfo(torch.float32).max
    assert add(core, largest, (2.0**100, 1.0)) == largest, "less than a last bit is cut, not rounded up to infinity"


def test_fp16_has_its_own_exponents():
    assert add(HOPPER, 0.0, (2.0**-24, 2.0**-24), dtype=torch.float16) == 2.0**-48
    assert add(HOPPER, 1.0, (-1.0, 1.0), (2.0**-14, 2.0**-11), dtype=torch.float16) == 2.0**-25
    subnormal = ((2.0**-15, 1.0), (2.0**-15, -1.0))  # aligns as 2^-14
    assert add(HOPPER, 0.0, *subnormal, (2.0**-20, 2.0**-19), dtype=torch.float16) == 2.0**-39
    assert add(HOPPER, 0.0, *subnormal, (2.0**-20, 2.0**-20), dtype=torch.float16) == 0.0
    assert add(HOPPER, 0.0, (60000.0, 60000.0), dtype=torch.float16) == 60000.0**2


def test_what_is_not_taken_is_said():
    x = torch.zeros(3, 16, dtype=BF16)
    with pytest.raises(TypeError, match=r"total, a, b are torch.float32, torch.bfloat16, torch.float16; accepted"):
        HOPPER.add(torch.zeros(3), x, x.half())
    with pytest.raises(ValueError, match=r"16 and 16 elements in the last .* at most 8"):
        AMPERE.add(torch.zeros(3), x, x)
    with pytest.raises(ValueError, match=r"24 and 24 elements in the last .* multiple of 16"):
        HOPPER.chain(torch.zeros(3, 24, dtype=BF16), torch.zeros(3, 24, dtype=BF16))


# -- in rational numbers -----------------------------------------------------------------------------------------------


def exponent_of(value: float, smallest: int) -> int:
    return max(math.frexp(value)[1] - 1, smallest) if value else smallest


def in_rationals(core: TensorCore, total: float, a: list[float], b: list[float], smallest: int) -> float:
    """The same sum by definition, of finite values, term by term."""
    terms = [
        (Fraction(x) * Fraction(y), exponent_of(x, smallest) + exponent_of(y, smallest))
        for x, y in zip(a, b, strict=True)
    ]
    terms.append((Fraction(total), exponent_of(total, -126)))
    terms = [(value, exponent) for value, exponent in terms if value]
    unit = Fraction(2) ** (max((exponent for _, exponent in terms), default=0) - core.fractional_bits)
    exact = sum(math.trunc(value / unit) for value, _ in terms) * unit
    if not exact:
        return 0.0
    exponent = 0  # of the leading bit, found in steps: no float is involved
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    last = Fraction(2) ** max(exponent - 23, -149)
    kept = math.trunc(exact / last) * last
    size = INF if abs(kept) >= Fraction(2) ** 128 else float(abs(kept))
    return -size if exact < 0 else size


def spread(generator: torch.Generator, shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype) -> Tensor:
    power = torch.exp2(torch.randint(low, high + 1, shape, generator=generator).double())
    return (torch.randn(shape, generator=generator).double() * power).to(torch.float32).to(dtype)


RANGES = {  # exponents of factors, of the accumulator, the share of zeros
    "one scale": ((0, 0), (0, 0), 0.0),
    "around the alignment": ((-14, 0), (-26, 2), 0.0),
    "wide": ((-40, 40), (-60, 60), 0.1),
    "tiny": ((-74, -60), (-149, -120), 0.3),
    "subnormal factors": ((-133, -120), (-149, -126), 0.1),
    "huge": ((50, 64), (100, 127), 0.1),
}


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("core", CORES)
def test_it_equals_rational_arithmetic(core, name, dtype):
    factors, totals, zeros = RANGES[name]
    if dtype == torch.float16:
        factors = (-24, 0) if factors[0] < -24 else (min(factors[0], 12), min(factors[1], 12))
    generator = torch.Generator().manual_seed(len(name))
    n = 400
    a, b = (spread(generator, (n, core.products), *factors, dtype) for _ in range(2))
    a[torch.rand(a.shape, generator=generator) < zeros] = 0
    total = spread(generator, (n,), *totals, torch.float32)
    a[::3, 1], b[::3, 1] = -a[::3, 0], b[::3, 0]  # every third sum cancels
    found = core.add(total, a, b)
    smallest = -14 if dtype == torch.float16 else -126
    expected = [
        in_rationals(core, *given, smallest)
        for given in zip(total.tolist(), a.tolist(), b.tolist(), strict=True)
        if all(map(math.isfinite, [given[0], *given[1], *given[2]]))
    ]
    finite = total.isfinite() & a.isfinite().all(-1) & b.isfinite().all(-1)
    assert len(expected) > n // 3
    assert not differing(torch.tensor(expected), found[finite].contiguous()).any()


# -- chains ------------------------------------------------------------------------------------------------------------


def test_a_chain_is_one_sum_after_another():
    generator = torch.Generator().manual_seed(5)
    x, w = (spread(generator, (rows, 64), -4, 4, BF16) for rows in (3, 4))
    total = torch.zeros(3, 4)
    for at in range(0, 64, 16):
        total = HOPPER.add(total, x[:, None, at : at + 16], w[:, at : at + 16])
    assert torch.equal(HOPPER.chain(x[:, None], w), total)
    halves = HOPPER.chain(x[:, None, 32:], w[:, 32:], HOPPER.chain(x[:, None, :32], w[:, :32]))
    assert torch.equal(halves, total), "`start` goes on where a chain has stopped"
    bias = spread(generator, (4,), -3, 3, BF16)
    assert torch.equal(HOPPER.linear(x, w, bias), (total + bias.float()).to(BF16))
    assert torch.equal(HOPPER.linear(x, w), total.to(BF16))


def test_where_every_order_gives_the_same_it_is_torchs_linear():
    generator = torch.Generator().manual_seed(6)
    x, w = (torch.randint(-4, 5, (rows, 48), generator=generator).to(BF16) for rows in (5, 6))
    for core in (HOPPER, AMPERE):
        assert torch.equal(core.linear(x, w), torch.nn.functional.linear(x, w))


# -- the interpreter ---------------------------------------------------------------------------------------------------


@kernel
def _dot_kernel(x_ptr, w_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, lane = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + row[:, None] * K + lane[None, :])
    w = tl.load(w_ptr + column[None, :] * K + lane[:, None])
    at = row[:, None] * N + column[None, :]
    tl.store(out_ptr + at, tl.dot(x, w, tl.load(out_ptr + at)))


@pytest.mark.skipif(not interpreting(), reason="a GPU is here, so kernels are compiled")
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_the_interpreters_dot_adds_as_hoppers_tensor_cores_do(dtype):
    """Upstream's multiplies the bit patterns of bf16 as integers (Triton 3.6.0, 3.7.1)."""
    generator = torch.Generator().manual_seed(7)
    x, w = (spread(generator, (rows, 64), -6, 6, dtype) for rows in (16, 32))
    start = spread(generator, (16, 32), -4, 4, torch.float32)
    out = start.clone()
    _dot_kernel[(1, 1, 1)](x, w, out, 16, 32, 64)
    if dtype == torch.float32:  # tf32 is not modelled: upstream's own
        assert torch.allclose(out, start + x @ w.T, rtol=1e-5)
    else:
        assert torch.equal(out, HOPPER.chain(x[:, None], w, start))
        assert not torch.equal(out, start + x.float() @ w.float().T)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RANGES)
def test_a_gpu_adds_so(name):
    """A million dot products of 16, on Hopper: 64 x 64 tiles of one instruction each (2026-11-29: an H200)."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("Hopper's sums")
    factors, _, zeros = RANGES[name]
    generator = torch.Generator().manual_seed(11)
    x, w = (spread(generator, (1024, 16), *factors, BF16) for _ in range(2))
    x[torch.rand(x.shape, generator=generator) < zeros] = 0
    x[::3, 1], w[:, 1] = -x[::3, 0], w[:, 0]
    x, w = x.cuda(), w.cuda()
    found = torch.mm(x, w.t(), out_dtype=torch.float32)
    expected = torch.cat([HOPPER.chain(some[:, None], w) for some in x.split(128)])
    assert not differing(expected, found).any()
