"""The real ltx-core (1.0.0 in CI), stock against accelerated: the same bits, or its own code for a reason."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from types import ModuleType, SimpleNamespace

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
from ltx_core.model.transformer.model import LTXModel, LTXModelType, X0Model

import bitfuse
from bitfuse.hosts import ltx_core, part
from bitfuse.hosts.code import source_hash
from bitfuse.hosts.handle import Handle
from bitfuse.hosts.site import Site
from bitfuse.ops.rope import split_rotary_per_op
from bitfuse.run.swap import ours_in

SEAMS = ltx_core.ops is not None
VIDEO, AUDIO, TEXT = 24, 5, 7  # tokens
LAYERS = 2
WIDTHS = 256, 128  # of video and audio
KINDS = {
    "2.0": {},
    "2.3": {"apply_gated_attention": True, "cross_attention_adaln": True},
    "interleaved": {"rope_type": rope.LTXRopeType.INTERLEAVED},
    "video only": {"model_type": LTXModelType.VideoOnly},
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
            "attention_head_dim": WIDTHS[0] // 4,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": layers,
            "cross_attention_dim": WIDTHS[0],
            "audio_num_attention_heads": 4,
            "audio_attention_head_dim": WIDTHS[1] // 4,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_cross_attention_dim": WIDTHS[1],
            "rope_type": rope.LTXRopeType.SPLIT,
            **KINDS[kind],
        },
    )
    for p in model.parameters():  # tables are made empty
        p.copy_(torch.randn(p.shape) * (0.5 if p.ndim == 1 else p.shape[-1] ** -0.5))
    return model.to(device, dtype).eval()


def feed(device="cpu", dtype=torch.bfloat16, batch=1, masked=False, perturbed=(), enabled=(True, True), audio=True):
    generator = torch.Generator().manual_seed(4)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    def modality(tokens, dims, width, enabled):
        start = torch.arange(tokens, dtype=torch.float32).expand(batch, dims, tokens)
        positions = torch.stack([start, start + 1], dim=-1).to(device)
        noise = torch.linspace(0.1, 0.9, tokens).expand(batch, tokens)  # another for each token
        text = (torch.arange(TEXT).expand(batch, TEXT) < TEXT - 2).long().to(device)
        seen = torch.rand(batch, tokens, tokens, generator=generator).to(device)
        return Modality(
            latent=randn(batch, tokens, 8),
            sigma=torch.full((batch,), 0.7, device=device, dtype=dtype),
            timesteps=noise.to(device, dtype),
            positions=positions,
            context=randn(batch, TEXT, width),
            enabled=enabled,
            context_mask=text if masked else None,
            attention_mask=seen if masked else None,
        )

    modalities = modality(VIDEO, 3, WIDTHS[0], enabled[0]), modality(AUDIO, 1, WIDTHS[1], enabled[1]) if audio else None
    several = [PerturbationConfig([Perturbation(kind, None) for kind in of]) for of in perturbed or [()] * batch]
    at_once = "num_blocks" in inspect.signature(BatchedPerturbationConfig.__init__).parameters  # from 1.1.7 on
    sizes = (LAYERS, device, dtype) if at_once else ()
    return *modalities, BatchedPerturbationConfig(several, *sizes)


def assert_same(expected, found):
    assert len(expected) == len(found) == 2
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs is None) == (ours is None)
        assert theirs is None or bitfuse.compare(theirs, ours) is None


# -- the same bits -----------------------------------------------------------------------------------------------------

STG = PerturbationType.SKIP_VIDEO_SELF_ATTN
CALLS = {
    "one sample": {},
    "batch 2": {"batch": 2},
    "masks of text and tokens": {"batch": 2, "masked": True},
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


def _launches():
    """Each kind of model and of call: some by kernels, which take seconds, the others by references in their place."""
    calls = [(kind, call) for kind in ("2.0", "2.3") for call in CALLS] + [("interleaved", "one sample")]
    for kind, call in calls:
        real = call == "one sample" or (kind, call) == ("2.0", "masks of text and tokens") or torch.cuda.is_available()
        yield pytest.param(kind, call, "kernels", marks=() if real else pytest.mark.slow)
        if not real:
            yield pytest.param(kind, call, "references")


@pytest.mark.parametrize(("kind", "call", "launched"), list(_launches()))
def test_both_streams_are_equal_and_what_is_called_is_fused(kind, call, launched, device, request):
    if launched == "references":
        request.getfixturevalue("launched_as_reference")
    model = make(kind, LAYERS if call == "one sample" else 1, device)
    inputs = feed(device, **CALLS[call])
    expected = model(*inputs)
    handle = bitfuse.accelerate(model)
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


@pytest.mark.usefixtures("launched_as_reference")
def test_a_disabled_stream(device):
    model = make(device=device)
    for enabled in ((True, False), (False, True)):
        inputs = feed(device, enabled=enabled)
        expected = model(*inputs)
        with bitfuse.accelerated(model):
            assert_same(expected, model(*inputs))


@pytest.mark.usefixtures("launched_as_reference")
def test_a_model_without_audio(device):
    model, inputs = make("video only", layers=1, device=device), feed(device, audio=False)
    expected = model(*inputs)
    with bitfuse.accelerated(model, strict=True) as handle:
        assert_same(expected, model(*inputs))
        assert [site.name.split(".")[2] for site in handle.sites] == [
            "attn1",
            "attn2",
            "norm1",
            "norm2",
            "norm3",
            "output",
        ]
        assert {site.state for site in handle.sites} == {"fused"}


@pytest.mark.usefixtures("launched_as_reference")
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


@pytest.mark.usefixtures("launched_as_reference")
def test_the_grid_of_frequencies_is_made_once_and_the_tables_are_those_of_the_positions(device, monkeypatch):
    from ltx_core.model.transformer import transformer_args

    model, inputs = make(layers=1, device=device), feed(device)
    grids, stock = [], transformer_args.precompute_freqs_cis

    def noted(*args, **kwargs):
        grids.append(kwargs["freq_grid_generator"](10000.0, 3, 64).data_ptr())
        return stock(*args, **kwargs)

    monkeypatch.setattr(transformer_args, "precompute_freqs_cis", noted)
    with bitfuse.accelerated(model):
        model(*inputs)
        assert len(grids) > 1
        assert len(set(grids)) == 1
        inputs[0].positions.data.add_(1.0)  # PyTorch counts no version for this
        found = model(*inputs)
    assert_same(model(*inputs), found)


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("kind", ["2.0", "video only"])
def test_the_feed_forwards_activate_in_place(kind, device):
    model = make(kind, device=device)
    given = feed(device, audio=kind != "video only")
    expected = model(*given)
    handle = bitfuse.accelerate(model)
    block = model.transformer_blocks[0]
    activation, addresses = block.ff.net[0], []
    forward = type(activation.proj).forward

    def noted(self, x):
        out = forward(self, x)
        if self is activation.proj:
            addresses.append(out.data_ptr())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(activation.proj), "forward", noted)
        out = activation(torch.randn(1, 3, WIDTHS[0], device=device, dtype=torch.bfloat16))
    assert out.data_ptr() == addresses[0]
    assert_same(expected, model(*given))
    assert [str(extra.name) for extra in handle.report().not_used] == []


def test_where_its_activation_was_not_read_the_report_says_so(monkeypatch):
    monkeypatch.setitem(ltx_core.READ, "GELUApprox.forward", {"0" * 16})
    handle = bitfuse.accelerate(make())
    (extra,) = handle.report().not_used
    ((reason, count),) = extra.reasons.items()
    assert (extra.name, count) == ("GELU in place", 2 * LAYERS)
    assert "GELUApprox.forward" in reason


# -- copies and options ------------------------------------------------------------------------------------------------


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.usefixtures("launched_as_reference")
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
    with pytest.raises(TypeError, match="or an ltx-core LTXModel or X0Model or video decoder"):
        bitfuse.accelerate(torch.nn.Linear(1, 1))


@pytest.mark.usefixtures("launched_as_reference")
def test_a_model_can_be_taken_over_before_it_has_its_weights(device):
    """As ltx-core's builders do: module operations run on a model of the meta device, which then gets its weights."""
    model, inputs = make(layers=1, device=device), feed(device)
    expected = model(*inputs)
    with torch.device("meta"):
        empty = copy.deepcopy(model).to("meta")
    handle = bitfuse.accelerate(empty, strict=True)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert_same(expected, empty(*inputs))
    assert {site.state for site in handle.sites} == {"fused"}


@pytest.mark.usefixtures("launched_as_reference")
def test_strict_require_and_audit_work_here_too(device):
    model, inputs = make(layers=1, device=device), feed(device)
    expected = model(*inputs)
    with bitfuse.accelerated(model, strict=True, audit=1, require=["*.attn1", "gated_residual"]) as handle:
        assert_same(expected, model(*inputs))
        audit = handle.report().as_dict()["audit"]
    assert (audit["calls"], audit["mismatches"]) == (len(handle.sites), 0)
    model.transformer_blocks[0].attn1.q_norm.register_forward_hook(lambda *args: None)
    with bitfuse.accelerated(model, require=["*.attn1"]), pytest.raises(bitfuse.NotFused, match="attn1: a hook is"):
        model(*inputs)


# -- its own code, and why ---------------------------------------------------------------------------------------------


def _reasons(model, inputs):
    """Every reason of an accelerated model, whose output is stock's all the same."""
    expected = model(*inputs)
    with bitfuse.accelerated(model) as handle:
        assert_same(expected, model(*inputs))
        return {reason for site in handle.sites for reason in site.reasons}


@pytest.mark.usefixtures("launched_as_reference")
def test_a_source_that_was_not_read_is_left_alone(monkeypatch):
    model = make(layers=1)
    monkeypatch.setitem(ltx_core.READ, "apply_split_rotary_emb", {"0" * 16})
    monkeypatch.setitem(ltx_core.READ, "BasicAVTransformerBlock.forward", {"0" * 16})
    reasons = _reasons(model, feed())
    assert any(
        re.match(r"apply_split_rotary_emb of ltx-core .* is not a source that bitfuse knows", r) for r in reasons
    )
    assert any(re.match(r"BasicAVTransformerBlock.forward of ltx-core .* is not a source", r) for r in reasons)


@pytest.mark.usefixtures("launched_as_reference")
def test_a_function_that_is_replaced_afterwards_is_called(monkeypatch):
    model, inputs = make(layers=1), feed()
    with bitfuse.accelerated(model) as handle:
        model(*inputs)
        stock = utils.rms_norm
        monkeypatch.setattr(transformer, "rms_norm", lambda x, *a, **k: 2 * stock(x, *a, **k), raising=False)
        found = model(*inputs)
        reasons = {reason for site in handle.sites for reason in site.fallen}
    assert {reason.partition(" was replaced")[0] for reason in reasons} == {f"{transformer.__name__}.rms_norm"}
    assert_same(model(*inputs), found)


@pytest.mark.usefixtures("launched_as_reference")
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


# -- seams -------------------------------------------------------------------------------------------------------------


_UNREPLACED = SimpleNamespace(why_stock=lambda kind: None, parts=0)  # a `Model` of which nothing was replaced


def test_callables_keep_to_the_protocols_of_the_seams():
    """ltx-core calls them by position, and takes a list from `post_sa_function` (1.1.4 to 1.2.0)."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    x, y, scale, shift, gate = (randn(2, 9, WIDTHS[0]) for _ in range(5))
    site = Site("a seam", "of a test")
    found = ltx_core.AdaZero(site, None, _UNREPLACED)(x, 1e-6, scale, shift)
    assert bitfuse.compare(utils.rms_norm(x, eps=1e-6) * (1 + scale) + shift, found) is None
    found = ltx_core.PostSA(site, None, _UNREPLACED)(x, y, None, 1e-6, gate)
    assert type(found) is list
    assert bitfuse.compare((x + y * gate, utils.rms_norm(x + y * gate, eps=1e-6)), tuple(found)) is None
    assert (site.fused, site.fallen) == (2, {})
    weight = randn(WIDTHS[0])
    own = ltx_core.PostSA(site, lambda *given: given, _UNREPLACED)
    assert own(x, y, weight, 1e-6, gate) == (x, y, weight, 1e-6, gate)
    assert list(site.fallen) == ["its norm has a weight; accepted: norms without"]
    assert copy.deepcopy(own)(1) == (1,)


class PytorchPreAttention:
    """These four: of the shape of ltx-core's own from 1.1.4 on, by its protocols."""

    def __call__(self, q, k, attn_module, mask, pe, k_pe):
        q, k = attn_module.q_norm(q), attn_module.k_norm(k)
        if pe is None:
            return q, k
        turn = rope.apply_rotary_emb
        return turn(q, pe, attn_module.rope_type), turn(k, pe if k_pe is None else k_pe, attn_module.rope_type)


class PytorchGatedAttention:
    def __call__(self, x, attn_out, attn_module):
        gates = 2.0 * torch.sigmoid(attn_module.to_gate_logits(x))
        return (attn_out.unflatten(2, (attn_module.heads, -1)) * gates.unsqueeze(-1)).flatten(2)


class PytorchAdaZeroFunction:
    def __call__(self, x, eps, scale, shift):
        return utils.rms_norm(x, eps=eps) * (1 + scale) + shift


class PytorchPostSAFunction:
    def __call__(self, x, y, norm_weights, eps, gate):
        x = x + y * gate
        return [x, utils.rms_norm(x, norm_weights, eps=eps)]


class SeamAttention(attention.Attention):
    def forward(self, x, context=None, mask=None, pe=None, k_pe=None):
        context = x if context is None else context
        q, k = self.preattention_function(self.to_q(x), self.to_k(context), self, mask, pe, k_pe)
        out = attention.PytorchAttention()(q, k, self.to_v(context), self.heads, mask)
        return self.to_out(self.gated_attention_function(x, out, self))


class SeamBlock(transformer.BasicAVTransformerBlock):
    def forward(self, x, values, pe, context):
        """Self-attention and attention to the text, all AdaLN values given."""
        shift, scale, gate = values.unbind(2)
        attended = self.attn1(self.ada_zero_function(x, self.norm_eps, scale, shift), pe=pe)
        x, n = self.post_sa_function(x, attended, None, self.norm_eps, gate)
        return x + self.attn2(n, context=context)


def later_rotary(input_tensor, cos_freqs, sin_freqs):
    return split_rotary_per_op(input_tensor, cos_freqs, sin_freqs)


@pytest.fixture
def with_seams(monkeypatch):
    """(a model of one block, its inputs: batch 2, tables of batch 1): an ltx-core with seams and an unknown forward."""
    if SEAMS:
        pytest.skip("this ltx-core has seams of its own, which are tested as they are")
    kinds = (PytorchPreAttention, PytorchGatedAttention, PytorchAdaZeroFunction, PytorchPostSAFunction)
    ops = ModuleType("ltx_core.model.transformer.ops")
    ops.rms_norm, ops.apply_rotary_emb = utils.rms_norm, rope.apply_rotary_emb
    vars(ops).update({kind.__name__: kind for kind in kinds})
    monkeypatch.setattr(part, "own", lambda owner, name: True)  # this test's functions are this ltx-core's own
    monkeypatch.setattr(rope, "apply_split_rotary_emb", later_rotary)
    monkeypatch.setattr(ltx_core, "ops", ops)
    monkeypatch.setattr(ltx_core, "_Attention", SeamAttention)
    monkeypatch.setattr(ltx_core, "_Block", SeamBlock)
    monkeypatch.setattr(transformer, "BasicAVTransformerBlock", SeamBlock)
    monkeypatch.setitem(ltx_core.READ, "apply_split_rotary_emb", {source_hash(later_rotary)})
    for kind in kinds:
        monkeypatch.setitem(ltx_core.READ, kind.__name__, {source_hash(kind.__call__)})
    block = make("2.3", layers=1).transformer_blocks[0]
    block.__class__, block.ada_zero_function, block.post_sa_function = SeamBlock, kinds[2](), kinds[3]()
    for name, attn in block.named_children():
        if "attn" in name:
            attn.__class__, attn.preattention_function, attn.gated_attention_function = (
                SeamAttention,
                kinds[0](),
                kinds[1](),
            )
    generator = torch.Generator().manual_seed(5)
    x, values, context = (
        torch.randn(2, *shape, WIDTHS[0], generator=generator).to(torch.bfloat16) for shape in ((9,), (9, 3), (TEXT,))
    )
    angles = torch.randn(1, 9, 4, WIDTHS[0] // 8, generator=generator).swapaxes(1, 2)
    return block, (x, values, tuple(t.to(torch.bfloat16) for t in (angles.cos(), angles.sin())), context)


def _transformer_of(block):
    model = torch.nn.Module()
    model.transformer_blocks = torch.nn.ModuleList([block])
    return model


def seam_attributes(block):
    return {(name, key): value for name, m in block.named_modules() for key, value in vars(m).items() if "func" in key}


def test_seams_are_filled_beside_a_forward_that_is_not_known(with_seams):
    block, inputs = with_seams
    expected, before = block(*inputs), seam_attributes(block)
    handle = Handle("a stand-in")
    ltx_core.accelerate(_transformer_of(block), handle)
    assert bitfuse.compare(expected, block(*inputs)) is None
    found = {site.name.split(".", 2)[2]: site for site in handle.sites}
    called = ("attn1", "attn1.gate", "attn2", "attn2.gate", "ada_zero_function", "post_sa_function")
    assert {name: (found[name].state, found[name].fused) for name in called} == dict.fromkeys(called, ("fused", 1))
    assert found["norm1"].declined.startswith("BasicAVTransformerBlock.forward of ltx-core")
    other = copy.deepcopy(block)
    assert {type(f).__module__ for f in seam_attributes(other).values()} == {__name__, attention.__name__}
    handle.restore()
    assert seam_attributes(block) == before
    assert type(block) is SeamBlock


def test_seams_of_somebody_else_are_left_alone(with_seams):
    """As blockwise FP8's: callables that hand other things to each other."""
    block, inputs = with_seams
    expected = block(*inputs)
    for seam in ltx_core.SEAMS:
        for owner in (block, block.attn1, block.attn2):
            if (stock := vars(owner).get(seam)) is not None:
                setattr(owner, seam, lambda *given, stock=stock: stock(*given))
    handle = Handle("a stand-in")
    ltx_core.accelerate(_transformer_of(block), handle)
    assert bitfuse.compare(expected, block(*inputs)) is None
    reasons = {site.name.split(".", 2)[2]: site.declined for site in handle.sites}
    for name in ("attn1", "attn1.gate", "attn2", "attn2.gate", "ada_zero_function", "post_sa_function"):
        assert re.match(r"its \w+_function is a builtins.function, not ltx-core's own", reasons[name])


def test_an_unknown_forward_still_gets_its_seams_filled(monkeypatch):
    if not SEAMS:
        pytest.skip("this ltx-core has no seams")
    monkeypatch.setitem(ltx_core.READ, "BasicAVTransformerBlock.forward", {"0" * 16})
    model, inputs = make("2.3"), feed()
    expected = model(*inputs)
    with bitfuse.accelerated(model) as handle:
        assert_same(expected, model(*inputs))
        seams = [site for site in handle.sites if site.name.endswith("_function")]
    assert {site.state for site in seams if "ada_zero" in site.name} == {"fused"}
    assert {site.state for site in seams} <= {"fused", "not called yet"}  # post_sa_function: called from 1.1.6 on
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
            forwards = {type(ours_in(m)) for m in model.modules() if isinstance(m, attention.Attention)}
            assert forwards == {ltx_core.Attention}
            assert_same(expected, model(*inputs))
    finally:
        bitfuse.enable()
