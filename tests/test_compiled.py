"""benchmarks/compiled.py: bitfuse's operators as opaque ops in what torch.compile is given, and what is left there."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bitfuse
from bitfuse.tools import seeded

pytest.importorskip("diffusers", minversion="0.38")
CPU = torch.device("cpu")

# What computes nothing, then what is left to compute
VIEWS = {"view", "unbind", "t", "permute", "clone", "unsqueeze", "expand", "slice"}
LEFT = {"addmm", "gelu", "_scaled_dot_product_flash_attention_for_cpu"}


@pytest.fixture(scope="module")
def compiled():
    path = Path(__file__).parent.parent / "benchmarks" / "compiled.py"
    spec = importlib.util.spec_from_file_location("benchmark_compiled", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # Dynamo looks a function's module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.usefixtures("launched_as_reference")
def test_matmuls_attentions_and_the_gelu_are_left_between_opaque_operators(compiled):
    torch.compiler.reset()
    geometry, _ = seeded.geometry_for(CPU, 1, "2.0", "diffusers")
    geometry = replace(geometry, frames=2, height=3, width=4)
    stock = seeded.build(geometry, CPU, seed=0)
    inputs = seeded.make_inputs(stock, geometry, CPU, seed=0)
    model = compiled.make_opaque(seeded.twin(stock))
    compiled.compile_blocks(model, "a test", {"backend": "noting"})
    expected = seeded.one_step(stock, inputs)()
    assert bitfuse.compare(expected, seeded.one_step(model, inputs)()) is None
    noted = compiled.NOTED.pop("a test")
    of = {name.split(".")[0]: {n.split(".")[1] for n in noted if n.startswith(name)} for name in ("aten.", "bitfuse.")}
    assert of["aten"] <= VIEWS | LEFT
    assert of["aten"] >= LEFT
    assert sum(count for name, count in noted.items() if name.startswith("bitfuse.")) == 16, "every site of a block"


def test_a_differing_element_is_counted_of_the_worst_step(compiled):
    way = compiled.Way(lambda: None)
    zeros = torch.zeros(3, dtype=torch.bfloat16)
    way.judge((zeros, zeros), (zeros, -zeros))
    way.judge((zeros, zeros), (zeros, zeros))
    assert way.row == {"differing": 3, "elements": 6}
