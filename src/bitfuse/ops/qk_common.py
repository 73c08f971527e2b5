"""What the operators of `qk_norm.py` share: how rows are turned, their predicate, batteries, mutants and geometries.

No kernel and no reference is here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.conditions import HALVES, fitting, plain, runnable
from bitfuse.core.evidence import Audit, Mutant, flushed, fold_mutants
from bitfuse.core.inputs import lookalike
from bitfuse.core.launch import named
from bitfuse.core.numerics import addcmul_fuses
from bitfuse.core.reduction import LAYER_NORM
from bitfuse.core.values import ROW_FAMILIES, battery_shape
from bitfuse.ops.rotary_common import RotaryCase

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """How the rows are turned: TURN of the kernel, whether in fp32, the eager chain, and what its shapes must be."""

    turn: str
    in_fp32: bool = False
    reference: Turn | None = None
    misfit: Callable[[Tensor, Tensor, Tensor, bool], str | None] | None = None


# -- when it doesn't fit -----------------------------------------------------------------------------------------------


def why_not(*args: Any, reference: Callable[..., Any], form: Form) -> Iterator[str]:
    given = named(reference, args)
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    reasons = list(plain(tensors))
    if not reasons:
        reasons += fitting(reference, given, next(misfits(given, form), None))
    reasons += runnable(tensors)
    q, width = given["q"], given["q"].shape[-1] if given["q"].ndim else 1
    if q.dtype not in HALVES:
        reasons.append(f"q is {q.dtype}; accepted: {', '.join(map(str, HALVES))}")
    for name in ("k", "q_weight", "k_weight"):
        if given[name].dtype != q.dtype:
            reasons.append(f"{name} is {given[name].dtype} and q {q.dtype}; they must have one dtype")
    for name in ("q", "k", "q_weight", "k_weight"):
        if not given[name].is_contiguous():
            reasons.append(f"{name} is not contiguous: its strides are {given[name].stride()}")
    if width % 128 or width > 8192:
        reasons.append(f"q is {width} wide; accepted: multiples of 128 up to 8192")
    tables = {name: t for name, t in tensors.items() if name.endswith(("_cos", "_sin"))}
    wanted = {q.dtype} if not form.in_fp32 else {torch.float32, torch.bfloat16, torch.float16}
    for name, t in tables.items():
        if t.dtype not in wanted or t.dtype != given["q_cos"].dtype:
            accepted = (
                "q's dtype" if not form.in_fp32 else "one of torch.float32, torch.bfloat16, torch.float16 for all"
            )
            reasons.append(f"{name} is {t.dtype}; accepted: {accepted}")
        if t.ndim and t.shape[-1] > 1 and t.stride(-1) != 1:
            reasons.append(f"the last dimension of {name} has stride {t.stride(-1)}; accepted: 1")
    if (max(q.numel(), given["k"].numel()) // max(1, width)) >= 2**30:
        reasons.append(f"q {list(q.shape)} or k {list(given['k'].shape)} needs a larger grid than one launch has")
    yield from reasons
    product = torch.float32 if form.in_fp32 else q.dtype
    if not reasons and form.turn == "halves" and addcmul_fuses(q.device, product) is None:
        yield f"addcmul on {q.device} rounds neither once nor twice, so no kernel here equals it"


def misfits(given: dict[str, Any], form: Form) -> Iterator[str]:
    q, k = given["q"], given["k"]
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        yield f"q is {list(q.shape)} and k {list(k.shape)}; accepted: [B, T, N] and [B, S, N]"
        return
    for name in ("q_weight", "k_weight"):
        if list(given[name].shape) != [q.shape[2]]:
            yield f"{name} is {list(given[name].shape)}; accepted: [{q.shape[2]}]"
    if form.misfit is None:
        return
    if (given["k_cos"] is None) != (given["k_sin"] is None):
        yield "of k_cos and k_sin one is None; accepted: both or neither"
        return
    for side in "qk":
        own = side if given[f"{side}_cos"] is not None else "q"
        x, cos, sin = given[side], given[f"{own}_cos"], given[f"{own}_sin"]
        if problem := form.misfit(x, cos, sin, form.in_fp32):
            yield f"{side} and its tables: {problem}"


# -- what a wrong kernel trips over, and geometries --------------------------------------------------------------------


def battery(*args: Any, reference: Callable[..., Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    given = named(reference, args)
    device = given["q"].device
    generator = torch.Generator(device).manual_seed(23)
    shapes = {side: battery_shape(*given[side].shape[:2]) for side in "qk"}
    batch = given["q"].shape[0]
    for family, draw in ROW_FAMILIES.items():
        found: list[Any] = []
        for place, (name, t) in enumerate(given.items()):
            if not isinstance(t, Tensor):
                found.append(t)
                continue
            samples, tokens = shapes[name[0]]
            strided = family != "special rows" and name.endswith(("_cos", "_sin"))  # in the last family they are dense
            if name in ("q", "k"):
                drawn = draw("x", [samples, tokens, t.shape[2]], t.dtype, generator)
            elif t.ndim == 1:
                drawn = draw("value", list(t.shape), t.dtype, generator)
            else:
                # tables that are one sample's of one, or one token's of one, are each sample's and each token's own
                shape, one = list(t.shape), given[name[0]].shape[1] == 1
                if t.ndim > 2:
                    shape[0] = samples if t.shape[0] == batch else 1
                shape[-2] = tokens if t.shape[-2] > 1 or one else 1
                drawn = draw("value", shape, t.dtype, generator)
                if family in ("live", "absorption", "special rows"):
                    angle = 1e3 * torch.randn(shape, generator=generator, device=device)
                    drawn = angle.cos() if name.endswith("cos") else angle.sin()
            found.append(lookalike(t, drawn.to(t.dtype), place if strided else 0))
        yield family, tuple(found)


@dataclass(frozen=True)
class QKCase:
    """A geometry: queries and keys like two `RotaryCase`s of one width. `real` marks those that LTX-2 hosts run."""

    name: str
    queries: RotaryCase
    key_tokens: int | None = None  # None: as many as queries, which share their tables
    turned: bool = True
    misaligned: bool = False
    real: bool = False

    def arguments(self, device: torch.device | str, tokens: int | None = None, seed: int = 0) -> tuple[Any, ...]:
        q, q_cos, q_sin = self.queries.arguments(device, tokens, seed)
        keys = self.queries if self.key_tokens is None else replace(self.queries, tokens=self.key_tokens)
        k, k_cos, k_sin = keys.arguments(device, tokens, seed + 1)
        generator = torch.Generator(device).manual_seed(seed + 2)
        weights = (
            (1 + 0.1 * torch.randn(q.shape[2], generator=generator, device=device)).to(q.dtype) for _ in range(2)
        )
        if not self.turned:
            return (q, k, *weights, 1e-6)
        own = (None, None) if self.key_tokens is None else (k_cos, k_sin)
        return (q, k, *weights, q_cos, q_sin, *own, 1e-6)


def cases(form: Form) -> tuple[QKCase, ...]:
    bf16, fp16 = torch.bfloat16, torch.float16

    def case(
        name: str, tokens: int, heads: int, head_dim: int, keys: int | None = None, real: bool = False, **kwargs: Any
    ) -> QKCase:
        dtype = kwargs.setdefault("x_dtype", bf16)
        kwargs.setdefault("table_dtype", torch.float32 if form.in_fp32 else dtype)
        of = RotaryCase(name, tokens, heads, head_dim, interleaved=form.turn == "neighbours", **kwargs)
        if form.turn == "none" and keys is None:
            keys = tokens
        return QKCase(name, of, keys, turned=form.turn != "none", real=real)

    return (
        case("video self-attention, 768x512x121", 6144, 32, 128, real=True),
        case("the same, batch 2 (guidance)", 6144, 32, 128, batch=2, real=True),
        case("audio to video", 6144, 32, 64, keys=126, real=True),
        case("video to audio", 126, 32, 64, keys=6144, real=True),
        case("audio self-attention, 5 s", 126, 32, 64, real=True),
        case("1536x1024x121", 24576, 32, 128, real=True),
        case("to the text", 6144, 32, 128, keys=1024, real=True),
        case("text connector, 30 heads", 1024, 30, 128, real=True),
        case("small", 21, 4, 64, batch=2, keys=40),
        case("1920 wide", 24, 30, 64),
        case("head size 96", 17, 4, 96),
        case("one token", 1, 32, 128, keys=3),
        case("misaligned", 37, 4, 64, x_form="misaligned"),
        case("fp16", 37, 4, 64, x_dtype=fp16),
    )


def mutants(form: Form) -> tuple[Mutant, ...]:
    halves = form.turn == "halves"
    normed = "round_to(w1 * (rstd * x1), dtype)" if halves else "round_to(w * (rstd * x), dtype)"
    bare = normed[len("round_to(") : -len(", dtype)")]
    x = "x1" if halves else "x"
    found = [
        *fold_mutants(LAYER_NORM),
        Mutant("the weight before the statistic", ((bare, bare.replace(f"w{x[1:]} * (rstd * {x})", f"(w{x[1:]} * {x}) * rstd")),)),  # noqa: E501
        Mutant("rounded before the weight", ((bare, bare.replace(f"(rstd * {x})", f"round_to(rstd * {x}, dtype)")),)),
        Mutant("subnormals flushed", ((bare, bare.replace(f"* {x})", f"* {flushed(x)})")),),
               harmless_for=(torch.float16,)),
        Mutant("the keys normed with the queries' weight", (("k_ptr, k_weight_ptr, k_rstd_ptr", "k_ptr, q_weight_ptr, k_rstd_ptr"),)),  # noqa: E501
        Mutant("the last lane not written", (("here = inside & (lane < N", "here = inside & (lane + 1 < N"),)),
    ]  # fmt: skip
    if form.turn != "none":
        found.append(Mutant("the norm not rounded", ((normed, bare),)))
        found.append(Mutant("every token turned as token 0", (("batch * cos_batch + token * cos_token", "batch * cos_batch + token * 0"),)))  # fmt: skip  # noqa: E501
    if halves:
        found.append(Mutant("the sine's sign swapped", (("negate(s), x2", "s, x2"), ("(s, x1", "(negate(s), x1"))))
    return tuple(found)


def audits(form: Form) -> tuple[Audit, ...]:
    """Rows of 4096 on 128 threads, a program for each of q and of k: half of a thread's 32 elements are of q.

    So the counts are those of one element of q and one of k. For each element: the square, rstd * x, weight *, r1, and
    the addition of the square, of which the first is to zero and so gone; per thread 5 + 2 folds and + eps.
    """
    counts = Counter({"add.rn.f32": 2, "mul.rn.f32": 6, "cvt.rn.bf16.f32": 2})
    loads = {16: 8, 8: 8}  # x and weight, 8 elements at a time; x again for the statistic, in vectors of 4
    if form.turn == "halves":  # r1 to r3 of `split_rotary`: x * c, addcmul, the result; tables have half the elements
        counts += Counter({"mul.rn.f32": 2, "fma.rn.f32": 2, "cvt.rn.bf16.f32": 2 if form.in_fp32 else 4})
        loads[16] += 8 if form.in_fp32 else 4
    if form.turn == "neighbours":  # r1 to r3 of `interleaved_rotary`
        counts += Counter({"mul.rn.f32": 4, "add.rn.f32": 2, "cvt.rn.bf16.f32": 2 if form.in_fp32 else 6})
        loads[16] += 16 if form.in_fp32 else 8
    once = {"add.rn.f32": 5 + 2 + 1 - 1, "div.rn.f32": 1, "rsqrt.approx.f32": 1}
    video = "video self-attention, 768x512x121"
    return (Audit(video, dict(counts), per_thread=once, results=16, loads=loads, stores={16: 4, 4: 1}),)
