"""What `bitfuse compare` can be asked for, and the one line that says what is wrong with a request.

All of it is checked before a model is loaded, which takes minutes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfuse.tools import files, names
from bitfuse.tools.packages import CannotRun

Accepts = tuple[Callable[[Any], bool], str]


def _whole(low: int, high: int, step: int = 1) -> Accepts:
    rest = low % step
    form = {1: "a whole number", 8: "8n + 1"}.get(step, f"a multiple of {step}")
    return lambda v: type(v) is int and low <= v <= high and v % step == rest, f"{form}, {low} to {high}"


def _number(low: float, high: float) -> Accepts:
    def accepts(v: Any) -> bool:
        return type(v) in (int, float) and low <= v <= high  # no NaN is; and an int may be larger than any float

    return accepts, f"a number, {low:g} to {high:g}"


def _several(each: Accepts, at_least: int, what: str) -> Accepts:
    return lambda v: isinstance(v, list) and len(v) >= at_least and all(map(each[0], v)), what


_TEXT: Accepts = (lambda v: isinstance(v, str), "a text")
_FLAG: Accepts = (lambda v: isinstance(v, bool), "true or false")
_SIDE, _SCALE = _whole(32, 8192, 32), _number(0, 100)

ARGUMENTS: dict[str, Accepts] = {
    "prompt": _TEXT,
    "negative_prompt": _TEXT,
    "width": _SIDE,
    "height": _SIDE,
    "num_frames": _whole(1, 8193, 8),
    "frame_rate": _number(1, 1000),
    "motion_speed": _number(0.01, 100),
    "num_inference_steps": _whole(2, 1000),
    "sigmas": _several(_number(0, 1), 2, "a list of 2 or more numbers, 0 to 1"),
    **{
        f"{stream}{name}": _SCALE
        for name in ("guidance_scale", "guidance_rescale", "stg_scale", "modality_scale")
        for stream in ("", "audio_")
    },
    "spatio_temporal_guidance_blocks": _several(_whole(0, 1000), 1, "a list of block numbers"),
    "noise_scale": _number(0, 1),
    "decode_timestep": _number(0, 1),
    "decode_noise_scale": _number(0, 1),
    "use_cross_timestep": _FLAG,
    "num_videos_per_prompt": _whole(1, 64),
    "max_sequence_length": _whole(1, 8192),
}
"""The arguments of the pipeline's call that a configuration may hold: those that JSON can say and that leave
something to compare. Each with what it accepts, as a predicate and in words."""


@dataclass(frozen=True)
class Request:
    """What is to be compared: a pipeline, or a transformer alone with random weights.

    model             folder of a diffusers LTX-2 pipeline, or its id on the hub
    random_weights    instead of a model: the LTX-2 version, "2.0", "2.3" or "2.5"
    prompt            in place of the one in `config`; without either a prompt of ours
    config            JSON file with arguments of the pipeline's call, `ARGUMENTS`; the fields here go before it
    steps             denoising steps, 2 or more
    size              pixels, "<width>x<height>", multiples of 32
    frames            pixel frames, 8n + 1
    device            "cpu", "cuda" or "cuda:<n>"; by default a GPU where there is one
    host              of the transformer with random weights, one of `names.hosts()`; a model is diffusers'
    layers            of the transformer with random weights, 1 to 48; by default as many as fit
    offload           keep only the part of the pipeline that runs on the GPU (diffusers' enable_model_cpu_offload)
    cuda_graph        passed on to `bitfuse.accelerate`, as is keep_text
    trace             where two runs differ, run both again and find the first place where their bits part
    """

    model: str | None = None
    random_weights: str | None = None
    prompt: str | None = None
    config: Path | None = None
    steps: int | None = None
    size: str | None = None
    frames: int | None = None
    seed: int = 0
    device: str | None = None
    host: str = "diffusers"
    layers: int | None = None
    offload: bool = False
    cuda_graph: bool = False
    keep_text: bool = False
    trace: bool = False


def check(request: Request) -> dict[str, Any]:
    """The pipeline's call as far as it was given, or CannotRun naming what is wrong: before a model is loaded."""
    if (request.model is None) == (request.random_weights is None):
        raise CannotRun("Give either MODEL, a folder or hub id of a diffusers LTX-2 pipeline, or --random-weights.")
    version = request.random_weights
    if request.host not in names.hosts():
        raise CannotRun(f"--host {request.host} is not a host; accepted: {', '.join(names.hosts())}")
    if version is not None:
        if names.version(version) is None:
            accepted = ", ".join(f"ltx-{name}" for name in names.VERSIONS)
            raise CannotRun(f"--random-weights {version} is not a version; accepted: {accepted}")
        if request.layers is not None and not 1 <= request.layers <= names.LAYERS:
            raise CannotRun(f"--layers {request.layers} is not accepted; accepted: 1 to {names.LAYERS}")
        unwanted = {"--prompt": request.prompt, "--config": request.config, "--offload": request.offload or None}
        if given := [option for option, value in unwanted.items() if value is not None]:
            raise CannotRun(f"{given[0]} belongs to a pipeline; it is not accepted with --random-weights.")
    elif request.host != "diffusers":
        raise CannotRun(f"--host {request.host} goes with --random-weights; a MODEL is a pipeline of diffusers.")
    elif request.layers is not None:
        raise CannotRun("--layers is accepted with --random-weights only: a MODEL has the layers it has.")
    if not 0 <= request.seed < 2**63:
        raise CannotRun(f"--seed {request.seed} is not accepted; accepted: a whole number, 0 to 2^63 - 1")

    call = _read_config(request.config) if request.config is not None else {}
    width, height = _sides(request.size)
    options = {
        "prompt": ("--prompt", request.prompt),
        "num_inference_steps": ("--steps", request.steps),
        "width": ("--size", width),
        "height": ("--size", height),
        "num_frames": ("--frames", request.frames),
    }
    for name, (option, value) in options.items():
        if value is not None:
            accepts, words = ARGUMENTS[name]
            if not accepts(value):
                shown = str(request.size if option == "--size" else value)[:80]
                raise CannotRun(f"{option} {shown}: {name} must be {words}")
            call[name] = value
    if "sigmas" in call and call.get("num_inference_steps", len(call["sigmas"])) != len(call["sigmas"]):
        raise CannotRun(f"{len(call['sigmas'])} sigmas do not go with {call['num_inference_steps']} steps.")
    return call


def _sides(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    if not (found := re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)):
        raise CannotRun(f"--size {size[:80]} is not accepted; accepted: <width>x<height> in pixels, as in 768x512")
    return int(found[1]), int(found[2])


def _read_config(path: Path) -> dict[str, Any]:
    """Arguments of the pipeline's call from a JSON file; CannotRun naming the first that is not accepted."""
    try:
        found = files.read_json(path, f"--config {path}", "a JSON object of arguments")
    except ValueError as why:
        raise CannotRun(str(why)) from None
    if not isinstance(found, dict):
        raise CannotRun(f"--config {path} holds a JSON {type(found).__name__}; accepted: an object of arguments")
    for name, value in found.items():
        if name not in ARGUMENTS:
            raise CannotRun(f"--config {path}: {name[:80]!r} is not an argument; accepted: {', '.join(ARGUMENTS)}")
        accepts, words = ARGUMENTS[name]
        if not accepts(value):
            raise CannotRun(f"--config {path}: {name} is {json.dumps(value)[:80]}; accepted: {words}")
    return found
