"""What was fused in a model and what was not, for people and programs; and how long each site's calls take."""

from __future__ import annotations

import dataclasses
import html
import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bitfuse.hosts.site import Site
from bitfuse.run.audit import Auditor
from bitfuse.run.extra import Extra, Extras
from bitfuse.run.graphs import FIRST

_NUMBERS = _FUSED, _FALLEN, _SHARE = "calls fused", "fallen back", "time share"  # columns of the table


def kind_of(name: str) -> str:
    """A site's name with its block's number left open: `transformer_blocks.*.attn1`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@dataclass(frozen=True)
class Times:
    """Seconds of each site's calls, by its name, while something ran that took `total` seconds."""

    sites: dict[str, float]
    total: float


class Report:
    """What was fused of what was seen, and why the rest was not.

    A table in a terminal that rich prints to, in a notebook, and as text; `as_dict()` is for programs.
    """

    def __init__(
        self,
        host: str,
        sites: list[Site],
        graphs: list[Any] | None = None,
        auditor: Auditor | None = None,
        times: Times | None = None,
        extras: Extras | None = None,
    ):
        self.host = host
        self.sites = sites
        self.graphs = graphs or []
        self.auditor = auditor
        self.times = times
        self._extras = extras or Extras()

    @property
    def not_used(self) -> list[Extra]:
        """What was to be used besides the fused sites and was not, at some call at least, each with its reasons.

        Of a CUDA graph, the first call of a kind is none of them: it runs without one by design.
        """
        reasons: Counter[str] = Counter()
        for one in self.graphs:
            reasons.update({reason: count for reason, count in dict(one.reasons).items() if reason != FIRST})
        # copies, each made in one go in C: other threads may add reasons meanwhile
        graph = dataclasses.replace(self._extras.graph, reasons=reasons)
        extras = dataclasses.replace(self._extras, graph=graph)
        found = [dataclasses.replace(extra, reasons=Counter(dict(extra.reasons))) for extra in extras]
        return [extra for extra in found if extra.reasons]

    @property
    def seen(self) -> int:
        return len(self.sites)

    @property
    def fused(self) -> int:
        """Sites that ran the kernel at every call so far, but for one in which kernels were compiled."""
        return sum(site.state == "fused" for site in self.sites)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it. Times are in seconds, `time_share` from 0 to 1; both only where asked for.

        `audit` is None where it is off; `Auditor` says what is in it. `not_used` is empty where nothing was lost.
        """
        found: dict[str, Any] = {
            "host": self.host,
            "sites_seen": self.seen,
            "sites_fused": self.fused,
            "graphs": [
                {"captures": g.captures, "replays": g.replays, "calls_without": dict(g.reasons)} for g in self.graphs
            ],
            "audit": self.auditor.as_dict() if self.auditor else None,
            "not_used": [
                {"name": extra.name, "lost": extra.lost, "reasons": dict(extra.reasons)} for extra in self.not_used
            ],
            "sites": [self._site(site) for site in self.sites],
        }
        if self.times:
            found["seconds"] = self.times.total
        return found

    def _site(self, site: Site) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": site.name,
            "operator": site.operator,
            "state": site.state,
            "calls_fused": site.fused,
            "calls_fallen_back": sum(site.fallen.values()),
            "calls_compiling": site.compiling,
            "reasons": site.reasons,
            "tiers": sorted(site.tiers),
        }
        if self.times:
            found["seconds"] = self.times.sites.get(site.name, 0.0)
            found["time_share"] = found["seconds"] / self.times.total
        return found

    def kinds(self) -> list[dict[str, Any]]:
        """`as_dict()["sites"]` with the sites that differ in their block's number only as one row, counted.

        So 48 blocks show as one block does; their calls and times are summed.
        """
        kinds: dict[tuple, dict[str, Any]] = {}
        summed = (
            "calls_fused",
            "calls_fallen_back",
            "calls_compiling",
            *(("seconds", "time_share") if self.times else ()),
        )
        for site in map(self._site, self.sites):
            name = kind_of(site["name"])
            key = (name, site["operator"], site["state"], tuple(site["reasons"]), tuple(site["tiers"]))
            kind = kinds.setdefault(key, {**site, "name": name, "count": 0, **dict.fromkeys(summed, 0)})
            kind["count"] += 1
            for what in summed:
                kind[what] += site[what]
        return list(kinds.values())

    @property
    def title(self) -> str:
        return f"{self.fused} of {self.seen} sites fused in {self.host}"

    def __str__(self) -> str:
        kinds = self.kinds()
        width = max((len(kind["name"]) for kind in kinds), default=0)
        lines = [self.title]
        for kind in kinds:
            calls = f"{kind['calls_fused']} calls fused, {kind['calls_fallen_back']} not"
            share = f", {kind['time_share']:.1%} of the time" if self.times else ""
            why = f": {'; '.join(kind['reasons'])}" if kind["reasons"] else ""
            site = f"{kind['name']:<{width}}  {kind['count']:>3} x {kind['operator']}"
            tier = f" by {', '.join(kind['tiers'])}" if kind["tiers"] else ""
            lines.append(f"  {site}  {kind['state']}{tier} ({calls}{share}){why}")
        return "\n".join([*lines, *(f"  {note}" for note in self._notes())])

    __repr__ = __str__

    def __rich__(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text  # not markup: a reason may hold brackets

        columns, *rows = self._table()
        heads = zip(*(name.split(".")[:-1] for name, *_ in rows), strict=False)
        common = ".".join(parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, heads))
        table = Table(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in columns:
            narrow = column in _NUMBERS
            header = column.replace(" ", "\n") if narrow else column
            header = f"site of {common}" if common and column == "site" else header
            table.add_column(Text(header), overflow="fold", justify="right" if narrow else "left")
        for name, *rest in rows:
            table.add_row(*map(Text, (name.removeprefix(f"{common}."), *rest)))
        return Group(table, *map(Text, self._notes()))

    def _repr_html_(self) -> str:
        def row(tag: str, cells: list[str]) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

        columns, *rows = self._table()
        head = f"<caption>{html.escape(self.title)}</caption><thead>{row('th', columns)}</thead>"
        body = "".join(row("td", cells) for cells in rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return f"<table>{head}<tbody>{body}</tbody></table>{notes}"

    def _table(self) -> list[list[str]]:
        """The column's names, and a row for each kind; without the reasons where there is none."""
        share = [_SHARE] if self.times else []
        table = [["site", "operator", "tier", _FUSED, _FALLEN, *share, "reasons"]]
        for kind in self.kinds():
            name = f"{kind['name']} x {kind['count']}" if kind["count"] > 1 else kind["name"]
            calls = [str(kind["calls_fused"]), str(kind["calls_fallen_back"])]
            share = [f"{kind['time_share']:.1%}"] if self.times else []
            why = [kind["state"]] if kind["state"] in ("left alone", "not called yet") else []
            why += ["; ".join(kind["reasons"])] if kind["reasons"] else []
            table.append([name, kind["operator"], ", ".join(kind["tiers"]), *calls, *share, ": ".join(why)])
        return table if any(row[-1] for row in table[1:]) else [row[:-1] for row in table]

    def _notes(self) -> list[str]:
        notes = []
        for graph in self.graphs:  # replays run no Python, so the sites above don't count them
            notes.append(f"CUDA graph: {graph.captures} captured, {graph.replays} replays")
            if first := graph.reasons.get(FIRST, 0):  # all others are under "not used"
                notes.append(f"  {first} calls without: {FIRST}")
        for extra in self.not_used:
            notes.append(f"not used: {extra.name}, so {extra.lost}")
            notes += [f"  {count} x {reason}" for reason, count in extra.reasons.items()]
        if self.auditor:
            notes += str(self.auditor).splitlines()
            if self.graphs:
                notes.append(
                    "  replays of a CUDA graph run no Python and are not audited; "
                    "each graph is compared with the forward before its first use"
                )
        if self.times:
            sites = sum(self.times.sites.values())
            notes.append(f"time: {self.times.total:.4g} s in all, {sites:.4g} s at these sites")
            if not self.times.sites:
                notes.append("  no site was called: a CUDA graph was replayed, or something else ran")
        return notes


class Timer:
    """The time of each call at the sites that have this as their `timer`, fused or not, on the stream that it is on.

    On CUDA a call's time is that between two events around its kernels, so where the CPU sets the pace the GPU's
    waiting is in it; and what two streams do at the same time counts twice.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[str, torch.device, Any, Any]] = []

    def start(self, x: Any) -> Any:
        """What `stop` needs to know of a call that begins; None where it is not timed: a CUDA graph is captured."""
        return None if x.is_cuda and torch.cuda.is_current_stream_capturing() else _mark(x.device)

    def stop(self, name: str, x: Any, start: Any) -> None:
        self._spans.append((name, x.device, start, _mark(x.device)))

    def wait(self) -> None:
        """For every device that did some of it."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        for device in {device for _, device, _, _ in self._spans if device.type == "cuda"}:
            torch.cuda.synchronize(device)

    def seconds(self) -> dict[str, float]:
        """By the names of sites, once the devices are done."""
        found: Counter[str] = Counter()
        for name, device, before, after in self._spans:
            found[name] += before.elapsed_time(after) / 1000 if device.type == "cuda" else after - before
        return dict(found)


def measure(sites: list[Site], run: Callable[[], Any]) -> Times:
    """Run something once, and time it and each call at these sites. Waits for the device at the end only."""
    timer = Timer()
    for site in sites:
        site.timer = timer
    try:
        timer.wait()
        start = time.perf_counter()
        run()
        timer.wait()
        total = time.perf_counter() - start
    finally:
        for site in sites:
            site.timer = None
    return Times(timer.seconds(), total)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return event
