"""Exact operators, one chain family per file. Importing this package defines them all."""

from bitfuse.ops import (
    adaln,
    head_gate,
    interleaved_rotary,
    qk_norm,
    split_rotary,
)

__all__ = [
    "adaln",
    "head_gate",
    "interleaved_rotary",
    "qk_norm",
    "split_rotary",
]
