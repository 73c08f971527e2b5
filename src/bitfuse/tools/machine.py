"""What a result was made on: facts that a reader of it needs, and none that name a person, a host or a path."""

from __future__ import annotations

import datetime
import platform
import re
from pathlib import Path
from typing import Any

import torch

import bitfuse
from bitfuse.tools import packages


def machine(device: torch.device | str | None = None) -> dict[str, Any]:
    """The device and the versions of everything the bits or the times may depend on, as plain JSON values.

    device    the torch device that did the work; by default CUDA's current one, or the CPU where there is none
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "device_type": device.type,
        "capability": list(torch.cuda.get_device_capability(device)) if on_cuda else None,
        "driver": _driver() if on_cuda else None,
        "torch": torch.__version__,
        "torch_git": torch.version.git_version,
        "cuda": torch.version.cuda,
        "triton": packages.version("triton"),
        "diffusers": packages.version("diffusers"),
        "bitfuse": bitfuse.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",  # platform.platform() may carry a site's own names
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The CPU's name; `platform.processor()` is empty on most Linux systems."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return (names[0].strip() if names else platform.processor()) or platform.machine()


def _driver() -> str | None:
    """The NVIDIA driver's version, from NVML or else from the kernel module."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else version
    except Exception:  # the binding is absent, too old or at odds with the driver: all the same to us
        pass
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)*)\s", text)
    return found.group(1) if found else None
