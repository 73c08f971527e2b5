"""diffusers' LTX-2 transformer: same bits in both streams, every site accounted for, and nothing left behind."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import re
import types
import weakref

import pytest
import torch

import bitfuse
from bitfuse.core import proof
from bitfuse.core.operator import Tier
from bitfuse.ops.qk_norm import QK_SPLIT_FP32
from bitfuse.ops.rope import SPLIT_FP32
from bitfuse.run.swap import COPIED_BY, ours_in, plain

diffusers = pytest.importorskip("diffusers", minversion="0.37")
upstream = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")

ATTENTIONS = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
BLOCK = (
    *("norm1", "audio_norm1", "norm2", "audio_norm2", "text", "audio_text", "audio_to_video_norm"),
    *("video_to_audio_norm", "norm3", "audio_norm3", "output", "audio_output"),
)
BETWEEN = {s for s in (*ATTENTIONS, *BLOCK) if "to_" in s} | {f"{s}.gate" for s in ATTENTIONS if "to_" in s}
LAYERS = 2
TINY = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "cross_attention_dim": 256,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 128,
    "num_layers": LAYERS,
    "caption_channels": 48,
    "in_channels": 16,
    "out_channels": 16,
    "audio_in_channels": 16,
    "audio_out_channels": 16,
}
V20 = {**TINY, "rope_type": "split"}
V23 = {
    **V20,
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
}
INTERLEAVED = {**TINY, "rope_type": "interleaved"}
V25 = {**V23, "use_prompt_adaln_single": False}  # the text's modulation does not depend on the timestep
CONFIGS = {"2.0": V20, "2.3": V23, "2.5": V25, "interleaved": INTERLEAVED}


def sites(config=V20):
    """(layer, site) of all that is taken over, in the report's order."""
    gates = ("", ".gate") if config.get("gated_attn") else ("",)
    attentions = [(i, attention + gate) for i in range(LAYERS) for attention in ATTENTIONS for gate in gates]
    texts = config.get("cross_attn_mod")
    return attentions + [(i, site) for i in range(LAYERS) for site in BLOCK if texts or "text" not in site]


def names(config=V20):
    return [f"transformer_blocks.{layer}.{site}" for layer, site in sites(config)]


# keyword arguments of a pass, and the sites that are not called in it; every other one is called once
PASSES = {
    "plain": ({}, set()),
    "modalities isolated": ({"isolate_modalities": True}, {(i, site) for i in range(LAYERS) for site in BETWEEN}),
}
GUIDED = {
    **PASSES,
    "guidance skips layer 1": ({"spatio_temporal_guidance_blocks": [1]}, {(1, "attn1"), (1, "audio_attn1")}),
    "guidance of one sample": ({"spatio_temporal_guidance_blocks": [1], "perturbation_mask": (0.0, 1.0)}, set()),
    "guidance by half": ({"spatio_temporal_guidance_blocks": [0, 1], "perturbation_mask": (0.5, 0.25)}, set()),
}


def make(config=V20, dtype=torch.bfloat16, device="cpu", seed=0):
    torch.manual_seed(seed)
    model = diffusers.LTX2VideoTransformer3DModel(**config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and modulation tables start as zeros and ones, which hide much
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(device=device, dtype=dtype).eval()


def feed(model, batch=2, **extra):
    """The arguments of a pass over 2 x 3 x 4 video tokens and 7 audio tokens."""
    generator = torch.Generator().manual_seed(7)
    parameter = next(model.parameters())

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(parameter)

    fed = {
        "hidden_states": randn(batch, 24, 16),
        "audio_hidden_states": randn(batch, 7, 16),
        "encoder_hidden_states": randn(batch, 9, 48),
        "audio_encoder_hidden_states": randn(batch, 9, 48),
        "timestep": torch.tensor([500.0, 250.0][:batch], device=parameter.device),
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "audio_num_frames": 7,
        "return_dict": False,
    }
    if model.config.cross_attn_mod:
        fed["sigma"] = fed["timestep"].clone()
    if "perturbation_mask" in extra:
        extra["perturbation_mask"] = torch.tensor(extra["perturbation_mask"]).to(parameter)
    return {**fed, **extra}


def run(model, **extra):
    core = getattr(model, "_orig_mod", model)
    with torch.no_grad():
        return model(**feed(core, **extra))


def assert_same(expected, found):
    assert [bitfuse.compare(a, b) for a, b in zip(expected, found, strict=True)] == [None] * len(expected)


def assert_differ(expected, found):
    assert any(bitfuse.compare(a, b) for a, b in zip(expected, found, strict=True))


def assert_fused(handle, passes=1, config=V20, but=()):
    """Every site of every layer was taken over and ran the kernel once a pass, and never anything else.

    but    names of sites that are looked at elsewhere
    """
    report = handle.report()
    assert [s.name for s in report.sites] == names(config)
    found = {s.name: (s.state, s.fused, s.reasons) for s in report.sites if s.name not in but}
    assert found == dict.fromkeys(found, ("fused", passes, []))
    assert len(found) == report.seen - len(but)
    if not but:
        assert report.fused == report.seen


def assert_fell_back(handle, cause, passes=1, only=None):
    """Every site, or `only` these, ran the PyTorch chain once a pass, for this cause."""
    found = [site for site in handle.report().sites if only is None or site.name in only]
    assert len(found) == (len(handle.sites) if only is None else len(only)) > 0
    for site in found:
        assert site.state == "fallen back", site
        assert (site.fused, sum(site.fallen.values())) == (0, passes)
        assert all(cause in reason for reason in site.reasons)


def assert_left_alone(handle, cause, only):
    """These sites, and no others, were not taken over, for this cause."""
    declined = [site for site in handle.report().sites if site.state == "left alone"]
    assert [site.name for site in declined] == list(only)
    assert all(cause in site.declined for site in declined)


def attention_sites(config=V20):
    return [n for n in names(config) if n.removesuffix(".gate").rpartition(".")[2] in ATTENTIONS]


def block_sites(config=V20):
    return [n for n in names(config) if n.rpartition(".")[2] in BLOCK]


def turned_sites():
    return [n for n in attention_sites() if "attn2" not in n]


# -- the same bits -------------------------------------------------------------------------------------------------


def _launches():
    """Each kind of model in each dtype: some by kernels, which take seconds, the others by references."""
    for config in CONFIGS:
        for dtype in (torch.bfloat16, torch.float32):
            real = config == "2.0" or (config != "2.5" and dtype is torch.bfloat16) or torch.cuda.is_available()
            yield pytest.param(config, dtype, "kernels", marks=() if real else pytest.mark.slow)
            if not real:
                yield pytest.param(config, dtype, "references")


@pytest.mark.parametrize(("config", "dtype", "launched"), list(_launches()), ids=str)
def test_both_streams_are_equal_and_every_site_is_fused(config, dtype, launched, device, request):
    if launched == "references":
        request.getfixturevalue("launched_as_reference")
    model = make(CONFIGS[config], dtype, device)
    passes = GUIDED if CONFIGS[config].get("perturbed_attn") else PASSES
    expected = {name: run(model, **kwargs) for name, (kwargs, *_) in passes.items()}
    handle = bitfuse.accelerate(model)
    calls = dict.fromkeys(sites(CONFIGS[config]), 0)
    assert [site.name for site in handle.sites] == names(CONFIGS[config])
    for name, (kwargs, skipped) in passes.items():
        assert_same(expected[name], run(model, **kwargs))
        calls = {site: count + (site not in skipped) for site, count in calls.items()}
        assert [site.fused + sum(site.fallen.values()) for site in handle.sites] == list(calls.values())
        fallen = {reason for site in handle.sites for reason in site.fallen}
        if dtype is torch.bfloat16:
            assert fallen == set()
        else:  # the norms and the head gate take half precision only, and say so
            assert all(" is torch.float32; accepted: torch.bfloat16" in reason for reason in fallen)
            assert {"output", "audio_output"} <= {s.name.split(".")[-1] for s in handle.sites if not s.fallen}
    handle.restore()
    assert_same(expected["plain"], run(model))
    assert [site.fused + sum(site.fallen.values()) for site in handle.sites] == list(
        calls.values()
    )  # nothing of ours was called any more


def test_a_pass_depends_on_what_is_varied(device):
    """The negative control of the test above: guidance, isolation and the seed all change the output."""
    model = make(V23, device=device)
    outputs = [run(model, **kwargs) for kwargs, *_ in GUIDED.values()]
    outputs.append(run(make(V23, device=device, seed=1)))
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert_differ(a, b)


@pytest.mark.usefixtures("launched_as_reference")
def test_a_self_attention_mask_changes_nothing_for_us(device):
    model = make(V20, device=device)
    mask = torch.ones(2, 24, 24, device=device)
    mask[:, :, 12:] = 0.5
    kwargs = {"video_self_attention_mask": mask.to(torch.bfloat16)}
    expected = run(model, **kwargs)
    assert_differ(run(model), expected)
    with bitfuse.accelerated(model) as handle:
        assert_same(expected, run(model, **kwargs))
        assert_fused(handle)


# -- nothing left behind -------------------------------------------------------------------------------------------


def _attributes(model):
    """Every attribute of every module by identity, and what the processors hold."""
    found = {}
    for name, module in model.named_modules():
        found[name, "__class__"] = id(type(module))
        for key, value in module.__dict__.items():
            if isinstance(value, dict) and key.startswith("_"):
                found |= {(name, key, k): id(v) for k, v in value.items()}
            found[name, key] = id(value)
        if hasattr(module, "processor"):
            found |= {(name, "processor", k): id(v) for k, v in vars(module.processor).items()}
            found[name, "processor.__dict__"] = id(module.processor.__dict__)
    return found


def _without_layer(name):
    return re.sub(r"^transformer_blocks\.\d+", "block", name)


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("config", ["2.0", "2.3"])
def test_restore_puts_every_attribute_back(config, device):
    model = make(CONFIGS[config], device=device)
    before, keys = _attributes(model), list(model.state_dict())
    handle = bitfuse.accelerate(model)
    assert list(model.state_dict()) == keys
    changed = {key for key, value in _attributes(model).items() if before.get(key) != value}
    assert {key[1] for key in changed} == {"forward", *COPIED_BY}
    touched = {_without_layer(key[0]) for key in changed}
    of_attentions = (f"block.{a}{norm}" for a in ATTENTIONS for norm in ("", ".norm_q", ".norm_k"))
    assert touched == {"", "block", "block.ff.net.0", "block.audio_ff.net.0", *of_attentions}
    run(model)
    assert_fused(handle, config=CONFIGS[config])
    handle.restore()
    handle.restore()  # once more does nothing
    assert _attributes(model) == before
    assert list(model.state_dict()) == keys


@pytest.fixture
def activation(device):
    """The first GELU of an accelerated model, an input for it, and what it gave before."""
    model = make(device=device)
    found = model.transformer_blocks[0].ff.net[0]
    x = torch.randn(1, 5, found.proj.in_features, device=device, dtype=found.proj.weight.dtype)
    with torch.no_grad():
        expected = found(x)
    with bitfuse.accelerated(model):
        yield found, x, expected


def _projected(activation, x, monkeypatch, keep=lambda t: None):
    """(address of what the GELU's projection gave, what the GELU made of it, what was kept of the former)"""
    addresses, kept, forward = [], [], torch.nn.Linear.forward

    def noted(self, x):
        given = forward(self, x)
        addresses.append(given.data_ptr())
        kept.append(keep(given))
        return given

    monkeypatch.setattr(torch.nn.Linear, "forward", noted)
    out = activation(x)
    return addresses[0], out, kept[0]


def test_the_feed_forward_activates_in_place(activation, monkeypatch):
    found, x, expected = activation
    with torch.no_grad():
        address, out, _ = _projected(found, x, monkeypatch)
    assert out.data_ptr() == address
    assert bitfuse.compare(expected, out) is None


KEEPING = {
    "it": lambda t: t,
    "a view of it": lambda t: t[:, 1:],
    "its detached self": torch.Tensor.detach,
    "its numbers": lambda t: t.view(torch.int16),
}


@pytest.mark.parametrize("how", KEEPING)
def test_what_a_wrapper_of_the_projection_keeps_is_not_written_into(how, activation, monkeypatch):
    found, x, expected = activation
    with torch.no_grad():
        wanted = KEEPING[how](found.proj(x)).clone()
        address, out, kept = _projected(found, x, monkeypatch, KEEPING[how])
    assert out.data_ptr() != address
    assert bitfuse.compare(wanted, kept) is None
    assert bitfuse.compare(expected, out) is None


def _watch(stack, found, how):
    """Something that may keep what the projection gives."""
    if how == "a hook":
        stack.callback(found.proj.register_forward_hook(lambda *args: None).remove)
    elif how == "a global hook":
        stack.callback(torch.nn.modules.module.register_module_forward_hook(lambda *args: None).remove)
    elif how == "a mode":
        stack.enter_context(_Passing())
    else:
        stack.enter_context(torch.enable_grad())


class _Passing(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("how", ["a hook", "a global hook", "a mode", "gradients"])
def test_a_projection_that_somebody_may_keep_is_not_written_into(how, activation, monkeypatch):
    found, x, expected = activation
    with torch.no_grad(), contextlib.ExitStack() as stack:
        _watch(stack, found, how)
        address, out, given = _projected(found, x, monkeypatch, lambda t: t)
    assert out.data_ptr() != address
    assert bitfuse.compare(found.proj(x).detach(), given.detach()) is None
    assert bitfuse.compare(expected, out.detach()) is None


@pytest.mark.usefixtures("launched_as_reference")
def test_accelerating_twice_gives_the_same_handle(device):
    model = make(device=device)
    handle = bitfuse.accelerate(model)
    assert bitfuse.accelerate(model) is handle
    assert bitfuse.accelerate(types.SimpleNamespace(components={"vae": None, "transformer": model})) is handle
    run(model)
    assert_fused(handle)
    handle.restore()
    again = bitfuse.accelerate(model)
    assert again is not handle
    run(model)
    assert_fused(again)


@pytest.mark.usefixtures("launched_as_reference")
def test_the_context_manager_restores_when_the_block_raises(device):
    model = make(device=device)
    before = _attributes(model)

    def interrupted():
        with bitfuse.accelerated(model) as handle:
            run(model)
            assert_fused(handle)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert _attributes(model) == before


def test_an_accelerated_model_can_be_freed():
    model = make()
    handle = bitfuse.accelerate(model)
    weak = weakref.ref(model)
    del model, handle
    gc.collect()
    assert weak() is None  # 19 billion parameters must not hang on a registry


@pytest.mark.usefixtures("launched_as_reference")
def test_somebody_elses_processor_survives_restore(device):
    model = make(device=device)
    handle = bitfuse.accelerate(model)
    theirs = upstream.LTX2AudioVideoAttnProcessor()
    model.transformer_blocks[0].attn1.set_processor(theirs)
    expected_sites = names()  # of the same class as the one that was there
    run(model)
    assert [site.name for site in handle.sites if site.fused] == expected_sites
    handle.restore()
    assert model.transformer_blocks[0].attn1.processor is theirs
    kinds = {type(m.processor) for m in model.modules() if hasattr(m, "processor")}
    assert kinds == {upstream.LTX2AudioVideoAttnProcessor}


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: _saved_and_loaded(m)], ids=["deepcopy", "torch.save"])
def test_a_copy_of_an_accelerated_model_is_a_plain_model(how, device):
    model = make(V23, device=device)
    expected = run(model)
    classes = [type(m) for m in model.modules()]
    handle = bitfuse.accelerate(model)
    twin = how(model)
    assert [type(m) for m in twin.modules()] == classes
    assert [m for m in twin.modules() if ours_in(m) or not plain(m)] == []
    assert_same(expected, run(twin))
    assert [site.fused for site in handle.sites] == [0] * len(handle.sites)  # its calls are not this handle's
    own = bitfuse.accelerate(twin)
    assert own is not handle
    assert_same(expected, run(twin))
    assert_fused(own, config=V23)
    own.restore()
    kinds = {type(m.processor) for m in twin.modules() if hasattr(m, "processor")}
    assert kinds == {upstream.LTX2PerturbedAttnProcessor}
    assert_same(expected, run(model))
    assert_fused(handle, config=V23)


def _saved_and_loaded(model):
    import io

    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# -- targets -------------------------------------------------------------------------------------------------------


class Pipeline:
    def __init__(self, **components):
        self.components = components


@pytest.mark.usefixtures("launched_as_reference")
def test_a_pipeline_is_found_by_its_components(device):
    first, second = make(device=device), make(V23, device=device)
    expected = run(first), run(second)
    handle = bitfuse.accelerate(Pipeline(vae=torch.nn.Identity(), transformer=first, scheduler=None, refiner=second))
    assert_same(expected[0], run(first))
    assert_same(expected[1], run(second))
    assert [site.name for site in handle.sites] == names() + names(V23)
    assert [site.state for site in handle.sites] == ["fused"] * len(names() + names(V23))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (None, "builtins.NoneType"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (Pipeline(vae=None), "test_diffusers.Pipeline"),
        (types.SimpleNamespace(components=None), "types.SimpleNamespace"),
        (types.SimpleNamespace(components=["transformer"]), "types.SimpleNamespace"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_another_target_is_a_type_error_that_names_it(target, name):
    with pytest.raises(TypeError, match="accepted: a diffusers LTX-2 pipeline or LTX2VideoTransformer3DModel") as e:
        bitfuse.accelerate(target)
    assert name in str(e.value)


# -- attention backends --------------------------------------------------------------------------------------------


def _backends(model):
    return {str(m.processor._attention_backend) for m in model.modules() if hasattr(m, "processor")}


@pytest.mark.usefixtures("launched_as_reference")
def test_an_attention_backend_set_before_is_kept(device):
    model = make(device=device)
    model.set_attention_backend("_native_math")
    expected = run(model)
    handle = bitfuse.accelerate(model)
    assert len(_backends(model)) == 1
    assert_same(expected, run(model))
    assert_fused(handle)
    handle.restore()
    assert _backends(model) == {str(diffusers.models.attention_dispatch.AttentionBackendName._NATIVE_MATH)}


@pytest.mark.usefixtures("launched_as_reference")
def test_an_attention_backend_set_meanwhile_works_and_stays(device, monkeypatch):
    model = make(device=device)
    used, dispatch = [], upstream.dispatch_attention_fn

    def spy(*args, **kwargs):
        used.append(str(kwargs["backend"]))
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(upstream, "dispatch_attention_fn", spy)
    handle = bitfuse.accelerate(model)
    model.set_attention_backend("_native_math")
    found, used_by_us = run(model), list(used)
    assert_fused(handle)
    handle.restore()
    backends = _backends(model)
    used.clear()
    assert_same(run(model), found)
    assert used == used_by_us
    assert backends == set(used)
    model.set_attention_backend("native")
    assert _backends(model) != backends


# -- hooks and offloading ------------------------------------------------------------------------------------------


def _watch_diffusers(model, seen):
    from diffusers.hooks import HookRegistry, ModelHook

    class Watch(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__name__)
            return args, kwargs

    for block in model.transformer_blocks:
        HookRegistry.check_if_exists_or_initialize(block.attn1).register_hook(Watch(), "watch")
        HookRegistry.check_if_exists_or_initialize(block).register_hook(Watch(), "watch")


def _watch_accelerate(model, seen):
    hooks = pytest.importorskip("accelerate.hooks")

    class Watch(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__name__)
            return args, kwargs

    for block in model.transformer_blocks:
        hooks.add_hook_to_module(block.attn1, Watch())
        hooks.add_hook_to_module(block, Watch())


def _watch_torch(model, seen):
    for block in model.transformer_blocks:
        for module in (block, block.attn1, block.attn1.to_q, block.audio_attn1.to_out[0], block.ff):
            module.register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))
            module.register_forward_hook(lambda module, args, out: seen.append(f"after {type(module).__name__}"))


def _watch_norms(model, seen, which):
    """Modules whose work is part of an operator: they must be called as before."""
    for block in model.transformer_blocks:
        norm = block.get_submodule(which)
        norm.register_forward_hook(lambda module, args, out: seen.append((which, type(module).__name__)))


def _replace_forward(model, seen, which):
    def wrapped(forward):
        def replaced(*args, **kwargs):
            seen.append(which)
            return forward(*args, **kwargs)

        return replaced

    for block in model.transformer_blocks:
        norm = block.get_submodule(which)
        norm.forward = wrapped(norm.forward)


WATCHED = {
    "diffusers": (_watch_diffusers, ()),
    "accelerate": (_watch_accelerate, ()),
    "torch": (_watch_torch, ()),
    **{
        f"{watch.__name__} of {which}": (functools.partial(watch, which=which), sites)
        for watch in (_watch_norms, _replace_forward)
        for which, sites in (
            ("attn1.norm_q", ["attn1"]),
            ("audio_attn2.norm_k", ["audio_attn2"]),
            ("norm1", BLOCK),
            ("audio_norm3", BLOCK),
            ("video_to_audio_norm", BLOCK),
        )
    },
}


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("how", WATCHED)
def test_hooks_keep_being_called(how, order, device):
    watch, not_fused = WATCHED[how]
    stock, seen_stock, model, seen = make(device=device), [], make(device=device), []
    watch(stock, seen_stock)
    expected = run(stock)
    if order == "before":
        watch(model, seen)
    handle = bitfuse.accelerate(model)
    if order == "after":
        watch(model, seen)
    assert_same(expected, run(model))
    not_fused = [name for name in names() if name.split(".", 2)[2] in not_fused]
    if not_fused:
        assert_fell_back(handle, "a hook is attached to", only=not_fused)
    assert_fused(handle, but=not_fused)
    assert len(seen) >= LAYERS
    assert seen == seen_stock
    handle.restore()
    assert_same(expected, run(model))
    assert len(seen) == 2 * len(seen_stock)


@pytest.mark.usefixtures("launched_as_reference")
def test_a_block_whose_forward_was_replaced_before_is_left_alone(device):
    """diffusers' and accelerate's own hooks do that, and ours goes inside them: see above. Anybody's else."""
    model, seen = make(device=device), []
    block = model.transformer_blocks[1]
    stock, expected = block.forward, run(model)
    block.forward = lambda *args, **kwargs: (seen.append(1), stock(*args, **kwargs))[1]
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert seen == [1]
    assert type(block) is upstream.LTX2VideoTransformerBlock
    assert_left_alone(handle, "forward", [n for n in block_sites() if ".1." in n])


@pytest.mark.usefixtures("launched_as_reference")
def test_a_norm_that_is_replaced_meanwhile_is_the_one_that_runs(device):
    model, stock = make(device=device), make(device=device)
    handle = bitfuse.accelerate(model)
    for m in (stock, model):
        m.transformer_blocks[0].norm2 = torch.nn.Identity()
    assert_same(run(stock), run(model))
    gone = [n for n in block_sites() if ".0." in n]
    assert_fell_back(handle, "norm2 is a torch.nn.modules.linear.Identity, not diffusers' RMSNorm", only=gone)
    assert_fused(handle, but=gone)


def _layerwise_casting(model):
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


def _group_offloading(model, level):
    from diffusers.hooks import apply_group_offloading

    extra = {"num_blocks_per_group": 1} if level == "block_level" else {}
    onload = next(model.parameters()).device
    apply_group_offloading(model, onload, torch.device("cpu"), offload_type=level, **extra)


def _cpu_offload(model):
    hooks = pytest.importorskip("accelerate")
    hooks.cpu_offload(model, next(model.parameters()).device)


OFFLOADING = {
    "layerwise casting": _layerwise_casting,
    "group offloading by block": functools.partial(_group_offloading, level="block_level"),
    "group offloading by leaf": functools.partial(_group_offloading, level="leaf_level"),
    "accelerate.cpu_offload": _cpu_offload,
}


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("how", OFFLOADING)
def test_offloading_and_casting_keep_working(how, order, device):
    stock, model = make(device=device), make(device=device)
    fed = feed(stock)
    OFFLOADING[how](stock)
    if order == "before":
        OFFLOADING[how](model)
    handle = bitfuse.accelerate(model)
    if order == "after":
        OFFLOADING[how](model)
    with torch.no_grad():
        assert_same(stock(**fed), model(**fed))
    not_fused = {site.name: site.reasons for site in handle.sites if site.fallen}
    assert all("a hook is attached to" in reason for reasons in not_fused.values() for reason in reasons)
    assert_fused(handle, but=[*not_fused])


# -- LoRA, training, compilation -----------------------------------------------------------------------------------


def _add_lora(model, dropout=0.0, seed=3):
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(seed)
    model.add_adapter(config, adapter_name="style")
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(torch.bfloat16)


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_is_applied(order, device):
    stock, model = make(device=device), make(device=device)
    bare = run(stock)
    _add_lora(stock)
    expected = run(stock)
    assert_differ(bare, expected)
    if order == "before":
        _add_lora(model)
    handle = bitfuse.accelerate(model)
    if order == "after":
        _add_lora(model)
    assert_same(expected, run(model))
    model.disable_adapters()
    assert_same(bare, run(model))
    model.enable_adapters()
    model.set_adapter("style")
    assert_same(expected, run(model))
    assert_fused(handle, 3)
    handle.restore()
    assert_same(expected, run(model))


def _trained(model, checkpointing=False):
    """Both outputs and every gradient of one training step."""
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    torch.manual_seed(11)  # dropout draws from it
    outputs = model(**feed(model))
    sum(out.float().square().sum() for out in outputs).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return [out.detach() for out in outputs], gradients


def _assert_same_training(expected, found):
    assert_same(expected[0], found[0])
    assert expected[1].keys() == found[1].keys()
    assert len(found[1]) > 10
    assert {name: bitfuse.compare(expected[1][name], found[1][name]) for name in found[1]} == dict.fromkeys(found[1])


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", ["2.0", "2.3"])
def test_training_gives_the_same_gradients(config, checkpointing, device):
    model = make(CONFIGS[config], torch.float32, device)
    expected = _trained(model, checkpointing)
    handle = bitfuse.accelerate(model)
    _assert_same_training(expected, _trained(model, checkpointing))
    assert_fell_back(handle, "a gradient is required", 2 if checkpointing else 1)
    run(model.eval())  # and inference is fused again, with the same handle: in fp32 what has no norm
    assert {site.fused for site in handle.sites if site.operator in ("gated_residual", "modulate")} == {1}


@pytest.mark.parametrize("config", ["2.0", "2.3"])
def test_lora_training_with_dropout_draws_the_same_numbers(config, device):
    """Dropout takes random numbers in the order of the projections, so we have to call them in the host's order."""
    model = make(CONFIGS[config], device=device)
    _add_lora(model, dropout=0.5)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    expected = _trained(model)
    handle = bitfuse.accelerate(model)
    _assert_same_training(expected, _trained(model))
    assert_fell_back(handle, "a gradient is required")


@pytest.mark.parametrize(
    ("config", "order", "backend"),
    [
        ("2.0", "compiled first", "eager"),
        pytest.param("2.0", "accelerated first", "aot_eager", marks=pytest.mark.slow),
        pytest.param("2.3", "accelerated first", "eager", marks=pytest.mark.slow),
    ],
)
def test_torch_compile_of_the_model(config, order, backend, device):
    """While PyTorch traces, the chain itself is in the graph: no graph break, and the bits of the compiled stock."""
    torch.compiler.reset()
    model = make({**CONFIGS[config], "num_layers": 1}, device=device)
    expected = run(torch.compile(model, fullgraph=True, backend=backend))
    torch.compiler.reset()
    if order == "compiled first":
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        handle = bitfuse.accelerate(compiled)
    else:
        handle = bitfuse.accelerate(model)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_same(expected, run(compiled))
    assert [site.name for site in handle.sites] == [n for n in names(CONFIGS[config]) if ".0." in n]
    assert {site.fused for site in handle.sites} == {0}  # the kernel is not in a graph that PyTorch compiles
    if backend == "eager":
        assert_same(run(model), run(compiled))


@pytest.mark.usefixtures("launched_as_reference")
def test_compile_repeated_blocks(device):
    torch.compiler.reset()
    model = make(device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert_same(expected, run(model))
    assert {site.fused for site in handle.sites} == {0}


# -- what is not known is left alone -------------------------------------------------------------------------------


@pytest.mark.usefixtures("launched_as_reference")
def test_a_processor_of_another_class_is_left_alone(device):
    class Theirs(upstream.LTX2AudioVideoAttnProcessor):
        calls = 0

        def __call__(self, *args, **kwargs):
            Theirs.calls += 1
            return super().__call__(*args, **kwargs)

    model = make(device=device)
    expected = run(model)
    theirs = Theirs()
    model.transformer_blocks[1].audio_attn1.set_processor(theirs)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert Theirs.calls == 1
    assert model.transformer_blocks[1].audio_attn1.processor is theirs
    assert_left_alone(handle, "Theirs, not one of diffusers' LTX-2 processors", ["transformer_blocks.1.audio_attn1"])
    assert_fused(handle, but=["transformer_blocks.1.audio_attn1"])


def _edited(original, calls):
    def apply_split_rotary_emb(x, freqs):
        calls.append(x.shape)
        return 2 * original(x, freqs)

    return apply_split_rotary_emb


def _wrapped(original, calls):
    @functools.wraps(original)  # which `inspect` looks through: the source it shows is the original's
    def wrapper(x, freqs):
        calls.append(x.shape)
        return 2 * original(x, freqs)

    return wrapper


def _sourceless(original, calls):
    scope = {"original": original, "calls": calls}
    code = "def apply_split_rotary_emb(x, freqs):\n    calls.append(x.shape)\n    return 2 * original(x, freqs)\n"
    exec(code, scope)
    return scope["apply_split_rotary_emb"]


def _not_a_function(original, calls):
    return functools.partial(_edited(original, calls))


PATCHES = [_edited, _wrapped, _sourceless, _not_a_function]


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("known_before", [False, True])
def test_a_patched_host_function_is_left_alone(patch, known_before, device, monkeypatch):
    model, calls = make(device=device), []
    before = run(model)
    if known_before:
        bitfuse.accelerate(model).restore()
    monkeypatch.setattr(upstream, "apply_split_rotary_emb", patch(upstream.apply_split_rotary_emb, calls))
    expected = run(model)
    assert_differ(before, expected)
    stock_calls = list(calls)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert calls == stock_calls * 2
    assert_left_alone(handle, "apply_split_rotary_emb of diffusers", attention_sites())
    assert_fused(handle, but=attention_sites())


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_patched_processor_class_is_left_alone(wrapped, device, monkeypatch):
    stock = upstream.LTX2AudioVideoAttnProcessor.__call__

    def call(self, *args, **kwargs):
        return 2 * stock(self, *args, **kwargs)

    model = make(device=device)
    before = run(model)
    call = functools.wraps(stock)(call) if wrapped else call
    monkeypatch.setattr(upstream.LTX2AudioVideoAttnProcessor, "__call__", call)
    expected = run(model)
    assert_differ(before, expected)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert_left_alone(handle, "LTX2AudioVideoAttnProcessor of diffusers", attention_sites())


@pytest.mark.usefixtures("launched_as_reference")
def test_a_source_that_was_not_read_is_left_alone(device, monkeypatch):
    from bitfuse.hosts import diffusers as adapter

    monkeypatch.setitem(adapter.READ, "LTX2PerturbedAttnProcessor", {"0" * 16})
    model = make(V23, device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert_left_alone(handle, "not a source that bitfuse knows", attention_sites(V23))


@pytest.mark.usefixtures("launched_as_reference")
def test_a_reference_that_is_not_the_hosts_is_left_alone(device, monkeypatch):
    from bitfuse.hosts import ltx2

    ltx2.rotary_difference.cache_clear()
    monkeypatch.setattr(SPLIT_FP32, "reference", bitfuse.OPERATORS["split_rotary_per_op"].reference)
    model = make(device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert_left_alone(handle, "part here: ", attention_sites())
    monkeypatch.undo()
    ltx2.rotary_difference.cache_clear()


def _mutant_in_place(monkeypatch):
    mutant = next(m for m in QK_SPLIT_FP32.mutants if m.name == "the sine's sign swapped")
    original = types.SimpleNamespace(tiers=QK_SPLIT_FP32.tiers)
    monkeypatch.setattr(QK_SPLIT_FP32, "tiers", (Tier("wrong", lambda *args: mutant.plan(original, *args)),))


def test_a_wrong_kernel_falls_back_and_says_where_it_differs(device, monkeypatch, fresh_routes):
    _mutant_in_place(monkeypatch)
    model = make(device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert_fell_back(handle, "differs at [", only=turned_sites())
    assert_fused(handle, but=turned_sites())
    assert "differs at [" in str(handle.report())


def test_a_wrong_kernel_that_slips_through_is_caught_on_the_first_call(device, monkeypatch, fresh_routes):
    """The negative control of the battery: with it out of the way, the live comparison still protects that call."""
    _mutant_in_place(monkeypatch)
    monkeypatch.setattr(proof, "run_battery", lambda *args: proof.Verdict(True, "equal"))
    model = make(device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert_fell_back(handle, "differs at [", only=turned_sites())
    assert_fused(handle, but=turned_sites())


def test_a_wrong_kernel_that_nothing_checks_gives_wrong_bits(device, monkeypatch, fresh_routes):
    """And with both out of the way the comparison of outputs fails: the tests above can fail."""
    _mutant_in_place(monkeypatch)
    monkeypatch.setattr(proof, "run_battery", lambda *args: proof.Verdict(True, "equal"))
    monkeypatch.setattr(proof, "compare_live", lambda *args: None)
    model = make(device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    assert_differ(expected, run(model))
    assert_fused(handle)


# -- the block, strict, options ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("launched_as_reference")
def test_a_block_whose_source_was_not_read_is_left_alone(device, monkeypatch):
    from bitfuse.hosts import diffusers as adapter

    monkeypatch.setitem(adapter.READ, "LTX2VideoTransformerBlock.forward", {"0" * 16})
    model = make(V23, device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert {type(block) for block in model.transformer_blocks} == {upstream.LTX2VideoTransformerBlock}
    assert_left_alone(handle, "LTX2VideoTransformerBlock.forward of diffusers", block_sites(V23))
    assert_fused(handle, config=V23, but=block_sites(V23))


@pytest.mark.usefixtures("launched_as_reference")
def test_a_block_of_another_class_is_left_alone(device):
    class Theirs(upstream.LTX2VideoTransformerBlock):
        def forward(self, *args, **kwargs):
            return tuple(2 * out for out in super().forward(*args, **kwargs))

    model = make(device=device)
    before = run(model)
    model.transformer_blocks[0].__class__ = Theirs
    expected = run(model)
    assert_differ(before, expected)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert_left_alone(handle, "Theirs, not diffusers' own", [n for n in block_sites() if ".0." in n])
    handle.restore()
    assert type(model.transformer_blocks[0]) is Theirs


@pytest.mark.usefixtures("launched_as_reference")
def test_a_block_takes_its_arguments_by_position(device):
    """As gradient checkpointing gives them."""
    model, calls = make(V23, device=device), []
    block = model.transformer_blocks[0]
    hook = block.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    run(model)
    hook.remove()
    args, kwargs = calls[0]
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    with torch.no_grad():
        expected = block(*args, **kwargs)
        with bitfuse.accelerated(model) as handle:
            assert_same(expected, block(*bound.args))
            assert_same(expected, block(**bound.arguments))
    assert {s.fused for s in handle.sites if ".0." in s.name} == {2}


@pytest.mark.parametrize("launched", ["references", pytest.param("kernels", marks=pytest.mark.slow)])
def test_batches_and_timesteps_of_every_token(launched, device, request):
    """An image-to-video pass gives every video token a timestep of its own."""
    if launched == "references":
        request.getfixturevalue("launched_as_reference")
    for config in (V20, V23):
        model = make(config, device=device)
        timestep = torch.full((2, 24), 500.0, device=device)
        timestep[:, :12] = 0
        image = {"timestep": timestep, "audio_timestep": torch.tensor([500.0, 250.0], device=device)}
        if config is V23:
            image |= {"sigma": image["audio_timestep"], "audio_sigma": image["audio_timestep"]}
        masks = {f"{n}encoder_attention_mask": torch.ones(2, 9, device=device) for n in ("", "audio_")}
        masks["encoder_attention_mask"][1, 5:] = 0
        passes = [image, masks, {"batch": 1}]
        expected = [run(model, **kwargs) for kwargs in passes]
        assert_differ(expected[0], run(model))
        assert_differ(expected[1], run(model))
        handle = bitfuse.accelerate(model)
        for kwargs, wanted in zip(passes, expected, strict=True):
            assert_same(wanted, run(model, **kwargs))
        assert_fused(handle, 3, config)


@pytest.mark.usefixtures("launched_as_reference")
def test_strict_raises_where_something_would_fall_back(device):
    model = make(device=device)
    expected = run(model)
    with bitfuse.accelerated(model, strict=True) as handle:
        assert_same(expected, run(model))
        assert_fused(handle)
        hook = model.transformer_blocks[1].norm1.register_forward_hook(lambda *args: None)
        with pytest.raises(bitfuse.NotFused, match=r"transformer_blocks\.1\.norm1: a hook is attached to norm1"):
            run(model)
        hook.remove()
        bitfuse.disable()
        try:
            with pytest.raises(bitfuse.NotFused, match=r"transformer_blocks\.0\.[a-z0-9]+: bitfuse is off"):
                run(model)
        finally:
            bitfuse.enable()
        assert_same(expected, run(model))
    assert_same(expected, run(model))


def test_strict_raises_where_a_site_is_left_alone_and_restores(device):
    model = make(device=device)
    model.transformer_blocks[1].attn2.set_processor(type("Theirs", (upstream.LTX2AudioVideoAttnProcessor,), {})())
    before = _attributes(model)
    with pytest.raises(bitfuse.NotFused, match=r"transformer_blocks\.1\.attn2: its processor is .*Theirs"):
        bitfuse.accelerate(model, strict=True)
    assert _attributes(model) == before
    bitfuse.accelerate(model).restore()


def test_other_options_than_those_in_force_are_an_error(device):
    model = make(device=device)
    handle = bitfuse.accelerate(model)
    with pytest.raises(ValueError, match=r"accelerated already, with strict=False.*given strict=True"):
        bitfuse.accelerate(model, strict=True)
    assert bitfuse.accelerate(model) is handle
    handle.restore()
    strict = bitfuse.accelerate(model, strict=True)
    assert bitfuse.accelerate(model, strict=True) is strict
    with pytest.raises(ValueError, match="given strict=False"):
        bitfuse.accelerate(model)


# -- what is kept from step to step --------------------------------------------------------------------------------


def _kept(model):
    """Every `Constant` of an accelerated model, by name."""
    ours = {name: ours_in(module) for name, module in model.named_modules()}
    found = {name: getattr(forward, "text", None) or getattr(forward, "kept", None) for name, forward in ours.items()}
    return {name: constant for name, constant in found.items() if constant is not None}


def _call(model, fed):
    with torch.no_grad():
        return model(**fed)


def _with_coords(model):
    fed = feed(model)
    device = fed["hidden_states"].device
    fed["video_coords"] = model.rope.prepare_video_coords(2, 2, 3, 4, device=device)
    fed["audio_coords"] = model.audio_rope.prepare_audio_coords(2, 7, device=device)
    return fed


def _prompt_in_place(model, fed):
    fed["encoder_hidden_states"].mul_(1.5)


def _prompt_replaced(model, fed):
    fed["encoder_hidden_states"] = fed["encoder_hidden_states"] * 1.5


def _coords_in_place(model, fed):
    fed["video_coords"].mul_(3)


def _coords_replaced(model, fed):
    fed["audio_coords"] = fed["audio_coords"] + 2


def _weight_in_place(model, fed):
    with torch.no_grad():
        model.transformer_blocks[0].attn2.to_k.weight.mul_(-1)


def _bias_in_place(model, fed):
    with torch.no_grad():
        model.caption_projection.linear_2.bias.add_(1)


def _weight_replaced(model, fed):
    linear = model.transformer_blocks[0].audio_attn2.to_v
    old = linear.weight.detach().clone()
    linear.weight = None  # its memory may be given out again, to the next tensor of that size
    linear.weight = torch.nn.Parameter(-old)


def _data_replaced(model, fed):
    weight = model.transformer_blocks[0].attn2.to_v.weight
    old = weight.detach().clone()
    weight.data = torch.empty(0, dtype=old.dtype, device=old.device)
    weight.data = -old


def _loaded(model, fed):
    state = {name: 1.25 * t for name, t in model.state_dict().items() if "attn2.to_k" in name}
    model.load_state_dict(state, strict=False)


def _theta(model, fed):
    model.rope.theta = 77.0


def _hook_on_a_projection(model, fed):
    model.transformer_blocks[0].attn2.to_k.register_forward_hook(lambda m, args, out: 2 * out)


CHANGES = [
    *(_prompt_in_place, _prompt_replaced, _coords_in_place, _coords_replaced, _weight_in_place, _bias_in_place),
    *(_weight_replaced, _data_replaced, _loaded, _theta, _hook_on_a_projection),
]


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_is_not_used_after_a_change(change, device):
    one_layer = {**V20, "num_layers": 1}
    stock, model = make(one_layer, device=device), make(one_layer, device=device)
    fed = [_with_coords(stock), _with_coords(model)]
    before = _call(stock, fed[0])
    bitfuse.accelerate(model, keep_text=True)
    for _ in range(2):
        assert_same(before, _call(model, fed[1]))
    kept = _kept(model)
    assert len(kept) == 2 + 2
    assert {name: (c.hits, c.misses) for name, c in kept.items()} == dict.fromkeys(kept, (1, 1))
    change(stock, fed[0])
    change(model, fed[1])
    expected = _call(stock, fed[0])
    assert_differ(before, expected)
    assert_same(expected, _call(model, fed[1]))
    assert_same(expected, _call(model, fed[1]))


@pytest.mark.usefixtures("launched_as_reference")
def test_two_prompts_in_turn_are_both_kept(device):
    model = make(device=device)
    fed = [_with_coords(model), _with_coords(model)]
    fed[1]["encoder_hidden_states"] = -fed[1]["encoder_hidden_states"]
    expected = [_call(model, f) for f in fed]
    assert_differ(*expected)
    bitfuse.accelerate(model, keep_text=True)
    for _ in range(3):
        for f, wanted in zip(fed, expected, strict=True):
            assert_same(wanted, _call(model, f))
    found = _kept(model)["caption_projection"]
    assert (found.hits, found.misses) == (4, 2)


@pytest.mark.usefixtures("launched_as_reference")
def test_what_is_kept_goes_with_its_prompt_and_on_restore(device):
    model = make(device=device)
    handle = bitfuse.accelerate(model, keep_text=True)
    fed = _with_coords(model)
    _call(model, fed)
    texts = _kept(model)
    assert len(texts) == 2 + 2 * LAYERS
    assert {name: len(c._kept) for name, c in texts.items()} == dict.fromkeys(texts, 1)
    del fed["encoder_hidden_states"]
    gc.collect()
    assert {n for n, c in texts.items() if c._kept} == {n for n in texts if "audio" in n}
    handle.restore()
    assert {n for n, c in texts.items() if c._kept} == set()


@pytest.mark.usefixtures("launched_as_reference")
def test_nothing_is_kept_in_inference_mode(device):
    model = make(device=device)
    fed = _with_coords(model)
    expected = _call(model, fed)
    handle = bitfuse.accelerate(model, keep_text=True)
    with torch.inference_mode():
        inside = _with_coords(model)
        for _ in range(2):
            assert_same(expected, model(**inside))
    assert_fused(handle, 2)
    assert {n for n, c in _kept(model).items() if c._kept or c.hits} == set()


def test_the_text_is_kept_only_where_asked_for(device):
    model = make(device=device)
    handle = bitfuse.accelerate(model)
    assert _kept(model) == {}
    handle.restore()
    bitfuse.accelerate(model, keep_text=True)
    assert len(_kept(model)) == 2 + 2 * LAYERS


def test_the_text_of_a_model_that_modulates_it_is_not_kept(device):
    model = make(V23, device=device)
    bitfuse.accelerate(model, keep_text=True)
    assert _kept(model) == {}


# -- the report ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_routes", "launched_as_reference")  # real kernels, run before, take another tier
def test_the_report_says_what_happened(device):
    model = make(device=device)
    handle = bitfuse.accelerate(model)
    assert {site.state for site in handle.sites} == {"not called yet"}
    with contextlib.ExitStack() as stack:
        bitfuse.disable()
        stack.callback(bitfuse.enable)
        run(model)
    assert_fell_back(handle, "bitfuse is off")
    run(model)
    assert {site.state for site in handle.sites} == {"partly fused"}
    found = handle.report().as_dict()
    assert found["host"] == f"diffusers {diffusers.__version__}"
    assert (found["sites_seen"], found["sites_fused"]) == (len(names()), 0)
    assert found["graphs"] == []
    assert found["sites"][0] == {
        "name": "transformer_blocks.0.attn1",
        "operator": "qk_rms_norm_split_rotary_fp32",
        "state": "partly fused",
        "calls_fused": 1,
        "calls_fallen_back": 1,
        "calls_compiling": 0,
        "reasons": ["bitfuse is off (BITFUSE=0 or bitfuse.disable())"],
        "tiers": ["single pass"],
    }
    text = str(handle.report()).splitlines()
    assert text[0] == f"0 of 32 sites fused in diffusers {diffusers.__version__}"
    assert len(text) == 1 + len(names()) // LAYERS  # layers are folded
    assert all(re.search(r"partly fused by .* \(2 calls fused, 2 not\): bitfuse is off", line) for line in text[1:])


@pytest.mark.usefixtures("launched_as_reference")
def test_a_host_function_patched_later_is_the_one_that_runs(device, monkeypatch):
    model = make(device=device)
    with bitfuse.accelerated(model) as handle:
        monkeypatch.setattr(upstream, "apply_split_rotary_emb", lambda x, freqs: x * 2)
        found = run(model)
        reasons = {reason for site in handle.sites for reason in site.reasons}
        assert [reason.partition(": ")[0] for reason in reasons] == ["apply_split_rotary_emb was replaced"]
    assert_same(run(model), found)


@pytest.mark.usefixtures("launched_as_reference")
def test_a_block_inside_an_acceleration_leaves_it_in_force(device):
    model = make(device=device)
    outer = bitfuse.accelerate(model)
    with bitfuse.accelerated(model) as inner:
        assert inner is outer
    run(model)
    assert_fused(outer)


@pytest.mark.usefixtures("launched_as_reference")
def test_an_unknown_kind_of_rotary_embedding_is_left_alone(device):
    model = make(device=device)
    attn = model.transformer_blocks[0].attn1
    attn.rope_type = "spiral"
    stock = attn.processor
    expected = run(model)
    with bitfuse.accelerated(model) as handle:
        assert attn.processor is stock
        assert handle.sites[0].reasons == ["its rope_type is 'spiral'; known: split, interleaved"]
        assert_same(expected, run(model))
        assert handle.report().fused == handle.report().seen - 1
