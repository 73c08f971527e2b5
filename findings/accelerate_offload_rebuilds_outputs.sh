#!/usr/bin/env bash
# accelerate 1.15.0 with diffusers 0.42.1: after accelerate.cpu_offload(model), a model that returns an output of
# diffusers with two fields can't be called: accelerate moves outputs back to the input's device, and rebuilds a mapping
# from one generator of pairs, where such an output is a dataclass that takes each field by name. LTX-2's transformer
# returns one (sample and audio_sample) unless it is called with return_dict=False, as its pipelines do.
# Expected: the output, moved. A pipeline's enable_sequential_cpu_offload() works, as it asks for a tuple.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 2>/dev/null
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check accelerate==1.15.0 diffusers==0.42.1 2>/dev/null
cat > "$folder/outputs.py" <<'PY'
from dataclasses import dataclass

import accelerate
import torch
from diffusers.utils import BaseOutput


@dataclass
class Both(BaseOutput):
    sample: torch.Tensor
    audio_sample: torch.Tensor


class Model(torch.nn.Module):
    def __init__(self, as_tuple):
        super().__init__()
        self.layer, self.as_tuple = torch.nn.Linear(4, 4), as_tuple

    def forward(self, x):
        y = self.layer(x)
        return (y, y) if self.as_tuple else Both(sample=y, audio_sample=y)


for as_tuple in (True, False):
    model = accelerate.cpu_offload(Model(as_tuple), "cpu")
    try:
        print(type(model(torch.ones(1, 4))).__name__)
    except TypeError as error:
        print("TypeError:", error)
PY
found=$("$folder/venv/bin/python" -W ignore "$folder/outputs.py")
echo "$found"
test "$found" = "tuple
TypeError: Both.__init__() missing 1 required positional argument: 'audio_sample'"
