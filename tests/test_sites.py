"""`bitfuse explain`: what it says without running a model is what the model then does, and every reason is named."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch

pytest.importorskip("diffusers")

from rich.console import Console

import bitfuse
from bitfuse.hosts import diffusers as adapter
from bitfuse.tools import explain as sites
from bitfuse.tools import seeded
from bitfuse.tools.seeded import diffusers as seeded_diffusers

CPU = torch.device("cpu")


def by_name(found):
    return {kind.name.removeprefix("transformer_blocks.*."): kind for kind in found.kinds}


def small(version="2.3", **config):
    """The demo's small transformer on meta, as its folder would give it."""
    geometry = dataclasses.replace(seeded.SMALL, version=version)
    with torch.device("meta"):
        model = sites._transformer_class()(**{**seeded_diffusers.config(geometry), **config})
    return torch.nn.Module.to(model, torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.parametrize(("version", "per_block"), [("2.0", 16), ("ltx-2.3", 24), ("2.5", 24)])
def test_every_site_of_every_version_would_be_fused(version, per_block):
    found = sites.explain(sites.from_version(version, layers=2), name=version)
    assert (found.fused, found.seen) == (2 * per_block, 2 * per_block)
    assert len(found.kinds) == per_block, "two blocks show as one does"
    assert {kind.count for kind in found.kinds} == {2}
    kind = by_name(found)["attn1"]
    assert (kind.operator, kind.tier, kind.then) == (
        "qk_rms_norm_split_rotary_fp32",
        "single pass",
        ("ATen's statistic",),
    )
    assert kind.arguments["q"] == "[1, 6144, 4096] bfloat16"
    assert kind.source == bitfuse.OPERATORS[kind.operator].source


def test_what_it_says_is_what_the_model_does():
    """The same small model, explained on meta, then run in the interpreter: the same sites fused by the same operators.

    But for the last word, which the proof has: on a CPU no norm is fused in a single pass, as ATen adds up otherwise.
    """
    said = {(kind.name, kind.operator): kind for kind in sites.explain(small("2.0"), tokens=24).kinds}
    geometry = dataclasses.replace(seeded.SMALL, frames=2, height=3, width=4)
    model = seeded.build(geometry, CPU, seed=0)
    with bitfuse.accelerated(model) as handle, bitfuse.core.kernel.interpreter():
        seeded.one_step(model, seeded.make_inputs(model, geometry, CPU, seed=0))()
        done = {(kind["name"], kind["operator"]): kind for kind in handle.report().kinds()}
    assert said.keys() == done.keys()
    for key, kind in said.items():
        assert (kind.state, kind.count) == (sites.FUSED, done[key]["count"])
        assert done[key]["state"] == "fused"
        assert set(done[key]["tiers"]) <= {kind.tier, *kind.then}


def test_the_model_is_left_as_it_was():
    model = small()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    processors = [type(p) for p in model.attn_processors.values()]
    sites.explain(model, tokens=8)
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before
    assert [type(p) for p in model.attn_processors.values()] == processors
    assert all(p.is_meta for p in model.parameters()), "nothing was loaded"


def test_every_reason_of_an_operator_is_given():
    found = by_name(sites.explain(small().float(), tokens=8))
    gate = found["attn1.gate"]
    assert (gate.state, gate.tier) == (sites.CHAIN, None)
    accepted = "is torch.float32; accepted: torch.bfloat16"
    assert gate.reasons == (f"out {accepted}", f"logits {accepted}"), "and none that speaks of the meta device"
    assert found["attn1"].reasons == ("q is torch.float32; accepted: torch.bfloat16, torch.float16",)


def test_a_width_that_no_kernel_takes():
    geometry = seeded_diffusers.config(dataclasses.replace(seeded.SMALL, head_dim=24))
    found = sites.explain(small("2.0", **geometry), tokens=8)
    assert by_name(found)["norm1"].reasons == ("x is 96 wide; accepted: multiples of 128 up to 8192",)
    assert found.fused < found.seen


def test_tiers_that_are_passed_over():
    wide = seeded_diffusers.config(dataclasses.replace(seeded.REAL, layers=1, heads=64))
    kind = by_name(sites.explain(small("2.0", **wide), tokens=8))["norm1"]
    assert (kind.tier, kind.then) == ("ATen's statistic", ())
    assert kind.passed_over == (
        "single pass: ATen splits rows of 8192 between warps, in an order that is not reproduced here",
    )


def test_image_to_video_has_values_for_each_token():
    scale = [by_name(sites.explain(small(), 8, image))["norm1"].arguments["scale"] for image in (False, True)]
    assert scale[0].startswith("[1, 1, 128]")
    assert scale[1].startswith("[1, 8, 128]")
    assert "strides" in scale[1], "a view of a wider tensor"


def test_sites_that_are_left_alone(monkeypatch):
    monkeypatch.setitem(adapter.READ, "LTX2PerturbedAttnProcessor", set())
    found = by_name(sites.explain(small(), tokens=8))
    assert found["attn1"].state == sites.LEFT_ALONE
    (reason,) = found["attn1"].reasons
    assert reason.startswith("LTX2PerturbedAttnProcessor of diffusers")
    assert "is not a source that bitfuse knows" in reason
    assert found["norm1"].state == sites.FUSED


def test_what_the_adapter_itself_decides_at_a_call():
    model = small("2.0")
    model.transformer_blocks[0].attn1.norm_q.register_forward_hook(lambda *_: None)
    kinds = [k for k in sites.explain(model, tokens=8).kinds if k.name.endswith(".attn1")]
    assert [(k.state, k.count) for k in kinds] == [(sites.CHAIN, 1), (sites.FUSED, 1)], "block 0, and block 1"
    assert kinds[0].reasons == ("a hook is attached to norm_q, which is not called when it is fused",)


def test_off_is_said_of_this_machine_and_not_of_the_model():
    bitfuse.disable()
    try:
        found = sites.explain(small(), tokens=8)
    finally:
        bitfuse.enable()
    assert found.fused == found.seen
    assert "bitfuse is off (BITFUSE=0 or bitfuse.disable())" in found.here


def test_json_and_table():
    found = sites.explain(small(), tokens=8, name="the [red]small[/] one")
    document = json.loads(json.dumps(found.as_dict()))
    assert document["sites_to_be_fused"] == document["sites_seen"] == 48
    assert document["kinds"][0]["arguments"]["q"] == "[1, 8, 128] bfloat16"
    printed = io.StringIO()
    sites.show(Console(file=printed, width=120), found)
    text = printed.getvalue()
    assert "the [red]small[/] one" in text, "names are no markup"
    assert "2 x audio_to_video_norm" in text
    assert "48 of 48 sites" in text
    assert "proved equal on the GPU" in text
    for operator in {kind.operator for kind in found.kinds}:
        assert f"{operator}: bit for bit the chain of {bitfuse.OPERATORS[operator].source[:20]}" in text


# -- where the config comes from ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder, as far as explain looks: no weights in it."""
    config = {
        "_class_name": "LTX2VideoTransformer3DModel",
        "_diffusers_version": "0.42.1",
        **seeded_diffusers.config(seeded.SMALL),
    }
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text("{}")
    return tmp_path


def test_a_folder_of_a_pipeline_or_of_its_transformer(folder):
    for path in (folder, folder / "transformer"):
        model = sites.from_config(str(path))
        assert model.config.num_layers == seeded.SMALL.layers
        assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert sites.from_config(str(folder), torch.float16).dtype == torch.float16


def test_entries_that_this_diffusers_does_not_know_are_passed_over(folder):
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_next_year": [1, 2]}))
    assert sites.explain(sites.from_config(str(folder)), tokens=8).fused == 32


def test_an_id_on_the_hub(monkeypatch):
    asked = []

    def load_config(name, subfolder=None):
        asked.append((name, subfolder))
        if subfolder:
            raise OSError("no such file\nin that\nrepository")
        return {"_class_name": "LTX2VideoTransformer3DModel", **seeded_diffusers.config(seeded.SMALL)}

    monkeypatch.setattr(sites._transformer_class(), "load_config", load_config)
    assert sites.from_config("somebody/something").config.num_layers == 2
    assert asked == [("somebody/something", "transformer"), ("somebody/something", None)]


def test_a_hub_that_does_not_answer_is_said_in_one_line(monkeypatch):
    def load_config(*_, **__):
        raise OSError("We couldn't connect\nto the Hub")

    monkeypatch.setattr(sites._transformer_class(), "load_config", load_config)
    with pytest.raises(ValueError, match=r"can't be had from the Hub: OSError: We couldn't connect to the Hub$"):
        sites.from_config("somebody/something")


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"diffusers 0\.37 or newer is needed .*: pip install 'bitfuse\[diffusers\]'"):
        sites.from_version("2.0", layers=1)


@pytest.mark.parametrize("tokens", [0, -1, 2**18 + 1])
def test_tokens_out_of_range(tokens):
    with pytest.raises(ValueError, match=f"--tokens is {tokens}; accepted: 1 to 262144"):
        sites.explain(small(), tokens=tokens)


@pytest.mark.parametrize("wrong", [None, "Lightricks/LTX-2", 1], ids=str)
def test_what_is_no_model_is_named(wrong):
    with pytest.raises(
        TypeError, match=r"^model is .*; accepted: a transformer, as from_config or from_version builds it$"
    ):
        sites.explain(wrong)


def test_what_a_model_calls_itself_is_text_and_no_markup():
    odd = "[/] :smile: \x1b[31m\nOn this machine"
    kind = sites.SiteKind(odd, odd, odd, sites.CHAIN, {odd: odd}, reasons=(odd,))
    out = io.StringIO()
    sites.show(Console(file=out, width=250), sites.Explanation(odd, odd, odd, [kind], [odd]))
    assert out.getvalue().count(r"[/] :smile: \x1b[31m") >= 8
    assert all(line.isprintable() and not line.startswith("On this machine\n") for line in out.getvalue().splitlines())
    assert not [line for line in out.getvalue().splitlines() if line.strip() == "On this machine"]
