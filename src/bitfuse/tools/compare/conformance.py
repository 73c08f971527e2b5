"""A host's own code against bitfuse's references, on the version installed here: one step of its transformer.

The step runs stock twice and accelerated once, with seeded weights, for every LTX-2 version that the host has. Where a
reference were not the host's chain in this version, or a site were wired wrongly, a bit would differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitfuse.core.bits import Outputs, compare
from bitfuse.tools import seeded
from bitfuse.tools.compare import runs

_LAYERS = 2  # they all run the same code, and the second is fed by the first


@dataclass(frozen=True)
class Step:
    """One step of one LTX-2 version. `outcome` is equal, differs or declined; `reason` says where or why.

    host           and its version, as in the reports
    version        of LTX-2
    geometry       what was run, as a sentence
    sites_fused    of `sites_seen`; where some were not, `reason` says why
    """

    host: str
    version: str
    geometry: str
    outcome: str
    reason: str
    sites_fused: int
    sites_seen: int
    elements: int
    seconds: float


def run(host: str, device: torch.device) -> Iterator[Step]:
    """A step of every version of LTX-2. CannotRun where the host is not installed or can't run on this device."""
    seeded.of_host(host).need(device)
    for version in seeded.VERSIONS:
        yield check(host, version, device)


@torch.no_grad()
def check(host: str, version: str, device: torch.device) -> Step:
    """A step of one version, in the interpreter on a CPU; declined where the host does not have it, or stock differs
    from itself."""
    start = time.perf_counter()
    return replace(_check(host, version, device), seconds=time.perf_counter() - start)


def _check(host: str, version: str, device: torch.device) -> Step:
    found = Step(runs.named(host), version, "", "declined", "", 0, 0, 0, 0.0)
    try:
        geometry, _ = seeded.geometry_for(device, _LAYERS, version, host)
        if device.type == "cpu":
            geometry = replace(geometry, frames=2, height=3, width=4)
        model = seeded.build(geometry, device, seed=0)
    except seeded.CannotRun as why:
        return replace(found, reason=str(why))
    step = seeded.one_step(model, seeded.make_inputs(model, geometry, device, seed=0))

    def run(which: str) -> tuple[Tensor, ...]:
        nonlocal found
        out = step()
        found = replace(found, geometry=geometry.sentence, elements=sum(t.numel() for t in out))
        return out

    try:
        expected, accelerated, report = runs.stock_twice_then_fused(model, run, _check_repeats)
    except runs.DoesNotRepeat as why:
        return replace(found, reason=str(why))
    mismatch = compare(expected, accelerated)
    return replace(
        found,
        outcome="differs" if mismatch else "equal" if report.fused else "declined",
        reason=mismatch.sentence if mismatch else runs.reasons(report),
        sites_fused=report.fused,
        sites_seen=report.seen,
    )


def _check_repeats(first: Outputs, again: Outputs) -> None:
    if mismatch := compare(first, again):
        begin = "the stock step does not repeat itself, so nothing can be shown to equal it"
        raise runs.DoesNotRepeat(f"{begin}: it {mismatch.sentence}")
