"""Changing a host's objects so that every change can be taken back, and what was found at each site."""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bitfuse.contract import Operator


def source_hash(fn: Callable) -> str | None:
    """The first 16 hex digits of the SHA-256 of a function's source text, or None where there is no source.

    Of its code object's: `inspect` would look through a wrapper made with `functools.wraps` and see the original.
    """
    try:
        source = textwrap.dedent(inspect.getsource(fn.__code__))
    except (AttributeError, OSError, TypeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def hooked(module: Any) -> bool:
    """Whether somebody is called when this module is, or instead of it: torch's hooks, or a replaced forward."""
    found = module.__dict__
    return bool(found["_forward_hooks"] or found["_forward_pre_hooks"] or "forward" in found)


class NotFused(RuntimeError):
    """With `strict=True`: the site that would have run the PyTorch chain, and why."""


@dataclass
class Site:
    """One place in a model where an operator may act, and what happened there.

    declined    why this site was left as it was, or None when it was taken over
    fused       calls that ran the kernel
    fallen      calls that ran the PyTorch chain, by the reason
    tiers       the ways in which calls were fused (`Operator.tiers`)
    strict      raise `NotFused` instead of running the PyTorch chain
    """

    name: str
    operator: str
    declined: str | None = None
    fused: int = 0
    fallen: Counter[str] = field(default_factory=Counter)
    tiers: set[str] = field(default_factory=set)
    strict: bool = False

    def call(self, operator: Operator, *args: Any) -> Any:
        """Run the operator and note which way the call went."""
        if torch.compiler.is_compiling():  # the compiler gets the PyTorch chain, and no counting in its graph
            return operator.reference(*args)
        route = operator.route(*args)
        if route.reason is None:
            self.fused += 1
            if route.tier not in self.tiers:
                self.tiers.add(str(route.tier))
        else:
            self.fall(route.reason)
        return route.run(*args)

    def fall(self, reason: str) -> None:
        """Note a call that is not fused, or raise where that is not wanted."""
        if self.strict:
            raise NotFused(f"{self.name}: {reason}")
        self.fallen[reason] += 1

    def leave(self, chain: Callable[[], Any], reason: str) -> Any:
        """Run the host's own chain, for this reason."""
        self.fall(reason)
        return chain()

    @property
    def reasons(self) -> list[str]:
        return [self.declined] if self.declined else list(self.fallen)

    @property
    def state(self) -> str:
        """fused, partly fused, fallen back, left alone, or not called yet."""
        if self.declined:
            return "left alone"
        if not self.fused and not self.fallen:
            return "not called yet"
        if not self.fallen:
            return "fused"
        return "partly fused" if self.fused else "fallen back"


class Report:
    """What was fused of what was seen, and why the rest was not. Prints as a table; `as_dict()` is for programs."""

    def __init__(self, host: str, sites: list[Site], graphs: list[Any] | None = None):
        self.host = host
        self.sites = sites
        self.graphs = graphs or []

    @property
    def seen(self) -> int:
        return len(self.sites)

    @property
    def fused(self) -> int:
        """Sites that ran the kernel at every call so far."""
        return sum(site.state == "fused" for site in self.sites)

    def as_dict(self) -> dict[str, Any]:
        return {
            "host": self.host,
            "sites_seen": self.seen,
            "sites_fused": self.fused,
            "graphs": [
                {"captures": g.captures, "replays": g.replays, "calls_without": dict(g.reasons)} for g in self.graphs
            ],
            "sites": [
                {
                    "name": site.name,
                    "operator": site.operator,
                    "state": site.state,
                    "calls_fused": site.fused,
                    "calls_fallen_back": sum(site.fallen.values()),
                    "reasons": site.reasons,
                    "tiers": sorted(site.tiers),
                }
                for site in self.sites
            ],
        }

    def kinds(self) -> list[dict[str, Any]]:
        """`as_dict()["sites"]` with the sites that differ in their block's number only as one row, counted.

        So 48 blocks show as one block does.
        """
        kinds: dict[tuple, dict[str, Any]] = {}
        for site in self.as_dict()["sites"]:
            name = ".".join("*" if part.isdigit() else part for part in site["name"].split("."))
            key = (name, site["operator"], site["state"], tuple(site["reasons"]), tuple(site["tiers"]))
            kind = kinds.setdefault(key, {**site, "name": name, "count": 0, "calls_fused": 0, "calls_fallen_back": 0})
            kind["count"] += 1
            kind["calls_fused"] += site["calls_fused"]
            kind["calls_fallen_back"] += site["calls_fallen_back"]
        return list(kinds.values())

    def __str__(self) -> str:
        kinds = self.kinds()
        width = max((len(kind["name"]) for kind in kinds), default=0)
        lines = [f"{self.fused} of {self.seen} sites fused in {self.host}"]
        for kind in kinds:
            calls = f"{kind['calls_fused']} calls fused, {kind['calls_fallen_back']} not"
            why = f": {'; '.join(kind['reasons'])}" if kind["reasons"] else ""
            site = f"{kind['name']:<{width}}  {kind['count']:>3} x {kind['operator']}"
            tier = f" by {kind['tiers'][0]}" if kind["tiers"] else ""
            lines.append(f"  {site}  {kind['state']}{tier} ({calls}){why}")
        for graph in self.graphs:  # replays run no Python, so the sites above don't count them
            lines.append(f"  CUDA graph: {graph.captures} captured, {graph.replays} replays")
            lines += [f"    {count} calls without: {reason}" for reason, count in graph.reasons.items()]
        return "\n".join(lines)


class Handle:
    """An acceleration in force: `report()` says what it does, `restore()` undoes it. Also a context manager."""

    def __init__(self, host: str, strict: bool = False, cuda_graph: bool = False, keep_text: bool = False):
        self.host, self.strict, self.cuda_graph, self.keep_text = host, strict, cuda_graph, keep_text
        self.sites: list[Site] = []
        self.graphs: list[Any] = []  # `bitfuse.graphs.GraphedForward`, one for each model
        self._undo: list[Callable[[], object]] = []

    def on_restore(self, undo: Callable[[], object]) -> None:
        self._undo.append(undo)

    def report(self) -> Report:
        return Report(self.host, self.sites, self.graphs)

    def restore(self) -> None:
        """Put every attribute back. Safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"<bitfuse.Handle: {str(self.report()).splitlines()[0]}>"
