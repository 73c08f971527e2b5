"""Stands in for packages that a host imports and whose LTX-2 never uses, on machines without them."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import types


class _Names(type):
    """A class whose every name is an empty class of the same kind."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Names(name, (), {})
        setattr(cls, name, found)
        return found


class Absent(types.ModuleType):
    """A module whose every name is an empty class."""

    __path__ = ()
    __getattr__ = _Names.__getattr__


class Stub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """For `sys.meta_path`: any module of these packages is found, and every name in it is an empty class."""

    def __init__(self, *packages: str):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Absent(spec.name)

    def exec_module(self, module):
        pass
