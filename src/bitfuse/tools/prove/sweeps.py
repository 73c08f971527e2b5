"""The long sweeps of `bitfuse verify --deep`: what can be tried exhaustively, is.

    pairs        every two-operand step on all 2^32 pairs of bf16 values. A step is swept by running a whole operator,
                 kernel against PyTorch chain, on inputs laid out so that one operand changes from token to token, the
                 other from column to column, and what comes after the step hands its result on unchanged
    values       all 65,536 bf16 values in every tensor argument of every operator
    arguments    all 2^32 fp32 values through each primitive of one operand (`numerics`)
    shapes       random shapes, strides, offsets and dtypes from the operators' own cases: fused and equal, or declined
                 with a sentence

Every output is poisoned before its kernel runs and compared in every bit, statistics included. In Triton's interpreter
the same code runs on a small seeded sample: a `Sweep` says how many of how many.
"""

from __future__ import annotations

import functools
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bitfuse.core import proof, values
from bitfuse.core.bits import compare
from bitfuse.core.inputs import poisoned
from bitfuse.core.kernel import kernel
from bitfuse.core.launch import named
from bitfuse.core.numerics import divide, exponential, reciprocal_root, round_pairs_to, round_to, silu, square_root
from bitfuse.core.operator import OPERATORS, Operator
from bitfuse.ops.adaln_evidence import AdalnCase
from bitfuse.ops.grid_rotary_evidence import GridCase
from bitfuse.ops.head_gate_evidence import HeadGateCase
from bitfuse.ops.perturbed_attention_evidence import PerturbedCase
from bitfuse.ops.pixel_norm_evidence import PixelCase
from bitfuse.ops.qk_norm_evidence import QKCase
from bitfuse.ops.rope_evidence import RotaryCase
from bitfuse.ops.swiglu_evidence import SwigluCase

if TYPE_CHECKING:
    import triton.language as tl

SEED = 24
SHAPES = 20_000  # over all operators together
_BF16 = torch.bfloat16
_VALUES, _ARGUMENTS = 1 << 16, 1 << 32


@dataclass(frozen=True)
class Extent:
    """How far the sweeps go, and in what pieces.

    values       bf16 values an operand takes; below 65,536 they are a seeded sample with every special value in it
    arguments    fp32 values a primitive takes, likewise
    tokens, columns    of one call of a pair's sweep
    rows         of one call of a value's sweep: of arguments that are filled, of rows with one value each, of masks
    forms        geometries with their layouts, for each operator, that random cases have
    shapes       random cases over all operators together
    widest, most       columns and tokens of a random case, at most
    """

    values: int
    arguments: int
    tokens: int
    columns: int
    rows: tuple[int, int, int]
    forms: int
    shapes: int
    widest: int
    most: int


# 2^26 elements in a call: long enough that launches don't count, and 1.5 GB of memory with the eager chain's own
ALL = Extent(_VALUES, _ARGUMENTS, 1 << 14, 1 << 12, (256, 1 << 14, 1 << 12), 16, SHAPES, 8192, 300)
SAMPLE = Extent(128, 1 << 14, 32, 128, (16, 128, 128), 4, 160, 512, 20)


@dataclass
class Sweep:
    """What one sweep found. `outcome` is equal, differs or declined; `reason` says where or why.

    kind        pairs, values, arguments or shapes
    operator    the operator that ran; None for a primitive, which runs in a kernel of its own
    also        operators whose kernels hold the same step, compiled from the same lines
    of, done    how many pairs, values, arguments or cases there are, and how many of them were tried
    tier        the way that was taken
    elements    of outputs that were compared
    kernels     compiled kernels that random cases met
    declined    why random cases were declined, with counts; numbers in a reason are those of the first such case
    """

    kind: str
    name: str
    operator: str | None
    also: tuple[str, ...]
    of: int
    done: int = 0
    outcome: str = "equal"
    reason: str = ""
    tier: str | None = None
    elements: int = 0
    seconds: float = 0.0
    seed: int = SEED
    kernels: int | None = None
    declined: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Job:
    """A sweep that is yet to run, in about as many calls."""

    sweep: Sweep
    calls: int
    run: Callable[[Sweep], Iterator[None]]

    def go(self) -> Iterator[None]:
        """Run it and fill in the sweep; yields after every call."""
        start = time.perf_counter()
        yield from self.run(self.sweep)
        self.sweep.seconds = time.perf_counter() - start


def jobs(operators: Sequence[Operator], device: torch.device, extent: Extent | None = None) -> Iterator[Job]:
    """The sweeps over these operators, on this device: all of each on CUDA, a sample of each on a CPU."""
    extent = extent or (ALL if device.type == "cuda" else SAMPLE)
    names = {o.name for o in operators}
    for primitive in PRIMITIVES:
        if names & set(primitive.used_by()):
            yield _argument_job(primitive, device, extent)
    for step in STEPS:
        if step.operator in names:
            yield _pair_job(step, device, extent)
    for operator in operators:
        yield _value_job(operator, device, extent)
    for operator in operators:
        yield _shape_job(operator, device, extent)


# -- one call, compared ------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Of one call: its outcome, why or where, the tier that it took, and how many elements were compared."""

    outcome: str
    reason: str
    tier: str | None
    elements: int


def compared(operator: Operator, what: str, args: tuple[Any, ...]) -> Found:
    """Route a call as a user's would be, then run its kernel into poisoned outputs and compare.

    An error in a kernel that was routed to is a difference too: the PyTorch chain would have raised none.
    """
    route = operator.route(*args)
    if not route.fused:
        return Found("differs" if route.mismatch else "declined", route.reason or "", None, 0)
    index = next(i for i, tier in enumerate(operator.tiers) if tier.name == route.tier)
    specification = operator.specification(index, args[0].device)
    with torch.no_grad():
        verdict = proof.run_battery(specification, operator.tiers[index].plan, [(what, args)])
    if verdict.equal:
        return Found("equal", "", route.tier, verdict.elements)
    reason = verdict.mismatch.sentence if verdict.mismatch else verdict.sentence
    return Found("differs" if verdict.final else "declined", reason, route.tier, 0)


def _patterns(dtype: torch.dtype, n: int, device: torch.device, seed: int) -> Tensor:
    """[n] values of a dtype of 16 or 32 bits: of 16 bits all, if n says so; else the special ones and seeded others."""
    if dtype.itemsize == 2 and n >= _VALUES:
        return values.every_16_bit_pattern(dtype, device)
    special = values.specials(dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    if dtype.itemsize == 2:  # no value twice
        every = values.every_16_bit_pattern(dtype, device)
        bits = special.view(torch.int16)
        others = every[~torch.isin(every.view(torch.int16), bits)]
        drawn = others[torch.randperm(others.numel(), generator=generator, device=device)]
    else:
        (drawn,) = values.uniform_bits([dtype], n, generator)
    return torch.cat([special, drawn])[:n]


# -- pairs: the two-operand steps --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One rounding of two operands, and the call in which it can be seen.

    arguments    (a [T], b [W]) -> the operator's arguments, in which every a meets every b
    table        dtype of b; of fp32 a sample is taken, as 2^48 pairs are too many
    per_pair     columns of the widest argument for each b
    """

    name: str
    operator: str
    arguments: Callable[[Tensor, Tensor], tuple[Any, ...]]
    also: tuple[str, ...] = ()
    table: torch.dtype = _BF16
    per_pair: int = 1


def _by_token(a: Tensor, b: Tensor) -> Tensor:
    return a[None, :, None].expand(1, a.numel(), b.numel()).contiguous()


def _by_column(a: Tensor, b: Tensor) -> Tensor:
    return b[None, None, :].expand(1, a.numel(), b.numel()).contiguous()


def _every(value: float, a: Tensor, b: Tensor) -> Tensor:
    return torch.full((1, a.numel(), b.numel()), value, dtype=a.dtype, device=a.device)


def _row(value: float, b: Tensor) -> Tensor:
    """[1, 1, W]: one value for all tokens and columns."""
    return torch.full((1, 1, b.numel()), value, dtype=b.dtype, device=b.device)


# In `modulate` and `gated_residual`. Adding -0 and multiplying by 1 change no bit, so the other operands are those.


def _modulated_product(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _by_token(a, b), b[None, None], _row(-0.0, b), None, None


def _shifted(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _by_token(a, b), _row(0.0, b), b[None, None], None, None


def _shift_of_table(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _every(-0.0, a, b), _row(0.0, b), _by_token(a, b), None, b


def _scale_of_table(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _every(1.0, a, b), _by_token(a, b), _row(-0.0, b), b, None


def _gate_of_table(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _every(-0.0, a, b), _every(1.0, a, b), _by_token(a, b), b, None


def _gated(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _every(-0.0, a, b), _by_token(a, b), b[None, None], None, None


def _masked(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    """Samples in place of tokens: a mask has one value for each."""
    x, y = (v.transpose(0, 1).contiguous() for v in (_every(-0.0, a, b), _by_column(a, b)))
    return x, y, _row(1.0, b), None, a[:, None, None]


def _added(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _by_token(a, b), _by_column(a, b), _row(1.0, b), None, None


def _gated_head(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    """Heads of 128; all logits of a token are its own."""
    return _by_column(a, b), a[None, :, None].expand(1, a.numel(), b.numel() // 128).contiguous()


def _weighted(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    """Rows of one value: what is weighted is that value over its own root mean square."""
    x = _by_token(a, b)
    return x, x, b, b, 1e-6


# In the operators on volumes: a pixel for each a, a channel for each b. What is not swept is -0 or 1, or is not there.


def _pixels(a: Tensor, b: Tensor) -> Tensor:
    """[1, W, 1, T, 1], in channels_last_3d."""
    return a[:, None].expand(-1, b.numel()).contiguous()[None, None, :, None].movedim(-1, 1)


def _channels(a: Tensor, b: Tensor) -> Tensor:
    return b.expand(a.numel(), -1).contiguous()[None, None, :, None].movedim(-1, 1)


_UNPADDED = (0, 0, 0)


def _biased(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _pixels(a, b), torch.full_like(_pixels(a, b), -0.0), b, None, None, *_UNPADDED


def _with_noise(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    negative_zeros, noise = torch.full_like(_pixels(a, b), -0.0), a[None, :, None].contiguous()
    return negative_zeros, negative_zeros, None, noise, b[:, None, None].contiguous(), *_UNPADDED


def _noise_added(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    y, ones = _pixels(a, b), torch.ones(1, a.numel(), 1, dtype=a.dtype, device=a.device)
    return y, torch.full_like(y, -0.0), None, ones, b[:, None, None].contiguous(), *_UNPADDED


def _volumes_added(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _pixels(a, b), _channels(a, b), None, None, None, *_UNPADDED


def _activated(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    """Samples in place of pixels: a scale and a shift belong to them. Ones are their own norm."""
    both = a.numel(), b.numel(), 1, 1, 1
    ones = torch.ones(a.numel(), 1, 1, 1, b.numel(), dtype=a.dtype, device=a.device).movedim(-1, 1)
    scale = a[:, None].expand(both[:2]).contiguous().view(both)
    shift = b.expand(both[:2]).contiguous().view(both)
    return ones, None, None, None, scale, shift, *_UNPADDED, 0.0


def _upsampled_bias(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _pixels(a, b), None, b, 1, 1, 1


def _upsampled_sum(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _pixels(a, b), _channels(a, b), None, 1, 1, 1


def _downsampled_bias(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _pixels(a, b), torch.zeros_like(_pixels(a, b)), b, 1, 1, 1


def _downsampled_sum(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _pixels(a, b), _channels(a, b), None, 1, 1, 1


def _patches(a: Tensor, b: Tensor) -> tuple[Any, ...]:
    return _pixels(a, b), b, 1, 1


def _turned(a: Tensor, b: Tensor, *, step: str, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(x, cos, sin) in which the turned pairs' results are one step's: x1*c - s*x2 in the first half of the heads (or
    channels), x2*c + s*x1 in the second."""
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    first, second, c, s = {
        "x * cos": ((a, one), (-one, a), b, torch.zeros_like(b)),  # then -0 is added
        "x + sin": ((a, one), (one, a), torch.ones_like(b), b),  # a * 1, then 1 * s
        "x * sin": ((-zero, a), (a, -zero), torch.ones_like(b), b),  # added to -0
    }[step]
    x1, x2 = (torch.stack(pair, dim=-1)[None, :, :, None] for pair in zip(first, second, strict=True))  # [1, T, 2, 1]
    x1, x2 = (v.expand(-1, -1, -1, b.numel()).flatten(2) for v in (x1, x2))  # [1, T, 2W]
    c, s = (v.repeat(2)[None, None].expand(1, a.numel(), -1) for v in (c, s))
    if interleaved:
        x = torch.stack([x1, x2], dim=-1).flatten(2)
        c, s = (v.repeat_interleave(2, dim=-1) for v in (c, s))
        return x, c, s
    x = torch.stack([v.unflatten(2, (-1, 64)) for v in (x1, x2)], dim=-2).flatten(2)
    c, s = (v.contiguous().unflatten(2, (-1, 64)).swapaxes(1, 2) for v in (c, s))
    return x, c, s


def _rotary_steps() -> Iterator[Step]:
    of_all = (("per_op", _BF16), ("fp32", _BF16), ("fp32", torch.float32))
    of_kitchen = {
        "split": (("three_ops", _BF16), ("second_rounded", _BF16)),
        "interleaved": (("addcmul", _BF16),),
    }
    for layout in ("split", "interleaved"):
        for chain, table in (*of_all, *of_kitchen[layout]):
            operator = f"{layout}_rotary_{chain}"
            for step in ("x * cos", "x + sin", "x * sin"):
                tables = f", tables in {str(table).removeprefix('torch.')}" if chain == "fp32" else ""
                arguments = functools.partial(_turned, step=step, interleaved=layout == "interleaved")
                yield Step(step + tables, operator, arguments, (f"qk_rms_norm_{operator}",), table, per_pair=4)


def _with(step: str, but: str = "") -> tuple[str, ...]:
    """The operators whose kernels hold this step, by name."""
    return tuple(o.name for o in OPERATORS.values() if step in o.evidence.steps and o.name != but)


_ADDCMUL = _with("addcmul", but="gated_residual_addcmul")
_MODULATING, _RESIDUAL = _with("modulation", but="modulate"), _with("residual", but="gated_residual")
_QK = tuple(o.name for o in OPERATORS.values() if isinstance(o.cases[0], QKCase))

STEPS = (
    Step("x * (1 + scale)", "modulate", _modulated_product, _MODULATING),
    Step("product + shift", "modulate", _shifted, _MODULATING),
    Step("shift_table + shift", "modulate", _shift_of_table, _MODULATING),
    Step("1 + (scale_table + scale)", "modulate", _scale_of_table, _MODULATING),
    Step("gate_table + gate", "gated_residual", _gate_of_table, _RESIDUAL),
    Step("y * gate", "gated_residual", _gated, _RESIDUAL),
    Step("y * mask", "gated_residual", _masked, _RESIDUAL),
    Step("x + y", "gated_residual", _added, _RESIDUAL),
    Step("gate_table + gate", "gated_residual_addcmul", lambda a, b: _gate_of_table(a, b)[:4], _ADDCMUL),
    Step("-0 + y * gate", "gated_residual_addcmul", lambda a, b: _gated(a, b)[:4], _ADDCMUL),
    Step("x + y * 1", "gated_residual_addcmul", lambda a, b: _added(a, b)[:4], _ADDCMUL),
    Step("out * 2 sigmoid(logit)", "head_gate", _gated_head),
    Step("silu(gate) * up", "swiglu", lambda a, b: (_by_token(a, b), _by_column(a, b))),
    Step("weight * row of one value, normed", "qk_rms_norm", _weighted, _QK[1:]),
    *_rotary_steps(),
    Step("y + bias", "residual_pad", _biased, _with("summands", but="residual_pad")),
    Step("noise * its scale", "residual_pad", _with_noise, _with("summands", but="residual_pad")),
    Step("y + noise", "residual_pad", _noise_added, _with("summands", but="residual_pad")),
    Step("y + residual", "residual_pad", _volumes_added, _with("summands", but="residual_pad")),
    Step("SiLU(1 * (1 + scale) + shift)", "pixel_norm_silu_pad", _activated, ("residual_pixel_norm_silu_pad",)),
    Step("y + bias, upsampled", "upsample", _upsampled_bias),
    Step("y + residual, upsampled", "upsample", _upsampled_sum),
    Step("y + bias, in patches", "unpatchify", _patches),
    Step("y + bias, downsampled", "downsample", _downsampled_bias),
    Step("y + residual, downsampled", "downsample", _downsampled_sum),
)
"""Every two-operand step once, in the operator that shows its result bare. Products with a row's own statistic are not
among them: it is no bf16 value, and no two of them can be chosen apart. `values` and `arguments` sweep those."""


def _pair_job(step: Step, device: torch.device, extent: Extent) -> Job:
    exhaustive = extent.values == _VALUES
    columns = extent.columns // step.per_pair if exhaustive else extent.columns
    each, others = (_VALUES, _VALUES) if exhaustive else (extent.tokens, columns)  # of a sample, one call
    sweep = Sweep("pairs", step.name, step.operator, step.also, of=_VALUES << 8 * step.table.itemsize)

    def run(sweep: Sweep) -> Iterator[None]:
        a = _patterns(_BF16, each, device, SEED)
        b = _patterns(step.table, others, device, SEED + 1)
        for some_b in b.split(columns):
            for some_a in a.split(extent.tokens):
                found = compared(OPERATORS[step.operator], step.name, step.arguments(some_a, some_b))
                sweep.outcome, sweep.reason, sweep.tier, n = found
                yield
                if found.outcome != "equal":
                    return
                sweep.done += some_a.numel() * some_b.numel()
                sweep.elements += n

    return Job(sweep, (each // extent.tokens) * (others // columns), run)


# -- values: every argument of every operator ----------------------------------------------------------------------

# Of operators that norm rows: a row takes one value at a time, as one NaN or infinity is all that its norm shows.
_ROWS = frozenset(("x", "y", "gate", "q", "k", "residual"))


def _broad(case: Any, tokens: int, batch: int = 1) -> Any:
    """The case in bf16, 256 wide, with every tensor that it may have, each token with its own."""
    if isinstance(case, QKCase):
        return replace(case, queries=_broad(case.queries, tokens, batch), key_tokens=tokens)
    if isinstance(case, RotaryCase):
        plain: dict[str, Any] = {"x_form": "tokens", "table_form": "by token", "table_batch": None}
        plain |= {"x_dtype": _BF16, "table_dtype": _BF16}
        return replace(case, tokens=tokens, batch=batch, heads=2, head_dim=128, **plain)
    if isinstance(case, (HeadGateCase, PerturbedCase)):
        return replace(case, tokens=tokens, batch=batch, heads=2, head_dim=128)
    if isinstance(case, PixelCase):
        sizes: dict[str, Any] = {"channels": 16 if "patch" in named(case.reference, ()) else 256, "front": 0, "edge": 0}
        sizes |= {"sides": (1, 1, tokens), "batch": batch, "up": (1, 1, 1), "repeats": 2, "inside": False}
        return replace(case, modulated="scale" in named(case.reference, ()), noisy=True, **sizes)
    if isinstance(case, SwigluCase):
        return replace(case, tokens=tokens, batch=batch, width=256)
    if isinstance(case, GridCase):
        lines, columns = (2 ** min(most, max(0, tokens.bit_length() - at)) for at, most in ((4, 3), (1, 3)))
        sides: dict[str, Any] = {"frames": max(1, tokens // (lines * columns)), "lines": lines, "columns": columns}
        return replace(
            case,
            **sides,
            batch=batch,
            heads=2,
            head_dim=128,
            pairs=None,
            dtype=_BF16,
            table_dtype=_BF16,
            misaligned=False,
        )
    there = dict.fromkeys(("per_token", "with_tables", "with_gate", "with_mask", "with_modulation"), True)
    return replace(case, tokens=tokens, batch=batch, width=256, ada_rows=9, misaligned=False, dtype=_BF16, **there)


def _value_job(operator: Operator, device: torch.device, extent: Extent) -> Job:
    filled, in_rows, masks = extent.rows
    normed = "norm" in operator.evidence.steps
    parameters = list(named(operator.reference, ()))
    shapes: dict[str, tuple[int, int]] = {}  # tokens and batch of the call for each argument
    calls = 0
    for place, (name, t) in enumerate(zip(parameters, _broad(operator.cases[0], 1).arguments("cpu"), strict=False)):
        if isinstance(t, Tensor):
            one_each = normed and name in _ROWS
            tokens, batch = (in_rows, 1) if one_each else (1, masks) if name == "mask" else (filled, 1)
            taken = tokens if one_each else _form(operator, tokens, batch)[place].numel()
            shapes[name] = tokens, batch
            calls += -(-extent.values // taken)

    def run(sweep: Sweep) -> Iterator[None]:
        every = _patterns(_BF16, extent.values, device, SEED)
        for name, (tokens, batch) in shapes.items():
            args = list(_broad(operator.cases[0], tokens, batch).arguments(device, seed=SEED))
            place = parameters.index(name)
            like, done = args[place], 0
            while done < every.numel():
                args[place], taken = _holding(like, every, done, normed and name in _ROWS)
                found = compared(operator, f"every {name}", tuple(args))
                sweep.outcome, sweep.tier = found.outcome, found.tier
                yield
                if found.outcome != "equal":
                    sweep.reason = f"{name}: {found.reason}"
                    return
                done += taken
                sweep.elements += found.elements
            sweep.done += every.numel()

    return Job(Sweep("values", ", ".join(shapes), operator.name, (), of=_VALUES * len(shapes)), calls, run)


def _form(operator: Operator, tokens: int, batch: int) -> tuple[Any, ...]:
    """The arguments of `_broad` without values."""
    with FakeTensorMode():
        return _broad(operator.cases[0], tokens, batch).arguments("cpu")


def _holding(like: Tensor, every: Tensor, start: int, one_each: bool) -> tuple[Tensor, int]:
    """(`like` with further values in every place, or in one place of each row; how many it took)"""
    if like.ndim == 5:  # a volume, whose rows are its pixels
        held, n = _holding(like.movedim(1, -1).flatten(0, 3), every, start, one_each)
        return held.view(*like.movedim(1, -1).shape).movedim(-1, 1), n
    n = like.numel() // like.shape[-1] if one_each else like.numel()
    chosen = every[(torch.arange(n, device=like.device) + start) % every.numel()]
    if not one_each:
        return torch.empty_like(like).copy_(chosen.view(like.shape)), n
    held = like.clone(memory_format=torch.contiguous_format)
    row = torch.arange(n, device=like.device)
    held.view(n, -1)[row, (row + start) % like.shape[-1]] = chosen
    return held, n


# -- arguments: the primitives of one operand --------------------------------------------------------------------------


@kernel
def _primitive_kernel(x_ptr, out_ptr, n, PRIMITIVE: tl.constexpr, DIVISOR: tl.constexpr, BLOCK: tl.constexpr):
    """One primitive, as the operators' kernels write it, on every element of an fp32 vector."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    if PRIMITIVE == "round":
        y = round_to(x, tl.bfloat16)
    elif PRIMITIVE == "round pairs":
        y = round_pairs_to(x, tl.bfloat16)
    elif PRIMITIVE == "root":
        y = reciprocal_root(x)
    elif PRIMITIVE == "exponential":
        y = 1.0 + exponential(x)
    elif PRIMITIVE == "reciprocal":
        y = divide(1.0, x)
    elif PRIMITIVE == "square root":
        y = square_root(x)
    elif PRIMITIVE == "silu":
        y = round_to(silu(round_to(x, tl.bfloat16)), tl.bfloat16)
    else:
        y = divide(x, DIVISOR * 1.0)
    tl.store(out_ptr + at, y, mask=at < n)


@dataclass(frozen=True)
class Primitive:
    """A primitive of `numerics`, and the ATen op that it must equal.

    needs_gpu    why a CPU can't show it, where that is so
    """

    name: str
    which: str
    reference: Callable[[Tensor], Tensor]
    step: str  # that operators with it have among their `steps`; "": every kernel has it
    divisor: int = 1
    needs_gpu: str = ""

    def used_by(self) -> tuple[str, ...]:
        return _with(self.step) if self.step else tuple(OPERATORS)


def _quotient(divisor: int) -> Primitive:
    def reference(x: Tensor) -> Tensor:  # by a number on the CPU, ATen would multiply with its reciprocal
        return torch.div(x, torch.full((), float(divisor), device=x.device))

    return Primitive(f"x / {divisor}", "quotient", reference, "quotient", divisor)


PRIMITIVES = (
    Primitive("x rounded to bf16", "round", lambda x: x.to(_BF16).float(), ""),
    Primitive("x rounded to bf16, in pairs", "round pairs", lambda x: x.to(_BF16).float(), ""),
    Primitive("rsqrt(x)", "root", torch.rsqrt, "rsqrt"),
    Primitive(
        "1 + e^x",  # alone, e^x is flushed where it is subnormal; beside 1 that is lost, and no kernel uses it alone
        "exponential",
        lambda x: 1.0 + torch.exp(x),
        "sigmoid",
        needs_gpu="in the interpreter e^x is NumPy's, and on a CPU ATen's own: neither is CUDA's expf",
    ),
    Primitive(
        "1 / x",
        "reciprocal",
        lambda x: torch.div(torch.ones((), device=x.device), x),
        "sigmoid",
    ),
    Primitive("1 / x, of a root", "reciprocal", lambda x: torch.div(torch.ones((), device=x.device), x), "root"),
    Primitive(
        "sqrt(x)",
        "square root",
        torch.sqrt,
        "root",
        needs_gpu="a CPU's sqrt of fp32 is off by a unit in one of twelve values, before it is rounded to bf16",
    ),
    Primitive("SiLU of x rounded to bf16", "silu", lambda x: F.silu(x.to(_BF16)).float(), "silu"),
    *map(_quotient, (2048, 3840, 4096)),  # the widths of LTX-2's rows
)


def _argument_job(primitive: Primitive, device: torch.device, extent: Extent) -> Job:
    piece = min(extent.arguments, 1 << 26)
    sweep = Sweep("arguments", primitive.name, None, primitive.used_by(), of=_ARGUMENTS)

    def run(sweep: Sweep) -> Iterator[None]:
        if device.type == "cpu" and primitive.needs_gpu:
            sweep.outcome, sweep.reason = "declined", primitive.needs_gpu
            return
        for lowest in range(-extent.arguments // 2, extent.arguments // 2, piece):
            sampled = extent.arguments < _ARGUMENTS
            x = _patterns(torch.float32, piece, device, SEED) if sampled else _bits_from(lowest, piece, device)
            mismatch = compare(primitive.reference(x), _ran(primitive, x))
            yield
            if mismatch:
                bits = int(x[mismatch.index].view(torch.int32)) & 0xFFFFFFFF
                sweep.outcome, sweep.reason = "differs", f"x is 0x{bits:08x}: {mismatch.sentence}"
                return
            sweep.done += piece
            sweep.elements += piece

    return Job(sweep, extent.arguments // piece, run)


def _bits_from(lowest: int, n: int, device: torch.device) -> Tensor:
    """[n] fp32 values whose bits, as signed integers, count up from `lowest`."""
    return (torch.arange(n, dtype=torch.int32, device=device) + lowest).view(torch.float32)


def _ran(primitive: Primitive, x: Tensor) -> Tensor:
    """The primitive's results in a kernel of its own, poisoned before."""
    out, block = poisoned(torch.empty_like(x)), 1024 if x.is_cuda else 1 << 14
    grid = (-(-x.numel() // block), 1, 1)
    _primitive_kernel[grid](x, out, x.numel(), PRIMITIVE=primitive.which, DIVISOR=primitive.divisor, BLOCK=block)
    return out


# -- shapes: random ones, with strides and offsets -----------------------------------------------------------------

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Form:
    """What a compiled kernel depends on: a case's geometry and layout, and one tensor that is moved in memory.

    Thousands of shapes are tried on few forms, so that few kernels are compiled: the number of tokens, the batch and
    the values change from shape to shape.
    """

    case: Any
    most: int
    place: int = 0
    move: str = ""
    by: int = 0

    def arguments(self, device: torch.device, dice: random.Random) -> tuple[Any, ...]:
        tokens = [round(math.exp(dice.uniform(0, math.log(self.most)))) for _ in range(2)]
        batch = dice.choice((1, 1, 2, 3))
        case = self.case
        if isinstance(case, PixelCase):
            sides = (dice.randint(1, 3), dice.randint(2, 5), min(40, 1 + tokens[0]))
            case = replace(case, sides=sides, batch=batch)
        elif isinstance(case, QKCase):
            keys = None if case.key_tokens is None else tokens[1]
            case = replace(case, queries=replace(case.queries, tokens=tokens[0], batch=batch), key_tokens=keys)
        elif isinstance(case, GridCase):
            frames, lines = dice.randint(1, 3), dice.randint(1, 3)
            columns = -(-tokens[0] // (frames * lines))
            case = replace(case, frames=frames, lines=lines, columns=columns, batch=batch)
        else:
            case = replace(case, tokens=tokens[0], batch=batch)
        args = list(case.arguments(device, seed=dice.randrange(1 << 31)))
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        if self.move:
            place = tensors[self.place % len(tensors)]
            args[place] = _moved(args[place], self.move, self.by)
        return tuple(args)


def forms(operator: Operator, extent: Extent) -> Iterator[Form]:
    """Random forms of the operator's cases. A quarter of them keep to few rows, where ATen adds otherwise."""
    narrow = [case for case in operator.cases if _width(case) <= extent.widest]
    for number in range(extent.forms):
        dice = random.Random(f"{SEED} {operator.name} form {number}")
        most = min(extent.most, dice.choice((15, 40, extent.most, extent.most)))
        move = dice.choice(("", "", "", "", "offset", "padded", "transposed", "expanded"))
        yield Form(_varied(dice.choice(narrow), dice), most, dice.randrange(8), move, dice.randint(1, 15))


def _width(case: Any) -> int:
    if isinstance(case, (AdalnCase, SwigluCase)):
        return case.width
    if isinstance(case, PixelCase):
        return case.arguments("cpu", tokens=1)[0].shape[1]
    of = case.queries if isinstance(case, QKCase) else case
    return of.heads * of.head_dim


def _varied(case: Any, dice: random.Random) -> Any:
    """The case with its layout, its optional tensors and, now and then, its dtypes drawn anew."""

    def dtype(own: torch.dtype) -> torch.dtype:
        return dice.choice(_FLOATS) if dice.random() < 0.15 else own

    if isinstance(case, QKCase):
        keys = case.key_tokens if not case.turned else dice.choice((None, 1))
        queries = _varied(replace(case.queries, table_form="by token"), dice)
        x_form = dice.choice(("tokens", "tokens", "tokens", "misaligned", "tokens last"))  # others are declined
        return replace(case, queries=replace(queries, x_form=x_form), key_tokens=keys)
    if isinstance(case, PixelCase):
        sizes: dict[str, Any] = {"front": dice.randint(0, 2), "back": dice.randint(0, 2), "edge": dice.randint(0, 1)}
        sizes |= {name: dice.random() < 0.6 for name in ("modulated", "noisy", "with_bias", "inside")}
        sizes["modulated"] &= "scale" in named(case.reference, ())
        return replace(case, **sizes)
    if isinstance(case, AdalnCase):
        optional = ("per_token", "with_tables", "with_gate", "with_mask", "with_modulation")
        chosen: dict[str, Any] = {name: dice.random() < 0.6 for name in optional}
        rows = dice.randint(2, 9)
        return replace(case, dtype=dtype(case.dtype), ada_rows=rows, misaligned=dice.random() < 0.2, **chosen)
    if isinstance(case, GridCase):
        dtypes: dict[str, Any] = {"dtype": dtype(case.dtype), "table_dtype": dtype(case.table_dtype)}
        return replace(case, misaligned=dice.random() < 0.2, **dtypes)
    if isinstance(case, RotaryCase) and case.table_batch is None:
        dtypes = {"x_dtype": dtype(case.x_dtype), "table_dtype": dtype(case.table_dtype)}
        x_form = dice.choice(("tokens", "tokens", "columns of a wider tensor", "tokens last", "misaligned"))
        if case.x_form.startswith("heads"):
            x_form = dice.choice(("heads", "heads, contiguous"))
        table_form = case.table_form if case.interleaved else dice.choice(("by token", "contiguous", "slice"))
        return replace(case, x_form=x_form, table_form=table_form, **dtypes)
    return case


def _moved(t: Tensor, how: str, by: int) -> Tensor:
    """The same values elsewhere: off the storage's start, in longer rows, columns first, or one sample for all."""
    if how == "offset":
        return torch.empty(t.numel() + by, dtype=t.dtype, device=t.device)[by:].view(t.shape).copy_(t)
    if how == "padded":
        wide = torch.empty(*t.shape[:-1], t.shape[-1] + by, dtype=t.dtype, device=t.device)
        return wide[..., : t.shape[-1]].copy_(t)
    if how == "transposed" and t.ndim > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "expanded" and t.ndim > 1:
        return t[:1].expand(t.shape)
    return t


def _shape_job(operator: Operator, device: torch.device, extent: Extent) -> Job:
    share, of = (-(-n // len(OPERATORS)) for n in (extent.shapes, SHAPES))

    def run(sweep: Sweep) -> Iterator[None]:
        reasons: dict[str, str] = {}
        counts: Counter[str] = Counter()
        compiled: set[Any] = set()
        drawn = list(forms(operator, extent))
        sweep.outcome, sweep.reason = "declined", "no random case was fused"
        for number in range(share):
            args = drawn[number % len(drawn)].arguments(device, random.Random(f"{SEED} {operator.name} {number}"))
            found = compared(operator, f"random {number}", args)
            yield
            if found.outcome == "differs":
                shapes = [list(a.shape) for a in args if isinstance(a, Tensor)]
                sweep.outcome, sweep.tier = found.outcome, found.tier
                sweep.reason = f"case {number}, shapes {shapes}: {found.reason}"
                break
            sweep.done += 1
            sweep.elements += found.elements
            if found.outcome == "equal":
                sweep.outcome, sweep.reason, sweep.tier = "equal", "", found.tier
                compiled.add(operator.route(*args).signature)
            else:
                kind = re.sub(r"\d+", "N", found.reason)
                reasons.setdefault(kind, found.reason)
                counts[kind] += 1
        sweep.kernels = len(compiled)
        sweep.declined = tuple((reasons[kind], n) for kind, n in counts.most_common())

    return Job(Sweep("shapes", "random shapes, strides and offsets", operator.name, (), of=of), share, run)
