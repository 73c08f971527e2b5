"""Rotary position embedding of queries and keys: two layouts, each in the chains that LTX-2 hosts run.

A pair (x1, x2) of channels is turned by the angle whose cosine and sine stand in the tables: out1 = x1*c - x2*s and
out2 = x2*c + x1*s.

    split          channels i and i + D/2 of a head are a pair, which has one entry in the tables
    interleaved    channels 2i and 2i + 1 are a pair, and each channel has an entry of its own

Versus whom, function by function: `apply_split_rotary_emb` and `apply_interleaved_rotary_emb`
    per_op         of Lightricks' ltx-core 1.0.0 and SGLang from 0.5.11: rounded to x's dtype after every PyTorch op
    fp32           of diffusers 0.37 to 0.42.1: computed in fp32 and rounded once, at the end
and of comfy-kitchen, which ComfyUI calls from 0.30 on (before, it had `per_op` of both layouts in its own code):
    three_ops      `apply_rope_split_half`, eager, 0.2.26: two products and their sum, rounded after every op
    second_rounded `apply_rope_split_half`, compiled for CUDA, 0.2.26 to 0.2.40, from compute capability 90 on: the
                   product with x2 in HMUL2.BF16, then HFMA2.BF16 with x1 (nvcc's contraction). For 80 and 89 the same
                   source is `three_ops`. By the SASS in its wheels (2026-11-29); on an H100 the form with x1 fused
                   was equal in 25,165,824 random elements, and every other differed in 22 % (2026-11-28)
    addcmul        `apply_rope`, eager, 0.2.26 to 0.2.40: the product with x1 rounded, addcmul with x2
Its eager `apply_rope_split_half` of 0.2.40 is `per_op`. Two chains of a layout differ in a fifth to a third of the bf16
outputs, so they are operators of their own, on one kernel.

Roundings, in order; a chain `fuses` one of the two products of each result into their sum, or none:
    r1  the other product, or both. To x's dtype, or to fp32 (`fp32`). Fused is the product
            with the sine in split `per_op` and `fp32`        with x1 in `second_rounded`
            with x2 in `addcmul`                              none in interleaved `per_op` and `fp32`, and `three_ops`
    r2  r1 + the fused product in fp32, rounded once where the running torch's addcmul fuses, else product and then sum;
        without one the sum of two products, in fp32: three PyTorch ops, so no fused multiply-add in any torch.
        `second_rounded`: to bf16 at once, r2 is r3. By way of fp32, a product that is a tie of bf16 beside one below
        2^-24 of it would be rounded as a tie: one of 10^9 results of normals and random angles
    r3  the result, to x's dtype
A product of two bf16 or fp16 values is exact in fp32 while in range, so there the two forms of r2 part only in
extremes; with fp32 tables they part in 2e-5 of the bf16 outputs (H100, 2026-11-22).

No reduction. NaN stays NaN at its place (its payload is not promised); signed zeros are kept: -s flips the
sign, it is never 0 - s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitfuse.core.conditions import FLOATS, HALVES, fitting, on_meta, plain, runnable
from bitfuse.core.kernel import interpreting, kernel, power_of_2, triton_dtype
from bitfuse.core.launch import Plan, outputs_like, strides
from bitfuse.core.numerics import addcmul_fuses, multiply_add, multiply_add_bf16, negate, round_to
from bitfuse.core.operator import Operator, Tier

if TYPE_CHECKING:
    import triton.language as tl

# -- references ------------------------------------------------------------------------------------------------------


def split_rotary_per_op(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Split rotary embedding, rounded to x's dtype after every op: `apply_split_rotary_emb` of SGLang and ltx-core.

    The batch of a 3-D x is its own, as in SGLang and in ltx-core from 1.1.4, so tables of batch 1 serve any x;
    ltx-core 1.0.0 takes the batch from the tables, and is equal where the two agree.
    """
    halves = _to_heads(x, cos, x.shape[0]).unflatten(-1, (2, -1))
    return _from_heads(_turned_halves(halves, cos, sin), x, cos)  # r1; r2 and r3 in one op


def split_rotary_fp32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Split rotary embedding in fp32, rounded once: diffusers 0.37-0.42.1 `transformer_ltx2.apply_split_rotary_emb`."""
    halves = _to_heads(x, cos, cos.shape[0]).unflatten(-1, (2, -1)).float()
    return _from_heads(_turned_halves(halves, cos, sin), x, cos).to(x.dtype)  # r1, r2; r3


def split_rotary_three_ops(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Split rotary embedding, three ops for each result: comfy-kitchen 0.2.26 `apply_rope_split_half1`, eager.

    cos and sin are [..., 0, 0] and [..., 1, 0] of its rotation matrix, and computed in as it does: in their dtype.
    """
    first, second = _to_heads(x, cos, x.shape[0]).to(cos.dtype).unflatten(-1, (2, -1)).split(1, dim=-2)
    of_first, of_second = _columns(cos, sin)
    out = of_first * first + of_second * second  # r1, r1, r2 and r3
    return _from_heads(out.flatten(-2), x, cos).to(x.dtype)


def split_rotary_second_rounded(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Split rotary embedding, the product with the first half fused: comfy-kitchen 0.2.26-0.2.40
    `apply_rope_split_half`, compiled for CUDA, compute capability 90 and newer.

    cos and sin as in `split_rotary_three_ops`. In fp32 an addcmul stands for what was not looked at.
    """
    first, second = _to_heads(x, cos, x.shape[0]).to(cos.dtype).unflatten(-1, (2, -1)).split(1, dim=-2)
    of_first, of_second = _columns(cos, sin)
    out = _multiply_add(of_first, first, of_second * second)  # r1; r2 and r3 in one
    return _from_heads(out.flatten(-2), x, cos).to(x.dtype)


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c [B, H, T, 2, D/2], rounded once to their dtype of 16 bits, as no PyTorch op does: a piece at a time, as
    it takes fp64."""
    out = torch.addcmul(c, a, b)  # whose gradient is right
    if out.dtype in HALVES:
        for whole, *operands in zip(*(t.detach().split(1024, dim=-3) for t in (out, a, b, c)), strict=True):
            a64, b64, addend = (t.double() for t in operands)
            product = a64 * b64  # exact
            total = product + addend
            back = total - product
            nearest = total.float()
            lost = ((product - (total - back)) + (addend - back)) + (total - nearest.double())
            # rounded to odd in fp32: what was lost shows in the last bit, and ties of 16 bits are told
            bits = nearest.view(torch.int32)
            odd = torch.where((lost > 0) == (total > 0), bits + 1, bits - 1)
            bits = torch.where((bits & 1 == 0) & (lost != 0) & nearest.isfinite(), odd, bits)
            whole.copy_(bits.view(torch.float32))
    return out


def _columns(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The columns [B, H, T, 2, D/2] of the rotation matrix ((cos, -sin), (sin, cos)): factors of x1, and of x2."""
    return torch.stack([cos, sin], dim=-2), torch.stack([-sin, cos], dim=-2)


def _turned_halves(halves: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, T, 2, D/2] -> [B, H, T, D], in the dtype of the halves, to which addcmul rounds its result."""
    first, second = halves[..., :1, :], halves[..., 1:, :]
    out = halves * cos.unsqueeze(-2)  # r1
    out[..., :1, :].addcmul_(-sin.unsqueeze(-2), second)  # r2
    out[..., 1:, :].addcmul_(sin.unsqueeze(-2), first)  # r2
    return out.flatten(-2)


def _to_heads(x: Tensor, cos: Tensor, batch: int) -> Tensor:
    if x.ndim == 4 or cos.ndim != 4:
        return x
    _, heads, tokens, _ = cos.shape
    return x.reshape(batch, tokens, heads, -1).swapaxes(1, 2)


def _from_heads(out: Tensor, x: Tensor, cos: Tensor) -> Tensor:
    if x.ndim == 4 or cos.ndim != 4:
        return out
    return out.swapaxes(1, 2).flatten(2)


def interleaved_rotary_per_op(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary embedding, rounded after every op: ltx-core 1.0.0 `rope.apply_interleaved_rotary_emb`."""
    return x * cos + _quarter_turn(x, -1) * sin  # r1, r1, r2 and r3


def interleaved_rotary_fp32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary embedding in fp32: diffusers 0.37-0.42.1 `transformer_ltx2.apply_interleaved_rotary_emb`."""
    return (x.float() * cos + _quarter_turn(x, 2).float() * sin).to(x.dtype)  # r1, r1, r2; r3


def interleaved_rotary_addcmul(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary embedding, the product with the second channel fused: comfy-kitchen 0.2.26 to 0.2.40
    `apply_rope1`, eager.

    cos and sin are [..., 0, 0] and [..., 1, 0] of its rotation matrix, twice each, and computed in as it does.
    """
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).split(1, dim=-1)
    c_even, c_odd = cos.expand(x.shape).unflatten(-1, (-1, 2)).unbind(-1)
    s_even, s_odd = sin.expand(x.shape).unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.stack([c_even, s_odd], dim=-1) * even  # r1
    out.addcmul_(torch.stack([-s_even, c_odd], dim=-1), odd)  # r2 and r3
    return out.flatten(-2).to(x.dtype)


def _quarter_turn(x: Tensor, dim: int) -> Tensor:
    """(x0, x1) -> (-x1, x0) for every pair along `dim`, as the host counts it: from the end, or the third."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(-1)
    return torch.stack([-odd, even], dim=-1).flatten(-2 if dim == -1 else dim)


@dataclass(frozen=True)
class Chain:
    """A reference, whose it is, its layout (split or interleaved), its precision (fp32, or x's after every op), and
    which product it fuses into the sum: the one with the "sine", with the "first" or "second" of a pair, or "none"."""

    reference: Callable[[Tensor, Tensor, Tensor], Tensor]
    source: str
    split: bool
    in_fp32: bool
    fuses: str

    def product(self, x: Tensor) -> torch.dtype:
        """What r1 rounds to."""
        return torch.float32 if self.in_fp32 else x.dtype

    def fused(self, x: Tensor) -> bool | None:
        """Whether r2 rounds a product and the sum once; None where addcmul on x's device does neither."""
        return self.fuses == "first" if self.fuses in ("first", "none") else addcmul_fuses(x.device, self.product(x))

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of x, for which there is a kernel."""
        return (torch.bfloat16,) if self.fuses == "first" else FLOATS

    @property
    def form(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A reference with outputs of this one's form, by ops whose form is known without the meta device."""
        return split_rotary_three_ops if self.fuses == "first" else self.reference


_SPLIT, _INTERLEAVED = "apply_split_rotary_emb", "apply_interleaved_rotary_emb"
CHAINS = (
    Chain(split_rotary_per_op, f"ltx-core 1.0.0, SGLang 0.5.11+: {_SPLIT}", True, False, "sine"),
    Chain(split_rotary_fp32, f"diffusers 0.37-0.42.1: {_SPLIT}", True, True, "sine"),
    Chain(interleaved_rotary_per_op, f"ltx-core 1.0.0: {_INTERLEAVED}", False, False, "none"),
    Chain(interleaved_rotary_fp32, f"diffusers 0.37-0.42.1: {_INTERLEAVED}", False, True, "none"),
    Chain(split_rotary_three_ops, "comfy-kitchen 0.2.26, eager: apply_rope_split_half", True, False, "none"),
    Chain(
        split_rotary_second_rounded, "comfy-kitchen 0.2.26-0.2.40, sm_90+: apply_rope_split_half", True, False, "first"
    ),
    Chain(interleaved_rotary_addcmul, "comfy-kitchen 0.2.26-0.2.40, eager: apply_rope", False, False, "second"),
)

# -- kernels ---------------------------------------------------------------------------------------------------------

# Elements of x per program, and warps. Many one-warp programs with one 16-byte load per thread and operand keep
# the most loads in flight: on an H100 (2026-11-23, eight real shapes, both chains) 512 on one warp ran at 98 to
# 106 % of a plain copy of the same bytes; 1024 on one warp at 95 to 105 %, 2048 on four at 93 to 107 %, 1024 on
# two at 90 to 104 %, 8192 on four at 86 to 101 %. No reduction here, so no tile can change a bit.
_TILE, _WARPS = 512, 1
_INTERPRETED_TILE = 1 << 15  # the interpreter is fastest with few, large programs


@kernel
def turn_halves(x1, x2, c, s, FUSES: tl.constexpr, PRODUCT: tl.constexpr, FUSED: tl.constexpr):
    """(x1*c - s*x2, x2*c + s*x1) in fp32, to be rounded (r3)."""
    if FUSES == "sine":
        p1 = round_to(x1 * c, PRODUCT)  # r1
        p2 = round_to(x2 * c, PRODUCT)  # r1
        out1 = multiply_add(negate(s), x2, p1, FUSED)  # r2
        out2 = multiply_add(s, x1, p2, FUSED)  # r2
    elif FUSES == "first":
        q1 = round_to(negate(s) * x2, PRODUCT)  # r1
        q2 = round_to(c * x2, PRODUCT)  # r1
        out1 = multiply_add_bf16(c, x1, q1)  # r2, r3
        out2 = multiply_add_bf16(s, x1, q2)  # r2, r3
    else:
        out1 = turn_one(x1, c, x2, negate(s), PRODUCT)
        out2 = turn_one(x1, s, x2, c, PRODUCT)
    return out1, out2


@kernel
def turn_one(x1, c, x2, s, PRODUCT: tl.constexpr):
    """x1*c + x2*s in fp32, to be rounded (r3)."""
    return round_to(x1 * c, PRODUCT) + round_to(x2 * s, PRODUCT)  # r1, r1, r2


@kernel(do_not_specialize=("rows",))
def _ltx2_split_rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, rows,
    stride_x_batch: tl.int64, stride_x_token: tl.int64, stride_x_head: tl.int64, stride_x_lane,
    stride_cos_batch: tl.int64, stride_cos_token: tl.int64, stride_cos_head: tl.int64, stride_cos_lane,
    stride_sin_batch: tl.int64, stride_sin_token: tl.int64, stride_sin_head: tl.int64, stride_sin_lane,
    stride_out_batch: tl.int64, stride_out_token: tl.int64, stride_out_head: tl.int64, stride_out_lane,
    HEADS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    FUSES: tl.constexpr, PRODUCT: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """One program turns ROWS rows of one sample; a row is one head of one token, heads running fastest."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    token = (row // HEADS).to(tl.int64)
    head = (row % HEADS).to(tl.int64)
    lane = tl.arange(0, LANES)[None, :]
    inside = (row < rows)[:, None] & (lane < HALF)
    lane = lane.to(tl.int64)

    x_row = batch * stride_x_batch + token * stride_x_token + head * stride_x_head
    cos_row = batch * stride_cos_batch + token * stride_cos_token + head * stride_cos_head
    sin_row = batch * stride_sin_batch + token * stride_sin_token + head * stride_sin_head
    out_row = batch * stride_out_batch + token * stride_out_token + head * stride_out_head
    x_at = x_ptr + x_row[:, None]
    out_at = out_ptr + out_row[:, None]
    second = lane + HALF  # in 64 bits before a stride: with the tokens innermost, half a head may be 2^31 elements long

    # x is dead once read: letting it go first keeps tables and output in the L2 (1 to 3 %, H100, 2026-11-23)
    x1 = tl.load(x_at + lane * stride_x_lane, mask=inside, eviction_policy="evict_first").to(tl.float32)
    x2 = tl.load(x_at + second * stride_x_lane, mask=inside, eviction_policy="evict_first").to(tl.float32)
    c = tl.load(cos_ptr + cos_row[:, None] + lane * stride_cos_lane, mask=inside).to(tl.float32)
    s = tl.load(sin_ptr + sin_row[:, None] + lane * stride_sin_lane, mask=inside).to(tl.float32)

    out1, out2 = turn_halves(x1, x2, c, s, FUSES, PRODUCT, FUSED)  # r1, r2
    tl.store(out_at + lane * stride_out_lane, out1.to(out_ptr.dtype.element_ty), mask=inside)  # r3
    tl.store(out_at + second * stride_out_lane, out2.to(out_ptr.dtype.element_ty), mask=inside)  # r3


@kernel
def turn_neighbours(
    x, c, s, ROWS: tl.constexpr, LANES: tl.constexpr, FUSES: tl.constexpr, PRODUCT: tl.constexpr, FUSED: tl.constexpr
):
    """x*c + turned(x)*s over [ROWS, LANES] in fp32, to be rounded (r3); turned(x) is -x[2i+1] at 2i, x[2i] at 2i+1."""
    even, odd = tl.split(tl.reshape(x, (ROWS, LANES // 2, 2)))
    if FUSES == "second":
        c_even, c_odd = tl.split(tl.reshape(c, (ROWS, LANES // 2, 2)))
        s_even, s_odd = tl.split(tl.reshape(s, (ROWS, LANES // 2, 2)))
        p_even = round_to(c_even * even, PRODUCT)  # r1
        p_odd = round_to(s_odd * even, PRODUCT)  # r1
        out_even = multiply_add(negate(s_even), odd, p_even, FUSED)  # r2
        out_odd = multiply_add(c_odd, odd, p_odd, FUSED)  # r2
        out = tl.reshape(tl.join(out_even, out_odd), (ROWS, LANES))
    else:
        turned = tl.reshape(tl.join(negate(odd), even), (ROWS, LANES))
        out = turn_one(x, c, turned, s, PRODUCT)
    return out


@kernel(do_not_specialize=("tokens",))
def _ltx2_interleaved_rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, tokens,
    stride_x_batch: tl.int64, stride_x_token: tl.int64, stride_x_lane,
    stride_cos_batch: tl.int64, stride_cos_token: tl.int64, stride_cos_lane,
    stride_sin_batch: tl.int64, stride_sin_token: tl.int64, stride_sin_lane,
    stride_out_batch: tl.int64, stride_out_token: tl.int64, stride_out_lane,
    WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
    FUSES: tl.constexpr, PRODUCT: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """One program turns LANES channels of ROWS tokens of one sample; channels 2i and 2i+1 are a pair."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    lane = (tl.program_id(2) * LANES + tl.arange(0, LANES))[None, :]
    inside = (token < tokens)[:, None] & (lane < WIDTH)
    token = token.to(tl.int64)[:, None]
    lane = lane.to(tl.int64)

    x_at = batch * stride_x_batch + token * stride_x_token + lane * stride_x_lane
    cos_at = batch * stride_cos_batch + token * stride_cos_token + lane * stride_cos_lane
    sin_at = batch * stride_sin_batch + token * stride_sin_token + lane * stride_sin_lane
    out_at = batch * stride_out_batch + token * stride_out_token + lane * stride_out_lane
    x = tl.load(x_ptr + x_at, mask=inside, eviction_policy="evict_first").to(tl.float32)  # dead once read
    c = tl.load(cos_ptr + cos_at, mask=inside).to(tl.float32)
    s = tl.load(sin_ptr + sin_at, mask=inside).to(tl.float32)

    out = turn_neighbours(x, c, s, ROWS, LANES, FUSES, PRODUCT, FUSED)  # r1, r2
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=inside)  # r3


# -- plans -----------------------------------------------------------------------------------------------------------


def _plan_split(x: Tensor, cos: Tensor, sin: Tensor, *, chain: Chain) -> Plan:
    _, heads, tokens, half = cos.shape
    batch, out = x.shape[0], on_meta(chain.form, x, cos, sin)
    lanes = power_of_2(half)
    rows = max(1, _tile() // (2 * lanes))
    constants = {
        "HEADS": heads,
        "HALF": half,
        "LANES": lanes,
        "ROWS": rows,
        **_rounding(chain, x),
    }
    strides_of = [n for t in (x, cos, sin, out) for n in _head_strides(t, batch, tokens, heads)]
    grid = (-(-tokens * heads // rows), batch, 1)
    return Plan(_ltx2_split_rotary_kernel, grid, (tokens * heads, *strides_of), constants, _WARPS, outputs_like(out))


def _head_strides(t: Tensor, batch: int, tokens: int, heads: int) -> tuple[int, ...]:
    """(batch, token, head, lane) strides of [B, T, H*D] or [B, H, T, D]."""
    if t.ndim == 3:
        t = t.unflatten(2, (heads, -1)).swapaxes(1, 2)
    b, h, tok, lane = strides(t.expand(batch, heads, tokens, t.shape[3]))
    return b, tok, h, lane


def _plan_interleaved(x: Tensor, cos: Tensor, sin: Tensor, *, chain: Chain) -> Plan:
    batch, tokens, width = x.shape
    out = on_meta(chain.reference, x, cos, sin)
    lanes = min(power_of_2(width), _tile())
    rows = max(1, _tile() // lanes)
    constants = {"WIDTH": width, "LANES": lanes, "ROWS": rows, **_rounding(chain, x)}
    strides_of = [n for t in (x, cos.expand(x.shape), sin.expand(x.shape), out) for n in strides(t)]
    grid = (-(-tokens // rows), batch, -(-width // lanes))
    return Plan(_ltx2_interleaved_rotary_kernel, grid, (tokens, *strides_of), constants, _WARPS, outputs_like(out))


def _rounding(chain: Chain, x: Tensor) -> dict[str, Any]:
    return {"FUSES": chain.fuses, "PRODUCT": triton_dtype(chain.product(x)), "FUSED": chain.fused(x)}


def _tile() -> int:
    return _INTERPRETED_TILE if interpreting() else _TILE


# -- when it can't be fused ------------------------------------------------------------------------------------------


def _why_not(x: Tensor, cos: Tensor, sin: Tensor, *, chain: Chain) -> Iterator[str]:
    tensors = {"x": x, "cos": cos, "sin": sin}
    reasons = list(plain(tensors))
    if not reasons:  # only of plain tensors is it known what the reference does with their shapes
        reasons += fitting(chain.reference, tensors, misfit(x, cos, sin, chain))
    reasons += runnable(tensors)
    if x.dtype not in chain.dtypes:
        reasons.append(f"x is {x.dtype}; accepted: {', '.join(map(str, chain.dtypes))}")
    if cos.dtype != sin.dtype:
        reasons.append(f"cos is {cos.dtype} and sin {sin.dtype}; they must have one dtype")
    elif chain.in_fp32 and cos.dtype not in FLOATS:
        reasons.append(f"the tables are {cos.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16")
    elif not chain.in_fp32 and cos.dtype != x.dtype:
        reasons.append(f"the tables are {cos.dtype} and x {x.dtype}; this chain takes them alike")
    samples = max(1, x.shape[0]) if x.ndim else 1
    if samples > 65535 or x.numel() // samples >= 2**32 - 2**20:
        reasons.append(f"x {list(x.shape)} needs a larger grid than one launch has")
    yield from reasons
    if not reasons and chain.fused(x) is None:
        yield f"addcmul on {x.device} rounds neither once nor twice, so no kernel here equals it"


def misfit(x: Tensor, cos: Tensor, sin: Tensor, chain: Chain) -> str | None:
    """What is wrong with these shapes for this chain, if anything."""
    if chain.split:
        return _misfit_split(x, cos, sin, chain.in_fp32)
    if x.ndim != 3 or x.shape[2] % 2:
        return f"x is {list(x.shape)}; accepted: [B, T, C] with an even C"
    for name, table in (("cos", cos), ("sin", sin)):
        ones = [1] * (3 - table.ndim) + list(table.shape)
        if table.ndim > 3 or any(n not in (1, m) for n, m in zip(ones, x.shape, strict=True)):
            return f"{name} is {list(table.shape)}; accepted: {list(x.shape)}, or 1 where it broadcasts"
    return None


def _misfit_split(x: Tensor, cos: Tensor, sin: Tensor, in_fp32: bool) -> str | None:
    if cos.ndim != 4:
        return f"cos is {list(cos.shape)}; accepted: [B, H, T, D/2], four dimensions"
    if sin.shape != cos.shape:
        return f"sin is {list(sin.shape)}; accepted: the shape of cos, {list(cos.shape)}"
    batch, heads, tokens, half = cos.shape
    if heads == 0 or half == 0:
        return f"cos is {list(cos.shape)}; accepted: [B, H, T, D/2] with at least one head and one pair"
    accepted = {3: [batch, tokens, heads * 2 * half], 4: [batch, heads, tokens, 2 * half]}
    # diffusers takes x's batch from the tables, so tables of batch 1 broadcast there only for a 4-D x
    if batch == 1 and (x.ndim == 4 or not in_fp32):
        accepted = {ndim: [x.shape[0] if x.ndim else 1, *shape[1:]] for ndim, shape in accepted.items()}
    if list(x.shape) != accepted.get(x.ndim):
        return f"x is {list(x.shape)}; accepted with cos {list(cos.shape)}: {accepted[3]} or {accepted[4]}"
    return None


# -- the operators ---------------------------------------------------------------------------------------------------


def _operator(chain: Chain) -> Operator:
    plan = _plan_split if chain.split else _plan_interleaved
    return Operator(
        chain.reference,
        chain.source,
        why_not=partial(_why_not, chain=chain),
        tiers=(Tier("one kernel", partial(plan, chain=chain)),),
    )


SPLIT_PER_OP, SPLIT_FP32, INTERLEAVED_PER_OP, INTERLEAVED_FP32, *_OF_KITCHEN = map(_operator, CHAINS)
SPLIT_THREE_OPS, SPLIT_SECOND_ROUNDED, INTERLEAVED_ADDCMUL = _OF_KITCHEN


# -- the seed's names ------------------------------------------------------------------------------------------------


def apply_ltx2_split_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x by the tables with the Triton kernel: check, allocate, launch. No proof and no fallback.

    x       [B, T, H*D] or [B, H, T, D], bf16, fp16 or fp32, any strides, on a CUDA device
    cos     [B, H, T, D/2], usually a swapaxes view of [B, T, H, D/2], any strides; of x's dtype (rounded after
    sin     every op, as ltx-core and SGLang do) or fp32 (rounded once, as diffusers does); B may be 1 where
            the chain of that host broadcasts it

    Returns a new tensor with the shape, dtype and strides that the PyTorch chain gives. Raises ValueError where
    the kernel can't take the arguments; `apply_split_rotary_emb` falls back instead.
    """
    return _of(x, cos).launch(x, cos, sin)


def apply_split_rotary_emb(x: Tensor, freqs: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x by freqs = (cos, sin): fused where that is proved to give the same bits, else the PyTorch chain.

    Shapes as in `apply_ltx2_split_rotary_emb`. Tables of x's dtype are taken as ltx-core and SGLang take them
    (`split_rotary_per_op`), others as their chain promotes them (`split_rotary_fp32`). Why a call was not
    fused: `bitfuse.explain(operator, x, cos, sin)`. Raises ValueError where the shapes don't fit.
    """
    cos, sin = freqs
    if x.ndim == 3 and cos.ndim == 4 and cos.shape[0] == 1 and sin.shape == cos.shape:
        cos, sin = (t.expand(x.shape[0], -1, -1, -1) for t in (cos, sin))
    return _of(x, cos)(x, cos, sin)


def _of(x: Tensor, cos: Tensor) -> Operator:
    return SPLIT_PER_OP if cos.dtype == x.dtype else SPLIT_FP32
