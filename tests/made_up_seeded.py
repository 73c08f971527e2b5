"""What is the made-up host's own in a seeded run; see `bitfuse.tools.seeded`."""

from __future__ import annotations

import torch

from bitfuse.tools.seeded import CannotRun, Schedule

LATENTS = torch.bfloat16
FIRST = 1.0


def need(device):
    """It runs everywhere."""


def on_meta(geometry):
    import made_up_host

    g = geometry
    if g.version != "2.0":
        raise CannotRun(f"The made-up host does not have LTX-{g.version}.")
    sizes = g.layers, g.heads, g.head_dim, g.audio_head_dim, g.channels, g.audio_channels, g.caption_channels
    with torch.device("meta"):
        return made_up_host.Transformer(*sizes).to(torch.bfloat16)


def conditions(model, geometry, noise, device):
    text, audio_text = geometry.text_channels
    return {
        "text": noise(1, geometry.text_tokens, text),
        "audio_text": noise(1, geometry.text_tokens, audio_text),
    }


def velocity_of(model, inputs):
    return lambda video, audio, level: model(video, audio, level=level, **inputs["conditions"])


def schedule(geometry, device):
    sigmas = torch.linspace(1, 0, geometry.steps + 1, device=device)
    return Schedule(sigmas[:-1], sigmas, lambda velocity, latents, i: latents + velocity * (sigmas[i + 1] - sigmas[i]))
