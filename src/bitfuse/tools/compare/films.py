"""The films and sounds of `bitfuse compare`. Nothing here decides: bits were compared before, on the tensors."""

from __future__ import annotations

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

from bitfuse.core.bits import differing
from bitfuse.core.lines import one_line
from bitfuse.tools import files, page
from bitfuse.tools.seeded import Denoising

_LONGEST_SIDE = 384  # of a film in the page, in pixels: bigger ones are made smaller, and are beside it in full
_MOST_FRAMES = 240  # in the page

CAPTIONS = ("stock", "with bitfuse", "difference")


@dataclass(frozen=True)
class Films:
    """What was written beside the page.

    files       SHA-256 of each file, by its name
    pictures    films as data URIs, by caption: stock, with bitfuse, difference; nothing for a transformer alone
    sounds      waveforms as data URIs, by caption
    """

    sentence: str = "A transformer alone makes no film."
    files: dict[str, str | None] = field(default_factory=dict)
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
    films = {name: _Film.of(run, frame_rate, sample_rate) for name, run in (("stock", stock), ("bitfuse", fused))}
    names, sentence = _write_all(out, films, taken)
    sounds = {f"{name}.wav": _wav(film) for name, film in films.items()}
    if others := [name for name in sounds if name in taken]:
        sentence += f" No sound as a file: there is a {others[0]} that bitfuse did not write."
    else:
        for name, content in sounds.items():
            (out / name).write_bytes(content)
            names.append(name)

    differs = differing(stock.decoded["decoded frames"][0], fused.decoded["decoded frames"][0]).any(1)
    shown = (films["stock"].frames, films["bitfuse"].frames, _mask(differs))
    return Films(
        sentence,
        {name: files.sha256(out / name) for name in names},
        dict(zip(CAPTIONS, (_moving(frames, frame_rate) for frames in shown), strict=True)),
        dict(zip(CAPTIONS, (page.data_uri(sound, "audio/wav") for sound in sounds.values()), strict=False)),
        (int(differs.shape[2]), int(differs.shape[1])),
    )


# -- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Film:
    """The first of a batch: frames [F, H, W, 3] as a numpy array of bytes, and a waveform [channels, samples]."""

    frames: Any
    frame_rate: float
    sound: Tensor
    sample_rate: int

    @classmethod
    def of(cls, run: Denoising, frame_rate: float, sample_rate: int | None) -> _Film:
        sound = run.decoded["audio samples"][0].float().nan_to_num()
        return cls(_pixels(run.decoded["decoded frames"]), frame_rate, sound, sample_rate or 24000)


_FORMATS: dict[str, tuple[str, Callable[[Path, _Film], object]]] = {
    "mp4": ("H.264 with sound, by diffusers' encode_video", lambda path, film: _mp4(path, film)),
    "webp": (
        "lossless animated WebP by Pillow, the sound beside it",
        lambda path, film: path.write_bytes(_animated(film.frames, film.frame_rate, "WEBP", lossless=True)),
    ),
    "png": (
        "animated PNG by Pillow, the sound beside it",
        lambda path, film: path.write_bytes(_animated(film.frames, film.frame_rate, "PNG")),
    ),
}


def _write_all(out: Path, films: dict[str, _Film], taken: Collection[str]) -> tuple[list[str], str]:
    """The names of the films written, in the first of the formats that works here, and a sentence about it."""
    missed = []
    for suffix, (words, write) in _FORMATS.items():
        paths = {f"{name}.{suffix}": film for name, film in films.items()}
        if others := [name for name in paths if name in taken]:
            missed.append(f"no {suffix} (there is a {others[0]} that bitfuse did not write)")
            continue
        try:
            for name, film in paths.items():
                write(out / name, film)
        except Exception as error:  # a codec that is not there, or won't: no reason to lose a verdict
            for name in paths:
                (out / name).unlink(missing_ok=True)
            missed.append(f"no {suffix} ({one_line(error, 200) or type(error).__name__})")
        else:
            return list(paths), f"{', '.join(paths)}: {words}{'; ' if missed else ''}{', '.join(missed)}."
    return [], f"No film could be written: {', '.join(missed)}."


def _mp4(path: Path, film: _Film) -> None:
    try:
        from diffusers.utils import encode_video as encode
    except ImportError:  # it was the pipeline's own at first
        encode = importlib.import_module("diffusers.pipelines.ltx2.export_utils").encode_video
    encode(
        video=torch.from_numpy(film.frames),
        fps=round(film.frame_rate),
        output_path=str(path),
        audio=film.sound,
        audio_sample_rate=film.sample_rate,
    )


def _wav(film: _Film) -> bytes:
    """The sound as 16-bit PCM, of a waveform in [-1, 1]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(film.sound.shape[0])
        writer.setsampwidth(2)
        writer.setframerate(film.sample_rate)
        samples = (film.sound.clamp(-1, 1) * 32767).round().to(torch.int16)
        writer.writeframes(samples.T.contiguous().numpy().tobytes())
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
