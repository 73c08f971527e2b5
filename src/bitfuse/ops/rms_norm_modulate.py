"""RMSNorm and AdaLN modulation of the rows of a block's input, in the two norms that LTX-2 hosts run.

    n = x / rms(x)                        RMSNorm without weight
    out = n * (1 + scale) + shift         modulation

Roundings, in order, all to x's dtype:
    r1  x * rstd, where rstd = rsqrt.approx(mean square + eps) in fp32, mean square in ATen's order: LAYER_NORM for
        `native`, MEAN for `composed` (`bitfuse.core.reduction`)
    r2  table + scale, table + shift      r3  1 + scale      r4  n * (1 + scale)      r5  ... + shift

NaN and infinities spread over their row as in the chain; signed zeros and subnormals are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from bitfuse.core.kernel import kernel
from bitfuse.core.numerics import round_to
from bitfuse.core.reduction import row_rstd
from bitfuse.ops.adaln_cases import Inputs
from bitfuse.ops.adaln_common import modulated, store_modulated, tile_of_rows
from bitfuse.ops.norm_common import composed, native, operator

if TYPE_CHECKING:
    import triton.language as tl


# -- references ------------------------------------------------------------------------------------------------------


def rms_norm_modulate_native(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """RMSNorm by `F.rms_norm`, then AdaLN modulation: ltx-core `ops.ada_zero`, SGLang `_ltx2_rms_norm_modulate`.

    x               [B, T, D], contiguous
    scale, shift    [B or 1, T or 1, D], columns next to each other
    scale_table, shift_table    [D], added to scale and shift first; None: they are complete
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

    Arguments as in `rms_norm_modulate_native`.
    """
    return modulated(composed(x, eps), scale, shift, scale_table, shift_table)


# -- the kernel ------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("rows", "tokens"))
def _rms_norm_modulate_kernel(
    x_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr,
    rstd_ptr, out_ptr,
    rows, tokens, eps,
    scale_batch: tl.int64, scale_token: tl.int64, shift_batch: tl.int64, shift_token: tl.int64,
    N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row, batch, token, start, lane, _inside, here = tile_of_rows(rows, tokens, N, WIDTH, ROWS)
    x = tl.load(x_ptr + start + lane, mask=here, other=0.0).to(tl.float32)
    rstd = row_rstd(x_ptr + start, rstd_ptr, row, rows, eps, N, ROWS, ORDER, LANES)
    n = round_to(x * rstd, dtype)  # r1
    store_modulated(
        n, out_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr, start,
        batch * scale_batch + token * scale_token, batch * shift_batch + token * shift_token, lane, here, dtype,
    )  # fmt: skip


# -- the operators ---------------------------------------------------------------------------------------------------


def _of_norm(i: Inputs) -> tuple[Any, ...]:
    x, scale, scale_table, shift, shift_table = i.rows(), i.value(), i.table(), i.value(), i.table()
    return x, scale, shift, scale_table, shift_table, 1e-6


RMS_NORM_MODULATE_NATIVE = operator(rms_norm_modulate_native, _rms_norm_modulate_kernel, _of_norm)
RMS_NORM_MODULATE_COMPOSED = operator(rms_norm_modulate_composed, _rms_norm_modulate_kernel, _of_norm)
