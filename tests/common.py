"""What tests of every operator share: its small cases, and its arguments, of which some are no tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfuse import OPERATORS, Operator
from bitfuse.core import proof
from bitfuse.ops.rope_evidence import RotaryCase


def _kind_of(operator: Operator) -> tuple[Any, ...]:
    """What tells apart the operators of a file: the function that plans a launch (those of `rope.py` plan two kernels),
    how many tiers there are, and whether a residual is added."""
    plan = operator.tiers[0].plan
    return getattr(plan, "func", plan), len(operator.tiers), "residual" in operator.evidence.steps


# What all operators share (routes, registration) is tested on one of each kind: the first.
ONE_OF_EACH_FILE = list({_kind_of(o): o for o in reversed(OPERATORS.values())}.values())[::-1]

ROTARY = [o for o in OPERATORS.values() if isinstance(o.cases[0], RotaryCase)]


def small_cases(operator: Operator, dtype: torch.dtype | None = None) -> list[Any]:
    """The cases that no host runs, which are small; with a dtype, those whose first argument has it."""
    odd = [case for case in operator.cases if not case.real]
    return [c for c in odd if dtype in (None, c.arguments("cpu", tokens=1)[0].dtype)]


def small(operator: Operator, device: torch.device | str, tokens: int | None = 5, name: str = "head size 6") -> tuple:
    """The arguments of the named case, or of the first small one where the operator has none of that name."""
    named = {case.name: case for case in operator.cases}
    return (named.get(name) or small_cases(operator)[0]).arguments(device, tokens=tokens)


def on_tensors(change: Callable[[Tensor], Any], args: tuple) -> tuple:
    """The arguments, each tensor among them changed."""
    return tuple(change(a) if isinstance(a, Tensor) else a for a in args)


def tensors_of(args: tuple) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


@contextlib.contextmanager
def references_launched() -> Iterator[None]:
    """Inside, operators decide calls as always, but count every kernel as proved and run their reference in its place.

    So what stands around them is tested without the time that Triton's interpreter takes: a call counts as fused, and
    its bits are right. What was decided and proved before is put back at the end, and nothing from inside stays.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "run_battery", lambda *args: proof.Verdict(True, "equal"))
        patch.setattr(proof, "compare_live", lambda *args: None)
        patch.setattr(proof, "_verdicts", {})
        patch.setattr(Operator, "_runner", lambda operator, plan, args: operator.reference)
        for operator in OPERATORS.values():
            patch.setattr(operator, "_routes", {})
            patch.setattr(operator, "_launches", {})
        yield
