# SPDX-License-Identifier: GPL-3.0-or-later
"""The operators that may have the bits of ComfyUI's rotary embedding, for the comparison in the process."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.bits import compare
from bitfuse.core.operator import Operator
from bitfuse.hosts.ltx2 import Rotary
from bitfuse.ops.qk_norm import (
    QK_INTERLEAVED_ADDCMUL,
    QK_INTERLEAVED_PER_OP,
    QK_SPLIT_PER_OP,
    QK_SPLIT_SECOND_ROUNDED,
    QK_SPLIT_THREE_OPS,
)
from bitfuse.ops.rope import (
    INTERLEAVED_ADDCMUL,
    INTERLEAVED_PER_OP,
    SPLIT_PER_OP,
    SPLIT_SECOND_ROUNDED,
    SPLIT_THREE_OPS,
)

from . import upstream

Tables = tuple[Tensor, Tensor]


def tables_of(matrix: Tensor, split: bool) -> Tables:
    """cos and sin, as operators take them, of ComfyUI's matrix (c, -s; s, c) [B, T, H, D / 2, 2, 2] for each pair."""
    cos, sin = (matrix[..., row, 0] for row in (0, 1))
    if split:
        return cos.contiguous().swapaxes(1, 2), sin.contiguous().swapaxes(1, 2)
    return cos.repeat_interleave(2, dim=-1).flatten(2), sin.repeat_interleave(2, dim=-1).flatten(2)


def _matrix(cos: Tensor, sin: Tensor, heads: int | None) -> Tensor:
    """The matrix of tables, as `freqs_cis_matrix` makes it. `heads`: of interleaved ones."""
    if heads is None:
        cos, sin = cos.swapaxes(1, 2), sin.swapaxes(1, 2)
    else:
        cos, sin = (t.unflatten(2, (heads, -1))[..., ::2] for t in (cos, sin))
    return torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))


class Turned:
    """The host's function on one x: alone, or as the first or the second of two, as queries and keys are.

    place    of x among two; None: alone
    """

    HEAD = 32  # channels of a head: an interleaved embedding is the same for any number of them

    def __init__(self, split: bool, place: int | None):
        self._split, self._place = split, place

    def __call__(self, function: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not upstream.BY_KITCHEN:
            return function(x, (cos, sin, self._split))
        pe = _matrix(cos, sin, None if self._split else x.shape[-1] // self.HEAD), self._split
        if self._place is None:
            return function(x, pe)
        return function(*((x, x.clone()) if self._place == 0 else (x.clone(), x)), pe)[self._place]


class Pairs(Rotary):
    """One of comfy-kitchen's interleaved forms: both channels of a pair have one entry in its matrix, so the tables of
    an operator, which have one for each channel, are compared where the two are equal."""

    __slots__ = ()

    def difference(self, host: str, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
        found = _difference_of_pairs(getattr(self.home, self.name), self.apply, self.alone, heads, dtype, device)
        return None if found is None else f"{self.name} of {host} and bitfuse's reference part here: {found}"


@functools.cache
def _difference_of_pairs(
    function: Any, apply: Any, rotate: Operator, heads: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    like = torch.empty(2, 5, heads * Turned.HEAD, dtype=dtype, device=device)
    with torch.no_grad():
        for family, (x, *tables) in rotate.battery(like, torch.empty_like(like), torch.empty_like(like)):
            given = (x, *(t[..., ::2].repeat_interleave(2, dim=-1) for t in tables))
            if mismatch := compare(apply(function, *given), rotate.reference(*given)):
                return f"{mismatch.sentence}, on the battery's '{family}' inputs"
    return None


def _candidate(split: bool, alone: Operator, qk: Operator) -> list[Rotary]:
    """One operator, and each way in which the host turns queries and keys that it has to equal."""
    home, kind = upstream.model, Pairs if upstream.BY_KITCHEN and not split else Rotary
    found = [kind(home, "apply_rotary_emb", alone, qk, Turned(split, None), not split)]
    if upstream.BY_KITCHEN:
        found += [kind(home, "apply_rotary_emb_qk", alone, qk, Turned(split, i), not split) for i in (0, 1)]
    return found


_KNOWN = {
    True: [
        (SPLIT_PER_OP, QK_SPLIT_PER_OP),
        (SPLIT_THREE_OPS, QK_SPLIT_THREE_OPS),
        (SPLIT_SECOND_ROUNDED, QK_SPLIT_SECOND_ROUNDED),
    ],
    False: [
        (INTERLEAVED_PER_OP, QK_INTERLEAVED_PER_OP),
        (INTERLEAVED_ADDCMUL, QK_INTERLEAVED_ADDCMUL),
    ],
}

FORMS = {split: [_candidate(split, *form) for form in forms] for split, forms in _KNOWN.items()}
"""By whether halves of a head are turned (else neighbours): each operator that may be equal, as `_candidate` has it."""
