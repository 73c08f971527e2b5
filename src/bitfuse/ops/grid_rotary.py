"""RMSNorm of queries and keys head by head, the queries' scale, and a 3-D rotary embedding over a grid of tokens.

A token stands at (frame, line, column) of a volume of F x H x W tokens. The pairs (even, odd) of neighbouring channels
of a head fall into three groups, one for each axis, and each pair is turned by the angle of the token's place on that
axis:

    n    = weight * x / rms(x)       over one head
    n    = n * q_scale               queries only
    out  = even * cos - odd * sin, even * sin + odd * cos

Versus whom: diffusers 0.42.1, the diffusion decoder of LTX-2.5: `LTX2VideoVaeNeighborhoodAttention.project_qkv` after
its linear layers, with `LTX2VideoVaeRotaryPosEmbed3D`, which computes cos and sin anew at each call. Here they are
given, a table for each axis: a function of the grid and of nothing else.

Roundings, in order:
    r1  weight * (rstd * x), to x's dtype; rstd = rsqrt.approx(mean square + eps) in fp32
    r2  n * q_scale, to x's dtype, with q_scale in fp32. Exact where that is a power of two and nothing is subnormal, as
        with heads of 64
    r3  the four products with cos and sin, in fp32: PyTorch ops of their own, so no fused multiply-add in any torch
    r4  their difference and their sum, in fp32
    r5  the results, to x's dtype

Reduction order: LAYER_NORM of `bitfuse.core.reduction`, in which a row of up to 128 elements lies in one warp. Where
the statistic so found is not ATen's (a misaligned row, a CPU), ATen computes it, GIVEN, and the rest is fused: that is
the second tier. NaN and infinities spread over their head as in the chain; signed zeros and subnormals are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.conditions import FLOATS, HALVES, fitting, plain, runnable
from bitfuse.core.kernel import interpreting, kernel, power_of_2
from bitfuse.core.launch import Out, Plan, in_vectors, named, strides
from bitfuse.core.numerics import negate
from bitfuse.core.numerics import round_pairs_to as round_to  # the even and the odd part ways after each rounding
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.reduction import GIVEN, LAYER_NORM, mean_square_of_head, rstd_of_head

if TYPE_CHECKING:
    import triton.language as tl

_Pair = tuple[Tensor, Tensor]
TABLES = ("frame_cos", "frame_sin", "line_cos", "line_sin", "column_cos", "column_sin")

# -- the reference ---------------------------------------------------------------------------------------------------


def qk_rms_norm_grid_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor,
    frame_cos: Tensor, frame_sin: Tensor, line_cos: Tensor, line_sin: Tensor, column_cos: Tensor, column_sin: Tensor,
    q_scale: float, eps: float = 1e-6,
) -> _Pair:  # fmt: skip
    """(q, k), normed head by head, q scaled, both turned: the attention of diffusers' LTX-2.5 diffusion decoder.

    q, k                      [B, F*H*W, heads*D], contiguous, bf16 or fp16; columns run fastest, then lines
    q_weight, k_weight        [D]
    frame_cos, frame_sin      [F, pairs of the frames' axis], contiguous, fp32; bf16 and fp16 are taken, too
    line_cos, line_sin        [H, pairs of the lines' axis], likewise
    column_cos, column_sin    [W, pairs of the columns' axis], likewise; all pairs together are D/2
    q_scale                   of the queries, after their norm
    """
    grid = frame_cos.shape[0], line_cos.shape[0], column_cos.shape[0]
    tables = frame_cos, frame_sin, line_cos, line_sin, column_cos, column_sin
    q_heads = q.reshape(q.shape[0], *grid, q.shape[2] // q_weight.shape[0], q_weight.shape[0])
    k_heads = k.reshape(k.shape[0], *grid, k.shape[2] // k_weight.shape[0], k_weight.shape[0])
    q_heads = F.rms_norm(q_heads, q_heads.shape[-1:], weight=q_weight, eps=eps)  # r1
    k_heads = F.rms_norm(k_heads, k_heads.shape[-1:], weight=k_weight, eps=eps)  # r1
    q_heads = q_heads * q_scale  # r2
    return turned_on_grid(q_heads, *tables).reshape(q.shape), turned_on_grid(k_heads, *tables).reshape(k.shape)


def turned_on_grid(x: Tensor, *tables: Tensor) -> Tensor:
    """[B, F, H, W, heads, D], turned: `LTX2VideoVaeRotaryPosEmbed3D.forward`. The tables are as above."""
    turned, start = [], 0
    for axis, (cos, sin) in enumerate(zip(tables[::2], tables[1::2], strict=True), start=1):
        end, along = start + 2 * cos.shape[1], [1] * 5
        along[axis] = cos.shape[0]
        part = x[..., start:end]
        turned.append(_turned(part, cos.reshape(*along, cos.shape[1]), sin.reshape(*along, sin.shape[1])))
        start = end
    return torch.cat(turned, dim=-1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0].float(), pairs[..., 1].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)  # r3, r4, r5


# -- the kernel ------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("rows", "heads", "frames", "lines", "columns"))
def _qk_rms_norm_grid_rotary_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr,
    frame_cos_ptr, frame_sin_ptr, line_cos_ptr, line_sin_ptr, column_cos_ptr, column_sin_ptr,
    q_rstd_ptr, k_rstd_ptr, q_out_ptr, k_out_ptr,
    rows, heads, frames, lines, columns, q_scale, eps,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr,
    FRAME_PAIRS: tl.constexpr, LINE_PAIRS: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows of the queries, and the same of the keys; a row is one head of one token."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    here = inside & (lane < N)
    at = row.to(tl.int64)[:, None] * N + lane
    dtype: tl.constexpr = q_ptr.dtype.element_ty

    # where the token stands, and which entry of its axis's table each pair of channels has
    token = row // heads
    column, line, frame = token % columns, token // columns % lines, token // columns // lines % frames
    pair = tl.arange(0, WIDTH // 2)[None, :]
    turned = inside & (pair < N // 2)
    by_frame, by_line = pair < FRAME_PAIRS, pair < FRAME_PAIRS + LINE_PAIRS
    entry = column[:, None] * (N // 2 - FRAME_PAIRS - LINE_PAIRS) + (pair - FRAME_PAIRS - LINE_PAIRS)
    entry = tl.where(by_line, line[:, None] * LINE_PAIRS + (pair - FRAME_PAIRS), entry)
    entry = tl.where(by_frame, frame[:, None] * FRAME_PAIRS + pair, entry)
    cos_at = tl.where(by_line, line_cos_ptr + entry, column_cos_ptr + entry)
    sin_at = tl.where(by_line, line_sin_ptr + entry, column_sin_ptr + entry)
    c = tl.load(tl.where(by_frame, frame_cos_ptr + entry, cos_at), mask=turned, other=0.0).to(tl.float32)
    s = tl.load(tl.where(by_frame, frame_sin_ptr + entry, sin_at), mask=turned, other=0.0).to(tl.float32)

    x = tl.load(q_ptr + at, mask=here, other=0.0).to(tl.float32)
    n = norm_head(x, q_weight_ptr, q_rstd_ptr, row, rows, lane, eps, N, WIDTH, ROWS, ORDER, dtype)  # r1
    n = round_to(n * q_scale, dtype)  # r2
    tl.store(q_out_ptr + at, turn_pairs(n, c, s, ROWS, WIDTH).to(dtype), mask=here)  # r5

    x = tl.load(k_ptr + at, mask=here, other=0.0).to(tl.float32)
    n = norm_head(x, k_weight_ptr, k_rstd_ptr, row, rows, lane, eps, N, WIDTH, ROWS, ORDER, dtype)  # r1
    tl.store(k_out_ptr + at, turn_pairs(n, c, s, ROWS, WIDTH).to(dtype), mask=here)  # r5


@kernel
def norm_head(
    x, weight_ptr, rstd_ptr, row, rows, lane, eps,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """weight * (rstd * x) of rows [ROWS, WIDTH], rounded (r1); the statistic is written for the proof, or GIVEN."""
    weight = tl.load(weight_ptr + lane, mask=lane < N, other=0.0).to(tl.float32)
    if ORDER == "given":
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    else:
        rstd = rstd_of_head(mean_square_of_head(x, N, WIDTH, ROWS), eps)
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
    return round_to(weight * (rstd[:, None] * x), DTYPE)  # r1


@kernel
def turn_pairs(x, c, s, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, WIDTH] with neighbours turned by [ROWS, WIDTH/2] cosines and sines, in fp32, to be rounded (r5)."""
    even, odd = tl.split(tl.reshape(x, (ROWS, WIDTH // 2, 2)))
    out_even = sum_of_products(even, c, negate(odd), s)  # a - b is a + (-b), in every bit
    out_odd = sum_of_products(even, s, odd, c)
    return tl.reshape(tl.join(out_even, out_odd), (ROWS, WIDTH))


@kernel
def sum_of_products(a, b, c, d):
    return a * b + c * d  # r3, r3, r4


# -- the plan --------------------------------------------------------------------------------------------------------

# Elements of q per program, and warps: 16 of q and 16 of k for each thread. The interpreter is fastest with few,
# large programs. 960 instructions a thread for sm_90 (Triton 3.7.1, 2026-11-29); a grid of lines, which spares the
# divisions by their sizes, has 912, and is not worth its second number of programs.
_ELEMENTS, _WARPS, _INTERPRETED_ELEMENTS = 2048, 4, 1 << 15


def _plan(*args: Any, order: str) -> Plan | str:
    given = named(qk_rms_norm_grid_rotary, args)
    q, k, head_dim = given["q"], given["k"], given["q_weight"].shape[0]
    for name in ("q", "k", "q_weight", "k_weight"):
        if order == LAYER_NORM and not in_vectors(given[name]):
            return f"{name} does not start at a multiple of 4 elements, and ATen adds up such rows in another order"
    batch, tokens, heads = q.shape[0], q.shape[1], q.shape[2] // head_dim
    rows, width = batch * tokens * heads, power_of_2(head_dim)
    per_program = max(1, (_INTERPRETED_ELEMENTS if interpreting() else _ELEMENTS) // width)
    frames, lines, columns = (given[f"{axis}_cos"].shape for axis in ("frame", "line", "column"))
    statistic = Out((batch, tokens, heads, 1), (tokens * heads, heads, 1, 1), torch.float32)
    return Plan(
        _qk_rms_norm_grid_rotary_kernel,
        (-(-rows // per_program), 1, 1),
        (rows, heads, frames[0], lines[0], columns[0], float(given["q_scale"]), given["eps"]),
        {
            "N": head_dim,
            "WIDTH": width,
            "ROWS": per_program,
            "ORDER": order,
            "FRAME_PAIRS": frames[1],
            "LINE_PAIRS": lines[1],
        },
        _WARPS,
        tuple(Out(tuple(t.shape), strides(t), t.dtype) for t in (q, k)),  # contiguous, as q and k are
        witnesses=() if order == GIVEN else (statistic, statistic),
        before=statistics_of_aten if order == GIVEN else None,
        extras=(torch.float32, torch.float32) if order == GIVEN else (),
    )


def statistics_of_aten(*args: Any) -> _Pair:
    """1 / rms of each head of q and of k, fp32 [B, T, heads, 1]. With the weight: where that lies decides the order."""
    given = named(qk_rms_norm_grid_rotary, args)
    q, k = (
        torch.ops.aten._fused_rms_norm(
            given[x].unflatten(2, (-1, weight.shape[0])), weight.shape, weight, given["eps"]
        )[1]
        for x, weight in (("q", given["q_weight"]), ("k", given["k_weight"]))
    )
    return q, k


# -- when it can't be fused ------------------------------------------------------------------------------------------


def _why_not(*args: Any) -> Iterator[str]:
    given = named(qk_rms_norm_grid_rotary, args)
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    reasons = list(plain(tensors))
    if not reasons:
        reasons += fitting(qk_rms_norm_grid_rotary, given, _misfit(given))
    reasons += runnable(tensors)
    q = given["q"]
    if q.dtype not in HALVES:
        reasons.append(f"q is {q.dtype}; accepted: {', '.join(map(str, HALVES))}")
    for name in ("k", "q_weight", "k_weight"):
        if given[name].dtype != q.dtype:
            reasons.append(f"{name} is {given[name].dtype} and q {q.dtype}; they must have one dtype")
    for name in TABLES:
        if given[name].dtype not in FLOATS or given[name].dtype != given["frame_cos"].dtype:
            accepted = "one of torch.float32, torch.bfloat16, torch.float16 for all"
            reasons.append(f"{name} is {given[name].dtype}; accepted: {accepted}")
        if given[name].numel() >= 2**31:
            reasons.append(f"{name} is {list(given[name].shape)}; accepted: fewer than 2^31 elements")
    for name, t in tensors.items():
        if not t.is_contiguous():
            reasons.append(f"{name} is not contiguous: its strides are {t.stride()}")
    head_dim = given["q_weight"].numel()
    if head_dim % 8 or not 8 <= head_dim <= 128:
        reasons.append(f"q_weight has {head_dim} elements, as many as a head; accepted: multiples of 8 up to 128")
    if q.numel() // max(1, head_dim) >= 2**31:
        reasons.append(f"q {list(q.shape)} needs a larger grid than one launch has")
    yield from reasons


def _misfit(given: dict[str, Any]) -> str | None:
    """What is wrong with these shapes, if anything."""
    q, k = given["q"], given["k"]
    if q.ndim != 3 or q.shape != k.shape:
        return f"q is {list(q.shape)} and k {list(k.shape)}; accepted: [B, T, heads*D] for both"
    for name in ("q_weight", "k_weight"):
        if given[name].ndim != 1 or given[name].shape != given["q_weight"].shape:
            return f"{name} is {list(given[name].shape)}; accepted: [D], one shape for both"
    head_dim = given["q_weight"].shape[0]
    if not head_dim or q.shape[2] % head_dim:
        return f"q is {q.shape[2]} wide; accepted: a multiple of D, {head_dim}"
    for axis in ("frame", "line", "column"):
        cos, sin = given[f"{axis}_cos"], given[f"{axis}_sin"]
        if cos.ndim != 2 or cos.shape != sin.shape:
            return f"{axis}_cos is {list(cos.shape)} and {axis}_sin {list(sin.shape)}; accepted: one [places, pairs]"
    frames, lines, columns = (given[f"{axis}_cos"].shape for axis in ("frame", "line", "column"))
    if frames[0] * lines[0] * columns[0] != q.shape[1]:
        grid = f"{frames[0]} x {lines[0]} x {columns[0]}"
        return f"q has {q.shape[1]} tokens; accepted: as many as the tables have places, {grid}"
    if 2 * (frames[1] + lines[1] + columns[1]) != head_dim:
        return f"the tables have {frames[1]} + {lines[1]} + {columns[1]} pairs; accepted: D/2 of them, D is {head_dim}"
    return None


# -- the operator ----------------------------------------------------------------------------------------------------

QK_RMS_NORM_GRID_ROTARY = Operator(
    qk_rms_norm_grid_rotary,
    "diffusers 0.42.1: LTX2VideoVaeNeighborhoodAttention.project_qkv",
    why_not=_why_not,
    tiers=(
        Tier("single pass", partial(_plan, order=LAYER_NORM)),
        Tier("ATen's statistic", partial(_plan, order=GIVEN)),
    ),
)
