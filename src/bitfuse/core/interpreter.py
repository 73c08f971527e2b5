"""Triton's interpreter, made to round as the GPU does.

Triton 3.6 to 3.9 interpret kernels with NumPy on the CPU, and three things come out differently from the
hardware instruction (seen on 3.6.0, 3.7.1 and 3.9.0):

- fp32 -> bf16 truncates, loses subnormals and turns some NaN into infinity; `cvt.rn.bf16.f32` rounds to
  nearest even and keeps NaN;
- `tl.fma` on fp32 rounds the product and then the sum before 3.9; `fma.rn.f32` rounds once;
- bf16 arithmetic works on the bit patterns; kernels here convert to fp32 first, as the hardware does;
- `tl.dot` of bf16 multiplies the bit patterns as integers, and of fp16 it adds as NumPy does; here both add as Hopper's
  tensor cores do (`bitfuse.core.tensor_core`).

`ExactInterpretedFunction` puts all but the third right while one of our kernels runs, and puts Triton back after.

It also keeps a launch inside the memory of its tensors (`Memory`): upstream reads and writes at whatever address a
kernel computes, and a wrong one ends the process.
`tests/test_interpreter.py` holds the two models against torch's CPU conversion and an exact fma.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as upstream

from bitfuse.core.bits import Outside
from bitfuse.core.tensor_core import HOPPER

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


def _create_dot(builder, a, b, d, *rest, otherwise):
    if a.dtype.scalar not in _OPERANDS or d.dtype.scalar != tl.float32:
        return otherwise(builder, a, b, d, *rest)
    dtype = _OPERANDS[a.dtype.scalar]
    x, w = (
        torch.from_numpy(np.ascontiguousarray(t).view(np.int16)).view(dtype) for t in (a.data, b.data.swapaxes(-1, -2))
    )
    total = HOPPER.chain(x[..., :, None, :], w[..., None, :, :], torch.from_numpy(np.ascontiguousarray(d.data)))
    return upstream.TensorHandle(total.numpy(), tl.float32)


_OPERANDS = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zone:
    """Bytes of one tensor: `first` to `end` hold its elements, `allowed` are those of its whole allocation."""

    name: str
    first: int
    end: int
    allowed: tuple[int, int]


class Memory:
    """What the tensors of a launch own. What is read must lie between a tensor's first and last element; a write may
    also land in its allocation around them, where a proof has its guard zones. Anything else is left untouched and
    remembered in `fault`, the first as a sentence."""

    def __init__(self, tensors: dict[str, Any]):
        self.zones = [_zone(name, t) for name, t in tensors.items() if t.numel()]
        self.fault: str | None = None

    def load(self, builder, ptrs, mask, other, *rest, otherwise, **more):
        """Triton's masked load, without what lies outside; `otherwise` is the interpreter's own."""
        dtype = upstream._get_np_dtype(ptrs.get_element_ty())
        if other is None:
            other = upstream.TensorHandle(np.zeros_like(ptrs.data, dtype=dtype), ptrs.get_element_ty())
        asked = np.asarray(mask.data)  # a TMA descriptor's mask is an array itself
        inside = self.inside(ptrs.data, asked, np.dtype(dtype).itemsize, write=False)
        kept = mask if inside is asked else upstream.TensorHandle(inside, tl.int1)
        return otherwise(builder, ptrs, kept, other, *rest, **more)

    def store(self, builder, ptrs, value, mask, *rest, otherwise, **more):
        """Triton's masked store, without what lies outside."""
        asked = np.asarray(mask.data)  # a TMA descriptor's mask is an array itself
        inside = self.inside(ptrs.data, asked, value.data.itemsize, write=True)
        kept = mask if inside is asked else upstream.TensorHandle(inside, tl.int1)
        return otherwise(builder, ptrs, value, kept, *rest, **more)

    def inside(self, addresses: np.ndarray, mask: np.ndarray, size: int, write: bool) -> np.ndarray:
        """The mask of what may be touched, of accesses of `size` bytes."""
        if not mask.any():
            return mask
        lowest, highest = self._ends(addresses, mask)
        for zone in self.zones:
            first, end = zone.allowed if write else (zone.first, zone.end)
            if first <= lowest and highest + size <= end:
                return mask
        good = np.zeros_like(mask)
        for zone in self.zones:
            first, end = zone.allowed if write else (zone.first, zone.end)
            good |= (addresses >= np.uint64(first)) & (addresses + np.uint64(size) <= np.uint64(end))
        stray = mask & ~good
        if stray.any() and self.fault is None:
            self.fault = self._sentence(int(addresses[stray].flat[0]), int(stray.sum()), size, write)
        return mask & good

    @staticmethod
    def _ends(addresses: np.ndarray, mask: np.ndarray) -> tuple[int, int]:
        active = addresses if mask.all() else addresses[mask]
        return int(active.min()), int(active.max())

    def _sentence(self, address: int, count: int, size: int, write: bool) -> str:
        def distance(zone: Zone) -> int:
            return max(zone.first - address, address + size - zone.end)

        zone = min(self.zones, key=distance)
        place = "after the end" if address >= zone.first else "before the start"
        what = "written" if write else "read"
        return f"{count} elements are {what} outside of every tensor, one {distance(zone)} bytes {place} of {zone.name}"


def _zone(name: str, t: Any) -> Zone:
    first, size = t.data_ptr(), t.element_size()
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    storage = t.untyped_storage()
    return Zone(name, first, first + span * size, (storage.data_ptr(), storage.data_ptr() + storage.nbytes()))


# What a launch replaces in Triton, as it was: (owner, its attributes). None where nothing is replaced.
_before: list[tuple[Any, dict[str, Any]]] | None = None


def _stand_in(memory: Any) -> None:
    """Make the interpreter round as the hardware does and keep to this memory, until `_put_back`."""
    global _before
    builder = upstream.InterpreterBuilder
    convert, fma = upstream._convert_float, builder.create_fma
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    # A helper of Triton's own, `tl.zeros` say, patches its language at each call and leaves it so; ours do not
    owners = (tl, tl.core, tl.math, tl.dtype, tl.core.tensor, tl.core.tensor_descriptor_base)
    built = {"create_fma": fma, "create_dot": dot, "create_masked_load": load, "create_masked_store": store}
    ours = [(upstream, {"_convert_float": convert}), (builder, built)]
    _before = [*ours, *((owner, dict(vars(owner))) for owner in owners)]
    upstream._convert_float = lambda *args: _convert_float(*args, otherwise=convert)
    builder.create_fma = lambda *args: _create_fma(*args, otherwise=fma)
    builder.create_dot = lambda *args: _create_dot(*args, otherwise=dot)
    builder.create_masked_load = lambda *args, **more: memory.load(*args, otherwise=load, **more)
    builder.create_masked_store = lambda *args, **more: memory.store(*args, otherwise=store, **more)


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
        """Launch; Outside where it reached for memory that is no tensor's of its own."""
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        named = {name: getattr(t, "base", t) for name, t in named.items()}  # of a TMA descriptor, its tensor
        memory = Memory({name: t for name, t in named.items() if hasattr(t, "untyped_storage")})
        launch = super().run
        result = exactly(memory, lambda: launch(*args, grid=grid, warmup=warmup, **kwargs))
        if memory.fault is not None:
            raise Outside(memory.fault)
        return result


def exactly(memory: Any, run: Callable[[], Any]) -> Any:
    """Run what interprets a kernel, under exact rounding, with every access through the memory's `load` and `store`."""
    # In one line: an interrupt between two lines, which a debugger may raise, could leave the lock held.
    with _LOCK: return _alone_exactly(memory, run)  # fmt: skip  # noqa: E701


def _alone_exactly(memory: Any, run: Callable[[], Any]) -> Any:
    _put_back()  # what an interrupted launch has left
    try:
        _stand_in(memory)
        # inf - inf is data here, not a mistake
        with np.errstate(all="ignore"): return run()  # fmt: skip  # noqa: E701
    finally:
        _put_back()
