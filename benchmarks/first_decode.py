"""The first decode of a process: stock, and bitfuse with an empty and a filled Triton cache; where its seconds go.

    python benchmarks/first_decode.py --out out/first-decode.json                        # some 90 s on an H200
    python benchmarks/first_decode.py --out out/first-decode.json --size 1536x1024x121
    TRITON_INTERPRET=1 python benchmarks/first_decode.py --out out/tiny.json --tiny     # tries the script on a CPU

Each row is a process of its own, which has imported what it needs and made its weights before it is told to begin; one
runs at a time. Its seconds are those from before `accelerate` to the end of the first decode, and the video's bits are
compared with those of the first stock process. Besides, in processes that wait for the device at each border: the
seconds in each section of a first decode, without those of sections in it (`sections`), what Triton compiled or loaded
(`kernels`), and with --profile how long the GPU was busy in each section. Exit code 1 where a bit differs.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIMIT = 60.0  # seconds for one process, from where it is told to begin
COMPRESSION = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
TINY = {
    "block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
}
MARK = "section: "
COUNTED = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMalloc", "cudaFree", "cudaLaunchKernel")


# -- sections ----------------------------------------------------------------------------------------------------------


class Sections:
    """Seconds and entries of each section, in the main thread; those of a section within another count for it alone."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: Counter[str] = Counter()
        self.entries: Counter[str] = Counter()
        self._open: list[str] = ["the rest"]
        self._since = time.perf_counter()
        self._thread = threading.get_ident()

    def _border(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        self._border()
        self._open.append(name)
        self.entries[name] += 1
        try:
            with torch.profiler.record_function(MARK + name):
                yield
                synchronize(self.device)
        finally:
            self._border()
            self._open.pop()

    def wrap(self, owner: Any, name: str, section: str) -> None:
        own = getattr(owner, name)

        @functools.wraps(own)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.section(section):
                return own(*args, **kwargs)

        setattr(owner, name, wrapped)

    def found(self) -> dict[str, Any]:
        self._border()
        names = sorted(self.seconds, key=self.seconds.__getitem__, reverse=True)
        return {name: {"seconds": self.seconds[name], "entries": self.entries[name]} for name in names}


def watch(sections: Sections) -> dict[str, list[dict[str, Any]]]:
    """Wrap what a first decode calls. The lists that are returned fill while it runs."""
    from bitfuse.core import inputs, launch, proof
    from bitfuse.core.operator import Operator
    from bitfuse.hosts.rehearsal import Rehearsal
    from bitfuse.hosts.video_decoder import VideoDecoder
    from bitfuse.ops import convolution

    began = time.perf_counter()
    prepared: list[dict[str, Any]] = []
    sections.wrap(VideoDecoder, "_rehearse", "a decode without values")
    sections.wrap(Rehearsal, "_submit", "kernels handed to threads")
    sections.wrap(launch.Plan, "_compiled", "kernels waited for and bound")
    sections.wrap(proof, "run_battery", "batteries: the rest")
    for name in ("kept", "guarded", "changed", "trespass"):
        sections.wrap(inputs, name, "batteries: memory around")
    sections.wrap(proof, "compare", "batteries: compared")
    watch_trials(sections)
    sections.wrap(proof, "compare_live", "live comparisons")
    sections.wrap(proof, "compare_forms", "forms compared")
    sections.wrap(Operator, "_runner", "launches prepared")
    sections.wrap(convolution, "_difference", "convolutions compared")
    sections.wrap(convolution, "_probe", "convolutions' probes drawn")
    compile = launch.Plan.compile

    def noted(plan: Any, args: Any) -> None:
        start = time.perf_counter()
        compile(plan, args)
        end = time.perf_counter()
        given = {"kernel": plan.kernel.__name__, "channels": plan.constants.get("C"), "slots": len(plan.slots)}
        thread = threading.current_thread().name
        prepared.append({**given, "thread": thread, "from_s": start - began, "seconds": end - start})

    launch.Plan.compile = noted  # type: ignore[method-assign]
    prove, proved = proof.prove, []

    def proving(operator: Any, tier: Any, signature: Any, *rest: Any) -> Any:
        start = time.perf_counter()
        verdict = prove(operator, tier, signature, *rest)
        given = {"operator": operator.name, "tier": tier.name, "from_s": start - began, "families": verdict.families}
        proved.append({**given, "seconds": verdict.seconds})
        return verdict

    proof.prove = proving  # type: ignore[assignment]
    return {"prepared": prepared, "kernels": [], "modules": [], "proved": proved}


def watch_trials(sections: Sections) -> None:
    """What a battery draws, plans and computes by the reference; the first one's by itself, which loads much."""
    from bitfuse.core.operator import Operator

    trial, numbers = Operator._trial, itertools.count()

    def watched(operator: Any, tier: Any, args: Any) -> Any:
        which = "batteries" if next(numbers) else "first battery"
        chain, plan_of, families = trial(operator, tier, args)

        def timed(function: Any, what: str) -> Any:
            def call(*given: Any) -> Any:
                with sections.section(f"{which}: {what}"):
                    return function(*given)

            return call

        draw = timed(lambda: next(families, None), "drawn")
        return timed(chain, "reference"), timed(plan_of, "planned"), iter(draw, None)

    Operator._trial = watched  # type: ignore[method-assign]


def watch_triton(found: dict[str, list[dict[str, Any]]]) -> None:
    """Note what Triton compiles, and the C modules that it builds, where it says so."""
    from triton import knobs
    from triton.backends.nvidia import driver

    def listener(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        row = {"name": src.name, "hit": cache_hit, "source_s": times.ir_initialization / 1e6}
        row |= {f"{stage}_s": us / 1e6 for stage, us in times.lowering_stages}
        found["kernels"].append(row | {"stored_s": times.store_results / 1e6})

    knobs.compilation.listener = listener
    build = getattr(driver, "compile_module_from_src", None)
    if build is None:
        return

    def built(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        module = build(*args, **kwargs)
        source = kwargs.get("src", args[0] if args else "")
        name = kwargs.get("name", args[1] if len(args) > 1 else None)
        row = {"name": name, "source": hashlib.sha256(str(source).encode()).hexdigest()[:8]}
        found["modules"].append(row | {"seconds": time.perf_counter() - start})
        return module

    driver.compile_module_from_src = built


def gpu_times(profile: Any) -> dict[str, dict[str, Any]]:
    """For each section how long a kernel or a copy ran in it, how many, and what else of `COUNTED` happened in it."""
    marked, ran, counted = [], [], []
    for event in profile.events():
        span = event.time_range.start, event.time_range.end
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if event.name.startswith(MARK):
            if not on_gpu:  # which has annotations of its own
                marked.append((*span, event.name.removeprefix(MARK)))
        elif on_gpu:
            ran.append((*span, event.name))
        elif event.name in COUNTED or event.name == "aten::_local_scalar_dense":
            counted.append((*span, event.name))

    marked.sort()
    starts = [start for start, _, _ in marked]

    def innermost(at: float) -> str:  # sections stand in one another: the last that began and has not ended
        last = bisect.bisect_right(starts, at)
        return next((name for _, end, name in reversed(marked[:last]) if at <= end), "the rest")

    found: dict[str, dict[str, Any]] = {}
    for start, end, _ in ran:
        row = found.setdefault(innermost(start), {"busy_s": 0.0, "launched": 0})
        row["busy_s"] += (end - start) / 1e6
        row["launched"] += 1
    for start, _, name in counted:
        row = found.setdefault(innermost(start), {"busy_s": 0.0, "launched": 0})
        row[name] = row.get(name, 0) + 1
    return found


# -- a process of its own ----------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decoder(tiny: bool, device: torch.device) -> Any:
    from diffusers import AutoencoderKLLTX2Video

    with torch.device("meta"):
        vae = AutoencoderKLLTX2Video(decoder_causal=False, **COMPRESSION, **(TINY if tiny else {}))
    # diffusers' own `to` warns about modules that it keeps in fp32: none
    vae = torch.nn.Module.to(vae, torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in vae.parameters():
        std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.normal_(std=std, generator=generator)
    for buffer in vae.buffers():
        buffer.fill_(1)
    return vae


@torch.no_grad()
def child(way: str, tiny: bool, size: str) -> None:
    """Import, make the weights, wait for a line, decode. Prints what was found, as JSON."""
    import bitfuse
    import bitfuse.hosts.diffusers_vae  # stock's processes import the same
    from bitfuse.hosts.rehearsal import Rehearsal

    ours, *how = way.split(", ")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = decoder(tiny, device)
    width, height, frames = map(int, size.split("x"))
    shape = (2, 2, 3) if tiny else ((frames - 1) // 8 + 1, height // 32, width // 32)
    z = torch.randn(1, vae.config.latent_channels, *shape, generator=torch.Generator().manual_seed(1))
    z = z.to(device, torch.bfloat16)
    synchronize(device)
    print("ready", flush=True)
    if not sys.stdin.readline():
        return  # whoever started this has ended
    for number, what in (one.split() for one in how if one[0].isdigit()):
        if what == "cores":
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(number)])
        else:
            Rehearsal.THREADS = int(number)
    facts: dict[str, Any] = {"triton_imported": "triton" in sys.modules}
    sections, found, profile = None, {}, contextlib.nullcontext()
    if "profiled" in how and device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        profile = torch.profiler.profile(activities=activities)  # type: ignore[assignment]
    with profile:
        start, before = time.perf_counter(), os.times()
        if "by sections" in how or "profiled" in how:
            sections = Sections(device)
            with sections.section("Triton imported"):
                import triton  # noqa: F401
            found = watch(sections)
            with contextlib.suppress(ImportError, AttributeError):  # of another version: told without it
                watch_triton(found)
            sections.wrap(bitfuse, "accelerate", "accelerate")
        handle = None if ours == "stock" else bitfuse.accelerate(vae)
        video = vae.decode(z, return_dict=False)[0]
        synchronize(device)
        facts["first_s"] = time.perf_counter() - start
        spent = [after - earlier for after, earlier in zip(os.times(), before, strict=True)]
        facts["cpu_s"] = {"own": spent[0] + spent[1], "children": spent[2] + spent[3]}
    if sections is not None:
        facts |= {"sections": sections.found(), **found}
    if "profiled" in how and device.type == "cuda":
        facts["gpu"] = gpu_times(profile)
    if device.type == "cuda":
        stats = torch.cuda.memory_stats()
        facts |= {name: stats.get(name, 0) for name in ("num_device_alloc", "num_device_free", "num_alloc_retries")}
        facts["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    facts["sha256"] = hashlib.sha256(bits(video)).hexdigest()
    del video
    start = time.perf_counter()
    vae.decode(z, return_dict=False)
    synchronize(device)
    facts["second_s"] = time.perf_counter() - start
    if handle is not None:
        report, verdicts = handle.report(), bitfuse.core.proof.verdicts().values()
        facts |= {"sites_fused": report.fused, "sites_seen": report.seen, "proofs": len(verdicts)}
        facts["proofs_s"] = sum(verdict.seconds for verdict in verdicts)
        reasons = Counter(reason for site in handle.sites for reason in site.reasons)
        facts["not_fused"] = dict(reasons.most_common(5))
    print(json.dumps(facts), flush=True)


def bits(video: Tensor) -> bytes:
    return video.contiguous().view(torch.uint8).cpu().numpy().tobytes()


class Process:
    """A child under way. It is told to begin by `decode`, once `ready`."""

    def __init__(self, way: str, asked: argparse.Namespace, cache: Path, out: Path):
        self.way = way
        command = [sys.executable, __file__, "--child", way, "--size", asked.size, *(["--tiny"] * asked.tiny)]
        env = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"}
        self._errors = out.open("w+")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)

    def ready(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == "ready":
                return
        self._failed()

    def decode(self) -> dict[str, Any]:
        try:
            out, _ = self._process.communicate("go\n", timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.stop()
            raise RuntimeError(f"the process ({self.way}) took more than {LIMIT:.0f} s") from None
        if self._process.returncode:
            self._failed()
        return json.loads(out.splitlines()[-1])

    def _failed(self) -> None:
        self.stop()
        self._errors.seek(0)
        raise RuntimeError(f"the process ({self.way}) failed: {self._errors.read().strip()[-2000:]}")

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


# -- all of them -------------------------------------------------------------------------------------------------------


def ways(asked: argparse.Namespace) -> list[str]:
    """In the order in which they run. The first with an empty cache fills that which the warm ones have."""
    found = ["stock", "empty cache", "warm cache"] * asked.runs
    found += [f"empty cache, {number} threads" for number in asked.threads]
    found += ["empty cache, by sections", "warm cache, by sections", "empty cache, 4 cores"]
    return found + (["warm cache, profiled"] if asked.profile else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--size", default="768x512x121", help="width, height and frames of the video")
    parser.add_argument("--runs", type=int, default=3, help="of each of the three ways")
    parser.add_argument("--tiny", action="store_true", help="a decoder for a CPU, to try this script")
    parser.add_argument("--threads", type=int, nargs="*", default=[], help="more processes, of so many threads")
    parser.add_argument("--profile", action="store_true", help="one process more, under PyTorch's profiler")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child, asked.tiny, asked.size)
        return 0
    if asked.out is None:
        parser.error("--out is needed: the JSON file to write")
    if asked.runs < 1:
        parser.error(f"--runs {asked.runs}; accepted: 1 or more")
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", asked.size):
        parser.error(f"--size {asked.size!r}; accepted: width x height x frames, as 768x512x121")
    if not (asked.tiny or torch.cuda.is_available()):
        parser.error("there is no CUDA device; accepted without one: --tiny, with TRITON_INTERPRET=1")
    from bitfuse.tools.machine import machine

    asked.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"what": __doc__.splitlines()[0], "size": asked.size, "cores": os.cpu_count()}
    result |= {"machine": machine(), "rows": rows, "exit_code": 1}
    waiting: list[Process] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, way in enumerate(ways(asked)):
                cache = Path(folder) / ("warm" if way.startswith("warm") or number == 1 else str(number))
                waiting.append(Process(way, asked, cache, Path(folder) / f"{number}.txt"))
            for process in waiting:
                process.ready()
            for process in waiting:
                found = process.decode()
                rows.append({"process": process.way, **found})
                rows[-1]["equal"] = found["sha256"] == rows[0]["sha256"]
                line = f"{process.way}: {found['first_s']:.2f} s, then {found['second_s']:.3f} s"
                print(f"{line}{'' if rows[-1]['equal'] else '; NOT EQUAL'}", flush=True)
                asked.out.write_text(json.dumps(result, indent=1))
            result |= summary(rows)
            result["exit_code"] = int(not all(row["equal"] for row in rows))
        finally:
            for process in waiting:
                process.stop()
            asked.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["beyond_stock_s"]))
    for row in rows:
        if "sections" in row:
            print(row["process"])
            for name, one in row["sections"].items():
                gpu = row.get("gpu", {}).get(name)
                print(f"  {one['seconds']:7.3f} s  {one['entries']:4d}  {name}  {gpu or ''}")
    return result["exit_code"]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and all of each way, and what ours took beyond stock's median."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["process"], []).append(row["first_s"])
    stock = statistics.median(found["stock"])
    beyond = {way: statistics.median(s) - stock for way, s in found.items() if way != "stock"}
    return {"first_s": found, "stock_s": stock, "beyond_stock_s": beyond}


if __name__ == "__main__":
    sys.exit(main())
