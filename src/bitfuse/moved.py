"""Modules that had another name until 0.1: an import by the old name still works, with a DeprecationWarning.

`import bitfuse` puts `Finder` at the end of `sys.meta_path`. It is asked for what nobody else has found, and answers
for the names in `MOVED` alone. Where one module became several, the old name stands for all of them: what is set there
is set in each of them that has it, so that a function which was replaced by its old name is the one that is called.
Until 0.1 `import bitfuse` imported many of them, so they are also found as attributes (`bitfuse.contract`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "contract": ("core.operator", "core.conditions", "core.launch", "core.evidence", "core.proof"),
    "proof": ("core.proof", "core.bits", "core.inputs", "core.launch"),
    "kernel": ("core.kernel",),
    "interpreter": ("core.interpreter",),
    "numerics": ("core.numerics",),
    "reduction": ("core.reduction", "core.emulated"),
    "values": ("core.values",),
    "originals": ("core.originals", "hosts.code"),
    "ops.split_rotary": ("ops.rope",),
    "ops.interleaved_rotary": ("ops.rope",),
    "ops.rotary_common": ("ops.rope", "ops.rope_evidence"),
    "ops.qk_common": ("ops.qk_norm", "ops.qk_norm_evidence"),
    "ops.adaln_common": ("ops.adaln", "core.launch", "core.conditions", "core.values"),
    "ops.adaln_cases": ("ops.adaln_evidence", "core.values"),
    "ops.norm_common": ("ops.adaln", "ops.adaln_evidence", "core.evidence"),
    "ops.modulate": ("ops.adaln",),
    "ops.gated_residual": ("ops.adaln",),
    "ops.rms_norm_modulate": ("ops.adaln",),
    "ops.residual_rms_norm": ("ops.adaln",),
    "graphs": ("run.graphs",),
    "audit": ("run.audit",),
    "swap": ("run.swap",),
    "hosts.constant": ("run.memo",),
    "hosts.patch": ("hosts.site", "hosts.report", "hosts.handle", "hosts.sources", "hosts.code"),
    "hosts.common": ("hosts.ltx2", "hosts.part", "hosts.sources", "hosts.rehearsal", "run.alone"),
    "hosts.diffusers_block": ("hosts.diffusers",),
    "hosts.ltx_core_block": ("hosts.ltx_core",),
    "hosts.sglang_block": ("hosts.sglang",),
    "verify": ("tools.prove.verify",),
    "deep": ("tools.prove.sweeps",),
    "mutation": ("tools.prove.mutation",),
    "far": ("tools.prove.far",),
    "ptx": ("tools.prove.ptx",),
    "ahead": ("tools.prove.ahead",),
    "document": ("tools.prove.document",),
    "comparison": ("tools.compare.comparison", "tools.compare.subject"),
    "comparison_request": ("tools.compare.request",),
    "comparison_page": ("tools.compare.films", "tools.page"),
    "page": ("tools.page",),
    "divergence": ("tools.compare.trace",),
    "bits": ("tools.compare.bits",),
    "demo": ("tools.compare.demo",),
    "runs": ("tools.compare.runs", "tools.packages"),
    "conformance": ("tools.compare.conformance",),
    "bench": ("tools.bench.bench",),
    "measure": ("tools.bench.measure",),
    "seeded": ("tools.seeded",),
    "seeded_diffusers": ("tools.seeded.diffusers",),
    "seeded_ltx_core": ("tools.seeded.ltx_core",),
    "seeded_sglang": ("tools.seeded.sglang",),
    "doctor": ("tools.doctor",),
    "sites": ("tools.explain",),
    "machine": ("tools.machine",),
    "files": ("tools.files",),
    "text": ("tools.text", "core.lines"),
}


class _Several(types.ModuleType):
    """A module that became several: an attribute is that of the first of them that has it."""

    def __init__(self, name: str, modules: list[types.ModuleType]):
        super().__init__(name)
        self.__dict__.update(_modules=modules, _deleted={})

    def __getattr__(self, name: str) -> Any:
        for module in self._modules:
            if hasattr(module, name):
                return getattr(module, name)
        if name == "__all__":  # for `from bitfuse.contract import *`
            return [name for name in dir(self) if not name.startswith("_")]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):  # the import system's own
            super().__setattr__(name, value)
            return
        having = [module for module in self._modules if hasattr(module, name)]
        for module in having or self._deleted.pop(name, self._modules[:1]):
            setattr(module, name, value)

    def __delattr__(self, name: str) -> None:
        having = [module for module in self._modules if hasattr(module, name)]
        if not having:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        for module in having:
            delattr(module, name)
        self._deleted[name] = having  # `unittest.mock.patch` deletes what it has set, then sets what was there before

    def __dir__(self) -> list[str]:
        return sorted({name for module in self._modules for name in vars(module)})


class _Loader(importlib.abc.InspectLoader):
    def __init__(self, names: list[str]):
        self._names = names

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        warnings.warn(f"{spec.name} is now {' and '.join(self._names)}", DeprecationWarning, stacklevel=2)
        modules = [importlib.import_module(name) for name in self._names]
        self._own = modules[0].__spec__
        return modules[0] if len(modules) == 1 else _Several(spec.name, modules)

    def exec_module(self, module: types.ModuleType) -> None:
        if not isinstance(module, _Several):
            module.__spec__ = self._own  # the import system has just put the old name's there

    def get_source(self, fullname: str) -> str | None:
        """For `python -m`: the source to run under the old name."""
        found = importlib.util.find_spec(self._names[0])
        loader = found.loader if found else None
        return loader.get_source(self._names[0]) if isinstance(loader, importlib.abc.InspectLoader) else None


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != "bitfuse" or old not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, _Loader([f"bitfuse.{name}" for name in MOVED[old]]))


def attribute(package: str, name: str) -> Any:
    """The module that stood under an old name in this package; AttributeError where none did."""
    if f"{package}.{name}".partition(".")[2] not in MOVED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(f"{package}.{name}")


def install() -> None:
    """Answer for the old names in this process, once."""
    for package in ("bitfuse.hosts", "bitfuse.ops"):  # `bitfuse` has a `__getattr__` of its own
        vars(sys.modules[package])["__getattr__"] = functools.partial(attribute, package)
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
