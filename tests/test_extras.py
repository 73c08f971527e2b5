"""What is used besides fused sites, beside quantised weights and LoRA, and what a report says where it is not."""

from __future__ import annotations

import contextlib
import io
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F
from torch.utils import dlpack

import bitfuse
from bitfuse.hosts.ltx2 import SecondStream
from bitfuse.hosts.report import Report
from bitfuse.ops.gelu import GELU_TANH, in_place
from bitfuse.run.alone import alone
from bitfuse.run.extra import Extras
from bitfuse.run.swap import ours_in
from bitfuse.tools import explain
from stacking import FEATURES, ORDERS, Feature, step_of

diffusers = pytest.importorskip("diffusers", minversion="0.38")


# -- stand-ins for quantised weights and for a LoRA --------------------------------------------------------------------


class Quantised(torch.Tensor):
    """A weight in int8 with a scale a row, as quantising packages have them."""

    @staticmethod
    def __new__(cls, q, scale):
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=scale.dtype, device=q.device)

    def __init__(self, q, scale):
        self.q, self.scale = q, scale

    def __tensor_flatten__(self):
        return ["q", "scale"], {"rows": [1, self.q.shape[1]]}

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = (*args, None)[:3]
            return F.linear(x, weight.q.to(weight.scale.dtype) * weight.scale, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].q, args[0].scale)
        raise NotImplementedError(f"{func} of a quantised weight")


class Opaque(Quantised):
    """One that does not say what it consists of."""

    __tensor_flatten__ = None


def _quantised(weight, kind=Quantised):
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    q = (weight.detach() / scale).round().to(torch.int8)
    return torch.nn.Parameter(kind(q, scale), requires_grad=False)


class Added(torch.nn.Module):
    """A linear layer with a LoRA on top, unmerged, in a class of its own."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(5)
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False).to(base.weight)
        self.up = torch.nn.Linear(2, base.out_features, bias=False).to(base.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * 0.5


class Bytes(torch.nn.Module):
    """A quantised layer in a class of its own, its weight in buffers."""

    def __init__(self, linear):
        super().__init__()
        weight = _quantised(linear.weight)
        self.register_buffer("q", weight.q)
        self.register_buffer("scale", weight.scale)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.q.to(self.scale.dtype) * self.scale, self.bias)


def _on_linears(change):
    """A feature that changes each linear layer of the attentions and feed-forwards."""

    def use(model):
        for block in model.transformer_blocks:
            for name, module in list(block.named_modules()):
                if type(module) is torch.nn.Linear and "lora" not in name:
                    changed = change(module)
                    if changed is not module:
                        block.set_submodule(name, changed)

    return use


def _quantise(linear, kind=Quantised):
    linear.weight = _quantised(linear.weight, kind)
    return linear


def _lora_fused(model):
    next(f for f in FEATURES if f.name == "LoRA").use(model)
    model.fuse_lora()


STAND_INS = (
    Feature("a quantised weight", _on_linears(_quantise), ""),
    Feature("a quantised layer of a class of its own", _on_linears(Bytes), ""),
    Feature("a LoRA of a class of its own", _on_linears(Added), ""),
)
REAL = (
    *(f for f in FEATURES if f.name in ("LoRA", "torchao int8", "torchao fp8")),
    Feature("LoRA, fused", _lora_fused, "", ("peft",)),
)


def _steps(feature, order, device, count=3, **options):
    """(an accelerated model with the feature, its handle, where the last of its steps differs from stock's with it)"""
    if feature.missing:
        pytest.skip(f"{', '.join(feature.missing)} is not installed")
    build, step = step_of("2.0", device)
    stock, model = build(), build()
    with torch.no_grad():
        feature.use(stock)
        expected = [step(stock)() for _ in range(count)][-1]
        if order == ORDERS[0]:
            feature.use(model)
        handle = bitfuse.accelerate(model, **options)
        if order == ORDERS[1]:
            feature.use(model)
        found = [step(model)() for _ in range(count)][-1]
    return model, handle, bitfuse.compare(expected, found)


def _names(handle):
    return [extra.name for extra in handle.report().not_used]


def _reasons(handle):
    return {extra.name: dict(extra.reasons) for extra in handle.report().not_used}


# -- what goes with them -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("feature", [*STAND_INS, *REAL], ids=lambda feature: feature.name)
def test_gelu_in_place_and_the_second_stream_go_with_quantised_weights_and_lora(feature, order, device, monkeypatch):
    monkeypatch.setattr(SecondStream, "MIN_ROWS", 1)  # on a GPU it is used, then
    model, handle, mismatch = _steps(feature, order, device)
    assert mismatch is None
    report = handle.report()
    assert (report.fused, _reasons(handle)) == (report.seen, {})
    block = model.transformer_blocks[0]
    assert ours_in(block).why_watched(block) is None
    for feed_forward, table in ((block.ff, block.scale_shift_table), (block.audio_ff, block.audio_scale_shift_table)):
        activation = feed_forward.net[0]
        addresses = _noted(monkeypatch, activation.proj)
        with torch.no_grad():
            out = activation(torch.randn(1, 3, table.shape[-1], device=device, dtype=torch.bfloat16))
        assert out.data_ptr() == addresses[-1]


def _noted(monkeypatch, module):
    """The addresses of what this module gives from now on."""
    kind, addresses = type(module), []
    forward = kind.forward

    def noted(self, x):
        out = forward(self, x)
        if self is module:
            addresses.append(out.data_ptr())
        return out

    monkeypatch.setattr(kind, "forward", noted)
    return addresses


# -- GELU in place -----------------------------------------------------------------------------------------------------

PLAIN = Feature("nothing", lambda model: None, "")


class Giving(torch.nn.Module):
    """A projection whose result is held in the memory, the class or by the name that `how` says."""

    def __init__(self, linear, how):
        super().__init__()
        self.linear, self.how, self.kept = linear, how, []

    def forward(self, x):
        out = self.linear(x)
        if self.how == "kept":
            self.kept.append(out)
        elif self.how == "its numbers kept":
            self.kept.append(out.view(torch.int16).numpy() if not out.is_cuda else out.view(torch.int16))
        elif self.how == "kept weakly":
            self.kept.append(weakref.ref(out))
        elif self.how == "handed to another library":
            self.kept.append(dlpack.to_dlpack(out))
        elif self.how == "numpy's memory":
            self.kept.append(out.view(torch.int16).cpu().numpy().copy())
            return torch.from_numpy(self.kept[-1]).view(torch.bfloat16)
        elif self.how == "expanded":
            return self.linear(x[:, :1]).expand(out.shape)
        elif self.how == "with a gradient":
            with torch.enable_grad():
                return F.linear(x, self.linear.weight.requires_grad_(True))
        elif self.how == "of inference mode":
            with torch.inference_mode():
                return self.linear(x)
        elif self.how == "a class of its own":
            return out.as_subclass(Mine)
        return out


class Mine(torch.Tensor):
    pass


HELD = (
    *("kept", "its numbers kept", "kept weakly", "handed to another library", "numpy's memory", "expanded"),
    *("with a gradient", "of inference mode"),
)


@pytest.mark.parametrize("how", [*HELD, "a class of its own", "free"])
def test_only_a_result_that_nobody_else_holds_is_written_into(how):
    """On the CPU, whose memory numpy shares."""
    build, _ = step_of("2.0", torch.device("cpu"))
    model = build()
    activation = model.transformer_blocks[0].ff.net[0]
    activation.proj = Giving(activation.proj, how)
    x = torch.randn(1, 3, activation.proj.linear.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = torch.Tensor(activation(x))
        wanted = torch.Tensor(activation.proj(x)).clone()
        handle = bitfuse.accelerate(model)
        activation.proj.kept.clear()
        found = activation(x)
        assert bitfuse.compare(expected, found.as_subclass(torch.Tensor)) is None
        assert not found.requires_grad
        if how in ("kept", "numpy's memory"):
            kept = activation.proj.kept[0]
            kept = torch.from_numpy(kept).view(torch.bfloat16) if how == "numpy's memory" else kept
            assert bitfuse.compare(wanted, kept) is None
    assert (sum(_reasons(handle).get("GELU in place", {}).values())) == int(how != "free")
    if how == "a class of its own":
        assert _reasons(handle)["GELU in place"] == {"the projection gave a Mine": 1}


@pytest.mark.parametrize("where", ["proj", "proj.base", "proj.up"])
def test_a_hook_anywhere_in_the_projection_may_look(where, device, monkeypatch):
    model, handle, _ = _steps(STAND_INS[2], ORDERS[0], device, count=1)
    seen = []
    activation = model.transformer_blocks[0].ff.net[0]
    activation.get_submodule(where).register_forward_hook(lambda module, args, out: seen.append(out.data_ptr()))
    addresses = _noted(monkeypatch, activation.proj)
    with torch.no_grad():
        x = torch.randn(1, 3, activation.proj.base.in_features, device=device, dtype=torch.bfloat16)
        assert activation(x).data_ptr() != addresses[0]
    assert len(seen) == 1
    (reason,) = _reasons(handle)["GELU in place"]
    assert (
        reason == "somebody's hook or forward on the projection (offload, layerwise casting) may look at what that gave"
    )


def test_gradients_are_named(device):
    model, handle, _ = _steps(PLAIN, ORDERS[0], device, count=1)
    activation = model.transformer_blocks[0].ff.net[0]
    activation(torch.randn(1, 3, activation.proj.in_features, device=device, dtype=torch.bfloat16))
    assert _reasons(handle) == {
        "GELU in place": {"gradients are enabled, and may need what the projection gave; torch.no_grad() allows it": 1}
    }


def test_an_activation_that_was_not_read_is_named(device, monkeypatch):
    from bitfuse.hosts import diffusers as adapter

    monkeypatch.setitem(adapter.READ, "GELU.gelu", {"0" * 16})
    build, _ = step_of("2.0", device)
    handle = bitfuse.accelerate(build())
    ((reason, count),) = _reasons(handle)["GELU in place"].items()
    assert count == 4
    assert "GELU.gelu of diffusers" in reason
    assert "is not a source that bitfuse knows (" in reason
    found = explain.explain(explain.from_version("2.0", 1), tokens=64)
    assert found.as_dict()["not_used"] == [f"GELU in place: {reason}"]
    console = Console(file=io.StringIO(), width=400)
    explain.show(console, found)
    assert f"Not used, GELU in place: {reason}" in console.file.getvalue()


def test_the_activation_is_the_short_one(device, monkeypatch):
    from bitfuse.hosts import activation as adapter

    seen = []
    monkeypatch.setattr(adapter, "in_place", lambda x: (seen.append(x.data_ptr()), in_place(x))[1])
    model, handle, _ = _steps(PLAIN, ORDERS[0], device, count=1)
    seen.clear()
    activation = model.transformer_blocks[0].ff.net[0]
    x = torch.randn(1, 3, activation.proj.in_features, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = F.gelu(activation.proj(x), approximate="tanh")
        found = activation(x)
    assert seen == [found.data_ptr()]
    assert bitfuse.compare(expected, found) is None
    assert _reasons(handle) == {}


def test_where_the_short_gelu_is_not_atens_pytorchs_runs_in_place(device, monkeypatch, fresh_routes):
    """One value of 65,536 that differs is enough, and the report says so."""
    tier = GELU_TANH.tiers[0]

    def wrong(x):
        plan = tier.plan(x)
        return replace(plan, kernel=plan.kernel.edited(("at < elements", "at < elements - 1")))

    monkeypatch.setattr(GELU_TANH, "tiers", (replace(tier, plan=wrong),))
    model, handle, _ = _steps(PLAIN, ORDERS[0], device, count=1)
    activation = model.transformer_blocks[0].ff.net[0]
    x = torch.randn(1, 3, activation.proj.in_features, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = F.gelu(activation.proj(x), approximate="tanh")
        assert bitfuse.compare(expected, activation(x)) is None
    (reason, *_) = _reasons(handle)["short GELU"]
    assert "(1 of 65536 elements), on the battery's 'live' inputs" in reason
    assert "GELU in place" not in _reasons(handle)


def test_in_place_while_dynamo_evaluates_frames(device):
    """As it goes on doing after a compilation that has raised: each call then holds what it is given once more."""
    model, handle, _ = _steps(PLAIN, ORDERS[0], device, count=1)
    activation = model.transformer_blocks[0].ff.net[0]
    x = torch.randn(1, 3, activation.proj.in_features, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = F.gelu(activation.proj(x), approximate="tanh")
        found = torch._dynamo.run(lambda: activation(x))()
    assert bitfuse.compare(expected, found) is None
    assert _reasons(handle) == {}


def test_nothing_is_lost_where_there_is_nothing_to_activate(device):
    model, handle, _ = _steps(PLAIN, ORDERS[0], device, count=1)
    activation = model.transformer_blocks[0].ff.net[0]
    with torch.no_grad():
        out = activation(torch.empty(1, 0, activation.proj.in_features, device=device, dtype=torch.bfloat16))
    assert out.shape == (1, 0, activation.proj.out_features)
    assert _reasons(handle) == {}


class Cut(torch.nn.Module):
    """A projection to one feature more, of which one is left out: dense for one token, in wider strides."""

    def __init__(self, linear, kept):
        super().__init__()
        self.wide = torch.nn.Linear(linear.in_features, 1 + linear.out_features).to(linear.weight)
        self.kept = kept

    def forward(self, x):
        return self.wide(x)[..., self.kept]


@pytest.mark.parametrize("left_out", ["the first", "the last"])
def test_a_result_that_does_not_lie_as_a_new_one_is_not_written_into(left_out, device):
    """The matrix product that comes next is chosen by strides and alignment: those of stock's GELU, which are new."""
    build, _ = step_of("2.0", device)
    model = build()
    activation = model.transformer_blocks[0].ff.net[0]
    activation.proj = Cut(activation.proj, slice(1, None) if left_out == "the first" else slice(-1))
    x = torch.randn(1, 1, activation.proj.wide.in_features, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        assert activation.proj(x).is_contiguous()
        expected = activation(x)
        handle = bitfuse.accelerate(model)
        found = activation(x)
    assert bitfuse.compare(expected, found) is None
    assert (found.stride(), found.storage_offset()) == (expected.stride(), expected.storage_offset())
    assert found.data_ptr() % 16 == 0
    (reason,) = _reasons(handle)["GELU in place"]
    assert "does not lie in PyTorch's memory as a new tensor does" in reason


def _free_activation(device):
    """The handle of an acceleration, a GELU of its model, an input for it, and what stock makes of that."""
    build, _ = step_of("2.0", device)
    model = build()
    activation = model.transformer_blocks[0].ff.net[0]
    x = torch.randn(1, 3, activation.proj.in_features, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = activation(x)
    return bitfuse.accelerate(model), activation, x, expected


def test_the_result_is_a_tensor_of_its_own(device):
    """As stock's: not the view that `F.linear` gave, which nobody may write into with gradients."""
    _, activation, x, expected = _free_activation(device)
    shift = torch.nn.Parameter(torch.ones(x.shape[1], 1, device=device, dtype=torch.bfloat16))
    with torch.no_grad():
        found = activation(x)
    assert found._base is None
    found += shift
    assert bitfuse.compare((expected + shift).detach(), found.detach()) is None


def test_an_activation_is_called_as_stock_calls_it(device):
    handle, activation, x, expected = _free_activation(device)
    with torch.no_grad():
        assert bitfuse.compare(expected, activation(hidden_states=x)) is None
        for given in ((), (x, x)):
            with pytest.raises(TypeError, match=r"GELU\.forward\(\)"):
                activation(*given)
    assert _reasons(handle) == {"GELU in place": {"it was not called with one tensor, by its place": 3}}


@pytest.mark.filterwarnings("ignore:.*nested")
def test_nested_tensors_are_stocks(device):
    handle, activation, x, _ = _free_activation(device)
    nested = torch.nested.nested_tensor([x[0], x[0, :2]])
    with torch.no_grad():
        for found, one in zip(activation(nested).unbind(), nested.unbind(), strict=True):
            assert bitfuse.compare(F.gelu(activation.proj(one), approximate="tanh"), found) is None
    assert list(_reasons(handle)) == ["GELU in place"]
    assert bitfuse.explain("gelu_tanh", nested)[0] == "x is a nested tensor, which has no one shape"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("name", ["ff.net.0.proj", "ff.net.2", "attn1.to_q", "attn1.to_out.0"])
@pytest.mark.parametrize("order", ["scripted first", "accelerated first"])
def test_a_linear_of_torchscripts_is_called(name, order, device):
    build, step = step_of("2.0", device)
    expected, model = step(build())(), build()

    def script():
        block = model.transformer_blocks[0]
        parent, _, attribute = name.rpartition(".")
        setattr(block.get_submodule(parent), attribute, torch.jit.script(block.get_submodule(name)))

    if order == "scripted first":
        script()
    handle = bitfuse.accelerate(model)
    if order == "accelerated first":
        script()
    assert bitfuse.compare(expected, step(model)()) is None
    assert handle.report().fused == handle.report().seen
    handle.restore()
    assert bitfuse.compare(expected, step(model)()) is None


def test_a_projection_that_is_no_module_is_called(device):
    handle, activation, x, expected = _free_activation(device)
    linear = activation.proj
    del activation.proj
    activation.proj = lambda given: linear(given)
    with torch.no_grad():
        assert bitfuse.compare(expected, activation(x)) is None
    assert _reasons(handle) == {"GELU in place": {"the projection is a function, not a module": 1}}


def test_a_gelu_of_a_class_that_somebody_derives_meanwhile_runs(device):
    handle, activation, x, _ = _free_activation(device)
    kind = type(activation)
    activation.__class__ = type("Twice", (kind,), {"gelu": lambda self, gate: kind.gelu(self, gate) * 2})
    with torch.no_grad():
        expected = F.gelu(activation.proj(x), approximate="tanh") * 2
        assert bitfuse.compare(expected, activation(x)) is None
    assert _reasons(handle) == {"GELU in place": {"the gelu of the activation was replaced": 1}}


@pytest.mark.filterwarnings("ignore:.*overrid")
@pytest.mark.parametrize("key", ["{}", "Autograd{}", "Autograd", "ADInplaceOrView", "BackendSelect"])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_a_gelu_that_is_registered_in_python_is_the_one_that_runs(approximate, key, device, fresh_routes):
    """PyTorch's own come and go; `gelu_` is another op, and a kernel was proved by ATen's."""
    build, _ = step_of("2.0", device)
    model = build()
    activation = model.transformer_blocks[0].ff.net[0]
    activation.approximate = approximate
    handle = bitfuse.accelerate(model)
    x = torch.randn(1, 3, activation.proj.in_features, device=device, dtype=torch.bfloat16)
    with torch.no_grad(), torch.library._scoped_library("aten", "IMPL") as library:
        assert activation(x).min() > -1
        library.impl("gelu", lambda self, *, approximate="none": self * 0 - 7, key.format(device.type.upper()))
        assert (activation(x) == -7).all()
        assert (bitfuse.OPERATORS["gelu_tanh"](activation.proj(x)) == -7).all()
    assert _reasons(handle) == {"GELU in place": {"Python code is registered for PyTorch's gelu": 1}}
    with torch.no_grad():
        assert activation(x).min() > -1


@pytest.mark.filterwarnings("ignore:.*overrid")
def test_a_gelu_in_place_that_is_registered_in_python_does_not_run(device):
    _, activation, x, _ = _free_activation(device)
    activation.approximate = "none"
    with torch.no_grad(), torch.library._scoped_library("aten", "IMPL") as library:
        expected = F.gelu(activation.proj(x))
        library.impl("gelu_", lambda self, *, approximate="none": self.zero_(), device.type.upper())
        assert bitfuse.compare(expected, activation(x)) is None


@pytest.mark.usefixtures("launched_as_reference")
def test_strict_is_about_sites_alone(device):
    build, step = step_of("2.0", device)
    model = build()
    model.transformer_blocks[0].ff.net[0].proj.register_forward_hook(lambda *args: None)
    handle = bitfuse.accelerate(model, strict=True, keep_text=True)
    with torch.no_grad():
        step(model)()
    assert handle.report().fused == handle.report().seen
    assert list(_reasons(handle)) == ["GELU in place"]


# -- the second stream -------------------------------------------------------------------------------------------------


class OnCuda(SimpleNamespace):
    """What `SecondStream` asks of tokens that are on a GPU."""

    is_cuda, device = True, "cuda:0"


@pytest.fixture
def second(monkeypatch):
    """(a second stream on a GPU that need not be there, the reasons that it was told)"""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    reasons = []
    return SecondStream(reasons.append), reasons


def test_a_second_stream_is_counted_as_lost_only_where_it_would_pay(second, monkeypatch):
    stream, reasons = second
    many, few = OnCuda(shape=(2, 2048, 8)), OnCuda(shape=(1, 4095, 8))
    with torch.no_grad():
        assert stream.of(many, lambda: None) == "a stream of cuda:0"
        assert stream.of(few, lambda: "a hook is attached to attn1") is None
        assert stream.of(torch.empty(1, 8192, 8), lambda: "a hook is attached to attn1") is None
        assert reasons == []
        assert stream.of(many, lambda: "a hook is attached to attn1") is None
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert stream.of(few, lambda: None) == "a stream of cuda:0"
    assert stream.of(many, lambda: None) is None
    assert reasons == ["a hook is attached to attn1", "gradients are enabled; torch.no_grad() allows it"]


# -- kept text ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("feature", [STAND_INS[0], *REAL], ids=lambda feature: feature.name)
def test_the_text_of_quantised_weights_and_lora_is_kept(feature, order, device):
    model, handle, mismatch = _steps(feature, order, device, keep_text=True)
    assert mismatch is None
    assert _reasons(handle) == {}
    kept = _kept(model)
    assert len(kept) == 2 + 4
    assert {name: (c.hits, c.misses) for name, c in kept.items()} == dict.fromkeys(kept, (2, 1))


def _kept(model):
    ours = {name: ours_in(module) for name, module in model.named_modules()}
    found = {name: getattr(part, "kept", None) or getattr(part, "text", None) for name, part in ours.items()}
    return {name: constant for name, constant in found.items() if constant is not None}


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("part", ["q", "scale"])
@pytest.mark.parametrize("how", ["written", "replaced", "the weight replaced"])
def test_a_quantised_weight_that_changes_is_noticed(part, how, device):
    build, step = step_of("2.0", device)
    stock, model = build(), build()
    with torch.no_grad():
        for each in (stock, model):
            STAND_INS[0].use(each)
        before = step(stock)()
        handle = bitfuse.accelerate(model, keep_text=True)
        for _ in range(2):
            assert bitfuse.compare(before, step(model)()) is None
        for each in (stock, model):
            linear = each.transformer_blocks[0].attn2.to_k
            weight = linear.weight
            if how == "written":
                getattr(weight, part).mul_(-1)
            elif how == "replaced":
                setattr(weight, part, -getattr(weight, part))
            else:
                parts = {"q": weight.q, "scale": weight.scale}
                parts[part] = -parts[part]
                linear.weight = torch.nn.Parameter(Quantised(**parts), requires_grad=False)
        expected = step(stock)()
        assert bitfuse.compare(before, expected) is not None
        for _ in range(2):
            assert bitfuse.compare(expected, step(model)()) is None
    ((reason, count),) = _reasons(handle)["kept text"].items()
    assert count == 1
    assert "were written to, or moved" in reason


def _lora_of(model):
    return model.transformer_blocks[0].attn2.to_k


def _second_adapter(model):
    from peft import LoraConfig

    torch.manual_seed(4)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), adapter_name="second")
    model.to(torch.bfloat16)


def _dropout(model):
    _lora_of(model).lora_dropout["default"] = torch.nn.Dropout(0.5)
    model.train()


CHANGES = {
    "its scale": lambda model: _lora_of(model).scaling.__setitem__("default", -1.5),
    "one of its weights, written": lambda model: _lora_of(model).lora_B["default"].weight.mul_(-1),
    "one of its weights, replaced": lambda model: setattr(
        _lora_of(model).lora_A["default"], "weight", torch.nn.Parameter(-_lora_of(model).lora_A["default"].weight)
    ),
    "switched off": lambda model: model.disable_adapters(),
    "merged": lambda model: _lora_of(model).merge(),
    "another adapter": _second_adapter,
    "a weight below it": lambda model: _lora_of(model).base_layer.weight.mul_(-1),
    "dropout": _dropout,
    "a hook": lambda model: _lora_of(model).lora_A["default"].register_forward_hook(lambda m, args, out: -out),
}
UNKNOWN = {"dropout": "drops values at random", "a hook": "has a hook"}


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("change", CHANGES)
def test_a_lora_that_changes_is_noticed(change, device):
    pytest.importorskip("peft")
    build, step = step_of("2.0", device)
    stock, model = build(), build()
    with torch.no_grad():
        for each in (stock, model):
            REAL[0].use(each)
        before = step(stock)()
        handle = bitfuse.accelerate(model, keep_text=True)
        for _ in range(2):
            assert bitfuse.compare(before, step(model)()) is None
        for each in (stock, model):
            CHANGES[change](each)
        for seed in range(2):
            expected, found = ((torch.manual_seed(seed), step(each)())[1] for each in (stock, model))
            assert bitfuse.compare(before, expected) is not None
            assert bitfuse.compare(expected, found) is None
    if change in UNKNOWN:
        assert any(UNKNOWN[change] in reason for reason in _reasons(handle)["kept text"])
    else:
        assert all("were written to, or moved" in reason for reason in _reasons(handle)["kept text"])


@pytest.mark.usefixtures("launched_as_reference")
def test_the_last_lora_that_goes_is_noticed(device):
    """Without one the key of a layer has another form, which is compared with that of before."""
    pytest.importorskip("peft")
    build, step = step_of("2.0", device)
    expected, model = step(build())(), build()
    with torch.no_grad():
        REAL[0].use(model)
        with bitfuse.accelerated(model, keep_text=True):
            before = step(model)()
            model.unload_lora() if hasattr(model, "unload_lora") else model.delete_adapters("default")
            found = step(model)()
    assert bitfuse.compare(before, found) is not None
    assert bitfuse.compare(expected, found) is None


def test_loras_that_can_not_be_looked_into_are_named():
    peft = pytest.importorskip("peft")
    from bitfuse.hosts import lora

    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    dora = peft.get_peft_model(model, config).base_model.model[0]
    assert "of a kind of its own (Dora" in lora.weights(dora)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    layer = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).base_model.model[0]
    assert isinstance(lora.weights(layer), tuple)
    layer.merge()
    assert isinstance(lora.weights(layer), tuple)
    layer.enable_adapters(False)
    assert "about to be taken out of its weight" in lora.weights(layer)
    layer.__class__ = type("Linear", (type(layer),), {"forward": lambda self, x: x})
    assert "not a source that bitfuse knows" in lora.weights(layer)


WHY_NOT_KEPT = {
    "a weight that can't be looked into": (
        _on_linears(lambda linear: _quantise(linear, Opaque)), "a weight for the text is a ", 2 * 4
    ),
    "a layer of a class of its own": (_on_linears(Bytes), "a linear layer of the text is a ", 2 * 4),
    "layerwise casting": (
        next(f for f in FEATURES if f.name == "fp8 layerwise casting").use,
        "a linear layer of the text has a hook",
        2 * 6,
    ),
}  # fmt: skip


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", WHY_NOT_KEPT)
def test_why_a_text_is_not_kept_is_said(name, order, device):
    use, reason, count = WHY_NOT_KEPT[name]
    _, handle, mismatch = _steps(Feature(name, use, ""), order, device, count=2, keep_text=True)
    assert mismatch is None
    found = _reasons(handle)["kept text"]
    assert [why.startswith(reason) for why in found] == [True]
    assert list(found.values()) == [count]


@pytest.mark.usefixtures("launched_as_reference")
def test_weights_that_move_at_every_call_are_said_to_lose_the_text(device):
    build, step = step_of("2.0", device)
    model = build()
    expected = step(build())()
    handle = bitfuse.accelerate(model, keep_text=True)
    for _ in range(3):
        assert bitfuse.compare(expected, step(model)()) is None
        for linear in (model.transformer_blocks[0].attn2.to_k, model.transformer_blocks[1].audio_attn2.to_v):
            linear.weight.data = linear.weight.data.clone()  # as group offload of blocks brings them
    found = _reasons(handle)["kept text"]
    assert list(found.values()) == [2 * 2]
    assert "offload moves weights at every call" in next(iter(found))


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_a_model_that_makes_its_text_anew_says_so_once(version, device):
    build, _ = step_of(version, device)
    with bitfuse.accelerated(build()) as handle:
        assert _reasons(handle) == {}, "nobody has asked for it"
    with bitfuse.accelerated(build(), keep_text=True) as handle:
        found = _reasons(handle).get("kept text", {})
    assert list(found.values()) == ([1] if version == "2.3" else [])
    assert all("LTX-2.3 or newer" in reason for reason in found)


@pytest.mark.usefixtures("launched_as_reference")
def test_inference_mode_is_named_and_a_switched_off_bitfuse_is_not(device):
    build, step = step_of("2.0", device)
    model = build()
    handle = bitfuse.accelerate(model, keep_text=True)
    with contextlib.ExitStack() as stack:
        bitfuse.disable()
        stack.callback(bitfuse.enable)
        step(model)()
    assert _reasons(handle) == {}
    with torch.inference_mode():
        step(model)()
    ((reason, count),) = _reasons(handle)["kept text"].items()
    assert count > 0
    assert "inference mode" in reason


def test_what_is_alone_is_told_by_who_holds_it():
    def fresh(make):
        t = make()
        return alone(t)

    held = []

    def of_which_somebody_holds_the_memory():
        t = torch.empty(2, 3)
        held.append(t.untyped_storage())
        return t

    assert fresh(lambda: torch.empty(2, 3))
    assert fresh(lambda: torch.empty(6).view(2, 3))
    assert not fresh(of_which_somebody_holds_the_memory)
    assert not fresh(lambda: torch.empty(3, 2).t())
    assert not fresh(lambda: torch.empty(3, 1).expand(3, 2))
    assert not fresh(lambda: torch.eye(2).to_sparse())
    assert not fresh(lambda: torch.from_numpy(np.zeros(3, dtype=np.float32)))
    assert not fresh(lambda: torch.empty(2).as_subclass(Mine))
    assert not fresh(lambda: torch.nn.Parameter(torch.empty(2)))
    assert not fresh(lambda: torch.empty(2).share_memory_())
    assert not fresh(lambda: torch.empty(8)[4:])
    assert not fresh(lambda: torch.empty(2, 3)[:1, :2])


@pytest.mark.parametrize("whom", ["its memory", "what it is a view of"])
def test_what_is_known_weakly_is_not_alone(whom):
    known = []

    def view():
        t = torch.empty(6).view(2, 3)
        known.append(weakref.ref(t.untyped_storage() if whom == "its memory" else t._base))
        return t

    t = view()
    assert known[0]() is not None, "so that somebody can read what is written"
    assert not alone(t)


class Script(torch.nn.Module):
    """TorchScript's attributes are held in C++ alone."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.kept = torch.zeros(0)

    def forward(self, x):
        flat = x + 1
        self.kept = flat
        if self.way == "itself":
            return flat
        return flat.view(1, -1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["itself", "what it is a view of"])
def test_what_is_held_in_cpp_is_not_alone(way):
    scripted = torch.jit.script(Script(way))
    with torch.no_grad():
        t = scripted(torch.zeros(6))
        assert not alone(t)
        t.add_(1)
    assert scripted.kept[0] == 2, "what was written is seen"


def test_a_report_is_made_while_reasons_are_added():
    """As another thread adds one between two steps of a loop over them."""
    extras = Extras()
    extras.gelu.fall("the first")
    found = Report("a host", [], [], None, None, extras).not_used
    for extra in found:
        for reason in extra.reasons:
            extras.gelu.fall(f"after {reason}")
    assert [dict(extra.reasons) for extra in found] == [{"the first": 1}]
