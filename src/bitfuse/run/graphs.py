"""CUDA-graph replay of a whole transformer forward, for any host.

A replay launches what a capture recorded: the same kernels on the same addresses. So it is right only while all
that the forward's Python code looked at is as it was. Here that is the call's key (forms of tensors, values of
everything else, PyTorch's settings) and a watch over the model (weights, hooks, modes, LoRA scales, the functions
that it may call); whatever they can't cover runs the forward itself, for a reason that is a sentence. Each graph is
compared with the forward, bit for bit, before a result of it is handed out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import inspect
import sys
import threading
import types
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _has_any_global_hook

from bitfuse.core import conditions, proof
from bitfuse.core.bits import compare
from bitfuse.core.conditions import around
from bitfuse.run.swap import COPIED_BY, Forward, ours_in, plain

_HOST_ELEMENTS = 64  # a CPU tensor of up to so many is a value, like a float: a mask of samples, a noise level
_KEYS_KEPT = 256  # keys remembered, most of them without a graph
_ALIGNED = 256  # bytes: cuBLASLt picks a kernel by the alignment of its operands up to here, ATen up to 16


_failed: list[Any] = []  # CUDAGraphs whose capture failed: see `_Cuda._clean_up`


class _Cuda:
    """The calls to CUDA, apart from the rest, so that tests without a GPU can put something else here.

    All graphs share one memory pool: each overwrites what the others left. That is safe in any order, one at a
    time, because a graph reads only its inputs, the weights and what the same replay wrote, and its outputs are
    copied before the next one starts.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._pools: dict[Any, Any] = {}  # of each graph; more than one pool only after a capture that failed
        self._done: torch.cuda.Event | None = None

    def holds(self, t: Tensor) -> bool:
        return t.is_cuda

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def drawn(self, device: torch.device) -> int:
        """How far the device's default generator has got: kept on the CPU, so this doesn't wait."""
        return torch.cuda.default_generators[device.index].get_offset()

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        """One graph at a time: on whichever stream this is, after the work of the turn before."""
        with torch.cuda.device(device):
            if self._done is not None:
                self._done.wait()
            yield
            self._done = torch.cuda.Event()
            self._done.record()

    def capture(self, device: torch.device, run: Callable[[], Any]) -> tuple[Any, Any]:
        """(graph, what `run` returned: tensors that each replay fills)"""
        graph, began, failure = torch.cuda.CUDAGraph(), False, None
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        collecting = gc.isenabled()
        gc.disable()  # a cycle collected halfway might free a graph or an event, which breaks the capture
        try:
            # A capture that ends badly leaves its stream the current one; the outer context puts that right.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                began = True
                try:
                    result = run()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            self._clean_up(device, graph, began)
            if failure is not None and failure is not error:  # ending a broken capture is an error that says less
                raise failure from None
            raise
        finally:
            failure = None  # its traceback holds this frame, and with it what the forward had allocated
            if collecting:
                gc.enable()
        self._pools[graph] = self._pool
        return graph, result

    def _clean_up(self, device: torch.device, graph: Any, began: bool) -> None:
        """Undo what PyTorch leaves behind of a failed capture.

        Up to torch 2.11 `capture_end` raises before it tells the allocators and the generator (pytorch#180395 and
        #171263). From then on the allocator for the device refuses to free cached memory, and the generator to draw;
        a small capture that succeeds puts the generator right. The allocator for pinned memory can't be told from
        here: it refuses the same pool a second time, and keeps asking the graph, which therefore stays.
        """
        _failed.append(graph)
        try:
            graph.pool()  # raises unless the capture itself ended well
        except RuntimeError:
            with contextlib.suppress(RuntimeError):  # raised where the allocator was told, or never heard of it
                torch._C._cuda_endAllocateToPool(device.index, self._pool)
                began = True
            if began:  # the beginning of a capture takes a share in its pool, which only an ended one gives back
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_releasePool(device.index, self._pool)
        graph.reset()
        self._stream = self._pool = None
        with torch.cuda.device(device):
            scratch, small = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
            with torch.cuda.graph(small, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                scratch.zero_()
            small.reset()

    def replay(self, graph: Any) -> None:
        graph.replay()

    def drop(self, graph: Any) -> None:
        graph.reset()
        del self._pools[graph]
        if self._pool not in self._pools.values():  # the allocator takes no graphs into a pool that had its last one
            self._pool = None

    def wait(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def give_back(self) -> None:
        torch.cuda.empty_cache()

    def pool_bytes(self) -> int:
        pools = set(self._pools.values())
        segments = torch.cuda.memory_snapshot() if pools else []
        return sum(segment["total_size"] for segment in segments if segment["segment_pool_id"] in pools)


# -- tensors that stay where they are -----------------------------------------------------------------------------


def flat(t: Tensor) -> Tensor:
    """All memory from a tensor's first element to its last, gaps included: as it is, whatever the strides."""
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.as_strided((extent,), (1,))


def stand_in(t: Tensor) -> tuple[Tensor, Tensor]:
    """A new tensor with the same strides and base alignment, on which kernels are chosen; and its memory, flat."""
    n, size = flat(t).numel(), t.element_size()
    memory = torch.empty(n + _ALIGNED // size, dtype=t.dtype, device=t.device)
    memory = memory[(t.data_ptr() - memory.data_ptr()) % _ALIGNED // size :][:n]
    return memory.as_strided(t.shape, t.stride()), memory


def _copy(t: Tensor) -> Tensor:
    # Tensor by tensor: torch._foreach_copy_ may go through float32, which changes the payloads of NaNs.
    if t.is_contiguous() and t.data_ptr() % _ALIGNED == 0:
        return t.clone()
    twin, memory = stand_in(t)
    memory.copy_(flat(t))
    return twin


# -- what a call is -----------------------------------------------------------------------------------------------


class _CannotKey(Exception):
    """What is in a call or a result that a graph can't take, in a sentence."""


_VALUES = (type(None), bool, int, float, str)


class _Parts:
    """A structure of arguments or results: its tensors on the device, and a key that says all else about it."""

    def __init__(self, holds: Callable[[Tensor], bool], host_elements: int):
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.key: list[Hashable] = []
        self._holds, self._host_elements = holds, host_elements

    def take(self, value: Any, name: str) -> Callable[[list[Tensor]], Any]:
        """Note what is in the value; returns what builds it anew around other tensors."""
        kind = type(value)
        if isinstance(value, Tensor):
            return self._take_tensor(value, name)
        if kind in _VALUES:
            self.key.append((kind, repr(value) if kind is float else value))  # 0.0 == -0.0, and nan != nan
            return lambda tensors: value
        if kind is list or kind is tuple:
            self.key.append((kind, len(value)))
            parts = [self.take(item, f"{name}[{i}]") for i, item in enumerate(value)]
            return lambda tensors: kind(part(tensors) for part in parts)
        fields = _fields(value)
        if fields is None:
            raise _CannotKey(f"{name} is a {kind.__module__}.{kind.__qualname__}, which a graph can't be keyed by")
        self.key.append((kind, tuple(fields)))
        named = {field: self.take(item, f"{name}.{field}") for field, item in fields.items()}
        return lambda tensors: kind(**{field: part(tensors) for field, part in named.items()})

    def _take_tensor(self, t: Tensor, name: str) -> Callable[[list[Tensor]], Any]:
        if (reason := next(conditions.plain({name: t}), None)) is not None:
            raise _CannotKey(reason)
        if t.requires_grad and torch.is_grad_enabled():
            raise _CannotKey(f"a gradient is required of {name}")
        form = (t.dtype, t.shape, t.stride(), t.requires_grad)
        if not self._holds(t):
            if t.device.type != "cpu" or t.numel() > self._host_elements:
                raise _CannotKey(f"{name} is on {t.device}, with {t.numel()} elements: a graph can't follow those")
            self.key.append((*form, tuple(t.detach().reshape(-1).view(torch.uint8).tolist())))
            return lambda tensors: t
        if self.tensors and t.device != self.tensors[0].device:
            raise _CannotKey(f"{name} is on {t.device} and {self.names[0]} on {self.tensors[0].device}")
        index = len(self.tensors)
        self.names.append(name)
        self.tensors.append(t)
        self.key.append((*form, t.device, t.data_ptr() % _ALIGNED))
        return lambda tensors: tensors[index]


def _fields(value: Any) -> dict[str, Any] | None:
    """A dictionary's or a dataclass's (diffusers' outputs are both), where its type called with them gives it back."""
    if type(value) is dict:
        return value if all(type(field) is str for field in value) else None
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return None
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    return fields if getattr(value, "__dict__", {}).keys() == fields.keys() else None


@dataclasses.dataclass
class _Call:
    """One call's arguments, taken apart; `rebuild(tensors)` gives (args, kwargs) around other tensors."""

    key: tuple
    names: list[str]
    tensors: list[Tensor]
    rebuild: Callable[[list[Tensor]], tuple[tuple, dict]]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


def _settings() -> tuple:
    """What PyTorch itself chooses kernels by. TF32 in its new form: the old getters raise once that was set."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_accumulation,
        cuda.preferred_blas_library(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
        tuple(torch._C._get_sdp_priority_order()),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch._C._get_deterministic_fill_uninitialized_memory(),
    )


# -- what the model is --------------------------------------------------------------------------------------------

_UNREAD = frozenset(nn.Module().__dict__) - {"training"} | frozenset(COPIED_BY)  # looked at in other ways, or not read
_LORA = ("scaling", "merged_adapters", "_active_adapter")  # peft's: numbers and names, baked into a graph


class _Watch:
    """All of a model that a capture depends on, to be looked at before each call in a millisecond or so.

    It is read as flat lists, one loop in C each. What it can't see: tensors kept as plain attributes, dictionaries
    and lists kept so (but those of LoRA and of attention processors), state outside the model. It holds the modules
    below the model, but not the model: a handle, which may be kept globally, holds the watch.

    reason       why no graph may be used for the model as it is, or None
    functions    those that its forward may call
    """

    def __init__(self, model: nn.Module, own: object, holds: Callable[[Tensor], bool]):
        named = [(name or "the model", module) for name, module in model.named_modules()]
        self.devices: set[torch.device] = set()
        self._holds = holds
        self.reason = next(self._why_not(named, own, holds), None)
        self._saved: list[list] = []
        self.functions = _Functions(module for _, module in named)
        if any(isinstance(module, torch.jit.ScriptModule) for _, module in named):  # these keep nothing in a __dict__
            return
        self._below = [module for _, module in named[1:]]
        self._dicts = [module.__dict__ for module in self._below]
        self._modules = [d["_modules"] for d in self._dicts if d["_modules"]]
        self._hooks = [d[kind] for d in self._dicts for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self._hooks += [d["_diffusers_hook"].hooks for d in self._dicts if "_diffusers_hook" in d]
        self._values: list[tuple[int, Callable[[dict], Any]]] = []
        self._objects: list[tuple[int, str]] = []
        self._containers: list[Any] = []
        keepers = []  # whose each of them is
        for i, (name, module) in enumerate(named):
            own_attributes = {n: v for n, v in vars(module).items() if n not in _UNREAD and not isinstance(v, Tensor)}
            if type(module) is nn.Linear:  # half of all modules; it reads none of its attributes but the weights
                own_attributes = {n: v for n, v in own_attributes.items() if n == "forward"}
            values = [n for n, v in own_attributes.items() if _is_value(v)]
            if values:
                self._values.append((i, itemgetter(*values)))
            self._objects += [(i, n) for n in own_attributes if n not in values]
            kept = [own_attributes.get(n) for n in _LORA]
            kept.append(getattr(own_attributes.get("processor"), "__dict__", None))  # its attention backend, say
            kept = [v for v in kept if type(v) in (list, dict)]
            self._containers += kept
            keepers += [name] * len(kept)
        every = [name for name, _ in named]
        children = [name for name, module in named for _ in module._modules]
        self._parameters = [d for m in self._below for d in (m._parameters, m._buffers) if d]
        weights = [name for name, m in named for _ in chain(m._parameters, m._buffers)]
        addressed = [n for n, m in named for t in chain(m._parameters.values(), m._buffers.values()) if t is not None]
        whose = [every[i] for i, _ in self._values], [every[i] for i, _ in self._objects]
        self._owners = [every, every, children, ["the model"], *whose, keepers, weights, addressed]
        self._saved = list(self._read(model))

    def changed(self, model: nn.Module) -> str | None:
        """The name of a module that is not as it was, or None."""
        try:
            for now, then, owners in zip(self._read(model), self._saved, self._owners, strict=False):
                if now != then:
                    same = [a == b for a, b in zip(now, then, strict=False)]
                    at = same.index(False) if False in same else len(same)
                    return owners[min(at, len(owners) - 1)] if owners else "the model"
        except Exception:  # an attribute that is gone, or values that don't compare: not as it was
            return "the model"
        return None

    def _read(self, model: nn.Module) -> Iterator[list]:
        root = model.__dict__
        dicts = [root, *self._dicts]
        registry = root.get("_diffusers_hook")  # of `cache_context` there is an empty one
        yield list(map(type, chain((model,), self._below)))
        yield list(map(len, dicts))  # a forward or a hook of accelerate's is put on top
        yield list(chain.from_iterable(map(dict.values, chain((root["_modules"],), self._modules))))
        hooks = (root["_forward_hooks"], root["_forward_pre_hooks"], getattr(registry, "hooks", None))
        yield [any(hooks) or any(self._hooks)]
        yield [get(dicts[i]) for i, get in self._values]
        yield [id(dicts[i][name]) for i, name in self._objects]
        yield [container.copy() for container in self._containers]
        every = self._weights(model)
        yield list(map(id, every))
        tensors = [t for t in every if t is not None]
        if self.reason is None:  # else they may be anything, some without an address; but they may come to the device
            yield list(map(Tensor.data_ptr, tensors))
        else:
            yield [(t.device, self._holds(t)) for t in tensors]

    def _weights(self, model: nn.Module) -> list[Tensor | None]:
        return list(chain.from_iterable(map(dict.values, (model._parameters, model._buffers, *self._parameters))))

    def wants_gradient(self, model: nn.Module) -> bool:
        return any(t is not None and t.requires_grad for t in self._weights(model))

    def _why_not(
        self, named: list[tuple[str, nn.Module]], own: object, holds: Callable[[Tensor], bool]
    ) -> Iterator[str]:
        for name, module in named:
            attributes = module.__dict__
            if isinstance(module, torch.jit.ScriptModule):
                yield f"{name} is TorchScript"
                return
            if hook := attributes.get("_hf_hook"):
                yield f"{name} is run by accelerate's {type(hook).__name__}, which may move weights"
            if hooks := getattr(attributes.get("_diffusers_hook"), "hooks", None):
                yield f"{name} is run by diffusers' hooks ({', '.join(hooks)})"
            if module._forward_hooks or module._forward_pre_hooks:
                yield f"{name} has a forward hook"
            forward = attributes.get("forward")
            if not (forward is own or isinstance(forward, Forward) or plain(module)):
                yield f"the forward of {name} was replaced"
            if getattr(module, "_compiled_call_impl", None) is not None:
                yield f"{name} is compiled by torch.compile"
            if isinstance(module, _DropoutNd) and module.training and module.p > 0:
                yield f"{name} drops values at random: the model is in training mode"
        root = named[0][1]
        for name, t in chain(root.named_parameters(), root.named_buffers()):
            if type(t) not in (Tensor, nn.Parameter):
                yield f"the weight {name} is a {type(t).__name__}, whose memory can't be watched"
            elif not holds(t):
                yield f"the weight {name} is on {t.device}"
            self.devices.add(t.device)
        if len(self.devices) > 1:
            yield f"the weights are on {len(self.devices)} devices"


def _is_value(v: Any) -> bool:
    return type(v) in _VALUES or (isinstance(v, tuple) and all(type(item) in _VALUES for item in v))


class _Functions:
    """The functions that a model's forward may call, by identity: a capture recorded what those of its time did.

    Those of PyTorch, of the classes of the model's modules and processors and of the Python modules in which these are
    defined, whose names stand in the code of any of them. 1,000 are looked at in 0.15 ms.
    """

    KEPT = 16  # states remembered, with the functions in them: only of what lives is an identity worth something

    def __init__(self, modules: Iterable[nn.Module]):
        kinds: dict[type, None] = {}
        for module in modules:
            kinds |= dict.fromkeys(type(module).__mro__[:-1])
            if (processor := module.__dict__.get("processor")) is not None:
                kinds |= dict.fromkeys(type(processor).__mro__[:-1])
        homes = {kind.__module__ for kind in kinds}
        homes |= {
            v.__module__ for home in homes for v in _namespace(home).values() if isinstance(v, types.FunctionType)
        }
        homes |= {"torch", "torch.nn.functional"}
        spaces: list[Any] = [*map(vars, (*kinds, Tensor)), *(_namespace(home) for home in homes if home)]
        called = {name for space in spaces for value in space.values() for name in _names_in(value)}
        called |= {"forward", "__call__"}
        self._found: list[tuple[Any, Callable[[Any], tuple[Any, ...]]]] = []
        for space in spaces:
            if names := [name for name in called.intersection(space) if _is_called(space[name])]:
                self._found.append((space, itemgetter(*names, names[0])))  # two at least, so that it gives a tuple
        self._states: OrderedDict[int, list] = OrderedDict()
        self._number = 0

    def state(self) -> int:
        """A number for what they are now: the same one whenever they are that. KeyError where one is gone."""
        now: list[Any] = [value for space, get in self._found for value in get(space)]
        now += [value.__code__ for value in now if type(value) is types.FunctionType]
        now += [len(space) for space, _ in self._found if type(space) is not dict]  # a class's: one may hide another
        for number, then in reversed(self._states.items()):
            if now == then:
                return number
        self._number += 1
        self._states[self._number] = now
        if len(self._states) > self.KEPT:
            self._states.popitem(last=False)
        return self._number


def _is_called(value: Any) -> bool:
    return callable(value) or isinstance(value, (staticmethod, classmethod, property))


def _names_in(value: Any) -> Iterator[str]:
    """The global names and the attributes that a function's code names, if it is one in Python."""
    value = getattr(value, "__func__", getattr(value, "fget", value))
    codes = [value.__code__] if isinstance(value, types.FunctionType) else []
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _namespace(module: str) -> dict[str, Any]:
    return getattr(sys.modules.get(module), "__dict__", {})


# -- the forward --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Graph:
    """A captured forward, and before it what it computes of inputs that stay the same (`prelude`, in a graph too)."""

    graph: Any
    inputs: list[Tensor]  # the memory that it reads them from
    outputs: list[Tensor]
    rebuild: Callable[[list[Tensor]], Any]
    prelude: Any = None
    prelude_graph: Any = None


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
        prelude: Callable[[], Any] | None = None,
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
        self._watch: _Watch | None = None
        self._retired: str | None = None
        self._condemned = proof.condemnations()
        self._news: str | None = None  # how the model has changed since the call before, if so
        self._lock = threading.Lock()
        self._cuda = _Cuda()

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
        graphs = [entry.graph for entry in self._entries.values() if entry.graph]
        preludes = sum(graph.prelude.nbytes for graph in graphs if graph.prelude)
        return self._cuda.pool_bytes() + preludes + sum(t.nbytes for graph in graphs for t in graph.inputs)

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
            model = self._model()
            if self._complete is not None and self._retired is None and model is not None:
                given = {**dict(zip(self._names, args, strict=False)), **kwargs}
                made = self._complete(model, given)
                positional = [made.pop(name, value) for name, value in zip(self._names, args, strict=False)]
                args = (*positional, *args[len(positional) :])
                kwargs = {**kwargs, **made}
            try:
                call = self._look(args, kwargs)
                if isinstance(call, str):
                    return self._eagerly(call, args, kwargs, alone=True)
                return self._run(call, args, kwargs)
            finally:
                if self._retired is not None:
                    self._drop_all()

    # Below, the lock is held, but in `_eagerly` where it says so.

    def _look(self, args: tuple, kwargs: dict) -> _Call | str:
        """The call taken apart, or why it runs without a graph."""
        model = self._model()
        if self._condemned != proof.condemnations():  # a kernel that the graphs may replay was seen to differ
            self._condemned = proof.condemnations()
            self._drop_all()
        if self._retired or model is None:
            return self._retired or "the model is gone"
        if (reason := next(self._around(), None)) is not None:
            return reason
        if (reason := self._changed(model)) is not None:
            return reason
        assert self._watch is not None
        if torch.is_grad_enabled() and self._watch.wants_gradient(model):
            return "a gradient is required of the weights; torch.no_grad() allows graphs"
        parts = _Parts(self._cuda.holds, _HOST_ELEMENTS)
        try:
            positions = [self._names[i] if i < len(self._names) else f"argument {i}" for i in range(len(args))]
            by_position = [parts.take(value, name) for name, value in zip(positions, args, strict=True)]
            by_name = {name: parts.take(value, name) for name, value in kwargs.items()}
        except _CannotKey as error:
            return str(error)
        if not parts.tensors:
            return "no argument is a tensor on a CUDA device"
        if self._cuda.capturing():
            return "a CUDA graph is being captured around this call"
        if self._watch.devices - {parts.tensors[0].device}:
            return f"{parts.names[0]} is on {parts.tensors[0].device} and the weights are not"
        settings = self._host_settings() if self._host_settings else None
        try:
            functions = self._watch.functions.state()
        except KeyError as gone:
            return f"a function that the forward may call, {gone}, is gone"
        key = (len(args), tuple(kwargs), tuple(parts.key), _settings(), settings, functions)

        def rebuild(tensors: list[Tensor]) -> tuple[tuple, dict]:
            return tuple(part(tensors) for part in by_position), {n: part(tensors) for n, part in by_name.items()}

        return _Call(key, parts.names, parts.tensors, rebuild)

    def _around(self) -> Iterator[str]:
        yield from around()
        if _has_any_global_hook():
            yield "a hook is registered for all modules"

    def _changed(self, model: nn.Module) -> str | None:
        """Drop what was captured of a model that is not as it was. Returns why, as it is, it gets no graph."""
        changed = self._watch.changed(model) if self._watch else None
        self._news = None
        if changed:
            self._news = f"weights or hooks of {changed} changed since the {'capture' if self.graphs else 'last call'}"
            self._drop_all()
        if self._watch is None:
            self._watch = _Watch(model, self, self._cuda.holds)
        return self._watch.reason

    def _run(self, call: _Call, args: tuple, kwargs: dict) -> Any:
        entry = self._entries.setdefault(call.key, _Entry(self._after))
        self._entries.move_to_end(call.key)
        if entry.refused:
            return self._eagerly(entry.refused, args, kwargs, alone=True)
        if entry.graph:
            reason = self._before_replay(args, kwargs) if self._before_replay else None
            if reason:
                return self._eagerly(reason, args, kwargs, alone=True)
            self.counts.replays += 1
            return self._replay(entry.graph, call)
        entry.calls += 1
        if entry.calls <= entry.wait:
            while len(self._entries) > _KEYS_KEPT:
                self._drop(self._entries.popitem(last=False)[1])
            return self._eagerly(self._news or "a first call with these inputs and settings", args, kwargs, alone=True)
        offset, prelude = self._cuda.drawn(call.device), self._prelude() if self._prelude else None
        with prelude.noting() if prelude else contextlib.nullcontext():
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

    def _capture(
        self, entry: _Entry, call: _Call, args: tuple, kwargs: dict, expected: Any, prelude: Any
    ) -> str | None:
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

    def _try_capture(self, entry: _Entry, call: _Call, expected: Any, prelude: Any) -> str | None:
        of_eager, of_graph = _Parts(self._cuda.holds, 0), _Parts(self._cuda.holds, 0)
        try:
            of_eager.take(expected, "the result")
        except _CannotKey as error:
            return str(error)
        if any(t.element_size() > 8 for t in of_eager.tensors):
            return "a result has elements of more than 8 bytes, which can't be compared"
        with torch.inference_mode(False), torch.no_grad():  # plain tensors, which count how often they are written to
            twins = [stand_in(t) for t in call.tensors]
            if prelude:
                prelude.lay_out(call.tensors, [twin for twin, _ in twins])
        with self._cuda.turn(call.device):
            for (_, memory), t in zip(twins, call.tensors, strict=True):
                memory.copy_(flat(t))
        static_args, static_kwargs = call.rebuild([twin for twin, _ in twins])
        versions = [twin._version for twin, _ in twins]

        def forward() -> Any:
            with prelude.serving() if prelude else contextlib.nullcontext():
                return self._forward(*static_args, **static_kwargs)

        captured: list[Any] = []
        try:
            if prelude and prelude.arguments:
                captured.append(self._cuda.capture(call.device, prelude.fill)[0])
            graph, result = self._cuda.capture(call.device, forward)
            captured.append(graph)
            for name, (twin, _), version in zip(call.names, twins, versions, strict=True):
                if twin._version != version:
                    return f"the forward writes into {name}"
            try:
                rebuild = of_graph.take(result, "the result")
            except _CannotKey as error:
                return str(error)
            made = _Graph(graph, [memory for _, memory in twins], of_graph.tensors, rebuild)
            if len(captured) > 1:
                made.prelude, made.prelude_graph = prelude, captured[0]
            found = _Parts(self._cuda.holds, 0)
            found.take(self._replay(made, call), "the result")
            if mismatch := compare(tuple(of_eager.tensors), tuple(found.tensors)):
                return f"a replay is not the forward: {mismatch.sentence}"
            if _without_addresses(found.key) != _without_addresses(of_eager.key):
                return "a replay returns another structure than the forward"
            entry.graph = made
        finally:
            if entry.graph is None and captured:
                self._cuda.wait(call.device)
                for one in captured:
                    self._cuda.drop(one)
        self.counts.captures += 1
        while self.graphs > self._limit:  # after the capture, so that the pool is never empty in between
            oldest = next(e for e in self._entries.values() if e.graph)
            self._drop(oldest)
            oldest.calls, oldest.wait = 0, 10 * oldest.wait
        return None

    def _replay(self, graph: _Graph, call: _Call) -> Any:
        prelude = graph.prelude
        stale = prelude is not None and prelude.stale(call.tensors)
        same = prelude.arguments if prelude is not None and not stale else ()
        with self._cuda.turn(call.device):
            for i, (memory, t) in enumerate(zip(graph.inputs, call.tensors, strict=True)):
                if i not in same:
                    memory.copy_(flat(t))
            if stale:
                self._cuda.replay(graph.prelude_graph)
                prelude.filled(call.tensors)
            self._cuda.replay(graph.graph)
            return graph.rebuild([_copy(t) for t in graph.outputs])

    def _drop(self, entry: _Entry) -> None:
        if entry.graph is not None:
            # for replays under way on any stream: their memory is about to be given away
            self._cuda.wait(entry.graph.inputs[0].device)
            for graph in (entry.graph.graph, entry.graph.prelude_graph):
                if graph is not None:
                    self._cuda.drop(graph)
            entry.graph = None

    def _drop_all(self) -> None:
        graphs = self.graphs
        for entry in self._entries.values():
            self._drop(entry)
        self._entries.clear()
        self._watch = None
        if graphs:
            self._cuda.give_back()


def _without_addresses(key: list) -> list:
    return [part[:-1] if type(part) is tuple and part and isinstance(part[0], torch.dtype) else part for part in key]


def _gone(reference: weakref.ref, _: object) -> None:
    """The model is gone: its graph drops what it watches of it, and its memory."""
    graph = reference()
    if graph is not None:
        graph.retire("the model is gone")


def graph_forward(model: nn.Module, handle: Any, **options: Any) -> GraphedForward:
    """Run a module's forward through a `GraphedForward` until the handle is restored; `options` are that class's.

    It goes inside a forward of ours that stands in the module and has room for it (`hosts.part.ModelForward`), else
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
