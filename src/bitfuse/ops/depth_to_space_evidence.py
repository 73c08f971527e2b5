"""What the operators of `depth_to_space.py` are proved by, with the batteries of `pixel_norm_evidence.py`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from bitfuse.core.bits import Part
from bitfuse.core.evidence import Mutant
from bitfuse.core.volumes import pieces
from bitfuse.ops.depth_to_space import unpatchify, upsample
from bitfuse.ops.pixel_norm_evidence import PixelCase, evidence, sums

_upsampled, _unpatched = partial(PixelCase, reference=upsample), partial(PixelCase, reference=unpatchify)

_UPSAMPLE_CASES = (
    *(
        _upsampled(name=f"768x512x121, {channels} channels", channels=channels, sides=sides, real=True, inside=True)
        for channels, sides in ((512, (16, 24, 16)), (256, (31, 48, 32)), (128, (61, 96, 64)))
    ),
    _upsampled(name="small", channels=16, sides=(3, 4, 6), batch=2),
    _upsampled(name="time alone, no residual", channels=48, sides=(3, 4, 6), up=(2, 1, 1), repeats=0),
    _upsampled(name="height and width, no bias", channels=32, sides=(2, 3, 5), up=(1, 2, 2), with_bias=False),
)
_UNPATCHIFY_CASES = (
    _unpatched(name="768x512x121", channels=3, sides=(121, 192, 128), real=True),
    _unpatched(name="small", channels=3, sides=(3, 4, 6), batch=2),
    _unpatched(name="one colour, patches of 2, no bias", channels=1, sides=(2, 3, 5), patch=2, with_bias=False),
)

# -- the references, piece by piece ------------------------------------------------------------------------------------


def _upsample_parts(y: Any, residual: Any, bias: Any, *ups: int, witness: bool = False) -> Iterator[Part]:
    frames = ups[0]
    for some in pieces(y):
        before = min(some.start, 1)  # the reference drops the first frames; behind the first piece, those of one before
        with_one = slice(some.start - before, some.stop)
        more = None if residual is None else residual[:, :, with_one]
        expected = upsample(y[:, :, with_one], more, bias, *ups)[:, :, before:]
        first = max(0, some.start * frames - (frames - 1))
        yield 0, (slice(None), slice(None), slice(first, first + expected.shape[2])), expected


def _unpatchify_parts(y: Any, bias: Any, frames: int, patch: int, witness: bool = False) -> Iterator[Part]:
    for some in pieces(y):
        place = slice(some.start * frames, some.stop * frames)
        yield 0, (slice(None), slice(None), place), unpatchify(y[:, :, some], bias, frames, patch)


# -- wrong kernels -----------------------------------------------------------------------------------------------------

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

# -- what the compiler makes of them -----------------------------------------------------------------------------------

_UPSAMPLED_SUMS = sums("768x512x121, 128 channels", 2, loads={16: 12}, stores={16: 4})
_PATCHES = sums("768x512x121", 1, loads={16: 5}, stores={8: 8})

EVIDENCE = {
    "upsample": evidence(upsample, _UPSAMPLE_CASES, _UPSAMPLED, ("bias",), (_UPSAMPLED_SUMS,), parts=_upsample_parts),
    "unpatchify": evidence(unpatchify, _UNPATCHIFY_CASES, _UNPATCHED, ("bias",), (_PATCHES,), parts=_unpatchify_parts),
}
