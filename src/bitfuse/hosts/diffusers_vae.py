"""The decoder of diffusers' LTX-2 video autoencoder (0.38 to 0.42.1): what its convolutions do not do themselves.

The decoder is a row of resnets and upsamplers, each a convolution or two with elementwise ops around it. The forward
below restates the whole row. Between two convolutions stands one operator (`ops/pixel_norm.py`), and from the first
to the last of them all volumes lie in channels_last_3d, as cuDNN's kernels take them (`ops/convolution.py`). Weights
stay as and where they are. None of the decoder's modules is called but its first convolution and the embedders of a
timestep, so the host's own forward runs where one of them has a hook, or is not the host's own.

Tiles, slices and single frames are the host's: `AutoencoderKLLTX2Video` cuts, blends and joins them, and calls the
decoder for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_ltx2 as upstream
from torch import Tensor

from bitfuse.core.conditions import runnable
from bitfuse.hosts.ltx2 import why_gradient
from bitfuse.hosts.part import Model, Part, compiled_sentence
from bitfuse.hosts.rehearsal import Rehearsal
from bitfuse.hosts.site import Site
from bitfuse.hosts.sources import calls_of, entries, functions, of_operators, why_not_stock
from bitfuse.ops.convolution import CONVOLUTION
from bitfuse.ops.pixel_norm import (
    PIXEL_NORM_SILU_PAD,
    RESIDUAL_PAD,
    RESIDUAL_PIXEL_NORM_SILU_PAD,
    UNPATCHIFY,
    UPSAMPLE,
    laid,
)
from bitfuse.run.swap import compiled, hooked, named

_Decoder: Any = upstream.LTX2VideoDecoder3d
_Resnet: Any = upstream.LTX2VideoResnetBlock3d
_Upsampler: Any = getattr(upstream, "LTX2VideoUpsampler3d", None)  # of another name in 0.37
_Convolution: Any = upstream.LTX2VideoCausalConv3d

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
# Height and width of the volume on which kernels are compiled: 512 positions, added up by ATen as in larger volumes
_SMALL = (16, 32)
_OPERATORS = (PIXEL_NORM_SILU_PAD, RESIDUAL_PIXEL_NORM_SILU_PAD, RESIDUAL_PAD, UPSAMPLE, UNPATCHIFY)

# The functions that the forward below leaves out, or calls with other arguments than the host does, besides those that
# the operators' references call.
LEFT_OUT = [
    *entries(upstream, *READ),
    *calls_of(torch.nn.Conv3d, "torch.nn.Conv3d"),
    *calls_of(torch.nn.SiLU, "torch.nn.SiLU"),
    *calls_of(torch.nn.Dropout, "torch.nn.Dropout"),
    (torch.nn.Conv3d, "_conv_forward", "torch.nn.Conv3d._conv_forward"),
    (F, "conv3d", "torch.nn.functional.conv3d"),
    (F, "dropout", "torch.nn.functional.dropout"),
    (torch, "concatenate", "torch.concatenate"),
    (Tensor, "reshape", "torch.Tensor.reshape"),
    *of_operators(_OPERATORS),
]


# -- the modules, in the order in which they are called ----------------------------------------------------------------


def _resnets(decoder: Any) -> Iterator[tuple[str, Any]]:
    """(name, resnet or upsampler) of each, in order."""
    for index, resnet in enumerate(decoder.mid_block.resnets):
        yield f"mid_block.resnets.{index}", resnet
    for number, block in enumerate(decoder.up_blocks):
        for index, upsampler in enumerate(block.upsamplers or ()):
            yield f"up_blocks.{number}.upsamplers.{index}", upsampler
        for index, resnet in enumerate(block.resnets):
            yield f"up_blocks.{number}.resnets.{index}", resnet


def _sites(decoder: Any) -> Iterator[tuple[str, str]]:
    """(name, operator) of each site: before and after each convolution but the first."""
    added = False  # whether a residual is still to be added
    for name, module in _resnets(decoder):
        if isinstance(module, _Resnet):
            before = RESIDUAL_PIXEL_NORM_SILU_PAD if added else PIXEL_NORM_SILU_PAD
            yield f"{name}.norm1", before.name
            yield f"{name}.conv1", CONVOLUTION.name
            yield f"{name}.norm2", PIXEL_NORM_SILU_PAD.name
            yield f"{name}.conv2", CONVOLUTION.name
            added = True
        else:
            yield f"{name}.pad", RESIDUAL_PAD.name
            yield f"{name}.conv", CONVOLUTION.name
            yield f"{name}.upsample", UPSAMPLE.name
            added = False
    yield "norm_out", RESIDUAL_PIXEL_NORM_SILU_PAD.name
    yield "conv_out", CONVOLUTION.name
    yield "unpatchify", UNPATCHIFY.name


def _why_not_own(decoder: Any) -> str | None:
    """Why this decoder is not one whose modules need not be called: the first reason. 100 modules take 0.3 ms."""
    blocks = [("mid_block", decoder.mid_block, upstream.LTX2VideoMidBlock3d)]
    blocks += [(f"up_blocks.{i}", b, upstream.LTX2VideoUpBlock3d) for i, b in enumerate(decoder.up_blocks)]
    for name, block, kind in blocks:
        if (reason := _why_called(name, block, kind)) is not None:
            return reason
        if getattr(block, "conv_in", None) is not None:
            return f"{name} changes the number of channels in a resnet"
        if not len(block.resnets):
            return f"{name} has no resnets"
        if len(getattr(block, "upsamplers", None) or ()) > 1:
            return f"{name} has {len(block.upsamplers)} upsamplers, one after the other; accepted: one"
    for name, module in _resnets(decoder):
        reason = _why_not_resnet(name, module) if type(module) is _Resnet else _why_not_upsampler(name, module)
        if reason is not None:
            return reason
    last = (("norm_out", decoder.norm_out, upstream.PerChannelRMSNorm), ("conv_act", decoder.conv_act, torch.nn.SiLU))
    for name, module, kind in last:
        if (reason := _why_called(name, module, kind)) is not None:
            return reason
    return _why_not_norm("norm_out", decoder.norm_out) or _why_not_convolution("conv_out", decoder.conv_out)


def _why_not_resnet(name: str, resnet: Any) -> str | None:
    if (reason := _why_called(name, resnet, _Resnet)) is not None:
        return reason
    if resnet.norm3 is not None or resnet.conv_shortcut is not None:
        return f"{name} changes the number of channels"
    if resnet.training and resnet.dropout.p:
        return f"{name} is in training mode, with dropout"
    parts = (
        *((norm, upstream.PerChannelRMSNorm) for norm in ("norm1", "norm2")),
        *(("nonlinearity", torch.nn.SiLU), ("dropout", torch.nn.Dropout)),
    )
    for part, kind in parts:
        if (reason := _why_called(f"{name}.{part}", getattr(resnet, part), kind)) is not None:
            return reason
    found = (_why_not_norm(f"{name}.{norm}", getattr(resnet, norm)) for norm in ("norm1", "norm2"))
    found_too = (_why_not_convolution(f"{name}.{conv}", getattr(resnet, conv)) for conv in ("conv1", "conv2"))
    return next((reason for reason in (*found, *found_too) if reason is not None), None)


def _why_not_upsampler(name: str, upsampler: Any) -> str | None:
    if (reason := _why_called(name, upsampler, _Upsampler)) is not None:
        return reason
    parts = torch.Size(upsampler.stride).numel()
    if parts & (parts - 1):
        return f"{name} makes {parts} pixels of one; accepted: a power of two"
    return _why_not_convolution(f"{name}.conv", upsampler.conv)


def _why_not_norm(name: str, norm: Any) -> str | None:
    return None if norm.channel_dim == 1 else f"{name} is over dimension {norm.channel_dim}; accepted: 1"


def _why_not_convolution(name: str, module: Any) -> str | None:
    if (reason := _why_called(name, module, _Convolution)) is not None:
        return reason
    conv = module.conv
    if (reason := _why_called(f"{name}.conv", conv, torch.nn.Conv3d)) is not None:
        return reason
    if module.kernel_size != (3, 3, 3) or (conv.kernel_size, conv.padding) != ((3, 3, 3), (0, 1, 1)):
        return f"the kernel of {name} is {conv.kernel_size}, padded by {conv.padding}; accepted: 3 a side, by 0, 1, 1"
    if conv.padding_mode not in ("zeros", "reflect"):
        return f"{name} pads with {conv.padding_mode!r}; accepted: 'zeros', 'reflect'"
    if (conv.stride, conv.dilation, conv.groups) != ((1, 1, 1), (1, 1, 1), 1):
        return f"{name} has stride {conv.stride}, dilation {conv.dilation}, {conv.groups} groups; accepted: 1 each"
    for label, weight in (("weight", conv.weight), ("bias", conv.bias)):
        if weight is None:
            continue
        if type(weight) is not torch.nn.Parameter or weight.dtype != torch.bfloat16:
            return f"the {label} of {name} is a {named(type(weight))} of {weight.dtype}; accepted: of torch.bfloat16"
        if not weight.is_contiguous():
            return f"the {label} of {name} is not contiguous: with it the host's own volumes lie otherwise in memory"
    return None


def _why_called(name: str, module: Any, kind: type) -> str | None:
    """Why this module must be called: it is not the host's own, or somebody listens."""
    if type(module) is not kind:
        return f"{name} is a {named(type(module))}, not {named(kind)}"
    if hooked(module):
        return f"a hook is attached to {name}, which is not called when the decoder is fused"
    return None


# -- the forward -------------------------------------------------------------------------------------------------------


@dataclass
class _Pending:
    """A volume whose last summands are not added yet: the operator that reads it next adds them."""

    y: Tensor
    bias: Tensor | None = None
    noise: Tensor | None = None
    noise_scale: Tensor | None = None
    residual: Tensor | None = None

    def taken(self) -> tuple[Any, ...]:
        """(y, residual, bias, noise, noise_scale), which are not held here any more: their memory is used again."""
        found = self.y, self.residual, self.bias, self.noise, self.noise_scale
        del self.y, self.residual
        return found


class LTX2VideoDecoder3d(Part):
    """In place of the forward of upstream's decoder.

    named_sites    its sites by their names in it
    refused        by shape of the latents: why the host's own forward runs for them, since an operator was not fused.
                   Beside the fused ones its PyTorch chain costs more than the host's own, for the changes of layout
    """

    __slots__ = ("_rehearsed", "named_sites", "refused")
    kind = "decoder"

    def __init__(self, decoder: Any, model: Model, sites: dict[str, Site]):
        super().__init__(decoder, model, tuple(sites.values()))
        self.named_sites, self._rehearsed = sites, False
        self.refused: dict[torch.Size, str] = {}

    def why_stock(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        x = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(x, Tensor) or x.ndim != 5:
            return "hidden_states is no tensor of five dimensions"
        if type(x) is not Tensor or x.dtype != torch.bfloat16:
            return f"hidden_states is a {named(type(x))} of {x.dtype}; accepted: a plain tensor of torch.bfloat16"
        reason = why_gradient(decoder, args, kwargs) or next(runnable({"hidden_states": x}), None)
        return reason or _why_not_own(decoder) or self._why_not_as_it_was(decoder) or self.refused.get(x.shape)

    def _why_not_as_it_was(self, decoder: Any) -> str | None:
        """The decoder may have more resnets by now than it had when it was taken over."""
        new = next((name for name, _ in _sites(decoder) if name not in self.named_sites), None)
        return None if new is None else f"{new} came into the decoder after that was accelerated"

    def fused(
        self, decoder: Any, hidden_states: Tensor, temb: Tensor | None = None, causal: bool | None = None
    ) -> Tensor:
        causal = causal or decoder.is_causal
        if not self._rehearsed:
            self._rehearsed = True
            self._rehearse(decoder, hidden_states, causal)
        x = decoder.conv_in(hidden_states, causal=causal)
        reason = _why_laid_otherwise(x)
        if reason is None:
            before = self._fallen()
            try:
                found = self._from(decoder, laid(x), temb, causal)
                if (fallen := self._fallen() - before).total():
                    because = (
                        f"partly fused, the decoder is slower than diffusers' own; not fused: {next(iter(fallen))}"
                    )
                    self.refused[hidden_states.shape] = because
                return found
            except torch.OutOfMemoryError:
                if _is_noisy(decoder):  # the random numbers of another try would be others
                    raise
            # a proof holds more at once than the host's own forward does
            reason = "the device ran out of memory in the fused decoder"
        del x
        self.fall(reason)
        return self.stock(hidden_states, temb, causal)

    def _fallen(self) -> Counter[str]:
        """Calls of operators that ran PyTorch's chain so far, by the reason. A convolution that does costs little."""
        sites = [site for site in self.sites if site.operator != CONVOLUTION.name]
        found: Counter[str] = Counter()
        for site in sites:
            found.update(site.fallen)
        return found

    def _rehearse(self, decoder: Any, hidden_states: Tensor, causal: bool) -> None:
        """Compile the kernels side by side, as they are found in a decode of one small frame of zeros.

        One after the other 15 kernels took 8 s (H200, 2026-11-29). None of the decoder's modules is called.
        """
        strict = any(site.strict for site in self.sites)
        if not hidden_states.is_cuda or strict or decoder.time_embedder is not None or _is_noisy(decoder):
            return
        channels = decoder.conv_in.conv.out_channels
        small = hidden_states.new_zeros(1, channels, 1, *_SMALL)
        Rehearsal(decoder, self.sites)(lambda: self._from(decoder, laid(small), None, causal))

    def _from(self, decoder: Any, x: Tensor, temb: Tensor | None, causal: bool) -> Tensor:
        """The decode from the first convolution's result on."""
        pending = _Pending(x)
        del x
        if decoder.timestep_scale_multiplier is not None:
            temb = temb * decoder.timestep_scale_multiplier
        of_block = _embedded(decoder.mid_block, temb, pending.y)
        for index, resnet in enumerate(decoder.mid_block.resnets):
            pending = self._resnet(f"mid_block.resnets.{index}", resnet, pending, of_block, causal)
        for number, block in enumerate(decoder.up_blocks):
            of_block = _embedded(block, temb, pending.y)
            for index, upsampler in enumerate(block.upsamplers or ()):
                pending = self._upsampler(f"up_blocks.{number}.upsamplers.{index}", upsampler, pending, causal)
            for index, resnet in enumerate(block.resnets):
                pending = self._resnet(f"up_blocks.{number}.resnets.{index}", resnet, pending, of_block, causal)

        scale, shift = None, None
        if decoder.time_embedder is not None:
            embedded: Any = _embedded(decoder, temb, pending.y)
            embedded = embedded.unflatten(1, (2, -1))
            shift, scale = (embedded + decoder.scale_shift_table[None, ..., None, None, None]).unbind(dim=1)
        _, padded = self._norm("norm_out", decoder.norm_out, pending, decoder.conv_out, causal, scale, shift)
        last = self._convolve("conv_out", padded, decoder.conv_out)
        del padded
        return self._call("unpatchify", UNPATCHIFY, last.y, last.bias, decoder.patch_size_t, decoder.patch_size)

    def _resnet(self, name: str, resnet: Any, pending: _Pending, temb: Any, causal: bool) -> _Pending:
        scale_1, shift_1, scale_2, shift_2 = None, None, None, None
        if resnet.scale_shift_table is not None:
            table = resnet.scale_shift_table[None, ..., None, None, None]
            shift_1, scale_1, shift_2, scale_2 = (temb.unflatten(1, (4, -1)) + table).unbind(dim=1)
        x, padded = self._norm(f"{name}.norm1", resnet.norm1, pending, resnet.conv1, causal, scale_1, shift_1)
        pending = self._convolve(f"{name}.conv1", padded, resnet.conv1)
        del padded
        _add_noise(pending, resnet.per_channel_scale1)
        _, padded = self._norm(f"{name}.norm2", resnet.norm2, pending, resnet.conv2, causal, scale_2, shift_2)
        pending = self._convolve(f"{name}.conv2", padded, resnet.conv2)
        _add_noise(pending, resnet.per_channel_scale2)
        pending.residual = x
        return pending

    def _upsampler(self, name: str, upsampler: Any, pending: _Pending, causal: bool) -> _Pending:
        front, back, edge = _padding(upsampler.conv, causal)
        padded = self._call(f"{name}.pad", RESIDUAL_PAD, *pending.taken(), front, back, edge)
        residual = None
        if upsampler.residual:
            frames, height, width = padded.shape[2:]
            residual = padded[:, :, front : frames - back, edge : height - edge, edge : width - edge]
        found = self._convolve(f"{name}.conv", padded, upsampler.conv)
        del padded
        return _Pending(self._call(f"{name}.upsample", UPSAMPLE, found.y, residual, found.bias, *upsampler.stride))

    def _norm(
        self,
        name: str,
        norm: Any,
        pending: _Pending,
        conv: Any,
        causal: bool,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(x, what the next convolution reads)."""
        y, residual, bias, noise, noise_scale = pending.taken()
        rest = (bias, noise, noise_scale, scale, shift, *_padding(conv, causal), norm.eps)
        if residual is not None:
            x, padded = self._call(name, RESIDUAL_PIXEL_NORM_SILU_PAD, y, residual, *rest)
            return x, padded
        return y, self._call(name, PIXEL_NORM_SILU_PAD, y, *rest)

    def _convolve(self, name: str, padded: Tensor, module: Any) -> _Pending:
        conv = module.conv
        padding = conv.padding if conv.padding_mode == "zeros" else (0, 0, 0)
        y, *bias = self._call(name, CONVOLUTION, padded, conv.weight, conv.bias, conv.stride, padding)
        return _Pending(y, *bias)

    def _call(self, name: str, operator: Any, *args: Any) -> Any:
        return self.named_sites[name].call(operator, *args)


def _why_laid_otherwise(x: Any) -> str | None:
    """Why the host's own volumes are not contiguous ones, seen by what its first convolution gave.

    PyTorch hands a layout on from op to op, and in another ATen adds up the channels in another order. It comes from
    the latents, be they dense or a tile, or from that convolution's weight. Strides tell, of sides of 1 as well.
    """
    if not isinstance(x, Tensor) or x.ndim != 5:
        return "conv_in gave no tensor of five dimensions"
    if type(x) is not Tensor or x.dtype != torch.bfloat16:
        return f"conv_in gave a {named(type(x))} of {x.dtype}; accepted: a plain tensor of torch.bfloat16"
    if x.stride() != torch.empty(x.shape, device="meta").stride():
        return f"conv_in gave a volume with strides {x.stride()}, not contiguous, and so are the host's own after it"
    return None


def _is_noisy(decoder: Any) -> bool:
    return any(getattr(module, "per_channel_scale1", None) is not None for _, module in _resnets(decoder))


def _padding(conv: Any, causal: bool) -> tuple[int, int, int]:
    """(frames in front, frames behind, pixels at each edge) that a convolution of three a side adds by itself."""
    front, back = (2, 0) if causal else (1, 1)
    return front, back, 1 if conv.conv.padding_mode == "reflect" else 0


def _embedded(block: Any, temb: Tensor | None, x: Tensor) -> Tensor | None:
    """The timestep's values [B, n, 1, 1, 1] for a block, by its own embedder; what came in where it has none."""
    if block.time_embedder is None or temb is None:
        return temb
    found = block.time_embedder(
        timestep=temb.flatten(), resolution=None, aspect_ratio=None, batch_size=x.size(0), hidden_dtype=x.dtype
    )
    return found.view(x.size(0), -1, 1, 1, 1)


def _add_noise(pending: _Pending, noise_scale: Tensor | None) -> None:
    if noise_scale is not None:
        y = pending.y
        pending.noise = torch.randn(y.shape[-2:], generator=None, device=y.device, dtype=y.dtype)[None]
        pending.noise_scale = noise_scale


# -- taking over -------------------------------------------------------------------------------------------------------


def accelerate(vae: Any, shared: Model, host: str) -> None:
    """Give the decoder of an `AutoencoderKLLTX2Video` the forward above."""
    decoder = vae.decoder
    sources = functions(upstream, *READ)
    reason = next(why_not_stock(decoder, _Decoder, "decoder", host, READ, sources), None)
    if not isinstance(decoder, _Decoder) and compiled(decoder):  # a module around it
        reason = compiled_sentence("decoder")
    if reason is not None:
        shared.handle.sites.append(Site("decoder", PIXEL_NORM_SILU_PAD.name, reason))
        return
    sites = {name: Site(f"decoder.{name}", operator) for name, operator in _sites(decoder)}
    shared.handle.sites += sites.values()
    shared.handle.put(decoder, LTX2VideoDecoder3d(decoder, shared, sites))
