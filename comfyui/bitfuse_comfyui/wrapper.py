# SPDX-License-Identifier: GPL-3.0-or-later
"""bitfuse for the duration of one forward of the model: what a node adds to a clone of a ModelPatcher.

All clones of a ModelPatcher, in whichever branch of a workflow, share one set of modules. So nothing of bitfuse stays
in a module: before a forward of a branch with the node, forwards of ours are put into blocks and attentions, and after
it they are taken out again, whatever has happened. What another node has put in the place of a block's or an
attention's forward stays there, and the rest is fused.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from bitfuse.hosts.handle import Handle, Options
from bitfuse.hosts.part import ModelForward, Part
from bitfuse.run.swap import Forward, bound

from . import adapter, upstream

KEY = "bitfuse"
"""Of the wrapper, and of the attachment by which a report finds it."""
REPLACED = "another node has replaced this forward, and is left in place"


_placing = threading.RLock()
"""Of all that puts forwards into a model or takes them out: nodes in several branches may run one model at once."""


class Parked(Handle):
    """An acceleration whose forwards stand in the model inside `with standing():` only.

    around    what a forward of the whole model is run in
    """

    def __init__(self, host: str, options: Options):
        super().__init__(host, options)
        self.around: Any = None
        self._forwards: list[Forward] = []  # which hold their modules weakly
        self._standing: list[tuple[dict[str, Any], Forward, Any]] = []
        self._inside = 0

    def put(self, module: Any, ours: Forward) -> None:
        if isinstance(ours, ModelForward):
            self.around = ours
            return
        self._forwards.append(ours)
        self._place(ours)

    def take_back(self, ours: Forward) -> None:
        self._forwards = [one for one in self._forwards if one is not ours]
        for held, one, had in self._standing:
            if one is ours:
                _take_out(held, one, had)

    @property
    def under_way(self) -> bool:
        return self._inside > 0

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """While this block is entered, by any number of threads, the forwards stand in the model."""
        entered = False
        try:
            with _placing:
                self._inside += 1
                entered = True
                for ours in tuple(self._forwards) if self._inside == 1 else ():
                    self._place(ours)
            yield
        finally:
            with _placing:
                self._inside -= entered
                if self._inside == 0:
                    self.clear()

    def _place(self, ours: Forward) -> None:
        module = ours.module
        held = module.__dict__
        had = held.get(ours.method)
        # An object patch that was taken back leaves a bound method of the class's own, which is what stock runs
        if had is None or had == bound(module, ours.method):
            self._standing.append((held, ours, had))
            held[ours.method] = ours
        elif isinstance(ours, Part):
            ours.fall(REPLACED)

    def forget(self) -> None:
        """Of a model or a node that is gone: let go of what knew modules, without waiting for Python's collector."""
        self._forwards.clear()
        self._standing.clear()
        self._put.clear()

    def clear(self) -> None:
        """Take all forwards of ours out of the model, and put back what was there. Safe to call again."""
        while self._standing:
            _take_out(*self._standing[-1])
            self._standing.pop()


def _let_go(of: Iterable[weakref.ref[Parked]]) -> None:
    """Forget those that are left. It holds none of them: they would live as long as their models do."""
    for reference in tuple(of):
        if (parked := reference()) is not None and not parked.under_way:
            parked.forget()


def _take_out(held: dict[str, Any], ours: Forward, had: Any) -> None:
    if held.get(ours.method) is not ours:
        return
    if had is None:
        del held[ours.method]
    else:
        held[ours.method] = had


_last_at_work: weakref.WeakKeyDictionary[Any, weakref.ref[Parked]] = weakref.WeakKeyDictionary()  # by model


class Wrapper:
    """A `DIFFUSION_MODEL` wrapper. One serves all clones of the patcher that it was added to, on whichever devices."""

    def __init__(self, options: Options):
        self.options = options
        self._of: weakref.WeakKeyDictionary[Any, Parked] = weakref.WeakKeyDictionary()
        self._made: list[weakref.ref[Parked]] = []
        weakref.finalize(self, _let_go, self._made).atexit = False

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        model = executor.class_obj
        if torch.compiler.is_compiling() or not isinstance(model, upstream.av_model.LTXAVModel):
            return executor(*args, **kwargs)
        with contextlib.ExitStack() as entered:
            with _placing:
                parked = self._at_work(model)
                if parked is not None:
                    entered.enter_context(parked.standing())
            if parked is None or parked.around is None:
                return executor(*args, **kwargs)
            return parked.around.around(executor, *args, **kwargs)

    def _at_work(self, model: Any) -> Parked | None:
        """Whose forwards run this model now: another node's, while they stand in it; None: `bitfuse.accelerate`'s."""
        last = _last_at_work.get(model)
        if last is not None and (other := last()) is not None and other.under_way:
            return other
        if isinstance(vars(model).get(adapter.Blocks.method), Forward):
            return None
        found = self.of(model)
        _last_at_work[model] = weakref.ref(found)
        return found

    def of(self, model: Any) -> Parked:
        """What was prepared for this model; at the first call it is. `NotFused` where all must be fused and is not."""
        with _placing:
            if (found := self._of.get(model)) is None:
                found = self._of[model] = _prepared(model, self.options)
                self._made.append(weakref.ref(found))
                weakref.finalize(model, _let_go, [weakref.ref(found)]).atexit = False
            return found

    @property
    def prepared(self) -> list[Parked]:
        """What was prepared for each model that has run with this node."""
        return list(self._of.values())

    def report(self) -> str:
        """What was fused and what was not, and why, so far."""
        found = [str(parked.report()) for parked in self.prepared]
        return "\n\n".join(found) or "bitfuse: no forward of the model has run with this node yet"

    def release(self, patcher: Any = None, unpatch_all: bool = True) -> None:
        """Give back the memory of CUDA graphs: ComfyUI takes the model off the device.

        It says so of each clone that Python frees, too, at whichever moment (`unpatch_all` is False then).
        """
        for parked in self.prepared if unpatch_all else ():
            for graph in parked.graphs if not parked.under_way else ():
                graph.reset()


def _prepared(model: Any, options: Options) -> Parked:
    """Forwards of ours for each block and attention, as if no other node had its own there: those come and go."""
    parked, others = Parked(adapter.NAME, options), []
    try:
        for module in model.modules():
            if isinstance(module, adapter.TAKEN_OVER) and (had := vars(module).pop("forward", None)) is not None:
                others.append((vars(module), had))
        adapter.accelerate(model, parked)
        parked.watch_sites()
    finally:
        parked.clear()
        for held, had in others:
            held["forward"] = had
    return parked


def _clone(patcher: Any, *, fixed: bool) -> Any:
    """A clone of the patcher; `fixed`: whose weights keep their places, where that can be had.

    By default ComfyUI streams the weights of a model (dynamic VRAM), and no graph can hold their addresses. What it
    loads for its own torch.compile node is a model without that, from the same file.
    """
    if fixed and getattr(patcher, "is_dynamic", bool)():
        with contextlib.suppress(RuntimeError):  # it does not know the file; then a report says why there is no graph
            return patcher.clone(disable_dynamic=True)
    return patcher.clone()


def attach(patcher: Any, options: Options) -> Any:
    """A clone of the patcher whose forwards run with bitfuse. ValueError where it is no LTX-2 model's."""
    import comfy.patcher_extension as extension

    model = patcher.model.diffusion_model
    if not isinstance(model, upstream.av_model.LTXAVModel):
        raise ValueError(f"model is a {type(model).__name__}; accepted: an LTX-2 model, whose class is LTXAVModel")
    clone, wrapper = _clone(patcher, fixed=options.cuda_graph), Wrapper(options)
    kind, when = extension.WrappersMP.DIFFUSION_MODEL, extension.CallbacksMP.ON_DETACH
    clone.remove_wrappers_with_key(kind, KEY)  # of a node before this one
    clone.remove_callbacks_with_key(when, KEY)
    clone.add_wrapper_with_key(kind, KEY, wrapper)
    clone.add_callback_with_key(when, KEY, wrapper.release)
    clone.set_attachments(KEY, wrapper)
    return clone
