"""Exact operators, one chain family per file. Importing this package defines them all."""

from bitfuse.ops import adaln, head_gate, perturbed_attention, pixel_norm, qk_norm, rope

__all__ = ["adaln", "head_gate", "perturbed_attention", "pixel_norm", "qk_norm", "rope"]
