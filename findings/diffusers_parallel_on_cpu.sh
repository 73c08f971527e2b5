#!/usr/bin/env bash
# diffusers 0.42.1: enable_parallelism of a model divides by zero where there is no accelerator, as it takes the rank
# modulo torch.accelerator.device_count(): two processes on a CPU, over gloo, can't try context parallelism.
# Expected: the mesh on the CPU, or an error that says that an accelerator is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 2>/dev/null
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 2>/dev/null
cat > "$folder/parallel.py" <<'PY'
import sys

import diffusers
import torch
import torch.distributed as dist

SIZES = {name: 1 for name in ("num_attention_heads", "audio_num_attention_heads", "num_layers", "caption_channels")}
SIZES |= {name: 16 for name in ("attention_head_dim", "audio_attention_head_dim")}
SIZES |= {name: 16 for name in ("cross_attention_dim", "audio_cross_attention_dim")}


def work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = diffusers.LTX2VideoTransformer3DModel(**SIZES)
    try:
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
        found = "parallel"
    except ZeroDivisionError as error:
        found = f"ZeroDivisionError: {error}"
    if rank == 0:
        print(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
PY
found=$(GLOO_SOCKET_IFNAME=lo "$folder/venv/bin/python" -W ignore "$folder/parallel.py" "$folder/met" 2>/dev/null)
echo "$found"
test "$found" = "ZeroDivisionError: integer modulo by zero"
