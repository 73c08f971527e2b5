"""ComfyUI as a host: `tests/inside_comfyui.py`, in a process of its own for each version; what the pack's files say.

The tests are skipped where ComfyUI's sources are not there (`tests/comfyui.py` unpacks them for `make test`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import bitfuse
import comfyui_host
from bitfuse.hosts.registry import HOSTS

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "comfyui"


def inside(version, *command):
    """A command in a process with this version of ComfyUI."""
    if not (comfyui_host.folder(version) / "comfy").is_dir():
        pytest.skip(f"ComfyUI {version} is not there; {comfyui_host.NEEDS}")
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, str(ROOT / "tests" / "comfyui_host.py"), version, *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables, cwd=ROOT)


# Of the other version, quickly: what depends on its code. The rest is `slow`
OF_EACH = "sampled or interpreter or wrongly or left_out or forms or front_door or nodes or doctor"


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ("0.30.0", ["-m", "not slow"]),
        ("0.27.0", ["-m", "not slow", "-k", OF_EACH]),
        pytest.param("0.30.0", ["-m", "slow"], marks=pytest.mark.slow),
        pytest.param("0.27.0", ["-k", f"not ({OF_EACH})"], marks=pytest.mark.slow),
    ],
)
def test_in_comfyuis_own_code(version, options):
    quietly = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    found = inside(version, "-m", "pytest", *quietly, *options, "tests/inside_comfyui.py")
    assert found.returncode == 0, f"{found.stdout[-6000:]}\n{found.stderr[-2000:]}"
    assert re.search(r"\d+ passed", found.stdout)


@pytest.mark.parametrize("version", comfyui_host.VERSIONS[:1])
def test_the_script_for_a_gpu_runs_on_a_small_model(version, tmp_path):
    out = tmp_path / "comfyui.json"
    found = inside(version, "benchmarks/comfyui.py", "--tiny", "--rounds", "1", "--out", str(out))
    assert found.returncode == 0, f"{found.stdout[-3000:]}\n{found.stderr[-3000:]}"
    said = json.loads(out.read_text())
    assert (said["exit_code"], said["sampler_differs"], said["left_behind"]) == (0, {}, [])
    assert said["rows"][0]["differs"] == {}
    assert said["machine"]["comfyui"] == version


@pytest.mark.slow  # ComfyUI is imported once more
def test_doctor_names_it():
    found = inside("0.30.0", "-m", "bitfuse", "doctor")
    assert "ComfyUI 0.30.0" in found.stdout
    assert "comfy-kitchen" in found.stdout


def test_where_the_pack_is_not_installed_it_is_quiet(monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path) != PACK])
    assert not HOSTS["comfyui"].installed or "bitfuse_comfyui" in sys.modules
    import torch

    with pytest.raises(TypeError, match="a ComfyUI LTXAVModel or a ModelPatcher of one, with the node pack"):
        bitfuse.accelerate(torch.nn.Linear(2, 2))


# -- the pack's files --------------------------------------------------------------------------------------------------


def test_both_say_under_which_licence_they_are():
    assert "GNU GENERAL PUBLIC LICENSE" in (PACK / "LICENSE").read_text()[:200]
    for text in ((PACK / "README.md").read_text(), (ROOT / "README.md").read_text()):
        assert "GPL-3.0" in text
        assert "Apache-2.0" in text
    for file in (PACK / "bitfuse_comfyui").glob("*.py"):
        assert file.read_text().startswith("# SPDX-License-Identifier: GPL-3.0-or-later\n"), file.name


def test_bitfuse_takes_nothing_of_the_pack():
    """bitfuse is Apache-2.0: of the pack it knows a name."""
    found = [file for file in (ROOT / "src").rglob("*.py") if "bitfuse_comfyui" in file.read_text()]
    assert [file.name for file in found] == ["registry.py"]


def test_the_packs_metadata():
    tomllib = pytest.importorskip("tomllib")
    found = tomllib.loads((PACK / "pyproject.toml").read_text())
    project, comfy = found["project"], found["tool"]["comfy"]
    assert "comfyui" not in project["name"].lower()  # the registry's rule
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert set(comfy) >= {"PublisherId", "DisplayName", "Icon", "includes", "requires-comfyui"}
    assert not any("torch" in one for one in project["dependencies"])  # a pack may not bring another one
    assert found["tool"]["setuptools"]["packages"] == ["bitfuse_comfyui"]


def test_pictures_are_drawn():
    for name in ("icon.svg", "graph.svg"):
        assert ElementTree.parse(PACK / name).getroot().tag.endswith("svg")
    assert "graph.svg" in (PACK / "README.md").read_text()


def test_the_example_workflow_is_whole():
    workflow = json.loads((PACK / "example_workflows" / "ltx2_bitfuse.json").read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    kinds = [node["type"] for node in nodes.values()]
    assert {"BitfuseLTX2", "BitfuseReport"} <= set(kinds)
    assert workflow["last_node_id"] == max(nodes)
    for link, source, output, target, given, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][given]["link"] == link
        assert nodes[source]["outputs"][output]["type"] == kind
    linked = {one["link"] for node in nodes.values() for one in node.get("inputs", ()) if one["link"] is not None}
    assert linked == {link[0] for link in workflow["links"]}
