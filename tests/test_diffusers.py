"""diffusers' LTX-2 transformer: same bits in both streams, every site accounted for, and nothing left behind."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import types
import weakref

import pytest
import torch

import bitfuse
from bitfuse import proof
from bitfuse.contract import Tier
from bitfuse.ops.split_rotary import SPLIT_FP32

diffusers = pytest.importorskip("diffusers", minversion="0.37")
upstream = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")

SITES = ("attn1", "audio_attn1", "audio_to_video_attn", "video_to_audio_attn")
LAYERS = 2
ALL = LAYERS * len(SITES)
TINY = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "cross_attention_dim": 128,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 64,
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
CONFIGS = {"2.0": V20, "2.3": V23, "interleaved": INTERLEAVED}

# keyword arguments of a pass, and how many times each site of a block is called in it by layer
PASSES = {
    "plain": ({}, (2, 2, 2, 2), (2, 2, 2, 2)),
    "modalities isolated": ({"isolate_modalities": True}, (2, 2, 0, 0), (2, 2, 0, 0)),
}
GUIDED = {
    **PASSES,
    "guidance skips layer 1": ({"spatio_temporal_guidance_blocks": [1]}, (2, 2, 2, 2), (0, 0, 2, 2)),
    "guidance of one sample": (
        {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": (0.0, 1.0)},
        (2, 2, 2, 2),
        (2, 2, 2, 2),
    ),
    "guidance by half": (
        {"spatio_temporal_guidance_blocks": [0, 1], "perturbation_mask": (0.5, 0.25)},
        (2, 2, 2, 2),
        (2, 2, 2, 2),
    ),
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


def assert_fused(handle, calls_per_site=2):
    """Every site of every layer was taken over and ran the kernel, this many times, and never anything else."""
    report = handle.report()
    assert [s.name for s in report.sites] == [f"transformer_blocks.{i}.{n}" for i in range(LAYERS) for n in SITES]
    assert [(s.state, s.fused, s.reasons) for s in report.sites] == [("fused", calls_per_site, [])] * len(report.sites)
    assert report.fused == report.seen == LAYERS * len(SITES)


def assert_all_fell_back(handle, cause, calls_per_site=2):
    for site in handle.report().sites:
        assert site.state == "fallen back"
        assert (site.fused, sum(site.fallen.values())) == (0, calls_per_site)
        assert all(cause in reason for reason in site.reasons)


def assert_left_alone(handle, cause, count=ALL):
    declined = [site for site in handle.report().sites if site.state == "left alone"]
    assert len(declined) == count
    assert all(cause in site.declined for site in declined)


# -- the same bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
def test_both_streams_are_equal_and_every_site_is_fused(config, dtype, device):
    model = make(CONFIGS[config], dtype, device)
    passes = GUIDED if CONFIGS[config].get("perturbed_attn") else PASSES
    expected = {name: run(model, **kwargs) for name, (kwargs, *_) in passes.items()}
    handle = bitfuse.accelerate(model)
    calls = [0] * (LAYERS * len(SITES))
    for name, (kwargs, *per_layer) in passes.items():
        assert_same(expected[name], run(model, **kwargs))
        calls = [a + b for a, b in zip(calls, sum(per_layer, ()), strict=True)]
        assert [site.fused for site in handle.sites] == calls
        assert [sum(site.fallen.values()) for site in handle.sites] == [0] * len(calls)
    handle.restore()
    assert_same(expected["plain"], run(model))
    assert [site.fused for site in handle.sites] == calls  # nothing of ours was called any more


def test_a_pass_depends_on_what_is_varied(device):
    """The negative control of the test above: guidance, isolation and the seed all change the output."""
    model = make(V23, device=device)
    outputs = [run(model, **kwargs) for kwargs, *_ in GUIDED.values()]
    outputs.append(run(make(V23, device=device, seed=1)))
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert_differ(a, b)


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
        for key, value in module.__dict__.items():
            if isinstance(value, dict) and key.startswith("_"):
                found |= {(name, key, k): id(v) for k, v in value.items()}
            found[name, key] = id(value)
        if hasattr(module, "processor"):
            found |= {(name, "processor", k): id(v) for k, v in vars(module.processor).items()}
            found[name, "processor.__dict__"] = id(module.processor.__dict__)
    return found


@pytest.mark.parametrize("config", ["2.0", "2.3"])
def test_restore_puts_every_attribute_back(config, device):
    model = make(CONFIGS[config], device=device)
    before, keys = _attributes(model), list(model.state_dict())
    handle = bitfuse.accelerate(model)
    assert list(model.state_dict()) == keys
    changed = {key for key, value in _attributes(model).items() if before.get(key) != value}
    assert {key[1] for key in changed} == {"processor"}  # the one attribute we touch, at the eight sites
    assert len(changed) == LAYERS * len(SITES)
    run(model)
    assert_fused(handle)
    handle.restore()
    handle.restore()  # once more does nothing
    assert _attributes(model) == before
    assert list(model.state_dict()) == keys


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


def test_the_context_manager_restores_when_the_block_raises(device):
    model = make(device=device)
    before = _attributes(model)
    handle = bitfuse.accelerated(model)

    def interrupted():
        with handle:
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


def test_somebody_elses_processor_survives_restore(device):
    model = make(device=device)
    handle = bitfuse.accelerate(model)
    theirs = upstream.LTX2AudioVideoAttnProcessor()
    model.transformer_blocks[0].attn1.set_processor(theirs)
    expected_sites = [site.name for site in handle.sites if site.name != "transformer_blocks.0.attn1"]
    run(model)
    assert [site.name for site in handle.sites if site.fused] == expected_sites
    handle.restore()
    assert model.transformer_blocks[0].attn1.processor is theirs
    kinds = {type(m.processor) for m in model.modules() if hasattr(m, "processor")}
    assert kinds == {upstream.LTX2AudioVideoAttnProcessor}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: _saved_and_loaded(m)], ids=["deepcopy", "torch.save"])
def test_a_copy_of_an_accelerated_model_is_a_plain_model(how, device):
    model = make(V23, device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    twin = how(model)
    assert_same(expected, run(twin))
    assert [site.fused for site in handle.sites] == [0] * len(handle.sites)  # its calls are not this handle's
    own = bitfuse.accelerate(twin)
    assert own is not handle
    assert_same(expected, run(twin))
    assert_fused(own)
    own.restore()
    kinds = {type(m.processor) for m in twin.modules() if hasattr(m, "processor")}
    assert kinds == {upstream.LTX2PerturbedAttnProcessor}
    assert_same(expected, run(model))
    assert_fused(handle)


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


def test_a_pipeline_is_found_by_its_components(device):
    first, second = make(device=device), make(V23, device=device)
    expected = run(first), run(second)
    handle = bitfuse.accelerate(Pipeline(vae=torch.nn.Identity(), transformer=first, scheduler=None, refiner=second))
    assert_same(expected[0], run(first))
    assert_same(expected[1], run(second))
    assert [site.state for site in handle.sites] == ["fused"] * 2 * LAYERS * len(SITES)


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
    with pytest.raises(TypeError, match="accepted: a diffusers LTX-2 pipeline or an LTX2VideoTransformer3DModel") as e:
        bitfuse.accelerate(target)
    assert name in str(e.value)


# -- attention backends --------------------------------------------------------------------------------------------


def _backends(model):
    return {str(m.processor._attention_backend) for m in model.modules() if hasattr(m, "processor")}


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
        for module in (block, block.attn1, block.attn1.to_q, block.attn1.norm_q, block.audio_attn1.to_out[0]):
            module.register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("watch", [_watch_diffusers, _watch_accelerate, _watch_torch])
def test_hooks_keep_being_called(watch, order, device):
    stock, seen_stock, model, seen = make(device=device), [], make(device=device), []
    watch(stock, seen_stock)
    expected = run(stock)
    if order == "before":
        watch(model, seen)
    handle = bitfuse.accelerate(model)
    if order == "after":
        watch(model, seen)
    assert_same(expected, run(model))
    assert_fused(handle)
    assert len(seen) >= 2 * LAYERS
    assert seen == seen_stock
    handle.restore()
    assert_same(expected, run(model))
    assert len(seen) == 2 * len(seen_stock)


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
    assert_fused(handle)


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
    assert_fused(handle, 6)
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", ["2.0", "2.3"])
def test_training_gives_the_same_gradients(config, checkpointing, device):
    model = make(CONFIGS[config], torch.float32, device)
    expected = _trained(model, checkpointing)
    handle = bitfuse.accelerate(model)
    _assert_same_training(expected, _trained(model, checkpointing))
    assert_all_fell_back(handle, "a gradient is required", 4 if checkpointing else 2)
    run(model.eval())  # and inference is fused again, with the same handle
    assert {site.fused for site in handle.sites} == {2}


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
    assert_all_fell_back(handle, "a gradient is required")


@pytest.mark.parametrize(
    ("config", "order", "backend"),
    [
        ("2.0", "compiled first", "eager"),
        ("2.0", "accelerated first", "aot_eager"),
        ("2.3", "accelerated first", "eager"),
    ],
)
def test_torch_compile_of_the_model(config, order, backend, device):
    """While PyTorch traces, the chain itself is in the graph: no graph break, and the bits of the compiled stock."""
    torch.compiler.reset()
    model = make(CONFIGS[config], device=device)
    expected = run(torch.compile(model, fullgraph=True, backend=backend))
    torch.compiler.reset()
    if order == "compiled first":
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        handle = bitfuse.accelerate(compiled)
    else:
        handle = bitfuse.accelerate(model)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_same(expected, run(compiled))
    assert handle.report().seen == LAYERS * len(SITES)
    assert {site.fused for site in handle.sites} == {0}  # the kernel is not in a graph that PyTorch compiles
    if backend == "eager":
        assert_same(run(model), run(compiled))


def test_compile_repeated_blocks(device):
    torch.compiler.reset()
    model = make(device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert_same(expected, run(model))
    assert {site.fused for site in handle.sites} == {0}


# -- what is not known is left alone -------------------------------------------------------------------------------


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
    assert_left_alone(handle, "Theirs, not one of diffusers' LTX-2 processors", count=1)
    assert sum(site.fused for site in handle.sites) == 2 * (LAYERS * len(SITES) - 1)


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
    assert_left_alone(handle, "apply_split_rotary_emb of diffusers")


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
    assert_left_alone(handle, "LTX2AudioVideoAttnProcessor of diffusers")


def test_a_source_that_was_not_read_is_left_alone(device, monkeypatch):
    from bitfuse.hosts import diffusers as adapter

    monkeypatch.setitem(adapter._READ, "LTX2PerturbedAttnProcessor", {"0" * 16})
    model = make(V23, device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert_left_alone(handle, "not a source that bitfuse knows")


def test_a_reference_that_is_not_the_hosts_is_left_alone(device, monkeypatch):
    from bitfuse.hosts import diffusers as adapter

    adapter._differs_from_host.cache_clear()
    monkeypatch.setattr(SPLIT_FP32, "reference", bitfuse.OPERATORS["split_rotary_per_op"].reference)
    model = make(device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert_left_alone(handle, "part here: ")
    monkeypatch.undo()
    adapter._differs_from_host.cache_clear()


def _mutant_in_place(monkeypatch):
    mutant = next(m for m in SPLIT_FP32.mutants if m.name == "the sine's sign swapped")
    original = types.SimpleNamespace(tiers=SPLIT_FP32.tiers)
    monkeypatch.setattr(SPLIT_FP32, "tiers", (Tier("wrong", lambda *args: mutant.plan(original, *args)),))


def test_a_wrong_kernel_falls_back_and_says_where_it_differs(device, monkeypatch, fresh_routes):
    _mutant_in_place(monkeypatch)
    model = make(device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert_all_fell_back(handle, "differs at [")
    assert "differs at [" in str(handle.report())


def test_a_wrong_kernel_that_slips_through_is_caught_on_the_first_call(device, monkeypatch, fresh_routes):
    """The negative control of the battery: with it out of the way, the live comparison still protects that call."""
    _mutant_in_place(monkeypatch)
    monkeypatch.setattr(proof, "run_battery", lambda *args: proof.Verdict(True, "equal"))
    model = make(device=device)
    expected = run(model)
    handle = bitfuse.accelerate(model)
    assert_same(expected, run(model))
    assert_all_fell_back(handle, "differs at [")


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


# -- the report ----------------------------------------------------------------------------------------------------


def test_the_report_says_what_happened(device):
    model = make(device=device)
    handle = bitfuse.accelerate(model)
    assert {site.state for site in handle.sites} == {"not called yet"}
    with contextlib.ExitStack() as stack:
        bitfuse.disable()
        stack.callback(bitfuse.enable)
        run(model)
    assert_all_fell_back(handle, "bitfuse is off")
    run(model)
    assert {site.state for site in handle.sites} == {"partly fused"}
    found = handle.report().as_dict()
    assert found["host"] == f"diffusers {diffusers.__version__}"
    assert (found["sites_seen"], found["sites_fused"]) == (LAYERS * len(SITES), 0)
    assert found["sites"][0] == {
        "name": "transformer_blocks.0.attn1",
        "operator": "split_rotary_fp32",
        "state": "partly fused",
        "calls_fused": 2,
        "calls_fallen_back": 2,
        "reasons": ["bitfuse is off (BITFUSE=0 or bitfuse.disable())"],
    }
    text = str(handle.report()).splitlines()
    assert text[0] == f"0 of 8 sites fused in diffusers {diffusers.__version__}"
    assert len(text) == 1 + len(SITES)  # layers are folded
    assert all("partly fused (4 calls fused, 4 not): bitfuse is off" in line for line in text[1:])


def test_a_host_function_patched_later_is_the_one_that_runs(device, monkeypatch):
    model = make(device=device)
    with bitfuse.accelerated(model) as handle:
        monkeypatch.setattr(upstream, "apply_split_rotary_emb", lambda x, freqs: x * 2)
        found = run(model)
        assert {reason for site in handle.sites for reason in site.reasons} == {
            f"apply_split_rotary_emb of diffusers {diffusers.__version__} was replaced meanwhile"
        }
    assert_same(run(model), found)


def test_a_block_inside_an_acceleration_leaves_it_in_force(device):
    model = make(device=device)
    outer = bitfuse.accelerate(model)
    with bitfuse.accelerated(model) as inner:
        assert inner is outer
    run(model)
    assert_fused(outer)


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
