"""Without a GPU the kernels run in Triton's interpreter, on CPU tensors; with one they run on it."""

import gc
import os

import torch

# Triton reads this when it is imported and bitfuse at every launch, so it is set before either is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # pytest-xdist has a process for each core; more threads only wait for each other

import hypothesis
import pytest

from bitfuse import OPERATORS, proof

# What the hosts import is a heap of millions of objects, which Python's collector would walk for a tenth of the time
# that Triton's interpreter takes (2026-11-25).
gc.set_threshold(200_000, 50, 100)

# In CI the same examples on every run: a red build is a change of the code, not of the dice.
hypothesis.settings.register_profile("bitfuse", deadline=None, max_examples=40, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("bitfuse")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def fresh_routes():
    """No layout is decided and no kernel proved when the test starts, nor does it leave any behind."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    proof.forget()
    for operator in OPERATORS.values():
        operator.forget()
