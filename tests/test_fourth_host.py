"""A fourth host: what it takes to add one, done for a made-up framework (`made_up_host`).

It takes an adapter (`made_up_adapter`, 137 lines), a module that builds and calls its transformer with seeded weights
(`made_up_seeded`, 42 lines), and an entry in the registry (below, 8 lines). All else is shared: what the front door,
the report, `verify --host`, `demo`, `compare`, `explain` and `bench` know of a host they take from these.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import bitfuse
import made_up_host
from bitfuse.hosts import registry
from bitfuse.hosts.code import source_hash
from bitfuse.hosts.registry import HOSTS, Host, register
from bitfuse.run.swap import COPIED_BY
from bitfuse.tools import seeded
from bitfuse.tools.compare import conformance

pytestmark = pytest.mark.usefixtures("fresh_routes")

MADE_UP = Host(
    name="made-up",
    title="the made-up host",
    package="made_up_host",
    versions="1.0",
    install="it comes with the tests",
    accepts="a made-up Transformer",
    adapter="made_up_adapter",
    seeded="made_up_seeded",
)


REPLICATED = nn.Module._replicate_for_data_parallel  # what torch.nn.parallel.replicate calls of each module


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.fixture(autouse=True)
def registered():
    register(MADE_UP)
    yield
    del HOSTS[MADE_UP.name]


@pytest.fixture
def model_and_step(device):
    geometry, _ = seeded.geometry_for(device, 1, "2.0", MADE_UP.name)
    model = seeded.build(geometry, device, 0)
    return model, seeded.one_step(model, seeded.make_inputs(model, geometry, device, 0))


def test_stock_and_accelerated_steps_are_equal_in_every_bit(model_and_step):
    model, step = model_and_step
    expected, before = step(), {name: dict(vars(module)) for name, module in model.named_modules()}
    assert all(t.isfinite().all() for t in expected)
    handle = bitfuse.accelerate(model)
    assert bitfuse.accelerate(model) is handle
    assert bitfuse.compare(expected, step()) is None
    report = handle.report()
    assert report.host == f"made-up {made_up_host.__version__}"
    assert {site["state"] for site in report.as_dict()["sites"]} == {"fused"}
    assert (report.fused, report.seen) == (16, 16)
    handle.restore()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert bitfuse.compare(expected, step()) is None


@pytest.mark.usefixtures("launched_as_reference")
def test_a_site_that_is_wired_wrongly_is_seen(model_and_step, monkeypatch):
    """Two of its arguments swapped: what the equality above is worth."""
    model, step = model_and_step
    expected = step()
    from bitfuse.hosts import ltx2

    monkeypatch.setattr(ltx2, "modulation", lambda scale, shift: (shift[0], scale[0], shift[1], scale[1]))
    with bitfuse.accelerated(model):
        assert bitfuse.compare(expected, step()) is not None


@pytest.mark.usefixtures("launched_as_reference")
def test_the_shared_conformance_check(device):
    found = conformance.check(MADE_UP.name, "2.0", device)
    assert (found.outcome, found.reason) == ("equal", "")
    assert found.sites_fused == found.sites_seen == 32
    later = conformance.check(MADE_UP.name, "2.3", device)
    assert (later.outcome, later.reason) == ("declined", "The made-up host does not have LTX-2.3.")


@pytest.mark.usefixtures("launched_as_reference")
def test_what_is_replaced_behind_its_back_runs_stock(model_and_step, monkeypatch):
    model, step = model_and_step
    with bitfuse.accelerated(model) as handle:
        monkeypatch.setattr(made_up_host.AVBlock, "norm", lambda self, x: x * 2)
        expected = step()
        reasons = {reason for site in handle.report().sites for reason in site.reasons}
        assert any("AVBlock.norm was replaced" in reason for reason in reasons)
    assert bitfuse.compare(expected, step()) is None


def test_weights_are_freed_with_their_model():
    """At once, not when Python's collector finds a cycle: they may be all of a GPU's memory."""
    cpu = torch.device("cpu")
    geometry, _ = seeded.geometry_for(cpu, 2, "2.0", MADE_UP.name)
    model = seeded.build(geometry, cpu, 0)
    bitfuse.accelerate(model)
    weights = [weakref.ref(p) for p in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not any(reference() is not None for reference in weights)
    finally:
        gc.enable()


def test_code_that_was_not_read_is_left_alone(model_and_step, monkeypatch):
    import made_up_adapter

    monkeypatch.setitem(made_up_adapter.READ, "AVBlock.forward", {"0" * 16})
    model, _ = model_and_step
    with bitfuse.accelerated(model) as handle:
        reasons = {site.declined for site in handle.sites if site.declined}
    found = source_hash(made_up_host.AVBlock.forward)
    assert reasons == {f"AVBlock.forward of made-up 1.0 is not a source that bitfuse knows ({found})"}


@pytest.mark.usefixtures("launched_as_reference")
def test_every_tool_finds_it(device):
    from bitfuse.tools.compare import runs
    from bitfuse.tools.prove import document

    assert MADE_UP.name in seeded.installed()
    assert runs.named(MADE_UP.name) == "made-up 1.0"
    assert MADE_UP.name in document.hosts()
    with pytest.raises(TypeError, match=r"or a made-up Transformer$"):
        bitfuse.accelerate(torch.nn.Linear(2, 2))


@pytest.mark.usefixtures("launched_as_reference")
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickled, REPLICATED])
def test_a_copy_runs_its_own_forward(way, model_and_step):
    """Not ours, which would run the module that it was copied from: with that one's weights, on that one's device."""
    model, step = model_and_step
    block, given = model.transformer_blocks[0], []
    hook = block.register_forward_pre_hook(lambda module, args: given.append(args))
    step()
    hook.remove()
    block.eps = 1.0
    expected = block(*given[0])
    del block.eps
    with bitfuse.accelerated(model) as handle:
        other = block._replicate_for_data_parallel() if way is REPLICATED else way(block)
        if way is REPLICATED:  # torch.nn.parallel.replicate gives it its device's
            other._parameters = dict(block._parameters)
        other.eps = 1.0
        assert bitfuse.compare(expected, other(*given[0])) is None
        assert not {"forward", *COPIED_BY} & vars(other).keys()
        assert not any(site.fused for site in handle.sites if "attn" not in site.name)
        step()
        assert all(site.fused for site in handle.sites)


def test_a_name_is_one_hosts():
    assert register(MADE_UP) is MADE_UP
    with pytest.raises(
        ValueError, match="'made-up', which is another host's; taken: diffusers, ltx-core, sglang, comfyui, m"
    ):
        register(Host(**{**vars(MADE_UP), "versions": "2.0"}))
    assert registry.HOSTS[MADE_UP.name].versions == "1.0"


def test_the_lines_that_it_takes_are_as_said():
    here = Path(__file__).parent
    for name in (MADE_UP.adapter, MADE_UP.seeded):
        lines = len((here / f"{name}.py").read_text().splitlines())
        assert f"`{name}`, {lines} lines" in __doc__.replace("\n", " ")
