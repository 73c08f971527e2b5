"""ltx-core's convolutional video decoder (1.0.0 in CI), stock against accelerated: the same bits, or its own code."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("ltx_core")
pytest.importorskip("einops")

from ltx_core.model.common import normalization
from ltx_core.model.video_vae import convolution, video_vae
from ltx_core.model.video_vae.enums import NormLayerType, PaddingModeType

import bitfuse
from bitfuse.hosts import ltx_core, ltx_core_vae
from bitfuse.ops.convolution import CONVOLUTION

CHANNELS = 8  # of the latents
SHAPE = (1, CHANNELS, 2, 2, 2)
# As the real ones are built, from the video's side: 8 frames and 32 x 32 pixels of a latent with the patches of 4 x 4.
RESIDUAL = [("res_x", 1), *[("compress_all", {"residual": True, "multiplier": 2}), ("res_x", 1)] * 3]
# LTX-2.3's: other upsamplers, without a residual
PLAIN = [("res_x", 1), ("compress_time", {"multiplier": 2}), ("res_x", 1), ("compress_space", {}), ("res_x", 1)]
NOISY = [("res_x", {"num_layers": 1, "inject_noise": True}), *PLAIN[1:]]
KINDS = {
    "residual": {"blocks": RESIDUAL},
    "causal": {"causal": True},
    "no residual": {"blocks": PLAIN},
    "zeros": {"blocks": PLAIN, "padding": PaddingModeType.ZEROS},
    "timestep": {"blocks": NOISY, "conditioned": True},
    "single resnets": {"blocks": [("res_x_y", {"multiplier": 1}), *PLAIN[1:]], "causal": True},
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def bare(blocks=PLAIN, causal=False, conditioned=False, padding=PaddingModeType.REFLECT, **rest):
    accepted = inspect.signature(ltx_core_vae.HOST_CLASS.__init__).parameters
    rest = {"base_channels": 4, **rest}
    if "base_channels" not in accepted and rest.pop("base_channels") == 32:  # the first 1.0.0: as many as the latents
        pytest.skip("this ltx-core's decoder is too narrow for the 32 groups of its GroupNorm")
    return ltx_core_vae.HOST_CLASS(
        in_channels=CHANNELS,
        decoder_blocks=blocks,
        causal=causal,
        timestep_conditioning=conditioned,
        decoder_spatial_padding_mode=padding,
        **rest,
    )


def make(device="cpu", dtype=torch.bfloat16, **kind):
    torch.manual_seed(3)
    decoder = bare(**kind)
    for p in decoder.parameters():  # tables are made empty, scales of noise zero
        if p.ndim:
            p.copy_(torch.randn(p.shape) * (0.3 if p[0].numel() < 2 else p[0].numel() ** -0.5))
    for statistic in decoder.buffers():
        statistic.copy_(torch.rand(statistic.shape) + 0.5)
    return decoder.to(device, dtype).eval()


def latents(device="cpu", shape=SHAPE, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(device, dtype)


def elementwise(handle):
    return [site for site in handle.sites if site.operator != CONVOLUTION.name]


def assert_fused(handle):
    assert {site.state for site in elementwise(handle)} == {"fused"}, handle.report()


def why(decoder, *args, **kwargs):
    """The one reason for which every site fell back, or stayed; the bits are the host's own."""
    expected = decoder(*args, **kwargs)
    with bitfuse.accelerated(decoder) as handle:
        assert bitfuse.compare(expected, decoder(*args, **kwargs)) is None
        (reason,) = {reason for site in handle.sites for reason in site.reasons}
        assert not any(site.fused for site in handle.sites)
    return reason


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_a_decode_is_the_hosts(kind, device):
    decoder, x = make(device, **KINDS[kind]), latents(device)
    torch.manual_seed(5)
    expected = decoder(x)
    with bitfuse.accelerated(decoder) as handle:
        torch.manual_seed(5)
        assert bitfuse.compare(expected, decoder(x)) is None
        assert_fused(handle)
        names = {site.name for site in handle.sites}
    steps = [module for module in decoder.up_blocks.modules() if type(module) is convolution.CausalConv3d]
    assert len(names) == 2 * len(steps) + 3 + sum("upsample" in name for name in names)


def test_a_timestep_and_a_generator_are_the_callers(device):
    decoder, x = make(device, **KINDS["timestep"]), latents(device)
    timestep = torch.tensor([0.3], device=device, dtype=x.dtype)

    def decode():
        generator = torch.Generator(device).manual_seed(6)
        return decoder(x, timestep, generator), generator.get_state()

    expected, state = decode()
    with bitfuse.accelerated(decoder) as handle:
        found, its_state = decode()
        assert_fused(handle)
    assert bitfuse.compare(expected, found) is None
    assert torch.equal(state, its_state)


def test_latents_of_the_patchifier_lie_in_channels_last_and_are_fused(device):
    """The first convolution puts a contiguous frame in front of them, so the host's own volumes are contiguous."""
    from ltx_core.components.patchifiers import VideoLatentPatchifier
    from ltx_core.types import VideoLatentShape

    decoder, x = make(device), latents(device)
    tokens = x.permute(0, 2, 3, 4, 1).reshape(1, -1, CHANNELS).contiguous()
    x = VideoLatentPatchifier(1).unpatchify(tokens, VideoLatentShape(*SHAPE))
    assert x.stride(1) == 1
    expected = decoder(x)
    volumes = []
    hook = decoder.conv_in.register_forward_hook(lambda module, args, result: volumes.append(result.is_contiguous()))
    with bitfuse.accelerated(decoder) as handle:
        assert bitfuse.compare(expected, decoder(x)) is None
        assert_fused(handle)
    hook.remove()
    assert volumes == [True]


def test_latents_of_another_dtype_are_cast_as_the_host_casts_them(device):
    decoder, x = make(device), latents(device, dtype=torch.float32)
    if not ltx_core_vae._CASTS:
        with pytest.raises(RuntimeError), bitfuse.accelerated(decoder):
            decoder(x)
        return
    expected = decoder(x)
    with bitfuse.accelerated(decoder) as handle:
        found = decoder(x)
        assert_fused(handle)
    assert found.dtype == torch.float32
    assert bitfuse.compare(expected, found) is None


def tiling(side=64, overlap=32, frames=16, overlapping=8):
    """Tiles of so many pixels a side and frames; as a rule two latents a side and two frames, which overlap by one."""
    try:
        from ltx_core.tiling import DimensionSizeConfig, TileSizeConfig
    except ImportError:
        from ltx_core.model.video_vae import SpatialTilingConfig, TemporalTilingConfig, TilingConfig

        return TilingConfig(SpatialTilingConfig(side, overlap), TemporalTilingConfig(frames, overlapping))
    both = DimensionSizeConfig(side, overlap)
    return TileSizeConfig(frames=DimensionSizeConfig(frames, overlapping), height=both, width=both)


def test_tiles_are_the_hosts(device):
    decoder, x = make(device, blocks=RESIDUAL), latents(device, (1, CHANNELS, 3, 3, 2))
    expected = list(decoder.tiled_decode(x, tiling()))
    assert len(expected) > 1
    with bitfuse.accelerated(decoder) as handle:
        found = list(decoder.tiled_decode(x, tiling()))
        assert_fused(handle)
        assert handle.sites[0].fused > len(expected)  # several tiles of each
    assert len(expected) == len(found)
    for theirs, ours in zip(expected, found, strict=True):
        assert bitfuse.compare(theirs, ours) is None


# -- taking over and giving back ---------------------------------------------------------------------------------------


def test_restore_leaves_nothing(device):
    decoder = make(device)
    weights = {name: p.data_ptr() for name, p in decoder.state_dict().items()}
    handle = bitfuse.accelerate(decoder)
    assert bitfuse.accelerate(decoder) is handle
    assert "forward" in decoder.__dict__
    handle.restore()
    assert "forward" not in decoder.__dict__
    assert weights == {name: p.data_ptr() for name, p in decoder.state_dict().items()}


def test_a_decoder_is_found_in_what_holds_it():
    decoder = make()
    assert ltx_core.transformers(SimpleNamespace(decoder=decoder)) == [decoder]
    with pytest.raises(TypeError, match="X0Model or video decoder or encoder"):
        bitfuse.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="keep_text is True"):
        bitfuse.accelerate(decoder, keep_text=True)


def test_a_decoder_without_weights_yet_is_taken_over(device):
    """As ltx-core's builders do: module operations run on a model of the meta device, which then gets its weights."""
    stock, x = make(device), latents(device)
    with torch.device("meta"):
        decoder = bare().to(torch.bfloat16).eval()
    handle = bitfuse.accelerate(decoder)
    decoder.load_state_dict(stock.state_dict(), assign=True)
    assert bitfuse.compare(stock(x), decoder(x)) is None
    assert_fused(handle)


# -- the host's own code, for a reason ---------------------------------------------------------------------------------


def test_a_hook_is_called(device):
    decoder, x, calls = make(device), latents(device), []
    norm = decoder.up_blocks[1].conv
    hook = norm.register_forward_hook(lambda module, args, result: calls.append(module))
    assert why(decoder, x).startswith("a hook is attached to up_blocks.1.conv, which is not called")
    assert len(calls) == 2
    hook.remove()
    with bitfuse.accelerated(decoder) as handle:
        decoder(x)
        assert_fused(handle)


@pytest.mark.parametrize("kind", ["no residual", "timestep"])
def test_a_volume_that_a_hook_lays_otherwise(kind, device):
    """Where noise was drawn for the latents it is drawn again, and is the same."""
    decoder, x = make(device, **KINDS[kind]), latents(device)
    decoder.conv_in.register_forward_hook(lambda module, args, y: y.contiguous(memory_format=torch.channels_last_3d))
    for generator in (None, torch.Generator(device)):
        found = []
        for _ in range(2):
            torch.manual_seed(7)
            if generator is not None:
                generator.manual_seed(8)
            found.append(decoder(x, None, generator))
            handle = bitfuse.accelerate(decoder)
        assert bitfuse.compare(*found) is None
        (reason,) = {reason for site in handle.sites for reason in site.reasons}
        assert reason.startswith("conv_in gave a volume with strides")
        handle.restore()


def test_weights_that_are_not_contiguous(device):
    for name in ("conv_in", "conv_out"):
        decoder = make(device)
        conv = getattr(decoder, name).conv
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
        assert "not contiguous" in why(decoder, latents(device))


REASONS = {
    "changes the number of channels": {"blocks": [*PLAIN, ("res_x_y", 1)]},
    "up_blocks.0 does not come after a resnet": {"blocks": [*PLAIN, ("compress_time", {})]},
    "up_blocks.0.res_blocks.0.norm1 is a torch.*GroupNorm, not": {
        "blocks": [("res_x", 1)],
        "norm_layer": NormLayerType.GROUP_NORM,
        "base_channels": 32,
    },
    "up_blocks.0.res_blocks.0.conv1 pads with 'replicate'": {"blocks": PLAIN, "padding": PaddingModeType.REPLICATE},
}


@pytest.mark.parametrize("reason", REASONS)
def test_decoders_that_are_built_otherwise(reason):
    kind = dict(REASONS[reason])
    assert re.search(reason, why(make(**kind), latents()))


def test_the_dtype_of_the_weights():
    given = "the decoder's weights are" if ltx_core_vae._CASTS else "sample is a torch.Tensor of"
    found = why(make(dtype=torch.float32), latents(dtype=torch.float32))
    assert found.startswith(f"{given} torch.float32; accepted: ")


def test_a_gradient_is_the_hosts():
    decoder, x = make(blocks=PLAIN), latents()
    with torch.enable_grad(), bitfuse.accelerated(decoder) as handle:
        decoder(x).float().sum().backward()
        assert decoder.conv_in.conv.weight.grad is not None
        reasons = {reason for site in handle.sites for reason in site.reasons}
    assert reasons == {"a gradient is required of the block's inputs or weights"}


def test_a_function_that_somebody_has_replaced(monkeypatch):
    decoder, x = make(), latents()
    stock = normalization.PixelNorm.forward
    monkeypatch.setattr(normalization.PixelNorm, "forward", lambda norm, x: stock(norm, x) * 2)
    assert why(decoder, x).startswith("PixelNorm.forward of ltx-core")
    monkeypatch.undo()
    with bitfuse.accelerated(decoder) as handle:
        monkeypatch.setattr(normalization.PixelNorm, "forward", lambda norm, x: stock(norm, x) * 2)
        found = decoder(x)
        (reason,) = {reason for site in handle.sites for reason in site.reasons}
    assert reason.startswith("PixelNorm.forward was replaced")
    assert bitfuse.compare(decoder(x), found) is None


def test_an_unknown_source_is_left_alone(monkeypatch):
    monkeypatch.setitem(ltx_core_vae.READ, "CausalConv3d.forward", set())
    with bitfuse.accelerated(make()) as handle:
        (site,) = handle.sites
    assert re.match(r"CausalConv3d.forward of ltx-core .* is not a source that bitfuse knows", site.declined)


def test_the_forward_that_saves_memory_is_left_in_place():
    if not hasattr(video_vae, "ConvVideoDecoder") and not ltx_core_vae._CASTS:
        pytest.skip("this ltx-core has no other forward")
    memory_efficient_decode = pytest.importorskip("ltx_core.model.video_vae.memory_efficient_decode")
    decoder, x = make(), latents()
    memory_efficient_decode.enable_memory_efficient_decode(decoder)
    assert why(decoder, x).startswith("enable_memory_efficient_decode has replaced the decoder's forward")
    memory_efficient_decode.disable_memory_efficient_decode(decoder)
    expected = decoder(x)
    with bitfuse.accelerated(decoder) as handle:
        assert bitfuse.compare(expected, decoder(x)) is None
        states = {site.state for site in elementwise(handle)}
        assert states == {"fused"} or "not contiguous" in str(handle.report())  # 1.1.4 to 1.1.7 leave weights so
