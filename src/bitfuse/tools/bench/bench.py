"""Timing, behind a gate: nothing is timed unless its bits were just compared, in the same run.

All that is compared is interleaved (one of each per round), so that a drift of the clocks hits them alike.
Kernels are timed with CUDA events and a cold L2: 256 MB are overwritten before each launch, which also keeps
the GPU busy while the CPU enqueues, so that launch latency stays out. The yardstick is a plain copy that moves
the same number of bytes, each input and output counted once. Steps are timed by the wall clock, the device waited
for on both sides.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bitfuse.core import proof
from bitfuse.core.bits import compare
from bitfuse.core.lines import error_line
from bitfuse.core.operator import OPERATORS, Operator
from bitfuse.ops.gelu_evidence import GeluCase
from bitfuse.ops.pixel_norm_evidence import PixelCase
from bitfuse.ops.rope import SPLIT_PER_OP
from bitfuse.ops.rope_evidence import RotaryCase
from bitfuse.tools.bench import run as whole_run
from bitfuse.tools.bench.measure import (
    captured,
    copy_gb_per_s,
    energy,
    floor_ms,
    fused_calls,
    interleaved,
    kernel_ms,
    moved,
    plain_copy,
    reserved,
    spread,
    typical,
    with_peak,
)
from bitfuse.tools.machine import machine
from bitfuse.tools.names import LATENTS, PARTS
from bitfuse.tools.seeded import pipeline
from bitfuse.tools.text import cell, say


def run(
    console: Console,
    parts: Iterable[str] | None = None,
    tokens: list[int] | None = None,
    layers: int | None = None,
    *,
    version: str = "2.0",
    image_to_video: bool = False,
    host: str = "diffusers",
    rounds: int | None = None,
    only_operators: Iterable[str] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Run the named parts (all by default); returns a JSON document, `equal` False if any bit differed.

    host    whose transformer the part "model" times; the other parts know no host, or diffusers only
    `save` is called with the document whenever a row is added: what was measured outlives what comes after it.
    """
    document: dict[str, Any] = {"machine": machine(), "equal": True}

    def add(part: str, rows: Iterable[dict[str, Any]]) -> None:
        found = document.setdefault(part.replace("-", "_"), [])
        for row in rows:
            found.append(row)
            document["equal"] &= row["mismatch"] is None
            save(document)

    for part in parts or PARTS:
        if part == "operators":
            add(part, operators(console, only_operators))
        elif part == "overhead":
            add(part, [overhead(console)])
        elif part == "model":
            for n in tokens or (6144,):
                add(part, [model(console, n, layers, rounds or _ROUNDS, version, image_to_video, host)])
                _forget()  # or the next model's share of the memory looks smaller than it is
        elif part == "audit":
            add(part, [audit(console, (tokens or [6144])[0], layers, rounds or _ROUNDS, version)])
            _forget()
        elif part == "run":
            if version != pipeline.VERSION:
                say(console, f"no whole run: it is one of LTX-{pipeline.VERSION}, not of LTX-{version}")
                continue
            for kind, row in whole_run.rows(console, _device(), layers, rounds):
                add(kind, [row])
            _forget()
        else:
            add(part, [first_step(console, version, (tokens or [6144])[0], layers or 8)])
    return document


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _forget() -> None:
    torch._dynamo.reset()  # and the next shape is compiled as if it were the first
    gc.collect()
    torch.cuda.empty_cache()


# -- operators -----------------------------------------------------------------------------------------------------

# An operator's real cases are timed whose first argument has one of these shapes, its last dimensions taken as one; of
# volumes and of feed-forwards, which are wider, all.
SIZES = ((1, 6144, 4096), (1, 6144, 2048), (1, 24576, 4096), (1, 126, 2048))


def operators(console: Console, names: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
    """A row for each of the operators' real cases of the sizes above: kernel, eager chain, copy of the same bytes."""
    chosen = [(OPERATORS[name], case) for name in names or OPERATORS for case in timed_cases(OPERATORS[name])]
    rows = []
    with Progress(console=console, transient=True) as progress:
        for operator, case in progress.track(chosen, description="operators"):
            rows.append(_operator(operator, case, _device()))
            torch.cuda.empty_cache()
            yield rows[-1]
    _print_operators(console, rows)


def _print_operators(console: Console, rows: list[dict[str, Any]]) -> None:
    """A table for each operator, readable at 80 columns: figures in one piece, sentences below it."""
    say(console, "cold L2, median; every bit equal but where - stands")
    for name in dict.fromkeys(row["operator"] for row in rows):
        table = Table(title=cell(name), title_justify="left")
        table.add_column("case", width=32)
        for heading in ("fused us", "of copy", "eager us", "speed-up"):
            table.add_column(heading, justify="right", no_wrap=True, min_width=8)
        of_it = [row for row in rows if row["operator"] == name]
        for row in of_it:
            figures = ["-"] * 4
            if "us" in row:
                fused, eager = (f"{row['us'][way]['median']:.1f}" for way in ("fused", "eager"))
                figures = [fused, f"{row['of_copy']:.1%}", eager, f"{row['speed_up']:.2f}x"]
            table.add_row(*map(cell, (f"{row['case']} ({'x'.join(map(str, row['x']))})", *figures)))
        console.print(table)
        for row in of_it:
            if row["mismatch"]:
                say(console, f"not timed: {row['case']}: {row['mismatch']}")


def timed_cases(operator: Operator) -> list[Any]:
    """Those of the sizes above; of volumes and feed-forwards all."""
    whole = PixelCase, GeluCase
    return [case for case in operator.cases if case.real and (isinstance(case, whole) or _size(case) in SIZES)]


def _size(case: Any) -> tuple[int, int, int]:
    with FakeTensorMode():  # shapes without values
        batch, tokens, *width = case.arguments("cpu")[0].shape
    return batch, tokens, math.prod(width)


@torch.no_grad()
def _operator(operator: Operator, case: Any, device: torch.device) -> dict[str, Any]:
    args = case.arguments(device)
    route = operator.route(*args)
    row: dict[str, Any] = {
        "operator": operator.name,
        "case": case.name,
        "x": list(args[0].shape),
        "tier": route.tier,
        "mismatch": route.reason,
    }
    result = route.run(*args)
    if mismatch := compare(operator.reference(*args), result):
        row["mismatch"] = mismatch.sentence
    if row["mismatch"]:
        return row  # no speed on a red gate
    n = moved(args, result)
    del result
    times = interleaved(
        {
            "fused": lambda: route.run(*args),
            "copy": plain_copy(n, device),
            "eager": lambda: operator.reference(*args),
        },
        device,
    )
    median = {name: t["median"] for name, t in times.items()}
    return row | {
        "bytes": n,
        "us": times,
        "of_copy": median["copy"] / median["fused"],
        "speed_up": median["eager"] / median["fused"],
        "gb_per_s": n / median["fused"] / 1e3,
    }


# -- the CPU's share of one call -----------------------------------------------------------------------------------


def overhead(console: Console) -> dict[str, Any]:
    """Microseconds of Python for one call: routed, and launched bare through Triton's JIT (`kernel[grid](...)`)."""
    operator = SPLIT_PER_OP
    tensors = RotaryCase("bench", 126, 32, 64).arguments(_device())
    plan = operator.plan(*tensors)
    outs = plan.empty(tensors[0].device)
    compiled, jit = plan.bind(tensors, outs), plan.kernel.compiled

    def bare() -> Tensor:
        fresh = torch.empty_like(tensors[0])
        jit[plan.grid](*tensors, fresh, *plan.scalars, **plan.constants, num_warps=plan.num_warps, **plan.options)
        return fresh

    expected = operator.reference(*tensors)
    mismatch = compare(expected, operator(*tensors)) or compare(expected, bare())
    calls: dict[str, Callable[[], Any]] = {
        "routed call": lambda: operator(*tensors),
        "allocation and bare Triton launch": bare,
        "finding the route": lambda: operator.route(*tensors),
        "allocation": lambda: torch.empty_like(tensors[0]),
        "compiled kernel's own launch": lambda: compiled(*tensors, *outs),
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


# -- a whole step --------------------------------------------------------------------------------------------------

_ROUNDS, _FEWEST_ROUNDS, _ENOUGH = 4, 2, 18.0  # at most and at least; seconds after which no more are begun
_TURN = 1.5  # seconds in which one way steps on end, in every round
_PLAIN: dict[str, dict[str, Any]] = {"bitfuse": {}, "text kept": {"keep_text": True}}  # ways, and their options
_GRAPH: dict[str, dict[str, Any]] = {  # options of the graph; SGLang captures its own
    "diffusers": {"cuda_graph": True, "keep_text": True},
    "ltx-core": {"cuda_graph": True},
    "comfyui": {"cuda_graph": True},
}
_COMPILE: dict[str, Any] = {"fullgraph": True}  # as diffusers documents it, in the default mode

Step = Callable[[], tuple[Tensor, Tensor]]


@dataclass
class _Trial:
    """One way to run the step, and what was found of it.

    exact         whether its bits must be stock's: one that must and differs gets no time
    around        a context for each turn, of a way that changes what the others would run too
    peak          bytes of memory at its peak
    difference    where it first differs from stock
    reason        why it gets no time
    ms            of each timed step
    watts         power while it was timed, one figure a turn, where NVML counts energy
    """

    step: Step
    exact: bool = True
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    peak: int | None = None
    difference: str | None = None
    reason: str | None = None
    ms: list[float] = field(default_factory=list)
    watts: list[float] = field(default_factory=list)

    def judge(self, expected: Any, found: Any) -> None:
        if mismatch := compare(expected, found):
            self.difference = self.difference or mismatch.sentence
            self.reason = self.reason or (self.difference if self.exact else None)

    def turn(self, expected: Any) -> None:
        """Step on end, each step compared, all but the first timed: a render runs one way all the time.

        What a step takes depends on what ran before: an H100 is at its power limit in these matmuls. Its clock falls
        in the first steps of a way that keeps it busy (6144 tokens: 320 ms when cool, 345 ms warm, 2026-11-24).
        A step that is longer than a turn is timed from the second turn on without another before it.
        """
        if not self.ms or self.ms[-1] < 1e3 * _TURN:
            self.judge(expected, self.step())
        torch.cuda.synchronize()
        before, start, spent = energy(_device()), time.perf_counter(), 0.0
        while not self.reason and (not spent or spent < _TURN):
            began = time.perf_counter()
            out = self.step()
            torch.cuda.synchronize()
            self.ms.append((time.perf_counter() - began) * 1e3)
            spent += self.ms[-1] / 1e3
            self.judge(expected, out)
            del out
        after, seconds = energy(_device()), time.perf_counter() - start
        if before is not None and after is not None and spent:
            self.watts.append((after - before) / seconds)


def model(
    console: Console,
    tokens: int = 6144,
    layers: int | None = None,
    rounds: int = _ROUNDS,
    version: str = "2.0",
    image_to_video: bool = False,
    host: str = "diffusers",
) -> dict[str, Any]:
    """One step of a host's LTX-2 transformer on seeded weights, each way to run it by turns, in one process.

    The ways in diffusers: stock, bitfuse, in LTX-2.0 bitfuse with the text kept, bitfuse with its CUDA graph (and the
    text kept), `compile_repeated_blocks`, and that in one CUDA graph; in ltx-core and ComfyUI: stock, bitfuse, and its
    CUDA graph; in SGLang: stock, bitfuse, and SGLang's own tier "high", whose bits may differ. The outputs of the
    bitfuse ways are compared with stock's before they are timed and after every step; one that differs, or fused
    nothing, gets no time.

    tokens    video tokens, one of `LATENTS`
    layers    transformer layers; by default as many of the 48 as fit
    rounds    turns of each way, a second and a half of steps on end; fewer, but at least 2, where steps take long
    host      one of `seeded.HOSTS`
    """
    from bitfuse.tools import seeded
    from bitfuse.tools.compare import runs

    device = _device()
    geometry = _geometry(device, tokens, layers, version, image_to_video, host)
    stock = seeded.build(geometry, device, seed=0)
    inputs = seeded.make_inputs(stock, geometry, device, seed=0)
    # later versions modulate the text at every step
    plain_ways = _PLAIN if (host, version) == ("diffusers", "2.0") else {"bitfuse": {}}
    others = {"diffusers": ("graph", "compiled"), "sglang": ("quality high",)}.get(host, ("graph",))
    models = {"stock": stock} | {way: seeded.twin(stock) for way in (*plain_ways, *others)}
    inexact = ("compiled", "quality high")
    trials = {way: _Trial(seeded.one_step(one, inputs), way not in inexact) for way, one in models.items()}
    row: dict[str, Any] = {
        "host": host,
        "host_version": runs.named(host),
        "tokens": tokens,
        "version": version,
        "image_to_video": image_to_video,
        "layers": geometry.layers,
        "geometry": geometry.sentence,
    }
    with contextlib.ExitStack() as plain, contextlib.ExitStack() as graph:
        trials["stock"].step()  # cuBLAS takes its workspaces
        expected, trials["stock"].peak = with_peak(trials["stock"].step)
        facts = {way: _plain(trials[way], models[way], expected, plain, options) for way, options in plain_ways.items()}
        row |= facts["bitfuse"][0]
        if host == "sglang":  # bitfuse replaces functions of SGLang's module, which stock would call as well
            plain.close()
            trials["bitfuse"].around = functools.partial(_accelerated, models["bitfuse"])
            row["mounted"] = _mounted(trials["quality high"], models["quality high"], expected)
        if "graph" in models:  # a GraphedForward, whose counts go on during the rounds
            replayed = _graph(trials["graph"], models["graph"], expected, graph, _GRAPH[host])
        if "compiled" in models:
            row["compile_s"] = _compiled(trials, models["compiled"], expected)
        _time(trials, expected, rounds)
        row |= _figures(trials)
        if "graph" in models:
            row["graph"] = {name: getattr(replayed, name, 0) for name in ("replays", "captures")}
            row["graph"]["reasons"] = dict(getattr(replayed, "reasons", {}))
        # The profiler last, and with no graph left: launches may be slower once it has been at work.
        graph.close()
        trials.pop("compiled + graph", None)
        row["kernels_ms"] = {}
        for way in ("stock", *plain_ways):
            with trials[way].around():
                row["kernels_ms"][way] = kernel_ms(trials[way].step)
    calls = facts["bitfuse"][1]
    if calls and not row["mismatch"]:
        row["floor"] = _floor(row["kernels_ms"], calls, device)
        ours = [way for way in (*plain_ways, "graph") if way in models]
        row["of_floor"] = {way: row["ms"][way]["median"] / row["floor"]["ms"] for way in ours}
    _print(console, row)
    return row


def _geometry(
    device: torch.device, tokens: int, layers: int | None, version: str, image_to_video: bool, host: str = "diffusers"
) -> Any:
    from bitfuse.tools import seeded

    if tokens not in LATENTS:
        raise ValueError(f"tokens is {tokens}; accepted: {', '.join(map(str, LATENTS))}")
    frames, height, width = LATENTS[tokens]
    geometry, _ = seeded.geometry_for(device, layers, version, host)
    return replace(geometry, frames=frames, height=height, width=width, image_to_video=image_to_video)


def _plain(
    trial: _Trial, model: Any, expected: Any, undo: contextlib.ExitStack, options: dict[str, Any]
) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """Facts for the row, and the fused calls of one step with their bytes."""
    import bitfuse

    resting = torch.cuda.memory_allocated()  # what bitfuse keeps from step to step counts as its own
    start = time.perf_counter()
    handle = undo.enter_context(bitfuse.accelerate(model, **options))
    out = trial.step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    trial.judge(expected, out)
    del out
    with fused_calls() as calls:
        out, trial.peak = with_peak(trial.step, resting)
    trial.judge(expected, out)
    _check_fused(trial, handle)
    report = handle.report()
    facts = {
        "sites_fused": report.fused,
        "sites_seen": report.seen,
        "sites": report.kinds(),
        "first_accelerated_step_ms": first * 1e3,
    }
    return facts, calls


def _accelerated(model: Any) -> contextlib.AbstractContextManager[Any]:
    import bitfuse

    return bitfuse.accelerated(model)


def _mounted(trial: _Trial, model: Any, expected: Any) -> list[str]:
    """Names of the fusions of SGLang's tier "high" that are mounted. They need not equal stock, nor run."""
    from bitfuse.tools.seeded import sglang as seeded_sglang

    names = seeded_sglang.mount(model)
    try:
        out, trial.peak = with_peak(trial.step)
        trial.judge(expected, out)
    except RuntimeError as error:  # of a kernel that is compiled only now
        trial.reason = f"it does not run here ({error_line(error)})"
    return names


def _graph(trial: _Trial, model: Any, expected: Any, undo: contextlib.ExitStack, options: dict[str, Any]) -> Any:
    """The model's `GraphedForward`, its graph captured. The graph's pool of memory counts to the peak."""
    import bitfuse

    before = reserved()
    handle = undo.enter_context(bitfuse.accelerate(model, **options))
    for _ in range(2):  # an eager step, and the one that captures
        trial.judge(expected, trial.step())
    held = reserved() - before
    out, peak = with_peak(trial.step)
    trial.judge(expected, out)
    trial.peak = held + peak
    _check_fused(trial, handle)
    graph = next(iter(handle.graphs), None)
    if graph is None or not graph.replays:
        reasons = "; ".join(graph.reasons if graph is not None else ()) or "the model has none"
        trial.reason = trial.reason or f"no graph was replayed: {reasons}"
    return graph


def _check_fused(trial: _Trial, handle: Any) -> None:
    from bitfuse.tools.compare import runs

    report = handle.report()
    if not report.fused:
        trial.reason = trial.reason or f"nothing was fused: {runs.reasons(report) or 'no site was called'}"


def _compiled(trials: dict[str, _Trial], model: Any, expected: Any) -> float | None:
    """Seconds of the first compiled step. It and its graph need not equal stock, nor run: they are the yardstick."""
    plain = trials["compiled"]
    graph = trials["compiled + graph"] = _Trial(plain.step, exact=False)
    seconds = None
    try:
        start = time.perf_counter()
        model.compile_repeated_blocks(**_COMPILE)
        out = plain.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        plain.judge(expected, out)
        graph.step = captured(plain.step)
        graph.judge(expected, graph.step())
    except RuntimeError as error:  # of the compiler, of the capture, or no memory left for another pool
        reason = f"it does not run here ({error_line(error)})"
        graph.reason = reason
        plain.reason = reason if seconds is None else None
    return seconds


def _time(trials: dict[str, _Trial], expected: Any, rounds: int) -> None:
    """Fill in the milliseconds, each way a turn per round and every other round backwards.

    The garbage collector runs between rounds, not in a step.
    """
    collecting, start = gc.isenabled(), time.perf_counter()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for index in range(rounds):
            if index >= _FEWEST_ROUNDS and time.perf_counter() - start > _ENOUGH:
                break
            for trial in list(trials.values())[:: -1 if index % 2 else 1]:
                if not trial.reason:
                    with trial.around():
                        trial.turn(expected)
            gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()


def _figures(trials: dict[str, _Trial]) -> dict[str, Any]:
    """The row's times, ratios and peaks, from the ways that have none against them."""
    timed = {way: spread(trial.ms) for way, trial in trials.items() if not trial.reason}
    median = {way: t["median"] for way, t in timed.items()}
    reasons = {way: trial.reason for way, trial in trials.items() if trial.reason}
    row: dict[str, Any] = {
        "mismatch": next((reasons[way] for way in ("stock", *_PLAIN, "graph") if way in reasons), None),
        "not_timed": reasons,
        "differs_from_stock": {way: trial.difference for way, trial in trials.items() if way != "stock"},
        "steps": {way: len(trial.ms) for way, trial in trials.items() if not trial.reason},
        "watts": {way: round(sum(trial.watts) / len(trial.watts)) for way, trial in trials.items() if trial.watts},
        "ms": timed,
        "speed_ups": {way: median["stock"] / ms for way, ms in median.items() if way != "stock" and "stock" in median},
        "peak_gb": {way: trial.peak / 1e9 for way, trial in trials.items() if trial.peak is not None},
    }
    if "bitfuse" in row["speed_ups"]:
        row["speed_up"] = row["speed_ups"]["bitfuse"]
    if "graph" in median and "compiled + graph" in median:
        row["against_compiled_graph"] = median["compiled + graph"] / median["graph"]
    return row


def _floor(
    kernels_ms: dict[str, dict[str, float]], calls: list[tuple[str, int]], device: torch.device
) -> dict[str, Any]:
    """What a step would take of matmul, attention, and the fused operators' bytes at a plain copy's speed alone.

    Of bitfuse's own matmuls and attentions, those of the way with the fewest. Stock's run at higher clocks (at 6144
    tokens 4 % on an H100): its small kernels let the card, at its power limit, draw breath.
    """
    kernels = min((ms for way, ms in kernels_ms.items() if way != "stock"), key=lambda ms: ms["busy"])
    sizes = [size for _, size in calls]
    total, size = sum(sizes), typical(sizes)
    speed = copy_gb_per_s(size, device)
    per_operator: dict[str, dict[str, int]] = {}
    for name, n in calls:
        found = per_operator.setdefault(name, {"calls": 0, "bytes": 0})
        found["calls"] += 1
        found["bytes"] += n
    return {
        "ms": floor_ms(kernels, total, speed),
        "matmul_and_attention_ms": kernels["busy"],
        "bytes": total,
        "copy_gb_per_s": speed,
        "copy_bytes": size,
        "operators": per_operator,
    }


def _print(console: Console, row: dict[str, Any]) -> None:
    kind = ", image to video" if row["image_to_video"] else ""
    table = Table("step", "ms,\nmedian", "p10", "p90", "speed-\nup", "W", "peak\nGB", "bits")
    for way, differs in {"stock": None, **row["differs_from_stock"]}.items():
        t = row["ms"].get(way)
        times = [f"{t[key]:.1f}" for key in ("median", "p10", "p90")] if t else ["not timed", "", ""]
        ratio = f"{row['speed_ups'][way]:.3f}x" if way in row["speed_ups"] else ""
        peak = f"{row['peak_gb'][way]:.2f}" if way in row["peak_gb"] else ""
        watts = str(row["watts"].get(way, ""))
        bits = "see below" if row["not_timed"].get(way) or differs else "equal"
        table.add_row(way, *times, ratio, watts, peak, bits)
    steps = min(row["steps"].values(), default=0)
    what = f"{row['host_version']}, LTX-{row['version']}{kind}, {row['geometry']}"
    table.title = cell(f"{what}; {steps} steps of each way or more")
    console.print(table)
    lines = [f"{way}, not timed: {reason}" for way, reason in row["not_timed"].items()]
    for way, differs in row["differs_from_stock"].items():
        if differs and way not in row["not_timed"]:
            lines.append(f"{way}: {differs}")
    lines.append(f"{row['sites_fused']} of {row['sites_seen']} sites fused")
    for way, ms in row["kernels_ms"].items():
        classes = ", ".join(f"{name} {ms[name]:.1f}" for name in ("matmul", "attention", "other"))
        lines.append(f"kernels of {way}, ms: {classes}; {ms['launches']} launches")
    if "floor" not in row and not row["mismatch"]:
        lines.append("no floor: no fused call was made whose bytes could be counted")
    elif "floor" in row:
        floor = row["floor"]
        graph = f", {row['of_floor']['graph']:.3f}x with the graph" if "graph" in row["of_floor"] else ""
        lines.append(
            f"matmul, attention and {floor['bytes'] / 1e9:.1f} GB at a copy's {floor['copy_gb_per_s']:.0f} GB/s would "
            f"take {floor['ms']:.1f} ms; a step takes {row['of_floor']['bitfuse']:.3f}x of it{graph}"
        )
    if "against_compiled_graph" in row:
        lines.append(f"bitfuse with its graph is {row['against_compiled_graph']:.3f}x as fast as compiled + graph")
    for line in lines:
        say(console, line)


# -- what audits cost ----------------------------------------------------------------------------------------------

_AUDIT = 64  # one call in so many


def audit(
    console: Console, tokens: int = 6144, layers: int | None = None, rounds: int = _ROUNDS, version: str = "2.0"
) -> dict[str, Any]:
    """A step of diffusers' transformer with every 64th fused call computed again and compared, beside one without."""
    import bitfuse
    from bitfuse.tools import seeded

    device = _device()
    geometry = _geometry(device, tokens, layers, version, image_to_video=False)
    model = seeded.build(geometry, device, seed=0)
    inputs = seeded.make_inputs(model, geometry, device, seed=0)
    expected = seeded.one_step(model, inputs)()
    models = {"bitfuse": model, "audited": seeded.twin(model)}
    trials = {way: _Trial(seeded.one_step(one, inputs)) for way, one in models.items()}
    with bitfuse.accelerated(model), bitfuse.accelerated(models["audited"], audit=_AUDIT) as handle:
        for trial in trials.values():
            trial.judge(expected, trial.step())  # proves the kernels
        _time(trials, expected, rounds)
        audits = handle.report().as_dict()["audit"]
    ms = {way: spread(trial.ms) for way, trial in trials.items() if not trial.reason}
    reasons = [trial.reason for trial in trials.values() if trial.reason]
    if not reasons and not audits["calls"]:
        reasons = ["no call was audited"]
    cost = None if reasons else ms["audited"]["median"] / ms["bitfuse"]["median"] - 1
    text = "not timed" if cost is None else f"{cost:+.2%} of a step of {ms['bitfuse']['median']:.1f} ms"
    console.print(f"audit={_AUDIT}: {text}, {audits['calls']} calls compared", highlight=False)
    return {
        "tokens": tokens,
        "version": version,
        "layers": geometry.layers,
        "every": _AUDIT,
        "mismatch": reasons[0] if reasons else None,
        "ms": ms,
        "steps": {way: len(trial.ms) for way, trial in trials.items()},
        "cost": cost,
        "audits": audits,
    }


# -- the first step of a process -----------------------------------------------------------------------------------

_FIRST_STEPS = ("stock", "empty caches", "warm caches", "stock, again")


def first_step(console: Console, version: str = "2.0", tokens: int = 6144, layers: int = 8) -> dict[str, Any]:
    """From before `accelerate` to the end of the first step, each in a fresh process, beyond what stock takes.

    Building and proving kernels doesn't depend on the number of layers, which all use the same: a few are enough.
    """
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in _FIRST_STEPS:
            way = "stock" if name.startswith("stock") else "bitfuse"
            found[name] = _in_fresh_process(way, version, tokens, layers, cache)
    # the shorter of the two stock steps: the first may have had to read libraries from the disk
    stock = min(found["stock"]["seconds"], found["stock, again"]["seconds"])
    beyond = {name: f["seconds"] - stock for name, f in found.items() if not name.startswith("stock")}
    digests = {name: f["sha256"] for name, f in found.items()}
    unequal = [name for name in _FIRST_STEPS if digests[name] != digests["stock"]]
    unfused = [name for name in _FIRST_STEPS[1:3] if not found[name]["sites_fused"]]
    mismatch = f"{unfused[0]}: nothing was fused" if unfused else None
    if unequal:
        mismatch = f"{unequal[0]}: the outputs differ from those of the first stock process"
    for name, seconds in beyond.items():
        console.print(f"first step, {name}: {seconds:+.1f} s beyond stock's {stock:.1f} s", highlight=False)
    return {
        "tokens": tokens,
        "version": version,
        "layers": layers,
        "note": "the seconds beyond stock don't depend on the number of layers: all run the same kernels",
        "mismatch": mismatch,
        "processes": found,
        "beyond_stock_s": beyond,
    }


def _in_fresh_process(way: str, version: str, tokens: int, layers: int, cache: str) -> dict[str, Any]:
    code = "import sys; from bitfuse.tools.bench.bench import time_first_step; time_first_step(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, way, version, str(tokens), str(layers)],
        env={**os.environ, "TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(f"the first step ({way}) failed in its process: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def time_first_step(way: str, version: str, tokens: str, layers: str) -> None:
    """What a fresh process does: print, as JSON, the seconds up to the end of its first step, and what came out."""
    import bitfuse
    from bitfuse.tools import seeded
    from bitfuse.tools.compare.bits import sha256

    device = _device()
    geometry = _geometry(device, int(tokens), int(layers), version, image_to_video=False)
    model = seeded.build(geometry, device, seed=0)
    step = seeded.one_step(model, seeded.make_inputs(model, geometry, device, seed=0))
    torch.cuda.synchronize()
    facts: dict[str, Any] = {}
    start = time.perf_counter()
    handle = bitfuse.accelerate(model) if way == "bitfuse" else None
    out = step()
    torch.cuda.synchronize()
    facts["seconds"] = time.perf_counter() - start
    facts["sha256"] = sha256(*out)
    if handle:
        verdicts = proof.verdicts().values()
        facts["sites_fused"] = handle.report().fused
        facts["proofs"] = len(verdicts)
        facts["proofs_s"] = sum(verdict.seconds for verdict in verdicts)  # building their kernels included
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    facts["second_step_s"] = time.perf_counter() - start
    print(json.dumps(facts))
