"""`bitfuse compare`: a user's own pipeline, stock and accelerated, compared from the first step to the last frame.

The stock run comes twice first: where it does not equal itself, nothing can be shown to equal it. `bitfuse demo` is the
same with random weights, and with a report of another `Form`.
(The module is not called compare: `bitfuse.compare` is the comparison of two tensors.)
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import bitfuse
from bitfuse.core.kernel import interpreter, interpreting
from bitfuse.core.lines import error_line
from bitfuse.tools import files, packages, page
from bitfuse.tools.compare import films, runs
from bitfuse.tools.compare import subject as subjects
from bitfuse.tools.compare.request import Request, check
from bitfuse.tools.compare.runs import Result
from bitfuse.tools.compare.subject import Subject
from bitfuse.tools.machine import machine
from bitfuse.tools.names import COMPARED as NAMES
from bitfuse.tools.names import FILMS
from bitfuse.tools.seeded import CannotRun, Denoising, now
from bitfuse.tools.text import cell, say, say_all

_log = logging.getLogger("bitfuse")


@dataclass(frozen=True)
class Form:
    """How a comparison is reported.

    command      whose report it is; its page's template has this name
    names        of the files with the document and the page
    opening      the lines printed before the runs, given the request, what is run and the facts of `machine`
    facts        of what is run, for the document
    left_out     what stands in compare's document and not in this one
    no_memory    what is said where the device has too little
    """

    command: str
    names: tuple[str, str]
    opening: Callable[[Request, Subject, dict[str, Any]], tuple[str, ...]]
    facts: Callable[[Subject], dict[str, Any]]
    no_memory: Callable[[Request], str]
    left_out: frozenset[str] = frozenset()


def _opening(request: Request, subject: Subject, facts: dict[str, Any]) -> tuple[str, ...]:
    on = f"{facts['device']}, torch {facts['torch']}, {runs.named(request.host)}, bfloat16, seed {request.seed}"
    return subject.facts["sentence"], on


def _no_memory(request: Request) -> str:
    fewer = "fewer --layers" if request.random_weights else "--offload"
    return f"Try {fewer}, a smaller --size, or fewer --frames."


_COMPARE = Form("compare", (NAMES[0], NAMES[1]), _opening, lambda subject: subject.facts, _no_memory)


def run(request: Request, out: Path, console: Console | None = None) -> Result:
    """Run it stock twice and then accelerated, and write `out`/compare.json, `out`/compare.html and the films.

    Exit code 0: all latents, frames and samples equal; 1: a bit differs, nothing was fused, or the accelerated run
    failed (of which compare.json alone tells); 2: it could not run, or stock does not equal itself (nothing is written
    or printed then: the verdict says why). The files of an earlier run stay until those of this one take their places,
    and files that bitfuse did not write stay for good.
    """
    try:
        call = check(request)
    except CannotRun as why:
        return Result(2, str(why))
    return report(request, call, out, console or Console(), _COMPARE)


def report(request: Request, call: dict[str, Any], out: Path, console: Console, form: Form) -> Result:
    """What `run` does, for a call that is checked, reported in this form."""
    try:
        for package in ("jinja2", "matplotlib", "numpy", *(("diffusers", "transformers") if request.model else ())):
            packages.need(package)
        device = runs.pick_device(request.device)
        try:
            files.check_folder(out, form.names)
        except ValueError as why:
            raise CannotRun(str(why)) from None
        gpus = [device] if device.type == "cuda" else []  # the process's random state is left as it was
        with interpreter() if not gpus else contextlib.nullcontext(), torch.random.fork_rng(devices=gpus):
            try:
                return _report(request, call, device, out, console, form)
            except _Failed as why:
                return _failed(why, out, console, form)
    except CannotRun as why:
        return Result(2, str(why))
    except torch.OutOfMemoryError:
        return Result(2, f"The device ran out of memory. {form.no_memory(request)}")


class _Failed(Exception):
    """The accelerated run raised where the stock run did not."""


def _failed(why: _Failed, out: Path, console: Console, form: Form) -> Result:
    result = Result(1, f"The accelerated run failed where the stock run did not: {why}")
    say(console, cell(result.verdict, "red"))
    with _new_result(out, form) as making:
        (making / form.names[0]).write_text(files.as_json(result.as_dict(), indent=2), encoding="utf-8")
    say(console, f"Written: {out / form.names[0]}")
    return result


def _report(
    request: Request, call: dict[str, Any], device: torch.device, out: Path, console: Console, form: Form
) -> Result:
    facts = machine(device)
    subject = subjects.of(request, call, device)
    for line in form.opening(request, subject, facts):
        say(console, line)
    options = {"cuda_graph": request.cuda_graph, "keep_text": request.keep_text}
    measured: dict[str, dict[str, Any]] = {}
    try:
        with runs.progress(console, 3 * subject.steps) as (begin, advance):

            def loop(which: str) -> Denoising:
                begin(which)
                torch.manual_seed(request.seed)  # draws outside of the pipeline's own generator repeat too
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                with _failures(which):
                    start = now(device)
                    done = subject.denoise(advance)
                    measured[which] = {"seconds": round(now(device) - start, 3), "peak_bytes": _peak(device)}
                if which == "stock":
                    runs.check_finite(done)  # before minutes are spent on a second run
                return done

            stock, fused, sites = runs.stock_twice_then_fused(subject.target, loop, runs.check_repeats, **options)
    except runs.DoesNotRepeat as why:
        if not request.trace:
            raise
        where = _traced(subject, request, contextlib.nullcontext)
        raise CannotRun(f"{why}\n{where or 'Traced, it did repeat.'}") from None
    rows = runs.compare_steps(stock, fused)
    decoded = {name: runs.compared(expected, fused.decoded[name]) for name, expected in stock.decoded.items()}
    times = runs.times(stock, fused)
    exit_code, verdict = runs.verdict(rows, sites, times, decoded)

    divergence = None
    if request.trace and not all(row["equal"] for row in (*rows, *decoded.values())):
        kept: dict[str, Any] = {"keep_text": request.keep_text}
        divergence = _traced(subject, request, lambda: bitfuse.accelerated(subject.target, **kept))

    console.print(page.table(rows))
    for name, row in decoded.items():
        say(console, f"{name}: {'equal' if row['equal'] else row['mismatch']}, SHA-256 {row['sha256_bitfuse']}")
    say_all(console, str(sites))
    say(console, page.times_sentence(times))
    if divergence:
        say_all(console, str(divergence))
    elif request.trace and exit_code:
        equal = "Traced, without a CUDA graph, the transformer's runs are equal"
        say(console, f"{equal}: what differs is not in its eager forward.")
    say(console, cell(verdict, "green" if exit_code == 0 else "red"))

    with _new_result(out, form) as making:
        film = films.write_films(making, stock, fused, subject.frame_rate, subject.sample_rate, _taken(out))
        document = {
            "interpreted": interpreting(),
            "machine": facts,
            "host": runs.named(request.host),
            **form.facts(subject),
            "dtype": "bfloat16",
            "seed": request.seed,
            "options": {**options, "offload": request.offload},
            "steps": rows,
            "decoded": decoded,
            "times": times,
            "runs": {"stock": measured["stock, again"], "bitfuse": measured["bitfuse"]},
            "film": film.sentence,
            "files": film.files,
            "sites": sites.as_dict(),
            "divergence": divergence and {**divergence.as_dict(), "text": str(divergence)},
        }
        result = Result(exit_code, verdict, {name: of for name, of in document.items() if name not in form.left_out})
        html = page.fill(
            f"{form.command}.html.j2",
            command=form.command,
            document=result.as_dict(),
            kinds=sites.kinds(),
            films=film,
            pictures=subject.geometry and page.latent_pictures(subject.geometry, stock, fused),
            charts=page.charts(rows),
        )
        (making / form.names[1]).write_text(html, encoding="utf-8")
        (making / form.names[0]).write_text(files.as_json(result.as_dict(), indent=2), encoding="utf-8")
    say(console, f"Written: {', '.join(str(out / name) for name in (*form.names, *film.files))}")
    return result


def _traced(subject: Subject, request: Request, around: Callable[[], Any]) -> bitfuse.Divergence | None:
    """The first place where the bits of a stock run and of one in `around` part. Both run once more, or twice."""

    def run() -> dict[str, Any]:
        torch.manual_seed(request.seed)
        done = subject.denoise(lambda: None)
        return {"video": done.video, "audio": done.audio, **done.decoded}

    return bitfuse.trace(run, run, (), model=subject.model, around_b=around)


@contextlib.contextmanager
def _failures(which: str) -> Iterator[None]:
    """Whatever a host raises for arguments or weights that it can't take, as one line; memory is another matter."""
    try:
        yield
    except (CannotRun, torch.OutOfMemoryError):
        raise
    except Exception as error:
        _log.debug("the run '%s' failed", which, exc_info=True)
        if which == "bitfuse":
            raise _Failed(error_line(error, 400)) from error
        raise CannotRun(f"The stock model does not run with these arguments: {error_line(error, 400)}") from error


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# -- the folder with the result ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _new_result(out: Path, form: Form) -> Iterator[Path]:
    """A folder to write the result to, which takes the place of an earlier one in `out` at the end."""
    try:
        with files.new_result(out, _earlier(out, form), last=form.names[0]) as making:
            yield making
    except OSError as error:
        raise CannotRun(f"--out {out} can't be written: {error.strerror or error}") from None


def _earlier(out: Path, form: Form = _COMPARE) -> set[str]:
    """The files in `out` that an earlier run wrote: of films those of which its document has the SHA-256."""
    found = {name for name in form.names if files.is_result(out / name)}
    if form.names[0] in found:
        digests = files.read_json(out / form.names[0], "", "").get("files")
        digests = digests if isinstance(digests, dict) else {}
        found |= {n for n in FILMS if str(digests.get(n)) == files.sha256(out / n)}
    return found


def _taken(out: Path) -> set[str]:
    """Names of films and sounds in `out` that are somebody else's, and so are not to be written."""
    return {name for name in FILMS if os.path.lexists(out / name)} - _earlier(out)
