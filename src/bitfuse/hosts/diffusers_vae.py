"""Decoder and encoder of diffusers' LTX-2 video autoencoder (0.38 to 0.42.1), by what `video_coder.py` does.

Slices and single frames are the host's: `AutoencoderKLLTX2Video` cuts and joins them, and calls the decoder or the
encoder for each. So are tiles, but that `tiles.py` blends them in fewer ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_kl_ltx2 as upstream
from torch import Tensor

from bitfuse.core.volumes import biased
from bitfuse.hosts import tiles, video_decoder, video_encoder
from bitfuse.hosts.part import Model
from bitfuse.hosts.sources import entries, functions, own_method, why_not_read, why_not_stock
from bitfuse.hosts.video_coder import Names, Stage, Values, VideoCoder
from bitfuse.hosts.video_decoder import VideoDecoder
from bitfuse.hosts.video_encoder import VideoEncoder

_Decoder: Any = upstream.LTX2VideoDecoder3d
_Encoder: Any = upstream.LTX2VideoEncoder3d

# Upstream sources that were read and are restated here (`source_hash`), 0.38 to 0.42.1.
_READ_OF_BOTH = {
    "LTX2VideoMidBlock3d.forward": {"2e251c5f6fe55330"},
    "LTX2VideoResnetBlock3d.forward": {"ace29674f0c831ba"},
    "LTX2VideoCausalConv3d.forward": {"a36ffb016bcb1d81"},
    "PerChannelRMSNorm.forward": {"8af7076a14ff8423"},
}
READ = {
    "LTX2VideoDecoder3d.forward": {"9b636b882880eb5f"},
    "LTX2VideoUpBlock3d.forward": {"9f083ffc90a0c4c3"},
    "LTX2VideoUpsampler3d.forward": {"d8ffe7d1d71c84ea"},
    **_READ_OF_BOTH,
}
READ_OF_ENCODER = {
    "LTX2VideoEncoder3d.forward": {"26753daac3fdb3af"},
    "LTX2VideoDownBlock3D.forward": {"f684cc750a88881e"},
    "LTX2VideoDownsampler3d.forward": {"3045048f0b6e08d3"},
    **_READ_OF_BOTH,
}

# Those of the autoencoder itself, 0.38 to 0.42.1.
_VAE = "AutoencoderKLLTX2Video"
READ_OF_TILES = {
    f"{_VAE}.blend_v": {"6eb0967f04a8e0d3"},
    f"{_VAE}.blend_h": {"7bb410278e296bbe"},
    f"{_VAE}.blend_t": {"fa1c33593a7839d8"},
    f"{_VAE}.tiled_decode": {"0e1f07d8950dd168"},
}

# The functions that parts of ours leave out, by the kind of part.
LEFT_OUT = {
    "decoder": [*entries(upstream, *READ), *video_decoder.LEFT_OUT],
    "encoder": [*entries(upstream, *READ_OF_ENCODER), *video_encoder.LEFT_OUT],
    "tiles": [
        *entries(upstream, *READ_OF_TILES),
        *((Tensor, name, f"torch.Tensor.{name}") for name in ("__mul__", "__add__", "__setitem__")),
    ],
}


def _names(sampler: str) -> Names:
    return Names(
        resnet=upstream.LTX2VideoResnetBlock3d,
        sampler=getattr(upstream, sampler, None),  # of another name in 0.37
        convolution=upstream.LTX2VideoCausalConv3d,
        norm=upstream.PerChannelRMSNorm,
        given="hidden_states",
        norm_out="norm_out",
        nonlinearity="nonlinearity",
        norm_dim="channel_dim",
    )


class _Coder(VideoCoder):
    """What upstream's decoder and encoder have in common."""

    __slots__ = ()
    whose = "diffusers'"

    def why_not_block(self, stage: Stage) -> str | None:
        if getattr(stage.module, "conv_in", None) is not None:
            return f"{stage.name} changes the number of channels in a resnet"
        if not len(stage.module.resnets):
            return f"{stage.name} has no resnets"
        for what in ("upsamplers", "downsamplers"):
            samplers = getattr(stage.module, what, None) or ()
            if len(samplers) > 1:
                return f"{stage.name} has {len(samplers)} {what}, one after the other; accepted: one"
        return None

    def changes_channels(self, resnet: Any) -> bool:
        return resnet.norm3 is not None or resnet.conv_shortcut is not None

    def frames_of(self, convolution: Any) -> int:
        return convolution.kernel_size[0]

    def values_of_resnet(self, resnet: Any, of_block: Any, x: Tensor) -> Values:
        if resnet.scale_shift_table is None:
            return (None,) * 4
        return (of_block.unflatten(1, (4, -1)) + resnet.scale_shift_table[None, ..., None, None, None]).unbind(dim=1)

    def noise_scale(self, resnet: Any, number: int, y: Tensor) -> Tensor | None:
        return getattr(resnet, f"per_channel_scale{number}")

    def patches(self, coder: Any) -> tuple[int, int]:
        return coder.patch_size_t, coder.patch_size


class LTX2VideoDecoder3d(_Coder, VideoDecoder):
    """In place of the forward of upstream's decoder."""

    __slots__ = ()
    names = _names("LTX2VideoUpsampler3d")

    @classmethod
    def stages(cls, coder: Any) -> Iterator[Stage]:
        yield _mid_block(coder)
        for number, block in enumerate(coder.up_blocks):
            name = f"up_blocks.{number}"
            steps = [*_steps(name, block, "upsamplers"), *_steps(name, block, "resnets")]
            yield Stage(name, block, upstream.LTX2VideoUpBlock3d, steps)

    def causal(self, coder: Any, hidden_states: Tensor, temb: Tensor | None = None, causal: bool | None = None) -> bool:
        return causal or coder.is_causal

    def coded(
        self, coder: Any, hidden_states: Tensor, temb: Tensor | None = None, causal: bool | None = None
    ) -> Tensor:
        causal = self.causal(coder, hidden_states, temb, causal)
        if coder.timestep_scale_multiplier is not None:
            temb = temb * coder.timestep_scale_multiplier
        return self.after_first(coder, lambda: coder.conv_in(hidden_states, causal=causal), temb, causal)

    def values_of_block(self, block: Any, timestep: Any, x: Tensor) -> Any:
        """[B, n, 1, 1, 1] by the block's own embedder; what came in where it has none."""
        if block.time_embedder is None or timestep is None:
            return timestep
        found = block.time_embedder(
            timestep=timestep.flatten(), resolution=None, aspect_ratio=None, batch_size=x.size(0), hidden_dtype=x.dtype
        )
        return found.view(x.size(0), -1, 1, 1, 1)

    def last_values(self, coder: Any, timestep: Any, x: Tensor) -> Values:
        if not self.conditioned(coder):
            return (None,) * 2
        embedded = self.values_of_block(coder, timestep, x).unflatten(1, (2, -1))
        return (embedded + coder.scale_shift_table[None, ..., None, None, None]).unbind(dim=1)

    def conditioned(self, coder: Any) -> bool:
        return coder.time_embedder is not None


class LTX2VideoEncoder3d(_Coder, VideoEncoder):
    """In place of the forward of upstream's encoder."""

    __slots__ = ()
    names = _names("LTX2VideoDownsampler3d")

    @classmethod
    def stages(cls, coder: Any) -> Iterator[Stage]:
        for number, block in enumerate(coder.down_blocks):
            name = f"down_blocks.{number}"
            steps = [*_steps(name, block, "resnets"), *_steps(name, block, "downsamplers")]
            yield Stage(name, block, upstream.LTX2VideoDownBlock3D, steps)
        yield _mid_block(coder)

    def causal(self, coder: Any, hidden_states: Tensor, causal: bool | None = None) -> bool:
        return causal or coder.is_causal

    def coded(self, coder: Any, hidden_states: Tensor, causal: bool | None = None) -> Tensor:
        causal = self.causal(coder, hidden_states, causal)
        x = biased(*self.after_first(coder, lambda: self._first(coder, hidden_states, causal), None, causal))
        return torch.cat([x, x[:, -1:].repeat(1, x.size(1) - 2, 1, 1, 1)], dim=1)

    def _first(self, coder: Any, video: Tensor, causal: bool) -> Tensor:
        """What the first convolution gives, of patches of the video that are not kept."""
        frames, side = self.patches(coder)
        batch, channels, *sides = video.shape
        sides = [n // by for n, by in zip(sides, (frames, side, side), strict=True)]
        patches = video.reshape(batch, channels, sides[0], frames, sides[1], side, sides[2], side)
        return coder.conv_in(patches.permute(0, 1, 3, 7, 5, 2, 4, 6).flatten(1, 4), causal=causal)


def _mid_block(coder: Any) -> Stage:
    return Stage("mid_block", coder.mid_block, upstream.LTX2VideoMidBlock3d, _steps("mid_block", coder.mid_block))


def _steps(name: str, block: Any, what: str = "resnets") -> list[tuple[str, Any]]:
    return [(f"{name}.{what}.{index}", one) for index, one in enumerate(getattr(block, what) or ())]


class TiledDecode(tiles.TiledDecode):
    """In place of upstream's `tiled_decode`."""

    __slots__ = ()
    output = upstream.DecoderOutput


def accelerate(vae: Any, shared: Model, host: str) -> None:
    """Give decoder and encoder of an `AutoencoderKLLTX2Video` the forwards above."""
    for coder, ours, own, read in (
        (vae.decoder, LTX2VideoDecoder3d, _Decoder, READ),
        (vae.encoder, LTX2VideoEncoder3d, _Encoder, READ_OF_ENCODER),
    ):
        reason = next(why_not_stock(coder, own, ours.kind, host, read, functions(upstream, *read)), None)
        ours.take_over(coder, own, shared, reason)
    for part in (tiles.BlendV, tiles.BlendH, tiles.BlendT, TiledDecode):
        reason = next(why_not_read(host, READ_OF_TILES, functions(upstream, f"{_VAE}.{part.method}")), None)
        if reason is None and not own_method(vae, part.method, upstream.AutoencoderKLLTX2Video):
            reason = f"the autoencoder has a {part.method} of its own"
        if reason is None:
            shared.handle.put(vae, part(vae, shared))
        else:
            shared.handle.extras.tiles.fall(reason)
