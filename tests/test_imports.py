"""What the package imports and when, which way its imports run, and what may not stand in it at all."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import bitfuse
from bitfuse.core.kernel import EXACT

PACKAGE = Path(bitfuse.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
OPERATOR_FILES = sorted({Path(o.reference.__code__.co_filename) for o in bitfuse.OPERATORS.values()})


def _here(path):
    return path.relative_to(PACKAGE).as_posix()


def _python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- a fresh process -----------------------------------------------------------------------------------------------

LATER = [
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "rich",
    "typer",
    "matplotlib",
    "jinja2",
    "jsonschema",
    "numpy.testing",
]


def test_importing_bitfuse_imports_nothing_heavy():
    code = f"""
import json, sys, torch
before = set(sys.modules)
import bitfuse
new = set(sys.modules) - before
print(json.dumps([sorted(n for n in {LATER} if n in new), torch.cuda.is_initialized(), "bitfuse.ops" in new]))
"""
    assert json.loads(_python(code)) == [[], False, True]


def test_importing_bitfuse_asks_cuda_nothing():
    """A process that has only imported us must still be able to fork and then use CUDA."""
    code = """
import torch
def refuse(*args): raise SystemExit("CUDA was asked")
for name in ("_cuda_getDeviceCount", "_cuda_init", "_cuda_isInBadFork"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, refuse)
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = torch.cuda._lazy_init = refuse
import bitfuse
print("imported")
"""
    assert _python(code) == "imported\n"


@pytest.mark.parametrize("missing", ["triton", "diffusers", "rich", "typer"])
def test_importing_bitfuse_needs_only_torch(missing):
    assert _python(f"import sys; sys.modules[{missing!r}] = None\nimport bitfuse; print('imported')") == "imported\n"


def test_importing_bitfuse_costs_at_most_half_a_second():
    # of the processor's time: the wall clock would measure what else the machine is doing
    code = "import time, torch; t = time.process_time(); import bitfuse; print(time.process_time() - t)"
    assert statistics.median(float(_python(code)) for _ in range(3)) < 0.5


# -- which way imports run -----------------------------------------------------------------------------------------


def _imports(path):
    """Every module of bitfuse that a file imports, at whatever depth, for types or for good."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "bitfuse"}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "bitfuse"):
            assert not node.level, f"{path.name}: relative imports hide the direction"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if _is_module(name) else node.module)
    return found


def _is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


THIN = {f"bitfuse.{name}" for name in ("contract", "kernel", "numerics", "originals", "reduction", "proof", "values")}
FRONT = {
    *("__init__.py", "demo.py", "cli.py", "bench.py", "comparison.py", "divergence.py", "doctor.py", "runs.py"),
    "sites.py",
}

MAY_IMPORT = {
    "kernel.py": {"bitfuse.interpreter"},
    "interpreter.py": {"bitfuse.kernel"},
    "values.py": set(),
    "numerics.py": {"bitfuse.kernel"},
    "reduction.py": {"bitfuse.kernel", "bitfuse.numerics"},
    "proof.py": {"bitfuse.contract", "bitfuse.kernel"},  # the former for its types only
    "bits.py": {"bitfuse.proof"},
    "contract.py": {"bitfuse.proof", "bitfuse.kernel", "bitfuse.originals"},
    "originals.py": set(),
    "swap.py": set(),
    "graphs.py": {"bitfuse.proof", "bitfuse.contract", "bitfuse.swap"},
    "measure.py": {"bitfuse.proof", "bitfuse.contract"},
    "audit.py": {"bitfuse.proof", "bitfuse.contract", "bitfuse.kernel"},
    "hosts/patch.py": {"bitfuse.contract", "bitfuse.audit", "bitfuse.originals", "bitfuse.swap"},
    "hosts/common.py": {
        *("bitfuse.contract", "bitfuse.hosts.patch", "bitfuse.originals", "bitfuse.proof", "bitfuse.swap"),
    },
    "hosts/constant.py": {"bitfuse.contract", "bitfuse.graphs", "bitfuse.swap", "bitfuse.proof"},
}


def test_thin_modules_import_only_thinner_ones():
    beyond = {name: _imports(PACKAGE / name) - allowed for name, allowed in MAY_IMPORT.items()}
    assert {name: found for name, found in beyond.items() if found} == {}


def test_a_block_knows_only_operators_and_what_hosts_share():
    for name in ("diffusers_block.py", "diffusers_connectors.py", "ltx_core_block.py"):
        found = _imports(PACKAGE / "hosts" / name) - {"bitfuse.hosts.patch", "bitfuse.hosts.common", "bitfuse.swap"}
        assert found, name
        assert {n for n in found if not n.startswith("bitfuse.ops.") or n in SHARED} == set(), name


def test_proof_knows_the_contract_by_its_types_only():
    tree = ast.parse((PACKAGE / "proof.py").read_text())
    runtime = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "bitfuse.contract"]
    inner = [n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
    assert runtime == []
    assert not any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in inner)


SHARED = {f"bitfuse.ops.{p.stem}" for p in (PACKAGE / "ops").glob("*.py") if p.stem.endswith(("_common", "_cases"))}
REFERENCES = {o.reference.__code__.co_name: o for o in bitfuse.OPERATORS.values()}


def test_no_operator_imports_an_operator():
    """Of another operator's file its reference at most, which is the PyTorch chain itself."""
    for path in sorted((PACKAGE / "ops").glob("*.py")):
        where = _here(path)
        if path.name == "__init__.py":  # which imports them all, and nothing else
            assert all(name.startswith("bitfuse.ops.") for name in _imports(path)), where
            continue
        others = _imports(path) - THIN - SHARED
        if f"bitfuse.ops.{path.stem}" in SHARED:
            assert others == set(), f"{where} is shared by operators, and so knows none of them"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in others:
                for alias in node.names:
                    home = Path(REFERENCES[alias.name].reference.__code__.co_filename)
                    assert node.module == f"bitfuse.ops.{home.stem}", where
                others.discard(node.module)
        assert others == set(), where


def test_every_operator_file_is_imported_by_the_package():
    assert {p.parent for p in OPERATOR_FILES} == {PACKAGE / "ops"}
    assert {f"bitfuse.ops.{p.stem}" for p in OPERATOR_FILES} <= _imports(PACKAGE / "ops" / "__init__.py")


def test_nothing_but_the_front_door_imports_hosts():
    behind = [path for path in FILES if path.parent.name != "hosts" and _here(path) not in FRONT]
    found = {_here(path): [n for n in _imports(path) if n.startswith("bitfuse.hosts")] for path in behind}
    assert len(found) > 20
    assert {where: names for where, names in found.items() if names} == {}


def test_hosts_hold_no_numerics():
    files = sorted((PACKAGE / "hosts").glob("*.py"))
    assert len(files) > 8
    for path in files:
        allowed = {f"bitfuse.{name}" for name in ("contract", "proof", "graphs", "audit", "swap", "originals")}
        allowed |= {"bitfuse"} if path.name == "sglang_plugin.py" else set()  # what SGLang's workers call as users do
        found = {n for n in _imports(path) if not n.startswith(("bitfuse.ops.", "bitfuse.hosts"))}
        assert found - allowed == set(), _here(path)


# -- what may not stand in the package -----------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "subprocess", "socket", "ctypes", "cffi", "requests", "urllib"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "torch.load", "os.system", "os.popen", "yaml.load"}
ALLOWED_MODULES = {
    "ptx.py": {"subprocess"},  # runs Triton's own cuobjdump; nothing else imports it
    "bench.py": {"subprocess"},  # a first step can be timed in a fresh process only: this Python, our own code
}
ALLOWED_CALLS = {"kernel.py": {"exec"}}  # mutants: an edited copy of our own source


def _forbidden(path):
    """Forbidden modules and calls in a file, but for those that it may have."""
    tree = ast.parse(path.read_text())
    modules, calls = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call):
            calls.add(ast.unparse(node.func))
    modules = (modules & FORBIDDEN_MODULES) - ALLOWED_MODULES.get(path.name, set())
    return modules | ((calls & FORBIDDEN_CALLS) - ALLOWED_CALLS.get(path.name, set()))


def test_no_code_from_data_no_processes_no_network():
    assert {_here(path): found for path in FILES if (found := _forbidden(path))} == {}


def test_the_scan_above_can_fail(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("import pickle.x\neval('1')\n")
    assert _forbidden(path) == {"pickle", "eval"}


def test_operator_files_stay_short():
    lines = {_here(path): len(path.read_text().splitlines()) for path in OPERATOR_FILES}
    assert {where: n for where, n in lines.items() if n > 400} == {}


def test_every_plan_is_launched_with_fusion_of_multiply_and_add_off():
    assert EXACT == {"enable_fp_fusion": False}
    for name, operator in bitfuse.OPERATORS.items():
        plans = [tier.plan(*case.arguments("cpu", tokens=3)) for case in operator.cases for tier in operator.tiers]
        plans = [plan for plan in plans if not isinstance(plan, str)]
        assert plans, name
        assert all(plan.options == EXACT for plan in plans), name
