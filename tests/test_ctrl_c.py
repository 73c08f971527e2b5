"""Ctrl-C at every line of bitfuse: in `accelerate`, in a first and a warm forward, in `restore`, in a block's end.

A `KeyboardInterrupt` comes before each line that is run, once for each line, in a run of its own. Then `restore()` is
called, and everything must be as it was: every attribute of every module by identity, and the bits of a step.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bitfuse
import sglang_host
from bitfuse import hosts
from bitfuse.core import proof
from bitfuse.core.operator import Operator
from bitfuse.tools import seeded

SOURCE = str(Path(bitfuse.__file__).parent)
pytestmark = pytest.mark.usefixtures("fresh_routes")
HOSTS = [name for name in seeded.HOSTS if name in seeded.installed()]


class Lines:
    """Of what runs in this thread meanwhile: the lines of bitfuse, or an interrupt at the `number`-th that is new."""

    def __init__(self, number: int | None = None):
        self.number = number
        self.seen: dict[tuple[str, int], None] = {}

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(SOURCE) else None

    def _line(self, frame, event, arg):
        where = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and where not in self.seen:
            self.seen[where] = None
            if len(self.seen) - 1 == self.number:
                raise KeyboardInterrupt
        return self._line


@pytest.fixture(params=HOSTS)
def host(request):
    return request.param


@pytest.fixture(params=["some", pytest.param("every line", marks=pytest.mark.slow)])
def numbers(request, host):
    """Of so many lines those to interrupt at, from a first one on.

    Each costs two steps or so: `make test` interrupts at one in seven, taken by turns by the hosts, which share most
    of the lines; `make test-all` at every one.
    """
    if request.param == "every line":
        return lambda count, first: range(count)
    return lambda count, first: range(first + 7 * HOSTS.index(host), count, 7 * len(HOSTS))


@pytest.fixture
def model_and_step(host, device, monkeypatch):
    """A transformer of one block and a step of it. References stand in for kernels, whose lines are not these."""
    monkeypatch.setattr(Operator, "_runner", lambda self, plan, args: self.reference)
    monkeypatch.setattr(proof, "run_battery", lambda *args, **kwargs: proof.Verdict(True, "equal"))
    if host == "sglang":
        sglang_host.ready()
    geometry = replace(seeded.SMALL, host=host, version="2.0", layers=1, frames=1, height=2, width=2)
    geometry = replace(geometry, audio_frames=3, text_tokens=4)
    model = seeded.build(geometry, device, 0)
    return model, seeded.one_step(model, seeded.make_inputs(model, geometry, device, 0))


def snapshot(model):
    found = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        found |= {(name, key): id(value) for key, value in module.__dict__.items()}
        for kind in ("_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks"):
            found |= {(name, kind, key): id(value) for key, value in module.__dict__[kind].items()}
        if (processor := module.__dict__.get("processor")) is not None:
            found[name, "processor's"] = (type(processor), *sorted(vars(processor)))
    return found


def forget():
    proof.forget()
    for operator in bitfuse.OPERATORS.values():
        operator.forget()


def lines_of(run):
    with Lines() as lines:
        run()
    return len(lines.seen)


def interrupted(run, number):
    """Whether the interrupt came, rather than that the lines were fewer this time."""
    try:
        with Lines(number):
            run()
    except KeyboardInterrupt:
        return True
    return False


def check(model, step, before, expected):
    assert not hosts._active
    assert snapshot(model) == before
    assert bitfuse.compare(expected, step()) is None
    assert not hosts.lock._is_owned()


def test_accelerate_is_all_or_nothing(model_and_step, numbers):
    model, step = model_and_step
    before, expected, handles = snapshot(model), step(), []

    def run():
        handles.append(bitfuse.accelerate(model))

    count = lines_of(run)
    handles.pop().restore()
    assert count > 200
    for number in numbers(count, 0):
        if not interrupted(run, number):
            handles.pop().restore()
        check(model, step, before, expected)


def test_restore_can_be_called_again(model_and_step):
    model, step = model_and_step
    before, expected = snapshot(model), step()
    handle = bitfuse.accelerate(model)
    count = lines_of(handle.restore)
    assert count > 20
    for number in range(count):
        handle = bitfuse.accelerate(model)
        interrupted(handle.restore, number)
        assert bitfuse.compare(expected, step()) is None  # either the one state or the other
        handle.restore()
        check(model, step, before, expected)


@pytest.mark.parametrize("kind", ["first", "warm"])
def test_a_forward_leaves_what_was_there(kind, model_and_step, numbers):
    model, step = model_and_step
    before, expected = snapshot(model), step()

    def prepared():
        forget()
        handle = bitfuse.accelerate(model)
        if kind == "warm":
            step()
        return handle

    with prepared() as handle:
        count = lines_of(step)
        whole = {site.name for site in handle.sites if site.fused}
    assert count > 200
    for number in numbers(count, 1):
        with prepared() as handle:
            interrupted(step, number)
            assert bitfuse.compare(expected, step()) is None
            fused = {site.name for site in handle.sites if site.fused}
            handle.restore()
            assert snapshot(model) == before, number  # at once: no forward is thought to be still under way
        assert fused == whole, number
        check(model, step, before, expected)


def test_the_end_of_a_block(model_and_step, numbers):
    model, step = model_and_step
    before, expected = snapshot(model), step()

    def run():
        with bitfuse.accelerated(model):
            pass

    for number in numbers(lines_of(run), 3):
        interrupted(run, number)
        bitfuse.accelerate(model).restore()  # finds what is in force, if anything is
        check(model, step, before, expected)


@pytest.mark.slow  # tests/test_interrupts.py takes a sample
def test_a_first_call_of_an_operator(device):
    """The proof itself, of the operator whose battery is the quickest."""
    operator = bitfuse.OPERATORS["gated_residual"]
    args = operator.cases[0].arguments(device, tokens=4)
    with torch.no_grad():
        expected = operator.reference(*args)

        def run():
            forget()
            return operator(*args)

        for number in range(2, lines_of(run), 5):
            interrupted(run, number)
            assert bitfuse.compare(expected, operator(*args)) is None
            assert operator.route(*args).fused, number


def test_the_tracer_interrupts(model_and_step):
    """The control: an interrupt in the middle does arrive."""
    model, step = model_and_step
    with bitfuse.accelerate(model):
        assert interrupted(step, 30)
        assert threading.current_thread() is threading.main_thread()
