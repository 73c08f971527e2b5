"""What a linear layer with a LoRA of peft's computes by, so that what it gave for a text may be kept.

Its `forward` was read (`READ`): it adds to its base layer's result that of each active adapter, times a scale. What it
reads is part of what is told here, by version and value. Variants (DoRA) and dropout in training are not: such a layer
computes its text anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from bitfuse.hosts.code import source_hash
from bitfuse.run import memo
from bitfuse.run.memo import Unknown
from bitfuse.run.swap import hooked, named

# `lora.Linear.forward` and `_cast_input_dtype`, by `source_hash`, in peft 0.18.1 to 0.21.2.
READ = {"a15acbef02c65d58", "7b08003f80255062", "6ae421ef719937a2"}


def weights(*layers: Any) -> Hashable:
    """What the results of these linear layers, with a LoRA or without one, depend on besides their input.

    `Unknown` where one can't be looked into, as of `memo.weights`, which this is for layers without a LoRA.
    """
    if not any("base_layer" in layer._modules for layer in layers):
        return memo.weights(*layers)
    found = []
    for layer in layers:
        key = _of_lora(layer) if "base_layer" in layer._modules else memo.weights(layer)
        if type(key) is Unknown:
            return key
        found.append(key)
    return tuple(found)


def _of_lora(layer: Any) -> Hashable:
    kind, inside = type(layer), layer._modules
    if not kind.__module__.startswith("peft.") or not _was_read(kind.forward, getattr(kind, "_cast_input_dtype", None)):
        return Unknown(f"a linear layer of the text is a {named(kind)}, not a source that bitfuse knows")
    if hooked(layer):
        return Unknown(memo.HOOKED)
    disabled, merged = layer._disable_adapters, tuple(layer.merged_adapters)
    if disabled and merged:
        return Unknown("a LoRA for the text is switched off, and is about to be taken out of its weight again")
    found: list[Hashable] = [
        memo.weights(inside["base_layer"]),
        merged,
        getattr(layer, "cast_input_dtype_enabled", True),
    ]
    for adapter in () if disabled or merged else layer.active_adapters:
        if adapter in inside["lora_A"]._modules:
            found += _of_adapter(layer, adapter)
    return next((key for key in found if type(key) is Unknown), tuple(found))


def _of_adapter(layer: Any, adapter: str) -> Iterator[Hashable]:
    down, up, dropout = (layer._modules[name]._modules[adapter] for name in ("lora_A", "lora_B", "lora_dropout"))
    scale = layer.scaling[adapter]
    if adapter in layer.lora_variant:
        yield Unknown(f"a LoRA for the text is of a kind of its own ({type(layer.lora_variant[adapter]).__name__})")
    elif type(scale) not in (int, float):
        yield Unknown(f"the scale of a LoRA for the text is a {type(scale).__name__}")
    elif hooked(dropout) or type(dropout) not in (torch.nn.Identity, torch.nn.Dropout):
        yield Unknown(f"the dropout of a LoRA for the text is a {named(type(dropout))}, or has a hook")
    elif type(dropout) is torch.nn.Dropout and dropout.training and dropout.p:
        yield Unknown("a LoRA for the text drops values at random: the model is in training mode")
    else:
        yield adapter
        yield memo.frozen(scale)
        yield memo.weights(down, up)


@functools.lru_cache(64)
def _was_read(*functions: Callable[..., Any] | None) -> bool:
    return all(function is not None and source_hash(function) in READ for function in functions)
