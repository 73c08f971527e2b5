"""Errors that a test plants in one place and looks for in another: of a wrong kernel, in the latents after its step.

A small error may be rounded away by the next matmul or residual sum, on one CPU's BLAS and not on another's: the test
then finds nothing, and lays that to the code under test. So an error that is looked for downstream is planted with
`Plant`, which makes it large and is asked whether it arrived. One bit is enough where a test compares the very tensor
that it changed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one form have the same bytes, told without any code of bitfuse."""
    as_bytes = [t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*as_bytes)


class Plant:
    """Makes results wrong in place, so that it shows in whatever is computed from them.

    places    how many results were made wrong
    """

    def __init__(self) -> None:
        self.places = 0

    def __call__(self, out: Tensor | tuple[Tensor, ...], start: int = 0) -> None:
        """Move every element x of the first of these results, from flat index `start` on, by 3 |x| + 1 across zero."""
        first = out if isinstance(out, Tensor) else out[0]
        elements = first.view(-1)[start:]  # a view, or an error: a copy would leave the result right
        elements.copy_(torch.where(elements < 0, 1 - 2 * elements, -1 - 2 * elements))
        self.places += 1

    def must_show(self, right: Iterable[Tensor], found: Iterable[Tensor]) -> None:
        """Fail, as a fault of the test, where the error was planted nowhere or did not reach what is looked at.

        right    what the test looks at, of the run without the error
        found    the same of the run with it
        """
        assert self.places, "this test planted its error nowhere: the call that it waits for was not made"
        pairs = list(zip(right, found, strict=True))
        assert pairs, "this test looks at nothing"
        assert not all(same_bits(a, b) for a, b in pairs), (
            "the error that this test planted does not reach where the test looks, so nothing could find it: "
            "plant another, or look where it is planted"
        )
