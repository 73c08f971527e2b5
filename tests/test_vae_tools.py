"""The video decoder's sites in the tools: audit, trace, explain; and beside LoRA, offload and layerwise casting."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import warnings

import pytest
import torch
from torch import Tensor

import bitfuse
import tiny
from bitfuse import OPERATORS, BitfuseWarning
from bitfuse.core import launch, proof
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Operator
from bitfuse.hosts.rehearsal import Rehearsal
from bitfuse.hosts.video_coder import CoderSite
from bitfuse.ops import convolution
from bitfuse.ops.convolution import CONVOLUTION
from bitfuse.tools import explain as sites
from bitfuse.tools import parts
from stacking import FEATURES, ORDERS

diffusers = pytest.importorskip("diffusers", minversion="0.38")

from test_vae import BF16, assert_fused, decoded, elementwise, latents, make, reasons  # noqa: E402 (it needs diffusers)
from test_vae import sites as sites_of  # noqa: E402

# What is around the kernels, whose bits other tests look at
pytestmark = pytest.mark.usefixtures("launched_as_reference")
DECODERS = (
    "pixel_norm_silu_pad",
    "residual_pixel_norm_silu_pad",
    "residual_pad",
    "upsample",
    "unpatchify",
)


@pytest.fixture(autouse=True)
def _undecided(undecided_convolutions):
    """Of each test here."""


def one_bit_off(result):
    """The same result with one bit of its first element turned."""
    first = result[0] if isinstance(result, tuple) else result
    first = first.clone()
    first.view(torch.int16)[(0,) * first.ndim] ^= 1
    return (first, *result[1:]) if isinstance(result, tuple) else first


@pytest.fixture
def wrong(monkeypatch, fresh_routes):
    """wrong(name): the kernel of this operator turns a bit from now on."""
    runner = Operator._runner

    def plant(name):
        def other(operator, plan, args):
            run = runner(operator, plan, args)
            return run if operator.name != name else lambda *given: one_bit_off(run(*given))

        monkeypatch.setattr(Operator, "_runner", other)
        OPERATORS[name].forget()

    return plant


@pytest.fixture
def convolution_on_a_cpu(monkeypatch):
    """Convolutions count as proved here, too; their results are those that an audit compares with."""
    monkeypatch.setattr(convolution, "_why_elsewhere", lambda x: None)
    monkeypatch.setattr(convolution, "_difference", lambda *args: (None, None))
    monkeypatch.setattr(convolution, "_channels_last", CONVOLUTION.reference)


# -- audit -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("convolution_on_a_cpu")
def test_an_audit_computes_every_fused_call_again():
    vae = make("noise")
    with bitfuse.accelerated(vae, audit=1) as handle:
        decoded(vae)
        report = handle.report()
        assert (report.auditor.calls, report.auditor.mismatches) == (len(sites_of(handle)), 0)
        assert set(report.auditor.sites) == {site.name for site in sites_of(handle)}
        assert report.fused == len(sites_of(handle))


@pytest.mark.parametrize("name", DECODERS)
def test_a_kernel_that_an_audit_sees_to_differ_is_used_no_more(name, wrong):
    vae = make()
    expected = decoded(vae)
    wrong(name)
    handle = bitfuse.accelerate(vae, audit=1)
    for _ in OPERATORS[name].tiers:  # each is wrong here
        with warnings.catch_warnings(record=True) as found:
            decoded(vae)
        assert {w.category for w in found} <= {BitfuseWarning}
    assert handle.report().auditor.condemned
    before = {site.name: site.fused for site in sites_of(handle) if site.operator == name}
    for _ in range(2):
        assert bitfuse.compare(expected, decoded(vae)) is None
    assert {site.name: site.fused for site in sites_of(handle) if site.operator == name} == before
    handle.restore()


@pytest.mark.usefixtures("convolution_on_a_cpu")
def test_a_convolution_that_an_audit_sees_to_differ_is_used_no_more(monkeypatch):
    right = CONVOLUTION.reference
    monkeypatch.setattr(convolution, "_channels_last", lambda *args: one_bit_off(right(*args)))
    vae = make()
    expected = decoded(vae)
    with bitfuse.accelerated(vae, audit=1) as handle:
        with pytest.warns(BitfuseWarning, match="convolution by channels last"):
            decoded(vae)
        before = {site.name: site.fused for site in sites_of(handle) if site.operator == "convolution"}
        assert bitfuse.compare(expected, decoded(vae)) is None
        assert {site.name: site.fused for site in sites_of(handle) if site.operator == "convolution"} == before
        assert all("in an audited call at" in reason for reason in reasons(handle))


# -- trace -------------------------------------------------------------------------------------------------------------


def test_a_trace_of_a_decode_is_equal_and_names_a_wrong_kernel(wrong):
    vae = make()

    def traced():
        return bitfuse.trace(vae.decode, vae.decode, (latents(),), model=vae, around_b=lambda: bitfuse.accelerated(vae))

    assert traced() is None
    wrong("upsample")
    found = traced()
    assert (found.kind, found.run, found.operator) == ("site", "model_b", "upsample")
    assert found.place == "decoder.up_blocks.0.upsamplers.0.upsample"
    assert "  1 of " in str(found)
    assert "the output of model_b's fused operator differs" in str(found)


def test_a_trace_of_two_decoders_finds_a_weight():
    stock, vae = make(), make()
    with torch.no_grad():
        vae.decoder.conv_out.conv.bias.add_(1)
    bitfuse.accelerate(vae)
    found = bitfuse.trace(stock.decoder, vae.decoder, (latents(),))
    assert found.kind == "output"
    assert any("conv_out.conv.bias" in note for note in found.notes)


# -- explain -----------------------------------------------------------------------------------------------------------

STATES = {sites.FUSED: "fused", sites.CHAIN: "fallen back"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny", layers=1)


def explained(folder, dtype=BF16):
    found = sites.explain(
        sites.from_config(str(folder), dtype), 8, name="tiny", parts=tuple(parts.of_pipeline(str(folder), dtype))
    )
    return {kind.name: kind for kind in found.kinds}, found


def test_a_pipelines_decoder_and_connectors_are_explained_as_they_are_done(folder):
    kinds, found = explained(folder)
    pipe = diffusers.LTX2Pipeline.from_pretrained(folder, torch_dtype=BF16)
    pipe.set_progress_bar_config(disable=True)
    with bitfuse.accelerated(pipe) as handle:
        call = {**tiny.CALL, **tiny.UNGUIDED, "generator": torch.Generator().manual_seed(0)}
        pipe(prompt="a red fox", output_type="pt", **call)
        with torch.no_grad():
            pipe.vae.encode(torch.zeros(1, 3, 9, 64, 64, dtype=BF16))
        done = {kind["name"]: kind for kind in handle.report().kinds() if kind["name"] != "video_processor"}
    assert set(kinds) == set(done)
    for name, kind in kinds.items():
        assert kind.operator == done[name]["operator"]
        if kind.operator == CONVOLUTION.name:  # on a CPU the host's own
            assert (kind.state, kind.tier) == (sites.FUSED, "channels last")
        else:
            assert STATES[kind.state] == done[name]["state"], name
    assert found.seen == sum(site.name != "video_processor" for site in handle.sites)
    assert any(name.startswith("decoder.") for name in kinds)
    assert any(name.startswith("encoder.") for name in kinds)
    assert any(name.startswith("connectors.") for name in kinds)
    told = "a decode of latents [1, 16, 16, 16, 24], an encode of a video [1, 3, 9, 512, 768]"
    assert f"a prompt of 1024 tokens; {told}" in found.geometry
    assert kinds["decoder.conv_out"].arguments["x"].endswith(", channels_last_3d")


def test_a_decoder_that_is_not_in_bf16_is_explained_by_its_reason(folder):
    kinds, _ = explained(folder, torch.float16)
    decoder = {name: kind for name, kind in kinds.items() if name.startswith("decoder.")}
    assert {kind.state for kind in decoder.values()} == {sites.CHAIN}
    assert {reason for kind in decoder.values() for reason in kind.reasons} == {
        "hidden_states is a torch.Tensor of torch.float16; accepted: a plain tensor of torch.bfloat16"
    }


def test_a_diffusion_decoder_is_explained(folder, tmp_path):
    upstream = pytest.importorskip("diffusers.models.autoencoders.ltx2_diffusion_decoder")
    with torch.device("meta"):
        model = upstream.LTX2VideoDiffusionDecoderModel(decoder_stage_depths=(1, 1, 1, 1, 1))
    (tmp_path / "diffusion_decoder").mkdir()
    config = {"_class_name": type(model).__name__, **model.config}
    (tmp_path / "diffusion_decoder" / "config.json").write_text(json.dumps(config))
    (part,) = parts.of_pipeline(str(tmp_path))
    kinds = sites._looked_at(part.model, part.forward, part.sentence, torch.no_grad()).kinds
    assert sum(kind.count for kind in kinds) == 16
    assert {kind.state for kind in kinds} == {sites.FUSED}


def test_a_part_that_cannot_be_built_gets_one_line(folder, tmp_path):
    (tmp_path / "vae").mkdir()
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps({"_class_name": "AutoencoderKLLTX2Video", "block_out_channels": "x"}))
    with pytest.raises(ValueError, match="vae: no AutoencoderKLLTX2Video can be built from its config") as raised:
        list(parts.of_pipeline(str(tmp_path)))
    assert "\n" not in str(raised.value)
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds a list; accepted: an object"):
        list(parts.of_pipeline(str(tmp_path)))
    file.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert list(parts.of_pipeline(str(tmp_path))) == []


# -- beside what others put there --------------------------------------------------------------------------------------

HOOKED = "a hook is attached to mid_block.resnets.0.conv1.conv, which is not called when the decoder is fused"
BESIDE = {  # the reason; None: it is fused
    "model offload": None,
    "sequential offload": HOOKED,
    "group offload, blocks": None,  # the autoencoder itself is the block
    "group offload, leaves": HOOKED,
    "fp8 layerwise casting": HOOKED,
    "fp8 casting, leaves offloaded": HOOKED,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BESIDE)
def test_weights_that_hooks_bring_give_stocks_bits(name, order):
    feature = next(feature for feature in FEATURES if feature.name == name)
    if feature.missing:
        pytest.skip(f"{', '.join(feature.missing)} is not installed")
    check_beside(feature.use, order, BESIDE[name])


def lora(*targets):
    def use(vae):
        import peft

        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False)
        peft.inject_adapter_in_model(config, vae)
        for name, parameter in vae.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.to(BF16)

    return use


LORAS = {  # of which convolutions; the reason
    "conv1.conv": "mid_block.resnets.0.conv1.conv is a peft.tuners.lora.layer.Conv3d, not torch.nn.modules.conv.Conv3d",
    "conv_out.conv": "conv_out.conv is a peft.tuners.lora.layer.Conv3d, not torch.nn.modules.conv.Conv3d",
    "conv_in.conv": None,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("target", LORAS)
def test_a_lora_of_a_convolution(target, order):
    pytest.importorskip("peft")
    check_beside(lora(target), order, LORAS[target])


def check_beside(use, order, reason):
    stock, vae = make(), make()
    use(stock)
    expected = decoded(stock)
    if order == ORDERS[0]:
        use(vae)
    handle = bitfuse.accelerate(vae)
    if order == ORDERS[1]:
        use(vae)
    for _ in range(2):
        assert bitfuse.compare(expected, decoded(vae)) is None
    if reason is None:
        assert_fused(handle)
    else:
        assert reasons(handle) == {reason}
        assert not any(site.fused for site in sites_of(handle))
    handle.restore()
    assert bitfuse.compare(expected, decoded(vae)) is None


def test_a_lora_that_is_merged_for_good_is_fused():
    peft = pytest.importorskip("peft")
    stock, vae = make(), make()
    handle = bitfuse.accelerate(vae)
    tuners = []
    for v in (stock, vae):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["conv1.conv"], init_lora_weights=False)
        tuners.append(peft.get_peft_model(v, config))
    assert bitfuse.compare(decoded(stock), decoded(vae)) is None
    assert len(reasons(handle)) == 1
    for tuner in tuners:
        tuner.merge_and_unload()
    assert bitfuse.compare(decoded(stock), decoded(vae)) is None
    assert all(site.fused == 1 for site in elementwise(handle))


# -- the rehearsal -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch, fresh_routes):
    """The kernels that a rehearsal compiles, by what a signature has of them: here there is nothing to compile."""
    found = []
    monkeypatch.setattr(Rehearsal, "compiles", lambda self: True)

    def compile(plan, args):
        assert sum(a.numel() for a in args if isinstance(a, Tensor)) <= 16 * len(args)
        assert all(out.shape == (1,) for out in plan.outputs)
        found.append(kernel_of(plan.signature(args)))

    monkeypatch.setattr(Plan, "compile", compile)
    monkeypatch.setattr(Plan, "load", lambda plan, args: None)
    return found


def kernel_of(signature):
    """Which compiled kernel a signature is of: its source and constants, dtypes, alignment, and classes of numbers."""
    kernel, _, _, pointers, extras, _, scalars, _ = signature
    return kernel, tuple(None if p is None else p[:2] for p in pointers), extras, scalars


@pytest.mark.parametrize("config", ["2.0", "2.3", "2.0, not causal, zeros at the edges"])
def test_every_kernel_of_a_size_is_compiled_before_its_first_decode(config, compiled):
    vae = make(config)
    sizes = [latents(), latents(frames=1, height=3, width=4)]
    expected = [decoded(vae, z) for z in sizes]
    handle = bitfuse.accelerate(vae)
    for z, right in zip(sizes, expected, strict=True):
        assert bitfuse.compare(right, decoded(vae, z)) is None
        tiers = {name: operator.tiers[0].name for name, operator in OPERATORS.items()}
        proved = {kernel_of(signature) for name, tier, signature in proof.verdicts() if tier == tiers[name]}
        assert set(compiled) == proved
        assert len(compiled) == len(set(compiled)), "each once"
    before = len(compiled)
    for z, right in zip(sizes, expected, strict=True):
        assert bitfuse.compare(right, decoded(vae, z)) is None
    assert len(compiled) == before
    assert {site.fused for site in elementwise(handle)} == {4}, "nothing counts but decodes"
    assert_fused(handle)


@pytest.mark.parametrize("config", ["timestep", "noise"])
def test_no_rehearsal_where_modules_would_be_called_or_numbers_drawn_twice(config, compiled):
    vae = make(config)
    expected = decoded(vae)
    bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert compiled == []


@pytest.mark.parametrize("use", [lora("conv_in.conv")], ids=["a LoRA on the first convolution"])
def test_a_rehearsal_with(use, compiled):
    pytest.importorskip("peft")
    vae = make()
    use(vae)
    expected = decoded(vae)
    bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert compiled


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError])
def test_a_rehearsal_that_fails_fails_no_decode(error, compiled, monkeypatch):
    vae = make()
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)

    def fails(*_):
        raise error("no memory is left")

    monkeypatch.setattr(Operator, "dry", fails)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert_fused(handle)


def test_a_decode_goes_on_while_kernels_are_compiled_that_it_needs_later(compiled, monkeypatch):
    """No thread is left when it ends."""
    vae, begun, threads = make(), threading.Event(), set()
    expected = decoded(vae)
    compile, prove = Plan.compile, proof.prove

    def slow(plan, args):
        threads.add(threading.current_thread())
        assert begun.wait(60)
        compile(plan, args)

    def proving(*args):
        begun.set()
        return prove(*args)

    monkeypatch.setattr(Plan, "compile", slow)
    monkeypatch.setattr(proof, "prove", proving)
    bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert compiled
    assert not any(thread is threading.main_thread() or thread.is_alive() for thread in threads)
    assert launch.under_way == {}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_first_decode_leaves_no_thread_behind_and_the_next_one_is_right(error, compiled, monkeypatch):
    vae, found = make(), []
    expected = decoded(vae)
    compile = Plan.compile

    def slow(plan, args):
        time.sleep(0.2)
        compile(plan, args)

    def call():
        try:
            found.append(decoded(vae))
        except (RuntimeError, KeyboardInterrupt) as raised:
            found.append(raised)

    def fails(*_):
        assert launch.under_way
        raise error("in the midst of it")

    monkeypatch.setattr(Plan, "compile", slow)
    monkeypatch.setattr(Rehearsal, "THREADS", 2)
    handle = bitfuse.accelerate(vae)
    with monkeypatch.context() as patch:
        patch.setattr(CoderSite, "call", fails)
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    assert launch.under_way == {}
    assert not any(thread.name.startswith("bitfuse") for thread in threading.enumerate())
    if error is torch.OutOfMemoryError:
        assert bitfuse.compare(expected, found[0]) is None
        assert {"ran out of memory" in reason for reason in reasons(handle)} == {True}
    else:
        assert type(found[0]) is error
        assert bitfuse.compare(expected, decoded(vae)) is None
        assert_fused(handle)


@pytest.mark.parametrize("method", ["compile", "load"])
def test_a_kernel_that_fails_in_a_thread_is_no_error_of_the_decode(method, compiled, monkeypatch):
    """It is compiled where it is called, and why it can't be is said there."""
    vae = make()
    expected = decoded(vae)

    def fails(*_):
        raise SystemExit("no such instruction")

    monkeypatch.setattr(Plan, method, fails)
    handle = bitfuse.accelerate(vae)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert_fused(handle)
    assert launch.under_way == {}


def test_two_threads_decode_at_once(compiled, monkeypatch):
    """One model in both, and another in a third: one compiles, and whoever needs a kernel of it waits."""
    vae, other, found = make(), make("2.3"), {}
    expected = [decoded(vae), decoded(vae), decoded(other)]
    compile, together = Plan.compile, threading.Barrier(3)

    def slow(plan, args):
        time.sleep(0.05)
        compile(plan, args)

    def call(number, model):
        together.wait(60)
        found[number] = decoded(model)

    monkeypatch.setattr(Plan, "compile", slow)
    handles = bitfuse.accelerate(vae), bitfuse.accelerate(other)
    threads = [
        threading.Thread(target=call, args=(number, model), daemon=True)
        for number, model in enumerate((vae, vae, other))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    assert [bitfuse.compare(right, found[number]) for number, right in enumerate(expected)] == [None] * 3
    for handle in handles:
        assert_fused(handle)
    assert launch.under_way == {}


def test_a_restore_while_kernels_are_compiled(compiled, monkeypatch):
    vae = make()
    expected = decoded(vae)
    handle, compile = bitfuse.accelerate(vae), Plan.compile

    def restoring(plan, args):
        handle.restore()
        compile(plan, args)

    monkeypatch.setattr(Plan, "compile", restoring)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert "forward" not in vae.decoder.__dict__
    assert launch.under_way == {}
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert {site.fused for site in elementwise(handle)} == {1}


def test_triton_is_made_ready_when_a_decoder_is_taken_over(monkeypatch):
    devices = []
    monkeypatch.setattr("bitfuse.hosts.rehearsal.start_up", devices.append)
    with bitfuse.accelerate(make()):
        assert {device.type for device in devices} == {"cpu"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_no_thread_is_left_where_a_decode_ends_early(error, compiled, monkeypatch):
    vae, threads, count = make(), set(), []
    monkeypatch.setattr(Plan, "compile", lambda plan, args: (threads.add(threading.current_thread()), time.sleep(0.1)))

    def ended(site, operator, *args):
        count.append(operator)
        raise error

    monkeypatch.setattr("bitfuse.hosts.video_coder.CoderSite.call", ended)
    handle = bitfuse.accelerate(vae)
    with pytest.raises(error) if error is KeyboardInterrupt else contextlib.nullcontext():
        decoded(vae)
    assert len(count) == 1
    assert not any(thread.is_alive() for thread in threads)
    handle.restore()


def test_what_a_thread_cannot_compile_is_no_error_of_the_decode(compiled, monkeypatch):
    vae = make()
    expected = decoded(vae)
    handle = bitfuse.accelerate(vae)

    def fails(plan, args):
        raise OSError("no space is left on the device")

    monkeypatch.setattr(Plan, "compile", fails)
    assert bitfuse.compare(expected, decoded(vae)) is None
    assert_fused(handle)


def test_while_one_thread_rehearses_another_decodes(compiled, monkeypatch):
    vae, other = make(), latents(frames=1)
    expected = [decoded(vae), decoded(vae, other)]
    bitfuse.accelerate(vae)
    decoded(vae, other)
    dry, begun, found = Operator.dry, [], []

    def slow(operator, *args):
        if not begun:
            begun.append(True)
            thread = threading.Thread(target=lambda: found.append(decoded(vae, other)))
            thread.start()
            thread.join()
        return dry(operator, *args)

    monkeypatch.setattr(Operator, "dry", slow)
    assert bitfuse.compare(expected[0], decoded(vae)) is None
    assert bitfuse.compare(expected[1], found[0]) is None


def test_an_interrupt_in_a_rehearsal_leaves_nothing_behind(compiled, monkeypatch):
    vae = make()
    expected = decoded(vae)
    bitfuse.accelerate(vae)
    with monkeypatch.context() as patch:

        def interrupted(*_):
            raise KeyboardInterrupt

        patch.setattr(Operator, "dry", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoded(vae)
    assert bitfuse.compare(expected, decoded(vae)) is None
