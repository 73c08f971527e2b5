"""What an eager function returns, without values: shapes, strides and dtypes, and its own shape errors.

PyTorch's meta device answers the same question. But most of its operators are written in Python, and the first of
them that runs imports torch._dynamo: 890 modules, 4 to 9 s of the processor's time in a user's first step. So here the
function runs on meta tensors whose views PyTorch forms itself, and the operators of which the hosts' chains consist
are answered by what ATen does. Any other operator goes to the meta device, which is slow the first time and as right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FORMS_KEPT = 4096  # forms of arguments whose outputs are remembered; a render uses some dozens

_ELEMENTWISE = (
    *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.neg, Tensor.pow, Tensor.__rsub__),
    *(torch.addcmul, torch.lerp, torch.rsqrt, torch.sigmoid),
)
_NORMS = (F.layer_norm, F.rms_norm)


def on_meta(reference: Callable[..., Any], *args: Any) -> Any:
    """What the reference returns for these arguments, as tensors on the meta device.

    Remembered by the forms of the arguments: a proof asks seven times.
    """
    return _on_meta(reference, *(_Form(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args))


class _Form(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@functools.lru_cache(_FORMS_KEPT)
def _on_meta(reference: Callable[..., Any], *args: Any) -> Any:
    forms = (torch.empty_strided(*a[:2], dtype=a.dtype, device="meta") if isinstance(a, _Form) else a for a in args)
    with torch.no_grad(), _Forms():
        return reference(*forms)


class _Forms(TorchFunctionMode):
    """Inside, the operators above are answered here; every other one, and every view, runs as it always does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _answer(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if answer is None else answer


def _answer(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What the operator returns for floating-point tensors, None where PyTorch itself is to be asked."""
    operands = [a for a in (args[0] if func is torch.stack else args) if isinstance(a, Tensor)]
    if not operands or not all(t.is_meta and t.is_floating_point() and t.numel() for t in operands):
        return None
    first = operands[0]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in operands))
    if func is torch.lerp and any(t.dtype != dtype for t in operands):
        return None  # raises, where other elementwise operators promote
    if (func in _ELEMENTWISE and not named) or (func is F.silu and named == {"inplace": False}):
        shape = functools.reduce(torch._C._infer_size, (t.shape for t in operands))  # raises as PyTorch does
        strides = elementwise_strides(shape, operands)
        return None if strides is None else torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    if func is Tensor.addcmul_ and not named:
        fits = all(torch._C._infer_size(first.shape, t.shape) == first.shape for t in operands)
        return first if fits else None
    if func is Tensor.mean and args[1:] == (-1,) and named == {"keepdim": True}:
        return first.new_empty((*first.shape[:-1], 1))
    if func is torch.stack and named in ({"dim": -1}, {"dim": -2}) and all(t.shape == first.shape for t in operands):
        sizes = [*first.shape, len(operands)]
        sizes[-1], sizes[named["dim"]] = sizes[named["dim"]], sizes[-1]
        return first.new_empty(sizes, dtype=dtype)
    if func in _NORMS and (func is F.layer_norm or first.is_contiguous()) and args[1:] == (first.shape[-1:],):
        rows = [t for t in named.values() if isinstance(t, Tensor)]
        return first.new_empty(first.shape) if all(t.shape == first.shape[-1:] for t in rows) else None
    return None


def elementwise_strides(shape: torch.Size, operands: list[Tensor]) -> tuple[int, ...] | None:
    """The strides that ATen gives the result of an elementwise operator (aten/src/ATen/TensorIterator.cpp).

    Those of the operands where they have one form and are dense. Else the result is dense, its dimensions in the order
    in which those of the operands lie in memory: of two dimensions the first operand decides that tells them apart.
    None for images in channels-last order, for which ATen has rules of its own.
    """
    first = operands[0]
    if all(t.shape == shape for t in operands):
        if all(t.is_contiguous() for t in operands):
            return _dense(shape, list(range(len(shape))))
        if len(shape) == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in operands):
            return None
        if all(t.stride() == first.stride() for t in operands) and _is_dense(first):
            return first.stride()

    expanded = [t.expand(shape).stride() for t in operands]  # 0 where a dimension is broadcast

    def later(a: int, b: int) -> int:
        """1 if dimension b lies inside of a in memory, -1 if outside, 0 if no operand tells."""
        for strides in expanded:
            if strides[a] == 0 or strides[b] == 0:
                continue
            if strides[a] != strides[b]:
                return 1 if strides[a] > strides[b] else -1
            if shape[a] > shape[b]:
                return 1
        return 0

    inner_first = list(reversed(range(len(shape))))
    for i in range(1, len(shape)):  # ATen's insertion sort: a tie is passed over, and the search goes on
        at = i
        for before in reversed(range(i)):
            verdict = later(inner_first[before], inner_first[at])
            if verdict > 0:
                inner_first[before], inner_first[at] = inner_first[at], inner_first[before]
                at = before
            elif verdict < 0:
                break
    return _dense(shape, inner_first[::-1])


def _dense(shape: Sequence[int], outer_first: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor without gaps whose dimensions lie in memory in this order."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(outer_first):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def _is_dense(t: Tensor) -> bool:
    """True if no two elements share memory and none of it is left out; dimensions of size 1 don't count."""
    step = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != step:
            return False
        step *= size
    return True
