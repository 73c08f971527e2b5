"""Other algorithms of cuBLASLt than its heuristic's first one, for plain linear layers: bits, energy, whole steps.

    python benchmarks/linear_cublaslt.py --out out/cublaslt.json                  # on a Hopper GPU, some 180 s
    python benchmarks/linear_cublaslt.py --parts steps --chosen FILE --out out/cublaslt-steps.json
    TRITON_INTERPRET=1 python benchmarks/linear_cublaslt.py --tiny --out FILE     # without one: torch's op stands in

`F.linear` with a bias asks cuBLASLt's heuristic for one algorithm and runs it. The heuristic can name many for a
shape, which differ in tile, cluster, stages and the order of tiles. One that adds along K in the same order has the
same bits, and at the card's power limit the one that takes the least energy is the fastest. The library is the one
that torch has loaded, so this needs no dependency and no kernel of ours. Two parts:

    layers    by shape of a step at 6144 tokens: each algorithm's bits against F.linear's, on random data and on the
              probes that tell the order along K; milliseconds by turns; of the best few millijoules, between loops of
              F.linear
    steps     whole steps by turns with the algorithms that took the least energy: by shape, and all together. Chosen
              are those of `layers`, of this run or of the file that --chosen names

An algorithm whose bits differ gets no time. FILE is written after each row, so that a run that is cut off leaves what
it has. The numbers of attributes and the layout of structures are those of cublasLt.h as a C program printed them
(cuBLAS 13.1.0.3, 13.1.2.11 and 13.10 agree); torch 2.11.0+cu130 comes with the first of these.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import math
import re
import statistics
import tempfile
import time
from collections import Counter
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

PARTS = ("layers", "steps")
ROWS = 6144

# -- the library -------------------------------------------------------------------------------------------------------

_COMPUTE_32F, _R_32F, _R_16BF, _TRANSPOSED = 68, 0, 14, 1
_TRANSA, _EPILOGUE, _BIAS_POINTER = 3, 7, 8  # of an operation
_EPILOGUE_BIAS = 4
_MAX_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)  # of a preference; the alignments of A, B, C and D
_WORKSPACE = 32 << 20  # what torch offers on Hopper


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = (("data", c_uint64 * 8),)


class Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Config(NamedTuple):
    """An algorithm's attributes, as numbers of cublasLt.h, by which it is found again.

    nth    of those of one shape whose attributes are all the same, in the heuristic's order
    """

    id: int
    tile: int
    split_k: int
    reduction: int
    swizzle: int
    option: int
    stages: int
    inner: int
    cluster: int
    nth: int = 0

    @property
    def name(self) -> str:
        always = ("id", "tile", "stages", "cluster")
        parts = (f"{key} {value}" for key, value in self._asdict().items() if key in always or value != _USUAL[key])
        return ", ".join(parts)


_USUAL = {"split_k": 1, "reduction": 0, "swizzle": 0, "option": 0, "inner": 0, "nth": 0}
_ATTRIBUTES = (c_int32, c_uint32, c_int32, c_uint32, c_uint32, c_uint32, c_uint32, c_uint16, c_uint16)  # types, from 0

_CLUSTERS = (2, 16)  # of one block, to 1 x 16
_CAPABILITIES = {"tile": 6, "stages": 13, "option": 7}


class Failed(Exception):
    """A call of cuBLASLt did not return success."""


@functools.cache
def library(path: str | None = None) -> ctypes.CDLL:
    """cublasLt as torch has loaded it. All arguments get their types, as ctypes would cut pointers to 32 bits."""
    lt = ctypes.CDLL(path or loaded())
    p = c_void_p
    types = {
        "MatmulDescCreate": (p, c_int, c_int),
        "MatmulDescSetAttribute": (p, c_int, p, c_size_t),
        "MatrixLayoutCreate": (p, c_int, c_uint64, c_uint64, c_int64),
        "MatmulPreferenceCreate": (p,),
        "MatmulPreferenceDestroy": (p,),
        "MatmulPreferenceSetAttribute": (p, c_int, p, c_size_t),
        "MatmulAlgoGetHeuristic": (p, p, p, p, p, p, p, c_int, p, p),
        "MatmulAlgoInit": (p, c_int, c_int, c_int, c_int, c_int, c_int, c_int, p),
        "MatmulAlgoCheck": (p, p, p, p, p, p, p, p),
        "MatmulAlgoCapGetAttribute": (p, c_int, p, c_size_t, p),
        "MatmulAlgoConfigGetAttribute": (p, c_int, p, c_size_t, p),
        "MatmulAlgoConfigSetAttribute": (p, c_int, p, c_size_t),
        "Matmul": (p, p, p, p, p, p, p, p, p, p, p, p, p, p, c_size_t, p),
    }
    for name, arguments in types.items():
        function = getattr(lt, f"cublasLt{name}")
        function.argtypes, function.restype = arguments, c_int
    lt.cublasLtGetVersion.restype = c_size_t
    return lt


def loaded() -> str:
    """Where the library lies that this process has loaded, by its SONAME."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libcublasLt.so"):
            return path
    raise Failed("this process has not loaded cublasLt: no matmul has run on a GPU")


def ask(name: str, *arguments: Any) -> None:
    if status := getattr(library(), f"cublasLt{name}")(*arguments):
        raise Failed(f"cublasLt{name} returned {status}")


def created(name: str, *arguments: Any) -> c_void_p:
    made = c_void_p()
    ask(f"{name}Create", byref(made), *arguments)
    return made


def put(name: str, into: Any, attribute: int, value: Any) -> None:
    ask(f"{name}SetAttribute", into, attribute, byref(value), ctypes.sizeof(value))


def attributes(algorithm: Algorithm) -> Config:
    """What it is, read back. An attribute that the library does not know of this algorithm is 0."""
    values = []
    for number, kind in enumerate(_ATTRIBUTES):
        value, written = kind(), c_size_t()
        get = library().cublasLtMatmulAlgoConfigGetAttribute
        status = get(byref(algorithm), number, byref(value), ctypes.sizeof(value), byref(written))
        values.append(0 if status else value.value)
    return Config(*values)


def _accepted(algorithm: Algorithm) -> dict[str, list[int]]:
    """The values that an algorithm's attributes may have, for those that change no sum."""
    get = library().cublasLtMatmulAlgoCapGetAttribute
    found = {"swizzle": [0, 1], "cluster": list(range(_CLUSTERS[0], _CLUSTERS[1] + 1))}
    for name, number in _CAPABILITIES.items():
        values, written = (c_uint32 * 1024)(), c_size_t()
        size = ctypes.sizeof(values) if name != "option" else 4
        if not get(byref(algorithm), number, byref(values), size, byref(written)):
            some = values[: written.value // 4]
            found[name] = list(range(min(some[0], 63) + 1)) if name == "option" and some else some
    return found


# -- one shape ---------------------------------------------------------------------------------------------------------


def alignment(t: Tensor) -> int:
    """In bytes, at most 256, as torch tells the heuristic."""
    return math.gcd(t.data_ptr(), 256)


class Problem:
    """y [M, N] = x [M, K] @ w.T + bias, in bf16 with sums in fp32, set up for cuBLASLt as torch sets it up.

    cuBLAS has columns next to each other where torch has rows, so to cuBLAS this is y.T = w @ x.T: A is w, transposed,
    and B is x. One lives as long as the process, for a shape and the alignments of its tensors.
    """

    def __init__(self, m: int, n: int, k: int, alignments: tuple[int, ...], bias: int, workspace: int = _WORKSPACE):
        self.handle = torch.cuda.current_blas_handle()  # a cuBLAS handle is one of cuBLASLt's
        self.operation = created("MatmulDesc", _COMPUTE_32F, _R_32F)
        put("MatmulDesc", self.operation, _TRANSA, c_int32(_TRANSPOSED))
        put("MatmulDesc", self.operation, _EPILOGUE, c_uint32(_EPILOGUE_BIAS))
        put("MatmulDesc", self.operation, _BIAS_POINTER, c_void_p(bias))  # for its alignment
        self.a, self.b, self.d = (
            created("MatrixLayout", _R_16BF, rows, columns, rows) for rows, columns in ((k, n), (k, m), (n, m))
        )
        self.one, self.zero = c_float(1.0), c_float(0.0)
        self.results = self._from_heuristic(alignments, workspace)

    def _from_heuristic(self, alignments: tuple[int, ...], workspace: int) -> dict[Config, Result]:
        """In its order, the first is torch's."""
        preference = created("MatmulPreference")
        put("MatmulPreference", preference, _MAX_WORKSPACE, c_uint64(workspace))
        for attribute, value in zip(_ALIGNMENTS, alignments, strict=True):
            put("MatmulPreference", preference, attribute, c_uint32(value))
        found, count = (Result * _REQUESTED)(), c_int()
        layouts = (self.a, self.b, self.d, self.d)
        how = (preference, _REQUESTED, byref(found), byref(count))
        ask("MatmulAlgoGetHeuristic", self.handle, self.operation, *layouts, *how)
        ask("MatmulPreferenceDestroy", preference)
        results: dict[Config, Result] = {}
        same: Counter[Config] = Counter()
        for result in found[: count.value]:
            if result.state == 0:
                config = attributes(result.algorithm)
                results[config._replace(nth=same[config])] = result
                same[config] += 1
        return results

    def configured(self, config: Config) -> Result:
        """An algorithm made from its attributes and no more, where the library finds that it runs; else Failed."""
        algorithm, result = Algorithm(), Result()
        types = (_COMPUTE_32F, _R_32F, _R_16BF, _R_16BF, _R_16BF, _R_16BF)
        ask("MatmulAlgoInit", self.handle, *types, config.id, byref(algorithm))
        for number, (kind, value) in enumerate(zip(_ATTRIBUTES, config[:-1], strict=True)):
            if number:  # the first is the algorithm's own number, and can only be read
                put("MatmulAlgoConfig", byref(algorithm), number, kind(value))
        layouts = (self.a, self.b, self.d, self.d)
        ask("MatmulAlgoCheck", self.handle, self.operation, *layouts, byref(algorithm), byref(result))
        if result.state or result.workspace > _WORKSPACE:
            raise Failed(f"state {result.state}, {result.workspace} bytes of workspace")
        result.algorithm = algorithm
        return result

    def add_neighbours(self, first: int) -> None:
        """To the results: those that differ in one attribute from one of the heuristic's first ones.

        cublasLt.h does not say whether attributes describe the newest kernels in full. So others are made only where an
        algorithm made of its attributes is the heuristic's own, byte for byte; and the library itself checks each.
        """
        for config, result in list(self.results.items())[:first]:
            try:
                if bytes(self.configured(config).algorithm) != bytes(result.algorithm):
                    continue
            except Failed:
                continue
            for attribute, values in _accepted(result.algorithm).items():
                for value in values:
                    other = config._replace(**{attribute: value}, nth=0)
                    if other not in self.results:
                        try:
                            self.results[other] = self.configured(other)
                        except Failed:
                            continue

    def launch(self, x: Tensor, w: Tensor, bias: Tensor, y: Tensor, result: Result, workspace: Tensor | None) -> None:
        """On the current stream. Nothing is allocated and nobody waits, so a CUDA graph can hold it."""
        put("MatmulDesc", self.operation, _BIAS_POINTER, c_void_p(bias.data_ptr()))
        of_a, of_b, of_d = (w.data_ptr(), self.a), (x.data_ptr(), self.b), (y.data_ptr(), self.d)
        scratch = (None, 0) if workspace is None else (workspace.data_ptr(), workspace.numel())
        stream = torch.cuda.current_stream().cuda_stream
        matmul = (self.handle, self.operation, byref(self.one), *of_a, *of_b, byref(self.zero), *of_d, *of_d)
        ask("Matmul", *matmul, byref(result.algorithm), *scratch, stream)


_REQUESTED = 64
_problems: dict[tuple[Any, ...], Problem] = {}


def problem(given: lin.Layer) -> Problem:
    (m, k), n = given.x.shape, given.w.shape[0]
    # Torch gives the alignment of the bias for D's, and C and D are one tensor.
    alignments = tuple(alignment(t) for t in (given.w, given.x, given.y, given.bias))
    key = (m, n, k, alignments)
    if key not in _problems:
        _problems[key] = Problem(m, n, k, alignments, given.bias.data_ptr())
    return _problems[key]


class Way(NamedTuple):
    """One algorithm, with the interface of `linear.Way`."""

    config: Config

    @property
    def name(self) -> str:
        return self.config.name

    def fits(self, n: int, k: int) -> bool:
        return n % 8 == 0 and k % 8 == 0

    def call(self, given: lin.Layer, epilogue: str) -> lin.Call:
        """A prepared launch on the tensors of a layer, into its y."""
        if epilogue != "plain":
            raise ValueError(f"epilogue is {epilogue!r}; accepted: 'plain'")
        if not (given.x.is_contiguous() and given.w.is_contiguous() and given.y.is_contiguous()):
            raise ValueError("x, w or y is not contiguous; accepted: contiguous ones")
        one = problem(given)
        result = one.results.get(self.config) or one.configured(self.config)
        # Of each call its own: two streams of a step may run the same layer at a time.
        workspace = None
        if result.workspace:
            workspace = torch.empty(result.workspace, dtype=torch.uint8, device=given.x.device)

        def call() -> Tensor:
            one.launch(given.x, given.w, given.bias, given.y, result, workspace)
            return given.y

        return call


def launched(call: lin.Call) -> str:
    """The kernels of a call with their grids and blocks, from a CUDA graph of it."""
    call()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "graph.dot")
        graph.debug_dump(str(path))
        text = path.read_text()
    if not (found := kernels_in(text)):
        raise Failed(f"no kernel was found in the text of the graph: {text[:300]!r}")
    return found


def kernels_in(text: str) -> str:
    """What CUDA writes of a graph has `name<<<blocks,threads,bytes>>>` of each kernel, with escapes."""
    return "; ".join(f"{name} <{sizes}>" for name, sizes in re.findall(r"(\w+)\\?<\\?<\\?<([^\\>]+)", text))


# -- layers ------------------------------------------------------------------------------------------------------------

_DATA = ("random", "wide", "infinities and NaN")  # of `linear._OPERANDS`
_SLOWER = 1.04  # than F.linear by turns: such an algorithm is not asked for its energy


def candidates(run: ls.Run, given: lin.Layer, beyond: int) -> dict[str, Any]:
    """By name, in the heuristic's order; then the neighbours of so many of its first."""
    if beyond and not run.tiny:
        problem(given).add_neighbours(beyond)
    ways = [ls.Stand()] if run.tiny else [Way(config) for config in problem(given).results]
    return {way.name: way for way in ways}


def described(given: lin.Layer, way: Way) -> dict[str, Any]:
    """An algorithm's attributes, what the heuristic says of it, and whether its attributes alone make it again."""
    one = problem(given)
    result = one.results[way.config]
    try:
        again: Any = bytes(one.configured(way.config).algorithm) == bytes(result.algorithm)
    except Failed as error:
        again = str(error)
    figures = {"workspace": result.workspace, "waves": round(result.waves, 3), "made of its attributes": again}
    return {"config": way.config._asdict()} | figures


def unlike(given: lin.Layer, kind: str, ways: dict[str, Any], exact: bool) -> dict[str, str]:
    """Those ways whose bits are not F.linear's on data of this kind, and what is wrong."""
    if not exact:
        (m, k), n = given.x.shape, given.w.shape[0]
        given = given._replace(x=lin._OPERANDS[kind](m, k), w=lin._OPERANDS[kind](n, k))
    wanted, wrong = F.linear(given.x, given.w, given.bias), {}
    for name, way in ways.items():
        try:
            given.y.fill_(-1.0)
            if count := lin.unequal(way.call(given, "plain")(), wanted):
                wrong[name] = f"{kind}: {count} elements differ"
        except Exception as error:
            wrong[name] = f"{kind}: {type(error).__name__}: {error}"
    return wrong


def orders(given: lin.Layer, ways: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """What is wrong with F.linear's order along K, "" where it is the one chain; and the ways that differ from it."""
    (m, k), n = given.x.shape, given.w.shape[0]
    of_torch, wrong = "", {}
    zero = torch.zeros_like(given.bias)
    for probe in probes(m, n, k, lin.DEVICE):
        asked = lin.Layer(probe.x, probe.w, zero, given.y, zero, given.y)
        wanted = F.linear(probe.x, probe.w, zero)
        if count := lin.unequal(wanted, probe.right.to(wanted.dtype).expand_as(wanted).contiguous()):
            of_torch = of_torch or f"{count} outputs differ in the probes of {probe.what}"
        for name, way in ways.items():
            given.y.fill_(float("nan"))
            if name not in wrong and (count := lin.unequal(way.call(asked, "plain")(), wanted)):
                wrong[name] = f"{count} outputs differ in the probes of {probe.what}"
    return of_torch, wrong


def layers(run: ls.Run, best: int, beyond: int, seconds: float) -> None:
    found = run.results["layers"] = {}
    shapes = [(96, 48)] if run.tiny else list(ls.LARGE_SHAPES)
    for index, (n, k) in enumerate(shapes):
        m = 70 if run.tiny else ROWS
        left = seconds - (time.perf_counter() - ls._BEGAN)
        if left < 4:
            found[f"{m} x {n} x {k}"] = "no time was left"
            continue
        row = found.setdefault(f"{m} x {n} x {k}", {})
        one_shape(run, row, (m, n, k), best, beyond, left / (len(shapes) - index))
        lin.free()


def one_shape(
    run: ls.Run, row: dict[str, Any], shape: tuple[int, int, int], best: int, beyond: int, seconds: float
) -> None:
    """Into `row`: `algorithms` by name, `turns` in milliseconds, `energy`, and what was `chosen` by it, if any."""
    ends, (m, n, k) = time.perf_counter() + seconds, shape
    given = lin.layer(m, n, k, exact=run.tiny)
    stock = functools.partial(ls._linear, given.x, given.w, given.bias)
    stock()  # loads cuBLAS
    ways = candidates(run, given, beyond)
    row["algorithms"] = {name: {} if run.tiny else described(given, way) for name, way in ways.items()}
    for kind in _DATA[:1] if run.tiny else _DATA:
        drop(row, ways, unlike(given, kind, ways, run.tiny))
    of_torch, wrong = orders(given, ways)
    row["F.linear's order along K"] = of_torch or "one chain"
    drop(row, ways, wrong)
    for name in ways:
        row["algorithms"][name]["bits"] = "equal"
    calls = {"F.linear": stock} | {name: way.call(given, "plain") for name, way in ways.items()}
    if not run.tiny:
        name_kernels(row, calls)
    run.say(f"{m} x {n} x {k}: {len(row['algorithms'])} algorithms, {len(ways)} with F.linear's bits")
    run.keep()
    turns = row["turns"] = lin.by_turns(calls, span=5.0, rounds=4)
    run.keep()
    left_out = {"F.linear", first_of_torch(row)}
    quick = sorted((t, name) for name, t in turns.items() if name not in left_out and t <= _SLOWER * turns["F.linear"])
    energy(run, row, calls, [name for _, name in quick[:best]], ends)


def drop(row: dict[str, Any], ways: dict[str, Any], wrong: dict[str, str]) -> None:
    for name, text in wrong.items():
        row["algorithms"][name]["bits"] = text
        del ways[name]


def name_kernels(row: dict[str, Any], calls: dict[str, lin.Call]) -> None:
    """Also tells whether the heuristic's first algorithm launches what F.linear launches."""
    try:
        kernels = {name: launched(call) for name, call in calls.items()}
    except Exception as error:  # nothing that is measured needs the names
        row["kernels"] = f"{type(error).__name__}: {str(error)[-300:]}"
        return
    row["F.linear launches"] = kernels.pop("F.linear")
    for name, kernel in kernels.items():
        row["algorithms"][name]["kernel"] = kernel
    first = kernels.get(next(iter(row["algorithms"])))
    row["the first is F.linear's"] = first == row["F.linear launches"]


def first_of_torch(row: dict[str, Any]) -> str | None:
    """The name of the heuristic's first algorithm, if it launches what F.linear launches."""
    return next(iter(row["algorithms"])) if row.get("the first is F.linear's") else None


def energy(run: ls.Run, row: dict[str, Any], calls: dict[str, lin.Call], names: list[str], ends: float) -> None:
    """Loops of 1.5 s, two algorithms between two of F.linear, each over the mean of F.linear before and after it."""
    loops: list[tuple[str, dict[str, float]]] = []
    row["energy"] = {}
    longest = 0.0
    for name in order(names):
        began = time.perf_counter()
        if began + longest > ends and len(loops) > 2 and loops[-1][0] == "F.linear":
            break
        loops.append((name, lin.sustained(calls[name])))
        longest = max(longest, time.perf_counter() - began)
        row["energy"].setdefault(name, []).append(loops[-1][1])
        run.say(f"    {name}: {loops[-1][1]}")
        run.keep()
    over = row["over F.linear"] = {}
    for index, (name, figures) in enumerate(loops):
        if name != "F.linear":
            before = [one for other, one in loops[:index] if other == "F.linear"][-1:]
            after = [one for other, one in loops[index:] if other == "F.linear"][:1]
            over[name] = {
                unit: round(figures[unit] / statistics.mean(one[unit] for one in before + after), 4)
                for unit in ("ms", "mJ")
                if unit in figures
            }
    costs = {name: cost(ratios) for name, ratios in over.items()}
    least = min(costs, key=costs.__getitem__, default=None)
    row["chosen"] = least if least is not None and (costs[least] < 1 or run.tiny) else None
    run.say(f"    chosen: {row['chosen']} {over.get(row['chosen'], '')}")
    run.keep()


def order(names: list[str]) -> list[str]:
    """F.linear, two algorithms, F.linear, two more, and so on; last F.linear."""
    found = ["F.linear"]
    for index in range(0, len(names), 2):
        found += [*names[index : index + 2], "F.linear"]
    return found


def cost(ratios: dict[str, float]) -> float:
    """Energy; time where NVML did not tell energy."""
    energy = ratios.get("mJ", math.nan)
    return ratios["ms"] if math.isnan(energy) else energy


# -- steps -------------------------------------------------------------------------------------------------------------


def chosen(results: dict[str, Any]) -> dict[tuple[int, int], Any]:
    """By N and K, from what `layers` found; shapes whose first algorithm is the best have none."""
    ways: dict[tuple[int, int], Any] = {}
    for shape, row in results.get("layers", {}).items():
        _, n, k = map(int, shape.split(" x "))
        if isinstance(row, dict) and (name := row.get("chosen")):
            config = row["algorithms"][name].get("config")
            ways[n, k] = ls.Stand() if config is None else Way(Config(**config))
    return ways


def tried_in_steps(ways: dict[tuple[int, int], Any], tiny: bool) -> dict[str, ls.Tried]:
    if tiny:
        return {"all": ls.Tried(plain={ls.ANY: next(iter(ways.values()))})}
    tried = {f"{n} x {k}: {way.name}": ls.Tried(plain={(n, k): way}) for (n, k), way in ways.items()}
    together = {"all": ls.Tried(plain=ways)} if len(ways) > 1 else {}
    return together | tried | {"bitfuse again": ls.Tried()}


def steps(run: ls.Run, ways: dict[tuple[int, int], Any]) -> None:
    found = run.results["6144 tokens"] = {"layers": run.layers}
    row = found["steps"] = {}
    if not ways:
        row["bitfuse"] = "no shape has a better algorithm than its first"
        return
    model, geometry = ls.built(run)
    run.say("-- the model")
    whole = ls.Steps(model, geometry)
    names = ls.prepared(run, whole, row, {"bitfuse": ls.Tried()} | tried_in_steps(ways, run.tiny))
    count = 2 if run.tiny else 6
    one = ls._turn(whole.calls["bitfuse"], count) * count * len(names) / 1e3
    rounds = min(6, max(1, int((run.left() - 3) / one)))
    row |= ls.by_turns({name: whole.calls[name] for name in names}, rounds, count)
    for name in names:
        row[name]["by a kernel"] = whole.ran[name]
    run.keep()


# -- the program -------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> None:
    for shape, row in results.get("layers", {}).items():
        if not isinstance(row, dict):
            print(shape, row)
            continue
        said = ("F.linear's order along K", "F.linear launches", "the first is F.linear's", "kernels", "chosen")
        print(shape, {key: row[key] for key in said if key in row})
        for name, one in row["algorithms"].items():
            turns, ratios = row.get("turns", {}), row.get("over F.linear", {})
            print(f"    {name}: {one.get('bits')}, {turns.get(name)} ms of {turns.get('F.linear')}, {ratios.get(name)}")
            print(f"        {one.get('kernel')}, made of its attributes: {one.get('made of its attributes')}")
    for line in ls.table(results):
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU, in Triton's interpreter")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--chosen", type=Path, help="a file of an earlier run, whose algorithms the steps try")
    parser.add_argument("--best", type=int, default=6, help="of a shape, so many algorithms are asked for their energy")
    parser.add_argument("--beyond", type=int, default=0, help="also the neighbours of so many of the heuristic's first")
    parser.add_argument("--layers", type=int, default=48, help="of the transformer")
    parser.add_argument("--seconds", type=float, default=180.0, help="after which nothing more is begun")
    given = parser.parse_args()
    if lin.DEVICE.type != "cuda" and not (given.tiny and interpreting()):
        parser.error("there is no GPU here; accepted without one: TRITON_INTERPRET=1 and --tiny")
    if given.parts == ["steps"] and given.chosen is None:
        parser.error("--parts steps alone needs --chosen, the file of a run with layers")
    torch.manual_seed(17)
    results = {
        "what": "linears by other algorithms of cuBLASLt",
        "machine": machine(lin.DEVICE),
        "versions": ls.versions(),
        "exit_code": 1,
    }
    run = ls.Run(given.tiny, 1 if given.tiny else given.layers, given.seconds, results, given.out)
    with torch.no_grad():
        if lin.DEVICE.type == "cuda":
            lin.stock(lin.layer(64, 64, 64), "plain")  # loads cuBLAS
            results["versions"]["cublasLt"] = library().cublasLtGetVersion()
        if "layers" in given.parts:
            for_layers = given.seconds * (0.5 if "steps" in given.parts else 1.0)
            layers(run, given.best, given.beyond, for_layers)
        if "steps" in given.parts:
            earlier = results if given.chosen is None else json.loads(given.chosen.read_text())
            steps(run, chosen(earlier))
    results["exit_code"], results["seconds"] = 0, round(time.perf_counter() - ls._BEGAN, 1)
    run.keep()
    table(results)


if __name__ == "__main__":
    main()
