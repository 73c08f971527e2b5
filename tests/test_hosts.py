"""Every host alike: an operator's reference is the host's own code, bit for bit; what was never read stays as it is.

A row of `ROWS` says how a host's own function is made to compute what an operator computes. Chains that stand in the
middle of a block's forward are played: the host's forward runs around stubs in place of its modules, which record what
they are given and hand back what the operator's arguments say. A host is added by adding rows.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitfuse
import sglang_host
from bitfuse import OPERATORS, Operator
from bitfuse.core.bits import as_tuple
from bitfuse.run.swap import ours_in
from common import small, small_cases

# -- a block's forward, played ---------------------------------------------------------------------------------------


class NoSuchChain(Exception):
    """The host never computes what these arguments say."""


Value = tuple[Any, Any]  # an AdaLN value [B or 1, T or 1, D] and its table row [D] or None; None: neutral in a sum


class Stub(nn.Module):
    """In place of an attention or a feed-forward: records what it is given, returns `out`, or what adds nothing."""

    def __init__(self, out: Tensor | None = None):
        super().__init__()
        self.out = out

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.given = args[0] if args else kwargs["hidden_states"]
        self.context = kwargs.get("context", kwargs.get("encoder_hidden_states"))
        return -torch.zeros_like(self.given) if self.out is None else self.out


@dataclass
class Play:
    """What goes through the video half of a block. Rows that are not given modulate by 1 + 0 and 0, and gate by 1."""

    x: Tensor
    out: dict[str, Tensor] = field(default_factory=dict)  # what attn1, attn2, audio_to_video_attn and ff return
    rows: dict[int, Value] = field(default_factory=dict)  # of the table of 6 or 9: shift, scale, gate, three times
    between: dict[int, Value] = field(default_factory=dict)  # scale, shift, scale, shift
    gate: Value = (None, None)  # of the attention of video to audio
    mask: Tensor | None = None  # [B, 1, 1], 0 or 1
    text: Tensor | None = None
    prompt: dict[int, Value] = field(default_factory=dict)  # shift, scale
    modulated: bool = False  # LTX-2.3: the text, and the queries to it
    with_audio: bool = False  # whether video and audio look at each other
    stubs: dict[str, Stub] = field(default_factory=dict)

    def stub(self, name: str) -> Stub:
        return self.stubs.setdefault(name, Stub(self.out.get(name)))

    def pack(self, rows: dict[int, Value], count: int) -> tuple[Tensor, Tensor]:
        """(values [B, T or 1, count * D], table [count, D]); minus zero where a row or its table is absent."""
        batch, width = self.x.shape[0], self.x.shape[-1]
        nothing = -torch.zeros(1, 1, width, dtype=self.x.dtype, device=self.x.device)
        neutral = {i: nothing + (i in (2, 5, 8)) for i in range(count)} if count in (6, 9) else {}
        neutral |= {0: nothing + 1} if count == 1 else {}
        found = [rows.get(i, (None, None)) for i in range(count)]
        values = [neutral.get(i, nothing) if value is None else value for i, (value, _) in enumerate(found)]
        tokens = max(value.shape[1] for value in values)
        values = [value.expand(batch, tokens, width) for value in values]
        tables = [nothing[0, 0] if table is None else table for _, table in found]
        return torch.stack(values, dim=2).flatten(2), torch.stack(tables)

    def tables(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            "own": self.pack(self.rows, 9 if self.modulated else 6),
            "prompt": self.pack(self.prompt, 2),
            "between": self.pack(self.between, 4),
            "gate": self.pack({0: self.gate}, 1),
        }

    def blank(self, *, like: Tensor | None = None) -> Tensor:
        """Tokens of no interest."""
        like = self.x if like is None else like
        return torch.zeros(like.shape[0], 1, like.shape[-1], dtype=self.x.dtype, device=self.x.device)


def without_init(kind: type, **attributes: Any) -> Any:
    """A module of this class with just these attributes: stubs, tables and settings."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def diffusers_block(play: Play) -> Tensor:
    upstream = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    from diffusers.models.normalization import RMSNorm

    if "temb_prompt" not in inspect.signature(upstream.LTX2VideoTransformerBlock.forward).parameters:
        pytest.skip("a block of diffusers 0.37, which is left alone")
    if play.mask is not None:
        raise NoSuchChain
    width, tables = play.x.shape[-1], play.tables()
    (temb, table), (prompt, prompt_table) = tables["own"], tables["prompt"]
    (between, between_table), (gate, gate_table) = tables["between"], tables["gate"]
    both = {"": "", "audio_": "audio_"}
    norms = ("norm1", "norm2", "norm3")
    block = without_init(
        upstream.LTX2VideoTransformerBlock,
        **{p + norm: RMSNorm(width, 1e-6, elementwise_affine=False) for p in both for norm in norms},
        audio_to_video_norm=RMSNorm(width, 1e-6, elementwise_affine=False),
        video_to_audio_norm=RMSNorm(width, 1e-6, elementwise_affine=False),
        **{name: play.stub(name) for name in ("attn1", "attn2", "ff", "audio_to_video_attn", "video_to_audio_attn")},
        **{name: Stub() for name in ("audio_attn1", "audio_attn2", "audio_ff")},
        **{p + "scale_shift_table": table for p in both},
        **{p + "prompt_scale_shift_table": prompt_table for p in both},
        **{
            f"{name}_a2v_cross_attn_scale_shift_table": torch.cat([between_table, gate_table])
            for name in ("video", "audio")
        },
        cross_attn_adaln=play.modulated,
        video_cross_attn_adaln=play.modulated,
        audio_cross_attn_adaln=play.modulated,
        perturbed_attn=False,
    )
    text = play.blank() if play.text is None else play.text
    first = [t[:, :1] for t in (temb, between, gate)]  # of the audio, which has one token
    out, _ = block(
        play.x,
        play.blank(),
        text,
        play.blank(),
        temb,
        first[0],
        between,
        first[1],
        gate,
        first[2],
        temb_prompt=prompt,
        temb_prompt_audio=prompt[:, :1],
        use_a2v_cross_attention=play.with_audio,
        use_v2a_cross_attention=play.with_audio,
    )
    return out


def diffusers_connector_block(a: dict[str, Any]) -> Found:
    """The block of a text connector: between attention and feed-forward a sum and a norm, no gate, no modulation."""
    upstream = pytest.importorskip("diffusers.pipelines.ltx2.connectors")
    if any(a[name] is not None for name in ("gate", "mask", "scale")):
        raise NoSuchChain
    norm = nn.RMSNorm(a["x"].shape[-1], eps=a["eps"], elementwise_affine=False)
    attention, feed_forward = Stub(a["y"]), Stub()
    block = without_init(upstream.LTX2TransformerBlock1d, norm1=norm, attn1=attention, norm2=norm, ff=feed_forward)
    return block(a["x"]), feed_forward.given


def ltx_core(play: Play) -> Tensor:
    upstream = pytest.importorskip("ltx_core.model.transformer.transformer")
    args_of = pytest.importorskip("ltx_core.model.transformer.transformer_args").TransformerArgs
    from ltx_core.guidance.perturbations import (
        BatchedPerturbationConfig,
        Perturbation,
        PerturbationConfig,
        PerturbationType,
    )

    tables = play.tables()
    (temb, table), (prompt, prompt_table) = tables["own"], tables["prompt"]
    (between, between_table), (gate, gate_table) = tables["between"], tables["gate"]
    seams = {}
    if hasattr(upstream, "TransformerOpsConfig"):  # from 1.1.4
        stock = upstream.TransformerOpsConfig.from_functions()
        seams = {name: getattr(stock, name) for name in ("ada_zero_function", "post_sa_function")}
    block = without_init(
        upstream.BasicAVTransformerBlock,
        idx=0,
        norm_eps=1e-6,
        **seams,
        **{name: play.stub(name) for name in ("attn1", "attn2", "ff", "audio_to_video_attn", "video_to_audio_attn")},
        **{name: Stub() for name in ("audio_attn1", "audio_attn2", "audio_ff")},
        **{p + "scale_shift_table": table for p in ("", "audio_")},
        **{p + "prompt_scale_shift_table": prompt_table for p in ("", "audio_")},
        **{f"scale_shift_table_a2v_ca_{name}": torch.cat([between_table, gate_table]) for name in ("video", "audio")},
        cross_attention_adaln=play.modulated,
    )
    mask = play.x.new_ones(play.x.shape[0], 1, 1) if play.mask is None else play.mask.expand(play.x.shape[0], 1, 1)
    given = {f.name for f in args_of.__dataclass_fields__.values()}

    def args(x: Tensor, text: Tensor, own: Tensor, between: Tensor, gate: Tensor, prompt: Tensor) -> Any:
        found = dict.fromkeys(given) | {"enabled": True, "x": x, "context": text, "timesteps": own}
        found |= {"cross_scale_shift_timestep": between, "cross_gate_timestep": gate, "prompt_timestep": prompt}
        if "cross_attn_perturbation_mask" in given:  # from 1.1.4
            found |= {"self_attn_all_perturbed": False, "cross_attn_skip_all": False}
            found |= {"cross_attn_perturbation_mask": mask}
        return args_of(**found)

    text = play.blank() if play.text is None else play.text
    video = args(play.x, text, temb, between, gate, prompt)
    audio = args(play.blank(), play.blank(), temb[:, :1], between[:, :1], gate[:, :1], prompt[:, :1])
    more = ()
    if "perturbations" in inspect.signature(upstream.BasicAVTransformerBlock.forward).parameters:
        skipped = PerturbationConfig([Perturbation(PerturbationType.SKIP_A2V_CROSS_ATTN, None)])
        if not ((mask == 0) | (mask == 1)).all():
            raise NoSuchChain  # here a sample is perturbed or it is not
        more = (BatchedPerturbationConfig([PerturbationConfig.empty() if m else skipped for m in mask.flatten()]),)
        if play.mask is not None and not mask.any():
            raise NoSuchChain  # with all samples perturbed the attention is left out
    out, _ = block(video, audio if play.with_audio else None, *more)
    return out.x


def sglang_block(play: Play) -> Tensor:
    upstream = sglang_host.alone()
    if play.mask is not None:
        raise NoSuchChain  # before the gate is added, its product with the mask is formed: no operator's chain
    tables = play.tables()
    (temb, table), (prompt, prompt_table) = tables["own"], tables["prompt"]
    (between, between_table), (gate, gate_table) = tables["between"], tables["gate"]
    both = torch.cat([between_table, gate_table])
    norm = getattr(upstream, "RMSNormNoWeight", None)  # up to 0.5.13 a function
    block = without_init(
        upstream.LTX2TransformerBlock,
        idx=0,
        norm_eps=1e-6,
        **({} if norm is None else {"rms_norm": norm()}),
        **{name: play.stub(name) for name in ("attn1", "attn2", "ff", "audio_to_video_attn", "video_to_audio_attn")},
        **{name: Stub() for name in ("audio_attn1", "audio_attn2", "audio_ff")},
        **{p + "scale_shift_table": table for p in ("", "audio_")},
        **{p + "prompt_scale_shift_table": prompt_table for p in ("", "audio_")},
        **{f"{name}_a2v_cross_attn_scale_shift_table": both for name in ("video", "audio")},
        cross_attention_adaln=play.modulated,
    )
    text = play.blank() if play.text is None else play.text
    ours, theirs = (temb, prompt, between, gate), [t[:, :1] for t in (temb, prompt, between, gate)]
    out, _ = block(
        play.x,
        play.blank(),
        text,
        play.blank(),
        *(t for pair in zip(ours, theirs, strict=True) for t in pair),
        skip_a2v_cross_attn=not play.with_audio,
        skip_v2a_cross_attn=not play.with_audio,
    )
    return out


# -- what an operator computes, in a block ---------------------------------------------------------------------------

Block = Callable[[Play], Tensor]
Found = tuple[Tensor, ...]  # in the reference's order


def norm_modulated(block: Block, a: dict[str, Any]) -> Found:
    play = Play(a["x"], rows={0: (a["shift"], a["shift_table"]), 1: (a["scale"], a["scale_table"])})
    block(play)
    return (play.stub("attn1").given,)


def added_and_normed(block: Block, a: dict[str, Any]) -> Found:
    """After self-attention (gate, LTX-2.3's queries), after that of video to audio (mask), after the text (no gate)."""
    gate = (a["gate"], a["gate_table"])
    modulated = a["scale"] is not None
    if not modulated and (a["gate"] is None or a["mask"] is not None):
        raise NoSuchChain
    shift, scale = (a["shift"], a["shift_table"]), (a["scale"], a["scale_table"])
    if a["mask"] is not None:
        play = Play(a["x"], {"audio_to_video_attn": a["y"]}, {3: shift, 4: scale}, gate=gate, mask=a["mask"])
        play.with_audio, normed = True, "ff"
    elif a["gate"] is None:
        play, normed = Play(a["x"], {"attn2": a["y"]}, {3: shift, 4: scale}), "ff"
    else:
        rows = {2: gate, 6: shift, 7: scale} if modulated else {2: gate}
        play, normed = Play(a["x"], {"attn1": a["y"]}, rows, modulated=modulated), "attn2"
    out = block(play)
    return out, play.stub(normed).given


def added_and_normed_twice(block: Block, a: dict[str, Any]) -> Found:
    """Between the attention to the text and those between video and audio."""
    if a["mask"] is not None:
        raise NoSuchChain
    ca = {0: "scale", 1: "shift", 2: "scale2", 3: "shift2"}
    play = Play(a["x"], {"attn2": a["y"]}, between={i: (a[n], a[f"{n}_table"]) for i, n in ca.items()}, with_audio=True)
    if a["gate"] is not None:
        play.modulated, play.rows = True, {8: (a["gate"], a["gate_table"])}
    out = block(play)
    return out, play.stub("audio_to_video_attn").given, play.stub("video_to_audio_attn").context


def added(block: Block, a: dict[str, Any]) -> Found:
    gate = (a["gate"], a["gate_table"])
    if a["mask"] is None:
        return (block(Play(a["x"], {"ff": a["y"]}, {5: gate})),)
    return (block(Play(a["x"], {"audio_to_video_attn": a["y"]}, gate=gate, mask=a["mask"], with_audio=True)),)


def text_modulated(block: Block, a: dict[str, Any]) -> Found:
    prompt = {0: (a["shift"], a["shift_table"]), 1: (a["scale"], a["scale_table"])}
    play = Play(a["x"][:, :1].contiguous(), text=a["x"], prompt=prompt, modulated=True)
    block(play)
    return (play.stub("attn2").context,)


# -- attentions ------------------------------------------------------------------------------------------------------


def _norm(weight: Tensor, eps: float) -> nn.Module:
    norm = nn.RMSNorm(weight.shape[0], eps=eps, dtype=weight.dtype, device=weight.device)
    norm.weight.data.copy_(weight)
    return norm


def _tables(a: dict[str, Any], side: str) -> tuple[Tensor, Tensor] | None:
    return None if a.get(f"{side}_cos") is None else (a[f"{side}_cos"], a[f"{side}_sin"])


class Projected(nn.Module):
    """In place of to_q, to_k or to_v: what it gives was computed before."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.out = out

    def forward(self, _: Tensor) -> Tensor:
        return self.out


def ltx_core_attention(a: dict[str, Any], kind: str = "split") -> Found:
    upstream = pytest.importorskip("ltx_core.model.transformer.attention")
    rope = pytest.importorskip("ltx_core.model.transformer.rope")
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        seen.extend((q, k))
        return q

    seams = {}
    if hasattr(upstream, "AttentionOps"):  # from 1.1.4
        stock = upstream.AttentionOps()
        names = ("preattention_function", "gated_attention_function", "masked_attention_function")
        seams = {name: getattr(stock, name) for name in names}
    attn = without_init(
        upstream.Attention,
        **seams,
        attention_function=attend,
        rope_type=rope.LTXRopeType(kind),
        heads=1,
        dim_head=a["q"].shape[-1],
        q_norm=_norm(a["q_weight"], a["eps"]),
        k_norm=_norm(a["k_weight"], a["eps"]),
        to_q=Projected(a["q"]),
        to_k=Projected(a["k"]),
        to_v=Projected(a["k"]),
        to_gate_logits=None,
        to_out=nn.Identity(),
    )
    attn(a["q"], context=a["k"], pe=_tables(a, "q"), k_pe=_tables(a, "k"))
    return tuple(seen)


def ltx_core_gate(a: dict[str, Any]) -> Found:
    upstream = pytest.importorskip("ltx_core.model.transformer.attention")
    seams = {}
    if hasattr(upstream, "AttentionOps"):  # from 1.1.4
        seams = {"gated_attention_function": upstream.AttentionOps().gated_attention_function}
    heads = a["logits"].shape[-1]
    attn = without_init(
        upstream.Attention,
        **seams,
        heads=heads,
        dim_head=a["out"].shape[-1] // heads,
        to_v=Projected(a["out"]),
        to_gate_logits=Projected(a["logits"]),
        to_out=nn.Identity(),
    )
    return (attn(a["out"], all_perturbed=True),)


def diffusers_attention(a: dict[str, Any], kind: str = "split") -> Found:
    upstream = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        seen.extend((q.flatten(2), k.flatten(2)))
        return q

    attn = SimpleNamespace(
        rope_type=kind,
        heads=1,
        norm_q=_norm(a["q_weight"], a["eps"]),
        norm_k=_norm(a["k_weight"], a["eps"]),
        to_q=Projected(a["q"]),
        to_k=Projected(a["k"]),
        to_v=Projected(a["k"]),
        to_gate_logits=None,
        to_out=[nn.Identity(), nn.Identity()],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "dispatch_attention_fn", attend)
        turns = {"query_rotary_emb": _tables(a, "q"), "key_rotary_emb": _tables(a, "k")}
        upstream.LTX2AudioVideoAttnProcessor()(attn, a["q"], a["k"], **turns)
    return tuple(seen)


def diffusers_gate(a: dict[str, Any]) -> Found:
    upstream = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    if not hasattr(upstream, "LTX2PerturbedAttnProcessor"):
        pytest.skip("this diffusers has no head gates")
    attn = SimpleNamespace(
        heads=a["logits"].shape[-1],
        to_v=Projected(a["out"]),
        to_gate_logits=Projected(a["logits"]),
        to_out=[nn.Identity(), nn.Identity()],
    )
    return (upstream.LTX2PerturbedAttnProcessor()(attn, a["out"], all_perturbed=True),)


def diffusers_perturbed(a: dict[str, Any]) -> Found:
    upstream = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")
    if not hasattr(upstream, "LTX2PerturbedAttnProcessor"):
        pytest.skip("this diffusers has no guidance by perturbation")
    heads = a["logits"].shape[-1]
    attn = SimpleNamespace(
        heads=heads,
        norm_q=nn.Identity(),
        norm_k=nn.Identity(),
        to_q=Projected(a["value"]),
        to_k=Projected(a["value"]),
        to_v=Projected(a["value"]),
        to_gate_logits=Projected(a["logits"]),
        to_out=[nn.Identity(), nn.Identity()],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "dispatch_attention_fn", lambda *_, **__: a["out"].unflatten(2, (heads, -1)))
        call = upstream.LTX2PerturbedAttnProcessor()
        return (call(attn, a["out"], perturbation_mask=a["mask"], all_perturbed=False),)


def ltx_core_perturbed(a: dict[str, Any]) -> Found:
    upstream = pytest.importorskip("ltx_core.model.transformer.attention")
    seams = {"attention_function": lambda *_: a["out"]}
    if hasattr(upstream, "AttentionOps"):  # from 1.1.4
        gate = upstream.AttentionOps().gated_attention_function
        seams |= {"preattention_function": lambda q, k, *_: (q, k), "gated_attention_function": gate}
    gated = a["logits"] is not None
    attn = without_init(
        upstream.Attention,
        **seams,
        rope_type=None,
        heads=a["logits"].shape[-1] if gated else 1,
        dim_head=a["out"].shape[-1] // (a["logits"].shape[-1] if gated else 1),
        q_norm=nn.Identity(),
        k_norm=nn.Identity(),
        to_q=Projected(a["value"]),
        to_k=Projected(a["value"]),
        to_v=Projected(a["value"]),
        to_gate_logits=Projected(a["logits"]) if gated else None,
        to_out=nn.Identity(),
    )
    return (attn(a["out"], perturbation_mask=a["mask"]),)


def sglang_perturbed(a: dict[str, Any]) -> Found:
    heads = 1 if a["logits"] is None else a["logits"].shape[-1]
    attn = SimpleNamespace(
        local_heads=heads,
        dim_head=a["out"].shape[-1] // heads,
        qk_norm=False,
        to_q=lambda _: (a["value"], None),
        to_k=lambda _: (a["value"], None),
        to_v=lambda _: (a["value"], None),
        to_gate_logits=None if a["logits"] is None else lambda _: (a["logits"], None),
        use_local_attention=True,
        attn=lambda *_, **__: a["out"].unflatten(2, (heads, -1)),
        to_out=[lambda x: (x, None)],
    )
    return (sglang_host.alone().LTX2Attention.forward(attn, a["out"], perturbation_mask=a["mask"]),)


def sglang_attention(a: dict[str, Any], kind: str = "") -> Found:
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        seen.extend((q.flatten(2), k.flatten(2)))
        return q

    attn = SimpleNamespace(
        qk_norm=True,
        norm_eps=a["eps"],
        q_norm=_norm(a["q_weight"], a["eps"]),
        k_norm=_norm(a["k_weight"], a["eps"]),
        local_heads=1,
        dim_head=a["q"].shape[-1],
        to_q=lambda _: (a["q"], None),
        to_k=lambda _: (a["k"], None),
        to_v=lambda _: (a["k"], None),
        to_gate_logits=None,
        use_local_attention=True,
        attn=attend,
        to_out=[lambda x: (x, None)],
    )
    forward = sglang_host.alone().LTX2Attention.forward
    forward(attn, a["q"], context=a["k"], pe=_tables(a, "q"), k_pe=_tables(a, "k"))
    return tuple(seen)


def sglang_gate(a: dict[str, Any]) -> Found:
    heads = a["logits"].shape[-1]
    attn = SimpleNamespace(
        local_heads=heads,
        dim_head=a["out"].shape[-1] // heads,
        to_v=lambda _: (a["out"], None),
        to_gate_logits=lambda _: (a["logits"], None),
        to_out=[lambda x: (x, None)],
    )
    return (sglang_host.alone().LTX2Attention.forward(attn, a["out"], all_perturbed=True),)


def sglang_modulated(a: dict[str, Any]) -> Found:
    """The function by itself, with sums of AdaLN values that are formed before."""
    upstream = sglang_host.alone()
    if not hasattr(upstream, "_ltx2_modulate"):
        pytest.skip("the output's modulation is inline up to SGLang 0.5.17")
    tables = {name: a[f"{name}_table"] for name in ("scale", "shift")}
    values = [a[name] if table is None else table + a[name] for name, table in tables.items()]
    return (upstream._ltx2_modulate(a["x"], *values),)


def sglang_turned(a: dict[str, Any], kind: str) -> Found:
    return (getattr(sglang_host.upstream(), f"apply_{kind}_rotary_emb")(a["x"], (a["cos"], a["sin"])),)


# -- the rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One host function that one operator stands in for. `call` takes the reference's arguments by name.

    case    of the operator's small geometries one that the host has
    """

    host: str
    function: str
    operator: str
    call: Callable[[dict[str, Any]], Found]
    case: str = "small"

    def __str__(self) -> str:
        return f"{self.host} {self.function}: {self.operator}"


def rotary_rows(host: str, module: str, chain: str, call: Callable[..., Tensor]) -> Iterator[Row]:
    """The rotary functions themselves; `call` takes the function and the reference's arguments."""
    for kind in ("split", "interleaved"):
        function = f"apply_{kind}_rotary_emb"

        def turned(a: dict[str, Any], function: str = function) -> Found:
            return (call(getattr(pytest.importorskip(module), function), **a),)

        yield Row(host, function, f"{kind}_rotary_{chain}", turned)


def ltx_core_turn(function: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.ndim == 3 and cos.ndim == 4 and cos.shape[0] != x.shape[0] and "b_freq" not in inspect.getsource(function):
        raise NoSuchChain  # tables of batch 1 for more samples: from 1.1.4 on
    return function(x, cos, sin)


def block_rows(host: str, function: str, block: Block, norm: str) -> Iterator[Row]:
    """The chains of a block's forward, whose norm is `native` or `composed`."""
    plays = {
        f"rms_norm_modulate_{norm}": norm_modulated,
        f"residual_rms_norm_modulate_{norm}": added_and_normed,
        f"residual_rms_norm_modulate_twice_{norm}": added_and_normed_twice,
        "gated_residual": added,
        "modulate": text_modulated,
    }
    for operator, how in plays.items():
        yield Row(host, function, operator, lambda a, how=how: how(block, a))


def attention_rows(host: str, function: str, attention: Any, gate: Any, chain: str) -> Iterator[Row]:
    """The chains of an attention, whose rotary embedding is `per_op` or `fp32`."""
    yield Row(host, function, "qk_rms_norm", attention)
    for kind in ("split", "interleaved"):
        operator = f"qk_rms_norm_{kind}_rotary_{chain}"
        yield Row(host, function, operator, lambda a, kind=kind: attention(a, kind))
    yield Row(host, function, "head_gate", gate)


ROWS = [
    *rotary_rows(
        "diffusers", "diffusers.models.transformers.transformer_ltx2", "fp32", lambda f, x, cos, sin: f(x, (cos, sin))
    ),
    *rotary_rows("ltx-core", "ltx_core.model.transformer.rope", "per_op", ltx_core_turn),
    *block_rows("diffusers", "LTX2VideoTransformerBlock.forward", diffusers_block, "composed"),
    *attention_rows("diffusers", "LTX2AudioVideoAttnProcessor.__call__", diffusers_attention, diffusers_gate, "fp32"),
    Row(
        "diffusers",
        "LTX2TransformerBlock1d.forward",
        "residual_rms_norm_modulate_native",
        diffusers_connector_block,
        "no gate, no modulation",
    ),
    Row("diffusers", "LTX2PerturbedAttnProcessor.__call__", "lerp_head_gate", diffusers_perturbed),
    Row("ltx-core", "Attention.forward", "weighted_sum_head_gate", ltx_core_perturbed),
    Row("SGLang", "LTX2Attention.forward", "weighted_sum_head_gate", sglang_perturbed),
    *block_rows("ltx-core", "BasicAVTransformerBlock.forward", ltx_core, "native"),
    *attention_rows("ltx-core", "Attention.forward", ltx_core_attention, ltx_core_gate, "per_op"),
    *(
        Row("SGLang", f"apply_{kind}_rotary_emb", f"{kind}_rotary_per_op", lambda a, kind=kind: sglang_turned(a, kind))
        for kind in ("split", "interleaved")
    ),
    *block_rows("SGLang", "LTX2TransformerBlock.forward", sglang_block, "native"),
    Row("SGLang", "_ltx2_modulate", "modulate", sglang_modulated),
    *attention_rows("SGLang", "LTX2Attention.forward", sglang_attention, sglang_gate, "per_op"),
]


def named(operator: Operator, args: tuple[Any, ...]) -> dict[str, Any]:
    parameters = inspect.signature(operator.reference).parameters.values()
    defaults = {p.name: None if p.default is p.empty else p.default for p in parameters}
    return defaults | dict(zip(defaults, args, strict=False))


def inputs(row: Row) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Small geometries (dtypes, shapes, strides), and the batteries of a few of them (specials, ties, sizes)."""
    operator = OPERATORS[row.operator]
    cases = small_cases(operator)
    cases += [case for case in operator.cases if case.real and "mask" in case.name]
    for case in cases:
        yield case.name, case.arguments("cpu", tokens=5)
    own = [case for case in cases[2:-1] if case.name == row.case]
    for case in cases[:2] + cases[-1:] + own:
        for family, args in operator.battery(*case.arguments("cpu", tokens=3)):
            yield f"{case.name}, {family}", args


def differences(row: Row, operator: Operator, args: tuple[Any, ...], of: tuple[Any, ...]) -> list[Any] | None:
    """What differs between the host on `of` and the reference on `args`; None where the host has no such chain."""
    with torch.no_grad():
        try:
            found = row.call(named(operator, of))
        except NoSuchChain:
            return None
        expected = as_tuple(operator.reference(*args))
    assert len(found) == len(expected)
    return [bitfuse.compare(theirs, ours) for theirs, ours in zip(found, expected, strict=True)]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_reference_is_the_hosts_own_code(row):
    operator = OPERATORS[row.operator]
    seen = 0
    for name, args in inputs(row):
        found = differences(row, operator, args, args)
        seen += found is not None
        assert not any(found or ()), f"{name}: {found}"
    assert seen > 6


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_another_input_would_be_seen(row):
    """The control: of each tensor that a host is given, one other element changes what it computes."""
    operator = OPERATORS[row.operator]
    args = small(operator, "cpu", name=row.case)
    changed = 0
    for i, t in enumerate(args):
        if not isinstance(t, Tensor):
            continue
        other = t.clone()
        other[(0,) * t.ndim] += 1
        found = differences(row, operator, args, (*args[:i], other, *args[i + 1 :]))
        assert any(found), f"argument {i} of {operator.name}"
        changed += 1
    assert changed >= 2


# -- whole models ----------------------------------------------------------------------------------------------------

# host: the test module that makes its model, how, and the modules that know its sources
MODELS = {
    "diffusers": ("test_diffusers", lambda t: t.make(t.V23), ("diffusers",)),
    "diffusers.pipelines.ltx2": (
        "test_connectors",
        lambda t: t.connectors("2.3"),
        ("diffusers", "diffusers_connectors"),
    ),
    "ltx-core": ("test_ltx_core", lambda t: t.make("2.3"), ("ltx_core",)),
    "sglang": ("sglang_host", lambda t: t.built(**t.V23), ("sglang",)),
}


def _is_a_hosts(value: Any) -> bool:
    return type(value).__module__.startswith(("diffusers.", "ltx_core.", "bitfuse.")) and hasattr(value, "__dict__")


def attributes(model: nn.Module) -> dict[tuple, int]:
    """Every attribute of every module, and of what a module holds that is none, by identity."""
    found = {}

    def look(where: tuple, owner: Any) -> None:
        found[(*where, "__class__")] = id(type(owner))
        for name, value in vars(owner).items():
            found[(*where, name)] = id(value)
            if isinstance(value, dict):
                found.update({(*where, name, key): id(v) for key, v in value.items()})
            elif _is_a_hosts(value) and len(where) < 3:
                look((*where, name), value)

    for name, module in model.named_modules():
        look((name,), module)
    return found


@pytest.fixture(params=MODELS)
def host_model(request):
    module, make, adapters = MODELS[request.param]
    pytest.importorskip(request.param.replace("-", "_"))
    with torch.no_grad():
        model = make(importlib.import_module(module))
    return model, [importlib.import_module(f"bitfuse.hosts.{a}") for a in adapters]


def test_restore_leaves_every_attribute_as_it_was(host_model):
    model, _ = host_model
    before, keys = attributes(model), list(model.state_dict())
    handle = bitfuse.accelerate(model)
    assert attributes(model) != before
    assert list(model.state_dict()) == keys
    assert bitfuse.accelerate(model) is handle
    handle.restore()
    assert attributes(model) == before


def test_sources_never_seen_are_left_as_they_are_and_named(host_model, monkeypatch):
    model, adapters = host_model
    for adapter in adapters:
        for name in adapter.READ:
            monkeypatch.setitem(adapter.READ, name, {"0" * 16})
    before = attributes(model)
    with bitfuse.accelerated(model) as handle:
        assert attributes(model) == before
        sites = handle.report().sites
        assert sites
        assert {site.state for site in sites} == {"left alone"}
        assert all("is not a source that bitfuse knows (" in site.declined for site in sites)


def test_a_second_stream_is_used_where_nobody_is_called_along_the_way(host_model):
    """The audio half runs beside the video half only where no hook sees it: known without a GPU."""
    model, _ = host_model
    with bitfuse.accelerated(model):
        block = getattr(model, "transformer_blocks", [None])[0]
        ours = None if block is None else ours_in(block)
        if getattr(ours, "second_stream", None) is None:
            pytest.skip("this host's blocks run on one stream")
        why_watched = functools.partial(ours.why_watched, block)
        assert why_watched() is None
        with pytest.MonkeyPatch.context() as patch:
            forward = block.ff.forward
            patch.setattr(block.ff, "forward", lambda *args: forward(*args))
            assert why_watched() == "the forward of ff was replaced, or a hook runs it (offload, casting)"
        hook = block.attn1.register_forward_hook(lambda *args: None)
        assert why_watched() == "a hook is attached to attn1"
        hook.remove()
        hook = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
        assert why_watched() == "a hook is registered for all modules"
        hook.remove()
        assert why_watched() is None
