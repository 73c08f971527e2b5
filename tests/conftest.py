"""Without a GPU the kernels run in Triton's interpreter, on CPU tensors; with one they run on it."""

import gc
import os
from pathlib import Path

import torch

# Triton reads this when it is imported and bitfuse at every launch, so it is set before either is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # pytest-xdist has a process for each core; more threads only wait for each other

import hypothesis
import pytest

from bitfuse import OPERATORS
from bitfuse.core import proof
from bitfuse.ops.convolution import CONVOLUTION
from common import references_launched

# What the hosts import is a heap of millions of objects, which Python's collector would walk for a tenth of the time
# that Triton's interpreter takes (2026-11-25).
gc.set_threshold(200_000, 50, 100)

# In CI the same examples on every run: a red build is a change of the code, not of the dice.
hypothesis.settings.register_profile("bitfuse", deadline=None, max_examples=40, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("bitfuse")


def _for_a_gpu(collector: pytest.Collector, function: object) -> bool:
    """Whether a test is marked `gpu`, or its module is."""
    marks = [*getattr(function, "pytestmark", []), *collector.iter_markers()]
    return any(mark.name == "gpu" for mark in marks)


def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: object) -> pytest.Item | None:
    """Without a GPU a test for one is a single skip, whatever it is parametrized with."""
    if torch.cuda.is_available() or not collector.istestfunction(obj, name) or not _for_a_gpu(collector, obj):
        return None  # as pytest collects it

    def without_a_gpu():
        pytest.skip("needs a CUDA device")

    item = pytest.Function.from_parent(collector, name=name, callobj=without_a_gpu)
    item.add_marker(pytest.mark.gpu)
    return item


@pytest.fixture(scope="session")
def triton_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests that only look at what Triton compiles let it compile: one folder for all processes and all runs.

    Triton itself tells by a hash of the source, the options and its own version whether what is there is of use.
    """
    cache = getattr(request.config, "cache", None)  # none with `-p no:cacheprovider`
    return tmp_path_factory.mktemp("triton") if cache is None else cache.mkdir("triton")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def fresh_routes():
    """No layout is decided and no kernel proved when the test starts, nor does it leave any behind."""
    _forget()
    yield
    _forget()


@pytest.fixture
def launched_as_reference():
    """For tests of tools, about what is made of an operator's results: each host's kernels are run by others."""
    if torch.cuda.is_available():  # where kernels take no time
        yield
    else:
        with references_launched():
            yield


@pytest.fixture
def unproved(monkeypatch, fresh_routes):
    """Kernels run without a battery before them, which takes most of the time: tests of the operators run those."""
    monkeypatch.setattr(proof, "run_battery", lambda *args: proof.Verdict(True, "equal"))


@pytest.fixture
def undecided_convolutions():
    """Whether a convolution of a layout has the host's bits is found out by this test itself."""
    CONVOLUTION.forget()
    yield
    CONVOLUTION.forget()


def _forget() -> None:
    proof.forget()
    for operator in OPERATORS.values():
        operator.forget()
