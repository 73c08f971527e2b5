"""Wrong kernels of every kind are made from the sources, and `verify` finds each: in the tier that it belongs to."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bitfuse import OPERATORS, compare
from bitfuse.core import proof
from bitfuse.core.evidence import Mutant
from bitfuse.core.inputs import guarded
from bitfuse.core.launch import Out, Plan
from bitfuse.core.values import lookalike
from bitfuse.ops.adaln import GATED_RESIDUAL, RMS_NORM_MODULATE_COMPOSED, RMS_NORM_MODULATE_NATIVE
from bitfuse.ops.rope import SPLIT_PER_OP
from bitfuse.tools.prove import far, mutation, verify
from bitfuse.tools.prove.mutation import DIVISOR, EPS, FOLD, KINDS, MASK, PAST, STATISTIC, STRIDE, WIDTH

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
CPU = torch.device("cpu")


def sites(operator, kind: str) -> list[mutation.Site]:
    return [site for site in mutation.mutants(operator) if site.kind == kind]


def with_tier(monkeypatch, operator, index: int, mutant: Mutant) -> None:
    """The operator's tier launches the mutant of its kernel."""
    right = SimpleNamespace(tiers=operator.tiers)
    wrong = replace(operator.tiers[index], plan=lambda *args: replace(mutant, tier=index).plan(right, *args))
    tiers = tuple(wrong if i == index else tier for i, tier in enumerate(operator.tiers))
    monkeypatch.setattr(operator, "tiers", tiers)
    monkeypatch.setattr(operator, "mutants", ())
    monkeypatch.setattr(mutation, "chosen", lambda operators, further=(): {o: [] for o in operators})


# -- what is made ---------------------------------------------------------------------------------------------------


def test_two_hundred_of_twelve_kinds_are_run_and_of_every_operator_each_kind_that_fits():
    chosen = mutation.chosen(list(OPERATORS.values()))
    assert len(KINDS) == 12
    assert sum(map(len, chosen.values())) >= 200
    for operator, found in chosen.items():
        assert {site.kind for site in found} == {site.kind for site in mutation.mutants(operator)}
    assert {site.kind for found in chosen.values() for site in found} == set(KINDS)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda o: o.name)
def test_every_operator_has_mutants_of_the_kinds_that_any_kernel_has(operator):
    kinds = {site.kind for site in mutation.mutants(operator)}
    roundings = set() if operator.name == "gelu_tanh" else {mutation.ROUNDING}  # its one rounding is the store's own
    assert {*roundings, MASK, WIDTH, PAST, mutation.LEFT_OUT} <= kinds
    if "root" in operator.evidence.steps:  # of a volume: the rules do not read its norm, so these are written by hand
        by_hand = {mutant.name for mutant in operator.mutants}
        assert {"four accumulators added in pairs", "accumulators by neighbours", "the square not rounded"} <= by_hand
        assert {"the mean not rounded", "the mean and eps not rounded"} <= by_hand
    elif "norm" in operator.evidence.steps and operator.emulated is not None:
        assert {FOLD, STATISTIC, EPS, DIVISOR} <= kinds


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutant_of_each_kind_is_caught(kind):
    operator = SPLIT_PER_OP if kind == STRIDE else RMS_NORM_MODULATE_NATIVE
    operator = SPLIT_PER_OP if kind == mutation.CONTRACTION else operator
    found = [mutation.judge(operator, site, CPU) for site in sites(operator, kind)[:4]]
    assert any(one.caught for one in found)
    assert all(one.caught or (one.equivalent and one.found) for one in found)


def test_a_stride_that_the_signature_fixes_is_told_by_a_rule_and_no_other():
    found = {site.edit.swapped: mutation.judge(SPLIT_PER_OP, site, CPU) for site in sites(SPLIT_PER_OP, STRIDE)[:40]}
    same = {swapped for swapped, one in found.items() if one.equivalent}
    assert all(one.caught for swapped, one in found.items() if swapped not in same)
    assert all(before.endswith("_lane") or after == "1" for before, after in same)


# -- the survivors of a hand-made set, as kinds ------------------------------------------------------------------------


@pytest.fixture
def no_mutants(monkeypatch):
    """`verify` without its controls, for tests of what it says of the operators' own kernels."""
    monkeypatch.setattr(mutation, "chosen", lambda operators, further=(): {o: [] for o in operators})


@pytest.mark.usefixtures("no_mutants", "fresh_routes")
@pytest.mark.parametrize("operator", [RMS_NORM_MODULATE_NATIVE, RMS_NORM_MODULATE_COMPOSED], ids=lambda o: o.name)
@pytest.mark.parametrize("kind", [FOLD, STATISTIC, EPS, DIVISOR])
def test_a_wrong_single_pass_fails_the_run_though_the_next_tier_serves(operator, kind, monkeypatch):
    with_tier(monkeypatch, operator, 0, sites(operator, kind)[0].mutant)
    result = verify.run(Console(quiet=True), [operator.name], "cpu", ["small", "one row"])
    assert {check.outcome for check in result.checks} == {"equal"}, "the next tier serves"
    differing = [one for one in result.tiers if one.outcome == "differs"]
    assert differing
    assert {one.tier for one in differing} == {"single pass"}
    assert result.exit_code == 1


def test_a_wrong_last_tier_fails_the_run(monkeypatch, fresh_routes):
    operator = RMS_NORM_MODULATE_NATIVE
    with_tier(monkeypatch, operator, 1, Mutant("last row", (("row < rows)[:, None]", "row < rows - 1)[:, None]"),)))
    result = verify.run(Console(quiet=True), [operator.name], "cpu", ["small"])
    assert {one.tier for one in result.tiers if one.outcome == "differs"} == {"ATen's statistic"}
    assert result.exit_code == 1


def test_a_kernel_that_cannot_be_built_fails_its_tier(monkeypatch, fresh_routes):
    operator = RMS_NORM_MODULATE_NATIVE
    with_tier(monkeypatch, operator, 0, Mutant("no such name", (("n = round_to(", "n = no_such_name("),)))
    result = verify.run(Console(quiet=True), [operator.name], "cpu", ["small"])
    assert result.exit_code == 1
    assert any("no_such_name" in one.reason for one in result.tiers)


@pytest.mark.usefixtures("no_mutants", "fresh_routes")
def test_a_tier_that_does_not_serve_says_why_and_it_is_no_mismatch():
    names = [RMS_NORM_MODULATE_NATIVE.name, RMS_NORM_MODULATE_COMPOSED.name]
    result = verify.run(Console(quiet=True), names, "cpu", ["misaligned", "8192 wide"])
    declined = {(one.operator, one.case): one.reason for one in result.tiers if one.outcome == "declined"}
    assert "multiple of 4 elements" in declined[names[0], "misaligned"]
    assert "in an order that is not reproduced" in declined[names[1], "8192 wide"]
    assert all("differs" not in reason for reason in declined.values())
    assert {one.against for one in result.tiers if one.tier == "single pass"} == {"emulation"}
    assert {one.outcome for one in result.tiers} == {"equal", "declined"}


# -- guard zones ----------------------------------------------------------------------------------------------------


def written(change, strides=(4, 1)) -> proof.Verdict:
    """The verdict on a launch that copies its argument and then does this to its output's memory."""
    x = torch.arange(12.0).view(3, 4)
    argument = torch.cat([x.view(-1), torch.zeros(4)])[:12].view(3, 4)

    def bind(args, outs):
        def launch(x, out):
            out.copy_(x)
            change(x, out)

        return launch

    plan = SimpleNamespace(bind=bind, outputs=(Out((3, 4), strides, torch.float32),), witnesses=())
    reference = lambda x: torch.empty_strided((3, 4), strides).copy_(x)  # noqa: E731
    return proof.run_battery(reference, lambda *_: plan, [("a family", (argument,))])


def at(out: Tensor, place: int) -> Tensor:
    return out.as_strided((1,), (1,), out.storage_offset() + place)


@pytest.mark.parametrize(
    ("place", "strides", "said"),
    [
        (12, (4, 1), "1 elements after its end"),
        (12 + 8192, (4, 1), "8193 elements after its end"),
        (-1, (4, 1), "1 elements before its start"),
        (4, (6, 1), "between its elements, 4 from its start"),
    ],
)
def test_a_write_outside_of_the_output_is_a_mismatch(place, strides, said):
    assert written(lambda x, out: None, strides).equal
    verdict = written(lambda x, out: at(out, place).fill_(1.0), strides)
    assert verdict.mismatch is not None
    assert said in verdict.sentence


def test_a_write_into_an_argument_is_a_mismatch():
    verdict = written(lambda x, out: x[1, 2].fill_(7.0))
    assert verdict.mismatch is not None
    assert "written into its arguments" in verdict.sentence


def test_a_guarded_output_is_aligned_and_laid_out_as_its_own():
    t = guarded((2, 3, 5), (40, 8, 1), torch.bfloat16, CPU)
    assert t.stride() == (40, 8, 1)
    assert t.data_ptr() % 16 == 0
    assert t.isnan().all()


@pytest.mark.parametrize("rows", [1, 1 << 20, 1 << 40])
def test_a_write_far_outside_in_the_interpreter_ends_no_process(rows, fresh_routes):
    edits = (("tl.store(sum_ptr + start + lane,", f"tl.store(sum_ptr + start + lane + {rows} * 640,"),)
    (case,) = mutation.layouts(GATED_RESIDUAL)
    args = case.arguments(CPU)
    verdict = proof.run_battery(
        GATED_RESIDUAL.reference,
        lambda *a: Mutant("far", edits).plan(GATED_RESIDUAL, *a),
        GATED_RESIDUAL.battery(*args),
    )
    assert verdict.mismatch is not None, verdict.sentence


def test_a_read_outside_of_a_tensor_in_the_interpreter_is_a_mismatch():
    always = [site for site in sites(GATED_RESIDUAL, MASK) if "== 0" not in site.edit.new]
    found = [mutation.judge(GATED_RESIDUAL, site, CPU) for site in always]
    assert all(one.caught for one in found)
    assert any("read outside of every tensor" in one.found for one in found)


# -- strides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda o: o.name)
def test_some_family_tells_the_strides_of_all_operands_apart(operator):
    """Of the kernel's own stride parameters: those that are neither 0 nor 1."""
    told: set[tuple[str, str]] = set()
    names: set[str] = set()
    for case in mutation.layouts(operator):
        for _, args in operator.battery(*case.arguments(CPU)):
            plan = operator.tiers[0].plan(*args)
            assert isinstance(plan, Plan)
            parameters = plan.kernel.parameters[-len(plan.scalars) - len(plan.constants) :]
            values = dict(zip(parameters, plan.scalars, strict=False))
            strides = {n: v for n, v in values.items() if n.endswith(("_batch", "_token", "_head")) and v not in (0, 1)}
            names |= set(strides)
            told |= {(a, b) for a in strides for b in strides if strides[a] != strides[b]}
    assert {(a, b) for a in names for b in names if a != b and "out" not in a + b} <= told


def test_a_gap_keeps_every_class_of_strides():
    like = torch.zeros(2, 5, 3, 32, dtype=torch.bfloat16).swapaxes(1, 2)
    dense, wide = (lookalike(like, torch.ones(2, 3, 21, 32, dtype=torch.bfloat16), gap) for gap in (0, 3))
    assert dense.stride() != wide.stride()
    assert [s % 16 for s in dense.stride()] == [s % 16 for s in wide.stride()]
    assert compare(dense.contiguous(), wide.contiguous()) is None


@pytest.mark.parametrize("offset", range(9))
def test_lookalike_starts_as_far_from_16_bytes(offset):
    like = torch.zeros(64, dtype=torch.bfloat16)[offset:].view(-1)
    assert lookalike(like, torch.ones(40, dtype=torch.bfloat16)).data_ptr() % 16 == like.data_ptr() % 16


# -- offsets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda o: o.name)
def test_every_tier_computes_offsets_beyond_31_bits(operator):
    found = [far.planted(operator, tier, tier.plan, case) for case in far.cases(operator) for tier in operator.tiers]
    assert found
    assert all(verdict.equal and verdict.elements for verdict in found), found


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda o: o.name)
def test_the_same_calls_can_be_made_for_real(operator, monkeypatch):
    """As a GPU makes them with memory for all of it: here of few tokens."""
    monkeypatch.setattr(far, "_TOKENS", 176)
    for case in far.cases(operator):
        for tier in operator.tiers:
            verdict = far.for_real(operator, tier, case, CPU)
            assert verdict.equal, (tier.name, case.name, verdict.sentence)
            assert verdict.families == 2


def test_half_a_head_may_be_longer_than_31_bits():
    """As it was: the lanes' stride of tokens that stand innermost, times half a head, in 32 bits."""
    edits = (("second * stride_x_lane", "lane * stride_x_lane + HALF * stride_x_lane"),)
    mutant, (_, last) = Mutant("in 32 bits", edits), far.cases(SPLIT_PER_OP)
    verdict = far.planted(SPLIT_PER_OP, SPLIT_PER_OP.tiers[0], lambda *a: mutant.plan(SPLIT_PER_OP, *a), last)
    assert verdict.mismatch is not None


@pytest.mark.parametrize("name", ["gated_residual", "head_gate", "split_rotary_fp32", "qk_rms_norm"])
def test_offsets_in_32_bits_fail_the_run(name, monkeypatch, fresh_routes):
    operator = OPERATORS[name]
    wrong = next(s for s in sites(operator, WIDTH) if mutation.judge(operator, s, CPU).caught)
    with_tier(monkeypatch, operator, 0, wrong.mutant)
    small = next(case.name for case in operator.cases if not case.real)
    result = verify.run(Console(quiet=True), [name], "cpu", [small])
    assert {one.case for one in result.tiers if one.outcome == "differs"} >= {far.WHAT}
    assert result.exit_code == 1
