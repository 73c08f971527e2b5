"""Timing, behind a gate: nothing is timed unless its bits were just compared, in the same run.

All that is compared is interleaved (one of each per round), so that a drift of the clocks hits them alike.
Kernels are timed with CUDA events and a cold L2: 256 MB are overwritten before each launch, which also keeps
the GPU busy while the CPU enqueues, so that launch latency stays out. The yardstick is a plain copy that moves
the same number of bytes, each input and output counted once.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bitfuse import proof
from bitfuse.machine import machine
from bitfuse.ops.rotary_common import RotaryCase
from bitfuse.ops.split_rotary import SPLIT_FP32, SPLIT_PER_OP

PARTS = ("operators", "overhead", "model")

_ROUNDS = 61
_COLD = 256 << 20  # bytes overwritten before each timed launch: five times the L2 of an H100
_SHAPES = [
    (1, 6144, 32, 128),
    (2, 6144, 32, 128),
    (1, 6144, 32, 64),
    (1, 24576, 32, 128),
    (1, 24576, 32, 64),
    (1, 32640, 32, 128),
    (1, 1536, 32, 128),
    (1, 126, 32, 64),
]


def run(
    console: Console, parts: Iterable[str] | None = None, tokens: list[int] | None = None, layers: int | None = None
) -> dict[str, Any]:
    """Run the named parts (all by default); returns a JSON document, `equal` False if any bit differed."""
    document: dict[str, Any] = {"machine": machine(), "equal": True}
    for part in parts or PARTS:
        if part == "operators":
            document[part] = operators(console)
        elif part == "overhead":
            document[part] = [overhead(console)]
        else:
            document[part] = []
            for n in tokens or (6144,):
                document[part].append(model(console, n, layers))
                torch.cuda.empty_cache()  # or the next model's share of the memory looks smaller than it is
        document["equal"] &= all(row["mismatch"] is None for row in document[part])
    return document


def operators(console: Console) -> list[dict[str, Any]]:
    """Split rotary embedding in both chains, at the real shapes: kernel, eager chain, copy of the same bytes."""
    rows = []
    with Progress(console=console, transient=True) as progress:
        chains = ((SPLIT_PER_OP, torch.bfloat16), (SPLIT_FP32, torch.float32))
        for operator, table_dtype in progress.track(chains, description="operators"):
            for batch, t, heads, head_dim in _SHAPES:
                case = RotaryCase("bench", t, heads, head_dim, batch=batch, table_dtype=table_dtype)
                rows.append(_operator(operator, case))
    headings = ("operator", "x", "fused us", "copy us", "of copy", "eager us", "speed-up", "bits")
    table = Table(*headings, title="cold L2, median")
    for row in rows:
        times = row.get("us")
        figures = (
            [
                f"{times['fused']['median']:.1f}",
                f"{times['copy']['median']:.1f}",
                f"{row['of_copy']:.1%}",
                f"{times['eager']['median']:.1f}",
                f"{row['speed_up']:.2f}x",
            ]
            if times
            else ["not timed"] * 5
        )
        table.add_row(row["operator"], str(row["x"]), *figures, row["mismatch"] or "equal")
    console.print(table)
    return rows


def _operator(operator: Any, case: RotaryCase) -> dict[str, Any]:
    tensors = case.tensors("cuda")
    route = operator.route(*tensors)
    row: dict[str, Any] = {"operator": operator.name, "x": list(tensors[0].shape), "mismatch": route.reason}
    if mismatch := proof.compare(operator.reference(*tensors), route.run(*tensors)):
        row["mismatch"] = mismatch.sentence
    if row["mismatch"]:
        return row  # no speed on a red gate
    moved = 2 * tensors[0].nbytes + tensors[1].nbytes + tensors[2].nbytes
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = _interleaved(
        {
            "fused": lambda: route.run(*tensors),
            "copy": lambda: target.copy_(source),
            "eager": lambda: operator.reference(*tensors),
        }
    )
    median = {name: t["median"] for name, t in times.items()}
    return row | {
        "bytes": moved,
        "us": times,
        "of_copy": median["copy"] / median["fused"],
        "speed_up": median["eager"] / median["fused"],
        "gb_per_s": moved / median["fused"] / 1e3,
    }


def _interleaved(calls: dict[str, Callable[[], Any]], rounds: int = _ROUNDS) -> dict[str, dict[str, float]]:
    """Microseconds of each call: median and the 10th and 90th percentile over the rounds."""
    cold = torch.empty(_COLD, dtype=torch.uint8, device="cuda")
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


def spread(samples: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median": round(statistics.median(samples), 3), "p10": round(tenths[0], 3), "p90": round(tenths[-1], 3)}


def overhead(console: Console) -> dict[str, Any]:
    """Microseconds of Python for one call: routed, and launched bare through Triton's JIT (`kernel[grid](...)`)."""
    operator = SPLIT_PER_OP
    tensors = RotaryCase("bench", 126, 32, 64).tensors("cuda")
    plan = operator.plan(*tensors)
    out = plan.empty(tensors[0].device)
    compiled, jit = plan.bind(tensors, out), plan.kernel.compiled

    def bare() -> Tensor:
        fresh = torch.empty_like(tensors[0])
        jit[plan.grid](*tensors, fresh, *plan.scalars, **plan.constants, num_warps=plan.num_warps, **plan.options)
        return fresh

    expected = operator.reference(*tensors)
    mismatch = proof.compare(expected, operator(*tensors)) or proof.compare(expected, bare())
    calls: dict[str, Callable[[], Any]] = {
        "routed call": lambda: operator(*tensors),
        "allocation and bare Triton launch": bare,
        "finding the route": lambda: operator.route(*tensors),
        "allocation": lambda: torch.empty_like(tensors[0]),
        "compiled kernel's own launch": lambda: compiled(*tensors, out),
        "eager chain": lambda: operator.reference(*tensors),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for index in range(3000):
            for name, call in calls.items():
                start = time.perf_counter_ns()
                call()
                if index >= 500:
                    samples[name].append((time.perf_counter_ns() - start) / 1e3)
            if index % 20 == 0:
                torch.cuda.synchronize()  # a full launch queue would be timed as Python
    times = {name: spread(s) for name, s in samples.items()}
    beyond = times["routed call"]["median"] - times["allocation and bare Triton launch"]["median"]
    table = Table("one call", "us, median", "p10", "p90", title="time on the CPU until the call returns")
    for name, t in times.items():
        table.add_row(name, *(f"{t[key]:.2f}" for key in ("median", "p10", "p90")))
    console.print(table)
    console.print(f"a routed call takes {beyond:+.2f} us beyond a bare Triton launch with its allocation")
    return {
        "operator": operator.name,
        "mismatch": mismatch.sentence if mismatch else None,
        "us": times,
        "beyond_bare_launch_us": round(beyond, 3),
    }


# Latent frames, height and width by video tokens: 768x512x25, 768x512x121, 1536x1024x121, 1920x1088x121.
LATENTS = {1536: (4, 16, 24), 6144: (16, 16, 24), 24576: (16, 32, 48), 32640: (16, 34, 60)}


def model(console: Console, tokens: int = 6144, layers: int | None = None, rounds: int = 8) -> dict[str, Any]:
    """One step of diffusers' LTX-2.0 transformer, stock and accelerated by turns, on seeded weights.

    tokens    video tokens, one of `LATENTS`
    layers    transformer layers; by default as many of the 48 as fit
    """
    import bitfuse
    from bitfuse import seeded

    if tokens not in LATENTS:
        raise ValueError(f"tokens is {tokens}; accepted: {', '.join(map(str, LATENTS))}")
    device = torch.device("cuda", torch.cuda.current_device())
    geometry, _ = seeded.geometry_for(device, layers)
    frames, height, width = LATENTS[tokens]
    geometry = replace(geometry, frames=frames, height=height, width=width)
    transformer = seeded.build(geometry, device, seed=0)
    inputs = seeded.make_inputs(transformer, geometry, device, seed=0)
    step = seeded.one_step(transformer, inputs)

    expected, peak_stock = _with_peak(step)
    start = time.perf_counter()
    handle = bitfuse.accelerate(transformer)
    found, _ = _with_peak(step)
    first = time.perf_counter() - start
    found, peak_fused = _with_peak(step)
    mismatches = [proof.compare(a, b) for a, b in zip(expected, found, strict=True)]
    row: dict[str, Any] = {
        "tokens": tokens,
        "layers": geometry.layers,
        "geometry": geometry.sentence,
        "sites_fused": handle.report().fused,
        "sites_seen": handle.report().seen,
        "mismatch": next((m.sentence for m in mismatches if m), None),
    }
    handle.restore()
    if row["mismatch"] or not row["sites_fused"]:
        console.print(f"{tokens} tokens: not timed: {row['mismatch'] or 'nothing was fused'}")
        return row

    milliseconds: dict[str, list[float]] = {"stock": [], "bitfuse": []}
    for _ in range(rounds):
        for name, samples in milliseconds.items():
            with bitfuse.accelerated(transformer) if name == "bitfuse" else contextlib.nullcontext():
                torch.cuda.synchronize()
                start = time.perf_counter()
                out = step()
                torch.cuda.synchronize()
                samples.append((time.perf_counter() - start) * 1e3)
            if mismatch := next(filter(None, map(proof.compare, expected, out)), None):
                return row | {"mismatch": mismatch.sentence}
    times = {name: spread(samples) for name, samples in milliseconds.items()}
    speed_up = times["stock"]["median"] / times["bitfuse"]["median"]
    console.print(
        f"{geometry.sentence}: stock {times['stock']['median']:.1f} ms a step, bitfuse "
        f"{times['bitfuse']['median']:.1f} ms, {speed_up:.3f}x, both streams equal in every bit; "
        f"{row['sites_fused']} of {row['sites_seen']} sites fused"
    )
    return row | {
        "ms": times,
        "speed_up": speed_up,
        "first_accelerated_step_ms": first * 1e3,
        "peak_gb": {"stock": peak_stock / 1e9, "bitfuse": peak_fused / 1e9},
    }


def _with_peak(step: Callable[[], Any]) -> tuple[Any, int]:
    """The step's outputs, and the memory that it took at its peak beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = step()
    torch.cuda.synchronize()
    return out, torch.cuda.max_memory_allocated() - before
