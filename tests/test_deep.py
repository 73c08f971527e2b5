"""The long sweeps: laid out so that a step's bare results are compared, and able to turn red."""

from __future__ import annotations

import random
import types
from dataclasses import replace

import pytest
import torch

import bitfuse
from bitfuse import OPERATORS
from bitfuse.core import evidence, proof
from bitfuse.core.bits import compare
from bitfuse.core.kernel import interpreting
from bitfuse.core.operator import Tier
from bitfuse.ops.adaln import GATED_RESIDUAL, MODULATE
from bitfuse.ops.rope import SPLIT_FP32
from bitfuse.tools.prove import sweeps as deep
from common import tensors_of

STEPS = {step.name: step for step in deep.STEPS}
SMALL = replace(deep.SAMPLE, forms=2, shapes=3 * len(OPERATORS))

pytestmark = pytest.mark.usefixtures("fresh_routes")


def _swept(job):
    calls = sum(1 for _ in job.go())
    return job.sweep, calls


def _job(kind, operator, device, extent=deep.SAMPLE, name=None):
    found = [j for j in deep.jobs([operator], device, extent) if j.sweep.kind == kind and name in (None, j.sweep.name)]
    return found[0]


def _blind(operator, mutant, monkeypatch):
    """Give the operator a wrong kernel, and a battery of ones only: nothing but a sweep can catch it now."""
    wrong = next(m for m in operator.mutants if m.name == mutant)
    stock = types.SimpleNamespace(tiers=operator.tiers)
    battery = operator.battery

    def ones(*like):
        family, args = next(iter(battery(*like)))
        yield family, tuple(a.fill_(1.0) if isinstance(a, torch.Tensor) and 0 not in a.stride() else a for a in args)

    monkeypatch.setattr(operator, "tiers", (Tier("wrong", lambda *args: wrong.plan(stock, *args)),))
    monkeypatch.setattr(operator, "battery", ones)
    monkeypatch.setattr(proof, "compare_live", lambda *args: None)


# -- pairs -------------------------------------------------------------------------------------------------------------

PAIRS = {
    "x * (1 + scale)": lambda a, b: a * (1 + b),
    "product + shift": lambda a, b: a + b,
    "shift_table + shift": lambda a, b: a + b,
    "1 + (scale_table + scale)": lambda a, b: 1 + (a + b),
    "gate_table + gate": lambda a, b: a + b,
    "y * gate": lambda a, b: a * b,
    "y * mask": lambda a, b: a * b,
    "x + y": lambda a, b: a + b,
    "out * 2 sigmoid(logit)": lambda a, b: b * (2 * torch.sigmoid(a)),
    "y + bias": lambda a, b: a + b,
    "noise * its scale": lambda a, b: a * b,
    "y + noise": lambda a, b: a + b,
    "y + residual": lambda a, b: a + b,
    "SiLU(1 * (1 + scale) + shift)": lambda a, b: torch.nn.functional.silu((1 + a) + b),
    "y + bias, upsampled": lambda a, b: a + b,
    "y + residual, upsampled": lambda a, b: a + b,
    "y + bias, in patches": lambda a, b: a + b,
    "y + bias, downsampled": lambda a, b: (a + b) + 0.0,  # a mean of zeros is added
    "y + residual, downsampled": lambda a, b: a + (0.0 + b),  # the mean of one begins with 0
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pairs_sweep_compares_the_bare_result_of_its_step(name):
    a = deep._patterns(torch.bfloat16, 40, torch.device("cpu"), 1)
    b = deep._patterns(torch.bfloat16, 128, torch.device("cpu"), 2)
    step = STEPS[name]
    out = OPERATORS[step.operator].reference(*step.arguments(a, b))
    expected = PAIRS[name](a[:, None], b[None, :])
    assert expected.unique().numel() > 50
    out = out.movedim(1, -1) if out.ndim == 5 else out  # of a volume: channels last
    assert compare(expected, out.reshape(40, 128).contiguous()) is None


@pytest.mark.parametrize(
    "step", [s for s in deep.STEPS if "rotary" in s.operator], ids=lambda s: f"{s.operator}-{s.name}"
)
def test_a_turned_pair_shows_the_bare_result_of_its_step(step):
    """In the first half of the heads or channels with minus, in the second with plus."""
    a = deep._patterns(torch.bfloat16, 40, torch.device("cpu"), 1)
    b = deep._patterns(step.table, 128, torch.device("cpu"), 2)
    x, cos, sin = step.arguments(a, b)
    out = OPERATORS[step.operator].reference(x, cos, sin)
    first, second = out.unflatten(2, (2, 2, 2, 64) if step.operator.startswith("split") else (2, 128, 2)).unbind(4)
    minus, plus = first[0, :, 0].reshape(40, 128), second[0, :, 1].reshape(40, 128)
    wide = torch.float32 if "fp32" in step.operator else torch.bfloat16
    a, b = a[:, None].to(wide), b[None, :].to(wide)
    found = {"x * cos": (a * b, a * b), "x + sin": (a - b, a + b), "x * sin": (-(a * b), a * b)}
    expected = [t.to(torch.bfloat16) for t in found[step.name.split(",")[0]]]
    assert compare(expected[0], minus.contiguous()) is None
    assert compare(expected[1], plus.contiguous()) is None


def test_all_pairs_means_all_of_them(device):
    """The pieces of an exhaustive sweep: every value of one operand with every value of the other, once."""
    extent = replace(deep.ALL, tokens=1 << 15, columns=1 << 14)
    step, seen = STEPS["y * gate"], []

    def noted(a, b):
        seen.append((a, b))
        return step.arguments(a[:1], b[:128])

    sweep, calls = _swept(deep._pair_job(replace(step, arguments=noted), device, extent))
    assert (sweep.outcome, sweep.done, sweep.of, calls) == ("equal", 2**32, 2**32, 8)
    pairs = {(int(a[0].view(torch.int16)), int(b[0].view(torch.int16))) for a, b in seen}
    assert len(pairs) == 8
    each = [torch.cat([pair[i].view(torch.int16) for pair in seen]).unique().numel() for i in range(2)]
    assert each == [65536, 65536]


def test_every_step_has_an_operator_and_is_swept_once():
    keys = [(step.operator, step.name) for step in deep.STEPS]
    assert len(set(keys)) == len(keys)
    assert all(name in OPERATORS for step in deep.STEPS for name in (step.operator, *step.also))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda o: o.name)
def test_an_operator_has_the_steps_that_its_arguments_and_its_instructions_show(operator):
    """By which the sweeps tell whose kernel holds a step: one that is missing would go unswept, and unseen."""
    steps, names = set(operator.evidence.steps), set(deep.named(operator.reference, ()))
    counted = set().union(*({*audit.counts, *audit.per_thread} for audit in operator.audits))
    assert steps <= set(evidence.STEPS)
    assert ("norm" in steps) == ("eps" in names)
    if "bias" in names:  # on volumes, whose kernels are of other lines
        normed, summed = {"norm", "root", "silu"}, {"summands"} if "front" in names else set()
        assert steps == {"bias", *summed, *(normed if "eps" in names else ())}
        assert ("sqrt.rn.f32" in counted) == ("root" in steps)
        assert ("ex2.approx.f32" in counted) == ("silu" in steps)
        return
    assert ("modulation" in steps, bool(steps & {"residual", "addcmul"})) == ("scale" in names, "y" in names)
    assert ("addcmul" in steps) == ("y" in names and "fma.rn.f32" in counted)
    # every battery of GELU has all 65,536 values: there is nothing to sweep
    sigmoid = "ex2.approx.ftz.f32" in counted and operator.name != "gelu_tanh"
    assert ("rsqrt" in steps, "sigmoid" in steps) == ("rsqrt.approx.f32" in counted, sigmoid)
    # a mean's divisor is one number for all rows: counts of elements are converted for it
    divides = "div.rn.f32" in counted and "cvt.rn.f32.s64" not in counted
    assert ("quotient" in steps) == (divides and "sigmoid" not in steps)


@pytest.mark.parametrize(
    ("operator", "step", "mutant"),
    [
        (MODULATE, "x * (1 + scale)", "subnormals flushed"),
        (MODULATE, "1 + (scale_table + scale)", "table + value not rounded"),
        (GATED_RESIDUAL, "y * gate", "subnormals flushed"),
        (SPLIT_FP32, "x * sin, tables in bfloat16", "-s as 0 - s"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_sweep_of_pairs_catches_what_a_weak_battery_lets_pass(operator, step, mutant, device, monkeypatch):
    sweep, _ = _swept(_job("pairs", operator, device, name=step))
    assert sweep.outcome == "equal"
    assert (sweep.done, sweep.of) == (32 * 128, 2**32)
    operator.forget()
    proof.forget()
    _blind(operator, mutant, monkeypatch)
    sweep, _ = _swept(_job("pairs", operator, device, name=step))
    assert sweep.outcome == "differs"
    assert "differs at [" in sweep.reason
    assert sweep.done == 0


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [o for o in OPERATORS.values() if o.source], ids=lambda o: o.name)
def test_every_tensor_argument_takes_every_value(operator, monkeypatch):
    """Without running anything: what each call of an exhaustive sweep would hold."""
    held = {}
    names = list(deep.named(operator.reference, ()))

    def noted(_, what, args):
        name = what.removeprefix("every ")
        t = args[names.index(name)]
        assert all(a.dtype == torch.bfloat16 for a in tensors_of(args))
        held.setdefault(name, []).append(t.reshape(-1).view(torch.int16))
        return deep.Found("equal", "", "", 0)

    monkeypatch.setattr(deep, "compared", noted)
    extent = replace(deep.SAMPLE, values=1 << 11, rows=(4, 512, 512))
    job = deep._value_job(operator, torch.device("cpu"), extent)
    sweep, calls = _swept(job)
    assert calls == job.calls
    every = deep._patterns(torch.bfloat16, 1 << 11, torch.device("cpu"), deep.SEED).view(torch.int16)
    assert every.unique().numel() == 1 << 11
    args = deep._broad(operator.cases[0], 2).arguments("cpu")
    assert list(held) == [n for n, a in zip(names, args, strict=False) if isinstance(a, torch.Tensor)]
    assert all(bool(torch.isin(every, torch.cat(found)).all()) for found in held.values())
    assert sweep.done == len(held) << 11


def test_a_sweep_of_values_catches_what_a_weak_battery_lets_pass(device, monkeypatch):
    _blind(MODULATE, "1 + scale not rounded", monkeypatch)
    sweep, _ = _swept(_job("values", MODULATE, device))
    assert sweep.outcome == "differs"
    assert sweep.reason.startswith("x: differs at [")


# -- arguments of primitives ---------------------------------------------------------------------------------------


def test_primitives_equal_atens_ops_or_say_why_that_is_not_to_be_seen_here(device):
    for primitive in deep.PRIMITIVES:
        sweep, _ = _swept(deep._argument_job(primitive, device, deep.SAMPLE))
        if device.type == "cpu" and primitive.needs_gpu:
            assert (sweep.outcome, sweep.done, sweep.reason) == ("declined", 0, primitive.needs_gpu)
        else:
            assert (sweep.outcome, sweep.done, sweep.of) == ("equal", 1 << 14, 2**32), sweep


def test_a_primitive_that_differs_is_reported_with_its_argument(device):
    wrong = next(p for p in deep.PRIMITIVES if p.which == "root")
    wrong = replace(wrong, reference=lambda x: torch.where(x == 2.0**-149, 0.0, torch.rsqrt(x)))
    sweep, _ = _swept(deep._argument_job(wrong, device, deep.SAMPLE))
    assert sweep.outcome == "differs"
    assert sweep.reason.startswith("x is 0x00000001: differs at [")


def test_all_arguments_means_all_of_them(monkeypatch):
    """The pieces of an exhaustive sweep follow each other, from the first bit pattern to the last."""
    pieces = []

    def noted(lowest, n, device):
        pieces.append((lowest, n))
        return torch.ones(1)

    monkeypatch.setattr(deep, "_ran", lambda primitive, x: x)
    monkeypatch.setattr(deep, "_bits_from", noted)
    sweep, calls = _swept(deep._argument_job(deep.PRIMITIVES[0], torch.device("cpu"), deep.ALL))
    assert (sweep.outcome, sweep.done, calls) == ("equal", 2**32, 64)
    assert pieces == [(start, 2**26) for start in range(-(2**31), 2**31, 2**26)]


def test_bits_are_counted_up_over_all_of_fp32():
    device = torch.device("cpu")
    assert deep._bits_from(-(2**31), 2, device).view(torch.int32).tolist() == [-(2**31), 1 - 2**31]
    assert deep._bits_from(2**31 - 3, 3, device).view(torch.int32)[-1] == 2**31 - 1


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [o for o in OPERATORS.values() if o.source], ids=lambda o: o.name)
def test_random_cases_are_of_shapes_that_the_reference_takes(operator, device):
    """Each has a sentence for why it is declined, or none; never a ValueError. And they repeat themselves."""
    extent = replace(deep.SAMPLE, forms=12)
    reasons = []
    for number, form in enumerate(deep.forms(operator, extent)):
        args, again = (form.arguments(device, random.Random(number)) for _ in range(2))
        assert compare(tuple(tensors_of(args)), tuple(tensors_of(again))) is None
        reasons.append(next(operator.why_not(*args), None))
    assert None in reasons
    assert all(reason is None or reason.strip() for reason in reasons)


def test_moved_tensors_hold_the_same_values():
    t = torch.arange(24.0).view(2, 3, 4)
    for how in ("offset", "padded", "transposed"):
        moved = deep._moved(t, how, 3)
        assert torch.equal(moved, t)
        assert moved.storage_offset() == 3 or moved.stride() != t.stride()
    assert deep._moved(t, "expanded", 3).stride(0) == 0
    assert deep._moved(t, "", 3) is t


def test_a_sweep_of_shapes_counts_what_it_fused_and_declined(device):
    job = _job("shapes", SPLIT_FP32, device, SMALL)
    sweep, calls = _swept(job)
    assert (sweep.outcome, sweep.done, calls) == ("equal", 3, 3)
    assert sweep.of * len(OPERATORS) >= deep.SHAPES
    assert sweep.kernels
    assert sum(n for _, n in sweep.declined) < 3
    bitfuse.disable()
    try:
        sweep, _ = _swept(_job("shapes", SPLIT_FP32, device, SMALL))
    finally:
        bitfuse.enable()
    assert (sweep.outcome, sweep.kernels) == ("declined", 0)
    assert sweep.declined == (("bitfuse is off (BITFUSE=0 or bitfuse.disable())", 3),)


def test_a_sweep_of_shapes_catches_a_kernel_that_fails_for_some_lengths(device, monkeypatch):
    """Odd numbers of tokens are wrong, and the battery has even ones only."""
    stock, battery = MODULATE.tiers[0], MODULATE.battery

    def plan(*args):
        found = stock.plan(*args)
        rows, *others = found.scalars
        return replace(found, scalars=(rows - rows % 2, *others))  # the last row of an odd number is not written

    monkeypatch.setattr(MODULATE, "tiers", (Tier("wrong", plan),))
    monkeypatch.setattr(MODULATE, "battery", lambda *like: (f for f in battery(*like) if f[1][0].numel() % 2 == 0))
    monkeypatch.setattr(proof, "compare_live", lambda *args: None)
    sweep, _ = _swept(_job("shapes", MODULATE, device, replace(SMALL, shapes=12 * len(OPERATORS))))
    assert sweep.outcome == "differs"
    assert sweep.reason.startswith("case ")


def test_an_error_of_a_routed_kernel_is_no_decline(device, monkeypatch):
    args = MODULATE.cases[-1].arguments(device, tokens=5)
    assert deep.compared(MODULATE, "x", args).outcome == "equal"
    stock = MODULATE.tiers[0]

    def plan(*args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(MODULATE, "tiers", (Tier(stock.name, plan),))
    found = deep.compared(MODULATE, "x", args)
    assert found.outcome == "differs"
    assert "no such instruction" in found.reason


# -- all of it -----------------------------------------------------------------------------------------------------


def test_jobs_cover_each_kind_and_count_their_calls(device):
    assert interpreting() == (device.type == "cpu")
    jobs = list(deep.jobs(list(OPERATORS.values()), torch.device("cuda")))  # lists them, runs nothing
    by_kind = {kind: [j for j in jobs if j.sweep.kind == kind] for kind in ("pairs", "values", "arguments", "shapes")}
    assert len(by_kind["pairs"]) == len(deep.STEPS)
    assert len(by_kind["arguments"]) == len(deep.PRIMITIVES)
    assert (
        {j.sweep.operator for j in by_kind["values"]} == {j.sweep.operator for j in by_kind["shapes"]} == set(OPERATORS)
    )
    assert sum(j.calls for j in by_kind["shapes"]) >= deep.SHAPES
    assert all(j.calls for j in jobs)
