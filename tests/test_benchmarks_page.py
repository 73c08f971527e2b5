"""docs/benchmarks.md is what the committed JSON says, its plots too; and what benchmarks/peers.py writes down."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def module_of(monkeypatch):
    """Imports a script of benchmarks/ with what it imports beside it, for this test alone."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in ("page", "plots", "tables", "peers", "session", "first_decode", "two_builds"):
            del sys.modules[name]


def test_the_page_is_that_of_the_json(module_of):
    page = module_of("page")
    assert page.PAGE.read_text() == page.page(), "run `make readme`"


def test_the_plots_are_those_of_the_json(module_of):
    matplotlib = pytest.importorskip("matplotlib")
    pinned = re.search(r"^matplotlib==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    if matplotlib.__version__ != pinned:
        pytest.skip(f"another matplotlib than that of constraints.txt draws otherwise: {matplotlib.__version__}")
    page = module_of("page")
    drawn = dict(page.pictures())
    assert {path.name for path in page.PLOTS.iterdir()} == set(drawn)
    for name, text in drawn.items():
        assert (page.PLOTS / name).read_text() == text, f"{name}: run `make readme`"


def test_every_link_and_picture_of_the_page_is_there(module_of):
    page = module_of("page")
    text = page.PAGE.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert len(links) > 10
    for link in links:
        assert (page.PAGE.parent / link).is_file(), link


def test_a_section_without_results_is_left_out(module_of, monkeypatch, tmp_path):
    page = module_of("page")
    monkeypatch.setattr(page.tables, "RESULTS", tmp_path)
    assert page.page() == f"{page.HEAD}\n\n{page.TAIL}\n"
    pytest.importorskip("matplotlib")
    assert dict(page.pictures()) == {}


def test_a_plot_has_no_trace_of_where_it_was_drawn(module_of):
    pytest.importorskip("matplotlib")
    plots = module_of("plots")
    once, again = (
        plots.svg(plots.curves({"stock": {1536: 3.0, 6144: 1.0 / x}}, "tokens", "ms", [1, 3]), 4, 3)
        for x in (3.0, 3.0000000001)
    )
    assert once == again, "the last digits of a float are not drawn"
    assert "metadata" not in once
    assert not re.search(r"\d\.\d{3}", once)
    assert not re.search(r"[pmhC][0-9a-f]{10}", once)


def _row(way, ratio=None, differ=0, **more):
    row = {"operator": "swiglu", "case": "a tile", "x": [1, 6, 8], "tokens": None, "way": way, **more}
    if ratio is not None:
        us = {"median": 10.0 * ratio, "p10": 9.0, "p90": 11.0}
        row |= {"us": us, "ratio": ratio, "differ": differ, "elements": 48, "share": differ / 48}
    return row


def test_a_peer_that_is_faster_stays_and_one_that_is_absent_says_why(module_of, monkeypatch):
    page = module_of("page")
    machine = dict.fromkeys(("device", "driver", "torch", "triton", "diffusers"), "1") | {"date": "2026-11-29T"}
    rows = [_row("bitfuse", 1.0), _row("eager", 3.0), _row("SGLang, exact", 0.8), _row("KJNodes", 0.9, differ=12)]
    rows += [_row("torch.compile", 1.2), _row("quack", reason="not installed")]
    document = {"machine": machine, "path": "benchmarks/results/x-peers.json", "rows": rows}
    document |= {"peers": {"sglang": "0.5.23"}, "elsewhere": [{"peer": "cache-dit", "reason": "has none"}]}
    monkeypatch.setattr(page.tables, "newest_or_none", lambda name: document if name == "peers" else None)
    text = page.peers()
    assert "| `swiglu`, 1x6x8 | bitfuse | 10.0 us (9.00 to 11.0) | 1.00x | none |" in text
    assert "|  | KJNodes | 9.00 us (9.00 to 11.0) | 0.90x | 12 of 48, 25.0% |" in text
    said = "3 times a peer was timed beside bitfuse (torch.compile in each of its modes is one, each size counts), "
    said += "2 times one that has eager's bits at every size that was tried."
    assert f"{said} Of these it is faster 1 times, of the others 1 times:" in text
    assert (
        "| SGLang, exact | `swiglu` | 1x6x8 | 0.80x | none |\n| KJNodes | `swiglu` | 1x6x8 | 0.90x | 12 of 48" in text
    )
    assert "- quack: not installed (`swiglu`)" in text
    assert "- cache-dit: has none" in text


def test_peers_say_what_changed_in_bitfuse_after_them(module_of, monkeypatch):
    page = module_of("page")
    ratios = (("swiglu", 0.9), ("swiglu", 0.95), ("modulate", 0.8))  # of the last no peer was timed
    builds = {"machine": {"date": "2026-11-29T16"}, "path": "benchmarks/results/x.json"}
    builds["operators"] = [{"operator": name, "new / old": ratio} for name, ratio in ratios]
    monkeypatch.setattr(page.tables, "newest_or_none", lambda name: builds)
    peers = {"machine": {"date": "2026-11-29T10"}, "rows": [_row("bitfuse", 1.0)]}
    assert "take of their time now: `swiglu` 0.90 to 0.95; [x.json](../benchmarks/results/x.json)" in page._since(peers)
    assert page._since(peers | {"machine": {"date": "2026-11-29T17"}}) == "", "those of the peers are newer"


def test_a_graph_has_a_peak_only_where_what_it_holds_was_counted(module_of):
    page = module_of("page")
    peaks = {"stock": 0.7, "bitfuse": 0.9, "graph": 0.4}
    assert page._comfyui_peaks({"peak_gb_of_a_step": peaks}) == {"stock": 0.7, "bitfuse": 0.9}
    assert page._comfyui_peaks({"peak_gb_of_a_step": peaks, "graph_holds_gb": 0.25})["graph"] == pytest.approx(0.65)


def test_a_row_of_a_page_with_several_gpus_names_its_own(module_of):
    page = module_of("page")
    assert page.gpu({"machine": {"device": "NVIDIA H100 80GB HBM3"}}) == "H100"
    for section in (page.steps_by_tokens, page.operators, page.memory, page.first):
        text = section()
        if len({name for name in ("H100", "H200") if f"NVIDIA {name}" in text}) > 1:
            assert "| GPU |" in text, section.__name__


def test_a_way_with_stocks_bits_is_not_among_those_with_others(module_of, monkeypatch):
    page = module_of("page")
    ms = {way: {"median": 2.0, "p10": 1.0, "p90": 3.0} for way in ("stock", "bitfuse", "compiled + graph")}
    row = {"host": "diffusers", "host_version": "diffusers 1", "version": "2.0", "tokens": 24, "mismatch": None}
    row |= {"ms": ms, "speed_ups": {"bitfuse": 1.0}, "differs_from_stock": {"compiled + graph": "output 0 differs"}}
    machine = dict.fromkeys(("device", "driver", "torch", "triton", "diffusers"), "1") | {"date": "2026-11-29T"}
    monkeypatch.setattr(page, "steps", lambda: [({"machine": machine, "path": "x.json"}, row)])
    assert "compiled: 2.00 ms" in page.steps_by_tokens()
    row["differs_from_stock"]["compiled + graph"] = None
    with pytest.raises(ValueError, match="has stock's bits"):
        page.steps_by_tokens()


def test_the_plan_everything_measures_all_of_the_page(module_of, monkeypatch):
    page, session = module_of("page"), module_of("session")
    asked = set()
    monkeypatch.setattr(page.tables, "newest_or_none", lambda name: asked.add(name))
    monkeypatch.setattr(page.tables, "newest_of_each", lambda name: asked.add(name) or [])
    page.page()
    names = {command.name for plan in session.EVERYTHING for command in session.PLANS[plan]}
    assert len(asked) > 5
    assert asked <= names, "the page says that this plan measures it anew"


def test_the_legend_of_peers_says_what_a_hollow_dot_is(module_of):
    pytest.importorskip("matplotlib")
    plots = module_of("plots")
    text = plots.svg(plots.beside({"swiglu": [("SGLang", 1.5, False)]}, "time"), 8, 3)
    for label in ("SGLang", "other bits than eager's", "bitfuse"):
        assert f">{label}</text>" in text


def test_peers_are_compared_with_eager_before_they_are_timed(module_of, monkeypatch, fresh_routes):
    peers = module_of("peers")

    def off_by_one(gate, up):
        out = torch.nn.functional.silu(gate) * up
        out.view(torch.int16)[0, 0, 0] += 1
        return lambda: out

    def fails(gate, up):
        raise peers.Absent("not installed")

    ways = [("equal", lambda gate, up: lambda: torch.nn.functional.silu(gate) * up), ("other", off_by_one)]
    ways += [("absent", fails), ("another shape", lambda gate, up: lambda: gate[:, :1])]
    monkeypatch.setattr(peers, "WAYS", {"swiglu": ways})
    monkeypatch.setattr(peers, "COMPILED", {})
    (operator,) = [operator for name, operator in peers.bitfuse.OPERATORS.items() if name == "swiglu"]
    task = peers.Task(operator, next(case for case in operator.cases if case.real), None)
    found = {row["way"]: row for row in peers.rows(task, torch.device("cpu"), tiny=True, rounds=1)}
    assert [found[way]["differ"] for way in ("bitfuse", "eager", "equal", "other")] == [0, 0, 0, 1]
    assert all("us" in found[way] and "ratio" in found[way] for way in ("bitfuse", "eager", "equal", "other"))
    assert found["absent"]["reason"] == "not installed"
    assert "it gives" in found["another shape"]["reason"]
    assert "us" not in found["another shape"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("peers --out FILE --tiny --rounds 0", "--rounds 0; accepted: 1 or more"),
        ("peers --out FILE --tiny --tokens 24 -5", "--tokens -5; accepted: 1 or more"),
        ("peers --build abc", "--build 'abc'; accepted: a capability"),
        ("first_decode --out FILE --tiny --runs 0", "--runs 0; accepted: 1 or more"),
        ("first_decode --out FILE --tiny --size 8x8", "--size '8x8'; accepted: width x height x frames"),
        ("two_builds nowhere --out FILE", "'nowhere' has no folder bitfuse"),
        ("linear --tiny --out FILE --kinds once thirds", "--kinds 'thirds'; accepted: persistent, once"),
        ("linear --tiny --out FILE --cases 70 71", "--cases '71' begins no layer's name; accepted: 70 x 96 x 48, gelu"),
        ("linear_cublaslt --tiny --out FILE --chosen nowhere", "--chosen 'nowhere': FileNotFoundError: "),
        ("linear_cublaslt --tiny --out FILE --chosen SRC", "accepted: what a run without --chosen has written"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_begun(module_of, monkeypatch, capsys, tmp_path, line, said):
    name, *options = line.replace("FILE", str(tmp_path / "new" / "x.json")).replace("SRC", str(ROOT / "src")).split()
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(SystemExit) as ended:
        module_of(name).main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_operator_that_is_in_no_build_is_named(module_of, monkeypatch, capsys, tmp_path):
    """As on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = [str(ROOT / "src"), "--out", str(tmp_path / "x.json"), "--operators", "modulate", "rope"]
    monkeypatch.setattr(sys, "argv", ["two_builds", *options])
    with pytest.raises(SystemExit):
        module_of("two_builds").main()
    assert "--operators 'rope'; accepted: " in capsys.readouterr().err
