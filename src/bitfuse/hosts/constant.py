"""What doesn't change from step to step, computed once: a result is kept while its inputs are the same.

"The same" means the same tensor object, of the same PyTorch version counter (every in-place op counts it up), and
weights of the same storage and version: a fact that costs no wait for the device. A write through `.data` counts up
no version and is not seen, so what depends on weights is kept only with `keep_text=True`. A result is dropped when its
input is freed, when two newer ones have come, and on `restore()`. Nothing is kept or used where a tensor has no version
counter (inference mode), a CUDA graph is captured (it must not remember an address that may be freed), or somebody
watches the ops.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef  # its storage's address is not given to another meanwhile

from bitfuse.contract import around
from bitfuse.hosts.patch import hooked

_KEPT = 2  # results of one function: the conditional and the unconditional prompt, say


class Constant:
    """Results of one function of one tensor, by the tensor. `hits` and `misses` count its calls."""

    def __init__(self) -> None:
        self._kept: list[tuple[weakref.ref, Hashable, Any]] = []
        self.hits = self.misses = 0

    def of(self, x: Tensor, extra: Hashable, compute: Callable[[], Any]) -> Any:
        """compute(), or what it gave for this tensor and this `extra` before. `extra` None: compute it."""
        stamp = None if extra is None else _stamp(x)
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if stamp is None or capturing or next(around(), None) is not None:
            return compute()
        root, key = stamp[0], (*stamp[1:], extra)
        for ref, kept_key, value in self._kept:
            if ref() is root and kept_key == key:
                self.hits += 1
                return value
        self.misses += 1
        value = compute()
        if not torch.is_grad_enabled():
            self._kept = [*self._kept[1 - _KEPT :], (weakref.ref(root, self._drop), key, value)]
        return value

    def clear(self) -> None:
        self._kept = []

    def _drop(self, dead: weakref.ref) -> None:
        self._kept = [entry for entry in self._kept if entry[0] is not dead]


def _stamp(x: Tensor) -> tuple[Tensor, Any, Any, Any, Any, Any] | None:
    """(the tensor that owns the memory, its version, which part of it x is), or None where that can't be told."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.is_inference():
        return None
    root = x if x._base is None else x._base
    return root, x._version, x.storage_offset(), x.shape, x.stride(), x.dtype


def weights(*linears: Any) -> Hashable:
    """What the result of these linear layers depends on besides their input; None where one can't be looked into."""
    found: list[Hashable] = []
    for linear in linears:
        if type(linear) is not torch.nn.Linear or hooked(linear):
            return None
        for p in (linear.weight, linear.bias):
            if p is not None and (type(p) is not torch.nn.Parameter or p.is_inference()):
                return None
            found.append(None if p is None else (StorageWeakRef(p.untyped_storage()), p.storage_offset(), p._version))
    return tuple(found)
