#!/usr/bin/env bash
# Triton 3.7.1: in its interpreter (TRITON_INTERPRET=1) a conversion of fp32 cuts its low bits off where a GPU rounds to
# nearest even. Of 4096 normal numbers 2049 become the bf16 that `Tensor.to` gives, and all 4096 the one that cutting
# gives. To fp8 (e4m3) what is too large becomes some other number: 1000 becomes 256, 1e30 becomes 416, infinity 256,
# where torch and `cvt.rn.satfinite` give the largest, 448. No warning: a kernel that rounds right on a GPU looks wrong
# when it is tried without one, and a quantisation that overflows looks like one that does not.
# Expected: rounding to nearest even, and 448 (or NaN) for what is larger.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 triton==3.7.1 2>/dev/null
cat > "$folder/casts.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def convert(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


def converted(x, dtype):
    out = torch.empty(x.shape, dtype=dtype)
    convert[(1,)](x, out, len(x))
    return out


x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
found, cut = converted(x, torch.bfloat16), (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
print("bf16, as rounded to nearest even:", (found == x.bfloat16()).sum().item(), "of", len(x))
print("bf16, as cut off:", (found == cut).sum().item(), "of", len(x))
large = torch.tensor([448.0, 1000.0, 1e30, float("inf")])
print("e4m3 of", large.tolist(), "is", converted(large, torch.float8_e4m3fn).float().tolist())
print("torch's is", large.to(torch.float8_e4m3fn).float().tolist())
PY
found=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/casts.py")
echo "$found"
expected="bf16, as rounded to nearest even: 2049 of 4096
bf16, as cut off: 4096 of 4096
e4m3 of [448.0, 1000.0, 1.0000000150474662e+30, inf] is [448.0, 256.0, 416.0, 256.0]
torch's is [448.0, 448.0, 448.0, 448.0]"
[ "$found" = "$expected" ] || { echo "another behaviour than the one that was seen"; exit 1; }
