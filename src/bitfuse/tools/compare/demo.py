"""The demo: `compare` of a real LTX-2 transformer with seeded weights, for which no checkpoint is needed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bitfuse.tools.compare import comparison, runs
from bitfuse.tools.compare.comparison import Form
from bitfuse.tools.compare.request import Request
from bitfuse.tools.compare.runs import Result
from bitfuse.tools.compare.subject import Subject
from bitfuse.tools.seeded import REAL

NAMES = ("report.json", "report.html")


def run(
    out: Path,
    device: str | None = None,
    steps: int | None = None,
    layers: int | None = None,
    seed: int = 0,
    console: Console | None = None,
    host: str = "diffusers",
) -> Result:
    """Run the demo and write `out`/report.json and `out`/report.html; where it can't run, nothing is written.

    An earlier report stays until the new one takes its place; files of these names that bitfuse did not write are kept,
    and the demo does not run there.

    device    "cpu", "cuda" or "cuda:<n>"; by default a GPU where there is one. On the CPU the model is small and
              the kernels run in Triton's interpreter.
    steps     denoising steps, 2 or more
    layers    transformer layers, 1 to 48; by default 2 on the CPU, and on a GPU as many of the 48 as fit
    host      whose transformer it is: "diffusers", "ltx-core", "sglang" or "comfyui"
    """
    if steps is not None and steps < 2:
        raise ValueError(f"steps is {steps}; accepted: 2 or more")
    if layers is not None and not 1 <= layers <= REAL.layers:
        raise ValueError(f"layers is {layers}; accepted: 1 to {REAL.layers}")
    request = Request(random_weights="2.0", layers=layers, seed=seed, device=device, host=host)
    call = {} if steps is None else {"num_inference_steps": steps}
    return comparison.report(request, call, Path(out), console or Console(), _DEMO)


def _opening(request: Request, subject: Subject, facts: dict[str, Any]) -> tuple[str, ...]:
    on = f"{facts['device']}, torch {facts['torch']}, bfloat16, seed {request.seed}. {subject.fit}"
    return f"LTX-2 transformer of {runs.named(request.host)}: {_geometry(subject)['sentence']}", on.rstrip()


def _geometry(subject: Subject) -> dict[str, Any]:
    assert subject.geometry is not None
    g = subject.geometry
    return {**asdict(g), "video_tokens": g.video_tokens, "sentence": g.sentence}


_DEMO = Form(
    "demo",
    NAMES,
    _opening,
    lambda subject: {"geometry": _geometry(subject), "memory": subject.fit},
    lambda request: "Fewer layers need less: try `bitfuse demo --layers 4`.",
    left_out=frozenset({"options", "decoded", "runs", "film", "files", "divergence"}),
)
