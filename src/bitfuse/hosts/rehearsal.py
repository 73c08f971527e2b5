"""Kernels are compiled side by side: those of a transformer's first block at its first call, a decoder's in its first.

No thread outlives that call: a transformer's end before its second block, a decoder's before its first video is there.
Those of `start_up`, which compile no kernel, take half a second.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from bitfuse.core.conditions import around
from bitfuse.core.kernel import interpreting
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Operator, Route, _layout
from bitfuse.hosts.site import COMPILING, Site


def start_up(device: torch.device) -> tuple[threading.Thread, ...]:
    """Let Triton make ready for its first kernel in threads of their own, in the first call of a process: for a model
    on a GPU, as soon as bitfuse has to do with it. Returns the threads; empty where there is no GPU.

    Triton reads all of its own files for the keys of its cache, 0.5 s, and builds what it calls the driver by, 0.45 s
    where that is not in the cache (3.6, H200, 2026-11-29). What goes wrong shows again where a kernel is compiled.
    """
    return _started() if device.type == "cuda" and not interpreting() else ()


@functools.cache
def _started() -> tuple[threading.Thread, ...]:
    def read_files() -> None:
        with contextlib.suppress(Exception):
            from triton.runtime import cache

            cache.triton_key()

    def build() -> None:
        with contextlib.suppress(Exception):
            from triton.runtime import driver

            driver.active.get_current_target()

    threads = tuple(threading.Thread(target=work, name=f"bitfuse {work.__name__}") for work in (read_files, build))
    with contextlib.suppress(RuntimeError):  # no more threads are to be had
        for thread in threads:
            thread.start()
    return threads


class Rehearsal:
    """The first call of a model's first block: it runs the PyTorch chains, and what its sites need is compiled at once.

    One after the other, each when a site first calls for it, 15 kernels took 11 s on a host with slow CPUs (H100,
    2026-11-27), and in threads 3: much of it is LLVM's, ptxas' and a C compiler's, which leave Python to other threads.

    The block runs once, as it would, so nothing but time tells of it; its sites count one call in `Site.compiling`.
    Not where a site may not fall back (`strict`), for a CUDA graph, without a GPU, or in a model of few blocks, where
    one of them on PyTorch's chains is more than is won.

    under_way    held while the sites take part
    """

    MIN_BLOCKS = 8

    def __init__(self, block: Any, sites: Iterable[Site]):
        self._block, self._sites = weakref.ref(block), tuple(sites)
        self._seen: set[Any] = set()
        self._launches: dict[Any, tuple[Plan, tuple[Any, ...]]] = {}
        self._needed: dict[Any, Any] = {}  # by layout, which of the launches
        self._compiling: dict[Any, Future[None]] = {}  # by the same keys as the launches
        self._pool: ThreadPoolExecutor | None = None
        self.under_way = threading.Lock()

    def route(self, operator: Operator, args: tuple[Any, ...]) -> Route:
        """The reference; and the kernel that is to be proved for these arguments is noted."""
        layout = operator.name, _layout(args)
        if layout not in self._seen:  # a battery's first family takes 5 ms
            self._seen.add(layout)
            operator.rehearse(self._take, args)
        return Route(operator.reference, COMPILING)

    def dry(self, operator: Any, args: tuple[Any, ...]) -> Any:
        """What a call of this operator returns, without values; and its kernel is noted. Nothing is computed.

        For a forward of which the forms alone matter. ValueError where the call would not be fused.
        """

        def take(plan: Plan, few: tuple[Any, ...]) -> None:
            self._needed[operator.name, _layout(args)] = self._take(plan, few)

        return operator.dry(take, *args)

    def _take(self, plan: Plan, args: tuple[Any, ...]) -> Any:
        key = id(plan.kernel), plan.signature(args)
        self._launches.setdefault(key, (plan, args))
        return key

    def __call__(self, forward: Callable[[], Any]) -> Any:
        if not self._unnoticed():
            return forward()
        for site in self._sites:
            site.rehearsal = self
        with self.under_way:
            result = forward()
        for site in self._sites:
            site.rehearsal = None
        try:
            self.begin()
            concurrent.futures.wait(self._compiling.values())
        finally:
            self.end()
        return result

    def begin(self) -> None:
        """Compile what was noted, in threads. `wait` for what is needed, and `end` in any case."""
        if not self._launches:
            return
        device = next(iter(self._launches.values()))[1][0].device
        starting = start_up(device)
        with contextlib.suppress(Exception):  # such as that no more threads are to be had
            self._pool = ThreadPoolExecutor(min(len(self._launches), os.cpu_count() or 1), "bitfuse compile")
            for key, (plan, args) in self._launches.items():
                _ = plan.kernel.compiled  # made here: two threads would make one each
                self._compiling[key] = self._pool.submit(_compile, plan, args, starting)

    def wait(self, operator: Any, args: tuple[Any, ...]) -> None:
        """Until the kernel that this call of the operator needs is compiled, if it is one of those of `dry`."""
        if (found := self._compiling.get(self._needed.get((operator.name, _layout(args))))) is not None:
            found.exception()  # what it raised shows again where the kernel is proved

    def end(self) -> None:
        """Until no thread is left. What was not begun is left out."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _unnoticed(self) -> bool:
        if any(site.strict for site in self._sites) or next(around(), None) is not None:
            return False
        return self.compiles()

    def compiles(self) -> bool:
        """Whether there is something to compile, and nothing against it."""
        block = self._block()
        on_a_gpu = block is not None and next(block.parameters()).is_cuda
        return on_a_gpu and not torch.cuda.is_current_stream_capturing()


def _compile(plan: Plan, args: tuple[Any, ...], starting: tuple[threading.Thread, ...]) -> None:
    for thread in starting:
        with contextlib.suppress(RuntimeError):  # it was not to be had
            thread.join()
    plan.compile(args)
