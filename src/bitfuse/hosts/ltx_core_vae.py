"""Decoder and encoder of ltx-core's LTX-2 video autoencoder (1.0.0 to 1.2.0), by what `video_coder.py` does.

From diffusers' they differ around their convolutions, not between them: the decoder adds noise to the latents and takes
their statistics back itself, from 1.1.2 on it casts them to the weights' dtype and the video back, and it casts tables
and scales of noise to the volume's dtype; the encoder gives the means alone, with their statistics. Their blocks stand
in one list. The decoder is `VideoDecoder` up to 1.1.7 and `ConvVideoDecoder` in 1.2.0.

Tiles are the host's: `tiled_decode` and `tiled_encode` cut, blend and join them, and call the forward for each.

From 1.1.3 on the decoder has a second forward, by `enable_memory_efficient_decode`, which ltx-pipelines use by default.
It is left in place: its volumes lie in channels_last_3d (from 1.1.4 on), so ATen adds up their channels in another
order, and its convolutions run over 16 frames at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from ltx_core.model.common import normalization
from ltx_core.model.video_vae import convolution, ops, resnet, sampling, video_vae
from ltx_core.model.video_vae.enums import LogVarianceType
from torch import Tensor

from bitfuse.core.volumes import biased
from bitfuse.hosts import video_decoder, video_encoder
from bitfuse.hosts.code import source_hash
from bitfuse.hosts.part import Model
from bitfuse.hosts.sources import entries, functions, why_not_stock
from bitfuse.hosts.video_coder import Names, Stage, Values, VideoCoder
from bitfuse.hosts.video_decoder import VideoDecoder
from bitfuse.run.swap import named

# `VideoDecoder` is the name of a protocol in 1.2.0
HOST_CLASS: Any = getattr(video_vae, "ConvVideoDecoder", None) or video_vae.VideoDecoder
HOST_ENCODER: Any = video_vae.VideoEncoder
_FORWARD, _ENCODING = f"{HOST_CLASS.__name__}.forward", "VideoEncoder.forward"

_CASTING = "55c962bfef754529"  # 1.1.2 to 1.2.0
# Whether the latents are cast to the weights' dtype, and the video back.
_CASTS = source_hash(HOST_CLASS.forward) == _CASTING

# Upstream sources that were read and are restated here (`source_hash`).
READ = {
    _FORWARD: {
        "a6039a980fa12589",  # 1.0.0 of 2026-01-05: other annotations only
        "db3ed1017c12ee53",  # 1.0.0 to 1.1.1
        _CASTING,
    },
    _ENCODING: {
        "87d624e641df8079",  # 1.0.0 of 2026-01: it refuses what the others crop
        "207c108817ebf7b3",  # 1.0.0 to 1.1.2
        "164aa6e79c6eabdf",  # 1.1.3 to 1.1.7: another docstring only
        "bdc435528fe8d8ac",  # 1.2.0: the frames of a latent by its blocks
    },
    "SpaceToDepthDownsample.forward": {"3355f2071f9362f8"},  # these eight 1.0.0 to 1.2.0
    "UNetMidBlock3D.forward": {"06e32e2019d4f62f"},
    "ResnetBlock3D.forward": {"941d6c02707c3147"},
    "ResnetBlock3D._feed_spatial_noise": {"6fe59b3d06825812"},
    "DepthToSpaceUpsample.forward": {"9a593ad4d77d7430"},
    "CausalConv3d.forward": {"906731c8ab4c607c"},
    "PixelNorm.forward": {"f37e7d55c12706f6"},
    "unpatchify": {"10a2938c2e66ffa4"},
}
_OF_BOTH = {
    resnet: ("UNetMidBlock3D.forward", "ResnetBlock3D.forward", "ResnetBlock3D._feed_spatial_noise"),
    convolution: ("CausalConv3d.forward",),
    normalization: ("PixelNorm.forward",),
}
_HOMES: dict[str, list[tuple[Any, tuple[str, ...]]]] = {
    "decoder": [(video_vae, (_FORWARD,)), (sampling, ("DepthToSpaceUpsample.forward",)), (ops, ("unpatchify",))],
    "encoder": [(video_vae, (_ENCODING,)), (sampling, ("SpaceToDepthDownsample.forward",))],
}

# The functions that the forwards below leave out, by the kind of part.
LEFT_OUT = {
    kind: [entry for home, paths in (*homes, *_OF_BOTH.items()) for entry in entries(home, *paths)]
    for kind, homes in _HOMES.items()
}
LEFT_OUT["decoder"] += entries(sys.modules[HOST_CLASS.__module__], "unpatchify") + video_decoder.LEFT_OUT
LEFT_OUT["encoder"] += [(torch, "chunk", "torch.chunk"), *video_encoder.LEFT_OUT]


def _names(sampler: Any) -> Names:
    return Names(
        resnet=resnet.ResnetBlock3D,
        sampler=sampler,
        convolution=convolution.CausalConv3d,
        norm=normalization.PixelNorm,
        given="sample",
        norm_out="conv_norm_out",
        nonlinearity="non_linearity",
        norm_dim="dim",
        identities=("norm3", "conv_shortcut"),
    )


class _Coder(VideoCoder):
    """What upstream's decoder and encoder have in common.

    blocks    the name of the list of its blocks
    """

    __slots__ = ()
    whose = "ltx-core's"
    blocks: str

    @classmethod
    def stages(cls, coder: Any) -> Iterator[Stage]:
        for number, block in enumerate(getattr(coder, cls.blocks)):
            name = f"{cls.blocks}.{number}"
            if isinstance(block, resnet.UNetMidBlock3D):
                steps = [(f"{name}.res_blocks.{index}", one) for index, one in enumerate(block.res_blocks)]
                yield Stage(name, block, resnet.UNetMidBlock3D, steps)
            else:
                yield Stage(name, None, None, [(name, block)])

    def why_not_block(self, stage: Stage) -> str | None:
        for name, module in stage.steps:
            if type(module) not in (self.names.resnet, self.names.sampler):
                kinds = f"a ResnetBlock3D or {self.names.sampler.__name__}"
                return f"{name} is a {named(type(module))}; accepted: {kinds}"
            if type(module) is self.names.sampler and module.stride[0] not in (1, 2):
                return f"{name} makes {module.stride[0]} frames of one, and keeps them all; accepted: 1 or 2"
            if stage.module is None and getattr(module, "timestep_conditioning", False):
                return f"{name} stands by itself and asks for a timestep"
        return None

    def changes_channels(self, resnet: Any) -> bool:
        return any(type(getattr(resnet, name)) is not torch.nn.Identity for name in self.names.identities)

    def frames_of(self, convolution: Any) -> int:
        return convolution.time_kernel_size

    def noise_scale(self, resnet: Any, number: int, y: Tensor) -> Tensor | None:
        if not resnet.inject_noise:
            return None
        return getattr(resnet, f"per_channel_scale{number}").to(device=y.device, dtype=y.dtype)

    def patches(self, coder: Any) -> tuple[int, int]:
        return 1, coder.patch_size


class ConvVideoDecoder(_Coder, VideoDecoder):
    """In place of the forward of upstream's decoder."""

    __slots__ = ()
    blocks, names = "up_blocks", _names(sampling.DepthToSpaceUpsample)

    def why_not_given(self, coder: Any, x: Tensor) -> str | None:
        if type(x) is not Tensor or not _CASTS:
            return super().why_not_given(coder, x)
        dtype = _weights_dtype(coder)
        return None if dtype == torch.bfloat16 else f"the decoder's weights are {dtype}; accepted: torch.bfloat16"

    def conditioned(self, coder: Any) -> bool:
        return coder.timestep_conditioning

    def draws(self, coder: Any) -> bool:
        return coder.timestep_conditioning or super().draws(coder)  # noise on the latents

    def causal(self, coder: Any, *args: Any, **kwargs: Any) -> bool:
        return coder.causal

    def coded(
        self,
        coder: Any,
        sample: Tensor,
        timestep: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        dtype, device = sample.dtype, sample.device
        if _CASTS:
            sample = sample.to(_weights_dtype(coder))
        if coder.timestep_conditioning:
            noise = torch.randn(sample.size(), generator=generator, dtype=sample.dtype, device=device)
            sample = noise * coder.decode_noise_scale + (1.0 - coder.decode_noise_scale) * sample
        sample = coder.per_channel_statistics.un_normalize(sample)
        scaled = None
        if coder.timestep_conditioning:
            if timestep is None:
                timestep = torch.full((sample.shape[0],), coder.decode_timestep, device=device, dtype=sample.dtype)
            scaled = timestep * coder.timestep_scale_multiplier.to(sample)
        causal = coder.causal
        video = self.after_first(coder, lambda: coder.conv_in(sample, causal=causal), scaled, causal, generator)
        return video.to(dtype) if _CASTS else video

    def values_of_block(self, block: Any, timestep: Any, x: Tensor) -> Any:
        """[B, n, 1, 1, 1] by the block's own embedder; None where it has none."""
        if block is None or not block.timestep_conditioning:
            return None
        return _embedded(block.time_embedder, timestep, x)

    def values_of_resnet(self, resnet: Any, of_block: Any, x: Tensor) -> Values:
        return _values(resnet.scale_shift_table, of_block, x) if resnet.timestep_conditioning else (None,) * 4

    def last_values(self, coder: Any, timestep: Any, x: Tensor) -> Values:
        if not coder.timestep_conditioning:
            return (None,) * 2
        return _values(coder.last_scale_shift_table, _embedded(coder.last_time_embedder, timestep, x), x)


class VideoEncoder(_Coder, video_encoder.VideoEncoder):
    """In place of the forward of upstream's encoder."""

    __slots__ = ()
    blocks, names = "down_blocks", _names(sampling.SpaceToDepthDownsample)

    def why_stock(self, coder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if (reason := super().why_stock(coder, args, kwargs)) is not None:
            return reason
        if coder.latent_log_var != LogVarianceType.UNIFORM:
            return f"the encoder's latent_log_var is {coder.latent_log_var}; accepted: {LogVarianceType.UNIFORM}"
        factors = getattr(coder, "video_scale_factors", None)  # from 1.2.0 on
        frames, each = self._given(args, kwargs).shape[2], 8 if factors is None else factors.time
        if (frames - 1) % each:
            return f"a video of {frames} frames is cropped or refused by the host; accepted: 1 more than {each} * n"
        return None

    def why_not_block(self, stage: Stage) -> str | None:
        conditioned = next((name for name, module in stage.steps if getattr(module, "timestep_conditioning", 0)), None)
        return super().why_not_block(stage) or (conditioned and f"{conditioned} asks for a timestep")

    def causal(self, coder: Any, *args: Any, **kwargs: Any) -> bool:
        return True

    def coded(self, coder: Any, sample: Tensor) -> Tensor:
        x = biased(*self.after_first(coder, lambda: self._first(coder, sample), None, True))
        return coder.per_channel_statistics.normalize(x[:, :-1])  # all but the variance, which upstream drops, too

    def _first(self, coder: Any, video: Tensor) -> Tensor:
        """What the first convolution gives, of patches of the video that are not kept."""
        return coder.conv_in(video_vae.patchify(video, patch_size_hw=coder.patch_size, patch_size_t=1))


def _weights_dtype(decoder: Any) -> torch.dtype:
    return next(decoder.parameters()).dtype


def _embedded(embedder: Any, timestep: Any, x: Tensor) -> Tensor:
    found = embedder(timestep=timestep.flatten(), hidden_dtype=x.dtype)
    return found.view(x.shape[0], found.shape[-1], 1, 1, 1)


def _values(table: Tensor, embedded: Tensor, x: Tensor) -> Values:
    table = table[None, ..., None, None, None].to(device=x.device, dtype=x.dtype)
    return (table + embedded.reshape(x.shape[0], table.shape[1], -1, *embedded.shape[-3:])).unbind(dim=1)


# -- taking over -------------------------------------------------------------------------------------------------------


def accelerate(coder: Any, shared: Model, host: str) -> None:
    """Give the decoder or the encoder the forward above."""
    ours: type[VideoCoder]
    ours, own = (ConvVideoDecoder, HOST_CLASS) if isinstance(coder, HOST_CLASS) else (VideoEncoder, HOST_ENCODER)
    reason = next(_why_it_stays(coder, ours.kind, own, host), None)
    ours.take_over(coder, own, shared, reason)


def _why_it_stays(coder: Any, kind: str, own: Any, host: str) -> Iterator[str]:
    if "_original_forward" in coder.__dict__:
        yield (
            "enable_memory_efficient_decode has replaced the decoder's forward by one that bitfuse does not restate; "
            "ltx-pipelines build it otherwise with memory_efficient=False"
        )
    sources: dict[str, Any] = {}
    for home, paths in (*_HOMES[kind], *_OF_BOTH.items()):
        sources |= functions(home, *paths)
    yield from why_not_stock(coder, own, kind, host, READ, sources)
