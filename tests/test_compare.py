"""`bitfuse compare`: a whole tiny pipeline from a folder, equal in every bit; and each way in which it must say no."""

import dataclasses
import html
import io
import itertools
import json
import re
import sys

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.38")  # 0.37 has other arguments of guidance
pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

import diffusers
from diffusers.pipelines.ltx2 import LTX2Vocoder
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import bitfuse
import tiny
from bitfuse.cli import app
from bitfuse.hosts.site import Site
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.tools import files
from bitfuse.tools.compare import comparison
from bitfuse.tools.compare import films as comparison_page
from bitfuse.tools.compare import request as comparison_request
from bitfuse.tools.compare.request import ARGUMENTS, Request
from bitfuse.tools.seeded import CannotRun
from common import references_launched
from planted import Plant

PICTURES_AND_SOUNDS = ("decoded frames", "audio samples")
BRIEF = {**tiny.CALL, **tiny.UNGUIDED, "num_frames": 1}
"""A still of 4 video tokens and 1 audio token, for the runs of which only the end matters."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline of one layer: enough for all that says no."""
    return tiny.save(tmp_path_factory.mktemp("models") / "one-layer", layers=1)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny-ltx2")


@pytest.fixture
def compare(folder, tmp_path):
    """The comparison on the CPU, of the tiny pipeline unless told otherwise: its result and what it printed."""

    def run(call=BRIEF, **request):
        printed = io.StringIO()
        (tmp_path / "call.json").write_text(json.dumps(call))
        if "random_weights" not in request:
            request = {"model": str(folder), "config": tmp_path / "call.json", **request}
        request = Request(**{"device": "cpu", **request})
        result = comparison.run(request, tmp_path / "out", Console(file=printed, width=120))
        return result, printed.getvalue()

    return run


@pytest.fixture(scope="module")
def good(two_layers, tmp_path_factory):
    """The command line's own function: exit code, what it printed, its --json, its folder; random state around it."""
    out = tmp_path_factory.mktemp("good")
    (out / "call.json").write_text(json.dumps({**tiny.CALL, **tiny.UNGUIDED, "num_inference_steps": 9}))
    before = torch.get_rng_state()
    arguments = [str(two_layers), "--prompt", "a red fox", "--config", str(out / "call.json"), "--steps", "2"]
    arguments += ["--device", "cpu", "--out", str(out), "--json", str(out / "copy.json")]
    with references_launched():
        done = CliRunner().invoke(app, ["compare", *arguments])
    return done, json.loads((out / "copy.json").read_text()), out, torch.equal(before, torch.get_rng_state())


# -- a whole pipeline -----------------------------------------------------------------------------------------------


def test_latents_frames_and_sound_are_equal_in_every_bit(good):
    done, document, _, _ = good
    assert done.exit_code == document["exit_code"] == 0, done.output
    both = "both latents after each of 2 steps, the decoded frames and the audio samples"
    assert document["verdict"].startswith(f"Bit-identical to the unfused run: {both}, with 48 of ")  # 16 in the decoder
    assert document["verdict"] in done.output.replace("\n", " ")
    assert [row["step"] for row in document["steps"]] == [1, 2]
    compared = [row[stream] for row in document["steps"] for stream in ("video", "audio")]
    compared += [document["decoded"][name] for name in PICTURES_AND_SOUNDS]
    for of in compared:
        assert of["equal"]
        assert re.fullmatch("[0-9a-f]{64}", of["sha256_stock"])
        assert of["sha256_stock"] == of["sha256_bitfuse"]
    assert len({of["sha256_stock"] for of in compared}) == 6, "each step changes both latents"
    assert document["decoded"]["decoded frames"]["elements"] == 9 * 64 * 64 * 3
    sites = [site for site in document["sites"]["sites"] if site["name"].startswith("transformer_blocks.")]
    assert len(sites) == 16 * tiny.LAYERS, "beside those of the text connectors, whose tiny widths no kernel takes"
    assert all(site["calls_fused"] == 2 for site in sites), "no guidance: one forward a step"


def test_the_run_is_the_pipelines_own(good, two_layers):
    """The latents of the last step, decoded frames and all, are what the pipeline gives a user who calls it."""
    _, document, _, _ = good
    pipe = diffusers.LTX2Pipeline.from_pretrained(two_layers, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    call = {**tiny.CALL, **tiny.UNGUIDED, "prompt": "a red fox", "generator": torch.Generator().manual_seed(0)}
    frames, samples = pipe(**call, output_type="pt", return_dict=False)
    for tensor, name in ((frames, "decoded frames"), (samples, "audio samples")):
        assert comparison.runs.sha256(tensor) == document["decoded"][name]["sha256_stock"]


def test_what_is_written(good):
    _, document, out, same_random_state = good
    assert same_random_state
    assert json.loads((out / "compare.json").read_text()) == document
    assert document["model"] == "tiny-ltx2", "a folder's name, without the way to it"
    assert str(out.parent) not in (out / "compare.json").read_text()
    assert document["interpreted"] is True
    assert document["times"]["ratio"] is None, "a ratio of times in the interpreter means nothing"
    assert document["runs"]["bitfuse"]["seconds"] > 0
    assert {"stock.wav", "bitfuse.wav"} < set(document["files"])
    assert len(document["files"]) == 4
    for name, digest in document["files"].items():
        assert files.sha256(out / name) == digest
        assert name.split(".")[0] in ("stock", "bitfuse")
    films = [document["files"][name] for name in document["files"] if not name.endswith(".wav")]
    assert len(films) == 2


def test_the_call_is_a_configuration_of_the_same_run(good, tmp_path):
    _, document, _, _ = good
    call = document["call"]
    assert (call["prompt"], call["num_inference_steps"], call["width"]) == ("a red fox", 2, 64)
    (tmp_path / "again.json").write_text(json.dumps(call))
    assert comparison_request.check(Request(model="x", config=tmp_path / "again.json")) == call


def test_the_page_is_self_contained(good):
    _, document, out, _ = good
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href|srcset)\s*=\s*["']?\s*(https?:)?//""", page)
    assert not re.search(r"<script|<link[^>]+stylesheet|@import|url\(", page)
    pictures = re.findall(r'<img [^>]*src="data:image/(webp|png);base64,', page)
    assert len(pictures) == 4, "both films, the difference, and the times"
    assert page.count('<audio controls style="width: 100%; margin-top: .4rem" src="data:audio/wav;base64,') == 2
    assert "The bits are meaningful; the times are not." in page
    assert "0 of 110,592 elements of the decoded frames differ" in page
    for row in document["steps"]:
        assert row["video"]["sha256_stock"] in page
    assert "transformer_blocks.*.attn1" in page


def test_films_show_all_frames(good):
    from PIL import Image

    _, document, out, _ = good
    (name,) = [name for name in document["files"] if name.startswith("stock") and not name.endswith(".wav")]
    if name.endswith(".mp4"):
        pytest.skip("PyAV is installed here, and its film is not for Pillow")
    with Image.open(out / name) as film:
        assert (film.n_frames, film.size) == (9, (64, 64))


@pytest.mark.usefixtures("launched_as_reference")
def test_guidance_is_compared_as_well(compare):
    """It doubles the transformer's batch, and adds a forward in which attentions are skipped."""
    guided = {**BRIEF, "guidance_scale": 3.0, "audio_guidance_scale": 7.0, "negative_prompt": "worst quality"}
    result, _ = compare({**guided, "stg_scale": 1.0, "audio_stg_scale": 1.0, "spatio_temporal_guidance_blocks": [0]})
    assert result.exit_code == 0, result.verdict
    calls = {site["name"]: site["calls_fused"] for site in result.document["sites"]["sites"]}
    assert calls["transformer_blocks.0.norm1"] == 2 * 2


# -- a transformer alone ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("launched_as_reference")
def test_a_transformer_alone_with_random_weights(compare, tmp_path):
    result, printed = compare(random_weights="ltx-2.3", layers=1, steps=2, size="64x32", frames=9)
    assert result.exit_code == 0, printed
    assert "A transformer of LTX-2.3 with random weights: 1 layers" in printed
    geometry = result.document["geometry"]
    assert [geometry[name] for name in ("width", "height", "frames", "audio_frames")] == [2, 1, 2, 9]
    assert result.document["files"] == {}
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "with 24 of 24 sites fused" in page
    assert page.count('<img alt="') == 6, "two streams of three panels"


# -- it must say no -----------------------------------------------------------------------------------------------


@pytest.fixture
def latents(monkeypatch):
    """Both latents after each step of the stock and of the accelerated run, filled in by a comparison."""
    found, stock = [], comparison.runs.stock_twice_then_fused

    def noted(*args, **options):
        done = stock(*args, **options)
        found[:] = [[*run.video, *run.audio] for run in done[:2]]
        return done

    monkeypatch.setattr(comparison.runs, "stock_twice_then_fused", noted)
    return found


@pytest.mark.usefixtures("launched_as_reference")
def test_one_wrong_call_of_one_kernel_is_found_and_said(compare, latents, monkeypatch, tmp_path):
    """In the second step: the first step must still be equal, the second not, nor what comes of it."""
    stock, calls, plant = Site.call, itertools.count(), Plant()
    per_step = 16

    def wrong(site, operator, *tensors):
        out = stock(site, operator, *tensors)
        if site.name.startswith("transformer_blocks.") and next(calls) == per_step + 1:
            plant(out)
        return out

    monkeypatch.setattr(Site, "call", wrong)
    result, printed = compare()
    plant.must_show(*latents)
    assert result.exit_code == 1
    first, second = result.document["steps"]
    assert first["equal"]
    assert not second["equal"]
    where = r"differ first at \[0, \d+, \d+\]: 0x[0-9a-f]{8} where the reference has 0x[0-9a-f]{8}"
    for text in (result.verdict, printed, (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")):
        assert re.search(rf"Not bit-identical to the unfused run: after step 2 the (video|audio) latents {where}", text)


@pytest.mark.usefixtures("launched_as_reference")
def test_trace_names_the_site_of_a_wrong_kernel(compare, latents, monkeypatch, tmp_path):
    stock, plant = HEAD_GATE.routed, Plant()

    def route(*args):
        found = stock(*args)

        def wrong(*args):
            out = found.run(*args)
            if args[0] is at[0]:
                plant(out, start=5)
            return out

        return dataclasses.replace(found, run=wrong)

    at = []  # the gate's input in block 0's self-attention

    def call(site, operator, *args):
        if site.name == "transformer_blocks.0.attn1.gate":
            at[:] = [args[0]]
        return stock_call(site, operator, *args)

    stock_call = Site.call
    monkeypatch.setattr(Site, "call", call)
    monkeypatch.setattr(HEAD_GATE, "routed", route)
    result, printed = compare(random_weights="ltx-2.3", layers=1, steps=2, size="64x32", frames=9, trace=True)
    plant.must_show(*latents)  # a comparison whose latents are equal traces nothing
    assert result.exit_code == 1
    found = result.document["divergence"]
    assert (found["kind"], found["place"], found["operator"]) == (
        "site",
        "transformer_blocks.0.attn1.gate",
        "head_gate",
    )
    assert found["bits"]["index"] == (0, 0, 5)
    for text in (printed, html.unescape((tmp_path / "out" / "compare.html").read_text(encoding="utf-8"))):
        assert "First divergence: step 0, transformer_blocks.0.attn1.gate (head_gate)" in text


def _flip_in_call(monkeypatch, cls, method, which, bit=0):
    """A bit of the first element of what `method` returns, in its call number `which` from 0."""
    stock, calls = getattr(cls, method), itertools.count()

    def flipping(self, *args, **kwargs):
        out = stock(self, *args, **kwargs)
        if next(calls) == which:
            values = out[0] if isinstance(out, tuple) else out
            integers = values.view({2: torch.int16, 4: torch.int32}[values.element_size()])
            integers[(0,) * values.ndim] ^= torch.tensor(1, dtype=integers.dtype) << bit
        return out

    monkeypatch.setattr(cls, method, flipping)


@pytest.mark.usefixtures("launched_as_reference")
def test_the_step_and_the_stream_of_a_difference_are_named(compare, monkeypatch):
    """One bit of the audio latents after the accelerated run's second step: the video knows nothing of it."""
    steps_before = 2 * 2 * 2 + 2  # two runs of two steps of two streams, and the first step
    _flip_in_call(monkeypatch, diffusers.FlowMatchEulerDiscreteScheduler, "step", steps_before + 1)
    result, printed = compare()
    assert result.exit_code == 1
    assert re.match(r"Not bit-identical .*: after step 2 the audio latents differ first at \[0, 0, 0\]", result.verdict)
    assert result.verdict.endswith("(1 of 16 elements).")
    assert result.verdict in printed
    first, second = result.document["steps"]
    assert first["equal"]
    assert second["video"]["equal"]
    assert second["audio"]["elements_differing"] == 1
    assert second["audio"]["sha256_stock"] != second["audio"]["sha256_bitfuse"]


@pytest.mark.usefixtures("launched_as_reference")
def test_a_difference_in_the_sound_alone(compare, monkeypatch, tmp_path):
    _flip_in_call(monkeypatch, LTX2Vocoder, "forward", 2)
    bitfuse.disable()  # nothing need be fused for this: a difference is said first
    try:
        result, _ = compare()
    finally:
        bitfuse.enable()
    assert result.exit_code == 1
    assert result.verdict.startswith("Not bit-identical to the unfused run: the audio samples differ first at [0, 0, ")
    assert result.document["decoded"]["decoded frames"]["equal"]
    assert "audio samples differ" in (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")


def test_nothing_fused_is_a_failure(compare):
    bitfuse.disable()
    try:
        result, _ = compare()
    finally:
        bitfuse.enable()
    assert result.exit_code == 1
    assert result.verdict.startswith("Nothing was fused, so nothing was shown: bitfuse is off")
    assert result.document["steps"][-1]["equal"]


def test_an_accelerated_run_that_fails_is_a_difference(compare, monkeypatch, tmp_path):
    def failing(site, operator, *tensors):
        raise TypeError("launch\nfailed")

    monkeypatch.setattr(Site, "call", failing)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text('{"exit_code": 0, "verdict": "Bit-identical"}')
    result, printed = compare()
    assert result.exit_code == 1
    failed = "The accelerated run failed where the stock run did not: TypeError: launch failed"
    assert result.verdict == failed
    assert failed in printed
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == {"exit_code": 1, "verdict": failed}
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["compare.json"], "in place of the earlier verdict"


@pytest.mark.parametrize(
    ("cls", "method", "call", "bit", "what"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler, "step", 4, 0, "after step 1 the video latents of its second run"),
        (diffusers.AutoencoderKLLTX2Video, "decode", 1, 15, "the decoded frames of its second run"),
    ],
    ids=["latents", "frames"],
)
def test_a_stock_run_that_does_not_repeat_itself_stops_it(cls, method, call, bit, what, compare, monkeypatch, tmp_path):
    _flip_in_call(monkeypatch, cls, method, call, bit)
    monkeypatch.setattr(bitfuse, "accelerated", lambda *_, **__: pytest.fail("it went on"))
    result, _ = compare()
    assert result.exit_code == 2
    assert f"so no run can be shown to equal it: {what} differ first at [0, 0, 0" in result.verdict
    assert result.as_dict() == {"exit_code": 2, "verdict": result.verdict}
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("cls", "method", "what"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler, "step", "video latents are not finite after step 1"),
        (diffusers.AutoencoderKLLTX2Video, "decode", "decoded frames are not finite"),
    ],
    ids=["latents", "frames"],
)
def test_what_is_not_finite_stops_it(cls, method, what, compare, monkeypatch):
    stock, nan = getattr(cls, method), float("nan")
    monkeypatch.setattr(cls, method, lambda *a, **k: tuple(nan * v for v in stock(*a, **k)))
    result, _ = compare()
    assert result.exit_code == 2
    assert result.verdict == f"The stock {what}: nothing to compare."


# -- what can't be run --------------------------------------------------------------------------------------------


def _refused(result, printed, *words):
    assert result.exit_code == 2
    assert len(result.verdict.splitlines()) == 1
    assert printed == "", "the command prints it, to stderr"
    for word in words:
        assert word in result.verdict


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"model": None, "config": None}, ("Give either MODEL",)),
        ({"random_weights": "2.0"}, ("Give either MODEL",)),
        ({"model": "no-such"}, ("'no-such' is neither a folder nor a hub id", "owner/name")),
        ({"model": "a/b/c"}, ("neither a folder nor a hub id",)),
        ({"model": "x" * 5000}, ("neither a folder nor a hub id",)),
        ({"model": "\0"}, ("neither a folder nor a hub id",)),
        ({"size": "100x64"}, ("--size 100x64", "width must be a multiple of 32, 32 to 8192")),
        ({"size": "64x0"}, ("--size 64x0", "height must be")),
        ({"size": "64"}, ("--size 64 is not accepted", "<width>x<height>")),
        ({"frames": 10}, ("--frames 10", "8n + 1, 1 to 8193")),
        ({"steps": 1}, ("--steps 1", "a whole number, 2 to 1000")),
        ({"seed": -1}, ("--seed -1 is not accepted",)),
        ({"layers": 2}, ("--layers is accepted with --random-weights only",)),
        ({"host": "invoke"}, ("--host invoke is not a host", "accepted: diffusers, ltx-core, sglang, comfyui")),
        ({"host": "ltx-core"}, ("--host ltx-core goes with --random-weights",)),
        ({"offload": True}, ("--offload", "needs a CUDA device")),
        ({"random_weights": "3", "model": None, "config": None}, ("ltx-2.0, ltx-2.3, ltx-2.5",)),
        ({"random_weights": "2.0", "model": None, "config": None, "layers": 49}, ("accepted: 1 to 48",)),
        ({"random_weights": "2.0", "model": None, "config": None, "prompt": "x"}, ("--prompt belongs to a pipeline",)),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_wrong_request_gets_one_line(request_, words, folder, tmp_path):
    printed = io.StringIO()
    request = Request(**{"model": str(folder), "device": "cpu", **request_})
    result = comparison.run(request, tmp_path / "out", Console(file=printed, width=120))
    _refused(result, printed.getvalue(), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"num_step": 3}', ("'num_step' is not an argument; accepted: prompt, negative_prompt, width",)),
        ('{"generator": 3}', ("'generator' is not an argument",)),
        ('{"width": 65}', ("width is 65; accepted: a multiple of 32",)),
        ('{"width": true}', ("width is true; accepted",)),
        ('{"guidance_scale": NaN}', ("guidance_scale is NaN; accepted: a number",)),
        ('{"guidance_scale": 1e999}', ("guidance_scale is Infinity; accepted: a number",)),
        ('{"sigmas": [1.0]}', ("sigmas is [1.0]; accepted: a list of 2 or more",)),
        ('{"sigmas": [1.0, 0.5], "num_inference_steps": 3}', ("2 sigmas do not go with 3 steps",)),
        ('{"guidance_scale": 1%s}' % ("0" * 400), ("guidance_scale is 1000", "accepted: a number, 0 to 100")),
        ('{"width": 1%s}' % ("0" * 5000), ("is not JSON: the number 1000", "has 5001 digits")),
        ('{"width": 64, "width": 32}', ("'width' twice",)),
        ('\ufeff{"width": 64}', ("begins with a byte-order mark",)),
        ('{"a\\u001b[31m\\nb": 64}', ("is not an argument",)),
        ('{"prompt": null}', ("prompt is null; accepted: a text",)),
        ('{"prompt"', ("is not JSON",)),
        ("[" * 100_000, ("is not JSON",)),
        ("[]", ("holds a JSON list; accepted: an object",)),
        ("\udcff", ("is not JSON",)),
    ],
)
def test_a_wrong_configuration_gets_one_line(text, words, tmp_path):
    path = tmp_path / "call.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    printed = io.StringIO()
    result = comparison.run(Request(model="a/b", config=path), tmp_path / "out", Console(file=printed, width=120))
    _refused(result, printed.getvalue(), *words)
    assert not (tmp_path / "out").exists()


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda v: st.lists(v, max_size=3)
)


@given(st.dictionaries(st.sampled_from([*ARGUMENTS, "latents", ""]), _VALUES, max_size=3))
@example({"sigmas": [1.0, 0.5], "num_frames": 121})
def test_any_configuration_is_taken_whole_or_refused_in_a_sentence(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(config))
    call, refused = None, ""
    try:
        call = comparison_request.check(Request(model="a/b", config=path))
    except CannotRun as why:
        refused = str(why)
    assert call == config or re.fullmatch(".*(accepted: |do not go with).*", refused), "one line, with what is accepted"


def test_what_the_pipeline_itself_refuses_gets_one_line(compare):
    result, printed = compare({**BRIEF, "max_sequence_length": 6})  # not a multiple of the connectors' registers
    assert result.exit_code == 2
    assert result.verdict.startswith("The stock model does not run with these arguments: ValueError: ")
    assert result.verdict not in printed


def _without_an_index(folder):
    (folder / "model_index.json").unlink()
    return "holds no model_index.json"


def _index_is_not_json(folder):
    (folder / "model_index.json").write_text("{")
    return "is not JSON"


def _another_pipeline(folder):
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return "is a folder of FluxPipeline; accepted: one of diffusers' LTX-2 pipelines"


def _weights_are_cut_off(folder):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return "can't be loaded as an LTX-2 pipeline"


def _no_vocoder(folder):
    for file in (folder / "vocoder").iterdir():
        file.unlink()
    return "can't be loaded as an LTX-2 pipeline"


def _weights_are_a_pickle(folder):
    """Loading a pickle can run anybody's code: it is not looked at."""
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    return "can't be loaded as an LTX-2 pipeline"


@pytest.mark.parametrize(
    "damage",
    [
        _without_an_index,
        _index_is_not_json,
        _another_pipeline,
        _weights_are_cut_off,
        _no_vocoder,
        _weights_are_a_pickle,
    ],
)
def test_a_damaged_folder_gets_one_line(damage, folder, tmp_path, compare):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "damaged")
    words = damage(copy)
    _refused(*compare(model=str(copy)), words)


def _earlier(out):
    """A folder with a result of bitfuse, and with files of its names that are somebody else's."""
    out.mkdir()
    for name in comparison.NAMES:
        (out / name).write_text(f"mine: {name}")
    digest = files.sha256(out / "stock.mp4")
    earlier = {"exit_code": 0, "verdict": "Bit-identical", "files": {"stock.mp4": digest, "bitfuse.mp4": "0" * 64}}
    (out / "compare.json").write_text(json.dumps(earlier))
    (out / "compare.html").write_text("<title>bitfuse compare: bit-identical</title>")
    return {file.name: file.read_bytes() for file in out.iterdir()}


def _contents(out):
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.mark.usefixtures("launched_as_reference")
def test_a_run_that_can_not_be_made_leaves_all_there_was(compare, folder, tmp_path):
    import shutil

    before = _earlier(tmp_path / "out")
    copy = shutil.copytree(folder, tmp_path / "damaged")
    _weights_are_cut_off(copy)
    _refused(*compare(model=str(copy)), "can't be loaded")
    assert _contents(tmp_path / "out") == before
    result, _ = compare({**BRIEF, "max_sequence_length": 6})
    assert result.exit_code == 2
    assert _contents(tmp_path / "out") == before


@pytest.mark.usefixtures("launched_as_reference")
def test_a_new_result_replaces_what_bitfuse_wrote_and_nothing_else(compare, tmp_path):
    before = _earlier(tmp_path / "out")
    result, _ = compare(random_weights="ltx-2.3", layers=1, steps=2, size="64x32", frames=9)
    assert result.exit_code == 0
    after = _contents(tmp_path / "out")
    assert after.keys() == before.keys() - {"stock.mp4"}, "the film of the earlier result goes with it"
    assert {name for name in after if after[name] != before[name]} == {"compare.json", "compare.html"}


def test_films_are_not_written_over_somebody_elses(two_runs, tmp_path):
    taken = {"stock.mp4", "bitfuse.webp", "bitfuse.wav"}
    films = comparison_page.write_films(tmp_path, *two_runs, 24.0, 16000, taken)
    assert set(films.files) == {"stock.png", "bitfuse.png"}
    assert "no mp4 (there is a stock.mp4 that bitfuse did not write)" in films.sentence
    assert "No sound as a file: there is a bitfuse.wav" in films.sentence
    assert films.sounds.keys() == {"stock", "with bitfuse"}, "the page has it"


@pytest.mark.parametrize("name", comparison.NAMES[:2])
def test_a_folder_with_somebody_elses_result_is_refused(name, compare, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison.subjects, "_load", lambda name: pytest.fail("it went on"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"exit_code": "mine"}')
    _refused(*compare(), f"holds a {name} that bitfuse did not write; accepted: a folder without one")
    assert (tmp_path / "out" / name).read_text() == '{"exit_code": "mine"}'


@pytest.mark.usefixtures("launched_as_reference")
def test_ctrl_c_in_the_last_moment_leaves_the_earlier_result(compare, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    before = _earlier(tmp_path / "out")
    monkeypatch.setattr(comparison.page, "fill", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(random_weights="ltx-2.3", layers=1, steps=2, size="64x32", frames=9)
    assert _contents(tmp_path / "out") == before


def test_a_folder_that_can_not_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    printed = io.StringIO()
    result = comparison.run(Request(model=str(folder)), tmp_path / "file", Console(file=printed, width=120))
    _refused(result, printed.getvalue(), "--out", "can't be written: File exists")


@pytest.mark.parametrize("package", ["diffusers", "transformers", "jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_the_cure(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    printed = io.StringIO()
    result = comparison.run(Request(model="a/b"), tmp_path / "out", Console(file=printed, width=120))
    _refused(result, printed.getvalue(), f"This needs {package}", "pip install 'bitfuse[demo]'")


# -- films --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_runs():
    frames = torch.rand(1, 3, 3, 400, 800, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    other = frames.clone()
    other.view(torch.int16)[0, 1, 2, 399, 799] ^= 1
    samples = torch.zeros(1, 2, 100)
    decoded = [{"decoded frames": of, "audio samples": samples} for of in (frames, other)]
    return [comparison.Denoising(decoded=of) for of in decoded]


@pytest.mark.parametrize("webp", [True, False])
def test_a_film_without_a_codec_goes_to_the_next(two_runs, tmp_path, monkeypatch, webp):
    """No PyAV, and no WebP: an animated PNG. One pixel that differs is white in the page's smaller film too."""
    from PIL import Image, features

    def refuse(*args):
        raise ImportError("no codec")

    monkeypatch.setattr(comparison_page, "_mp4", refuse)
    if not webp:
        stock = comparison_page._animated
        monkeypatch.setattr(features, "check", lambda what: False)
        monkeypatch.setattr(
            comparison_page,
            "_animated",
            lambda f, r, kind, *a, **k: refuse() if kind == "WEBP" else stock(f, r, kind, *a),
        )
    films = comparison_page.write_films(tmp_path, *two_runs, 24.0, 16000)
    suffix = "webp" if webp else "png"
    assert set(films.files) == {f"stock.{suffix}", f"bitfuse.{suffix}", "stock.wav", "bitfuse.wav"}
    assert "no mp4 (no codec)" in films.sentence
    kind, _, content = films.pictures["difference"].partition(";base64,")
    assert kind == f"data:image/{suffix}"
    with Image.open(io.BytesIO(comparison_page.page.base64.b64decode(content))) as mask:
        mask.seek(1)
        lit = torch.tensor(list(mask.convert("L").tobytes())).reshape(mask.size[::-1]).nonzero()
        assert (lit == torch.tensor(mask.size[::-1]) - 1).all(), "the lower right corner, and nothing else"
        assert len(lit) == 1


def test_no_codec_at_all_costs_the_film_only(two_runs, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("encoder is not there")

    monkeypatch.setattr(comparison_page, "_mp4", refuse)
    animated, written = comparison_page._animated, itertools.count()
    monkeypatch.setattr(
        comparison_page, "_animated", lambda *a, **k: refuse() if next(written) < 2 else animated(*a, **k)
    )
    films = comparison_page.write_films(tmp_path, *two_runs, 24.0, 16000)
    assert set(films.files) == {"stock.wav", "bitfuse.wav"}
    assert films.sentence.startswith("No film could be written: no mp4 (encoder is not there), no webp")


def test_a_latent_that_is_not_a_number_in_both_runs_is_no_difference_in_the_picture():
    nan = torch.tensor([float("nan"), 1.0, 0.0])
    assert comparison_page.differing(nan, torch.tensor([float("nan"), 1.0, -0.0])).tolist() == [False, False, True]


# -- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"offload": True}, {"cuda_graph": True, "keep_text": True}], ids=str)
def test_on_a_gpu(compare, options):
    result, _ = compare({**BRIEF, "num_inference_steps": 5}, device="cuda", **options)
    assert result.exit_code == 0, result.verdict
    assert result.document["runs"]["bitfuse"]["peak_bytes"] > 0
    assert result.document["times"]["ratio"] > 0
