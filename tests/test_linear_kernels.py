"""benchmarks/linear*.py: the kernels' bits in the interpreter, what the compiler makes of them, and a dry run."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core import values
from bitfuse.core.bits import differing
from bitfuse.core.kernel import interpreting
from bitfuse.core.tensor_core import HOPPER
from bitfuse.tools.prove import linear

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
BF16 = torch.bfloat16
needs_interpreter = pytest.mark.skipif(not interpreting(), reason="a GPU is here, so kernels are compiled")


@pytest.fixture(scope="module")
def kernels():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import linear_triton

        yield linear_triton
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("linear_triton", None)


@needs_interpreter
def test_gelu_of_every_value(kernels):
    every = values.every_16_bit_pattern(BF16, "cpu")
    wanted, counts = F.gelu(every, approximate="tanh"), []
    for form, _ in enumerate(kernels.GELU_FORMS):
        out = torch.empty_like(every)
        kernels.gelu_forms[(64, 1, 1)](every, out, form)
        counts.append(int(differing(wanted, out).sum()))
    assert counts[0] == 0
    assert counts[3] > 100, "without the rounding to a multiple of 2^-25 the negative tail differs"


@needs_interpreter
@pytest.mark.parametrize("following", ["plain", *linear.FOLLOWING])
@pytest.mark.parametrize("form", ["persistent", "once"])
def test_a_kernel_has_the_bits_of_the_chain(kernels, form, following):
    """70 rows in tiles of 32, three tiles of 32 columns, three steps along K."""
    m, n, k = 70, 96, 48
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(BF16)

    x, w, bias, residual, gate = normal(m, k), normal(n, k), normal(n), normal(m, n), normal(n)
    x[:, 3], x[:, 40] = 2.0**20, -(2.0**20)  # of what is added in between, some bits are lost
    w[:, 3], w[:, 40] = 1.0, 1.0
    y = torch.full((m, n), float("nan"), dtype=BF16)
    epilogue = {"plain": kernels.PLAIN, "gelu": kernels.GELU, "gated": kernels.GATED, "added": kernels.ADDED}[following]
    given = (x, w, bias, y, residual, gate, epilogue)
    kernel, grid, args, _ = kernels.launch(getattr(kernels, form), *given, (32, 32, 16), 4, 2, programs=3)
    kernel[grid](*args)
    expected = HOPPER.linear(x, w, bias)
    assert not torch.equal(expected, F.linear(x, w, bias)), "else the chain is not looked at"
    if following != "plain":
        expected = linear.follow(expected, linear.Given(x, w, bias, residual, gate), following)
    assert not differing(expected, y).any()


_COMPILE = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature
import linear_gluon, linear_gluon_pingpong, linear_triton

def compiled(jit, arguments, options):
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(jit.signature, jit.params, backend)
    bound, specialization, options = bind(*arguments, **options)
    options, signature, constants, attributes = jit._pack_args(backend, options, bound, specialization, options)
    source = (GluonASTSource if jit.is_gluon() else ASTSource)(jit, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)

def empty(*shape): return torch.empty(shape, dtype=torch.bfloat16)

m, n, k = 256, 512, 128
given = empty(m, k), empty(n, k), empty(n), empty(m, n), empty(m, n), empty(n)
rows = {}
for epilogue in (1, 2):
    for parts in (1, 2):
        kernel, _, args, options = linear_gluon.deferred(*given, epilogue, (128, 256, 64), 3, parts=parts)
        rows[f"gluon {parts} {epilogue}"] = compiled(kernel, args, options)
    for name, tile, warps, stages in (("persistent", (128, 256, 64), 8, 3), ("once", (128, 128, 64), 4, 3)):
        form = getattr(linear_triton, name)
        kernel, _, args, options = linear_triton.launch(form, *given, epilogue, tile, warps, stages)
        rows[f"{name} {epilogue}"] = compiled(kernel.compiled, args, options)
x, w, bias, y, _, _ = given
for kind, tile in linear_gluon_pingpong.TILES.items():
    stages = 4 if kind == "pingpong" else 3
    kernel, _, args, options = linear_gluon_pingpong.launch(kind, x, w, bias, y, 1, tile, stages)
    rows[f"{kind} 1"] = compiled(kernel, args, options)
print(json.dumps({name: {"ptx": c.asm["ptx"], "shared": c.metadata.shared} for name, c in rows.items()}))
"""


@pytest.mark.slow
def test_what_the_compiler_makes_of_them_for_hopper(triton_cache):
    """Gluon has no interpreter: that it compiles, and how it rounds, is all that is seen of it without a GPU."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**inherited, "TRITON_CACHE_DIR": str(triton_cache), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 11
    for name, row in rows.items():
        ptx = row["ptx"]
        assert "wgmma.mma_async.sync.aligned" in ptx, name
        assert ".local" not in ptx, name
        assert row["shared"] <= 227 << 10, f"{name}: a program of Hopper has 227 KiB"
        assert "cvt.rn.bf16" in ptx, name
        assert "cvt.rz" not in ptx, name
        contracted = ptx.count("fma.rn.f32")
        assert (contracted > 0) == name.endswith("1"), f"{name}: GELU fuses one sum, gate and residual none"
    for name, product, count in (
        ("pingpong", "m64n128k16", 24),
        ("together", "m64n128k16", 24),
        ("thirds", "m64n256k16", 12),
    ):
        assert rows[f"{name} 1"]["ptx"].count(f"wgmma.mma_async.sync.aligned.{product}") == count


@needs_interpreter
@pytest.mark.slow
def test_a_dry_run(tmp_path):
    out = tmp_path / "linear.json"
    command = [sys.executable, str(BENCHMARKS / "linear.py"), "--tiny", "--out", str(out)]
    done = subprocess.run(
        [*command, "--parts", "trial", "gelu", "shapes", "chain", "steady"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert not [name for name in found if "failed" in name]
    assert set(found["trial"].values()) == {"equal"}
    assert len(found["shapes"]) == 2
    for part in ("shapes", "chain"):
        for row in found[part].values():
            assert all(isinstance(value, float) for value in row.values()), "every way was equal, so each has a time"


@needs_interpreter
@pytest.mark.slow
def test_a_dry_run_of_steps(tmp_path, monkeypatch):
    out = tmp_path / "steps.json"
    command = [sys.executable, str(BENCHMARKS / "linear_steps.py"), "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["exit_code"] == 0
    assert set(found["trial"].values()) == {"equal"}
    parts = [part for part in found["6144 tokens"].values() if isinstance(part, dict)]
    ways = [way for part in parts for way in part.values() if not isinstance(way, list)]
    assert len(ways) > 15
    assert all(
        found[f"{tokens} tokens"]["together"].keys() > {"bitfuse", "GELU, down, out"} for tokens in (1536, 24576)
    )
    assert all(isinstance(way, dict) for way in ways), "every way was equal, so each has a time"
    together = found["6144 tokens"]["together"]
    assert together["bitfuse"]["by a kernel"] == {}
    assert together["all, with what follows"]["by a kernel"] == {"gelu": 2, "gated": 4, "plain": 48}
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables

    document = found | {"path": "out/steps.json"}
    assert "| all, with what follows | " in tables.linear_steps(document)
    assert tables.linear_power(document).count("| bitfuse | ") == 2


@needs_interpreter
def test_a_kernel_that_did_not_run_gets_no_time(monkeypatch):
    """A step in which nothing was replaced is equal to stock's, too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import linear_steps

    geometry, _ = linear_steps.seeded.geometry_for(linear_steps.DEVICE, 1)
    with torch.no_grad():
        steps = linear_steps.Steps(linear_steps.seeded.build(geometry, linear_steps.DEVICE, seed=0), geometry)
        monkeypatch.setattr(linear_steps, "patched", lambda tried: contextlib.nullcontext([]))
        wrong = steps.prepare("GELU", linear_steps.Tried(up=linear_steps.Stand()))
    assert wrong == "these ran by a kernel: {}"
    assert not steps.calls


@needs_interpreter
@pytest.mark.slow
def test_a_dry_run_of_cublaslt(tmp_path):
    out = tmp_path / "cublaslt.json"
    command = [sys.executable, str(BENCHMARKS / "linear_cublaslt.py"), "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["exit_code"] == 0
    (row,) = found["layers"].values()
    assert row["algorithms"] == {"torch's ops": {"bits": "equal"}}
    assert row["chosen"] == "torch's ops"
    assert len(row["energy"]["F.linear"]) == 2, "before the algorithm and after it"
    assert found["6144 tokens"]["steps"]["all"]["by a kernel"].keys() == {"plain"}


@pytest.fixture
def cublaslt(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import linear_cublaslt

    return linear_cublaslt


def test_a_result_of_cublaslt_is_laid_out_as_in_its_header(cublaslt):
    assert ctypes.sizeof(cublaslt.Result) == 96
    offsets = {name: getattr(cublaslt.Result, name).offset for name, _ in cublaslt.Result._fields_}
    assert offsets == {"algorithm": 0, "workspace": 64, "state": 72, "waves": 76, "reserved": 80}


def test_an_algorithm_of_cublaslt_is_named_by_its_attributes(cublaslt, monkeypatch):
    """As in results of before, whose choices --chosen takes; the library does not know the last one of this one."""
    values = [66, 24, 1, 0, 0, 7, 35, 0]

    def get(algorithm, number, value, size, written) -> int:
        assert size == ctypes.sizeof(value._obj)
        if number >= len(values):
            return 7
        value._obj.value = values[number]
        return 0

    known = types.SimpleNamespace(cublasLtMatmulAlgoConfigGetAttribute=get)
    monkeypatch.setattr(cublaslt, "library", lambda: known)
    assert cublaslt.named(cublaslt.Result()) == "id 66, tile 24, option 7, stages 35, cluster 0"
    values[2:4], values[7:] = [3, 2], [1, 5]
    of_split = "id 66, tile 24, split_k 3, reduction 2, option 7, stages 35, inner 1, cluster 5"
    assert cublaslt.named(cublaslt.Result()) == of_split


def test_an_algorithm_of_cublaslt_with_other_bits_gets_no_time(cublaslt):
    """One that is wrong in one element of random data, one in the probes of the order alone, one that fails."""

    class Wrong(cublaslt.ls.Stand):
        def call(self, given, epilogue):
            right = super().call(given, epilogue)

            def call() -> Tensor:
                if self.name == "fails":
                    raise RuntimeError("status 15")
                y = right()
                if self.name == "always" or given.bias.count_nonzero() == 0:  # the probes have no bias
                    y[3, 5] += 1
                return y

            return call

    ways = {name: Wrong(name) for name in ("always", "in the order", "fails")}
    ways["never"] = cublaslt.ls.Stand("never")
    run, row = cublaslt.ls.Run(True, 1, 100.0, {}, None), {}
    cublaslt.one_shape(run, row, cublaslt.lin.layer(70, 96, 48, exact=True), ways)
    bits = {name: one["bits"] for name, one in row["algorithms"].items()}
    assert bits["always"] == "random: 1 elements differ"
    assert bits["in the order"].startswith("probes of order")
    assert bits["fails"] == "random: RuntimeError: status 15"
    assert bits["never"] == "equal"
    assert row["turns"].keys() == {"F.linear", "never"}
    assert row["energy"].keys() == {"F.linear", "never"}


def test_loops_of_cublaslts_algorithms_stand_between_those_of_torch(cublaslt, monkeypatch):
    """Each is told as a multiple of the mean of the loops of F.linear before and after it, but for the very first."""
    spent = {"F.linear": [50.0, 100.0, 110.0, 120.0], "a": [105.0], "b": [84.0], "c": [92.0]}
    ran: list[str] = []

    def sustained(name: str) -> dict[str, float]:
        ran.append(name)
        return {"ms": 1.0, "mJ": spent[name].pop(0), "W": 700.0}

    monkeypatch.setattr(cublaslt.lin, "sustained", sustained)
    run, row = cublaslt.ls.Run(False, 1, 100.0, {}, None), {}
    cublaslt.energy(run, row, {name: name for name in spent}, ["a", "b", "c"])
    assert ran == ["F.linear", "F.linear", "a", "b", "F.linear", "c", "F.linear"]
    assert [one["mJ"] for one in row["energy"]["F.linear"]] == [100.0, 110.0, 120.0]
    assert row["over F.linear"] == {
        "a": {"ms": 1.0, "mJ": 1.0},
        "b": {"ms": 1.0, "mJ": 0.8},
        "c": {"ms": 1.0, "mJ": 0.8},
    }
    assert row["chosen"] == "b"


@pytest.mark.parametrize(
    ("of_torch", "of_it", "chosen"),
    [
        ({"ms": 1.0, "mJ": 100.0}, {"ms": 0.9, "mJ": 100.0}, None),
        ({"ms": 1.0, "mJ": 100.0}, {"ms": 1.1, "mJ": 99.0}, "a"),
        ({"ms": 1.0, "mJ": float("nan")}, {"ms": 0.9, "mJ": float("nan")}, "a"),
    ],
)
def test_an_algorithm_of_cublaslt_is_chosen_by_its_energy(cublaslt, monkeypatch, of_torch, of_it, chosen):
    """By its time where energy is not known."""
    figures, row = {"F.linear": of_torch, "a": of_it}, {}
    monkeypatch.setattr(cublaslt.lin, "sustained", figures.__getitem__)
    cublaslt.energy(cublaslt.ls.Run(False, 1, 100.0, {}, None), row, {name: name for name in figures}, ["a"])
    assert row["chosen"] == chosen
