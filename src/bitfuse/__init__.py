"""bitfuse: LTX-2 blocks, faster, with output that is bit for bit the output of the host's own eager code.

handle = bitfuse.accelerate(pipe)  # a diffusers LTX-2 pipeline or transformer; in place
print(handle.report())  # what was fused, what was not and why
handle.restore()  # and `with bitfuse.accelerated(pipe): ...`
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from bitfuse import moved
from bitfuse.core.switch import ERROR

__version__ = "0.2.0"

__all__ = [
    "OPERATORS",
    "BitfuseWarning",
    "Divergence",
    "Handle",
    "Mismatch",
    "NotFused",
    "Operator",
    "Report",
    "ShapeError",
    "_ltx2_split_rotary_kernel",
    "accelerate",
    "accelerated",
    "apply_ltx2_split_rotary_emb",
    "apply_split_rotary_emb",
    "compare",
    "disable",
    "enable",
    "explain",
    "trace",
]


def _program() -> str:
    """What this process was started to run: a script by its file's name, or NAME of `python -m NAME`; else ""."""
    given = sys.orig_argv[-len(sys.argv) :][:1]  # what stands before the arguments
    runs = sys.argv[:1] in (given, ["-m"])  # "-m" stands there while Python looks for NAME
    return os.path.basename("".join(given)).removeprefix("-m") if runs else ""


if ERROR is not None:  # said once, in a line of its own where bitfuse was called as a command
    if _program().split(".")[0] == "bitfuse":
        print(f"bitfuse: {ERROR}", file=sys.stderr)
        raise SystemExit(2)
    raise ValueError(ERROR)

# The `bitfuse` command answers most calls without torch, which takes 3 to 7 s to import; with work to do it imports
# `bitfuse.front` itself. Everybody else gets all of bitfuse here: the operators, say, as torch.ops.bitfuse.
if TYPE_CHECKING or _program() != "bitfuse":
    from bitfuse.front import (
        OPERATORS,
        BitfuseWarning,
        Handle,
        Mismatch,
        NotFused,
        Operator,
        Report,
        ShapeError,
        _ltx2_split_rotary_kernel,
        accelerate,
        accelerated,
        apply_ltx2_split_rotary_emb,
        apply_split_rotary_emb,
        compare,
        disable,
        enable,
        explain,
    )

# Tools: they are loaded when they are asked for
if TYPE_CHECKING:
    from bitfuse.tools.compare.trace import Divergence, trace

_TOOLS = {"Divergence": "bitfuse.tools.compare.trace", "trace": "bitfuse.tools.compare.trace"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_TOOLS.get(name, "bitfuse.front")), name)
    return moved.attribute("bitfuse", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
