"""The twin of a tensor: other memory with its strides and its alignment, on both of which kernels are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED = 256  # bytes: cuBLASLt picks a kernel by the alignment of its operands up to here, ATen up to 16


def flat(t: Tensor) -> Tensor:
    """All memory from a tensor's first element to its last, gaps included: as it is, whatever the strides."""
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.as_strided((extent,), (1,))


def stand_in(t: Tensor) -> tuple[Tensor, Tensor]:
    """A new tensor with the same strides and base alignment, not yet filled; and its memory, flat."""
    n, size = flat(t).numel(), t.element_size()
    memory = torch.empty(n + ALIGNED // size, dtype=t.dtype, device=t.device)
    memory = memory[(t.data_ptr() - memory.data_ptr()) % ALIGNED // size :][:n]
    return memory.as_strided(t.shape, t.stride()), memory


def copy(t: Tensor) -> Tensor:
    """A filled twin."""
    # Tensor by tensor: torch._foreach_copy_ may go through float32, which changes the payloads of NaNs.
    if t.is_contiguous() and t.data_ptr() % ALIGNED == 0:
        return t.clone()
    twin, memory = stand_in(t)
    memory.copy_(flat(t))
    return twin
