"""Modules whose weights are elsewhere until they are called: offload and layerwise casting of diffusers and accelerate.

A norm of queries or keys is not called where it is fused; only its weight is read. Where a hook brings that weight when
the norm is called, and takes it away afterwards, the norm has to be called after all: `weight_of` calls it with `Asked`
in place of its input, so that every hook runs as it would in stock, and the innermost forward, which is ours, answers
with the weight. Nothing else about such a call differs from stock's, and the order of the calls, by which diffusers
prefetches weights, stays the same.

That is done for hooks alone of which it is known, by class and source, that they move or cast weights and look at
nothing else (`who_else`). Any other hook would see a call without an input.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import torch
from torch import Tensor

from bitfuse.hosts.code import source_hash
from bitfuse.hosts.handle import Handle
from bitfuse.run.swap import Forward, hooked, hooked_by_torch, innermost, named, places

# By `source_hash`: the class's `pre_forward` and `post_forward`, None where it has none of its own. Read in diffusers
# 0.38 to 0.42.1 and accelerate 1.0.1 to 1.15.0.
KNOWN: dict[tuple[str, str], set[tuple[str | None, str | None]]] = {
    ("diffusers.hooks.group_offloading", "GroupOffloadingHook"): {("c3200498a7a616e2", "8eaa4b4ba4dd0073")},
    ("diffusers.hooks.group_offloading", "LayerExecutionTrackerHook"): {("c8807d2a7154bdd8", None)},
    ("diffusers.hooks.layerwise_casting", "LayerwiseCastingHook"): {("82a23c959c791030", "9a0f9ca3030eeb6a")},
    ("accelerate.hooks", "AlignDevicesHook"): {
        ("29fa120ff6c76272", "0c86ad3fefd4fa7f"), ("29fa120ff6c76272", "15067caf8ddfeac8"),
        ("29fa120ff6c76272", "92374175927d53a9"), ("31a01a3fc3d1c76e", "078f36b1aee17362"),
        ("c3a0a502e201cad5", "078f36b1aee17362"),
    },
}  # fmt: skip


class Asked:
    """What a module is called with in place of its input, where it is asked for its weight."""


class Answering(Forward):
    """A norm's innermost forward: it answers `Asked` with the weight that hooks have brought, and else runs stock's."""

    __slots__ = ("_handle",)

    def __init__(self, module: torch.nn.Module, handle: Handle):
        super().__init__(module)
        self._handle = handle

    @property
    def ended(self) -> bool:
        return not self._handle.on

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and type(args[0]) is Asked:
            # An alias: what was brought stays until the kernel that reads it was launched, whoever lets go of it
            weight = self.module.weight
            # a gradient goes through the alias to the weight, as through the norm in stock
            return weight.view_as(weight) if torch.is_grad_enabled() else weight.detach()
        return self.stock(*args, **kwargs)


def install(module: torch.nn.Module, handle: Handle) -> None:
    """Have this module answer, until the handle is restored. Where somebody has wrapped its forward it does not."""
    if innermost(module) is not None:
        handle.put(module, Answering(module, handle))


def who_else(module: torch.nn.Module) -> str | None:
    """The class of who else is called with this module, and not known to only move or cast weights, so that it can not
    be asked; "" for who has none, a hook of PyTorch's or a wrapper; None where there is nobody."""
    found = module.__dict__
    if hooked_by_torch(module):
        return ""
    if "weight" not in found["_parameters"]:  # it can't be looked at before a hook has brought what it is made of
        return "its weight is computed at each call, by a parametrization say"
    if not any(isinstance(held.get(name), Answering) for held, name in places(module)):
        return ""
    forward = found.get("forward")
    references = list(getattr(found.get("_diffusers_hook"), "_fn_refs", ()))
    while not isinstance(forward, Answering):  # from the outermost hook inwards
        maker = getattr(getattr(forward, "func", None), "__module__", None)
        if maker == "diffusers.hooks.hooks" and references:
            reference = references.pop()
            hook = getattr(reference.pre_forward, "__self__", None)
            if not _moves(hook, reference.pre_forward, reference.post_forward):
                return named(type(hook))
            if reference.original_forward is not None:
                return f"{named(type(hook))}, which runs it in a way of its own"
            forward = reference.forward
        elif maker == "accelerate.hooks" and "_old_forward" in found:
            hook = found["_hf_hook"]
            for one in getattr(hook, "hooks", [hook]):
                if not _moves(one, one.pre_forward, one.post_forward):
                    return named(type(one))
            forward = found["_old_forward"]
        else:
            return ""
    return None


def _moves(hook: Any, before: Any, after: Any) -> bool:
    """Whether this hook is one of `KNOWN`, and runs its class's own code."""
    kind: Any = type(hook)
    own = getattr(kind, "pre_forward", None), getattr(kind, "post_forward", None)
    running = getattr(before, "__func__", None), getattr(after, "__func__", None)
    return None not in own and running == own and _known(kind, *own)


@functools.lru_cache(256)
def _known(kind: type, *functions: Any) -> bool:
    module = sys.modules.get(kind.__module__)
    if getattr(module, kind.__name__, None) is not kind:
        return False
    own = (source_hash(_within(f)) if name in vars(kind) else None for f, name in zip(functions, _BOTH, strict=True))
    return tuple(own) in KNOWN.get((kind.__module__, kind.__name__), ())


_BOTH = ("pre_forward", "post_forward")


def _within(function: Any) -> Any:
    """The function itself, also where accelerate keeps torch.compile from it: by PyTorch's wrapper, or from 1.14 on by
    its own, `_compiler_disable`."""
    inner, code = getattr(function, "__wrapped__", None), getattr(function, "__code__", None)
    of_torch = code is not None and code.co_filename.startswith(os.path.dirname(torch.__file__) + os.sep)
    return inner if inner is not None and (of_torch or source_hash(function) == "96a6052c7ec77a28") else function


def weight_of(module: Any) -> Tensor:
    """The module's weight; where hooks bring it, as they bring it in a call of the module, and theirs again after it.

    A weight that was brought by another CUDA stream is marked as used by this one: its memory would else be given out
    again before the kernel that reads it has run.
    """
    found = module.__dict__
    if ("_hf_hook" not in found and "_diffusers_hook" not in found) or not hooked(module):
        return module.weight  # diffusers' registry stays where its hooks are gone
    weight = module(Asked())
    if weight.is_cuda:
        weight.record_stream(torch.cuda.current_stream(weight.device))
    return weight
