"""diffusers' LTX-2 transformer and text connectors (0.37 to 0.42.1): their attentions, through processors, and blocks.

A processor is diffusers' own seam: hooks and LoRA sit on the modules around it and keep working, and no weight
or state-dict key is touched. The processors below restate the upstream `__call__`, with the Q/K norms, the rotary
embedding and the head gate fused. They stand in only for upstream code whose hash is listed here; any other is left
in place, and the report says why. The rest of a block is in `diffusers_block.py`, that of a connector's block in
`diffusers_connectors.py`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers.models import activations
from diffusers.models.transformers import transformer_ltx2 as upstream
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from bitfuse.contract import around
from bitfuse.graphs import graph_forward
from bitfuse.hosts import constant, diffusers_block
from bitfuse.hosts.common import rotary_difference, weights_of
from bitfuse.hosts.constant import Constant, Prelude
from bitfuse.hosts.patch import (
    Handle,
    Site,
    Swapped,
    hooked,
    named,
    source_hash,
    swap_class,
    why_norms_are_called,
    why_not_read,
)
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.interleaved_rotary import INTERLEAVED_FP32
from bitfuse.ops.qk_norm import QK_INTERLEAVED_FP32, QK_RMS_NORM, QK_SPLIT_FP32
from bitfuse.ops.split_rotary import SPLIT_FP32

NAME = f"diffusers {diffusers.__version__}"

_Rope: Any = upstream.LTX2AudioVideoRotaryPosEmbed
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
    "LTX2AudioVideoAttnProcessor": {"9ebca207676df638", "c9aac3cbef11d6dc"},  # 0.37; 0.38 to 0.42.1 (head gates)
    "LTX2PerturbedAttnProcessor": {"4561ef5c659b4df1"},  # 0.38 to 0.42.1
    "rope": {"7bc6591c85ff4955"},  # LTX2AudioVideoRotaryPosEmbed.forward, 0.37 to 0.42.1
    "projection": {"4d14e462258d31c2"},  # PixArtAlphaTextProjection.forward, 0.37 to 0.42.1
    "GELU.forward": {"3640c152cb8c0d01", "d6728e812cd51ebb"},  # 0.37 to 0.40; 0.41 to 0.42.1
    "GELU.gelu": {"9688d8847aaf631e"},  # 0.37 to 0.42.1
}


class _Processor:
    """What both processors do: upstream's attention, its elementwise chains run through the sites."""

    __slots__ = ("gate_site", "host_function", "site", "stock", "text")
    site: Site
    gate_site: Site
    stock: Any
    text: Constant | None  # keys and values of a text that is the same at every step (LTX-2.0)
    host_function: Any  # the one that was read and checked; another, patched in since, is run instead of ours
    values_first: bool
    _attention_backend: Any  # these two are upstream's, set by set_attention_backend and enable_parallelism
    _parallel_config: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle of an accelerated model holds stock processors: it is a plain model."""
        return copy.copy, (self.stock,)

    def _attend(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        query_rotary_emb: tuple[Tensor, Tensor] | None,
        key_rotary_emb: tuple[Tensor, Tensor] | None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | Tensor = False,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            batch, length, _ = context.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])

        to_gate_logits = getattr(attn, "to_gate_logits", None)  # not in 0.37
        gate_logits = None if to_gate_logits is None else to_gate_logits(hidden_states)
        # The order of the projections is upstream's: gradients add up, and LoRA dropout draws, in that order.
        text = None if torch.compiler.is_compiling() else self.text
        value: Any = attn.to_v(context) if self.values_first and text is None else None
        if all_perturbed:
            out = value  # spatio-temporal guidance: the values stand in for the attention
        else:
            query = attn.to_q(hidden_states)
            if text is None:
                key = attn.to_k(context)
                value = attn.to_v(context) if value is None else value
            else:
                weights = constant.weights(attn.to_k, attn.to_v)
                key, value = text.of(context, weights, lambda text: (attn.to_k(text), attn.to_v(text)))
            query, key = self._norm_and_turn(attn, query, key, query_rotary_emb, key_rotary_emb)
            out = upstream.dispatch_attention_fn(
                query.unflatten(2, (attn.heads, -1)),
                key.unflatten(2, (attn.heads, -1)),
                value.unflatten(2, (attn.heads, -1)),
                attn_mask=attention_mask,
                dropout_p=0.0,
                is_causal=False,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
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
        turned = query_rotary_emb is not None
        function = getattr(upstream, _HOST_FUNCTIONS[attn.rope_type]) if turned else None
        reason = None
        if turned and function is not self.host_function:
            reason = f"{_HOST_FUNCTIONS[attn.rope_type]} of {NAME} was replaced meanwhile"
        else:
            reason = next(why_norms_are_called(norm_q=attn.norm_q, norm_k=attn.norm_k), None)
        if reason is None:
            norms = (attn.norm_q.weight, attn.norm_k.weight)
            if query_rotary_emb is None:
                return self.site.call(QK_RMS_NORM, query, key, *norms, attn.norm_q.eps)
            own = (None, None) if key_rotary_emb is None else key_rotary_emb
            operator = _QK_OPERATORS[attn.rope_type]
            return self.site.call(operator, query, key, *norms, *query_rotary_emb, *own, attn.norm_q.eps)

        query, key = attn.norm_q(query), attn.norm_k(key)
        if query_rotary_emb is None or function is None:
            return self.site.leave(lambda: (query, key), reason)
        key_rotary_emb = query_rotary_emb if key_rotary_emb is None else key_rotary_emb
        if function is not self.host_function:
            return self.site.leave(lambda: (function(query, query_rotary_emb), function(key, key_rotary_emb)), reason)
        self.site.fall(reason)  # the norms; the turns are fused by themselves
        operator = _OPERATORS[attn.rope_type]
        return operator(query, *query_rotary_emb), operator(key, *key_rotary_emb)


class AudioVideoProcessor(_Processor, upstream.LTX2AudioVideoAttnProcessor):
    """`LTX2AudioVideoAttnProcessor` with Q/K norms, rotary embedding and head gate fused."""

    values_first = False

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        query_rotary_emb=None,
        key_rotary_emb=None,
    ):
        return self._attend(
            attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb
        )


_REPLACEMENTS: dict[type, type] = {upstream.LTX2AudioVideoAttnProcessor: AudioVideoProcessor}

if hasattr(upstream, "LTX2PerturbedAttnProcessor"):  # from 0.38

    class PerturbedProcessor(_Processor, upstream.LTX2PerturbedAttnProcessor):
        """`LTX2PerturbedAttnProcessor` with Q/K norms, rotary embedding and head gate fused."""

        values_first = True

        def __call__(
            self,
            attn,
            hidden_states,
            encoder_hidden_states=None,
            attention_mask=None,
            query_rotary_emb=None,
            key_rotary_emb=None,
            perturbation_mask=None,
            all_perturbed=None,
        ):
            if all_perturbed is None:
                all_perturbed = perturbation_mask is not None and torch.all(perturbation_mask == 0)
            return self._attend(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                query_rotary_emb,
                key_rotary_emb,
                perturbation_mask,
                all_perturbed,
            )

    _REPLACEMENTS[upstream.LTX2PerturbedAttnProcessor] = PerturbedProcessor

for _ours in _REPLACEMENTS.values():
    # LTX2Attention.forward asks for it at each of a step's 288 calls, and takes 40 us for finding it out by itself
    _call: Any = _ours.__call__
    _call.__signature__ = inspect.signature(_call)


def transformers(target: Any) -> list[Any]:
    """The LTX-2 transformers in a pipeline, then its text connectors; or the one given; empty when there is none."""
    components = getattr(target, "components", None)
    parts = [target, *(components.values() if isinstance(components, dict) else ())]
    parts = [getattr(part, "_orig_mod", part) for part in parts]  # torch.compile's wrapper
    found = [part for part in parts if isinstance(part, upstream.LTX2VideoTransformer3DModel)]
    return found + [part for part in parts if _are_connectors(part)]


def _are_connectors(part: Any) -> bool:
    module = sys.modules.get("diffusers.pipelines.ltx2.connectors")  # not imported: then part can't be of it
    return module is not None and isinstance(part, module.LTX2TextConnectors)


def accelerate(model: Any, handle: Handle) -> None:
    """Take over every site of one transformer, or of text connectors, noting each in the handle."""
    if _are_connectors(model):
        from bitfuse.hosts import diffusers_connectors  # only here: it imports diffusers' pipelines

        for name, block in diffusers_connectors.blocks(model):
            _take_over(f"{name}.attn1", block.attn1, handle)
        diffusers_connectors.accelerate(model, handle, NAME)
        return
    for name, attn in _attentions(model):
        _take_over(name, attn, handle)
    diffusers_block.accelerate(model, handle, NAME)
    _keep_what_is_constant(model, handle)
    _activate_in_place(model, handle)
    if handle.cuda_graph:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

        functions = tuple(_HOST_FUNCTIONS.values())
        graph_forward(
            model,
            handle,
            prelude=Prelude,
            settings=lambda: (registry.get_active_backend()[0], *(id(getattr(upstream, f)) for f in functions)),
        )


def _keep_what_is_constant(model: Any, handle: Handle) -> None:
    """The rotary tables, and in LTX-2.0, where asked for, the text: projections, and every block's keys and values."""
    for rope in (model.rope, model.audio_rope, model.cross_attn_rope, model.cross_attn_audio_rope):
        if type(rope) is _Rope and "forward" not in rope.__dict__ and source_hash(_Rope.forward) in _READ["rope"]:
            swap_class(rope, LTX2AudioVideoRotaryPosEmbed, Constant(), handle)
    if not handle.keep_text:
        return  # weights written through `.data` would not be noticed: only where the user says that none is
    if getattr(model, "prompt_modulation", False) or not model.config.get("use_prompt_embeddings", True):
        return  # the text is modulated anew at every step
    for projection in (model.caption_projection, model.audio_caption_projection):
        known = source_hash(_Projection.forward) in _READ["projection"]
        if known and type(projection) is _Projection and "forward" not in projection.__dict__:
            swap_class(projection, PixArtAlphaTextProjection, Constant(), handle)
    for block in model.transformer_blocks:
        for attn in (block.attn2, block.audio_attn2):
            if isinstance(attn.processor, _Processor):
                attn.processor.text = Constant()
                handle.on_restore(attn.processor.text.clear)


def _activate_in_place(model: Any, handle: Handle) -> None:
    """The feed-forwards' GELU, into the memory of its input: the widest tensor of a block, held once and not twice."""
    known = source_hash(_GELU.forward) in _READ["GELU.forward"] and source_hash(_GELU.gelu) in _READ["GELU.gelu"]
    for block in model.transformer_blocks if known else ():
        for feed_forward in (block.ff, block.audio_ff):
            activation = next(iter(getattr(feed_forward, "net", ())), None)
            if type(activation) is _GELU and not {"forward", "gelu"} & activation.__dict__.keys():
                swap_class(activation, GELU, None, handle)


class LTX2AudioVideoRotaryPosEmbed(Swapped, _Rope):  # the same name as upstream's
    def forward(self, coords: Tensor, device: Any = None) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or hooked(self) or "_bitfuse" not in self.__dict__:
            return _Rope.forward(self, coords, device)
        plain = (int, float, str, tuple, list)
        settings = tuple((name, repr(value)) for name, value in self.__dict__.items() if isinstance(value, plain))
        return self._bitfuse.of(coords, (str(device), settings), lambda coords: _Rope.forward(self, coords, device))


class PixArtAlphaTextProjection(Swapped, _Projection):  # the same name as upstream's
    def forward(self, caption: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or hooked(self) or "_bitfuse" not in self.__dict__:
            return _Projection.forward(self, caption)
        weights = constant.weights(self.linear_1, self.linear_2)
        return self._bitfuse.of(caption, weights, lambda caption: _Projection.forward(self, caption))


class GELU(Swapped, _GELU):  # the same name as upstream's
    def forward(self, hidden_states: Tensor) -> Tensor:
        proj = self.proj
        ours = type(proj) is torch.nn.Linear and "gelu" not in self.__dict__
        # a gradient needs what proj gives, and so may whoever watches
        watched = torch.is_grad_enabled() or hooked(proj) or _has_any_global_hook() or next(around(), None) is not None
        if not ours or watched or "_bitfuse" not in self.__dict__:
            return _GELU.forward(self, hidden_states)
        return torch.ops.aten.gelu_(proj(hidden_states), approximate=self.approximate)


def _attentions(model: Any) -> Iterator[tuple[str, Any]]:
    for index, block in enumerate(model.transformer_blocks):
        for name in _ATTENTIONS:
            if (attn := getattr(block, name, None)) is not None:
                yield f"transformer_blocks.{index}.{name}", attn


def _take_over(name: str, attn: Any, handle: Handle) -> None:
    operator = _QK_OPERATORS.get(attn.rope_type, QK_RMS_NORM) if "attn2" not in name else QK_RMS_NORM
    site = Site(name, operator.name)
    handle.sites.append(site)
    site.declined = next(_why_left_alone(attn), None)
    gate_site = Site(f"{name}.gate", HEAD_GATE.name, site.declined)
    if getattr(attn, "to_gate_logits", None) is not None:
        handle.sites.append(gate_site)
    if site.declined is None:
        _replace_processor(attn, site, gate_site, handle)


def _why_left_alone(attn: Any) -> Iterator[str]:
    stock = type(attn.processor)
    if stock not in _REPLACEMENTS:
        yield f"its processor is {named(stock)}, not one of diffusers' LTX-2 processors"
        return
    if attn.rope_type not in _OPERATORS:
        yield f"its rope_type is {attn.rope_type!r}; known: {', '.join(_OPERATORS)}"
        return
    function = _HOST_FUNCTIONS[attn.rope_type]
    yield from why_not_read(NAME, _READ, {stock.__name__: stock.__call__, function: getattr(upstream, function)})
    if difference := _differs_from_host(attn.rope_type, attn.heads, attn.head_dim, *weights_of(attn)):
        yield f"{function} of {NAME} and bitfuse's reference part here: {difference}"


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


def _replace_processor(attn: Any, site: Site, gate_site: Site, handle: Handle) -> None:
    stock = attn.processor
    ours: Any = object.__new__(_REPLACEMENTS[type(stock)])
    # One attribute dictionary for both: what is set on ours while it is in place (an attention backend, a
    # parallel config) is set on the stock one too, and stays when it comes back.
    ours.__dict__ = stock.__dict__
    ours.site, ours.gate_site, ours.stock, ours.text = site, gate_site, stock, None
    ours.host_function = getattr(upstream, _HOST_FUNCTIONS[attn.rope_type])
    attn.set_processor(ours)

    def undo() -> None:
        if attn.processor is ours:  # somebody else's processor, set since, is not ours to take away
            attn.set_processor(stock)

    handle.on_restore(undo)
