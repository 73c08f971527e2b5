"""Functions that are left out where a kernel runs instead: whether they are still those that were there before.

Whoever replaces `torch.nn.functional.rms_norm` wants to change a result, or to be called; a kernel that was proved
before would do neither. So they are held by identity (`Originals`), and gathered from what a reference calls
(`called_by`), so that no list of them is kept by hand.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Entry = tuple[Any, str, str]  # owner (a module or a class), name of its attribute, label for sentences


class Originals:
    """These attributes as they are now: functions of modules and classes, by identity.

    entries    (owner, attribute name, label): (torch.nn.functional, "rms_norm", "torch.nn.functional.rms_norm").
               AttributeError where one is not there. Of a Python function, its code and defaults count as well

    They are looked up in the dictionaries in which Python would find them: an attribute of a class, asked of the class,
    takes 0.7 us on some machines (Python 3.12, torch 2.11, 2026-11-28). `difference` takes 3 us for 39 entries.
    """

    def __init__(self, entries: Iterable[Entry]):
        self.entries = tuple(dict.fromkeys(entries))
        holders: dict[int, tuple[Any, dict[str, str]]] = {}  # modules and classes: their names, and the labels
        functions: dict[types.FunctionType, str] = {}
        for owner, name, label in self.entries:
            for holder in _asked(owner, name):
                holders.setdefault(id(holder), (holder, {}))[1][name] = label
            found = getattr(owner, name)
            found = getattr(found, "__func__", found)
            if isinstance(found, types.FunctionType):
                functions[found] = label
        self._found = []
        for holder, labels in holders.values():
            space = vars(holder)
            there = [name for name in labels if name in space]
            absent = frozenset(labels).difference(there)  # of a class: one that it is derived from has it
            get = operator.itemgetter(*there, there[0]) if there else _nothing  # two at least, so that it gives a tuple
            self._found.append((space, get, get(space), absent, labels))
        # of functions in Python, what may be replaced in place
        self._functions, self._labels = tuple(functions), tuple(functions.values())
        self._codes = [function.__code__ for function in functions]
        self._defaults = [function.__defaults__ for function in functions]
        keywords = ((function.__kwdefaults__, label) for function, label in functions.items())
        self._keywords = [(now, dict(now), label) for now, label in keywords if now]

    def difference(self) -> str | None:
        """The label of the first that is not as it was, or None."""
        for space, get, before, absent, labels in self._found:
            try:
                if all(map(operator.is_, get(space), before)) and space.keys().isdisjoint(absent):
                    continue
            except KeyError:  # gone
                pass
            there = dict(zip((name for name in labels if name not in absent), before, strict=False))
            return next(label for name, label in labels.items() if space.get(name) is not there.get(name))
        codes = [function.__code__ for function in self._functions]
        defaults = [function.__defaults__ for function in self._functions]
        if not all(map(operator.is_, codes, self._codes)) or not all(map(operator.is_, defaults, self._defaults)):
            both = zip(self._labels, codes, self._codes, defaults, self._defaults, strict=True)
            return next(label for label, code, own, default, usual in both if code is not own or default is not usual)
        for keywords, kept, label in self._keywords:  # a dictionary, which can be changed in place
            if keywords.keys() != kept.keys() or any(keywords[name] is not kept[name] for name in kept):
                return label
        return None


def _nothing(space: Any) -> tuple[Any, ...]:
    return ()


def _asked(owner: Any, name: str) -> list[Any]:
    """In whose dictionaries Python looks for this attribute, up to the one that has it."""
    found = []
    for holder in owner.__mro__ if isinstance(owner, type) else (owner,):
        found.append(holder)
        if name in vars(holder):
            break
    return found


# -- what the dispatcher sends to Python code --------------------------------------------------------------------------

# The ops of the references that add up rows, and those that are no sums, products and roots: of all others any right
# implementation gives the same bits. CUDA's mean does not call sum, which torch 2.14 and newer send elsewhere under
# PYTORCH_SUM_INNER_TREE.
_OPS = ("_fused_rms_norm", "rms_norm", "mean.dim", "gelu", "silu", "sigmoid")
# Where code may stand that a call with plain tensors comes to: at the device's key, before it, or to fill it.
_KEYS = ["{}", "Autograd{}", "Autograd", "ADInplaceOrView", "BackendSelect"]
_KEYS += ["CompositeExplicitAutograd", "CompositeImplicitAutograd"]
_in_python: Any = torch.library._impls  # of every op and dispatch key that Python code is registered for (2.11 to 2.15)


def _registered(op: str, device: str) -> frozenset[str]:
    return frozenset(f"aten/{op}/{key.format(device)}" for key in _KEYS)


_CHOSEN = {device: [_registered(op, device) for op in _OPS] for device in ("CUDA", "CPU")}
_ANY = {device: frozenset[str]().union(*chosen) for device, chosen in _CHOSEN.items()}
_NONE = (False,) * len(_OPS)
_GELU = {device: _registered("gelu", device) | _registered("gelu_", device) for device in _CHOSEN}


def rerouted(is_cuda: bool) -> tuple[bool, ...]:
    """For each op of which implementations differ, whether Python code stands in for ATen's on CUDA, or on the CPU.

    Such code comes and goes (`torch.backends.python_native`), and may choose by more than a signature holds: from 2.14
    on torch's own takes a contiguous tensor that starts between multiples of 16 bytes to quack only from 2^24 elements
    on. So this is in layouts and signatures, and where it holds the bits of every layout are compared. 0.3 us.
    """
    device = "CUDA" if is_cuda else "CPU"
    if _ANY[device].isdisjoint(_in_python):
        return _NONE
    return tuple([not keys.isdisjoint(_in_python) for keys in _CHOSEN[device]])


def gelu_is_pythons(is_cuda: bool) -> bool:
    """Whether Python code stands in for ATen's `gelu`, which `gelu_` does not call, or for `gelu_`."""
    return not _GELU["CUDA" if is_cuda else "CPU"].isdisjoint(_in_python)


# -- what a reference calls ----------------------------------------------------------------------------------------

_BINARY = {
    "+": "add", "-": "sub", "*": "mul", "/": "truediv", "//": "floordiv", "%": "mod", "**": "pow", "@": "matmul",
    "&": "and", "|": "or", "^": "xor", "<<": "lshift", ">>": "rshift",
}  # fmt: skip
_COMPARED = {"<": "lt", "<=": "le", "==": "eq", "!=": "ne", ">": "gt", ">=": "ge"}
_UNARY = {"UNARY_NEGATIVE": "__neg__", "UNARY_INVERT": "__invert__", "UNARY_POSITIVE": "__pos__"}
_WORDS = {  # the opcodes of Python 3.10, which has one for each operator
    "ADD": "+", "SUBTRACT": "-", "MULTIPLY": "*", "TRUE_DIVIDE": "/", "FLOOR_DIVIDE": "//", "MODULO": "%",
    "POWER": "**", "MATRIX_MULTIPLY": "@", "AND": "&", "OR": "|", "XOR": "^", "LSHIFT": "<<", "RSHIFT": ">>",
}  # fmt: skip


def called_by(reference: Callable[..., Any]) -> tuple[Entry, ...]:
    """The functions that this one may call, as `Originals` takes them; read from its code, nothing is run.

    Functions of modules (`F.rms_norm`), methods and operators of tensors (`torch.Tensor.addcmul_`, `__mul__`); those
    that functions of its own package call in their turn, which are not listed themselves; and those that a function of
    another package, which it calls, does by itself. Attributes that are no functions are left out, and what Python
    brings.
    """
    found: dict[tuple[int, str], Entry] = {}
    seen: set[types.CodeType] = set()
    package = (reference.__module__ or "").partition(".")[0]

    def note(owner: Any, name: str) -> None:
        value = _attribute(owner, name)
        if owner is builtins or not callable(value) or isinstance(value, type):
            return
        if getattr(value, "__module__", None) in ("torch.overrides", "typing", "torch._jit_internal"):
            return  # asked before the operation itself, which is on record
        label = f"{owner.__name__ if isinstance(owner, types.ModuleType) else _named(owner)}.{name}"
        found.setdefault((id(owner), name), (owner, name, label))

    def walk(function: types.FunctionType) -> None:
        own = (function.__module__ or "").partition(".")[0] == package
        for code in _codes(function.__code__):
            if code in seen:
                continue
            seen.add(code)
            for owner, name in _uses(code, function):
                value = _attribute(owner, name)
                if not isinstance(value, types.FunctionType) or not value.__module__.startswith(f"{package}."):
                    note(owner, name)
                if own and isinstance(value, types.FunctionType):
                    walk(value)

    plain = inspect.unwrap(reference)
    if isinstance(plain, types.FunctionType):
        walk(plain)
    return tuple(found.values())


def _attribute(owner: Any, name: str) -> Any:
    """What an owner has under this name; not what a module would import only now (torch._dynamo, of which `F.pad`
    asks whether it is compiling)."""
    return vars(owner).get(name) if isinstance(owner, types.ModuleType) else getattr(owner, name, None)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _uses(code: types.CodeType, function: types.FunctionType) -> Iterator[tuple[Any, str]]:
    """(owner, attribute) of each global function, function of a module and tensor operation that the code names."""
    scope, module = function.__globals__, inspect.getmodule(function)
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    enclosed = {name: cell.cell_contents for name, cell in cells if _filled(cell)}
    value: Any = None  # of the chain of names so far, where it is a module or a class
    for step in dis.get_instructions(code):
        name, said = step.argval, step.argrepr
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and name in scope:
            value = scope[name]
            if isinstance(value, types.FunctionType) and module is not None and getattr(module, name, None) is value:
                yield module, name
            continue
        if step.opname == "LOAD_DEREF" and name in enclosed:
            value = enclosed[name]
            continue
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if isinstance(value, (types.ModuleType, type)):
                yield value, name
                value = _attribute(value, name)
                continue
            if callable(getattr(Tensor, name, None)):
                yield Tensor, name
        if step.opname not in ("CACHE", "PRECALL", "PUSH_NULL", "EXTENDED_ARG"):
            value = None
        for method in _operators(step.opname, said):
            if callable(getattr(Tensor, method, None)):
                yield Tensor, method


def _operators(opname: str, said: str) -> Iterator[str]:
    """The special methods of what stands between operands, for both sides of it."""
    if opname in _UNARY:
        yield _UNARY[opname]
    elif opname in ("BINARY_SUBSCR", "BINARY_SLICE") or (opname == "BINARY_OP" and said.startswith("[")):
        yield "__getitem__"
    elif opname in ("STORE_SUBSCR", "STORE_SLICE"):
        yield "__setitem__"
    elif opname == "COMPARE_OP":
        symbol = said.removeprefix("bool(").removesuffix(")")
        if symbol in _COMPARED:
            yield f"__{_COMPARED[symbol]}__"
    elif opname.startswith(("BINARY_", "INPLACE_")):
        symbol = said if opname == "BINARY_OP" else _WORDS.get(opname.partition("_")[2], "")
        name = _BINARY.get(symbol.removesuffix("="))
        if name and (symbol.endswith("=") or opname.startswith("INPLACE_")):
            yield f"__i{name}__"
        if name:
            yield from (f"__{name}__", f"__r{name}__")


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (asked for, as an empty cell raises)
    except ValueError:
        return False
    return True


def _named(owner: Any) -> str:
    """A class by its public name: that of `torch.Tensor` is `torch.Tensor`, not `torch._tensor.Tensor`."""
    name = f"{owner.__module__}.{owner.__qualname__}"
    return "torch.Tensor" if name == "torch._tensor.Tensor" else name
