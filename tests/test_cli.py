"""The command line takes anything at all: a wrong call or file gets one line that says what is accepted, and code 2.

Over 500 wrong calls are made from what each command declares, so that a new command or option is tested by existing.
All run in this process, through `cli.main`, as the shell would call it.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import random
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
import typer

import bitfuse
from bitfuse import cli
from bitfuse.hosts.registry import HOSTS
from bitfuse.tools import doctor, explain, names, seeded
from bitfuse.tools.seeded import diffusers as seeded_diffusers

COMMANDS = {command.name or command.callback.__name__: command.callback for command in cli.app.registered_commands}

# What a line must hold
ACCEPTED = re.compile(
    "accepted|requires an argument|does not take a value|is needed|not? JSON|no proof document|can't be read|must be|"
    "Give either"
)


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    """Whatever a wrong call may write after all, it is not written into the checkout."""
    monkeypatch.chdir(tmp_path)


def call(*args, monkeypatch, capfd):
    """(exit code, stdout, stderr) of `bitfuse ARGS`."""
    monkeypatch.setattr(sys, "argv", ["bitfuse", *args])
    capfd.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code or 0
    out, err = capfd.readouterr()
    return code, out, err


def faults(calls, **fixtures):
    """What is wrong with the answers to these calls, each of which must be refused."""
    found = []
    for args in calls:
        try:
            code, out, err = call(*args, **fixtures)
        except BaseException as error:
            found.append((args, f"a traceback: {error!r}"))
            continue
        lines = err.splitlines()
        if code != 2:
            found.append((args, f"exit code {code}", err[-300:]))
        elif "Traceback" in out + err:
            found.append((args, "a traceback"))
        elif len(lines) != 1 or not lines[0].startswith("bitfuse: "):
            found.append((args, "not one line", err[-500:]))
        elif not ACCEPTED.search(lines[0]):
            found.append((args, "does not say what is accepted", lines[0]))
        elif not lines[0].isprintable():
            found.append((args, "holds terminal codes"))
    return found


# -- wrong calls, made from what the commands declare ------------------------------------------------------------------


def options(callback):
    """(option, type, typer's settings) of each option, and whether the command takes an argument."""
    found, takes_argument = [], False
    hints = typing.get_type_hints(callback, include_extras=True)
    for name in inspect.signature(callback).parameters:
        kind, settings = typing.get_args(hints[name])[:2]
        if isinstance(settings, typer.models.ArgumentInfo):
            takes_argument = True
            continue
        declared = (settings.default, *(settings.param_decls or ()))
        spelled = [d for d in declared if isinstance(d, str) and d.startswith("--")]
        plain = {k for k in (kind, *typing.get_args(kind)) if k is not type(None)}
        base = next((k for k in (bool, int, float, Path, str) if k in plain or list[k] in plain), str)
        found.append((spelled[0] if spelled else "--" + name.replace("_", "-"), base, settings))
    return found, takes_argument


NO_NUMBER = [
    *(
        "",
        " ",
        "x",
        "1.5",
        "1e3",
        "0x10",
        "nan",
        "inf",
        "-",
        "--",
        "1,000",
        "one",
        "٣x",
        "½",
        "٣",
        "1_0",
        "9" * 400,
        "9" * 5000,
        "1 2",
        "None",
    ),
    *("$(reboot)", "../..", "\x1b[31m1", "1\n2", "\udce9", "[1]", "{}", "%d"),
]
NO_NAME = [
    *("", " ", "nope", "CUDA ", "cuda:x", "\x1b[31mred", "a\nb", "é", "\udce9", "../../etc/passwd", "-1", "x" * 3000),
    *("%s", "{}", "[red]x[/]", "--", "split_rotary_fp33", "None"),
]
CHOICES = {"--op", "--case", "--device", "--only", "--ltx", "--dtype", "--random-weights"}


def wrong_values(option, kind, settings, tmp_path):
    """Values that this option must refuse."""
    if kind is int:
        low, high = settings.min, settings.max
        yield from NO_NUMBER
        yield from () if low is None else (str(low - 1), str(-(10**30)))
        yield from () if high is None else (str(high + 1), str(10**30))
    elif option in CHOICES:
        yield from NO_NAME
    elif kind is Path:
        a_file = tmp_path / "a file"
        a_file.write_text("{}")
        yield str(a_file / "below a file")
        if option in ("--json", "--html"):
            yield str(tmp_path)
        elif option == "--out":
            yield str(a_file)


def wrong_calls(name, callback, tmp_path):
    declared, takes_argument = options(callback)
    for option, kind, settings in declared:
        if kind is bool:
            yield from ([name, f"{option}={value}"] for value in ("1", "x", "", "no\n"))
            continue
        yield [name, option]  # without a value
        for value in wrong_values(option, kind, settings, tmp_path):
            yield [name, f"{option}={value}"]
    for unknown in ("--nope", "--n\x1bope", "-x", "-", "--=", "---", "--OP", "--\udce9", "-h"):
        if not (takes_argument and unknown == "-"):
            yield [name, unknown]
    if takes_argument:
        yield from (
            [name, value] for value in ("nowhere", "/nowhere/at/all", "a\nb", "\udce9", "no such thing", "x" * 3000)
        )
        yield [name, "two", "models"]
        yield [name]
    else:
        yield from ([name, value] for value in ("extra", "-", "\x1b[2J", "verify", ""))


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_calls_get_one_line_and_code_2(name, tmp_path, monkeypatch, capfd):
    calls = list(wrong_calls(name, COMMANDS[name], tmp_path))
    assert len(calls) >= 15
    assert faults(calls, monkeypatch=monkeypatch, capfd=capfd) == []


def test_wrong_commands(monkeypatch, capfd):
    wrong = [
        "nope",
        "Verify",
        "verfy",
        "",
        " ",
        "--nope",
        "-x",
        "\x1b[31m",
        "a\nb",
        "\udce9",
        "x" * 3000,
        "verify --op",
    ]
    assert faults([[w] for w in wrong], monkeypatch=monkeypatch, capfd=capfd) == []
    _, _, err = call("nope", monkeypatch=monkeypatch, capfd=capfd)
    assert all(name in err for name in COMMANDS)


def test_random_wrong_calls(tmp_path, monkeypatch, capfd):
    """Options, values and rubbish in any order, after an option that no command has."""
    dice = random.Random(4)
    names = [option for callback in COMMANDS.values() for option, _, _ in options(callback)[0]]
    calls = []
    for _ in range(200):
        rubbish = dice.choices([*names, *NO_NUMBER, *NO_NAME], k=dice.randrange(5))
        calls.append([dice.choice(list(COMMANDS)), f"--{dice.randbytes(3).hex()}z", *rubbish])
    assert faults(calls, monkeypatch=monkeypatch, capfd=capfd) == []


def test_there_are_enough_wrong_calls(tmp_path):
    count = sum(len(list(wrong_calls(name, callback, tmp_path))) for name, callback in COMMANDS.items())
    assert count >= 500, "and with random calls and wrong files twice as many"


# -- wrong files -------------------------------------------------------------------------------------------------------

GOOD = {"_class_name": "LTX2VideoTransformer3DModel", **seeded_diffusers.config(seeded.SMALL)}

# no JSON objects at all
BROKEN = {
    "empty": b"",
    "a space": b" ",
    "cut off": json.dumps(GOOD).encode()[:-20],
    "no JSON": b"num_layers: 2\n",
    "single quotes": b"{'a': 1}",
    "a list": b"[]",
    "a string": b'"x"',
    "a number": b"1",
    "null": b"null",
    "true": b"true",
    "NaN": b"NaN",
    "an infinite number": b"1e999",
    "a very long number": b"1" * 5000,
    "deep": b"[" * 100_000,
    "deep and closed": b"[" * 50_000 + b"]" * 50_000,
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "Latin-1": b'{"\xe9": 1}',
    "zeros": b"\0" * 100,
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "a pickle": b"\x80\x04\x95\x0f\x00\x00\x00",
    "two objects": b"{}{}",
    "a comment": b"{} // x",
    "a trailing comma": b'{"a": 1,}',
}

# JSON objects, of something else or of a transformer that can't be built
WRONG_CONFIGS = {
    "empty": {},
    "of another model": {"_class_name": "FluxTransformer2DModel"},
    "of no name": {**GOOD, "_class_name": None},
    "of a name that is a list": {**GOOD, "_class_name": ["x"]},
    "no layers": {**GOOD, "num_layers": 0},
    "fewer than none": {**GOOD, "num_layers": -1},
    "a billion layers": {**GOOD, "num_layers": 10**9},
    "half a layer": {**GOOD, "num_layers": 1.5},
    "layers in words": {**GOOD, "num_layers": "two\n\x1b[31mthree"},
    "true layers": {**GOOD, "num_layers": True},
    "no heads": {**GOOD, "num_attention_heads": 0},
    "negative heads": {**GOOD, "num_attention_heads": -4},
    "heads in words": {**GOOD, "num_attention_heads": "four"},
    "heads of no size": {**GOOD, "attention_head_dim": None},
    "too many heads": {**GOOD, "num_attention_heads": 10**18},
    "channels in a list": {**GOOD, "in_channels": [16]},
    "channels in words": {**GOOD, "audio_in_channels": "x"},
    "a rotary embedding that nobody knows": {**GOOD, "rope_type": "spiral"},
    "an activation that nobody knows": {**GOOD, "activation_fn": "sobel"},
    "a text of no width": {**GOOD, "caption_channels": None},
    "widths that don't fit": {**GOOD, "cross_attention_dim": 7},
}


@pytest.mark.parametrize("below", ["transformer", ""])
def test_wrong_configs_of_a_model(below, tmp_path, monkeypatch, capfd):
    calls = []
    files = {**BROKEN, **{f"config {name}": json.dumps(config).encode() for name, config in WRONG_CONFIGS.items()}}
    for name, content in files.items():
        folder = tmp_path / name / below
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes(content)
        calls.append(["explain", str(tmp_path / name), "--tokens", "4"])
    assert faults(calls, monkeypatch=monkeypatch, capfd=capfd) == []


def test_folders_that_are_no_model(tmp_path, monkeypatch, capfd):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("{}")
    (tmp_path / "in place of a file" / "config.json").mkdir(parents=True)
    (tmp_path / "broken link").symlink_to(tmp_path / "nowhere")
    calls = [["explain", str(path)] for path in (*tmp_path.iterdir(), os.devnull, "/proc/self/mem")]
    assert faults(calls, monkeypatch=monkeypatch, capfd=capfd) == []


FILE_OPTIONS = [
    (name, option)
    for name, callback in COMMANDS.items()
    for option, _, _ in options(callback)[0]
    if option in ("--check", "--config")
]


@pytest.mark.parametrize(("name", "option"), FILE_OPTIONS)
def test_wrong_files_to_read(name, option, tmp_path, monkeypatch, capfd):
    """A proof document or a request that is none: not JSON, or JSON of something else, or not there."""
    paths = [tmp_path / "nowhere", tmp_path, Path(os.devnull)]
    others = {
        "empty": {},
        "another": {"a": 1},
        "of a model": GOOD,
        "of types": {"machine": 1, "checks": {}, "steps": "x"},
    }
    for i, content in enumerate([*BROKEN.values(), *(json.dumps(other).encode() for other in others.values())]):
        path = tmp_path / f"{i}.json"
        path.write_bytes(content)
        paths.append(path)
    # `compare` wants a model as well; nothing is at that place, and the request is read first or it is refused for that
    model = ["/nowhere/at/all"] if options(COMMANDS[name])[1] else []
    calls = [[name, *model, option, str(path)] for path in paths]
    assert faults(calls, monkeypatch=monkeypatch, capfd=capfd) == []


# -- files that one has ------------------------------------------------------------------------------------------------


def test_an_output_is_never_another_file_of_the_same_call(tmp_path, monkeypatch, capfd):
    (tmp_path / "there").write_text("mine")
    (tmp_path / "hard").hardlink_to(tmp_path / "there")
    (tmp_path / "link").symlink_to("new")
    (tmp_path / "call.json").write_text("{}")
    explained = tmp_path / "model"
    explained.mkdir()
    (explained / "config.json").write_text(json.dumps(GOOD))
    calls = [
        ["verify", "--json", "F", "--html", "F"],
        ["verify", "--json", "F", "--html", "./F"],
        ["verify", "--json", "new", "--html", "link"],
        ["verify", "--json", "there", "--html", "hard"],
        ["verify", "--json", "F", "--html", "F/page.html"],
        ["verify", "--check", "there", "--json", "hard"],
        ["explain", "model", "--tokens", "4", "--json", "model/config.json"],
        ["compare", "/nowhere", "--config", "call.json", "--json", "./call.json"],
        ["compare", "/nowhere", "--out", "out", "--json", "out/compare.json"],
        ["compare", "/nowhere", "--out", "out", "--json", "out/../out/stock.wav"],
        ["compare", "/nowhere", "--out", "out", "--json", "out"],
    ]
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 4
    assert faults(calls, monkeypatch=monkeypatch, capfd=capfd) == []
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("at", [(doctor, "examine"), (cli.files, "open"), (os, "replace")], ids=lambda at: at[1])
@pytest.mark.parametrize(
    ("error", "exit_code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left"), 2)], ids=str
)
def test_what_stops_a_command_leaves_the_earlier_result(at, error, exit_code, tmp_path, monkeypatch, capfd):
    def fail(*args):
        raise error

    (tmp_path / "doctor.json").write_text("earlier")
    monkeypatch.setattr(doctor, "examine", lambda device: iter(()))
    monkeypatch.setattr(*at, fail, raising=False)
    code, _, err = call("doctor", "--json", "doctor.json", monkeypatch=monkeypatch, capfd=capfd)
    assert (code, len(err.splitlines())) == (exit_code, 1)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"doctor.json": "earlier"}


def test_a_benchmark_that_is_cut_off_leaves_the_earlier_one_and_what_it_had(tmp_path):
    (tmp_path / "b.json").write_text("earlier")
    kept = cli._Kept(tmp_path / "b.json")
    kept.save({"rows": [1]})
    assert {p.name: p.read_text()[:7] for p in tmp_path.iterdir()} == {"b.json": "earlier", "b.json.part": '{\n "row'}
    again = cli._Kept(tmp_path / "b.json")
    again.save({"rows": [1, 2]})
    again.end()
    assert json.loads((tmp_path / "b.json").read_text()) == {"rows": [1, 2]}
    assert json.loads((tmp_path / "b.json.part").read_text()) == {"rows": [1]}, "another run's"
    new = cli._Kept(tmp_path / "new.json")
    new.save({"rows": [1]})
    assert (tmp_path / "new.json").exists(), "where nothing was, a row is there as soon as it is measured"


def test_a_result_for_a_pipe_is_written_at_the_end_once(capfd):
    kept = cli._Kept(Path("/dev/stdout"))
    kept.save({"rows": [1]})
    kept.save({"rows": [1, 2]})
    kept.end()
    assert json.loads(capfd.readouterr().out) == {"rows": [1, 2]}


# -- right calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_shows_an_example(name, monkeypatch, capfd):
    code, out, err = call(name, "--help", monkeypatch=monkeypatch, capfd=capfd)
    assert (code, err) == (0, "")
    assert "Example" in out
    assert f"bitfuse {name}" in " ".join(out.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_help_and_writes_json(name, monkeypatch, capfd):
    code, out, err = call("--help", monkeypatch=monkeypatch, capfd=capfd)
    assert (code, err) == (0, "")
    assert name in out
    declared = {option for option, _, _ in options(COMMANDS[name])[0]}
    assert declared & {"--json", "--out"}, "a program may want to read what it found"


def test_no_command_shows_the_help(monkeypatch, capfd):
    code, out, err = call(monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2
    assert all(name in out + err for name in COMMANDS)
    assert "Traceback" not in err


def test_version(monkeypatch, capfd):
    assert call("--version", monkeypatch=monkeypatch, capfd=capfd) == (0, f"bitfuse {bitfuse.__version__}\n", "")


# -- what is answered at once ------------------------------------------------------------------------------------------

# `bitfuse` with each of these lists of arguments, in one process that cannot import what takes long: whatever asks for
# one of these modules is told that it is not there, and written down.
AS_THE_COMMAND = """
import contextlib, importlib.abc, io, json, sys

HEAVY = {"torch", "triton", "numpy", "diffusers", "transformers", "accelerate", "matplotlib", "jinja2", "jsonschema"}
asked = []

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HEAVY:
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
from bitfuse import cli

answers = []
for args in json.loads(sys.stdin.read()):
    sys.argv, code = ["bitfuse", *args], 0
    asked.clear()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    answers.append({"code": code, "asked": list(asked), "front": "bitfuse.front" in sys.modules, "out": out.getvalue()})
print(json.dumps(answers), sorted(HEAVY.intersection(sys.modules)))
"""


def as_the_command(calls, tmp_path):
    """What the command answers to each call: its exit code, and what it asked for that takes long to import."""
    script = tmp_path / "bitfuse"  # as pip calls it: bitfuse itself looks at this name
    script.write_text(AS_THE_COMMAND)
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(calls), capture_output=True, text=True, check=True
    )
    answers, loaded = done.stdout.rsplit(" [", 1)
    assert loaded == "]\n"
    return json.loads(answers)


def after_torch(args):
    """Whether what is wrong with a call is known only to what imports torch: the operators' cases, and their number."""
    return any(value.startswith("--case=") for value in args[1:])


def test_help_and_wrong_calls_import_nothing_that_takes_long(tmp_path):
    """Every help and each kind of wrong call that is made above: torch alone takes 3 to 7 s to import."""
    helps = [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)]
    made = [args for name, callback in COMMANDS.items() for args in wrong_calls(name, callback, tmp_path)]
    kinds = {tuple(word.split("=")[0] for word in args): args for args in made}  # one value an option
    wrong = [
        *kinds.values(),
        ["nope"],
        ["--nope"],
        ["bench", "--tokens", "5"],
        ["bench", "--host", "sglang"],
        ["bench", "--only", "run", "--ltx", "2.3"],
        ["compare", "owner/name", "--frames", "4"],
        ["compare", "owner/name", "--config", str(tmp_path / "nowhere")],
        ["compare", "--random-weights", "2.0", "--layers", "99"],
        ["explain", "owner/name", "--layers", "2"],
        ["explain", "--random-weights", "2.0", "--host", "sglang", "--dtype", "float32"],
        ["verify", "--deep", "--case", "any"],
        ["verify", "--device", "cuda", "--op", "nope"],
    ]
    wrong = [args for args in wrong if not after_torch(args)]
    assert len(wrong) > 120
    calls = [*helps, *wrong]
    answers = as_the_command(calls, tmp_path)
    late = [(args, a["asked"]) for args, a in zip(calls, answers, strict=True) if a["asked"] or a["front"]]
    assert late == []
    assert [a["code"] for a in answers] == [0, 0, 2, *[0] * len(COMMANDS), *[2] * len(wrong)]


WORK = {
    "verify": ["--op", "head_gate"],
    "demo": [],
    "compare": ["--random-weights", "2.0"],
    "bench": ["--only", "operators"],
    "explain": ["--random-weights", "2.0"],
    "doctor": [],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_with_work_imports_all_of_bitfuse_first(name, tmp_path):
    """And so every operator, whichever of them a tool itself would import: the front door is the first that asks for
    torch, and is not there where torch is not."""
    (answer,) = as_the_command([[name, *WORK[name]]], tmp_path)
    assert answer["asked"][:1] == ["torch"]
    assert not answer["front"]


def test_as_a_module_it_imports_no_torch_either():
    command = [sys.executable, "-X", "importtime", "-m", "bitfuse", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines()}
    assert done.stdout == f"bitfuse {bitfuse.__version__}\n"
    assert "bitfuse.cli" in imported
    assert imported.isdisjoint({"torch", "numpy", "triton", "bitfuse.front"})


def test_the_names_on_the_command_line_are_those_that_there_are():
    """Of ours: a test may have made another host or operator in this process."""
    ours = [
        name for name, operator in bitfuse.OPERATORS.items() if operator.reference.__module__.startswith("bitfuse.")
    ]
    assert list(names.OPERATORS) == ours, "tools/names.py must have every operator, in the order of definition"
    ours = [name for name, host in HOSTS.items() if host.adapter.startswith(("bitfuse.", "bitfuse_comfyui."))]
    assert list(names.HOSTS) == ours, "tools/names.py must have every host, in the order of the registry"
    assert list(explain.DTYPES) == list(names.DTYPES)


def test_a_shell_completes_commands_options_and_names(tmp_path):
    def completed(line):
        words = line.split(" ")
        shell = {"_BITFUSE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        command = [sys.executable, "-X", "importtime", "-m", "bitfuse"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **shell})
        assert not re.search(r"\| +torch\b", done.stderr)
        return done.stdout.split()

    assert completed("bitfuse ver") == ["verify"]
    assert "--random-weights" in completed("bitfuse explain --r")
    assert completed("bitfuse demo --host ") == list(names.HOSTS)
    assert completed("bitfuse verify --op qk_rms_norm_s") == [
        n for n in names.OPERATORS if n.startswith("qk_rms_norm_s")
    ]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("steps is 1; accepted: 2"), "steps is 1; accepted: 2"),
        (torch.OutOfMemoryError("CUDA\nout of memory"), "OutOfMemoryError: CUDA out of memory"),
        (PermissionError(13, "Permission denied", "f"), "PermissionError: [Errno 13] Permission denied: 'f'"),
        (ModuleNotFoundError("No module named 'x'"), "ModuleNotFoundError: No module named 'x'"),
        (RecursionError("too deep"), "RecursionError: too deep"),
    ],
)
def test_errors_that_come_up_later(error, line, monkeypatch, capfd):
    def examine(device):
        raise error

    monkeypatch.setattr(doctor, "examine", examine)
    code, _, err = call("doctor", monkeypatch=monkeypatch, capfd=capfd)
    assert (code, err) == (2, f"bitfuse: {line}\n")


def test_an_interruption_is_no_error(monkeypatch, capfd):
    def examine(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", examine)
    code, _, err = call("doctor", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 130, "as of any program that Ctrl-C ends"
    assert re.fullmatch("bitfuse: interrupted.*\n", err)


def test_an_error_that_nobody_thought_of(monkeypatch, capfd):
    monkeypatch.setattr(doctor, "examine", lambda device: {}["x"])
    code, _, err = call("doctor", monkeypatch=monkeypatch, capfd=capfd)
    assert code == 2
    assert re.fullmatch(r"bitfuse: unexpected KeyError \(test_cli\.py, line \d+\): 'x'; please report it: .*\n", err)


@pytest.mark.parametrize(("state", "code"), [(doctor.WARNING, 0), (doctor.FAILURE, 2)])
def test_doctor(state, code, tmp_path, monkeypatch, capfd):
    finding = doctor.Finding("a check", state, "found [red]this[/]", "it means that", "that")
    monkeypatch.setattr(doctor, "CHECKS", {"a check": lambda device: iter([finding])})
    path = tmp_path / "sub" / "doctor.json"
    found, out, err = call("doctor", "--json", str(path), monkeypatch=monkeypatch, capfd=capfd)
    assert (found, err) == (code, "")
    assert "[red]this[/]" in out, "what was found is no markup"
    assert json.loads(path.read_text())["findings"][0]["state"] == state


def test_explain(tmp_path, monkeypatch, capfd):
    pytest.importorskip("diffusers")
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    path = tmp_path / "explained.json"
    args = ["explain", str(tmp_path), "--tokens", "4", "--json", str(path)]
    code, out, err = call(*args, monkeypatch=monkeypatch, capfd=capfd)
    assert (code, err) == (0, "")
    assert "32 of 32 sites" in out
    assert json.loads(path.read_text())["sites_to_be_fused"] == 32
    args = ["explain", "--random-weights", "ltx-2.3", "--layers", "1", "--tokens", "4", "--dtype", "float16"]
    code, out, err = call(*args, monkeypatch=monkeypatch, capfd=capfd)
    assert (code, err) == (0, "")
    assert "18 of 24 sites" in out, "head gates are for bf16"


def test_an_error_goes_to_stderr_alone_and_is_not_folded(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert cli._fail("x " * 300) == 2
    assert (out.getvalue(), len(err.getvalue().splitlines())) == ("", 1)
