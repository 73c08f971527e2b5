"""benchmarks/session.py: a plan's commands are ones that exist, and what is not done in time is said."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from bitfuse.cli import app

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def session():
    spec = importlib.util.spec_from_file_location("session", ROOT / "benchmarks" / "session.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["session"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_plans_commands_and_options_exist(session):
    commands = [command for plan in session.PLANS.values() for command in plan]
    ours = [
        shlex.split(command.line.partition("-m bitfuse ")[2]) for command in commands if "-m bitfuse" in command.line
    ]
    assert len(ours) > 5
    for name, *options in ours:
        typer.main.get_command(app).commands[name].make_context(name, options)  # parses, and runs nothing
    names = [command.name for command in commands]
    assert len(set(names)) == len(names), "each has a file of its own"
    for command in commands:
        for word in shlex.split(command.line):
            assert not word.endswith(".py") or (ROOT / word).is_file()


def test_commands_run_in_order_each_within_its_time(session, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "card", lambda: "h100")
    grandchild = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    commands = [
        session.Command("good", "python -c \"import sys; open(sys.argv[1], 'w').write('{}')\" FILE", 60),
        session.Command("bad", "python -c 'raise SystemExit(3)'", 60),
        session.Command("long", shlex.join(["python", "-c", grandchild]), 1),
        session.Command("late", "python -c pass", 60),
    ]
    start = time.monotonic()
    rows = session.run(commands[:3], tmp_path / "out", 120)
    assert [(command.name, ended) for command, ended, _ in rows] == [
        ("good", "exit code 0"),
        ("bad", "exit code 3"),
        ("long", "cut off"),
    ]
    assert time.monotonic() - start < 50, "what a command started ends with it"
    (file,) = (tmp_path / "out").glob("*.json")
    assert json.loads(file.read_text()) == {}
    assert file.name[10:] == "-h100-good.json"
    assert [ended for _, ended, _ in session.run(commands[3:], tmp_path, -1)] == ["not begun"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce RTX 4090", "4090")],
)
def test_a_card_is_named_as_in_file_names(session, monkeypatch, name, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert session.card() == expected


def test_without_a_plan_they_are_listed_and_an_unknown_one_is_named(session, tmp_path):
    command = typer.Typer()
    command.command()(session.main)
    listed = CliRunner().invoke(command, ["--out", str(tmp_path)])
    assert listed.exit_code == 0
    assert all(plan in listed.output for plan in session.PLANS)
    unknown = CliRunner().invoke(command, ["nonsense", "--out", str(tmp_path)])
    assert unknown.exit_code == 2
    assert "'nonsense' is no plan" in unknown.output
