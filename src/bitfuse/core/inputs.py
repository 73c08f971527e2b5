"""Memory for proofs: outputs between guard zones of poison, and whether anything was written around them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.bits import BITS, Mismatch

# A NaN no kernel writes, by element size: an output element left unwritten can't pass for a right one
_POISON = {2: 0x7FA5, 4: 0x7FA5A5A5, 8: 0x7FF5A5A5A5A5A5A5}
# Elements of poison before and after what a battery hands to a kernel: two rows of the widest operator
GUARD = 1 << 14


def poisoned(t: Tensor) -> Tensor:
    """Fill with a NaN pattern, in place."""
    if t.numel():
        t.view(BITS[t.element_size()]).fill_(_POISON[t.element_size()])
    return t


def guarded(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device, offset: int = 0
) -> Tensor:
    """A tensor of poison between guard zones of poison, all one allocation. It starts `offset` elements after where
    an allocation of its own would, which is aligned to more than 16 bytes."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    whole = poisoned(torch.empty(GUARD + offset + span + GUARD, dtype=dtype, device=device))
    return whole.as_strided(shape, strides, GUARD + offset)


def trespass(outs: tuple[Tensor, ...]) -> Mismatch | None:
    """Whether something was written around guarded outputs, or between their elements. Poisons them again."""
    for number, out in enumerate(outs):
        first = out.storage_offset()
        whole = torch.empty(0, dtype=out.dtype, device=out.device).set_(out.untyped_storage())
        poisoned(out)
        written = whole.view(BITS[out.element_size()]) != _POISON[out.element_size()]
        if count := int(written.sum()):
            at = int(written.to(torch.uint8).argmax()) - first
            last = sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True))
            place = (
                f"{-at} elements before its start" if at < 0
                else f"{at - last} elements after its end" if at > last
                else f"between its elements, {at} from its start"
            )  # fmt: skip
            sentence = f"output {number}: {count} elements are written that are not its own, the first {place}"
            return Mismatch(sentence, count=count, output=number)
    return None


def kept(args: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    """(bytes of the memory that a tensor stands in, a copy of them), of each tensor among the arguments."""
    storages = {a.untyped_storage().data_ptr(): a.untyped_storage() for a in args if isinstance(a, Tensor)}
    whole = [torch.empty(0, dtype=torch.uint8, device=s.device).set_(s) for s in storages.values()]
    return [(t, t.clone()) for t in whole]


def changed(before: list[tuple[Tensor, Tensor]]) -> Mismatch | None:
    """Whether a launch has written into its arguments."""
    for now, earlier in before:
        if not torch.equal(now, earlier):
            return Mismatch(f"the launch has written into its arguments, {int((now != earlier).sum())} bytes")
    return None
