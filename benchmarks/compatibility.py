"""Which versions of which host keep the promise, with which torch: run here, noted in compatibility.json, a table in
docs/hosts.md.

    python benchmarks/compatibility.py                                                    # what is installed
    PYTHONPATH=OTHER/SITE python benchmarks/compatibility.py diffusers                    # another version than that
    PYTHONPATH=CHECKOUT python benchmarks/compatibility.py ltx-core --version 1.1.4       # one that can't tell its own

Two things for each host, on the CPU, in Triton's interpreter: the conformance test (`tests/test_hosts.py`: each of the
host's functions against the operator's reference), and one step of a two-layer transformer for every version of LTX-2
that the host has, stock and accelerated (`bitfuse.conformance`). A version's row replaces an earlier one of it with the
same torch. Then `make readme` fills the table. Exit code 1 where a bit differs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from packaging.version import Version

from bitfuse.tools import seeded
from bitfuse.tools.compare import conformance, runs
from bitfuse.tools.machine import machine
from bitfuse.tools.seeded import HOSTS

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "compatibility.json"
TEST = "test_the_reference_is_the_hosts_own_code"


class Outcomes:
    """A plugin of pytest that notes how each test ended, by what stands in its brackets."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.of[report.nodeid.partition("[")[2].rstrip("]")] = report.outcome


def conformance_test(host: str) -> dict[str, str]:
    """Of each of the host's functions, and the operator that stands in for it: passed, failed, skipped (not there)."""
    outcomes = Outcomes()
    where = str(ROOT / "tests" / "test_hosts.py")
    pytest.main([where, "-q", "-p", "no:cacheprovider", "-k", f"{TEST} and {host}"], plugins=[outcomes])
    return outcomes.of


def row(host: str, version: str | None) -> dict[str, Any]:
    outcomes = conformance_test(host)  # first: it imports SGLang where torchvision is not installed
    steps = conformance.run(host, torch.device("cpu"))
    facts = machine("cpu")
    return {
        "host": host,
        "version": version or runs.named(host).rpartition(" ")[2],
        **{name: facts[name] for name in ("torch", "triton", "date")},
        "functions": {is_: [name for name, o in outcomes.items() if o == is_] for is_ in ("failed", "skipped")}
        | {"passed": list(outcomes.values()).count("passed")},
        "steps": [
            {"ltx": s.version, "outcome": s.outcome, "fused": s.sites_fused, "of": s.sites_seen, "reason": s.reason}
            for s in steps
        ],
    }


def merged(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By host, version and torch, in order; of what is in both, the new row."""
    found = {(r["host"], r["version"], r["torch"]): r for r in (*rows, *new)}
    order = sorted(found, key=lambda key: (list(HOSTS).index(key[0]), *map(Version, key[1:])))
    return [found[key] for key in order]


def main(
    hosts: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(HOSTS)}; default: all installed")] = None,
    version: Annotated[str | None, typer.Option(help="of the one host that is given, where it does not know")] = None,
) -> None:
    if unknown := [host for host in hosts or () if host not in HOSTS]:
        raise typer.BadParameter(f"{unknown[0]!r} is no host; accepted: {', '.join(HOSTS)}", param_hint="HOSTS")
    if version and len(hosts or ()) != 1:
        raise typer.BadParameter("it goes with one host", param_hint="--version")
    installed = seeded.installed()
    if missing := [host for host in hosts or () if host not in installed]:
        raise typer.BadParameter(f"{missing[0]} is not installed", param_hint="HOSTS")
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it is imported, which it is not yet
    if version is None and "ltx-core" in (hosts or installed) and "checkout" in runs.named("ltx-core"):
        raise typer.BadParameter("ltx-core is a checkout, which does not know its own", param_hint="--version")
    new = [row(host, version) for host in hosts or installed]
    for r in new:
        steps = ", ".join(f"LTX-{s['ltx']} {s['outcome']} ({s['fused']} of {s['of']} sites)" for s in r["steps"])
        print(f"{r['host']} {r['version']}: {r['functions']['passed']} functions equal; {steps}", file=sys.stderr)
    rows = merged(json.loads(FILE.read_text()) if FILE.exists() else [], new)
    FILE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    failed = any(r["functions"]["failed"] for r in new)
    raise typer.Exit(int(failed or any(s["outcome"] == "differs" for r in new for s in r["steps"])))


if __name__ == "__main__":
    typer.run(main)
