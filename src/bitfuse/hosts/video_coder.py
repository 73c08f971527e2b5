"""The convolutional coders of LTX-2's video autoencoder: what their convolutions do not do themselves.

A coder is its decoder or its encoder: a row of resnets and samplers (the decoder's upsamplers, the encoder's
downsamplers), each a convolution or two with elementwise ops around it. Between two convolutions stands one operator
(`ops/pixel_norm.py`, `depth_to_space.py`, `space_to_depth.py`), and from the first to the last of them all volumes lie
in channels_last_3d, as cuDNN's kernels take them (`convolution.py`). Weights stay as and where they are. None of a
coder's modules is called but its first convolution and the embedders of a timestep, so the host's own forward runs
where one of them has a hook, or is not the host's own.

What both have in common is here; `video_decoder.py` and `video_encoder.py` derive from `VideoCoder`. diffusers and
ltx-core have these coders, with other names and other ops around them: `diffusers_vae.py` and `ltx_core_vae.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core import proof
from bitfuse.core.conditions import ShapeError, around, capturing, runnable
from bitfuse.core.operator import Operator
from bitfuse.core.originals import rerouted
from bitfuse.core.volumes import laid
from bitfuse.hosts.ltx2 import why_gradient
from bitfuse.hosts.part import Model, Part, compiled_sentence
from bitfuse.hosts.rehearsal import Rehearsal
from bitfuse.hosts.site import Site
from bitfuse.hosts.sources import Entry, calls_of, of_operators
from bitfuse.ops.convolution import CONVOLUTION
from bitfuse.ops.pixel_norm import PIXEL_NORM_SILU_PAD, RESIDUAL_PAD, RESIDUAL_PIXEL_NORM_SILU_PAD
from bitfuse.run.swap import compiled, hooked, named

_log = logging.getLogger("bitfuse")

_SHAPES_KEPT = 1024  # that are known to be the host's own forward's, or to have their kernels

# The functions of PyTorch that a coder's forward leaves out, or calls with other arguments than the host does, and
# those that the operators' references call.
LEFT_OUT: list[Entry] = [
    *calls_of(torch.nn.Conv3d, "torch.nn.Conv3d"),
    *calls_of(torch.nn.SiLU, "torch.nn.SiLU"),
    *calls_of(torch.nn.Dropout, "torch.nn.Dropout"),
    (torch.nn.Conv3d, "_conv_forward", "torch.nn.Conv3d._conv_forward"),
    (F, "conv3d", "torch.nn.functional.conv3d"),
    (F, "dropout", "torch.nn.functional.dropout"),
    (torch, "concatenate", "torch.concatenate"),
    (Tensor, "reshape", "torch.Tensor.reshape"),
    *of_operators((PIXEL_NORM_SILU_PAD, RESIDUAL_PIXEL_NORM_SILU_PAD, RESIDUAL_PAD)),
]


@dataclass(frozen=True)
class Names:
    """A host's classes of a coder's modules, and what it calls the things in them.

    sampler         its upsamplers or downsamplers
    given           the argument of the coder's forward that is decoded or encoded
    norm_out        of the coder: its last norm
    nonlinearity    of a resnet: its SiLU
    norm_dim        of a norm: the dimension that it is over
    identities      of a resnet: modules that do nothing where it keeps the number of channels
    """

    resnet: Any
    sampler: Any
    convolution: Any
    norm: Any
    given: str
    norm_out: str
    nonlinearity: str
    norm_dim: str
    identities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One of a coder's blocks: resnets and samplers that share the values of a timestep.

    module, kind    the block itself and the host's class of it; None where a resnet or sampler stands by itself
    steps           (name, resnet or sampler) of each, in the order in which they are called
    """

    name: str
    module: Any
    kind: Any
    steps: list[tuple[str, Any]]


@dataclass
class Pending:
    """A volume whose last summands are not added yet: the operator that reads it next adds them."""

    y: Tensor
    bias: Tensor | None = None
    noise: Tensor | None = None
    noise_scale: Tensor | None = None
    residual: Tensor | None = None

    def taken(self) -> tuple[Any, ...]:
        """(y, residual, bias, noise, noise_scale), which are not held here any more: their memory is used again.

        Where there is no bias it is -0.0, which alters no number in any bit. So a width has one kernel for its first
        norm, after a sampler, and for those after convolutions: one to compile and to prove in place of two.
        """
        bias = self.y.new_full((self.y.shape[1],), -0.0) if self.bias is None else self.bias
        found = self.y, self.residual, bias, self.noise, self.noise_scale
        del self.y, self.residual
        return found


Values = tuple[Tensor | None, ...]


class LaidOtherwise(Exception):
    """The host's own volumes would not be contiguous after the first convolution: why."""


@dataclass
class CoderSite(Site):
    """A site of a coder.

    here    what its sites share, for each thread: `falls`, in a forward, lists (reason, `Route.lasts`) of each call in
            it of an operator that ran PyTorch's chain; `dry`, in a forward without values, stands in for the calls
    """

    here: Any = None

    def fall(self, reason: str, lasts: bool = True) -> None:
        super().fall(reason, lasts)
        falls = getattr(self.here, "falls", None)
        if falls is not None and self.operator != CONVOLUTION.name:  # one that is the host's own costs little
            falls.append((reason, lasts))


@dataclass
class Refusal:
    """That the host's own forward runs for volumes of a shape, since an operator was not fused: why, and until when.

    Beside fused operators the PyTorch chain of one costs more than the host's own coder, for the changes of layout.

    state       what the operators' answers hang on (`VideoCoder._state`): where that has changed they are asked again
    patience    when to ask again in any case, as an error of the moment stood in the way (no memory); None: never
    """

    reason: str
    state: tuple[Any, ...]
    patience: proof.Patience | None = None


class VideoCoder(Part):
    """Base of what stands in place of the forward of a host's decoder or encoder.

    kind           "decoder" or "encoder": the word for it, and the first of its sites' names
    named_sites    its sites by their names in it
    refused        by shape of what is given: why the host's own forward runs for that
    """

    __slots__ = ("_here", "_rehearsed", "named_sites", "refused")
    names: Names
    whose: str  # "diffusers'"
    sampling: Operator  # what follows a sampler's convolution

    def __init__(self, coder: Any, model: Model, sites: dict[str, Site]):
        super().__init__(coder, model, tuple(sites.values()))
        self.named_sites = sites
        self._rehearsed: dict[torch.Size, bool] = {}  # shapes of the first volume whose kernels were compiled
        self._here = next((site.here for site in sites.values() if isinstance(site, CoderSite)), threading.local())
        self.refused: dict[torch.Size, Refusal] = {}

    # -- what a host says of its own --

    @classmethod
    def stages(cls, coder: Any) -> Iterator[Stage]:
        """Its blocks between its first convolution and its last norm, in order."""
        raise NotImplementedError

    def why_not_block(self, stage: Stage) -> str | None:
        """Why this block is not one that is restated, beyond its class and the modules in it."""
        return None

    def why_not_given(self, coder: Any, x: Tensor) -> str | None:
        """Why its volumes are no plain tensors of bf16 where this is given."""
        if type(x) is not Tensor or x.dtype != torch.bfloat16:
            given = self.names.given
            return f"{given} is a {named(type(x))} of {x.dtype}; accepted: a plain tensor of torch.bfloat16"
        return None

    def changes_channels(self, resnet: Any) -> bool:
        """Whether a resnet has a norm and a convolution for its residual."""
        raise NotImplementedError

    def frames_of(self, convolution: Any) -> int:
        """How many frames a convolution's own padding takes its kernel to have."""
        raise NotImplementedError

    def values_of_block(self, block: Any, timestep: Any, x: Tensor) -> Any:
        """The timestep's values for the resnets of this block; x has the batch and the dtype of the volume."""
        return None

    def values_of_resnet(self, resnet: Any, of_block: Any, x: Tensor) -> Values:
        """(shift, scale, shift, scale) of its two norms, [B or 1, C, 1, 1, 1] or None."""
        return (None,) * 4

    def last_values(self, coder: Any, timestep: Any, x: Tensor) -> Values:
        """(shift, scale) of the last norm."""
        return (None,) * 2

    def noise_scale(self, resnet: Any, number: int, y: Tensor) -> Tensor | None:
        """By what the noise after the first or second convolution of a resnet is multiplied; None: there is none."""
        return None

    def causal(self, coder: Any, *args: Any, **kwargs: Any) -> bool:
        """Whether its convolutions see no later frame, for these arguments of the host's forward."""
        raise NotImplementedError

    def coded(self, coder: Any, *args: Any, **kwargs: Any) -> Tensor:
        """What the host's forward gives for these arguments."""
        raise NotImplementedError

    def conditioned(self, coder: Any) -> bool:
        """Whether it asks for a timestep."""
        return False

    def draws(self, coder: Any) -> bool:
        """Whether it draws random numbers."""
        resnets = (module for stage in self.stages(coder) for _, module in stage.steps)
        return any(getattr(module, "per_channel_scale1", None) is not None for module in resnets)

    # -- its sites --

    @classmethod
    def sites_of(cls, coder: Any) -> Iterator[tuple[str, str]]:
        """(name, operator) of each site: before and after each convolution but the first."""
        added = False  # whether a residual is still to be added
        for stage in cls.stages(coder):
            for name, module in stage.steps:
                if isinstance(module, cls.names.resnet):
                    before = RESIDUAL_PIXEL_NORM_SILU_PAD if added else PIXEL_NORM_SILU_PAD
                    yield f"{name}.norm1", before.name
                    yield f"{name}.conv1", CONVOLUTION.name
                    yield f"{name}.norm2", PIXEL_NORM_SILU_PAD.name
                    yield f"{name}.conv2", CONVOLUTION.name
                    added = True
                elif isinstance(module, cls.names.sampler):
                    yield f"{name}.pad", RESIDUAL_PAD.name
                    yield f"{name}.conv", CONVOLUTION.name
                    yield f"{name}.{cls.sampling.name}", cls.sampling.name
                    added = False
        yield cls.names.norm_out, (RESIDUAL_PIXEL_NORM_SILU_PAD if added else PIXEL_NORM_SILU_PAD).name
        yield "conv_out", CONVOLUTION.name

    @classmethod
    def take_over(cls, coder: Any, own: type, shared: Model, reason: str | None) -> None:
        """Give the coder this forward, noting its sites in the handle; or none, for this reason.

        own    the host's class of such coders
        """
        if not isinstance(coder, own) and compiled(coder):  # a module around it
            reason = compiled_sentence(cls.kind)
        if reason is not None:
            shared.handle.sites.append(Site(cls.kind, PIXEL_NORM_SILU_PAD.name, reason))
            return
        here = threading.local()
        sites: dict[str, Site] = {
            name: CoderSite(f"{cls.kind}.{name}", operator, here=here) for name, operator in cls.sites_of(coder)
        }
        shared.handle.sites += sites.values()
        shared.handle.put(coder, cls(coder, shared, sites))

    # -- when the host's own forward must run --

    def why_stock(self, coder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        given, x = self.names.given, self._given(args, kwargs)
        if not isinstance(x, Tensor) or x.ndim != 5:
            return f"{given} is no tensor of five dimensions"
        reason = self.why_not_given(coder, x) or why_gradient(coder, args, kwargs)
        if not x.is_meta:  # where nothing is computed, and each site tells what would be (`bitfuse explain`)
            reason = reason or next(runnable({given: x}), None)
        reason = reason or self._why_not_own(coder)
        return reason or self._why_not_as_it_was(coder) or self._why_refused(coder, x, args, kwargs)

    def _why_refused(self, coder: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        refusal = self.refused.get(x.shape)
        if refusal is None:
            return None
        waits = refusal.patience is None or refusal.patience.waiting
        return refusal.reason if waits and refusal.state == self._state(coder, args, kwargs) else None

    def _state(self, coder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What the way that an operator's call goes may hang on: arguments, weights, settings and hooks. 3 ms."""
        given = [*args, *(kwargs[name] for name in sorted(kwargs))]
        modules = tuple(
            (id(module), hooked(module), _form(getattr(module, "eps", None)), module.training)
            for module in coder.modules()
        )
        found = (*coder.named_parameters(remove_duplicate=False), *coder.named_buffers(remove_duplicate=False))
        weights = tuple((name, _form(weight)) for name, weight in found)
        return (tuple(map(_form, given)), modules, weights, rerouted(True), rerouted(False))

    def _why_not_as_it_was(self, coder: Any) -> str | None:
        """The coder may have more resnets by now than it had when it was taken over."""
        new = next((name for name, _ in self.sites_of(coder) if name not in self.named_sites), None)
        return None if new is None else f"{new} came into the {self.kind} after that was accelerated"

    def _why_not_own(self, coder: Any) -> str | None:
        """Why this coder is not one whose modules need not be called: the first reason. 100 modules take 0.3 ms."""
        norm_out, after = self.names.norm_out, None
        for stage in self.stages(coder):
            reason = None if stage.module is None else self._why_called(stage.name, stage.module, stage.kind)
            if (reason := reason or self.why_not_block(stage)) is not None:
                return reason
            for name, module in stage.steps:
                resnet = type(module) is self.names.resnet
                if not resnet and type(after) is not self.names.resnet:
                    return f"{name} does not come after a resnet"
                reason = self._why_not_resnet(name, module) if resnet else self._why_not_sampler(name, module)
                if reason is not None:
                    return reason
                after = module
        last = getattr(coder, norm_out)
        reasons = (
            self._why_not_norm(norm_out, last),
            self._why_called("conv_act", coder.conv_act, torch.nn.SiLU),
            self._why_not_convolution("conv_out", coder.conv_out),
        )
        return next((reason for reason in reasons if reason is not None), None)

    def _why_not_resnet(self, name: str, resnet: Any) -> str | None:
        if (reason := self._why_called(name, resnet, self.names.resnet)) is not None:
            return reason
        if self.changes_channels(resnet):
            return f"{name} changes the number of channels"
        if resnet.training and resnet.dropout.p:
            return f"{name} is in training mode, with dropout"
        kinds = {self.names.nonlinearity: torch.nn.SiLU, "dropout": torch.nn.Dropout}
        for part, kind in (kinds | dict.fromkeys(self.names.identities, torch.nn.Identity)).items():
            if (reason := self._why_called(f"{name}.{part}", getattr(resnet, part), kind)) is not None:
                return reason
        found = (self._why_not_norm(f"{name}.{norm}", getattr(resnet, norm)) for norm in ("norm1", "norm2"))
        found_too = (self._why_not_convolution(f"{name}.{conv}", getattr(resnet, conv)) for conv in ("conv1", "conv2"))
        return next((reason for reason in (*found, *found_too) if reason is not None), None)

    def _why_not_sampler(self, name: str, sampler: Any) -> str | None:
        if (reason := self._why_called(name, sampler, self.names.sampler)) is not None:
            return reason
        parts = torch.Size(sampler.stride).numel()
        if parts & (parts - 1):
            return f"{name} has a stride of {parts} pixels in all; accepted: a power of two"
        return self._why_not_convolution(f"{name}.conv", sampler.conv)

    def _why_not_norm(self, name: str, norm: Any) -> str | None:
        if (reason := self._why_called(name, norm, self.names.norm)) is not None:
            return reason
        dim = getattr(norm, self.names.norm_dim)
        return None if dim == 1 else f"{name} is over dimension {dim}; accepted: 1"

    def _why_not_convolution(self, name: str, module: Any) -> str | None:
        if (reason := self._why_called(name, module, self.names.convolution)) is not None:
            return reason
        conv = module.conv
        if (reason := self._why_called(f"{name}.conv", conv, torch.nn.Conv3d)) is not None:
            return reason
        if self.frames_of(module) != 3 or (conv.kernel_size, conv.padding) != ((3, 3, 3), (0, 1, 1)):
            return (
                f"the kernel of {name} is {conv.kernel_size}, padded by {conv.padding}; accepted: 3 a side, by 0, 1, 1"
            )
        if conv.padding_mode not in ("zeros", "reflect"):
            return f"{name} pads with {conv.padding_mode!r}; accepted: 'zeros', 'reflect'"
        if (conv.stride, conv.dilation, conv.groups) != ((1, 1, 1), (1, 1, 1), 1):
            return f"{name} has stride {conv.stride}, dilation {conv.dilation}, {conv.groups} groups; accepted: 1 each"
        for label, weight in (("weight", conv.weight), ("bias", conv.bias)):
            if weight is None:
                continue
            what = f"the {label} of {name}"
            if type(weight) is not torch.nn.Parameter or weight.dtype != torch.bfloat16:
                return f"{what} is a {named(type(weight))} of {weight.dtype}; accepted: of torch.bfloat16"
            if not weight.is_contiguous():
                return f"{what} is not contiguous: with it the host's own volumes lie otherwise in memory"
        return None

    def _why_called(self, name: str, module: Any, kind: type) -> str | None:
        """Why this module must be called: it is not the host's own, or somebody listens."""
        if type(module) is not kind:
            return f"{name} is a {named(type(module))}, not {named(kind)}"
        if hooked(module):
            return f"a hook is attached to {name}, which is not called when the {self.kind} is fused"
        return None

    # -- the forward --

    def fused(self, module: Any, *args: Any, **kwargs: Any) -> Tensor:
        falls: list[tuple[str, bool]] = []
        states = self._random_states(module, args, kwargs)
        self._here.falls, start, found = falls, time.perf_counter(), None
        try:
            found = self.coded(module, *args, **kwargs)
        except (LaidOtherwise, ShapeError) as otherwise:  # of shapes that don't fit the host raises its own error
            reason = str(otherwise)
        except torch.OutOfMemoryError:
            # the chain of an operator that is not fused holds more at once than the host's own forward does
            reason = f"the device ran out of memory in the fused {self.kind}"
            falls[:] = [(reason, False)]
        finally:
            self._here.falls = None
        self._refuse(module, args, kwargs, falls, time.perf_counter() - start)
        if found is not None:
            return found
        for generator, state in states:  # the host's own forward draws the same numbers again
            generator.set_state(state)
        self.fall(reason)
        return self.stock(*args, **kwargs)

    def _random_states(
        self, coder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[torch.Generator, Tensor]]:
        """What this call may draw numbers from, and the states before it. A graph's capture has states of its own."""
        x = self._given(args, kwargs)
        if not self.draws(coder) or capturing(x):
            return []
        own = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
        return [(generator, generator.get_state()) for generator in (own, *given)]

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if args else kwargs.get(self.names.given)

    def _refuse(
        self, coder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], falls: list[tuple[str, bool]], seconds: float
    ) -> None:
        """Note whether the host's own forward runs for volumes of this shape, given what fell just now, and how long
        this one took."""
        shape = self._given(args, kwargs).shape
        earlier = self.refused.pop(shape, None)
        if not falls:
            return
        because = f"partly fused, the {self.kind} is slower than {self.whose} own; not fused: {falls[0][0]}"
        refusal = Refusal(because, self._state(coder, args, kwargs))
        if not all(lasts for _, lasts in falls):
            refusal.patience = (earlier and earlier.patience) or proof.Patience()
            refusal.patience.failed(proof.Verdict(False, because, seconds=seconds, final=False))
        proof.remember(self.refused, shape, refusal, _SHAPES_KEPT)

    def _kernels(self, coder: Any, volume: Tensor, causal: bool) -> AbstractContextManager[object]:
        """Inside, the first forward of this shape, its kernels are compiled in threads while it goes on."""
        if getattr(self._here, "dry", None) is not None:
            return nullcontext()
        if volume.shape in self._rehearsed or self.conditioned(coder) or self.draws(coder):
            return nullcontext()
        proof.remember(self._rehearsed, volume.shape, True, _SHAPES_KEPT)
        rehearsal = Rehearsal(coder, ())
        if next(around(), None) is not None or not rehearsal.compiles():
            return nullcontext()
        self._rehearse(rehearsal, coder, volume, causal)
        return rehearsal.compiling()

    def _rehearse(self, rehearsal: Rehearsal, coder: Any, volume: Tensor, causal: bool) -> None:
        """Find the kernels in a forward without values. None of the coder's modules is called, nothing is launched but
        a copy of the first volume, and it holds what a fused forward does."""
        self._here.dry = rehearsal.dry
        try:
            self.after_first(coder, lambda: volume, None, causal)
        except torch.AcceleratorError:
            raise
        except Exception:  # why something can't be fused is said where it is proved, and memory may do for that
            _log.debug("the kernels of a %s could not be found beforehand", self.kind, exc_info=True)
        finally:
            self._here.dry = None

    def after_first(
        self,
        coder: Any,
        first: Callable[[], Tensor],
        timestep: Any,
        causal: bool,
        generator: torch.Generator | None = None,
    ) -> Any:
        """What `_last` makes of what the first convolution gave. `LaidOtherwise` where that is not a contiguous volume.

        first       gives that: it is let go of here, where a caller would hold an argument until this has ended (not in
                    every version of Python), and an encoder's first volume is its largest
        timestep    handed on to `values_of_block` and `last_values`
        generator   of the noise that is injected
        """
        volume = first()
        if (reason := _why_laid_otherwise(volume)) is not None:
            raise LaidOtherwise(reason)
        with self._kernels(coder, volume, causal):
            pending = Pending(laid(volume))
            del volume
            for stage in self.stages(coder):
                of_block = self.values_of_block(stage.module, timestep, pending.y)
                for name, module in stage.steps:
                    if type(module) is self.names.resnet:
                        pending = self._resnet(name, module, pending, of_block, causal, generator)
                    else:
                        pending = self._sampler(name, module, pending, causal)
            norm_out = self.names.norm_out
            values = self.last_values(coder, timestep, pending.y)
            _, padded = self._norm(norm_out, getattr(coder, norm_out), pending, coder.conv_out, causal, values)
            last = self._convolve("conv_out", padded, coder.conv_out)
            del padded
            return self._last(coder, last)

    def _last(self, coder: Any, last: Pending) -> Any:
        """What becomes of what the last convolution gave."""
        raise NotImplementedError

    def _resnet(
        self, name: str, resnet: Any, pending: Pending, of_block: Any, causal: bool, generator: torch.Generator | None
    ) -> Pending:
        values = self.values_of_resnet(resnet, of_block, pending.y)
        x, padded = self._norm(f"{name}.norm1", resnet.norm1, pending, resnet.conv1, causal, values[:2])
        pending = self._convolve(f"{name}.conv1", padded, resnet.conv1)
        del padded
        _add_noise(pending, self.noise_scale(resnet, 1, pending.y), generator)
        _, padded = self._norm(f"{name}.norm2", resnet.norm2, pending, resnet.conv2, causal, values[2:])
        pending = self._convolve(f"{name}.conv2", padded, resnet.conv2)
        _add_noise(pending, self.noise_scale(resnet, 2, pending.y), generator)
        pending.residual = x
        return pending

    def _sampler(self, name: str, sampler: Any, pending: Pending, causal: bool) -> Pending:
        raise NotImplementedError

    def _norm(
        self, name: str, norm: Any, pending: Pending, conv: Any, causal: bool, values: Values
    ) -> tuple[Tensor, Tensor]:
        """(x, what the next convolution reads)."""
        shift, scale = values
        y, residual, bias, noise, noise_scale = pending.taken()
        rest = (bias, noise, noise_scale, scale, shift, *padding_of(conv, causal), norm.eps)
        if residual is not None:
            x, padded = self._call(name, RESIDUAL_PIXEL_NORM_SILU_PAD, y, residual, *rest)
            return x, padded
        return y, self._call(name, PIXEL_NORM_SILU_PAD, y, *rest)

    def _convolve(self, name: str, padded: Tensor, module: Any) -> Pending:
        conv = module.conv
        padding = conv.padding if conv.padding_mode == "zeros" else (0, 0, 0)
        y, *bias = self._call(name, CONVOLUTION, padded, conv.weight, conv.bias, conv.stride, padding)
        return Pending(y, *bias)

    def _call(self, name: str, operator: Any, *args: Any) -> Any:
        dry = getattr(self._here, "dry", None)
        return self.named_sites[name].call(operator, *args) if dry is None else dry(operator, args)


def _form(value: Any) -> Any:
    """Of a tensor what a layout holds of it; of anything else its class, and a plain value itself."""
    if not isinstance(value, Tensor):
        return type(value), value if isinstance(value, (bool, int, float, str)) else None
    try:
        return type(value), value.dtype, value.device, value.shape, value.stride(), value.data_ptr() % 16
    except (RuntimeError, NotImplementedError):  # it has no memory of its own
        return type(value), value.dtype, value.device, value.shape


def _why_laid_otherwise(x: Any) -> str | None:
    """Why the host's own volumes are not contiguous ones, seen by what its first convolution gave.

    PyTorch hands a layout on from op to op, and in another ATen adds up the channels in another order. It comes from
    what is given, be that dense or a tile, or from that convolution's weight. Strides tell, of sides of 1 as well.
    """
    if not isinstance(x, Tensor) or x.ndim != 5:
        return "conv_in gave no tensor of five dimensions"
    if type(x) is not Tensor or x.dtype != torch.bfloat16:
        return f"conv_in gave a {named(type(x))} of {x.dtype}; accepted: a plain tensor of torch.bfloat16"
    if x.stride() != torch.empty(x.shape, device="meta").stride():
        return f"conv_in gave a volume with strides {x.stride()}, not contiguous, and so are the host's own after it"
    return None


def padding_of(conv: Any, causal: bool) -> tuple[int, int, int]:
    """(frames in front, frames behind, pixels at each edge) that a convolution of three a side adds by itself."""
    front, back = (2, 0) if causal else (1, 1)
    return front, back, 1 if conv.conv.padding_mode == "reflect" else 0


def _add_noise(pending: Pending, noise_scale: Tensor | None, generator: torch.Generator | None) -> None:
    if noise_scale is not None:
        y = pending.y
        pending.noise = torch.randn(y.shape[-2:], generator=generator, device=y.device, dtype=y.dtype)[None]
        pending.noise_scale = noise_scale
