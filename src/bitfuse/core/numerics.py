"""How an instruction rounds: Triton primitives, one instruction each, and what ATen's own ops were seen to do.

The primitives let a kernel read like the eager chain that it equals.
None of them leaves a rounding or a contraction to the compiler. `tests/test_ptx.py` counts the instructions
they become for compute capability 80, 90, 100 and 120; `bitfuse.core.interpreter` makes their interpreted form
round alike.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

from bitfuse.core.kernel import kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel
def round_to(value, dtype: tl.constexpr):
    """fp32 -> dtype -> fp32: `cvt.rn.bf16.f32` (never an integer trick, which loses NaN); nothing for fp32."""
    return value.to(dtype).to(tl.float32)


def _round_pairs_to_twin(value, dtype):
    return value.to(dtype).to(tl.float32)


@kernel(twin=_round_pairs_to_twin)
def round_pairs_to(value, dtype: tl.constexpr):
    """`round_to`, two elements of a thread in one instruction: `cvt.rn.bf16x2.f32`, of which each has the same bits.

    For values that are used one by one afterwards: LLVM (Triton 3.7.1) then rounds them one by one, too, and ptxas
    makes that `F2F`, which has a quarter of the rate.
    """
    if dtype == tl.bfloat16:
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [value], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        rounded = value.to(dtype)
    return rounded.to(tl.float32)


@kernel
def negate(value):
    """-value with the sign of zero kept: Triton's unary minus is 0 - value, which gives +0 for +0 (3.6.0)."""
    return value * -1.0


@kernel
def multiply_add(a, b, c, FUSED: tl.constexpr):
    """a * b + c as ATen's addcmul rounds it: once (`fma.rn.f32`) when FUSED, else the product and then the sum."""
    return tl.fma(a, b, c) if FUSED else a * b + c


def _multiply_add_bf16_twin(a, b, c):
    product, addend = a.to(tl.float64) * b.to(tl.float64), c.to(tl.float64)
    total = product + addend
    back = total - product
    nearest = total.to(tl.float32)
    lost = ((product - (total - back)) + (addend - back)) + (total - nearest.to(tl.float64))
    # rounded to odd in fp32: what was lost shows in the last bit, and bf16's ties are told
    bits = nearest.to(tl.int32, bitcast=True)
    odd = tl.where((lost > 0) == (total > 0), bits + 1, bits - 1)
    even = ((bits & 1) == 0) & (lost != 0) & (tl.abs(nearest) < float("inf"))
    return tl.where(even, odd, bits).to(tl.float32, bitcast=True).to(tl.bfloat16).to(tl.float32)


@kernel(twin=_multiply_add_bf16_twin)
def multiply_add_bf16(a, b, c):
    """a * b + c of bf16 values, given and returned in fp32, rounded once: `fma.rn.bf16`, two elements in one.

    By way of fp32 it would be rounded twice: half a unit of bf16 beside what is below a unit of fp32 is then a tie.
    """
    rounded = tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;",
        "=r,r,r,r",
        [a.to(tl.bfloat16), b.to(tl.bfloat16), c.to(tl.bfloat16)],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )
    return rounded.to(tl.float32)


def _reciprocal_root_twin(value):
    return 1.0 / tl.sqrt(value)


@kernel(twin=_reciprocal_root_twin)
def reciprocal_root(value):
    """fp32 -> 1 / sqrt(value) as CUDA's `rsqrtf` and so ATen has it: `rsqrt.approx.f32`, subnormals kept.

    `tl.rsqrt` would flush them (`rsqrt.approx.ftz.f32`, Triton 3.6). Interpreted: two roundings, as ATen on the CPU.
    """
    return tl.inline_asm_elementwise(
        "rsqrt.approx.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@kernel
def divide(a, b):
    """a / b in fp32, rounded to nearest: `div.rn.f32`, where `/` would be the approximate `div.full.f32`."""
    return tl.div_rn(a, b)


def _exponential_twin(value):
    return tl.exp(value)


@kernel(twin=_exponential_twin)
def exponential(value):
    """e^value in fp32 by CUDA's `expf` (libdevice), which ATen calls; `tl.exp` is a shorter approximation."""
    return tl.extra.cuda.libdevice.exp(value)


def _silu_twin(value):
    return value / (1.0 + tl.exp(-value))


@kernel(twin=_silu_twin)
def silu(value):
    """value / (1 + e^-value) in fp32, of a bf16 value and to be rounded to bf16: then it equals ATen's `silu` on CUDA.

    Of all values of bf16 (H200, torch 2.11, 2026-11-29), with this shorter exponential and approximate division as with
    CUDA's `expf` and a rounded one, which take 20 % longer in a norm. One value of fp16 needs the rounded one.
    """
    return value / (1.0 + tl.exp(negate(value)))


def _gelu_twin(value):
    inner = 0.7978845608028654 * (value + 0.044715 * (value * value * value))
    wide = inner.to(tl.float64)
    tanh = (1.0 - 2.0 / (1.0 + tl.exp(2.0 * wide))).to(tl.float32)
    # what ATen calls on a CPU (SLEEF's tanhf of 1 ulp) is 1 from here on
    tanh = tl.where(tl.abs(inner) > 8.664339742, tl.where(inner < 0.0, -1.0, 1.0), tanh)
    return 0.5 * value * (1.0 + tanh)


@kernel(twin=_gelu_twin)
def gelu(value):
    """0.5 * value * (1 + tanh(u)) in fp32, u = sqrt(2 / pi) * (value + 0.044715 * value^3), of a bf16 value and to be
    rounded to bf16: then it equals ATen's GELU on CUDA, in 9 instructions instead of some 30.

    It is value times the logistic function of 2u. Where ATen's 1 + tanh(u) is small it is a difference of numbers next
    to 1, and so a multiple of 2^-24, and half of it one of 2^-25: adding and taking away 1/4 rounds to that. Equal of
    all values of bf16, NaN and infinities among them; without that rounding 150 are not.
    """
    # -2 / ln 2 times sqrt(2 / pi), and that times 0.044715
    exponent = value * tl.fma(value * value, tl.full(value.shape, -0.1029432395800235, tl.float32), -2.302208198144325)
    power = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], dtype=tl.float32, is_pure=True, pack=1
    )
    logistic = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
    )
    return value * ((logistic + 0.25) - 0.25)


@kernel
def square_root(value):
    """The square root in fp32, rounded to nearest: `sqrt.rn.f32`, as ATen has it."""
    return tl.sqrt_rn(value)


def _sum_of_two_twin(pairs):
    first, second = tl.split(tl.trans(pairs, (0, 2, 1)))
    return first + second


@kernel(twin=_sum_of_two_twin)
def sum_of_two(pairs):
    """[R, 2, S] -> [R, S]: one addition each, so the order of `tl.sum` is no question; between lanes a shuffle.

    Written with `tl.split` instead, every thread folds all lanes itself: 91 % of a copy where this gives 96 %
    (RMSNorm and modulation, 6144 x 4096, H100, 2026-11-23).
    """
    return tl.sum(pairs, axis=1)


def added_number(device: torch.device, dtype: torch.dtype, number: float) -> float | None:
    """What `tensor + number` adds to a tensor of this 16-bit dtype on this device: a probe of the running torch.

    CUDA adds the number as fp32; a CPU rounds it to the dtype first (torch 2.13: 1e-8 becomes 1.0012e-8 in bf16).
    None: neither, so no kernel here can equal it.
    """
    return _added_number(device, dtype, number) if number else number  # a cache takes -0.0 for 0.0


@functools.cache
def _added_number(device: torch.device, dtype: torch.dtype, number: float) -> float | None:
    info = torch.finfo(dtype)
    steps = 1 + torch.arange(round(1 / info.eps), dtype=torch.float64, device="cpu") * info.eps
    powers = torch.tensor([2.0**n for n in range(-12, 13)], dtype=torch.float64, device="cpu")
    around = (powers[:, None] * steps * number).flatten().to(dtype)
    around = torch.cat([around, -around])
    found = (around.to(device) + number).to("cpu")
    as_fp32 = torch.tensor(number, dtype=torch.float32, device="cpu")
    for candidate in (as_fp32, as_fp32.to(dtype).float()):
        if torch.equal(found, (around.float() + candidate).to(dtype)):
            return float(candidate)
    return None


@functools.cache
def addcmul_fuses(device: torch.device, dtype: torch.dtype) -> bool | None:
    """Whether `out.addcmul_(a, b)` on this device rounds a * b + out once: a probe of the running torch.

    CUDA builds fuse from torch 2.11 on (`ATen/native/cuda/DeviceAddCmulCdiv.cuh`) and CPU builds where the
    processor has fma, but no version string is trusted. None: neither form, so no kernel here can equal it.
    """
    if dtype == torch.float16:
        return True  # a product of two fp16 is exact in fp32, and in its range: both forms give the same bits
    if dtype == torch.float32:  # (1 + 2^-12)^2 needs 25 bits; the fp32 product drops the last one
        a, b, out = 1 + 2**-12, 1 + 2**-12, -(1 + 2**-11)
        fused, separate = 2.0**-24, 0.0
    else:  # products of bf16 are exact in fp32 while in range: inf - inf tells, where the fused form has no inf
        a, b, out = 2.0**127, 4.0, -math.inf
        fused, separate = -math.inf, math.nan
    n = 67  # past the vector body of any implementation, into its tail
    got = torch.full((n,), out, dtype=dtype, device=device)
    got.addcmul_(torch.full_like(got, a), torch.full_like(got, b))
    for form, value in ((True, fused), (False, separate)):
        if torch.equal(torch.nan_to_num(got, nan=7.0), torch.nan_to_num(torch.full_like(got, value), nan=7.0)):
            return form
    return None


# (value, out, weight, their lerp with one rounding in fp32 and with two), for each branch of ATen's lerp. In bf16 they
# part only where what the product loses survives the sum and then decides a tie: one in 800 of 25 million tried where
# the sum cancels, one in a million in the other branch.
_LERPS = (
    (-1.0546875, 5472.0, 0.0001926422119140625, -0.0003452301025390625, -0.000347137451171875),
    (-0.000392913818359375, -1.1484375, 3.796875, -4.34375, -4.375),
)


@functools.cache
def lerp_fuses(device: torch.device, dtype: torch.dtype) -> bool | None:
    """Whether `torch.lerp` in bf16 on this device rounds its product and sum once: a probe of the running torch.

    ATen writes a product and a sum (`aten/src/ATen/native/Lerp.h`), which nvcc contracts unless it is told not to.
    None: the two branches differ, or some elements do, or it is neither form, so no kernel here can equal it.
    """
    n = 67  # past the vector body of any implementation, into its tail
    forms: set[bool | None] = set()
    for value, out, weight, fused, separate in _LERPS:
        start, end = (torch.full((1, n, 1), x, dtype=dtype, device=device) for x in (value, out))
        found = torch.lerp(start, end, torch.full((1, 1, 1), weight, dtype=dtype, device=device)).float()
        once, twice = (torch.equal(found, torch.full_like(found, x)) for x in (fused, separate))
        forms.add(once if once != twice else None)
    return forms.pop() if len(forms) == 1 else None
