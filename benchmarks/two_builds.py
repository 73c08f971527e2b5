"""An older build of bitfuse beside this one, by turns in one process: operators, and whole steps of a transformer.

    git archive v0.1.0 src | tar x -C OLD
    python benchmarks/two_builds.py OLD/src --out out/two-builds.json --tokens 1536 6144

Both builds fuse twins of one diffusers model, which share its weights. Every output is compared with stock's, bit for
bit, before it is timed and after the last round; a way whose bits differ gets no time. The order of the ways turns from
round to round, as the first one after a pause finds a cooler card.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class Build:
    """One build of the package: its modules stand in `sys.modules` within `with build.loaded():`."""

    def __init__(self, name: str, source: Path):
        self.name, self.source = name, str(source)
        self.modules: dict[str, Any] = {}
        with self.loaded():
            self.bitfuse = importlib.import_module("bitfuse")

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        others = _take_out()
        sys.modules.update(self.modules)
        sys.path.insert(0, self.source)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(self.source)
            self.modules = _take_out()
            sys.modules.update(others)


def _take_out() -> dict[str, Any]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "bitfuse"}


def operators(builds: list[Build], rounds: int, names: list[str]) -> Iterator[dict[str, Any]]:
    """Microseconds of the real cases of these operators, of none named all, in both builds, with a cold L2."""
    new = builds[-1]
    with new.loaded():
        from bitfuse.tools.bench.measure import interleaved

        of_all = new.bitfuse.OPERATORS
        work = [(of_all[name], case) for name in names or of_all for case in of_all[name].cases if case.real]
    device = torch.device("cuda")
    for operator, case in work:
        args = case.arguments(device, seed=0)
        expected = operator.reference(*args)
        calls, mismatch = {}, None
        for build in builds:
            with build.loaded():
                route = build.bitfuse.OPERATORS[operator.name].route(*args)
                found = new.bitfuse.compare(expected, route.run(*args))
            mismatch = mismatch or (found and found.sentence) or (None if route.fused else route.reason)
            calls[build.name] = functools.partial(route.run, *args)
        row = {"operator": operator.name, "case": case.name, "equal": mismatch is None, "mismatch": mismatch}
        if mismatch is None:
            row["us"] = interleaved(calls, device, rounds)
            row["new / old"] = row["us"]["new"]["median"] / row["us"]["old"]["median"]
        yield row


def steps(builds: list[Build], tokens: int, layers: int, rounds: int, version: str) -> dict[str, Any]:
    """Milliseconds of a step: stock, and each build without and with its CUDA graph."""
    new = builds[-1]
    with new.loaded():
        from bitfuse.tools import seeded
        from bitfuse.tools.bench.bench import _geometry
        from bitfuse.tools.bench.measure import spread

        device = torch.device("cuda")
        geometry = _geometry(device, tokens, layers, version, image_to_video=False)
        stock = seeded.build(geometry, device, seed=0)
        inputs = seeded.make_inputs(stock, geometry, device, seed=0)
        ways = {"stock": (new, stock)}
        ways |= {f"{b.name}{g}": (b, seeded.twin(stock)) for g in ("", " graph") for b in builds}
        calls = {way: seeded.one_step(model, inputs) for way, (_, model) in ways.items()}
    expected, equal, warm = calls["stock"](), {}, {}
    for way, (build, model) in ways.items():
        if way == "stock":
            continue
        with build.loaded():
            start = time.perf_counter()
            build.bitfuse.accelerate(model, cuda_graph=way.endswith("graph"))
            accelerated = time.perf_counter() - start
            out = [calls[way]() for _ in range(4)][-1]
            torch.cuda.synchronize()
            warm[way] = [round(accelerated, 2), round(time.perf_counter() - start - accelerated, 2)]
            equal[way] = new.bitfuse.compare(expected, out) is None
    ms: dict[str, list[float]] = {way: [] for way in ways if way == "stock" or equal[way]}
    order = list(ms)
    for turn in range(rounds):
        for way in order[turn % len(order) :] + order[: turn % len(order)]:
            with ways[way][0].loaded():
                start = time.perf_counter()
                calls[way]()
                torch.cuda.synchronize()
                ms[way].append((time.perf_counter() - start) * 1e3)
    for way, (build, _) in ways.items():
        if way in ms and way != "stock":
            with build.loaded():
                equal[way] = equal[way] and new.bitfuse.compare(expected, calls[way]()) is None
    row = {"tokens": tokens, "layers": layers, "version": version, "accelerate_s_and_warm_s": warm, "equal": equal}
    row["ms"] = {way: spread(found[2:]) | {"rounds": len(found) - 2} for way, found in ms.items()}
    for kind in ("", " graph"):
        if f"old{kind}" in ms and f"new{kind}" in ms:
            pairs = zip(ms[f"new{kind}"][2:], ms[f"old{kind}"][2:], strict=True)
            row[f"new / old{kind}"] = statistics.median(a / b for a, b in pairs)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path, help="the folder src of the older build")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="", help="of the older build, for the record: a tag or a commit")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1536, 6144])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--version", default="2.0")
    parser.add_argument("--operators", nargs="*", help="also these operators, on their real cases; without names: all")
    asked = parser.parse_args()
    if not (asked.old / "bitfuse").is_dir():
        parser.error(f"{str(asked.old)!r} has no folder bitfuse; accepted: the folder src of an older build")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device, and times in Triton's interpreter mean nothing")
    builds = [Build("old", asked.old), Build("new", Path(__file__).resolve().parents[1] / "src")]
    known = builds[-1].bitfuse.OPERATORS
    if unknown := [name for name in asked.operators or () if name not in known]:
        parser.error(f"--operators {unknown[0]!r}; accepted: {', '.join(known)}")
    with builds[-1].loaded():
        from bitfuse.tools.machine import machine

        found: dict[str, Any] = {
            "what": "two builds by turns in one process",
            "old": asked.name or str(asked.old.name),
            "machine": machine(torch.device("cuda")),
            "operators": [],
            "rows": [],
        }

    def keep() -> None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=1))

    for row in operators(builds, 25, asked.operators) if asked.operators is not None else ():
        found["operators"].append(row)
        ratio = f"{row['new / old']:.3f}" if row["equal"] else row["mismatch"]
        print(f"{row['operator']:48} {row['case'][:40]:40} new / old {ratio}", flush=True)
        keep()
    for tokens in asked.tokens:
        row = steps(builds, tokens, asked.layers, asked.rounds, asked.version)
        found["rows"].append(row)
        times = ", ".join(f"{way} {ms['median']:.1f}" for way, ms in row["ms"].items())
        ratios = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k.startswith("new /"))
        print(f"{tokens} tokens: {times} ms; {ratios}; equal {row['equal']}", flush=True)
        torch.cuda.empty_cache()
        keep()
    whole = all(row["equal"] for row in found["operators"]) and all(all(row["equal"].values()) for row in found["rows"])
    found["exit_code"] = 0 if whole else 1
    keep()
    raise SystemExit(found["exit_code"])


if __name__ == "__main__":
    main()
