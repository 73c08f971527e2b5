"""diffusers' LTX-2 text connectors: same bits of what a prompt becomes, sites accounted for, nothing left behind."""

from __future__ import annotations

import copy
import inspect
import types

import pytest
import torch

import bitfuse
from bitfuse.core.kernel import interpreter
from bitfuse.run.swap import ours_in
from test_diffusers import V20, make
from test_diffusers import run as run_transformer

upstream = pytest.importorskip("diffusers.pipelines.ltx2.connectors")

from bitfuse.hosts import diffusers_connectors as adapter  # noqa: E402 (it needs diffusers)

LAYERS = 2
TEXT = {"caption_channels": 128, "text_proj_in_factor": 3, "rope_type": "split", "connector_rope_base_seq_len": 16}
TEXT |= {"rope_theta": 10000.0, "rope_double_precision": True, "causal_temporal_positioning": False}


def sides(video, audio, **both):
    """Of each connector heads and head size, and what both have."""
    of = {"video": {"num_attention_heads": video[0], "attention_head_dim": video[1]}}
    of["audio"] = {"num_attention_heads": audio[0], "attention_head_dim": audio[1]}
    common = {"num_layers": LAYERS, "num_learnable_registers": 4, **both}
    return {f"{side}_connector_{name}": value for side in of for name, value in {**of[side], **common}.items()}


V20_TEXT = {**TEXT, **sides((2, 64), (2, 64))}
GATED = {f"{side}_gated_attn": True for side in ("video", "audio")}
CONFIGS = {
    "2.0": V20_TEXT,
    "2.0, interleaved, no registers": {
        **TEXT,
        **sides((2, 64), (4, 32), num_learnable_registers=None),
        "rope_type": "interleaved",
    },
    "2.3": {
        **TEXT,
        **sides((4, 64), (2, 64)),
        **GATED,
        "per_modality_projections": True,
        "proj_bias": True,
        "video_hidden_dim": 256,
        "audio_hidden_dim": 128,
    },
}
BLOCKS = [f"connectors.{side}_connector.transformer_blocks.{i}" for side in ("video", "audio") for i in range(LAYERS)]


def names(config="2.0"):
    """All that is taken over, in the report's order."""
    attention = ("attn1", "attn1.gate") if "video_gated_attn" in CONFIGS[config] else ("attn1",)
    return [f"{block}.{site}" for block in BLOCKS for site in attention] + [f"{block}.norm2" for block in BLOCKS]


def connectors(config="2.0", dtype=torch.bfloat16, device="cpu"):
    accepted = inspect.signature(upstream.LTX2TextConnectors).parameters
    if unknown := [name for name in CONFIGS[config] if name not in accepted]:
        pytest.skip(f"this diffusers' connectors take no {unknown[0]}")
    torch.manual_seed(0)
    model = upstream.LTX2TextConnectors(**CONFIGS[config])
    for parameter in model.parameters():  # Q/K norms start as ones, which hide much
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.to(device=device, dtype=dtype).eval()


def feed(model):
    """A prompt of 8 tokens, and one of 5 behind padding."""
    generator = torch.Generator().manual_seed(7)
    text = torch.randn(2, 8, 128, 3, generator=generator).to(next(model.parameters()))
    mask = (torch.arange(8) >= torch.tensor([[0], [3]])).long().to(text.device)
    if "padding_side" not in inspect.signature(model.forward).parameters:  # 0.37: what its pipeline had normed before
        return text.flatten(2), mask
    return text, mask


def run(model):
    with torch.no_grad(), interpreter():
        return model(*feed(model))


def assert_same(expected, found):
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        assert bitfuse.compare(one, other) is None


def states(handle):
    return {site.name: site.state for site in handle.sites}


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_what_the_prompt_becomes_is_the_same_in_every_bit_and_every_site_is_fused(config, device):
    model = connectors(config, device=device)
    stock = run(model)
    assert not any(t.isnan().any() or (t == 0).all() for t in stock)
    with bitfuse.accelerated(model) as handle:
        assert_same(stock, run(model))
        assert [site.name for site in handle.sites] == names(config)
        assert set(states(handle).values()) == {"fused"}
        assert {site.fused for site in handle.sites} == {1}
    assert_same(stock, run(model))


def test_in_fp32_the_chains_run_with_a_reason(device):
    model = connectors(dtype=torch.float32, device=device)
    stock = run(model)
    with bitfuse.accelerated(model) as handle:
        assert_same(stock, run(model))
        assert set(states(handle).values()) == {"fallen back"}
        assert all("torch.float32; accepted: torch.bfloat16, torch.float16" in site.reasons[0] for site in handle.sites)


def test_gradients_are_those_of_the_stock_connectors(device):
    model = connectors(device=device)

    def gradients():
        model.zero_grad(set_to_none=True)
        with interpreter():
            sum(t.float().square().sum() for t in model(*feed(model))[:2]).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    stock = gradients()
    assert len(stock) > 20
    with bitfuse.accelerated(model) as handle:
        found = gradients()
        assert_same(stock.values(), found.values())
        norms = [site for site in handle.sites if site.name.endswith("norm2")]
        assert {reason for site in norms for reason in site.reasons} == {
            "a gradient is required of the block's inputs or weights"
        }


# -- targets -----------------------------------------------------------------------------------------------------------


def pipeline(transformer, text):
    return types.SimpleNamespace(components={"connectors": text, "vae": None, "transformer": transformer})


def test_a_pipelines_connectors_are_accelerated_with_its_transformer(device):
    model, text = make(V20, device=device), connectors(device=device)
    stock = run(text)
    with bitfuse.accelerated(pipeline(model, text)) as handle:
        assert_same(stock, run(text))
        found = [site.name for site in handle.sites]
        assert found[-len(names()) :] == names()
        assert all(name.startswith("transformer_blocks.") for name in found[: -len(names())])
        assert len(found) > len(names())
        assert {state for name, state in states(handle).items() if name in names()} == {"fused"}
    assert all(type(block) is upstream.LTX2TransformerBlock1d for _, block in adapter.blocks(text))


@pytest.mark.parametrize("first", ["connectors", "transformer"])
def test_a_pipeline_of_which_a_part_is_accelerated_is_refused_and_left_as_it_is(first):
    pipe = pipeline(make(V20), connectors())
    handle = bitfuse.accelerate(part := pipe.components[first])
    sites = len(handle.sites)
    with pytest.raises(ValueError, match=f"a part of target is .*, without the rest: {type(part).__name__}; restore"):
        bitfuse.accelerate(pipe)
    with bitfuse.accelerated(pipe) as outer:
        assert outer is handle
    assert len(handle.sites) == sites
    handle.restore()
    whole = bitfuse.accelerate(pipe)
    assert len(whole.sites) > sites
    assert bitfuse.accelerate(part) is bitfuse.accelerate(pipe) is whole
    whole.restore()


@pytest.mark.usefixtures("launched_as_reference")
def test_two_pipelines_share_connectors(device):
    """Those are the first one's; the second one's transformer is accelerated by itself, and either may end first."""
    text, models = connectors(device=device), [make(V20, device=device, seed=seed) for seed in (0, 1)]
    first, second = (pipeline(model, text) for model in models)
    stock, steps = run(text), [run_transformer(model) for model in models]
    handle = bitfuse.accelerate(first)
    with pytest.raises(ValueError, match="without the rest: LTX2TextConnectors; restore"):
        bitfuse.accelerate(second)
    with bitfuse.accelerated(second) as outer:  # changes nothing
        assert outer is handle
        assert not any(ours_in(module) for module in models[1].modules())
    beside = bitfuse.accelerate(second.components["transformer"])

    def assert_all_are_stocks():
        assert_same(stock, run(text))
        for step, model in zip(steps, models, strict=True):
            assert_same(step, run_transformer(model))

    assert_all_are_stocks()
    for found in (handle, beside):
        assert set(states(found).values()) == {"fused"}
    assert names()[0] in states(handle)
    assert names()[0] not in states(beside)
    handle.restore()
    fused = sum(site.fused for site in beside.sites)
    assert_all_are_stocks()
    assert sum(site.fused for site in beside.sites) > fused
    assert not any(ours_in(module) for module in (*text.modules(), *models[0].modules()))
    beside.restore()
    with bitfuse.accelerated(second) as whole:
        assert_all_are_stocks()
        assert set(states(whole).values()) == {"fused"}
        assert names()[0] in states(whole)


def test_the_connectors_are_in_no_cuda_graph():
    text = connectors()
    with bitfuse.accelerated(text, cuda_graph=True) as handle:
        run(text)
        assert handle.graphs == []
        assert ours_in(text).inner is None
        assert set(states(handle).values()) == {"fused"}


def test_strict_names_a_site_that_falls_back():
    text = connectors()
    text.audio_connector.transformer_blocks[1].norm2.register_forward_hook(lambda *_: None)
    with (
        bitfuse.accelerated(text, strict=True),
        pytest.raises(bitfuse.NotFused, match=r"^connectors\.audio_connector\.transformer_blocks\.1\.norm2: a hook is"),
    ):
        run(text)


# -- what was not read, hooks, replaced modules ------------------------------------------------------------------------


def test_a_block_of_unknown_source_stays_and_its_attention_is_fused(monkeypatch):
    model = connectors()
    stock = run(model)
    monkeypatch.setitem(adapter.READ, "LTX2TransformerBlock1d.forward", {"0" * 16})
    with bitfuse.accelerated(model) as handle:
        assert_same(stock, run(model))
        alone = [site for site in handle.sites if site.state == "left alone"]
        assert [site.name for site in alone] == [f"{block}.norm2" for block in BLOCKS]
        assert all("is not a source that bitfuse knows (" in site.declined for site in alone)
        assert {state for name, state in states(handle).items() if name.endswith("attn1")} == {"fused"}
        assert all(type(block) is upstream.LTX2TransformerBlock1d for _, block in adapter.blocks(model))


def another_block(model):
    block = model.video_connector.transformer_blocks[0]
    forward = upstream.LTX2TransformerBlock1d.forward
    block.__class__ = type(
        "Mine", (type(block),), {"forward": lambda self, *args, **kwargs: forward(self, *args, **kwargs)}
    )
    return "norm2", "not diffusers' own, and has a forward of its own"


def a_wrapped_forward(model):
    block = model.video_connector.transformer_blocks[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    return "norm2", "a hook or a wrapper has replaced the block's forward"


def a_norm_with_a_weight(model):
    model.video_connector.transformer_blocks[0].norm2 = torch.nn.RMSNorm(128, eps=1e-6, dtype=torch.bfloat16)
    return "norm2", "norm2 has a weight"


def another_norm(model):
    model.video_connector.transformer_blocks[0].norm2 = torch.nn.LayerNorm(128, dtype=torch.bfloat16)
    return "norm2", "LayerNorm, not torch.nn.RMSNorm"


def another_processor(model):
    processor = type("Mine", (upstream.LTX2AudioVideoAttnProcessor,), {})()
    model.video_connector.transformer_blocks[0].attn1.set_processor(processor)
    return "attn1", "not one of diffusers' LTX-2 processors"


CHANGES = [another_block, a_wrapped_forward, a_norm_with_a_weight, another_norm, another_processor]


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_somebody_changed_is_left_to_them(change):
    model = connectors()
    site, reason = change(model)
    stock = run(model)
    with bitfuse.accelerated(model) as handle:
        assert_same(stock, run(model))
        assert [s.name for s in handle.sites if s.state == "left alone"] == [f"{BLOCKS[0]}.{site}"]
        (alone,) = (s for s in handle.sites if s.declined)
        assert reason in alone.declined
        assert sum(s.state == "fused" for s in handle.sites) == len(names()) - 1


def hooked_norm(block):
    block.norm2.register_forward_hook(lambda module, args, out: out * 2)
    return "a hook is attached to norm2"


def replaced_norm(block):
    block.norm2 = torch.nn.RMSNorm(128, eps=1.0, elementwise_affine=False)
    return


def changed_norm(block):
    block.norm2.eps = 1.0
    return


def another_class_of_norm(block):
    block.norm2 = torch.nn.LayerNorm(128, elementwise_affine=False)
    return "norm2 is a torch.nn.modules.normalization.LayerNorm, not torch.nn.RMSNorm"


@pytest.mark.parametrize("change", [hooked_norm, replaced_norm, changed_norm, another_class_of_norm])
def test_a_norm_that_is_changed_while_it_is_fused_is_the_one_that_runs(change):
    """Called, or fused as it is now where it is still a norm like that."""
    model = connectors()
    before = run(model)
    with bitfuse.accelerated(model) as handle:
        reason = change(model.video_connector.transformer_blocks[0])
        found = run(model)
        site = next(site for site in handle.sites if site.name == f"{BLOCKS[0]}.norm2")
        assert site.state == ("fused" if reason is None else "fallen back")
        assert reason is None or reason in site.reasons[0]
    assert_same(run(model), found)
    assert bitfuse.compare(before[0], found[0]) is not None, "the change shows"


def test_hooks_of_blocks_and_attentions_are_called():
    model = connectors()
    seen = []
    for place in ("before", "after"):  # one set before it is accelerated, one while it is
        for name in ("", ".attn1", ".norm1", ".ff"):
            module = model.get_submodule(f"video_connector.transformer_blocks.1{name}")
            module.register_forward_hook(lambda *_, what=(place, name): seen.append(what))
        handle = bitfuse.accelerate(model)
    run(model)
    assert set(states(handle).values()) == {"fused"}
    assert len(seen) == len(set(seen)) == 8
    handle.restore()
    run(model)
    assert len(seen) == 16


def test_a_copy_is_a_stock_model():
    model = connectors()
    stock = run(model)
    with bitfuse.accelerated(model) as handle:
        assert list(model.state_dict()) == list(connectors().state_dict())
        twin = copy.deepcopy(model)
        assert_same(stock, run(twin))
        assert set(states(handle).values()) == {"not called yet"}
    for _, block in adapter.blocks(twin):
        assert type(block) is upstream.LTX2TransformerBlock1d
        assert type(block.attn1.processor) is upstream.LTX2AudioVideoAttnProcessor
        assert "_bitfuse" not in vars(block)
