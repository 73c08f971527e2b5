"""What a captured graph depends on in its model, compared before each replay.

The look is a cost of every step: a 48-layer LTX-2 transformer has 3,700 modules, 3,500 weights and 11,000 attributes.
So what is read is chosen once, as long flat lists, and read by loops in C: `map` over an operator or a method of a
type. Nothing is allocated per module that Python's collector would count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, compress, repeat
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bitfuse.core import proof
from bitfuse.run.graphs.key import VALUES, Functions
from bitfuse.run.swap import Forward, plain

_LOOKED_AT_OTHERWISE = frozenset(nn.Module().__dict__) - {"training"}
_LORA = ("scaling", "merged_adapters", "_active_adapter")  # peft's: numbers and names, baked into a graph

Named = list[tuple[str, nn.Module]]


class Watch:
    """A model as it was when this was made.

    What it can't see: tensors kept as plain attributes, dictionaries and lists kept so (but those of LoRA and of
    attention processors), a weight whose `data` became another view of the same memory, state outside the model. It
    holds the modules below the model, but not the model nor its dictionary: a handle, which may be kept globally,
    holds the watch. It holds no weight either: one that was replaced may be freed before the next look.

    own          what stands in the model as its forward, and is known to call it
    holds        whether a graph reads a tensor where it is
    reason       why no graph may be used for the model as it is, or None
    devices      of the weights
    functions    those that its forward may call
    condemned    how many kernels had been seen to differ: graphs captured before the next one may replay it
    """

    def __init__(self, model: nn.Module, own: object, holds: Callable[[Tensor], bool]):
        named = [(name or "the model", module) for name, module in model.named_modules()]
        self._holds = holds
        self.devices = {t.device for t in chain(model.parameters(), model.buffers())}
        self.reason = next(_why_not(named, own, holds, self.devices), None)
        self.functions = Functions(module for _, module in named)
        self.condemned = proof.condemnations()
        self._scripted = any(isinstance(module, torch.jit.ScriptModule) for _, module in named)
        if self._scripted:  # these keep nothing in a __dict__
            return
        every = [name for name, _ in named]
        self._below = [module for _, module in named[1:]]
        self._dicts = [vars(module) for module in self._below]

        # What a module has: its children, its weights. Where it has none it stays so, and of a linear layer nothing
        # but the weights is read: half of all modules are linear layers.
        self._children = [m._modules for m in self._below if m._modules]
        self._weights = [d for m in self._below for d in (m._parameters, m._buffers) if d]
        self._empty = [d for m in self._below for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._empty += [d["_diffusers_hook"].hooks for d in self._dicts if "_diffusers_hook" in d]
        others = [m for m in self._below if type(m) is not nn.Linear]
        self._empty += [d for m in others for d in (m._modules, m._parameters, m._buffers) if not d]

        self._values, self._objects = _Attributes(), _Attributes()
        self._containers: list[Any] = []  # small dictionaries and lists of values
        keepers = []  # whose each of them is
        for name, module in named:
            own_attributes = _attributes_of(module)
            for attribute, v in own_attributes.items():
                (self._values if _is_value(v) else self._objects).add(attribute, name, module, model)
            kept = [own_attributes.get(n) for n in _LORA]
            kept.append(getattr(own_attributes.get("processor"), "__dict__", None))  # its attention backend, say
            kept = [v for v in kept if type(v) in (list, dict)]
            self._containers += kept
            keepers += [name] * len(kept)

        weights = self._every_weight(model)
        self._present = [t is not None for t in weights]
        children = [name for name, module in named for _ in module._modules]
        owners = [name for name, m in named for _ in chain(m._parameters, m._buffers)]
        self._owners = [every, every, children, ["the model"], keepers, self._objects.owners, owners]
        self._owners.append(list(compress(owners, self._present)))
        self._saved = list(self._read(model))
        self._saved_values = self._values.read(model)

    def changed(self, model: nn.Module) -> str | None:
        """The name of a module that is not as it was, or None."""
        if self._scripted:
            return "the model"
        try:
            for now, then, owners in zip(self._read(model), self._saved, self._owners, strict=True):
                if now != then:
                    same = [a == b for a, b in zip(now, then, strict=False)]
                    at = same.index(False) if False in same else len(same)
                    return owners[min(at, len(owners) - 1)] if owners else "the model"
            values = self._values.read(model)
            if not all(map(is_, values, self._saved_values)):
                for a, b, owner in zip(values, self._saved_values, self._values.owners, strict=True):
                    if a is not b and (type(a) is not type(b) or repr(a) != repr(b)):  # 0.0 == -0.0, and 1 == True
                        return owner
                self._saved_values = values  # the same by other objects, which are looked for from now on
        except Exception:  # an attribute that is gone, or values that don't compare: not as it was
            return "the model"
        return None

    def _read(self, model: nn.Module) -> Iterator[list]:
        """All but the values, to be compared one after the other: each is a list, of which `_owners` has the names."""
        root = vars(model)
        registry = root.get("_diffusers_hook")  # of `cache_context` there is an empty one
        yield list(map(type, chain((model,), self._below)))
        yield list(map(len, chain((root,), self._dicts)))  # a forward or a hook of accelerate's is put on top
        yield list(chain.from_iterable(map(dict.values, chain((model._modules,), self._children))))
        hooks = (model._forward_hooks, model._forward_pre_hooks, getattr(registry, "hooks", None))
        if self.reason is None:
            yield [any(hooks) or any(self._empty)]
        else:
            yield list(map(bool, chain(hooks, self._empty)))
        yield [container.copy() for container in self._containers]
        yield list(map(id, self._objects.read(model)))
        weights = self._every_weight(model)
        yield list(map(id, weights))
        present = compress(weights, self._present)
        if self.reason is None:
            yield list(map(Tensor.data_ptr, present))
        else:  # they may be anything, some without an address; but they may come to the device
            yield [(t.device, self._holds(t)) for t in present if t is not None]

    def _every_weight(self, model: nn.Module) -> list[Tensor | None]:
        dicts = chain((model._parameters, model._buffers), self._weights)
        return list(chain.from_iterable(map(dict.values, dicts)))

    def wants_gradient(self, model: nn.Module) -> bool:
        return any(t is not None and t.requires_grad for t in self._every_weight(model))


class _Attributes:
    """Chosen attributes of a model's modules; those of the model come first, and its dictionary is not held."""

    def __init__(self) -> None:
        self.owners: list[str] = []
        self._names: list[str] = []
        self._dicts: list[dict[str, Any]] = []  # where the names are looked up, but the model's first ones

    def add(self, attribute: str, owner: str, module: nn.Module, model: nn.Module) -> None:
        self.owners.append(owner)
        self._names.append(attribute)
        if module is not model:
            self._dicts.append(vars(module))

    def read(self, model: nn.Module) -> list[Any]:
        of_model = len(self._names) - len(self._dicts)
        return list(map(getitem, chain(repeat(vars(model), of_model), self._dicts), self._names))


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    """What a module's forward may read of its own besides weights and children."""
    found = {n: v for n, v in vars(module).items() if n not in _LOOKED_AT_OTHERWISE and not isinstance(v, Tensor)}
    if type(module) is nn.Linear:
        return {n: v for n, v in found.items() if n == "forward"}
    return found


def _is_value(v: Any) -> bool:
    return type(v) in VALUES or (isinstance(v, tuple) and all(type(item) in VALUES for item in v))


def _why_not(named: Named, own: object, holds: Callable[[Tensor], bool], devices: set[torch.device]) -> Iterator[str]:
    """Why a model may not be replayed, in sentences."""
    for name, module in named:
        attributes = module.__dict__
        if isinstance(module, torch.jit.ScriptModule):
            yield f"{name} is TorchScript"
            return
        if hook := attributes.get("_hf_hook"):
            yield f"{name} is run by accelerate's {type(hook).__name__}, which may move weights"
        if hooks := getattr(attributes.get("_diffusers_hook"), "hooks", None):
            yield f"{name} is run by diffusers' hooks ({', '.join(hooks)})"
        if module._forward_hooks or module._forward_pre_hooks:
            yield f"{name} has a forward hook"
        forward = attributes.get("forward")
        if not (forward is own or isinstance(forward, Forward) or plain(module)):
            yield f"the forward of {name} was replaced"
        if getattr(module, "_compiled_call_impl", None) is not None:
            yield f"{name} is compiled by torch.compile"
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            yield f"{name} drops values at random: the model is in training mode"
    root = named[0][1]
    for name, t in chain(root.named_parameters(), root.named_buffers()):
        if type(t) not in (Tensor, nn.Parameter):
            yield f"the weight {name} is a {type(t).__name__}, whose memory can't be watched"
        elif not holds(t):
            yield f"the weight {name} is on {t.device}"
    if len(devices) > 1:
        yield f"the weights are on {len(devices)} devices"
