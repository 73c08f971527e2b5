"""What is ltx-core's own in a seeded run: its LTXModel, called as ltx-core's pipelines call it.

Timesteps are per token in text to video too, latents are bf16 between steps, and the step is ltx-core's Euler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from bitfuse.hosts.registry import HOSTS
from bitfuse.tools import packages
from bitfuse.tools.packages import CannotRun
from bitfuse.tools.seeded import FPS, Geometry, Schedule

LATENTS = torch.bfloat16
FIRST = 1.0
_INSTALL = HOSTS["ltx-core"].install


def need(device: torch.device) -> None:
    packages.need("ltx_core", "--host ltx-core", name="ltx-core", install=_INSTALL)
    with packages.importing("--host ltx-core: ltx-core does not import here", _INSTALL):
        import ltx_core.model.transformer.model  # noqa: F401


def on_meta(geometry: Geometry) -> Any:
    from ltx_core.model.transformer.model import LTXModel
    from ltx_core.model.transformer.rope import LTXRopeType
    from ltx_core.model.transformer.text_projection import PixArtAlphaTextProjection

    g = geometry
    widths = g.heads * g.head_dim, g.audio_heads * g.audio_head_dim
    config = g.config | {"rope_type": LTXRopeType.SPLIT, "double_precision_rope": True}
    if g.version != "2.0":
        config |= {"apply_gated_attention": True, "cross_attention_adaln": True}
    if g.version == "2.5":
        config |= {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
    if unknown := [name for name in config if name not in inspect.signature(LTXModel).parameters]:
        raise CannotRun(f"This ltx-core does not have LTX-{g.version}: its LTXModel takes no {', '.join(unknown)}.")
    with torch.device("meta"):
        if g.version == "2.0":  # from 2.3 on the text encoder projects the text
            projections = [PixArtAlphaTextProjection(g.caption_channels, width) for width in widths]
            config |= dict(zip(("caption_projection", "audio_caption_projection"), projections, strict=True))
        return LTXModel(**config).to(torch.bfloat16)


def conditions(model: Any, geometry: Geometry, noise: Callable[..., Tensor], device: torch.device) -> dict[str, Any]:
    """Per stream what its Modality holds beside the latents and the noise; the perturbations are none."""
    from ltx_core.components.patchifiers import AudioPatchifier, VideoLatentPatchifier
    from ltx_core.guidance.perturbations import BatchedPerturbationConfig
    from ltx_core.model.transformer.modality import Modality
    from ltx_core.tools import AudioLatentTools, VideoLatentTools
    from ltx_core.types import AudioLatentShape, VideoLatentShape

    g = geometry
    shapes = VideoLatentShape(1, g.channels, g.frames, g.height, g.width), AudioLatentShape(1, 1, g.audio_frames, 1)
    tools = VideoLatentTools(VideoLatentPatchifier(1), shapes[0], FPS), AudioLatentTools(AudioPatchifier(1), shapes[1])
    states = [tool.create_initial_state(device, torch.bfloat16) for tool in tools]
    streams = [
        {"positions": state.positions, "context": noise(1, g.text_tokens, width), "mask": state.denoise_mask}
        for state, width in zip(states, g.text_channels, strict=True)
    ]
    if g.image_to_video:
        streams[0]["mask"] = streams[0]["mask"].clone()
        streams[0]["mask"][:, : g.height * g.width] = 0
    if "keyframes_mask" in {field.name for field in fields(Modality)}:
        streams[0]["keyframes_mask"] = states[0].keyframes_mask
    # from 1.1.7 on None stands for none, and may be captured in a graph
    old = "num_blocks" not in inspect.signature(BatchedPerturbationConfig.empty).parameters
    return {"streams": streams, "perturbations": BatchedPerturbationConfig.empty(1) if old else None}


def velocity_of(model: Any, inputs: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A noise level is a sigma."""
    from ltx_core.model.transformer.modality import Modality

    streams, perturbations = inputs["conditions"]["streams"], inputs["conditions"]["perturbations"]

    def modality(latent: Tensor, sigma: Tensor, stream: dict[str, Any]) -> Any:
        fixed = {name: value for name, value in stream.items() if name != "mask"}
        return Modality(latent=latent, sigma=sigma, timesteps=stream["mask"] * sigma, **fixed)

    def velocity(video: Tensor, audio: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        given = (modality(t, sigma, stream) for t, stream in zip((video, audio), streams, strict=True))
        return model(*given, perturbations)

    return velocity


def schedule(geometry: Geometry, device: torch.device) -> Schedule:
    # scipy is missing where ltx-core was installed without what it needs
    with packages.importing("ltx-core's scheduler does not import here", "pip install scipy"):
        from ltx_core.components.diffusion_steps import EulerDiffusionStep
        from ltx_core.components.schedulers import LTX2Scheduler
        from ltx_core.utils import to_denoised

    sigmas = LTX2Scheduler().execute(steps=geometry.steps).to(device)

    def step(velocity: Tensor, latents: Tensor, index: int) -> Tensor:
        denoised = to_denoised(latents, velocity, sigmas[index])  # as ltx-core's X0Model does
        return EulerDiffusionStep().step(latents, denoised, sigmas, index)

    return Schedule(sigmas[:-1], sigmas, step)
