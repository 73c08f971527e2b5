"""What the rotary operators of `rope.py` are proved by: geometries, batteries, wrong kernels, instruction counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitfuse.core import values
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed
from bitfuse.core.launch import Plan
from bitfuse.core.values import lookalike
from bitfuse.ops.rope import CHAINS, Chain

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# -- what a wrong kernel trips over ----------------------------------------------------------------------------------


def _battery(x: Tensor, cos: Tensor, sin: Tensor, *, chain: Chain) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    laid_out = _split if chain.split else _interleaved
    dtypes = (x.dtype, x.dtype, cos.dtype, sin.dtype)
    absorbed = [("absorbed", _absorbed(dtypes, x.device))] if chain.fuses == "first" else []
    for family, operands in (*absorbed, *_families(dtypes, x.device)):
        gaps = (0, 0, 0) if family == "cancellation" else (1, 2, 3)  # that one, the last, is dense
        yield family, laid_out(x, cos, sin, operands, gaps, own_tables=family != "specials")


def _absorbed(dtypes: Sequence[torch.dtype], device: torch.device) -> list[Tensor]:
    """x1 times one of c and s is often a tie of bf16, and x2 times the other far below its last bit in fp32."""
    generator = torch.Generator(device).manual_seed(21)
    n = 1 << 15
    index = torch.arange(n, device=device)
    tiny = torch.ldexp(torch.ones(n, device=device), -torch.randint(15, 45, (n,), device=device, generator=generator))
    x1, x2 = values.significands(dtypes[0], n, generator) * values.signs(n, generator), values.signs(n, generator)
    c, s = torch.where(index % 2 == 0, 1.5, tiny), torch.where(index % 2 == 0, tiny, 1.5)
    return [v.to(d) for v, d in zip((x1, x2, c, s), dtypes, strict=True)]


def _families(dtypes: Sequence[torch.dtype], device: torch.device) -> Iterator[tuple[str, list[Tensor]]]:
    """(family, [x1, x2, c, s]): element i of the four is one turned pair."""
    generator = torch.Generator(device).manual_seed(20)
    n = 1 << 15
    x1, x2, angle, _ = values.live([FP32] * 4, n, generator)
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


def _split(
    x: Tensor, cos: Tensor, sin: Tensor, operands: list[Tensor], gaps: tuple[int, ...], own_tables: bool
) -> tuple[Tensor, ...]:
    """Arguments of two samples that look like x, cos and sin and hold these pairs."""
    _, heads, tokens, half = cos.shape
    x1, x2, c, s = _as_tokens(operands, tokens, heads, half)
    x_values = torch.cat([x1, x2], dim=-1)
    x_values = x_values.flatten(2) if x.ndim == 3 else x_values.swapaxes(1, 2)
    tables = [v.swapaxes(1, 2)[: 2 if cos.shape[0] == x.shape[0] else 1] for v in (c, s)]
    made = zip((x, cos, sin), (x_values, *tables), gaps, strict=True)
    return tuple(lookalike(like, v, gap) for like, v, gap in made)


def _interleaved(
    x: Tensor, cos: Tensor, sin: Tensor, operands: list[Tensor], gaps: tuple[int, ...], own_tables: bool
) -> tuple[Tensor, ...]:
    """Likewise. own_tables: the second channel of a pair gets the entry of another pair, as in any table it may."""
    x1, x2, c, s = (v.squeeze(2) for v in _as_tokens(operands, x.shape[1], 1, x.shape[2] // 2))
    made = [lookalike(x, torch.stack([x1, x2], dim=-1).flatten(2), gaps[0])]
    for like, v, gap in ((cos, c, gaps[1]), (sin, s, gaps[2])):
        wide = like if like.ndim == 3 else like.expand(*(1,) * (3 - like.ndim), *like.shape)
        table = torch.stack([v, v.roll(1, 1) if own_tables else v], dim=-1).flatten(2)
        for dim in range(3):
            if wide.shape[dim] == 1 and x.shape[dim] != 1:
                table = table.narrow(dim, 0, 1)
        made.append(lookalike(wide, table, gap).reshape(table.shape[3 - like.ndim :]))
    return tuple(made)


def _as_tokens(operands: list[Tensor], tokens: int, heads: int, half: int) -> list[Tensor]:
    """[n] each -> [2, T, heads, half] each, repeated to fill.

    T is like the call's own count modulo 16, so that strides that are multiples of T stay in their class.
    """
    n = operands[0].numel()
    least = -(-n // (2 * heads * half))
    t = least + (tokens - least) % 16
    index = torch.arange(2 * t * heads * half, device=operands[0].device) % n
    return [v[index].view(2, t, heads, half) for v in operands]


# -- geometries ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RotaryCase:
    """A geometry. `x_form` and `table_form` name layouts; `real` marks those that LTX-2 hosts run."""

    name: str
    tokens: int
    heads: int
    head_dim: int
    x_dtype: torch.dtype = BF16
    table_dtype: torch.dtype = BF16
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


def _cases(chain: Chain) -> tuple[RotaryCase, ...]:
    def case(name: str, tokens: int, heads: int, head_dim: int, **kwargs: Any) -> RotaryCase:
        kwargs.setdefault("table_dtype", FP32 if chain.in_fp32 else BF16)
        return RotaryCase(name, tokens, heads, head_dim, interleaved=not chain.split, **kwargs)

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
        case("fp16", 37, 4, 64, x_dtype=FP16, table_dtype=FP32 if chain.in_fp32 else FP16),
        case("fp32", 37, 4, 64, x_dtype=FP32, table_dtype=FP32),
        case("columns of a wider tensor", 37, 4, 64, x_form="columns of a wider tensor"),
        case("tokens last", 37, 4, 64, batch=2, x_form="tokens last"),
        case("misaligned", 37, 4, 64, x_form="misaligned"),
    ]
    if chain.in_fp32:
        found.append(case("bf16 tables", 37, 4, 64, table_dtype=BF16))
    if chain.split:
        found += [
            case("x [B, H, T, D]", 37, 4, 64, batch=2, x_form="heads"),
            case("x [B, H, T, D], contiguous", 37, 4, 64, x_form="heads, contiguous"),
            case("x [B, H, T, D], tables of batch 1", 37, 4, 64, batch=2, table_batch=1, x_form="heads"),
            case("tables contiguous", 37, 4, 64, table_form="contiguous"),
            case("tables a slice of tokens", 37, 4, 64, batch=2, table_form="slice"),
        ]
    if not (chain.split and chain.in_fp32):
        found.append(case("tables of batch 1", 37, 4, 64, batch=2, table_batch=1))
    return tuple(c for c in found if c.x_dtype in chain.dtypes)


# -- wrong kernels ---------------------------------------------------------------------------------------------------


_ONE_FOR_TWO = "two roundings where addcmul has one, or one for two"
_OTHER = "the other product fused"
_THREE = "a rounding more, of the fused product"


def mutants_of_form(chain: Chain) -> tuple[Mutant, ...]:
    """Wrong kernels of the lines that are a form's own: which products are rounded, which is fused, and the signs."""
    in_fp32 = chain.in_fp32
    # the rounded product leaves the compiler one way to contract: ours
    one_way = () if in_fp32 else (BF16, FP16)
    exact = () if in_fp32 else (FP16,)  # a product of fp16, rounded to it, leaves one way
    if chain.fuses == "none":
        p, q = "round_to(x1 * c, PRODUCT)", "round_to(x2 * s, PRODUCT)"
        swapped = (
            (("x2, negate(s), PRODUCT", "x2, s, PRODUCT"), ("turn_one(x1, s", "turn_one(x1, negate(s)"))
            if chain.split
            else (("tl.join(negate(odd), even)", "tl.join(odd, negate(even))"),)
        )
        return (
            *(() if in_fp32 else (_unrounded((f"{p} +", "x1 * c +")), _unrounded((f"+ {q}", "+ x2 * s")))),
            Mutant(SIGN, swapped),
            _contracted(),
            Mutant("one rounding for product and sum", ((f"{p} + {q}", f"tl.fma(x2, s, {p})"),)),
            Mutant("one rounding for the first product and the sum", ((f"{p} + {q}", f"tl.fma(x1, c, {q})"),)),
        )
    if chain.fuses == "sine":
        p1, p2 = "round_to(x1 * c, PRODUCT)", "round_to(x2 * c, PRODUCT)"
        sum1, sum2 = "multiply_add(negate(s), x2, p1, FUSED)", "multiply_add(s, x1, p2, FUSED)"
        swapped = (("negate(s), x2, p1", "s, x2, p1"), ("(s, x1, p2", "(negate(s), x1, p2"))
        own: tuple[Mutant, ...] = (
            *(() if in_fp32 else (_unrounded((p1, "x1 * c"), (p2, "x2 * c")),)),
            _contracted((sum1, "p1 - s * x2"), (sum2, "p2 + s * x1"), harmless_for=one_way),
            Mutant(_OTHER, ((sum1, "tl.fma(x1, c, negate(s * x2))"),)),
            Mutant(_ONE_FOR_TWO, (("p1, FUSED)", "p1, not FUSED)"),), harmless_for=exact),
        )
    elif chain.fuses == "first":
        q1, q2 = "round_to(negate(s) * x2, PRODUCT)", "round_to(c * x2, PRODUCT)"
        sum1, sum2 = "multiply_add_bf16(c, x1, q1)", "multiply_add_bf16(s, x1, q2)"
        swapped = ((q1, "round_to(s * x2, PRODUCT)"), ("(s, x1, q2", "(negate(s), x1, q2"))
        own = (
            _unrounded((q1, "negate(s) * x2"), (q2, "c * x2")),
            _contracted((sum1, "q1 + c * x1"), (sum2, "q2 + s * x1")),
            Mutant(_OTHER, ((sum1, "multiply_add_bf16(negate(s), x2, round_to(c * x1, PRODUCT))"),)),
            Mutant(_THREE, ((sum2, "round_to(s * x1, PRODUCT) + q2"),)),
            Mutant("the first result by way of fp32", ((sum1, "tl.fma(c, x1, q1)"),)),
            Mutant("the second result by way of fp32", ((sum2, "tl.fma(s, x1, q2)"),)),
        )
    else:
        p1, p2 = "round_to(c_even * even, PRODUCT)", "round_to(s_odd * even, PRODUCT)"
        sum1, sum2 = "multiply_add(negate(s_even), odd, p_even, FUSED)", "multiply_add(c_odd, odd, p_odd, FUSED)"
        swapped = (("negate(s_even), odd", "s_even, odd"), (p2, "round_to(negate(s_odd) * even, PRODUCT)"))
        own = (
            _unrounded((p1, "c_even * even"), (p2, "s_odd * even")),
            _contracted((sum1, "p_even - s_even * odd"), (sum2, "p_odd + c_odd * odd"), harmless_for=one_way),
            Mutant(_OTHER, ((sum1, "tl.fma(c_even, even, round_to(negate(s_even) * odd, PRODUCT))"),)),
            Mutant(_THREE, ((sum2, "round_to(c_odd * odd, PRODUCT) + p_odd"),), harmless_for=(FP32,)),
            Mutant(_ONE_FOR_TWO, (("p_even, FUSED)", "p_even, not FUSED)"),), harmless_for=exact),
            Mutant(
                "odd channels with the even ones' entries", (("(c_odd, odd", "(c_even, odd"), ("s_odd *", "s_even *"))
            ),
        )
    return (*own, Mutant(SIGN, swapped))


def _mutants(chain: Chain) -> tuple[Mutant, ...]:
    if chain.split:
        loaded = "out1, out2 = turn_halves("
        flush = (loaded, f"x1 = {flushed('x1')}\n    {loaded}")
        negated, value, last = "s", "s", ("lane < HALF", "lane < HALF - 1")
    else:
        flush = ("even, odd =", f"x = {flushed('x')}\n    even, odd =")
        negated, value = ("s", "s_even") if chain.fuses == "second" else ("x", "odd")
        last = ("lane < WIDTH", "lane < WIDTH - 1")
    return (
        *mutants_of_form(chain),
        Mutant(f"-{negated} as 0 - {negated}", ((f"negate({value})", f"(0.0 - {value})"),)),
        Mutant("subnormals flushed", (flush,), harmless_for=(FP16,)),
        Mutant("the last lane not written", (last,)),
        _TOKEN_0,
    )


SIGN = "the sine's sign swapped"
_TOKEN_0 = Mutant("every token turned as token 0", (("token * stride_cos_token", "token * 0"),))


def _unrounded(*edits: tuple[str, str]) -> Mutant:
    return Mutant("a product left unrounded", edits, harmless_for=(FP32,))


def _contracted(*edits: tuple[str, str], harmless_for: tuple[torch.dtype, ...] = ()) -> Mutant:
    options = {"enable_fp_fusion": True}
    return Mutant("the compiler's own contraction", edits, options, harmless_for, compiled_only=True)


# -- counts, other tiles ---------------------------------------------------------------------------------------------


def _audits(chain: Chain) -> tuple[Audit, ...]:
    """For two results: two products and two addcmul, or, where no product is fused, four and two sums."""
    counts = {"mul.rn.f32": 4, "add.rn.f32": 2} if chain.fuses == "none" else {"mul.rn.f32": 2, "fma.rn.f32": 2}
    roundings = 2 if chain.in_fp32 else 2 + counts["mul.rn.f32"]  # r3, and r1 where that is not fp32
    rounded = {**counts, "cvt.rn.bf16.f32": roundings}
    if chain.fuses == "first":  # whose r3 is the fma
        rounded = {"mul.rn.f32": 2, "fma.rn.bf16": 2, "cvt.rn.bf16.f32": 2}
    of_hosts = ("video self-attention, 768x512x121", "audio self-attention, 5 s")
    audits = tuple(Audit(case, rounded, per=2) for case in of_hosts)
    return (*audits, Audit("fp32", counts, per=2)) if torch.float32 in chain.dtypes else audits


def _retiled(plan: Plan) -> Iterator[Plan]:
    """The launch with few rows and with many in a program, and of interleaved tables with fewer lanes.

    How many rows there are is its first scalar.
    """
    for elements in (1 << 7, 1 << 12):
        rows = max(1, elements // plan.constants["LANES"])
        grid = (-(-plan.scalars[0] // rows), *plan.grid[1:])
        yield replace(plan, grid=grid, constants={**plan.constants, "ROWS": rows})
    if "WIDTH" in plan.constants:
        lanes = max(2, plan.constants["LANES"] // 4)
        grid = (*plan.grid[:2], -(-plan.constants["WIDTH"] // lanes))
        yield replace(plan, grid=grid, constants={**plan.constants, "LANES": lanes})


EVIDENCE = {
    chain.reference.__name__: Evidence(
        battery=partial(_battery, chain=chain),
        cases=_cases(chain),
        mutants=_mutants(chain),
        audits=_audits(chain),
        retiled=_retiled,
    )
    for chain in CHAINS
}
