"""How two tensors differ: digests, distances in units in the last place, and a histogram of them.

NaN counts as equal to NaN, as in `compare`, which decides whether two tensors are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfuse.core.bits import BITS, compare, differing

_CHUNK = 1 << 24  # elements looked at together: a few int64 temporaries of 128 MiB, however large the tensor is
_SIGNED = BITS | {1: torch.int8}  # by element size, as an order of floating-point numbers by their bits needs them
_BAR = 40  # characters of the longest bar of a histogram


@dataclass(frozen=True)
class Bits:
    """How two tensors of one dtype and shape differ.

    index             of the first element that differs (for a complex dtype, in `torch.view_as_real`)
    expected, found   that element's bits as hex digits, and as decimal numbers in expected_value, found_value
    ulps              found minus expected in units in the last place; None where one of them is NaN
    differing         elements that differ, of `elements`
    histogram         how many of them are how far apart: {"1": 12, "2": 3, "3 to 4": 1, "NaN in one": 2}
    """

    index: tuple[int, ...]
    expected: str
    found: str
    expected_value: str
    found_value: str
    ulps: int | None
    differing: int
    elements: int
    histogram: dict[str, int]

    def __str__(self) -> str:
        width, most = max(map(len, self.histogram)), max(self.histogram.values())
        return "\n".join(
            [
                f"the first element that differs: [{', '.join(map(str, self.index))}]",
                f"  expected {self.expected} = {self.expected_value}",
                f"  found    {self.found} = {self.found_value}, {_distance(self.ulps)}",
                f"{self.differing} of {self.elements} elements differ; by how many units in the last place:",
                *(
                    f"  {label:>{width}} {'#' * max(1, round(_BAR * count / most))} {count}"
                    for label, count in self.histogram.items()
                ),
            ]
        )


def _distance(ulps: int | None) -> str:
    if ulps is None:
        return "NaN in one of them"
    if ulps == 0:
        return "the zero of the other sign"
    return f"{abs(ulps)} unit{'s' if abs(ulps) > 1 else ''} in the last place {'above' if ulps > 0 else 'below'}"


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal pieces of tensors of one shape, flat, `_CHUNK` elements at a time; complex ones as their real view."""
    flat = [(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).reshape(-1) for t in tensors]
    for start in range(0, flat[0].numel(), _CHUNK):
        yield tuple(t[start : start + _CHUNK] for t in flat)


def _integers(t: Tensor) -> Tensor:
    """The bits of each element, as an int64 that has the sign of theirs."""
    return t.contiguous().view(_SIGNED[t.element_size()]).to(torch.int64)


def _bits(t: Tensor) -> Tensor:
    """As int64, every NaN as one that no other value has the bits of."""
    bits = _integers(t)
    return bits.masked_fill(t.isnan(), 0x7FF8 << 48) if t.is_floating_point() else bits


def _signed(value: int) -> int:
    return value - (1 << 64)


_STEP, _MIX, _MIX_AGAIN = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def digest(t: Tensor) -> Tensor:
    """64 bits that tell its elements from others': a 0-d int64 tensor on its device, without waiting for it.

    Each element's bits and its position go through a one-to-one mix of 64 bits (splitmix64's) and are added up, so that
    a change of one element always shows, one of several is missed once in 2^64, and neither the strides nor the device
    matter. A dense tensor of any dtype, of which 16 million elements are looked at together.
    """
    t = t.detach()
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    start = 0
    for (piece,) in _pieces(t.resolve_neg()):
        x = torch.arange(start, start + piece.numel(), dtype=torch.int64, device=t.device)
        x.mul_(_STEP).add_(_bits(piece))
        for shift, factor in ((30, _MIX), (27, _MIX_AGAIN), (31, 1)):
            x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
        total += x.sum()
        start += piece.numel()
    return total


def sha256(*tensors: Tensor) -> str:
    """Of the bytes of all these tensors, each in the order of its indices: for people and documents."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def ulps(expected: Tensor, found: Tensor) -> Tensor:
    """found - expected in units in the last place, elementwise: an int64 tensor of the same shape.

    Both of one floating dtype and shape, without NaN: steps from one representable number to the next, where +0 and -0
    are one number and infinity is the one after the largest. Of an integer dtype the difference. What doesn't fit in
    int64 is its largest or smallest value.
    """
    a, b = (_rank(t) for t in (expected, found))
    difference = b - a
    over = ((a ^ b) & (b ^ difference)) < 0  # signs that differ, and the result has lost b's
    limits = torch.iinfo(torch.int64)
    return torch.where(over, torch.where(b < 0, limits.min, limits.max), difference)


def _rank(t: Tensor) -> Tensor:
    """How many steps from zero."""
    if not t.is_floating_point():
        return t.to(torch.int64)
    bits = _integers(t)
    smallest = -(1 << (8 * t.element_size() - 1))  # the sign's bit alone: -0
    return torch.where(bits < 0, smallest - bits, bits)


def difference(expected: Tensor, found: Tensor) -> tuple[Bits | None, str]:
    """How two dense tensors on the CPU differ, or a sentence where it is in dtype or shape; neither if they don't."""
    if expected.is_complex() and expected.dtype == found.dtype:
        expected, found = torch.view_as_real(expected), torch.view_as_real(found)
    mismatch = compare(expected, found)
    if mismatch is None:
        return None, ""
    if not mismatch.count:
        return None, mismatch.sentence
    counts, unlike = torch.zeros(65, dtype=torch.int64), 0
    for a, b in _pieces(expected, found):
        differs = differing(a, b)
        a, b = a[differs], b[differs]
        if a.is_floating_point():
            numbers = ~(a.isnan() | b.isnan())
            unlike += int((~numbers).sum())
            a, b = a[numbers], b[numbers]
        counts += _by_distance(ulps(a, b))
    histogram = {_label(i): count for i, count in enumerate(counts.tolist()) if count}
    a, b = expected[mismatch.index], found[mismatch.index]
    nan = a.is_floating_point() and bool(a.isnan() | b.isnan())
    bits = Bits(
        index=mismatch.index,
        expected=mismatch.expected,
        found=mismatch.found,
        expected_value=repr(a.item()),
        found_value=repr(b.item()),
        ulps=None if nan else int(ulps(a, b)),
        differing=mismatch.count,
        elements=expected.numel(),
        histogram=histogram | ({"NaN in one": unlike} if unlike else {}),
    )
    return bits, ""


def _by_distance(distances: Tensor) -> Tensor:
    """How many are 0, 1, 2, 3 to 4, 5 to 8, ... apart."""
    sizes = distances.clamp(min=-torch.iinfo(torch.int64).max).abs()
    limits = torch.tensor([0, *(1 << i for i in range(63))], dtype=torch.int64)
    return torch.bincount(torch.bucketize(sizes, limits), minlength=65)


def _label(i: int) -> str:
    return str((0, 1, 2)[i]) if i < 3 else f"{(1 << (i - 2)) + 1} to {1 << (i - 1)}"
