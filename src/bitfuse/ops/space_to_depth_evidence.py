"""What the operator of `space_to_depth.py` is proved by, with the batteries of `pixel_norm_evidence.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.bits import Part
from bitfuse.core.evidence import Audit, Mutant
from bitfuse.core.launch import named
from bitfuse.core.values import lookalike
from bitfuse.core.volumes import biased, laid, pieces
from bitfuse.ops import pixel_norm_evidence
from bitfuse.ops.pixel_norm_evidence import BF16, PixelCase, evidence
from bitfuse.ops.space_to_depth import downsample, pixels_apart

# -- geometries --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DownsampleCase(PixelCase):
    """A geometry of a downsampler.

    channels    of y
    sides       frames, height and width of what it gives; those of y are `up` times as many
    group       how many channels there are in the mean that is added
    inside      the residual is a padded volume without its first two frames
    """

    group: int = 2

    def arguments(self, device: torch.device | str, tokens: int | None = None, seed: int = 0) -> tuple[Any, ...]:
        generator = torch.Generator(device).manual_seed(seed)
        most = (2, 6, 9) if tokens is not None else self.sides  # for the interpreter
        batch = 0 if tokens == 0 else self.batch
        frames, height, width = (min(*both) * by for *both, by in zip(most, self.sides, self.up, strict=True))

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=device)
            return ((drawn * 2).round().clamp(-4, 4) if self.whole else drawn).to(BF16)

        y = normal(batch, frames, height, width, self.channels).movedim(-1, 1)
        before = 2 if self.inside else 0
        residual = normal(batch, before + frames, height, width, self.channels * self.group).movedim(-1, 1)
        return y, residual[:, :, before:], normal(self.channels) if self.with_bias else None, *self.up


def _cases() -> tuple[DownsampleCase, ...]:
    def case(name: str, channels: int, group: int, up: tuple[int, int, int], **more: Any) -> DownsampleCase:
        return DownsampleCase(name, downsample, channels=channels, group=group, up=up, **more)

    space, time, both = (1, 2, 2), (2, 1, 1), (2, 2, 2)
    real: dict[str, Any] = {"real": True, "inside": True}
    return (
        case("768x512x121, height and width", 64, 2, space, sides=(121, 64, 96), **real),
        case("768x512x121, time", 256, 1, time, sides=(61, 64, 96), **real),
        case("768x512x121, all three", 128, 4, both, sides=(31, 32, 48), **real),
        case("1536x1024x1, all three", 256, 4, both, sides=(1, 32, 48), **real),
        case("LTX-2.3, 768x512x121, all three", 128, 8, both, sides=(16, 16, 24), **real),
        case("small", 16, 4, both, sides=(2, 3, 4), batch=2),
        case("48 channels, no bias", 48, 2, space, sides=(3, 2, 5), with_bias=False),
        case("eight channels in a mean", 16, 8, both, sides=(2, 3, 4)),
        case("time alone", 16, 1, time, sides=(2, 3, 5), batch=2),
    )


# -- what a wrong kernel trips over ------------------------------------------------------------------------------------


def _battery(*args: Any, reference: Any = downsample) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Besides the families of all volumes one whose means tell in which order the channels were added up."""
    for family, given in pixel_norm_evidence.battery(*args, reference=reference, divided=True):
        yield family, given
        if family == "live":
            residual = named(reference, given)["residual"]
            yield "cancelling", (given[0], lookalike(residual, _cancelling(residual), gap=1), *given[2:])


def _cancelling(like: Tensor) -> Tensor:
    """Half of the values are plus or minus 2^26, beside which the others are lost in fp32 until those cancel."""
    generator = torch.Generator(like.device).manual_seed(31)
    drawn = torch.randn(like.shape, generator=generator, device=like.device)
    large = torch.rand(like.shape, generator=generator, device=like.device) < 0.5
    return torch.where(large, drawn.sign() * 2.0**26, drawn).to(like.dtype)


# -- on a CPU, whose ATen adds up channels in another order ------------------------------------------------------------


def _emulated(y: Tensor, residual: Tensor, bias: Tensor | None, *down: int) -> Tensor:
    """The reference with its mean in CUDA's order."""
    group = residual.shape[1] // y.shape[1]
    channels = pixels_apart(residual.contiguous(), *down).unflatten(1, (-1, group)).float().unbind(2)
    sums = [torch.zeros_like(channels[0])] * 4
    for number, channel in enumerate(channels):
        sums[number % 4] = sums[number % 4] + channel
    mean = (((sums[0] + sums[1]) + sums[2]) + sums[3]) * (1 / group)
    return laid(pixels_apart(biased(y, bias), *down) + mean.to(y.dtype))


# -- the reference, piece by piece -------------------------------------------------------------------------------------


def _parts(
    y: Any, residual: Any, bias: Any, frames: int, height: int, width: int, witness: bool = False
) -> Iterator[Part]:
    whole = slice(None)
    for some in pieces(y[:, :, ::frames]):  # as many frames as the result has
        given = slice(some.start * frames, some.stop * frames)
        expected = downsample(y[:, :, given], residual[:, :, given], bias, frames, height, width)
        yield 0, (whole, whole, some), expected


# -- wrong kernels -----------------------------------------------------------------------------------------------------

_BIAS = "x = round_to(x + tl.load(bias_ptr + channel, mask=here, other=0.0).to(tl.float32), dtype)"
_MUTANTS = (
    Mutant("y + bias not rounded before the mean is added", (
        (_BIAS, _BIAS.replace("round_to(", "(").replace(", dtype)", ")")),
        ("tl.reshape(x.to(dtype), (PIXELS, PARTS, CHANNELS))", "tl.reshape(x, (PIXELS, PARTS, CHANNELS))"),)),
    Mutant("height and width exchanged", (
        ("part % DOWN_WIDTH, pixel // width", "part // DOWN_WIDTH % DOWN_HEIGHT, pixel // width"),
        ("part // DOWN_WIDTH % DOWN_HEIGHT, rest // height", "part % DOWN_WIDTH, rest // height"),)),
    Mutant("channels of a part side by side", (
        ("tl.trans(tl.reshape(x.to(dtype), (PIXELS, PARTS, CHANNELS)), (0, 2, 1))", "x.to(dtype)"),)),
    Mutant("the mean not rounded", (
        ("mean = round_to(total * (1.0 / GROUP), dtype)", "mean = total * (1.0 / GROUP)"),)),
    Mutant("four channels added in pairs", (
        ("total = ((first + second) + third) + fourth",
         "total = (first + second) + (third + fourth)"),), case="small"),
    Mutant("eight channels added by neighbours", (
        ("tl.trans(tl.reshape(more, (PIXELS * WIDE, 2, 4)), (0, 2, 1))", "tl.reshape(more, (PIXELS * WIDE, 4, 2))"),),
           case="eight channels in a mean"),
    Mutant("the mean of negative zeros negative", (("tl.where(total == 0.0, 0.0, total)", "total"),),
           case="time alone"),
    Mutant("the residual's channels of another program", (
        ("lane = tl.program_id(1) * (CHANNELS * GROUP)", "lane = 0"),),
           case="768x512x121, all three"),
)  # fmt: skip

# -- what the compiler makes of it -------------------------------------------------------------------------------------

# A thread makes 8 elements: of y and a bias of 8 channels each, and of four times as many of the residual. For each:
# + bias, three additions between four channels, a quarter of that, + the mean.
_AUDIT = Audit(
    "768x512x121, all three", {"add.rn.f32": 5, "mul.rn.f32": 1, "cvt.rn.bf16.f32": 3}, results=8, loads={16: 6}
)
# Four elements, with eight channels in a mean.
_OF_EIGHT = Audit(
    "LTX-2.3, 768x512x121, all three",
    {"add.rn.f32": 9, "mul.rn.f32": 1, "cvt.rn.bf16.f32": 3},
    results=4,
    loads={8: 2, 16: 4},
    stores={8: 1},
)

EVIDENCE = {
    "downsample": replace(
        evidence(downsample, _cases(), _MUTANTS, ("bias",), (_AUDIT, _OF_EIGHT), parts=_parts, battery=_battery),
        emulated=_emulated,
    ),
}
