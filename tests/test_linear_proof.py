"""The proof for a linear layer with what follows it, the model of the tensor core as the device: mutants are caught."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.tensor_core import AMPERE, HOPPER, TensorCore
from bitfuse.tools.prove import linear, summation
from bitfuse.tools.prove.linear import Given

SIZES = (48, 64, 64)  # M, N, K: four runs of 16 products


def by_chain(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return HOPPER.linear(x, w, bias)


def with_bias(total: Tensor, given: Given) -> Tensor:
    return (total + given.bias.float()).to(torch.bfloat16)


def sums(x: Tensor, w: Tensor) -> Tensor:
    return HOPPER.chain(x[:, None], w)


# -- sums that are no chain ------------------------------------------------------------------------------------------


def split_in_two(x: Tensor, w: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return sums(x[:, :half], w[:, :half]) + sums(x[:, half:], w[:, half:])


def two_accumulators(x: Tensor, w: Tensor) -> Tensor:
    """Runs by turns, as where one warp group takes the even ones and another the odd ones."""
    xs, ws = (t.view(len(t), -1, 16) for t in (x, w))
    even, odd = (sums(xs[:, i::2].flatten(1), ws[:, i::2].flatten(1)) for i in (0, 1))
    return even + odd


def backwards(x: Tensor, w: Tensor) -> Tensor:
    xs, ws = (t.view(len(t), -1, 16).flip(1).flatten(1) for t in (x, w))
    return sums(xs, ws)


def last_runs_exchanged(x: Tensor, w: Tensor) -> Tensor:
    def exchanged(t: Tensor) -> Tensor:
        runs = list(t.view(len(t), -1, 16).unbind(1))
        return torch.cat([*runs[:-2], runs[-1], runs[-2]], 1)

    return sums(exchanged(x), exchanged(w))


def every_32_products_apart(x: Tensor, w: Tensor) -> Tensor:
    """An accumulator of its own for each tile of K, added to the sum in fp32."""
    parts = (sums(a, b) for a, b in zip(x.split(32, 1), w.split(32, 1), strict=True))
    return functools.reduce(torch.add, parts)


def by_core(core: TensorCore) -> summation.Linear:
    return lambda x, w: core.chain(x[:, None], w)


SUMS = {
    "split in two": split_in_two,
    "two accumulators": two_accumulators,
    "backwards": backwards,
    "the last two runs exchanged": last_runs_exchanged,
    "32 products apart": every_32_products_apart,
    "in fp32 throughout": lambda x, w: x.float() @ w.float().T,
    "exactly": lambda x, w: (x.double() @ w.double().T).float(),
    "runs of 8": by_core(AMPERE),
    "runs of 8, as many bits": by_core(TensorCore("", 8, 25)),
    "runs of 4": by_core(TensorCore("", 4, 25)),
    "runs of 32": by_core(TensorCore("", 32, 25)),
    "one bit fewer": by_core(TensorCore("", 16, 24)),
    "one bit more": by_core(TensorCore("", 16, 26)),
}


@pytest.mark.parametrize("name", SUMS)
def test_another_sum_is_told(name):
    assert "outputs differ in the probes of" in summation.difference(SUMS[name], *SIZES, "cpu")
    kernel = lambda given: F.gelu(with_bias(SUMS[name](given.x, given.w), given), approximate="tanh")  # noqa: E731
    assert "outputs differ" in linear.difference(kernel, "gelu", *SIZES, "cpu", linear=by_chain)


@pytest.mark.parametrize("core", [HOPPER, AMPERE], ids=lambda core: core.name)
@pytest.mark.parametrize("sizes", [(48, 64, 64), (1, 20, 32), (7, 3, 96), (300, 16, 128)], ids=str)
def test_the_chain_itself_passes(core, sizes):
    """Whatever the number of rows and columns: fewer than probes need more matmuls."""
    assert summation.difference(by_core(core), *sizes, "cpu", core) == ""


@pytest.mark.parametrize("sizes", [(1, 3, 64), (5, 2, 96)], ids=str)
@pytest.mark.parametrize("name", ["last_runs_exchanged", "two_accumulators"])
def test_few_outputs_tell_as_much(sizes, name):
    assert summation.difference(globals()[name], *sizes, "cpu") != ""


def test_right_results_are_exact_in_bf16():
    for probe in summation.probes(*SIZES, "cpu"):
        assert torch.equal(probe.right.to(torch.bfloat16).float(), probe.right), probe.what


def test_sizes_without_a_chain_are_refused():
    for sizes in ((4, 4, 24), (4, 4, 16), (0, 4, 64), (4, 0, 64)):
        with pytest.raises(ValueError, match="accepted: positive, K a multiple of 16 and at least 32"):
            next(summation.probes(*sizes, "cpu"))


# -- roundings that are not the host's ---------------------------------------------------------------------------------


def rounded(given: Given) -> Tensor:
    return by_chain(given.x, given.w, given.bias)


def unrounded(given: Given) -> Tensor:
    return sums(given.x, given.w) + given.bias.float()


def gelu_in_fp32(y: Tensor, tanh=torch.tanh) -> Tensor:
    inner = 0.7978845608028654 * (y + 0.044715 * (y * y * y))
    return 0.5 * y * (1.0 + tanh(inner))


def fast_tanh(value: Tensor) -> Tensor:
    """Of 11 bits, as `tanh.approx.f32`, whose relative error is 2^-11."""
    mantissa, exponent = torch.frexp(torch.tanh(value))
    return torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent)


def bias_after_rounding(given: Given) -> Tensor:
    return sums(given.x, given.w).to(torch.bfloat16) + given.bias


def bias_in_the_accumulator(given: Given) -> Tensor:
    start = given.bias.float().expand(len(given.x), -1)
    return HOPPER.chain(given.x[:, None], given.w, start).to(torch.bfloat16)


MUTANTS = {
    ("gelu", "not rounded before GELU"): lambda g: gelu_in_fp32(unrounded(g)).to(torch.bfloat16),
    ("gelu", "fast tanh"): lambda g: gelu_in_fp32(rounded(g).float(), fast_tanh).to(torch.bfloat16),
    ("gelu", "the error function's GELU"): lambda g: F.gelu(rounded(g)),
    ("gelu", "bias after rounding"): lambda g: F.gelu(bias_after_rounding(g), approximate="tanh"),
    ("gelu", "bias in the accumulator"): lambda g: F.gelu(bias_in_the_accumulator(g), approximate="tanh"),
    ("gelu", "no bias"): lambda g: F.gelu(by_chain(g.x, g.w), approximate="tanh"),
    ("gated", "not rounded before the gate"): lambda g: (
        g.residual + (unrounded(g) * g.gate.float()).to(torch.bfloat16)
    ),
    ("gated", "the product not rounded"): lambda g: (
        g.residual.float() + rounded(g).float() * g.gate.float()
    ).to(torch.bfloat16),
    ("gated", "bias after rounding"): lambda g: g.residual + bias_after_rounding(g) * g.gate,
    ("gated", "bias in the accumulator"): lambda g: g.residual + bias_in_the_accumulator(g) * g.gate,
    ("gated", "a gate for each row"): lambda g: g.residual + rounded(g) * g.gate[: len(g.x), None],
    ("gated", "no gate"): lambda g: g.residual + rounded(g),
    ("added", "not rounded before the sum"): lambda g: (g.residual.float() + unrounded(g)).to(torch.bfloat16),
    ("added", "residual in the accumulator"): lambda g: (
        HOPPER.chain(g.x[:, None], g.w, g.residual.float()) + g.bias.float()
    ).to(torch.bfloat16),
    ("added", "bias after rounding"): lambda g: g.residual + bias_after_rounding(g),
}  # fmt: skip


@pytest.mark.parametrize(("following", "name"), MUTANTS)
def test_another_rounding_is_told(following, name):
    found = linear.difference(MUTANTS[following, name], following, *SIZES, "cpu", linear=by_chain)
    assert "outputs differ" in found


@pytest.mark.parametrize("following", linear.FOLLOWING)
def test_the_hosts_chain_itself_passes(following):
    assert linear.difference(linear.reference(following, by_chain), following, *SIZES, "cpu", linear=by_chain) == ""


def test_each_battery_of_roundings_is_needed():
    """What only one of them tells."""

    def one_value_wrong(given: Given) -> Tensor:
        y = rounded(given)
        return torch.where(y == 2.0**-60, torch.tensor(0.0).to(y.dtype), F.gelu(y, approximate="tanh"))

    found = linear.difference(one_value_wrong, "gelu", *SIZES, "cpu", linear=by_chain)
    assert found.endswith("on every value of the layer's output")

    def infinity_wrong(given: Given) -> Tensor:
        y = F.gelu(rounded(given), approximate="tanh")
        return torch.where(y.isinf(), torch.finfo(y.dtype).max, y)

    assert "outputs differ on" in linear.difference(infinity_wrong, "gelu", *SIZES, "cpu", linear=by_chain)


def test_a_host_that_adds_otherwise_keeps_its_layer():
    host = lambda x, w, bias: (split_in_two(x, w) + bias.float()).to(torch.bfloat16)  # noqa: E731
    found = linear.difference(linear.reference("gelu", by_chain), "gelu", *SIZES, "cpu", linear=host)
    assert found.startswith("the host's own layer adds in another order: order, pairs in neighbouring runs")


def test_what_follows_must_be_known():
    with pytest.raises(ValueError, match="following is 'relu'; accepted: gelu, gated, added"):
        linear.difference(rounded, "relu", *SIZES, "cpu")
