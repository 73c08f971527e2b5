"""Single programs of a launch that is too large for any memory, in Triton's interpreter.

Whether a kernel's offsets fit into what they are computed in shows only where tensors have more than 2^31 elements. So
the tensors are planted: at each, only a window of its elements is there, and the programs that reach for it are run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as upstream

from bitfuse.core.interpreter import exactly


@dataclass
class Planted:
    """A tensor too large for memory, of which a window is there: `values[i]` stands `offsets[i]` elements behind the
    start of it, which has the address `base`. `offsets` are in ascending order."""

    name: str
    dtype: tl.dtype
    base: int
    offsets: np.ndarray
    values: np.ndarray


@dataclass
class PlantedMemory:
    """The windows of planted tensors; an access to anything else is left undone and remembered in `fault`."""

    tensors: list[Planted]
    fault: str | None = field(default=None)

    def load(self, builder, ptrs, mask, other, *rest, otherwise):
        """Triton's masked load, from the windows."""
        element = ptrs.get_element_ty()
        beside = np.zeros_like(ptrs.data, dtype=upstream._get_np_dtype(element)) if other is None else other.data
        found = np.broadcast_to(beside, ptrs.data.shape).copy()
        for tensor, at, here in self._found(ptrs.data, mask.data, "read"):
            found[here] = tensor.values[at[here]]
        return upstream.TensorHandle(found, element)

    def store(self, builder, ptrs, value, mask, *rest, otherwise):
        """Triton's masked store, into the windows."""
        values = np.broadcast_to(value.data, ptrs.data.shape)
        for tensor, at, here in self._found(ptrs.data, mask.data, "written"):
            tensor.values[at[here]] = values[here].view(tensor.values.dtype)

    def _found(
        self, addresses: np.ndarray, mask: np.ndarray, what: str
    ) -> list[tuple[Planted, np.ndarray, np.ndarray]]:
        left, found = mask.copy(), []
        for tensor in self.tensors:
            size = tensor.values.itemsize
            offset = (addresses - np.uint64(tensor.base)).view(np.int64)
            element = offset // size
            at = np.minimum(np.searchsorted(tensor.offsets, element), tensor.offsets.size - 1)
            here = left & (tensor.offsets[at] == element) & (offset % size == 0)
            if here.any():
                found.append((tensor, at, here))
                left &= ~here
        if left.any() and self.fault is None:
            address = int(addresses[left].flat[0])
            tensor = min(self.tensors, key=lambda t: abs(address - t.base - int(t.offsets[0]) * t.values.itemsize))
            place = (address - tensor.base) // tensor.values.itemsize
            self.fault = (
                f"{int(left.sum())} elements are {what} where no tensor is, one at offset {place} of {tensor.name}, "
                f"whose elements stand at {tensor.offsets[0]} to {tensor.offsets[-1]} there"
            )
        return found


def run_planted(
    kernel: Any,
    pointers: Sequence[Planted | None],
    scalars: Sequence[Any],
    grid: tuple[int, ...],
    programs: Sequence[tuple[int, int, int]],
) -> str | None:
    """Run these programs of a launch over planted tensors; None, or a sentence on what they reached for elsewhere.

    kernel     an `ExactInterpretedFunction`
    scalars    the kernel's parameters after the pointers, its constants among them
    """
    memory = PlantedMemory([p for p in pointers if p is not None])

    def run() -> None:
        executor = upstream.GridExecutor(kernel.rewrite(), kernel.arg_names, grid)
        args: dict[str, Any] = dict(zip(kernel.arg_names, [*map(_pointer, pointers), *scalars], strict=True))
        given = len(pointers)
        for number, name in enumerate(kernel.arg_names):
            if number >= given and name not in executor.constexprs:
                args[name] = upstream._implicit_cvt(args[name])
        patched = upstream._patch_lang(kernel.fn)
        try:
            upstream.interpreter_builder.set_grid_dim(*grid)
            for program in programs:
                upstream.interpreter_builder.set_grid_idx(*program)
                executor.fn(**args)
        finally:
            patched.restore()

    exactly(memory, run)
    return memory.fault


def _pointer(planted: Planted | None) -> Any:
    if planted is None:
        return None
    kind = tl.pointer_type(planted.dtype)
    return tl.tensor(upstream.TensorHandle(np.array([planted.base], dtype=np.uint64), kind), kind)
