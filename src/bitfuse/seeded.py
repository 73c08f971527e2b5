"""diffusers' LTX-2 transformer with seeded weights, and the loop that denoises with it: for the demo and the bench.

No checkpoint is downloaded: equality of bits does not depend on what the weights mean. What is real is the host's
code (transformer, scheduler and coordinates, called as diffusers' LTX2Pipeline calls them) and, on a GPU, the sizes.
"""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

VERSIONS = ("2.0", "2.3", "2.5")

_FPS = 24.0
_MARGIN = 6 << 30  # bytes left free for activations: at 6144 tokens the feed-forward and the text bias take 1 to 2 GiB


class CannotRun(Exception):
    """Why nothing can be shown here, in one sentence."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a transformer and of what it denoises.

    caption_channels    channels of the text in 2.0; later versions' connectors bring it to each stream's own width
    version             of LTX-2, one of `VERSIONS`: what its public checkpoints configure
    image_to_video      the first latent frame is given: its tokens are at timestep 0, all others at the step's own
    """

    name: str
    frames: int  # latent frames, height and width: one token each
    height: int
    width: int
    audio_frames: int
    text_tokens: int
    layers: int
    heads: int
    head_dim: int
    audio_heads: int
    audio_head_dim: int
    channels: int
    audio_channels: int
    caption_channels: int
    steps: int
    version: str = "2.0"
    image_to_video: bool = False

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ValueError(f"version is {self.version!r}; accepted: {', '.join(VERSIONS)}")

    @property
    def text_channels(self) -> tuple[int, int]:
        """Of the text for the video and of the text for the audio."""
        if self.version == "2.0":
            return self.caption_channels, self.caption_channels
        return self.heads * self.head_dim, self.audio_heads * self.audio_head_dim

    @property
    def video_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def sentence(self) -> str:
        pixels = f"{32 * self.width}x{32 * self.height}, {8 * (self.frames - 1) + 1} frames"
        return (
            f"{self.layers} layers, {self.heads} heads of {self.head_dim} (video) and {self.audio_head_dim} (audio), "
            f"{pixels}: {self.video_tokens} video and {self.audio_frames} audio tokens"
        )

    def config(self) -> dict[str, Any]:
        """Arguments of LTX2VideoTransformer3DModel, as diffusers' conversion script gives them for this version."""
        config: dict[str, Any] = {
            "in_channels": self.channels,
            "out_channels": self.channels,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "cross_attention_dim": self.heads * self.head_dim,
            "audio_in_channels": self.audio_channels,
            "audio_out_channels": self.audio_channels,
            "audio_num_attention_heads": self.audio_heads,
            "audio_attention_head_dim": self.audio_head_dim,
            "audio_cross_attention_dim": self.audio_heads * self.audio_head_dim,
            "caption_channels": self.caption_channels,
            "num_layers": self.layers,
            "rope_type": "split",
        }
        if self.version != "2.0":
            gates = ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod", "perturbed_attn")
            config |= dict.fromkeys(gates, True) | {"use_prompt_embeddings": False}
        if self.version == "2.5":
            config |= {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
        return config


SMALL = Geometry("small", 4, 8, 12, 26, 16, 2, 4, 32, 4, 32, 16, 16, 48, steps=8)
REAL = Geometry("LTX-2.0", 16, 16, 24, 126, 1024, 48, 32, 128, 32, 64, 128, 128, 3840, steps=8)


def geometry_for(device: torch.device, layers: int | None, version: str = "2.0") -> tuple[Geometry, str]:
    """The geometry for this device, and how its memory decided the number of layers, as a sentence."""
    if device.type == "cpu":
        return replace(SMALL, layers=layers or SMALL.layers, version=version), ""
    real = replace(REAL, name=f"LTX-{version}", version=version)
    one = _on_meta(replace(real, layers=1))
    layer = _bytes(one.transformer_blocks[0])
    rest = _bytes(one) - layer
    free = torch.cuda.mem_get_info(device)[0]
    fit = max(0, min(REAL.layers, (free - _MARGIN - rest) // layer))
    sums = f"a layer is {layer / 1e9:.2f} GB, the rest {rest / 1e9:.2f} GB, {free / 1e9:.1f} GB are free"
    if (layers or 1) > fit:
        raise CannotRun(f"{layers or 1} layers do not fit: {sums}, so {fit} do, with {_MARGIN >> 30} GiB to work in.")
    return replace(real, layers=layers or fit), f"{layers or fit} of {REAL.layers} layers: {sums}."


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


# -- the model and its inputs -------------------------------------------------------------------------------------


def _on_meta(geometry: Geometry) -> Any:
    import diffusers
    from diffusers import LTX2VideoTransformer3DModel

    config = geometry.config()
    if unknown := [name for name in config if name not in inspect.signature(LTX2VideoTransformer3DModel).parameters]:
        had = f"diffusers {diffusers.__version__} does not have LTX-{geometry.version}"
        raise CannotRun(f"{had}: its transformer takes no {', '.join(unknown)}.")
    with torch.device("meta"):
        model: Any = LTX2VideoTransformer3DModel(**config)
    if buffers := [name for name, _ in model.named_buffers()]:  # to_empty would leave garbage in them
        raise CannotRun(f"This diffusers gives the transformer buffers that the demo can't fill: {', '.join(buffers)}")
    return torch.nn.Module.to(model, torch.bfloat16)  # diffusers' own `to` warns about modules it keeps in fp32: none


def build(geometry: Geometry, device: torch.device, seed: int) -> Any:
    """An LTX2VideoTransformer3DModel in bf16 with seeded weights, filled on the device and by its own generator."""
    model = _on_meta(geometry).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1:  # linear layers keep the scale of their input; the modulation tables are small, as trained ones
            p.normal_(0.0, p.shape[-1] ** -0.5 if name.endswith("weight") else 0.1, generator=generator)
        elif ".norm_" in name:
            p.normal_(1.0, 0.1, generator=generator)
        else:
            p.normal_(0.0, 0.02, generator=generator)
    return model


def twin(model: Any) -> Any:
    """Another model with the same Parameter objects: it takes no memory, and can be accelerated or compiled alone."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def make_inputs(model: Any, geometry: Geometry, device: torch.device, seed: int) -> dict[str, Any]:
    """What diffusers' pipelines hand to the transformer before their loop: latents, text and coordinates.

    Those for text to video and for image to video pass `use_cross_timestep=True` for every version. Drawn on the
    CPU, so that a seed means the same latents on every device.
    """
    g = geometry
    generator = torch.Generator("cpu").manual_seed(seed + 1)

    def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    # The pipeline's connectors fill the padding with learned registers: every text token is attended to.
    mask = torch.ones(1, g.text_tokens, dtype=torch.int64, device=device)
    first_frame = (torch.arange(g.video_tokens, device=device) < g.height * g.width).float()[None]
    # 2.5: the causal first frame is marked as a keyframe (LTX2DFRPipeline; LTX2Pipeline passes none)
    marked = {"video_keyframes_mask": first_frame.unsqueeze(-1)} if g.version == "2.5" else {}
    text, audio_text = g.text_channels
    return {
        "latents": noise(1, g.video_tokens, g.channels),
        "audio_latents": noise(1, g.audio_frames, g.audio_channels),
        "given": first_frame if g.image_to_video else None,
        "conditions": {
            "encoder_hidden_states": noise(1, g.text_tokens, text, dtype=torch.bfloat16),
            "audio_encoder_hidden_states": noise(1, g.text_tokens, audio_text, dtype=torch.bfloat16),
            "encoder_attention_mask": mask,
            "audio_encoder_attention_mask": mask,
            "num_frames": g.frames,
            "height": g.height,
            "width": g.width,
            "fps": _FPS,
            "audio_num_frames": g.audio_frames,
            "video_coords": model.rope.prepare_video_coords(1, g.frames, g.height, g.width, device, fps=_FPS),
            "audio_coords": model.audio_rope.prepare_audio_coords(1, g.audio_frames, device),
            "use_cross_timestep": True,
            **marked,
        },
    }


# -- the loop -----------------------------------------------------------------------------------------------------


@dataclass
class Denoising:
    """One run of the loop: both latents after each step (on the CPU), the step's noise level and its time.

    decoded    what a pipeline made of the last latents, by name and on the CPU; nothing without a pipeline
    """

    video: list[Tensor] = field(default_factory=list)
    audio: list[Tensor] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    decoded: dict[str, Tensor] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        """Without the first step, which pays for compiling, proving and warming up."""
        return statistics.median(self.ms[1:])


def velocity_of(model: Any, inputs: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The call of the transformer in the pipelines' loop: (video, audio, timestep [B]) to both velocities."""
    given = inputs["given"]
    accepted = inspect.signature(model.forward).parameters  # 0.37 has no sigma and no use_cross_timestep
    conditions = {name: value for name, value in inputs["conditions"].items() if name in accepted}

    @torch.no_grad()
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
            **conditions,
        )
        return output.sample, output.audio_sample

    return velocity


def one_step(model: Any, inputs: dict[str, Any]) -> Callable[[], tuple[Tensor, Tensor]]:
    """One forward of the transformer, at the first noise level: returns the velocities of video and audio."""
    velocity = velocity_of(model, inputs)
    timestep = torch.full((1,), 1000.0, device=inputs["latents"].device)
    return lambda: velocity(inputs["latents"], inputs["audio_latents"], timestep)


@torch.no_grad()
def denoise(model: Any, geometry: Geometry, inputs: dict[str, Any], on_step: Callable[[], None]) -> Denoising:
    """diffusers' LTX-2 loop for text to video, without guidance: bf16 into the transformer, fp32 latents outside."""
    run, velocity = Denoising(), velocity_of(model, inputs)
    video, audio = inputs["latents"], inputs["audio_latents"]
    schedulers = [_scheduler(geometry, video.device) for _ in range(2)]
    for i, t in enumerate(schedulers[0].timesteps):
        start = now(video.device)
        of_video, of_audio = velocity(video, audio, t.expand(1))
        video = schedulers[0].step(of_video.float(), t, video, return_dict=False)[0]
        audio = schedulers[1].step(of_audio.float(), t, audio, return_dict=False)[0]
        run.ms.append(1e3 * (now(video.device) - start))
        run.sigmas.append(float(schedulers[0].sigmas[i]))
        run.video.append(video.cpu())
        run.audio.append(audio.cpu())
        on_step()
    return run


def _scheduler(geometry: Geometry, device: torch.device) -> Any:
    """LTX-2's scheduler: sigmas from 1 in equal steps, shifted by the number of tokens, ending at 0.1 and then 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    shift = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **shift)
    slope = (shift["max_shift"] - shift["base_shift"]) / (shift["max_image_seq_len"] - shift["base_image_seq_len"])
    mu = shift["base_shift"] + slope * (geometry.video_tokens - shift["base_image_seq_len"])
    n = geometry.steps
    scheduler.set_timesteps(sigmas=[1 - i / n for i in range(n)], mu=mu, device=device)
    scheduler.set_begin_index(0)
    return scheduler


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
