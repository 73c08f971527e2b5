"""The first call of the first block: which kernels are compiled for it at once, and that nothing but time tells of it.

In the interpreter there is nothing to compile, so these tests say that there is; and that few blocks are enough.
"""

from __future__ import annotations

import collections
import contextlib
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import bitfuse
from bitfuse import OPERATORS, hosts
from bitfuse.core import kernel, launch, proof
from bitfuse.core.launch import Plan
from bitfuse.hosts import rehearsal, report
from bitfuse.hosts.rehearsal import Rehearsal
from bitfuse.tools import seeded

# It is about which kernels are compiled and when, not about their bits
pytestmark = pytest.mark.usefixtures("fresh_routes", "launched_as_reference")
HOSTS = [name for name in ("diffusers", "ltx-core") if name in seeded.installed()]


@pytest.fixture
def compiled(monkeypatch):
    """The signature of each kernel that a rehearsal compiles."""
    found = []
    monkeypatch.setattr(Rehearsal, "MIN_BLOCKS", 1)
    monkeypatch.setattr(Rehearsal, "compiles", lambda self: True)
    monkeypatch.setattr(Plan, "compile", lambda plan, args: found.append(plan.signature(args)))
    monkeypatch.setattr(Plan, "load", lambda plan, args: None)
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
    with bitfuse.accelerate(model) as handle:
        assert bitfuse.compare(expected, step()) is None
        assert {site.state for site in handle.sites} == {"compiling"}
        assert bitfuse.compare(expected, step()) is None
        counts = {(site.fused, sum(site.fallen.values()), site.compiling) for site in handle.sites}
        assert counts == {(1, 0, 1)}
        assert handle.report().fused == handle.report().seen
    first = {signature for name, tier, signature in proof.verdicts() if tier == OPERATORS[name].tiers[0].name}
    first -= {s for name, _, s in proof.verdicts() if name == "gelu_tanh"}  # no site: it compiles where it is called
    assert len(compiled) == len(first) > 5
    assert set(compiled) == first
    with bitfuse.accelerate(model):  # all is proved already
        step()
    assert len(compiled) == len(first)


def test_kernels_are_compiled_in_threads_that_end_with_the_call(model_and_step, compiled, monkeypatch):
    model, step = model_and_step
    threads, compile = set(), Plan.compile

    def noted(plan, args):
        time.sleep(0.05)
        compile(plan, args)
        threads.add(threading.current_thread())

    monkeypatch.setattr(Plan, "compile", noted)
    monkeypatch.setattr(Rehearsal, "THREADS", 2)
    with bitfuse.accelerate(model):
        step()
    assert len(compiled) > 5
    assert len(threads) == 2
    assert not any(thread.is_alive() for thread in threads)


def test_where_no_thread_is_to_be_had_kernels_are_compiled_where_they_are_called(model_and_step, compiled, monkeypatch):
    model, step = model_and_step
    expected = step()

    def fails(*_):
        raise RuntimeError("can't start new thread")

    with bitfuse.accelerate(model) as handle:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fails)
            assert bitfuse.compare(expected, step()) is None
        assert bitfuse.compare(expected, step()) is None
        assert handle.report().fused == handle.report().seen


def test_they_are_loaded_by_one_thread_in_the_order_of_their_calls(model_and_step, compiled, monkeypatch):
    """Triton 3.6 takes one kernel's launcher for another's where two threads load them at once."""
    model, step = model_and_step
    noted, loaded, threads, take = [], [], set(), Rehearsal._take

    def load(plan, args):
        threads.add(threading.current_thread())
        loaded.append(plan.compiled_key(args))

    def noting(self, plan, args):
        noted.append(plan.compiled_key(args))
        take(self, plan, args)

    monkeypatch.setattr(Plan, "load", load)
    monkeypatch.setattr(Rehearsal, "_take", noting)
    with bitfuse.accelerate(model):
        step()
    assert loaded == list(dict.fromkeys(noted))
    assert len(threads) == 1
    assert launch.under_way == {}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=lambda operator: operator.name)
def test_a_launch_waits_for_its_own_kernel(operator, device):
    """It is told by what Triton looks at, of whatever size the tensors are."""
    args = operator.cases[0].arguments(device, tokens=24)
    plan = next(plan for tier in operator.tiers if isinstance(plan := tier.plan(*args), Plan))
    few = tuple(launch.few_bytes(a) if isinstance(a, torch.Tensor) else a for a in args)
    key, ended, other = plan.on_few_bytes().compiled_key(few), Future(), Future()
    launch.under_way.update({key: ended, (0, *key[1:]): other})
    thread = threading.Thread(target=lambda: plan.bind(args, plan.empty(args[0].device)))
    try:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        ended.set_exception(OSError("no space is left on the device"))
        thread.join(60)
        assert not thread.is_alive()
    finally:
        launch.under_way.clear()


class Slow:
    """A launch that takes a while to compile."""

    kernel = SimpleNamespace(compiled=None)

    def compile(self, args):
        time.sleep(0.05)

    def load(self, args):
        pass


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_call_that_ends_early_waits_for_no_kernel_that_is_not_begun(error, device, monkeypatch):
    """Python's own `concurrent.futures.wait` waits for ever for what was cancelled; so did a decode without memory."""
    monkeypatch.setattr(Rehearsal, "THREADS", 2)
    rehearsal, begun, other = Rehearsal(torch.nn.Identity(), ()), threading.Event(), threading.Event()
    args = OPERATORS["residual_pad"].cases[0].arguments(device, tokens=24)
    plan = OPERATORS["residual_pad"].plan(*args)
    keys = [*range(63), plan.compiled_key(args)]
    launches = {key: (Slow(), (torch.zeros(1),)) for key in keys}
    rehearsal._launches.update(launches)

    def call():
        with contextlib.suppress(RuntimeError, KeyboardInterrupt), rehearsal.compiling():
            begun.set()
            assert other.wait(60)
            if error is not None:
                raise error

    def another():
        """A launch of a kernel that is cancelled meanwhile."""
        threading.Timer(0.1, other.set).start()
        plan.bind(args, plan.empty(args[0].device))

    threads = [threading.Thread(target=work, daemon=True) for work in (call, another)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert launch.under_way == {}
    assert not any(thread.name.startswith("bitfuse") for thread in threading.enumerate())


FOR_NO_GPU = """
import threading, time, warnings
from types import SimpleNamespace
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from bitfuse import OPERATORS
from bitfuse.core import launch
from bitfuse.hosts.rehearsal import Rehearsal

loading, loaded, compiled, sources = [], [], [], []
make_ir = ASTSource.make_ir

def one_at_a_time(source, *args, **kwargs):
    sources.append(source)
    time.sleep(0.05)
    try:
        return make_ir(source, *args, **kwargs)
    finally:
        assert sources == [source], "two at once"
        sources.clear()

ASTSource.make_ir = one_at_a_time

class Launcher:
    def __init__(self, src, metadata):
        loading.append(src)
        time.sleep(0.05)
        assert loading.pop() is src, "two at once"
        loaded.append((src.name, threading.current_thread().name))

class Driver:
    launcher_cls = Launcher
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 2, 3, 4, 1024), get_device_properties=lambda _: {"max_shared_mem": 1 << 17}
    )
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
knobs.compilation.listener = lambda *, src, **_: compiled.append(src.name)
rehearsal, calls = Rehearsal(torch.nn.Identity(), ()), []
for name in ("residual_pad", "upsample", "unpatchify", "head_gate"):
    for case in OPERATORS[name].cases[:2]:
        args = case.arguments("cpu", tokens=24)
        plan = OPERATORS[name].plan(*args)
        few = tuple(launch.few_bytes(a) if isinstance(a, torch.Tensor) else a for a in args)
        rehearsal._take(plan.on_few_bytes(), few)
        calls.append((plan, args))
noted, filters = len(rehearsal._launches), list(warnings.filters)
with rehearsal.compiling():
    for plan, args in calls:
        plan.bind(args, plan.empty(args[0].device))
assert len(compiled) == len(loaded) == noted < len(calls), (compiled, loaded, noted)
assert {thread for _, thread in loaded} == {"bitfuse load_0"}, loaded
assert warnings.filters == filters
assert threading.active_count() == 1
launch._loading.acquire()  # by whoever loads another kernel
for plan, args in calls:
    plan.bind(args, plan.empty(args[0].device))
"""


def test_a_signals_handler_may_compile_while_its_thread_does():
    class Source:
        def make_ir(self, interrupted_by=None):
            return interrupted_by() if interrupted_by else "ir"

    found, source = [], kernel._source_in_turn(Source)()
    thread = threading.Thread(target=lambda: found.append(source.make_ir(source.make_ir)), daemon=True)
    thread.start()
    thread.join(10)
    assert found == ["ir"]


def test_triton_compiles_and_loads_each_kernel_once(triton_cache):
    """By its own code for a GPU that is not here: what is bound is what a thread has compiled, from a few bytes."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {**inherited, "TRITON_CACHE_DIR": str(triton_cache)}
    command = [sys.executable, "-c", FOR_NO_GPU]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_triton_is_made_ready_in_threads_where_there_is_a_gpu(monkeypatch):
    """Once, and what goes wrong there is no error of anybody's call."""
    from triton.runtime import cache

    monkeypatch.setattr(rehearsal, "interpreting", lambda: False)
    called = []
    monkeypatch.setattr(cache, "triton_key", lambda: called.append(threading.current_thread()) or 1 / 0)
    rehearsal._started.cache_clear()
    try:
        assert rehearsal.start_up(torch.device("cpu")) == ()
        threads = rehearsal.start_up(torch.device("cuda", 0))
        assert rehearsal.start_up(torch.device("cuda", 0)) is threads
        for thread in threads:
            thread.join(60)
        assert called == [threads[0]]
        assert not any(thread.is_alive() for thread in threads)
    finally:
        rehearsal._started.cache_clear()


FORKED = """
import os, signal, time
import torch
from bitfuse.hosts import rehearsal

assert rehearsal.start_up(torch.device("cuda", 0))
if (child := os.fork()) == 0:
    import triton.language

    os._exit(0)
for _ in range(600):
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        raise SystemExit(status)
    time.sleep(0.1)
os.kill(child, signal.SIGKILL)
raise SystemExit("the child hangs")
"""

ENDS = """
import threading, time
from types import SimpleNamespace
import torch
from bitfuse.hosts.rehearsal import Rehearsal

rehearsal, submitted = Rehearsal(torch.nn.Identity(), ()), threading.Event()

def compile(args):
    time.sleep(0.5)
    print("compiled")

plan = SimpleNamespace(kernel=SimpleNamespace(compiled=None), compile=compile, load=lambda args: None)
rehearsal.THREADS = 1
rehearsal._launches.update({number: (plan, (torch.zeros(1),)) for number in range(64)})

def decode():
    with rehearsal.compiling():
        submitted.set()
        threading.Event().wait()

threading.Thread(target=decode, daemon=True).start()
assert submitted.wait(60)
"""


def alone(code):
    """A process that runs this, as on a GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_that_is_forked_while_triton_is_made_ready_imports_it():
    done = alone(FORKED)
    assert done.returncode == 0, done.stderr


def test_a_process_that_ends_in_a_first_decode_waits_for_no_kernel_that_is_not_begun():
    """As ComfyUI's does at Ctrl-C, which decodes in a thread that Python waits for not at all."""
    done = alone(ENDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("compiled") < 8


def test_no_thread_makes_triton_ready_where_bitfuse_is_off(monkeypatch):
    monkeypatch.setattr(rehearsal, "interpreting", lambda: False)
    monkeypatch.setattr(rehearsal, "_started", lambda: pytest.fail("bitfuse is off"))
    bitfuse.disable()
    try:
        assert rehearsal.start_up(torch.device("cuda", 0)) == ()
    finally:
        bitfuse.enable()


def test_accelerate_makes_triton_ready_first_of_all(device, monkeypatch):
    devices = []
    model, _ = build(device, HOSTS[0])

    def noted(found):
        assert model not in hosts._active
        devices.append(found.type)

    monkeypatch.setattr("bitfuse.hosts.rehearsal.start_up", noted)
    with bitfuse.accelerate(model):
        assert devices == [torch.device(device).type]


def test_it_is_of_one_block_once(device, monkeypatch):
    model, step = build(device, HOSTS[0], layers=2)
    rehearsed = []
    monkeypatch.setattr(Rehearsal, "MIN_BLOCKS", 2)
    monkeypatch.setattr(Rehearsal, "__call__", lambda self, forward: rehearsed.append(self._block()) or forward())
    with bitfuse.accelerate(model):
        step()
        step()
    assert rehearsed == [model.transformer_blocks[0]]


def test_a_model_of_few_blocks_compiles_where_it_calls(device, monkeypatch):
    model, step = build(device, HOSTS[0], layers=2)
    monkeypatch.setattr(Rehearsal, "__call__", lambda *_: pytest.fail("there are two blocks only"))
    with bitfuse.accelerate(model):
        step()


def test_a_kernel_that_does_not_compile_is_a_reason_where_it_is_proved(model_and_step, compiled, monkeypatch):
    model, step = model_and_step
    expected = step()

    def fails(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(Plan, "compile", fails)
    with bitfuse.accelerate(model) as handle:
        for _ in range(2):
            assert bitfuse.compare(expected, step()) is None
        assert handle.report().fused == handle.report().seen


def test_not_where_a_site_may_not_fall_back(model_and_step, compiled):
    model, step = model_and_step
    expected = step()
    with bitfuse.accelerate(model, require=["*.norm1"]) as handle:
        assert bitfuse.compare(expected, step()) is None
        assert {site.fused for site in handle.sites} == {1}
    assert compiled == []


@pytest.mark.parametrize("what", ["hook", "processor", "dropout"])
def test_everybody_in_the_block_is_called_once(what, model_and_step, compiled):
    """Whoever counts, remembers or draws random numbers is called as in stock."""
    model, step = model_and_step
    block, called = model.transformer_blocks[0], []
    if what == "hook":
        block.ff.register_forward_hook(lambda *_: called.append(1))
    elif what == "processor":
        stock = block.attn2.processor

        class Mine:
            def __call__(self, *args, **kwargs):
                called.append(1)
                return stock(*args, **kwargs)

        block.attn2.processor = Mine()
    else:
        block.attn1.to_out[1] = torch.nn.Dropout(0.5)
    torch.manual_seed(5)
    expected, drawn = step(), torch.rand(1)
    before = len(called)
    torch.manual_seed(5)
    with bitfuse.accelerate(model):
        assert bitfuse.compare(expected, step()) is None
    assert bitfuse.compare(drawn, torch.rand(1)) is None
    assert len(called) == 2 * before
    assert compiled


def test_another_model_in_another_thread_does_not_take_part(device, compiled):
    a, step = build(device, HOSTS[0])
    b, other = build(device, HOSTS[0], "2.3")
    expected, found = other(), []
    with bitfuse.accelerate(a) as first, bitfuse.accelerate(b, strict=True) as second:

        def meanwhile(*_):
            hook.remove()
            thread = threading.Thread(target=lambda: found.append(bitfuse.compare(expected, other())))
            thread.start()
            thread.join(60)

        hook = a.transformer_blocks[0].ff.register_forward_hook(meanwhile)
        step()
        assert found == [None]
        assert {(site.fused, site.compiling) for site in second.sites} == {(1, 0)}
        assert {(site.fused, site.compiling) for site in first.sites} == {(0, 1)}


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


def test_a_trace_hears_each_call_once(model_and_step, compiled):
    model, step = model_and_step
    assert bitfuse.trace(step, step, [()], model=model, around_b=lambda: bitfuse.accelerated(model)) is None


def test_not_where_somebody_watches_the_ops(model_and_step, compiled):
    from torch.utils.flop_counter import FlopCounterMode

    model, step = model_and_step
    with FlopCounterMode(display=False) as stock:
        step()
    with bitfuse.accelerate(model), FlopCounterMode(display=False) as ours:
        step()
    assert ours.get_total_flops() == stock.get_total_flops()
    assert compiled == []


def test_observers_and_times_are_of_this_one_call(model_and_step, compiled, monkeypatch):
    model, step = model_and_step
    seen, marks, mark = [], [], report._mark
    monkeypatch.setattr(report, "_mark", lambda device: marks.append(1) or mark(device))
    with bitfuse.accelerate(model) as handle:
        for site in handle.sites:
            site.observers += (lambda site, operator, route, *_: seen.append((site.name, route.fused)),)
        handle.report(time_share_of=step)
        assert sorted(seen) == sorted((site.name, False) for site in handle.sites)
        assert len(marks) == 2 * len(handle.sites)
    assert compiled


def test_not_without_a_gpu(model_and_step, monkeypatch):
    model, step = model_and_step
    if next(model.parameters()).is_cuda:
        pytest.skip("there is one")
    monkeypatch.setattr(Rehearsal, "MIN_BLOCKS", 1)
    monkeypatch.setattr(Plan, "compile", lambda *_: pytest.fail("nothing is to be compiled for a CPU"))
    with bitfuse.accelerate(model):
        step()


@pytest.mark.gpu
def test_on_a_gpu_all_is_compiled_in_it(device, monkeypatch, tmp_path):
    from triton import knobs

    # widths that no other test has, as Triton remembers kernels in the process, too
    model, step = build(device, HOSTS[0], layers=Rehearsal.MIN_BLOCKS, heads=12, audio_heads=12)
    expected = step()
    compiled, after = [], []
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda **found: None if found["cache_hit"] else compiled.append(found["src"])
    )
    rehearse = Rehearsal.__call__

    def counted(self, forward):
        result = rehearse(self, forward)
        after.append(len(compiled))
        return result

    monkeypatch.setattr(Rehearsal, "__call__", counted)
    with bitfuse.accelerate(model) as handle:
        assert bitfuse.compare(expected, step()) is None
        assert handle.report().fused == handle.report().seen - sum(site.state == "compiling" for site in handle.sites)
    assert after == [len(compiled)]
    assert len(compiled) > 5
