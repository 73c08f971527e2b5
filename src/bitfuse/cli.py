"""The `bitfuse` command. Exit codes: 0 as promised, 1 a bit differs (or nothing was fused), 2 could not run."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="LTX-2, faster, with output identical to the last bit, and proof of it on this machine.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _writable(path: Path | None) -> Path | None:
    """Refuse a file that can't be written before the work is done, not after."""
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; accepted: a file that can be written")
    if path is not None and not path.is_file():
        _folder(path.parent)
    elif path is not None and not os.access(path, os.W_OK):
        raise typer.BadParameter(f"{path} can't be written; accepted: a file that can")
    return path


def _folder(path: Path) -> Path:
    """Refuse a folder in which no file can be made."""
    there = next((p for p in (path, *path.parents) if p.exists()), Path())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise typer.BadParameter(f"no file can be written to {path}; accepted: a folder where that can be done")
    return path


JsonFile = Annotated[
    Path | None, typer.Option("--json", callback=_writable, help="Also write the result to this file, as JSON.")
]
Device = Annotated[str | None, typer.Option(help="cuda or cpu (Triton's interpreter); default: cuda if there is one.")]
Host = Annotated[str, typer.Option(help="Whose transformer: diffusers, ltx-core or sglang, where it is installed.")]


_UsageError: Any = typer.BadParameter.__bases__[0]  # click's, of which newer typers carry their own


def main() -> None:
    """Run the command line; a wrong call gets one line that says what is accepted."""
    try:
        sys.exit(app(prog_name="bitfuse", standalone_mode=False))
    except _UsageError as error:
        sys.exit(_fail(_accepted(error)))
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted")
        sys.exit(130)
    except ValueError as error:
        sys.exit(_fail(str(error)))
    except (RuntimeError, OSError, ImportError) as error:
        sys.exit(_fail(f"{type(error).__name__}: {error}"))
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


@app.command()
def verify(
    op: Annotated[list[str] | None, typer.Option(help="Only this operator; may be given several times.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be given several times.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="The long sweeps too: minutes on a GPU.")] = False,
    device: Device = None,
    host: Annotated[
        str | None, typer.Option(help="Also a step of this host's transformer: diffusers, ltx-core or sglang.")
    ] = None,
    json_file: JsonFile = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", callback=_writable, help="Also write a page to this file, to keep.")
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
    from bitfuse import document
    from bitfuse import verify as verification
    from bitfuse.contract import OPERATORS
    from bitfuse.seeded import CannotRun

    _check_device(device)
    if check is not None and (op or case or deep or host or html_file):
        raise typer.Exit(_fail("--check reads a document and runs nothing; accepted with it: --device, --json"))
    if deep and case:
        raise typer.Exit(_fail("--deep sweeps whole operators, so it takes no --case; accepted with it: --op"))
    if unknown := [name for name in op or [] if name not in OPERATORS]:
        raise typer.Exit(_fail(f"--op {unknown[0]} is not an operator; accepted: {', '.join(OPERATORS)}"))
    if host is not None:
        _check_host(host)
    cases = dict.fromkeys(c.name for name in op or OPERATORS for c in OPERATORS[name].cases)
    if unknown := [name for name in case or [] if name not in cases]:
        raise typer.Exit(_fail(f"--case {unknown[0]} is not a case of these operators; accepted: {'; '.join(cases)}"))
    try:
        if check is not None:
            raise typer.Exit(_compare_document(document.read(check), device, json_file))
        if html_file is not None:
            document.need("jinja2", "--html")
        result = verification.run(Console(), op, device, case, deep, host)
    except CannotRun as why:
        raise typer.Exit(_fail(str(why))) from None
    made = document.make(result)
    _write(json_file, made)
    if html_file is not None:
        html_file.parent.mkdir(parents=True, exist_ok=True)
        html_file.write_text(document.render(made), encoding="utf-8")
    raise typer.Exit(result.exit_code)


def _compare_document(given: dict[str, Any], device: str | None, json_file: Path | None) -> int:
    from bitfuse import document

    items = document.compare(given, device)
    for item in items:
        style = "green" if item.matches else "bold red"
        Console().print(item.sentence, style=style, markup=False, highlight=False, soft_wrap=True)
    Console().print(f"The document says: {document.verdict(given)}", markup=False, highlight=False, soft_wrap=True)
    matches = all(item.matches for item in items)
    found = [{"item": i.name, "matches": i.matches, "document": i.document, "here": i.here} for i in items]
    _write(json_file, {"matches": matches, "document_exit_code": given["exit_code"], "items": found})
    return 0 if matches and given["exit_code"] == 0 else 1


@app.command()
def demo(
    out: Annotated[Path, typer.Option(callback=_folder, help="Folder for report.json and report.html.")] = Path(
        "out/demo"
    ),
    device: Device = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Transformer layers; default: as many as fit.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the weights and the noise.")] = 0,
    host: Host = "diffusers",
) -> None:
    """Denoise with a seeded LTX-2 transformer, stock and accelerated, and compare every step bit for bit.

    Example: `bitfuse demo --steps 8 --out out/demo`
    """
    from bitfuse import demo as demonstration

    _check_device(device)
    _check_host(host)
    result = demonstration.run(out, device, steps, layers, seed, Console(), host)
    if result.exit_code == 2:
        _fail(result.verdict)
    raise typer.Exit(result.exit_code)


@app.command()
def compare(
    model: Annotated[str | None, typer.Argument(help="A diffusers LTX-2 pipeline: its folder, or its hub id.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the film shows; default: a fox in the snow.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with arguments of the pipeline's call.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: the pipeline's.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels, as in 768x512; default: the pipeline's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the film, 8n + 1; default: the pipeline's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise, and of random weights.")] = 0,
    out: Annotated[
        Path, typer.Option(callback=_folder, help="Folder for the films, compare.json and compare.html.")
    ] = Path("out/compare"),
    device: Device = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep only the part that runs on the GPU.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay the forward as one CUDA graph.")] = False,
    keep_text: Annotated[bool, typer.Option("--keep-text", help="Keep the text's keys and values (LTX-2.0).")] = False,
    random_weights: Annotated[
        str | None, typer.Option(help="Instead of MODEL, a transformer alone: ltx-2.0, ltx-2.3 or ltx-2.5.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers with random weights; default: as many as fit.")] = None,
    host: Host = "diffusers",
    trace: Annotated[bool, typer.Option("--trace", help="Where bits differ, find the first block and site.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Run a whole pipeline stock (twice) and accelerated, and compare latents, frames and sound bit for bit.

    Example: `bitfuse compare Lightricks/LTX-2 --prompt "Waves on black rocks" --steps 20 --out out/compare`
    """
    from bitfuse import comparison
    from bitfuse.comparison_request import Request, check
    from bitfuse.seeded import CannotRun

    _check_device(device)
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
    try:
        check(request)
    except CannotRun as why:
        raise typer.Exit(_fail(str(why))) from None
    result = comparison.run(request, out, Console())
    if result.exit_code == 2:
        _fail(result.verdict)
    _write(json_file, result.as_dict())
    raise typer.Exit(result.exit_code)


@app.command()
def bench(
    only: Annotated[
        list[str] | None, typer.Option(help="operators, overhead, model, audit or first-step; default: all.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only these operators; default: all.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Video tokens of a step, one or several.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers; default: as many as fit (first-step: 4).")] = None,
    rounds: Annotated[int | None, typer.Option(min=2, help="Turns of each way to run the model, 1.5 s each.")] = None,
    ltx: Annotated[str, typer.Option(help="LTX-2 version of the model: 2.0, 2.3 or 2.5.")] = "2.0",
    image_to_video: Annotated[bool, typer.Option("--image-to-video", help="Per-token timesteps in the model.")] = False,
    host: Host = "diffusers",
    json_file: JsonFile = None,
) -> None:
    """Time operators and a whole step against PyTorch, on this GPU, only after their bits were compared.

    Example: `bitfuse bench --only operators --json out/bench.json`
    """
    import torch

    from bitfuse import bench as benchmark
    from bitfuse.contract import OPERATORS
    from bitfuse.seeded import VERSIONS, CannotRun

    if unknown := [part for part in only or [] if part not in benchmark.PARTS]:
        raise typer.Exit(_fail(f"--only {unknown[0]} is not a part; accepted: {', '.join(benchmark.PARTS)}"))
    if unknown := [name for name in op or [] if name not in OPERATORS]:
        raise typer.Exit(_fail(f"--op {unknown[0]} is not an operator; accepted: {', '.join(OPERATORS)}"))
    _check_host(host)
    if host != "diffusers" and only != ["model"]:
        raise typer.Exit(_fail(f"--host {host} goes with --only model; other parts time diffusers, or no host"))
    if ltx not in VERSIONS:
        raise typer.Exit(_fail(f"--ltx {ltx} is not a version; accepted: {', '.join(VERSIONS)}"))
    if wrong := [n for n in tokens or [] if n not in benchmark.LATENTS]:
        raise typer.Exit(
            _fail(f"--tokens {wrong[0]} is not accepted; accepted: {', '.join(map(str, benchmark.LATENTS))}")
        )
    if not torch.cuda.is_available():
        raise typer.Exit(_fail("bench needs a CUDA device: times in Triton's interpreter mean nothing"))
    try:
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
            save=lambda document: _write(json_file, document),  # after every row: a run may be cut off
        )
    except CannotRun as why:
        raise typer.Exit(_fail(str(why))) from None
    raise typer.Exit(0 if result["equal"] else 1)


@app.command()
def explain(
    model: Annotated[
        str | None, typer.Argument(help="A pipeline's or a transformer's folder, or an id on the Hub.")
    ] = None,
    random_weights: Annotated[str | None, typer.Option(help="Instead of MODEL: ltx-2.0, ltx-2.3 or ltx-2.5.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="With --random-weights: layers; default: 48.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Video tokens of the forward that is looked at.")] = 6144,
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16, float16 or float32.")] = "bfloat16",
    image_to_video: Annotated[bool, typer.Option("--image-to-video", help="Per-token timesteps.")] = False,
    host: Host = "diffusers",
    json_file: JsonFile = None,
) -> None:
    """Say what would be fused where in a model, and every reason where not. Loads no weights, needs no GPU.

    Example: `bitfuse explain Lightricks/LTX-2`, or without a model: `bitfuse explain --random-weights ltx-2.3`
    """
    from bitfuse import sites

    if dtype not in sites.DTYPES:
        raise typer.Exit(_fail(f"--dtype {dtype} is not accepted; accepted: {', '.join(sites.DTYPES)}"))
    if (model is None) == (random_weights is None):
        raise typer.Exit(_fail("accepted: MODEL (a folder or a Hub id) or --random-weights VERSION, one of the two"))
    if layers is not None and model is not None:
        raise typer.Exit(_fail("--layers goes with --random-weights; MODEL has its own number"))
    _check_host(host)
    if model is not None and host != "diffusers":
        raise typer.Exit(_fail(f"--host {host} goes with --random-weights; a MODEL is diffusers'"))
    geometry = None
    if model is not None:
        name, built = model, sites.from_config(model, sites.DTYPES[dtype])
    else:
        layers = 48 if layers is None else layers
        name = f"{random_weights}, {layers} layers"
        geometry = sites.of_version(str(random_weights), layers, host)
        built = sites.from_geometry(geometry, sites.DTYPES[dtype])
    found = sites.explain(built, tokens, image_to_video, name, geometry)
    sites.show(Console(), found)
    _write(json_file, found.as_dict())


@app.command()
def doctor(json_file: JsonFile = None) -> None:
    """Check whether this machine can keep the promise: device, libraries, settings, a stock block, a proof.

    Exit code 0: no failure; 1: bits differ that must be equal; 2: another failure.

    Example: `bitfuse doctor --json doctor.json`
    """
    from bitfuse import doctor as examination

    diagnosis = examination.run(Console())
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


def _check_device(device: str | None) -> None:
    import torch

    if device not in (None, "cuda", "cpu"):
        raise typer.Exit(_fail(f"--device {device} is not accepted; accepted: cuda, cpu"))
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.Exit(_fail("--device cuda: PyTorch sees no CUDA device here; accepted: cpu"))


def _check_host(host: str) -> None:
    from bitfuse.seeded import HOSTS

    if host not in HOSTS:
        raise typer.Exit(_fail(f"--host {host} is not a host; accepted: {', '.join(HOSTS)}"))


def _write(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def _fail(line: str) -> int:
    """Print one line to stderr, whatever stands in it: what was given may hold line ends and terminal codes."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(line.split()))
    Console(stderr=True).print(f"bitfuse: {shown}", style="red", markup=False, highlight=False, soft_wrap=True)
    return 2
