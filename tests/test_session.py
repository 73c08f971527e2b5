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
    (file,) = (tmp_path / "out").glob("*-h100-*.json")
    assert json.loads(file.read_text()) == {}
    assert file.name[10:] == "-h100-good.json"
    assert [ended for _, ended, _ in session.run(commands[3:], tmp_path, -1)] == ["not begun"]


def test_what_ended_well_is_not_run_again_while_its_file_is_there(session, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "card", lambda: "h100")
    write = "python -c \"import sys; open(sys.argv[1], 'a').write('1')\" FILE"
    good, bad, silent = (
        session.Command("good", write, 60),
        session.Command("bad", write.replace("write('1')", "write('1') and sys.exit(1)"), 60),
        session.Command("silent", "python -c pass", 60),
    )

    def ended(*commands, seconds=120):
        return [how for _, how, _ in session.run(list(commands), tmp_path, seconds)]

    assert ended(good, bad, silent) == ["exit code 0", "exit code 1", "exit code 0"]
    # a file alone, as a command leaves it that failed, does not make it done
    assert ended(good, bad, silent) == ["done before", "exit code 1", "exit code 0"]
    (file,) = tmp_path.glob("*-good.json")
    assert file.read_text() == "1"
    assert ended(session.Command("good", write + " again", 60)) == ["exit code 0"], "another command of that name"
    file.unlink()
    assert ended(good) == ["exit code 0"]


def test_what_was_done_on_another_gpu_or_is_half_written_is_run_again(session, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "card", lambda: "cpu")
    good = session.Command("good", "python -c \"import sys; open(sys.argv[1], 'w').write('{}')\" FILE", 60)

    def ended():
        return session.run([good], tmp_path, 120)[0][1]

    assert [ended(), ended()] == ["exit code 0", "done before"]
    monkeypatch.setattr(session, "card", lambda: "h100")
    assert [ended(), ended()] == ["exit code 0", "done before"]
    (file,) = tmp_path.glob("*-h100-good.json")
    file.write_text('{"rows": [')
    assert [ended(), ended()] == ["exit code 0", "done before"]
    assert file.read_text() == "{}"


@pytest.mark.parametrize("text", ['{"half', "[]", '{"good": {"line": "x"}}', '{"good": 3}'])
def test_a_broken_list_of_what_is_done_is_named(session, tmp_path, text):
    (tmp_path / "done.json").write_text(text)
    with pytest.raises(typer.BadParameter, match=r"done\.json is no list of what is done"):
        session.run([], tmp_path, 120)


def test_an_interrupt_ends_what_was_started(session, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "card", lambda: "h100")
    started = []

    class Interrupted(session.subprocess.Popen):
        def wait(self, timeout=None):
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(session.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.run([session.Command("long", "python -c 'import time; time.sleep(60)'", 60)], tmp_path, 120)
    assert started[0].poll() is not None


def test_a_command_that_would_be_cut_off_waits_for_the_next_call(session, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "card", lambda: "h100")
    commands = [session.Command(name, "python -c pass", 500) for name in ("first", "second")]
    assert [how for _, how, _ in session.run(commands, tmp_path, 100)] == ["exit code 0", "not begun"]


def test_everything_fits_into_calls_of_ten_minutes(session):
    for plan in session.EVERYTHING:
        assert all(command.seconds <= 570 for command in session.PLANS[plan]), plan


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
