"""The encoder of diffusers' LTX-2 video autoencoder, stock and fused by turns: seconds, peak memory, launches, bits.

    python benchmarks/video_encoder.py --out out/video-encoder.json              # a minute and a half on an H200
    python benchmarks/video_encoder.py --out out/one.json --only "2.0 768x512x1"
    TRITON_INTERPRET=1 python benchmarks/video_encoder.py --out out/tiny.json --tiny        # tries the script on a CPU

Random weights at the real sizes. An image (one frame) is what image-to-video encodes, a whole video what training,
retakes and IC-LoRA do. Every result is compared with stock's first one in every bit, while no clock runs. `first_s` is
the first call of that size in the process: bitfuse's compiles its kernels and proves them. Exit code 1 where a bit
differs or nothing was fused.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTX2Video
from torch import Tensor

import bitfuse
from bitfuse.core import proof
from bitfuse.core.bits import BITS
from bitfuse.tools import seeded
from bitfuse.tools.bench.measure import kernel_class, with_peak
from bitfuse.tools.machine import machine

BF16, WAYS = torch.bfloat16, ("stock", "bitfuse")
COMPRESSION = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
# Of the decoder as little as there can be: nothing is decoded here.
NO_DECODER: dict[str, Any] = {
    "decoder_block_out_channels": (16,),
    "decoder_layers_per_block": (1, 1),
    "decoder_spatio_temporal_scaling": (True,),
    "decoder_inject_noise": (False, False),
    "upsample_type": ("spatiotemporal",),
    "upsample_residual": (True,),
    "upsample_factor": (2,),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "2.0": {},  # the class's defaults
    "2.3": {"block_out_channels": (256, 512, 1024, 1024), "layers_per_block": (4, 6, 4, 2, 2)},
}
TINY = {
    "2.0": {"block_out_channels": (32, 64, 128, 256), "layers_per_block": (1,) * 5, "latent_channels": 16},
    "2.3": {"block_out_channels": (32, 64, 128, 128), "layers_per_block": (1,) * 5, "latent_channels": 16},
}


@dataclass(frozen=True)
class Encode:
    """One row: the version of LTX-2, width, height and frames in pixels, tiles or not, how many turns are timed."""

    version: str
    width: int
    height: int
    frames: int
    turns: int
    tiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.version} {self.width}x{self.height}x{self.frames}{' tiled' if self.tiled else ''}"


ENCODES = (
    Encode("2.0", 768, 512, 1, 20),
    Encode("2.0", 1536, 1024, 1, 20),
    Encode("2.0", 768, 512, 121, 5),
    Encode("2.0", 1536, 1024, 1, 10, tiled=True),
    Encode("2.0", 1536, 1024, 121, 2),
    Encode("2.3", 768, 512, 1, 20),
    Encode("2.3", 1536, 1024, 1, 20),
    Encode("2.3", 768, 512, 121, 5),
)


def build(version: str, tiny: bool, device: torch.device) -> Any:
    config = (TINY if tiny else CONFIGS)[version]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        made = AutoencoderKLLTX2Video(**COMPRESSION, **NO_DECODER, **config)
    made = torch.nn.Module.to(made, device=device, dtype=BF16).eval().requires_grad_(False)
    for p in made.parameters():
        if p.ndim == 1:  # biases and the like, which start as zeros or ones
            p.add_(torch.randn_like(p), alpha=0.05)
    return made


def row(encode: Encode, tiny: bool, device: torch.device, models: dict[str, Any], handle: Any) -> dict[str, Any]:
    sides = [max(32, side // 12 // 32 * 32) for side in (encode.height, encode.width)] if tiny else None
    height, width = sides or (encode.height, encode.width)
    frames = min(encode.frames, 9) if tiny else encode.frames
    generator = torch.Generator(device).manual_seed(1)
    video = torch.rand((1, 3, frames, height, width), generator=generator, device=device).mul_(2).sub_(1).to(BF16)
    for model in models.values():
        model.use_tiling = False
        if encode.tiled:
            sizes = (
                ("tile_sample_min_height", "tile_sample_min_width"),
                (
                    "tile_sample_stride_height",
                    "tile_sample_stride_width",
                ),
            )
            tiles = dict.fromkeys(sizes[0], 64) | dict.fromkeys(sizes[1], 32) if tiny else {}
            model.enable_tiling(**tiles)

    def call(way: str) -> Tensor:
        return models[way].encode(video, return_dict=False)[0].parameters

    def timed(way: str) -> tuple[float, Tensor]:
        start = seeded.now(device)
        found = call(way)
        return seeded.now(device) - start, found

    def same(found: Tensor) -> bool:
        bits = BITS[found.element_size()]
        return found.stride() == expected.stride() and torch.equal(expected.view(bits), found.view(bits))

    before, proved = sum(site.fused for site in handle.sites), len(proof.verdicts())
    first, samples, equal = {}, {way: [] for way in WAYS}, []
    first["stock"], expected = timed("stock")
    low, high = expected.float().aminmax()
    first["bitfuse"], found = timed("bitfuse")
    equal.append(same(found))
    del found
    proofs = list(proof.verdicts().values())[proved:]
    for turn in range(-1, encode.turns):  # the first of them warms up
        for way in WAYS[:: -1 if turn % 2 else 1]:
            seconds, found = timed(way)
            equal.append(same(found))
            del found
            if turn >= 0:
                samples[way].append(1e3 * seconds)
    result: dict[str, Any] = {
        "encode": encode.name,
        "latents": list(expected.shape),
        "range": [float(low), float(high)],
        **{f"{way}_ms": samples[way] for way in WAYS},
        "first_s": first,
        "proofs": {"kernels": len(proofs), "s": sum(verdict.seconds for verdict in proofs)},
        "equal": all(equal) and bool(low.isfinite() and high.isfinite() and low < high),
        "compared": len(equal),
        "fused_calls": sum(site.fused for site in handle.sites) - before,
        "peak_gb": {},
        "kernels": {},
    }
    if device.type == "cuda":
        for way in WAYS:
            _, peak = with_peak(lambda way=way: call(way) is None)
            result["peak_gb"][way] = peak / 1e9
            result["kernels"][way] = kernels(lambda way=way: call(way))
    result["sites"] = [
        {key: kind[key] for key in ("name", "operator", "state", "tiers", "reasons", "count")}
        for kind in handle.report().kinds()
        if kind["name"].startswith("encoder.")
    ]
    result["equal"] &= result["fused_calls"] > 0
    return result


def kernels(step: Callable[[], Any]) -> dict[str, Any]:
    """Launches and milliseconds of one step's kernels, in all and by class; the longest by name, with their number."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    ms: Counter[str] = Counter()
    named: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        took = (event.time_range.end - event.time_range.start) / 1e3
        ms["convolutions" if kernel_class(event.name) == "matmul" else "other"] += took
        named[event.name[:100]] += took
        counts[event.name[:100]] += 1
    longest = [[name, counts[name], round(took, 3)] for name, took in named.most_common(16)]
    sums = {name: round(took, 3) for name, took in ms.items()}
    return {"launches": counts.total(), "ms": round(ms.total(), 3), **sums, "longest": longest}


def line(row: dict[str, Any]) -> str:
    """Less than 100 columns wide."""
    stock, ours = (min(row[f"{way}_ms"]) for way in WAYS)
    peaks = " to ".join(f"{row['peak_gb'][way]:.2f}" for way in row["peak_gb"]) or "-"
    launches = " to ".join(str(row["kernels"][way]["launches"]) for way in row["kernels"]) or "-"
    bits = "equal" if row["equal"] else "DIFFERS"
    return (
        f"{row['encode']:28}{stock:9.2f} {ours:9.2f} ms {stock / ours:5.2f}x  first {row['first_s']['stock']:.2f} "
        f"{row['first_s']['bitfuse']:.2f} s  peak {peaks} GB  launches {launches}  {bits}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", help=f"of: {', '.join(encode.name for encode in ENCODES)}")
    parser.add_argument("--seconds", type=float, default=110.0, help="no row is begun after that many")
    parser.add_argument("--tiny", action="store_true", help="try the script on few pixels, on any device")
    asked = parser.parse_args()
    known = {encode.name: encode for encode in ENCODES}
    if unknown := [name for name in asked.only or () if name not in known]:
        parser.error(f"--only {unknown[0]!r} is no row; accepted: {', '.join(known)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not asked.tiny:
        parser.error("there is no CUDA device; accepted without one: --tiny, with TRITON_INTERPRET=1")
    start = time.perf_counter()
    found: dict[str, Any] = {
        "what": "AutoencoderKLLTX2Video.encode, random weights at real sizes, stock and bitfuse by turns; every bit of "
        "every call compared in the same run. peak_gb: beyond the weights and the video. first_s: the first call of "
        "that size in the process",
        "machine": machine(device),
        "rows": [],
        "errors": {},
    }

    def keep() -> None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=1))

    def part(name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run it; what fails leaves the others their results."""
        try:
            found["rows"].append(run())
            print(line(found["rows"][-1]), flush=True)
        except Exception as error:
            found["errors"][name] = f"{type(error).__name__}: {error}"
            print(f"{name} FAILED: {found['errors'][name]}"[:300], flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        keep()

    with torch.no_grad():
        for version in CONFIGS:
            wanted = [e for e in ENCODES if e.version == version and (not asked.only or e.name in asked.only)]
            if not wanted:
                continue
            stock = build(version, asked.tiny, device)
            models = {"stock": stock, "bitfuse": seeded.twin(stock)}
            with bitfuse.accelerated(models["bitfuse"]) as handle:
                for encode in wanted:
                    if time.perf_counter() - start > asked.seconds:
                        print(f"{encode.name}: not begun, the time is over", flush=True)
                        continue
                    part(encode.name, lambda e=encode, m=models, h=handle: row(e, asked.tiny, device, m, h))
            del stock, models, handle
    found["seconds"] = time.perf_counter() - start
    found["exit_code"] = 2 if found["errors"] or not found["rows"] else int(not all(r["equal"] for r in found["rows"]))
    keep()
    print(f"{found['seconds']:.0f} s")
    raise SystemExit(found["exit_code"])


if __name__ == "__main__":
    main()
