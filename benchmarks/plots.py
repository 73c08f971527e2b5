"""Plots of docs/benchmarks.md from rows of the committed JSON: SVG, for a light and for a dark page.

The same rows give the same bytes on any machine with the matplotlib of constraints.txt: text stays text, in whatever
sans-serif font a reader has; nothing says when or by whom it was drawn; ids are numbered as they come, and coordinates
are rounded to hundredths, since the last digits of a float are its processor's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#1f2328", "#d0d7de"  # of text and axes, and of grids, on a light page
DARK = {INK: "#e6edf3", FAINT: "#3d444d"}  # what they are on a dark one
COLORS = {  # of ways and peers, told apart by their lightness too
    "stock": "#8c959f",
    "eager": "#8c959f",
    "bitfuse": "#2da44e",
    "CUDA graph": "#0a7d6b",
    "compiled, CUDA graph": "#bf5af2",
    "torch.compile": "#bf5af2",
    "SGLang": "#e36209",
    "vLLM-Omni": "#0969da",
    "comfy-kitchen": "#d4a72c",
    "KJNodes": "#cf222e",
    "quack": "#57606a",
}
PALETTE = ("#2da44e", "#0969da", "#bf5af2", "#e36209", "#d4a72c", "#cf222e", "#8c959f")
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bitfuse",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial"],  # the first, which comes with matplotlib, measures the text
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

Draw = Callable[[Axes], None]


def svg(draw: Draw, width: float, height: float) -> str:
    """One plot for a light page, `width` x `height` inches."""
    colors = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **RC, **colors, "grid.color": FAINT}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return stable(out.getvalue())


def darkened(text: str) -> str:
    """The same plot for a dark page."""
    for light, dark in DARK.items():
        text = text.replace(light, dark)
    return text


def stable(text: str) -> str:
    """The same picture with numbered ids and rounded coordinates."""
    numbers: dict[str, str] = {}
    text = re.sub(r"\b([mpCh])([0-9a-f]{10})\b", lambda m: numbers.setdefault(m[0], f"{m[1]}{len(numbers)}"), text)
    text = re.sub(r" <metadata>.*?</metadata>\n", "", text, flags=re.DOTALL)
    text = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".replace("-0.00", "0.00"), text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


# -- plots: each takes plain numbers and gives what draws them ---------------------------------------------------------


def stacked(bars: dict[str, dict[str, float]], unit: str) -> Draw:
    """Horizontal bars, each made of named parts: of the ways of a run, the seconds of its stages."""
    parts = list(dict.fromkeys(name for bar in bars.values() for name in bar))

    def draw(axes: Axes) -> None:
        for index, bar in enumerate(bars.values()):
            left = 0.0
            for part, color in zip(parts, PALETTE, strict=False):
                value = bar.get(part, 0.0)
                axes.barh(-index, value, left=left, color=color, label=part if index == 0 else None, height=0.6)
                left += value
            axes.text(left, -index, f" {left:.2f} {unit}", va="center", color=INK)
        axes.set_yticks([-index for index in range(len(bars))], list(bars))
        axes.set_xlim(0, 1.12 * max(sum(bar.values()) for bar in bars.values()))
        axes.set_xlabel(unit)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=5, fontsize=9)

    return draw


def grouped(groups: dict[str, dict[str, float]], unit: str, form: str = "{:.1f}") -> Draw:
    """Horizontal bars side by side: for each name a bar for each way."""
    ways = list(dict.fromkeys(way for group in groups.values() for way in group))

    def draw(axes: Axes) -> None:
        height = 0.8 / len(ways)
        for place, way in enumerate(ways):
            for index, group in enumerate(groups.values()):
                if way in group:
                    y = -index - (place - (len(ways) - 1) / 2) * height
                    label = way if index == next(i for i, g in enumerate(groups.values()) if way in g) else None
                    color = COLORS.get(way, PALETTE[place])
                    axes.barh(y, group[way], height=0.9 * height, color=color, label=label)
                    axes.text(group[way], y, " " + form.format(group[way]), va="center", fontsize=8, color=INK)
        axes.set_yticks([-index for index in range(len(groups))], list(groups))
        axes.margins(x=0.12)
        axes.set_xlabel(unit)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=len(ways), fontsize=9)

    return draw


def curves(lines: dict[str, dict[int, float]], x: str, y: str, ticks: list[float], mark: float | None = None) -> Draw:
    """Lines over numbers of tokens, both axes logarithmic; one with ", CUDA graph" in its name is dashed, in the color
    of the line of the same name without it. `mark`: a dotted line at this value."""
    names = list(dict.fromkeys(name.removesuffix(DASHED) for name in lines))

    def draw(axes: Axes) -> None:
        for name, points in lines.items():
            whose = name.removesuffix(DASHED)
            color, style = COLORS.get(name) or PALETTE[names.index(whose)], "--" if name != whose else "-"
            axes.plot(list(points), list(points.values()), style, marker="o", markersize=4, color=color, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        tokens = sorted({n for points in lines.values() for n in points})
        axes.set_xticks(tokens, [str(n) for n in tokens])
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        if mark is not None:
            axes.axhline(mark, color=INK, linewidth=0.8, linestyle=":")
        axes.grid(axis="y", linewidth=0.5)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(fontsize=9)

    return draw


DASHED = ", CUDA graph"


def ranked(values: dict[str, float], x: str, mark: float) -> Draw:
    """Dots, the largest on top, and a line at `mark`."""

    def draw(axes: Axes) -> None:
        names = sorted(values, key=lambda name: values[name])
        axes.hlines(range(len(names)), 0, [values[name] for name in names], color=COLORS["bitfuse"], linewidth=1)
        axes.plot([values[name] for name in names], range(len(names)), "o", color=COLORS["bitfuse"], markersize=5)
        for index, name in enumerate(names):
            axes.text(values[name], index, f"  {values[name]:.0%}", va="center", fontsize=8, color=INK)
        axes.axvline(mark, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(0, 1.2 * max(values.values()))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel(x)

    return draw


def beside(rows: dict[str, list[tuple[str, float, bool]]], x: str) -> Draw:
    """For each operator (peer, time as a multiple of bitfuse's, whether its bits are eager's): full where they are."""

    def draw(axes: Axes) -> None:
        seen: set[str] = set()
        for index, found in enumerate(rows.values()):
            for peer, ratio, exact in found:
                color = COLORS[peer]
                face = color if exact else "none"
                if peer not in seen:  # full in the legend, whichever comes first
                    axes.scatter([], [], s=36, color=color, label=peer)
                seen.add(peer)
                axes.scatter(ratio, -index, s=36, facecolors=face, edgecolors=color, zorder=3)
        axes.scatter([], [], s=36, facecolors="none", edgecolors=INK, label="other bits than eager's")
        axes.axvline(1, color=COLORS["bitfuse"], linewidth=1.2, label="bitfuse")
        axes.set_yticks([-index for index in range(len(rows))], list(rows), fontsize=8)
        axes.grid(axis="y", linewidth=0.5)
        axes.set_xscale("log", base=2)
        ticks = [0.5, 1, 2, 4, 8, 16, 32]
        largest = max(ratio for found in rows.values() for _, ratio, _ in found)
        axes.set_xticks([t for t in ticks if t <= largest], [f"{t:g}x" for t in ticks if t <= largest])
        axes.minorticks_off()
        axes.set_xlabel(x)
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4, fontsize=8, columnspacing=1, handletextpad=0.3
        )

    return draw
