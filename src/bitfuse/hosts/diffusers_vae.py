"""The decoder of diffusers' LTX-2 video autoencoder (0.38 to 0.42.1), by what `video_decoder.py` does.

Slices and single frames are the host's: `AutoencoderKLLTX2Video` cuts and joins them, and calls the decoder for each.
So are tiles, but that `tiles.py` blends them in fewer ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.autoencoders import autoencoder_kl_ltx2 as upstream
from torch import Tensor

from bitfuse.hosts import tiles
from bitfuse.hosts.part import Model
from bitfuse.hosts.sources import entries, functions, own_method, why_not_read, why_not_stock
from bitfuse.hosts.video_decoder import LEFT_OUT as _SHARED
from bitfuse.hosts.video_decoder import Names, Stage, Values, VideoDecoder

_Decoder: Any = upstream.LTX2VideoDecoder3d

# Upstream sources that were read and are restated here (`source_hash`), 0.38 to 0.42.1.
READ = {
    "LTX2VideoDecoder3d.forward": {"9b636b882880eb5f"},
    "LTX2VideoMidBlock3d.forward": {"2e251c5f6fe55330"},
    "LTX2VideoUpBlock3d.forward": {"9f083ffc90a0c4c3"},
    "LTX2VideoResnetBlock3d.forward": {"ace29674f0c831ba"},
    "LTX2VideoUpsampler3d.forward": {"d8ffe7d1d71c84ea"},
    "LTX2VideoCausalConv3d.forward": {"a36ffb016bcb1d81"},
    "PerChannelRMSNorm.forward": {"8af7076a14ff8423"},
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
    "decoder": [*entries(upstream, *READ), *_SHARED],
    "tiles": [
        *entries(upstream, *READ_OF_TILES),
        *((Tensor, name, f"torch.Tensor.{name}") for name in ("__mul__", "__add__", "__setitem__")),
    ],
}


class LTX2VideoDecoder3d(VideoDecoder):
    """In place of the forward of upstream's decoder."""

    __slots__ = ()
    whose = "diffusers'"
    names = Names(
        resnet=upstream.LTX2VideoResnetBlock3d,
        upsampler=getattr(upstream, "LTX2VideoUpsampler3d", None),  # of another name in 0.37
        convolution=upstream.LTX2VideoCausalConv3d,
        norm=upstream.PerChannelRMSNorm,
        given="hidden_states",
        norm_out="norm_out",
        nonlinearity="nonlinearity",
        norm_dim="channel_dim",
    )

    @classmethod
    def stages(cls, decoder: Any) -> Iterator[Stage]:
        resnets = [(f"mid_block.resnets.{index}", resnet) for index, resnet in enumerate(decoder.mid_block.resnets)]
        yield Stage("mid_block", decoder.mid_block, upstream.LTX2VideoMidBlock3d, resnets)
        for number, block in enumerate(decoder.up_blocks):
            name = f"up_blocks.{number}"
            steps = [(f"{name}.upsamplers.{index}", one) for index, one in enumerate(block.upsamplers or ())]
            steps += [(f"{name}.resnets.{index}", resnet) for index, resnet in enumerate(block.resnets)]
            yield Stage(name, block, upstream.LTX2VideoUpBlock3d, steps)

    def why_not_block(self, stage: Stage) -> str | None:
        if getattr(stage.module, "conv_in", None) is not None:
            return f"{stage.name} changes the number of channels in a resnet"
        if not len(stage.module.resnets):
            return f"{stage.name} has no resnets"
        upsamplers = getattr(stage.module, "upsamplers", None) or ()
        if len(upsamplers) > 1:
            return f"{stage.name} has {len(upsamplers)} upsamplers, one after the other; accepted: one"
        return None

    def changes_channels(self, resnet: Any) -> bool:
        return resnet.norm3 is not None or resnet.conv_shortcut is not None

    def frames_of(self, convolution: Any) -> int:
        return convolution.kernel_size[0]

    def causal(
        self, decoder: Any, hidden_states: Tensor, temb: Tensor | None = None, causal: bool | None = None
    ) -> bool:
        return causal or decoder.is_causal

    def decoded(
        self, decoder: Any, hidden_states: Tensor, temb: Tensor | None = None, causal: bool | None = None
    ) -> Tensor:
        causal = self.causal(decoder, hidden_states, temb, causal)
        if decoder.timestep_scale_multiplier is not None:
            temb = temb * decoder.timestep_scale_multiplier
        return self.after_first(decoder, decoder.conv_in(hidden_states, causal=causal), temb, causal)

    def values_of_block(self, block: Any, timestep: Any, x: Tensor) -> Any:
        """[B, n, 1, 1, 1] by the block's own embedder; what came in where it has none."""
        if block.time_embedder is None or timestep is None:
            return timestep
        found = block.time_embedder(
            timestep=timestep.flatten(), resolution=None, aspect_ratio=None, batch_size=x.size(0), hidden_dtype=x.dtype
        )
        return found.view(x.size(0), -1, 1, 1, 1)

    def values_of_resnet(self, resnet: Any, of_block: Any, x: Tensor) -> Values:
        if resnet.scale_shift_table is None:
            return (None,) * 4
        return (of_block.unflatten(1, (4, -1)) + resnet.scale_shift_table[None, ..., None, None, None]).unbind(dim=1)

    def last_values(self, decoder: Any, timestep: Any, x: Tensor) -> Values:
        if not self.conditioned(decoder):
            return (None,) * 2
        embedded = self.values_of_block(decoder, timestep, x).unflatten(1, (2, -1))
        return (embedded + decoder.scale_shift_table[None, ..., None, None, None]).unbind(dim=1)

    def conditioned(self, decoder: Any) -> bool:
        return decoder.time_embedder is not None

    def noise_scale(self, resnet: Any, number: int, y: Tensor) -> Tensor | None:
        return getattr(resnet, f"per_channel_scale{number}")

    def patches(self, decoder: Any) -> tuple[int, int]:
        return decoder.patch_size_t, decoder.patch_size


class TiledDecode(tiles.TiledDecode):
    """In place of upstream's `tiled_decode`."""

    __slots__ = ()
    output = upstream.DecoderOutput


def accelerate(vae: Any, shared: Model, host: str) -> None:
    """Give the decoder of an `AutoencoderKLLTX2Video` the forward above."""
    sources = functions(upstream, *READ)
    reason = next(why_not_stock(vae.decoder, _Decoder, "decoder", host, READ, sources), None)
    LTX2VideoDecoder3d.take_over(vae.decoder, _Decoder, shared, reason)
    for part in (tiles.BlendV, tiles.BlendH, tiles.BlendT, TiledDecode):
        reason = next(why_not_read(host, READ_OF_TILES, functions(upstream, f"{_VAE}.{part.method}")), None)
        if reason is None and not own_method(vae, part.method, upstream.AutoencoderKLLTX2Video):
            reason = f"the autoencoder has a {part.method} of its own"
        if reason is None:
            shared.handle.put(vae, part(vae, shared))
        else:
            shared.handle.extras.tiles.fall(reason)
