"""The forwards of ours that stand in an accelerated model: what they share, and when each runs the host's own instead.

`Model` is what all of one model share: it looks, once per forward of the whole model, whether every function that they
leave out is still the one that was read. `ModelForward` stands in place of the whole model's forward and has it look;
`Part` of that of a block, an attention or an activation; `Seam` in an attribute that the host has for others to fill.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from bitfuse.core.originals import Originals
from bitfuse.hosts.handle import Handle
from bitfuse.hosts.rehearsal import Rehearsal
from bitfuse.hosts.site import NotFused, Site
from bitfuse.hosts.sources import CALLING_A_MODULE, Entry, own
from bitfuse.run.swap import Forward, bound, compiled_in, innermost, named, ours_in

ENDED = "the acceleration was restored"


class Model:
    """What the forwards that stand in one accelerated model share.

    left_out    the functions of the host and of PyTorch that the forwards of ours leave out, by the kind of part:
                (owner, name, what sentences call it). Whether each is still the one that was read is looked at once
                per forward of the whole model (in 4 us), and else at each call of a part
    """

    def __init__(self, handle: Handle, left_out: Mapping[str, Iterable[Entry]]):
        self.handle = handle
        self._left_out = {
            kind: {**dict(map(_keyed, CALLING_A_MODULE)), **dict(map(_keyed, entries))}
            for kind, entries in left_out.items()
        }
        every = {key: entry for entries in self._left_out.values() for key, entry in entries.items()}
        self._originals = Originals(every.values())
        self._foreign = self._find_foreign()
        self._here = threading.local()  # .forward: the latest of this thread, which may be over
        self._forwards: list[_UnderWay] = []
        self.parts = 0  # of ours that stand in it
        self.number = next(_numbers)
        self.traced = False  # by torch.compile, as a whole
        self.sites: Sequence[Site] = ()
        self._first_site = len(handle.sites)
        self._called: list[weakref.ref[Any]] = []  # the modules of which torch.compile may compile a call
        handle.models.append(self)
        _models[self.number] = self

    @property
    def under_way(self) -> bool:
        """Whether a forward of the whole model is under way, in any thread."""
        return any(forward.lock.locked() for forward in tuple(self._forwards))

    def begin(self, forward: _UnderWay) -> None:
        """Note a forward of the whole model, whose lock is held for as long as it is under way.

        A lock, since nothing else is sure to be given back when Ctrl-C comes between two lines.
        """
        self._forwards.append(forward)
        forward.reasons = self._look()
        self._here.forward = forward

    def end(self) -> None:
        """Forget the forwards that are over. A restore that has waited for them takes effect."""
        for forward in tuple(self._forwards):
            if not forward.lock.locked():
                with contextlib.suppress(ValueError):  # another thread was quicker
                    self._forwards.remove(forward)
        self.handle.settle()

    def add(self, module: weakref.ref[Any], sites: Sequence[Site]) -> None:
        """Note a module in which a part of ours is about to stand, with its sites."""
        self.parts += 1
        if sites:
            self._called.append(module)

    def take_over_is_done(self) -> None:
        self.sites = self.handle.sites[self._first_site :]

    def look_for_compiled(self, root: Any) -> None:
        """Leave to torch.compile what it has compiled since the last look. `NotFused` where that must be fused.

        Once per forward, in C: 23 us for the 336 blocks and attentions of 48 layers.
        """
        try:
            found = any(map(_COMPILED_CALL, map(weakref.ref.__call__, self._called)))
        except AttributeError:  # one of the modules was replaced, and is gone
            found = True
        if found:
            leave_to_compiler(root, self.handle)
            self._called = [r for r in self._called if (module := r()) is not None and not _COMPILED_CALL(module)]
            self.handle.insist()
        if (reason := self.why_not_compiled()) is not None:  # its compiled call has ended in this one
            raise NotFused(reason)

    def why_not_compiled(self) -> str | None:
        """What `NotFused` says where the whole model was compiled and a site of it must be fused."""
        strict = next((site for site in self.sites if site.strict), None) if self.traced else None
        return None if strict is None else f"{strict.name}: {compiled_sentence('model')}"

    def left_to_compiler(self) -> None:
        """Say of the sites of a model that was compiled as a whole, and is called in no other way, why none was."""
        for site in self.sites if self.traced else ():
            if site.state == "not called yet":
                site.declined = compiled_sentence("model")

    def reasons(self) -> dict[str, str]:
        """Why the parts of each kind must be the host's own, those called now; empty: none must."""
        forward = getattr(self._here, "forward", None)
        return forward.reasons if forward is not None and forward.lock.locked() else self._look()

    def why_stock(self, kind: str) -> str | None:
        """Why a part of this kind called now must be the host's own; `ENDED` is a reason that nobody is told."""
        reasons = self.reasons()
        return reasons.get(kind) if reasons else None

    def _look(self) -> dict[str, str]:
        if not self.handle.on:
            return dict.fromkeys(self._left_out, ENDED)
        if self._originals.difference() is None and not self._foreign:
            return _NO_REASONS
        self._foreign = self._find_foreign()
        if not self._foreign:  # the own ones are back
            self._originals = Originals(self._originals.entries)
        return {
            kind: f"{label} was replaced: what stands there is not the code that bitfuse stands in for"
            for kind, entries in self._left_out.items()
            for label in [next((label for key, (_, _, label) in entries.items() if key in self._foreign), None)]
            if label is not None
        }

    def _find_foreign(self) -> frozenset[tuple[int, str]]:
        """Those of the functions that are not their own packages'."""
        return frozenset(_keyed(entry)[0] for entry in self._originals.entries if not own(*entry[:2]))


_NO_REASONS: dict[str, str] = {}
_COMPILED_CALL = operator.attrgetter("_compiled_call_impl")
_numbers = itertools.count()
_models: weakref.WeakValueDictionary[int, Model] = weakref.WeakValueDictionary()


def compiled_sentence(whom: str) -> str:
    return f"torch.compile has compiled this {whom}, and the compiler gets the PyTorch chain itself"


def _traced(number: int) -> str | None:
    """Note that the compiler traces a whole model: run while it traces, so nothing of this is in its graph.

    What `strict` would raise, which ends the trace.
    """
    model = _models.get(number)
    if model is None or torch.compiler.is_exporting():  # what is exported is not run
        return None
    model.traced = True
    return model.why_not_compiled()


# What torch.compiler.assume_constant_result does (torch 2.11 to 2.15), which would import torch._dynamo for it
_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def leave_to_compiler(root: Any, handle: Handle) -> None:
    """Take the forwards of ours out of what torch.compile has compiled in this module, and say so of their sites.

    They would run the host's own while it traces; but it compiles a module with a forward of its own anew, where one
    compiled block serves all blocks else (and stops at eight: `recompile_limit`, torch 2.13).
    """
    kinds: dict[int, str] = {}  # of what is compiled, read before it is taken back
    for module, by in compiled_in(root):
        methods = [value for name, value in vars(module).items() if isinstance(value, Part) and name == value.method]
        ours = dict.fromkeys(found for found in (ours_in(module), *methods) if found is not None)
        seams = [value.site for value in vars(module).values() if isinstance(value, Seam)]
        whom = kinds.setdefault(id(by), getattr(ours_in(by), "kind", "model"))
        for site in (*(site for one in ours for site in getattr(one, "sites", ())), *seams):
            site.declined = site.declined or compiled_sentence(whom)
        for one in ours:
            handle.take_back(one)


def _keyed(entry: Entry) -> tuple[tuple[int, str], Entry]:
    owner, name, _ = entry
    return (id(owner), name), entry


class _UnderWay:
    """A forward of the whole model. `lock` is held meanwhile; `reasons`: of kinds of parts that are stock in it."""

    __slots__ = ("lock", "reasons")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reasons = _NO_REASONS


class _OfModel(Forward):
    """Base of what follows: a forward that stands in an accelerated model for as long as that is in force."""

    __slots__ = ("model",)

    def __init__(self, module: Any, model: Model):
        super().__init__(module)
        self.model = model

    @property
    def ended(self) -> bool:
        return not self.model.handle.on


class ModelForward(_OfModel):
    """In place of a whole transformer's forward: it looks once at all that its parts depend on, then runs the host's.

    inner    called instead of the host's own, where there is one: a `bitfuse.run.graphs.GraphedForward`
    """

    __slots__ = ("inner",)

    def __init__(self, module: Any, model: Model):
        super().__init__(module, model)
        self.inner: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if (reason := _traced(self.model.number)) is not None:
                raise NotFused(reason)
            return self.stock(*args, **kwargs)
        return self.around(self._run, *args, **kwargs)

    def around(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `run`, which runs the whole model: its parts look at all that they depend on once, now."""
        self.model.look_for_compiled(self.module)
        forward = _UnderWay()
        try:
            with forward.lock:
                self.model.begin(forward)
                return run(*args, **kwargs)
        finally:
            self.model.end()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        run = self.inner if self.inner is not None and self.model.handle.on else self.stock
        return run(*args, **kwargs)

    @classmethod
    def install(cls, module: Any, model: Model) -> None:
        """Where somebody has wrapped the forward that stays, and each part looks by itself."""
        model.take_over_is_done()
        if model.parts and innermost(module) is not None:
            model.handle.put(module, cls(module, model))


class Part(_OfModel):
    """Base of what stands in place of the forward of a part: a block, an attention, an activation.

    `fused` restates the host's forward with operators; `why_stock` says why it may not run.

    kind    a key of `Model`'s `left_out`
    """

    __slots__ = ("sites",)
    kind: str

    def __init__(self, module: Any, model: Model, sites: Sequence[Site] = ()):
        super().__init__(module, model)
        self.sites = sites
        model.add(self._module, sites)

    def fused(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def why_stock(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the host's own forward must run for these arguments."""
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.stock(*args, **kwargs)
        module = self.module
        reason = self.model.why_stock(self.kind)
        if reason is None:
            reason = self._another(module) or self.why_stock(module, args, kwargs)
        if reason is None:
            return self.fused(module, *args, **kwargs)
        if reason is not ENDED:
            self.fall(reason)
        return bound(module, self.method)(*args, **kwargs)

    def fall(self, reason: str) -> None:
        """Note a call that runs the host's own forward."""
        for site in self.sites:
            site.fall(reason)

    def _another(self, module: Any) -> str | None:
        if getattr(type(module), self.method) is self.own:
            return None
        return f"the {self.method} of {named(type(module))} was replaced meanwhile"


class Block(Part):
    """Base of a block's. `named_sites` are its sites by their names in it; `rehearsal` is for its next call."""

    __slots__ = ("named_sites", "rehearsal")
    kind = "block"

    def __init__(self, module: Any, model: Model, sites: dict[str, Site]):
        super().__init__(module, model, tuple(sites.values()))
        self.named_sites = sites
        self.rehearsal: Rehearsal | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rehearsal, self.rehearsal = self.rehearsal, None
        if rehearsal is None or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        return rehearsal(lambda: super(Block, self).__call__(*args, **kwargs))


def rehearse_first(blocks: Sequence[Any], handle: Handle) -> None:
    """Have the first of these blocks that was taken over rehearse; it is `transformer_blocks.<index>`."""
    if len(blocks) < Rehearsal.MIN_BLOCKS:
        return
    for index, block in enumerate(blocks):
        if isinstance(ours := ours_in(block), Block):
            sites = [site for site in handle.sites if site.name.startswith(f"transformer_blocks.{index}.")]
            ours.rehearsal = Rehearsal(block, sites)
            return


class Seam:
    """A callable of ours in a seam: an attribute that the host calls, and that it leaves to others to fill.

    `run` is what it does, `chain` what was there does.

    stock    what was there; a copy or a pickle of the model holds that
    """

    kind = "block"

    def __init__(self, site: Site, stock: Any, model: Model):
        self.site, self.stock, self.model = site, stock, model
        model.parts += 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.chain(*args, **kwargs)
        if (reason := self.model.why_stock(self.kind)) is not None:
            if reason is not ENDED:  # else somebody has put it back after it was taken away
                self.site.fall(reason)
            return self.chain(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def chain(self, *args: Any, **kwargs: Any) -> Any:
        return self.stock(*args, **kwargs)

    @staticmethod
    def stock_of(found: Any) -> Any:
        """What is in a seam, or was before one of ours that was put back there after its acceleration had ended."""
        return found.stock if isinstance(found, Seam) else found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.copy, (self.stock,)
