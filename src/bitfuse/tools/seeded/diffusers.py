"""What is diffusers' own in a seeded run: its LTX-2 transformer, called as its pipelines for LTX-2 call it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitfuse.hosts.registry import HOSTS
from bitfuse.tools import packages
from bitfuse.tools.packages import CannotRun
from bitfuse.tools.seeded import FPS, Geometry, Schedule, first_frame

LATENTS = torch.float32  # bf16 into the transformer, fp32 between steps
FIRST = 1000.0
_INSTALL = HOSTS["diffusers"].install


def need(device: torch.device) -> None:
    packages.need("diffusers", install=_INSTALL)
    wrong = (ImportError, RuntimeError)  # RuntimeError: diffusers' lazy imports wrap what went wrong
    with packages.importing("This needs diffusers 0.37 or newer, with LTX-2", _INSTALL, wrong):
        from diffusers import LTX2VideoTransformer3DModel  # noqa: F401


def config(geometry: Geometry) -> dict[str, Any]:
    """Arguments of LTX2VideoTransformer3DModel, as diffusers' conversion script gives them for this version."""
    g = geometry
    found = g.config | {"caption_channels": g.caption_channels, "rope_type": "split"}
    if g.version != "2.0":
        gates = ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod", "perturbed_attn")
        found |= dict.fromkeys(gates, True) | {"use_prompt_embeddings": False}
    if g.version == "2.5":
        found |= {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
    return found


def on_meta(geometry: Geometry) -> Any:
    import diffusers
    from diffusers import LTX2VideoTransformer3DModel

    found = config(geometry)
    if unknown := [name for name in found if name not in inspect.signature(LTX2VideoTransformer3DModel).parameters]:
        had = f"diffusers {diffusers.__version__} does not have LTX-{geometry.version}"
        raise CannotRun(f"{had}: its transformer takes no {', '.join(unknown)}.")
    with torch.device("meta"):
        model: Any = LTX2VideoTransformer3DModel(**found)
    return torch.nn.Module.to(model, torch.bfloat16)  # diffusers' own `to` warns about modules it keeps in fp32: none


def text_and_coordinates(model: Any, g: Geometry, noise: Callable[..., Tensor], device: torch.device) -> dict[str, Any]:
    """The part of the conditions that SGLang's transformer takes by the same names."""
    text, audio_text = g.text_channels
    return {
        "encoder_hidden_states": noise(1, g.text_tokens, text),
        "audio_encoder_hidden_states": noise(1, g.text_tokens, audio_text),
        "num_frames": g.frames,
        "height": g.height,
        "width": g.width,
        "fps": FPS,
        "audio_num_frames": g.audio_frames,
        "video_coords": model.rope.prepare_video_coords(1, g.frames, g.height, g.width, device, fps=FPS),
        "audio_coords": model.audio_rope.prepare_audio_coords(1, g.audio_frames, device),
    }


def conditions(model: Any, geometry: Geometry, noise: Callable[..., Tensor], device: torch.device) -> dict[str, Any]:
    """Those for text to video and for image to video pass `use_cross_timestep=True` for every version."""
    g = geometry
    # The pipeline's connectors fill the padding with learned registers: every text token is attended to.
    mask = torch.ones(1, g.text_tokens, dtype=torch.int64, device=device)
    # 2.5: the causal first frame is marked as a keyframe (LTX2DFRPipeline; LTX2Pipeline passes none)
    marked = {"video_keyframes_mask": first_frame(g, device).unsqueeze(-1)} if g.version == "2.5" else {}
    return {
        **text_and_coordinates(model, g, noise, device),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "use_cross_timestep": True,
        **marked,
    }


def velocity_of(model: Any, inputs: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A noise level is a timestep, 1000 sigma."""
    given = inputs["given"]
    accepted = inspect.signature(model.forward).parameters  # 0.37 has no sigma and no use_cross_timestep
    fixed = {name: value for name, value in inputs["conditions"].items() if name in accepted}

    def velocity(video: Tensor, audio: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        noise_level = {"timestep": timestep}
        if given is not None:
            noise_level = {"timestep": timestep.unsqueeze(-1) * (1 - given), "audio_timestep": timestep}
        if "sigma" in accepted:  # audio_sigma is left out by both pipelines, and is sigma then
            noise_level["sigma"] = timestep
        output = model(
            hidden_states=video.to(torch.bfloat16),
            audio_hidden_states=audio.to(torch.bfloat16),
            **noise_level,
            **fixed,
        )
        return output.sample, output.audio_sample

    return velocity


def schedule(geometry: Geometry, device: torch.device) -> Schedule:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return flow_match(FlowMatchEulerDiscreteScheduler, geometry, device)


def flow_match(kind: Any, geometry: Geometry, device: torch.device) -> Schedule:
    """LTX-2's schedule: sigmas from 1 in equal steps, shifted by the number of tokens, ending at 0.1 and then 0.

    kind    diffusers' FlowMatchEulerDiscreteScheduler, or a class with its methods
    """
    shift = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
    scheduler: Any = kind(use_dynamic_shifting=True, shift_terminal=0.1, **shift)
    slope = (shift["max_shift"] - shift["base_shift"]) / (shift["max_image_seq_len"] - shift["base_image_seq_len"])
    mu = shift["base_shift"] + slope * (geometry.video_tokens - shift["base_image_seq_len"])
    n = geometry.steps
    scheduler.set_timesteps(sigmas=[1 - i / n for i in range(n)], mu=mu, device=device)
    scheduler.set_begin_index(0)

    def step(velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        return scheduler.step(velocity.float(), scheduler.timesteps[index], latents, return_dict=False)[0]

    return Schedule(scheduler.timesteps, scheduler.sigmas, step)
