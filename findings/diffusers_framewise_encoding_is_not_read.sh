#!/usr/bin/env bash
# diffusers 0.42.1: LTX-2's video autoencoder (AutoencoderKLLTX2Video) has use_framewise_encoding and
# use_framewise_decoding, and never reads the first. With it alone a tiled encode of 33 frames is one call of the encoder
# on all of them, as without it; with use_framewise_decoding the encode is cut, into 17, 17, 17, 9 and 1 frames. Who turns
# on what is named after encoding, to save memory at it, saves none, and who turns on the other for the decode has other
# latents from the encode.
# Expected: each flag for what it is named after.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.3.5 2>/dev/null
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 2>/dev/null
cat > "$folder/framewise.py" <<'PY'
import torch
from diffusers import AutoencoderKLLTX2Video

SMALL = {
    "block_out_channels": (16, 16, 16, 16),
    "decoder_block_out_channels": (16, 16, 16),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "latent_channels": 16,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
vae = AutoencoderKLLTX2Video(**SMALL).eval()
assert (vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames) == (16, 8), "as they come"
frames, forward = [], vae.encoder.forward


def noted(x, *args, **kwargs):
    frames.append(x.shape[2])
    return forward(x, *args, **kwargs)


vae.encoder.forward = noted
for flags in ({}, {"use_framewise_encoding": True}, {"use_framewise_decoding": True}):
    vae.use_framewise_encoding = flags.get("use_framewise_encoding", False)
    vae.use_framewise_decoding = flags.get("use_framewise_decoding", False)
    frames.clear()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 33, 64, 64)).latent_dist.mode()
    print(", ".join(flags) or "neither", "->", frames, "frames a call,", list(latents.shape))
PY
found=$("$folder/venv/bin/python" -W ignore "$folder/framewise.py" 2>/dev/null)
echo "$found"
expected="neither -> [33] frames a call, [1, 16, 5, 2, 2]
use_framewise_encoding -> [33] frames a call, [1, 16, 5, 2, 2]
use_framewise_decoding -> [17, 17, 17, 9, 1] frames a call, [1, 16, 5, 2, 2]"
[ "$found" = "$expected" ] || { echo "another behaviour than the one that was seen"; exit 1; }
