"""Exact operators, one chain family per file. Importing this package defines them all."""

from bitfuse.ops import (
    adaln,
    depth_to_space,
    gelu,
    grid_rotary,
    head_gate,
    perturbed_attention,
    pixel_norm,
    qk_norm,
    rope,
    space_to_depth,
    swiglu,
)

__all__ = [
    "adaln",
    "depth_to_space",
    "gelu",
    "grid_rotary",
    "head_gate",
    "perturbed_attention",
    "pixel_norm",
    "qk_norm",
    "rope",
    "space_to_depth",
    "swiglu",
]
