"""LTX-2.5's diffusion decoder in diffusers: its elementwise chains, a block and a decode, stock and fused by turns.

    python benchmarks/diffusion_decoder.py --out out/diffusion-decoder.json             # some two minutes on an H200
    python benchmarks/diffusion_decoder.py --out out/tiles.json --only tiles            # other tiles of the kernels
    python benchmarks/diffusion_decoder.py --out out/long.json --only decode --size 768x512x25
    TRITON_INTERPRET=1 python benchmarks/diffusion_decoder.py --out out/tiny.json --tiny     # tries the script on a CPU

Random weights at the real size. Every result is compared with stock's in every bit before it is timed, and a decode in
every round. For a decode the host's own FlexAttention processor runs a compiled `flex_attention`, as at these sizes it
must, and each grid's block mask is made once, by a compiled `create_block_mask`, and kept in both runs: neither is
bitfuse's business, and the host's own way of both takes more memory than a card has. Exit code 1 where a bit differs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.attention.flex_attention as flex
from diffusers.models.autoencoders import ltx2_diffusion_decoder as host
from torch import Tensor

import bitfuse
from bitfuse.core.launch import Plan
from bitfuse.ops.grid_rotary_evidence import GridCase
from bitfuse.tools.bench.measure import interleaved, kernel_class, moved, plain_copy
from bitfuse.tools.machine import machine

BF16 = torch.bfloat16
TINY = {
    "decoder_stage_channels": (256, 128, 128, 128, 128),
    "decoder_stage_depths": (1, 1, 1, 1, 2),
    "decoder_stage_kernels": ((1, 2, 2),) * 4,
    "decoder_stage5_kernel": (2, 2, 2),
    "decoder_upsample_channel_reductions": (2, 1, 1, 1),
}
PUBLISHED = {"what": "vLLM-Omni, H200, its pull request 6611: Q/K norm, scale, 3-D rotary; the shape is not said"}
PUBLISHED |= {"stock_ms": 48.57, "fused_ms": 5.057, "ratio": 9.6}


def times(calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int = 10) -> dict[str, float]:
    """Median microseconds of each call, by turns, with a cold L2."""
    if device.type == "cuda":
        return {name: found["median"] for name, found in interleaved(calls, device, rounds).items()}
    found = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        found[name] = (time.perf_counter() - start) * 1e6
    return found


# -- operators ---------------------------------------------------------------------------------------------------------


class Given(torch.nn.Module):
    """In place of a linear layer: it gives what it was made with."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.out


def stock_projection(case: GridCase, args: tuple[Any, ...]) -> Callable[[], tuple[Tensor, Tensor]]:
    """The host's own `project_qkv` on these queries and keys, but for its linear layers. It computes its tables."""
    q, k, q_weight, k_weight, *_ = args
    attn = host.LTX2VideoVaeNeighborhoodAttention(q.shape[-1], (1, 1, 1), case.head_dim).to(q.device, BF16)
    attn.norm_q.weight.data, attn.norm_k.weight.data = q_weight, k_weight
    grid = (q.shape[0], case.frames, case.lines, case.columns, q.shape[-1])
    attn.to_q, attn.to_k, attn.to_v = Given(q.view(grid)), Given(k.view(grid)), Given(q.view(grid))
    hidden = q.view(grid)

    def run() -> tuple[Tensor, Tensor]:
        query, key, _ = attn.project_qkv(hidden)
        return query.view(q.shape), key.view(k.shape)

    return run


def grid_arguments(case: GridCase, device: torch.device) -> tuple[Any, ...]:
    """The case's arguments with the host's own tables."""
    from bitfuse.hosts.diffusers_diffusion_decoder import _tables

    args = case.arguments(device)
    rope = host.LTX2VideoVaeRotaryPosEmbed3D(case.head_dim)
    return (*args[:4], *_tables(rope, (case.frames, case.lines, case.columns), device), *args[10:])


def operator_calls(tiny: bool, device: torch.device) -> Iterator[tuple[Any, str, tuple[Any, ...], Callable[[], Any]]]:
    """(operator, case, arguments, stock) of what a decode calls most."""
    rotary, norm, swiglu = (
        bitfuse.OPERATORS[name] for name in ("qk_rms_norm_grid_rotary", "residual_rms_norm_modulate_weighted", "swiglu")
    )
    found = {operator: {case.name: case for case in operator.cases} for operator in (rotary, norm, swiglu)}
    grids = [found[rotary]["stage 5, 768x512x121"], found[rotary]["stage 4, 768x512x121"]]
    grids.insert(1, replace(grids[0], name="stage 5, 960x544x121", lines=136, columns=240))
    for case in grids:
        args = grid_arguments(case.of(24) if tiny else case, device)
        yield rotary, case.name, args, stock_projection(case.of(24) if tiny else case, args)
    for operator, names in (
        (norm, ("stage 5, a block's first norm", "stage 4", "stage 2", "stage 1")),
        (swiglu, ("a tile of stage 5", "a tile of stages 3 and 4", "stage 1, 768x512x121")),
    ):
        for name in names:
            args = found[operator][name].arguments(device, tokens=24 if tiny else None)
            yield operator, name, args, functools.partial(operator.reference, *args)


def operators(tiny: bool, device: torch.device) -> Iterator[dict[str, Any]]:
    for operator, name, args, stock in operator_calls(tiny, device):
        route = operator.route(*args)
        fused = functools.partial(route.run, *args)
        expected, result = stock(), fused()
        mismatch = bitfuse.compare(expected, result)
        row: dict[str, Any] = {"operator": operator.name, "case": name, "tier": route.tier, "reason": route.reason}
        row |= {"equal": mismatch is None, "mismatch": mismatch.sentence if mismatch else None}
        if mismatch is None and route.fused:
            size = moved(args, result)
            del expected, result
            found = times({"stock": stock, "fused": fused, "copy": plain_copy(size, device)}, device)
            row |= {f"{way}_us": us for way, us in found.items()} | {"bytes": size}
            row |= {"gb_per_s": size / found["fused"] / 1e3, "of_copy": found["copy"] / found["fused"]}
            row["ratio"] = found["stock"] / found["fused"]
        yield row
        del args, stock, fused
        empty(device)


def tiles(tiny: bool, device: torch.device) -> Iterator[dict[str, Any]]:
    """Other tiles and numbers of warps of each kernel: microseconds, bits compared. For a decision, no README."""
    sizes = {"ROWS": (4, 8, 16, 32, 64, 128), "BLOCK": (1024, 2048, 4096, 8192)}
    done = set()
    for operator, name, args, stock in operator_calls(tiny, device):
        if operator in done:
            continue
        done.add(operator)
        expected, plan = stock(), operator.plan(*args)
        constant = "ROWS" if "ROWS" in plan.constants else "BLOCK"
        calls: dict[str, Any] = {}
        for size in sizes[constant]:
            for warps in (1, 2, 4, 8):
                elements = size * plan.constants.get("WIDTH", 1)
                if not 8 <= elements // (32 * warps) <= 64:
                    continue
                call, outs = launch(plan, args, constant, size, warps)
                call()
                mismatch = bitfuse.compare(expected, outs if len(outs) > 1 else outs[0])
                way = f"{constant} {size}, {warps} warps"
                if mismatch is None:
                    calls[way] = call
                else:
                    yield {"operator": operator.name, "case": name, "way": way, "equal": False}
        own = f"{constant} {plan.constants[constant]}, {plan.num_warps} warps"
        for way, us in times(calls, device, 7).items():
            yield {"operator": operator.name, "case": name, "way": way, "us": us, "own": way == own, "equal": True}
        empty(device)


def launch(
    plan: Plan, args: tuple[Any, ...], constant: str, size: int, warps: int
) -> tuple[Callable[[], Any], tuple[Tensor, ...]]:
    programs = -(-plan.grid[0] * plan.constants[constant] // size)
    plan = replace(plan, grid=(programs, 1, 1), constants={**plan.constants, constant: size}, num_warps=warps)
    outs = plan.empty(args[0].device)
    run = plan.bind(args, outs)
    return lambda: run(*args, *outs), outs[len(plan.witnesses) :]


# -- a block without its attention -------------------------------------------------------------------------------------


class NoAttention:
    """A processor that hands on the values: what a block does besides its attention."""

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: Any = None) -> Tensor:
        _, _, value = attn.project_qkv(hidden_states)
        return attn.to_out[0](value.reshape(hidden_states.shape))


def model(tiny: bool, device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        found = host.LTX2VideoDiffusionDecoderModel(**(TINY | {"decoder_head_dim": 64} if tiny else {}))
    found = found.to(BF16).eval().requires_grad_(False)
    for name, parameter in found.named_parameters():  # norms and tables start as ones and zeros, which hide much
        if parameter.ndim == 1 or name.endswith("scale_shift_table"):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found


def block(decoder: Any, tiny: bool, device: torch.device) -> dict[str, Any]:
    """A block of stage 5 at 768x512x121: stock, fused, and its linear layers alone."""
    stock = copy.deepcopy(decoder)
    for attn in (m for m in stock.modules() if isinstance(m, host.LTX2VideoVaeNeighborhoodAttention)):
        attn.set_processor(NoAttention())
    ours = copy.deepcopy(stock)
    grid = (1, 2, 3, 4) if tiny else (1, 121, 128, 192)
    of = stock.decoder.diff_blocks[0]
    width = of.norm1.weight.numel()
    x, context = (torch.randn(*grid, width, device=device, dtype=BF16) for _ in range(2))
    modulation = torch.randn(1, 7 * width, device=device, dtype=BF16).mul_(0.3).chunk(7, dim=-1)
    modulation = tuple(chunk[:, None, None, None, :] for chunk in modulation)

    def linears() -> None:
        of.context_proj(context)
        for layer in (of.attn.to_q, of.attn.to_k, of.attn.to_v, of.attn.to_out[0]):
            layer(x)
        flat = x.flatten(1, 3)
        for start in range(0, flat.shape[1], host._SWIGLU_TILE_SIZE):
            tile = flat[:, start : start + host._SWIGLU_TILE_SIZE]
            of.mlp.w_up(tile)
            of.mlp.w_down(of.mlp.w_gate(tile))

    with bitfuse.accelerated(ours) as handle:
        fused = functools.partial(ours.decoder.diff_blocks[0], x, context, modulation, None)
        plain = functools.partial(of, x, context, modulation, None)
        mismatch = bitfuse.compare(plain(), fused())
        row: dict[str, Any] = {"tokens": x.shape[1:4].numel(), "equal": mismatch is None}
        row["peak_gb"] = {"stock": peak(plain, device), "fused": peak(fused, device)}
        found = times({"stock": plain, "fused": fused, "linears": linears}, device)
        called = [site for site in handle.sites if site.state != "not called yet"]
        row["reasons"] = {site.name: site.reasons for site in called if site.state != "fused"}
    row["ms"] = {way: us / 1e3 for way, us in found.items()}
    elementwise = {way: row["ms"][way] - row["ms"]["linears"] for way in ("stock", "fused")}
    return row | {"elementwise_ms": elementwise, "elementwise_ratio": elementwise["stock"] / elementwise["fused"]}


def peak(step: Callable[[], Any], device: torch.device) -> float:
    """GB beyond what was there before."""
    if device.type != "cuda":
        step()
        return 0.0
    from bitfuse.tools.bench.measure import with_peak

    return with_peak(step)[1] / 1e9


def empty(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- a decode ----------------------------------------------------------------------------------------------------------


def compile_attention() -> dict[str, float]:
    """A compiled `flex_attention` for the host's processor; each block mask compiled, made once, and kept.

    The seconds that masks took, by their grids.
    """
    torch._dynamo.config.recompile_limit = 64
    flex.flex_attention = torch.compile(flex.flex_attention, dynamic=False)
    own, make, kept, seconds = flex.create_block_mask, torch.compile(flex.create_block_mask, dynamic=False), {}, {}
    build = host._neighborhood_block_mask

    def once(*key: Any) -> Any:
        if key not in kept:
            start = time.perf_counter()
            flex.create_block_mask = make
            try:
                kept[key] = build(*key)
            except Exception as error:  # of the compiler: the host's own way takes memory, and may do at small sizes
                print(f"mask of {key[:3]} not compiled: {str(error)[:200]}", flush=True)
                flex.create_block_mask = own
                kept[key] = build(*key)
            finally:
                flex.create_block_mask = own
            torch.cuda.synchronize()
            seconds["x".join(map(str, key[:3]))] = time.perf_counter() - start
        return kept[key]

    host._neighborhood_block_mask = once
    return seconds


def decode(decoder: Any, size: str, asked: argparse.Namespace, device: torch.device, masks: Any) -> dict[str, Any]:
    width, height, frames = map(int, size.split("x"))
    shape = (2, 2, 2) if asked.tiny else ((frames - 1) // 8 + 1, height // 32, width // 32)
    z = torch.randn(1, 128, *shape, device=device, dtype=BF16)
    ours = copy.deepcopy(decoder)

    def run(which: Any) -> Tensor:
        generator = torch.Generator(device).manual_seed(1)
        return which.decode(z, generator=generator, return_dict=False)[0]

    def seconds(which: Any) -> tuple[float, Tensor]:
        synchronize(device)
        start = time.perf_counter()
        out = run(which)
        synchronize(device)
        return time.perf_counter() - start, out

    row: dict[str, Any] = {"size": size, "latent": list(z.shape)}
    row["first_stock_s"], _ = seconds(decoder)  # with the attention's compilation
    second, expected = seconds(decoder)
    row["masks_s"] = dict(masks)
    with bitfuse.accelerated(ours) as handle:
        row["first_fused_s"], found = seconds(ours)
        row |= {
            "second_stock_s": second,
            "equal": [bitfuse.compare(expected, found) is None],
            "frames": list(found.shape),
        }
        samples: dict[str, list[float]] = {"stock": [], "fused": []}
        for turn in range(asked.rounds):
            ways = [("stock", decoder), ("fused", ours)]
            for way, which in ways[:: 1 if turn % 2 else -1]:
                took, found = seconds(which)
                samples[way].append(took)
                row["equal"].append(bitfuse.compare(expected, found) is None)
        del found
        row["peak_gb"] = {
            way: peak(functools.partial(run, m), device) for way, m in (("stock", decoder), ("fused", ours))
        }
        if device.type == "cuda":
            row["kernels_ms"] = {way: kernels(lambda m=m: run(m)) for way, m in (("stock", decoder), ("fused", ours))}
        report = handle.report()
        row["sites"] = {"fused": report.fused, "seen": report.seen, "text": str(report)}
    row["s"] = {way: statistics.median(found) for way, found in samples.items()} | {"samples": samples}
    row["ratio"] = row["s"]["stock"] / row["s"]["fused"]
    if "kernels_ms" in row:
        other = {way: found["other"] for way, found in row["kernels_ms"].items()}
        row["elementwise_ratio"] = other["stock"] / other["fused"]
    return row


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def kernels(step: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of one step's kernels by class, and the longest of the class "other" by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    found: dict[str, float] = {"matmul": 0.0, "attention": 0.0, "other": 0.0}
    named: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        ms, kind = (event.time_range.end - event.time_range.start) / 1e3, kernel_class(event.name)
        found[kind] += ms
        if kind == "other":
            named[event.name] = named.get(event.name, 0.0) + ms
    longest = dict(sorted(named.items(), key=lambda item: -item[1])[:25])
    return {name: round(ms, 3) for name, ms in found.items()} | {"longest": longest}


# -- the table ---------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> Iterator[str]:
    """Less than 80 columns wide."""
    if found.get("operators"):
        yield f"{'operator':30}{'case':22}{'us':>8}{'ratio':>7}{'GB/s':>6}{'copy':>5}"
    for row in found.get("operators", ()):
        name = f"{row['operator'][:29]:30}{row['case'][:21]:22}"
        if "ratio" in row:
            yield name + f"{row['fused_us']:8.0f}{row['ratio']:6.1f}x{row['gb_per_s']:6.0f}{row['of_copy']:5.0%}"
        else:
            yield name + (row["mismatch"] or row["reason"] or "")[:26]
    fastest: dict[str, list[Any]] = {}
    for row in found.get("tiles", ()):
        fastest.setdefault(row["operator"], []).append(row)
    for operator, rows in fastest.items():
        wrong = [row["way"] for row in rows if not row["equal"]]
        yield f"{operator}, {rows[0]['case']}"[:78] + (f": DIFFERS {wrong}" if wrong else "")
        for row in sorted((row for row in rows if row["equal"]), key=lambda row: row["us"])[:6]:
            yield f"    {row['way']:28}{row['us']:9.0f} us{'   (own)' if row['own'] else ''}"
    if row := found.get("block"):
        ms, less = row["ms"], row["elementwise_ms"]
        yield f"a block of {row['tokens']} tokens without its attention: bits {'equal' if row['equal'] else 'DIFFER'}"
        yield f"    stock {ms['stock']:.1f}, fused {ms['fused']:.1f}, linear layers {ms['linears']:.1f} ms"
        yield f"    elementwise {less['stock']:.1f} to {less['fused']:.1f} ms: {row['elementwise_ratio']:.2f}x"
        yield f"    peak {row['peak_gb']['stock']:.2f} to {row['peak_gb']['fused']:.2f} GB"
    for row in found.get("decodes", ()):
        bits = f"{sum(row['equal'])} of {len(row['equal'])} equal"
        yield f"decode {row['size']}: {row['s']['stock']:.3f} to {row['s']['fused']:.3f} s, {row['ratio']:.2f}x; {bits}"
        took, first = row["peak_gb"], row["first_fused_s"]
        yield f"    peak {took['stock']:.2f} to {took['fused']:.2f} GB; the first fused one {first:.1f} s"
        yield f"    sites fused: {row['sites']['fused']} of {row['sites']['seen']}"
        for way, ms in row.get("kernels_ms", {}).items():
            yield (
                f"    {way}: "
                + ", ".join(f"{kind} {ms[kind]:.0f}" for kind in ("attention", "matmul", "other"))
                + " ms"
            )
        if "elementwise_ratio" in row:
            yield f"    neither matmul nor attention: {row['elementwise_ratio']:.2f}x"
    for part, error in found["errors"].items():
        yield f"{part} FAILED: {error}"[:78]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("operators", "tiles", "block", "decode"), action="append")
    parser.add_argument("--size", action="append", help="WIDTHxHEIGHTxFRAMES of a decode; default 512x384x25")
    parser.add_argument("--rounds", type=int, default=4, help="decodes of each way that are timed")
    parser.add_argument("--tiny", action="store_true", help="try the script on few tokens, on any device")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wrong := [size for size in asked.size or () if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", size)]:
        parser.error(f"--size {wrong[0]!r}; accepted: width x height x frames, as 512x384x25")
    if device.type == "cpu" and not asked.tiny:
        parser.error("there is no CUDA device; accepted without one: --tiny, with TRITON_INTERPRET=1")
    parts = asked.only or ["operators", "block", "decode"]
    found: dict[str, Any] = {
        "what": "LTX-2.5's diffusion decoder, stock and fused by turns",
        "machine": machine(device),
    }
    found |= {"published": PUBLISHED, "errors": {}}

    def keep() -> None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=1, default=str))

    def part(name: str, run: Callable[[], Any]) -> None:
        """Run it; what fails leaves the others their results."""
        start = time.perf_counter()
        try:
            run()
        except Exception as error:
            found["errors"][name] = f"{type(error).__name__}: {error}"
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        empty(device)
        keep()

    def rows(name: str, made: Iterator[dict[str, Any]]) -> Callable[[], None]:
        def run() -> None:
            for row in made:
                found.setdefault(name, []).append(row)
                keep()

        return run

    with torch.no_grad():
        if "operators" in parts:
            part("operators", rows("operators", operators(asked.tiny, device)))
        if "tiles" in parts:
            part("tiles", rows("tiles", tiles(asked.tiny, device)))
        decoder = model(asked.tiny, device) if {"block", "decode"} & set(parts) else None
        if "block" in parts:
            part("block", lambda: found.update(block=block(decoder, asked.tiny, device)))
        if "decode" in parts:
            masks = compile_attention() if device.type == "cuda" else {}
            sizes = asked.size or ["512x384x25"]
            part("decode", rows("decodes", (decode(decoder, size, asked, device, masks) for size in sizes)))
    equal = [row["equal"] for name in ("operators", "tiles") for row in found.get(name, ())]
    equal += [found["block"]["equal"]] if "block" in found else []
    equal += [all(row["equal"]) for row in found.get("decodes", ())]
    found["exit_code"] = 2 if found["errors"] else 0 if all(equal) else 1
    keep()
    print("\n".join(table(found)))
    raise SystemExit(found["exit_code"])


if __name__ == "__main__":
    main()
