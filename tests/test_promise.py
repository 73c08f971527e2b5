"""Around the kernels: whatever somebody does to a model, the bits are those of stock, and the report says the truth.

Kept values, replaced code, derived classes, threads, memory, wrappers: each kind of fault that was seen, with its
neighbours. Steps are of one small block; references stand in for kernels where only the way to them is tested.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import types
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.utils import parametrize

import bitfuse
import sglang_host
from bitfuse import hosts
from bitfuse.core import proof
from bitfuse.core.operator import Operator
from bitfuse.hosts.handle import Options
from bitfuse.hosts.site import Site
from bitfuse.run.swap import ours_in, plain
from bitfuse.tools import seeded

HOSTS = [name for name in seeded.HOSTS if name in seeded.installed()]
diffusers = pytest.importorskip("diffusers")
upstream = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")

pytestmark = pytest.mark.usefixtures("fresh_routes")


@pytest.fixture(autouse=True)
def references_for_kernels(monkeypatch):
    """These tests are of the way to the kernels: each is stood in for by its reference, and counts as fused."""
    monkeypatch.setattr(Operator, "_runner", lambda self, plan, args: self.reference)
    monkeypatch.setattr(proof, "run_battery", lambda *args, **kwargs: proof.Verdict(True, "equal"))
    yield
    for handle in list(hosts._active.values()):
        handle.finish()


def build(host="diffusers", version="2.0", layers=1, device="cpu"):
    if host == "sglang":
        sglang_host.ready()
    geometry = replace(seeded.SMALL, host=host, version=version, layers=layers, frames=1, height=2, width=2)
    geometry = replace(geometry, audio_frames=3, text_tokens=4)
    model = seeded.build(geometry, torch.device(device), 0)
    inputs = seeded.make_inputs(model, geometry, torch.device(device), 0)
    return model, inputs, seeded.one_step(model, inputs)


@pytest.fixture(params=HOSTS)
def each_host(request):
    return build(request.param)


@pytest.fixture
def model_and_step():
    model, _, step = build()
    return model, step


def reasons(handle):
    return {reason for site in handle.sites for reason in site.reasons}


def all_fused(handle):
    return handle.report().fused == handle.report().seen > 0


# -- code that was replaced --------------------------------------------------------------------------------------------


def scaled(function):
    """Somebody's patch: it changes the result."""

    def patched(*args, **kwargs):
        found = function(*args, **kwargs)
        return tuple(t * 1.5 for t in found) if isinstance(found, tuple) else found * 1.5

    return patched


def _diffusers_places():
    from diffusers.models import activations, normalization

    processor = upstream.LTX2PerturbedAttnProcessor
    return {
        "nn.RMSNorm": (torch.nn.RMSNorm, "forward"),
        "F.rms_norm": (torch.nn.functional, "rms_norm"),
        "torch.sigmoid": (torch, "sigmoid"),
        "torch.rsqrt": (torch, "rsqrt"),
        "block's norm": (normalization.RMSNorm, "forward"),
        "block": (upstream.LTX2VideoTransformerBlock, "forward"),
        "processor": (processor, "__call__"),
        "attention": (upstream.LTX2Attention, "forward"),
        "rotary": (upstream, "apply_split_rotary_emb"),
        "attention function": (upstream, "dispatch_attention_fn"),
        "GELU": (activations.GELU, "forward"),
        "GELU.gelu": (activations.GELU, "gelu"),
        "F.gelu": (torch.nn.functional, "gelu"),
        "tables": (upstream.LTX2AudioVideoRotaryPosEmbed, "forward"),
        "Linear": (torch.nn.Linear, "forward"),
        "Tensor.pow": (torch.Tensor, "pow"),
    }


@pytest.mark.parametrize("when", ["before", "after", "after a step"])
@pytest.mark.parametrize("place", _diffusers_places())
def test_code_that_is_replaced_is_the_one_that_runs(place, when, monkeypatch):
    model, _, step = build(version="2.3")
    owner, name = _diffusers_places()[place]
    own, stock = getattr(owner, name), step()
    monkeypatch.setattr(owner, name, scaled(own))
    expected = step()
    assert bitfuse.compare(stock, expected) is not None  # the patch does change the result
    if when != "before":
        monkeypatch.setattr(owner, name, own)
    with bitfuse.accelerated(model) as handle:
        if when == "after a step":
            step()
            assert all_fused(handle)
        monkeypatch.setattr(owner, name, scaled(own))
        assert bitfuse.compare(expected, step()) is None
        monkeypatch.setattr(owner, name, own)
        for site in handle.sites:
            site.fallen.clear()
        assert bitfuse.compare(stock, step()) is None
        left = {site.declined for site in handle.sites if site.declined}
        assert not any(site.fallen for site in handle.sites), "it is back, and is not said to be replaced"
        assert all("is not a source that bitfuse knows" in reason for reason in left)


SAME_PACKAGE = {
    "another method": (torch.nn.RMSNorm, "forward", lambda: torch.nn.Identity.forward),
    "another function": (torch, "sigmoid", lambda: torch.nn.functional.hardsigmoid),
    "a norm's __call__": (torch.nn.RMSNorm, "__call__", lambda: scaled(torch.nn.Module.__call__)),
    "a norm's _call_impl": (torch.nn.RMSNorm, "_call_impl", lambda: scaled(torch.nn.Module._call_impl)),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", SAME_PACKAGE)
def test_what_comes_from_the_same_package_is_a_replacement_too(what, when, monkeypatch):
    model, _, step = build(version="2.3")
    owner, name, other = SAME_PACKAGE[what]
    stock = step()
    if when == "before":
        monkeypatch.setattr(owner, name, other(), raising=False)
    with bitfuse.accelerated(model) as handle:
        if when == "after":
            step()
            monkeypatch.setattr(owner, name, other(), raising=False)
        found = step()
        assert any(name in reason and "was replaced" in reason for reason in reasons(handle))
    assert bitfuse.compare(step(), found) is None
    assert bitfuse.compare(stock, found) is not None


def _own_get_mod_params(model):
    block = model.transformer_blocks[0]
    stock = type(block).get_mod_params
    block.get_mod_params = lambda *args, **kwargs: tuple(t * 1.5 for t in stock(*args, **kwargs))


def _own_call_impl(model):
    norm = model.transformer_blocks[0].norm1
    norm._call_impl = lambda x: type(norm).forward(norm, x) * 1.5


def _derived_call(model):
    norm = model.transformer_blocks[0].attn1.norm_q
    norm.__class__ = type("Mine", (type(norm),), {"__call__": lambda self, x: torch.nn.Module.__call__(self, x) * 1.5})


@pytest.mark.parametrize("change", [_own_get_mod_params, _own_call_impl, _derived_call])
def test_what_one_module_has_of_its_own_is_what_runs(change, model_and_step):
    model, step = model_and_step
    stock = step()
    with bitfuse.accelerated(model):
        step()
        change(model)
        found = step()
    assert bitfuse.compare(step(), found) is None
    assert bitfuse.compare(stock, found) is not None


def test_a_norm_with_a_backward_hook_is_called(model_and_step):
    model, step = model_and_step
    called = []
    model.transformer_blocks[0].attn1.norm_q.register_full_backward_hook(lambda *_: called.append(1))
    with bitfuse.accelerated(model) as handle:
        step()
        assert any("a hook is attached to norm_q" in reason for reason in reasons(handle))


def test_a_forward_of_a_class_that_is_no_function(monkeypatch):
    """A mock, say: Python does not bind it."""
    model, _, step = build()
    attention, forward = upstream.LTX2Attention, upstream.LTX2Attention.forward
    answers = []

    class Mock:
        def __call__(self, *args, **kwargs):
            answers.append(args)
            return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    with bitfuse.accelerated(model):
        monkeypatch.setattr(attention, "forward", Mock())
        found = step()
    ours = len(answers)
    assert bitfuse.compare(step(), found) is None
    assert len(answers) == 2 * ours
    monkeypatch.setattr(attention, "forward", forward)


def test_one_context_may_be_entered_twice(model_and_step):
    model, _ = model_and_step
    context = bitfuse.accelerated(model)
    with context as handle:
        with context as again:
            assert again is handle
        assert handle.on
    assert not handle.on


def test_coordinates_that_are_none_by_position(model_and_step):
    """With cuda_graph they are made by the model's own rope, whichever it has by now."""
    from bitfuse.hosts.diffusers import _with_coordinates

    model, _ = model_and_step
    x = torch.empty(1, 4, 16)
    sizes = {"num_frames": 1, "height": 2, "width": 2, "audio_num_frames": 3}
    made = _with_coordinates(model, {"hidden_states": x, "audio_hidden_states": x, "video_coords": None, **sizes})
    assert set(made) == {"video_coords", "audio_coords"}
    expected = model.rope.prepare_video_coords(1, 1, 2, 2, x.device, fps=24.0)
    assert bitfuse.compare(expected, made["video_coords"]) is None


def test_what_was_replaced_is_named_and_only_what_leaves_it_out_is_stock(monkeypatch):
    model, _, step = build(version="2.3")
    with bitfuse.accelerated(model) as handle:
        step()
        monkeypatch.setattr(torch, "sigmoid", scaled(torch.sigmoid))
        step()
        fallen = {site.operator: set(site.fallen) for site in handle.sites if site.fallen}
    assert "head_gate" in fallen
    assert "rms_norm_modulate_composed" not in fallen
    assert all(reason.startswith("torch.sigmoid was replaced") for found in fallen.values() for reason in found)


def test_code_replaced_inside_a_function_is_noticed(monkeypatch):
    """The function object stays; its code is another."""
    model, _, step = build()
    function = upstream.apply_split_rotary_emb
    other = types.FunctionType(scaled(function).__code__, function.__globals__, closure=scaled(step).__closure__)
    assert other.__code__ is not function.__code__

    def doubled(x, freqs):
        return x * 2

    with bitfuse.accelerated(model) as handle:
        step()
        monkeypatch.setattr(function, "__code__", doubled.__code__)
        found = step()
        assert any("apply_split_rotary_emb was replaced" in reason for reason in reasons(handle))
        handle.restore()
        assert bitfuse.compare(step(), found) is None


def test_a_method_of_a_class_derived_meanwhile_is_the_one_that_runs():
    model, _, step = build()
    block = model.transformer_blocks[0]
    kind = type(block)
    forward = kind.forward

    class Mine(kind):
        def forward(self, *args, **kwargs):
            x, y = forward(self, *args, **kwargs)
            return x * 0.5, y

    with bitfuse.accelerated(model) as handle:
        block.__class__ = Mine
        found = step()
        assert any("the forward of" in reason and "Mine was replaced" in reason for reason in reasons(handle))
    assert bitfuse.compare(step(), found) is None


CHANGED_NORMS = {
    "a weight": lambda norm: setattr(
        norm, "weight", torch.nn.Parameter(torch.full((1,), 1.5, dtype=torch.bfloat16), requires_grad=False)
    ),
    "another eps": lambda norm: setattr(norm, "eps", 0.5),
    "another class": lambda norm: setattr(
        norm, "__class__", type("Mine", (type(norm),), {"forward": lambda self, x: x * 2.0})
    ),
    "a forward of its own": lambda norm: setattr(norm, "forward", lambda x: x * 3.0),
}


@pytest.mark.parametrize("norm", ["norm1", "audio_norm3", "attn1.norm_q", "audio_to_video_attn.norm_k"])
@pytest.mark.parametrize("change", CHANGED_NORMS)
def test_a_norm_that_is_changed_is_called(change, norm, model_and_step):
    model, step = model_and_step
    if change == "a weight" and "attn" in norm:
        pytest.skip("it has one")
    stock = step()
    with bitfuse.accelerated(model):
        step()
        CHANGED_NORMS[change](model.transformer_blocks[0].get_submodule(norm))
        found = step()
    assert bitfuse.compare(step(), found) is None
    assert bitfuse.compare(stock, found) is not None


# -- what is kept ------------------------------------------------------------------------------------------------------

WRITES = {
    "in place": lambda t: t.add_(1),
    ".data": lambda t: t.data.add_(1),
    "other data": lambda t: setattr(t, "data", t.clone() + 1),
    "numpy": lambda t: t.numpy().__iadd__(1),
    "DLPack": lambda t: torch.from_dlpack(t.detach()).add_(1),
    "storage": lambda t: t.untyped_storage().copy_((t + 1).untyped_storage()),
    "unversioned": lambda t: _unversioned(t),
}


def _unversioned(t):
    with torch.autograd._unsafe_preserve_version_counter(t):
        t.add_(1)


@pytest.mark.parametrize("write", WRITES)
def test_coordinates_may_be_written_into_in_any_way(write):
    model, inputs, _ = build()
    conditions = dict(inputs["conditions"])
    conditions["video_coords"] = coords = conditions["video_coords"].clone()
    velocity = seeded.velocity_of(model, {**inputs, "conditions": conditions})

    def step():
        with torch.no_grad():
            return velocity(inputs["latents"], inputs["audio_latents"], torch.full((1,), 1000.0))

    stock = step()
    with bitfuse.accelerated(model) as handle:
        assert bitfuse.compare(stock, step()) is None
        WRITES[write](coords)
        found = step()
        assert all_fused(handle)
    assert bitfuse.compare(step(), found) is None
    assert bitfuse.compare(stock, found) is not None


def test_tables_may_be_written_into(model_and_step):
    """A hook that scales what a step is given does so in each step anew."""
    model, step = model_and_step

    def scale(module, args, kwargs):
        kwargs["video_rotary_emb"][0].mul_(0.5)

    hook = model.transformer_blocks[0].register_forward_pre_hook(scale, with_kwargs=True)
    expected = step()
    with bitfuse.accelerated(model) as handle:
        for _ in range(3):
            assert bitfuse.compare(expected, step()) is None
        assert all_fused(handle)
    hook.remove()


def test_the_modulation_follows_a_timestep_embedding_with_other_data():
    """Views of it are kept within a step, by the tensor: one that was given other memory is another."""
    from bitfuse.hosts.ltx2 import AdaLNValues

    values, temb = AdaLNValues(), torch.arange(12.0).view(1, 2, 6)
    first = values.of(temb, 2)
    assert values.of(temb, 2) is first
    temb.data = temb * 2
    assert bitfuse.compare(temb[..., :3], values.of(temb, 2)[0]) is None


# -- classes, copies, hooks --------------------------------------------------------------------------------------------


class Doubled(torch.nn.Module):
    def forward(self, x):
        return x * 2


def test_classes_stay_what_they_are(each_host):
    model, _, step = each_host
    kinds = [type(module) for module in model.modules()]
    with bitfuse.accelerated(model):
        step()
        assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_class_may_be_derived_from_any_modules(when, each_host):
    """As torch's fully_shard and parametrize do."""
    model, _, step = each_host
    expected = step()

    def derive():
        for module in model.modules():
            kind = type(module)
            if type(module).__module__.split(".")[0] != "torch":
                module.__class__ = type(f"Sharded{kind.__name__}", (type("Sharded", (), {}), kind), {})

    if when == "before":
        derive()
    handle = bitfuse.accelerate(model)
    if when == "after":
        derive()
    assert bitfuse.compare(expected, step()) is None
    assert any(site.fused for site in handle.sites if "norm1" in site.name)
    handle.restore()
    assert [module for module in model.modules() if ours_in(module)] == []
    assert bitfuse.compare(expected, step()) is None
    with bitfuse.accelerated(model) as again:
        assert bitfuse.compare(expected, step()) is None
        assert any(site.fused for site in again.sites if "norm1" in site.name)


def test_a_parameter_may_be_parametrized_meanwhile(model_and_step):
    model, step = model_and_step
    stock, block = step(), model.transformer_blocks[0]
    with bitfuse.accelerated(model) as handle:
        step()
        parametrize.register_parametrization(block, "scale_shift_table", Doubled())
        found = step()
        handle.restore()
        assert bitfuse.compare(step(), found) is None
    parametrize.remove_parametrizations(block, "scale_shift_table", leave_parametrized=False)
    assert bitfuse.compare(stock, step()) is None
    with bitfuse.accelerated(model) as again:
        assert bitfuse.compare(stock, step()) is None
        assert all_fused(again)


def test_a_forward_that_was_kept_may_be_put_back(each_host):
    model, _, step = each_host
    expected = step()
    handle = bitfuse.accelerate(model)
    kept = {module: module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__}
    step()
    handle.restore()
    counts = [(site.fused, sum(site.fallen.values())) for site in handle.sites]
    for module, forward in kept.items():
        module.forward = forward
    assert bitfuse.compare(expected, step()) is None
    assert [(site.fused, sum(site.fallen.values())) for site in handle.sites] == counts
    with bitfuse.accelerated(model) as again:
        assert bitfuse.compare(expected, step()) is None
        assert [site.fused for site in again.sites] == [fused for fused, _ in counts]
    assert all(plain(module) for module in kept)


def test_a_hook_that_was_taken_off_again_leaves_nothing(model_and_step):
    hooks = pytest.importorskip("accelerate.hooks")
    accelerate = pytest.importorskip("accelerate")
    model, step = model_and_step
    expected = step()
    accelerate.cpu_offload(model, torch.device("cpu"))
    hooks.remove_hook_from_module(model, recurse=True)
    with bitfuse.accelerated(model, strict=True) as handle:
        assert bitfuse.compare(expected, step()) is None
        assert all_fused(handle)


@pytest.mark.parametrize("order", ["before", "after", "after, taken off while accelerated"])
def test_nothing_of_ours_stays_in_a_hook(order, model_and_step):
    hooks = pytest.importorskip("accelerate.hooks")
    model, step = model_and_step
    block, expected = model.transformer_blocks[0], step()
    if order == "before":
        hooks.add_hook_to_module(block, hooks.ModelHook())
    handle = bitfuse.accelerate(model)
    if order != "before":
        hooks.add_hook_to_module(block, hooks.ModelHook())
    assert bitfuse.compare(expected, step()) is None
    assert all_fused(handle)
    if "taken off" in order:
        hooks.remove_hook_from_module(block)
        assert bitfuse.compare(expected, step()) is None
        assert {site.fused for site in handle.sites} == {2}
    handle.restore()
    held = (block.__dict__.get("forward"), block.__dict__.get("_old_forward"))
    assert not any(type(found).__module__.startswith("bitfuse") for found in held)
    assert bitfuse.compare(expected, step()) is None
    with bitfuse.accelerated(model, strict=True):
        assert bitfuse.compare(expected, step()) is None


def test_processors_that_were_read_may_be_put_back(model_and_step):
    model, step = model_and_step
    expected = step()
    handle = bitfuse.accelerate(model)
    saved = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    handle.restore()
    for name, processor in saved.items():
        model.get_submodule(name).set_processor(processor)
    with bitfuse.accelerated(model, strict=True) as again:
        assert bitfuse.compare(expected, step()) is None
        assert all_fused(again)


# -- threads -----------------------------------------------------------------------------------------------------------


def together(*functions):
    """Run them at once in threads of their own; what each returned or raised."""
    gate, found = threading.Barrier(len(functions)), [None] * len(functions)

    def run(place, function):
        gate.wait(20)
        try:
            found[place] = function()
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_two_threads_may_be_inside_blocks_of_one_model(each_host):
    model, _, step = each_host
    expected = step()

    # SGLang has one forward context in a process, which a second forward takes away from the first, in stock too
    alone = threading.Lock() if "sglang" in type(model).__module__ else contextlib.nullcontext()

    def request():
        with bitfuse.accelerated(model) as handle, alone:
            return bitfuse.compare(expected, step()), handle

    (first, a), (second, b) = together(request, request)
    assert first is second is None
    assert not hosts._active
    assert [module for module in model.modules() if ours_in(module)] == []
    assert bitfuse.compare(expected, step()) is None
    blocks = [site for handle in {a, b} for site in handle.sites if "blocks" in site.name]
    assert sum(site.fused for site in blocks if "norm1" in site.name) == 2 * 2  # two norms, two steps


def test_the_last_to_leave_restores(model_and_step):
    model, step = model_and_step
    first, second = bitfuse.accelerated(model), bitfuse.accelerated(model)
    handle = first.__enter__()
    assert second.__enter__() is handle
    first.__exit__(None, None, None)
    assert handle.on
    step()
    assert all_fused(handle)
    second.__exit__(None, None, None)
    assert not handle.on


def test_a_block_leaves_an_acceleration_that_was_asked_for_meanwhile(model_and_step):
    model, _ = model_and_step
    with bitfuse.accelerated(model) as inside:
        handle = bitfuse.accelerate(model)
        assert handle is inside
    assert handle.on
    handle.restore()


def test_two_threads_accelerate_one_model(each_host):
    model, _, step = each_host
    expected = step()
    a, b = together(lambda: bitfuse.accelerate(model), lambda: bitfuse.accelerate(model))
    assert a is b
    assert bitfuse.compare(expected, step()) is None
    assert {site.fused for site in a.sites if site.state == "fused" and "blocks" in site.name} == {1}
    a.restore()
    assert bitfuse.compare(expected, step()) is None


@pytest.mark.parametrize("at", ["attn1", "ff", "audio_ff"])
def test_a_restore_takes_effect_after_the_forward_that_is_under_way(at, model_and_step):
    model, step = model_and_step
    expected, handle = step(), bitfuse.accelerate(model)
    module = model.transformer_blocks[0].get_submodule(at)

    def restore(*_):
        hook.remove()
        thread = threading.Thread(target=handle.restore)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        assert ours_in(model) is None  # ended
        assert "forward" in model.__dict__  # and still there

    hook = module.register_forward_hook(restore)
    assert bitfuse.compare(expected, step()) is None
    assert [module for module in model.modules() if "forward" in module.__dict__] == []
    after = {site.operator: site.fused for site in handle.sites}
    assert bitfuse.compare(expected, step()) is None
    assert {site.operator: site.fused for site in handle.sites} == after
    assert not hosts._active


def test_a_forward_that_raises_lets_a_restore_take_effect(model_and_step):
    model, step = model_and_step
    handle = bitfuse.accelerate(model)

    def fails(*_):
        handle.restore()
        raise KeyError("the user's")

    hook = model.transformer_blocks[0].ff.register_forward_hook(fails)
    with pytest.raises(KeyError):
        step()
    hook.remove()
    assert [module for module in model.modules() if "forward" in module.__dict__] == []


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}, {"keep_text": True}, {"audit": 2}])
@pytest.mark.parametrize("kept", [False, True], ids=["handle dropped", "handle kept"])
def test_a_model_is_freed_at_once(kept, options):
    model, inputs, step = build()
    handle = bitfuse.accelerate(model, **options)
    step()
    gc.collect()
    weak = [weakref.ref(p) for p in model.parameters()]
    del model, inputs, step
    if not kept:
        del handle
    gc.collect()
    assert [w for w in weak if w() is not None] == []
    if kept:
        assert handle.report().seen > 0  # which can still be asked for
        handle.restore()


def test_a_site_keeps_a_bounded_number_of_reasons():
    site = Site("a site", "an operator")
    for number in range(1000):
        site.fall(f"given x [1, {number}]")
    assert len(site.fallen) == Site.REASONS_KEPT + 1
    assert sum(site.fallen.values()) == 1000
    assert site.fallen[Site.OTHERS] == 1000 - Site.REASONS_KEPT


# -- wrappers and targets ----------------------------------------------------------------------------------------------


class Wrapper(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Cache:
    """No module: it holds one."""

    def __init__(self, model):
        self.model = model


WRAPPERS = {"a module": Wrapper, "two": lambda m: Wrapper(Wrapper(m)), "an object": Cache}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("where", ["alone", "in a pipeline"])
def test_a_transformer_is_found_inside_a_wrapper(where, wrapper, model_and_step):
    model, step = model_and_step
    expected, target = step(), WRAPPERS[wrapper](model)
    if where == "in a pipeline":
        target = types.SimpleNamespace(components={"transformer": target})
    with bitfuse.accelerated(target, strict=True) as handle:
        assert bitfuse.compare(expected, step()) is None
        assert all_fused(handle)


def test_a_pipeline_that_holds_a_transformer_twice(model_and_step):
    model, step = model_and_step
    pipe = types.SimpleNamespace(components={"transformer": model, "transformer_2": model})
    with bitfuse.accelerated(pipe, strict=True) as handle:
        step()
        names = [site.name for site in handle.sites]
        assert len(names) == len(set(names))


def test_a_transformer_that_is_not_recognised_is_named():
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    text = LTX2TextConnectors.__new__(LTX2TextConnectors)
    torch.nn.Module.__init__(text)
    for side in ("video_connector", "audio_connector"):
        connector = torch.nn.Module()
        connector.transformer_blocks = torch.nn.ModuleList()
        setattr(text, side, connector)
    pipe = types.SimpleNamespace(components={"transformer": torch.nn.Linear(1, 1), "connectors": text})
    with bitfuse.accelerated(pipe) as handle:
        assert [(site.name, site.state) for site in handle.sites] == [("transformer", "left alone")]
        assert "in which no LTX2VideoTransformer3DModel was found" in handle.sites[0].declined
    with pytest.raises(bitfuse.NotFused, match=r"torch\.nn\.modules\.linear\.Linear"):
        bitfuse.accelerate(pipe, strict=True)
    assert not hosts._active


@pytest.mark.parametrize("name", ["strict", "cuda_graph", "keep_text"])
@pytest.mark.parametrize("value", ["no", "off", 0, 1, None, []])
def test_switches_are_true_or_false(name, value, model_and_step):
    model, _ = model_and_step
    with pytest.raises(ValueError, match=f"{name} is .*; accepted: True or False"):
        bitfuse.accelerate(model, **{name: value})
    with pytest.raises(ValueError, match=f"{name} is .*; accepted: True or False"):
        Options(**{name: value})


def test_a_misspelt_option_is_named(model_and_step):
    model, _ = model_and_step
    for function in (bitfuse.accelerate, bitfuse.accelerated):
        with pytest.raises(TypeError, match="strikt"):
            function(model, strikt=True)


@pytest.mark.parametrize("host", HOSTS)
def test_under_fake_tensors_all_is_stock_and_nothing_of_it_stays(host):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, _, step = build(host)
    expected = step()
    with FakeTensorMode(allow_non_fake_inputs=True):
        handle = bitfuse.accelerate(model)
        handle.restore()
        handle = bitfuse.accelerate(model)
    assert bitfuse.compare(expected, step()) is None  # taken over under the mode, run without it
    assert any(site.fused for site in handle.sites if "norm1" in site.name)
    assert not any("mode is active" in reason for reason in reasons(handle))
    handle.restore()


def test_a_forward_answers_as_the_method_that_it_stands_for(model_and_step):
    model, _ = model_and_step
    block = model.transformer_blocks[0]
    names = ("__name__", "__qualname__", "__code__", "__func__", "__self__", "__defaults__")
    stock = {name: getattr(block.forward, name) for name in names}
    with bitfuse.accelerated(model):
        assert ours_in(block) is block.forward
        assert {name: getattr(block.forward, name) for name in names} == stock
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = block.forward.no_such_thing


def test_a_copy_runs_its_own_modules(model_and_step):
    model, step = model_and_step
    with bitfuse.accelerated(model):
        twin = copy.deepcopy(model)
        assert [module for module in twin.modules() if not plain(module)] == []
        step()
