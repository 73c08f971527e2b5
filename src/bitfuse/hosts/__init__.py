"""The front door: find the host of a model, and take over its sites. No numerics and no predicates here."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import weakref
from collections.abc import Sequence
from typing import Any

from bitfuse.hosts.patch import Handle, Options, named

_log = logging.getLogger("bitfuse")
# An adapter has NAME, transformers(target) -> list of models to be accelerated, and accelerate(model, handle).
# By a module of the host that has been imported where there is a model of it.
_ADAPTERS = {
    "diffusers": "diffusers",
    "ltx_core": "ltx_core",
    "sglang.multimodal_gen.runtime.models.dits.ltx_2": "sglang",
}
_ACCEPTED = (
    "a diffusers LTX-2 pipeline or LTX2VideoTransformer3DModel or LTX2TextConnectors, "
    "or an ltx-core LTXModel or X0Model, or an SGLang LTX2VideoTransformer3DModel"
)
_active: weakref.WeakKeyDictionary[Any, Handle] = weakref.WeakKeyDictionary()


def accelerate(
    target: Any,
    *,
    strict: bool = False,
    cuda_graph: bool = False,
    keep_text: bool = False,
    audit: int | None = None,
    require: Sequence[str] = (),
) -> Handle:
    """Run the elementwise chains of an LTX-2 model through fused kernels, in place, with the same bits.

    target        a diffusers LTX-2 pipeline: its transformers and text connectors; or an `LTX2VideoTransformer3DModel`
                  or `LTX2TextConnectors` alone (diffusers 0.37 or newer); or an ltx-core `LTXModel` or `X0Model`; or
                  an SGLang `LTX2VideoTransformer3DModel`
    strict        raise `NotFused` where something would fall back to the PyTorch chain
    cuda_graph    replay the transformer's whole forward as one CUDA graph, from the third call of a shape on
    keep_text     LTX-2.0: keep the text's projections, keys and values from step to step (1.2 GB for a prompt of
                  1024 tokens). Only where no weight is written through `.data` meanwhile, as peft does when it merges
                  a LoRA: PyTorch counts no version for that, so such a write would not be noticed
    audit         compute one fused call in so many again with the PyTorch chain, and compare every bit, without
                  waiting for the device (`audit=64`, say). The report counts; a mismatch warns (`BitfuseWarning`) and
                  takes that kernel out of use. Replays of a CUDA graph run no Python and are not audited
    require       names of operators and sites, as in the report, or patterns with `*`: raise `NotFused` where one of
                  these would fall back or was left alone

    No weight is copied and no module replaced: state-dict keys, LoRA, hooks and `set_attention_backend` keep
    working. Each kernel is proved against the PyTorch chain in this process before its first use; whatever
    can't be fused runs the PyTorch chain, and the handle's `report()` says why. `handle.restore()` undoes it.
    Accelerating a model again returns the handle that is in force; ValueError where that was made with other options,
    or for a part of a pipeline only, where an option is bad, and where `require` names nothing of this model. Raises
    TypeError for any other target.
    """
    options = Options(strict=strict, cuda_graph=cuda_graph, keep_text=keep_text, audit=audit, require=require)
    return _accelerate(target, options)


def accelerated(target: Any, **options: Any) -> contextlib.AbstractContextManager[Handle]:
    """`with bitfuse.accelerated(pipe) as handle: ...`: accelerate, and restore at the end of the block.

    options    those of `accelerate`

    Inside an acceleration that is already in force it changes nothing, and leaves that one in force.
    """
    wanted = Options(**options)
    outer = next((_active[model] for model in _find(target)[1] if model in _active), None)
    return _accelerate(target, wanted) if outer is None else contextlib.nullcontext(outer)


def _accelerate(target: Any, options: Options) -> Handle:
    adapter, models = _find(target)
    if adapter is None:
        raise TypeError(f"target is a {named(type(target))}; accepted: {_ACCEPTED}")
    handles = {_active.get(model) for model in models}
    if len(handles) > 1:
        done = " and ".join(type(model).__name__ for model in models if model in _active)
        raise ValueError(
            f"a part of target is accelerated already, without the rest: {done}; restore() that, then accelerate it all"
        )
    handle = handles.pop()
    if handle is not None:
        if handle.options != options:
            raise ValueError(
                f"the model is accelerated already, with {handle.options}; given {options}; "
                "restore() the first handle before"
            )
        return handle

    handle = Handle(adapter.NAME, options)
    handle.on_restore(functools.partial(_forget, handle))
    try:
        for model in models:
            adapter.accelerate(model, handle)
            _active[model] = handle
        handle.watch_sites()
    except BaseException:
        handle.restore()
        raise
    _log.info(
        "bitfuse: %d of %d sites taken over in %s; handle.restore() or BITFUSE=0 switches it off",
        sum(site.declined is None for site in handle.sites),
        len(handle.sites),
        adapter.NAME,
    )
    return handle


def _forget(handle: Handle) -> None:
    # by the handle: one that held its model would keep 19 billion parameters alive through the registry
    for model in [model for model, active in _active.items() if active is handle]:
        del _active[model]


def _find(target: Any) -> tuple[Any, list[Any]]:
    """The adapter of the target's host, and the models of it; (None, []) where it is no host's."""
    for package, adapter in _ADAPTERS.items():
        if package not in sys.modules:  # then target can't be one of its models
            continue
        try:
            found = importlib.import_module(f"bitfuse.hosts.{adapter}")
        except ImportError:  # a version without LTX-2, or without something that it needs
            continue
        if models := found.transformers(target):
            return found, models
    return None, []
