"""FSDP2 and DDP, here of one rank over gloo, keep every bit, put on before `accelerate` and after.

`tests/test_seeded_hosts.py` has two ranks, those of the examples; context parallelism needs as many (diffusers 0.42.1).
"""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

import bitfuse
from bitfuse.core.kernel import interpreter
from bitfuse.run.swap import ours_in
from bitfuse.tools import seeded
from common import references_launched
from stacking import FEATURES, LAYERS, ORDERS
from test_seeded_hosts import _example

diffusers = pytest.importorskip("diffusers", minversion="0.38")
pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),  # a view is returned, by stock too
]

SITES = 16 * LAYERS
CPU = torch.device("cpu")
LORA = next(feature for feature in FEATURES if feature.name == "LoRA")


@pytest.fixture
def one_rank():
    theirs = distributed.is_initialized()  # SGLang's tests leave theirs in the process, of one rank, too
    if not theirs:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with interpreter(), references_launched():  # on the CPU, where there is a GPU too
            yield
    finally:
        if not theirs:
            distributed.destroy_process_group()
        gc.collect()  # what was sharded, of which other tests may keep no text


@pytest.fixture(scope="module")
def example():
    return _example("diffusers_ranks")


class Ltx:
    """Seeded LTX-2.0 transformers of the same weights, and a call of one."""

    def __init__(self, example):
        geometry, _ = seeded.geometry_for(CPU, LAYERS, "2.0", "diffusers")
        self.geometry, self.example = replace(geometry, frames=2, height=3, width=4), example
        self.inputs = seeded.make_inputs(self.build(), self.geometry, CPU, seed=0)

    def build(self):
        return seeded.build(self.geometry, CPU, seed=0)

    def forward(self, model):
        return self.example.forward_of(model, self.inputs)()

    def step(self, model):
        with torch.no_grad():
            return self.forward(model)


@pytest.fixture(scope="module")
def ltx(example):
    return Ltx(example)


def in_order(order, model, use, **options):
    """An acceleration of the model, which `use` changes before or after."""
    if order == ORDERS[0]:
        use(model)
    handle = bitfuse.accelerate(model, **options)
    if order == ORDERS[1]:
        use(model)
    return handle


@pytest.mark.parametrize("order", ORDERS)
def test_sharded_weights_are_fused_and_every_bit_is_that_of_stock(order, ltx, example):
    model, expected = ltx.build(), ltx.step(ltx.build())
    handle = in_order(order, model, lambda model: example.divide_weights(model, CPU))
    for _ in range(2):
        assert bitfuse.compare(expected, ltx.step(model)) is None
    report = handle.report()
    handle.restore()
    assert bitfuse.compare(expected, ltx.step(model)) is None
    assert (report.fused, report.seen) == (SITES, SITES)
    of_blocks = model.transformer_blocks.parameters()  # they alone are divided again after a forward
    assert {type(parameter) for parameter in of_blocks} == {DTensor}


@pytest.mark.parametrize("order", ORDERS)
def test_a_text_is_not_kept_of_sharded_weights_which_are_written_to_without_a_version(order, ltx, example):
    stock, model = ltx.build(), ltx.build()
    example.divide_weights(stock, CPU)
    handle = in_order(order, model, lambda model: example.divide_weights(model, CPU), keep_text=True)
    before = ltx.step(stock)
    for _ in range(3):
        assert bitfuse.compare(before, ltx.step(model)) is None
    with torch.no_grad():
        for one in (stock, model):
            one.transformer_blocks[0].attn2.to_k.weight.mul_(1.5)
    after = ltx.step(stock)
    assert bitfuse.compare(before, after) is not None
    assert bitfuse.compare(after, ltx.step(model)) is None
    assert (handle.report().fused, handle.report().seen) == (SITES, SITES)


def test_a_text_is_kept_once_no_sharded_module_is_left(ltx, example):
    sharded, model = ltx.build(), ltx.build()
    example.divide_weights(sharded, CPU)
    bitfuse.accelerate(model, keep_text=True)
    text = ours_in(model.transformer_blocks[0].attn2).text

    def twice():
        for _ in range(2):
            ltx.step(model)
        return text.hits

    assert twice() == 0
    del sharded
    gc.collect()
    assert twice() == 1


@pytest.mark.parametrize("order", ORDERS)
def test_a_lora_in_sharded_weights_gets_stocks_gradients_and_is_fused_without(order, ltx, example):
    if LORA.missing:
        pytest.skip(f"{', '.join(LORA.missing)} is not installed")
    stock, model = ltx.build(), ltx.build()
    for one in (stock, model):
        LORA.use(one)
    example.divide_weights(stock, CPU)
    handle = in_order(order, model, lambda model: example.divide_weights(model, CPU))

    def trained(model):
        """Both outputs of a step, and the gradient of every weight of the LoRA."""
        return example.training_step(model, lambda: ltx.forward(model))()

    expected = trained(stock)
    assert len(expected) == 2 + sum(parameter.requires_grad for parameter in model.parameters()) > 50
    assert all(gradient.count_nonzero() for gradient in expected)
    assert bitfuse.compare(expected, trained(model)) is None
    assert {site.state for site in handle.report().sites} == {"fallen back"}
    assert bitfuse.compare(ltx.step(stock), ltx.step(model)) is None
    assert {site.state for site in handle.report().sites} == {"partly fused"}
    handle.restore()
    assert bitfuse.compare(expected, trained(model)) is None


class Pipeline:
    def __init__(self, **components):
        self.components = components


@pytest.mark.parametrize("order", ORDERS)
def test_a_model_in_ddp_is_fused_inside(order, ltx):
    """The wrapper itself is called. It takes no model without a trained weight."""
    model, expected = ltx.build(), ltx.step(ltx.build())
    model.proj_out.requires_grad_(True)
    wrapped = []

    def wrap(model):
        wrapped.append(torch.nn.parallel.DistributedDataParallel(model))

    if order == ORDERS[0]:
        wrap(model)
        handle = bitfuse.accelerate(Pipeline(transformer=wrapped[0]), strict=True)
    else:
        handle = bitfuse.accelerate(model, strict=True)
        wrap(model)
    assert bitfuse.compare(expected, ltx.step(wrapped[0])) is None
    assert (handle.report().fused, handle.report().seen) == (SITES, SITES)
    handle.restore()
    assert bitfuse.compare(expected, ltx.step(wrapped[0])) is None
    assert not any("forward" in vars(module) for module in wrapped[0].modules())
