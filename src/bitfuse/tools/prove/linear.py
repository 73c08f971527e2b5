"""A proof for a kernel that computes a linear layer and what follows it: that it has the host's bits, or where not.

The host's chain is `F.linear` (the bias added in fp32 before the one rounding), then its own ops, each with a rounding:

    gelu     F.gelu(y, approximate="tanh")                     feed-forward, up
    gated    residual + y * gate                               attention out, feed-forward down
    added    residual + y                                      the same without a gate

For one signature: device, version of cuBLAS, M, N, K, dtypes, layout, contiguity, alignment. cuBLAS chooses its kernel
by these, and with it the order of additions along K: so that order is what has to be proved first (`summation.py`), of
the host's layer and of the kernel. Batteries on the roundings follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core import values
from bitfuse.core.bits import differing
from bitfuse.core.tensor_core import HOPPER, TensorCore
from bitfuse.tools.prove.summation import probes

FOLLOWING = ("gelu", "gated", "added")


class Given(NamedTuple):
    """The arguments of one call, bf16 and contiguous."""

    x: Tensor  # [M, K]
    w: Tensor  # [N, K]
    bias: Tensor  # [N]
    residual: Tensor  # [M, N]
    gate: Tensor  # [N]


Computed = Callable[[Given], Tensor]


def follow(y: Tensor, given: Given, following: str) -> Tensor:
    """The host's ops after its layer."""
    if following == "gelu":
        return F.gelu(y, approximate="tanh")
    return given.residual + (y * given.gate if following == "gated" else y)


def reference(following: str, linear: Callable[..., Tensor] = F.linear) -> Computed:
    """The host's chain; `linear` stands in for `F.linear` where there is no GPU."""
    return lambda given: follow(linear(given.x, given.w, given.bias), given, following)


def difference(
    kernel: Computed,
    following: str,
    m: int,
    n: int,
    k: int,
    device: torch.device | str,
    *,
    core: TensorCore = HOPPER,
    linear: Callable[..., Tensor] = F.linear,
) -> str:
    """Why the kernel may not stand in for the host's chain at these sizes, in a sentence; "" where it may."""
    if following not in FOLLOWING:
        raise ValueError(f"following is {following!r}; accepted: {', '.join(FOLLOWING)}")
    nothing = torch.zeros(n, dtype=torch.bfloat16, device=device)
    neutral = torch.zeros(m, n, dtype=torch.bfloat16, device=device), torch.ones_like(nothing)
    for probe in probes(m, n, k, device, core):
        given = Given(probe.x, probe.w, nothing, *neutral)
        right = probe.right.to(torch.bfloat16).expand(m, n).contiguous()
        if _count(right, linear(given.x, given.w, given.bias)):
            return f"the host's own layer adds in another order: {probe.what}"
        if count := _count(follow(right, given, following), kernel(given)):
            return f"{count} of {m * n} outputs differ in the probes of {probe.what}"
    expected = reference(following, linear)
    for what, given in batteries(m, n, k, device):
        if count := _count(expected(given), kernel(given)):
            return f"{count} of {m * n} outputs differ on {what}"
    return ""


def _count(right: Tensor, found: Tensor) -> int:
    return int(differing(right, found.contiguous()).sum())


def batteries(m: int, n: int, k: int, device: torch.device | str) -> Iterator[tuple[str, Given]]:
    """What the roundings are tried on."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(29)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(torch.bfloat16)

    def others(rows: int = m) -> dict[str, Any]:
        (residual,) = values.live([torch.bfloat16], rows * n, generator)
        return {"residual": residual.view(rows, n), "gate": normal(n)}

    yield "live values", Given(normal(m, k), normal(n, k, scale=k**-0.5), normal(n), **others())
    # The layer's output is each value of bf16: a column of x each, picked by a weight that is a unit vector.
    every = values.every_16_bit_pattern(torch.bfloat16, device)
    finite, wide = every[every.isfinite()], min(n, k)
    picks = torch.zeros(n, k, dtype=torch.bfloat16, device=device)
    picks[torch.arange(n, device=device), torch.arange(n, device=device) % wide] = 1
    nothing = torch.zeros(n, dtype=torch.bfloat16, device=device)
    for start in range(0, finite.numel(), m * wide):
        at = (start + torch.arange(m * wide, device=device)) % finite.numel()
        x = torch.zeros(m, k, dtype=torch.bfloat16, device=device)
        x[:, :wide] = finite[at].view(m, wide)
        yield "every value of the layer's output", Given(x, picks, nothing, **others())
        bits = values.uniform_bits([torch.bfloat16] * 2, m * n, generator)
        yield "every value, any bits", Given(x, picks, nothing, bits[0].view(m, n), bits[1][:n].contiguous())
    for special in (float("inf"), -float("inf"), float("nan")):
        x = torch.zeros(m, k, dtype=torch.bfloat16, device=device)
        x[:, 0] = special
        yield "infinities and NaN", Given(x, picks, nothing, **others())
    yield "a bias that decides a rounding", _decided_by_bias(m, n, k, device, others)


def _decided_by_bias(m: int, n: int, k: int, device: torch.device, others: Callable[[], dict[str, Any]]) -> Given:
    """Sums a quarter, a half or three quarters of a last place above a value of bf16 from 1 to 2: a place is 2^-7.

    One half of the biases is as large as what bf16 can't hold: where the sum is rounded before, both parts are lost
    apart. The other is around fp32's last place, which decides a tie: added to fp32 and rounded to nearest, or put into
    the accumulator and cut.
    """
    row, column = torch.arange(m, device=device), torch.arange(n, device=device)
    x = torch.zeros(m, k, dtype=torch.bfloat16, device=device)
    w = torch.zeros(n, k, dtype=torch.bfloat16, device=device)
    x[:, 0] = 1 + (row * 43 % 128) / 128
    x[:, 1] = (1 + row % 3) * 2.0**-9
    w[:, :2] = 1
    sign = 1 - column // 2 % 2 * 2
    size = 1 + column // 4 % 4 / 4
    exponent = torch.where(column % 2 == 0, -9 - column // 16 % 3, -23 - column // 16 % 3)
    return Given(x, w, (sign * size * torch.exp2(exponent.to(torch.float32))).to(torch.bfloat16), **others())
