"""ltx-core's convolutional video encoder (1.0.0 in CI), stock against accelerated: the same bits, or its own code."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("ltx_core")
pytest.importorskip("einops")

from ltx_core.model.common import normalization
from ltx_core.model.video_vae import VideoEncoder
from ltx_core.model.video_vae.enums import LogVarianceType, NormLayerType, PaddingModeType

import bitfuse
from bitfuse.hosts import ltx_core, ltx_core_vae
from test_ltx_core_vae import assert_fused, elementwise, tiling, why, without_gradients  # noqa: F401 (a fixture)

CHANNELS = 16  # of the latents, and of the volume after the first convolution
# As the real ones are built: means of 2, 1, 4 and 4 channels, in LTX-2.3 of 2, 1, 4 and 8
SPACE, TIME, ALL = (f"compress_{what}_res" for what in ("space", "time", "all"))
LTX_2_0 = [("res_x", 2), (SPACE, {}), ("res_x", 1), (TIME, {}), ("res_x", 1), (ALL, {}), ("res_x", 1), (ALL, {})]
LTX_2_3 = [*LTX_2_0[:-1], (ALL, {"multiplier": 1})]
KINDS = {
    "2.0": {"blocks": [*LTX_2_0, ("res_x", 1)]},
    "2.3": {"blocks": [*LTX_2_3, ("res_x", 2)]},
    "mirrored": {"blocks": [*LTX_2_0, ("res_x", 1)], "padding": PaddingModeType.REFLECT},
    "single resnets": {"blocks": [*LTX_2_0, ("res_x_y", {"multiplier": 1})]},
}


def make(device="cpu", dtype=torch.bfloat16, blocks=KINDS["2.0"]["blocks"], padding=PaddingModeType.ZEROS, **rest):
    torch.manual_seed(3)
    encoder = VideoEncoder(
        out_channels=rest.pop("channels", CHANNELS),
        encoder_blocks=blocks,
        encoder_spatial_padding_mode=padding,
        **rest,
    )
    for p in encoder.parameters():
        p.copy_(torch.randn(p.shape) * (0.3 if p[0].numel() < 2 else p[0].numel() ** -0.5))
    for statistic in encoder.buffers():
        statistic.copy_(torch.rand(statistic.shape) + 0.5)
    return encoder.to(device, dtype).eval()


def video(device="cpu", batch=1, frames=9, height=64, width=64, dtype=torch.bfloat16):
    x = torch.randn((batch, 3, frames, height, width), generator=torch.Generator().manual_seed(4))
    return x.to(device, dtype)


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (2, 9)], ids=["an image", "two videos"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_of_an_encode_is_the_hosts(kind, batch, frames, device, launched_as_reference):
    """Kernels are held against these references, and against diffusers' encoder, by other tests."""
    encoder, x = make(device, **KINDS[kind]), video(device, batch, frames)
    expected = encoder(x)
    with bitfuse.accelerated(encoder) as handle:
        found = encoder(x)
        assert_fused(handle)
    assert bitfuse.compare(expected, found) is None
    assert found.stride() == expected.stride()


def test_an_encode_by_the_kernels_has_every_bit(device):
    encoder, x = make(device, **KINDS["2.3"]), video(device, frames=1, height=32)
    expected = encoder(x)
    with bitfuse.accelerated(encoder) as handle:
        assert bitfuse.compare(expected, encoder(x)) is None
        assert_fused(handle)
        names = [site.name for site in handle.sites]
    assert names[0] == "encoder.down_blocks.0.res_blocks.0.norm1"
    assert "encoder.down_blocks.1.downsample" in names
    assert names[-2:] == ["encoder.conv_norm_out", "encoder.conv_out"]


def test_tiles_are_the_hosts(device, launched_as_reference):
    encoder, x = make(device), video(device, frames=33, height=96, width=192)
    if not hasattr(encoder, "tiled_encode"):
        pytest.skip("this ltx-core encodes no tiles")
    config = tiling(128, 64, 24, 16)  # the least that it takes
    expected = encoder.tiled_encode(x, config)
    with bitfuse.accelerated(encoder) as handle:
        found = encoder.tiled_encode(x, config)
        assert_fused(handle)
        assert handle.sites[0].fused > 1
    assert bitfuse.compare(expected, found) is None


def test_frames_that_the_host_crops_or_refuses_are_left_to_it(device, launched_as_reference):
    encoder, x = make(device), video(device, frames=11)

    def outcome():
        try:
            return encoder(x)
        except ValueError as error:  # the first 1.0.0
            return str(error)

    expected = outcome()
    with bitfuse.accelerated(encoder) as handle:
        found = outcome()
        assert not any(site.fused for site in handle.sites)
    assert found == expected if isinstance(expected, str) else bitfuse.compare(expected, found) is None


# -- taking over and giving back ---------------------------------------------------------------------------------------


def test_it_is_found_in_what_holds_it_and_given_back():
    encoder = make()
    assert ltx_core.transformers(SimpleNamespace(encoder=encoder)) == [encoder]
    handle = bitfuse.accelerate(encoder)
    assert bitfuse.accelerate(encoder) is handle
    assert "forward" in encoder.__dict__
    handle.restore()
    assert "forward" not in encoder.__dict__


# -- the host's own code, for a reason ---------------------------------------------------------------------------------

REASONS = {
    "changes the number of channels": {"blocks": [("res_x", 1), ("res_x_y", 2)]},
    "down_blocks.0 does not come after a resnet": {"blocks": [(SPACE, {}), ("res_x", 1)]},
    "down_blocks.1 is a .*CausalConv3d; accepted: a ResnetBlock3D or SpaceToDepthDownsample": {
        "blocks": [("res_x", 1), ("compress_time", {}), ("res_x", 1)]
    },
    "down_blocks.0.res_blocks.0.norm1 is a torch.*GroupNorm, not": {
        "blocks": [("res_x", 1)],
        "norm_layer": NormLayerType.GROUP_NORM,
        "channels": 32,
    },
    "down_blocks.0.res_blocks.0.conv1 pads with 'replicate'": {
        "blocks": [("res_x", 1)],
        "padding": PaddingModeType.REPLICATE,
    },
    "the encoder's latent_log_var is": {"blocks": [("res_x", 1)], "latent_log_var": LogVarianceType.PER_CHANNEL},
}


@pytest.mark.parametrize("reason", REASONS)
def test_encoders_that_are_built_otherwise(reason):
    assert re.search(reason, why(make(**REASONS[reason]), video(height=32, width=32)))


def test_a_hook_is_called(device):
    encoder, x, calls = make(device), video(device), []
    hook = encoder.down_blocks[1].conv.register_forward_hook(lambda module, args, result: calls.append(module))
    assert why(encoder, x).startswith("a hook is attached to down_blocks.1.conv, which is not called when the encoder")
    assert len(calls) == 2
    hook.remove()


def test_another_dtype_and_a_gradient():
    assert "torch.float32; accepted: " in why(make(dtype=torch.float32), video(dtype=torch.float32))
    encoder = make()
    with torch.enable_grad(), bitfuse.accelerated(encoder) as handle:
        encoder(video()).float().sum().backward()
        assert encoder.conv_in.conv.weight.grad is not None
        reasons = {reason for site in handle.sites for reason in site.reasons}
    assert reasons == {"a gradient is required of the block's inputs or weights"}


def test_a_function_that_somebody_has_replaced(monkeypatch):
    encoder, x = make(), video()
    stock = normalization.PixelNorm.forward
    monkeypatch.setattr(normalization.PixelNorm, "forward", lambda norm, x: stock(norm, x) * 2)
    assert why(encoder, x).startswith("PixelNorm.forward of ltx-core")


def test_an_unknown_source_is_left_alone(monkeypatch):
    monkeypatch.setitem(ltx_core_vae.READ, "SpaceToDepthDownsample.forward", set())
    with bitfuse.accelerated(make()) as handle:
        (site,) = handle.sites
    assert re.match(r"SpaceToDepthDownsample.forward of ltx-core .* is not a source that bitfuse knows", site.declined)
    assert elementwise(handle)
