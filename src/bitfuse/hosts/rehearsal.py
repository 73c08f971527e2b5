"""Kernels are compiled side by side: those of a transformer's first block at its first call, a decoder's in its first.

No thread outlives that call: a transformer's end before its second block, a decoder's before its first video is there.
Those of `start_up`, which compile no kernel, take half a second.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.thread
import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from bitfuse.core import launch
from bitfuse.core.conditions import OFF, around
from bitfuse.core.kernel import interpreting
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Operator, Route, _layout
from bitfuse.hosts.site import COMPILING, Site


def start_up(device: torch.device) -> tuple[threading.Thread, ...]:
    """Let Triton make ready for its first kernel in threads of their own, in the first call of a process: for a model
    on a GPU, as soon as bitfuse has to do with it. Returns the threads; empty where there is no GPU, or bitfuse is off.

    Triton reads all of its own files for the keys of its cache, 0.5 s, and builds what it calls the driver by, 0.45 s
    where that is not in the cache (3.6, H200, 2026-11-29). What goes wrong shows again where a kernel is compiled.
    """
    return _started() if device.type == "cuda" and not interpreting() and OFF not in around() else ()


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
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=functools.partial(_join, threads, 10.0))
    return threads


def _join(threads: Iterable[threading.Thread], seconds: float | None = None) -> None:
    """Wait for these threads, each for so long at most.

    Before a fork, too: a process that is forked while a thread imports Triton, a DataLoader's worker say, finds the
    locks of those modules held for good, and waits for ever where it imports one.
    """
    for thread in threads:
        with contextlib.suppress(RuntimeError):  # it was not to be had, or is the one that forks
            thread.join(seconds)


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
    THREADS = 12  # a decode's kernels

    def __init__(self, block: Any, sites: Iterable[Site]):
        self._block, self._sites = weakref.ref(block), tuple(sites)
        self._seen: set[Any] = set()
        self._launches: dict[Any, tuple[Plan, tuple[Any, ...]]] = {}
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
        return operator.dry(self._take, *args)

    def _take(self, plan: Plan, args: tuple[Any, ...]) -> None:
        self._launches.setdefault(plan.compiled_key(args), (plan, args))

    def __call__(self, forward: Callable[[], Any]) -> Any:
        if not self._unnoticed():
            return forward()
        for site in self._sites:
            site.rehearsal = self
        with self.under_way:
            result = forward()
        for site in self._sites:
            site.rehearsal = None
        with self.compiling() as kernels:
            for kernel in kernels:
                launch.ended(kernel)
        return result

    @contextlib.contextmanager
    def compiling(self) -> Iterator[list[Future[None]]]:
        """Inside, what was noted is compiled and loaded in threads, of which none is left behind. Whoever needs one of
        these kernels waits for it (`launch.under_way`). Given is when each is there.

        They are begun in the order in which they were noted, that of need, and one thread loads them in the same order.
        """
        compiling = ThreadPoolExecutor(min(self.THREADS, os.cpu_count() or 1), "bitfuse compile")
        loading = ThreadPoolExecutor(1, "bitfuse load")
        found: dict[Any, Future[None]] = {}
        try:
            with contextlib.suppress(Exception):  # such as that no more threads are to be had
                found |= self._submit(compiling, loading)
                launch.under_way.update(found)
            yield list(found.values())
        finally:
            for key, future in found.items():
                if launch.under_way.get(key) is future:
                    launch.under_way.pop(key, None)
            compiling.shutdown(wait=False, cancel_futures=True)
            loading.shutdown(cancel_futures=True)
            compiling.shutdown()

    def _submit(self, compiling: ThreadPoolExecutor, loading: ThreadPoolExecutor) -> dict[Any, Future[None]]:
        begun: dict[Any, Future[None]] = {}
        for key, (plan, args) in self._launches.items():
            _ = plan.kernel.compiled  # made here: two threads would make one each
            begun[key] = compiling.submit(_compile, plan, args)
        return {key: loading.submit(_load, plan, args, begun[key]) for key, (plan, args) in self._launches.items()}

    def _unnoticed(self) -> bool:
        if any(site.strict for site in self._sites) or next(around(), None) is not None:
            return False
        return self.compiles()

    def compiles(self) -> bool:
        """Whether there is something to compile, and nothing against it."""
        block = self._block()
        on_a_gpu = block is not None and next(block.parameters()).is_cuda
        return on_a_gpu and not torch.cuda.is_current_stream_capturing()


def _compile(plan: Plan, args: tuple[Any, ...]) -> None:
    if getattr(concurrent.futures.thread, "_shutdown", False):  # Python waits for all that is to be done in a pool
        raise RuntimeError("the process ends")
    _join(start_up(args[0].device))
    plan.compile(args)


def _load(plan: Plan, args: tuple[Any, ...], compiled: Future[None]) -> None:
    launch.ended(compiled)
    if not compiled.cancelled() and compiled.exception() is None:
        plan.load(args)
