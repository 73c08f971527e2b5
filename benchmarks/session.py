"""One sitting at a GPU machine: the commands of a plan in order, each with a limit of its own, a table of them last.

    python benchmarks/session.py                                   # the plans, and what each runs
    python benchmarks/session.py models --out out --seconds 570    # a lent machine ends a call after ten minutes
    python benchmarks/session.py sglang operators audit-model --out out        # a plan's one command by its name, too
    python benchmarks/session.py everything --out out --seconds 570      # again and again, until its exit code is 0

Every command compares bits before it times. `bitfuse bench` writes its JSON to OUT whenever it has a row: cut off at
its limit, it leaves the rows before; of the other commands some do so too. What ended well is written down in
OUT/done.json, and is not run again on a GPU of that name while its file is there. A command whose limit is longer than
what is left of the time is not begun, unless it is the first: one that fails slowly, again and again, is best seen to
by its name. The file names are those of benchmarks/results, from which `make readme` makes the tables and
docs/benchmarks.md. Exit code 0: every command of the plans ended well, now or before.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

BENCH, VERIFY = "-m bitfuse bench --only", "-m bitfuse verify --json"
STUBS = "tests/sglang_host.py"  # stands in for what SGLang imports and its LTX-2 does not use, where that is missing
TWO = "python -m torch.distributed.run --standalone --nproc-per-node 2"
RANKS = f"{TWO} {STUBS} examples/sglang_ranks.py"
DIFFUSERS_RANKS = f"{TWO} examples/diffusers_ranks.py"
DIFFUSION = "python benchmarks/diffusion_decoder.py"
GLUON_LAYERS = "python benchmarks/linear.py --kinds thirds together pingpong --parts trial steady shapes"
DECODES = "--size 256x256x17 --size 512x384x25 --size 768x512x25"


@dataclass(frozen=True)
class Command:
    """`name` ends its JSON's file name; `line` has FILE for that, and PAGE for an HTML file; `seconds` is its limit."""

    name: str
    line: str
    seconds: int


def tokens(*counts: int) -> str:
    return " ".join(f"--tokens {count}" for count in counts)


PLANS = {
    "tests": [Command("tests", "python -m pytest -m gpu -q -n 4", 400)],
    "verify": [Command("verify", f"python {VERIFY} FILE --html PAGE", 120)],
    "deep": [Command("verify-deep", f"python {VERIFY} FILE --html PAGE --deep", 600)],
    "models": [
        Command("model", f"python {BENCH} model {tokens(6144, 1536, 24576, 32640)} --json FILE", 480),
        Command("first-step-model", f"python {BENCH} first-step --json FILE", 120),
    ],
    "first-decode": [Command("first-decode", "python benchmarks/first_decode.py --out FILE", 150)],
    "runs": [Command("run", f"python {BENCH} run --json FILE", 240)],
    "later-models": [
        Command("2.3-model", f"python {BENCH} model --ltx 2.3 {tokens(6144, 1536, 24576)} --json FILE", 400),
        Command("audit-model", f"python {BENCH} audit --json FILE", 90),
    ],
    "operators": [Command("operators", f"python {BENCH} operators --json FILE", 180)],
    "ltx-core": [
        Command("ltx-core-verify", f"python {VERIFY} FILE --op head_gate --host ltx-core", 90),
        Command("ltx-core-model", f"python {BENCH} model --host ltx-core --tokens 6144 --json FILE", 150),
    ],
    "sglang": [  # its CUDA kernels compile at their first use
        Command("sglang-verify", f"python {STUBS} {VERIFY} FILE --op head_gate --host sglang", 180),
        Command(
            "sglang-model",
            f"python {STUBS} {BENCH} model --host sglang {tokens(6144, 1536, 32640)} --json FILE",
            380,
        ),
    ],
    "two-gpus": [
        Command("ranks", f"{RANKS} --tokens 6144 --json FILE", 240),
        Command("2.3-ranks", f"{RANKS} --tokens 6144 --ltx 2.3 --json FILE", 240),
    ],
    "two-gpus-diffusers": [
        Command("ulysses-ranks", f"{DIFFUSERS_RANKS} --how ulysses --tokens 6144 --json FILE", 180),
        Command("fsdp-ranks", f"{DIFFUSERS_RANKS} --how fsdp --tokens 6144 --json FILE", 180),
        Command("trained-ranks", f"{DIFFUSERS_RANKS} --how train --tokens 1536 --layers 8 --json FILE", 180),
    ],
    "comfyui": [  # what it needs besides is in benchmarks/carry-comfyui.txt
        Command("comfyui", "python benchmarks/comfyui.py --out FILE", 480),
        Command("2.3-comfyui", "python benchmarks/comfyui.py --ltx 2.3 --tokens 6144 --out FILE", 240),
    ],
    "encoder": [Command("video-encoder", "python benchmarks/video_encoder.py --out FILE", 150)],
    "compiled": [Command("compiled", "python benchmarks/compiled.py --layers 8 --out FILE", 400)],
    "decoder": [
        Command("diffusion-decoder", f"{DIFFUSION} --only operators --only block --out FILE", 150),
        Command("diffusion-decode", f"{DIFFUSION} --only decode {DECODES} --rounds 2 --seconds 150 --out FILE", 240),
    ],
    "linears": [  # docs/linear.md's, but for quack's: benchmarks/carry-quack.txt
        Command("linear-turns", "python benchmarks/linear.py --out FILE", 300),
        Command("linear-cublaslt", "python benchmarks/linear_cublaslt.py --out FILE", 330),
        Command("linear-gluon-layers", f"{GLUON_LAYERS} --out FILE", 120),
        Command("linear-gluon-steps", "python benchmarks/linear_steps.py --engine gluon --out FILE", 430),
    ],
    "peers": [  # what it needs besides is in benchmarks/carry-peers.txt
        Command("peers", "python benchmarks/peers.py --out FILE", 300),
    ],
}
EVERYTHING = (
    *("runs", "models", "operators", "peers", "first-decode", "verify"),
    *("later-models", "comfyui", "ltx-core", "sglang", "decoder"),
)
"""The plans of docs/benchmarks.md, in the order in which they tell most; the last is docs/decode.md's."""


def card() -> str:
    """The GPU's name as file names have it: h100 of "NVIDIA H100 80GB HBM3"."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name()
    found = re.search(r"\b[A-Z]\d+\w*\b|\b\d{4}\b", name)
    return (found[0] if found else name).lower().replace(" ", "-")


def run(commands: list[Command], out: Path, seconds: float) -> list[tuple[Command, str, float]]:
    """Each command, how it ended (done before, exit code, cut off, not begun), and the seconds that it took."""
    end, here = time.monotonic() + seconds, card()
    prefix = f"{datetime.now(timezone.utc):%Y-%m-%d}-{here}"
    out.mkdir(parents=True, exist_ok=True)
    ledger = out / "done.json"
    done = read_ledger(ledger)
    rows: list[tuple[Command, str, float]] = []
    begun = False
    for command in commands:
        start, left = time.monotonic(), end - time.monotonic()
        if _is_done(command, done, out, here):
            rows.append((command, "done before", 0.0))
            continue
        if left <= 0 or (begun and left < command.seconds):
            rows.append((command, "not begun", 0.0))
            continue
        begun = True
        file = out / f"{prefix}-{command.name}.json"
        names = {"FILE": str(file), "PAGE": str(file.with_suffix(".html")), "python": sys.executable}
        argv = [names.get(word, word) for word in shlex.split(command.line)]
        print(f"\n== {command.name}: {shlex.join(argv)}", flush=True)
        process = subprocess.Popen(argv, start_new_session=True)
        try:
            code = process.wait(min(left, command.seconds))
            ended = f"exit code {code}"
            if code == 0 and "FILE" in command.line:
                done[command.name] = {"line": command.line, "file": file.name}
                whole = ledger.with_suffix(".part")  # a call may be ended at any time, also here
                whole.write_text(json.dumps(done, indent=1))
                whole.replace(ledger)
        except subprocess.TimeoutExpired:
            ended = "cut off"
        finally:  # of an interrupt, too: what it started would go on using the GPU
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        rows.append((command, ended, time.monotonic() - start))
    return rows


def read_ledger(ledger: Path) -> dict[str, dict[str, str]]:
    """What ended well before. A file that is no such list ends the call with a sentence."""
    try:
        done = json.loads(ledger.read_text()) if ledger.is_file() else {}
        if isinstance(done, dict) and all({"line", "file"} <= set(found) for found in done.values()):
            return done
    except (ValueError, TypeError):
        pass
    raise typer.BadParameter(f"{ledger} is no list of what is done; without it all is run again", param_hint="--out")


def _is_done(command: Command, done: dict[str, dict[str, str]], out: Path, here: str) -> bool:
    """Whether this very command ended well before, on a GPU of this name, and what it wrote is still there, whole."""
    found = done.get(command.name)
    if found is None or found["line"] != command.line or not found["file"].endswith(f"-{here}-{command.name}.json"):
        return False
    try:
        json.loads((out / found["file"]).read_text())
    except (OSError, ValueError):
        return False
    return True


def main(
    plans: Annotated[list[str] | None, typer.Argument(help="plans, or commands of them; none: list them")] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="folder for the JSON")] = Path("out/session"),
    seconds: Annotated[float, typer.Option(min=1, help="for all of it")] = 3600.0,
) -> None:
    known = {command.name: [command] for commands in PLANS.values() for command in commands} | PLANS
    known["everything"] = [command for plan in EVERYTHING for command in PLANS[plan]]
    if unknown := [plan for plan in plans or () if plan not in known]:
        raise typer.BadParameter(f"{unknown[0]!r} is no plan; accepted: {', '.join(known)}", param_hint="PLANS")
    if not plans:
        table = Table("plan", "at most, s", "command")
        for plan, commands in PLANS.items():
            for command in commands:
                table.add_row(plan, str(command.seconds), command.line)
        table.add_row("everything", str(sum(c.seconds for c in known["everything"])), ", ".join(EVERYTHING))
        Console().print(table)
        return
    rows = run([command for plan in plans for command in known[plan]], out, seconds)
    table = Table("command", "ended", "seconds")
    for command, ended, took in rows:
        table.add_row(command.name, ended, f"{took:.0f}")
    Console().print(table)
    raise typer.Exit(int(any(ended not in ("exit code 0", "done before") for _, ended, _ in rows)))


if __name__ == "__main__":
    typer.run(main)
