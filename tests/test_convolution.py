"""A convolution in another layout: what its proof tells apart, without a GPU. Convolutions here are made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitfuse.core import proof, volumes
from bitfuse.core.bits import Mismatch
from bitfuse.ops import convolution
from bitfuse.ops.convolution import CONVOLUTION

BF16, LAST = torch.bfloat16, torch.channels_last_3d
PADDING = (0, 1, 1)


@pytest.fixture(autouse=True)
def _undecided(monkeypatch):
    CONVOLUTION.forget()
    proof.forget()
    monkeypatch.setattr(convolution, "_why_elsewhere", lambda x: None)
    monkeypatch.setattr(volumes, "_PIECE", 1)
    yield
    CONVOLUTION.forget()
    proof.forget()


def products(x: Tensor, weight: Tensor) -> Tensor:
    """[K, terms, positions] in fp32: what each sum adds up, taps outermost."""
    padded = F.pad(x.float(), (1, 1, 1, 1, 0, 0))
    columns = padded.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)[0]  # C, D, H, W, taps
    terms = columns.permute(4, 5, 6, 0, 1, 2, 3).flatten(0, 3).flatten(1)
    return weight.float().permute(0, 2, 3, 4, 1).flatten(1)[:, :, None] * terms


def in_a_row(terms: Tensor) -> Tensor:
    total = torch.zeros_like(terms[:, 0])
    for term in terms.unbind(1):
        total = total + term
    return total


def aligned(terms: Tensor) -> Tensor:
    """Each eight at once, cut off at 2^-24 of the largest of them, as an accumulator of a tensor core does."""
    total = torch.zeros_like(terms[:, 0])
    for some in terms.split(8, 1):
        unit = 2.0 ** (torch.frexp(some.abs().amax(1, keepdim=True)).exponent - 20)
        total = total + (torch.trunc(some / unit) * unit).sum(1)
    return total


OTHERWISE = {
    "the other way round": lambda terms: in_a_row(terms.flip(1)),
    "channels before taps": lambda terms: in_a_row(terms.unflatten(1, (27, -1)).transpose(1, 2).flatten(1, 2)),
    "in two halves": lambda terms: sum(map(in_a_row, terms.chunk(2, 1))),
    "the last eight by themselves": lambda terms: in_a_row(terms[:, :-8]) + in_a_row(terms[:, -8:]),
    "in other lots of eight": lambda terms: aligned(terms.roll(4, 1)),
    "without what is 2^-25 of the largest": lambda terms: in_a_row(
        torch.where(terms.abs() < terms.abs().amax(1, keepdim=True) * 2.0**-25, 0, terms)
    ),
}


def like_cudnn(host=in_a_row, ours=in_a_row):
    """In the layout of the volume; the bias is added to the rounded sums."""

    def conv3d(x, weight, bias, stride, padding):
        last = not x.is_contiguous()
        sums = (ours if last else host)(products(x, weight)).to(BF16)
        found = sums.view(1, len(weight), x.shape[2] - 2, *x.shape[3:])
        found = found if bias is None else found + bias.view(1, -1, 1, 1, 1)
        return found.contiguous(memory_format=LAST) if last else found

    return conv3d


def call(zeros: bool = False):
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(BF16) for shape in ((1, 16, 6, 10, 10), (8, 16, 3, 3, 3), (8,))
    )
    x = torch.zeros_like(x) if zeros else x
    return x.contiguous(memory_format=LAST), weight, bias, (1, 1, 1), PADDING


@pytest.mark.parametrize("sums", [in_a_row, aligned])
def test_the_same_sums_are_proved_once(sums, monkeypatch):
    monkeypatch.setattr(convolution, "F", SimpleNamespace(conv3d=like_cudnn(sums, sums)))
    args = call()
    route = CONVOLUTION.routed(*args)
    assert (route.reason, route.tier) == (None, "channels last")
    y, bias = route.run(*args)
    host = like_cudnn(sums, sums)(args[0].contiguous(), *args[1:])
    assert torch.equal(y + bias.view(1, -1, 1, 1, 1), host)
    monkeypatch.setattr(convolution, "F", SimpleNamespace(conv3d=lambda *_: pytest.fail("it is proved already")))
    assert CONVOLUTION.routed(*args).reason is None


@pytest.mark.parametrize("order", OTHERWISE)
@pytest.mark.parametrize("zeros", [False, True])
def test_another_order_of_additions_is_found_whatever_the_call_has(order, zeros, monkeypatch):
    host = aligned if order == "in other lots of eight" else in_a_row
    monkeypatch.setattr(convolution, "F", SimpleNamespace(conv3d=like_cudnn(host, OTHERWISE[order])))
    args = call(zeros)
    route = CONVOLUTION.routed(*args)
    assert route.reason is not None
    assert route.reason.startswith("in channels_last_3d the convolution differs at [")
    assert "on sums whose large terms cancel" in route.reason or not zeros
    assert torch.equal(route.run(*args)[0], like_cudnn(host)(args[0].contiguous(), *args[1:]))


@pytest.mark.parametrize("frame", [0, 1])
@pytest.mark.parametrize("lot", [0, 1])
def test_one_number_in_one_frame_of_one_lot_of_filters(frame, lot, monkeypatch):
    """Pieces are told apart, and each kind of filter is looked at."""
    right = like_cudnn()

    def conv3d(x, *rest):
        found = right(x, *rest)
        if not x.is_contiguous():
            found[0, 4 * lot, frame, 1, 1] += 1
        return found

    monkeypatch.setattr(convolution, "F", SimpleNamespace(conv3d=conv3d))
    reason = CONVOLUTION.routed(*call()).reason
    assert f"differs at [0, {4 * lot}, 0, 1, 1]" in reason
    assert ("from frame 1 on" in reason) == (frame == 1)


def test_the_probe_has_large_terms_in_every_sum_and_filters_of_both_kinds():
    x, weight, *_ = call()
    volume, weights = convolution._probe(x, weight)
    assert volume.is_contiguous()
    assert (volume.shape, weights.shape) == (x.shape, weight.shape)
    large = (volume.abs() == convolution._LARGE).sum() * weight[0].numel() / volume.numel()
    assert 1 < large < 3
    assert ((volume.abs() == convolution._LARGE) | (volume.abs() == 1)).sum() > 0.99 * volume.numel()
    signs = (weights.abs() == 1).flatten(1).all(1)
    assert signs.tolist() == [False] + [True] * 7
    sizes = weights[0].abs().float().log2()
    assert sizes.max() > 8
    assert sizes.quantile(0.05) < -6
    again = convolution._probe(x, weight)
    assert torch.equal(volume, again[0])
    assert torch.equal(weights, again[1])


def test_an_error_of_the_moment_is_not_kept(monkeypatch):
    def conv3d(*_):
        raise torch.OutOfMemoryError("no memory is left")

    right = SimpleNamespace(conv3d=like_cudnn())
    monkeypatch.setattr(convolution, "F", SimpleNamespace(conv3d=conv3d))
    route = CONVOLUTION.routed(*call())
    assert route.reason == "the device ran out of memory while it was being proved"
    assert not route.lasts
    monkeypatch.setattr(convolution, "F", right)
    assert CONVOLUTION.routed(*call()).reason is None


def test_a_proof_without_memory_is_not_repeated_at_every_call(monkeypatch):
    """It may take as long as the convolution itself does, several times, in each decode."""
    tries = []

    def conv3d(*_):
        tries.append(1)
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(proof, "_FREE_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(proof, "_SHARE", 1e9)
        patch.setattr(convolution, "F", SimpleNamespace(conv3d=conv3d))
        routes = [CONVOLUTION.routed(*call()) for _ in range(3)]
    assert len(tries) == 1
    assert {(route.reason, route.lasts) for route in routes} == {
        ("the device ran out of memory while it was being proved", False)
    }
    proof._failures.clear()  # when it has waited
    monkeypatch.setattr(convolution, "F", SimpleNamespace(conv3d=like_cudnn()))
    assert CONVOLUTION.routed(*call()).reason is None


@pytest.mark.parametrize(
    ("error", "lasts"),
    [
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("cuDNN error: cannot allocate a workspace"), False),
        (torch.AcceleratorError("an illegal memory access was encountered"), None),
    ],
)
def test_an_error_of_the_other_layout_is_none_of_the_users_decode(error, lasts, monkeypatch):
    """But one of the device, after which nothing can be relied on."""
    right, tries = like_cudnn(), []

    def conv3d(x, *rest):
        if not x.is_contiguous():
            tries.append(1)
            raise error
        return right(x, *rest)

    monkeypatch.setattr(convolution, "F", SimpleNamespace(conv3d=conv3d))
    args = call()
    if lasts is None:
        with pytest.raises(torch.AcceleratorError):
            CONVOLUTION.routed(*args)
        return
    route = CONVOLUTION.routed(*args)
    assert str(error) in route.reason
    assert route.lasts == lasts
    assert torch.equal(route.run(*args)[0], right(args[0].contiguous(), *args[1:]))
    assert CONVOLUTION.routed(*args).reason == route.reason
    assert len(tries) == (1 if lasts else 2)


def test_what_another_thread_has_condemned_meanwhile_stays_so(monkeypatch):
    """Both prove one signature; the other is done first, and an audit of its call finds a mismatch."""
    monkeypatch.setattr(convolution, "F", SimpleNamespace(conv3d=like_cudnn()))
    args = call()
    other, difference = CONVOLUTION.routed(*args), convolution._difference
    CONVOLUTION.forget()

    def slow(*given):
        found = difference(*given)
        CONVOLUTION.condemn(other, Mismatch("differs at [0]"))
        return found

    monkeypatch.setattr(convolution, "_difference", slow)
    assert CONVOLUTION.routed(*args).reason == "differs at [0]"
    assert CONVOLUTION.routed(*args).reason == "differs at [0]"
