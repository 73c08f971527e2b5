"""Changing a host's objects so that every change can be taken back, and what was found at each site."""

from __future__ import annotations

import functools
import hashlib
import html
import itertools
import textwrap
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

import torch

from bitfuse.core.operator import Operator, Route
from bitfuse.hosts.source import source_of
from bitfuse.run.audit import Auditor
from bitfuse.run.swap import Forward, bound, hooked, innermost, named, ours_in, places


def source_hash(fn: Callable) -> str | None:
    """The first 16 hex digits of the SHA-256 of a function's source text; None where no text is its code."""
    source = source_of(fn)
    return None if source is None else hashlib.sha256(textwrap.dedent(source).encode()).hexdigest()[:16]


def not_own(module: Any, what: str, host: str) -> str:
    """The sentence for a module, `what`, of another class than the host's own; `host` is a name with a version."""
    name = host.split()[0]
    whose = f"{name}'" if name.endswith("s") else f"{name}'s"
    return f"the {what} is a {named(type(module))}, not {whose} own"


def why_not_read(host: str, read: Mapping[str, Collection[str]], sources: Mapping[str, Any]) -> Iterator[str]:
    """Which of the host's functions that ours restate, by name, have a source whose hash is none of `read`'s."""
    for name, code in sources.items():
        if (found := source_hash(code)) not in read[name]:
            yield f"{name} of {host} is not a source that bitfuse knows ({found})"


def why_not_stock(
    module: Any, own: type, what: str, host: str, read: Mapping[str, Collection[str]], sources: Mapping[str, Any]
) -> Iterator[str]:
    """Why a module can't be given a forward that restates these sources: it is not the host's own as it was read.

    sources    the functions that are restated, by `Class.name` or name. The module's class may be one derived from the
               host's (FSDP's, say), as long as none of them is another there
    """
    if not isinstance(module, own):
        yield not_own(module, what, host)
        return
    for name in sources:
        kind, _, method = name.partition(".")
        if kind == own.__name__ and getattr(type(module), method, None) is not getattr(own, method, None):
            yield f"{not_own(module, what, host)}, and has a {method} of its own"
    if ours_in(module) is not None:
        yield f"the {what} is accelerated already, with another model that it is a part of"
    elif innermost(module) is None:
        yield f"a hook or a wrapper has replaced the {what}'s forward, and is left in place"
    yield from why_not_read(host, read, sources)


def ways(kind: type) -> tuple[Any, ...]:
    """The functions by which a module of this class is called."""
    return kind.forward, kind.__call__, kind._call_impl  # type: ignore[attr-defined]


def own_method(module: Any, name: str, stock: type) -> bool:
    """Whether a method of the module's is the host's own: no attribute of its own, none of a derived class."""
    return name not in module.__dict__ and getattr(type(module), name, None) is getattr(stock, name, None)


def why_norms_are_called(**norms: Any) -> Iterator[str]:
    """Why these Q/K norms, given by the host's names for them, must be called as modules: reasons not to fuse them."""
    eps = {name: getattr(norm, "eps", None) for name, norm in norms.items()}
    first = next(iter(norms))
    for name, norm in norms.items():
        if not isinstance(norm, torch.nn.RMSNorm) or ways(type(norm)) != ways(torch.nn.RMSNorm):
            yield f"{name} is a {named(type(norm))}, not torch.nn.RMSNorm"
        elif hooked(norm):
            yield f"a hook is attached to {name}, which is not called when it is fused"
        elif norm.weight is None or norm.eps is None:
            yield f"{name} has no weight or no eps of its own"
        elif norm.normalized_shape != tuple(norm.weight.shape):
            yield f"the normalized_shape of {name} is {norm.normalized_shape} and its weight {tuple(norm.weight.shape)}"
        elif norm.eps != eps[first]:
            yield f"the eps of {name} is {norm.eps} and that of {first} {eps[first]}"


class NotFused(RuntimeError):
    """With `strict=True`, or of what `require` names: the site that would have run the PyTorch chain, and why."""


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


_counting = threading.Lock()

COMPILING = "kernels are being compiled side by side"
"""The reason of a route in a rehearsal. It is no fall-back: the kernels are used from the next call on."""

Observer = Callable[["Site", Operator, Route, tuple[Any, ...], Any], None]


@dataclass
class Site:
    """One place in a model where an operator may act, and what happened there.

    declined    why this site was left as it was, or None when it was taken over
    fused       calls that ran the kernel
    fallen      calls that ran the PyTorch chain, by the reason; of all reasons beyond `REASONS_KEPT` together
    compiling   calls that ran the PyTorch chain because kernels were compiled meanwhile, side by side (`Rehearsal`)
    tiers       the ways in which calls were fused (`Operator.tiers`)
    strict      raise `NotFused` instead of running the PyTorch chain
    observers   called after each call, on its stream, with (site, operator, route, arguments, result)
    """

    name: str
    operator: str
    declined: str | None = None
    fused: int = 0
    fallen: Counter[str] = field(default_factory=Counter)
    compiling: int = 0
    tiers: set[str] = field(default_factory=set)
    strict: bool = False
    observers: tuple[Observer, ...] = ()
    rehearsal: Any = None  # a `Rehearsal` that this site takes part in, while its `under_way` is locked

    REASONS_KEPT = 32  # a reason may hold a shape, of which a server sees ever more
    OTHERS = "for another reason than those that are listed"

    def call(self, operator: Operator, *args: Any) -> Any:
        """Run the operator and note which way the call went."""
        if torch.compiler.is_compiling():  # the compiler gets the PyTorch chain, and no counting in its graph
            return operator.reference(*args)
        if self.rehearsal is not None and self.rehearsal.under_way.locked():
            route = self.rehearsal.route(operator, args)
            self.compiling += 1
        else:
            route = operator.routed(*args)
        if route.reason is None:
            self.fused += 1  # no other thread comes in between: Python switches threads at calls and jumps back
            if route.tier not in self.tiers:
                self.tiers.add(str(route.tier))
        elif route.reason is not COMPILING:
            self.fall(route.reason)
        result = route.run(*args)
        for observe in self.observers:
            observe(self, operator, route, args, result)
        return result

    def fall(self, reason: str) -> None:
        """Note a call that is not fused, or raise where that is not wanted."""
        if self.strict:
            raise NotFused(f"{self.name}: {reason}")
        with _counting:  # a reason's first call runs Python, where another thread may come in between
            if reason not in self.fallen and len(self.fallen) >= self.REASONS_KEPT:
                reason = self.OTHERS
            self.fallen[reason] += 1

    def leave(self, chain: Callable[[], Any], reason: str) -> Any:
        """Run the host's own chain, for this reason."""
        self.fall(reason)
        return chain()

    @property
    def reasons(self) -> list[str]:
        return [self.declined] if self.declined else list(self.fallen)

    @property
    def state(self) -> str:
        """fused, partly fused, fallen back, left alone, compiling (called in a rehearsal only), or not called yet."""
        if self.declined:
            return "left alone"
        if not self.fused and not self.fallen:
            return "compiling" if self.compiling else "not called yet"
        if not self.fallen:
            return "fused"
        return "partly fused" if self.fused else "fallen back"


_NUMBERS = _FUSED, _FALLEN, _SHARE = "calls fused", "fallen back", "time share"  # columns of the table


def kind_of(name: str) -> str:
    """A site's name with its block's number left open: `transformer_blocks.*.attn1`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@dataclass(frozen=True)
class Times:
    """Seconds of each site's calls, by its name, while something ran that took `total` seconds."""

    sites: dict[str, float]
    total: float


class Report:
    """What was fused of what was seen, and why the rest was not.

    A table in a terminal that rich prints to, in a notebook, and as text; `as_dict()` is for programs.
    """

    def __init__(
        self,
        host: str,
        sites: list[Site],
        graphs: list[Any] | None = None,
        auditor: Auditor | None = None,
        times: Times | None = None,
    ):
        self.host = host
        self.sites = sites
        self.graphs = graphs or []
        self.auditor = auditor
        self.times = times

    @property
    def seen(self) -> int:
        return len(self.sites)

    @property
    def fused(self) -> int:
        """Sites that ran the kernel at every call so far, but for one in which kernels were compiled."""
        return sum(site.state == "fused" for site in self.sites)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it. Times are in seconds, `time_share` from 0 to 1; both only where asked for.

        `audit` is None where it is off; `Auditor` says what is in it.
        """
        found: dict[str, Any] = {
            "host": self.host,
            "sites_seen": self.seen,
            "sites_fused": self.fused,
            "graphs": [
                {"captures": g.captures, "replays": g.replays, "calls_without": dict(g.reasons)} for g in self.graphs
            ],
            "audit": self.auditor.as_dict() if self.auditor else None,
            "sites": [self._site(site) for site in self.sites],
        }
        if self.times:
            found["seconds"] = self.times.total
        return found

    def _site(self, site: Site) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": site.name,
            "operator": site.operator,
            "state": site.state,
            "calls_fused": site.fused,
            "calls_fallen_back": sum(site.fallen.values()),
            "calls_compiling": site.compiling,
            "reasons": site.reasons,
            "tiers": sorted(site.tiers),
        }
        if self.times:
            found["seconds"] = self.times.sites.get(site.name, 0.0)
            found["time_share"] = found["seconds"] / self.times.total
        return found

    def kinds(self) -> list[dict[str, Any]]:
        """`as_dict()["sites"]` with the sites that differ in their block's number only as one row, counted.

        So 48 blocks show as one block does; their calls and times are summed.
        """
        kinds: dict[tuple, dict[str, Any]] = {}
        summed = (
            "calls_fused",
            "calls_fallen_back",
            "calls_compiling",
            *(("seconds", "time_share") if self.times else ()),
        )
        for site in map(self._site, self.sites):
            name = kind_of(site["name"])
            key = (name, site["operator"], site["state"], tuple(site["reasons"]), tuple(site["tiers"]))
            kind = kinds.setdefault(key, {**site, "name": name, "count": 0, **dict.fromkeys(summed, 0)})
            kind["count"] += 1
            for what in summed:
                kind[what] += site[what]
        return list(kinds.values())

    @property
    def title(self) -> str:
        return f"{self.fused} of {self.seen} sites fused in {self.host}"

    def __str__(self) -> str:
        kinds = self.kinds()
        width = max((len(kind["name"]) for kind in kinds), default=0)
        lines = [self.title]
        for kind in kinds:
            calls = f"{kind['calls_fused']} calls fused, {kind['calls_fallen_back']} not"
            share = f", {kind['time_share']:.1%} of the time" if self.times else ""
            why = f": {'; '.join(kind['reasons'])}" if kind["reasons"] else ""
            site = f"{kind['name']:<{width}}  {kind['count']:>3} x {kind['operator']}"
            tier = f" by {', '.join(kind['tiers'])}" if kind["tiers"] else ""
            lines.append(f"  {site}  {kind['state']}{tier} ({calls}{share}){why}")
        return "\n".join([*lines, *(f"  {note}" for note in self._notes())])

    __repr__ = __str__

    def __rich__(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text  # not markup: a reason may hold brackets

        columns, *rows = self._table()
        heads = zip(*(name.split(".")[:-1] for name, *_ in rows), strict=False)
        common = ".".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, heads))
        table = Table(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            narrow = column in _NUMBERS
            header = column.replace(" ", "\n") if narrow else column
            header = f"site of {common}" if common and column == "site" else header
            table.add_column(Text(header), overflow="fold", justify="right" if narrow else "left")
        for name, *rest in rows:
            table.add_row(*map(Text, (name.removeprefix(f"{common}."), *rest)))
        return Group(table, *map(Text, self._notes()))

    def _repr_html_(self) -> str:
        def row(tag: str, cells: list[str]) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        columns, *rows = self._table()
        head = f"<caption>{html.escape(self.title)}</caption><thead>{row('th', columns)}</thead>"
        body = "".join(row("td", cells) for cells in rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return f"<table>{head}<tbody>{body}</tbody></table>{notes}"

    def _table(self) -> list[list[str]]:
        """The column's names, and a row for each kind; without the reasons where there is none."""
        share = [_SHARE] if self.times else []
        table = [["site", "operator", "tier", _FUSED, _FALLEN, *share, "reasons"]]
        for kind in self.kinds():
            name = f"{kind['name']} x {kind['count']}" if kind["count"] > 1 else kind["name"]
            calls = [str(kind["calls_fused"]), str(kind["calls_fallen_back"])]
            share = [f"{kind['time_share']:.1%}"] if self.times else []
            why = [kind["state"]] if kind["state"] in ("left alone", "not called yet") else []
            why += ["; ".join(kind["reasons"])] if kind["reasons"] else []
            table.append([name, kind["operator"], ", ".join(kind["tiers"]), *calls, *share, ": ".join(why)])
        return table if any(row[-1] for row in table[1:]) else [row[:-1] for row in table]

    def _notes(self) -> list[str]:
        notes = []
        for graph in self.graphs:  # replays run no Python, so the sites above don't count them
            notes.append(f"CUDA graph: {graph.captures} captured, {graph.replays} replays")
            notes += [f"  {count} calls without: {reason}" for reason, count in graph.reasons.items()]
        if self.auditor:
            notes += str(self.auditor).splitlines()
            if self.graphs:
                notes.append(
                    "  replays of a CUDA graph run no Python and are not audited; "
                    "each graph is compared with the forward before its first use"
                )
        if self.times:
            sites = sum(self.times.sites.values())
            notes.append(f"time: {self.times.total:.4g} s in all, {sites:.4g} s at these sites")
            if not self.times.sites:
                notes.append("  no site was called: a CUDA graph was replayed, or something else ran")
        return notes


def measure(sites: list[Site], run: Callable[[], Any]) -> Times:
    """Run something once, and time each call at these sites, fused or not, on the stream that it is on.

    On CUDA a call's time is that between two events around its kernels, so where the CPU sets the pace the GPU's
    waiting is in it; and what two streams do at the same time counts twice. Waits for the device at the end only. Of a
    call that is left to the host's own modules (`Site.leave`) nothing is timed.
    """
    spans: list[tuple[str, torch.device, Any, Any]] = []

    def timed(site: Site, operator: Operator, x: Any, *args: Any) -> Any:
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or capturing:
            return Site.call(site, operator, x, *args)
        start = _mark(x.device)
        result = Site.call(site, operator, x, *args)
        spans.append((site.name, x.device, start, _mark(x.device)))
        return result

    for site in sites:
        site.__dict__["call"] = functools.partial(timed, site)  # before the class's own, which pays nothing for it
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        for device in {device for _, device, _, _ in spans if device.type == "cuda"}:
            torch.cuda.synchronize(device)
        total = time.perf_counter() - start
    finally:
        for site in sites:
            site.__dict__.pop("call", None)
    seconds: Counter[str] = Counter()
    for name, device, before, after in spans:
        seconds[name] += before.elapsed_time(after) / 1000 if device.type == "cuda" else after - before
    return Times(dict(seconds), total)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return event


_ABSENT = object()
lock = threading.RLock()  # of all that begins or ends an acceleration


class Handle:
    """An acceleration in force: `report()` says what it does, `restore()` undoes it. Also a context manager.

    It holds no module: a handle that is kept does not keep a model's weights.

    on        False once it was restored. Forwards of a model that are under way then go on as they began
    models    for each accelerated model what its forwards share (`hosts.common.Model`)
    """

    def __init__(self, host: str, options: Options | None = None):
        self.host = host
        self.options = options or Options()
        self.cuda_graph, self.keep_text = self.options.cuda_graph, self.options.keep_text  # what adapters look at
        self.auditor = Auditor(self.options.audit) if self.options.audit else None
        self.sites: list[Site] = []
        self.models: list[Any] = []
        self.on = True
        self.pinned = False  # by `accelerate`; else it ends with the last of its users
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()  # those inside `with accelerated(...)`
        self._graphs: list[tuple[weakref.ref, Any]] = []
        self._undo: list[Callable[[], object]] = []

    def on_restore(self, undo: Callable[[], object]) -> None:
        """Have this called when the acceleration ends. It may be called again where it was interrupted."""
        self._undo.append(undo)

    def put(self, module: Any, ours: Forward) -> None:
        """Give the module a forward of ours, until the handle is restored, within the hooks that are there.

        `innermost` has a place for it. What somebody else puts in its place meanwhile stays.
        """
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
        held[name] = ours

    def fill(self, owner: Any, attribute: str, ours: Any) -> None:
        """Put something of ours into an attribute of the owner's own, until the handle is restored."""
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
        for site in self.sites:
            site.strict = self.options.strict or any(_named(name, site) for name in self.options.require)
            if self.auditor:
                site.observers += (self.auditor,)
        if alone := [site for site in self.sites if site.strict and site.declined]:
            more = f" (and {len(alone) - 1} more sites)" if len(alone) > 1 else ""
            raise NotFused(f"{alone[0].name}: {alone[0].declined}{more}")

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
        return Report(self.host, self.sites, [counts for _, counts in self._graphs], self.auditor, times)

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


def _named(name: str, site: Site) -> bool:
    return fnmatchcase(site.name, name) or fnmatchcase(site.operator, name)
