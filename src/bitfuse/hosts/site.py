"""One place in a model where an operator may act: how a call goes there, and what is counted of it.

An adapter (`hosts/diffusers.py`, for one) makes a `Site` for each place that it finds. Where the place can't be taken
over it gives the reason (`declined`). Else it gives the host's module a forward of ours, which calls
`Site.call(operator, *arguments)` where the host has its chain of PyTorch ops. The operator decides whether its kernel
runs or its reference, which is that chain (`Operator.routed`: that forward has already made sure that no function of
the chain is replaced); the site counts which, and why. `bitfuse.hosts.report` shows the counts, `bitfuse.hosts.handle`
holds the sites of an acceleration.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bitfuse.core.operator import Operator, Route

_counting = threading.Lock()

COMPILING = "kernels are being compiled side by side"
"""The reason of a route while kernels are compiled in advance (`hosts/rehearsal.py`). Such a call counts as compiling,
not as fallen: the kernels are used from the next call on."""

Observer = Callable[["Site", Operator, Route, tuple[Any, ...], Any], None]


class NotFused(RuntimeError):
    """Raised instead of running the PyTorch chain, with `strict=True` or at a site that `require` names."""


@dataclass
class Site:
    """One place in a model where an operator may act, and what happened there.

    name        the module's name in the model, and what is fused in it: `transformer_blocks.0.norm1`
    operator    the name of the operator that it calls
    declined    why this site was left as it was, or None when it was taken over
    fused       calls that ran the kernel
    fallen      calls that ran the PyTorch chain, by the reason; of all reasons beyond `REASONS_KEPT` together
    compiling   calls that ran the PyTorch chain because kernels were compiled meanwhile, side by side (`Rehearsal`)
    tiers       the ways in which calls were fused (`Operator.tiers`)
    strict      raise `NotFused` instead of running the PyTorch chain
    observers   called after each call, on its stream, with (site, operator, route, arguments, result)
    rehearsal   a `Rehearsal` (`hosts/rehearsal.py`), in which this site takes part while its `under_way` is locked
    timer       while a report measures times, a `bitfuse.hosts.report.Timer`
    """

    name: str
    operator: str
    declined: str | None = None
    fused: int = 0
    fallen: Counter[str] = field(default_factory=Counter)
    compiling: int = 0
    tiers: set[str] = field(default_factory=set)
    strict: bool = False
    observers: tuple[Observer, ...] = ()
    rehearsal: Any = None
    timer: Any = None

    REASONS_KEPT = 32  # a reason may hold a shape, of which a server sees ever more
    OTHERS = "for another reason than those that are listed"

    def call(self, operator: Operator, *args: Any) -> Any:
        """Run the operator and note which way the call went."""
        if torch.compiler.is_compiling():  # the compiler gets the PyTorch chain, and no counting in its graph
            return operator.reference(*args)
        timer = self.timer
        start = None if timer is None else timer.start(args[0])
        if self.rehearsal is not None and self.rehearsal.under_way.locked():
            route = self.rehearsal.route(operator, args)
            self.compiling += 1
        else:
            route = operator.routed(*args)
        if route.reason is None:
            self.fused += 1  # no other thread comes in between: Python switches threads at calls and jumps back
            if route.tier not in self.tiers:
                self.tiers.add(str(route.tier))
        elif route.reason is not COMPILING:
            self.fall(route.reason, route.lasts)
        result = route.run(*args)
        for observe in self.observers:
            observe(self, operator, route, args, result)
        if timer is not None and start is not None:
            timer.stop(self.name, args[0], start)
        return result

    def fall(self, reason: str, lasts: bool = True) -> None:
        """Note a call that is not fused, or raise where that is not wanted. `lasts`: `Route.lasts`."""
        if self.strict:
            raise NotFused(f"{self.name}: {reason}")
        with _counting:  # a reason's first call runs Python, where another thread may come in between
            if reason not in self.fallen and len(self.fallen) >= self.REASONS_KEPT:
                reason = self.OTHERS
            self.fallen[reason] += 1

    @property
    def reasons(self) -> list[str]:
        return [self.declined] if self.declined else list(self.fallen)

    @property
    def state(self) -> str:
        """fused, partly fused, fallen back, left alone, compiling (called in a rehearsal only), or not called yet."""
        if self.declined:
            return "left alone"
        if not self.fused and not self.fallen:
            return "compiling" if self.compiling else "not called yet"
        if not self.fallen:
            return "fused"
        return "partly fused" if self.fused else "fallen back"
