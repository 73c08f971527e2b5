"""bitfuse beside offload, casting, quantised weights and LoRA: a table for docs/stacking.md, and times on a GPU.

    python benchmarks/stacking.py                                        # every feature, in both orders: stacking.json
    python benchmarks/stacking.py --time 6144 --layers 48 --out out/stacking-times.json

Without `--time` it is what `tests/test_stacking.py` holds, for the packages that are installed here; `make readme` then
fills the table. With it each feature is timed on a GPU, stock with the feature and bitfuse with it by turns, every
output compared with stock's before it is timed and after the last round. Exit code 1 where a bit differs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
FILE = ROOT / "benchmarks" / "stacking.json"

if "--time" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402  (Triton reads the variable above when it is imported)

import bitfuse  # noqa: E402
from bitfuse.tools import packages, seeded  # noqa: E402
from bitfuse.tools.bench.bench import LATENTS  # noqa: E402
from bitfuse.tools.machine import machine  # noqa: E402
from stacking import FEATURES, ORDERS, Feature, row  # noqa: E402

VERSIONS = ("2.0", "2.3")


def table() -> int:
    rows: list[dict[str, Any]] = []
    for feature in FEATURES:
        if feature.missing:
            print(f"{feature.name}: {', '.join(feature.missing)} is not installed", file=sys.stderr)
            continue
        for version in VERSIONS:
            for order in ORDERS:
                found = asdict(row(feature, version, order, torch.device("cpu"))) | {"how": feature.how}
                rows.append(found)
                print(*(found[key] for key in ("feature", "version", "order", "fused", "seen")), file=sys.stderr)
    kept = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    new = {(r["feature"], r["version"], r["order"]): r for r in rows}
    merged = {(r["feature"], r["version"], r["order"]): r for r in kept} | new
    names = [feature.name for feature in FEATURES]
    ordered = sorted(merged.values(), key=lambda r: (names.index(r["feature"]), r["version"], ORDERS.index(r["order"])))
    versions = {name: packages.version(name) for name in ("accelerate", "peft", "torchao")}
    FILE.write_text(json.dumps({"machine": machine("cpu") | versions, "rows": ordered}, indent=1) + "\n")
    return int(any(r["differs"] or r["after_restore"] for r in rows))


def timed(feature: Feature, tokens: int, layers: int, rounds: int, version: str) -> dict[str, Any]:
    device = torch.device("cuda")
    frames, height, width = LATENTS[tokens]
    geometry, _ = seeded.geometry_for(device, layers, version, "diffusers")
    geometry = replace(geometry, frames=frames, height=height, width=width)
    found: dict[str, Any] = {"feature": feature.name, "tokens": tokens, "layers": layers, "version": version}
    models = {way: seeded.build(geometry, device, seed=0) for way in ("stock", "bitfuse")}
    inputs = seeded.make_inputs(models["stock"], geometry, device, seed=0)
    calls = {way: seeded.one_step(model, inputs) for way, model in models.items()}
    with torch.no_grad():
        for model in models.values():
            feature.use(model)
        gc.collect()
        torch.cuda.empty_cache()
        start = time.perf_counter()
        handle = bitfuse.accelerate(models["bitfuse"])
        found["accelerate_s"] = round(time.perf_counter() - start, 3)
        outs = {way: [call() for _ in range(3)][-1] for way, call in calls.items()}
        mismatch = bitfuse.compare(outs["stock"], outs["bitfuse"])
        ms: dict[str, list[float]] = {way: [] for way in calls}
        peak = {}
        for turn in range(rounds):
            for way in sorted(calls, reverse=bool(turn % 2)):
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
                start = time.perf_counter()
                outs[way] = calls[way]()
                torch.cuda.synchronize()
                ms[way].append((time.perf_counter() - start) * 1e3)
                peak[way] = torch.cuda.max_memory_allocated() / 1e9
        mismatch = mismatch or bitfuse.compare(outs["stock"], outs["bitfuse"])
    report = handle.report()
    found |= {"fused": report.fused, "seen": report.seen, "equal": mismatch is None, "peak_gb": peak}
    if mismatch is None:
        found["ms"] = {way: {"median": statistics.median(t), "min": min(t), "max": max(t)} for way, t in ms.items()}
        found["speedup"] = statistics.median(a / b for a, b in zip(ms["stock"], ms["bitfuse"], strict=True))
    else:
        found["mismatch"] = mismatch.sentence
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--time", type=int, metavar="TOKENS", choices=sorted(LATENTS))
    parser.add_argument("--only", nargs="*", metavar="FEATURE", help="names of features; default: all")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--version", default="2.0", choices=VERSIONS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.time is None:
        raise SystemExit(table())
    found: dict[str, Any] = {"what": "features, stock and bitfuse by turns", "machine": machine("cuda"), "rows": []}
    for feature in FEATURES:
        if feature.missing or (asked.only and feature.name not in asked.only):
            continue
        try:
            row = timed(feature, asked.time, asked.layers, asked.rounds, asked.version)
        except Exception as error:  # of the feature itself on this machine: noted, and the others go on
            row = {"feature": feature.name, "equal": None, "mismatch": f"{type(error).__name__}: {error}"[:300]}
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        found["exit_code"] = int(not all(r["equal"] is not False for r in found["rows"]))
        if asked.out:
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps(found, indent=1))
    raise SystemExit(found["exit_code"])


if __name__ == "__main__":
    main()
