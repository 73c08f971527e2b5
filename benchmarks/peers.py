"""Each operator beside whoever else fuses the same chain: time, and how many elements have other bits than eager's.

    python benchmarks/peers.py --peers .peers --out out/peers.json     # two to three minutes
    TRITON_INTERPRET=1 python benchmarks/peers.py --tiny --out out/peers.json     # tries the script on a CPU

By turns in one process, with a cold L2: the PyTorch chain, bitfuse, torch.compile in its modes, and the functions of
SGLang, vLLM-Omni, comfy-kitchen, KJNodes and quack, as far as they are in the folder `--peers` or installed
(benchmarks/carry-peers.txt). Of SGLang and vLLM-Omni the modules of these functions alone are loaded, and what they ask
of the rest is stood in for. A peer's first result is compared with eager's, bit for bit on integer views, before it is
timed; it need not be equal, bitfuse's has to. A peer that can't be had, or fails, has a row that says why.
Exit code 1 where a bit of bitfuse's differs, 2 where an operator could not be tried.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import importlib.util
import json
import re
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
import triton.language
from torch import Tensor

import bitfuse
from bitfuse.core.bits import as_tuple
from bitfuse.tools import packages
from bitfuse.tools.bench.measure import interleaved
from bitfuse.tools.machine import machine

FOLDER = Path(".peers")
KJNODES = FOLDER / "ltxv_nodes.py"
Call = Callable[[], Any]
_JIT = ThreadPoolExecutor(4)  # compilers of peers' CUDA kernels run while the first operators are timed


class Absent(Exception):
    """This peer can't be had here; the message says why."""


# -- peers' modules ----------------------------------------------------------------------------------------------------


def on_path(part: str) -> list[Path]:
    """What of this name there is in --peers and on Python's path."""
    return [found for entry in sys.path if (found := Path(entry).resolve() / part).exists()]


def bare(name: str) -> None:
    """A package on the path of whose own `__init__` nothing runs: its modules can then be imported one by one."""
    if name not in sys.modules:
        part = name.replace(".", "/")
        folders = [str(folder) for folder in on_path(part) if folder.is_dir()]
        if not folders:
            raise Absent(f"not installed: no folder {part} on Python's path")
        module = types.ModuleType(name)
        module.__path__ = folders
        sys.modules[name] = module


def stand_in(name: str, **attributes: Any) -> None:
    if name not in sys.modules:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes, __path__=[])


def on_cuda() -> bool:
    return torch.cuda.is_available()


def sglang(module: str) -> Any:
    """A module of `sglang.kernels`, without SGLang."""
    for name in ("", ".srt", ".kernels", ".kernels.ops", ".kernels.ops.diffusion"):
        bare(f"sglang{name}")
    stand_in("sglang.srt.utils")
    # in eager, SGLang's custom op calls the function itself as well
    stand_in("sglang.srt.utils.custom_op", register_custom_op=lambda function=None, **_: function or (lambda f: f))
    stand_in("sglang.srt.utils.common", is_cuda=on_cuda, get_cuda_version=lambda: _version(torch.version.cuda))
    stand_in("sglang.multimodal_gen")
    stand_in("sglang.multimodal_gen.runtime")
    platform = types.SimpleNamespace(
        is_cuda=on_cuda, **{f"is_{other}": lambda: False for other in ("hip", "npu", "mps", "musa", "xpu")}
    )
    stand_in("sglang.multimodal_gen.runtime.platforms", current_platform=platform)
    return importlib.import_module(f"sglang.kernels.{module}")


def vllm_omni(module: str) -> Any:
    """A module of vLLM-Omni's operators for LTX-2, without vLLM."""
    for name in ("", ".diffusion", ".diffusion.models", ".diffusion.models.ltx2"):
        bare(f"vllm_omni{name}")
    stand_in("vllm")
    stand_in("vllm.triton_utils", HAS_TRITON=True, tl=triton.language, triton=triton)
    stand_in("vllm.utils")
    stand_in("vllm.utils.import_utils", has_tilelang=lambda: False)
    platform = types.SimpleNamespace(is_cuda=on_cuda, is_available=on_cuda, get_device_capability=_capability)
    stand_in("vllm_omni.platforms", current_omni_platform=platform)
    return importlib.import_module(f"vllm_omni.diffusion.models.ltx2.ops.{module}")


def _capability(device_id: int) -> Any:
    major, minor = torch.cuda.get_device_capability(device_id)
    return types.SimpleNamespace(to_int=lambda: 10 * major + minor)


def installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        raise Absent("not installed" if missing else f"its import fails: {error}") from error


@functools.cache
def kjnodes() -> Any:
    """The part of KJNodes' file that has its fused kernels, and nothing of ComfyUI."""
    if not KJNODES.is_file():
        raise Absent(f"not given: --kjnodes FILE, or {KJNODES.name} in --peers")
    text = KJNODES.read_text()
    part = text[text.index("try:\n    import triton\n") : text.index("def _apply_text_cross_attention_patched")]
    alone = Path(tempfile.mkdtemp()) / "kjnodes_ltx2.py"  # a file, since Triton reads a kernel's source
    alone.write_text("import torch\n\n" + part)
    spec = importlib.util.spec_from_file_location(alone.stem, alone)
    if spec is None or spec.loader is None:
        raise ImportError(f"{alone} can't be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def versions() -> dict[str, str | None]:
    found = {name: packages.version(name) for name in ("sglang", "vllm-omni", "comfy-kitchen", "quack-kernels")}
    if KJNODES.is_file():
        found["KJNodes, SHA-256 of ltxv_nodes.py"] = hashlib.sha256(KJNODES.read_bytes()).hexdigest()[:16]
    return found


# -- ways to compute an operator: each takes its arguments and gives a call without any --------------------------------

WAYS: dict[str, list[tuple[str, Callable[..., Call]]]] = {}


def way(name: str, *operators: str) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    def register(make: Callable[..., Call]) -> Callable[..., Call]:
        for operator in operators:
            WAYS.setdefault(operator, []).append((name, make))
        return make

    return register


def compiled(reference: Callable[..., Any], args: tuple[Any, ...], **how: Any) -> Call:
    return functools.partial(torch.compile(reference, dynamic=False, **how), *args)


def strict(reference: Callable[..., Any], args: tuple[Any, ...]) -> Call:
    if _version(torch.__version__) < (2, 14):
        raise Absent(f"of torch 2.14 and newer, this is {torch.__version__}")
    return compiled(reference, args, numerics="strict")


COMPILED = {
    "torch.compile": compiled,
    "torch.compile, emulate_precision_casts": functools.partial(compiled, options={"emulate_precision_casts": True}),
    'torch.compile, numerics="strict"': strict,
}


def _version(text: str | None) -> tuple[int, int]:
    major, minor = (text or "0.0").split(".")[:2]
    return int(major), int(minor)


def answered(function: Callable[..., Any], *args: Any) -> Call:
    """vLLM-Omni's functions give None where they leave a call to PyTorch."""

    def call() -> Any:
        out = function(*args)
        if out is None:
            raise Absent("it leaves this call to PyTorch")
        return out

    return call


_MODULATE = ("ops.diffusion.modulate.modulate_scale_shift_jit", "_jit_modulate_scale_shift_kernel", torch.bfloat16)
_RESIDUAL = ("kda_kernels.residual_gate_add_jit", "_jit_residual_gate_add_module", torch.bfloat16)
_QK_ROPE = ("kda_kernels.ltx2_qknorm_split_rope_jit", "_jit_ltx2_qknorm_split_rope_module", True)
_GRID_ROPE = ("ops.diffusion.rope.ltx25_decoder_rope_jit", "_jit_ltx25_decoder_rope_module", torch.bfloat16)
BUILT = "built"  # the folder of those that were compiled before
OF_SGLANG = (_MODULATE, _RESIDUAL, _QK_ROPE, _GRID_ROPE)
"""SGLang's CUDA kernels: the module, what compiles it there, and with which arguments."""


def built(module: str, maker: str, *args: Any) -> Any:
    """A module of SGLang's whose CUDA kernel is compiled: by `--build` before, or here and now where there is nvcc."""
    if not on_cuda():
        raise Absent("its CUDA kernel needs a GPU")
    _building(module, maker, *args).result(timeout=90)
    return sglang(module)


@functools.cache
def _building(module: str, maker: str, *args: Any) -> Future[Any]:
    found = sglang(module)
    if libraries := on_path(f"{BUILT}/{maker}.so"):
        found.load_jit = lambda *_, **__: importlib.import_module("tvm_ffi").load_module(str(libraries[0]))
    return _JIT.submit(getattr(found, maker), *args)


def build(capability: str) -> None:
    """Compile SGLang's CUDA kernels for a GPU of that capability ("9.0") into --peers, by SGLang's own `load_jit`."""
    arch, loader = sglang("jit.utils.arch"), sglang("jit.utils.compile.loader")
    for module, maker, *args in OF_SGLANG:
        library = FOLDER.resolve() / BUILT / f"{maker}.so"
        library.parent.mkdir(parents=True, exist_ok=True)

        def keep(compiled: Path, library: Path = library) -> Any:  # instead of loading it, which takes a GPU
            shutil.copy(compiled, library)
            return mock.MagicMock()

        with mock.patch.object(loader, "_load", keep), arch.override_jit_cuda_arch(*_version(capability)):
            getattr(sglang(module), maker)(*args)
        print(library)


@way("SGLang, exact", "split_rotary_per_op")
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Call:
    return functools.partial(sglang("ops.diffusion.rope.ltx2_rotary_triton").apply_ltx2_split_rotary_emb, x, cos, sin)


@way("comfy-kitchen", "split_rotary_per_op", "split_rotary_second_rounded")
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Call:
    rope, heads, matrix = installed("comfy_kitchen").apply_rope_split_half1, cos.shape[1], rotation(cos, sin)
    return lambda: rope(x.unflatten(2, (heads, -1)), matrix).flatten(2)


def rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """comfy-kitchen's matrix [B, T, H, D/2, 2, 2] of tables [B, H, T, D/2]."""
    cos, sin = cos.swapaxes(1, 2), sin.swapaxes(1, 2)
    return torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2)


@way("KJNodes, with PyTorch's norms", "qk_rms_norm_split_rotary_per_op", "qk_rms_norm_split_rotary_second_rounded")
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Call:
    rope, tables = kjnodes().fused_rope_qk, (cos.contiguous(), sin.contiguous(), True)
    return lambda: rope(*normed(q, k, q_weight, k_weight), tables)  # turned in place


def normed(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    return F.rms_norm(q, q.shape[-1:], q_weight, 1e-6), F.rms_norm(k, k.shape[-1:], k_weight, 1e-6)


@way(
    "comfy-kitchen, with PyTorch's norms", "qk_rms_norm_split_rotary_per_op", "qk_rms_norm_split_rotary_second_rounded"
)
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Call:
    rope, heads, matrix = installed("comfy_kitchen").apply_rope_split_half, cos.shape[1], rotation(cos, sin)

    def call() -> tuple[Tensor, ...]:
        of_heads = (t.unflatten(2, (heads, -1)) for t in normed(q, k, q_weight, k_weight))
        return tuple(t.flatten(2) for t in rope(*of_heads, matrix))

    return call


@way("SGLang, exact", "qk_rms_norm_split_rotary_per_op")
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Call:
    rope = sglang("ops.diffusion.rope.ltx2_rotary_triton").apply_ltx2_split_rotary_emb
    return lambda: tuple(rope(t, cos, sin) for t in normed(q, k, q_weight, k_weight))


@way("SGLang, lossless", "qk_rms_norm_split_rotary_per_op")
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Call:
    kernel, heads = built(*_QK_ROPE).ltx2_qknorm_split_rope_cuda, cos.shape[1]
    args = (q, cos, sin, q_weight, k, cos, sin, k_weight)
    more = {"eps": 1e-6, "num_heads": heads, "head_dim": q.shape[2] // heads, "allow_sm90": True}
    return functools.partial(kernel, *args, **more)


@way("quack", "qk_rms_norm")
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *rest: Any) -> Call:
    norm = installed("quack").rmsnorm
    return lambda: (norm(q, q_weight, eps=1e-6), norm(k, k_weight, eps=1e-6))


@way("SGLang, exact", "head_gate")
def _(out: Tensor, logits: Tensor) -> Call:
    gate = sglang("ops.diffusion.modulate.head_gate_triton").head_gate_mul
    return lambda: gate(out, torch.sigmoid(logits))


@way("comfy-kitchen", "rms_norm_modulate_native")
def _(x: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> Call:
    return functools.partial(installed("comfy_kitchen").rms_adaln, x, scale, shift, 1e-6)


@way("KJNodes", "rms_norm_modulate_native")
def _(x: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> Call:
    return functools.partial(kjnodes().fused_norm_scale_shift, x, scale, shift)


@way("SGLang, exact, with PyTorch's norm", "rms_norm_modulate_native")
def _(x: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> Call:
    kernel = built(*_MODULATE).modulate_scale_shift_cuda
    rows = scale.squeeze(1).contiguous(), shift.squeeze(1).contiguous()
    return lambda: kernel(F.rms_norm(x, x.shape[-1:], eps=1e-6), *rows)


@way("SGLang, lossless", "rms_norm_modulate_native")
def _(x: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> Call:
    kernel = sglang("ops.diffusion.norm.rmsnorm_scale_shift_bitexact").fused_rmsnorm_scale_shift_bitexact
    return functools.partial(kernel, x, x.new_ones(x.shape[-1]), scale.contiguous(), shift.contiguous(), 1e-6)


@way("SGLang, of ERNIE-Image", "residual_rms_norm_modulate_native")
def _(x: Tensor, y: Tensor, gate: Tensor, gate_table: None, mask: None, scale: Tensor, shift: Tensor, *_: Any) -> Call:
    module = sglang("ops.diffusion.norm.rmsnorm_scale_shift_bitexact")
    kernel, weight = module.fused_scale_residual_rmsnorm_scale_shift_bitexact, x.new_ones(x.shape[-1])
    rows = [row.contiguous() for row in (gate, scale, shift)]
    return lambda: kernel(x, y, rows[0], weight, *rows[1:], 1e-6)[::-1]


@way("SGLang, exact", "modulate")
def _(x: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> Call:
    kernel = built(*_MODULATE).modulate_scale_shift_cuda
    return functools.partial(kernel, x, scale.squeeze(1).contiguous(), shift.squeeze(1).contiguous())


@way("SGLang, exact", "gated_residual")
def _(x: Tensor, y: Tensor, gate: Tensor, *rest: Any) -> Call:
    return functools.partial(built(*_RESIDUAL).residual_gate_add, x, y, gate.contiguous())


@way("vLLM-Omni, its kernel alone, in place", "swiglu")
def _(gate: Tensor, up: Tensor) -> Call:
    kernel, gate = vllm_omni("swiglu")._silu_mul_inplace, gate.clone()

    def call() -> Tensor:
        kernel(gate, up)
        return gate

    return call


@way("SGLang, exact", "swiglu")
def _(gate: Tensor, up: Tensor) -> Call:
    return functools.partial(sglang("ops.diffusion.activation.silu_mul_bitexact").fused_silu_mul_bitexact, gate, up)


@way("vLLM-Omni, which does not store x + y", "residual_rms_norm_modulate_weighted")
def _(x: Tensor, y: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *rest: Any) -> Call:
    function = vllm_omni("residual_adaln").try_residual_rms_norm_modulate_exact
    return answered(function, x, y, None, weight, scale.contiguous(), shift.contiguous(), 1e-6)


def on_grid(q: Tensor, tables: tuple[Tensor, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape [B, F, H, W, heads, D] of queries, and how many channels each axis turns."""
    channels = tuple(2 * cos.shape[1] for cos in tables[::2])
    grid = tuple(cos.shape[0] for cos in tables[::2])
    return (q.shape[0], *grid, -1, sum(channels)), channels


@way("vLLM-Omni", "qk_rms_norm_grid_rotary")
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *rest: Any) -> Call:
    *tables, scale, eps = rest
    shape, channels = on_grid(q, tuple(tables))
    function = vllm_omni("qk_rms_norm").try_qk_rms_norm_scale_rope_3d_exact
    call = answered(function, q.view(shape), k.view(shape), q_weight, k_weight, eps, scale, channels, 1e4)
    return lambda: tuple(out.view(q.shape) for out in call())


@way("SGLang, exact, with PyTorch's norms", "qk_rms_norm_grid_rotary")
def _(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, *rest: Any) -> Call:
    *tables, scale, eps = rest
    shape, channels = on_grid(q, tuple(tables))
    kernel = built(*_GRID_ROPE).fused_ltx25_decoder_rope

    def call() -> tuple[Tensor, ...]:
        query = F.rms_norm(q.view(shape), shape[-1:], q_weight, eps) * scale
        key = F.rms_norm(k.view(shape), shape[-1:], k_weight, eps)
        return tuple(out.view(q.shape) for out in kernel(query, key, *tables, *channels[:2]))

    return call


ELSEWHERE = [
    {"peer": "cache-dit 1.5.3", "reason": "its wheel has no fused norm, modulation or rotary embedding to compare"},
]


# -- what is tried -----------------------------------------------------------------------------------------------------

BY_TOKENS = (  # those first for which no peer has to compile CUDA
    "split_rotary_fp32",
    "split_rotary_per_op",
    "split_rotary_second_rounded",
    "qk_rms_norm_split_rotary_fp32",
    "qk_rms_norm",
    "head_gate",
    "rms_norm_modulate_composed",
    "residual_rms_norm_modulate_native",
    "residual_rms_norm_modulate_composed",
    "gelu_tanh",
    "qk_rms_norm_split_rotary_second_rounded",
    "rms_norm_modulate_native",
    "modulate",
    "gated_residual",
    "qk_rms_norm_split_rotary_per_op",
)
OF_DECODER = {
    "swiglu": "a tile of stage 5",
    "residual_rms_norm_modulate_weighted": "stage 5, a block's first norm",
    "qk_rms_norm_grid_rotary": "stage 5, 768x512x121",
}
EMULATED = ("split_rotary_second_rounded", "qk_rms_norm_split_rotary_second_rounded")
"""Operators whose chain is a peer's kernel: the reference emulates it in fp64, and is no chain that anybody runs."""
LONGEST = "video, 1536x1024x121", "1536x1024x121"


@dataclass(frozen=True)
class Task:
    operator: Any
    case: Any
    tokens: int | None

    def arguments(self, device: torch.device, tiny: bool) -> tuple[Any, ...]:
        tokens = 24 if tiny else self.tokens
        args = self.case.arguments(device, tokens=tokens)
        if self.operator.name == "qk_rms_norm_grid_rotary":
            args = (*args[:4], *(table for cos in args[4:10:2] for table in host_tables(cos)), *args[10:])
        return args


def host_tables(cos: Tensor) -> tuple[Tensor, Tensor]:
    """For as many places and pairs as in `cos`, as LTX-2.5's decoder computes them: frequencies in fp64."""
    places, pairs = cos.shape
    powers = torch.arange(pairs, dtype=torch.float64, device=cos.device) / pairs
    angles = torch.arange(places, dtype=torch.float32, device=cos.device)[:, None] * (1e4**-powers).float()
    return angles.cos(), angles.sin()


def tasks(asked: argparse.Namespace) -> Iterator[Task]:
    def wanted(name: str) -> bool:
        return not asked.only or name in asked.only

    for index, tokens in enumerate(asked.tokens):
        for name in filter(wanted, BY_TOKENS):
            operator = bitfuse.OPERATORS[name]
            yield Task(operator, ready(next(case for case in operator.cases if case.name in LONGEST)), tokens)
        for name, of in OF_DECODER.items():
            if index == 0 and wanted(name):
                operator = bitfuse.OPERATORS[name]
                yield Task(operator, ready(next(case for case in operator.cases if case.name == of)), None)


def ready(case: Any) -> Any:
    """A case whose AdaLN values are complete, without a table to be added: peers take no other."""
    return replace(case, with_tables=False) if hasattr(case, "with_tables") else case


def differing(expected: Any, found: Any) -> tuple[int, int]:
    """(elements whose bits differ, elements): of the last outputs where a peer gives fewer."""
    pairs = list(zip(reversed(as_tuple(expected)), reversed(as_tuple(found)), strict=False))
    for e, f in pairs:
        if e.shape != f.shape or e.dtype != f.dtype:
            raise ValueError(f"it gives {f.dtype} {list(f.shape)}, not {e.dtype} {list(e.shape)}")
    ints = [(e.contiguous().view(_INTEGERS[e.dtype]), f.contiguous().view(_INTEGERS[f.dtype])) for e, f in pairs]
    return sum(int((e != f).sum()) for e, f in ints), sum(e.numel() for e, _ in ints)


_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def rows(task: Task, device: torch.device, tiny: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each way to compute an operator on the same arguments."""
    operator = task.operator
    args = task.arguments(device, tiny)
    route = operator.route(*args)
    expected = operator.reference(*args)
    head = {"operator": operator.name, "case": task.case.name, "tokens": task.tokens, "x": list(args[0].shape)}
    makers: dict[str, Callable[[], Call]] = {"bitfuse": lambda: functools.partial(route.run, *args)}
    found: dict[str, dict[str, Any]] = {}
    if operator.name in EMULATED:
        found["eager"] = {**head, "way": "eager", "reason": "no PyTorch op rounds so: ComfyUI calls comfy-kitchen"}
    else:
        makers["eager"] = lambda: functools.partial(operator.reference, *args)
        makers |= {name: functools.partial(make, operator.reference, args) for name, make in COMPILED.items()}
    makers |= {name: functools.partial(make, *args) for name, make in WAYS.get(operator.name, ())}
    calls: dict[str, Call] = {}
    for name, make in makers.items():
        row = found[name] = {**head, "way": name}
        start = time.perf_counter()
        try:
            call = make()
            row["differ"], row["elements"] = differing(expected, call())
            row["first_call_s"] = round(time.perf_counter() - start, 3)
            row["share"] = row["differ"] / row["elements"]
            calls[name] = call
        except Exception as error:
            said = str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}"
            row["reason"] = " ".join(said.split())[:300]
    if not route.fused:
        found["bitfuse"]["reason"] = route.reason
    del expected
    for name, us in times(calls, device, rounds).items():
        found[name]["us"] = us
    ours = found["bitfuse"].get("us")
    for row in found.values():
        if ours and "us" in row:
            row["ratio"] = row["us"]["median"] / ours["median"]
    yield from found.values()


def times(calls: dict[str, Call], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    if device.type == "cuda":
        return interleaved(calls, device, rounds)
    found = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        us = (time.perf_counter() - start) * 1e6
        found[name] = {"median": us, "p10": us, "p90": us}
    return found


def lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """Less than 80 columns wide."""
    before = None
    for row in found:
        if (at := (row["operator"], row["x"])) != before:
            before = at
            yield f"{row['operator'][:46]:47}{'x'.join(map(str, row['x']))}"
        name = f"    {row['way'][:42]:43}"
        if "us" in row:
            yield f"{name}{row['us']['median']:9.1f}{row.get('ratio', 0.0):7.2f}x{row['share']:9.4%} differ"
        else:
            yield f"{name}{row['reason'][:32]}"


def main() -> None:
    global FOLDER, KJNODES
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--build", metavar="CAPABILITY", help="only compile SGLang's CUDA kernels, for 9.0 say")
    parser.add_argument("--peers", type=Path, default=FOLDER, help="folder with the peers' packages")
    parser.add_argument("--kjnodes", type=Path, help="nodes/ltxv_nodes.py of ComfyUI-KJNodes; default: in --peers")
    parser.add_argument("--only", action="append", choices=(*BY_TOKENS, *OF_DECODER), help="operators; default: all")
    parser.add_argument("--tokens", type=int, nargs="+", default=[6144, 1536, 24576])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=170.0, help="no operator is begun after so many")
    parser.add_argument("--tiny", action="store_true", help="try the script on few tokens, on any device")
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error(f"--rounds {asked.rounds}; accepted: 1 or more")
    if too_few := [count for count in asked.tokens if count < 1]:
        parser.error(f"--tokens {too_few[0]}; accepted: 1 or more")
    if asked.build and not re.fullmatch(r"\d+\.\d+", asked.build):
        parser.error(f"--build {asked.build!r}; accepted: a capability, as 9.0")
    FOLDER, KJNODES = asked.peers, asked.kjnodes or asked.peers / "ltxv_nodes.py"
    sys.path.insert(0, str(FOLDER.resolve()))
    if asked.build:
        build(asked.build)
        return
    if asked.out is None:
        parser.error("--out is missing; accepted: a file for the JSON")
    device = torch.device("cuda" if on_cuda() else "cpu")
    if device.type == "cpu" and not asked.tiny:
        parser.error("there is no CUDA device; accepted without one: --tiny, with TRITON_INTERPRET=1")
    if asked.tiny:
        asked.tokens = asked.tokens[:1]
    start = time.perf_counter()
    found: dict[str, Any] = {"what": "operators and their peers by turns", "machine": machine(device)}
    found |= {"peers": versions(), "elsewhere": ELSEWHERE, "errors": {}, "not_begun": [], "rows": []}

    def keep() -> None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=1))

    for of in OF_SGLANG if on_cuda() else ():
        try:
            _building(*of)
        except Exception as error:  # their rows will say so
            print(f"{of[0]}: {error}", flush=True)
    with torch.no_grad():
        for task in tasks(asked):
            name = f"{task.operator.name}, {task.tokens or task.case.name}"
            if time.perf_counter() - start > asked.seconds:
                found["not_begun"].append(name)
                continue
            try:
                new = list(rows(task, device, asked.tiny, asked.rounds))
                found["rows"] += new
                print("\n".join(lines(new)), flush=True)
            except Exception as error:
                found["errors"][name] = f"{type(error).__name__}: {error}"
                print(f"{name} FAILED: {error}", flush=True)
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            keep()
    _JIT.shutdown(wait=False, cancel_futures=True)
    ours = [row for row in found["rows"] if row["way"] == "bitfuse"]
    equal = all("reason" not in row and row["differ"] == 0 for row in ours)
    found["seconds"] = round(time.perf_counter() - start, 1)
    found["exit_code"] = 2 if found["errors"] else 0 if equal else 1
    keep()
    print(f"{found['seconds']} s; not begun: {', '.join(found['not_begun']) or 'none'}", flush=True)
    raise SystemExit(found["exit_code"])


if __name__ == "__main__":
    main()
