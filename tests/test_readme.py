"""The README says what the measurements say, and what it tells a user to type works."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bitfuse
from bitfuse.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def _tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_json():
    assert _tables().filled(README) == README, "run `make readme`"


def test_benchmark_documents_name_machine_and_versions_and_have_no_red_gate():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        document = _tables().json.loads(path.read_text())
        for fact in ("device", "driver", "torch", "triton", "date"):
            assert document["machine"][fact], f"{path.name}: {fact}"
        if "equal" in document:
            assert document["equal"] is True, path.name
            rows = [r for part in ("operators", "overhead", "model", "first_step") for r in document.get(part, ())]
            assert rows, path.name
            assert all(row["mismatch"] is None for row in rows), path.name
        else:
            assert document["exit_code"] == 0, path.name


def test_names_in_the_readme_exist():
    names = set(re.findall(r"bitfuse\.(\w+)\(", README))
    assert names
    for name in names:
        assert hasattr(bitfuse, name), name


def test_files_in_the_tree_exist():
    files = re.findall(r"^[│├└─\s]*([\w/.]+\.(?:py|md)|\w+/)\s{2,}", README, flags=re.MULTILINE)
    assert files
    for file in files:
        found = list(ROOT.rglob(file.rstrip("/")))
        assert [f for f in found if ".venv" not in f.parts], file


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`bitfuse (\w+)", README))))
def test_commands_in_the_readme_have_help_with_an_example(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
