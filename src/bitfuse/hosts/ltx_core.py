"""Lightricks' ltx-core (1.0.0 to 1.2.0): attentions and blocks of its LTX-2 transformer, and its rotary tables' grid.

Its video decoder and encoder are in `ltx_core_vae.py`.

A block gets a forward of its own (`bitfuse.run.swap`), which restates upstream's: the same modules called in the same
order, and between them operators, each of which equals its chain bit for bit or runs it. From 1.1.4 on ltx-core has
seams. An attention calls its `preattention_function` (Q/K norms and rotary embedding) and its
`gated_attention_function` (the head gate), which are filled with callables of ours; before, an attention gets a forward
of its own with the same two callables. A later block, whose forward was not read, still gets its two seams filled,
`ada_zero_function` and `post_sa_function`, where those hold ltx-core's own functions. All of it only for upstream code
whose hash is listed here; any other is left in place, and the report says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import ltx_core
import torch
from ltx_core import utils
from ltx_core.guidance.perturbations import BatchedPerturbationConfig, PerturbationType
from ltx_core.model.transformer import attention, gelu_approx, model, rope, transformer, transformer_args
from torch import Tensor

from bitfuse.core.conditions import around
from bitfuse.hosts import activation, ltx2
from bitfuse.hosts.handle import Handle
from bitfuse.hosts.ltx2 import ABSENT, AUDIO, NATIVE, UNGATED, VIDEO, Ada, Rotary, RotaryTrial, Stream, Tables
from bitfuse.hosts.part import Model, ModelForward, Part, Seam
from bitfuse.hosts.site import Site
from bitfuse.hosts.sources import (
    Entry,
    Norms,
    entries,
    functions,
    not_own,
    of_operators,
    source_hash,
    why_not_read,
    why_not_stock,
)
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.perturbed_attention import WEIGHTED_SUM_HEAD_GATE
from bitfuse.ops.qk_norm import QK_INTERLEAVED_PER_OP, QK_SPLIT_PER_OP
from bitfuse.ops.rope import INTERLEAVED_PER_OP, SPLIT_PER_OP
from bitfuse.run.graphs import graph_forward
from bitfuse.run.swap import named

ops: Any = None
with contextlib.suppress(ImportError):
    ops = importlib.import_module("ltx_core.model.transformer.ops")  # from 1.1.4


def _name() -> str:
    """ltx-core and its version, where the installed version is the one that was imported."""
    try:
        installed = importlib.metadata.distribution("ltx-core")
    except importlib.metadata.PackageNotFoundError:
        return "ltx-core (a checkout)"
    files = [file.locate() for file in installed.files or () if str(file) == "ltx_core/__init__.py"]
    elsewhere = files and not any(str(file) == ltx_core.__file__ for file in files)
    return "ltx-core (a checkout)" if elsewhere else f"ltx-core {installed.version}"


NAME = _name()

_Attention: Any = attention.Attention
_Block: Any = transformer.BasicAVTransformerBlock
_Preprocessor: Any = transformer_args.TransformerArgsPreprocessor
_GELU: Any = gelu_approx.GELUApprox


def _apply(function: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return function(x, cos, sin)


_ROTARY = {  # by the rope_type of an attention
    "split": Rotary(rope, "apply_split_rotary_emb", SPLIT_PER_OP, QK_SPLIT_PER_OP, _apply),
    "interleaved": Rotary(
        *(rope, "apply_interleaved_rotary_emb", INTERLEAVED_PER_OP, QK_INTERLEAVED_PER_OP, _apply, True)
    ),
}

_OWN_BATCH = {"bb9c50a0985f415e", "c32c520ae778bf00"}  # split rotary up to 1.1.3: the tables' batch is x's

# Upstream sources that were read and are restated here or in the operators' references (`source_hash`).
READ = {
    "apply_rotary_emb": {"a77f8dca37a629b4", "55a5c41a497f7219"},  # 1.0.0 to 1.1.2; 1.1.3 to 1.2.0
    "apply_split_rotary_emb": {*_OWN_BATCH, "d1f17ed1ffb90969"},  # 1.0.0 to 1.1.2, 1.1.3; 1.1.4 to 1.2.0
    "apply_interleaved_rotary_emb": {"41faef873dd4639d"},  # 1.0.0 to 1.2.0
    "Attention.forward": {"dfbde2bcf8b882b5"},  # 1.0.0 to 1.1.3; later ones have seams
    "tables": {"62391a558b4c82de"},  # TransformerArgsPreprocessor._prepare_positional_embeddings, 1.0.0 to 1.2.0
    "BasicAVTransformerBlock.forward": {
        "100840667a70fe4f",  # 1.0.0 to 1.1.3
        "a75ec6e71a8def82",  # 1.1.4, 1.1.5
        "5c77afca21efc590",  # 1.1.6 to 1.2.0
    },
    "BasicAVTransformerBlock.get_ada_values": {"966d3a23e6873a8f"},  # 1.0.0 to 1.2.0
    "BasicAVTransformerBlock.get_av_ca_ada_values": {"3a2fc4442033cf78"},  # 1.0.0 to 1.2.0
    "BasicAVTransformerBlock._apply_text_cross_attention": {
        "69bb02b5780a515a",  # 1.0.0 to 1.1.5
        "f6a9750170147af8",  # 1.1.6 to 1.2.0
    },
    "apply_cross_attention_adaln": {
        "a46f6c078bf1523c",  # 1.0.0 to 1.1.5
        "73b57145287b94d5",  # 1.1.6, 1.1.7
        "ecbca3ee09cc2ca0",  # 1.2.0
    },
    "rms_norm": {"7d09eaca80640dad"},  # 1.0.0 to 1.2.0
    "GELUApprox.forward": {"40d91503e9f5a0e4"},  # 1.0.0 to 1.2.0
    "PytorchPreAttention": {"5d127133fa0f2609"},  # these four 1.1.4 to 1.2.0
    "PytorchGatedAttention": {"c22e340e266d95af"},
    "PytorchAdaZeroFunction": {"9d80678ecb99567a"},
    "PytorchPostSAFunction": {"223631dca86a8c3e"},
}
SEAMS = {  # from 1.1.4 on: the first two of an attention, the others of a block
    "preattention_function": "PytorchPreAttention",
    "gated_attention_function": "PytorchGatedAttention",
    "ada_zero_function": "PytorchAdaZeroFunction",
    "post_sa_function": "PytorchPostSAFunction",
}

# Before 1.1.4 the block itself asks which samples are perturbed; later it is told, with its arguments.
_ASKS = "perturbations" in inspect.signature(_Block.forward).parameters

_QK_NORMS = Norms(("q_norm", "k_norm"), torch.nn.RMSNorm, "torch.nn.RMSNorm", weighted=True)
_METHODS = ("get_ada_values", "get_av_ca_ada_values", "_apply_text_cross_attention")
_RESTATED = tuple(f"BasicAVTransformerBlock.{name}" for name in ("forward", *_METHODS))
_CROSS = "apply_cross_attention_adaln"


# -- what runs in an attention -----------------------------------------------------------------------------------------


class PreAttention(Seam):
    """ltx-core's `PreAttentionCallable`: Q/K norms and rotary embedding, in one kernel."""

    kind = "attention"

    def __init__(self, site: Site, stock: Any, model: Model, trial: RotaryTrial):
        super().__init__(site, stock, model)
        self._own_batch = source_hash(rope.apply_split_rotary_emb) in _OWN_BATCH
        self._trial = trial

    def run(
        self,
        q: Tensor,
        k: Tensor,
        attn_module: Any,
        mask: Tensor | None,
        pe: Tables | None,
        k_pe: Tables | None,
    ) -> tuple[Tensor, Tensor]:
        attn = attn_module
        if (reason := self._why_stock(q, k, attn, pe, k_pe)) is not None:
            self.site.fall(reason)
            return self.chain(q, k, attn, mask, pe, k_pe)
        rotate = _ROTARY[attn.rope_type.value].qk
        return ltx2.norm_and_rotate(self.site.call, rotate, q, k, attn.q_norm, attn.k_norm, pe, k_pe)

    def chain(
        self, q: Tensor, k: Tensor, attn: Any, mask: Tensor | None, pe: Tables | None, k_pe: Tables | None
    ) -> tuple[Tensor, Tensor]:
        """The host's own chain, with its norms called as modules."""
        if self.stock is not None:
            return self.stock(q, k, attn, mask, pe, k_pe)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if pe is None:
            return q, k
        turn = _rotary_home().apply_rotary_emb
        return turn(q, pe, attn.rope_type), turn(k, pe if k_pe is None else k_pe, attn.rope_type)

    def _why_stock(self, q: Tensor, k: Tensor, attn: Any, pe: Tables | None, k_pe: Tables | None) -> str | None:
        reason = _QK_NORMS.why_called(attn)
        if reason is None and pe is not None:
            reason = self._trial.why_stock(attn)
            if reason is None and self._own_batch and attn.rope_type.value == "split":
                for x, (cos, _) in ((q, pe), (k, k_pe or pe)):  # tables of another batch are an error there
                    if cos.shape[0] != x.shape[0]:
                        return f"the tables have a batch of {cos.shape[0]} and the tokens of {x.shape[0]}"
        return reason


class GatedAttention(Seam):
    """ltx-core's `GatedAttentionCallable`: the head gate."""

    kind = "attention"

    def run(self, x: Tensor, attn_out: Tensor, attn_module: Any) -> Tensor:
        return self.site.call(HEAD_GATE, attn_out, attn_module.to_gate_logits(x))


def _rotary_home() -> Any:
    """The module in which an attention finds `apply_rotary_emb`."""
    return ops or attention


class Attention(Part):
    """In place of an attention's forward before 1.1.4: the two callables above, where later versions have seams."""

    __slots__ = ("_gated_attention", "_pre_attention")
    kind = "attention"

    def __init__(self, attn: Any, model: Model, pre_attention: PreAttention, gated_attention: GatedAttention):
        gated = attn.to_gate_logits is not None
        super().__init__(attn, model, (pre_attention.site, gated_attention.site) if gated else (pre_attention.site,))
        self._pre_attention, self._gated_attention = pre_attention, gated_attention

    def fused(
        self,
        attn: Any,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        pe: Tables | None = None,
        k_pe: Tables | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool = False,
    ) -> Tensor:
        context = x if context is None else context
        v = attn.to_v(context)
        if all_perturbed:  # spatio-temporal guidance: the values stand in for the attention
            out = v
        else:
            q, k = attn.to_q(x), attn.to_k(context)
            q, k = self._pre_attention.run(q, k, attn, mask, pe, k_pe)
            out = attn.attention_function(q, k, v, attn.heads, mask)
            if perturbation_mask is not None:
                return attn.to_out(self._perturbed(attn, x, out, v, perturbation_mask))
        if attn.to_gate_logits is not None:
            out = self._gated_attention.run(x, out, attn)
        return attn.to_out(out)

    def _perturbed(self, attn: Any, x: Tensor, out: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """The attention's output blended with its values, and gated; without a gate it counts at the norms' site."""
        if attn.to_gate_logits is None:
            return self._pre_attention.site.call(WEIGHTED_SUM_HEAD_GATE, out, v, mask)
        logits = attn.to_gate_logits(x)
        return self._gated_attention.site.call(WEIGHTED_SUM_HEAD_GATE, out, v, mask, logits)


def _take_over_attention(name: str, rotates: bool, block: Any, attn: Any, model: Model) -> None:
    """Fill an attention's seams, or give it the forward above, noting its sites in the handle."""
    kind = getattr(attn.rope_type, "value", attn.rope_type)
    gated = attn.to_gate_logits is not None
    site, gate_site = ltx2.attention_sites(model.handle, name, _ROTARY.get(kind) if rotates else None, gated=gated)
    trial, handle = RotaryTrial(_difference), model.handle
    reason = next(_why_attention_stays(block, attn), None)
    not_rotated = reason or next(_why_not_rotated(attn, kind), None) or trial.at_first(attn)
    if ops is None:  # one forward, so both or neither
        site.declined = gate_site.declined = not_rotated
        if site.declined is None:
            callables = PreAttention(site, None, model, trial), GatedAttention(gate_site, None, model)
            handle.put(attn, Attention(attn, model, *callables))
        return
    pre, gate = "preattention_function", "gated_attention_function"
    site.declined = reason or why_seam_stays(attn, pre) or not_rotated
    gate_site.declined = reason or why_seam_stays(attn, gate)
    if site.declined is None:
        handle.fill(attn, pre, PreAttention(site, Seam.stock_of(attn.preattention_function), model, trial))
    if gate_site.declined is None:
        handle.fill(attn, gate, GatedAttention(gate_site, Seam.stock_of(attn.gated_attention_function), model))


def _why_attention_stays(block: Any, attn: Any) -> Iterator[str]:
    if hasattr(block, "_orig_mod"):
        yield "its block was compiled with torch.compile, and is left to that"
    if ops is None:
        yield from why_not_stock(attn, _Attention, "attention", NAME, READ, functions(attention, "Attention.forward"))
    elif not isinstance(attn, _Attention):  # its seams are filled, whatever its forward is
        yield not_own(attn, "attention", NAME)


def _why_not_rotated(attn: Any, kind: str) -> Iterator[str]:
    """Why its Q/K norms and rotary embedding stay."""
    if kind not in _ROTARY:
        yield f"its rope_type is {kind!r}; known: {', '.join(_ROTARY)}"
        return
    sources = functions(_rotary_home(), "apply_rotary_emb") | functions(rope, _ROTARY[kind].name)
    yield from why_not_read(NAME, READ, sources)


def _difference(attn: Any) -> str | None:
    return _ROTARY[attn.rope_type.value].difference(NAME, attn.heads, attn.dim_head, *ltx2.weights_of(attn))


# -- rotary tables -----------------------------------------------------------------------------------------------------


_TABLES = "_prepare_positional_embeddings"


class Positions:
    """In place of a preprocessor's `_prepare_positional_embeddings`: the grid of frequencies is on the device already.

    The tables themselves are computed in each forward, as in stock.
    """

    def __init__(self, preprocessor: Any, model: Model):
        self._preprocessor, self._model = weakref.ref(preprocessor), model
        self.__signature__ = inspect.signature(preprocessor._prepare_positional_embeddings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found: Any = self._preprocessor()
        stock = type(found)._prepare_positional_embeddings
        if (
            torch.compiler.is_compiling()
            or self._model.why_stock("tables") is not None
            or next(around(), None) is not None
        ):
            return stock(found, *args, **kwargs)
        return self._tables(found, *args, **kwargs)

    def _tables(
        self,
        found: Any,
        positions: Tensor,
        inner_dim: int,
        max_pos: list[int],
        use_middle_indices_grid: bool,
        num_attention_heads: int,
        x_dtype: torch.dtype,
    ) -> Tables:
        double = found.double_precision_rope
        grid = transformer_args.generate_freq_grid_np if double else transformer_args.generate_freq_grid_pytorch
        return transformer_args.precompute_freqs_cis(
            positions,
            dim=inner_dim,
            out_dtype=x_dtype,
            theta=found.positional_embedding_theta,
            max_pos=max_pos,
            use_middle_indices_grid=use_middle_indices_grid,
            num_attention_heads=num_attention_heads,
            rope_type=found.rope_type,
            freq_grid_generator=functools.partial(_grid_on, positions.device, grid),
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a copy or a pickle of the preprocessor: its own method."""
        return getattr, (self._preprocessor(), "_prepare_positional_embeddings")


@functools.lru_cache(maxsize=8)
def _grid_on(device: torch.device, grid: Callable[..., Tensor], *settings: Any) -> Tensor:
    """The frequencies on the device: from the CPU they would be copied, and waited for, in every forward."""
    return grid(*settings).to(device)


def _hold_grids(transformer: Any, model: Model) -> None:
    known = source_hash(getattr(_Preprocessor, _TABLES)) in READ["tables"]
    for name in ("video_args_preprocessor", "audio_args_preprocessor"):
        found = getattr(transformer, name, None)
        found = getattr(found, "simple_preprocessor", found)
        if known and type(found) is _Preprocessor and _TABLES not in found.__dict__:
            model.handle.fill(found, _TABLES, Positions(found, model))


# -- a block -----------------------------------------------------------------------------------------------------------


class _Stream(Stream):
    """A modality's stream, with its arguments. Those may be None, and it then takes no part.

    perturbs, skips    `PerturbationType` of its attention to itself, and to the other modality
    runs               whether it is denoised; else it is only attended to, where it `is_there`
    """

    __slots__ = ("args", "is_there", "perturbs", "prefix", "runs", "skips")

    def __init__(self, ours: ltx2.AVBlock, prefix: str, args: Any, eps: float, perturbs: Any, skips: Any):
        super().__init__(ours, prefix, None if args is None else args.x, eps)
        self.prefix, self.args, self.perturbs, self.skips = prefix, args, perturbs, skips
        self.is_there = args is not None and self.x.numel() > 0
        self.runs = self.is_there and args.enabled

    def result(self) -> Any:
        return None if self.args is None else dataclasses.replace(self.args, x=self.x)


class BasicAVTransformerBlock(ltx2.AVBlock):
    """In place of the forward of upstream's block: its elementwise chains are fused."""

    __slots__ = ("_seams",)
    norms, host_class, whose, methods = NATIVE, _Block, "ltx-core's", _METHODS

    def __init__(self, block: Any, *shared: Any):
        super().__init__(block, *shared)
        self._seams = [(seam, block.__dict__.get(seam)) for seam in _FILLED]

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if (reason := super().why_stock(block, args, kwargs)) is not None:
            return reason
        for seam, callable_ in self._seams:
            if block.__dict__.get(seam) is not callable_:
                return f"its {seam} was replaced meanwhile"
        return None

    def fused(self, block: Any, video: Any, audio: Any, perturbations: Any = None) -> tuple[Any, Any]:
        if video is None and audio is None:
            raise ValueError("At least one of video or audio must be provided")  # upstream's words
        kinds, eps = PerturbationType, block.norm_eps
        v = _Stream(self, VIDEO, video, eps, kinds.SKIP_VIDEO_SELF_ATTN, kinds.SKIP_A2V_CROSS_ATTN)
        a = _Stream(self, AUDIO, audio, eps, kinds.SKIP_AUDIO_SELF_ATTN, kinds.SKIP_V2A_CROSS_ATTN)
        if _ASKS and perturbations is None:
            perturbations = BatchedPerturbationConfig.empty((video or audio).x.shape[0])
        streams = self.fork(block, v.x) if v.runs and a.runs else ltx2.Fork(v.x, None)

        # 1. self-attention and cross-attention to the text
        if v.runs:
            self._attend(block, v, perturbations)
        with streams.second:
            if a.runs:
                self._attend(block, a, perturbations)

        # 2. cross-attention between video and audio, each of the other as it was before
        a2v = v.runs and a.is_there and not self._skipped(block, v, perturbations)
        v2a = a.runs and v.is_there and not self._skipped(block, a, perturbations)
        if a2v or v2a:
            for_a2v, for_v2a = self._between(block, v, "video", a2v, v2a)
            with streams.second:
                audio_for_a2v, audio_for_v2a = self._between(block, a, "audio", a2v, v2a)
            streams.meet()
            if a2v:
                gate, mask = self._gate(block, v, "video"), self._mask(block, v, perturbations)
                attended = block.audio_to_video_attn(
                    for_a2v,
                    context=audio_for_a2v,
                    pe=video.cross_positional_embeddings,
                    k_pe=audio.cross_positional_embeddings,
                )
                v.add(attended, gate, mask)
            for_a2v = attended = None  # memory for the feed-forward; what the other stream reads stays until it joins
            if v2a:
                with streams.second:
                    gate, mask = self._gate(block, a, "audio"), self._mask(block, a, perturbations)
                    attended = block.video_to_audio_attn(
                        audio_for_v2a,
                        context=for_v2a,
                        pe=audio.cross_positional_embeddings,
                        k_pe=video.cross_positional_embeddings,
                    )
                    a.add(attended, gate, mask)
                    attended = None

        # 3. feed-forward
        if v.runs:
            v.feed_forward(block.ff)
        with streams.second:
            if a.runs:
                a.feed_forward(block.audio_ff)
        streams.join()
        return v.result(), a.result()

    def _attend(self, block: Any, s: _Stream, perturbations: Any) -> None:
        """A modality's attention to itself, added, and to the text, still pending."""
        p, args = s.prefix, s.args
        s.ada = self._ada(block, getattr(block, f"{p}scale_shift_table"), args.timesteps, s.x)
        mask, all_perturbed = self._perturbed(block, s, perturbations)
        n = s.norm("norm1", s.ada[1], s.ada[0])
        attended = getattr(block, f"{p}attn1")(
            n,
            pe=args.positional_embeddings,
            mask=args.self_attention_mask,
            perturbation_mask=mask,
            all_perturbed=all_perturbed,
        )
        text, query, gate = args.context, ABSENT, UNGATED
        if block.cross_attention_adaln:
            table = getattr(block, f"{p}prompt_scale_shift_table")
            shift, scale = self._prompt(block, table, args.prompt_timestep, s.x)
            text = s.modulate(text, scale, shift)
            query, gate = ltx2.modulation(s.ada[7], s.ada[6]), s.ada[8]
        s.add(attended, s.ada[2])
        (n,) = s.add_and_norm("norm2", query)
        s.add(getattr(block, f"{p}attn2")(n, context=text, mask=args.context_mask), gate)

    def _between(self, block: Any, s: _Stream, name: str, a2v: bool, v2a: bool) -> list[Tensor | None]:
        table = getattr(block, f"scale_shift_table_a2v_ca_{name}")[:4]
        return s.between(self._ada(block, table, s.args.cross_scale_shift_timestep, s.x), a2v, v2a)

    # -- AdaLN values --

    def _ada(self, block: Any, table: Tensor, timestep: Tensor, x: Tensor) -> list[Ada]:
        """(value, table row) of each row of a table, not yet added: `get_ada_values` before its sum."""
        if timestep.shape[0] != x.shape[0]:  # upstream knows what to do
            return [(value, None) for value in block.get_ada_values(table, x.shape[0], timestep, slice(None))]
        table = table.to(device=timestep.device, dtype=timestep.dtype)
        return self.values(table, timestep)

    def _gate(self, block: Any, s: _Stream, name: str) -> Ada:
        table = getattr(block, f"scale_shift_table_a2v_ca_{name}")[4:]
        (gate,) = self._ada(block, table, s.args.cross_gate_timestep, s.x)
        return gate

    def _prompt(self, block: Any, table: Tensor, timestep: Tensor | None, x: Tensor) -> list[Ada]:
        """The same of the text's modulation, which is in x's dtype and need not depend on the timestep."""
        if timestep is not None and (timestep.dtype, timestep.shape[0]) == (x.dtype, x.shape[0]):
            return self._ada(block, table, timestep, x)
        rows = table[None, None].to(device=x.device, dtype=x.dtype)
        if timestep is not None:
            rows = rows + timestep.reshape(x.shape[0], timestep.shape[1], 2, -1)
        return [(row, None) for row in rows.unbind(dim=2)]

    # -- perturbations: samples of which an attention is left out --

    def _perturbed(self, block: Any, s: _Stream, perturbations: Any) -> tuple[Tensor | None, bool]:
        """(mask, whether all samples are) for the self-attention of a modality."""
        if not _ASKS:
            return s.args.self_attn_perturbation_mask, s.args.self_attn_all_perturbed
        every = perturbations.all_in_batch(s.perturbs, block.idx)
        partly = not every and perturbations.any_in_batch(s.perturbs, block.idx)
        return perturbations.mask_like(s.perturbs, block.idx, s.x) if partly else None, every

    def _skipped(self, block: Any, s: _Stream, perturbations: Any) -> bool:
        return perturbations.all_in_batch(s.skips, block.idx) if _ASKS else s.args.cross_attn_skip_all

    def _mask(self, block: Any, s: _Stream, perturbations: Any) -> Tensor:
        """Of its attention to the other modality: always multiplied, [B, 1, 1]."""
        if _ASKS:
            return perturbations.mask_like(s.skips, block.idx, s.x)
        return s.args.cross_attn_perturbation_mask

    def why_watched(self, block: Any) -> str | None:
        """Or whose the functions of its attentions are, where they are somebody else's (parallel ones, say)."""
        attentions = [module for module in block._modules.values() if isinstance(module, attention.Attention)]
        found = (vars(attn).get(f) for attn in attentions for f in ("attention_function", "masked_attention_function"))
        if not all(type(f).__module__ == attention.__name__ for f in found if f is not None):
            return "the function of an attention is not ltx-core's own"
        return super().why_watched(block)


def _sites_of(block: Any) -> dict[str, Any]:
    streams = [prefix for prefix in (VIDEO, AUDIO) if hasattr(block, f"{prefix}attn1")]
    return ltx2.block_sites(NATIVE, text=block.cross_attention_adaln, streams=streams)


def _why_block_stays(block: Any) -> Iterator[str]:
    if hasattr(block, "_orig_mod"):
        yield "the block was compiled with torch.compile, and is left to that"
    sources = functions(transformer, *_RESTATED, _CROSS) | functions(utils, "rms_norm")
    yield from why_not_stock(block, _Block, "block", NAME, READ, sources)
    if ops is not None:
        yield from filter(None, (why_seam_stays(block, seam) for seam in _FILLED))


# -- the seams of a block whose forward was not read -------------------------------------------------------------------


class AdaZero(Seam):
    """ltx-core's `AdaZeroCallable`: norm and modulation."""

    def run(self, x: Tensor, eps: float, scale: Tensor, shift: Tensor) -> Tensor:
        return self.site.call(NATIVE.norm, x, scale, shift, None, None, eps)


class PostSA(Seam):
    """ltx-core's `PostSACallable`: gated residual, then its norm."""

    def run(self, x: Tensor, y: Tensor, norm_weights: Tensor | None, eps: float, gate: Tensor) -> list[Tensor]:
        if norm_weights is not None:
            self.site.fall("its norm has a weight; accepted: norms without")
            return self.chain(x, y, norm_weights, eps, gate)
        found = self.site.call(NATIVE.residual, x, y, gate, None, None, *ABSENT, eps)
        return list(found)


def why_seam_stays(owner: Any, seam: str) -> str | None:
    """Why what is in a seam can't be stood in for: it is not ltx-core's own, or not a source that was read."""
    name, found = SEAMS[seam], Seam.stock_of(owner.__dict__.get(seam))
    if type(found) is not getattr(ops, name, None):
        return f"its {seam} is a {named(type(found))}, not ltx-core's own"
    if (source := source_hash(type(found).__call__)) not in READ[name]:
        return f"{name} is not a source that bitfuse knows ({source})"
    return None


_FILLED: dict[str, tuple[type[Seam], Any]] = {
    "ada_zero_function": (AdaZero, NATIVE.norm),
    "post_sa_function": (PostSA, NATIVE.residual),
}


# -- taking over -------------------------------------------------------------------------------------------------------


def transformers(target: Any) -> list[Any]:
    """The LTX-2 transformer, video decoder or encoder given, or inside (an `X0Model`, a wrapper); empty when there is
    none."""
    vae = _vae()
    found = ltx2.models_in([target], model.LTXModel)
    coders = () if vae is None else (vae.HOST_CLASS, vae.HOST_ENCODER)
    return found + [model for kind in coders for model in ltx2.models_in([target], kind)]


def _vae() -> Any:
    """The adapter of ltx-core's video autoencoder; None where that is not imported, so that nothing can be one."""
    if "ltx_core.model.video_vae.video_vae" not in sys.modules:
        return None
    from bitfuse.hosts import ltx_core_vae

    return ltx_core_vae


def accelerate(transformer: Any, handle: Handle) -> None:
    """Take over every site of one transformer, video decoder or encoder, noting each in the handle. ValueError for
    options that ltx-core's have not."""
    if handle.keep_text:
        raise ValueError("keep_text is True; accepted for an ltx-core model: False, its text is not kept")
    if (vae := _vae()) is not None and isinstance(transformer, (vae.HOST_CLASS, vae.HOST_ENCODER)):
        shared = Model(handle, vae.LEFT_OUT)
        vae.accelerate(transformer, shared, NAME)
        shared.take_over_is_done()
        return
    tables = entries(transformer_args, f"TransformerArgsPreprocessor.{_TABLES}")
    activations = [*entries(gelu_approx, "GELUApprox.forward"), *activation.LEFT_OUT]
    left_out = {"attention": _of_attentions(), "block": _of_blocks(), "activation": activations, "tables": tables}
    shared = Model(handle, left_out)
    for found in ltx2.attentions(transformer):
        _take_over_attention(*found, shared)

    def fill_seams(block: Any, name: str) -> None:
        for seam, (ours, operator) in _FILLED.items() if ops is not None and type(block) is _Block else ():
            site = Site(f"{name}.{seam}", operator.name, why_seam_stays(block, seam))
            handle.sites.append(site)
            if site.declined is None:
                handle.fill(block, seam, ours(site, Seam.stock_of(block.__dict__[seam]), shared))

    ltx2.take_over_blocks(
        transformer.transformer_blocks,
        shared,
        BasicAVTransformerBlock,
        _sites_of,
        _why_block_stays,
        otherwise=fill_seams,
    )
    sources = {"GELUApprox.forward": _GELU.forward}
    activation.activate_in_place(transformer.transformer_blocks, shared, _GELU, NAME, READ, sources)
    _hold_grids(transformer, shared)
    ModelForward.install(transformer, shared)
    if handle.cuda_graph:
        graph_forward(transformer, handle, settings=lambda: tuple(shared.reasons().items()))


def _of_attentions() -> list[Entry]:
    """The functions that the callables in an attention leave out."""
    found = entries(_rotary_home(), "apply_rotary_emb") + entries(rope, *(rotary.name for rotary in _ROTARY.values()))
    found += [(_Attention, "forward", "Attention.forward")] if ops is None else []
    return found + _of_seams() + of_operators(ltx2.attention_operators(_ROTARY.values(), WEIGHTED_SUM_HEAD_GATE))


def _of_blocks() -> list[Entry]:
    """The functions that a block's forward and its seams leave out."""
    found = [(_Block, name, f"BasicAVTransformerBlock.{name}") for name in ("forward", *_METHODS)]
    found += entries(transformer, _CROSS)
    homes = [home for home in (utils, transformer, ops) if inspect.ismodule(home) and hasattr(home, "rms_norm")]
    found += [(home, "rms_norm", f"{home.__name__}.rms_norm") for home in homes]
    return found + _of_seams() + of_operators(ltx2.block_operators(NATIVE))


def _of_seams() -> list[Entry]:
    kinds = [getattr(ops, name) for name in SEAMS.values() if hasattr(ops, name)]
    return [(kind, "__call__", f"{kind.__name__}.__call__") for kind in kinds]
