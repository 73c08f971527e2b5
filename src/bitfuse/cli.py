"""The `bitfuse` command. Exit codes: 0 as promised, 1 a bit differs (or nothing was fused), 2 could not run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="LTX-2, faster, with output identical to the last bit, and proof of it on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file, as JSON.")]
Device = Annotated[str | None, typer.Option(help="cuda or cpu (Triton's interpreter); default: cuda if there is one.")]


def main() -> None:
    """Run the command line; a wrong call gets one line that says what is accepted."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(_fail(f"{type(error).__name__}: {error}"))


@app.command()
def verify(
    op: Annotated[list[str] | None, typer.Option(help="Only this operator; may be given several times.")] = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """Check every operator on this machine, bit for bit, and that wrong kernels are caught.

    Example: `bitfuse verify --op split_rotary_fp32`
    """
    from bitfuse import verify as verification
    from bitfuse.contract import OPERATORS

    _check_device(device)
    if unknown := [name for name in op or [] if name not in OPERATORS]:
        raise typer.Exit(_fail(f"--op {unknown[0]} is not an operator; accepted: {', '.join(OPERATORS)}"))
    result = verification.run(Console(), op, device)
    _write(json_file, result.as_dict())
    raise typer.Exit(result.exit_code)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")] = Path("out/demo"),
    device: Device = None,
    steps: Annotated[int | None, typer.Option(min=2, help="Denoising steps.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Transformer layers; default: as many as fit.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the noise.")] = 0,
) -> None:
    """Denoise with a seeded LTX-2 transformer, stock and accelerated, and compare every step bit for bit.

    Example: `bitfuse demo --steps 8 --out out/demo`
    """
    from bitfuse import demo as demonstration

    _check_device(device)
    result = demonstration.run(out, device, steps, layers, seed, Console())
    raise typer.Exit(result.exit_code)


@app.command()
def bench(
    only: Annotated[
        list[str] | None, typer.Option(help="operators, overhead, model or first-step; default: all four.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only these operators; default: all.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Video tokens of a step, one or several.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers; default: as many as fit (first-step: 4).")] = None,
    rounds: Annotated[int | None, typer.Option(min=2, help="Timed steps of each way to run the model.")] = None,
    ltx: Annotated[str, typer.Option(help="LTX-2 version of the model: 2.0, 2.3 or 2.5.")] = "2.0",
    image_to_video: Annotated[bool, typer.Option("--image-to-video", help="Per-token timesteps in the model.")] = False,
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
            rounds=rounds,
            only_operators=op,
            save=lambda document: _write(json_file, document),  # after every row: a run may be cut off
        )
    except CannotRun as why:
        raise typer.Exit(_fail(str(why))) from None
    raise typer.Exit(0 if result["equal"] else 1)


def _version(asked: bool) -> None:
    if asked:
        from bitfuse import __version__

        typer.echo(f"bitfuse {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


def _check_device(device: str | None) -> None:
    import torch

    if device not in (None, "cuda", "cpu"):
        raise typer.Exit(_fail(f"--device {device} is not accepted; accepted: cuda, cpu"))
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.Exit(_fail("--device cuda: PyTorch sees no CUDA device here; accepted: cpu"))


def _write(path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def _fail(line: str) -> int:
    Console(stderr=True).print(f"bitfuse: {line}", style="red", markup=False, highlight=False)
    return 2
