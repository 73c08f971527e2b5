"""The algorithms that cuBLASLt's heuristic names for plain linear layers: bits, energy, whole steps.

    python benchmarks/linear_cublaslt.py --out out/cublaslt.json                  # on a Hopper GPU, two to five minutes
    python benchmarks/linear_cublaslt.py --chosen FILE --out out/steps.json       # only steps, with what FILE chose
    TRITON_INTERPRET=1 python benchmarks/linear_cublaslt.py --tiny --out FILE     # without one: torch's op stands in

`F.linear` with a bias asks the heuristic for one algorithm and runs it. The heuristic can name several for a shape,
which differ in tile, cluster, stages and the order of tiles. One that adds along K in the same order has the same bits,
and at the card's power limit the one that takes the least energy is the fastest. They come from the library that torch
has loaded. Which of them is F.linear's own is not looked at. Two parts:

    layers    by shape of a step at 6144 tokens: each algorithm's bits against F.linear's, on random, wide and special
              data and on the probes that tell the order along K; milliseconds by turns; of the quickest six
              millijoules, between loops of F.linear
    steps     whole steps by turns with the algorithms that took less energy than F.linear: by shape, and all together

An algorithm whose bits differ gets no time. FILE is written after each row, so that a run that is cut off leaves what
it has. Numbers of attributes and layouts of structures are those of cublasLt.h as a C program printed them (cuBLAS
13.1.0.3, 13.1.2.11 and 13.10 agree); torch 2.11.0+cu130 comes with the first of these.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import math
from collections.abc import Iterator
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import linear as lin
import linear_steps as ls
import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core.kernel import interpreting
from bitfuse.tools.machine import machine
from bitfuse.tools.prove.summation import probes

# -- the library -------------------------------------------------------------------------------------------------------

_COMPUTE_32F, _R_32F, _R_16BF, _TRANSPOSED, _EPILOGUE_BIAS = 68, 0, 14, 1, 4
_TRANSA, _EPILOGUE, _BIAS_POINTER = 3, 7, 8  # of an operation
_MAX_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)  # of a preference; the alignments of A, B, C and D
_WORKSPACE = 32 << 20  # what torch offers on Hopper
_REQUESTED = 64  # algorithms; for the shapes of a step the heuristic names eight
# An algorithm's attributes, numbered from 0: names, types, and usual values, which are left out where it is named.
_ATTRIBUTES = ("id", "tile", "split_k", "reduction", "swizzle", "option", "stages", "inner", "cluster")
_TYPES = (c_int32, c_uint32, c_int32, c_uint32, c_uint32, c_uint32, c_uint32, c_uint16, c_uint16)
_USUAL = (None, None, 1, 0, 0, 0, None, 0, None)


class Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", c_uint64 * 8),  # cublasLtMatmulAlgo_t
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """cublasLt as torch has loaded it. All arguments get their types, as ctypes would cut pointers to 32 bits."""
    paths = (line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    path = next((path for path in paths if Path(path).name.startswith("libcublasLt.so")), None)
    if path is None:
        raise RuntimeError("this process has not loaded cublasLt: no matmul has run on a GPU")
    lt, p = ctypes.CDLL(path), c_void_p
    types = {
        "MatmulDescCreate": (p, c_int, c_int),
        "MatmulDescSetAttribute": (p, c_int, p, c_size_t),
        "MatrixLayoutCreate": (p, c_int, c_uint64, c_uint64, c_int64),
        "MatmulPreferenceCreate": (p,),
        "MatmulPreferenceSetAttribute": (p, c_int, p, c_size_t),
        "MatmulAlgoGetHeuristic": (p, p, p, p, p, p, p, c_int, p, p),
        "MatmulAlgoConfigGetAttribute": (p, c_int, p, c_size_t, p),
        "Matmul": (p, p, p, p, p, p, p, p, p, p, p, p, p, p, c_size_t, p),
    }
    for name, arguments in types.items():
        function = getattr(lt, f"cublasLt{name}")
        function.argtypes, function.restype = arguments, c_int
    lt.cublasLtGetVersion.restype = c_size_t
    return lt


def ask(name: str, *arguments: Any) -> None:
    if status := getattr(library(), f"cublasLt{name}")(*arguments):
        raise RuntimeError(f"cublasLt{name} returned {status}")


def created(name: str, *arguments: Any) -> c_void_p:
    made = c_void_p()
    ask(f"{name}Create", byref(made), *arguments)
    return made


def put(name: str, into: Any, attribute: int, value: Any) -> None:
    ask(f"{name}SetAttribute", into, attribute, byref(value), ctypes.sizeof(value))


def named(result: Result) -> str:
    """An algorithm's attributes as numbers of cublasLt.h; 0 where the library does not know one of this algorithm."""
    get, parts = library().cublasLtMatmulAlgoConfigGetAttribute, []
    for number, (name, kind, usual) in enumerate(zip(_ATTRIBUTES, _TYPES, _USUAL, strict=True)):
        value, written = kind(), c_size_t()
        failed = get(byref(result.algorithm), number, byref(value), ctypes.sizeof(value), byref(written))
        if (found := 0 if failed else value.value) != usual:
            parts.append(f"{name} {found}")
    return ", ".join(parts)


# -- one shape ---------------------------------------------------------------------------------------------------------


class Problem:
    """y [M, N] = x [M, K] @ w.T + bias, in bf16 with sums in fp32, set up for cuBLASLt as torch sets it up.

    cuBLAS has columns next to each other where torch has rows, so to cuBLAS this is y.T = w @ x.T: A is w, transposed,
    and B is x. One lives as long as the process, for a shape and the alignments of its tensors.
    """

    def __init__(self, m: int, n: int, k: int, alignments: tuple[int, ...], bias: int):
        self.handle = torch.cuda.current_blas_handle()  # a cuBLAS handle is one of cuBLASLt's
        self.operation = created("MatmulDesc", _COMPUTE_32F, _R_32F)
        put("MatmulDesc", self.operation, _TRANSA, c_int32(_TRANSPOSED))
        put("MatmulDesc", self.operation, _EPILOGUE, c_uint32(_EPILOGUE_BIAS))
        put("MatmulDesc", self.operation, _BIAS_POINTER, c_void_p(bias))  # for its alignment
        self.a, self.b, self.d = (
            created("MatrixLayout", _R_16BF, rows, columns, rows) for rows, columns in ((k, n), (k, m), (n, m))
        )
        preference = created("MatmulPreference")
        put("MatmulPreference", preference, _MAX_WORKSPACE, c_uint64(_WORKSPACE))
        for attribute, value in zip(_ALIGNMENTS, alignments, strict=True):
            put("MatmulPreference", preference, attribute, c_uint32(value))
        found, count = (Result * _REQUESTED)(), c_int()
        how = (self.a, self.b, self.d, self.d, preference, _REQUESTED, byref(found), byref(count))
        ask("MatmulAlgoGetHeuristic", self.handle, self.operation, *how)
        # By name, in the heuristic's order. On an H200, no two had all attributes the same.
        self.results = {named(result): result for result in found[: count.value] if result.state == 0}


_problems: dict[tuple[Any, ...], Problem] = {}


def problem(given: lin.Layer) -> Problem:
    (m, k), n = given.x.shape, given.w.shape[0]
    # Torch gives the alignment of the bias for D's, and C and D are one tensor; in bytes, at most 256.
    alignments = tuple(math.gcd(t.data_ptr(), 256) for t in (given.w, given.x, given.y, given.bias))
    key = (m, n, k, alignments)
    if key not in _problems:
        _problems[key] = Problem(m, n, k, alignments, given.bias.data_ptr())
    return _problems[key]


class Way(NamedTuple):
    """One algorithm, called as `linear.Way` is."""

    name: str

    def call(self, given: lin.Layer, epilogue: str) -> lin.Call:
        """A prepared launch on the tensors of a layer, into its y."""
        assert epilogue == "plain", epilogue
        assert all(t.is_contiguous() for t in (given.x, given.w, given.bias, given.y))
        one = problem(given)
        if (result := one.results.get(self.name)) is None:
            raise RuntimeError(f"for these tensors the heuristic does not name {self.name!r}, but {list(one.results)}")
        # Of each call its own: two streams of a step may run the same layer at a time.
        workspace = torch.empty(result.workspace, dtype=torch.uint8, device=given.x.device)
        a, b, d = (given.w.data_ptr(), one.a), (given.x.data_ptr(), one.b), (given.y.data_ptr(), one.d)
        matmul = (one.handle, one.operation, byref(c_float(1.0)), *a, *b, byref(c_float(0.0)), *d, *d)

        def call() -> Tensor:
            """On the current stream. Nothing is allocated and nobody waits, so a CUDA graph can hold it."""
            put("MatmulDesc", one.operation, _BIAS_POINTER, c_void_p(given.bias.data_ptr()))
            scratch, stream = (workspace.data_ptr(), workspace.numel()), torch.cuda.current_stream().cuda_stream
            ask("Matmul", *matmul, byref(result.algorithm), *scratch, stream)
            return given.y

        return call


# -- the two parts -----------------------------------------------------------------------------------------------------

_SLOWER, _BEST = 1.04, 6  # energy is measured of the quickest six that by turns take at most 1.04 times F.linear's time


def layers(run: ls.Run) -> None:
    found = run.results["layers"] = {}
    for m, n, k in [(70, 96, 48)] if run.tiny else [(6144, n, k) for n, k in ls.LARGE_SHAPES]:
        if run.left() < 25:
            run.say("no time was left for all shapes")
            break
        row = found[f"{m} x {n} x {k}"] = {}
        given = lin.layer(m, n, k, exact=run.tiny)
        ways = [ls.Stand()] if run.tiny else [Way(name) for name in problem(given).results]
        one_shape(run, row, given, {way.name: way for way in ways})
        run.say(f"{m} x {n} x {k}, chosen: {row['chosen']}")
        lin.free()


def one_shape(run: ls.Run, row: dict[str, Any], given: lin.Layer, ways: dict[str, Any]) -> None:
    """Into `row`: `algorithms` by name, `turns` in milliseconds, `energy`, and what was `chosen` by it, if any."""
    row["algorithms"] = {name: {} for name in ways}
    for name, result in {} if run.tiny else problem(given).results.items():
        row["algorithms"][name] |= {"workspace": result.workspace, "waves": round(result.waves, 3)}
    compare(row, given, ways, run.tiny)
    run.say(f"{len(row['algorithms'])} algorithms, {len(ways)} with F.linear's bits")
    calls = {"F.linear": functools.partial(F.linear, given.x, given.w, given.bias)}
    calls |= {name: way.call(given, "plain") for name, way in ways.items()}
    turns = row["turns"] = lin.by_turns(calls, span=5.0, rounds=4)
    run.say("by turns:", turns)
    run.keep()
    quick = sorted((name for name in ways if run.tiny or turns[name] <= _SLOWER * turns["F.linear"]), key=turns.get)
    energy(run, row, calls, quick[:_BEST])


def compare(row: dict[str, Any], given: lin.Layer, ways: dict[str, Any], exact: bool) -> None:
    """Into `row`: whether each way's bits are F.linear's. Those whose bits differ are taken out of `ways`."""
    row["F.linear's order along K"] = "one chain"
    for what, asked, right in cases(given, exact):
        wanted = F.linear(asked.x, asked.w, asked.bias)
        if right is not None and (count := lin.unequal(right.to(wanted.dtype).expand_as(wanted).contiguous(), wanted)):
            row["F.linear's order along K"] = f"{what}: {count} elements differ"
        for name, way in list(ways.items()):
            try:
                asked.y.fill_(-1.0)  # not what the way before has left there
                count = lin.unequal(way.call(asked, "plain")(), wanted)
                bits = f"{what}: {count} elements differ" if count else "equal"
            except Exception as error:
                bits = f"{what}: {type(error).__name__}: {error}"
            row["algorithms"][name]["bits"] = bits
            if bits != "equal":
                del ways[name]


def cases(given: lin.Layer, exact: bool) -> Iterator[tuple[str, lin.Layer, Tensor | None]]:
    """Data on which bits are compared; of the probes also what one chain along K gives."""
    (m, k), n = given.x.shape, given.w.shape[0]
    for kind in ("random",) if exact else ("random", "wide", "infinities and NaN"):
        of = lin._OPERANDS[kind]
        yield kind, given if exact else given._replace(x=of(m, k), w=of(n, k)), None
    zero = torch.zeros_like(given.bias)
    for probe in probes(m, n, k, lin.DEVICE):
        yield f"probes of {probe.what}", given._replace(x=probe.x, w=probe.w, bias=zero), probe.right


def energy(run: ls.Run, row: dict[str, Any], calls: dict[str, lin.Call], names: list[str]) -> None:
    """Loops of 1.5 s, two algorithms between two of F.linear, each over the mean of F.linear before and after it."""
    found, over = {"F.linear": []}, {}
    row |= {"energy": found, "over F.linear": over}

    def loop(name: str) -> dict[str, float]:
        found.setdefault(name, []).append(lin.sustained(calls[name]))
        run.say(f"    {name}: {found[name][-1]}")
        run.keep()
        return found[name][-1]

    # Not kept: the first loop of a shape took 1.3 to 3.4 % less energy than F.linear's next one (H200, 2026-11-29).
    lin.sustained(calls["F.linear"])
    before = loop("F.linear")
    for some in (names[index : index + 2] for index in range(0, len(names), 2)):
        loops, after = {name: loop(name) for name in some}, loop("F.linear")
        for name, one in loops.items():
            over[name] = {unit: round(2 * one[unit] / (before[unit] + after[unit]), 4) for unit in one if unit != "W"}
        before = after
    # Time decides where NVML did not tell energy.
    costs = {name: one["ms"] if math.isnan(one.get("mJ", math.nan)) else one["mJ"] for name, one in over.items()}
    least = min(costs, key=costs.__getitem__, default=None)
    row["chosen"] = least if least is not None and (costs[least] < 1 or run.tiny) else None
    run.keep()


def steps(run: ls.Run, rows: dict[str, Any]) -> None:
    """With the algorithms that these rows of `layers` have chosen."""
    row = {}
    run.results["6144 tokens"] = {"layers": run.layers, "steps": row}
    ways: dict[tuple[int, int], Any] = {}  # by N and K
    for shape, one in rows.items():
        if one.get("chosen"):
            _, n, k = map(int, shape.split(" x "))
            ways[ls.ANY if run.tiny else (n, k)] = ls.Stand() if run.tiny else Way(one["chosen"])
    if not ways:
        row["bitfuse"] = "for no shape was an algorithm chosen"
        return
    whole = ls.Steps(*ls.built(run))
    if run.left() < 50:
        row["bitfuse"] = "no time was left"
        return
    tried = {"all": ls.Tried(plain=ways)}
    if len(ways) > 1:
        tried |= {f"{n} x {k}: {way.name}": ls.Tried(plain={(n, k): way}) for (n, k), way in ways.items()}
    ls.stage(run, whole, row, tried | {"bitfuse again": ls.Tried()}, *((1, 2) if run.tiny else (6, 6)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU, in Triton's interpreter")
    parser.add_argument("--chosen", type=Path, help="a file of an earlier run: the steps alone, with what it chose")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which nothing more is begun")
    given = parser.parse_args()
    if lin.DEVICE.type != "cuda" and not (given.tiny and interpreting()):
        parser.error("there is no GPU here; accepted without one: TRITON_INTERPRET=1 and --tiny")
    try:
        chosen = json.loads(given.chosen.read_text())["layers"] if given.chosen else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "accepted: what a run without --chosen has written"
        parser.error(f"--chosen {str(given.chosen)!r}: {type(error).__name__}: {error}; {what}")
    torch.manual_seed(17)
    results = {"what": "linears by other algorithms of cuBLASLt", "machine": machine(lin.DEVICE)}
    results |= {"versions": ls.versions(), "exit_code": 1}
    run = ls.Run(given.tiny, 1 if given.tiny else 48, given.seconds, results, given.out)
    with torch.no_grad():
        if lin.DEVICE.type == "cuda":
            lin.stock(lin.layer(64, 64, 64), "plain")  # loads cuBLAS
            results["versions"]["cublasLt"] = library().cublasLtGetVersion()
        if chosen is None:
            layers(run)
        steps(run, results["layers"] if chosen is None else chosen)
    results |= {"exit_code": 0, "seconds": round(given.seconds - run.left(), 1)}
    run.keep()


if __name__ == "__main__":
    main()
