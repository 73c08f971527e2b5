"""Kernels are compiled side by side: those of a transformer's first block at its first call, a decoder's before it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from bitfuse.core.conditions import around
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Operator, Route, _layout
from bitfuse.hosts.site import COMPILING, Site


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
        self._launches.setdefault((id(plan.kernel), plan.signature(args)), (plan, args))

    def __call__(self, forward: Callable[[], Any]) -> Any:
        if not self._unnoticed():
            return forward()
        for site in self._sites:
            site.rehearsal = self
        with self.under_way:
            result = forward()
        for site in self._sites:
            site.rehearsal = None
        self.compile()
        return result

    def compile(self) -> None:
        """Compile what was noted."""
        waiting = iter(list(self._launches.values()))
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
        return self.compiles()

    def compiles(self) -> bool:
        """Whether there is something to compile, and nothing against it."""
        block = self._block()
        on_a_gpu = block is not None and next(block.parameters()).is_cuda
        return on_a_gpu and not torch.cuda.is_current_stream_capturing()
