# SPDX-License-Identifier: GPL-3.0-or-later
"""The blocks of one forward as one CUDA graph: what comes before and after them is a few kernels, and stays as it is.

Before the blocks ComfyUI looks at values on the CPU (masks, guides) and makes tables there, which can't be captured.
The blocks themselves are nothing but kernels, as long as all weights are on the GPU and nobody else takes part; whatever
else there is among the transformer's options runs them without a graph, and the report says what.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from torch import Tensor

from bitfuse.hosts.part import Model
from bitfuse.run.graphs import GraphedForward

from . import upstream

# Of the transformer's options, those that a block never reads, and those that it reads as plain values.
UNREAD = {
    "callbacks", "cond_or_uncond", "prefetch_dynamic_vbars", "sample_sigmas", "sigmas", "uuids", "wrappers",
}  # fmt: skip
READ_AS_VALUES = ("run_vx", "run_ax", "a2v_cross_attn", "v2a_cross_attn")


def graph_blocks(transformer: Any, ours: Any, shared: Model) -> None:
    """Have the blocks of an accelerated transformer run through a CUDA graph, where one can be made."""
    handle = shared.handle
    reference = weakref.ref(ours)

    def forward(video: Tensor, audio: Tensor, rest: Any, options: Any) -> Any:
        part: Any = reference()
        # They are written in place, which a graph's inputs must not be
        x = [video.clone(), audio.clone()]
        return part.run(x, **_unpacked(rest), transformer_options=dict(options))

    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    replay = GraphedForward(transformer, forward, settings=lambda: tuple(shared.reasons().items()))
    handle.add_graph(replay)

    def run(x: Any, context: Any, attention_mask: Any, timestep: Any, pe: Any, **kwargs: Any) -> Any:
        options = kwargs.get("transformer_options") or {}
        reason = _why_not(options, kwargs, transformer_of=reference)
        if reason is not None:
            replay.reasons[reason] += 1
            return reference().run(x, context, attention_mask, timestep, pe, **kwargs)  # type: ignore[union-attr]
        rest = {"context": context, "attention_mask": attention_mask, "timestep": timestep, "pe": pe}
        rest["self_attention_mask"] = kwargs.get("self_attention_mask")
        read = {name: options[name] for name in READ_AS_VALUES if name in options}
        return replay(x[0], x[1], _packed(rest), read)

    ours.graph = run
    handle.on_restore(lambda: replay.retire("bitfuse was restored"))


def _why_not(options: Any, kwargs: Any, transformer_of: Any) -> str | None:
    if options.get("prefetch_dynamic_vbars"):
        return "the model's weights are streamed (dynamic VRAM), and their addresses change"
    for name, value in options.items():
        if name in UNREAD or name in READ_AS_VALUES or _is_nothing(value):
            continue
        return f"transformer_options has {name!r}, which a graph would not follow"
    if isinstance(kwargs.get("self_attention_mask"), upstream.model.GuideAttentionMask):
        return "a guide's attention mask takes part, which a graph does not follow"
    part = transformer_of()
    for module in part.module.modules() if part is not None else ():
        if getattr(module, "weight_function", None) or getattr(module, "bias_function", None):
            return "a LoRA is applied to weights at each call"
    return None


def _is_nothing(value: Any) -> bool:
    """Whether an option is an empty container, or a dictionary of such: what is left of patches that nobody made."""
    if isinstance(value, dict):
        return all(map(_is_nothing, value.values()))
    return isinstance(value, (list, tuple, set)) and not value


# -- arguments ---------------------------------------------------------------------------------------------------------


def _packed(value: Any) -> Any:
    """A structure of tensors and plain values: a `CompressedTimestep` as a dictionary of what it holds."""
    if isinstance(value, upstream.av_model.CompressedTimestep):
        return {name: getattr(value, name) for name in type(value).__slots__}
    if isinstance(value, dict):
        return {name: _packed(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_packed(one) for one in value)
    return value


def _unpacked(value: Any) -> Any:
    kind = upstream.av_model.CompressedTimestep
    if isinstance(value, dict):
        if value.keys() == set(kind.__slots__):
            found = kind.__new__(kind)
            for name, one in value.items():
                setattr(found, name, one)
            return found
        return {name: _unpacked(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_unpacked(one) for one in value)
    return value
