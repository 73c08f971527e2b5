"""Partial guidance by perturbation (STG): attention blended with its values, sample by sample, then the head gate.

A sample's mask says how much of its attention is kept: 1 all of it, 0 none, and the values stand in for it.

Versus whom: the attentions that are given a perturbation mask
    lerp            diffusers 0.38-0.42.1 (`LTX2PerturbedAttnProcessor`): torch.lerp(value, out, mask). Without a head
                    gate there is nothing to fuse: it is one ATen kernel already
    weighted_sum    ltx-core (`Attention.forward`) and SGLang (`LTX2Attention.forward`): out*mask + value*(1 - mask)

Roundings, in order, all to bf16 but for the first:
    r1  lerp: out - value and 1 - mask in fp32, then value + mask * (out - value) where |mask| < 0.5, else
        out - (out - value) * (1 - mask): rounded to fp32 once where the running torch's lerp contracts product and sum
        (nvcc does by default), else twice
    r2  the blend: of lerp the result of r1; of the weighted sum out * mask, 1 - mask, value * (1 - mask), and the sum
    r3  sigmoid(logit), as in `head_gate.py`
    r4  blend * gate
With masks of 0, 1 and other powers of two the product in r1 is exact, so its two forms give the same bits.

On a CPU ATen's lerp rounds otherwise than on CUDA: (mask - 1) * (out - value) + out in vectors, which parts from r1 in
the sign of zero, and r1 with two roundings in what is left over. There ATen blends, and the kernel gates.

No reduction. NaN stays NaN at its place; signed zeros and subnormals are kept, as in the chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitfuse.core.conditions import fitting, plain, runnable
from bitfuse.core.kernel import kernel, power_of_2
from bitfuse.core.launch import Out, Plan, strides
from bitfuse.core.numerics import divide, exponential, lerp_fuses, multiply_add, negate, round_to
from bitfuse.core.operator import Operator, Tier
from bitfuse.ops.head_gate import head_gate

if TYPE_CHECKING:
    import triton.language as tl

# -- references ------------------------------------------------------------------------------------------------------


def lerp_head_gate(out: Tensor, value: Tensor, mask: Tensor, logits: Tensor) -> Tensor:
    """torch.lerp(value, out, mask), then the head gate: diffusers' perturbed attention.

    out       [B, T, H*D], the attention's output, bf16, contiguous
    value     [B, T, H*D], the values that it attended to, bf16, contiguous
    mask      [B, 1, 1] or [1, 1, 1], bf16, of any strides
    logits    [B, T, H], bf16, contiguous
    """
    return head_gate(torch.lerp(value, out, mask), logits)  # r1, r2; r3, r4


def weighted_sum_head_gate(out: Tensor, value: Tensor, mask: Tensor, logits: Tensor | None = None) -> Tensor:
    """out * mask + value * (1 - mask), rounded after every op, then the head gate: ltx-core's and SGLang's attention.

    Arguments as in `lerp_head_gate`. logits None: the attention has no head gate.
    """
    blend = out * mask + value * (1 - mask)  # r2
    return blend if logits is None else head_gate(blend, logits)  # r3, r4


# -- the kernel ------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=("heads",))
def _blend_and_gate_kernel(
    x_ptr, value_ptr, mask_ptr, logits_ptr, out_ptr, heads, mask_batch: tl.int64,
    HEAD_DIM: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr, LERP: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """One program takes HEADS heads of one sample, whichever tokens they belong to; a lane is an element of a head.

    Without values x is blended already; without logits there is no gate, and a token counts as one head.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    batch = tl.program_id(1)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    row = (batch * heads + head).to(tl.int64)
    lane = tl.arange(0, LANES)[None, :]
    inside = (head < heads)[:, None] & (lane < HEAD_DIM)
    at = row[:, None] * HEAD_DIM + lane

    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if value_ptr is not None:
        value = tl.load(value_ptr + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(mask_ptr + batch * mask_batch).to(tl.float32)
        x = lerp(x, value, weight, dtype, FUSED) if LERP else weighted_sum(x, value, weight, dtype)
    if logits_ptr is not None:
        logit = tl.load(logits_ptr + row, mask=head < heads, other=0.0).to(tl.float32)
        sigmoid = round_to(divide(1.0, 1.0 + exponential(negate(logit))), dtype)  # r3
        x = round_to(x * (2.0 * sigmoid)[:, None], dtype)  # r4
    tl.store(out_ptr + at, x.to(dtype), mask=inside)


@kernel
def lerp(x, value, weight, DTYPE: tl.constexpr, FUSED: tl.constexpr):
    """From value to x by the weight, as ATen's `lerp` has it on CUDA (aten/src/ATen/native/Lerp.h)."""
    difference = x - value  # r1
    from_value = multiply_add(weight, difference, value, FUSED)  # r1
    from_x = multiply_add(negate(difference), 1.0 - weight, x, FUSED)  # r1
    return round_to(tl.where(tl.abs(weight) < 0.5, from_value, from_x), DTYPE)  # r2


@kernel
def weighted_sum(x, value, weight, DTYPE: tl.constexpr):
    """x * weight + value * (1 - weight), rounded after every op."""
    kept = round_to(x * weight, DTYPE)  # r2
    rest = round_to(1.0 - weight, DTYPE)  # r2
    return round_to(kept + round_to(value * rest, DTYPE), DTYPE)  # r2


# -- launches --------------------------------------------------------------------------------------------------------

_ELEMENTS, _WARPS = 4096, 4  # per program, as in `head_gate.py`


def _plan(
    out: Tensor, value: Tensor, mask: Tensor, logits: Tensor | None = None, *, lerp: bool, fused: bool, **more: Any
) -> Plan:
    batch, tokens, width = out.shape
    heads = tokens * (1 if logits is None else logits.shape[2])  # of a sample
    head_dim = width * tokens // heads
    lanes = power_of_2(head_dim)
    per_program = max(1, _ELEMENTS // lanes)
    return Plan(
        kernel=_blend_and_gate_kernel,
        grid=(-(-heads // per_program), batch, 1),
        scalars=(heads, 0 if mask.shape[0] == 1 else strides(mask)[0]),
        constants={"HEAD_DIM": head_dim, "LANES": lanes, "HEADS": per_program, "LERP": lerp, "FUSED": fused},
        num_warps=_WARPS,
        outputs=(Out(tuple(out.shape), strides(out), out.dtype),),  # contiguous, as `out` is
        **more,
    )


def _lerp_plan(out: Tensor, value: Tensor, mask: Tensor, logits: Tensor) -> Plan | str:
    # on a CPU CUDA's form, which the evidence emulates
    fused = out.device.type == "cpu" or lerp_fuses(out.device, out.dtype)
    if fused is None:
        return "torch.lerp rounds here neither as a fused multiply-add nor as a product and a sum"
    return _plan(out, value, mask, logits, lerp=True, fused=fused)


def _gate_plan(out: Tensor, value: Tensor, mask: Tensor, logits: Tensor) -> Plan:
    """The kernel reads what ATen has blended in the place of x."""
    slots = (None, None, None, "logits_ptr", "x_ptr", "out_ptr")
    blended: dict[str, Any] = {"before": _blended, "extras": (out.dtype,), "slots": slots}
    return _plan(out, value, mask, logits, lerp=True, fused=False, **blended)


def _blended(out: Tensor, value: Tensor, mask: Tensor, logits: Tensor) -> tuple[Tensor]:
    return (torch.lerp(value, out, mask),)


# -- the predicate ---------------------------------------------------------------------------------------------------


def _why_not_lerp(out: Tensor, value: Tensor, mask: Tensor, logits: Tensor) -> Iterator[str]:
    yield from _why_not({"out": out, "value": value, "mask": mask, "logits": logits}, lerp_head_gate)


def _why_not_weighted_sum(out: Tensor, value: Tensor, mask: Tensor, logits: Tensor | None = None) -> Iterator[str]:
    yield from _why_not({"out": out, "value": value, "mask": mask, "logits": logits}, weighted_sum_head_gate)


def _why_not(given: dict[str, Any], reference: Any) -> Iterator[str]:
    tensors = {name: t for name, t in given.items() if t is not None}
    reasons = list(plain(tensors))
    if not reasons:  # only of plain tensors is it known what the reference does with their shapes
        reasons += fitting(reference, given, _misfit(**given))
    reasons += runnable(tensors)
    for name, t in tensors.items():
        if t.dtype != torch.bfloat16:
            reasons.append(f"{name} is {t.dtype}; accepted: torch.bfloat16")
        if name != "mask" and not t.is_contiguous():
            reasons.append(f"{name} is not contiguous: its strides are {t.stride()}")
    shape, logits = given["out"].shape, given["logits"]
    if (shape[:2].numel() if logits is None else logits.numel()) >= 2**30:
        reasons.append(f"out {list(shape)} has more heads than the kernel numbers: 2^30")
    if shape[:1].numel() >= 2**16:
        reasons.append(f"out {list(shape)} needs a larger grid than one launch has")
    yield from reasons


def _misfit(out: Tensor, value: Tensor, mask: Tensor, logits: Tensor | None) -> str | None:
    """What is wrong with these shapes, if anything."""
    if out.ndim != 3:
        return f"out is {list(out.shape)}; accepted: [B, T, H*D]"
    if value.shape != out.shape:
        return f"value is {list(value.shape)}; accepted: the shape of out, {list(out.shape)}"
    if mask.ndim != 3 or mask.shape[0] not in (1, out.shape[0]) or mask.shape[1:] != (1, 1):
        return f"mask is {list(mask.shape)}; accepted: [B, 1, 1] or [1, 1, 1] with out {list(out.shape)}"
    if logits is None:
        return None
    if logits.ndim != 3 or logits.shape[2] == 0:
        return f"logits is {list(logits.shape)}; accepted: [B, T, H] with at least one head"
    if out.shape[:2] != logits.shape[:2] or out.shape[2] % logits.shape[2]:
        accepted = f"accepted with out {list(out.shape)}: its B and T, and a divisor of its width"
        return f"logits is {list(logits.shape)}; {accepted}"
    return None


# -- the operators ---------------------------------------------------------------------------------------------------

LERP_HEAD_GATE = Operator(
    lerp_head_gate,
    "diffusers 0.38-0.42.1: LTX2PerturbedAttnProcessor with a perturbation mask",
    why_not=_why_not_lerp,
    tiers=(Tier("single pass", _lerp_plan), Tier("ATen's lerp", _gate_plan)),
)
WEIGHTED_SUM_HEAD_GATE = Operator(
    weighted_sum_head_gate,
    "ltx-core, SGLang: attention with a perturbation mask",
    why_not=_why_not_weighted_sum,
    tiers=(Tier("single pass", partial(_plan, lerp=False, fused=False)),),
)
