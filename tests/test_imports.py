"""What the package imports and when, which way its imports run, and what may not stand in it at all."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import bitfuse
from bitfuse.core.kernel import EXACT
from bitfuse.moved import MOVED
from bitfuse.tools import names

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

HEAVY = {
    *("triton", "diffusers", "transformers", "accelerate", "rich", "typer", "matplotlib", "jinja2", "jsonschema"),
    *("numpy.testing", "torch._dynamo"),
}
EVIDENCE = ("bitfuse.core.evidence", "bitfuse.core.values", "bitfuse.core.emulated")


def _is_evidence(module):
    return module.endswith("_evidence") or module in EVIDENCE


@pytest.fixture(scope="module")
def fresh():
    """What a process has after `import torch, bitfuse` that it had not after `import torch`."""
    return _imported()


def _imported():
    code = """
import json, sys, time, torch
before, start = set(sys.modules), time.process_time()
import bitfuse
seconds, new = time.process_time() - start, set(sys.modules) - before
print(json.dumps({"seconds": seconds, "new": sorted(new), "cuda": torch.cuda.is_initialized()}))
"""
    return json.loads(_python(code))


def test_importing_bitfuse_imports_nothing_heavy(fresh):
    assert "bitfuse.ops" in fresh["new"]
    assert HEAVY.intersection(fresh["new"]) == set()
    assert not fresh["cuda"]


def test_importing_bitfuse_imports_no_tool(fresh):
    assert [name for name in fresh["new"] if name.startswith(("bitfuse.tools", "bitfuse.cli"))] == []


def test_importing_bitfuse_imports_no_evidence(fresh):
    assert [name for name in fresh["new"] if _is_evidence(name)] == []


def test_importing_bitfuse_costs_at_most_half_a_second(fresh):
    # of the processor's time: the wall clock would measure what else the machine is doing
    assert fresh["seconds"] < 0.5 or min(_imported()["seconds"] for _ in range(3)) < 0.5


def test_importing_bitfuse_asks_cuda_nothing_and_needs_only_torch():
    """A process that has only imported us must still be able to fork and then use CUDA."""
    code = """
import sys, torch
def refuse(*args): raise SystemExit("CUDA was asked")
for name in ("_cuda_getDeviceCount", "_cuda_init", "_cuda_isInBadFork"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, refuse)
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.current_device = torch.cuda._lazy_init = refuse
for missing in ("triton", "diffusers", "rich", "typer"):
    sys.modules[missing] = None
import bitfuse
print("imported")
"""
    assert _python(code) == "imported\n"


_OF_HOSTS = {old: now for old, now in MOVED.items() if {"hosts.diffusers", "hosts.sglang"} & {*now}}


@pytest.mark.parametrize(
    "moved",
    [
        {old: now for old, now in MOVED.items() if old not in _OF_HOSTS},
        pytest.param(_OF_HOSTS, marks=pytest.mark.slow),  # which import all of diffusers and SGLang
    ],
    ids=["ours", "of large hosts"],
)
def test_every_old_name_imports_says_so_and_is_the_new_module(moved):
    """All in one process, each with a warning that names where its things are now."""
    code = f"""
import importlib, json, warnings
import bitfuse
wrong = []
for old, now in {moved!r}.items():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = importlib.import_module(f"bitfuse.{{old}}")
        except ModuleNotFoundError as error:  # of a host that is not installed, or not all of it
            assert not error.name.startswith("bitfuse"), error
            continue
    modules = [importlib.import_module(f"bitfuse.{{name}}") for name in now]
    told = [str(w.message) for w in said if w.category is DeprecationWarning]
    expected = f"bitfuse.{{old}} is now " + " and ".join(m.__name__ for m in modules)
    same = found is modules[0] if len(modules) == 1 else all(
        getattr(found, name) is value or any(name in vars(m) for m in modules)
        for module in modules for name, value in vars(module).items() if not name.startswith("__")
    )
    if told.count(expected) != 1 or not same:
        wrong.append([old, told, same])
print(json.dumps(wrong))
"""
    assert len(MOVED) > 30
    assert moved
    assert json.loads(_python(code)) == []


def test_an_old_name_is_an_attribute_too():
    """`import bitfuse` imported them: `bitfuse.contract` without an import of its own is what scripts have."""
    code = """
import warnings
warnings.simplefilter("ignore")
import bitfuse
assert bitfuse.contract.Operator is bitfuse.Operator
assert bitfuse.hosts.patch.Handle is bitfuse.Handle
assert bitfuse.ops.split_rotary is bitfuse.ops.rope
for package in (bitfuse, bitfuse.hosts, bitfuse.ops):
    assert not hasattr(package, "no_such_module") and not hasattr(package, "proof.bits")
print("found")
"""
    assert _python(code) == "found\n"


def test_what_is_set_by_an_old_name_is_set_where_it_is_looked_up():
    """As `monkeypatch.setattr`, `mock.patch` and `import *` of last month's scripts expect of one module."""
    code = """
import warnings
from unittest import mock
warnings.simplefilter("ignore")
import bitfuse.proof, bitfuse.contract
from bitfuse.core import bits, operator, proof
from bitfuse.contract import *
assert Operator is operator.Operator and "Operator" in dir(bitfuse.contract)
first = bits.compare
assert proof.compare is first
bitfuse.proof.compare = other = lambda *args: None
assert bits.compare is proof.compare is bitfuse.proof.compare is other
bitfuse.proof.compare = first
with mock.patch("bitfuse.proof.compare", other):
    assert bits.compare is proof.compare is other
assert bits.compare is proof.compare is bitfuse.proof.compare is first
for change in (lambda: delattr(bitfuse.proof, "nothing"), lambda: bitfuse.proof.nothing):
    try:
        change()
    except AttributeError as error:
        assert str(error) == "module 'bitfuse.proof' has no attribute 'nothing'"
print("set")
"""
    assert _python(code) == "set\n"


def test_the_command_s_process_has_every_public_name_when_it_is_asked_for(tmp_path):
    """There `import bitfuse` imports no torch, and nobody else is told apart from before."""
    script = tmp_path / "bitfuse"  # by which name bitfuse knows its command
    script.write_text("""
import sys, warnings
warnings.simplefilter("ignore")
import bitfuse
assert "torch" not in sys.modules and {*bitfuse.__all__} <= {*dir(bitfuse)} and bitfuse.__version__
from bitfuse import *
import torch
from bitfuse.core import operator
assert Operator is bitfuse.Operator is operator.Operator and bitfuse.contract.Operator is Operator
assert OPERATORS is operator.OPERATORS and torch.ops.bitfuse.head_gate and not hasattr(bitfuse, "nothing")
print(len(OPERATORS))
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (f"{len(names.OPERATORS)}\n", "")


@pytest.mark.parametrize("argv", ["sys.argv", "['/usr/bin/bitfuse', 'demo', '--steps', '2']", "[]"])
def test_another_process_has_all_of_bitfuse_at_once(argv):
    """Also one that Python starts for a process of the command, and tells the command's arguments."""
    code = f"import sys; sys.argv = {argv}; import bitfuse, torch; print(torch.ops.bitfuse.head_gate)"
    assert _python(code) == "bitfuse.head_gate\n"


def test_an_unknown_name_is_not_answered():
    assert importlib.util.find_spec("bitfuse.no_such_module") is None
    assert importlib.util.find_spec("bitfuse.contract") is not None


# -- which way imports run -----------------------------------------------------------------------------------------

# core <- ops <- run <- hosts <- the front door (bitfuse/__init__, front, moved) <- tools <- cli; each by what it may
# import
MAY_IMPORT = {
    "core": {"core"},
    "ops": {"core", "ops"},
    "run": {"core", "run"},
    "hosts": {"core", "ops", "run", "hosts"},
    "front door": {"core", "ops", "run", "hosts", "front door"},
    "tools": {"core", "ops", "run", "hosts", "front door", "tools"},
    "cli": {"core", "ops", "run", "hosts", "front door", "tools", "cli"},
}
ROOMS = {
    **dict.fromkeys(("bitfuse", "bitfuse.front", "bitfuse.moved"), "front door"),
    **dict.fromkeys(("bitfuse.cli", "bitfuse.__main__"), "cli"),
}
# SGLang's workers call bitfuse as a user does: the plug-in is theirs
BESIDE = {
    "hosts/sglang_plugin.py": {"bitfuse"},
    # an entry names, as data for tools, which of them knows the host's model with seeded weights
    "hosts/registry.py": {f"bitfuse.tools.seeded.{host}" for host in ("diffusers", "ltx_core", "sglang")},
}


def _is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def _name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module):
    return ROOMS.get(module) or module.split(".")[1]


def _of(node):
    """The modules of bitfuse that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if alias.name.split(".")[0] == "bitfuse"}
    if not isinstance(node, ast.ImportFrom):
        return set()
    assert not node.level, "relative imports hide the direction"
    if (node.module or "").split(".")[0] != "bitfuse":
        return set()
    names = {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if _is_module(name) else node.module for name in names}


def _imports(source):
    """Every module of bitfuse that this source imports, at whatever depth, for types or for good."""
    return set().union(*(_of(node) for node in ast.walk(ast.parse(source))))


def _for_good(source):
    """Those that are imported when the module itself is."""
    found, statements = set(), list(ast.parse(source).body)
    for node in statements:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            statements += node.orelse
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            statements += [n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
        found |= _of(node)
    return found


def _spelled(source):
    """Modules that a string names, as `importlib.import_module("bitfuse.tools.doctor")` does."""
    strings = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {s for s in strings if s.startswith("bitfuse.") and not s.endswith(".") and _is_module(s)}


def _trespasses(where, source):
    """What a file imports or names that its room must not know."""
    module = _name(PACKAGE / where)
    front = _room(module) == "front door"  # which loads tools when they are asked for
    names = _for_good(source) if front else _imports(source) | _spelled(source)
    names -= BESIDE.get(where, set())
    return {name for name in names if _room(name) not in MAY_IMPORT[_room(module)]}


def test_imports_run_one_way():
    found = {_here(path): _trespasses(_here(path), path.read_text()) for path in FILES}
    assert {where: names for where, names in found.items() if names} == {}
    assert {_room(_name(path)) for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("where", "source", "trespass"),
    [
        ("core/bits.py", "from bitfuse.ops import head_gate", "bitfuse.ops.head_gate"),
        ("core/bits.py", "def f():\n    import bitfuse.hosts.site", "bitfuse.hosts.site"),
        ("ops/head_gate.py", "from bitfuse.run.audit import BitfuseWarning", "bitfuse.run.audit"),
        ("run/audit.py", "from bitfuse.ops.head_gate import HEAD_GATE", "bitfuse.ops.head_gate"),
        ("hosts/site.py", "import importlib\nimportlib.import_module('bitfuse.tools.doctor')", "bitfuse.tools.doctor"),
        ("hosts/site.py", "import bitfuse", "bitfuse"),
        ("__init__.py", "from bitfuse.tools.compare.trace import trace", "bitfuse.tools.compare.trace"),
        ("__init__.py", "try:\n    import bitfuse.tools\nexcept ImportError:\n    pass", "bitfuse.tools"),
        ("tools/doctor.py", "from bitfuse.cli import main", "bitfuse.cli"),
        ("tools/compare/trace.py", "from bitfuse import cli", "bitfuse.cli"),
    ],
)
def test_the_scan_above_finds_a_trespass(where, source, trespass):
    assert _trespasses(where, source) == {trespass}


def test_the_front_door_may_load_tools_later():
    source = "if TYPE_CHECKING:\n    from bitfuse.tools.compare.trace import trace\ndef f():\n    import bitfuse.tools"
    assert _trespasses("__init__.py", source) == set()
    assert _trespasses("core/bits.py", source) == {"bitfuse.tools.compare.trace", "bitfuse.tools"}


def _evidence_for_good(where, source):
    if _is_evidence(_name(PACKAGE / where)) or where.startswith("tools/"):
        return set()
    return {name for name in _for_good(source) if _is_evidence(name)}


def test_evidence_is_loaded_when_a_kernel_is_proved():
    found = {_here(path): _evidence_for_good(_here(path), path.read_text()) for path in FILES}
    assert {where: names for where, names in found.items() if names} == {}


def test_the_scan_above_finds_evidence():
    source = "from bitfuse.core import emulated, values\nfrom bitfuse.core.evidence import Evidence"
    assert _evidence_for_good("ops/head_gate.py", source) == set(EVIDENCE)
    assert _evidence_for_good("tools/doctor.py", source) == set()
    later = "if TYPE_CHECKING:\n    from bitfuse.core import values\ndef f():\n    import bitfuse.core.evidence"
    assert _evidence_for_good("ops/head_gate.py", later) == set()


REFERENCES = {o.reference.__name__ for o in bitfuse.OPERATORS.values()}


def _of_other_operators(where, source):
    """What an operator's file takes of another's, except references and helpers that turn values."""
    own, found = _name(PACKAGE / where), set()
    for node in ast.walk(ast.parse(source)):
        for module in _of(node):
            if _room(module) != "ops" or module in (own, own.removesuffix("_evidence")):
                continue
            if _is_evidence(own) and _is_evidence(module):
                continue
            names = {alias.name for alias in node.names if f"{node.module}.{alias.name}" != module}
            whole = {n.attr for n in ast.walk(ast.parse(source)) if _is_attribute_of(n, module.split(".")[-1])}
            names = names or whole
            may = {n for n in names if n in REFERENCES or n.startswith("turn_") or n in ("Chain", "CHAINS", "misfit")}
            found |= {f"{module}.{name}" for name in names - may}
    return found


def _is_attribute_of(node, module):
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module


def test_of_another_operator_only_its_reference_is_taken():
    """Which is the PyTorch chain itself: so each file can be read alone."""
    paths = [path for path in (PACKAGE / "ops").glob("*.py") if path.name != "__init__.py"]
    found = {_here(path): _of_other_operators(_here(path), path.read_text()) for path in paths}
    assert {where: names for where, names in found.items() if names} == {}


def test_the_scan_above_finds_what_is_taken():
    source = "from bitfuse.ops import rope\nfrom bitfuse.ops.modulate import modulate, _plan\nrope.tile()"
    found = _of_other_operators("ops/head_gate.py", source)
    assert "bitfuse.ops.modulate._plan" in found
    assert "bitfuse.ops.modulate.modulate" not in found


def test_the_package_imports_every_operator_file():
    assert {p.parent for p in OPERATOR_FILES} == {PACKAGE / "ops"}
    assert {f"bitfuse.ops.{p.stem}" for p in OPERATOR_FILES} <= _imports((PACKAGE / "ops" / "__init__.py").read_text())


def test_core_and_operators_do_not_grow():
    """Without evidence: what somebody reads who wants to know how a call is decided and computed. 3,000 lines is what
    it should be; it had 5,060 before it had folders (and since then perturbed_attention.py, `rerouted`, grid_rotary.py,
    swiglu.py; for the video decoder pixel_norm.py, depth_to_space.py, convolution.py, volume_mean.py, volumes.py, and
    proofs of large volumes in pieces; gelu.py and tensor_core.py; what a convolution's proof meets without memory; and
    for ComfyUI 255 lines: the references of eight operators, of which each has a signature, a source and a sentence or
    two, a multiply-add in bf16, and the forms of the kernels; a kernel for all widths that are padded without a norm,
    and kernels that threads compile while others wait, a source at a time)."""
    paths = [path for path in FILES if _room(_name(path)) in ("core", "ops") and not _is_evidence(_name(path))]
    assert not any(path.stem.endswith(("_common", "_cases")) for path in paths)
    assert sum(len(path.read_text().splitlines()) for path in paths) < 6960


# -- what may not stand in the package -----------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "subprocess", "socket", "ctypes", "cffi", "requests", "urllib"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "torch.load", "os.system", "os.popen", "yaml.load"}
ALLOWED_MODULES = {
    "ptx.py": {"subprocess"},  # runs Triton's own cuobjdump; nothing else imports it
    "bench.py": {"subprocess"},  # a first step can be timed in a fresh process only: this Python, our own code
    "run.py": {"subprocess"},  # and so can a first decode
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


FACTORIES = {
    "arange",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "tensor",
}
FACTORIES |= {"as_tensor", "randperm", "scalar_tensor", "zeros"}


def _without_a_device(source):
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    made = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in FACTORIES)
    of_torch = (call for call in made if ast.unparse(call.func.value) == "torch")
    return [ast.unparse(call) for call in of_torch if not any(word.arg in ("device", None) for word in call.keywords)]


def test_every_tensor_is_made_on_a_device_that_is_named():
    """`torch.set_default_device` is the caller's. What was made on it met a CPU's tensor in a probe."""
    rooms = ("core", "ops", "hosts", "run")
    files = [path for path in FILES if _room(_name(path)) in rooms and not _is_evidence(_name(path))]
    assert {_here(path): found for path in files if (found := _without_a_device(path.read_text()))} == {}
    assert _without_a_device("torch.tensor(1.0)\ntorch.zeros(2, device=x.device)") == ["torch.tensor(1.0)"]


def test_operator_files_stay_short():
    lines = {_here(path): len(path.read_text().splitlines()) for path in OPERATOR_FILES}
    longer = {"ops/adaln.py": 620}  # it has one kernel, and twelve references of up to twenty lines
    assert {where: n for where, n in lines.items() if n > longer.get(where, 550)} == {}


def test_every_plan_is_launched_with_fusion_of_multiply_and_add_off():
    assert EXACT == {"enable_fp_fusion": False}
    for name, operator in bitfuse.OPERATORS.items():
        plans = [tier.plan(*case.arguments("cpu", tokens=3)) for case in operator.cases for tier in operator.tiers]
        plans = [plan for plan in plans if not isinstance(plan, str)]
        assert plans, name
        assert all(plan.options == EXACT for plan in plans), name
