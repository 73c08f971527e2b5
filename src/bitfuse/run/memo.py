"""What doesn't change from step to step, computed once: a result is kept while its inputs are the same.

"The same" means the same tensor object at the same address, of the same PyTorch version counter (every in-place op
counts it up), and weights of the same storage and version: a fact that costs no wait for the device. It is not the
whole truth: writes through `.data`, numpy, DLPack, shared memory and `torch.distributed.broadcast` count up no version,
nor do FSDP2's, beside which nothing is kept.
So nothing is kept by default; what is here serves `keep_text=True`, where the user says that there are no such writes.
A result is dropped when its input is freed, when it was written into, when two newer ones have come, and on
`restore()`. Nothing is kept or used where a tensor has no version counter (inference mode), a CUDA graph is captured
(it must not remember an address that may be freed), or somebody watches the ops. For graphs there is `Prelude`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef  # its storage's address is not given to another meanwhile

from bitfuse.core.bits import as_tuple
from bitfuse.core.conditions import around, watched
from bitfuse.run.swap import hooked, named
from bitfuse.run.twin import flat, stand_in

_KEPT = 2  # results of one function: the conditional and the unconditional prompt, say
_here = threading.local()  # .prelude: the one in use in this thread, for a model may be called in another meanwhile


class Unknown(str):
    """Why it can't be told what a result depends on."""

    __slots__ = ()


def _nobody(reason: str) -> None:
    pass


class Constant:
    """Results of one function of one tensor, by the tensor. `hits` and `misses` count its calls.

    fall    told why a result is computed that was to be kept (`run.extra.Extra.fall`); not of a first call's
    """

    def __init__(self, fall: Callable[[str], None] = _nobody) -> None:
        self._kept: list[tuple[weakref.ref, Hashable, Hashable, Any, tuple[int, ...]]] = []
        self.hits = self.misses = 0
        self.fall = fall

    @classmethod
    def until_restored(cls, handle: Any, fall: Callable[[str], None] = _nobody) -> Constant:
        """A new one, which is emptied when the handle is restored; the handle does not keep it alive."""
        constant = cls(fall)
        clear = weakref.WeakMethod(constant.clear)
        handle.on_restore(lambda: (found := clear()) is not None and found())
        return constant

    def of(self, x: Tensor, depends: Callable[[], Hashable], compute: Callable[[Tensor], Any]) -> Any:
        """compute(x), or what it gave before for this tensor, while it depended on the same besides.

        depends    tells what that is now, or `Unknown`: then it is computed
        compute    a function of x alone, and of what `depends` tells
        """
        prelude: Prelude | None = getattr(_here, "prelude", None)
        if prelude is not None and (handed := prelude.handed_out(self, x)) is not None:
            return handed
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return compute(x)
        reason = next(around(), None) if watched() else None
        stamp, extra = _stamp(x), depends()
        if stamp is None or reason is not None or type(extra) is Unknown:
            self.fall(reason or (_NO_STAMP if stamp is None else str(extra)))
            return compute(x)
        value = self._kept_or_computed(stamp, extra, x, compute)
        if prelude is not None:
            prelude.note(_Noted(self, x, depends, extra, compute, value, []))
        return value

    def _kept_or_computed(self, stamp: tuple, extra: Hashable, x: Tensor, compute: Callable[[Tensor], Any]) -> Any:
        root, part = stamp[0], stamp[1:]
        others = []
        for entry in self._kept:
            ref, seen, kept_extra, value, versions = entry
            if ref() is not root or seen != part:
                others.append(entry)
            elif kept_extra == extra and _versions(value) == versions:
                self.hits += 1
                return value
        self.misses += 1
        if len(others) < len(self._kept):  # what was kept of this text is wrong now, and may stay so
            self._kept = others
            self.fall(_CHANGED)
        value = compute(x)
        if torch.is_grad_enabled():
            self.fall("gradients are enabled; torch.no_grad() allows it")
        else:
            entry = (weakref.ref(root, self._drop), part, extra, value, _versions(value))
            self._kept = [*self._kept[1 - _KEPT :], entry]
        return value

    def clear(self) -> None:
        self._kept = []

    def _drop(self, dead: weakref.ref) -> None:
        self._kept = [entry for entry in self._kept if entry[0] is not dead]


def _versions(value: Any) -> tuple[int, ...]:
    """How often each tensor of a result was written into."""
    return tuple(t._version for t in as_tuple(value) if not t.is_inference())


def _stamp(x: Tensor) -> tuple[Tensor, Any, Any, Any, Any, Any, Any] | None:
    """(the tensor that owns the memory, its version, which part of it x is), or None where that can't be told."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.is_inference():
        return None
    root = x if x._base is None else x._base
    return root, x._version, x.data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype


_CHANGED = "its weights or what was kept of it were written to, or moved (offload moves weights at every call)"
HOOKED = "a linear layer of the text has a hook (offload, layerwise casting)"
_NO_STAMP = "the text is a tensor of a class of its own, or of inference mode, where PyTorch does not count writes"


class _Memory(StorageWeakRef):
    """Equal to the same memory, and to nothing else: the class itself takes whatever it is compared with for one of
    its kind, and of a layer that has lost its LoRA another form of key is compared."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return type(other) is _Memory and super().__eq__(other)

    __hash__ = StorageWeakRef.__hash__


def weights(*linears: Any) -> Hashable:
    """What the result of these linear layers depends on besides their input; `Unknown` where one can't be looked into.

    A weight may be a quantised one: a tensor of a class of its own that consists of plain ones, as it tells PyTorch
    itself (`__tensor_flatten__`, with all else that it is made by).
    """
    if _gathered():
        return Unknown("FSDP2 divides weights of a module in this process, and counts no version where it gathers them")
    found: list[Hashable] = []
    for linear in linears:
        if type(linear) is not torch.nn.Linear:
            return Unknown(f"a linear layer of the text is a {named(type(linear))}, not torch's own")
        if hooked(linear):
            return Unknown(HOOKED)
        for p in (linear.weight, linear.bias):
            if p is None:
                found.append(None)
            elif type(p) is torch.nn.Parameter and not p.is_inference():
                found.append((_Memory(p.untyped_storage()), p.storage_offset(), p._version))
            elif (parts := _parts(p)) is None:
                return Unknown(f"a weight for the text is a {named(type(p))}, which can't be looked into")
            else:
                found.append(parts)
    return tuple(found)


def _gathered() -> bool:
    """Whether a weight may be one that FSDP2 has gathered: it divides those of some module that is alive.

    It gathers a weight into the same parameter and storage before every forward and counts no version for it. Neither
    the weight nor its module tells: it may be a module around that one whose weights are divided (torch 2.13).
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None or not kind.__subclasses__():  # it derives a class from that of every module it divides
        return False
    alive = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None)
    return alive is None or any(isinstance(module, kind) for module in tuple(alive))


def _parts(t: Any) -> Hashable | None:
    """What a tensor consists of: the same where it is the same. None where that can't be told."""
    if type(t) in (Tensor, torch.nn.Parameter):
        if t.is_inference():
            return None
        return _Memory(t.untyped_storage()), t.storage_offset(), t.shape, t.stride(), t.dtype, t._version
    flatten = getattr(t, "__tensor_flatten__", None)
    if flatten is None:
        return None
    names, rest = flatten()
    parts = tuple(_parts(getattr(t, name)) for name in names)
    found = type(t), frozen(rest), parts
    try:
        hash(found)
    except TypeError:
        return None
    return None if None in parts else found


def frozen(value: Any) -> Any:
    """A value as one that hashes, and that equals only what is the same in every bit: 1 is not True, nor 0.0 -0.0."""
    if isinstance(value, dict):
        return dict, tuple((key, frozen(v)) for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(frozen, value))
    if isinstance(value, float):
        return type(value), repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), frozen(vars(value))
    return type(value), value


# -- beside a CUDA graph -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Noted:
    """One call of a `Constant`. `x`, `value` and `memory` are the forward's at first, then those that stay.

    extra    what `depends` told when the value was computed
    """

    constant: Constant
    x: Tensor
    depends: Callable[[], Hashable]
    extra: Hashable
    compute: Callable[[Tensor], Any]
    value: Any
    memory: list[Tensor]


class Prelude:
    """What a forward computes of arguments that are the same from step to step: for a graph of it, apart.

    A graph of the whole forward would compute that at every replay. So the calls of `Constant`s in an eager forward are
    noted (`noting`). Their results get memory that stays (`lay_out`), in which `fill` computes them: a graph of its
    own, to be replayed only when such an argument is another than the last time (`stale`). While the forward is
    captured, that memory is handed out (`serving`); a call that is not as noted is computed in its place.
    """

    def __init__(self) -> None:
        self.arguments: list[int] = []  # those that the noted calls read, by their position in `lay_out`
        self._calls: list[_Noted] = []
        self._results: dict[tuple, Any] | None = None  # that stay, by constant and x; None while they are noted
        self._filled: list[tuple] = []  # what the arguments were

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within, the calls of this thread's `Constant`s are noted; once they are laid out, results are handed out."""
        _here.prelude = self
        try:
            yield
        finally:
            _here.prelude = None

    def note(self, call: _Noted) -> None:
        if self._results is None and not torch.is_grad_enabled():
            self._calls.append(call)

    def handed_out(self, constant: Constant, x: Tensor) -> Any:
        return None if self._results is None else self._results.get((id(constant), *_place(x)))

    def lay_out(self, arguments: list[Tensor], own: list[Tensor]) -> None:
        """Give every noted result memory, and every noted x its place in that or in `own`, the graph's arguments.

        Calls of which x is a view of neither an argument nor an earlier result are dropped: they stay in the forward.
        """
        stay = [(i, argument, twin) for i, (argument, twin) in enumerate(zip(arguments, own, strict=True))]
        calls, self._calls = self._calls, []
        for call in calls:
            views = ((i, _same_view(call.x, was, twin)) for i, was, twin in stay)
            index, x = next(((i, view) for i, view in views if view is not None), (-1, None))
            if x is None:
                continue
            call.x = x
            if index >= 0 and index not in self.arguments:
                self.arguments.append(index)
            results = as_tuple(call.value)
            twins = [stand_in(t) for t in results]
            stay += [(-1, was, twin) for was, (twin, _) in zip(results, twins, strict=True)]
            call.memory = [memory for _, memory in twins]
            call.value = twins[0][0] if isinstance(call.value, Tensor) else tuple(twin for twin, _ in twins)
            call.constant.clear()  # kept here from now on
            self._calls.append(call)
        self._results = {(id(call.constant), *_place(call.x)): call.value for call in self._calls}

    def fill(self) -> list[Tensor]:
        """Compute every result from the arguments as they are now; the memory that holds them."""
        for call in self._calls:
            for memory, into, t in zip(call.memory, as_tuple(call.value), as_tuple(call.compute(call.x)), strict=True):
                if (t.shape, t.stride(), t.dtype) != (into.shape, into.stride(), into.dtype):
                    raise RuntimeError("what is the same at every step came out in another form")
                memory.copy_(flat(t))
        return [memory for call in self._calls for memory in call.memory]

    def stale(self, arguments: list[Tensor]) -> bool:
        """Whether an argument is another than when `filled` was called last."""
        now = [_stamp(arguments[i]) for i in self.arguments]
        return len(self._filled) != len(now) or not all(
            stamp is not None and ref() is stamp[0] and seen == stamp[1:]
            for (ref, seen), stamp in zip(self._filled, now, strict=True)
        )

    def outdated(self) -> bool:
        """Whether a weight was written to since the results were computed: they are `stale` then."""
        found = any(call.depends() != call.extra for call in self._calls)
        if found:
            self._filled = []
        return found

    def filled(self, arguments: list[Tensor]) -> None:
        for call in self._calls:
            call.extra = call.depends()
        stamps = [_stamp(arguments[i]) for i in self.arguments]
        self._filled = [(weakref.ref(stamp[0]), stamp[1:]) for stamp in stamps if stamp is not None]

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for call in self._calls for memory in call.memory)


def _place(x: Tensor) -> tuple:
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def _same_view(x: Tensor, of: Tensor, twin: Tensor) -> Tensor | None:
    """The view of `twin` that x is of its likeness `of`; None where x is none, or reaches beyond it."""
    roots = [t if t._base is None else t._base for t in (x, of)]
    at = x.storage_offset() - of.storage_offset()
    if roots[0] is not roots[1] or x.dtype != of.dtype or at < 0 or at + flat(x).numel() > flat(of).numel():
        return None
    return twin.as_strided(x.shape, x.stride(), twin.storage_offset() + at)
