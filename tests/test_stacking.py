"""bitfuse beside offload, casting, quantised weights and LoRA: every site fused, every bit stock's, in both orders."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.utils.parametrize

import bitfuse
from bitfuse.hosts import offload
from bitfuse.run.swap import ours_in
from stacking import FEATURES, LAYERS, ORDERS, row, step_of

diffusers = pytest.importorskip("diffusers", minversion="0.38")

SITES = {"2.0": 16 * LAYERS, "2.3": 24 * LAYERS}


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("version", SITES)
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_every_site_is_fused_and_every_bit_is_that_of_stock(feature, version, order, device):
    if feature.missing:
        pytest.skip(f"{', '.join(feature.missing)} is not installed")
    found = row(feature, version, order, device)
    assert (found.differs, found.after_restore) == (None, None)
    assert (found.fused, found.seen) == (SITES[version], SITES[version]), found.reasons


LEAVES = next(feature for feature in FEATURES if feature.name == "group offload, leaves")
SEQUENTIAL = next(feature for feature in FEATURES if feature.name == "sequential offload")


def _norms(model):
    return [m for name, m in model.named_modules() if name.endswith(("norm_q", "norm_k"))]


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("feature", [LEAVES, SEQUENTIAL], ids=lambda feature: feature.name)
def test_hooks_may_be_removed_and_put_on_again(feature, device):
    build, step = step_of("2.0", device)
    model = build()
    expected = step(build())()
    handle = bitfuse.accelerate(model)
    for _ in range(2):
        feature.use(model)
        assert bitfuse.compare(expected, step(model)()) is None
        if feature is LEAVES:
            for module in model.modules():
                registry = getattr(module, "_diffusers_hook", None)
                for name in list(registry.hooks) if registry is not None else ():
                    registry.remove_hook(name, recurse=False)
        else:
            from accelerate.hooks import remove_hook_from_submodules

            remove_hook_from_submodules(model)
        model.to(device)
        assert bitfuse.compare(expected, step(model)()) is None
    assert handle.report().fused == handle.report().seen


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("feature", [LEAVES, SEQUENTIAL], ids=lambda feature: feature.name)
def test_restore_leaves_nothing_of_ours_in_a_hook(feature, order, device):
    build, step = step_of("2.0", device)
    model = build()
    if order == ORDERS[0]:
        feature.use(model)
    handle = bitfuse.accelerate(model)
    if order == ORDERS[1]:
        feature.use(model)
    step(model)()
    assert all(isinstance(ours_in(norm), offload.Answering) for norm in _norms(model))
    handle.restore()
    del handle
    gc.collect()
    assert [name for name, module in model.named_modules() if ours_in(module) is not None] == []


@pytest.mark.usefixtures("launched_as_reference")
def test_a_hook_that_is_not_known_sees_the_input_and_is_named(device):
    from diffusers.hooks import HookRegistry, ModelHook

    class Watching(ModelHook):
        def __init__(self):
            self.seen = []

        def pre_forward(self, module, *args, **kwargs):
            self.seen.append(args[0])
            return args, kwargs

    build, step = step_of("2.0", device)
    model, hook = build(), Watching()
    expected = step(build())()
    LEAVES.use(model)
    handle = bitfuse.accelerate(model)
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[0].attn1.norm_q).register_hook(hook, "watching")
    assert bitfuse.compare(expected, step(model)()) is None
    assert [type(seen) for seen in hook.seen] == [torch.Tensor]
    site = next(site for site in handle.sites if site.name == "transformer_blocks.0.attn1")
    assert not site.fused
    assert "Watching) is attached to norm_q" in site.reasons[0]


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("what", ["a method of the class", "a method of the hook", "a derived class", "PyTorch's"])
def test_a_known_hook_that_does_something_else_is_not_asked(what, device, monkeypatch):
    build, step = step_of("2.0", device)
    model, seen = build(), []
    expected = step(build())()
    LEAVES.use(model)
    norm = model.transformer_blocks[0].attn1.norm_q
    hook = next(iter(norm._diffusers_hook.hooks.values()))
    kind = type(hook)

    def post_forward(module, output):
        seen.append(output)
        return output

    if what == "a method of the class":
        monkeypatch.setattr(kind, "pre_forward", lambda self, module, *args, **kwargs: (args, kwargs))
        norm._diffusers_hook._fn_refs[0].pre_forward = hook.pre_forward
    elif what == "a method of the hook":
        norm._diffusers_hook._fn_refs[0].post_forward = post_forward
    elif what == "a derived class":
        hook.__class__ = type("Derived", (kind,), {})
    else:
        norm.register_forward_hook(lambda module, args, output: seen.append(output))
    handle = bitfuse.accelerate(model)
    assert offload.who_else(norm) is not None
    assert bitfuse.compare(expected, step(model)()) is None
    site = next(site for site in handle.sites if site.name == "transformer_blocks.0.attn1")
    assert not site.fused
    assert len(site.reasons) == 1
    assert all(output.shape[-1] == norm.weight.shape[0] and output.ndim == 3 for output in seen)


@pytest.mark.usefixtures("launched_as_reference")
def test_a_new_norm_with_a_registry_and_no_hook_is_not_asked(device):
    """diffusers' registry is there before a hook is, and stays after it."""
    from diffusers.hooks import HookRegistry

    build, step = step_of("2.0", device)
    model = build()
    expected = step(build())()
    handle = bitfuse.accelerate(model)
    attn = model.transformer_blocks[0].attn1
    new = torch.nn.RMSNorm(attn.norm_q.normalized_shape, eps=attn.norm_q.eps)
    new.weight = attn.norm_q.weight
    attn.norm_q = new
    HookRegistry.check_if_exists_or_initialize(new)
    assert bitfuse.compare(expected, step(model)()) is None
    assert handle.report().fused == handle.report().seen


@pytest.mark.usefixtures("launched_as_reference")
def test_a_parametrized_weight_is_computed_from_what_the_hook_brings(device):
    """It is stored in fp8, for which PyTorch has no product."""
    from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

    class Twice(torch.nn.Module):
        def forward(self, weight):
            return weight * 2

    build, step = step_of("2.0", device)
    stock, model = build(), build()
    for each in (stock, model):
        norm = each.transformer_blocks[0].attn1.norm_q
        torch.nn.utils.parametrize.register_parametrization(norm, "weight", Twice())
        apply_layerwise_casting_hook(norm, torch.float8_e4m3fn, torch.bfloat16, non_blocking=False)
    expected = step(stock)()
    handle = bitfuse.accelerate(model)
    assert bitfuse.compare(expected, step(model)()) is None
    assert handle.report().fused == handle.report().seen - 1
    site = next(site for site in handle.sites if site.name == "transformer_blocks.0.attn1")
    assert "its weight is computed at each call" in site.reasons[0]


def test_a_norm_that_is_asked_gets_its_gradient():
    """On the CPU, where an offloaded weight is on the device of its gradient."""
    from diffusers.hooks import apply_group_offloading

    build, _ = step_of("2.0", torch.device("cpu"))
    found = []
    for accelerated in (False, True):
        model = build().requires_grad_(True)
        apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
        if accelerated:
            bitfuse.accelerate(model)
        attn = model.transformer_blocks[0].attn1
        x = torch.linspace(-2, 2, 3 * attn.to_q.in_features, dtype=torch.bfloat16).view(1, 3, -1)
        with torch.enable_grad():
            attn(x).float().square().sum().backward()
        found.append((attn.norm_q.weight.grad, attn.norm_k.weight.grad))
    assert bitfuse.compare(*found) is None


def test_every_hook_that_is_known_is_the_one_installed():
    """The sources that `KNOWN` has were read: those of the versions installed here are among them."""
    import importlib

    for module, name in offload.KNOWN:
        kind = getattr(importlib.import_module(module), name)
        assert offload._known(kind, kind.pre_forward, kind.post_forward), name
