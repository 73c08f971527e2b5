"""GELU with tanh, between the two linear layers of a feed-forward, and into the memory of its input.

Versus whom: diffusers 0.37-0.42.1 (`activations.GELU`), ltx-core 1.0.0-1.2.0 (`GELUApprox`) and ComfyUI 0.24.1-0.30.0
(`GELU_approx`), in the feed-forwards of LTX-2's blocks.

One rounding, to bf16: r1. What is computed in fp32 before it is spelled otherwise than ATen spells it, with a third of
the instructions (`gelu` of `core/numerics.py`): it is a function of one value of 16 bits, so the battery tries all
of them, and the kernel is used where each one is equal. Its times beside ATen's are in docs/linear.md.

No sum, so no order of additions. NaN, signed zeros and subnormals are where the chain has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core import proof
from bitfuse.core.conditions import plain, runnable
from bitfuse.core.kernel import interpreting, kernel
from bitfuse.core.launch import Out, Plan, on_device, strides
from bitfuse.core.numerics import gelu
from bitfuse.core.operator import Operator, Tier

if TYPE_CHECKING:
    import triton.language as tl

# -- the reference ---------------------------------------------------------------------------------------------------


def gelu_tanh(x: Tensor) -> Tensor:
    """`F.gelu(x, approximate="tanh")`.

    x    [B, T, N], contiguous, bf16
    """
    return F.gelu(x, approximate="tanh")  # r1


# -- the kernel ------------------------------------------------------------------------------------------------------


@kernel  # one for numbers of elements that are multiples of 16, which reads 16 bytes at a time, and one for others
def _gelu_kernel(x_ptr, out_ptr, elements: tl.int64, BLOCK: tl.constexpr):
    """A program takes BLOCK neighbouring elements, and reads each before it writes it: `out_ptr` may be `x_ptr`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements

    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, gelu(x).to(out_ptr.dtype.element_ty), mask=inside)  # r1


# -- the plan --------------------------------------------------------------------------------------------------------

# Elements per program, and warps. The interpreter is fastest with few, large programs.
_BLOCK, _WARPS, _INTERPRETED_BLOCK = 8192, 8, 1 << 15


def _plan(x: Tensor) -> Plan:
    elements, block = x.numel(), _INTERPRETED_BLOCK if interpreting() else _BLOCK
    return Plan(
        kernel=_gelu_kernel,
        grid=(-(-elements // block), 1, 1),
        scalars=(elements,),
        constants={"BLOCK": block},
        num_warps=_WARPS,
        outputs=(Out(tuple(x.shape), strides(x), x.dtype),),
    )


# -- when it can't be fused ------------------------------------------------------------------------------------------


def _why_not(x: Tensor) -> Iterator[str]:
    yield from plain({"x": x})
    yield from runnable({"x": x})
    if x.dtype != torch.bfloat16:
        yield f"x is {x.dtype}; accepted: torch.bfloat16"
    if not x.is_contiguous():
        yield f"x is not contiguous: its strides are {x.stride()}"
    if x.numel() >= 2**40:
        yield f"x {list(x.shape)} needs a larger grid than one launch has"


# -- the operator ----------------------------------------------------------------------------------------------------

GELU_TANH = Operator(
    gelu_tanh,
    "diffusers 0.37-0.42.1: activations.GELU; ltx-core 1.0.0-1.2.0: GELUApprox; ComfyUI 0.24.1-0.30.0: GELU_approx",
    why_not=_why_not,
    tiers=(Tier("single pass", _plan),),
)

_launches: dict[tuple, Callable[..., Any]] = {}  # in place, by all that a launch is prepared for
_KEPT = 256


def in_place(x: Tensor) -> Tensor:
    """The result in x's own memory, for an x that `GELU_TANH` fuses: the kernel of that route, whose proof holds.

    It is the same compiled kernel where x begins at a multiple of 16 bytes, as new outputs do; a program reads what it
    writes before, and nobody else does.
    """
    key = (x.shape, x.device, interpreting())
    with on_device(x):
        launch = _launches.get(key)
        if launch is None:
            launch = _plan(x).bind((x,), (x,))
            proof.remember(_launches, key, launch, _KEPT)
        launch(x, x)
    return x
