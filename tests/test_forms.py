"""The forms of what a reference returns, known without running it and without PyTorch's meta functions."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitfuse import OPERATORS
from bitfuse.core.conditions import ShapeError, fitting
from bitfuse.core.forms import on_meta
from common import small_cases


def _form(found):
    """Shapes, strides and dtypes; but for strides of dimensions of size 1, which no address depends on."""
    several = found if isinstance(found, tuple) else (found,)
    return [(tuple(t.shape), [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1], t.dtype) for t in several]


def _laid_out(t: Tensor, dice: random.Random) -> Tensor:
    """The same shape in another layout: dimensions in another order, with gaps, or with odd strides of size 1."""
    order = dice.sample(range(t.ndim), t.ndim)
    t = t.permute(order).contiguous().permute([order.index(dim) for dim in range(t.ndim)])
    kind = dice.choice(["dense", "gaps", "size 1", "contiguous"])
    if kind == "gaps":
        return torch.cat([t, t], -1)[..., : t.shape[-1]]
    if kind == "size 1":
        strides = zip(t.stride(), t.shape, strict=True)
        return t.as_strided(t.shape, [dice.choice([0, 1, 64]) if n == 1 else s for s, n in strides])
    return t.contiguous() if kind == "contiguous" else t


def _outcome(function, *args):
    try:
        return _form(function(*args))
    except (RuntimeError, IndexError) as error:
        return type(error)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=str)
def test_forms_are_those_of_a_run(operator):
    dice, seen = random.Random(operator.name), 0
    for case in small_cases(operator)[:3]:
        for tokens in (1, 3):
            given = case.arguments("cpu", tokens=tokens)
            for _ in range(8):
                args = tuple(_laid_out(a, dice) if isinstance(a, Tensor) else a for a in given)
                with torch.no_grad():
                    assert _outcome(on_meta, operator.reference, *args) == _outcome(operator.reference, *args)
                seen += 1
    assert seen >= 16


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=str)
def test_shapes_that_do_not_fit_fail_as_in_a_run(operator):
    args = small_cases(operator)[0].arguments("cpu", tokens=3)
    failed = 0
    for at in [i for i, a in enumerate(args) if isinstance(a, Tensor)]:
        for change in (lambda t: t[..., :-1], lambda t: t[None], lambda t: t[0], lambda t: torch.cat([t, t])):
            changed = (*args[:at], change(args[at]), *args[at + 1 :])
            with torch.no_grad():
                expected = _outcome(operator.reference, *changed)
            assert _outcome(on_meta, operator.reference, *changed) == expected
            failed += isinstance(expected, type)
    assert failed or operator.name == "gelu_tanh", "which takes any shape"


def test_the_meta_device_answers_for_what_is_not_known_here():
    x = torch.ones(2, 3, 8)
    assert _form(on_meta(torch.cumsum, x, 1)) == _form(x)
    assert _form(on_meta(lambda t: F.rms_norm(t, t.shape[-1:]), x.transpose(0, 1)))[0][0] == (3, 2, 8)
    assert on_meta(lambda t: t.int() + t.bool(), x).dtype == torch.int32
    assert on_meta(lambda t: t + t, x[:0]).shape == (0, 3, 8)


def test_nothing_is_computed_on_values():
    with pytest.raises(ShapeError, match="widths differ; given x \\[2, 3\\], y \\[4\\]"):
        list(fitting(lambda x, y: x * y, {"x": torch.ones(2, 3), "y": torch.ones(4)}, "widths differ"))
    assert on_meta(lambda x: x * 2, torch.ones(3)).is_meta


A_STEP = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import bitfuse
from dataclasses import replace
from bitfuse.tools import seeded
from common import references_launched

cpu = torch.device("cpu")
geometry, _ = seeded.geometry_for(cpu, 2, "2.3", "ltx-core")
geometry = replace(geometry, frames=2, height=2, width=2, audio_frames=3)
model = seeded.build(geometry, cpu, seed=0)
step = seeded.one_step(model, seeded.make_inputs(model, geometry, cpu, seed=0))
stock = step(), "torch._dynamo" in sys.modules
with references_launched(), bitfuse.accelerated(model) as handle:
    accelerated = step(), "torch._dynamo" in sys.modules
report = handle.report()
equal = bitfuse.compare(stock[0], accelerated[0]) is None
print(json.dumps([stock[1], accelerated[1], equal, report.fused == report.seen > 0]))
"""


def test_the_first_step_of_ltx_core_imports_no_dynamo():
    """892 modules and 4 CPU seconds (2026-11-28), which a user's first step would wait for."""
    pytest.importorskip("ltx_core")
    done = subprocess.run(
        [sys.executable, "-c", A_STEP, str(Path(__file__).parent)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [False, False, True, True]
