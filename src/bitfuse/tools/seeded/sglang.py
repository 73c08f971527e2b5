"""What is SGLang's own in a seeded run: its LTX-2 transformer, called as SGLang's denoising stage calls it.

bf16 autocast, the attention that SGLang picks, and the prompt's keys and values projected once where it does so
(LTX-2.0). Nothing of SGLang is replaced. The tier is "exact", as a transformer is built; `mount` goes to "high".
The text's mask, which is all ones, is left out, as SGLang does from "lossless" on: it only costs time. Where torchrun
started the process, its ranks are SGLang's for sequence parallelism, and `part_of_rank` divides a clip among them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bitfuse.hosts.registry import HOSTS
from bitfuse.tools import packages
from bitfuse.tools.packages import CannotRun
from bitfuse.tools.seeded import FPS, Geometry, Schedule
from bitfuse.tools.seeded.diffusers import flow_match, text_and_coordinates

LATENTS = torch.float32  # bf16 into the transformer, fp32 between steps
FIRST = 1000.0
_INSTALL = HOSTS["sglang"].install


def ranks() -> int:
    """Processes that torchrun started for one run; 1 without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 1
    given = os.environ.get("WORLD_SIZE", "")
    if not re.fullmatch("[0-9]{1,6}", given):
        raise ValueError(
            f"the environment variable WORLD_SIZE is {given!r:.40}; accepted: a number, as torchrun sets it"
        )
    return int(given)


def need(device: torch.device) -> None:
    packages.need("sglang", "--host sglang", name="SGLang", install=_INSTALL)
    with packages.importing("--host sglang: SGLang's LTX-2 does not import here", _INSTALL):
        _set_up()
        from sglang.multimodal_gen.runtime.platforms import current_platform
    if device.type not in (current_platform.device_type, "meta"):
        takes = f"SGLang takes this machine for one of device {current_platform.device_type}"
        raise CannotRun(f"--host sglang: {takes}, so its transformer can't run on {device.type}.")


@functools.cache
def _set_up() -> None:
    """What `sglang serve` sets up before it builds a model: its arguments, and a group of its ranks. Once for good."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a GPU that is not there, and deprecations of others
        from sglang.multimodal_gen.configs.pipeline_configs import LTX2PipelineConfig
        from sglang.multimodal_gen.runtime import server_args
        from sglang.multimodal_gen.runtime.distributed import parallel_state
        from sglang.multimodal_gen.runtime.models.dits import ltx_2  # noqa: F401

        try:
            server_args.get_global_server_args()
        except ValueError:  # not set yet
            root = logging.getLogger()
            handlers, level = root.handlers[:], root.level
            try:
                arguments = server_args.ServerArgs(
                    model_path="",
                    pipeline_config=LTX2PipelineConfig(),
                    num_gpus=ranks(),
                    sp_degree=ranks(),
                    ulysses_degree=ranks(),
                )
            finally:  # it takes the process's logging over, which a server may and we may not
                root.handlers[:] = handlers
                root.setLevel(level)
            server_args.set_global_server_args(arguments)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.maybe_init_distributed_environment_and_model_parallel(
                tp_size=1,
                sp_size=ranks(),
                ulysses_degree=ranks(),
                distributed_init_method="env://" if ranks() > 1 else "tcp://127.0.0.1:0",
            )


def on_meta(geometry: Geometry) -> Any:
    _set_up()
    from sglang.multimodal_gen.configs.models.dits.ltx_2 import LTX2ArchConfig, LTX2Config, LTX2RopeType
    from sglang.multimodal_gen.runtime.models.dits.ltx_2 import LTX2VideoTransformer3DModel
    from sglang.version import __version__

    g = geometry
    config = g.config | {"caption_channels": g.caption_channels, "rope_type": LTX2RopeType.SPLIT}
    config["double_precision_rope"] = True
    if g.version != "2.0":
        gates = ("apply_gated_attention", "cross_attention_adaln", "caption_proj_before_connector")
        config |= dict.fromkeys(gates, True)
    if g.version == "2.5":
        config |= {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
    if unknown := [name for name in config if name not in LTX2ArchConfig.__dataclass_fields__]:
        takes = f"its configuration takes no {', '.join(unknown)}"
        raise CannotRun(f"SGLang {__version__} does not have LTX-{g.version}: {takes}.")
    with _default_dtype(torch.bfloat16), torch.device("meta"):  # as SGLang's loader builds it
        return LTX2VideoTransformer3DModel(LTX2Config(arch_config=LTX2ArchConfig(**config)), hf_config={})


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def conditions(model: Any, geometry: Geometry, noise: Callable[..., Tensor], device: torch.device) -> dict[str, Any]:
    return {**text_and_coordinates(model, geometry, noise, device), "return_latents": False}


def part_of_rank(model: Any, geometry: Geometry, inputs: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of a clip's inputs, divided as SGLang's pipeline for LTX-2 divides them: the video's frames, and
    from LTX-2.3 on the audio's. ValueError where they can't be divided evenly, for which SGLang would pad them."""
    from sglang.multimodal_gen.configs.pipeline_configs import LTX2PipelineConfig

    g, of = geometry, LTX2PipelineConfig()
    divided = {"frames": g.frames} | ({} if g.version == "2.0" else {"audio_frames": g.audio_frames})
    for name, count in divided.items():
        if count % ranks():
            raise ValueError(f"{name} is {count}; accepted for {ranks()} ranks: a multiple of {ranks()}")
    batch = types.SimpleNamespace(height=32 * g.height, width=32 * g.width, fps=FPS, did_sp_shard_latents=True)
    batch.did_sp_shard_audio_latents = "audio_frames" in divided
    video, audio = inputs["latents"], inputs["audio_latents"]
    more = dict(inputs["conditions"])
    video, _ = of.shard_latents_for_sp(batch, video)
    more["num_frames"] = batch.sp_video_latent_num_frames
    sizes = {"num_frames": more["num_frames"], "height": g.height, "width": g.width}
    more["video_coords"] = of.prepare_video_rope_coords_for_sp(model, batch, video, **sizes)
    if batch.did_sp_shard_audio_latents:
        audio, _ = of.shard_audio_latents_for_sp(batch, audio)
        more["audio_num_frames"] = frames = batch.sp_audio_latent_num_frames
        more["audio_coords"] = of.prepare_audio_rope_coords_for_sp(model, batch, audio, num_frames=frames)
    return {**inputs, "latents": video, "audio_latents": audio, "conditions": more}


def velocity_of(model: Any, inputs: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A noise level is a timestep, 1000 sigma."""
    from sglang.multimodal_gen.runtime.managers.forward_context import set_forward_context

    given, fixed, device = inputs["given"], dict(inputs["conditions"]), inputs["latents"].device
    text = {name: fixed.pop(name) for name in ("encoder_hidden_states", "audio_encoder_hidden_states")}

    real = type(inputs["latents"]) is Tensor  # where a forward is run for its shapes alone, there is nothing to cast

    @contextlib.contextmanager
    def running() -> Iterator[None]:
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=real)
        with torch.no_grad(), autocast, set_forward_context(current_timestep=0, attn_metadata=None):
            yield

    if getattr(model, "caches_prompt_kv", False):  # of later versions, with LTX-2.0
        with running():
            fixed["cached_prompt_kv"] = model.prepare_prompt_kv(**text)
        text = dict.fromkeys(text)

    def velocity(video: Tensor, audio: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        noise_level = {"timestep": timestep}
        if given is not None:
            noise_level = {"timestep": timestep.unsqueeze(-1) * (1 - given), "audio_timestep": timestep}
        with running():
            return model(
                hidden_states=video.to(torch.bfloat16),
                audio_hidden_states=audio.to(torch.bfloat16),
                **text,
                **noise_level,
                **fixed,
            )

    return velocity


def schedule(geometry: Geometry, device: torch.device) -> Schedule:
    from sglang.multimodal_gen.runtime.models.schedulers import scheduling_flow_match_euler_discrete as upstream

    return flow_match(upstream.FlowMatchEulerDiscreteScheduler, geometry, device)


def mount(model: Any) -> list[str]:
    """Go to SGLang's tier "high": every fusion that its LTX-2 knows by a tier, mounted. Returns their names."""
    from sglang.kernels.ops.diffusion.sites.quality_gate import QualityGatedFusion
    from sglang.multimodal_gen.runtime.models.dits import ltx_2

    fusions = [value for value in vars(ltx_2).values() if isinstance(value, QualityGatedFusion)]
    return [fusion.name for fusion in fusions if fusion.mount(model)]
