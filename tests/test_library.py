"""torch.ops.bitfuse.<name>: what PyTorch's own checker, autograd, fake tensors and torch.compile make of it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bitfuse

OPERATORS = list(bitfuse.OPERATORS.values())
each = pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)


def op_of(operator):
    return getattr(torch.ops.bitfuse, operator.name)


def inputs(operator, device, tokens=5, name="head size 6"):
    cases = {case.name: case for case in operator.cases}
    return cases.get(name, operator.cases[0]).tensors(device, tokens=tokens)


def _leaf(t, requires_grad=True):
    """A leaf with the values and the strides of t."""
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_(requires_grad)


INPUTS = {
    "contiguous": lambda o, d: tuple(t.contiguous() for t in inputs(o, d)),
    "as the hosts have them": inputs,
    "a column slice": lambda o, d: inputs(o, d, name="columns of a wider tensor"),
    "tokens last": lambda o, d: inputs(o, d, name="tokens last"),
    "misaligned": lambda o, d: inputs(o, d, name="misaligned"),
    "four dimensions": lambda o, d: inputs(o, d, name="x [B, H, T, D]"),
    # of three dimensions the split chains themselves refuse: they reshape to -1
    "no tokens": lambda o, d: inputs(o, d, tokens=0, name="x [B, H, T, D]"),
    "fp32": lambda o, d: inputs(o, d, name="fp32"),
    "gradients of all": lambda o, d: tuple(_leaf(t) for t in inputs(o, d, name="fp32")),
    "a gradient of x": lambda o, d: tuple(_leaf(t, i == 0) for i, t in enumerate(inputs(o, d))),
}


@each
@pytest.mark.parametrize("kind", INPUTS)
def test_opcheck(operator, kind, device):
    tensors = INPUTS[kind](operator, device)
    results = torch.library.opcheck(op_of(operator), tensors)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) >= 4


@each
def test_it_runs_the_kernel(operator, device, monkeypatch):
    tensors = inputs(operator, device)
    assert operator.route(*tensors).fused
    expected = operator.reference(*tensors)
    monkeypatch.setattr(operator, "reference", None)  # out of reach
    assert bitfuse.compare(expected, op_of(operator)(*tensors)) is None


@each
def test_it_has_the_reference_s_parameters(operator):
    names = [argument.name for argument in op_of(operator).default._schema.arguments]
    assert names == list(operator.reference.__code__.co_varnames[: operator.reference.__code__.co_argcount])


def _cotangent(out):
    return torch.linspace(-2, 2, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)


@each
@pytest.mark.parametrize("name", ["head size 6", "fp32", "tokens last", "tables of batch 1"])
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_gradients_equal_autograd_through_the_reference(operator, name, wanted, device, monkeypatch):
    tensors = inputs(operator, device, name=name)
    results, launched = [], []
    for fn in (operator.reference, op_of(operator)):
        leaves = [_leaf(t, i in wanted) for i, t in enumerate(tensors)]
        out = fn(*leaves)
        launched.append("bitfuse" in out.grad_fn.name())
        out.backward(_cotangent(out))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert launched == [False, True]  # our op's node stands in the graph: the reference is not compared with itself
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        assert (found is None) == (expected is None) == (i > 0 and i - 1 not in wanted)
        assert expected is None or bitfuse.compare(expected, found) is None


@each
def test_second_derivatives_equal_the_reference_s_too(operator, device):
    tensors = inputs(operator, device, name="fp32")
    results = []
    for fn in (operator.reference, op_of(operator)):
        leaves = [_leaf(t) for t in tensors]
        out = fn(*leaves)
        first = torch.autograd.grad(out, leaves, _cotangent(out), create_graph=True)
        assert all(g.requires_grad for g in first[:1])
        results.append(torch.autograd.grad(first[0].square().sum(), leaves[1:]))
    assert [bitfuse.compare(a, b) for a, b in zip(*results, strict=True)] == [None, None]


@each
@pytest.mark.parametrize("gradient", [False, True])
def test_it_works_under_torch_compile(operator, gradient, device):
    tensors = inputs(operator, device)
    op, graphs = op_of(operator), []

    def spy(graph, example_inputs):
        from torch._dynamo.backends.registry import lookup_backend

        graphs.append([str(node.target) for node in graph.graph.nodes])
        return lookup_backend("aot_eager")(graph, example_inputs)

    torch.compiler.reset()
    results = []
    for fn in (operator.reference, torch.compile(lambda *t: op(*t), fullgraph=True, backend=spy)):
        leaves = [_leaf(t, gradient and i == 0) for i, t in enumerate(tensors)]
        out = fn(*leaves)
        if gradient:
            out.backward(_cotangent(out))
        results.append((out.detach(), leaves[0].grad))
    assert len(graphs) == 1
    assert any(operator.name in target for target in graphs[0])  # opaque to dynamo, on purpose, unlike the operator
    (expected, expected_grad), (found, found_grad) = results
    assert bitfuse.compare(expected, found) is None
    assert not gradient or bitfuse.compare(expected_grad, found_grad) is None


@each
@pytest.mark.parametrize("kind", ["as the hosts have them", "a column slice", "tokens last", "four dimensions", "fp32"])
def test_fake_tensors_have_the_right_form(operator, kind, device):
    tensors = INPUTS[kind](operator, device)
    expected = op_of(operator)(*tensors)
    with FakeTensorMode() as mode:
        fake = op_of(operator)(*(mode.from_tensor(t) for t in tensors))
    assert (fake.shape, fake.stride(), fake.dtype, fake.device) == (
        expected.shape,
        expected.stride(),
        expected.dtype,
        expected.device,
    )


@each
def test_a_fake_misfit_is_refused(operator, device):
    x, *tables = inputs(operator, device)
    wrong = (x[..., 1:], *tables)
    with FakeTensorMode() as mode, pytest.raises((RuntimeError, ValueError)):
        op_of(operator)(*map(mode.from_tensor, wrong))
    with pytest.raises(ValueError, match="accepted"):
        op_of(operator)(*wrong)
