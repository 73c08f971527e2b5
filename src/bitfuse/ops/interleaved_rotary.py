"""Interleaved rotary embedding of queries and keys, in the two chains that LTX-2 hosts run.

Channels 2i and 2i+1 are a pair, and the tables hold one entry per channel: out = x*c + turned(x)*s, where
turned(x) is -x[2i+1] at 2i and x[2i] at 2i+1. The `per_op` chain rounds to x's dtype after every PyTorch op
(ltx-core, SGLang); the `fp32` chain computes in fp32 and rounds once at the end (diffusers).

Roundings, in order:
    r1  both products, to x's dtype (`per_op`) or to fp32 (`fp32`)
    r2  their sum, in fp32: three separate PyTorch ops, so never a fused multiply-add in any torch
    r3  the result, to x's dtype

No reduction. NaN stays NaN at its place; signed zeros are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitfuse.core.conditions import on_meta
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed
from bitfuse.core.inputs import lookalike
from bitfuse.core.kernel import kernel, power_of_2, triton_dtype
from bitfuse.core.launch import Plan, outputs_like, strides
from bitfuse.core.operator import Operator, Tier
from bitfuse.ops.rotary_common import (
    WARPS,
    Reference,
    as_tokens,
    cases,
    families,
    interleaved_misfit,
    retiled,
    tile,
    turn_neighbours,
    why_not,
)

if TYPE_CHECKING:
    import triton.language as tl

# -- references ----------------------------------------------------------------------------------------------


def interleaved_rotary_per_op(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary embedding, rounded after every op: ltx-core 1.0.0 `rope.apply_interleaved_rotary_emb`."""
    return x * cos + _quarter_turn(x, -1) * sin  # r1, r1, r2 and r3


def interleaved_rotary_fp32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary embedding in fp32: diffusers 0.37-0.42.1 `transformer_ltx2.apply_interleaved_rotary_emb`."""
    return (x.float() * cos + _quarter_turn(x, 2).float() * sin).to(x.dtype)  # r1, r1, r2; r3


def _quarter_turn(x: Tensor, dim: int) -> Tensor:
    """(x0, x1) -> (-x1, x0) for every pair along `dim`, as the host counts it: from the end, or the third."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(-1)
    return torch.stack([-odd, even], dim=-1).flatten(-2 if dim == -1 else dim)


# -- the kernel -----------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("tokens",))
def _ltx2_interleaved_rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tokens,
    stride_x_batch: tl.int64,
    stride_x_token: tl.int64,
    stride_x_lane,
    stride_cos_batch: tl.int64,
    stride_cos_token: tl.int64,
    stride_cos_lane,
    stride_sin_batch: tl.int64,
    stride_sin_token: tl.int64,
    stride_sin_lane,
    stride_out_batch: tl.int64,
    stride_out_token: tl.int64,
    stride_out_lane,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    PRODUCT: tl.constexpr,
):
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

    out = turn_neighbours(x, c, s, ROWS, LANES, PRODUCT)  # r1, r2
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=inside)  # r3


def _plan(x: Tensor, cos: Tensor, sin: Tensor, *, reference: Reference, in_fp32: bool) -> Plan:
    batch, tokens, width = x.shape
    out = on_meta(reference, x, cos, sin)
    lanes = min(power_of_2(width), tile())
    rows = max(1, tile() // lanes)
    product = torch.float32 if in_fp32 else x.dtype
    scalars = [tokens]
    for t in (x, cos.expand(x.shape), sin.expand(x.shape), out):
        scalars += strides(t)
    constants = {"WIDTH": width, "LANES": lanes, "ROWS": rows, "PRODUCT": triton_dtype(product)}
    grid = (-(-tokens // rows), batch, -(-width // lanes))
    return Plan(_ltx2_interleaved_rotary_kernel, grid, tuple(scalars), constants, WARPS, outputs_like(out))


def _retiled(plan: Plan) -> Iterator[Plan]:
    yield from retiled(plan)
    lanes = max(2, plan.constants["LANES"] // 4)
    grid = (*plan.grid[:2], -(-plan.constants["WIDTH"] // lanes))
    yield replace(plan, grid=grid, constants={**plan.constants, "LANES": lanes})


# -- when it doesn't fit, and what a wrong kernel trips over ------------------------------------------------------


def _battery(x: Tensor, cos: Tensor, sin: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    pairs = x.shape[2] // 2
    for family, operands in families((x.dtype, x.dtype, cos.dtype, sin.dtype), x.device):
        x1, x2, c, s = (v.squeeze(2) for v in as_tokens(operands, x.shape[1], 1, pairs))
        x_values = torch.stack([x1, x2], dim=-1).flatten(2)
        dense = family == "cancellation"  # the last one
        gaps = (0, 0, 0) if dense else (1, 2, 3)
        inputs = [lookalike(x, x_values, gaps[0])]
        for like, v, gap in ((cos, c, gaps[1]), (sin, s, gaps[2])):
            wide = like if like.ndim == 3 else like.expand(*(1,) * (3 - like.ndim), *like.shape)
            # each channel has its own entry: the second of a pair gets the one of another pair, as any table may
            table = torch.stack([v, v if family == "specials" else v.roll(1, 1)], dim=-1).flatten(2)
            for dim in range(3):
                if wide.shape[dim] == 1 and x.shape[dim] != 1:
                    table = table.narrow(dim, 0, 1)
            inputs.append(lookalike(wide, table, gap).reshape(table.shape[3 - like.ndim :]))
        yield family, (inputs[0], inputs[1], inputs[2])


def _mutants(in_fp32: bool) -> tuple[Mutant, ...]:
    fp16, fp32 = torch.float16, torch.float32
    unrounded = Mutant("a product left unrounded", (("round_to(x * c, PRODUCT)", "x * c"),), harmless_for=(fp32,))
    return (
        *(() if in_fp32 else (unrounded,)),
        Mutant("the turn's sign swapped", (("tl.join(negate(odd), even)", "tl.join(odd, negate(even))"),)),
        Mutant(
            "the compiler's own contraction",
            options={"enable_fp_fusion": True},
            compiled_only=True,
        ),
        Mutant("one rounding for product and sum", (("return p + q", "return tl.fma(turned, s, p)"),)),
        Mutant("-x as 0 - x", (("negate(odd)", "(0.0 - odd)"),)),
        Mutant(
            "subnormals flushed",
            (("even, odd =", f"x = {flushed('x')}\n    even, odd ="),),
            harmless_for=(fp16,),
        ),
        Mutant("the last channel not written", (("lane < WIDTH", "lane < WIDTH - 1"),)),
        Mutant("every token turned as token 0", (("token * stride_cos_token", "token * 0"),)),
    )


def _audits(in_fp32: bool) -> tuple[Audit, ...]:
    video, small = "video self-attention, 768x512x121", "audio self-attention, 5 s"
    counts = {"mul.rn.f32": 4, "add.rn.f32": 2, "cvt.rn.bf16.f32": 2 if in_fp32 else 6}
    unrounded = {"mul.rn.f32": 4, "add.rn.f32": 2}
    return (Audit(video, counts, per=2), Audit(small, counts, per=2), Audit("fp32", unrounded, per=2))


# -- the operators ------------------------------------------------------------------------------------------


def _operator(reference: Reference, source: str, in_fp32: bool) -> Operator:
    return Operator(
        reference,
        source,
        why_not=partial(why_not, reference=reference, in_fp32=in_fp32, misfit=interleaved_misfit),
        tiers=(Tier("one kernel", partial(_plan, reference=reference, in_fp32=in_fp32)),),
        evidence=Evidence(
            battery=_battery,
            cases=cases(in_fp32, interleaved=True),
            mutants=_mutants(in_fp32),
            audits=_audits(in_fp32),
            retiled=_retiled,
        ),
    )


INTERLEAVED_PER_OP = _operator(interleaved_rotary_per_op, "ltx-core 1.0.0: apply_interleaved_rotary_emb", False)
INTERLEAVED_FP32 = _operator(interleaved_rotary_fp32, "diffusers 0.37-0.42.1: apply_interleaved_rotary_emb", True)
