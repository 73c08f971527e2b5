"""In which order ATen adds up the channels of a volume, and the numbers that the norm over them rests on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core import numerics, values, volume_mean
from bitfuse.core.bits import compare
from bitfuse.core.kernel import kernel, power_of_2
from bitfuse.core.numerics import added_number, silu, square_root
from bitfuse.core.operator import Operator
from bitfuse.core.volume_mean import Order, emulated_mean, factor, fold_blocks, order_of
from bitfuse.ops import pixel_norm
from bitfuse.ops.pixel_norm import PIXEL_NORM_SILU_PAD

if TYPE_CHECKING:
    import triton.language as tl

BF16, CPU = torch.bfloat16, torch.device("cpu")

# -- the order ---------------------------------------------------------------------------------------------------------

MEASURED = {  # on an H200 (132 multiprocessors), in bf16: every bit of ATen's mean, at all positions (2026-11-29)
    (1, 1024, 16, 24, 16): (4, 16, 1),
    (1, 1024, 16, 48, 32): (4, 11, 1),
    (1, 512, 31, 48, 32): (4, 1, 1),
    (1, 256, 61, 96, 64): (4, 1, 1),
    (1, 128, 121, 192, 128): (4, 1, 1),
    (1, 512, 31, 25, 17): (16, 1, 1),
    (1, 512, 31, 25, 18): (8, 1, 1),
    (1, 256, 61, 25, 17): (16, 1, 1),
    (1, 128, 61, 25, 17): (1, 1, 1),
    (2, 1024, 5, 24, 16): (4, 16, 1),
    (1, 1024, 1, 5, 7): (16, 1, 1),
    (1, 1024, 3, 6, 7): (8, 1, 1),
    (1, 512, 1, 4, 4): (32, 1, 1),
    (1, 16, 3, 4, 6): (1, 1, 1),
    (1, 128, 121, 384, 256): (4, 1, 2),
}


@pytest.fixture
def an_h200(monkeypatch):
    monkeypatch.setattr(volume_mean, "_multiprocessors", lambda device: (132, 2048))


@pytest.mark.usefixtures("an_h200")
@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_the_order_is_what_was_measured(shape):
    assert order_of(shape, 2, CPU) == MEASURED[shape]


def test_it_depends_on_the_device(monkeypatch):
    """Of a device with fewer multiprocessors fewer blocks share a position's channels."""
    found = set()
    for processors in (16, 132):
        monkeypatch.setattr(volume_mean, "_multiprocessors", lambda device, n=processors: (n, 2048))
        found.add(order_of((1, 1024, 16, 48, 32), 2, CPU))
    assert len(found) == 2


@pytest.mark.usefixtures("an_h200")
def test_what_is_not_reproduced_is_said():
    assert order_of((2, 128, 121, 384, 256), 2, CPU) is None, "ATen may split the samples"
    assert order_of((1, 127, 121, 384, 256), 2, CPU) is None, "no two halves"
    assert order_of((1, 2, 1, 1, 1 << 31), 2, CPU) is None, "half of it is still too long"
    for shape in MEASURED:
        order = order_of(shape, 2, CPU)
        assert order is not None
        assert order.blocks <= 8 * order.height, "what `fold_blocks` takes"


def added(terms: list[Tensor]) -> Tensor:
    """One after the other, from 0."""
    total = torch.zeros((), dtype=torch.float32)
    for term in terms:
        total = total + term
    return total


def halved(terms: list[Tensor]) -> Tensor:
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [a + b for a, b in zip(terms[:half], terms[half:], strict=True)]
    return terms[0]


def mean_by_hand(square: Tensor, order: Order) -> Tensor:
    """The head of volume_mean.py, word for word, for one position [C]."""
    halves = []
    for part in square.float().chunk(order.halves):
        lanes = order.height * order.blocks
        blocks = []
        for k in range(order.blocks):
            threads = []
            for t in range(order.height):
                mine = list(part[t + order.height * k :: lanes])
                a0, a1, a2, a3 = (added(mine[i::4]) for i in range(4))
                threads.append(((a0 + a1) + a2) + a3)
            blocks.append(halved(threads))
        if order.blocks > 1:
            rows = [added(blocks[t :: order.height]) for t in range(order.height)]
            blocks = [halved(rows)]
        halves.append(blocks[0])
    return added(halves) * torch.tensor(factor((1, square.numel(), 1, 1, 1)))


ORDERS = [
    (1, 1, 1),
    (4, 1, 1),
    (16, 1, 1),
    (4, 16, 1),
    (4, 11, 1),
    (4, 2, 1),
    (4, 32, 1),
    (4, 27, 1),
    (8, 13, 1),
    (2, 7, 1),
    (4, 1, 2),
    (1, 4, 4),
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("channels", [16, 48, 250, 512])
def test_the_emulation_is_the_order_that_is_described(order, channels):
    if channels % order[2]:
        pytest.skip("halves are of one size")
    (x,) = values.live([BF16], 3 * channels, torch.Generator().manual_seed(channels))
    square = (x.to(BF16) ** 2).view(1, 3, channels).movedim(1, 2)[..., None, None]
    found = emulated_mean(square, Order(*order))
    expected = torch.stack([mean_by_hand(square[0, :, i, 0, 0], Order(*order)) for i in range(3)])
    assert compare(expected, found.flatten()) is None


def test_every_order_gives_other_bits():
    """Or a battery could not tell one from another."""
    (x,) = values.live([BF16], 1 << 20, torch.Generator().manual_seed(1))
    square = (x.to(BF16) ** 2).view(1, 512, 1, 32, 64)
    found = {emulated_mean(square, Order(*order)).numpy().tobytes() for order in ORDERS}
    assert len(found) == len(ORDERS)


@kernel
def _fold_kernel(
    x_ptr, out_ptr, SLOTS: tl.constexpr, HEIGHT: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row, lane = tl.arange(0, ROWS), tl.arange(0, SLOTS)
    x = tl.load(x_ptr + row[:, None] * SLOTS + lane[None, :])
    tl.store(out_ptr + row, fold_blocks(x, ROWS, SLOTS, HEIGHT, BLOCKS))


@pytest.mark.parametrize("order", [o for o in ORDERS if o[2] == 1], ids=str)
def test_the_kernel_folds_threads_and_blocks_in_this_order(order, device):
    """For each number of turns that `fold_blocks` has: 1, 2, 4 and 8."""
    height, blocks, _ = order
    rows, lanes = 8, height * blocks
    slots = power_of_2(lanes)
    (x,) = values.live([torch.float32], rows * lanes, torch.Generator(device).manual_seed(5))
    x = x.view(rows, lanes).float()
    out = torch.empty(rows, device=device)
    _fold_kernel[(1, 1, 1)](F.pad(x, (0, slots - lanes)), out, SLOTS=slots, HEIGHT=height, BLOCKS=blocks, ROWS=rows)
    expected = []
    for row in x.cpu():
        folded = [halved(list(row[k * height : (k + 1) * height])) for k in range(blocks)]
        if blocks > 1:
            folded = [halved([added(folded[t::height]) for t in range(height)])]
        expected.append(folded[0])
    assert compare(torch.stack(expected), out.cpu()) is None


@pytest.mark.parametrize("shape", [(1, 48, 3, 5, 7), (2, 1000, 1, 2, 2), (1, 4096, 1, 1, 1)], ids=str)
def test_the_factor_is_of_two_counts_in_fp32(shape):
    outputs = math.prod(shape) // shape[1]
    assert factor(shape) == float(torch.tensor(float(outputs)) / torch.tensor(float(outputs * shape[1])))


# -- no shape is taken on trust ----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's ATen adds up otherwise, which is emulated here")
def test_a_shape_whose_order_is_another_than_was_thought_is_not_fused_by_a_kernel_that_was_proved(
    monkeypatch, fresh_routes
):
    """One proof serves all shapes of one order. What ATen does for a shape is known from reading it, so the first call
    of each shape is compared all the same, with its mean in fp32."""
    operator, specification = PIXEL_NORM_SILU_PAD, Operator.specification
    monkeypatch.setattr(
        Operator, "specification", lambda o, tier, device="cpu", emulated=False: specification(o, tier, device)
    )

    def call(*sides: int) -> tuple[Any, ...]:
        y = torch.randn(1, *sides, 64, generator=torch.Generator().manual_seed(2)).to(BF16).movedim(-1, 1)
        return (y, None, None, None, None, None, 0, 0, 0, 1e-8)

    right, wrong = call(3, 8, 8), call(3, 8, 16)
    assert order_of((1, 64, 3, 8, 8), 2, CPU) == order_of((1, 64, 3, 8, 16), 2, CPU) == (4, 1, 1)
    emulated = {"order_of": lambda shape, *rest: Order(1, 1, 1) if shape[-1] == 16 else order_of(shape, *rest)}
    monkeypatch.setattr("bitfuse.ops.pixel_norm_evidence.order_of", emulated["order_of"])

    def means(square: Tensor) -> tuple[Tensor, Tensor]:
        mean = emulated_mean(square, emulated["order_of"](tuple(square.shape), 2, CPU))
        return mean.to(BF16), mean.contiguous()

    monkeypatch.setattr("bitfuse.ops.pixel_norm_evidence._means", means)
    assert operator.route(*right).tier == "single pass"
    route = operator.route(*wrong)
    assert route.tier == "ATen's mean"
    (sentence,) = route.passed_over
    assert sentence.startswith("single pass: output 0 differs at [")
    assert sentence.endswith("for this layout of the arguments")
    assert operator.route(*right).tier == "single pass", "of other shapes it is used on"
    assert compare(operator.reference(*wrong), operator(*wrong)) is None


def test_only_what_depends_on_the_shape_is_compared_at_each():
    for operator in (pixel_norm.PIXEL_NORM_SILU_PAD, pixel_norm.RESIDUAL_PIXEL_NORM_SILU_PAD):
        args = operator.cases[0].arguments("cpu", tokens=24)
        assert [tier.plan(*args).by_shape for tier in operator.tiers] == [True, False]


# -- numbers -----------------------------------------------------------------------------------------------------------


def every_x() -> Tensor:
    return values.every_16_bit_pattern(BF16, CPU)


def every_root() -> Tensor:
    """0, and what the root of a mean square may be: the least square is 2^-133."""
    found = every_x()
    return found[(found == 0) | (found >= 2.0**-67) | found.isnan()]


def differing(x: Tensor, roots: Tensor) -> int:
    """Pairs for which x times 1 / root, rounded to bf16, is another than x / root. NaN equals NaN."""
    x, roots = x.float(), roots.float()[:, None]
    quotient, product = (x / roots).to(BF16), (x * (1.0 / roots)).to(BF16)
    return int(
        ((quotient.view(torch.int16) != product.view(torch.int16)) & ~(quotient.isnan() & product.isnan())).sum()
    )


def test_a_product_with_one_over_the_root_is_the_quotient():
    generator = torch.Generator().manual_seed(11)
    x, roots = every_x(), every_root()
    assert (x.numel(), roots.numel()) == (1 << 16, 25217)
    assert differing(x, roots[torch.randperm(roots.numel(), generator=generator)[:48]]) == 0
    some = x[torch.randperm(x.numel(), generator=generator)[:96]]
    assert differing(some, roots) == 0


def test_of_smaller_roots_it_would_not_be():
    """The control: 1 / root is not exact enough, or beyond fp32, where the root is no root of a mean square."""
    assert differing(every_x(), torch.tensor([9.2e-41], dtype=BF16)) > 0


@pytest.mark.slow
def test_a_product_with_one_over_the_root_is_the_quotient_for_every_pair():
    """1.6 * 10^9 pairs, in a minute."""
    for roots in every_root().split(64):
        assert differing(every_x(), roots) == 0


@pytest.mark.parametrize("number", [1e-8, 1e-6, 0.0, -0.0, 0.25, 1.0, 3.0e-39, 1e30, -1e-5])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_a_number_is_added_as_the_probe_says(number, dtype):
    found, x = added_number(CPU, dtype, number), every_x().to(dtype)
    if dtype == torch.float16 and number == 1e30:
        assert found is None, "beyond its range: a sum with -inf tells that it is no finite number that is added"
        return
    assert found is not None
    assert compare(x + number, (x.float() + torch.tensor(found)).to(dtype)) is None


def test_a_cpu_rounds_it_to_bf16_and_a_kernel_adds_that():
    rounded = float(torch.tensor(1e-8, dtype=BF16))
    assert rounded != float(torch.tensor(1e-8))
    assert added_number(CPU, BF16, 1e-8) == rounded


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (lambda x, number: (x.float() + number).to(x.dtype), float(torch.tensor(1e-8))),
        (lambda x, number: (x.float() + float(torch.tensor(number, dtype=BF16))).to(x.dtype), 2.0**-27 * 1.34375),
        (lambda x, number: (x.float() + 1.01 * number).to(x.dtype), None),
        (lambda x, number: (x.double() * 2 + number).to(x.dtype), None),
    ],
    ids=["as fp32, which CUDA does", "rounded, which a CPU does", "another", "no sum"],
)
def test_the_probe_tells_the_forms(form, told, monkeypatch):
    class Probed:
        def __init__(self, x):
            self.x = x

        def __add__(self, number):
            return form(self.x, number)

    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda t, where: Probed(t) if where == "a device" else to(t, where))
    assert numerics._added_number.__wrapped__("a device", BF16, 1e-8) == told


def test_where_a_number_is_added_in_neither_way_the_chain_runs(monkeypatch, fresh_routes):
    monkeypatch.setattr(pixel_norm, "added_number", lambda *args: None)
    args = PIXEL_NORM_SILU_PAD.cases[-1].arguments("cpu", tokens=24)
    route = PIXEL_NORM_SILU_PAD.route(*args)
    assert not route.fused
    assert "PyTorch adds a number here neither as fp32 nor rounded to bf16" in route.reason
    assert compare(PIXEL_NORM_SILU_PAD.reference(*args), PIXEL_NORM_SILU_PAD(*args)) is None


@kernel
def _unary_kernel(x_ptr, silu_ptr, root_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    x = tl.load(x_ptr + lane).to(tl.float32)
    tl.store(silu_ptr + lane, silu(x).to(tl.bfloat16))
    tl.store(root_ptr + lane, square_root(x).to(tl.bfloat16))


def test_silu_and_the_root_of_every_value_of_bf16(device):
    x = every_x().to(device)
    found, root = torch.empty_like(x), torch.empty_like(x)
    _unary_kernel[(1, 1, 1)](x, found, root, N=x.numel())
    assert compare(F.silu(x), found) is None
    assert compare(torch.sqrt(x), root) is None


def test_more_pixels_than_32_bits_count_are_declined():
    """Kernels number the pixels of the padded volume in 32 bits."""
    y = torch.empty_strided((1, 1, 1 << 10, 1 << 10, 1 << 11), (0, 0, 0, 0, 0), dtype=BF16)
    for edge, told in ((0, 1 << 31), (1, (1 << 10) * ((1 << 10) + 2) * ((1 << 11) + 2))):
        reasons = list(PIXEL_NORM_SILU_PAD.why_not(y, None, None, None, None, None, 0, 0, edge, 1e-8))
        assert f"there are {told} pixels with the padding; accepted: below 2^31" in reasons
