"""What the first decode or encode of a size costs: memory beside stock's, at real sizes, on PyTorch's meta device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes as no_dispatch

import bitfuse
from bitfuse import OPERATORS
from bitfuse.core import conditions, proof, volume_mean, volumes
from bitfuse.core import operator as routing
from bitfuse.core.bits import as_tuple, compare, compare_parts
from bitfuse.core.launch import Plan
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.values import every_16_bit_pattern
from bitfuse.core.volume_mean import emulated_mean, order_of
from bitfuse.hosts.rehearsal import Rehearsal
from bitfuse.hosts.video_coder import Pending
from bitfuse.ops import (
    convolution,
    depth_to_space_evidence,  # noqa: F401 (it names a Generator, which is replaced below)
    pixel_norm,
)
from bitfuse.ops import pixel_norm_evidence as evidence
from bitfuse.ops.convolution import CONVOLUTION
from bitfuse.ops.pixel_norm import convolved
from live_bytes import LiveBytes

diffusers = pytest.importorskip("diffusers", minversion="0.38")
upstream = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_ltx2")

LAST = torch.channels_last_3d
SIZES = {  # frames, height and width of the latents; how much of stock's peak the first and the second decode may have
    "121 frames of 768x512": ((16, 16, 24), (0.85, 0.6)),
    "121 frames of 1536x1024": ((16, 32, 48), (0.85, 0.6)),
    "a frame of 1536x1024": ((1, 32, 48), (1.05, 0.6)),
}
VIDEOS = {  # what is encoded: (frames, height, width); as above. Of an image a weight is most: 226 MB, and its probe's
    "a frame of 768x512": ((1, 512, 768), (3.0, 0.4)),
    "a frame of 1536x1024": ((1, 1024, 1536), (1.05, 0.4)),
    "121 frames of 768x512": ((121, 512, 768), (0.87, 0.6)),
    "121 frames of 1536x1024": ((121, 1024, 1536), (0.87, 0.6)),
}


@pytest.fixture(autouse=True)
def _undecided(fresh_routes):
    CONVOLUTION.forget()
    yield
    CONVOLUTION.forget()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Meta tensors are taken for a GPU's: calls are proved, and what is compared counts as equal."""

    def consumed(parts, found):
        for _ in parts:
            pass

    def runner(operator, plan, args):
        def run(*given):
            outs = plan.empty(given[0].device)[len(plan.witnesses) :]
            return outs[0] if len(outs) == 1 else outs

        return run

    def conv3d(x, *rest):
        """As cuDNN's, in the layout of the volume."""
        if x.is_contiguous():
            return F.conv3d(x, *rest)
        with no_dispatch():
            shape = F.conv3d(x, *rest).shape
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)

    def quiet(arguments):
        yield from ()

    monkeypatch.setattr(proof, "run_battery", lambda *args: proof.Verdict(True, "equal"))  # of small volumes: see below
    monkeypatch.setattr(proof, "compare_parts", consumed)
    monkeypatch.setattr(routing, "_layout", lambda args: tuple(map(form, args)))  # meta tensors have no memory
    monkeypatch.setattr(routing, "_launched", lambda plan, *args: plan.empty(args[0].device))
    monkeypatch.setattr(Operator, "_runner", runner)
    for module in ("bitfuse.core.volumes", "bitfuse.core.conditions"):
        monkeypatch.setattr(f"{module}.runnable", quiet)
    monkeypatch.setattr(pixel_norm, "added_number", lambda *args: 1e-8)
    monkeypatch.setattr(convolution, "_why_elsewhere", lambda x: None)
    monkeypatch.setattr(convolution, "compare_parts", consumed)
    monkeypatch.setattr(convolution, "F", SimpleNamespace(conv3d=conv3d))
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    monkeypatch.setattr(conditions, "_dispatch_modes", lambda: 0)  # `LiveBytes`, which only counts


def form(value):
    return (value.shape, value.stride()) if isinstance(value, Tensor) else value


def peak(call, given: Tensor) -> LiveBytes:
    with torch.no_grad(), LiveBytes(meta=True) as live:
        call(given, return_dict=False)
    return live


def sites(handle, of: str) -> list:
    return [site for site in handle.sites if site.name.partition(".")[0] == of]


def real():
    with torch.device("meta"):
        vae = upstream.AutoencoderKLLTX2Video(
            decoder_causal=False, spatial_compression_ratio=32, temporal_compression_ratio=8
        )
    return torch.nn.Module.to(vae, torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("size", SIZES)
def test_the_first_decode_holds_no_more_than_stocks(size):
    """It had 47.1 GB where stock has 22.4 (121 frames of 1536x1024, H200, 2026-11-29)."""
    shape, (first_at_most, second_at_most) = SIZES[size]
    vae, z = real(), torch.empty(1, 128, *shape, dtype=torch.bfloat16, device="meta")
    stock = peak(vae.decode, z)
    handle = bitfuse.accelerate(vae)
    first, second = peak(vae.decode, z), peak(vae.decode, z)
    assert {site.state for site in sites(handle, "decoder")} == {"fused"}, handle.report()
    assert first.peak <= first_at_most * stock.peak
    assert second.peak <= second_at_most * stock.peak
    assert stock.ops > 3 * second.ops


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("size", VIDEOS)
def test_the_first_encode_holds_no_more_than_stocks(size):
    shape, (first_at_most, second_at_most) = VIDEOS[size]
    vae, x = real(), torch.empty(1, 3, *shape, dtype=torch.bfloat16, device="meta")
    stock = peak(vae.encode, x)
    handle = bitfuse.accelerate(vae)
    first, second = peak(vae.encode, x), peak(vae.encode, x)
    assert {site.state for site in sites(handle, "encoder")} == {"fused"}, handle.report()
    assert first.peak <= first_at_most * stock.peak
    assert second.peak <= second_at_most * stock.peak
    assert stock.ops > 2.8 * second.ops


@pytest.mark.parametrize("size", SIZES)
def test_batteries_are_small_however_large_the_volumes_are(size):
    frames, height, width = SIZES[size][0]
    for channels, scale in ((1024, 1), (512, 2), (256, 4), (128, 8)):
        sides = (1 + (frames - 1) * scale, height * scale, width * scale)
        y = torch.empty(1, channels, *sides, dtype=torch.bfloat16, device="meta").to(memory_format=LAST)
        with evidence._as_one(y, reference=pixel_norm.pixel_norm_silu_pad):
            small = evidence._small(y, normed=True)
            assert small is not None
            assert torch.Size(small).numel() * channels <= 1 << 19
            assert [a == 1 for a in small[1:]] == [a == 1 for a in sides]


# -- the references, piece by piece ------------------------------------------------------------------------------------

OF_VOLUMES = [name for name, operator in OPERATORS.items() if operator.evidence.parts is not None]


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setattr(volumes, "_PIECE", 1)


def cases(name):
    return [case for case in OPERATORS[name].cases if not case.real or "modulated" in case.name]


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("name", OF_VOLUMES)
def test_the_pieces_are_the_whole_reference(name):
    operator, most = OPERATORS[name], 0
    for case in cases(name):
        args = case.arguments("cpu", tokens=24)
        whole = as_tuple(operator.reference(*args))
        seen = [torch.zeros(t.shape, dtype=torch.int32) for t in whole]
        for number, place, expected in operator.evidence.parts(*args):
            seen[number][place] += 1
            assert compare(whole[number][place].contiguous(), expected.contiguous()) is None, case.name
            most = max(most, place[2].start)
        assert all((t == 1).all() for t in seen), case.name
    assert most > 0, "there were several"


@pytest.mark.usefixtures("in_pieces")
def test_the_witness_comes_first():
    operator = OPERATORS["pixel_norm_silu_pad"]
    args = cases(operator.name)[0].arguments("cpu", tokens=24)
    number, _, mean = next(operator.evidence.parts(*args, witness=True))
    assert number == 0
    assert compare(operator.specification(0)(*args)[0], mean) is None


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("name", OF_VOLUMES)
def test_a_bit_in_any_piece_is_found(name):
    operator = OPERATORS[name]
    args = cases(name)[0].arguments("cpu", tokens=24)
    whole = as_tuple(operator.reference(*args))
    for number, t in enumerate(whole):
        for flat in (0, t.numel() // 2, t.numel() - 1):
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), t.shape))
            found = [one.clone() for one in whole]
            found[number].view(torch.int16)[index] ^= 1
            mismatch = compare_parts(operator.evidence.parts(*args), tuple(found))
            assert (mismatch.count, mismatch.output) == (1, number)
            assert index[3:] == mismatch.index[3:]
            assert ("in the piece from" in mismatch.sentence) == (index[2] != mismatch.index[2])


def test_pieces_differ_in_dtype_and_shape_too_and_nan_is_nan():
    ones, nans = torch.ones(1, 1, 2, 2, 2), torch.full((1, 1, 2, 2, 2), float("nan"))
    place = (slice(None),)
    assert compare_parts([(0, place, ones)], (ones.double(),)).sentence.startswith("the dtype is torch.float64")
    assert compare_parts([(0, place, ones[..., :1])], (ones,)).sentence.startswith("the shape is")
    assert compare_parts([(0, place, nans)], (nans.view(torch.int32).add(1).view(torch.float32),)) is None
    assert compare_parts([(0, place, -0.0 * ones)], (0.0 * ones,)).count == 8
    assert compare_parts([], (ones,)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's ATen adds up otherwise, which is emulated here")
@pytest.mark.usefixtures("fresh_routes")
@pytest.mark.parametrize("wrong", [False, True])
def test_small_volumes_stand_for_one_that_is_added_up_in_halves(wrong, monkeypatch):
    """As those of more than 2^31 bytes are; here of more than 2^19."""
    operator, specification = pixel_norm.PIXEL_NORM_SILU_PAD, Operator.specification
    on_cpu = lambda o, tier, device="cpu", emulated=False: specification(o, tier, device, emulated)  # noqa: E731
    monkeypatch.setattr(Operator, "specification", on_cpu)
    monkeypatch.setattr(volume_mean, "_LARGEST", 2**19 - 1)

    def means(square):
        mean = emulated_mean(square, order_of(tuple(square.shape), 2, torch.device("cpu")))
        return mean.to(torch.bfloat16), mean.contiguous()

    monkeypatch.setattr(evidence, "_means", means)
    proved, run_battery = [], proof.run_battery

    def noted(reference, plan_of, battery, signature):
        families = list(battery)
        proved.extend(args[0].numel() for _, args in families)
        return run_battery(reference, plan_of, families, signature)

    monkeypatch.setattr(proof, "run_battery", noted)
    if wrong:
        mutant = next(m for m in operator.mutants if m.name == "four accumulators added in pairs")
        stock = SimpleNamespace(tiers=operator.tiers)
        monkeypatch.setattr(operator, "tiers", (Tier("wrong", lambda *args: mutant.plan(stock, *args)),))
    y = torch.randn(1, 7, 24, 32, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).movedim(-1, 1)
    args = (y, None, None, None, None, None, 1, 1, 1, 1e-8)
    assert operator.tiers[0].plan(*args).constants["HALVES"] == 2
    route = operator.route(*args)
    assert max(proved) <= 1 << 16
    if wrong:
        assert "on the battery's 'wide' inputs" in route.reason
    else:
        assert (route.reason, route.tier) == (None, "single pass")
        assert len(proved) == 7


@pytest.mark.usefixtures("fresh_routes")
def test_a_layout_that_there_is_no_memory_to_compare_is_not_fused(monkeypatch):
    """Nor is it kept: the next call tries again."""
    operator = pixel_norm.PIXEL_NORM_SILU_PAD
    args = operator.cases[-1].arguments("cpu", tokens=24)

    def out_of_memory(square):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(proof, "run_battery", lambda *args: proof.Verdict(True, "equal"))
    with monkeypatch.context() as patch:
        patch.setattr(evidence, "_means", out_of_memory)
        route = operator.route(*args)
        assert route.passed_over == ("single pass: the device ran out of memory while it was being prepared",)
        assert (route.tier, route.lasts) == ("ATen's mean", False)
        assert compare(operator.reference(*args), route.run(*args)) is None
    again = operator.route(*args)
    assert again.lasts
    assert not any("memory" in sentence for sentence in again.passed_over)


@pytest.mark.gpu
def test_on_a_gpu_the_first_decode_holds_no_more_than_stocks(device):
    """As counted on the meta device; with every bit, and every kernel compiled beforehand."""
    vae = real().to_empty(device=device)
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
        z = torch.randn(1, 128, 4, 16, 24, device=device).to(torch.bfloat16)

        def decoded():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            video = vae.decode(z, return_dict=False)[0]
            return video, torch.cuda.max_memory_allocated() - before

        expected, of_stock = decoded()
        handle = bitfuse.accelerate(vae)
        for most in (1.0, 0.7):
            found, held = decoded()
            assert compare(expected, found) is None
            assert held <= most * of_stock
        assert {site.state for site in sites(handle, "decoder")} == {"fused"}, handle.report()


# -- what is compiled --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("coder", "shape", "kernels"), [("decode", (128, 16, 16, 24), 12), ("encode", (3, 121, 512, 768), 15)]
)
def test_a_first_call_has_few_kernels(coder, shape, kernels, monkeypatch):
    """A decode's 19 took 7.8 s to compile with 16 cores, side by side (H200, 2026-11-29)."""
    compiled = []
    monkeypatch.setattr(Rehearsal, "compiles", lambda self: True)
    monkeypatch.setattr(Plan, "compile", lambda plan, args: compiled.append(plan))
    monkeypatch.setattr(Plan, "load", lambda plan, args: None)
    vae = real()
    with bitfuse.accelerated(vae), torch.no_grad():
        getattr(vae, coder)(torch.empty(1, *shape, dtype=torch.bfloat16, device="meta"))
    assert len(compiled) == kernels


def test_a_bias_of_negative_zero_alters_no_bit(device):
    """What stands where there is no bias (`Pending.taken`)."""
    every = every_16_bit_pattern(torch.bfloat16, device)
    assert compare(every, every + every.new_full((), -0.0)) is None
    assert compare(every, every + every.new_full((), 0.0)) is not None
    y = every.view(1, 256, 1, 16, 16)
    _, _, bias, _, _ = Pending(y).taken()
    assert compare(convolved(y, None, None, None), convolved(y, bias, None, None)) is None
    assert Pending(y, every[:256]).taken()[2] is not None
