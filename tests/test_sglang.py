"""SGLang's LTX-2 transformer: same bits in both streams, every site accounted for, and nothing left behind."""

from __future__ import annotations

import contextlib
import pathlib
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

import bitfuse
import sglang_host
from bitfuse import OPERATORS
from bitfuse.core.kernel import interpreter
from bitfuse.hosts import sglang_plugin
from bitfuse.ops.adaln import MODULATE
from bitfuse.run.swap import ours_in
from sglang_host import V23, feed, make

BF16 = torch.bfloat16
CONFIGS = {"2.0": {}, "2.3": V23, "interleaved": {"rope_type": "interleaved"}}
ATTENTIONS = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")


@pytest.fixture(scope="module")
def upstream():
    with sglang_host.running():
        yield sglang_host.upstream()


@pytest.fixture(scope="module")
def adapter(upstream):
    from bitfuse.hosts import sglang

    return sglang


@pytest.fixture(autouse=True)
def _interpreted():
    with torch.no_grad(), interpreter():
        yield


@pytest.fixture(scope="module")
def models(upstream):
    """Models by their configuration, made when they are asked for; tests leave them as they are."""
    made = {}

    def model(name="2.0"):
        if name not in made:
            with torch.no_grad():
                made[name] = make(**CONFIGS[name])
        return made[name]

    return model


def same(expected, found):
    return not any(bitfuse.compare(a, b) for a, b in zip(expected, found, strict=True))


def states(handle):
    """state -> names of the sites in it."""
    found = {}
    for site in handle.report().sites:
        found.setdefault(site.state, set()).add(site.name)
    return found


def reasons(handle):
    return {reason for site in handle.report().sites for reason in site.reasons}


def rotary(name):
    return f"apply_{CONFIGS[name].get('rope_type', 'split')}_rotary_emb"


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_both_streams_are_the_same_in_every_bit_and_every_site_is_fused(models, name):
    model = models(name)
    fed = feed(model)
    stock = model(**fed)
    assert not any(t.isnan().any() or (t == 0).all() for t in stock)
    with bitfuse.accelerated(model) as handle:
        assert same(stock, model(**fed))
        assert handle.report().host.startswith("SGLang 0.5.")
        found = states(handle)
        assert set(found) == {"fused", "not called yet"}
        assert found["not called yet"] == {rotary(name)}  # the attentions norm and turn in one kernel
        assert len(found["fused"]) == 2 * (24 if name == "2.3" else 16) + 1
    assert same(stock, model(**fed))


_mask = torch.tensor([[1] * 6 + [0] * 3] * 2)
_perturbed = {
    "skip_video_self_attn_blocks": [1],
    "skip_audio_self_attn_blocks": [0, 1],
    "skip_a2v_cross_attn": True,
    "skip_v2a_cross_attn": True,
}
# keyword arguments of a pass, and the sites that are not called in it
PASSES = {
    "one sample perturbed": ({"perturbation_configs": ({}, _perturbed)}, set()),
    "a block without self-attention": (
        {"skip_video_self_attn_blocks": (1,), "skip_audio_self_attn_blocks": (1,)},
        {"transformer_blocks.1.attn1", "transformer_blocks.1.audio_attn1"},
    ),
    "no audio to video": (
        {"disable_a2v_cross_attn": True},
        {f"transformer_blocks.{i}.audio_to_video_attn{gate}" for i in (0, 1) for gate in ("", ".gate")},
    ),
    "no video to audio": (
        {"disable_v2a_cross_attn": True},
        {f"transformer_blocks.{i}.video_to_audio_attn{gate}" for i in (0, 1) for gate in ("", ".gate")},
    ),
    "neither": (
        {"disable_a2v_cross_attn": True, "disable_v2a_cross_attn": True},
        {
            f"transformer_blocks.{i}.{site}"
            for i in (0, 1)
            for kind in ("audio_to_video", "video_to_audio")
            for site in (f"{kind}_attn", f"{kind}_attn.gate", f"{kind}_norm")
        },
    ),
    "a timestep for each token, text masked": (
        {
            "timestep": torch.linspace(1, 900, 48).view(2, 24),
            "audio_timestep": torch.tensor([500.0, 250.0]),
            "encoder_attention_mask": _mask,
            "audio_encoder_attention_mask": _mask,
        },
        set(),
    ),
    "sequence parallelism": ({"audio_replicated_for_sp": True}, set()),
    "sequence parallelism, tokens that all ranks have": (
        {"audio_replicated_for_sp": True, "video_memory_prefix_len": 12},
        set(),
    ),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("launched", ["references", pytest.param("kernels", marks=pytest.mark.slow)])
def test_every_kind_of_pass(models, name, launched, request):
    if launched == "references":
        request.getfixturevalue("launched_as_reference")
    model = models("2.3")
    more, idle = PASSES[name]
    fed = feed(model, **more)
    stock, plain = model(**fed), model(**feed(model))
    if "parallel" not in name:  # of one rank, that pass may have the plain one's bits or not
        assert not same(stock, plain), "the pass must not be the plain one"
    with bitfuse.accelerated(model) as handle:
        assert same(stock, model(**fed))
        assert states(handle) == {
            "fused": {site.name for site in handle.sites} - idle - {rotary("2.3")},
            "not called yet": idle | {rotary("2.3")},
        }


@pytest.mark.parametrize("name", ["2.0", "2.3"])
def test_under_sglangs_autocast_all_is_fused_and_autocast_stays_as_it_was(models, name):
    model = models(name)
    fed = feed(model)
    with torch.autocast("cpu", dtype=BF16):
        stock = model(**fed)
        with bitfuse.accelerated(model) as handle:
            assert same(stock, model(**fed))
            assert torch.is_autocast_enabled("cpu")
            assert set(states(handle)) == {"fused", "not called yet"}


def test_where_autocast_would_change_a_chain_sglangs_own_code_runs(models, adapter, monkeypatch):
    tokens = torch.zeros(1, dtype=BF16)
    assert adapter.why_autocast(tokens, guarded=True) is None  # it is off
    with torch.autocast("cpu", dtype=torch.float16):
        reason = "autocast is to torch.float16 and the tokens are torch.bfloat16"
        assert adapter.why_autocast(tokens, guarded=True) == reason

    def as_if_autocast_changed_it(*args, reference=MODULATE.reference):
        return reference(*args).float() if torch.is_autocast_enabled("cpu") else reference(*args)

    model = models("2.3")
    fed = feed(model)
    monkeypatch.setattr(adapter, "_tried", {})
    monkeypatch.setattr(MODULATE, "reference", as_if_autocast_changed_it)
    with torch.autocast("cpu", dtype=BF16):
        stock = model(**fed)
        with bitfuse.accelerated(model) as handle:
            assert same(stock, model(**fed))
            assert set(states(handle)) == {"fallen back"}
            (reason,) = reasons(handle)
            assert reason.startswith("autocast to torch.bfloat16 changes what modulate computes: the dtype is")


@pytest.mark.usefixtures("launched_as_reference")
def test_sglangs_quality_tiers_change_nothing_of_it(models, upstream):
    model = models("2.3")
    fed = feed(model)
    stock = model(**fed)
    for fusion in (upstream.LTX2_RMS_NORM_MODULATE, upstream.LTX2_QKNORM_SPLIT_ROPE):
        fusion.mount(model)
    with bitfuse.accelerated(model) as handle:
        assert same(stock, model(**fed))
        assert set(states(handle)) == {"fused", "not called yet"}
        assert all(upstream.LTX2_QKNORM_SPLIT_ROPE.is_enabled(block.attn1) for block in model.transformer_blocks)
        for fusion in (upstream.LTX2_RMS_NORM_MODULATE, upstream.LTX2_QKNORM_SPLIT_ROPE):
            fusion.unmount(model)
        assert not upstream.LTX2_RMS_NORM_MODULATE.is_enabled(model.transformer_blocks[0])


@pytest.mark.usefixtures("launched_as_reference")
def test_the_prompts_kept_keys_and_values(models):
    """SGLang projects and norms them once for a prompt; of these attentions nothing is left to fuse."""
    model = models("2.0")
    if not hasattr(model, "prepare_prompt_kv"):
        pytest.skip("this SGLang does not keep them")
    fed = feed(model)
    stock = model(**fed)
    with bitfuse.accelerated(model) as handle:
        key = model.prepare_prompt_kv(fed["encoder_hidden_states"], fed["audio_encoder_hidden_states"])
        kept = {**fed, "encoder_hidden_states": None, "audio_encoder_hidden_states": None, "cached_prompt_kv": key}
        assert same(stock, model(**kept))
        alone = {f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in ("attn2", "audio_attn2")}
        assert states(handle)["fallen back"] == alone
        assert reasons(handle) == {
            "the text's keys are kept, normed; of the queries' norm alone nothing is left to fuse"
        }


@pytest.mark.usefixtures("launched_as_reference")
def test_fp32_runs_sglangs_code(upstream):
    model = make(torch.float32)
    fed = feed(model)
    stock = model(**fed)
    with bitfuse.accelerated(model) as handle:
        assert same(stock, model(**fed))
        assert any("torch.float32; accepted: torch.bfloat16" in reason for reason in reasons(handle))


# -- the functions of SGLang's module ----------------------------------------------------------------------------------


FORMS = {
    *("the same, batch 2 (guidance)", "head size 6", "fp16", "columns of a wider tensor"),
    *("x [B, H, T, D]", "tables of batch 1"),
}


@pytest.mark.usefixtures("launched_as_reference")
def test_the_rotary_functions_are_fused_under_sglangs_condition_and_beyond(models, upstream):
    for name in ("2.0", "interleaved"):
        function = rotary(name)
        kind = function.split("_")[1]
        stock = getattr(upstream, function)
        with bitfuse.accelerated(models(name)) as handle:
            site = next(site for site in handle.sites if site.name == function)
            ours = getattr(upstream, function)
            assert ours is not stock
            assert ours.__wrapped__ is stock
            for case in OPERATORS[f"{kind}_rotary_per_op"].cases:
                if case.name not in FORMS:
                    continue
                x, cos, sin = case.arguments("cpu", tokens=5)
                before = site.fused
                assert bitfuse.compare(stock(x, (cos, sin)), ours(x, (cos, sin))) is None
                assert site.fused == before + 1, case.name
        assert getattr(upstream, function) is stock


def test_what_is_not_fused_runs_sglangs_function(models, upstream):
    x, cos, sin = OPERATORS["split_rotary_fp32"].cases[-1].arguments("cpu", tokens=5)
    stock = upstream.apply_split_rotary_emb
    with bitfuse.accelerated(models("2.0")) as handle:
        site = next(site for site in handle.sites if site.name == "apply_split_rotary_emb")
        tables = cos.float(), sin.float()
        assert bitfuse.compare(stock(x, tables), upstream.apply_split_rotary_emb(x, tables)) is None
        assert dict(site.fallen) == {
            "the tables are torch.float32 and x torch.bfloat16; this chain takes them alike": 1
        }
        ours = upstream.apply_split_rotary_emb
    assert bitfuse.compare(stock(x, (cos, sin)), ours(x, (cos, sin))) is None  # a reference that somebody kept


@pytest.mark.usefixtures("launched_as_reference")
def test_the_last_of_several_models_puts_the_functions_back(models, upstream):
    stock = {name: vars(upstream)[name] for name in vars(upstream)}
    first = bitfuse.accelerate(models("2.0"))
    assert upstream.apply_interleaved_rotary_emb is stock["apply_interleaved_rotary_emb"]  # the other kind's
    ours = upstream.apply_split_rotary_emb
    second = bitfuse.accelerate(models("2.3"))
    assert upstream.apply_split_rotary_emb is ours
    first.restore()
    assert upstream.apply_split_rotary_emb is ours
    models("2.3")(**feed(models("2.3")))
    assert next(site for site in second.sites if site.name == "_ltx2_modulate").fused == 2
    assert not next(site for site in first.sites if site.name == "_ltx2_modulate").fused
    second.restore()
    assert {name: vars(upstream)[name] for name in vars(upstream)} == stock


@pytest.mark.usefixtures("launched_as_reference")
def test_somebody_elses_function_is_run_and_left_in_place(models, upstream, monkeypatch):
    model = models("2.0")
    fed = feed(model)
    stock = upstream.apply_split_rotary_emb
    calls = []

    def theirs(x, freqs):
        calls.append(x)
        return -stock(x, freqs)

    monkeypatch.setattr(upstream, "apply_split_rotary_emb", theirs)
    expected = model(**fed)
    with bitfuse.accelerated(model) as handle:
        assert same(expected, model(**fed))
        assert any("apply_split_rotary_emb of SGLang" in reason for reason in reasons(handle))
        assert len(states(handle)["left alone"]) == 12 + 1
    assert upstream.apply_split_rotary_emb is theirs

    monkeypatch.setattr(upstream, "apply_split_rotary_emb", stock)
    with bitfuse.accelerated(model) as handle:
        monkeypatch.setattr(upstream, "apply_split_rotary_emb", theirs)
        calls.clear()
        assert same(expected, model(**fed))
        assert len(calls) == 16
        (reason,) = reasons(handle)
        assert reason.endswith("was replaced meanwhile")
    assert upstream.apply_split_rotary_emb is theirs


# -- what is left alone ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hook(module):
    handle = module.register_forward_hook(lambda module, args, output: -output)
    yield
    handle.remove()


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("where", ["attn1.q_norm", "rms_norm"])
def test_a_hook_on_a_norm_is_called(models, where):
    model = models("2.3")
    fed = feed(model)
    with _hook(model.transformer_blocks[1].get_submodule(where)):
        stock = model(**fed)
        assert not same(stock, model.eval()(**{**fed, "timestep": fed["timestep"] + 1}))
        with bitfuse.accelerated(model) as handle:
            assert same(stock, model(**fed))
            (reason,) = reasons(handle)
            assert reason == f"a hook is attached to {where.split('.')[-1]}, which is not called when it is fused"
            fallen = states(handle)["fallen back"]
            if where == "rms_norm":
                assert len(fallen) == 12
            else:  # SGLang's forward turns by the module's function, which is fused
                assert fallen == {"transformer_blocks.1.attn1", "transformer_blocks.1.attn1.gate"}
                assert next(site for site in handle.sites if site.name == rotary("2.3")).fused == 2


@pytest.mark.usefixtures("launched_as_reference")
def test_a_norm_replaced_meanwhile_is_called(upstream):
    model = make()
    with bitfuse.accelerated(model) as handle:
        model.transformer_blocks[0].attn1.k_norm = nn.LayerNorm(256, dtype=BF16)
        model.transformer_blocks[1].rms_norm = type(model.transformer_blocks[1].rms_norm)()
        fed = feed(model)
        found = model(**fed)
        assert reasons(handle) == {
            "k_norm is a torch.nn.modules.normalization.LayerNorm, not torch.nn.RMSNorm",
            "rms_norm was replaced meanwhile",
        }
    assert same(model(**fed), found)


@pytest.mark.usefixtures("launched_as_reference")
def test_tensor_parallel_norms_are_declined_and_the_rest_is_fused(models, upstream, monkeypatch):
    model = models("2.0")
    fed = feed(model)
    stock = model(**fed)
    with monkeypatch.context() as patch:
        patch.setattr(upstream, "get_tp_world_size", lambda: 2)  # asked when the model is taken over
        handle = bitfuse.accelerate(model)
    with handle:
        assert same(stock, model(**fed))
        assert reasons(handle) == {"tensor parallelism of 2: the norms of queries and keys add up over the ranks"}
        found = states(handle)
        assert found["left alone"] == {f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in ATTENTIONS}
        assert next(site for site in handle.sites if site.name == rotary("2.0")).fused == 16
        assert "not called yet" not in found


@pytest.mark.usefixtures("launched_as_reference")
def test_modules_that_are_not_sglangs_own_are_left_alone(upstream):
    model = make()
    first, second = model.transformer_blocks
    kind, attention, forward = type(first), type(second.attn1), second.attn2.forward
    first.__class__ = type("Mine", (kind,), {"forward": lambda self, *a, **k: kind.forward(self, *a, **k)})
    second.attn1.__class__ = type("Theirs", (attention,), {"forward": lambda *a, **k: attention.forward(*a, **k)})
    second.attn2.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    fed = feed(model)
    stock = model(**fed)
    with bitfuse.accelerated(model) as handle:
        assert same(stock, model(**fed))
        assert len(states(handle)["left alone"]) == 10 + 2
        assert any("Mine, not SGLang's own, and has a forward of its own" in reason for reason in reasons(handle))
        assert "a hook or a wrapper has replaced the attention's forward, and is left in place" in reasons(handle)


def test_where_a_gradient_is_required_sglangs_own_block_runs(models):
    model = models("2.0")
    with torch.enable_grad(), bitfuse.accelerated(model) as handle:
        with pytest.raises(RuntimeError, match="don't support automatic differentiation"):  # SGLang's blocks have none
            model(**feed(model))
        assert "a gradient is required of the block's inputs or weights" in reasons(handle)


def test_a_copy_of_an_accelerated_module_is_a_stock_one(models, upstream):
    model = models("2.0")
    with bitfuse.accelerated(model):
        for module, stock in (
            (model.transformer_blocks[0], upstream.LTX2TransformerBlock),
            (model.transformer_blocks[0].attn1, upstream.LTX2Attention),
        ):
            assert type(module) is stock
            function, arguments = ours_in(module).__reduce_ex__(4)  # what a deep copy holds in its place, by itself
            assert (function, arguments) == (getattr, (module, "forward"))


@pytest.mark.parametrize("option", ["keep_text", "cuda_graph"])
def test_options_that_it_has_not_are_refused_and_nothing_is_left(models, upstream, option):
    stock = dict(vars(upstream))
    with pytest.raises(ValueError, match=f"{option} is True; accepted for an SGLang model: False"):
        bitfuse.accelerate(models("2.0"), **{option: True})
    assert dict(vars(upstream)) == stock


def test_a_pipelines_transformer_is_found(models):
    class Pipeline:  # as SGLang's ComposedPipelineBase holds its modules
        def __init__(self, modules):
            self.modules = modules

    with bitfuse.accelerated(Pipeline({"vae": object(), "transformer": models("2.0")})) as handle:
        assert len(handle.sites) == 34


# -- the plug-in -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"BITFUSE_SGLANG": "0"}, False),
        ({"BITFUSE_SGLANG": "1"}, True),
        ({"SGLANG_PLUGINS": "other, bitfuse"}, True),
        ({"SGLANG_PLUGINS": "other"}, False),
        ({"SGLANG_PLUGINS": "bitfuse", "BITFUSE_SGLANG": "0"}, False),
    ],
)
def test_the_plug_in_is_inactive_unless_asked_for(monkeypatch, environment, wanted):
    for name in ("BITFUSE_SGLANG", "SGLANG_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sglang_plugin.wanted() == wanted


def test_a_bad_switch_is_named(monkeypatch):
    monkeypatch.setenv("BITFUSE_SGLANG", "yes")
    with pytest.raises(ValueError, match="BITFUSE_SGLANG is 'yes'; accepted: 0"):
        sglang_plugin.register()


def _entry_point():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads(pathlib.Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    group = "sglang.multimodal_gen.plugins"
    ((name, value),) = project["project"]["entry-points"][group].items()
    return EntryPoint(name, value, group)


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("asked", [False, True])
def test_sglangs_loader_runs_the_plug_in_and_the_first_forward_is_accelerated(models, upstream, monkeypatch, asked):
    plugins = pytest.importorskip("sglang.multimodal_gen.runtime.platforms.plugins")
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.setenv("BITFUSE_SGLANG", str(int(asked)))
    point = _entry_point()
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == point.group else [])
    kind = upstream.LTX2VideoTransformer3DModel
    monkeypatch.setattr(kind, "forward", kind.forward)  # so that it is put back
    model = models("2.0")
    fed = feed(model)
    stock = model(**fed)
    try:
        plugins.load_plugins()
        plugins.apply_plugin_hooks()
        with torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
            assert same(stock, model(**fed))
        taken = ours_in(model.transformer_blocks[0]) is not None
        assert taken == asked
        if asked:
            with bitfuse.accelerate(model) as handle:  # the one that is in force
                assert states(handle)["not called yet"] == {rotary("2.0")}
            assert same(stock, model(**fed))
            assert ours_in(model.transformer_blocks[0]) is None  # once restored it stays so
    finally:
        plugins.HookRegistry.reset()
        plugins._reset_lifecycle_for_tests()
        sglang_plugin._seen.clear()


def test_nothing_of_sglang_is_imported_before_its_workers_import_it():
    source = pathlib.Path(sglang_plugin.__file__).read_text()
    top = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not any("sglang" in line or "bitfuse" in line for line in top)


def test_audited_calls_are_compared_under_autocast_too(models):
    model = models("2.0")
    with torch.autocast("cpu", dtype=BF16), bitfuse.accelerated(model, audit=1) as handle:
        model(**feed(model))
        audits = handle.report().as_dict()["audit"]
        fused = sum(site.fused for site in handle.sites)
    assert (audits["calls"], audits["mismatches"], audits["skipped"]) == (fused, 0, {})


def test_compiled_blocks_are_left_alone(upstream):
    model = make()
    model.transformer_blocks[0].compile(backend="eager")
    with bitfuse.accelerated(model) as handle:
        assert reasons(handle) == {"the block is compiled with torch.compile, and is left to that"}
        assert len(states(handle)["left alone"]) == 6 + 10
