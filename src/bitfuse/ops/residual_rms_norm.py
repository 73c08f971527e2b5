"""The residual add and what follows it in the block: RMSNorm, then no, one or two AdaLN modulations of its result.

    x'  = x + y * gate * mask             residual, each factor optional
    n   = x' / rms(x')                    RMSNorm without weight
    out = n * (1 + scale) + shift         modulation: none, one, or two of the same n

Roundings, in order, all to x's dtype:
    r1  table + gate          r2  y * gate       r3  y * mask        r4  x + y
    r5  x' * rstd, where rstd = rsqrt.approx(mean square + eps) in fp32, mean square in ATen's order: LAYER_NORM for
        `native`, MEAN for `composed` (`bitfuse.core.reduction`)
    r6  table + scale, table + shift      r7  1 + scale      r8  n * (1 + scale)      r9  ... + shift

NaN and infinities spread over their row as in the chain; signed zeros and subnormals are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from bitfuse.core.kernel import kernel
from bitfuse.core.numerics import round_to
from bitfuse.core.reduction import row_rstd
from bitfuse.ops.adaln_cases import Inputs
from bitfuse.ops.adaln_common import add_residual, modulated, residual_sum, store_modulated, tile_of_rows
from bitfuse.ops.norm_common import composed, native, operator

if TYPE_CHECKING:
    import triton.language as tl


# -- references ------------------------------------------------------------------------------------------------------


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
    x = residual_sum(x, y, gate, gate_table, mask)  # r1 to r4
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
    x = residual_sum(x, y, gate, gate_table, mask)  # r1 to r4
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
    x = residual_sum(x, y, gate, gate_table, mask)  # r1 to r4
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
    x = residual_sum(x, y, gate, gate_table, mask)  # r1 to r4
    n = composed(x, eps)
    first = modulated(n, scale, shift, scale_table, shift_table)
    return x, first, modulated(n, scale2, shift2, scale2_table, shift2_table)


# -- the kernels -----------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("rows", "tokens"))
def _residual_rms_norm_modulate_kernel(
    x_ptr, y_ptr, gate_ptr, gate_table_ptr, mask_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr,
    rstd_ptr, sum_ptr, out_ptr,
    rows, tokens, eps,
    gate_batch: tl.int64, gate_token: tl.int64, mask_batch: tl.int64,
    scale_batch: tl.int64, scale_token: tl.int64, shift_batch: tl.int64, shift_token: tl.int64,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row, batch, token, start, lane, inside, here = tile_of_rows(rows, tokens, N, WIDTH, ROWS)
    x = add_residual(
        x_ptr, y_ptr, gate_ptr, gate_table_ptr, mask_ptr, sum_ptr, start,
        batch * gate_batch + token * gate_token, batch * mask_batch, lane, inside, here, dtype,
    )  # fmt: skip
    # Other threads of this program read the sums again, for the statistic: from the cache, in ATen's order.
    tl.debug_barrier()
    rstd = row_rstd(sum_ptr + start, rstd_ptr, row, rows, eps, N, ROWS, ORDER, LANES)
    n = round_to(x * rstd, dtype)  # r5
    if scale_ptr is not None:
        store_modulated(
            n, out_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr, start,
            batch * scale_batch + token * scale_token, batch * shift_batch + token * shift_token, lane, here, dtype,
        )  # fmt: skip
    else:
        tl.store(out_ptr + start + lane, n.to(dtype), mask=here)


@kernel(do_not_specialize=("rows", "tokens"))
def _residual_rms_norm_modulate_twice_kernel(
    x_ptr, y_ptr, gate_ptr, gate_table_ptr, mask_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr,
    scale2_ptr, shift2_ptr, scale2_table_ptr, shift2_table_ptr,
    rstd_ptr, sum_ptr, out_ptr, out2_ptr,
    rows, tokens, eps,
    gate_batch: tl.int64, gate_token: tl.int64, mask_batch: tl.int64,
    scale_batch: tl.int64, scale_token: tl.int64, shift_batch: tl.int64, shift_token: tl.int64,
    scale2_batch: tl.int64, scale2_token: tl.int64, shift2_batch: tl.int64, shift2_token: tl.int64,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row, batch, token, start, lane, inside, here = tile_of_rows(rows, tokens, N, WIDTH, ROWS)
    x = add_residual(
        x_ptr, y_ptr, gate_ptr, gate_table_ptr, mask_ptr, sum_ptr, start,
        batch * gate_batch + token * gate_token, batch * mask_batch, lane, inside, here, dtype,
    )  # fmt: skip
    # Other threads of this program read the sums again, for the statistic: from the cache, in ATen's order.
    tl.debug_barrier()
    rstd = row_rstd(sum_ptr + start, rstd_ptr, row, rows, eps, N, ROWS, ORDER, LANES)
    n = round_to(x * rstd, dtype)  # r5
    store_modulated(
        n, out_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr, start,
        batch * scale_batch + token * scale_token, batch * shift_batch + token * shift_token, lane, here, dtype,
    )  # fmt: skip
    store_modulated(
        n, out2_ptr, scale2_ptr, shift2_ptr, scale2_table_ptr, shift2_table_ptr, start,
        batch * scale2_batch + token * scale2_token, batch * shift2_batch + token * shift2_token, lane, here, dtype,
    )  # fmt: skip


# -- the operators ---------------------------------------------------------------------------------------------------


def _of_residual(i: Inputs) -> tuple[Any, ...]:
    gated, modulation = i.case.with_gate, i.case.with_modulation
    gate = (i.value(), i.table()) if gated else (None, None)
    scale, scale_table, shift, shift_table = (i.value(), i.table(), i.value(), i.table()) if modulation else [None] * 4
    return i.rows(), i.rows(), *gate, i.mask(), scale, shift, scale_table, shift_table, 1e-6


def _of_residual_twice(i: Inputs) -> tuple[Any, ...]:
    gate = (i.value(), i.table()) if i.case.with_gate else (None, None)
    modulations = []
    for _ in range(2):
        scale, scale_table, shift, shift_table = i.value(), i.table(), i.value(), i.table()
        modulations += [scale, shift, scale_table, shift_table]
    return i.rows(), i.rows(), *gate, i.mask(), *modulations, 1e-6


RESIDUAL_RMS_NORM_MODULATE_NATIVE = operator(
    residual_rms_norm_modulate_native, _residual_rms_norm_modulate_kernel, _of_residual
)
RESIDUAL_RMS_NORM_MODULATE_COMPOSED = operator(
    residual_rms_norm_modulate_composed, _residual_rms_norm_modulate_kernel, _of_residual
)
RESIDUAL_RMS_NORM_MODULATE_TWICE_NATIVE = operator(
    residual_rms_norm_modulate_twice_native, _residual_rms_norm_modulate_twice_kernel, _of_residual_twice
)
RESIDUAL_RMS_NORM_MODULATE_TWICE_COMPOSED = operator(
    residual_rms_norm_modulate_twice_composed, _residual_rms_norm_modulate_twice_kernel, _of_residual_twice
)
