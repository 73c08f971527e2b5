"""What a captured graph depends on in its model, compared at each replay.

The look is a cost of every step: a 48-layer LTX-2 transformer has 3,700 modules, 3,500 weights and 11,000 attributes.
So what is read is chosen once, and then read and compared by iterators in C, which allocate nothing that stays. Only
where the weights are must be known before a replay, which reads them there. The rest is looked at while the GPU is at
work, and a result of a model that has changed is thrown away: before the replay it took 5 ms of a step's 86 at 1536
tokens (H200's host, 2026-11-28).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, compress, repeat
from operator import eq, getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bitfuse.core import proof
from bitfuse.run.graphs.key import VALUES, Functions
from bitfuse.run.swap import COPIED_BY, Forward, plain

_LOOKED_AT_OTHERWISE = frozenset(nn.Module().__dict__) - {"training"} | frozenset(COPIED_BY)
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
    condemned    how many kernels had been seen to differ: a graph of before the next one may replay it
    """

    def __init__(self, model: nn.Module, own: object, holds: Callable[[Tensor], bool]):
        named = [(name or "the model", module) for name, module in model.named_modules()]
        self.devices = {t.device for t in chain(model.parameters(), model.buffers())}
        self.reason = next(_why_not(named, own, holds, self.devices), None)
        self.functions = Functions(module for _, module in named)
        self.condemned = proof.condemnations()
        self._places: list[_Look] = []
        self._looks: list[_Look] = []
        if not any(isinstance(module, torch.jit.ScriptModule) for _, module in named):  # these keep no __dict__
            self._looks = list(self._of_modules(model, named))
            self._places = list(self._of_weights(model, named, holds))
            self._looks += self._of_attributes(model, named)

    def changed(self, model: nn.Module) -> str | None:
        """The name of a module that is not as it was, or None."""
        return self.moved(model) or self.altered(model)

    def moved(self, model: nn.Module) -> str | None:
        """The name of a module whose weights are others, or elsewhere, so that a replay must not even be begun."""
        return self._differs(model, self._places)

    def altered(self, model: nn.Module) -> str | None:
        """The name of a module that is not as it was in any other way."""
        return self._differs(model, self._looks)

    def _differs(self, model: nn.Module, looks: list[_Look]) -> str | None:
        if not self._looks:
            return "the model"
        try:
            return next(filter(None, (look.changed(model) for look in looks)), None)
        except Exception:  # an attribute that is gone, or values that don't compare: not as it was
            return "the model"

    def wants_gradient(self, model: nn.Module) -> bool:
        return any(t is not None and t.requires_grad for t in _weights(model, self._weight_dicts))

    # The model's own comes first everywhere; it is passed to every look and held by none. Nor does a look hold the
    # watch: in a cycle, the modules below would only be freed by Python's collector.

    def _of_modules(self, model: nn.Module, named: Named) -> Iterator[_Look]:
        """Which modules there are, of which classes, with how much in them, and whether any has hooks."""
        below = [module for _, module in named[1:]]
        dicts = [vars(module) for module in below]  # on top of which a forward is put, or a hook of accelerate's
        child_dicts = [m._modules for m in below if m._modules]
        self._weight_dicts = [d for m in below for d in (m._parameters, m._buffers) if d]
        names = [name for name, _ in named]
        yield _Look(model, is_, lambda m: map(type, chain((m,), below)), names)

        sized = [*dicts, *child_dicts, *self._weight_dicts]
        owners = ["the model"] * 4 + names[1:] + [name for name, m in named[1:] if m._modules]
        owners += [name for name, m in named[1:] for d in (m._parameters, m._buffers) if d]

        def sizes(m: nn.Module) -> Iterator[int]:
            return map(len, chain((vars(m), m._modules, m._parameters, m._buffers), sized))

        yield _Look(model, eq, sizes, owners)
        owners = [name for name, module in named for _ in module._modules]
        yield _Look(model, is_, lambda m: _values_of(chain((m._modules,), child_dicts)), owners)

        # What a module has none of, it shall get none of. A linear layer's forward reads nothing but its weights, and
        # half of all modules are linear layers.
        hooks = [d for m in below for d in (m._forward_hooks, m._forward_pre_hooks)]
        hooks += [d["_diffusers_hook"].hooks for d in dicts if "_diffusers_hook" in d]
        others = [m for m in below if type(m) is not nn.Linear]
        nothing = [d for m in others for d in (m._modules, m._parameters, m._buffers) if not d]

        def hooks_of(m: nn.Module) -> tuple:
            registry = vars(m).get("_diffusers_hook")  # of `cache_context` there is an empty one
            return m._forward_hooks, m._forward_pre_hooks, getattr(registry, "hooks", None)

        if self.reason is None:
            yield _Look(model, is_, lambda m: (any(hooks_of(m)) or any(hooks) or any(nothing),), ["the model"])
        else:  # which hooks these are is what the reason says
            yield _Look(model, is_, lambda m: map(bool, chain(hooks_of(m), hooks, nothing)), repeat("the model"))

    def _of_weights(self, model: nn.Module, named: Named, holds: Callable[[Tensor], bool]) -> Iterator[_Look]:
        """Which weights there are, and where."""
        dicts = self._weight_dicts
        owners = [name for name, m in named for _ in chain(m._parameters, m._buffers)]
        yield _Look(model, eq, lambda m: map(id, _weights(m, dicts)), owners)
        present = [t is not None for t in _weights(model, dicts)]
        place: Callable[[Tensor], Any] = Tensor.data_ptr
        if self.reason is not None:  # they may be anything, some without an address; but they may come to the device

            def place(t: Tensor) -> Any:
                return t.device, holds(t)

        def places(m: nn.Module) -> Iterator[Any]:
            return map(place, compress(_weights(m, dicts), present))

        yield _Look(model, eq, places, list(compress(owners, present)))

    def _of_attributes(self, model: nn.Module, named: Named) -> Iterator[_Look]:
        """The modules' numbers and names, which other objects they hold, and what is in the small ones of these."""
        values, objects = _Attributes(), _Attributes()
        dictionaries: list[tuple[str, dict]] = []
        lists: list[tuple[str, list]] = []
        for name, module in named:
            attributes = _attributes_of(module)
            for attribute, v in attributes.items():
                (values if _is_value(v) else objects).add(attribute, name, module, model)
            kept = [attributes.get(n) for n in _LORA]
            kept.append(getattr(attributes.get("processor"), "__dict__", None))  # its attention backend, say
            dictionaries += [(name, v) for v in kept if type(v) is dict]
            lists += [(name, v) for v in kept if type(v) is list]
        yield _Look(model, is_, values.read, values.owners)
        yield _Look(model, eq, lambda m: map(id, objects.read(m)), objects.owners)

        containers = [v for _, v in (*dictionaries, *lists)]
        keepers = [name for name, _ in (*dictionaries, *lists)]
        yield _Look(model, eq, lambda m: map(len, containers), keepers)
        entries = [name for name, v in (*dictionaries, *lists) for _ in v]
        yield _Look(model, is_, lambda m: chain.from_iterable(containers), entries)
        entries = [name for name, v in dictionaries for _ in v]
        found = [v for _, v in dictionaries]
        yield _Look(model, is_, lambda m: _values_of(found), entries)


class _Look:
    """Things of a model, compared one by one.

    same      the comparison that is quick: where it says that two differ, `_same` has the last word
    read      given the model, iterates over them; as many as there were, unless an earlier look has found a change
    owners    the name of the module of each
    """

    def __init__(
        self,
        model: nn.Module,
        same: Callable[[Any, Any], bool],
        read: Callable[[nn.Module], Iterable[Any]],
        owners: Iterable[str],
    ):
        self._same, self._read, self._owners = same, read, owners
        self._then = list(read(model))

    def changed(self, model: nn.Module) -> str | None:
        """The owner of the first that is not as it was, or None."""
        if all(map(self._same, self._read(model), self._then)):
            return None
        now = list(self._read(model))
        for a, b, owner in zip(now, self._then, self._owners, strict=False):
            if not _same(a, b):
                return owner
        self._then = now  # the same values in other objects, which are looked for from now on
        return None


def _values_of(dicts: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, dicts))


def _weights(model: nn.Module, below: list[dict[str, Any]]) -> Iterator[Any]:
    """All parameters and buffers, tensors or None, given the dictionaries of the modules below."""
    return _values_of(chain((model._parameters, model._buffers), below))


def _same(a: Any, b: Any) -> bool:
    """Whether a computation with one is a computation with the other: 0.0 == -0.0 and 1 == True, which are not."""
    return a is b or (type(a) is type(b) and (repr(a) == repr(b) if _is_value(a) else bool(a == b)))


class _Attributes:
    """Chosen attributes of a model's modules. The model's own come first."""

    def __init__(self) -> None:
        self.owners: list[str] = []
        self._names: list[str] = []
        self._dicts: list[dict[str, Any]] = []  # where the names are looked up, but those of the model

    def add(self, attribute: str, owner: str, module: nn.Module, model: nn.Module) -> None:
        self.owners.append(owner)
        self._names.append(attribute)
        if module is not model:
            self._dicts.append(vars(module))

    def read(self, model: nn.Module) -> Iterator[Any]:
        of_model = len(self._names) - len(self._dicts)
        return map(getitem, chain(repeat(vars(model), of_model), self._dicts), self._names)


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
