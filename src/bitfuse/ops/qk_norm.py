"""RMSNorm over all heads of queries and keys, then their rotary embedding, both streams in one launch.

n = weight * x / rms(x) over a row, which is all heads of a token; then n is turned by one of the chains of
`rope.py`, or by none (in the attention to the text). A program takes rows of the queries or of the keys, by turns, so
that the tables of a token are read from memory once and found in the cache the second time.

Versus whom: `F.rms_norm` with a weight, as every LTX-2 host calls it on the projections to_q and to_k, and then
    fp32, none       diffusers 0.37-0.42.1: `LTX2AudioVideoAttnProcessor` and `LTX2PerturbedAttnProcessor`
    per_op, none     Lightricks' ltx-core and SGLang: attention; ComfyUI 0.20 to 0.27, and from 0.30 on (split)
    the others       ComfyUI from 0.30 on, by the version and the backend of comfy-kitchen

Roundings, in order:
    r1          weight * (rstd * x), to x's dtype; rstd = rsqrt.approx(mean square + eps) in fp32
    r2 to r4    r1 to r3 of `rope.py`

Reduction order: LAYER_NORM of `bitfuse.core.reduction`. Where the statistic so found is not ATen's (a misaligned row, a
CPU), ATen computes it, GIVEN, and the rest is fused: that is the second tier.
NaN and infinities spread over their row as in the chain; signed zeros and subnormals are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.conditions import FLOATS, HALVES, fitting, plain, runnable
from bitfuse.core.kernel import kernel, power_of_2, triton_dtype
from bitfuse.core.launch import ROW_WARPS, Out, Plan, in_vectors, named, rows_per_program, strides
from bitfuse.core.numerics import round_to
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.reduction import GIVEN, LAYER_NORM, row_rstd
from bitfuse.ops import rope
from bitfuse.ops.rope import Chain, turn_halves, turn_neighbours

if TYPE_CHECKING:
    import triton.language as tl

_Pair = tuple[Tensor, Tensor]

# -- references ------------------------------------------------------------------------------------------------------


def qk_rms_norm(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float = 1e-6) -> _Pair:
    """(q, k), normed: `norm_q` and `norm_k` of diffusers' LTX2Attention, ltx-core and SGLang, without rotary embedding.

    q                     [B, T, N], contiguous, bf16 or fp16
    k                     [B, S, N], likewise
    q_weight, k_weight    [N]
    """
    return F.rms_norm(q, q.shape[-1:], q_weight, eps), F.rms_norm(k, k.shape[-1:], k_weight, eps)  # r1


def qk_rms_norm_split_rotary_fp32(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_cos: Tensor, q_sin: Tensor,
    k_cos: Tensor | None = None, k_sin: Tensor | None = None, eps: float = 1e-6,
) -> _Pair:  # fmt: skip
    """(q, k), normed and turned: diffusers' LTX2 attention processors with rope_type "split".

    q, k, weights    as in `qk_rms_norm`
    q_cos, q_sin     [B, H, T, N/H/2], as in `split_rotary_fp32`
    k_cos, k_sin     [B, H, S, N/H/2]; None: the queries' tables serve both
    """
    return _turned(rope.split_rotary_fp32, q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)


def qk_rms_norm_split_rotary_per_op(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_cos: Tensor, q_sin: Tensor,
    k_cos: Tensor | None = None, k_sin: Tensor | None = None, eps: float = 1e-6,
) -> _Pair:  # fmt: skip
    """(q, k), normed and turned: ltx-core's and SGLang's attention with split tables of q's dtype."""
    return _turned(rope.split_rotary_per_op, q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)


def qk_rms_norm_interleaved_rotary_fp32(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_cos: Tensor, q_sin: Tensor,
    k_cos: Tensor | None = None, k_sin: Tensor | None = None, eps: float = 1e-6,
) -> _Pair:  # fmt: skip
    """(q, k), normed and turned: diffusers' LTX2 attention processors with rope_type "interleaved".

    q_cos, q_sin     [B, T, N], k_cos and k_sin [B, S, N], as in `interleaved_rotary_fp32`
    """
    return _turned(rope.interleaved_rotary_fp32, q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)


def qk_rms_norm_interleaved_rotary_per_op(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_cos: Tensor, q_sin: Tensor,
    k_cos: Tensor | None = None, k_sin: Tensor | None = None, eps: float = 1e-6,
) -> _Pair:  # fmt: skip
    """(q, k), normed and turned: ltx-core's attention with interleaved tables of q's dtype."""
    return _turned(rope.interleaved_rotary_per_op, q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)


def qk_rms_norm_split_rotary_three_ops(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_cos: Tensor, q_sin: Tensor,
    k_cos: Tensor | None = None, k_sin: Tensor | None = None, eps: float = 1e-6,
) -> _Pair:  # fmt: skip
    """(q, k), normed and turned: ComfyUI's attention with comfy-kitchen 0.2.26, eager, split."""
    return _turned(rope.split_rotary_three_ops, q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)


def qk_rms_norm_split_rotary_second_rounded(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_cos: Tensor, q_sin: Tensor,
    k_cos: Tensor | None = None, k_sin: Tensor | None = None, eps: float = 1e-6,
) -> _Pair:  # fmt: skip
    """(q, k), normed and turned: ComfyUI's attention with comfy-kitchen on CUDA, sm_90 and newer, split."""
    return _turned(rope.split_rotary_second_rounded, q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)


def qk_rms_norm_interleaved_rotary_addcmul(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, q_cos: Tensor, q_sin: Tensor,
    k_cos: Tensor | None = None, k_sin: Tensor | None = None, eps: float = 1e-6,
) -> _Pair:  # fmt: skip
    """(q, k), normed and turned: ComfyUI's attention with comfy-kitchen 0.2.26 to 0.2.40, eager, interleaved."""
    return _turned(rope.interleaved_rotary_addcmul, q, k, q_weight, k_weight, q_cos, q_sin, k_cos, k_sin, eps)


def _turned(
    turn: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor | None, k_sin: Tensor | None, eps: float,
) -> _Pair:  # fmt: skip
    q, k = qk_rms_norm(q, k, q_weight, k_weight, eps)  # r1
    if k_cos is None or k_sin is None:
        k_cos, k_sin = q_cos, q_sin
    return turn(q, q_cos, q_sin), turn(k, k_cos, k_sin)  # r2, r3, r4


_REFERENCES: tuple[Callable[..., _Pair], ...] = (
    qk_rms_norm,
    qk_rms_norm_split_rotary_per_op, qk_rms_norm_split_rotary_fp32,
    qk_rms_norm_interleaved_rotary_per_op, qk_rms_norm_interleaved_rotary_fp32,
    qk_rms_norm_split_rotary_three_ops, qk_rms_norm_split_rotary_second_rounded,
    qk_rms_norm_interleaved_rotary_addcmul,
)  # fmt: skip
CHAINS: dict[Callable[..., _Pair], Chain | None] = dict(zip(_REFERENCES, (None, *rope.CHAINS), strict=True))
"""Each reference, and the chain by which it turns."""

# -- the kernel ------------------------------------------------------------------------------------------------------


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
    LANES: tl.constexpr, TURN: tl.constexpr, FUSES: tl.constexpr, PRODUCT: tl.constexpr, FUSED: tl.constexpr,
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
        out1, out2 = turn_halves(n1, n2, c, s, FUSES, PRODUCT, FUSED)  # r2, r3
        tl.store(out_ptr + start + first, out1.to(dtype), mask=here)  # r4
        tl.store(out_ptr + start + first + HALF, out2.to(dtype), mask=here)  # r4
    else:
        here = inside & (lane < N)
        x = tl.load(x_ptr + start + lane, mask=here, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + lane, mask=lane < N, other=0.0).to(tl.float32)
        rstd = row_rstd(x_ptr + start, rstd_ptr, row, rows, eps, N, ROWS, ORDER, LANES)
        out = round_to(w * (rstd * x), dtype)  # r1
        if TURN == "neighbours":
            c = tl.load(cos_ptr + cos_at + lane, mask=here, other=0.0).to(tl.float32)
            s = tl.load(sin_ptr + sin_at + lane, mask=here, other=0.0).to(tl.float32)
            out = turn_neighbours(out, c, s, ROWS, WIDTH, FUSES, PRODUCT, FUSED)  # r2, r3
        tl.store(out_ptr + start + lane, out.to(dtype), mask=here)  # r4, or r1 as it is


# -- plans -----------------------------------------------------------------------------------------------------------


def _plan(*args: Any, reference: Callable[..., _Pair], chain: Chain | None, order: str) -> Plan | str:
    given = named(reference, args)
    q, k = given["q"], given["k"]
    for name in ("q", "k", "q_weight", "k_weight"):
        if order == LAYER_NORM and not in_vectors(given[name]):
            return f"{name} does not start at a multiple of 4 elements, and ATen adds up such rows in another order"
    width = q.shape[-1]
    per_program = rows_per_program(width)
    rows = [t.numel() // width for t in (q, k)]
    turn, fuses, half, strides_of, product, fused = "none", "none", width, [0] * 12, q.dtype, False
    if chain is not None:
        turn, product = "halves" if chain.split else "neighbours", chain.product(q)
        fuses, fused = chain.fuses, bool(chain.fused(q))
        half = given["q_cos"].shape[-1]
        tables = [(x, given[f"{side}_{name}"]) for side, x in (("q", q), ("k", k)) for name in ("cos", "sin")]
        strides_of = [n for x, table in tables for n in _table_strides(table, x, chain)]
    constants = {
        "N": width,
        "HALF": half,
        "WIDTH": power_of_2(width // 2 if turn == "halves" else width),
        "ROWS": per_program,
        "ORDER": order,
        "LANES": 128,
        "TURN": turn,
        "FUSES": fuses,
        "PRODUCT": triton_dtype(product),
        "FUSED": fused,
    }
    statistics = tuple(Out((*t.shape[:2], 1), (t.shape[1], 1, 1), torch.float32) for t in (q, k))
    return Plan(
        _qk_rms_norm_rotary_kernel,
        (2 * max(-(-n // per_program) for n in rows), 1, 1),
        (*rows, q.shape[1], k.shape[1], given["eps"], *strides_of),
        constants,
        ROW_WARPS,
        # contiguous, as q and k are. Asked of `F.rms_norm` on meta, it would take torch._dynamo, and seconds, to say so
        tuple(Out(tuple(t.shape), strides(t), t.dtype) for t in (q, k)),
        witnesses=() if order == GIVEN else statistics,
        before=partial(statistics_of_aten, reference=reference) if order == GIVEN else None,
        extras=(torch.float32, torch.float32) if order == GIVEN else (),
    )


def _table_strides(table: Tensor | None, x: Tensor, chain: Chain) -> tuple[int, int, int]:
    """(batch, token, head) strides of split tables, (batch, token, 0) of interleaved ones; 0 for absent tables."""
    if table is None:
        return 0, 0, 0
    if not chain.split:
        batch, token, _ = strides(table.expand(x.shape))
        return batch, token, 0
    _, heads, tokens, half = table.shape
    batch, head, token, _ = strides(table.expand(x.shape[0], heads, tokens, half))
    return batch, token, head


def statistics_of_aten(*args: Any, reference: Callable[..., _Pair]) -> _Pair:
    """1 / rms of the rows of q and of k, fp32. With the weight: where that lies decides the order, too."""
    given = named(reference, args)
    q, k = (
        torch.ops.aten._fused_rms_norm(given[x], given[x].shape[-1:], given[f"{x}_weight"], given["eps"])[1]
        for x in "qk"
    )
    return q, k


# -- when it can't be fused ------------------------------------------------------------------------------------------


def _why_not(*args: Any, reference: Callable[..., _Pair], chain: Chain | None) -> Iterator[str]:
    given = named(reference, args)
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    reasons = list(plain(tensors))
    if not reasons:
        reasons += fitting(reference, given, _misfit(given, chain))
    reasons += runnable(tensors)
    q, width = given["q"], given["q"].shape[-1] if given["q"].ndim else 1
    accepted = HALVES if chain is None else [d for d in HALVES if d in chain.dtypes]
    if q.dtype not in accepted:
        reasons.append(f"q is {q.dtype}; accepted: {', '.join(map(str, accepted))}")
    for name in ("k", "q_weight", "k_weight"):
        if given[name].dtype != q.dtype:
            reasons.append(f"{name} is {given[name].dtype} and q {q.dtype}; they must have one dtype")
    for name in ("q", "k", "q_weight", "k_weight"):
        if not given[name].is_contiguous():
            reasons.append(f"{name} is not contiguous: its strides are {given[name].stride()}")
    if width % 128 or width > 8192:
        reasons.append(f"q is {width} wide; accepted: multiples of 128 up to 8192")
    if chain is not None:
        tables = {name: t for name, t in tensors.items() if name.endswith(("_cos", "_sin"))}
        wanted = FLOATS if chain.in_fp32 else (q.dtype,)
        of_all = "one of torch.float32, torch.bfloat16, torch.float16 for all"
        tables_accepted = of_all if chain.in_fp32 else "q's dtype"
        for name, t in tables.items():
            if t.dtype not in wanted or t.dtype != given["q_cos"].dtype:
                reasons.append(f"{name} is {t.dtype}; accepted: {tables_accepted}")
            if t.ndim and t.shape[-1] > 1 and t.stride(-1) != 1:
                reasons.append(f"the last dimension of {name} has stride {t.stride(-1)}; accepted: 1")
    if (max(q.numel(), given["k"].numel()) // max(1, width)) >= 2**30:
        reasons.append(f"q {list(q.shape)} or k {list(given['k'].shape)} needs a larger grid than one launch has")
    yield from reasons
    if not reasons and chain is not None and chain.fused(q) is None:
        yield f"addcmul on {q.device} rounds neither once nor twice, so no kernel here equals it"


def _misfit(given: dict[str, Any], chain: Chain | None) -> str | None:
    """What is wrong with these shapes, if anything."""
    q, k = given["q"], given["k"]
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        return f"q is {list(q.shape)} and k {list(k.shape)}; accepted: [B, T, N] and [B, S, N]"
    for name in ("q_weight", "k_weight"):
        if list(given[name].shape) != [q.shape[2]]:
            return f"{name} is {list(given[name].shape)}; accepted: [{q.shape[2]}]"
    if chain is None:
        return None
    if (given["k_cos"] is None) != (given["k_sin"] is None):
        return "of k_cos and k_sin one is None; accepted: both or neither"
    for side in "qk":
        own = side if given[f"{side}_cos"] is not None else "q"
        if problem := rope.misfit(given[side], given[f"{own}_cos"], given[f"{own}_sin"], chain):
            return f"{side} and its tables: {problem}"
    return None


# -- the operators ---------------------------------------------------------------------------------------------------

_DIFFUSERS = "diffusers 0.37-0.42.1: LTX2 attention processors"
_LTX_CORE = "ltx-core, SGLang: attention"
_COMFYUI = "ComfyUI 0.30.0: CrossAttention"


def _operator(reference: Callable[..., _Pair], chain: Chain | None) -> Operator:
    source = f"{_DIFFUSERS}; {_LTX_CORE}" if chain is None else _DIFFUSERS if chain.in_fp32 else _LTX_CORE
    if chain is not None and "comfy-kitchen" in chain.source:
        source = f"{_COMFYUI}, {chain.source}"
    plan = partial(_plan, reference=reference, chain=chain)
    return Operator(
        reference,
        source,
        why_not=partial(_why_not, reference=reference, chain=chain),
        tiers=(
            Tier("single pass", partial(plan, order=LAYER_NORM)),
            Tier("ATen's statistic", partial(plan, order=GIVEN)),
        ),
    )


QK_RMS_NORM, QK_SPLIT_PER_OP, QK_SPLIT_FP32, QK_INTERLEAVED_PER_OP, QK_INTERLEAVED_FP32, *_OF_KITCHEN = (
    _operator(reference, chain) for reference, chain in CHAINS.items()
)
QK_SPLIT_THREE_OPS, QK_SPLIT_SECOND_ROUNDED, QK_INTERLEAVED_ADDCMUL = _OF_KITCHEN
