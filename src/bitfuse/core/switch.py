"""The environment variable BITFUSE, 0 (off) or 1 (on), as bitfuse's import found it. Needs no torch."""

import os

VALUE = os.environ.get("BITFUSE", "1")
ERROR: str | None = None
"""What is wrong with it; `import bitfuse` raises it as ValueError."""
if VALUE not in ("0", "1"):
    ERROR = f"the environment variable BITFUSE is {VALUE!r}; accepted: 0 (off) or 1 (on, the default)"
