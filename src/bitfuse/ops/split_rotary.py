"""Split rotary embedding of queries and keys, in the two chains that LTX-2 hosts run.

Element i of a head is paired with element i + D/2, and the pair (x1, x2) turned by the angle whose cosine and
sine stand in the tables: x1*c - x2*s, x2*c + x1*s. The `per_op` chain rounds to x's dtype after every PyTorch
op (Lightricks' ltx-core; SGLang from 0.5.11); the `fp32` chain computes in fp32 and rounds once at the end
(diffusers 0.37 to 0.42.1). They differ in a third of the bf16 outputs, so they are two operators on one kernel.

Roundings, in order:
    r1  the products x1*c and x2*c, to x's dtype (`per_op`) or to fp32 (`fp32`)
    r2  r1 -+ s*x in fp32: rounded once where the running torch's addcmul fuses, else product and then sum
    r3  the result, to x's dtype
A product of two bf16 or fp16 values is exact in fp32 while in range, so there the two forms of r2 part only in
extremes; with fp32 tables they part in 2e-5 of the bf16 outputs (H100, 2026-11-22).

No reduction. NaN stays NaN at its place (its payload is not promised); signed zeros are kept: -s flips the
sign, it is never 0 - s.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitfuse.core.conditions import on_meta
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed
from bitfuse.core.inputs import lookalike
from bitfuse.core.kernel import kernel, power_of_2, triton_dtype
from bitfuse.core.launch import Plan, outputs_like, strides
from bitfuse.core.numerics import addcmul_fuses
from bitfuse.core.operator import Operator, Tier
from bitfuse.ops.rotary_common import (
    WARPS,
    Reference,
    as_tokens,
    cases,
    families,
    retiled,
    split_misfit,
    tile,
    turn_halves,
    why_not,
)

if TYPE_CHECKING:
    import triton.language as tl


# -- references ----------------------------------------------------------------------------------------------


def split_rotary_per_op(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Split rotary embedding, rounded to x's dtype after every op: `apply_split_rotary_emb` of SGLang and ltx-core.

    The batch of a 3-D x is its own, as in SGLang and in ltx-core from 1.1.4, so tables of batch 1 serve any x;
    ltx-core 1.0.0 takes the batch from the tables, and is equal where the two agree.
    """
    heads = _to_heads(x, cos, x.shape[0])
    halves = heads.unflatten(-1, (2, -1))
    first, second = halves[..., :1, :], halves[..., 1:, :]
    out = halves * cos.unsqueeze(-2)  # r1
    out[..., :1, :].addcmul_(-sin.unsqueeze(-2), second)  # r2, r3
    out[..., 1:, :].addcmul_(sin.unsqueeze(-2), first)  # r2, r3
    return _from_heads(out.flatten(-2), x, cos)


def split_rotary_fp32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Split rotary embedding in fp32, rounded once: diffusers 0.37-0.42.1 `transformer_ltx2.apply_split_rotary_emb`."""
    heads = _to_heads(x, cos, cos.shape[0])
    halves = heads.unflatten(-1, (2, -1)).float()
    first, second = halves[..., :1, :], halves[..., 1:, :]
    out = halves * cos.unsqueeze(-2)  # r1
    out[..., :1, :].addcmul_(-sin.unsqueeze(-2), second)  # r2
    out[..., 1:, :].addcmul_(sin.unsqueeze(-2), first)  # r2
    return _from_heads(out.flatten(-2), x, cos).to(x.dtype)  # r3


def _to_heads(x: Tensor, cos: Tensor, batch: int) -> Tensor:
    if x.ndim == 4 or cos.ndim != 4:
        return x
    _, heads, tokens, _ = cos.shape
    return x.reshape(batch, tokens, heads, -1).swapaxes(1, 2)


def _from_heads(out: Tensor, x: Tensor, cos: Tensor) -> Tensor:
    if x.ndim == 4 or cos.ndim != 4:
        return out
    return out.swapaxes(1, 2).flatten(2)


# -- the kernel -----------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("rows",))
def _ltx2_split_rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rows,
    stride_x_batch: tl.int64,
    stride_x_token: tl.int64,
    stride_x_head: tl.int64,
    stride_x_lane,
    stride_cos_batch: tl.int64,
    stride_cos_token: tl.int64,
    stride_cos_head: tl.int64,
    stride_cos_lane,
    stride_sin_batch: tl.int64,
    stride_sin_token: tl.int64,
    stride_sin_head: tl.int64,
    stride_sin_lane,
    stride_out_batch: tl.int64,
    stride_out_token: tl.int64,
    stride_out_head: tl.int64,
    stride_out_lane,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    PRODUCT: tl.constexpr,
    FUSED: tl.constexpr,
):
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

    # x is dead once read: letting it go first keeps tables and output in the L2 (1 to 3 %, see rotary_common)
    x1 = tl.load(x_at + lane * stride_x_lane, mask=inside, eviction_policy="evict_first").to(tl.float32)
    x2 = tl.load(x_at + second * stride_x_lane, mask=inside, eviction_policy="evict_first").to(tl.float32)
    c = tl.load(cos_ptr + cos_row[:, None] + lane * stride_cos_lane, mask=inside).to(tl.float32)
    s = tl.load(sin_ptr + sin_row[:, None] + lane * stride_sin_lane, mask=inside).to(tl.float32)

    out1, out2 = turn_halves(x1, x2, c, s, PRODUCT, FUSED)  # r1, r2
    tl.store(out_at + lane * stride_out_lane, out1.to(out_ptr.dtype.element_ty), mask=inside)  # r3
    tl.store(out_at + second * stride_out_lane, out2.to(out_ptr.dtype.element_ty), mask=inside)  # r3


def _plan(x: Tensor, cos: Tensor, sin: Tensor, *, reference: Reference, in_fp32: bool) -> Plan:
    batch = x.shape[0]
    _, heads, tokens, half = cos.shape
    out = on_meta(reference, x, cos, sin)
    lanes = power_of_2(half)
    rows = max(1, tile() // (2 * lanes))
    product = torch.float32 if in_fp32 else x.dtype
    scalars = [tokens * heads]
    for t in (x, cos, sin, out):
        scalars += _head_strides(t, batch, tokens, heads)
    constants = {
        "HEADS": heads,
        "HALF": half,
        "LANES": lanes,
        "ROWS": rows,
        "PRODUCT": triton_dtype(product),
        "FUSED": addcmul_fuses(x.device, product),
    }
    grid = (-(-tokens * heads // rows), batch, 1)
    return Plan(_ltx2_split_rotary_kernel, grid, tuple(scalars), constants, WARPS, outputs_like(out))


def _head_strides(t: Tensor, batch: int, tokens: int, heads: int) -> tuple[int, ...]:
    """(batch, token, head, lane) strides of [B, T, H*D] or [B, H, T, D]."""
    if t.ndim == 3:
        t = t.unflatten(2, (heads, -1)).swapaxes(1, 2)
    b, h, tok, lane = strides(t.expand(batch, heads, tokens, t.shape[3]))
    return b, tok, h, lane


# -- when it doesn't fit, and what a wrong kernel trips over ------------------------------------------------------


def _battery(x: Tensor, cos: Tensor, sin: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    _, heads, tokens, half = cos.shape
    for family, operands in families((x.dtype, x.dtype, cos.dtype, sin.dtype), x.device):
        dense = family == "cancellation"  # the last one
        gaps = (0, 0, 0) if dense else (1, 2, 3)
        x1, x2, c, s = as_tokens(operands, tokens, heads, half)
        x_values = torch.cat([x1, x2], dim=-1)
        x_values = x_values.flatten(2) if x.ndim == 3 else x_values.swapaxes(1, 2)
        tables = [v.swapaxes(1, 2)[: 2 if cos.shape[0] == x.shape[0] else 1] for v in (c, s)]
        made = zip((x, cos, sin), (x_values, *tables), gaps, strict=True)
        yield family, tuple(lookalike(like, v, gap) for like, v, gap in made)


def _mutants(in_fp32: bool) -> tuple[Mutant, ...]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    unrounded = Mutant(
        "a product left unrounded",
        (("round_to(x1 * c, PRODUCT)", "x1 * c"), ("round_to(x2 * c, PRODUCT)", "x2 * c")),
        harmless_for=(fp32,),
    )
    return (
        *(() if in_fp32 else (unrounded,)),
        Mutant("the sine's sign swapped", (("negate(s), x2", "s, x2"), ("(s, x1", "(negate(s), x1"))),
        Mutant(
            "the compiler's own contraction",
            (
                ("multiply_add(negate(s), x2, p1, FUSED)", "p1 - s * x2"),
                ("multiply_add(s, x1, p2, FUSED)", "p2 + s * x1"),
            ),
            options={"enable_fp_fusion": True},
            harmless_for=() if in_fp32 else (bf16, fp16),  # the rounded product leaves one way to contract: ours
            compiled_only=True,
        ),
        Mutant(
            "the other product contracted",
            (("multiply_add(negate(s), x2, p1, FUSED)", "tl.fma(x1, c, negate(s * x2))"),),
        ),
        Mutant(
            "two roundings where addcmul has one, or one for two",
            (("p1, FUSED)", "p1, not FUSED)"),),
            harmless_for=() if in_fp32 else (fp16,),
        ),
        Mutant("-s as 0 - s", (("negate(s)", "(0.0 - s)"),)),
        Mutant(
            "subnormals flushed",
            (("p1 = ", f"x1 = {flushed('x1')}\n    p1 = "),),
            harmless_for=(fp16,),
        ),
        Mutant("the last lane not written", (("lane < HALF", "lane < HALF - 1"),)),
        Mutant("every token turned as token 0", (("token * stride_cos_token", "token * 0"),)),
    )


def _audits(in_fp32: bool) -> tuple[Audit, ...]:
    video, small = "video self-attention, 768x512x121", "audio self-attention, 5 s"
    counts = {"mul.rn.f32": 2, "fma.rn.f32": 2, "cvt.rn.bf16.f32": 2 if in_fp32 else 4}
    unrounded = {"mul.rn.f32": 2, "fma.rn.f32": 2}
    return (Audit(video, counts, per=2), Audit(small, counts, per=2), Audit("fp32", unrounded, per=2))


# -- the operators ------------------------------------------------------------------------------------------


def _operator(reference: Reference, source: str, in_fp32: bool) -> Operator:
    return Operator(
        reference,
        source,
        why_not=partial(why_not, reference=reference, in_fp32=in_fp32, misfit=split_misfit),
        tiers=(Tier("one kernel", partial(_plan, reference=reference, in_fp32=in_fp32)),),
        evidence=Evidence(
            battery=_battery,
            cases=cases(in_fp32, interleaved=False),
            mutants=_mutants(in_fp32),
            audits=_audits(in_fp32),
            retiled=retiled,
        ),
    )


SPLIT_PER_OP = _operator(split_rotary_per_op, "ltx-core 1.0.0, SGLang 0.5.11+: apply_split_rotary_emb", False)
SPLIT_FP32 = _operator(split_rotary_fp32, "diffusers 0.37-0.42.1: apply_split_rotary_emb", True)


# -- the seed's names ---------------------------------------------------------------------------------------


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
