# SPDX-License-Identifier: GPL-3.0-or-later
"""The blocks of one forward as one CUDA graph: what comes before and after them is a few kernels, and stays as it is.

Before the blocks ComfyUI looks at values on the CPU (masks, guides) and makes tables there, which can't be captured.
The blocks themselves are nothing but kernels, as long as all weights are on the GPU and nobody else takes part. With
anything else among the transformer's options they run without a graph, and the report says why.
"""

from __future__ import annotations

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
    reference = weakref.ref(ours)

    def forward(video: Tensor, audio: Tensor, rest: Any, options: Any) -> Any:
        part: Any = reference()
        x = [video.clone(), audio.clone()]  # blocks may write into them, and a graph's inputs are to stay
        return part.run(x, **_unpacked(rest), transformer_options=dict(options))

    replay = GraphedForward(transformer, forward, settings=lambda: tuple(shared.reasons().items()))
    shared.handle.add_graph(replay)
    casting = upstream.ops.CastWeightBiasOp
    patched = [weakref.ref(module) for module in transformer.modules() if isinstance(module, casting)]

    def run(x: Any, context: Any, attention_mask: Any, timestep: Any, pe: Any, **kwargs: Any) -> Any:
        part: Any = reference()
        options, mask = kwargs.get("transformer_options") or {}, kwargs.get("self_attention_mask")
        if (reason := _why_not(options, mask, patched)) is not None:
            replay.reasons[reason] += 1
            return part.run(x, context, attention_mask, timestep, pe, **kwargs)
        rest = {"context": context, "attention_mask": attention_mask, "timestep": timestep, "pe": pe}
        read = {name: options[name] for name in READ_AS_VALUES if name in options}
        return replay(x[0], x[1], _packed(rest | {"self_attention_mask": mask}), read)

    ours.graph, ours.no_graph = run, replay.reasons
    retire = weakref.WeakMethod(replay.retire)
    shared.handle.on_restore(lambda: (found := retire()) and found("bitfuse was restored"))


def _why_not(options: Any, mask: Any, patched: list[weakref.ref[Any]]) -> str | None:
    """Why the blocks of this forward run without a graph.

    patched    the modules whose weights a LoRA may patch at each call
    """
    if options.get("prefetch_dynamic_vbars"):
        return "the model's weights are streamed (dynamic VRAM), and their addresses change"
    for name, value in options.items():
        if name not in UNREAD and name not in READ_AS_VALUES and not _is_nothing(value):
            return f"transformer_options has {name!r}, which a graph would not follow"
    if isinstance(mask, upstream.model.GuideAttentionMask):
        return "a guide's attention mask takes part, which a graph does not follow"
    if any(module.weight_function or module.bias_function for one in patched if (module := one()) is not None):
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
