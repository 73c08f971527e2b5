"""Why a call can't be fused here and now, in sentences that every operator's predicate shares.

`around` doesn't look at the tensors: is bitfuse switched off, is PyTorch tracing, does a mode want to see every op? It
is asked at every call. `plain`, `fitting` and `runnable` ask whether the tensors are plain ones with memory of their
own, of shapes that the reference takes, on a device where kernels run. An operator's `why_not` asks these three, once
for each layout (`bitfuse.core.operator`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bitfuse.core.forms import on_meta
from bitfuse.core.kernel import interpreting
from bitfuse.core.switch import VALUE

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
"""The dtypes that kernels take: of 16 bits, and all."""
OLDEST_GPU = (8, 0)


class ShapeError(ValueError, RuntimeError):
    """Arguments that fit neither the kernel nor the reference, for which PyTorch itself raises RuntimeError."""


_on = VALUE == "1"
OFF = "bitfuse is off (BITFUSE=0 or bitfuse.disable())"


# What may change what a PyTorch op does, read at every call: cheap, private names for public questions.
_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.maybe_current_level


def switch(on: bool) -> None:
    """Let kernels run, or none. `bitfuse.enable` and `bitfuse.disable` also drop what was decided before."""
    global _on
    _on = on


def watched() -> bool:
    """Whether `around` may yield something: a quick look, at every call, without making a generator."""
    return (
        not _on
        or torch.compiler.is_compiling()
        or _tracing() is not None
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
        or _autocast()
    )


def around() -> Iterator[str]:
    """Why no kernel may run just now, whatever the tensors are: bitfuse is off, or somebody watches PyTorch's ops."""
    if not _on:
        yield OFF
    if torch.compiler.is_compiling() or _tracing() is not None:
        yield "PyTorch is tracing; the tracer gets the PyTorch chain itself"
    if _dispatch_modes() or (_function_modes() and _watching_functions()):
        yield "a torch dispatch or function mode is active and wants to see every PyTorch op"
    if _functorch_level() is not None:
        yield "a functorch transform (vmap, grad, jvp, functionalize) is under way"
    if forward_ad._current_level >= 0:
        yield "forward-mode differentiation is under way"
    if _autocast():
        yield "autocast is on, and may change what the PyTorch chain computes"


def plain(arguments: dict[str, Any]) -> Iterator[str]:
    """Why the tensors among these named arguments are not plain ones with memory of their own, if so."""
    for name, t in _tensors(arguments).items():
        if type(t) not in (Tensor, torch.nn.Parameter):
            yield f"{name} is a {type(t).__name__}, not a plain tensor"
        elif torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._is_functional_tensor(t):
            yield f"{name} is inside a functorch transform, and has no memory of its own"
        elif t.layout != torch.strided:
            yield f"{name} is a {t.layout} tensor, not a strided one"
        elif t.is_nested:
            yield f"{name} is a nested tensor, which has no one shape"
        if t.is_neg() or t.is_conj():
            yield f"{name} is a lazy view (its negation or conjugation is still pending)"


def fitting(reference: Callable[..., Any], arguments: dict[str, Any], problem: str | None) -> Iterator[str]:
    """The caller has found `problem` with these shapes, or None. Raises it as ShapeError where the reference rejects
    them, too; where the reference takes them in its own way, yields it as a reason to run that."""
    if problem is None:
        return
    try:
        on_meta(reference, *arguments.values())
    except Exception:
        given = ", ".join(f"{name} {list(t.shape)}" for name, t in _tensors(arguments).items())
        raise ShapeError(f"{reference.__name__}: {problem}; given {given}") from None
    yield f"{problem} (the PyTorch chain takes these shapes in its own way)"


def runnable(arguments: dict[str, Any]) -> Iterator[str]:
    """Why no kernel may run for these named arguments here and now: `around`, and their devices, gradients, capture.

    Asked only while a layout is decided, which its last sentence relies on.
    """
    yield from around()
    tensors = _tensors(arguments)
    if importlib.util.find_spec("triton") is None:
        yield "Triton is not installed"
    first, *_ = tensors
    device = tensors[first].device
    for name, t in tensors.items():
        if t.device != device:
            yield f"{name} is on {t.device} and {first} on {device}"
    if device.type == "cpu" and not interpreting():
        yield "the tensors are on the CPU, where kernels run only in Triton's interpreter (TRITON_INTERPRET=1)"
    elif device.type not in ("cpu", "cuda"):
        yield f"the tensors are on {device}; kernels run on CUDA devices"
    elif device.type == "cuda" and interpreting():
        yield "TRITON_INTERPRET=1 is set, and the interpreter is for CPU tensors"
    elif device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        yield f"{device} is older than sm_{OLDEST_GPU[0]}{OLDEST_GPU[1]}, and has no bf16 arithmetic"
    if torch.is_grad_enabled() and (wanting := [name for name, t in tensors.items() if t.requires_grad]):
        yield f"a gradient is required of {', '.join(wanting)}"
    if tensors[first].numel() == 0:
        yield f"{first} is empty: there is nothing to compute"
    if capturing(tensors[first]):  # a probe or a battery would wait for the device, which breaks the capture
        yield "this layout is not decided yet and a CUDA graph is being captured"


def _tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: a for name, a in arguments.items() if isinstance(a, Tensor)}


def capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _watching_functions() -> bool:
    """Function modes other than `torch.set_default_device`'s, which touches factory functions only."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def described(value: Any) -> str:
    """What was given, for messages: None, or the name of its class."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return "None" if value is None else f"a {name}"
