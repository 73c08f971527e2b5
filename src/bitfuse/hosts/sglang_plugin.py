"""SGLang's plug-in (entry point `sglang.multimodal_gen.plugins`, SGLang 0.5.21 or newer): bitfuse in its workers.

SGLang runs models in worker processes, each of which loads its plug-ins before it imports a model. So nothing of SGLang
is imported here; a hook is registered that accelerates each LTX-2 transformer at its first forward, when its weights
are where they will be. Inactive unless asked for, by `BITFUSE_SGLANG=1` or by name in SGLang's own list,
`SGLANG_PLUGINS=bitfuse`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

TARGET = "sglang.multimodal_gen.runtime.models.dits.ltx_2.LTX2VideoTransformer3DModel.forward"

_seen: weakref.WeakSet[Any] = weakref.WeakSet()


def wanted() -> bool:
    """Whether the user asked for it. ValueError where BITFUSE_SGLANG is neither 0 nor 1."""
    value = os.environ.get("BITFUSE_SGLANG")
    if value is None:
        return "bitfuse" in (name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(","))
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable BITFUSE_SGLANG is {value!r}; accepted: 0 (off) or 1 (on)")
    return value == "1"


def register() -> None:
    """What SGLang calls in each process: register the hook, where it is asked for."""
    if wanted():
        from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

        HookRegistry.register(TARGET, forward, HookType.AROUND)


def forward(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the transformer's forward: accelerate it before its first one."""
    if model not in _seen:
        _seen.add(model)  # once: whoever restores it meanwhile wants it stock
        import bitfuse

        bitfuse.accelerate(model)
    return original(model, *args, **kwargs)
