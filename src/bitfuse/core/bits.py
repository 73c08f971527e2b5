"""Bits: whether two results are the same to the last one, and where they part first."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]
"""What a reference returns: a tensor, or a tuple of two or more."""

Part = tuple[int, tuple[slice, ...], Tensor]
"""A piece of a result: of which output, where in it, and what is expected there."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size: integers of as many bytes


@dataclass(frozen=True)
class Mismatch:
    """Where two results part: a difference of form (dtype, shape, strides, device), or of bits and where first.

    `output` is the one of several that differs, the first of those that do.
    """

    sentence: str
    index: tuple[int, ...] = ()
    expected: str = ""
    found: str = ""
    count: int = 0
    output: int = 0


class Outside(Exception):
    """A launch in the interpreter reached for memory that none of its tensors has; nothing was touched there."""


def as_tuple(result: Outputs) -> tuple[Tensor, ...]:
    """The outputs of a reference, of which there may be one or several."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def compare(expected: Outputs, found: Outputs) -> Mismatch | None:
    """None when `found` is `expected` bit for bit: same dtype, shape, strides and device, and the same bits.

    Compared on integer views, so -0 and +0 differ; an element is NaN in one exactly where it is NaN in the
    other (the payload of a NaN is not defined by PyTorch itself and is not compared). Any dtype of 1 to 8
    bytes, any strides. Of tuples of tensors, each is compared. Waits for the device. TypeError for anything else.
    """
    for name, given in (("expected", expected), ("found", found)):
        several: Any = (given,) if isinstance(given, Tensor) else given
        if not isinstance(several, (tuple, list)):
            raise TypeError(f"{name} is {_kind(given)}; accepted: a tensor, or a tuple of tensors")
        for i, one in enumerate(several):
            if not isinstance(one, Tensor):
                raise TypeError(f"{name}[{i}] is {_kind(one)}; accepted: a tensor, or a tuple of tensors")
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        return _compare(expected, found)
    several, others = as_tuple(expected), as_tuple(found)
    if isinstance(expected, Tensor) or isinstance(found, Tensor) or len(several) != len(others):
        return Mismatch(f"there are {len(others)} outputs where the reference has {len(several)}")
    for i, (a, b) in enumerate(zip(several, others, strict=True)):
        if mismatch := _compare(a, b):
            return of_output(i, mismatch)
    return None


def compare_parts(parts: Iterable[Part], found: tuple[Tensor, ...]) -> Mismatch | None:
    """`compare` for an expected result that comes in pieces, each let go of before the next is made: the dtype, the
    shape and the bits of each, not the strides. The index and the counts of a mismatch are those of its piece."""
    for number, place, expected in parts:
        part = found[number][place]
        if (mismatch := _of_part(expected, part)) is not None:
            starts = [of.start or 0 for of in place]
            if any(starts):
                mismatch = replace(mismatch, sentence=f"{mismatch.sentence}, in the piece from {starts} on")
            return of_output(number, mismatch) if len(found) > 1 else mismatch
        del expected, part
    return None


def _of_part(expected: Tensor, found: Tensor) -> Mismatch | None:
    for what in ("dtype", "shape", "device"):
        a, b = getattr(expected, what), getattr(found, what)
        if a != b:
            return Mismatch(f"the {what} is {b} where the reference has {a}")
    return None if _alike(expected, found) else _difference(expected, found)


def _alike(expected: Tensor, found: Tensor) -> bool:
    """Whether all bits are equal, those of NaN too: the quick answer, of one op where `_difference` has ten."""
    bits = BITS[expected.element_size()]
    return torch.equal(expected.view(bits), found.view(bits))


def _kind(given: object) -> str:
    """What a value is that is no tensor, in words."""
    kind = type(given)
    return "None" if given is None else f"a {kind.__module__}.{kind.__qualname__}".replace("a builtins.", "a ")


def of_output(i: int, mismatch: Mismatch) -> Mismatch:
    """The mismatch, said of one output of several."""
    which = f"output {i}" if mismatch.count else f"of output {i}"
    return replace(mismatch, sentence=f"{which} {mismatch.sentence}", output=i)


def form_mismatch(expected: Tensor, found: Tensor) -> Mismatch | None:
    """What differs but for the bits: dtype, shape, device or strides. Doesn't wait for the device."""
    for what in ("dtype", "shape", "device"):
        a, b = getattr(expected, what), getattr(found, what)
        if a != b:
            return Mismatch(f"the {what} is {b} where the reference has {a}")
    if _strides(expected) != _strides(found):
        return Mismatch(f"the strides are {found.stride()} where the reference has {expected.stride()}")
    return None


def _compare(expected: Tensor, found: Tensor) -> Mismatch | None:
    if (mismatch := form_mismatch(expected, found)) is not None:
        return mismatch
    if BITS.get(expected.element_size()) is None:
        raise TypeError(f"expected and found are of {expected.dtype}; accepted: dtypes of 1, 2, 4 or 8 bytes")
    return None if _alike(expected, found) else _difference(expected, found)


def _difference(expected: Tensor, found: Tensor) -> Mismatch | None:
    differs = differing(expected, found)
    count = int(differs.sum())
    if not count:
        return None
    flat = int(differs.reshape(-1).to(torch.uint8).argmax())
    bits = BITS[expected.element_size()]
    index = tuple(flat // math.prod(expected.shape[dim + 1 :]) % n for dim, n in enumerate(expected.shape))
    a, b = (int(t[index].view(bits)) for t in (expected, found))
    return bits_mismatch(expected.shape, expected.element_size(), flat, a, b, count)


def differing(expected: Tensor, found: Tensor) -> Tensor:
    """Where the bits differ and not both are NaN, for two tensors of one dtype (of 1, 2, 4 or 8 bytes) and shape."""
    bits = BITS[expected.element_size()]
    differs = expected.view(bits) != found.view(bits)
    if expected.is_floating_point():
        differs &= ~(expected.isnan() & found.isnan())
    return differs


def bits_mismatch(shape: tuple[int, ...], size: int, flat: int, expected: int, found: int, count: int) -> Mismatch:
    """Of a tensor of this shape and element size in bytes: `count` elements differ, the first at the flat index.

    expected, found    its bits there, as integers of either sign
    """
    index = tuple(flat // math.prod(shape[dim + 1 :]) % n for dim, n in enumerate(shape))
    digits = 2 * size
    a, b = (f"0x{bits & (16**digits - 1):0{digits}x}" for bits in (expected, found))
    where = f"[{', '.join(map(str, index))}]"
    sentence = f"differs at {where}: {b} where the reference has {a} ({count} of {math.prod(shape)} elements)"
    return Mismatch(sentence, index, a, b, count)


def _strides(t: Tensor) -> tuple[int, ...]:
    """Strides that address anything: those of dimensions of size 0 and 1 say nothing."""
    return () if t.numel() == 0 else tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)
