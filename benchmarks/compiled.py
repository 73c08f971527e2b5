"""torch.compile around bitfuse's operators: which ways keep eager's bits, and whether any is faster than a CUDA graph.

    python benchmarks/compiled.py --layers 8 --out out/compiled.json     # on a GPU: bits and times, a table for docs
    python benchmarks/compiled.py --seeds 0 1 2                          # without one: bits alone, of a small model

The blocks of diffusers' LTX-2 transformer are compiled with bitfuse's operators in them as opaque ops
(`torch.ops.bitfuse.*`), so that a backend of torch.compile has what is left: matmuls, attention, a GELU. Every way's
output is compared with the eager model's, by every bit: its differing elements are counted, and it is timed either way,
by turns with the others. `bitfuse` and `bitfuse, CUDA graph` are `bitfuse.accelerate`, as it is.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, and bitfuse at every launch

from diffusers.models.transformers import transformer_ltx2 as upstream

import bitfuse
from bitfuse.core.bits import differing
from bitfuse.hosts import diffusers as host
from bitfuse.hosts import ltx2
from bitfuse.tools import seeded
from bitfuse.tools.bench.bench import LATENTS
from bitfuse.tools.bench.measure import captured, spread
from bitfuse.tools.machine import machine

# -- bitfuse's forwards, as torch.compile can trace them ---------------------------------------------------------------


class OpaqueSite:
    """In place of a `Site`: it calls the operator as the op that PyTorch knows it by, and counts nothing."""

    def call(self, operator: Any, *args: Any) -> Any:
        return getattr(torch.ops.bitfuse, operator.name)(*args)


SITE = OpaqueSite()


class BlockForward(host.LTX2VideoTransformerBlock):
    """The forward of a block, without what only Python can see: counts, a second stream, views kept from block to
    block. One serves all blocks."""

    def __init__(self) -> None:
        names = ltx2.block_sites(ltx2.COMPOSED, text=True)
        self.named_sites: Any = dict.fromkeys(names, SITE)

    def values(self, table: Any, temb: Any) -> Any:
        views = temb.unflatten(-1, (table.shape[0], -1)).unbind(dim=2)
        return list(zip(views, table.unbind(0), strict=True))

    def fork(self, block: Any, x: Any) -> ltx2.Fork:
        return ltx2.Fork(x, None)


class AttentionForward(host.Attention):
    def __init__(self) -> None:
        self.site = self.gate_site = SITE  # type: ignore[assignment]
        self.text = None

    def _norm_and_rotate(self, attn: Any, query: Any, key: Any, tables: Any, key_tables: Any) -> Any:
        norms, rotate = (attn.norm_q, attn.norm_k), host._ROTARY[attn.rope_type].qk
        return ltx2.norm_and_rotate(SITE.call, rotate, query, key, *norms, tables, key_tables)


OF_BLOCK, OF_ATTENTION = BlockForward(), AttentionForward()


class OpaqueBlock(upstream.LTX2VideoTransformerBlock):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return OF_BLOCK.fused(self, *args, **kwargs)


class OpaqueAttention(upstream.LTX2Attention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return OF_ATTENTION.fused(self, *args, **kwargs)


def make_opaque(model: Any) -> Any:
    """Have all blocks of a model run the forwards above; it is the model that is given."""
    for block in model.transformer_blocks:
        block.__class__ = OpaqueBlock
    for _, _, _, attention in ltx2.attentions(model):
        attention.__class__ = OpaqueAttention
    return model


# -- the ways ----------------------------------------------------------------------------------------------------------

NOTED: dict[str, collections.Counter[str]] = {}  # calls by name in what the backend `aot_eager` was given, by the way


def noting(way: str) -> Callable[..., Any]:
    """The backend `aot_eager`, which runs the ATen ops that inductor would be given, and has them noted."""
    from torch._dynamo.backends.common import aot_autograd

    def compiler(graph: Any, inputs: Any) -> Any:
        calls = (node.target for node in graph.graph.nodes if node.op == "call_function")
        NOTED.setdefault(way, collections.Counter()).update(map(str, calls))
        return graph

    return aot_autograd(fw_compiler=compiler)


def inductor(**options: Any) -> dict[str, Any]:
    return {"options": options}


def strict_options() -> dict[str, Any] | None:
    """All that this version of inductor has to come near to eager's bits: `numerics="strict"` from torch 2.14 on.

    Before, the options by which it is made up: casts, division, denormals, CUDA's own libdevice, a bias within the
    matmul. None where there is none but the casts.
    """
    from torch._inductor import config

    if hasattr(config, "numerics"):
        return {"numerics": "strict"}
    wanted = ("division_rounding", "disable_ftz", "use_pytorch_libdevice")
    numerics = getattr(config, "eager_numerics", None)
    found = {f"eager_numerics.{name}": True for name in wanted if hasattr(numerics, name)}
    if hasattr(config, "keep_addmm_fused_for_half_dtypes"):
        found["keep_addmm_fused_for_half_dtypes"] = True
    return found | {"emulate_precision_casts": True} if found else None


def compile_options(on_gpu: bool) -> dict[str, dict[str, Any]]:
    """What torch.compile is given, by the name of the way."""
    found: dict[str, dict[str, Any]] = {"eager": {"backend": "eager"}, "aot_eager": {"backend": "noting"}}
    found |= {"inductor": {}, "emulate_precision_casts": inductor(emulate_precision_casts=True)}
    if (strict := strict_options()) is not None:
        found['numerics="strict"' if "numerics" in strict else "all eager numerics"] = inductor(**strict)
    if on_gpu:
        found["reduce-overhead"] = {"mode": "reduce-overhead"}
    return found


def compile_blocks(model: Any, way: str, options: dict[str, Any]) -> None:
    if options.get("backend") == "noting":
        options = {"backend": noting(way)}
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, **options)


@dataclass
class Way:
    """One way to run a step. `ms` are its timed steps, `row` what else was found of it."""

    step: Callable[[], Any]
    row: dict[str, Any] = field(default_factory=dict)
    ms: list[float] = field(default_factory=list)

    def judge(self, expected: Any, out: Any) -> None:
        """Count the elements of both streams of which a bit is not the expected one; the most of all steps is kept."""
        counts = [int(differing(a, b).sum()) for a, b in zip(expected, out, strict=True)]
        self.row["differing"] = max(self.row.get("differing", 0), sum(counts))
        self.row["elements"] = sum(t.numel() for t in expected)


def ways_of(stock: Any, step_of: Callable[[Any], Any], expected: Any, on_gpu: bool) -> dict[str, Way]:
    """Every way, run until nothing is compiled, proved or captured any more, and its bits judged."""
    found = {"stock": Way(step_of(stock))}

    def add(name: str, way: Way, first_s: float, out: Any) -> None:
        way.judge(expected, out)
        way.row["first_s"] = round(first_s, 2)
        found[name] = way
        print(f"{name}: {way.row}", file=sys.stderr, flush=True)

    def ready(name: str, step: Callable[[], Any], before: Callable[[], Any] = lambda: None, steps: int = 3) -> bool:
        start = time.perf_counter()
        try:
            before()
            out = [step() for _ in range(steps)][-1]
            synchronize()
        except Exception as error:  # of the compiler, or of the capture: the way does not run here, others may
            found[name] = Way(step, {"failed": f"{type(error).__name__}: {error}"[:500]})
            print(f"{name}: {found[name].row}", file=sys.stderr, flush=True)
            return False
        add(name, Way(step), time.perf_counter() - start, out)
        return True

    for name, options in {"bitfuse": {}, "bitfuse, CUDA graph": {"cuda_graph": True}}.items():
        if options and not on_gpu:
            continue
        model = seeded.twin(stock)
        handle: list[Any] = []
        accelerate = lambda model=model, options=options, handle=handle: handle.append(  # noqa: E731
            bitfuse.accelerate(model, **options)
        )
        if ready(name, step_of(model), accelerate, steps=4):
            report = handle[0].report()
            found[name].row |= {"fused": report.fused, "seen": report.seen}
    for opaque in (False, True):
        for name, options in compile_options(on_gpu).items():
            if not opaque and name in ("eager", "aot_eager", "reduce-overhead"):
                continue
            model = seeded.twin(stock)
            model = make_opaque(model) if opaque else model
            of = f"{'bitfuse' if opaque else 'stock'}, {name}"
            step = step_of(model)
            if name == "reduce-overhead":
                step = as_new_step(step)
            ran = ready(of, step, lambda model=model, of=of, options=options: compile_blocks(model, of, options))
            if ran and on_gpu and name != "reduce-overhead" and opaque:
                graph: list[Any] = []
                capture = lambda step=step, graph=graph: graph.append(captured(step))  # noqa: E731
                ready(f"{of}, CUDA graph", lambda graph=graph: graph[0](), capture)
    return found


def as_new_step(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step, of which inductor's own CUDA graphs are told where it begins."""

    def begin() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return step()

    return begin


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_by_turns(ways: dict[str, Way], expected: Any, rounds: int, seconds: float) -> None:
    """Each way a turn of some steps on end per round, every other round backwards; the first step of a turn is not
    timed, and the last one's bits are judged."""
    running = [way for way in ways.values() if "failed" not in way.row]
    gc.collect()
    with no_collector():
        for turn in range(rounds):
            for way in running[:: -1 if turn % 2 else 1]:
                way.step()
                synchronize()
                spent = 0.0
                while spent < seconds:
                    start = time.perf_counter()
                    out = way.step()
                    synchronize()
                    way.ms.append(1e3 * (time.perf_counter() - start))
                    spent += way.ms[-1] / 1e3
                way.judge(expected, out)
                del out


@contextlib.contextmanager
def no_collector() -> Any:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def measured(tokens: int | None, layers: int | None, version: str, seed: int, rounds: int, turn: float) -> dict:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    geometry, _ = seeded.geometry_for(device, layers, version, "diffusers")
    if tokens is not None:
        frames, height, width = LATENTS[tokens]
        geometry = replace(geometry, frames=frames, height=height, width=width)
    torch._dynamo.reset()
    NOTED.clear()
    stock = seeded.build(geometry, device, seed)
    inputs = seeded.make_inputs(stock, geometry, device, seed)

    def step_of(model: Any) -> Callable[[], Any]:
        return seeded.one_step(model, inputs)

    step = step_of(stock)
    expected = [step() for _ in range(2)][-1]
    ways = ways_of(stock, step_of, expected, on_gpu)
    ways["stock"].judge(expected, step())
    if on_gpu and rounds:
        time_by_turns(ways, expected, rounds, turn)
    rows = []
    for name, way in ways.items():
        row = {"way": name} | way.row
        if way.ms:
            row |= {"ms": spread(way.ms), "steps": len(way.ms)}
        rows.append(row)
    facts = {"tokens": geometry.video_tokens, "layers": geometry.layers, "version": version, "seed": seed}
    return facts | {"geometry": geometry.sentence, "left": dict(NOTED.get("bitfuse, aot_eager", {})), "ways": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", choices=LATENTS, help="video tokens; default: 1536 and 6144")
    parser.add_argument("--layers", type=int, help="8 by default on a GPU, else 2")
    parser.add_argument("--version", nargs="*", default=["2.0"], choices=seeded.VERSIONS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=0.5, help="seconds of a way's turn in a round")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    tokens: list[Any] = (asked.tokens or [1536, 6144]) if on_gpu else [None]
    layers = asked.layers or (8 if on_gpu else 2)
    torch._dynamo.config.recompile_limit = 64  # every way compiles the same code
    found: dict[str, Any] = {"what": "torch.compile around bitfuse's operators", "machine": machine(), "rows": []}
    with torch.no_grad():
        for version in asked.version:
            for seed in asked.seeds:
                for n in tokens:
                    row = measured(n, layers, version, seed, asked.rounds, asked.turn)
                    found["rows"].append(row)
                    print(json.dumps(row), flush=True)
                    of_bitfuse = [w for w in row["ways"] if w["way"] in ("bitfuse", "bitfuse, CUDA graph")]
                    exact = all(w.get("differing") == 0 for w in of_bitfuse)
                    found["exit_code"] = max(found.get("exit_code", 0), int(not exact))
                    if asked.out:
                        asked.out.parent.mkdir(parents=True, exist_ok=True)
                        asked.out.write_text(json.dumps(found, indent=1) + "\n")
                    gc.collect()
                    if on_gpu:
                        torch.cuda.empty_cache()
    return found["exit_code"]


if __name__ == "__main__":
    sys.exit(main())
