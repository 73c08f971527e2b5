"""Packages that bitfuse can do without: is one installed, in which version, and what is said where one is missing.

Whether an installed package can be imported is found out only by importing it: inside `importing`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator

INSTALL = "pip install 'bitfuse[demo]'"


class CannotRun(Exception):
    """Why nothing can be shown here, in one sentence."""


def installed(module: str) -> bool:
    """Whether there is a module of this name at the top level; it is not imported."""
    return importlib.util.find_spec(module) is not None


def version(package: str) -> str | None:
    """The version of a package, by its name in `pip list`; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def need(module: str, what: str = "This", *, name: str | None = None, install: str = INSTALL) -> None:
    """Raise CannotRun, with how to install it, where a module that `what` needs is missing.

    name    what people call it; by default the module's own name
    """
    if not installed(module):
        raise CannotRun(f"{what} needs {name or module}, which is not installed: {install}")


@contextlib.contextmanager
def importing(
    otherwise: str, install: str = INSTALL, errors: tuple[type[Exception], ...] = (ImportError,)
) -> Iterator[None]:
    """Raise CannotRun where something can't be imported in this block: `otherwise (the error): install`."""
    try:
        yield
    except errors as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise CannotRun(f"{otherwise} ({said}): {install}") from None
