"""What `head_gate` is proved by: inputs that a wrong kernel trips over, real geometries, wrong kernels, counts.

Loaded when a kernel is about to be proved (`bitfuse.core.evidence`), and by tests, `bitfuse verify` and `bench`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfuse.core import values
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed, retiled
from bitfuse.core.values import lookalike


def _battery(out: Tensor, logits: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """(family, arguments). r1 is a function of one bf16 value, so all 65,536 of them are logits, in every family."""
    heads, head_dim = logits.shape[2], out.shape[2] // logits.shape[2]
    generator = torch.Generator(out.device).manual_seed(22)
    every = values.every_16_bit_pattern(logits.dtype, out.device)
    tokens = -(-every.numel() // heads)
    every = every[torch.arange(tokens * heads, device=out.device) % every.numel()].view(1, tokens, heads)

    def of(family: str, x: Tensor) -> tuple[str, tuple[Tensor, ...]]:
        return family, (lookalike(out, x.view(1, -1, heads * head_dim)), lookalike(logits, every))

    n = every.numel() * head_dim
    yield of("every logit", torch.ones(n, dtype=out.dtype, device=out.device))
    (x,) = values.live([out.dtype], n, generator)
    yield of("live", x)
    (x,) = values.uniform_bits([out.dtype], n, generator)
    yield of("uniform bits", x)
    few = values.specials(out.dtype, out.device)
    yield of("specials", few[torch.arange(n, device=out.device) % few.numel()])


@dataclass(frozen=True)
class HeadGateCase:
    """A geometry; `real` marks those that LTX-2 hosts run."""

    name: str
    tokens: int
    heads: int
    head_dim: int
    batch: int = 1
    real: bool = False

    def arguments(self, device: torch.device | str, tokens: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(out, logits) with live values; `tokens` replaces the case's own count (for the interpreter)."""
        generator = torch.Generator(device).manual_seed(seed)
        t = self.tokens if tokens is None else min(tokens, self.tokens)
        out, logits = (
            torch.randn(self.batch, t, width, generator=generator, device=device).to(torch.bfloat16)
            for width in (self.heads * self.head_dim, self.heads)
        )
        return out, 2 * logits


_CASES = (
    HeadGateCase("video, 768x512x121", 6144, 32, 128, real=True),
    HeadGateCase("video, guidance", 6144, 32, 128, batch=2, real=True),
    HeadGateCase("audio to video", 6144, 32, 64, real=True),
    HeadGateCase("audio, 5 s", 126, 32, 64, real=True),
    HeadGateCase("video, 1536x1024x121", 24576, 32, 128, real=True),
    HeadGateCase("small", 19, 4, 16, batch=2),
    HeadGateCase("head size 40", 5, 3, 40),
    HeadGateCase("one token", 1, 32, 128),
)

_SIGMOID = "divide(1.0, 1.0 + exponential(negate(logit)))"
_MUTANTS = (
    Mutant("the sigmoid not rounded", ((f"round_to({_SIGMOID}, dtype)", _SIGMOID),)),
    Mutant("the sigmoid of the negative", (("exponential(negate(logit))", "exponential(logit)"),)),
    Mutant("not doubled", (("2.0 * sigmoid", "sigmoid"),)),
    Mutant("subnormals flushed", (("(x * (2.0 * sigmoid)", f"({flushed('x')} * (2.0 * sigmoid)"),)),
    Mutant("the last lane not written", (("lane < HEAD_DIM", "lane < HEAD_DIM - 1"),)),
)

_AUDIT = Audit(
    "video, 768x512x121",
    {"mul.rn.f32": 1, "cvt.rn.bf16.f32": 1},  # r2
    # A thread's elements are of one head. For it: e^-logit by libdevice, 1 + e^-logit, the division, r1.
    # What is flushed in the exponential vanishes against 1.
    per_thread={
        "ex2.approx.ftz.f32": 1,
        "fma.rm.ftz.f32": 1,
        "fma.rn.ftz.f32": 3,
        "add.rn.f32": 3,
        "mul.rn.f32": 1,
        "div.rn.f32": 1,
        "cvt.rn.bf16.f32": 1,
    },
    also=("cvt.ftz.sat.f32.f32",),
    loads={16: 1, 2: 1},
)


EVIDENCE = {
    "head_gate": Evidence(
        _battery, _CASES, _MUTANTS, (_AUDIT,), retiled=retiled("HEADS", (1, 4, 64)), steps=("sigmoid",)
    )
}
