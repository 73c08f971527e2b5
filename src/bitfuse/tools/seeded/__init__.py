"""A host's LTX-2 transformer with seeded weights, and the loop that denoises with it: for the demo and the bench.

No checkpoint is downloaded: equality of bits does not depend on what the weights mean. What is real is the host's
code (transformer, scheduler and coordinates, called as the host's own pipeline calls them) and, on a GPU, the sizes.

What is one host's stands in its module (`bitfuse.hosts.registry` names it), which has

    need(device)                   CannotRun, with the cure, where the host is not installed or can't run there
    on_meta(geometry)              its transformer on the meta device, in bf16
    conditions(model, g, noise)    what its pipeline hands to the transformer beside the latents
    velocity_of(model, inputs)     the call of the transformer in its loop
    schedule(geometry, device)     noise levels, and the step from one to the next
    LATENTS, FIRST                 dtype of the latents between steps, and the highest noise level
"""

from __future__ import annotations

import copy
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bitfuse.hosts.registry import HOSTS
from bitfuse.tools import packages
from bitfuse.tools.names import LAYERS, VERSIONS
from bitfuse.tools.packages import CannotRun as CannotRun

FPS = 24.0
_MARGIN = 6 << 30  # bytes left free for activations: at 6144 tokens the feed-forward and the text bias take 1 to 2 GiB


@dataclass(frozen=True)
class Geometry:
    """The sizes of a transformer and of what it denoises.

    caption_channels    channels of the text in 2.0; later versions' connectors bring it to each stream's own width
    version             of LTX-2, one of `VERSIONS`: what its public checkpoints configure
    image_to_video      the first latent frame is given: its tokens are at timestep 0, all others at the step's own
    host                whose transformer it is, one of `HOSTS`
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
    host: str = "diffusers"

    def __post_init__(self) -> None:
        for name, value, accepted in (("version", self.version, VERSIONS), ("host", self.host, HOSTS)):
            if value not in accepted:
                raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")

    @property
    def text_channels(self) -> tuple[int, int]:
        """Of the text for the video and of the text for the audio."""
        if self.version == "2.0":
            return self.caption_channels, self.caption_channels
        return self.heads * self.head_dim, self.audio_heads * self.audio_head_dim

    @property
    def config(self) -> dict[str, Any]:
        """The sizes, by names that the transformers of all hosts give to their arguments."""
        return {
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "cross_attention_dim": self.heads * self.head_dim,
            "audio_num_attention_heads": self.audio_heads,
            "audio_attention_head_dim": self.audio_head_dim,
            "audio_in_channels": self.audio_channels,
            "audio_out_channels": self.audio_channels,
            "audio_cross_attention_dim": self.audio_heads * self.audio_head_dim,
        }

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


SMALL = Geometry("small", 3, 4, 8, 26, 16, 2, 4, 32, 4, 32, 16, 16, 48, steps=8)
REAL = Geometry("LTX-2.0", 16, 16, 24, 126, 1024, LAYERS, 32, 128, 32, 64, 128, 128, 3840, steps=8)


def geometry_for(
    device: torch.device, layers: int | None, version: str = "2.0", host: str = "diffusers"
) -> tuple[Geometry, str]:
    """The geometry for this device, and how its memory decided the number of layers, as a sentence.

    Raises CannotRun where the host is not installed or can't run there, or where so many layers do not fit.
    """
    of_host(host).need(device)
    if device.type == "cpu":
        return replace(SMALL, layers=layers or SMALL.layers, version=version, host=host), ""
    real = replace(REAL, name=f"LTX-{version}", version=version, host=host)
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


def installed() -> list[str]:
    """Those of `HOSTS` that are; none is imported."""
    return [name for name, host in HOSTS.items() if host.installed]


def of_host(name: str) -> Any:
    """The module with what is this host's, one of `HOSTS`; the host itself is imported when it is first needed.

    CannotRun, with the cure, where that module is in a package of its own, as ComfyUI's, which is not installed.
    """
    host = HOSTS[name]
    with packages.importing(f"--host {name} needs {host.package}", host.install):
        return importlib.import_module(host.seeded)


def _on_meta(geometry: Geometry) -> Any:
    model = of_host(geometry.host).on_meta(geometry)
    if buffers := [name for name, _ in model.named_buffers()]:  # to_empty would leave garbage in them
        have = f"This {geometry.host} gives the transformer buffers"
        raise CannotRun(f"{have} that the demo can't fill: {', '.join(buffers)}")
    return model


def build(geometry: Geometry, device: torch.device, seed: int) -> Any:
    """The host's transformer in bf16 with seeded weights, filled on the device and by its own generator."""
    model = _on_meta(geometry).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1:  # linear layers keep the scale of their input; the modulation tables are small, as trained ones
            p.normal_(0.0, p.shape[-1] ** -0.5 if name.endswith("weight") else 0.1, generator=generator)
        elif any(norm in name for norm in (".norm_", ".q_norm.", ".k_norm.")):
            p.normal_(1.0, 0.1, generator=generator)
        else:
            p.normal_(0.0, 0.02, generator=generator)
    return model


def twin(model: Any) -> Any:
    """Another model with the same Parameter objects: it takes no memory, and can be accelerated or compiled alone."""
    groups = [getattr(module, "tp_group", None) for module in model.modules()]  # SGLang's ranks, which are no copies
    return copy.deepcopy(model, {id(shared): shared for shared in (*model.parameters(), *groups) if shared is not None})


def make_inputs(model: Any, geometry: Geometry, device: torch.device, seed: int) -> dict[str, Any]:
    """What the host's pipeline hands to the transformer in its loop: latents, text and coordinates.

    Drawn on the CPU, so that a seed means the same latents and text on every device and for every host.
    """
    g, host = geometry, of_host(geometry.host)
    generator = torch.Generator("cpu").manual_seed(seed + 1)

    def noise(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    return {
        "host": g.host,
        "latents": noise(1, g.video_tokens, g.channels, dtype=host.LATENTS),
        "audio_latents": noise(1, g.audio_frames, g.audio_channels, dtype=host.LATENTS),
        "given": first_frame(g, device) if g.image_to_video else None,
        "conditions": host.conditions(model, g, noise, device),
    }


def first_frame(geometry: Geometry, device: torch.device) -> Tensor:
    """[1, T] 1 for the video tokens of the first latent frame, 0 for all others."""
    g = geometry
    return (torch.arange(g.video_tokens, device=device) < g.height * g.width).float()[None]


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


@dataclass(frozen=True)
class Schedule:
    """One stream's way through the noise.

    levels    [steps], as the transformer takes them
    sigmas    [steps + 1] or [steps]
    step      (velocity, latents, index) to the latents after it
    """

    levels: Tensor
    sigmas: Tensor
    step: Callable[[Tensor, Tensor, int], Tensor]


def velocity_of(model: Any, inputs: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The call of the transformer in the host's loop: (video, audio, noise level [B]) to both velocities."""
    return torch.no_grad()(of_host(inputs["host"]).velocity_of(model, inputs))


def one_step(model: Any, inputs: dict[str, Any]) -> Callable[[], tuple[Tensor, Tensor]]:
    """One forward of the transformer, at the first noise level: returns the velocities of video and audio."""
    velocity = velocity_of(model, inputs)
    level = torch.full((1,), of_host(inputs["host"]).FIRST, device=inputs["latents"].device)
    return lambda: velocity(inputs["latents"], inputs["audio_latents"], level)


@torch.no_grad()
def denoise(model: Any, geometry: Geometry, inputs: dict[str, Any], on_step: Callable[[], None]) -> Denoising:
    """The host's LTX-2 loop for text to video, without guidance."""
    run, velocity = Denoising(), velocity_of(model, inputs)
    video, audio = inputs["latents"], inputs["audio_latents"]
    schedules = [of_host(geometry.host).schedule(geometry, video.device) for _ in range(2)]  # each keeps its place
    for i, level in enumerate(schedules[0].levels):
        start = now(video.device)
        of_video, of_audio = velocity(video, audio, level.expand(1))
        video = schedules[0].step(of_video, video, i)
        audio = schedules[1].step(of_audio, audio, i)
        run.ms.append(1e3 * (now(video.device) - start))
        run.sigmas.append(float(schedules[0].sigmas[i]))
        run.video.append(video.cpu())
        run.audio.append(audio.cpu())
        on_step()
    return run


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
