# SPDX-License-Identifier: GPL-3.0-or-later
"""What is ComfyUI's own in a seeded run: its LTXAVModel, called as ComfyUI's BaseModel calls it.

A noise level is a sigma. Latents are fp32 between steps and bf16 in the model; in image to video the video's timestep
is its denoise mask times the sigma, for each token, and the audio's is the sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitfuse.hosts.registry import HOSTS
from bitfuse.tools import packages
from bitfuse.tools.packages import CannotRun
from bitfuse.tools.seeded import FPS, Geometry, Schedule

LATENTS = torch.float32
FIRST = 1.0
BINS = 16  # of a spectrogram's frequencies, in each channel of the audio's latents
_INSTALL = HOSTS["comfyui"].install


def need(device: torch.device) -> None:
    with packages.importing("--host comfyui: ComfyUI does not import here", _INSTALL):
        from . import upstream
    if device.type == "cuda" and upstream.model_management.cpu_state == upstream.model_management.CPUState.CPU:
        raise CannotRun("--host comfyui: ComfyUI was imported for a machine without a GPU.")


def on_meta(geometry: Geometry) -> Any:
    from . import upstream

    g = geometry
    if g.version == "2.5":
        raise CannotRun(f"{upstream.NAME} does not have LTX-2.5.")
    config = g.config | {"caption_channels": g.caption_channels, "rope_type": "split"}
    config |= {"frequencies_precision": "float64", "use_middle_indices_grid": True}
    if g.version != "2.0":
        gates = ("apply_gated_attention", "cross_attention_adaln", "caption_proj_before_connector")
        config |= dict.fromkeys(gates, True) | {"caption_projection_first_linear": False}
    heads = max(1, g.caption_channels // 128)  # of the connectors, which take no part in a step
    config |= {"connector_num_attention_heads": heads, "connector_attention_head_dim": g.caption_channels // heads}
    operations = upstream.ops.disable_weight_init
    model = upstream.av_model.LTXAVModel(
        **config, dtype=torch.bfloat16, device=torch.device("meta"), operations=operations
    )
    model.num_audio_channels, model.audio_frequency_bins = g.audio_channels // BINS, BINS
    return model


def conditions(model: Any, geometry: Geometry, noise: Callable[..., Tensor], device: torch.device) -> dict[str, Any]:
    g = geometry
    return {"context": noise(1, g.text_tokens, sum(g.text_channels)), "sizes": (g.frames, g.height, g.width)}


def velocity_of(model: Any, inputs: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    given, fixed = inputs["given"], inputs["conditions"]

    def velocity(video: Tensor, audio: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        x = [
            video.to(torch.bfloat16).unflatten(1, fixed["sizes"]).movedim(-1, 1),
            audio.to(torch.bfloat16).unflatten(2, (-1, BINS)).swapaxes(1, 2),
        ]
        of_video = sigma if given is None else ((1 - given) * sigma[:, None])[..., None]
        options = {"frame_rate": FPS, "transformer_options": {} if video.device.type != "meta" else _without_memory()}
        of_video, of_audio = model(x, (of_video, sigma), fixed["context"], **options)
        return of_video.flatten(2).swapaxes(1, 2), of_audio.swapaxes(1, 2).flatten(2)

    return velocity


def _without_memory() -> dict[str, Any]:
    """Options for a model on the meta device: some of ComfyUI's attentions ask how much memory is free."""
    from . import upstream

    def attend(chosen: Any, *args: Any, **kwargs: Any) -> Tensor:
        return upstream.attention.attention_pytorch(*args, **kwargs)

    return {"optimized_attention_override": attend}


def schedule(geometry: Geometry, device: torch.device) -> Schedule:
    """Euler steps of equal size, as ComfyUI's `sample_euler` makes them."""
    sigmas = torch.linspace(1, 0, geometry.steps + 1, device=device)

    def step(velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        denoised = latents - velocity.float() * sigmas[index]
        return latents + (latents - denoised) / sigmas[index] * (sigmas[index + 1] - sigmas[index])

    return Schedule(sigmas[:-1], sigmas, step)
