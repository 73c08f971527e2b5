"""The video encoder of diffusers' LTX-2: the host's bits, whatever it is called with and whoever listens.

What decoder and encoder share (`hosts/video_coder.py`) is held by `test_vae.py`, too.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle

import pytest
import torch
from torch import Tensor

import bitfuse
import tiny
from bitfuse import OPERATORS
from bitfuse.core import proof
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Operator
from bitfuse.hosts.rehearsal import Rehearsal
from bitfuse.hosts.site import Site
from bitfuse.run.swap import ours_in

diffusers = pytest.importorskip("diffusers", minversion="0.38")
upstream = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_ltx2")

from test_vae import BF16, CHANNELS_LAST, assert_fused, decoded, elementwise, latents, reasons, sites, spread  # noqa: E402
from test_vae import make as make_vae  # noqa: E402
from test_vae_tools import kernel_of, one_bit_off  # noqa: E402

ZEROS_NOT_CAUSAL, REFLECT = "not causal", "mirrored at the edges"
CONFIGS = {  # the residuals of downsamplers are means of 2, 1, 4 and 4 channels, in LTX-2.3 of 2, 1, 4 and 8: as real
    "2.0": {"block_out_channels": (32, 64, 128, 256), "layers_per_block": (2, 1, 1, 1, 1)},
    "2.3": {"block_out_channels": (32, 64, 128, 128), "layers_per_block": (1, 2, 1, 1, 2)},
    ZEROS_NOT_CAUSAL: {"block_out_channels": (32, 64, 128, 256), "encoder_causal": False},
    REFLECT: {"block_out_channels": (32, 64, 128, 256), "encoder_spatial_padding_mode": "reflect"},
}
# a video of so few pixels has one in the end, which can't be mirrored
SIDES = {REFLECT: (64, 64)}


def make(config: str = "2.0", dtype: torch.dtype = BF16, **more):
    compression = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    return make_vae("2.0", dtype, **{**CONFIGS[config], **compression, **more})


def video(batch: int = 1, frames: int = 9, height: int = 32, width: int = 64, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(7)).to(dtype)


def downsample_one_bit_off(monkeypatch) -> None:
    """From now on, until the test ends, this operator's kernel is wrong in one bit."""
    runner = Operator._runner

    def other(operator, plan, args):
        run = runner(operator, plan, args)
        return run if operator.name != "downsample" else lambda *given: one_bit_off(run(*given))

    monkeypatch.setattr(Operator, "_runner", other)
    OPERATORS["downsample"].forget()


def encoded(vae, x: Tensor | None = None, **more) -> Tensor:
    with torch.no_grad():
        (posterior,) = vae.encode(video() if x is None else x, return_dict=False, **more)
        return posterior.parameters.clone()


def all_fused(handle) -> None:
    assert_fused(handle, "encoder")


def all_stock(handle, *told: str) -> None:
    """No site of the encoder was fused, and the one reason has all that is told in it."""
    assert not any(site.fused for site in sites(handle, "encoder"))
    (reason,) = {reason for site in sites(handle, "encoder") for reason in site.reasons}
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
def test_an_encode_whose_kernels_are_proved_has_every_bit(config):
    check_encode(config, batch=1, frames=9)


@pytest.mark.usefixtures("unproved")
@pytest.mark.parametrize(("batch", "frames"), [(1, 1), (2, 9)], ids=["an image", "two videos"])
@pytest.mark.parametrize("config", CONFIGS)
def test_an_encode_has_every_bit_and_every_site_is_fused(config, batch, frames):
    check_encode(config, batch, frames)


def check_encode(config: str, batch: int, frames: int) -> None:
    vae, x = make(config), video(batch, frames, *SIDES.get(config, (32, 64)))
    expected = encoded(vae, x)
    handle = bitfuse.accelerate(vae)
    found = encoded(vae, x)
    assert bitfuse.compare(expected, found) is None
    assert found.stride() == expected.stride()
    all_fused(handle)
    handle.restore()
    assert bitfuse.compare(expected, encoded(vae, x)) is None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("config", CONFIGS)
def test_the_references_are_the_hosts_own_chain(config):
    """With other sides, batches, one frame, and `causal` said by the caller: what the kernels are proved against."""
    vae = make(config)
    calls = [
        (video(batch=2, frames=17, height=64, width=96), {}),
        (video(frames=1, height=64, width=64), {}),
        (video(height=64), {"causal": True}),
        (video(height=64), {"causal": False}),
    ]
    expected = [encoded(vae, x, **more) for x, more in calls]
    handle = bitfuse.accelerate(vae)
    for (x, more), right in zip(calls, expected, strict=True):
        assert bitfuse.compare(right, encoded(vae, x, **more)) is None
    all_fused(handle)


@pytest.mark.usefixtures("quick")
def test_what_an_encode_gives_besides_is_the_hosts():
    vae, x = make(), video(height=64)

    def found():
        with torch.no_grad():
            posterior = vae.encode(x).latent_dist
            return posterior.mode(), posterior.sample(torch.Generator().manual_seed(3)), vae(x).sample

    expected = [t.clone() for t in found()]
    handle = bitfuse.accelerate(vae)
    assert [bitfuse.compare(a, b) for a, b in zip(expected, found(), strict=True)] == [None] * 3
    all_fused(handle)
    assert_fused(handle)


@pytest.mark.usefixtures("quick")
def test_the_sites_are_named_by_the_modules_and_counted():
    vae = make()
    handle = bitfuse.accelerate(vae)
    encoded(vae)
    ours = sites(handle, "encoder")
    names = [site.name for site in ours]
    assert len(set(names)) == len(names)
    assert names[:3] == [f"encoder.down_blocks.0.resnets.0.{part}" for part in ("norm1", "conv1", "norm2")]
    first = "encoder.down_blocks.0.downsamplers.0"
    assert [f"{first}.pad", f"{first}.conv", f"{first}.downsample"] == names[8:11]
    assert names[-2:] == ["encoder.norm_out", "encoder.conv_out"]
    assert {site.fused + sum(site.fallen.values()) for site in ours} == {1}
    assert {site.state for site in sites(handle)} == {"not called yet"}
    operators = {site.name: site.operator for site in ours}
    for name, operator in operators.items():
        assert operator == "convolution" or operator in bitfuse.OPERATORS, name
    seen = []
    for site in ours:
        site.observers = (lambda s, op, *_: seen.append((s.operator, op.name)),)
    encoded(vae)
    assert seen == [(operator, operator) for operator in operators.values()], "each calls what it is counted for"


@pytest.mark.usefixtures("quick")
def test_a_decode_does_not_count_for_the_encoder_nor_the_other_way_round():
    vae = make()
    handle = bitfuse.accelerate(vae)
    decoded(vae, latents())
    assert {site.state for site in sites(handle, "encoder")} == {"not called yet"}
    all_decoded = [site.fused for site in sites(handle)]
    encoded(vae)
    assert [site.fused for site in sites(handle)] == all_decoded
    all_fused(handle)


# -- how the host cuts it up -------------------------------------------------------------------------------------------


def tiled(vae):
    vae.enable_tiling(
        tile_sample_min_height=96, tile_sample_min_width=96, tile_sample_stride_height=64, tile_sample_stride_width=64
    )


def sliced(vae):
    vae.use_slicing = True


def framewise(vae):
    vae.use_framewise_encoding = vae.use_framewise_decoding = True  # diffusers 0.42.1 asks for the latter here, too
    vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames = 16, 8


CUT = {
    "tiles": tiled,
    "slices": sliced,
    "frames": framewise,
    "tiles of frames": lambda vae: (framewise(vae), tiled(vae)),
}


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.usefixtures("quick")
def test_tiles_slices_and_frames_are_the_hosts(cut):
    vae, x = make(), video(batch=2, frames=25, height=128, width=160)
    whole = encoded(vae, x)
    CUT[cut](vae)
    expected = encoded(vae, x)
    assert expected.shape == whole.shape
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, encoded(vae, x)) is None
    all_fused(handle)
    assert all(site.fused > 1 for site in elementwise(handle, "encoder")), "it was cut up"


@pytest.mark.usefixtures("quick")
def test_tiles_that_are_changed_between_two_calls():
    """Of sides and overlaps that tile a video unevenly; slices and frames come and go, too."""
    stock, vae, x = make(), make(), video(batch=2, frames=17, height=160, width=192)
    handle = bitfuse.accelerate(vae)
    settings = [(96, 64, False), (128, 96, True), (64, 32, True), (160, 96, False)]
    for number, (side, stride, by_frames) in enumerate(settings):
        for v in (stock, vae):
            v.enable_tiling(side, side, 16, stride, stride, 8)
            v.use_slicing = number % 2 == 0
            v.use_framewise_encoding = v.use_framewise_decoding = by_frames
        assert bitfuse.compare(encoded(stock, x), encoded(vae, x)) is None
    all_fused(handle)


# -- what it may be called with ----------------------------------------------------------------------------------------

VIDEOS = {
    "height and width exchanged in memory": lambda x: spread(x, 0, 1, 2, 4, 3),
    "frames first in memory": lambda x: spread(x, 2, 0, 1, 3, 4),
    "every other pixel of a larger one": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "one frame for all": lambda x: x[:, :, :1].expand(-1, -1, 9, -1, -1),
    "one sample for both": lambda x: x[:1].expand(2, -1, -1, -1, -1),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "two samples": lambda x: torch.cat([x, -x]),
    "in channels_last_3d": lambda x: x.contiguous(memory_format=CHANNELS_LAST),
    "an image as pipelines give it": lambda x: x[:, :, 0].unsqueeze(2),
    "special values": lambda x: x.masked_fill(x > 1.5, float("nan")).masked_fill(x < -1.5, float("inf")),
    "zeros": torch.zeros_like,
    "negative zeros": lambda x: torch.full_like(x, -0.0),
    "the largest": lambda x: x.sign() * torch.finfo(BF16).max,
    "subnormals": lambda x: x * 2.0**-126,
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", VIDEOS)
def test_videos_of_any_kind_are_fused(kind):
    vae, x = make(), VIDEOS[kind](video())
    expected = encoded(vae, x)
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, encoded(vae, x)) is None
    all_fused(handle)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_another_dtype_stays_stock(dtype):
    vae, x = make(dtype=dtype), video(dtype=dtype)
    expected = encoded(vae, x)
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, encoded(vae, x)) is None
    all_stock(handle, str(dtype), "accepted: a plain tensor of torch.bfloat16")


@pytest.mark.usefixtures("quick")
def test_a_wrong_call_raises_what_stock_raises():
    """Among them videos that can't be halved as often as the encoder halves them."""
    vae = make()
    handle = bitfuse.accelerate(vae)
    encoder = vae.encoder
    of_wrong_sides = video(frames=10), video(frames=3), video(height=48), video(width=33)
    for x in (*of_wrong_sides, video()[0], video()[:, :2], None, "x"):
        found = []
        for forward in (functools.partial(type(encoder).forward, encoder), encoder):
            with torch.no_grad(), pytest.raises(Exception) as raised:  # noqa: PT011
                forward(x)
            found.append((raised.type, str(raised.value)))
        assert found[0] == found[1]
    handle.restore()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("coder", ["encoder", "decoder"])
def test_what_is_too_small_to_be_mirrored_raises_what_stock_raises(coder):
    """That an operator's shapes don't fit is known where it is called, in the midst of a forward."""
    vae = make(REFLECT)
    handle = bitfuse.accelerate(vae)
    forward, given = getattr(vae, coder), video() if coder == "encoder" else latents(height=1)
    found = []
    for call in (functools.partial(type(forward).forward, forward), forward):
        with torch.no_grad(), pytest.raises(RuntimeError) as raised:
            call(given)
        found.append((raised.type, str(raised.value)))
    assert found[0] == found[1]
    assert "Padding size should be less than" in found[0][1]
    handle.restore()


@pytest.mark.usefixtures("quick")
def test_autocast_and_inference_mode():
    vae, x = make(), video()
    handle = bitfuse.accelerate(vae)
    with torch.autocast("cpu", dtype=BF16):
        assert bitfuse.compare(encoded(make(), x), encoded(vae, x)) is None
    all_stock(handle, "autocast is on")
    with torch.inference_mode():
        assert bitfuse.compare(vae.encoder(x).clone(), make().encoder(x)) is None
    assert all(site.fused == 1 for site in elementwise(handle, "encoder"))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_stocks(checkpointing):
    stock, vae = make(), make()
    handle = bitfuse.accelerate(vae)
    grads = []
    for v in (stock, vae):
        if checkpointing:
            v.enable_gradient_checkpointing()
        out = v.encode(video()).latent_dist.parameters
        out.float().square().mean().backward()
        grads.append((out.detach(), *(p.grad for p in v.encoder.parameters())))
    assert all(bitfuse.compare(a, b) is None for a, b in zip(*grads, strict=True))
    all_stock(handle, "gradient")


# -- who else is called ------------------------------------------------------------------------------------------------

SUBMODULES = (
    "down_blocks.0", "down_blocks.0.resnets.0", "down_blocks.0.resnets.0.norm1", "down_blocks.0.resnets.1.conv1.conv",
    "down_blocks.1.downsamplers.0", "down_blocks.2.downsamplers.0.conv", "down_blocks.3.downsamplers.0.conv.conv",
    "mid_block", "mid_block.resnets.0.nonlinearity", "mid_block.resnets.0.dropout", "norm_out", "conv_act", "conv_out",
)  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SUBMODULES)
def test_a_hook_on_a_module_that_is_left_out_is_called(name):
    vae, stock = make(), make()
    handle = bitfuse.accelerate(vae)
    expected = encoded(stock)

    def change(module, args, out):
        return out + 1

    hooks = [v.encoder.get_submodule(name).register_forward_hook(change) for v in (stock, vae)]
    changed = encoded(stock)
    assert bitfuse.compare(changed, encoded(vae)) is None
    assert bitfuse.compare(expected, changed) is not None
    all_stock(handle, name, "a hook is attached to", "when the encoder is fused")
    for hook in hooks:
        hook.remove()
    assert bitfuse.compare(expected, encoded(vae)) is None
    assert all(site.fused == 1 for site in elementwise(handle, "encoder"))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["", "encoder", "encoder.conv_in", "encoder.conv_in.conv"])
def test_hooks_that_are_called_are_looked_through(name):
    vae, stock = make(), make()
    handle = bitfuse.accelerate(vae)
    seen = []
    for v in (stock, vae):
        v.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(module))
    assert bitfuse.compare(encoded(stock), encoded(vae)) is None
    all_fused(handle)


class Norm(upstream.PerChannelRMSNorm):
    pass


def another_resnet(vae):
    vae.encoder.mid_block.resnets.append(copy.deepcopy(vae.encoder.mid_block.resnets[0]))


def another_downsampler(vae):
    block = vae.encoder.down_blocks[1]
    block.downsamplers.append(copy.deepcopy(vae.encoder.down_blocks[2].downsamplers[0]))


def strided_convolution(vae):
    """What `downsample_type="conv"` has."""
    one = upstream.LTX2VideoCausalConv3d(32, 64, 3, (2, 1, 1)).to(BF16)
    torch.nn.init.constant_(one.conv.weight, 0.01)
    torch.nn.init.constant_(one.conv.bias, 0.1)
    vae.encoder.down_blocks[1].downsamplers[0] = one


def noisy(vae):
    vae.encoder.mid_block.resnets[0].per_channel_scale1 = torch.nn.Parameter(torch.full((256, 1, 1), 0.5, dtype=BF16))


def another_mean(vae):
    """The fused encoder took it to be what the channels make of it, and stock raises an error."""
    vae.encoder.down_blocks[0].downsamplers[0].group_size = 4


def eight_frames_for_one(vae):
    vae.encoder.down_blocks[1].downsamplers[0].stride = (8, 1, 1)


CHANGED = {  # (what is done to the encoder, what the reason says; None: it is still fused)
    "a norm of a derived class": (lambda vae: setattr(vae.encoder.down_blocks[0].resnets[0], "norm1", Norm()), "not"),
    "a norm over frames": (lambda vae: setattr(vae.encoder.norm_out, "channel_dim", 2), "over dimension 2"),
    "another activation": (lambda vae: setattr(vae.encoder, "conv_act", torch.nn.GELU()), "GELU, not"),
    "another padding": (
        lambda vae: setattr(vae.encoder.conv_out.conv, "padding_mode", "replicate"), "pads with 'replicate'"),
    "no resnets": (lambda vae: setattr(vae.encoder.mid_block, "resnets", torch.nn.ModuleList()), "has no resnets"),
    "one resnet more": (another_resnet, "came into the encoder after that was accelerated"),
    "weights in channels_last_3d": (
        lambda vae: vae.encoder.down_blocks[0].to(memory_format=CHANNELS_LAST), "is not contiguous"),
    "a convolution with a stride": (strided_convolution, "LTX2VideoCausalConv3d, not"),
    "another eps": (lambda vae: setattr(vae.encoder.norm_out, "eps", 0.25), None),
    "causal no more": (lambda vae: setattr(vae.encoder, "is_causal", False), None),
    "a convolution without bias": (lambda vae: setattr(vae.encoder.conv_out.conv, "bias", None), None),
    "a downsampler without bias": (
        lambda vae: setattr(vae.encoder.down_blocks[2].downsamplers[0].conv.conv, "bias", None), None),
    "weights written to": (lambda vae: vae.encoder.conv_out.conv.weight.data.mul_(2), None),
}  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("what", CHANGED)
def test_an_encoder_that_is_changed_between_two_calls(what):
    change, told = CHANGED[what]
    stock, vae = make(), make()
    handle = bitfuse.accelerate(vae)
    encoded(vae)
    for v in (stock, vae):
        change(v)
    before = {site.name: site.fused for site in elementwise(handle, "encoder")}
    assert bitfuse.compare(encoded(stock), encoded(vae)) is None
    after = {site.name: site.fused for site in elementwise(handle, "encoder")}
    if told is None:
        assert after == {name: count + 1 for name, count in before.items()}, reasons(handle)
    else:
        assert after == before
        assert any(told in reason for reason in reasons(handle)), reasons(handle)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (another_downsampler, "has 2 downsamplers, one after the other"),
        (eight_frames_for_one, "makes one frame of 8"),
        (another_mean, "has 16 channels, and means of 4 for 8 of them"),
    ],
)
def test_downsamplers_of_another_kind_are_refused_as_stock_refuses_them(change, told):
    stock, vae = make(), make()
    handle = bitfuse.accelerate(vae)
    found = []
    for v in (stock, vae):
        change(v)
        try:
            found.append(encoded(v))
        except RuntimeError as error:
            found.append(str(error))
    assert found[0] == found[1] if isinstance(found[0], str) else bitfuse.compare(*found) is None
    assert any(told in reason for reason in reasons(handle)), reasons(handle)


@pytest.mark.usefixtures("quick")
def test_noise_that_somebody_injects_is_drawn_as_stock_draws_it():
    stock, vae = make(), make()
    for v in (stock, vae):
        noisy(v)
    handle = bitfuse.accelerate(vae)
    found = []
    for v in (stock, vae):
        torch.manual_seed(11)
        found.append((encoded(v), torch.get_rng_state()))
    assert bitfuse.compare(found[0][0], found[1][0]) is None
    assert torch.equal(found[0][1], found[1][1])
    all_fused(handle)


# -- when an operator can't be fused -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_where_memory_runs_out_the_hosts_own_encoder_runs(monkeypatch):
    vae = make()
    expected = encoded(vae)
    handle = bitfuse.accelerate(vae)
    call = Site.call

    def out_of_memory(site, operator, *args):
        if site.name == "encoder.down_blocks.1.downsamplers.0.downsample":
            raise torch.OutOfMemoryError("no memory is left")
        return call(site, operator, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "call", out_of_memory)
        assert bitfuse.compare(expected, encoded(vae)) is None
    assert "the device ran out of memory in the fused encoder" in reasons(handle)
    before = {site.name: site.fused for site in elementwise(handle, "encoder")}
    assert bitfuse.compare(expected, encoded(vae)) is None
    after = {site.name: site.fused for site in elementwise(handle, "encoder")}
    assert after == {name: count + 1 for name, count in before.items()}, "the next encode is fused again"


@pytest.mark.usefixtures("quick", "fresh_routes")
def test_a_size_of_which_an_operator_differs_is_the_hosts_own_from_then_on(monkeypatch):
    downsample_one_bit_off(monkeypatch)
    vae = make()
    expected = encoded(vae)
    handle = bitfuse.accelerate(vae, audit=1)
    for _ in OPERATORS["downsample"].tiers:  # each is wrong here
        with pytest.warns(bitfuse.BitfuseWarning, match="downsample"):
            encoded(vae)
    for _ in range(2):
        assert bitfuse.compare(expected, encoded(vae)) is None
    assert any("partly fused, the encoder is slower than diffusers' own" in reason for reason in reasons(handle))
    OPERATORS["downsample"].forget()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_an_encode_leaves_nothing_behind(error, monkeypatch):
    vae = make()
    expected = encoded(vae)
    handle = bitfuse.accelerate(vae)
    call, state = Site.call, {}

    def interrupted(site, operator, *args):
        if site.name == state.get("at"):
            raise error
        return call(site, operator, *args)

    monkeypatch.setattr(Site, "call", interrupted)
    for site in sites(handle, "encoder")[::7]:
        state["at"] = site.name
        with pytest.raises(error):
            encoded(vae)
        state.clear()
        assert bitfuse.compare(expected, encoded(vae)) is None
    handle.restore()
    assert "forward" not in vae.encoder.__dict__
    assert bitfuse.compare(expected, encoded(vae)) is None


@pytest.mark.usefixtures("quick")
def test_nothing_of_an_encode_is_kept():
    """No volume outlives its encode, and none of the caller's tensors is written to."""
    vae, x = make(), video()
    bitfuse.accelerate(vae)
    before, weights = x.clone(), [p.clone() for p in vae.parameters()]
    encoded(vae, x)
    gc.collect()
    held = {id(t) for t in gc.get_objects() if isinstance(t, Tensor)}
    out = encoded(vae, x)
    del out
    gc.collect()
    kept = [t for t in gc.get_objects() if isinstance(t, Tensor) and id(t) not in held and t is not before]
    assert [tuple(t.shape) for t in kept if t.ndim == 5] == []
    assert bitfuse.compare(before, x) is None
    assert all(bitfuse.compare(a, b.detach()) is None for a, b in zip(weights, vae.parameters(), strict=True))


# -- accelerate, restore, copies ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline(layers=1)


@pytest.mark.usefixtures("quick")
def test_a_pipeline_is_taken_over_with_its_encoder(pipe):
    x = video(frames=9)
    expected = encoded(pipe.vae, x)
    with bitfuse.accelerated(pipe) as handle:
        assert ours_in(pipe.vae.encoder) is not None
        assert bitfuse.compare(expected, encoded(pipe.vae, x)) is None
        all_fused(handle)
    assert ours_in(pipe.vae.encoder) is None
    assert "forward" not in pipe.vae.encoder.__dict__
    assert bitfuse.compare(expected, encoded(pipe.vae, x)) is None


@pytest.mark.usefixtures("quick", "fresh_routes")  # the transformer runs, too, whose kernels other tests run
@pytest.mark.parametrize("required", [(), ("encoder.*.norm1",)], ids=["", "required"])
def test_a_pipeline_from_image_to_video_encodes_its_image_by_it_where_that_is_asked_for(required, pipe):
    """One image a run is not worth the seconds that its kernels take; a video is, and whoever asks has it."""
    ltx2 = pytest.importorskip("diffusers.pipelines.ltx2")
    image = pytest.importorskip("PIL.Image").effect_noise((64, 64), 80).convert("RGB")
    from_image = ltx2.LTX2ImageToVideoPipeline(**pipe.components)
    from_image.set_progress_bar_config(disable=True)
    call = {**tiny.CALL, **tiny.UNGUIDED, "image": image, "prompt": "a red fox", "output_type": "latent"}
    if "image_crf" in inspect.signature(from_image.__call__).parameters:  # else it wants PyAV
        call["image_crf"] = 0

    def run():
        return from_image(**call, generator=torch.Generator().manual_seed(0), return_dict=False)

    expected = run()
    x = video(frames=9).to(from_image.vae.device)
    of_video = encoded(from_image.vae, x)
    with bitfuse.accelerated(from_image, require=required) as handle:
        found = run()
        ours = elementwise(handle, "encoder")
        if required:
            assert {(site.state, site.fused) for site in ours} == {("fused", 1)}, handle.report()
        else:
            assert {site.state for site in ours} == {"fallen back"}, handle.report()
            assert {"one frame, in a pipeline" in reason for site in ours for reason in site.reasons} == {True}
        assert bitfuse.compare(of_video, encoded(from_image.vae, x)) is None
        assert {site.fused for site in ours} == {1 + bool(required)}
    assert [bitfuse.compare(a, b) for a, b in zip(expected, found, strict=True)] == [None] * 2


@pytest.mark.usefixtures("quick")
def test_restore_leaves_nothing():
    vae = make()
    expected, before = encoded(vae), [set(vars(module)) for module in vae.modules()]
    for _ in range(2):
        handle = bitfuse.accelerate(vae)
        assert bitfuse.accelerate(vae) is handle
        hook = vae.encoder.register_forward_hook(lambda *_: None)
        handle.restore()
        hook.remove()
        assert [set(vars(module)) for module in vae.modules()] == before
        assert bitfuse.compare(expected, encoded(vae)) is None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda vae: pickle.loads(pickle.dumps(vae))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_is_stocks(copied):
    vae = make()
    expected = encoded(vae)
    handle = bitfuse.accelerate(vae)
    other = copied(vae)
    if copied is not copy.copy:  # which shares the encoder itself
        assert "forward" not in other.encoder.__dict__
    assert bitfuse.compare(expected, encoded(other)) is None
    assert bitfuse.compare(expected, encoded(vae)) is None
    handle.restore()
    assert bitfuse.compare(expected, encoded(other)) is None


@pytest.mark.usefixtures("quick")
def test_an_encoder_whose_source_is_not_known_is_left_alone_and_the_decoder_taken_over(monkeypatch):
    from bitfuse.hosts import diffusers_vae as adapter

    monkeypatch.setitem(adapter.READ_OF_ENCODER, "LTX2VideoDownsampler3d.forward", set())
    vae = make()
    expected = encoded(vae)
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, encoded(vae)) is None
    (site,) = sites(handle, "encoder")
    assert site.state == "left alone"
    assert "LTX2VideoDownsampler3d.forward" in site.declined
    decoded(vae)
    assert_fused_without(handle, site.declined)


def assert_fused_without(handle, declined: str) -> None:
    assert {site.state for site in elementwise(handle)} == {"fused"}
    assert declined in reasons(handle)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["concatenate", "conv3d", "LTX2VideoDownsampler3d"])
def test_a_function_that_is_replaced_meanwhile_is_called(name, monkeypatch):
    vae = make()
    expected = encoded(vae)
    handle = bitfuse.accelerate(vae)
    owner, attribute = {
        "concatenate": (torch, "concatenate"),
        "conv3d": (torch.nn.functional, "conv3d"),
        "LTX2VideoDownsampler3d": (upstream.LTX2VideoDownsampler3d, "forward"),
    }[name]
    original, calls = getattr(owner, attribute), []

    def replaced(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, replaced)
        assert bitfuse.compare(expected, encoded(vae)) is None
        assert calls
        all_stock(handle, "was replaced")
    assert bitfuse.compare(expected, encoded(vae)) is None
    assert all(site.fused == 1 for site in elementwise(handle, "encoder"))


@pytest.mark.usefixtures("quick")
def test_torch_compile_gets_the_chain_itself():
    torch.compiler.reset()
    vae, stock, graphs = make(), make(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    stock.encoder.compile(backend=backend)
    expected, of_stock = encoded(stock), len(graphs)
    torch.compiler.reset()
    handle = bitfuse.accelerate(vae)
    vae.encoder.compile(backend=backend)
    assert bitfuse.compare(expected, encoded(vae)) is None
    assert len(graphs) == 2 * of_stock, "no graph break more"
    assert not any(site.fused for site in sites(handle, "encoder"))
    assert "torch.compile has compiled this encoder" in str(handle.report())
    handle.restore()
    torch.compiler.reset()


# -- the tools ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_an_audit_computes_every_fused_call_again():
    vae = make("2.3")
    with bitfuse.accelerated(vae, audit=1) as handle:
        encoded(vae)
        report = handle.report()
        fused = [site for site in sites(handle, "encoder") if site.fused]
        assert (report.auditor.calls, report.auditor.mismatches) == (len(fused), 0)
        assert set(report.auditor.sites) == {site.name for site in fused}


@pytest.mark.usefixtures("quick", "fresh_routes")
def test_a_trace_of_an_encode_is_equal_and_names_a_wrong_kernel(monkeypatch):
    vae = make()

    def traced():
        def encode(x):
            return vae.encode(x, return_dict=False)[0].parameters

        return bitfuse.trace(encode, encode, (video(),), model=vae, around_b=lambda: bitfuse.accelerated(vae))

    assert traced() is None
    downsample_one_bit_off(monkeypatch)
    found = traced()
    assert (found.kind, found.run, found.operator) == ("site", "model_b", "downsample")
    assert found.place == "encoder.down_blocks.0.downsamplers.0.downsample"
    OPERATORS["downsample"].forget()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("config", CONFIGS)
def test_every_kernel_of_a_size_is_compiled_before_its_first_encode(config, monkeypatch, fresh_routes):
    compiled = []
    monkeypatch.setattr(Rehearsal, "compiles", lambda self: True)
    monkeypatch.setattr(Plan, "compile", lambda plan, args: compiled.append(kernel_of(plan.signature(args))))
    vae = make(config)
    sizes = [video(height=64), video(frames=1, height=64)]
    expected = [encoded(vae, x) for x in sizes]
    handle = bitfuse.accelerate(vae)
    for x, right in zip(sizes, expected, strict=True):
        assert bitfuse.compare(right, encoded(vae, x)) is None
        tiers = {name: operator.tiers[0].name for name, operator in OPERATORS.items()}
        proved = {kernel_of(signature) for name, tier, signature in proof.verdicts() if tier == tiers[name]}
        assert set(compiled) == proved
        assert len(compiled) == len(set(compiled)), "each once"
    assert {site.fused for site in elementwise(handle, "encoder")} == {2}, "nothing counts but encodes"
    all_fused(handle)
