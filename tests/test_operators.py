"""Every operator equals its reference to the last bit, and its battery tells every wrong kernel from it.

Nothing here names an operator: cases, mutants and batteries come from `bitfuse.OPERATORS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfuse import OPERATORS, Operator, compare, proof, values
from bitfuse.ops import rotary_common

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

every_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda operator: operator.name)
every_case = pytest.mark.parametrize(
    ("operator", "case"),
    [
        pytest.param(operator, case, id=f"{operator.name}-{case.name}")
        for operator in OPERATORS.values()
        for case in operator.cases
    ],
)


def made(case, device: torch.device) -> tuple[Tensor, ...]:
    """The case's tensors: as they are on a GPU, few tokens for the interpreter."""
    return case.tensors(device, tokens=None if device.type == "cuda" else 24)


def run(plan, tensors: Sequence[Tensor]) -> Tensor:
    """One launch, into an output of NaNs: an element that no program writes can't pass for a right one."""
    out = proof.poisoned(plan.empty(tensors[0].device))
    plan.bind(tensors, out)(*tensors, out)
    return out


def of_each_dtype(operator: Operator) -> dict[torch.dtype, object]:
    """A small case for each dtype of x, with the tables that the host feeds it."""
    named = {case.name: case for case in operator.cases}
    return {BF16: named["head size 40"], FP16: named["fp16"], FP32: named["fp32"]}


# -- right ----------------------------------------------------------------------------------------------------------


@every_case
def test_every_case_is_fused_and_equal(operator, case, device):
    tensors = made(case, device)
    route = operator.route(*tensors)
    assert route.reason is None
    assert compare(operator.reference(*tensors), operator(*tensors)) is None


@every_operator
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_battery_passes_and_really_feeds_the_kernel(operator, dtype, device):
    """Every family, by name and size: a battery that yields nothing would prove anything."""
    tensors = of_each_dtype(operator)[dtype].tensors(device)
    families = {family: inputs[0] for family, inputs in operator.battery(*tensors)}
    assert {"live", "wide", "uniform bits", "specials", "ties", "cancellation"} <= set(families)
    assert all(x.numel() >= 1 << 16 for x in families.values())
    assert families["specials"].isnan().any()
    assert families["specials"].isinf().any()
    verdict = proof.run_battery(operator.reference, operator.plan, operator.battery(*tensors))
    assert verdict.equal, verdict.sentence
    assert verdict.families == len(families)


@every_operator
@pytest.mark.parametrize("tile", [256, 1 << 13])
def test_the_tile_does_not_change_a_bit(operator, tile, device, monkeypatch):
    small = {str([(t.dtype, t.shape, t.stride()) for t in c.tensors(device, tokens=3)]): c for c in operator.cases}
    before = {case.name: operator.plan(*case.tensors(device, tokens=3)).constants for case in small.values()}
    monkeypatch.setattr(rotary_common, "_TILE", tile)
    monkeypatch.setattr(rotary_common, "_INTERPRETED_TILE", tile)
    changed = 0
    for case in small.values():
        tensors = case.tensors(device, tokens=3)
        plan = operator.plan(*tensors)
        changed += plan.constants != before[case.name]
        mismatch = compare(operator.reference(*tensors), run(plan, tensors))
        assert mismatch is None, (case.name, mismatch)
    assert changed


@pytest.mark.gpu
@every_operator
@pytest.mark.parametrize("num_warps", [1, 2, 4, 8])
def test_the_number_of_warps_does_not_change_a_bit(operator, num_warps, device):
    """Not in the interpreter, which has no warps."""
    for case in operator.cases:
        tensors = case.tensors(device, tokens=300)
        plan = replace(operator.plan(*tensors), num_warps=num_warps)
        mismatch = compare(operator.reference(*tensors), run(plan, tensors))
        assert mismatch is None, (case.name, mismatch)


# -- wrong ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "mutant", "dtype"),
    [
        pytest.param(operator, mutant, dtype, id=f"{operator.name}-{mutant.name}-{str(dtype).removeprefix('torch.')}")
        for operator in OPERATORS.values()
        for mutant, dtype in itertools.product(operator.mutants, (BF16, FP16, FP32))
    ],
)
def test_the_battery_tells_every_mutant(operator, mutant, dtype, device):
    if mutant.compiled_only and device.type == "cpu":
        pytest.skip("only a compiler makes this one wrong; tests/test_ptx.py counts its instructions")
    tensors = of_each_dtype(operator)[dtype].tensors(device, tokens=5)
    verdict = proof.run_battery(operator.reference, partial(mutant.plan, operator), operator.battery(*tensors))
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
def calls(draw, operator: Operator):
    """A case with drawn sizes, dtypes and forms, the layout of each tensor, and a seed for the values."""
    x_dtype = draw(st.sampled_from([BF16, BF16, FP16, FP32]))
    case = replace(
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
    ndims = [t.ndim for t in case.tensors("cpu", tokens=1)]
    relaid = draw(st.lists(st.booleans(), min_size=len(ndims), max_size=len(ndims)))
    drawn = [draw(layouts(ndim)) if change else None for ndim, change in zip(ndims, relaid, strict=True)]
    return case, drawn, draw(st.integers(0, 2**32 - 1))


def outcome(function, *tensors: Tensor) -> Tensor | type[Exception]:
    try:
        return function(*tensors)
    except (RuntimeError, ValueError) as error:
        return type(error)


def check_call(operator: Operator, call, device: torch.device) -> bool:
    """Whether the drawn call was fused; every property of it is asserted."""
    case, drawn, seed = call
    generator = torch.Generator(device).manual_seed(seed)
    tensors = []
    for t, layout in zip(case.tensors(device), drawn, strict=True):
        v = drawn_values(t, generator)
        tensors.append(t.copy_(v) if layout is None else laid_out(v, **layout))
    before = [bits(t).clone() for t in tensors]

    expected = outcome(operator.reference, *tensors)
    if isinstance(expected, type):  # shapes that the chain itself refuses, as an empty x in [B, T, H*D]
        assert isinstance(outcome(operator, *tensors), type)
        return False
    reasons = operator.explain(*tensors)
    mismatch = compare(expected, operator(*tensors))  # dtype, shape and strides too
    assert mismatch is None, mismatch
    assert all(torch.equal(was, bits(t)) for was, t in zip(before, tensors, strict=True))
    assert operator.route(*tensors).fused == (not reasons)
    if tensors[0].numel() == 0:
        assert any("empty" in reason for reason in reasons)
    elif takes(operator, *(t.dtype for t in tensors)):
        # All that may stand against it: a layout that `lookalike` can't make for the battery, and shapes that the
        # chain takes by accident, x's batch melting into its channels.
        assert all("stays unproved" in r or "in its own way" in r for r in reasons), reasons
    else:
        assert reasons
    return not reasons


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32 if t.dtype == FP32 else torch.int16)


def takes(operator: Operator, *dtypes: torch.dtype) -> bool:
    """Whether the operator has a case with dtypes like these: tables of x's dtype, or of any."""
    mixed = any(case.x_dtype != case.table_dtype for case in operator.cases)
    return mixed or len(set(dtypes)) == 1


@every_operator
def test_any_call_equals_the_reference(operator, device):
    fused = []

    @settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
    @given(call=calls(operator))
    def check(call):
        fused.append(check_call(operator, call, device))

    check()
    assert any(fused)  # the property is about kernels, not about falling back
