"""diffusers' pipelines for LTX-2.0 with seeded weights: the parts at their real sizes, and a two-stage run of them.

The run is the one that diffusers documents for a distilled checkpoint: 8 steps, the latents upsampled to twice the
height and width, 3 steps, decoding. All of it is diffusers' own code but the text encoder, which is a stand-in: it
returns the hidden states that Gemma would (as many, as large, seeded), and takes no time of its own.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bitfuse.tools import packages, seeded
from bitfuse.tools.seeded import FPS, Geometry
from bitfuse.tools.seeded.diffusers import _INSTALL

VERSION = "2.0"
_PROMPT = "a red fox runs through fresh snow at dawn"  # the tokenizer is a stand-in, too: these words say nothing


@dataclass(frozen=True)
class Film:
    """What is generated, and by parts of which configurations.

    frames, height, width    of the first stage, in pixels; the second has twice the height and width
    geometry                 of the transformer
    layers_of_text           hidden states of the text encoder: its layers and the embedding
    configs                  arguments of the other parts, by their names in the pipeline
    tiles                    arguments of `vae.enable_tiling()`
    """

    frames: int
    height: int
    width: int
    geometry: Geometry
    layers_of_text: int
    configs: dict[str, dict[str, Any]]
    tiles: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the second stage."""
        return 2 * self.height, 2 * self.width

    def tokens(self, stage: int) -> int:
        """Video tokens of the first or the second stage (0 or 1)."""
        return ((self.frames - 1) // 8 + 1) * (self.height // 32) * (self.width // 32) * (1, 4)[stage]

    @property
    def sentence(self) -> str:
        height, width = self.size
        return (
            f"{self.geometry.layers} layers, {self.frames} frames: 8 steps at {self.width}x{self.height} "
            f"({self.tokens(0)} tokens), 3 at {width}x{height} ({self.tokens(1)} tokens)"
        )


_COMPRESSION = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}

# The classes' defaults are the configurations of the public checkpoint but for what stands here.
_REAL: dict[str, dict[str, Any]] = {
    "connectors": {"rope_type": "split"},
    "vae": {"decoder_causal": False, **_COMPRESSION},
    "audio_vae": {},
    "vocoder": {},
    "latent_upsampler": {},
}


def _tiny(geometry: Geometry) -> dict[str, dict[str, Any]]:
    """The same parts as small as they can be and still have every kind of module."""
    connector = {"num_attention_heads": 2, "attention_head_dim": geometry.caption_channels // 2, "num_layers": 1}
    connectors = {f"{which}_connector_{name}": n for which in ("video", "audio") for name, n in connector.items()}
    registers = {f"{which}_connector_num_learnable_registers": 4 for which in ("video", "audio")}
    return {
        "connectors": {
            "caption_channels": geometry.caption_channels,
            "text_proj_in_factor": 3,
            "rope_type": "split",
            **connectors,
            **registers,
        },
        "vae": {
            "latent_channels": geometry.channels,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 16, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "decoder_causal": False,
            **_COMPRESSION,
        },
        "audio_vae": {"base_channels": 16, "ch_mult": (1, 1, 1), "num_res_blocks": 1, "mel_bins": 8},
        "vocoder": {
            "in_channels": 16,  # of two channels, 8 mel bins each
            "hidden_channels": 16,
            "upsample_kernel_sizes": [16, 15, 8],
            "upsample_factors": [6, 5, 8],
            "resnet_kernel_sizes": [3],
            "resnet_dilations": [[1]],
        },
        "latent_upsampler": {"in_channels": geometry.channels, "mid_channels": 32, "num_blocks_per_stage": 1},
    }


def film_for(device: torch.device, layers: int | None = None) -> Film:
    """The real sizes on a GPU, tiny ones on a CPU. CannotRun where the pipelines are missing, or layers do not fit."""
    need()
    geometry, _ = seeded.geometry_for(device, layers, VERSION)
    if device.type == "cpu":
        geometry = replace(geometry, layers=layers or 1, text_tokens=8, caption_channels=128)  # of 48 nothing is fused
        tiles = dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width"), 96)
        tiles |= dict.fromkeys(("tile_sample_stride_height", "tile_sample_stride_width"), 64)
        return Film(9, 64, 64, geometry, 3, _tiny(geometry), tiles)
    return Film(121, 512, 768, geometry, 49, _REAL)


def need() -> None:
    packages.need("diffusers", install=_INSTALL)
    wrong = (ImportError, RuntimeError)  # RuntimeError: diffusers' lazy imports wrap what went wrong
    otherwise = "A whole run needs diffusers 0.38 or newer with its pipelines for LTX-2, and transformers for them"
    with packages.importing(otherwise, f"{_INSTALL} transformers", wrong):
        from diffusers.pipelines.ltx2 import LTX2LatentUpsamplePipeline, LTX2Pipeline  # noqa: F401
        from diffusers.pipelines.ltx2.utils import STAGE_2_DISTILLED_SIGMA_VALUES  # noqa: F401


# -- the parts ---------------------------------------------------------------------------------------------------------


class TextEncoder(torch.nn.Module):
    """Stands in for Gemma: whatever the prompt, the same seeded hidden states, each [1, T, C] in bf16."""

    dtype = torch.bfloat16

    def __init__(self, film: Film, device: torch.device, seed: int):
        super().__init__()
        g, generator = film.geometry, torch.Generator(device).manual_seed(seed)
        shape = (film.layers_of_text, 1, g.text_tokens, g.caption_channels)
        states = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        self.states = torch.nn.Parameter(states, requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.states.device

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=self.states.unbind())


class Tokenizer:
    """Stands in for Gemma's: the last quarter of the tokens is the prompt, those before are padding."""

    padding_side, pad_token = "left", "<pad>"

    def __init__(self, film: Film):
        self.model_max_length = film.geometry.text_tokens

    def __call__(self, prompt: list[str], **options: Any) -> SimpleNamespace:
        ids = torch.zeros(len(prompt), self.model_max_length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        mask[:, -(self.model_max_length // 4) :] = 1
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


def part(name: str, film: Film, device: torch.device, seed: int) -> Any:
    """A part other than the transformer, in bf16, made on the device: weights as its class draws them.

    Vectors get noise besides: the weights of a norm start as ones and much would be hidden.
    """
    import diffusers
    from diffusers.pipelines import ltx2

    kinds = {
        "connectors": ltx2.LTX2TextConnectors,
        "vae": diffusers.AutoencoderKLLTX2Video,
        "audio_vae": diffusers.AutoencoderKLLTX2Audio,
        "vocoder": ltx2.LTX2Vocoder,
        "latent_upsampler": ltx2.LTX2LatentUpsamplerModel,
    }
    generator = torch.Generator(device).manual_seed(seed)
    # The upsampler's blur kernel is a product of integers, which CUDA has not (diffusers 0.42.1)
    home = torch.device("cpu") if name == "latent_upsampler" else device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), home:
        torch.manual_seed(seed)
        made = kinds[name](**film.configs[name])
    # diffusers' own `to` warns about modules that it keeps in fp32: none
    made = torch.nn.Module.to(made, device=device, dtype=torch.bfloat16).eval().requires_grad_(False)
    for p in made.parameters():
        if p.ndim == 1:
            p.add_(torch.randn(p.shape, generator=generator, device=device, dtype=p.dtype), alpha=0.05)
    return made


@dataclass(frozen=True)
class Pipelines:
    """diffusers' `LTX2Pipeline`, and its `LTX2LatentUpsamplePipeline` with the same decoder."""

    main: Any
    upsample: Any


def build(film: Film, device: torch.device, seed: int = 0) -> Pipelines:
    """Both pipelines with seeded weights. Call under `torch.no_grad`, as the pipelines themselves run."""
    parts = {name: part(name, film, device, seed + i) for i, name in enumerate(film.configs)}
    parts["transformer"] = seeded.build(film.geometry, device, seed)
    parts["text_encoder"] = TextEncoder(film, device, seed)
    parts["tokenizer"] = Tokenizer(film)
    return _of_parts(parts)


def _of_parts(parts: dict[str, Any]) -> Pipelines:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.ltx2 import LTX2LatentUpsamplePipeline, LTX2Pipeline

    others = dict(parts)
    upsampler = others.pop("latent_upsampler")
    # The distilled noise levels are used as they are, not shifted by the number of tokens.
    main: Any = LTX2Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False), **others)
    upsample: Any = LTX2LatentUpsamplePipeline(vae=parts["vae"], latent_upsampler=upsampler)
    for pipe in (main, upsample):
        pipe.set_progress_bar_config(disable=True)
    return Pipelines(main, upsample)


def twin(pipelines: Pipelines) -> Pipelines:
    """Pipelines with the same Parameter objects, which can be accelerated alone."""
    names = ("connectors", "vae", "audio_vae", "vocoder", "transformer")
    parts = {name: seeded.twin(getattr(pipelines.main, name)) for name in names}
    shared = {name: getattr(pipelines.main, name) for name in ("text_encoder", "tokenizer")}
    return _of_parts(parts | shared | {"latent_upsampler": seeded.twin(pipelines.upsample.latent_upsampler)})


# -- the run -----------------------------------------------------------------------------------------------------------


def first_stage(pipelines: Pipelines, film: Film, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents of the video [1, C, F, H, W] and of the audio [1, C, L, M] after 8 steps."""
    from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES

    sizes = {"height": film.height, "width": film.width}
    levels = {"sigmas": DISTILLED_SIGMA_VALUES, "num_inference_steps": len(DISTILLED_SIGMA_VALUES)}
    return pipelines.main(**_options(pipelines, film, generator), **sizes, **levels, output_type="latent")


def upsampled(pipelines: Pipelines, film: Film, latents: Tensor) -> Tensor:
    """The video's latents at twice the height and width."""
    sizes = {"height": film.height, "width": film.width, "num_frames": film.frames}
    return pipelines.upsample(latents=latents, output_type="latent", return_dict=False, **sizes)[0]


def second_stage(
    pipelines: Pipelines, film: Film, generator: torch.Generator, video: Tensor, audio: Tensor
) -> tuple[Any, Tensor]:
    """Frames as a numpy array [1, F, H, W, 3] in fp32 on the CPU, and the waveform on the device, after 3 steps."""
    from diffusers.pipelines.ltx2.utils import STAGE_2_DISTILLED_SIGMA_VALUES as LEVELS

    height, width = film.size
    given = {"latents": video, "audio_latents": audio, "noise_scale": LEVELS[0]}
    levels = {"sigmas": LEVELS, "num_inference_steps": len(LEVELS)}
    options = _options(pipelines, film, generator)
    return pipelines.main(**options, **given, **levels, height=height, width=width, output_type="np")


def _options(pipelines: Pipelines, film: Film, generator: torch.Generator) -> dict[str, Any]:
    """What both stages are called with: no guidance, as a distilled checkpoint needs none."""
    off = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    found = off | {f"audio_{name}": value for name, value in off.items()}
    found |= {"num_frames": film.frames, "frame_rate": FPS, "max_sequence_length": film.geometry.text_tokens}
    accepted = inspect.signature(type(pipelines.main).__call__).parameters  # older ones have not all of the guidance
    found = {name: value for name, value in found.items() if name in accepted}
    return found | {"prompt": _PROMPT, "generator": generator, "return_dict": False}
