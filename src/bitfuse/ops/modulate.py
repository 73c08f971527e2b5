"""AdaLN modulation alone, and after a LayerNorm: n * (1 + scale) + shift.

`modulate` is exact versus diffusers 0.38-0.42.1 and ltx-core (the text's keys and values in LTX-2.3 and 2.5);
`layer_norm_modulate` versus the output norm of both. The LayerNorm is ATen's own kernel, called as it is: it runs
once per step, and only its modulation is fused.

Roundings, in order, all to n's dtype:
    r1  table + scale, table + shift      r2  1 + scale      r3  n * (1 + scale)      r4  ... + shift

No reduction here. NaN and signed zeros as in the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.evidence import Audit, Evidence
from bitfuse.core.kernel import kernel
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Operator, Tier
from bitfuse.ops import adaln_cases as geometry
from bitfuse.ops import adaln_common as common
from bitfuse.ops.adaln_common import modulated, rows_plan, store_modulated, tile_of_rows

if TYPE_CHECKING:
    import triton.language as tl


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
) -> Tensor:
    """x * (1 + scale) + shift, rounded after every op: the text's modulation in LTX-2.3 and 2.5.

    x               [B, T, D], contiguous
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


@kernel
def _modulate_rows(
    n_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr, out_ptr,
    rows, tokens, scale_batch, scale_token, shift_batch, shift_token,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    _row, batch, token, start, lane, _inside, here = tile_of_rows(rows, tokens, N, WIDTH, ROWS)
    n = tl.load(n_ptr + start + lane, mask=here, other=0.0).to(tl.float32)
    store_modulated(
        n, out_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr, start,
        batch * scale_batch + token * scale_token, batch * shift_batch + token * shift_token, lane, here,
        n_ptr.dtype.element_ty,
    )  # fmt: skip


@kernel(do_not_specialize=("rows", "tokens"))
def _modulate_kernel(
    x_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr,
    out_ptr,
    rows, tokens, scale_batch: tl.int64, scale_token: tl.int64, shift_batch: tl.int64, shift_token: tl.int64,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    _modulate_rows(
        x_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr, out_ptr,
        rows, tokens, scale_batch, scale_token, shift_batch, shift_token, N, WIDTH, ROWS,
    )  # fmt: skip


@kernel(do_not_specialize=("rows", "tokens"))
def _modulate_normed_kernel(
    x_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr,
    normed_ptr, out_ptr,
    rows, tokens, scale_batch: tl.int64, scale_token: tl.int64, shift_batch: tl.int64, shift_token: tl.int64,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same for rows that ATen has normed; x itself is not read."""
    _modulate_rows(
        normed_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr, out_ptr,
        rows, tokens, scale_batch, scale_token, shift_batch, shift_token, N, WIDTH, ROWS,
    )  # fmt: skip


def _plan(*args: Any, reference: Any) -> Plan:
    if reference is modulate:
        return rows_plan(_modulate_kernel, reference, args)
    return rows_plan(_modulate_normed_kernel, reference, args, before=_layer_norm, extras=(args[0].dtype,))


def _layer_norm(*args: Any) -> tuple[Tensor]:
    named = common.named(layer_norm_modulate, args)
    return (F.layer_norm(named["x"], named["x"].shape[-1:], eps=named["eps"]),)


def _why_not(*args: Any, reference: Any) -> Iterator[str]:
    yield from common.why_not(reference, common.named(reference, args))


def _of(i: geometry.Inputs) -> tuple[Any, ...]:
    x, scale, scale_table, shift, shift_table = i.rows(), i.value(), i.table(), i.value(), i.table()
    return x, scale, shift, scale_table, shift_table


def _operator(reference: Any, source: str, tier: str) -> Operator:
    return Operator(
        reference,
        source,
        why_not=partial(_why_not, reference=reference),
        tiers=(Tier(tier, partial(_plan, reference=reference)),),
        # r1 twice, r2, r4; r3. Five operands of 32 elements, 8 at a time
        evidence=Evidence(
            battery=partial(geometry.families, names=tuple(common.named(reference, ()))),
            cases=geometry.cases(_of),
            mutants=geometry.modulation_mutants(normed=reference is layer_norm_modulate),
            audits=(
                Audit("video, 768x512x121", {"add.rn.f32": 4, "mul.rn.f32": 1, "cvt.rn.bf16.f32": 5}, loads={16: 20}),
            ),
            retiled=common.retiled,
        ),
    )


MODULATE = _operator(modulate, "diffusers 0.38-0.42.1, ltx-core: text keys and values", "single pass")
LAYER_NORM_MODULATE = _operator(layer_norm_modulate, "diffusers 0.37-0.42.1, ltx-core: output norm", "ATen's LayerNorm")
