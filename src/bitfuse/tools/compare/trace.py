"""First divergence: where the bits of two runs part for the first time, by step, block, site and element.

A run is listened to at every module call, from outside: `nn.Module.__call__` is wrapped while it lasts. No hook is
attached, so a fused block runs as it does when nobody looks. What goes into a module and what comes out of it leaves a
64-bit digest, taken on the device: some megabytes for 48 blocks, however many tokens they have. The first digests that
part name the place; both runs are then repeated to fetch the two tensors of that place, and no others. Each fused site
is held against its own reference besides, on the very inputs that it was given.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitfuse.core.bits import Outputs, as_tuple, compare
from bitfuse.core.operator import Operator, Route
from bitfuse.hosts import _active
from bitfuse.hosts.report import kind_of
from bitfuse.hosts.site import Site
from bitfuse.tools.compare.bits import Bits, difference, digest

_NAMED = 3  # examples in a note

_CALL = "()"  # the place of what is traced as a whole: its inputs and its result


# -- what is found ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Divergence:
    """The first place where the bits of two runs part. Prints as a paragraph; `as_dict()` is for programs and JSON.

    step       index in `inputs`
    kind       "site"    a fused site's result differs from its PyTorch chain's on the same inputs
               "output"  what goes into `place` is equal in both runs, what comes out is not
               "input"   what goes into `place` differs and all before it is equal: the code of `within` made the
                         difference, between `after` and this call
    place      path of the module, or name of the fused site; "" is the model itself, "()" the whole call
    block      the block's index: the first number in the path; None where there is none
    what       which input or output it is, by its name
    operator   name of the operator, where `place` is a fused site
    module     name of the module's class, where it is a module
    run        "model_a" or "model_b": whose site it is, for the kind "site"; else ""
    call       how many times `place` had been called before in this step
    within     path of the module that called `place`
    after      the last input or output before it that is equal in both runs, in words; "" where there is none
    passed     (name, operator) of the fused sites called since then: each equal to its PyTorch chain
    bits       how the bits differ; None where it is not bits that differ, which `sentence` then says
    notes      what else was seen: weights that differ, places called in one run only, a run that doesn't repeat itself
    """

    step: int
    kind: str
    place: str
    block: int | None = None
    what: str = ""
    operator: str | None = None
    module: str | None = None
    run: str = ""
    call: int = 0
    within: str = ""
    after: str = ""
    passed: tuple[tuple[str, str], ...] = ()
    bits: Bits | None = None
    sentence: str = ""
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        place = _in_words(self.place) + (f" ({self.operator or self.module})" if self.operator or self.module else "")
        if self.kind == "site":
            how = f"the {self.what} of {self.run}'s fused operator differs from its PyTorch chain's on the same inputs"
        elif self.kind == "output":
            how = f"its inputs are equal, its {self.what} differs"
        else:
            how = f"its input {self.what} differs already: code of {_in_words(self.within)} itself made the difference"
        lines = [how + (f" (call {self.call + 1} of this step)" if self.call else "")]
        lines += [self.sentence] if self.sentence else str(self.bits).splitlines()
        if self.after:
            lines.append(f"equal up to there; the last that is: {self.after}")
        lines += [f"in between, equal to its PyTorch chain: {name} ({operator})" for name, operator in self.passed]
        lines += [f"note: {note}" for note in self.notes]
        return "\n  ".join([f"First divergence: step {self.step}, {place}", *lines])


def _in_words(place: str) -> str:
    return {"": "the model", _CALL: "the call"}.get(place, place)


def trace(
    model_a: Callable[..., Any],
    model_b: Callable[..., Any],
    inputs: Any,
    *,
    steps: Sequence[int] | None = None,
    model: nn.Module | None = None,
    around_a: Callable[[], Any] = contextlib.nullcontext,
    around_b: Callable[[], Any] = contextlib.nullcontext,
) -> Divergence | None:
    """Run two models of one structure on the same inputs; the first place where their bits part, or None.

    model_a, model_b    modules, or other callables; they may be one and the same (see `around_b`). Of callables that
                        are no modules only the results are compared, and fused sites, unless `model` is given
    inputs              a dict of keyword arguments, a tuple of positional ones, or a list of those: one for each step
    steps               indices of the entries of `inputs` to run, in this order; all by default
    model               the module to look into, where `model_a` and `model_b` are functions that call it
    around_a, around_b  functions that return a context manager, entered around each pass of that run. So one model is
                        compared with itself, in memory once:
                        `trace(model, model, inputs, around_b=lambda: bitfuse.accelerated(model))`

    Modules are matched by path and by how often they were called in the step. Bits are compared, NaN equal to NaN,
    whatever the strides and the device. Both runs start from the same state of the random number generators and compute
    no gradients: first `model_a` on every step, then `model_b` up to the first that differs; then both again up to
    there, for the two tensors. Inside a region of `torch.compile` nothing is seen but what goes in and comes out.

    TypeError or ValueError where an argument has another form, a run changes its inputs in place, or a model is
    accelerated with cuda_graph=True (its replays run no Python).
    """
    feeds = _feeds(inputs)
    numbers = list(range(len(feeds))) if steps is None else _chosen(steps, len(feeds))
    a = _Run.of("model_a", model_a, model, around_a, feeds)
    b = _Run.of("model_b", model_b, model, around_b, feeds)

    heard: dict[int, list[_Event]] = {}

    def keep(step: int, watch: _Watch) -> bool:
        heard[step] = watch.events
        return False

    a.go(numbers, lambda step: _Watch(), keep)
    if not any(event.tensors for events in heard.values() for event in events if event.key.kind == "output"):
        raise TypeError("the result of model_a holds no tensor; accepted: tensors, alone or in lists, tuples and dicts")
    partings: list[tuple[Divergence, _Key, tuple[_Seen, ...]]] = []

    def part(step: int, watch: _Watch) -> bool:
        partings.extend(_part(step, heard[step], watch.events))
        return bool(partings)

    b.go(numbers, lambda step: _Watch(known={event.key for event in heard[step]}), part)
    if not partings:
        return None
    ((found, key, seen),) = partings
    notes = [*found.notes, *_weights(a.root, b.root)]
    if a.root is None and b.root is None:
        notes.append("these are no modules, so only results and fused sites were compared; model= looks inside one")
    bits, sentence = found.bits, found.sentence
    if seen:  # the digests differ: fetch the two tensors
        until, pair = numbers[: numbers.index(found.step) + 1], []
        for run, digests in zip((a, b), seen, strict=True):
            tensor = run.fetch(until, key, found.what)
            if tensor is not None:
                pair.append(tensor)
            if tensor is None or _settled({"": _seen(tensor)})[""] != digests:
                notes.append(f"{run.name} does not repeat itself: run again, it gave other bits here")
        if len(pair) == 2:
            bits, sentence = difference(*pair)
        if bits is None and not sentence:
            sentence = "the bits parted, and no longer did when both were run again"
    return replace(found, bits=bits, sentence=sentence, notes=tuple(notes))


def _feeds(inputs: Any) -> list[tuple[tuple, dict]]:
    """(positional, keyword arguments) of each step."""
    feeds = []
    for given in inputs if isinstance(inputs, list) else [inputs]:
        if not isinstance(given, (tuple, Mapping)):
            which = "an entry of inputs" if isinstance(inputs, list) else "inputs"
            raise TypeError(
                f"{which} is a {type(given).__name__}; accepted: a dict of keyword arguments, a tuple of positional "
                "ones, or a list of those, one for each step"
            )
        feeds.append((given, {}) if isinstance(given, tuple) else ((), dict(given)))
    if not feeds:
        raise ValueError("inputs is an empty list; accepted: one entry or more, each of them a step")
    return feeds


def _chosen(steps: Any, count: int) -> list[int]:
    numbers = list(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else []
    if not numbers or any(type(n) is not int or not 0 <= n < count for n in numbers):
        raise ValueError(f"steps is {steps!r}; accepted: a list of indices of inputs, each from 0 to {count - 1}")
    return numbers


# -- a run, and listening to it ---------------------------------------------------------------------------------------


_AROUND = "accepted: a function that returns a context manager, as in lambda: bitfuse.accelerated(model)"


@dataclass(frozen=True)
class _Run:
    """One of the two: what is called, and the modules to look into, by their paths."""

    name: str
    call: Callable[..., Any]
    root: nn.Module | None
    places: dict[nn.Module, str]
    around: Callable[[], Any]
    feeds: list[tuple[tuple, dict]]

    @classmethod
    def of(cls, name: str, call: Any, model: Any, around: Any, feeds: list[tuple[tuple, dict]]) -> _Run:
        if not callable(call):
            raise TypeError(f"{name} is a {type(call).__name__}; accepted: an nn.Module or another callable")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; accepted: the nn.Module that both runs call")
        if not callable(around):
            raise TypeError(f"around_{name[-1]} is a {type(around).__name__}; {_AROUND}")
        root = model if model is not None else call if isinstance(call, nn.Module) else None
        places = {} if root is None else {module: _path(path) for path, module in root.named_modules()}
        return cls(name, call, root, places, around, feeds)

    def go(self, numbers: list[int], listener: Callable[[int], _Watch], stop: Callable[[int, _Watch], bool]) -> None:
        """Run these steps, each heard by a listener of its own, until `stop(step, listener)`."""
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        around = self.around()
        if not isinstance(around, contextlib.AbstractContextManager):
            raise TypeError(f"around_{self.name[-1]} returned a {type(around).__name__}; {_AROUND}")
        with torch.random.fork_rng(devices), around:
            for module in self.places:
                if module in _active and _active[module].cuda_graph:
                    raise ValueError(
                        f"{self.name} is accelerated with cuda_graph=True, whose replays run no Python to listen to; "
                        "accepted: cuda_graph=False"
                    )
            for step in numbers:
                args, kwargs = self.feeds[step]
                watch = listener(step)
                with torch.no_grad(), watch.listening(self.places):
                    watch.heard(self.call, _CALL, None, args, kwargs)
                watch.settle()
                left = _settled({what: _seen(t) for what, t in _tensors(_named(self.call, args, kwargs))})
                if changed := [what for what, seen in watch.events[0].tensors.items() if left.get(what) != seen]:
                    raise ValueError(
                        f"{self.name} changes its input {changed[0]} in place, so no other run gets the same; "
                        "accepted: runs that leave their inputs as they are"
                    )
                if stop(step, watch):
                    return

    def fetch(self, numbers: list[int], key: _Key, what: str) -> Tensor | None:
        """On the CPU, the tensor of this key in the last of these steps, run once more."""
        watches: list[_Watch] = []

        def listener(step: int) -> _Watch:
            watches.append(_Watch(known=set(), wanted=(key, what)))
            return watches[-1]

        self.go(numbers, listener, lambda step, watch: False)
        return watches[-1].fetched


def _path(path: str) -> str:
    """Without what torch.compile puts in."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


class _Key(NamedTuple):
    """One thing that is seen in a step: the `call`-th time that `kind` is seen at a place.

    kind     "input", "output", or "check": a fused site against its reference
    fused    whether it is a fused site; its name may be a module's path
    """

    kind: str
    fused: bool
    place: str
    call: int


_Seen = tuple[torch.dtype, torch.Size, Any]  # a tensor's dtype, shape and digest: on its device, then settled as an int


@dataclass
class _Event:
    """Something that went in or came out, in the order of the run.

    within    the place whose code was running
    failed    of a check: what differs, how, and the sentence where it is not bits
    """

    key: _Key
    within: str
    operator: str | None = None
    module: str | None = None
    tensors: dict[str, _Seen] = field(default_factory=dict)
    failed: tuple[str, Bits | None, str] | None = None


class _Watch:
    """Listens to one step of one run.

    known     take digests of these keys only (all, where None): what the other run has
    wanted    a key and the name of its tensor, to be copied to the CPU as `fetched`
    """

    def __init__(self, known: set[_Key] | None = None, wanted: tuple[_Key, str] | None = None):
        self.known, self.wanted = known, wanted
        self.events: list[_Event] = []
        self.fetched: Tensor | None = None
        self._open: list[str] = []
        self._calls: Counter[tuple[bool, str]] = Counter()

    @contextlib.contextmanager
    def listening(self, places: dict[nn.Module, str]) -> Iterator[None]:
        """Every call of these modules is heard, and every call of a fused site in this process."""
        inner: Any = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or module not in places or self._open[-1:] == [places[module]]:
                return inner(module, *args, **kwargs)  # the last: torch.compile's wrapper around the same module
            return self.heard(lambda *a, **k: inner(module, *a, **k), places[module], module, args, kwargs)

        sites = [site for handle in set(_active.values()) for site in handle.sites]
        for site in sites:
            site.observers += (self.site,)
        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = inner  # type: ignore[method-assign]
            for site in sites:
                site.observers = tuple(observer for observer in site.observers if observer != self.site)

    def heard(self, call: Callable[..., Any], place: str, module: nn.Module | None, args: tuple, kwargs: dict) -> Any:
        """call(*args, **kwargs), with a note of what goes in before it and of what comes out after it."""
        count, name = self._count(False, place), None if module is None else type(_unwrapped(module)).__name__
        named = _named(call if module is None else _unwrapped(module).forward, args, kwargs)
        self._note(_Key("input", False, place, count), named, module=name)
        self._open.append(place)
        result = call(*args, **kwargs)
        self._open.pop()
        self._note(_Key("output", False, place, count), {"output": result}, module=name)
        return result

    def site(self, site: Site, operator: Operator, route: Route, args: tuple[Any, ...], result: Any) -> None:
        """Note what a fused site was given and gave, and hold it against its reference."""
        count = self._count(True, site.name)
        named = dict(zip(inspect.signature(operator.reference).parameters, args, strict=False))
        self._note(_Key("input", True, site.name, count), named, operator=operator.name)
        if route.fused and self.wanted is None:
            event = self._note(_Key("check", True, site.name, count), {}, operator=operator.name)
            if not any(e.failed for e in self.events):
                event.failed = _check(operator.reference(*args), result)
        self._note(_Key("output", True, site.name, count), {"output": result}, operator=operator.name)

    def settle(self) -> None:
        """Bring the digests to the host."""
        for event in self.events:
            event.tensors = _settled(event.tensors)

    def _count(self, fused: bool, place: str) -> int:
        self._calls[fused, place] += 1
        return self._calls[fused, place] - 1

    def _note(self, key: _Key, values: Any, **about: Any) -> _Event:
        event = _Event(key, self._open[-1] if self._open else _CALL, **about)
        self.events.append(event)
        if self.known is None or key in self.known:
            event.tensors = {what: _seen(t) for what, t in _tensors(values)}
        if self.wanted is not None and key == self.wanted[0]:
            for what, t in _tensors(values):
                if what == self.wanted[1]:
                    self.fetched = t.detach().to("cpu", copy=True).contiguous()
        return event


def _seen(t: Tensor) -> _Seen:
    return t.dtype, t.shape, digest(t)


def _settled(seen: dict[str, _Seen]) -> dict[str, _Seen]:
    """With the digests on the host."""
    for device in {found.device for _, _, found in seen.values() if found.is_cuda}:
        torch.cuda.synchronize(device)  # whichever stream it was taken on
    return {what: (dtype, shape, int(found)) for what, (dtype, shape, found) in seen.items()}


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module that torch.compile has wrapped, or the module itself."""
    return module._modules.get("_orig_mod") or module


def _named(call: Callable[..., Any], args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments by the names of the parameters, or by their positions where those can't be told."""
    try:
        return inspect.signature(call).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}


def _tensors(values: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every dense tensor in nested mappings, lists, tuples and dataclasses: "output", "output.0"."""
    if isinstance(values, Tensor):
        if values.layout == torch.strided and not values.is_meta:
            yield name, values
        return
    if isinstance(values, Mapping):
        pairs = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, (list, tuple)):
        pairs = [(str(i), value) for i, value in enumerate(values)]
    elif is_dataclass(values) and not isinstance(values, type):
        pairs = [(f.name, getattr(values, f.name)) for f in fields(values)]
    else:
        return
    for key, value in pairs:
        yield from _tensors(value, f"{name}.{key}" if name else key)


# -- where two runs part ----------------------------------------------------------------------------------------------


def _part(step: int, a: list[_Event], b: list[_Event]) -> Iterator[tuple[Divergence, _Key, tuple[_Seen, ...]]]:
    """The first place where two runs of a step part, or none: the place, its key, and both digests that parted there.

    Of b's order, unless a fused site of a's fails its check earlier in a's order. There are no digests where the bits
    are known, or where it is not bits that differ.
    """
    in_a = {event.key: i for i, event in enumerate(a)}
    in_b = {event.key for event in b}

    def differs(event: _Event) -> bool:
        return event.key in in_a and _what(a[in_a[event.key]], event) is not None

    first = next((i for i, event in enumerate(b) if event.failed or differs(event)), None)
    failed = next((i for i, event in enumerate(a) if event.failed), None)
    if failed is not None and (first is None or failed < in_a.get(b[first].key, len(a))):
        run, event, before, common = "model_a", a[failed], a[:failed], in_b
    elif first is not None:
        run, event, before, common = "model_b", b[first], b[:first], set(in_a)
    else:
        return
    bits: Bits | None = None
    seen: tuple[_Seen, ...] = ()
    if event.failed:
        what, bits, sentence = event.failed
    else:
        other = a[in_a[event.key]]
        what, sentence, run = _what(other, event) or "", "", ""
        if missing := [name for name, e in (("model_a", other), ("model_b", event)) if what not in e.tensors]:
            sentence = f"{missing[0]} gives no such tensor, the other run does"
        else:
            seen = other.tensors[what], event.tensors[what]

    key = event.key
    last = max((i for i, e in enumerate(before) if e.key in common and e.tensors), default=-1)
    notes = []
    for name, only in (("model_a", set(in_a) - in_b), ("model_b", in_b - set(in_a))):
        if kinds := sorted({kind_of(k.place) for k in only if k.kind == "output" and not k.fused}):
            examples = ", ".join(map(_in_words, kinds[:_NAMED])) + (", ..." if len(kinds) > _NAMED else "")
            notes.append(f"called by {name} alone or more often, so not compared there: {examples}")
    found = Divergence(
        step=step,
        kind="site" if run else key.kind,
        place=key.place,
        block=next((int(part) for part in key.place.split(".") if part.isdigit()), None),
        what=what,
        operator=event.operator,
        module=event.module,
        run=run,
        call=key.call,
        within=event.within,
        after=f"the {before[last].key.kind} of {_in_words(before[last].key.place)}" if last >= 0 else "",
        passed=tuple((e.key.place, str(e.operator)) for e in before[last + 1 :] if e.key.kind == "check"),
        bits=bits,
        sentence=sentence,
        notes=tuple(notes),
    )
    yield found, key, seen


def _what(a: _Event, b: _Event) -> str | None:
    """The first tensor that differs: of inputs among those that both have, as a caller may leave out a default."""
    names = [*a.tensors, *(name for name in b.tensors if name not in a.tensors)]
    if a.key.kind == "input":
        names = [name for name in names if name in a.tensors and name in b.tensors]
    return next((name for name in names if a.tensors.get(name) != b.tensors.get(name)), None)


def _check(expected: Outputs, found: Outputs) -> tuple[str, Bits | None, str] | None:
    """A fused site's result against its reference's: which output differs, how, and the sentence if not in bits."""
    mismatch = compare(expected, found)
    if mismatch is None:
        return None
    several = not isinstance(expected, Tensor)
    what = f"output.{mismatch.output}" if several else "output"
    if not mismatch.count:
        return what, None, mismatch.sentence
    pair = [as_tuple(t)[mismatch.output].detach().cpu().contiguous() for t in (expected, found)]
    return what, *difference(*pair)


def _weights(a: nn.Module | None, b: nn.Module | None) -> list[str]:
    """A note of the parameters and buffers in which two models differ, if they do."""
    if a is None or b is None:
        return []
    others = dict(_state(b))
    found = []
    for name, p in _state(a):
        q = others.get(name)
        if q is None or q is p or not {type(p), type(q)} <= {Tensor, nn.Parameter} or p.is_meta or q.is_meta:
            continue
        if mismatch := compare(p.detach().contiguous(), q.detach().to(p.device).contiguous()):
            found.append(f"{name} {mismatch.sentence}")
    if not found:
        return []
    some = "" if len(found) <= _NAMED else f"; and {len(found) - _NAMED} more"
    return [f"the weights differ (model_b's, with model_a's as the reference): {'; '.join(found[:_NAMED])}{some}"]


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        yield _path(name), t
