"""What the operators of `perturbed_attention.py` are proved by: inputs that a wrong kernel trips over, real geometries,
wrong kernels, counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfuse.core import values
from bitfuse.core.emulated import multiply_add
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed, retiled
from bitfuse.core.values import lookalike
from bitfuse.ops.head_gate import head_gate

BF16 = torch.bfloat16

# -- what a wrong kernel trips over ----------------------------------------------------------------------------------

# Masks of guidance; next below one half, where lerp turns from one formula to the other; 0.3, which 1 less is no bf16
# value; those of `_CONTRACTED`; NaN. Then what no host gives, but what a wrong kernel may trip over.
_FEW = (0.0, 1.0, 0.5, 0.498046875, 0.3, 0.0001926422119140625, 3.796875, float("nan"))
_MASKS = (*_FEW, 0.25, 0.75, 0.501953125, 0.1, -0.498046875, -1.5, -0.0, 1e-39, float("inf"))
# (value, out) whose lerp by this mask tells one rounding of product and sum from two: see `numerics.lerp_fuses`.
_CONTRACTED = {
    0.0001926422119140625: ((-1.0234375, 5312.0), (-1.5546875, 8064.0), (1.2578125, -6528.0), (1.0546875, -5472.0)),
    3.796875: ((0.000392913818359375, 1.1484375), (0.0003490447998046875, -1.3125)),
}
_EACH = 1 << 12  # elements of a sample at least, with a mask for each sample


def _battery(
    out: Tensor, value: Tensor, mask: Tensor, logits: Tensor | None = None
) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    """(family, arguments): every mask in a sample of its own, or in a call of its own where one serves all samples."""
    width = out.shape[2]
    heads = 1 if logits is None else logits.shape[2]
    generator = torch.Generator(out.device).manual_seed(25)
    one_for_all = mask.shape[0] == 1 or mask.stride(0) == 0
    calls = [[m] * 4 for m in _FEW] if one_for_all else [list(_MASKS)]
    tokens = -(-_EACH // width)
    for masks in calls:
        named = f", mask {masks[0]:g}" if one_for_all else ""
        of_samples = torch.tensor(masks, device=out.device).view(-1, 1, 1)
        of_samples = of_samples[:1] if mask.shape[0] == 1 else of_samples
        for family, x, v in _families(masks, tokens * width, generator):
            shape = (len(masks), tokens, width)
            given = [_dense(out, x, shape), _dense(value, v, shape), lookalike(mask, of_samples.to(BF16))]
            if logits is not None:
                (drawn,) = values.live([torch.float32], len(masks) * tokens * heads, generator)
                few = values.specials(BF16, out.device)
                at = torch.arange(drawn.numel(), device=out.device)
                some = few[at % few.numel()] if family == "special gates" else (3 * drawn).to(BF16)
                given.append(_dense(logits, some, (*shape[:2], heads)))
            yield f"{family}{named}", tuple(given)


def _dense(like: Tensor, drawn: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A contiguous tensor of this shape that looks like a contiguous one, whatever its strides are multiples of."""
    return lookalike(like.view(1, 1, -1), drawn.view(1, 1, -1)).view(shape)


def _families(masks: list[float], each: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(family, out, value), each sample's elements side by side."""
    n, device = len(masks) * each, generator.device
    both = [BF16, BF16]
    for family, draw in (
        ("live", values.live),
        ("special gates", values.live),
        ("wide", values.wide),
        ("uniform bits", values.uniform_bits),
    ):
        x, v = draw(both, n, generator)
        yield family, x, v
    pairs = values.products_of_specials(both, device)
    at = torch.arange(each, device=device).repeat(len(masks))
    x, v = (few[at % few.numel()] for few in pairs)
    yield "specials", x, v

    # sums that end half-way between two values, a few units apart; products with masks do so by themselves
    v = values.significands(BF16, n, generator)
    units = torch.randint(-8, 9, (n,), device=device, generator=generator) * torch.finfo(BF16).eps
    yield "ties", (v.float() + units).to(BF16), v

    x, v = values.live(both, n, generator)
    for number, mask in enumerate(masks):
        if mask in _CONTRACTED:
            found = torch.tensor(_CONTRACTED[mask], device=device).to(BF16)
            pair = torch.cat([found, -found])[torch.arange(each, device=device) % (2 * len(found))]
            v[number * each : (number + 1) * each], x[number * each : (number + 1) * each] = pair.unbind(1)
    yield "one rounding or two", x, v


# -- on a CPU ----------------------------------------------------------------------------------------------------------


def _emulated_lerp(out: Tensor, value: Tensor, mask: Tensor, logits: Tensor) -> Tensor:
    """The reference with torch.lerp as CUDA builds compute it: by one formula for all elements, contracted."""
    x, start, weight = (t.float() for t in torch.broadcast_tensors(out, value, mask))
    difference = x - start
    near = multiply_add(weight, difference, start)
    far = multiply_add(-difference, 1.0 - weight, x)
    return head_gate(torch.where(weight.abs() < 0.5, near, far).to(out.dtype), logits)


# -- geometries --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerturbedCase:
    """A geometry. `real` marks those that LTX-2 hosts run.

    masks        of the samples, over and over
    mask_step    a mask is every so many elements of a tensor; 0: one mask, expanded
    gated        whether there are gate logits
    """

    name: str
    tokens: int
    heads: int
    head_dim: int
    masks: tuple[float, ...] = (0.0, 1.0)
    batch: int = 2
    mask_step: int = 1
    gated: bool = True
    real: bool = False

    def arguments(
        self, device: torch.device | str, tokens: int | None = None, seed: int = 0
    ) -> tuple[Tensor | None, ...]:
        """(out, value, mask, logits) with live values; `tokens` replaces the case's own count (for the interpreter)."""
        generator = torch.Generator(device).manual_seed(seed)
        t = self.tokens if tokens is None else min(tokens, self.tokens)

        def randn(width: int) -> Tensor:
            return torch.randn(self.batch, t, width, generator=generator, device=device).to(BF16)

        out, value = randn(self.heads * self.head_dim), randn(self.heads * self.head_dim)
        masks = [self.masks[number % len(self.masks)] for number in range(self.batch if self.mask_step else 1)]
        mask = torch.tensor(masks, device=device).to(BF16)
        mask = mask.repeat_interleave(max(1, self.mask_step))[:: max(1, self.mask_step), None, None]
        mask = mask if self.mask_step else mask.expand(self.batch, 1, 1)
        return out, value, mask, 2 * randn(self.heads) if self.gated else None


def _cases(gated_only: bool) -> tuple[PerturbedCase, ...]:
    case = PerturbedCase
    found = (
        case("video, guidance of one of two samples", 6144, 32, 128, real=True),
        case("video, guidance of one of four samples", 6144, 32, 128, (1.0, 1.0, 0.0, 1.0), batch=4, real=True),
        case("video, three samples, by half and by a quarter", 6144, 32, 128, (1.0, 0.5, 0.25), batch=3, real=True),
        case("audio, 5 s, guidance of one of two samples", 126, 32, 64, real=True),
        case("video, 1536x1024x121, guidance of one of two samples", 24576, 32, 128, real=True),
        case("video, one sample by half", 6144, 32, 128, (0.5,), batch=1, real=True),
        case("video without gates", 6144, 32, 128, gated=False, real=True),
        case("small", 19, 4, 16, (0.75, 0.25)),
        case("small, without gates", 19, 4, 16, (0.75, 0.25), gated=False),
        case("one sample", 19, 4, 16, (0.3,), batch=1),
        case("one mask for all samples", 5, 3, 40, (0.3,), batch=3, mask_step=0),
        case("masks of every third element", 7, 3, 40, (0.1, 0.5, 0.9), batch=3, mask_step=3),
        case("one token", 1, 32, 128, (0.5, 0.498046875)),
    )
    return tuple(c for c in found if c.gated or not gated_only)


# -- wrong kernels -----------------------------------------------------------------------------------------------------

_BLEND = "x = lerp(x, value, weight, dtype, FUSED) if LERP else weighted_sum(x, value, weight, dtype)"
_GATED = "x = round_to(x * (2.0 * sigmoid)[:, None], dtype)  # r4"
_SIGMOID = "divide(1.0, 1.0 + exponential(negate(logit)))"
_OF_BOTH = (
    Mutant("the sigmoid not rounded", ((f"round_to({_SIGMOID}, dtype)", _SIGMOID),)),
    Mutant("the gate before the blend", ((_BLEND, "x = x"), (_GATED, f"{_GATED}\n        {_BLEND}"))),
    Mutant("not doubled", (("2.0 * sigmoid", "sigmoid"),)),
    Mutant(
        "every sample with the mask of sample 0", (("batch * mask_batch", "batch * 0"),), case=_cases(True)[-2].name
    ),
    Mutant("subnormals flushed", (("weight = tl.load", f"value = {flushed('value')}\n        weight = tl.load"),)),
    Mutant("the last lane not written", (("lane < HEAD_DIM", "lane < HEAD_DIM - 1"),)),
)
_CHOICE = "tl.where(tl.abs(weight) < 0.5, from_value, from_x)"
_LERP_MUTANTS = (
    *_OF_BOTH,
    Mutant("the blend not rounded", ((f"round_to({_CHOICE}, DTYPE)", _CHOICE),)),
    Mutant("from the values at every weight", (("tl.abs(weight) < 0.5", "weight == weight"),)),
    Mutant("from the attention at every weight", (("tl.abs(weight) < 0.5", "tl.abs(weight) < 0.0"),)),
    Mutant("one half counted as below one half", (("tl.abs(weight) < 0.5", "tl.abs(weight) <= 0.5"),)),
    Mutant("next below one half counted as one half", (("tl.abs(weight) < 0.5", "tl.abs(weight) < 0.498046875"),)),
    Mutant("a weight's sign looked at", (("tl.abs(weight) < 0.5", "weight < 0.5"),)),
    Mutant("two roundings near the values", (("difference, value, FUSED", "difference, value, not FUSED"),)),
    Mutant("two roundings near the attention", (("weight, x, FUSED", "weight, x, not FUSED"),)),
    Mutant("attention and values swapped", (("lerp(x, value, weight, dtype", "lerp(value, x, weight, dtype"),)),
)  # fmt: skip
_SUM_MUTANTS = (
    *_OF_BOTH,
    Mutant("the attention's share not rounded", (("round_to(x * weight, DTYPE)", "x * weight"),)),
    Mutant("1 - mask not rounded", (("round_to(1.0 - weight, DTYPE)", "1.0 - weight"),)),
    Mutant("the values' share not rounded", (("round_to(value * rest, DTYPE)", "value * rest"),)),
    Mutant("sum and product contracted", (("kept + round_to(value * rest, DTYPE)", "tl.fma(value, rest, kept)"),)),
    Mutant("blended as lerp does", (("if LERP else weighted_sum", "if not LERP else weighted_sum"),)),
    Mutant("the compiler's own contraction", (
        ("round_to(value * rest, DTYPE)", "value * rest"),), {"enable_fp_fusion": True}, compiled_only=True),
)  # fmt: skip

# -- counts, other tiles -----------------------------------------------------------------------------------------------

# For each of the four heads that a thread's elements are of, as in `head_gate_evidence.py`.
_SIGMOIDS = {
    "ex2.approx.ftz.f32": 4,
    "fma.rm.ftz.f32": 4,
    "fma.rn.ftz.f32": 12,
    "add.rn.f32": 12,
    "mul.rn.f32": 4,
    "div.rn.f32": 4,
    "cvt.rn.bf16.f32": 4,
}
_READ = {16: 8, 2: 5}  # two operands, logits and mask


def _gated_audit(counts: dict[str, int], once: int) -> Audit:
    """Counts for each result, and of 1 - mask, which is rounded `once` or not, for each thread."""
    of_mask = {"add.rn.f32": _SIGMOIDS["add.rn.f32"] + 1, "cvt.rn.bf16.f32": _SIGMOIDS["cvt.rn.bf16.f32"] + once}
    case = "video, guidance of one of two samples"
    return Audit(case, counts, per_thread=_SIGMOIDS | of_mask, also=("cvt.ftz.sat.f32.f32",), loads=_READ)


# r1: a difference and two products with sums, of which one is chosen; r2, r4
_LERP_AUDIT = _gated_audit({"add.rn.f32": 1, "fma.rn.f32": 2, "cvt.rn.bf16.f32": 2, "mul.rn.f32": 1}, once=0)
_SUM_AUDITS = (
    _gated_audit({"add.rn.f32": 1, "mul.rn.f32": 3, "cvt.rn.bf16.f32": 4}, once=1),
    Audit(
        "video without gates",
        {"add.rn.f32": 1, "mul.rn.f32": 2, "cvt.rn.bf16.f32": 3},
        per_thread={"add.rn.f32": 1, "cvt.rn.bf16.f32": 1},
        loads={16: 8, 2: 1},
    ),
)


EVIDENCE = {
    "lerp_head_gate": Evidence(
        _battery,
        _cases(gated_only=True),
        _LERP_MUTANTS,
        (_LERP_AUDIT,),
        emulated=_emulated_lerp,
        retiled=retiled("HEADS", (1, 4, 64)),
        steps=("sigmoid",),
    ),
    "weighted_sum_head_gate": Evidence(
        _battery,
        _cases(gated_only=False),
        _SUM_MUTANTS,
        _SUM_AUDITS,
        retiled=retiled("HEADS", (1, 4, 64)),
        steps=("sigmoid",),
    ),
}
