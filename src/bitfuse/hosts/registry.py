"""The hosts that bitfuse knows, one entry each: all that the front door and the tools need to know of one.

A new host is an adapter, a module with what its pipeline does (`bitfuse.tools.seeded` says what stands in one), and an
entry here, or one that is given to `register`. Modules are named, and imported when they are first needed.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Host:
    """One framework with an LTX-2 transformer.

    name         as `--host` takes it, and as the package is called where packages are installed from
    title        as sentences name it
    package      the module that is imported, which is there where the host is installed
    versions     those whose sources were read and are restated, as words
    install      how to install it, as words
    accepts      what `bitfuse.accelerate` takes of it, as words
    adapter      the module that takes its models over: `bitfuse.hosts` says what stands in one
    seeded       the module that builds its transformer with seeded weights, and calls it as its pipeline does
    models       the module that has been imported wherever there is a model of it; None: `package`
    standalone   whether its transformer can be built without more of the host around it (a group of ranks, say), so
                 that `bitfuse doctor` can try what would be taken over; else it looks at the adapter's sources
    """

    name: str
    title: str
    package: str
    versions: str
    install: str
    accepts: str
    adapter: str
    seeded: str
    models: str | None = None
    standalone: bool = True

    @property
    def installed(self) -> bool:
        """Whether its package is there; it is not imported."""
        return importlib.util.find_spec(self.package) is not None

    def load(self) -> Any:
        """Its adapter. ImportError where the host is not installed, or has no LTX-2."""
        return importlib.import_module(self.adapter)


HOSTS: dict[str, Host] = {}
"""By name, in the order in which they are listed and asked."""


def register(host: Host) -> Host:
    """Make a host known. ValueError where another has its name."""
    if HOSTS.setdefault(host.name, host) != host:
        raise ValueError(f"host.name is {host.name!r}, which is another host's; taken: {', '.join(HOSTS)}")
    return host


register(
    Host(
        name="diffusers",
        title="diffusers",
        package="diffusers",
        versions="0.38 to 0.42.1",
        install="pip install 'bitfuse[demo]'",
        accepts="a diffusers LTX-2 pipeline or LTX2VideoTransformer3DModel or LTX2TextConnectors or "
        "AutoencoderKLLTX2Video or LTX2VideoDiffusionDecoderModel",
        adapter="bitfuse.hosts.diffusers",
        seeded="bitfuse.tools.seeded.diffusers",
    )
)
register(
    Host(
        name="ltx-core",
        title="ltx-core",
        package="ltx_core",
        versions="1.0.0 to 1.2.0",
        install="pip install ltx-core, or PYTHONPATH=LTX-2/packages/ltx-core/src of a checkout",
        accepts="an ltx-core LTXModel or X0Model or video decoder or encoder",
        adapter="bitfuse.hosts.ltx_core",
        seeded="bitfuse.tools.seeded.ltx_core",
    )
)
register(
    Host(
        name="sglang",
        title="SGLang",
        package="sglang",
        versions="0.5.12 to 0.5.23",
        install="pip install 'sglang[diffusion]'",
        accepts="an SGLang LTX2VideoTransformer3DModel",
        adapter="bitfuse.hosts.sglang",
        seeded="bitfuse.tools.seeded.sglang",
        models="sglang.multimodal_gen.runtime.models.dits.ltx_2",
        standalone=False,
    )
)
register(
    Host(
        name="comfyui",
        title="ComfyUI",
        package="bitfuse_comfyui",  # the node pack, in which the adapter is: ComfyUI itself is no package
        versions="0.24.1 to 0.30.0",
        install="pip install ./comfyui of a checkout, and PYTHONPATH=/path/to/ComfyUI",
        accepts="a ComfyUI LTXAVModel or a ModelPatcher of one, with the node pack",
        adapter="bitfuse_comfyui.adapter",
        seeded="bitfuse_comfyui.seeded",
        models="comfy.ldm.lightricks.av_model",
    )
)
