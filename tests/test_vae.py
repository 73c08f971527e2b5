"""The video decoder of diffusers' LTX-2: the host's bits, whatever it is called with and whoever listens."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bitfuse
import tiny
from bitfuse.core import proof
from bitfuse.hosts.site import Site
from bitfuse.run.swap import ours_in

diffusers = pytest.importorskip("diffusers", minversion="0.38")
upstream = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_ltx2")

BF16, CHANNELS_LAST = torch.bfloat16, torch.channels_last_3d
ON_CPU = "the volume is on cpu, where PyTorch adds the bias before it rounds"
BASE = {
    "latent_channels": 16,
    "block_out_channels": (16, 16, 16, 16),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_block_out_channels": (16, 32),
    "decoder_layers_per_block": (1, 2, 1),
    "decoder_spatio_temporal_scaling": (True, True),
    "decoder_inject_noise": (False, False, False),
    "upsample_type": ("spatiotemporal", "spatiotemporal"),
    "upsample_residual": (True, True),
    "upsample_factor": (2, 2),
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
}
LIKE_2_3 = {
    "decoder_block_out_channels": (16, 32, 32, 64),
    "decoder_layers_per_block": (1, 1, 1, 1, 1),
    "decoder_spatio_temporal_scaling": (True,) * 4,
    "decoder_inject_noise": (False,) * 5,
    "upsample_type": ("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
    "upsample_residual": (False,) * 4,
    "upsample_factor": (2, 2, 1, 2),
    "decoder_spatial_padding_mode": "zeros",
    "decoder_causal": False,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
CONFIGS = {
    "2.0": {},
    "2.0, not causal, zeros at the edges": {"decoder_spatial_padding_mode": "zeros", "decoder_causal": False},
    "timestep": {"timestep_conditioning": True},
    "noise": {"decoder_inject_noise": (True, False, True)},
    "2.3": LIKE_2_3,
}


def make(config: str = "2.0", dtype: torch.dtype = BF16, **more):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTX2Video(**{**BASE, **CONFIGS[config], **more}).to(dtype).eval()
    with torch.no_grad():
        for parameter in vae.parameters():  # tables and scales of noise start as zeros, which hide much
            parameter.add_(0.02 * torch.randn_like(parameter))
    return vae


def latents(batch: int = 1, frames: int = 2, height: int = 2, width: int = 3, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(7)).to(dtype)


def timestep(vae, batch: int = 1) -> Tensor | None:
    return torch.tensor([0.05, 0.03][:batch]).to(BF16) if vae.config.timestep_conditioning else None


def decoded(vae, z: Tensor | None = None, **more) -> Tensor:
    z = latents() if z is None else z
    torch.manual_seed(1)  # of the noise that some decoders inject
    with torch.no_grad():
        return vae.decode(z, timestep(vae, z.shape[0]), return_dict=False, **more)[0].clone()


def reasons(handle) -> set[str]:
    return {reason for site in handle.report().sites for reason in site.reasons}


def sites(handle, of: str = "decoder") -> list:
    return [site for site in handle.sites if site.name.partition(".")[0] == of]


def elementwise(handle, of: str = "decoder") -> list:
    return [site for site in sites(handle, of) if site.operator != "convolution"]


def assert_fused(handle, of: str = "decoder") -> None:
    """Every site but the convolutions, which on a CPU are the host's own."""
    if torch.cuda.is_available():
        assert {site.state for site in sites(handle, of)} == {"fused"}, reasons(handle)
        return
    assert {site.state for site in elementwise(handle, of)} == {"fused"}
    assert reasons(handle) == {ON_CPU}


def assert_stock(handle, *told: str) -> None:
    """No site was fused, and the one reason has all that is told in it."""
    assert not any(site.fused for site in sites(handle))
    (reason,) = reasons(handle)
    for part in told:
        assert part in reason
    assert reason[-1] != "."


@pytest.fixture(autouse=True)
def _undecided(undecided_convolutions):
    """Of each test here."""


@pytest.fixture
def quick(launched_as_reference):
    """Kernels are proved by other tests; here their references run in their place and count as fused."""


# -- every bit ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_routes")
@pytest.mark.parametrize("config", CONFIGS)
def test_a_decode_whose_kernels_are_proved_has_every_bit(config):
    check_decode(config)


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize("config", CONFIGS)
def test_a_decode_has_every_bit_and_every_site_is_fused(config):
    check_decode(config)


def check_decode(config: str) -> None:
    vae, z = make(config), latents(batch=2 if config == "timestep" else 1)
    expected = decoded(vae, z)
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, decoded(vae, z)) is None
    assert_fused(handle)
    handle.restore()
    assert bitfuse.compare(expected, decoded(vae, z)) is None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("config", CONFIGS)
def test_the_references_are_the_hosts_own_chain(config):
    """With other sides, batches, one frame, and `causal` said by the caller: what the kernels are proved against."""
    vae = make(config)
    calls = [
        (latents(batch=2, frames=3, height=3, width=2), {}),
        (latents(frames=1), {}),
        (latents(frames=2), {"causal": True}),
        (latents(frames=2), {"causal": False}),
    ]
    expected = [decoded(vae, z, **more) for z, more in calls]
    handle = bitfuse.accelerate(vae)
    for (z, more), right in zip(calls, expected, strict=True):
        assert bitfuse.compare(right, decoded(vae, z, **more)) is None
    assert_fused(handle)


@pytest.mark.usefixtures("quick")
def test_the_sites_are_named_by_the_modules_and_counted():
    vae = make()
    handle = bitfuse.accelerate(vae)
    decoded(vae)
    names = [site.name for site in sites(handle)]
    assert len(set(names)) == len(names)
    assert names[:3] == [f"decoder.mid_block.resnets.0.{part}" for part in ("norm1", "conv1", "norm2")]
    assert "decoder.up_blocks.1.upsamplers.0.upsample" in names
    assert names[-3:] == ["decoder.norm_out", "decoder.conv_out", "decoder.unpatchify"]
    assert {site.fused + sum(site.fallen.values()) for site in sites(handle)} == {1}
    operators = {site.name: site.operator for site in sites(handle)}
    for name, operator in operators.items():
        assert operator == "convolution" or operator in bitfuse.OPERATORS, name
    seen = []
    for site in sites(handle):
        site.observers = (lambda s, op, *_: seen.append((s.operator, op.name)),)
    decoded(vae)
    assert seen == [(operator, operator) for operator in operators.values()], "each calls what it is counted for"


# -- how the host cuts it up -------------------------------------------------------------------------------------------


def tiled(vae, height: int = 32, width: int = 32, stride: int = 16):
    vae.enable_tiling(
        tile_sample_min_height=height,
        tile_sample_min_width=width,
        tile_sample_stride_height=stride,
        tile_sample_stride_width=stride,
    )


def sliced(vae):
    vae.use_slicing = True


def framewise(vae):
    vae.use_framewise_decoding = True
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 8, 4


CUT = {
    "tiles": lambda vae: tiled(vae, 48, 48, 32),
    "slices": sliced,
    "frames": framewise,
    "tiles of frames": lambda vae: (framewise(vae), tiled(vae, 48, 48, 32)),
}


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.usefixtures("quick")
def test_tiles_slices_and_frames_are_the_hosts(cut):
    vae, z = make(), latents(batch=2, frames=5, height=4, width=4)
    whole = decoded(vae, z)
    CUT[cut](vae)
    expected = decoded(vae, z)
    assert expected.shape == whole.shape
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, decoded(vae, z)) is None
    assert_fused(handle)
    assert all(site.fused > 1 for site in elementwise(handle)), "it was cut up"


@pytest.mark.usefixtures("quick")
def test_tiles_may_change_between_calls():
    zeros = "2.0, not causal, zeros at the edges"  # tiles of one pixel can't be mirrored
    stock, vae, z = make(zeros), make(zeros), latents(height=4, width=5)
    handle = bitfuse.accelerate(vae)
    for change in (
        lambda v: None,
        lambda v: tiled(v, 48, 48, 32),
        lambda v: tiled(v, 32, 48, 16),
        lambda v: v.disable_tiling() if hasattr(v, "disable_tiling") else setattr(v, "use_tiling", False),
        sliced,
        framewise,
    ):
        change(stock)
        change(vae)
        assert bitfuse.compare(decoded(stock, z), decoded(vae, z)) is None
    assert_fused(handle)


# -- what it may be called with ----------------------------------------------------------------------------------------


def spread(z: Tensor, *order: int) -> Tensor:
    """The same values with the dimensions in another order in memory."""
    back = [order.index(dim) for dim in range(z.ndim)]
    return z.permute(order).contiguous().permute(back)


LATENTS = {
    "height and width exchanged in memory": lambda z: spread(z, 0, 1, 2, 4, 3),
    "frames first in memory": lambda z: spread(z, 2, 0, 1, 3, 4),
    "every other pixel of a larger one": lambda z: z.repeat_interleave(2, dim=-1)[..., ::2],
    "a part of more channels": lambda z: torch.cat([z, z], dim=1)[:, :16],
    "one frame for all": lambda z: z[:, :, :1].expand(-1, -1, 3, -1, -1),
    "one sample for both": lambda z: z[:1].expand(2, -1, -1, -1, -1),
    "misaligned": lambda z: torch.cat([z.new_zeros(1), z.flatten()])[1:].view(z.shape),
    "two samples": lambda z: torch.cat([z, -z]),
    "one frame": lambda z: z[:, :, :1],
    "special values": lambda z: z.masked_fill(z > 1.5, float("nan")).masked_fill(z < -1.5, float("inf")),
    "zeros": torch.zeros_like,
    "the largest": lambda z: z.sign() * torch.finfo(BF16).max,
    "subnormals": lambda z: z * 2.0**-126,
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", LATENTS)
def test_latents_of_any_kind_are_fused(kind):
    vae, z = make(), LATENTS[kind](latents(height=3, width=3))
    expected = decoded(vae, z)
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, decoded(vae, z)) is None
    assert_fused(handle)


CHANNELS_LAST_LATENTS = {
    "dense": (lambda vae: None, lambda z: z),
    "with a gap": (
        lambda vae: None,
        lambda z: torch.cat([z, z], 3).contiguous(memory_format=CHANNELS_LAST)[:, :, :, :3],
    ),
    "in tiles": (lambda vae: tiled(vae, 48, 48, 32), lambda z: z),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("config", ["2.0", "2.0, not causal, zeros at the edges"])
@pytest.mark.parametrize("what", CHANNELS_LAST_LATENTS)
def test_latents_in_channels_last_are_fused_where_the_hosts_volumes_are_contiguous(what, config):
    """The first convolution repeats frames, which gives contiguous ones whatever the latents are, and joins them."""
    change, layout = CHANNELS_LAST_LATENTS[what]
    vae, z = make(config), layout(latents(height=4, width=4).contiguous(memory_format=CHANNELS_LAST))
    assert not z.is_contiguous()
    assert vae.decoder.conv_in(z).is_contiguous()
    change(vae)
    expected = decoded(vae, z)
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, decoded(vae, z)) is None
    assert_fused(handle)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["conv_in", "mid_block.resnets.0.conv1", "up_blocks.0", "conv_out", ""])
def test_weights_in_channels_last_stay_stock(name):
    """With them the host's own volumes lie otherwise, and ATen adds up the channels in another order."""
    stock, vae = make(), make()
    handle = bitfuse.accelerate(vae)
    for v in (stock, vae):
        v.decoder.get_submodule(name).to(memory_format=CHANNELS_LAST)
    assert bitfuse.compare(decoded(stock), decoded(vae)) is None
    assert_stock(handle, "not contiguous")


@pytest.mark.usefixtures("quick")
def test_a_single_position_in_channels_last_is_seen_too():
    """Its sides are 1, so it counts as contiguous; its strides go on to what is larger."""
    zeros = "2.0, not causal, zeros at the edges"
    vae, z = make(zeros), latents(frames=1, height=1, width=1)
    z = z.to(memory_format=CHANNELS_LAST)
    z = z.as_strided(z.shape, (16, 1, 16, 16, 16))
    assert z.is_contiguous()
    expected = decoded(vae, z)
    bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, decoded(vae, z)) is None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_another_dtype_stays_stock(dtype):
    vae, z = make(dtype=dtype), latents(dtype=dtype)
    expected = decoded(vae, z)
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, decoded(vae, z)) is None
    assert_stock(handle, str(dtype), "accepted: a plain tensor of torch.bfloat16")


@pytest.mark.usefixtures("quick")
def test_a_part_in_another_dtype_is_left_to_the_chain():
    """Tables and scales in fp32 in a decoder of bf16: what promotes in stock promotes here."""
    for config, name in (("timestep", "scale_shift_table"), ("noise", "per_channel_scale1")):
        vae = make(config)
        table = getattr(vae.decoder.mid_block.resnets[0], name)
        table.data = table.data.float()

        def outcome(vae=vae):
            try:
                return decoded(vae)
            except RuntimeError as error:
                return str(error)

        expected = outcome()
        handle = bitfuse.accelerate(vae)
        found = outcome()
        if isinstance(expected, str):
            assert found == expected
        else:
            assert bitfuse.compare(expected, found) is None
        handle.restore()


@pytest.mark.usefixtures("quick")
def test_a_wrong_call_raises_what_stock_raises():
    vae = make("timestep")
    handle = bitfuse.accelerate(vae)
    for args in ((latents(),), (torch.zeros(1, 16, 2, 2), torch.zeros(1)), (None, None), ("z", None)):
        found = []
        for forward in (functools.partial(type(vae.decoder).forward, vae.decoder), vae.decoder):
            with torch.no_grad(), pytest.raises(Exception) as raised:  # noqa: PT011
                forward(*args)
            found.append((raised.type, str(raised.value)))
        assert found[0] == found[1], args
    handle.restore()


@pytest.mark.usefixtures("quick")
def test_autocast_modes_and_inference_mode():
    vae, z = make(), latents()
    handle = bitfuse.accelerate(vae)
    with torch.autocast("cpu", dtype=BF16):
        expected = decoded(make(), z)
        assert bitfuse.compare(expected, decoded(vae, z)) is None
    assert_stock(handle, "autocast is on")
    with torch.inference_mode():
        assert bitfuse.compare(vae.decoder(z).clone(), make().decoder(z)) is None
    assert all(site.fused == 1 for site in elementwise(handle))


# -- who else is called ------------------------------------------------------------------------------------------------

SUBMODULES = (
    "mid_block", "mid_block.resnets.0", "mid_block.resnets.0.norm1", "mid_block.resnets.0.conv1",
    "mid_block.resnets.0.conv2.conv", "mid_block.resnets.0.nonlinearity", "mid_block.resnets.0.dropout", "up_blocks.1",
    "up_blocks.0.upsamplers.0", "up_blocks.0.upsamplers.0.conv", "up_blocks.1.resnets.0.norm2", "norm_out", "conv_act",
    "conv_out", "conv_out.conv",
)  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SUBMODULES)
def test_a_hook_on_a_module_that_is_left_out_is_called(name):
    vae, stock = make(), make()
    handle = bitfuse.accelerate(vae)
    expected = decoded(stock)

    def change(module, args, out):
        return out + 1

    hooks = [v.decoder.get_submodule(name).register_forward_hook(change) for v in (stock, vae)]
    changed = decoded(stock)
    assert bitfuse.compare(changed, decoded(vae)) is None
    assert bitfuse.compare(expected, changed) is not None
    assert_stock(handle, name, "a hook is attached to")
    for hook in hooks:
        hook.remove()
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert all(site.fused == 1 for site in elementwise(handle))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["", "decoder", "decoder.conv_in", "decoder.conv_in.conv", "decoder.time_embedder"])
def test_a_hook_on_a_module_that_is_called_does_no_harm(name):
    vae, stock = make("timestep"), make("timestep")
    handle, calls = bitfuse.accelerate(vae), []
    for v in (stock, vae):
        v.get_submodule(name).register_forward_pre_hook(lambda module, args: calls.append(type(module)))
        v.get_submodule(name).register_forward_hook(
            lambda module, args, out: out * 2 if isinstance(out, Tensor) else out
        )
    expected, of_stock = decoded(stock), len(calls)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert len(calls) == 2 * of_stock
    assert_fused(handle)


@pytest.mark.usefixtures("quick")
def test_what_conv_in_gives_in_another_layout_by_a_hook_is_seen():
    vae, stock = make(), make()
    handle = bitfuse.accelerate(vae)
    for v in (stock, vae):
        v.decoder.conv_in.register_forward_hook(lambda module, args, out: out.contiguous(memory_format=CHANNELS_LAST))
    assert bitfuse.compare(decoded(stock), decoded(vae)) is None
    assert_stock(handle, "conv_in gave a volume with strides")


@pytest.mark.usefixtures("quick")
def test_a_hook_on_every_module_is_called():
    vae = make()
    expected = decoded(vae)
    handle, seen = bitfuse.accelerate(vae), []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        assert bitfuse.compare(expected, decoded(vae)) is None
    assert vae.decoder.norm_out in seen
    assert not any(site.fused for site in sites(handle))


REPLACED = {
    "PerChannelRMSNorm.forward": (upstream.PerChannelRMSNorm, "forward"),
    "LTX2VideoCausalConv3d.forward": (upstream.LTX2VideoCausalConv3d, "forward"),
    "LTX2VideoUpsampler3d.forward": (upstream.LTX2VideoUpsampler3d, "forward"),
    "LTX2VideoResnetBlock3d.forward": (upstream.LTX2VideoResnetBlock3d, "forward"),
    "torch.nn.functional.silu": (F, "silu"),
    "torch.nn.functional.pad": (F, "pad"),
    "torch.nn.functional.conv3d": (F, "conv3d"),
    "torch.nn.functional.dropout": (F, "dropout"),
    "torch.nn.SiLU.forward": (torch.nn.SiLU, "forward"),
    "torch.nn.Dropout.forward": (torch.nn.Dropout, "forward"),
    "torch.nn.Conv3d.forward": (torch.nn.Conv3d, "forward"),
    "torch.nn.Conv3d._conv_forward": (torch.nn.Conv3d, "_conv_forward"),
    "torch.Tensor.__pow__": (Tensor, "__pow__"),
    "torch.Tensor.__truediv__": (Tensor, "__truediv__"),
    "torch.mean": (torch, "mean"),
    "torch.sqrt": (torch, "sqrt"),
    "torch.concatenate": (torch, "concatenate"),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", REPLACED)
def test_a_function_that_is_replaced_between_two_calls_is_called(name, monkeypatch):
    owner, attribute = REPLACED[name]
    vae, right, calls = make(), getattr(owner, attribute), []
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)

    def wrong(*args, **kwargs):
        calls.append(attribute)
        return right(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, wrong)
        assert bitfuse.compare(expected, decoded(vae)) is None
    assert calls
    assert_stock(handle, f"{name} was replaced")
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert all(site.fused == 1 for site in elementwise(handle))


class Norm(upstream.PerChannelRMSNorm):
    def forward(self, x, channel_dim=None):
        return super().forward(x, channel_dim) * 2


def instances_forward(vae):
    norm = vae.decoder.norm_out
    norm.forward = lambda x: type(norm).forward(norm, x) * 2


def another_resnet(vae):
    block = vae.decoder.up_blocks[0]
    block.resnets.append(copy.deepcopy(block.resnets[0]))


def another_upsampler(vae):
    upsamplers = vae.decoder.up_blocks[1].upsamplers
    upsamplers.append(copy.deepcopy(upsamplers[0]))
    upsamplers[1].residual = False
    upsamplers[1].conv = upstream.LTX2VideoCausalConv3d(8, 64, spatial_padding_mode="reflect").to(BF16)
    torch.nn.init.constant_(upsamplers[1].conv.conv.weight, 0.01)
    torch.nn.init.constant_(upsamplers[1].conv.conv.bias, 0.1)


def fewer_resnets(vae):
    del vae.decoder.up_blocks[0].resnets[0]


CHANGED = {  # (what is done to the decoder, what the reason says; None: it is still fused)
    "a norm of a derived class": (lambda vae: setattr(vae.decoder.mid_block.resnets[0], "norm1", Norm()), "Norm, not"),
    "a norm with a forward of its own": (instances_forward, "a hook is attached to norm_out"),
    "a norm over frames": (lambda vae: setattr(vae.decoder.norm_out, "channel_dim", 2), "over dimension 2"),
    "another activation": (lambda vae: setattr(vae.decoder, "conv_act", torch.nn.GELU()), "GELU, not"),
    "another padding": (
        lambda vae: setattr(vae.decoder.conv_out.conv, "padding_mode", "replicate"), "pads with 'replicate'"),
    "no resnets": (lambda vae: setattr(vae.decoder.up_blocks[0], "resnets", torch.nn.ModuleList()), "has no resnets"),
    "one resnet more": (another_resnet, "came into the decoder after that was accelerated"),
    "one resnet less": (fewer_resnets, None),
    "another eps": (lambda vae: setattr(vae.decoder.norm_out, "eps", 0.25), None),
    "an eps of 0": (lambda vae: setattr(vae.decoder.norm_out, "eps", 0.0), None),
    "causal no more": (lambda vae: setattr(vae.decoder, "is_causal", False), None),
    "a convolution without bias": (lambda vae: setattr(vae.decoder.conv_out.conv, "bias", None), None),
    "weights written to": (lambda vae: vae.decoder.conv_out.conv.weight.data.mul_(2), None),
    "other weights": (lambda vae: setattr(
        vae.decoder.conv_out.conv, "weight", torch.nn.Parameter(vae.decoder.conv_out.conv.weight * 2)), None),
}  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("what", CHANGED)
def test_a_decoder_that_is_changed_between_two_calls(what):
    change, told = CHANGED[what]
    vae, stock = make(), make()
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(decoded(stock), decoded(vae)) is None
    before = {site.name: site.fused for site in elementwise(handle)}
    for v in (stock, vae):
        change(v)
    assert bitfuse.compare(decoded(stock), decoded(vae)) is None
    if told is None:
        assert reasons(handle) <= {ON_CPU, "PyTorch adds a number here neither as fp32 nor rounded to bf16"}
        assert sum(site.fused for site in elementwise(handle)) > sum(before.values())
    else:
        assert {site.name: site.fused for site in elementwise(handle)} == before
        assert any(told in reason for reason in reasons(handle)), reasons(handle)


@pytest.mark.usefixtures("quick")
def test_two_upsamplers_in_a_row_stay_stock():
    """Between them is no resnet, so no residual is left to be added."""
    vae, stock = make(), make()
    handle = bitfuse.accelerate(vae)
    for v in (stock, vae):
        another_upsampler(v)
    assert bitfuse.compare(decoded(stock), decoded(vae)) is None
    assert_stock(handle, "has 2 upsamplers, one after the other")


@pytest.mark.usefixtures("quick")
def test_a_derived_decoder_with_a_forward_of_its_own_is_left_alone():
    class Decoder(upstream.LTX2VideoDecoder3d):
        def forward(self, hidden_states, temb=None, causal=None):
            return super().forward(hidden_states, temb, causal) * 2

    vae = make()
    vae.decoder.__class__ = Decoder
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert {site.state for site in sites(handle)} == {"left alone"}
    assert "not diffusers' own" in str(handle.report())


@pytest.mark.usefixtures("quick")
def test_training_with_dropout_and_gradients_stay_stock():
    vae = make()
    handle = bitfuse.accelerate(vae)
    vae.train()
    expected = decoded(make())
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert_fused(handle)
    for resnet in vae.decoder.mid_block.resnets:
        resnet.dropout.p = 0.5
    stock = make().train()
    for resnet in stock.decoder.mid_block.resnets:
        resnet.dropout.p = 0.5
    assert bitfuse.compare(decoded(stock), decoded(vae)) is None
    assert any("in training mode, with dropout" in reason for reason in reasons(handle))
    vae.eval()
    grads = []
    for v in (make(), vae):
        out = v.decode(latents(), return_dict=False)[0]
        out.float().square().mean().backward()
        grads.append((out.detach(), *(p.grad for p in v.decoder.parameters())))
    assert bitfuse.compare(*grads) is None
    assert any("a gradient is required" in reason for reason in reasons(handle))


# -- memory, threads, interrupts ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_where_memory_runs_out_the_hosts_own_decoder_runs(monkeypatch):
    vae, calls = make(), []
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)
    call = Site.call

    def out_of_memory(site, operator, *args):
        calls.append(site.name)
        if site.name == "decoder.up_blocks.1.upsamplers.0.pad":
            raise torch.OutOfMemoryError("no memory is left")
        return call(site, operator, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "call", out_of_memory)
        assert bitfuse.compare(expected, decoded(vae)) is None
    assert "decoder.norm_out" not in calls
    assert "the device ran out of memory in the fused decoder" in reasons(handle)
    before = {site.name: site.fused for site in elementwise(handle)}
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert all(site.fused == before[site.name] + 1 for site in elementwise(handle)), "the next decode is fused again"


@pytest.mark.usefixtures("quick")
def test_where_memory_runs_out_after_noise_was_drawn_it_is_drawn_again(monkeypatch):
    vae, other = make("noise"), latents(frames=1)
    expected = decoded(vae)
    after = torch.get_rng_state()
    handle = bitfuse.accelerate(vae)
    call = Site.call

    def out_of_memory(site, operator, *args):
        if site.name == "decoder.norm_out":
            raise torch.OutOfMemoryError("no memory is left")
        return call(site, operator, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "call", out_of_memory)
        assert bitfuse.compare(expected, decoded(vae)) is None
    assert torch.equal(after, torch.get_rng_state())
    assert "the device ran out of memory in the fused decoder" in reasons(handle)
    decoded(vae, other)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_a_decode_leaves_nothing_behind(error, monkeypatch):
    vae = make()
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)
    call, state = Site.call, {}

    def interrupted(site, operator, *args):
        if site.name == state.get("at"):
            raise error
        return call(site, operator, *args)

    monkeypatch.setattr(Site, "call", interrupted)
    for site in sites(handle)[::5]:
        state["at"] = site.name
        with pytest.raises(error):
            decoded(vae)
        state.clear()
        assert bitfuse.compare(expected, decoded(vae)) is None
    assert handle.restore() is None
    assert "forward" not in vae.decoder.__dict__
    assert bitfuse.compare(expected, decoded(vae)) is None


@pytest.mark.usefixtures("quick")
def test_several_threads_decode_with_one_decoder():
    vae = make()
    sizes = [(1, 2, 3), (2, 3, 2), (3, 2, 2), (1, 4, 4)]
    volumes = [latents(1, *size) for size in sizes]

    def decode(z: Tensor) -> Tensor:  # no seed: it is the process's
        with torch.no_grad():
            return vae.decode(z, return_dict=False)[0].clone()

    expected = [decode(z) for z in volumes]
    handle = bitfuse.accelerate(vae)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decode, volumes * 3))
    assert [bitfuse.compare(a, b) for a, b in zip(expected * 3, found, strict=True)] == [None] * 12
    assert all(site.fused == 12 for site in elementwise(handle))


@pytest.mark.usefixtures("quick")
def test_nothing_of_a_decode_is_kept():
    """No volume outlives its decode, and none of the caller's tensors is written to."""
    vae, z = make(), latents()
    bitfuse.accelerate(vae)
    before, weights = z.clone(), [p.clone() for p in vae.parameters()]
    decoded(vae, z)
    gc.collect()
    held = {id(t) for t in gc.get_objects() if isinstance(t, Tensor)}
    out = decoded(vae, z)
    del out
    gc.collect()
    kept = [t for t in gc.get_objects() if isinstance(t, Tensor) and id(t) not in held and t is not before]
    assert [tuple(t.shape) for t in kept if t.ndim == 5] == []
    assert bitfuse.compare(before, z) is None
    assert all(bitfuse.compare(a, b.detach()) is None for a, b in zip(weights, vae.parameters(), strict=True))


# -- what is the host's own next time, and until when --------------------------------------------------------------


def refused(vae) -> list[str]:
    return [refusal.reason for refusal in ours_in(vae.decoder).refused.values()]


def count(handle) -> int:
    return sum(site.fused for site in elementwise(handle))


class Kept(Tensor):
    """A tensor of somebody's own, whose results are of its class."""


def own_table(vae):
    resnet = vae.decoder.mid_block.resnets[0]
    table = resnet._parameters.pop("scale_shift_table")
    resnet.table, resnet.scale_shift_table = table, table.detach().as_subclass(Kept)


def plain_table(vae):
    resnet = vae.decoder.mid_block.resnets[0]
    del resnet.scale_shift_table
    resnet.scale_shift_table = resnet.table


def another_eps(vae):
    vae.decoder.norm_out.eps = torch.tensor(1e-6)


def own_eps(vae):
    vae.decoder.norm_out.eps = vae.decoder.mid_block.resnets[0].norm1.eps


def hook(vae):
    embedder = vae.decoder.mid_block.time_embedder
    embedder.found = embedder.register_forward_hook(lambda module, args, out: out.as_subclass(Kept))


def no_hook(vae):
    vae.decoder.mid_block.time_embedder.found.remove()


STANDING = {"a table": (own_table, plain_table), "an eps": (another_eps, own_eps), "a hook": (hook, no_hook)}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("what", STANDING)
def test_a_size_is_looked_at_again_when_what_it_hung_on_has_changed(what):
    """And not before: each look is a decode that is slower than the host's own."""
    change, undo = STANDING[what]
    vae, stock = make("timestep"), make("timestep")
    handle = bitfuse.accelerate(vae)
    right = decoded(stock)
    for v in (stock, vae):
        change(v)
    expected = decoded(stock)
    assert bitfuse.compare(expected, decoded(vae)) is None
    (reason,) = refused(vae)
    before = count(handle)
    for _ in range(3):
        assert bitfuse.compare(expected, decoded(vae)) is None
    assert count(handle) == before, reason
    other = latents(frames=1)
    assert bitfuse.compare(decoded(stock, other), decoded(vae, other)) is None
    assert len(refused(vae)) == 2, "each size by itself"
    undo(vae)
    undo(stock)
    before = count(handle)
    assert bitfuse.compare(right, decoded(vae)) is None
    assert count(handle) == before + len(elementwise(handle)), reasons(handle)
    assert len(refused(vae)) == 1


@pytest.mark.usefixtures("fresh_routes", "quick")
def test_a_size_is_looked_at_again_after_an_error_of_the_moment(monkeypatch):
    vae = make()
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)
    with monkeypatch.context() as patch:
        no_memory = proof.Verdict(False, "the device ran out of memory while it was being proved", final=False)
        patch.setattr(proof, "run_battery", lambda *args: no_memory)
        assert bitfuse.compare(expected, decoded(vae)) is None
    assert count(handle) == 0
    assert "the device ran out of memory" in refused(vae)[0]
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert count(handle) == len(elementwise(handle))
    assert refused(vae) == []


@pytest.mark.usefixtures("fresh_routes", "quick")
def test_errors_of_the_moment_that_go_on_are_tried_ever_more_seldom(monkeypatch):
    vae, now = make(), [0.0]
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)
    no_memory = proof.Verdict(False, "the device ran out of memory while it was being proved", final=False)
    monkeypatch.setattr(proof, "run_battery", lambda *args: no_memory)
    monkeypatch.setattr("bitfuse.hosts.video_coder.time.perf_counter", lambda: now.append(now[-1] + 2) or now[-1])
    monkeypatch.setattr(type(ours_in(vae.decoder)), "coded", wrapped := counted(type(ours_in(vae.decoder)).coded))
    for _ in range(4):
        assert bitfuse.compare(expected, decoded(vae)) is None
    assert wrapped.calls == 1, "2 seconds were lost, so 40 pass before it is tried again"
    assert any("partly fused" in reason for reason in reasons(handle))


def counted(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        wrapped.calls += 1
        return function(*args, **kwargs)

    wrapped.calls = 0
    return wrapped


@pytest.mark.usefixtures("quick")
def test_what_falls_in_one_thread_refuses_no_size_of_another(monkeypatch):
    """Both decode at the same time; the operators of one size alone fall."""
    vae = make()
    small, large = latents(frames=1), latents(frames=3)
    vae_call, barrier = Site.call, threading.Barrier(2)
    expected = [decoded(vae, z) for z in (small, large)]
    bitfuse.accelerate(vae)

    def call(site, operator, *args):
        if site.name == "decoder.norm_out":
            barrier.wait()
            if args[0].shape[2] < 9:
                site.fall("of the small one")
        return vae_call(site, operator, *args)

    monkeypatch.setattr(Site, "call", call)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda z: decoded(vae, z), (small, large)))
    assert [bitfuse.compare(a, b) for a, b in zip(expected, found, strict=True)] == [None, None]
    assert list(ours_in(vae.decoder).refused) == [small.shape]


# -- accelerate, restore, copies ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(layers=1)


@pytest.mark.usefixtures("quick")
def test_a_pipeline_is_taken_over_with_its_decoder(pipe):
    z = latents(frames=1, height=2, width=2)
    expected = decoded(pipe.vae, z)
    with bitfuse.accelerated(pipe) as handle:
        names = {site.name.partition(".")[0] for site in handle.sites}
        assert {"decoder", "encoder", "transformer_blocks"} <= names
        assert ours_in(pipe.vae.decoder) is not None
        assert bitfuse.compare(expected, decoded(pipe.vae, z)) is None
        assert all(site.fused for site in elementwise(handle) if site.name.startswith("decoder."))
        with pytest.raises(ValueError, match="accelerated already"):
            bitfuse.accelerate(pipe.vae, strict=True)
    assert ours_in(pipe.vae.decoder) is None
    assert "forward" not in pipe.vae.decoder.__dict__
    assert bitfuse.compare(expected, decoded(pipe.vae, z)) is None


@pytest.mark.usefixtures("quick")
def test_a_part_of_a_pipeline_first_then_the_rest(pipe):
    alone = bitfuse.accelerate(pipe.vae)
    with pytest.raises(ValueError, match="a part of target is accelerated already"):
        bitfuse.accelerate(pipe)
    other = bitfuse.accelerate(pipe.transformer)
    for handle in (alone, other):  # in the order in which they were made
        handle.restore()
    assert not any("forward" in module.__dict__ for part in (pipe.vae, pipe.transformer) for module in part.modules())


@pytest.mark.usefixtures("quick")
def test_restore_leaves_nothing_in_any_order():
    vae = make()
    expected, before = decoded(vae), [set(vars(module)) for module in vae.modules()]
    for _ in range(2):
        first = bitfuse.accelerate(vae)
        assert bitfuse.accelerate(vae) is first
        hook = vae.decoder.register_forward_hook(lambda *_: None)
        first.restore()
        first.restore()
        hook.remove()
        assert [set(vars(module)) for module in vae.modules()] == before
        assert bitfuse.compare(expected, decoded(vae)) is None
    with bitfuse.accelerated(vae) as outer:
        with bitfuse.accelerated(vae) as inner:
            assert inner is outer
        assert ours_in(vae.decoder) is not None
    assert [set(vars(module)) for module in vae.modules()] == before


@pytest.mark.usefixtures("quick")
def test_a_model_that_is_restored_while_it_decodes_ends_right(monkeypatch):
    vae = make()
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)
    call = Site.call

    def restoring(site, operator, *args):
        if site.name.endswith("upsamplers.0.pad"):
            handle.restore()
        return call(site, operator, *args)

    monkeypatch.setattr(Site, "call", restoring)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert "forward" not in vae.decoder.__dict__


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda vae: pickle.loads(pickle.dumps(vae))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_is_stocks(copied):
    vae = make()
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)
    other = copied(vae)
    if copied is not copy.copy:  # which shares the decoder itself
        assert "forward" not in other.decoder.__dict__
    assert bitfuse.compare(expected, decoded(other)) is None
    assert bitfuse.compare(expected, decoded(vae)) is None
    handle.restore()
    assert bitfuse.compare(expected, decoded(other)) is None


@pytest.mark.usefixtures("quick")
def test_a_decoder_that_is_moved_to_another_autoencoder_stays_right():
    vae, other = make(), make()
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)
    other.decoder = vae.decoder
    assert bitfuse.compare(expected, decoded(other)) is None
    vae.decoder = make().decoder
    assert bitfuse.compare(expected, decoded(vae)) is None
    handle.restore()
    assert "forward" not in other.decoder.__dict__


@pytest.mark.usefixtures("quick")
def test_switched_off_it_is_stock():
    vae = make()
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)
    bitfuse.disable()
    try:
        assert bitfuse.compare(expected, decoded(vae)) is None
    finally:
        bitfuse.enable()
    assert_stock(handle, "bitfuse is off")
    handle.restore()
    with bitfuse.accelerated(vae, strict=True):
        bitfuse.disable()
        try:
            with pytest.raises(bitfuse.NotFused, match=r"decoder\.mid_block\.resnets\.0\.norm1: bitfuse is off"):
                decoded(vae)
        finally:
            bitfuse.enable()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("order", ["compiled first", "accelerated first"])
@pytest.mark.parametrize("way", ["module", "call"])
def test_torch_compile_gets_the_chain_itself(order, way):
    torch.compiler.reset()
    vae, stock, graphs = make(), make(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def compiled(v):
        if way == "call":
            v.decoder.compile(backend=backend)
        else:
            v.decoder = torch.compile(v.decoder, backend=backend)  # a module around it

    compiled(stock)
    expected, of_stock = decoded(stock), len(graphs)
    torch.compiler.reset()
    if order == "compiled first":
        compiled(vae)
        handle = bitfuse.accelerate(vae)
    else:
        handle = bitfuse.accelerate(vae)
        compiled(vae)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert len(graphs) == 2 * of_stock, "no graph break more"
    report = handle.report()
    assert not any(site.fused for site in report.sites)
    assert "torch.compile has compiled" in str(report)
    handle.restore()
    torch.compiler.reset()
