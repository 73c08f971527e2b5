"""Each reference is its host's own function, bit for bit, on the version that is installed."""

import importlib.metadata
import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import oracle
from bitfuse import OPERATORS, compare
from bitfuse.core import emulated, numerics, values
from bitfuse.core.kernel import kernel
from bitfuse.core.numerics import addcmul_fuses, multiply_add_bf16
from bitfuse.ops import rope
from bitfuse.ops.rope import CHAINS, misfit
from common import ROTARY

if TYPE_CHECKING:
    import triton.language as tl

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def diffusers_function(name: str):
    module = pytest.importorskip(
        "diffusers.models.transformers.transformer_ltx2",
        reason="the reference is checked against diffusers: pip install 'diffusers>=0.37'",
    )
    function = getattr(module, name)
    return lambda x, cos, sin: function(x, (cos, sin))


def ltx_core_function(name: str):
    """From the file itself: the package imports what a test machine need not have."""
    path = "ltx_core/model/transformer/rope.py"
    hint = "the reference is checked against it: pip install --no-deps ltx-core==1.0.0"
    pytest.importorskip("einops", reason="ltx-core's rope.py needs it: pip install einops")
    try:
        files = importlib.metadata.files("ltx-core") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"ltx-core is not installed; {hint}")
    found = [file for file in files if str(file) == path]
    if not found:
        pytest.skip(f"the installed ltx-core {importlib.metadata.version('ltx-core')} has no {path}; {hint}")
    spec = importlib.util.spec_from_file_location("ltx_core_rope", found[0].locate())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def matrix_of(x, cos, sin, split: bool):
    """comfy-kitchen's rotation matrix [B, T, H, D/2, 2, 2], as ComfyUI forms it, of tables as the references take them.

    Interleaved ones have an entry for each channel, which it takes, too: a row of the matrix is a channel's.
    """
    if split:
        c, s = (t.swapaxes(1, 2) for t in (cos, sin))
        rows = (c, -s, s, c)
    else:
        (c_even, c_odd), (s_even, s_odd) = (t.expand(x.shape).unflatten(-1, (1, -1, 2)).unbind(-1) for t in (cos, sin))
        rows = (c_even, -s_even, s_odd, c_odd)
    return torch.stack(rows, dim=-1).unflatten(-1, (2, 2))


def kitchen_function(name: str):
    """comfy-kitchen's eager function, called as ComfyUI does: x [B, T, H, D]."""
    hint = "the reference is checked against comfy-kitchen: pip install --no-deps comfy-kitchen==0.2.26"
    eager = pytest.importorskip("comfy_kitchen.backends.eager.rope", reason=hint)
    function, split = getattr(eager, name), "split" in name
    if split and "addcmul_" in function.__code__.co_names:
        pytest.skip(f"this comfy-kitchen has split_rotary_per_op's form; {hint}")

    def turned(x, cos, sin):
        matrix = matrix_of(x, cos, sin, split)
        return function(x.reshape(*x.shape[:2], matrix.shape[2], -1), matrix).reshape(x.shape)

    return turned


def compiled_kitchen_function(name: str):
    """comfy-kitchen's kernel for CUDA. What it fuses is nvcc's choice, and no promise for another version."""
    hint = "the reference is checked against comfy-kitchen on a GPU: pip install --no-deps comfy-kitchen==0.2.26"
    kitchen = pytest.importorskip("comfy_kitchen", reason=hint)
    if not torch.cuda.is_available() or not kitchen.registry.is_available("cuda"):
        pytest.skip(hint)

    def turned(x, cos, sin):
        matrix = matrix_of(x, cos, sin, True)
        with kitchen.registry.use_backend("cuda"):
            return getattr(kitchen, name)(x.reshape(*x.shape[:2], matrix.shape[2], -1), matrix).reshape(x.shape)

    return turned


HOSTS = {
    "split_rotary_fp32": (diffusers_function, "apply_split_rotary_emb"),
    "interleaved_rotary_fp32": (diffusers_function, "apply_interleaved_rotary_emb"),
    "split_rotary_per_op": (ltx_core_function, "apply_split_rotary_emb"),
    "interleaved_rotary_per_op": (ltx_core_function, "apply_interleaved_rotary_emb"),
    "split_rotary_three_ops": (kitchen_function, "apply_rope_split_half1"),
    "split_rotary_second_rounded": (compiled_kitchen_function, "apply_rope_split_half1"),
    "interleaved_rotary_addcmul": (kitchen_function, "apply_rope1"),
}


@pytest.fixture(params=[operator.name for operator in ROTARY])
def operator(request):
    return OPERATORS[request.param]


@pytest.fixture
def host(operator):
    """The host's own function, as f(x, cos, sin)."""
    load, name = HOSTS[operator.name]
    return load(name)


def outcome(function, *tensors):
    """Its result, or that it raised."""
    try:
        return function(*tensors)
    except Exception as error:
        return type(error)


def assert_same(host, reference, *tensors):
    """Both raise, or both give the same bits in the same strides."""
    theirs, ours = outcome(host, *tensors), outcome(reference, *tensors)
    if isinstance(theirs, type) or isinstance(ours, type):
        assert isinstance(theirs, type), f"the host takes these, the reference raises {ours}"
        assert isinstance(ours, type), f"the host raises {theirs}, the reference takes these"
        return None
    mismatch = compare(theirs, ours)
    assert mismatch is None, mismatch
    return ours


def specified(operator, *tensors) -> bool:
    """Whether this host says what the chain does with these shapes.

    `split_rotary_per_op` takes x's batch from x, as SGLang does; ltx-core takes it from the tables. Where the two
    differ ltx-core raises or melts samples into channels, and is not the host that the reference restates. Of
    comfy-kitchen's the shapes are ours: ComfyUI forms a matrix of the tables, and x to fit it.
    """
    x, cos, sin = tensors
    if "kitchen" in HOSTS[operator.name][0].__name__:  # ComfyUI calls it with x [B, T, C]
        (chain,) = (chain for chain in CHAINS if chain.reference is operator.reference)
        compiled = HOSTS[operator.name][0] is compiled_kitchen_function  # which is read for bf16 alone
        if compiled and {x.dtype, cos.dtype, sin.dtype} != {BF16}:
            return False
        return x.ndim == 3 and x.numel() > 0 and misfit(x, cos, sin, chain) is None
    from_x = operator.name == "split_rotary_per_op" and x.ndim != 4 and cos.ndim == 4
    return not from_x or (x.ndim == 3 and x.shape[0] == cos.shape[0])


def test_every_rotary_operator_has_a_host():
    assert set(HOSTS) == {operator.name for operator in ROTARY}


def test_every_case(operator, host, device):
    for case in operator.cases:
        tensors = case.arguments(device, tokens=24)
        if specified(operator, *tensors):
            assert assert_same(host, operator.reference, *tensors) is not None, case.name


@pytest.mark.parametrize("table_dtype", [BF16, FP16, FP32, torch.float64], ids=str)
@pytest.mark.parametrize("x_dtype", [BF16, FP16, FP32, torch.float64], ids=str)
def test_every_pair_of_dtypes(operator, host, x_dtype, table_dtype, device):
    """Promotion too: where a chain refuses a pair of dtypes, both refuse it."""
    for case in operator.cases[-6:]:
        tensors = replace(case, x_dtype=x_dtype, table_dtype=table_dtype).arguments(device, tokens=5)
        if specified(operator, *tensors):
            assert_same(host, operator.reference, *tensors)


@pytest.mark.parametrize("name", ["head size 40", "fp16", "fp32", "tokens last"])
def test_every_battery(operator, host, name, device):
    """Specials, ties, cancellation, any bits: whatever a kernel is held to, the reference is held to."""
    (case,) = (case for case in operator.cases if case.name == name)
    for family, tensors in operator.battery(*case.arguments(device, tokens=5)):
        assert assert_same(host, operator.reference, *tensors) is not None, family


BENT = {
    "x of another width": lambda x, cos, sin: (x[..., :-2], cos, sin),
    "x of odd width": lambda x, cos, sin: (x[..., :-1], cos, sin),
    "x with fewer tokens": lambda x, cos, sin: (x[..., :-1, :], cos, sin),
    "x without a batch": lambda x, cos, sin: (x[0], cos, sin),
    "x with one dimension": lambda x, cos, sin: (x.reshape(-1), cos, sin),
    "x of twice the batch": lambda x, cos, sin: (torch.cat([x, x]), cos, sin),
    "x empty": lambda x, cos, sin: (x[:0], cos, sin),
    "no tokens": lambda x, cos, sin: (x[..., :0, :], cos[..., :0, :], sin[..., :0, :]),
    "a shorter sine": lambda x, cos, sin: (x, cos, sin[..., :-1]),
    "a sine of one token": lambda x, cos, sin: (x, cos, sin[..., :1, :]),
    "tables of one token": lambda x, cos, sin: (x, cos[..., :1, :], sin[..., :1, :]),
    "tables of one lane": lambda x, cos, sin: (x, cos[..., :1], sin[..., :1]),
    "tables without a batch": lambda x, cos, sin: (x, cos[0], sin[0]),
    "tables of twice the batch": lambda x, cos, sin: (x, torch.cat([cos, cos]), torch.cat([sin, sin])),
    "tables with a dimension more": lambda x, cos, sin: (x, cos[None], sin[None]),
    "tables flat": lambda x, cos, sin: (x, cos.reshape(-1), sin.reshape(-1)),
    "integers": lambda x, cos, sin: (x.long(), cos, sin),
}


@pytest.mark.parametrize("bend", BENT)
def test_shapes_that_do_not_fit(operator, host, bend, device):
    """Taken by both or refused by both; what both take is equal."""
    for case in operator.cases[-6:]:
        tensors = BENT[bend](*case.arguments(device, tokens=6))
        if specified(operator, *tensors):
            assert_same(host, operator.reference, *tensors)


@pytest.mark.parametrize("case", ["head size 40", "fp16", "fp32"])
def test_the_split_form_of_any_version_of_comfy_kitchen_is_one_of_two(case, device):
    """Three ops in 0.2.26, addcmul in 0.2.40: of the installed version one fits every family, the other does not."""
    eager = pytest.importorskip(
        "comfy_kitchen.backends.eager.rope",
        reason="the reference is checked against comfy-kitchen: pip install --no-deps comfy-kitchen",
    )
    fitting = set()
    for operator in map(OPERATORS.get, ("split_rotary_per_op", "split_rotary_three_ops")):
        (args,) = (c.arguments(device, tokens=5) for c in operator.cases if c.name == case)
        equal = []
        for _, (x, cos, sin) in operator.battery(*args):
            matrix = matrix_of(x, cos, sin, True)
            found = eager.apply_rope_split_half1(x.reshape(*x.shape[:2], matrix.shape[2], -1), matrix)
            equal.append(compare(found.reshape(x.shape), operator.reference(x, cos, sin)) is None)
        fitting |= {operator.name} if all(equal) else set()
    assert len(fitting) == 1


def test_a_wrong_reference_would_be_seen(operator, host, device):
    """The control: the other chain of the same layout differs from this host."""
    other = {"fp32": "per_op", "per_op": "fp32"} | dict.fromkeys(("three_ops", "second_rounded", "addcmul"), "per_op")
    layout, _, chain = operator.name.partition("_rotary_")
    wrong = OPERATORS[f"{layout}_rotary_{other[chain]}"]
    tensors = operator.cases[0].arguments(device, tokens=24)
    tensors = (tensors[0], tensors[1].to(BF16), tensors[2].to(BF16))
    assert compare(host(*tensors), operator.reference(*tensors)) is None
    assert compare(host(*tensors).float(), wrong.reference(*tensors).float()) is not None


# -- what addcmul does here -----------------------------------------------------------------------------------------


def triples(n: int) -> list[np.ndarray]:
    """a, b, c in fp32 whose fused and separate results often differ."""
    g = np.random.default_rng(5)
    a, b = (g.standard_normal(n).astype(np.float32) for _ in range(2))
    return [a, b, (-(a * b) * (1 + g.integers(-3, 4, n) * np.float32(2.0**-23))).astype(np.float32)]


def test_addcmul_in_fp32_is_what_the_probe_says():
    """Against exact rational arithmetic; every length that ends in another part of a vector loop."""
    fuses = addcmul_fuses(torch.device("cpu"), FP32)
    exact = oracle.fma_fp32 if fuses else oracle.multiply_then_add_fp32
    other = oracle.multiply_then_add_fp32 if fuses else oracle.fma_fp32
    assert fuses is not None
    for n in [1, 3, 7, 8, 16, 31, 500]:
        operands = triples(n)
        a, b, c = (torch.from_numpy(o) for o in operands)
        found = c.clone().addcmul_(a, b)
        assert compare(torch.from_numpy(oracle.each(exact, *operands)), found) is None
    assert compare(torch.from_numpy(oracle.each(other, *operands)), found) is not None


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_addcmul_in_16_bits_is_what_the_probe_says(dtype):
    """Computed in fp32, once rounded or twice, and then rounded to the dtype; overflowing products too."""
    fuses = addcmul_fuses(torch.device("cpu"), dtype)
    assert fuses is not None
    g = np.random.default_rng(6)
    a, b, c = (torch.from_numpy(o).to(dtype) for o in triples(1000))
    if dtype == BF16:  # products up to 2^132, with addends that bring some of them back
        wide = torch.from_numpy(2.0 ** g.integers(60, 66, 1000)).float()
        a, b = (torch.cat([t, (t * wide).to(dtype)]) for t in (a, b))
        c = torch.cat([c, torch.full_like(c, -(2.0**127))])
    wide_operands = [t.double().numpy() for t in (a, b, c)]
    with np.errstate(all="ignore"):
        # a product of two 16-bit floats is exact in fp64, and to fp32 it is exact or overflows
        product = (wide_operands[0] * wide_operands[1]).astype(np.float32)
        separate = torch.from_numpy(product + wide_operands[2].astype(np.float32)).to(dtype)
    fused = torch.from_numpy(oracle.each(oracle.fma_fp32, *(o.astype(np.float32) for o in wide_operands))).to(dtype)
    found = c.clone().addcmul_(a, b)
    assert compare(fused if fuses else separate, found) is None
    if dtype == BF16:
        assert compare(separate if fuses else fused, found) is not None


def bf16_triples() -> list[torch.Tensor]:
    """a, b, c in bf16: any bits, special values, ties beside far smaller addends, sums near them, tiny products."""
    g = torch.Generator().manual_seed(9)
    n = 3000
    ties = [values.significands(BF16, n, g), torch.full((n,), 1.5)]
    beside = torch.ldexp(values.signs(n, g), -torch.randint(6, 45, (n,), generator=g))
    scale = torch.ldexp(torch.ones(n), torch.randint(-135, 120, (n,), generator=g))  # into overflow and subnormals
    families = [
        values.uniform_bits([BF16] * 3, n, g),
        values.products_of_specials([BF16] * 3, "cpu"),
        values.wide([BF16] * 3, n, g),
        [*ties, beside],
        [ties[0] * scale, ties[1], beside * scale],
        [beside * scale, values.significands(BF16, n, g), ties[0] * scale],
    ]
    return [torch.cat([v.to(BF16) for v in vs]) for vs in zip(*families, strict=True)]


def test_a_multiply_add_in_bf16_rounds_once(device):
    """The reference's and the kernel's, against exact rational arithmetic; addcmul, by way of fp32, differs."""
    operands = bf16_triples()
    wide = [t.double().numpy() for t in operands]
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(oracle.each(oracle.fma_bf16, *wide)).to(BF16)
    a, b, c = (t.to(device).view(1, 1, -1, 1, 1) for t in operands)
    assert compare(expected, rope._multiply_add(a, b, c).flatten().cpu()) is None
    out = torch.empty(a.numel(), dtype=BF16, device=device)
    _multiply_add_kernel[(-(-out.numel() // 1024),)](a, b, c, out, out.numel())
    assert compare(expected, out.cpu()) is None
    assert compare(expected, torch.addcmul(c, a, b).flatten().cpu()) is not None


@kernel
def _multiply_add_kernel(a_ptr, b_ptr, c_ptr, out_ptr, n):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    a, b, c = (
        tl.load(a_ptr + at, mask=at < n, other=0.0).to(tl.float32),
        tl.load(b_ptr + at, mask=at < n, other=0.0).to(tl.float32),
        tl.load(c_ptr + at, mask=at < n, other=0.0).to(tl.float32),
    )
    tl.store(out_ptr + at, multiply_add_bf16(a, b, c).to(tl.bfloat16), mask=at < n)


def _lerp(value, out, weight, fused):
    """ATen's formula in fp32, its product and sum rounded once or twice."""
    a, b = (weight, 1.0 - weight)
    difference = out - value
    if fused:
        near, far = emulated.multiply_add(a, difference, value), emulated.multiply_add(-difference, b, out)
    else:
        near, far = value + a * difference, out - difference * b
    return torch.where(weight.abs() < 0.5, near, far).to(BF16)


@pytest.mark.parametrize("fused", [True, False, None])
def test_the_probe_of_lerp_tells_its_forms(monkeypatch, fused):
    """Both forms, and one that is neither: fused in one branch only."""

    def lerp(value, out, weight):
        value, out, weight = (t.float() for t in torch.broadcast_tensors(value, out, weight))
        once = _lerp(value, out, weight, True)
        twice = _lerp(value, out, weight, False)
        return {True: once, False: twice, None: torch.where(weight.abs() < 0.5, once, twice)}[fused]

    monkeypatch.setattr(torch, "lerp", lerp)
    assert numerics.lerp_fuses.__wrapped__(torch.device("cpu"), BF16) is fused


def test_the_emulated_multiply_add_rounds_once():
    """Against exact rational arithmetic."""
    operands = triples(1000)
    expected = torch.from_numpy(oracle.each(oracle.fma_fp32, *operands))
    assert compare(expected, emulated.multiply_add(*map(torch.from_numpy, operands))) is None
