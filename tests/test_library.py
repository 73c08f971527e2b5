"""torch.ops.bitfuse.<name>: what PyTorch's own checker, autograd, fake tensors and torch.compile make of it."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bitfuse import compare
from bitfuse.core.bits import as_tuple
from common import ONE_OF_EACH_FILE, ROTARY, on_tensors, small, tensors_of

OPERATORS = ONE_OF_EACH_FILE
each = pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
each_rotary = pytest.mark.parametrize("operator", ROTARY, ids=lambda o: o.name)


def op_of(operator):
    return getattr(torch.ops.bitfuse, operator.name)


def inputs(operator, device, tokens=5, name="head size 6"):
    return small(operator, device, tokens, name)


def _leaf(t, requires_grad=True):
    """A leaf with the values and the strides of t."""
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_(requires_grad)


def _leaves(args, wanted):
    """The arguments with leaves for tensors; gradients are required of those whose index among them is wanted."""
    count = itertools.count()
    return on_tensors(lambda t: _leaf(t, next(count) in wanted), args)


def _backward(outs):
    reached = [t for t in as_tuple(outs) if t.requires_grad]
    torch.autograd.backward(reached, list(map(_cotangent, reached)))


INPUTS = {
    "contiguous": lambda o, d: on_tensors(torch.Tensor.contiguous, inputs(o, d)),
    "as the hosts have them": inputs,
    "a column slice": lambda o, d: inputs(o, d, name="columns of a wider tensor"),
    "tokens last": lambda o, d: inputs(o, d, name="tokens last"),
    "misaligned": lambda o, d: inputs(o, d, name="misaligned"),
    "four dimensions": lambda o, d: inputs(o, d, name="x [B, H, T, D]"),
    # of three dimensions the split chains themselves refuse: they reshape to -1
    "no tokens": lambda o, d: inputs(o, d, tokens=0, name="x [B, H, T, D]"),
    "fp32": lambda o, d: inputs(o, d, name="fp32"),
    "gradients of all": lambda o, d: on_tensors(_leaf, inputs(o, d, name="fp32")),
    "a gradient of x": lambda o, d: _leaves(inputs(o, d), (0,)),
}


NAMED = {  # the case that a kind of inputs is made of; operators without one of that name would repeat another kind
    "a column slice": "columns of a wider tensor",
    "tokens last": "tokens last",
    "misaligned": "misaligned",
    "four dimensions": "x [B, H, T, D]",
    "no tokens": "x [B, H, T, D]",
    "fp32": "fp32",
}


def has(operator, case):
    return case is None or case in {c.name for c in operator.cases}


# Layouts change nothing of what an op is; that it fuses them is tested in test_operators. Nor do dtypes, and gradients
# of all tensors include that of the first: these are quick for one operator.
LAYOUTS = {"a column slice", "tokens last", "misaligned", "four dimensions"}
ONCE = {"fp32", "a gradient of x"}


def _slow(operator, kind):
    return kind in LAYOUTS or (kind in ONCE and operator is not OPERATORS[0])


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        pytest.param(o, kind, marks=pytest.mark.slow if _slow(o, kind) else (), id=f"{o.name}-{kind}")
        for o in OPERATORS
        for kind in INPUTS
        if has(o, NAMED.get(kind))
    ],
)
def test_opcheck(operator, kind, device):
    args = INPUTS[kind](operator, device)
    if kind == "no tokens":
        try:
            operator.reference(*args)
        except RuntimeError:
            pytest.skip("the chain itself refuses it")
    results = torch.library.opcheck(op_of(operator), args)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) >= 4


@each
def test_it_runs_the_kernel(operator, device, monkeypatch):
    tensors = inputs(operator, device)
    assert operator.route(*tensors).fused
    expected = operator.reference(*tensors)
    monkeypatch.setattr(operator, "reference", None)  # out of reach
    assert compare(expected, op_of(operator)(*tensors)) is None


@each
def test_it_has_the_reference_s_parameters(operator):
    ours = [(a.name, a.default_value) for a in op_of(operator).default._schema.arguments]
    theirs = inspect.signature(operator.reference).parameters.values()
    assert ours == [(p.name, None if p.default is p.empty else p.default) for p in theirs]


def _cotangent(out):
    return torch.linspace(-2, 2, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        pytest.param(o, name, id=f"{o.name}-{name}")
        for o in OPERATORS
        for name in ("head size 6", "fp32", "tokens last", "tables of batch 1")
        if name == "head size 6" or has(o, name)
    ],
)
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_gradients_equal_autograd_through_the_reference(operator, name, wanted, device, monkeypatch):
    args = inputs(operator, device, name=name)
    if not (wanted := [i for i in wanted if i < len(tensors_of(args))]):
        pytest.skip("no such tensor in this case")
    results, launched = [], []
    for fn in (operator.reference, op_of(operator)):
        leaves = _leaves(args, wanted)
        outs = as_tuple(fn(*leaves))
        launched.append(any("bitfuse" in out.grad_fn.name() for out in outs if out.requires_grad))
        _backward(outs)
        assert compare(tuple(t.detach() for t in outs), as_tuple(operator.reference(*args))) is None
        results.append([leaf.grad for leaf in tensors_of(leaves)])
    assert launched == [False, True]  # our op's node stands in the graph: the reference is not compared with itself
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        assert (found is None) == (expected is None) == (i not in wanted)
        assert expected is None or compare(expected, found) is None


@each_rotary
def test_second_derivatives_equal_the_reference_s_too(operator, device):
    tensors = inputs(operator, device, name="fp32")
    results = []
    for fn in (operator.reference, op_of(operator)):
        leaves = [_leaf(t) for t in tensors]
        out = fn(*leaves)
        first = torch.autograd.grad(out, leaves, _cotangent(out), create_graph=True)
        assert all(g.requires_grad for g in first[:1])
        results.append(torch.autograd.grad(first[0].square().sum(), leaves[1:]))
    assert [compare(a, b) for a, b in zip(*results, strict=True)] == [None, None]


@each
@pytest.mark.parametrize("gradient", [False, True])
def test_it_works_under_torch_compile(operator, gradient, device):
    args = inputs(operator, device)
    op, graphs = op_of(operator), []

    def spy(graph, example_inputs):
        from torch._dynamo.backends.registry import lookup_backend

        graphs.append([str(node.target) for node in graph.graph.nodes])
        return lookup_backend("aot_eager")(graph, example_inputs)

    torch.compiler.reset()
    results = []
    for fn in (operator.reference, torch.compile(lambda *a: op(*a), fullgraph=True, backend=spy)):
        leaves = _leaves(args, (0,) if gradient else ())
        outs = as_tuple(fn(*leaves))
        if gradient:
            _backward(outs)
        results.append((tuple(t.detach() for t in outs), leaves[0].grad))
    assert len(graphs) == 1
    assert any(operator.name in target for target in graphs[0])  # opaque to dynamo, on purpose, unlike the operator
    (expected, expected_grad), (found, found_grad) = results
    assert compare(expected, found) is None
    assert not gradient or compare(expected_grad, found_grad) is None


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        pytest.param(o, kind, id=f"{o.name}-{kind}")
        for o in OPERATORS
        for kind in ("as the hosts have them", "a column slice", "tokens last", "four dimensions", "fp32")
        if has(o, NAMED.get(kind))
    ],
)
def test_fake_tensors_have_the_right_form(operator, kind, device):
    args = INPUTS[kind](operator, device)
    with FakeTensorMode() as mode:
        fakes = op_of(operator)(*on_tensors(mode.from_tensor, args))
    for fake, expected in zip(as_tuple(fakes), as_tuple(op_of(operator)(*args)), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
            expected.device,
        )


@each_rotary
def test_a_fake_misfit_is_refused(operator, device):
    x, *tables = inputs(operator, device)
    wrong = (x[..., 1:], *tables)
    with FakeTensorMode() as mode, pytest.raises((RuntimeError, ValueError)):
        op_of(operator)(*map(mode.from_tensor, wrong))
    with pytest.raises(ValueError, match="accepted"):
        op_of(operator)(*wrong)
