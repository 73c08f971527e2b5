"""What bitfuse does besides fusing: where such an extra was to be used and was not, why, and what that cost.

The place that decides whether an extra is used calls `fall` where it is not; `hosts/report.py` shows the counts. What
was used is not counted: so a step in which every extra is used pays nothing for this. An extra that would bring nothing
(few tokens on a second stream) or can't be there (a CPU has no streams) has not fallen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from bitfuse.core.conditions import OFF


@dataclass
class Extra:
    """One extra of a handle.

    name       as reports name it
    lost       what is lost where it is not used, after "not used: <name>, so"
    reasons    how often it was not used, by the reason; of all reasons beyond `REASONS_KEPT` together
    """

    name: str
    lost: str
    reasons: Counter[str] = field(default_factory=Counter)

    REASONS_KEPT = 32  # as of a site: a reason may hold a name that a server sees ever more of
    OTHERS = "for another reason than those that are listed"

    def fall(self, reason: str) -> None:
        """Note that it was not used this time. Up to 100 blocks do so in a step: 0.2 us, without a lock."""
        reasons = self.reasons
        if reason not in reasons:
            if reason == OFF:  # nothing of bitfuse is to be used
                return
            if len(reasons) >= self.REASONS_KEPT:
                reason = self.OTHERS
            reasons.setdefault(reason, 0)
        reasons[reason] += 1  # no other thread comes in between: Python switches threads at calls and jumps back


@dataclass
class Extras:
    """Those of one handle. Each belongs to all of its models together."""

    graph: Extra = field(
        default_factory=lambda: Extra("CUDA graph", "the CPU launched these forwards' kernels one by one")
    )
    second_stream: Extra = field(
        default_factory=lambda: Extra(
            "second stream", "the audio half of these blocks did not run beside the video half"
        )
    )
    text: Extra = field(default_factory=lambda: Extra("kept text", "what a model makes of its text was computed again"))
    gelu: Extra = field(
        default_factory=lambda: Extra(
            "GELU in place", "PyTorch's GELU ran, and the widest tensor of a feed-forward was held twice"
        )
    )
    short_gelu: Extra = field(
        default_factory=lambda: Extra("short GELU", "PyTorch's GELU ran, which has more instructions")
    )

    tiles: Extra = field(
        default_factory=lambda: Extra("tiles blended at once", "the host blended a decode's tiles row by row")
    )

    def __iter__(self) -> Iterator[Extra]:
        return iter((self.graph, self.second_stream, self.text, self.gelu, self.short_gelu, self.tiles))
