#!/usr/bin/env bash
# Triton 3.7.1: in its interpreter (TRITON_INTERPRET=1) tl.dot of two bf16 blocks multiplies their bit patterns as
# integers: of a 16x16 block of ones with itself it gives 16 * 0x3F80 * 0x3F80 = 4228120576 everywhere, and not 16. The
# same blocks in fp16 and in fp32 give 16. No warning and no error: a kernel that is tried without a GPU looks wrong, or a
# wrong one right.
# Expected: 16, as on a GPU; or an error that says that bf16 is not interpreted.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 triton==3.7.1 2>/dev/null
cat > "$folder/dot.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def squared(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x))


for dtype in (torch.float32, torch.float16, torch.bfloat16):
    out = torch.zeros(16, 16)
    squared[(1,)](torch.ones(16, 16, dtype=dtype), out, N=16)
    print(dtype, out.unique().tolist())
PY
found=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/dot.py")
echo "$found"
test "$found" = "torch.float32 [16.0]
torch.float16 [16.0]
torch.bfloat16 [4228120576.0]"
