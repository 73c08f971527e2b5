"""What a reference calls is found by itself and noticed when it is replaced; code is told from that in its file."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import sys
import textwrap
import types

import pytest
import torch
import torch.nn.functional as F

import bitfuse
from bitfuse import OPERATORS, compare
from bitfuse.core.originals import Originals, called_by
from bitfuse.hosts.code import is_own, source_of
from common import small

EACH = pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda operator: operator.name)
CALLED = {
    "head_gate": {"torch.sigmoid", "torch.Tensor.__mul__", "torch.Tensor.unflatten", "torch.Tensor.flatten"},
    "lerp_head_gate": {"torch.lerp", "torch.sigmoid", "torch.Tensor.__mul__"},
    "weighted_sum_head_gate": {"torch.Tensor.__rsub__", "torch.Tensor.__add__", "torch.Tensor.__mul__"},
    "split_rotary_fp32": {"torch.Tensor.addcmul_", "torch.Tensor.__neg__", "torch.Tensor.swapaxes", "torch.Tensor.to"},
    "interleaved_rotary_per_op": {"torch.stack", "torch.Tensor.unbind", "torch.Tensor.__add__"},
    "qk_rms_norm_split_rotary_per_op": {"torch.nn.functional.rms_norm", "torch.rms_norm", "torch.Tensor.addcmul_"},
    "rms_norm_modulate_native": {"torch.nn.functional.rms_norm", "torch.Tensor.__mul__"},
    "rms_norm_modulate_composed": {"torch.rsqrt", "torch.Tensor.pow", "torch.Tensor.mean"},
    "residual_rms_norm_modulate_twice_native": {"torch.nn.functional.rms_norm", "torch.Tensor.__add__"},
    "layer_norm_modulate": {"torch.nn.functional.layer_norm", "torch.layer_norm"},
}


def replace_with_a_wrapper(monkeypatch, owner, name):
    stock, calls = getattr(owner, name), []

    @functools.wraps(stock)
    def wrapper(*args, **kwargs):
        calls.append(name)
        return stock(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


# -- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLED)
def test_what_a_reference_calls_is_found(name):
    labels = {label for _, _, label in OPERATORS[name].originals}
    assert labels >= CALLED[name]
    assert not any(label.startswith("bitfuse") or label.endswith((".shape", ".ndim", ".dtype")) for label in labels)


@EACH
def test_each_is_noticed_and_named_until_it_is_put_back(operator, monkeypatch):
    assert operator.originals
    difference = Originals(operator.originals).difference
    for owner, name, label in operator.originals:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, functools.partial(getattr(owner, name)))
            assert difference() == label
    assert difference() is None


@pytest.mark.parametrize(
    ("name", "owner", "function"),
    [
        ("rms_norm_modulate_composed", torch, "rsqrt"),
        ("rms_norm_modulate_native", F, "rms_norm"),
        ("split_rotary_per_op", torch.Tensor, "addcmul_"),
        ("gated_residual", torch.Tensor, "__mul__"),
    ],
)
def test_a_call_after_the_proof_runs_the_chain_with_what_was_replaced(name, owner, function, device, monkeypatch):
    operator = OPERATORS[name]
    args = small(operator, device, 2)
    assert operator.route(*args).fused
    with monkeypatch.context() as patch:
        calls = replace_with_a_wrapper(patch, owner, function)
        label = f"{'torch.Tensor' if owner is torch.Tensor else owner.__name__}.{function}"
        assert f"{label} has been replaced" in operator.route(*args).reason
        assert f"{label} has been replaced" in bitfuse.explain(name, *args)[0]
        for call in (operator, getattr(torch.ops.bitfuse, name)):
            calls.clear()
            call(*args)
            assert calls
        assert operator.routed(*args).fused  # a host looks for itself
    assert operator.route(*args).fused
    assert compare(operator.reference(*args), operator(*args)) is None


def test_code_and_defaults_of_a_python_function_count(monkeypatch):
    watched = Originals([(F, "rms_norm", "rms_norm")])
    for part, value in (
        ("__code__", (lambda x, shape, weight=None, eps=None: x).__code__),
        ("__defaults__", (None, 1.0)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(F.rms_norm, part, value)
            assert watched.difference() == "rms_norm"
        assert watched.difference() is None


def test_keyword_defaults_and_what_is_gone():
    class Owner:
        def method(self, *, eps=1e-6):
            return eps

        def other(self):
            return self

    watched = Originals([(Owner, "method", "Owner.method"), (Owner, "other", "Owner.other")])
    Owner.method.__kwdefaults__["eps"] = 1.0
    assert watched.difference() == "Owner.method"
    Owner.method.__kwdefaults__["eps"] = 1e-6
    assert Originals([(Owner, "other", "Owner.other")]).difference() is None
    del Owner.other
    assert watched.difference() == "Owner.other"
    with pytest.raises(AttributeError, match="nothing"):
        Originals([(Owner, "nothing", "Owner.nothing")])


def test_helpers_and_lambdas_of_a_package_are_followed():
    def helper(x):
        return [y.cumsum(0) for y in x]

    def reference(x):
        x += helper(x)[0]
        return (lambda y: -torch.atan2(y, y))(x[1:])

    labels = {label for _, _, label in called_by(reference)}
    assert labels >= {"torch.Tensor.__iadd__", "torch.atan2", "torch.Tensor.__neg__", "torch.Tensor.__getitem__"}


# -- code and its file -----------------------------------------------------------------------------------------------

MODULE = '''
import functools


def twice(x, by=2.0):
    """Twice."""
    return [by * y for y in x]


class Norm:
    @property
    def width(self):
        return 1

    def forward(self, x):
        def inner(y):
            return y + 1
        return inner(x)
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    path = tmp_path / "host_to_patch.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("host_to_patch", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    monkeypatch.setitem(sys.modules, "host_to_patch", found)
    return found


def test_own_code_is_own(module):
    assert is_own(module.twice, module, "twice")
    assert is_own(module.Norm.forward, "host_to_patch", "Norm.forward")
    assert is_own(module.Norm().forward, module, "Norm.forward")
    assert is_own(F.rms_norm, F, "rms_norm")
    assert is_own(torch.nn.RMSNorm.forward, "torch.nn.modules.normalization", "RMSNorm.forward")
    for builtin, owner, name in ((torch.sigmoid, torch, "sigmoid"), (F.gelu, F, "gelu")):
        assert is_own(builtin, owner, name)
    assert is_own(torch.Tensor.addcmul_, torch, "Tensor.addcmul_")
    assert is_own(sys.modules[__name__].module_function, __name__, "module_function")  # under pytest's own rewriting


def module_function():
    return 1


def test_what_is_not_own_is_told(module, monkeypatch):
    assert not is_own(module.twice, module, "thrice")
    assert not is_own(module.twice, F, "twice")
    assert not is_own(functools.partial(module.twice), module, "twice")
    assert not is_own(torch.sigmoid, torch, "tanh")
    assert not is_own(len, torch, "len")
    replace_with_a_wrapper(monkeypatch, module.Norm, "forward")  # as before bitfuse came: the name is still right
    assert module.Norm.forward.__qualname__ == "Norm.forward"
    assert not is_own(module.Norm.forward, module, "Norm.forward")
    scope = {}
    exec("def twice(x, by=2.0):\n    return [by * y * 1.0 for y in x]", scope)
    module.twice.__code__ = scope["twice"].__code__
    assert not is_own(module.twice, module, "twice")


def test_the_source_is_that_of_the_code_that_runs(module):
    assert source_of(module.twice) == inspect.getsource(module.twice.__code__)
    assert textwrap.dedent(source_of(module.Norm().forward)).startswith("def forward(self, x):")
    for known in (F.rms_norm, F.layer_norm, torch.nn.RMSNorm.forward, OPERATORS["head_gate"].reference):
        hashes = [
            hashlib.sha256(textwrap.dedent(text).encode()).hexdigest()
            for text in (source_of(known), inspect.getsource(known.__code__))
        ]
        assert hashes[0] == hashes[1]
    assert source_of(torch.sigmoid) is None
    module.twice.__code__ = (lambda x, by=2.0: x).__code__
    assert "lambda x, by=2.0: x" in source_of(module.twice)


def test_code_that_claims_to_be_from_a_file_has_no_source_there(module):
    claims = compile("def twice(x, by):\n    return [by + y for y in x]", module.__file__, "exec").co_consts
    module.twice.__code__ = next(code for code in claims if isinstance(code, types.CodeType))
    assert source_of(module.twice) is None


def test_a_file_that_was_edited_since_gives_no_source(module):
    with open(module.__file__, "w") as file:
        file.write("# a line more\n" + MODULE.replace("y + 1", "y + 2"))
    assert (
        source_of(module.twice) == "def twice(x, by=2.0):\n" + MODULE.split("by=2.0):\n")[1].split("\n\n\n")[0] + "\n"
    )
    assert source_of(module.Norm.forward) is None
