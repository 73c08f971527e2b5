"""A convolution in the layout of cuDNN's kernels, without its bias, where that is seen to have the host's bits.

cuDNN's convolutions of bf16 volumes run on tensor cores with the channels of a pixel side by side (channels_last_3d).
A host that keeps the pixels of a channel side by side pays for two changes of layout around each, and PyTorch adds the
bias by a kernel of its own. `convolve` gives cuDNN the volume as its kernel takes it and leaves the bias to whoever
reads the result next (`pixel_norm.py`).

That both ways give the same bits is a claim about which of cuDNN's kernels each of them runs. It is proved for each
signature (device, shapes, dtypes, strides, cuDNN and its switches) before the result is used, against the host's own
call: on the call's own volume, on sums of which large terms cancel, so that the result tells which small terms were
added in between (the order of the additions), and on numbers of very different sizes, of which an accumulator drops
what lies too far below its largest. Where it does not hold, the host's own call runs, and the reason says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.bits import Mismatch, compare
from bitfuse.core.conditions import capturing
from bitfuse.core.operator import Route

CHANNELS_LAST = torch.channels_last_3d
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
        signature = _signature(x, weight, bias, stride, padding)
        reason = _why_elsewhere(x) or next(self.why_not(x, weight, bias, stride, padding), None)
        if reason is None and signature not in self._verdicts:
            if capturing(x):
                reason = "this layout is not decided yet and a CUDA graph is being captured"
                return Route(_stock, reason, lasts=False)
            try:
                with torch.no_grad():
                    self._verdicts[signature] = _difference(x, weight, bias, stride, padding)
            except torch.OutOfMemoryError:  # of the moment: a later call tries again
                reason = "the device ran out of memory while the convolution was being proved"
                return Route(_stock, reason, lasts=False)
        reason = reason or self._verdicts[signature]
        if reason is not None:
            return Route(_stock, reason)
        return Route(_channels_last, tier=self.tier, signature=signature)

    def why_not(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> Iterator[str]:
        """Why this convolution is the host's own, on whatever device: for `bitfuse explain`."""
        if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
            yield f"the volume is {x.dtype} and the weight {weight.dtype}; accepted: torch.bfloat16"
        if not torch.backends.cudnn.enabled:
            yield "cuDNN is switched off"
        if torch.backends.cudnn.benchmark:
            yield "torch.backends.cudnn.benchmark is on: cuDNN chooses its kernels by the time that they take"

    def rehearse(self, take: Any, args: tuple[Any, ...]) -> None:
        """Nothing is compiled for a convolution."""

    def condemn(self, route: Route, mismatch: Mismatch) -> bool:
        """Use a convolution no more that an audit saw to differ. False where that had been done before."""
        assert route.signature is not None, "only a fused route has something to condemn"
        known = self._verdicts.get(route.signature)
        self._verdicts[route.signature] = mismatch.sentence
        return known is None

    def forget(self) -> None:
        """Drop every verdict (for tests and measurements)."""
        self._verdicts.clear()


CONVOLUTION = Convolution()


def _channels_last(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> tuple[Tensor, ...]:
    y = F.conv3d(x, weight, None, stride, padding)
    return (y,) if bias is None else (y, bias)


def _stock(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> tuple[Tensor, ...]:
    return (conv3d(x, weight, bias, stride, padding).contiguous(memory_format=CHANNELS_LAST),)


def _why_elsewhere(x: Tensor) -> str | None:
    return None if x.is_cuda else f"the volume is on {x.device}, where PyTorch adds the bias before it rounds"


def _signature(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> tuple:
    cudnn = torch.backends.cudnn
    switches = (cudnn.version(), cudnn.deterministic, torch.are_deterministic_algorithms_enabled(), cudnn.allow_tf32)
    tensors = tuple(None if t is None else (t.shape, t.stride(), t.data_ptr() % 16) for t in (x, weight, bias))
    return (x.device, x.dtype, tensors, stride, padding, *switches)


def _difference(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> str | None:
    """Why this convolution must be the host's; None where the bits are equal on all of `_probes`."""
    for name, probe in _probes(x, weight):
        volume, weights = probe()
        found = F.conv3d(volume, weights, None, stride, padding)
        if not found.is_contiguous(memory_format=CHANNELS_LAST):
            return "cuDNN's result is not in channels_last_3d here"
        if bias is not None:
            found += bias.view(1, -1, 1, 1, 1)
        expected = conv3d(volume, weights, bias, stride, padding)
        del volume, weights
        # `compare` for what this finds alone: it holds copies, and NaN may differ
        same = torch.equal(expected.view(torch.int16), found.view(torch.int16))
        mismatch = None if same else compare(expected, found.contiguous())
        if mismatch is not None:
            return f"in channels_last_3d the convolution {mismatch.sentence}, on {name}"
        del expected, found
    return None


def _probes(x: Tensor, weight: Tensor) -> Iterator[tuple[str, Callable[[], tuple[Tensor, Tensor]]]]:
    """(what it is, what makes a volume like x and a weight like the given one)."""
    generator = torch.Generator(x.device).manual_seed(29)

    def drawn(like: Tensor, far: int) -> Tensor:
        """Normals times 2^k, k from -far to far."""
        out = torch.empty_like(like).normal_(generator=generator)
        return out.ldexp_(torch.empty_like(like).random_(-far, far + 1, generator=generator))

    def signs(like: Tensor) -> Tensor:
        return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)

    def cancelling() -> tuple[Tensor, Tensor]:
        """About two large terms in each sum: where they cancel, what is left is what was added before and after."""
        seldom = torch.empty_like(x).bernoulli_(2 / weight[0].numel(), generator=generator)
        return signs(x).mul_(seldom.mul_(_LARGE).add_(1)), signs(weight)

    yield "the call's own volume", lambda: (x, weight)
    yield "sums whose large terms cancel", cancelling
    yield "numbers of very different sizes", lambda: (drawn(x, 10), drawn(weight, 10))
