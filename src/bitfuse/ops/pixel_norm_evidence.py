"""What the operators of `pixel_norm.py` are proved by: geometries of LTX-2's decoders, batteries, wrong kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed
from bitfuse.core.launch import Plan, named
from bitfuse.core.values import ROW_FAMILIES, lookalike
from bitfuse.core.volume_mean import emulated_mean, order_of
from bitfuse.ops import pixel_norm
from bitfuse.ops.pixel_norm import convolved, laid, normed, padded

BF16 = torch.bfloat16

# -- what a wrong kernel trips over ------------------------------------------------------------------------------------

_SMALL = ((3, 8, 12), (3, 7, 6), (3, 5, 7))  # sides: ATen reads 4, 2 and 1 positions at a time
_LEAST = 1 << 14  # elements of a battery's volume
_MANY = 1 << 28  # elements of a volume of which only few families are tried


def _battery(*args: Any, reference: Callable[..., Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(family, arguments): a small volume where ATen adds up its channels in the same order, else one as large."""
    given = named(reference, args)
    y = given["y"]
    batch, channels, *own = y.shape
    order = order_of(tuple(y.shape), y.element_size(), y.device)
    few, sides = min(batch, 2), own
    for some in _SMALL if "eps" in given else _SMALL[-1:]:
        frames = some[0] * -(-_LEAST // (few * channels * torch.Size(some).numel()))
        alike = min(own) > 1  # a side of 1 has no stride of its own, and looks like no other
        if "eps" in given:
            alike = alike and order_of((few, channels, frames, *some[1:]), y.element_size(), y.device) == order
        if alike:
            batch, sides = few, [frames, *some[1:]]
            break
    generator = torch.Generator(y.device).manual_seed(23)
    for family, draw in _FAMILIES.items():
        if batch * channels * torch.Size(sides).numel() > _MANY and family not in ("live", "absorption"):
            continue
        yield (
            family,
            tuple(
                _drawn(name, arg, draw, batch, sides, generator) if isinstance(arg, Tensor) else arg
                for name, arg in given.items()
            ),
        )


def _near_eps(what: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Pixels whose mean square is about eps: the sum of both shows whether the mean was rounded before."""
    drawn = ROW_FAMILIES["live"](what, shape, dtype, generator)
    if what not in "xy":
        return drawn * 2.0**-16
    exponent = torch.randint(-18, -9, [*shape[:-1], 1], generator=generator, device=generator.device)
    return torch.ldexp(drawn, exponent)


_FAMILIES = {**ROW_FAMILIES, "near eps": _near_eps}


def _drawn(name: str, like: Tensor, draw: Any, batch: int, sides: list[int], generator: torch.Generator) -> Tensor:
    if name in ("y", "residual"):
        rows = draw("x" if name == "y" else "y", [batch, torch.Size(sides).numel(), like.shape[1]], BF16, generator)
        volume = rows.to(BF16).view(batch, *sides, like.shape[1])
        if name == "y":  # dense
            flat = lookalike(like.permute(0, 2, 3, 4, 1).reshape(1, 1, -1), volume.view(1, 1, -1))
            return flat.view(volume.shape).movedim(-1, 1)
        return lookalike(like, volume.movedim(-1, 1), gap=1)
    if name in ("scale", "shift"):
        drawn = draw("value", [batch if like.shape[0] > 1 else 1, 1, like.shape[1]], BF16, generator).to(BF16)
        return lookalike(like, drawn.view(-1, like.shape[1], 1, 1, 1), gap=1 if name == "scale" else 2)
    shape = [1, *sides[1:]] if name == "noise" else list(like.shape)
    drawn = draw("value", [1, 1, torch.Size(shape).numel()], BF16, generator).to(BF16)
    return lookalike(like.reshape(1, 1, -1), drawn).view(shape)


# -- on a CPU, whose ATen adds up channels in another order ------------------------------------------------------------


def _x_of(given: dict[str, Any]) -> Tensor:
    x = convolved(given["y"], given["bias"], given["noise"], given["noise_scale"])
    return x + given["residual"].contiguous() if "residual" in given else x


def _mean(*args: Any, reference: Callable[..., Any], emulated: bool) -> tuple[Tensor]:
    """The mean squares in fp32, before they are rounded: by ATen, or in CUDA's order."""
    square = _x_of(named(reference, args)) ** 2
    if not emulated:
        return (torch.mean(square, dim=1, keepdim=True, dtype=torch.float32),)
    order = order_of(tuple(square.shape), square.element_size(), square.device)
    assert order is not None, "a volume whose order is not known is not emulated"
    return (emulated_mean(square, order).contiguous(),)


def _emulated(*args: Any, reference: Callable[..., Any]) -> Any:
    given = named(reference, args)
    x = _x_of(given)
    (mean,) = _mean(*args, reference=reference, emulated=True)
    n = normed(x, mean.to(x.dtype), given["scale"], given["shift"], given["eps"])
    out = laid(padded(n, given["front"], given["back"], given["edge"]))
    return (laid(x), out) if "residual" in given else out


# -- geometries --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelCase:
    """A geometry. `real`: a decoder of LTX-2 has it.

    sides       frames, height and width of y
    front, back, edge    the padding
    up          by how much an upsampler enlarges the three sides; y has as many channels more
    repeats     how often an upsampler's residual is added over the channels of its result; 0: there is none
    inside      the residual is the inside of a padded volume
    modulated, noisy, with_bias    whether what is optional is there
    whole       values are small whole numbers, of which every sum is exact, in whatever order it is formed
    """

    name: str
    reference: Callable[..., Any]
    channels: int
    sides: tuple[int, int, int]
    batch: int = 1
    front: int = 2
    back: int = 0
    edge: int = 1
    up: tuple[int, int, int] = (2, 2, 2)
    repeats: int = 4
    inside: bool = False
    modulated: bool = False
    noisy: bool = False
    with_bias: bool = True
    patch: int = 4
    whole: bool = False
    real: bool = False

    def arguments(self, device: torch.device | str, tokens: int | None = None, seed: int = 0) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        # for the interpreter: as many pixels as give the order of a large volume
        most = (3, 16, 24) if tokens is not None else self.sides
        batch = 0 if tokens == 0 else self.batch
        sides = tuple(min(few, side) for few, side in zip(most, self.sides, strict=True))
        given = named(self.reference, ())

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=device)
            return ((drawn * 2).round().clamp(-4, 4) if self.whole else drawn * scale).to(BF16)

        def volume(channels: int, inside: bool = False) -> Tensor:
            more = [side + 2 * inside for side in sides]
            found = normal(batch, *more, channels).movedim(-1, 1)
            return found[:, :, 1:-1, 1:-1, 1:-1] if inside else found

        parts = torch.Size(self.up).numel() if "height" in given else 1
        wide = self.channels * (self.patch**2 if "patch" in given else parts)
        given["y"] = volume(wide)
        if "residual" in given and (parts == 1 or self.repeats):
            given["residual"] = volume(wide if parts == 1 else wide // self.repeats, self.inside)
        if self.with_bias:
            given["bias"] = normal(wide)
        if self.noisy and "noise" in given:
            given |= {"noise": normal(1, *sides[1:]), "noise_scale": normal(self.channels, 1, 1)}
        if self.modulated and "scale" in given:
            values = normal(batch, 4, self.channels, scale=0.5)[..., None, None, None]
            given |= {"shift": values[:, 0], "scale": values[:, 1]}
        sizes = {"front": self.front, "back": self.back, "edge": self.edge, "eps": 1e-8, "patch": self.patch}
        ups = dict(zip(("frames", "height", "width"), self.up if "height" in given else (1, 1, 1), strict=True))
        given |= {name: value for name, value in {**sizes, **ups}.items() if name in given}
        return tuple(given.values())


_LEVELS = ((1024, (16, 24, 16)), (512, (31, 48, 32)), (256, (61, 96, 64)), (128, (121, 192, 128)))


def _cases(reference: Callable[..., Any]) -> tuple[PixelCase, ...]:
    case = partial(PixelCase, reference=reference)
    names = named(reference, ())
    if "patch" in names:
        return (
            case(name="768x512x121", channels=3, sides=(121, 192, 128), real=True),
            case(name="small", channels=3, sides=(3, 4, 6), batch=2),
            case(name="one colour, patches of 2, no bias", channels=1, sides=(2, 3, 5), patch=2, with_bias=False),
        )
    if "height" in names:
        return (
            *(
                case(name=f"768x512x121, {channels} channels", channels=channels, sides=sides, real=True, inside=True)
                for channels, sides in ((512, (16, 24, 16)), (256, (31, 48, 32)), (128, (61, 96, 64)))
            ),
            case(name="small", channels=16, sides=(3, 4, 6), batch=2),
            case(name="time alone, no residual", channels=48, sides=(3, 4, 6), up=(2, 1, 1), repeats=0),
            case(name="height and width, no bias", channels=32, sides=(2, 3, 5), up=(1, 2, 2), with_bias=False),
        )
    found = [
        *(
            case(name=f"768x512x121, {channels} channels", channels=channels, sides=sides, real=True)
            for channels, sides in reversed(_LEVELS)
        ),
        case(name="768x512x121, not causal, zeros at the edges", channels=128, sides=(121, 192, 128), front=1, back=1,
             edge=0, real=True),
        case(name="1536x1024x121, 1024 channels", channels=1024, sides=(16, 48, 32), real=True),
        case(name="modulated, with noise", channels=256, sides=(61, 96, 64), modulated=True, noisy=True, real=True),
        case(name="small", channels=16, sides=(3, 4, 6), batch=2),
        case(name="small, modulated, with noise", channels=32, sides=(2, 5, 8), batch=2, modulated=True, noisy=True),
        case(name="inside of a padded volume, no bias", channels=64, sides=(3, 8, 8), inside=True, with_bias=False),
        case(name="odd sides", channels=512, sides=(1, 5, 7), back=2),
        case(name="even sides", channels=512, sides=(1, 6, 7), front=0),
        case(name="48 channels", channels=48, sides=(2, 4, 4), front=1, back=1),
        case(name="one pixel", channels=128, sides=(1, 1, 1), edge=0),
    ]  # fmt: skip
    return tuple(c for c in found if "scale" in names or not c.modulated)


# -- wrong kernels -----------------------------------------------------------------------------------------------------

_BIAS = "x = round_to(x + tl.load(bias_ptr + channel, mask=here, other=0.0).to(tl.float32), DTYPE)"
_SUM = "x = round_to(x + residual, DTYPE)"
_PADDED = (
    Mutant("the edge repeated, not mirrored", (
        ("w = width - 1 - tl.abs(width - 1 - tl.abs(column))", "w = tl.minimum(tl.maximum(column, 0), width - 1)"),)),
    Mutant("the edge mirrored with itself", (
        ("h = height - 1 - tl.abs(height - 1 - tl.abs(row))",
         "h = tl.where(row < 0, 0, tl.minimum(row, height - 1))"),)),
    Mutant("the last frame repeated in front", (("d = tl.minimum(tl.maximum(frame, 0), frames - 1)",
        "d = tl.where(frame < 0, frames - 1, tl.minimum(frame, frames - 1))"),)),
    Mutant("y + bias not rounded", ((_BIAS, _BIAS.replace("round_to(", "(").replace(", DTYPE)", ")")),)),
    Mutant("the bias of the next channel", (("bias_ptr + channel", "bias_ptr + (channel ^ 1)"),)),
)  # fmt: skip
_ADDED = (
    Mutant("bias and residual added first", (
        (_BIAS, "x = x + tl.load(bias_ptr + channel, mask=here, other=0.0).to(tl.float32)"),)),
)  # fmt: skip
_NORM = (
    Mutant("the square not rounded", (("round_to(x * x, dtype)", "x * x"),)),
    Mutant("the mean not rounded", (("mean = round_to(mean, dtype)", "mean = mean"),)),
    Mutant("the mean and eps not rounded", (("round_to(mean + eps, dtype)", "mean + eps"),)),
    Mutant("the root not rounded", (
        ("round_to(square_root(round_to(mean + eps, dtype)), dtype)", "square_root(round_to(mean + eps, dtype))"),)),
    Mutant("the norm not rounded", (("x = round_to(x * scaled_by, DTYPE)", "x = x * scaled_by"),)),
    Mutant("no SiLU", (("x = silu(x)", "x = x"),)),
    Mutant("four accumulators added in pairs", (("((sum0 + sum1) + sum2) + sum3", "(sum0 + sum1) + (sum2 + sum3)"),),
           case="small"),
    Mutant("accumulators by neighbours", (
        ("tl.trans(tl.reshape(sums, (PIXELS, 4, SLOTS)), (0, 2, 1))", "tl.reshape(sums, (PIXELS, SLOTS, 4))"),),
           case="odd sides"),
    Mutant("subnormals flushed", (
        ("x = round_to(x * scaled_by, DTYPE)", f"x = round_to({flushed('x')} * scaled_by, DTYPE)"),)),
)  # fmt: skip
_RESIDUAL_NORM = (Mutant("the sum not rounded", ((_SUM, "x = x + residual"),)),)
_MODULATION = (
    Mutant("1 + scale not rounded", (("round_to(1.0 + scale, DTYPE)", "(1.0 + scale)"),),
           case="small, modulated, with noise"),
    Mutant("scaled x not rounded", (
        ("x = round_to(x * round_to(1.0 + scale, DTYPE), DTYPE)", "x = x * round_to(1.0 + scale, DTYPE)"),),
        case="small, modulated, with noise"),
)  # fmt: skip
_NOISE = (
    Mutant("noise and its scale not rounded", (
        ("noise = round_to(noise * noise_scale, DTYPE)", "noise = noise * noise_scale"),),
           case="small, modulated, with noise"),
)  # fmt: skip
_UPSAMPLED = (
    Mutant("y + bias not rounded", (
        ("x = round_to(x + tl.load(bias_ptr + lane, mask=here, other=0.0).to(tl.float32), dtype)",
         "x = x + tl.load(bias_ptr + lane, mask=here, other=0.0).to(tl.float32)"),)),
    Mutant("height and width exchanged", (
        ("part % UP_WIDTH, pixel // width", "part // UP_WIDTH % UP_HEIGHT, pixel // width"),
        ("part // UP_WIDTH % UP_HEIGHT, rest // height", "part % UP_WIDTH, rest // height"),)),
    Mutant("channels of a part apart", (
        ("tl.trans(tl.reshape(x.to(dtype), (PIXELS, CHANNELS, PARTS)), (0, 2, 1))",
         "tl.reshape(x.to(dtype), (PIXELS, PARTS, CHANNELS))"),)),
    Mutant("the residual's channels in a row", (("again = tl.multiple_of(first, CHANNELS * PARTS) +", "again = 0 +"),),
           case="768x512x121, 512 channels"),
)  # fmt: skip
_UNPATCHED = (
    Mutant("height and width of a patch exchanged", (
        ("(PIXELS, ROWS, PATCH, PATCH)), (1, 3, 0, 2)", "(PIXELS, ROWS, PATCH, PATCH)), (1, 2, 0, 3)"),)),
    Mutant("no bias", (("x = x + tl.load(bias_ptr", "x = x + 0 * tl.load(bias_ptr"),)),
)  # fmt: skip


def _retiled(plan: Plan) -> Iterable[Plan]:
    """The same launch with other numbers of pixels per program."""
    pixels = plan.constants["PIXELS"]
    for per_program in {max(1, pixels // 2), 2 * pixels}:
        grid = (-(-plan.scalars[0] // per_program), *plan.grid[1:])
        yield replace(plan, grid=grid, constants={**plan.constants, "PIXELS": per_program})


def _evidence(
    reference: Callable[..., Any],
    mutants: tuple[Mutant, ...],
    steps: tuple[str, ...],
    audits: tuple[Audit, ...] = (),
) -> Evidence:
    more: dict[str, Any] = {}
    if "eps" in named(reference, ()):
        more = {
            "emulated": partial(_emulated, reference=reference),
            "witness": partial(_mean, reference=reference, emulated=False),
            "emulated_witness": partial(_mean, reference=reference, emulated=True),
        }
    battery = partial(_battery, reference=reference)
    return Evidence(battery, _cases(reference), mutants, audits, retiled=_retiled, steps=steps, **more)


# -- what the compiler makes of it -------------------------------------------------------------------------------------


def _audit(residual: bool) -> Audit:
    """128 channels, 16 at a time, of 32 pixels on 128 threads: 32 elements for each, 4 at a time.

    For each: + bias, its square and the addition of that, x / root, SiLU (-x * log2 e, 1 + e^-x, a division that may be
    approximate), and + residual. Per thread, for its pixel: 8 additions (between accumulators, folds, the halves of a
    volume, + eps), the factor of the mean, its root and 1 / root. The bias is read again with every piece of a row.
    """
    added = 3 + residual
    counts = {"add.rn.f32": added, "mul.rn.f32": 3, "cvt.rn.bf16.f32": 4 + residual}
    once = {"add.rn.f32": 8, "mul.rn.f32": 2, "cvt.rn.bf16.f32": 3, "sqrt.rn.f32": 1, "div.rn.f32": 1}
    once |= {"ex2.approx.f32": 32, "div.full.f32": 32}
    return Audit(
        "768x512x121, 128 channels",
        counts,
        per_thread=once,
        results=32,
        loads={8: 16 + 8 * residual},
        stores={4: 1, 8: 8 + 8 * residual},
    )


def _sums(case: str, summands: int, **accesses: Any) -> Audit:
    """Sums of 32 elements for each thread, each rounded."""
    return Audit(case, {"add.rn.f32": summands, "cvt.rn.bf16.f32": summands}, results=32, **accesses)


_PADDED_SUMS = _sums("768x512x121, 128 channels", 2, loads={16: 12}, stores={16: 4})
_UPSAMPLED_SUMS = _sums("768x512x121, 128 channels", 2, loads={16: 12}, stores={16: 4})
_PATCHES = _sums("768x512x121", 1, loads={16: 5}, stores={8: 8})

_SUMMED = ("bias", "summands")
_NORMED = (*_SUMMED, "norm", "root", "silu")

EVIDENCE = {
    "pixel_norm_silu_pad": _evidence(
        pixel_norm.pixel_norm_silu_pad, (*_PADDED, *_NORM, *_MODULATION, *_NOISE), _NORMED, (_audit(False),)
    ),
    "residual_pixel_norm_silu_pad": _evidence(
        pixel_norm.residual_pixel_norm_silu_pad,
        (*_PADDED, *_ADDED, *_NORM, *_RESIDUAL_NORM),
        _NORMED,
        (_audit(True),),
    ),
    "residual_pad": _evidence(pixel_norm.residual_pad, (*_PADDED, *_ADDED), _SUMMED, (_PADDED_SUMS,)),
    "upsample": _evidence(pixel_norm.upsample, _UPSAMPLED, ("bias",), (_UPSAMPLED_SUMS,)),
    "unpatchify": _evidence(pixel_norm.unpatchify, _UNPATCHED, ("bias",), (_PATCHES,)),
}
