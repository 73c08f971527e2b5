"""The product in the middle of a SwiGLU feed-forward: silu(gate) * up.

Versus whom: diffusers 0.42.1, `LTX2VideoVaeSwiGLU` in the diffusion decoder of LTX-2.5, between its linear layers.

Roundings, in order, both to bf16:
    r1  silu(gate) = gate / (1 + e^-gate), which is computed in fp32 (`silu` of `core/numerics.py`)
    r2  silu(gate) * up

r1 is a function of one value of 16 bits, so the battery tries all of them. Where it is not ATen's (another torch may
compile that otherwise), ATen computes it, and the second tier multiplies.
No sum, so no order of additions. NaN, signed zeros and subnormals are where the chain has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.conditions import fitting, plain, runnable
from bitfuse.core.kernel import interpreting, kernel
from bitfuse.core.launch import Out, Plan, strides
from bitfuse.core.numerics import round_to, silu
from bitfuse.core.operator import Operator, Tier

if TYPE_CHECKING:
    import triton.language as tl

# -- the reference ---------------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, rounded after every op: diffusers' `LTX2VideoVaeSwiGLU`, between its projections.

    gate    [B, T, N], contiguous, bf16
    up      likewise
    """
    return F.silu(gate) * up  # r1, r2


# -- the kernel ------------------------------------------------------------------------------------------------------


@kernel  # one for numbers of elements that are multiples of 16, which reads 16 bytes at a time, and one for others
def _swiglu_kernel(gate_ptr, up_ptr, out_ptr, elements: tl.int64, GIVEN: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes BLOCK neighbouring elements, whichever rows they belong to. GIVEN: the gate is activated."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    activated = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if not GIVEN:
        activated = round_to(silu(activated), dtype)  # r1
    tl.store(out_ptr + at, (activated * up).to(dtype), mask=inside)  # r2


# -- the plan --------------------------------------------------------------------------------------------------------

# Elements per program, and warps. The interpreter is fastest with few, large programs.
_BLOCK, _WARPS, _INTERPRETED_BLOCK = 2048, 4, 1 << 15


def _plan(gate: Tensor, up: Tensor, *, given: bool) -> Plan:
    elements, block = gate.numel(), _INTERPRETED_BLOCK if interpreting() else _BLOCK
    return Plan(
        kernel=_swiglu_kernel,
        grid=(-(-elements // block), 1, 1),
        scalars=(elements,),
        constants={"GIVEN": given, "BLOCK": block},
        num_warps=_WARPS,
        outputs=(Out(tuple(gate.shape), strides(gate), gate.dtype),),
        before=_activated if given else None,
        extras=(gate.dtype,) if given else (),
        slots=(None, "up_ptr", "gate_ptr", "out_ptr") if given else (),  # what ATen has activated: as the gate
    )


def _activated(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (F.silu(gate),)


# -- when it can't be fused ------------------------------------------------------------------------------------------


def _why_not(gate: Tensor, up: Tensor) -> Iterator[str]:
    tensors = {"gate": gate, "up": up}
    reasons = list(plain(tensors))
    if not reasons:
        reasons += fitting(swiglu, tensors, _misfit(gate, up))
    reasons += runnable(tensors)
    for name, t in tensors.items():
        if t.dtype != torch.bfloat16:
            reasons.append(f"{name} is {t.dtype}; accepted: torch.bfloat16")
        if not t.is_contiguous():
            reasons.append(f"{name} is not contiguous: its strides are {t.stride()}")
    if gate.numel() >= 2**40:
        reasons.append(f"gate {list(gate.shape)} needs a larger grid than one launch has")
    yield from reasons


def _misfit(gate: Tensor, up: Tensor) -> str | None:
    if gate.ndim != 3:
        return f"gate is {list(gate.shape)}; accepted: [B, T, N], three dimensions"
    if up.shape != gate.shape:
        return f"up is {list(up.shape)}; accepted: the shape of gate, {list(gate.shape)}"
    return None


# -- the operator ----------------------------------------------------------------------------------------------------

SWIGLU = Operator(
    swiglu,
    "diffusers 0.42.1: LTX2VideoVaeSwiGLU",
    why_not=_why_not,
    tiers=(
        Tier("single pass", partial(_plan, given=False)),
        Tier("ATen's SiLU", partial(_plan, given=True)),
    ),
)
