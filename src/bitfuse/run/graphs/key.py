"""What a graph is keyed by: everything, but the model and the data in the tensors, that the forward may decide by.

A call's key says the form of each tensor on the device, the value of everything else among the arguments, PyTorch's
settings, the host's, and by a number which functions the forward may call. Calls of one key launch the same kernels on
tensors of the same form, as long as the model stays the same (`watch`).
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import chain, repeat
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from bitfuse.core import conditions
from bitfuse.core.originals import rerouted
from bitfuse.run import twin

HOST_ELEMENTS = 64  # a CPU tensor of up to so many is a value, like a float: a mask of samples, a noise level

VALUES = (type(None), bool, int, float, str)


class CannotKey(Exception):
    """What is in a call or a result that a graph can't take, in a sentence."""


# -- arguments and results ------------------------------------------------------------------------------------------


class Parts:
    """A structure of arguments or results: its tensors on the device, and a key that says all else about it.

    holds            whether a tensor is on the device: those are inputs and results of a graph
    host_elements    how many elements any other tensor may have, whose values become part of the key
    """

    def __init__(self, holds: Callable[[Tensor], bool], host_elements: int):
        self.names: list[str] = []
        self.tensors: list[Tensor] = []
        self.key: list[Hashable] = []
        self._holds, self._host_elements = holds, host_elements

    def take(self, value: Any, name: str) -> Callable[[list[Tensor]], Any]:
        """Note what is in the value; returns what builds it anew around other tensors."""
        kind = type(value)
        if isinstance(value, Tensor):
            return self._take_tensor(value, name)
        if kind in VALUES:
            self.key.append((kind, repr(value) if kind is float else value))  # 0.0 == -0.0, and nan != nan
            return lambda tensors: value
        if kind is list or kind is tuple:
            self.key.append((kind, len(value)))
            parts = [self.take(item, f"{name}[{i}]") for i, item in enumerate(value)]
            return lambda tensors: kind(part(tensors) for part in parts)
        fields = _fields(value)
        if fields is None:
            raise CannotKey(f"{name} is a {kind.__module__}.{kind.__qualname__}, which a graph can't be keyed by")
        self.key.append((kind, tuple(fields)))
        named = {field: self.take(item, f"{name}.{field}") for field, item in fields.items()}
        return lambda tensors: kind(**{field: part(tensors) for field, part in named.items()})

    def _take_tensor(self, t: Tensor, name: str) -> Callable[[list[Tensor]], Any]:
        if (reason := next(conditions.plain({name: t}), None)) is not None:
            raise CannotKey(reason)
        if t.requires_grad and torch.is_grad_enabled():
            raise CannotKey(f"a gradient is required of {name}")
        form = (t.dtype, t.shape, t.stride(), t.requires_grad)
        if not self._holds(t):
            if t.device.type != "cpu" or t.numel() > self._host_elements:
                raise CannotKey(f"{name} is on {t.device}, with {t.numel()} elements: a graph can't follow those")
            self.key.append((*form, tuple(t.detach().reshape(-1).view(torch.uint8).tolist())))
            return lambda tensors: t
        if self.tensors and t.device != self.tensors[0].device:
            raise CannotKey(f"{name} is on {t.device} and {self.names[0]} on {self.tensors[0].device}")
        index = len(self.tensors)
        self.names.append(name)
        self.tensors.append(t)
        self.key.append((*form, t.device, t.data_ptr() % twin.ALIGNED))
        return lambda tensors: tensors[index]

    def key_of_anywhere(self) -> list[Hashable]:
        """The key of tensors that may lie anywhere: without their alignment."""
        return [
            part[:-1] if isinstance(part, tuple) and isinstance(part[0], torch.dtype) else part for part in self.key
        ]


def _fields(value: Any) -> dict[str, Any] | None:
    """A dictionary's or a dataclass's (diffusers' outputs are both), where its type called with them gives it back."""
    if type(value) is dict:
        return value if all(type(field) is str for field in value) else None
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return None
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    return fields if getattr(value, "__dict__", {}).keys() == fields.keys() else None


@dataclasses.dataclass
class Call:
    """One call's arguments, taken apart; `rebuild(tensors)` gives (args, kwargs) around other tensors."""

    key: tuple[Hashable, ...]
    names: list[str]
    tensors: list[Tensor]
    rebuild: Callable[[list[Tensor]], tuple[tuple, dict]]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device


def take_apart(parameters: list[str], args: tuple, kwargs: dict, holds: Callable[[Tensor], bool]) -> Call:
    """A call of a function with these parameters. CannotKey where a graph can't take it."""
    parts = Parts(holds, HOST_ELEMENTS)
    positions = [parameters[i] if i < len(parameters) else f"argument {i}" for i in range(len(args))]
    by_position = [parts.take(value, name) for name, value in zip(positions, args, strict=True)]
    by_name = {name: parts.take(value, name) for name, value in kwargs.items()}
    if not parts.tensors:
        raise CannotKey("no argument is a tensor on a CUDA device")

    def rebuild(tensors: list[Tensor]) -> tuple[tuple, dict]:
        return tuple(part(tensors) for part in by_position), {n: part(tensors) for n, part in by_name.items()}

    return Call((len(args), tuple(kwargs), *parts.key), parts.names, parts.tensors, rebuild)


# -- PyTorch's settings ---------------------------------------------------------------------------------------------


def settings() -> tuple[Hashable, ...]:
    """What PyTorch itself chooses kernels by. TF32 in its new form: the old getters raise once that was set."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_accumulation,
        cuda.preferred_blas_library(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
        tuple(torch._C._get_sdp_priority_order()),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        torch._C._get_deterministic_fill_uninitialized_memory(),
        rerouted(is_cuda=True),
    )


# -- the functions that the forward may call --------------------------------------------------------------------------


class Functions:
    """The functions that a model's forward may call, by identity: a capture recorded what those of its time did.

    Those of PyTorch, of the classes of the model's modules and processors and of the Python modules in which these are
    defined, whose names stand in the code of any of them: about 1,700 in an LTX-2 transformer. All are looked up, and
    the code of each, in loops in C, before every replay.
    """

    KEPT = 16  # states remembered, with the functions in them: only of what lives is an identity worth something

    def __init__(self, modules: Iterable[nn.Module]):
        kinds: dict[type, None] = {}
        for module in modules:
            kinds |= dict.fromkeys(type(module).__mro__[:-1])
            if (processor := module.__dict__.get("processor")) is not None:
                kinds |= dict.fromkeys(type(processor).__mro__[:-1])
        homes = {kind.__module__ for kind in kinds}
        homes |= {
            v.__module__ for home in homes for v in _namespace(home).values() if isinstance(v, types.FunctionType)
        }
        homes |= {"torch", "torch.nn.functional"}
        spaces: list[Any] = [*map(vars, (*kinds, Tensor)), *(_namespace(home) for home in homes if home)]
        called = {name for space in spaces for value in space.values() for name in _names_in(value)}
        called |= {"forward", "__call__"}
        self._classes = [space for space in spaces if type(space) is not dict]
        self._found: list[tuple[Any, Callable[[Any], tuple[Any, ...]]]] = []
        for space in spaces:
            if names := [name for name in called.intersection(space) if _is_called(space[name])]:
                self._found.append((space, itemgetter(*names, names[0])))  # two at least, so that it gives a tuple
        self._states: OrderedDict[int, _State] = OrderedDict()
        self._number = 0

    def state(self) -> int:
        """A number for what they are now: the same one whenever they are that. KeyError where one is gone."""
        found = list(chain.from_iterable([get(space) for space, get in self._found]))
        found += map(len, self._classes)  # a function that a class gets may hide one of a class below it
        for number, then in reversed(self._states.items()):
            if found == then.found and _codes(then.functions) == then.codes:
                return number
        functions = [function for value in found if (function := _in_python(value)) is not None]
        self._number += 1
        self._states[self._number] = _State(found, functions, _codes(functions))
        if len(self._states) > self.KEPT:
            self._states.popitem(last=False)
        return self._number


@dataclasses.dataclass
class _State:
    """What was found at one time; which of that are functions in Python, and what code each of these had."""

    found: list[Any]
    functions: list[types.FunctionType]
    codes: list[types.CodeType]


def _codes(functions: list[types.FunctionType]) -> list[types.CodeType]:
    return list(map(getattr, functions, repeat("__code__")))


def _is_called(value: Any) -> bool:
    return callable(value) or isinstance(value, (staticmethod, classmethod, property))


def _in_python(value: Any) -> types.FunctionType | None:
    """The function in Python that this is, or that a method or a property is made of."""
    value = getattr(value, "__func__", getattr(value, "fget", value))
    return value if isinstance(value, types.FunctionType) else None


def _names_in(value: Any) -> Iterator[str]:
    """The global names and the attributes that a function's code names, if it is one in Python."""
    function = _in_python(value)
    codes = [] if function is None else [function.__code__]
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _namespace(module: str) -> dict[str, Any]:
    return getattr(sys.modules.get(module), "__dict__", {})
