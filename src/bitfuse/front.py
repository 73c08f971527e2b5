"""What `import bitfuse` imports, torch with it: the operators are defined, and old names of modules are answered for.

It is apart from `bitfuse/__init__.py`, which has these names, so that the `bitfuse` command can do without it until it
knows that there is work.
"""

# ruff: noqa: F401  (what it imports is what it is for)

import bitfuse.ops  # defines the operators
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
