"""What the rotary operators of both layouts share: their predicate, their batteries' values, their geometries.

No kernel and no reference is here; those stand together in `split_rotary.py` and `interleaved_rotary.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitfuse.core import values
from bitfuse.core.conditions import fitting, plain, runnable
from bitfuse.core.kernel import interpreting, kernel
from bitfuse.core.launch import Plan
from bitfuse.core.numerics import addcmul_fuses, multiply_add, negate, round_to

if TYPE_CHECKING:
    import triton.language as tl

Reference = Callable[[Tensor, Tensor, Tensor], Tensor]
Misfit = Callable[[Tensor, Tensor, Tensor, bool], str | None]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Elements of x per program, and warps. Many one-warp programs with one 16-byte load per thread and operand keep
# the most loads in flight: on an H100 (2026-11-23, eight real shapes, both chains) 512 on one warp ran at 98 to
# 106 % of a plain copy of the same bytes; 1024 on one warp at 95 to 105 %, 2048 on four at 93 to 107 %, 1024 on
# two at 90 to 104 %, 8192 on four at 86 to 101 %. No reduction here, so no tile can change a bit.
_TILE, WARPS = 512, 1
# The interpreter is fastest with few, large programs.
_INTERPRETED_TILE = 1 << 15


def tile() -> int:
    return _INTERPRETED_TILE if interpreting() else _TILE


def retiled(plan: Plan) -> Iterator[Plan]:
    """The launch with few rows and with many in a program; how many there are is its first scalar."""
    for lanes in (1 << 7, 1 << 12):
        rows = max(1, lanes // plan.constants["LANES"])
        grid = (-(-plan.scalars[0] // rows), *plan.grid[1:])
        yield replace(plan, grid=grid, constants={**plan.constants, "ROWS": rows})


# -- the turns, in kernels -----------------------------------------------------------------------------------


@kernel
def turn_halves(x1, x2, c, s, PRODUCT: tl.constexpr, FUSED: tl.constexpr):
    """(x1*c - s*x2, x2*c + s*x1): the products rounded to PRODUCT (r1), then addcmul (r2); fp32, to be rounded (r3)."""
    p1 = round_to(x1 * c, PRODUCT)  # r1
    p2 = round_to(x2 * c, PRODUCT)  # r1
    out1 = multiply_add(negate(s), x2, p1, FUSED)  # r2
    out2 = multiply_add(s, x1, p2, FUSED)  # r2
    return out1, out2


@kernel
def turn_neighbours(x, c, s, ROWS: tl.constexpr, LANES: tl.constexpr, PRODUCT: tl.constexpr):
    """x*c + turned(x)*s over [ROWS, LANES], where turned swaps neighbours and negates the odd one (r1, r2)."""
    even, odd = tl.split(tl.reshape(x, (ROWS, LANES // 2, 2)))
    turned = tl.reshape(tl.join(negate(odd), even), (ROWS, LANES))
    p = round_to(x * c, PRODUCT)  # r1
    q = round_to(turned * s, PRODUCT)  # r1
    return p + q  # r2


# -- when a rotary embedding can't be fused -----------------------------------------------------------------


def why_not(
    x: Tensor, cos: Tensor, sin: Tensor, *, reference: Reference, in_fp32: bool, misfit: Misfit
) -> Iterator[str]:
    tensors = {"x": x, "cos": cos, "sin": sin}
    reasons = list(plain(tensors))
    if not reasons:  # only of plain tensors is it known what the reference does with their shapes
        reasons += fitting(reference, tensors, misfit(x, cos, sin, in_fp32))
    reasons += runnable(tensors)
    if x.dtype not in _DTYPES:
        reasons.append(f"x is {x.dtype}; accepted: torch.bfloat16, torch.float16, torch.float32")
    if cos.dtype != sin.dtype:
        reasons.append(f"cos is {cos.dtype} and sin {sin.dtype}; they must have one dtype")
    elif in_fp32 and cos.dtype not in _DTYPES:
        reasons.append(f"the tables are {cos.dtype}; accepted: torch.float32, torch.bfloat16, torch.float16")
    elif not in_fp32 and cos.dtype != x.dtype:
        reasons.append(f"the tables are {cos.dtype} and x {x.dtype}; this chain takes them alike")
    samples = max(1, x.shape[0]) if x.ndim else 1
    if samples > 65535 or x.numel() // samples >= 2**32 - 2**20:
        reasons.append(f"x {list(x.shape)} needs a larger grid than one launch has")
    yield from reasons
    if not reasons and addcmul_fuses(x.device, torch.float32 if in_fp32 else x.dtype) is None:
        yield f"addcmul on {x.device} rounds neither once nor twice, so no kernel here equals it"


def split_misfit(x: Tensor, cos: Tensor, sin: Tensor, in_fp32: bool) -> str | None:
    """What is wrong with these shapes for split tables, if anything."""
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


def interleaved_misfit(x: Tensor, cos: Tensor, sin: Tensor, in_fp32: bool) -> str | None:
    """What is wrong with these shapes for interleaved tables, if anything."""
    if x.ndim != 3 or x.shape[2] % 2:
        return f"x is {list(x.shape)}; accepted: [B, T, C] with an even C"
    for name, table in (("cos", cos), ("sin", sin)):
        ones = [1] * (3 - table.ndim) + list(table.shape)
        if table.ndim > 3 or any(n not in (1, m) for n, m in zip(ones, x.shape, strict=True)):
            return f"{name} is {list(table.shape)}; accepted: {list(x.shape)}, or 1 where it broadcasts"
    return None


# -- what a wrong kernel trips over -------------------------------------------------------------------------


def families(dtypes: Sequence[torch.dtype], device: torch.device) -> Iterator[tuple[str, list[Tensor]]]:
    """(family, [x1, x2, c, s]): element i of the four is one turned pair."""
    generator = torch.Generator(device).manual_seed(20)
    n = 1 << 15
    x1, x2, angle, _ = values.live([torch.float32] * 4, n, generator)
    angle = angle * 1e3
    live = [3 * x1, 3 * x2, angle.cos(), angle.sin()]
    yield "live", [v.to(d) for v, d in zip(live, dtypes, strict=True)]
    yield "wide", values.wide(dtypes, n, generator)
    yield "uniform bits", values.uniform_bits(dtypes, n, generator)
    yield "specials", values.products_of_specials(dtypes, device)

    # Ties of x's dtype: x1 * 1 -+ half a unit in the last place of 1, and (odd / 2^k) * 1.5; a unit of the
    # table's dtype beside them.
    x1 = values.significands(dtypes[0], n, generator)
    sign = values.signs(n, generator)
    half_unit = torch.finfo(dtypes[0]).eps / 2
    beside = 1 + torch.randint(-1, 2, (n,), device=device, generator=generator) * torch.finfo(dtypes[2]).eps
    c = torch.where(torch.arange(n, device=device) % 2 == 0, 1.0, 1.5)
    ties = [x1, sign, c, sign.roll(1) * half_unit * beside]
    yield "ties", [v.to(d) for v, d in zip(ties, dtypes, strict=True)]

    # x1*c and x2*s nearly equal: what is left is the rounding of one product, if it was rounded.
    c = values.significands(dtypes[2], n, generator)
    x2 = x1 * values.signs(n, generator).to(x1.dtype)
    cancelling = [x1, x2, c, c.float() * beside]
    yield "cancellation", [v.to(d) for v, d in zip(cancelling, dtypes, strict=True)]


def as_tokens(operands: list[Tensor], tokens: int, heads: int, half: int) -> list[Tensor]:
    """[n] each -> [2, T, heads, half] each, repeated to fill.

    T is like the call's own count modulo 16, so that strides that are multiples of T stay in their class.
    """
    n = operands[0].numel()
    least = -(-n // (2 * heads * half))
    t = least + (tokens - least) % 16
    index = torch.arange(2 * t * heads * half, device=operands[0].device) % n
    return [v[index].view(2, t, heads, half) for v in operands]


# -- geometries ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RotaryCase:
    """A geometry. `x_form` and `table_form` name layouts; `real` marks those that LTX-2 hosts run."""

    name: str
    tokens: int
    heads: int
    head_dim: int
    x_dtype: torch.dtype = torch.bfloat16
    table_dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    table_batch: int | None = None
    x_form: str = "tokens"
    table_form: str = "by token"
    interleaved: bool = False
    real: bool = False

    def arguments(
        self, device: torch.device | str, tokens: int | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x, cos, sin) with live values; `tokens` replaces the case's own count (for the interpreter)."""
        generator = torch.Generator(device).manual_seed(seed)
        t = self.tokens if tokens is None else min(tokens, self.tokens)
        b, h, d = self.batch, self.heads, self.head_dim

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        table_batch = b if self.table_batch is None else self.table_batch
        width = h * d if self.interleaved else h * d // 2
        angle = 1e3 * randn(table_batch, t, width)
        cos, sin = angle.cos().to(self.table_dtype), angle.sin().to(self.table_dtype)
        if not self.interleaved:
            cos, sin = (v.unflatten(2, (h, d // 2)).swapaxes(1, 2) for v in (cos, sin))
            if self.table_form == "contiguous":
                cos, sin = cos.contiguous(), sin.contiguous()
            elif self.table_form == "slice":  # a shard of tokens, strides and storage of the whole
                cos, sin = (torch.cat([v, v, v], dim=2)[:, :, t : 2 * t] for v in (cos, sin))
        return self._x(randn, b, t, h * d), cos, sin

    def _x(self, randn: Callable[..., Tensor], b: int, t: int, width: int) -> Tensor:
        if self.x_form == "columns of a wider tensor":
            return randn(b, t, 3 * width).to(self.x_dtype)[..., width : 2 * width]
        if self.x_form == "tokens last":
            return randn(b, width, t).to(self.x_dtype).transpose(1, 2)
        if self.x_form == "misaligned":
            return randn(b * t * width + 1).to(self.x_dtype)[1:].view(b, t, width)
        x = randn(b, t, width).to(self.x_dtype)
        if self.x_form == "heads":  # [B, H, T, D], as FastVideo and attention layers hold it
            return x.unflatten(2, (self.heads, -1)).swapaxes(1, 2)
        if self.x_form == "heads, contiguous":
            return x.unflatten(2, (self.heads, -1)).swapaxes(1, 2).contiguous()
        return x


def cases(in_fp32: bool, interleaved: bool) -> tuple[RotaryCase, ...]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    host_table = fp32 if in_fp32 else bf16

    def case(name: str, tokens: int, heads: int, head_dim: int, **kwargs: Any) -> RotaryCase:
        kwargs.setdefault("table_dtype", host_table)
        return RotaryCase(name, tokens, heads, head_dim, interleaved=interleaved, **kwargs)

    found = [
        case("video self-attention, 768x512x121", 6144, 32, 128, real=True),
        case("the same, batch 2 (guidance)", 6144, 32, 128, batch=2, real=True),
        case("video side of audio-video attention", 6144, 32, 64, real=True),
        case("audio self-attention, 5 s", 126, 32, 64, real=True),
        case("first pass of two, 1536 tokens", 1536, 32, 128, real=True),
        case("1536x1024x121", 24576, 32, 128, real=True),
        case("1920x1088x121", 32640, 32, 128, real=True),
        case("text connector, 30 heads", 1024, 30, 128, real=True),
        case("one token", 1, 32, 128),
        case("one head of 2", 33, 1, 2),
        case("head size 6", 33, 3, 6, batch=2),
        case("head size 40", 17, 5, 40),
        case("head size 96", 17, 3, 96),
        case("head size 130", 17, 2, 130),
        case("fp16", 37, 4, 64, x_dtype=fp16, table_dtype=fp32 if in_fp32 else fp16),
        case("fp32", 37, 4, 64, x_dtype=fp32, table_dtype=fp32),
        case("columns of a wider tensor", 37, 4, 64, x_form="columns of a wider tensor"),
        case("tokens last", 37, 4, 64, batch=2, x_form="tokens last"),
        case("misaligned", 37, 4, 64, x_form="misaligned"),
    ]
    if in_fp32:
        found.append(case("bf16 tables", 37, 4, 64, table_dtype=bf16))
    if not interleaved:
        found += [
            case("x [B, H, T, D]", 37, 4, 64, batch=2, x_form="heads"),
            case("x [B, H, T, D], contiguous", 37, 4, 64, x_form="heads, contiguous"),
            case("x [B, H, T, D], tables of batch 1", 37, 4, 64, batch=2, table_batch=1, x_form="heads"),
            case("tables contiguous", 37, 4, 64, table_form="contiguous"),
            case("tables a slice of tokens", 37, 4, 64, batch=2, table_form="slice"),
        ]
    if interleaved or not in_fp32:
        found.append(case("tables of batch 1", 37, 4, 64, batch=2, table_batch=1))
    return tuple(found)
