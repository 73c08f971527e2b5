"""Geometries, batteries and mutants of the AdaLN operators: what LTX-2 hosts run, what wrong kernels trip over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.evidence import Mutant, flushed
from bitfuse.core.inputs import lookalike
from bitfuse.core.values import ROW_FAMILIES, battery_shape
from bitfuse.ops.adaln_common import FLOATS, role

DRAWS = ROW_FAMILIES

# -- what a wrong kernel trips over ------------------------------------------------------------------------------------


def families(*args: Any, names: tuple[str, ...], few: bool = False) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(family, arguments) with the same signature as `args`, whose `role`s their names tell. few: `battery_shape`.

    In the last family the strides are as dense as those of `args` allow; in the others each operand whose strides
    the kernel is given has others than the rest.
    """
    x = args[0]
    dtype, device = x.dtype, x.device
    batch, tokens = battery_shape(x.shape[0], x.shape[1], few)
    generator = torch.Generator(device).manual_seed(21)
    for family, draw in ROW_FAMILIES.items():
        found: list[Any] = []
        for place, (arg, argument) in enumerate(zip(args, names, strict=False)):
            if not isinstance(arg, Tensor):
                found.append(arg)
                continue
            shape = (
                [batch if arg.shape[0] > 1 else 1, tokens if arg.shape[1] > 1 else 1, arg.shape[2]]
                if arg.ndim == 3
                else list(arg.shape)
            )
            drawn = draw(role(argument), shape, dtype, generator)
            strided = family != "special rows" and role(argument) in ("value", "mask")
            found.append(lookalike(arg, drawn.to(dtype), place + 1 if strided else 0))
        yield family, tuple(found)


# -- geometries ------------------------------------------------------------------------------------------------------


class Inputs:
    """Draws the arguments of one case: rows, AdaLN values as views of one wider tensor, rows of one table."""

    def __init__(self, case: AdalnCase, device: torch.device | str, tokens: int, seed: int):
        self.case, self.device = case, torch.device(device)
        self.tokens = tokens
        self._generator = torch.Generator(device).manual_seed(seed)
        self._taken = 0
        per_token = tokens if case.per_token else 1
        self._values = self._randn(case.batch, per_token, case.ada_rows * case.width, scale=0.5)
        self._tables = self._randn(case.ada_rows, case.width, scale=0.5)

    def _randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, device=self.device) * scale
        return drawn.to(self.case.dtype)

    def rows(self) -> Tensor:
        shape = (self.case.batch, self.tokens, self.case.width)
        if self.case.misaligned:
            return self._randn(torch.Size(shape).numel() + 1)[1:].view(shape)
        return self._randn(*shape)

    def value(self) -> Tensor:
        """The next [B, T or 1, D] of a tensor of `ada_rows` of them side by side, as hosts hold them."""
        self._taken = (self._taken + 1) % self.case.ada_rows
        return self._values.unflatten(-1, (self.case.ada_rows, -1))[:, :, self._taken]

    def table(self) -> Tensor | None:
        """The table row that belongs to the last `value`."""
        return self._tables[self._taken] if self.case.with_tables else None

    def mask(self) -> Tensor | None:
        if not self.case.with_mask:
            return None
        flags = (torch.arange(self.case.batch, device=self.device) % 2).to(self.case.dtype)
        return flags.repeat_interleave(self.case.mask_step)[:: self.case.mask_step, None, None]


@dataclass(frozen=True)
class AdalnCase:
    """A geometry of one operator. `of` draws the operator's arguments; `real` marks what LTX-2 hosts run."""

    name: str
    tokens: int
    width: int
    of: Callable[[Inputs], tuple[Any, ...]]
    batch: int = 1
    ada_rows: int = 6
    per_token: bool = False
    with_tables: bool = True
    with_gate: bool = True
    with_mask: bool = False
    mask_step: int = 1
    with_modulation: bool = True
    misaligned: bool = False
    dtype: torch.dtype = torch.bfloat16
    real: bool = False

    def arguments(self, device: torch.device | str, tokens: int | None = None, seed: int = 0) -> tuple[Any, ...]:
        t = self.tokens if tokens is None else min(tokens, self.tokens)
        return self.of(Inputs(self, device, t, seed))


def cases(of: Callable[[Inputs], tuple[Any, ...]], dtypes: tuple[torch.dtype, ...] = FLOATS) -> tuple[AdalnCase, ...]:
    def case(name: str, tokens: int, width: int, **kwargs: Any) -> AdalnCase:
        return AdalnCase(name, tokens, width, of, **kwargs)

    found = [
        case("video, 768x512x121", 6144, 4096, real=True),
        case("video, guidance, 9 AdaLN rows", 6144, 4096, batch=2, ada_rows=9, real=True),
        case("image to video: AdaLN per token", 6144, 4096, per_token=True, ada_rows=9, real=True),
        case("audio, 5 s", 126, 2048, real=True),
        case("audio, 245 s", 6144, 2048, real=True),
        case("video, 1536x1024x121", 24576, 4096, real=True),
        case(
            "ltx-core: AdaLN per token, no tables", 6144, 4096, per_token=True, ada_rows=3, with_tables=False, real=True
        ),
        case("ltx-core: perturbation mask", 1024, 4096, batch=2, with_mask=True, with_tables=False, real=True),
        case("text", 1024, 4096, ada_rows=2, real=True),
        case("text connector, 3840 wide", 1024, 3840, real=True),
        case("small", 33, 256, batch=2),
        case("1920 wide", 37, 1920),
        case("8192 wide", 17, 8192, with_tables=False),
        case("one row", 1, 2048),
        case("3 rows", 3, 2048, with_tables=False),
        case("10 rows, per token", 5, 1024, batch=2, per_token=True),
        case("no gate, no modulation", 40, 512, with_gate=False, with_modulation=False),
        case("masks of every third element", 21, 256, batch=3, with_mask=True, mask_step=3),
        case("misaligned", 37, 512, misaligned=True),
        case("fp16", 37, 384, dtype=torch.float16),
    ]
    if torch.float32 in dtypes:
        found.append(case("fp32", 37, 384, dtype=torch.float32))
    return tuple(found)


# -- wrong kernels ---------------------------------------------------------------------------------------------------


def residual_mutants(in_norm: bool) -> tuple[Mutant, ...]:
    """Of kernels that call `add_residual`; where no norm follows, its last rounding is the store's."""
    gated, added = "y = round_to(y * gate, DTYPE)", "x = round_to(x + y, DTYPE)"
    found = [
        Mutant("the gated y not rounded", ((gated, "y = y * gate"),), harmless_for=(torch.float32,)),
        Mutant("y * gate and the sum fused", ((gated, "y = y"), (added, "x = round_to(tl.fma(y, gate, x), DTYPE)"))),
        _table_mutant(),
    ]  # fmt: skip
    if in_norm:
        found.append(Mutant("the sum not rounded before the norm", ((added, "x = x + y"),)))
    else:
        found += [_flushed("y = tl.load(y_ptr + start + lane, mask=here, other=0.0).to(tl.float32)", "y"), last_lane()]
    return tuple(found)


def modulation_mutants(normed: bool) -> tuple[Mutant, ...]:
    """Of kernels that modulate rows as they come; `normed`: they come from a LayerNorm, which has no subnormals."""
    flushed = () if normed else (_flushed("factor = round_to(1.0 + scale, DTYPE)", "n"),)
    return (*step_mutants(), *flushed, last_lane())


def step_mutants() -> tuple[Mutant, ...]:
    """Of every kernel that calls `store_modulated`."""
    fp32 = torch.float32
    return (
        Mutant("1 + scale not rounded", (("round_to(1.0 + scale, DTYPE)", "(1.0 + scale)"),), harmless_for=(fp32,)),
        Mutant("fma where there is none", (("round_to(n * factor, DTYPE) + shift", "tl.fma(n, factor, shift)"),)),
        _table_mutant(),
    )


def _table_mutant() -> Mutant:
    summed = "tl.load(table_ptr + lane, mask=here, other=0.0).to(tl.float32) + value"
    return Mutant("table + value not rounded", ((f"round_to({summed}, DTYPE)", summed),), harmless_for=(torch.float32,))


def _flushed(line: str, name: str) -> Mutant:
    edit = (line, f"{line}\n    {name} = {flushed(name)}")
    return Mutant("subnormals flushed", (edit,), harmless_for=(torch.float16,))


def last_lane() -> Mutant:
    return Mutant("the last lane not written", (("inside & (lane < N)", "inside & (lane < N - 1)"),))
