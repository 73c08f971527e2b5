"""Measuring on a GPU: times of calls, kernels by class, bytes that a call must move, memory that a step takes."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.bits import Outputs, as_tuple
from bitfuse.core.operator import Operator, Route

# Bytes overwritten before each timed call: twenty times the L2 of an H100, and some 0.4 ms in which the CPU gets ahead.
# With 256 MiB the launch of a call with a dozen arguments was timed as well: 28 us for a kernel of 5 (2026-11-23).
_COLD = 1 << 30


# -- times ---------------------------------------------------------------------------------------------------------


def spread(samples: list[float]) -> dict[str, float]:
    """Median and the 10th and 90th percentile."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median": round(statistics.median(samples), 3), "p10": round(tenths[0], 3), "p90": round(tenths[-1], 3)}


def interleaved(
    calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int = 15
) -> dict[str, dict[str, float]]:
    """Microseconds of each call on the GPU, all of them once per round, with a cold L2."""
    cold = torch.empty(_COLD, dtype=torch.uint8, device=device)
    events: dict[str, list] = {name: [] for name in calls}
    for index in range(rounds + 3):  # three rounds warm up
        for name, call in calls.items():
            cold.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            if index >= 3:
                events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: spread([s.elapsed_time(e) * 1e3 for s, e in pairs]) for name, pairs in events.items()}


def plain_copy(moved: int, device: torch.device) -> Callable[[], Any]:
    """A copy that moves this many bytes, half of them read and half of them written."""
    source = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_gb_per_s(moved: int, device: torch.device) -> float:
    """The speed of such a copy, bytes read and written both counted."""
    return moved / interleaved({"copy": plain_copy(moved, device)}, device)["copy"]["median"] / 1e3


# -- kernels by class ----------------------------------------------------------------------------------------------

_ATTENTION = re.compile(r"flash|sdpa|fmha|attention", re.IGNORECASE)
_MATMUL = re.compile(r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitK")


def kernel_class(name: str) -> str:
    """matmul, attention or other. Attention first: the names of its kernels often hold cutlass or gemm too."""
    if _ATTENTION.search(name):
        return "attention"
    return "matmul" if _MATMUL.search(name) else "other"


_WARM_UP = 2  # steps before the one that is looked at: the profiler's start lets the card cool, and its clock rise


def kernel_ms(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds that the kernels of a step ran, by class, as `by_class` has them.

    Of the last of several steps on end, each with as many kernels as the others.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(_WARM_UP + 1):
            step()
        torch.cuda.synchronize()
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    )
    return by_class(kernels[len(kernels) * _WARM_UP // (_WARM_UP + 1) :])


def by_class(kernels: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Milliseconds by class of (start, end, name), in microseconds and in the order of their starts.

    Besides the classes, `busy`: while a matmul or an attention ran, side by side counted once; and `launches`.
    """
    found = {"matmul": 0.0, "attention": 0.0, "other": 0.0, "busy": 0.0}
    launches, until = 0, -math.inf
    for start, end, name in kernels:
        kind = kernel_class(name)
        found[kind] += (end - start) / 1e3
        if kind != "other" and end > until:
            found["busy"] += (end - max(start, until)) / 1e3
            until = end
        launches += 1
    return {name: round(ms, 3) for name, ms in found.items()} | {"launches": launches}


# -- bytes ---------------------------------------------------------------------------------------------------------


def moved(args: Iterable[Any], result: Outputs) -> int:
    """Bytes that a call must move: each distinct region that its tensors occupy once, and each output once."""
    inputs = {_region(a) for a in args if isinstance(a, Tensor)}
    outputs = {_region(t) for t in as_tuple(result)}
    return sum(size * math.prod(n for _, n in dims) for found in (inputs, outputs) for _, size, dims in found)


def _region(t: Tensor) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    """(address, bytes of an element, (stride, count) of what is there): equal for views of the same elements.

    Dimensions that are expanded occupy nothing; those that follow on each other in memory are one.
    """
    if not t.numel():
        return 0, 0, ()
    dims: list[tuple[int, int]] = []
    for stride, n in sorted(((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 and s), reverse=True):
        if dims and dims[-1][0] == stride * n:
            dims[-1] = (stride, dims[-1][1] * n)
        else:
            dims.append((stride, n))
    return t.data_ptr(), t.element_size(), tuple(dims)


@contextlib.contextmanager
def fused_calls() -> Iterator[list[tuple[str, int]]]:
    """Within this block every fused call is noted: its operator's name, and the bytes that it must move."""
    calls: list[tuple[str, int]] = []
    stock = Operator.route, Operator.routed

    def noting(self: Operator, way: Callable[..., Route], *args: Any) -> Route:
        route = way(self, *args)
        if not route.fused:
            return route

        def run(*args: Any) -> Any:
            result = route.run(*args)
            calls.append((self.name, moved(args, result)))
            return result

        return replace(route, run=run)

    Operator.route, Operator.routed = (functools.partialmethod(noting, way) for way in stock)  # type: ignore
    try:
        yield calls
    finally:
        Operator.route, Operator.routed = stock  # type: ignore[method-assign]


def typical(sizes: list[int]) -> int:
    """The size of the call that the average byte moves in: their mean, weighted by the bytes themselves."""
    return round(sum(n * n for n in sizes) / sum(sizes))


def floor_ms(kernels: dict[str, float], moved: int, gb_per_s: float) -> float:
    """Milliseconds of a step's matmul and attention kernels, and of these bytes at the speed of a copy."""
    return kernels["busy"] + moved / gb_per_s / 1e6


# -- energy --------------------------------------------------------------------------------------------------------


def energy(device: torch.device) -> float | None:
    """Joules that the device has taken since its driver was loaded; None without nvidia-ml-py or such a counter."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid)) / 1e3
    except Exception:  # no binding, no driver, no counter: all the same to whoever asks
        return None


# -- memory --------------------------------------------------------------------------------------------------------


def with_peak(step: Callable[[], Any], resting: int | None = None) -> tuple[Any, int]:
    """What the step returns, and the memory that it took at its peak beyond `resting` (default: what is there now)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated() if resting is None else resting
    out = step()
    torch.cuda.synchronize()
    return out, torch.cuda.max_memory_allocated() - resting


def reserved() -> int:
    """Bytes that the allocator can't give back: what is in use, and the private pools of CUDA graphs."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as one CUDA graph, captured after a warm-up on a side stream; nothing is copied in or out."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Any:
        graph.replay()
        return out

    return replay
