"""Tiles of diffusers' video autoencoder, blended at once: the host's bits in every arrangement, and in fewer ops."""

from __future__ import annotations

import itertools

import pytest
import torch

import bitfuse
from bitfuse.core import proof
from bitfuse.hosts import tiles
from live_bytes import LiveBytes

diffusers = pytest.importorskip("diffusers", minversion="0.38")

from test_vae import BF16, decoded, latents, make, upstream  # noqa: E402 (it needs diffusers)

KIND = upstream.AutoencoderKLLTX2Video
BLENDS = {"blend_t": 2, "blend_v": 3, "blend_h": 4}
ZEROS = "2.0, not causal, zeros at the edges"  # tiles of one pixel can't be mirrored


@pytest.fixture
def quick(launched_as_reference):
    tiles.difference.cache_clear()
    proof._failures.clear()
    yield
    tiles.difference.cache_clear()
    proof._failures.clear()


def volume(seed, *shape, dtype=BF16):
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found.flatten()[::97] = float("nan")
    found.flatten()[::101] = float("-inf")
    found.flatten()[::103] = -0.0
    return found


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("extent", [1, 7, pytest.param(64, marks=pytest.mark.slow)])
def test_every_value_in_every_row_is_blended_as_one_by_one(extent, dtype):
    assert tiles.difference(extent, dtype, torch.device("cpu")) is None


@pytest.mark.parametrize("name", BLENDS)
@pytest.mark.parametrize("extent", [-1, 0, 1, 3, 5, 99])
def test_a_blend_is_the_hosts(name, extent):
    dim = BLENDS[name]
    for length in (2, 5):  # the one before may be shorter
        a, b = volume(1, 1, 3, 5, 5, 5).narrow(dim, 0, length), volume(2, 1, 3, 5, 5, 5)
        right, found, rows = b.clone(), b.clone(), b.clone()
        assert getattr(KIND, name)(None, a, right, extent) is right
        assert tiles.blended(a, found, extent, dim) is found
        assert bitfuse.compare(right, found) is None
        assert bitfuse.compare(right, tiles.by_rows(a, rows, extent, dim)) is None


ARRANGEMENTS = {  # height and width of a tile in pixels, and their strides; 16 pixels for each of the latents
    "overlaps": (48, 48, 32, 32),
    "no overlap": (32, 32, 32, 32),
    "one side": (48, 96, 16, 96),
    "ragged last tiles": (64, 48, 48, 32),
    "a stride of one": (32, 48, 16, 16),
    "larger than the video": (512, 512, 448, 448),
    "gaps": (16, 32, 32, 48),
}


def arranged(vae, name):
    height, width, down, across = ARRANGEMENTS[name]
    vae.enable_tiling(
        tile_sample_min_height=height,
        tile_sample_min_width=width,
        tile_sample_stride_height=down,
        tile_sample_stride_width=across,
    )


QUICK = [("overlaps", False), ("overlaps", True), ("ragged last tiles", False), ("gaps", False), ("no overlap", True)]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "framewise"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(ARRANGEMENTS, [False, True])
    ],
)
def test_a_tiled_decode_has_every_bit(name, framewise):
    stock, vae = make(ZEROS), make(ZEROS)
    z = latents(batch=2, frames=5, height=5, width=4)
    for v in (stock, vae):
        arranged(v, name)
        v.use_framewise_decoding = framewise
        v.tile_sample_min_num_frames, v.tile_sample_stride_num_frames = 8, 4
    handle = bitfuse.accelerate(vae)
    expected, found = decoded(stock, z), decoded(vae, z)
    assert bitfuse.compare(expected, found) is None
    assert expected.stride() == found.stride()
    assert handle.report().not_used == []
    handle.restore()
    assert not any(method in vars(vae) for method in (*BLENDS, "tiled_decode"))
    assert bitfuse.compare(expected, decoded(vae, z)) is None


@pytest.mark.usefixtures("quick")
def test_with_noise_the_numbers_are_drawn_in_the_hosts_order():
    zeros = {"decoder_spatial_padding_mode": "zeros"}
    stock, vae, z = make("noise", **zeros), make("noise", **zeros), latents(height=5, width=6)
    for v in (stock, vae):
        arranged(v, "overlaps")
    bitfuse.accelerate(vae)
    assert bitfuse.compare(decoded(stock, z), decoded(vae, z)) is None


@pytest.mark.usefixtures("quick")
def test_the_result_is_given_as_the_host_gives_it():
    vae, z = make(ZEROS), latents(height=5, width=4)
    arranged(vae, "overlaps")
    with torch.no_grad():
        right = vae.tiled_decode(z, None), vae.tiled_decode(z, None, False, False)
        bitfuse.accelerate(vae)
        found = vae.tiled_decode(z, None), vae.tiled_decode(z, None, causal=False, return_dict=False)
    assert [type(f) for f in found] == [type(r) for r in right]
    assert bitfuse.compare(right[0].sample, found[0].sample) is None
    assert bitfuse.compare(right[1], found[1]) is None


def blends(extent: int, call) -> int:
    a, b = torch.zeros(1, 3, 2, 128, 128, dtype=BF16), torch.zeros(1, 3, 2, 128, 128, dtype=BF16)
    with LiveBytes() as live:
        call(a, b, extent)
    return live.ops


def test_the_number_of_ops():
    """Views among them: 7 for each row, and now 9 in all with the weights."""
    assert blends(64, lambda *args: KIND.blend_v(None, *args)) == 448
    assert blends(64, lambda a, b, extent: tiles.blended(a, b, extent, 3)) < 16


TILED = {  # tile and stride in pixels, four for each of the latents' sides; whether less is held than stock holds
    "overlaps": (64, 56, 64, 48, True),
    "two rows": (64, 56, 24, 24, False),
    "one row": (64, 56, 16, 64, False),
    "one column": (64, 56, 64, 16, False),
    "no overlap": (64, 64, 32, 32, False),
    "gaps": (64, 128, 64, 64, False),
    "nearly all overlaps": (64, 8, 24, 24, True),
    "one tile": (512, 448, 64, 48, False),
}


@pytest.mark.parametrize("work", [0, 3_000_000])
@pytest.mark.parametrize("name", TILED)
def test_no_more_is_held_than_stock_holds(name, work):
    """While a tile is decoded, which takes much memory, and beside it; this decoder computes nothing."""
    tile, stride, height, width, less = TILED[name]

    class Vae:
        spatial_compression_ratio = 4
        tile_sample_min_height = tile_sample_min_width = tile
        tile_sample_stride_height = tile_sample_stride_width = stride
        blend_v, blend_h = KIND.blend_v, KIND.blend_h

        def decoder(self, z, temb, causal):
            within = torch.zeros(work, dtype=BF16)
            video = torch.zeros(1, 3, 9, 4 * z.shape[3], 4 * z.shape[4], dtype=BF16)
            del within
            return video

    class Ours(Vae):
        def blend_v(self, a, b, extent):
            return tiles.blended(a, b, extent, 3)

        def blend_h(self, a, b, extent):
            return tiles.blended(a, b, extent, 4)

    peaks = []
    z = torch.zeros(1, 8, 2, height, width)
    for vae, run in (
        (Vae(), lambda vae: KIND.tiled_decode(vae, z, None)),
        (Ours(), lambda vae: tiles.TiledDecode.fused(None, vae, z, None, return_dict=False)),
    ):
        with LiveBytes() as live:
            run(vae)
        peaks.append(live.peak)
    assert peaks[1] <= (0.96 if less else 1) * peaks[0]
    assert work or peaks[1] <= 0.7 * peaks[0]


def test_a_blend_holds_its_rows_once():
    """Most of a tile's frames may overlap with the ones before: twice as many are more than stock holds at all."""
    a, b = volume(1, 1, 3, 16, 32, 32), volume(2, 1, 3, 16, 32, 32)
    tiles._weights(14, 2, 5, b.device)
    with LiveBytes() as live:
        tiles.blended(a, b, 14, 2)
    assert live.peak <= a.nbytes


# -- when it is the host's own -----------------------------------------------------------------------------------------


def losses(handle) -> list[str]:
    return [reason for extra in handle.report().not_used for reason in extra.reasons]


def in_fp32(vae, z):
    vae.float()
    return z.float()


def of_a_class(vae, z):
    vae.__class__ = type("Derived", (KIND,), {"blend_v": lambda self, a, b, extent: b})
    return z


DECLINED = {
    "fp32": (in_fp32, "b is no plain tensor of five dimensions, in bf16 or fp16", "a is no plain tensor"),
    "a class with a blend of its own": (
        of_a_class,
        "the blend_v of test_tiles.Derived was replaced meanwhile",
    ),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("what", "before"), list(itertools.product(DECLINED, [True, False])))
def test_other_tiles_are_blended_by_the_host(what, before):
    change, *told = DECLINED[what]
    stock, vae = make(ZEROS), make(ZEROS)
    z = latents(height=5, width=4)
    for v in (stock, vae):
        arranged(v, "overlaps")
    right = decoded(stock, change(stock, z))
    if before:
        z = change(vae, z)
    handle = bitfuse.accelerate(vae)
    if not before:
        z = change(vae, z)
    assert bitfuse.compare(right, decoded(vae, z)) is None
    assert losses(handle)
    assert before or any(reason.startswith(tuple(told)) for reason in losses(handle)), losses(handle)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", [*BLENDS, "tiled_decode"])
def test_a_method_that_is_replaced_is_the_one_that_is_called(name, monkeypatch):
    stock, vae, calls = make(ZEROS), make(ZEROS), []
    z, own = latents(frames=5, height=5, width=4), getattr(KIND, name)
    for v in (stock, vae):
        arranged(v, "overlaps")
        v.use_framewise_decoding = name == "blend_t"
        v.tile_sample_min_num_frames, v.tile_sample_stride_num_frames = 8, 4
    handle = bitfuse.accelerate(vae)

    def other(self, *args, **kwargs):
        calls.append(name)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(KIND, name, other)
    expected, of_stock = decoded(stock, z), len(calls)
    assert bitfuse.compare(expected, decoded(vae, z)) is None
    assert len(calls) == 2 * of_stock > 0
    assert any("was replaced" in reason for reason in losses(handle))


@pytest.mark.usefixtures("quick")
def test_an_unknown_source_is_left_alone(monkeypatch):
    from bitfuse.hosts import diffusers_vae as adapter

    monkeypatch.setitem(adapter.READ_OF_TILES, "AutoencoderKLLTX2Video.blend_h", set())
    vae = make(ZEROS)
    handle = bitfuse.accelerate(vae)
    assert "blend_h" not in vars(vae)
    assert "blend_v" in vars(vae)
    (reason,) = losses(handle)
    assert reason.startswith("AutoencoderKLLTX2Video.blend_h of diffusers")


@pytest.mark.usefixtures("quick")
def test_where_the_bits_would_differ_the_host_blends(monkeypatch):
    weights = tiles._weights

    def rounded(*args):
        return tuple(w.to(BF16).float() for w in weights(*args))

    monkeypatch.setattr(tiles, "_weights", rounded)
    stock, vae, z = make(ZEROS), make(ZEROS), latents(height=5, width=4)
    for v in (stock, vae):
        arranged(v, "overlaps")
    handle = bitfuse.accelerate(vae)
    before = tiles.difference(3, BF16, torch.device("cpu"))
    assert before.startswith("rows blended at once differ from rows blended one by one: differs at [")
    monkeypatch.setattr(tiles, "difference", lambda *_: before)
    assert bitfuse.compare(decoded(stock, z), decoded(vae, z)) is None
    assert before in losses(handle)


@pytest.mark.usefixtures("quick")
def test_gradients_and_tiles_that_share_memory_are_the_hosts():
    vae = make(ZEROS)
    handle = bitfuse.accelerate(vae)
    a, b = volume(1, 1, 3, 2, 4, 4), volume(2, 1, 3, 2, 4, 4)
    leaf = a.clone().requires_grad_(True)
    assert vae.blend_v(leaf, b.clone(), 2).requires_grad
    both = volume(3, 2, 3, 2, 4, 4)
    right = both.clone()
    KIND.blend_v(None, right[:1], right[1:], 2)
    vae.blend_v(both[:1], both[1:], 2)
    assert bitfuse.compare(right, both) is None
    with pytest.raises(RuntimeError):
        vae.blend_v(a, b[..., :3].clone(), 2)
    assert losses(handle) == [
        "a gradient is required",
        "the tiles differ in dtype or device, or share their memory",
        "the tiles differ in a side that is not blended",
    ]


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("no memory is left")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("where", ["while it is tried", "while it is done"])
def test_without_memory_the_host_blends(where, monkeypatch):
    """And what there was no memory to try is not tried at every blend, nor given up."""
    stock, vae, z = make(ZEROS), make(ZEROS), latents(height=5, width=4)
    for v in (stock, vae):
        arranged(v, "overlaps")
    handle, tried = bitfuse.accelerate(vae), []
    right = decoded(stock, z)

    def every(*_):
        tried.append(1)
        out_of_memory()

    with monkeypatch.context() as patch:
        patch.setattr(proof, "_FREE_SECONDS", -1.0)
        if where == "while it is tried":
            patch.setattr("bitfuse.core.values.every_16_bit_pattern", every)
            patch.setattr(proof, "_SHARE", 1e9)
        else:
            patch.setattr(tiles, "blended", out_of_memory)
            patch.setattr(tiles, "difference", lambda *_: None)
        assert bitfuse.compare(right, decoded(vae, z)) is None
        assert len(tried) == (1 if where == "while it is tried" else 0)
    assert any("ran out of memory while rows" in reason for reason in losses(handle))
    proof._failures.clear()
    counts = [dict(extra.reasons) for extra in handle.report().not_used]
    assert bitfuse.compare(right, decoded(vae, z)) is None
    assert [dict(extra.reasons) for extra in handle.report().not_used] == counts


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("whose", ["the class's", "a class of its own", "the instance's", "the instance's later on"])
@pytest.mark.parametrize("what", ["changes the tile above", "draws numbers"])
def test_somebody_elses_blend_is_called_when_the_host_calls_it(what, whose, monkeypatch):
    zeros = {"decoder_spatial_padding_mode": "zeros"}
    stock, vae, z = make("noise", **zeros), make("noise", **zeros), latents(height=5, width=6)
    own = KIND.blend_v

    def other(self, a, b, extent):
        if what == "draws numbers":
            return own(self, a, b, extent) + torch.randn(())
        a[:, :, :, :3] = 0
        return own(self, a, b, extent)

    def put(v):
        if whose == "the class's":
            monkeypatch.setattr(KIND, "blend_v", other)
        elif whose == "a class of its own":
            v.__class__ = type("Derived", (KIND,), {"blend_v": other})
        else:
            v.blend_v = other.__get__(v)

    for v in (stock, vae):
        arranged(v, "overlaps")
        if whose != "the instance's later on":
            put(v)
    handle = bitfuse.accelerate(vae)
    if whose == "the instance's later on":
        put(stock)
        put(vae)
    assert bitfuse.compare(decoded(stock, z), decoded(vae, z)) is None
    assert any("blend_v" in reason for reason in losses(handle))
