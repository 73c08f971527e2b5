"""The demo: what it writes, and that it says so when a bit differs, nothing is fused, or it can't run."""

import io
import json
import os
import re
import sys

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from rich.console import Console

import bitfuse
from bitfuse.hosts.site import Site
from bitfuse.tools import seeded
from bitfuse.tools.compare import demo
from bitfuse.tools.machine import machine
from common import references_launched
from planted import Plant

CPU = torch.device("cpu")
STREAMS = ("video", "audio")


def run(out, **options):
    """The demo on the CPU in two steps: its result, what it printed, and the page."""
    printed = io.StringIO()
    console = Console(file=printed, width=120)
    result = demo.run(out, **{"device": "cpu", "steps": 2, "console": console, **options})
    page = out / "report.html"
    return result, printed.getvalue(), page.read_text(encoding="utf-8") if page.exists() else None


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with references_launched():
        return (*run(out), json.loads((out / "report.json").read_text()))


def test_every_bit_is_equal_and_sites_are_fused(good):
    result, printed, _, report = good
    assert result.exit_code == 0
    assert result.verdict.startswith("Bit-identical to the unfused run: both latents after each of 2 steps")
    assert result.verdict in printed
    sites = report["sites"]
    assert sites["sites_fused"] == sites["sites_seen"] >= 16 * seeded.SMALL.layers, "the whole of every block"


@pytest.mark.slow  # the host's kernels are run by test_diffusers
def test_every_bit_is_equal_by_kernels(tmp_path):
    result, printed, _ = run(tmp_path)
    assert result.exit_code == 0
    assert result.verdict in printed
    sites = result.document["sites"]
    assert sites["sites_fused"] == sites["sites_seen"] >= 16 * seeded.SMALL.layers


def test_the_json_holds_what_was_found(good):
    result, _, _, report = good
    assert report == json.loads(json.dumps(result.as_dict()))
    assert report["interpreted"] is True
    assert report["times"]["ratio"] is None, "a ratio of times in the interpreter means nothing"
    assert report["geometry"]["video_tokens"] == seeded.SMALL.video_tokens
    assert [row["step"] for row in report["steps"]] == [1, 2]
    for row in report["steps"]:
        for stream in STREAMS:
            assert re.fullmatch("[0-9a-f]{64}", row[stream]["sha256_stock"])
            assert row[stream]["sha256_stock"] == row[stream]["sha256_bitfuse"]
    digests = {row[stream]["sha256_stock"] for row in report["steps"] for stream in STREAMS}
    assert len(digests) == 4, "each step changes both latents"


def test_the_page_is_self_contained(good):
    _, _, page, report = good
    assert not re.search(r"""(src|href|srcset)\s*=\s*["']?\s*(https?:)?//""", page)
    assert not re.search(r"<script|<link[^>]+stylesheet|@import|url\(", page)
    assert page.count('src="data:image/png;base64,') == 7, "two streams of three panels, and the times"
    assert "The bits are meaningful; the times are not." in page
    for row in report["steps"]:
        assert row["video"]["sha256_stock"] in page


@pytest.mark.usefixtures("launched_as_reference")
def test_one_wrong_call_of_one_kernel_is_found_and_said(tmp_path, monkeypatch):
    """In the second step; the first step must still be equal."""
    stock, plant, latents, calls = Site.call, Plant(), [], 0
    three_runs = demo.runs.stock_twice_then_fused

    def wrong(site, operator, *tensors):
        nonlocal calls
        out = stock(site, operator, *tensors)
        calls += 1
        if calls == per_step + 1:
            plant(out)
        return out

    def noted(*args, **options):
        done = three_runs(*args, **options)
        latents[:] = [[*run.video, *run.audio] for run in done[:2]]
        return done

    layers = seeded.SMALL.layers
    counted, _, _ = run(tmp_path / "counted")
    per_step = sum(site["calls_fused"] for site in counted.document["sites"]["sites"]) // 2
    assert per_step >= 16 * layers, "six attentions, four norms of each stream and both outputs"
    monkeypatch.setattr(Site, "call", wrong)
    monkeypatch.setattr(demo.runs, "stock_twice_then_fused", noted)
    result, printed, page = run(tmp_path / "wrong")
    plant.must_show(*latents)
    assert result.exit_code == 1
    first, second = result.document["steps"]
    assert first["equal"]
    assert not second["equal"]
    assert second["video"]["sha256_stock"] != second["video"]["sha256_bitfuse"]
    where = r"differ first at \[0, \d+, \d+\]: 0x[0-9a-f]{8} where the reference has 0x[0-9a-f]{8}"
    for text in (result.verdict, printed, page):
        assert re.search(rf"Not bit-identical to the unfused run: after step 2 the video latents {where}", text)
    assert second["video"]["mismatch"] in page


def test_nothing_fused_is_a_failure(tmp_path):
    bitfuse.disable()
    try:
        result, _, page = run(tmp_path)
    finally:
        bitfuse.enable()
    assert result.exit_code == 1
    assert result.verdict.startswith("Nothing was fused, so nothing was shown: bitfuse is off")
    assert result.document["steps"][-1]["equal"]
    assert "bitfuse is off" in page


def test_an_accelerated_run_that_fails_is_a_difference(tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("no such\nkernel")

    monkeypatch.setattr(Site, "call", fail)
    result, printed, page = run(tmp_path)
    assert result.exit_code == 1
    assert result.verdict == "The accelerated run failed where the stock run did not: ValueError: no such kernel"
    assert result.verdict in printed
    assert json.loads((tmp_path / "report.json").read_text()) == result.as_dict()
    assert page is None


def test_a_stock_run_that_does_not_repeat_itself_stops_the_demo(tmp_path, monkeypatch):
    draws, stock = iter(range(1000)), seeded.velocity_of

    def drifting(model, inputs):
        velocity = stock(model, inputs)
        return lambda *given: tuple(v + 0.01 * next(draws) for v in velocity(*given))

    monkeypatch.setattr(seeded, "velocity_of", drifting)
    result, printed, page = run(tmp_path)
    assert result.exit_code == 2
    assert result.verdict.startswith("The stock run does not repeat itself here")
    assert result.verdict not in printed, "the command prints it, to stderr"
    assert page is None


def test_an_earlier_report_stays_and_somebody_elses_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text('{"exit_code": 0, "verdict": "Bit-identical"}')
    (tmp_path / "report.html").write_text("<title>bitfuse demo: bit-identical</title>")
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    monkeypatch.setattr(seeded, "velocity_of", lambda *_: lambda video, audio, t: (video / 0, audio))
    assert run(tmp_path)[0].exit_code == 2
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before
    monkeypatch.setattr(demo.comparison.subjects, "build", lambda *_: pytest.fail("it went on"))
    for name in demo.NAMES:
        (tmp_path / name).write_text("mine")
        result, _, _ = run(tmp_path)
        assert result.exit_code == 2
        assert result.verdict.endswith(f"holds a {name} that bitfuse did not write; accepted: a folder without one")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


def test_latents_that_are_not_finite_stop_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(seeded, "velocity_of", lambda *_: lambda video, audio, t: (video / 0, audio))
    result, _, _ = run(tmp_path)
    assert result.exit_code == 2
    assert "The stock video latents are not finite after step 1" in result.verdict


@pytest.mark.usefixtures("launched_as_reference")
def test_global_state_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    assert run(tmp_path)[0].exit_code == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert "TRITON_INTERPRET" not in os.environ


@pytest.mark.usefixtures("launched_as_reference")
def test_a_seed_gives_the_same_latents_again(good, tmp_path):
    again, other = run(tmp_path / "again")[0], run(tmp_path / "other", seed=1)[0]
    digest = [r.document["steps"][-1]["video"]["sha256_stock"] for r in (good[0], again, other)]
    assert digest[0] == digest[1] != digest[2]


@pytest.mark.parametrize("package", ["diffusers", "jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_the_cure(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    result, printed, page = run(tmp_path)
    assert result.exit_code == 2
    assert result.verdict == f"This needs {package}, which is not installed: pip install 'bitfuse[demo]'"
    assert printed == ""
    assert page is None


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        ({"steps": 1}, "steps is 1; accepted: 2 or more"),
        ({"layers": 0}, "layers is 0; accepted: 1 to 48"),
        ({"layers": 49}, "layers is 49; accepted: 1 to 48"),
        ({"device": "mps"}, "device is 'mps'; accepted: cpu, cuda, or cuda:<n>"),
        ({"device": "cpu:1"}, "device is 'cpu:1'; accepted"),
    ],
)
def test_arguments_out_of_range_are_named(given, accepted, tmp_path):
    with pytest.raises(ValueError, match=re.escape(accepted)):
        demo.run(tmp_path, **given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without CUDA")
def test_a_gpu_that_is_not_there(tmp_path):
    result, _, _ = run(tmp_path, device="cuda")
    assert result.exit_code == 2
    assert "sees no CUDA device" in result.verdict


def test_as_many_layers_as_fit(monkeypatch):
    gpu = torch.device("cuda", 0)
    free = 80 * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    geometry, sentence = seeded.geometry_for(gpu, None)
    assert (geometry.layers, geometry.video_tokens, geometry.audio_frames) == (48, 6144, 126)
    assert sentence.startswith("48 of 48 layers: a layer is 0.77 GB, the rest 0.69 GB, 80.0 GB are free")
    free = 24 * 10**9
    assert seeded.geometry_for(gpu, None)[0].layers == 21
    assert seeded.geometry_for(gpu, 3)[0].layers == 3
    with pytest.raises(seeded.CannotRun, match=r"22 layers do not fit: .* so 21 do"):
        seeded.geometry_for(gpu, 22)
    free = 6 * 10**9
    with pytest.raises(seeded.CannotRun, match="1 layers do not fit"):
        seeded.geometry_for(gpu, None)


def test_one_step_is_the_first_forward_of_the_loop():
    model = seeded.build(seeded.SMALL, CPU, seed=0)
    inputs = seeded.make_inputs(model, seeded.SMALL, CPU, seed=0)
    expected = seeded.velocity_of(model, inputs)(inputs["latents"], inputs["audio_latents"], torch.tensor([1000.0]))
    for a, b in zip(expected, seeded.one_step(model, inputs)(), strict=True):
        assert bitfuse.compare(a, b) is None


def test_the_machine_without_names_of_people_or_places():
    facts = machine(CPU)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["device_type"] == "cpu"
    assert facts["torch"] == torch.__version__
    assert facts["capability"] is None
    for private in (os.uname().nodename, os.path.expanduser("~")):
        assert not any(private in str(value) for value in facts.values())


@pytest.mark.gpu
def test_on_a_gpu_with_the_real_geometry(tmp_path):
    result, _, page = run(tmp_path, device="cuda", layers=1)
    assert result.exit_code == 0, result.verdict
    assert result.document["times"]["ratio"] > 0
    assert "interpreter" not in page
