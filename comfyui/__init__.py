# SPDX-License-Identifier: GPL-3.0-or-later
"""bitfuse for ComfyUI: this folder is what stands in ComfyUI/custom_nodes.

`bitfuse_comfyui` is imported by its own name, as bitfuse imports it: under another name it would be another module.
"""

import os
import sys

_folder = os.path.dirname(os.path.abspath(__file__))
if _folder not in sys.path:
    sys.path.append(_folder)

from bitfuse_comfyui.nodes import comfy_entrypoint  # noqa: E402

__all__ = ["comfy_entrypoint"]
