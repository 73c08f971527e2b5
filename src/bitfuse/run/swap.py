"""Ours in place of a module's forward, such that nobody can tell; and who else is called when a module is.

A forward of ours is an attribute of the module's own, as PyTorch's `Module.__call__` looks it up. The module's class
stays what it is. So whatever finds modules by their class finds them; a class that somebody derives from it meanwhile
(FSDP's, parametrize's) derives from the host's; a hook of accelerate's or diffusers', which replaces the attribute in
its turn, calls ours as it would have called the host's, and where one stands there already ours goes inside it; and in
a copy or a pickle of the module the host's own forward stands in the place of ours.

Another method that a host calls by its name is replaced in the same way (`Forward.method`); hooks know forwards alone.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook as hooked_everywhere  # register_module_forward_hook, say


def named(kind: type) -> str:
    """A class as sentences name it: `torch.nn.modules.linear.Linear`."""
    return f"{kind.__module__}.{kind.__qualname__}"


def bound(module: Any, method: str = "forward") -> Callable[..., Any]:
    """What stock would call as this module's forward, were there none of its own: its class's, as Python binds it."""
    forward = getattr(type(module), method)
    return forward.__get__(module) if hasattr(forward, "__get__") else forward


class Forward:
    """Base of what stands in the attribute `forward` of a module in place of its class's.

    method   the name of that attribute, where it is another method that is replaced
    own      the class's function, which ours restates. The module's class may have another by now: `stock` is the one
             that stock would run, always
    ended    whether it does what stock does, for good: somebody may have kept it and put it back
    """

    __slots__ = ("__signature__", "__weakref__", "_module", "own")
    method = "forward"

    def __init__(self, module: torch.nn.Module):
        self._module = weakref.ref(module)  # held strongly, the module would only be freed by Python's collector
        self.own = getattr(type(module), self.method)
        self.__signature__ = inspect.signature(bound(module, self.method))

    @property
    def module(self) -> Any:
        module = self._module()
        if module is None:
            raise ReferenceError("the module whose forward this was is gone")
        return module

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """What the host would run now.

        A function is called as one: where torch.compile breaks its graph at this call, it would look a bound method up
        in the module again by its name, find this forward there, and never end (torch 2.13).
        """
        module = self.module
        forward = getattr(type(module), self.method)
        if isinstance(forward, types.FunctionType):
            return forward(module, *args, **kwargs)
        return bound(module, self.method)(*args, **kwargs)

    @property
    def __self__(self) -> Any:
        return self.module

    @property
    def __func__(self) -> Any:
        return self.own

    def __getattr__(self, name: str) -> Any:
        """What is asked of the method that stands here in stock: its name, or its code (`torch.export` does)."""
        if name in ("__name__", "__qualname__", "__code__", "__defaults__", "__kwdefaults__", "__globals__"):
            return getattr(self.own, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def ended(self) -> bool:
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a copy or a pickle of the module: that module's own, which its class gives it."""
        return getattr, (self.module, self.method)


COPIED_BY = ("__getstate__", "_replicate_for_data_parallel")
"""The methods by which a module is copied with its attributes as they are: `copy.copy` asks the first of an object,
`torch.nn.parallel.replicate` (DataParallel) the second of each module."""


class CopiedPlain:
    """In place of such a method of a module that has a forward of ours: the copy has none, and runs its class's own.

    It would share ours, which calls the module that it was made for: with that one's weights, on that one's device.
    """

    __slots__ = ("__weakref__", "_module", "_name")

    def __init__(self, module: Any, name: str):
        self._module, self._name = weakref.ref(module), name

    def __call__(self) -> Any:
        module: Any = self._module()
        method = getattr(type(module), self._name, None)  # Python 3.10 has no object.__getstate__
        found = dict(vars(module)) if method is None else method(module)
        if self._name == "__getstate__":
            return _without_ours(found) if isinstance(found, dict) else found
        for name in found.__dict__.keys() - _without_ours(found.__dict__).keys():
            del found.__dict__[name]
        return found


def _without_ours(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in attributes.items()
        if not isinstance(value, CopiedPlain) and not (isinstance(value, Forward) and name == value.method)
    }


def plain(module: Any) -> bool:
    """Whether what a call of the module runs is its class's forward: also where that was made an attribute, as
    accelerate leaves it when it removes a hook."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return True
    try:
        return forward == bound(module)
    except AttributeError:  # a module of TorchScript's has its own alone: its class's can't be asked for (torch 2.13)
        return False


Place = tuple[dict[str, Any], str]


def places(module: Any) -> list[Place]:
    """Where a forward of the module's may be held: by itself, by accelerate's hook on it, by each of diffusers'."""
    found = [(module.__dict__, "forward"), (module.__dict__, "_old_forward")]
    for reference in getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        found += [(reference.__dict__, "forward"), (reference.__dict__, "original_forward")]
    return found


def innermost(module: Any) -> Place | None:
    """Where the class's own forward is to be found when the module is called, within hooks; None where it is not, as
    somebody has wrapped it in a way of their own."""
    if plain(module):
        return module.__dict__, "forward"
    own = bound(module)
    for held, name in places(module):
        found = held.get(name)
        if found == own or (isinstance(found, Forward) and found.ended):
            return held, name
    return None


def ours_in(module: Any) -> Forward | None:
    """The forward of ours that stands in the module, within hooks or not."""
    found = (held.get(name) for held, name in places(module))
    return next((forward for forward in found if isinstance(forward, Forward) and not forward.ended), None)


def modules_in(parts: Iterable[Any]) -> Iterator[Any]:
    """The modules among these parts, and those that are attributes of others of them (of a caching wrapper, say)."""
    for part in parts:
        held = [part] if isinstance(part, torch.nn.Module) else vars(part).values() if hasattr(part, "__dict__") else ()
        yield from (module for module in held if isinstance(module, torch.nn.Module))


def compiled(module: Any) -> bool:
    """Whether torch.compile has compiled a call of this module: by `Module.compile`, or as torch.compile's own module
    around another. Not where it was told to do nothing (`disable=True`)."""
    found = vars(module)
    call = found.get("_compiled_call_impl")
    if call is not None:
        return hasattr(call, "_torchdynamo_orig_callable") and not getattr(call, "_torchdynamo_disable", False)
    context = found.get("dynamo_ctx")  # of torch.compile's OptimizedModule
    return context is not None and type(context).__name__ != "DisableContext"


def compiled_in(root: Any) -> Iterator[tuple[Any, Any]]:
    """(module, the one by whose compiled call it runs) of each module in this one that only the compiler calls."""
    waiting = [(root, None)]
    while waiting:
        module, by = waiting.pop()
        if by is None and compiled(module):
            by = vars(module)["_modules"].get("_orig_mod", module)
        if by is not None:
            yield module, by
        waiting += [(child, by) for child in module._modules.values() if child is not None]


def hooked_by_torch(module: Any) -> bool:
    """Whether PyTorch calls somebody when this module is called, or instead of it: its hooks, a compiled call."""
    found = module.__dict__
    if found["_forward_hooks"] or found["_forward_pre_hooks"] or hooked_everywhere():
        return True
    if found["_backward_hooks"] or found["_backward_pre_hooks"]:
        return True
    return "_call_impl" in found or found.get("_compiled_call_impl") is not None


def hooked(module: Any) -> bool:
    """Whether somebody is called when this module is, or instead of it: by PyTorch, or as a foreign forward."""
    if hooked_by_torch(module):
        return True
    forward = module.__dict__.get("forward")
    return forward is not None and not isinstance(forward, Forward) and not plain(module)
