"""A step of a model on several ranks, stock and accelerated by turns: what the examples for several GPUs share.

Each rank compares what it computes with its own stock step, bit for bit; one rank puts together what all have found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import bitfuse
from bitfuse.core.kernel import interpreter
from bitfuse.tools import seeded
from bitfuse.tools.bench.bench import LATENTS
from bitfuse.tools.bench.measure import spread
from bitfuse.tools.compare import runs
from bitfuse.tools.machine import machine
from bitfuse.tools.seeded.sglang import ranks


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that the examples share. `doc` is the example's own."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, choices=LATENTS, default=6144, help="video tokens of the clip, on GPUs")
    parser.add_argument("--ltx", choices=seeded.VERSIONS, default="2.0", help="version of LTX-2")
    parser.add_argument("--layers", type=int, help="by default as many of the 48 as fit; 2 without GPUs")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    return parser


def run(
    parser: argparse.ArgumentParser, of_rank: Callable[[argparse.Namespace, torch.device], dict[str, Any]], host: str
) -> int:
    """Run this rank's part and show what all found: the exit code.

    of_rank    given the options and the rank's device, what `by_turns` gives, with the `geometry` in a sentence, and
               `how` it is divided where there are several ways; `trains` True where a step is differentiated: then the
               PyTorch chains run, and nothing need be fused
    host       of the model, one of `HOSTS`
    """
    given = parser.parse_args()
    if given.steps < 1 or given.rounds < 2:
        parser.error(f"--steps is {given.steps} and --rounds {given.rounds}; accepted: at least 1 and 2")
    if ranks() < 2:
        parser.error("there is one rank only; start it with: torchrun --standalone --nproc-per-node 2 ...")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    try:
        with contextlib.nullcontext() if on_gpu else interpreter():
            mine = of_rank(given, device)
    except (seeded.CannotRun, ValueError) as why:
        print(why, file=sys.stderr)
        return 2
    parts: list[Any] = [None] * ranks()
    distributed.all_gather_object(parts, mine)
    found = together(parts, host)
    found |= {"version": given.ltx, "exit_code": 0 if as_promised(found) else 1}
    if distributed.get_rank() == 0:
        show(found, mine["report"])
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n")
    distributed.destroy_process_group()
    return found["exit_code"]


def by_turns(model: Any, step: Callable[[], Any], rounds: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Stock and accelerated by turns, the first step of each not timed. All are compared with a first step of stock."""
    expected = step()
    found: dict[str, Any] = {"stock": [], "bitfuse": [], "differs": [], "sites": []}
    for _ in range(rounds):
        for way in ("stock", "bitfuse"):
            accelerated = bitfuse.accelerated(model) if way == "bitfuse" else contextlib.nullcontext()
            with accelerated as handle:
                results, ms = _timed(step, 1 + steps, device)
                found[way] += ms[1:]
                if handle is not None:
                    report = handle.report()
                    found["sites"] = report.kinds()
                    found["fused"], found["seen"], found["report"] = report.fused, report.seen, str(report)
            for out in results:
                if mismatch := bitfuse.compare(expected, out):
                    found["differs"].append(f"{way}: {mismatch.sentence}")
    return found


def _timed(step: Callable[[], Any], count: int, device: torch.device) -> tuple[list[Any], list[float]]:
    """What some steps on end return, and their milliseconds: the ranks start each together."""
    results, ms = [], []
    for _ in range(count):
        distributed.barrier()
        start = seeded.now(device)
        results.append(step())
        ms.append(1e3 * (seeded.now(device) - start))
    return results, ms


def together(parts: list[dict[str, Any]], host: str) -> dict[str, Any]:
    """All ranks' runs as one: a step takes as long as its slowest rank."""
    times = {way: spread(list(map(max, *(part[way] for part in parts)))) for way in ("stock", "bitfuse")}
    return {
        "machine": machine(),
        "host": ", ".join([runs.named(host), *([parts[0]["how"]] if "how" in parts[0] else [])]),
        "ranks": len(parts),
        "backend": distributed.get_backend(),
        "geometry": parts[0]["geometry"],
        "trains": parts[0].get("trains", False),
        "sites_fused": [part["fused"] for part in parts],
        "sites_seen": [part["seen"] for part in parts],
        "same_sites": all(part["sites"] == parts[0]["sites"] for part in parts),
        "differs": {rank: part["differs"] for rank, part in enumerate(parts) if part["differs"]},
        "ms": times,
        "speed_up": times["stock"]["median"] / times["bitfuse"]["median"],
    }


def as_promised(found: dict[str, Any]) -> bool:
    return (found["trains"] or all(found["sites_fused"])) and found["same_sites"] and not found["differs"]


def show(found: dict[str, Any], report: str) -> None:
    print(f"{found['host']}, {found['ranks']} ranks over {found['backend']}: {found['geometry']}")
    print(report)
    for rank, sentences in found["differs"].items():
        print(f"Rank {rank}, {sentences[0]}")
    same, fused = found["same_sites"], found["sites_fused"]
    print("All ranks fused the same sites." if same else f"The ranks did not fuse the same sites; each fused: {fused}.")
    if not as_promised(found):
        return
    print("What every rank computes is what its stock step computes, in every bit.")
    if found["backend"] == "nccl":  # on the CPU a time means nothing
        ms = [f"{way} {t['median']:.1f} ms ({t['p10']:.1f} to {t['p90']:.1f})" for way, t in found["ms"].items()]
        print(f"A step: {', '.join(ms)}, {found['speed_up']:.2f}x.")
