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

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.bits import compare

Sides = tuple[int, ...]

_LARGE = 2.0**26  # in bf16; what is added to it in fp32 is lost, and 1 more than twice so


class Convolved(NamedTuple):
    """The result of a convolution in channels_last_3d; the bias that is still to be added; why it was the host's."""

    y: Tensor
    bias: Tensor | None
    reason: str | None


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> Tensor:
    """The host's own: `F.conv3d` of a contiguous volume."""
    return F.conv3d(x.contiguous(), weight, bias, stride, padding)


_verdicts: dict[tuple, str | None] = {}  # by signature: why not, or None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> Convolved:
    """The convolution of x, with the bits of `conv3d` once the bias is added and rounded.

    x          [B, C, D, H, W] in channels_last_3d, bf16
    weight     [K, C, d, h, w], contiguous; it is neither changed nor kept in another layout
    bias       [K] or None
    stride, padding    in frames, rows and pixels
    """
    reason = _why_stock(x, weight)
    if reason is None:
        key = (*_signature(x, weight, bias), stride, padding)
        if key not in _verdicts:
            _verdicts[key] = _difference(x, weight, bias, stride, padding)
        reason = _verdicts[key]
    if reason is None:
        return Convolved(F.conv3d(x, weight, None, stride, padding), bias, None)
    y = conv3d(x, weight, bias, stride, padding)
    return Convolved(y.contiguous(memory_format=torch.channels_last_3d), None, reason)


def forget() -> None:
    """Drop every verdict (for tests and measurements)."""
    _verdicts.clear()


def _why_stock(x: Tensor, weight: Tensor) -> str | None:
    if not x.is_cuda:
        return f"the volume is on {x.device}, where PyTorch adds the bias before it rounds"
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return f"the volume is {x.dtype} and the weight {weight.dtype}; accepted: torch.bfloat16"
    if not torch.backends.cudnn.enabled:
        return "cuDNN is switched off"
    if torch.backends.cudnn.benchmark:
        return "torch.backends.cudnn.benchmark is on: cuDNN chooses its kernels by the time that they take"
    return None


def _signature(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
    cudnn = torch.backends.cudnn
    switches = (cudnn.version(), cudnn.deterministic, cudnn.allow_tf32)
    aligned = tuple(t is None or t.data_ptr() % 16 == 0 for t in (x, weight, bias))
    return (x.device, x.shape, x.stride(), weight.shape, weight.stride(), bias is None, *switches, aligned)


def _difference(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sides, padding: Sides) -> str | None:
    """Why this convolution must be the host's; None where the bits are equal on all of `_probes`."""
    for name, volume, weights in _probes(x, weight):
        found = F.conv3d(volume, weights, None, stride, padding)
        if not found.is_contiguous(memory_format=torch.channels_last_3d):
            return "cuDNN's result is not in channels_last_3d here"
        if bias is not None:
            found += bias.view(1, -1, 1, 1, 1)
        expected = conv3d(volume, weights, bias, stride, padding)
        if (mismatch := compare(expected, found.contiguous())) is not None:
            return f"in channels_last_3d the convolution {mismatch.sentence}, on {name}"
        del expected, found
    return None


def _probes(x: Tensor, weight: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what it is, a volume like x, a weight like the given one)."""
    yield "the call's own volume", x, weight
    generator = torch.Generator(x.device).manual_seed(29)

    def drawn(like: Tensor, far: int) -> Tensor:
        """Normals times 2^k, k from -far to far."""
        out = torch.empty_like(like).normal_(generator=generator)
        return out.ldexp_(torch.randint_like(like, -far, far + 1, generator=generator))

    def signs(like: Tensor) -> Tensor:
        return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)

    # about two large terms in each sum: where they cancel, what is left is what was added before and after both
    volume, seldom = signs(x), 2 / weight[0].numel()
    large = torch.empty_like(x).bernoulli_(seldom, generator=generator).mul_(_LARGE).add_(1)
    yield "sums whose large terms cancel", volume.mul_(large), signs(weight)
    del volume, large
    yield "numbers of very different sizes", drawn(x, 10), drawn(weight, 10)
