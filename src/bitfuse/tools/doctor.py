"""Can this machine keep the promise? `bitfuse doctor`: checks, each with what was found, what it means, what to do.

The promise is relative to the unfused run in the same process, and every kernel is proved there before it is used. So
most of what is looked at here can't break it; it can make two runs differ from each other, fused or not, or make less
be fused, or let somebody else's code in. The states say which:

    ok         as it should be
    note       worth knowing: the bits of the unfused run, and so of the fused one, depend on it
    warning    the promise holds, but less is fused, or a run may not repeat itself, or code comes from elsewhere
    failure    the promise can't be kept, can't be shown, or somebody else may break it

Settings are those of this process. To look at a program's own, call `bitfuse.tools.doctor.run()` inside it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from bitfuse import hosts
from bitfuse.core.bits import compare
from bitfuse.core.conditions import OLDEST_GPU, around
from bitfuse.core.kernel import interpreter
from bitfuse.core.lines import error_line
from bitfuse.core.operator import OPERATORS
from bitfuse.hosts.registry import HOSTS, Host
from bitfuse.hosts.sources import why_not_read
from bitfuse.tools import explain, packages, seeded
from bitfuse.tools.machine import machine
from bitfuse.tools.text import cell

OK, NOTE, WARNING, FAILURE = "ok", "note", "warning", "failure"

OLDEST_TORCH, OLDEST_TRITON = "2.11", "3.6"
NOTHING = "nothing"  # to do

_NVIDIA = Path("/proc/driver/nvidia/version")  # there is a driver
_FREE = 100 << 20  # bytes that Triton's cache should find free: a kernel takes about a tenth of a megabyte


@dataclass(frozen=True)
class Finding:
    """What one check found: `state` is ok, note, warning or failure, the rest are sentences.

    differs    bits were compared, and differ
    """

    name: str
    state: str
    found: str
    meaning: str
    advice: str = NOTHING
    differs: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """All findings. `exit_code`: 0 no failure, 1 bits that must be equal differ, 2 another failure."""

    findings: list[Finding]

    @property
    def exit_code(self) -> int:
        if any(f.differs for f in self.findings):
            return 1
        return 2 if any(f.state == FAILURE for f in self.findings) else 0

    def as_dict(self) -> dict[str, Any]:
        return {"machine": machine(), "exit_code": self.exit_code, "findings": [asdict(f) for f in self.findings]}


def run(console: Console | None = None, device: str | None = None, everything: bool = False) -> Diagnosis:
    """Make every check, print what was found, and return it.

    device        where kernels are tried: "cuda" or "cpu" (Triton's interpreter); default: cuda if there is one
    everything    print what each finding means, also of those that are ok and of notes
    """
    console = console or Console()
    with console.status("looking at this machine; nothing is changed"):
        diagnosis = Diagnosis(list(examine(device)))
    _print(console, diagnosis, everything)
    return diagnosis


def examine(device: str | None = None) -> Iterator[Finding]:
    """Make every check in turn. One that raises is itself a finding: a warning with the exception in words."""
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for name, check in CHECKS.items():
        try:
            yield from check(on)
        except Exception as error:
            found = f"the check failed ({error_line(error, paths=False)})"
            yield Finding(name, WARNING, found, "nothing is known about this", "report it, please")


# -- the device and the libraries ------------------------------------------------------------------------------------


def _switch(device: torch.device) -> Iterator[Finding]:
    reasons = list(around())
    if not reasons:
        yield Finding("switch", OK, "bitfuse is on", "what is proved equal is fused; BITFUSE=0 switches it off")
    by_variable = os.environ.get("BITFUSE") == "0"
    advice = "unset BITFUSE" if by_variable else "leave the mode, or call bitfuse.enable()"
    for reason in reasons:
        meaning = "every operator runs the PyTorch chain: right bits, no gain"
        yield Finding("switch", WARNING, reason, meaning, advice)


def _gpu(device: torch.device) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        found, advice = _no_gpu()
        meaning = (
            "nothing is fused: models run their own code, so with their own bits. What works: `bitfuse verify` and "
            "`bitfuse demo` run the kernels in Triton's interpreter on the CPU, and `bitfuse explain` needs no GPU"
        )
        yield Finding("GPU", WARNING, found, meaning, advice)
        return
    if torch.version.hip is not None:
        meaning = "the kernels hold NVIDIA instructions: nothing is fused, models run their own code"
        yield Finding("GPU", FAILURE, f"AMD, ROCm {torch.version.hip}", meaning, "use an NVIDIA GPU")
        return
    capabilities = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        capabilities.append((major, minor))
        found = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
        if (major, minor) >= OLDEST_GPU:
            yield Finding(f"GPU {i}", OK, found, "kernels are proved on it at their first use")
        else:
            meaning = "nothing is fused on it: it has no bf16 arithmetic"
            yield Finding(f"GPU {i}", WARNING, found, meaning, "sm_80 (A100, RTX 30) or newer is needed")
    if max(capabilities) < OLDEST_GPU:
        yield Finding("GPU", FAILURE, "none is sm_80 or newer", "nothing can be fused here", "use a newer GPU")
    if len(set(capabilities)) > 1:
        meaning = "bits differ between kinds of GPU, fused or not: a film must stay on one to be made again"
        yield Finding("GPUs", NOTE, "of different kinds", meaning, "choose one with CUDA_VISIBLE_DEVICES")


def _no_gpu() -> tuple[str, str]:
    """Why PyTorch sees none, and what to do."""
    if torch.version.cuda is None and torch.version.hip is None:
        found = f"none: torch {torch.__version__} is built without CUDA"
        return found, "on a machine with a GPU install torch with CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "none: CUDA_VISIBLE_DEVICES hides them all", "unset CUDA_VISIBLE_DEVICES"
    if _NVIDIA.exists():
        cuda = f"CUDA {torch.version.cuda}"
        return f"none that torch can use, though there is an NVIDIA driver; torch needs {cuda}", "update the driver"
    return "none", "use a machine with an NVIDIA GPU, sm_80 or newer"


def _driver(device: torch.device) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        return
    driver = machine("cuda")["driver"]
    found = f"{driver or 'unknown'}, and CUDA {torch.version.cuda} in torch"
    if driver:
        yield Finding("driver", OK, found, "part of what the bits may depend on; it is written into every document")
    else:
        meaning = "its version can't be read, so documents of this machine will not name it"
        yield Finding("driver", NOTE, found, meaning, "pip install nvidia-ml-py")


def _torch(device: torch.device) -> Iterator[Finding]:
    found = f"{torch.__version__}, git {(torch.version.git_version or 'unknown')[:12]}"
    version = Version(torch.__version__)
    if version.release < Version(OLDEST_TORCH).release:
        meaning = "too old: bitfuse was never tried with it"
        yield Finding("torch", FAILURE, found, meaning, f"install torch {OLDEST_TORCH} or newer")
    elif version.is_prerelease:
        meaning = "a build in between: what ATen does may have changed, and every kernel is proved against it"
        yield Finding("torch", NOTE, found, meaning, "run `bitfuse verify` after every update")
    else:
        yield Finding("torch", OK, found, "the bits of the unfused run are this build's; another's may differ")


def _triton(device: torch.device) -> Iterator[Finding]:
    missing = FAILURE if device.type == "cuda" else WARNING
    try:
        import triton
    except Exception as error:  # not installed, or built for another Python or another system
        found = "not installed" if isinstance(error, ModuleNotFoundError) else f"can't be imported ({error})"
        yield Finding("Triton", missing, found, "nothing can be fused without it", "pip install triton (on Linux)")
        return
    if Version(triton.__version__).release < Version(OLDEST_TRITON).release:
        meaning = "too old: kernels may not compile, and then nothing is fused"
        yield Finding("Triton", missing, triton.__version__, meaning, f"install Triton {OLDEST_TRITON} or newer")
    else:
        yield Finding("Triton", OK, triton.__version__, "compiles the kernels, with fusion of a*b + c switched off")


# -- what changes the code that is compiled --------------------------------------------------------------------------

_ELSEWHERE = "machine code comes from somewhere else than the installed Triton"
_OTHERWISE = "kernels are compiled otherwise than everybody else's; each is still proved as compiled here"
_UNIMPORTANT = "has no effect on bitfuse's kernels"

_SAY_SO = f"{_UNIMPORTANT}: each says for itself that a*b + c is not fused. Other Triton kernels' bits depend on it"

# (state, what it means) of environment variables that Triton and PyTorch read. Triton 3.6 to 3.9, torch 2.11 to 2.15.
VARIABLES: dict[str, tuple[str, str]] = {
    "TRITON_KERNEL_OVERRIDE": (WARNING, "compiled stages are replaced by files from TRITON_OVERRIDE_DIR"),
    "TRITON_CACHE_MANAGER": (WARNING, _ELSEWHERE),
    "TRITON_REMOTE_CACHE_BACKEND": (WARNING, _ELSEWHERE),
    "TRITON_PTXAS_PATH": (WARNING, "another program makes the machine code; Triton's cache may not tell the two apart"),
    "TRITON_PTXAS_BLACKWELL_PATH": (WARNING, "as TRITON_PTXAS_PATH, on sm_100 and newer"),
    "TRITON_LIBDEVICE_PATH": (WARNING, "another library supplies the exponential of the head gates"),
    "TRITON_LIBCUDA_PATH": (NOTE, "another CUDA driver library is linked"),
    "PTXAS_OPTIONS": (WARNING, _OTHERWISE),
    "DISABLE_PTXAS_OPT": (WARNING, f"kernels are slow: {_OTHERWISE}"),
    "DISABLE_LLVM_OPT": (WARNING, _OTHERWISE),
    "LLVM_PASS_PLUGIN_PATH": (WARNING, f"somebody's code takes part in compiling: {_OTHERWISE}"),
    "TRITON_OVERRIDE_ARCH": (WARNING, "kernels are compiled for another GPU than this one"),
    "TRITON_MOCK_PTX_VERSION": (WARNING, _OTHERWISE),
    "TRITON_INSTRUMENTATION_MODE": (WARNING, f"kernels are instrumented, and slow: {_OTHERWISE}"),
    "TRITON_ENABLE_ASAN": (WARNING, f"kernels are instrumented, and slow: {_OTHERWISE}"),
    "TRITON_ENABLE_EXPERIMENTAL_CONSAN": (WARNING, f"kernels are instrumented, and slow: {_OTHERWISE}"),
    "TRITON_PLUGIN_PATHS": (WARNING, f"somebody's code takes part in compiling: {_OTHERWISE}"),
    "TRITON_FPSAN_HOMOMORPHIC_CASTS": (NOTE, "acts in kernels that TRITON_INSTRUMENTATION_MODE instruments, alone"),
    "TRITON_DEFAULT_BACKEND": (NOTE, "chooses the kind of GPU that Triton compiles for"),
    "TRITON_DEBUG": (NOTE, "kernels are compiled with checks; slower"),
    "TRITON_ALWAYS_COMPILE": (NOTE, "every process compiles every kernel again: a slow start"),
    "TRITON_DEFAULT_FP_FUSION": (NOTE, _SAY_SO),
    "TRITON_FORCE_DISABLE_FP_FUSION": (NOTE, _SAY_SO),
    "TRITON_F32_DEFAULT": (
        NOTE,
        f"{_UNIMPORTANT}, which multiply no matrices; other Triton kernels' bits depend on it",
    ),
    "TORCH_NATIVE_SKIP_VERSION_CHECK": (
        WARNING,
        "torch replaces ATen ops by kernels of packages it was not tried with",
    ),
    "TORCH_PYTHON_NATIVE_USER_GRAPH_ORDER_FN": (WARNING, "importing torch runs a function that this names"),
    "TORCH_DISABLE_NATIVE_JIT": (NOTE, "torch's own replacements of ATen ops are off; the unfused run's bits follow"),
    "TORCH_DISABLE_NATIVE_AOT": (NOTE, "torch's own replacements that are compiled already (2.15: topk) are off"),
    "PYTORCH_SUM_INNER_TREE": (
        NOTE,
        "torch 2.14 and newer then add up sums over rows in another order on CUDA, where CuTe DSL is installed. No "
        "chain that is fused calls sum: means and norms are added up as before",
    ),
    "TORCHINDUCTOR_NUMERICS": (
        NOTE,
        "torch.compile (2.14 and newer) then rounds and adds up more as eager PyTorch does; eager PyTorch, bitfuse's "
        "kernels included, is what it was",
    ),
    "NVIDIA_TF32_OVERRIDE": (NOTE, "overrides every setting of TF32, in both runs alike"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (NOTE, "fp32 matrix products are rounded to TF32, in both runs alike"),
    "TORCH_BLAS_PREFER_CUBLASLT": (NOTE, "another library multiplies matrices, in both runs alike"),
    "DISABLE_ADDMM_CUDA_LT": (NOTE, "another library multiplies matrices, in both runs alike"),
    "CUBLASLT_WORKSPACE_SIZE": (NOTE, "which matrix kernels are picked depends on it, in both runs alike"),
    "PYTORCH_TUNABLEOP_ENABLED": (WARNING, "matrix kernels are picked by timing them: two runs may differ"),
    "DIFFUSERS_ATTN_BACKEND": (NOTE, "chooses diffusers' attention, in both runs alike"),
}
_OFF = ("", "0", "false", "off", "no", "n")
_OFF_FOR_TORCH = ("", "0")  # to whom PYTORCH_SUM_INNER_TREE=false is a yes
# What Triton reads besides, to no effect on what a kernel computes
_HARMLESS = re.compile(
    r"TRITON_(INTERPRET|HOME|CACHE_DIR|DUMP_\w+|OVERRIDE_DIR|KERNEL_DUMP|STORE_BINARY_ONLY|DISABLE_LINE_INFO|CUD\w+_PATH|"
    r"FRONT_END_DEBUGGING|PRINT_AUTOTUNING|CACHE_AUTOTUNING|PROTON_\w+|ENABLE_NVTX|CUPTI_\w+|CUOBJDUMP_PATH|"
    r"NVDISASM_PATH|REDIS_\w+|REPRODUCER_PATH|ENABLE_PYTHON_STACKTRACE|ENABLE_HW_TRACE|PROFILE_\w+|\w*LLVM_DEBUG\w*|"
    r"ALLOW_NON_CONSTEXPR_GLOBALS|PARTITION_SCHEDULING_\w+|"
    r"AMD_CODEGEN_PATH|HIP_\w+|LIBHIP_PATH|HSA_\w+|ROC(PROFILER|TRACER|TX)_\w+|SWAP_MIR(_ENABLE_MISCHED)?)"  # AMD alone
)


def _variables(device: torch.device) -> Iterator[Finding]:
    found = False
    for name, value in sorted(os.environ.items()):
        state, meaning = VARIABLES.get(name, ("", ""))
        if not state and name.startswith("TRITON_") and not _HARMLESS.fullmatch(name):
            state, meaning = NOTE, "what this variable does is not known here; every kernel is proved with it in force"
        switches = state and name not in ("TRITON_DEFAULT_FP_FUSION", "NVIDIA_TF32_OVERRIDE")
        off = _OFF_FOR_TORCH if name == "PYTORCH_SUM_INNER_TREE" else _OFF
        if not state or (switches and value.strip().lower() in off):
            continue
        found = True
        shown = value if re.fullmatch(r"[\w.:+-]{1,20}", value) else "(not shown)"  # a path may name a person
        yield Finding(name, state, f"set to {shown}", meaning, NOTHING if state == NOTE else f"unset {name}")
    if not found:
        yield Finding("compiler variables", OK, "none is set", "kernels are compiled as everybody else's")
    if os.environ.get("TRITON_INTERPRET", "0").strip().lower() not in _OFF:
        gpu = device.type == "cuda"
        state, then = (WARNING, "nothing is fused on the GPU") if gpu else (OK, "there is no GPU")
        meaning = f"kernels run in the interpreter, on CPU tensors; {then}"
        yield Finding("TRITON_INTERPRET", state, "is set", meaning, "unset TRITON_INTERPRET" if gpu else NOTHING)


def _cache(device: torch.device) -> Iterator[Finding]:
    if not packages.installed("triton"):
        return  # which is said above
    from triton import knobs

    folder = Path(knobs.cache.dir).absolute()
    by = [f"in {name}" for name in ("TRITON_CACHE_DIR", "TRITON_HOME") if os.environ.get(name)]
    named = by[0] if by else "~/.triton/cache"

    def finding(state: str, found: str, meaning: str, advice: str) -> Finding:
        return Finding("Triton's cache", state, f"{named}: {found}", meaning, advice)

    code = "compiled code is kept there and loaded unchecked: whoever can write there runs code as you"
    private = "chmod go-w it, or set TRITON_CACHE_DIR to a folder of your own"
    known = [path for path in (folder, *folder.parents) if path.exists()]
    problems = []
    if os.name == "posix":
        for path in known:
            facts = path.stat()
            which = "it" if path == folder else "a folder above it"
            mine = facts.st_uid in (os.getuid(), 0)
            sticky = path != folder and facts.st_mode & stat.S_ISVTX  # as /tmp: others may add, but not rename
            if facts.st_mode & stat.S_IWOTH and not sticky:
                problems.append(finding(FAILURE, f"anybody may write to {which}", code, private))
            elif facts.st_mode & stat.S_IWGRP and facts.st_gid not in (0, os.getuid()) and not sticky:
                problems.append(finding(WARNING, f"a group may write to {which}", code, private))
            if not mine:
                state = FAILURE if path == folder else WARNING
                problems.append(finding(state, f"{which} belongs to somebody else", code, private))
    if not known[0].is_dir() or not os.access(known[0], os.W_OK | os.X_OK):
        meaning = "Triton can't keep what it compiles and raises, so nothing is fused"
        problems.append(finding(FAILURE, "can't be written", meaning, "set TRITON_CACHE_DIR to a folder of your own"))
    elif shutil.disk_usage(known[0]).free < _FREE:
        meaning = "kernels that can't be kept can't be used"
        problems.append(finding(WARNING, f"less than {_FREE >> 20} MB are free", meaning, "make room"))
    yield from problems
    if not problems:
        there = "is yours alone to write" if known[0] == folder else "will be made at the first use"
        yield finding(OK, there, "compiled kernels are kept there from run to run", NOTHING)


# -- what changes the unfused run's bits -----------------------------------------------------------------------------

_CUTE_DSL = "nvidia-cutlass-dsl"
_REPLACERS = {
    _CUTE_DSL: (
        "CuTe DSL, for which torch has quack's F.rms_norm: 2.13 and 2.14 with 4.4.1, 4.4.2 or 4.5.2, 2.15 with 4.6.2, "
        "4.7.1 or 4.8.0, and with apache-tvm-ffi"
    ),
    "batch-invariant-ops": "replaces matrix products and means once it is switched on",
    "flag-gems": "replaces many ATen ops once it is switched on",
}
_QUACK = (
    "stock's own rms_norm changes where CuTe DSL is installed: quack's kernel runs it on sm_90 and sm_100 (from torch "
    "2.15 on also on sm_120), from 2.14 on by shape and alignment. bitfuse proves against whichever runs in this "
    "process, and compares the bits of every layout; the single pass of a norm may not be proved: slower"
)
_KEYS = re.compile(r"(Autograd|Autocast)?(CPU|CUDA)|ADInplaceOrView|BackendSelect|(Composite\w+|Autograd)\[alias\]")


def _overrides(device: torch.device) -> Iterator[Finding]:
    seen = "only what was imported by now is seen: a program that imports more should call bitfuse.doctor.run() itself"
    native: list[str] = []
    foreign: list[str] = []
    for op, where in _python_kernels():
        (native if "/torch/_native/" in where else foreign).append(f"{op.removeprefix('aten::')} ({_tail(where)})")
    own = torch._C._nn.scaled_dot_product_attention, torch._C._nn.linear
    for name, stock in zip(("scaled_dot_product_attention", "linear"), own, strict=True):
        if (now := getattr(torch.nn.functional, name)) is not stock:
            foreign.append(f"F.{name} ({getattr(now, '__module__', 'somebody')})")
    rms_norm = torch.nn.functional.rms_norm
    if not isinstance(rms_norm, types.FunctionType) or rms_norm.__module__ != "torch.nn.functional":
        foreign.append("F.rms_norm")
    if foreign:
        meaning = "the unfused run uses these, and kernels are proved against them: equal, but less may be fused"
        advice = "don't load what replaces them, if you want ATen's"
        yield Finding("replaced ops", WARNING, _list(foreign), f"{meaning}; {seen}", advice)
    by_quack = [op for op in native if op.startswith("_fused_rms_norm (")]
    if native:
        meaning = _QUACK if by_quack else "torch's own replacements; kernels are proved against them"
        advice = "TORCH_DISABLE_NATIVE_JIT=1 brings ATen's back" if by_quack else NOTHING
        listed = _list([*by_quack, *(op for op in native if op not in by_quack)])
        yield Finding("replaced ops, by torch", NOTE, listed, meaning, advice)
    if not foreign and not native:
        yield Finding("replaced ops", OK, "none", f"PyTorch runs ATen's own; {seen}")
    for package, what in _REPLACERS.items():
        if (version := packages.version(package)) is None:
            continue
        unused = package == _CUTE_DSL and not by_quack
        meaning = f"{what}. Here ATen's own runs" if unused else what
        advice = NOTHING if unused else "uninstall it if you want ATen's bits"
        yield Finding(package, NOTE, f"{version} is installed", meaning, advice)


def _python_kernels() -> Iterator[tuple[str, str]]:
    """(op, file and line) of ATen ops for which Python code is registered with the dispatcher for CPU or CUDA."""
    for op in torch._C._dispatch_get_all_op_names():
        if op.startswith("aten::"):
            for line in torch._C._dispatch_dump(op).splitlines():
                key, _, rest = line.partition(": registered at ")
                where = rest.split(" :: ")[0]
                if rest and _KEYS.fullmatch(key) and not re.search(r"\.(cpp|cu|h|cc|mm)(:\d+)?$", where):
                    yield op, where


_BOTH = "in both runs alike; bits differ from a run with the other setting"


def _fp32(device: torch.device) -> Iterator[Finding]:
    try:
        precision = torch.get_float32_matmul_precision()
        tf32 = precision != "highest" or torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # set by the newer `fp32_precision`, and PyTorch refuses to tell by these names
        precision = torch.backends.cuda.matmul.fp32_precision
        tf32 = precision == "tf32"
    found = f"{precision}, TF32 {'on' if tf32 else 'off'}"
    meaning = f"rounded to TF32 {_BOTH}" if tf32 else "in full fp32"
    yield Finding("fp32 matrix products", NOTE if tf32 else OK, found, meaning)


def _sums(device: torch.device) -> Iterator[Finding]:
    matmul = torch.backends.cuda.matmul
    flags = {
        "bf16 sums": (matmul.allow_bf16_reduced_precision_reduction, True),
        "fp16 sums": (matmul.allow_fp16_reduced_precision_reduction, True),
        "fp16 accumulation": (matmul.allow_fp16_accumulation, False),
    }
    changed = [f"{name}: {now}" for name, (now, default) in flags.items() if now != default]
    if changed:
        yield Finding("reduced precision", NOTE, ", ".join(changed), f"matrix products add up otherwise, {_BOTH}")
    else:
        yield Finding("reduced precision", OK, "PyTorch's defaults", "matrix products add up as they do for everybody")


def _cudnn(device: torch.device) -> Iterator[Finding]:
    if torch.backends.cudnn.benchmark:
        meaning = "convolutions are picked by timing them: frames of two runs may differ, fused or not"
        yield Finding("cuDNN", WARNING, "benchmark is on", meaning, "torch.backends.cudnn.benchmark = False")
    else:
        yield Finding("cuDNN", OK, "benchmark is off", "convolutions (the VAE, the vocoder) are picked by shape")


def _deterministic(device: torch.device) -> Iterator[Finding]:
    from torch.utils import deterministic

    on = torch.are_deterministic_algorithms_enabled()
    if on and getattr(deterministic, "fill_uninitialized_memory", False):
        meaning = "new tensors are filled before they are written: the same bits, at some cost"
        advice = "for speed: torch.utils.deterministic.fill_uninitialized_memory = False"
        yield Finding("deterministic algorithms", NOTE, "on", meaning, advice)
    else:
        meaning = "bitfuse's kernels repeat themselves either way"
        yield Finding("deterministic algorithms", OK, "on" if on else "off", meaning)


def _workspace(device: torch.device) -> Iterator[Finding]:
    name, given = "cuBLAS workspace", os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if given is None:
        yield Finding(name, OK, "PyTorch's default", "each stream has a workspace of its own")
    elif re.fullmatch(r"(:\d+:\d+)+", given, re.ASCII):
        yield Finding(name, NOTE, given[:40], f"matrix kernels are picked by what fits, {_BOTH}")
    else:
        meaning = "CUBLAS_WORKSPACE_CONFIG is not understood, so PyTorch takes its default"
        yield Finding(name, WARNING, "(not shown)", meaning, "CUBLAS_WORKSPACE_CONFIG=:4096:8, or unset it")


def _attention(device: torch.device) -> Iterator[Finding]:
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    names = ", ".join(name for name, on in enabled.items() if on) or "none"
    if all(enabled.values()):
        yield Finding("attention of PyTorch", OK, names, "PyTorch picks one by shape, the same in both runs")
    else:
        state, advice = (NOTE, NOTHING) if any(enabled.values()) else (FAILURE, "enable one: torch.backends.cuda")
        meaning = "PyTorch picks among these, in both runs alike; bits differ from a run with all of them"
        yield Finding("attention of PyTorch", state, names, meaning, advice)
    if not packages.installed("diffusers"):
        return
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    backend = registry.get_active_backend()[0]
    name = getattr(backend, "value", str(backend))
    if name == "native":
        yield Finding("attention of diffusers", OK, name, "PyTorch's own; `set_attention_backend` is respected")
    else:
        meaning = (
            "both runs use it. Whether it repeats itself is seen below, for the backends that repeat on this machine"
        )
        yield Finding("attention of diffusers", NOTE, name, meaning)


# -- hosts, and what can be shown here and now -----------------------------------------------------------------------


def _hosts(device: torch.device) -> Iterator[Finding]:
    installed = seeded.installed()
    for host in installed:
        yield from _models(host) if HOSTS[host].standalone else _sources(HOSTS[host])
        if host == "diffusers":
            yield from _connectors()
        yield from _video_coders(host)
        if host == "diffusers":
            yield from _diffusion_decoder(device)
        yield from _looked_at(host, device)
    if not installed:
        found = f"none of {', '.join(HOSTS)} is installed"
        meaning = "no model can be accelerated; operators can be called by themselves"
        yield Finding("hosts", WARNING, found, meaning, "pip install 'bitfuse[diffusers]'")
    elif missing := [f"{name} ({host.versions})" for name, host in HOSTS.items() if name not in installed]:
        meaning = (
            "bitfuse knows the sources of these versions; models of what is installed are accelerated without them"
        )
        yield Finding("other hosts", NOTE, f"not installed: {', '.join(missing)}", meaning)


def _models(host: str) -> Iterator[Finding]:
    """For each version of LTX-2 that this host has, what would be taken over in a block of its transformer."""
    for ltx in seeded.VERSIONS:
        try:
            model = explain.from_geometry(explain.of_version(ltx, 1, host))
        except ValueError as why:
            name = f"{host} {packages.version(host) or ''}".rstrip()
            advice = f"update {host}, if you want this version"
            yield Finding(f"{name}, LTX-{ltx}", NOTE, str(why), "nothing to accelerate", advice)
            continue
        yield _taken_over(host, model, f"LTX-{ltx}", "sites of a block")


def _connectors() -> Iterator[Finding]:
    try:
        from diffusers.pipelines.ltx2 import LTX2TextConnectors
    except ImportError:  # an old diffusers, of which the lines above have told
        return
    sizes = {"num_attention_heads": 30, "attention_head_dim": 128, "num_layers": 1, "num_learnable_registers": 128}
    of_each = {f"{side}_connector_{name}": size for side in ("video", "audio") for name, size in sizes.items()}
    rope = {"connector_rope_base_seq_len": 4096, "rope_theta": 1e4, "rope_double_precision": True, "rope_type": "split"}
    with torch.device("meta"):
        connectors = LTX2TextConnectors(3840, 49, **of_each, **rope, causal_temporal_positioning=False)
    yield _taken_over("diffusers", connectors, "text connectors", "sites of a block each")


def _video_coders(host: str) -> Iterator[Finding]:
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {}
    if host == "diffusers":
        from diffusers import AutoencoderKLLTX2Video

        kinds = dict.fromkeys(("decoder", "encoder"), (AutoencoderKLLTX2Video, {}))
    elif host == "ltx-core":
        from bitfuse.hosts.ltx_core_vae import HOST_CLASS, HOST_ENCODER

        resnet, up = ("res_x", {"num_layers": 1}), ("compress_all", {"residual": True, "multiplier": 2})
        kinds["decoder"] = HOST_CLASS, {"decoder_blocks": [resnet, up, resnet]}
        kinds["encoder"] = HOST_ENCODER, {"encoder_blocks": [resnet, ("compress_all_res", {}), resnet]}
    for coder, (kind, sizes) in kinds.items():
        with torch.device("meta"):
            model = torch.nn.Module.to(kind(**sizes), torch.bfloat16)
        yield _taken_over(host, model, f"video {coder}", "sites before and after convolutions", coder)


def _diffusion_decoder(device: torch.device) -> Iterator[Finding]:
    try:
        from diffusers import LTX2VideoDiffusionDecoderModel
    except ImportError:  # a diffusers without LTX-2.5's decoder
        return
    with torch.device("meta"):
        decoder = LTX2VideoDiffusionDecoderModel(decoder_stage_depths=(1, 1, 1, 1, 1))
    yield _taken_over("diffusers", decoder, "diffusion decoder", "sites of a block of each stage")
    if device.type == "cuda":
        gigabytes = torch.cuda.get_device_properties(device).total_memory / 1e9
        where = f"this GPU has {gigabytes:.0f} GB, and"
    else:
        where = "it needs a GPU at real sizes, and"
    meaning = (
        f"{where} an uncompiled FlexAttention forms every score of a volume at once: for 25 frames of 384x256 it asks "
        "for 31 GiB in one piece, which an 80 GB card has not free. A volume smaller than its window of 11x11x11 is "
        "refused. That is diffusers' own; whichever processor a decoder has is left alone"
    )
    advice = "pip install kernels and set LTX2VideoVaeNeighborhoodNattenProcessor, or compile flex_attention"
    found = "FlexAttention, uncompiled, unless another processor is set"
    yield Finding("diffusers' diffusion decoder: attention", NOTE, found, meaning, advice)


def _looked_at(host: str, device: torch.device) -> Iterator[Finding]:
    """What the bits of a host's LTX-2 depend on besides its own code, where its adapter looks at that."""
    try:
        adapter = HOSTS[host].load()
    except Exception:  # said above
        return
    for name, state, found, meaning, advice in adapter.look(device) if hasattr(adapter, "look") else ():
        yield Finding(f"{adapter.NAME}: {name}", {"ok": OK, "note": NOTE}[state], found, meaning, advice)


def _taken_over(host: str, model: Any, of: str, what: str, part: str = "") -> Finding:
    """part: the first of the names of those sites that are counted; empty: all are."""
    with hosts.accelerated(model) as handle:
        sites = [site for site in handle.sites if part in ("", site.name.partition(".")[0])]
        alone = dict.fromkeys(site.declined for site in sites if site.declined)
        taken = sum(site.declined is None for site in sites)
        return _known(f"{handle.host}, {of}", host, taken, len(sites), what, list(alone))


def _sources(host: Host) -> Iterator[Finding]:
    """Its sources by their hashes, of a host whose model can't be built without more of the host around it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = host.load()
    except Exception as error:  # of what the host imports: packages, drivers
        why = str(error) if isinstance(error, ModuleNotFoundError) else type(error).__name__  # others' text holds paths
        found = f"its LTX-2 can't be imported: {why}"
        name = f"{host.title} {packages.version(host.name) or ''}".rstrip()
        yield Finding(name, NOTE, found, "nothing to accelerate", host.install)
        return
    sources = {name: _attribute(adapter.upstream, name) for name in adapter.READ}
    sources = {name: code for name, code in sources.items() if code is not None}  # the others are of other versions
    unknown = list(why_not_read(adapter.NAME, adapter.READ, sources))
    known, what = len(sources) - len(unknown), "sources that bitfuse restates are known"
    yield _known(adapter.NAME, host.name, known, len(sources), what, unknown)


def _attribute(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _known(name: str, host: str, good: int, of: int, what: str, rest: list[str]) -> Finding:
    counts = f"{good} of {of} {what}"
    if good == of:
        return Finding(name, OK, counts, "its code is the code that bitfuse read and restates: all may be fused")
    title = HOSTS[host].title
    meaning = f"what is not known keeps the code of {title}: right bits, less gain"
    advice = f"use {title} {HOSTS[host].versions}, or a newer bitfuse"
    return Finding(name, WARNING, f"{counts}; {_list(rest)}", meaning, advice)


def _stock_block(device: torch.device) -> Iterator[Finding]:
    name = "a stock block, twice"
    if not packages.installed("diffusers"):
        yield Finding(name, NOTE, "not tried: diffusers is not installed", "nothing is known about this")
        return
    try:
        geometry, _ = seeded.geometry_for(device, 1)
        model = seeded.build(geometry, device, seed=0)
    except (packages.CannotRun, torch.OutOfMemoryError) as why:
        meaning = "whether the unfused run repeats itself is not known"
        yield Finding(name, NOTE, f"not tried: {str(why).splitlines()[0]}", meaning, "free some memory")
        return
    step = seeded.one_step(model, seeded.make_inputs(model, geometry, device, seed=0))
    first, second = step(), step()
    what = f"LTX-{geometry.version}, {geometry.video_tokens} tokens on {device.type}"
    if mismatch := compare(first, second):
        meaning = "the unfused run does not equal itself here, so nothing can equal it; bitfuse was not in use"
        advice = "look at attention, cuDNN and replaced ops above; try torch.use_deterministic_algorithms(True)"
        yield Finding(name, FAILURE, f"{what}: {mismatch.sentence}", meaning, advice, differs=True)
    else:
        meaning = "the unfused run repeats itself here, so that equality with it can be shown"
        yield Finding(name, OK, f"{what}: equal in every bit", meaning)


def _proof(device: torch.device) -> Iterator[Finding]:
    if (off := next(around(), None)) is not None:
        meaning = "whether kernels are right here is not known"
        yield Finding("a proof", NOTE, f"not tried: {off}", meaning, "switch it on")
        return
    first_of_file = {operator.reference.__module__: operator for operator in reversed(OPERATORS.values())}
    interpreted = device.type == "cpu"
    fused, reasons, differing = 0, [], []
    for operator in reversed(first_of_file.values()):
        case = next(c for c in operator.cases if c.real != interpreted)  # real ones are large for the interpreter
        args = case.arguments(device, tokens=21)
        with interpreter() if interpreted else contextlib.nullcontext(), torch.no_grad():
            route = operator.route(*args)
        fused += route.fused
        if route.reason is not None:
            reasons.append(f"{operator.name}: {route.reason}")
            differing += [operator.name] * (route.mismatch is not None)
    found = f"{fused} of {len(first_of_file)} operators, one of each file, equal in every bit"
    where = "in Triton's interpreter" if interpreted else "on this GPU"
    if not reasons:
        meaning = f"what bitfuse does before each first use works {where}; `bitfuse verify` does it for all"
        yield Finding("a proof", OK, found, meaning)
        return
    state = FAILURE if differing or not fused else WARNING
    meaning = f"the others run the PyTorch chain {where}: right bits, no gain"
    advice = (
        f"report it, please: a kernel differs ({', '.join(differing)})"
        if differing
        else "see the reasons; `bitfuse verify`"
    )
    yield Finding("a proof", state, f"{found}; {_list(reasons)}", meaning, advice, differs=bool(differing))


CHECKS: dict[str, Callable[[torch.device], Iterator[Finding]]] = {
    "switch": _switch,
    "GPU": _gpu,
    "driver": _driver,
    "torch": _torch,
    "Triton": _triton,
    "compiler variables": _variables,
    "Triton's cache": _cache,
    "replaced ops": _overrides,
    "fp32 matrix products": _fp32,
    "reduced precision": _sums,
    "cuDNN": _cudnn,
    "deterministic algorithms": _deterministic,
    "cuBLAS workspace": _workspace,
    "attention": _attention,
    "hosts": _hosts,
    "a stock block, twice": _stock_block,
    "a proof": _proof,
}


def _list(items: list[str], most: int = 4) -> str:
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _tail(where: str) -> str:
    """The last two parts of a path: what tells a package, and not where somebody keeps it."""
    return "/".join(where.split("/")[-2:])


# -- what is printed -------------------------------------------------------------------------------------------------

_COLOURS = {OK: "green", NOTE: "cyan", WARNING: "yellow", FAILURE: "bold red"}


def _print(console: Console, diagnosis: Diagnosis, everything: bool) -> None:
    """What is not ok first, the worst of it at the top. Of what is ok only names and of notes only what was found,
    but with `everything`: where all is well it is then less than a screen."""
    console.print(Text("Can this machine keep the promise?", "bold"))
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
    worst_first = sorted(diagnosis.findings, key=lambda f: (FAILURE, WARNING, NOTE, OK).index(f.state))
    shown = [f for f in worst_first if everything or f.state != OK]
    for f in shown:
        text = cell(f.name, "bold") + cell(f": {f.found}")
        if everything or f.state != NOTE:
            text += Text("\n") + cell(f"{f.meaning}.", "dim" if f.state == OK else "")
            text += Text() if f.advice == NOTHING else Text("\n") + cell(f"Do: {f.advice}.", "bold")
        table.add_row(cell(f.state, _COLOURS[f.state]), text)
    if rest := [f.name for f in diagnosis.findings if f not in shown]:
        table.add_row(cell(OK, _COLOURS[OK]), cell("; ".join(rest)))
    console.print(table)
    states = [f.state for f in diagnosis.findings]
    counts = ", ".join(f"{states.count(state)} {state}" for state in (OK, NOTE, WARNING, FAILURE))
    verdict = {
        0: "Nothing found here keeps bitfuse from its promise.",
        1: "Bits differ here that must be equal: see above.",
        2: "This machine can't keep the promise as it is: see the failures above.",
    }[diagnosis.exit_code]
    more = "" if everything else " What each of them means: bitfuse doctor --all"
    console.print(f"{counts}. {verdict}{more}", highlight=False)
