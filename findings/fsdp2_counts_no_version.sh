#!/usr/bin/env bash
# torch 2.13.0: FSDP2 (fully_shard) gathers a weight into the same Parameter and the same storage before every forward,
# and counts no version for that: after the divided weights were written to, the gathered one has other values under the
# same `_version`. Its code keeps the counter on purpose (`_unsafe_preserve_version_counter`), so that autograd takes a
# weight that was gathered again for the backward pass. Whoever keeps what was computed of a weight by (tensor, version)
# sees no change, and neither the weight nor its module tells that it is such a one.
# Expected by such code: a version that grows where the values changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 2>/dev/null
cat > "$folder/gathered.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    seen = []

    def look(layer, args):
        weight = layer.weight
        seen.append((weight, weight.untyped_storage()._cdata, weight._version, weight.detach().clone()))

    model[0].register_forward_pre_hook(look)
    with torch.no_grad():
        model(torch.ones(1, 4))
        model.reshard()
        for weight in model.parameters():
            weight.mul_(2)
        model(torch.ones(1, 4))
    before, after = seen
    if rank == 0:
        print("the same Parameter:", before[0] is after[0])
        print("the same storage:", before[1] == after[1])
        print("versions:", before[2], after[2])
        print("twice the values:", torch.equal(2 * before[3], after[3]))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
PY
found=$(GLOO_SOCKET_IFNAME=lo "$folder/venv/bin/python" -W ignore "$folder/gathered.py" "$folder/met")
echo "$found"
test "$found" = "the same Parameter: True
the same storage: True
versions: 0 0
twice the values: True"
