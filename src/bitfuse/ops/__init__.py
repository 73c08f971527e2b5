"""Exact operators, one layout or chain family per file. Importing this package defines them all."""

from bitfuse.ops import interleaved_rotary, split_rotary

__all__ = ["interleaved_rotary", "split_rotary"]
