"""How a layout is decided where something is in the way: another form, an error of the moment, a wrong argument."""

from __future__ import annotations

import errno
import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import bitfuse
from bitfuse import OPERATORS, compare
from bitfuse.core import conditions, proof
from bitfuse.core.conditions import ShapeError
from bitfuse.core.kernel import Kernel
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Operator
from bitfuse.hosts.site import Site
from bitfuse.run.audit import Auditor, Comparison
from common import small
from test_proof import raising

OPERATOR = OPERATORS["gated_residual"]
INTERLEAVED = OPERATORS["interleaved_rotary_per_op"]
pytestmark = pytest.mark.usefixtures("fresh_routes")


@pytest.fixture
def short_battery(monkeypatch):
    """The call's own arguments."""
    for operator in (OPERATOR, INTERLEAVED):
        monkeypatch.setattr(operator, "battery", lambda *args: [("its own", args)])


# -- the form of a layout --------------------------------------------------------------------------------------------

SHAPE = (2, 5, 128)
LAYOUTS = {
    "dense": (640, 128, 1),
    "tokens outermost": (128, 256, 1),
    "tokens last": (640, 1, 5),
    "batch innermost": (1, 256, 2),
    "tokens expanded": (640, 0, 1),
    "batch expanded": (0, 128, 1),
    "both expanded": (0, 0, 1),
    "with gaps": (4096, 256, 1),
}


def strided(shape, stride, seed=0):
    n = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return values.as_strided(shape, stride)


def rotary(layout, device):
    x = strided(SHAPE, LAYOUTS[layout])
    cos, sin = (strided((2, 128, 5), (640, 5, 1), seed).transpose(1, 2) for seed in (1, 2))
    return tuple(t.as_strided(t.shape, t.stride()) for t in (x.to(device), cos.to(device), sin.to(device)))


@pytest.mark.parametrize("first", ["dense", "tokens expanded"])
def test_after_any_layout_every_other_has_the_references_strides(first, device, short_battery):
    INTERLEAVED(*rotary(first, device))
    for layout in LAYOUTS:
        args = rotary(layout, device)
        assert compare(INTERLEAVED.reference(*args), INTERLEAVED(*args)) is None, layout


def test_layouts_that_the_launch_reads_otherwise_have_signatures_of_their_own(device):
    plan = INTERLEAVED.tiers[0].plan
    signatures = [plan(*args).signature(args) for args in (rotary(layout, device) for layout in LAYOUTS)]
    gaps = list(LAYOUTS).index("with gaps")  # order and classes are those of the dense one
    assert signatures[gaps] == signatures[0]
    assert len(set(signatures)) == len(LAYOUTS) - 1


def test_a_signature_is_the_same_for_every_number_of_tokens():
    for operator in (OPERATOR, OPERATORS["split_rotary_fp32"], OPERATORS["qk_rms_norm_split_rotary_fp32"]):
        case, plan = operator.cases[0], operator.tiers[0].plan
        signatures = {plan(*args).signature(args) for t in (2, 17, 40) for args in [case.arguments("cpu", tokens=t)]}
        assert len(signatures) == 1


def test_a_form_that_meta_does_not_know_is_not_fused_and_condemns_nothing(device, short_battery, monkeypatch):
    """The proof is there, and only one layout comes out of the reference in another order."""
    args, longer = small(OPERATOR, device, 2), small(OPERATOR, device, 4)
    assert OPERATOR.route(*args).fused
    reference = OPERATOR.reference

    def otherwise(*args: Tensor) -> Tensor:
        out = reference(*args)
        return out if out.device.type == "meta" else out.transpose(-1, -2).contiguous().transpose(-1, -2)

    monkeypatch.setattr(OPERATOR, "reference", otherwise)
    route = OPERATOR.route(*longer)
    assert "the strides are" in route.reason
    assert route.mismatch is None
    assert compare(otherwise(*longer), OPERATOR(*longer)) is None
    with pytest.raises(ValueError, match="the strides are"):
        OPERATOR.launch(*longer)
    assert OPERATOR.route(*args).fused
    assert all(verdict.equal for verdict in proof.verdicts().values())


# -- errors of the moment --------------------------------------------------------------------------------------------

MOMENTARY = {
    "device": torch.OutOfMemoryError("CUDA out of memory"),
    "allocator": RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    "memory": MemoryError(),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "permission": PermissionError(13, "Permission denied: .triton"),
    "compiler killed": subprocess.CalledProcessError(-9, "cc"),
    "stack": RecursionError("maximum recursion depth exceeded"),
}


@pytest.mark.parametrize("error", MOMENTARY.values(), ids=MOMENTARY)
@pytest.mark.parametrize("where", ["battery", "preparation"])
def test_an_error_of_the_moment_is_tried_again(error, where, device, short_battery, monkeypatch):
    args = small(OPERATOR, device, 2)
    with monkeypatch.context() as moment:
        owner, name = (Plan, "bind") if where == "battery" else (Operator, "_runner")
        moment.setattr(owner, name, raising(error))
        for _ in range(3):
            assert compare(OPERATOR.reference(*args), OPERATOR(*args)) is None
        assert not OPERATOR.route(*args).fused
        assert not [verdict for verdict in proof.verdicts().values() if not verdict.equal]
    assert OPERATOR.route(*args).fused
    assert compare(OPERATOR.reference(*args), OPERATOR(*args)) is None


@pytest.mark.parametrize("name", ["head_gate", "qk_rms_norm"])
def test_evidence_that_cannot_be_loaded_just_now_is_tried_again(name, device, monkeypatch):
    """It is a module of its own, which the first proof reads from the disk; one with a witness has it there, too."""
    operator, import_module = OPERATORS[name], importlib.import_module
    args = small(operator, device, 2)

    def import_others(module: str, *package: str) -> object:
        if module.endswith("_evidence"):
            raise OSError(errno.EIO, "Input/output error")
        return import_module(module, *package)

    with monkeypatch.context() as moment:
        moment.delitem(operator.__dict__, "evidence", raising=False)
        moment.setattr(importlib, "import_module", import_others)
        assert "Input/output error" in operator.route(*args).reason
        assert compare(operator.reference(*args), operator(*args)) is None
        assert proof.verdicts() == {}
    assert operator.route(*args).fused


def test_importing_the_operators_loads_no_evidence_and_a_proof_loads_its_own():
    code = """
import os, sys
import bitfuse
from bitfuse.ops.head_gate import HEAD_GATE
import torch
loaded = lambda: {name for name in sys.modules if name.startswith("bitfuse.") and name.endswith("_evidence")}
before = loaded()
assert HEAD_GATE.route(torch.ones(1, 2, 8).bfloat16(), torch.ones(1, 2, 2).bfloat16()).fused
print(sorted(before), sorted(loaded()))
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "[] ['bitfuse.ops.head_gate_evidence']\n", done.stderr


def test_the_cause_of_an_error_counts():
    inner = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("compilation failed") from inner
    assert proof.of_the_moment(caught.value)
    assert not proof.of_the_moment(RuntimeError("PTX JIT"))
    circle = ValueError("round")
    circle.__cause__ = circle
    assert not proof.of_the_moment(circle)


def test_an_expensive_try_is_seldom_repeated(device, short_battery, monkeypatch):
    args, tries, now = small(OPERATOR, device, 2), [], [1000.0]

    def battery(*args):
        tries.append(args)
        now[0] += 3.0
        return proof.Verdict(False, "the disk is full", seconds=3.0, final=False)

    monkeypatch.setattr(proof, "run_battery", battery)
    monkeypatch.setattr(proof.time, "monotonic", lambda: now[0])
    start = now[0]
    for _ in range(2000):
        assert OPERATOR.route(*args).reason == "the disk is full"
        now[0] += 0.5
    assert 3 <= len(tries) <= 8
    assert 3.0 * len(tries) < 0.05 * (now[0] - start)
    monkeypatch.undo()
    now[0] += 1e6
    proof._failures.clear()
    assert OPERATOR.route(*args).fused


def test_an_error_of_the_device_passes_from_the_preparation(device, short_battery, monkeypatch):
    args = small(OPERATOR, device, 2)
    monkeypatch.setattr(Operator, "_runner", raising(torch.AcceleratorError("illegal memory access")))
    with pytest.raises(torch.AcceleratorError):
        OPERATOR(*args)


def test_another_error_of_the_preparation_is_a_reason(device, short_battery, monkeypatch):
    args = small(OPERATOR, device, 2)
    monkeypatch.setattr(Operator, "_runner", raising(RuntimeError("no such instruction")))
    for _ in range(2):
        assert OPERATOR.explain(*args) == ["the kernel can't be built or run here (RuntimeError: no such instruction)"]
    assert len(OPERATOR._routes) == 1


@pytest.mark.parametrize("error", [RuntimeError("no such instruction"), PermissionError(13, ".triton"), MemoryError()])
def test_an_audit_kernel_that_cannot_be_built_does_not_stop_the_forward(error, device, short_battery, monkeypatch):
    args = small(OPERATOR, device, 2)
    auditor = Auditor(1)
    site = Site("block.0", OPERATOR.name, observers=(auditor,))
    with monkeypatch.context() as moment:
        moment.setattr(Comparison, "__call__", lambda self, *args: raising(error)(self, args, ()))
        assert compare(OPERATOR.reference(*args), site.call(OPERATOR, *args)) is None
    (reason,) = auditor.skipped
    assert type(error).__name__ in reason
    site.call(OPERATOR, *args)
    auditor.settle()
    assert (auditor.calls, auditor.mismatches) == (1, 0)
    auditor._patience._not_before = float("inf")
    site.call(OPERATOR, *args)
    assert auditor.skipped["the comparison could not be made, and is tried again later"] == 1


def test_an_error_of_the_device_passes_from_an_audit(device, short_battery, monkeypatch):
    error = torch.AcceleratorError("illegal memory access")
    monkeypatch.setattr(Comparison, "__call__", lambda self, *args: raising(error)(self, args, ()))
    site = Site("block.0", OPERATOR.name, observers=(Auditor(1),))
    with pytest.raises(torch.AcceleratorError):
        site.call(OPERATOR, *small(OPERATOR, device, 2))


# -- arguments -------------------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_raise_what_pytorch_raises_and_more(device):
    x = torch.ones(1, 4, 256, dtype=torch.bfloat16, device=device)
    for kind in (ValueError, RuntimeError, ShapeError, bitfuse.ShapeError):
        with pytest.raises(kind, match=r"gated_residual: y is .*accepted"):
            OPERATOR(x, x[:, :3], x)


@pytest.mark.parametrize("call", [OPERATOR, OPERATOR.route, OPERATOR.routed, OPERATOR.explain, OPERATOR.launch])
def test_what_is_no_tensor_is_named(call, device):
    x = torch.ones(1, 4, 256, dtype=torch.bfloat16, device=device)
    array = np.ones((1, 4, 256), np.float32)
    for args, text in [
        ((), "gated_residual: given 0 arguments; accepted: 3 or more of x, y, gate, gate_table, mask"),
        ((x, x), "given 2 arguments"),
        ((x, x, x, None, None, None), "given 6 arguments"),
        ((array, array, array), r"x is a numpy.ndarray; accepted: a tensor"),
        ((x, array, x), r"y is a numpy.ndarray; accepted: a tensor"),
        ((x, x, None), "gate is None; accepted: a tensor"),
        ((x, x, x, array), "gate_table is a numpy.ndarray; accepted: a tensor or None"),
        ((1.0, x, x), "x is a float; accepted: a tensor"),
    ]:
        with pytest.raises(TypeError, match=text):
            call(*args)


def test_a_number_that_the_reference_takes_for_a_tensor_is_left_to_it(device):
    x = torch.ones(1, 4, 256, dtype=torch.bfloat16, device=device)
    assert OPERATOR.explain(x, x, 0.5) == ["gate is a float; accepted: a tensor"]
    assert compare(OPERATOR.reference(x, x, 0.5), OPERATOR(x, x, 0.5)) is None


def test_no_heads(device):
    x = torch.ones(1, 4, 256, dtype=torch.bfloat16, device=device)
    with pytest.raises(ShapeError, match=r"logits is \[1, 4, 0\], of no head; accepted"):
        OPERATORS["head_gate"](x, x[..., :0])
    none = torch.ones(1, 0, 4, 8, dtype=torch.bfloat16, device=device)
    with pytest.raises(ShapeError, match=r"cos is \[1, 0, 4, 8\]; accepted: .* at least one head"):
        OPERATORS["split_rotary_per_op"](x[..., :0], none, none)


def test_explain_of_what_is_no_operator():
    for given, what in ((None, "None"), (3, "a int"), (Kernel, "a type")):
        with pytest.raises(TypeError, match=f"operator is {what}; accepted: an Operator, or a name: .*head_gate"):
            bitfuse.explain(given)


@pytest.mark.parametrize("args", [["bitfuse", "--help"], ["bitfuse", "doctor"], ["bitfuse.tools.prove.ptx"]])
def test_a_bad_switch_at_the_command_line_is_one_line(args, monkeypatch):
    monkeypatch.setenv("BITFUSE", "yes")
    done = subprocess.run([sys.executable, "-m", *args], capture_output=True, text=True)
    line = "bitfuse: the environment variable BITFUSE is 'yes'; accepted: 0 (off) or 1 (on, the default)\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_a_reason_of_the_switch_is_not_kept(device, short_battery, monkeypatch):
    """Another thread switches off and on again while a layout is decided."""
    args, why_not = small(OPERATOR, device, 2), OPERATOR.why_not
    monkeypatch.setattr(OPERATOR, "why_not", lambda *args: iter([conditions.OFF]))
    assert OPERATOR.route(*args).reason == conditions.OFF
    monkeypatch.setattr(OPERATOR, "why_not", why_not)
    assert OPERATOR.route(*args).fused
