"""RMSNorm over all heads of queries and keys, then their rotary embedding, both streams in one launch.

`F.rms_norm` with a weight, as every LTX-2 host calls it on the projections to_q and to_k, and then one of the four
rotary chains, or none (the attention to the text). A program takes one row, of the queries or of the keys, by turns,
so that the tables of a token are read from memory once and found in the cache the second time.

Roundings, in order:
    r1  weight * (rstd * x), to x's dtype; rstd = rsqrt.approx(mean square + eps) in fp32, mean square in ATen's
        order LAYER_NORM (`bitfuse.core.reduction`)
    then r1 to r3 of `split_rotary` or `interleaved_rotary`

NaN and infinities spread over their row as in the chain; signed zeros and subnormals are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.conditions import on_meta
from bitfuse.core.evidence import Evidence
from bitfuse.core.kernel import kernel, power_of_2, triton_dtype
from bitfuse.core.launch import ROW_WARPS, Out, Plan, in_vectors, named, outputs_like, rows_per_program, strides
from bitfuse.core.numerics import addcmul_fuses, round_to
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.reduction import GIVEN, LAYER_NORM, layer_norm_mean_square, row_rstd
from bitfuse.ops.interleaved_rotary import interleaved_rotary_fp32, interleaved_rotary_per_op
from bitfuse.ops.qk_common import Form, Turn, audits, battery, cases, mutants, why_not
from bitfuse.ops.rotary_common import interleaved_misfit, split_misfit, turn_halves, turn_neighbours
from bitfuse.ops.split_rotary import split_rotary_fp32, split_rotary_per_op

if TYPE_CHECKING:
    import triton.language as tl

_Pair = tuple[Tensor, Tensor]


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
    turn: Turn,
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
        if k_cos_ptr is not None:  # noqa: SIM102 (known when compiled; the inner one is not)
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
            c = tl.load(cos_ptr + cos_at + lane, mask=here, other=0.0).to(tl.float32)
            s = tl.load(sin_ptr + sin_at + lane, mask=here, other=0.0).to(tl.float32)
            out = turn_neighbours(out, c, s, ROWS, WIDTH, PRODUCT)
        tl.store(out_ptr + start + lane, out.to(dtype), mask=here)


def _plan(*args: Any, reference: Callable[..., Any], form: Form, order: str) -> Plan | str:
    given = named(reference, args)
    q, k = given["q"], given["k"]
    for name in ("q", "k", "q_weight", "k_weight"):
        if order == LAYER_NORM and not in_vectors(given[name]):
            return f"{name} does not start at a multiple of 4 elements, and ATen adds up such rows in another order"
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
        ROW_WARPS,
        outputs_like(on_meta(reference, *args)),
        witnesses=() if order == GIVEN else statistics,
        before=partial(_statistics, reference=reference, rstd=_rstd) if order == GIVEN else None,
        extras=(torch.float32, torch.float32) if order == GIVEN else (),
    )


def _table_strides(table: Tensor | None, x: Tensor, form: Form) -> tuple[int, int, int]:
    """(batch, token, head) strides of split tables, (batch, token, 0) of interleaved ones; 0 for absent tables."""
    if table is None:
        return 0, 0, 0
    if form.turn == "neighbours":
        batch, token, _ = strides(table.expand(x.shape))
        return batch, token, 0
    _, heads, tokens, half = table.shape
    batch, head, token, _ = strides(table.expand(x.shape[0], heads, tokens, half))
    return batch, token, head


def _rstd(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # with the weight: where that lies decides the order, too
    return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)[1]


def _emulated_rstd(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(layer_norm_mean_square(x) + eps)


def _statistics(*args: Any, reference: Callable[..., Any], rstd: Callable[..., Tensor]) -> _Pair:
    given = named(reference, args)
    eps = given["eps"]
    return rstd(given["q"], given["q_weight"], eps), rstd(given["k"], given["k_weight"], eps)


def _emulated(*args: Any, reference: Callable[..., Any], form: Form) -> _Pair:
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


# -- the operators -----------------------------------------------------------------------------------------------------


def _operator(reference: Callable[..., Any], source: str, form: Form) -> Operator:
    plan = partial(_plan, reference=reference, form=form)
    return Operator(
        reference,
        source,
        why_not=partial(why_not, reference=reference, form=form),
        tiers=(
            Tier("single pass", partial(plan, order=LAYER_NORM)),
            Tier("ATen's statistic", partial(plan, order=GIVEN)),
        ),
        evidence=Evidence(
            battery=partial(battery, reference=reference),
            cases=cases(form),
            mutants=mutants(form),
            audits=audits(form),
            emulated=partial(_emulated, reference=reference, form=form),
            witness=partial(_statistics, reference=reference, rstd=_rstd),
            emulated_witness=partial(_statistics, reference=reference, rstd=_emulated_rstd),
            retiled=_retiled,
            steps=("norm", "rsqrt", "quotient"),
        ),
    )


def _retiled(plan: Plan) -> Iterator[Plan]:
    rows = max(plan.scalars[:2])
    for per_program in (1, 2, 4):
        yield replace(plan, grid=(2 * -(-rows // per_program), 1, 1), constants={**plan.constants, "ROWS": per_program})


_HALVES_FP32 = Form("halves", True, split_rotary_fp32, split_misfit)
_HALVES_PER_OP = Form("halves", False, split_rotary_per_op, split_misfit)
_NEIGHBOURS_FP32 = Form("neighbours", True, interleaved_rotary_fp32, interleaved_misfit)
_NEIGHBOURS_PER_OP = Form("neighbours", False, interleaved_rotary_per_op, interleaved_misfit)
_DIFFUSERS = "diffusers 0.37-0.42.1: LTX2 attention processors"
_LTX_CORE = "ltx-core, SGLang: attention"

QK_RMS_NORM = _operator(qk_rms_norm, f"{_DIFFUSERS}; {_LTX_CORE}", Form("none"))
QK_SPLIT_FP32 = _operator(qk_rms_norm_split_rotary_fp32, _DIFFUSERS, _HALVES_FP32)
QK_SPLIT_PER_OP = _operator(qk_rms_norm_split_rotary_per_op, _LTX_CORE, _HALVES_PER_OP)
QK_INTERLEAVED_FP32 = _operator(qk_rms_norm_interleaved_rotary_fp32, _DIFFUSERS, _NEIGHBOURS_FP32)
QK_INTERLEAVED_PER_OP = _operator(qk_rms_norm_interleaved_rotary_per_op, _LTX_CORE, _NEIGHBOURS_PER_OP)
