"""What the AdaLN operators are proved by: geometries that LTX-2 hosts run, batteries, wrong kernels, PTX counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor

from bitfuse.core.conditions import FLOATS, HALVES
from bitfuse.core.emulated import layer_norm_mean_square, mean_mean_square
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed, fold_mutants
from bitfuse.core.launch import Plan, named
from bitfuse.core.reduction import LAYER_NORM, MEAN
from bitfuse.core.values import ROW_FAMILIES, battery_shape, lookalike, significands, signs
from bitfuse.ops import adaln
from bitfuse.ops.adaln import ADDCMUL, VALUES, Rstd, given_sum, modulated, rstd_composed, rstd_native, statistic

# -- what a wrong kernel trips over ------------------------------------------------------------------------------------


def _overflowing(what: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """y * gate around 2^128, x infinite or the largest value: a product of bf16 is exact in fp32 but for these, so only
    here does an addcmul that rounds once differ from one that rounds the product and then the sum."""
    n = torch.Size(shape).numel()
    sign = signs(n, generator).view(shape)
    if what == "mask":
        return torch.ones(shape, device=generator.device)
    if what != "x":
        return sign * significands(dtype, n, generator).float().view(shape) * 2.0**63
    largest = torch.tensor([1.0, torch.finfo(dtype).max, float("inf")], device=generator.device)
    return sign * largest[torch.randint(3, shape, generator=generator, device=generator.device)]


def battery(
    *args: Any, names: tuple[str, ...], few: bool = False, addcmul: bool = False
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(family, arguments) with the same signature as `args`, which have these names. few: `battery_shape`.

    In the last family the strides are as dense as those of `args` allow; in the others each operand whose strides
    the kernel is given has others than the rest. An x whose rows are apart has them apart in every family.
    """
    x = args[0]
    batch, tokens = battery_shape(x.shape[0], x.shape[1], few)
    generator = torch.Generator(x.device).manual_seed(21)
    families = ROW_FAMILIES | ({"overflowing products": _overflowing} if addcmul else {})
    for family, draw in families.items():
        found: list[Any] = []
        for place, (arg, name) in enumerate(zip(args, names, strict=False)):
            if not isinstance(arg, Tensor):
                found.append(arg)
                continue
            shape = (
                [batch if arg.shape[0] > 1 else 1, tokens if arg.shape[1] > 1 else 1, arg.shape[2]]
                if arg.ndim == 3
                else list(arg.shape)
            )
            drawn = draw(name if name in ("x", "y", "mask") else "value", shape, x.dtype, generator)
            strided = family != "special rows" and name in (*VALUES, "mask")
            strided = strided or (name == "x" and not arg.is_contiguous())
            found.append(lookalike(arg, drawn.to(x.dtype), place + 1 if strided else 0))
        yield family, tuple(found)


# -- geometries --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdalnCase:
    """A geometry of one operator, whose arguments are named as its reference has them. `real`: LTX-2 hosts run it.

    ada_rows           how many AdaLN values of a token, or a sample, lie side by side in the tensor that they are of
    per_token          each token has values of its own
    with_tables, with_gate, with_mask, with_modulation    whether what is optional is there
    mask_step          a mask is every so many elements of a tensor
    misaligned         x and y start one element after a multiple of 16 bytes
    apart              x is the second of three parts, of as many columns each, of a wider tensor

    The weight of a norm that has one is near 1.
    """

    name: str
    tokens: int
    width: int
    reference: Callable[..., Any]
    batch: int = 1
    ada_rows: int = 6
    per_token: bool = False
    with_tables: bool = True
    with_gate: bool = True
    with_mask: bool = False
    mask_step: int = 1
    with_modulation: bool = True
    misaligned: bool = False
    apart: bool = False
    dtype: torch.dtype = torch.bfloat16
    real: bool = False

    def arguments(self, device: torch.device | str, tokens: int | None = None, seed: int = 0) -> tuple[Any, ...]:
        t = self.tokens if tokens is None else min(tokens, self.tokens)
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(self.dtype)

        def rows() -> Tensor:
            if not self.misaligned:
                return normal(self.batch, t, self.width)
            return normal(self.batch * t * self.width + 1)[1:].view(self.batch, t, self.width)

        values = normal(self.batch, t if self.per_token else 1, self.ada_rows * self.width, scale=0.5)
        tables = normal(self.ada_rows, self.width, scale=0.5)
        given, kinds = named(self.reference, ()), get_type_hints(self.reference)
        taken = 0
        for name in VALUES:
            there = self.with_gate if name == "gate" else self.with_modulation
            if name in given and (there or kinds[name] is Tensor):
                taken = (taken + 1) % self.ada_rows
                given[name] = values.unflatten(-1, (self.ada_rows, -1))[:, :, taken]
                given[f"{name}_table"] = tables[taken] if self.with_tables else None
        given |= {name: rows() for name in ("x", "y") if name in given}
        if self.apart:
            given["x"] = normal(self.batch, t, 3 * self.width).split(self.width, dim=-1)[1]
        if self.with_mask and "mask" in given:
            flags = (torch.arange(self.batch, device=device) % 2).to(self.dtype)
            given["mask"] = flags.repeat_interleave(self.mask_step)[:: self.mask_step, None, None]
        if "weight" in given:
            given["weight"] = 1 + normal(self.width, scale=0.1)
        return tuple(given.values())


_SLICED = "ComfyUI: text, a slice of a wider tensor's columns"


def cases(reference: Callable[..., Any], dtypes: tuple[torch.dtype, ...]) -> tuple[AdalnCase, ...]:
    def case(name: str, tokens: int, width: int, **kwargs: Any) -> AdalnCase:
        return AdalnCase(name, tokens, width, reference, **kwargs)

    found = [
        case("video, 768x512x121", 6144, 4096, real=True),
        case("video, guidance, 9 AdaLN rows", 6144, 4096, batch=2, ada_rows=9, real=True),
        case("image to video: AdaLN per token", 6144, 4096, per_token=True, ada_rows=9, real=True),
        case("audio, 5 s", 126, 2048, real=True),
        case("audio, 245 s", 6144, 2048, real=True),
        case("video, 1536x1024x121", 24576, 4096, real=True),
        case(
            "ltx-core: AdaLN per token, no tables", 6144, 4096, per_token=True, ada_rows=3, with_tables=False, real=True
        ),
        case("ltx-core: perturbation mask", 1024, 4096, batch=2, with_mask=True, with_tables=False, real=True),
        case("text", 1024, 4096, ada_rows=2, real=True),
        case("text connector, 3840 wide", 1024, 3840, real=True),
        case("small", 33, 256, batch=2),
        case("1920 wide", 37, 1920),
        case("8192 wide", 17, 8192, with_tables=False),
        case("one row", 1, 2048),
        case("3 rows", 3, 2048, with_tables=False),
        case("10 rows, per token", 5, 1024, batch=2, per_token=True),
        case("no gate, no modulation", 40, 512, with_gate=False, with_modulation=False),
        case("masks of every third element", 21, 256, batch=3, with_mask=True, mask_step=3),
        case("misaligned", 37, 512, misaligned=True),
        case("fp16", 37, 384, dtype=torch.float16),
        case("fp32", 37, 384, dtype=torch.float32),
    ]
    if reference is adaln.modulate:
        found += [
            case(_SLICED, 1024, 4096, ada_rows=2, apart=True, real=True),
            case("rows apart", 21, 384, batch=2, apart=True),
            case("rows apart, one token", 1, 256, batch=3, apart=True),
            case("rows apart, per token", 13, 256, batch=2, per_token=True, apart=True),
        ]
    if "weight" in named(reference, ()):  # LTX-2.5's diffusion decoder in place of the transformers: 768x512x121
        found = [c for c in found if not c.real]
        found = [
            case("stage 5, a block's first norm", 2973696, 256, ada_rows=7, real=True),
            case("stage 5, batch 2", 743424, 256, batch=2, ada_rows=7, real=True),
            case("stage 4", 423936, 512, with_modulation=False, real=True),
            case("stage 3", 53760, 512, with_modulation=False, real=True),
            case("stage 2", 27648, 1024, with_modulation=False, real=True),
            case("stage 1", 6912, 2048, with_modulation=False, real=True),
            *found,
            case("128 wide", 21, 128, batch=2),
        ]
    return tuple(c for c in found if c.dtype in dtypes)


# -- wrong kernels -----------------------------------------------------------------------------------------------------

_FP32 = (torch.float32,)
_FP16 = (torch.float16,)


def _flushed(line: str, name: str) -> Mutant:
    edit = (line, f"{line}\n    {name} = {flushed(name)}")
    return Mutant("subnormals flushed", (edit,), harmless_for=_FP16)


_SUMMED = "tl.load(table_ptr + lane, mask=here, other=0.0).to(tl.float32) + value"
_GATED, _ADDED, _NORMED = "y = round_to(y * gate, DTYPE)", "x = round_to(x + y, DTYPE)", "n = round_to(x * rstd, dtype)"
_EVERY = (
    Mutant("table + value not rounded", ((f"round_to({_SUMMED}, DTYPE)", _SUMMED),), harmless_for=_FP32),
    Mutant("the last lane not written", (("inside & (lane < N)", "inside & (lane < N - 1)"),)),
)
_MODULATED = (
    Mutant("1 + scale not rounded", (("round_to(1.0 + scale, DTYPE)", "(1.0 + scale)"),), harmless_for=_FP32),
    Mutant("fma where there is none", (("round_to(n * factor, DTYPE) + shift", "tl.fma(n, factor, shift)"),)),
)
_MODULATED_BARE = (_flushed("factor = round_to(1.0 + scale, DTYPE)", "n"),)  # what a LayerNorm gives is no subnormal
_RESIDUAL = (
    Mutant("the gated y not rounded", ((_GATED, "y = y * gate"),), harmless_for=_FP32),
    Mutant("y * gate and the sum fused", ((_GATED, "y = y"), (_ADDED, "x = round_to(tl.fma(y, gate, x), DTYPE)"))),
)
_FUSED_SUM = "x = round_to(multiply_add(y, gate, x, FUSED), DTYPE)"
_RESIDUAL_ADDCMUL = (
    Mutant(
        "y * gate rounded before the sum",
        ((_FUSED_SUM, "x = round_to(x + round_to(y * gate, DTYPE), DTYPE)"),),
        harmless_for=_FP32,
    ),
    Mutant(
        "two roundings where addcmul has one, or one for two",
        (("gate, x, FUSED)", "gate, x, not FUSED)"),),
        harmless_for=_FP16,
    ),
    Mutant("the gate left out", ((_FUSED_SUM, "x = round_to(x + y, DTYPE)"),)),
)
_ADDCMUL_NORMED = (
    Mutant("the sum not rounded before the norm", ((_FUSED_SUM, "x = multiply_add(y, gate, x, FUSED)"),)),
)
_RESIDUAL_BARE = (_flushed("y = tl.load(y_ptr + start + lane, mask=here, other=0.0).to(tl.float32)", "y"),)
_RESIDUAL_NORMED = (Mutant("the sum not rounded before the norm", ((_ADDED, "x = x + y"),)),)
_WEIGHTED = "n = round_to(weight * (x * rstd), dtype)"
_NORM_WEIGHTED = (
    Mutant("the norm not rounded", ((_WEIGHTED, "n = weight * (x * rstd)"),)),
    Mutant("the weight before the statistic", ((_WEIGHTED, _WEIGHTED.replace("(x * rstd)", "x * rstd")),)),
    Mutant("rounded before the weight", ((_WEIGHTED, _WEIGHTED.replace("(x * rstd)", "round_to(x * rstd, dtype)")),)),
    Mutant("subnormals flushed", ((_WEIGHTED, _WEIGHTED.replace("x *", f"{flushed('x')} *")),), harmless_for=_FP16),
)
_NORM = (
    Mutant("the norm not rounded", ((_NORMED, "n = x * rstd"),)),
    Mutant("subnormals flushed", ((_NORMED, _NORMED.replace("x", flushed("x"))),), harmless_for=_FP16),
)

# -- what the compiler makes of it -------------------------------------------------------------------------------------


def _audit(reference: Callable[..., Any], order: str | None) -> Audit:
    """Rows of 4096 on 128 threads, so 32 elements each, 8 at a time.

    For each: in a norm its square, the addition of that, x * rstd; in a modulation two tables added, 1 + scale,
    + shift, and one product; in a residual the gate's table, the product, the sum, and with addcmul one fma and one
    rounding for the last two. Of the fp32 additions of a norm the first, to zero, is gone. Per thread, LAYER_NORM:
    5 + 2 folds, + eps. MEAN: 3 between the sums of a lane, 5 folds, + eps, and 1/N. The row is read once more for the
    statistic, in vectors of 4 or one by one.
    """
    names, addcmul = named(reference, ()), reference in ADDCMUL
    residual, modulations = "y" in names, ("scale" in names) + ("scale2" in names)
    added, multiplied = 4 * modulations + 2 * residual, modulations + residual
    counts = {"add.rn.f32": added, "mul.rn.f32": multiplied, "cvt.rn.bf16.f32": added + multiplied}
    results = 8 if order is None else 32
    loads = {16: results // 8 * (1 + 4 * modulations + 3 * residual)}
    stores = {16: results // 8 * (modulations + residual)}
    once: dict[str, int] = {}
    if order is not None:
        counts = {"add.rn.f32": 1 + added, "mul.rn.f32": 2 + multiplied, "cvt.rn.bf16.f32": 1 + added + multiplied}
        once = {"add.rn.f32": 5 + 2 + 1 - 1, "div.rn.f32": 1, "rsqrt.approx.f32": 1}
        stores[4] = 1
        if order == LAYER_NORM:
            loads[8] = 8
        else:
            loads[2] = 32
            once |= {"add.rn.f32": 3 + 5 + 1 - 1, "cvt.rn.f32.s32": 1, "cvt.rn.f32.s64": 1, "mul.rn.f32": 1}
    if addcmul:
        counts |= {
            "add.rn.f32": counts["add.rn.f32"] - 1,
            "mul.rn.f32": counts["mul.rn.f32"] - 1,
            "cvt.rn.bf16.f32": counts["cvt.rn.bf16.f32"] - 1,
            "fma.rn.f32": 1,
        }
    return Audit("video, 768x512x121", counts, per_thread=once, results=results, loads=loads, stores=stores)


# 16 elements in a thread, of two rows of 256. For each: the sum and r4, square, rstd * x, weight *, r5, and the
# modulation; three additions for four squares. For each row: 10 additions of folds, + eps, and so on.
_AUDIT_WEIGHTED = Audit(
    "stage 5, a block's first norm",
    {"add.rn.f32": 5 * 16 + 12, "mul.rn.f32": 4 * 16, "cvt.rn.bf16.f32": 7 * 16},
    per=16,
    per_thread={"add.rn.f32": 2 * (10 + 1), "div.rn.f32": 2, "rsqrt.approx.f32": 2},
    results=16,
    loads={16: 2 * (3 + 1 + 4)},  # x, y, the sum again; weight; scale and shift, each with its table
    stores={16: 4, 4: 1},
)

# -- the norms in CUDA's order, for a CPU, whose ATen adds in another --------------------------------------------------


def _emulated_native(x: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    return torch.rsqrt(layer_norm_mean_square(x) + eps)


def _emulated_composed(x: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    return torch.rsqrt(mean_mean_square(x) + eps)


def _emulated(*args: Any, reference: Callable[..., Any], rstd: Rstd) -> Any:
    """The reference's own steps, with the statistic in CUDA's order."""
    given = named(reference, args)
    x = given["x"]
    sums: tuple[Tensor, ...] = ()
    if "y" in given:
        x = given_sum(given, reference)
        sums = (x,)
    n, weight = x.float() * rstd(x, given["eps"], given.get("weight")), given.get("weight")
    n = (n if weight is None else weight.float() * n).to(x.dtype)
    results = [modulated(n, *(given[k] for k in ("scale", "shift", "scale_table", "shift_table")))]
    if "scale2" in given:
        results.append(modulated(n, *(given[k] for k in ("scale2", "shift2", "scale2_table", "shift2_table"))))
    return (*sums, *results) if sums else results[0]


def retiled(plan: Plan) -> Iterable[Plan]:
    """The same launch with other numbers of rows per program."""
    rows, constants = plan.scalars[0], plan.constants
    parts = -(-constants["N"] // constants["WIDTH"])
    for per_program in (1, 2, 4):
        yield replace(plan, grid=(-(-rows // per_program) * parts, 1, 1), constants={**constants, "ROWS": per_program})


# -- each operator's ---------------------------------------------------------------------------------------------------


def _evidence(
    reference: Callable[..., Any],
    steps: tuple[str, ...],
    mutants: tuple[Mutant, ...],
    order: str | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    audit: Audit | None = None,
    further: tuple[Audit, ...] = (),
    **more: Any,
) -> Evidence:
    names = tuple(named(reference, ()))
    return Evidence(
        battery=partial(battery, names=names, few=order == MEAN, addcmul=reference in ADDCMUL),
        cases=cases(reference, dtypes),
        mutants=(*mutants, *_EVERY),
        audits=(audit or _audit(reference, order), *further),
        retiled=retiled,
        steps=steps,
        **more,
    )


def _normed(reference: Callable[..., Any], order: str, rstd: Rstd, emulated: Rstd) -> Evidence:
    names = named(reference, ())
    residual, gated, weighted, addcmul = "y" in names, "gate" in names, "weight" in names, reference in ADDCMUL
    divided: tuple[str, ...] = ("quotient",) if order == LAYER_NORM else ()
    return _evidence(
        reference,
        ("norm", "rsqrt", *divided, "modulation", *(("addcmul",) if addcmul else ("residual",) if residual else ())),
        (
            *fold_mutants(order),
            *(_NORM_WEIGHTED if weighted else _NORM),
            *_MODULATED,
            *(_RESIDUAL_ADDCMUL if addcmul else _RESIDUAL if gated else ()),
            *(_ADDCMUL_NORMED if addcmul else _RESIDUAL_NORMED if residual else ()),
        ),
        order,
        HALVES,
        _AUDIT_WEIGHTED if weighted else None,
        emulated=partial(_emulated, reference=reference, rstd=emulated),
        witness=partial(statistic, reference=reference, rstd=rstd),
        emulated_witness=partial(statistic, reference=reference, rstd=emulated),
    )


_native = partial(_normed, order=LAYER_NORM, rstd=rstd_native, emulated=_emulated_native)
_composed = partial(_normed, order=MEAN, rstd=rstd_composed, emulated=_emulated_composed)

EVIDENCE: dict[str, Evidence] = {
    "gated_residual": _evidence(adaln.gated_residual, ("residual",), (*_RESIDUAL, *_RESIDUAL_BARE)),
    "gated_residual_addcmul": _evidence(
        adaln.gated_residual_addcmul, ("addcmul",), (*_RESIDUAL_ADDCMUL, *_RESIDUAL_BARE)
    ),
    "modulate": _evidence(
        adaln.modulate,
        ("modulation",),
        (*_MODULATED, *_MODULATED_BARE),
        further=(replace(_audit(adaln.modulate, None), case=_SLICED),),
    ),
    "layer_norm_modulate": _evidence(adaln.layer_norm_modulate, ("modulation", "norm"), _MODULATED),
    **{
        reference.__name__: evidence(reference)
        for evidence, reference in (
            (_native, adaln.residual_rms_norm_modulate_native),
            (_composed, adaln.residual_rms_norm_modulate_composed),
            (_native, adaln.residual_rms_norm_modulate_twice_native),
            (_composed, adaln.residual_rms_norm_modulate_twice_composed),
            (_native, adaln.residual_rms_norm_modulate_weighted),
            (_native, adaln.residual_addcmul_rms_norm_modulate_native),
            (_native, adaln.rms_norm_modulate_native),
            (_composed, adaln.rms_norm_modulate_composed),
        )
    },
}
