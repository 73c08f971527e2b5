"""Whether a tensor may be written into, as nobody else holds it: asked before an op is run in place."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def alone(t: Tensor) -> bool:
    """Whether nobody but the caller's one variable holds this tensor or its memory, so that it may be written into.

    `F.linear` of three dimensions returns a view of what it computed, of which that view is to be the only holder.
    """
    return _holders(t) == _ALONE[t._base is not None] and sys.getrefcount(t) <= _REFERENCES


def _holders(t: Tensor) -> tuple[int, int]:
    """How many hold its memory, in C++, and the tensor that it is a view of, in Python."""
    memory = torch._C._storage_Use_Count(t.untyped_storage()._cdata)
    return memory, 0 if t._base is None else sys.getrefcount(t._base)


def _calibrate() -> tuple[int, tuple[tuple[int, int], tuple[int, int]]]:
    """What `alone` sees of tensors that one variable holds: versions of Python and PyTorch count in different ways."""

    def references(t: Tensor) -> int:
        return sys.getrefcount(t)

    with torch.no_grad():
        fresh, view = torch.empty(2, device="cpu"), torch.empty(2, device="cpu").view(1, 2)
    return references(fresh), (_holders(fresh), _holders(view))


_REFERENCES, _ALONE = _calibrate()
