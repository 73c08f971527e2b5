"""First divergence: the step, block, site and element at which two runs part, and how far apart they are."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import weakref
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bitfuse
from bitfuse import trace
from bitfuse.ops.adaln import GATED_RESIDUAL
from bitfuse.ops.adaln import RESIDUAL_RMS_NORM_MODULATE_COMPOSED as RESIDUAL_NORM
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.tools.compare import bits

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Everything here is small: more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flip(t, index, by=1):
    """Add to the bits of one element of a flat view, in place."""
    t.view(-1).view(INTEGERS[t.element_size()])[index] += by
    return t


def double(x):
    return torch.tensor(x, dtype=torch.float64)


# -- distances, digests, histograms ---------------------------------------------------------------------------------


def every_number(dtype):
    """All values of a 16-bit dtype but NaN, by their bits, and their order: the independent count of steps."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    values = values[~values.isnan()]
    order = values.double().unique()  # sorted; -0 and +0 are one
    return values, torch.searchsorted(order, values.double())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ulps_count_the_numbers_in_between_for_every_half(dtype):
    values, place = every_number(dtype)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        other = torch.randperm(len(values), generator=generator)
        assert bits.ulps(values, values[other]).tolist() == (place[other] - place).tolist()


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(floats, st.integers(-40, 40))
def test_ulps_of_fp32_are_the_steps_taken(start, steps):
    a = torch.tensor(start)
    b, towards = a.clone(), torch.tensor(float("inf") if steps > 0 else -float("inf"))
    for _ in range(abs(steps)):
        b = torch.nextafter(b, towards)
    if not a.isinf() and not b.isinf():  # nextafter stays at infinity
        assert int(bits.ulps(a, b)) == steps


@given(floats, floats)
def test_ulps_of_fp32_change_sign_with_the_order_and_add_up_over_zero(x, y):
    a, b, zero = torch.tensor(x), torch.tensor(y), torch.tensor(0.0)
    assert int(bits.ulps(a, b)) == -int(bits.ulps(b, a)) == int(bits.ulps(a, zero)) + int(bits.ulps(zero, b))
    assert (int(bits.ulps(a, b)) > 0) == (y > x)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.tensor(0.0), torch.tensor(-0.0), 0),
        (torch.tensor(-0.0), torch.tensor(2.0**-149), 1),
        (torch.tensor(torch.finfo(torch.float32).max), torch.tensor(float("inf")), 1),
        (double(1.0), double(1.0 + 2.0**-52), 1),
        (double(-3.0), double(-float("inf")), -((0x7FF - 0x400) * 2**52 - 2**51)),
        (double(-1e308), double(1e308), 2**63 - 1),  # more than int64 holds
        (double(1e308), double(-1e308), -(2**63)),
        (torch.tensor(7), torch.tensor(4), -3),
        (torch.tensor(-(2**63)), torch.tensor(2**63 - 1), 2**63 - 1),
        (torch.tensor(False), torch.tensor(True), 1),
        (torch.tensor(1.0).to(torch.float8_e4m3fn), torch.tensor(-1.0).to(torch.float8_e4m3fn), -2 * 0x38),
    ],
)
def test_ulps_at_the_edges(a, b, expected):
    assert int(bits.ulps(a, b)) == expected


DTYPES = [*HALVES, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_a_digest_sees_elements_and_positions_and_nothing_else(dtype, monkeypatch):
    t = torch.arange(24).view(4, 6).pow(2).add(1).remainder(11).remainder(2 if dtype is torch.bool else 50).to(dtype)
    t = t * 1j + t if dtype.is_complex else t
    kept = t.clone()
    digest = int(bits.digest(t))
    assert int(bits.digest(t.clone())) == digest
    assert int(bits.digest(t.t().contiguous().t())) == digest
    monkeypatch.setattr(bits, "_CHUNK", 5)
    assert int(bits.digest(t)) == digest
    assert int(bits.digest(t.flip(0))) != digest
    assert int(bits.digest(t.roll(1, dims=1))) != digest
    if not dtype.is_complex:
        assert bitfuse.compare(kept, t) is None  # and it is left as it was


@given(st.sampled_from([*HALVES, torch.float32, torch.float64]), st.integers(0, 99), st.integers(0, 14))
def test_a_digest_sees_every_bit(dtype, index, bit):
    t = torch.linspace(-2, 2, 100, dtype=torch.float64).to(dtype)
    other = flip(t.clone(), index, 1 << bit)
    assert int(bits.digest(t)) != int(bits.digest(other))


def test_a_digest_takes_all_nans_for_one_and_the_zeros_for_two():
    nans = torch.tensor([0x7FC0, 0x7FFF, -1, 0x7F81], dtype=torch.int16).view(torch.bfloat16)
    assert len({int(bits.digest(nan)) for nan in nans}) == 1
    double = torch.tensor([float("nan"), 1.0], dtype=torch.float64)
    kept = double.view(torch.int64).clone()
    flipped = flip(double.clone(), 0)
    assert int(bits.digest(double)) == int(bits.digest(flipped))
    assert torch.equal(double.view(torch.int64), kept)
    assert int(bits.digest(torch.tensor(0.0))) != int(bits.digest(torch.tensor(-0.0)))
    assert int(bits.digest(torch.tensor(float("inf")))) != int(bits.digest(nans[0].float()))


def test_a_sha_256_is_that_of_all_bytes_in_the_order_of_indices():
    a = torch.tensor([[1.0, -0.0], [float("nan"), 3.0]], dtype=torch.bfloat16)
    b = torch.arange(3)
    content = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in (a, b))
    expected = hashlib.sha256(content).hexdigest()
    assert bits.sha256(a, b) == bits.sha256(a.t().contiguous().t(), b) == expected
    assert bits.sha256(a.t(), b) != expected
    assert bits.sha256(torch.tensor(True)) == hashlib.sha256(b"\1").hexdigest()


def distance_label(n):
    """The histogram's bar for a distance, told in another way: by trying every bar."""
    low, high = 3, 4
    while n > high:
        low, high = high + 1, 2 * high
    return str(n) if n < 3 else f"{low} to {high}"


@given(st.lists(st.integers(-3000, 3000), min_size=1, max_size=30), st.sampled_from(HALVES))
def test_the_histogram_counts_what_differs_by_how_much(steps, dtype):
    expected = torch.linspace(0.5, 2.0, len(steps)).to(dtype)
    found = expected.clone()
    found.view(torch.int16).add_(torch.tensor(steps, dtype=torch.int16))
    found_bits, sentence = bits.difference(expected, found)
    apart = [abs(n) for n in steps if n]
    assert sentence == ""
    if not apart:
        assert found_bits is None
        return
    first = next(i for i, n in enumerate(steps) if n)
    assert (found_bits.index, found_bits.ulps) == ((first,), steps[first])
    assert (found_bits.differing, found_bits.elements) == (len(apart), len(steps))
    labels = [distance_label(n) for n in apart]
    assert found_bits.histogram == {label: labels.count(label) for label in labels}
    assert int(found_bits.found, 16) - int(found_bits.expected, 16) == steps[first]
    assert float(found_bits.found_value) == float(found[first])


def test_nan_and_zeros_have_bars_of_their_own(monkeypatch):
    monkeypatch.setattr(bits, "_CHUNK", 2)
    nan = float("nan")
    expected = torch.tensor([[nan, 1.0, 0.0], [2.0, nan, 1.0]])
    found = torch.tensor([[nan, nan, -0.0], [2.0, 3.0, 1.0]])
    found_bits, _ = bits.difference(expected, found)
    assert found_bits.index == (0, 1)
    assert found_bits.ulps is None
    assert found_bits.histogram == {"0": 1, "NaN in one": 2}
    assert "NaN in one of them" in str(found_bits)
    assert "the zero of the other sign" in str(bits.difference(expected[0, 2:], found[0, 2:])[0])


# -- plain modules ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Doubles, which is exact; wrong by `by` units in one element, at one of its calls or at all, where told so."""

    def __init__(self, element=None, step=None, by=1):
        super().__init__()
        self.element, self.step, self.by, self.calls = element, step, by, 0

    def forward(self, x):
        x = x * 2
        if self.element is not None and self.step in (None, self.calls):
            flip(x, self.element, self.by)
        self.calls += 1
        return x


class Net(nn.Module):
    """A chain of blocks, two layers in each."""

    def __init__(self, wrong=None, **how):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Layer(), Layer()) for _ in range(4))
        if wrong is not None:
            self.blocks[wrong][1] = Layer(**how)

    def forward(self, x, *, scale=None):
        for block in self.blocks:
            x = block(x)
        return {"sample": x if scale is None else x * scale, "shape": (3, "text")}


class Again:
    """A context for `around`: the layers count their steps anew in every pass."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        for layer in self.model.modules():
            if isinstance(layer, Layer):
                layer.calls = 0

    def __exit__(self, *exception):
        pass


def number(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_equal_models_part_nowhere():
    assert trace(Net(), Net(), (number(3, 4),)) is None
    model = Net()
    assert trace(model, model, [(number(3, 4),), {"x": number(2, 4), "scale": 3}]) is None


@settings(max_examples=25)
@given(
    st.integers(0, 3),
    st.integers(0, 11),
    st.integers(0, 2),
    st.sampled_from([-3, -1, 1, 2]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_a_planted_error_is_found_at_its_step_block_and_element(block, element, step, by, dtype):
    stock, wrong = Net(), Net(block, element=element, step=step, by=by)
    x = number(3, 4, dtype=dtype)
    found = trace(stock, wrong, [(x,), {"x": x * 3}, (x,)], around_b=lambda: Again(wrong))
    assert (found.step, found.block, found.place, found.kind) == (step, block, f"blocks.{block}.1", "output")
    assert (found.what, found.module, found.operator, found.call) == ("output", "Layer", None, 0)
    assert found.after == f"the input of blocks.{block}.1"
    assert found.within == f"blocks.{block}"
    assert found.bits.index == divmod(element, 4)
    assert (found.bits.differing, found.bits.elements) == (1, 12)
    scaled = [x, x * 3, x][step] * 2 ** (2 * block + 2)
    up = by if scaled[divmod(element, 4)] > 0 else -by  # more bits are a larger number away from zero
    assert found.bits.ulps == up
    assert found.bits.histogram == {distance_label(abs(by)): 1}
    assert found.notes == ()


def test_only_the_steps_asked_for_are_run():
    stock, wrong = Net(), Net(2, element=0, step=1)
    steps = [(number(3),)] * 3
    assert trace(stock, wrong, steps, steps=[0], around_b=lambda: Again(wrong)) is None
    found = trace(stock, wrong, steps, steps=[0, 2], around_b=lambda: Again(wrong))
    assert (found.step, found.block) == (2, 2)  # its second call, which is the third step here


class Shared(nn.Module):
    """One layer called three times, with code of its own in between: `code` changes what the last call is given."""

    def __init__(self, code=None):
        super().__init__()
        self.layer, self.code = nn.Identity(), code

    def forward(self, x):
        x = self.layer(self.layer(x) * 2)
        return (self.layer(self.code(x) if self.code else x * 1), x)


def test_a_difference_between_two_calls_is_laid_to_the_module_whose_code_it_is():
    found = trace(nn.Sequential(Shared()), nn.Sequential(Shared(lambda x: flip(x.clone(), 2))), (number(4),))
    assert (found.kind, found.place, found.within, found.call, found.what) == ("input", "0.layer", "0", 2, "input")
    assert found.after == "the output of 0.layer"
    assert "code of 0 itself made the difference (call 3 of this step)" in str(found)


def test_arguments_match_whether_given_by_position_or_by_name():
    class Named(Shared):
        def forward(self, x):
            return self.layer(input=x * 2)

    class Placed(Shared):
        def forward(self, x):
            return self.layer(flip(x * 2, 0))

    found = trace(Named(), Placed(), {"x": number(4)})
    assert (found.kind, found.what) == ("input", "input")


def test_strides_are_no_difference():
    class Other(Shared):
        def forward(self, x):
            return tuple(t.t().contiguous().t() for t in super().forward(x))

    assert trace(Shared(), Other(), (number(3, 4),)) is None


@pytest.mark.parametrize(
    ("change", "what", "sentence"),
    [
        (lambda out: {"sample": out["sample"].float()}, "output.sample", "the dtype is torch.float32"),
        (lambda out: {"sample": out["sample"][:1]}, "output.sample", "the shape is torch.Size([1, 4])"),
        (lambda out: {}, "output.sample", "model_b gives no such tensor"),
        (lambda out: {**out, "more": [out["sample"]]}, "output.more.0", "model_a gives no such tensor"),
    ],
)
def test_another_form_is_a_difference_too(change, what, sentence):
    class Changed(Net):
        def forward(self, x):
            return change(super().forward(x))

    found = trace(Net(), Changed(), (number(3, 4),))
    assert (found.place, found.kind, found.what, found.bits, found.block) == ("", "output", what, None, None)
    assert found.sentence.startswith(sentence)
    assert found.sentence in str(found)


def test_places_called_in_one_run_only_are_left_out_and_named():
    stock, other = Net(), Net(3, element=5)
    other.blocks[1] = Layer()  # which calls no layers below it, and doubles once
    other.blocks[1].forward = lambda x: x * 4
    found = trace(stock, other, (number(3, 4),))
    assert found.place == "blocks.3.1"
    assert found.notes == ("called by model_a alone or more often, so not compared there: blocks.*.*",)


def test_weights_that_differ_are_named():
    a = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4).eval())
    b = copy.deepcopy(a)
    with torch.no_grad():
        flip(b[1].bias, 2, 1 << 23)  # twice as large
    found = trace(a, b, (number(3, 4, dtype=torch.float32),))
    assert (found.place, found.bits.index[1]) == ("1", 2)
    (note,) = found.notes
    assert note.startswith("the weights differ (model_b's, with model_a's as the reference): 1.bias differs at [2]: 0x")


def test_one_attention_backend_against_another():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_qkv, self.to_out = nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, x):
            q, k, v = self.to_qkv(x).unflatten(2, (12, 16)).transpose(1, 2).chunk(3, dim=1)
            return x + self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention())
    one = {"around_a": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)}
    x = (torch.randn(1, 300, 64),)
    assert trace(model, model, x, **one, around_b=one["around_a"]) is None
    found = trace(model, model, x, **one, around_b=lambda: sdpa_kernel(SDPBackend.MATH))
    assert (found.kind, found.place, found.within) == ("input", "0.to_out", "0")
    assert found.after == "the output of 0.to_qkv"
    assert sum(found.bits.histogram.values()) == found.bits.differing > 1


class Doubled(nn.Module):
    """A module of ours around others: dynamo doesn't compile torch's own containers by themselves."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), nn.ReLU())

    def forward(self, x):
        return self.inner(x * 2)


@pytest.mark.parametrize("warm", [False, True], ids=["compiled while traced", "compiled before"])
@pytest.mark.parametrize("how", ["whole", "wrapped", "in place"])
def test_compiled_code_is_one_place(how, warm):
    def wrong(graph, examples):  # a compiler with an error of one unit in the last place
        return lambda *args: tuple(flip(out.clone(), 5) for out in graph(*args))

    torch.compiler.reset()
    stock = nn.Sequential(Doubled(), Doubled(), Doubled())
    model = copy.deepcopy(stock)
    x = number(2, 4).abs()
    if how == "whole":
        model = torch.compile(model, backend=wrong, fullgraph=True)
    elif how == "wrapped":
        model[1] = torch.compile(model[1], backend=wrong, fullgraph=True)
    else:
        model[1].compile(backend=wrong, fullgraph=True)
    if warm:
        with torch.no_grad():
            model(x)
    found = trace(stock, model, (x,))
    assert (found.kind, found.place) == ("output", "" if how == "whole" else "1")
    assert found.module == ("Sequential" if how == "whole" else "Doubled")
    assert (found.bits.index, found.bits.ulps, found.bits.differing) == ((1, 1), 1, 1)
    assert trace(model, model, (x,)) is None


@dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


def test_functions_are_compared_by_their_results_and_say_so():
    def right(x, y):
        return [x + y, (x * y,)]

    def wrong(x, y):
        return [x + y, (flip(x * y, 7),)]

    x = number(2, 4)
    assert trace(right, right, (x, x)) is None
    found = trace(right, wrong, {"x": x, "y": x})
    assert (found.kind, found.place, found.what, found.module, found.bits.index) == (
        *("output", "()", "output.1.0", None),
        (1, 3),
    )
    assert trace(Pair, lambda first, second: Pair(first, flip(second.clone(), 2)), (x, x)).what == "output.second"
    assert found.notes == (
        "these are no modules, so only results and fused sites were compared; model= looks inside one",
    )


def test_functions_that_call_a_model_are_looked_into_with_it():
    stock = Net()

    def run(x):
        return [stock(x)["sample"] for _ in range(2)]

    @contextlib.contextmanager
    def wrong():
        stock.blocks[2][0].element, stock.blocks[2][0].step = 3, 1
        with Again(stock):
            yield
        stock.blocks[2][0].element = None

    x = (number(4),)
    assert trace(run, run, x, model=stock) is None
    found = trace(run, run, x, model=stock, around_b=wrong)
    assert (found.place, found.call, found.bits.index, found.notes) == ("blocks.2.0", 1, (3,), ())


def test_both_runs_draw_the_same_random_numbers():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    state = torch.get_rng_state()
    assert trace(model, model, [(torch.ones(50),)] * 2) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_that_does_not_repeat_itself_is_said_to_be_so():
    calls = []

    def drifting(x):
        calls.append(x)
        return x + len(calls)

    found = trace(lambda x: x + 1, drifting, (torch.zeros(2),))
    assert found is None  # its first call is right
    found = trace(lambda x: x + 1, drifting, (torch.zeros(2),))
    assert found.notes[-1] == "model_b does not repeat itself: run again, it gave other bits here"
    assert found.bits.found_value == "3.0"
    moods = iter([1.0, 2.0, 2.0, 2.0])
    found = trace(lambda x: x + next(moods), lambda x: x + next(moods), (torch.zeros(2),))
    assert found.notes[-1] == "model_a does not repeat itself: run again, it gave other bits here"
    assert found.sentence == "the bits parted, and no longer did when both were run again"


def test_no_run_may_change_its_inputs():
    with pytest.raises(ValueError, match="model_b changes its input x in place, so no other run gets the same"):
        trace(Net(), lambda x: x.mul_(2), (number(3),))


def test_nothing_but_digests_is_kept():
    """What a layer gave is freed as soon as the model lets go of it, however long the model is."""
    alive, most = [], []

    class Watched(nn.Identity):
        def forward(self, x):
            most.append(sum(ref() is not None for ref in alive))
            out = x * 2
            alive.append(weakref.ref(out))
            return out

    layers = [Watched() for _ in range(9)]
    model = nn.Sequential(*layers)
    wrong = nn.Sequential(*layers, Layer(element=0))
    with_end = nn.Sequential(*layers, Layer())
    assert trace(model, model, (number(3),)) is None
    assert trace(with_end, wrong, (number(3),)).place == "9"
    assert max(most) == 1  # a layer's own input


def test_nothing_is_left_behind():
    call = nn.Module.__call__

    class Fails(nn.Module):
        def forward(self, x):
            assert nn.Module.__call__ is not call
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trace(nn.Sequential(Fails()), Net(), (number(3),))
    assert nn.Module.__call__ is call


def test_what_is_found_prints_and_goes_into_json():
    found = trace(Net(), Net(1, element=5), (number(3, 4),))
    assert str(found).splitlines()[:3] == [
        "First divergence: step 0, blocks.1.1 (Layer)",
        "  its inputs are equal, its output differs",
        "  the first element that differs: [1, 1]",
    ]
    assert f"expected {found.bits.expected} = {found.bits.expected_value}" in str(found)
    assert "1 unit in the last place" in str(found)
    assert "1 ######################################## 1" in str(found)
    as_dict = json.loads(json.dumps(found.as_dict()))
    assert as_dict["bits"]["histogram"] == {"1": 1}
    assert as_dict["bits"]["index"] == [1, 1]
    assert (as_dict["place"], as_dict["step"], as_dict["block"]) == ("blocks.1.1", 0, 1)


BAD = {
    "inputs": ({"inputs": torch.zeros(3)}, "inputs is a Tensor; accepted: a dict"),
    "an entry": ({"inputs": [torch.zeros(3)]}, "an entry of inputs is a Tensor; accepted: a dict"),
    "no entry": ({"inputs": []}, "inputs is an empty list; accepted"),
    "steps beyond": ({"steps": [1]}, r"steps is \[1\]; accepted: a list of indices of inputs, each from 0 to 0"),
    "steps no list": ({"steps": 0}, "steps is 0; accepted"),
    "no steps": ({"steps": []}, r"steps is \[\]; accepted"),
    "model_a": ({"model_a": None}, "model_a is a NoneType; accepted: an nn.Module or another callable"),
    "model": ({"model": "net"}, "model is a str; accepted: the nn.Module that both runs call"),
    "around_b": ({"around_b": contextlib.nullcontext()}, "around_b is a nullcontext; accepted: a function"),
    "no tensors": ({"model_a": lambda x: 3}, "the result of model_a holds no tensor; accepted: tensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changed, sentence = BAD[name]
    given = {"model_a": Net(), "model_b": Net(), "inputs": (number(3),), **changed}
    with pytest.raises((TypeError, ValueError), match=sentence) as raised:
        trace(**given)
    assert "\n" not in str(raised.value)


# -- LTX-2 ------------------------------------------------------------------------------------------------------------


WIDTH = 128  # of both streams: the least that norms take, and the fewer layouts there are, the fewer are proved


@pytest.fixture(scope="module")
def ltx():
    """LTX-2.3's transformer, two blocks of 2 heads, and the arguments of a step."""
    host = pytest.importorskip("test_diffusers")
    heads = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2, "cross_attention_dim": WIDTH}
    audio = {f"audio_{name}": value for name, value in heads.items()}
    model = host.make({**host.V23, **heads, **audio}, device="cuda" if torch.cuda.is_available() else "cpu")
    return model, host.feed(model, batch=1)


def plant(monkeypatch, operator, site, element, output=None):
    """One element of one output of the operator, a unit off in its last place, at its `site`-th call of each pass."""
    calls = []
    decide = operator.routed

    def route(*args):
        found = copy.copy(decide(*args))
        calls.append(found)
        if len(calls) - 1 == site:
            run = found.run

            def wrong(*args):
                result = run(*args)
                flip(result if output is None else result[output], element)
                return result

            found.run = wrong
        return found

    monkeypatch.setattr(operator, "routed", route)

    @contextlib.contextmanager
    def around(model):
        calls.clear()
        with bitfuse.accelerated(model):
            yield

    return around


@pytest.mark.usefixtures("launched_as_reference")
def test_an_accelerated_model_parts_nowhere_from_itself(ltx):
    model, fed = ltx
    call = nn.Module.__call__
    handles = []

    def around():
        handles.append(bitfuse.accelerate(model))
        return handles[-1]

    assert trace(model, model, fed, around_b=around) is None
    (handle,) = handles
    assert {site.state for site in handle.sites} == {"fused"}  # nobody looking changed what runs
    assert all(site.observers == () for site in handle.sites)
    assert nn.Module.__call__ is call


# operator, its call of a step that goes wrong (each block makes six head gates, five residual norms or so, in the
# order of the report), what must be named
PLANTED = {
    "gate of block 1's attn1": (HEAD_GATE, 6, None, "transformer_blocks.1.attn1.gate"),
    "gate of block 0's a2v": (HEAD_GATE, 4, None, "transformer_blocks.0.audio_to_video_attn.gate"),
    "block 1's norm2, the norm": (RESIDUAL_NORM, 4, 1, "transformer_blocks.1.norm2"),
    "block 1's norm2, the sum": (RESIDUAL_NORM, 4, 0, "transformer_blocks.1.norm2"),
    "block 0's last gate": (GATED_RESIDUAL, 1, None, "transformer_blocks.0.audio_output"),
}


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("name", PLANTED)
def test_one_unit_in_one_element_of_one_site_is_found_there(ltx, monkeypatch, name):
    model, fed = ltx
    operator, call, output, site = PLANTED[name]
    around = plant(monkeypatch, operator, call, 37, output)
    found = trace(model, model, fed, around_b=lambda: around(model))
    assert (found.kind, found.place, found.operator, found.run) == ("site", site, operator.name, "model_b")
    assert found.block == int(site.split(".")[1])
    assert found.what == ("output" if output is None else f"output.{output}")
    assert (abs(found.bits.ulps), found.bits.differing, found.bits.histogram) == (1, 1, {"1": 1})
    assert found.bits.index == (0, 0, 37)
    text = str(found)
    assert text.startswith(f"First divergence: step 0, {site} ({operator.name})\n")
    assert "fused operator differs from its PyTorch chain's on the same inputs" in text


@pytest.mark.usefixtures("launched_as_reference")
def test_it_is_found_in_either_run_and_against_an_accelerated_one(ltx, monkeypatch):
    model, fed = ltx
    other = copy.deepcopy(model)
    around = plant(monkeypatch, HEAD_GATE, 6, 37)
    found = trace(model, other, fed, around_a=lambda: around(model))
    assert (found.kind, found.place, found.run) == ("site", "transformer_blocks.1.attn1.gate", "model_a")
    assert found.after == "the output of transformer_blocks.1.attn1.to_k"  # nothing between it and the gate in stock
    with bitfuse.accelerated(other):
        found = trace(model, other, [fed], around_a=lambda: around(model))
    assert (found.kind, found.place, found.run) == ("site", "transformer_blocks.1.attn1.gate", "model_a")


@pytest.mark.usefixtures("launched_as_reference")
def test_one_weight_of_a_gate_is_found_at_its_block(ltx):
    """Every operator is right here: the tables of the other model differ in one element of block 1's gate for attn1.

    By much, as what is found is the stream after it: a sum in bf16 that would hide one unit of a gate.
    """
    model, fed = ltx
    column, twin = 37, copy.deepcopy(model)
    with torch.no_grad():
        twin.transformer_blocks[1].scale_shift_table[2, column] += 8
    around = {"stock": contextlib.nullcontext, "accelerated": lambda: bitfuse.accelerated(twin)}
    for name, (called, passed) in {"stock": ("norm2", []), "accelerated": ("attn2", ["norm2"])}.items():
        found = trace(model, twin, fed, around_b=around[name])
        assert (found.kind, found.within, found.block) == ("input", "transformer_blocks.1", 1)
        assert found.place == f"transformer_blocks.1.{called}"
        assert found.after == "the output of transformer_blocks.1.audio_attn1"
        assert [site for site, _ in found.passed if "text" not in site] == [f"transformer_blocks.1.{s}" for s in passed]
        assert "the weights differ" in found.notes[-1]
        assert f"transformer_blocks.1.scale_shift_table differs at [2, {column}]" in found.notes[-1]


def test_a_cuda_graph_is_refused(ltx):
    model, fed = ltx
    with pytest.raises(
        ValueError, match=r"model_b is accelerated with cuda_graph=True, .*; accepted: cuda_graph=False"
    ):
        trace(model, model, fed, around_b=lambda: bitfuse.accelerated(model, cuda_graph=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_a": None}, "model_a is a NoneType; accepted: an nn.Module or another callable"),
        ({"model_b": 1}, "model_b is a int; accepted: an nn.Module or another callable"),
        ({"inputs": None}, "inputs is a NoneType; accepted: a dict of keyword arguments"),
        ({"inputs": [1]}, "an entry of inputs is a int; accepted"),
        ({"model": "x"}, "model is a str; accepted: the nn.Module"),
        ({"around_b": None}, "around_b is a NoneType; accepted: a function that returns a context manager"),
        (
            {"around_b": lambda: None},
            "around_b returned a NoneType; accepted: a function that returns a context manager",
        ),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_accepted(change, words):
    model = nn.Linear(2, 2)
    given = {"model_a": model, "model_b": model, "inputs": (torch.zeros(1, 2),), **change}
    with pytest.raises(TypeError) as error:
        trace(**given)
    assert words in str(error.value)
