"""`bitfuse verify` is green where all is equal, and can turn red."""

from __future__ import annotations

import io
import json
import re
import types
from dataclasses import replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

import bitfuse
from bitfuse import cli
from bitfuse.core.operator import Tier
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.rope import SPLIT_FP32
from bitfuse.tools.prove import mutation, sweeps, verify

NAME = SPLIT_FP32.name


@pytest.fixture(autouse=True)
def _few_cases(fresh_routes, monkeypatch):
    """The first case, which the mutants run on, and two odd ones: what is shown here does not need them all."""
    odd = [case for case in SPLIT_FP32.cases if case.name in ("one token", "misaligned")]
    monkeypatch.setattr(SPLIT_FP32, "cases", (SPLIT_FP32.cases[0], *odd))
    # of the generated mutants, which tests/test_mutation.py judges, a few of each operator
    few = {o: mutation.mutants(o)[:3] for o in (SPLIT_FP32, HEAD_GATE)}
    monkeypatch.setattr(mutation, "chosen", lambda operators, further=(): {o: list(few[o]) for o in operators})


def _run():
    return verify.run(Console(quiet=True), [NAME])


def test_all_equal_and_all_wrong_kernels_caught():
    result = _run()
    assert [check.outcome for check in result.checks] == ["equal"] * 3
    assert all(check.elements for check in result.checks)
    assert len(result.controls) >= 6
    assert all(control.caught for control in result.controls)
    assert result.exit_code == 0


@pytest.mark.parametrize("mutant", ["the sine's sign swapped", "-s as 0 - s"])
def test_a_wrong_kernel_is_reported_where_it_differs(mutant, monkeypatch):
    wrong = next(m for m in SPLIT_FP32.mutants if m.name == mutant)
    stock = types.SimpleNamespace(tiers=SPLIT_FP32.tiers)
    monkeypatch.setattr(SPLIT_FP32, "tiers", (Tier("wrong", lambda *args: wrong.plan(stock, *args)),))
    monkeypatch.setattr(SPLIT_FP32, "mutants", ())
    result = _run()
    assert [check.outcome for check in result.checks] == ["differs"] * 3
    assert all("differs at [" in check.reason for check in result.checks)
    assert result.exit_code == 1


def test_a_kernel_that_gets_the_strides_wrong_differs_too(monkeypatch):
    """Not only bits: the reason of such a mismatch speaks of no element."""
    stock = SPLIT_FP32.tiers[0]

    def wider(*args):
        plan = stock.plan(*args)
        (out,) = plan.outputs
        return replace(plan, outputs=(out._replace(strides=tuple(s * 16 for s in out.strides)),))

    monkeypatch.setattr(SPLIT_FP32, "tiers", (Tier("wider", wider),))
    monkeypatch.setattr(SPLIT_FP32, "mutants", ())
    result = _run()
    assert {check.outcome for check in result.checks} == {"differs"}
    assert all("strides" in check.reason for check in result.checks)
    assert result.exit_code == 1


def test_a_battery_that_lets_a_wrong_kernel_pass_is_reported(monkeypatch):
    battery = SPLIT_FP32.battery
    monkeypatch.setattr(SPLIT_FP32, "battery", lambda *like: (f for f in battery(*like) if f[0] == "live"))
    result = _run()
    assert {check.outcome for check in result.checks} == {"equal"}
    assert "subnormals flushed" in {control.mutant for control in result.controls if not control.caught}
    assert result.exit_code == 1


def test_nothing_fused_is_no_success():
    bitfuse.disable()
    try:
        result = _run()
    finally:
        bitfuse.enable()
    assert {check.outcome for check in result.checks} == {"declined"}
    assert {check.reason for check in result.checks} == {"bitfuse is off (BITFUSE=0 or bitfuse.disable())"}
    assert result.exit_code != 0


def test_the_command_writes_json_and_refuses_unknown_operators(tmp_path):
    file = tmp_path / "deep" / "verify.json"
    done = CliRunner().invoke(cli.app, ["verify", "--op", NAME, "--json", str(file)])
    assert done.exit_code == 0, done.output
    document = json.loads(file.read_text())
    assert document["exit_code"] == 0
    assert document["machine"]["torch"]
    assert {check["outcome"] for check in document["checks"]} == {"equal"}
    done = CliRunner().invoke(cli.app, ["verify", "--op", "rope"])
    assert done.exit_code == 2
    assert NAME in done.output


def test_single_cases_can_be_asked_for():
    result = verify.run(Console(quiet=True), [NAME, "head_gate"], cases=["misaligned"])
    assert [(check.operator, check.case) for check in result.checks] == [(NAME, "misaligned")], "head_gate has none"
    assert {control.operator for control in result.controls} == {NAME}
    assert result.exit_code == 0


@pytest.mark.parametrize("arguments", [["--case", "of nobody"], ["--op", NAME, "--case", "of nobody"]])
def test_an_unknown_case_gets_a_line_that_names_the_cases(arguments):
    done = CliRunner().invoke(cli.app, ["verify", *arguments])
    assert done.exit_code == 2
    assert "--case of nobody is not a case of these operators; accepted: " in done.output
    assert "misaligned" in done.output


def test_deep_and_case_exclude_each_other():
    done = CliRunner().invoke(cli.app, ["verify", "--deep", "--case", "misaligned"])
    assert done.exit_code == 2
    assert "--deep sweeps whole operators, so it takes no --case" in done.output


def test_batteries_are_counted_by_operator_and_tier():
    result = _run()
    (found,) = result.batteries
    assert (found.operator, found.tier) == (NAME, "one kernel")
    assert found.kernels == found.equal == 3, "two cases and one token, whose dimensions lie in another order"
    assert found.families >= 2 * found.kernels
    assert found.elements


def test_the_tables_are_readable_at_80_columns():
    """No line is longer, no operator's name is cut or broken, and each figure stands beside its name."""
    name = max(bitfuse.OPERATORS, key=len)
    check = verify.Check(name, "video", (1, 2), "bfloat16", "equal", "single pass", "", 9, 0.1)
    controls = [verify.Control(name, f"mutant {n}", True, "differs") for n in range(103)]
    swept = [
        sweeps.Sweep("pairs", "1 + (scale_table + scale)", name, (), of=2**32, done=2**32),
        sweeps.Sweep("shapes", "random shapes, strides and offsets", name, (), of=20_000, done=160),
    ]
    tier = verify.TierCheck(name, "single pass", "video", "reference", "equal", "", 1, 9, 0.1)
    declined = replace(check, case="odd", outcome="declined", tier=None, reason="a reason")
    result = verify.Result("cuda", None, None, True, [check, declined], controls, [], swept, tiers=[tier] * 12)
    out = io.StringIO()
    verify._print(Console(file=out, width=80), result)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out.getvalue()
    assert len([line for line in lines if re.search(rf"{name}\W+1 of 2\W+12 of 12\W+103 of 103\W*$", line)]) == 1
    assert len([line for line in lines if re.search(rf"{name}\W+(all of them|of 20,000)\W*$", line)]) == 2
    assert f"declined {name}, odd [1, 2]: a reason" in lines
