"""Whether a tensor may be written into, as nobody else holds it: asked before an op is run in place."""

from __future__ import annotations

from sys import getrefcount
from weakref import getweakrefcount

import torch
from torch import Tensor

_Holders = tuple[int, int, int, int, bool]
_STRIDED, _uses = torch.strided, torch._C._storage_Use_Count


def alone(t: Tensor) -> bool:
    """Whether nobody but the caller's one variable holds this tensor or its memory, so that it may be written into.

    t    any tensor, whichever code has made it; False where it is not a plain one, dense in its memory, that PyTorch
         lets everybody write into

    `F.linear` of three dimensions returns a view of what it computed, of which that view is to be the only holder.
    Memory that PyTorch has from somebody else (numpy, DLPack, a library's buffer) can't be resized, and may be theirs.
    """
    if type(t) is not Tensor or t.layout is not _STRIDED or not t.is_contiguous():
        return False
    if t.requires_grad or (t.is_inference() and not torch.is_inference_mode_enabled()):  # as some wrapper made it
        return False
    return _holders(t) in _ALONE and getrefcount(t) <= _REFERENCES


def _holders(t: Tensor) -> _Holders:
    """How many hold its memory, in C++ and in Python (`untyped_storage()` gives everybody one object); the tensor that
    it is a view of, in Python; t, weakly; and whose memory it is."""
    memory, base = t.untyped_storage(), t._base
    views = 0 if base is None else getrefcount(base)
    return _uses(memory._cdata), getrefcount(memory), views, getweakrefcount(t), memory.resizable()


def _calibrate() -> tuple[int, tuple[_Holders, _Holders]]:
    """What `alone` sees of tensors that one variable holds: versions of Python and PyTorch count in different ways."""

    def references(t: Tensor) -> int:
        return getrefcount(t)

    with torch.no_grad():
        fresh, view = torch.empty(2, device="cpu"), torch.empty(2, device="cpu").view(1, 2)
    return references(fresh), (_holders(fresh), _holders(view))


_REFERENCES, _ALONE = _calibrate()
