"""What the command line accepts, by name, without what the names stand for: the modules that have that import torch.

So `bitfuse --help`, a shell's completion and a wrong call are answered in a fifth of a second, and not in the 3 to 7 s
that torch takes. The tools take from here what stands here. Hosts and operators are entered where they are defined;
`tests/test_cli.py` holds the two lists below against those, and says what to write here.
"""

from __future__ import annotations

import re
import sys

VERSIONS = ("2.0", "2.3", "2.5")
"""Of LTX-2."""
LAYERS = 48
"""Of an LTX-2 transformer."""
DTYPES = ("bfloat16", "float16", "float32")
"""Of weights that `bitfuse explain` looks at."""
MAX_TOKENS, MAX_LAYERS = 1 << 18, 512
"""Of a model that it looks at."""
PARTS = ("operators", "overhead", "model", "audit", "first-step", "run")
"""Of `bitfuse bench`, in the order in which they run."""
LATENTS = {1536: (4, 16, 24), 6144: (16, 16, 24), 24576: (16, 32, 48), 32640: (16, 34, 60)}
"""Latent frames, height and width by video tokens: 768x512x25, 768x512x121, 1536x1024x121, 1920x1088x121."""
FILMS = tuple(f"{run}.{suffix}" for run in ("stock", "bitfuse") for suffix in ("mp4", "webp", "png", "wav"))
"""Every film and sound that `bitfuse compare` may write."""
COMPARED = ("compare.json", "compare.html", *FILMS)
"""Every file that it may write."""

HOSTS = ("diffusers", "ltx-core", "sglang", "comfyui")
OPERATORS = (
    "gated_residual",
    "gated_residual_addcmul",
    "modulate",
    "layer_norm_modulate",
    "residual_rms_norm_modulate_native",
    "residual_rms_norm_modulate_composed",
    "residual_rms_norm_modulate_twice_native",
    "residual_rms_norm_modulate_twice_composed",
    "residual_rms_norm_modulate_weighted",
    "residual_addcmul_rms_norm_modulate_native",
    "rms_norm_modulate_native",
    "rms_norm_modulate_composed",
    "upsample",
    "unpatchify",
    "gelu_tanh",
    "qk_rms_norm_grid_rotary",
    "head_gate",
    "lerp_head_gate",
    "weighted_sum_head_gate",
    "pixel_norm_silu_pad",
    "residual_pixel_norm_silu_pad",
    "residual_pad",
    "split_rotary_per_op",
    "split_rotary_fp32",
    "interleaved_rotary_per_op",
    "interleaved_rotary_fp32",
    "split_rotary_three_ops",
    "split_rotary_second_rounded",
    "interleaved_rotary_addcmul",
    "qk_rms_norm",
    "qk_rms_norm_split_rotary_per_op",
    "qk_rms_norm_split_rotary_fp32",
    "qk_rms_norm_interleaved_rotary_per_op",
    "qk_rms_norm_interleaved_rotary_fp32",
    "qk_rms_norm_split_rotary_three_ops",
    "qk_rms_norm_split_rotary_second_rounded",
    "qk_rms_norm_interleaved_rotary_addcmul",
    "downsample",
    "swiglu",
)


def hosts() -> tuple[str, ...]:
    """Every host's name; in a process that has the registry, those that were registered there, too."""
    registry = sys.modules.get("bitfuse.hosts.registry")
    return HOSTS if registry is None else tuple(registry.HOSTS)


def operators() -> tuple[str, ...]:
    """Every operator's name; in a process that has defined them, those that it has."""
    front = sys.modules.get("bitfuse.front")
    return OPERATORS if front is None else tuple(front.OPERATORS)


def is_hub_id(given: str) -> bool:
    """Whether it has the form of one, owner/name: whether there is such a model only the Hub can say."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", given, re.ASCII) is not None


def version(given: str) -> str | None:
    """ "2.0" of "2.0" or "ltx-2.0", and so on; None where it is no version of LTX-2."""
    named = given.removeprefix("ltx-")
    return named if named in VERSIONS else None
