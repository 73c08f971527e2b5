"""The films and the page of `bitfuse compare`. Nothing here decides: bits were compared before, on the tensors."""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import wave
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.lines import one_line
from bitfuse.tools import page
from bitfuse.tools.seeded import Denoising, Geometry

_LONGEST_SIDE = 384  # of a film in the page, in pixels: bigger ones are made smaller, and are beside it in full
_MOST_FRAMES = 240  # in the page

FILES = tuple(f"{run}.{suffix}" for run in ("stock", "bitfuse") for suffix in ("mp4", "webp", "png", "wav"))
"""Every file that `write_films` may write."""


@dataclass(frozen=True)
class Films:
    """What was written beside the page.

    files       SHA-256 of each file, by its name
    pictures    films as data URIs, by caption: stock, with bitfuse, difference; nothing for a transformer alone
    sounds      waveforms as data URIs, by caption
    """

    sentence: str = "A transformer alone makes no film."
    files: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    sounds: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] = (3, 2)


def write_films(
    out: Path,
    stock: Denoising,
    fused: Denoising,
    frame_rate: float,
    sample_rate: int | None,
    taken: Collection[str] = (),
) -> Films:
    """Both runs' film and sound as files, the first of the batch; without a codec for films, only the sound.

    taken    names that are not to be used: somebody else's files have them
    """
    if not stock.decoded:
        return Films()
    pairs = {"stock": stock, "bitfuse": fused}
    frames = {name: _pixels(run.decoded["decoded frames"]) for name, run in pairs.items()}
    sounds = {name: run.decoded["audio samples"][0].float().nan_to_num() for name, run in pairs.items()}
    sample_rate = sample_rate or 24000

    names, sentence = _write_all(out, frames, sounds, frame_rate, sample_rate, taken)
    waves = {f"{name}.wav": _wav(sound, sample_rate) for name, sound in sounds.items()}
    if others := [name for name in waves if name in taken]:
        sentence += f" No sound as a file: there is a {others[0]} that bitfuse did not write."
    else:
        for name, content in waves.items():
            (out / name).write_bytes(content)
            names.append(name)

    differs = page.differing(stock.decoded["decoded frames"][0], fused.decoded["decoded frames"][0]).any(1)
    films = {"stock": frames["stock"], "with bitfuse": frames["bitfuse"]}
    return Films(
        sentence,
        {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names},
        {caption: _moving(film, frame_rate) for caption, film in films.items()}
        | {"difference": _moving(_mask(differs), frame_rate)},
        {
            caption: page.data_uri(content, "audio/wav")
            for caption, content in zip(("stock", "with bitfuse"), waves.values(), strict=True)
        },
        (int(differs.shape[2]), int(differs.shape[1])),
    )


def render(
    document: dict[str, Any],
    kinds: list[dict[str, Any]],
    films: Films,
    geometry: Geometry | None,
    stock: Denoising,
    fused: Denoising,
) -> str:
    """compare.html for a document, its sites folded (`Report.kinds`), the films, or else both runs' latents."""
    return page.fill(
        "compare.html.j2",
        command="compare",
        document=document,
        kinds=kinds,
        films=films,
        pictures=geometry and page.latent_pictures(geometry, stock, fused),
        charts=page.charts(document["steps"]),
    )


# -- files ------------------------------------------------------------------------------------------------------------


def _write_all(
    out: Path,
    frames: dict[str, Any],
    sounds: dict[str, Tensor],
    frame_rate: float,
    sample_rate: int,
    taken: Collection[str],
) -> tuple[list[str], str]:
    """The names of the films written, in the first of the formats that works here, and a sentence about it."""
    formats: dict[str, tuple[str, Callable[[Path, str], object]]] = {
        "mp4": (
            "H.264 with sound, by diffusers' encode_video",
            lambda path, name: _mp4(path, frames[name], frame_rate, sounds[name], sample_rate),
        ),
        "webp": (
            "lossless animated WebP by Pillow, the sound beside it",
            lambda path, name: path.write_bytes(_animated(frames[name], frame_rate, "WEBP", lossless=True)),
        ),
        "png": (
            "animated PNG by Pillow, the sound beside it",
            lambda path, name: path.write_bytes(_animated(frames[name], frame_rate, "PNG")),
        ),
    }
    missed = []
    for suffix, (words, write) in formats.items():
        names = [f"{name}.{suffix}" for name in frames]
        if others := [name for name in names if name in taken]:
            missed.append(f"no {suffix} (there is a {others[0]} that bitfuse did not write)")
            continue
        try:
            for name in frames:
                write(out / f"{name}.{suffix}", name)
        except Exception as error:  # a codec that is not there, or won't: no reason to lose a verdict
            for name in names:
                (out / name).unlink(missing_ok=True)
            missed.append(f"no {suffix} ({one_line(error, 200) or type(error).__name__})")
        else:
            return names, f"{', '.join(names)}: {words}{'; ' if missed else ''}{', '.join(missed)}."
    return [], f"No film could be written: {', '.join(missed)}."


def _mp4(path: Path, frames: Any, frame_rate: float, sound: Tensor, sample_rate: int) -> None:
    try:
        from diffusers.utils import encode_video as encode
    except ImportError:  # it was the pipeline's own at first
        encode = importlib.import_module("diffusers.pipelines.ltx2.export_utils").encode_video
    encode(
        video=torch.from_numpy(frames),
        fps=round(frame_rate),
        output_path=str(path),
        audio=sound,
        audio_sample_rate=sample_rate,
    )


def _wav(sound: Tensor, sample_rate: int) -> bytes:
    """16-bit PCM of a waveform [channels, samples] in [-1, 1]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(sound.shape[0])
        writer.setsampwidth(2)
        writer.setframerate(sample_rate)
        writer.writeframes((sound.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous().numpy().tobytes())
    return file.getvalue()


# -- pictures ---------------------------------------------------------------------------------------------------------


def _pixels(frames: Tensor) -> Any:
    """The first film of a batch [B, F, 3, H, W] in [0, 1], as a numpy array of bytes [F, H, W, 3]."""
    return (frames[0].float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _mask(differs: Tensor) -> Any:
    """[F, H, W] as white on black, of the page's size: a single pixel that differs stays white. One frame if none."""
    if not differs.any():
        differs = differs[:1]
    height, width = differs.shape[1:]
    shrink = min(1.0, _LONGEST_SIDE / max(height, width))
    size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    small = torch.nn.functional.adaptive_max_pool2d(differs.float(), size)
    return (255 * small).to(torch.uint8).numpy()


def _moving(frames: Any, frame_rate: float) -> str:
    """A film for the page: WebP, or PNG where Pillow has no WebP; lossless unless it has to be made smaller."""
    from PIL import features

    every = math.ceil(len(frames) / _MOST_FRAMES)
    frames, frame_rate = frames[::every], frame_rate / every
    if not features.check("webp"):
        return page.data_uri(_animated(frames, frame_rate, "PNG", _LONGEST_SIDE), "image/png")
    lossless = max(frames.shape[1:3]) <= _LONGEST_SIDE
    film = _animated(frames, frame_rate, "WEBP", _LONGEST_SIDE, lossless=lossless, quality=80)
    return page.data_uri(film, "image/webp")


def _animated(frames: Any, frame_rate: float, kind: str, longest_side: int = 1 << 16, **options: Any) -> bytes:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.thumbnail((longest_side, longest_side))
    file = io.BytesIO()
    images[0].save(
        file, kind, save_all=True, append_images=images[1:], duration=round(1000 / frame_rate), loop=0, **options
    )
    return file.getvalue()
