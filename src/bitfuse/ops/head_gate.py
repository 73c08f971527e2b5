"""The gate of an attention's heads: out * 2*sigmoid(logits), one logit for each token and head.

Exact versus diffusers 0.38-0.42.1 (`LTX2AudioVideoAttnProcessor`), ltx-core (`ops.gated_attention`) and SGLang
(`head_gate_mul`): LTX-2.3 and 2.5.

Roundings, in order, all to bf16:
    r1  sigmoid(logit) = 1 / (1 + e^-logit) in fp32, with CUDA's `expf` and a true division
    -   the product with 2, which is exact
    r2  out * gate

r1 is a function of one bf16 value: the battery compares all 65,536 of them. No reduction; NaN and signed zeros as
in the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitfuse.core import values
from bitfuse.core.conditions import fitting, on_meta, plain, runnable
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed
from bitfuse.core.inputs import lookalike
from bitfuse.core.kernel import interpreting, kernel, power_of_2
from bitfuse.core.launch import Plan, outputs_like
from bitfuse.core.numerics import divide, exponential, negate, round_to
from bitfuse.core.operator import Operator, Tier

if TYPE_CHECKING:
    import triton.language as tl

# Heads per program, elements of each being one row of the tile: 4096 elements on four warps.
_ELEMENTS, _WARPS, _INTERPRETED_ELEMENTS = 4096, 4, 1 << 17


def head_gate(out: Tensor, logits: Tensor) -> Tensor:
    """out * 2*sigmoid(logits) per head, rounded after every op: diffusers' and ltx-core's gated attention.

    out       [B, T, H*D], bf16, contiguous
    logits    [B, T, H], bf16, contiguous
    """
    gates = 2.0 * torch.sigmoid(logits)  # r1
    return (out.unflatten(2, (logits.shape[2], -1)) * gates.unsqueeze(-1)).flatten(2, 3)  # r2


@kernel(do_not_specialize=("heads",))
def _head_gate_kernel(
    x_ptr, logits_ptr, out_ptr, heads, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr
):
    """One program gates HEADS heads, whichever tokens they belong to."""
    head = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    lane = tl.arange(0, LANES)[None, :]
    inside = (head < heads)[:, None] & (lane < HEAD_DIM)
    at = head[:, None] * HEAD_DIM + lane
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    logit = tl.load(logits_ptr + head, mask=head < heads, other=0.0).to(tl.float32)
    sigmoid = round_to(divide(1.0, 1.0 + exponential(negate(logit))), dtype)  # r1
    tl.store(out_ptr + at, (x * (2.0 * sigmoid)[:, None]).to(dtype), mask=inside)  # r2


def _plan(out: Tensor, logits: Tensor) -> Plan:
    head_dim = out.shape[2] // logits.shape[2]
    lanes = power_of_2(head_dim)
    per_program = max(1, (_INTERPRETED_ELEMENTS if interpreting() else _ELEMENTS) // lanes)
    constants = {"HEAD_DIM": head_dim, "LANES": lanes, "HEADS": per_program}
    grid = (-(-logits.numel() // per_program), 1, 1)
    outputs = outputs_like(on_meta(head_gate, out, logits))
    return Plan(_head_gate_kernel, grid, (logits.numel(),), constants, _WARPS, outputs)


def _retiled(plan: Plan) -> Iterator[Plan]:
    for heads in (1, 4, 64):
        grid = (-(-plan.scalars[0] // heads), 1, 1)
        yield replace(plan, grid=grid, constants={**plan.constants, "HEADS": heads})


def _why_not(out: Tensor, logits: Tensor) -> Iterator[str]:
    tensors = {"out": out, "logits": logits}
    reasons = list(plain(tensors))
    if not reasons:
        reasons += fitting(head_gate, tensors, next(_misfits(out, logits), None))
    reasons += runnable(tensors)
    for name, t in tensors.items():
        if t.dtype != torch.bfloat16:
            reasons.append(f"{name} is {t.dtype}; accepted: torch.bfloat16")
        if not t.is_contiguous():
            reasons.append(f"{name} is not contiguous: its strides are {t.stride()}")
    if logits.numel() >= 2**31:
        reasons.append(f"logits {list(logits.shape)} needs a larger grid than one launch has")
    yield from reasons


def _misfits(out: Tensor, logits: Tensor) -> Iterator[str]:
    if out.ndim != 3 or logits.ndim != 3:
        yield f"out is {list(out.shape)} and logits {list(logits.shape)}; accepted: [B, T, H*D] and [B, T, H]"
    elif logits.shape[2] == 0:
        yield f"logits is {list(logits.shape)}, of no head; accepted: [B, T, H] with at least one head"
    elif out.shape[:2] != logits.shape[:2] or out.shape[2] % logits.shape[2]:
        yield f"logits is {list(logits.shape)}; accepted with out {list(out.shape)}: its B and T, and a divisor of its width"  # noqa: E501


def _battery(out: Tensor, logits: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    heads, head_dim = logits.shape[2], out.shape[2] // logits.shape[2]
    generator = torch.Generator(out.device).manual_seed(22)
    every = values.every_16_bit_pattern(logits.dtype, out.device)
    tokens = -(-every.numel() // heads)
    every = every[torch.arange(tokens * heads, device=out.device) % every.numel()].view(1, tokens, heads)

    def of(name: str, x: Tensor, logit: Tensor) -> tuple[str, tuple[Tensor, ...]]:
        return name, (lookalike(out, x.view(1, -1, heads * head_dim)), lookalike(logits, logit))

    n = every.numel() * head_dim
    yield of("every logit", torch.ones(n, dtype=out.dtype, device=out.device), every)
    (x,) = values.live([out.dtype], n, generator)
    yield of("live", x, every)
    (x,) = values.uniform_bits([out.dtype], n, generator)
    yield of("uniform bits", x, every)
    few = values.specials(out.dtype, out.device)
    yield of("specials", few[torch.arange(n, device=out.device) % few.numel()], every)


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
        generator = torch.Generator(device).manual_seed(seed)
        t = self.tokens if tokens is None else min(tokens, self.tokens)
        out, logits = (
            torch.randn(self.batch, t, width, generator=generator, device=device).to(torch.bfloat16)
            for width in (self.heads * self.head_dim, self.heads)
        )
        return out, 2 * logits


HEAD_GATE = Operator(
    head_gate,
    "diffusers 0.38-0.42.1, ltx-core, SGLang: gated attention",
    why_not=_why_not,
    tiers=(Tier("single pass", _plan),),
    evidence=Evidence(
        battery=_battery,
        cases=(
            HeadGateCase("video, 768x512x121", 6144, 32, 128, real=True),
            HeadGateCase("video, guidance", 6144, 32, 128, batch=2, real=True),
            HeadGateCase("audio to video", 6144, 32, 64, real=True),
            HeadGateCase("audio, 5 s", 126, 32, 64, real=True),
            HeadGateCase("video, 1536x1024x121", 24576, 32, 128, real=True),
            HeadGateCase("small", 19, 4, 16, batch=2),
            HeadGateCase("head size 40", 5, 3, 40),
            HeadGateCase("one token", 1, 32, 128),
        ),
        mutants=(
            Mutant("the sigmoid not rounded", (("round_to(divide(1.0, 1.0 + exponential(negate(logit))), dtype)", "divide(1.0, 1.0 + exponential(negate(logit)))"),)),  # noqa: E501
            Mutant("the sigmoid of the negative", (("exponential(negate(logit))", "exponential(logit)"),)),
            Mutant("not doubled", (("2.0 * sigmoid", "sigmoid"),)),
            Mutant("subnormals flushed", (("(x * (2.0 * sigmoid)", f"({flushed('x')} * (2.0 * sigmoid)"),)),
            Mutant("the last lane not written", (("lane < HEAD_DIM", "lane < HEAD_DIM - 1"),)),
        ),
        audits=(Audit(
            "video, 768x512x121",
            {"mul.rn.f32": 1, "cvt.rn.bf16.f32": 1},  # r2
            # A thread's elements are of four heads. For each: e^-logit by libdevice, 1 + e^-logit, the division, r1.
            # What is flushed in the exponential vanishes against 1.
            per_thread={"ex2.approx.ftz.f32": 4, "fma.rm.ftz.f32": 4, "fma.rn.ftz.f32": 12, "add.rn.f32": 12,
                        "mul.rn.f32": 4, "div.rn.f32": 4, "cvt.rn.bf16.f32": 4},
            also=("cvt.ftz.sat.f32.f32",),
            loads={16: 4, 2: 4},
        ),),
        retiled=_retiled,
        steps=("sigmoid",),
    ),
)  # fmt: skip
