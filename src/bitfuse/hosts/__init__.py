"""The front door: find the host of a model, and take over its sites. No numerics and no predicates here.

An adapter of a host (`registry.Host.adapter`) is a module that has

    NAME                        the host and its version, as reports name it
    transformers(target)        the models in it that can be accelerated, as a list
    accelerate(model, handle)   take over every site of one of them, noting each in the handle
    unrecognised(target)        a sentence by the name of each part in which a model should be and none was found
    besides(target)             what else in it can be accelerated, no models, as a list
    accelerate_besides(one, handle)
                                take over one of these; its site, which the handle does not have yet

    look(device)                for `bitfuse doctor`, of all else that the bits depend on: an iterator over (what, "ok"
                                or "note", what was found, what it means, what to do)

An adapter may be without the last four.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from bitfuse.hosts.handle import Handle, Options, lock
from bitfuse.hosts.registry import HOSTS
from bitfuse.hosts.site import Site
from bitfuse.run.swap import modules_in, named

_log = logging.getLogger("bitfuse")
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

    target        a diffusers LTX-2 pipeline: its transformers, text connectors, decoders and video encoder; or an
                  `LTX2VideoTransformer3DModel`, `LTX2TextConnectors` (diffusers 0.37 or newer),
                  `AutoencoderKLLTX2Video` or `LTX2VideoDiffusionDecoderModel` (0.42.1) alone; or an ltx-core
                  `LTXModel`, `X0Model`, video decoder (`VideoDecoder`, in 1.2.0 `ConvVideoDecoder`) or `VideoEncoder`;
                  or an SGLang `LTX2VideoTransformer3DModel`; or, with the node pack for it, a ComfyUI `LTXAVModel` or a
                  ModelPatcher of one
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
    return _begin(target, options)


def accelerated(
    target: Any,
    *,
    strict: bool = False,
    cuda_graph: bool = False,
    keep_text: bool = False,
    audit: int | None = None,
    require: Sequence[str] = (),
) -> Accelerated:
    """`with bitfuse.accelerated(pipe) as handle: ...`: accelerate, and restore at the end of the block.

    The parameters are those of `accelerate`.

    Inside an acceleration that is already in force, whatever its options, it changes nothing. Several threads may be
    inside such blocks of one model: the last one to leave restores it, and none where `accelerate` was called.
    """
    options = Options(strict=strict, cuda_graph=cuda_graph, keep_text=keep_text, audit=audit, require=require)
    return Accelerated(target, options)


class Accelerated:
    """The context manager that `accelerated` returns."""

    def __init__(self, target: Any, options: Options):
        self._target, self._options = target, options
        self._handles: list[Handle] = []  # one for each time that it was entered

    def __enter__(self) -> Handle:
        self._handles.append(_begin(self._target, self._options, user=self))
        return self._handles[-1]

    def __exit__(self, *exception: object) -> None:
        handle = self._handles[-1]
        if len(self._handles) == 1:
            with lock:
                handle.users.discard(self)
                last = not handle.users and not handle.pinned
            if last:
                handle.restore()
        self._handles.pop()


def _begin(target: Any, options: Options, user: Accelerated | None = None) -> Handle:
    """The handle in force, or a new one, for as long as the user is inside its block; without one, until restored.

    The options of an acceleration in force need not be a user's.
    """
    adapter, models = _find(target)
    if adapter is None:
        accepted = ", or ".join(host.accepts for host in HOSTS.values())
        raise TypeError(f"target is a {named(type(target))}; accepted: {accepted}")
    made: Handle | None = None
    try:
        with lock:
            handle = _in_force(models, options, any_part=user is not None)
            if handle is None:
                handle = made = Handle(adapter.NAME, options)
                _take_over(adapter, target, models, handle)
            elif user is None:  # perhaps for another pipeline of the same models
                _take_over_besides(adapter, target, handle, handle.watch)
            if user is None:
                handle.pinned = True
            else:
                handle.users.add(user)  # held weakly: one that never came to be inside is gone by itself
            return handle
    except BaseException:  # an interrupt too, at whichever line: all or nothing
        if made is not None:
            made.finish()
        raise


def _in_force(models: list[Any], options: Options, any_part: bool) -> Handle | None:
    """The handle of these models, if they have one. ValueError where only some have, or where it has other options."""
    for ended in {_active[model] for model in models if model in _active and not _active[model].on}:
        ended.finish()  # restored while a forward was under way, which may go on: it is right either way
    handles = {_active.get(model) for model in models}
    if any_part:
        return next((handle for handle in handles if handle is not None), None)
    if len(handles) > 1:
        done = " and ".join(type(model).__name__ for model in models if model in _active)
        raise ValueError(
            f"a part of target is accelerated already, without the rest: {done}; restore() that, then accelerate it all"
        )
    found = handles.pop()
    if found is not None and found.options != options:
        raise ValueError(
            f"the model is accelerated already, with {found.options}; given {options}; "
            "restore() the first handle before"
        )
    return found


def _take_over(adapter: Any, target: Any, models: list[Any], handle: Handle) -> None:
    from bitfuse.hosts.rehearsal import start_up  # only here: every adapter has imported it, `import bitfuse` not

    for model in models:  # first: what comes now takes 0.2 s, and Triton half a second
        if (parameter := next(model.parameters(), None)) is not None:
            start_up(parameter.device)
    handle.on_restore(functools.partial(_forget, handle))
    for model in models:
        _active[model] = handle
        adapter.accelerate(model, handle)
    unrecognised = adapter.unrecognised(target) if hasattr(adapter, "unrecognised") else {}
    handle.sites += [Site(name, "none", reason) for name, reason in unrecognised.items()]
    _take_over_besides(adapter, target, handle, handle.sites.extend)
    _leave_to_compiler(target, handle)
    handle.watch_sites()
    with contextlib.suppress(TypeError):  # a target that can't be referred to weakly
        of = weakref.ref(target)
        handle.look_again = functools.partial(_look_again, adapter, of, list(map(weakref.ref, models)), handle.models)
    _log.info(
        "bitfuse: %d of %d sites taken over in %s; handle.restore() or BITFUSE=0 switches it off",
        sum(site.declined is None for site in handle.sites),
        len(handle.sites),
        adapter.NAME,
    )


def _besides(adapter: Any, target: Any, handle: Handle) -> list[Any]:
    """What a target has besides its models that can be accelerated, and that the handle does not know yet."""
    there = adapter.besides(target) if hasattr(adapter, "besides") else []
    return [one for one in there if not any(known() is one for known in handle.besides)]


def _take_over_besides(adapter: Any, target: Any, handle: Handle, note: Callable[[list[Site]], None]) -> None:
    """Take these over, each once: `note` is called with the site, and where it raises the handle does not know it."""
    for one in _besides(adapter, target, handle):
        note([adapter.accelerate_besides(one, handle)])
        handle.besides = [known for known in handle.besides if known() is not None] + [weakref.ref(one)]


def _leave_to_compiler(target: Any, handle: Handle) -> None:
    from bitfuse.hosts.part import leave_to_compiler  # only here, as above

    components = getattr(target, "components", None)
    for root in modules_in([target, *(components.values() if isinstance(components, dict) else ())]):
        leave_to_compiler(root, handle)


def _look_again(adapter: Any, target: weakref.ref, models: list[weakref.ref], shared: list[Any]) -> list[Site]:
    """Before a report: what has happened to the target since it was accelerated, as further sites where need be."""
    for model in shared:
        model.left_to_compiler()
    found = target()
    if found is None or not shared:
        return []
    handle = shared[0].handle
    if not handle.on:
        return []
    _leave_to_compiler(found, handle)
    there = adapter.transformers(found)
    now = set(map(id, there))
    gone = [model for reference in models if (model := reference()) is not None and id(model) not in now]
    again = "handle.restore() and accelerate it again"
    sites = [Site(type(model).__name__, "none", f"it is no longer the target's: {again}") for model in gone]
    known = {id(reference()) for reference in models}
    new = [model for model in there if id(model) not in known] + _besides(adapter, found, handle)
    return sites + [
        Site(type(model).__name__, "none", f"it came into the target after that was accelerated: {again}")
        for model in new
    ]


def _forget(handle: Handle) -> None:
    # by the handle: one that held its model would keep 19 billion parameters alive through the registry
    for model in [model for model, active in _active.items() if active is handle]:
        del _active[model]


def _find(target: Any) -> tuple[Any, list[Any]]:
    """The adapter of the target's host, and the models of it; (None, []) where it is no host's."""
    for host in tuple(HOSTS.values()):
        if (host.models or host.package) not in sys.modules:  # then target can't be one of its models
            continue
        try:
            found = host.load()
        except ImportError:  # a version without LTX-2, or without something that it needs
            continue
        models = list({id(model): model for model in found.transformers(target)}.values())  # each once
        if models:
            return found, models
    return None, []
