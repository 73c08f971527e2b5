"""The front door: find the host of a model, and take over its sites. No numerics and no predicates here."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import weakref
from typing import Any

from bitfuse.hosts.patch import Handle, NotFused

_log = logging.getLogger("bitfuse")
_active: weakref.WeakKeyDictionary[Any, Handle] = weakref.WeakKeyDictionary()


def accelerate(target: Any, *, strict: bool = False, cuda_graph: bool = False, keep_text: bool = False) -> Handle:
    """Run the elementwise chains of an LTX-2 model through fused kernels, in place, with the same bits.

    target        a diffusers LTX-2 pipeline, or an `LTX2VideoTransformer3DModel` (diffusers 0.37 or newer)
    strict        raise `NotFused` where something would fall back to the PyTorch chain
    cuda_graph    replay the whole forward as one CUDA graph, from the third call of a shape on
    keep_text     LTX-2.0: keep the text's projections, keys and values from step to step (1.2 GB for a prompt of
                  1024 tokens). Only where no weight is written through `.data` meanwhile, as peft does when it merges
                  a LoRA: PyTorch counts no version for that, so such a write would not be noticed

    No weight is copied and no module replaced: state-dict keys, LoRA, hooks and `set_attention_backend` keep
    working. Each kernel is proved against the PyTorch chain in this process before its first use; whatever
    can't be fused runs the PyTorch chain, and the handle's `report()` says why. `handle.restore()` undoes it.
    Accelerating a model again returns the handle that is in force; ValueError where that was made with other options.
    Raises TypeError for any other target.
    """
    models = _find(target)
    if not models:
        kind = f"{type(target).__module__}.{type(target).__qualname__}"
        raise TypeError(f"target is a {kind}; accepted: a diffusers LTX-2 pipeline or an LTX2VideoTransformer3DModel")
    if models[0] in _active:
        handle = _active[models[0]]
        if (handle.strict, handle.cuda_graph, handle.keep_text) != (strict, cuda_graph, keep_text):
            raise ValueError(
                f"the model is accelerated already, with strict={handle.strict}, cuda_graph={handle.cuda_graph}, "
                f"keep_text={handle.keep_text}; given strict={strict}, cuda_graph={cuda_graph}, "
                f"keep_text={keep_text}; restore() the first handle before"
            )
        return handle

    from bitfuse.hosts import diffusers as adapter

    handle = Handle(adapter.NAME, strict, cuda_graph, keep_text)
    for model in models:
        adapter.accelerate(model, handle)
        _active[model] = handle
    handle.on_restore(functools.partial(_forget, handle))
    declined = [site for site in handle.sites if site.declined is not None]
    if strict and declined:
        handle.restore()
        raise NotFused(f"{declined[0].name}: {declined[0].declined}")
    for site in handle.sites:
        site.strict = strict
    _log.info(
        "bitfuse: %d of %d sites taken over in %s; handle.restore() or BITFUSE=0 switches it off",
        len(handle.sites) - len(declined),
        len(handle.sites),
        adapter.NAME,
    )
    return handle


def _forget(handle: Handle) -> None:
    # by the handle: one that held its model would keep 19 billion parameters alive through the registry
    for model in [model for model, active in _active.items() if active is handle]:
        del _active[model]


def accelerated(
    target: Any, *, strict: bool = False, cuda_graph: bool = False, keep_text: bool = False
) -> contextlib.AbstractContextManager[Handle]:
    """`with bitfuse.accelerated(pipe) as handle: ...`: accelerate, and restore at the end of the block.

    Inside an acceleration that is already in force it changes nothing, and leaves that one in force.
    """
    outer = next((_active[model] for model in _find(target) if model in _active), None)
    if outer is None:
        return accelerate(target, strict=strict, cuda_graph=cuda_graph, keep_text=keep_text)
    return contextlib.nullcontext(outer)


def _find(target: Any) -> list[Any]:
    if "diffusers" not in sys.modules:  # then target can't be a diffusers model
        return []
    try:
        from bitfuse.hosts import diffusers as adapter
    except ImportError:  # a diffusers without LTX-2
        return []
    return adapter.transformers(target)
