"""Whether a tensor may be written into, as nobody else holds it: asked before an op is run in place."""

from __future__ import annotations

from sys import getrefcount
from typing import Any
from weakref import getweakrefcount

import torch
from torch import Tensor

from bitfuse.core.launch import strides

_Holders = tuple[int, int, int, int, int, int, bool]
_STRIDED, _uses = torch.strided, torch._C._storage_Use_Count
_uses_of: Any = Tensor._use_count  # type: ignore[attr-defined]  # its stubs don't have it (torch 2.11 to 2.15)


def alone(t: Tensor) -> bool:
    """Whether nobody but the caller's one variable holds this tensor or its memory, so that it may be written into.

    t    any tensor, whichever code has made it; False where it is not a plain one, dense in its memory, that PyTorch
         lets everybody write into

    `F.linear` of three dimensions returns a view of what it computed, of which that view is to be the only holder.
    Memory that PyTorch has from somebody else (numpy, DLPack, a library's buffer) can't be resized, and may be theirs;
    and what is shared with another process may be read there.

    It must also lie in its memory as a new tensor of its shape does: from its first element on, with the same strides,
    those of dimensions of one element as well. A matrix product that reads it next is chosen by both.
    """
    if type(t) is not Tensor or t.layout is not _STRIDED or t.is_nested or not t.is_contiguous():
        return False
    if t.requires_grad or (t.is_inference() and not torch.is_inference_mode_enabled()):  # as some wrapper made it
        return False
    if t.data_ptr() % 16 or t.storage_offset() or t.stride() != strides(t):
        return False
    if getrefcount(t) > _of_a_variable():
        return False
    return _holders(t) in _ALONE and not (t.is_cpu and t.untyped_storage().is_shared())


def _holders(t: Tensor) -> _Holders:
    """How many hold its memory, in C++ and in Python (`untyped_storage()` gives everybody one object); the tensor that
    it is a view of, in Python and in C++ (a buffer of TorchScript's, say); any of these weakly; and whose memory it is.
    """
    memory, base = t.untyped_storage(), t._base
    weakly = getweakrefcount(t) + getweakrefcount(memory)
    views, in_cpp = 0, 0
    if base is not None:
        views, in_cpp, weakly = getrefcount(base), _uses_of(base), weakly + getweakrefcount(base)
    return _uses(memory._cdata), getrefcount(memory), views, in_cpp, _uses_of(t), weakly, memory.resizable()


def _of_a_variable() -> int:
    """How many references a function counts to what it is given, where a variable of its caller is all that holds it.

    Asked each time: while Dynamo evaluates a process' frames, which it goes on doing after a compilation that has ended
    in an error (torch 2.13), Python keeps what is handed to a function once more until the call ends. 0.1 us.
    """
    held = object()
    return _counted(held)


def _counted(given: object) -> int:
    return getrefcount(given)


def _calibrate() -> tuple[_Holders, _Holders]:
    """What `alone` sees of tensors that one variable holds: versions of Python and PyTorch count in different ways."""
    with torch.no_grad():
        fresh, view = torch.empty(2, device="cpu"), torch.empty(2, device="cpu").view(1, 2)
    return _holders(fresh), _holders(view)


_ALONE = _calibrate()
