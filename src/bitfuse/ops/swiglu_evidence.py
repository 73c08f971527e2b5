"""What `swiglu` is proved by: inputs that a wrong kernel trips over, real geometries, wrong kernels, counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfuse.core import values
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed, retiled
from bitfuse.core.values import lookalike


def _battery(gate: Tensor, up: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """(family, arguments). r1 is a function of one 16-bit value, so all 65,536 of them are gates, in every family."""
    width, device = gate.shape[2], gate.device
    generator = torch.Generator(device).manual_seed(25)
    tokens = max(2, -(-(1 << 16) // width))
    while (tokens * width % 16 == 0) != (gate.numel() % 16 == 0):  # two compiled kernels
        tokens += 1
    every = values.every_16_bit_pattern(gate.dtype, device)
    n = tokens * width
    every = every[torch.arange(n, device=device) % every.numel()]

    def of(family: str, other: Tensor) -> tuple[str, tuple[Tensor, ...]]:
        shape = (1, tokens, width)
        return family, (lookalike(gate, every.view(shape)), lookalike(up, other.view(shape)))

    yield of("every gate", torch.ones(n, dtype=up.dtype, device=device))
    (other,) = values.live([up.dtype], n, generator)
    yield of("live", other)
    (other,) = values.uniform_bits([up.dtype], n, generator)
    yield of("uniform bits", other)
    few = values.specials(up.dtype, device)
    yield of("specials", few[torch.randint(few.numel(), (n,), generator=generator, device=device)])


@dataclass(frozen=True)
class SwigluCase:
    """A geometry; `real` marks those that LTX-2.5's decoder has: tiles of 16,384 tokens, 4 times the stage's width."""

    name: str
    tokens: int
    width: int
    batch: int = 1
    real: bool = False

    def arguments(self, device: torch.device | str, tokens: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(gate, up) with live values; `tokens` replaces the case's own count (for the interpreter)."""
        generator = torch.Generator(device).manual_seed(seed)
        t = self.tokens if tokens is None else min(tokens, self.tokens)
        gate, up = (
            (2 * torch.randn(self.batch, t, self.width, generator=generator, device=device)).to(torch.bfloat16)
            for _ in range(2)
        )
        return gate, up


_CASES = (
    SwigluCase("a tile of stage 5", 16384, 1024, real=True),
    SwigluCase("a tile of stages 3 and 4", 16384, 2048, real=True),
    SwigluCase("a tile of stage 2", 16384, 4096, real=True),
    SwigluCase("stage 1, 768x512x121", 6912, 8192, real=True),
    SwigluCase("a last tile of stage 5", 5632, 1024, real=True),
    SwigluCase("small", 19, 48, batch=2),
    SwigluCase("35 wide", 7, 35),
    SwigluCase("one token", 1, 1024),
)

_SILU = "silu(activated)"
_MUTANTS = (
    Mutant("the SiLU not rounded", ((f"round_to({_SILU}, dtype)", _SILU),)),
    Mutant("the SiLU of the negative", ((_SILU, "silu(0.0 - activated)"),)),
    Mutant("the other operand activated", ((_SILU, "silu(up)"),)),
    Mutant("subnormals flushed", (("(activated * up)", f"({flushed('activated')} * {flushed('up')})"),)),
    Mutant("the last element not written", (("at < elements", "at < elements - 1"),)),
)

_AUDITS = (
    # For each element: -x times log2(e), of which LLVM makes one product, 1 + e^-x, r1, and up * that, r2. What is not
    # rounded to nearest there is named for each of a thread's 16 elements.
    Audit(
        "a tile of stage 5",
        {"mul.rn.f32": 2, "add.rn.f32": 1, "cvt.rn.bf16.f32": 2},
        per_thread={"ex2.approx.f32": 16, "div.full.f32": 16},
    ),
)


EVIDENCE = {"swiglu": Evidence(_battery, _CASES, _MUTANTS, _AUDITS, retiled=retiled("BLOCK", (256, 1024, 8192)))}
