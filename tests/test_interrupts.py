"""An interrupt at any line of ours leaves no lock held, no half-made verdict or route, and counters that agree."""

from __future__ import annotations

import inspect
import os
import sys
import threading
import types
import warnings

import pytest

from bitfuse import OPERATORS, BitfuseWarning, compare
from bitfuse.core import bits, conditions, interpreter, kernel, launch, operator, proof
from bitfuse.core.bits import Mismatch
from bitfuse.core.operator import Operator, Tier
from bitfuse.hosts.site import Site
from bitfuse.run import audit
from bitfuse.run.audit import Auditor
from common import small

OPERATOR = OPERATORS["gated_residual"]
FILES = {module.__file__ for module in (operator, launch, conditions, bits, proof, kernel, interpreter, audit)}
needs_interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
pytestmark = [needs_interpreter, pytest.mark.usefixtures("fresh_routes")]


@pytest.fixture
def short_battery(monkeypatch):
    """The call's own arguments: what is tested here is what happens around it."""
    monkeypatch.setattr(OPERATOR, "battery", lambda *args: [("its own", args)])


def lines_of(call):
    """The lines of our files that the call runs, each once, in order."""
    found = {}

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            found.setdefault((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return list(found)


def interrupted(call, line):
    """Raise KeyboardInterrupt the first time that the call comes to this line; whether it came there."""

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line" and (frame.f_code.co_filename, frame.f_lineno) == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def free(lock):
    got = []
    thread = threading.Thread(target=lambda: got.append(lock.acquire(timeout=1) and (lock.release() or True)))
    thread.start()
    thread.join()
    return got == [True]


def forget():
    proof.forget()
    OPERATOR.forget()


def test_a_first_call(short_battery):
    args = small(OPERATOR, "cpu", 2)
    expected = OPERATOR.reference(*args)
    lines = lines_of(lambda: OPERATOR(*args))
    assert len(lines) > 150
    came = 0
    for line in lines[7::19]:
        forget()
        came += interrupted(lambda: OPERATOR(*args), line)
        assert free(interpreter._LOCK), line
        assert all(verdict.equal for verdict in proof.verdicts().values()), line
        assert all(route.fused for route in OPERATOR._routes.values()), line
        assert OPERATOR.route(*args).fused, line
        assert compare(expected, OPERATOR(*args)) is None, line
    assert came > 5


def test_the_interpreter_and_its_lock_at_every_line(short_battery):
    args = small(OPERATOR, "cpu", 1)
    assert OPERATOR.route(*args).fused
    lines = [line for line in lines_of(lambda: OPERATOR(*args)) if line[0] == interpreter.__file__]
    assert len(lines) > 15
    for line in lines:
        assert interrupted(lambda: OPERATOR(*args), line), line
        assert free(interpreter._LOCK), line
        assert compare(OPERATOR.reference(*args), OPERATOR(*args)) is None, line
        assert interpreter._before is None, line  # Triton is as it was


def test_every_line_of_an_audit(short_battery):
    args = small(OPERATOR, "cpu", 1)
    auditor = Auditor(1)
    site = Site("block.0", OPERATOR.name, observers=(auditor,))
    site.call(OPERATOR, *args)
    lines = [line for line in lines_of(lambda: site.call(OPERATOR, *args)) if line[0] == audit.__file__]
    for line in lines[::2]:
        assert interrupted(lambda: site.call(OPERATOR, *args), line), line
        assert free(auditor._lock), line
        before = auditor.calls + len(auditor._pending)
        site.call(OPERATOR, *args)
        auditor.settle()
        assert (auditor.calls, len(auditor._pending)) == (before + 1, 0), line
    assert auditor.mismatches == 0


def _wrong(monkeypatch):
    """Arguments that a wrong kernel, which counts as proved, gets wrong."""
    mutant = OPERATOR.mutants[0]
    stock = types.SimpleNamespace(tiers=OPERATOR.tiers)
    monkeypatch.setattr(OPERATOR, "tiers", (Tier("wrong", lambda *args: mutant.plan(stock, *args)),))
    monkeypatch.setattr(proof, "run_battery", lambda *args: proof.Verdict(True, "equal"))
    monkeypatch.setattr(proof, "compare_live", lambda *args: None)
    args = small(OPERATOR, "cpu", 1)
    assert compare(OPERATOR.reference(*args), OPERATOR(*args)) is not None
    return args


def test_a_condemnation_is_made_whole_or_not_at_all(monkeypatch):
    args = _wrong(monkeypatch)
    parts = [inspect.getsourcelines(f) for f in (Auditor._judge, Auditor._look, Operator.condemn)]
    files = [audit.__file__, audit.__file__, operator.__file__]
    within = {(file, start + n) for (text, start), file in zip(parts, files, strict=True) for n in range(len(text))}
    warnings.simplefilter("ignore", BitfuseWarning)

    def once(auditor):
        Site("block.0", OPERATOR.name, observers=(auditor,)).call(OPERATOR, *args)

    forget()
    lines = [line for line in lines_of(lambda: once(Auditor(1))) if line in within]
    assert len(lines) > 20
    for line in lines:
        forget()
        auditor, count = Auditor(1), proof.condemnations()
        assert interrupted(lambda auditor=auditor: once(auditor), line), line
        known = proof.condemnations() - count
        assert known in (0, 1), line
        assert OPERATOR.route(*args).fused == (known == 0), line
        if not auditor._pending and not auditor.calls:  # interrupted before there was a check
            once(auditor)
        auditor.settle()
        assert (auditor.calls, auditor.mismatches, len(auditor.condemned)) == (1, 1, 1), line
        assert proof.condemnations() - count == 1, line
        assert not OPERATOR.route(*args).fused, line
        assert compare(OPERATOR.reference(*args), OPERATOR(*args)) is None


# -- two threads, as one after the other at the worst moment ---------------------------------------------------------


MISMATCH = Mismatch("planted", count=1)


def test_condemned_while_another_thread_decides(short_battery, monkeypatch):
    args = small(OPERATOR, "cpu", 1)
    route, count, answers = OPERATOR.route(*args), proof.condemnations(), []
    OPERATOR.forget()
    runner = Operator._runner

    def meanwhile(self, plan, args):
        run = runner(self, plan, args)
        answers.append(self.condemn(route, MISMATCH))
        return run

    monkeypatch.setattr(Operator, "_runner", meanwhile)
    assert OPERATOR.route(*args).reason == "planted"
    monkeypatch.undo()
    assert OPERATOR.route(*args).reason == "planted"
    assert (route.fused, route.run) == (False, OPERATOR.reference)  # who holds it still is not left with the kernel
    assert answers == [True]
    assert OPERATOR.condemn(route, MISMATCH) is False
    assert proof.condemnations() == count + 1


def test_condemned_while_another_thread_proves(short_battery, monkeypatch):
    args = small(OPERATOR, "cpu", 1)
    battery = proof.run_battery

    def meanwhile(reference, plan_of, inputs, signature):
        verdict = battery(reference, plan_of, inputs, signature)
        proof.condemn(OPERATOR, OPERATOR.tiers[0], signature, MISMATCH)
        return verdict

    monkeypatch.setattr(proof, "run_battery", meanwhile)
    assert OPERATOR.route(*args).reason == "planted"
    monkeypatch.undo()
    assert OPERATOR.route(*args).reason == "planted"


def test_the_verdicts_are_bounded_and_a_condemnation_stays(short_battery, monkeypatch):
    operator = OPERATORS["rms_norm_modulate_native"]  # whose eps, a float, is in the signature as it is
    monkeypatch.setattr(proof, "run_battery", lambda *args: proof.Verdict(True, "equal"))
    monkeypatch.setattr(proof, "compare_live", lambda *args: None)
    monkeypatch.setattr(proof, "_KEPT", 6)
    *others, eps = small(operator, "cpu", 1)
    condemned = operator.route(*others, eps)
    assert condemned.fused
    assert operator.condemn(condemned, MISMATCH)
    for i in range(20):
        assert operator.route(*others, 0.5 + i).fused
        assert len(proof.verdicts()) <= 7
    route = operator.route(*others, eps)  # by the next tier
    assert route.passed_over == (f"{operator.tiers[0].name}: planted",)
