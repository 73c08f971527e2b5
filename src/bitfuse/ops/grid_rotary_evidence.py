"""What `qk_rms_norm_grid_rotary` is proved by: batteries, geometries, wrong kernels, instruction counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.emulated import layer_norm_mean_square
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed, retiled
from bitfuse.core.launch import named
from bitfuse.core.values import ROW_FAMILIES, lookalike
from bitfuse.ops.grid_rotary import TABLES, qk_rms_norm_grid_rotary, statistics_of_aten, turned_on_grid

_Pair = tuple[Tensor, Tensor]

# -- what a wrong kernel trips over ----------------------------------------------------------------------------------

_GRID = (3, 5, 7)  # of a battery: no two sides are alike, and no tile divides them


def _battery(*args: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(family, arguments) of two samples, on a grid of `_GRID` or of as many columns more as give 65,536 elements. An
    axis with one place, and a table without pairs, stay so."""
    given = named(qk_rms_norm_grid_rotary, args)
    q = given["q"]
    generator = torch.Generator(q.device).manual_seed(26)
    sides = [side if given[f"{axis}_cos"].shape[0] > 1 else 1 for axis, side in zip(_AXES, _GRID, strict=True)]
    wanted = -(-(1 << 16) // (2 * q.shape[2]))
    longest = max(range(3), key=lambda axis: (given[f"{_AXES[axis]}_cos"].shape[0], axis))
    others = sides[0] * sides[1] * sides[2] // sides[longest]
    sides[longest] = max(sides[longest], -(-wanted // others))
    multiple = q.shape[1] * q.shape[2] % 16 == 0  # a sample's size stays a multiple of 16, or none: see `lookalike`
    while multiple != (sides[longest] * others * q.shape[2] % 16 == 0):
        sides[longest] += 1
    tokens = sides[longest] * others
    for family, draw in ROW_FAMILIES.items():
        found: list[Any] = []
        for name, t in given.items():
            if not isinstance(t, Tensor):
                found.append(t)
                continue
            if name in TABLES:
                drawn = _table(name, [sides[_AXES.index(name[:-4])], t.shape[1]], t.dtype, family, generator)
            elif name in ("q", "k"):  # a head is a row of its own
                head_dim = given["q_weight"].shape[0]
                heads = draw("x", [2, tokens * t.shape[2] // head_dim, head_dim], t.dtype, generator)
                drawn = heads.reshape(2, tokens, t.shape[2])
            else:
                drawn = draw("value", list(t.shape), t.dtype, generator)
            drawn = drawn.to(t.dtype)
            found.append(lookalike(t, drawn) if drawn.numel() else drawn)  # of an axis without pairs nothing is read
        yield family, tuple(found)


_AXES = ("frame", "line", "column")


def _table(name: str, shape: list[int], dtype: torch.dtype, family: str, generator: torch.Generator) -> Tensor:
    if family not in ("live", "absorption", "special rows"):
        return ROW_FAMILIES[family]("value", shape, dtype, generator)
    angle = 1e3 * torch.randn(shape, generator=generator, device=generator.device)
    return angle.cos() if name.endswith("cos") else angle.sin()


def _emulated_statistics(*args: Any) -> _Pair:
    """`statistics_of_aten` in CUDA's order, on any device."""
    given = named(qk_rms_norm_grid_rotary, args)
    q, k = (
        torch.rsqrt(layer_norm_mean_square(given[x].unflatten(2, (-1, given["q_weight"].shape[0]))) + given["eps"])
        for x in "qk"
    )
    return q, k


def _emulated(*args: Any) -> _Pair:
    """The reference's own steps, with the statistics in CUDA's order."""
    given = named(qk_rms_norm_grid_rotary, args)
    grid = [given[f"{axis}_cos"].shape[0] for axis in _AXES]
    outs = []
    for side, rstd in zip("qk", _emulated_statistics(*args), strict=True):
        x, weight = given[side], given[f"{side}_weight"]
        heads = x.unflatten(2, (-1, weight.shape[0]))
        n = (weight.float() * (rstd * heads.float())).to(x.dtype)
        n = n * given["q_scale"] if side == "q" else n
        outs.append(turned_on_grid(n.unflatten(1, grid), *(given[name] for name in TABLES)).reshape(x.shape))
    return outs[0], outs[1]


# -- geometries ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GridCase:
    """A geometry: a volume of tokens. `real` marks those that LTX-2.5's decoder has.

    pairs    of the three axes; None: as `LTX2VideoVaeRotaryPosEmbed3D` shares a head's out
    """

    name: str
    frames: int
    lines: int
    columns: int
    heads: int
    head_dim: int = 64
    batch: int = 1
    pairs: tuple[int, int, int] | None = None
    dtype: torch.dtype = torch.bfloat16
    table_dtype: torch.dtype = torch.float32
    misaligned: bool = False
    real: bool = False

    def of(self, tokens: int, batch: int | None = None) -> GridCase:
        """With about so many tokens, no side longer than it is."""
        frames = min(self.frames, 2 if tokens >= 8 else 1)
        lines = min(self.lines, 3 if tokens >= 12 else 2 if tokens >= 4 else 1)
        columns = min(self.columns, max(1, tokens // (frames * lines))) if tokens else 0
        return replace(self, frames=frames, lines=lines, columns=columns, batch=batch or self.batch)

    def arguments(self, device: torch.device | str, tokens: int | None = None, seed: int = 0) -> tuple[Any, ...]:
        """Live values, with the tables that the host computes; `tokens` replaces the case's own count."""
        if tokens is not None:
            return self.of(tokens).arguments(device, seed=seed)
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        shape = self.batch, self.frames * self.lines * self.columns, self.heads * self.head_dim
        if self.misaligned:
            n = shape[0] * shape[1] * shape[2]
            q, k = (normal(n + 1)[1:].view(shape) for _ in "qk")
        else:
            q, k = (normal(*shape) for _ in "qk")
        weights = (1 + 0.1 * normal(self.head_dim) for _ in "qk")
        tables = (
            table.to(self.table_dtype)
            for places, pairs in zip((self.frames, self.lines, self.columns), self.shares(), strict=True)
            for table in _cos_sin(places, pairs, device)
        )
        return (q, k, *weights, *tables, self.head_dim**-0.5, 1e-6)

    def shares(self) -> tuple[int, int, int]:
        if self.pairs is not None:
            return self.pairs
        of_frames = self.head_dim // 8
        if (self.head_dim // 2 - of_frames) % 2:
            of_frames -= 1
        others = (self.head_dim // 2 - of_frames) // 2
        return of_frames, others, others


def _cos_sin(places: int, pairs: int, device: torch.device | str) -> _Pair:
    powers = torch.arange(pairs, dtype=torch.float32, device=device) / max(1, pairs)
    angles = torch.arange(places, dtype=torch.float32, device=device)[:, None] / 1e4**powers
    return angles.cos(), angles.sin()


_CASES = (
    GridCase("stage 5, 768x512x121", 121, 128, 192, 4, real=True),
    GridCase("stage 5, 384x256x25, batch 2", 25, 64, 96, 4, batch=2, real=True),
    GridCase("stage 4, 768x512x121", 69, 64, 96, 8, real=True),
    GridCase("stage 3, 768x512x121", 35, 32, 48, 8, real=True),
    GridCase("stage 2, 768x512x121", 18, 32, 48, 16, real=True),
    GridCase("stage 1, 768x512x121", 18, 16, 24, 32, real=True),
    GridCase("small", 2, 3, 4, 2, batch=2),
    GridCase("one token", 1, 1, 1, 4),
    GridCase("one frame", 1, 3, 5, 2),
    GridCase("head size 8", 2, 3, 4, 3, head_dim=8),
    GridCase("head size 24", 3, 2, 4, 3, head_dim=24),
    GridCase("head size 40", 2, 3, 2, 5, head_dim=40, batch=2),
    GridCase("head size 128", 2, 2, 3, 1, head_dim=128),
    GridCase("no pairs for the frames", 2, 3, 4, 2, head_dim=16, pairs=(0, 5, 3)),
    GridCase("misaligned", 2, 3, 4, 2, misaligned=True),
    GridCase("fp16", 2, 3, 5, 2, dtype=torch.float16),
    GridCase("tables in bf16", 2, 3, 5, 2, table_dtype=torch.bfloat16),
)

# -- wrong kernels, counts, other tiles ------------------------------------------------------------------------------

_NORMED = "round_to(weight * (rstd[:, None] * x), DTYPE)"
_SCALED = "n = round_to(n * q_scale, dtype)"
_SUM = "((square0 + square1) + square2) + square3"
_MUTANTS = (
    Mutant("a vector's squares added in pairs", ((_SUM, "(square0 + square1) + (square2 + square3)"),)),
    Mutant(
        "one fold of neighbours",
        (
            (
                "sum_of_two(tl.reshape(values, (ROWS, 2, 4)))",
                "sum_of_two(tl.trans(tl.reshape(values, (ROWS, 4, 2)), (0, 2, 1)))",
            ),
        ),
    ),
    Mutant("a product with 1/N", (("divide(fold(lane_sum, ROWS, WIDTH // 4), N * 1.0)",
                                   "fold(lane_sum, ROWS, WIDTH // 4) * (1.0 / N)"),), case="head size 40"),
    Mutant(
        "1 / sqrt for rsqrt",
        (("reciprocal_root(square + eps)", "(1.0 / tl.sqrt(square + eps))"),),
        compiled_only=True,
    ),
    Mutant("the norm not rounded", ((_NORMED, "weight * (rstd[:, None] * x)"),)),
    Mutant("the weight before the statistic", ((_NORMED, "round_to((weight * x) * rstd[:, None], DTYPE)"),)),
    Mutant("rounded before the weight", ((_NORMED, "round_to(weight * round_to(rstd[:, None] * x, DTYPE), DTYPE)"),)),
    Mutant(
        "subnormals flushed",
        ((_NORMED, f"round_to(weight * (rstd[:, None] * {flushed('x')}), DTYPE)"),),
        harmless_for=(torch.float16,),
    ),
    Mutant("the queries not scaled", ((_SCALED, "n = n"),)),
    Mutant("the scaled queries not rounded", ((_SCALED, "n = n * q_scale"),), case="head size 40"),
    Mutant("the keys normed with the queries' weight", (("x, k_weight_ptr", "x, q_weight_ptr"),)),
    Mutant("the first product and the sum fused", (("a * b + c * d", "tl.fma(a, b, c * d)"),)),
    Mutant("the second product and the sum fused", (("a * b + c * d", "tl.fma(c, d, a * b)"),)),
    Mutant("the sine's sign swapped", (("negate(odd), s", "odd, s"), ("even, s, odd, c", "negate(even), s, odd, c"))),
    Mutant("lines and columns exchanged", (("token % columns, token // columns % lines",
                                            "token // lines % columns, token % lines"),)),
    Mutant("every frame turned as the first", (("frame[:, None] * FRAME_PAIRS + pair", "pair + 0 * frame[:, None]"),)),
    Mutant("the compiler's own contraction", (), {"enable_fp_fusion": True}, compiled_only=True),
    Mutant("the last lane not written", (("inside & (lane < N)", "inside & (lane < N - 1)"),)),
)  # fmt: skip

# A thread has 16 elements of q and 16 of k, of two heads each. For each of them: the square, rstd * x, weight *, r1,
# two products, their sum, r5; for q the scale and r2; three additions for four squares. Once for each head: 7 additions
# of folds, + eps, and so on. Tables, 4 entries at a time, serve both; so do the weights two heads.
_AUDIT = Audit(
    "stage 5, 768x512x121",
    {"mul.rn.f32": 10 * 16 + 16, "add.rn.f32": 2 * 16 + 24, "cvt.rn.bf16.f32": 4 * 16 + 16},
    per=16,
    per_thread={"add.rn.f32": 4 * (7 + 1), "div.rn.f32": 4, "rsqrt.approx.f32": 4},
    results=16,
    loads={16: 4 + 2 + 4},
    stores={16: 4, 4: 2},
)


EVIDENCE = {
    "qk_rms_norm_grid_rotary": Evidence(
        battery=_battery,
        cases=_CASES,
        mutants=_MUTANTS,
        audits=(_AUDIT,),
        emulated=_emulated,
        witness=statistics_of_aten,
        emulated_witness=_emulated_statistics,
        retiled=retiled("ROWS", (1, 4, 64)),
        steps=("norm", "rsqrt", "quotient"),
    )
}
