"""Of the tests themselves: what is planted arrives, and a kernel that was not run counts as proved nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitfuse import OPERATORS
from bitfuse.core import proof
from bitfuse.core.bits import compare
from bitfuse.core.operator import Tier
from common import references_launched, small
from planted import Plant, same_bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_element_is_another_by_more_than_its_own_size(dtype):
    """No sum with something of its size hides that."""
    right = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    right[0, :5] = torch.tensor([0.0, -0.0, 1e-7, 300.0, -1 / 3])
    found, other, plant = right.clone(), right.clone(), Plant()
    plant((found, other))
    assert ((found.double() - right.double()).abs() >= 0.99 * (3 * right.double().abs() + 1)).all()
    assert found.isfinite().all()
    assert same_bits(other, right)
    plant(other, start=1003)
    assert same_bits(other.view(-1)[:1003], right.view(-1)[:1003])
    assert (other.view(-1)[1003:] != right.view(-1)[1003:]).all()
    assert plant.places == 2


def test_one_that_does_not_arrive_is_the_tests_own_fault():
    """What happened on another CPU: one unit in one element, lost in the sum that follows."""
    residual, attended = torch.full((8,), 64.0, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
    weak, plant = attended.clone(), Plant()
    with pytest.raises(AssertionError, match="planted its error nowhere"):
        plant.must_show([attended], [attended])
    weak.view(torch.int16)[5] ^= 1
    plant.places += 1
    with pytest.raises(AssertionError, match="does not reach where the test looks"):
        plant.must_show([residual + attended], [residual + weak])
    with pytest.raises(AssertionError, match="looks at nothing"):
        plant.must_show([], [])
    plant(attended)
    plant.must_show([residual + 1], [residual + attended])


def test_what_is_no_view_can_not_be_planted_in():
    with pytest.raises(RuntimeError, match="view"):
        Plant()(torch.zeros(4, 6).t())


def test_it_goes_through_a_matmul_a_gate_and_a_residual_sum():
    """The way from an attention's output to the stream, where the gate is small."""
    torch.manual_seed(0)
    out = nn.Linear(64, 64, dtype=torch.bfloat16)
    right, stream = torch.randn(5, 64).bfloat16(), torch.randn(5, 64).bfloat16()
    found, plant = right.clone(), Plant()
    plant(found)
    with torch.no_grad():
        plant.must_show([stream + out(right) * 0.05], [stream + out(found) * 0.05])


def edits_bits(function: ast.AST) -> bool:
    """Whether a function changes single bits of a tensor: `t.view(torch.int16)[0] ^= 1`."""
    return any(
        isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitXor) and isinstance(node.target, ast.Subscript)
        for node in ast.walk(function)
    )


def replaces_a_sites_call(function: ast.AST) -> bool:
    """Whether a function puts something in place of `Site.call`: what it returns goes on into a model."""
    return any(
        isinstance(node, ast.Call)
        and [getattr(a, "id", getattr(a, "value", None)) for a in node.args[:2]] == ["Site", "call"]
        for node in ast.walk(function)
    )


def test_no_test_flips_single_bits_in_a_models_middle():
    """There `Plant` is to be used, which knows whether its error arrives."""
    weak = [
        f"{file.name}: {node.name}"
        for file in sorted(Path(__file__).parent.glob("test_*.py"))
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and edits_bits(node) and replaces_a_sites_call(node)
    ]
    assert weak == [], "these flip bits of a site's result and look for them elsewhere; tests/planted.py says why not"


def test_where_references_are_launched_calls_count_as_fused_and_nothing_of_it_stays(device, monkeypatch, fresh_routes):
    """Or later tests of the same process would find kernels proved that nobody has run."""
    operator = OPERATORS["split_rotary_per_op"]
    args = small(operator, device)
    wrong = next(m for m in operator.mutants if m.name == "the sine's sign swapped")
    stock = SimpleNamespace(tiers=operator.tiers)
    monkeypatch.setattr(operator, "tiers", (Tier("wrong", lambda *args: wrong.plan(stock, *args)),))
    before = proof.verdicts()
    with references_launched():
        assert operator.route(*args).fused
        assert compare(operator.reference(*args), operator(*args)) is None
        assert len(proof.verdicts()) == 1
    assert proof.verdicts() == before
    assert not operator.route(*args).fused, "the wrong kernel is proved, and refused"
