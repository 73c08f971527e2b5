"""Whole steps with linear layers by other engines than cuBLAS: what `linear.py` asks of single layers.

    python benchmarks/linear_steps.py --out out/steps.json                    # on a Hopper GPU, some 400 s
    python benchmarks/linear_steps.py --engine gluon --out out/steps.json     # without quack
    TRITON_INTERPRET=1 python benchmarks/linear_steps.py --tiny --out FILE    # without one: torch's ops stand in

The engine is quack's GEMM (`linear_quack.py` says what it needs), beside a kernel of `linear_gluon.py`; or, with
`--engine gluon`, that kernel for gate and residual and those of `linear_gluon_pingpong.py` for the rest.
FILE is written after each row, so that a run that is cut off leaves what it has. First every kernel is tried on small
shapes, and GELU of all finite values: who fails sits out, and its traceback is printed. Then the parts, in the order in
which they are asked for, else in this one; what the time (`--seconds`) no longer allows is left out:

    layers     one layer again and again for 1.5 s: milliseconds, millijoules and watts
    gelu       whole steps at 6144 tokens, each way a CUDA graph, by turns, with GELU in one of several configurations
    single     with one kind of layers changed
    together   with several
    energy     some of them for ten seconds each, by turns: time, power, clock
    why        plain linears in other circumstances: without the second stream, launched otherwise
    24576      the few that matter, at 24576 tokens
    1536       likewise
    kernels    each kernel of one step, by the profiler (which may slow down what comes after it)

A way whose outputs differ from stock's in a bit gets no time, nor does one whose graph is not the one that was captured
with its kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import linear as lin
import torch
import torch.nn.functional as F
from torch import Tensor

import bitfuse
from bitfuse.core.kernel import interpreting
from bitfuse.run.swap import ours_in
from bitfuse.tools import seeded
from bitfuse.tools.bench.bench import _geometry
from bitfuse.tools.machine import machine
from bitfuse.tools.names import LATENTS
from bitfuse.tools.prove.linear import follow

PARTS = ("layers", "gelu", "single", "together", "energy", "why", "24576", "1536", "kernels")
DEVICE, BF16 = lin.DEVICE, lin.BF16
_BEGAN = time.perf_counter()
_linear = F.linear  # the host's, also while another stands in its place


class Stand(NamedTuple):
    """Torch's ops with the interface of a kernel: for a dry run without a GPU."""

    name: str = "torch's ops"

    def fits(self, n: int, k: int) -> bool:
        return True

    def call(self, given: lin.Layer, epilogue: str) -> lin.Call:
        def call() -> Tensor:
            y = _linear(given.x, given.w, given.bias)
            return given.y.copy_(y if epilogue == "plain" else follow(y, given, epilogue))

        return call


# -- a step with other linears -----------------------------------------------------------------------------------------

UP, ANY = (16384, 4096), (0, 0)
LARGE_SHAPES = ((4096, 4096), UP, (4096, 16384), (2048, 4096), (4096, 2048))  # N, K of the video's layers


class Tried(NamedTuple):
    """Which kernel runs which of the video's layers, and what else is changed; None: as it is.

    up, down, out    with GELU; with gate and residual; the last layers of gated attentions, likewise
    plain            other layers of at least 2048 rows, with their bias: by N and K
    one_stream       the audio's kernels between the video's and not beside them
    """

    up: Any = None
    down: Any = None
    out: Any = None
    plain: Any = None
    one_stream: bool = False


class _Later(NamedTuple):
    """What an attention's last layer is still to be applied to."""

    x: Tensor
    linear: torch.nn.Linear


class _LastLayer(torch.nn.Module):
    """An attention's last layer, left to the residual add that follows while `handing_over`."""

    handing_over = False

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Any:
        return _Later(x, self.linear) if _LastLayer.handing_over else self.linear(x)


def _hand_over(model: torch.nn.Module) -> None:
    """The last layers of the video's self-attentions and of those from audio to video, which have a gate."""
    for block in model.transformer_blocks:
        for attn in (block.attn1, block.audio_to_video_attn):
            attn.to_out = torch.nn.ModuleList([_LastLayer(attn.to_out[0]), torch.nn.Identity()])


@contextlib.contextmanager
def patched(tried: Tried) -> Iterator[list[str]]:
    """Within this block the layers run by these kernels, in a transformer that bitfuse accelerates.

    Yields what was run by one, a form each: whoever wants to be sure looks there.
    """
    from bitfuse.hosts import diffusers as adapter
    from bitfuse.hosts import ltx2

    up, down, out, plain, _ = tried
    fused, feed_forward, add = adapter.GELU.fused, ltx2.Stream.feed_forward, ltx2.Stream.add
    add_and_norm = ltx2.Stream._add_and_norm
    ran: list[str] = []

    def by_kernel(way: Any, x: Tensor, w: Tensor, bias: Tensor, epilogue: str, residual: Any, gate: Any) -> Tensor:
        ran.append(epilogue)
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty(len(rows), w.shape[0], dtype=x.dtype, device=x.device)
        residual = y if residual is None else residual.view(y.shape)
        given = lin.Layer(rows, w, bias, residual, bias if gate is None else gate, y)
        return way.call(given, epilogue)().view(*x.shape[:-1], -1)

    def wide(x: Tensor) -> bool:
        return x.shape[-2] >= 1536 or DEVICE.type == "cpu"  # the audio has 126 rows, the text 1024

    def by_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        way = plain.get(tuple(w.shape), plain.get(ANY))
        if way is None or bias is None or x.ndim < 2 or not (wide(x) and x.is_contiguous()):
            return _linear(x, w, bias)
        return by_kernel(way, x, w, bias, "plain", None, None)

    def by_gelu(self: Any, activation: Any, hidden: Tensor) -> Tensor:
        if not wide(hidden):
            return fused(self, activation, hidden)
        return by_kernel(up, hidden, activation.proj.weight, activation.proj.bias, "gelu", None, None)

    def gated(way: Any, stream: Any, x: Tensor, linear: torch.nn.Linear, gate: tuple[Any, Any]) -> Tensor:
        return by_kernel(way, x, linear.weight, linear.bias, "gated", stream.x, (gate[1] + gate[0]).view(-1))

    def by_feed_forward(self: Any, module: Any) -> None:
        if not wide(self.x):
            feed_forward(self, module)
            return
        ada = self.ada
        (n,) = self.add_and_norm("norm3", ltx2.modulation(ada[4], ada[3]))
        self.x = gated(down, self, module.net[0](n), module.net[2], ada[5])

    def by_add(self: Any, y: Any, gate: tuple[Any, Any] = ltx2.UNGATED, mask: Tensor | None = None) -> None:
        if isinstance(y, _Later):
            assert mask is None
            self.x = gated(out, self, y.x, y.linear, gate)
        else:
            add(self, y, gate, mask)

    def by_add_and_norm(self: Any, site: str, *modulations: Any) -> list[Tensor]:
        if self.pending is None and modulations == (ltx2.ABSENT,):  # n * (1 + 0) + -0 is n
            zero = torch.zeros(1, 1, self.x.shape[-1], dtype=self.x.dtype, device=self.x.device)
            modulations = ((zero, -zero, None, None),)
        return add_and_norm(self, site, *modulations)

    if up is not None:
        adapter.GELU.fused = by_gelu
    if down is not None:
        ltx2.Stream.feed_forward = by_feed_forward
    if out is not None:
        ltx2.Stream.add, ltx2.Stream._add_and_norm, _LastLayer.handing_over = by_add, by_add_and_norm, True
    if plain is not None:
        F.linear = by_linear
    try:
        yield ran
    finally:
        adapter.GELU.fused, ltx2.Stream.feed_forward, ltx2.Stream.add = fused, feed_forward, add
        ltx2.Stream._add_and_norm, _LastLayer.handing_over = add_and_norm, False
        F.linear = _linear


class Steps:
    """Steps of one model on one set of inputs, and stock's outputs of it."""

    def __init__(self, model: Any, geometry: Any):
        self.model, self.inputs = model, seeded.make_inputs(model, geometry, DEVICE, seed=0)
        self.wanted = seeded.one_step(model, self.inputs)()
        self.calls: dict[str, lin.Call] = {}
        self.ran: dict[str, dict[str, int]] = {}

    def prepare(self, name: str, tried: Tried) -> str:
        """Make `calls[name]`: a replay of the step as one graph; else what is wrong, in a sentence.

        `ran[name]` is how many layers of a step ran by a kernel, by form.
        """
        twin = seeded.twin(self.model)
        if tried.out is not None:
            _hand_over(twin)
        handle = bitfuse.accelerate(twin, cuda_graph=DEVICE.type == "cuda")
        if tried.one_stream:
            for block in twin.transformer_blocks:
                ours_in(block).second_stream = None  # type: ignore[union-attr]
        step = seeded.one_step(twin, self.inputs)
        step()  # in which the first block runs stock
        with patched(tried) as ran:
            step()
            self.ran[name] = dict(Counter(ran))
            linear = F.linear
            for _ in range(2):
                step()

        def call() -> Any:
            F.linear = linear  # a graph's key holds it: with another one it is another graph, or none
            try:
                return step()
            finally:
                F.linear = _linear

        got = call()
        wanted = {"gelu": tried.up, "plain": tried.plain, "gated": tried.down or tried.out}
        if self.ran[name].keys() != {form for form, way in wanted.items() if way is not None}:
            return f"these ran by a kernel: {self.ran[name]}"
        if DEVICE.type == "cuda":
            graph = handle.report().as_dict()["graphs"][0]
            if graph["captures"] != 1 or graph["replays"] < 2:
                return f"no replays of the one graph that was captured with these kernels: {graph}"
        if any(differ := [lin.unequal(a, b) for a, b in zip(got, self.wanted, strict=True)]):
            return f"{differ} elements differ"
        self.calls[name] = call
        return ""


def built(run: Run) -> tuple[Any, Any]:
    """The model, and its geometry at 6144 tokens."""
    if run.tiny:
        geometry, _ = seeded.geometry_for(DEVICE, run.layers)
    else:
        geometry = _geometry(DEVICE, 6144, run.layers, "2.0", image_to_video=False)
    return seeded.build(geometry, DEVICE, seed=0), geometry


# -- time, power and clock ---------------------------------------------------------------------------------------------


def by_turns(calls: dict[str, lin.Call], rounds: int, count: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of a step: medians of turns of `count` steps each, of which the first warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            times[name].append(_turn(calls[name], count))
    return {
        name: {"ms": round(statistics.median(turns), 3), "turns": [round(ms, 2) for ms in turns]}
        for name, turns in times.items()
    }


def _turn(call: lin.Call, count: int) -> float:
    call()
    lin._synchronize()
    began = time.perf_counter()
    for _ in range(count - 1):
        call()
    lin._synchronize()
    return 1e3 * (time.perf_counter() - began) / (count - 1)


def megahertz() -> float:
    """The clock of the first GPU's multiprocessors; NaN where NVML does not tell."""
    clock, sm = ctypes.c_uint(), 1
    if (known := lin._nvml()) is None or known[0].nvmlDeviceGetClockInfo(known[1], sm, ctypes.byref(clock)):
        return float("nan")
    return float(clock.value)


def watched(call: lin.Call, seconds: float) -> dict[str, Any]:
    """Of a step run for so long: `ms`, `W`, `J` and the multiprocessors' clock in `MHz`."""
    clocks: list[float] = []
    ends: list[Any] = []
    call()
    lin._synchronize()
    with lin.ticks(lambda: clocks.append(megahertz())) as found:
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            call()
            count += 1
            if DEVICE.type == "cuda":  # two steps ahead of the GPU, no further
                ends.append(torch.cuda.Event())
                ends[-1].record()
                if len(ends) > 2:
                    ends.pop(0).synchronize()
        lin._synchronize()
        ms = 1e3 * (time.perf_counter() - began) / count
    watts = lin.watts(found)
    clock = statistics.mean(clocks) if clocks else float("nan")
    figures = {"ms": ms, "W": watts, "J": watts * ms / 1e3, "MHz": clock}
    return {name: round(figure, 2) for name, figure in figures.items()} | {"steps": count}


def kernels(call: lin.Call) -> dict[str, Any]:
    """The kernels of one step: `names`, and for each its name's index, start and duration in us, and stream."""
    from torch.profiler import ProfilerActivity, profile

    call()
    lin._synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        lin._synchronize()
    found = [event for event in profiler.profiler.kineto_results.events() if "CUDA" in str(event.device_type())]
    found.sort(key=lambda event: event.start_ns())
    names = list(dict.fromkeys(event.name()[:120] for event in found))
    at = {name: index for index, name in enumerate(names)}
    start = found[0].start_ns() if found else 0
    rows = [
        [
            at[event.name()[:120]],
            round((event.start_ns() - start) / 1e3, 2),
            round(event.duration_ns() / 1e3, 2),
            event.device_resource_id(),
        ]
        for event in found
    ]
    return {"names": names, "rows": rows}


# -- parts -------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    tiny: bool
    layers: int
    seconds: float
    results: dict[str, Any]
    out: Path | None

    def keep(self) -> None:
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - _BEGAN)

    def say(self, *what: Any) -> None:
        print(f"{time.perf_counter() - _BEGAN:6.1f} s", *what, flush=True)


def _failed(run: Run, what: str, error: Exception) -> str:
    run.say(what, "failed")
    traceback.print_exc()
    return f"{type(error).__name__}: {str(error)[-300:]}"


def trial(run: Run, ways: dict[str, list[Any]]) -> None:
    """By form and kernel: "equal", or what is wrong. Kernels that are not equal are taken out of `ways`."""
    found = run.results["trial"] = {}
    shapes = ((70, 96, 48),) if run.tiny else ((640, 1024, 512), (4000, 4096, 1024))
    for kind, some in ways.items():
        form = {"why": "plain", "gluon": "gated"}.get(kind, kind)
        for way in list(some):
            began, wrong = time.perf_counter(), ""
            try:
                if form == "gelu":
                    wrong = _every_value(way)
                for m, n, k in shapes:
                    given = lin.layer(m, n, k, exact=run.tiny)
                    given.y.fill_(float("nan"))
                    count = lin.unequal(way.call(given, form)(), lin.stock(given, form))
                    wrong = wrong or (f"{count} elements differ at {m} x {n} x {k}" if count else "")
                lin._synchronize()
            except Exception as error:
                wrong = _failed(run, f"{form}, {way.name}", error)
            found[f"{form}, {way.name}"] = wrong or "equal"
            run.say(f"{form}, {way.name}: {wrong or 'equal'}, {time.perf_counter() - began:.1f} s")
            run.keep()
            if wrong:
                some.remove(way)


def _every_value(way: Any) -> str:
    """What is wrong with GELU of all finite values of bf16: rows of them times the unit matrix."""
    x = torch.arange(-(1 << 15), 1 << 15, device=DEVICE).to(torch.int16).view(BF16)
    x = torch.where(x.isfinite(), x, torch.ones_like(x)).view(256, 256)
    unit, zero = torch.eye(256, device=DEVICE, dtype=BF16), torch.zeros(256, device=DEVICE, dtype=BF16)
    given = lin.Layer(x, unit, zero, x, zero, torch.full_like(x, float("nan")))
    wanted = F.gelu(_linear(x, unit, zero), approximate="tanh")
    count = lin.unequal(way.call(given, "gelu")(), wanted)
    return f"{count} of GELU's values differ" if count else ""


def layers(run: Run, ways: dict[str, list[Any]]) -> None:
    """By layer and way, of one CUDA graph replayed for 1.5 s: milliseconds, millijoules, watts."""
    found = run.results["layers"] = {}
    cases = [((6144, 16384, 4096), "gelu"), ((6144, 4096, 16384), "gated"), ((6144, 4096, 4096), "gated")]
    cases = [((70, 96, 48), "gelu")] if run.tiny else [*cases, ((6144, 4096, 4096), "plain")]
    for (m, n, k), form in cases:
        if form not in ways:
            continue
        given = lin.layer(m, n, k, exact=run.tiny)
        wanted = lin.stock(given, form)
        calls = {"F.linear": functools.partial(_linear, given.x, given.w, given.bias)}
        if form == "gelu":
            calls["bitfuse"] = lambda given=given: lin.own_gelu(_linear(given.x, given.w, given.bias))
        elif form == "gated":
            calls["bitfuse"] = functools.partial(lin.today, given, form)
        row = found[f"{m} x {n} x {k}, {form}"] = {}
        for name, call in [*calls.items(), *((way.name, way) for way in ways[form])]:
            try:
                prepared = call if callable(call) else call.call(given, form)
                given.y.fill_(float("nan"))  # not what the way before has left there
                if name != "F.linear" and (count := lin.unequal(prepared(), wanted)):
                    row[name] = f"{count} elements differ"
                else:
                    row[name] = lin.sustained(prepared)
            except Exception as error:
                row[name] = _failed(run, name, error)
            run.say(f"{m} x {n} x {k}, {form}, {name}: {row[name]}")
            run.keep()
        del given, wanted, calls
        lin.free()


def stage(run: Run, steps: Steps, row: dict[str, Any], tried: dict[str, Tried], rounds: int, count: int) -> None:
    """Whole steps by turns, `bitfuse` beside those tried; into `row`, by their names."""
    names = prepared(run, steps, row, {"bitfuse": Tried()} | tried)
    row |= by_turns({name: steps.calls[name] for name in names}, rounds, count)
    for name in names:
        row[name]["by a kernel"] = steps.ran[name]
        run.say(f"{name}: {row[name]}, {row['bitfuse']['ms'] / row[name]['ms']:.4f}x")
    run.keep()


def prepared(run: Run, steps: Steps, row: dict[str, Any], tried: dict[str, Tried]) -> list[str]:
    """The names of those that `steps` has or gets a call of; what is wrong with others goes into `row`."""
    for name, one in tried.items():
        if name in steps.calls:
            continue
        if run.left() < 25:
            row[name] = "no time was left"
            continue
        try:
            wrong = steps.prepare(name, one)
        except Exception as error:
            wrong = _failed(run, name, error)
        run.say(name, wrong or "equal", steps.ran.get(name))
        if wrong:
            row[name] = wrong
        run.keep()
    return [name for name in tried if name in steps.calls]


class Ways(NamedTuple):
    """What is tried in steps, by name; configurations are those with which steps took the least time."""

    gelu: dict[str, Tried]
    single: dict[str, Tried]
    together: dict[str, Tried]
    energy: dict[str, Tried]
    why: dict[str, Tried]
    few: dict[str, Tried]


def named(ways: dict[str, list[Any]]) -> Ways:
    gelu = {f"GELU, {way.name}": Tried(up=way) for way in ways["gelu"]}
    up, gated, plain = ways["gelu"][0], ways["gated"], ways["plain"]

    def every(way: Any) -> Tried:
        return Tried(plain=dict.fromkeys((*LARGE_SHAPES, ANY) if isinstance(way, Stand) else LARGE_SHAPES, way))

    single = dict([next(iter(gelu.items()))])
    single |= {f"up without GELU, {up.name}": Tried(plain={ANY if isinstance(up, Stand) else UP: up})}
    single |= {f"down, {way.name}": Tried(down=way) for way in gated}
    single |= {f"out, {way.name}": Tried(out=way) for way in gated}
    single |= {f"all, plain, {way.name}": every(way) for way in plain}
    down, out = gated[0], gated[-1]
    together = {
        "GELU, down": Tried(up, down),
        "GELU, down, out": Tried(up, down, out),
        "all, with what follows": every(plain[0])._replace(up=up, down=down, out=out),
        "down, out in Gluon": Tried(down=ways["gluon"][0], out=ways["gluon"][0]),
    }
    (of_gelu, first), of_plain = next(iter(gelu.items())), f"all, plain, {plain[0].name}"
    some = {of_gelu: first, of_plain: every(plain[0])}
    why = {of_plain: every(plain[0]), "bitfuse, one stream": Tried(one_stream=True)}
    why |= {f"all, plain, one stream, {plain[0].name}": every(plain[0])._replace(one_stream=True)}
    why |= {f"all, plain, {way.name}": every(way) for way in ways["why"]}
    several = some | {"all, with what follows": together["all, with what follows"]}
    few = gelu | some | {"GELU, down, out": together["GELU, down, out"]}
    return Ways(gelu, single, together, several, why, few)


def seconds_by_turns(run: Run, steps: Steps, tried: dict[str, Tried]) -> None:
    """Two spans of ten seconds of each way, the second time in the opposite order."""
    row = run.results["6144 tokens"]["ten seconds"] = {}
    names = prepared(run, steps, row, tried)
    for name in [*names, *reversed(names)]:
        if run.left() > 25:
            row.setdefault(name, []).append(watched(steps.calls[name], 0.05 if run.tiny else 10.5))
            run.say("ten seconds of", name, row[name][-1])
            run.keep()


def at(tokens: int, run: Run, model: Any, geometry: Any, few: dict[str, Tried]) -> None:
    found = run.results[f"{tokens} tokens"] = {"layers": run.layers, "together": {}}
    if run.left() < 50:
        found["together"]["bitfuse"] = "no time was left"
        return
    if not run.tiny:
        frames, height, width = LATENTS[tokens]
        geometry = replace(geometry, frames=frames, height=height, width=width)
    rounds, count = (1, 2) if run.tiny else (2, 3) if tokens > 6144 else (4, 10)
    stage(run, Steps(model, geometry), found["together"], few, rounds, count)


def engines(run: Run, engine: str) -> dict[str, list[Any]]:
    """The kernels of each form, the most likely first; `why`: of plain layers, what tells causes apart."""
    if run.tiny:
        stand = Stand()
        return {form: [stand] for form in ("gelu", "gated", "plain", "why", "gluon")}
    if engine == "gluon":
        some, gated = [lin.ON_REGISTERS[1], lin.ON_REGISTERS[3]], [lin.LARGE[4]]
        return {"gelu": some, "gated": gated, "plain": list(some), "why": [], "gluon": gated}
    try:
        import linear_quack as quack
    except ImportError as error:
        what = "benchmarks/carry-quack.txt says what quack needs; --engine gluon needs nothing besides"
        raise SystemExit(f"{error}: {what}") from None
    narrow, together, wide, pingpong = quack.CONFIGURATIONS
    why = [narrow._replace(dependent=False), narrow._replace(schedule="dynamic"), together._replace(schedule="once")]
    return {
        "gelu": [pingpong, narrow, together, wide, pingpong._replace(tanh=True)],
        "gated": [together, narrow],
        "plain": [narrow, together],
        "why": why,
        "gluon": [lin.LARGE[4]],
    }


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi", "nvidia-cublas", "cuda-bindings"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def table(results: dict[str, Any]) -> Iterator[str]:
    for tokens, found in results.items():
        for part, row in found.items() if tokens.endswith("tokens") and isinstance(found, dict) else ():
            if isinstance(row, dict):
                yield f"{tokens}, {part}"
                base = row["bitfuse"]["ms"] if isinstance(row.get("bitfuse"), dict) else float("nan")
                for name, one in row.items():
                    if isinstance(one, list):
                        yield from (f"    {name:48} {span}" for span in one)
                    elif isinstance(one, dict):
                        shown = {key: value for key, value in one.items() if key not in ("turns", "by a kernel")}
                        yield f"    {name:48} {base / one['ms']:.4f}x {shown}"
                    else:
                        yield f"    {name:48} {one}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the JSON goes; the profile goes beside it")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU, in Triton's interpreter")
    parser.add_argument("--engine", choices=("quack", "gluon"), default="quack")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of the names of ways; the others sit out")
    parser.add_argument("--layers", type=int, default=48, help="of the transformer")
    parser.add_argument("--seconds", type=float, default=400.0, help="after which nothing more is begun")
    given = parser.parse_args()
    if DEVICE.type != "cuda" and not (given.tiny and interpreting()):
        parser.error("there is no GPU here; accepted without one: TRITON_INTERPRET=1 and --tiny")
    torch.manual_seed(17)
    only = tuple(given.only)
    results = {
        "what": "whole steps with other linears",
        "machine": machine(DEVICE),
        "versions": versions(),
        "exit_code": 1,
    }
    run = Run(given.tiny, 1 if given.tiny else given.layers, given.seconds, results, given.out)
    with torch.no_grad():
        ways = engines(run, given.engine)
        trial(run, ways)
        if not all(ways[form] for form in ("gelu", "gated", "plain", "gluon")):
            raise SystemExit("of one form no kernel is right: nothing to decide")
        tried = named(ways)
        if unknown := [name for name in only if not any(one.startswith(name) for some in tried for one in some)]:
            names = ", ".join(dict.fromkeys(name for some in tried for name in some))
            parser.error(f"--only {unknown[0]!r} begins no way's name; accepted: {names}")
        tried = Ways(*({name: one for name, one in some.items() if name.startswith(only)} for some in tried))
        if "layers" in given.parts:
            layers(run, ways)
        model, geometry = built(run)
        run.say("-- the model")
        steps, few = Steps(model, geometry), (1, 2) if run.tiny else (2, 5)
        found = results["6144 tokens"] = {"layers": run.layers}
        again = {"bitfuse again": Tried()}
        plainly = {"bitfuse": Tried()}

        def of(part: str, some: dict[str, Tried]) -> Callable[[], None]:
            return lambda: stage(run, steps, found.setdefault(part, {}), some, *few)

        parts: dict[str, Callable[[], None]] = {
            "gelu": of("GELU's configurations", again | tried.gelu),
            "single": of("one change at a time", again | tried.single),
            "together": of("together", tried.together),
            "energy": lambda: seconds_by_turns(run, steps, plainly | tried.energy),
            "why": of("why", tried.why),
            "24576": lambda: at(24576, run, model, geometry, tried.few),
            "1536": lambda: at(1536, run, model, geometry, tried.few),
            "kernels": lambda: _profile(run, steps, plainly | tried.few),
        }
        failed = False
        for name in (name for name in given.parts if name in parts):
            try:
                parts[name]()
            except Exception as error:
                failed = True
                results[f"{name} failed"] = _failed(run, name, error)
            run.say(f"-- {name}")
            run.keep()
        results["exit_code"] = int(failed)
        results["seconds"] = round(time.perf_counter() - _BEGAN, 1)
        run.keep()
    print({name: found for name, found in results.get("trial", {}).items() if found != "equal"} or "trial: all equal")
    for line in table(results):
        print(line)


def _profile(run: Run, steps: Steps, some: dict[str, Tried]) -> None:
    if DEVICE.type != "cuda" or run.left() < 10:
        return
    found = {name: kernels(call) for name, call in steps.calls.items() if name in some}
    totals = run.results["kernels"] = {}
    for name, one in found.items():
        total: dict[str, list[float]] = {}
        for index, _, took, _ in one["rows"]:
            total.setdefault(one["names"][index], []).append(took)
        longest = sorted(total.items(), key=lambda item: -sum(item[1]))[:16]
        totals[name] = {kernel: {"calls": len(t), "ms": round(sum(t) / 1e3, 3)} for kernel, t in longest}
    if run.out is not None:
        run.out.with_name(f"{run.out.stem}-kernels.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
