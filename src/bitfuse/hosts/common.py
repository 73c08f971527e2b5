"""What the adapters share: a block's forward, AdaLN values and second CUDA stream; a rotary function's check."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitfuse import proof
from bitfuse.contract import Operator
from bitfuse.hosts.patch import Swapped

Ada = tuple[Tensor, Tensor | None]  # an AdaLN value [B, T or 1, D] and the table row [D] that is added to it

ABSENT = (None, None, None, None)  # no modulation


def modulation(scale: Ada, shift: Ada) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """scale, shift, scale_table, shift_table, as the operators take them."""
    return scale[0], shift[0], scale[1], shift[1]


class Block(Swapped):
    """First base of a block with its elementwise chains fused, whose second base is the host's own.

    `_bitfuse` has the block's `sites`, and `why_stock(block, args, kwargs)`: why the host's forward must run, or None.
    Ours is `_forward(state, *args, **kwargs)`.
    """

    _forward: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # a hook that wrapped this method may still call it when the block is stock again, or in a copy of it
        state = self.__dict__.get("_bitfuse")
        if state is not None and not torch.compiler.is_compiling():
            reason = state.why_stock(self, args, kwargs)
            if reason is None:
                return self._forward(state, *args, **kwargs)
            for site in state.sites.values():
                site.fall(reason)
        own = type(self)
        stock: Any = own.__bases__[1] if issubclass(own, Block) else own
        return stock.forward(self, *args, **kwargs)


class Values:
    """The AdaLN values of the step under way, as views; one object serves all blocks of a model.

    All blocks of a step are handed the same `temb`, so its views are made once. They live as long as it does.
    """

    def __init__(self) -> None:
        self._views: dict[int, tuple[weakref.ref, tuple[Tensor, ...]]] = {}

    def of(self, temb: Tensor, count: int) -> tuple[Tensor, ...]:
        key = id(temb)
        found = self._views.get(key)
        if found is None or found[0]() is not temb or len(found[1]) != count:
            views = temb.unflatten(-1, (count, -1)).unbind(dim=2)  # never a copy, so on no stream
            self._views[key] = found = (weakref.ref(temb, lambda _: self._views.pop(key, None)), views)
        return found[1]


class Quiet:
    """Called, whether nobody else is called in the block: no module has a hook, a forward of its own, or was replaced
    since the block was taken over."""

    def __init__(self, block: Any):
        self._attributes = [module.__dict__ for module in block.modules()]
        self._children = [child for d in self._attributes for child in d["_modules"].values()]

    def __call__(self) -> bool:
        if any(d["_forward_hooks"] or d["_forward_pre_hooks"] or "forward" in d for d in self._attributes):
            return False
        children = [child for d in self._attributes for child in d["_modules"].values()]
        return len(children) == len(self._children) and all(map(operator.is_, children, self._children))


class Beside:
    """A second CUDA stream for the audio half of each block: its kernels are too small to fill a GPU by themselves.

    Streams change when a kernel runs, not which kernel, so no bit. The second stream forks off at the start of a
    block, meets the first where video and audio look at each other, and joins it at the end. Whatever it allocates
    is freed to itself, and it allocates nothing before it has waited for the first stream: so no memory is used
    again while the other stream still reads it, without `record_stream`.

    Not where somebody is called along the way (hooks, LoRA's included, see streams as they please), and not for few
    tokens unless a CUDA graph is captured: there the CPU sets the pace, and switching streams takes its time.
    """

    MIN_ROWS = 4096

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, x: Tensor, quiet: Callable[[], bool]) -> Any:
        """The second stream, where it pays and is safe, else None."""
        if not x.is_cuda or torch.is_grad_enabled():
            return None
        few = x.shape[0] * x.shape[1] < self.MIN_ROWS
        if (few and not torch.cuda.is_current_stream_capturing()) or not quiet():
            return None
        if x.device not in self._streams:
            self._streams[x.device] = torch.cuda.Stream(x.device)
        return self._streams[x.device]


def weights_of(module: torch.nn.Module) -> tuple[torch.dtype, torch.device]:
    """dtype and device on which a module will compute, by its weights (those that are quantised tell nothing)."""
    weights = [p for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16, torch.float32)]
    dtype = weights[0].dtype if weights else torch.bfloat16
    return dtype, next((p.device for p in weights if p.is_cuda), torch.device("cpu"))


def rotary_difference(
    host: Callable[[Tensor, Tensor, Tensor], Tensor],
    operator: Operator,
    interleaved: bool,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Where the host's own rotary function and the operator's reference part, in this process; None: nowhere.

    host    called as f(x, cos, sin), on the inputs of the operator's battery
    """
    x = torch.empty(2, 5, heads * head_dim, dtype=dtype, device=device)
    table = torch.empty(x.shape if interleaved else (2, 5, heads, head_dim // 2), dtype=table_dtype, device=device)
    table = table if interleaved else table.swapaxes(1, 2)
    with torch.no_grad():
        for family, args in operator.battery(x, table, table):
            if mismatch := proof.compare(host(*args), operator.reference(*args)):
                return f"{mismatch.sentence}, on the battery's '{family}' inputs"
    return None
