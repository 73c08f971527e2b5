#!/usr/bin/env bash
# comfy-kitchen 0.2.26 and 0.2.40: the eager backend's apply_rope_split_half, on the same bf16 input, gives other bits in
# the two releases: 0.2.26 rounds both products and then their sum, 0.2.40 one product and then the sum with the other
# (addcmul). ComfyUI pins the package by version, so LTX-2's video for a seed changes with an update of ComfyUI alone, on
# every device that the eager backend serves.
# Expected: the same bits, as neither the function's documentation nor its signature changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 packaging==25.0 2>/dev/null
for version in 0.2.26 0.2.40; do
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$folder/$version" \
        "comfy-kitchen==$version" 2>/dev/null
done
cat > "$folder/turn.py" <<'PY'
import sys

import comfy_kitchen
import torch

drawn = torch.Generator().manual_seed(0)
q, k = (torch.randn(1, 64, 4, 32, generator=drawn).bfloat16() for _ in range(2))
angles = torch.arange(64 * 4 * 16).view(1, 64, 4, 16) * 0.37
cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
matrix = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
turned = torch.cat([t.flatten() for t in comfy_kitchen.apply_rope_split_half(q, k, matrix)])
first, second = (torch.cat([t.flatten(0, 2) for t in (q, k)]).chunk(2, dim=-1))
c, s = (torch.cat([t.flatten(0, 2)] * 2) for t in (cos, sin))
three_ops = torch.cat([c * first + (-s) * second, s * first + c * second], dim=-1).flatten()
addcmul = torch.cat([torch.addcmul(c * first, -s, second), torch.addcmul(c * second, s, first)], dim=-1).flatten()
print("three ops:", (turned == three_ops).sum().item(), "addcmul:", (turned == addcmul).sum().item(), "of", len(turned))
PY
found=$(for version in 0.2.26 0.2.40; do
    echo "$version, $(PYTHONPATH="$folder/$version" "$folder/venv/bin/python" -W ignore "$folder/turn.py")"
done)
echo "$found"
test "$found" = "0.2.26, three ops: 16384 addcmul: 12568 of 16384
0.2.40, three ops: 12568 addcmul: 16384 of 16384"
