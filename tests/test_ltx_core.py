"""The real ltx-core (1.0.0 in CI), stock against accelerated: the same bits, or its own code for a reason."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest
import torch

pytest.importorskip("ltx_core")
pytest.importorskip("einops")

from ltx_core import utils
from ltx_core.guidance.perturbations import (
    BatchedPerturbationConfig,
    Perturbation,
    PerturbationConfig,
    PerturbationType,
)
from ltx_core.model.transformer import attention, rope, transformer
from ltx_core.model.transformer.attention import AttentionFunction
from ltx_core.model.transformer.modality import Modality
from ltx_core.model.transformer.model import LTXModel, X0Model

import bitfuse
from bitfuse.hosts import ltx_core, ltx_core_block
from bitfuse.hosts.patch import Site
from bitfuse.ops.gated_residual import GATED_RESIDUAL
from bitfuse.ops.interleaved_rotary import INTERLEAVED_PER_OP
from bitfuse.ops.rms_norm_modulate import RMS_NORM_MODULATE_NATIVE
from bitfuse.ops.split_rotary import SPLIT_PER_OP

SEAMS = ltx_core_block.ops is not None
VIDEO, AUDIO, TEXT = 24, 5, 7  # tokens
LAYERS = 2
WIDTH = 128
KINDS = {
    "2.0": {},
    "2.3": {"apply_gated_attention": True, "cross_attention_adaln": True},
    "interleaved": {"rope_type": rope.LTXRopeType.INTERLEAVED},
}
BETWEEN = ("audio_to_video_norm", "video_to_audio_norm")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def make(kind="2.0", layers=LAYERS, device="cpu", dtype=torch.bfloat16):
    torch.manual_seed(3)
    accepted = inspect.signature(LTXModel.__init__).parameters
    model = LTXModel(
        **({"attention_type": AttentionFunction.PYTORCH} if "attention_type" in accepted else {}),
        **{
            "num_attention_heads": 4,
            "attention_head_dim": WIDTH // 4,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": layers,
            "cross_attention_dim": WIDTH,
            "audio_num_attention_heads": 4,
            "audio_attention_head_dim": WIDTH // 4,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_cross_attention_dim": WIDTH,
            "rope_type": rope.LTXRopeType.SPLIT,
            **KINDS[kind],
        },
    )
    for p in model.parameters():  # tables are made empty
        p.copy_(torch.randn(p.shape) * (0.5 if p.ndim == 1 else p.shape[-1] ** -0.5))
    return model.to(device, dtype).eval()


def feed(device="cpu", dtype=torch.bfloat16, batch=1, masked=False, perturbed=(), enabled=(True, True)):
    generator = torch.Generator().manual_seed(4)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    def modality(tokens, dims, enabled):
        start = torch.arange(tokens, dtype=torch.float32).expand(batch, dims, tokens)
        positions = torch.stack([start, start + 1], dim=-1).to(device)
        mask = (torch.arange(TEXT).expand(batch, TEXT) < TEXT - 2).long() if masked else None
        return Modality(
            latent=randn(batch, tokens, 8),
            sigma=torch.full((batch,), 0.7, device=device, dtype=dtype),
            timesteps=torch.full((batch, tokens), 0.7, device=device, dtype=dtype),
            positions=positions,
            context=randn(batch, TEXT, WIDTH),
            enabled=enabled,
            context_mask=None if mask is None else mask.to(device),
        )

    video, audio = modality(VIDEO, 3, enabled[0]), modality(AUDIO, 1, enabled[1])
    several = [PerturbationConfig([Perturbation(kind, None) for kind in of]) for of in perturbed or [()] * batch]
    sizes = (LAYERS, device, dtype) if SEAMS else ()  # later versions make the masks at once
    return video, audio, BatchedPerturbationConfig(several, *sizes)


def attributes(model):
    """Every attribute of every module, and its class."""
    found = {}
    for name, module in model.named_modules():
        found[name, "__class__"] = type(module)
        found |= {(name, key): value for key, value in vars(module).items() if not key.startswith("_")}
    for name in ("video_args_preprocessor", "audio_args_preprocessor"):
        simple = getattr(getattr(model, name), "simple_preprocessor", getattr(model, name))
        found[name, "class of the preprocessor"] = type(simple)
    return found


def assert_same(expected, found):
    assert {i: bitfuse.compare(a, b) for i, (a, b) in enumerate(zip(expected, found, strict=True))} == {
        0: None,
        1: None,
    }


# -- the same bits -----------------------------------------------------------------------------------------------------

STG = PerturbationType.SKIP_VIDEO_SELF_ATTN
CALLS = {
    "one sample": {},
    "batch 2": {"batch": 2},
    "a masked text": {"batch": 2, "masked": True},
    "all samples perturbed": {"perturbed": [(STG,)]},
    "one sample of two perturbed": {"batch": 2, "perturbed": [(STG,), ()]},
    "no attention between the streams": {
        "perturbed": [(PerturbationType.SKIP_A2V_CROSS_ATTN, PerturbationType.SKIP_V2A_CROSS_ATTN)]
    },
    "one sample of two without audio to video": {
        "batch": 2,
        "perturbed": [(PerturbationType.SKIP_A2V_CROSS_ATTN,), ()],
    },
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_streams_are_equal_and_what_is_called_is_fused(kind, call, device):
    model, inputs = make(kind, device=device), feed(device, **CALLS[call])
    expected = model(*inputs)
    handle = bitfuse.accelerate(model)
    for _ in range(2):
        assert_same(expected, model(*inputs))
    assert [site.declined for site in handle.sites if site.declined] == []
    assert {site.name: dict(site.fallen) for site in handle.sites if site.fallen} == {}
    silent = {site.name.split(".", 2)[2] for site in handle.sites if not site.fused}
    if call == "one sample":
        assert silent == set()
        assert handle.report().fused == handle.report().seen == (48 if kind == "2.3" else 32)
    left_out = {"attn1"} if call == "all samples perturbed" else set()
    left_out |= {"audio_to_video_attn", "video_to_audio_attn"} if call.startswith("no attention") else set()
    gates = {f"{name}.gate" for name in left_out} if call.startswith("no attention") else set()
    assert silent <= left_out | gates | (set(BETWEEN) if call.startswith("no attention") else set())
    handle.restore()
    assert_same(expected, model(*inputs))


def test_a_disabled_stream(device):
    model = make(device=device)
    for enabled in ((True, False), (False, True)):
        inputs = feed(device, enabled=enabled)
        expected = model(*inputs)
        with bitfuse.accelerated(model):
            assert_same(expected, model(*inputs))


def test_an_x0_model_and_its_transformer_are_one(device):
    model = make(layers=1, device=device)
    inputs = feed(device)
    expected = model(*inputs)
    handle = bitfuse.accelerate(X0Model(model))
    assert bitfuse.accelerate(model) is handle
    assert_same(expected, model(*inputs))
    assert handle.report().fused
    assert handle.report().host == ltx_core.NAME
    handle.restore()


def test_rotary_tables_are_computed_once(device, monkeypatch):
    from ltx_core.model.transformer import transformer_args

    model, inputs = make(layers=1, device=device), feed(device)
    computed, stock = [], transformer_args.precompute_freqs_cis
    monkeypatch.setattr(transformer_args, "precompute_freqs_cis", lambda *a, **k: computed.append(1) or stock(*a, **k))
    with bitfuse.accelerated(model):
        model(*inputs)
        first = len(computed)
        assert first > 0
        model(*inputs)
        assert len(computed) == first
        inputs[0].positions.add_(1.0)
        model(*inputs)
        assert len(computed) > first


# -- nothing is changed for good ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_restore_puts_every_attribute_back(kind):
    model = make(kind)
    before, keys = attributes(model), list(model.state_dict())
    handle = bitfuse.accelerate(model)
    assert attributes(model) != before
    assert list(model.state_dict()) == keys
    handle.restore()
    assert attributes(model) == before


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_a_copy_of_an_accelerated_model_is_a_stock_model(copied):
    model = make("2.3", layers=1)
    try:
        copied(model)
    except pickle.PicklingError as error:
        pytest.skip(f"this ltx-core's own model can't be pickled: {error}")
    with bitfuse.accelerated(model):
        other = copied(model)
    types = {type(module).__module__ for module in other.modules()}
    assert not [name for name in types if name.startswith("bitfuse")]
    assert_same(model(*feed()), other(*feed()))


def test_options_that_it_has_not_and_other_targets():
    model = make(layers=1)
    with pytest.raises(ValueError, match="keep_text is True; accepted for an ltx-core model: False"):
        bitfuse.accelerate(model, keep_text=True)
    with pytest.raises(TypeError, match="or an ltx-core LTXModel or X0Model"):
        bitfuse.accelerate(torch.nn.Linear(1, 1))


# -- its own code, and why ---------------------------------------------------------------------------------------------


def _reasons(model, inputs):
    """Every reason of an accelerated model, whose output is stock's all the same."""
    expected = model(*inputs)
    with bitfuse.accelerated(model) as handle:
        assert_same(expected, model(*inputs))
        return {reason for site in handle.sites for reason in site.reasons}


def test_a_source_that_was_not_read_is_left_alone(monkeypatch):
    def another(q, k, *args):
        return rope.apply_split_rotary_emb(q, k, *args)

    model = make(layers=1)
    monkeypatch.setitem(ltx_core._READ, "apply_split_rotary_emb", {"0" * 16})
    monkeypatch.setitem(ltx_core_block._READ, "BasicAVTransformerBlock.forward", {"0" * 16})
    reasons = _reasons(model, feed())
    assert any(
        re.match(r"apply_split_rotary_emb of ltx-core .* is not a source that bitfuse knows", r) for r in reasons
    )
    assert any(re.match(r"BasicAVTransformerBlock.forward of ltx-core .* is not a source", r) for r in reasons)


def test_a_function_that_is_replaced_afterwards_is_called(monkeypatch):
    model, inputs = make(layers=1), feed()
    with bitfuse.accelerated(model) as handle:
        model(*inputs)
        stock = utils.rms_norm
        monkeypatch.setattr(transformer, "rms_norm", lambda x, *a, **k: 2 * stock(x, *a, **k), raising=False)
        found = model(*inputs)
        reasons = {reason for site in handle.sites for reason in site.fallen}
    assert "a function of the block was replaced meanwhile" in reasons
    assert_same(model(*inputs), found)


def test_hooks_are_called_and_norms_with_hooks_too():
    model, inputs = make(layers=1), feed()
    expected = model(*inputs)
    called = []
    block = model.transformer_blocks[0]
    for module in (block, block.attn1, block.attn1.q_norm, block.ff):
        module.register_forward_hook(lambda module, args, output: called.append(module))
    with bitfuse.accelerated(model) as handle:
        assert_same(expected, model(*inputs))
        fallen = {site.name: list(site.fallen) for site in handle.sites if site.fallen}
    assert set(map(id, called)) == set(map(id, (block, block.attn1, block.attn1.q_norm, block.ff)))
    assert fallen == {
        "transformer_blocks.0.attn1": ["a hook is attached to q_norm, which is not called when it is fused"]
    }


def test_gradients_are_the_host_s_own():
    model, inputs = make(layers=1, dtype=torch.float32), feed(dtype=torch.float32)

    def trained():
        with torch.enable_grad():
            sum(out.square().sum() for out in model(*inputs)).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return gradients

    expected = trained()
    with bitfuse.accelerated(model):
        found = trained()
    assert len(expected) > 10
    assert {name: bitfuse.compare(expected[name], found[name]) for name in expected} == dict.fromkeys(expected)


# -- the references are the host's own functions ----------------------------------------------------------------------

BATTERIES = {
    "split rotary": (SPLIT_PER_OP, lambda x, cos, sin: rope.apply_split_rotary_emb(x, cos, sin)),
    "interleaved rotary": (INTERLEAVED_PER_OP, lambda x, cos, sin: rope.apply_interleaved_rotary_emb(x, cos, sin)),
    "norm and modulation": (
        RMS_NORM_MODULATE_NATIVE,
        lambda x, scale, shift, scale_table, shift_table, eps: (
            utils.rms_norm(x, eps=eps) * (1 + (scale_table + scale)) + (shift_table + shift)
        ),
    ),
    "gate": (GATED_RESIDUAL, lambda x, y, gate, table, mask: x + y * (table + gate) if mask is None else None),
}


@pytest.mark.parametrize("name", BATTERIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_references_are_the_host_s_own_functions(name, dtype):
    operator, host = BATTERIES[name]
    case = next(c for c in operator.cases if c.name == "small" or c.name == "head size 96")
    args = tuple(a.to(dtype) if isinstance(a, torch.Tensor) else a for a in case.arguments("cpu", tokens=9))
    for family, inputs in operator.battery(*args):
        assert bitfuse.compare(host(*inputs), operator.reference(*inputs)) is None, family


def test_callables_keep_to_the_protocols_of_the_seams():
    """ltx-core calls them by position, and takes a list from `post_sa_function` (1.1.4 to 1.2.0)."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    x, y, scale, shift, gate = (randn(2, 9, WIDTH) for _ in range(5))
    site = Site("a seam", "of a test")
    found = ltx_core_block.AdaZero(site, None)(x, 1e-6, scale, shift)
    assert bitfuse.compare(utils.rms_norm(x, eps=1e-6) * (1 + scale) + shift, found) is None
    found = ltx_core_block.PostSA(site, None)(x, y, None, 1e-6, gate)
    assert type(found) is list
    assert bitfuse.compare((x + y * gate, utils.rms_norm(x + y * gate, eps=1e-6)), tuple(found)) is None
    assert (site.fused, site.fallen) == (2, {})
    weight = randn(WIDTH)
    own = ltx_core_block.PostSA(site, lambda *given: given)
    assert own(x, y, weight, 1e-6, gate) == (x, y, weight, 1e-6, gate)
    assert list(site.fallen) == ["its norm has a weight; accepted: norms without"]
    assert copy.deepcopy(own)(1) == (1,)


def test_an_unknown_forward_still_gets_its_seams_filled(monkeypatch):
    if not SEAMS:
        pytest.skip("this ltx-core has no seams")
    monkeypatch.setitem(ltx_core_block._READ, "BasicAVTransformerBlock.forward", {"0" * 16})
    model, inputs = make("2.3"), feed()
    expected = model(*inputs)
    with bitfuse.accelerated(model) as handle:
        assert_same(expected, model(*inputs))
        seams = [site for site in handle.sites if site.name.endswith("_function")]
    assert {site.state for site in seams} == {"fused"}
    assert len(seams) == 2 * LAYERS


def test_a_seam_that_somebody_else_has_filled_is_left_alone(monkeypatch):
    if not SEAMS:
        pytest.skip("this ltx-core has no seams")
    model, inputs = make("2.3"), feed()
    block, stock = model.transformer_blocks[0], model.transformer_blocks[0].ada_zero_function
    block.ada_zero_function = lambda *given: stock(*given)
    reasons = _reasons(model, inputs)
    assert any(re.match(r"its ada_zero_function is a builtins.function, not ltx-core's own", r) for r in reasons)


def test_the_restated_attention_is_the_host_s(monkeypatch):
    """With both callables at the host's own chain: only the restated forward is new."""
    if SEAMS:
        pytest.skip("this ltx-core has seams; its attention is not restated")
    model, inputs = make("2.3"), feed(batch=2, perturbed=[(STG,), ()])
    expected = model(*inputs)
    bitfuse.disable()
    try:
        with bitfuse.accelerated(model):
            assert {type(m) for m in model.modules() if isinstance(m, attention.Attention)} == {ltx_core.Attention}
            assert_same(expected, model(*inputs))
    finally:
        bitfuse.enable()
