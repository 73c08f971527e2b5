"""Every operator equals its reference to the last bit, and its battery tells every wrong kernel from it.

Nothing here names an operator: cases, mutants and batteries come from `bitfuse.OPERATORS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfuse import OPERATORS, Operator, compare
from bitfuse.core import proof, values
from bitfuse.core.bits import as_tuple
from bitfuse.core.inputs import poisoned
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Tier
from bitfuse.ops.rope_evidence import RotaryCase
from common import ONE_OF_EACH_FILE, ROTARY, on_tensors, small_cases, tensors_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {operator.name: [d for d in (BF16, FP16, FP32) if small_cases(operator, d)] for operator in OPERATORS.values()}


def label(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value.name


every_case = pytest.mark.parametrize(
    ("operator", "case"), [(o, case) for o in OPERATORS.values() for case in o.cases], ids=label
)


def variant(quick: bool) -> Any:
    """Marks: `make test` has the quick ones of many alike, `make test-all` all; a GPU is fast enough for all."""
    return () if quick or torch.cuda.is_available() else pytest.mark.slow


# The kernels of one file are cut from the same parts: one of its operators is quick
one_of_each_file = pytest.mark.parametrize(
    "operator", [pytest.param(o, marks=variant(o in ONE_OF_EACH_FILE)) for o in OPERATORS.values()], ids=label
)
every_tier = pytest.mark.parametrize(
    ("operator", "tier"),
    [pytest.param(o, tier, marks=variant(o in ONE_OF_EACH_FILE)) for o in OPERATORS.values() for tier in o.tiers],
    ids=label,
)


@functools.cache
def first_of(case) -> tuple[torch.dtype, int]:
    """Dtype and width of its first argument."""
    first = case.arguments("cpu", tokens=1)[0]
    return first.dtype, first.shape[-1]


def made(case, device: torch.device) -> tuple[Any, ...]:
    """The case's arguments: as they are on a GPU, few tokens for the interpreter."""
    return case.arguments(device, tokens=None if device.type == "cuda" else 24)


def run(plan: Plan, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """One launch, into outputs of NaNs: an element that no program writes can't pass for a right one."""
    outs = tuple(map(poisoned, plan.empty(args[0].device)))
    plan.bind(args, outs)(*args, *outs)
    return outs


def form(t: Tensor) -> tuple:
    return t.dtype, t.shape, t.stride()


def specification(operator: Operator, tier: Tier, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    chain = operator.specification(operator.tiers.index(tier), device)
    return lambda *args: as_tuple(chain(*args))


def small(
    operator: Operator,
    tier: Tier,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int | None = None,
    name: str | None = None,
) -> tuple[Any, ...]:
    """The arguments of the named case, or of the first small one, with a first argument of that dtype.

    Of those that the tier can do.
    """
    cases = small_cases(operator, dtype) if name is None else [case for case in operator.cases if case.name == name]
    made = (case.arguments(device, tokens=tokens) for case in cases)
    found = (args for args in made if args[0].dtype == dtype and isinstance(tier.plan(*args), Plan))
    return next(found, None) or pytest.skip(f"no such case in {dtype} by {tier.name}")


# -- right ----------------------------------------------------------------------------------------------------------


@every_case
def test_every_case_is_equal_in_its_tiers(operator, case, device):
    """The bits, without a battery: of all tiers, or of the last one at the widths of the hosts."""
    args, equal = made(case, device), 0
    for tier in operator.tiers[-1:] if case.real else operator.tiers:
        plan = tier.plan(*args)
        if isinstance(plan, Plan):
            mismatch = compare(specification(operator, tier, device)(*args), run(plan, args))
            assert mismatch is None, (tier.name, mismatch)
            equal += 1
    assert equal


@pytest.mark.parametrize(
    ("operator", "case"),
    # A proof takes the interpreter up to seconds: at real widths one is enough, and of the small ones every other
    [
        pytest.param(o, case, marks=variant(o in ONE_OF_EACH_FILE and not number % 2 and first_of(case)[1] <= 4096))
        for o in OPERATORS.values()
        for number, case in enumerate(
            case for case in o.cases if torch.cuda.is_available() or not case.real or case is o.cases[0]
        )
    ],
    ids=label,
)
def test_every_case_is_proved_and_fused(operator, case, device):
    args = made(case, device)
    route = operator.route(*args)
    assert route.reason is None
    assert compare(operator.reference(*args), operator(*args)) is None


@one_of_each_file
def test_one_token_is_fused(operator, device):
    """Its rows look like a sample's: a battery must not take the one for the other."""
    of_hosts = (case.arguments(device, tokens=1) for case in operator.cases if case.real)
    args = min(of_hosts, key=lambda args: args[0].numel())
    assert operator.explain(*args) == []
    assert compare(operator.reference(*args), operator(*args)) is None


@pytest.mark.parametrize(
    ("operator", "tier", "dtype"),
    [
        pytest.param(o, tier, dtype, marks=variant(o in ONE_OF_EACH_FILE or dtype is DTYPES[o.name][0]))
        for o in OPERATORS.values()
        for tier in o.tiers
        for dtype in DTYPES[o.name]
    ],
    ids=label,
)
def test_the_battery_passes_and_really_feeds_the_kernel(operator, tier, dtype, device):
    """Every family, by name and size: a battery that yields nothing would prove anything."""
    args = small(operator, tier, dtype, device)
    families = {family: inputs[0] for family, inputs in operator.battery(*args)}
    rotary = operator in ROTARY
    wanted = {"live", "specials"} | ({"wide", "uniform bits", "ties", "cancellation"} if rotary else set())
    assert wanted <= set(families)
    assert len(families) >= 4
    assert all(x.numel() >= 1 << (16 if rotary else 14) for x in families.values())
    special = [x for family, x in families.items() if "special" in family]
    assert any(x.isnan().any() for x in special)
    assert any(x.isinf().any() for x in special)
    chain = operator.specification(operator.tiers.index(tier), device)
    verdict = proof.run_battery(chain, tier.plan, operator.battery(*args))
    assert verdict.equal, verdict.sentence
    assert verdict.families == len(families)


@every_tier
@pytest.mark.parametrize("share", [3, pytest.param(1, marks=variant(False))], ids=["some forms", "every form"])
def test_the_tile_does_not_change_a_bit(operator, tier, share, device):
    if operator.retiled is None:
        pytest.skip("cut in one way only")
    every = [case.arguments(device, tokens=3) for case in operator.cases]
    compared = 0
    for args in [*{str(on_tensors(form, args)): args for args in every}.values()][::share]:
        plan = tier.plan(*args)
        for other in operator.retiled(plan) if isinstance(plan, Plan) else ():
            compared += other != plan
            mismatch = compare(specification(operator, tier, device)(*args), run(other, args))
            assert mismatch is None, (other.constants, mismatch)
    assert compared


@pytest.mark.gpu
@every_tier
@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
def test_the_number_of_warps_does_not_change_a_bit(operator, tier, num_warps, device):
    """Not in the interpreter, which has no warps.

    Held against the tier's own launch, which another test holds against the chain: a tier that is declined for some
    layout (ATen adds up the rows of a misaligned tensor in another order) must not depend on its warps either.
    """
    for case in operator.cases:
        args = case.arguments(device, tokens=300)
        plan = tier.plan(*args)
        if isinstance(plan, Plan):
            found = run(replace(plan, num_warps=num_warps), args)
            mismatch = compare(run(plan, args), found)
            assert mismatch is None, (case.name, mismatch)


# -- wrong ----------------------------------------------------------------------------------------------------------


def told_in(operator: Operator, mutant: Any) -> list[torch.dtype]:
    """The dtypes in which the mutant has a case that it does harm to."""
    cases = [case for case in operator.cases if case.name == mutant.case] or small_cases(operator)
    dtypes = {first_of(case)[0] for case in cases}
    return [dtype for dtype in DTYPES[operator.name] if dtype in dtypes and dtype not in mutant.harmless_for]


@pytest.mark.parametrize(
    ("operator", "mutant", "dtype"),
    [
        pytest.param(o, mutant, dtype, marks=variant(dtype in told_in(o, mutant)[:1]))
        for o in OPERATORS.values()
        for mutant in o.mutants
        for dtype in DTYPES[o.name]
    ],
    ids=label,
)
def test_the_battery_tells_every_mutant(operator, mutant, dtype, device):
    if mutant.compiled_only and device.type == "cpu":
        pytest.skip("only a compiler makes this one wrong; tests/test_ptx.py counts its instructions")
    tokens = 5 if operator in ROTARY else 16  # fewer rows would make the batteries of means as small
    args = small(operator, operator.tiers[mutant.tier], dtype, device, tokens=tokens, name=mutant.case)
    chain = operator.specification(mutant.tier, device)
    verdict = proof.run_battery(chain, partial(mutant.plan, operator), operator.battery(*args))
    if dtype in mutant.harmless_for:
        assert verdict.equal, verdict.sentence
    else:
        assert verdict.mismatch is not None, verdict.sentence  # it ran, and its bits were wrong


# -- drawn ----------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw, ndim: int):
    """How to lay a tensor out in memory: order of dimensions, steps, storage offset, expanded dimensions."""
    return {
        "order": draw(st.one_of(st.just(tuple(range(ndim))), st.permutations(range(ndim)))),
        "steps": draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=ndim, max_size=ndim)),
        "offset": draw(st.sampled_from([0, 0, 1, 3, 8])),
        "expanded": draw(st.sets(st.integers(0, ndim - 1), max_size=1)) if draw(st.booleans()) else set(),
    }


def laid_out(t: Tensor, order: Sequence[int], steps: Sequence[int], offset: int, expanded: set[int]) -> Tensor:
    """The values of t (at expanded dimensions those of index 0) in another layout."""
    shape = t.shape
    for dim in expanded:
        if t.shape[dim]:
            t = t.narrow(dim, 0, 1)
    sizes = [t.shape[dim] * step for dim, step in zip(order, steps, strict=True)]
    buffer = torch.zeros(offset + torch.Size(sizes).numel(), dtype=t.dtype, device=t.device)
    stepped = buffer[offset:].view(sizes)[tuple(slice(None, None, step) for step in steps)]
    out = stepped.permute([order.index(dim) for dim in range(t.ndim)])
    out.copy_(t)
    return out.expand(shape)


def drawn_values(like: Tensor, generator: torch.Generator) -> Tensor:
    """Live values, special ones and any bits, mixed."""
    few, n = values.specials(like.dtype, like.device), like.numel()
    (live,), (bits,) = values.live([like.dtype], n, generator), values.uniform_bits([like.dtype], n, generator)
    special = few[torch.randint(few.numel(), (n,), generator=generator, device=like.device)]
    kind = torch.randint(3, (n,), generator=generator, device=like.device)
    return torch.where(kind == 0, live, torch.where(kind == 1, special, bits)).view(like.shape)


@st.composite
def rotary_cases(draw, operator: Operator) -> RotaryCase:
    """Drawn sizes, dtypes and forms."""
    x_dtype = draw(st.sampled_from([BF16, BF16, FP16, FP32]))
    return replace(
        operator.cases[0],
        batch=draw(st.sampled_from([1, 1, 2, 3])),
        tokens=draw(st.sampled_from([0, 1, 2, 5, 16, 19])),
        heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([2, 4, 6, 10, 16, 32, 40, 64])),
        x_dtype=x_dtype,
        table_dtype=draw(st.sampled_from([x_dtype, x_dtype, FP32, BF16])),
        x_form=draw(st.sampled_from(sorted({case.x_form for case in operator.cases}))),
        table_form=draw(st.sampled_from(sorted({case.table_form for case in operator.cases}))),
        table_batch=draw(st.sampled_from([None, None, 1])),
    )


@st.composite
def calls(draw, operator: Operator):
    """A case, its number of tokens, the layout of each of its tensors, and a seed for the values."""
    case = draw(rotary_cases(operator) if operator in ROTARY else st.sampled_from(small_cases(operator)))
    tokens = draw(st.sampled_from([None, None, 1, 2, 16]))
    ndims = [t.ndim for t in tensors_of(case.arguments("cpu", tokens=1))]
    relaid = draw(st.lists(st.booleans(), min_size=len(ndims), max_size=len(ndims)))
    drawn = [draw(layouts(ndim)) if change else None for ndim, change in zip(ndims, relaid, strict=True)]
    return case, tokens, drawn, draw(st.integers(0, 2**32 - 1))


def outcome(function, *args: Any) -> Any:
    """Its result, or the type of what it raises."""
    try:
        return function(*args)
    except (RuntimeError, ValueError) as error:
        return type(error)


def written(t: Tensor, v: Tensor) -> Tensor:
    """The tensor with these values in its memory; where one element serves many, with those of index 0."""
    expanded = [
        dim for dim, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)) if size > 1 and not stride
    ]
    once = t
    for dim in expanded:
        once, v = once.narrow(dim, 0, 1), v.narrow(dim, 0, 1)
    once.copy_(v)
    return t


def check_call(operator: Operator, call, device: torch.device) -> bool:
    """Whether the drawn call was fused; every property of it is asserted."""
    case, tokens, drawn, seed = call
    generator, remaining = torch.Generator(device).manual_seed(seed), iter(drawn)

    def redrawn(t: Tensor) -> Tensor:
        layout, v = next(remaining), drawn_values(t, generator)
        return written(t, v) if layout is None else laid_out(v, **layout)

    args = on_tensors(redrawn, case.arguments(device, tokens=tokens))
    before = [bits(t).clone() for t in tensors_of(args)]

    expected = outcome(operator.reference, *args)
    if isinstance(expected, type):  # shapes that the chain itself refuses, as an empty x in [B, T, H*D]
        assert isinstance(outcome(operator, *args), type)
        return False
    reasons = operator.explain(*args)
    mismatch = compare(expected, operator(*args))  # dtype, shape and strides too
    assert mismatch is None, mismatch
    assert all(torch.equal(was, bits(t)) for was, t in zip(before, tensors_of(args), strict=True))
    assert operator.route(*args).fused == (not reasons)
    if args[0].numel() == 0:
        assert any("empty" in reason for reason in reasons)
    elif operator in ROTARY and takes(operator, *(t.dtype for t in args)):
        # All that may stand against it: a layout that `lookalike` can't make for the battery, and shapes that the
        # chain takes by accident, x's batch melting into its channels.
        assert all("stays unproved" in r or "in its own way" in r for r in reasons), reasons
    elif operator in ROTARY:
        assert reasons
    return not reasons


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def takes(operator: Operator, *dtypes: torch.dtype) -> bool:
    """Whether a rotary operator has a case with dtypes like these: tables of x's dtype, or of any."""
    mixed = any(case.x_dtype != case.table_dtype for case in operator.cases)
    return mixed or len(set(dtypes)) == 1


@one_of_each_file
def test_any_call_equals_the_reference(operator, device):
    fused = []

    @settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
    @given(call=calls(operator))
    def check(call):
        fused.append(check_call(operator, call, device))

    check()
    assert any(fused)  # the property is about kernels, not about falling back
