"""The report as table, page, text and dictionary; what `require` insists on; how time is measured; the options."""

from __future__ import annotations

import html.parser
import io
import json
import logging
import re
import time
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import bitfuse
from bitfuse import OPERATORS, Handle, NotFused, Report
from bitfuse.core import proof
from bitfuse.hosts.handle import Options
from bitfuse.hosts.report import Times, measure
from bitfuse.hosts.site import Site
from bitfuse.run.audit import Auditor
from bitfuse.run.extra import Extra, Extras
from bitfuse.run.graphs import FIRST
from common import small

SPLIT = OPERATORS["split_rotary_per_op"]
NASTY = "differs at [0, 3]: <script>alert('x')</script> [bold]&amp;"


def inputs():
    return small(SPLIT, "cuda" if torch.cuda.is_available() else "cpu", 2)


def example(**more):
    """Two blocks of four sites: fused, partly fused, left alone and not called."""
    sites = []
    for i in range(2):
        name = f"transformer_blocks.{i}"
        sites += [
            Site(f"{name}.attn1", "qk_rms_norm", fused=3, tiers={"one pass"}),
            Site(f"{name}.norm1", "rms_norm_modulate", fused=1, fallen=Counter({NASTY: 2, "bitfuse is off": 1})),
            Site(f"{name}.attn2", "qk_rms_norm", declined="its processor is another"),
            Site(f"{name}.output", "gated_residual"),
        ]
    return Report("diffusers 1.2.3", sites, **more)


TIMES = Times({f"transformer_blocks.{i}.attn1": 0.25 for i in range(2)}, 2.0)
GRAPH = SimpleNamespace(captures=1, replays=7, reasons={FIRST: 2})
HOOKED = SimpleNamespace(captures=0, replays=0, reasons={FIRST: 1, "attn1 has a forward hook": 3})


def lost():
    """Of two extras, one of them for two reasons."""
    extras = Extras()
    for reason in (NASTY, "gradients are enabled", NASTY):
        extras.gelu.fall(reason)
    extras.second_stream.fall("a hook is attached to attn1")
    return extras


def printed(report, width=200):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(report)
    return console.file.getvalue()


class Cells(html.parser.HTMLParser):
    """The text of a table's cells, row by row, and every tag."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.rows = Counter(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        assert not attributes
        self.tags[tag] += 1
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


# -- its four forms --------------------------------------------------------------------------------------------------


def test_the_dictionary_is_json_and_complete():
    found = example().as_dict()
    assert json.loads(json.dumps(found)) == found
    assert (found["sites_seen"], found["sites_fused"], found["audit"], found["graphs"]) == (8, 2, None, [])
    assert found["sites"][0] == {
        "name": "transformer_blocks.0.attn1",
        "operator": "qk_rms_norm",
        "state": "fused",
        "calls_fused": 3,
        "calls_fallen_back": 0,
        "calls_compiling": 0,
        "reasons": [],
        "tiers": ["one pass"],
    }
    assert "seconds" not in found


def test_times_graphs_and_audits_are_in_the_dictionary():
    found = example(times=TIMES, graphs=[GRAPH], auditor=Auditor(64)).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["seconds"] == 2.0
    assert [(s["seconds"], s["time_share"]) for s in found["sites"][:2]] == [(0.25, 0.125), (0.0, 0.0)]
    assert found["graphs"] == [{"captures": 1, "replays": 7, "calls_without": {FIRST: 2}}]
    assert found["audit"]["every"] == 64
    kind = example(times=TIMES).kinds()[0]
    assert (kind["name"], kind["count"]) == ("transformer_blocks.*.attn1", 2)
    assert (kind["calls_fused"], kind["seconds"], kind["time_share"]) == (6, 0.5, 0.25)


def test_the_text():
    report = example(times=TIMES, graphs=[GRAPH])
    lines = str(report).splitlines()
    assert lines[0] == "2 of 8 sites fused in diffusers 1.2.3"
    calls = "(6 calls fused, 0 not, 25.0% of the time)"
    assert lines[1] == f"  transformer_blocks.*.attn1     2 x qk_rms_norm  fused by one pass {calls}"
    assert "partly fused (2 calls fused, 6 not, 0.0% of the time): differs at [0, 3]" in lines[2]
    assert "left alone (0 calls fused, 0 not, 0.0% of the time): its processor is another" in lines[3]
    assert lines[4].endswith("not called yet (0 calls fused, 0 not, 0.0% of the time)")
    assert lines[5:7] == ["  CUDA graph: 1 captured, 7 replays", f"    2 calls without: {FIRST}"]
    assert lines[7] == "  time: 2 s in all, 0.5 s at these sites"
    assert repr(report) == str(report)


def test_the_table_in_a_terminal_shows_brackets_and_markup_as_they_are():
    text = printed(example(times=TIMES, auditor=Auditor(8), graphs=[GRAPH]))
    assert text.startswith("2 of 8 sites fused in diffusers 1.2.3")
    words = " ".join(text.split())
    assert "site of transformer_blocks.*" in words
    assert "attn1 x 2 qk_rms_norm one pass 6 0 25.0%" in words
    assert "differs at [0, 3]: <script>alert('x')</script> [bold]&amp;" in words
    assert "left alone: its processor is another" in words
    assert "output x 2 gated_residual 0 0 0.0% not called yet" in words
    assert "audit, 1 call in 8: 0 calls of 0 sites, no mismatch" in words
    assert "replays of a CUDA graph run no Python and are not audited" in words
    narrow = printed(example(times=TIMES), width=60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert "…" not in narrow, "nothing is cut"


def test_a_table_without_reasons_has_no_column_for_them():
    report = Report("a host", [Site("transformer_blocks.0.norm1", "rms_norm_modulate", fused=1, tiers={"one pass"})])
    assert "reasons" not in printed(report)
    assert Cells(report._repr_html_()).rows[0] == ["site", "operator", "tier", "calls fused", "fallen back"]
    assert "reasons" in printed(example())


def test_the_page_in_a_notebook_escapes_everything():
    page = Cells(example(times=TIMES, graphs=[GRAPH])._repr_html_())
    assert set(page.tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    assert page.rows[0] == ["site", "operator", "tier", "calls fused", "fallen back", "time share", "reasons"]
    assert page.rows[1] == ["transformer_blocks.*.attn1 x 2", "qk_rms_norm", "one pass", "6", "0", "25.0%", ""]
    assert page.rows[2][-1] == f"{NASTY}; bitfuse is off"
    assert len(page.rows) == 5
    hostile = Cells(Report("<img src=x>", [Site("<b>", "<i>", declined="<a href='x'>")])._repr_html_())
    assert hostile.rows[1][:2] == ["<b>", "<i>"]
    assert hostile.tags["img"] == hostile.tags["b"] == hostile.tags["a"] == 0


def test_an_empty_report():
    report = Report("a host", [])
    assert str(report) == "0 of 0 sites fused in a host"
    assert "0 of 0" in printed(report)
    assert Cells(report._repr_html_()).rows == [["site", "operator", "tier", "calls fused", "fallen back"]]
    assert report.kinds() == []


# -- what was not used -----------------------------------------------------------------------------------------------


def test_what_was_not_used_is_said_with_what_was_lost_and_how_often():
    report = example(graphs=[GRAPH, HOOKED, HOOKED], extras=lost())
    assert str(report).splitlines()[-8:] == [
        "    1 calls without: " + FIRST,
        "  not used: CUDA graph, so the CPU launched these forwards' kernels one by one",
        "    6 x attn1 has a forward hook",
        "  not used: second stream, so the audio half of these blocks did not run beside the video half",
        "    1 x a hook is attached to attn1",
        "  not used: GELU in place, so PyTorch's GELU ran, and the widest tensor of a feed-forward was held twice",
        f"    2 x {NASTY}",
        "    1 x gradients are enabled",
    ]
    found = report.as_dict()["not_used"]
    assert json.loads(json.dumps(found)) == found
    assert [(one["name"], one["reasons"]) for one in found] == [
        ("CUDA graph", {"attn1 has a forward hook": 6}),
        ("second stream", {"a hook is attached to attn1": 1}),
        ("GELU in place", {NASTY: 2, "gradients are enabled": 1}),
    ]
    assert found[1]["lost"] == "the audio half of these blocks did not run beside the video half"
    words = " ".join(printed(report).split())
    assert (
        "not used: GELU in place, so PyTorch's GELU ran, and the widest tensor of a feed-forward was held twice"
        in words
    )
    assert "2 x differs at [0, 3]: <script>alert('x')</script> [bold]&amp;" in words
    assert set(Cells(report._repr_html_()).tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}


def test_nothing_is_said_of_what_was_used():
    report = example(graphs=[GRAPH], extras=Extras())
    assert report.not_used == report.as_dict()["not_used"] == []
    assert "not used" not in str(report)
    assert "not used" not in printed(report)
    assert "not used" not in report._repr_html_()


def test_an_extra_keeps_a_few_reasons_and_none_of_a_bitfuse_that_is_off():
    extra = Extra("one", "nothing")
    extra.fall("bitfuse is off (BITFUSE=0 or bitfuse.disable())")
    assert not extra.reasons
    for i in range(40):
        extra.fall(f"reason {i}")
    extra.fall("reason 0")
    assert len(extra.reasons) == Extra.REASONS_KEPT + 1
    assert extra.reasons["reason 0"] == 2
    assert extra.reasons[Extra.OTHERS] == 8


# -- time ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def handle(monkeypatch, fresh_routes):
    """Of two sites; kernels count as proved."""
    monkeypatch.setattr(proof, "run_battery", lambda *args: proof.Verdict(True, "equal"))
    monkeypatch.setattr(proof, "compare_live", lambda *args: None)
    handle = Handle("a test")
    handle.sites += [Site("blocks.0.a", SPLIT.name), Site("blocks.0.b", SPLIT.name)]
    handle.watch_sites()
    return handle


def test_the_share_of_each_site_is_measured_where_asked_for(handle):
    one, _ = handle.sites

    def step():
        one.call(SPLIT, *inputs())
        one.call(SPLIT, *inputs())
        time.sleep(0.05)

    report = handle.report(time_share_of=step)
    shares = [site["time_share"] for site in report.as_dict()["sites"]]
    assert 0 < shares[0] < 1
    assert shares[1] == 0
    assert report.times.total >= 0.05 + report.times.sites["blocks.0.a"]
    assert set(report.times.sites) == {"blocks.0.a"}
    assert one.fused == 2
    assert one.timer is None, "off the path of other calls"
    assert handle.report().times is None


def test_calls_that_fall_back_are_timed_too(handle):
    bitfuse.disable()
    try:
        times = measure(handle.sites, lambda: handle.sites[1].call(SPLIT, *inputs()))
    finally:
        bitfuse.enable()
    assert times.sites["blocks.0.b"] > 0
    assert sum(handle.sites[1].fallen.values()) == 1


def test_an_error_of_what_is_timed_is_the_users_and_leaves_nothing(handle):
    with pytest.raises(KeyError):
        handle.report(time_share_of=lambda: {}["x"])
    assert all(site.timer is None for site in handle.sites)


def test_nothing_called_while_time_was_taken_is_said(handle):
    report = handle.report(time_share_of=lambda: None)
    assert "no site was called: a CUDA graph was replayed, or something else ran" in str(report)
    assert [row["time_share"] for row in report.kinds()] == [0.0, 0.0]


@pytest.mark.parametrize("given", [True, 3, "step"], ids=repr)
def test_time_share_of_what_can_not_be_called(handle, given):
    with pytest.raises(TypeError, match=r"time_share_of is a \w+; accepted: something to call"):
        handle.report(time_share_of=given)


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("require", ["norm1", [1], [None], 5, None], ids=repr)
def test_other_values_of_require_are_an_error_that_names_it(require):
    with pytest.raises(ValueError, match=r"^require is .*; accepted: a list of names of operators and sites"):
        bitfuse.accelerate(None, require=require)


def test_an_unknown_option_is_an_error_in_both_forms():
    for accelerate in (bitfuse.accelerate, bitfuse.accelerated):
        with pytest.raises(TypeError, match="stricter"):
            accelerate(None, stricter=True)


def test_options_are_equal_where_their_values_are():
    assert Options(require=["a", "b"]) == Options(require=("a", "b"))
    assert Options() != Options(audit=64)
    assert str(Options(audit=64)) == "strict=False, cuda_graph=False, keep_text=False, audit=64, require=()"


def required(*names):
    handle = Handle("a test", Options(require=names))
    handle.sites += example().sites
    return handle


@pytest.mark.parametrize(
    ("names", "strict"),
    [
        (["transformer_blocks.*.attn1"], ["attn1", "attn1"]),
        (["transformer_blocks.1.output"], ["output"]),
        (["gated_residual", "*.norm1"], ["norm1", "output", "norm1", "output"]),
        (["rms_*"], ["norm1", "norm1"]),
    ],
    ids=str,
)
def test_what_is_required_is_strict_and_nothing_else(names, strict):
    handle = required(*names)
    handle.watch_sites()
    assert [site.name.rpartition(".")[2] for site in handle.sites if site.strict] == strict


@pytest.mark.parametrize("name", ["attn1", "norm1 ", "", "transformer_blocks.*.attn9", "split_rotary_fp32"], ids=repr)
def test_an_unknown_name_lists_the_accepted_ones(name):
    with pytest.raises(ValueError, match=f"^require names {re.escape(repr(name))}, which is nothing here") as raised:
        required("qk_rms_norm", name).watch_sites()
    for accepted in ("gated_residual, qk_rms_norm, rms_norm_modulate", "transformer_blocks.*.attn1, transformer_bl"):
        assert accepted in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_required_and_was_left_alone_is_named():
    with pytest.raises(NotFused, match=r"transformer_blocks\.0\.attn2: its processor is another \(and 1 more sites\)"):
        required("qk_rms_norm").watch_sites()
    required("gated_residual").watch_sites()


# -- in a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """One layer in fp32, where norms fall back: only residual sums without a norm are fused, and rotations."""
    pytest.importorskip("diffusers", minversion="0.37")
    from test_diffusers import V20, make

    return make({**V20, "num_layers": 1}, torch.float32)


def run(model):
    from test_diffusers import run

    return run(model)


def test_a_required_site_that_falls_back_raises_at_the_call(model):
    expected = run(model)
    with bitfuse.accelerated(model, require=["transformer_blocks.*.output", "*.audio_output"]):
        found = run(model)
    assert [bitfuse.compare(a, b) for a, b in zip(expected, found, strict=True)] == [None, None]
    reason = r"transformer_blocks\.0\.norm1: x is torch\.float32; accepted"
    with bitfuse.accelerated(model, require=["*.norm1"]), pytest.raises(NotFused, match=reason):
        run(model)
    run(model)


def test_a_name_that_is_nothing_here_restores_the_model(model):
    before = {type(module) for module in model.modules()}
    with pytest.raises(ValueError, match=r"require names 'norm7'.*transformer_blocks\.\*\.audio_to_video_attn"):
        bitfuse.accelerate(model, require=["norm7"])
    assert {type(module) for module in model.modules()} == before
    bitfuse.accelerate(model).restore()  # and no acceleration is in force


def test_all_options_are_compared_with_those_in_force(model):
    given = {"strict": True, "cuda_graph": True, "keep_text": True, "audit": 3, "require": ["*.norm1"]}
    assert set(given) == set(Options.__dataclass_fields__)
    with bitfuse.accelerated(model) as handle:
        for name, value in given.items():
            with pytest.raises(ValueError, match=rf"accelerated already, with .*; given .*{name}="):
                bitfuse.accelerate(model, **{name: value})
        assert bitfuse.accelerate(model, require=[]) is handle
        handle.restore()
    with bitfuse.accelerated(model, require=["*.norm1"]) as handle:
        assert bitfuse.accelerate(model, require=("*.norm1",)) is handle
        handle.restore()  # as it was asked for inside the block, it would stay


def test_one_line_is_logged_and_names_the_off_switch(model, caplog):
    with caplog.at_level(logging.INFO, logger="bitfuse"), ExitStack() as stack:
        stack.enter_context(bitfuse.accelerated(model))
    (record,) = [r for r in caplog.records if r.name == "bitfuse"]
    assert re.fullmatch(
        r"bitfuse: 16 of 16 sites taken over in diffusers [\d.]+; handle\.restore\(\) or BITFUSE=0 switches it off",
        record.getMessage(),
    )


def test_a_handle_says_in_one_line_what_it_is(handle):
    assert repr(handle) == "<bitfuse.Handle: 0 of 2 sites fused in a test>"


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu_time_is_that_of_the_device(handle):
    one, other = handle.sites
    x = torch.randn(1, 4096, 4096, device="cuda", dtype=torch.bfloat16)
    tables = (torch.randn(1, 32, 4096, 64, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    args = (x, *tables)
    one.call(SPLIT, *args)

    def step():
        for _ in range(100):
            one.call(SPLIT, *args)
        other.call(SPLIT, *args)

    report = handle.report(time_share_of=step)
    first, second = (site["time_share"] for site in report.as_dict()["sites"])
    assert 0 < second < first < 1
    assert 30 < first / second < 300
