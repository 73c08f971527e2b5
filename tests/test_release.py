"""A version has one name: in package, metadata, changelog, citation and tag. A wheel holds all of the package, and asks
for what it imports."""

from __future__ import annotations

import ast
import email
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bitfuse

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"


def test_the_installed_version_is_the_package_s():
    assert importlib.metadata.version("bitfuse") == bitfuse.__version__


def test_the_changelog_begins_with_what_is_not_released_or_with_this_version():
    first = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert first == "Unreleased" or first.startswith(bitfuse.__version__)


def test_a_tag_on_this_commit_names_this_version():
    done = subprocess.run(
        ["git", "tag", "--points-at", "HEAD", "--list", "v*"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode or not done.stdout.strip():
        pytest.skip("this commit is no release")
    assert done.stdout.split() == [f"v{bitfuse.__version__}"]


def test_the_citation_is_one_and_names_this_version():
    """What the schema of cff-version 1.2.0 requires, and that nothing stands there but names of it that we use.

    The whole schema was held against the file on 2026-11-29 (cffconvert 2.0.0).
    """
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    required = {"cff-version", "message", "title", "authors"}
    assert (
        required <= cited.keys() <= required | {"type", "abstract", "version", "license", "keywords", "date-released"}
    )
    assert (cited["cff-version"], cited["type"], cited["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert cited["version"] == bitfuse.__version__
    assert all(author.keys() == {"name"} for author in cited["authors"]), "an entity: a person has given-names"
    assert all(isinstance(word, str) for word in cited["keywords"])
    assert len(set(cited["keywords"])) == len(cited["keywords"])


# -- the wheel ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built by the backend that pyproject.toml names, without a network."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("dist")
    build = "import sys, hatchling.build; hatchling.build.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_holds_all_of_the_package_and_nothing_else(wheel):
    """Modules, templates, schemas, py.typed, the licence and the command."""
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        metadata = email.message_from_bytes(opened.read(next(n for n in names if n.endswith(".dist-info/METADATA"))))
        commands = opened.read(next(n for n in names if n.endswith(".dist-info/entry_points.txt"))).decode()
    info = f"bitfuse-{bitfuse.__version__}.dist-info/"
    ours = [path for path in (SOURCES / "bitfuse").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {n for n in names if not n.startswith(info)} == {path.relative_to(SOURCES).as_posix() for path in ours}
    assert {"bitfuse/py.typed", "bitfuse/templates/verify.html.j2", "bitfuse/schemas/proof.schema.json"} <= {*names}
    assert f"{info}licenses/LICENSE" in names
    assert metadata["Version"] == bitfuse.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"demo", "diffusers"} <= {*metadata.get_all("Provides-Extra")}
    assert "bitfuse = bitfuse.cli:main" in commands
    assert "bitfuse = bitfuse.hosts.sglang_plugin:register" in commands


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    """What is there of bitfuse where the wheel was installed and no checkout is: a call of its command, from there."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder)

    def call(*args):
        environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        where = tmp_path_factory.mktemp("elsewhere")
        command = [sys.executable, *args]
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, where

    assert call("-c", "import bitfuse; print(bitfuse.__file__)")[0].startswith(str(folder))
    return call


def test_the_command_answers_from_a_wheel(unpacked):
    assert unpacked("-m", "bitfuse", "--version")[0] == f"bitfuse {bitfuse.__version__}\n"


@pytest.mark.slow  # the same commands as from a checkout, whose files the test above has counted
def test_verify_and_demo_run_from_a_wheel(unpacked):
    pytest.importorskip("diffusers")
    files = ("--json", "proof.json", "--html", "proof.html")
    _, where = unpacked("-m", "bitfuse", "verify", "--op", "head_gate", "--device", "cpu", *files)
    assert json.loads((where / "proof.json").read_text())["exit_code"] == 0
    assert "<title>bitfuse " in (where / "proof.html").read_text()
    _, where = unpacked("-m", "bitfuse", "demo", "--device", "cpu", "--out", "out")
    assert json.loads((where / "out" / "report.json").read_text())["exit_code"] == 0
    assert "<title>bitfuse " in (where / "out" / "report.html").read_text()


# -- what is asked for -------------------------------------------------------------------------------------------------

# Looked for where it is used, with something to say where it is missing; Pillow comes with diffusers
OPTIONAL = {"PIL", "ltx_core", "pynvml", "sglang"}
# Imported where kernels are interpreted, after `verify` has made sure of numpy; else Triton has needed it before
WITH_NUMPY = {"core/interpreter.py", "tools/prove/planted.py"}


def imported(source):
    """Modules that are no part of Python or bitfuse, and whether each is imported with the source's own module."""
    found, tree = {}, ast.parse(source)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"bitfuse"}:
            found[name] = found.get(name, False) or node in tree.body
    return found


def not_asked_for(where, source, project):
    """What a module imports and `pip install bitfuse` does not bring: an adapter may import its host for good, another
    module only when it has work for it, and then an extra brings it."""
    always = {Requirement(line).name for line in project["dependencies"]}
    extras = {Requirement(line).name for lines in project["optional-dependencies"].values() for line in lines}
    may = always | extras | OPTIONAL
    adapter = where.startswith("hosts/") or where in WITH_NUMPY
    return {
        name for name, at_once in imported(source).items() if name not in (may if adapter or not at_once else always)
    }


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_is_imported_is_asked_for(project):
    package = SOURCES / "bitfuse"
    paths = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    found = {where: not_asked_for(where, path.read_text(), project) for where, path in paths.items()}
    assert {where: names for where, names in found.items() if names} == {}


def test_the_scan_above_finds_what_is_not_asked_for(project):
    """numpy: Triton's interpreter imports it and Triton asks for it in its tests alone, so a bare installation of
    bitfuse has none, and `bitfuse verify` says how to get it."""
    assert not_asked_for("run/memo.py", "import numpy as np", project) == {"numpy"}
    assert not_asked_for("core/interpreter.py", "import numpy as np", project) == set()
    assert not_asked_for("tools/page.py", "import jinja2.x", project) == {"jinja2"}
    assert not_asked_for("tools/page.py", "def f():\n    import jinja2, nothing", project) == {"nothing"}
    assert not_asked_for("hosts/diffusers.py", "from diffusers.models import x", project) == set()


def test_verify_says_how_to_get_numpy(monkeypatch):
    from rich.console import Console

    from bitfuse.tools import packages
    from bitfuse.tools.prove import verify

    monkeypatch.setattr(packages, "installed", lambda module: module != "numpy")
    with pytest.raises(packages.CannotRun, match=r"verify needs numpy, .*pip install 'bitfuse\[verify\]'"):
        verify.run(Console(), ["head_gate"], "cpu", None, False, None)
