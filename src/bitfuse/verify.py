"""Check operators on this machine: every case bit for bit, and wrong kernels that the battery must catch.

`check` is the one comparison that tests, `bitfuse verify` and the benchmark share. A green table would mean
little if nothing could turn it red, so `verify` also runs each operator's mutants through its battery.
"""

from __future__ import annotations

import contextlib
import functools
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from torch import Tensor

from bitfuse import proof
from bitfuse.contract import OPERATORS, Operator
from bitfuse.kernel import interpreter
from bitfuse.machine import machine

# The interpreter runs about a million elements a second: real geometries are cut to this many tokens there.
INTERPRETED_TOKENS = 64


@dataclass(frozen=True)
class Check:
    """One operator on one case. `outcome` is equal, differs or declined; `reason` says where or why.

    `tier` is the way that was taken, None where it was declined; where it is not the operator's first, `reason` says
    why not. `dtype` names those of the tensors among the arguments.
    """

    operator: str
    case: str
    shape: tuple[int, ...]
    dtype: str
    outcome: str
    tier: str | None
    reason: str
    elements: int
    seconds: float


@dataclass(frozen=True)
class Control:
    """One mutant of one operator: whether the battery caught it, as it must, and on what."""

    operator: str
    mutant: str
    caught: bool
    found: str


@dataclass(frozen=True)
class Result:
    checks: list[Check]
    controls: list[Control]
    interpreted: bool

    @property
    def exit_code(self) -> int:
        """0: all equal, all mutants caught. 1: a difference, or a mutant survived. 2: nothing could be fused."""
        if any(c.outcome == "differs" for c in self.checks) or not all(c.caught for c in self.controls):
            return 1
        return 0 if any(c.outcome == "equal" for c in self.checks) else 2

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": machine(),
            "interpreted": self.interpreted,
            "exit_code": self.exit_code,
            "checks": [asdict(c) for c in self.checks],
            "controls": [asdict(c) for c in self.controls],
        }


def check(operator: Operator, case: Any, device: torch.device | str, tokens: int | None = None) -> Check:
    """Run the operator as a user's call would, proof and all, and compare with the reference bit for bit."""
    start = time.perf_counter()
    args = case.arguments(device, tokens=tokens)
    with torch.no_grad():
        route = operator.route(*args)
        expected = operator.reference(*args)
        mismatch = proof.compare(expected, route.run(*args))
    # a kernel that the battery saw differ counts, though the call itself was saved by the reference
    outcome = "differs" if mismatch or route.mismatch else "equal" if route.fused else "declined"
    reason = mismatch.sentence if mismatch else route.reason or "; ".join(route.passed_over)
    dtypes = dict.fromkeys(_short(a.dtype) for a in args if isinstance(a, Tensor))
    return Check(
        operator.name,
        case.name,
        tuple(args[0].shape),
        ", ".join(dtypes),
        outcome,
        route.tier,
        reason,
        sum(t.numel() for t in proof.as_tuple(expected)),
        time.perf_counter() - start,
    )


def control(operator: Operator, device: torch.device | str) -> Iterator[Control]:
    """Run the operator's mutants through the battery, on the layout of their case or of the first."""
    interpreted = torch.device(device).type == "cpu"
    for mutant in operator.mutants:
        case = next((c for c in operator.cases if c.name == mutant.case), operator.cases[0])
        args = case.arguments(device, tokens=INTERPRETED_TOKENS)
        if args[0].dtype in mutant.harmless_for or (mutant.compiled_only and interpreted):
            continue
        plan = functools.partial(mutant.plan, operator)
        with torch.no_grad():
            verdict = proof.run_battery(operator.specification(mutant.tier, device), plan, operator.battery(*args))
        yield Control(operator.name, mutant.name, verdict.mismatch is not None, verdict.sentence)


def run(console: Console, operators: Iterable[str] | None = None, device: str | None = None) -> Result:
    """Check the named operators (all by default) on a device ("cuda" where there is one) and print the tables."""
    chosen = [OPERATORS[name] for name in operators or OPERATORS]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    interpreted = device == "cpu"
    tokens = INTERPRETED_TOKENS if interpreted else None
    checks: list[Check] = []
    controls: list[Control] = []
    with interpreter() if interpreted else contextlib.nullcontext(), _progress(console) as progress:
        task = progress.add_task("checking", total=sum(len(o.cases) + 1 for o in chosen))
        for operator in chosen:
            progress.update(task, description=operator.name)
            for case in operator.cases:
                checks.append(check(operator, case, device, tokens))
                progress.advance(task)
            controls += control(operator, device)
            progress.advance(task)
    result = Result(checks, controls, interpreted)
    _print(console, result)
    return result


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


_COLOURS = {"equal": "green", "differs": "bold red", "declined": "yellow"}


def _print(console: Console, result: Result) -> None:
    if result.interpreted:
        console.print(
            f"No GPU in use: kernels ran in Triton's interpreter, on at most {INTERPRETED_TOKENS} tokens a case."
        )
    cases = list(dict.fromkeys(c.case for c in result.checks))
    names = list(dict.fromkeys(c.operator for c in result.checks))
    table = Table(Column("case", no_wrap=True), title="operator x case, kernel against PyTorch chain, every bit")
    for name in names:
        table.add_column(_broken(name), justify="center")
    outcome = {(c.case, c.operator): c.outcome for c in result.checks}
    for case in cases:
        cells = (outcome.get((case, name)) for name in names)
        table.add_row(case, *(f"[{_COLOURS[o]}]{o}[/]" if o else "" for o in cells))
    console.print(table)
    for c in result.checks:
        if c.outcome != "equal":
            console.print(f"[{_COLOURS[c.outcome]}]{c.outcome}[/] {c.operator}, {c.case} {list(c.shape)}: {c.reason}")
    for (name, tier, why), n in Counter((c.operator, c.tier, c.reason) for c in result.checks).items():
        if tier and why:
            console.print(f"{name}: {n} cases by {tier}, as not by {why}")
    for wrong in result.controls:
        if not wrong.caught:
            console.print(f"[bold red]missed[/] {wrong.operator}: the battery let a wrong kernel pass: {wrong.mutant}")
    equal = sum(c.outcome == "equal" for c in result.checks)
    elements = sum(c.elements for c in result.checks if c.outcome == "equal")
    caught = sum(c.caught for c in result.controls)
    console.print(
        f"{equal} of {len(result.checks)} checks fused and equal in every bit ({elements:,} elements); "
        f"{caught} of {len(result.controls)} wrong kernels caught"
    )


def _broken(name: str) -> str:
    """An operator's name on lines of a dozen characters or so, broken at its underscores."""
    return textwrap.fill(name.replace("_", " "), 12, break_long_words=False).replace(" ", "_")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
