"""One chain's roundings, worked out and drawn: pictures and numbers of docs/exactness.md.

    python benchmarks/roundings.py

The chain is the residual with its gate, x + y * gate in bf16. PyTorch runs it as two ops, so its result is rounded
twice; a fused kernel that leaves out the rounding between them gives other bits. All of it is arithmetic, so it is the
same on every machine: `tests/test_pages.py` computes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
FOUND = ROOT / "benchmarks" / "roundings.json"
PRECISION = 8  # significant bits of bf16, the first of them not stored

# y, gate and x of the example: of the triples that come out otherwise where r2 is left out, the first of those with the
# fewest bits set
EXAMPLE = tuple(Fraction(value) for value in ("129/128", "33/32", "1"))


# -- the arithmetic ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded:
    """A number before and after its rounding to bf16.

    unit     what the last bit that is kept counts
    beyond   what is cut off, in halves of that unit: below 1 the number is rounded down, above 1 up, at 1 to even
    """

    exact: Fraction
    value: Fraction
    unit: Fraction
    beyond: Fraction

    @property
    def why(self) -> str:
        """Why it is rounded in that way; the part that is cut off is counted in units of the last bit that is kept."""
        way = "down" if self.value < self.exact else "up"
        if self.beyond == 0:
            return "nothing is cut off"
        if self.beyond == 1:
            return f"exactly half: to the even one, {way}"
        return f"{'less' if self.beyond < 1 else 'more'} than half: {way}"


def rounded(exact: Fraction) -> Rounded:
    """To the nearest number of bf16, of two equally near ones to the even one; for a number from 1 on."""
    unit = Fraction(1)
    while exact / unit >= 2**PRECISION:
        unit *= 2
    while exact / unit < 2 ** (PRECISION - 1):
        unit /= 2
    steps, beyond = int(exact / unit), 2 * (exact / unit % 1)
    steps += beyond > 1 or (beyond == 1 and steps % 2)
    return Rounded(exact, steps * unit, unit, beyond)


def worked_out() -> dict[str, Rounded]:
    """The example, step by step: as two ops, and fused without the rounding between them."""
    y, gate, x = EXAMPLE
    product = rounded(y * gate)
    steps = {"product": product, "sum": rounded(x + product.value), "once": rounded(x + y * gate)}
    in_torch = [torch.tensor(float(value), dtype=torch.bfloat16) for value in EXAMPLE]
    assert (in_torch[2] + in_torch[0] * in_torch[1]).item() == steps["sum"].value, "PyTorch's own two ops"
    return steps


def over_all_triples() -> tuple[int, int]:
    """How many triples of bf16 numbers from 1 to 2 there are, and of how many one rounding gives another number than
    two. (The exact sum fits into fp32, so a kernel without the first rounding rounds once, with or without an FMA.)"""
    numbers = (torch.arange(2 ** (PRECISION - 1), 2**PRECISION) / 2 ** (PRECISION - 1)).bfloat16()
    y, gate, x = numbers[:, None, None], numbers[None, :, None], numbers[None, None, :]
    twice = x + y * gate
    once = (x.float() + y.float() * gate.float()).bfloat16()
    return twice.numel(), int((twice != once).sum())


def found() -> dict[str, Any]:
    steps, (triples, differing) = worked_out(), over_all_triples()
    y, gate, x = EXAMPLE
    rows = [_row("y", y), _row("gate", gate), _row("y * gate", steps["product"].exact)]
    rows += [_row("r2: rounded", steps["product"].value, steps["product"].why), _row("x", x)]
    rows += [_row("x + that", steps["sum"].exact), _row("r4: rounded", steps["sum"].value, steps["sum"].why)]
    rows += [_row("x + y * gate, without r2", steps["once"].exact)]
    rows += [_row("rounded once", steps["once"].value, steps["once"].why)]
    return {"rows": rows, "triples": triples, "differing": differing}


def _row(what: str, value: Fraction, why: str = "") -> dict[str, Any]:
    return {"what": what, "value": float(value), "bits": binary(value), "why": why}


def binary(value: Fraction) -> str:
    """A positive number in binary, as 10.0000101: exactly."""
    whole, part = divmod(value, 1)
    digits = ""
    while part:
        bit, part = divmod(part * 2, 1)
        digits += str(int(bit))
    return f"{int(whole):b}.{digits or '0'}"


def pattern(value: Fraction) -> str:
    """Its bits as bf16, as they lie in memory."""
    return f"0x{torch.tensor(float(value), dtype=torch.bfloat16).view(torch.int16).item():04x}"


# -- the pictures ------------------------------------------------------------------------------------------------------

# One file for both: what shows the picture says whether it is light or dark
STYLE = """
.card{fill:#ffffff;stroke:#d5dbe1} .ink{fill:#1f2933} .soft{fill:#5b6773} .box{fill:#f3f5f7;stroke:#8a96a3}
.memory{fill:#e3e8ee;stroke:#8a96a3} .round{fill:#fde7c7;stroke:#b8741a} .right{fill:#1b7a43} .wrong{fill:#b3261e}
.kept{fill:#dcebfb;stroke:#8a96a3} .cut{fill:#fde7c7;stroke:#b8741a} .line{stroke:#8a96a3;fill:none}
@media (prefers-color-scheme: dark){
.card{fill:#1c232b;stroke:#3a4653} .ink{fill:#e6ebf0} .soft{fill:#a3b0bd} .box{fill:#28323c;stroke:#6d7b89}
.memory{fill:#35414d;stroke:#6d7b89} .round{fill:#5b4014;stroke:#d99a3d} .right{fill:#6fd39b} .wrong{fill:#ff8a80}
.kept{fill:#1f3f5f;stroke:#6d7b89} .cut{fill:#5b4014;stroke:#d99a3d} .line{stroke:#6d7b89}
}"""


def _text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "middle", more: str = "") -> str:
    words = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}"{more}>{words}</text>'


def _box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{kind}"/>'


def _picture(width: int, height: int, what: str, parts: Iterable[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
    head += f'font-size="13" role="img" aria-label="{what}">\n<style>{STYLE}\n</style>'
    return "\n".join([head, _box(0.5, 0.5, width - 1, height - 1, "card"), *parts, "</svg>", ""])


def drawn_chain() -> str:
    """Three ways to compute the chain, side by side, with the example's numbers at every step."""
    s = worked_out()
    y, gate, _ = map(float, EXAMPLE)
    load = ("memory", f"load {y} and {gate}")
    times = ("box", f"y * gate = {float(s['product'].exact)}")
    r2 = ("round", f"r2: to bf16 = {float(s['product'].value)}")
    plus = ("box", f"+ x = {float(s['sum'].exact)}")
    r4 = ("round", f"r4: to bf16 = {float(s['sum'].value)}")
    ways = {
        "PyTorch: two ops": [
            *(load, times, r2, ("memory", "store it; load it again, and x"), plus, r4, ("memory", "store"))
        ],
        "a naive fused kernel": [
            *(load, times, ("box", f"+ x = {float(s['once'].exact)}")),
            *(("round", f"to bf16 = {float(s['once'].value)}"), ("memory", "store")),
        ],
        "bitfuse: one kernel": [load, times, r2, plus, r4, ("memory", "store")],
    }
    width, step, results = 246, 44, {"a naive fused kernel": s["once"].value}
    parts = []
    for column, (title, steps) in enumerate(ways.items()):
        left = 16 + column * (width + 16)
        middle = left + width / 2
        parts.append(_text(middle, 30, title, more=' font-weight="bold"'))
        for row, (kind, words) in enumerate(steps):
            top = 46 + row * step
            if row:
                parts.append(f'<path d="M{middle:g},{top - 14} V{top}" class="line"/>')
            parts += [_box(left, top, width, 30, kind), _text(middle, top + 20, words)]
        value = results.get(title, s["sum"].value)
        same = value == s["sum"].value
        said = f"{float(value)}, {pattern(value)}" + ("" if same else ": another number")
        parts.append(_text(middle, 46 + 7 * step + 16, said, "right" if same else "wrong", more=' font-weight="bold"'))
    return _picture(16 + 3 * (width + 16), 46 + 7 * step + 34, "x + y * gate, computed in three ways", parts)


def drawn_bits() -> str:
    """The example in binary, one cell a bit: what is kept at each rounding, and what is cut off."""
    s = worked_out()
    y, gate, x = EXAMPLE
    plain: list[tuple[str, Fraction, Fraction | None, str]] = [
        ("y", y, None, ""),
        ("gate", gate, None, ""),
        ("y * gate", s["product"].exact, s["product"].unit, s["product"].why),
        ("r2", s["product"].value, None, ""),
        ("x", x, None, ""),
        ("x + r2", s["sum"].exact, s["sum"].unit, s["sum"].why),
        ("r4", s["sum"].value, None, f"PyTorch and bitfuse: {pattern(s['sum'].value)}"),
        ("x + y * gate", s["once"].exact, s["once"].unit, s["once"].why),
        ("rounded once", s["once"].value, None, f"the naive kernel: {pattern(s['once'].value)}"),
    ]
    cell, left, parts = 21, 112, []
    last = max(len(binary(value).partition(".")[2]) for _, value, _, _ in plain)
    for row, (name, value, unit, why) in enumerate(plain):
        top = 18 + row * 34 + (row > 6) * 14
        whole, _, part = binary(value).partition(".")
        part = part.ljust(PRECISION - len(whole), "0")  # what bf16 keeps, though it be zeros
        parts.append(_text(left - 12, top + 17, name, anchor="end"))
        for place, bit in enumerate(whole.rjust(2)):
            at = left + place * cell
            parts += [] if bit == " " else [_box(at, top, cell - 2, 24, "kept"), _bit(at, top, bit)]
        parts.append(_text(left + 2 * cell + 2, top + 18, ".", anchor="middle"))
        for place, bit in enumerate(part):
            at = left + 6 + (2 + place) * cell
            cut = unit is not None and Fraction(1, 2 ** (place + 1)) < unit
            parts += [_box(at, top, cell - 2, 24, "cut" if cut else "kept"), _bit(at, top, bit)]
        beside = left + 6 + (2 + last) * cell + 12
        kind = {"r4": "right", "rounded once": "wrong"}.get(name, "soft")
        decimal = str(float(value))
        parts.append(_text(beside, top + 17, decimal, anchor="start"))
        parts.append(_text(beside + 134, top + 17, why, kind, anchor="start"))
    top = 18 + 7 * 34 - 1
    parts.append(f'<path d="M16,{top} H824" class="line" stroke-dasharray="4 4"/>')
    return _picture(840, 18 + 9 * 34 + 22, "the example in binary: what each rounding keeps and cuts off", parts)


def _bit(x: float, y: float, bit: str) -> str:
    return _text(x + 9.5, y + 17, bit, more=' font-family="monospace"')


PICTURES: dict[str, Callable[[], str]] = {"roundings-chain.svg": drawn_chain, "roundings-bits.svg": drawn_bits}
"""Of the page, in docs."""


def main() -> None:
    FOUND.write_text(json.dumps(found(), indent=1) + "\n")
    for name, drawn in PICTURES.items():
        (ROOT / "docs" / name).write_text(drawn())


if __name__ == "__main__":
    main()
