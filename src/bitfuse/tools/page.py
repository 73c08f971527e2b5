"""How a demo's result is shown: a table for the terminal, and one HTML page that fetches nothing."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from torch import Tensor

from bitfuse.core.bits import differing
from bitfuse.core.lines import visible

if TYPE_CHECKING:
    from bitfuse.tools.seeded import Denoising, Geometry


# -- in the terminal --------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> Table:
    """The steps, for a terminal."""
    table = Table(
        box=box.SIMPLE_HEAD, title="Latents after each step", title_justify="left", title_style="bold", pad_edge=False
    )
    for heading in ("step", "sigma", "video SHA-256", "audio SHA-256", "equal", "ms stock", "ms bitfuse"):
        words = "SHA" in heading or heading == "equal"
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        hashes = ["\n".join(_digests(row[stream])) for stream in ("video", "audio")]
        equal = "[green]yes[/]" if row["equal"] else "[red]no[/]"
        times = [f"{row[key]:.1f}" for key in ("ms_stock", "ms_bitfuse")]
        table.add_row(str(row["step"]), f"{row['sigma']:.4f}", *hashes, equal, *times)
    return table


def _digests(stream: dict[str, Any]) -> list[str]:
    """One short digest where the two agree, else both."""
    return [digest[:12] for digest in dict.fromkeys((stream["sha256_stock"], stream["sha256_bitfuse"]))]


def times_sentence(times: dict[str, Any]) -> str:
    if times["ratio"] is None:
        return "These kernels ran in Triton's interpreter. The bits are meaningful; the times are not."
    return (
        f"First step (with compiling and proving): {times['ms_bitfuse_first']:.1f} ms. Median of the rest: "
        f"{times['ms_stock_median_of_rest']:.1f} ms stock, {times['ms_bitfuse_median_of_rest']:.1f} ms with bitfuse. "
        "`bitfuse bench` measures with more care."
    )


# -- the page ---------------------------------------------------------------------------------------------------------


def fill(template: str, **values: Any) -> str:
    """A page made from one of the package's templates; what it needs and is not given is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bitfuse", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    return environment.get_template(template).render(**values)


def _shown(value: Any) -> Any:
    """A value's text, in which what would not be seen, or would turn the direction of writing, is seen."""
    return visible(value, but="\n") if type(value) is str else value  # and no markup, which is a str of its own kind


# -- pictures -----------------------------------------------------------------------------------------------------


def latent_pictures(geometry: Geometry, stock: Denoising, fused: Denoising) -> dict[str, dict[str, Any]]:
    """Per stream: what is shown, and the panels by caption. One pixel per latent position; the page enlarges them."""
    shape = (geometry.frames, geometry.height, geometry.width, geometry.channels)
    video, video_fused = (run.video[-1][0].reshape(shape) for run in (stock, fused))
    differs = differing(video, video_fused)
    wrong_frames = differs.flatten(1).any(1).nonzero()
    frame = int(wrong_frames[0]) if len(wrong_frames) else geometry.frames // 2
    audio, audio_fused = (run.audio[-1][0].T for run in (stock, fused))  # time runs to the right
    return {
        "video": {
            "shown": f"latent frame {frame + 1} of {geometry.frames}, the first three channels as red, green and blue",
            "panels": {
                "stock": _png(_rgb(video[frame], video)),
                "with bitfuse": _png(_rgb(video_fused[frame], video)),
                "difference": _png(differs[frame].any(-1).double()),
            },
        },
        "audio": {
            "shown": f"all {geometry.audio_frames} latent frames from left to right, {audio.shape[0]} channels",
            "panels": {
                "stock": _png(_unit(audio, audio), "magma"),
                "with bitfuse": _png(_unit(audio_fused, audio), "magma"),
                "difference": _png(differing(audio, audio_fused).double()),
            },
        },
    }


def _unit(values: Tensor, scale_of: Tensor) -> Tensor:
    """Into [0, 1], with 2.5 standard deviations of `scale_of` to either side of the middle."""
    return (0.5 + values.double().nan_to_num() / (5 * scale_of.double().std())).clamp(0, 1)


def _rgb(values: Tensor, scale_of: Tensor) -> Tensor:
    channels = [min(channel, values.shape[-1] - 1) for channel in range(3)]
    return _unit(values, scale_of)[..., channels]


def _png(values: Tensor, colours: str = "gray") -> str:
    """A data URI for values in [0, 1]: [height, width] through a colour map, or [height, width, 3] as they are."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, values.numpy(), cmap=colours, vmin=0, vmax=1, format="png")
    return data_uri(file.getvalue(), "image/png")


def charts(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The chart of `runs.compare_steps`'s times for a light and for a dark page, as data URIs."""
    return {"light": _chart(rows, "#57606a"), "dark": _chart(rows, "#9aa4af")}


def _chart(rows: list[dict[str, Any]], ink: str) -> str:
    """Times of every step but the first, as a data URI; transparent, with axes in `ink`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.2, 2.5), dpi=160, layout="constrained")  # no pyplot: the user's backend stays his own
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [row["step"] for row in rows[1:]]
    for key, label, colour, marker in (
        ("ms_stock", "stock", "#8b949e", "o"),
        ("ms_bitfuse", "with bitfuse", "#2f9e6e", "s"),
    ):
        axes.plot(steps, [row[key] for row in rows[1:]], label=label, color=colour, marker=marker, ms=5, lw=1.8)
    axes.set_ylim(0, 1.15 * max(row[key] for row in rows[1:] for key in ("ms_stock", "ms_bitfuse")))
    axes.set_xlabel("step", color=ink)
    axes.set_ylabel("ms", color=ink)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=ink)
    axes.grid(axis="y", color=ink, alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    axes.legend(frameon=False, labelcolor=ink, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    file = io.BytesIO()
    figure.savefig(file, format="png", transparent=True)
    return data_uri(file.getvalue(), "image/png")


def data_uri(content: bytes, kind: str) -> str:
    """`content` as a page holds it: `kind` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
