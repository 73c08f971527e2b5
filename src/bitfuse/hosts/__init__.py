"""The front door: find the host of a model, and take over its sites. No numerics and no predicates here."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import weakref
from typing import Any

from bitfuse.hosts.patch import Handle

_log = logging.getLogger("bitfuse")
_active: weakref.WeakKeyDictionary[Any, Handle] = weakref.WeakKeyDictionary()


def accelerate(target: Any) -> Handle:
    """Run an LTX-2 model's rotary embeddings through fused kernels, in place, with the same bits.

    target    a diffusers LTX-2 pipeline, or an `LTX2VideoTransformer3DModel` (diffusers 0.37 or newer)

    No weight is copied and no module replaced: state-dict keys, LoRA, hooks and `set_attention_backend` keep
    working. Each kernel is proved against the PyTorch chain in this process before its first use; whatever
    can't be fused runs the PyTorch chain, and the handle's `report()` says why. `handle.restore()` undoes it.
    Accelerating a model again returns the handle that is in force. Raises TypeError for any other target.
    """
    models = _find(target)
    if not models:
        kind = f"{type(target).__module__}.{type(target).__qualname__}"
        raise TypeError(f"target is a {kind}; accepted: a diffusers LTX-2 pipeline or an LTX2VideoTransformer3DModel")
    if models[0] in _active:
        return _active[models[0]]

    from bitfuse.hosts import diffusers as adapter

    handle = Handle(adapter.NAME)
    for model in models:
        adapter.accelerate(model, handle)
        _active[model] = handle
    handle.on_restore(functools.partial(_forget, handle))
    taken = sum(site.declined is None for site in handle.sites)
    _log.info(
        "bitfuse: %d of %d rotary sites taken over in %s; handle.restore() or BITFUSE=0 switches it off",
        taken,
        len(handle.sites),
        adapter.NAME,
    )
    return handle


def _forget(handle: Handle) -> None:
    # by the handle: one that held its model would keep 19 billion parameters alive through the registry
    for model in [model for model, active in _active.items() if active is handle]:
        del _active[model]


def accelerated(target: Any) -> contextlib.AbstractContextManager[Handle]:
    """`with bitfuse.accelerated(pipe) as handle: ...`: accelerate, and restore at the end of the block.

    Inside an acceleration that is already in force it changes nothing, and leaves that one in force.
    """
    outer = next((_active[model] for model in _find(target) if model in _active), None)
    return accelerate(target) if outer is None else contextlib.nullcontext(outer)


def _find(target: Any) -> list[Any]:
    if "diffusers" not in sys.modules:  # then target can't be a diffusers model
        return []
    try:
        from bitfuse.hosts import diffusers as adapter
    except ImportError:  # a diffusers without LTX-2
        return []
    return adapter.transformers(target)
