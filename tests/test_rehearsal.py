"""The first block's rehearsal: which kernels are compiled in it, when there is none, and that nothing shows of it.

In the interpreter there is nothing to compile, so these tests say that there is.
"""

from __future__ import annotations

import collections
import threading
import time
from dataclasses import replace

import pytest
import torch

import bitfuse
from bitfuse import OPERATORS, proof, seeded
from bitfuse.contract import Plan
from bitfuse.hosts import patch
from bitfuse.hosts.common import Rehearsal
from bitfuse.hosts.constant import Constant

pytestmark = pytest.mark.usefixtures("fresh_routes")
HOSTS = [name for name in ("diffusers", "ltx-core") if name in seeded.installed()]


@pytest.fixture
def compiled(monkeypatch):
    """The signature of each kernel that a rehearsal compiles."""
    found = []
    monkeypatch.setattr(Rehearsal, "_compiles", lambda self: True)
    monkeypatch.setattr(Plan, "compile", lambda plan, args: found.append(plan.signature(args)))
    return found


def build(device, host, version="2.0", layers=1, **sizes):
    """A transformer, and one step of it."""
    geometry = replace(seeded.SMALL, host=host, version=version, layers=layers, **sizes)
    model = seeded.build(geometry, device, 0)
    return model, seeded.one_step(model, seeded.make_inputs(model, geometry, device, 0))


@pytest.fixture
def model_and_step(device):
    return build(device, HOSTS[0])


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("host", HOSTS)
def test_it_compiles_what_is_then_proved_and_nothing_shows_of_it(host, version, device, compiled):
    model, step = build(device, host, version)
    expected = step()
    with bitfuse.accelerate(model, strict=True) as handle:
        assert bitfuse.compare(expected, step()) is None
        assert {(site.fused, sum(site.fallen.values())) for site in handle.sites} == {(1, 0)}
    first = {signature for name, tier, signature in proof.verdicts() if tier == OPERATORS[name].tiers[0].name}
    assert len(compiled) == len(first) > 5
    assert set(compiled) == first
    with bitfuse.accelerate(model):  # all is proved already
        step()
    assert len(compiled) == len(first)


@pytest.mark.parametrize("slow", [False, True])
def test_threads_begin_where_one_is_not_in_the_cache(slow, model_and_step, compiled, monkeypatch):
    model, step = model_and_step
    threads, compile = [], Plan.compile

    def noted(plan, args):
        compile(plan, args)
        threads.append(threading.current_thread() is threading.main_thread())
        if slow or len(threads) == 1:  # when Triton starts up
            time.sleep(2 * Rehearsal.AT_ONCE)

    monkeypatch.setattr(Plan, "compile", noted)
    with bitfuse.accelerate(model):
        step()
    assert threads == [number < 2 or not slow for number in range(len(compiled))]


def test_it_is_of_one_block_once(device, monkeypatch):
    model, step = build(device, HOSTS[0], layers=2)
    rehearsed = []
    monkeypatch.setattr(Rehearsal, "__call__", lambda self, forward: rehearsed.append(self._name))
    with bitfuse.accelerate(model):
        step()
        step()
    assert rehearsed == ["transformer_blocks.0"]


def test_a_kernel_that_does_not_compile_is_a_reason_where_it_is_proved(model_and_step, compiled, monkeypatch):
    model, step = model_and_step
    expected = step()

    def fails(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(Plan, "compile", fails)
    with bitfuse.accelerate(model) as handle:
        assert bitfuse.compare(expected, step()) is None
        assert handle.report().fused == handle.report().seen


def test_no_memory_for_it(model_and_step, compiled, monkeypatch):
    model, step = model_and_step
    expected = step()
    operator = OPERATORS["gated_residual"]

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(operator, "rehearse", full)
    with bitfuse.accelerate(model) as handle:
        assert bitfuse.compare(expected, step()) is None
        assert handle.report().fused == handle.report().seen
    assert patch.rehearsing is None


def test_not_where_a_hook_would_be_called_twice(model_and_step, compiled):
    model, step = model_and_step
    called = []
    with bitfuse.accelerate(model):
        model.transformer_blocks[0].ff.register_forward_hook(lambda *_: called.append(1))
        step()
    assert (len(called), compiled) == (1, [])


@pytest.mark.parametrize("host", HOSTS)
def test_a_hook_of_all_modules_hears_what_it_hears_of_stock(host, device, compiled):
    model, step = build(device, host)
    heard = collections.Counter()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: heard.update([module]))
    try:
        expected = step()
        of_stock = heard.copy()
        heard.clear()
        with bitfuse.accelerate(model):
            assert bitfuse.compare(expected, step()) is None
    finally:
        hook.remove()
    assert heard == of_stock
    assert compiled == []


def test_a_trace_hears_the_real_call_only(model_and_step, compiled):
    model, step = model_and_step
    assert bitfuse.trace(step, step, [()], model=model, around_b=lambda: bitfuse.accelerated(model)) is None
    assert compiled == []


def test_not_where_a_module_of_the_block_may_be_anybodys(model_and_step, compiled):
    model, step = model_and_step
    stock = model.transformer_blocks[0].attn2.processor
    called = []

    class Mine:
        def __call__(self, *args, **kwargs):
            called.append(1)
            return stock(*args, **kwargs)

    model.transformer_blocks[0].attn2.processor = Mine()
    with bitfuse.accelerate(model) as handle:
        step()
        assert handle.report().fused < handle.report().seen
    assert (len(called), compiled) == (1, [])


def test_not_where_somebody_watches_the_ops(model_and_step, compiled):
    from torch.utils.flop_counter import FlopCounterMode

    model, step = model_and_step
    with FlopCounterMode(display=False) as stock:
        step()
    with bitfuse.accelerate(model), FlopCounterMode(display=False) as ours:
        step()
    assert ours.get_total_flops() == stock.get_total_flops()
    assert compiled == []


def test_observers_see_the_real_call_only(model_and_step, compiled):
    model, step = model_and_step
    seen = []
    with bitfuse.accelerate(model) as handle:
        for site in handle.sites:
            site.observers += (lambda site, *_: seen.append(site.name),)
        step()
        assert sorted(seen) == sorted(site.name for site in handle.sites)
    assert compiled


def test_it_is_not_timed(model_and_step, compiled, monkeypatch):
    model, step = model_and_step
    marks, mark = [], patch._mark
    monkeypatch.setattr(patch, "_mark", lambda device: marks.append(1) or mark(device))
    with bitfuse.accelerate(model) as handle:
        handle.report(time_share_of=step)
        assert len(marks) == 2 * len(handle.sites)
    assert compiled


def test_nothing_of_it_is_kept(monkeypatch):
    constant, x = Constant(), torch.ones(3)
    with torch.no_grad():
        monkeypatch.setattr(patch, "rehearsing", lambda *_: None)
        constant.of(x, "", torch.neg)
        assert (constant.hits, constant.misses, constant._kept) == (0, 0, [])
        monkeypatch.setattr(patch, "rehearsing", None)
        constant.of(x, "", torch.neg)
        assert constant.misses == 1


def test_not_without_a_gpu(model_and_step, monkeypatch):
    model, step = model_and_step
    if next(model.parameters()).is_cuda:
        pytest.skip("there is one")
    monkeypatch.setattr(Plan, "compile", lambda *_: pytest.fail("nothing is to be compiled for a CPU"))
    with bitfuse.accelerate(model):
        step()


@pytest.mark.gpu
def test_on_a_gpu_all_is_compiled_in_it(device, monkeypatch, tmp_path):
    from triton import knobs

    # widths that no other test has, as Triton remembers kernels in the process, too
    model, step = build(device, HOSTS[0], heads=12, audio_heads=12)
    expected = step()
    compiled, after = [], []
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda **found: None if found["cache_hit"] else compiled.append(found["src"])
    )
    rehearse = Rehearsal.__call__

    def counted(self, forward):
        rehearse(self, forward)
        after.append(len(compiled))

    monkeypatch.setattr(Rehearsal, "__call__", counted)
    with bitfuse.accelerate(model, strict=True):
        assert bitfuse.compare(expected, step()) is None
    assert after == [len(compiled)]
    assert len(compiled) > 5
