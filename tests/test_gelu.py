"""GELU in nine instructions: why it equals ATen's on CUDA, and in the memory of its input."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core import values
from bitfuse.core.bits import compare, differing
from bitfuse.ops.gelu import GELU_TANH, in_place

BF16 = torch.bfloat16
EVERY = values.every_16_bit_pattern(BF16, "cpu")


def fp32(t: Tensor) -> Tensor:
    return t.to(torch.float32).double()


def op_for_op(x: Tensor) -> Tensor:
    """ATen's on CUDA: each op rounded to fp32, CUDA's tanhf with its two branches, their functions to the nearest."""
    v = x.float()
    inner = 0.7978845608028654 * (v + 0.044715 * (v * v * v))
    size = inner.abs()
    power = torch.exp2((size * 2.885390043258667).double()).float() + 1.0
    far = fp32(1.0 / power.double()).mul(-2.0).add(1.0).float()  # one fused multiply-add
    far = torch.where(size >= 9.010913848876953, 1.0, far).copysign(inner)
    tanh = torch.where(size >= 0.6, far, torch.tanh(inner.double()).float())
    return (0.5 * v * (1.0 + tanh)).to(BF16)


def in_nine(x: Tensor, rounded: bool = True) -> Tensor:
    """`numerics.gelu` as a GPU runs it, 2^x and 1/x to the nearest."""
    v = x.float()
    fused = (
        (v * v).double() * float(torch.tensor(-0.1029432395800235)) + float(torch.tensor(-2.302208198144325))
    ).float()
    power = torch.exp2((v * fused).double()).float()
    logistic = fp32(1.0 / (1.0 + power).double()).float()
    return (v * ((logistic + 0.25) - 0.25 if rounded else logistic)).to(BF16)


def test_nine_instructions_equal_atens_chain_on_every_value():
    """In numbers, without a GPU; the hardware's own 2^x and 1/x are tried by the battery, on every value, too."""
    assert not differing(op_for_op(EVERY), in_nine(EVERY)).any()
    assert differing(op_for_op(EVERY), in_nine(EVERY, rounded=False)).sum() > 100


@pytest.mark.parametrize("shape", [(2, 19, 48), (7, 35), (3,), (1, 65536)], ids=str)
def test_in_the_memory_of_its_input(shape, device, fresh_routes):
    x = EVERY.to(device)[: torch.Size(shape).numel()].view(shape).clone()
    expected = F.gelu(x, approximate="tanh")
    assert GELU_TANH.route(x).fused
    found = in_place(x)
    assert found is x
    assert compare(expected, x) is None
    again = EVERY.to(device)[-x.numel() :].view(shape).clone()
    expected = F.gelu(again, approximate="tanh")
    assert compare(expected, in_place(again)) is None, "a launch that was prepared before"


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(2, 3, 16), "x is torch.float32; accepted: torch.bfloat16"),
        (torch.zeros(2, 3, 16, dtype=torch.float16), "x is torch.float16; accepted: torch.bfloat16"),
        (torch.zeros(3, 16, dtype=BF16).t(), r"x is not contiguous: its strides are \(1, 16\)"),
    ],
)
def test_what_is_left_to_pytorch(x, reason, device):
    route = GELU_TANH.route(x.to(device))
    assert not route.fused
    assert re.match(reason, str(route.reason))
    assert compare(F.gelu(x, approximate="tanh"), route.run(x)) is None
