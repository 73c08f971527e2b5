"""What pages tell a user to type works: README, CONTRIBUTING, RELEASING, everything in docs, the node pack's page.

Every line of every block of shell, every command that stands in a sentence, at the head of a script or as an example of
`--help` is tried by the program's own parser, up to where its work would begin (`fault`): a wrong option, name or file
fails here, without a GPU and without a network. Every block of Python runs, on a pipeline of a few megabytes. Links are
for `make docs`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer
from packaging.requirements import InvalidRequirement, Requirement

import bitfuse
import tiny
from bitfuse import cli
from bitfuse.tools import seeded
from bitfuse.tools.prove import verify

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "RELEASING.md", "comfyui/README.md", ".github/ISSUE_TEMPLATE/bug.yml"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
STANDS_FOR = {"MODEL": "owner/name", "NAME": "head_gate", "HOST": "diffusers", "FILE": "out.json"}
"""What a page writes for something of the reader's."""
FOREIGN = {
    "comfy": "ComfyUI's own command",
    "git": "of no concern here",
    "pre-commit": "its own command",
    "sglang": "SGLang's own command; the variables before it are looked at",
}
"""Programs whose arguments nothing here can look at."""
FOREIGN_OPTIONS = {"--disable-dynamic-vram"}  # ComfyUI's


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block."""
    for found in FENCE.finditer(read(page)):
        yield found[2], textwrap.dedent(found[3])


def spans(page: str) -> list[str]:
    """What stands between single backticks, outside of the blocks; a line end there is a space."""
    return [" ".join(found.split()) for found in SPAN.findall(FENCE.sub("", read(page)))]


# -- commands ----------------------------------------------------------------------------------------------------------


class Reached(Exception):
    """A command has accepted its call, and would begin to work."""


def reached(*args: object, **options: object) -> None:
    raise Reached


def fault(line: str) -> str | None:
    """What is wrong with a command as a page has it, or None; run in the folder that `in_a_folder` fills."""
    words = [STANDS_FOR.get(word, word) for word in shlex.split(line, comments=True)]
    while words and (given := re.fullmatch(r"(\w+)=(\S*)", words[0])):
        if why := _wrong_variable(given[1], given[2]):
            return why
        del words[0]
    if not words:
        return None
    program, *args = words
    if program in FOREIGN:
        return None
    if program not in PROGRAMS:
        return f"{program} is a program that this test does not know"
    variables = dict(os.environ)  # scripts set some for what they would start
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            return PROGRAMS[program](args, patch)
    except Reached:
        return None
    except SystemExit as ended:
        return f"exit code {ended.code}" if ended.code else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for name in os.environ.keys() - variables:
            del os.environ[name]
        os.environ.update(variables)


def _wrong_variable(name: str, value: str) -> str | None:
    if name == "SGLANG_PLUGINS":
        return None if f'{value} = "bitfuse.hosts.sglang_plugin' in read("pyproject.toml") else "no such plug-in"
    if name == "PYTHONPATH" or any(name in path.read_text() for path in (ROOT / "src").rglob("*.py")):
        return None
    return f"{name} is a variable that nothing here reads"


def _bitfuse(args: list[str], patch: pytest.MonkeyPatch) -> str | None:
    options = {option for parameter in typer.main.get_command(cli.app).params for option in parameter.opts}
    if len(args) == 1 and args[0] in options:  # --version, --install-completion, which would change a shell's files
        return None
    if "--case" not in args:  # what a case is only the operators know
        patch.setattr(cli, "_work", reached)
    patch.setattr(verify, "run", reached)
    code = cli.app(args, prog_name="bitfuse", standalone_mode=False)
    return f"exit code {code}" if code else None


def _python(args: list[str], patch: pytest.MonkeyPatch) -> str | None:
    patch.setattr(argparse.ArgumentParser, "parse_args", _parsed(argparse.ArgumentParser.parse_args))
    patch.setattr(typer, "run", _typer_parsed)
    patch.setattr(sys, "path", [*sys.path])
    if args[0] == "-m":
        return _module(args[1], args[2:], patch)
    if not (ROOT / args[0]).is_file():
        return f"{args[0]} is no file"
    if not re.search("^import (argparse|typer)$", read(args[0]), re.MULTILINE):  # it would begin to work at once
        return f"{args[0]} takes no arguments" if args[1:] else None
    sys.path.insert(0, str((ROOT / args[0]).parent))
    patch.setattr(sys, "argv", args)
    runpy.run_path(str(ROOT / args[0]), run_name="__main__")
    return None if len(args) == 1 else f"{args[0]} looked at no argument"


def _module(name: str, args: list[str], patch: pytest.MonkeyPatch) -> str | None:
    if name == "pytest":
        files = [word for word in args if word.endswith(".py")]
        options = [word for word in args if word.startswith("-") and word not in ("-k", "-m", "-q", "-n")]
        return next((f"{file} is no file" for file in files if not (ROOT / file).is_file()), None) or (
            f"{options[0]} is not an option that this test knows" if options else None
        )
    if name == "build":  # whoever releases has it
        return f"{args[0]} is not looked at" if args else None
    if importlib.util.find_spec(name) is None:
        return f"{name} is no module"
    patch.setattr(sys, "argv", [name, *args])
    patch.delitem(sys.modules, name, raising=False)
    runpy.run_module(name, run_name="__main__")
    return f"{name} looked at no argument"


def _parsed(parse: Callable[..., object]) -> Callable[..., object]:
    def parse_args(self: argparse.ArgumentParser, *given: object, **more: object) -> object:
        parse(self, *given, **more)
        raise Reached

    return parse_args


def _typer_parsed(function: Callable[..., object]) -> None:
    """In place of `typer.run`: to where the script's own work begins, after what it looks at itself."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    for work in {"run", "row"} & set(function.__globals__):
        function.__globals__[work] = reached
    raise SystemExit(app(sys.argv[1:], standalone_mode=False))


def _torchrun(args: list[str], patch: pytest.MonkeyPatch) -> str | None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(args)
    return _python([given.training_script, *given.training_script_args], patch)


def _make(args: list[str], patch: pytest.MonkeyPatch) -> str | None:
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    return next((f"{target} is no target" for target in args if target not in targets), None)


def _pip(args: list[str], patch: pytest.MonkeyPatch) -> str | None:
    extras = set(
        re.findall(r"^(\w+) = \[", read("pyproject.toml").partition("optional-dependencies]")[2], re.MULTILINE)
    )
    if args[0] != "install":
        return f"pip {args[0]} is not looked at"
    for wanted in args[1:]:
        if wanted.startswith("-"):
            return f"{wanted} is an option that this test does not know"
        folder, _, rest = wanted.partition("[")
        if folder.startswith("."):
            if not (ROOT / folder / "pyproject.toml").is_file():
                return f"{folder} is no project"
        else:
            try:
                asked = Requirement(wanted)
            except InvalidRequirement as error:
                return str(error)
            if asked.name != "bitfuse":
                continue
        if unknown := set(filter(None, rest.rstrip("]").split(","))) - extras:
            return f"{', '.join(unknown)} is no extra"
    return None


def _copy(args: list[str], patch: pytest.MonkeyPatch) -> str | None:
    *sources, _ = [word for word in args if not word.startswith("-")]
    return next((f"{source} is not there" for source in sources if not (ROOT / source).exists()), None)


def _bash(args: list[str], patch: pytest.MonkeyPatch) -> str | None:
    return None if os.access(ROOT / args[0], os.R_OK) else f"{args[0]} is no file"


PROGRAMS: dict[str, Callable[[list[str], pytest.MonkeyPatch], str | None]] = {
    "bash": _bash,
    "bitfuse": _bitfuse,
    "cp": _copy,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "torchrun": _torchrun,
}
IS_COMMAND = re.compile(rf"(\w+=\S+ )*({'|'.join((*PROGRAMS, *FOREIGN))}) [\w.'/-]")


HELPS = {c.callback.__name__: c.callback.__doc__ or "" for c in cli.app.registered_commands if c.callback}
EXAMPLES = {name: text.partition("Example:")[2] for name, text in HELPS.items()}


@dataclasses.dataclass(frozen=True)
class Command:
    """A line, and where it stands."""

    page: str
    line: str

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def commands() -> Iterator[Command]:
    for page in PAGES:
        lines = [line for language, text in blocks(page) if language == "sh" for line in text.splitlines()]
        for span in filter(IS_COMMAND.match, spans(page)):
            named = re.fullmatch(r"bitfuse [\w-]+", span)  # a command by its name, and no call of it
            lines.append(f"{span} --help" if named else span)
        for line in lines:
            yield from (Command(page, part.strip()) for part in line.split(" && ") if part.strip())
    for path in [*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        head = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines = [line.strip() for line in head.splitlines() if re.match(r" {4}\S", line)]
        yield from (Command(path.relative_to(ROOT).as_posix(), line) for line in filter(IS_COMMAND.match, lines))
    for name, examples in EXAMPLES.items():
        yield from (Command(f"{name} --help", span) for span in SPAN.findall(examples))


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    """The files that commands name as the reader's own; and nothing is written into the checkout."""
    shutil.copy(ROOT / "benchmarks" / "results" / "2026-11-28-h200-verify.json", tmp_path / "proof.json")
    call = next(text for language, text in blocks("docs/compare.md") if language == "json")
    (tmp_path / "call.json").write_text(call)
    for folder in ("path/to/pipeline", "my-pipeline"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", dict.fromkeys(commands()), ids=str)
def test_a_command_is_accepted_as_it_stands(command, in_a_folder):
    assert fault(command.line) is None


def test_every_help_has_an_example():
    assert {name: bool(SPAN.search(text)) for name, text in EXAMPLES.items()} == dict.fromkeys(HELPS, True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bitfuse verify --nope", "No such option"),
        ("bitfuse verify --op nope", "exit code 2"),
        ("bitfuse verify --op head_gate --case nope", "exit code 2"),
        ("bitfuse verify --check nowhere.json", "exit code 2"),
        ("bitfuse demo --host nope", "exit code 2"),
        ("bitfuse compare owner/name --layers 4", "exit code 2"),
        ("bitfuse nope", "No such command"),
        ("bitfuse --nope", "No such option"),
        ("NOPE=1 bitfuse doctor", "NOPE is a variable that nothing here reads"),
        ("SGLANG_PLUGINS=nope sglang serve", "no such plug-in"),
        ("python benchmarks/nope.py", "benchmarks/nope.py is no file"),
        ("python benchmarks/stacking.py --nope", "exit code 2"),
        ("python benchmarks/session.py nope", "'nope' is no plan"),
        ("python benchmarks/roundings.py nope", "benchmarks/roundings.py takes no arguments"),
        ("python benchmarks/compatibility.py nope", "'nope' is no host"),
        ("python -m bitfuse.tools.prove.nope", "bitfuse.tools.prove.nope is no module"),
        ("python -m bitfuse.tools.prove.ptx --nope", "exit code 2"),
        ("python -m pytest tests/nope.py", "tests/nope.py is no file"),
        ("torchrun --nope examples/diffusers_ranks.py", "exit code 2"),
        ("torchrun examples/diffusers_ranks.py --how nope", "exit code 2"),
        ("make nope", "nope is no target"),
        ("pip install '.[nope]'", "nope is no extra"),
        ("pip install nowhere/", "nowhere"),
        ("cp -r nope ComfyUI/custom_nodes/bitfuse", "nope is not there"),
        ("nope doctor", "nope is a program that this test does not know"),
    ],
)
def test_a_wrong_command_is_found(line, said, in_a_folder):
    assert said in (fault(line) or "")


@pytest.mark.parametrize("page", PAGES)
def test_a_block_of_commands_says_that_it_is_one(page):
    """So that it is tried: `commands` looks at blocks of sh alone."""
    untold = [line for language, text in blocks(page) if not language for line in text.splitlines()]
    assert not [line for line in untold if re.match(rf"(\w+=\S+ )*({'|'.join(PROGRAMS)}) ", line)]


def declared_options() -> set[str]:
    group = typer.main.get_command(cli.app)
    known = {option for parameter in group.params for option in parameter.opts}
    return known.union(*(p.opts for command in group.commands.values() for p in command.params), {"--help"})


@pytest.mark.parametrize("page", PAGES)
def test_an_option_that_a_sentence_names_is_one_of_something(page):
    named = {span.split()[0].split("=")[0] for span in spans(page) if re.match("--[a-z]", span)}
    folders = [ROOT / name for name in ("benchmarks", "examples", "src")]
    scripts = [path.read_text() for folder in folders for path in folder.rglob("*.py")]
    unknown = named - declared_options() - FOREIGN_OPTIONS
    assert not {option for option in unknown if not any(f'"{option}"' in text for text in scripts)}


# -- Python ------------------------------------------------------------------------------------------------------------

PUBLIC = {name: getattr(bitfuse, name) for name in bitfuse.__all__}


def calls(text: str) -> Iterator[tuple[Callable[..., object], ast.Call]]:
    """(function, call) of each call of bitfuse's own in this code, `bitfuse.trace(...)` as well as `trace(...)`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            function = PUBLIC.get(ast.unparse(node.func).removeprefix("bitfuse."))
            if callable(function):
                yield function, node


def python(page: str) -> Iterator[str]:
    """Blocks of Python, and spans that are an expression."""
    yield from (text for language, text in blocks(page) if language == "python")
    for span in spans(page):
        expression = span.removeprefix("with ").removesuffix(": ...")
        with contextlib.suppress(SyntaxError):
            ast.parse(expression, mode="eval")
            yield expression


@pytest.mark.parametrize("page", PAGES)
def test_names_and_arguments_in_python_are_bitfuses(page):
    for text in python(page):
        for name in re.findall(r"\bbitfuse((?:\.[a-z_]\w*)+)", text):
            found = bitfuse
            for part in name.split(".")[1:]:
                assert hasattr(found, part), f"{page}: bitfuse{name}"
                found = getattr(found, part)
        for function, call in calls(text):
            for keyword in call.keywords:
                assert keyword.arg in inspect.signature(function).parameters, f"{page}: {ast.unparse(call)}"


def test_a_wrong_argument_is_found():
    ((function, call),) = calls("handle = bitfuse.accelerate(pipe, audti=64)")
    assert call.keywords[0].arg not in inspect.signature(function).parameters
    assert [function.__name__ for function, _ in calls("trace(f, g, inputs); other(f)")] == ["trace"]


SNIPPETS = [(page, text) for page in PAGES for language, text in blocks(page) if language == "python"]


@pytest.fixture
def readers_own(monkeypatch, launched_as_reference, fresh_routes):
    """What a reader has already: a pipeline, a prompt, a model and its inputs, all of them small."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    own = diffusers.LTX2Pipeline.__call__

    def brief(self, *args, **options):
        inspect.signature(own).bind(self, *args, **options)
        return own(self, **{**tiny.CALL, **tiny.UNGUIDED, "prompt": "a red fox", "output_type": "np", **options})

    pipe = tiny.pipeline()
    monkeypatch.setattr(diffusers.LTX2Pipeline, "__call__", brief)
    monkeypatch.setattr(diffusers.LTX2Pipeline, "from_pretrained", lambda name, **options: pipe)
    monkeypatch.setattr(diffusers.LTX2Pipeline, "to", lambda self, device: self)
    geometry, device = seeded.SMALL, torch.device("cpu")
    model = seeded.build(geometry, device, seed=0)
    ready = seeded.make_inputs(model, geometry, device, seed=0)
    level = torch.full((1,), 1000.0)
    inputs = {**ready["conditions"], "timestep": level, "hidden_states": ready["latents"].bfloat16()}
    inputs |= {"sigma": level, "audio_hidden_states": ready["audio_latents"].bfloat16(), "return_dict": False}

    @dataclasses.dataclass(frozen=True)
    class Builder:
        module_ops: tuple[object, ...] = ()

    found = {"bitfuse": bitfuse, "pipe": pipe, "prompt": "a red fox", "model": model, "inputs": inputs}
    return found | {"dataclasses": dataclasses, "builder": Builder(), "LTXModel": torch.nn.Linear}


@pytest.mark.parametrize(("page", "text"), SNIPPETS, ids=[f"{page} {n}" for n, (page, _) in enumerate(SNIPPETS)])
def test_python_on_a_page_runs(page, text, readers_own):
    if "ltx_core" in text:
        pytest.importorskip("ltx_core")
    names = dict(readers_own)
    exec(compile(text, page, "exec"), names)
    if handle := names.get("handle"):
        on_gpu = torch.cuda.is_available()  # what is on the CPU beside it runs its own code
        assert "video" not in names or on_gpu or any(site.fused for site in handle.sites)
        handle.restore()


def test_the_roundings_are_computed_and_the_kernels_have_them():
    script = runpy.run_path(str(ROOT / "benchmarks" / "roundings.py"))
    assert json.loads(read("benchmarks/roundings.json")) == script["found"](), "run `make readme`"
    for name, drawn in script["PICTURES"].items():
        assert read(f"docs/{name}") == drawn(), f"{name}: run `make readme`"
    y, gate, x = (torch.full((1, 2, 128), float(value), dtype=torch.bfloat16) for value in script["EXAMPLE"])
    steps = script["worked_out"]()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for operator, step in (("gated_residual", "sum"), ("gated_residual_addcmul", "once")):
        out = bitfuse.OPERATORS[operator].launch(*(t.to(device) for t in (x, y, gate)))
        assert out.unique().tolist() == [float(steps[step].value)], operator
