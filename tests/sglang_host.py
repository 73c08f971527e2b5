"""SGLang's real LTX-2 transformer on a machine without a GPU: what its import and its model need around them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import runpy
import sys
import warnings
from unittest.mock import patch

import pytest
import torch

from stubs import Absent, Stub

NEEDS = "pip install --no-deps -r tests/sglang.txt"
LTX_2 = "sglang.multimodal_gen.runtime.models.dits.ltx_2"


@functools.cache
def upstream():
    """SGLang's module of the LTX-2 transformer; skips where SGLang, or something that it needs, is not installed."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip(f"SGLang is not installed; {NEEDS}")
    stubs = []
    if importlib.util.find_spec("torchvision") is None:
        # transformers looks for torchvision once, here, and so does not find the stub
        transformers = pytest.importorskip("transformers.image_utils", reason=f"SGLang needs transformers; {NEEDS}")
        assert not transformers.is_torchvision_available()
        stubs.append(Stub("torchvision"))  # of its configurations of image models
    without_kernels = torch.cuda.is_available() and importlib.util.find_spec("sgl_kernel") is None
    if without_kernels:
        stubs.append(Stub("sgl_kernel"))  # its compiled kernels, which the imports of other models ask for
    sys.meta_path[:0] = stubs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about CUDA, which is not there
            module = importlib.import_module(LTX_2)
            if without_kernels:
                _attend_with_pytorch()
            return module
    except ModuleNotFoundError as missing:
        pytest.skip(f"SGLang's LTX-2 does not import here: {missing}; {NEEDS}")
    finally:
        for stub in stubs:
            sys.meta_path.remove(stub)
        for name in [name for name, module in sys.modules.items() if isinstance(module, Absent)]:
            if name != "sgl_kernel":  # asked for again at run time
                del sys.modules[name]


def _attend_with_pytorch():
    """By SGLang's own switch: its FlashAttention is among the kernels that are not there. LTX-2's own is PyTorch's."""
    from sglang.multimodal_gen.runtime.layers.attention.selector import global_force_attn_backend
    from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum

    global_force_attn_backend(AttentionBackendEnum.TORCH_SDPA)


def alone():
    """SGLang's module of the LTX-2 transformer, its distributed environment set up for one rank."""
    module = upstream()
    from sglang.multimodal_gen.runtime.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        one = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        with patch.dict(os.environ, one):
            parallel_state.maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=1)
    return module


def ready():
    """SGLang set up as bitfuse's own commands set it up, with nothing of it replaced; skips where that can't be."""
    upstream()
    from bitfuse.tools import seeded
    from bitfuse.tools.seeded import sglang as seeded_sglang

    try:
        seeded_sglang.need(torch.device("cpu"))
    except seeded.CannotRun as why:
        pytest.skip(f"{why} {NEEDS}")


@contextlib.contextmanager
def running():
    """What SGLang's own unit tests put around a model: one rank, PyTorch's attention, a forward context."""
    alone()
    from sglang.multimodal_gen.runtime.layers.attention import layer
    from sglang.multimodal_gen.runtime.layers.attention.backends.sdpa import SDPABackend
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

    choices = {
        "get_attn_backend": SDPABackend,
        "get_compute_dtype": torch.bfloat16,
        "_resolve_sp_attention_mode": ("ulysses", False),
        "_maybe_install_backend_autotune": None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in choices.items():
            if hasattr(layer, name):  # some are of later versions
                stack.enter_context(patch.object(layer, name, return_value=value))
        stack.enter_context(set_forward_context(0, None))
        yield


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
    "out_channels": 16,
    "audio_in_channels": 16,
    "audio_out_channels": 16,
}


V23 = {"apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True}


def make(dtype=torch.bfloat16, seed=0, **arch):
    """A two-layer model; `arch` changes its configuration. Only inside `running()`."""
    from sglang.multimodal_gen.configs.models.dits.ltx_2 import LTX2ArchConfig, LTX2Config, LTX2RopeType

    torch.manual_seed(seed)
    arch["rope_type"] = LTX2RopeType(arch.get("rope_type", "split"))
    config = LTX2Config(arch_config=LTX2ArchConfig(**TINY, **arch))
    model = upstream().LTX2VideoTransformer3DModel(config, hf_config={}).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def built(**arch):
    with running():
        return make(**arch)


def feed(model, batch=2, **extra):
    """The arguments of a pass over 2 x 3 x 4 video tokens and 7 audio tokens; None in `extra` leaves one out."""
    generator = torch.Generator().manual_seed(7)
    dtype = next(model.parameters()).dtype

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    fed = {
        "hidden_states": randn(batch, 24, 16),
        "audio_hidden_states": randn(batch, 7, 16),
        "encoder_hidden_states": randn(batch, 9, 48 if model.caption_projection else 256),
        "audio_encoder_hidden_states": randn(batch, 9, 48 if model.caption_projection else 128),
        "timestep": torch.tensor([500.0, 250.0][:batch]),
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "audio_num_frames": 7,
        "return_latents": False,
        **extra,
    }
    return {name: value for name, value in fed.items() if value is not None}


# python tests/sglang_host.py SCRIPT ..., or -m MODULE ...: run that where SGLang's import needs the stubs
if __name__ == "__main__":
    del sys.argv[0]
    upstream()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
