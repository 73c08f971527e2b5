"""What the operators of `qk_norm.py` are proved by: batteries, geometries, wrong kernels, instruction counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.emulated import layer_norm_mean_square
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed, fold_mutants
from bitfuse.core.launch import Plan, named
from bitfuse.core.reduction import LAYER_NORM
from bitfuse.core.values import ROW_FAMILIES, battery_shape, lookalike
from bitfuse.ops.qk_norm import CHAINS, statistics_of_aten
from bitfuse.ops.rope import Chain
from bitfuse.ops.rope_evidence import SIGN, RotaryCase, mutants_of_form

_Pair = tuple[Tensor, Tensor]

# -- what a wrong kernel trips over ----------------------------------------------------------------------------------


def _battery(*args: Any, reference: Callable[..., _Pair]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    given = named(reference, args)
    device, batch = given["q"].device, given["q"].shape[0]
    generator = torch.Generator(device).manual_seed(23)
    shapes = {side: battery_shape(*given[side].shape[:2]) for side in "qk"}
    for family, draw in ROW_FAMILIES.items():
        found: list[Any] = []
        for place, (name, t) in enumerate(given.items()):
            if not isinstance(t, Tensor):
                found.append(t)
                continue
            samples, tokens = shapes[name[0]]
            strided = family != "special rows" and name.endswith(("_cos", "_sin"))  # in the last family they are dense
            if name in ("q", "k"):
                drawn = draw("x", [samples, tokens, t.shape[2]], t.dtype, generator)
            elif t.ndim == 1:
                drawn = draw("value", list(t.shape), t.dtype, generator)
            else:
                # tables that are one sample's of one, or one token's of one, are each sample's and each token's own
                shape, one = list(t.shape), given[name[0]].shape[1] == 1
                if t.ndim > 2:
                    shape[0] = samples if t.shape[0] == batch else 1
                shape[-2] = tokens if t.shape[-2] > 1 or one else 1
                drawn = draw("value", shape, t.dtype, generator)
                if family in ("live", "absorption", "special rows"):
                    angle = 1e3 * torch.randn(shape, generator=generator, device=device)
                    drawn = angle.cos() if name.endswith("cos") else angle.sin()
            found.append(lookalike(t, drawn.to(t.dtype), place if strided else 0))
        yield family, tuple(found)


def _emulated_statistics(*args: Any, reference: Callable[..., _Pair]) -> _Pair:
    """`statistics_of_aten` in CUDA's order, on any device."""
    given = named(reference, args)
    q, k = (torch.rsqrt(layer_norm_mean_square(given[side]) + given["eps"]) for side in "qk")
    return q, k


def _emulated(*args: Any, reference: Callable[..., _Pair], chain: Chain | None) -> _Pair:
    """The reference's own steps, with the statistics in CUDA's order."""
    given = named(reference, args)
    outs = []
    for side, rstd in zip("qk", _emulated_statistics(*args, reference=reference), strict=True):
        x, weight = given[side], given[f"{side}_weight"]
        n = (weight.float() * (rstd * x.float())).to(x.dtype)
        if chain is not None:
            own = side if given[f"{side}_cos"] is not None else "q"
            n = chain.reference(n, given[f"{own}_cos"], given[f"{own}_sin"])
        outs.append(n)
    return outs[0], outs[1]


# -- geometries ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QKCase:
    """A geometry: queries and keys like two `RotaryCase`s of one width. `real` marks those that LTX-2 hosts run."""

    name: str
    queries: RotaryCase
    key_tokens: int | None = None  # None: as many as queries, which share their tables
    turned: bool = True
    real: bool = False

    def arguments(self, device: torch.device | str, tokens: int | None = None, seed: int = 0) -> tuple[Any, ...]:
        """Live values in the order of the reference's parameters; `tokens` replaces the case's own counts."""
        q, q_cos, q_sin = self.queries.arguments(device, tokens, seed)
        keys = self.queries if self.key_tokens is None else replace(self.queries, tokens=self.key_tokens)
        k, k_cos, k_sin = keys.arguments(device, tokens, seed + 1)
        generator = torch.Generator(device).manual_seed(seed + 2)
        weights = (
            (1 + 0.1 * torch.randn(q.shape[2], generator=generator, device=device)).to(q.dtype) for _ in range(2)
        )
        if not self.turned:
            return (q, k, *weights, 1e-6)
        own = (None, None) if self.key_tokens is None else (k_cos, k_sin)
        return (q, k, *weights, q_cos, q_sin, *own, 1e-6)


def _cases(chain: Chain | None) -> tuple[QKCase, ...]:
    def case(
        name: str, tokens: int, heads: int, head_dim: int, keys: int | None = None, real: bool = False, **kwargs: Any
    ) -> QKCase:
        dtype = kwargs.setdefault("x_dtype", torch.bfloat16)
        kwargs["table_dtype"] = torch.float32 if chain is not None and chain.in_fp32 else dtype
        interleaved = chain is not None and not chain.split
        queries = RotaryCase(name, tokens, heads, head_dim, interleaved=interleaved, **kwargs)
        if chain is None and keys is None:
            keys = tokens
        return QKCase(name, queries, keys, turned=chain is not None, real=real)

    found = (
        case("video self-attention, 768x512x121", 6144, 32, 128, real=True),
        case("the same, batch 2 (guidance)", 6144, 32, 128, batch=2, real=True),
        case("audio to video", 6144, 32, 64, keys=126, real=True),
        case("video to audio", 126, 32, 64, keys=6144, real=True),
        case("audio self-attention, 5 s", 126, 32, 64, real=True),
        case("1536x1024x121", 24576, 32, 128, real=True),
        case("to the text", 6144, 32, 128, keys=1024, real=True),
        case("text connector, 30 heads", 1024, 30, 128, real=True),
        case("small", 21, 4, 64, batch=2, keys=40),
        case("1920 wide", 24, 30, 64),
        case("head size 96", 17, 4, 96),
        case("one token", 1, 32, 128, keys=3),
        case("misaligned", 37, 4, 64, x_form="misaligned"),
        case("fp16", 37, 4, 64, x_dtype=torch.float16),
    )
    return tuple(c for c in found if chain is None or c.queries.x_dtype in chain.dtypes)


# -- wrong kernels, counts, other tiles ------------------------------------------------------------------------------


def _mutants(chain: Chain | None) -> tuple[Mutant, ...]:
    halves = chain is not None and chain.split
    w, x = ("w1", "x1") if halves else ("w", "x")
    normed = f"{w} * (rstd * {x})"
    found = [
        *fold_mutants(LAYER_NORM),
        Mutant("the weight before the statistic", ((normed, f"({w} * {x}) * rstd"),)),
        Mutant("rounded before the weight", ((normed, f"{w} * round_to(rstd * {x}, dtype)"),)),
        Mutant("subnormals flushed", ((normed, f"{w} * (rstd * {flushed(x)})"),), harmless_for=(torch.float16,)),
        Mutant(
            "the keys normed with the queries' weight",
            (("k_ptr, k_weight_ptr, k_rstd_ptr", "k_ptr, q_weight_ptr, k_rstd_ptr"),),
        ),
        Mutant("the last lane not written", (("here = inside & (lane < N", "here = inside & (lane + 1 < N"),)),
    ]
    if chain is not None:
        at = "batch * cos_batch + token * "
        found.append(Mutant("the norm not rounded", ((f"round_to({normed}, dtype)", normed),)))
        found.append(Mutant("every token turned as token 0", ((f"{at}cos_token", f"{at}0"),)))
        found += [mutant for mutant in mutants_of_form(chain) if mutant.name == SIGN]
    return tuple(found)


def _audit(chain: Chain | None) -> Audit:
    """Rows of 4096 on 128 threads, a program for each of q and of k: half of a thread's 32 elements are of q.

    So the counts are those of one element of q and one of k. For each element: the square, rstd * x, weight *, r1, and
    the addition of the square, of which the first is to zero and so gone; per thread 5 + 2 folds and + eps.
    """
    counts = Counter({"add.rn.f32": 2, "mul.rn.f32": 6, "cvt.rn.bf16.f32": 2})
    loads = {16: 8, 8: 8}  # x and weight, 8 elements at a time; x again for the statistic, in vectors of 4
    if chain is not None and chain.fuses == "first":  # a product, and an fma whose result is rounded to bf16
        counts += Counter({"mul.rn.f32": 2, "fma.rn.bf16": 2, "cvt.rn.bf16.f32": 2})
    elif chain is not None and chain.fuses != "none":  # a product, addcmul, the result
        counts += Counter({"mul.rn.f32": 2, "fma.rn.f32": 2, "cvt.rn.bf16.f32": 2 if chain.in_fp32 else 4})
    elif chain is not None:  # two products and their sum
        counts += Counter({"mul.rn.f32": 4, "add.rn.f32": 2, "cvt.rn.bf16.f32": 2 if chain.in_fp32 else 6})
    if chain is not None:  # split tables have half the elements
        loads[16] += (4 if chain.split else 8) * (2 if chain.in_fp32 else 1)
    once = {"add.rn.f32": 5 + 2 + 1 - 1, "div.rn.f32": 1, "rsqrt.approx.f32": 1}
    video = "video self-attention, 768x512x121"
    return Audit(video, dict(counts), per_thread=once, results=16, loads=loads, stores={16: 4, 4: 1})


def _retiled(plan: Plan) -> Iterator[Plan]:
    rows = max(plan.scalars[:2])
    for per_program in (1, 2, 4):
        yield replace(plan, grid=(2 * -(-rows // per_program), 1, 1), constants={**plan.constants, "ROWS": per_program})


EVIDENCE = {
    reference.__name__: Evidence(
        battery=partial(_battery, reference=reference),
        cases=_cases(chain),
        mutants=_mutants(chain),
        audits=(_audit(chain),),
        emulated=partial(_emulated, reference=reference, chain=chain),
        witness=partial(statistics_of_aten, reference=reference),
        emulated_witness=partial(_emulated_statistics, reference=reference),
        retiled=_retiled,
        steps=("norm", "rsqrt", "quotient"),
    )
    for reference, chain in CHAINS.items()
}
