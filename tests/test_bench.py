"""The benchmark without its GPU: what it counts, when it refuses a time, what it writes, and the README's tables."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import bitfuse
import sglang_host
from bitfuse.cli import app
from bitfuse.ops.gelu_evidence import GeluCase
from bitfuse.ops.pixel_norm_evidence import PixelCase
from bitfuse.ops.rope import SPLIT_FP32
from bitfuse.run.graphs import Counts
from bitfuse.tools import seeded
from bitfuse.tools.bench import bench, measure
from bitfuse.tools.seeded import sglang as seeded_sglang

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")

needs_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")


# -- bytes ---------------------------------------------------------------------------------------------------------


def test_each_distinct_region_is_counted_once():
    x = torch.empty(2, 6, 8, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    assert measure.moved((x,), out) == 2 * 96 * 2
    assert measure.moved((x, x), out) == 2 * 96 * 2, "the same tensor twice"
    assert measure.moved((x, x.view(2, 6, 2, 4).swapaxes(1, 2)), out) == 2 * 96 * 2, "another view of all of it"
    assert measure.moved((x, x.clone()), out) == 3 * 96 * 2
    assert measure.moved((x, None, 1e-6), (out, out.clone())) == 3 * 96 * 2, "what is no tensor moves nothing"
    assert measure.moved((x,), x) == 2 * 96 * 2, "read and written: twice"


def test_expanded_and_strided_views_count_what_is_there():
    wide = torch.empty(2, 5, 6 * 8)
    row = torch.empty(1, 1, 8)
    out = torch.empty(0)
    assert measure.moved((row.expand(2, 5, 8),), out) == 8 * 4
    assert measure.moved((wide[..., 8:16],), out) == 2 * 5 * 8 * 4
    assert measure.moved((wide[..., 8:16], wide[..., 16:24]), out) == 2 * (2 * 5 * 8 * 4), "neighbours are two regions"
    assert measure.moved((wide[:, :1, :8].expand(2, 5, 8),), out) == 2 * 8 * 4


def test_bytes_of_a_rotary_embedding_are_those_of_its_committed_benchmark():
    document = json.loads((ROOT / "benchmarks/results/2026-11-23-h100-rotary.json").read_text())
    row = next(r for r in document["operators"] if (r["operator"], r["x"]) == ("split_rotary_fp32", [1, 126, 2048]))
    case = next(c for c in bench.timed_cases(SPLIT_FP32) if c.name.startswith("audio"))
    args = case.arguments("cpu")
    assert measure.moved(args, SPLIT_FP32.reference(*args)) == row["bytes"]


def test_fused_calls_are_noted_and_others_not(fresh_routes):
    args = next(c for c in SPLIT_FP32.cases if c.name == "head size 40").arguments("cpu")
    with measure.fused_calls() as calls:
        called = SPLIT_FP32(*args)
        bitfuse.disable()
        try:
            SPLIT_FP32(*args)
        finally:
            bitfuse.enable()
    SPLIT_FP32(*args)
    if SPLIT_FP32.route(*args).fused:
        assert calls == [("split_rotary_fp32", measure.moved(args, called))]
    assert bitfuse.compare(SPLIT_FP32.reference(*args), called) is None


# -- kernels by class, and the floor -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNN", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>", "matmul"),
        ("std::enable_if<true, void>::type internal::gemvx::kernel<int, int, __nv_bfloat16>", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>", "other"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_are_known_by_their_names(name, kind):
    assert measure.kernel_class(name) == kind


def test_none_of_our_kernels_passes_for_a_matmul_or_attention():
    for operator in bitfuse.OPERATORS.values():
        case = next(c for c in operator.cases if not c.real)
        for tier in operator.tiers:
            plan = tier.plan(*case.arguments("cpu", tokens=3))
            if not isinstance(plan, str):
                assert measure.kernel_class(plan.kernel.fn.__name__) == "other"


def test_times_by_class_and_the_floor():
    ran = [(0, 100_000, "nvjet_a"), (60_000, 110_000, "nvjet_b"), (110_001, 150_001, "flash_fwd"), (0, 7, "add")]
    kernels = measure.by_class(ran)
    ran = [(0.0, 10.0, "flash"), (2.0, 5.0, "nvjet"), (4.0, 12.0, "nvjet"), (20.0, 21.0, "nvjet"), (20.0, 50.0, "add")]
    assert measure.by_class(ran)["busy"] == 0.013, "side by side counted once, gaps not at all"
    assert kernels == {"matmul": 150.0, "attention": 40.0, "other": 0.007, "busy": 150.0, "launches": 4}
    # 30 GB at 3000 GB/s take 10 ms
    assert measure.floor_ms(kernels, 30 * 10**9, 3000.0) == pytest.approx(160.0)
    assert measure.typical([100, 100, 100]) == 100
    assert measure.typical([1] * 100 + [1000]) == 909, "the size of the call that the average byte moves in"


# -- the whole part, on stand-ins for CUDA ---------------------------------------------------------------------------


class _Event:
    def __init__(self, enable_timing):
        pass

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class _Stream:
    def wait_stream(self, other):
        pass


class _Graph:
    def replay(self):
        time.sleep(1e-4)  # or it would round to no time at all


class _Context:
    def __init__(self, *_):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


@pytest.fixture
def no_cuda_needed(monkeypatch):
    """The benchmark on the CPU: a small model, kernels in the interpreter, and no time that means anything."""
    stand_ins = {
        "Event": _Event,
        "Stream": _Stream,
        "CUDAGraph": _Graph,
        "graph": _Context,
        "stream": _Context,
        "current_stream": _Stream,
        "current_device": lambda: 0,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "memory_reserved": lambda: 0,
        "max_memory_allocated": lambda: 10**9,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(bench, "_device", lambda: CPU)
    monkeypatch.setattr(bench, "_TURN", 0.0)
    joules = itertools.count()
    monkeypatch.setattr(bench, "energy", lambda device: float(next(joules)))
    monkeypatch.setattr(measure, "_COLD", 1)
    monkeypatch.setattr(bench, "LATENTS", {24: (2, 3, 4)})
    monkeypatch.setattr(bench, "_COMPILE", {"fullgraph": True, "backend": "eager"})
    monkeypatch.setattr(bench, "kernel_ms", lambda step: measure.by_class([(0, 1, "nvjet"), (1, 2, "flash")]))
    stock_accelerate = bitfuse.accelerate

    def accelerate(target, cuda_graph=False, **options):
        handle = stock_accelerate(target, **options)
        if cuda_graph:
            target.graph = Graph()  # which lives with its model
            handle.add_graph(target.graph)
        return handle

    monkeypatch.setattr(bitfuse, "accelerate", accelerate)


class Graph:
    """What is asked of a `GraphedForward`."""

    def __init__(self):
        self.replays, self.captures, self.reasons, self.counts = 1, 1, {}, Counts()


def _run(**options):
    printed = io.StringIO()
    saved = []
    document = bench.run(
        Console(file=printed, width=200),
        ["model"],
        [24],
        1,
        rounds=2,
        save=lambda d: saved.append(json.dumps(d)),
        **options,
    )
    assert json.loads(saved[-1]) == document, "it is JSON, and saved before it is returned"
    return document, printed.getvalue()


@needs_diffusers
@pytest.mark.parametrize(
    ("version", "launched"),
    [("2.0", "references"), ("2.3", "references"), pytest.param("2.0", "kernels", marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("no_cuda_needed")
def test_a_step_in_every_way(version, launched, request):
    if launched == "references":
        request.getfixturevalue("launched_as_reference")
    document, printed = _run(version=version)
    (row,) = document["model"]
    assert document["equal"] is True
    assert row["mismatch"] is None
    assert row["sites_fused"] > 0
    kept = ["text kept"] if version == "2.0" else []
    assert list(row["ms"]) == ["stock", "bitfuse", *kept, "graph", "compiled", "compiled + graph"]
    assert all(t["p10"] <= t["median"] <= t["p90"] for t in row["ms"].values())
    assert row["speed_up"] == row["ms"]["stock"]["median"] / row["ms"]["bitfuse"]["median"]
    assert row["against_compiled_graph"] == row["ms"]["compiled + graph"]["median"] / row["ms"]["graph"]["median"]
    assert set(row["peak_gb"]) == {"stock", "bitfuse", *kept, "graph"}
    floor = row["floor"]
    assert floor["bytes"] == sum(o["bytes"] for o in floor["operators"].values()) > 0
    assert floor["ms"] == pytest.approx(0.002 + floor["bytes"] / floor["copy_gb_per_s"] / 1e6)
    assert row["of_floor"]["graph"] == row["ms"]["graph"]["median"] / floor["ms"]
    assert (row["version"], row["tokens"], row["image_to_video"]) == (version, 24, False)
    assert row["steps"] == dict.fromkeys(row["ms"], 2), "one timed step in each of two turns of no length"
    assert f"LTX-{version}" in printed
    assert row["watts"].keys() == row["ms"].keys()
    assert row["graph"] == {"replays": 1, "captures": 1, "reasons": {}}
    assert "differs_from_stock" in row


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.usefixtures("no_cuda_needed")
def test_a_step_of_ltx_core():
    for needed in ("ltx_core", "einops"):
        pytest.importorskip(needed)
    document, printed = _run(host="ltx-core")
    (row,) = document["model"]
    assert row["mismatch"] is None
    assert row["host"] == "ltx-core"
    assert row["host_version"].startswith("ltx-core ")
    assert row["host_version"] in printed
    assert list(row["ms"]) == ["stock", "bitfuse", "graph"]
    assert row["sites_fused"] == row["sites_seen"] == 16
    assert set(row["of_floor"]) == {"bitfuse", "graph"}
    assert "compile_s" not in row


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.usefixtures("no_cuda_needed")
def test_a_step_of_sglang_stock_is_stock_and_its_own_tier_is_no_way_of_ours(monkeypatch):
    sglang_host.ready()
    from sglang.multimodal_gen.runtime.models.dits import ltx_2

    turn, replaced = bench._Trial.turn, []

    def noting(trial, expected):
        replaced.append(hasattr(ltx_2._ltx2_modulate, "__wrapped__"))
        turn(trial, expected)

    monkeypatch.setattr(bench._Trial, "turn", noting)
    real, mounted = seeded_sglang.mount, []
    monkeypatch.setattr(seeded_sglang, "mount", lambda model: mounted.append(model) or real(model))
    document, printed = _run(host="sglang")
    (row,) = document["model"]
    assert row["mismatch"] is None
    assert list(row["ms"]) == ["stock", "bitfuse", "quality high"]
    assert replaced[:3] == [False, True, False], "SGLang's functions are replaced in bitfuse's turns only"
    assert row["mounted"]
    assert [ltx_2.LTX2_RMS_NORM_MODULATE.is_enabled(model.transformer_blocks[0]) for model in mounted] == [True]
    assert 0 < row["sites_fused"] < row["sites_seen"] == 18, "the text's two attentions of the block are kept by SGLang"
    assert set(row["of_floor"]) == {"bitfuse"}
    assert "SGLang 0.5." in printed


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.usefixtures("no_cuda_needed")
def test_sglangs_tier_that_differs_is_timed_and_said(monkeypatch):
    sglang_host.ready()
    one_step, made = seeded.one_step, []

    def flipping(model, inputs):
        step = one_step(model, inputs)
        made.append(step)
        return step if len(made) < 3 else lambda: (step()[0] + 1, step()[1])

    monkeypatch.setattr(seeded, "one_step", flipping)
    document, printed = _run(host="sglang")
    (row,) = document["model"]
    assert document["equal"] is True
    assert row["mismatch"] is None
    assert row["differs_from_stock"]["bitfuse"] is None
    assert row["differs_from_stock"]["quality high"].startswith("output 0 differs at [")
    assert row["ms"]["quality high"]
    assert "output 0 differs at [" in " ".join(printed.split())


@pytest.mark.usefixtures("launched_as_reference")
@needs_diffusers
@pytest.mark.usefixtures("no_cuda_needed")
def test_a_flipped_bit_gets_no_time(monkeypatch):
    """One bit in the timed rounds of bitfuse with its graph: stock and bitfuse without keep theirs."""
    one_step, made = seeded.one_step, []

    def flipping(model, inputs):
        step, index = one_step(model, inputs), len(made)
        made.append(step)
        calls = 0

        def flipped():
            nonlocal calls
            calls += 1
            video, audio = step()
            if index == 3 and calls == 6:  # stock, two plain ways, graph, compiled; three calls come before the rounds
                video.view(torch.int16).view(-1)[7] ^= 1
            return video, audio

        return flipped

    monkeypatch.setattr(seeded, "one_step", flipping)
    monkeypatch.setattr(bench, "_COMPILE", {"backend": "no such backend"})
    document, printed = _run()
    (row,) = document["model"]
    assert document["equal"] is False
    assert re.match(r"output 0 differs at \[0, 0, 7\]", row["mismatch"])
    assert row["not_timed"]["graph"] == row["mismatch"]
    assert list(row["ms"]) == ["stock", "bitfuse", "text kept"]
    assert not {"floor", "of_floor", "against_compiled_graph"} & set(row)
    assert "not timed" in printed


@pytest.mark.usefixtures("launched_as_reference")
@needs_diffusers
@pytest.mark.usefixtures("no_cuda_needed")
def test_what_an_audit_costs(monkeypatch):
    monkeypatch.setattr(bench, "_AUDIT", 3)
    document = bench.run(Console(file=io.StringIO()), ["audit"], [24], 1, rounds=2)
    (row,) = document["audit"]
    assert row["mismatch"] is None
    assert row["audits"]["calls"] > 0
    assert row["cost"] == row["ms"]["audited"]["median"] / row["ms"]["bitfuse"]["median"] - 1
    monkeypatch.setattr(bench, "_AUDIT", 10**6)
    (row,) = bench.run(Console(file=io.StringIO()), ["audit"], [24], 1, rounds=2)["audit"]
    assert (row["mismatch"], row["cost"]) == ("no call was audited", None)


@pytest.mark.usefixtures("launched_as_reference")
@needs_diffusers
@pytest.mark.usefixtures("no_cuda_needed")
def test_a_step_that_was_not_replayed_is_not_timed_as_a_graph(monkeypatch):
    accelerate = bitfuse.accelerate

    def without_graph(target, cuda_graph=False, **options):
        handle = accelerate(target, cuda_graph, **options)
        if cuda_graph:
            target.graph.replays, target.graph.reasons = 0, {"a hook is registered": 3}
        return handle

    monkeypatch.setattr(bitfuse, "accelerate", without_graph)
    monkeypatch.setattr(bench, "_COMPILE", {"backend": "no such backend"})
    (row,) = _run()[0]["model"]
    assert row["mismatch"] == row["not_timed"]["graph"] == "no graph was replayed: a hook is registered"
    assert list(row["ms"]) == ["stock", "bitfuse", "text kept"]


@needs_diffusers
@pytest.mark.usefixtures("no_cuda_needed")
def test_nothing_fused_gets_no_time():
    bitfuse.disable()
    try:
        document, _ = _run()
    finally:
        bitfuse.enable()
    (row,) = document["model"]
    assert document["equal"] is False
    assert row["mismatch"].startswith("nothing was fused: bitfuse is off")
    assert set(row["not_timed"]) == {"bitfuse", "text kept", "graph"}
    assert list(row["speed_ups"]) == ["compiled", "compiled + graph"]


@pytest.mark.usefixtures("launched_as_reference")
@needs_diffusers
@pytest.mark.usefixtures("no_cuda_needed")
def test_a_compiler_that_fails_costs_only_its_own_times(monkeypatch):
    monkeypatch.setattr(bench, "_COMPILE", {"backend": "no such backend"})
    (row,) = _run()[0]["model"]
    assert row["mismatch"] is None
    assert list(row["ms"]) == ["stock", "bitfuse", "text kept", "graph"]
    assert set(row["not_timed"]) == {"compiled", "compiled + graph"}
    assert "against_compiled_graph" not in row
    assert row["of_floor"]


@needs_diffusers
@pytest.mark.usefixtures("no_cuda_needed")
def test_what_a_fresh_process_prints(monkeypatch, capsys):
    found = {}
    for way in ("stock", "bitfuse"):
        bench.time_first_step(way, "2.3", "24", "1")
        found[way] = json.loads(capsys.readouterr().out)
    assert found["stock"]["sha256"] == found["bitfuse"]["sha256"]
    assert found["stock"]["seconds"] > 0
    assert found["bitfuse"]["sites_fused"] > 0


def test_the_first_step_beyond_stocks(monkeypatch):
    seconds = iter([9.0, 15.0, 7.5, 7.0])
    seen = []

    def process(way, version, tokens, layers, cache):
        seen.append((way, cache))
        return {"seconds": next(seconds), "sha256": "same", "sites_fused": 5}

    monkeypatch.setattr(bench, "_in_fresh_process", process)
    row = bench.first_step(Console(file=io.StringIO()))
    assert row["beyond_stock_s"] == {"empty caches": 8.0, "warm caches": 0.5}
    assert row["mismatch"] is None
    assert [way for way, _ in seen] == ["stock", "bitfuse", "bitfuse", "stock"]
    assert len({cache for _, cache in seen}) == 1


def test_a_fresh_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"the first step \(stock\) failed in its process: Traceback"):
        bench._in_fresh_process("stock", "2.0", 5, 1, "/nonexistent")


# -- operators -----------------------------------------------------------------------------------------------------


def test_every_operator_has_cases_to_time():
    for operator in bitfuse.OPERATORS.values():
        sizes = {bench._size(case) for case in bench.timed_cases(operator)}
        if isinstance(operator.cases[0], (PixelCase, GeluCase)):
            assert len(bench.timed_cases(operator)) == sum(case.real for case in operator.cases) > 0
            continue
        if operator.name in ("swiglu", "qk_rms_norm_grid_rotary", "residual_rms_norm_modulate_weighted"):
            continue  # of the diffusion decoder, at its own sizes: benchmarks/diffusion_decoder.py
        assert sizes <= set(bench.SIZES)
        assert (1, 6144, 4096) in sizes, operator.name


@pytest.mark.usefixtures("no_cuda_needed")
def test_a_row_of_an_operator(monkeypatch, fresh_routes):
    case = next(c for c in SPLIT_FP32.cases if c.name == "head size 40")
    monkeypatch.setattr(bench, "timed_cases", lambda operator: [case])
    document = bench.run(Console(file=io.StringIO()), ["operators"], only_operators=["split_rotary_fp32"])
    (row,) = document["operators"]
    if row["mismatch"] is None:
        assert (row["operator"], row["case"], row["x"]) == ("split_rotary_fp32", "head size 40", [1, 17, 200])
        assert row["bytes"] == 2 * 17 * 200 * 2 + 2 * 17 * 100 * 4
        assert set(row["us"]) == {"fused", "copy", "eager"}
    bitfuse.disable()
    try:
        document = bench.run(Console(file=io.StringIO()), ["operators"], only_operators=["split_rotary_fp32"])
    finally:
        bitfuse.enable()
    assert document["equal"] is False
    assert "us" not in document["operators"][0]


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "everything"], "accepted: operators, overhead, model, audit, first-step"),
        (["--op", "nothing"], "--op nothing is not an operator"),
        (["--ltx", "1.0"], "accepted: 2.0, 2.3, 2.5"),
        (["--tokens", "5"], "accepted: 1536, 6144, 24576, 32640"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


# -- seeded models of every version ---------------------------------------------------------------------------------


@needs_diffusers
@pytest.mark.parametrize("image_to_video", [False, True])
@pytest.mark.parametrize("version", ["2.0", "2.3", "2.5"])
def test_every_version_runs_stock(version, image_to_video):
    geometry = replace(seeded.SMALL, version=version, image_to_video=image_to_video)
    model = seeded.build(geometry, CPU, seed=0)
    block = model.transformer_blocks[0]
    assert (block.attn1.to_gate_logits is not None) == (version != "2.0")
    assert block.scale_shift_table.shape[0] == (6 if version == "2.0" else 9)
    assert hasattr(model, "caption_projection") == (version == "2.0")
    assert (block.ff.net[2].bias is None) == (version == "2.5")
    inputs = seeded.make_inputs(model, geometry, CPU, seed=0)
    seen = {}
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    outputs = seeded.one_step(model, inputs)()
    assert [t.shape[1] for t in outputs] == [geometry.video_tokens, geometry.audio_frames]
    assert all(t.isfinite().all() for t in outputs)
    assert seen["use_cross_timestep"] is True
    assert seen["sigma"].shape == (1,)
    assert ("video_keyframes_mask" in seen) == (version == "2.5")
    frame = geometry.height * geometry.width
    if image_to_video:
        assert seen["timestep"].tolist() == [[0.0] * frame + [1000.0] * (geometry.video_tokens - frame)]
        assert seen["audio_timestep"].tolist() == [1000.0]
    else:
        assert seen["timestep"].tolist() == [1000.0]


@needs_diffusers
def test_a_version_that_is_none():
    with pytest.raises(ValueError, match=r"version is '1\.0'; accepted: 2\.0, 2\.3, 2\.5"):
        replace(seeded.SMALL, version="1.0")


@needs_diffusers
def test_a_twin_shares_every_parameter_and_no_module():
    geometry = replace(seeded.SMALL, frames=2, height=3, width=4, layers=1)
    model = seeded.build(geometry, CPU, seed=0)
    twin = seeded.twin(model)
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert list(ours) == list(theirs)
    assert all(theirs[name] is p for name, p in ours.items())
    assert not set(map(id, model.modules())) & set(map(id, twin.modules()))
    inputs = seeded.make_inputs(model, geometry, CPU, seed=0)
    expected = seeded.one_step(model, inputs)()
    with bitfuse.accelerated(twin) as handle:
        assert bitfuse.compare(expected, seeded.one_step(twin, inputs)()) is None
        fused = sum(site.fused for site in handle.report().sites)
        seeded.one_step(model, inputs)()
        assert sum(site.fused for site in handle.report().sites) == fused, "the other model is stock still"


# -- tables --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MACHINE = {
    "device": "GPU",
    "driver": "1",
    "torch": "2",
    "triton": "3",
    "diffusers": "4",
    "date": "2026-11-24T00:00:00+00:00",
}


def _ms(median):
    return {"median": median, "p10": median, "p90": median}


def _model_row(tokens, **changes):
    ms = {"stock": 480.0, "bitfuse": 320.0, "graph": 300.0, "compiled": 350.0, "compiled + graph": 330.0}
    return {
        "tokens": tokens,
        "version": "2.0",
        "image_to_video": False,
        "layers": 48,
        "steps": dict.fromkeys(ms, 8),
        "mismatch": None,
        "ms": {way: _ms(t) for way, t in ms.items()},
        "speed_ups": {way: 480.0 / t for way, t in ms.items() if way != "stock"},
        "against_compiled_graph": 1.1,
        "of_floor": {"bitfuse": 1.1, "graph": 1.05},
        "peak_gb": {"stock": 2.0, "bitfuse": 1.5, "graph": 1.7},
        **changes,
    }


def test_a_steps_table_is_readable_at_80_columns():
    """Nothing is cut, and what differs stands in whole lines below it."""
    differs = "output 0 differs at [0, 0, 7]: 0x3f81 where the reference has 0x3f80, and 12 of 786432 values differ"
    row = _model_row(
        24576,
        ms={way: _ms(2441.3) for way in ("stock", "bitfuse", "text kept", "compiled")},
        differs_from_stock={"bitfuse": None, "text kept": None, "compiled": differs, "compiled + graph": None},
        not_timed={"compiled + graph": "it does not run here (RuntimeError: no memory)"},
        watts=dict.fromkeys(("stock", "bitfuse"), 714),
        peak_gb={"stock": 12.57, "bitfuse": 10.01},
        host_version="diffusers 0.42.1",
        geometry="48 layers",
        sites_fused=1536,
        sites_seen=1536,
        kernels_ms={},
    )
    printed = io.StringIO()
    bench._print(Console(file=printed, width=80), row)
    lines = printed.getvalue().splitlines()
    assert "…" not in printed.getvalue()
    assert max(len(line) for line in lines if line.startswith(("┃", "│"))) <= 80
    assert (
        len([line for line in lines if re.search(r"bitfuse\W+2441\.3\W+2441\.3\W+2441\.3\W.*714.*10\.01.*equal", line)])
        == 1
    )
    assert f"compiled: {differs}" in lines
    assert "compiled + graph, not timed: it does not run here (RuntimeError: no memory)" in lines


def test_the_operators_table_is_readable_at_80_columns():
    """Every name and every figure in one piece, and a sentence in one line below the table, not in it."""
    names = sorted(bitfuse.OPERATORS, key=len)[-2:]
    differs = "output 0 differs at [0, 0, 7]: 0x3f81 where the reference has 0x3f80, and 12 of 786432 values differ"
    case = "ltx-core: AdaLN per token, no tables"
    row = {"operator": names[1], "case": case, "x": [1, 24576, 4096], "mismatch": None, "of_copy": 1.0234}
    row |= {"us": {way: _ms(12345.6) for way in ("fused", "copy", "eager")}, "speed_up": 10.05}
    red = {"operator": names[0], "case": case, "x": [1, 24576, 4096], "mismatch": differs}
    printed = io.StringIO()
    bench._print_operators(Console(file=printed, width=80), [row, red])
    lines = printed.getvalue().splitlines()
    assert "…" not in printed.getvalue()
    assert max(len(line) for line in lines if line.startswith(("┃", "│"))) <= 80
    for name in names:
        assert [line.strip() for line in lines].count(name) == 1
    (figures,) = [line for line in lines if re.search(r"12345\.6\W+102\.3%\W+12345\.6\W+10\.05x", line)]
    assert "ltx-core: AdaLN" in figures
    assert f"not timed: {case}: {differs}" in lines


def test_the_model_table(tables):
    first = {
        "version": "2.0",
        "beyond_stock_s": {"empty caches": 9.0, "warm caches": 1.25},
    }
    audit = {"version": "2.0", "tokens": 6144, "every": 64, "cost": 0.0042}
    watts = {"stock": 699, "graph": 688}
    documents = [
        {
            "machine": MACHINE,
            "path": "benchmarks/results/a.json",
            "model": [_model_row(24576, watts=watts), _model_row(1536)],
        },
        {
            "machine": MACHINE,
            "path": "benchmarks/results/b.json",
            "model": [
                _model_row(6144, version="2.3"),
                _model_row(6144, image_to_video=True),
                _model_row(6144, host="sglang"),
            ],
            "first_step": [first],
            "audit": [audit],
        },
    ]
    lines = tables.model(documents).splitlines()
    assert lines[2] == (
        "| 1536 | 480 ms | 320 ms, 1.50x | - | 300 ms, 1.60x | 330 ms | 1.10x | 2.0 GB, -25%, -15% "
        "| identical in every bit |"
    )
    assert lines[3].startswith("| 24576 |")
    assert len(lines) == 6
    assert "1.05x at 1536, 1.05x at 24576 tokens" in lines[-1]
    assert "9.0 s longer than stock's with an empty Triton cache, 1.2 s with a warm one" in lines[-1]
    assert "`audit=64` costs 0.4% of a step of 6144 tokens" in lines[-1]
    assert "draws 688 to 699 W" in lines[-1]
    assert "[a.json](benchmarks/results/a.json), [b.json](benchmarks/results/b.json)" in lines[-1]
    assert tables.model(documents, "2.3").splitlines()[2].startswith("| 6144 |")
    with pytest.raises(ValueError, match=r"one row for each number of tokens, not \[6144, 6144\]"):
        tables.model([{"machine": MACHINE, "path": "x", "model": [_model_row(6144), _model_row(6144)]}])


def test_a_way_without_a_time_leaves_a_gap(tables):
    row = _model_row(32640)
    del row["ms"]["compiled + graph"], row["against_compiled_graph"], row["of_floor"]
    line = tables.model([{"machine": MACHINE, "path": "x", "model": [row]}]).splitlines()[2]
    assert "| not timed | - |" in line


def test_the_operators_table(tables):
    def row(operator, x, us):
        return {"operator": operator, "x": x, "us": {"fused": _ms(us)}, "of_copy": 0.954, "speed_up": 12.04}

    rows = [
        row("norm", [1, 6144, 4096], 40.4),
        row("norm", [1, 6144, 4096], 99.0),
        row("norm", [1, 24576, 4096], 142.0),
        row("gate", [1, 6144, 32, 64], 20.0),
        row("small", [1, 126, 2048], 3.0),
        {"operator": "gate", "x": [1, 6144, 4096]},
    ]
    lines = tables.operators([{"machine": MACHINE, "path": "x.json", "operators": rows}]).splitlines()
    assert lines[0] == "| operator | 6144 x 4096 | 6144 x 2048 | 24576 x 4096 |"
    assert lines[2] == "| `norm` | 40 us, 95%, 12.0x | - | 142 us, 95%, 12.0x |"
    assert lines[3] == "| `gate` | not timed | 20 us, 95%, 12.0x | - |"
    assert lines[4] == ""


def test_markers_are_filled_and_other_text_stays(tables, monkeypatch):
    monkeypatch.setitem(tables.TABLES, "operators table", lambda: "NEW")
    text = "a\n<!-- operators table -->\n{}\n<!-- end -->\nb\n<!-- another -->\nc\n<!-- end -->\n"
    assert tables.filled(text.format("old\nold")) == text.format("NEW")


def test_the_newest_document_of_each_name(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name in ("2026-11-23-h100-model", "2026-11-24-h100-model", "2026-11-22-h100-large-model", "2026-11-25-h100-x"):
        (tmp_path / f"{name}.json").write_text("{}")
    paths = [document["path"] for document in tables.newest_of_each("model")]
    assert paths == ["2026-11-22-h100-large-model.json", "2026-11-24-h100-model.json"]


def test_the_committed_rotary_table_still_comes_out(tables):
    table = tables.rotary(tables.newest("rotary"))
    assert "| [1, 6144, 4096], fp32 tables | 72.6 us | 99% | 410.3 us | 5.7x |" in table
    assert "490 ms (488 to 494) | 438 ms (438 to 439) | 1.12x" in table


def test_rounds_stop_where_steps_take_long(monkeypatch):
    monkeypatch.setattr(bench, "_ENOUGH", -1.0)
    monkeypatch.setattr(bench, "_TURN", 0.0)
    monkeypatch.setattr(bench, "energy", lambda device: None)
    monkeypatch.setattr(bench, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    out = (torch.zeros(1), torch.zeros(1))
    trials = {"stock": bench._Trial(lambda: out), "refused": bench._Trial(lambda: out, reason="no")}
    bench._time(trials, out, rounds=8)
    assert [len(trial.ms) for trial in trials.values()] == [2, 0]
    assert bench._figures(trials)["not_timed"] == {"refused": "no"}
