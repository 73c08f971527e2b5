"""What an operator is proved by: geometries, batteries, wrong kernels and counts of instructions.

It is loaded when a kernel is about to be proved, not by `import bitfuse`. An operator in `ops/NAME.py` has its evidence
beside it, in `ops/NAME_evidence.py`, which holds `EVIDENCE`: an `Evidence` for each operator, by the operator's name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.bits import Outputs, Part
from bitfuse.core.kernel import EXACT, Kernel
from bitfuse.core.launch import Plan
from bitfuse.core.reduction import LAYER_NORM

STEPS = (
    "residual", "addcmul", "norm", "modulation", "rsqrt", "quotient", "sigmoid", "bias", "summands", "root", "silu",
)  # fmt: skip
"""What a kernel may do: add a residual, or do it by one addcmul; norm rows, so that one element shows in all of its
row; modulate; call `reciprocal_root`; `divide` a sum by the width; compute 1 / (1 + e^-x); and of volumes: add a bias;
what else stands between two convolutions, in the lines that share it; divide by `square_root`; call `silu`."""


@dataclass(frozen=True)
class Evidence:
    """What tests, `bitfuse verify` and the proof in the process hold an operator against.

    battery     (family, arguments) of the same signature as the given arguments: what a wrong kernel trips over
    cases       geometries for tests, `verify` and `bench`: the real LTX-2 ones by name, and odd ones. Each has a
                `name`, `real` and `arguments(device, tokens=None, seed=0)`
    mutants     wrong kernels that the battery must catch
    audits      cases whose PTX is counted, with the counts
    emulated    the reference with its reductions in the order of the first tier, which is CUDA's: on a CPU, whose
                ATen adds in another, the first tier is held against this
    witness     what the plans' `witnesses` must be, by the reference's own ops; `emulated_witness` beside `emulated`
    as_one      (arguments) -> a context in which the battery's small inputs launch the kernel of these large arguments.
                What it gives is whether PyTorch adds up small ones otherwise: then `emulated` is what they are held
                against. That it is PyTorch's order for the large ones is then for `Plan.by_shape` to show
    parts       (arguments, witness=) -> (number of the output, place in it, what is expected there) of a call, piece by
                piece, witnesses first if asked for: what the whole reference would give, in a fraction of its memory.
                Everything that is large is made before the first piece is given, and let go of. For references whose
                outputs' form hangs on the shapes alone
    retiled     the same launch cut in other ways, which must not change a bit
    steps       what the kernel does of which `verify --deep` has a sweep, by the names in `STEPS`
    """

    battery: Callable[..., Iterable[tuple[str, tuple[Any, ...]]]]
    cases: tuple[Any, ...] = ()
    mutants: tuple[Mutant, ...] = ()
    audits: tuple[Audit, ...] = ()
    emulated: Callable[..., Outputs] | None = None
    witness: Callable[..., tuple[Tensor, ...]] | None = None
    emulated_witness: Callable[..., tuple[Tensor, ...]] | None = None
    as_one: Callable[..., AbstractContextManager[bool]] | None = None
    parts: Callable[..., Iterator[Part]] | None = None
    retiled: Callable[[Plan], Iterable[Plan]] | None = None
    steps: tuple[str, ...] = ()


def retiled(constant: str, sizes: Iterable[int]) -> Callable[[Plan], Iterator[Plan]]:
    """For `Evidence.retiled`: a launch whose first scalar says how many there are in all, and this constant how many of
    them a program takes, with each of these sizes instead."""

    def cut(plan: Plan) -> Iterator[Plan]:
        for size in sizes:
            grid = (-(-plan.scalars[0] // size), *plan.grid[1:])
            yield replace(plan, grid=grid, constants={**plan.constants, constant: size})

    return cut


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel: the operator's own with source edits and compiler options. The battery must catch it.

    harmless_for    dtypes of the first argument (the others as the host has them) for which the change alters no bit
                    at all: fp16 products, for one, are exact in fp32 and in its range, so rounding them again changes
                    nothing
    compiled_only   only a compiler makes it wrong; the interpreter runs it as written
    tier            index of the operator's tier whose kernel is edited
    case            name of the operator's case on which it does harm, where not on every one
    kind            of `mutation.KINDS` where it was generated
    """

    name: str
    edits: tuple[tuple[str, str], ...] = ()
    options: dict[str, Any] = field(default_factory=lambda: dict(EXACT))
    harmless_for: tuple[torch.dtype, ...] = ()
    compiled_only: bool = False
    tier: int = 0
    case: str | None = None
    kind: str = ""

    def case_of(self, operator: Any) -> Any:
        """The operator's case that the battery catches this mutant on: the named one, or the first."""
        if self.case is None:
            return operator.cases[0]
        return {case.name: case for case in operator.cases}[self.case]

    def plan(self, operator: Any, *args: Any) -> Plan | str:
        plan = operator.tiers[self.tier].plan(*args)
        if isinstance(plan, str):
            return plan
        return replace(plan, kernel=_edited(plan.kernel, self.edits), options=self.options)


def flushed(name: str) -> str:
    """For mutants: source of a value of this name whose subnormals in fp32 are set to zero."""
    return f"tl.where(tl.abs({name}) < 1.1754943508222875e-38, {name} * 0.0, {name})"


def fold_mutants(order: str, case: str = "1920 wide") -> tuple[Mutant, ...]:
    """Kernels that add up a row in another order than ATen's (`bitfuse.core.reduction`): LAYER_NORM or MEAN.

    case    the name of a case whose width is no power of two: there 1/N is not exact
    """
    halves = "sum_of_two(tl.reshape(values, (ROWS, 2, {0})))"
    neighbours = "sum_of_two(tl.trans(tl.reshape(values, (ROWS, {0}, 2)), (0, 2, 1)))"

    def folded_otherwise(*sizes: int) -> tuple[tuple[str, str], ...]:
        return tuple((halves.format(n), neighbours.format(n)) for n in sizes)

    if order == LAYER_NORM:
        orders = (
            Mutant(
                "a vector's squares added up first",
                (
                    ("lane_sum = square0 if step == 0 else lane_sum + square0", "before = lane_sum if step else 0.0"),
                    (
                        "((lane_sum + square1) + square2) + square3",
                        "before + (((square0 + square1) + square2) + square3)",
                    ),
                ),
                case=case,
            ),
            Mutant(
                "a product with 1/N for the division by N",
                (("divide(total, N * 1.0)", "total * (1.0 / N)"),),
                case=case,
            ),
        )
    else:
        orders = (
            Mutant(
                "the four sums of a lane added in pairs",
                (("((sum0 + sum1) + sum2) + sum3", "(sum0 + sum1) + (sum2 + sum3)"),),
            ),
            Mutant(
                "a division by N for the product with 1/N",
                (
                    (
                        "total * divide(rows.to(tl.float32), (rows.to(tl.int64) * N).to(tl.float32))",
                        "divide(total, N * 1.0)",
                    ),
                ),
                case=case,
            ),
        )
    return (
        Mutant("the lanes folded neighbours first", folded_otherwise(16, 8, 4, 2)),
        Mutant("one fold of neighbours", folded_otherwise(8)),
        *orders,
        Mutant(
            "1 / sqrt for rsqrt",
            (("reciprocal_root(square + eps)", "(1.0 / tl.sqrt(square + eps))"),),
            compiled_only=True,
        ),
    )


@functools.cache
def _edited(kernel: Kernel, edits: tuple[tuple[str, str], ...]) -> Kernel:
    return kernel.edited(*edits)


@dataclass(frozen=True)
class Audit:
    """What the PTX for one of the operator's cases must hold: exact counts of rounding instructions.

    No rounding instruction may appear that is named nowhere here. A packed one counts for as many results as it
    makes; a result is an element of the first output.

    counts        instructions for every `per` results
    per           2 for rotary embeddings, which make their results in pairs
    per_thread    further ones of each thread, however many results it makes: what is done once per row
    also          instructions that may appear any number of times: additions of a fold over the lanes of a row
    results       how many of them one thread makes; by default as many as it stores
    loads         what one thread reads from global memory: number of accesses by their width in bytes; by default
                  each operand once, 16 bytes at a time
    stores        likewise what it writes; by default 16 bytes at a time
    tier          index of the tier
    """

    case: str
    counts: dict[str, int]
    per: int = 1
    per_thread: dict[str, int] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    results: int | None = None
    loads: dict[int, int] | None = None
    stores: dict[int, int] | None = None
    tier: int = 0
