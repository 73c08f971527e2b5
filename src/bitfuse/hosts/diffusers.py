"""diffusers' LTX-2 transformer (0.37 to 0.42.1): the rotary embedding, through attention processors.

A processor is diffusers' own seam: hooks and LoRA sit on the modules around it and keep working, and no weight
or state-dict key is touched. The processors below restate the upstream `__call__` with one change, where the
rotary embedding is applied. They stand in only for upstream code whose hash is listed here; any other is left
in place, and the report says why.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers.models.transformers import transformer_ltx2 as upstream
from torch import Tensor

from bitfuse import proof
from bitfuse.contract import Operator
from bitfuse.hosts.patch import Handle, Site, source_hash
from bitfuse.ops.interleaved_rotary import INTERLEAVED_FP32
from bitfuse.ops.split_rotary import SPLIT_FP32

NAME = f"diffusers {diffusers.__version__}"

_OPERATORS = {"split": SPLIT_FP32, "interleaved": INTERLEAVED_FP32}
_HOST_FUNCTIONS = {"split": "apply_split_rotary_emb", "interleaved": "apply_interleaved_rotary_emb"}

# The attentions of a block whose queries and keys are turned; attn2 and audio_attn2, to the text, are not.
_ROTARY_ATTENTIONS = ("attn1", "audio_attn1", "audio_to_video_attn", "video_to_audio_attn")

# Upstream sources that were read and are restated here or in the operators' references (`source_hash`).
_READ = {
    "apply_split_rotary_emb": {"101de9c72dfea98a"},  # 0.37.0 to 0.42.1
    "apply_interleaved_rotary_emb": {"755d35ce421998d4"},  # 0.37.0 to 0.42.1
    "LTX2AudioVideoAttnProcessor": {"9ebca207676df638", "c9aac3cbef11d6dc"},  # 0.37; 0.38 to 0.42.1 (head gates)
    "LTX2PerturbedAttnProcessor": {"4561ef5c659b4df1"},  # 0.38 to 0.42.1
}


class _RotaryProcessor:
    """What both processors do: upstream's attention, with the rotary embedding run through the site."""

    __slots__ = ("host_function", "site", "stock")
    site: Site
    stock: Any
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
        value: Any = attn.to_v(context) if self.values_first else None
        if all_perturbed:
            out = value  # spatio-temporal guidance: the values stand in for the attention
        else:
            query, key = attn.to_q(hidden_states), attn.to_k(context)
            value = attn.to_v(context) if value is None else value
            query, key = attn.norm_q(query), attn.norm_k(key)
            if query_rotary_emb is not None:
                query = self._turn(attn, query, query_rotary_emb)
                key = self._turn(attn, key, query_rotary_emb if key_rotary_emb is None else key_rotary_emb)
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
            gates = 2.0 * torch.sigmoid(gate_logits)
            out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))

    def _turn(self, attn: Any, x: Tensor, freqs: tuple[Tensor, Tensor]) -> Tensor:
        function = getattr(upstream, _HOST_FUNCTIONS[attn.rope_type])
        if function is not self.host_function:
            return self.site.leave(
                lambda: function(x, freqs), f"{_HOST_FUNCTIONS[attn.rope_type]} of {NAME} was replaced meanwhile"
            )
        return self.site.call(_OPERATORS[attn.rope_type], x, *freqs)


class AudioVideoProcessor(_RotaryProcessor, upstream.LTX2AudioVideoAttnProcessor):
    """`LTX2AudioVideoAttnProcessor` with the rotary embedding fused."""

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

    class PerturbedProcessor(_RotaryProcessor, upstream.LTX2PerturbedAttnProcessor):
        """`LTX2PerturbedAttnProcessor` with the rotary embedding fused."""

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


def transformers(target: Any) -> list[Any]:
    """The LTX-2 transformers in a pipeline, or the one given; empty when there is none."""
    components = getattr(target, "components", None)
    parts = [target, *(components.values() if isinstance(components, dict) else ())]
    parts = [getattr(part, "_orig_mod", part) for part in parts]  # torch.compile's wrapper
    return [part for part in parts if isinstance(part, upstream.LTX2VideoTransformer3DModel)]


def accelerate(model: Any, handle: Handle) -> None:
    """Take over every rotary site of one transformer, noting each in the handle."""
    for name, attn in _rotary_attentions(model):
        operator = _OPERATORS.get(attn.rope_type)
        site = Site(name, operator.name if operator else f"{attn.rope_type} rotary")
        handle.sites.append(site)
        site.declined = next(_why_left_alone(attn), None)
        if site.declined is None:
            _replace_processor(attn, site, handle)


def _rotary_attentions(model: Any) -> Iterator[tuple[str, Any]]:
    for index, block in enumerate(model.transformer_blocks):
        for name in _ROTARY_ATTENTIONS:
            if (attn := getattr(block, name, None)) is not None:
                yield f"transformer_blocks.{index}.{name}", attn


def _why_left_alone(attn: Any) -> Iterator[str]:
    stock = type(attn.processor)
    if stock not in _REPLACEMENTS:
        yield f"its processor is {stock.__module__}.{stock.__qualname__}, not one of diffusers' LTX-2 processors"
        return
    if attn.rope_type not in _OPERATORS:
        yield f"its rope_type is {attn.rope_type!r}; known: {', '.join(_OPERATORS)}"
        return
    function = _HOST_FUNCTIONS[attn.rope_type]
    for name, code in ((stock.__name__, stock.__call__), (function, getattr(upstream, function))):
        if (found := source_hash(code)) not in _READ[name]:
            yield f"{name} of {NAME} is not a source that bitfuse knows ({found})"
            return
    weights = [p for p in attn.parameters() if p.dtype in (torch.bfloat16, torch.float16, torch.float32)]
    dtype = weights[0].dtype if weights else torch.bfloat16
    device = next((p.device for p in weights if p.is_cuda), torch.device("cpu"))
    if difference := _differs_from_host(attn.rope_type, attn.heads, attn.head_dim, dtype, device):
        yield f"{function} of {NAME} and bitfuse's reference part here: {difference}"


@functools.cache
def _differs_from_host(
    rope_type: str, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """The host's own function against the operator's reference, in this process, on the battery's inputs."""
    operator: Operator = _OPERATORS[rope_type]
    host = getattr(upstream, _HOST_FUNCTIONS[rope_type])
    like = torch.empty(2, 5, heads * head_dim, dtype=dtype, device=device)
    table = torch.empty(like.shape if rope_type == "interleaved" else (2, 5, heads, head_dim // 2), device=device)
    table = table if rope_type == "interleaved" else table.swapaxes(1, 2)
    with torch.no_grad():
        for family, (x, cos, sin) in operator.battery(like, table, table):
            if mismatch := proof.compare(host(x, (cos, sin)), operator.reference(x, cos, sin)):
                return f"{mismatch.sentence}, on the battery's '{family}' inputs"
    return None


def _replace_processor(attn: Any, site: Site, handle: Handle) -> None:
    stock = attn.processor
    ours: Any = object.__new__(_REPLACEMENTS[type(stock)])
    # One attribute dictionary for both: what is set on ours while it is in place (an attention backend, a
    # parallel config) is set on the stock one too, and stays when it comes back.
    ours.__dict__ = stock.__dict__
    ours.site, ours.stock = site, stock
    ours.host_function = getattr(upstream, _HOST_FUNCTIONS[attn.rope_type])
    attn.set_processor(ours)

    def undo() -> None:
        if attn.processor is ours:  # somebody else's processor, set since, is not ours to take away
            attn.set_processor(stock)

    handle.on_restore(undo)
