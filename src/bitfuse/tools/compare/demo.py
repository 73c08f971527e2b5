"""The demo: a real LTX-2 transformer with seeded weights, denoised stock and accelerated, compared bit for bit.

The stock loop runs twice first: where it does not equal itself, nothing can be shown to equal it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from bitfuse.core.kernel import interpreter, interpreting
from bitfuse.tools import files, page
from bitfuse.tools.compare import runs
from bitfuse.tools.compare.runs import Result
from bitfuse.tools.machine import machine
from bitfuse.tools.seeded import REAL, CannotRun, Denoising, build, denoise, geometry_for, make_inputs
from bitfuse.tools.text import cell, say, say_all

NAMES = ("report.json", "report.html")


def run(
    out: Path,
    device: str | None = None,
    steps: int | None = None,
    layers: int | None = None,
    seed: int = 0,
    console: Console | None = None,
    host: str = "diffusers",
) -> Result:
    """Run the demo and write `out`/report.json and `out`/report.html; where it can't run, nothing is written.

    An earlier report stays until the new one takes its place; files of these names that bitfuse did not write are kept,
    and the demo does not run there.

    device    "cpu", "cuda" or "cuda:<n>"; by default a GPU where there is one. On the CPU the model is small and
              the kernels run in Triton's interpreter.
    steps     denoising steps, 2 or more
    layers    transformer layers, 1 to 48; by default 2 on the CPU, and on a GPU as many of the 48 as fit
    host      whose transformer it is: "diffusers", "ltx-core" or "sglang"
    """
    if steps is not None and steps < 2:
        raise ValueError(f"steps is {steps}; accepted: 2 or more")
    if layers is not None and not 1 <= layers <= REAL.layers:
        raise ValueError(f"layers is {layers}; accepted: 1 to {REAL.layers}")
    console = console or Console()
    try:
        runs.need_packages()
        where = runs.pick_device(device)
        try:
            files.check_folder(Path(out), NAMES)
        except ValueError as why:
            raise CannotRun(str(why)) from None
        with interpreter() if where.type == "cpu" else contextlib.nullcontext():
            return _run(Path(out), where, steps, layers, seed, host, console)
    except CannotRun as why:
        return Result(2, str(why))
    except torch.OutOfMemoryError:
        return Result(2, "The device ran out of memory. Fewer layers need less: try `bitfuse demo --layers 4`.")


def _run(
    out: Path,
    device: torch.device,
    steps: int | None,
    layers: int | None,
    seed: int,
    host: str,
    console: Console,
) -> Result:
    geometry, fit = geometry_for(device, layers, host=host)
    geometry = replace(geometry, steps=steps or geometry.steps)
    facts = machine(device)
    say(console, f"LTX-2 transformer of {runs.named(host)}: {geometry.sentence}")
    say(console, f"{facts['device']}, torch {facts['torch']}, bfloat16, seed {seed}. {fit}".rstrip())

    model = build(geometry, device, seed)
    inputs = make_inputs(model, geometry, device, seed)

    def loop(which: str, on_step: Callable[[], None]) -> Denoising:
        return denoise(model, geometry, inputs, on_step)

    stock, fused, report = runs.stock_twice_then_fused(model, loop, geometry.steps, console)
    rows = runs.compare_steps(stock, fused)
    times = runs.times(stock, fused)
    exit_code, verdict = runs.verdict(rows, report, times)
    document = {
        "interpreted": interpreting(),
        "machine": facts,
        "host": runs.named(host),
        "geometry": {**asdict(geometry), "video_tokens": geometry.video_tokens, "sentence": geometry.sentence},
        "memory": fit,
        "dtype": "bfloat16",
        "seed": seed,
        "steps": rows,
        "times": times,
        "sites": report.as_dict(),
    }
    result = Result(exit_code, verdict, document)

    console.print(page.table(rows))
    say_all(console, str(report))
    say(console, page.times_sentence(times))
    say(console, cell(verdict, "green" if exit_code == 0 else "red"))

    try:
        with files.new_result(out, (), last="report.json") as making:
            html = page.render(result.as_dict(), report.kinds(), geometry, stock, fused)
            (making / "report.html").write_text(html, encoding="utf-8")
            (making / "report.json").write_text(files.as_json(result.as_dict(), indent=2), encoding="utf-8")
    except OSError as error:
        raise CannotRun(f"--out {out} can't be written: {error.strerror or error}") from None
    say(console, f"Written: {out / 'report.json'}, {out / 'report.html'}")
    return result
