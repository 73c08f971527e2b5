"""A feed-forward's GELU, into the memory of what it activates: the widest tensor of a block, held once and not twice.

Hosts write it as one module, `F.gelu(self.proj(x), approximate="tanh")`. Whatever the projection is (a LoRA of peft's,
a quantised layer, weights that a host brings to the GPU for the call): what it has returned decides whether it may be
written into. The kernel that computes it is ours where each value of the dtype was seen to be ATen's, else ATen's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.conditions import around, described, watched
from bitfuse.core.kernel import interpreting
from bitfuse.core.originals import gelu_is_pythons
from bitfuse.hosts.part import Model, Part
from bitfuse.hosts.sources import Entry, of_operators, why_not_stock
from bitfuse.ops.gelu import GELU_TANH, in_place
from bitfuse.run.alone import alone
from bitfuse.run.swap import hooked

LEFT_OUT: list[Entry] = [(F, "gelu", "torch.nn.functional.gelu"), *of_operators((GELU_TANH,))]
"""The functions that `GELU` leaves out, besides the host's own."""


class GELU(Part):
    """In place of the forward of a module that has `proj` and activates what that gives."""

    __slots__ = ("_extra", "_short")
    kind = "activation"

    def __init__(self, activation: Any, model: Model):
        super().__init__(activation, model)
        self._extra, self._short = model.handle.extras.gelu, model.handle.extras.short_gelu

    def why_stock(self, activation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if kwargs or len(args) != 1:
            return "it was not called with one tensor, by its place"
        if torch.is_grad_enabled():
            return "gradients are enabled, and may need what the projection gave; torch.no_grad() allows it"
        # whoever is called may look at it later, on another stream say, without holding it
        proj = activation.proj
        if type(proj) is not torch.nn.Linear and not isinstance(proj, torch.nn.Module):
            return f"the projection is {described(proj)}, not a module"
        if hooked(proj) if type(proj) is torch.nn.Linear else any(map(hooked, proj.modules())):
            return (
                "somebody's hook or forward on the projection (offload, layerwise casting) may look at what that gave"
            )
        return next(around(), None) if watched() else None

    def fall(self, reason: str) -> None:
        self._extra.fall(reason)

    def chain(self, activation: Any, projected: Tensor) -> Tensor:
        """The host's own op."""
        return F.gelu(projected, approximate="tanh")

    def approximates(self, activation: Any) -> str:
        return "tanh"

    def fused(self, activation: Any, hidden_states: Tensor) -> Tensor:
        projected = activation.proj(hidden_states)
        if not alone(projected):
            self.fall(_NOT_ALONE if type(projected) is Tensor else f"the projection gave a {type(projected).__name__}")
            return self.chain(activation, projected)
        if gelu_is_pythons(projected.is_cuda):
            self.fall("Python code is registered for PyTorch's gelu")
            return self.chain(activation, projected)
        approximate = self.approximates(activation)
        if approximate == "tanh" and projected.dtype == torch.bfloat16 and _kernels_run(projected):
            route = GELU_TANH.routed(projected)
            if route.fused:
                return in_place(projected).data
            self._short.fall(str(route.reason))
        # `.data`: a tensor of its own, as stock's is. What `F.linear` gives is a view, into which PyTorch lets nobody
        # write with gradients who has it from a `torch.no_grad()`
        return torch.ops.aten.gelu_(projected, approximate=approximate).data


def _kernels_run(t: Tensor) -> bool:
    """Else there is nothing to gain, and nothing to say."""
    return (t.is_cuda or interpreting()) and t.numel() > 0


_NOT_ALONE = (
    "what the projection gave is held by somebody else, or does not lie in PyTorch's memory as a new tensor does"
)


def activate_in_place(
    blocks: Iterable[Any],
    shared: Model,
    host_class: type,
    host: str,
    read: dict[str, set[str]],
    sources: dict[str, Any],
    part: type[GELU] = GELU,
) -> None:
    """Take over the activation of both feed-forwards of these blocks; what stays the host's is named as not used.

    host_class    the class of an activation whose `sources` (code by its name in `read`) were read
    part          restates it
    """
    for block in blocks:
        for feed_forward in (getattr(block, "ff", None), getattr(block, "audio_ff", None)):
            if feed_forward is None:  # a model of one modality
                continue
            activation = next(iter(getattr(feed_forward, "net", ())), None)
            reason = next(why_not_stock(activation, host_class, "activation", host, read, sources), None)
            if reason is None:
                shared.handle.put(activation, part(activation, shared))
            else:
                shared.handle.extras.gelu.fall(reason)
