"""Triton's interpreter, made to round as the GPU does.

Triton 3.6 to 3.9 interpret kernels with NumPy on the CPU, and three things come out differently from the
hardware instruction (seen on 3.6.0, 3.7.1 and 3.9.0):

- fp32 -> bf16 truncates, loses subnormals and turns some NaN into infinity; `cvt.rn.bf16.f32` rounds to
  nearest even and keeps NaN;
- `tl.fma` on fp32 rounds the product and then the sum before 3.9; `fma.rn.f32` rounds once;
- bf16 arithmetic works on the bit patterns; kernels here convert to fp32 first, as the hardware does.

`ExactInterpretedFunction` puts the first two right while one of our kernels runs, and puts Triton back after.
`tests/test_interpreter.py` holds the two models against torch's CPU conversion and an exact fma.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as upstream

_CANONICAL_NAN = np.uint16(0x7FFF)  # what PTX writes for any NaN in bf16
_LOCK = threading.RLock()  # the interpreter keeps its grid position in one module-wide object


def bf16_from_fp32(bits: np.ndarray) -> np.ndarray:
    """`cvt.rn.bf16.f32` on bit patterns: uint32 -> uint16, to nearest even, NaN to the canonical NaN."""
    low_bit = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):  # only a NaN pattern can wrap around, and it is replaced below
        rounded = ((bits + np.uint32(0x7FFF) + low_bit) >> np.uint32(16)).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, _CANONICAL_NAN, rounded)


def fma_fp32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """`fma.rn.f32`: a * b + c with one rounding.

    The product of two fp32 is exact in fp64. The sum is rounded to fp64 "to odd" (TwoSum gives the error; an
    inexact sum with an even last bit moves towards the error), so that the final rounding to fp32 sees on
    which side of a tie the exact value lies.
    """
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)
        addend = np.broadcast_to(c.astype(np.float64), product.shape)
        total = product + addend
        back = total - product
        error = (product - (total - back)) + (addend - back)
        bits = np.ascontiguousarray(total).view(np.int64)
        inexact = (error != 0) & np.isfinite(total) & ((bits & 1) == 0)
        away_from_zero = (error > 0) == (total > 0)
        bits = np.where(inexact, np.where(away_from_zero, bits + 1, bits - 1), bits)
        return bits.view(np.float64).astype(np.float32)


def _convert_float(data, source, target, rounding, *, otherwise):
    if source == tl.float32 and target == tl.bfloat16:
        return bf16_from_fp32(np.ascontiguousarray(data).view(np.uint32))
    if source == tl.bfloat16 and target == tl.float32:
        return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << np.uint32(16)
    return otherwise(data, source, target, rounding)


def _create_fma(builder, x, y, z, *, otherwise):
    if z.data.dtype == np.float32:
        return upstream.TensorHandle(fma_fp32(x.data, y.data, z.data), z.dtype.scalar)
    return otherwise(builder, x, y, z)


# What a launch replaces in Triton, as it was: (owner, its attributes). None where nothing is replaced.
_before: list[tuple[Any, dict[str, Any]]] | None = None


def _round_exactly() -> None:
    """Make the interpreter round as the hardware does, until `_put_back`."""
    global _before
    convert, fma = upstream._convert_float, upstream.InterpreterBuilder.create_fma
    # A helper of Triton's own, `tl.zeros` say, patches its language at each call and leaves it so; ours do not
    owners = (tl, tl.core, tl.math, tl.dtype, tl.core.tensor, tl.core.tensor_descriptor_base)
    ours = [(upstream, {"_convert_float": convert}), (upstream.InterpreterBuilder, {"create_fma": fma})]
    _before = [*ours, *((owner, dict(vars(owner))) for owner in owners)]
    upstream._convert_float = lambda *args: _convert_float(*args, otherwise=convert)
    upstream.InterpreterBuilder.create_fma = lambda *args: _create_fma(*args, otherwise=fma)


def _put_back() -> None:
    """Leave Triton as it was before the launch. Done again from the start where it was interrupted."""
    global _before
    if _before is None:
        return
    for place, (owner, before) in enumerate(_before):
        for name, value in list(vars(owner).items()):
            if name not in before:
                if place > 1:  # of the first two only the named attributes are held
                    delattr(owner, name)
            elif value is not before[name]:
                setattr(owner, name, before[name])
    _before = None


class ExactInterpretedFunction(upstream.InterpretedFunction):
    """A kernel that runs in Triton's interpreter under exact rounding."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a helper, called by a kernel that runs. Triton would patch its language for it again, as it did for the
        kernel: a tenth of a test's time (2026-11-25)."""
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise upstream.InterpreterError(repr(error)) from error

    def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        # In one line: an interrupt between two lines, which a debugger may raise, could leave the lock held.
        with _LOCK: return self._run_exactly(*args, grid=grid, warmup=warmup, **kwargs)  # fmt: skip  # noqa: E701

    def _run_exactly(self, *args: Any, **kwargs: Any) -> Any:
        _put_back()  # what an interrupted launch has left
        try:
            _round_exactly()
            # inf - inf is data here, not a mistake
            with np.errstate(all="ignore"): return super().run(*args, **kwargs)  # fmt: skip  # noqa: E701
        finally:
            _put_back()
