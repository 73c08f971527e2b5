"""What the adapters share: a block's forward, AdaLN values and second CUDA stream; a rotary function's check."""

from __future__ import annotations

import contextlib
import operator
import os
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from bitfuse import contract, proof
from bitfuse.contract import Operator, Plan
from bitfuse.hosts import patch
from bitfuse.hosts.patch import Handle, Site, Swapped, hooked_everywhere

Ada = tuple[Tensor, Tensor | None]  # an AdaLN value [B, T or 1, D] and the table row [D] that is added to it

ABSENT = (None, None, None, None)  # no modulation


def modulation(scale: Ada, shift: Ada) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """scale, shift, scale_table, shift_table, as the operators take them."""
    return scale[0], shift[0], scale[1], shift[1]


class State:
    """What a block carries, as `_bitfuse`, while it is accelerated.

    sites        its sites, by their names in it
    rehearsal    for before its next call
    """

    sites: dict[str, Site]
    rehearsal: Rehearsal | None = None

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the host's own forward must run for these arguments."""
        raise NotImplementedError


class Block(Swapped):
    """First base of a block with its elementwise chains fused, whose second base is the host's own.

    `_bitfuse` is a `State`. Our forward is `_forward(state, *args, **kwargs)`.
    """

    _bitfuse: State
    _forward: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # a hook that wrapped this method may still call it when the block is stock again, or in a copy of it
        state = self.__dict__.get("_bitfuse")
        if state is not None and not torch.compiler.is_compiling():
            reason = state.why_stock(self, args, kwargs)
            if reason is None:
                if state.rehearsal is not None:
                    rehearsal, state.rehearsal = state.rehearsal, None
                    rehearsal(lambda: self._forward(state, *args, **kwargs))
                return self._forward(state, *args, **kwargs)
            for site in state.sites.values():
                site.fall(reason)
        own = type(self)
        stock: Any = own.__bases__[1] if issubclass(own, Block) else own
        return stock.forward(self, *args, **kwargs)


class Values:
    """The AdaLN values of the step under way, as views; one object serves all blocks of a model.

    All blocks of a step are handed the same `temb`, so its views are made once. They live as long as it does.
    """

    def __init__(self) -> None:
        self._views: dict[int, tuple[weakref.ref, tuple[Tensor, ...]]] = {}

    def of(self, temb: Tensor, count: int) -> tuple[Tensor, ...]:
        key = id(temb)
        found = self._views.get(key)
        if found is None or found[0]() is not temb or len(found[1]) != count:
            views = temb.unflatten(-1, (count, -1)).unbind(dim=2)  # never a copy, so on no stream
            self._views[key] = found = (weakref.ref(temb, lambda _: self._views.pop(key, None)), views)
        return found[1]


class Quiet:
    """Called, whether nobody else is called in the block: no module has a hook or a forward of its own, nor have all
    (as while `bitfuse.trace` listens), and none was replaced since the block was taken over."""

    def __init__(self, block: Any):
        self._attributes = [module.__dict__ for module in block.modules()]
        self._children = [child for d in self._attributes for child in d["_modules"].values()]

    def __call__(self) -> bool:
        if hooked_everywhere() or torch.nn.Module.__call__ is not torch.nn.Module._wrapped_call_impl:
            return False
        if any(d["_forward_hooks"] or d["_forward_pre_hooks"] or "forward" in d for d in self._attributes):
            return False
        children = [child for d in self._attributes for child in d["_modules"].values()]
        return len(children) == len(self._children) and all(map(operator.is_, children, self._children))


class Rehearsal:
    """Before the first call of a model's first block: run it once, for nothing but to learn which kernels it needs.

    In a rehearsal all sites run the PyTorch chains, and the kernels that they would have to prove are compiled after
    it, in threads. One after the other, each when a site first calls for it, 15 kernels took 11 s on a host with slow
    CPUs (H100, 2026-11-27), and in threads 3: much of it is LLVM's, ptxas' and a C compiler's, which leave Python to
    other threads. But what is in Triton's cache is loaded by Python alone, for which threads queue: 15 took 0.8 s with
    16 of them, 0.6 s with 4. So they begin with the first kernel that has to be compiled.

    Only where nobody can notice that the block runs twice: not with hooks in it, nor with a module that the adapter has
    left alone, since it may be anybody's.
    """

    AT_ONCE = 0.15  # seconds: a kernel in Triton's cache takes 0.03, one that is not 0.3 and more

    def __init__(self, block: Any, name: str, handle: Handle):
        self._block, self._name, self._handle, self._quiet = block, name, handle, Quiet(block)

    @classmethod
    def of_first(cls, blocks: Iterable[Any], handle: Handle) -> None:
        """Have the first of these blocks that was taken over rehearse; it is `transformer_blocks.<index>`."""
        for index, block in enumerate(blocks):
            if isinstance(block, Block):
                block._bitfuse.rehearsal = cls(block, f"transformer_blocks.{index}", handle)
                return

    def __call__(self, forward: Callable[[], object]) -> None:
        if not self._unnoticed():
            return
        launches: dict[Any, tuple[Plan, tuple[Any, ...]]] = {}

        def take(plan: Plan, args: tuple[Any, ...]) -> None:
            launches.setdefault((id(plan.kernel), plan.signature(args)), (plan, args))

        patch.rehearsing = take
        try:
            with torch.no_grad(), contextlib.suppress(torch.OutOfMemoryError):  # fused, the block needs less memory
                forward()
        finally:
            patch.rehearsing = None
        waiting = iter(launches.values())
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
        if not self._compiles() or next(contract.around(), None) is not None or not self._quiet():
            return False
        return all(site.declined is None for site in self._handle.sites if site.name.startswith(f"{self._name}."))

    def _compiles(self) -> bool:
        return next(self._block.parameters()).is_cuda and not torch.cuda.is_current_stream_capturing()


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
            if mismatch := proof.compare(host(*args), operator.reference(*args)):
                return f"{mismatch.sentence}, on the battery's '{family}' inputs"
    return None
