"""RMSNorm over all heads of queries and keys, then their rotary embedding, both streams in one launch.

`F.rms_norm` with a weight, as every LTX-2 host calls it on the projections to_q and to_k, and then one of the four
rotary chains, or none (the attention to the text). A program takes one row, of the queries or of the keys, by turns,
so that the tables of a token are read from memory once and found in the cache the second time.

Roundings, in order:
    r1  weight * (rstd * x), to x's dtype; rstd = rsqrt.approx(mean square + eps) in fp32, mean square in ATen's
        order LAYER_NORM (`bitfuse.reduction`)
    then r1 to r3 of `split_rotary` or `interleaved_rotary`

NaN and infinities spread over their row as in the chain; signed zeros and subnormals are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.contract import Mutant, Operator, Out, Plan, Tier, fitting, on_meta, outputs_like, plain, runnable
from bitfuse.kernel import kernel, triton_dtype
from bitfuse.numerics import addcmul_fuses, round_to
from bitfuse.ops.adaln_cases import DRAWS
from bitfuse.ops.adaln_common import HALVES, WARPS, battery_shape, named, power_of_2, rows_per_program
from bitfuse.ops.interleaved_rotary import interleaved_rotary_fp32, interleaved_rotary_per_op
from bitfuse.ops.norm_common import fold_mutants
from bitfuse.ops.rotary_common import RotaryCase, interleaved_misfit, split_misfit, turn_halves, turn_neighbours
from bitfuse.ops.split_rotary import split_rotary_fp32, split_rotary_per_op
from bitfuse.proof import lookalike, strides
from bitfuse.reduction import GIVEN, LAYER_NORM, layer_norm_mean_square, row_rstd

if TYPE_CHECKING:
    import triton.language as tl

_Pair = tuple[Tensor, Tensor]
_Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


# -- references --------------------------------------------------------------------------------------------------------


def qk_rms_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float = 1e-6) -> _Pair:
    """(q, k), normed: `norm_q` and `norm_k` of diffusers' LTX2Attention, ltx-core and SGLang, without rotary embedding.

    q                     [B, T, N], contiguous, bf16 or fp16
    k                     [B, S, N], likewise
    q_weight, k_weight    [N]
    """
    return F.rms_norm(q, q.shape[-1:], q_weight, eps), F.rms_norm(k, k.shape[-1:], k_weight, eps)  # r1


def qk_rms_norm_split_rotary_fp32(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_cos: Tensor,
    q_sin: Tensor,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    eps: float = 1e-6,
) -> _Pair:
    """(q, k), normed and turned: diffusers' LTX2 attention processors with rope_type "split".

    q, k, weights    as in `qk_rms_norm`
    q_cos, q_sin     [B, H, T, N/H/2], as in `split_rotary_fp32`
    k_cos, k_sin     [B, H, S, N/H/2]; None: the queries' tables serve both
    """
    return _turned(split_rotary_fp32, q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)


def qk_rms_norm_split_rotary_per_op(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_cos: Tensor,
    q_sin: Tensor,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    eps: float = 1e-6,
) -> _Pair:
    """(q, k), normed and turned: ltx-core's and SGLang's attention with split tables of q's dtype."""
    return _turned(split_rotary_per_op, q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)


def qk_rms_norm_interleaved_rotary_fp32(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_cos: Tensor,
    q_sin: Tensor,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    eps: float = 1e-6,
) -> _Pair:
    """(q, k), normed and turned: diffusers' LTX2 attention processors with rope_type "interleaved".

    q_cos, q_sin     [B, T, N], k_cos and k_sin [B, S, N], as in `interleaved_rotary_fp32`
    """
    return _turned(interleaved_rotary_fp32, q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)


def qk_rms_norm_interleaved_rotary_per_op(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_cos: Tensor,
    q_sin: Tensor,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    eps: float = 1e-6,
) -> _Pair:
    """(q, k), normed and turned: ltx-core's attention with interleaved tables of q's dtype."""
    return _turned(interleaved_rotary_per_op, q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)


def _turned(
    turn: _Turn,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_cos: Tensor,
    q_sin: Tensor,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    eps: float,
) -> _Pair:
    q, k = qk_rms_norm(q, k, q_weight, k_weight, eps)
    if k_cos is None or k_sin is None:
        k_cos, k_sin = q_cos, q_sin
    return turn(q, q_cos, q_sin), turn(k, k_cos, k_sin)


# -- the kernel --------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("q_rows", "k_rows", "q_tokens", "k_tokens"))
def _qk_rms_norm_rotary_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr,
    q_rstd_ptr, k_rstd_ptr, q_out_ptr, k_out_ptr,
    q_rows, k_rows, q_tokens, k_tokens, eps,
    q_cos_batch: tl.int64, q_cos_token: tl.int64, q_cos_head: tl.int64,
    q_sin_batch: tl.int64, q_sin_token: tl.int64, q_sin_head: tl.int64,
    k_cos_batch: tl.int64, k_cos_token: tl.int64, k_cos_head: tl.int64,
    k_sin_batch: tl.int64, k_sin_token: tl.int64, k_sin_head: tl.int64,
    N: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr,
    LANES: tl.constexpr, TURN: tl.constexpr, PRODUCT: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Even programs norm and turn ROWS rows of the queries, odd ones of the keys."""
    x_ptr, weight_ptr, rstd_ptr, out_ptr, rows, tokens = q_ptr, q_weight_ptr, q_rstd_ptr, q_out_ptr, q_rows, q_tokens
    of_keys = tl.program_id(0) % 2 == 1
    if of_keys:
        x_ptr, weight_ptr, rstd_ptr, out_ptr, rows, tokens = (
            k_ptr, k_weight_ptr, k_rstd_ptr, k_out_ptr, k_rows, k_tokens
        )  # fmt: skip
    row = (tl.program_id(0) // 2) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    start = row.to(tl.int64)[:, None] * N
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    lane = tl.arange(0, WIDTH)[None, :]

    if TURN != "none":
        cos_ptr, sin_ptr, cos_batch, cos_token, cos_head, sin_batch, sin_token, sin_head = (
            q_cos_ptr, q_sin_ptr, q_cos_batch, q_cos_token, q_cos_head, q_sin_batch, q_sin_token, q_sin_head
        )  # fmt: skip
        if k_cos_ptr is not None:
            if of_keys:
                cos_ptr, sin_ptr, cos_batch, cos_token, cos_head, sin_batch, sin_token, sin_head = (
                    k_cos_ptr, k_sin_ptr, k_cos_batch, k_cos_token, k_cos_head, k_sin_batch, k_sin_token, k_sin_head
                )  # fmt: skip
        batch, token = (row // tokens).to(tl.int64)[:, None], (row % tokens).to(tl.int64)[:, None]
        cos_at = batch * cos_batch + token * cos_token
        sin_at = batch * sin_batch + token * sin_token

    if TURN == "halves":  # a lane is a pair: two elements of a head, HALF apart
        here = inside & (lane < N // 2)
        head, place = lane // HALF, lane % HALF
        first = head * (2 * HALF) + place
        c = tl.load(cos_ptr + cos_at + head * cos_head + place, mask=here, other=0.0).to(tl.float32)
        s = tl.load(sin_ptr + sin_at + head * sin_head + place, mask=here, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + start + first, mask=here, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptr + start + first + HALF, mask=here, other=0.0).to(tl.float32)
        w1 = tl.load(weight_ptr + first, mask=lane < N // 2, other=0.0).to(tl.float32)
        w2 = tl.load(weight_ptr + first + HALF, mask=lane < N // 2, other=0.0).to(tl.float32)
        rstd = row_rstd(x_ptr + start, rstd_ptr, row, rows, eps, N, ROWS, ORDER, LANES)
        n1 = round_to(w1 * (rstd * x1), dtype)  # r1
        n2 = round_to(w2 * (rstd * x2), dtype)  # r1
        out1, out2 = turn_halves(n1, n2, c, s, PRODUCT, FUSED)
        tl.store(out_ptr + start + first, out1.to(dtype), mask=here)
        tl.store(out_ptr + start + first + HALF, out2.to(dtype), mask=here)
    else:
        here = inside & (lane < N)
        x = tl.load(x_ptr + start + lane, mask=here, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + lane, mask=lane < N, other=0.0).to(tl.float32)
        rstd = row_rstd(x_ptr + start, rstd_ptr, row, rows, eps, N, ROWS, ORDER, LANES)
        out = round_to(w * (rstd * x), dtype)  # r1
        if TURN == "neighbours":
            c = tl.load(cos_ptr + cos_at + lane * cos_head, mask=here, other=0.0).to(tl.float32)
            s = tl.load(sin_ptr + sin_at + lane * sin_head, mask=here, other=0.0).to(tl.float32)
            out = turn_neighbours(out, c, s, ROWS, WIDTH, PRODUCT)
        tl.store(out_ptr + start + lane, out.to(dtype), mask=here)


def _plan(*args: Any, reference: Callable[..., Any], form: _Form, order: str) -> Plan:
    given = named(reference, args)
    q, k = given["q"], given["k"]
    width, per_program = q.shape[-1], rows_per_program()
    rows = [t.numel() // width for t in (q, k)]
    strides_of = [0] * 12
    half, product = width, torch.float32 if form.in_fp32 else q.dtype
    if form.turn != "none":
        tables = [given[name] for name in ("q_cos", "q_sin", "k_cos", "k_sin")]
        half = tables[0].shape[-1]
        strides_of = [n for x, t in zip((q, q, k, k), tables, strict=True) for n in _table_strides(t, x, form)]
    constants = {
        "N": width,
        "HALF": half,
        "WIDTH": power_of_2(width // 2 if form.turn == "halves" else width),
        "ROWS": per_program,
        "ORDER": order,
        "LANES": 128,
        "TURN": form.turn,
        "PRODUCT": triton_dtype(product),
        "FUSED": form.turn == "halves" and addcmul_fuses(q.device, product),
    }
    statistics = tuple(Out((*t.shape[:2], 1), (t.shape[1], 1, 1), torch.float32) for t in (q, k))
    return Plan(
        _qk_rms_norm_rotary_kernel,
        (2 * max(-(-n // per_program) for n in rows), 1, 1),
        (*rows, q.shape[1], k.shape[1], given["eps"], *strides_of),
        constants,
        WARPS,
        outputs_like(on_meta(reference, *args)),
        witnesses=() if order == GIVEN else statistics,
        before=partial(_statistics, reference=reference, rstd=_rstd) if order == GIVEN else None,
        extras=(torch.float32, torch.float32) if order == GIVEN else (),
    )


def _table_strides(table: Tensor | None, x: Tensor, form: _Form) -> tuple[int, int, int]:
    """(batch, token, head) strides of split tables, (batch, token, lane) of interleaved ones; 0 for absent tables."""
    if table is None:
        return 0, 0, 0
    if form.turn == "neighbours":
        batch, token, lane = strides(table.expand(x.shape))
        return batch, token, lane
    _, heads, tokens, half = table.shape
    batch, head, token, _ = strides(table.expand(x.shape[0], heads, tokens, half))
    return batch, token, head


def _rstd(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)[1]


def _emulated_rstd(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(layer_norm_mean_square(x) + eps)


def _statistics(*args: Any, reference: Callable[..., Any], rstd: Callable[..., Tensor]) -> _Pair:
    given = named(reference, args)
    eps = given["eps"]
    return rstd(given["q"], given["q_weight"], eps), rstd(given["k"], given["k_weight"], eps)


def _emulated(*args: Any, reference: Callable[..., Any], form: _Form) -> _Pair:
    """The reference's own steps, with the statistics in CUDA's order."""
    given = named(reference, args)
    outs = []
    for side in "qk":
        x, weight = given[side], given[f"{side}_weight"]
        n = (weight.float() * (_emulated_rstd(x, weight, given["eps"]) * x.float())).to(x.dtype)
        if form.reference:
            own = side if given.get(f"{side}_cos") is not None else "q"
            n = form.reference(n, given[f"{own}_cos"], given[f"{own}_sin"])
        outs.append(n)
    return outs[0], outs[1]


# -- when it doesn't fit -------------------------------------------------------------------------------------------------


def _why_not(*args: Any, reference: Callable[..., Any], form: _Form) -> Iterator[str]:
    given = named(reference, args)
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    reasons = list(plain(tensors))
    if not reasons:
        reasons += fitting(reference, given, next(_misfits(given, form), None))
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
        if form.turn == "halves" and t.ndim and t.shape[-1] > 1 and t.stride(-1) != 1:
            reasons.append(f"the last dimension of {name} has stride {t.stride(-1)}; accepted: 1")
    if (max(q.numel(), given["k"].numel()) // max(1, width)) >= 2**30:
        reasons.append(f"q {list(q.shape)} or k {list(given['k'].shape)} needs a larger grid than one launch has")
    yield from reasons
    product = torch.float32 if form.in_fp32 else q.dtype
    if not reasons and form.turn == "halves" and addcmul_fuses(q.device, product) is None:
        yield f"addcmul on {q.device} rounds neither once nor twice, so no kernel here equals it"


def _misfits(given: dict[str, Any], form: _Form) -> Iterator[str]:
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


def _battery(*args: Any, reference: Callable[..., Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    given = named(reference, args)
    device = given["q"].device
    generator = torch.Generator(device).manual_seed(23)
    shapes = {side: battery_shape(*given[side].shape[:2]) for side in "qk"}
    batch = min(shape[0] for shape in shapes.values())
    for family, draw in DRAWS.items():
        found: list[Any] = []
        for name, t in given.items():
            if not isinstance(t, Tensor):
                found.append(t)
                continue
            tokens = shapes[name[0]][1]
            if name in ("q", "k"):
                drawn = draw("x", [batch, tokens, t.shape[2]], t.dtype, generator, device)
            elif t.ndim == 1:
                drawn = draw("value", list(t.shape), t.dtype, generator, device)
            else:
                shape = list(t.shape)
                shape[0], shape[-2] = (batch if shape[0] > 1 else 1), (tokens if shape[-2] > 1 else 1)
                drawn = draw("value", shape, t.dtype, generator, device)
                if family in ("live", "absorption", "special rows"):
                    angle = 1e3 * torch.randn(shape, generator=generator, device=device)
                    drawn = angle.cos() if name.endswith("cos") else angle.sin()
            found.append(lookalike(t, drawn.to(t.dtype)))
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


def _cases(form: _Form) -> tuple[QKCase, ...]:
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


# -- the operators -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How the rows are turned: TURN of the kernel, whether in fp32, the eager chain, and what its shapes must be."""

    turn: str
    in_fp32: bool = False
    reference: _Turn | None = None
    misfit: Callable[[Tensor, Tensor, Tensor, bool], str | None] | None = None


def _mutants(form: _Form) -> tuple[Mutant, ...]:
    halves = form.turn == "halves"
    normed = "round_to(w1 * (rstd * x1), dtype)" if halves else "round_to(w * (rstd * x), dtype)"
    bare = normed[len("round_to(") : -len(", dtype)")]
    x = "x1" if halves else "x"
    found = [
        *fold_mutants(native=True),
        Mutant("the weight before the statistic", ((bare, bare.replace(f"w{x[1:]} * (rstd * {x})", f"(w{x[1:]} * {x}) * rstd")),)),
        Mutant("rounded before the weight", ((bare, bare.replace(f"(rstd * {x})", f"round_to(rstd * {x}, dtype)")),)),
        Mutant("subnormals flushed", ((bare, bare.replace(f"* {x})", f"* tl.where(tl.abs({x}) < 1.1754943508222875e-38, {x} * 0.0, {x}))")),),
               harmless_for=(torch.float16,)),
        Mutant("the keys normed with the queries' weight", (("k_ptr, k_weight_ptr, k_rstd_ptr", "k_ptr, q_weight_ptr, k_rstd_ptr"),)),
        Mutant("the last lane not written", (("here = inside & (lane < N", "here = inside & (lane + 1 < N"),)),
    ]  # fmt: skip
    if form.turn != "none":
        found.append(Mutant("the norm not rounded", ((normed, bare),)))
        found.append(Mutant("every token turned as token 0", (("batch * cos_batch + token * cos_token", "batch * cos_batch + token * 0"),)))  # fmt: skip
    if halves:
        found.append(Mutant("the sine's sign swapped", (("negate(s), x2", "s, x2"), ("(s, x1", "(negate(s), x1"))))
    return tuple(found)


def _operator(reference: Callable[..., Any], source: str, form: _Form) -> Operator:
    plan = partial(_plan, reference=reference, form=form)
    return Operator(
        reference,
        source,
        why_not=partial(_why_not, reference=reference, form=form),
        tiers=(
            Tier("single pass", partial(plan, order=LAYER_NORM)),
            Tier("ATen's statistic", partial(plan, order=GIVEN)),
        ),
        battery=partial(_battery, reference=reference),
        cases=_cases(form),
        mutants=_mutants(form),
        emulated=partial(_emulated, reference=reference, form=form),
        witness=partial(_statistics, reference=reference, rstd=_rstd),
        emulated_witness=partial(_statistics, reference=reference, rstd=_emulated_rstd),
        retiled=_retiled,
    )


def _retiled(plan: Plan) -> Iterator[Plan]:
    rows = max(plan.scalars[:2])
    for per_program in (1, 2, 4):
        yield replace(plan, grid=(2 * -(-rows // per_program), 1, 1), constants={**plan.constants, "ROWS": per_program})


_HALVES_FP32 = _Form("halves", True, split_rotary_fp32, split_misfit)
_HALVES_PER_OP = _Form("halves", False, split_rotary_per_op, split_misfit)
_NEIGHBOURS_FP32 = _Form("neighbours", True, interleaved_rotary_fp32, interleaved_misfit)
_NEIGHBOURS_PER_OP = _Form("neighbours", False, interleaved_rotary_per_op, interleaved_misfit)
_DIFFUSERS = "diffusers 0.37-0.42.1: LTX2 attention processors"
_LTX_CORE = "ltx-core, SGLang: attention"

QK_RMS_NORM = _operator(qk_rms_norm, f"{_DIFFUSERS}; {_LTX_CORE}", _Form("none"))
QK_SPLIT_FP32 = _operator(qk_rms_norm_split_rotary_fp32, _DIFFUSERS, _HALVES_FP32)
QK_SPLIT_PER_OP = _operator(qk_rms_norm_split_rotary_per_op, _LTX_CORE, _HALVES_PER_OP)
QK_INTERLEAVED_FP32 = _operator(qk_rms_norm_interleaved_rotary_fp32, _DIFFUSERS, _NEIGHBOURS_FP32)
QK_INTERLEAVED_PER_OP = _operator(qk_rms_norm_interleaved_rotary_per_op, _LTX_CORE, _NEIGHBOURS_PER_OP)
