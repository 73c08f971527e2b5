"""A convolution in the layout of cuDNN's kernels, without its bias, where that is seen to have the host's bits.

cuDNN's convolutions of bf16 volumes run on tensor cores with the channels of a pixel side by side (channels_last_3d).
A host that keeps the pixels of a channel side by side pays for two changes of layout around each, and PyTorch adds the
bias by a kernel of its own. `convolve` gives cuDNN the volume as its kernel takes it and leaves the bias to whoever
reads the result next (`pixel_norm.py`).

That both ways give the same bits is a claim about which of cuDNN's kernels each of them runs. It is proved for each
signature (device, shapes, dtypes, strides, cuDNN and its switches) before the result is used, against the host's own
call: on the call's own volume, and on sums of which two large terms cancel, so that the result tells which small terms
were added in between: the order of the additions, and what an accumulator drops that lies too far below its largest.
Where it does not hold, the host's own call runs, and the reason says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core import proof
from bitfuse.core.bits import Mismatch, compare_parts
from bitfuse.core.conditions import capturing
from bitfuse.core.operator import Route
from bitfuse.core.volumes import CHANNELS_LAST, pieces

Sides = tuple[int, ...]

_LARGE = 2.0**26  # a small term that is added to it in fp32 is lost


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> Tensor:
    """The host's own: `F.conv3d` of a contiguous volume."""
    return F.conv3d(x.contiguous(), weight, bias, stride, padding)


class Convolution:
    """What a site calls as it calls an `Operator`: `routed` says how this convolution is to be done.

    The arguments of a call:

    x          [B, C, D, H, W] in channels_last_3d, bf16
    weight     [K, C, d, h, w], contiguous; it is neither changed nor kept in another layout
    bias       [K] or None
    stride, padding    in frames, rows and pixels

    A call returns (y, bias): the result in channels_last_3d, and the bias that is still to be added to it and rounded;
    (y,) where there is none, as the host's own call has added it. With its bias, y has the bits of `conv3d`.
    """

    name, tier = "convolution", "channels last"
    source = "torch.nn.Conv3d, computed by cuDNN"

    def __init__(self) -> None:
        self._verdicts: dict[tuple, str | None] = {}  # by signature: why not, or None

    def reference(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> Any:
        """What an audit compares a call with: on CUDA the host's own call adds the bias by a kernel of its own."""
        y = conv3d(x, weight, None, stride, padding).contiguous(memory_format=CHANNELS_LAST)
        return (y,) if bias is None else (y, bias)

    def routed(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> Route:
        signature, args = _signature(x, weight, bias, stride, padding), (x, weight, bias, stride, padding)
        reason, result = _why_elsewhere(x) or next(self.why_not(*args), None), None
        if reason is None and signature not in self._verdicts:
            if capturing(x):
                reason = "this layout is not decided yet and a CUDA graph is being captured"
                return Route(_stock, reason, lasts=False)
            if (failed := proof.waiting(self, self.tier, signature)) is not None:
                return Route(_stock, failed.sentence, lasts=False)
            start = time.perf_counter()
            try:
                with torch.no_grad():
                    found, result = _difference(*args)
            except torch.AcceleratorError:
                raise
            except Exception as error:  # the host's own call may not meet it
                failure = proof.failure(error, time.perf_counter() - start, "being proved")
                if not failure.final:
                    proof.postpone(self, self.tier, signature, failure)
                    return Route(_stock, failure.sentence, lasts=False)
                found = failure.sentence
            keep = self._verdicts.setdefault if found is None else self._verdicts.__setitem__
            keep(signature, found)  # another thread may have found a mismatch meanwhile
        reason = reason or self._verdicts[signature]
        if reason is not None:
            return Route(_stock, reason)
        return Route(_channels_last if result is None else _given(result), tier=self.tier, signature=signature)

    def why_not(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> Iterator[str]:
        """Why this convolution is the host's own, on whatever device: for `bitfuse explain`."""
        if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
            yield f"the volume is {x.dtype} and the weight {weight.dtype}; accepted: torch.bfloat16"
        if not torch.backends.cudnn.enabled:
            yield "cuDNN is switched off"
        if torch.backends.cudnn.benchmark:
            yield "torch.backends.cudnn.benchmark is on: cuDNN chooses its kernels by the time that they take"

    def dry(self, take: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> Any:
        """What a call returns, without values; nothing is compiled for a convolution."""
        sides = (
            (side + 2 * more - kernel) // step + 1
            for side, more, kernel, step in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)
        )
        y = torch.empty((len(x), len(weight), *sides), dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST)
        args = (x, weight, bias, stride, padding)
        known = _why_elsewhere(x) or next(self.why_not(*args), None) or self._verdicts.get(_signature(*args))
        return (y,) if bias is None or known is not None else (y, bias)

    def condemn(self, route: Route, mismatch: Mismatch) -> bool:
        """Use a convolution no more that an audit saw to differ. False where that had been done before."""
        assert route.signature is not None, "only a fused route has something to condemn"
        known = self._verdicts.get(route.signature)
        self._verdicts[route.signature] = mismatch.sentence
        return known is None

    def forget(self) -> None:
        """Drop every verdict (for tests and measurements); `proof.forget` drops the errors of the moment."""
        self._verdicts.clear()


CONVOLUTION = Convolution()


def _channels_last(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> tuple[Tensor, ...]:
    y = F.conv3d(x, weight, None, stride, padding)
    return (y,) if bias is None else (y, bias)


def _given(y: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """`_channels_last` of a volume for which that has just been computed. It is held until it is asked for."""
    held = [y]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> tuple[Tensor, ...]:
        if not held:
            return _channels_last(x, weight, bias, stride, padding)
        return (held.pop(),) if bias is None else (held.pop(), bias)

    return run


def _stock(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> tuple[Tensor, ...]:
    return (conv3d(x, weight, bias, stride, padding).contiguous(memory_format=CHANNELS_LAST),)


def _why_elsewhere(x: Tensor) -> str | None:
    return None if x.is_cuda else f"the volume is on {x.device}, where PyTorch adds the bias before it rounds"


def _signature(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> tuple:
    cudnn = torch.backends.cudnn
    switches = (cudnn.version(), cudnn.deterministic, torch.are_deterministic_algorithms_enabled(), cudnn.allow_tf32)
    tensors = tuple(None if t is None else (t.shape, t.stride(), t.data_ptr() % 16) for t in (x, weight, bias))
    return (x.device, x.dtype, tensors, stride, padding, *switches)


def _difference(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides
) -> tuple[str | None, Tensor | None]:
    """(why this convolution must be the host's, None where the bits are equal on `_probe` and on the call's own volume;
    the result of that, without the bias, where they are).

    The host's own call comes first, with what it needs of memory: that is the most that is held here.
    """
    volume, weights = _probe(x, weight)
    expected = conv3d(volume, weights, bias, stride, padding)
    ours = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(volume)
    del volume
    found = F.conv3d(ours, weights, None, stride, padding)
    if (reason := _parting(expected, found, bias, "sums whose large terms cancel")) is not None:
        return reason, None
    del ours, weights, expected, found
    expected = conv3d(x, weight, bias, stride, padding)
    found = F.conv3d(x, weight, None, stride, padding)
    reason = _parting(expected, found, bias, "the call's own volume")
    return (None, found) if reason is None else (reason, None)


def _parting(expected: Tensor, found: Tensor, bias: Tensor | None, what: str) -> str | None:
    if not found.is_contiguous(memory_format=CHANNELS_LAST):
        return "cuDNN's result is not in channels_last_3d here"
    added = None if bias is None else bias.view(1, -1, 1, 1, 1)
    parts = (((slice(None), slice(None), some), expected[:, :, some]) for some in pieces(expected))
    for place, part in parts:
        sums = found[place] if added is None else found[place] + added
        if (mismatch := compare_parts([(0, (slice(None),), part)], (sums,))) is not None:
            where = f"on {what}" if place[2].start == 0 else f"on {what} from frame {place[2].start} on"
            return f"in channels_last_3d the convolution {mismatch.sentence}, {where}"
    return None


def _probe(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A contiguous volume like x, and a weight of the given one's form.

    The volume is of plus and minus 1, and about two numbers of each sum are plus or minus `_LARGE`. The filters are of
    plus and minus 1, but for an eighth of them, of numbers of very different sizes. With the former other orders of
    additions (reversed, in halves, the last eight terms by themselves) alter 16, 14 and 0.7 % of 6400 results; numbers
    of very different sizes in both, which had a probe of their own, none.
    """
    generator = torch.Generator(x.device).manual_seed(29)

    def signs(shape: torch.Size) -> Tensor:
        found = torch.empty(shape, dtype=x.dtype, device=x.device)
        return found.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)

    volume = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for some in pieces(volume):
        part = signs(volume[:, :, some].shape)
        seldom = torch.empty_like(part).bernoulli_(2 / weight[0].numel(), generator=generator)
        volume[:, :, some] = part.mul_(seldom.mul_(_LARGE).add_(1))
    weights = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    for number, some in enumerate(weights.split(max(1, len(weights) // 8))):  # of up to 226 MB
        if number:
            some.copy_(signs(some.shape))
        else:  # normals times 2^k, k from -10 to 10
            some.normal_(generator=generator).ldexp_(torch.empty_like(some).random_(-10, 11, generator=generator))
    return volume, weights
