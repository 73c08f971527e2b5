"""Audits: they see what `compare` sees, without waiting for the device, and take a wrong kernel out of use at once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import types
import warnings
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitfuse
from bitfuse import OPERATORS, BitfuseWarning, Handle, NotFused, compare
from bitfuse.core import proof
from bitfuse.core.bits import BITS, bits_mismatch
from bitfuse.core.operator import Tier
from bitfuse.hosts.handle import Options
from bitfuse.hosts.site import Site
from bitfuse.run import twin
from bitfuse.run.audit import Auditor, Comparison
from bitfuse.run.graphs import GraphedForward
from common import ONE_OF_EACH_FILE, small, small_cases
from test_graphs import Toy, captured, stand_in, x_of

SPLIT = OPERATORS["split_rotary_per_op"]
RIGHT = SPLIT.tiers[0]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture
def taken_as_proved(monkeypatch, fresh_routes):
    """Every kernel counts as proved, unseen: what an audit is there to find out about."""
    monkeypatch.setattr(proof, "run_battery", lambda *args: proof.Verdict(True, "equal"))
    monkeypatch.setattr(proof, "compare_live", lambda *args: None)


@pytest.fixture
def wrong(monkeypatch, taken_as_proved):
    """SPLIT with a wrong kernel that nothing has checked."""
    mutant = next(m for m in SPLIT.mutants if "sign" in m.name)
    stock = types.SimpleNamespace(tiers=SPLIT.tiers)
    monkeypatch.setattr(SPLIT, "tiers", (Tier("wrong", lambda *args: mutant.plan(stock, *args)),))
    return SPLIT


def inputs(operator=SPLIT, tokens=5, device=None):
    return small(operator, device or ("cuda" if torch.cuda.is_available() else "cpu"), tokens)


def site_of(auditor, operator=SPLIT, name="transformer_blocks.0.attn1"):
    return Site(name, operator.name, observers=(auditor,))


def call_and_settle(site, operator, args):
    site.call(operator, *args)
    for auditor in site.observers:
        auditor.settle()


def audited(expected, found):
    """The mismatch that an audit's comparison finds, as `compare` would say it."""
    record = torch.zeros(4, dtype=torch.int64, device=expected.device)
    Comparison()(expected, found, record)
    count, back, a, b = record.tolist()
    if not count:
        return None
    flat = expected.numel() - back
    return bits_mismatch(tuple(expected.shape), expected.element_size(), flat, a, b, count)


# -- the comparison on the device is `compare` -----------------------------------------------------------------------


@given(data=st.data())
def test_the_comparison_on_the_device_says_what_compare_says(data):
    dtype = data.draw(st.sampled_from([*DTYPES, torch.int32, torch.bool]))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    if dtype.is_floating_point:
        values = st.sampled_from([0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 1e-7])
    else:
        values = st.integers(0, 1)
    n = torch.Size(shape).numel()
    a, b = (torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n))).to(dtype).reshape(shape) for _ in "ab")
    if len(shape) > 1 and data.draw(st.booleans()):
        a, b = a.transpose(0, 1), b.transpose(0, 1)
    assert audited(a, b) == compare(a, b)
    assert audited(a, a.clone(memory_format=torch.preserve_format)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_pattern_of_16_bits_against_itself_and_others(dtype, device):
    """All numbers, infinities and NaNs, with every payload and either sign."""
    patterns = torch.arange(-(2**15), 2**15, device=device).to(torch.int16)
    a = patterns.view(dtype)
    assert audited(a, a.clone()) is None
    nans = int(a.isnan().sum())
    for shift in (1, 2**15):  # the next pattern, and the same one with the other sign
        b = patterns.roll(shift).view(dtype)
        mismatch = audited(a, b)
        assert mismatch == compare(a, b)
        assert 65536 - nans <= mismatch.count < 65536


@pytest.mark.parametrize("n", [1, 16, Comparison.BLOCK - 1, Comparison.BLOCK, Comparison.BLOCK + 1, 20000])
def test_one_bit_anywhere_and_the_first_of_several(n, device):
    a = torch.ones(n, dtype=torch.bfloat16, device=device)
    for places in ({0}, {n - 1}, {n // 2, n - 1}, {n // 3, n // 2}):
        b = a.clone()
        for place in places:
            b.view(torch.int16)[place] ^= 1
        mismatch = audited(a, b)
        assert (mismatch.index, mismatch.count) == ((min(places),), len(places))
        assert (mismatch.expected, mismatch.found) == ("0x3f80", "0x3f81")
        assert mismatch == compare(a, b)


def test_many_forms_of_outputs_are_bounded(monkeypatch):
    monkeypatch.setattr(bitfuse.run.audit, "_LAUNCHES_KEPT", 3)
    comparison, record = Comparison(), torch.zeros(4, dtype=torch.int64)
    for n in range(1, 9):
        comparison(torch.ones(n), torch.ones(n), record)
    assert len(comparison._launches) <= 3
    assert record.tolist() == [0, 0, 0, 0]


def test_compiled_it_reads_16_bytes_at_a_time_and_writes_by_64_bit_atomics(triton_cache):
    program = """
import torch
from bitfuse.tools.prove import ptx
from bitfuse.run.audit import Comparison
for dtype, integers in ((torch.bfloat16, torch.int16), (torch.float32, torch.int32)):
    args = (torch.empty(64, dtype=integers), torch.empty(64, dtype=integers), torch.zeros(4, dtype=torch.int64))
    for plan in Comparison().plans(dtype, 6144 * 4096):
        text = ptx.compile_for(plan, args, 90).asm["ptx"]
        print(*map(text.count, ("ld.global.v4.b32", "acq_rel.add.u64", "acq_rel.max.s64", "st.global")))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(triton_cache)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    # 2048 elements of two operands by 128 threads; then the look-up of the bits
    assert lines == [(4, 1, 1, 0), (0, 0, 0, 2), (8, 1, 1, 0), (0, 0, 0, 2)], done.stderr


# -- which calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 7, 64])
def test_one_call_is_drawn_of_each_run_of_so_many(every):
    auditor, calls, called = Auditor(every), [], 0
    for _ in range(200):
        called += auditor._draw() if calls else auditor._left
        calls.append(called - 1)
    assert [call // every for call in calls] == list(range(200))
    assert len({call % every for call in calls}) > every // 2


def test_no_site_is_missed_for_good_where_the_numbers_have_a_common_divisor():
    """Of a model with 128 calls a step, every 64th would be the same two calls for ever."""
    auditor, sites, called = Auditor(64), Counter(), -1
    for _ in range(3000):
        called += auditor._draw()
        sites[called % 128] += 1
    assert len(sites) == 128


def test_the_draw_touches_nobody_elses_random_numbers_and_is_new_each_time():
    random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), torch.get_rng_state()
    draws = {tuple(auditor._draw() for _ in range(8)) for auditor in (Auditor(10**6), Auditor(10**6))}
    assert len(draws) == 2
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("operator", ONE_OF_EACH_FILE, ids=lambda o: o.name)
def test_every_operator_is_audited_and_gives_what_it_gave(operator, taken_as_proved, device):
    auditor = Auditor(1)
    site = site_of(auditor, operator)
    for case in small_cases(operator)[:1]:
        args = case.arguments(device, tokens=2)
        found = site.call(operator, *args)
        assert compare(operator.reference(*args), found) is None
    auditor.settle()
    assert (auditor.calls, auditor.mismatches, site.fused) == (1, 0, 1)


def test_one_in_three(taken_as_proved):
    auditor = Auditor(3)
    sites = [site_of(auditor, name=f"transformer_blocks.{i}.attn1") for i in range(3)]
    args = inputs()
    for _ in range(10):
        for site in sites:
            site.call(SPLIT, *args)
    auditor.settle()
    assert auditor.calls == 10
    assert sum(auditor.sites.values()) == 10
    assert set(auditor.sites) <= {site.name for site in sites}


def test_calls_that_are_not_fused_are_neither_counted_nor_audited():
    auditor = Auditor(2)
    site = site_of(auditor)
    left = auditor._left
    bitfuse.disable()
    try:
        for _ in range(5):
            site.call(SPLIT, *inputs())
    finally:
        bitfuse.enable()
    x, *tables = inputs()
    site.call(SPLIT, x.requires_grad_(), *tables)
    assert (sum(site.fallen.values()), site.fused) == (6, 0)
    assert (auditor.calls, auditor._left) == (0, left)


def test_under_torch_compile_nothing_is_audited(taken_as_proved):
    auditor = Auditor(1)
    site, args = site_of(auditor), inputs()
    site.call(SPLIT, *args)
    found = torch.compile(lambda *args: site.call(SPLIT, *args), backend="eager", fullgraph=True)(*args)
    assert compare(SPLIT.reference(*args), found) is None
    auditor.settle()
    assert auditor.calls == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_every_gradient_mode(mode, taken_as_proved):
    auditor = Auditor(1)
    with mode():
        site_of(auditor).call(SPLIT, *inputs())
    site_of(auditor).call(SPLIT, *inputs())
    auditor.settle()
    assert (auditor.calls, auditor.mismatches) == (2, 0)


# -- a mismatch ------------------------------------------------------------------------------------------------------


def test_a_wrong_kernel_is_condemned_and_the_warning_says_where(wrong):
    auditor, args = Auditor(1), inputs()
    site = site_of(auditor)
    mismatch = compare(wrong.reference(*args), wrong(*args))
    assert mismatch is not None, "the negative control: unseen, it does give wrong bits"
    with pytest.warns(BitfuseWarning) as warned:
        call_and_settle(site, wrong, args)
    sentence = f"{mismatch.sentence}, in an audited call at transformer_blocks.0.attn1"
    (warning,) = warned
    assert str(warning.message).startswith(
        f"split_rotary_per_op by wrong: {sentence}; bitfuse uses this kernel no more"
    )
    for part in (str(list(mismatch.index)), mismatch.expected, mismatch.found):
        assert part in str(warning.message)
    route = wrong.route(*args)
    assert (route.fused, route.reason) == (False, sentence)
    assert route.mismatch.index == mismatch.index
    assert compare(wrong.reference(*args), site.call(wrong, *args)) is None
    assert (site.fused, dict(site.fallen)) == (1, {sentence: 1})
    assert auditor.as_dict() == {
        "every": 1,
        "calls": 1,
        "sites": 1,
        "mismatches": 1,
        "condemned": [f"split_rotary_per_op by wrong: {sentence}"],
        "skipped": {},
    }


def test_the_signature_is_condemned_in_every_layout_and_no_other_signature(wrong):
    auditor = Auditor(1)
    longer, half = inputs(tokens=9), tuple(t.half() for t in inputs())
    for args in (longer, half, inputs()):
        assert wrong.route(*args).fused
    with pytest.warns(BitfuseWarning):
        call_and_settle(site_of(auditor), wrong, inputs())
    assert not wrong.route(*longer).fused
    assert not wrong.route(*inputs(tokens=7)).fused
    assert wrong.route(*half).fused


def test_the_next_tier_takes_over_where_it_is_proved(monkeypatch, wrong):
    right = Tier("right", lambda *args: replace(RIGHT.plan(*args), num_warps=2))
    monkeypatch.setattr(SPLIT, "tiers", (*SPLIT.tiers, right))
    auditor, args = Auditor(1), inputs()
    site = site_of(auditor)
    with pytest.warns(BitfuseWarning):
        call_and_settle(site, SPLIT, args)
    assert compare(SPLIT.reference(*args), site.call(SPLIT, *args)) is None
    assert (site.fused, site.tiers) == (2, {"wrong", "right"})
    assert "wrong: differs at" in SPLIT.route(*args).passed_over[0]
    auditor.settle()
    assert (auditor.calls, auditor.mismatches) == (2, 1)


def test_where_warnings_are_errors_the_kernel_is_condemned_all_the_same(wrong):
    auditor, args = Behind(1), inputs()
    site = site_of(auditor)
    site.call(wrong, *args)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BitfuseWarning, match="differs at"):
            auditor.settle()
    assert not wrong.route(*args).fused
    auditor.settle()
    assert (auditor.calls, auditor.mismatches, len(auditor.condemned)) == (1, 1, 1)


def test_strict_raises_after_a_mismatch(wrong):
    auditor, args = Auditor(1), inputs()
    site = site_of(auditor)
    site.strict = True
    with pytest.warns(BitfuseWarning):
        call_and_settle(site, wrong, args)
    with pytest.raises(NotFused, match=r"transformer_blocks\.0\.attn1: differs at .* in an audited call"):
        site.call(wrong, *args)


def test_another_form_is_a_mismatch_too(taken_as_proved, monkeypatch):
    auditor, args = Auditor(1), inputs()
    assert SPLIT.route(*args).fused
    reference = SPLIT.reference
    monkeypatch.setattr(SPLIT, "reference", lambda *args: reference(*args).float())
    with pytest.warns(BitfuseWarning, match="the dtype is torch.bfloat16 where the reference has torch.float32"):
        call_and_settle(site_of(auditor), SPLIT, args)
    assert not SPLIT.route(*args).fused


def test_which_of_several_outputs_differs_is_said(taken_as_proved, monkeypatch):
    operator = OPERATORS["qk_rms_norm"]
    auditor, args = Auditor(1), inputs(operator)
    assert operator.route(*args).fused
    reference = operator.reference
    monkeypatch.setattr(operator, "reference", lambda *args: (reference(*args)[0], reference(*args)[1] * 2))
    with pytest.warns(BitfuseWarning, match="qk_rms_norm by .*: output 1 differs at"):
        call_and_settle(site_of(auditor, operator), operator, args)


def test_graphs_that_hold_the_kernel_are_not_replayed(wrong, monkeypatch):
    monkeypatch.setattr(twin, "ALIGNED", 64)  # of every new CPU tensor
    torch.manual_seed(0)
    toy = Toy().eval()
    with torch.no_grad():
        replay = captured(stand_in(GraphedForward(toy, toy.forward)), x_of(1))
        replay(x_of(1))
        assert (replay.graphs, replay.replays) == (1, 1)
        with pytest.warns(BitfuseWarning):
            call_and_settle(site_of(Auditor(1)), wrong, inputs())
        replay(x_of(1))
        assert (replay.graphs, replay.replays) == (0, 1)
        captured(replay, x_of(2))  # and further calls get new ones


# -- a device that is behind -----------------------------------------------------------------------------------------


class Event:
    """What a CUDA event does: here the test says when it has passed."""

    passed = False

    def query(self):
        return self.passed

    def synchronize(self):
        self.passed = True


class Behind(Auditor):
    """An auditor whose answers arrive when the test says so."""

    def __init__(self, every):
        super().__init__(every)
        self.events = []

    def _send(self, record):
        self.events.append(Event())
        return record.cpu(), self.events[-1]


def test_nothing_is_looked_at_before_its_event_has_passed(wrong):
    auditor, args = Behind(1), inputs()
    site = site_of(auditor)
    for _ in range(3):
        site.call(wrong, *args)
    assert (auditor.calls, len(auditor._pending)) == (0, 3)
    assert wrong.route(*args).fused
    auditor.events[0].passed = True
    with pytest.warns(BitfuseWarning) as warned:
        site.call(wrong, *args)  # looks, and is itself under way still
    assert len(warned) == 1
    assert not wrong.route(*args).fused
    auditor.settle()  # those that were launched before: mismatches, but no news
    assert (auditor.calls, auditor.mismatches, len(auditor.condemned)) == (4, 4, 1)
    assert not auditor._pending


def test_checks_on_their_way_are_bounded(taken_as_proved, monkeypatch):
    monkeypatch.setattr(bitfuse.run.audit, "PENDING", 4)
    auditor, args = Behind(1), inputs(tokens=1)
    site = site_of(auditor)
    for _ in range(9):
        site.call(SPLIT, *args)
    assert len(auditor._pending) == 4
    assert "5 calls not audited: 4 checks were still on their way from the device" in str(auditor)
    auditor.settle()
    assert auditor.calls == 4


def test_no_tensor_of_the_call_is_kept(taken_as_proved, monkeypatch):
    auditor, args = Behind(1), inputs()
    kept, reference = [], SPLIT.reference
    SPLIT.route(*args)

    def noted(*args):
        result = reference(*args)
        kept.append(weakref.ref(result))
        return result

    monkeypatch.setattr(SPLIT, "reference", noted)
    result = site_of(auditor).call(SPLIT, *args)
    kept += [weakref.ref(t) for t in (*args, result)]
    del args, result
    assert [ref() for ref in kept] == [None] * 5
    assert len(auditor._pending) == 1


def test_no_memory_for_the_reference(taken_as_proved, monkeypatch):
    auditor, args = Auditor(1), inputs()
    site = site_of(auditor)
    expected = site.call(SPLIT, *args)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SPLIT, "reference", full)
    assert compare(expected, site.call(SPLIT, *args)) is None
    assert (auditor.calls, dict(auditor.skipped)) == (1, {"the device had no memory left for the reference": 1})
    assert SPLIT.route(*args).fused


# -- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("audit", [0, -1, True, False, 1.0, "64", [64]], ids=repr)
def test_other_values_of_audit_are_an_error_that_names_it(audit):
    with pytest.raises(ValueError, match=r"^audit is .*; accepted: None \(off\), or an int of at least 1"):
        bitfuse.accelerate(None, audit=audit)
    with pytest.raises(ValueError, match=r"^audit is "):
        bitfuse.accelerated(None, audit=audit)


def test_without_audit_a_handle_has_none():
    handle = Handle("a test")
    handle.sites.append(Site("a", SPLIT.name))
    handle.watch_sites()
    assert handle.auditor is None
    assert handle.sites[0].observers == ()
    assert handle.report().as_dict()["audit"] is None
    assert "audit" not in str(handle.report())


def test_report_and_restore_wait_for_what_is_on_its_way(taken_as_proved):
    for end in (Handle.report, Handle.restore):
        handle = Handle("a test", Options(audit=1))
        handle.auditor = Behind(1)
        handle.sites.append(Site("a", SPLIT.name))
        handle.watch_sites()
        handle.sites[0].call(SPLIT, *inputs())
        assert handle.auditor.calls == 0
        end(handle)
        assert handle.auditor.calls == 1
        assert "audit, 1 call in 1: 1 calls of 1 sites, no mismatch" in str(handle.report())


def test_an_audited_model_has_the_same_bits_and_its_report_counts(taken_as_proved):
    pytest.importorskip("diffusers", minversion="0.37")
    from test_diffusers import V20, make, run

    model = make({**V20, "num_layers": 1})
    expected = run(model)
    with bitfuse.accelerated(model, audit=2) as handle:
        for _ in range(2):
            found = run(model)
            assert [compare(a, b) for a, b in zip(expected, found, strict=True)] == [None, None]
        sites = len(handle.sites)
        audit = handle.report().as_dict()["audit"]
        assert (audit["every"], audit["calls"], audit["mismatches"]) == (2, sites, 0)
        assert sites // 2 <= audit["sites"] <= sites
        with pytest.raises(ValueError, match=r"accelerated already, with .*audit=2.*; given .*audit=None"):
            bitfuse.accelerate(model)
        assert bitfuse.accelerate(model, audit=2) is handle


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def waiting_is_an_error():
    def switch(mode):
        torch.cuda.set_sync_debug_mode(mode)

    yield switch
    switch("default")


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ONE_OF_EACH_FILE, ids=lambda o: o.name)
def test_on_a_gpu_an_audited_call_waits_for_nothing(operator, fresh_routes, waiting_is_an_error):
    auditor = Auditor(1)
    site, args = site_of(auditor, operator), inputs(operator, tokens=256)
    site.call(operator, *args)  # proves, and compiles the comparison
    waiting_is_an_error("error")
    for _ in range(20):
        site.call(operator, *args)
    waiting_is_an_error("default")
    auditor.settle()
    assert (auditor.calls, auditor.mismatches, dict(auditor.skipped)) == (21, 0, {})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_the_comparison_says_what_compare_says(dtype):
    torch.manual_seed(1)
    for n in (1, 2047, 1 << 20, (1 << 20) + 7):
        bits = torch.randint(-(2**62), 2**62, (n,), device="cuda").to(BITS[dtype.itemsize])
        a, b = bits.view(dtype), bits.clone()
        assert audited(a, b.view(dtype)) is None
        for place in {n // 3, n // 2, n - 1}:
            b[place] ^= 1
        assert audited(a, b.view(dtype)) == compare(a, b.view(dtype))


@pytest.mark.gpu
def test_on_a_gpu_on_a_second_stream_behind_much_work(wrong):
    auditor, args = Auditor(1), inputs(device="cuda")
    assert compare(wrong.reference(*args), wrong(*args)) is not None
    site, side = site_of(auditor), torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(100):
            busy = (busy @ busy).clamp(-1, 1)
        site.call(wrong, *args)
    assert auditor.calls == 0  # nobody has waited
    with pytest.warns(BitfuseWarning, match="differs at"):
        auditor.settle()
    assert not wrong.route(*args).fused
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_audited_while_a_graph_is_captured(fresh_routes):
    auditor, args = Auditor(1), inputs(device="cuda")
    site = site_of(auditor)
    expected = site.call(SPLIT, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = site.call(SPLIT, *args)
    graph.replay()
    auditor.settle()
    assert (auditor.calls, dict(auditor.skipped)) == (1, {"a CUDA graph was being captured": 1})
    assert compare(expected, found) is None
