"""A whole run of diffusers' pipelines by stages, tiny and on the CPU: what is timed, compared, and written down."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bitfuse.cli import app
from bitfuse.tools.bench import bench, run
from bitfuse.tools.seeded import SMALL, pipeline
from common import references_launched

CPU = torch.device("cpu")
COMPARED = {run.FIRST, run.UPSAMPLER, run.SECOND, run.DECODE, run.POSTPROCESS, run.AUDIO, run.VOCODER}

needs_pipelines = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("diffusers", "transformers")),
    reason="needs diffusers and transformers",
)


class Process:
    """Stands where a fresh process does: it takes seconds to import what it needs."""

    def __init__(self, way, device, cache):
        self.way = way

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def decode(self):
        return _found(1.5 if self.way == "stock" else 4.0)


def _found(seconds, sha256="same", **more):
    return {"seconds": seconds, "second_s": 0.5, "sha256": sha256, "peak_gb": {}, "sites_fused": 3, **more}


@pytest.fixture(scope="module")
def made():
    """The film, and both pipelines: stock, and another with the same weights."""
    with torch.no_grad():
        film = pipeline.film_for(CPU)
        stock = pipeline.build(film, CPU)
        return film, {"stock": stock, "bitfuse": pipeline.twin(stock)}


@pytest.fixture(scope="module")
def ran():
    """The document of the part, what was printed, and what was saved."""
    printed, saved = io.StringIO(), []
    with pytest.MonkeyPatch.context() as patch, references_launched():
        patch.setattr(bench, "_device", lambda: CPU)
        patch.setattr(run, "FreshDecode", Process)
        console = Console(file=printed, width=80)
        document = bench.run(console, ["run"], rounds=2, save=lambda d: saved.append(json.dumps(d)))
    return document, printed.getvalue(), saved


# -- the document --------------------------------------------------------------------------------------------------


@needs_pipelines
def test_a_whole_run_by_stages(ran):
    document, printed, saved = ran
    assert document["equal"] is True
    assert json.loads(saved[-1]) == document
    assert len(saved) == 6, "saved after each row"
    (row,) = document["run"]
    assert row["mismatch"] is None
    assert [stage["stage"] for stage in row["stages"]] == list(run.STAGES)
    assert {stage["stage"] for stage in row["stages"] if stage["bits"] == "equal"} == COMPARED
    assert all(stage["bits"] in ("equal", None) for stage in row["stages"])
    assert all(stage["ms"][way]["median"] > 0 for stage in row["stages"] for way in run.WAYS)
    for way in run.WAYS:
        stages = sum(stage["ms"][way]["median"] for stage in row["stages"])
        assert row["total"]["ms"][way]["median"] == pytest.approx(stages, rel=0.01), (
            "of two runs the median is the mean"
        )
    assert row["runs"] == {"stock": 2, "bitfuse": 2}
    assert row["geometry"] == "1 layers, 9 frames: 8 steps at 64x64 (8 tokens), 3 at 128x128 (32 tokens)"
    assert 0 < row["sites_fused"] <= row["sites_seen"]
    lines = printed.splitlines()
    assert max(map(len, lines[: next(i for i, line in enumerate(lines) if line.startswith("└"))])) <= 80
    assert "the whole run" in printed


@needs_pipelines
def test_every_kind_of_part_is_fused(ran):
    (row,) = ran[0]["run"]
    fused = {site["name"] for site in row["sites"] if site["state"] == "fused"}
    for part in ("transformer_blocks.", "connectors.video_connector.", "connectors.audio_connector."):
        assert any(name.startswith(part) for name in fused), (part, fused)
    assert all(row["fused_calls"] > 0 for row in ran[0]["decode"]), "of the decoder"


@needs_pipelines
def test_the_decode_alone_at_both_sizes_plain_and_tiled(ran):
    rows = ran[0]["decode"]
    assert [(row["height"], row["tiled"]) for row in rows] == [(64, False), (64, True), (128, False), (128, True)]
    assert all(row["mismatch"] is None and row["speed_up"] > 0 for row in rows)
    assert "tiled decode of 9 frames 128x128" in ran[1]


@needs_pipelines
def test_the_first_decode_beyond_stocks(ran):
    (row,) = ran[0]["first_decode"]
    assert row["beyond_stock_s"] == {"empty caches": 2.5, "warm caches": 2.5}
    assert row["mismatch"] is None
    assert list(row["processes"]) == ["stock", "empty caches", "warm caches"]


@needs_pipelines
@pytest.mark.slow
def test_with_the_kernels_and_in_fresh_processes():
    """All of it as on a GPU: kernels are proved, in Triton's interpreter, and each first decode has its process."""
    found = list(run.rows(Console(file=io.StringIO()), CPU, rounds=2))
    assert [part for part, _ in found] == ["run", *["decode"] * 4, "first-decode"]
    assert [row["mismatch"] for _, row in found] == [None] * 6
    processes = found[-1][1]["processes"]
    assert all(processes[name]["proofs"] > 0 for name in ("empty caches", "warm caches"))


# -- one run -------------------------------------------------------------------------------------------------------


@needs_pipelines
def test_a_run_leaves_the_pipelines_as_they_were_and_its_stages_are_all_of_its_time(made):
    film, models = made
    main = models["stock"].main
    wrapped = {
        main: ("encode_prompt", "prepare_latents", "progress_bar", "maybe_free_model_hooks"),
        main.vae: ("decode",),
        main.audio_vae: ("decode",),
        main.video_processor: ("postprocess_video",),
    }
    clock = run.once(models["stock"], film, run.Bits(), CPU).clock
    assert not [name for owner, names in wrapped.items() for name in names if name in owner.__dict__]
    assert set(clock.seconds) == set(run.STAGES)
    assert clock.peaks == {}, "no memory is counted on a CPU"


@needs_pipelines
def test_one_bit_in_the_decoder_is_seen_where_it_comes_to_be(made, monkeypatch):
    film, models = made
    bits = run.Bits()
    assert not any(run.once(models["stock"], film, bits, CPU).stages.values())
    decoder = models["bitfuse"].main.vae.decoder
    forward = decoder.forward

    def flipped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.view(torch.int16).view(-1)[5] ^= 64
        return out

    monkeypatch.setattr(decoder, "forward", flipped)
    stages = run.once(models["bitfuse"], film, bits, CPU).stages
    assert stages[run.DECODE].startswith("the decoded video: differs at [0, 0, 0, 0, 5]")
    assert stages[run.POSTPROCESS].startswith("the frames: differs at [")
    assert not any(stages[stage] for stage in COMPARED - {run.DECODE, run.POSTPROCESS})


@needs_pipelines
def test_a_run_that_differs_is_not_equal_and_says_where(made, monkeypatch):
    film, models = made
    flips = iter([None, None, run.SECOND])  # the second of the two runs of bitfuse that are timed
    monkeypatch.setattr(run.gc, "collect", lambda: 0)  # a second, of what the hosts import

    def once(pipelines, film, bits, device):
        found = run.Run(run.Clock(CPU), bits)
        found.clock.seconds = dict.fromkeys(run.STAGES, 1.0)
        found.stages = dict.fromkeys(COMPARED)
        if pipelines is models["bitfuse"] and next(flips):
            found.stages[run.SECOND] = "the video's latents: differs at [0]"
        return found

    monkeypatch.setattr(run, "once", once)
    printed = io.StringIO()
    report = SimpleNamespace(fused=3, seen=4, sites=[SimpleNamespace(reasons={"no": 1})], kinds=list)
    handle = SimpleNamespace(report=lambda: report)
    row = run.whole(Console(file=printed, width=80), film, models, handle, CPU, 2)
    assert row["mismatch"] == "the video's latents: differs at [0]"
    bits = {stage["stage"]: stage["bits"] for stage in row["stages"]}
    assert (bits[run.SECOND], bits[run.DECODE]) == (row["mismatch"], "equal")
    assert "see below" in printed.getvalue()
    assert "not identical: the video's latents" in printed.getvalue()
    assert "not fused: no" in printed.getvalue()


# -- what is compared ----------------------------------------------------------------------------------------------


def test_values_that_can_tell_nothing_apart_are_refused():
    bits = run.Bits()
    assert bits.why_not("decode", "the video", torch.tensor([0.0, 1.0])) is None
    assert bits.why_not("decode", "the video", torch.tensor([0.0, 1.0])) is None
    assert bits.why_not("decode", "the video", torch.tensor([-0.0, 1.0])).startswith("the video: differs at [0]")
    assert "not all finite" in run.Bits().why_not("decode", "the video", torch.tensor([0.0, float("nan")]))
    assert "not all finite" in run.Bits().why_not("decode", "the video", torch.tensor([0.0, float("inf")]))
    assert "are equal" in run.Bits().why_not("decode", "the video", torch.ones(3))


def test_the_clock_adds_up_the_parts_of_a_stage_and_stands_between(monkeypatch):
    at = iter([0.0, 0.0, 2.0, 2.0, 5.0, 5.0, 9.0, 9.0, 10.0, 10.0])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(at))
    clock = run.Clock(CPU)
    for stage in ("text", "decode", None, "text", None):
        clock.enter(stage)
    assert clock.seconds == {"text": 3.0, "decode": 3.0}


# -- fresh processes -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("launched_as_reference")
@needs_pipelines
def test_what_a_fresh_process_prints(monkeypatch, capsys):
    found = {}
    for way in run.WAYS:
        monkeypatch.setattr(run.sys, "stdin", io.StringIO("go\n"))
        run.time_first_decode(way, "cpu")
        found[way] = json.loads(capsys.readouterr().out)
    assert found["stock"]["sha256"] == found["bitfuse"]["sha256"]
    assert min(found["stock"]["seconds"], found["stock"]["second_s"]) > 0
    assert found["bitfuse"]["sites_fused"] >= 0
    assert "sites_fused" not in found["stock"]


@needs_pipelines
def test_a_fresh_process_whose_starter_has_ended_does_nothing(monkeypatch, capsys):
    monkeypatch.setattr(run.sys, "stdin", io.StringIO(""))
    run.time_first_decode("stock", "cpu")
    assert capsys.readouterr().out == ""


def test_a_fresh_process_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    with (
        run.FreshDecode("stock", CPU, str(tmp_path)) as process,
        pytest.raises(RuntimeError, match=r"the first decode \(stock\) failed in its process"),
    ):
        process.decode()


@pytest.mark.parametrize(
    ("more", "mismatch"),
    [
        ({"sha256": "another"}, "warm caches: the video differs from that of the stock process"),
        ({"sites_fused": 0}, "warm caches: nothing was fused"),
    ],
)
def test_a_first_decode_that_is_no_first_decode_of_ours(more, mismatch):
    class Done:
        def __init__(self, found):
            self.decode = lambda: found

    film = pipeline.Film(9, 64, 64, SMALL, 3, {})
    waiting = {"stock": Done(_found(2.0)), "empty caches": Done(_found(9.0)), "warm caches": Done(_found(3.0) | more)}
    row = run.first_decode(Console(file=io.StringIO()), film, waiting)
    assert row["mismatch"] == mismatch


# -- the command, and the tables -----------------------------------------------------------------------------------


def test_a_whole_run_is_of_one_version():
    refused = CliRunner().invoke(app, ["bench", "--only", "run", "--ltx", "2.3"])
    assert refused.exit_code == 2
    assert "--ltx 2.3 does not go with --only run" in " ".join(refused.output.split())


@needs_pipelines
def test_the_tables_of_a_run(ran):
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    document = json.loads(json.dumps(ran[0])) | {"path": "benchmarks/results/2026-11-29-h200-run.json"}
    for gb, row in enumerate([document["run"][0]["total"], *document["decode"]], 4):
        row["peak_gb"] = {"stock": float(gb), "bitfuse": gb / 2}
    document["run"][0]["total"]["ms"] = {"stock": {"median": 12040.0}, "bitfuse": {"median": 8600.0}}
    document["run"][0]["total"]["speed_up"] = 1.4
    text = tables.whole_runs(document, least=0.0, up="../")
    assert "| **a whole run** | 12.04 s | 8.60 s | 1.40x | 4.0 GB, 2.0 GB | identical in every bit |" in text
    assert all(f"| {stage} |" in text for stage in run.STAGES)
    assert "| tiled decode alone, 128x128 |" in text
    assert "2.5 s longer than stock's 1.5 s with an empty Triton cache" in text
    assert "(../benchmarks/results/2026-11-29-h200-run.json)" in text
    assert f"| {run.TEXT} |" not in tables.whole_runs(document), "under 2% of a run"
    assert tables.whole_runs(None) == ""


def test_all_parts_of_another_version_are_run_without_it():
    printed = io.StringIO()
    document = bench.run(Console(file=printed), ["run"], version="2.3")
    assert set(document) == {"machine", "equal"}
    assert "no whole run: it is one of LTX-2.0, not of LTX-2.3" in printed.getvalue()
