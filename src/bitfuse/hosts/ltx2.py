"""What the adapters share: the forwards that stand in a model, AdaLN values, a second CUDA stream, a rotary check."""

from __future__ import annotations

import contextlib
import inspect
import operator
import os
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.bits import compare
from bitfuse.core.conditions import around
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Operator, Route
from bitfuse.core.originals import Originals
from bitfuse.hosts.site import COMPILING, Handle, Site, ways
from bitfuse.hosts.source import is_own, names_of
from bitfuse.run.swap import Forward, bound, hooked, hooked_everywhere, innermost, named, ours_in, plain

Ada = tuple[Tensor, Tensor | None]  # an AdaLN value [B, T or 1, D] and the table row [D] that is added to it

ABSENT = (None, None, None, None)  # no modulation


def modulation(scale: Ada, shift: Ada) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """scale, shift, scale_table, shift_table, as the operators take them."""
    return scale[0], shift[0], scale[1], shift[1]


ENDED = "the acceleration was restored"
Entry = tuple[Any, str, str]  # owner, name, what sentences call it


class Model:
    """What the forwards that stand in one accelerated model share.

    left_out    the functions of the host and of PyTorch that the forwards of ours leave out, by the kind of part:
                (owner, name, what sentences call it). Whether each is still the one that was read is looked at once
                per forward of the whole model (in 4 us), and else at each call of a part
    """

    def __init__(self, handle: Handle, left_out: Mapping[str, Iterable[Entry]]):
        self.handle = handle
        self._left_out = {
            kind: {**dict(map(_keyed, _CALLING_A_MODULE)), **dict(map(_keyed, entries))}
            for kind, entries in left_out.items()
        }
        every = {key: entry for entries in self._left_out.values() for key, entry in entries.items()}
        self._originals = Originals(every.values())
        self._foreign = self._find_foreign()
        self._here = threading.local()  # .forward: the latest of this thread, which may be over
        self._forwards: list[_UnderWay] = []
        self.parts = 0  # of ours that stand in it
        handle.models.append(self)

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
    """Base of both: a forward that stands in an accelerated model for as long as that is in force."""

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
            return self.stock(*args, **kwargs)
        forward = _UnderWay()
        try:
            with forward.lock:
                self.model.begin(forward)
                run = self.inner if self.inner is not None and self.model.handle.on else self.stock
                return run(*args, **kwargs)
        finally:
            self.model.end()

    @classmethod
    def install(cls, module: Any, model: Model) -> None:
        """Where somebody has wrapped the forward that stays, and each part looks by itself."""
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
        model.parts += 1

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
            for site in self.sites:
                site.fall(reason)
        return bound(module)(*args, **kwargs)

    def _another(self, module: Any) -> str | None:
        if type(module).forward is self.own:
            return None
        return f"the forward of {named(type(module))} was replaced meanwhile"


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


def own(owner: Any, name: str) -> bool:
    """Whether the function that stands under this name is the one that its owner's package has there: a wrapper that
    somebody has put there is not, nor another function of that package, nor one whose code was replaced.

    One of bitfuse's own does no harm: `bitfuse.trace` listens at `torch.nn.Module.__call__`.
    """
    classes = owner.__mro__ if isinstance(owner, type) else ()
    holder = next((kind for kind in classes if name in vars(kind)), owner)
    package = (holder.__name__ if isinstance(holder, types.ModuleType) else holder.__module__).partition(".")[0]
    found = inspect.getattr_static(owner, name)
    found = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
    if not isinstance(found, types.FunctionType):
        names = {name, name.strip("_")}  # torch.Tensor.__neg__ is TensorBase.neg
        return any(is_own(found, sys.modules[package], one) for one in names)
    code = found.__code__
    if code.co_filename.startswith(os.path.dirname(os.path.dirname(__file__)) + os.sep):
        return True
    home = getattr(sys.modules.get(package), "__path__", ())
    if not any(code.co_filename.startswith(f"{folder}{os.sep}") for folder in home):
        return False
    within = {kind.__name__ for kind in classes}
    return any(_stands_for(qualname, found, name, within) for qualname in names_of(found))


def _stands_for(qualname: str, function: types.FunctionType, name: str, classes: set[str]) -> bool:
    """Whether a function that its file has under this qualified name is the one that is to be found as `name`."""
    *outer, last = qualname.split(".")
    if "<locals>" in outer:  # what a decorator of the package made; it keeps the name
        return function.__name__ == name
    alias = name == "__call__" and last == "_wrapped_call_impl"  # as torch.nn.Module has it
    return (last == name or alias) and (not outer or outer[-1] in classes)


def calls_of(kind: type, label: str) -> list[Entry]:
    """The functions that are left out where a module of this class is not called."""
    names = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
    return [(kind, name, f"{label}.{name}") for name in names]


def watched() -> bool:
    """Whether a mode sees every PyTorch op (FakeTensorMode, say), under which a host's function can't be tried."""
    return torch._C._len_torch_dispatch_stack() > 0


def of_operators(operators: Iterable[Operator]) -> list[Entry]:
    """The functions of others that are left out when these operators run instead of their references."""
    return [entry for used in operators for entry in used.originals if not entry[2].startswith("bitfuse.")]


# How a module is called: a norm, say, that is not called when it is fused.
_CALLING_A_MODULE = [
    (torch.nn.Module, name, f"torch.nn.Module.{name}") for name in ("__call__", "_call_impl", "_wrapped_call_impl")
]
_CALLING_A_MODULE += calls_of(torch.nn.RMSNorm, "torch.nn.RMSNorm")


class Norms:
    """The norms of a block that are not called when they are fused: whether each is still as it was taken over.

    It is looked at before each call of the block, so it is kept as plain comparisons: 8 norms take 2 us.
    """

    def __init__(self, block: Any, names: Iterable[str]):
        norms = {name: getattr(block, name) for name in names}
        self._norms = [(name, norm, norm.__dict__, type(norm), norm.eps) for name, norm in norms.items()]

    def changed(self, block: Any) -> str | None:
        """Why the norms must be called, if so."""
        children = block._modules
        for name, norm, attributes, kind, eps in self._norms:
            if children.get(name) is not norm or attributes.get("eps") != eps:
                return f"{name} was replaced or changed meanwhile"
            if type(norm) is not kind and ways(type(norm)) != ways(kind):
                return f"{name} was replaced or changed meanwhile"
            if attributes["_parameters"].get("weight") is not None or attributes["_parameters"].get("bias") is not None:
                return f"{name} has got a weight meanwhile"
            if attributes.get("weight") is not None or attributes.get("bias") is not None:
                return f"{name} has got a weight meanwhile"
            if hooked(norm):
                return f"a hook is attached to {name}, which is not called when it is fused"
        return None


def models_in(parts: Iterable[Any], kind: type) -> list[Any]:
    """The models of this class among these parts, or inside them: in torch.compile's module, PeftModel, DDP or another
    wrapper, which may be a module or hold one as an attribute. Each once."""
    found: dict[int, Any] = {}
    for part in parts:
        held = [part] if isinstance(part, torch.nn.Module) else vars(part).values() if hasattr(part, "__dict__") else ()
        for module in held:
            if isinstance(module, torch.nn.Module):
                found |= {id(model): model for model in module.modules() if isinstance(model, kind)}
    return list(found.values())


def alone(t: Tensor) -> bool:
    """Whether nobody but the caller's one variable holds this tensor or its memory, so that it may be written into.

    `F.linear` of three dimensions returns a view of what it computed, of which that view is to be the only holder.
    """
    return _holders(t) == _ALONE[t._base is not None] and sys.getrefcount(t) <= _REFERENCES


def _holders(t: Tensor) -> tuple[int, int]:
    """How many hold its memory, in C++, and the tensor that it is a view of, in Python."""
    memory = torch._C._storage_Use_Count(t.untyped_storage()._cdata)
    return memory, 0 if t._base is None else sys.getrefcount(t._base)


def _calibrate() -> tuple[int, tuple[tuple[int, int], tuple[int, int]]]:
    """What `alone` sees of tensors that one variable holds: versions of Python and PyTorch count in different ways."""

    def references(t: Tensor) -> int:
        return sys.getrefcount(t)

    with torch.no_grad():
        fresh, view = torch.empty(2, device="cpu"), torch.empty(2, device="cpu").view(1, 2)
    return references(fresh), (_holders(fresh), _holders(view))


_REFERENCES, _ALONE = _calibrate()


class Values:
    """The AdaLN values of the step under way, as views; one object serves all blocks of a model.

    All blocks of a step are handed the same `temb`, so its views are made once. They live as long as it does.
    """

    def __init__(self) -> None:
        self._views: dict[int, tuple[weakref.ref, tuple[Tensor, ...]]] = {}

    def of(self, temb: Tensor, count: int) -> tuple[Tensor, ...]:
        key = id(temb)
        found = self._views.get(key)
        if (
            found is None
            or found[0]() is not temb
            or len(found[1]) != count
            or found[1][0].data_ptr() != temb.data_ptr()  # `temb.data` was given other memory
        ):
            views = temb.unflatten(-1, (count, -1)).unbind(dim=2)  # never a copy, so on no stream
            self._views[key] = found = (weakref.ref(temb, lambda _: self._views.pop(key, None)), views)
        return found[1]


class Quiet:
    """Whether no hook, and no forward but the class's and ours, would notice in which order the modules of a block run.

    Called once per block: none of its modules has a hook or a foreign forward, nor have all modules (as while
    `bitfuse.trace` listens), and none was replaced since the block was taken over.
    """

    def __init__(self, block: Any):
        self._modules = list(block.modules())
        self._attributes = [module.__dict__ for module in self._modules]
        self._children = [child for d in self._attributes for child in d["_modules"].values()]

    def __call__(self) -> bool:
        if hooked_everywhere() or torch.nn.Module.__call__ is not torch.nn.Module._wrapped_call_impl:
            return False
        for module, d in zip(self._modules, self._attributes, strict=True):
            if d["_forward_hooks"] or d["_forward_pre_hooks"]:
                return False
            if "forward" in d and not isinstance(d["forward"], Forward) and not plain(module):
                return False
        children = [child for d in self._attributes for child in d["_modules"].values()]
        return len(children) == len(self._children) and all(map(operator.is_, children, self._children))


class Rehearsal:
    """The first call of a model's first block: it runs the PyTorch chains, and what its sites need is compiled at once.

    One after the other, each when a site first calls for it, 15 kernels took 11 s on a host with slow CPUs (H100,
    2026-11-27), and in threads 3: much of it is LLVM's, ptxas' and a C compiler's, which leave Python to other threads.
    But what is in Triton's cache is loaded by Python alone, for which threads queue: 15 took 0.8 s with 16 of them,
    0.6 s with 4. So threads begin with the first kernel that has to be compiled.

    The block runs once, as it would, so nothing but time tells of it; its sites count one call in `Site.compiling`.
    Not where a site may not fall back (`strict`), for a CUDA graph, without a GPU, or in a model of few blocks, where
    one of them on PyTorch's chains is more than is won.

    under_way    held while the sites take part
    """

    AT_ONCE = 0.15  # seconds: a kernel in Triton's cache takes 0.03, one that is not 0.3 and more
    MIN_BLOCKS = 8

    def __init__(self, block: Any, sites: Iterable[Site]):
        self._block, self._sites = weakref.ref(block), tuple(sites)
        self._launches: dict[Any, tuple[Plan, tuple[Any, ...]]] = {}
        self.under_way = threading.Lock()

    @classmethod
    def of_first(cls, blocks: Sequence[Any], handle: Handle) -> None:
        """Have the first of these blocks that was taken over rehearse; it is `transformer_blocks.<index>`."""
        if len(blocks) < cls.MIN_BLOCKS:
            return
        for index, block in enumerate(blocks):
            if isinstance(ours := ours_in(block), Block):
                sites = [s for s in handle.sites if s.name.startswith(f"transformer_blocks.{index}.")]
                ours.rehearsal = cls(block, sites)
                return

    def route(self, operator: Operator, args: tuple[Any, ...]) -> Route:
        """The reference; and the kernel that is to be proved for these arguments is noted."""

        def take(plan: Plan, args: tuple[Any, ...]) -> None:
            self._launches.setdefault((id(plan.kernel), plan.signature(args)), (plan, args))

        operator.rehearse(take, args)
        return Route(operator.reference, COMPILING)

    def __call__(self, forward: Callable[[], Any]) -> Any:
        if not self._unnoticed():
            return forward()
        for site in self._sites:
            site.rehearsal = self
        with self.under_way:
            result = forward()
        for site in self._sites:
            site.rehearsal = None
        self._compile(list(self._launches.values()))
        return result

    def _compile(self, launches: list[tuple[Plan, tuple[Any, ...]]]) -> None:
        waiting = iter(launches)
        for number, (plan, args) in enumerate(waiting):
            start = time.perf_counter()
            with contextlib.suppress(Exception):  # it shows again where the kernel is proved
                plan.compile(args)
            # the first one's time is for Triton to start up
            if number and time.perf_counter() - start > self.AT_ONCE:
                break
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for plan, args in waiting:
                _ = plan.kernel.compiled  # made here: two threads would make one each
                pool.submit(plan.compile, args)

    def _unnoticed(self) -> bool:
        if any(site.strict for site in self._sites) or next(around(), None) is not None:
            return False
        return self._compiles()

    def _compiles(self) -> bool:
        block = self._block()
        on_a_gpu = block is not None and next(block.parameters()).is_cuda
        return on_a_gpu and not torch.cuda.is_current_stream_capturing()


class Beside:
    """A second CUDA stream for the audio half of each block: its kernels are too small to fill a GPU by themselves.

    Streams change when a kernel runs, not which kernel, so no bit. The second stream forks off at the start of a
    block, meets the first where video and audio look at each other, and joins it at the end. Whatever it allocates
    is freed to itself, and it allocates nothing before it has waited for the first stream: so no memory is used
    again while the other stream still reads it, without `record_stream`.

    Not where somebody is called along the way (hooks, LoRA's included, see streams as they please), and not for few
    tokens unless a CUDA graph is captured: there the CPU sets the pace, and switching streams takes its time.
    """

    MIN_ROWS = 4096

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, x: Tensor, quiet: Callable[[], bool]) -> Any:
        """The second stream, where it pays and is safe, else None."""
        if not x.is_cuda or torch.is_grad_enabled():
            return None
        few = x.shape[0] * x.shape[1] < self.MIN_ROWS
        if (few and not torch.cuda.is_current_stream_capturing()) or not quiet():
            return None
        if x.device not in self._streams:
            self._streams[x.device] = torch.cuda.Stream(x.device)
        return self._streams[x.device]


def weights_of(module: torch.nn.Module) -> tuple[torch.dtype, torch.device]:
    """dtype and device on which a module will compute, by its weights (those that are quantised tell nothing)."""
    weights = [p for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16, torch.float32)]
    dtype = weights[0].dtype if weights else torch.bfloat16
    return dtype, next((p.device for p in weights if p.is_cuda), torch.device("cpu"))


def rotary_difference(
    host: Callable[[Tensor, Tensor, Tensor], Tensor],
    operator: Operator,
    interleaved: bool,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Where the host's own rotary function and the operator's reference part, in this process; None: nowhere.

    host    called as f(x, cos, sin), on the inputs of the operator's battery
    """
    x = torch.empty(2, 5, heads * head_dim, dtype=dtype, device=device)
    table = torch.empty(x.shape if interleaved else (2, 5, heads, head_dim // 2), dtype=table_dtype, device=device)
    table = table if interleaved else table.swapaxes(1, 2)
    with torch.no_grad():
        for family, args in operator.battery(x, table, table):
            if mismatch := compare(host(*args), operator.reference(*args)):
                return f"{mismatch.sentence}, on the battery's '{family}' inputs"
    return None
