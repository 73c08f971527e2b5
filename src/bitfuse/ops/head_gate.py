"""The gate of an attention's heads: out * 2*sigmoid(logits), one logit for each token and head.

Read this operator first. Every file in `ops/` has the same parts in the same order: the roundings, the reference, the
kernel, the plan, the predicate, the operator. How a call uses them is told at the head of `core/operator.py`. What
proves that kernel and reference are equal stands beside this file, in `head_gate_evidence.py`.

Versus whom: diffusers 0.38-0.42.1 (`LTX2AudioVideoAttnProcessor`), ltx-core (`ops.gated_attention`) and SGLang
(`head_gate_mul`), in the attentions of LTX-2.3 and 2.5.

Roundings, in order, both to bf16:
    r1  sigmoid(logit) = 1 / (1 + e^-logit), which is computed in fp32, with CUDA's `expf` and a true division.
        PyTorch then rounds 2 * sigmoid, too, but a product with 2 is exact
    r2  out * gate

Nothing is added up, so no order of additions matters. NaN, signed zeros and subnormals are where the chain has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitfuse.core.conditions import fitting, plain, runnable
from bitfuse.core.kernel import interpreting, kernel, power_of_2
from bitfuse.core.launch import Out, Plan, strides
from bitfuse.core.numerics import divide, exponential, negate, round_to
from bitfuse.core.operator import Operator, Tier

if TYPE_CHECKING:
    import triton.language as tl

# -- the reference: the hosts' chain op for op. It is the specification, the fallback and the gradient ---------------


def head_gate(out: Tensor, logits: Tensor) -> Tensor:
    """out * 2*sigmoid(logits) per head, rounded after every op: diffusers' and ltx-core's gated attention.

    out       [B, T, H*D], bf16, contiguous
    logits    [B, T, H], bf16, contiguous
    """
    gates = 2.0 * torch.sigmoid(logits)  # r1
    return (out.unflatten(2, (logits.shape[2], -1)) * gates.unsqueeze(-1)).flatten(2, 3)  # r2


# -- the kernel: the same tags on the lines that equal the reference's -----------------------------------------------

# x is the reference's argument `out`, and out_ptr is for the result. The primitives are in `core/numerics.py`.


@kernel(do_not_specialize=("heads",))
def _head_gate_kernel(
    x_ptr, logits_ptr, out_ptr, heads, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr
):
    """One program gates HEADS heads, whichever tokens they belong to; a lane is an element of a head."""
    first, head = tl.program_id(0) * HEADS, tl.arange(0, HEADS)
    number, own = first + head, head < heads - first
    lane = tl.arange(0, LANES)[None, :]
    inside = own[:, None] & (lane < HEAD_DIM)
    start = first.to(tl.int64) * HEAD_DIM  # 64 bits here alone: they cost instructions before the first load
    at = head[:, None] * HEAD_DIM + lane
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    x = tl.load(x_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    logit = tl.load(logits_ptr + number, mask=own, other=0.0).to(tl.float32)
    sigmoid = round_to(divide(1.0, 1.0 + exponential(negate(logit))), dtype)  # r1
    tl.store(out_ptr + start + at, (x * (2.0 * sigmoid)[:, None]).to(dtype), mask=inside)  # r2


# -- the plan: the launch but for its pointers. It allocates nothing and checks nothing ------------------------------

# Elements per program, and warps: 8 elements a thread. 32 took 1.05 and 1.04 times as long at 6144 and 24576
# tokens (H200, 2026-11-29). The interpreter is fastest with few, large programs.
_ELEMENTS, _WARPS, _INTERPRETED_ELEMENTS = 1024, 4, 1 << 17


def _plan(out: Tensor, logits: Tensor) -> Plan:
    heads = logits.numel()  # of all tokens
    head_dim = out.shape[2] // logits.shape[2]
    lanes = power_of_2(head_dim)
    heads_per_program = max(1, (_INTERPRETED_ELEMENTS if interpreting() else _ELEMENTS) // lanes)
    return Plan(
        kernel=_head_gate_kernel,
        grid=(-(-heads // heads_per_program), 1, 1),
        scalars=(heads,),
        constants={"HEAD_DIM": head_dim, "LANES": lanes, "HEADS": heads_per_program},
        num_warps=_WARPS,
        outputs=(Out(tuple(out.shape), strides(out), out.dtype),),  # contiguous, as `out` is
    )


# -- the predicate: why a call can't be fused, in sentences. A route has the first, `explain` lists all ---------------


def _why_not(out: Tensor, logits: Tensor) -> Iterator[str]:
    tensors = {"out": out, "logits": logits}
    reasons = list(plain(tensors))
    if not reasons:  # `fitting` asks the reference whether it takes these shapes, which needs plain tensors
        reasons += fitting(head_gate, tensors, _misfit(out, logits))
    reasons += runnable(tensors)
    for name, t in tensors.items():
        if t.dtype != torch.bfloat16:
            reasons.append(f"{name} is {t.dtype}; accepted: torch.bfloat16")
        if not t.is_contiguous():
            reasons.append(f"{name} is not contiguous: its strides are {t.stride()}")
    if logits.numel() >= 2**31:
        reasons.append(f"logits {list(logits.shape)} needs a larger grid than one launch has")
    yield from reasons


def _misfit(out: Tensor, logits: Tensor) -> str | None:
    """What is wrong with these shapes, if anything."""
    if out.ndim != 3 or logits.ndim != 3:
        return f"out is {list(out.shape)} and logits {list(logits.shape)}; accepted: [B, T, H*D] and [B, T, H]"
    if logits.shape[2] == 0:
        return f"logits is {list(logits.shape)}, of no head; accepted: [B, T, H] with at least one head"
    if out.shape[:2] != logits.shape[:2] or out.shape[2] % logits.shape[2]:
        accepted = f"accepted with out {list(out.shape)}: its B and T, and a divisor of its width"
        return f"logits is {list(logits.shape)}; {accepted}"
    return None


# -- the operator ----------------------------------------------------------------------------------------------------

HEAD_GATE = Operator(
    head_gate,
    "diffusers 0.38-0.42.1, ltx-core, SGLang: gated attention",
    why_not=_why_not,
    tiers=(Tier("single pass", _plan),),
)
