"""Rows as ComfyUI holds them, taken as they lie: frames as samples, a text that is some columns of a wider tensor."""

from __future__ import annotations

import pytest
import torch

import bitfuse
from bitfuse import OPERATORS, compare
from bitfuse.ops.adaln import MODULATE

BATCH, FRAMES, PATCHES, WIDTH = 2, 3, 7, 256
FRAMED = (
    "gated_residual_addcmul",
    "residual_addcmul_rms_norm_modulate_native",
    "residual_rms_norm_modulate_native",
    "residual_rms_norm_modulate_twice_native",
    "rms_norm_modulate_native",
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def framed(name: str, device: torch.device, by_frame: bool) -> list[torch.Tensor | None]:
    """Arguments whose AdaLN values belong to frames: expanded to tokens, or each frame a sample of its own.

    The values of a frame stand side by side in one tensor, as a timestep's embedding has them.
    """
    tokens, rows = FRAMES * PATCHES, 9
    values = normal(BATCH, FRAMES, rows * WIDTH, seed=1).to(device).unflatten(-1, (rows, WIDTH))
    tables = normal(rows, WIDTH, seed=2).to(device)
    found: list[torch.Tensor | None] = []
    kinds = [n for n in OPERATORS[name]._kinds if n != "eps"]
    for number, kind in enumerate(kinds):
        row = number % rows
        if kind in ("x", "y"):
            t = normal(BATCH, tokens, WIDTH, seed=3 + number).to(device)
            found.append(t.view(BATCH * FRAMES, PATCHES, WIDTH) if by_frame else t)
        elif kind == "mask":
            found.append(None)
        elif kind.endswith("_table"):
            found.append(tables[kinds.index(kind.removesuffix("_table")) % rows])
        elif by_frame:
            view = values[:, :, row].view(BATCH * FRAMES, 1, WIDTH)
            assert view.stride(0) == rows * WIDTH
            found.append(view)
        else:
            found.append(values[:, :, row, None].expand(-1, -1, PATCHES, -1).flatten(1, 2))
    return found


@pytest.mark.parametrize("name", FRAMED)
def test_frames_as_samples_have_the_bits_of_values_expanded_to_tokens(name, device):
    operator = OPERATORS[name]
    expected = operator.reference(*framed(name, device, by_frame=False))
    args = framed(name, device, by_frame=True)
    assert bitfuse.explain(operator, *args) == []
    found, expected = (t if isinstance(t, tuple) else (t,) for t in (operator(*args), expected))
    assert len(found) == len(expected)
    for a, b in zip(expected, found, strict=True):
        assert compare(a, b.view(BATCH, FRAMES * PATCHES, WIDTH)) is None


def modulation(device: torch.device) -> list[torch.Tensor]:
    """Shift and scale of the text, and their table's rows."""
    values, tables = normal(BATCH, 1, 2 * WIDTH, seed=5).to(device), normal(2, WIDTH, seed=6).to(device)
    return [values[..., WIDTH:], values[..., :WIDTH], tables[1], tables[0]]


@pytest.mark.parametrize("part", [0, 1])
def test_a_slice_of_columns_is_modulated_where_it_lies(part, device):
    whole = normal(BATCH, 21, 2 * WIDTH).to(device)
    x = torch.split(whole, WIDTH, dim=-1)[part]
    assert not x.is_contiguous()
    args = (x, *modulation(device))
    assert bitfuse.explain(MODULATE, *args) == []
    expected = MODULATE.reference(*args)
    assert expected.is_contiguous()
    assert compare(expected, MODULATE(*args)) is None
    assert compare(MODULATE.reference(x.contiguous(), *args[1:]), MODULATE(*args)) is None


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "do not lie in the order of its batch and tokens"),
        (lambda t: torch.stack([t, t], dim=-1)[..., 0], "columns of x are 2 elements apart"),
    ],
    ids=["tokens before samples", "columns apart"],
)
def test_rows_that_lie_otherwise_run_the_chain(x, reason, device):
    args = (x(normal(BATCH, 21, WIDTH).to(device)), *modulation(device))
    assert any(reason in one for one in bitfuse.explain(MODULATE, *args))
    assert compare(MODULATE.reference(*args), MODULATE(*args)) is None


def test_other_rows_than_the_texts_are_contiguous(device):
    operator = OPERATORS["rms_norm_modulate_native"]
    x = torch.split(normal(BATCH, 21, 2 * WIDTH).to(device), WIDTH, dim=-1)[0]
    args = (x, *modulation(device))
    assert any("x is not contiguous" in one for one in bitfuse.explain(operator, *args))
