"""What `bitfuse compare` and `bitfuse demo` run three times: a user's own pipeline, or a transformer alone.

The pipeline is diffusers' own, called as a user calls it: nothing in it is replaced but what `bitfuse.accelerate`
replaces.
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitfuse.core.lines import error_line, one_line
from bitfuse.tools import files
from bitfuse.tools.compare.request import ARGUMENTS, Request
from bitfuse.tools.names import is_hub_id
from bitfuse.tools.seeded import CannotRun, Denoising, Geometry, build, denoise, geometry_for, make_inputs, now

_log = logging.getLogger("bitfuse")

PROMPT = "A red fox trots through fresh snow at dawn, its breath steaming; the snow creaks and a raven calls far off."
_DEFAULT_FRAME_RATE = 24.0


@dataclass(frozen=True)
class Subject:
    """What is run three times.

    target         what is accelerated: the pipeline or the transformer
    model          the transformer
    denoise        one run of so many `steps`, given what to call after each
    facts          for compare's document: what it is and how it is called
    frame_rate     of the film, per second
    sample_rate    of the waveform, per second; None without one
    geometry       of a transformer alone, whose latents are shown in place of a film
    fit            how many of its layers the device's memory takes, as a sentence
    """

    target: Any
    model: torch.nn.Module
    steps: int
    denoise: Callable[[Callable[[], None]], Denoising]
    facts: dict[str, Any]
    frame_rate: float = _DEFAULT_FRAME_RATE
    sample_rate: int | None = None
    geometry: Geometry | None = None
    fit: str = ""


def of(request: Request, call: dict[str, Any], device: torch.device) -> Subject:
    """What is asked for, on its device; `call` is what `request.check` returned. CannotRun where it can't be had."""
    return _transformer(request, call, device) if request.random_weights else _pipeline(request, call, device)


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
        fit=fit,
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
    elif not is_hub_id(name):
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
