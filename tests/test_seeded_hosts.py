"""`--host`: the commands on ltx-core's and SGLang's own transformers, and what is said where a host can't be had."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import bitfuse
import sglang_host
from bitfuse.cli import app
from bitfuse.core.kernel import interpreter
from bitfuse.hosts.site import Site
from bitfuse.tools import explain as sites
from bitfuse.tools import ranks, seeded
from bitfuse.tools.compare import comparison, conformance, demo, runs
from bitfuse.tools.compare.request import Request
from bitfuse.tools.prove import document, verify
from common import references_launched
from planted import Plant

CPU = torch.device("cpu")
QUIET = Console(file=io.StringIO())
# Sites of a block in 2.0 and 2.3, and those outside of the blocks
SITES = {"ltx-core": (16, 24, 0), "sglang": (16, 24, 2)}
# SGLang keeps 2.0's text itself (two attentions a block), and its attentions leave its rotary function uncalled.
UNFUSED = {"ltx-core": {"2.0": 0, "2.3": 0}, "sglang": {"2.0": 2 * 2 + 1, "2.3": 1}}


@pytest.fixture(scope="module", params=SITES)
def host(request):
    if request.param == "sglang":
        sglang_host.ready()
    else:
        for needed in ("ltx_core", "einops"):
            pytest.importorskip(needed)
    return request.param


@pytest.fixture
def denoising(host):
    """A host whose loop runs here: ltx-core's scheduler imports scipy."""
    if host == "ltx-core":
        pytest.importorskip("scipy")
    return host


def geometry(host, version="2.0", **sizes):
    return dataclasses.replace(
        seeded.SMALL, host=host, version=version, **{"frames": 2, "height": 3, "width": 4, "steps": 2, **sizes}
    )


# -- the transformer and its loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_the_loop_repeats_itself_and_each_step_moves_both_streams(denoising, version):
    g = geometry(denoising, version)
    model = seeded.build(g, CPU, seed=0)
    inputs = seeded.make_inputs(model, g, CPU, seed=0)
    first, again = (seeded.denoise(model, g, inputs, lambda: None) for _ in range(2))
    runs.check_repeats(first, again)
    runs.check_finite(first)
    assert first.sigmas == pytest.approx([1.0, 0.1], abs=1e-6), "LTX-2's schedule ends at 0.1 in every host"
    assert bitfuse.compare(first.video[0], first.video[1])
    assert bitfuse.compare(first.audio[0], first.audio[1])
    assert first.video[-1].shape == (1, g.video_tokens, g.channels)
    assert first.audio[-1].shape == (1, g.audio_frames, g.audio_channels)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.usefixtures("launched_as_reference")
def test_a_twin_has_the_same_parameters_and_is_accelerated_alone(host):
    g = geometry(host, "2.3", layers=1)
    model = seeded.build(g, CPU, seed=0)
    twin = seeded.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    inputs = seeded.make_inputs(model, g, CPU, seed=0)
    expected = seeded.one_step(model, inputs)()
    kinds = [type(module) for module in model.modules()]
    with interpreter(), bitfuse.accelerated(twin) as handle:
        assert [type(module) for module in model.modules()] == kinds
        assert bitfuse.compare(expected, seeded.one_step(twin, inputs)()) is None
        assert handle.report().fused


@pytest.mark.usefixtures("launched_as_reference")
def test_a_given_first_frame_is_at_timestep_0(host):
    """Its tokens are told so, which changes what comes out; all others keep the step's own timestep."""
    text, image = (geometry(host, layers=1, image_to_video=given) for given in (False, True))
    model = seeded.build(text, CPU, seed=0)
    steps = [seeded.one_step(model, seeded.make_inputs(model, g, CPU, seed=0))() for g in (text, image)]
    assert bitfuse.compare(*steps)
    with interpreter(), bitfuse.accelerated(model):
        accelerated = seeded.one_step(model, seeded.make_inputs(model, image, CPU, seed=0))()
    assert bitfuse.compare(steps[1], accelerated) is None


def test_what_the_host_does_not_have_is_a_sentence(host, monkeypatch):
    if host == "sglang":
        from sglang.multimodal_gen.configs.models.dits.ltx_2 import LTX2ArchConfig

        known = {name: value for name, value in LTX2ArchConfig.__dataclass_fields__.items() if "ff_bias" not in name}
        monkeypatch.setattr(LTX2ArchConfig, "__dataclass_fields__", known)
    else:
        from ltx_core.model.transformer import model as upstream

        monkeypatch.setattr(upstream, "LTXModel", lambda num_layers: None)
    with pytest.raises(seeded.CannotRun, match=r"does not have LTX-2\.5: .* takes no .*ff_bias"):
        seeded.build(geometry(host, "2.5"), CPU, seed=0)


def test_the_process_keeps_its_default_dtype_and_its_logging(host):
    handlers = logging.getLogger().handlers[:]
    seeded.of_host(host).need(CPU)
    seeded.build(geometry(host, layers=1), CPU, seed=0)
    assert torch.get_default_dtype() == torch.float32
    assert logging.getLogger().handlers == handlers


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("launched_as_reference")
def test_the_demo(denoising, tmp_path, monkeypatch):
    host = denoising
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(seeded, "SMALL", geometry("diffusers", layers=1))
    result = demo.run(tmp_path, "cpu", steps=2, console=QUIET, host=host)
    assert result.exit_code == 0, result.verdict
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["host"].startswith({"ltx-core": "ltx-core ", "sglang": "SGLang 0.5."}[host])
    assert written["geometry"]["host"] == host
    assert all(row["equal"] for row in written["steps"])
    block, _, rest = SITES[host]
    assert written["sites"]["sites_seen"] == block + rest
    assert written["host"] in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("launched_as_reference")
def test_the_comparison_with_random_weights(denoising, tmp_path):
    host = denoising
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    wanted = {"random_weights": "ltx-2.3", "host": host, "layers": 1, "steps": 2, "size": "64x32", "frames": 9}
    result = comparison.run(Request(device="cpu", **wanted), tmp_path, QUIET)
    assert result.exit_code == 0, result.verdict
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["model"] == f"LTX-2.3 of {host}, random weights"
    assert len(written["steps"]) == 2


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_what_is_explained_is_what_is_done(host, version):
    """The same sites, fused by the same operators, in the explanation without values and in a run."""
    g = geometry(host, version)
    said = sites.explain(sites.from_geometry(g), g.video_tokens, geometry=g)
    model = seeded.build(g, CPU, seed=0)
    with interpreter(), bitfuse.accelerated(model) as handle:
        seeded.one_step(model, seeded.make_inputs(model, g, CPU, seed=0))()
        done = {(kind["name"], kind["operator"]): kind["state"] for kind in handle.report().kinds()}
    states = {sites.FUSED: "fused", sites.CHAIN: "fallen back", sites.NOT_CALLED: "not called yet"}
    found = {(kind.name, kind.operator): states.get(kind.state) for kind in said.kinds if kind.state != sites.UNSEEN}
    unseen = {(kind.name, kind.operator) for kind in said.kinds if kind.state == sites.UNSEEN}
    assert found == {key: state for key, state in done.items() if key not in unseen}
    assert unseen == ({("_ltx2_modulate", "modulate")} if host == "sglang" else set())
    assert said.host == handle.report().host


@pytest.fixture(scope="module", params=["references", pytest.param("kernels", marks=pytest.mark.slow)])
def verified(request, host):
    """`verify --host`: its steps by references, as tests of each host run the kernels, and the operator's checks."""
    run = conformance.run

    def by_references(*args):
        with references_launched():
            return list(run(*args))

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "references":
            patch.setattr(conformance, "run", by_references)
        return verify.run(QUIET, ["gated_residual"], "cpu", ["one row"], host=host)


def test_a_step_of_every_version_is_verified(host, verified):
    steps = {step.version: step for step in verified.transformers}
    assert list(steps) == list(seeded.VERSIONS)
    for version, of_block in zip(("2.0", "2.3"), SITES[host], strict=False):
        step = steps[version]
        assert (step.outcome, step.host) == ("equal", runs.named(host)), step.reason
        assert step.sites_seen == 2 * of_block + SITES[host][2]
        assert step.sites_fused == step.sites_seen - UNFUSED[host][version]
    assert verified.exit_code == 0


def test_the_proof_document_holds_the_steps(verified):
    jsonschema = pytest.importorskip("jsonschema")
    made = document.make(verified)
    jsonschema.Draft202012Validator(document.schema()).validate(made)
    assert made["asked"]["host"] == verified.host
    assert [step["version"] for step in made["transformers"]] == list(seeded.VERSIONS)
    assert f"{made['transformers'][0]['host']}'s transformer equal" in document.verdict(made)
    assert all(item.matches for item in document.compare(made, "cpu"))
    if importlib.util.find_spec("jinja2"):
        assert f"A step of {made['transformers'][0]['host']}" in document.render(made)
    made["transformers"][0]["outcome"] = "differs"
    made["digest"] = document.digest(made)
    assert [item.name for item in document.compare(made, "cpu") if not item.matches] == ["exit code of the content"]
    assert document.verdict(made).startswith("1 differ; ")


@pytest.mark.usefixtures("launched_as_reference")
def test_one_wrong_kernel_is_found(host, monkeypatch):
    stock, one_step, plant, outputs = Site.call, seeded.one_step, Plant(), []

    def wrong(site, operator, *tensors):
        out = stock(site, operator, *tensors)
        if "attn1" in site.name:
            plant(out)
        return out

    def noted(*args):
        step = one_step(*args)
        return lambda: outputs.append(step()) or outputs[-1]

    monkeypatch.setattr(Site, "call", wrong)
    monkeypatch.setattr(seeded, "one_step", noted)
    with interpreter():
        step = conformance.check(host, "2.3", CPU)
    plant.must_show(outputs[0], outputs[-1])
    assert step.outcome == "differs"
    assert "differs at [" in step.reason
    result = verify.Result("cpu", None, None, False, [], [], [], [], host, [step])
    assert result.exit_code == 1


def test_a_stock_step_that_does_not_repeat_itself_shows_nothing(host, monkeypatch):
    draws = iter(range(100))
    monkeypatch.setattr(seeded, "one_step", lambda *_: lambda: (torch.full((1,), float(next(draws))),) * 2)
    step = conformance.check(host, "2.0", CPU)
    assert step.outcome == "declined"
    assert step.reason.startswith("the stock step does not repeat itself, so nothing can be shown to equal it")


# -- a host that can't be had ------------------------------------------------------------------------------------------

ONLY_MODEL = ["--only", "model"]
COMMANDS = {
    "demo": ["demo", "--device", "cpu", "--out"],
    "compare": ["compare", "--random-weights", "2.0", "--device", "cpu", "--out"],
    "verify": ["verify", "--op", "head_gate", "--device", "cpu", "--json"],
    "explain": ["explain", "--random-weights", "2.0", "--json"],
}


NEEDED = [("ltx-core", "ltx_core"), ("sglang", "sglang"), ("diffusers", "diffusers"), ("comfyui", "bitfuse_comfyui")]


@pytest.mark.parametrize("missing", NEEDED)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_host_that_is_not_installed(command, missing, monkeypatch, tmp_path):
    name, package = missing
    if command in ("demo", "compare"):
        pytest.importorskip("jinja2")
        pytest.importorskip("matplotlib")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *a: None if wanted == package else find(wanted, *a))
    monkeypatch.setitem(__import__("sys").modules, package, None)
    found = CliRunner().invoke(app, [*COMMANDS[command], str(tmp_path / "out"), "--host", name])
    said = found.output if found.exit_code == 2 else str(found.exception)  # which `main` prints as its one line
    assert isinstance(found.exception, (SystemExit, ValueError))
    assert "pip install" in said
    assert "needs" in said or "needed" in said
    assert len(said.strip().splitlines()) == 1
    assert not any(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--host", "invoke"], "--host invoke is not a host; accepted: diffusers, ltx-core, sglang, comfyui"),
        (["verify", "--host", "invoke"], "--host invoke is not a host"),
        (["explain", "owner/name", "--host", "sglang"], "--host sglang goes with --random-weights"),
        (["compare", "owner/name", "--host", "ltx-core"], "--host ltx-core goes with --random-weights"),
        (["explain", "--random-weights", "--host", "sglang"], "--random-weights --host is not a version; accepted:"),
        (["compare", "--random-weights", "--host", "sglang"], "--random-weights --host is not a version; accepted:"),
        (["explain", "--random-weights", "ltx-9"], "--random-weights ltx-9 is not a version; accepted: ltx-2.0,"),
        (["bench", "--host", "sglang"], "--host sglang goes with --only model"),
        (["bench", "--host", "sglang", *ONLY_MODEL, "--only", "overhead"], "--host sglang goes with --only model"),
        (["verify", "--host", "sglang", "--check", "x"], "--check reads a document and runs nothing"),
    ],
)
def test_a_wrong_call_gets_one_line(arguments, said):
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2
    assert said in " ".join(found.output.split())


def test_another_dtype_is_diffusers_only(host):
    with pytest.raises(ValueError, match=f"goes with --host diffusers; accepted for {host}: bfloat16"):
        sites.from_geometry(geometry(host), torch.float16)


def test_sglang_on_a_device_that_is_not_its_own():
    sglang_host.ready()
    with pytest.raises(seeded.CannotRun, match="SGLang takes this machine for one of device cpu, so"):
        seeded.of_host("sglang").need(torch.device("cuda"))


# -- examples ----------------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parent.parent / "examples"


def _example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _checkout_example(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ltx_core_checkout.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return _example("ltx_core_checkout").main()


@pytest.mark.usefixtures("launched_as_reference")
def test_a_checkout_of_ltx_core_is_compared_step_by_step_and_in_a_loop(monkeypatch, tmp_path, capsys):
    for needed in ("ltx_core", "einops", "scipy"):
        pytest.importorskip(needed)
    monkeypatch.setattr(seeded, "SMALL", dataclasses.replace(seeded.SMALL, frames=2, height=3, width=4, steps=2))
    checkout = Path(next(iter(importlib.util.find_spec("ltx_core").submodule_search_locations))).parent
    assert _checkout_example(monkeypatch, checkout, "--layers", 1, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "LTX-2.0, a step: equal, 32 of 32 sites fused" in printed
    assert "LTX-2.3, a step: equal, 48 of 48 sites fused" in printed
    assert "both latents after each of 2 steps, with 16 of 16 sites fused" in printed
    assert (tmp_path / "report.html").is_file()


def test_a_folder_without_ltx_core_is_named(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        _checkout_example(monkeypatch, tmp_path)
    assert stopped.value.code == 2
    assert f"{tmp_path} does not hold the package ltx_core" in capsys.readouterr().err


# -- several ranks -----------------------------------------------------------------------------------------------------

RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EQUAL = "What every rank computes is what its stock step computes, in every bit."


@pytest.mark.slow  # half a minute of two processes; test_sglang has the passes of sequence parallelism in one
def test_two_ranks_of_sglang_are_their_stock_steps_and_fuse_the_same_sites(tmp_path):
    sglang_host.ready()
    out = tmp_path / "ranks.json"
    options = ["--ltx", "2.3", "--layers", "1", "--rounds", "2", "--steps", "1", "--json", out]
    done = subprocess.run(
        [*RANKS, sglang_host.__file__, EXAMPLES / "sglang_ranks.py", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert EQUAL in done.stdout
    found = json.loads(out.read_text())
    assert (found["ranks"], found["backend"], found["differs"]) == (2, "gloo", {})
    assert found["sites_fused"] == [25, 25], "all of a block, and the output's modulation"
    assert "48 video" in found["geometry"], "of the whole clip"


@pytest.mark.slow  # a quarter of a minute of two processes each; test_ranks has FSDP2 in one
@pytest.mark.parametrize(("how", "ltx", "fused"), [("ulysses", "2.3", 24), ("fsdp", "2.0", 16), ("train", "2.0", 0)])
def test_two_ranks_of_diffusers_are_their_stock_steps_and_fuse_the_same_sites(how, ltx, fused, tmp_path):
    pytest.importorskip("diffusers", minversion="0.42")
    if how == "train":
        pytest.importorskip("peft")
    out = tmp_path / "ranks.json"
    options = ["--how", how, "--ltx", ltx, "--layers", "1", "--rounds", "2", "--steps", "1", "--json", out]
    done = subprocess.run(
        [*RANKS, EXAMPLES / "diffusers_ranks.py", *options], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert EQUAL in done.stdout
    found = json.loads(out.read_text())
    assert (found["ranks"], found["backend"], found["differs"]) == (2, "gloo", {})
    assert found["sites_fused"] == [fused, fused]
    assert found["trains"] == (how == "train")


@pytest.mark.parametrize(
    "part", [{"differs": ["bitfuse: differs"]}, {"sites": ["others"]}, {"fused": 0}], ids=lambda part: next(iter(part))
)
def test_one_rank_that_is_not_as_promised_fails_them_all(monkeypatch, part):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(ranks.distributed, "get_backend", lambda: "gloo")
    times = {"stock": [1.0, 2.0], "bitfuse": [1.0, 2.0]}
    good = {"geometry": "", **times, "differs": [], "sites": [], "fused": 9, "seen": 9}

    def together(*parts):
        return ranks.together(list(parts), "diffusers")

    found = together(good, good)
    assert ranks.as_promised(found)
    assert found["ms"]["stock"]["median"] == 1.5
    assert together(good, good | {"bitfuse": [4.0, 4.0]})["speed_up"] == 1.5 / 4, "the slowest rank counts"
    assert not ranks.as_promised(together(good, good | part))
    training = {"trains": True}
    assert ranks.as_promised(together(good | training, good | training | part)) == ("fused" in part)


@pytest.mark.parametrize(("version", "ranks", "name"), [("2.0", 3, "frames"), ("2.3", 4, "audio_frames")])
def test_a_clip_that_does_not_divide_among_the_ranks_is_refused(monkeypatch, version, ranks, name):
    sglang_host.ready()
    from bitfuse.tools.seeded import sglang as seeded_sglang

    monkeypatch.setattr(seeded_sglang, "ranks", lambda: ranks)
    g = geometry("sglang", version, frames=4)
    with pytest.raises(ValueError, match=rf"^{name} is \d+; accepted for {ranks} ranks: a multiple of {ranks}$"):
        seeded_sglang.part_of_rank(None, g, {})
