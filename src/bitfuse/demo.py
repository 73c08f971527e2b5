"""The demo: a real LTX-2 transformer with seeded weights, denoised stock and accelerated, compared bit for bit.

The stock loop runs twice first: where it does not equal itself, nothing can be shown to equal it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import bitfuse
from bitfuse import page
from bitfuse.kernel import interpreter, interpreting
from bitfuse.machine import machine
from bitfuse.seeded import REAL, CannotRun, Denoising, build, denoise, geometry_for, make_inputs

_INSTALL = "pip install 'bitfuse[demo]'"


@dataclass(frozen=True)
class DemoResult:
    """exit_code    0: every bit equal and something fused; 1: a bit differs or nothing fused; 2: it could not run"""

    exit_code: int
    verdict: str
    document: dict[str, Any] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """What report.json holds; only the exit code and the verdict where the demo could not run."""
        return {"exit_code": self.exit_code, "verdict": self.verdict, **self.document}


def run(
    out: Path,
    device: str | None = None,
    steps: int | None = None,
    layers: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> DemoResult:
    """Run the demo and write `out`/report.json and `out`/report.html.

    device    "cpu", "cuda" or "cuda:<n>"; by default a GPU where there is one. On the CPU the model is small and
              the kernels run in Triton's interpreter.
    steps     denoising steps, 2 or more
    layers    transformer layers, 1 to 48; by default 2 on the CPU, and on a GPU as many of the 48 as fit
    """
    if steps is not None and steps < 2:
        raise ValueError(f"steps is {steps}; accepted: 2 or more")
    if layers is not None and not 1 <= layers <= REAL.layers:
        raise ValueError(f"layers is {layers}; accepted: 1 to {REAL.layers}")
    console = console or Console()
    try:
        _need_packages()
        where = _device(device)
        with interpreter() if where.type == "cpu" else contextlib.nullcontext():
            return _run(Path(out), where, steps, layers, seed, console)
    except CannotRun as why:
        sentence = str(why)
    except torch.OutOfMemoryError:
        sentence = "The device ran out of memory. Fewer layers need less: try `bitfuse demo --layers 4`."
    console.print(sentence, style="red", markup=False, highlight=False, soft_wrap=True)
    return DemoResult(2, sentence)


def _run(
    out: Path, device: torch.device, steps: int | None, layers: int | None, seed: int, console: Console
) -> DemoResult:
    geometry, fit = geometry_for(device, layers)
    geometry = replace(geometry, steps=steps or geometry.steps)
    facts = machine(device)
    say = _printer(console)
    say(f"LTX-2 transformer of diffusers {facts['diffusers']}: {geometry.sentence}")
    say(f"{facts['device']}, torch {facts['torch']}, bfloat16, seed {seed}. {fit}".rstrip())

    model = build(geometry, device, seed)
    inputs = make_inputs(model, geometry, device, seed)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=3 * geometry.steps)

        def loop(description: str) -> Denoising:
            progress.update(task, description=description)
            return denoise(model, geometry, inputs, lambda: progress.advance(task))

        first = loop("stock")
        _check_finite(first)
        stock = loop("stock, again")
        _check_repeats(first, stock)
        with bitfuse.accelerated(model) as handle:  # the whole of every block: attentions, norms, residual sums
            fused = loop("bitfuse")
    report = handle.report()

    rows = _compare(stock, fused)
    times = _times(stock, fused)
    exit_code, verdict = _verdict(rows, report, times)
    document = {
        "interpreted": interpreting(),
        "machine": facts,
        "geometry": {**asdict(geometry), "video_tokens": geometry.video_tokens, "sentence": geometry.sentence},
        "memory": fit,
        "dtype": "bfloat16",
        "seed": seed,
        "steps": rows,
        "times": times,
        "sites": report.as_dict(),
    }
    result = DemoResult(exit_code, verdict, document)

    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n")
    html = page.render(result.as_dict(), report.kinds(), geometry, stock, fused)
    (out / "report.html").write_text(html, encoding="utf-8")

    console.print(page.table(rows))
    say(str(report))
    say(page.times_sentence(times))
    console.print(verdict, style="green" if exit_code == 0 else "red", markup=False, highlight=False, soft_wrap=True)
    say(f"Written: {out / 'report.json'}, {out / 'report.html'}")
    return result


# -- what can run here --------------------------------------------------------------------------------------------


def _need_packages() -> None:
    for package in ("diffusers", "jinja2", "matplotlib", "numpy"):
        if importlib.util.find_spec(package) is None:
            raise CannotRun(f"The demo needs {package}, which is not installed: {_INSTALL}")
    try:
        from diffusers import LTX2VideoTransformer3DModel  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: diffusers' lazy imports wrap what went wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CannotRun(f"The demo needs diffusers 0.37 or newer, with LTX-2 ({reason}): {_INSTALL}") from None


def _device(asked: str | None) -> torch.device:
    if asked is None:
        asked = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise ValueError(f"device is {asked!r}; accepted: cpu, cuda, or cuda:<n>")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CannotRun(f"The device {asked} was asked for, and torch {torch.__version__} sees no CUDA device here.")
    number = int(index) if index else torch.cuda.current_device()
    if number >= torch.cuda.device_count():
        raise CannotRun(f"The device {asked} was asked for, and there are {torch.cuda.device_count()} CUDA devices.")
    return torch.device("cuda", number)


# -- what came out ------------------------------------------------------------------------------------------------


def _streams(run: Denoising, step: int) -> dict[str, Tensor]:
    return {"video": run.video[step], "audio": run.audio[step]}


def _check_finite(stock: Denoising) -> None:
    for step in range(len(stock.ms)):
        for stream, latents in _streams(stock, step).items():
            if not latents.isfinite().all():
                raise CannotRun(f"The stock {stream} latents are not finite after step {step + 1}: nothing to compare.")


def _check_repeats(first: Denoising, again: Denoising) -> None:
    for step in range(len(first.ms)):
        for stream, latents in _streams(first, step).items():
            if mismatch := bitfuse.compare(latents, _streams(again, step)[stream]):
                raise CannotRun(
                    "The stock run does not repeat itself here, so no run can be shown to equal it: after step "
                    f"{step + 1} the {stream} latents of its second run {_as_plural(mismatch.sentence)}."
                )


def _compare(stock: Denoising, fused: Denoising) -> list[dict[str, Any]]:
    rows = []
    for step, sigma in enumerate(stock.sigmas):
        row: dict[str, Any] = {"step": step + 1, "sigma": sigma}
        for stream, expected in _streams(stock, step).items():
            found = _streams(fused, step)[stream]
            mismatch = bitfuse.compare(expected, found)
            row[stream] = {
                "equal": mismatch is None,
                "mismatch": mismatch and mismatch.sentence,
                "elements": expected.numel(),
                "elements_differing": mismatch.count if mismatch else 0,
                "sha256_stock": _sha256(expected),
                "sha256_bitfuse": _sha256(found),
            }
        row["equal"] = row["video"]["equal"] and row["audio"]["equal"]
        row["ms_stock"], row["ms_bitfuse"] = round(stock.ms[step], 3), round(fused.ms[step], 3)
        rows.append(row)
    return rows


def _sha256(latents: Tensor) -> str:
    return hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()


def _times(stock: Denoising, fused: Denoising) -> dict[str, Any]:
    """Milliseconds per step. The ratio is stock to bitfuse, and None in the interpreter, where it means nothing."""
    return {
        "ms_stock_first": round(stock.ms[0], 3),
        "ms_bitfuse_first": round(fused.ms[0], 3),
        "ms_stock_median_of_rest": round(stock.median_ms, 3),
        "ms_bitfuse_median_of_rest": round(fused.median_ms, 3),
        "ratio": None if interpreting() else round(stock.median_ms / fused.median_ms, 4),
    }


def _verdict(rows: list[dict[str, Any]], report: bitfuse.Report, times: dict[str, Any]) -> tuple[int, str]:
    for row in rows:
        for stream in ("video", "audio"):
            if sentence := row[stream]["mismatch"]:
                where = f"after step {row['step']} the {stream} latents {_as_plural(sentence)}"
                return 1, f"Not bit-identical to the unfused run: {where}."
    if not any(site.fused for site in report.sites):
        reasons = "; ".join(dict.fromkeys(reason for site in report.sites for reason in site.reasons))
        return 1, f"Nothing was fused, so nothing was shown: {reasons or 'no site was seen'}."
    speed = f", at {times['ratio']:.3f} times its speed" if times["ratio"] else ""
    return 0, (
        f"Bit-identical to the unfused run: both latents after each of {len(rows)} steps, "
        f"with {report.fused} of {report.seen} sites fused{speed}."
    )


def _as_plural(sentence: str) -> str:
    return sentence.replace("differs at", "differ first at", 1)


def _printer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)
