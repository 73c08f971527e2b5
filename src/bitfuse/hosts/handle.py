"""An acceleration in force: its options, its sites, and every change that it made to a host's objects, to be undone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from bitfuse.hosts.report import Report, Times, kind_of, measure
from bitfuse.hosts.site import NotFused, Site
from bitfuse.run.audit import Auditor
from bitfuse.run.extra import Extras
from bitfuse.run.swap import COPIED_BY, CopiedPlain, Forward, bound, innermost, places


@dataclass(frozen=True)
class Options:
    """What `bitfuse.accelerate` was asked for; its docstring says what each means. ValueError where one is bad."""

    strict: bool = False
    cuda_graph: bool = False
    keep_text: bool = False
    audit: int | None = None
    require: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("strict", "cuda_graph", "keep_text"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} is {value!r}; accepted: True or False")
        audit, require = self.audit, self.require
        if audit is not None and (not isinstance(audit, int) or isinstance(audit, bool) or audit < 1):
            raise ValueError(f"audit is {audit!r}; accepted: None (off), or an int of at least 1: one call in so many")
        names = tuple(require) if isinstance(require, Iterable) and not isinstance(require, str) else (None,)
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"require is {require!r}; accepted: a list of names of operators and sites")
        object.__setattr__(self, "require", names)  # hashable, and equal where the names are

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))


_ABSENT = object()
lock = threading.RLock()  # of all that begins or ends an acceleration


class Handle:
    """An acceleration in force: `report()` says what it does, `restore()` undoes it. Also a context manager.

    It holds no module: a handle that is kept does not keep a model's weights.

    on        False once it was restored. Forwards of a model that are under way then go on as they began
    models    for each accelerated model what its forwards share (`hosts.part.Model`)
    besides   what was looked at of pipelines besides their models, whether it was taken over or left alone
    """

    def __init__(self, host: str, options: Options | None = None):
        self.host = host
        self.options = options or Options()
        self.cuda_graph, self.keep_text = self.options.cuda_graph, self.options.keep_text  # what adapters look at
        self.auditor = Auditor(self.options.audit) if self.options.audit else None
        self.sites: list[Site] = []
        self.extras = Extras()
        self.models: list[Any] = []
        self.besides: list[weakref.ref[Any]] = []
        self.on = True
        self.pinned = False  # by `accelerate`; else it ends with the last of its users
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()  # those inside `with accelerated(...)`
        self._graphs: list[tuple[weakref.ref, Any]] = []
        self._undo: list[Callable[[], object]] = []
        self._put: weakref.WeakKeyDictionary[Forward, Callable[[], object]] = weakref.WeakKeyDictionary()
        self.look_again: Callable[[], list[Site]] = list  # before a report: further sites, of what came meanwhile

    def on_restore(self, undo: Callable[[], object]) -> None:
        """Have this called when the acceleration ends. It may be called again where it was interrupted."""
        self._undo.append(undo)

    def put(self, module: Any, ours: Forward) -> None:
        """Give the module a forward of ours, until the handle is restored, within the hooks that are there.

        `innermost` has a place for it. What somebody else puts in its place meanwhile stays.
        """
        if ours.method != "forward":  # hooks stand in the way of forwards alone
            self._put[ours] = self.fill(module, ours.method, ours)
            for method in COPIED_BY:
                self.fill(module, method, CopiedPlain(module, method))
            return
        reference, placed = weakref.ref(module), weakref.ref(ours)
        held, name = innermost(module) or places(module)[0]
        was_there = name in held

        def undo() -> None:
            found, ours = reference(), placed()
            if found is None or ours is None:
                return
            for held, name in places(found):  # a hook that came or went since has moved it
                if held.get(name) is not ours:
                    continue
                if held is found.__dict__ and name == "forward" and not was_there:
                    held.pop(name, None)
                else:
                    held[name] = bound(found)

        self.on_restore(undo)
        self._put[ours] = undo
        held[name] = ours
        for method in COPIED_BY if held is module.__dict__ else ():
            self.fill(module, method, CopiedPlain(module, method))

    def take_back(self, ours: Forward) -> None:
        """Put back what stood there before this forward of ours, ahead of the rest."""
        self._put[ours]()

    def fill(self, owner: Any, attribute: str, ours: Any) -> Callable[[], object]:
        """Put something of ours into an attribute of the owner's own, until the handle is restored; what undoes it."""
        had = owner.__dict__.get(attribute, _ABSENT)
        reference, placed = weakref.ref(owner), weakref.ref(ours)

        def undo() -> None:
            found, ours = reference(), placed()
            if found is None or ours is None or found.__dict__.get(attribute) is not ours:
                return
            if had is _ABSENT:
                found.__dict__.pop(attribute, None)
            else:
                found.__dict__[attribute] = had

        self.on_restore(undo)
        owner.__dict__[attribute] = ours
        return undo

    def add_graph(self, graph: Any) -> None:
        """Note a model's `bitfuse.run.graphs.GraphedForward`, which dies with its model; its counts stay."""
        self._graphs.append((weakref.ref(graph), graph.counts))

    @property
    def graphs(self) -> list[Any]:
        """The `GraphedForward` of each model, as far as the models live."""
        return [graph for reference, _ in self._graphs if (graph := reference()) is not None]

    def watch_sites(self) -> None:
        """Put the options into force at all sites, once they are known.

        Raises `NotFused` where one that must be fused was left alone; ValueError where `require` names nothing here.
        """
        for name in self.options.require:
            if not any(_named(name, site) for site in self.sites):
                operators = sorted({site.operator for site in self.sites})
                kinds = dict.fromkeys(kind_of(site.name) for site in self.sites)
                raise ValueError(
                    f"require names {name!r}, which is nothing here; accepted: operators ({', '.join(operators)}), "
                    f"sites ({', '.join(kinds)}), and patterns of both with *"
                )
        sites, self.sites = self.sites, []
        self.watch(sites)

    def watch(self, sites: Sequence[Site]) -> None:
        """Note sites with the options in force, each once.

        Raises `NotFused` where one that must be fused was left alone; then none of them is noted.
        """
        sites = [site for site in sites if not any(site is known for known in self.sites)]
        for site in sites:
            site.strict = self.options.strict or any(_named(name, site) for name in self.options.require)
            if self.auditor:
                site.observers = (*site.observers, self.auditor)
        _insist(sites)
        self.sites += sites

    def insist(self) -> None:
        """Raise `NotFused` where a site that must be fused is left alone."""
        _insist(self.sites)

    def report(self, time_share_of: Callable[[], Any] | None = None) -> Report:
        """What was fused and what was not, so far. Waits for audits that are under way.

        time_share_of    called once, to time each site's calls in it: `lambda: pipe(prompt, num_inference_steps=1)`.
                         Its shares are of the whole call's time, and of the calls fused or not; `measure` says how
                         they are taken. TypeError where it can't be called
        """
        times = None
        if time_share_of is not None:
            if not callable(time_share_of):
                kind = type(time_share_of).__qualname__
                raise TypeError(f"time_share_of is a {kind}; accepted: something to call, such as lambda: pipe(prompt)")
            times = measure(self.sites, time_share_of)
        if self.auditor:
            self.auditor.settle()
        return self._report(times)

    def _report(self, times: Times | None = None) -> Report:
        sites = self.sites + self.look_again()
        return Report(self.host, sites, [counts for _, counts in self._graphs], self.auditor, times, self.extras)

    def restore(self) -> None:
        """Put every attribute back, and wait for audits that are under way.

        Forwards that begin from now on are stock. Where one is under way in some thread, the attributes are put back
        at its end: it goes on as it began. Safe to call again, also after an interrupt (Ctrl-C) of it.
        """
        self.on = False
        self.settle()
        if self.auditor:
            self.auditor.settle()

    def settle(self) -> None:
        """Of an acceleration that was restored, put back what is not yet, unless a forward is under way."""
        if not self.on and not any(model.under_way for model in self.models):
            self.finish()

    def finish(self) -> None:
        """Put every attribute back, whoever is under way."""
        with lock:
            self.on = False
            while self._undo:
                self._undo[-1]()  # taken off the list afterwards: an interrupt loses none
                self._undo.pop()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"<bitfuse.Handle: {self._report().title}>"


def _insist(sites: Sequence[Site]) -> None:
    if alone := [site for site in sites if site.strict and site.declined]:
        more = f" (and {len(alone) - 1} more sites)" if len(alone) > 1 else ""
        raise NotFused(f"{alone[0].name}: {alone[0].declined}{more}")


def _named(name: str, site: Site) -> bool:
    return fnmatchcase(site.name, name) or fnmatchcase(site.operator, name)
