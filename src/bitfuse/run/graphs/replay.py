"""A forward through CUDA graphs: when one is captured, when it is replayed, and what runs otherwise.

The calls of one key (`key`) share an entry: the first runs the forward, the second runs it and captures a graph of it,
further ones replay the graph. Before each, the model is compared with what it was (`watch`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from bitfuse.core import proof
from bitfuse.core.bits import compare
from bitfuse.core.conditions import around
from bitfuse.run import twin
from bitfuse.run.graphs.cuda import Cuda
from bitfuse.run.graphs.key import Call, CannotKey, Parts, settings, take_apart
from bitfuse.run.graphs.watch import Watch
from bitfuse.run.swap import ours_in, plain

if TYPE_CHECKING:
    from bitfuse.run.memo import Prelude

_KEYS_KEPT = 256  # keys remembered, most of them without a graph

FIRST = "a first call with these inputs and settings"
"""The reason of a call that runs without a graph as each first one does; any other is one that lost something."""


@dataclasses.dataclass
class _Graph:
    """A captured forward.

    twins            of the call's tensors, each with its memory: what the graph reads
    prelude          what the forward computes of inputs that stay the same; None where nothing is kept
    prelude_graph    that, captured apart, to be replayed before; None where the forward computes no such thing
    outputs          tensors that each replay fills; `rebuild` makes a result of copies of them
    """

    twins: list[tuple[Tensor, Tensor]]
    prelude: Prelude | None
    prelude_graph: Any = None
    graph: Any = None
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    rebuild: Callable[[list[Tensor]], Any] = tuple

    @property
    def nbytes(self) -> int:
        """What it keeps outside the pool."""
        return sum(memory.nbytes for _, memory in self.twins) + (self.prelude.nbytes if self.prelude else 0)


@dataclasses.dataclass
class _Entry:
    """What is known of one key. `wait` is the number of calls that run eagerly before the capture."""

    wait: int
    calls: int = 0
    refused: str | None = None
    graph: _Graph | None = None


@dataclasses.dataclass
class Counts:
    """What a `GraphedForward` did, which a report may ask for when the model is gone.

    reasons     why calls ran without a graph, and how many for each reason
    replays     calls answered by a replay
    captures    graphs captured
    """

    reasons: Counter[str] = dataclasses.field(default_factory=Counter)
    replays: int = 0
    captures: int = 0


class GraphedForward:
    """`forward`, through a CUDA graph where that can't change a bit of the result.

    The first call of a kind runs eagerly, where kernels are proved and tuned; the second one too, and its graph is
    captured and compared with it; further ones replay. Results are new tensors, safe to keep.

    model            its module, which is watched; held weakly
    forward          called as `forward(*args, **kwargs)`
    limit            graphs kept; the one unused for longest goes, and its key waits ten times as long for the next
    after            eager calls before a capture, at least 1
    on_capture       called with (args, kwargs) before a capture, for a host that prepares what the graph will read
    before_replay    called with (args, kwargs) after that and before each replay, to refresh such things in place
    settings         whatever else kernels are chosen by in the host, as a hashable value: part of the key
    complete         given the model and all arguments by their names, returns further ones, which the forward would
                     otherwise make itself in a way that can't be captured (on the CPU, say)
    prelude          makes what notes the parts of a forward that need no replay while their inputs are the same, and
                     hands them to the capture: `bitfuse.run.memo.Prelude`

    `on_capture` and `before_replay` may return a sentence: why this call is to run without a graph.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        limit: int = 8,
        on_capture: Callable[[tuple, dict], str | None] | None = None,
        before_replay: Callable[[tuple, dict], str | None] | None = None,
        *,
        after: int = 1,
        settings: Callable[[], Hashable] | None = None,
        complete: Callable[[nn.Module, dict[str, Any]], dict[str, Any]] | None = None,
        prelude: Callable[[], Prelude] | None = None,
    ):
        if limit < 1 or after < 1:
            raise ValueError(f"limit is {limit} and after is {after}; both must be at least 1")
        self.counts = Counts()
        self._model = weakref.ref(model, functools.partial(_gone, weakref.ref(self)))
        self._forward = forward
        self._limit, self._after = limit, after
        self._on_capture, self._before_replay, self._host_settings = on_capture, before_replay, settings
        self._complete, self._prelude = complete, prelude
        self._names = list(inspect.signature(forward).parameters)
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()
        self._watch: Watch | None = None
        self._retired: str | None = None
        self._news: str | None = None  # how the model has changed since the call before, if so
        self._lock = threading.Lock()
        self._cuda = Cuda()

    @property
    def reasons(self) -> Counter[str]:
        return self.counts.reasons

    @property
    def replays(self) -> int:
        return self.counts.replays

    @property
    def captures(self) -> int:
        return self.counts.captures

    @property
    def graphs(self) -> int:
        """Graphs kept at present."""
        return sum(entry.graph is not None for entry in self._entries.values())

    def memory(self) -> int:
        """Bytes that the graphs keep: their pool, which nothing else can use meanwhile, inputs and preludes."""
        return self._cuda.pool_bytes() + sum(entry.graph.nbytes for entry in self._entries.values() if entry.graph)

    def reset(self) -> None:
        """Drop all graphs and give their memory back, but for cuBLAS' workspace (33 MB on an H100): PyTorch keeps it.

        Further calls start over.
        """
        with self._lock:
            self._drop_all()

    def retire(self, reason: str) -> None:
        """Use no graph any more, for this reason."""
        self._retired = reason
        if not self._lock.locked():  # else the call that is under way drops them at its end
            self.reset()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a copy or a pickle of its model, the forward of the class: that one is a plain model."""
        model = self._model()
        if model is None:
            raise TypeError("the model of this GraphedForward is gone; there is nothing to copy")
        return type(model).forward.__get__, (model,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler gets the forward itself, and no counting in its graph
            return self._forward(*args, **kwargs)
        if self._lock.locked():
            return self._eagerly("another call of this model is under way", args, kwargs)
        with self._lock:  # not acquired and released by hand: Ctrl-C between two lines would leave it held
            try:
                self._news = None
                return self._answer(*self._completed(args, kwargs))
            finally:
                if self._retired is not None:
                    self._drop_all()

    # Below, the lock is held, but in `_eagerly` where it says so.

    def _answer(self, args: tuple, kwargs: dict) -> Any:
        call = self._look(args, kwargs)
        if isinstance(call, str):
            return self._eagerly(call, args, kwargs, alone=True)
        return self._run(call, args, kwargs)

    def _completed(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments, and those that the forward would make itself."""
        model = self._model()
        if self._complete is None or self._retired is not None or model is None:
            return args, kwargs
        by_position = dict(zip(self._names, args, strict=False))
        made = self._complete(model, {**by_position, **kwargs})
        replaced = [made.pop(name, value) for name, value in by_position.items()]
        return (*replaced, *args[len(replaced) :]), {**kwargs, **made}

    def _look(self, args: tuple, kwargs: dict) -> Call | str:
        """The call taken apart, or why it runs without a graph."""
        model = self._model()
        if self._retired or model is None:
            return self._retired or "the model is gone"
        if (reason := next(around(), None)) is not None:
            return reason
        if _has_any_global_hook():
            return "a hook is registered for all modules"
        watch = self._watched(model)
        if watch.reason is not None:
            return watch.reason
        if torch.is_grad_enabled() and watch.wants_gradient(model):
            return "a gradient is required of the weights; torch.no_grad() allows graphs"
        try:
            call = take_apart(self._names, args, kwargs, self._cuda.holds)
        except CannotKey as error:
            return str(error)
        if self._cuda.capturing():
            return "a CUDA graph is being captured around this call"
        if watch.devices - {call.device}:
            return f"{call.names[0]} is on {call.device} and the weights are not"
        try:
            functions = watch.functions.state()
        except KeyError as gone:
            return f"a function that the forward may call, {gone}, is gone"
        call.key += (settings(), self._host_settings() if self._host_settings else None, functions)
        return call

    def _watched(self, model: nn.Module) -> Watch:
        """The watch of the model as it is. What was captured of another, or of a kernel that may differ, is dropped."""
        if self._watch and self._watch.condemned != proof.condemnations():
            self._drop_all()
        if self._watch and (changed := self._first_look(self._watch, model)):
            self._forget(changed)
        if self._watch is None:
            self._watch = Watch(model, self, self._cuda.holds)
        return self._watch

    def _first_look(self, watch: Watch, model: nn.Module) -> str | None:
        """What has changed of the model, as far as that must be known before a replay: the rest is `_run`'s.

        All of it where there is no graph to replay, and where there may be other processes: of a replay that is thrown
        away they would know nothing, and wait for its part in what they do together.
        """
        return watch.moved(model) if self.graphs and not _together() else watch.changed(model)

    def _altered(self, model: nn.Module | None) -> bool:
        """Whether the model has changed in what `_first_look` has left out; what was captured is then dropped."""
        changed = self._watch.altered(model) if self._watch is not None and model is not None else None
        if changed is not None:
            self._forget(changed)
        return changed is not None

    def _forget(self, changed: str) -> None:
        """Drop what was captured of a model that has changed."""
        since = "capture" if self.graphs else "last call"
        self._news = f"weights or hooks of {changed} changed since the {since}"
        self._drop_all()

    def _run(self, call: Call, args: tuple, kwargs: dict) -> Any:
        model = self._model()
        entry = self._entries.setdefault(call.key, _Entry(self._after))
        if entry.graph is None and self.graphs and self._altered(model):
            return self._answer(args, kwargs)
        self._entries.move_to_end(call.key)
        if entry.refused:
            return self._eagerly(entry.refused, args, kwargs, alone=True)
        if entry.graph:
            reason = self._before_replay(args, kwargs) if self._before_replay else None
            if reason:
                return self._eagerly(reason, args, kwargs, alone=True)
            prelude = entry.graph.prelude
            if prelude is not None and _together():
                prelude.outdated()
            result = self._replay(entry.graph, call)
            if self._altered(model):
                return self._answer(args, kwargs)
            if prelude is not None and prelude.outdated():  # looked at while the GPU is at work, as the model is
                result = self._replay(entry.graph, call)
            self.counts.replays += 1
            return result
        entry.calls += 1
        if entry.calls <= entry.wait:
            while len(self._entries) > _KEYS_KEPT:
                self._drop(self._entries.popitem(last=False)[1])
            return self._eagerly(self._news or FIRST, args, kwargs, alone=True)
        offset, prelude = self._cuda.drawn(call.device), self._prelude() if self._prelude else None
        with prelude.in_use() if prelude else contextlib.nullcontext():
            result = self._eagerly(None, args, kwargs, alone=True)
        if self._cuda.drawn(call.device) != offset:
            entry.refused = "the forward draws random numbers"
        reason = entry.refused or self._capture(entry, call, args, kwargs, result, prelude)
        if reason:
            self.reasons[reason] += 1
        return result

    def _eagerly(self, reason: str | None, args: tuple, kwargs: dict, alone: bool = False) -> Any:
        """The forward itself. Alone, not beside another call, it gets the graphs' memory where it needs that."""
        if reason:
            self.reasons[reason] += 1
        try:
            return self._forward(*args, **kwargs)
        except torch.OutOfMemoryError:
            if not (alone and self.graphs):
                raise
        self._drop_all()  # out here, where the traceback no longer holds what the forward had allocated
        return self._forward(*args, **kwargs)

    def _capture(self, entry: _Entry, call: Call, args: tuple, kwargs: dict, expected: Any, prelude: Any) -> str | None:
        """Give the entry a graph, compared with what the forward has just returned; or say why not."""
        model = self._model()
        if self._watch is None or model is None:
            return "the graphs were dropped meanwhile"
        if changed := self._watch.changed(model):
            return f"the forward itself changed {changed}"
        for prepare in (self._on_capture, self._before_replay):
            if prepare and (reason := prepare(args, kwargs)):
                return reason
        try:
            entry.refused = self._try_capture(entry, call, expected, prelude)
            return entry.refused
        except torch.OutOfMemoryError:
            pass  # its traceback holds memory, so the rest is out here
        except Exception as error:
            message = (str(error) or "no message").splitlines()[0]
            entry.refused = f"the capture failed: {type(error).__name__}: {message}"
            return entry.refused
        self._drop_all()
        self._entries[call.key] = _Entry(10 * entry.wait)
        return "there was no memory left for a capture"

    def _try_capture(self, entry: _Entry, call: Call, expected: Any, prelude: Prelude | None) -> str | None:
        of_eager = Parts(self._cuda.holds, 0)
        graph = None
        try:
            of_eager.take(expected, "the result")
            if any(t.element_size() > 8 for t in of_eager.tensors):
                return "a result has elements of more than 8 bytes, which can't be compared"
            graph = self._laid_out(call, prelude)
            if reason := self._record(graph, call) or self._difference(graph, call, of_eager):
                return reason
            entry.graph = graph
        except CannotKey as error:
            return str(error)
        finally:
            if entry.graph is None and graph is not None:
                self._free(graph)
        self.counts.captures += 1
        while self.graphs > self._limit:  # after the capture, so that the pool is never empty in between
            oldest = next(e for e in self._entries.values() if e.graph)
            self._drop(oldest)
            oldest.calls, oldest.wait = 0, 10 * oldest.wait
        return None

    def _laid_out(self, call: Call, prelude: Prelude | None) -> _Graph:
        """The memory of a graph for this call, with the call's data in it; nothing is captured yet."""
        with torch.inference_mode(False), torch.no_grad():  # plain tensors, which count how often they are written to
            twins = [twin.stand_in(t) for t in call.tensors]
            if prelude:
                prelude.lay_out(call.tensors, [t for t, _ in twins])
        with self._cuda.turn(call.device):
            for (_, memory), t in zip(twins, call.tensors, strict=True):
                memory.copy_(twin.flat(t))
        return _Graph(twins, prelude)

    def _record(self, graph: _Graph, call: Call) -> str | None:
        """Capture the forward, and its prelude before it; or why there is to be no graph."""
        prelude, inputs = graph.prelude, [t for t, _ in graph.twins]
        args, kwargs = call.rebuild(inputs)
        versions = [t._version for t in inputs]

        def forward() -> Any:
            with prelude.in_use() if prelude else contextlib.nullcontext():
                return self._forward(*args, **kwargs)

        if prelude and prelude.arguments:
            graph.prelude_graph, _ = self._cuda.capture(call.device, prelude.fill)
        graph.graph, result = self._cuda.capture(call.device, forward)
        for name, t, version in zip(call.names, inputs, versions, strict=True):
            if t._version != version:
                return f"the forward writes into {name}"
        parts = Parts(self._cuda.holds, 0)
        graph.rebuild, graph.outputs = parts.take(result, "the result"), parts.tensors
        return None

    def _difference(self, graph: _Graph, call: Call, of_eager: Parts) -> str | None:
        """Replay the graph, and say where that differs from what the forward returned."""
        found = Parts(self._cuda.holds, 0)
        found.take(self._replay(graph, call), "the result")
        if mismatch := compare(tuple(of_eager.tensors), tuple(found.tensors)):
            return f"a replay is not the forward: {mismatch.sentence}"
        if found.key_of_anywhere() != of_eager.key_of_anywhere():
            return "a replay returns another structure than the forward"
        return None

    def _replay(self, graph: _Graph, call: Call) -> Any:
        prelude = graph.prelude if graph.prelude_graph is not None else None
        stale = prelude is not None and prelude.stale(call.tensors)
        same = prelude.arguments if prelude is not None and not stale else ()
        with self._cuda.turn(call.device):
            for i, ((_, memory), t) in enumerate(zip(graph.twins, call.tensors, strict=True)):
                if i not in same:
                    memory.copy_(twin.flat(t))
            if prelude is not None and stale:
                self._cuda.replay(graph.prelude_graph)
                prelude.filled(call.tensors)
            self._cuda.replay(graph.graph)
            return graph.rebuild([twin.copy(t) for t in graph.outputs])

    def _drop(self, entry: _Entry) -> None:
        if entry.graph is not None:
            self._free(entry.graph)
            entry.graph = None

    def _free(self, graph: _Graph) -> None:
        captured = [one for one in (graph.graph, graph.prelude_graph) if one is not None]
        if captured:
            # for replays under way on any stream: their memory is about to be given away
            self._cuda.wait(graph.twins[0][0].device)
        for one in captured:
            self._cuda.drop(one)

    def _drop_all(self) -> None:
        graphs = self.graphs
        for entry in self._entries.values():
            self._drop(entry)
        self._entries.clear()
        self._watch = None
        if graphs:
            self._cuda.give_back()


def _together() -> bool:
    """Whether there may be other processes that compute this forward with this one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _gone(reference: weakref.ref, _: object) -> None:
    """The model is gone: its graph drops what it watches of it, and its memory."""
    graph = reference()
    if graph is not None:
        graph.retire("the model is gone")


def graph_forward(model: nn.Module, handle: Any, **options: Any) -> GraphedForward:
    """Run a module's forward through a `GraphedForward` until the handle is restored; `options` are that class's.

    It goes inside a forward of ours that stands in the module and has room for it (`hosts.common.ModelForward`), else
    it becomes an attribute of the module's own. Where there is another one already (a hook, offloading) that stays,
    and the result only says so.
    """
    own, reference = type(model).forward, weakref.ref(model)  # a module that holds its own method is a cycle

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        module: Any = reference()
        return type(module).forward(module, *args, **kwargs)

    forward.__signature__ = inspect.signature(own.__get__(model))  # type: ignore[attr-defined]
    replay = GraphedForward(model, forward, **options)
    handle.add_graph(replay)
    around: Any = ours_in(model)
    if around is not None and hasattr(around, "inner"):
        around.inner = replay
    elif plain(model):
        functools.update_wrapper(replay, forward)
        model.forward = replay
    else:
        replay.retire("the forward of the model was replaced before bitfuse came (a hook, or offloading)")
        return replay
    placed = weakref.ref(replay)

    def undo() -> None:
        module, found = reference(), placed()
        if found is None:
            return
        found.retire("bitfuse was restored")
        if module is not None and module.__dict__.get("forward") is found:  # somebody else's, set since, stays
            del module.forward

    handle.on_restore(undo)
    return replay
