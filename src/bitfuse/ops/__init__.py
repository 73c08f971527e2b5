"""Exact operators, one chain family per file. Importing this package defines them all."""

from bitfuse.ops import gated_residual, head_gate, modulate, qk_norm, residual_rms_norm, rms_norm_modulate, rope

__all__ = ["gated_residual", "head_gate", "modulate", "qk_norm", "residual_rms_norm", "rms_norm_modulate", "rope"]
