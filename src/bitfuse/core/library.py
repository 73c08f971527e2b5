"""An operator as a PyTorch op, `torch.ops.bitfuse.<name>`, which Dynamo and autograd can see."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from bitfuse.core.bits import Outputs, as_tuple

# What a reference may declare a parameter to be: how torch.library calls it, and how a sentence does.
_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int"}
KINDS = {Tensor: "a tensor", Tensor | None: "a tensor or None", float: "a float", int: "an int"}


def _schema(reference: Callable[..., Outputs]) -> str:
    hints = get_type_hints(reference)
    parameters = []
    for name, parameter in inspect.signature(reference).parameters.items():
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        parameters.append(f"{_SCHEMA[hints[name]]} {name}{default}")
    returned = hints["return"]
    several = get_args(returned)
    result = f"({', '.join(_SCHEMA[kind] for kind in several)})" if several else _SCHEMA[returned]
    return f"({', '.join(parameters)}) -> {result}"


def register(operator: Any) -> None:
    """Make the operator `torch.ops.bitfuse.<name>`, its fake function and its gradient those of the reference."""

    def forward(*args: Any) -> Any:
        with torch.no_grad():  # autograd has taken over outside this op
            return operator.route(*args).run(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in inputs))
        ctx.values = [None if isinstance(a, Tensor) else a for a in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The vector-Jacobian product of the reference itself."""
        inputs = [v if t is None else t for t, v in zip(ctx.saved_tensors, ctx.values, strict=True)]
        needed = [*ctx.needs_input_grad, *[False] * len(inputs)][: len(inputs)]  # arguments left out need none
        twice = torch.is_grad_enabled()  # only when this gradient will be differentiated in its turn
        with torch.enable_grad():
            if not twice:
                inputs = [
                    a.detach().requires_grad_(n) if isinstance(a, Tensor) else a
                    for a, n in zip(inputs, needed, strict=True)
                ]
            wanted = [a for a, n in zip(inputs, needed, strict=True) if n]
            outs = as_tuple(operator.reference(*inputs))
            pairs = [(out, g) for out, g in zip(outs, grads, strict=True) if g is not None and out.requires_grad]
            if not pairs:
                return (None,) * len(inputs)
            outs, cotangents = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outs, wanted, cotangents, create_graph=twice, allow_unused=True))
        return tuple(next(found) if n else None for n in needed)

    op = torch.library.custom_op(
        f"bitfuse::{operator.name}", forward, mutates_args=(), schema=_schema(operator.reference)
    )
    op.register_fake(operator.reference)
    op.register_autograd(backward, setup_context=setup_context)
