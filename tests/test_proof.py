"""Bits are compared as promised, and a verdict speaks for one signature and for no other."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfuse import OPERATORS, compare
from bitfuse.core import proof
from bitfuse.core.evidence import Mutant
from bitfuse.core.inputs import poisoned
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Tier
from bitfuse.core.values import lookalike
from common import ONE_OF_EACH_FILE

NAN = float("nan")
SPLIT = OPERATORS["split_rotary_per_op"]
CASES = {case.name: case for case in SPLIT.cases}


def tensors_of(name: str, device) -> tuple[torch.Tensor, ...]:
    return CASES[name].arguments(device, tokens=5)


# -- compare ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_sign_of_zero_counts(dtype, device):
    zeros = torch.zeros(2, 3, dtype=dtype, device=device)
    other = zeros.clone()
    other[1, 2] = -0.0
    assert torch.equal(zeros, other)  # what torch.equal can't see
    mismatch = compare(zeros, other)
    assert mismatch is not None
    assert (mismatch.index, mismatch.count) == ((1, 2), 1)
    assert int(mismatch.expected, 16) == 0
    assert int(mismatch.found, 16) == 1 << (8 * zeros.element_size() - 1)


@pytest.mark.parametrize(("bits", "dtype"), [(torch.int16, torch.bfloat16), (torch.int32, torch.float32)])
def test_nan_equals_any_nan_and_nothing_else(bits, dtype, device):
    infinity = int(torch.tensor(float("inf"), dtype=dtype).view(bits))
    a = torch.tensor([infinity + 1, -1, infinity + 5], dtype=bits, device=device).view(dtype)
    b = torch.tensor([-1, infinity + 9, infinity + 5], dtype=bits, device=device).view(dtype)
    assert a.isnan().all()
    assert compare(a, b) is None
    for number in (0.0, 1.0, float("inf")):
        other = b.clone()
        other[1] = number
        assert compare(a, other).index == (1,)
        assert compare(other, a).index == (1,)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64])
def test_integers_are_compared_too(dtype, device):
    a = torch.tensor([0, 1, 1], device=device).to(dtype)
    b = torch.tensor([0, 1, 0], device=device).to(dtype)
    assert compare(a, a.clone()) is None
    assert compare(a, b).index == (2,)


def test_form_counts(device):
    a = torch.ones(4, 6, device=device)
    assert "dtype is torch.float16" in compare(a, a.half()).sentence
    assert "shape is torch.Size([6, 4])" in compare(a, torch.ones(6, 4, device=device)).sentence
    assert "strides are (1, 4)" in compare(a, torch.ones(6, 4, device=device).t()).sentence
    assert "device is meta" in compare(a, torch.ones(4, 6, device="meta")).sentence


@pytest.mark.parametrize("wrong", [None, 1, "x", np.zeros(1), (torch.zeros(1), None), [[torch.zeros(1)]], {}], ids=str)
def test_what_is_no_tensor_is_named(wrong):
    for pair, name in (((wrong, torch.zeros(1)), "expected"), ((torch.zeros(1), wrong), "found")):
        with pytest.raises(
            TypeError, match=rf"^{name}(\[\d\])? is (None|an? [\w.]+); accepted: a tensor, or a tuple of"
        ):
            compare(*pair)


def test_a_dtype_of_too_many_bytes_is_named():
    x = torch.zeros(1, dtype=torch.complex128)
    with pytest.raises(TypeError, match=r"are of torch.complex128; accepted: dtypes of 1, 2, 4 or 8 bytes"):
        compare(x, x)


def test_strides_that_address_nothing_do_not_count(device):
    a = torch.ones(3, 1, 5, device=device)
    assert compare(a, torch.ones(3 * 99 * 5, device=device).as_strided((3, 1, 5), (5, 77, 1))) is None
    for shape in [(0,), (4, 0, 2)]:
        empty = torch.ones(shape, device=device)
        assert compare(empty, torch.empty_strided(shape, [7] * len(shape), device=device)) is None


def test_the_first_mismatch_is_reported(device):
    a = torch.zeros(5, 4, 3, device=device).transpose(0, 2)  # the first in order of index, not of memory
    b = a.clone(memory_format=torch.preserve_format)
    for index in [(1, 0, 0), (0, 3, 4), (2, 3, 1)]:
        b[index] = 1.0
    mismatch = compare(a, b)
    assert (mismatch.index, mismatch.count) == ((0, 3, 4), 3)
    assert mismatch.sentence == "differs at [0, 3, 4]: 0x3f800000 where the reference has 0x00000000 (3 of 60 elements)"


@given(data=st.data())
def test_one_flipped_bit_is_found(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    a = torch.ones(shape, dtype=torch.bfloat16)
    index = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    bit = data.draw(st.integers(0, 15))
    b = a.clone()
    b.view(torch.int16)[index] ^= -(1 << 15) if bit == 15 else 1 << bit
    assert compare(a, b).index == index


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_poison_is_nan_and_covers_all(dtype, device):
    assert poisoned(torch.zeros(7, 3, dtype=dtype, device=device)).isnan().all()
    assert poisoned(torch.zeros(0, 3, dtype=dtype, device=device)).shape == (0, 3)


# -- lookalike ----------------------------------------------------------------------------------------------------


def stride_class(stride: int) -> str:
    return "0" if stride == 0 else "1" if stride == 1 else "16n" if stride % 16 == 0 else "other"


@given(data=st.data())
def test_lookalike_holds_the_values_and_looks_alike(data):
    ndim = data.draw(st.integers(1, 4))
    shape = data.draw(st.lists(st.integers(2, 20), min_size=ndim, max_size=ndim))
    order = data.draw(st.permutations(range(ndim)))
    # from the innermost dimension out: dense, or with a gap
    stride, span = [0] * ndim, 1
    for dim in order:
        span *= data.draw(st.sampled_from([1, 1, 2, 3, 16]))
        stride[dim] = span
        span *= shape[dim]
    expanded = data.draw(st.sets(st.integers(0, ndim - 1), max_size=1))
    for dim in expanded:
        stride[dim] = 0
    offset = data.draw(st.sampled_from([0, 1, 8]))
    like = torch.zeros(offset + span, dtype=torch.bfloat16).as_strided(shape, stride, offset)

    # batteries keep inner sizes and the residue of the token count modulo 16, in which strides keep their class
    sizes = [n + 16 * data.draw(st.integers(0, 2)) for n in shape]
    values = torch.randn(sizes).to(torch.bfloat16)
    made = lookalike(like, values)

    assert made.dtype == like.dtype
    assert (made.data_ptr() % 16 == 0) == (like.data_ptr() % 16 == 0)
    assert list(made.shape) == sizes
    for dim in range(ndim):
        assert (made.stride(dim) == 0) == (dim in expanded)
        if dim in expanded:
            values = values.narrow(dim, 0, 1)
    assert compare(values.expand(sizes).contiguous(), made.contiguous()) is None
    found, wanted = ([stride_class(s) for s in t.stride()] for t in (made, like))
    # a class that can't be had together with the others may be missed, and then the layout stays unproved; but a
    # stride of 1 stays 1, and one that is a multiple of 16 stays one: the compiled kernel relies on these
    for mine, theirs in zip(found, wanted, strict=True):
        if theirs in ("0", "1", "16n"):
            assert mine == theirs


# -- verdicts -----------------------------------------------------------------------------------------------------


SWAPPED = next(m for m in SPLIT.mutants if m.name == "the sine's sign swapped")


def plan_of(mutant: Mutant):
    """A `plan` that launches the mutant of the operator's own kernel."""
    right = SimpleNamespace(tiers=SPLIT.tiers)  # as they are now: a test replaces them
    return lambda *tensors: mutant.plan(right, *tensors)


def replace_plan(monkeypatch, plan):
    monkeypatch.setattr(SPLIT, "tiers", (Tier("replaced", plan),))


def test_a_proof_is_made_once_per_signature(fresh_routes, device, monkeypatch):
    runs = []
    battery = SPLIT.battery
    monkeypatch.setattr(SPLIT, "battery", lambda *tensors: runs.append(tensors) or battery(*tensors))
    tensors = tensors_of("fp16", device)
    assert SPLIT.explain(*tensors) == []
    SPLIT(*tensors)
    SPLIT(*CASES["fp16"].arguments(device, tokens=9))  # another count of tokens: another route, the same kernel
    assert len(runs) == 1
    assert SPLIT.explain(*tensors_of("fp32", device)) == []
    assert len(runs) == 2
    proof.forget()
    SPLIT._routes.clear()
    SPLIT(*tensors)
    assert len(runs) == 3


def test_a_mismatch_condemns_one_signature_and_no_other(fresh_routes, device, monkeypatch):
    right, wrong_plan = SPLIT.tiers[0].plan, plan_of(SWAPPED)
    replace_plan(monkeypatch, lambda *t: (wrong_plan if t[0].dtype == torch.float16 else right)(*t))
    wrong = tensors_of("fp16", device)
    (reason,) = SPLIT.explain(*wrong)
    assert reason.startswith("differs at [")
    assert "0x" in reason
    assert "'live' inputs" in reason
    assert compare(SPLIT.reference(*wrong), SPLIT(*wrong)) is None
    assert SPLIT.explain(*tensors_of("fp32", device)) == []
    assert compare(SPLIT.reference(*tensors_of("fp32", device)), SPLIT(*tensors_of("fp32", device))) is None
    assert sorted(v.equal for v in proof.verdicts().values()) == [False, True]


def test_a_live_call_that_differs_condemns_too(fresh_routes, device, monkeypatch):
    """The battery passes, the user's own tensors don't: here because the battery's sines are all zero."""
    replace_plan(monkeypatch, plan_of(SWAPPED))
    monkeypatch.setattr(
        SPLIT, "battery", lambda *t: [("sines of zero", (t[0].clone(), t[1].clone(), torch.zeros_like(t[2])))]
    )
    x, cos, sin = tensors_of("fp32", device)
    route = SPLIT.route(x, cos, sin)
    assert route.reason is not None
    assert route.reason.startswith("differs at [")
    assert compare(SPLIT.reference(x, cos, sin), SPLIT(x, cos, sin)) is None
    (verdict,) = proof.verdicts().values()
    assert not verdict.equal


@pytest.fixture
def mean_in_python(recwarn):  # PyTorch warns that a kernel is overridden
    """Python code stands in for ATen's mean, as far as PyTorch knows; nothing here calls it."""
    lib = torch.library.Library("aten", "IMPL")

    def stand_in(device):
        lib.impl("mean.dim", lambda x, dim, keepdim=False, *, dtype=None: NotImplemented, device.type.upper())

    yield stand_in
    lib._destroy()


def test_where_python_code_adds_up_rows_every_layout_is_compared(fresh_routes, device, monkeypatch, mean_in_python):
    """Such code may choose by the number of rows, which no signature holds: torch's own RMSNorm does from 2.14 on."""
    stock = SPLIT.reference
    monkeypatch.setattr(SPLIT, "reference", lambda x, cos, sin: stock(x, cos, sin) * (-1 if x.shape[1] == 9 else 1))
    few, many = tensors_of("fp16", device), CASES["fp16"].arguments(device, tokens=9)
    assert SPLIT.route(*few).fused
    assert SPLIT.route(*many).fused, "one proof for both, which is wrong for such a reference"
    mean_in_python(device)
    assert SPLIT.route(*few).fused
    assert SPLIT.route(*many).mismatch is not None
    assert compare(SPLIT.reference(*many), SPLIT(*many)) is None


def test_what_stands_in_for_an_op_that_adds_up_rows_is_proved_anew(fresh_routes, device, monkeypatch, mean_in_python):
    runs = []
    battery = SPLIT.battery
    monkeypatch.setattr(SPLIT, "battery", lambda *tensors: runs.append(tensors) or battery(*tensors))
    tensors = tensors_of("fp16", device)
    SPLIT(*tensors)
    mean_in_python(device)
    SPLIT(*tensors)
    SPLIT(*tensors)
    assert len(runs) == 2


def raising(error: BaseException):
    def bind(self, args, outs):
        raise error

    return bind


def test_a_kernel_that_cannot_be_built_is_a_reason(fresh_routes, device, monkeypatch):
    tensors = tensors_of("fp16", device)
    monkeypatch.setattr(Plan, "bind", raising(RuntimeError("no such instruction\non this device")))
    (reason,) = SPLIT.explain(*tensors)
    assert reason == "the kernel can't be built or run here (RuntimeError: no such instruction on this device)"
    assert compare(SPLIT.reference(*tensors), SPLIT(*tensors)) is None


def test_a_kernel_that_raises_is_a_reason(fresh_routes, device, monkeypatch):
    """A mistake in the kernel's own source, found when it is first compiled or interpreted."""
    broken = Mutant("a name that does not exist", (("p1 = ", "p1 = no_such_name * "),))
    replace_plan(monkeypatch, plan_of(broken))
    tensors = tensors_of("fp16", device)
    (reason,) = SPLIT.explain(*tensors)
    assert reason.startswith("the kernel can't be built or run here (")
    assert "no_such_name" in reason
    assert compare(SPLIT.reference(*tensors), SPLIT(*tensors)) is None


def test_out_of_memory_is_not_remembered(fresh_routes, device, monkeypatch):
    tensors = tensors_of("fp16", device)
    with monkeypatch.context() as full:
        full.setattr(Plan, "bind", raising(torch.OutOfMemoryError("full")))
        assert SPLIT.explain(*tensors) == ["the device ran out of memory while it was being proved"]
        assert compare(SPLIT.reference(*tensors), SPLIT(*tensors)) is None
    assert proof.verdicts() == {}
    assert SPLIT.explain(*tensors) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, torch.AcceleratorError])
def test_what_is_not_the_kernels_fault_passes(error, fresh_routes, device, monkeypatch):
    tensors = tensors_of("fp16", device)
    monkeypatch.setattr(Plan, "bind", raising(error("no")))
    with pytest.raises(error):
        SPLIT(*tensors)
    assert proof.verdicts() == {}
    monkeypatch.undo()
    assert SPLIT.explain(*tensors) == []


def test_a_battery_of_another_layout_proves_nothing(fresh_routes, device, monkeypatch):
    other = tensors_of("fp32", device)
    monkeypatch.setattr(SPLIT, "battery", lambda *tensors: [("odd", other)])
    (reason,) = SPLIT.explain(*tensors_of("fp16", device))
    assert reason == "the battery has no 'odd' inputs of this layout, so it stays unproved"


@pytest.mark.parametrize(
    "operator",
    [pytest.param(o, marks=() if o in ONE_OF_EACH_FILE else pytest.mark.slow) for o in OPERATORS.values()],
    ids=lambda operator: operator.name,
)
def test_a_battery_leaves_random_state_alone(operator, fresh_routes, device):
    tensors = operator.cases[0].arguments(device, tokens=2)

    def states():
        cuda = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
        return [torch.get_rng_state(), *cuda], random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    assert operator.verdict(*tensors).equal
    after = states()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]


def test_a_battery_feeds_the_same_values_every_time(device):
    tensors = tensors_of("fp16", device)
    first, again = (list(SPLIT.battery(*tensors)) for _ in range(2))
    assert [family for family, _ in first] == [family for family, _ in again]
    for (_, a), (_, b) in zip(first, again, strict=True):
        assert [compare(x, y) for x, y in zip(a, b, strict=True)] == [None] * len(a)
