"""Check operators on this machine: every case bit for bit, and wrong kernels that the battery must catch.

`check` is the one comparison that tests, `bitfuse verify` and the benchmark share. A green table would mean
little if nothing could turn it red, so `verify` also runs wrong kernels through the batteries: each operator's own
mutants and those that `mutation` makes of its source, by kind. Every tier has a verdict of its own: that the
next one would have served the call does not excuse it. With `deep` the long sweeps follow (`sweeps`), with `host`
a step of a host's transformer (`conformance`). What was found is kept as a document (`document`).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor

from bitfuse.core import proof
from bitfuse.core.bits import as_tuple, compare
from bitfuse.core.kernel import interpreter
from bitfuse.core.operator import OPERATORS, Operator, Tier
from bitfuse.tools import packages, seeded
from bitfuse.tools.compare import conformance
from bitfuse.tools.prove import ahead, far, mutation, sweeps
from bitfuse.tools.text import cell, say

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
class TierCheck:
    """One tier of one operator on the kernel of one case, whether or not a call would have been served by it.

    against     what it was held against: reference, or emulation (the reference with its sums in CUDA's order, on a
                CPU, whose ATen has another)
    outcome     equal; differs, also where the kernel could not be built; declined: the tier says itself that it can't
    reason      where it differs, or why it was declined
    """

    operator: str
    tier: str
    case: str
    against: str
    outcome: str
    reason: str
    families: int
    elements: int
    seconds: float


@dataclass(frozen=True)
class Control:
    """One mutant of one operator, which the battery must catch: whether it did, and the mismatch that it found.

    kind    of a mutant that `mutation` generates; None for one that is listed by hand
    """

    operator: str
    mutant: str
    caught: bool
    found: str
    kind: str | None = None


@dataclass(frozen=True)
class Kind:
    """What became of the generated mutants of one kind, over all operators.

    generated     what the rules make of the sources; tried: those that were run
    equivalent    of those tried that alter no bit, by a rule: the reasons with counts
    """

    kind: str
    generated: int
    tried: int
    caught: int
    equivalent: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Batteries:
    """What one tier of one operator was proved by in this process: how many kernels were, by how many inputs.

    kernels     signatures, each proved on its own; `equal` of them were
    families    inputs of one kind, over all of them; `elements` of outputs were compared
    """

    operator: str
    tier: str
    kernels: int
    equal: int
    families: int
    elements: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """What `run` found. `operators` and `cases` are those that it was asked for, None: all; `host`, None: no host's."""

    device: str
    operators: list[str] | None
    cases: list[str] | None
    deep: bool
    checks: list[Check]
    controls: list[Control]
    batteries: list[Batteries]
    sweeps: list[sweeps.Sweep]
    host: str | None = None
    transformers: list[conformance.Step] = field(default_factory=list)
    tiers: list[TierCheck] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)

    @property
    def interpreted(self) -> bool:
        return self.device == "cpu"

    @property
    def exit_code(self) -> int:
        """0: all equal, all mutants caught. 1: a difference, or a mutant survived. 2: nothing could be fused."""
        outcomes = [one.outcome for found in (self.checks, self.sweeps, self.transformers) for one in found]
        outcomes += [one.outcome for one in self.tiers if one.outcome == "differs"]
        return exit_code(outcomes, [c.caught for c in self.controls])


def exit_code(outcomes: Iterable[str], caught: Iterable[bool]) -> int:
    """0, 1 or 2 as `Result.exit_code` has it, from the outcomes of all that was compared, and for each mutant whether
    it was caught."""
    seen = set(outcomes)
    return 1 if "differs" in seen or not all(caught) else 0 if "equal" in seen else 2


def check(operator: Operator, case: Any, device: torch.device | str, tokens: int | None = None) -> Check:
    """Run the operator as a user's call would, proof and all, and compare with the reference bit for bit."""
    start = time.perf_counter()
    args = case.arguments(device, tokens=tokens)
    with torch.no_grad():
        route = operator.route(*args)
        expected = operator.reference(*args)
        mismatch = compare(expected, route.run(*args))
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
        sum(t.numel() for t in as_tuple(expected)),
        time.perf_counter() - start,
    )


def tier_checks(
    operator: Operator, case: Any, device: torch.device | str, tokens: int | None, seen: set[Any]
) -> Iterator[TierCheck]:
    """Each tier's own verdict on a case's kernel, unless `seen` has it: what it has is added."""
    args = case.arguments(device, tokens=tokens)
    if next(operator.why_not(*args), None) is not None:
        return  # which the check of the case says
    for index, tier in enumerate(operator.tiers):
        plan = tier.plan(*args)
        signature = () if isinstance(plan, str) else plan.signature(args)
        key = (operator.name, tier.name, signature or plan)
        if key in seen:
            continue
        seen.add(key)
        if isinstance(plan, str):
            yield _tier_check(operator, tier, case, device, proof.Verdict(False, plan))
            continue
        held = operator.specification(index, device)
        verdict = None if _emulated(operator, index, device) else proof.known(operator, tier, signature)
        if verdict is None or not verdict.final:
            with torch.no_grad():
                verdict = proof.run_battery(held, tier.plan, operator.battery(*args), signature)
        yield _tier_check(operator, tier, case, device, verdict)


def far_checks(operator: Operator, device: torch.device | str) -> Iterator[TierCheck]:
    """Each tier with offsets beyond 2^31 elements: planted, and on a GPU for real besides."""
    for case in far.cases(operator):
        for tier in operator.tiers:
            with interpreter():
                yield _tier_check(operator, tier, case, "cpu", far.planted(operator, tier, tier.plan, case))
            if torch.device(device).type == "cuda":
                verdict = far.for_real(operator, tier, case, torch.device(device))
                torch.cuda.empty_cache()
                yield _tier_check(operator, tier, replace(case, name=f"{case.name}, for real"), device, verdict)


def _emulated(operator: Operator, index: int, device: torch.device | str) -> bool:
    return operator.emulated is not None and index == 0 and torch.device(device).type == "cpu"


def _tier_check(
    operator: Operator, tier: Tier, case: Any, device: torch.device | str, verdict: proof.Verdict
) -> TierCheck:
    index = operator.tiers.index(tier)
    differs = verdict.mismatch is not None or verdict.failed
    outcome = "equal" if verdict.equal else "differs" if differs else "declined"
    against = "emulation" if _emulated(operator, index, device) else "reference"
    reason = "" if verdict.equal else verdict.sentence
    counts = verdict.families, verdict.elements, verdict.seconds
    return TierCheck(operator.name, tier.name, case.name, against, outcome, reason, *counts)


def generated(
    operators: list[Operator], device: torch.device | str, deep: bool
) -> Iterator[tuple[Operator, mutation.Site, mutation.Judged]]:
    """The generated mutants of these operators, judged. deep: on a GPU all of those that it runs itself."""
    for operator, sites in mutation.chosen(operators, _further(device, deep)).items():
        for site in sites:
            if site.kind != mutation.WIDTH or far.cases(operator):  # an operator with no case of such offsets has none
                yield operator, site, mutation.judge(operator, site, device)


def _further(device: torch.device | str, deep: bool) -> set[str]:
    return set(mutation.FURTHER) if deep and torch.device(device).type == "cuda" else set()


def _kinds(operators: list[Operator], judged: list[tuple[mutation.Site, mutation.Judged]]) -> Iterator[Kind]:
    for kind in mutation.KINDS:
        made = sum(site.kind == kind for operator in operators for site in mutation.mutants(operator))
        found = [one for site, one in judged if site.kind == kind]
        reasons = Counter(one.found for one in found if one.equivalent)
        if made:
            yield Kind(kind, made, len(found), sum(one.caught for one in found), tuple(reasons.most_common()))


def control(operator: Operator, device: torch.device | str) -> Iterator[Control]:
    """Run the operator's mutants through the battery, on the layout of their case or of the first."""
    interpreted = torch.device(device).type == "cpu"
    for mutant in operator.mutants:
        args = mutation.case_of(operator, mutant).arguments(device, tokens=INTERPRETED_TOKENS)
        if args[0].dtype in mutant.harmless_for or (mutant.compiled_only and interpreted):
            continue
        plan = functools.partial(mutant.plan, operator)
        with torch.no_grad():
            verdict = proof.run_battery(operator.specification(mutant.tier, device), plan, operator.battery(*args))
        yield Control(operator.name, mutant.name, verdict.mismatch is not None, verdict.sentence)


def run(
    console: Console,
    operators: Iterable[str] | None = None,
    device: str | None = None,
    cases: Iterable[str] | None = None,
    deep: bool = False,
    host: str | None = None,
) -> Result:
    """Check the named operators (all by default) on a device ("cuda" where there is one) and print the tables.

    cases    names of cases: only these, of operators that have them, and only those operators
    deep     the long sweeps too: all there is on a GPU (minutes), a small sample in the interpreter
    host     a step of this host's transformer too, one of `seeded.HOSTS`; CannotRun where that can't run here
    """
    asked, wanted = (None if names is None else list(names) for names in (operators, cases))
    chosen = {
        operator: [case for case in operator.cases if wanted is None or case.name in wanted]
        for operator in (OPERATORS[name] for name in asked or OPERATORS)
    }
    chosen = {operator: found for operator, found in chosen.items() if found}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    interpreted = device == "cpu"
    tokens = INTERPRETED_TOKENS if interpreted else None
    result = Result(device, asked, wanted, deep, [], [], [], [], host)
    packages.need("numpy", "verify", install="pip install 'bitfuse[verify]'")  # Triton's interpreter, far addresses
    if host is not None:
        seeded.of_host(host).need(torch.device(device))
    run_on = list(chosen)
    with interpreter() if interpreted else contextlib.nullcontext(), _progress(console) as progress:
        if not interpreted:
            ahead.compile_ahead(chosen, deep, torch.device(device), progress)
        _check_cases(result, chosen, tokens, progress)
        _check_wrong_kernels(result, run_on, progress)
        if deep:
            _sweep(result, run_on, progress)
        if host is not None:
            progress.add_task(f"a step of {host}'s transformer", total=None)
            result.transformers.extend(conformance.run(host, torch.device(device)))
    result.batteries.extend(_batteries(run_on))
    _print(console, result)
    return result


def _check_cases(result: Result, chosen: dict[Operator, list[Any]], tokens: int | None, progress: Progress) -> None:
    """Each operator on its cases, by each tier, with far offsets; and its own mutants."""
    seen: set[Any] = set()
    task = progress.add_task("checking", total=sum(len(cases) + 1 for cases in chosen.values()))
    for operator, cases in chosen.items():
        progress.update(task, description=operator.name)
        for case in cases:
            result.checks.append(check(operator, case, result.device, tokens))
            result.tiers.extend(tier_checks(operator, case, result.device, tokens, seen))
            progress.advance(task)
        result.tiers.extend(far_checks(operator, result.device))
        result.controls.extend(control(operator, result.device))
        progress.advance(task)
    progress.remove_task(task)


def _check_wrong_kernels(result: Result, operators: list[Operator], progress: Progress) -> None:
    """The mutants that are made from the operators' sources."""
    number = sum(map(len, mutation.chosen(operators, _further(result.device, result.deep)).values()))
    judged: list[tuple[mutation.Site, mutation.Judged]] = []
    made = generated(operators, result.device, result.deep)
    for operator, site, one in progress.track(made, number, description="wrong kernels"):
        judged.append((site, one))
        if not one.equivalent:
            result.controls.append(Control(operator.name, site.mutant.name, one.caught, one.found, site.kind))
    result.kinds.extend(_kinds(operators, judged))


def _sweep(result: Result, operators: list[Operator], progress: Progress) -> None:
    jobs = list(sweeps.jobs(operators, torch.device(result.device)))
    task = progress.add_task("sweeping", total=sum(job.calls for job in jobs))
    done = 0
    for number, job in enumerate(jobs, start=1):
        what = f"sweep {number} of {len(jobs)}: {job.sweep.operator or job.sweep.name}, {job.sweep.kind}"
        progress.update(task, description=what)
        for _ in job.go():
            progress.advance(task)
        result.sweeps.append(job.sweep)
        done += job.calls  # one that differs stops early
        progress.update(task, completed=done)
    progress.remove_task(task)


def _batteries(chosen: list[Operator]) -> Iterator[Batteries]:
    names = {operator.name for operator in chosen}
    found: dict[tuple[str, str], list[proof.Verdict]] = {}
    for (name, tier, _), verdict in proof.verdicts().items():
        if name in names:
            found.setdefault((name, tier), []).append(verdict)
    for (name, tier), verdicts in found.items():
        counts = (sum(getattr(v, what) for v in verdicts) for what in ("equal", "families", "elements", "seconds"))
        yield Batteries(name, tier, len(verdicts), *counts)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left:"), TimeRemainingColumn())
    return Progress(*columns, *left, console=console, transient=True)


_COLOURS = {"equal": "green", "differs": "bold red", "declined": "yellow"}


def _print(console: Console, result: Result) -> None:
    if result.interpreted:
        console.print(
            f"No GPU in use: kernels ran in Triton's interpreter, on at most {INTERPRETED_TOKENS} tokens a case."
        )
    table = Table(Column("operator", no_wrap=True), "cases\nequal", "kernels\nequal", "wrong\nkernels\ncaught")
    table.title = "kernel against PyTorch chain, every bit"
    for name in dict.fromkeys(c.operator for c in result.checks):
        cases = [c.outcome for c in result.checks if c.operator == name]
        kernels = [one.outcome for one in result.tiers if one.operator == name and one.outcome != "declined"]
        wrong = ["equal" if c.caught else "differs" for c in result.controls if c.operator == name]
        table.add_row(cell(name), _share(cases), _share(kernels), _share(wrong))
    console.print(table)
    for c in result.checks:
        if c.outcome != "equal":
            where = f"{c.operator}, {c.case} {list(c.shape)}: {c.reason}"
            say(console, cell(c.outcome, _COLOURS[c.outcome]), where)
    _print_tiers(console, result)
    for one in result.controls:
        if not one.caught:
            what = f"{one.operator}: the battery let a wrong kernel pass: {one.mutant}"
            say(console, cell("missed", "bold red"), what)
    if result.kinds:
        _print_kinds(console, result)
    if result.sweeps:
        _print_sweeps(console, result)
    for step in result.transformers:
        what = f"a step of {step.host}, LTX-{step.version}, stock against accelerated: "
        counts = f"{step.sites_fused} of {step.sites_seen} sites fused" + (f": {step.reason}" if step.reason else "")
        say(console, cell(step.outcome, _COLOURS[step.outcome]), what + counts)
    equal = sum(c.outcome == "equal" for c in result.checks)
    elements = sum(c.elements for c in result.checks if c.outcome == "equal")
    caught = sum(c.caught for c in result.controls)
    console.print(
        f"{equal} of {len(result.checks)} checks fused and equal in every bit ({elements:,} elements); "
        f"{caught} of {len(result.controls)} wrong kernels caught"
    )


def _share(outcomes: list[str]) -> Text:
    """How many of them are equal, in the colour of the worst."""
    worst = next((one for one in ("differs", "declined") if one in outcomes), "equal")
    return cell(f"{outcomes.count('equal')} of {len(outcomes)}", _COLOURS[worst])


def _print_tiers(console: Console, result: Result) -> None:
    """Of each tier: how many kernels are equal, and to what; every one that is not; why a later one served a call."""
    for one in result.tiers:
        if one.outcome == "differs":
            where = f"{one.operator}, {one.tier}, {one.case}: {one.reason}"
            say(console, cell("differs", "bold red"), where)
    emulated = {(one.operator, one.tier) for one in result.tiers if one.against == "emulation"}
    if emulated:
        console.print(
            f"{len(emulated)} tiers add up rows, or round, as ATen's CUDA kernels do. Where they ran on a CPU, on "
            "which ATen does otherwise, they were held against that, emulated."
        )
    declined = [one for one in result.tiers if one.outcome == "declined"]
    for (name, tier, why), n in Counter((one.operator, one.tier, one.reason) for one in declined).items():
        say(console, f"{name}: {tier} does not serve {n} of the kernels: {why}")
    of = [one for one in result.tiers if one.outcome != "declined"]
    if of:
        equal = sum(one.outcome == "equal" for one in of)
        console.print(f"{equal} of {len(of)} kernels equal in their own tier, each by a battery of its own")


def _print_kinds(console: Console, result: Result) -> None:
    counts = (Column(name, justify="right") for name in ("generated", "tried", "caught", "equivalent"))
    table = Table("kind", *counts)
    table.title = "wrong kernels made from the sources"
    for kind in result.kinds:
        equivalent = sum(n for _, n in kind.equivalent)
        table.add_row(kind.kind, *map(str, (kind.generated, kind.tried, kind.caught, equivalent)))
    console.print(table)


def _print_sweeps(console: Console, result: Result) -> None:
    table = Table(Column("sweep, operator", overflow="fold"), Column("tried", justify="right"), "outcome")
    table.title = "sweeps, kernel against PyTorch chain, every bit"
    for s in result.sweeps:
        what = Text("\n").join(cell(part) for part in (f"{s.kind}: {s.name}", s.operator) if part)
        share = "all of them" if s.done == s.of else f"of {s.of:,}"
        table.add_row(what, f"{s.done:,}\n{share}", cell(s.outcome, _COLOURS[s.outcome]))
    console.print(table)
    for s in result.sweeps:
        if s.reason:
            where = f"{s.operator or 'primitive'}, {s.kind}, {s.name}: {s.reason}"
            say(console, cell(s.outcome, _COLOURS[s.outcome]), where)
    cases = sum(s.done for s in result.sweeps if s.kind == "shapes")
    declined = sum(n for s in result.sweeps for _, n in s.declined)
    console.print(
        f"{cases - declined:,} of {cases:,} random cases fused and equal, {declined:,} declined with a reason"
    )
    elements, seconds = (sum(getattr(s, what) for s in result.sweeps) for what in ("elements", "seconds"))
    equal = sum(s.outcome == "equal" for s in result.sweeps)
    console.print(f"{equal} of {len(result.sweeps)} sweeps equal in every bit ({elements:,} elements, {seconds:.0f} s)")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
