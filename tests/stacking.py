"""What people use beside bitfuse in diffusers, each switched on in a seeded transformer, before `accelerate` and after.

`tests/test_stacking.py` holds each row; `benchmarks/stacking.py` writes them into the table of docs/stacking.md.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import bitfuse
from bitfuse.tools import seeded

LAYERS = 2
ORDERS = ("feature first", "accelerate first")


@dataclass(frozen=True)
class Feature:
    """`use` switches it on in a transformer; `how` is what a user types; `needs` are packages besides diffusers."""

    name: str
    use: Callable[[Any], None]
    how: str
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


@dataclass(frozen=True)
class Row:
    """What one step with the feature gave. `differs`, `after_restore`: where a bit was not that of stock with it."""

    feature: str
    version: str
    order: str
    fused: int
    seen: int
    differs: str | None
    after_restore: str | None
    reasons: tuple[str, ...]


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _groups(level: str, **options: Any) -> Callable[[Any], None]:
    def use(model: Any) -> None:
        from diffusers.hooks import apply_group_offloading

        more = {"num_blocks_per_group": 1} if level == "block_level" else {}
        stream = {"use_stream": True, **options} if torch.cuda.is_available() else {}
        device = torch.device("cuda") if torch.cuda.is_available() else _device(model)
        apply_group_offloading(model, device, torch.device("cpu"), offload_type=level, **more, **stream)

    return use


def _casting(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


def _sequential(model: Any) -> None:
    """As `accelerate.cpu_offload`, without its hook on the model itself: that one rebuilds what the model returns, and
    can't where it is diffusers' output of two fields (accelerate 1.15.0). Pipelines ask for a tuple."""
    from accelerate.hooks import attach_align_device_hook

    weights = {name: tensor.to("cpu") for name, tensor in model.state_dict().items()}
    device = torch.device("cuda") if torch.cuda.is_available() else _device(model)
    attach_align_device_hook(model, execution_device=device, offload=True, weights_map=weights)


def _whole(model: Any) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, execution_device="cuda" if torch.cuda.is_available() else _device(model))


def _lora(model: Any) -> None:
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def _torchao(config: str) -> Callable[[Any], None]:
    def use(model: Any) -> None:
        from torchao import quantization

        quantization.quantize_(model.transformer_blocks, getattr(quantization, config)())

    return use


def _both(*uses: Callable[[Any], None]) -> Callable[[Any], None]:
    def use(model: Any) -> None:
        for one in uses:
            one(model)

    return use


_BLOCK, _LEAF = _groups("block_level"), _groups("leaf_level", record_stream=True)
_PEFT, _AO = ("peft",), ("torchao",)
FEATURES = (
    Feature("model offload", _whole, "`pipe.enable_model_cpu_offload()`", ("accelerate",)),
    Feature("sequential offload", _sequential, "`pipe.enable_sequential_cpu_offload()`", ("accelerate",)),
    Feature("group offload, blocks", _BLOCK, '`apply_group_offloading(..., offload_type="block_level")`'),
    Feature("group offload, leaves", _LEAF, '`apply_group_offloading(..., offload_type="leaf_level")`'),
    Feature("fp8 layerwise casting", _casting, "`transformer.enable_layerwise_casting(...)`"),
    Feature("fp8 casting, blocks offloaded", _both(_casting, _BLOCK), "casting, then group offload"),
    Feature("fp8 casting, leaves offloaded", _both(_casting, _LEAF), "casting, then group offload"),
    Feature("LoRA", _lora, "`pipe.load_lora_weights(...)`", _PEFT),
    Feature("LoRA, blocks offloaded", _both(_lora, _BLOCK), "LoRA, then group offload", _PEFT),
    Feature("LoRA, leaves offloaded", _both(_lora, _LEAF), "LoRA, then group offload", _PEFT),
    Feature("torchao int8", _torchao("Int8WeightOnlyConfig"), "`TorchAoConfig(Int8WeightOnlyConfig())`", _AO),
    Feature("torchao fp8", _torchao("Float8WeightOnlyConfig"), "`TorchAoConfig(Float8WeightOnlyConfig())`", _AO),
    Feature(
        "torchao int8, blocks offloaded",
        _both(_torchao("Int8WeightOnlyConfig"), _BLOCK),
        "quantised, then group offload",
        _AO,
    ),
)


def step_of(version: str, device: torch.device) -> tuple[Callable[[], Any], Callable[[Any], Callable[[], Any]]]:
    """(a new transformer with the same weights at every call, one step of such a model)"""
    geometry, _ = seeded.geometry_for(device, LAYERS, version, "diffusers")
    if device.type == "cpu":
        geometry = replace(geometry, frames=2, height=3, width=4)
    first = seeded.build(geometry, device, seed=0)
    inputs = seeded.make_inputs(first, geometry, device, seed=0)
    return lambda: seeded.build(geometry, device, seed=0), lambda model: seeded.one_step(model, inputs)


def row(feature: Feature, version: str, order: str, device: torch.device) -> Row:
    """A step of stock with the feature, and three of an accelerated model with it, the last after `restore()`."""
    build, step = step_of(version, device)
    stock, model = build(), build()
    with torch.no_grad():
        feature.use(stock)
        expected = [step(stock)() for _ in range(2)][-1]
        if order == ORDERS[0]:
            feature.use(model)
        handle = bitfuse.accelerate(model)
        if order == ORDERS[1]:
            feature.use(model)
        mismatches = [bitfuse.compare(expected, step(model)()) for _ in range(2)]
        report = handle.report()
        handle.restore()
        after = bitfuse.compare(expected, step(model)())
    reasons = dict.fromkeys(reason for site in report.sites for reason in site.reasons)
    mismatch = next((m for m in mismatches if m is not None), None)
    return Row(
        feature.name,
        version,
        order,
        report.fused,
        report.seen,
        mismatch and mismatch.sentence,
        after and after.sentence,
        tuple(reasons),
    )


if __name__ == "__main__":  # one row, for a look: python tests/stacking.py "LoRA" 2.3
    import sys

    os.environ.setdefault("TRITON_INTERPRET", "1")
    wanted = {feature.name: feature for feature in FEATURES}[sys.argv[1]]
    for each in ORDERS:
        print(row(wanted, sys.argv[2], each, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
