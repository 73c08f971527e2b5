"""Fill the README's tables from the JSON in benchmarks/results: nobody types a number.

Run `make readme`; `tests/test_readme.py` fails while the README and the JSON part.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHOWN = ([1, 6144, 4096], [1, 24576, 4096], [1, 6144, 2048], [1, 126, 2048])  # the others are in the JSON


def rotary(document: dict[str, Any]) -> str:
    """The newest rotary benchmark as the README's table and the sentences under it."""
    machine = document["machine"]
    lines = [
        "| rotary embedding, x in bf16 | fused | of a plain copy's speed | PyTorch chain | speed-up |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in document["operators"]:
        if row["x"] not in SHOWN:
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
        stock, fused = (f"{t['median']:.0f} ms ({t['p10']:.0f} to {t['p90']:.0f})" for t in row["ms"].values())
        lines.append(
            f"| {row['tokens']} video tokens, {row['layers']} layers, output identical in every bit | "
            f"{stock} | {fused} | {row['speed_up']:.2f}x |"
        )
    overhead = document["overhead"][0]
    us = overhead["us"]
    lines += [
        "",
        f"{machine['device']}, driver {machine['driver']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"diffusers {machine['diffusers']}, {machine['date'][:10]}; medians (10th to 90th "
        f"percentile), cold L2, bits compared first in the same "
        f"run ([JSON with spreads]({document['path']})). On the CPU a routed call takes "
        f"{us['routed call']['median']:.0f} us, a bare Triton launch with its allocation "
        f"{us['allocation and bare Triton launch']['median']:.0f} us, the PyTorch chain "
        f"{us['eager chain']['median']:.0f} us.",
    ]
    return "\n".join(lines)


def newest(name: str) -> dict[str, Any]:
    """The document of that name with the latest date in its file name (`<date>-<machine>-<name>.json`)."""
    path = max(RESULTS.glob(f"*-{name}.json"))
    return json.loads(path.read_text()) | {"path": path.relative_to(ROOT).as_posix()}


def filled(readme: str) -> str:
    """The README's text with what stands between the markers made anew."""
    return re.sub(
        r"(<!-- rotary table -->\n).*?(\n<!-- end -->)",
        lambda m: m[1] + rotary(newest("rotary")) + m[2],
        readme,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    path = ROOT / "README.md"
    before = path.read_text()
    path.write_text(filled(before))
    print("README.md", "unchanged" if path.read_text() == before else "filled", file=sys.stderr)
