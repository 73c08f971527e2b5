"""ComfyUI's LTX-2 with bitfuse's node and without it, by turns: times, launches, memory, and every bit compared.

    python benchmarks/comfyui.py --out out/comfyui.json                     # LTX-2.0, 48 layers: 100 GB of a card
    python benchmarks/comfyui.py --ltx 2.3 --tokens 6144 --layers 24 --out out/comfyui-2.3.json
    TRITON_INTERPRET=1 python benchmarks/comfyui.py --tiny                   # on the CPU: that it runs

The model is built by ComfyUI's own loader, of random weights that are drawn on the GPU; no checkpoint is needed. A step
is one call of ComfyUI's `apply_model`, with the wrappers of the node as its sampler hands them over. Before anything is
timed, the outputs of each way are compared with stock's, video and audio, bit for bit, and after the last round again;
last ComfyUI's own sampler runs with each. Exit code 1 where a bit differs. What a machine without a network needs is in
benchmarks/carry-comfyui.txt.

With `--kjnodes FILE` (nodes/ltxv_nodes.py of ComfyUI-KJNodes) the forward that its "LTX2 Attention Tuner Patch" gives a
block, with its own Triton kernels, takes turns as well; how many elements it has otherwise than stock is counted.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import torch  # noqa: E402

import bitfuse  # noqa: E402
import comfyui_host as host  # noqa: E402
from bitfuse.hosts.handle import Options  # noqa: E402
from bitfuse.tools import packages  # noqa: E402
from bitfuse.tools.bench import measure  # noqa: E402
from bitfuse.tools.machine import machine  # noqa: E402
from bitfuse.tools.seeded import now  # noqa: E402

LATENTS = {24: (2, 3, 4), 1536: (16, 8, 12), 6144: (16, 16, 24), 24576: (16, 32, 48)}
AUDIO, TEXT, SEED = 126, 1024, 0
WAYS = {"bitfuse": Options(), "graph": Options(cuda_graph=True)}


def step_of(patcher: Any, of: dict[str, Any], tokens: int, device: torch.device) -> Callable[[], tuple[Any, ...]]:
    """One call of the model at its first noise level, as ComfyUI's sampler calls it: both latents, denoised."""
    import comfy.patcher_extension
    import comfy.utils

    frames, height, width = LATENTS[tokens]
    small = of["num_layers"] <= 2 and of["in_channels"] == 16
    latents = host.noise(of, 1, frames, height, width, 7 if small else AUDIO)
    x, shapes = comfy.utils.pack_latents([t.to(device) for t in latents])
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(1, 9 if small else TEXT, host.text_channels(of), generator=generator).to(device, torch.bfloat16)
    level, model = torch.tensor([0.9], device=device), patcher.model
    wrappers = comfy.patcher_extension.copy_nested_dicts(patcher.wrappers)
    options = {**patcher.model_options["transformer_options"], "wrappers": wrappers, "cond_or_uncond": [0]}

    @torch.inference_mode()
    def step() -> tuple[Any, ...]:
        out = model.apply_model(
            *(x, level), c_crossattn=text, transformer_options=dict(options), latent_shapes=shapes, frame_rate=25
        )
        return tuple(comfy.utils.unpack_latents(out, shapes))

    return step


PEER = "KJNodes"
_OF_PEER = """\
import types
from typing import Tuple

import comfy
import comfy.ldm.common_dit
import comfy.ldm.modules.attention as _comfy_attn
import torch
from comfy.ldm.lightricks.model import GuideAttentionMask as _GuideAttentionMask
from comfy.ldm.lightricks.model import _attention_with_guide_mask as _ltx_attn_with_guide_mask
from comfy.ldm.lightricks.model import apply_rotary_emb as _apply_rope

"""


def peer_of(file: Path, folder: str) -> Any:
    """KJNodes' forward of a block as its node makes it, from that part of its file alone: the rest imports more."""
    text = file.read_text()
    part = text[text.index("try:\n    import triton\n") : text.index("class LTX2AttentionTunerPatch")]
    alone = Path(folder) / "kjnodes_ltx2.py"  # a file, since Triton reads a kernel's source
    alone.write_text(_OF_PEER + part)
    spec = importlib.util.spec_from_file_location(alone.stem, alone)
    if spec is None or spec.loader is None:
        raise ImportError(f"{alone} can't be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LTX2ForwardPatch(1.0, 1.0, 1.0, 1.0, use_triton=True)


def by_peer(step: Callable[[], Any], blocks: Any, patch: Any) -> Callable[[], Any]:
    """A step in which every block has the peer's forward; nothing of it stays."""

    def call() -> Any:
        before = [dict(vars(block)) for block in blocks]
        try:
            for block in blocks:
                vars(block)["forward"] = patch.__get__(block, type(block))
            return step()
        finally:
            for block, attributes in zip(blocks, before, strict=True):
                vars(block).clear()
                vars(block).update(attributes)

    return call


def timed(
    patchers: dict[str, Any], of: dict[str, Any], tokens: int, device: torch.device, rounds: int, peer: Any = None
) -> dict:
    on_cuda = device.type == "cuda"
    steps = {way: step_of(patcher, of, tokens, device) for way, patcher in patchers.items()}
    if peer is not None:
        steps[PEER] = by_peer(steps["stock"], patchers["stock"].model.diffusion_model.transformer_blocks, peer)
    row: dict[str, Any] = {"tokens": tokens, "layers": of["num_layers"]}
    first = {}
    for way, step in steps.items():
        start = now(device)
        step()
        first[way] = round(now(device) - start, 3)
    before = measure.reserved() if on_cuda else 0
    steps["graph"]()  # it is captured in the second call of a shape, and replayed from the third on
    row["graph_holds_gb"] = round((measure.reserved() - before) / 1e9, 3) if on_cuda else 0.0
    for _ in range(2):
        outs = {way: step() for way, step in steps.items()}
    again = steps["stock"]()
    row |= {"first_call_s": first, "stock_repeats": bitfuse.compare(outs["stock"], again) is None}
    row["finite"] = all(bool(t.isfinite().all()) for t in outs["stock"])
    row["differs"] = compared(outs)
    ms: dict[str, list[float]] = {way: [] for way in steps}
    peak: dict[str, float] = {}
    for turn in range(rounds):
        for way in sorted(steps, reverse=bool(turn % 2)):
            if on_cuda:
                torch.cuda.reset_peak_memory_stats()
                resting = torch.cuda.memory_allocated()
            start = now(device)
            outs[way] = steps[way]()
            ms[way].append((now(device) - start) * 1e3)
            if on_cuda:
                peak[way] = round((torch.cuda.max_memory_allocated() - resting) / 1e9, 3)
    row["differs"] |= compared(outs)
    row["ms"] = {way: {"median": round(statistics.median(t), 3), "min": round(min(t), 3)} for way, t in ms.items()}
    row["speedup"] = {
        way: round(statistics.median(a / b for a, b in zip(ms["stock"], ms[way], strict=True)), 3) for way in steps
    }
    if peer is not None:
        mismatch = bitfuse.compare(outs["stock"], outs[PEER])
        row["peer_differs"] = "no element" if mismatch is None else mismatch.sentence
    row["peak_gb_of_a_step"] = peak
    return row


def compared(outs: dict[str, Any]) -> dict[str, str]:
    """Ways whose outputs are not stock's, with a sentence each; a peer's need not be."""
    found = {way: bitfuse.compare(outs["stock"], out) for way, out in outs.items() if way != PEER}
    return {way: mismatch.sentence for way, mismatch in found.items() if mismatch is not None}


def kernels(patchers: dict[str, Any], of: dict[str, Any], tokens: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds and launches by class of a step, and the launches of one block: of 8 blocks more or fewer."""
    found: dict[str, Any] = {}
    blocks = patchers["stock"].model.diffusion_model.transformer_blocks
    fewer = max(1, len(blocks) - 8)
    for way in ("stock", "bitfuse"):
        step = step_of(patchers[way], of, tokens, device)
        found[way] = measure.kernel_ms(step)
        whole, kept = by_name(step), list(blocks)
        try:
            del blocks[fewer:]
            part = by_name(step)
        finally:
            blocks.extend(kept[len(blocks) :])
        block = {kind: round((whole[kind] - part[kind]) / (len(kept) - fewer), 2) for kind in whole}
        found[way]["launches_a_block"] = block
    return found


def by_name(step: Callable[[], Any]) -> dict[str, int]:
    """Launches of one step by class."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    found = {"matmul": 0, "attention": 0, "other": 0}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            found[measure.kernel_class(event.name)] += 1
    return found


def sampled(patchers: dict[str, Any], of: dict[str, Any], tokens: int) -> dict[str, str]:
    """Ways whose latents after ComfyUI's own sampler are not stock's: 4 steps, with guidance, image to video too."""
    frames, height, width = LATENTS[tokens]
    found: dict[str, str] = {}
    small = of["in_channels"] == 16
    latents = host.noise(of, 1, frames, height, width, 7 if small else AUDIO)
    for given in (False, True):
        more = {"image_to_video": given, "steps": 4, "text_tokens": 9 if small else 128}
        outs = {way: host.sample(patcher, of, latents, **more) for way, patcher in patchers.items()}
        found |= {f"{way}, image to video: {given}": why for way, why in compared(outs).items()}
    return found


def standing(model: Any) -> dict[str, Any]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


def left_behind(model: Any, before: dict[str, Any]) -> list[str]:
    """Attributes of modules that hold something of bitfuse's, or that stock has not."""
    now = standing(model)
    return [
        f"{module}.{name}"
        for module, attributes in now.items()
        for name, value in attributes.items()
        if type(value).__module__.startswith("bitfuse") or (name in COPIED and name not in before[module])
    ]


COPIED = ("forward", "_process_transformer_blocks", "__getstate__", "_replicate_for_data_parallel")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--comfyui", default="0.30.0", help="version, in a folder comfyui-VERSION")
    parser.add_argument("--ltx", default="2.0", choices=("2.0", "2.3"))
    parser.add_argument("--tokens", type=int, nargs="*", choices=sorted(LATENTS), default=None)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    parser.add_argument("--kjnodes", type=Path, metavar="FILE", help="nodes/ltxv_nodes.py of ComfyUI-KJNodes")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    host.use(asked.comfyui)
    from bitfuse_comfyui import upstream, wrapper

    device = torch.device("cpu" if asked.tiny or not torch.cuda.is_available() else "cuda")
    tiny = device.type == "cpu"
    sizes = host.TINY if tiny else {**host.REAL, "num_layers": asked.layers}
    of = host.config(asked.ltx, sizes)
    start = time.perf_counter()
    stock = host.load(asked.ltx, sizes, device.type)
    gc.collect()
    import comfy.model_management

    if not tiny:
        torch.cuda.empty_cache()
    comfy.model_management.load_models_gpu([stock], force_full_load=True)
    patchers = {"stock": stock, **{way: wrapper.attach(stock, options) for way, options in WAYS.items()}}
    made = machine(device) | {
        "comfyui": upstream.VERSION,
        "comfy_kitchen": packages.version("comfy-kitchen"),
        "backends": {name: one["available"] and not one["disabled"] for name, one in backends(upstream).items()},
        "attention": upstream.attention.optimized_attention.__name__,
        "build_s": round(time.perf_counter() - start, 1),
    }
    found: dict[str, Any] = {"what": "ComfyUI: stock and bitfuse by turns", "ltx": asked.ltx, "machine": made}
    found["rows"] = []

    def save() -> None:
        if asked.out:
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps(found, indent=1) + "\n")

    folder = tempfile.TemporaryDirectory()
    peer = None if asked.kjnodes is None else peer_of(asked.kjnodes, folder.name)
    before = standing(stock.model.diffusion_model)
    for tokens in asked.tokens or ([24] if tiny else [1536, 6144, 24576]):
        rounds = asked.rounds if tokens < 20000 else max(3, asked.rounds // 2)
        row = timed(patchers, of, tokens, device, rounds, peer)
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        save()
        if not tiny:
            try:
                row["kernels"] = kernels(patchers, of, tokens, device)
            except Exception as error:  # of the profiler: the times stand without it
                row["kernels_error"] = f"{type(error).__name__}: {error}"[:300]
        row["graph"] = graphs_of(patchers["graph"].get_attachment(wrapper.KEY))
        for way in WAYS:  # a graph's memory is this size's
            patchers[way].get_attachment(wrapper.KEY).release()
        gc.collect()
        save()
    found["left_behind"] = left_behind(stock.model.diffusion_model, before)
    found["on_and_off_us"] = on_and_off_us(patchers["bitfuse"].get_attachment(wrapper.KEY))
    found["report"] = {way: patchers[way].get_attachment(wrapper.KEY).report().splitlines() for way in WAYS}
    save()
    found["sampler_differs"] = sampled(patchers, of, 24 if tiny else 1536)
    found["left_behind"] += left_behind(stock.model.diffusion_model, before)
    bad = [*found["sampler_differs"].values(), *(why for row in found["rows"] for why in row["differs"].values())]
    found["exit_code"] = int(bool(bad or found["left_behind"]))
    save()
    show(found)
    raise SystemExit(found["exit_code"])


def graphs_of(node: Any) -> list[dict[str, Any]]:
    """What the CUDA graphs of a node did so far, and why forwards ran without one."""
    every = [graph for parked in node.prepared for graph in parked.graphs]
    return [{"captures": g.captures, "replays": g.replays, "reasons": dict(g.reasons)} for g in every]


def on_and_off_us(node: Any) -> float:
    """Microseconds to put the forwards into the model and to take them out again."""
    times = []
    for parked in node.prepared:
        for _ in range(200):
            start = time.perf_counter()
            with parked.standing():
                pass
            times.append((time.perf_counter() - start) * 1e6)
    return round(statistics.median(times), 1)


def backends(upstream: Any) -> dict[str, Any]:
    return upstream.kitchen.list_backends() if upstream.kitchen is not None else {}


def show(found: dict[str, Any]) -> None:
    """A short table, last."""
    print("\n".join(line for way in found["report"] for line in found["report"][way][:1]))
    head = ("tokens", "stock ms", "bitfuse", "graph", "differ", "others a block", "peak GB")
    print(" | ".join(head))
    for row in found["rows"]:
        ms, kinds = row["ms"], row.get("kernels", {})
        others = [str(kinds[way]["launches_a_block"]["other"]) for way in kinds]
        print(
            f"{row['tokens']} | {ms['stock']['median']} | "
            + " | ".join(f"{ms[way]['median']} ({row['speedup'][way]}x)" for way in WAYS)
            + (f" | {PEER} {ms[PEER]['median']}, {row['peer_differs']}" if PEER in ms else "")
            + f" | {row['differs'] or 'none'} | {' to '.join(others)} | {row['peak_gb_of_a_step']}"
        )
    print(f"sampler: {found['sampler_differs'] or 'all bits equal'}; left behind: {found['left_behind'] or 'nothing'}")


if __name__ == "__main__":
    main()
