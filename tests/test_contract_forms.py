"""All that an operator may be that rotary embeddings are not: optional tensors, numbers, two outputs, two tiers.

The operator here is made for that. Where it adds, it adds two numbers, so that its tiers are equal everywhere.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import bitfuse
from bitfuse import compare
from bitfuse.core import proof, values
from bitfuse.core.conditions import fitting, on_meta, plain, runnable
from bitfuse.core.evidence import Audit, Evidence, Mutant
from bitfuse.core.kernel import kernel
from bitfuse.core.launch import Out, Plan, outputs_like
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.values import lookalike
from bitfuse.tools.prove import verify

if TYPE_CHECKING:
    import triton.language as tl

BF16, FP32 = torch.bfloat16, torch.float32


# -- the operator ---------------------------------------------------------------------------------------------------


def scale_by_ends(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Each row [C] of x times the sum of its ends, and what of x is beyond that sum, in fp32."""
    ends = _ends(x, weight, eps, offset)[0][:, None]
    scaled = x.float() * ends  # r2
    if weight is not None:
        scaled = scaled * weight.float()  # r3
    return scaled.to(x.dtype), x.float() - ends  # r4, r5


def _ends(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, offset: int = 0) -> tuple[Tensor]:
    return (x[:, 0].float() + x[:, -1].float() + eps + offset,)  # r1, three times


@kernel(do_not_specialize=("eps",))
def _single_pass_kernel(
    x_ptr, weight_ptr, scaled_ptr, beyond_ptr, eps, offset, WIDTH: tl.constexpr, LANES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    first = tl.load(x_ptr + row).to(tl.float32)
    last = tl.load(x_ptr + row + WIDTH - 1).to(tl.float32)
    ends = first + last + eps + offset  # r1
    lane = tl.arange(0, LANES)
    x = tl.load(x_ptr + row + lane, mask=lane < WIDTH).to(tl.float32)
    scaled = x * ends  # r2
    if weight_ptr is not None:
        scaled = scaled * tl.load(weight_ptr + lane, mask=lane < WIDTH).to(tl.float32)  # r3
    tl.store(scaled_ptr + row + lane, scaled.to(scaled_ptr.dtype.element_ty), mask=lane < WIDTH)  # r4
    tl.store(beyond_ptr + row + lane, x - ends, mask=lane < WIDTH)  # r5


@kernel
def _given_ends_kernel(x_ptr, weight_ptr, ends_ptr, scaled_ptr, beyond_ptr, WIDTH: tl.constexpr, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * WIDTH
    ends = tl.load(ends_ptr + tl.program_id(0))
    lane = tl.arange(0, LANES)
    x = tl.load(x_ptr + row + lane, mask=lane < WIDTH).to(tl.float32)
    scaled = x * ends  # r2
    if weight_ptr is not None:
        scaled = scaled * tl.load(weight_ptr + lane, mask=lane < WIDTH).to(tl.float32)  # r3
    tl.store(scaled_ptr + row + lane, scaled.to(scaled_ptr.dtype.element_ty), mask=lane < WIDTH)  # r4
    tl.store(beyond_ptr + row + lane, x - ends, mask=lane < WIDTH)  # r5


def _single_pass(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, offset: int = 0) -> Plan | str:
    rows, width = x.shape
    if width > 256:
        return f"a row of {width} is wider than 256"
    constants = {"WIDTH": width, "LANES": 1 << (width - 1).bit_length()}
    outs = outputs_like(on_meta(scale_by_ends, x, weight, eps, offset))
    return Plan(_single_pass_kernel, (rows, 1, 1), (eps, offset), constants, 1, outs)


def _given_ends(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, offset: int = 0) -> Plan | str:
    rows, width = x.shape
    if width > 512:
        return f"a row of {width} is wider than 512"
    constants = {"WIDTH": width, "LANES": 1 << (width - 1).bit_length()}
    outs = outputs_like(on_meta(scale_by_ends, x, weight, eps, offset))
    return Plan(_given_ends_kernel, (rows, 1, 1), (), constants, 1, outs, before=_ends, extras=(FP32,))


def _why_not(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, offset: int = 0) -> Iterator[str]:
    arguments = {"x": x, "weight": weight, "eps": eps, "offset": offset}
    yield from plain(arguments)
    misfit = weight is not None and weight.shape != x.shape[-1:]
    yield from fitting(
        scale_by_ends, arguments, f"weight is not as long as a row of x {list(x.shape)}" if misfit else None
    )
    yield from runnable(arguments)
    if not x.is_contiguous() or (weight is not None and not weight.is_contiguous()):
        yield "x and weight must be dense"
    if x.dtype not in (BF16, FP32):
        yield f"x is {x.dtype}; accepted: torch.bfloat16, torch.float32"


def _battery(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, offset: int = 0
) -> Iterator[tuple[str, tuple]]:
    generator = torch.Generator(x.device).manual_seed(3)
    width, rows = x.shape[1], 4096 // x.shape[1] + 1
    few = values.specials(x.dtype, x.device)
    special = few[torch.randint(few.numel(), (width * rows,), generator=generator, device=x.device)]
    families = {
        "live": values.live([x.dtype], width * rows, generator)[0],
        "wide": values.wide([x.dtype], width * rows, generator)[0],
        "specials": special,
    }
    for family, v in families.items():
        lengths = None if weight is None else lookalike(weight, v[:width].to(weight.dtype))
        yield family, (lookalike(x, v.view(rows, width)), lengths, eps, offset)


@dataclass(frozen=True)
class Case:
    name: str
    width: int = 64
    dtype: torch.dtype = BF16
    weighted: bool = True
    numbers: tuple[float | int, ...] = ()
    rows: int = 9
    real: bool = False

    def arguments(self, device, tokens: int | None = None, seed: int = 0) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        rows = self.rows if tokens is None else min(tokens, self.rows)
        x = torch.randn(rows, self.width, generator=generator, device=device).to(self.dtype)
        weight = torch.randn(self.width, generator=generator, device=device) if self.weighted else None
        return (x, weight, *self.numbers) if self.weighted or self.numbers else (x,)


CASES = (
    Case("weighted"),
    Case("no weight", weighted=False),
    Case("fp32", dtype=FP32),
    Case("eps", numbers=(0.25,)),
    Case("no weight, eps and offset", weighted=False, numbers=(0.25, 3)),
    Case("offset 1", numbers=(1e-6, 1)),
    Case("odd width", width=37),
    Case("too wide for a single pass", width=512),
)

OPERATOR = Operator(
    scale_by_ends,
    "made for these tests",
    why_not=_why_not,
    tiers=(Tier("single pass", _single_pass), Tier("ATen's ends", _given_ends)),
    evidence=Evidence(
        battery=_battery,
        cases=CASES,
        mutants=(
            Mutant("the weight left out", (("weight_ptr is not None", "WIDTH == 0"),)),
            Mutant("beyond without the first", (("x - ends", "x - (ends - first)"),)),
            Mutant("the weight left out", (("weight_ptr is not None", "WIDTH == 0"),), tier=1),
            Mutant("ends of the row before", (("tl.load(ends_ptr + tl.program_id(0))", "tl.load(ends_ptr)"),), tier=1),
        ),
        audits=(
            Audit(
                "weighted",
                {"mul.rn.f32": 2, "add.rn.f32": 1, "cvt.rn.bf16.f32": 1},
                tier=1,
                loads={4: 2, 8: 1},
                stores={4: 1, 8: 1},
            ),
            Audit(
                "no weight",
                {"mul.rn.f32": 1, "cvt.rn.bf16.f32": 1},
                per_thread={"cvt.rn.f32.s32": 1},
                also=("add.rn.f32",),
                results=2,
                loads={2: 2, 4: 1},
                stores={4: 1, 8: 1},
            ),
        ),
    ),
)
del bitfuse.OPERATORS[OPERATOR.name]  # the tests of every operator are not about this one
OP = torch.ops.bitfuse.scale_by_ends
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _undecided(fresh_routes):
    OPERATOR.forget()
    yield
    OPERATOR.forget()


def args_of(name: str, device, **kwargs) -> tuple:
    return next(case for case in CASES if case.name == name).arguments(device, **kwargs)


def wrong(tier: int) -> Tier:
    """The operator's tier with a wrong kernel."""
    mutant, right = next(m for m in OPERATOR.mutants if m.tier == tier), SimpleNamespace(tiers=OPERATOR.tiers)
    return replace(OPERATOR.tiers[tier], plan=partial(mutant.plan, right))


# -- calls ----------------------------------------------------------------------------------------------------------


@every_case
def test_every_case_is_fused_and_equal(case, device):
    args = case.arguments(device)
    route = OPERATOR.route(*args)
    assert route.reason is None
    assert route.tier == ("ATen's ends" if case.width > 256 else "single pass")
    expected, found = OPERATOR.reference(*args), OPERATOR(*args)
    assert type(found) is tuple
    assert compare(expected, found) is None
    assert compare(expected, OPERATOR.launch(*args)) is None
    assert OPERATOR.explain(*args) == []


@pytest.mark.parametrize("given", range(2, 5))
def test_arguments_left_out_are_the_references_defaults(given, device):
    x, *_ = args_of("weighted", device)
    whole = (x, None, 1e-6, 0)
    assert compare(OPERATOR(*whole), OPERATOR(*whole[:given])) is None
    assert compare(OPERATOR(*whole), OPERATOR(x)) is None
    assert len(proof.verdicts()) == 1  # one signature


@pytest.mark.parametrize("tier", OPERATOR.tiers, ids=lambda tier: tier.name)
def test_the_battery_passes_for_each_tier(tier, device):
    for case in CASES[:-1]:
        args = case.arguments(device)
        verdict = proof.run_battery(OPERATOR.reference, tier.plan, OPERATOR.battery(*args))
        assert verdict.equal, verdict.sentence
        rows = 4096 // case.width + 1
        assert verdict.elements == 3 * 2 * rows * case.width  # families, outputs


def test_a_call_of_other_values_is_decided_anew(device):
    x, weight = args_of("weighted", device)
    for numbers in ((1e-6, 0), (0.5, 0), (0.0, 0), (-0.0, 0), (0.5, 1), (0.5, 2), (0.5, 3)):
        assert OPERATOR.route(x, weight, *numbers).fused
        assert compare(OPERATOR.reference(x, weight, *numbers), OPERATOR(x, weight, *numbers)) is None
    assert len(OPERATOR._routes) == 7
    assert len(proof.verdicts()) == 6  # an int is specialised by its class, as Triton does; a float by its value
    x32 = x[:, :32].contiguous()
    assert not OPERATOR.route(x32, None, 1).fused  # 1 is no 1.0
    assert OPERATOR.route(x32, None, 1.0).fused
    assert not OPERATOR.route(x32, None, 1).fused


def test_a_signature_says_what_the_bits_may_depend_on(device):
    x, weight = args_of("weighted", device)
    single, given = (tier.plan for tier in OPERATOR.tiers)
    calls = [(x, weight), (x, None), (x, weight.double()), (x.float(), weight), (x, weight, 0.5), (x, weight, 0.5, 1)]
    signatures = [single(*args).signature(args) for args in calls]
    plan = given(x, weight)
    signatures += [p.signature((x, weight)) for p in (plan, replace(plan, extras=(BF16,)))]
    out, rest = plan.outputs
    signatures.append(replace(plan, outputs=(out, rest._replace(dtype=BF16))).signature((x, weight)))
    assert len(set(signatures)) == len(signatures)
    assert single(x).signature((x,)) == single(x, None, 1e-6).signature((x, None, 1e-6))


@kernel
def _many_pointers_kernel(a_ptr, b_ptr, c_ptr, sum_ptr, out_ptr, first, N: tl.constexpr):
    lane = tl.arange(0, N)
    a = tl.load(a_ptr + lane) + first
    if b_ptr is not None:
        a += tl.load(b_ptr + lane)
    if c_ptr is not None:
        a -= tl.load(c_ptr + lane)
    if sum_ptr is not None:
        tl.store(sum_ptr + lane, a)
    tl.store(out_ptr + lane, a * 2.0)


def test_a_plan_may_name_the_pointers_that_tensors_go_to(device):
    """A kernel that serves calls of several kinds: what is not named is None, and what is given to None is not read."""
    x, y = torch.arange(16.0, device=device), torch.full((16,), 3.0, device=device)
    out = (Out((16,), (1,), FP32),)
    doubled = lambda *args: (args[0] * 2,)  # noqa: E731
    shared: dict[str, Any] = {"scalars": (0.0,), "constants": {"N": 16}, "num_warps": 1, "outputs": out}

    def launched(plan: Plan, *args: Any) -> Tensor:
        outs = plan.empty(device)
        plan.bind(args, outs)(*args, *outs)
        return outs[-1]

    subtracted = Plan(_many_pointers_kernel, (1, 1, 1), slots=("a_ptr", "c_ptr", "out_ptr"), **shared)
    assert compare(launched(subtracted, x, y), 2 * (x - y)) is None
    assert compare(launched(subtracted, x, None), 2 * x) is None
    assert compare(launched(subtracted, x), 2 * x) is None, "left out"
    before: dict[str, Any] = {"before": doubled, "extras": (FP32,)}
    added = replace(subtracted, slots=(None, "b_ptr", "a_ptr", "out_ptr"), **before)
    assert compare(launched(added, x, y), 2 * (x * 2 + y)) is None
    witnessed = replace(added, slots=(None, "b_ptr", "a_ptr", "sum_ptr", "out_ptr"), witnesses=out)
    assert compare(launched(witnessed, x, y), 2 * (x * 2 + y)) is None
    swapped = replace(subtracted, slots=("c_ptr", "a_ptr", "out_ptr"))
    assert len({plan.signature((x, y)) for plan in (subtracted, swapped, added, witnessed)}) == 4


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (lambda x, w: (x, w, torch.tensor(1e-6)), "eps is a Tensor; accepted: a float"),
        (lambda x, w: (x, w, 1), "eps is a int; accepted: a float"),
        (lambda x, w: (x, w, 1.0, 2.0), "offset is a float; accepted: an int"),
    ],
)
def test_an_argument_of_another_kind_runs_the_reference(args, reason, device):
    args = args(*args_of("weighted", device))
    assert OPERATOR.explain(*args) == [reason]
    assert compare(OPERATOR.reference(*args), OPERATOR(*args)) is None


def test_a_call_that_the_reference_refuses_is_refused(device):
    x, weight = args_of("weighted", device)
    with pytest.raises(ValueError, match=r"weight is not as long .*; given x \[9, 64\], weight \[63\]"):
        OPERATOR(x, weight[1:])
    for args in ((), (x, weight, 1e-6, 0, 0)):
        with pytest.raises((TypeError, IndexError)):
            OPERATOR(*args)


def test_a_misfit_of_an_optional_tensor_is_named(device):
    x, weight = args_of("weighted", device)
    assert "weight is a lazy view" in OPERATOR.explain(x, torch._neg_view(weight))[0]
    assert OPERATOR.explain(x, weight.clone().requires_grad_()) == ["a gradient is required of weight"]


# -- tiers ----------------------------------------------------------------------------------------------------------


def test_where_the_first_tier_differs_the_second_is_taken(device, monkeypatch):
    """The wrong kernel leaves the weight out, so that without one it is right."""
    monkeypatch.setattr(OPERATOR, "tiers", (wrong(0), OPERATOR.tiers[1]))
    args = args_of("weighted", device)
    route = OPERATOR.route(*args)
    assert (route.fused, route.tier, route.mismatch) == (True, "ATen's ends", None)
    (why,) = route.passed_over
    assert why.startswith("single pass: output 0 differs at [")
    assert compare(OPERATOR.reference(*args), OPERATOR(*args)) is None
    plain = OPERATOR.route(*args_of("no weight", device))
    assert (plain.tier, plain.passed_over) == ("single pass", ())
    assert [v.equal for v in proof.verdicts().values()] == [False, True, True]


def test_where_a_tier_cannot_do_the_arguments_the_next_is_taken(device):
    args = args_of("too wide for a single pass", device)
    assert OPERATOR.route(*args).passed_over == ("single pass: a row of 512 is wider than 256",)
    assert len(proof.verdicts()) == 1
    assert OPERATOR.verdict(*args).equal


def test_where_no_tier_is_equal_the_reference_runs(device, monkeypatch):
    monkeypatch.setattr(OPERATOR, "tiers", (wrong(0), wrong(1)))
    args = args_of("weighted", device)
    route = OPERATOR.route(*args)
    assert route.tier is None
    assert route.mismatch == OPERATOR.verdict(*args).mismatch
    first, last = route.reason.split("; ")
    assert first.startswith("single pass: output 0 differs at [")
    assert last.startswith("ATen's ends: output 0 differs at [")
    assert OPERATOR.explain(*args) == [route.reason]
    assert compare(OPERATOR.reference(*args), OPERATOR(*args)) is None


def test_where_no_tier_can_do_the_arguments_the_reference_runs(device):
    x = torch.ones(3, 1000, device=device)
    route = OPERATOR.route(x)
    assert route.reason == "single pass: a row of 1000 is wider than 256; ATen's ends: a row of 1000 is wider than 512"
    assert route.mismatch is None
    with pytest.raises(ValueError, match="scale_by_ends: single pass: a row of 1000 is wider"):
        OPERATOR.launch(x)
    assert compare(OPERATOR.reference(x), OPERATOR(x)) is None


def test_a_live_call_that_differs_goes_on_to_the_next_tier(device, monkeypatch):
    """The battery of ones has nothing against a weight left out."""
    ones = [("ones", tuple(torch.ones_like(t) for t in args_of("weighted", device)))]
    monkeypatch.setattr(OPERATOR, "battery", lambda *args: ones)
    monkeypatch.setattr(OPERATOR, "tiers", (wrong(0), OPERATOR.tiers[1]))
    route = OPERATOR.route(*args_of("weighted", device))
    assert route.tier == "ATen's ends"
    assert "differs at [" in route.passed_over[0]
    assert [v.equal for v in proof.verdicts().values()] == [False, True]


def test_what_comes_before_has_to_be_what_the_plan_says(device, monkeypatch):
    tier = OPERATOR.tiers[1]
    other = Tier("other", lambda *args: replace(tier.plan(*args), before=lambda *a: (_ends(*a)[0].double(),)))
    monkeypatch.setattr(OPERATOR, "tiers", (other,))
    (reason,) = OPERATOR.explain(*args_of("weighted", device))
    assert "TypeError: what comes before the launch gave (torch.float64,), not (torch.float32,)" in reason


@pytest.mark.parametrize("mutant", OPERATOR.mutants, ids=lambda m: f"{m.name}, tier {m.tier}")
def test_the_battery_tells_every_mutant(mutant, device):
    args = args_of("weighted", device)
    verdict = proof.run_battery(OPERATOR.reference, partial(mutant.plan, OPERATOR), OPERATOR.battery(*args))
    assert verdict.mismatch is not None
    output = 1 if mutant.name == "beyond without the first" else 0
    assert verdict.mismatch.output == output
    assert verdict.sentence.startswith(f"output {output} differs at [")


# -- the first tier's own specification, on a CPU --------------------------------------------------------------------


def test_a_cpu_holds_the_first_tier_against_what_emulates_it(device, monkeypatch):
    """Here the emulated chain is wrong, and only a wrong kernel of the first tier equals it."""
    chain = lambda x, weight=None, eps=1e-6, offset=0: scale_by_ends(x, None, eps, offset)  # noqa: E731
    monkeypatch.setattr(OPERATOR, "emulated", chain)
    assert OPERATOR.specification(0, "cpu") is chain
    assert OPERATOR.specification(1, "cpu") is OPERATOR.reference
    assert OPERATOR.specification(0, "cuda") is OPERATOR.reference
    if device.type == "cpu":
        caught = [control.caught for control in verify.control(OPERATOR, device)]
        assert caught == [False, True, True, True]
    assert compare(OPERATOR.reference(*args_of("weighted", device)), OPERATOR(*args_of("weighted", device))) is None


# -- comparing, verifying -------------------------------------------------------------------------------------------


def test_results_of_several_tensors_are_compared_one_by_one():
    a, b = torch.zeros(2, 3), torch.zeros(4)
    other = b.clone()
    other[3] = 1
    assert compare((a, b), (a.clone(), b.clone())) is None
    mismatch = compare((a, b), (a.clone(), other))
    assert (mismatch.output, mismatch.index, mismatch.count) == (1, (3,), 1)
    assert mismatch.sentence.startswith("output 1 differs at [3]: 0x3f800000")
    assert compare((a, b), (a, b.half())).sentence == (
        "of output 1 the dtype is torch.float16 where the reference has torch.float32"
    )
    assert compare((a, b), (a,)).sentence == "there are 1 outputs where the reference has 2"
    assert compare(a, (a, b)).sentence == "there are 2 outputs where the reference has 1"
    assert compare((a,), a) is not None


def test_a_check_names_the_tier_and_the_dtypes(device, monkeypatch):
    monkeypatch.setattr(OPERATOR, "tiers", (wrong(0), OPERATOR.tiers[1]))
    checks = {case.name: verify.check(OPERATOR, case, device) for case in CASES}
    assert {check.outcome for check in checks.values()} == {"equal"}
    assert (checks["no weight"].tier, checks["no weight"].reason, checks["no weight"].dtype) == (
        "single pass",
        "",
        "bfloat16",
    )
    weighted = checks["weighted"]
    assert (weighted.tier, weighted.dtype, weighted.elements) == ("ATen's ends", "bfloat16, float32", 2 * 9 * 64)
    assert weighted.reason.startswith("single pass: output 0 differs at [")


def test_verify_prints_by_which_tier(device, monkeypatch):
    monkeypatch.setitem(bitfuse.OPERATORS, OPERATOR.name, OPERATOR)
    monkeypatch.setattr(verify, "generated", lambda *args: iter(()))  # this battery tells the listed mutants only
    console = Console(record=True, width=200, file=io.StringIO())
    result = verify.run(console, [OPERATOR.name])
    assert result.exit_code == 0
    printed = console.export_text()
    assert "scale_by_ends: single pass does not serve 1 of the kernels: a row of 512 is wider than 256" in printed


# -- torch.ops.bitfuse.scale_by_ends --------------------------------------------------------------------------------


def leaf(a, requires_grad: bool):
    if not isinstance(a, Tensor):
        return a
    return a.detach().clone(memory_format=torch.preserve_format).requires_grad_(requires_grad)


def test_the_schema_is_the_references():
    assert str(OP.default._schema).replace("9.9999999999999995e-07", "1e-06") == (
        "bitfuse::scale_by_ends(Tensor x, Tensor? weight=None, float eps=1e-06, int offset=0) -> (Tensor, Tensor)"
    )


@pytest.mark.parametrize(
    ("case", "wanted"),
    [  # every form with all gradients, and one with each of them
        pytest.param(c, w, id=f"{c.name}-{w}", marks=() if c is CASES[0] or w == (0, 1) else pytest.mark.slow)
        for c in CASES
        for w in ((), (0,), (1,), (0, 1))
    ],
)
def test_opcheck(case, wanted, device):
    args = tuple(leaf(a, i in wanted) for i, a in enumerate(case.arguments(device)))
    results = torch.library.opcheck(OP, args)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) >= 4


@every_case
def test_the_op_runs_the_kernel(case, device, monkeypatch):
    args = case.arguments(device)
    expected = OPERATOR.reference(*args)
    assert OPERATOR.route(*args).fused
    monkeypatch.setattr(OPERATOR, "reference", None)  # out of reach
    assert compare(expected, tuple(OP(*args))) is None


@pytest.mark.parametrize(
    ("case", "wanted", "used"),
    [  # one form with any gradients of any outputs, and every form with all of them
        pytest.param(
            *(c, w, u),
            id=f"{c.name}-{w}-{u}",
            marks=() if c is CASES[0] or (w, u) == ((0, 1), (0, 1)) else pytest.mark.slow,
        )
        for c in CASES
        for w in ((0,), (1,), (0, 1))
        for u in ((0,), (1,), (0, 1))
    ],
)
def test_gradients_equal_autograd_through_the_reference(case, wanted, used, device):
    args = case.arguments(device)
    if not any(isinstance(a, Tensor) for i, a in enumerate(args) if i in wanted):
        pytest.skip("no such tensor in this case")
    results = []
    for fn in (OPERATOR.reference, OP):
        leaves = [leaf(a, i in wanted) for i, a in enumerate(args)]
        outs = fn(*leaves)
        losses = [outs[i].float().square().sum() for i in used if outs[i].requires_grad]
        if losses:
            sum(losses).backward()
        results.append([leaf.grad for leaf in leaves if isinstance(leaf, Tensor)])
    for expected, found in zip(*results, strict=True):
        if expected is None and found is not None:  # of outputs that the tensor has no part in, ours is zero
            expected = torch.zeros_like(found)
        assert (expected is None) == (found is None)
        assert expected is None or compare(expected, found) is None


def test_second_derivatives_equal_the_references_too(device):
    args = args_of("fp32", device)
    results = []
    for fn in (OPERATOR.reference, OP):
        leaves = [leaf(a, True) for a in args]
        first = torch.autograd.grad(fn(*leaves)[0].square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(first[0].square().sum(), leaves[1:]))
    assert compare(*results) is None


@every_case
def test_it_works_under_torch_compile(case, device):
    args = case.arguments(device)
    torch.compiler.reset()
    expected = OPERATOR.reference(*args)
    for fn in (OP, OPERATOR):
        found = torch.compile(lambda *a, fn=fn: fn(*a), fullgraph=True, backend="aot_eager")(*args)
        assert compare(expected, tuple(found)) is None


@every_case
def test_fake_tensors_have_the_right_form(case, device):
    args = case.arguments(device)
    with FakeTensorMode() as mode:
        fakes = OP(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    for expected, fake in zip(OP(*args), fakes, strict=True):
        assert Out(fake.shape, fake.stride(), fake.dtype) == Out(expected.shape, expected.stride(), expected.dtype)
        assert fake.device == expected.device


# -- compiled ---------------------------------------------------------------------------------------------------------

AUDITED = """
import json
import test_contract_forms
from bitfuse.tools.prove import ptx
for row in ptx.kernel_counts([test_contract_forms.OPERATOR], [90]):
    accesses = (row.loads, row.stores) == (row.counts.loads, row.counts.stores)
    print(json.dumps([row.tier, row.counts.rounding, row.as_expected, accesses]))
"""


def test_absent_tensors_extras_and_numbers_compile(triton_cache):
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**inherited, "TRITON_CACHE_DIR": str(triton_cache), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", AUDITED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["ATen's ends", "single pass"]
    assert all(as_expected and accesses for _, _, as_expected, accesses in rows), rows
