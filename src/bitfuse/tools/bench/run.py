"""A whole run of diffusers' pipelines by stages, stock and bitfuse by turns: seconds, peak memory, and all bits.

A stage begins and ends where the pipeline calls a method of its own (`encode_prompt`, `prepare_latents`, the progress
bar around the loop, `vae.decode`, `postprocess_video`, `audio_vae.decode`, `maybe_free_model_hooks`): those are wrapped
while a run is timed, and no module is hooked, since a hook would keep bitfuse out. The device is waited for at every
border. What a stage hands on is compared between the stages, while no clock runs.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitfuse.core import proof
from bitfuse.core.bits import BITS, compare, form_mismatch
from bitfuse.tools import seeded
from bitfuse.tools.bench.measure import spread
from bitfuse.tools.compare.runs import named
from bitfuse.tools.compare.runs import reasons as reasons_of
from bitfuse.tools.seeded import pipeline
from bitfuse.tools.seeded.pipeline import Film, Pipelines
from bitfuse.tools.text import cell, say

TEXT, CONNECTORS, REST = "text", "connectors", "the rest"
FIRST, UPSAMPLER, SECOND = "denoising, 8 steps", "latent upsampler", "denoising, 3 steps"
DECODE, POSTPROCESS, AUDIO, VOCODER = "decode", "postprocess", "audio decode", "vocoder"
STAGES = (TEXT, CONNECTORS, FIRST, UPSAMPLER, SECOND, DECODE, POSTPROCESS, AUDIO, VOCODER, REST)
WAYS = ("stock", "bitfuse")

_ROUNDS, _FEWEST, _ENOUGH = 3, 2, 40.0  # turns of each way, at most and at least; seconds after which no more are begun
_SEED = 0


# -- the clock, and what it is told by ---------------------------------------------------------------------------------


class Clock:
    """Seconds and peak of memory of a call's stages, which follow one another. On a CPU no memory is counted.

    seconds    of each stage, all its parts added
    peaks      bytes of memory at its peak beyond what was there when the clock was made
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.stage: str | None = None
        self.resting = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self._since = 0.0

    def enter(self, stage: str | None) -> None:
        """The stage before ends here, and this one begins; with None the clock stands."""
        now = seeded.now(self.device)
        if self.stage is not None:
            self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self._since
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device) - self.resting
                self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), peak)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.stage, self._since = stage, time.perf_counter()


class Bits:
    """What the first run handed on from stage to stage, and where a later one differs from it."""

    def __init__(self) -> None:
        self.expected: dict[tuple[str, str], Tensor] = {}

    def why_not(self, stage: str, name: str, found: Tensor) -> str | None:
        """None where the bits are the first run's; of the first run, where the result can tell runs apart."""
        expected = self.expected.setdefault((stage, name), found)
        if expected is found:
            return _why_no_evidence(name, found)
        bits = BITS[found.element_size()]
        # a fifth of the time of `compare`, which makes masks of the NaN: a film of 1536x1024 is 2.3 GB of fp32
        if form_mismatch(expected, found) is None and torch.equal(expected.view(bits), found.view(bits)):
            return None
        mismatch = compare(expected, found)
        return None if mismatch is None else f"{name}: {mismatch.sentence}"


def _why_no_evidence(name: str, found: Tensor) -> str | None:
    low, high = found.aminmax()  # NaN where there is one
    if not (low.isfinite() and high.isfinite()):
        return f"{name}: stock's own values are not all finite, so that equal ones say little"
    return f"{name}: all of stock's own values are equal, so that equal ones say little" if low == high else None


@dataclass
class Run:
    """One whole run: its clock, and of each stage why its bits are not the first run's, where they were compared."""

    clock: Clock
    bits: Bits
    stages: dict[str, str | None] = field(default_factory=dict)

    def judge(self, stage: str, name: str, found: Tensor) -> None:
        """Compare while the clock stands; it goes on in the stage that it was in."""
        going = self.clock.stage
        self.clock.enter(None)
        reason = self.bits.why_not(stage, name, found)
        self.stages[stage] = self.stages.get(stage) or reason
        self.clock.enter(going)


@contextlib.contextmanager
def _timed(pipelines: Pipelines, run: Run) -> Iterator[Callable[[str], None]]:
    """Inside, the pipelines tell the clock their stages. Yields what is called with the name of the loop's stage."""
    main, clock = pipelines.main, run.clock
    loop = FIRST

    def name_loop(stage: str) -> None:
        nonlocal loop
        loop = stage

    def before_decoding(latents: Tensor) -> None:
        run.judge(SECOND, "the video's latents", latents)

    def decoded(result: tuple[Tensor]) -> None:
        run.judge(DECODE, "the decoded video", result[0])

    @contextlib.contextmanager
    def progress_bar(*args: Any, **kwargs: Any) -> Iterator[Any]:
        clock.enter(loop)
        with type(main).progress_bar(main, *args, **kwargs) as bar:
            yield bar
        clock.enter(REST)

    with contextlib.ExitStack() as undo:
        _wrap(undo, main, "encode_prompt", clock, TEXT, CONNECTORS)  # the connectors are called next
        _wrap(undo, main, "prepare_latents", clock, REST, REST)  # after them
        _wrap(undo, main.vae, "decode", clock, DECODE, REST, given=before_decoding, gave=decoded)
        _wrap(undo, main.video_processor, "postprocess_video", clock, POSTPROCESS, REST)
        _wrap(
            undo,
            main.audio_vae,
            "decode",
            clock,
            AUDIO,
            VOCODER,
            given=lambda latents: run.judge(SECOND, "the audio's latents", latents),
            gave=lambda result: run.judge(AUDIO, "the spectrogram", result[0]),
        )
        _wrap(undo, main, "maybe_free_model_hooks", clock, REST, REST)  # the last thing that a call does
        main.progress_bar = progress_bar
        undo.callback(main.__dict__.pop, "progress_bar")
        yield name_loop


def _wrap(
    undo: contextlib.ExitStack,
    owner: Any,
    name: str,
    clock: Clock,
    stage: str,
    then: str,
    given: Callable[[Any], None] = lambda argument: None,
    gave: Callable[[Any], None] = lambda result: None,
) -> None:
    """Until undone, this method of the owner is a stage of its own, and another stage begins after it.

    given, gave    called with the first argument and with the result, outside of the stage
    """
    method = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if args:
            given(args[0])
        clock.enter(stage)
        result = method(*args, **kwargs)
        clock.enter(then)
        gave(result)
        return result

    was_there = name in owner.__dict__  # bitfuse's own, where the pipeline is accelerated
    owner.__dict__[name] = wrapped
    undo.callback(*((setattr, owner, name, method) if was_there else (owner.__dict__.pop, name)))


@torch.no_grad()
def once(pipelines: Pipelines, film: Film, bits: Bits, device: torch.device) -> Run:
    """A whole two-stage run from the prompt to frames in the CPU's memory and a waveform on the device."""
    run = Run(Clock(device), bits)
    generator = torch.Generator(device).manual_seed(_SEED)
    with _timed(pipelines, run) as name_loop:
        run.clock.enter(REST)
        name_loop(FIRST)
        video, audio = pipeline.first_stage(pipelines, film, generator)
        run.judge(FIRST, "the video's latents", video)
        run.judge(FIRST, "the audio's latents", audio)
        run.clock.enter(UPSAMPLER)
        video = pipeline.upsampled(pipelines, film, video)
        run.clock.enter(REST)
        run.judge(UPSAMPLER, "the video's latents", video)
        name_loop(SECOND)
        frames, waveform = pipeline.second_stage(pipelines, film, generator, video, audio)
        run.clock.enter(None)
    run.judge(POSTPROCESS, "the frames", torch.from_numpy(frames))
    run.judge(VOCODER, "the waveform", waveform)
    return run


# -- the rows ----------------------------------------------------------------------------------------------------------


def rows(
    console: Console, device: torch.device, layers: int | None = None, rounds: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part of the document, row) of each: "run", then "decode" of both sizes, plain and tiled, then "first-decode"."""
    film = pipeline.film_for(device, layers)
    with contextlib.ExitStack() as ends:
        cache = ends.enter_context(tempfile.TemporaryDirectory())
        waiting = {name: ends.enter_context(FreshDecode(way, device, cache)) for name, way in _FIRST.items()}
        yield from _in_this_process(console, film, device, rounds)
        _forget(device)
        yield "first-decode", first_decode(console, film, waiting)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _in_this_process(
    console: Console, film: Film, device: torch.device, rounds: int | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    import bitfuse

    with torch.no_grad():
        stock = pipeline.build(film, device, _SEED)
        models = {"stock": stock, "bitfuse": pipeline.twin(stock)}
        _forget(device)  # what the parts took while they were made
        handle = bitfuse.accelerate(models["bitfuse"].main)
        try:
            yield "run", whole(console, film, models, handle, device, rounds or _ROUNDS)
            for size in ((film.height, film.width), film.size):
                for tiled in (False, True):
                    yield "decode", decode(console, film, models, handle, size, tiled, device, rounds or _ROUNDS)
        finally:
            handle.restore()


def whole(
    console: Console, film: Film, models: dict[str, Pipelines], handle: Any, device: torch.device, rounds: int
) -> dict[str, Any]:
    """A whole run by stages. The first of each way warms up, and bitfuse's first proves its kernels: its time apart."""
    bits, first = Bits(), {}
    timed: dict[str, list[Clock]] = {way: [] for way in WAYS}
    differs: dict[str, dict[str, str | None]] = {way: {} for way in WAYS}

    def note(way: str, run: Run) -> None:
        for stage, reason in run.stages.items():
            differs[way][stage] = differs[way].get(stage) or reason

    for way in WAYS:
        run = once(models[way], film, bits, device)
        first[way] = sum(run.clock.seconds.values())
        note(way, run)
    report = handle.report()
    start = time.perf_counter()
    for index in range(rounds):
        if index >= _FEWEST and time.perf_counter() - start > _ENOUGH:
            break
        for way in WAYS[:: -1 if index % 2 else 1]:
            gc.collect()
            run = once(models[way], film, bits, device)
            timed[way].append(run.clock)
            note(way, run)
    reasons = [reason for way in WAYS for reason in differs[way].values() if reason]
    if not report.fused and not reasons:
        reasons = [f"nothing was fused: {reasons_of(report) or 'no site was called'}"]
    row = {
        "host": "diffusers",
        "host_version": named("diffusers"),
        "version": pipeline.VERSION,
        "layers": film.geometry.layers,
        "geometry": film.sentence,
        "mismatch": reasons[0] if reasons else None,
        "first_run_s": first,
        "runs": {way: len(clocks) for way, clocks in timed.items()},
        "sites_fused": report.fused,
        "sites_seen": report.seen,
        "sites": report.kinds(),
        "not_fused": reasons_of(report),
        "stages": [_stage(stage, timed, differs) for stage in STAGES],
        "total": _figures(
            {way: [sum(clock.seconds.values()) for clock in clocks] for way, clocks in timed.items()},
            {way: [max(clock.peaks.values(), default=None) for clock in clocks] for way, clocks in timed.items()},
        ),
    }
    _print_run(console, row)
    return row


def _stage(stage: str, timed: dict[str, list[Clock]], differs: dict[str, dict[str, str | None]]) -> dict[str, Any]:
    compared = stage in differs["bitfuse"]
    reasons = [found for way in WAYS if (found := differs[way].get(stage))]
    return {
        "stage": stage,
        "bits": (reasons[0] if reasons else "equal") if compared else None,  # None: by what the next stages make of it
        **_figures(
            {way: [clock.seconds.get(stage, 0.0) for clock in clocks] for way, clocks in timed.items()},
            {way: [clock.peaks.get(stage) for clock in clocks] for way, clocks in timed.items()},
        ),
    }


def _figures(seconds: dict[str, list[float]], peaks: dict[str, list[int | None]]) -> dict[str, Any]:
    found = {way: spread([1e3 * s for s in samples]) for way, samples in seconds.items()}
    stock, ours = (found[way]["median"] for way in WAYS)
    counted = {way: [peak for peak in of_way if peak is not None] for way, of_way in peaks.items()}
    return {
        "ms": found,
        "speed_up": stock / ours if ours else None,
        "peak_gb": {way: max(of_way) / 1e9 for way, of_way in counted.items() if of_way},
    }


# -- the decode alone --------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(
    console: Console,
    film: Film,
    models: dict[str, Pipelines],
    handle: Any,
    size: tuple[int, int],
    tiled: bool,
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """`vae.decode` alone, plain or with the tiles that `vae.enable_tiling()` sets by default."""
    latents, bits = latents_of(film, size, device), Bits()
    clocks: dict[str, list[Clock]] = {way: [] for way in WAYS}
    reasons, before = [], _fused_calls(handle)
    for way in WAYS:
        if tiled:
            models[way].main.vae.enable_tiling(**film.tiles)
    try:
        for index in range(1 + rounds):  # the first warms up
            for way in WAYS[:: -1 if index % 2 else 1]:
                clock = Clock(device)
                clock.enter(DECODE)
                found = models[way].main.vae.decode(latents, return_dict=False)[0]
                clock.enter(None)
                reasons.append(bits.why_not(DECODE, "the decoded video", found))
                del found
                if index:
                    clocks[way].append(clock)
    finally:
        for way in WAYS:
            models[way].main.vae.disable_tiling()
    calls = _fused_calls(handle) - before
    unfused = None if calls else f"nothing was fused: {reasons_of(handle.report()) or 'no site was called'}"
    row = {
        "frames": film.frames,
        "height": size[0],
        "width": size[1],
        "tiled": tiled,
        "mismatch": next((reason for reason in reasons if reason), unfused),
        "fused_calls": calls,
        **_figures(
            {way: [clock.seconds[DECODE] for clock in of_way] for way, of_way in clocks.items()},
            {way: [clock.peaks.get(DECODE) for clock in of_way] for way, of_way in clocks.items()},
        ),
    }
    _print_decode(console, row)
    return row


def _fused_calls(handle: Any) -> int:
    return sum(site.fused for site in handle.sites)


def latents_of(film: Film, size: tuple[int, int], device: torch.device) -> Tensor:
    """Seeded latents [1, C, F, H, W] in bf16, of a video of this height and width in pixels."""
    shape = (1, film.geometry.channels, (film.frames - 1) // 8 + 1, size[0] // 32, size[1] // 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED)).to(device, torch.bfloat16)


# -- the first decode of a process -------------------------------------------------------------------------------------

_LIMIT = 120.0  # seconds, for one process
_FIRST = {"stock": "stock", "empty caches": "bitfuse", "warm caches": "bitfuse"}  # in this order: the second fills them


class FreshDecode:
    """A fresh process that imports what it needs, and waits to be told to decode: the imports cost no time later.

    cache    folder of Triton's cache
    """

    def __init__(self, way: str, device: torch.device, cache: str):
        self.way = way
        code = "import sys; from bitfuse.tools.bench.run import time_first_decode; time_first_decode(*sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, way, device.type],
            env={**os.environ, "TRITON_CACHE_DIR": cache},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> FreshDecode:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def decode(self) -> dict[str, Any]:
        """What `time_first_decode` found."""
        out, error = self._process.communicate("go\n", timeout=_LIMIT)
        if self._process.returncode:
            raise RuntimeError(f"the first decode ({self.way}) failed in its process: {error.strip()[-2000:]}")
        return json.loads(out.splitlines()[-1])


def first_decode(console: Console, film: Film, waiting: dict[str, FreshDecode]) -> dict[str, Any]:
    """From before `accelerate` to the end of the first decode, each in a process of its own, beyond what stock takes.

    waiting    processes: of stock, of bitfuse with an empty Triton cache, and of bitfuse with the cache so filled
    """
    found = {name: process.decode() for name, process in waiting.items()}
    stock = found["stock"]["seconds"]
    ours = [name for name in found if name != "stock"]
    unequal = [name for name in ours if found[name]["sha256"] != found["stock"]["sha256"]]
    unfused = [name for name in ours if not found[name]["sites_fused"]]
    mismatch = f"{unfused[0]}: nothing was fused" if unfused else None
    if unequal:
        mismatch = f"{unequal[0]}: the video differs from that of the stock process"
    row = {
        "frames": film.frames,
        "height": film.size[0],
        "width": film.size[1],
        "mismatch": mismatch,
        "processes": found,
        "beyond_stock_s": {name: found[name]["seconds"] - stock for name in ours},
    }
    _print_first_decode(console, row)
    return row


@torch.no_grad()
def time_first_decode(way: str, device_type: str) -> None:
    """What a fresh process does: import, wait for a line, then decode twice.

    Prints, as JSON, the seconds up to the end of each, the memory at the peak beyond the weights, and what came out.
    """
    import bitfuse
    from bitfuse.tools.compare.bits import sha256

    device = torch.device(device_type)
    pipeline.need()  # the imports
    if not sys.stdin.readline():
        return  # whoever started this has ended
    film = pipeline.film_for(device, 1)
    vae = pipeline.part("vae", film, device, _SEED)
    latents = latents_of(film, film.size, device)
    facts: dict[str, Any] = {}
    seeded.now(device)
    clock = Clock(device)
    clock.enter("first")
    handle = bitfuse.accelerate(vae) if way == "bitfuse" else None
    out = vae.decode(latents, return_dict=False)[0]
    clock.enter(None)
    facts["sha256"] = sha256(out)
    del out
    clock.enter("second")
    vae.decode(latents, return_dict=False)
    clock.enter(None)
    facts |= {"seconds": clock.seconds["first"], "second_s": clock.seconds["second"]}
    facts["peak_gb"] = {name: peak / 1e9 for name, peak in clock.peaks.items()}
    if handle:
        verdicts = proof.verdicts().values()
        facts["sites_fused"] = handle.report().fused
        facts["proofs"] = len(verdicts)
        facts["proofs_s"] = sum(verdict.seconds for verdict in verdicts)
    print(json.dumps(facts))


# -- printing ----------------------------------------------------------------------------------------------------------


def _print_run(console: Console, row: dict[str, Any]) -> None:
    table = Table("stage", "stock s", "bitfuse s", "speed-up", "peak GB,\nboth", "bits")
    table.title = cell(f"{row['host_version']}, LTX-{row['version']}, {row['geometry']}; median of whole runs")
    for found in [*row["stages"], {"stage": "the whole run", "bits": row["mismatch"] or "equal", **row["total"]}]:
        bits = {"equal": "equal", None: "-"}.get(found["bits"], "see below")
        table.add_row(*map(cell, (found["stage"], *_cells(found), bits)))
    console.print(table)
    for found in row["stages"]:
        if found["bits"] not in ("equal", None):
            say(console, f"{found['stage']}: {found['bits']}")
    first = row["first_run_s"]
    say(
        console,
        f"{row['sites_fused']} of {row['sites_seen']} sites fused; {min(row['runs'].values())} runs of each way; "
        f"the first of this process took {first['stock']:.1f} s and, with proofs, {first['bitfuse']:.1f} s",
    )
    idle = sum(kind["count"] for kind in row["sites"] if kind["state"] == "not called yet")
    if idle:
        say(console, f"{idle} sites were not called, as a run from text encodes no video")
    if row["sites_fused"] + idle < row["sites_seen"]:
        say(console, f"not fused: {row['not_fused']}")
    if row["mismatch"]:
        say(console, f"not identical: {row['mismatch']}")


def _cells(found: dict[str, Any]) -> tuple[str, str, str, str]:
    stock, ours = (f"{found['ms'][way]['median'] / 1e3:.3f}" for way in WAYS)
    ratio = "-" if found["speed_up"] is None else f"{found['speed_up']:.2f}x"
    return stock, ours, ratio, ", ".join(f"{peak:.2f}" for peak in found["peak_gb"].values()) or "-"


def _print_decode(console: Console, row: dict[str, Any]) -> None:
    stock, ours, ratio, peaks = _cells(row)
    what = f"{'tiled ' if row['tiled'] else ''}decode of {row['frames']} frames {row['width']}x{row['height']}"
    bits = row["mismatch"] or "equal in every bit"
    say(console, f"{what}: {stock} s, bitfuse {ours} s, {ratio}; peak {peaks} GB; {bits}")


def _print_first_decode(console: Console, row: dict[str, Any]) -> None:
    what = f"first decode of a process, {row['frames']} frames {row['width']}x{row['height']}"
    for name, found in row["processes"].items():
        beyond = row["beyond_stock_s"].get(name)
        more = "" if beyond is None else f", {beyond:+.2f} s beyond stock's"
        peaks = ", ".join(f"{peak:.2f} GB" for peak in found["peak_gb"].values()) or "not counted"
        say(console, f"{what}, {name}: {found['seconds']:.2f} s{more}; the second {found['second_s']:.2f} s; {peaks}")
    if row["mismatch"]:
        say(console, f"not identical: {row['mismatch']}")
