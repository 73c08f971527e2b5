"""Adaptive layer norm (AdaLN) between the matmuls of a block: residual add, RMSNorm and modulation, in one row kernel.

    x'  = x + y * gate * mask             residual, each factor optional, or one addcmul; x' is stored
    n   = x' / rms(x')                    RMSNorm, or none; without weight, but in LTX-2.5's decoder
    out = n * (1 + scale) + shift         modulation: none, one, or two of the same n

AdaLN values (gate, scale, shift) are [B or 1, T or 1, D], one row for a sample or one for each token, often strided
views of a wider tensor. Each may come as a sum that nobody has formed yet: a layer's row `table` [D] plus the
timestep's value, which is how the hosts form it. Each operator is exact versus the hosts' chain that it is named with:

    modulate                              diffusers 0.38-0.42.1, ltx-core: text keys and values of LTX-2.3 and 2.5
    layer_norm_modulate                   diffusers 0.37-0.42.1, ltx-core: output norm, whose LayerNorm ATen runs
    gated_residual                        diffusers 0.37-0.42.1, ltx-core, SGLang: where no norm follows
    gated_residual_addcmul                ComfyUI 0.20.1-0.30.0: the same
    rms_norm_modulate_*                   the norms of a block's input
    residual_rms_norm_modulate_*          the residual add and the norm that follows it, with at most one modulation
    residual_rms_norm_modulate_twice_*    the same with two, for the attentions between video and audio
    residual_rms_norm_modulate_weighted   diffusers 0.42.1: the blocks of LTX-2.5's diffusion decoder
    residual_addcmul_rms_norm_modulate_*  ComfyUI 0.20.1-0.30.0: the residual as one addcmul, and the norm after it

`native` is one call of `F.rms_norm` (ltx-core, SGLang, ComfyUI); `composed` is diffusers' own norm of seven ops;
`weighted` is one call of `F.rms_norm` with a weight (`torch.nn.RMSNorm`).

Roundings, in order, all to x's dtype:
    r1  table + gate          r2  y * gate       r3  y * mask        r4  x + y
        `addcmul` has neither r2 nor r3: r4 is x + y * gate in fp32, rounded there once where the running torch's
        addcmul fuses, else product and then sum; then to x's dtype. 23 % of bf16 outputs differ from r2 and r4
    r5  x' * rstd, or weight * (x' * rstd), where rstd = rsqrt.approx(mean square + eps) in fp32, mean square in ATen's
        order: LAYER_NORM for `native` and `weighted`, MEAN for `composed` (`bitfuse.core.reduction`)
    r6  table + scale, table + shift      r7  1 + scale      r8  n * (1 + scale)      r9  ... + shift

NaN and infinities spread over their row where it is normed, as in the chain; signed zeros and subnormals are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.conditions import FLOATS, HALVES, fitting, on_meta, plain, runnable
from bitfuse.core.kernel import kernel, power_of_2
from bitfuse.core.launch import ROW_WARPS, Out, Plan, in_vectors, named, outputs_like, rows_per_program, strides
from bitfuse.core.numerics import addcmul_fuses, multiply_add, round_to
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.reduction import GIVEN, LAYER_NORM, MEAN, layer_norm_lanes, mean_lanes, row_rstd

if TYPE_CHECKING:
    import triton.language as tl

VALUES = ("gate", "scale", "shift", "scale2", "shift2")
"""The AdaLN values, by the names that every reference has for them; the table of each is called NAME_table."""
MAX_WIDTH, _AT_ONCE = 8192, 1024  # columns of a row; without a norm, of one program at most
Rstd = Callable[[Tensor, float, Tensor | None], Tensor]  # (rows, eps, weight) -> 1 / rms of each, in fp32

# -- the references' steps ---------------------------------------------------------------------------------------------


def residual_sum(x: Tensor, y: Tensor, gate: Tensor | None, gate_table: Tensor | None, mask: Tensor | None) -> Tensor:
    if gate is not None:
        y = y * (gate if gate_table is None else gate_table + gate)  # r1, r2
    if mask is not None:
        y = y * mask  # r3
    return x + y  # r4


def addcmul_sum(x: Tensor, y: Tensor, gate: Tensor, gate_table: Tensor | None) -> Tensor:
    return torch.addcmul(x, y, gate if gate_table is None else gate_table + gate)  # r1, r4


def native(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight=weight, eps=eps)  # r5


def composed(x: Tensor, eps: float) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(x.dtype)  # r5


def modulated(
    n: Tensor, scale: Tensor | None, shift: Tensor | None, scale_table: Tensor | None, shift_table: Tensor | None
) -> Tensor:
    if scale is None or shift is None:
        return n
    scale = scale if scale_table is None else scale_table + scale  # r6
    shift = shift if shift_table is None else shift_table + shift  # r6
    return n * (1 + scale) + shift  # r7, r8, r9


# -- references --------------------------------------------------------------------------------------------------------


def gated_residual(
    x: Tensor, y: Tensor, gate: Tensor, gate_table: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """x + y * gate * mask, rounded after every op: the hosts' residual add after attention and feed-forward.

    x, y          [B, T, D], contiguous
    gate          [B or 1, T or 1, D], columns next to each other
    gate_table    [D], added to the gate first; None: it is complete
    mask          [B, 1, 1], ltx-core's perturbation mask; None: no such factor
    """
    return residual_sum(x, y, gate, gate_table, mask)


def gated_residual_addcmul(x: Tensor, y: Tensor, gate: Tensor, gate_table: Tensor | None = None) -> Tensor:
    """x + y * gate by one addcmul: ComfyUI's residual add, which it writes into x (`x.addcmul_(y, table + gate)`).

    Arguments as in `gated_residual`. Here the sum is a new tensor.
    """
    return addcmul_sum(x, y, gate, gate_table)


def modulate(
    x: Tensor, scale: Tensor, shift: Tensor, scale_table: Tensor | None = None, shift_table: Tensor | None = None
) -> Tensor:
    """x * (1 + scale) + shift, rounded after every op: the text's modulation in LTX-2.3 and 2.5.

    x               [B, T, D], columns next to each other: ComfyUI's text is a slice of a wider tensor's columns
    scale, shift    [B or 1, T or 1, D], columns next to each other
    scale_table, shift_table    [D], added to scale and shift first; None: they are complete
    """
    return modulated(x, scale, shift, scale_table, shift_table)


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """LayerNorm without weight and bias, then AdaLN modulation: the output norm of diffusers and ltx-core.

    Arguments as in `modulate`.
    """
    return modulated(F.layer_norm(x, x.shape[-1:], eps=eps), scale, shift, scale_table, shift_table)


def residual_rms_norm_modulate_native(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    gate_table: Tensor | None = None,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(x', n or its modulation): residual add, then `F.rms_norm`: ltx-core `ops.post_sa`, block forward.

    x, y            [B, T, D], contiguous
    gate            as scale; None: y is added as it is
    mask            [B, 1, 1], ltx-core's perturbation mask: `y * gate * mask`
    scale, shift    both or neither; further arguments as in `rms_norm_modulate_native`
    """
    x = residual_sum(x, y, gate, gate_table, mask)
    return x, modulated(native(x, eps), scale, shift, scale_table, shift_table)


def residual_rms_norm_modulate_composed(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    gate_table: Tensor | None = None,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(x', n or its modulation): residual add, then diffusers' norm: `LTX2VideoTransformerBlock.forward`.

    Arguments as in `residual_rms_norm_modulate_native`.
    """
    x = residual_sum(x, y, gate, gate_table, mask)
    return x, modulated(composed(x, eps), scale, shift, scale_table, shift_table)


def residual_rms_norm_modulate_twice_native(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    gate_table: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    scale2: Tensor,
    shift2: Tensor,
    scale2_table: Tensor | None = None,
    shift2_table: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', first, second modulation of the same norm), with `F.rms_norm`: ltx-core's audio-video attention.

    Arguments as in `residual_rms_norm_modulate_native`.
    """
    x = residual_sum(x, y, gate, gate_table, mask)
    n = native(x, eps)
    first = modulated(n, scale, shift, scale_table, shift_table)
    return x, first, modulated(n, scale2, shift2, scale2_table, shift2_table)


def residual_rms_norm_modulate_twice_composed(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    gate_table: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale_table: Tensor | None,
    shift_table: Tensor | None,
    scale2: Tensor,
    shift2: Tensor,
    scale2_table: Tensor | None = None,
    shift2_table: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', first, second modulation of the same norm), with diffusers' norm: its audio-video cross-attention.

    Arguments as in `residual_rms_norm_modulate_native`.
    """
    x = residual_sum(x, y, gate, gate_table, mask)
    n = composed(x, eps)
    first = modulated(n, scale, shift, scale_table, shift_table)
    return x, first, modulated(n, scale2, shift2, scale2_table, shift2_table)


def residual_rms_norm_modulate_weighted(
    x: Tensor, y: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    scale_table: Tensor | None = None, shift_table: Tensor | None = None, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x', n or its modulation): residual add, then `torch.nn.RMSNorm` with its weight: LTX-2.5's diffusion decoder.

    weight    [D]; further arguments as in `residual_rms_norm_modulate_native`
    """
    x = residual_sum(x, y, None, None, None)
    return x, modulated(native(x, eps, weight), scale, shift, scale_table, shift_table)


def residual_addcmul_rms_norm_modulate_native(
    x: Tensor, y: Tensor, gate: Tensor, gate_table: Tensor | None = None,
    scale: Tensor | None = None, shift: Tensor | None = None,
    scale_table: Tensor | None = None, shift_table: Tensor | None = None, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x', n or its modulation): residual add by one addcmul, then `F.rms_norm`: ComfyUI's blocks.

    Arguments as in `residual_rms_norm_modulate_native`, without a mask.
    """
    x = addcmul_sum(x, y, gate, gate_table)
    return x, modulated(native(x, eps), scale, shift, scale_table, shift_table)


def rms_norm_modulate_native(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """RMSNorm by `F.rms_norm`, then AdaLN modulation: ltx-core `ops.ada_zero`, SGLang `_ltx2_rms_norm_modulate`.

    Arguments as in `modulate`.
    """
    return modulated(native(x, eps), scale, shift, scale_table, shift_table)


def rms_norm_modulate_composed(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """RMSNorm by diffusers' `normalization.RMSNorm`, then AdaLN modulation: `LTX2VideoTransformerBlock.forward`.

    Arguments as in `modulate`.
    """
    return modulated(composed(x, eps), scale, shift, scale_table, shift_table)


ADDCMUL = (gated_residual_addcmul, residual_addcmul_rms_norm_modulate_native)
"""The references whose residual is one addcmul."""

# -- the kernel --------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("rows", "tokens"))
def _adaln_kernel(
    x_ptr, y_ptr, gate_ptr, gate_table_ptr, mask_ptr, weight_ptr,
    scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr,
    scale2_ptr, shift2_ptr, scale2_table_ptr, shift2_table_ptr,
    rstd_ptr, sum_ptr, out_ptr, out2_ptr,
    rows, tokens, eps,
    x_batch: tl.int64, x_token: tl.int64, gate_batch: tl.int64, gate_token: tl.int64, mask_batch: tl.int64,
    scale_batch: tl.int64, scale_token: tl.int64, shift_batch: tl.int64, shift_token: tl.int64,
    scale2_batch: tl.int64, scale2_token: tl.int64, shift2_batch: tl.int64, shift2_token: tl.int64,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, LANES: tl.constexpr,
    APART: tl.constexpr, ADDCMUL: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows; without a norm, WIDTH columns of them. What is None, or a norm "none", leaves no code.

    APART    the rows of x have strides of their own; all others follow each other
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row, batch, token, start, lane, inside, here = tile_of_rows(rows, tokens, N, WIDTH, ROWS)
    x_at = start
    if APART:
        x_at = batch * x_batch + token * x_token
    x = tl.load(x_ptr + x_at + lane, mask=here, other=0.0).to(tl.float32)
    if y_ptr is not None:
        x = add_residual(
            x, y_ptr, gate_ptr, gate_table_ptr, mask_ptr, sum_ptr, start,
            batch * gate_batch + token * gate_token, batch * mask_batch, lane, inside, here, ADDCMUL, FUSED, dtype,
        )  # fmt: skip
    if out_ptr is not None:
        n = x
        if ORDER != "none":
            if y_ptr is not None:
                # Other threads of this program read the sums again, for the statistic: from the cache, in ATen's order.
                tl.debug_barrier()
                rstd = row_rstd(sum_ptr + start, rstd_ptr, row, rows, eps, N, ROWS, ORDER, LANES)
            else:
                rstd = row_rstd(x_ptr + start, rstd_ptr, row, rows, eps, N, ROWS, ORDER, LANES)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + lane, mask=here, other=0.0).to(tl.float32)
                n = round_to(weight * (x * rstd), dtype)  # r5
            else:
                n = round_to(x * rstd, dtype)  # r5
        if scale_ptr is not None:
            store_modulated(
                n, out_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr, start,
                batch * scale_batch + token * scale_token, batch * shift_batch + token * shift_token, lane, here, dtype,
            )  # fmt: skip
        else:
            tl.store(out_ptr + start + lane, n.to(dtype), mask=here)
        if out2_ptr is not None:
            store_modulated(
                n, out2_ptr, scale2_ptr, shift2_ptr, scale2_table_ptr, shift2_table_ptr, start,
                batch * scale2_batch + token * scale2_token, batch * shift2_batch + token * shift2_token,
                lane, here, dtype,
            )  # fmt: skip


@kernel
def tile_of_rows(rows, tokens, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows: their numbers [ROWS], batch, token, first element [ROWS, 1]; columns [1, WIDTH]; masks."""
    parts: tl.constexpr = (N + WIDTH - 1) // WIDTH
    row = tl.program_id(0) // parts * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    batch, token = (row // tokens).to(tl.int64)[:, None], (row % tokens).to(tl.int64)[:, None]
    lane = tl.program_id(0) % parts * WIDTH + tl.arange(0, WIDTH)[None, :]
    return row, batch, token, row.to(tl.int64)[:, None] * N, lane, inside, inside & (lane < N)


@kernel
def add_residual(
    x, y_ptr, gate_ptr, gate_table_ptr, mask_ptr, sum_ptr, start, gate_at, mask_at, lane, inside, here,
    ADDCMUL: tl.constexpr, FUSED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """x + y * gate * mask, rounded after every op, or ADDCMUL, stored and handed back."""
    y = tl.load(y_ptr + start + lane, mask=here, other=0.0).to(tl.float32)
    if ADDCMUL:
        gate = load_ada(gate_ptr, gate_table_ptr, gate_at, lane, here, DTYPE)  # r1
        x = round_to(multiply_add(y, gate, x, FUSED), DTYPE)  # r4
    else:
        if gate_ptr is not None:
            gate = load_ada(gate_ptr, gate_table_ptr, gate_at, lane, here, DTYPE)  # r1
            y = round_to(y * gate, DTYPE)  # r2
        if mask_ptr is not None:
            y = round_to(y * tl.load(mask_ptr + mask_at, mask=inside, other=0.0).to(tl.float32), DTYPE)  # r3
        x = round_to(x + y, DTYPE)  # r4
    tl.store(sum_ptr + start + lane, x.to(DTYPE), mask=here)
    return x


@kernel
def store_modulated(
    n, out_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr, start, scale_at, shift_at, lane, here,
    DTYPE: tl.constexpr,
):  # fmt: skip
    scale = load_ada(scale_ptr, scale_table_ptr, scale_at, lane, here, DTYPE)  # r6
    shift = load_ada(shift_ptr, shift_table_ptr, shift_at, lane, here, DTYPE)  # r6
    tl.store(out_ptr + start + lane, modulate_row(n, scale, shift, DTYPE).to(DTYPE), mask=here)  # r9


@kernel
def modulate_row(n, scale, shift, DTYPE: tl.constexpr):
    """n * (1 + scale) + shift in fp32, of which the store rounds the last op."""
    factor = round_to(1.0 + scale, DTYPE)  # r7
    return round_to(n * factor, DTYPE) + shift  # r8


@kernel
def load_ada(value_ptr, table_ptr, row, lane, here, DTYPE: tl.constexpr):
    """fp32 values of rows that start at offsets `row`; with a table, its row plus the value, rounded to DTYPE."""
    value = tl.load(value_ptr + row + lane, mask=here, other=0.0).to(tl.float32)
    if table_ptr is not None:
        value = round_to(tl.load(table_ptr + lane, mask=here, other=0.0).to(tl.float32) + value, DTYPE)  # r1, r6
    return value


# -- launches ----------------------------------------------------------------------------------------------------------


def _plan(
    *args: Any,
    reference: Callable[..., Any],
    order: str = "none",
    x_slot: str | None = "x_ptr",
    added: tuple[str, ...] = (),
    **more: Any,
) -> Plan:
    """A launch over the rows of x: each tensor goes to the kernel's pointer of its name.

    x_slot    the pointer for x itself; None where the kernel does not read it (its rows are then ATen's, contiguous)
    added     those for what the plan adds to the call's tensors: its extras and witnesses
    """
    given = named(reference, args)
    x = given["x"]
    batch, tokens, width = x.shape
    # Without a norm a program takes few columns, all on their way before it waits for the first: rows of 4096 as a
    # whole took `modulate` 1.08 and 1.05 times as long at 6144 and 24576 tokens (H200, 2026-11-29).
    at_once = power_of_2(min(width, _AT_ONCE) if order == "none" else width)
    per_program = rows_per_program(2 * at_once if order == "none" else width)
    lanes = mean_lanes(batch * tokens, width) if order == MEAN else layer_norm_lanes(width)
    gate, scale, shift, scale2, shift2 = (_row_strides(given.get(name), x) for name in VALUES)
    mask, _ = _row_strides(given.get("mask"), x)
    apart = x_slot is not None and not x.is_contiguous()
    own = _row_strides(x, x) if apart else (0, 0)
    constants = {"N": width, "WIDTH": at_once, "ROWS": per_program, "ORDER": order, "LANES": lanes}
    addcmul = reference in ADDCMUL
    fused = addcmul and bool(addcmul_fuses(x.device, x.dtype))
    tensors = (x_slot if name == "x" else f"{name}_ptr" for name in given if name != "eps")
    outputs = (out for of, out in (("y", "sum_ptr"), ("scale", "out_ptr"), ("scale2", "out2_ptr")) if of in given)
    return Plan(
        _adaln_kernel,
        (-(-batch * tokens // per_program) * -(-width // at_once), 1, 1),
        (batch * tokens, tokens, given.get("eps", 0.0), *own, *gate, mask, *scale, *shift, *scale2, *shift2),
        {**constants, "APART": apart, "ADDCMUL": addcmul, "FUSED": fused},
        ROW_WARPS,
        outputs_like(on_meta(reference, *args)),
        slots=(*tensors, *added, *outputs),
        **more,
    )


def _layer_norm_plan(*args: Any) -> Plan:
    """The kernel reads what ATen has normed in the place of x."""
    normed: dict[str, Any] = {"before": _layer_norm, "extras": (args[0].dtype,)}
    return _plan(*args, reference=layer_norm_modulate, x_slot=None, added=("x_ptr",), **normed)


def _layer_norm(*args: Any) -> tuple[Tensor]:
    given = named(layer_norm_modulate, args)
    return (F.layer_norm(given["x"], given["x"].shape[-1:], eps=given["eps"]),)


def _norm_plan(*args: Any, reference: Callable[..., Any], order: str, rstd: Rstd) -> Plan | str:
    given = named(reference, args)
    batch, tokens, width = given["x"].shape
    if order == MEAN and mean_lanes(batch * tokens, width) is None:
        return f"ATen splits rows of {width} between warps, in an order that is not reproduced here"
    for name in ("weight",) if "y" in given else ("x",):  # a sum of two is new
        if order == LAYER_NORM and name in given and not in_vectors(given[name]):
            return f"{name} does not start at a multiple of 4 elements, and ATen adds up such rows in another order"
    plan = partial(_plan, *args, reference=reference, order=order, added=("rstd_ptr",))
    if order == GIVEN:
        return plan(before=partial(statistic, reference=reference, rstd=rstd), extras=(torch.float32,))
    return plan(witnesses=(Out((batch, tokens, 1), (tokens, 1, 1), torch.float32),))


def _row_strides(value: Tensor | None, x: Tensor) -> tuple[int, int]:
    """(batch, token) strides of an AdaLN value or a mask, 0 where one row serves all."""
    if value is None:
        return 0, 0
    batch, token, _ = strides(value.expand(x.shape[0], x.shape[1], -1))
    return (0 if value.shape[0] == 1 else batch), (0 if value.shape[1] == 1 else token)


def statistic(*args: Any, reference: Callable[..., Any], rstd: Rstd) -> tuple[Tensor]:
    """1 / rms of the rows that are normed, by `rstd`: ATen's, or its emulation."""
    given = named(reference, args)
    x = given["x"]
    if "y" in given:
        x = given_sum(given, reference)
    return (rstd(x, given["eps"], given.get("weight")),)


def given_sum(given: dict[str, Any], reference: Callable[..., Any]) -> Tensor:
    """The residual sum of named arguments, by the reference's own step."""
    step: Callable[..., Tensor] = addcmul_sum if reference in ADDCMUL else residual_sum
    names = ("x", "y", "gate", "gate_table") if reference in ADDCMUL else ("x", "y", "gate", "gate_table", "mask")
    return step(*(given.get(name) for name in names))


def rstd_native(x: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)[1]


def rstd_composed(x: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    return torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)


# -- why a call can't be fused -----------------------------------------------------------------------------------------


def _why_not(*args: Any, reference: Callable[..., Any], dtypes: tuple[torch.dtype, ...]) -> Iterator[str]:
    given = named(reference, args)
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    x = given["x"]
    reasons = list(plain(tensors))
    if not reasons:
        reasons += fitting(reference, given, next(_misfits(given), None))
    reasons += runnable(tensors)
    if x.dtype not in dtypes:
        reasons.append(f"x is {x.dtype}; accepted: {', '.join(map(str, dtypes))}")
    for name, t in tensors.items():
        if t.dtype != x.dtype:
            reasons.append(f"{name} is {t.dtype} and x {x.dtype}; they must have one dtype")
        if t.ndim and t.shape[-1] > 1 and t.stride(-1) != 1:
            reasons.append(f"the columns of {name} are {t.stride(-1)} elements apart; accepted: next to each other")
    for name in ("y",) if reference is modulate else ("x", "y"):
        if name in tensors and not tensors[name].is_contiguous():
            reasons.append(f"{name} is not contiguous: its strides are {tensors[name].stride()}")
    if x.ndim and (x.shape[-1] % 128 or x.shape[-1] > MAX_WIDTH):
        reasons.append(f"x is {x.shape[-1]} wide; accepted: multiples of 128 up to {MAX_WIDTH}")
    if x.ndim and x.numel() // max(1, x.shape[-1]) * -(-x.shape[-1] // _AT_ONCE) >= 2**31:
        reasons.append(f"x {list(x.shape)} needs a larger grid than one launch has")
    if not reasons and not x.is_contiguous() and not on_meta(reference, *args).is_contiguous():
        reasons.append(f"the rows of x do not lie in the order of its batch and tokens: its strides are {x.stride()}")
    yield from reasons
    if not reasons and reference in ADDCMUL and addcmul_fuses(x.device, x.dtype) is None:
        yield f"addcmul on {x.device} rounds neither once nor twice, so no kernel here equals it"


def _misfits(given: dict[str, Any]) -> Iterator[str]:
    if (given.get("scale") is None) != (given.get("shift") is None):
        yield "of scale and shift one is None; accepted: both or neither"
        return
    x = given["x"]
    if x.ndim != 3:
        yield f"x is {list(x.shape)}; accepted: [B, T, D], three dimensions"
        return
    batch, tokens, width = x.shape
    if "y" in given and given["y"].shape != x.shape:
        yield f"y is {list(given['y'].shape)}; accepted: the shape of x, {list(x.shape)}"
    for name in VALUES:
        t = given.get(name)
        if t is not None and (
            t.ndim != 3 or t.shape[0] not in (1, batch) or t.shape[1] not in (1, tokens) or t.shape[2] != width
        ):
            yield f"{name} is {list(t.shape)}; accepted: [{batch} or 1, {tokens} or 1, {width}]"
    for name in (f"{name}_table" for name in VALUES):
        if given.get(name) is not None and list(given[name].shape) != [width]:
            yield f"{name} is {list(given[name].shape)}; accepted: [{width}]"
    if "weight" in given and list(given["weight"].shape) != [width]:
        yield f"weight is {list(given['weight'].shape)}; accepted: [{width}]"
    mask = given.get("mask")
    if mask is not None and list(mask.shape) not in ([batch, 1, 1], [1, 1, 1]):
        yield f"mask is {list(mask.shape)}; accepted: [{batch}, 1, 1]"


# -- the operators -----------------------------------------------------------------------------------------------------


def _operator(reference: Callable[..., Any], source: str, *tiers: Tier, dtypes: Any = FLOATS) -> Operator:
    return Operator(
        reference,
        source,
        why_not=partial(_why_not, reference=reference, dtypes=dtypes),
        tiers=tiers or (Tier("single pass", partial(_plan, reference=reference)),),
    )


def _normed(reference: Callable[..., Any], source: str, order: str, rstd: Rstd) -> Operator:
    """Where the statistic of the single pass is not ATen's (an order that is not known, a CPU), ATen computes it."""
    plan = partial(_norm_plan, reference=reference, rstd=rstd)
    tiers = Tier("single pass", partial(plan, order=order)), Tier("ATen's statistic", partial(plan, order=GIVEN))
    return _operator(reference, source, *tiers, dtypes=HALVES)


_native = partial(_normed, source="ltx-core, SGLang: F.rms_norm", order=LAYER_NORM, rstd=rstd_native)
_composed = partial(_normed, source="diffusers 0.37-0.42.1: normalization.RMSNorm", order=MEAN, rstd=rstd_composed)

GATED_RESIDUAL = _operator(gated_residual, "diffusers 0.37-0.42.1, ltx-core, SGLang: residual + output * gate")
GATED_RESIDUAL_ADDCMUL = _operator(gated_residual_addcmul, "ComfyUI 0.20.1-0.30.0: x.addcmul_(output, gate)")
MODULATE = _operator(modulate, "diffusers 0.38-0.42.1, ltx-core, ComfyUI 0.30.0: text keys and values")
LAYER_NORM_MODULATE = _operator(
    layer_norm_modulate, "diffusers 0.37-0.42.1, ltx-core: output norm", Tier("ATen's LayerNorm", _layer_norm_plan)
)
RESIDUAL_RMS_NORM_MODULATE_NATIVE = _native(residual_rms_norm_modulate_native)
RESIDUAL_RMS_NORM_MODULATE_COMPOSED = _composed(residual_rms_norm_modulate_composed)
RESIDUAL_RMS_NORM_MODULATE_TWICE_NATIVE = _native(residual_rms_norm_modulate_twice_native)
RESIDUAL_RMS_NORM_MODULATE_TWICE_COMPOSED = _composed(residual_rms_norm_modulate_twice_composed)
RESIDUAL_RMS_NORM_MODULATE_WEIGHTED = _native(
    residual_rms_norm_modulate_weighted, source="diffusers 0.42.1: the blocks of LTX-2.5's diffusion decoder"
)
RESIDUAL_ADDCMUL_RMS_NORM_MODULATE_NATIVE = _native(
    residual_addcmul_rms_norm_modulate_native, source="ComfyUI 0.20.1-0.30.0: x.addcmul_(output, gate), F.rms_norm"
)
RMS_NORM_MODULATE_NATIVE = _native(rms_norm_modulate_native)
RMS_NORM_MODULATE_COMPOSED = _composed(rms_norm_modulate_composed)
