"""Triton kernels that stay plain Python until one is about to run.

`import bitfuse` must work, and be quick, where Triton is not installed. So `@kernel` only remembers the
function; Triton is imported, and the function handed to `triton.jit`, at the first launch. The function is
handed over with a private copy of its globals in which `tl` is `triton.language` and every other `Kernel` it
calls is the matching Triton object: no module is ever altered, and compiled and interpreted forms of one
kernel can live side by side in a process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import linecache
import os
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

# Every launch spells its own arithmetic: the compiler may not contract a*b+c into a fused multiply-add.
# The flag is passed explicitly because TRITON_DEFAULT_FP_FUSION flips every kernel that does not pass it.
EXACT = {"enable_fp_fusion": False}


def interpreting() -> bool:
    """True when TRITON_INTERPRET=1: kernels then run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n: what the sides of a tile must be."""
    return 1 << (n - 1).bit_length()


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """Within this block kernels take CPU tensors and run in Triton's interpreter, as under TRITON_INTERPRET=1.

    Triton is imported before: what it defines in its own language while the variable is set (`tl.sum`, say) is
    interpreted for good, and a kernel that calls it could not be compiled any more in this process (3.6 and 3.7).
    """
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module("triton.language")
    before = os.environ.get("TRITON_INTERPRET")
    try:
        os.environ["TRITON_INTERPRET"] = "1"
        yield
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before


class Kernel:
    """A Triton kernel, or a helper that kernels call. Launch it as `kernel[grid](*pointers, *scalars, **constants)`."""

    def __init__(self, fn: Callable, do_not_specialize: tuple[str, ...] = (), twin: Callable | None = None):
        self.fn = fn
        self.__name__, self.__doc__ = fn.__name__, fn.__doc__
        self.do_not_specialize = do_not_specialize
        self.twin = twin

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        form = self.interpreted if interpreting() else self.compiled
        return functools.partial(form[grid], **EXACT)

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.fn).parameters)

    def edited(self, *edits: tuple[str, str]) -> Kernel:
        """A kernel whose source differs by these (old, new) texts, here or in a helper: a mutant for batteries."""
        found = self._edited(edits, {})
        whole = "".join(k.source for k in self._tree())
        if missing := [old for old, _ in edits if old not in whole]:
            raise ValueError(f"edits: {missing[0]!r} stands neither in {self.fn.__qualname__} nor in what it calls")
        return found

    def _edited(self, edits: tuple[tuple[str, str], ...], done: dict[int, Kernel]) -> Kernel:
        if id(self) in done:
            return done[id(self)]
        helpers = {name: k._edited(edits, done) for name, k in self._helpers().items()}
        changed = {name: k for name, k in helpers.items() if k is not self._helpers()[name]}
        source = self.source
        for old, new in edits:
            source = source.replace(old, new)
        if source == self.source and not changed:
            done[id(self)] = self
            return self
        # Triton reads a kernel's source through `inspect`, which finds it in the line cache under this name
        name = f"<{self.fn.__name__} edited {len(linecache.cache)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        scope = {**self.fn.__globals__, **changed}
        exec(compile(source, name, "exec", flags=annotations.compiler_flag), scope)
        twin = None if source != self.source else self.twin
        done[id(self)] = Kernel(scope[self.fn.__name__], self.do_not_specialize, twin)
        return done[id(self)]

    @functools.cached_property
    def source(self) -> str:
        """The text of the function, from `def` on."""
        text = textwrap.dedent(inspect.getsource(self.fn))
        return text[text.index("def ") :]

    def _helpers(self) -> dict[str, Kernel]:
        """The other kernels that this one calls, by the name under which it does."""
        scope = self.fn.__globals__
        return {name: scope[name] for name in self.fn.__code__.co_names if isinstance(scope.get(name), Kernel)}

    def _tree(self) -> Iterator[Kernel]:
        yield self
        for helper in self._helpers().values():
            yield from helper._tree()

    @functools.cached_property
    def compiled(self) -> Any:
        """The `triton.JITFunction`, for a GPU (or, through `triton.compile`, for a GPU that is not here)."""
        return _in_turn()(self._bound("compiled"), do_not_specialize=list(self.do_not_specialize))

    @functools.cached_property
    def interpreted(self) -> Any:
        """The same function in Triton's interpreter, rounding exactly (see `bitfuse.core.interpreter`)."""
        from bitfuse.core.interpreter import ExactInterpretedFunction

        return ExactInterpretedFunction(self._bound("interpreted"))

    def _bound(self, form: str) -> types.FunctionType:
        import triton.language as tl

        fn = self.twin if form == "interpreted" and self.twin else self.fn
        scope = {**fn.__globals__, "tl": tl}
        for name in fn.__code__.co_names:
            if isinstance(scope.get(name), Kernel):
                scope[name] = getattr(scope[name], form)
        bound = types.FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__)
        bound.__annotations__ = dict(fn.__annotations__)
        bound.__qualname__, bound.__module__, bound.__doc__ = fn.__qualname__, fn.__module__, fn.__doc__
        return bound


def kernel(fn: Callable | None = None, *, do_not_specialize: tuple[str, ...] = (), twin: Callable | None = None) -> Any:
    """Decorator: what `@triton.jit` does, but not before the first launch.

    twin    the function to interpret instead, for one that uses what the interpreter lacks (inline assembly)
    """
    if fn is None:
        return functools.partial(Kernel, do_not_specialize=do_not_specialize, twin=twin)
    return Kernel(fn, do_not_specialize, twin)


# Held by the thread that turns a source into Triton's IR. That is Python's alone, 0.1 s for a kernel: six threads that
# began together all were through after 0.7 s (H200, 2026-11-29), where one after the other the first is after 0.1, and
# goes on without Python while the next begins. Triton 3.6 also swaps Python's filters of warnings meanwhile, and puts
# back those that it found: two threads at once could leave them changed. A signal's handler may take it again.
_turn = threading.RLock()


@functools.cache
def _in_turn() -> Any:
    """Triton's `JITFunction`, whose sources become IR one at a time."""
    from triton.runtime.jit import JITFunction

    class InTurn(JITFunction):
        @property
        def ASTSource(self) -> Any:
            return self._source

        @ASTSource.setter
        def ASTSource(self, source: Any) -> None:  # what Triton takes a source by, set before the first kernel
            self._source = _source_in_turn(source)

    return InTurn


@functools.cache
def _source_in_turn(source: Any) -> Any:
    def make_ir(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _turn:
            return source.make_ir(self, *args, **kwargs)

    return type(source.__name__, (source,), {"make_ir": make_ir})


def triton_dtype(dtype: Any) -> Any:
    """The `triton.language` dtype of a torch dtype, for constants that name one."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
