"""What the AdaLN operators share: the eager steps, the kernels' helpers and the predicate.

AdaLN values (a scale, a shift, a gate) are [B, 1, D], one row for a sample, or [B, T, D], one for each token, often
strided views of a wider tensor. Each may come as a sum that nobody has formed yet: a layer's `table` row [D] plus
the timestep's value, rounded to their dtype, which is how the hosts form it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitfuse.core.conditions import FLOATS, HALVES, fitting, on_meta, plain, runnable
from bitfuse.core.kernel import kernel, power_of_2
from bitfuse.core.launch import ROW_WARPS, Plan, named, outputs_like, rows_per_program, strides
from bitfuse.core.numerics import round_to
from bitfuse.core.values import battery_shape

if TYPE_CHECKING:
    import triton.language as tl

MAX_WIDTH = 8192
WARPS = ROW_WARPS
__all__ = ["FLOATS", "HALVES", "battery_shape", "named", "rows_per_program"]


def rows_plan(
    launched: Any,
    reference: Callable[..., Any],
    args: tuple[Any, ...],
    scalars: tuple[float, ...] = (),
    constants: Mapping[str, Any] | None = None,
    **more: Any,
) -> Plan:
    """One launch over the rows of x [B, T, D], for kernels whose scalars and constants are

    rows, tokens, `scalars`, (batch, token) strides of gate, batch stride of mask, (batch, token) strides of scale,
    shift, scale2, shift2, as far as the reference has them; N, WIDTH, ROWS, `constants`
    """
    given = named(reference, args)
    x = given["x"]
    _, tokens, width = x.shape
    rows, per_program = x.numel() // width, rows_per_program()
    strides_of: list[int] = []
    for name in ("gate", "mask", "scale", "shift", "scale2", "shift2"):
        if name in given:
            strides_of += mask_stride(given[name]) if name == "mask" else row_strides(given[name], x)
    return Plan(
        launched,
        (-(-rows // per_program), 1, 1),
        (rows, tokens, *scalars, *strides_of),
        {"N": width, "WIDTH": power_of_2(width), "ROWS": per_program, **(constants or {})},
        ROW_WARPS,
        outputs_like(on_meta(reference, *args)),
        **more,
    )


def retiled(plan: Plan) -> Iterable[Plan]:
    """The same launch with other numbers of rows per program."""
    rows = plan.scalars[0]
    for per_program in (1, 2, 4):
        yield replace(plan, grid=(-(-rows // per_program), 1, 1), constants={**plan.constants, "ROWS": per_program})


# -- the eager steps, as the hosts write them ------------------------------------------------------------------------


def ada_value(value: Tensor, table: Tensor | None) -> Tensor:
    return value if table is None else table + value


def modulated(
    n: Tensor, scale: Tensor | None, shift: Tensor | None, scale_table: Tensor | None, shift_table: Tensor | None
) -> Tensor:
    if scale is None or shift is None:
        return n
    return n * (1 + ada_value(scale, scale_table)) + ada_value(shift, shift_table)


def residual_sum(x: Tensor, y: Tensor, gate: Tensor | None, gate_table: Tensor | None, mask: Tensor | None) -> Tensor:
    if gate is not None:
        y = y * ada_value(gate, gate_table)
    if mask is not None:
        y = y * mask
    return x + y


# -- the same steps in kernels ---------------------------------------------------------------------------------------


@kernel
def load_ada(value_ptr, table_ptr, row, lane, here, DTYPE: tl.constexpr):
    """fp32 values of rows that start at offsets `row`; with a table, its row plus the value, rounded to DTYPE."""
    value = tl.load(value_ptr + row + lane, mask=here, other=0.0).to(tl.float32)
    if table_ptr is not None:
        value = round_to(tl.load(table_ptr + lane, mask=here, other=0.0).to(tl.float32) + value, DTYPE)
    return value


@kernel
def modulate_row(n, scale, shift, DTYPE: tl.constexpr):
    """n * (1 + scale) + shift, rounded to DTYPE after the first and the second op; the store rounds the third."""
    factor = round_to(1.0 + scale, DTYPE)
    return round_to(n * factor, DTYPE) + shift


@kernel
def tile_of_rows(rows, tokens, N: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows: their numbers [ROWS], batch, token and offset of the first element [ROWS, 1], masks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    batch, token = (row // tokens).to(tl.int64)[:, None], (row % tokens).to(tl.int64)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    return row, batch, token, row.to(tl.int64)[:, None] * N, lane, inside, inside & (lane < N)


@kernel
def add_residual(
    x_ptr, y_ptr, gate_ptr, gate_table_ptr, mask_ptr, sum_ptr, start, gate_at, mask_at, lane, inside, here,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """x + y * gate * mask, rounded after every op, stored and handed back; what is None leaves no code."""
    x = tl.load(x_ptr + start + lane, mask=here, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + start + lane, mask=here, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        gate = load_ada(gate_ptr, gate_table_ptr, gate_at, lane, here, DTYPE)  # table + gate
        y = round_to(y * gate, DTYPE)  # y * gate
    if mask_ptr is not None:
        y = round_to(y * tl.load(mask_ptr + mask_at, mask=inside, other=0.0).to(tl.float32), DTYPE)  # y * mask
    x = round_to(x + y, DTYPE)  # x + y
    tl.store(sum_ptr + start + lane, x.to(DTYPE), mask=here)
    return x


@kernel
def store_modulated(
    n, out_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr, start, scale_at, shift_at, lane, here,
    DTYPE: tl.constexpr,
):  # fmt: skip
    scale = load_ada(scale_ptr, scale_table_ptr, scale_at, lane, here, DTYPE)
    shift = load_ada(shift_ptr, shift_table_ptr, shift_at, lane, here, DTYPE)
    tl.store(
        out_ptr + start + lane, modulate_row(n, scale, shift, DTYPE).to(DTYPE), mask=here
    )  # n * (1 + scale), + shift


# -- arguments by name and by role -----------------------------------------------------------------------------------


def role(name: str) -> str:
    """What the argument of this name is: x (rows that are normed), y (rows to add), value, table, mask, other."""
    if name in ("x", "y", "mask"):
        return name
    if name.endswith("_table"):
        return "table"
    return "value" if name.rstrip("2") in ("gate", "scale", "shift") else "other"


# -- why a call can't be fused -----------------------------------------------------------------------------------------


def why_not(
    reference: Callable[..., Any],
    arguments: dict[str, Any],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    other_problem: str | None = None,
) -> Iterator[str]:
    """Sentences for operators on rows [B, T, D] with AdaLN values and table rows: `role` knows them by name.

    `other_problem` is a shape problem that the operator itself has seen.
    """
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    rows, per_token, tables = (
        {name: t for name, t in tensors.items() if role(name) in roles}
        for roles in (("x", "y"), ("value",), ("table",))
    )
    mask = tensors.get("mask")
    reasons = list(plain(tensors))
    first, x = next(iter(rows.items()))
    if not reasons:
        problem = other_problem or next(_misfits(first, x, rows, per_token, tables, mask), None)
        reasons += fitting(reference, arguments, problem)
    reasons += runnable(tensors)
    if x.dtype not in dtypes:
        reasons.append(f"{first} is {x.dtype}; accepted: {', '.join(map(str, dtypes))}")
    for name, t in tensors.items():
        if t.dtype != x.dtype:
            reasons.append(f"{name} is {t.dtype} and {first} {x.dtype}; they must have one dtype")
        if t.ndim and t.shape[-1] > 1 and t.stride(-1) != 1:
            reasons.append(f"the columns of {name} are {t.stride(-1)} elements apart; accepted: next to each other")
    for name, t in rows.items():
        if not t.is_contiguous():
            reasons.append(f"{name} is not contiguous: its strides are {t.stride()}")
    if x.ndim and (x.shape[-1] % 128 or x.shape[-1] > MAX_WIDTH):
        reasons.append(f"{first} is {x.shape[-1]} wide; accepted: multiples of 128 up to {MAX_WIDTH}")
    if x.ndim and x.numel() // max(1, x.shape[-1]) >= 2**31:
        reasons.append(f"{first} {list(x.shape)} needs a larger grid than one launch has")
    yield from reasons


def _misfits(
    first: str,
    x: Tensor,
    rows: dict[str, Tensor],
    per_token: dict[str, Tensor],
    tables: dict[str, Tensor],
    mask: Tensor | None,
) -> Iterator[str]:
    if x.ndim != 3:
        yield f"{first} is {list(x.shape)}; accepted: [B, T, D], three dimensions"
        return
    batch, tokens, width = x.shape
    for name, t in rows.items():
        if t.shape != x.shape:
            yield f"{name} is {list(t.shape)}; accepted: the shape of {first}, {list(x.shape)}"
    for name, t in per_token.items():
        if t.ndim != 3 or t.shape[0] not in (1, batch) or t.shape[1] not in (1, tokens) or t.shape[2] != width:
            yield f"{name} is {list(t.shape)}; accepted: [{batch} or 1, {tokens} or 1, {width}]"
    for name, t in tables.items():
        if list(t.shape) != [width]:
            yield f"{name} is {list(t.shape)}; accepted: [{width}]"
    if mask is not None and list(mask.shape) not in ([batch, 1, 1], [1, 1, 1]):
        yield f"mask is {list(mask.shape)}; accepted: [{batch}, 1, 1]"


def row_strides(value: Tensor | None, x: Tensor) -> tuple[int, int]:
    """(batch, token) strides of an AdaLN value, 0 where one row serves all."""
    if value is None:
        return 0, 0
    batch, token, _ = strides(value.expand(x.shape[0], x.shape[1], -1))
    return (0 if value.shape[0] == 1 else batch), (0 if value.shape[1] == 1 else token)


def mask_stride(mask: Tensor | None) -> tuple[int]:
    """Batch stride of a perturbation mask, 0 where one serves all."""
    return (0 if mask is None or mask.shape[0] == 1 else mask.stride(0),)
