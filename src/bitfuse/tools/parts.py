"""The parts of a diffusers pipeline besides its transformer in which something is fused, on the meta device.

Each is built from its config alone, and has a forward that `bitfuse explain` runs for its shapes.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.lines import error_line
from bitfuse.tools import files

_TEXT_TOKENS, _HIDDEN_STATES = 1024, 49  # of a prompt; of Gemma 3 12B, its embedding and 48 layers
_LATENTS = (16, 16, 24)  # frames, height and width: 121 frames of 768x512 where a latent has 8 frames of 32x32


@dataclass(frozen=True)
class Part:
    """A part on the meta device, one forward of it, and that forward in words."""

    model: Any
    forward: Callable[[], object]
    sentence: str


def built(cls: Any, config: dict[str, Any], dtype: torch.dtype, what: str) -> Any:
    """A model of diffusers from its config, on the meta device, in evaluation mode. ValueError where that fails.

    what    whose config it is, for the error
    """
    parameters = inspect.signature(cls).parameters
    try:
        with torch.device("meta"):
            made = cls(**{name: value for name, value in config.items() if name in parameters})
    except Exception as error:  # whatever a wrong config makes of the host's own code
        raise ValueError(
            f"{what}: no {cls.__name__} can be built from its config ({error_line(error)}); accepted: what "
            "`save_pretrained` writes"
        ) from error
    return torch.nn.Module.to(made, dtype).eval().requires_grad_(False)


def read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError for anything else."""
    accepted = "an object, as save_pretrained writes"
    config = files.read_json(file, str(file), accepted)
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}; accepted: {accepted}")
    return config


def of_pipeline(model: str, dtype: torch.dtype = torch.bfloat16) -> Iterator[Part]:
    """The text connectors and the decoders of a pipeline, as far as it has them.

    model    the pipeline's folder, or its id on the Hub. Of a transformer's own folder: nothing
    Raises ValueError where one has a config and can't be built from it.
    """
    for name, (kind, make) in _PARTS.items():
        cls = _class(kind)
        config = None if cls is None else _config(cls, model, name)
        if cls is not None and config is not None and config.get("_class_name") == kind:
            yield make(built(cls, config, dtype, f"MODEL {model}, {name}"), dtype)


def _class(kind: str) -> Any:
    """The class of this name; None where this version of diffusers has none."""
    import diffusers

    try:
        from diffusers.pipelines import ltx2
    except (ImportError, RuntimeError):  # diffusers' lazy imports wrap what went wrong
        return None
    return getattr(ltx2, kind, None) or getattr(diffusers, kind, None)


def _config(cls: Any, model: str, name: str) -> dict[str, Any] | None:
    if os.path.exists(model):
        file = Path(model, name, "config.json")
        return read(file) if file.is_file() else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dict(cls.load_config(model, subfolder=name))
    except Exception:  # the pipeline has no such part; that the Hub can't be reached the transformer has told
        return None


# -- their forwards ----------------------------------------------------------------------------------------------------


def _connectors(model: Any, dtype: torch.dtype) -> Part:
    config = model.config
    states = config.get("text_proj_in_factor", _HIDDEN_STATES)
    text = _empty(dtype, 1, _TEXT_TOKENS, config["caption_channels"], states)
    mask = _empty(torch.int64, 1, _TEXT_TOKENS)
    return Part(model, lambda: model(text, mask), f"a prompt of {_TEXT_TOKENS} tokens")


def _autoencoder(model: Any, dtype: torch.dtype) -> Part:
    latents = _empty(dtype, 1, model.config["latent_channels"], *_LATENTS)
    timestep = _empty(dtype, 1) if model.config.get("timestep_conditioning") else None
    height, width = (side * model.spatial_compression_ratio for side in _LATENTS[1:])
    frames = 1 + model.temporal_compression_ratio  # one alone is left to the host in a pipeline
    video = _empty(dtype, 1, model.config["in_channels"], frames, height, width)
    sentence = f"a decode of latents {list(latents.shape)}, an encode of a video {list(video.shape)}"
    return Part(model, lambda: (model.decode(latents, timestep), model.encode(video)), sentence)


class _NoAttention:
    """In place of a processor: FlexAttention has no meta device. What attention gives has the form of the values."""

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: Any = None) -> Tensor:
        _, _, values = attn.project_qkv(hidden_states)
        return attn.to_out[0](values.reshape(hidden_states.shape))


def _diffusion_decoder(model: Any, dtype: torch.dtype) -> Part:
    for module in model.modules():
        if hasattr(module, "project_qkv"):
            module.set_processor(_NoAttention())
    latents = _empty(dtype, 1, model.config["latent_channels"], *_LATENTS)
    return Part(model, lambda: model.decode(latents), f"a diffusion decode of latents {list(latents.shape)}")


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


_PARTS: dict[str, tuple[str, Callable[[Any, torch.dtype], Part]]] = {
    "connectors": ("LTX2TextConnectors", _connectors),
    "vae": ("AutoencoderKLLTX2Video", _autoencoder),
    "diffusion_decoder": ("LTX2VideoDiffusionDecoderModel", _diffusion_decoder),
}
"""By their names in a pipeline: class, and what makes a `Part` of a model of it."""
