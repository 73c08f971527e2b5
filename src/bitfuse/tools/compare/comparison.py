"""`bitfuse compare`: a user's own pipeline, stock and accelerated, compared from the first step to the last frame.

The pipeline is diffusers' own, called as a user calls it: nothing in it is replaced but what `bitfuse.accelerate`
replaces. The stock run comes twice first: where it does not equal itself, nothing can be shown to equal it.
(The module is not called compare: `bitfuse.compare` is the comparison of two tensors.)
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import bitfuse
from bitfuse.core.kernel import interpreter, interpreting
from bitfuse.core.lines import error_line, one_line
from bitfuse.tools import files, page
from bitfuse.tools.compare import films as comparison_page
from bitfuse.tools.compare import runs
from bitfuse.tools.compare.request import ARGUMENTS, Request, check
from bitfuse.tools.compare.runs import Result
from bitfuse.tools.machine import machine
from bitfuse.tools.seeded import CannotRun, Denoising, Geometry, build, denoise, geometry_for, make_inputs, now
from bitfuse.tools.text import cell, say, say_all

_log = logging.getLogger("bitfuse")

PROMPT = "A red fox trots through fresh snow at dawn, its breath steaming; the snow creaks and a raven calls far off."
_DEFAULT_FRAME_RATE = 24.0
NAMES = ("compare.json", "compare.html", *comparison_page.FILES)
"""Every file that `run` may write."""


@dataclass(frozen=True)
class Subject:
    """What is run three times.

    target         what is accelerated: the pipeline or the transformer
    model          the transformer
    denoise        one run of so many `steps`, given what to call after each
    facts          for the document: what it is and how it is called
    frame_rate     of the film, per second
    sample_rate    of the waveform, per second; None without one
    geometry       of a transformer alone, whose latents are shown in place of a film
    """

    target: Any
    model: torch.nn.Module
    steps: int
    denoise: Callable[[Callable[[], None]], Denoising]
    facts: dict[str, Any]
    frame_rate: float = _DEFAULT_FRAME_RATE
    sample_rate: int | None = None
    geometry: Geometry | None = None


class _Failed(Exception):
    """The accelerated run raised where the stock run did not."""


def run(request: Request, out: Path, console: Console | None = None) -> Result:
    """Run it stock twice and then accelerated, and write `out`/compare.json, `out`/compare.html and the films.

    Exit code 0: all latents, frames and samples equal; 1: a bit differs, nothing was fused, or the accelerated run
    failed (of which compare.json alone tells); 2: it could not run, or stock does not equal itself (nothing is written
    or printed then: the verdict says why). The files of an earlier run stay until those of this one take their places,
    and files that bitfuse did not write stay for good.
    """
    console = console or Console()
    try:
        call = check(request)
        runs.need_packages(*(("diffusers", "transformers") if request.model else ()))
        device = runs.pick_device(request.device)
        try:
            files.check_folder(out, NAMES[:2])
        except ValueError as why:
            raise CannotRun(str(why)) from None
        gpus = [device] if device.type == "cuda" else []  # the process's random state is left as it was
        with interpreter() if not gpus else contextlib.nullcontext(), torch.random.fork_rng(devices=gpus):
            try:
                return _run(request, call, device, out, console)
            except _Failed as why:
                return _failed(why, out, console)
    except CannotRun as why:
        return Result(2, str(why))
    except torch.OutOfMemoryError:
        fewer = "fewer --layers" if request.random_weights else "--offload"
        return Result(2, f"The device ran out of memory. Try {fewer}, a smaller --size, or fewer --frames.")


def _failed(why: _Failed, out: Path, console: Console) -> Result:
    result = Result(1, f"The accelerated run failed where the stock run did not: {why}")
    say(console, cell(result.verdict, "red"))
    with _new_result(out) as making:
        (making / "compare.json").write_text(files.as_json(result.as_dict(), indent=2), encoding="utf-8")
    say(console, f"Written: {out / 'compare.json'}")
    return result


def _run(request: Request, call: dict[str, Any], device: torch.device, out: Path, console: Console) -> Result:
    facts = machine(device)
    subject = _transformer(request, call, device) if request.random_weights else _pipeline(request, call, device)
    say(console, subject.facts["sentence"])
    host = runs.named(request.host)
    say(console, f"{facts['device']}, torch {facts['torch']}, {host}, bfloat16, seed {request.seed}")

    measured: dict[str, dict[str, Any]] = {}

    def loop(which: str, on_step: Callable[[], None]) -> Denoising:
        torch.manual_seed(request.seed)  # draws outside of the pipeline's own generator repeat too
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with _failures(which):
            start = now(device)
            done = subject.denoise(on_step)
            measured[which] = {"seconds": round(now(device) - start, 3), "peak_bytes": _peak(device)}
        return done

    options = {"cuda_graph": request.cuda_graph, "keep_text": request.keep_text}
    try:
        stock, fused, report = runs.stock_twice_then_fused(subject.target, loop, subject.steps, console, **options)
    except runs.DoesNotRepeat as why:
        if not request.trace:
            raise
        raise CannotRun(
            f"{why}\n{_traced(subject, request, contextlib.nullcontext) or 'Traced, it did repeat.'}"
        ) from None
    rows = runs.compare_steps(stock, fused)
    decoded = {name: runs.compared(expected, fused.decoded[name]) for name, expected in stock.decoded.items()}
    times = runs.times(stock, fused)
    exit_code, verdict = runs.verdict(rows, report, times, decoded)

    divergence = None
    if request.trace and not all(row["equal"] for row in (*rows, *decoded.values())):
        kept: dict[str, Any] = {"keep_text": request.keep_text}
        divergence = _traced(subject, request, lambda: bitfuse.accelerated(subject.target, **kept))

    console.print(page.table(rows))
    for name, row in decoded.items():
        say(console, f"{name}: {'equal' if row['equal'] else row['mismatch']}, SHA-256 {row['sha256_bitfuse']}")
    say_all(console, str(report))
    say(console, page.times_sentence(times))
    if divergence:
        say_all(console, str(divergence))
    elif request.trace and exit_code:
        equal = "Traced, without a CUDA graph, the transformer's runs are equal"
        say(console, f"{equal}: what differs is not in its eager forward.")
    say(console, cell(verdict, "green" if exit_code == 0 else "red"))

    with _new_result(out) as making:
        films = comparison_page.write_films(making, stock, fused, subject.frame_rate, subject.sample_rate, _taken(out))
        document = {
            "interpreted": interpreting(),
            "machine": facts,
            "host": host,
            **subject.facts,
            "dtype": "bfloat16",
            "seed": request.seed,
            "options": {**options, "offload": request.offload},
            "steps": rows,
            "decoded": decoded,
            "times": times,
            "runs": {"stock": measured["stock, again"], "bitfuse": measured["bitfuse"]},
            "film": films.sentence,
            "files": films.files,
            "sites": report.as_dict(),
            "divergence": divergence and {**divergence.as_dict(), "text": str(divergence)},
        }
        result = Result(exit_code, verdict, document)
        html = comparison_page.render(result.as_dict(), report.kinds(), films, subject.geometry, stock, fused)
        (making / "compare.html").write_text(html, encoding="utf-8")
        (making / "compare.json").write_text(files.as_json(result.as_dict(), indent=2), encoding="utf-8")
    say(console, f"Written: {', '.join(str(out / name) for name in (*NAMES[:2], *films.files))}")
    return result


def _traced(subject: Subject, request: Request, around: Callable[[], Any]) -> bitfuse.Divergence | None:
    """The first place where the bits of a stock run and of one in `around` part. Both run once more, or twice."""

    def run() -> dict[str, Any]:
        torch.manual_seed(request.seed)
        done = subject.denoise(lambda: None)
        return {"video": done.video, "audio": done.audio, **done.decoded}

    return bitfuse.trace(run, run, (), model=subject.model, around_b=around)


@contextlib.contextmanager
def _new_result(out: Path) -> Iterator[Path]:
    """A folder to write the result to, which takes the place of an earlier one in `out` at the end."""
    try:
        with files.new_result(out, _earlier(out), last="compare.json") as making:
            yield making
    except OSError as error:
        raise CannotRun(f"--out {out} can't be written: {error.strerror or error}") from None


def _earlier(out: Path) -> set[str]:
    """The files in `out` that an earlier run wrote: of films those of which its compare.json has the SHA-256."""
    found = {name for name in NAMES[:2] if files.is_result(out / name)}
    if "compare.json" in found:
        digests = files.read_json(out / "compare.json", "", "").get("files")
        digests = digests if isinstance(digests, dict) else {}
        found |= {n for n in comparison_page.FILES if n in digests and _sha256(out / n) == digests[n]}
    return found


def _taken(out: Path) -> set[str]:
    """Names of films and sounds in `out` that are somebody else's, and so are not to be written."""
    return {name for name in comparison_page.FILES if os.path.lexists(out / name)} - _earlier(out)


def _sha256(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None


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


# -- a transformer alone ------------------------------------------------------------------------------------------


def _transformer(request: Request, call: dict[str, Any], device: torch.device) -> Subject:
    version = (request.random_weights or "").removeprefix("ltx-")
    geometry, fit = geometry_for(device, request.layers, version, request.host)
    sizes = {"steps": call.get("num_inference_steps", geometry.steps)}
    if "width" in call:
        sizes |= {"width": call["width"] // 32, "height": call["height"] // 32}
    if frames := call.get("num_frames"):  # the pipeline's own sums; the audio VAE makes 25 latent frames a second
        sizes |= {"frames": (frames - 1) // 8 + 1, "audio_frames": round(25 * frames / _DEFAULT_FRAME_RATE)}
    geometry = replace(geometry, **sizes)
    model = build(geometry, device, request.seed)
    inputs = make_inputs(model, geometry, device, request.seed)
    return Subject(
        model,
        model,
        geometry.steps,
        lambda on_step: denoise(model, geometry, inputs, on_step),
        {
            "sentence": f"A transformer of LTX-{version} with random weights: {geometry.sentence}. {fit}".rstrip(),
            "model": f"LTX-{version} of {request.host}, random weights",
            "call": {},
            "geometry": asdict(geometry),
        },
        geometry=geometry,
    )


# -- a pipeline -----------------------------------------------------------------------------------------------------


def _pipeline(request: Request, given: dict[str, Any], device: torch.device) -> Subject:
    name = str(request.model)
    if request.offload and device.type != "cuda":
        raise CannotRun("--offload moves parts of the pipeline off a GPU; it needs a CUDA device.")
    pipe = _load(name)
    accepted = inspect.signature(pipe.__call__).parameters
    if unknown := [argument for argument in given if argument not in accepted]:
        known = ", ".join(argument for argument in ARGUMENTS if argument in accepted)
        raise CannotRun(f"The pipeline of this diffusers takes no {unknown[0]}; accepted: {known}")
    given = {"prompt": PROMPT, **given}
    if "sigmas" in given:
        given["num_inference_steps"] = len(given["sigmas"])
    defaults = {argument: accepted[argument].default for argument in ARGUMENTS if argument in accepted}
    call = {argument: value for argument, value in {**defaults, **given}.items() if value is not None}

    if request.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return Subject(
        pipe,
        pipe.transformer,
        call["num_inference_steps"],
        lambda on_step: _denoise(pipe, call, request.seed, device, on_step),
        {
            "sentence": f"{type(pipe).__name__} with {len(pipe.transformer.transformer_blocks)} layers: {_sizes(call)}",
            "model": os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name,
            "call": call,
        },
        frame_rate=float(call.get("frame_rate", _DEFAULT_FRAME_RATE)),
        sample_rate=int(getattr(pipe.vocoder.config, "output_sampling_rate", 24000)),
    )


def _sizes(call: dict[str, Any]) -> str:
    frames = call.get("num_frames", "as many as the pipeline chooses")
    return (
        f"{call['width']}x{call['height']}, frames: {frames}, {call['num_inference_steps']} steps, {call['prompt']!r}"
    )


def _load(name: str) -> Any:
    """The pipeline of a folder or a hub id, in bf16, on the CPU; of weights only safetensors, which run no code."""
    if os.path.isdir(name):
        _check_index(name)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise CannotRun(f"{name!r} is neither a folder nor a hub id; accepted: a folder, or an id as in owner/name")
    try:
        from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel

        with warnings.catch_warnings():  # 0.42 says that it is `dtype` now; older ones know only this name
            warnings.simplefilter("ignore", FutureWarning)
            pipe: Any = LTX2Pipeline.from_pretrained(name, torch_dtype=torch.bfloat16, use_safetensors=True)
    except Exception as error:  # whatever a damaged or foreign folder makes the host raise
        _log.debug("%s could not be loaded", name, exc_info=True)
        raise CannotRun(f"{name} can't be loaded as an LTX-2 pipeline: {error_line(error, 400)}") from error
    if not isinstance(pipe.transformer, LTX2VideoTransformer3DModel):
        raise CannotRun(f"The transformer of {name} is a {type(pipe.transformer).__name__}, not diffusers' LTX-2 one.")
    return pipe


def _check_index(folder: str) -> None:
    file, accepted = Path(folder, "model_index.json"), "what a diffusers LTX-2 pipeline's save_pretrained writes"
    if not file.is_file():
        raise CannotRun(f"{folder} holds no model_index.json; accepted: {accepted}, or a hub id")
    try:
        index = files.read_json(file, f"model_index.json in {folder}", accepted)
    except ValueError as why:
        raise CannotRun(str(why)) from None
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not str(kind).startswith("LTX2"):
        given = one_line(kind, 80)
        raise CannotRun(
            f"{folder} is a folder of {given}; accepted: one of diffusers' LTX-2 pipelines, as LTX2Pipeline"
        )


def _denoise(
    pipe: Any, call: dict[str, Any], seed: int, device: torch.device, on_step: Callable[[], None]
) -> Denoising:
    """One call of the pipeline. Steps are timed from the end of the one before, without the copies made here."""
    done, mark = Denoising(), 0.0

    def starts(*args: Any, **kwargs: Any) -> Any:
        nonlocal mark
        mark = now(device)
        return type(pipe).progress_bar(pipe, *args, **kwargs)

    def after_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal mark
        done.ms.append(1e3 * (now(device) - mark))
        done.sigmas.append(float(pipe.scheduler.sigmas[step]))
        done.video.append(tensors["latents"].to("cpu", copy=True))
        done.audio.append(tensors["audio_latents"].to("cpu", copy=True))
        on_step()
        mark = now(device)
        return {}

    # Both through the pipeline's own seams, and off the transformer, where a hook would keep bitfuse from fusing:
    # the loop begins where it opens its progress bar, and a callback may have any of its variables that is listed.
    pipe.progress_bar = starts
    pipe._callback_tensor_inputs = [*type(pipe)._callback_tensor_inputs, "audio_latents"]
    try:
        frames, waveform = pipe(
            **call,
            generator=torch.Generator("cpu").manual_seed(seed),  # the same noise on every device
            output_type="pt",
            return_dict=False,
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents", "audio_latents"],
        )
    finally:
        del pipe.progress_bar, pipe._callback_tensor_inputs
    done.decoded = {"decoded frames": frames.cpu(), "audio samples": waveform.cpu()}
    return done
