"""One launch of a kernel, prepared once: what it is compiled for, what it is given, what its outputs are.

A `Plan` is everything about a launch that the shapes, strides and dtypes of a call fix. Its `signature` says which
compiled kernel that is, and in what kinds of memory layout: calls with one signature share one proof, and calls that
differ in their number of tokens alone mostly have one signature.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitfuse.core.bits import Outputs, as_tuple
from bitfuse.core.kernel import EXACT, Kernel, interpreting
from bitfuse.core.originals import rerouted


class Out(NamedTuple):
    """The form of one output."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


def outputs_like(result: Outputs) -> tuple[Out, ...]:
    """The forms of what a reference returned, on meta for one: `outputs_like(on_meta(reference, x, weight, eps))`."""
    return tuple(Out(tuple(t.shape), t.stride(), t.dtype) for t in as_tuple(result))


@dataclass(frozen=True)
class Plan:
    """One launch, except for its pointers: everything that is fixed by the shapes, strides and dtypes of a call.

    The kernel's parameters are, in this order: the call's tensors (None for an optional one that is absent or
    omitted; floats and ints of the call are not passed on), the `extras`, the witnesses, the outputs, `scalars`,
    `constants`. A kernel that serves calls of several kinds has pointers for all of them: `slots`.

    outputs    their forms, those of what the reference returns; one output is returned as it is, several as a tuple
    before     called with the call's arguments before each launch: statistics, say, computed by ATen. Returns the
               extras: fresh dense tensors
    extras     their dtypes
    slots      names of the pointers that the call's tensors, the extras, the witnesses and the outputs are given to, in
               this order; None for what the kernel does not read. Its other pointers are None. Empty: all of them, in
               this order
    witnesses  forms of what the kernel writes besides, for the proof alone to see: a row's statistic in fp32 shows a
               wrong order of additions that the rounded outputs hide. A call drops them
    by_shape   PyTorch's order of additions depends on more of the shape than the signature holds: the first call of
               every layout is compared, with its witnesses, before that layout is fused
    apart      numbers that the kernel gets as scalars, and that have a proof each although they share it: of channels
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    scalars: tuple[Any, ...]  # ints and floats
    constants: dict[str, Any]
    num_warps: int
    outputs: tuple[Out, ...]
    before: Callable[..., tuple[Tensor, ...]] | None = None
    extras: tuple[torch.dtype, ...] = ()
    witnesses: tuple[Out, ...] = ()
    by_shape: bool = False
    options: dict[str, Any] = field(default_factory=lambda: dict(EXACT))
    slots: tuple[str | None, ...] = ()
    apart: tuple[int, ...] = ()

    def signature(self, args: tuple[Any, ...]) -> tuple:
        """Everything that the bits and the outputs' form may depend on. One proof serves all calls that have it.

        Sizes and strides that the kernel gets as numbers count by their class alone ("a multiple of 16": see
        `_specialisation`), so the number of tokens is not in it, unless it changes a class. In it are: what selects the
        compiled kernel; which strides are 0, so that one row serves many; in which order the dimensions of each tensor
        lie in memory, as PyTorch gives outputs the order of the inputs; and for which of the reference's ops Python
        code stands in for ATen's (`rerouted`).
        """
        pointers = tuple(
            t if t is None else (t.dtype, t.data_ptr() % 16 == 0, _order(t.shape, t.stride()))
            for t in self.pointers(args)
        )
        outs = tuple((out.dtype, _order(out.shape, out.strides)) for out in (*self.witnesses, *self.outputs))
        kernel = (self.kernel.fn.__qualname__, *self._compiled_for(), self.slots)
        device, others = args[0].device, rerouted(args[0].is_cuda)
        return (kernel, device, others, pointers, self.extras, outs, self._classes(), self.apart)

    def _compiled_for(self) -> tuple[Any, ...]:
        constants = tuple((name, str(value)) for name, value in self.constants.items())
        return constants, self.num_warps, tuple(self.options.items())

    def _classes(self) -> tuple[str, ...]:
        names = self.kernel.parameters[-len(self.scalars) - len(self.constants) :]
        return tuple(
            _specialisation(value, self.kernel.fn.__annotations__.get(name), name in self.kernel.do_not_specialize)
            for value, name in zip(self.scalars, names, strict=False)
        )

    def pointers(self, args: tuple[Any, ...]) -> list[Tensor | None]:
        """The call's tensors, with None for each optional one that it passes as None or leaves out at the end."""
        given = [a for a in args if a is None or isinstance(a, Tensor)]
        others = len(self.extras) + len(self.witnesses) + len(self.outputs)
        return given + [None] * (len(self.slots or self._pointer_names) - others - len(given))

    @property
    def _pointer_names(self) -> tuple[str, ...]:
        names = self.kernel.parameters
        return names[: len(names) - len(self.scalars) - len(self.constants)]

    def filled(self, tensors: Iterable[Any]) -> tuple[Any, ...]:
        """What each pointer of the kernel is given, of the call's tensors (`pointers`), the extras, the witnesses and
        the outputs."""
        given = dict(zip(self.slots or self._pointer_names, tensors, strict=True))
        return tuple(given.get(name) for name in self._pointer_names)

    def empty(self, device: torch.device) -> tuple[Tensor, ...]:
        """Witnesses and outputs, to be written."""
        return tuple(out.empty(device) for out in (*self.witnesses, *self.outputs))

    def on_few_bytes(self) -> Plan:
        """The same, to be compiled and not to be launched: with outputs of one element. See `few_bytes`."""
        outputs, witnesses = (
            tuple(out._replace(shape=(1,), strides=(1,)) for out in outs) for outs in (self.outputs, self.witnesses)
        )
        return replace(self, outputs=outputs, witnesses=witnesses)

    def compile(self, args: tuple[Any, ...]) -> None:
        """Compile the kernel, in any thread: `load` and `bind` then find it."""
        with on_device(args[0]):
            self._in_triton(self._few(args))

    def load(self, args: tuple[Any, ...]) -> None:
        """Load it onto the arguments' device, in any thread: `bind` then finds it there."""
        with on_device(args[0]):
            _runner(self._in_triton(self._few(args)), self.grid)

    def compiled_key(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What selects the compiled kernel, and no more: the part of a signature that Triton looks at."""
        return self._key(self._few(args))

    def _few(self, args: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        extras = (torch.empty(16, dtype=dtype, device=args[0].device) for dtype in self.extras)
        return self.filled((*self.pointers(args), *extras, *self.empty(args[0].device)))

    def _key(self, pointers: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        found = tuple(t if t is None else (t.dtype, t.device, t.data_ptr() % 16 == 0) for t in pointers)
        return id(self.kernel), self._compiled_for(), self._classes(), found

    def bind(self, args: tuple[Any, ...], outs: tuple[Tensor, ...]) -> Callable[..., Any]:
        """Compile for these arguments; returns launch(*args, *outs), good for every call with the same layout."""
        before = self.before
        extras = before(*args) if before else ()
        if (found := tuple(t.dtype for t in extras)) != self.extras:
            raise TypeError(f"what comes before the launch gave {found}, not {self.extras}")
        pointers = self.pointers(args)
        run = self._compiled(self.filled((*pointers, *extras, *outs)))
        # where each pointer is found among the arguments, the outputs, the extras and None
        n = len(args)
        kept = [i for i, a in enumerate(args) if a is None or isinstance(a, Tensor)]
        end, none = n + len(outs), n + len(outs) + len(extras)
        places = [*kept, *[none] * (len(pointers) - len(kept)), *range(end, none), *range(n, end)]
        order = [none if place is None else place for place in self.filled(places)]
        if before is None and order == list(range(none)):
            return run  # arguments and outputs as they come
        arranged = itemgetter(*order)

        def launch(*given: Any) -> Any:
            return run(*arranged((*given, *(before(*given[:n]) if before else ()), None)))

        return launch

    def _compiled(self, pointers: tuple[Tensor | None, ...]) -> Callable[..., Any]:
        if under_way and (ahead := under_way.get(self._key(pointers))) is not None:
            ended(ahead)  # what it raised shows again here
        tail = (*self.scalars, *self.constants.values())
        if interpreting():
            interpreted = self.kernel.interpreted[self.grid]
            return lambda *pointers: interpreted(*pointers, *tail)
        # The compiled kernel's own runner skips the JIT's argument inspection, and addresses skip its inspection
        # of tensors: the route's key already fixes all that they would look at.
        runner = _runner(self._in_triton(pointers), self.grid)
        return lambda *pointers: runner(*[None if t is None else t.data_ptr() for t in pointers], *tail)

    def _in_triton(self, pointers: tuple[Tensor | None, ...]) -> Any:
        return self.kernel.compiled.warmup(
            *pointers, *self.scalars, grid=self.grid, **self.constants, num_warps=self.num_warps, **self.options
        )


def ended(future: concurrent.futures.Future[Any]) -> None:
    """Wait until it is done or cancelled, for which `concurrent.futures.wait` waits for ever (Python 3.11)."""
    with contextlib.suppress(concurrent.futures.CancelledError):
        future.exception()


under_way: dict[tuple[Any, ...], concurrent.futures.Future[Any]] = {}
"""By `Plan.compiled_key`: kernels that threads compile and load just now, for which others wait."""

# Triton 3.6 loads each kernel's launcher as a Python module of one name, and CPython gives two threads that do so at
# once one module object: a kernel was launched as another ("takes exactly 50 arguments (32 given)", H200, 2026-11-29).
_loading = threading.Lock()


# What is loaded needs no turn: a lock is no queue, and whoever loads one kernel after the other kept the first decode
# waiting for a second, with the kernel that it needed there (H200, 2026-11-29).
_loaded: weakref.WeakSet[Any] = weakref.WeakSet()


def _runner(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., Any]:
    if compiled not in _loaded:
        with _loading:
            _ = compiled[grid]
        _loaded.add(compiled)
    return compiled[grid]


def _specialisation(value: int | float, annotation: str | None, by_width_alone: bool) -> str:
    """A float itself; of an integer, the class into which Triton's JIT puts it: one kernel is compiled per class.

    0 is a multiple of 16 to Triton, and here a class of its own: as a stride it reads one row for many.
    """
    if isinstance(value, float):
        return repr(value)
    width = "i32" if annotation is None and -(2**31) <= value < 2**31 else "i64"
    if by_width_alone:
        return width
    if value in (0, 1):
        return str(int(value))
    return width + ("/16" if value % 16 == 0 else "")


def _order(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(dimensions from the innermost in memory to the outermost, expanded dimensions, which have stride 0).

    `bitfuse.core.values.lookalike` makes inputs for batteries in the same order. The stride of a dimension of size 1
    may be anything: it counts as what it would be in a dense tensor. A first dimension of size 1, a batch of one
    sample, counts as the outermost.
    """
    strides = list(stride)
    for dim in reversed(range(len(shape))):
        if shape[dim] == 1:
            strides[dim] = strides[dim + 1] * shape[dim + 1] if dim + 1 < len(shape) else 1
    if shape[:1] == (1,):
        strides[0] = 1 + max((s * n for s, n in zip(strides[1:], shape[1:], strict=True)), default=0)
    expanded = tuple(dim for dim, n in enumerate(strides) if n == 0 and shape[dim] > 1)
    order = sorted(set(range(len(shape))).difference(expanded), key=lambda dim: (strides[dim], -dim))
    return tuple(order), expanded


def named(reference: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments by the names of the reference's parameters, omitted ones by their defaults (None without one)."""
    parameters = inspect.signature(reference).parameters.values()
    defaults = {p.name: None if p.default is p.empty else p.default for p in parameters}
    return defaults | dict(zip(defaults, args, strict=False))


def few_bytes(t: Tensor) -> Tensor:
    """What a kernel is compiled for in place of this tensor: it looks at the dtype and at the alignment, at no more."""
    offset = t.data_ptr() % 16 // t.element_size()
    return torch.empty(16, dtype=t.dtype, device=t.device)[offset:]


def on_device(t: Tensor) -> Any:
    """Within this block the tensor's device is the current one, on which Triton launches."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def in_vectors(t: Tensor) -> bool:
    """Whether its address is a multiple of four elements, which ATen's kernels need to read rows in vectors of four.
    True of a fake tensor, which has no address."""
    return hasattr(t, "fake_mode") or t.data_ptr() % (4 * t.element_size()) == 0


def strides(t: Tensor) -> tuple[int, ...]:
    """The strides, those of dimensions of size 1 replaced by what they would be in a dense tensor.

    PyTorch lets the stride of such a dimension be anything; a launch that took it at its word would compile
    one kernel more for each whim.
    """
    found = list(t.stride())
    for dim in reversed(range(t.ndim)):
        if t.shape[dim] == 1:
            found[dim] = found[dim + 1] * max(t.shape[dim + 1], 1) if dim + 1 < t.ndim else 1
    return tuple(found)


# -- kernels on rows ---------------------------------------------------------------------------------------------------

# One row per program and four warps: the row is read once, in 16-byte pieces, and stays in registers; its statistic
# is read a second time, from the cache, in ATen's order. On an H100 (2026-11-23, 6144 and 24576 rows of 4096, bits
# equal) that ran at 94 to 97 % of a plain copy of the same bytes; tiles of two and four rows, the statistic first,
# at 87 to 94 %; rows kept in registers 128 elements at a time took 17 s to compile.
# Rows of up to 1024 elements come several to a program, so that a thread has no fewer than 8.
_ROW_ELEMENTS, ROW_WARPS = 2048, 4
# The interpreter is fastest with few, large programs.
_INTERPRETED_ROWS = 64


def rows_per_program(width: int) -> int:
    """How many rows of this width a program of a kernel on rows takes, on ROW_WARPS warps: a power of two."""
    if interpreting():
        return _INTERPRETED_ROWS
    return 1 << (max(1, _ROW_ELEMENTS // width).bit_length() - 1)
