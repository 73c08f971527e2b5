"""A host's code and the source file that it names.

What was replaced before bitfuse was imported can't be seen by identity (`bitfuse.core.originals`). So the code object
that would run is held against the file in which it says that it stands.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import linecache
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any


def is_own(function: Any, module: Any, qualname: str) -> bool:
    """Whether what would run is the code that stands under this name in the module's own source file.

    function    as found in the module or class: a function, a bound method, or a builtin, of which the name and the
                owner must fit
    module      the module, or its name
    qualname    "rms_norm", "RMSNorm.forward"
    """
    module = sys.modules.get(module) if isinstance(module, str) else module
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    function = getattr(function, "__func__", function) if isinstance(function, types.MethodType) else function
    if isinstance(function, types.FunctionType):
        file = getattr(module, "__file__", None)
        return file is not None and any(
            name == qualname and _same(code, function.__code__) for name, code in _in_file(file)
        )
    return _fits(function, module, qualname)


def _fits(builtin: Any, module: Any, qualname: str) -> bool:
    """Whether a function or method that is written in C has this name, and an owner of the module's package."""
    kinds = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
    if not isinstance(builtin, kinds) or module is None or builtin.__name__ != qualname.rpartition(".")[2]:
        return False
    owner = getattr(builtin, "__objclass__", None) or getattr(builtin, "__self__", None)
    if owner is None:
        owner = builtin.__module__
    if isinstance(owner, types.ModuleType):
        name = owner.__name__
    elif isinstance(owner, str):
        name = owner
    else:
        kind = owner if isinstance(owner, type) else type(owner)
        name = kind.__module__
    return name.partition(".")[0] == module.__name__.partition(".")[0]


def source_of(function: Any) -> str | None:
    """The source text of the code object that runs when this function is called, from its first decorator on.

    As it stands in the file, not dedented: what `inspect.getsource(function.__code__)` gives. None where the file does
    not hold that code (any more), or there is none: a function whose `__code__` was replaced gives the text of the new
    code where that is to be found, and a file that was edited since its import gives None.
    """
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if not isinstance(code, types.CodeType):
        return None
    found = [own for _, own in _in_file(code.co_filename) if _same(own, code)]
    if not found:
        return None
    first = min(found, key=lambda own: abs(own.co_firstlineno - code.co_firstlineno)).co_firstlineno
    return "".join(inspect.getblock(_lines(code.co_filename)[first - 1 :]))


def source_hash(function: Callable) -> str | None:
    """The first 16 hex digits of the SHA-256 of a function's source text; None where no text is its code."""
    source = source_of(function)
    return None if source is None else hashlib.sha256(textwrap.dedent(source).encode()).hexdigest()[:16]


def names_of(function: types.FunctionType) -> list[str]:
    """The qualified names under which the function's file has the code that runs when it is called, if any."""
    return [name for name, own in _in_file(function.__code__.co_filename) if _same(own, function.__code__)]


def _lines(file: str) -> list[str]:
    linecache.checkcache(file)
    return linecache.getlines(file)


def _in_file(file: str) -> tuple[tuple[str, types.CodeType], ...]:
    """(qualified name, code) of each function in the file, as it is now."""
    return _compiled(file, "".join(_lines(file)))


@functools.lru_cache(64)
def _compiled(file: str, text: str) -> tuple[tuple[str, types.CodeType], ...]:
    try:
        whole = compile(text, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return ()
    return tuple(_functions(whole, ""))


def _functions(code: types.CodeType, within: str) -> Iterator[tuple[str, types.CodeType]]:
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            name = f"{within}{inner.co_name}"
            yield name, inner
            is_function = bool(inner.co_flags & inspect.CO_NEWLOCALS)
            yield from _functions(inner, f"{name}.<locals>." if is_function else f"{name}.")


_OF_CODE = (
    "co_name", "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags",
    "co_argcount", "co_posonlyargcount", "co_kwonlyargcount",
)  # fmt: skip


def _same(a: types.CodeType, b: types.CodeType) -> bool:
    """Whether two code objects do the same, wherever they stand. What a tracer puts into one is not looked at."""
    if any(getattr(a, part) != getattr(b, part) for part in _OF_CODE) or len(a.co_consts) != len(b.co_consts):
        return False
    return all(map(_same_constant, a.co_consts, b.co_consts))


def _same_constant(a: Any, b: Any) -> bool:
    """0.0 and -0.0 are two constants, and so are 1 and 1.0; NaN is itself."""
    if isinstance(a, types.CodeType) and isinstance(b, types.CodeType):
        return _same(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same_constant, a, b))
    return a == b if isinstance(a, frozenset) else repr(a) == repr(b)
