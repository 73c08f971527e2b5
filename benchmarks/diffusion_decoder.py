"""LTX-2.5's diffusion decoder in diffusers: its elementwise chains, a block and a decode, stock and fused by turns.

    python benchmarks/diffusion_decoder.py --out out/diffusion-decoder.json             # some two minutes on an H200
    python benchmarks/diffusion_decoder.py --out out/tiles.json --only tiles            # other tiles of the kernels
    python benchmarks/diffusion_decoder.py --out out/long.json --only decode --size 768x512x25
    TRITON_INTERPRET=1 python benchmarks/diffusion_decoder.py --out out/tiny.json --tiny     # tries the script on a CPU

Random weights at the real size. Every result is compared with stock's in every bit before it is timed, and a decode in
every round. Exit code 1 where a bit differs.

For a decode the host's own FlexAttention processor runs a compiled `flex_attention`, as at these sizes it must, with
the host's own mask function. What is replaced, in both runs, is how the mask's lists of blocks are made, which is none
of bitfuse's business: the host looks at every pair of tokens, which takes more memory than a card has, and compiled it
takes longer to start than all else. Here they are counted from the windows, once for each grid: the same lists, and at
grids of up to 4,096 tokens each run compares them with the host's own.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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


def stages(latent: Sequence[int], tiny: bool) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The grid of tokens and the window of each stage, for latents of so many frames, lines and columns."""
    parameters = inspect.signature(host.LTX2VideoDiffusionDecoderModel).parameters
    setting = {name: parameter.default for name, parameter in parameters.items()} | (TINY if tiny else {})
    windows = [*setting["decoder_stage_kernels"], setting["decoder_stage5_kernel"]]
    frames, lines, columns = latent
    repeated = windows[0][0] // 2 * 2  # the host repeats the last frame and crops it before the last stage
    frames += repeated
    grids = [(frames, lines, columns)]
    for along_t, along_h, along_w in setting["decoder_upsample_strides"]:
        frames, lines, columns = frames * along_t - (along_t == 2), lines * along_h, columns * along_w
        grids.append((frames, lines, columns))
    grids[-1] = (frames - repeated * setting["temporal_compression_ratio"], lines, columns)
    return list(zip(grids, windows, strict=True))


def latent_of(size: str) -> tuple[int, int, int]:
    width, height, frames = map(int, size.split("x"))
    return (frames - 1) // 8 + 1, height // 32, width // 32


def why_refused(size: str) -> str | None:
    """What is wrong with a size of a decode, and what is accepted."""
    accepted = "accepted: width x height x frames, as 512x384x25; multiples of 32 from 224, and 8 n + 1 frames from 17"
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", size):
        return accepted
    width, height, frames = map(int, size.split("x"))
    if width % 32 or height % 32 or frames % 8 != 1:
        return accepted
    for number, (grid, window) in enumerate(stages(latent_of(size), tiny=False), 1):
        if any(places < wide for places, wide in zip(grid, window, strict=True)):
            return f"stage {number} has a grid of {grid} tokens, and the host's window there is {window}; {accepted}"
    return None


BLOCK = 128  # tokens of a block on either side, as `create_block_mask` has it
LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
LISTS += ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


def block_mask(grid: Sequence[int], window: Sequence[int], mask_mod: Callable[..., Any], device: torch.device) -> Any:
    """What `create_block_mask` gives for the host's `mask_mod`, without a look at every pair of tokens.

    A query sees one run of keys in each line of its window. A run is shorter than a block, so it lies in one block or
    in two: each adds its keys to the number of pairs that its block of queries has with that block of keys.
    """
    window = [min(wide, places) for wide, places in zip(window, grid, strict=True)]
    frames, lines, columns = grid
    if window[2] > BLOCK:
        raise ValueError(f"a window of {window[2]} columns; accepted: up to {BLOCK}")
    tokens = frames * lines * columns
    blocks = -(-tokens // BLOCK)
    query = torch.arange(tokens, device=device)
    places = (query // (lines * columns), query // columns % lines, query % columns)
    first_frame, first_line, first_column = (
        (place - wide // 2).clamp(0, length - wide) for place, wide, length in zip(places, window, grid, strict=True)
    )
    pairs = torch.zeros(blocks * blocks, dtype=torch.int32, device=device)
    row = query // BLOCK * blocks
    for frame in range(window[0]):
        for line in range(window[1]):
            start = ((first_frame + frame) * lines + first_line + line) * columns + first_column
            before = (BLOCK - start % BLOCK).clamp(max=window[2]).int()  # keys before the next block begins
            pairs.index_add_(0, row + start // BLOCK, before)
            pairs.index_add_(0, row + (start + window[2] - 1) // BLOCK, window[2] - before)
    pairs = pairs.view(1, 1, blocks, blocks)
    whole = pairs == BLOCK * BLOCK
    lists = []
    for seen in ((pairs > 0) & ~whole, whole):
        lists += [seen.sum(-1).int(), seen.int().argsort(dim=-1, descending=True, stable=True).int()]
    return flex.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(tokens, tokens))


def prepare_attention(device: torch.device) -> list[dict[str, Any]]:
    """A compiled `flex_attention` for the host's processor, and its masks by `block_mask`, made once and kept.

    What each grid's mask and each shape's first attention took: the list grows with every new one, and each is said at
    once, so that a run that is cut short tells where it stood. On a CPU the attention is not compiled, which would take
    twenty seconds for each grid.
    """
    steps: list[dict[str, Any]] = []
    shapes: set[tuple[int, ...]] = set()
    own_mask, build, attention = flex.create_block_mask, host._neighborhood_block_mask, flex.flex_attention
    if device.type == "cuda":
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        dynamo.recompile_limit = 64  # a kernel for each grid
        inductor.compile_threads = 1  # one kernel at a time needs no pool of workers
        attention = torch.compile(attention, dynamic=False)

    def done(start: float, **what: Any) -> None:
        synchronize(device)
        steps.append(what | {"s": time.perf_counter() - start})
        print("    " + ", ".join(f"{name} {value}" for name, value in what.items()), end=": ")
        print(f"{steps[-1]['s']:.2f} s", flush=True)

    @functools.cache
    def mask(frames: int, lines: int, columns: int, window: tuple[int, ...], where: torch.device) -> Any:
        start = time.perf_counter()
        grid = (frames, lines, columns)
        try:
            flex.create_block_mask = lambda mask_mod, **_: block_mask(grid, window, mask_mod, where)
            found = build(*grid, window, where)
        finally:
            flex.create_block_mask = own_mask
        tokens, seen = found.seq_lengths[0], int(found.kv_num_blocks.sum() + found.full_kv_num_blocks.sum())
        if compared := tokens <= 4096:
            expected = build(*grid, window, where)
            wrong = [name for name in LISTS if not torch.equal(getattr(found, name), getattr(expected, name))]
            if wrong:
                raise AssertionError(f"a mask of {grid} tokens is not the host's: {wrong}")
        done(start, mask=grid, window=window, tokens=tokens, pairs_of_blocks=seen, compared=compared)
        return found

    def attend(query: Tensor, **options: Any) -> Any:
        start, shape = time.perf_counter(), tuple(query.shape)
        found = attention(query, **options)
        if shape not in shapes:
            shapes.add(shape)
            done(start, first_attention=shape)
        return found

    host._neighborhood_block_mask = mask
    flex.flex_attention = attend
    return steps


def decode(decoder: Any, size: str, asked: argparse.Namespace, device: torch.device, steps: Any) -> dict[str, Any]:
    shape, size = ((2, 2, 2), "64x64x9") if asked.tiny else (latent_of(size), size)
    z = torch.randn(1, 128, *shape, device=device, dtype=BF16)
    ours = copy.deepcopy(decoder)

    def run(which: Any) -> Tensor:
        generator = torch.Generator(device).manual_seed(1)
        return which.decode(z, generator=generator, return_dict=False)[0]

    print(f"decode {size}, latents {list(z.shape)}", flush=True)
    row: dict[str, Any] = {"size": size, "latent": list(z.shape), "equal": []}
    before, start = len(steps), time.perf_counter()
    expected = run(decoder)
    synchronize(device)
    row |= {"first_stock_s": time.perf_counter() - start, "steps": steps[before:], "frames": list(expected.shape)}
    print(f"  the first of stock, with what it compiles: {row['first_stock_s']:.1f} s", flush=True)

    def seconds(which: Any, said: str) -> float:
        """Of a decode, which is compared with the first of stock."""
        start = time.perf_counter()
        out = run(which)
        synchronize(device)
        took = time.perf_counter() - start
        row["equal"].append(bitfuse.compare(expected, out) is None)
        result = f"bits equal, {took:.3f} s" if row["equal"][-1] else "bits DIFFER"
        print(f"  {said}: {result}; {asked.left():.0f} s left", flush=True)
        return took

    row["second_stock_s"] = seconds(decoder, "the second of stock")
    with bitfuse.accelerated(ours) as handle:
        row["first_fused_s"] = seconds(ours, "the first fused")
        samples: dict[str, list[float]] = {"stock": [], "fused": []}
        for turn in range(asked.rounds):
            if turn and asked.left() <= 0:
                break
            ways = [("stock", decoder), ("fused", ours)]
            for way, which in ways[:: 1 if turn % 2 else -1]:
                samples[way].append(seconds(which, f"round {turn + 1}, {way}"))
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


def decodes(decoder: Any, asked: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    steps = prepare_attention(device)
    for size in asked.size or ["512x384x25"]:
        if asked.left() <= 0:
            print(f"decode {size}: not begun, the time is up", flush=True)
            return
        yield decode(decoder, size, asked, device, steps)
        empty(device)


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
        yield from _peak(row)
    for row in found.get("decodes", ()):
        bits = f"{sum(row['equal'])} of {len(row['equal'])} equal"
        yield f"decode {row['size']}: {row['s']['stock']:.3f} to {row['s']['fused']:.3f} s, {row['ratio']:.2f}x; {bits}"
        yield f"    the first fused one {row['first_fused_s']:.1f} s"
        yield from _peak(row)
        yield f"    sites fused: {row['sites']['fused']} of {row['sites']['seen']}"
        for way, ms in row.get("kernels_ms", {}).items():
            yield (
                f"    {way}: "
                + ", ".join(f"{kind} {ms[kind]:.0f}" for kind in ("attention", "matmul", "other"))
                + " ms"
            )
        if "elementwise_ratio" in row:
            yield f"    neither matmul nor attention: {row['elementwise_ratio']:.2f}x"
    if found["machine"]["device_type"] == "cpu":
        yield "A dry run in Triton's interpreter: the bits are meaningful, the times are not."
    for part, error in found["errors"].items():
        yield f"{part} FAILED: {error}"[:78]


def _peak(row: dict[str, Any]) -> Iterator[str]:
    if row["peak_gb"]["stock"]:  # else on a CPU, where none is counted
        yield f"    peak {row['peak_gb']['stock']:.2f} to {row['peak_gb']['fused']:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("operators", "tiles", "block", "decode"), action="append")
    parser.add_argument(
        "--size", action="append", help="WIDTHxHEIGHTxFRAMES of a decode, at least 224x224x17; default 512x384x25"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no decode of a size after so many")
    parser.add_argument("--rounds", type=int, default=4, help="decodes of each way that are timed")
    parser.add_argument("--tiny", action="store_true", help="try the script on few tokens, on any device")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    asked.left = lambda: started + asked.seconds - time.perf_counter()
    for size in asked.size or ():
        if why := why_refused(size):
            parser.error(f"--size {size!r}: {why}")
    if asked.rounds < 1:
        parser.error(f"--rounds {asked.rounds}; accepted: 1 or more")
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
            part("decode", rows("decodes", decodes(decoder, asked, device)))
    equal = [row["equal"] for name in ("operators", "tiles") for row in found.get(name, ())]
    equal += [found["block"]["equal"]] if "block" in found else []
    equal += [all(row["equal"]) for row in found.get("decodes", ())]
    found["exit_code"] = 2 if found["errors"] else 0 if all(equal) else 1
    keep()
    print("\n".join(table(found)))
    raise SystemExit(found["exit_code"])


if __name__ == "__main__":
    main()
