"""Fill the tables of README and of the pages in docs from the JSON in benchmarks: nobody types a number.

A table stands between `<!-- NAME -->` and `<!-- end -->`, NAME being one of `TABLES`. Run `make readme`;
`tests/test_readme.py` fails while a page and the JSON part.
"""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMPATIBILITY = ROOT / "benchmarks" / "compatibility.json"
STACKING = ROOT / "benchmarks" / "stacking.json"
COMPILED = ROOT / "benchmarks" / "compiled.json"
ROUNDINGS = ROOT / "benchmarks" / "roundings.json"
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("bench", "decode", "exactness", "hosts", "linear", "stacking")))
SHOWN = ([1, 6144, 4096], [1, 24576, 4096], [1, 6144, 2048], [1, 126, 2048])  # the others are in the JSON


def rotary(document: dict[str, Any]) -> str:
    """The newest rotary benchmark as the README's table and the sentences under it."""
    machine = document["machine"]
    lines = [
        "| rotary embedding, x in bf16 | fused | of a plain copy's speed | PyTorch chain | speed-up |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in document["operators"]:
        if row["x"] not in SHOWN or not row["operator"].startswith("split_rotary"):
            continue
        chain = "bf16 tables" if row["operator"] == "split_rotary_per_op" else "fp32 tables"
        us = row["us"]
        lines.append(
            f"| {row['x']}, {chain} | {us['fused']['median']:.1f} us | {row['of_copy']:.0%} | "
            f"{us['eager']['median']:.1f} us | {row['speed_up']:.1f}x |"
        )
    lines += ["", "| a whole step of diffusers' LTX-2 transformer | stock | bitfuse | speed-up |"]
    lines += ["| --- | --- | --- | --- |"]
    for row in document["model"]:
        stock, fused = (_spread(row["ms"][way]) for way in ("stock", "bitfuse"))
        lines.append(
            f"| {row['tokens']} video tokens, {row['layers']} layers, output identical in every bit | "
            f"{stock} | {fused} | {row['speed_up']:.2f}x |"
        )
    overhead = document["overhead"][0]
    us = overhead["us"]
    lines += [
        "",
        f"{_machine(machine)}; medians (10th to 90th "
        f"percentile), cold L2, bits compared first in the same "
        f"run ([JSON with spreads]({document['path']})). On the CPU a routed call takes "
        f"{us['routed call']['median']:.0f} us, a bare Triton launch with its allocation "
        f"{us['allocation and bare Triton launch']['median']:.0f} us, the PyTorch chain "
        f"{us['eager chain']['median']:.0f} us.",
    ]
    return "\n".join(lines)


def operators(documents: list[dict[str, Any]]) -> str:
    """Every operator that was timed: a row each, a column for each shape of its first argument."""
    shapes = ([1, 6144, 4096], [1, 6144, 2048], [1, 24576, 4096])
    found: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {}
    for row in _rows(documents, "operators"):
        # of several cases of one shape the first: one AdaLN row for all tokens, as in text to video
        found.setdefault(row["operator"], {}).setdefault(_flat(row["x"]), row)
    lines = [
        "| operator | " + " | ".join(f"{tokens} x {width}" for _, tokens, width in shapes) + " |",
        "| --- |" + " --- |" * len(shapes),
    ]
    for name, rows in found.items():
        cells = [_operator_cell(rows.get(tuple(shape))) for shape in shapes]
        if any(cells):
            lines.append(f"| `{name}` | {' | '.join(cell or '-' for cell in cells)} |")
    lines += [
        "",
        f"Time, speed against a plain copy that moves the same bytes, speed-up over the PyTorch chain; cold L2, "
        f"medians, bits compared first in the same run. {_sources(documents)}",
    ]
    return "\n".join(lines)


def _flat(shape: list[int]) -> tuple[int, ...]:
    """[B, T, H, D] as [B, T, H * D]."""
    batch, tokens, *width = shape
    return batch, tokens, math.prod(width)


def _operator_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "us" not in row:
        return "not timed"
    return f"{row['us']['fused']['median']:.0f} us, {row['of_copy']:.0%}, {row['speed_up']:.1f}x"


def model(documents: list[dict[str, Any]], version: str = "2.0") -> str:
    """A whole step of diffusers' transformer of that version: a row for each number of video tokens."""
    wanted = ("diffusers", version, False)

    def of_it(row: dict[str, Any]) -> bool:
        return (_host(row), row["version"], row.get("image_to_video", False)) == wanted

    parts = ("model", "first_step", "audit")
    documents = [d for d in documents if any(of_it(row) for part in parts for row in d.get(part, ()))]
    rows = [row for row in _rows(documents, "model") if of_it(row)]
    if not rows or len({row["tokens"] for row in rows}) < len(rows):
        raise ValueError(f"LTX-{version}: one row for each number of tokens, not {[row['tokens'] for row in rows]}")
    lines = [
        "| video tokens | stock | bitfuse | text kept | CUDA graph | compiled, CUDA graph | bitfuse over that "
        "| peak memory | output |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows.sort(key=lambda row: row["tokens"])
    for row in rows:
        ms = row["ms"]
        yardstick = f"{ms['compiled + graph']['median']:.0f} ms" if "compiled + graph" in ms else "not timed"
        over = f"{row['against_compiled_graph']:.2f}x" if "against_compiled_graph" in row else "-"
        speed_ups = [_way_cell(row, way) for way in ("bitfuse", "text kept", "graph")]
        peak = row["peak_gb"]
        memory = ", ".join(f"{peak[way] / peak['stock'] - 1:+.0%}" for way in ("bitfuse", "graph"))
        lines.append(
            f"| {row['tokens']} | {ms['stock']['median']:.0f} ms | {' | '.join(speed_ups)} | {yardstick} | {over} | "
            f"{peak['stock']:.1f} GB, {memory} | {row['mismatch'] or 'identical in every bit'} |"
        )
    lines += ["", _under_the_model(rows, documents, version)]
    return "\n".join(lines)


def whole_runs(
    document: dict[str, Any] | None, least: float = 0.02, up: str = "", alone: dict[str, Any] | None = None
) -> str:
    """A whole two-stage run, its stages, and the decode alone; nothing where none was measured yet.

    least    share of stock's run that a stage has at least which gets a row
    alone    of `benchmarks/first_decode.py`, in place of the run's own first decode
    """
    if document is None:
        return ""
    (row,) = document["run"]
    lines = [
        "| | stock | bitfuse | | peak memory, stock and bitfuse | output |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    whole = {"stage": "**a whole run**", "bits": row["mismatch"] or "equal", **row["total"]}
    total = row["total"]["ms"]["stock"]["median"]
    longest = [stage for stage in row["stages"] if stage["ms"]["stock"]["median"] >= least * total]
    lines += [_run_line(stage["stage"], stage, stage["bits"]) for stage in (whole, *longest)]
    for decode in () if least else document.get("decode", ()):
        tiled = "tiled decode" if decode["tiled"] else "decode"
        what = f"{tiled} alone, {decode['width']}x{decode['height']}"
        lines.append(_run_line(what, decode, decode["mismatch"] or "equal"))
    sentences = [
        f"LTX-{row['version']}, {row['geometry']}, decoded with its sound; medians of {min(row['runs'].values())} runs "
        "of each way by turns in one process, the text encoder left out. Memory beyond the weights."
    ]
    if any(stage["bits"] is None for stage in longest):
        sentences.append("`-`: compared by what the next stages make of it.")
    if least:
        sentences.append(f"Stages of at least {least:.0%} of the run.")
    for first in document.get("first_decode", ()):
        beyond, stock = first["beyond_stock_s"], first["processes"]["stock"]["seconds"]
        empty, warm, size = beyond["empty caches"], beyond["warm caches"], f"{first['width']}x{first['height']}"
        if alone is not None:
            beyond, stock, size = alone["beyond_stock_s"], alone["stock_s"], alone["size"]
            empty, warm = beyond["empty cache"], beyond["warm cache"]
        sentences.append(
            f"The first decode of a process, {size}, takes {empty:.1f} s longer than stock's {stock:.1f} s with an "
            f"empty Triton cache, {warm:.1f} s with a warm one."
        )
    documents = [document] if alone is None else [document, alone]
    return "\n".join([*lines, "", " ".join([*sentences, _sources(documents, up)])])


def first_decode(document: dict[str, Any]) -> str:
    """What the first decode of a process takes beyond stock's, and what it took before."""
    before, all_runs = document["before"], document["first_s"]
    lines = [
        f"| first decode of a process, {document['size']}, beyond stock's | before | now | all runs, with stock's |",
        "| --- | --- | --- | --- |",
    ]
    for way in ("empty cache", "warm cache", "empty cache, 4 cores"):
        earlier = f"{before['beyond_stock_s'][way]:.1f} s" if way in before["beyond_stock_s"] else "-"
        runs = ", ".join(f"{seconds:.2f} s" for seconds in all_runs[way])
        lines.append(
            f"| {way.replace('cache', 'Triton cache')} | {earlier} | {document['beyond_stock_s'][way]:.1f} s | {runs} |"
        )
    sentence = (
        f"Medians, each process by itself, {document['cores']} cores; stock takes {document['stock_s']:.1f} s, and "
        f"{before['stock_s']:.1f} s before. Now: commit {document['commit']}; before: {before['commit']}. Every bit of "
        "each video is that of the first stock process."
    )
    return "\n".join([*lines, "", f"{sentence} {_sources([document], '../')}"])


def _run_line(what: str, row: dict[str, Any], bits: str | None) -> str:
    ms, peak = row["ms"], row["peak_gb"]
    times = " | ".join(_seconds(ms[way]["median"]) for way in ("stock", "bitfuse"))
    peaks = ", ".join(f"{peak[way]:.1f} GB" for way in ("stock", "bitfuse") if way in peak)
    output = {"equal": "identical in every bit", None: "-"}.get(bits, bits)
    speed_up = "-" if row["speed_up"] is None else f"{row['speed_up']:.2f}x"
    return f"| {what} | {times} | {speed_up} | {peaks or '-'} | {output} |"


def _seconds(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1e3 else f"{ms:.0f} ms"


def _way_cell(row: dict[str, Any], way: str) -> str:
    return f"{row['ms'][way]['median']:.0f} ms, {row['speed_ups'][way]:.2f}x" if way in row["ms"] else "-"


def _host(row: dict[str, Any]) -> str:
    return row.get("host", "diffusers")  # until 2026-11-24 there was no other


def _fewest_steps(row: dict[str, Any]) -> int:
    return min(row["steps"].values()) if "steps" in row else row["rounds"]  # a round was one step until 2026-11-24


def _under_the_model(rows: list[dict[str, Any]], documents: list[dict[str, Any]], version: str) -> str:
    sentences = [
        f"LTX-{version}, {rows[0]['layers']} layers; medians of at least "
        f"{min(map(_fewest_steps, rows))} steps, all ways by turns in one process. Speed-ups over stock; memory "
        "beyond the weights: stock's, then bitfuse's without and with the graph."
    ]
    if floors := [f"{row['of_floor']['graph']:.2f}x at {row['tokens']}" for row in rows if "of_floor" in row]:
        sentences.append(
            f"With the graph a step takes {', '.join(floors)} tokens, of the sum of three times: its matmuls', its "
            "attention's, and that of a plain copy of the fused operators' bytes."
        )
    for row in _rows(documents, "first_step"):
        if row["version"] == version:
            empty, warm = (row["beyond_stock_s"][f"{kind} caches"] for kind in ("empty", "warm"))
            sentences.append(
                f"The first step of a process takes {empty:.1f} s longer than stock's with an empty Triton cache, "
                f"{warm:.1f} s with a warm one."
            )
    for row in _rows(documents, "audit"):
        if row["version"] == version and row["cost"] is not None:
            sentences.append(f"`audit={row['every']}` costs {row['cost']:.1%} of a step of {row['tokens']} tokens.")
    sentences.extend(_waiting(rows))
    if watts := [w for row in rows for w in row.get("watts", {}).values() if row["tokens"] >= 6144]:
        sentences.append(f"From 6144 tokens on every way draws {min(watts)} to {max(watts)} W, the card's limit.")
    return " ".join([*sentences, _sources(documents)])


def hosts(steps: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> str:
    """A whole step of the other hosts' transformers: a row for each host and number of tokens; then of several GPUs."""
    steps = [d for d in steps if any(_host(row) != "diffusers" for row in d.get("model", ()))]
    found = [(gpu(d), row) for d in steps for row in d["model"] if _host(row) != "diffusers"]
    found.sort(key=lambda one: (one[1]["host"], one[1]["version"], one[1]["tokens"]))
    rows = [row for _, row in found]
    lines = [
        "| host | LTX | GPU | video tokens | stock | bitfuse | CUDA graph | the host's own fusions | peak memory "
        "| output |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for card, row in found:
        ms, peak = row["ms"], row["peak_gb"]
        ways = [_way_cell(row, way) for way in ("bitfuse", "graph", "quality high")]
        lines.append(
            f"| {row['host_version']} | {row['version']} | {card} | {row['tokens']} | {ms['stock']['median']:.0f} ms | "
            f"{' | '.join(ways)} | {peak['stock']:.1f} GB, {peak['bitfuse'] / peak['stock'] - 1:+.0%} | "
            f"{row['mismatch'] or 'identical in every bit'} |"
        )
    newest = {(of["host"], _version_of_ranks(of)): of for of in sorted(ranks, key=lambda d: d["path"])}
    ranks = [newest[key] for key in sorted(newest) if not key[0].startswith("diffusers")]  # those in docs/stacking.md
    for of in ranks:
        version = _version_of_ranks(of)
        tokens = re.search(r"(\d+) video", of["geometry"])[1]
        differs = "; ".join(f"rank {rank}: {why}" for rank, why in of["differs"].items())
        lines.append(
            f"| {of['host']} | {version} | {of['ranks']} {gpu(of)} | {tokens} | {_spread(of['ms']['stock'])} | "
            f"{_spread(of['ms']['bitfuse'])}, {of['speed_up']:.2f}x | - | - | - | "
            f"{differs or 'identical in every bit'} |"
        )
    documents = sorted([*steps, *ranks], key=lambda d: d["path"])
    lines += [
        "",
        f"{rows[0]['layers']} layers; medians, all ways by turns in one process; on several GPUs of the slowest rank, "
        "with the 10th to the 90th percentile. Speed-ups over the host's stock step, for SGLang that of its tier "
        "`exact`; the last way is SGLang's with all its fusions for LTX-2, whose output has other bits. "
        + " ".join([*_waiting(rows), _sources(documents, "../")]),
    ]
    return "\n".join(lines)


def several_gpus(documents: list[dict[str, Any]]) -> str:
    """diffusers' transformer on several GPUs: a row for each way to divide it."""
    ways = {"ulysses": "context parallelism, Ulysses", "fsdp": "FSDP2", "train": "FSDP2, a LoRA trained"}
    documents = [d for d in documents if d["host"].startswith("diffusers")]
    lines = [
        "| two GPUs | layers | video tokens | sites fused on each | stock | bitfuse | | each rank |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for of in sorted(documents, key=lambda d: list(ways).index(d["host"].split(", ")[1])):
        layers, tokens = re.search(r"(\d+) layers.* (\d+) video", of["geometry"]).groups()
        what = "output and gradients" if of["trains"] else "output"
        differs = "; ".join(f"rank {rank}: {why}" for rank, why in of["differs"].items())
        lines.append(
            f"| {ways[of['host'].split(', ')[1]]} | {layers} | {tokens} | {of['sites_fused'][0]} of "
            f"{of['sites_seen'][0]} | {_spread(of['ms']['stock'])} | {_spread(of['ms']['bitfuse'])} | "
            f"{of['speed_up']:.2f}x | {differs or f'{what} identical in every bit'} |"
        )
    lines += [
        "",
        "A step of LTX-2.0 over NCCL, stock and bitfuse by turns: medians (10th to 90th percentile) of the slower "
        f"rank. {_sources(documents, '../')}",
    ]
    return "\n".join(lines)


def _version_of_ranks(document: dict[str, Any]) -> str:
    return document.get("version") or ("2.3" if "-2.3-" in document["path"] else "2.0")  # in it from 2026-11-26 on


def _waiting(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Where stock waits for the CPU: what is won there is the CPU's, and no other machine's."""
    for row in rows:
        if not (stock := row.get("kernels_ms", {}).get("stock")):
            continue
        step = row["ms"]["stock"]["median"]
        busy = stock["matmul"] + stock["attention"] + stock["other"]
        if busy < 0.8 * step:
            yield (
                f"At {row['tokens']} tokens stock waits for the CPU, which launches a kernel every "
                f"{1e3 * step / stock['launches']:.0f} us here (all its kernels take {busy:.0f} ms), so what is won "
                "there depends on the CPU."
            )


def compatibility(rows: list[dict[str, Any]]) -> str:
    """Every version of every host that was tried: a row for those, one after the other, of which the same was found
    with the same versions of torch."""
    with_: dict[tuple[str, ...], list[str]] = {}  # of a host's version and what was found of it: torch and Triton
    for row in rows:
        functions = row["functions"]
        tried = functions["passed"] + len(functions["failed"])
        cells = (row["host"], row["version"], f"{functions['passed']} of {tried}", *map(_step_cell, row["steps"]))
        with_.setdefault(cells, []).append(f"{row['torch']} and {row['triton']}")
    alike: dict[tuple[str, ...], list[str]] = {}
    for (host, version, *cells), torches in with_.items():
        alike.setdefault((host, *cells, ", ".join(torches)), []).append(version)
    steps = [f"LTX-{step['ltx']}" for step in rows[0]["steps"]]
    lines = [f"| host | its functions | {' | '.join(steps)} | torch and Triton |", "| --- " * (len(steps) + 3) + "|"]
    for (host, *cells), versions in alike.items():
        name = {"sglang": "SGLang"}.get(host, host)
        lines.append(f"| {name} {', '.join(versions)} | {' | '.join(cells)} |")
    dates = sorted(row["date"] for row in rows)
    days = dict.fromkeys(date[:10] for date in (dates[0], dates[-1]))
    lines += [
        "",
        "Functions that compute in every bit what bitfuse's references do, of those that the host has; then sites "
        "fused of sites seen in one step of a transformer of two layers, whose output is that of the stock step in "
        "every bit (-: a version of LTX-2 that the host does not have). In Triton's interpreter, on the CPU, "
        f"{' to '.join(days)} ([JSON](../benchmarks/compatibility.json), by `benchmarks/compatibility.py`).",
    ]
    return "\n".join(lines)


def stacking(document: dict[str, Any]) -> str:
    """Every feature that was tried beside bitfuse: a row each, with the sites fused of those seen in both orders."""
    rows, machine = document["rows"], document["machine"]
    orders, versions = (list(dict.fromkeys(row[key] for row in rows)) for key in ("order", "version"))
    lines = [f"| feature | {' | '.join(orders)} | how |", "| --- |" + " --- |" * (len(orders) + 1)]
    for feature in dict.fromkeys(row["feature"] for row in rows):
        of_it = [row for row in rows if row["feature"] == feature]
        cells = [", ".join(map(_stacked, (row for row in of_it if row["order"] == order))) for order in orders]
        lines.append(f"| {feature} | {' | '.join(cells)} | {of_it[0]['how']} |")
    packages = ", ".join(f"{name} {machine[name]}" for name in ("torch", "diffusers", "accelerate", "peft", "torchao"))
    lines += [
        "",
        f"Sites fused of sites seen in a transformer of two layers, of LTX-{' and LTX-'.join(versions)}; **differs** "
        "where a bit was not stock's with the feature, accelerated or after `restore()`. In Triton's interpreter, on "
        f"the CPU, where nothing moves between devices: {packages}, {machine['date'][:10]} "
        "([JSON](../benchmarks/stacking.json), by `benchmarks/stacking.py`).",
    ]
    return "\n".join(lines)


def stacking_times(documents: list[dict[str, Any]]) -> str:
    """Features on a GPU: a step of stock with it, and of bitfuse with it, by turns; of each that of the most layers."""
    measured = sorted(
        (row for document in documents for row in document["rows"] if row.get("ms")), key=lambda row: -row["layers"]
    )
    lines = ["| feature | layers | stock | bitfuse | | peak memory, stock and bitfuse |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for feature in dict.fromkeys(row["feature"] for row in measured):
        row = next(row for row in measured if row["feature"] == feature)
        ms, peak = row["ms"], row["peak_gb"]
        times = " | ".join(f"{ms[way]['median']:.0f} ms ({ms[way]['min']:.0f})" for way in ("stock", "bitfuse"))
        peaks = ", ".join(f"{peak[way]:.1f} GB" for way in ("stock", "bitfuse"))
        lines.append(f"| {feature} | {row['layers']} | {times} | {row['speedup']:.2f}x | {peaks} |")
    versions, tokens = ({row[key] for row in measured} for key in ("version", "tokens"))
    if len(versions) > 1 or len(tokens) > 1:
        raise ValueError(f"rows of one version and size, not {versions} and {tokens}")
    lines += [
        "",
        f"One step of LTX-{versions.pop()}, {tokens.pop()} tokens, medians by turns (least in brackets); all sites "
        f"fused and every bit that of stock with the feature. {_sources(documents, '../')}",
    ]
    return "\n".join(lines)


def compiled(on_cpu: dict[str, Any], on_gpu: dict[str, Any] | None) -> str:
    """torch.compile with bitfuse's operators as opaque ops: elements that differ, and times where a GPU was used."""
    documents = [on_cpu, *([on_gpu] if on_gpu else [])]
    ways = dict.fromkeys(way["way"] for document in documents for row in document["rows"] for way in row["ways"])
    timed = list(on_gpu["rows"]) if on_gpu else []
    heads = [f"{row['tokens']} tokens, on the GPU" for row in timed]
    lines = ["| " + " | ".join(["way", "elements that differ, on the CPU", *heads]) + " |"]
    lines += ["| --- |" + " --- |" * (1 + len(timed))]
    for way in ways:
        if way == "stock":
            continue
        cells = [_that_differ(_of_way(on_cpu["rows"], way)), *(_timed_way(row, way) for row in timed)]
        lines.append(f"| {_compiled_label(way)} | {' | '.join(cells)} |")
    first = on_cpu["rows"][0]
    left = first["left"]
    count = {name: left.get(f"aten.{name}.default", 0) for name in ("addmm", "gelu")}
    attentions = sum(n for name, n in left.items() if "scaled_dot_product" in name)
    versions, seeds = ({row[key] for row in on_cpu["rows"]} for key in ("version", "seed"))
    machine = on_cpu["machine"]
    sentences = [
        f"What is left between the operators of a block of LTX-{first['version']}: {count['addmm']} matmuls, "
        f"{attentions} attentions, {count['gelu']} GELUs, views and copies.",
        f"On the CPU: a forward of each of LTX-{' and LTX-'.join(sorted(versions))} for each of {len(seeds)} seeds, "
        f"{first['layers']} layers; torch {machine['torch']}, diffusers {machine['diffusers']}, {machine['date'][:10]} "
        "([JSON](../benchmarks/compiled.json), by `benchmarks/compiled.py`).",
    ]
    if on_gpu:
        sentences += [_fastest_exact(row) for row in timed]
        sentences.append(f"{timed[0]['layers']} layers, medians by turns. {_sources([on_gpu], '../')}")
    return "\n".join([*lines, "", " ".join(sentences)])


def _of_way(rows: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
    return [found for row in rows for found in row["ways"] if found["way"] == way]


def _that_differ(found: list[dict[str, Any]]) -> str:
    if not found:
        return "-"
    if any("failed" in one for one in found):
        return "does not run"
    return f"{sum(one['differing'] for one in found)} of {sum(one['elements'] for one in found)}"


def _timed_way(row: dict[str, Any], way: str) -> str:
    found = _of_way([row], way)
    time = f"{found[0]['ms']['median']:.1f} ms, " if found and "ms" in found[0] else ""
    return time + _that_differ(found)


def _compiled_label(way: str) -> str:
    """A way of `benchmarks/compiled.py`, as the table names it."""
    whose, _, how = way.partition(", ")
    if how in ("", "CUDA graph"):
        return "`accelerate(cuda_graph=True)`" if how else "`accelerate`"
    return f"{'stock' if whose == 'stock' else 'opaque operators'}, {how}"


def _fastest_exact(row: dict[str, Any]) -> str:
    """Of the compiled ways that keep every bit the fastest, beside bitfuse's own CUDA graph."""
    exact = {way["way"]: way["ms"]["median"] for way in row["ways"] if "ms" in way and not way["differing"]}
    ours = exact.pop("bitfuse, CUDA graph", None)
    compiled = {way: ms for way, ms in exact.items() if way not in ("stock", "bitfuse")}
    if not compiled or ours is None:
        return f"At {row['tokens']} tokens no compiled way keeps every bit."
    best = min(compiled, key=lambda way: compiled[way])
    ratio = compiled[best] / ours
    return (
        f"At {row['tokens']} tokens the fastest compiled way that keeps every bit ({_compiled_label(best)}) takes "
        f"{ratio:.2f}x the time of bitfuse's own graph."
    )


def _stacked(row: dict[str, Any]) -> str:
    differs = row["differs"] or row["after_restore"]
    return f"**differs**: {differs}" if differs else f"{row['fused']} of {row['seen']}"


def _step_cell(step: dict[str, Any]) -> str:
    if step["outcome"] == "differs":
        return f"**differs**: {step['reason']}"
    return (
        f"{step['fused']} of {step['of']}, equal" if step["outcome"] == "equal" else "left alone" if step["of"] else "-"
    )


def _rows(documents: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    return [row for document in documents for row in document.get(part, ())]


def gpu(document: dict[str, Any]) -> str:
    """Its short name, as H100 of "NVIDIA H100 80GB HBM3": rows of one table may be of several."""
    device = document["machine"]["device"]
    found = re.search(r"\b[A-Z]\d+\w*\b|\b\d{4}\b", device)
    return found[0] if found else device


def _spread(t: dict[str, float]) -> str:
    return f"{t['median']:.0f} ms ({t['p10']:.0f} to {t['p90']:.0f})"


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"diffusers {machine['diffusers']}, {machine['date'][:10]}"
    )


def decoder(documents: list[dict[str, Any]], run: dict[str, Any]) -> str:
    """The convolutional video decoder of each host, by kind and size; of those sizes that a whole run has, its rows."""
    lines = ["| LTX, decode | stock | bitfuse | peak beyond the weights | output |", "| --- | --- | --- | --- | --- |"]
    rows: dict[str, dict[str, Any]] = {}
    for row in run["decode"]:
        name = f"2.0 {row['width']}x{row['height']}x{row['frames']}{' tiled' if row['tiled'] else ''}"
        times = {f"{way}_ms": [row["ms"][way]["median"]] for way in ("stock", "bitfuse")}
        rows[name] = {**times, "peak_gb": row["peak_gb"], "equal": row["mismatch"] is None}
    for document in documents:
        host = "ltx-core " if "ltx-core" in document["path"] else ""
        for row in document["rows"]:
            rows.setdefault(f"{host}{row['decode']}", row)
    for name, row in rows.items():
        stock, ours = min(row["stock_ms"]), min(row["bitfuse_ms"])
        peaks = f"{row['peak_gb']['stock']:.1f} to {row['peak_gb']['bitfuse']:.1f} GB"
        output = "identical in every bit" if row["equal"] else "differs"
        lines.append(f"| {name} | {stock:.0f} ms | {ours:.0f} ms, {stock / ours:.2f}x | {peaks} | {output} |")
    said = "By turns in one process; medians of the sizes that a whole run has, of the others the least of each way."
    return "\n".join([*lines, "", f"{said} {_sources([run, *documents], '../')}"])


def encoder(document: dict[str, Any] | None) -> str:
    """The video encoder, by version and size; nothing where none was measured yet."""
    if document is None:
        return ""
    lines = ["| LTX, encode | stock | bitfuse | first call | peak beyond the weights | launches | output |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in document["rows"]:
        stock, ours = min(row["stock_ms"]), min(row["bitfuse_ms"])
        peaks = f"{row['peak_gb']['stock']:.2f} to {row['peak_gb']['bitfuse']:.2f} GB"
        launches = " to ".join(str(row["kernels"][way]["launches"]) for way in ("stock", "bitfuse"))
        output = "identical in every bit" if row["equal"] else "differs"
        first = " to ".join(f"{row['first_s'][way]:.1f}" for way in ("stock", "bitfuse"))
        times = f"{stock:.1f} ms | {ours:.1f} ms, {stock / ours:.2f}x | {first} s"
        lines.append(f"| {row['encode']} | {times} | {peaks} | {launches} | {output} |")
    said = (
        "By turns in one process, in the order of the rows; the least of each way. A first call is that of its size in "
        "the process."
    )
    return "\n".join([*lines, "", f"{said} {_sources([document], '../')}"])


def comfyui(document: dict[str, Any]) -> str:
    """A step of ComfyUI's model by the node, without and with a CUDA graph, and by KJNodes' fused blocks."""
    lines = ["| video tokens | stock | bitfuse | CUDA graph | KJNodes' blocks | launches a block | peak memory |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in document["rows"]:
        if row["differs"]:
            raise ValueError(f"{row['tokens']} tokens: {row['differs']}")
        ms, speed_up, peak, kinds = row["ms"], row["speedup"], row["peak_gb_of_a_step"], row["kernels"]
        ways = " | ".join(
            f"{ms[way]['median']:.0f} ms, {speed_up[way]:.2f}x" for way in ("bitfuse", "graph", "KJNodes")
        )
        differ = re.search(r"\((\d+) of (\d+) elements\)", row["peer_differs"])
        if differ is None:
            raise ValueError(f"{row['tokens']} tokens: {row['peer_differs']}")
        share = int(differ[1]) / int(differ[2])
        launches = " to ".join(f"{kinds[way]['launches_a_block']['other']:.0f}" for way in ("stock", "bitfuse"))
        gigabytes = [peak["stock"], peak["bitfuse"]]
        if "graph_holds_gb" in row:  # else the peak of a replay is without the tensors that the graph keeps for it
            gigabytes.append(peak["graph"] + row["graph_holds_gb"])
        memory = ", ".join(f"{one:.2f} GB" for one in gigabytes)
        lines.append(
            f"| {row['tokens']} | {ms['stock']['median']:.0f} ms | {ways}; {share:.0%} of values differ | {launches} | "
            f"{memory} |"
        )
    made = document["machine"]
    graphs = ", then with it" if all("graph_holds_gb" in row for row in document["rows"]) else ""
    lines += [
        "",
        f"LTX-{document['ltx']}, {document['rows'][0]['layers']} layers, ComfyUI {made['comfyui']}, comfy-kitchen "
        f"{made['comfy_kitchen']}, built by ComfyUI's own loader with random weights; medians by turns; every bit of "
        "video and sound as stock's with bitfuse, without and with the graph. KJNodes' are its LTX2 Attention Tuner "
        "Patch's. Launches are those that are neither matmul nor attention; memory beyond the weights: stock's, then "
        f"bitfuse's without a graph{graphs}. {_sources([document], '../')}",
    ]
    return "\n".join(lines)


def gelu(document: dict[str, Any]) -> str:
    """The feed-forward's GELU beside PyTorch's and a plain copy, each into another tensor."""
    lines = ["| x in bf16 | PyTorch's | ours | | of a plain copy |", "| --- | --- | --- | --- | --- |"]
    for row in document["operators"]:
        if row["mismatch"] is not None:
            raise ValueError(f"{row['case']}: {row['mismatch']}")
        times = " | ".join(f"{row['us'][way]['median']:.1f} us" for way in ("eager", "fused"))
        lines.append(f"| {row['x']} | {times} | {row['speed_up']:.2f}x | {row['of_copy']:.0%} |")
    return "\n".join([*lines, "", f"Medians with a cold L2, every bit equal. {_sources([document], '../')}"])


def diffusion_decoder(document: dict[str, Any]) -> str:
    """The operators of LTX-2.5's diffusion decoder at its real sizes, and one of its blocks without its attention."""
    lines = ["| operator | case | PyTorch chain | fused | | of a plain copy |", "| --- | --- | --- | --- | --- | --- |"]
    for row in document["operators"]:
        if not row["equal"]:
            raise ValueError(f"{row['operator']}, {row['case']}: {row['mismatch'] or row['reason']}")
        times = " | ".join(f"{row[way] / 1e3:.2f} ms" for way in ("stock_us", "fused_us"))
        ratio = f"{row['stock_us'] / row['fused_us']:.1f}x | {row['copy_us'] / row['fused_us']:.0%}"
        lines.append(f"| `{row['operator']}` | {row['case']} | {times} | {ratio} |")
    block, published = document["block"], document["published"]
    stock, fused = block["elementwise_ms"]["stock"], block["elementwise_ms"]["fused"]
    lines += [
        "",
        f"Medians with a cold L2, by turns, every bit equal. A block of {block['tokens']} tokens without its "
        f"attention: {block['ms']['stock']:.1f} to {block['ms']['fused']:.1f} ms, of which linear layers "
        f"{block['ms']['linears']:.1f}; the rest {stock:.1f} to {fused:.1f} ms, {stock / fused:.1f}x. "
        f"Published beside it ({published['what']}): {published['stock_ms']:.1f} to {published['fused_ms']:.1f} ms, "
        f"{published['ratio']:.1f}x. {_sources([document], '../')}",
    ]
    return "\n".join(lines)


def diffusion_decodes(document: dict[str, Any]) -> str:
    """Whole decodes of it, by a compiled FlexAttention in the host's own processor."""
    lines = [
        "| frames | stock | fused | | attention of stock's | neither attention nor matmul | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in document["decodes"]:
        if not all(row["equal"]):
            raise ValueError(f"{row['size']}: a decode has other bits")
        ms = {way: row["s"][way] * 1e3 for way in ("stock", "fused")}
        kernels, peak = row["kernels_ms"], row["peak_gb"]
        other = " to ".join(f"{kernels[way]['other']:.0f}" for way in ("stock", "fused"))
        lines.append(
            f"| {row['size']} | {ms['stock']:.0f} ms | {ms['fused']:.0f} ms | {row['ratio']:.2f}x | "
            f"{kernels['stock']['attention'] / ms['stock']:.0%} | {other} ms, {row['elementwise_ratio']:.1f}x | "
            f"{peak['stock']:.2f}, {peak['fused']:.2f} GB |"
        )
    equal = sum(len(row["equal"]) for row in document["decodes"])
    lines += ["", f"Medians by turns; each of {equal} decodes that were compared has the bits of the first. Peaks are "]
    lines[-1] += f"beyond the weights. {_sources([document], '../')}"
    return "\n".join(lines)


def linear_orders(document: dict[str, Any]) -> str:
    """At which numbers of rows cuBLAS adds along K otherwise than in one chain: rows of the probes of `orders`."""
    lines = ["| N x K | rows at which it does not, without a bias | with one |", "| --- | --- | --- |"]
    for sides, row in document["orders"].items():
        if "tried" in row:
            cells = (
                _spans([m for m in row["tried"] if f"{m}{bias}" in row["no chain"]], row["tried"]) for bias in _BIAS
            )
            lines.append(f"| {sides} | {' | '.join(cells)} |")
    tried = next(row["tried"] for row in document["orders"].values() if "tried" in row)
    whole = [sides for sides, row in document["orders"].items() if "difference" in row]
    wrong = [sides for sides in whole if document["orders"][sides]["difference"]]
    said = f"all but {', '.join(wrong)} are one chain" if wrong else "all are one chain"
    lines += [
        "",
        f"Tried with {', '.join(map(str, tried))} rows; of the larger layers of a step ({', '.join(whole)}) {said}.",
    ]
    return "\n".join([*lines, _sources([document], "../")])


_BIAS = ("", " with bias")


def _spans(some: list[int], tried: list[int]) -> str:
    """Numbers, those that follow each other in `tried` as "1 to 48"."""
    spans: list[list[int]] = []
    for m in some:
        if spans and tried.index(m) == tried.index(spans[-1][-1]) + 1:
            spans[-1].append(m)
        else:
            spans.append([m])
    return ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]} to {s[-1]}" for s in spans) or "none"


def linear_turns(document: dict[str, Any]) -> str:
    """Single layers by turns, and the fastest kernel of each."""
    lines = [
        "| M x N x K, and what follows | `F.linear` alone | bitfuse then | the fastest kernel, over that |",
        "| --- | --- | --- | --- |",
    ]
    for case, row in document["shapes"].items():
        times = {name: t for name, t in row.items() if isinstance(t, float)}
        kernels = {name: t for name, t in times.items() if name not in ("F.linear", "stock", "today")}
        name = min(kernels, key=lambda name: kernels[name])
        best = f"{kernels[name]:.4f} ms, {times['today'] / kernels[name]:.3f}x: {name}"
        lines.append(f"| {case} | {times['F.linear']:.4f} ms | {times['today']:.4f} ms | {best} |")
    said = (
        "Medians. `F.linear` alone is without what follows it; the other columns have all of it. bitfuse then is "
        "that of before `ops/gelu.py`: its GELU was PyTorch's."
    )
    return "\n".join([*lines, "", f"{said} {_sources([document], '../')}"])


def linear_one_step(document: dict[str, Any]) -> str:
    """A whole step with the kernels that were the fastest by turns."""
    step, end = document["step"], ", milliseconds"
    ms = {name.removesuffix(end): found for name, found in step.items() if name.endswith(end)}
    today = (ms["today"] + ms["today again"]) / 2
    lines = ["| a step with these layers by a kernel | time | over bitfuse then |", "| --- | --- | --- |"]
    lines += [f"| {name.replace('today', 'none')} | {t:.1f} ms | {today / t:.3f}x |" for name, t in ms.items()]
    kinds = ", ".join(f"{name}: {step[name]}" for name in ("up", "down", "out"))
    said = (
        f"6144 tokens, {step['layers']} layers, a CUDA graph a way, medians, every output equal to stock's; "
        f"{kinds}. bitfuse then is the mean of the two rows without one."
    )
    return "\n".join([*lines, "", said, _sources([document], "../")])


def linear_steps(document: dict[str, Any]) -> str:
    """Whole steps with linears by quack or Gluon, one change at a time; each over the bitfuse of its own turns."""
    found = document["6144 tokens"]
    lines = ["| a step with these layers by a kernel | time | over bitfuse |", "| --- | --- | --- |"]
    baselines = [row["ms"] for row in found.get("repeats of bitfuse", {}).values() if "turns" in row]
    for part in ("GELU's configurations", "one change at a time", "together", "why"):
        rows = {name: row for name, row in found.get(part, {}).items() if isinstance(row, dict)}
        for name, row in rows.items():
            if name.startswith("bitfuse") and "one stream" not in name:
                baselines.append(row["ms"])
            else:
                lines.append(f"| {name} | {row['ms']:.1f} ms | {rows['bitfuse']['ms'] / row['ms']:.4f}x |")
    lines += [
        "",
        f"6144 tokens, {found['layers']} layers, a CUDA graph a way, medians, every output equal to stock's. bitfuse "
        f"itself was timed {len(baselines)} times: {min(baselines):.1f} to {max(baselines):.1f} ms. "
        f"{_sources([document], '../')}",
    ]
    return "\n".join(lines)


def linear_gluon(alone: dict[str, Any], steps: dict[str, Any]) -> str:
    """What `linear_gluon_pingpong.py` wins alone, at the limit of power, and in whole steps, of 6144 tokens."""
    shape, own = "6144 x 16384 x 4096, gelu", "F.linear, own GELU"
    turns, steady = alone["shapes"][shape], alone["steady"][shape]
    lines = [
        "| GELU in | 25 ms each, by turns | 1.5 s at a time | energy | a step of 6144 tokens | of 24576 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    ways = {own: "a kernel of its own, as it is"} | {way: way for way in turns if way.startswith(_ON_REGISTERS)}
    for way, name in ways.items():
        ms, longer, mj = turns[way], steady[way]["ms"], steady[way]["mJ"]
        cells = [f"{ms:.3f} ms, {turns[own] / ms:.3f}x", f"{longer:.3f} ms, {steady[own]['ms'] / longer:.3f}x"]
        cells.append(f"{mj:.0f} mJ")
        for tokens in (6144, 24576):
            found = [_over_bitfuse(run, tokens, f"GELU, {way}") for run in _runs(steps)]
            cells.append(", ".join(filter(None, found)) or "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    spans, plain = _runs(steps)[0]["6144 tokens"]["ten seconds"], steady["F.linear"]
    lines += [
        "",
        f"Medians by turns, means of 1.5 s. The layer is {shape}; `F.linear` alone takes {turns['F.linear']:.3f} ms by "
        f"turns, {plain['ms']:.3f} ms and {plain['mJ']:.0f} mJ for 1.5 s. Steps of 48 layers, over "
        "bitfuse in the same turns, in two runs on machines lent apart. Over ten seconds of the first a step takes "
        + ", ".join(f"{rows[0]['J']:.1f} J ({name.removeprefix('GELU, ')})" for name, rows in spans.items())
        + f". Every output equal to stock's. {_sources([alone, steps], '../')}",
    ]
    return "\n".join(lines)


_ON_REGISTERS = ("pingpong", "together", "thirds")


def _runs(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Of `linear_steps.py`: several that were put into one document, or one."""
    return document.get("runs", [document])


def _over_bitfuse(run: dict[str, Any], tokens: int, name: str) -> str:
    """Of a way in the parts of a run of `linear_steps.py`; empty where it has none."""
    parts = run.get(f"{tokens} tokens", {}).values()
    rows = [part for part in parts if isinstance(part, dict) and isinstance(part.get(name), dict)]
    return f"{rows[0]['bitfuse']['ms'] / rows[0][name]['ms']:.4f}x" if rows else ""


def linear_gluon_steps(document: dict[str, Any]) -> str:
    """One change at a time, of layers in Gluon but GELU's."""
    *_, run = _runs(document)
    lines = ["| a step with these layers in Gluon | 6144 tokens, over bitfuse | 24576 |", "| --- | --- | --- |"]
    names = [
        name
        for tokens in (6144, 24576)
        for part in run[f"{tokens} tokens"].values()
        if isinstance(part, dict)
        for name in part
    ]
    for name in dict.fromkeys(names):
        if name != "bitfuse" and not name.startswith("GELU, thirds"):
            small, large = (_over_bitfuse(run, tokens, name) or "-" for tokens in (6144, 24576))
            lines.append(f"| {name} | {small} | {large} |")
    small, large = (run["6144 tokens"]["one change at a time"], run["24576 tokens"]["together"])
    took = f"{small['bitfuse']['ms']:.1f} and {large['bitfuse']['ms']:.1f} ms"
    lines += ["", f"bitfuse takes {took}. Every output equal to stock's. {_sources([document], '../')}"]
    return "\n".join(lines)


def linear_cublaslt(document: dict[str, Any]) -> str:
    """By shape of a step: what the heuristic's other algorithms take, beside `F.linear`."""
    lines = [
        "| M x N x K | algorithms, equal | fastest by turns | its energy | the least energy | `F.linear` again |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape, row in document["layers"].items():
        equal = [name for name, one in row["algorithms"].items() if one["bits"] == "equal"]
        turns, stock = {name: ms for name, ms in row["turns"].items() if name != "F.linear"}, row["turns"]["F.linear"]
        _, *loops = (loop["mJ"] for loop in row["energy"]["F.linear"])  # the first finds a cooler card
        mean = statistics.mean(loops)
        over = {name: one["mJ"] / mean for name, (one, *_) in row["energy"].items() if name != "F.linear"}
        fastest = min(turns, key=turns.__getitem__)
        lines.append(
            f"| {shape} | {len(row['algorithms'])}, {len(equal)} | {turns[fastest]:.4f} ms of {stock:.4f}, "
            f"{stock / turns[fastest]:.3f}x | {over[fastest]:.3f} | {min(over.values()):.3f} | "
            f"{min(loops) / mean:.3f} to {max(loops) / mean:.3f} |"
        )
    lines += [
        "",
        f"cuBLASLt {document['versions']['cublasLt']}. Medians by turns; energy of 1.5 s as a share of the mean of "
        "`F.linear`'s, of the four to six that are fastest by turns; a shape's first loop of `F.linear`, which finds a "
        f"cooler card, is not counted. {_sources([document], '../')}",
    ]
    return "\n".join(lines)


def linear_power(document: dict[str, Any]) -> str:
    """Steps for ten seconds: bitfuse and its repeats, and what was tried."""
    found = document["6144 tokens"]
    spans = {name: rows if isinstance(rows, list) else [rows] for name, rows in found["ten seconds"].items()}
    spans["bitfuse"] += [row for row in found.get("repeats of bitfuse", {}).values() if "W" in row]
    lines = ["| ten seconds of | a step | power | energy a step | clock |", "| --- | --- | --- | --- | --- |"]
    for name, row in ((name, row) for name, rows in spans.items() for row in rows if isinstance(row, dict)):
        lines.append(f"| {name} | {row['ms']:.1f} ms | {row['W']:.0f} W | {row['J']:.1f} J | {row['MHz']:.0f} MHz |")
    sentences = []
    if all(way in document.get("kernels", {}) for way in _PROFILED):
        ways = [document["kernels"][way] for way in _PROFILED]
        took = [
            sum(one["ms"] for kind, one in way.items() if kind in ("cuBLAS, 192x192", "quack", "GELU")) for way in ways
        ]
        sentences = [
            "By the profiler the video's first layers of the feed-forwards and all GELUs take "
            f"{took[0]:.1f} and {took[1]:.1f} ms in two steps of bitfuse, {took[2]:.1f} ms in one with GELU in quack's "
            "GEMM."
        ]
    sentences.insert(0, "Means over the ten seconds.")
    return "\n".join([*lines, "", " ".join([*sentences, _sources([document], "../")])])


_PROFILED = ("bitfuse", "a repeat of bitfuse", "GELU: quack 128x208 pingpong")


def _sources(documents: list[dict[str, Any]], up: str = "") -> str:
    days: dict[str, set[str]] = {}  # of each machine
    for document in documents:
        machine, _, day = _machine(document["machine"]).rpartition(", ")
        days.setdefault(machine, set()).add(day)
    machines = (f"{machine}, {', '.join(sorted(of))}" for machine, of in days.items())
    links = ", ".join(f"[{Path(document['path']).name}]({up}{document['path']})" for document in documents)
    return f"{'; '.join(machines)} ({links})."


def roundings(document: dict[str, Any]) -> str:
    """The example of docs/exactness.md, step by step, and of how many numbers the same holds."""
    lines = ["| step | in binary | value | |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {r['what'].replace('*', chr(92) + '*')} | {r['bits']} | {r['value']} | {r['why']} |"
        for r in document["rows"]
    ]
    triples, differing = document["triples"], document["differing"]
    lines += [
        "",
        f"Of all {triples:,} triples of bf16 numbers from 1 to 2, {differing:,} ({differing / triples:.0%}) come out "
        "otherwise where the first rounding is left out ([JSON](../benchmarks/roundings.json), by "
        "`benchmarks/roundings.py`).",
    ]
    return "\n".join(lines)


def wrong_kernels(document: dict[str, Any], operator: str) -> str:
    """What became of the wrong kernels of an operator in a document of `verify`: a row for each kind, and its sums."""
    of_it = [control for control in document["controls"] if control["operator"] == operator]
    lines = ["| wrong kernels | caught | one of them, and what was found |", "| --- | --- | --- |"]
    for kind in dict.fromkeys(control["kind"] for control in of_it):
        ones = [control for control in of_it if control["kind"] == kind]
        caught = [control for control in ones if control["caught"]]
        example = f"`{ones[0]['mutant']}`: {ones[0]['found']}"
        lines.append(f"| {kind or 'listed by hand'} | {len(caught)} of {len(ones)} | {example} |")
    checks = [check for check in document["checks"] if check["operator"] == operator]
    equal = [check for check in checks if check["outcome"] == "equal"]
    lines += [
        "",
        f"`bitfuse verify` of `{operator}`: {len(equal)} of {len(checks)} cases equal in every bit, "
        f"{sum(check['elements'] for check in equal):,} elements; {sum(c['caught'] for c in of_it)} of {len(of_it)} "
        f"wrong kernels caught. {_sources([document], '../')}",
    ]
    return "\n".join(lines)


def newest_proof() -> dict[str, Any]:
    """The newest document of `verify` over all operators."""
    everything = {"operators": None, "cases": None, "deep": False, "host": None}
    found = [_load(path) for path in RESULTS.glob("*-verify.json")]
    return max((d for d in found if d.get("asked") == everything), key=lambda d: d["machine"]["date"])


def newest(name: str) -> dict[str, Any]:
    """The document of that name with the latest date in its file name (`<date>-<machine>-<name>.json`)."""
    return _load(max(RESULTS.glob(f"*-{name}.json")))


def newest_or_none(name: str) -> dict[str, Any] | None:
    """`newest`, or None where nothing of that name was measured yet."""
    return newest(name) if any(RESULTS.glob(f"*-{name}.json")) else None


def newest_of_each(name: str) -> list[dict[str, Any]]:
    """Of all documents whose names end so, the latest of each name: a measurement may take several days' commands."""
    latest = {path.name[len("2026-11-23-") :]: path for path in sorted(RESULTS.glob(f"*-{name}.json"))}
    return [_load(path) for path in sorted(latest.values())]


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) | {"path": path.relative_to(ROOT).as_posix()}


TABLES: dict[str, Callable[[], str]] = {
    "run table": lambda: whole_runs(newest_or_none("run"), alone=newest_or_none("first-decode")),
    "run stages table": lambda: whole_runs(newest_or_none("run"), 0.0, "../", newest_or_none("first-decode")),
    "first decode table": lambda: first_decode(newest("first-decode")),
    "decoder table": lambda: decoder([newest("video-decoder"), newest("ltx-core-decoder")], newest("run")),
    "encoder table": lambda: encoder(newest_or_none("video-encoder")),
    "diffusion decoder table": lambda: diffusion_decoder(newest("diffusion-decoder")),
    "diffusion decodes table": lambda: diffusion_decodes(newest("diffusion-decode")),
    "gelu table": lambda: gelu(newest("gelu-operators")),
    "comfyui table": lambda: comfyui(newest("comfyui")),
    "rotary table": lambda: rotary(newest("rotary")),
    "operators table": lambda: operators(newest_of_each("operators")),
    **{
        f"model table {version}": functools.partial(lambda version: model(newest_of_each("model"), version), version)
        for version in ("2.0", "2.3", "2.5")
    },
    "hosts table": lambda: hosts(newest_of_each("model"), newest_of_each("ranks")),
    "several GPUs table": lambda: several_gpus(newest_of_each("ranks")),
    "stacking times table": lambda: stacking_times(newest_of_each("stacking")),
    "compiled table": lambda: compiled(json.loads(COMPILED.read_text()), newest_or_none("compiled")),
    "linear orders table": lambda: linear_orders(newest("linear-turns")),
    "linear turns table": lambda: linear_turns(newest("linear-turns")),
    "linear step table": lambda: linear_one_step(newest("linear-turns")),
    "roundings table": lambda: roundings(json.loads(ROUNDINGS.read_text())),
    "wrong kernels table": lambda: wrong_kernels(newest_proof(), "gated_residual"),
    "linear gluon table": lambda: linear_gluon(newest("linear-gluon-layers"), newest("linear-gluon-steps")),
    "linear gluon steps table": lambda: linear_gluon_steps(newest("linear-gluon-steps")),
    "linear cublaslt table": lambda: linear_cublaslt(newest("linear-cublaslt")),
    "linear steps table": lambda: linear_steps(newest("linear-steps")),
    "linear power table": lambda: linear_power(newest("linear-steps")),
    "stacking table": lambda: stacking(json.loads(STACKING.read_text())),
    "compatibility table": lambda: compatibility(json.loads(COMPATIBILITY.read_text())),
}


def filled(page: str) -> str:
    """A page's text with what stands between the markers made anew."""
    names = "|".join(map(re.escape, TABLES))
    return re.sub(
        rf"(<!-- ({names}) -->\n).*?(\n<!-- end -->)",
        lambda m: m[1] + TABLES[m[2]]() + m[3],
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        before = path.read_text()
        path.write_text(filled(before))
        print(name, "unchanged" if path.read_text() == before else "filled", file=sys.stderr)
