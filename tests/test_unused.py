"""What keeps an accelerated model from being fused that is no fault of a site: torch.compile, wrappers, another model put
in its place; and what of bitfuse was wanted and not used. Each is in the report, with its reason."""

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
    with pytest.raises(bitfuse.NotFused, match="torch.compile has compiled this"):
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


def test_strict_raises_in_the_first_compiled_call_of_a_model_compiled_after(ltx):
    build, step = ltx
    model = build()
    bitfuse.accelerate(model, strict=True)
    with pytest.raises(bitfuse.NotFused, match=MODEL):
        step(Around(model, torch.compile(model, backend="eager")))()


def test_a_graph_break_in_the_model_ends_in_the_hosts_forward(ltx):
    build, step = ltx
    model = build()
    expected = step(build())()
    bitfuse.accelerate(model)
    model.rope.register_forward_hook(torch.compiler.disable(lambda *args: None))
    found = step(Around(model, torch.compile(model, backend="eager")))()
    assert bitfuse.compare(expected, found) is None
