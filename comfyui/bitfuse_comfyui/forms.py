# SPDX-License-Identifier: GPL-3.0-or-later
"""The operators that may have the bits of ComfyUI's rotary embedding, for the comparison in the process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitfuse.core.operator import Operator
from bitfuse.hosts.ltx2 import Rotary
from bitfuse.ops.qk_norm import QK_INTERLEAVED_PER_OP, QK_SPLIT_PER_OP
from bitfuse.ops.rope import INTERLEAVED_PER_OP, SPLIT_PER_OP

from . import upstream


def _matrix(cos: Tensor, sin: Tensor) -> Tensor:
    """ComfyUI's from 0.30 on, as `freqs_cis_matrix` makes it, of tables [B, H, T, D / 2]."""
    cos, sin = cos.swapaxes(1, 2), sin.swapaxes(1, 2)
    return torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))


def _split(function: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pe = (_matrix(cos, sin), True) if upstream.BY_KITCHEN else (cos, sin, True)
    return function(x, pe)


def _first_of_two(function: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return function(x, x.clone(), (_matrix(cos, sin), True))[0]


def _second_of_two(function: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return function(x.clone(), x, (_matrix(cos, sin), True))[1]


def _interleaved(function: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return function(x, (cos, sin, False))


def _candidate(alone: Operator, qk: Operator) -> list[Rotary]:
    """One operator, and each way in which the host turns queries and keys that it has to equal."""
    home = upstream.model
    found = [Rotary(home, "apply_rotary_emb", alone, qk, _split)]
    if upstream.BY_KITCHEN:
        found += [Rotary(home, "apply_rotary_emb_qk", alone, qk, how) for how in (_first_of_two, _second_of_two)]
    return found


_SPLIT = [(SPLIT_PER_OP, QK_SPLIT_PER_OP)]

FORMS: dict[bool, list[list[Rotary]]] = {
    True: [_candidate(*form) for form in _SPLIT],
    False: []
    if upstream.BY_KITCHEN
    else [
        [
            Rotary(
                upstream.model, "apply_rotary_emb", INTERLEAVED_PER_OP, QK_INTERLEAVED_PER_OP, _interleaved, True
            )
        ]
    ],
}
"""By whether halves of a head are turned (else neighbours): each operator that may be equal, as `_candidate` has it."""
