"""Memory for proofs: guarded outputs, and tensors that look to a kernel like a user's own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.bits import BITS, Mismatch
from bitfuse.core.launch import strides

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
