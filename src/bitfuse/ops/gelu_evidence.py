"""What `gelu_tanh` is proved by: every value of its dtype, real geometries, wrong kernels, counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfuse.core import values
from bitfuse.core.evidence import Audit, Evidence, Mutant, retiled
from bitfuse.core.values import lookalike
from bitfuse.ops.swiglu_evidence import SwigluCase


def _battery(x: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """(family, arguments). All 65,536 values, each of which stands for itself, and what a wrong mask may hit."""
    width, device = x.shape[-1], x.device
    generator = torch.Generator(device).manual_seed(27)
    tokens = max(2, -(-(1 << 16) // width))
    while (tokens * width % 16 == 0) != (x.numel() % 16 == 0):  # two compiled kernels
        tokens += 1
    n = tokens * width
    shape = (1,) * (x.ndim - 2) + (tokens, width) if x.ndim > 1 else (n,)

    def of(family: str, few: Tensor) -> tuple[str, tuple[Tensor, ...]]:
        return family, (lookalike(x, few[torch.arange(n, device=device) % few.numel()].view(shape)),)

    yield of("every value", values.every_16_bit_pattern(x.dtype, device))
    (live,) = values.live([x.dtype], n, generator)
    yield of("live", live)
    (any_bits,) = values.uniform_bits([x.dtype], n, generator)
    yield of("uniform bits", any_bits)
    yield of("specials", values.specials(x.dtype, device))


@dataclass(frozen=True)
class GeluCase(SwigluCase):
    """A geometry; `real` marks those of LTX-2's feed-forwards: four times as wide as the tokens."""

    def arguments(self, device: torch.device | str, tokens: int | None = None, seed: int = 0) -> tuple[Tensor, ...]:  # type: ignore[override]
        """(x,) with live values; `tokens` replaces the case's own count (for the interpreter)."""
        return super().arguments(device, tokens, seed)[:1]


_CASES = (
    GeluCase("video, 768x512x121", 6144, 16384, real=True),
    GeluCase("video, 1536x1024x121", 24576, 16384, real=True),
    GeluCase("video, 512x384x49", 1536, 16384, real=True),
    GeluCase("audio, 5 s", 126, 8192, real=True),
    GeluCase("small", 19, 48, batch=2),
    GeluCase("35 wide", 7, 35),
    GeluCase("one token", 1, 1024),
)

_MUTANTS = (
    Mutant("GELU of the negative", (("gelu(x).to", "gelu(0.0 - x).to"),)),
    Mutant("the last element not written", (("at < elements", "at < elements - 1"),)),
    Mutant(
        "the logistic function not rounded as 1 + tanh is",
        (("value * ((logistic + 0.25) - 0.25)", "value * logistic"),),
        compiled_only=True,  # the interpreter runs the twin
    ),
    Mutant("a thousandth too much", (("gelu(x).to", "(gelu(x) * 1.001).to"),)),
)

_AUDITS = (
    # x * x, times x twice; 1 + the power, and the rounding to 2^-25; r1. The sum in the exponent is fused.
    Audit(
        "video, 768x512x121",
        {"mul.rn.f32": 3, "add.rn.f32": 3, "fma.rn.f32": 1, "cvt.rn.bf16.f32": 1},
        per_thread={"ex2.approx.ftz.f32": 32, "rcp.approx.ftz.f32": 32},
    ),
)


EVIDENCE = {"gelu_tanh": Evidence(_battery, _CASES, _MUTANTS, _AUDITS, retiled=retiled("BLOCK", (256, 1024, 4096)))}
