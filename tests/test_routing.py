"""Where a call goes, and the sentence that says why: never an exception of ours, never a wrong bit, never silence."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import random
import subprocess
import sys
import threading
import types
import warnings
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bitfuse
from bitfuse.core import conditions, proof
from bitfuse.core import operator as operator_module
from bitfuse.core.bits import as_tuple
from bitfuse.core.kernel import Kernel
from bitfuse.core.operator import Tier
from bitfuse.ops import rope
from bitfuse.ops.rope import INTERLEAVED_FP32, INTERLEAVED_PER_OP, SPLIT_FP32, SPLIT_PER_OP
from common import ONE_OF_EACH_FILE, ROTARY, on_tensors, small, tensors_of

OPERATORS = ONE_OF_EACH_FILE
each = pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
each_rotary = pytest.mark.parametrize("operator", ROTARY, ids=lambda o: o.name)
# What is of all operators alike, by the one whose layouts are easily changed: further ones are slow
first_rotary = pytest.mark.parametrize(
    "operator",
    [pytest.param(o, marks=() if o is ROTARY[0] else pytest.mark.slow) for o in ROTARY],
    ids=lambda o: o.name,
)


def further(quick, *others):
    """Parameters of which `make test` has the first ones, and `make test-all` the others too."""
    return [*quick, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


@pytest.fixture(autouse=True)
def _no_routes():
    """No layout decided yet; verdicts stay, so that each signature is proved once for the whole file."""
    bitfuse.enable()
    yield
    bitfuse.enable()


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels run here


def inputs(operator, device=DEVICE, tokens=5):
    return small(operator, device, tokens)


class Raised(str):
    """The type and text of an exception."""


def outcome(fn, args):
    """What a call gives: its result, or what it raises."""
    try:
        return fn(*args)
    except Exception as error:
        return Raised(f"{type(error).__name__}: {error}")


def assert_same(expected, found):
    assert type(found) is type(expected)
    if isinstance(expected, Raised):
        assert found == expected
        return
    for a, b in zip(as_tuple(expected), as_tuple(found), strict=True):
        _assert_same(a, b)


def _assert_same(expected, found):
    assert found.requires_grad == expected.requires_grad
    if expected.device.type == "meta" or hasattr(expected, "fake_device"):
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
    else:
        assert bitfuse.compare(expected.detach(), found.detach()) is None


def assert_one_sentence(reason):
    assert "\n" not in reason
    assert reason.strip() == reason
    assert 10 < len(reason) < 300


def assert_falls_back(operator, tensors, cause):
    route = operator.route(*tensors)
    assert not route.fused
    assert_one_sentence(route.reason)
    assert cause in route.reason
    assert route.reason in bitfuse.explain(operator, *tensors)
    assert_same(outcome(operator.reference, tensors), outcome(operator, tensors))


def assert_fuses(operator, tensors):
    assert bitfuse.explain(operator, *tensors) == []
    assert operator.route(*tensors).fused
    assert_same(operator.reference(*tensors), operator(*tensors))


# -- what a tensor may be ------------------------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


class ParameterSubclass(torch.nn.Parameter):
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data)


def _all(change):
    return lambda *args: on_tensors(change, args)


def _x(change):
    return lambda x, *others: (change(x), *others)


def _cos(change):
    return lambda x, cos, *rest: (x, change(cos), *rest)


FAKE = FakeTensorMode()

TENSORS = {
    "fp64": (_all(torch.Tensor.double), "torch.float64"),
    "int": (_x(torch.Tensor.int), "torch.int32"),
    "bool": (_x(torch.Tensor.bool), "torch.bool"),
    "complex": (_x(lambda x: x.to(torch.complex64)), "torch.complex64"),
    "fp8": (_x(lambda x: x.to(torch.float8_e4m3fn)), "torch.float8_e4m3fn"),
    "x on meta": (_x(lambda x: x.to("meta")), "meta"),
    "all on meta": (_all(lambda t: t.to("meta")), "the tensors are on meta"),
    "negation pending": (_x(torch._neg_view), "{x} is a lazy view"),
    "subclass": (_x(lambda x: x.as_subclass(Subclass)), "{x} is a Subclass"),
    "subclass of Parameter": (_x(lambda x: ParameterSubclass(x)), "{x} is a ParameterSubclass"),
    "fake": (_all(FAKE.from_tensor), "{x} is a FakeTensor"),
    "sparse": (_x(torch.Tensor.to_sparse), "sparse"),
    "mkldnn": (_x(lambda x: x.cpu().to_mkldnn()), "mkldnn"),
}

TABLES = {
    "fp64": (lambda x, *tables: (x, *(t.double() for t in tables)), "torch.float64"),
    "cos and sin of two dtypes": (_cos(torch.Tensor.half), "they must have one dtype"),
    "cos on meta": (_cos(lambda cos: cos.to("meta")), "cos is on meta"),
    "negation pending": (_cos(torch._neg_view), "cos is a lazy view"),
    "sparse": (_cos(torch.Tensor.to_sparse), "sparse"),
}


@each
@pytest.mark.parametrize("kind", TENSORS)
def test_other_tensors_run_the_reference(operator, kind):
    change, cause = TENSORS[kind]
    first, *_ = inspect.signature(operator.reference).parameters
    assert_falls_back(operator, change(*inputs(operator)), cause.replace("{x}", first))


@each_rotary
@pytest.mark.parametrize("kind", TABLES)
def test_other_tables_run_the_reference(operator, kind):
    change, cause = TABLES[kind]
    assert_falls_back(operator, change(*inputs(operator)), cause)


@pytest.mark.parametrize("operator", [SPLIT_PER_OP, INTERLEAVED_PER_OP], ids=lambda o: o.name)
@pytest.mark.parametrize(("x", "tables"), [(torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32)], ids=str)
def test_the_chain_that_rounds_every_op_takes_one_dtype(operator, x, tables):
    given_x, cos, sin = inputs(operator)
    assert_falls_back(operator, (given_x.to(x), cos.to(tables), sin.to(tables)), "takes them alike")


@each
def test_empty_tensors_run_the_reference(operator, device):
    assert_falls_back(operator, inputs(operator, device, tokens=0), "empty")


@each
def test_plain_tensors_and_parameters_are_fused(operator, device):
    tensors = inputs(operator, device)
    assert_fuses(operator, tensors)
    with torch.no_grad():
        assert_fuses(operator, on_tensors(torch.nn.Parameter, tensors))
    with torch.inference_mode():
        assert_fuses(operator, on_tensors(torch.clone, tensors))


@each
def test_cpu_tensors_without_the_interpreter(operator, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert_falls_back(operator, inputs(operator, "cpu"), "TRITON_INTERPRET=1")


@pytest.mark.parametrize(("capability", "older"), [((7, 5), True), ((8, 0), False), ((12, 0), False)])
def test_a_gpu_without_bf16_runs_the_reference(capability, older, monkeypatch):
    """Triton's compiler would emulate bf16's instructions there: as doctor says, nothing is fused."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        x = torch.empty(1, 3, 8, device="cuda", dtype=torch.bfloat16)
    reasons = [reason for reason in conditions.runnable({"x": x}) if "sm_" in reason]
    assert reasons == (["cuda:0 is older than sm_80, and has no bf16 arithmetic"] if older else [])


@each
def test_inputs_are_never_written(operator, device):
    args = inputs(operator, device)
    copies = [t.clone(memory_format=torch.contiguous_format) for t in tensors_of(args)]
    assert operator.route(*args).fused
    operator(*args)
    for before, t in zip(copies, tensors_of(args), strict=True):
        assert bitfuse.compare(before, t.contiguous()) is None


# -- gradients and transforms --------------------------------------------------------------------------------------


def _leaves(args, wanted):
    """The arguments, each tensor a leaf; gradients are required of those whose index among the tensors is wanted."""
    count = itertools.count()
    return on_tensors(lambda t: t.detach().clone().requires_grad_(next(count) in wanted), args)


def _gradients(fn, args, wanted):
    leaves = _leaves(args, wanted)
    outs = as_tuple(fn(*leaves))
    reached = [t for t in outs if t.requires_grad]
    cotangents = [torch.linspace(-2, 2, t.numel(), device=t.device).reshape(t.shape).to(t.dtype) for t in reached]
    torch.autograd.backward(reached, cotangents)
    return outs, [leaf.grad for leaf in tensors_of(leaves)]


@each
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1, 2)], ids=str)
def test_gradients_flow_and_equal_the_references(operator, wanted, device):
    args = inputs(operator, device)
    wanted = [i for i in wanted if i < len(tensors_of(args))] or [0]
    assert "a gradient is required" in operator.route(*_leaves(args, wanted)).reason
    with torch.no_grad():
        assert operator.route(*_leaves(args, wanted)).fused
    outs, gradients = _gradients(operator, args, wanted)
    expected_outs, expected = _gradients(operator.reference, args, wanted)
    assert_same(expected_outs, outs)
    for i, (a, b) in enumerate(zip(expected, gradients, strict=True)):
        assert (b is None) == (i not in wanted)
        assert a is None or bitfuse.compare(a, b) is None


@each
def test_a_forward_mode_tangent_is_not_lost(operator, device):
    x, *others = inputs(operator, device)
    assert operator.route(x, *others).fused  # the same layout, already decided without a tangent
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert not operator.route(dual, *others).fused
        chain, ours = (as_tuple(fn(dual, *others)) for fn in (operator.reference, operator))
        tangents = []
        for expected, found in zip(map(forward_ad.unpack_dual, chain), map(forward_ad.unpack_dual, ours), strict=True):
            assert_same(expected.primal, found.primal)
            assert (found.tangent is None) == (expected.tangent is None)  # of outputs that x has no part in
            if found.tangent is not None:
                tangents.append(found.tangent)
                assert_same(expected.tangent, found.tangent)
        assert tangents


# Each takes a function of tensors and calls it with tensors that have a dimension more.
TRANSFORMS = {
    "vmap": lambda fn: torch.func.vmap(fn),
    "grad": lambda fn: torch.func.grad(lambda *t: _first(fn(*(v[0] for v in t))).float().sum()),
    "jvp": lambda fn: lambda *t: torch.func.jvp(fn, tuple(v[0] for v in t), tuple(v[1] for v in t))[1],
    "functionalize": lambda fn: torch.func.functionalize(lambda *t: fn(*(v[0] for v in t))),
}


def _first(result):
    return as_tuple(result)[0]


def _with_others(fn, args, tensors):
    """A call with these tensors in the places of those among the arguments."""
    remaining = iter(tensors)
    return fn(*on_tensors(lambda _: next(remaining), args))


@each
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("decided", [False, True], ids=["undecided", "decided"])
def test_functorch_sees_the_reference(operator, transform, decided, device):
    args = inputs(operator, device)
    stacked = [torch.stack([t, t.flip(0)]) for t in tensors_of(args)]

    if decided:  # a layout remembered outside the transform must not be taken for one inside it
        assert _with_others(operator.route, args, [v[0] for v in stacked]).fused
    reasons = []

    def call(*inside):
        reasons.append(_with_others(operator.explain, args, inside))
        return _with_others(operator, args, inside)

    expected = TRANSFORMS[transform](lambda *inside: _with_others(operator.reference, args, inside))(*stacked)
    assert_same(expected, TRANSFORMS[transform](call)(*stacked))
    assert "functorch" in reasons[0][0]


# -- what may be going on around the call --------------------------------------------------------------------------


class Dispatch(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Dispatch.seen += 1
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        Function.seen += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def autocast(device_type):
    """`torch.autocast`, also for a device type that this build of torch can't use."""
    before = torch.is_autocast_enabled(device_type)
    torch.set_autocast_enabled(device_type, True)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before)


@contextlib.contextmanager
def switched_off():
    bitfuse.disable()
    try:
        yield
    finally:
        bitfuse.enable()


AROUND = {
    "autocast on cpu": (lambda: autocast("cpu"), "autocast"),
    "autocast on cuda": (lambda: autocast("cuda"), "autocast"),
    "dispatch mode": (Dispatch, "dispatch or function mode"),
    "function mode": (Function, "dispatch or function mode"),
    "switched off": (switched_off, "bitfuse is off"),
}


@each
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("plain_first", [False, True], ids=["undecided", "decided"])
def test_what_is_going_on_around_a_call(operator, around, plain_first, device):
    manager, cause = AROUND[around]
    tensors = inputs(operator, device)
    if plain_first:
        assert operator.route(*tensors).fused
    with manager():
        assert_falls_back(operator, tensors, cause)
    assert_fuses(operator, tensors)


@each
@pytest.mark.parametrize("mode", [Dispatch, Function])
def test_a_mode_sees_every_op_of_the_chain(operator, mode, device):
    tensors = inputs(operator, device)
    assert operator.route(*tensors).fused
    counts = []
    for fn in (operator.reference, operator):
        mode.seen = 0
        with mode():
            fn(*tensors)
        counts.append(mode.seen)
    assert counts[0] >= 1  # GELU is one op
    # a function mode also sees what the decision asks the tensors for; no op of the chain may be missing
    assert counts[1] >= counts[0]


@each
@pytest.mark.parametrize("default", further(["meta"], "cpu"))
def test_a_default_device_is_no_reason(operator, default, device, fresh_routes):
    with torch.device(default):  # what torch.set_default_device enters: a function mode of its own
        assert_fuses(operator, _with_device(operator, device))
    assert_fuses(operator, inputs(operator, device))


def _with_device(operator, device):
    with torch.device(device):  # the innermost default wins while the inputs are made
        return inputs(operator, device)


@each
@pytest.mark.parametrize("mode_first", [False, True])
def test_a_default_device_is_not_taken_for_another_mode(operator, mode_first, device):
    tensors = inputs(operator, device)
    if mode_first:
        with Function():
            assert not operator.route(*tensors).fused
    with torch.device(device):
        assert operator.route(*tensors).fused
    with Function():
        assert not operator.route(*tensors).fused


@each
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_jit_trace_gets_the_chain_without_a_warning(operator, device):
    args = inputs(operator, device)
    assert operator.route(*args).fused
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced, expected = (
            torch.jit.trace(lambda *t, fn=fn: _with_others(fn, args, t), tuple(tensors_of(args)), check_trace=False)
            for fn in (operator, operator.reference)
        )
    kinds = [[node.kind() for node in t.graph.nodes() if node.kind().startswith("aten::")] for t in (expected, traced)]
    assert kinds[0] == kinds[1]
    assert_same(operator.reference(*args), traced(*tensors_of(args)))


@each
def test_make_fx_gets_the_chain(operator, device):
    args = inputs(operator, device)
    assert operator.route(*args).fused
    graphs = [
        make_fx(lambda *t, fn=fn: _with_others(fn, args, t))(*tensors_of(args)).code
        for fn in (operator.reference, operator)
    ]
    assert "torch.ops.aten" in graphs[0]
    assert graphs[0] == graphs[1]


def _compiled(fn, tensors, backend):
    """The result under torch.compile, no graph break allowed, and the graph that dynamo made."""
    from torch._dynamo.backends.registry import lookup_backend

    graphs = []

    def spy(graph, example_inputs):
        graphs.append([(node.op, str(node.target)) for node in graph.graph.nodes])
        return lookup_backend(backend)(graph, example_inputs)

    torch.compiler.reset()
    out = torch.compile(lambda *t: fn(*t), fullgraph=True, backend=spy)(*tensors)
    return out, graphs


@each
@pytest.mark.parametrize("backend", further(["aot_eager"], "eager"))
def test_torch_compile_gets_the_chain(operator, backend, device):
    tensors = inputs(operator, device)
    assert operator.route(*tensors).fused
    out, graphs = _compiled(operator, tensors, backend)
    expected, expected_graphs = _compiled(operator.reference, tensors, backend)
    assert len(graphs) == 1
    assert graphs == expected_graphs
    assert not any("bitfuse" in target for _, target in graphs[0])
    assert_same(expected, out)
    assert_same(operator.reference(*tensors), out)


@each
def test_nothing_is_asked_of_the_device_during_a_capture(operator, device, fresh_routes, monkeypatch):
    """A GPU test captures for real; this one shows, anywhere, that no probe and no battery starts, or is kept."""
    tensors = inputs(operator, device)
    capturing = [True]
    monkeypatch.setattr(conditions, "capturing", lambda t: capturing[0])
    for name in ("run_battery", "compare_live"):
        monkeypatch.setattr(proof, name, lambda *args: pytest.fail("a battery started"))
    monkeypatch.setattr(rope, "addcmul_fuses", lambda *args: pytest.fail("a probe started"))
    assert_falls_back(operator, tensors, "a CUDA graph is being captured")
    monkeypatch.undo()
    assert_fuses(operator, tensors)  # the capture's answer was not kept
    monkeypatch.setattr(conditions, "capturing", lambda t: capturing[0])
    assert operator.route(*tensors).fused  # and what was decided before a capture holds in it
    assert bitfuse.explain(operator, *tensors) == []


# -- the switch, and an installation without Triton ----------------------------------------------------------------


def _python(code, **env):
    """Run code in a fresh interpreter; `env` replaces variables, None removes one."""
    full = {**os.environ, **env}
    full = {name: value for name, value in full.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=full, timeout=120)


EXPLAIN = """
import torch, bitfuse
from bitfuse.ops.rope import SPLIT_PER_OP
x, cos, sin = SPLIT_PER_OP.cases[8].arguments("cpu")
print("\\n".join(bitfuse.explain("split_rotary_per_op", x, cos, sin)))
assert bitfuse.compare(SPLIT_PER_OP.reference(x, cos, sin), bitfuse.apply_split_rotary_emb(x, (cos, sin))) is None
print(SPLIT_PER_OP.route(x, cos, sin).fused)
"""


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        ("0", ["bitfuse is off (BITFUSE=0 or bitfuse.disable())", "False"]),
        ("1", ["True"]),
        pytest.param(None, ["True"], marks=pytest.mark.slow),  # as in every other test
    ],
)
def test_the_environment_switch(value, lines):
    done = _python(EXPLAIN, BITFUSE=value, TRITON_INTERPRET="1")
    assert (done.stdout.split("\n")[:-1], done.returncode) == (lines if len(lines) > 1 else ["", *lines], 0), done


@pytest.mark.parametrize("value", further(["off"], "", "2", "true"))
def test_a_bad_switch_says_what_is_accepted(value):
    done = _python("import bitfuse", BITFUSE=value)
    assert done.returncode == 1
    assert f"ValueError: the environment variable BITFUSE is {value!r}; accepted: 0 (off) or 1" in done.stderr


def test_without_triton_the_chain_runs():
    done = _python("import sys; sys.modules['triton'] = None\n" + EXPLAIN, TRITON_INTERPRET="1")
    assert (done.stdout, done.returncode) == ("Triton is not installed\nFalse\n", 0), done.stderr


@each
def test_off_means_off_even_while_a_decision_is_made(operator, device, monkeypatch):
    tensors = inputs(operator, device)
    assert operator.route(*tensors).fused
    bitfuse.enable()  # forgets the route
    first, *others = operator.tiers

    def plan_and_switch_off(*given):
        bitfuse.disable()  # as another thread might, between the predicate and the moment the route is kept
        return first.plan(*given)

    monkeypatch.setattr(operator, "tiers", (replace(first, plan=plan_and_switch_off), *others))
    operator(*tensors)
    monkeypatch.undo()
    assert_falls_back(operator, tensors, "bitfuse is off")


# -- all the reasons -----------------------------------------------------------------------------------------------


@each
def test_explain_lists_every_reason(operator, device):
    tensors = on_tensors(lambda t: t.double().requires_grad_(), inputs(operator, device))
    bitfuse.disable()
    with autocast("cpu"), Function():
        reasons = bitfuse.explain(operator, *tensors)
    causes = ["bitfuse is off", "a gradient is required", "autocast", "function mode", "torch.float64"]
    assert [any(cause in reason for reason in reasons) for cause in causes] == [True] * len(causes), reasons


@each_rotary
def test_explain_lists_every_reason_of_an_odd_tensor_too(operator):
    x, *tables = inputs(operator)
    bitfuse.disable()
    reasons = bitfuse.explain(operator, x.double().as_subclass(Subclass), *map(torch._neg_view, tables))
    causes = ["bitfuse is off", "x is a Subclass", "cos is a lazy view", "sin is a lazy view", "torch.float64"]
    assert [any(cause in reason for reason in reasons) for cause in causes] == [True] * len(causes), reasons


def test_explain_takes_a_name_and_refuses_others(device):
    tensors = inputs(SPLIT_PER_OP, device)
    assert bitfuse.explain("split_rotary_per_op", *tensors) == []
    with pytest.raises(ValueError, match=r"operator is 'rope'; accepted: .*split_rotary_per_op"):
        bitfuse.explain("rope", *tensors)


# -- shapes that don't fit -----------------------------------------------------------------------------------------

MISFITS = {
    "x of two dimensions": (SPLIT_PER_OP, (5, 24), (2, 3, 5, 4), "x is [5, 24]; accepted with cos"),
    "another token count": (SPLIT_FP32, (2, 6, 24), (2, 3, 5, 4), "x is [2, 6, 24]; accepted with cos"),
    "another width": (SPLIT_PER_OP, (2, 5, 20), (2, 3, 5, 4), "accepted with cos [2, 3, 5, 4]: [2, 5, 24]"),
    "tables of three dimensions": (SPLIT_PER_OP, (2, 5, 24), (2, 5, 8), "cos is [2, 5, 8]; accepted: [B, H, T, D/2]"),
    "tables of batch 1 in diffusers": (SPLIT_FP32, (2, 5, 24), (1, 3, 5, 4), "x is [2, 5, 24]; accepted with cos"),
    "an odd width": (INTERLEAVED_FP32, (2, 5, 7), (2, 5, 7), "x is [2, 5, 7]; accepted: [B, T, C] with an even C"),
    "another width of the tables": (INTERLEAVED_PER_OP, (2, 5, 8), (2, 5, 4), "cos is [2, 5, 4]; accepted: [2, 5, 8]"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_misfit_names_the_argument_what_was_given_and_what_is_accepted(misfit, device):
    operator, x, table, text = MISFITS[misfit]
    tensors = tuple(torch.ones(shape, device=device) for shape in (x, table, table))
    assert isinstance(outcome(operator.reference, tensors), Raised)  # the reference fails, too
    for call in (operator, operator.explain, operator.route):
        with pytest.raises(ValueError, match="accepted") as caught:
            call(*tensors)
        assert text in str(caught.value)
        assert str(caught.value).startswith(operator.name)
        assert f"given x {list(x)}, cos {list(table)}, sin {list(table)}" in str(caught.value)


def test_sin_of_another_shape_is_a_misfit(device):
    x, cos, _ = inputs(SPLIT_PER_OP, device)
    with pytest.raises(ValueError, match=r"sin is \[2, 3, 4, 3\]; accepted: the shape of cos, \[2, 3, 5, 3\]"):
        SPLIT_PER_OP(x, cos, cos[:, :, :4])


SIZES = st.sampled_from([0, 1, 2, 3, 4, 6])


@st.composite
def shape_triples(draw):
    """(x, cos, sin): shapes that fit, with up to three changes, each of which may or may not matter."""
    b, h, t, half = (draw(SIZES) for _ in range(4))
    x = draw(st.sampled_from([[b, t, 2 * h * half], [b, h, t, 2 * half]]))
    cos = draw(st.sampled_from([[b, h, t, half], list(x), [1, h, t, half], x[1:], [1, *x[1:]]]))
    shapes = [list(x), list(cos), list(cos)]
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        which = draw(st.sampled_from([shapes[0], shapes[1], shapes[2], None]))
        for shape in shapes[1:] if which is None else [which]:
            at = draw(st.integers(0, len(shape)))
            change = draw(st.sampled_from(["size", "drop", "insert"]))
            if change == "insert":
                shape.insert(at, draw(SIZES))
            elif at < len(shape):
                shape[at : at + 1] = [draw(SIZES)] if change == "size" else []
    return tuple(map(tuple, shapes))


# The same examples every time, however long they take
_EVERY_TIME = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def _filled(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@each_rotary
@pytest.mark.parametrize("examples", further([300], 800))
def test_a_call_raises_exactly_where_the_reference_raises(operator, examples):
    """With kernels out of reach (no interpreter), so that only the predicate is asked."""
    fits, odd, misfits = set(), set(), set()

    @settings(_EVERY_TIME, max_examples=examples)
    @given(shapes=shape_triples())
    def check(shapes):
        tensors = _filled(shapes)
        expected, found = outcome(operator.reference, tensors), outcome(operator, tensors)
        if isinstance(expected, torch.Tensor):
            assert_same(expected, found)
            reasons = bitfuse.explain(operator, *tensors)
            (odd if any("in its own way" in reason for reason in reasons) else fits).add(shapes)
        else:
            assert isinstance(found, Raised), f"the reference raises {expected}"
            assert found == expected or found.startswith("ShapeError")
            misfits.add(shapes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        check()
    assert min(len(fits), len(odd), len(misfits)) >= 10  # each of the three answers was met


@each_rotary
@pytest.mark.parametrize("examples", further([300], 600))
def test_what_fits_is_what_the_kernel_computes(operator, examples, device):
    """Whatever shapes the predicate has nothing against, the bare kernel gives the reference's bits for them."""
    launched = set()

    @settings(_EVERY_TIME, max_examples=examples)
    @given(shapes=shape_triples())
    def check(shapes):
        tensors = tuple(t.to(device) for t in _filled(shapes, torch.bfloat16))
        try:
            if next(operator.why_not(*tensors), None) is not None:
                return
        except ValueError:
            return
        launched.add(shapes)
        assert bitfuse.compare(operator.reference(*tensors), operator.launch(*tensors)) is None

    check()
    assert len(launched) >= 8


# -- decided once --------------------------------------------------------------------------------------------------


def _counting(operator, monkeypatch):
    asked, why_not = [], operator.why_not

    def count(*tensors):
        asked.append(tensors)
        return why_not(*tensors)

    monkeypatch.setattr(operator, "why_not", count)
    return asked


@each
@pytest.mark.parametrize("fused", [True, False])
def test_a_layout_is_decided_once(operator, fused, device, monkeypatch):
    tensors = inputs(operator, device) if fused else on_tensors(torch.Tensor.double, inputs(operator, device))
    asked = _counting(operator, monkeypatch)
    for _ in range(5):
        again = on_tensors(lambda t: t.clone(memory_format=torch.preserve_format), tensors)
        assert operator.route(*again).fused == fused
        operator(*again)
    assert len(asked) == 1


@first_rotary
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.float(),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape),
        lambda x: x.clone().requires_grad_(),
        lambda x: x.as_subclass(Subclass),
        torch._neg_view,
        lambda x: x.to("meta"),
    ],
    ids=["dtype", "order", "strides", "alignment", "requires_grad", "subclass", "negation", "device"],
)
def test_another_layout_is_decided_anew(operator, change, device, monkeypatch):
    x, cos, sin = inputs(operator, device)
    operator.route(x, cos, sin)
    asked = _counting(operator, monkeypatch)
    operator.route(change(x), cos, sin)
    assert len(asked) == 1


@each
def test_the_dictionary_of_routes_is_bounded(operator, monkeypatch):
    monkeypatch.setattr(operator_module, "_ROUTES_KEPT", 8)
    for tokens in range(1, 50):
        operator(*on_tensors(torch.Tensor.double, inputs(operator, tokens=tokens)))
        assert len(operator._routes) <= 8
    assert operator._routes


# -- threads and fuzz ----------------------------------------------------------------------------------------------


def test_threads_that_switch_on_and_off(device):
    """16 threads call while two more switch: every result is the reference's, whichever way it came."""
    work = [(operator, t, operator.reference(*t)) for operator in OPERATORS for t in [inputs(operator, device)]]
    assert all(operator.route(*t).fused for operator, t, _ in work)
    wrong, ways, stop = [], set(), threading.Event()

    def call(seed):
        for i in range(12):
            operator, tensors, expected = work[(seed + i) % len(work)]
            try:
                ways.add(operator.route(*tensors).fused)
                if mismatch := bitfuse.compare(expected, operator(*tensors)):
                    wrong.append(mismatch)
            except Exception as error:
                wrong.append(error)

    def switch():
        while not stop.wait(0.003):
            bitfuse.disable()
            stop.wait(0.003)
            bitfuse.enable()

    switches = [threading.Thread(target=switch) for _ in range(2)]
    callers = [threading.Thread(target=call, args=(i,)) for i in range(16)]
    for thread in (*switches, *callers):
        thread.start()
    for thread in callers:
        thread.join()
    stop.set()
    for thread in switches:
        thread.join()
    assert wrong == []
    assert ways == {True, False}


def _anything(rng, operator):
    """Three tensors of any kind. Half of them start from shapes that fit."""
    shapes = [t.shape for t in inputs(operator, tokens=rng.choice([0, 1, 3]))]
    if rng.random() < 0.5:
        shapes = [[rng.choice([0, 1, 2, 3, 4, 18]) for _ in range(rng.randint(0, 5))] for _ in shapes]
        if shapes[0] and rng.random() < 0.1:
            shapes[0][0] = 70_000
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.bool, torch.complex64]
    found = []
    for shape in shapes:
        strides = [rng.choice([0, 1, 2, 3, 16, 160]) for _ in shape]
        t = torch.empty_strided(tuple(shape), strides, dtype=rng.choice(dtypes), device="meta")
        if rng.random() < 0.7 and t.untyped_storage().nbytes() < 1 << 20:
            t = torch.zeros(t.untyped_storage().nbytes() // t.element_size() + 1, dtype=t.dtype)
            t = t.as_strided(shape, strides, rng.randint(0, 1))
        kind = rng.randint(0, 9)
        if kind == 0 and (t.is_floating_point() or t.is_complex()):
            t = torch.nn.Parameter(t)
        elif kind == 1:
            t = t.as_subclass(Subclass)
        elif kind == 2 and t.dtype != torch.bool:
            t = torch._neg_view(t)
        found.append(t)
    return found


@pytest.mark.parametrize("seed", further([0], 1, 2, 3))
def test_a_decision_never_raises_but_for_a_misfit(seed, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    rng = random.Random(seed)
    answers = {"misfit": 0, "reason": 0}
    for operator in itertools.islice(itertools.cycle(ROTARY), 3000):
        tensors = _anything(rng, operator)
        answer = outcome(operator.route, tensors)
        if isinstance(answer, Raised):
            assert answer.startswith(f"ShapeError: {operator.name}")
            answers["misfit"] += 1
        else:
            assert_one_sentence(answer.reason)
            answers["reason"] += 1
    assert min(answers.values()) > 100


# -- the seed's names ----------------------------------------------------------------------------------------------


def _seed_inputs(device, x_dtype=torch.bfloat16, table_dtype=torch.bfloat16, batch=2, table_batch=2, four_d=False):
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(batch, 5, 3, 6, generator=generator, device=device).to(x_dtype)
    angle = 9 * torch.randn(table_batch, 5, 3, 3, generator=generator, device=device)
    tables = (v.to(table_dtype).swapaxes(1, 2) for v in (angle.cos(), angle.sin()))
    return (x.swapaxes(1, 2) if four_d else x.flatten(2), *tables)


@pytest.mark.parametrize(
    ("four_d", "table_batch"),
    [(False, 2), (True, 1), *(pytest.param(*v, marks=pytest.mark.slow) for v in ((True, 2), (False, 1)))],
    ids=["[B, T, H*D]", "[B, H, T, D], one table", "[B, H, T, D]", "[B, T, H*D], one table"],
)
@pytest.mark.parametrize(
    ("x_dtype", "table_dtype", "operator"),
    [
        (torch.bfloat16, torch.bfloat16, SPLIT_PER_OP),
        (torch.bfloat16, torch.float32, SPLIT_FP32),
        (torch.float16, torch.float32, SPLIT_FP32),
        (torch.float32, torch.float32, SPLIT_PER_OP),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_apply_split_rotary_emb(x_dtype, table_dtype, operator, table_batch, four_d, device):
    x, cos, sin = _seed_inputs(device, x_dtype, table_dtype, table_batch=table_batch, four_d=four_d)
    whole = tuple(t.expand(2, -1, -1, -1) for t in (cos, sin))
    expected = operator.reference(x, *whole)
    assert operator.route(x, *(whole if x.ndim == 3 else (cos, sin))).fused
    assert bitfuse.compare(expected, bitfuse.apply_split_rotary_emb(x, (cos, sin))) is None
    assert bitfuse.compare(expected, bitfuse.apply_ltx2_split_rotary_emb(x, *whole)) is None


def test_apply_split_rotary_emb_falls_back_with_the_same_result(device):
    x, cos, sin = _seed_inputs(device)
    for tensors, cause in (
        ((x.clone().requires_grad_(), cos, sin), "a gradient is required of x"),
        ((x.double(), cos.double(), sin.double()), "torch.float64"),
        ((x, cos, sin.float()), "they must have one dtype"),
    ):
        assert cause in SPLIT_PER_OP.route(*tensors).reason
        assert_same(SPLIT_PER_OP.reference(*tensors), bitfuse.apply_split_rotary_emb(tensors[0], tensors[1:]))


def test_apply_split_rotary_emb_under_torch_compile(device):
    x, cos, sin = _seed_inputs(device)
    out, graphs = _compiled(lambda *t: bitfuse.apply_split_rotary_emb(t[0], t[1:]), (x, cos, sin), "aot_eager")
    assert len(graphs) == 1
    assert_same(SPLIT_PER_OP.reference(x, cos, sin), out)


def test_apply_ltx2_split_rotary_emb_launches_and_nothing_else(device, monkeypatch):
    """No proof and no fallback: the answer is the kernel's own even where a battery would refuse it."""
    x, cos, sin = _seed_inputs(device)
    mutant = next(m for m in SPLIT_PER_OP.mutants if m.name == "the sine's sign swapped")
    stock = types.SimpleNamespace(tiers=SPLIT_PER_OP.tiers)
    monkeypatch.setattr(SPLIT_PER_OP, "tiers", (Tier("wrong", lambda *args: mutant.plan(stock, *args)),))
    found = bitfuse.apply_ltx2_split_rotary_emb(x, cos, sin)
    assert bitfuse.compare(SPLIT_PER_OP.reference(x, cos, sin), found) is not None
    assert bitfuse.compare(SPLIT_PER_OP.reference(x, cos, -sin), found) is None


def test_apply_ltx2_split_rotary_emb_prepares_a_layout_once(device, monkeypatch):
    planned, (tier,) = [], SPLIT_PER_OP.tiers
    counting = replace(tier, plan=lambda *args: planned.append(args) or tier.plan(*args))
    monkeypatch.setattr(SPLIT_PER_OP, "tiers", (counting,))
    x, cos, sin = _seed_inputs(device)
    for _ in range(3):
        found = bitfuse.apply_ltx2_split_rotary_emb(x, cos, sin)
        assert bitfuse.compare(SPLIT_PER_OP.reference(x, cos, sin), found) is None
    assert len(planned) == 1
    with autocast("cpu"), pytest.raises(ValueError, match="autocast"):  # prepared, and refused all the same
        bitfuse.apply_ltx2_split_rotary_emb(x, cos, sin)
    bitfuse.apply_ltx2_split_rotary_emb(x[:, :4], cos[:, :, :4], sin[:, :, :4])
    assert len(planned) == 2


REFUSED = {
    "tokens": (lambda x, c, s: (x[:, :4], c, s), "accepted"),
    "tables of three dimensions": (lambda x, c, s: (x, c[0], s[0]), "cos is"),
    "sin's shape": (lambda x, c, s: (x, c, s[:, :, :4]), "sin is"),
    "fp64": (lambda x, c, s: (x.double(), c.double(), s.double()), "torch.float64"),
    "two devices": (lambda x, c, s: (x, c.to("meta"), s), "cos is on meta"),
    "subclass": (lambda x, c, s: (x.as_subclass(Subclass), c, s), "x is a Subclass"),
    "gradient": (lambda x, c, s: (x.clone().requires_grad_(), c, s), "a gradient is required of x"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_apply_ltx2_split_rotary_emb_refuses_what_the_kernel_cannot_take(refused, device):
    change, text = REFUSED[refused]
    with pytest.raises(ValueError, match=r"split_rotary\w*: ") as caught:
        bitfuse.apply_ltx2_split_rotary_emb(*change(*_seed_inputs(device)))
    assert text in str(caught.value)


@pytest.mark.parametrize("refused", ["tokens", "tables of three dimensions", "sin's shape"])
def test_apply_split_rotary_emb_raises_for_misfits(refused, device):
    change, text = REFUSED[refused]
    x, cos, sin = change(*_seed_inputs(device))
    with pytest.raises(ValueError, match=text):
        bitfuse.apply_split_rotary_emb(x, (cos, sin))


def test_the_kernel_itself_can_be_launched(device):
    x, cos, sin = _seed_inputs(device)
    assert isinstance(bitfuse._ltx2_split_rotary_kernel, Kernel)
    plan = SPLIT_PER_OP.plan(x, cos, sin)
    assert plan.kernel is bitfuse._ltx2_split_rotary_kernel
    (out,) = plan.empty(x.device)
    bitfuse._ltx2_split_rotary_kernel[plan.grid](x, cos, sin, out, *plan.scalars, **plan.constants)
    assert bitfuse.compare(SPLIT_PER_OP.reference(x, cos, sin), out) is None


@pytest.mark.parametrize("name", ["modulate", "gated_residual", "layer_norm_modulate"])
def test_a_grid_is_refused_that_one_launch_has_not(name, monkeypatch):
    """Without a norm a row of 8192 columns is eight programs. On a GPU: the interpreter takes 64 rows to a program."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    operator, refused = bitfuse.OPERATORS[name], {}
    for rows in (2**28 - 1, 2**28):
        x, value = (torch.empty(1, n, 8192, device="meta", dtype=torch.bfloat16) for n in (rows, 1))
        args = (x, x, value) if name == "gated_residual" else (x, value, value)
        refused[operator.tiers[0].plan(*args).grid[0]] = [why for why in operator.why_not(*args) if "grid" in why]
    assert refused == {2**31 - 8: [], 2**31: [f"x [1, {2**28}, 8192] needs a larger grid than one launch has"]}
