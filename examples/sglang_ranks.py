"""SGLang's LTX-2 with its tokens divided among GPUs: each rank's part of a step, stock and accelerated, bit for bit.

    torchrun --standalone --nproc-per-node 2 examples/sglang_ranks.py --tokens 6144 --json ranks.json

SGLang's own sequence parallelism (Ulysses), over NCCL; its transformer with random weights, the same on every rank.
Without GPUs the ranks are processes on the CPU, over gloo, with a small transformer in Triton's interpreter. Exit code
0: every rank's two streams are those of its stock step in every bit, and all ranks fused the same sites; 1: not so.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch

from bitfuse.tools import ranks, seeded
from bitfuse.tools.bench.bench import LATENTS
from bitfuse.tools.seeded import sglang as seeded_sglang


def geometry_for(given: argparse.Namespace, device: torch.device) -> seeded.Geometry:
    found, _ = seeded.geometry_for(device, given.layers, given.ltx, "sglang")
    frames, height, width = LATENTS[given.tokens] if device.type == "cuda" else (2 * seeded_sglang.ranks(), 3, 4)
    return replace(found, frames=frames, height=height, width=width)


def of_rank(given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    geometry = geometry_for(given, device)
    model = seeded.build(geometry, device, seed=0)
    whole = seeded.make_inputs(model, geometry, device, seed=0)
    step = seeded.one_step(model, seeded_sglang.part_of_rank(model, geometry, whole))
    return {"geometry": geometry.sentence} | ranks.by_turns(model, step, given.rounds, given.steps, device)


if __name__ == "__main__":
    sys.exit(ranks.run(ranks.arguments(__doc__), of_rank, "sglang"))
