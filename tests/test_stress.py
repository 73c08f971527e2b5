"""Eight threads, two models: accelerate, forward, restore, condemn, all at once, for a while.

Whatever comes in between whatever: every step has stock's bits, nobody gets an error, and each site has counted exactly
the calls that came to it.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

import bitfuse
from bitfuse import hosts
from bitfuse.core import proof
from bitfuse.core.bits import Mismatch
from bitfuse.core.operator import Operator
from bitfuse.hosts.site import Site
from bitfuse.run.swap import ours_in
from bitfuse.tools import seeded

pytest.importorskip("diffusers.models.transformers.transformer_ltx2")

THREADS = 8


@pytest.fixture
def models(monkeypatch):
    """(model, a step of it, its stock result) of LTX-2.0 and 2.3. Kernels are stood in for by references."""
    monkeypatch.setattr(Operator, "_runner", lambda self, plan, args: self.reference)
    monkeypatch.setattr(proof, "run_battery", lambda *args, **kwargs: proof.Verdict(True, "equal"))
    found = []
    for version in ("2.0", "2.3"):
        geometry = replace(seeded.SMALL, host="diffusers", version=version, layers=1, frames=1, height=2, width=2)
        geometry = replace(geometry, audio_frames=3, text_tokens=4)
        model = seeded.build(geometry, torch.device("cpu"), 0)
        step = seeded.one_step(model, seeded.make_inputs(model, geometry, torch.device("cpu"), 0))
        found.append((model, step, step()))
    return found


class Counts:
    """How often each site was called, and how often it was told that a call falls back."""

    def __init__(self, monkeypatch):
        self._lock = threading.Lock()
        self.sites, self.calls, self.falls, self.inside = {}, Counter(), Counter(), Counter()
        here, call, fall = threading.local(), Site.call, Site.fall

        def counted_call(site, *args):
            here.inside = True
            try:
                return call(site, *args)
            finally:
                here.inside = False
                self._note(site, self.calls)

        def counted_fall(site, reason, lasts=True):
            fall(site, reason, lasts)
            self._note(site, self.inside if getattr(here, "inside", False) else self.falls)

        monkeypatch.setattr(Site, "call", counted_call)
        monkeypatch.setattr(Site, "fall", counted_fall)

    def _note(self, site, counter):
        with self._lock:
            self.sites[id(site)] = site
            counter[id(site)] += 1

    def check(self):
        assert len(self.sites) > 100
        for number, site in self.sites.items():
            assert site.fused == self.calls[number] - self.inside[number], site
            assert sum(site.fallen.values()) == self.falls[number] + self.inside[number], site


def condemn(dice):
    """A kernel that was proved is seen to differ, as an audit would say."""
    operator = dice.choice(list(bitfuse.OPERATORS.values()))
    routes = [route for route in list(operator._routes.values()) if route.fused]
    if routes:
        operator.condemn(dice.choice(routes), Mismatch("planted", count=1))


def request(model, step, expected, dice):
    """One thing that somebody does with a model; a word for what it was."""
    what = dice.choice(["inside", "inside", "accelerate", "forward", "restore", "condemn"])
    if what == "inside":
        with bitfuse.accelerated(model):
            assert bitfuse.compare(expected, step()) is None
    elif what == "accelerate":
        bitfuse.accelerate(model)
    elif what == "restore":
        handle = hosts._active.get(model)
        if handle is not None:
            handle.restore()
    elif what == "condemn":
        condemn(dice)
        if dice.random() < 0.2:
            proof.forget()
            for operator in bitfuse.OPERATORS.values():
                operator.forget()
    assert bitfuse.compare(expected, step()) is None
    return what


@pytest.mark.usefixtures("fresh_routes")
@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_threads_come_in_between_each_other(seconds, models, monkeypatch):
    counts, errors, done, end = Counts(monkeypatch), [], Counter(), time.monotonic() + seconds

    def work(number):
        dice = random.Random(number)
        try:
            while time.monotonic() < end and not errors:
                done[request(*dice.choice(models), dice)] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    assert len(done) == 5, done
    for model, step, expected in models:
        handle = bitfuse.accelerate(model)
        handle.restore()
        assert [module for module in model.modules() if ours_in(module)] == []
        assert bitfuse.compare(expected, step()) is None
    assert not [model for model, _, _ in models if model in hosts._active]
    counts.check()
