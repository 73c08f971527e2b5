# SPDX-License-Identifier: GPL-3.0-or-later
"""The nodes: `bitfuse (LTX-2)`, a model in and a model out, and `bitfuse report`, what it did as text.

bitfuse is imported when a node runs: ComfyUI loads the pack where bitfuse, or the Triton that it needs, is missing.
"""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

CATEGORY = "model/patch"
MISSING = "bitfuse does not import here ({}: {}); the model is unchanged. Cure: {}"
INSTALL = "pip install bitfuse, with Triton, into the Python that runs ComfyUI"
UPDATE = "another version of this pack, or of ComfyUI"
NOT_THERE = "There is no bitfuse node before this model."


class Unavailable:
    """Stands for the node's wrapper where bitfuse does not import; a report says so."""

    def __init__(self, sentence: str):
        self.sentence = sentence

    def report(self) -> str:
        return self.sentence


class BitfuseLTX2(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BitfuseLTX2",
            display_name="bitfuse (LTX-2)",
            category=CATEGORY,
            description="Runs LTX-2's elementwise chains (norms, modulation, rotary embedding, gates) through fused "
            "kernels with the same bits: the same seed gives the same video. Each kernel is proved against PyTorch's "
            "own in this process before it is used; what can't be fused runs as before. Connect it last, after LoRA "
            "and attention nodes.",
            inputs=[
                io.Model.Input("model", tooltip="An LTX-2 model. It is not changed: other branches that use it stay."),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    tooltip="Stop with an error where something would run unfused, instead of running PyTorch's own.",
                ),
                io.Int.Input(
                    "audit",
                    default=0,
                    min=0,
                    max=1 << 20,
                    tooltip="0: off. N: compute one fused call in N again with PyTorch and compare every bit; the "
                    "report counts them, and a kernel that differs is taken out of use. 64 costs about a percent.",
                ),
                io.Boolean.Input(
                    "cuda_graph",
                    default=False,
                    tooltip="Replay the transformer's blocks as one CUDA graph from the third step of a size on: "
                    "faster for short or small videos, where the CPU sets the pace; it takes more memory. Only where "
                    "the whole model fits on the GPU; else steps run as without it, and the report says why. A model "
                    "of dynamic VRAM is loaded anew without that, as for ComfyUI's torch.compile node.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with bitfuse. Clones of it have it, too.")],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, model: Any, strict: bool, audit: int, cuda_graph: bool) -> io.NodeOutput:
        try:
            from bitfuse.hosts.handle import Options

            from . import wrapper
        except ImportError as error:
            if strict:
                raise
            cure = INSTALL if isinstance(error, ModuleNotFoundError) else UPDATE
            sentence = MISSING.format(type(error).__name__, error, cure)
            logging.warning(sentence)  # who has no report node sees it where ComfyUI runs
            unchanged = model.clone()
            unchanged.set_attachments("bitfuse", Unavailable(sentence))
            return io.NodeOutput(unchanged)
        options = Options(strict=strict, audit=audit or None, cuda_graph=cuda_graph)
        return io.NodeOutput(wrapper.attach(model, options))


class BitfuseReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="BitfuseReport",
            display_name="bitfuse report",
            category=CATEGORY,
            description="What bitfuse fused in a model so far, what it did not fuse, and why, as text.",
            inputs=[
                io.Model.Input("model", tooltip="The output of the node bitfuse (LTX-2), or what came of it."),
                io.Latent.Input(
                    "after",
                    optional=True,
                    tooltip="The sampler's latent: the report is then made after it, and says what that run did.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The report's text.")],
            is_output_node=True,
            is_experimental=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return float("nan")  # never equal: what the model did is no input

    @classmethod
    def execute(cls, model: Any, after: Any = None) -> io.NodeOutput:
        found = model.get_attachment("bitfuse")
        text = NOT_THERE if found is None else found.report()
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class BitfuseExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [BitfuseLTX2, BitfuseReport]


async def comfy_entrypoint() -> BitfuseExtension:
    return BitfuseExtension()
