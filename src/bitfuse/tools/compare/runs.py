"""A stock run and an accelerated one, side by side, for `demo`, `compare`, `verify --host` and `bench` alike.

Does stock equal itself, does the accelerated run equal stock after every step, how long did each take: as sentences
for people and as plain values for the JSON.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import bitfuse
from bitfuse.core.bits import compare
from bitfuse.core.kernel import interpreting
from bitfuse.hosts.registry import HOSTS
from bitfuse.tools.compare.bits import sha256
from bitfuse.tools.seeded import CannotRun, Denoising

STREAMS = ("video", "audio")


@dataclass(frozen=True)
class Result:
    """exit_code    0: every bit equal and something fused; 1: a bit differs or nothing fused; 2: it could not run"""

    exit_code: int
    verdict: str
    document: dict[str, Any] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """What the JSON holds; only the exit code and the verdict where it could not run."""
        return {"exit_code": self.exit_code, "verdict": self.verdict, **self.document}


# -- what can run here --------------------------------------------------------------------------------------------


def named(host: str) -> str:
    """A host and its version, as in the reports: "diffusers 0.42.1". Only where it is installed."""
    return HOSTS[host].load().NAME


def pick_device(asked: str | None) -> torch.device:
    """The device of that name, by default CUDA's current one or else the CPU; CannotRun where it is not there."""
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


# -- three runs --------------------------------------------------------------------------------------------------


Run = TypeVar("Run")


class DoesNotRepeat(CannotRun):
    """The stock run does not equal itself."""


def stock_twice_then_fused(
    target: Any, run: Callable[[str], Run], check: Callable[[Run, Run], None], **options: Any
) -> tuple[Run, Run, bitfuse.Report]:
    """The second stock run, the accelerated one, and the report of its sites. What is accelerated is then as it was.

    target     what is accelerated
    run        one run, given which it is: "stock", "stock, again" or "bitfuse"
    check      raises DoesNotRepeat where its second argument, the second stock run, is not the first in every bit
    options    of `bitfuse.accelerate`
    """
    first = run("stock")
    stock = run("stock, again")
    check(first, stock)
    del first
    with bitfuse.accelerated(target, **options) as handle:
        fused = run("bitfuse")
    return stock, fused, handle.report()


@contextlib.contextmanager
def progress(console: Console, steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar over all steps: functions to say what begins now, and that a step is done."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=steps)
        yield lambda which: bar.update(task, description=which), lambda: bar.advance(task)


# -- what came out ------------------------------------------------------------------------------------------------


def check_finite(stock: Denoising) -> None:
    """Raise CannotRun where something is NaN or infinite: equal NaNs would show nothing."""
    for when, what, values in _outcomes(stock):
        if not values.isfinite().all():
            raise CannotRun(f"The stock {what} are not finite{when}: nothing to compare.")


def check_repeats(first: Denoising, again: Denoising) -> None:
    """Raise DoesNotRepeat, saying where, if the second stock run is not the first in every bit."""
    begin = "The stock run does not repeat itself here, so no run can be shown to equal it:"
    if len(first.ms) != len(again.ms):
        raise DoesNotRepeat(f"{begin} its first run took {len(first.ms)} steps, its second {len(again.ms)}.")
    for (when, what, expected), (_, _, found) in zip(_outcomes(first), _outcomes(again), strict=True):
        if mismatch := compare(expected, found):
            raise DoesNotRepeat(f"{begin}{when} the {what} of its second run {as_plural(mismatch.sentence)}.")


def _outcomes(run: Denoising) -> Iterator[tuple[str, str, Tensor]]:
    """What a run made, in the order of time: (" after step 1", "video latents", values), ..."""
    for step in range(len(run.ms)):
        for stream, latents in _streams(run, step).items():
            yield f" after step {step + 1}", f"{stream} latents", latents
    for name, values in run.decoded.items():
        yield "", name, values


def compare_steps(stock: Denoising, fused: Denoising) -> list[dict[str, Any]]:
    """A row for each step: both streams' bits, SHA-256 and the times."""
    rows = []
    for step, sigma in enumerate(stock.sigmas):
        found = _streams(fused, step)
        row: dict[str, Any] = {"step": step + 1, "sigma": sigma}
        row |= {stream: compared(latents, found[stream]) for stream, latents in _streams(stock, step).items()}
        row["equal"] = all(row[stream]["equal"] for stream in STREAMS)
        row["ms_stock"], row["ms_bitfuse"] = round(stock.ms[step], 3), round(fused.ms[step], 3)
        rows.append(row)
    return rows


def compared(expected: Tensor, found: Tensor) -> dict[str, Any]:
    """One tensor of both runs: whether equal in every bit, where not, and the SHA-256 of each one's bytes."""
    mismatch = compare(expected, found)
    return {
        "equal": mismatch is None,
        "mismatch": mismatch and mismatch.sentence,
        "elements": expected.numel(),
        "elements_differing": mismatch.count if mismatch else 0,
        "sha256_stock": sha256(expected),
        "sha256_bitfuse": sha256(found),
    }


def times(stock: Denoising, fused: Denoising) -> dict[str, Any]:
    """Milliseconds per step. The ratio is stock to bitfuse, and None in the interpreter, where it means nothing."""
    return {
        "ms_stock_first": round(stock.ms[0], 3),
        "ms_bitfuse_first": round(fused.ms[0], 3),
        "ms_stock_median_of_rest": round(stock.median_ms, 3),
        "ms_bitfuse_median_of_rest": round(fused.median_ms, 3),
        "ratio": None if interpreting() else round(stock.median_ms / fused.median_ms, 4),
    }


def verdict(
    rows: list[dict[str, Any]],
    report: bitfuse.Report,
    times: dict[str, Any],
    decoded: dict[str, dict[str, Any]] | None = None,
) -> tuple[int, str]:
    """The exit code and one sentence; of several differences the one that came first in time.

    decoded    what was made of the last latents, `compared`, by its name in the plural: "decoded frames"
    """
    decoded = decoded or {}
    found = [(f"after step {row['step']} the {s} latents", row[s]["mismatch"]) for row in rows for s in STREAMS]
    found += [(f"the {name}", of["mismatch"]) for name, of in decoded.items()]
    for what, mismatch in found:
        if mismatch:
            return 1, f"Not bit-identical to the unfused run: {what} {as_plural(mismatch)}."
    if not any(site.fused for site in report.sites):
        return 1, f"Nothing was fused, so nothing was shown: {reasons(report) or 'no site was seen'}."
    speed = f", at {times['ratio']:.3f} times its speed" if times["ratio"] else ""
    parts = [f"both latents after each of {len(rows)} steps", *(f"the {name}" for name in decoded)]
    what = " and ".join((", ".join(parts[:-1]), parts[-1])) if parts[1:] else parts[0]
    sites = f"{report.fused} of {report.seen} sites fused"
    if idle := sum(site.state == "not called yet" for site in report.sites):  # a video encoder's, in a run from text
        sites += f" and {idle} not called"
    return 0, f"Bit-identical to the unfused run: {what}, with {sites}{speed}."


def reasons(report: bitfuse.Report) -> str:
    """Why sites were not fused, each reason once."""
    return "; ".join(dict.fromkeys(reason for site in report.sites for reason in site.reasons))


def _streams(run: Denoising, step: int) -> dict[str, Tensor]:
    return {"video": run.video[step], "audio": run.audio[step]}


def as_plural(sentence: str) -> str:
    """A mismatch, said of several things: where their bits differ, or else in what form they do."""
    if sentence.startswith("differs at"):
        return sentence.replace("differs at", "differ first at", 1)
    return f"differ: {sentence}"
