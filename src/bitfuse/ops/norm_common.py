"""What the operators with an RMSNorm share: the two norms, their plans and tiers, their mutants.

`native` is one call of `F.rms_norm` (ltx-core, SGLang), `composed` is diffusers' own norm of seven ops: `float`,
`pow`, `mean`, `+ eps`, `rsqrt`, `*`, `to`. They add up a row in different orders (`bitfuse.core.reduction`). Where the
statistic of the single pass is not ATen's (an order that is not known, a CPU), ATen computes it and the rest is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core import evidence
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed
from bitfuse.core.launch import Out, Plan, in_vectors
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.reduction import GIVEN, LAYER_NORM, MEAN, layer_norm_mean_square, mean_lanes, mean_mean_square
from bitfuse.ops import adaln_cases as geometry
from bitfuse.ops import adaln_common as common
from bitfuse.ops.adaln_common import HALVES, modulated, residual_sum, rows_plan

_Norm = Callable[[Tensor, float], Tensor]


# -- the norms, eager --------------------------------------------------------------------------------------------------


def native(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def composed(x: Tensor, eps: float) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(x.dtype)


# -- plans -----------------------------------------------------------------------------------------------------------


def _plan(*args: Any, reference: Callable[..., Any], launched: Any, order: str, rstd: _Norm) -> Plan | str:
    named = common.named(reference, args)
    batch, tokens, width = named["x"].shape
    lanes = mean_lanes(batch * tokens, width) if order == MEAN else 128
    if lanes is None:
        return f"ATen splits rows of {width} between warps, in an order that is not reproduced here"
    if order == LAYER_NORM and "y" not in named and not in_vectors(named["x"]):  # a sum of two is new
        return "x does not start at a multiple of 4 elements, and ATen adds up such rows in another order"
    plan = rows_plan(launched, reference, args, (named["eps"],), {"ORDER": order, "LANES": lanes})
    if order == GIVEN:
        statistic = partial(_statistic, reference=reference, rstd=rstd)
        return replace(plan, before=statistic, extras=(torch.float32,))
    return replace(plan, witnesses=(Out((batch, tokens, 1), (tokens, 1, 1), torch.float32),))


def _statistic(*args: Any, reference: Callable[..., Any], rstd: _Norm) -> tuple[Tensor]:
    """1 / rms of the rows that are normed, by `rstd`: ATen's, or its emulation."""
    named = common.named(reference, args)
    x = named["x"]
    if "y" in named:
        x = residual_sum(x, named["y"], named["gate"], named["gate_table"], named["mask"])
    return (rstd(x, named["eps"]),)


def _rstd_native(x: Tensor, eps: float) -> Tensor:
    return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], None, eps)[1]


def _rstd_composed(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)


def _emulated_rstd_native(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(layer_norm_mean_square(x) + eps)


def _emulated_rstd_composed(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(mean_mean_square(x) + eps)


def _emulated(*args: Any, reference: Callable[..., Any], rstd: _Norm) -> Any:
    """The reference's own steps, with the statistic in CUDA's order."""
    named = common.named(reference, args)
    x = named["x"]
    sums: tuple[Tensor, ...] = ()
    if "y" in named:
        x = residual_sum(x, named["y"], named["gate"], named["gate_table"], named["mask"])
        sums = (x,)
    n = (x.float() * rstd(x, named["eps"])).to(x.dtype)
    results = [modulated(n, *(named[k] for k in ("scale", "shift", "scale_table", "shift_table")))]
    if "scale2" in named:
        results.append(modulated(n, *(named[k] for k in ("scale2", "shift2", "scale2_table", "shift2_table"))))
    return (*sums, *results) if sums else results[0]


# -- when it doesn't fit, and what a wrong kernel looks like -----------------------------------------------------------


def _why_not(*args: Any, reference: Callable[..., Any]) -> Iterator[str]:
    named = common.named(reference, args)
    problem = None
    if (named["scale"] is None) != (named["shift"] is None):
        problem = "of scale and shift one is None; accepted: both or neither"
    yield from common.why_not(reference, named, HALVES, problem)


def fold_mutants(native: bool) -> tuple[Mutant, ...]:
    return evidence.fold_mutants(LAYER_NORM if native else MEAN)


def mutants(native: bool, residual: bool) -> tuple[Mutant, ...]:
    normed = "n = round_to(x * rstd, dtype)"
    return (
        *fold_mutants(native),
        Mutant("the norm not rounded", ((normed, "n = x * rstd"),)),
        Mutant("subnormals flushed", ((normed, normed.replace("x", flushed("x"))),), harmless_for=(torch.float16,)),
        geometry.last_lane(),
        *geometry.step_mutants(),
        *(geometry.residual_mutants(in_norm=True) if residual else ()),
    )


# -- operators ---------------------------------------------------------------------------------------------------------

_RSTD = {True: _rstd_native, False: _rstd_composed}
_EMULATED_RSTD = {True: _emulated_rstd_native, False: _emulated_rstd_composed}
_SOURCE = {True: "ltx-core, SGLang: F.rms_norm", False: "diffusers 0.37-0.42.1: normalization.RMSNorm"}


def _audit(native: bool, residual: bool, modulations: int) -> Audit:
    """Rows of 4096 on 128 threads, so 32 elements each.

    For each: its square, the addition of that, x * rstd rounded; in a modulation two tables added, 1 + scale, + shift,
    and one product; in a residual the gate's table, the product, the sum. Of the fp32 additions the first, to zero, is
    gone. Per thread, LAYER_NORM: 5 + 2 folds, + eps. MEAN: 3 between the sums of a lane, 5 folds, + eps, and 1/N.
    """
    added, multiplied = 4 * modulations + 2 * residual, modulations + residual
    once = {"add.rn.f32": 5 + 2 + 1 - 1, "div.rn.f32": 1, "rsqrt.approx.f32": 1}
    if not native:
        counts = {"cvt.rn.f32.s32": 1, "cvt.rn.f32.s64": 1, "mul.rn.f32": 1}
        once |= {"add.rn.f32": 3 + 5 + 1 - 1, **counts}
    return Audit(
        "video, 768x512x121",
        {
            "add.rn.f32": 1 + added,
            "mul.rn.f32": 2 + multiplied,
            "cvt.rn.bf16.f32": 1 + added + multiplied,
        },
        per_thread=once,
        results=32,
        # every operand 8 elements at a time; the row once more for the statistic, in vectors of 4 or one by one
        loads={16: 4 * (1 + 4 * modulations + 3 * residual), **({8: 8} if native else {2: 32})},
        stores={16: 4 * (modulations + residual), 4: 1},
    )


def operator(
    reference: Callable[..., Any], launched: Any, of: Callable[[geometry.Inputs], tuple[Any, ...]]
) -> Operator:
    native = reference.__name__.endswith("_native")
    plan = partial(_plan, reference=reference, launched=launched, rstd=_RSTD[native])
    names = tuple(common.named(reference, ()))
    return Operator(
        reference,
        _SOURCE[native],
        why_not=partial(_why_not, reference=reference),
        tiers=(
            Tier("single pass", partial(plan, order=LAYER_NORM if native else MEAN)),
            Tier("ATen's statistic", partial(plan, order=GIVEN)),
        ),
        evidence=Evidence(
            battery=partial(geometry.families, names=names, few=not native),
            cases=geometry.cases(of, HALVES),
            mutants=mutants(native, "y" in names),
            audits=(_audit(native, "y" in names, 2 if "scale2" in names else 1),),
            emulated=partial(_emulated, reference=reference, rstd=_EMULATED_RSTD[native]),
            witness=partial(_statistic, reference=reference, rstd=_RSTD[native]),
            emulated_witness=partial(_statistic, reference=reference, rstd=_EMULATED_RSTD[native]),
            retiled=common.retiled,
        ),
    )
