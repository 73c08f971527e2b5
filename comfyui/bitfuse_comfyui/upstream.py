# SPDX-License-Identifier: GPL-3.0-or-later
"""ComfyUI's modules that the pack needs, found and imported, and the sources of theirs that were read.

Inside ComfyUI they are there already. Outside of it (`bitfuse verify --host comfyui`, tests) ComfyUI is the folder in
which the pack's own folder stands (`ComfyUI/custom_nodes/bitfuse`), or one on PYTHONPATH. Without a GPU ComfyUI has to
be told so before its first module is imported, or that import raises.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

INSTALL = "run it with PYTHONPATH=/path/to/ComfyUI, or put the pack into ComfyUI/custom_nodes"


def _find() -> None:
    """Make `comfy` importable where it is not. ImportError, with the cure, where there is none."""
    if "comfy" in sys.modules or importlib.util.find_spec("comfy") is not None:
        return
    around = Path(__file__).resolve().parents[3]
    if not (around / "comfy" / "ldm" / "lightricks").is_dir():
        raise ImportError(f"ComfyUI is not installed here; {INSTALL}")
    sys.path.append(str(around))


def _load(name: str) -> Any:
    return importlib.import_module(name)


_find()
if "comfy.model_management" not in sys.modules and not torch.cuda.is_available():
    _load("comfy.cli_args").args.cpu = True

av_model = _load("comfy.ldm.lightricks.av_model")
model = _load("comfy.ldm.lightricks.model")
attention = _load("comfy.ldm.modules.attention")
common_dit = _load("comfy.ldm.common_dit")
model_management = _load("comfy.model_management")
ops = _load("comfy.ops")
quant_ops = _load("comfy.quant_ops")
kitchen: Any = getattr(quant_ops, "ck", None)
"""comfy-kitchen; None where it is not installed."""

BY_KITCHEN = hasattr(model, "freqs_cis_matrix")
"""Whether rotary embedding is comfy-kitchen's, on tables that are matrices [B, T, H, D / 2, 2, 2]: from 0.30 on."""


def _version() -> str:
    try:
        return str(_load("comfyui_version").__version__)
    except ImportError:
        return "of an unknown version"


VERSION = _version()
NAME = f"ComfyUI {VERSION}"

_NEEDED = {
    "av_model": ("BasicAVTransformerBlock", "CompressedTimestep", "LTXAVModel"),
    "model": ("CrossAttention", "GELU_approx", "GuideAttentionMask", "apply_rotary_emb"),
    "attention": ("optimized_attention",),
    "common_dit": ("rms_norm",),
    "ops": ("CastWeightBiasOp", "cast_bias_weight", "disable_weight_init", "uncast_bias_weight"),
}
for _home, _names in _NEEDED.items():
    for _one in _names:
        if not hasattr(globals()[_home], _one):
            raise ImportError(f"{NAME} has no {_one}: its LTX-2 is none that this pack knows")

# Sources that were read in 0.24.1 to 0.30.0 and are restated here or in the operators' references (`source_hash`).
READ: dict[str, set[str]] = {
    "BasicAVTransformerBlock.forward": {"efa44766455f47b9"},
    "BasicAVTransformerBlock.get_ada_values": {"8d377d48ce2c56d6"},
    "BasicAVTransformerBlock._apply_text_cross_attention": {"d60231263d22d49b"},
    "CompressedTimestep.expand": {"ca22e48c344b09ce"},
    "CompressedTimestep.expand_for_computation": {"091a6c11bb2270e4"},
    "apply_cross_attention_adaln": {"b2d11ccb3bb819d6"},
    "CrossAttention.forward": {"b9a6507eba3178e9", "d656f42a0db8094e"},  # up to 0.27.0; 0.30.0
    "GELU_approx.forward": {"58c8b6e3c04cfe4a"},
    "LTXAVModel._process_transformer_blocks": {"a77f741f773eee3b"},
    "LTXAVModel._prepare_positional_embeddings": {"8ebf553f33ddcf5b"},
    "LTXBaseModel._prepare_positional_embeddings": {"442c2cb275ed07e4"},
    "LTXBaseModel._precompute_freqs_cis": {"3d0127896e36826a", "8e9053f37ba5ab4e"},  # up to 0.27.0; 0.30.0
    "LTXBaseModel._forward": {"6f4f1b1d2b52bdad"},
    "freqs_cis_matrix": {"79f2b506b052bb14"},  # 0.30.0
    "apply_rotary_emb": {"2e95859565fe8763", "1ab2d76206349359"},  # up to 0.27.0; 0.30.0
    "apply_rotary_emb_qk": {"6538cdf3304f065c"},  # 0.30.0
    "disable_weight_init.RMSNorm.forward": {"cf814e4ed8337c10"},
    "disable_weight_init.RMSNorm.forward_comfy_cast_weights": {"ce076095bd69bd6e"},
}
