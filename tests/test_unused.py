"""What keeps an accelerated model from being fused that is no fault of a site: torch.compile, a wrapper, another model
put in its place. Each is in the report, with its reason."""

from __future__ import annotations

import pytest
import torch

import bitfuse
from stacking import LAYERS, step_of

diffusers = pytest.importorskip("diffusers", minversion="0.38")
pytestmark = pytest.mark.usefixtures("launched_as_reference")

SITES = 16 * LAYERS
BLOCK = "torch.compile has compiled this block, and the compiler gets the PyTorch chain itself"
MODEL = "torch.compile has compiled this model, and the compiler gets the PyTorch chain itself"


@pytest.fixture(scope="module")
def ltx():
    """(makes a seeded LTX-2.0 transformer, makes one step of a model)"""
    return step_of("2.0", torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(autouse=True)
def _no_gradient():
    torch.compiler.reset()
    with torch.no_grad():
        yield


class Compiler:
    """A backend that counts the graphs it is given and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph


class Around:
    """A model, and what torch.compile made of it to be called in its place."""

    def __init__(self, model, compiled):
        self._model, self._compiled = model, compiled

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, *args, **kwargs):
        return self._compiled(*args, **kwargs)


def reasons(handle):
    return {reason for site in handle.report().sites for reason in site.reasons}


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["compiled first", "accelerated first"])
def test_compiled_blocks_are_left_to_the_compiler_which_compiles_one_for_all(order, ltx):
    build, step = ltx
    model, compiler = build(), Compiler()
    expected = step(build())()
    if order == "compiled first":
        model.compile_repeated_blocks(fullgraph=True, backend=compiler)
    handle = bitfuse.accelerate(model)
    if order == "accelerated first":
        assert bitfuse.compare(expected, step(model)()) is None
        assert handle.report().fused == SITES
        model.compile_repeated_blocks(fullgraph=True, backend=compiler)
    assert bitfuse.compare(expected, step(model)()) is None
    assert compiler.graphs == 1
    report = handle.report()
    assert (report.fused, report.seen) == (0, SITES)
    assert {site.state for site in report.sites} == {"left alone"}
    assert reasons(handle) == {BLOCK}
    handle.restore()
    assert bitfuse.compare(expected, step(model)()) is None
    assert compiler.graphs == 1


def test_one_compiled_block_leaves_the_others_fused(ltx):
    build, step = ltx
    model = build()
    expected = step(build())()
    handle = bitfuse.accelerate(model)
    model.transformer_blocks[1].compile(backend="eager")
    assert bitfuse.compare(expected, step(model)()) is None
    report = handle.report()
    assert report.fused == SITES // 2
    assert all((site.declined == BLOCK) == site.name.startswith("transformer_blocks.1.") for site in report.sites)


def test_a_block_that_is_told_not_to_be_compiled_is_fused(ltx):
    build, step = ltx
    model = build()
    for block in model.transformer_blocks:
        block.compile(disable=True)
    handle = bitfuse.accelerate(model, strict=True)
    step(model)()
    assert handle.report().fused == SITES


@pytest.mark.parametrize("how", ["blocks", "the model", "around the model"])
def test_strict_raises_at_accelerate_for_what_is_compiled_already(how, ltx):
    build, _ = ltx
    model = target = build()
    if how == "blocks":
        model.compile_repeated_blocks(backend="eager")
    elif how == "the model":
        model.compile(backend="eager")
    else:
        target = torch.compile(model, backend="eager")
    with pytest.raises(bitfuse.NotFused, match=r"torch\.compile has compiled this"):
        bitfuse.accelerate(target, strict=True)
    assert not any("forward" in vars(module) for module in model.modules())


def test_strict_raises_at_the_next_forward_for_blocks_compiled_after(ltx):
    build, step = ltx
    model = build()
    handle = bitfuse.accelerate(model, strict=True)
    model.compile_repeated_blocks(backend="eager")
    with pytest.raises(bitfuse.NotFused, match=BLOCK):
        step(model)()
    assert reasons(handle) == {BLOCK}


@pytest.mark.parametrize("how", ["the model", "around the model"])
def test_a_model_compiled_as_a_whole_after_says_so(how, ltx):
    build, step = ltx
    model, compiler = build(), Compiler()
    expected = step(build())()
    handle = bitfuse.accelerate(model)
    if how == "the model":
        compiled = model
        model.compile(fullgraph=True, backend=compiler)
    else:
        compiled = Around(model, torch.compile(model, fullgraph=True, backend=compiler))
    assert bitfuse.compare(expected, step(compiled)()) is None
    assert compiler.graphs == 1
    report = handle.report()
    assert (report.fused, {site.state for site in report.sites}) == (0, {"left alone"})
    assert reasons(handle) == {MODEL}


@pytest.mark.parametrize(
    ("whole", "error"), [(False, bitfuse.NotFused), (True, torch._dynamo.exc.TorchDynamoException)]
)
def test_strict_raises_in_the_first_compiled_call_of_a_model_compiled_after(whole, error, ltx):
    build, step = ltx
    model = build()
    bitfuse.accelerate(model, strict=True)
    compiled = torch.compile(model, fullgraph=whole, backend="eager")
    with pytest.raises(error, match=r"torch\.compile has compiled this model"):
        step(Around(model, compiled))()


def test_a_graph_break_in_the_model_ends_in_the_hosts_forward(ltx):
    build, step = ltx
    model = build()
    expected = step(build())()
    bitfuse.accelerate(model)
    model.rope.register_forward_hook(torch.compiler.disable(lambda *args: None))
    found = step(Around(model, torch.compile(model, backend="eager")))()
    assert bitfuse.compare(expected, found) is None


# -- wrappers, and models that come and go -----------------------------------------------------------------------------


class Pipeline:
    def __init__(self, **components):
        self.components = components


class Caching:
    """A wrapper as caching packages have them: no module, with the model as an attribute."""

    def __init__(self, model):
        self.model = model


def _peft(model):
    peft = pytest.importorskip("peft")
    return peft.PeftModel(model, peft.LoraConfig(r=2, target_modules=["to_q"]))


def _data_parallel(model):
    return torch.nn.DataParallel(model)


WRAPPERS = {  # DistributedDataParallel, which needs a process group, is in test_ranks.py
    "PeftModel": _peft,
    "DataParallel": _data_parallel,
    "a caching wrapper": Caching,
}


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_model_in_a_wrapper_is_fused_inside(how, ltx):
    build, step = ltx
    model = build()
    pipe = Pipeline(transformer=WRAPPERS[how](model))
    expected = step(model)()
    handle = bitfuse.accelerate(pipe)
    assert bitfuse.compare(expected, step(model)()) is None
    assert (handle.report().fused, handle.report().seen) == (SITES, SITES)


def test_a_compiled_model_in_a_pipeline_is_named(ltx):
    build, _ = ltx
    handle = bitfuse.accelerate(Pipeline(transformer=torch.compile(build(), backend="eager")))
    assert (handle.report().fused, reasons(handle)) == (0, {MODEL})


def test_what_is_no_ltx_model_is_named_beside_one_that_is(ltx):
    build, step = ltx
    model = build()
    pipe = Pipeline(transformer=model, transformer_2=torch.nn.Linear(2, 2))
    handle = bitfuse.accelerate(pipe)
    step(model)()
    (row,) = [site for site in handle.report().sites if site.name == "transformer_2"]
    assert row.state == "left alone"
    assert "torch.nn.modules.linear.Linear, in which no LTX2VideoTransformer3DModel was found" in row.declined


class DiffusersPipeline(diffusers.DiffusionPipeline):
    """One of diffusers' own kind, whose `components` are its attributes."""

    def __init__(self, transformer):
        super().__init__()
        self.register_modules(transformer=transformer)


def test_another_transformer_put_into_the_pipeline_is_named(ltx):
    build, step = ltx
    first, other = build(), build()
    pipe = DiffusersPipeline(first)
    handle = bitfuse.accelerate(pipe)
    step(first)()
    assert handle.report().fused == SITES
    pipe.transformer = other
    report = handle.report()
    assert (report.fused, report.seen) == (SITES, SITES + 2)
    gone, new = [site for site in report.sites if site.operator == "none"]
    assert "no longer the target's" in gone.declined
    assert "came into the target after that was accelerated" in new.declined
    again = bitfuse.accelerate(pipe)
    step(other)()
    assert (again.report().fused, again.report().seen) == (SITES, SITES)
    again.restore()
    handle.restore()
    assert not any("forward" in vars(module) for model in (first, other) for module in model.modules())


def test_two_pipelines_that_share_a_transformer(ltx):
    """With nothing else in them they have one handle; a pipeline with more needs the shared model restored first."""
    build, step = ltx
    shared, more = build(), build()
    expected = step(shared)()
    pipes = [Pipeline(transformer=shared), Pipeline(transformer=shared), Pipeline(transformer=shared, refiner=more)]
    handle = bitfuse.accelerate(pipes[0])
    assert bitfuse.accelerate(pipes[1]) is handle
    with pytest.raises(ValueError, match="a part of target is accelerated already"):
        bitfuse.accelerate(pipes[2])
    beside = bitfuse.accelerate(more)
    handle.restore()
    assert bitfuse.compare(expected, step(shared)()) is None
    step(more)()
    assert beside.report().fused == SITES
