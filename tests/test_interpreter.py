"""Triton's interpreter under our shim rounds as the instructions do, and Triton is left as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import oracle
from bitfuse import OPERATORS, compare
from bitfuse.core import values
from bitfuse.core.interpreter import bf16_from_fp32, fma_fp32
from bitfuse.core.kernel import EXACT, interpreting, kernel
from bitfuse.core.numerics import addcmul_fuses
from common import ROTARY

if TYPE_CHECKING:
    import triton.language as tl

needs_interpreter = pytest.mark.skipif(not interpreting(), reason="a GPU is here, so kernels are compiled")


def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Element by element: the same bits, or NaN in both."""
    return (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))


# -- fp32 -> bf16 ---------------------------------------------------------------------------------------------------


def test_bf16_conversion_rounds_as_torch_does_on_2_to_the_26_patterns():
    """All 65,536 upper halves, and of the lower halves the borders of every rounding decision and random ones."""
    generator = np.random.default_rng(0)
    borders = [0x0000, 0x0001, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF]
    others = generator.choice(np.setdiff1d(np.arange(1 << 16), borders), 1024 - len(borders), replace=False)
    lower = np.concatenate([borders, others]).astype(np.uint32)
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    seen = nans = 0
    for some in lower.reshape(-1, 64):
        bits = (upper[:, None] | some).reshape(-1)
        found = bf16_from_fp32(bits)
        expected = torch.from_numpy(bits.view(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        is_nan = np.isnan(bits.view(np.float32))
        assert np.count_nonzero((found != expected) & ~is_nan) == 0
        assert np.all(found[is_nan] == 0x7FFF)
        seen, nans = seen + bits.size, nans + int(is_nan.sum())
    assert seen == 1 << 26
    assert nans == 2 * 128 * 1024 - 2  # two signs, 128 upper halves; lower half 0 with exponent 255 is an infinity


# -- fma --------------------------------------------------------------------------------------------------------------


def hard_fma_cases(n: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Families of (a, b, c), about n triples each, where a wrong fma shows."""
    g = np.random.default_rng(seed)

    def significand(bits: int = 24) -> np.ndarray:
        return (1 + g.integers(0, 1 << (bits - 1), n) / (1 << (bits - 1))).astype(np.float32)

    def scaled(exponents: np.ndarray, bits: int = 24) -> np.ndarray:
        sign = np.where(g.integers(0, 2, n) == 1, -1.0, 1.0)
        return np.ldexp(significand(bits).astype(np.float64) * sign, exponents).astype(np.float32)

    def random_bits() -> np.ndarray:
        return g.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32)

    def factors_of_nearly_one() -> tuple[np.ndarray, np.ndarray]:
        """(1 + d) (1 - d) = 1 - d^2, (1 + d) (1 - d + d^2) = 1 + d^3, and 1; every factor is an fp32 number."""
        k, kind = g.integers(1, 24, n), g.integers(0, 3, n)
        k = np.where(kind == 1, 1 + k // 2, k)
        d = np.where(kind == 2, 0.0, np.ldexp(1.0, -k))
        return (1 + d).astype(np.float32), (1 - d + np.where(kind == 1, d * d, 0.0)).astype(np.float32)

    families = {"any bits": [random_bits(), random_bits(), random_bits()]}
    a, b = significand(), significand()
    families["cancellation"] = [a, b, -(a.astype(np.float64) * b).astype(np.float32)]
    near = g.integers(-60, 61, n)
    families["exponents apart"] = [scaled(near), scaled(g.integers(-3, 4, n)), scaled(near[::-1].copy())]
    # c and half its unit, give or take a few parts in 2^46 that fp64 can't hold beside c
    one, other = factors_of_nearly_one()
    families["halfway"] = [np.ldexp(one, -12), np.ldexp(other, -12), significand()]
    # the same among the subnormals, whose unit is 2^-149
    subnormal = np.ldexp(g.integers(-(1 << 23), 1 << 23, n) * 1.0, -149).astype(np.float32)
    families["subnormal halfway"] = [np.ldexp(one, -75), np.ldexp(other, -75), subnormal]
    exponent = g.integers(-80, -60, n)
    families["subnormal product"] = [scaled(exponent), scaled(-140 - exponent), np.zeros(n, np.float32)]
    families["subnormal sum"] = [scaled(exponent), scaled(-148 - exponent), subnormal]
    families["overflow"] = [
        scaled(g.integers(60, 67, n)),
        scaled(g.integers(58, 64, n)),
        scaled(g.integers(120, 128, n)),
    ]
    each = values.specials(torch.float32, "cpu").numpy()
    index = np.stack(np.meshgrid(*[np.arange(each.size)] * 3), axis=-1).reshape(-1, 3)
    families["specials"] = [each[index[:, i]] for i in range(3)]
    return families


FAMILIES = tuple(hard_fma_cases(1, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_fma_equals_exact_rational_arithmetic(family):
    """Against Python's Fractions, subnormal results included: fp64 rounded to odd keeps at least 29 bits more
    than any fp32 result has, so the second rounding never sees a tie that is none."""
    operands = hard_fma_cases(1500, 1)[family]
    found, expected = fma_fp32(*operands), oracle.each(oracle.fma_fp32, *operands)
    wrong = np.flatnonzero(~same(found, expected))
    assert wrong.size == 0, [[float(o[i]).hex() for o in (*operands, found, expected)] for i in wrong[:3]]


def test_fma_equals_the_processors_own():
    """2^20 cases and more against `torch.addcmul`, which is the processor's fma where the probe says so."""
    if not addcmul_fuses(torch.device("cpu"), torch.float32):
        pytest.skip("addcmul does not fuse on this processor")
    compared = 0
    for family, operands in hard_fma_cases(1 << 17, 2).items():
        a, b, c = (torch.from_numpy(o) for o in operands)
        expected = torch.addcmul(c, a, b).numpy()
        assert np.count_nonzero(~same(fma_fp32(*operands), expected)) == 0, family
        compared += expected.size
    assert compared >= 1 << 20


@pytest.mark.parametrize("family", ["cancellation", "exponents apart", "halfway", "subnormal halfway", "overflow"])
def test_the_cases_tell_two_roundings_from_one(family):
    a, b, c = hard_fma_cases(20000, 3)[family]
    with np.errstate(all="ignore"):
        assert np.any(~same(fma_fp32(a, b, c), a * b + c))


@pytest.mark.parametrize("family", ["halfway", "subnormal halfway"])
def test_the_cases_tell_fp64_rounded_to_even_from_rounded_to_odd(family):
    a, b, c = hard_fma_cases(20000, 3)[family]
    assert np.any(~same(fma_fp32(a, b, c), (a.astype(np.float64) * b + c).astype(np.float32)))


# -- a kernel through the shim --------------------------------------------------------------------------------------


@kernel
def _fma_and_store(a_ptr, b_ptr, c_ptr, fp32_ptr, bf16_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    result = tl.fma(tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(c_ptr + at))
    tl.store(fp32_ptr + at, result)
    tl.store(bf16_ptr + at, result)


@kernel
def _fails(a_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(a_ptr + at, no_such_name)  # noqa: F821


def upstream_state() -> dict[str, object]:
    """What the interpreter replaces in Triton for the time of a launch, and what our shim replaces in it."""
    import triton.language as tl
    from triton.runtime import interpreter

    owners = {"tl": tl, "tl.core": tl.core, "tl.math": tl.math, "tl.tensor": tl.core.tensor, "dtype": tl.dtype}
    owners |= {"module": interpreter, "builder": interpreter.InterpreterBuilder}
    return {f"{name}.{key}": value for name, owner in owners.items() for key, value in vars(owner).items()}


def changed(before: dict[str, object]) -> list[str]:
    after = upstream_state()
    return [key for key in before if after.get(key) is not before[key]]


@needs_interpreter
def test_a_kernel_fuses_and_rounds_to_nearest():
    a, b, c = (torch.from_numpy(o[:4096].copy()) for o in hard_fma_cases(4096, 4)["halfway"])
    fp32, bf16 = torch.empty(4096), torch.empty(4096, dtype=torch.bfloat16)
    _fma_and_store[(1,)](a, b, c, fp32, bf16, N=4096)
    expected = torch.from_numpy(oracle.each(oracle.fma_fp32, a.numpy(), b.numpy(), c.numpy()))
    assert compare(expected, fp32) is None
    assert compare(expected.to(torch.bfloat16), bf16) is None
    assert (a * b + c != expected).any()  # else this would not tell a fused from a separate sum
    truncated = (expected.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert compare(truncated, bf16) is not None  # nor truncation from rounding


@needs_interpreter
def test_triton_is_put_back_after_a_launch():
    before = upstream_state()
    a = torch.ones(64)
    _fma_and_store[(1,)](a, a, a, torch.empty(64), torch.empty(64, dtype=torch.bfloat16), N=64)
    assert changed(before) == []


@needs_interpreter
def test_triton_is_put_back_after_an_operator():
    """Operators' kernels call helpers, which Triton's interpreter patches for separately."""
    before = upstream_state()
    for operator in OPERATORS.values():
        operator.launch(*operator.cases[0].arguments("cpu", tokens=1))
    assert changed(before) == []


@needs_interpreter
def test_triton_is_put_back_after_an_exception_in_a_kernel():
    before, errors = upstream_state(), np.geterr()
    with pytest.raises(Exception, match="no_such_name"):
        _fails[(1,)](torch.ones(64), N=64)
    assert changed(before) == []
    assert np.geterr() == errors


@needs_interpreter
def test_launches_of_two_threads_do_not_mix():
    """The interpreter keeps its place in the grid in one module-wide object."""
    operator = OPERATORS["split_rotary_per_op"]
    before = upstream_state()
    work = [operator.cases[0].arguments("cpu", tokens=8, seed=seed) for seed in range(4)]
    plans = [replace(operator.plan(*t), options=dict(EXACT)) for t in work]
    outs = [plan.empty(torch.device("cpu")) for plan in plans]
    threads = [
        threading.Thread(target=lambda p, t, o: p.bind(t, o)(*t, *o), args=each)
        for each in zip(plans, work, outs, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [compare(operator.reference(*t), o) for t, (o,) in zip(work, outs, strict=True)] == [None] * len(work)
    assert changed(before) == []


@needs_interpreter
@pytest.mark.parametrize("operator", ROTARY, ids=lambda operator: operator.name)
@pytest.mark.parametrize("tables", ["model's", "any bits", "specials"])
def test_every_bf16_value_through_the_real_kernel(operator, tables):
    """All 65,536 values of x once in every place's role, NaN and subnormals too, against the eager chain."""
    video = operator.cases[0]
    generator = torch.Generator().manual_seed(1)
    patterns = values.every_16_bit_pattern(torch.bfloat16, "cpu")
    x, cos, sin = video.arguments("cpu", tokens=-(-patterns.numel() // (video.heads * video.head_dim)))
    x = patterns[torch.randperm(patterns.numel(), generator=generator)].view(x.shape)
    if tables == "any bits":
        drawn = values.uniform_bits([cos.dtype] * 2, cos.numel(), generator)
        cos, sin = (t.view(cos.shape) for t in drawn)
    elif tables == "specials":
        few = values.specials(cos.dtype, "cpu")
        cos, sin = (few[torch.randint(few.numel(), cos.shape, generator=generator)] for _ in range(2))
    assert compare(operator.reference(x, cos, sin), operator.launch(x, cos, sin)) is None


def test_a_process_that_has_interpreted_can_compile():
    """Where Triton is first imported while it interprets, its own `tl.sum` stays interpreted."""
    code = """
import os
import bitfuse
from bitfuse.core.kernel import interpreter
from bitfuse.tools.prove import ptx
operator = bitfuse.OPERATORS["rms_norm_modulate_native"]
args = operator.cases[0].arguments("cpu", tokens=3)
with interpreter():
    operator.launch(*args)
print(ptx.count(ptx.compile_for(operator.plan(*args), args, 90)).rounding["rsqrt.approx.f32"])
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_ALWAYS_COMPILE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr[-2000:]
