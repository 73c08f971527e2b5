#!/usr/bin/env bash
# torch 2.13.0: on a CPU a Python number that is added to (or subtracted from) a bf16 tensor is rounded to bf16 first,
# where the same number in a product is not. So `mean + 1e-6` of an RMSNorm in bf16 adds 9.98e-07, and 429 of 2000 sums
# are not those that fp32 gives when it is rounded once. All 2000 products are.
# Whoever compares a kernel with the PyTorch chain on a CPU has to round the epsilon as well.
# Expected: one of the two for both ops, as the number's type says nothing about it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 2>/dev/null
cat > "$folder/add.py" <<'PY'
import torch

mean, eps = (torch.arange(1, 2001) * 1e-9).bfloat16(), 1e-6
wide = mean.float()
rounded = torch.tensor(eps).bfloat16().float()

print("added, as fp32 rounded once:", (mean + eps == (wide + eps).bfloat16()).sum().item(), "of", len(mean))
print("added, as with the number rounded before:", (mean + eps == (wide + rounded).bfloat16()).sum().item())
print("subtracted, as with the number rounded before:", (mean - eps == (wide - rounded).bfloat16()).sum().item())
print("multiplied, as fp32 rounded once:", (mean * eps == (wide * eps).bfloat16()).sum().item())
print("multiplied, as with the number rounded before:", (mean * eps == (wide * rounded).bfloat16()).sum().item())
PY
found=$("$folder/venv/bin/python" "$folder/add.py")
echo "$found"
test "$found" = "added, as fp32 rounded once: 1571 of 2000
added, as with the number rounded before: 2000
subtracted, as with the number rounded before: 2000
multiplied, as fp32 rounded once: 2000
multiplied, as with the number rounded before: 1333"
