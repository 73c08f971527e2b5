"""Exact operators, one chain family per file. Importing this package defines them all."""

from bitfuse.ops import (
    gated_residual,
    head_gate,
    interleaved_rotary,
    modulate,
    qk_norm,
    residual_rms_norm,
    rms_norm_modulate,
    split_rotary,
)

__all__ = [
    "gated_residual",
    "head_gate",
    "interleaved_rotary",
    "modulate",
    "qk_norm",
    "residual_rms_norm",
    "rms_norm_modulate",
    "split_rotary",
]
