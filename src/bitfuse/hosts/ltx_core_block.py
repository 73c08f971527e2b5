"""ltx-core's LTX-2 transformer block (1.0.0 to 1.2.0): its forward, with every elementwise chain one operator.

The forward below restates `BasicAVTransformerBlock.forward`: the same modules called in the same order (hooks, LoRA
and dropout notice the order), and between them operators, each of which equals its chain bit for bit or runs it. A
block gets it as an attribute of its own (`run.swap`). A later block, whose forward was not read, still gets its two
seams filled, `ada_zero_function` and `post_sa_function`, where those hold ltx-core's own functions.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from ltx_core import utils
from ltx_core.guidance.perturbations import BatchedPerturbationConfig, PerturbationType
from ltx_core.model.transformer import attention, transformer
from torch import Tensor

from bitfuse.hosts.ltx2 import ABSENT, ENDED, Ada, Beside, Block, Entry, Model, Quiet, Rehearsal, Values, modulation
from bitfuse.hosts.site import Site, own_method, source_hash, why_not_stock
from bitfuse.ops.adaln import (
    GATED_RESIDUAL,
    MODULATE,
    RESIDUAL_RMS_NORM_MODULATE_NATIVE,
    RESIDUAL_RMS_NORM_MODULATE_TWICE_NATIVE,
    RMS_NORM_MODULATE_NATIVE,
)
from bitfuse.run.swap import named

ops: Any = None
with contextlib.suppress(ImportError):
    ops = importlib.import_module("ltx_core.model.transformer.ops")  # from 1.1.4

_Stock: Any = transformer.BasicAVTransformerBlock

# Upstream sources that were read and are restated here (`source_hash`).
_READ = {
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
_ASKS = "perturbations" in inspect.signature(_Stock.forward).parameters

_OF_ONE = {  # of the video; those of the audio are called audio_norm1, and so on
    "norm1": RMS_NORM_MODULATE_NATIVE,
    "norm2": RESIDUAL_RMS_NORM_MODULATE_NATIVE,
    "text": MODULATE,
    "norm3": RESIDUAL_RMS_NORM_MODULATE_NATIVE,
    "output": GATED_RESIDUAL,
}
_BETWEEN = dict.fromkeys(("audio_to_video_norm", "video_to_audio_norm"), RESIDUAL_RMS_NORM_MODULATE_TWICE_NATIVE)
_NOTHING = (None, None)


def _sites(block: Any) -> dict[str, Any]:
    streams = [prefix for prefix in ("", "audio_") if hasattr(block, f"{prefix}attn1")]
    found = {prefix + site: op for site, op in _OF_ONE.items() for prefix in streams}
    found |= _BETWEEN if len(streams) == 2 else {}
    modulated = block.cross_attention_adaln  # the text, in LTX-2.3
    return {site: op for site, op in found.items() if modulated or "text" not in site}


OPERATORS = tuple(dict.fromkeys((*_OF_ONE.values(), *_BETWEEN.values())))

_METHODS = ("get_ada_values", "get_av_ca_ada_values", "_apply_text_cross_attention")


def originals() -> list[Entry]:
    """The functions that the forward below and the seams leave out, besides those of the operators' references."""
    found = [(_Stock, name, f"BasicAVTransformerBlock.{name}") for name in ("forward", *_METHODS)]
    found += [(transformer, "apply_cross_attention_adaln", "apply_cross_attention_adaln")]
    homes = [home for home in (utils, transformer, ops) if inspect.ismodule(home) and hasattr(home, "rms_norm")]
    found += [(home, "rms_norm", f"{home.__name__}.rms_norm") for home in homes]
    return found + of_seams()


def of_seams() -> list[Entry]:
    """The methods that a callable of ours in a seam leaves out."""
    kinds = [getattr(ops, name) for name in SEAMS.values() if hasattr(ops, name)]
    return [(kind, "__call__", f"{kind.__name__}.__call__") for kind in kinds]


@dataclasses.dataclass
class _Stream:
    """One modality on its way through a block: its tokens x, and what is still to be added to them."""

    args: Any  # TransformerArgs, or None: this modality is absent
    prefix: str
    perturbs: Any  # PerturbationType of its self-attention
    skips: Any  # PerturbationType of its attention to the other
    x: Any = None
    runs: bool = False
    ada: list[Ada] = dataclasses.field(default_factory=list)
    pending: tuple[Any, ...] | None = None  # y, gate, gate_table, mask

    def __post_init__(self) -> None:
        if self.args is not None:
            self.x = self.args.x
            self.runs = self.args.enabled and self.x.numel() > 0

    @property
    def is_there(self) -> bool:
        return self.args is not None and self.x.numel() > 0

    def result(self) -> Any:
        return None if self.args is None else dataclasses.replace(self.args, x=self.x)


class BasicAVTransformerBlock(Block):
    """In place of the forward of upstream's block: its elementwise chains are fused."""

    __slots__ = ("_beside", "_quiet", "_seams", "_values")

    def __init__(self, block: Any, model: Model, sites: dict[str, Site], values: Values, beside: Beside):
        super().__init__(block, model, sites)
        self._values, self._beside, self._quiet = values, beside, Quiet(block)
        self._seams = [(seam, block.__dict__.get(seam)) for seam in _FILLED]

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if torch.is_grad_enabled():  # the gradient of a sum depends on how it was formed
            given = [vars(a).values() for a in (*args, *kwargs.values()) if dataclasses.is_dataclass(a)]
            if any(isinstance(t, Tensor) and t.requires_grad for t in chain(*given, block.parameters())):
                return "a gradient is required of the block's inputs or weights"
        for name in _METHODS:
            if not own_method(block, name, _Stock):
                return f"the {name} of this {named(type(block))} is another than that of ltx-core's block"
        for seam, callable_ in self._seams:
            if block.__dict__.get(seam) is not callable_:
                return f"its {seam} was replaced meanwhile"
        return None

    def fused(self, block: Any, video: Any, audio: Any, perturbations: Any = None) -> tuple[Any, Any]:
        if video is None and audio is None:
            raise ValueError("At least one of video or audio must be provided")  # upstream's words
        v = _Stream(video, "", PerturbationType.SKIP_VIDEO_SELF_ATTN, PerturbationType.SKIP_A2V_CROSS_ATTN)
        a = _Stream(audio, "audio_", PerturbationType.SKIP_AUDIO_SELF_ATTN, PerturbationType.SKIP_V2A_CROSS_ATTN)
        if _ASKS and perturbations is None:
            perturbations = BatchedPerturbationConfig.empty((video or audio).x.shape[0])
        main: Any = None
        side = self._beside.of(v.x, lambda: self._is_quiet(block)) if v.runs and a.runs else None
        on_side: Any = contextlib.nullcontext() if side is None else torch.cuda.stream(side)
        if side is not None:
            main = torch.cuda.current_stream(v.x.device)
            side.wait_stream(main)

        # 1. self-attention and cross-attention to the text
        if v.runs:
            self._attend(block, v, perturbations)
        with on_side:
            if a.runs:
                self._attend(block, a, perturbations)

        # 2. cross-attention between video and audio, each of the other as it was before
        a2v = v.runs and a.is_there and not self._skipped(block, v, perturbations)
        v2a = a.runs and v.is_there and not self._skipped(block, a, perturbations)
        if a2v or v2a:
            for_a2v, for_v2a = self._between(block, v, "audio_to_video_norm", "video", a2v, v2a)
            with on_side:
                audio_for_a2v, audio_for_v2a = self._between(block, a, "video_to_audio_norm", "audio", a2v, v2a)
            if side is not None:
                met = side.record_event()
                side.wait_stream(main)
                main.wait_event(met)
            if a2v:
                gate, mask = self._gate(block, v, "video"), self._mask(block, v, perturbations)
                attended = block.audio_to_video_attn(
                    for_a2v,
                    context=audio_for_a2v,
                    pe=video.cross_positional_embeddings,
                    k_pe=audio.cross_positional_embeddings,
                )
                v.pending = (attended, *gate, mask)
            for_a2v = attended = None  # memory for the feed-forward; what the other stream reads stays until it joins
            if v2a:
                with on_side:
                    gate, mask = self._gate(block, a, "audio"), self._mask(block, a, perturbations)
                    attended = block.video_to_audio_attn(
                        audio_for_v2a,
                        context=for_v2a,
                        pe=audio.cross_positional_embeddings,
                        k_pe=video.cross_positional_embeddings,
                    )
                    a.pending = (attended, *gate, mask)

        # 3. feed-forward
        if v.runs:
            self._feed_forward(block, v)
        with on_side:
            if a.runs:
                self._feed_forward(block, a)
        if side is not None:
            main.wait_stream(side)
        return v.result(), a.result()

    def _attend(self, block: Any, s: _Stream, perturbations: Any) -> None:
        """A modality's attention to itself, added, and to the text, still pending."""
        site, eps, p, args = self.named_sites, block.norm_eps, s.prefix, s.args
        s.ada = self._ada(block, getattr(block, f"{p}scale_shift_table"), args.timesteps, s.x)
        mask, all_perturbed = self._perturbed(block, s, perturbations)
        n = site[f"{p}norm1"].call(RMS_NORM_MODULATE_NATIVE, s.x, *modulation(s.ada[1], s.ada[0]), eps)
        attended = getattr(block, f"{p}attn1")(
            n,
            pe=args.positional_embeddings,
            mask=args.self_attention_mask,
            perturbation_mask=mask,
            all_perturbed=all_perturbed,
        )
        text = args.context
        query: Any = ABSENT
        gate: Any = _NOTHING
        if block.cross_attention_adaln:
            shift, scale = self._prompt(
                block, getattr(block, f"{p}prompt_scale_shift_table"), args.prompt_timestep, s.x
            )
            text = site[f"{p}text"].call(MODULATE, text, *modulation(scale, shift))
            query, gate = modulation(s.ada[7], s.ada[6]), s.ada[8]
        s.pending = (attended, *s.ada[2], None)
        (n,) = self._add_and_norm(block, s, site[f"{p}norm2"], query)
        s.pending = (getattr(block, f"{p}attn2")(n, context=text, mask=args.context_mask), *gate, None)

    def _between(self, block: Any, s: _Stream, site: str, name: str, a2v: bool, v2a: bool) -> list[Tensor | None]:
        """A modality's norm, modulated for the attention of video to audio, of audio to video, or both."""
        table = getattr(block, f"scale_shift_table_a2v_ca_{name}")[:4]
        ada = self._ada(block, table, s.args.cross_scale_shift_timestep, s.x)
        wanted = [modulation(*ada[i : i + 2]) for i, runs in ((0, a2v), (2, v2a)) if runs]
        found = iter(self._add_and_norm(block, s, self.named_sites[site], *wanted))
        return [next(found) if runs else None for runs in (a2v, v2a)]

    def _feed_forward(self, block: Any, s: _Stream) -> None:
        site, p = self.named_sites, s.prefix
        (n,) = self._add_and_norm(block, s, site[f"{p}norm3"], modulation(s.ada[4], s.ada[3]))
        s.x = site[f"{p}output"].call(GATED_RESIDUAL, s.x, getattr(block, f"{p}ff")(n), *s.ada[5])

    def _add_and_norm(self, block: Any, s: _Stream, site: Site, *modulations: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Add to the tokens what is pending; their norm under each modulation."""
        pending, s.pending, eps = s.pending, None, block.norm_eps
        if pending is None:  # an attention that was left out
            return tuple(site.call(RMS_NORM_MODULATE_NATIVE, s.x, *m, eps) for m in modulations)
        once = len(modulations) == 1
        operator = RESIDUAL_RMS_NORM_MODULATE_NATIVE if once else RESIDUAL_RMS_NORM_MODULATE_TWICE_NATIVE
        s.x, *normed = site.call(operator, s.x, *pending, *chain.from_iterable(modulations), eps)
        return tuple(normed)

    # -- AdaLN values --

    def _ada(self, block: Any, table: Tensor, timestep: Tensor, x: Tensor) -> list[Ada]:
        """(value, table row) of each row of a table, not yet added: `get_ada_values` before its sum."""
        if timestep.shape[0] != x.shape[0]:  # upstream knows what to do
            return [(value, None) for value in block.get_ada_values(table, x.shape[0], timestep, slice(None))]
        table = table.to(device=timestep.device, dtype=timestep.dtype)
        return list(zip(self._values.of(timestep, table.shape[0]), table.unbind(0), strict=True))

    def _gate(self, block: Any, s: _Stream, name: str) -> Ada:
        (gate,) = self._ada(
            block, getattr(block, f"scale_shift_table_a2v_ca_{name}")[4:], s.args.cross_gate_timestep, s.x
        )
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

    def _is_quiet(self, block: Any) -> bool:
        """Whether nobody else is called in the block, nor are its attentions somebody else's (parallel ones, say)."""
        attentions = [module for module in block._modules.values() if isinstance(module, attention.Attention)]
        found = (vars(attn).get(f) for attn in attentions for f in ("attention_function", "masked_attention_function"))
        own = all(type(f).__module__ == attention.__name__ for f in found if f is not None)
        return own and self._quiet()


# -- the seams of a block whose forward was not read -------------------------------------------------------------------


class Seam:
    """A callable of ours in a seam; `run` is what it does, `chain` what was there does."""

    kind = "block"

    def __init__(self, site: Site, stock: Any, model: Model):
        self.site, self.stock, self.model = site, stock, model
        model.parts += 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.chain(*args, **kwargs)
        if (reason := self.model.why_stock(self.kind)) is not None:
            if reason is not ENDED:  # else somebody has put it back after it was taken away
                self.site.fall(reason)
            return self.chain(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def chain(self, *args: Any, **kwargs: Any) -> Any:
        return self.stock(*args, **kwargs)

    @staticmethod
    def stock_of(found: Any) -> Any:
        """What is in a seam, or was before one of ours that was put back there after its acceleration had ended."""
        return found.stock if isinstance(found, Seam) else found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle of an accelerated model holds the stock callable: it is a plain model."""
        return copy.copy, (self.stock,)


class AdaZero(Seam):
    """ltx-core's `AdaZeroCallable`: norm and modulation."""

    def run(self, x: Tensor, eps: float, scale: Tensor, shift: Tensor) -> Tensor:
        return self.site.call(RMS_NORM_MODULATE_NATIVE, x, scale, shift, None, None, eps)


class PostSA(Seam):
    """ltx-core's `PostSACallable`: gated residual, then its norm."""

    def run(self, x: Tensor, y: Tensor, norm_weights: Tensor | None, eps: float, gate: Tensor) -> list[Tensor]:
        if norm_weights is not None:
            self.site.fall("its norm has a weight; accepted: norms without")
            return self.chain(x, y, norm_weights, eps, gate)
        found = self.site.call(RESIDUAL_RMS_NORM_MODULATE_NATIVE, x, y, gate, None, None, *ABSENT, eps)
        return list(found)


def why_seam_stays(owner: Any, seam: str) -> str | None:
    """Why what is in a seam can't be stood in for: it is not ltx-core's own, or not a source that was read."""
    name, found = SEAMS[seam], Seam.stock_of(owner.__dict__.get(seam))
    if type(found) is not getattr(ops, name, None):
        return f"its {seam} is a {named(type(found))}, not ltx-core's own"
    if (source := source_hash(type(found).__call__)) not in _READ[name]:
        return f"{name} is not a source that bitfuse knows ({source})"
    return None


# -- taking over -------------------------------------------------------------------------------------------------------


def accelerate(transformer: Any, model: Model, host: str) -> None:
    """Give every block of a transformer the forward above, or fill its seams, noting each site in the handle."""
    values, beside, handle = Values(), Beside(), model.handle
    for index, block in enumerate(transformer.transformer_blocks):
        name = f"transformer_blocks.{index}"
        reason = next(_why_left_alone(block, host), None)
        sites = {site: Site(f"{name}.{site}", op.name, reason) for site, op in _sites(block).items()}
        handle.sites += sites.values()
        if reason is None:
            handle.put(block, BasicAVTransformerBlock(block, model, sites, values, beside))
        elif ops is not None and type(block) is _Stock:
            for seam, (ours, operator) in _FILLED.items():
                site = Site(f"{name}.{seam}", operator.name, why_seam_stays(block, seam))
                handle.sites.append(site)
                if site.declined is None:
                    handle.fill(block, seam, ours(site, Seam.stock_of(block.__dict__[seam]), model))
    Rehearsal.of_first(transformer.transformer_blocks, handle)


_FILLED: dict[str, tuple[type[Seam], Any]] = {
    "ada_zero_function": (AdaZero, RMS_NORM_MODULATE_NATIVE),
    "post_sa_function": (PostSA, RESIDUAL_RMS_NORM_MODULATE_NATIVE),
}


def _why_left_alone(block: Any, host: str) -> Iterator[str]:
    if hasattr(block, "_orig_mod"):
        yield "the block was compiled with torch.compile, and is left to that"
    sources = {
        "BasicAVTransformerBlock.forward": _Stock.forward,
        "BasicAVTransformerBlock.get_ada_values": _Stock.get_ada_values,
        "BasicAVTransformerBlock.get_av_ca_ada_values": _Stock.get_av_ca_ada_values,
        "BasicAVTransformerBlock._apply_text_cross_attention": _Stock._apply_text_cross_attention,
        "apply_cross_attention_adaln": transformer.apply_cross_attention_adaln,
        "rms_norm": utils.rms_norm,
    }
    yield from why_not_stock(block, _Stock, "block", host, _READ, sources)
    if ops is not None:
        yield from filter(None, (why_seam_stays(block, seam) for seam in _FILLED))
