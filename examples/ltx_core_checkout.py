"""A checkout of Lightricks' ltx-core: its transformer with seeded weights, stock and accelerated, compared bit for bit.

    python examples/ltx_core_checkout.py LTX-2/packages/ltx-core/src
    python examples/ltx_core_checkout.py LTX-2/packages/ltx-core/src --layers 48    # on a GPU

First a step of each version of LTX-2 that the checkout has, then a whole denoising loop with ltx-core's own scheduler,
both latents compared after every step (`bitfuse demo`; its page is in --out). Without a GPU the kernels run in Triton's
interpreter, on a small transformer. Exit code 0: equal in every bit and something was fused; 1: not so; 2: can't run.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from bitfuse.core.kernel import interpreter
from bitfuse.tools.compare import conformance, demo, runs


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path, help="the folder that holds the package ltx_core")
    parser.add_argument("--layers", type=int, help="of the denoising loop; by default as many of the 48 as fit")
    parser.add_argument("--out", type=Path, default=Path("out/ltx-core"), help="where the loop's page is written")
    given = parser.parse_args()
    if not (given.checkout / "ltx_core").is_dir():
        parser.error(f"{given.checkout} does not hold the package ltx_core")
    sys.path.insert(0, str(given.checkout))  # before one that is installed

    device = runs.pick_device(None)
    outcomes = []
    try:
        with interpreter() if device.type == "cpu" else contextlib.nullcontext():
            for step in conformance.run("ltx-core", device):
                outcomes.append(step.outcome)
                sites = f"{step.sites_fused} of {step.sites_seen} sites fused"
                print(f"LTX-{step.version}, a step: {step.outcome}, {sites}{step.reason and f' ({step.reason})'}")
    except runs.CannotRun as why:
        parser.error(str(why))
    loop = demo.run(given.out, layers=given.layers, host="ltx-core")
    if loop.exit_code == 2:
        parser.error(loop.verdict)
    return 0 if "equal" in outcomes and "differs" not in outcomes and loop.exit_code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
