"""A host's code: whether it is what was read and is restated here, and whether it is still what would run."""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bitfuse.core.operator import Operator
from bitfuse.core.originals import Entry
from bitfuse.hosts import offload
from bitfuse.hosts.code import is_own, names_of, source_hash
from bitfuse.run.swap import hooked, innermost, named, ours_in


def not_own(module: Any, what: str, host: str) -> str:
    """The sentence for a module, `what`, of another class than the host's own; `host` is a name with a version."""
    name = host.split()[0]
    whose = f"{name}'" if name.endswith("s") else f"{name}'s"
    return f"the {what} is a {named(type(module))}, not {whose} own"


def why_not_read(host: str, read: Mapping[str, Collection[str]], sources: Mapping[str, Any]) -> Iterator[str]:
    """Which of the host's functions that ours restate, by name, have a source whose hash is none of `read`'s."""
    for name, code in sources.items():
        if (found := source_hash(code)) not in read[name]:
            yield f"{name} of {host} is not a source that bitfuse knows ({found})"


def functions(home: Any, *paths: str) -> dict[str, Any]:
    """The functions of a module of the host by their paths: `function`, `Class.method`. None: not in this version."""
    return {path: _at(home, path) for path in paths}


def entries(home: Any, *paths: str) -> list[Entry]:
    """Those of them that this version has, as `Originals` takes them."""
    owners = ((path, *path.rpartition(".")[::2]) for path in paths if _at(home, path) is not None)
    return [(_at(home, owner) if owner else home, name, path) for path, owner, name in owners]


def _at(home: Any, path: str) -> Any:
    for name in path.split("."):
        home = getattr(home, name, None)
    return home


def why_not_stock(
    module: Any, own: type, what: str, host: str, read: Mapping[str, Collection[str]], sources: Mapping[str, Any]
) -> Iterator[str]:
    """Why a module can't be given a forward that restates these sources: it is not the host's own as it was read.

    sources    the functions that are restated, by `Class.name` or name. The module's class may be one derived from the
               host's (FSDP's, say), as long as none of them is another there
    """
    if not isinstance(module, own):
        yield not_own(module, what, host)
        return
    for name in sources:
        kind, _, method = name.partition(".")
        if kind == own.__name__ and getattr(type(module), method, None) is not getattr(own, method, None):
            yield f"{not_own(module, what, host)}, and has a {method} of its own"
    if ours_in(module) is not None:
        yield f"the {what} is accelerated already, with another model that it is a part of"
    elif innermost(module) is None:
        yield f"a hook or a wrapper has replaced the {what}'s forward, and is left in place"
    yield from why_not_read(host, read, sources)


def ways(kind: type) -> tuple[Any, ...]:
    """The functions by which a module of this class is called."""
    return kind.forward, kind.__call__, kind._call_impl  # type: ignore[attr-defined]


def own_method(module: Any, name: str, stock: type) -> bool:
    """Whether a method of the module's is the host's own: no attribute of its own, none of a derived class."""
    return name not in module.__dict__ and getattr(type(module), name, None) is getattr(stock, name, None)


class Norms:
    """The norms of a module that are not called where they are fused: when they must be called all the same.

    It is asked before each call of the module, so by plain comparisons: 8 norms take 4 us, two of queries and keys 3.

    names     in the module; all have the eps of the first
    kind      the class that operators stand in for, and what sentences call it
    weighted  whether each has a weight, as those of queries and keys have, or none
    """

    def __init__(self, names: Sequence[str], kind: type, label: str, *, weighted: bool):
        self.names, self._kind, self._label, self._weighted = tuple(names), kind, label, weighted

    def why_called(self, module: Any, *, hooks: bool = True) -> str | None:
        """Why the norms of this module must be called, if so: the first reason.

        hooks    whether a hook is one; when a module is taken over it is not, as it may be gone at the next call
        """
        children, own_kind, first = module._modules, self._kind, None
        for name in self.names:
            norm = children.get(name)
            kind = type(norm)
            if kind is not own_kind and not (issubclass(kind, own_kind) and ways(kind) == ways(own_kind)):
                return f"{name} is a {named(kind)}, not {self._label}"
            if hooks and hooked(norm):
                who = offload.who_else(norm) if self._weighted else ""
                if who is not None:
                    which = f"a hook ({who})" if who else "a hook"
                    return f"{which} is attached to {name}, which is not called when it is fused"
            attributes = norm.__dict__
            eps = attributes.get("eps")
            if first is None:
                first = eps
            if eps is None:
                return f"{name} has no eps of its own"
            if eps != first:
                return f"the eps of {name} is {eps} and that of {self.names[0]} {first}"
            if self._weighted:
                weight, shape = norm.weight, norm.normalized_shape
                if weight is None:
                    return f"{name} has no weight of its own"
                if shape != tuple(weight.shape):
                    return f"the normalized_shape of {name} is {shape} and its weight {tuple(weight.shape)}"
                continue
            for held in (attributes, attributes["_parameters"]):
                if held.get("weight") is not None or held.get("bias") is not None:
                    return f"{name} has a weight; accepted: norms without"
            if kind is not own_kind and getattr(norm, "weight", None) is not None:  # parametrized, say
                return f"{name} has a weight; accepted: norms without"
        return None


def own(owner: Any, name: str) -> bool:
    """Whether the function that stands under this name is the one that its owner's package has there: a wrapper that
    somebody has put there is not, nor another function of that package, nor one whose code was replaced.

    One of bitfuse's own does no harm: `bitfuse.trace` listens at `torch.nn.Module.__call__`.
    """
    classes = owner.__mro__ if isinstance(owner, type) else ()
    holder = next((kind for kind in classes if name in vars(kind)), owner)
    package = (holder.__name__ if isinstance(holder, types.ModuleType) else holder.__module__).partition(".")[0]
    found = inspect.getattr_static(owner, name)
    found = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
    if not isinstance(found, types.FunctionType):
        names = {name, name.strip("_")}  # torch.Tensor.__neg__ is TensorBase.neg
        return any(is_own(found, sys.modules[package], one) for one in names)
    code = found.__code__
    if code.co_filename.startswith(os.path.dirname(os.path.dirname(__file__)) + os.sep):
        return True
    home = sys.modules.get(package)
    folders = getattr(home, "__path__", ())
    in_package = any(code.co_filename.startswith(f"{folder}{os.sep}") for folder in folders)
    if not in_package and code.co_filename != getattr(home, "__file__", None):  # a package of one file
        return False
    within = {kind.__name__ for kind in classes}
    return any(_stands_for(qualname, found, name, within) for qualname in names_of(found))


# Names that PyTorch gives a function of another name: torch.nn.Module's, torch.Tensor's
_ALIASES = {("__call__", "_wrapped_call_impl"), ("__rtruediv__", "__rdiv__")}


def _stands_for(qualname: str, function: types.FunctionType, name: str, classes: set[str]) -> bool:
    """Whether a function that its file has under this qualified name is the one that is to be found as `name`."""
    *outer, last = qualname.split(".")
    if "<locals>" in outer:  # what a decorator of the package made; it keeps the name: of torch.Tensor.__pow__ pow
        return function.__name__ in (name, name.strip("_")) or (name, function.__name__) in _ALIASES
    alias = (name, last) in _ALIASES
    return (last == name or alias) and (not outer or outer[-1] in classes)


def calls_of(kind: type, label: str) -> list[Entry]:
    """The functions that are left out where a module of this class is not called."""
    names = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
    return [(kind, name, f"{label}.{name}") for name in names]


def of_operators(operators: Iterable[Operator]) -> list[Entry]:
    """The functions of others that are left out when these operators run instead of their references."""
    return [entry for used in operators for entry in used.originals if not entry[2].startswith("bitfuse.")]


# How a module is called: a norm, say, that is not called when it is fused.
CALLING_A_MODULE = [
    (torch.nn.Module, name, f"torch.nn.Module.{name}") for name in ("__call__", "_call_impl", "_wrapped_call_impl")
]
CALLING_A_MODULE += calls_of(torch.nn.RMSNorm, "torch.nn.RMSNorm")
