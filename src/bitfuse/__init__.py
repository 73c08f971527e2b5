"""bitfuse: LTX-2 blocks, faster, with output that is bit for bit the output of the host's own eager code.

handle = bitfuse.accelerate(pipe)  # a diffusers LTX-2 pipeline or transformer; in place
print(handle.report())  # what was fused, what was not and why
handle.restore()  # and `with bitfuse.accelerated(pipe): ...`
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from bitfuse.core.conditions import switch_error

if switch_error is not None:  # said once, in a line of its own where bitfuse was called as a command
    run_as_module = sys.argv[:1] == ["-m"] and any(word.split(".")[0] == "bitfuse" for word in sys.orig_argv)
    if run_as_module or os.path.basename(sys.argv[0]) == "bitfuse":
        print(f"bitfuse: {switch_error}", file=sys.stderr)
        raise SystemExit(2)
    raise ValueError(switch_error)

import bitfuse.ops  # noqa: F401  (defines the operators)
from bitfuse import moved
from bitfuse.core.bits import Mismatch, compare
from bitfuse.core.conditions import ShapeError
from bitfuse.core.operator import OPERATORS, Operator, disable, enable, explain
from bitfuse.hosts import accelerate, accelerated
from bitfuse.hosts.handle import Handle
from bitfuse.hosts.report import Report
from bitfuse.hosts.site import NotFused
from bitfuse.ops.rope import _ltx2_split_rotary_kernel, apply_ltx2_split_rotary_emb, apply_split_rotary_emb
from bitfuse.run.audit import BitfuseWarning

moved.install()

__version__ = "0.1.0"

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

# Tools: they are loaded when they are asked for
if TYPE_CHECKING:
    from bitfuse.tools.compare.trace import Divergence, trace

_TOOLS = {"Divergence": "bitfuse.tools.compare.trace", "trace": "bitfuse.tools.compare.trace"}


def __getattr__(name: str) -> Any:
    if name in _TOOLS:
        return getattr(importlib.import_module(_TOOLS[name]), name)
    return moved.attribute("bitfuse", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TOOLS})
