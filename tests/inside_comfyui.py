"""bitfuse in ComfyUI's own code: its loader, its ModelPatcher, its sampler. `tests/test_comfyui.py` runs this file.

In processes of their own, one for each version: ComfyUI's import sets things for the whole process, and nothing of it
is taken back. By hand: python tests/comfyui_host.py 0.30.0 -m pytest tests/inside_comfyui.py
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import threading
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bitfuse
import comfyui_host as host
from bitfuse.hosts.handle import Options
from bitfuse.hosts.part import Part
from bitfuse.hosts.site import NotFused
from bitfuse.run.swap import Forward
from test_graphs import Stand

adapter = pytest.importorskip("bitfuse_comfyui.adapter")
from bitfuse_comfyui import attention, block, forms, graph, nodes, seeded, step, upstream, wrapper  # noqa: E402

BF16 = torch.bfloat16
ATTENTIONS = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")


@pytest.fixture
def interpreted(fresh_routes):
    """Kernels run in Triton's interpreter, after their proofs."""


@pytest.fixture(autouse=True)
def _references_in_their_place(request):
    if "interpreted" not in request.fixturenames:
        request.getfixturevalue("launched_as_reference")


@pytest.fixture(scope="module")
def loaded():
    """Patchers by LTX-2's version, made when they are asked for; tests clone them."""
    made = {}

    def get(version="2.0"):
        if version not in made:
            made[version] = host.load(version), host.config(version)
        return made[version]

    return get


@pytest.fixture(params=["2.0", "2.3"])
def model(request, loaded):
    return loaded(request.param)


@pytest.fixture
def of_2_3(loaded):
    return loaded("2.3")


def standing(patcher):
    """All attributes of all modules; but those of loading, which the sampler sets."""
    return {name: dict(vars(module)) for name, module in patcher.model.diffusion_model.named_modules()}


def node_of(patcher):
    return patcher.get_attachment(wrapper.KEY)


def reasons(patcher):
    return {reason for parked in node_of(patcher).prepared for site in parked.sites for reason in site.reasons}


def sites(patcher, state):
    """The names of the sites in this state."""
    return [site.name for parked in node_of(patcher).prepared for site in parked.sites if site.state == state]


def both(patcher, of, *, prepare=lambda patcher: None, options=Options(), latents=None, **how):  # noqa: B008
    """Sampled latents with bitfuse's node equal those without in every bit; returns the patcher with the node.

    prepare   what other nodes do to a clone: with stock, and before and after bitfuse's node
    """
    latents = latents or host.noise(of, how.pop("batch", 1))
    stock = patcher.clone()
    prepare(stock)
    expected = host.sample(stock, of, latents, **how)
    before = standing(patcher)
    ours = wrapper.attach(stock, options)
    assert bitfuse.compare(expected, host.sample(ours, of, latents, **how)) is None
    assert standing(patcher) == before
    after = wrapper.attach(patcher, options)
    prepare(after)
    assert bitfuse.compare(expected, host.sample(after, of, latents, **how)) is None
    assert bitfuse.compare(expected, host.sample(stock, of, latents, **how)) is None
    assert all(t.isfinite().all() for t in expected)
    return ours


# -- whole samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("image_to_video", [False, True])
def test_sampled_latents_are_equal_and_nothing_is_left(model, image_to_video, batch):
    ours = both(*model, options=Options(strict=True), image_to_video=image_to_video, batch=batch)
    (parked,) = node_of(ours).prepared
    layers, per_block = 2, 16 if model[1].get("apply_gated_attention") is None else 24
    assert (parked.report().fused, parked.report().seen) == (layers * per_block, layers * per_block)
    assert not sites(ours, "not called yet")


@pytest.mark.usefixtures("interpreted")
def test_kernels_in_the_interpreter(of_2_3):
    """Not the references in their place, as in the other tests."""
    patcher, of = of_2_3
    run = forward_of(patcher, of)
    expected = run()
    with bitfuse.accelerated(patcher, strict=True) as handle:
        assert bitfuse.compare(expected, run()) is None
        assert {site.state for site in handle.sites} == {"fused"}


def forward_of(patcher, of, **options):
    """A call of the model itself; a copy of the latents for each, as it writes into them."""
    generator = torch.Generator().manual_seed(4)
    latents = [t.to(BF16) for t in host.noise(of)]
    text = torch.randn(1, 9, host.text_channels(of), generator=generator).to(BF16)
    model = patcher.model.diffusion_model

    @torch.inference_mode()
    def run():
        x = [t.clone() for t in latents]
        return tuple(model(x, torch.tensor([0.7]), text, transformer_options=dict(options)))

    return run


@pytest.mark.parametrize("swapped", ["modulation", "frames_of", "once"])
def test_a_site_that_is_wired_wrongly_is_seen(of_2_3, swapped, monkeypatch):
    """What the equalities of this file are worth."""
    patcher, of = of_2_3
    latents, how = host.noise(of), {"image_to_video": True}
    expected = host.sample(patcher, of, latents, **how)
    if swapped == "modulation":
        monkeypatch.setattr(block, "modulation", lambda scale, shift: (shift[0], scale[0], shift[1], scale[1]))
    elif swapped == "frames_of":  # rows of values, one for each frame, taken for others
        rows = step._rows
        monkeypatch.setattr(step, "_rows", lambda *given: rows(*given).flip(0))
    else:
        add = block.Stream.add
        monkeypatch.setattr(block.Stream, "add", lambda self, *given, once: add(self, *given, once=False))
    try:
        found = host.sample(wrapper.attach(patcher, Options()), of, latents, **how)
    except (TypeError, RuntimeError):
        return
    assert bitfuse.compare(expected, found) is not None


def test_audits_of_every_call(of_2_3):
    ours = both(*of_2_3, options=Options(audit=1))
    assert "audit, 1 call in 1: 96 calls of 48 sites, no mismatch" in node_of(ours).report()


# -- what is around it -------------------------------------------------------------------------------------------------


def test_other_branches_run_the_stock_model(of_2_3):
    """All clones share one set of modules: nothing stands in them before, between and after forwards."""
    patcher, of = of_2_3
    seen = []

    def look(executor, *args, **kwargs):
        seen.append({type(m).__name__ for m in patcher.model.diffusion_model.modules() if ours_in_module(m)})
        return executor(*args, **kwargs)

    import comfy.patcher_extension as extension

    ours = wrapper.attach(patcher, Options())
    ours.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "look", look)
    host.sample(ours, of, host.noise(of), steps=1)
    assert seen
    assert seen[0] == {"LTXAVModel", "BasicAVTransformerBlock", "CrossAttention", "GELU_approx"}
    stock = patcher.clone()
    stock.add_wrapper_with_key(extension.WrappersMP.DIFFUSION_MODEL, "look", look)
    seen.clear()
    host.sample(stock, of, host.noise(of), steps=1)
    assert seen == [set()] * len(seen)
    assert wrapper.attach(ours, Options()).get_all_wrappers(extension.WrappersMP.DIFFUSION_MODEL)[0] is not node_of(
        ours
    )


def ours_in_module(module):
    return any(isinstance(value, Forward) for value in vars(module).values())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_or_an_interrupt_nothing_is_left(of_2_3, error, monkeypatch):
    patcher, of = of_2_3
    ours, before = wrapper.attach(patcher, Options()), standing(patcher)
    ff = patcher.model.diffusion_model.transformer_blocks[1].ff
    calls = []

    def fail(*args):
        calls.append(args)
        raise error("in the middle")

    handle = ff.register_forward_pre_hook(fail)
    with pytest.raises(error, match="in the middle"):
        host.sample(ours, of, host.noise(of))
    handle.remove()
    assert len(calls) == 1
    assert standing(patcher) == before
    assert not node_of(ours).prepared[0].under_way
    both(patcher, of)


def test_two_threads_run_one_model(of_2_3):
    """As ComfyUI runs the two samples of guidance on two GPUs, were it on one: right bits, and nothing left."""
    patcher, of = of_2_3
    model, node = patcher.model.diffusion_model, wrapper.Wrapper(Options())
    level = torch.tensor([0.7])
    texts = [torch.randn(1, 9, host.text_channels(of)).to(BF16) for _ in range(4)]

    def run(text, call):
        with torch.inference_mode():
            x = [t.to(BF16) for t in host.noise(of)]
            return tuple(call(x, level, text, None, a_timestep=level))

    expected = [run(text, model._forward) for text in texts]
    before = standing(patcher)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda text: run(text, lambda *a, **k: node(Executor(model), *a, **k)), texts * 4))
    assert all(bitfuse.compare(a, b) is None for a, b in zip(expected * 4, found, strict=True))
    assert standing(patcher) == before


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_weights_are_freed_with_their_model(cuda_graph):
    """At once, not when Python's collector finds a cycle: they may be all of a GPU's memory."""
    of = host.config("2.0")
    model = upstream.av_model.LTXAVModel(**of, dtype=BF16, device="cpu", operations=upstream.ops.disable_weight_init)
    for p in model.parameters():
        p.data.normal_(std=0.1)
    node = wrapper.Wrapper(Options(cuda_graph=cuda_graph))

    def run(model):
        x = [t.to(BF16) for t in host.noise(of)]
        with torch.inference_mode():
            level, text = torch.tensor([0.7]), torch.randn(1, 9, host.text_channels(of)).to(BF16)
            node(Executor(model), x, level, text, None, a_timestep=level)

    run(model)
    assert len(node.prepared) == 1
    weights = [weakref.ref(p) for p in model.transformer_blocks.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model, p
        assert not node.prepared
        assert not any(reference() is not None for reference in weights)
    finally:
        gc.enable()


def test_a_node_that_is_gone_leaves_nothing_behind(of_2_3):
    """The model lives on, in other branches: its CUDA graphs would be held with it."""
    patcher, of = of_2_3
    ours = wrapper.attach(patcher, Options(cuda_graph=True))
    host.sample(ours, of, host.noise(of), steps=1)
    (parked,) = node_of(ours).prepared
    gone = [weakref.ref(one) for one in (parked, parked.graphs[0])]
    del parked, ours
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def calls_of(patcher, of):
    """call(node, options, frames): a forward of the model with this node's wrapper, or without one (None)."""
    model, level = patcher.model.diffusion_model, torch.tensor([0.7])
    text = torch.randn(1, 9, host.text_channels(of), generator=torch.Generator().manual_seed(4)).to(BF16)

    @torch.inference_mode()
    def call(node, options, frames=2):
        x = [t.to(BF16) for t in host.noise(of, frames=frames)]
        around = Executor(model) if node is None else lambda *a, **k: node(Executor(model), *a, **k)
        return tuple(around(x, level, text, None, a_timestep=level, transformer_options=options))

    return call


def test_a_forward_in_the_midst_of_another(of_2_3):
    """Which a node that replaces a block may run: each has tables of its own, and both are fused to their ends."""
    patcher, of = of_2_3
    call = calls_of(patcher, of)

    def both_of(node):
        inner = []

        def replace(args, extra):
            inner.append(call(node, {}, frames=1))
            return extra["original_block"](args)

        return call(node, {"patches_replace": {"dit": {("double_block", 0): replace}}}) + inner[0]

    before = standing(patcher)
    assert bitfuse.compare(both_of(None), both_of(wrapper.Wrapper(Options(strict=True)))) is None
    assert standing(patcher) == before


@pytest.mark.parametrize("strict", [False, True])
def test_nodes_of_two_branches_at_once(of_2_3, strict):
    """The second is made, runs and ends in the midst of the first's forward, and outlives it in another thread."""
    patcher, of = of_2_3
    call, before = calls_of(patcher, of), standing(patcher)
    first, second = (wrapper.Wrapper(Options(strict=strict)) for _ in range(2))
    expected, found = call(None, {}), []
    first_is_over = threading.Event()

    def wait(args, extra):
        assert first_is_over.wait(60)
        return extra["original_block"](args)

    with ThreadPoolExecutor(1) as pool:

        def begin(args, extra):
            found.append(call(second, {}))
            begun = threading.Event()

            def note(args, extra):
                begun.set()
                return wait(args, extra)

            options = {"patches_replace": {"dit": {("double_block", 0): note}}}
            found.append(pool.submit(call, second, options))
            assert begun.wait(60)
            return extra["original_block"](args)

        found.append(call(first, {"patches_replace": {"dit": {("double_block", 1): begin}}}))
        first_is_over.set()
        found[1] = found[1].result()
    assert all(bitfuse.compare(expected, one) is None for one in found)
    assert standing(patcher) == before
    seen = [site for parked in first.prepared for site in parked.sites]
    assert {site.state for site in seen} == {"fused"}
    assert {site.fused for site in seen} == {3}
    assert bitfuse.compare(expected, call(second, {})) is None


class Executor:
    """ComfyUI's, of the model's own forward."""

    def __init__(self, model):
        self._model = weakref.ref(model)

    @property
    def class_obj(self):
        return self._model()

    def __call__(self, *args, **kwargs):
        return self._model()._forward(*args, **kwargs)


def feed_forwards(patcher):
    return [ff for one in patcher.model.diffusion_model.transformer_blocks for ff in (one.ff, one.audio_ff)]


@pytest.mark.parametrize("how", ["resident", "cast", "patched"])
def test_the_feed_forwards_activate_in_place(of_2_3, how, monkeypatch):
    """Also where a projection's weight is cast for the call, or patched by a LoRA: what it gives is nobody's."""
    patcher, of = of_2_3
    modules = [ff.net for ff in feed_forwards(patcher)]
    for net in modules:
        if how != "resident":
            monkeypatch.setattr(net[0].proj, "comfy_cast_weights", True)
        if how == "patched":
            monkeypatch.setattr(net[0].proj, "weight_function", [lambda weight: weight * 1.5])
    kind, given, taken = type(modules[0][2]), {}, {}
    forward = kind.forward

    def noted(self, x):
        taken[self] = x.data_ptr()
        out = forward(self, x)
        given[self] = out.data_ptr()
        return out

    ours = wrapper.attach(patcher, Options())
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", noted)
        host.sample(ours, of, host.noise(of), steps=1)
    assert [given[net[0].proj] for net in modules] == [taken[net[2]] for net in modules]
    assert "GELU in place" not in node_of(ours).report()
    both(patcher, of)


def test_a_hook_on_a_projection_may_look(of_2_3):
    patcher, of = of_2_3
    seen = []
    proj = feed_forwards(patcher)[0].net[0].proj
    removed = proj.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    try:
        ours = both(patcher, of, steps=1)
    finally:
        removed.remove()
    assert seen
    assert "somebody's hook or forward on the projection" in node_of(ours).report()


def test_options_may_be_given_to_all_blocks_by_their_place(of_2_3, monkeypatch):
    """As a node may that runs the blocks by itself."""
    patcher, of = of_2_3
    run = forward_of(patcher, of)
    expected = run()
    with bitfuse.accelerated(patcher) as handle:
        model = patcher.model.diffusion_model
        ours = model._process_transformer_blocks
        by_place = lambda *args, transformer_options, **kwargs: ours(*args, transformer_options, **kwargs)  # noqa: E731
        monkeypatch.setitem(vars(model), "_process_transformer_blocks", by_place)
        assert bitfuse.compare(expected, run()) is None
        monkeypatch.undo()
    assert "fused" in {site.state for site in handle.sites}


def test_an_activation_of_another_nodes_stays_and_is_named(of_2_3):
    def prepare(patcher):
        activation = feed_forwards(patcher)[0].net[0]
        patcher.add_object_patch(
            "diffusion_model.transformer_blocks.0.ff.net.0.forward", lambda x: activation.proj(x).relu()
        )

    patcher, of = of_2_3
    ours = both(patcher, of, prepare=prepare, steps=1)
    (parked,) = node_of(ours).prepared
    assert set(parked.extras.gelu.reasons) == {wrapper.REPLACED}


def test_lora_patches(of_2_3):
    patcher, of = of_2_3
    names = ("attn1.q_norm.weight", "attn1.to_q.weight", "ff.net.2.weight", "scale_shift_table")
    generator = torch.Generator().manual_seed(9)

    def lora(clone):
        state = clone.model.diffusion_model.state_dict()
        keys = [f"transformer_blocks.0.{name}" for name in names]
        patches = {f"diffusion_model.{k}": ("diff", (torch.randn(state[k].shape, generator=generator),)) for k in keys}
        assert set(clone.add_patches(patches, 0.3)) == set(patches)
        generator.manual_seed(9)

    ours = both(patcher, of, prepare=lora)
    assert not reasons(ours)


def test_weights_that_are_patched_at_each_call(of_2_3):
    """As ComfyUI does to weights that are not loaded: `weight_function`, here of a norm of queries too."""
    patcher, of = of_2_3
    attn = patcher.model.diffusion_model.transformer_blocks[0].attn1
    run = forward_of(patcher, of)
    for module in (attn.q_norm, attn.to_v):
        module.weight_function = [lambda weight: weight * 1.5]
    try:
        expected = run()
        with bitfuse.accelerated(patcher.model.diffusion_model, strict=True):
            assert bitfuse.compare(expected, run()) is None
    finally:
        for module in (attn.q_norm, attn.to_v):
            del module.weight_function
    assert bitfuse.compare(expected, run()) is not None


def test_fp8_weights():
    """As the loader's weight_dtype has them: norms of queries and tables are fp8 too, and cast at each call."""
    patcher, of = host.load("2.3", dtype=torch.float8_e4m3fn), host.config("2.3")
    assert patcher.model.diffusion_model.transformer_blocks[0].attn1.q_norm.weight.dtype == torch.float8_e4m3fn
    ours = both(patcher, of, options=Options(strict=True))
    assert len(sites(ours, "fused")) == 48


@pytest.mark.parametrize("quantisation", ["float8_e4m3fn", "mxfp8", "nvfp4", "int8_tensorwise"])
def test_quantised_checkpoints(quantisation):
    """Linears in a format of ComfyUI's own, whose weights are tensors of comfy-kitchen's; here by its eager backend."""
    if quantisation not in getattr(upstream.quant_ops, "QUANT_ALGOS", {}):
        pytest.skip(f"{upstream.NAME} has no {quantisation}")
    with torch.inference_mode():  # as ComfyUI loads and runs all: such weights can't be moved outside of it
        patcher, of = host.load("2.3", quantisation=quantisation), host.config("2.3")
        first = patcher.model.diffusion_model.transformer_blocks[0]
        for linear in (first.attn1.to_q, first.ff.net[0].proj, first.ff.net[2]):
            assert type(linear.weight).__name__ == "QuantizedTensor"
        ours = both(patcher, of, options=Options(strict=True))
    assert len(sites(ours, "fused")) == 48
    assert "GELU in place" not in node_of(ours).report()


class Subclass(torch.Tensor):
    """As GGUF's loader has weights: a tensor subclass, of which nothing is known."""


class OfItsOwn(Subclass):
    """One that has rules of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [Subclass, OfItsOwn])
def test_weights_of_a_tensor_subclass(kind):
    patcher, of = host.load("2.0"), host.config("2.0")
    for found in patcher.model.diffusion_model.transformer_blocks:
        tables = [(found, name) for name in found._parameters if "table" in name]
        for owner, name in (*tables, (found.attn1.q_norm, "weight")):
            weight = getattr(owner, name).data.as_subclass(kind)
            owner._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)
            assert isinstance(getattr(owner, name), kind)
    ours = both(patcher, of)
    assert bool(reasons(ours)) == (kind is OfItsOwn)
    assert all("OfItsOwn" in reason for reason in reasons(ours))


@pytest.mark.parametrize("times", [1, 2])
def test_patches_replace(of_2_3, times):
    """A node takes a block's place, and calls it, or calls it twice: the second time on what the first has written."""
    called = []

    def replace(args, extra):
        called.append(args["img"][0])
        given = args["img"][0].clone()
        out = [extra["original_block"](args) for _ in range(times)][-1]
        assert not torch.equal(args["img"][0], given)  # stock writes in place
        assert out["img"][0].data_ptr() == args["img"][0].data_ptr()
        return out

    def prepare(clone):
        clone.set_model_patch_replace(replace, "dit", "double_block", 1)

    ours = both(*of_2_3, prepare=prepare)
    assert called
    assert not reasons(ours)


def test_tokens_that_are_a_slice(of_2_3):
    """What a node hands to a block need not lie in one piece."""

    def replace(args, extra):
        given = tuple(torch.cat([t, t], dim=1)[:, : t.shape[1]] for t in args["img"])
        return extra["original_block"]({**args, "img": given})

    def prepare(clone):
        clone.set_model_patch_replace(replace, "dit", "double_block", 1)

    ours = both(*of_2_3, prepare=prepare, batch=2, image_to_video=True, steps=1)
    fallen = sites(ours, "partly fused") + sites(ours, "fallen back")
    assert fallen == ["transformer_blocks.1.audio_norm1", "transformer_blocks.1.audio_norm2"]


def test_sums_of_another_dtype(of_2_3):
    """What is added in place keeps the dtype of the tokens, whatever another node's hook adds to them."""
    patcher, of = of_2_3
    first = patcher.model.diffusion_model.transformer_blocks[0]
    names = ("attn1", "attn2", "audio_to_video_attn", "audio_ff")
    hooks = [getattr(first, n).register_forward_hook(lambda m, a, out: out.float() * 1.001) for n in names]
    try:
        ours = both(patcher, of, steps=1)
    finally:
        for hook in hooks:
            hook.remove()
    seen = node_of(ours).prepared[0].sites
    said = [site.name.rpartition(".")[2] for site in seen if "keeps its dtype" in str(site.reasons)]
    assert sorted(said) == ["audio_output", "audio_to_video_norm", "norm2", "norm3"]


def test_an_attention_override_is_called_as_often(of_2_3):
    calls = []

    def override(chosen, *args, **kwargs):
        calls.append(args[0].shape)
        return chosen(*args, **kwargs)

    def prepare(clone):
        clone.model_options["transformer_options"]["optimized_attention_override"] = override

    both(*of_2_3, prepare=prepare, steps=1)
    runs = 4  # stock, with the node, the node first, and stock again; each of two samples of guidance in one batch
    assert len(calls) % runs == 0
    assert calls[: len(calls) // runs] * runs == calls


@pytest.mark.parametrize("name", ["transformer_blocks.0", "transformer_blocks.0.attn1", "transformer_blocks.1.attn2"])
def test_a_module_with_another_nodes_forward_stays_theirs(of_2_3, name):
    """An object patch on one forward, as KJNodes' nodes set it. What it leaves behind is stock's own, and fused."""
    patcher, of = of_2_3
    theirs = []
    module = patcher.model.diffusion_model.get_submodule(name)

    def forward(self, *args, **kwargs):
        theirs.append(name)
        return type(self).forward(self, *args, **kwargs)

    def prepare(clone):
        clone.add_object_patch(f"diffusion_model.{name}.forward", types.MethodType(forward, module))

    latents = host.noise(of)
    expected = host.sample(patcher, of, latents, steps=1)
    ours = wrapper.attach(patcher, Options())
    prepare(ours)
    assert bitfuse.compare(expected, host.sample(ours, of, latents, steps=1)) is None
    called = len(theirs)
    assert called
    assert wrapper.REPLACED in reasons(ours)
    assert any(site.startswith("transformer_blocks.1.norm") for site in sites(ours, "fused"))
    ours.unpatch_model()
    left = vars(module).get("forward")
    assert left is None or left == type(module).forward.__get__(module)
    again = wrapper.attach(patcher, Options(strict=True))
    host.sample(patcher, of, latents, steps=1)  # it is loaded anew
    before = standing(patcher)
    assert bitfuse.compare(expected, host.sample(again, of, latents, steps=1)) is None
    assert standing(patcher) == before
    assert len(theirs) == called
    assert len(sites(again, "fused")) == 48
    vars(module).pop("forward", None)


@pytest.mark.parametrize(
    "options",
    [
        {"run_vx": False},
        {"run_ax": False},
        {"a2v_cross_attn": False},
        {"v2a_cross_attn": False},
        {"a2v_cross_attn": False, "v2a_cross_attn": False},
        {"run_vx": False, "v2a_cross_attn": False},
    ],
    ids=lambda options: ",".join(options),
)
def test_parts_that_are_left_out(model, options):
    def prepare(clone):
        clone.model_options["transformer_options"] |= options

    ours = both(*model, prepare=prepare, image_to_video=True, steps=1)
    assert not reasons(ours)


def test_video_without_audio(model):
    ours = both(*model, latents=host.noise(model[1]), audio=False, steps=1)
    assert not reasons(ours)


def test_a_spatial_mask(model):
    """Timesteps are of each token then, not of each frame."""
    mask = torch.ones(1, 1, 2, 3, 4)
    mask[:, :, :, 1] = 0
    ours = both(*model, mask=mask, steps=1)
    assert not reasons(ours)


@pytest.mark.parametrize("kind", ["guide", "plain"])
def test_a_mask_of_the_videos_attention(of_2_3, kind):
    patcher, of = of_2_3
    attn = patcher.model.diffusion_model.transformer_blocks[0].attn1
    x = torch.randn(1, 24, of["cross_attention_dim"]).to(BF16)
    weights = torch.rand(1, 8).to(BF16)
    guide = upstream.model.GuideAttentionMask(24, 16, 8, weights)
    mask = guide if kind == "guide" else torch.zeros(24, 24, dtype=BF16).masked_fill_(torch.eye(24) > 0, -10.0)
    with torch.inference_mode():
        expected = attn(x, mask=mask)
        with bitfuse.accelerated(patcher.model.diffusion_model) as handle:
            assert bitfuse.compare(expected, attn(x, mask=mask)) is None
            assert [site.name for site in handle.sites if site.fused] == [
                "transformer_blocks.0.attn1",
                "transformer_blocks.0.attn1.gate",
            ]
        assert bitfuse.compare(expected, attn(x)) is not None


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_guides(of_2_3, strength):
    """A keyframe at the end of the video; from a strength other than 1 on the attention has a mask for it."""
    patcher, of = of_2_3
    model, masks = patcher.model.diffusion_model, []
    attend = upstream.model._attention_with_guide_mask
    generator = torch.Generator().manual_seed(4)
    latents = [t.to(BF16) for t in host.noise(of, frames=3)]
    text = torch.randn(1, 9, host.text_channels(of), generator=generator).to(BF16)
    v_timestep = torch.full((1, 36, 1), 0.7)
    v_timestep[:, 24:] = 0.0
    given = {
        "keyframe_idxs": torch.arange(72.0).reshape(1, 1, 36, 2).expand(1, 3, 36, 2)[:, :, :12],
        "denoise_mask": (v_timestep > 0).float().view(1, 1, 3, 3, 4),
        "guide_attention_entries": [{"pre_filter_count": 12, "strength": strength}],
    }

    @torch.inference_mode()
    def run():
        x = [t.clone() for t in latents]
        return tuple(model(x, (v_timestep, torch.tensor([0.7])), text, transformer_options={}, **given))

    expected = run()
    with bitfuse.accelerated(patcher, strict=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream.model, "_attention_with_guide_mask", lambda *a, **k: masks.append(a) or attend(*a, **k))
        assert bitfuse.compare(expected, run()) is None
    assert len(masks) == (2 if strength != 1.0 else 0)


@pytest.mark.slow  # the compiler's import
def test_beside_torch_compile(of_2_3):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def prepare(clone):
        set_torch_compile_wrapper(model=clone, backend="eager")

    both(*of_2_3, prepare=prepare, steps=1)


# -- rotary embedding --------------------------------------------------------------------------------------------------


def test_a_rotary_form_that_is_not_known_stays_comfyuis(of_2_3, monkeypatch):
    monkeypatch.setitem(forms.FORMS, True, [])
    ours = both(*of_2_3, steps=1)
    assert any("the rotary embedding stays ComfyUI's" in reason for reason in reasons(ours))
    partly = sites(ours, "partly fused")
    assert partly
    assert all(name.rpartition(".")[2] in ATTENTIONS for name in partly)
    with pytest.raises(NotFused, match="rotary embedding stays ComfyUI's"):
        host.sample(wrapper.attach(of_2_3[0], Options(strict=True)), of_2_3[1], host.noise(of_2_3[1]), steps=1)


@pytest.mark.parametrize("split", [True, False])
def test_wrong_forms_are_found_out(of_2_3, split):
    """Of the candidates one has the host's bits on a CPU; the comparison tells the others apart."""
    device, (patcher, _) = torch.device("cpu"), of_2_3
    attn = patcher.model.diffusion_model.transformer_blocks[0].attn1
    sizes = upstream.NAME, attn.heads, attn.dim_head, BF16, device
    equal = [found[0].qk.name for found in forms.FORMS[split] if not any(one.difference(*sizes) for one in found)]
    forms_of = {True: ("split_rotary_per_op", "split_rotary_three_ops")}
    forms_of[False] = ("interleaved_rotary_per_op", "interleaved_rotary_addcmul")
    assert equal == [f"qk_rms_norm_{forms_of[split][upstream.BY_KITCHEN]}"]


def test_interleaved_rotary_embedding():
    patcher, of = host.load("2.0", rope_type="interleaved"), host.config("2.0", rope_type="interleaved")
    ours = both(patcher, of, options=Options(strict=True))
    names = {site.operator for parked in node_of(ours).prepared for site in parked.sites if "attn1" in site.name}
    assert len(names) == 1
    assert "interleaved" in names.pop()


def test_the_first_call_of_each_shape_is_compared(of_2_3, monkeypatch):
    """A compiled function may choose its way by a shape: one that differs for some shape only is found out there."""
    name = "apply_rotary_emb_qk" if upstream.BY_KITCHEN else "apply_rotary_emb"
    function, shapes = getattr(upstream.model, name), []

    def other(x, *more):
        out = function(x, *more)
        shapes.append(tuple(x.shape))
        if x.shape[1] == 24:
            first = out[0] if isinstance(out, tuple) else out
            first.view(torch.int16)[0, 0, 0] ^= 1
        return out

    forms_of = attention.Forms()
    patcher, _ = of_2_3
    attn = patcher.model.diffusion_model.transformer_blocks[0].attn1
    form, _ = forms_of.of(attn, True, BF16, torch.device("cpu"))
    monkeypatch.setattr(upstream.model, name, other)
    for tokens in (23, 24):
        q, k = (torch.randn(1, tokens, 256).to(BF16) for _ in range(2))
        cos, sin = (torch.randn(1, 4, tokens, 32).to(BF16) for _ in range(2))
        pe = (forms._matrix(cos, sin, None), True) if upstream.BY_KITCHEN else (cos, sin, True)
        why = forms_of.why_not_at(form, q, k, (pe, None), [cos, sin, cos, sin])
        assert (why is None) == (tokens == 23), why
        seen = len(shapes)
        assert forms_of.why_not_at(form, q, k, (pe, None), [cos, sin, cos, sin]) == why
        assert len(shapes) == seen, "once for each shape"
    assert "for q [1, 24, 256] and k [1, 24, 256] it says otherwise: output 0 differs at [0, 0, 0]" in why


@pytest.mark.skipif(not upstream.BY_KITCHEN, reason="tables are cos and sin up to 0.27, which may be any")
def test_a_matrix_that_somebody_else_made(of_2_3):
    """It need not be a rotation: ComfyUI's own function multiplies by it."""
    patcher, of = of_2_3

    def replace(args, extra):
        matrix, split = args["v_pe"]
        return extra["original_block"]({**args, "v_pe": (matrix * 1.5, split)})

    def prepare(clone):
        clone.set_model_patch_replace(replace, "dit", "double_block", 1)

    ours = both(patcher, of, prepare=prepare, steps=1)
    assert any("not those that the model has made" in reason for reason in reasons(ours))


@pytest.mark.skipif(not upstream.BY_KITCHEN, reason="tables are cos and sin up to 0.27, which may be any")
@pytest.mark.parametrize("method", ["_precompute_freqs_cis", "_prepare_positional_embeddings"])
def test_tables_that_another_node_makes(of_2_3, method):
    """From some step on: shapes that were compared before then are of the model's own tables."""
    patcher, of = of_2_3
    model, latents = patcher.model.diffusion_model, host.noise(of)

    def other(found):
        if torch.is_tensor(found):
            return found * torch.tensor([[1.0, 1.5], [1.0, 1.0]], dtype=found.dtype)
        return type(found)(map(other, found)) if isinstance(found, (tuple, list)) else found

    def make(self, *args, **kwargs):
        return other(getattr(type(self), method)(self, *args, **kwargs))

    def prepare(clone):
        clone.add_object_patch(f"diffusion_model.{method}", types.MethodType(make, model))
        return clone

    ours = wrapper.attach(patcher, Options())
    host.sample(ours, of, latents, steps=1)
    assert not reasons(ours)
    expected = host.sample(prepare(patcher.clone()), of, latents, steps=1)
    assert bitfuse.compare(expected, host.sample(prepare(ours.clone()), of, latents, steps=1)) is None
    assert any("not those that the model has made" in reason for reason in reasons(ours))
    own = host.sample(patcher, of, latents, steps=1)
    assert bitfuse.compare(expected, own) is not None
    again = wrapper.attach(patcher, Options(strict=True))  # the patch was taken back
    assert bitfuse.compare(own, host.sample(again, of, latents, steps=1)) is None
    vars(model).pop(method, None)


# -- code that is not known --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "of"),
    [
        ("BasicAVTransformerBlock.forward", "norm1"),
        ("CrossAttention.forward", "attn1"),
        ("disable_weight_init.RMSNorm.forward", "attn2"),
    ],
)
def test_a_version_that_was_not_read_runs_stock(of_2_3, source, of, monkeypatch):
    monkeypatch.setitem(upstream.READ, source, {"0" * 16})
    ours = both(*of_2_3, steps=1)
    assert f"transformer_blocks.0.{of}" in sites(ours, "left alone")
    assert any(f"{source} of {upstream.NAME} is not a source that bitfuse knows" in why for why in reasons(ours))


def test_what_is_replaced_behind_its_back_runs_stock(of_2_3, monkeypatch):
    patcher, of = of_2_3
    ours, latents = wrapper.attach(patcher, Options()), host.noise(of)
    host.sample(ours, of, latents, steps=1)
    monkeypatch.setattr(upstream.common_dit, "rms_norm", lambda x, weight=None, eps=1e-6: x * 2)
    expected = host.sample(patcher, of, latents, steps=1)
    assert bitfuse.compare(expected, host.sample(ours, of, latents, steps=1)) is None
    assert any("rms_norm was replaced" in reason for reason in reasons(ours))


# -- the CUDA graph, with a stand-in for CUDA --------------------------------------------------------------------------


class Cpu(Stand):
    """Tensors of the CPU count as the device's, but a mask of booleans: the graph's tests have one more rule."""

    def holds(self, t):
        return True


@pytest.fixture
def graphed(of_2_3, monkeypatch):
    from bitfuse.run import twin

    monkeypatch.setattr(twin, "ALIGNED", 64)
    patcher, of = of_2_3
    ours = wrapper.attach(patcher, Options(cuda_graph=True))
    (replay,) = node_of(ours).of(patcher.model.diffusion_model).graphs
    replay._cuda = Cpu()
    return ours, of, replay


@pytest.mark.parametrize("image_to_video", [False, True])
def test_replays_have_the_bits_of_the_forward(graphed, image_to_video):
    ours, of, replay = graphed
    latents, how = host.noise(of), {"image_to_video": image_to_video, "steps": 6}
    expected = host.sample(stock_of(ours), of, latents, **how)
    assert bitfuse.compare(expected, host.sample(ours, of, latents, **how)) is None
    assert (replay.captures, replay.replays) == (1, 4), dict(replay.reasons)


def test_no_graph_with_tables_of_another_nodes(graphed):
    ours, of, replay = graphed
    model = ours.model.diffusion_model
    ours.add_object_patch("diffusion_model._forward", lambda *a, **k: type(model)._forward(model, *a, **k))
    latents = host.noise(of)
    expected = host.sample(stock_of(ours), of, latents, steps=4)
    assert bitfuse.compare(expected, host.sample(ours, of, latents, steps=4)) is None
    assert (replay.captures, dict(replay.reasons)) == (0, {"another node has replaced _forward of this model": 4})
    ours.unpatch_model()
    vars(model).pop("_forward", None)


def stock_of(patcher):
    import comfy.patcher_extension as extension

    clone = patcher.clone()
    clone.remove_wrappers_with_key(extension.WrappersMP.DIFFUSION_MODEL, wrapper.KEY)
    return clone


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimized_attention_override": lambda chosen, *a, **k: chosen(*a, **k)}, "'optimized_attention_override'"),
        ({"patches_replace": {"dit": {("double_block", 0): lambda a, e: e["original_block"](a)}}}, "'patches_replace'"),
        ({"somebody": object()}, "transformer_options has 'somebody'"),
    ],
)
def test_no_graph_where_somebody_else_takes_part(graphed, options, said):
    ours, of, replay = graphed
    ours.model_options["transformer_options"] |= options
    latents = host.noise(of)
    expected = host.sample(stock_of(ours), of, latents, steps=4)
    assert bitfuse.compare(expected, host.sample(ours, of, latents, steps=4)) is None
    assert replay.captures == 0
    assert any(said in reason for reason in replay.reasons)


def test_no_graph_for_weights_that_move():
    def why(options, patched=()):
        return graph._why_not(options, None, list(patched))

    assert why({"prefetch_dynamic_vbars": False, "sigmas": torch.ones(1), "patches": {}}) is None
    assert "dynamic VRAM" in why({"prefetch_dynamic_vbars": True})
    linear = upstream.ops.disable_weight_init.Linear(2, 2)
    assert why({}, [weakref.ref(linear)]) is None
    linear.weight_function = [lambda weight: weight]
    assert "LoRA" in why({}, [weakref.ref(linear)])
    guide = upstream.model.GuideAttentionMask(24, 16, 8, torch.rand(1, 8))
    assert "guide" in graph._why_not({}, guide, [])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_graph_gets_weights_that_stay(of_2_3, cuda_graph, known, monkeypatch):
    """Of a model with dynamic VRAM: a clone without that, where ComfyUI knows the file. On a CPU it has none."""
    patcher, asked = of_2_3[0].clone(), []
    clone = type(patcher).clone

    def noting(self, **options):
        asked.append(options)
        if options and not known:
            raise RuntimeError("Cannot create non-dynamic delegate: cached_patcher_init is not initialized.")
        return clone(self)

    monkeypatch.setattr(type(patcher), "clone", noting)
    monkeypatch.setattr(type(patcher), "is_dynamic", lambda self: True)
    assert node_of(wrapper.attach(patcher, Options(cuda_graph=cuda_graph)))
    assert asked[0] == ({"disable_dynamic": True} if cuda_graph else {})
    assert len(asked) == (2 if cuda_graph and not known else 1)


def test_graphs_are_given_back_when_the_model_is_unloaded(graphed):
    ours, of, replay = graphed
    host.sample(ours, of, host.noise(of), steps=4)
    assert replay.graphs == 1
    node_of(ours).release(ours, False)  # of a clone that Python frees
    assert replay.graphs == 1
    ours.detach()
    assert replay.graphs == 0


# -- the front door, and the tools -------------------------------------------------------------------------------------


def test_the_front_door(of_2_3):
    patcher, of = of_2_3
    run, before = forward_of(patcher, of), standing(patcher)
    expected = run()
    with bitfuse.accelerated(patcher) as handle:  # a ModelPatcher, which holds the model
        assert handle.host == upstream.NAME
        assert bitfuse.compare(expected, run()) is None
        assert (handle.report().fused, handle.report().seen) == (48, 48)
    assert standing(patcher) == before
    assert bitfuse.compare(expected, run()) is None
    with pytest.raises(ValueError, match="keep_text is True"):
        bitfuse.accelerate(patcher, keep_text=True)


def test_gradients_run_stock(of_2_3):
    patcher, of = of_2_3
    attn = patcher.model.diffusion_model.transformer_blocks[0].attn1
    x = torch.randn(1, 5, of["cross_attention_dim"]).to(BF16).requires_grad_()
    with bitfuse.accelerated(patcher.model.diffusion_model) as handle:
        attn(x).sum().backward()
        (site,) = (site for site in handle.sites if site.name == "transformer_blocks.0.attn1")
        assert site.reasons == ["a gradient is required of the block's inputs or weights"]
    assert x.grad is not None


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_the_shared_conformance_check(version):
    from bitfuse.tools.compare import conformance

    found = conformance.check("comfyui", version, torch.device("cpu"))
    assert (found.outcome, found.reason) == ("equal", "")


def test_a_version_that_it_has_not():
    from bitfuse.tools.compare import conformance

    found = conformance.check("comfyui", "2.5", torch.device("cpu"))
    assert (found.outcome, found.reason) == ("declined", f"{upstream.NAME} does not have LTX-2.5.")


def test_what_doctor_says(monkeypatch):
    said = {name: (state, found, meaning) for name, state, found, meaning, _ in adapter.look(torch.device("cpu"))}
    state, found, meaning = said["comfy-kitchen"]
    assert state == "ok"
    assert ("eager" in found and "three_ops" in meaning) == upstream.BY_KITCHEN
    if upstream.BY_KITCHEN:
        monkeypatch.setitem(forms.FORMS, True, [])
        assert adapter._look_at_kitchen(torch.device("cpu"))[1] == "note"


def test_explain(capsys):
    from bitfuse.tools import explain

    found = explain.of_version("ltx-2.3", 2, "comfyui")
    model = explain.from_geometry(found)
    assert isinstance(model, upstream.av_model.LTXAVModel)
    assert seeded._without_memory()


# -- nodes -------------------------------------------------------------------------------------------------------------


def test_the_nodes(of_2_3):
    patcher, of = of_2_3
    (ours,) = nodes.BitfuseLTX2.execute(patcher, strict=True, audit=0, cuda_graph=False).args
    assert ours is not patcher
    assert node_of(patcher) is None
    (before,) = nodes.BitfuseReport.execute(ours).args
    assert "no forward of the model has run" in before
    host.sample(ours, of, host.noise(of), steps=1)
    found = nodes.BitfuseReport.execute(ours, after={"samples": None})
    assert "48 of 48 sites fused" in found.args[0]
    assert found.ui.as_dict()["text"] == (found.args[0],)
    assert nodes.BitfuseReport.execute(patcher).args == (nodes.NOT_THERE,)
    (twice,) = nodes.BitfuseLTX2.execute(ours, strict=False, audit=64, cuda_graph=False).args
    assert node_of(twice).options == Options(audit=64)
    assert len(twice.get_all_wrappers("diffusion_model")) == 1


def test_the_folder_loads_as_comfyui_loads_one():
    """By its path, under a name of ComfyUI's making."""
    file = host.ROOT / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location("custom_nodes.bitfuse", file, submodule_search_locations=[])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    assert asyncio.run(extension.get_node_list()) == [nodes.BitfuseLTX2, nodes.BitfuseReport]


def test_every_input_has_a_tooltip():
    for node in (nodes.BitfuseLTX2, nodes.BitfuseReport):
        schema = node.define_schema()
        assert schema.description
        assert all(one.tooltip for one in (*schema.inputs, *schema.outputs))
        node.GET_SCHEMA()


def test_a_model_that_is_not_ltx_2(of_2_3):
    other = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="model is a Linear; accepted: an LTX-2 model"):
        nodes.BitfuseLTX2.execute(other, strict=False, audit=0, cuda_graph=False)


def test_without_bitfuse_the_model_is_unchanged(of_2_3, monkeypatch):
    import sys

    patcher, _ = of_2_3
    monkeypatch.setitem(sys.modules, "bitfuse.hosts.handle", None)
    (ours,) = nodes.BitfuseLTX2.execute(patcher, strict=False, audit=0, cuda_graph=False).args
    assert not ours.get_all_wrappers("diffusion_model")
    assert "bitfuse does not import here" in nodes.BitfuseReport.execute(ours).args[0]
    with pytest.raises(ImportError):
        nodes.BitfuseLTX2.execute(patcher, strict=True, audit=0, cuda_graph=False)


def test_what_does_not_import_is_said_where_comfyui_runs(of_2_3, monkeypatch, caplog):
    """Not everybody has a report node. Where bitfuse is there, to install it is no cure."""
    import sys

    for module, cure in (("bitfuse.hosts.handle", "pip install"), (wrapper.__name__, "another version of this")):
        with monkeypatch.context() as patch:
            if module == wrapper.__name__:
                found = types.ModuleType(nodes.__package__)
                found.__getattr__ = lambda name: raising(ImportError("ComfyUI 9.9 has no CrossAttention"))
                patch.setitem(sys.modules, nodes.__package__, found)
            else:
                patch.setitem(sys.modules, module, None)
            caplog.clear()
            nodes.BitfuseLTX2.execute(of_2_3[0], strict=False, audit=0, cuda_graph=False)
        assert cure in caplog.text


def raising(error):
    raise error


def test_what_is_restated_is_a_part():
    assert issubclass(adapter.Blocks, Part)
    assert adapter.Blocks.method == "_process_transformer_blocks"
