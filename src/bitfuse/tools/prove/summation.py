"""Probes that tell in which order a matmul adds along K, and how it aligns: inputs with the one result that is right.

The order in question is a tensor core's chain: runs of so many products next to each other along K, each added to the
accumulator in one aligned sum (`core/tensor_core.py`), one run after another, from the first to the last.

An order probe multiplies a large value and, further on, its negative, by ones. Whatever is added while the large value
is in a sum lies below its last bit and is lost; whatever is added elsewhere survives. Each column of the output has one
witness, a single product of 1 at a place of its own, so each output is 0 or 1, exact in every dtype: was this product
added to a sum that held the large value? Why that decides the order for certain:

- Pairs in neighbouring runs. Of runs i and i+1, all witnesses in runs up to i+1 are lost and all later ones survive. So
  the smallest partial sum that has both runs holds exactly the runs 0 to i+1, for every i. Partial sums are nested or
  apart; these are nested, each one run larger than the one before, which is a chain and no other tree.
- Pairs within a run. All witnesses of the run and before are lost, all later ones survive: so no partial sum holds both
  ends of the pair and not the whole run. Pairs and witnesses change places in a second set.

Truncation probes put terms just inside and just outside of what the alignment keeps, and cancel the large one in the
same run, or in a later one; the model of the tensor core says what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bitfuse.core.bits import differing
from bitfuse.core.tensor_core import HOPPER, TensorCore

Linear = Callable[[Tensor, Tensor], Tensor]
_LARGE = 2.0**40  # loses every 1, for any number of fractional bits that a sum in fp32 may keep


class Probe(NamedTuple):
    """x [M, K] and w [N, K], and what x @ w.T is [M, N]; `what` is told where it is something else."""

    what: str
    x: Tensor
    w: Tensor
    right: Tensor


def probes(m: int, n: int, k: int, device: torch.device | str, core: TensorCore = HOPPER) -> Iterator[Probe]:
    """All probes of one shape, in as many matmuls of that shape as they need, bf16.

    Each output is exact: 0, 1, or of few bits. ValueError where no chain of the core's runs makes up K.
    """
    if k % core.products or k < 2 * core.products or n < 1 or m < 1:
        raise ValueError(
            f"M, N, K are {m}, {n}, {k}; accepted: positive, K a multiple of {core.products} and at least "
            f"{2 * core.products}"
        )
    yield from _order(m, n, k, torch.device(device), core)
    yield from _truncation(m, n, k, torch.device(device), core)


def difference(linear: Linear, m: int, n: int, k: int, device: torch.device | str, core: TensorCore = HOPPER) -> str:
    """Where a matmul does not add as the core's chain does, in a sentence; "" where it does.

    linear    (x [M, K], w [N, K]) to x @ w.T [M, N] in bf16 or fp32
    """
    for probe in probes(m, n, k, device, core):
        found = linear(probe.x, probe.w)
        wrong = differing(probe.right.to(found.dtype).expand_as(found).contiguous(), found.contiguous())
        if count := int(wrong.sum()):
            row, column = divmod(int(wrong.flatten().nonzero()[0]), n)
            return f"{count} of {m * n} outputs differ in the probes of {probe.what}, the first in row {row}, {column}"
    return ""


def _order(m: int, n: int, k: int, device: torch.device, core: TensorCore) -> Iterator[Probe]:
    size, runs = core.products, k // core.products
    half = size // 2
    run = torch.arange(runs, device=device)
    column, row = torch.arange(n, device=device), torch.arange(m, device=device)
    for parity, name in ((0, "even"), (1, "odd")):
        # Ends of pairs stand at places of one parity, where every weight is 1; witnesses at the others.
        beside = torch.stack([run[:-1], run[:-1] % half * 2 + parity, run[1:], run[1:] * 3 % half * 2 + parity], 1)
        place = run % (half - 1) * 2 + parity
        within = torch.stack([run, place, run, place + 2], 1)
        # As many witnesses as it takes: one of each run to tell runs apart, all to tell that a run is one sum.
        for what, ends, needed in (("neighbouring runs", beside, runs), ("one run", within, runs * half)):
            for first in range(0, needed, n):
                witness = (column + first) % (runs * half)
                of_run = witness % runs
                w = torch.zeros(n, runs, size, dtype=torch.bfloat16, device=device)
                w[:, :, parity::2] = 1
                w[column, of_run, 1 - parity + (witness // runs + of_run) % half * 2] = 1
                for some in ends.split(m):
                    x = torch.zeros(m, runs, size, dtype=torch.bfloat16, device=device)
                    x[:, :, 1 - parity :: 2] = 1
                    start, at, last, to = some[row % len(some)].unbind(1)  # rows that are left repeat the first ones
                    x[row, start, at] = _LARGE
                    x[row, last, to] = -_LARGE
                    right = (of_run[None, :] > last[:, None]).to(torch.float32)
                    yield Probe(f"order, pairs in {what} at {name} places", x.view(m, k), w.view(n, k), right)


def _truncation(m: int, n: int, k: int, device: torch.device, core: TensorCore) -> Iterator[Probe]:
    rows = torch.zeros(len(_TERMS) * 2, 2, core.products, dtype=torch.bfloat16)
    for i, terms in enumerate(_TERMS):
        for sign in (0, 1):
            row = rows[2 * i + sign]
            for place, exponent, value in terms:
                row.view(-1)[place if place >= 0 else place + 2 * core.products] = (-1) ** sign * value * 2.0**exponent
    right = core.chain(rows.view(len(rows), -1), torch.ones(2 * core.products, dtype=torch.bfloat16))
    w = torch.ones(n, k, dtype=torch.bfloat16, device=device)
    runs = k // core.products
    for start in sorted({0, (runs - 2) // 2, runs - 2}):  # other runs are zero, which changes no sum
        for some, wanted in zip(rows.split(m), right.split(m), strict=True):
            x = torch.zeros(m, runs, core.products, dtype=torch.bfloat16)
            row = torch.arange(m) % len(some)
            x[:, start : start + 2] = some[row]
            yield Probe("truncation", x.view(m, k).to(device), w, wanted[row][:, None].to(device))


def _terms() -> Iterator[tuple[tuple[int, int, float], ...]]:
    """(place in two runs, exponent, value): a large value that is taken away again, and what is small beside it."""
    for lost in range(20, 30):  # bits between the large term and the small ones
        for cancel in (7, -1):  # in the same run, in the next one
            yield (0, 20, 1.0), (3, 20 - lost, 1.0), (cancel, 20, -1.0)
            yield (0, 20, 1.0), (3, 20 - lost, 1.75), (cancel, 20, -1.0)
            yield (0, 20, 1.0), (3, 20 - lost, -1.0), (cancel, 20, -1.0)
            yield (0, 20, 1.0), (1, 20 - lost, 1.0), (2, 20 - lost, 1.0), (cancel, 20, -1.0)  # two make one bit more
            yield (0, 20, 1.0), *((i, 20 - lost, 1.0) for i in (1, 2, 4, 5)), (cancel, 20, -1.0)
            yield (0, 20, 1.5), (1, 20, 1.5), (3, 20 - lost, 1.0), (5, 20, -1.5), (cancel, 20, -1.5)


_TERMS = tuple(_terms())
