"""The `bitfuse` command. Exit codes: 0 as promised, 1 a bit differs (or nothing was fused), 2 could not run.

Help, a shell's completion and a wrong call are answered without torch, which takes 3 to 7 s to import: a command looks
at all of its options first, and then calls `_work`, before it imports what does it.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from bitfuse.core.lines import error_line, one_line
from bitfuse.tools import files, names, packages, text

app = typer.Typer(
    help="LTX-2, faster, with output identical to the last bit, and proof of it on this machine.",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _output(given: Any) -> Path:
    """Refuse a file that can't be written before the work is done, not after."""
    if str(given).endswith(("/", "\\")):
        raise typer.BadParameter(f"{given} is the name of a folder; accepted: a file that can be written")
    if why := files.why_not_written(Path(given)):
        raise typer.BadParameter(why)
    return Path(given)


def _folder(given: Any) -> Path:
    """Refuse a folder in which no file can be made."""
    if why := files.why_no_folder(Path(given)):
        raise typer.BadParameter(why)
    return Path(given)


def _whole(help: str, least: int | None = None, most: int | None = None) -> Any:
    """An option whose value is a whole number in ASCII digits: Python's own `int` also takes 1_000 and other digits."""
    low, high = ("" if bound is None else f" {words} {bound}" for words, bound in (("from", least), ("to", most)))
    accepted = f"accepted: a whole number{low}{high}"

    def whole_number(given: Any) -> int:
        shown = one_line(given, 40)
        if type(given) is not int and not re.fullmatch(r"[+-]?[0-9]+", str(given)):
            raise typer.BadParameter(f"{shown!r} is no whole number; {accepted}")
        if len(str(given)) > 20:
            raise typer.BadParameter(f"{shown} is not accepted: it has {len(str(given))} digits; {accepted}")
        number = int(given)
        if (least is not None and number < least) or (most is not None and number > most):
            raise typer.BadParameter(f"{shown} is not accepted; {accepted}")
        return number

    return typer.Option(parser=whole_number, min=least, max=most, metavar="INTEGER", help=help)


def _one_of(option: str, what: str, accepted: Callable[[], tuple[str, ...]], help: str) -> Any:
    """An option whose value is one of `accepted()`, which a shell completes. Not an Enum: what typer says of a wrong
    value differs from version to version."""

    def name(given: Any) -> str:
        if given not in accepted():
            _refuse(f"{option} {given} is not {what}; accepted: {', '.join(accepted())}")
        return str(given)

    def completed(incomplete: str) -> list[str]:  # its name is what typer knows it by
        return [name for name in accepted() if name.startswith(incomplete)]

    return typer.Option(option, parser=name, metavar="NAME", help=help, autocompletion=completed)


def _ltx(help: str) -> Any:
    """Looked at before MODEL, which a flag taken for the version would leave its value to."""

    def version(given: Any) -> str:
        if names.version(given) is None:
            accepted = ", ".join(f"ltx-{name}" for name in names.VERSIONS)
            _refuse(f"--random-weights {given} is not a version; accepted: {accepted}")
        return str(given)

    return typer.Option("--random-weights", parser=version, metavar="VERSION", help=help)


def _model(help: str) -> Any:
    def folder_or_id(given: Any) -> str:
        if not (os.path.exists(given) or names.is_hub_id(given)):
            _refuse(f"MODEL {given} is no folder here; accepted: a folder, or a Hub id as in owner/name")
        return str(given)

    return typer.Argument(parser=folder_or_id, metavar="MODEL", help=help)


def _work(device: str | None = None) -> None:
    """The call is right, so there is work: import all of bitfuse, and torch, and see that there is such a device."""
    importlib.import_module("bitfuse.front")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            _refuse("--device cuda: PyTorch sees no CUDA device here; accepted: cpu")


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", parser=_output, metavar="FILE", help="Also write the result to this file, as JSON."),
]
Device = Annotated[
    str | None,
    _one_of(
        "--device",
        "accepted",
        lambda: ("cuda", "cpu"),
        "cuda or cpu (Triton's interpreter); default: cuda if there is one.",
    ),
]
Operators = Annotated[
    list[str] | None,
    _one_of("--op", "an operator", names.operators, "Only this operator; may be given several times."),
]
Host = Annotated[
    str,
    _one_of("--host", "a host", names.hosts, "Whose transformer: diffusers, ltx-core, sglang or comfyui."),
]


_UsageError: Any = typer.BadParameter.__bases__[0]  # click's, of which newer typers carry their own


def main() -> None:
    """Run the command line; a wrong call gets one line that says what is accepted."""
    try:
        sys.exit(app(prog_name="bitfuse", standalone_mode=False))
    except _UsageError as error:
        sys.exit(_fail(_accepted(error)))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_interrupted())
    except ValueError as error:
        sys.exit(_fail(str(error)))
    except (RuntimeError, OSError, ImportError) as error:
        sys.exit(_fail(error_line(error, most=10_000)))
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        where = f"{Path(last.filename).name}, line {last.lineno}"
        sys.exit(_fail(f"unexpected {type(error).__name__} ({where}): {error}; please report it: this is a bug"))


def _accepted(error: Any) -> str:
    """A wrong call in words: what is wrong, and what this command takes."""
    said = error.format_message().rstrip(".")
    if error.ctx is None or "accepted" in said:
        return said
    if isinstance(error, typer.BadParameter):  # which says what a value must be, in its own words
        return f"{said} (what is accepted: {error.ctx.command_path} --help)"
    command = error.ctx.command
    options = [max(p.opts, key=len) if p.param_type_name == "option" else p.name.upper() for p in command.params]
    accepted = getattr(command, "commands", None) or options
    return f"{said}; accepted: {', '.join(accepted)} (see {error.ctx.command_path} --help)"


def _interrupted() -> int:
    _fail("interrupted; what was there before is as it was")
    return 130


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command. It runs where bitfuse can, and Ctrl-C ends it as it ends any program, with one line."""

    @functools.wraps(function)
    def run(**options: Any) -> None:
        try:
            function(**options)
        except packages.CannotRun as why:
            _refuse(str(why))
        except KeyboardInterrupt:
            raise typer.Exit(_interrupted()) from None

    return app.command()(run)


@_command
def verify(
    op: Operators = None,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be given several times.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="The long sweeps too: minutes on a GPU.")] = False,
    device: Device = None,
    host: Annotated[
        str | None,
        _one_of(
            "--host",
            "a host",
            names.hosts,
            "Also a step of this host's transformer: diffusers, ltx-core, sglang or comfyui.",
        ),
    ] = None,
    json_file: JsonFile = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", parser=_output, metavar="FILE", help="Also write a page to this file, to keep."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Only say whether this proof document matches this machine and code.")
    ] = None,
) -> None:
    """Check every operator on this machine, bit for bit, and that wrong kernels are caught.

    With --check FILE nothing is run. Exit code 0: it matches, and says that all was equal; 1: it does not; 2: FILE is
    no proof document.

    Example: `bitfuse verify --deep --json proof.json --html proof.html`, then `bitfuse verify --check proof.json`
    """
    if check is not None and (op or case or deep or host or html_file):
        _refuse("--check reads a document and runs nothing; accepted with it: --device, --json")
    _apart({"--json": json_file, "--html": html_file}, {"--check": check})
    if deep and case:
        _refuse("--deep sweeps whole operators, so it takes no --case; accepted with it: --op")
    if check is not None and not check.is_file():
        _refuse(f"--check {check} is no file; accepted: a JSON file that bitfuse verify --json wrote")
    if html_file is not None:
        packages.need("jinja2", "--html")

    _work(device)
    from bitfuse import OPERATORS
    from bitfuse.tools.prove import document
    from bitfuse.tools.prove import verify as verification

    cases = dict.fromkeys(c.name for name in op or OPERATORS for c in OPERATORS[name].cases)
    if unknown := [name for name in case or [] if name not in cases]:
        _refuse(f"--case {unknown[0]} is not a case of these operators; accepted: {'; '.join(cases)}")
    if check is not None:
        raise typer.Exit(_compare_document(document.read(check), device, json_file))
    result = verification.run(Console(), op, device, case, deep, host)
    made = document.make(result)
    page = document.render(made) if html_file is not None else ""
    _write(json_file, made)
    if html_file is not None:
        files.write(html_file, page)
    raise typer.Exit(result.exit_code)


def _compare_document(given: dict[str, Any], device: str | None, json_file: Path | None) -> int:
    from bitfuse.tools.prove import document

    items, console = document.compare(given, device), Console()
    for item in items:
        console.print(Text(item.sentence, "green" if item.matches else "bold red"), soft_wrap=True)
    text.say(console, f"The document says: {document.verdict(given)}")
    matches = all(item.matches for item in items)
    found = [{"item": i.name, "matches": i.matches, "document": i.document, "here": i.here} for i in items]
    _write(json_file, {"matches": matches, "document_exit_code": given["exit_code"], "items": found})
    return 0 if matches and given["exit_code"] == 0 else 1


@_command
def demo(
    out: Annotated[
        Path, typer.Option(parser=_folder, metavar="FOLDER", help="Folder for report.json and report.html.")
    ] = Path("out/demo"),
    device: Device = None,
    steps: Annotated[int | None, _whole("Denoising steps.", 2)] = None,
    layers: Annotated[int | None, _whole("Transformer layers; default: as many as fit.", 1, names.LAYERS)] = None,
    seed: Annotated[int, _whole("Seed of the weights and the noise.", 0, 2**62)] = 0,
    host: Host = "diffusers",
) -> None:
    """Denoise with a seeded LTX-2 transformer, stock and accelerated, and compare every step bit for bit.

    Example: `bitfuse demo --steps 8 --out out/demo`
    """
    _work(device)
    from bitfuse.tools.compare import demo as demonstration

    result = demonstration.run(out, device, steps, layers, seed, Console(), host)
    if result.exit_code == 2:
        _fail(result.verdict)
    raise typer.Exit(result.exit_code)


@_command
def compare(
    model: Annotated[str | None, _model("A diffusers LTX-2 pipeline: its folder, or its hub id.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the film shows; default: a fox in the snow.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with arguments of the pipeline's call.")] = None,
    steps: Annotated[int | None, _whole("Denoising steps; default: the pipeline's.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels, as in 768x512; default: the pipeline's.")] = None,
    frames: Annotated[int | None, _whole("Frames of the film, 8n + 1; default: the pipeline's.")] = None,
    seed: Annotated[int, _whole("Seed of the noise, and of random weights.")] = 0,
    out: Annotated[
        Path,
        typer.Option(parser=_folder, metavar="FOLDER", help="Folder for the films, compare.json and compare.html."),
    ] = Path("out/compare"),
    device: Device = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep only the part that runs on the GPU.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay the forward as one CUDA graph.")] = False,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Keep the text's keys and values (LTX-2.0).")] = False,
    random_weights: Annotated[
        str | None, _ltx("Instead of MODEL, a transformer alone: ltx-2.0, ltx-2.3 or ltx-2.5.")
    ] = None,
    layers: Annotated[int | None, _whole("Layers with random weights; default: as many as fit.")] = None,
    host: Host = "diffusers",
    trace: Annotated[bool, typer.Option("--trace", help="Where bits differ, find the first block and site.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Run a whole pipeline stock (twice) and accelerated, and compare latents, frames and sound bit for bit.

    Example: `bitfuse compare Lightricks/LTX-2 --prompt "Waves on black rocks" --steps 20 --out out/compare`
    """
    from bitfuse.tools.compare.request import Request, check

    made = {f"the {name} of --out": out / name for name in names.COMPARED}
    _apart({"--json": json_file, **made}, {"--config": config}, model)
    request = Request(
        model=model,
        random_weights=random_weights,
        prompt=prompt,
        config=config,
        steps=steps,
        size=size,
        frames=frames,
        seed=seed,
        device=device,
        host=host,
        layers=layers,
        offload=offload,
        cuda_graph=cuda_graph,
        keep_text=keep_text,
        trace=trace,
    )
    check(request)

    _work(device)
    from bitfuse.tools.compare import comparison

    result = comparison.run(request, out, Console())
    if result.exit_code == 2:
        _fail(result.verdict)
    _write(json_file, result.as_dict())
    raise typer.Exit(result.exit_code)


@_command
def bench(
    only: Annotated[
        list[str] | None,
        _one_of(
            "--only",
            "a part",
            lambda: names.PARTS,
            "operators, overhead, model, audit, first-step or run; default: all.",
        ),
    ] = None,
    op: Operators = None,
    tokens: Annotated[list[int] | None, _whole("Video tokens of a step, one or several.")] = None,
    layers: Annotated[int | None, _whole("Layers; default: as many as fit (first-step: 8).", 1)] = None,
    rounds: Annotated[int | None, _whole("Turns of each way to run the model, 1.5 s each.", 2)] = None,
    ltx: Annotated[
        str, _one_of("--ltx", "a version", lambda: names.VERSIONS, "LTX-2 version of the model: 2.0, 2.3 or 2.5.")
    ] = "2.0",
    image_to_video: Annotated[bool, typer.Option("--image-to-video", help="Per-token timesteps in the model.")] = False,
    host: Host = "diffusers",
    json_file: JsonFile = None,
) -> None:
    """Time operators, a whole step and a whole run against PyTorch, on this GPU, only after their bits were compared.

    FILE of --json gets each row when it is measured. Where there is a FILE already it stays until the end, and the rows
    go to FILE.part until then.

    Example: `bitfuse bench --only operators --json out/bench.json`
    """
    if host != "diffusers" and only != ["model"]:
        _refuse(f"--host {host} goes with --only model; other parts time diffusers, or no host")
    if "run" in (only or ()) and ltx != "2.0":
        _refuse(f"--ltx {ltx} does not go with --only run; accepted: 2.0")
    if wrong := [n for n in tokens or [] if n not in names.LATENTS]:
        _refuse(f"--tokens {wrong[0]} is not accepted; accepted: {', '.join(map(str, names.LATENTS))}")

    _work()
    import torch

    from bitfuse.tools.bench import bench as benchmark

    if not torch.cuda.is_available():
        _refuse("bench needs a CUDA device: times in Triton's interpreter mean nothing")
    kept = _Kept(json_file)
    result = benchmark.run(
        Console(),
        only,
        tokens,
        layers,
        version=ltx,
        image_to_video=image_to_video,
        host=host,
        rounds=rounds,
        only_operators=op,
        save=kept.save,
    )
    kept.end()
    raise typer.Exit(0 if result["equal"] else 1)


@_command
def explain(
    model: Annotated[str | None, _model("A pipeline's or a transformer's folder, or an id on the Hub.")] = None,
    random_weights: Annotated[str | None, _ltx("Instead of MODEL: ltx-2.0, ltx-2.3 or ltx-2.5.")] = None,
    layers: Annotated[int | None, _whole("With --random-weights: layers; default: 48.", 1, names.MAX_LAYERS)] = None,
    tokens: Annotated[int, _whole("Video tokens of the forward that is looked at.", 1, names.MAX_TOKENS)] = 6144,
    dtype: Annotated[
        str, _one_of("--dtype", "accepted", lambda: names.DTYPES, "Of the weights: bfloat16, float16 or float32.")
    ] = "bfloat16",
    image_to_video: Annotated[bool, typer.Option("--image-to-video", help="Per-token timesteps.")] = False,
    host: Host = "diffusers",
    json_file: JsonFile = None,
) -> None:
    """Say what would be fused where in a model, and every reason where not. Loads no weights, needs no GPU.

    Example: `bitfuse explain Lightricks/LTX-2`, or without a model: `bitfuse explain --random-weights ltx-2.3`
    """
    if (model is None) == (random_weights is None):
        _refuse("accepted: MODEL (a folder or a Hub id) or --random-weights VERSION, one of the two")
    if layers is not None and model is not None:
        _refuse("--layers goes with --random-weights; MODEL has its own number")
    if model is not None and host != "diffusers":
        _refuse(f"--host {host} goes with --random-weights; a MODEL is diffusers'")
    if host != "diffusers" and dtype != "bfloat16":
        _refuse(f"--dtype {dtype} goes with --host diffusers; accepted for {host}: bfloat16")
    _apart({"--json": json_file}, {}, model)

    _work()
    from bitfuse.tools import explain as explanation
    from bitfuse.tools import parts

    geometry, further = None, []
    if model is not None:
        name, built = model, explanation.from_config(model, explanation.DTYPES[dtype])
        further = list(parts.of_pipeline(model, explanation.DTYPES[dtype]))
    else:
        layers = 48 if layers is None else layers
        name = f"{random_weights}, {layers} layers"
        geometry = explanation.of_version(str(random_weights), layers, host)
        built = explanation.from_geometry(geometry, explanation.DTYPES[dtype])
    found = explanation.explain(built, tokens, image_to_video, name, geometry, further)
    explanation.show(Console(), found)
    _write(json_file, found.as_dict())


@_command
def doctor(
    everything: Annotated[bool, typer.Option("--all", help="Also say what each finding means that is ok.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Check whether this machine can keep the promise: device, libraries, settings, a stock block, a proof.

    What is not ok stands first. Exit code 0: no failure; 1: bits differ that must be equal; 2: another failure.

    Example: `bitfuse doctor --json doctor.json`
    """
    _work()
    from bitfuse.tools import doctor as examination

    diagnosis = examination.run(Console(), everything=everything)
    _write(json_file, diagnosis.as_dict())
    raise typer.Exit(diagnosis.exit_code)


def _version(asked: bool) -> None:
    if asked:
        from bitfuse import __version__

        typer.echo(f"bitfuse {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def _apart(outputs: dict[str, Path | None], inputs: dict[str, Path | None], model: str | None = None) -> None:
    """Refuse a call that would write one file over another that it reads or writes, or over a file of a model."""
    if why := files.why_not_apart(outputs, inputs):
        _refuse(why)
    json_file = outputs["--json"]
    if model is None or json_file is None or not (json_file.is_file() and os.path.isdir(model)):
        return
    folder, there = Path(model).resolve(), json_file.parent.resolve()
    if folder in (there, *there.parents, *json_file.resolve().parents):  # what is there may be a link to elsewhere
        _refuse(f"--json {json_file} is a file of MODEL {model}; accepted: a file outside of it")


def _write(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        files.write(path, files.as_json(document, indent=1))


class _Kept:
    """A JSON file that grows while a command runs, which may be cut off at any time.

    Where there is a file already, it stays until the end, and the new one grows beside it, as <name>.part. A pipe gets
    the end only.
    """

    def __init__(self, path: Path | None):
        self.path = self.growing = path
        self.document: dict[str, Any] = {}
        if path is not None and files.is_stream(path):
            self.growing = None
        elif path is not None and path.exists():
            names = (f"{path.name}.part{n or ''}" for n in range(1000))
            self.growing = next(p for p in map(path.with_name, names) if not p.exists())

    def save(self, document: dict[str, Any]) -> None:
        self.document = document
        _write(self.growing, document)

    def end(self) -> None:
        if self.growing != self.path:
            _write(self.path, self.document)
            if self.growing is not None:
                self.growing.unlink(missing_ok=True)


def _refuse(line: str) -> NoReturn:
    """End the command with this line and exit code 2."""
    raise typer.Exit(_fail(line))


def _fail(line: str) -> int:
    """Print one line to stderr, whatever stands in it: what was given may hold line ends and terminal codes."""
    Console(stderr=True).print(text.cell(f"bitfuse: {line}", "red"), soft_wrap=True)
    return 2
