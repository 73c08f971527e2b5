"""Linear layers with what follows them in one kernel: bits, and times by turns, against what bitfuse runs.

    python benchmarks/linear.py --out out/linear.json                    # on a Hopper GPU, some four minutes
    TRITON_INTERPRET=1 python benchmarks/linear.py --tiny --out FILE     # without one: everything but Gluon, tiny

Parts, in this order, and FILE is written after each, so that a run that is cut off leaves what it has:

    trial    every kernel on small shapes, in a process of its own that is ended where it hangs; who fails sits out
    gelu     all 65,536 values through GELU, in several spellings
    core     the model of the tensor core (`bitfuse.core.tensor_core`) against wgmma and cuBLAS
    shapes   the layers of an LTX-2 step: each way's outputs compared with stock's in every bit, then timed
    chain    feed-forwards of four blocks end to end, in one CUDA graph a way, by turns
    steady   one layer again and again for 1.5 s: at the power limit time is energy, which turns of milliseconds hide
    proof    what `bitfuse.tools.prove.linear` says of these kernels at the sizes of a step, and how long it takes
    orders   where cuBLAS adds along K as one chain (`bitfuse.tools.prove.summation`), M from 1 to 300, K to 16384

A way whose bits differ gets no time. Times are of CUDA graphs, milliseconds, medians over rounds in which all ways
take turns on random data.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import os
import select
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import linear_triton as lt
import torch
import torch.nn.functional as F
from torch import Tensor

import bitfuse.ops  # noqa: F401  (defines the operators)
from bitfuse.core.bits import differing
from bitfuse.core.kernel import interpreting
from bitfuse.core.tensor_core import HOPPER
from bitfuse.ops.adaln import GATED_RESIDUAL, RMS_NORM_MODULATE_COMPOSED
from bitfuse.ops.gelu import GELU_TANH, in_place
from bitfuse.tools.machine import machine
from bitfuse.tools.prove.linear import difference as linear_difference
from bitfuse.tools.prove.linear import follow
from bitfuse.tools.prove.summation import difference

PARTS = ("trial", "gelu", "core", "shapes", "chain", "steady", "proof", "orders")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = torch.bfloat16
EPILOGUES = {"plain": lt.PLAIN, "gelu": lt.GELU, "gated": lt.GATED}


class Layer(NamedTuple):
    """The tensors of a linear layer and of what follows it."""

    x: Tensor  # [M, K]
    w: Tensor  # [N, K]
    bias: Tensor  # [N]
    residual: Tensor  # [M, N]
    gate: Tensor  # [N]
    y: Tensor  # [M, N], written by kernels


def layer(m: int, n: int, k: int, *, exact: bool = False) -> Layer:
    """Random; `exact`: of few bits, so that every order of additions gives the same (for the interpreter)."""

    def of(*shape: int, scale: float = 1.0) -> Tensor:
        if exact:
            return torch.randint(-1, 2, shape, device=DEVICE).to(BF16)
        return (torch.randn(shape, device=DEVICE) * scale).to(BF16)

    return Layer(of(m, k), of(n, k, scale=0.02), of(n), of(m, n), of(n), torch.empty(m, n, dtype=BF16, device=DEVICE))


# -- ways --------------------------------------------------------------------------------------------------------------

Call = Callable[[], Tensor]


def stock(given: Layer, epilogue: str) -> Tensor:
    """The hosts' ops, one after another."""
    y = F.linear(given.x, given.w, given.bias)
    return y if epilogue == "plain" else follow(y, given, epilogue)


def today(given: Layer, epilogue: str) -> Tensor:
    """What bitfuse ran without this, until it had a GELU of its own: `with_own_gelu` has that, too."""
    y = F.linear(given.x, given.w, given.bias)
    if epilogue == "gelu":
        return aten_gelu(y)
    if epilogue == "gated":
        return GATED_RESIDUAL(given.residual[None], y[None], given.gate[None, None])[0]
    return y


def without_kernels(given: Layer, epilogue: str) -> dict[str, Call]:
    """The ways in which no kernel of this experiment takes part."""
    return {
        "F.linear": lambda: F.linear(given.x, given.w, given.bias),
        "stock": lambda: stock(given, epilogue),
        "today": lambda: today(given, epilogue),
    }


OWN = "F.linear, own GELU"


def with_own_gelu(given: Layer, epilogue: str) -> dict[str, Call]:
    """These, and what bitfuse runs since it has a GELU of its own."""
    calls = without_kernels(given, epilogue)
    if epilogue == "gelu":
        calls[OWN] = lambda: own_gelu(F.linear(given.x, given.w, given.bias))
    return calls


def aten_gelu(y: Tensor) -> Tensor:
    """GELU into the memory of its input, as bitfuse had it before `ops/gelu.py`."""
    return torch.ops.aten.gelu_(y, approximate="tanh")


def own_gelu(y: Tensor) -> Tensor:
    """As it has it since."""
    return in_place(y) if GELU_TANH.routed(y).fused else aten_gelu(y)


_ON_REGISTERS = ("pingpong", "together", "thirds")


class Way(NamedTuple):
    """One kernel in one configuration. Kinds besides those named here: `linear_gluon_pingpong.TILES`."""

    kind: str  # "persistent" or "once" in Triton; "deferred" in Gluon, or "halves", of which each has warps of its own
    tile: tuple[int, int, int]
    warps: int
    stages: int
    group: int = 8

    @property
    def name(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.tile))} w{self.warps} s{self.stages} g{self.group}"

    def fits(self, n: int, k: int) -> bool:
        return n % self.tile[1] == 0 and k % self.tile[2] == 0

    def has(self, epilogue: str) -> bool:
        """Whether this may follow."""
        return epilogue != "gated" or self.kind not in _ON_REGISTERS

    def call(self, given: Layer, epilogue: str) -> Call:
        """Prepared: compiled at the first call."""
        arguments = (given.x, given.w, given.bias, given.y, given.residual, given.gate, EPILOGUES[epilogue])
        if self.kind in ("deferred", "halves"):
            import linear_gluon as lg

            parts = 1 if self.kind == "deferred" else 2
            how = {"parts": parts, "group": self.group, "programs": multiprocessors()}
            kernel, grid, args, options = lg.deferred(*arguments, self.tile, self.stages, **how)
            run = functools.partial(kernel[grid], *args, **options)
        elif self.kind in _ON_REGISTERS:
            import linear_gluon_pingpong as lp

            kernel, grid, args, options = lp.launch(
                self.kind, given.x, given.w, given.bias, given.y, EPILOGUES[epilogue], self.tile, self.stages,
                group=self.group, programs=multiprocessors(),
            )  # fmt: skip
            run = functools.partial(kernel[grid], *args, **options)
        else:
            form = getattr(lt, self.kind)
            kernel, grid, args, options = lt.launch(
                form, *arguments, self.tile, self.warps, self.stages, group=self.group, programs=multiprocessors()
            )
            if interpreting():
                run = functools.partial(kernel.interpreted[grid], *args)
            else:
                run = functools.partial(kernel.compiled[grid], *args, **options)

        def call() -> Tensor:
            run()
            return given.y

        return call


@functools.cache
def multiprocessors() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count if DEVICE.type == "cuda" else 4


ON_REGISTERS = (
    Way("thirds", (192, 256, 64), 12, 3, 16),
    Way("thirds", (192, 256, 64), 12, 3),
    Way("together", (192, 256, 64), 8, 3, 16),
    Way("pingpong", (192, 128, 64), 8, 4, 16),
)
LARGE = (
    Way("halves", (128, 256, 64), 4, 3),
    Way("halves", (128, 256, 64), 4, 3, 16),
    Way("halves", (128, 256, 32), 4, 6),
    Way("halves", (128, 128, 64), 4, 5),
    Way("deferred", (128, 256, 64), 8, 3),
    Way("deferred", (128, 256, 32), 8, 6),
    Way("persistent", (128, 256, 64), 8, 3),
    Way("once", (128, 256, 64), 8, 4),
    Way("once", (128, 128, 64), 4, 3),
    Way("once", (128, 128, 64), 8, 3),
    Way("deferred", (128, 128, 64), 8, 5),
    *ON_REGISTERS,
)
SMALL = (
    Way("once", (64, 64, 64), 4, 4),
    Way("once", (128, 64, 64), 4, 4),
    Way("once", (64, 32, 64), 4, 6),
    Way("once", (128, 32, 128), 4, 4),
)
TINY = (Way("persistent", (32, 32, 16), 4, 2), Way("once", (32, 16, 16), 4, 2))


def unequal(found: Tensor, wanted: Tensor) -> int:
    return int(differing(wanted, found).sum())


# -- parts -------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    tiny: bool
    results: dict[str, Any]
    out: Path | None
    kinds: tuple[str, ...] = ()  # of ways; () for all
    cases: tuple[str, ...] = ("",)  # beginnings of the names of layers
    patience: float = 60.0  # seconds for one way of the trial, compilation included

    def ways(self, some: tuple[Way, ...]) -> list[Way]:
        return [way for way in some if not self.kinds or way.kind in self.kinds]

    def keep(self, part: str, found: Any) -> None:
        self.results[part] = found
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def works(self, way: Way) -> bool:
        """Whether the trial found it right; without a trial every way is tried."""
        trial = self.results.get("trial")
        return trial is None or trial.get(way.name) == "equal"


_TRIALS = ((640, 1024, 512), (4000, 4096, 1024))  # several tiles a program, a last tile that is not full


def trial(run: Run) -> dict[str, str]:
    """ "equal", or what is wrong, by the name of the way."""
    ways = run.ways(TINY if run.tiny else (*LARGE, *SMALL))
    found: dict[str, str] = {}
    while left := [way for way in ways if way.name not in found]:
        asked = [sys.executable, __file__, "--try", json.dumps([list(way) for way in left])]
        asked += ["--tiny"] if run.tiny else []
        child = subprocess.Popen(asked, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        while select.select([child.stdout], [], [], run.patience)[0] and (line := child.stdout.readline()):
            if line.startswith("{"):
                found |= json.loads(line)
                print(line, end="", flush=True)
        hung = child.poll() is None and not _ended(child)
        child.kill()
        stuck = next((way for way in left if way.name not in found), None)
        if stuck is not None:
            found[stuck.name] = "hangs" if hung else f"ends the process with {child.wait()}"
        run.keep("trial", found)
    return found


def _ended(child: subprocess.Popen) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5)
        return True
    return False


def try_out(ways: list[Way], tiny: bool) -> None:
    """In the trial's process: a line of JSON for each way."""
    for way in ways:
        wrong = ""
        try:
            for m, n, k in ((70, 96, 48),) if tiny else _TRIALS:
                given = layer(m, n, k, exact=tiny)
                for epilogue in filter(way.has, EPILOGUES):
                    given.y.fill_(float("nan"))
                    count = unequal(way.call(given, epilogue)(), stock(given, epilogue))
                    if count and not wrong:
                        wrong = f"{count} elements differ at {m} x {n} x {k}, {epilogue}"
        except Exception as error:
            wrong = f"{type(error).__name__}: {str(error)[-300:]}"
        print(json.dumps({way.name: wrong or "equal"}), flush=True)


def every_gelu(run: Run) -> dict[str, Any]:
    """Of all values of bf16: how many differ from ATen's GELU, by spelling."""
    x = torch.arange(-(1 << 15), 1 << 15, device=DEVICE).to(torch.int16).view(BF16)
    wanted, found = F.gelu(x, approximate="tanh"), {}
    for form, name in enumerate(lt.GELU_FORMS):
        out = torch.empty_like(x)
        lt.gelu_forms[(64, 1, 1)](x, out, form)
        where = differing(wanted, out).nonzero().flatten()
        first = [[float(x[i]), float(wanted[i]), float(out[i])] for i in where[:4]]
        found[name] = {"differ": len(where), "first": first}
    return found


def core(run: Run) -> dict[str, Any]:
    """Of dot products, hardware against the model: how many differ, and the first of them as bits."""
    m, n = (16, 32) if run.tiny else (512, 2048)
    found: dict[str, Any] = {}
    for kind, operand in _OPERANDS.items():
        for k in (16,) if run.tiny else (16, 64):
            x, w = operand(m, k), operand(n, k)
            if kind == "cancelling":
                x[:, 1], w[:, 1] = -x[:, 0], w[:, 0]
            right = torch.cat([HOPPER.chain(some[:, None], w) for some in x.split(128)])
            rows: dict[str, Any] = {}
            for name, got in _hardware(x, w):
                where = differing(right.to(got.dtype), got).nonzero()
                first = [_bits(x[i], w[j], right[i, j], got[i, j]) for i, j in where[:2].tolist()] if k == 16 else []
                rows[name] = {"of": m * n, "differ": len(where), "first": first}
            found[f"{kind}, K {k}"] = rows
    return found


def _hardware(x: Tensor, w: Tensor) -> Iterator[tuple[str, Tensor]]:
    if DEVICE.type == "cuda":
        (m, k), n = x.shape, w.shape[0]
        out = torch.empty(m, n, device=DEVICE)
        lt.sums[(m // 64, n // 64, 1)](x, w, out, n, k, 64, 64)
        yield "wgmma", out
        with contextlib.suppress(Exception):
            yield "torch.mm, fp32", torch.mm(x, w.t(), out_dtype=torch.float32)
    yield "F.linear", F.linear(x, w)


def _bits(x: Tensor, w: Tensor, right: Tensor, got: Tensor) -> dict[str, Any]:
    operands = {name: [f"{v & 0xFFFF:04x}" for v in t.view(torch.int16).tolist()] for name, t in (("x", x), ("w", w))}
    return operands | {"model": right.item(), "hardware": got.item()}


def _spread(low: int, high: int, zeros: float = 0.0) -> Callable[[int, int], Tensor]:
    def operand(rows: int, k: int) -> Tensor:
        power = torch.exp2(torch.randint(low, high + 1, (rows, k), device=DEVICE).double())
        t = (torch.randn(rows, k, device=DEVICE).double() * power).float().to(BF16)
        t[torch.rand(rows, k, device=DEVICE) < zeros] = 0
        return t

    return operand


def _steps(*exponents: int) -> Callable[[int, int], Tensor]:
    def operand(rows: int, k: int) -> Tensor:
        power = torch.tensor(exponents, device=DEVICE)[torch.randint(len(exponents), (rows, k), device=DEVICE)]
        mantissa = 1 + torch.randint(0, 128, (rows, k), device=DEVICE) / 128
        sign = torch.randint(0, 2, (rows, k), device=DEVICE) * 2 - 1
        return (sign * mantissa * torch.exp2(power.float())).to(BF16)

    return operand


def _specials(rows: int, k: int) -> Tensor:
    t = _spread(-8, 8, 0.1)(rows, k)
    few = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 3.3e38, -3.3e38], device=DEVICE).to(BF16)
    chosen = torch.rand(rows, k, device=DEVICE) < 0.03
    t[chosen] = few[torch.randint(len(few), (int(chosen.sum()),), device=DEVICE)]
    return t


def _zeros(rows: int, k: int) -> Tensor:
    t = torch.zeros(rows, k, device=DEVICE, dtype=BF16)
    t[torch.rand(rows, k, device=DEVICE) < 0.5] = -0.0
    t[:, 0] = torch.where(torch.rand(rows, device=DEVICE) < 0.5, t[:, 0], 1.0)
    return t


_OPERANDS: dict[str, Callable[[int, int], Tensor]] = {
    "random": _spread(0, 0),
    "wide": _spread(-16, 16),
    "at the alignment": _steps(0, 0, -11, -12, -13, -14),
    "cancelling": _steps(8, 0, -4, -5, -8),
    "tiny": _spread(-70, -58, 0.2),
    "tinier, with zeros": _spread(-76, -62, 0.6),
    "subnormal": _spread(-134, 60, 0.1),
    "huge": _spread(55, 64),
    "zero times huge": _spread(-60, 120, 0.7),
    "infinities and NaN": _specials,
    "zeros": _zeros,
}


def orders(run: Run) -> dict[str, Any]:
    """Of F.linear: by N x K, those M at which it is no chain along K, with the first wrong probe of each."""
    if run.tiny:
        ms, shapes = (1, 5), ((64, 64),)
    else:
        ms = (1, 2, 3, 4, 8, 16, 17, 24, 32, 33, 48, 64, 65, 96, 100, 126, 128, 129, 160, 192, 193, 224, 256, 257, 300)
        shapes = ((2048, 2048), (4096, 4096), (8192, 2048), (2048, 8192), (16384, 4096), (4096, 16384), (2048, 4096))
    found: dict[str, Any] = {}
    for n, k in shapes:
        wrong = {}
        for m in ms:
            with_bias = torch.zeros(n, dtype=BF16, device=DEVICE)
            for name, bias in (("", None), (" with bias", with_bias)):
                linear = functools.partial(F.linear, bias=bias)
                if text := difference(linear, m, n, k, DEVICE):
                    wrong[f"{m}{name}"] = text
        found[f"{n} x {k}"] = {"tried": list(ms), "no chain": wrong}
    for m, n, k in () if run.tiny else _STEP:
        began = time.perf_counter()
        text = difference(lambda x, w: F.linear(x, w), m, n, k, DEVICE)
        found[f"{m} x {n} x {k}"] = {"difference": text, "seconds": round(time.perf_counter() - began, 3)}
    return found


_STEP = (
    (1536, 16384, 4096), (1536, 4096, 16384), (1536, 4096, 4096),
    (6144, 16384, 4096), (6144, 4096, 16384), (6144, 4096, 4096), (6144, 2048, 4096), (6144, 4096, 2048),
    (24576, 16384, 4096), (24576, 4096, 16384), (24576, 4096, 4096),
)  # fmt: skip


def name_of(m: int, n: int, k: int, epilogue: str) -> str:
    """Of a layer and what follows it: in the JSON, and for --cases."""
    return f"{m} x {n} x {k}, {epilogue}"


def cases_of(tiny: bool) -> list[tuple[tuple[int, int, int], str, tuple[Way, ...]]]:
    """Layers of a step: M, N, K, what follows, and the ways that are for them."""
    if tiny:
        return [((70, 96, 48), "gelu", TINY), ((64, 96, 48), "gated", TINY)]
    cases = [((m, n, k), "gelu" if n > k else "gated", LARGE) for m, n, k in _STEP if n == 16384 or n == 4096]
    cases += [((126, 8192, 2048), "gelu", SMALL), ((126, 2048, 8192), "gated", SMALL)]
    cases += [((126, 2048, 2048), "gated", SMALL), ((6144, 16384, 4096), "plain", LARGE)]
    return sorted(cases, key=lambda case: case[0][0] != 6144)


def shapes(run: Run) -> dict[str, Any]:
    """Milliseconds by shape and way; a string where there is none."""
    found: dict[str, Any] = {}
    for (m, n, k), epilogue, ways in cases_of(run.tiny):
        if not name_of(m, n, k, epilogue).startswith(run.cases):
            continue
        given = layer(m, n, k, exact=run.tiny)
        wanted = stock(given, epilogue)
        calls = with_own_gelu(given, epilogue)
        row: dict[str, Any] = {}
        for way in run.ways(ways):
            if not way.fits(n, k) or not way.has(epilogue) or not run.works(way):
                continue
            try:
                given.y.fill_(float("nan"))
                call = way.call(given, epilogue)
                if count := unequal(call(), wanted):
                    row[way.name] = f"{count} elements differ"
                else:
                    calls[way.name] = call
            except Exception as error:
                row[way.name] = f"{type(error).__name__}: {str(error)[-200:]}"
        for name in ("today", OWN):
            if name in calls and (count := unequal(calls[name](), wanted)):
                row[name] = f"{count} elements differ"
                del calls[name]
        found[name_of(m, n, k, epilogue)] = by_turns(calls) | row
        run.keep("shapes", found)
        del given, wanted, calls
        free()
    return found


def chain(run: Run) -> dict[str, Any]:
    """Feed-forwards of several blocks: norm and modulation, up with GELU, down with gate and residual."""
    blocks, found = 2 if run.tiny else 4, {}
    for m in (70,) if run.tiny else (6144, 1536, 24576):
        width, inner = (48, 96) if run.tiny else (4096, 16384)
        start = layer(m, width, 16, exact=run.tiny).residual
        weights = [
            (layer(1, inner, width, exact=run.tiny), layer(1, width, inner, exact=run.tiny)) for _ in range(blocks)
        ]
        ada = [[torch.randn(1, 1, width, device=DEVICE).to(BF16) * 0.1 for _ in range(3)] for _ in range(blocks)]
        table = [[torch.randn(width, device=DEVICE).to(BF16) * 0.1 for _ in range(3)] for _ in range(blocks)]
        hidden = torch.empty(m, inner, dtype=BF16, device=DEVICE)
        outs = [torch.empty(m, width, dtype=BF16, device=DEVICE) for _ in range(2)]

        def forward(
            up: Way | None,
            down: Way | None,
            start=start,
            weights=weights,
            ada=ada,
            table=table,
            hidden=hidden,
            outs=outs,
        ):
            x = start
            for i, (first, last) in enumerate(weights):
                (scale, shift, gate), (scale_t, shift_t, gate_t) = ada[i], table[i]
                n = RMS_NORM_MODULATE_COMPOSED(x[None], scale, shift, scale_t, shift_t, 1e-6)[0]
                if up is None:
                    h = torch.ops.aten.gelu_(F.linear(n, first.w, first.bias), approximate="tanh")
                else:
                    h = up.call(Layer(n, first.w, first.bias, hidden, first.gate, hidden), "gelu")()
                if down is None:
                    y = F.linear(h, last.w, last.bias)
                    x = GATED_RESIDUAL(x[None], y[None], gate, gate_t)[0]
                else:
                    g = gate_t + gate[0, 0]
                    x = down.call(Layer(h, last.w, last.bias, x, g, outs[i % 2]), "gated")()
            return x

        wanted = forward(None, None).clone()
        good = [way for way in run.ways(TINY if run.tiny else LARGE) if run.works(way)]
        ups = [way for way in good if way.fits(inner, width)]
        downs = [way for way in good if way.fits(width, inner) and way.has("gated")]
        pairs: dict[str, tuple[Way | None, Way | None]] = {"today": (None, None), "today again": (None, None)}
        pairs |= {f"up {way.name}": (way, None) for way in ups}
        pairs |= {f"down {way.name}": (None, way) for way in downs}
        pairs |= {f"both {way.name}": (way, way) for way in ups[:4] if way in downs}
        calls, row = {}, {}
        for name, (up, down) in pairs.items():
            try:
                if count := unequal(forward(up, down), wanted):
                    row[name] = f"{count} elements differ"
                else:
                    calls[name] = functools.partial(forward, up, down)
            except Exception as error:
                row[name] = f"{type(error).__name__}: {str(error)[-200:]}"
        found[f"{m} tokens, {blocks} feed-forwards"] = by_turns(calls, span=60.0) | row
        run.keep("chain", found)
        del start, weights, hidden, outs, forward, calls
        free()
    return found


def steady(run: Run) -> dict[str, Any]:
    """By shape and way, of one CUDA graph replayed for a second: milliseconds and millijoules a call, watts."""
    found: dict[str, Any] = {}
    for m, n, k in ((70, 96, 48),) if run.tiny else _STEP[:6]:
        epilogue = "gelu" if n > k else "gated"
        if not name_of(m, n, k, epilogue).startswith(run.cases):
            continue
        given = layer(m, n, k, exact=run.tiny)
        wanted = stock(given, epilogue)
        calls = with_own_gelu(given, epilogue)
        row: dict[str, Any] = {}
        if OWN in calls and (count := unequal(calls[OWN](), wanted)):
            row[OWN] = f"{count} elements differ"
            del calls[OWN]
        for way in run.ways(TINY if run.tiny else LARGE):
            if way.fits(n, k) and way.has(epilogue) and run.works(way):
                call = way.call(given, epilogue)
                given.y.fill_(float("nan"))  # not what the way before has left there
                if count := unequal(call(), wanted):
                    row[way.name] = f"{count} elements differ"
                else:
                    calls[way.name] = call
        for name, call in calls.items():
            row[name] = sustained(call)
        found[name_of(m, n, k, epilogue)] = row
        run.keep("steady", found)
        del given, wanted, calls
        free()
    return found


def sustained(call: Call, seconds: float = 1.5) -> dict[str, float]:
    """Of one call: `ms`, `mJ`, and the power meanwhile."""
    if DEVICE.type != "cuda":
        return {"ms": round(1e3 * _seconds(call), 3)}
    replay, repeats = graphed(call, 20.0)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    replay()
    end.record()
    torch.cuda.synchronize()
    ms = start.elapsed_time(end)
    for _ in range(round(200 / ms)):
        replay()
    torch.cuda.synchronize()
    replays = max(2, round(1e3 * seconds / ms))
    with ticks() as found:
        start.record()
        for _ in range(replays):
            replay()
        end.record()
        torch.cuda.synchronize()
    ms, power = start.elapsed_time(end) / (replays * repeats), watts(found)
    return {"ms": round(ms, 4), "mJ": round(power * ms, 1), "W": round(power, 1)}


def proof(run: Run) -> dict[str, Any]:
    """By shape: "" where the kernel may stand in for the host's chain, else why not; and the seconds that it takes."""
    found: dict[str, Any] = {}
    way = TINY[0] if run.tiny else LARGE[0]
    for m, n, k in ((40, 32, 32),) if run.tiny else (*_STEP[:6], (126, 16384, 4096)):
        for following in ("gelu", "gated"):
            y = torch.empty(m, n, dtype=BF16, device=DEVICE)

            def kernel(given: Any, following: str = following, y: Tensor = y) -> Tensor:
                return way.call(Layer(given.x, given.w, given.bias, given.residual, given.gate, y), following)()

            seconds = []
            for _ in range(2):  # the first time compiles
                began = time.perf_counter()
                text = linear_difference(kernel, following, m, n, k, DEVICE)
                _synchronize()
                seconds.append(round(time.perf_counter() - began, 3))
            found[f"{m} x {n} x {k}, {following}"] = {"difference": text, "seconds": seconds}
    return found


# -- time --------------------------------------------------------------------------------------------------------------


def free() -> None:
    _synchronize()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def graphed(call: Call, span: float) -> tuple[Call, int]:
    """A replay of one CUDA graph of so many calls that it takes some `span` milliseconds, and their number."""
    call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    call()
    end.record()
    torch.cuda.synchronize()
    repeats = max(1, round(span / max(start.elapsed_time(end) / 2, 0.005)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay, repeats


def by_turns(calls: dict[str, Call], span: float = 25.0, rounds: int = 7) -> dict[str, float]:
    """Milliseconds of each call: medians over rounds in which every way takes its turn, each as one CUDA graph of so
    many calls that it runs `span` milliseconds. The order of the ways turns from round to round."""
    if DEVICE.type != "cuda":
        return {name: round(1e3 * _seconds(call), 3) for name, call in calls.items()}
    replays = {name: graphed(call, span) for name, call in calls.items()}
    names, times = list(calls), {name: [] for name in calls}
    for index in range(rounds + 1):  # the first one warms up
        events = []
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replays[name][0]()
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        for name, start, end in events if index else ():
            times[name].append(start.elapsed_time(end) / replays[name][1])
    return {name: round(statistics.median(t), 4) for name, t in times.items()}


@functools.cache
def _nvml() -> tuple[Any, Any] | None:
    """NVML and its handle of the first GPU; None where there is none."""
    with contextlib.suppress(OSError, AttributeError):
        library, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        if not library.nvmlInit_v2() and not library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
            return library, handle
    return None


def millijoules() -> float:
    """What the first GPU has used since its driver was loaded; NaN where NVML does not tell."""
    spent = ctypes.c_ulonglong()
    if (known := _nvml()) is None or known[0].nvmlDeviceGetTotalEnergyConsumption(known[1], ctypes.byref(spent)):
        return float("nan")
    return float(spent.value)


class Tick(NamedTuple):
    """When NVML's counter of energy moved, which it does some ten times a second: seconds, and millijoules by then.

    Between two ticks power is exact; between two readings at any other times it is not: half a second of one layer
    came out as 617 to 817 W so, all at the same limit of power (H200, 2026-11-29).
    """

    seconds: float
    millijoules: float


@contextlib.contextmanager
def ticks(at_each: Callable[[], None] = lambda: None) -> Iterator[list[Tick]]:
    """The ticks within this block, as they come; `at_each` is called at each."""
    found: list[Tick] = []
    done = threading.Event()

    def watch() -> None:
        last = millijoules()
        while not done.wait(0.002):
            if (now := millijoules()) > last:
                found.append(Tick(time.perf_counter(), now))
                at_each()
                last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def watts(found: list[Tick]) -> float:
    """Between the second tick, when work has begun for certain, and the last one; NaN without them."""
    if len(found) < 3:
        return float("nan")
    first, last = found[1], found[-1]
    return (last.millijoules - first.millijoules) / 1e3 / (last.seconds - first.seconds)


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _seconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# -- the program -------------------------------------------------------------------------------------------------------


def _cublas() -> str | None:
    with contextlib.suppress(Exception):
        from importlib.metadata import version

        return version("nvidia-cublas")
    return None


def table(results: dict[str, Any]) -> Iterator[str]:
    for part in ("shapes", "chain"):
        for case, row in results.get(part, {}).items() if isinstance(results.get(part), dict) else ():
            times = {name: value for name, value in row.items() if isinstance(value, float)}
            yield f"{case}: today {times.get('today')}, F.linear alone {times.get('F.linear', '-')}"
            others = sorted((t, name) for name, t in times.items() if name not in ("today", "F.linear"))
            for t, name in others[:8]:
                yield f"    {t:8.4f}  {times['today'] / t:6.3f}x  {name}"
            for name, value in row.items():
                if isinstance(value, str):
                    yield f"    {name}: {value[:150]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a dry run, on a CPU in Triton's interpreter")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kinds", nargs="+", default=[], help="of ways, such as thirds; the others sit out")
    parser.add_argument("--cases", nargs="+", default=[""], help="beginnings of the names of layers: '6144 x 16384'")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds for one way of the trial")
    parser.add_argument("--try", dest="ways", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if DEVICE.type != "cuda" and not (given.tiny and interpreting()):
        parser.error("there is no GPU here; accepted without one: TRITON_INTERPRET=1 and --tiny")
    kinds = list(dict.fromkeys(way.kind for way in (TINY if given.tiny else (*LARGE, *SMALL))))
    if unknown := [kind for kind in given.kinds if kind not in kinds]:
        parser.error(f"--kinds {unknown[0]!r}; accepted: {', '.join(kinds)}")
    names = [name_of(m, n, k, epilogue) for (m, n, k), epilogue, _ in cases_of(given.tiny)]
    if unknown := [case for case in given.cases if not any(name.startswith(case) for name in names)]:
        parser.error(f"--cases {unknown[0]!r} begins no layer's name; accepted: {'; '.join(names)}")
    torch.manual_seed(17)
    with torch.no_grad():
        if given.ways:
            try_out([Way(kind, tuple(tile), *rest) for kind, tile, *rest in json.loads(given.ways)], given.tiny)
            return
        run = Run(
            given.tiny,
            {"what": "linears with what follows them", "machine": machine(DEVICE) | {"cublas": _cublas()}},
            given.out,
            tuple(given.kinds),
            tuple(given.cases),
            given.patience,
        )
        functions = {
            "trial": trial,
            "gelu": every_gelu,
            "core": core,
            "orders": orders,
            "shapes": shapes,
            "chain": chain,
        }
        functions |= {"steady": steady, "proof": proof}
        seconds: dict[str, float] = {}
        for part in given.parts:
            began = time.perf_counter()
            try:
                run.keep(part, functions[part](run))
            except Exception as error:  # the parts after it may still tell something
                run.keep(f"{part} failed", f"{type(error).__name__}: {str(error)[-1500:]}")
            seconds[part] = round(time.perf_counter() - began, 1)
            run.keep("seconds", seconds)
            print(part, seconds[part], "s", flush=True)
    failed = [name for name in run.results if "failed" in name]
    run.keep("exit_code", 1 if failed else 0)
    for line in table(run.results):
        print(line)
    summary = {part: run.results.get(part) for part in ("trial", "gelu") if part in run.results}
    print(json.dumps(summary, indent=1)[:3000])
    for case, rows in run.results.get("core", {}).items():
        print(case, {name: row["differ"] for name, row in rows.items()})
    for part in ("steady", "proof"):
        for case, row in run.results.get(part, {}).items():
            print(case)
            for name, figures in row.items():
                print(f"    {name:36} {figures}")
    print({name: run.results[name] for name in failed})
    for case, row in run.results.get("orders", {}).items():
        print(case, list(row.get("no chain", {})) or row.get("difference", "all one chain"), row.get("seconds", ""))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
