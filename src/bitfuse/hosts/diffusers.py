"""diffusers' LTX-2 transformer and text connectors (0.37 to 0.42.1): their attentions, and what is beside the blocks.

Each module that is taken over keeps its class and its place, and gets a `forward` of its own (`bitfuse.run.swap`). An
attention's restates upstream's and its processor's, with Q/K norms, rotary embedding and head gate fused; the processor
stays where it is, and is asked for its attention backend. Ours stand in only for upstream code whose hash is listed
here; any other is left in place, and the report says why. The rest of a block is in `diffusers_block.py`, that of a
connector's block in `diffusers_connectors.py`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers.models import activations
from diffusers.models.transformers import transformer_ltx2 as upstream
from torch import Tensor

from bitfuse.core.conditions import around
from bitfuse.hosts import diffusers_block
from bitfuse.hosts.ltx2 import (
    Entry,
    Model,
    ModelForward,
    Part,
    alone,
    models_in,
    of_operators,
    rotary_difference,
    watched,
    weights_of,
)
from bitfuse.hosts.site import Handle, Site, source_hash, why_norms_are_called, why_not_stock
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.qk_norm import QK_INTERLEAVED_FP32, QK_RMS_NORM, QK_SPLIT_FP32
from bitfuse.ops.rope import INTERLEAVED_FP32, SPLIT_FP32
from bitfuse.run import memo as constant
from bitfuse.run.graphs import graph_forward
from bitfuse.run.memo import Constant, Prelude
from bitfuse.run.swap import hooked, innermost, named, ours_in

NAME = f"diffusers {diffusers.__version__}"

_Attention: Any = upstream.LTX2Attention
_Projection: Any = upstream.PixArtAlphaTextProjection
_GELU: Any = activations.GELU

_OPERATORS = {"split": SPLIT_FP32, "interleaved": INTERLEAVED_FP32}
_QK_OPERATORS = {"split": QK_SPLIT_FP32, "interleaved": QK_INTERLEAVED_FP32}
_HOST_FUNCTIONS = {"split": "apply_split_rotary_emb", "interleaved": "apply_interleaved_rotary_emb"}

# The attentions of a block; the queries and keys of attn2 and audio_attn2, to the text, are normed but not turned.
_ATTENTIONS = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

# Upstream sources that were read and are restated here or in the operators' references (`source_hash`).
_READ = {
    "apply_split_rotary_emb": {"101de9c72dfea98a"},  # 0.37.0 to 0.42.1
    "apply_interleaved_rotary_emb": {"755d35ce421998d4"},  # 0.37.0 to 0.42.1
    "LTX2Attention.forward": {"f6a037079b264fd9"},  # 0.37 to 0.42.1
    "LTX2AudioVideoAttnProcessor": {"9ebca207676df638", "c9aac3cbef11d6dc"},  # 0.37; 0.38 to 0.42.1 (head gates)
    "LTX2PerturbedAttnProcessor": {"4561ef5c659b4df1"},  # 0.38 to 0.42.1
    "projection": {"4d14e462258d31c2"},  # PixArtAlphaTextProjection.forward, 0.37 to 0.42.1
    "GELU.forward": {"3640c152cb8c0d01", "d6728e812cd51ebb"},  # 0.37 to 0.40; 0.41 to 0.42.1
    "GELU.gelu": {"9688d8847aaf631e"},  # 0.37 to 0.42.1
}

# A processor's parameters besides those of LTX2Attention.forward, and whether it projects the values first: gradients
# add up, and LoRA dropout draws, in the order of the projections.
_PROCESSORS: dict[type, tuple[frozenset[str], bool]] = {upstream.LTX2AudioVideoAttnProcessor: (frozenset(), False)}
if hasattr(upstream, "LTX2PerturbedAttnProcessor"):  # from 0.38
    _PERTURBED = frozenset({"perturbation_mask", "all_perturbed"})
    _PROCESSORS[upstream.LTX2PerturbedAttnProcessor] = (_PERTURBED, True)


class Attention(Part):
    """`LTX2Attention.forward` and its processor's `__call__`, with Q/K norms, rotary embedding and head gate fused.

    text    keys and values of a text that is the same at every step, where they are kept (LTX-2.0)
    """

    __slots__ = ("_unchecked", "gate_site", "site", "text")
    kind = "attention"

    def __init__(self, attn: Any, model: Model, site: Site, gate_site: Site, unchecked: bool):
        gated = getattr(attn, "to_gate_logits", None) is not None  # not in 0.37
        super().__init__(attn, model, (site, gate_site) if gated else (site,))
        self.site, self.gate_site = site, gate_site
        self.text: Constant | None = None
        self._unchecked = unchecked  # somebody watched the ops when it was taken over

    def why_stock(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        processor = attn.processor
        found = _PROCESSORS.get(type(processor))
        if found is None:
            return f"its processor is {named(type(processor))}, not one of diffusers' LTX-2 processors"
        if more := kwargs.keys() - found[0] - _SHARED:
            return f"{', '.join(sorted(more))} is given, which {type(processor).__name__} does not take"
        if self._unchecked:
            if watched():
                return next(around(), None)
            if difference := _difference(attn):
                return difference
            self._unchecked = False
        return None

    def fused(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | Tensor | None = None,
    ) -> Tensor:
        processor = attn.processor
        _, values_first = _PROCESSORS[type(processor)]
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            batch, length, _ = context.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])

        to_gate_logits = getattr(attn, "to_gate_logits", None)
        gate_logits = None if to_gate_logits is None else to_gate_logits(hidden_states)
        value: Any = attn.to_v(context) if values_first and self.text is None else None
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and torch.all(perturbation_mask == 0)
        if all_perturbed:
            # spatio-temporal guidance: the values stand in for the attention
            out = attn.to_v(context) if value is None else value
        else:
            query = attn.to_q(hidden_states)
            if self.text is None:
                key = attn.to_k(context)
                value = attn.to_v(context) if value is None else value
            else:
                weights = constant.weights(attn.to_k, attn.to_v)
                key, value = self.text.of(context, weights, lambda text: (attn.to_k(text), attn.to_v(text)))
            query, key = self._norm_and_turn(attn, query, key, query_rotary_emb, key_rotary_emb)
            out = upstream.dispatch_attention_fn(
                query.unflatten(2, (attn.heads, -1)),
                key.unflatten(2, (attn.heads, -1)),
                value.unflatten(2, (attn.heads, -1)),
                attn_mask=attention_mask,
                dropout_p=0.0,
                is_causal=False,
                backend=processor._attention_backend,
                parallel_config=processor._parallel_config,
            )
            out = out.flatten(2, 3).to(query.dtype)
            if perturbation_mask is not None:
                out = torch.lerp(value, out, perturbation_mask)

        if gate_logits is not None:
            out = self.gate_site.call(HEAD_GATE, out, gate_logits)
        return attn.to_out[1](attn.to_out[0](out))

    def _norm_and_turn(
        self,
        attn: Any,
        query: Tensor,
        key: Tensor,
        query_rotary_emb: tuple[Tensor, Tensor] | None,
        key_rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        reason = next(why_norms_are_called(norm_q=attn.norm_q, norm_k=attn.norm_k), None)
        if reason is None:
            norms = (attn.norm_q.weight, attn.norm_k.weight)
            if query_rotary_emb is None:
                return self.site.call(QK_RMS_NORM, query, key, *norms, attn.norm_q.eps)
            own = (None, None) if key_rotary_emb is None else key_rotary_emb
            operator = _QK_OPERATORS[attn.rope_type]
            return self.site.call(operator, query, key, *norms, *query_rotary_emb, *own, attn.norm_q.eps)

        query, key = attn.norm_q(query), attn.norm_k(key)
        self.site.fall(reason)  # the norms; the turns are fused by themselves
        if query_rotary_emb is None:
            return query, key
        operator = _OPERATORS[attn.rope_type]
        return operator(query, *query_rotary_emb), operator(key, *(key_rotary_emb or query_rotary_emb))


_SHARED = frozenset({"hidden_states", "encoder_hidden_states", "attention_mask", "query_rotary_emb", "key_rotary_emb"})


def transformers(target: Any) -> list[Any]:
    """The LTX-2 transformers in a pipeline, then its text connectors; or in the one given; empty when there is none."""
    parts = [target, *_components(target).values()]
    found = models_in(parts, upstream.LTX2VideoTransformer3DModel)
    module = sys.modules.get("diffusers.pipelines.ltx2.connectors")  # not imported: then nothing can be of it
    return found + (models_in(parts, module.LTX2TextConnectors) if module is not None else [])


def unrecognised(target: Any) -> dict[str, str]:
    """Of each part of a pipeline that should be an LTX-2 transformer and holds none, by its name, what it is."""
    parts = {name: part for name, part in _components(target).items() if name.startswith("transformer")}
    return {
        name: f"it is a {named(type(part))}, in which no LTX2VideoTransformer3DModel was found"
        for name, part in parts.items()
        if part is not None and not models_in([part], upstream.LTX2VideoTransformer3DModel)
    }


def _components(target: Any) -> dict[str, Any]:
    components = getattr(target, "components", None)
    return components if isinstance(components, dict) else {}


def accelerate(model: Any, handle: Handle) -> None:
    """Take over every site of one transformer, or of text connectors, noting each in the handle."""
    if not isinstance(model, upstream.LTX2VideoTransformer3DModel):
        from bitfuse.hosts import diffusers_connectors  # only here: it imports diffusers' pipelines

        theirs = diffusers_connectors.ORIGINALS + of_operators(diffusers_connectors.OPERATORS)
        shared = Model(handle, {"attention": _of_attentions(), "block": theirs})
        for name, block in diffusers_connectors.blocks(model):
            _take_over(f"{name}.attn1", block.attn1, shared)
        diffusers_connectors.accelerate(model, shared, NAME)
        ModelForward.install(model, shared)
        return
    of_blocks = diffusers_block.ORIGINALS + of_operators(diffusers_block.OPERATORS)
    left_out = {"attention": _of_attentions(), "block": of_blocks, "activation": _OF_ACTIVATIONS, "projection": []}
    shared = Model(handle, left_out)
    for name, attn in _attentions(model):
        _take_over(name, attn, shared)
    diffusers_block.accelerate(model, shared, NAME)
    if handle.keep_text:
        _keep_text(model, shared)
    _activate_in_place(model, shared)
    ModelForward.install(model, shared)
    if handle.cuda_graph:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

        graph_forward(
            model,
            handle,
            prelude=Prelude if handle.keep_text else None,
            complete=_with_coordinates,
            settings=lambda: (registry.get_active_backend()[0], tuple(shared.reasons().items())),
        )


_USED = (*_OPERATORS.values(), *_QK_OPERATORS.values(), QK_RMS_NORM, HEAD_GATE)


def _of_attentions() -> list[Entry]:
    """The functions that an attention of ours leaves out."""
    found = [(upstream, name, name) for name in _HOST_FUNCTIONS.values()]
    found += [(_Attention, "forward", "LTX2Attention.forward")]
    found += [(kind, "__call__", f"{kind.__name__}.__call__") for kind in _PROCESSORS]
    return found + of_operators(_USED)


_OF_ACTIVATIONS: list[Entry] = [
    *((_GELU, name, f"GELU.{name}") for name in ("forward", "gelu")),
    (activations.F, "gelu", "torch.nn.functional.gelu"),
]


def _with_coordinates(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The coordinates that upstream's forward would make on the CPU, from where a CUDA graph can't copy them."""
    found: dict[str, Any] = {}
    x, y = given.get("hidden_states"), given.get("audio_hidden_states")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return found  # upstream has an error for it
    if given.get("video_coords") is None:
        sizes = (given.get(name) for name in ("num_frames", "height", "width"))
        fps = given.get("fps", 24.0)
        found["video_coords"] = model.rope.prepare_video_coords(x.shape[0], *sizes, x.device, fps=fps)
    if given.get("audio_coords") is None:
        found["audio_coords"] = model.audio_rope.prepare_audio_coords(
            y.shape[0], given.get("audio_num_frames"), y.device
        )
    return found


def _keep_text(model: Any, shared: Model) -> None:
    """In LTX-2.0, where asked for: the text's projections, and every block's keys and values of it."""
    if getattr(model, "prompt_modulation", False) or not model.config.get("use_prompt_embeddings", True):
        return  # the text is modulated anew at every step
    for projection in (model.caption_projection, model.audio_caption_projection):
        known = source_hash(_Projection.forward) in _READ["projection"]
        if known and type(projection) is _Projection and innermost(projection) is not None:
            shared.handle.put(projection, Projection(projection, shared))
    for block in model.transformer_blocks:
        for attn in (block.attn2, block.audio_attn2):
            if isinstance(ours := ours_in(attn), Attention):
                ours.text = Constant.until_restored(shared.handle)


def _activate_in_place(model: Any, shared: Model) -> None:
    """The feed-forwards' GELU, into the memory of its input: the widest tensor of a block, held once and not twice."""
    known = source_hash(_GELU.forward) in _READ["GELU.forward"] and source_hash(_GELU.gelu) in _READ["GELU.gelu"]
    for block in model.transformer_blocks if known else ():
        for feed_forward in (block.ff, block.audio_ff):
            activation = next(iter(getattr(feed_forward, "net", ())), None)
            if type(activation) is _GELU and innermost(activation) and "gelu" not in activation.__dict__:
                shared.handle.put(activation, GELU(activation, shared))


class Projection(Part):
    """`PixArtAlphaTextProjection.forward`, of a text that is the same at every step computed once."""

    __slots__ = ("kept",)
    kind = "projection"

    def __init__(self, projection: Any, model: Model):
        super().__init__(projection, model)
        self.kept = Constant.until_restored(model.handle)

    def fused(self, projection: Any, caption: Tensor) -> Tensor:
        weights = constant.weights(projection.linear_1, projection.linear_2)
        return self.kept.of(caption, weights, lambda caption: _Projection.forward(projection, caption))


class GELU(Part):
    """`GELU.forward`, into the memory of what it activates, where nobody else can hold that."""

    __slots__ = ()
    kind = "activation"

    def why_stock(self, activation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        proj = activation.proj
        if type(proj) is not torch.nn.Linear or "gelu" in activation.__dict__:
            return "its projection or its activation is not the host's own"
        # a gradient needs what proj gives, and so may whoever watches
        if torch.is_grad_enabled() or hooked(proj) or next(around(), None) is not None:
            return "somebody may look at what the projection gave"
        return None

    def fused(self, activation: Any, hidden_states: Tensor) -> Tensor:
        projected = activation.proj(hidden_states)
        if not alone(projected):  # a wrapper of F.linear, say, has kept it
            return activation.gelu(projected)
        return torch.ops.aten.gelu_(projected, approximate=activation.approximate)


def _attentions(model: Any) -> Iterator[tuple[str, Any]]:
    for index, block in enumerate(model.transformer_blocks):
        for name in _ATTENTIONS:
            if (attn := getattr(block, name, None)) is not None:
                yield f"transformer_blocks.{index}.{name}", attn


def _take_over(name: str, attn: Any, model: Model) -> None:
    operator = _QK_OPERATORS.get(attn.rope_type, QK_RMS_NORM) if "attn2" not in name else QK_RMS_NORM
    site = Site(name, operator.name)
    model.handle.sites.append(site)
    unchecked = watched()
    site.declined = next(_why_left_alone(attn), None) or (None if unchecked else _difference(attn))
    gate_site = Site(f"{name}.gate", HEAD_GATE.name, site.declined)
    if getattr(attn, "to_gate_logits", None) is not None:
        model.handle.sites.append(gate_site)
    if site.declined is None:
        model.handle.put(attn, Attention(attn, model, site, gate_site, unchecked))


def _why_left_alone(attn: Any) -> Iterator[str]:
    processor = type(attn.processor)
    if processor not in _PROCESSORS:
        yield f"its processor is {named(processor)}, not one of diffusers' LTX-2 processors"
        return
    if attn.rope_type not in _OPERATORS:
        yield f"its rope_type is {attn.rope_type!r}; known: {', '.join(_OPERATORS)}"
        return
    function = _HOST_FUNCTIONS[attn.rope_type]
    sources = {
        "LTX2Attention.forward": _Attention.forward,
        processor.__name__: processor.__call__,
        function: getattr(upstream, function),
    }
    yield from why_not_stock(attn, _Attention, "attention", NAME, _READ, sources)


def _difference(attn: Any) -> str | None:
    """Why the host's rotary function and bitfuse's reference are not the same, tried in this process."""
    difference = _differs_from_host(attn.rope_type, attn.heads, attn.head_dim, *weights_of(attn))
    if difference is None:
        return None
    return f"{_HOST_FUNCTIONS[attn.rope_type]} of {NAME} and bitfuse's reference part here: {difference}"


@functools.cache
def _differs_from_host(
    rope_type: str, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    host = getattr(upstream, _HOST_FUNCTIONS[rope_type])
    return rotary_difference(
        lambda x, cos, sin: host(x, (cos, sin)),
        _OPERATORS[rope_type],
        rope_type == "interleaved",
        heads,
        head_dim,
        dtype,
        torch.float32,
        device,
    )
