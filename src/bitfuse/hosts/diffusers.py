"""diffusers' LTX-2 transformer (0.37 to 0.42.1): its attentions, blocks and feed-forwards, and what is kept of a text.

Each module that is taken over keeps its class and its place, and gets a `forward` of its own (`bitfuse.run.swap`) that
restates upstream's: the same modules called in the same order, and between them operators, each of which equals its
chain bit for bit or runs it. Ours stand in only for upstream code whose hash is listed here; any other is left in
place, and the report says why. An attention's forward restates its processor's too; the processor stays where it is,
and is asked for its attention backend. `diffusers_connectors.py` takes over the text connectors of a pipeline, and
`diffusers_diffusion_decoder.py` the diffusion decoder of LTX-2.5.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers.models import activations, normalization
from diffusers.models.transformers import transformer_ltx2 as upstream
from torch import Tensor

from bitfuse.hosts import activation, lora, ltx2, offload
from bitfuse.hosts.handle import Handle
from bitfuse.hosts.ltx2 import ABSENT, AUDIO, COMPOSED, UNGATED, VIDEO, Ada, Rotary, RotaryTrial, Stream, Tables
from bitfuse.hosts.part import Model, ModelForward, Part
from bitfuse.hosts.site import Site
from bitfuse.hosts.sources import Norms, calls_of, entries, functions, of_operators, own_method, why_not_stock
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.perturbed_attention import LERP_HEAD_GATE
from bitfuse.ops.qk_norm import QK_INTERLEAVED_FP32, QK_SPLIT_FP32
from bitfuse.ops.rope import INTERLEAVED_FP32, SPLIT_FP32
from bitfuse.run.graphs import graph_forward
from bitfuse.run.memo import Constant, Prelude
from bitfuse.run.swap import named, ours_in

NAME = f"diffusers {diffusers.__version__}"

_Attention: Any = upstream.LTX2Attention
_Block: Any = upstream.LTX2VideoTransformerBlock
_Norm: Any = normalization.RMSNorm
_Projection: Any = upstream.PixArtAlphaTextProjection
_GELU: Any = activations.GELU


def _apply(function: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return function(x, (cos, sin))


_ROTARY = {  # by the rope_type of an attention
    "split": Rotary(upstream, "apply_split_rotary_emb", SPLIT_FP32, QK_SPLIT_FP32, _apply, False, torch.float32),
    "interleaved": Rotary(
        *(upstream, "apply_interleaved_rotary_emb", INTERLEAVED_FP32, QK_INTERLEAVED_FP32),
        *(_apply, True, torch.float32),
    ),
}

# Upstream sources that were read and are restated here or in the operators' references (`source_hash`).
READ = {
    "apply_split_rotary_emb": {"101de9c72dfea98a"},  # 0.37.0 to 0.42.1
    "apply_interleaved_rotary_emb": {"755d35ce421998d4"},  # 0.37.0 to 0.42.1
    "LTX2Attention.forward": {"f6a037079b264fd9"},  # 0.37 to 0.42.1
    "LTX2AudioVideoAttnProcessor": {"9ebca207676df638", "c9aac3cbef11d6dc"},  # 0.37; 0.38 to 0.42.1 (head gates)
    "LTX2PerturbedAttnProcessor": {"4561ef5c659b4df1"},  # 0.38 to 0.42.1
    "LTX2VideoTransformerBlock.forward": {"0d8ee8e289450336", "dd764490abd818e1"},  # 0.38, 0.39; 0.40 to 0.42.1
    "LTX2VideoTransformerBlock.get_mod_params": {"3d9b3e7509fc6dd4"},  # 0.38 to 0.42.1
    "RMSNorm.forward": {"189c32f1ae7bb9b6", "25f4c6d067d464a9"},  # to 0.40; 0.41 to 0.42.1
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

_QK_NORMS = Norms(("norm_q", "norm_k"), torch.nn.RMSNorm, "torch.nn.RMSNorm", weighted=True)
_BLOCK_NORMS = Norms(
    (
        *("norm1", "norm2", "audio_to_video_norm", "norm3"),
        *("audio_norm1", "audio_norm2", "video_to_audio_norm", "audio_norm3"),
    ),
    _Norm,
    "diffusers' RMSNorm",
    weighted=False,
)
_METHODS = ("LTX2VideoTransformerBlock.forward", "LTX2VideoTransformerBlock.get_mod_params")

# The functions that parts of ours leave out, besides those of the operators' references.
_OF_ATTENTIONS = [
    *entries(upstream, *(rotary.name for rotary in _ROTARY.values()), "LTX2Attention.forward"),
    *((kind, "__call__", f"{kind.__name__}.__call__") for kind in _PROCESSORS),
    *of_operators(ltx2.attention_operators(_ROTARY.values(), LERP_HEAD_GATE)),
]
_OF_BLOCKS = [
    *entries(upstream, *_METHODS),
    *calls_of(_Norm, "diffusers' RMSNorm"),
    *of_operators(ltx2.block_operators(COMPOSED)),
]
_OF_ACTIVATIONS = [*entries(activations, "GELU.forward", "GELU.gelu"), *activation.LEFT_OUT]


# -- an attention ------------------------------------------------------------------------------------------------------


class Attention(Part):
    """`LTX2Attention.forward` and its processor's `__call__`, with Q/K norms, rotary embedding and head gate fused.

    text    keys and values of a text that is the same at every step, where they are kept (LTX-2.0)
    """

    __slots__ = ("_trial", "gate_site", "site", "text")
    kind = "attention"

    def __init__(self, attn: Any, model: Model, site: Site, gate_site: Site, trial: RotaryTrial):
        super().__init__(attn, model, (site, gate_site) if _is_gated(attn) else (site,))
        self.site, self.gate_site, self._trial = site, gate_site, trial
        self.text: Constant | None = None

    def why_stock(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        processor = attn.processor
        found = _PROCESSORS.get(type(processor))
        if found is None:
            return f"its processor is {named(type(processor))}, not one of diffusers' LTX-2 processors"
        if more := kwargs.keys() - found[0] - _SHARED:
            return f"{', '.join(sorted(more))} is given, which {type(processor).__name__} does not take"
        return self._trial.why_stock(attn)

    def fused(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Tables | None = None,
        key_rotary_emb: Tables | None = None,
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
            out, perturbation_mask = attn.to_v(context) if value is None else value, None
        else:
            query = attn.to_q(hidden_states)
            if self.text is None:
                key = attn.to_k(context)
                value = attn.to_v(context) if value is None else value
            else:
                key, value = self.text.of(
                    context,
                    lambda: lora.weights(attn.to_k, attn.to_v),
                    lambda text: (attn.to_k(text), attn.to_v(text)),
                )
            query, key = self._norm_and_rotate(attn, query, key, query_rotary_emb, key_rotary_emb)
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
            if gate_logits is None:  # one ATen kernel: nothing to fuse
                out = torch.lerp(value, out, perturbation_mask)
            else:
                out = self.gate_site.call(LERP_HEAD_GATE, out, value, perturbation_mask, gate_logits)
        elif gate_logits is not None:
            out = self.gate_site.call(HEAD_GATE, out, gate_logits)
        return attn.to_out[1](attn.to_out[0](out))

    def _norm_and_rotate(
        self, attn: Any, query: Tensor, key: Tensor, tables: Tables | None, key_tables: Tables | None
    ) -> tuple[Tensor, Tensor]:
        rotary = _ROTARY[attn.rope_type]
        if (reason := _QK_NORMS.why_called(attn)) is None:
            norms = attn.norm_q, attn.norm_k
            return ltx2.norm_and_rotate(self.site.call, rotary.qk, query, key, *norms, tables, key_tables)
        query, key = attn.norm_q(query), attn.norm_k(key)
        self.site.fall(reason)  # the norms; the rotary embeddings are fused by themselves
        if tables is None:
            return query, key
        return rotary.alone(query, *tables), rotary.alone(key, *(key_tables or tables))


_SHARED = frozenset({"hidden_states", "encoder_hidden_states", "attention_mask", "query_rotary_emb", "key_rotary_emb"})


def _is_gated(attn: Any) -> bool:
    return getattr(attn, "to_gate_logits", None) is not None  # it has none in 0.37


def take_over(name: str, rotates: bool, attn: Any, model: Model) -> None:
    """Give an attention the forward above, noting its sites in the handle."""
    rotary = _ROTARY.get(attn.rope_type) if rotates else None
    site, gate_site = ltx2.attention_sites(model.handle, name, rotary, gated=_is_gated(attn))
    trial = RotaryTrial(_difference)
    reason = next(_why_attention_stays(attn), None) or trial.at_first(attn)
    site.declined = gate_site.declined = reason
    if reason is None:
        model.handle.put(attn, Attention(attn, model, site, gate_site, trial))
        for norm in (attn.norm_q, attn.norm_k):
            offload.install(norm, model.handle)


def _why_attention_stays(attn: Any) -> Iterator[str]:
    processor = type(attn.processor)
    if processor not in _PROCESSORS:
        yield f"its processor is {named(processor)}, not one of diffusers' LTX-2 processors"
        return
    if attn.rope_type not in _ROTARY:
        yield f"its rope_type is {attn.rope_type!r}; known: {', '.join(_ROTARY)}"
        return
    sources = functions(upstream, "LTX2Attention.forward", _ROTARY[attn.rope_type].name)
    sources[processor.__name__] = processor.__call__
    yield from why_not_stock(attn, _Attention, "attention", NAME, READ, sources)


def _difference(attn: Any) -> str | None:
    return _ROTARY[attn.rope_type].difference(NAME, attn.heads, attn.head_dim, *ltx2.weights_of(attn))


# -- a block -----------------------------------------------------------------------------------------------------------


class LTX2VideoTransformerBlock(ltx2.AVBlock):
    """In place of the forward of upstream's block (from 0.38 on): its elementwise chains are fused."""

    __slots__ = ()
    norms, host_class, whose, methods = COMPOSED, _Block, "diffusers'", ("get_mod_params",)

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        return super().why_stock(block, args, kwargs) or _BLOCK_NORMS.why_called(block)

    def fused(
        self,
        block: Any,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        temb: Tensor,
        temb_audio: Tensor,
        temb_ca_scale_shift: Tensor,
        temb_ca_audio_scale_shift: Tensor,
        temb_ca_gate: Tensor,
        temb_ca_audio_gate: Tensor,
        temb_prompt: Tensor | None = None,
        temb_prompt_audio: Tensor | None = None,
        video_rotary_emb: Tables | None = None,
        audio_rotary_emb: Tables | None = None,
        ca_video_rotary_emb: Tables | None = None,
        ca_audio_rotary_emb: Tables | None = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        audio_self_attention_mask: Tensor | None = None,
        a2v_cross_attention_mask: Tensor | None = None,
        v2a_cross_attention_mask: Tensor | None = None,
        use_a2v_cross_attention: bool = True,
        use_v2a_cross_attention: bool = True,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        perturbed = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
        perturbed = perturbed if block.perturbed_attn else {}
        eps = block.norm1.eps
        video, audio = Stream(self, VIDEO, hidden_states, eps), Stream(self, AUDIO, audio_hidden_states, eps)
        video.ada = self._ada(block.scale_shift_table, temb)
        audio.ada = self._ada(block.audio_scale_shift_table, temb_audio)
        streams = self.fork(block, hidden_states)

        # 1. self-attention
        n = video.norm("norm1", video.ada[1], video.ada[0])
        attended = block.attn1(
            hidden_states=n,
            encoder_hidden_states=None,
            query_rotary_emb=video_rotary_emb,
            attention_mask=self_attention_mask,
            **perturbed,
        )
        video.add(attended, video.ada[2])
        with streams.second:
            n = audio.norm("norm1", audio.ada[1], audio.ada[0])
            attended = block.audio_attn1(
                hidden_states=n,
                encoder_hidden_states=None,
                query_rotary_emb=audio_rotary_emb,
                attention_mask=audio_self_attention_mask,
                **perturbed,
            )
            audio.add(attended, audio.ada[2])

        # 2. cross-attention to the text
        text, audio_text = encoder_hidden_states, audio_encoder_hidden_states
        if block.cross_attn_adaln:
            shift, scale = self._prompt(block.prompt_scale_shift_table, temb_prompt, video.x)
            text = video.modulate(text, scale, shift)
            with streams.second:
                shift, scale = self._prompt(block.audio_prompt_scale_shift_table, temb_prompt_audio, audio.x)
                audio_text = audio.modulate(audio_text, scale, shift)
        query, gate = _of_text(video, block.video_cross_attn_adaln)
        (n,) = video.add_and_norm("norm2", query)
        attended = block.attn2(
            n, encoder_hidden_states=text, query_rotary_emb=None, attention_mask=encoder_attention_mask
        )
        video.add(attended, gate)
        with streams.second:
            query, gate = _of_text(audio, block.audio_cross_attn_adaln)
            (n,) = audio.add_and_norm("norm2", query)
            attended = block.audio_attn2(
                n, encoder_hidden_states=audio_text, query_rotary_emb=None, attention_mask=audio_encoder_attention_mask
            )
            audio.add(attended, gate)

        # 3. cross-attention between video and audio, each of the other as it was before
        if use_a2v_cross_attention or use_v2a_cross_attention:
            wanted = use_a2v_cross_attention, use_v2a_cross_attention
            ada = self._ada(block.video_a2v_cross_attn_scale_shift_table[:4], temb_ca_scale_shift)
            for_a2v, for_v2a = video.between(ada, *wanted)
            with streams.second:
                ada = self._ada(block.audio_a2v_cross_attn_scale_shift_table[:4], temb_ca_audio_scale_shift)
                audio_for_a2v, audio_for_v2a = audio.between(ada, *wanted)
            streams.meet()
            if use_a2v_cross_attention:
                (gate,) = self._ada(block.video_a2v_cross_attn_scale_shift_table[4:], temb_ca_gate)
                attended = block.audio_to_video_attn(
                    for_a2v,
                    encoder_hidden_states=audio_for_a2v,
                    query_rotary_emb=ca_video_rotary_emb,
                    key_rotary_emb=ca_audio_rotary_emb,
                    attention_mask=a2v_cross_attention_mask,
                )
                video.add(attended, gate)
            for_a2v = attended = None  # memory for the feed-forward; what the other stream reads stays until it joins
            if use_v2a_cross_attention:
                with streams.second:
                    (gate,) = self._ada(block.audio_a2v_cross_attn_scale_shift_table[4:], temb_ca_audio_gate)
                    attended = block.video_to_audio_attn(
                        audio_for_v2a,
                        encoder_hidden_states=for_v2a,
                        query_rotary_emb=ca_audio_rotary_emb,
                        key_rotary_emb=ca_video_rotary_emb,
                        attention_mask=v2a_cross_attention_mask,
                    )
                    audio.add(attended, gate)

        # 4. feed-forward
        del n, attended  # memory for the feed-forward
        video.feed_forward(block.ff)
        with streams.second:
            audio.feed_forward(block.audio_ff)
        streams.join()
        return video.x, audio.x

    def _ada(self, table: Tensor, temb: Tensor) -> list[Ada]:
        if table.device != temb.device:  # offloaded: upstream moves it
            table = table.to(temb.device)
        return self.values(table, temb)

    def _prompt(self, table: Tensor, temb: Tensor | None, x: Tensor) -> list[Ada]:
        if temb is not None:
            return self._ada(table, temb)
        # the text's modulation does not depend on the timestep
        rows = table[None, None].to(device=x.device, dtype=x.dtype).unbind(dim=2)
        return [(row, None) for row in rows]


def _of_text(stream: Stream, modulated: bool) -> tuple[Any, Any]:
    """Of a cross-attention to the text: the modulation of its queries, and its gate."""
    if not modulated:
        return ABSENT, UNGATED
    return ltx2.modulation(stream.ada[7], stream.ada[6]), stream.ada[8]


def _why_block_stays(block: Any) -> Iterator[str]:
    sources = functions(upstream, *_METHODS) | {"RMSNorm.forward": _Norm.forward}
    yield from why_not_stock(block, _Block, "block", NAME, READ, sources)
    if (reason := _BLOCK_NORMS.why_called(block, hooks=False)) is not None:
        yield reason


# -- what is kept of a text, and feed-forwards -------------------------------------------------------------------------


class Projection(Part):
    """`PixArtAlphaTextProjection.forward`, of a text that is the same at every step computed once."""

    __slots__ = ("kept",)
    kind = "projection"

    def __init__(self, projection: Any, model: Model):
        super().__init__(projection, model)
        self.kept = Constant.until_restored(model.handle, model.handle.extras.text.fall)

    def fall(self, reason: str) -> None:
        self.kept.fall(reason)

    def fused(self, projection: Any, caption: Tensor) -> Tensor:
        return self.kept.of(
            caption,
            lambda: lora.weights(projection.linear_1, projection.linear_2),
            lambda caption: _Projection.forward(projection, caption),
        )


class GELU(activation.GELU):
    """`GELU.forward`, whose op is a method and whose approximation is an attribute."""

    __slots__ = ()

    def why_stock(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if not own_method(module, "gelu", _GELU):
            return "the gelu of the activation was replaced"
        return super().why_stock(module, args, kwargs)

    def chain(self, module: Any, projected: Tensor) -> Tensor:
        return module.gelu(projected)

    def approximates(self, module: Any) -> str:
        return module.approximate


def _keep_text(model: Any, shared: Model) -> None:
    """In LTX-2.0, where asked for: the text's projections, and every block's keys and values of it."""
    handle, fall = shared.handle, shared.handle.extras.text.fall
    if getattr(model, "prompt_modulation", False) or not model.config.get("use_prompt_embeddings", True):
        fall("this model (LTX-2.3 or newer) makes another text of it at every step, of which nothing can be kept")
        return
    for projection in (model.caption_projection, model.audio_caption_projection):
        sources = {"projection": _Projection.forward}
        reason = next(why_not_stock(projection, _Projection, "text's projection", NAME, READ, sources), None)
        if reason is None:
            handle.put(projection, Projection(projection, shared))
        else:
            fall(reason)
    for block in model.transformer_blocks:
        for attn in (block.attn2, block.audio_attn2):
            if isinstance(ours := ours_in(attn), Attention):
                ours.text = Constant.until_restored(handle, fall)
            else:
                fall("an attention to the text is left alone")


# -- taking over -------------------------------------------------------------------------------------------------------


def transformers(target: Any) -> list[Any]:
    """The LTX-2 transformers in a pipeline, its text connectors and its decoders; or in the one given.

    Empty when there is none.
    """
    parts = [target, *_components(target).values()]
    found = ltx2.models_in(parts, upstream.LTX2VideoTransformer3DModel)
    for name, kind in _FURTHER.items():
        module = sys.modules.get(name)  # not imported: then nothing can be of it
        found += ltx2.models_in(parts, getattr(module, kind)) if hasattr(module, kind) else []
    return found


_DECODER = "diffusers.models.autoencoders.ltx2_diffusion_decoder"
_VAE = "diffusers.models.autoencoders.autoencoder_kl_ltx2"
_FURTHER = {
    "diffusers.pipelines.ltx2.connectors": "LTX2TextConnectors",
    _VAE: "AutoencoderKLLTX2Video",
    _DECODER: "LTX2VideoDiffusionDecoderModel",
}
"""Models besides the transformer, by the modules that they are in."""


def unrecognised(target: Any) -> dict[str, str]:
    """Of each part of a pipeline that should be an LTX-2 transformer and holds none, by its name, what it is."""
    parts = {name: part for name, part in _components(target).items() if name.startswith("transformer")}
    return {
        name: f"it is a {named(type(part))}, in which no LTX2VideoTransformer3DModel was found"
        for name, part in parts.items()
        if part is not None and not ltx2.models_in([part], upstream.LTX2VideoTransformer3DModel)
    }


def _components(target: Any) -> dict[str, Any]:
    components = getattr(target, "components", None)
    return components if isinstance(components, dict) else {}


def accelerate(model: Any, handle: Handle) -> None:
    """Take over every site of one transformer, text connectors, video autoencoder or diffusion decoder, noting each."""
    decoder, vae = sys.modules.get(_DECODER), sys.modules.get(_VAE)
    if decoder is not None and isinstance(model, decoder.LTX2VideoDiffusionDecoderModel):
        from bitfuse.hosts import diffusers_diffusion_decoder  # only here: other versions of diffusers have none

        shared = Model(handle, diffusers_diffusion_decoder.LEFT_OUT)
        diffusers_diffusion_decoder.accelerate(model, shared, NAME)
        ModelForward.install(model, shared)
        return
    if vae is not None and isinstance(model, vae.AutoencoderKLLTX2Video):
        from bitfuse.hosts import diffusers_vae

        shared = Model(handle, diffusers_vae.LEFT_OUT)
        diffusers_vae.accelerate(model, shared, NAME)
        shared.take_over_is_done()
        return
    if not isinstance(model, upstream.LTX2VideoTransformer3DModel):
        from bitfuse.hosts import diffusers_connectors  # only here: it imports diffusers' pipelines

        shared = Model(handle, {"attention": _OF_ATTENTIONS, "block": diffusers_connectors.LEFT_OUT})
        diffusers_connectors.accelerate(model, shared, NAME)
        ModelForward.install(model, shared)
        return
    left_out = {"attention": _OF_ATTENTIONS, "block": _OF_BLOCKS, "activation": _OF_ACTIVATIONS, "projection": []}
    shared = Model(handle, left_out)
    for name, rotates, _, attn in ltx2.attentions(model):
        take_over(name, rotates, attn, shared)

    def sites_of(block: Any) -> dict[str, Any]:
        return ltx2.block_sites(COMPOSED, text=getattr(block, "cross_attn_adaln", False))  # not in 0.37

    ltx2.take_over_blocks(model.transformer_blocks, shared, LTX2VideoTransformerBlock, sites_of, _why_block_stays)
    if handle.keep_text:
        _keep_text(model, shared)
    sources = {"GELU.forward": _GELU.forward, "GELU.gelu": _GELU.gelu}
    activation.activate_in_place(model.transformer_blocks, shared, _GELU, NAME, READ, sources, GELU)
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


def besides(target: Any) -> list[Any]:
    """What a pipeline has besides its models that can be accelerated: its video processor."""
    processor = getattr(target, "video_processor", None)
    module = sys.modules.get("diffusers.video_processor")  # not imported: then nothing can be of it
    return [processor] if module is not None and isinstance(processor, module.VideoProcessor) else []


def accelerate_besides(processor: Any, handle: Handle) -> Site:
    """Take over what brings a pipeline's decoded video to the CPU; its site, which is not in the handle yet."""
    from bitfuse.hosts import diffusers_frames  # only here: it needs PIL, as pipelines do

    return diffusers_frames.accelerate(processor, handle, NAME)


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
