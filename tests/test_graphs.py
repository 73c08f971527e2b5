"""Graph replay: the same bits as the forward, results that stay, and a reason wherever there is no graph.

Without a GPU a stand-in for CUDA records the forward and replays it on the same memory; what only a GPU can show
(captures that fail, pools, streams, kernels) is marked `gpu`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import importlib
import inspect
import pickle
import threading
import time
import weakref

import pytest
import torch
from torch import Tensor, nn

import bitfuse
from bitfuse.core.bits import compare
from bitfuse.core.kernel import interpreter
from bitfuse.hosts.handle import Handle
from bitfuse.run import memo, twin
from bitfuse.run.graphs import GraphedForward, cuda, graph_forward, key
from bitfuse.run.graphs import replay as replays
from bitfuse.run.graphs.watch import Watch
from bitfuse.run.memo import Constant, Prelude
from bitfuse.tools import seeded


class Stand:
    """What `Cuda` does, on CPU tensors: those of float64 count as the host's, all others as the device's.

    A capture computes nothing, so its results are poisoned; a replay runs what was captured and fills them.
    """

    def __init__(self):
        self.error = None  # raised by the next captures
        self.corrupt = False  # replays flip a bit
        self.in_capture = self.in_turn = False
        self.captures = self.replays = self.live = self.given_back = 0

    def holds(self, t):
        return t.dtype != torch.float64

    def capturing(self):
        return self.in_capture

    def drawn(self, device):
        return hash(tuple(torch.get_rng_state().tolist()))

    @contextlib.contextmanager
    def turn(self, device):
        assert not self.in_turn
        self.in_turn = True
        yield
        self.in_turn = False

    def capture(self, device, run):
        if self.error is not None:
            raise self.error
        self.in_capture = True
        try:
            result = run()
        finally:
            self.in_capture = False
        for t in tensors_in(result):
            twin.flat(t).view(torch.uint8).fill_(0x7F)
        self.captures += 1
        self.live += 1
        return (run, result), result

    def replay(self, graph):
        assert self.in_turn
        run, result = graph
        for static, fresh in zip(tensors_in(result), tensors_in(run()), strict=True):
            twin.flat(static).copy_(twin.flat(fresh))
            if self.corrupt:
                twin.flat(static).view(torch.uint8)[0] ^= 1
        self.replays += 1

    def drop(self, graph):
        self.live -= 1

    def wait(self, device):
        pass

    def give_back(self):
        self.given_back += 1

    def pool_bytes(self):
        return 1000 * self.live


def tensors_in(value):
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
        self.table = nn.Parameter(torch.randn(8))
        self.register_buffer("shift", torch.randn(8))
        self.factor, self.zero, self.one = 2.0, 0.0, True
        self.calls = []  # what each run of the forward was handed

    def forward(self, x, scale=1.0, flag=None, extra=None, mask=None):
        self.calls.append(x)
        y = self.inner(x.float()) * self.table * scale + self.shift * self.factor
        for t in tensors_in([extra]):
            y = y + t.float().sum()
        return y if mask is None else y * mask.to(y.dtype)


@pytest.fixture(autouse=True)
def cpu_alignment(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(twin, "ALIGNED", 64)  # of every new CPU tensor


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def stand_in(replay):
    replay._cuda = Stand()
    return replay


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy().eval()


@pytest.fixture
def replay(toy):
    return stand_in(GraphedForward(toy, toy.forward))


def x_of(seed, *shape):
    return torch.randn(*(shape or (3, 8)), generator=torch.Generator().manual_seed(seed))


def assert_equal(expected, found):
    mismatch = compare(tuple(tensors_in(expected)), tuple(tensors_in(found)))
    assert mismatch is None, mismatch.sentence


def captured(replay, *args, **kwargs):
    """Two calls, of which the second captures."""
    had = replay.captures
    for _ in range(2):
        replay(*args, **kwargs)
    assert replay.captures == had + 1, replay.reasons
    return replay


def reason_of(replay, *args, **kwargs):
    """The reason why one more call runs without a graph, which must not change its result."""
    before = replay.reasons.copy(), replay.replays, replay.captures
    expected = replay._forward(*args, **kwargs)
    assert_equal(expected, replay(*args, **kwargs))
    new = replay.reasons - before[0]
    assert (replay.replays, replay.captures) == before[1:], "the call used a graph"
    assert len(new) == 1
    return next(iter(new))


# -- one forward ---------------------------------------------------------------------------------------------------


def test_the_first_call_is_eager_the_second_captures_and_further_ones_replay(toy, replay):
    for seed in range(6):
        x = x_of(seed)
        expected = toy(x)
        assert_equal(expected, replay(x))
    assert (replay.captures, replay.replays, replay.graphs) == (1, 4, 1)
    assert replay.reasons == {"a first call with these inputs and settings": 1}
    assert replay._cuda.captures == 1
    assert replay._cuda.replays == 5  # the four, and the one that was compared


def test_kept_results_and_the_callers_tensors_do_not_change(toy, replay):
    inputs = [x_of(seed) for seed in range(6)]
    before = [x.clone() for x in inputs]
    kept = [replay(x) for x in inputs]
    for x, old, result in zip(inputs, before, kept, strict=True):
        assert_equal(old, x)
        assert_equal(toy(x), result)
    assert len({t.data_ptr() for t in kept}) == len(kept)


def test_the_captured_forward_reads_the_static_copies_only(toy, replay):
    captured(replay, x := x_of(0))
    toy.calls.clear()
    replay(x_of(1))
    replay(x_of(2))
    first, second = toy.calls
    assert first is second
    assert first.data_ptr() != x.data_ptr()


def test_more_eager_calls_before_the_capture(toy):
    replay = stand_in(GraphedForward(toy, toy.forward, after=3))
    for _ in range(3):
        replay(x_of(0))
    assert replay.captures == 0
    replay(x_of(0))
    assert replay.captures == 1


@pytest.mark.parametrize("options", [{"limit": 0}, {"after": 0}])
def test_bounds_of_the_options(toy, options):
    with pytest.raises(ValueError, match="at least 1"):
        GraphedForward(toy, toy.forward, **options)


# -- the key -------------------------------------------------------------------------------------------------------

EXPANDED = x_of(0, 3, 1).expand(3, 8)
BASE = {"x": x_of(0), "scale": 1.0, "flag": None, "extra": None}
OTHER_CALLS = {
    "shape": {"x": x_of(0, 4, 8)},
    "strides": {"x": x_of(0, 8, 3).t()},
    "overlapping": {"x": EXPANDED},
    "dtype": {"x": x_of(0).bfloat16()},
    "alignment": {"x": x_of(0, 25)[1:].view(3, 8)},
    "requires_grad": {"x": x_of(0).requires_grad_()},
    "a float": {"scale": 2.0},
    "an int for a float": {"scale": 1},
    "a bool for a float": {"scale": True},
    "minus zero": {"flag": -0.0},
    "nan": {"flag": float("nan")},
    "a string": {"flag": "a"},
    "a list": {"extra": []},
    "a tuple": {"extra": ()},
    "a dictionary": {"extra": {}},
    "nested tensors": {"extra": [x_of(1), {"a": (x_of(2), None)}]},
    "a host tensor": {"mask": torch.ones(8, dtype=torch.float64)},
}


@pytest.mark.parametrize("other", OTHER_CALLS.values(), ids=OTHER_CALLS)
def test_calls_of_another_kind_get_a_graph_of_their_own(toy, replay, other):
    captured(replay, **BASE)
    call = BASE | other
    assert reason_of(replay, **call) == "a first call with these inputs and settings"
    replay(**call)
    assert replay.captures == replay.graphs == 2
    for arguments in (BASE, call, BASE, call):
        before = replay.replays
        assert_equal(toy(**arguments), replay(**arguments))
        assert replay.replays == before + 1
    assert torch.equal(EXPANDED, x_of(0, 3, 1).expand(3, 8))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"scale": 0.0}, {"scale": -0.0}),
        ({"flag": 1}, {"flag": True}),
        ({"extra": [x_of(1), x_of(2)]}, {"extra": (x_of(1), x_of(2))}),
        ({"extra": [[x_of(1)], x_of(2)]}, {"extra": [x_of(1), [x_of(2)]]}),
        ({"extra": {"a": x_of(1)}}, {"extra": {"b": x_of(1)}}),
        ({"mask": torch.ones(8, dtype=torch.float64)}, {"mask": torch.full((8,), 2.0, dtype=torch.float64)}),
        (
            {"mask": torch.zeros(8, dtype=torch.float64)},
            {"mask": -torch.zeros(8, dtype=torch.float64)},
        ),
    ],
    ids=str,
)
def test_what_compares_equal_but_is_not_the_same(toy, replay, a, b):
    captured(replay, x_of(0), **a)
    assert reason_of(replay, x_of(0), **b) == "a first call with these inputs and settings"


def test_by_position_or_by_name_is_the_same_result(toy, replay):
    for arguments, named in (((x_of(0), 2.0), {}), ((x_of(0),), {"scale": 2.0}), ((), {"x": x_of(0), "scale": 2.0})):
        captured(replay, *arguments, **named)
        assert_equal(toy(x_of(0), 2.0), replay(*arguments, **named))


def test_nan_arguments_have_one_key(replay):
    captured(replay, x_of(0), flag=float("nan"), mask=torch.full((8,), float("nan"), dtype=torch.float64))
    assert replay.graphs == 1


@contextlib.contextmanager
def setting(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def attribute(owner, name, value):
    return setting(lambda: getattr(owner, name), lambda v: setattr(owner, name, v), value)


SETTINGS = {
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "default dtype": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "tf32": lambda: attribute(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "tf32 everywhere": lambda: attribute(torch.backends, "fp32_precision", "tf32"),
    "precision": lambda: setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "bf16 sums": lambda: attribute(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "flash": lambda: setting(torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False),
    "efficient": lambda: setting(
        torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp, False
    ),
    "math": lambda: setting(torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, False),
    "cudnn attention": lambda: setting(
        torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False
    ),
    "sdpa_kernel": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "deterministic": lambda: setting(
        # not by torch.use_deterministic_algorithms, which imports torch._inductor: 13 s, and another torch.manual_seed
        torch.are_deterministic_algorithms_enabled,
        torch._C._set_deterministic_algorithms,
        True,
    ),
    "cudnn benchmark": lambda: attribute(torch.backends.cudnn, "benchmark", True),
    "cudnn": lambda: attribute(torch.backends.cudnn, "enabled", False),
}


@pytest.mark.parametrize("context", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_choose_kernels_are_in_the_key(toy, replay, context):
    # The first `use_deterministic_algorithms` of a process imports it, and with it functions change that a graph holds
    importlib.import_module("torch._inductor.config")
    toy.requires_grad_(False)
    torch.set_float32_matmul_precision("highest")  # the default, but said: reads "ieee", as it will afterwards
    captured(replay, x_of(0))
    x = x_of(0)
    with context():
        assert reason_of(replay, x) == "a first call with these inputs and settings"
    before = replay.replays
    replay(x_of(0))
    assert replay.replays == before + 1


def test_reading_the_settings_after_tf32_was_set_in_the_new_way():
    """From then on PyTorch's older getters raise."""
    with attribute(torch.backends.cuda.matmul, "fp32_precision", "tf32"):
        new = key.settings()
    assert new != key.settings()


def test_what_python_code_stands_in_for_is_in_the_key():
    before, lib = key.settings(), torch.library.Library("aten", "IMPL")
    try:
        lib.impl("_fused_rms_norm", lambda *args: args[:2], "CUDA")
        during = key.settings()
    finally:
        lib._destroy()
    assert during != before
    assert key.settings() == before


def test_settings_of_the_host_are_in_the_key(toy):
    backend = ["native"]
    replay = stand_in(GraphedForward(toy, toy.forward, settings=lambda: tuple(backend)))
    captured(replay, x_of(0))
    backend[0] = "flash"
    assert reason_of(replay, x_of(0)) == "a first call with these inputs and settings"


# -- memory --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda: x_of(0, 4, 6),
    "transposed": lambda: x_of(0, 6, 4).t(),
    "with gaps": lambda: x_of(0, 4, 20)[:, 3:9],
    "expanded": lambda: x_of(0, 4, 1).expand(4, 6),
    "a scalar": lambda: x_of(0, 1)[0],
    "empty": lambda: torch.empty(0, 6),
    "misaligned": lambda: x_of(0, 25)[1:].view(4, 6),
    "bytes": lambda: torch.arange(30, dtype=torch.uint8)[3:].view(3, 9),
    "nan payloads": lambda: torch.tensor([0x7F81, -0x7F, 0x7FFF], dtype=torch.int16).view(torch.bfloat16),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_twins_and_copies_have_the_form_alignment_and_bits_of_the_original(make):
    t = make()
    other_memory, memory = twin.stand_in(t)
    memory.copy_(twin.flat(t))
    for other in (other_memory, twin.copy(t)):
        assert (other.shape, other.stride(), other.dtype) == (t.shape, t.stride(), t.dtype)
        assert t.numel() == 0 or (other.data_ptr() - t.data_ptr()) % 64 == 0
        as_bytes = [v.contiguous().view(-1).view(torch.uint8) for v in (t, other)]
        assert torch.equal(*as_bytes)
        assert t.numel() == 0 or other.data_ptr() != t.data_ptr()


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_results_of_any_layout(toy, make):
    replay = stand_in(GraphedForward(toy, lambda x: (make(), x * 2)))
    captured(replay, x_of(0))
    expected, found = make(), replay(x_of(1))[0]
    assert_equal(expected, found)
    assert found.stride() == expected.stride()


# -- structures ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    sample: Tensor
    other: Tensor | None = None
    note: str = ""


STRUCTURES = {
    "tuple": lambda x: (x + 1, x * 2),
    "list": lambda x: [x + 1],
    "nested": lambda x: {"a": (x + 1, None), "b": [x * 2, {"c": 3}]},
    "dataclass": lambda x: Output(x + 1, None, "kept"),
}


def same_structure(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return True
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_structure(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_structure, a, b))
    if dataclasses.is_dataclass(a):
        return all(same_structure(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b


@pytest.mark.parametrize("forward", STRUCTURES.values(), ids=STRUCTURES)
def test_the_structure_of_a_result(toy, forward):
    replay = captured(stand_in(GraphedForward(toy, forward)), x_of(0))
    for seed in (1, 2):
        expected, found = forward(x_of(seed)), replay(x_of(seed))
        assert same_structure(expected, found)
        assert_equal(expected, found)
    assert replay.replays == 2


def test_diffusers_output(toy):
    upstream = pytest.importorskip("diffusers.models.transformers.transformer_ltx2")

    def forward(x, audio=True):
        return upstream.AudioVisualModelOutput(sample=x + 1, audio_sample=x * 2 if audio else None)

    replay = stand_in(GraphedForward(toy, forward))
    for audio in (True, False):
        captured(replay, x_of(0), audio=audio)
        found, expected = replay(x_of(1), audio=audio), forward(x_of(1), audio)
        assert type(found) is upstream.AudioVisualModelOutput
        assert found.keys() == expected.keys()
        assert_equal(expected, found)
        assert found["sample"] is found.sample is found[0]


class Strange:
    pass


UNFIT = {
    "the result is a builtins.set, ": lambda x: {1},
    "the result[1] is a test_graphs.Strange, ": lambda x: (x + 1, Strange()),
    "the result is a Sub, not a plain tensor": lambda x: (x + 1).as_subclass(Sub),
    "the result[1] is on cpu, with 3 elements": lambda x: (x + 1, torch.zeros(3, dtype=torch.float64)),
    "a result has elements of more than 8 bytes": lambda x: torch.zeros(3, dtype=torch.complex128),
    "the forward draws random numbers": lambda x: x + torch.randn(8),
    "the forward writes into x": lambda x: x.mul_(0) + 1,
}


class Sub(Tensor):
    pass


@pytest.mark.parametrize("sentence", UNFIT)
def test_forwards_that_get_no_graph(toy, sentence):
    replay = stand_in(GraphedForward(toy, UNFIT[sentence]))
    for _ in range(4):
        replay(x_of(0))
    (first, _), (reason, count) = replay.reasons.items()
    assert first == "a first call with these inputs and settings"
    assert count == 3
    assert reason.startswith(sentence)
    assert (replay.captures, replay.replays, replay._cuda.live) == (0, 0, 0)


def test_a_replay_that_is_not_the_forward_is_never_handed_out(toy, replay):
    replay._cuda.corrupt = True
    for seed in range(4):
        assert_equal(toy(x_of(seed)), replay(x_of(seed)))
    reason = max(replay.reasons, key=replay.reasons.get)
    assert reason.startswith("a replay is not the forward: output 0 differs at [0, 0]: 0x")
    assert replay.reasons[reason] == 3
    assert (replay.captures, replay.replays, replay._cuda.captures, replay._cuda.live) == (0, 0, 1, 0)


def test_a_replay_of_another_structure_is_never_handed_out(toy):
    calls = []

    def forward(x):
        calls.append(x)
        return (x + 1, "odd" if len(calls) % 2 else "even")

    replay = stand_in(GraphedForward(toy, forward))
    for _ in range(3):
        replay(x_of(0))
    assert replay.reasons["a replay returns another structure than the forward"] == 2


# -- reasons -------------------------------------------------------------------------------------------------------


def as_dispatch_mode():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    return Passing()


@contextlib.contextmanager
def global_hook():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def switched_off():
    bitfuse.disable()
    try:
        yield
    finally:
        bitfuse.enable()


SURROUNDINGS = {
    "bitfuse is off": switched_off,
    "autocast is on": lambda: torch.autocast("cpu", torch.bfloat16),
    "a torch dispatch or function mode is active": as_dispatch_mode,
    "a hook is registered for all modules": global_hook,
    "a gradient is required of the weights": torch.enable_grad,
    "forward-mode differentiation": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("sentence", SURROUNDINGS)
def test_surroundings_in_which_no_graph_is_used(replay, sentence):
    with SURROUNDINGS[sentence]():
        torch.ones(1) + 1  # a first dispatch mode imports torch._dynamo, which puts another torch.manual_seed in place
    captured(replay, x_of(0))
    with SURROUNDINGS[sentence]():
        assert sentence in reason_of(replay, x_of(0))
    replay(x_of(0))
    assert replay.replays == 1


def test_a_capture_around_the_call(replay):
    captured(replay, x_of(0))
    replay._cuda.in_capture = True
    assert reason_of(replay, x_of(0)) == "a CUDA graph is being captured around this call"


BAD_ARGUMENTS = {
    "flag is a builtins.set": {"flag": set()},
    "flag is a builtins.object": {"flag": object()},
    "extra[1].a is a builtins.complex": {"extra": [x_of(0), {"a": 1j}]},
    "extra is a builtins.dict": {"extra": {1: x_of(0)}},
    "extra is a Sub, not a plain tensor": {"extra": x_of(0).as_subclass(Sub)},
    "extra is a torch.sparse_coo tensor": {"extra": x_of(0).to_sparse()},
    "mask is on cpu, with 65 elements": {"mask": torch.ones(65, 1, 1, dtype=torch.float64)},
    "extra is on meta": {"extra": torch.empty(3, device="meta", dtype=torch.float64)},
}


@pytest.mark.parametrize("sentence", BAD_ARGUMENTS)
def test_arguments_that_no_graph_can_take(toy, sentence):
    replay = stand_in(GraphedForward(toy, lambda x, **kwargs: x + 1))
    replay(x_of(0), **BAD_ARGUMENTS[sentence])
    assert next(iter(replay.reasons)).startswith(sentence)
    assert not replay._entries


def test_the_name_of_an_argument_given_by_position(replay):
    replay(x_of(0), 1.0, "a", None, None)
    with pytest.raises(AttributeError):
        replay(x_of(0), 1.0, None, None, Strange())
    assert any(reason.startswith("mask is a ") for reason in replay.reasons)


def test_a_gradient_of_an_argument(toy, replay):
    toy.requires_grad_(False)
    with torch.enable_grad():
        x = x_of(0).requires_grad_()
        replay(x).sum().backward()
    assert list(replay.reasons) == ["a gradient is required of x"]
    assert x.grad is not None


def test_no_tensor_at_all(toy):
    replay = stand_in(GraphedForward(toy, lambda n: n + 1))
    assert replay(3) == 4
    assert list(replay.reasons) == ["no argument is a tensor on a CUDA device"]


def test_without_cuda_there_is_a_reason_and_the_forward(toy):
    replay = GraphedForward(toy, toy.forward)
    cpu = torch.device("cpu")
    assert_equal(toy(x_of(0)), replay(x_of(0)))
    assert list(replay.reasons) == [f"the weight table is on {cpu}"]
    nothing = GraphedForward(nn.Identity(), lambda x: x + 1)
    nothing(x_of(0, 100))
    assert list(nothing.reasons) == ["the model is gone"]


def test_a_second_thread_runs_without_a_graph(toy):
    inside, go_on = threading.Event(), threading.Event()

    def forward(x):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(60)
        return toy(x)

    replay = captured(stand_in(GraphedForward(toy, forward)), x_of(0))
    results = []

    def other():
        with torch.no_grad():
            results.append(replay(x_of(5, 2, 8)))

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    assert_equal(toy(x_of(1)), replay(x_of(1)))
    go_on.set()
    thread.join()
    assert replay.reasons["another call of this model is under way"] == 1
    assert_equal(toy(x_of(5, 2, 8)), results[0])
    before = replay.replays
    replay(x_of(1))
    assert replay.replays == before + 1


def test_a_forward_that_calls_itself(toy):
    def forward(x, deeper=True):
        return replay(x, deeper=False) + 1 if deeper else toy(x)

    replay = stand_in(GraphedForward(toy, forward))
    captured(replay, x_of(0))
    assert_equal(toy(x_of(1)) + 1, replay(x_of(1)))
    assert replay.replays == 1


def test_an_error_of_the_forward_is_the_callers(toy, replay):
    captured(replay, x_of(0))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            replay(x_of(0, 3, 7))
    before = replay.replays
    replay(x_of(0))
    assert replay.replays == before + 1


# -- captures that fail --------------------------------------------------------------------------------------------


def test_a_failed_capture_is_not_tried_again(toy, replay):
    replay._cuda.error = ValueError("operation not permitted\nwhen the stream is capturing")
    for seed in range(4):
        assert_equal(toy(x_of(seed)), replay(x_of(seed)))
    replay._cuda.error = None
    assert_equal(toy(x_of(9)), replay(x_of(9)))
    assert replay.reasons["the capture failed: ValueError: operation not permitted"] == 4
    assert replay.captures == 0
    captured(replay, x_of(0, 5, 8))  # another key


class Recorder:
    """Stands in for `torch.cuda.graph` and the graph: a capture whose end fails at one point or another."""

    def __init__(self, fails_at):
        self.fails_at, self.log = fails_at, []

    def __call__(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.small = pool is None
        return self

    def __enter__(self):
        if self.fails_at == "begin" and not self.small:
            raise RuntimeError("no capture may begin")
        self.log.append("small capture" if self.small else "capture")

    def __exit__(self, *error):
        if not self.small:
            raise RuntimeError("operation failed due to a previous error during capture")

    def pool(self):
        if self.fails_at != "instantiate":
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")

    def reset(self):
        self.log.append("reset")

    def end(self, index, pool):
        if self.fails_at in ("end, later torch", "begin"):
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.log.append("end")

    def release(self, index, pool):
        self.log.append("release")


AFTER_FAILURES = {  # what PyTorch is told, of its share in the pool above all: once where it still has it, else never
    "end": ["capture", "end", "release", "reset", "small capture", "reset"],
    "end, later torch": ["capture", "release", "reset", "small capture", "reset"],
    "instantiate": ["capture", "reset", "small capture", "reset"],
    "begin": ["reset", "small capture", "reset"],
}


@pytest.mark.parametrize("fails_at", AFTER_FAILURES)
def test_what_pytorch_is_told_after_a_failed_capture(monkeypatch, fails_at):
    recorder = Recorder(fails_at)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    for name in ("CUDAGraph", "Stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: recorder)
    monkeypatch.setattr(torch.cuda, "graph", recorder)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", recorder.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", recorder.release, raising=False)
    monkeypatch.setattr(cuda, "_failed", [])

    def run():
        if fails_at != "instantiate":
            raise KeyboardInterrupt("the first error")

    ours = cuda.Cuda()
    first = {"instantiate": "due to a previous error", "begin": "no capture may begin"}.get(fails_at, "the first error")
    with pytest.raises(BaseException, match=first):
        ours.capture(torch.device("cpu"), run)
    assert recorder.log == AFTER_FAILURES[fails_at]
    assert cuda._failed == [recorder]  # PyTorch's other allocator still asks it
    assert (ours._stream, ours._pool, ours._pools) == (None, None, {})
    assert gc.isenabled()


def test_no_memory_for_a_capture(toy, replay):
    captured(replay, x_of(0))
    replay._cuda.error = torch.OutOfMemoryError("CUDA out of memory")
    for _ in range(2):
        assert_equal(toy(x_of(0, 5, 8)), replay(x_of(0, 5, 8)))
    assert replay.reasons["there was no memory left for a capture"] == 1
    assert replay.graphs == replay._cuda.live == 0
    assert replay._cuda.given_back == 1
    replay._cuda.error = None
    for _ in range(11):
        replay(x_of(0, 5, 8))
    assert replay.captures == 2  # tried again, but not soon
    captured(replay, x_of(0))


def test_a_forward_without_memory_gets_that_of_the_graphs(toy):
    full = []

    def forward(x):
        if len(x) == 5 and full:
            full.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return toy(x)

    replay = captured(stand_in(GraphedForward(toy, forward)), x_of(0))
    full.append(True)
    assert_equal(toy(x_of(0, 5, 8)), replay(x_of(0, 5, 8)))
    assert replay.graphs == replay._cuda.live == 0
    full.append(True)
    with pytest.raises(torch.OutOfMemoryError):  # there is nothing to give
        replay(x_of(0, 5, 8))


def test_an_interrupted_capture_leaves_the_lock_open(toy, replay):
    replay(x_of(0))
    replay._cuda.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        replay(x_of(0))
    replay._cuda.error = None
    replay(x_of(0))
    assert replay.captures == 1


# -- bounds --------------------------------------------------------------------------------------------------------


def test_the_graph_unused_for_longest_goes_first(toy):
    replay = stand_in(GraphedForward(toy, toy.forward, limit=2))
    captured(replay, x_of(0, 1, 8))
    captured(replay, x_of(0, 2, 8))
    replay(x_of(0, 1, 8))
    captured(replay, x_of(0, 3, 8))
    assert (replay.graphs, replay._cuda.live) == (2, 2)
    before = replay.replays
    for rows in (1, 3):
        replay(x_of(0, rows, 8))
    assert replay.replays == before + 2
    for _ in range(10):  # a key that lost its graph waits longer, so that keys in turn don't capture all the time
        assert reason_of(replay, x_of(0, 2, 8)) == "a first call with these inputs and settings"
    replay(x_of(0, 2, 8))
    assert (replay.captures, replay.graphs) == (4, 2)


def test_keys_without_a_graph_are_bounded_too(toy, replay, monkeypatch):
    monkeypatch.setattr(replays, "_KEYS_KEPT", 5)
    captured(replay, x_of(0))
    for flag in range(20):
        replay(x_of(0), flag=flag)
        assert len(replay._entries) <= 5
    assert replay.graphs == replay._cuda.live == 0


def test_reset_drops_the_graphs_and_starts_over(toy, replay):
    captured(replay, x_of(0))
    assert replay.memory() > 1000
    replay.reset()
    assert (replay.graphs, replay._cuda.live, replay.memory(), replay._cuda.given_back) == (0, 0, 0, 1)
    captured(replay, x_of(0))
    assert_equal(toy(x_of(1)), replay(x_of(1)))


def test_retired(toy, replay):
    captured(replay, x_of(0))
    replay.retire("it is over")
    assert replay.graphs == 0
    assert [reason_of(replay, x_of(0)) for _ in range(3)] == ["it is over"] * 3


# -- a host's preparations -----------------------------------------------------------------------------------------


def test_preparations_come_before_captures_and_replays(toy):
    log = []
    replay = stand_in(
        GraphedForward(
            toy,
            toy.forward,
            on_capture=lambda args, kwargs: log.append(("capture", args, kwargs)),
            before_replay=lambda args, kwargs: log.append(("replay", args, kwargs)),
        )
    )
    xs = [x_of(seed) for seed in range(4)]
    for x in xs:
        replay(x, scale=2.0)
    assert [what for what, *_ in log] == ["capture", "replay", "replay", "replay"]
    assert [args[0] for _, args, _ in log] == [xs[1], xs[1], xs[2], xs[3]]
    assert all(kwargs == {"scale": 2.0} for *_, kwargs in log)


@pytest.mark.parametrize("which", ["on_capture", "before_replay"])
def test_preparations_may_decline(toy, which):
    answer = ["not now"]
    replay = stand_in(GraphedForward(toy, toy.forward, **{which: lambda args, kwargs: answer[0]}))
    replay(x_of(0))
    assert reason_of(replay, x_of(0)) == "not now"
    answer[0] = None
    replay(x_of(0))
    assert replay.captures == 1
    answer[0] = "not now"
    if which == "before_replay":
        assert reason_of(replay, x_of(0)) == "not now"
    answer[0] = None
    before = replay.replays
    replay(x_of(0))
    assert replay.replays == before + 1


# -- the model -----------------------------------------------------------------------------------------------------


def change_weight(toy):
    toy.inner[0].weight = nn.Parameter(torch.randn(8, 8))


def change_weight_data(toy):
    toy.inner[0].weight.data = torch.randn(8, 8)


def change_buffer(toy):
    toy.shift = torch.randn(8)


def change_module(toy):
    toy.inner[1] = nn.Tanh()


def add_module(toy):
    toy.inner.append(nn.Tanh())


def change_class(toy):
    class Other(nn.SiLU):
        def forward(self, x):
            return super().forward(x) * 3

    toy.inner[1].__class__ = Other


def change_number(toy):
    toy.factor = 5.0


def change_object(toy):
    toy.calls = []


def change_mode(toy):
    toy.inner.train()


def drop_bias(toy):
    toy.inner[0].bias = None


def change_sign_of_zero(toy):
    toy.zero = -0.0


def change_type_of_number(toy):
    toy.one = 1


def add_first_buffer(toy):
    toy.inner[1].register_buffer("first", torch.ones(8))


def add_first_child(toy):
    toy.inner[1].add_module("first", nn.Tanh())


CHANGES = {
    change_weight: "inner.0",
    change_weight_data: "inner.0",
    change_buffer: "the model",
    change_module: "inner.1",
    add_module: "the model",
    change_class: "inner.1",
    change_number: "the model",
    change_object: "the model",
    change_mode: "inner",
    drop_bias: "inner.0",
    change_sign_of_zero: "the model",
    change_type_of_number: "the model",
    add_first_buffer: "the model",
    add_first_child: "the model",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_changed_loses_its_graphs(toy, replay, change):
    captured(replay, x_of(0))
    captured(replay, x_of(0, 5, 8))
    change(toy)
    reason = reason_of(replay, x_of(0))
    named = reason.removeprefix("weights or hooks of ").removesuffix(" changed since the capture")
    assert named in (CHANGES[change], "inner", "the model")
    assert replay.graphs == replay._cuda.live == 0
    captured(replay, x_of(0))
    before = replay.replays
    assert_equal(toy(x_of(1)), replay(x_of(1)))
    assert replay.replays == before + 1


@pytest.mark.parametrize("change", [change_weight, change_weight_data, change_buffer, change_number, change_mode])
def test_the_module_that_changed_is_named(toy, replay, change):
    captured(replay, x_of(0))
    change(toy)
    assert reason_of(replay, x_of(0)) == f"weights or hooks of {CHANGES[change]} changed since the capture"


def test_a_weight_written_in_place_is_read_by_the_graph(toy, replay):
    captured(replay, x_of(0))
    toy.inner[0].weight.mul_(2)
    assert_equal(toy(x_of(1)), replay(x_of(1)))
    assert replay.replays == 1


def test_a_forward_that_changes_its_own_model_is_not_captured(toy):
    def forward(x):
        toy.factor += 1
        return toy(x)

    replay = stand_in(GraphedForward(toy, forward))
    for _ in range(4):
        replay(x_of(0))
    assert replay.captures == 0
    assert replay.reasons["weights or hooks of the model changed since the last call"] == 3
    replay.reset()
    replay(x_of(0))
    replay._watch = Watch(toy, replay, replay._cuda.holds)  # as if it had not, until the capture
    replay(x_of(0))
    assert replay.reasons["the forward itself changed the model"] == 1


def test_a_forward_that_changes_its_own_model_once(toy):
    def forward(x):
        toy.ready = True
        return toy(x)

    replay = stand_in(GraphedForward(toy, forward))
    for _ in range(5):
        replay(x_of(0))
    assert (replay.captures, replay.replays) == (1, 2)
    assert replay.reasons["weights or hooks of the model changed since the last call"] == 1


HOOKS = {
    "has a forward hook": lambda m: m.register_forward_hook(lambda *_: None),
    "has a forward hook ": lambda m: m.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("where", ["", "inner", "inner.0"])
@pytest.mark.parametrize("add", HOOKS.values(), ids=["hook", "pre-hook"])
def test_a_hook_added_later_or_before(toy, replay, add, where):
    module = toy.get_submodule(where)
    captured(replay, x_of(0))
    handle = add(module)
    for _ in range(3):
        assert reason_of(replay, x_of(0)) == f"{where or 'the model'} has a forward hook"
    assert replay.graphs == 0
    handle.remove()
    captured(replay, x_of(0))

    add(module)
    hooked = stand_in(GraphedForward(toy, toy.forward))
    for _ in range(3):
        assert reason_of(hooked, x_of(0)) == f"{where or 'the model'} has a forward hook"


def test_a_forward_that_was_replaced(toy, replay):
    captured(replay, x_of(0))
    silu = toy.inner[1]
    silu.forward = lambda x: x
    assert reason_of(replay, x_of(0)) == "the forward of inner.1 was replaced"
    silu.forward = type(silu).forward.__get__(silu)  # as accelerate leaves it when its hooks are removed
    captured(replay, x_of(0))
    silu.forward = lambda x: 2 * x
    assert reason_of(replay, x_of(0)) == "the forward of inner.1 was replaced"


def test_dropout_in_training(toy):
    toy.inner.append(nn.Dropout(0.5).eval())
    replay = stand_in(GraphedForward(toy, toy.forward))
    captured(replay, x_of(0))
    toy.train()
    replay(x_of(0))
    assert "inner.2 drops values at random: the model is in training mode" in replay.reasons
    toy.inner[2].p = 0.0
    replay(x_of(0))
    toy.eval()
    captured(replay, x_of(0))


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        (nn.Parameter(torch.randn(8, dtype=torch.float64)), "the weight table is on cpu"),
        (nn.Parameter(torch.randn(8).as_subclass(Sub)), "the weight table is a Sub"),
    ],
    ids=["host", "subclass"],
)
def test_weights_that_no_graph_can_read(toy, weight, sentence):
    toy.table = weight
    replay = stand_in(GraphedForward(toy, toy.forward))
    replay(x_of(0))
    assert next(iter(replay.reasons)).startswith(sentence)


def test_weights_that_left_and_came_back(toy):
    """As `.cpu()` and `.cuda()` move them: the same Parameters, with other memory."""
    replay = stand_in(GraphedForward(toy, toy.forward))
    captured(replay, x_of(0))
    toy.table.data = toy.table.double()  # which the stand-in takes for the host's
    for _ in range(2):
        assert reason_of(replay, x_of(0)) == "the weight table is on cpu"
    assert replay.graphs == 0
    toy.table.data = toy.table.float()
    captured(replay, x_of(0))


def test_torchscript_and_compiled_modules(toy):
    toy.inner[1].compile(backend="eager")
    replay = stand_in(GraphedForward(toy, toy.forward))
    assert reason_of(replay, x_of(0)) == "inner.1 is compiled by torch.compile"
    toy.inner[1] = torch.jit.script(nn.SiLU())
    for _ in range(2):
        assert reason_of(replay, x_of(0)) == "inner.1 is TorchScript"


# -- on a module ---------------------------------------------------------------------------------------------------


def new_handle():
    handle = Handle("a test")
    if not hasattr(handle, "graphs"):
        handle.graphs = []
    return handle


def test_a_module_with_graphs_looks_like_itself_and_comes_back(toy):
    signature, document = inspect.signature(toy.forward), toy.forward.__doc__
    expected = toy(x_of(1))
    handle = new_handle()
    replay = stand_in(graph_forward(toy, handle))
    assert handle.graphs == [replay]
    assert toy.forward is replay
    assert inspect.signature(toy.forward) == signature
    assert toy.forward.__doc__ == document
    assert toy.forward.__name__ == "forward"
    for _ in range(3):
        assert_equal(expected, toy(x_of(1)))
    assert (replay.captures, replay.replays) == (1, 1)
    handle.restore()
    assert "forward" not in vars(toy)
    assert replay.graphs == 0
    assert_equal(expected, toy(x_of(1)))
    assert reason_of(replay, x_of(1)) == "bitfuse was restored"


def test_a_forward_that_is_hooked_already_stays(toy):
    hooked = lambda *args, **kwargs: Toy.forward(toy, *args, **kwargs)  # noqa: E731
    toy.forward = hooked
    handle = new_handle()
    replay = graph_forward(toy, handle)
    assert toy.forward is hooked
    assert handle.graphs == [replay]
    handle.restore()
    assert toy.forward is hooked
    assert reason_of(replay, x_of(0)).startswith("the forward of the model was replaced before bitfuse came")


def test_a_forward_replaced_since_stays(toy):
    handle = new_handle()
    replay = stand_in(graph_forward(toy, handle))
    captured(replay, x_of(0))
    ours = toy.forward
    toy.forward = theirs = lambda *args, **kwargs: ours(*args, **kwargs)
    expected = Toy.forward(toy, x_of(0))
    assert_equal(expected, toy(x_of(0)))
    assert replay.reasons["the forward of the model was replaced"] == 1
    handle.restore()
    assert toy.forward is theirs
    assert_equal(expected, toy(x_of(0)))
    assert replay.reasons["bitfuse was restored"] == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_a_plain_model(toy, duplicate):
    model = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
    replay = captured(stand_in(graph_forward(model, new_handle())), x_of(0))
    other = duplicate(model)
    before = replay.replays, replay.reasons.copy()
    other[0].weight.mul_(2)
    expected = other[1](other[0](x_of(1)))
    assert not torch.equal(expected, model[1](model[0](x_of(1))))
    assert_equal(expected, other(x_of(1)))
    assert (replay.replays, replay.reasons) == before
    assert not isinstance(other.forward, GraphedForward)
    second = stand_in(graph_forward(other, new_handle()))  # and may get graphs of its own
    captured(second, x_of(0))
    assert_equal(expected, other(x_of(1)))
    assert second.replays == 1
    assert_equal(expected, duplicate(duplicate(other))(x_of(1)))


def test_the_model_is_freed_without_the_garbage_collector(toy):
    toy.calls = None
    handle = new_handle()
    model = nn.Sequential(nn.Linear(8, 8))
    stand_in(graph_forward(model, handle))
    for _ in range(4):
        model(x_of(0))
    assert handle.graphs[0].replays == 2
    gone = [weakref.ref(model), weakref.ref(model[0])]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [reference() for reference in gone] == [
            None,
            None,
        ]  # and the handle, which may be kept globally, is still here
    finally:
        gc.enable()
    handle.restore()


def test_the_registry_of_accelerated_models_does_not_keep_the_model():
    model, _ = small_transformer("cpu")
    handle = bitfuse.accelerate(model)
    if not hasattr(handle, "graphs"):
        handle.graphs = []
    replay = graph_forward(model, handle)
    with model.cache_context("a name") if hasattr(model, "cache_context") else contextlib.nullcontext():
        pass  # which leaves a registry of hooks on the model that holds the model
    replay._watch = Watch(model, replay, lambda t: True)
    assert replay._watch.reason is None
    assert replay._watch.changed(model) is None
    gone = weakref.ref(model)
    del model, handle, replay
    gc.collect()
    assert gone() is None


def test_the_compiler_gets_the_forward_itself(toy):
    model = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
    expected = model(x_of(0))
    replay = stand_in(graph_forward(model, new_handle()))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_equal(expected, compiled(x_of(0)))
    assert not replay.reasons


# -- hosts' own ways of changing a model ---------------------------------------------------------------------------


def test_accelerates_hooks(toy):
    hooks = pytest.importorskip("accelerate.hooks")
    handle = new_handle()
    replay = stand_in(graph_forward(toy, handle))
    captured(replay, x_of(0))
    hooks.add_hook_to_module(toy.inner[0], hooks.AlignDevicesHook(execution_device="cpu"))
    assert reason_of(replay, x_of(0)).startswith("inner.0 is run by accelerate's AlignDevicesHook")
    hooks.remove_hook_from_module(toy.inner[0])
    captured(replay, x_of(0))
    hooks.add_hook_to_module(toy, hooks.AlignDevicesHook(execution_device="cpu"))
    toy(x_of(0))
    assert any(r.startswith("the model is run by accelerate's AlignDevicesHook") for r in replay.reasons)
    hooks.remove_hook_from_module(toy)
    assert toy.forward is replay
    captured(replay, x_of(0))


def test_diffusers_hooks(toy):
    hooks = pytest.importorskip("diffusers.hooks.hooks")
    handle = new_handle()
    replay = stand_in(graph_forward(toy, handle))
    registry = hooks.HookRegistry.check_if_exists_or_initialize(toy)  # an empty one, as `cache_context` leaves it
    captured(replay, x_of(0))
    for module, name in ((toy, "the model"), (toy.inner, "inner")):
        registry = hooks.HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(hooks.ModelHook(), "noop")
        toy(x_of(0))
        assert replay.reasons[f"{name} is run by diffusers' hooks (noop)"] == 1
        assert replay.graphs == 0
        registry.remove_hook("noop", recurse=False)
    assert_equal(Toy.forward(toy, x_of(0)), toy(x_of(0)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.processor = Strange()
        self.processor._attention_backend = None

    def forward(self, x):
        return x * (3 if self.processor._attention_backend else 2)


def test_attention_processors_and_their_backends():
    model = nn.Sequential(nn.Linear(8, 8), Attention())
    replay = stand_in(graph_forward(model, new_handle()))
    captured(replay, x_of(0))
    model[1].processor._attention_backend = "flash"
    assert reason_of(replay, x_of(0)) == "weights or hooks of 1 changed since the capture"
    captured(replay, x_of(0))
    model[1].processor = copy.copy(model[1].processor)
    assert reason_of(replay, x_of(0)) == "weights or hooks of 1 changed since the capture"


def with_lora(module, target="0"):
    peft = pytest.importorskip("peft")
    for name in ("one", "two"):
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[target], init_lora_weights=False)
        peft.inject_adapter_in_model(config, module, adapter_name=name)
    return module


LORA_CHANGES = {
    "scale": lambda layer: layer.scale_layer(0.5),
    "set scale": lambda layer: layer.set_scale("one", 0.25),
    "adapter": lambda layer: layer.set_adapter("two"),
    "both": lambda layer: layer.set_adapter(["one", "two"]),
    "off": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "deleted": lambda layer: layer.delete_adapter("one"),
    "weight": lambda layer: setattr(layer.lora_A["one"], "weight", nn.Parameter(torch.randn(2, 8))),
}


@pytest.mark.parametrize("change", LORA_CHANGES.values(), ids=LORA_CHANGES)
def test_lora(change):
    torch.manual_seed(0)
    model = with_lora(nn.Sequential(nn.Linear(8, 8), nn.SiLU())).eval()
    layer = model[0]
    layer.set_adapter("one")
    replay = stand_in(graph_forward(model, new_handle()))
    captured(replay, x_of(0))
    change(layer)
    assert reason_of(replay, x_of(0)).startswith("weights or hooks of ")
    captured(replay, x_of(0))
    expected, before = nn.Sequential.forward(model, x_of(1)), replay.replays
    assert_equal(expected, model(x_of(1)))
    assert replay.replays == before + 1


def test_a_lora_added_later():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.SiLU()).eval()
    replay = stand_in(graph_forward(model, new_handle()))
    captured(replay, x_of(0))
    with_lora(model)
    assert reason_of(replay, x_of(0)) == "weights or hooks of the model changed since the capture"


def test_a_lora_scale_per_call_replays_once_it_stands_still():
    """diffusers multiplies the scale in and divides it out in each forward, which may not give back the same float."""
    torch.manual_seed(0)
    model = with_lora(nn.Sequential(nn.Linear(8, 8), nn.SiLU())).eval()
    layer = model[0]

    def forward(x, scale):
        layer.scale_layer(scale)
        try:
            return nn.Sequential.forward(model, x)
        finally:
            layer.unscale_layer(scale)

    replay = stand_in(GraphedForward(model, forward))
    for scale in (0.5, 0.7, 0.1):
        before = replay.replays
        for seed in range(8):
            scaling = copy.deepcopy(layer.scaling)
            expected = forward(x_of(seed), scale)
            layer.scaling.update(scaling)
            assert_equal(expected, replay(x_of(seed), scale=scale))
        assert replay.replays > before, scale


# -- the transformer -----------------------------------------------------------------------------------------------


def small_transformer(device):
    pytest.importorskip("diffusers", minversion="0.37")
    from bitfuse.tools import seeded

    model = seeded.build(seeded.SMALL, torch.device(device), 0)
    return model, seeded.make_inputs(model, seeded.SMALL, torch.device(device), 0)


@pytest.fixture
def transformer():
    return small_transformer("cpu")


def steps(model, inputs, count=4):
    """What the transformer returns for changing latents and noise levels."""
    from bitfuse.tools import seeded

    velocity = seeded.velocity_of(model, inputs)
    generator = torch.Generator().manual_seed(5)
    for i in range(count):
        noise = [torch.randn(inputs[n].shape, generator=generator) for n in ("latents", "audio_latents")]
        level = torch.full((1,), 1000.0 - 100 * i, device=inputs["latents"].device)
        yield velocity(*[n.to(level.device) for n in noise], level)


def test_the_transformer_step_by_step(transformer):
    model, inputs = transformer
    expected = list(steps(model, inputs))
    handle = new_handle()
    replay = stand_in(graph_forward(model, handle))
    found = list(steps(model, inputs))
    assert (replay.captures, replay.replays) == (1, 2)
    for a, b in zip(expected, found, strict=True):
        assert_equal(a, b)
    list(steps(model, {**inputs, "conditions": inputs["conditions"] | {"num_frames": None}}))
    assert (replay.captures, replay.replays) == (2, 4)
    handle.restore()
    assert "forward" not in vars(model)


def test_guidance_and_isolation_of_the_transformer_are_in_the_key(transformer):
    model, inputs = transformer
    replay = stand_in(graph_forward(model, new_handle()))
    kinds = [{}, {"isolate_modalities": True}, {"attention_kwargs": {"scale": 1.0}}]
    if "spatio_temporal_guidance_blocks" in inspect.signature(model.forward).parameters:
        kinds += [{"spatio_temporal_guidance_blocks": blocks} for blocks in ([0], [1])]
    for kind in kinds:
        list(steps(model, {**inputs, "conditions": inputs["conditions"] | kind}, 2))
    assert replay.captures == replay.graphs == len(kinds)


def test_watching_the_real_transformer_takes_less_than_a_walk_over_its_parameters():
    """A millisecond or two. Measured against something else in the same run: CI's machine may be busy."""
    pytest.importorskip("diffusers", minversion="0.37")
    model = seeded._on_meta(seeded.REAL)
    watch = Watch(model, None, lambda t: True)
    assert watch.reason is None
    assert watch.changed(model) is None

    def seconds(look):
        start = time.process_time()
        look()
        return time.process_time() - start

    looks = (lambda: watch.changed(model), lambda: list(model.named_parameters()))
    pairs = [tuple(map(seconds, looks)) for _ in range(20)]
    watching, walking = map(min, zip(*pairs, strict=True))
    assert watching < walking
    block = model.transformer_blocks[40]
    block.attn1.to_q.weight = nn.Parameter(block.attn1.to_q.weight)
    assert watch.changed(model) == "transformer_blocks.40.attn1.to_q"


# -- on a GPU ------------------------------------------------------------------------------------------------------


def on_gpu(seed, *shape):
    return x_of(seed, *shape).to("cuda")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 8)).cuda()


def assert_cuda_is_well():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(3, device="cuda").isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
def test_on_a_gpu_the_transformer_step_by_step_in_two_shapes(accelerated, fresh_routes):
    model, inputs = small_transformer("cuda")
    from bitfuse.tools import seeded

    short = dataclasses.replace(seeded.SMALL, frames=2, audio_frames=17)
    both = [inputs, seeded.make_inputs(model, short, torch.device("cuda"), 1)]
    expected = [list(steps(model, each)) for each in both]
    handle = bitfuse.accelerate(model) if accelerated else new_handle()
    if not hasattr(handle, "graphs"):
        handle.graphs = []
    replay = graph_forward(model, handle)
    try:
        kept = []
        for _ in range(2):
            for each, results in zip(both, expected, strict=True):
                found = list(steps(model, each))
                for a, b in zip(results, found, strict=True):
                    assert_equal(a, b)
                kept += list(zip(results, found, strict=True))
        assert (replay.captures, replay.graphs, replay.replays) == (2, 2, 12), replay.reasons
        if accelerated:
            assert any(site.fused for site in handle.sites), str(handle.report())
        for a, b in kept:  # results are not overwritten by later replays
            assert_equal(a, b)
        by_turns = zip(*[steps(model, each) for each in both], strict=True)
        for a, b in zip(zip(*expected, strict=True), by_turns, strict=True):
            assert_equal(a, b)
        assert replay.captures == 2
        assert replay.memory() > 0
    finally:
        handle.restore()
    assert "forward" not in vars(model)
    assert replay.memory() == 0
    for a, b in zip(expected[0], steps(model, inputs), strict=True):
        assert_equal(a, b)
    assert_cuda_is_well()


@pytest.mark.gpu
def test_on_a_gpu_many_replays_beside_other_allocations(net):
    replay = captured(GraphedForward(net, net.forward), on_gpu(0))
    for seed in range(500):
        rubbish = [torch.full((n,), float("nan"), device="cuda") for n in (100, 10_000, 1_000_000 + seed)]
        x = on_gpu(seed)
        found = replay(x)
        del rubbish
        assert_equal(net(x), found)
    assert replay.replays == 500


@pytest.mark.gpu
def test_on_a_gpu_streams_by_turns(net):
    big = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)]).cuda()
    replay = captured(GraphedForward(big, big.forward), on_gpu(0, 256, 1024))
    inputs = [on_gpu(seed, 256, 1024) for seed in range(24)]
    expected = [big(x) for x in inputs]
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for i, x in enumerate(inputs):  # nothing waits in between but what the graphs do themselves
        with torch.cuda.stream(streams[i % 3]):
            found.append(replay(x))
    torch.cuda.synchronize()
    for a, b in zip(expected, found, strict=True):
        assert_equal(a, b)
    assert replay.replays == len(inputs)


@pytest.mark.gpu
def test_on_a_gpu_a_hook_added_later(net):
    replay = captured(GraphedForward(net, net.forward), on_gpu(0))
    seen = []
    hook = net[1].register_forward_hook(lambda *_: seen.append(True))
    assert reason_of(replay, on_gpu(1)) == "1 has a forward hook"
    assert len(seen) == 2  # of the call, and of what it was compared with
    hook.remove()
    captured(replay, on_gpu(0))
    assert_equal(net(on_gpu(1)), replay(on_gpu(1)))


@pytest.mark.gpu
def test_on_a_gpu_weights_that_moved_and_weights_written_in_place(net):
    replay = captured(GraphedForward(net, net.forward), on_gpu(0))
    net[0].weight.mul_(1.5)
    before = replay.replays
    assert_equal(net(on_gpu(1)), replay(on_gpu(1)))
    assert replay.replays == before + 1
    old = net[0].weight.data  # kept, so that the new memory is another
    net[0].weight.data = old.clone() * 2
    assert reason_of(replay, on_gpu(1)) == "weights or hooks of 0 changed since the capture"
    captured(replay, on_gpu(0))
    net.cpu()
    replay(x_of(0))
    assert replay.reasons["the weight 0.weight is on cpu"] == 1
    assert replay.graphs == 0
    net.cuda()
    captured(replay, on_gpu(0))
    assert_equal(net(on_gpu(1)), replay(on_gpu(1)))


@pytest.mark.gpu
def test_on_a_gpu_reset_frees_the_memory(net):
    big = nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024)).cuda()
    replay = captured(GraphedForward(big, big.forward), on_gpu(0, 4096, 1024))
    torch.cuda.empty_cache()
    reserved, held = torch.cuda.memory_reserved(), replay.memory()
    assert held > 4096 * 4096 * 4
    replay.reset()
    assert replay.memory() == 0
    assert torch.cuda.memory_reserved() <= reserved - 4096 * 4096 * 4
    captured(replay, on_gpu(0, 4096, 1024))
    assert_equal(big(on_gpu(1, 4096, 1024)), replay(on_gpu(1, 4096, 1024)))
    replay.reset()
    assert_cuda_is_well()


@pytest.mark.gpu
def test_on_a_gpu_a_failed_capture_falls_back_and_leaves_cuda_well(net):
    def forward(x, wait=False):
        y = net(x)
        return y * y.sum().item() if wait else y

    replay = captured(GraphedForward(net, forward), on_gpu(0))
    for seed in range(3):
        x = on_gpu(seed)
        assert_equal(forward(x, wait=True), replay(x, wait=True))
    assert sum(n for reason, n in replay.reasons.items() if reason.startswith("the capture failed: ")) == 2
    assert_cuda_is_well()
    before = replay.replays
    assert_equal(net(on_gpu(1)), replay(on_gpu(1)))  # the graph captured before
    assert replay.replays == before + 1
    many = 1 << 16
    captured(replay, on_gpu(0, many, 8))  # and another after it
    for rows in (3, many, 3):
        assert_equal(net(on_gpu(2, rows, 8)), replay(on_gpu(2, rows, 8)))
    assert replay.graphs == 2
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    replay.reset()
    assert torch.cuda.memory_reserved() <= reserved - many * 64 * 4  # what lies between the two layers
    assert_cuda_is_well()

    first = GraphedForward(net, lambda x: forward(x, wait=True))  # one with nothing captured before
    for seed in range(3):
        assert_equal(forward(on_gpu(seed), wait=True), first(on_gpu(seed)))
    assert first.captures == 0
    assert_cuda_is_well()
    graph, x = torch.cuda.CUDAGraph(), on_gpu(0)
    with torch.cuda.graph(graph):  # somebody else's
        y = x + 1
    graph.replay()
    assert_equal(x + 1, y)


@pytest.mark.gpu
def test_on_a_gpu_random_numbers_are_not_captured(net):
    replay = GraphedForward(net, lambda x: nn.functional.dropout(net(x), 0.5))
    for seed in range(4):
        torch.manual_seed(seed)
        expected = nn.functional.dropout(net(on_gpu(seed)), 0.5)
        torch.manual_seed(seed)
        assert_equal(expected, replay(on_gpu(seed)))
    assert replay.reasons["the forward draws random numbers"] == 3


@pytest.mark.gpu
def test_on_a_gpu_one_graph_at_most(net):
    replay = GraphedForward(net, net.forward, limit=1)
    for rows in (3, 5):
        captured(replay, on_gpu(0, rows, 8))
    assert replay.graphs == 1
    for rows in (3, 5, 3, 5):
        assert_equal(net(on_gpu(1, rows, 8)), replay(on_gpu(1, rows, 8)))
    assert (replay.captures, replay.replays) == (2, 2)


@pytest.mark.gpu
def test_on_a_gpu_results_with_gaps_and_host_masks(net):
    def forward(x, mask):
        y = net(x)
        return {"part": y[:, 1:5], "turned": y.t(), "masked": y * mask.sum().item()}

    replay = GraphedForward(net, forward)
    for mask in (torch.tensor([True, False, True]), torch.tensor([False, True, False])):
        captured(replay, on_gpu(0), mask)
        for seed in (1, 2):
            expected, found = forward(on_gpu(seed), mask), replay(on_gpu(seed), mask)
            assert_equal(expected, found)
            assert {n: t.stride() for n, t in found.items()} == {n: t.stride() for n, t in expected.items()}
    assert replay.graphs == 2


@pytest.mark.gpu
def test_on_a_gpu_a_capture_around_the_call(net):
    replay = captured(GraphedForward(net, net.forward), on_gpu(0))
    x, graph = on_gpu(1), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = replay(x)
    graph.replay()
    assert_equal(net(x), y)
    assert replay.reasons["a CUDA graph is being captured around this call"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_gpu_other_than_the_current_one(net):
    net.to("cuda:1")
    with torch.cuda.device(0):
        replay = captured(GraphedForward(net, net.forward), on_gpu(0).to("cuda:1"))
        for seed in range(3):
            x = on_gpu(seed).to("cuda:1")
            assert_equal(net(x), replay(x))
        assert torch.cuda.current_device() == 0
    assert replay.replays == 3


# -- what stays the same, apart ---------------------------------------------------------------------------------------


class Text(nn.Module):
    """Keys of a projected text, kept while it is the same, beside something that changes at every step."""

    def __init__(self):
        super().__init__()
        self.project, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.kept = [Constant(), Constant()]
        self.computed = []  # the Python runs of what is kept

    def forward(self, x, text):
        projected = self.kept[0].of(text, lambda: memo.weights(self.project), self._projected).view(1, -1, 8)
        keys, values = self.kept[1].of(projected, lambda: memo.weights(self.key), self._keys)
        return x @ keys[0].mT + values.sum() + text[0, 0]

    def _projected(self, text):
        self.computed.append("projected")
        return self.project(text)

    def _keys(self, projected):
        self.computed.append("keys")
        return self.key(projected), self.key(projected) * 2


@pytest.fixture
def text_model():
    torch.manual_seed(0)
    return Text()


@pytest.fixture
def text_replay(text_model):
    handle = Handle("a test")
    yield stand_in(graph_forward(text_model, handle, prelude=Prelude))
    handle.restore()


def test_what_stays_the_same_is_replayed_only_for_another_text(text_model, text_replay):
    x, text, other = (torch.randn(3, 8) for _ in range(3))
    for _ in range(2):
        text_model(x, text)
    assert (text_replay.captures, text_replay._cuda.captures) == (1, 2)  # the prelude and the forward
    text_model.computed.clear()
    replays = text_replay._cuda.replays
    for given in (text, text, other, text):
        x = torch.randn(3, 8)
        assert compare(_plain(text_model)(x, given), text_model(x, given)) is None
    # one replay each, and the prelude's for the other text and for the first one that came back
    assert text_replay._cuda.replays - replays == 4 + 2
    assert text_model.computed == ["projected", "keys"] * 2


def _plain(model):
    twin = copy.deepcopy(model, {id(model.kept): []})  # what a StorageWeakRef stands for can't be copied
    twin.__dict__.pop("forward", None)
    twin.kept = [Constant(), Constant()]
    return twin


def test_a_text_written_in_place_is_computed_anew(text_model, text_replay):
    x, text = torch.randn(3, 8), torch.randn(3, 8)
    for _ in range(3):
        text_model(x, text)
    text.mul_(2.0)
    text_model.computed.clear()
    assert compare(_plain(text_model)(x, text), text_model(x, text)) is None
    assert text_model.computed == ["projected", "keys"]


def test_views_of_a_text_are_followed(text_model, text_replay):
    x, texts = torch.randn(3, 8), torch.randn(2, 3, 8)
    for _ in range(4):
        found = text_model(x, texts[1])
    assert compare(_plain(text_model)(x, texts[1]), found) is None
    assert (text_replay._cuda.captures, text_replay.replays) == (2, 2)


def test_a_constant_of_something_computed_is_part_of_the_forward():
    class Computed(Text):
        def forward(self, x, text):
            return super().forward(x, text * 2)  # another tensor at every step

    torch.manual_seed(0)
    model, handle = Computed(), Handle("a test")
    replay = stand_in(graph_forward(model, handle, prelude=Prelude))
    x, text = torch.randn(3, 8), torch.randn(3, 8)
    for _ in range(4):
        found = model(x, text)
    assert compare(_plain(model)(x, text), found) is None
    assert (replay._cuda.captures, replay.replays) == (1, 2)  # no prelude
    handle.restore()


def test_restoring_drops_the_prelude_with_its_graph(text_model):
    handle = Handle("a test")
    replay = stand_in(graph_forward(text_model, handle, prelude=Prelude))
    x, text = torch.randn(3, 8), torch.randn(3, 8)
    for _ in range(3):
        text_model(x, text)
    assert replay._cuda.live == 2
    assert replay.memory() > replay._cuda.pool_bytes() + x.nbytes + text.nbytes
    handle.restore()
    assert replay._cuda.live == 0


def test_a_failed_capture_of_the_forward_drops_the_prelude(text_model, text_replay):
    text_replay._cuda.corrupt = True
    x, text = torch.randn(3, 8), torch.randn(3, 8)
    for _ in range(3):
        assert compare(_plain(text_model)(x, text), text_model(x, text)) is None
    assert text_replay._cuda.live == 0
    assert any("a replay is not the forward" in reason for reason in text_replay.reasons)


@pytest.mark.usefixtures("launched_as_reference")
def test_the_transformer_replays_its_text_apart():
    cpu = torch.device("cpu")
    geometry, _ = seeded.geometry_for(cpu, 1)
    model = seeded.build(geometry, cpu, 0)
    step = seeded.one_step(model, seeded.make_inputs(model, geometry, cpu, 0))
    expected = step()
    with interpreter(), bitfuse.accelerate(model, cuda_graph=True, keep_text=True) as handle:
        (replay,) = handle.graphs
        stand_in(replay)
        for _ in range(3):
            assert compare(expected, step()) is None
        (graph,) = (entry.graph for entry in replay._entries.values() if entry.graph)
    assert replay._cuda.replays == 3  # of the prelude once, while the graph was compared
    assert len(graph.prelude.arguments) == 2  # the text of either stream


@pytest.mark.parametrize("name", ["project", "key"])
def test_what_stays_the_same_is_computed_anew_by_a_weight_written_in_place(name, text_model, text_replay):
    x, text = torch.randn(3, 8), torch.randn(3, 8)
    with torch.no_grad():
        for _ in range(3):
            text_model(x, text)
        before = text_model(x, text)
        getattr(text_model, name).weight.mul_(-1)
        expected = _plain(text_model)(x, text)
        assert compare(before, expected) is not None
        assert compare(expected, text_model(x, text)) is None
