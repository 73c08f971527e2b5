"""diffusers' LTX-2 on several GPUs: what each rank computes in a step, stock and accelerated, bit for bit.

    torchrun --standalone --nproc-per-node 2 examples/diffusers_ranks.py --how ulysses --tokens 6144 --json ranks.json

ulysses    diffusers' context parallelism: the tokens of video, audio and text divided among the ranks
fsdp       FSDP2 (`fully_shard`): the weights divided, a block's gathered when it runs
train      FSDP2 with a LoRA that is trained: the output and the gradients of a step, in which bitfuse steps aside

The transformer has random weights, the same on every rank. Without GPUs the ranks are processes on the CPU, over gloo,
with a small transformer in Triton's interpreter. Exit code 0: what every rank computes has the bits of its stock step,
and all ranks fused the same sites; 1: not so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA is used: deterministic gradients need it

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import bitfuse
from bitfuse.tools import ranks, seeded
from bitfuse.tools.bench.bench import LATENTS

SPLIT_TABLES = {"split_dim": 2, "expected_dims": 4, "split_output": True}  # cos and sin: [B, heads, tokens, dim / 2]


def plan() -> dict[str, Any]:
    """How context parallelism divides LTX-2: what diffusers' own plan (0.42.1) leaves whole, added to it.

    Its plan divides rotary tables of three dimensions only, where LTX-2's checkpoints have split ones, of four; not the
    tables of the attentions between video and audio; and not the audio, whose keys each rank would send to the others.
    """
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    streams = ("hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states")
    tokens = ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
    tables = dict.fromkeys((0, 1), ContextParallelInput(**SPLIT_TABLES))
    gathered = ContextParallelOutput(gather_dim=1, expected_dims=3)
    ropes = ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope")
    return {"": dict.fromkeys(streams, tokens)} | dict.fromkeys(ropes, tables) | dict.fromkeys(OUTPUTS, gathered)


OUTPUTS = ("proj_out", "audio_proj_out")


def divide_tokens(model: Any, device: torch.device) -> None:
    """`enable_parallelism`; on the CPU what that does, as it asks for the number of accelerators (diffusers 0.42.1)."""
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(ulysses_degree=distributed.get_world_size())
    if device.type == "cuda":
        model.enable_parallelism(config=config, cp_plan=plan())
        return
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(distributed.get_rank(), distributed.get_world_size(), device, mesh=mesh)
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = parallel
    apply_context_parallel(model, config, plan())


def divide_weights(model: Any, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def add_lora(model: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def forward_of(model: Any, inputs: dict[str, Any]) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A call of the transformer that returns a tuple and has no mask of the text: all of its tokens are attended to.

    diffusers' hook can't divide an output of another class, nor its attention a mask of one row a head (0.42.1).
    """
    device = inputs["latents"].device
    given = {**inputs["conditions"], "encoder_attention_mask": None, "audio_encoder_attention_mask": None}
    level = torch.full((1,), 1000.0, device=device)
    latents = {name: inputs[of].to(torch.bfloat16) for name, of in STREAMS.items()}
    return lambda: model(**latents, timestep=level, sigma=level, return_dict=False, **given)


STREAMS = {"hidden_states": "latents", "audio_hidden_states": "audio_latents"}


def training_step(model: Any, forward: Callable[[], Any]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Both velocities, then this rank's part of the gradient of every trained weight."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> tuple[torch.Tensor, ...]:
        out = forward()
        torch.stack([one.float().square().mean() for one in out]).sum().backward()
        gradients = [parameter.grad.to_local().clone() for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        return *(one.detach() for one in out), *gradients

    return step


def of_rank(given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    geometry, _ = seeded.geometry_for(device, given.layers, given.ltx, "diffusers")
    frames, height, width = LATENTS[given.tokens] if device.type == "cuda" else (2, 3, 4)
    geometry = replace(geometry, frames=frames, height=height, width=width)
    if given.how == "ulysses":
        parts = {"heads": geometry.heads, "video tokens": geometry.video_tokens, "audio tokens": geometry.audio_frames}
        for name, count in (parts | {"text tokens": geometry.text_tokens}).items():
            if count % distributed.get_world_size():
                raise ValueError(f"{count} {name} do not divide among {distributed.get_world_size()} ranks")
    model = seeded.build(geometry, device, seed=0)
    inputs = seeded.make_inputs(model, geometry, device, seed=0)
    if given.how == "train":
        torch.use_deterministic_algorithms(True)  # the gradients of stock's attention are not, else
        add_lora(model)
    divide = divide_tokens if given.how == "ulysses" else divide_weights
    with bitfuse.accelerated(model):  # divided while it is accelerated: once, for its bits
        divide(model, device)
        forward = forward_of(model, inputs)
        step: Callable[[], Any] = training_step(model, forward) if given.how == "train" else torch.no_grad()(forward)
        first = step()
    found = {"geometry": geometry.sentence, "how": given.how, "trains": given.how == "train"}
    found |= ranks.by_turns(model, step, given.rounds, given.steps, device)
    if mismatch := bitfuse.compare(step(), first):
        found["differs"].append(f"bitfuse, accelerated before it was divided: {mismatch.sentence}")
    return found


if __name__ == "__main__":
    options = ranks.arguments(__doc__)
    options.add_argument("--how", choices=("ulysses", "fsdp", "train"), default="ulysses", help="what is divided")
    sys.exit(ranks.run(options, of_rank, "diffusers"))
