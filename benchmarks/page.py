"""docs/benchmarks.md and its plots, made from the committed JSON by `make readme`: nobody types a number.

A section whose results are not there yet is left out. `tests/test_benchmarks_page.py` fails while the page, or a plot,
and the JSON part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tables

PAGE = tables.ROOT / "docs" / "benchmarks.md"
PLOTS = tables.ROOT / "docs" / "plots"
LEAST = 0.01  # share of a run's time that a stage has at least which is drawn
Row = dict[str, Any]
WAYS = {"bitfuse": "bitfuse", "graph": "CUDA graph", "compiled + graph": "compiled, CUDA graph"}
OTHERS = {"compiled + graph": "compiled", "quality high": "tier high", "KJNodes": "KJNodes"}  # none has stock's bits


def picture(name: str, says: str) -> str:
    """A plot in a light and in a dark form, as GitHub and a site show them."""
    return (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="plots/{name}-dark.svg">\n'
        f'  <img alt="{says}" src="plots/{name}-light.svg">\n</picture>'
    )


def times(t: dict[str, float], unit: str = "ms") -> str:
    """Median and spread, to three digits: 10th to 90th percentile, or the least where that alone was kept."""
    if unit == "ms" and t["median"] >= 1e4:
        t, unit = {key: value / 1e3 for key, value in t.items()}, "s"
    spread = f"{_digits(t['p10'])} to {_digits(t['p90'])}" if "p10" in t else f"least {_digits(t['min'])}"
    return f"{_digits(t['median'])} {unit} ({spread})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def sources(*documents: Row) -> str:
    return tables._sources(list(documents), "../")


gpu = tables.gpu

# -- what the JSON has -------------------------------------------------------------------------------------------------


def a_run() -> tuple[Row, Row] | None:
    document = tables.newest_or_none("run")
    return (document, document["run"][0]) if document else None


def steps() -> list[tuple[Row, Row]]:
    """(document, row) of every step of text to video: its host's name, version, tokens and ways as `bench` has them."""
    found = [
        (document, {"host": "diffusers", **row})
        for document in tables.newest_of_each("model")
        for row in document.get("model", ())
        if not row.get("image_to_video")
    ]
    for document in tables.newest_of_each("comfyui"):
        for row in document["rows"]:
            more = {"host": "comfyui", "host_version": f"ComfyUI {document['machine']['comfyui']}"}
            more |= {"version": document["ltx"], "speed_ups": row["speedup"], "peak_gb": _comfyui_peaks(row)}
            found.append((document, {**row, **more, "mismatch": "; ".join(row["differs"].values()) or None}))
    return sorted(found, key=lambda pair: (_order(pair[1]), pair[1]["version"], pair[1]["tokens"]))


def _comfyui_peaks(row: Row) -> dict[str, float]:
    """The peaks of its ways. Of a graph none where what the graph holds was not counted: a replay allocates nearly
    nothing, so its peak alone would be less than what the graph takes."""
    peaks = {way: peak for way, peak in row["peak_gb_of_a_step"].items() if way != "graph"}
    if "graph_holds_gb" in row:
        peaks["graph"] = row["peak_gb_of_a_step"]["graph"] + row["graph_holds_gb"]
    return peaks


def _order(row: Row) -> int:
    return ("diffusers", "ltx-core", "sglang", "comfyui").index(row["host"])


def _name(row: Row) -> str:
    return f"{row['host_version']}, LTX-{row['version']}"


def unique(documents: list[Row]) -> list[Row]:
    return list({document["path"]: document for document in documents}.values())


# -- sections ----------------------------------------------------------------------------------------------------------


def claim() -> str:
    found = a_run()
    if found is None or found[1]["mismatch"]:
        return ""
    document, row = found
    machine, total = document["machine"], row["total"]
    return (
        f"**A whole two-stage LTX-{row['version']} run is {total['speed_up']:.2f}x as fast with bitfuse, every frame "
        f"and every sample identical: {machine['device']}, {machine['date'][:10]}.**"
    )


def whole_run() -> str:
    found = a_run()
    if found is None:
        return ""
    document, row = found
    whole = {"stage": "**a whole run**", "bits": row["mismatch"] or "equal", **row["total"]}
    rows = []
    for stage in [whole, *row["stages"]]:
        ratio = "-" if stage["speed_up"] is None else f"{stage['speed_up']:.2f}x"
        bits = {"equal": "identical", None: "-"}.get(stage["bits"], stage["bits"])
        rows.append([stage["stage"], *(times(stage["ms"][way]) for way in ("stock", "bitfuse")), ratio, bits])
    return "\n\n".join(
        [
            "## A whole run, by stage",
            picture("run", "Seconds of a whole run's stages, stock and with bitfuse"),
            table(["stage", "stock", "bitfuse", "", "output"], rows),
            f"LTX-{row['version']}, {row['geometry']}; {row['host_version']}, {min(row['runs'].values())} runs of each "
            "way by turns in one process, without the text encoder; both latents, frames and sound compared in each. "
            "`-`: nothing is handed out there that could be compared; what the next stages make of it is. What is a "
            "stage, and the decode alone: "
            f"[bench](bench.md). {sources(document)}",
        ]
    )


def steps_by_tokens() -> str:
    found = [(document, row) for document, row in steps() if "stock" in row["ms"]]
    if not found:
        return ""
    rows = []
    for document, row in found:
        cells = [_name(row), gpu(document), str(row["tokens"]), times(row["ms"]["stock"])]
        for way in ("bitfuse", "graph"):
            timed = way in row["ms"]
            cells.append(f"{times(row['ms'][way])}, {row['speed_ups'][way]:.2f}x" if timed else "-")
        other = next((way for way in OTHERS if way in row["ms"]), None)
        if other and not (row["peer_differs"] if other == "KJNodes" else row["differs_from_stock"][other]):
            raise ValueError(f"{_name(row)}, {row['tokens']} tokens: {other!r} has stock's bits, and no column here")
        cells.append(f"{OTHERS[other]}: {times(row['ms'][other])}" if other else "-")
        cells.append(f"{1e3 * row['ms']['bitfuse']['median'] / row['tokens']:.0f} us")
        rows.append([*cells, row["mismatch"] or "identical"])
    heads = [
        "host",
        "GPU",
        "tokens",
        "stock",
        "bitfuse",
        "CUDA graph",
        "other bits than stock's",
        "bitfuse, a token",
        "output",
    ]
    slower = [
        f"{_name(row)} at {row['tokens']} tokens ({row['speed_ups']['bitfuse']:.2f}x; "
        + (f"{row['speed_ups']['graph']:.2f}x with its graph)" if "graph" in row["ms"] else "no graph)")
        for _, row in found
        if row["speed_ups"]["bitfuse"] < 1
    ]
    said = f" Slower than stock without a graph: {', '.join(slower)}." if slower else ""
    return "\n\n".join(
        [
            "## A step, by the number of tokens",
            picture(
                "steps", "Milliseconds of a step of diffusers' LTX-2.0 transformer over the number of video tokens"
            ),
            picture("hosts", "Speed-up of a step over the host's own, over the number of video tokens, for each host"),
            table(heads, rows),
            "One step of the whole transformer on seeded weights, all ways of a row by turns in one process, its "
            "output compared with the host's stock step in the same run. SGLang's stock is its tier `exact`. The graph "
            "of diffusers' LTX-2.0 goes with `keep_text=True`. `compiled` is torch.compile with a CUDA graph, `tier "
            "high` SGLang's with all its fusions, `KJNodes` ComfyUI with the fused blocks of that node pack: each was "
            f"found to give other bits than stock.{said} Rows of different GPUs are no comparison of hosts. "
            f"{sources(*unique([document for document, _ in found]))}",
        ]
    )


def operators() -> str:
    documents = tables.newest_of_each("operators")
    chosen = of_operators(documents)
    if not chosen:
        return ""
    rows = []
    of = {id(row): gpu(document) for document in documents for row in document.get("operators", ())}
    for name, row in chosen.items():
        us = row["us"]
        cells = [f"`{name}`", of[id(row)], "x".join(map(str, row["x"]))]
        cells += [times(us["fused"], "us"), times(us["copy"], "us")]
        rows.append([*cells, f"{row['of_copy']:.0%}", times(us["eager"], "us"), f"{row['speed_up']:.1f}x"])
    return "\n\n".join(
        [
            "## Operators against a copy of the same bytes",
            picture("operators", "Speed of each operator as a share of a plain copy that moves the same bytes"),
            table(["operator", "GPU", "x", "fused", "the copy", "of its speed", "PyTorch chain", "speed-up"], rows),
            "One case of each, that of 768x512x121 where it has one; every size is in the JSON. With a cold L2, by "
            "turns, bits compared first in the same run. `layer_norm_modulate` leaves the LayerNorm to ATen. "
            f"{sources(*unique([document for document in documents if document.get('operators')]))}",
        ]
    )


def of_operators(documents: list[Row]) -> dict[str, Row]:
    """Of each operator the first case of the most work among those of 6144 tokens, else its first."""
    found: dict[str, list[Row]] = {}
    for row in tables._rows(documents, "operators"):
        if "us" in row:
            found.setdefault(row["operator"], []).append(row)
    return {
        name: next((r for r in rows if tables._flat(r["x"])[1:] == (6144, 4096)), rows[0])
        for name, rows in found.items()
        if all(len(r["x"]) >= 3 for r in rows)
    }


def memory() -> str:
    found = a_run()
    if found is None:
        return ""
    document, row = found
    rows = [
        [stage["stage"], *(_gb(stage["peak_gb"], way) for way in ("stock", "bitfuse")), _less(stage["peak_gb"])]
        for stage in [{"stage": "**a whole run**", **row["total"]}, *row["stages"]]
        if stage["peak_gb"]
    ]
    of_steps = [(d, r) for d, r in steps() if "stock" in r["peak_gb"]]
    more = [
        [
            *(_name(r), gpu(d), str(r["tokens"])),
            *(_gb(r["peak_gb"], way) for way in ("stock", "bitfuse")),
            *(_less(r["peak_gb"]), _gb(r["peak_gb"], "graph")),
        ]
        for d, r in of_steps
    ]
    notes = [f" {_name(r)}: {d['note']}." for d, r in of_steps if "note" in d]
    return "\n\n".join(
        [
            "## Memory",
            picture("memory", "Peak of memory of each stage of a whole run, stock and with bitfuse"),
            table(["stage", "stock", "bitfuse", ""], rows),
            f"The peak of a stage beyond the weights and what is kept to compare with. {sources(document)}",
            table(["a step of", "GPU", "tokens", "stock", "bitfuse", "", "with its CUDA graph"], more),
            "The peak of a step beyond the weights; a graph's pool of memory counts, and in diffusers' LTX-2.0 the "
            f"text that is kept beside it.{''.join(dict.fromkeys(notes))} "
            f"{sources(*unique([d for d, _ in of_steps]))}",
        ]
    )


def _gb(peak: dict[str, float], way: str) -> str:
    return f"{peak[way]:.2f} GB" if way in peak else "-"


def _less(peak: dict[str, float]) -> str:
    return f"{peak['bitfuse'] / peak['stock'] - 1:+.0%}"


def first_steps() -> list[tuple[Row, str, Row]]:
    """(document, what, row) of everything that was timed in fresh processes."""
    found = [
        (document, f"first step, LTX-{row['version']}, {row['layers']} layers, {row['tokens']} tokens", row)
        for document in tables.newest_of_each("first-step-model")
        for row in document["first_step"]
    ]
    if document := tables.newest_or_none("first-decode"):
        found.append((document, f"first decode, {document['size']}", _first_decode(document)))
    return found


def _first_decode(document: Row) -> Row:
    """Its medians, in the form of a first step's row."""
    processes: dict[str, Row] = {"stock": {"seconds": document["stock_s"]}}
    for caches, way in (("empty caches", "empty cache"), ("warm caches", "warm cache")):
        ones = [row for row in document["rows"] if row["process"] == way]
        if not all(row["equal"] for row in ones):
            raise ValueError(f"{document['path']}: a video of {way!r} is not stock's")
        middle = sorted(ones, key=lambda row: row["first_s"])[len(ones) // 2]
        processes[caches] = {"seconds": middle["first_s"], "proofs": middle["proofs"], "proofs_s": middle["proofs_s"]}
    beyond = {caches: processes[caches]["seconds"] - document["stock_s"] for caches in processes if caches != "stock"}
    return {"processes": processes, "beyond_stock_s": beyond, "mismatch": None}


def first() -> str:
    found = first_steps()
    if not found:
        return ""
    rows = []
    for document, what, row in found:
        stock = min(p["seconds"] for name, p in row["processes"].items() if name.startswith("stock"))
        for caches in ("empty caches", "warm caches"):
            process = row["processes"][caches]
            proofs = f"{process['proofs']} in {process['proofs_s']:.2f} s"
            rows.append([what, gpu(document), caches, f"{stock:.2f} s", f"{process['seconds']:.2f} s"])
            rows[-1] += [f"{row['beyond_stock_s'][caches]:+.2f} s", proofs, row["mismatch"] or "identical"]
    return "\n\n".join(
        [
            "## The first step of a process",
            picture("first", "Seconds that the first step and the first decode of a process take beyond stock's"),
            table(
                ["what", "GPU", "Triton's caches", "stock", "bitfuse", "beyond it", "proofs among it", "output"], rows
            ),
            "Each in a fresh process, from before `accelerate` to the end of the first step or decode; of the step one "
            "run of each, for stock the faster of two; of the decode the median of three ([decode](decode.md)). All "
            "layers of a model run the same kernels, so what a step takes beyond stock is that of 48 as well. The "
            "output is compared with that of the stock process by its SHA-256. "
            f"{sources(*unique([document for document, _, _ in found]))}",
        ]
    )


def energy() -> str:
    found = [(d, r) for d, r in steps() if "stock" in r.get("watts", {})]
    if not found:
        return ""
    rows = []
    for _, row in found:
        cells = [_name(row), str(row["tokens"])]
        joules = {way: row["watts"][way] * row["ms"][way]["median"] / 1e3 for way in row["watts"]}
        for way in ("stock", *WAYS):
            cells.append(f"{joules[way]:.0f} J ({row['watts'][way]} W)" if way in joules else "-")
        rows.append([*cells, f"{joules['bitfuse'] / joules['stock'] - 1:+.0%}"])
    return "\n\n".join(
        [
            "## Energy",
            picture("energy", "Joules of a step of diffusers' LTX-2.0 transformer, by the number of video tokens"),
            table(["a step of", "tokens", "stock", *WAYS.values(), "bitfuse over stock"], rows),
            "The card's own counter of energy over all the time in which a way stepped, as a mean power, times the "
            "median of a step. A way that keeps the card busy draws its limit, so that what it saves is time. "
            f"{sources(*unique([document for document, _ in found]))}",
        ]
    )


def proof() -> str:
    documents = [d for d in (tables.newest_or_none("verify"),) if d]
    audits = [(d, row) for d in tables.newest_of_each("audit-model") for row in d["audit"] if row["cost"] is not None]
    if not documents and not audits:
        return ""
    rows = []
    for document in documents:
        for part, what in (("checks", "cases of operators against PyTorch"), ("batteries", "batteries of kernels")):
            seconds, elements = (sum(row[key] for row in document[part]) for key in ("seconds", "elements"))
            rows.append([what, f"{len(document[part])}", f"{elements / 1e9:.2f} billion elements", f"{seconds:.1f} s"])
        caught = sum(row["caught"] is True for row in document["controls"])
        rows.append(["wrong kernels, made to be caught", f"{len(document['controls'])}", f"{caught} caught", "-"])
    for _, row in audits:
        ms = row["ms"]
        said = f"{times(ms['bitfuse'])} without, {times(ms['audited'])} with it"
        rows.append([f"`audit={row['every']}` in a step of {row['tokens']} tokens", "-", said, f"{row['cost']:+.2%}"])
    return "\n\n".join(
        [
            "## What proof costs",
            table(["what", "how many", "", "cost"], rows),
            "The first lines are `bitfuse verify`, run when somebody wants it; the proofs that a process makes of the "
            "kernels that it uses stand above, in its first step. An audit computes one fused call in so many "
            "again and compares it. "
            f"{sources(*documents, *unique([d for d, _ in audits]))}",
        ]
    )


# -- peers -------------------------------------------------------------------------------------------------------------

Cases = dict[tuple[str, str], dict[int | None, Row]]  # rows of an operator and a way, by the number of tokens


def peers() -> str:
    document = tables.newest_or_none("peers")
    if document is None:
        return ""
    cases: Cases = {}
    for row in document["rows"]:
        if "us" in row:
            cases.setdefault((row["operator"], row["way"]), {})[row["tokens"]] = row
    versions = ", ".join(f"{name} {version}" for name, version in document["peers"].items() if version)
    published = [[p["what"], p["published"], f"<{p['where']}>" if p["where"] else "-"] for p in _published()]
    return "\n\n".join(
        [
            "## Peers beside it",
            picture("peers", "Time of each peer's operator as a multiple of bitfuse's; full dots have eager's bits"),
            where_faster(document, cases),
            every_way(document, cases),
            "One process, by turns, with a cold L2. Full dots above, and `none` here, are equal to the PyTorch chain "
            "in every bit on these inputs, random and normal; that says nothing of others. Where no PyTorch chain is "
            f"timed ({_some(_emulated(document))}), none rounds so: the bits are those of an emulation of "
            "comfy-kitchen's kernel. bitfuse's time is that of the operator alone, outputs in new memory. A peer's "
            "has what it leaves to PyTorch: the norms where that is said, of SGLang's `head_gate` the sigmoid. Tables "
            "are made ready beforehand, but vLLM-Omni's `qk_rms_norm_grid_rotary` takes none and is given only the "
            "sizes of its grid. "
            f"The peers: {versions}. {sources(document)}",
            "Not timed here:\n\n" + "\n".join(f"- {line}" for line in not_timed(document)),
            "Published by others, measured elsewhere and not comparable with the times above:",
            table(["what", "published", "where"], published),
        ]
    )


OF_OURS = "of bitfuse's time"
OTHER_BITS = "elements with other bits than eager, at the worst size"


def _worst(cases: Cases) -> dict[tuple[str, str], Row]:
    return {of: max(found.values(), key=lambda row: row["share"]) for of, found in cases.items()}


def where_faster(document: Row, cases: Cases) -> str:
    """Every row in which a peer is faster: first those of peers that have eager's bits at every size."""
    worst = _worst(cases)
    timed = [r for r in document["rows"] if "ratio" in r and r["way"] not in ("bitfuse", "eager")]
    exact = [r for r in timed if not worst[r["operator"], r["way"]]["differ"]]
    ahead = sorted((r for r in timed if r["ratio"] < 1), key=lambda r: (r not in exact, r["ratio"]))
    said = (
        f"{len(timed)} times a peer was timed beside bitfuse (torch.compile in each of its modes is one, each size "
        f"counts), {len(exact)} times one that has eager's bits at every "
        f"size that was tried. Of these it is faster {sum(r in exact for r in ahead)} times, of the others "
        f"{sum(r not in exact for r in ahead)} times{_since(document) or ':'}"
    )
    rows = [
        [r["way"], f"`{r['operator']}`", "x".join(map(str, r["x"])), _ratio(r), _differ(worst[r["operator"], r["way"]])]
        for r in ahead
    ]
    return f"{said}\n\n{table(['faster than bitfuse', 'operator', 'x', OF_OURS, OTHER_BITS], rows)}"


def _since(peers: Row) -> str:
    """What operators of the peers' run take of their time since a later build, where two builds were compared."""
    builds = tables.newest_or_none("operators-of-two-builds")
    if builds is None or builds["machine"]["date"] < peers["machine"]["date"]:
        return ""
    ratios: dict[str, list[float]] = {}
    for row in builds["operators"]:
        if any(one["operator"] == row["operator"] for one in peers["rows"]):
            ratios.setdefault(row["operator"], []).append(row["new / old"])
    if not ratios:
        return ""
    said = ", ".join(f"`{name}` {min(found):.2f} to {max(found):.2f}" for name, found in ratios.items())
    return (
        f" (bitfuse's own operators were changed after these were timed, and take of their time now: {said}; "
        f"[{Path(builds['path']).name}](../{builds['path']}))."
    )


def every_way(document: Row, cases: Cases) -> str:
    """A row for each operator and way: the first size with its spread, then the others."""
    others = list(dict.fromkeys(row["tokens"] for row in document["rows"] if row["tokens"]))[1:]
    worst, rows, before = _worst(cases), [], ""
    for (operator, way), of in cases.items():
        first_row = next(iter(of.values()))
        name = "" if operator == before else f"`{operator}`, {'x'.join(map(str, first_row['x']))}"
        before = operator
        cells = [name, way, times(first_row["us"], "us"), _ratio(first_row)]
        for size in others:
            cells.append(f"{_digits(of[size]['us']['median'])} us, {_ratio(of[size])}" if size in of else "-")
        rows.append([*cells, _differ(worst[operator, way])])
    return table(["operator", "way", "time", OF_OURS, *(f"{n} tokens" for n in others), OTHER_BITS], rows)


def not_timed(document: Row) -> Iterator[str]:
    reasons: dict[str, dict[str, None]] = {}
    for row in document["rows"]:
        if "reason" in row and row["way"] != "eager":
            reasons.setdefault(f"{row['way']}: {row['reason']}", {})[row["operator"]] = None
    for why, of in reasons.items():
        yield f"{why} ({_some(list(of))})"
    for row in document["elsewhere"]:
        yield f"{row['peer']}: {row['reason']}"
    if "note" in document:
        yield document["note"]


def _emulated(document: Row) -> list[str]:
    """Operators that no PyTorch chain stands for."""
    return list(dict.fromkeys(r["operator"] for r in document["rows"] if r["way"] == "eager" and "reason" in r))


def _published() -> list[Row]:
    return json.loads((tables.ROOT / "benchmarks" / "published.json").read_text())


def _some(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) if len(names) <= 6 else f"{len(names)} operators"


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.2f}x" if "ratio" in row else "-"


def _differ(row: Row) -> str:
    share = row["share"]
    return f"{row['differ']} of {row['elements']}, {share:{'.1%' if share > 1e-3 else '.1e'}}" if share else "none"


# -- the page and its plots --------------------------------------------------------------------------------------------

SECTIONS: tuple[Callable[[], str], ...] = (
    claim, whole_run, steps_by_tokens, operators, memory, first, energy, proof, peers,
)  # fmt: skip
HEAD = """# Benchmarks

<!-- made by `make readme` from benchmarks/results: edit benchmarks/page.py -->"""
TAIL = """## How it was measured

`python benchmarks/session.py everything --out out --seconds 570` on a machine with a GPU, called again until it says
that all is done, measures all of this anew, and `make readme` makes the page. What stands here comes from several such
sittings: below each table are its GPU, its JSON and its day, of which bitfuse was as well. Every time of bitfuse's is
that of a result that was compared in every bit, in the same run: with the host's stock, or an operator with the PyTorch
chain ([bench](bench.md)). Times are medians, in brackets the 10th and the 90th percentile, between the two where there
were two, or the least alone."""


def page() -> str:
    return "\n\n".join([HEAD, *filter(None, (section() for section in SECTIONS)), TAIL]) + "\n"


def pictures() -> Iterator[tuple[str, str]]:
    """(file name, SVG) of every plot whose results are there."""
    import plots

    def both(name: str, draw: plots.Draw, width: float, height: float) -> Iterator[tuple[str, str]]:
        text = plots.svg(draw, width, height)
        yield f"{name}-light.svg", text
        yield f"{name}-dark.svg", plots.darkened(text)

    if run := a_run():
        whole = run[1]["total"]["ms"]["stock"]["median"]
        drawn = [stage for stage in run[1]["stages"] if stage["ms"]["stock"]["median"] >= LEAST * whole]
        bars: dict[str, dict[str, float]] = {}
        for way in ("stock", "bitfuse"):
            bars[way] = {stage["stage"]: stage["ms"][way]["median"] / 1e3 for stage in drawn}
            rest = run[1]["total"]["ms"][way]["median"] / 1e3 - sum(bars[way].values())
            bars[way]["the rest"] = max(rest, 0.0)
        yield from both("run", plots.stacked(bars, "s"), 8, 2.3)
        peaks = {stage["stage"]: stage["peak_gb"] for stage in run[1]["stages"] if stage["peak_gb"]}
        yield from both("memory", plots.grouped(peaks, "GB beyond the weights"), 8, 4.5)
    found = [row for _, row in steps()]
    of_diffusers = [row for row in found if row["host"] == "diffusers" and row["version"] == "2.0"]
    if of_diffusers:
        lines = {
            name: {row["tokens"]: row["ms"][way]["median"] for row in of_diffusers if way in row["ms"]}
            for way, name in {"stock": "stock", **WAYS}.items()
        }
        yield from both("steps", plots.curves(lines, "video tokens", "ms a step", [100, 200, 500, 1000, 2000]), 8, 3.6)
    if found:
        lines = {}
        for row in found:
            for way, name in (("bitfuse", ""), ("graph", ", CUDA graph")):
                if way in row["ms"]:
                    lines.setdefault(f"{_name(row)}{name}", {})[row["tokens"]] = row["speed_ups"][way]
        yield from both(
            "hosts",
            plots.curves(lines, "video tokens", "times as fast as stock", [1, 1.25, 1.5, 2, 3, 4], mark=1),
            8,
            4.5,
        )
    if chosen := of_operators(tables.newest_of_each("operators")):
        shares = {name: row["of_copy"] for name, row in chosen.items()}
        yield from both("operators", plots.ranked(shares, "speed against a copy of the same bytes", 1.0), 8, 6.5)
    if timed := first_steps():
        groups = {what: dict(row["beyond_stock_s"]) for _, what, row in timed}
        yield from both("first", plots.grouped(groups, "s beyond stock's"), 8, 2.4)
    with_energy = [row for row in of_diffusers if "stock" in row.get("watts", {})]
    if with_energy:
        joules = {
            f"{row['tokens']} tokens": {
                name: row["watts"][way] * row["ms"][way]["median"] / 1e3
                for way, name in {"stock": "stock", **WAYS}.items()
                if way in row["watts"]
            }
            for row in with_energy
        }
        yield from both("energy", plots.grouped(joules, "J a step", form="{:.0f}"), 8, 3.6)
    if document := tables.newest_or_none("peers"):
        beside: dict[str, list[tuple[str, float, bool]]] = {}
        drawn_at: dict[str, list[int]] = {}  # the first size that was tried
        differing = {(row["operator"], row["way"]) for row in document["rows"] if row.get("differ")}
        for row in document["rows"]:
            operator, way = row["operator"], row["way"]
            if "ratio" in row and way != "bitfuse" and row["x"] == drawn_at.setdefault(operator, row["x"]):
                exact = (operator, way) not in differing
                beside.setdefault(operator, []).append((way.partition(",")[0], row["ratio"], exact))
        yield from both("peers", plots.beside(beside, "time over bitfuse's"), 8, 6.0)


if __name__ == "__main__":
    PLOTS.mkdir(exist_ok=True)
    made = {PLOTS / name: text for name, text in pictures()} | {PAGE: page()}
    for path in set(PLOTS.glob("*.svg")) - set(made):
        path.unlink()  # of results that are gone
    for path, text in made.items():
        before = path.read_text() if path.is_file() else None
        path.write_text(text)
        print(path.relative_to(tables.ROOT), "unchanged" if before == text else "made", file=sys.stderr)
