"""What only a GPU can show: exhaustive sweeps, huge offsets, graphs, streams, devices, the real geometries."""

from __future__ import annotations

import itertools

import pytest
import torch

import bitfuse
from bitfuse.core import values
from bitfuse.core.bits import as_tuple
from bitfuse.core.inputs import poisoned
from bitfuse.ops.rope_evidence import RotaryCase
from common import ROTARY, tensors_of

pytestmark = pytest.mark.gpu

BY_NAME = bitfuse.OPERATORS


def need_memory(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free device memory")


def table_dtype(operator):
    return torch.float32 if operator.name.endswith("fp32") else torch.bfloat16


def is_interleaved(operator):
    return operator.name.startswith("interleaved")


def assert_fused_and_equal(operator, *tensors):
    route = operator.route(*tensors)
    assert route.reason is None
    mismatch = bitfuse.compare(operator.reference(*tensors), operator(*tensors))
    assert mismatch is None, mismatch.sentence


@pytest.mark.parametrize(
    ("operator", "case"),
    [(o, c) for o in BY_NAME.values() for c in o.cases],
    ids=lambda v: v.name,
)
def test_every_case_at_its_full_size(operator, case):
    assert_fused_and_equal(operator, *case.arguments("cuda"))


@pytest.mark.parametrize("operator", ROTARY, ids=lambda o: o.name)
def test_all_bf16_values_of_x_against_sampled_tables(operator):
    """Every one of the 65,536 values as x1 and as x2, against 4,096 (cos, sin) pairs, ties among them."""
    generator = torch.Generator("cuda").manual_seed(3)
    dtype = table_dtype(operator)
    every = values.every_16_bit_pattern(torch.bfloat16, "cuda")
    other = every[torch.randperm(every.numel(), generator=generator, device="cuda")]
    angle = torch.randn(3072, device="cuda", generator=generator) * 1e3
    ties = values.significands(dtype, 512, generator), values.significands(dtype, 512, generator) * 2**-8
    specials = values.specials(dtype, "cuda")
    pick = torch.randint(specials.numel(), (2, 512), device="cuda", generator=generator)
    cos = torch.cat([angle.cos().to(dtype), ties[0], specials[pick[0]]])
    sin = torch.cat([angle.sin().to(dtype), ties[1].to(dtype), specials[pick[1]]])
    half, chunk = 512, 512  # pairs of a row, (cos, sin) pairs of a launch
    rows = every.numel() // half
    x1, x2 = every.view(rows, half), other.view(rows, half)
    compared = 0
    for first, second in ((x1, x2), (x2, x1)):
        for start in range(0, cos.numel(), chunk):
            c, s = (t[start : start + chunk].view(-1, 1, 1) for t in (cos, sin))
            if is_interleaved(operator):
                x = torch.stack([first, second], dim=-1).flatten(1).expand(chunk, -1, -1)
                tables = [t.expand(chunk, rows, 2 * half) for t in (c, s)]
            else:
                x = torch.cat([first, second], dim=-1).expand(chunk, -1, -1)
                tables = [t.view(-1, 1, 1, 1).expand(chunk, 1, rows, half) for t in (c, s)]
            assert_fused_and_equal(operator, x, *tables)
            compared += x.numel()
    assert compared == 2 * 4096 * 2 * 65536


@pytest.mark.parametrize("operator", ROTARY, ids=lambda o: o.name)
def test_element_offsets_beyond_two_to_the_31(operator):
    """A batch stride past 2^31 elements, in x, in the tables, and in the output through a long x."""
    need_memory(30)
    b, t, h, d = 2, 9, 4, 64
    case = RotaryCase("far", t, h, d, batch=b, table_dtype=table_dtype(operator), interleaved=is_interleaved(operator))
    near = case.arguments("cuda")
    far = []
    for tensor in near:
        strides = (2**31 + 64, *tensor.stride()[1:])
        buffer = torch.empty(strides[0] + tensor[0].numel() + 64, dtype=tensor.dtype, device="cuda")
        far.append(buffer.as_strided(tensor.shape, strides).copy_(tensor))
        del buffer
    for which in itertools.product((False, True), repeat=3):
        if any(which):
            assert_fused_and_equal(operator, *(f if w else n for f, n, w in zip(far, near, which, strict=True)))


def test_an_output_of_more_than_two_to_the_31_elements():
    need_memory(16)
    operator = BY_NAME["split_rotary_per_op"]
    tokens = 2**31 // 4096 + 33
    x = torch.empty(1, tokens, 4096, dtype=torch.bfloat16, device="cuda").normal_()
    cos = torch.empty(1, tokens, 32, 64, dtype=torch.bfloat16, device="cuda").normal_().swapaxes(1, 2)
    route = operator.route(x[:, :100], cos[:, :, :100], cos[:, :, :100])
    assert route.reason is None
    out = operator(x, cos, cos)
    for part in (slice(0, 64), slice(tokens - 64, tokens)):  # eager would need six times the memory
        expected = operator.reference(x[:, part], cos[:, :, part], cos[:, :, part])
        mismatch = bitfuse.compare(expected, out[:, part])
        assert mismatch is None, mismatch.sentence


@pytest.mark.parametrize("operator", BY_NAME.values(), ids=lambda o: o.name)
def test_graph_capture_and_replay_with_new_inputs(operator, fresh_routes):
    case = operator.cases[3]
    args = case.arguments("cuda")
    undecided = torch.cuda.CUDAGraph()
    operator.reference(*args)  # warm up eager, not the operator
    torch.cuda.synchronize()
    with torch.cuda.graph(undecided):
        captured = operator(*args)
        assert "graph is being captured" in operator.route(*args).reason
    undecided.replay()
    assert bitfuse.compare(operator.reference(*args), captured) is None

    assert_fused_and_equal(operator, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operator(*args)
        assert operator.route(*args).reason is None
    for seed in range(50):
        for static, fresh in zip(tensors_of(args), tensors_of(case.arguments("cuda", seed=seed + 1)), strict=True):
            static.copy_(fresh)
        for out in as_tuple(captured):
            poisoned(out)
        graph.replay()
        mismatch = bitfuse.compare(operator.reference(*args), captured)
        assert mismatch is None, mismatch.sentence


def test_a_stream_other_than_the_default():
    operator = BY_NAME["split_rotary_fp32"]
    x, cos, sin = operator.cases[0].arguments("cuda")
    expected = operator.reference(x, cos, sin)
    assert operator.route(x, cos, sin).reason is None
    source = torch.zeros_like(x)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # ten milliseconds: a launch on another stream would read the zeros
        source.copy_(x)
        out = operator(source, cos, sin)
    side.synchronize()
    mismatch = bitfuse.compare(expected, out)
    assert mismatch is None, mismatch.sentence


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("operator", BY_NAME.values(), ids=lambda o: o.name)
def test_a_device_other_than_the_current_one(operator, fresh_routes):
    with torch.cuda.device(0):
        tensors = operator.cases[:4][-1].arguments("cuda:1")
        assert_fused_and_equal(operator, *tensors)
        assert torch.cuda.current_device() == 0


def test_run_to_run_equality_beside_other_work():
    operator = BY_NAME["split_rotary_fp32"]
    tensors = operator.cases[3].arguments("cuda")
    expected = operator.reference(*tensors)
    noise = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    for _ in range(200):
        with torch.cuda.stream(side):
            noise = (noise @ noise).clamp(-1, 1)
        mismatch = bitfuse.compare(expected, operator(*tensors))
        assert mismatch is None, mismatch.sentence
