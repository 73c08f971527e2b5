"""How diffusers' LTX-2 video autoencoder blends the tiles of a decode and joins them: the same bits, in fewer ops.

The host blends two tiles row by row, four small ops for each of up to 64 rows, and holds all tiles until the last one
is decoded. Here a blend is three ops, and a row of tiles is joined and let go of once the next one is blended with it.

    blended = a * (1 - i / extent) + b * (i / extent)    for row i of the overlap: both products and the sum rounded

A number is multiplied by as fp32, whatever the tensor's dtype; here those numbers are a tensor of fp32, and what is
rounded is written as the tiles' dtype. That this gives the host's bits is tried once for each dtype, extent and device
of a process: every row of the overlap with every value of a 16-bit dtype.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor

from bitfuse.core import proof
from bitfuse.core.bits import compare
from bitfuse.core.conditions import HALVES, around, capturing
from bitfuse.hosts.part import Part
from bitfuse.run.swap import bound

_MOST = 1 << 10  # rows of an overlap


def blended(a: Tensor, b: Tensor, extent: int, dim: int) -> Tensor:
    """b, with its first `extent` rows along `dim` blended with the last ones of a, in place.

    Memory for as many rows is asked for once, before b is changed.
    """
    extent = min(a.shape[dim], b.shape[dim], extent)
    if extent <= 0:
        return b
    before, here = a.narrow(dim, a.shape[dim] - extent, extent), b.narrow(dim, 0, extent)
    first, second = _weights(extent, dim, a.ndim, b.device)
    left = torch.mul(before, first, out=torch.empty(here.shape, dtype=b.dtype, device=b.device))
    torch.mul(here, second, out=here)
    torch.add(left, here, out=here)
    return b


def by_rows(a: Tensor, b: Tensor, extent: int, dim: int) -> Tensor:
    """What the host does."""
    extent = min(a.shape[dim], b.shape[dim], extent)
    for row in range(extent):
        mixed = a.select(dim, row - extent) * (1 - row / extent) + b.select(dim, row) * (row / extent)
        b.select(dim, row).copy_(mixed)
    return b


@functools.lru_cache(256)
def _weights(extent: int, dim: int, ndim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1 - i / extent, i / extent) along a dimension, in fp32. Kept, as a copy to the device waits for that."""
    rows = [row / extent for row in range(extent)]
    shape = [extent if d == dim else 1 for d in range(ndim)]
    with torch.inference_mode(False):
        first = torch.tensor([1 - row for row in rows], dtype=torch.float32, device="cpu").view(shape)
        second = torch.tensor(rows, dtype=torch.float32, device="cpu").view(shape)
        return first.to(device), second.to(device)


@functools.lru_cache(256)
def difference(extent: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why this extent is blended row by row, None where `blended` has the bits of that here."""
    from bitfuse.core.values import every_16_bit_pattern  # only here: a process without tiles needs none

    with torch.no_grad():
        every = every_16_bit_pattern(dtype, device).view(1, 256, 256)
        a = every.expand(extent, -1, -1)
        # each value beside others, in each row
        b = torch.stack([every[0].flatten().roll(1 + 37 * row).view(256, 256) for row in range(extent)])
        mismatch = compare(by_rows(a, b.clone(), extent, 0), blended(a, b.clone(), extent, 0))
    return (
        None if mismatch is None else f"rows blended at once differ from rows blended one by one: {mismatch.sentence}"
    )


def why_not(extent: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """`difference`, and where there is no memory to try it, that: it is tried again later."""
    trial = "tiles", "blended at once", (extent, dtype, device)
    if (failed := proof.waiting(*trial)) is not None:
        return failed.sentence
    start = time.perf_counter()
    try:
        return difference(extent, dtype, device)
    except torch.OutOfMemoryError:
        reason = "the device ran out of memory while rows blended at once were tried"
        proof.postpone(*trial, proof.Verdict(False, reason, seconds=time.perf_counter() - start, final=False))
        return reason


class OfTiles(Part):
    """Base of what stands in place of an autoencoder's methods for tiles."""

    __slots__ = ()
    kind = "tiles"

    def fall(self, reason: str) -> None:
        self.model.handle.extras.tiles.fall(reason)


class Blend(OfTiles):
    """In place of `blend_v`, `blend_h` or `blend_t`."""

    __slots__ = ()
    dim: int

    def why_stock(self, vae: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if len(args) != 3 or kwargs or type(args[2]) is not int:
            return "the tiles are not given as the host gives them"
        a, b, extent = args
        for name, tile in (("a", a), ("b", b)):
            if type(tile) is not Tensor or tile.dtype not in HALVES or tile.ndim != 5:
                return f"{name} is no plain tensor of five dimensions, in bf16 or fp16"
        if (
            a.dtype != b.dtype
            or a.device != b.device
            or a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        ):
            return "the tiles differ in dtype or device, or share their memory"
        if any(m != n for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if d != self.dim):
            return "the tiles differ in a side that is not blended"
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            return "a gradient is required"
        if (reason := next(around(), None)) is not None:
            return reason
        extent = min(a.shape[self.dim], b.shape[self.dim], extent)
        if extent > _MOST or capturing(b):
            return f"the overlap has {extent} rows, or a CUDA graph is being captured"
        return why_not(extent, b.dtype, b.device) if extent > 0 else None

    def fused(self, vae: Any, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        try:
            return blended(a, b, blend_extent, self.dim)
        except torch.OutOfMemoryError:  # of which the host's rows need less; b is as it was
            self.fall("the device ran out of memory while rows were blended at once")
        return bound(vae, self.method)(a, b, blend_extent)


class BlendV(Blend):
    __slots__ = ()
    method, dim = "blend_v", 3


class BlendH(Blend):
    __slots__ = ()
    method, dim = "blend_h", 4


class BlendT(Blend):
    __slots__ = ()
    method, dim = "blend_t", 2


class TiledDecode(OfTiles):
    """In place of `tiled_decode`: the host's own, but that each row of tiles is blended once it is decoded.

    output    the host's DecoderOutput
    """

    __slots__ = ()
    method = "tiled_decode"
    output: Any

    def why_stock(self, vae: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Somebody else's blend may change the tile above, or draw numbers, for which the order of all calls counts."""
        for kind in (BlendV, BlendH):
            blend = vars(vae).get(kind.method)
            if not isinstance(blend, kind) or getattr(type(vae), kind.method) is not blend.own:
                return f"the {kind.method} of the autoencoder is not the one that bitfuse read"
        return None

    def fused(
        self, vae: Any, z: Tensor, temb: Tensor | None, causal: bool | None = None, return_dict: bool = True
    ) -> Any:
        height, width = z.shape[3:]
        ratio, high, wide = vae.spatial_compression_ratio, vae.tile_sample_stride_height, vae.tile_sample_stride_width
        down, across = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
        above: list[Tensor] = []
        shown: list[Tensor] = []  # of the tiles above: views, joined once the tiles below are decoded
        rows: list[Tensor] = []
        for i in range(0, height, high // ratio):
            row = [
                vae.decoder(z[:, :, :, i : i + down, j : j + across], temb, causal=causal)
                for j in range(0, width, wide // ratio)
            ]
            blended_row = _blended_row(vae, above if i > 0 else None, row)
            if i > 0:
                rows.append(torch.cat(shown, dim=4))
            above, shown = row, blended_row
            del row, blended_row
        rows.append(torch.cat(shown, dim=4))
        del above, shown
        video = torch.cat(rows, dim=3)[:, :, :, : height * ratio, : width * ratio]
        return self.output(sample=video) if return_dict else (video,)


def _blended_row(vae: Any, above: list[Tensor] | None, row: list[Tensor]) -> list[Tensor]:
    """What is shown of each tile of a row, once that is blended with the ones above and to the left."""
    high, wide = vae.tile_sample_stride_height, vae.tile_sample_stride_width
    shown = []
    for j, tile in enumerate(row):
        if above is not None:
            tile = vae.blend_v(above[j], tile, vae.tile_sample_min_height - high)
        if j > 0:
            tile = vae.blend_h(row[j - 1], tile, vae.tile_sample_min_width - wide)
        shown.append(tile[:, :, :, :high, :wide])
    return shown
