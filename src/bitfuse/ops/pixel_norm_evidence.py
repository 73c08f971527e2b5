"""What the operators of `pixel_norm.py` are proved by: geometries of LTX-2's decoders, batteries, wrong kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.bits import Part
from bitfuse.core.evidence import Audit, Evidence, Mutant, flushed
from bitfuse.core.launch import Plan, named
from bitfuse.core.values import ROW_FAMILIES, lookalike
from bitfuse.core.volume_mean import as_if, emulated_mean, order_of
from bitfuse.core.volumes import laid, pieces
from bitfuse.ops import pixel_norm
from bitfuse.ops.pixel_norm import normed, padded, squares, x_at

BF16 = torch.bfloat16

# -- what a wrong kernel trips over ------------------------------------------------------------------------------------

_SMALL = ((3, 8, 12), (3, 7, 6), (3, 5, 7))  # sides: ATen reads 4, 2 and 1 positions at a time
_LEAST = 1 << 14  # elements of a battery's volume
_MANY = 1 << 28  # elements of a volume of which only few families are tried


def battery(*args: Any, reference: Callable[..., Any], divided: bool = False) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(family, arguments): a small volume where ATen adds up its channels in the same order, else one as large.

    divided    the sides of y are multiples of the arguments frames, height and width
    """
    given = named(reference, args)
    y = given["y"]
    batch, sides = y.shape[0], list(y.shape[2:])
    by = tuple(given[name] for name in ("frames", "height", "width")) if divided else (1, 1, 1)
    if (small := _small(y, normed="eps" in given, by=by)) is not None:
        batch, *sides = small
    channels = y.shape[1]
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


def _small(y: Tensor, normed: bool, by: tuple[int, ...] = (1, 1, 1)) -> tuple[int, ...] | None:
    """(samples, frames, height, width) of a small volume that looks like y, and whose channels ATen adds up in the same
    order where they are normed, with sides that are multiples of `by`; None: there is none.

    A side of 1 has no stride of its own and looks like no other, so it stays 1.
    """
    batch, channels, *own = y.shape
    order = order_of(tuple(y.shape), y.element_size(), y.device)
    longest = next((dim for dim in range(3) if own[dim] > 1), None)
    if longest is None:
        return None
    for some in _SMALL if normed else _SMALL[-1:]:
        sides = [1 if mine == 1 else side * step for mine, side, step in zip(own, some, by, strict=True)]
        few = min(batch, 2)
        sides[longest] *= -(-_LEAST // (few * channels * torch.Size(sides).numel()))
        if not normed or order is None or order_of((few, channels, *sides), y.element_size(), y.device) == order:
            return few, *sides
    return None


@contextlib.contextmanager
def _as_one(*args: Any, reference: Callable[..., Any]) -> Iterator[bool]:
    """So that small volumes stand for a large one that ATen adds up as no small one: some of 2^31 bytes, say."""
    y = named(reference, args)["y"]
    order = order_of(tuple(y.shape), y.element_size(), y.device)
    if order is None or _small(y, normed=True) is not None:
        yield False
        return
    with as_if(order):
        yield y.is_cuda  # on a CPU, which adds up in an order of its own, ATen's stays what is asked for


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


def _mean(*args: Any, reference: Callable[..., Any], emulated: bool) -> tuple[Tensor]:
    """The mean squares in fp32, before they are rounded: by ATen, or in CUDA's order."""
    square = squares(named(reference, args))
    if not emulated:
        return (torch.mean(square, dim=1, keepdim=True, dtype=torch.float32),)
    order = order_of(tuple(square.shape), square.element_size(), square.device)
    assert order is not None, "a volume whose order is not known is not emulated"
    return (emulated_mean(square, order).contiguous(),)


def _emulated(*args: Any, reference: Callable[..., Any]) -> Any:
    given = named(reference, args)
    x = x_at(given, slice(None))
    (mean,) = _mean(*args, reference=reference, emulated=True)
    n = normed(x, mean.to(x.dtype), given["scale"], given["shift"], given["eps"])
    out = laid(padded(n, given["front"], given["back"], given["edge"]))
    return (laid(x), out) if "residual" in given else out


# -- the references, piece by piece ------------------------------------------------------------------------------------


def _means(square: Tensor) -> tuple[Tensor, Tensor]:
    """ATen's mean over channels as the host has it, and in fp32."""
    mean = torch.mean(square, dim=1, keepdim=True)
    return mean, torch.mean(square, dim=1, keepdim=True, dtype=torch.float32)


def _parts(*args: Any, reference: Callable[..., Any], witness: bool = False) -> Iterator[Part]:
    """Frames at a time, by the references' own steps; the mean by ATen of the whole volume."""
    given = named(reference, args)
    front, back, edge = given["front"], given["back"], given["edge"]
    whole, mean, number = slice(None), None, 0
    if "eps" in given:
        mean, exact = _means(squares(given))
        if witness:
            yield 0, (whole,), exact
            number = 1
    for some in pieces(given["y"]):
        x = x_at(given, some)
        if mean is not None and "residual" in given:
            yield number, (whole, whole, some), laid(x)
        if mean is not None:
            x = normed(x, mean[:, :, some], given["scale"], given["shift"], given["eps"])
        first, last = some.start == 0, some.stop == given["y"].shape[2]
        place = slice(0 if first else front + some.start, front + some.stop + (back if last else 0))
        out = laid(padded(x, front if first else 0, back if last else 0, edge))
        yield number + (mean is not None and "residual" in given), (whole, whole, place), out


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
    found = [
        *(
            case(name=f"768x512x121, {channels} channels", channels=channels, sides=sides, real=True)
            for channels, sides in reversed(_LEVELS)
        ),
        case(name="768x512x121, not causal, zeros at the edges", channels=128, sides=(121, 192, 128), front=1, back=1,
             edge=0, real=True),
        case(name="1536x1024x121, 1024 channels", channels=1024, sides=(16, 48, 32), real=True),
        case(name="an encoder's, 768x512x1, 2048 channels", channels=2048, sides=(1, 16, 24), edge=0, real=True),
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


def _retiled(plan: Plan) -> Iterable[Plan]:
    """The same launch with other numbers of pixels per program."""
    pixels = plan.constants["PIXELS"]
    for per_program in {max(1, pixels // 2), 2 * pixels}:
        grid = (-(-plan.scalars[0] // per_program), *plan.grid[1:])
        yield replace(plan, grid=grid, constants={**plan.constants, "PIXELS": per_program})


def evidence(
    reference: Callable[..., Any],
    cases: tuple[PixelCase, ...],
    mutants: tuple[Mutant, ...],
    steps: tuple[str, ...],
    audits: tuple[Audit, ...] = (),
    parts: Callable[..., Iterator[Part]] | None = None,
    battery: Callable[..., Iterator[tuple[str, tuple[Any, ...]]]] = battery,
) -> Evidence:
    more: dict[str, Any] = {"parts": parts or partial(_parts, reference=reference)}
    if "eps" in named(reference, ()):
        more |= {
            "as_one": partial(_as_one, reference=reference),
            "emulated": partial(_emulated, reference=reference),
            "witness": partial(_mean, reference=reference, emulated=False),
            "emulated_witness": partial(_mean, reference=reference, emulated=True),
        }
    return Evidence(
        partial(battery, reference=reference), cases, mutants, audits, retiled=_retiled, steps=steps, **more
    )


# -- what the compiler makes of it -------------------------------------------------------------------------------------


def _audit(residual: bool, channels: int) -> Audit:
    """16 channels at a time of 32 pixels on 128 threads: of one pixel each thread has every fourth 4 channels. Of 256
    channels a load takes four times 16 (TOGETHER), of 128 one; a thread has the same of them and one root.

    For each: + bias, its square and the addition of that, x / root, SiLU (-x * log2 e, 1 + e^-x, a division that may be
    approximate), and + residual. Per thread, for its pixel: 8 additions (between accumulators, folds, the halves of a
    volume, + eps), the factor of the mean, its root and 1 / root. The bias is read again with every piece of a row.
    """
    added = 3 + residual
    counts = {"add.rn.f32": added, "mul.rn.f32": 3, "cvt.rn.bf16.f32": 4 + residual}
    once = {"add.rn.f32": 8, "mul.rn.f32": 2, "cvt.rn.bf16.f32": 3, "sqrt.rn.f32": 1, "div.rn.f32": 1}
    once |= {"ex2.approx.f32": channels // 4, "div.full.f32": channels // 4}
    return Audit(
        f"768x512x121, {channels} channels",
        counts,
        per_thread=once,
        results=channels // 4,
        loads={8: channels // 16 * (2 + residual)},
        stores={4: 1, 8: channels // 16 * (1 + residual)},
    )


def sums(case: str, summands: int, **accesses: Any) -> Audit:
    """Sums of 32 elements for each thread, each rounded."""
    return Audit(case, {"add.rn.f32": summands, "cvt.rn.bf16.f32": summands}, results=32, **accesses)


_PADDED_SUMS = sums("768x512x121, 128 channels", 2, loads={16: 12}, stores={16: 4})

_SUMMED = ("bias", "summands")
_NORMED = (*_SUMMED, "norm", "root", "silu")

_REFERENCES: dict[str, Callable[..., Any]] = {
    "pixel_norm_silu_pad": pixel_norm.pixel_norm_silu_pad,
    "residual_pixel_norm_silu_pad": pixel_norm.residual_pixel_norm_silu_pad,
    "residual_pad": pixel_norm.residual_pad,
}
_MUTANTS = {
    "pixel_norm_silu_pad": (*_PADDED, *_NORM, *_MODULATION, *_NOISE),
    "residual_pixel_norm_silu_pad": (*_PADDED, *_ADDED, *_NORM, *_RESIDUAL_NORM),
    "residual_pad": (*_PADDED, *_ADDED),
}
_STEPS = {"pixel_norm_silu_pad": _NORMED, "residual_pixel_norm_silu_pad": _NORMED, "residual_pad": _SUMMED}
_AUDITS = {
    "pixel_norm_silu_pad": (_audit(False, 128), _audit(False, 256)),
    "residual_pixel_norm_silu_pad": (_audit(True, 128), _audit(True, 256)),
    "residual_pad": (_PADDED_SUMS,),
}

EVIDENCE = {
    name: evidence(reference, _cases(reference), _MUTANTS[name], _STEPS[name], _AUDITS[name])
    for name, reference in _REFERENCES.items()
}
