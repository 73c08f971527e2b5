"""LTX-2.5's diffusion decoder in diffusers: the same pixels in every bit, sites accounted for, nothing left behind."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bitfuse
from bitfuse.core import conditions
from bitfuse.core.kernel import interpreter
from bitfuse.ops.grid_rotary import QK_RMS_NORM_GRID_ROTARY, qk_rms_norm_grid_rotary
from bitfuse.ops.swiglu import swiglu
from bitfuse.run.swap import Forward

upstream = pytest.importorskip("diffusers.models.autoencoders.ltx2_diffusion_decoder")

from bitfuse.hosts import diffusers_diffusion_decoder as adapter  # noqa: E402 (it needs diffusers)

BF16 = torch.bfloat16
SIZES = {
    "latent_channels": 8,
    "decoder_head_dim": 64,
    "decoder_stage_channels": (256, 128, 128, 128, 128),
    "decoder_stage_depths": (1, 1, 1, 1, 2),
    "decoder_stage_kernels": ((1, 2, 2),) * 4,
    "decoder_upsample_strides": ((1, 2, 2), (2, 1, 1), (1, 1, 1), (1, 1, 1)),
    "decoder_upsample_channel_reductions": (2, 1, 1, 1),
    "decoder_stage5_kernel": (2, 2, 2),
    "decoder_t_emb_dim": 32,
    "patch_size": 2,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
}
STAGES = [f"diffusion_decoder.decoder.det_stages.{stage}.0" for stage in range(4)]
DIFFUSION = [f"diffusion_decoder.decoder.diff_blocks.{index}" for index in range(2)]
NAMES = [f"{block}.{site}" for block in STAGES for site in ("norm2", "attn", "mlp")]
NAMES += [f"{block}.{site}" for block in DIFFUSION for site in ("norm1", "norm2", "attn", "mlp")]


class Everywhere:
    """A processor of somebody's own: every token attends to every other. No FlexAttention, which is slow on a CPU."""

    def __call__(self, attn, hidden_states, block_mask=None):
        heads = (t.flatten(1, 3).swapaxes(1, 2) for t in attn.project_qkv(hidden_states))
        attended = F.scaled_dot_product_attention(*heads, scale=1.0)
        return attn.to_out[0](attended.swapaxes(1, 2).reshape(hidden_states.shape))


def decoder(dtype=BF16, device="cpu", processor=Everywhere, **sizes):
    torch.manual_seed(0)
    model = upstream.LTX2VideoDiffusionDecoderModel(**{**SIZES, **sizes})
    for parameter in model.parameters():  # norms and tables start as ones and zeros, which hide much
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    if processor is not None:
        for module in model.modules():
            if isinstance(module, upstream.LTX2VideoVaeNeighborhoodAttention):
                module.set_processor(processor())
    return model.to(device=device, dtype=dtype).eval()


def latents(model, batch=1, frames=2, height=3, width=4):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 8, frames, height, width, generator=generator).to(next(model.parameters()))


def run(model, z=None, **options):
    z = latents(model) if z is None else z
    generator = torch.Generator(z.device).manual_seed(1)
    with torch.no_grad(), interpreter() if z.device.type == "cpu" else contextlib.nullcontext():
        return model.decode(z, generator=generator, return_dict=False, **options)[0]


def same(expected, found):
    assert bitfuse.compare(expected, found) is None


def states(handle):
    return {site.name: site.state for site in handle.sites}


def site_of(handle, name):
    return next(site for site in handle.sites if site.name == name)


# -- bits --------------------------------------------------------------------------------------------------------------


def test_the_pixels_are_the_same_in_every_bit_and_every_site_is_fused(device):
    model = decoder(device=device)
    stock = run(model)
    assert stock.shape == (1, 3, 3, 12, 16)
    assert not stock.isnan().any()
    assert stock.unique().numel() > 100
    with bitfuse.accelerated(model) as handle:
        same(stock, run(model))
        assert [site.name for site in handle.sites] == NAMES
        assert set(states(handle).values()) == {"fused"}
        assert {site.fused for site in handle.sites} == {1}
        assert "20 of 20 sites fused" in str(handle.report())
    same(stock, run(model))


@pytest.mark.slow
def test_with_flex_attention(device):
    model = decoder(device=device, processor=None)
    stock = run(model)
    with bitfuse.accelerated(model) as handle:
        same(stock, run(model))
        assert set(states(handle).values()) == {"fused"}


@pytest.mark.parametrize("tile", [5, 24, 1000])
def test_feed_forwards_keep_the_hosts_tiles(tile, device, launched_as_reference, monkeypatch):
    """Two samples, of which tiles are slices; the last one is shorter."""
    monkeypatch.setattr(upstream, "_SWIGLU_TILE_SIZE", tile)
    model = decoder(device=device)
    z = latents(model, batch=2)
    stock, calls = run(model, z), []
    model.decoder.diff_blocks[0].mlp.w_down.register_forward_hook(lambda module, args, out: calls.append(args[0].shape))
    run(model, z)
    expected = list(calls)
    calls.clear()
    with bitfuse.accelerated(model) as handle:
        same(stock, run(model, z))
        assert calls == expected
        assert len(calls) == -(-144 // tile)
        assert site_of(handle, f"{DIFFUSION[0]}.mlp").state == "fused"


@pytest.mark.parametrize("held", [False, True])
def test_a_residual_is_added_in_place_where_nobody_else_holds_it(held, device, launched_as_reference, monkeypatch):
    model = decoder(device=device)
    stock, added, kept = run(model), [], []
    add = adapter.SwiGLU.add
    monkeypatch.setattr(adapter.SwiGLU, "add", lambda *args: (added.append(1), add(*args))[1])
    with bitfuse.accelerated(model) as handle:
        if held:
            for site in handle.sites:
                site.observers += (lambda site, operator, route, args, result: kept.append(result),)
        same(stock, run(model))
    assert len(added) == (0 if held else 6)
    assert bool(kept) == held


class Projection(torch.nn.Module):
    """In place of a feed-forward's last layer: it has no weight of its own, and may give another dtype or shape."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x):
        y = self.inner(x)
        if self.how == "fp32":
            return y.float() * 1.0009765
        return y[:, :1] if self.how == "of one token" else y


@pytest.mark.parametrize("how", ["alike", "fp32", "of one token"])
def test_what_a_layer_of_somebodys_own_gives_is_added_as_the_host_adds_it(how, launched_as_reference, monkeypatch):
    """The host puts tiles together, in the dtype and the shape of the tokens, before it adds them."""
    monkeypatch.setattr(upstream, "_SWIGLU_TILE_SIZE", 5)
    model = decoder()
    mlp = model.decoder.diff_blocks[0].mlp
    mlp.w_down = Projection(mlp.w_down, how)
    stock = run(model)
    with bitfuse.accelerated(model):
        same(stock, run(model))


def test_what_a_processor_gives_may_be_one_value_for_many_tokens(launched_as_reference):
    model = decoder()
    for block in (model.decoder.det_stages[0][0], model.decoder.diff_blocks[0]):
        block.attn.set_processor(lambda attn, x, block_mask=None: attn.project_qkv(x)[2].mean(2, True).flatten(4))
    stock = run(model)
    with bitfuse.accelerated(model) as handle:
        same(stock, run(model))
        assert {state for name, state in states(handle).items() if name.endswith("mlp")} == {"fused"}


def test_a_sum_of_another_dtype_is_the_hosts(launched_as_reference):
    """Of few tokens the host makes no tiles, and what the layer gives decides the dtype."""
    model = decoder()
    block = model.decoder.diff_blocks[1]
    block.mlp.w_down = Projection(block.mlp.w_down, "fp32")
    found = []
    block.register_forward_hook(lambda module, args, out: found.append(out) or out.to(BF16))
    stock = run(model)
    with bitfuse.accelerated(model):
        same(stock, run(model))
    assert found[0].dtype == torch.float32
    same(*found)


def test_audits_see_what_the_kernels_gave(device, launched_as_reference):
    model = decoder(device=device)
    stock = run(model)
    with bitfuse.accelerated(model, audit=8) as handle:
        same(stock, run(model))
        same(stock, run(model))
        handle.report()
        assert (handle.auditor.calls, handle.auditor.mismatches) == (5, 0)


def test_tiles_of_a_volume_and_several_steps(device, launched_as_reference):
    model = decoder(device=device)
    z = latents(model, frames=3, height=5, width=5)
    tiling = {"tile_sample_min_height": 12, "tile_sample_stride_height": 8, "tile_sample_min_width": 12}
    tiling |= {"tile_sample_stride_width": 8, "tile_sample_min_num_frames": 4, "tile_sample_stride_num_frames": 2}
    model.enable_tiling(**tiling)
    stock, two = run(model, z), run(model, z, num_inference_steps=2)
    with bitfuse.accelerated(model) as handle:
        same(stock, run(model, z))
        same(two, run(model, z, num_inference_steps=2))
        model.disable_tiling()
        whole = run(model, z)
        assert set(states(handle).values()) == {"fused"}
        assert site_of(handle, NAMES[-1]).fused > 10
    same(run(model, z), whole)


def cast_in_layers(model):
    model.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=BF16, skip_modules_pattern=())


def offloaded_in_leaves(model):
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), "leaf_level")


def offloaded_in_blocks(model):
    hooks = pytest.importorskip("diffusers.hooks")
    hooks.apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), "block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("change", [cast_in_layers, offloaded_in_leaves, offloaded_in_blocks])
@pytest.mark.parametrize("first", [True, False])
def test_weights_that_hooks_bring_are_the_ones_that_count(change, first, launched_as_reference):
    """In both orders of hooks and acceleration."""
    model, other = decoder(), decoder()
    z = latents(model)
    change(other)
    stock = run(other, z)
    if first:
        change(model)
    with bitfuse.accelerated(model) as handle:
        if not first:
            change(model)
        same(stock, run(model, z))
        assert set(states(handle).values()) == {"fused"}
    same(stock, run(model, z))


def test_a_decode_is_in_no_cuda_graph(launched_as_reference):
    model = decoder()
    with bitfuse.accelerated(model, cuda_graph=True) as handle:
        run(model)
        assert handle.graphs == []
        assert set(states(handle).values()) == {"fused"}


def test_in_fp32_the_chains_run_with_a_reason(device, launched_as_reference):
    model = decoder(dtype=torch.float32, device=device)
    stock = run(model)
    with bitfuse.accelerated(model) as handle:
        same(stock, run(model))
        assert set(states(handle).values()) == {"fallen back"}
        assert all("torch.float32; accepted: torch.bfloat16" in site.reasons[0] for site in handle.sites)


def test_autocast_runs_the_chains(device, launched_as_reference):
    model = decoder(dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=BF16):
        stock = run(model)
        with bitfuse.accelerated(model) as handle:
            same(stock, run(model))
            assert all("autocast is on" in site.reasons[0] for site in handle.sites)


def test_gradients_are_those_of_the_stock_decoder(device):
    model = decoder(device=device)
    z = latents(model)

    def gradients():
        model.zero_grad(set_to_none=True)
        model.decode(z, generator=torch.Generator(z.device).manual_seed(1)).sample.float().square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    stock = gradients()
    assert len(stock) > 50
    with bitfuse.accelerated(model) as handle:
        for one, other in zip(stock.values(), gradients().values(), strict=True):
            same(one, other)
        assert {tuple(site.reasons) for site in handle.sites} == {
            ("a gradient is required of the block's inputs or weights",)
        }


def test_training_mode_changes_no_bit(device, launched_as_reference):
    model = decoder(device=device).train()
    stock = run(model)
    with bitfuse.accelerated(model) as handle:
        same(stock, run(model))
        assert set(states(handle).values()) == {"fused"}


# -- the references are the host's own functions -----------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [8, 24, 64, 128])
def test_the_hosts_projection_is_the_reference(head_dim):
    """Every family of the battery through `project_qkv`, with linear layers that hand on what they are given."""
    attn = upstream.LTX2VideoVaeNeighborhoodAttention(2 * head_dim, (1, 1, 1), head_dim).to(BF16)
    attn.to_q = attn.to_k = attn.to_v = torch.nn.Identity()
    grid = 3, 5, 7
    tables = adapter._tables(attn.rope, grid, torch.device("cpu"))
    like = torch.zeros(1, 105, 2 * head_dim, dtype=BF16)
    weights = attn.norm_q.weight.detach(), attn.norm_k.weight.detach()
    families = 0
    for _, args in QK_RMS_NORM_GRID_ROTARY.battery(like, like, *weights, *tables, attn.scale, 1e-6):
        x, q_weight, k_weight = args[0][:, :105].contiguous(), args[2], args[3]
        with torch.no_grad():
            attn.norm_q.weight.copy_(q_weight)
            attn.norm_k.weight.copy_(k_weight)
            expected = attn.project_qkv(x.view(2, *grid, -1))
            found = qk_rms_norm_grid_rotary(x, x, q_weight, k_weight, *tables, attn.scale, 1e-6)
        for one, other in zip(expected, found, strict=False):
            same(one.view(x.shape), other)
        families += 1
    assert families >= 4


def test_the_hosts_feed_forward_is_the_reference():
    mlp = upstream.LTX2VideoVaeSwiGLU(64, 48).to(BF16)
    x = torch.randn(2, 3, 4, 5, 64).to(BF16)
    gate, up = (layer(x).flatten(1, 3) for layer in (mlp.w_gate, mlp.w_up))
    same(mlp(x), mlp.w_down(swiglu(gate, up)).view(x.shape))


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """The sizes of which the host's own code was asked for frequencies."""
    calls = []
    own = upstream.LTX2VideoVaeRotaryPosEmbed3D._inv_freqs

    def noted(self, dim, device):
        calls.append(dim)
        return own(self, dim, device)

    monkeypatch.setattr(adapter, "_tables", lambda rope, *args, made=adapter._tables: made(Noting(rope), *args))

    class Noting:
        def __init__(self, rope):
            self.rope_dim_split, self._inv_freqs = rope.rope_dim_split, lambda *args: noted(rope, *args)

    return calls


def test_tables_are_computed_once_for_each_grid(device, launched_as_reference, computed):
    model = decoder(device=device)
    bitfuse.accelerate(model).restore()  # the trial has tables of its own
    computed.clear()
    with bitfuse.accelerated(model):
        run(model)
        # stages 2 to 4 and the diffusion steps have 4 grids, stage 1 one more; two blocks share the last
        grids = len(computed) // 3
        assert grids <= 5
        run(model)
        assert len(computed) == 3 * grids
        run(model, latents(model, height=4))
        assert len(computed) > 3 * grids


def test_tables_are_kept_by_nobody_where_ops_are_watched(device):
    handle = types.SimpleNamespace(on_restore=lambda undo: None)
    tables, rope = adapter.GridTables(handle), upstream.LTX2VideoVaeRotaryPosEmbed3D(64)
    x = torch.zeros(1, device=device)
    conditions.switch(False)
    try:
        first = tables.of(rope, (2, 3, 4), x)
    finally:
        conditions.switch(True)
    assert tables.of(rope, (2, 3, 4), x)[0] is not first[0]
    assert tables.of(rope, (2, 3, 4), x) is tables.of(rope, (2, 3, 4), x)
    with torch.inference_mode():
        assert tables.of(rope, (2, 3, 4), x)[0].is_inference()
    assert not tables.of(rope, (2, 3, 4), x)[0].is_inference()
    rope.base = 500.0
    assert not torch.equal(tables.of(rope, (2, 3, 4), x)[0], first[0])
    for places in range(200):
        tables.of(rope, (1, 1, 1 + places), x)
    assert len(tables._kept) == tables._KEPT
    tables.clear()
    assert not tables._kept


# -- targets -----------------------------------------------------------------------------------------------------------


def test_a_pipelines_decoder_is_found_by_its_component(device, launched_as_reference):
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "LTX2VideoDiffusionDecodePipeline"):
        pytest.skip("this diffusers has no such pipeline")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.LTX2VideoDiffusionDecodePipeline(diffusion_decoder=decoder(device=device), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    z = latents(pipe.diffusion_decoder)

    def frames():
        generator = torch.Generator(z.device).manual_seed(1)
        return pipe(z, generator=generator, output_type="pt", return_dict=False)[0]

    stock = frames()
    with bitfuse.accelerated(pipe) as handle:
        same(stock, frames())
        assert [site.name for site in handle.sites] == [*NAMES, "video_processor"]
        found = states(handle)
        assert found.pop("video_processor") == "not called yet"  # of "pt" nothing is brought to the CPU
        assert set(found.values()) == {"fused"}
    assert [type(model) for model in bitfuse.hosts.HOSTS["diffusers"].load().transformers(pipe)] == [
        upstream.LTX2VideoDiffusionDecoderModel
    ]


def test_the_whole_models_forward_is_watched_and_left_as_it_was(device, launched_as_reference):
    model = decoder(device=device)
    handle = bitfuse.accelerate(model)
    with torch.no_grad():
        model(latents(model))
    assert set(states(handle).values()) == {"fused"}
    handle.restore()
    for module in model.modules():
        assert not [name for name, value in vars(module).items() if isinstance(value, Forward)]
        assert "project_qkv" not in vars(module)
        assert "__getstate__" not in vars(module)


def test_a_copy_is_a_stock_model(device, launched_as_reference):
    model = decoder(device=device)
    stock, names = run(model), list(model.state_dict())
    with bitfuse.accelerated(model) as handle:
        assert list(model.state_dict()) == names
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.decoder.diff_blocks.parameters():  # the copy's are its own
                parameter.mul_(2)
        same(stock, run(twin))
        assert set(states(handle).values()) == {"not called yet"}
        attn = model.decoder.diff_blocks[0].attn
        shallow = copy.copy(attn)
        assert "project_qkv" in vars(attn)
        assert "project_qkv" not in vars(shallow)
        assert shallow.project_qkv.__self__ is shallow


# -- what was not read, hooks, what was replaced -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "sites"),
    [
        ("LTX2VideoVaeNeighborhoodAttention.project_qkv", ("attn",)),
        ("LTX2VideoVaeRotaryPosEmbed3D._rotate_axis", ("attn",)),
        ("LTX2VideoVaeSwiGLU.forward", ("mlp",)),
        ("LTX2VideoVaeDiffusionNABlock.forward", ("norm1", "norm2")),
    ],
)
def test_what_has_an_unknown_source_stays(source, sites, monkeypatch, launched_as_reference):
    model = decoder()
    stock = run(model)
    monkeypatch.setitem(adapter.READ, source, {"0" * 16})
    with bitfuse.accelerated(model) as handle:
        same(stock, run(model))
        alone = [site for site in handle.sites if site.state == "left alone"]
        assert alone
        assert {site.name.rpartition(".")[2] for site in alone} == set(sites)
        assert all(f"{source} of diffusers" in site.declined for site in alone)
        assert {state for state in states(handle).values() if state != "left alone"} == {"fused"}


def hooked_norm(block):
    block.norm2.register_forward_hook(lambda module, args, out: out * 2)
    return "norm2", "a hook is attached to norm2, which is not called when it is fused"


def hooked_qk_norm(block):
    block.attn.norm_k.register_forward_hook(lambda module, args, out: out * 2)
    return "attn", "a hook is attached to norm_k, which is not called when it is fused"


def hooked_rope(block):
    block.attn.rope.register_forward_hook(lambda module, args, out: out * 2)
    return "attn", "a hook is attached to rope, which is not called when it is fused"


def another_frequency(block):
    block.attn.rope._inv_freqs = lambda dim, device: torch.ones(dim // 2, device=device)
    return "attn", "rope has a method of its own"


def another_rope(block):
    block.attn.rope = type("Mine", (torch.nn.Identity,), {})()
    return "attn", "not diffusers' own"


def a_modulation_of_every_frame(block):
    def frames(module, args):
        context, modulation = args[1:3]
        ramp = torch.arange(context.shape[1], dtype=BF16).view(1, -1, 1, 1, 1)
        return args[0], context, tuple(value + ramp for value in modulation), *args[3:]

    block.register_forward_pre_hook(frames)
    return "norm2", "a modulation is [1, 3, 1, 1, 128]; known: [B, 1, 1, 1, C], one for all tokens"


def another_kind_of_base(block):
    block.attn.rope.base = torch.tensor(3.0)
    return "attn", "the base of rope is a torch.Tensor, not a number"


def another_norm(block):
    block.attn.norm_q = torch.nn.LayerNorm(64, dtype=BF16)
    return "attn", "norm_q is a torch.nn.modules.normalization.LayerNorm, not torch.nn.RMSNorm"


@pytest.mark.parametrize(
    "change",
    [
        *(hooked_norm, hooked_qk_norm, hooked_rope, another_frequency, another_rope, another_kind_of_base),
        *(another_norm, a_modulation_of_every_frame),
    ],
)
def test_what_is_changed_while_it_is_fused_is_what_runs(change, launched_as_reference):
    model = decoder()
    before = run(model)
    with bitfuse.accelerated(model) as handle:
        site, reason = change(model.decoder.diff_blocks[0])
        found = run(model)
        assert reason in site_of(handle, f"{DIFFUSION[0]}.{site}").reasons[0]
        assert sum(state != "fused" for state in states(handle).values()) == (2 if site == "norm2" else 1)
    same(run(model), found)
    assert bitfuse.compare(before, found) is not None, "the change shows"


def another_eps(block):
    block.norm2.eps = block.norm1.eps = 1.0


def another_base(block):
    block.attn.rope.base = 3.0


def another_weight(block):
    block.norm1.weight.data.mul_(3)


@pytest.mark.parametrize("change", [another_eps, another_base, another_weight])
def test_a_setting_that_is_changed_is_the_one_that_counts(change, launched_as_reference):
    model = decoder()
    before = run(model)
    with bitfuse.accelerated(model) as handle:
        run(model)
        change(model.decoder.diff_blocks[0])
        found = run(model)
        fell = {site.name: site.reasons for site in handle.sites if site.state != "fused"}
    same(run(model), found)
    assert bitfuse.compare(before, found) is not None, "the change shows"
    assert set(fell) <= {f"{DIFFUSION[0]}.attn"}  # its trial has seen another base


def hooked_feed_forward(model):
    model.decoder.diff_blocks[0].mlp.register_forward_hook(lambda module, args, out: out * 2)


def own_projection(model):
    attn = model.decoder.diff_blocks[0].attn
    own = attn.project_qkv
    attn.project_qkv = lambda hidden_states: tuple(2 * t for t in own(hidden_states))
    return "attn", "somebody has replaced the attention's project_qkv"


def derived_attention(model):
    attn = model.decoder.diff_blocks[0].attn
    own = upstream.LTX2VideoVaeNeighborhoodAttention.project_qkv
    methods = {"project_qkv": lambda self, hidden_states: own(self, 2 * hidden_states)}
    attn.__class__ = type("Mine", (type(attn),), methods)
    return "attn", "not diffusers' own, and has a project_qkv of its own"


def wrapped_block(model):
    block = model.decoder.diff_blocks[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    return "norm1", "a hook or a wrapper has replaced the block's forward"


@pytest.mark.parametrize("change", [hooked_feed_forward, own_projection, derived_attention, wrapped_block])
def test_what_somebody_changed_before_is_left_to_them(change, launched_as_reference):
    model = decoder()
    before = run(model)
    said = change(model)
    stock = run(model)
    assert bitfuse.compare(before, stock) is not None, "the change shows"
    with bitfuse.accelerated(model) as handle:
        same(stock, run(model))
        alone = {site.name: site.declined for site in handle.sites if site.declined}
        if said is None:
            assert not alone
        else:
            assert said[1] in alone[f"{DIFFUSION[0]}.{said[0]}"]
        assert {state for state in states(handle).values() if state != "left alone"} == {"fused"}


def test_hooks_of_blocks_attentions_and_layers_are_called(launched_as_reference):
    model, seen = decoder(), []
    for place in ("before", "after"):
        for name in ("", "attn", "mlp", "mlp.w_gate", "attn.to_q", "attn.to_out.0", "context_proj"):
            module = model.decoder.diff_blocks[1].get_submodule(name)
            module.register_forward_hook(lambda *_, what=(place, name): seen.append(what))
        handle = bitfuse.accelerate(model)
    run(model)
    assert set(states(handle).values()) == {"fused"}
    assert len(seen) == len(set(seen)) == 14
    handle.restore()
    run(model)
    assert len(seen) == 28


def test_a_replaced_function_is_called(monkeypatch, launched_as_reference):
    model = decoder()
    with bitfuse.accelerated(model) as handle:
        own = F.silu
        monkeypatch.setattr(F, "silu", lambda x, inplace=False: 2 * own(x))
        found = run(model)
        feed_forwards = [site for site in handle.sites if site.name.endswith("mlp")]
        assert all("torch.nn.functional.silu was replaced" in site.reasons[0] for site in feed_forwards)
    same(run(model), found)


def test_strict_names_a_site_that_falls_back(launched_as_reference):
    model = decoder()
    hooked_rope(model.decoder.det_stages[1][0])
    with (
        bitfuse.accelerated(model, strict=True),
        pytest.raises(bitfuse.NotFused, match=r"^diffusion_decoder\.decoder\.det_stages\.1\.0\.attn: a hook is"),
    ):
        run(model)


@pytest.mark.slow
def test_a_compiled_block_is_the_compilers(launched_as_reference):
    model = decoder()
    stock = run(model)
    with bitfuse.accelerated(model) as handle:
        model.decoder.diff_blocks[0].compile(backend="eager")
        same(stock, run(model))
        handle.report()
        alone = {site.name for site in handle.sites if site.declined}
        assert alone == {name for name in NAMES if name.startswith(DIFFUSION[0])}
        same(stock, run(model))
        assert "project_qkv" not in vars(model.decoder.diff_blocks[0].attn)
    same(stock, run(model))


# -- the benchmark's masks ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parent.parent / "benchmarks" / "diffusion_decoder.py"
    spec = importlib.util.spec_from_file_location("benchmark_diffusion_decoder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("grid", "window"),
    [
        ((4, 8, 8), (3, 7, 7)),  # two blocks, both full of tokens
        ((11, 12, 13), (11, 11, 11)),  # the last block is not full, and runs of keys lie in two blocks
        ((1, 4, 64), (1, 4, 64)),  # every token sees every other: whole blocks
        ((3, 2, 128), (1, 2, 128)),  # whole blocks, and pairs of blocks that never meet
        ((2, 3, 4), (11, 11, 11)),  # a window larger than the grid
    ],
)
def test_the_benchmarks_lists_of_blocks_are_the_hosts(grid, window, script):
    expected = upstream._neighborhood_block_mask(*grid, window, torch.device("cpu"))
    found = script.block_mask(grid, window, expected.mask_mod, torch.device("cpu"))
    assert found.BLOCK_SIZE == expected.BLOCK_SIZE
    assert found.seq_lengths == expected.seq_lengths
    for name in script.LISTS:
        one, other = getattr(expected, name), getattr(found, name)
        assert (one.dtype, one.stride()) == (other.dtype, other.stride()), name
        assert torch.equal(one, other), name


def test_the_benchmark_refuses_what_the_host_refuses(script):
    assert script.why_refused("224x224x17") is None
    assert script.why_refused("768x512x25") is None
    assert "stage 5 has a grid of (9, 64, 64)" in script.why_refused("256x256x9")
    assert "stage 1 has a grid of (5, 4, 8)" in script.why_refused("256x128x17")
    for size in ("250x256x17", "256x256x18", "256x256"):
        assert script.why_refused(size).startswith("accepted: ")


def test_the_benchmarks_table_of_a_dry_run_has_no_memory_and_disowns_its_times(script):
    row = {"size": "64x64x9", "equal": [True], "s": {"stock": 1.0, "fused": 2.0}, "ratio": 0.5, "first_fused_s": 3.0}
    row["sites"] = {"fused": 1, "seen": 1}
    for device, gigabytes in (("cpu", 0.0), ("cuda", 1.5)):
        row["peak_gb"] = {"stock": gigabytes, "fused": gigabytes}
        text = "\n".join(script.table({"machine": {"device_type": device}, "decodes": [row], "errors": {}}))
        assert ("peak 1.50 to 1.50 GB" in text) == (device == "cuda")
        assert ("the times are not" in text) == (device == "cpu")
        assert "GB" not in text or device == "cuda"


def test_the_benchmark_decodes_at_least_once_of_each_way(script, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["x", "--out", str(tmp_path / "x.json"), "--tiny", "--only", "decode", "--rounds", "0"]
    )
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert "--rounds 0; accepted: 1 or more" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_benchmark_knows_the_grids_of_the_stages(script, monkeypatch):
    seen = []
    build = upstream._neighborhood_block_mask
    monkeypatch.setattr(
        upstream, "_neighborhood_block_mask", lambda *key: seen.append((key[:3], key[3])) or build(*key)
    )
    sizes = {**script.TINY, "decoder_stage_kernels": ((3, 2, 2),) * 4, "decoder_stage5_kernel": (2, 3, 2)}
    monkeypatch.setattr(script, "TINY", sizes)
    model = upstream.LTX2VideoDiffusionDecoderModel(**sizes, latent_channels=8).to(BF16)
    with torch.no_grad():
        model.decode(torch.zeros(1, 8, 2, 2, 3, dtype=BF16))
    assert seen == script.stages((2, 2, 3), tiny=True)
