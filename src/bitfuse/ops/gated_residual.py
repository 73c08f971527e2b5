"""The residual add behind an AdaLN gate: x + y * gate * mask, where no norm follows in the same block.

Exact versus diffusers 0.37-0.42.1 (`LTX2VideoTransformerBlock.forward`), ltx-core and SGLang (`residual_gate_add`).

Roundings, in order, all to x's dtype:
    r1  table + gate      r2  y * gate      r3  y * mask      r4  x + y

No reduction. NaN and signed zeros as in the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bitfuse.core.evidence import Audit, Evidence
from bitfuse.core.kernel import kernel
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Operator, Tier
from bitfuse.ops import adaln_cases as geometry
from bitfuse.ops import adaln_common as common
from bitfuse.ops.adaln_common import add_residual, residual_sum, rows_plan, tile_of_rows

if TYPE_CHECKING:
    import triton.language as tl


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


@kernel(do_not_specialize=("rows", "tokens"))
def _gated_residual_kernel(
    x_ptr, y_ptr, gate_ptr, gate_table_ptr, mask_ptr,
    out_ptr,
    rows, tokens, gate_batch: tl.int64, gate_token: tl.int64, mask_batch: tl.int64,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    _row, batch, token, start, lane, inside, here = tile_of_rows(rows, tokens, N, WIDTH, ROWS)
    add_residual(
        x_ptr, y_ptr, gate_ptr, gate_table_ptr, mask_ptr, out_ptr, start,
        batch * gate_batch + token * gate_token, batch * mask_batch, lane, inside, here, x_ptr.dtype.element_ty,
    )  # fmt: skip


def _plan(*args: Any) -> Plan:
    return rows_plan(_gated_residual_kernel, gated_residual, args)


def _why_not(*args: Any) -> Iterator[str]:
    yield from common.why_not(gated_residual, common.named(gated_residual, args))


def _of(i: geometry.Inputs) -> tuple[Any, ...]:
    return i.rows(), i.rows(), i.value(), i.table(), i.mask()


GATED_RESIDUAL = Operator(
    gated_residual,
    "diffusers 0.37-0.42.1, ltx-core, SGLang: residual + output * gate",
    why_not=_why_not,
    tiers=(Tier("single pass", _plan),),
    # r1, r4; r2. Four operands of 32 elements, 8 at a time
    evidence=Evidence(
        battery=partial(geometry.families, names=tuple(common.named(gated_residual, ()))),
        cases=geometry.cases(_of),
        mutants=geometry.residual_mutants(in_norm=False),
        audits=(Audit("video, 768x512x121", {"add.rn.f32": 2, "mul.rn.f32": 1, "cvt.rn.bf16.f32": 3}, loads={16: 16}),),
        retiled=common.retiled,
    ),
)
