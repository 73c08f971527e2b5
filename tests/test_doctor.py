"""`bitfuse doctor`: every check can be brought to say each thing that it has to say, and none can break the others."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import sys

import pytest
import torch
from rich.console import Console

import bitfuse
import sglang_host
from bitfuse.core.bits import Mismatch
from bitfuse.core.operator import Operator, Route
from bitfuse.tools import doctor, packages, seeded
from bitfuse.tools.doctor import CHECKS, FAILURE, NOTE, NOTHING, OK, VARIABLES, WARNING

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STATES = {OK, NOTE, WARNING, FAILURE}

needs_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


def check(name, device=CPU):
    return list(CHECKS[name](device))


def only(name, device=CPU):
    (finding,) = check(name, device)
    assert finding.state in STATES
    assert finding.found
    assert finding.meaning
    assert finding.advice
    return finding


@pytest.fixture(autouse=True)
def a_clean_environment(monkeypatch):
    for name in [*VARIABLES, "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET"]:
        monkeypatch.delenv(name, raising=False)


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    printed = io.StringIO()
    return doctor.run(Console(file=printed, width=120), "cpu", everything=True), printed.getvalue()


@needs_diffusers
def test_on_the_cpu_nothing_is_a_failure(whole):
    diagnosis, _ = whole
    states = {f.name: f.state for f in diagnosis.findings}
    assert states["a stock block, twice"] == states["a proof"] == OK
    assert FAILURE not in states.values()
    assert diagnosis.exit_code == 0


def test_every_line_says_what_it_means_and_what_to_do(whole):
    diagnosis, printed = whole
    for f in diagnosis.findings:
        assert f.state in STATES
        assert f.name
        assert f.found
        assert f.meaning
        assert not f.meaning.endswith("."), "the table ends the sentence"
        assert f.advice == NOTHING or f.state != OK, f"{f.name} is ok, and yet there is something to do"
        for said in (f.name, f.found, f.meaning, "" if f.advice == NOTHING else f"Do: {f.advice}."):
            assert "".join(said.split()) in "".join(printed.split())
    assert "Nothing found here keeps bitfuse from its promise." in printed


def brief(diagnosis, everything=False):
    printed = io.StringIO()
    doctor._print(Console(file=printed, width=80), diagnosis, everything)
    return printed.getvalue()


@needs_diffusers
def test_where_all_is_well_it_is_less_than_a_screen(whole):
    """Of 80 columns and 24 lines, with every check that there is and the notes that a machine has."""
    diagnosis, _ = whole
    well = doctor.Diagnosis([f for f in diagnosis.findings if f.state in (OK, NOTE)])
    assert len(well.findings) > 15
    lines = brief(well).splitlines()
    assert len(lines) < 24
    assert all(f.name.split()[0] in " ".join(lines) for f in well.findings), "what was looked at is named"
    assert len(brief(well, everything=True).splitlines()) > 2 * len(lines)


@pytest.mark.parametrize("everything", [False, True])
def test_the_worst_comes_first(everything):
    found = [
        doctor.Finding(f"the {state}", state, f"{state} found", f"means {state}", f"{state} advice")
        for state in (OK, NOTE, FAILURE, WARNING)
    ]
    printed = brief(doctor.Diagnosis(found), everything)
    places = [printed.index(f"the {state}") for state in (FAILURE, WARNING, NOTE, OK)]
    assert places == sorted(places)
    for state in (FAILURE, WARNING):
        assert all(words in printed for words in (f"{state} found", f"means {state}", f"Do: {state} advice."))
    assert "note found" in printed
    assert [f"means {state}" in printed for state in (NOTE, OK)] == [everything, everything]
    assert ("--all" in printed) != everything


def test_the_json_names_no_person_and_no_place(whole):
    diagnosis, _ = whole
    document = json.loads(json.dumps(diagnosis.as_dict()))
    assert document["exit_code"] == 0
    assert {f["name"] for f in document["findings"]} == {f.name for f in diagnosis.findings}
    assert document["machine"]["torch"] == torch.__version__
    for private in (os.uname().nodename, os.path.expanduser("~"), os.path.dirname(torch.__file__)):
        assert private not in json.dumps(document)


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([OK, NOTE, WARNING], 0),
        ([OK, FAILURE], 2),
        ([FAILURE, "differs"], 1),
    ],
)
def test_exit_codes(findings, code, monkeypatch):
    def checking(state):
        return lambda device: [
            doctor.Finding("x", state if state in STATES else FAILURE, "", "", "", state not in STATES)
        ]

    monkeypatch.setattr(doctor, "CHECKS", {state: checking(state) for state in findings})
    assert doctor.run(Console(file=io.StringIO()), "cpu").exit_code == code


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_that_raises_is_a_warning_in_words(name, monkeypatch):
    def raising(device):
        raise PermissionError(13, "Permission denied", "/home/somebody/secret")
        yield

    monkeypatch.setattr(
        doctor, "CHECKS", {name: raising, "switch": CHECKS["switch"]} if name != "switch" else {name: raising}
    )
    found = list(doctor.examine("cpu"))
    assert (found[0].name, found[0].state) == (name, WARNING)
    assert found[0].found == "the check failed (PermissionError: Permission denied)"
    assert len(found) == len(doctor.CHECKS), "the others were made"


def test_an_interruption_is_not_swallowed(monkeypatch):
    def interrupted(device):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "CHECKS", {"switch": interrupted})
    with pytest.raises(KeyboardInterrupt):
        list(doctor.examine("cpu"))


# -- the device and the libraries --------------------------------------------------------------------------------------


def test_switched_off():
    assert only("switch").state == OK
    bitfuse.disable()
    try:
        found = only("switch")
        proved = only("a proof")
    finally:
        bitfuse.enable()
    assert (found.state, found.found) == (WARNING, "bitfuse is off (BITFUSE=0 or bitfuse.disable())")
    assert (proved.state, proved.found) == (NOTE, f"not tried: {found.found}")


def test_autocast_is_seen():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast is on" in only("switch").found


def gpus(monkeypatch, *capabilities, hip=None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU of sm_{capabilities[i]}")
    return [(f.name, f.state) for f in check("GPU", CUDA)]


def test_gpus(monkeypatch):
    assert gpus(monkeypatch, (9, 0)) == [("GPU 0", OK)]
    assert gpus(monkeypatch, (8, 0), (8, 0)) == [("GPU 0", OK), ("GPU 1", OK)]
    assert gpus(monkeypatch, (9, 0), (7, 5)) == [("GPU 0", OK), ("GPU 1", WARNING), ("GPUs", NOTE)]
    assert gpus(monkeypatch, (7, 5)) == [("GPU 0", WARNING), ("GPU", FAILURE)]
    assert gpus(monkeypatch, (9, 4), hip="6.4") == [("GPU", FAILURE)]


def test_no_gpu_says_what_still_works_and_why_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = only("GPU")
    assert found.state == WARNING
    assert "is built without CUDA" in found.found
    for command in ("verify", "demo", "explain"):
        assert f"bitfuse {command}" in found.meaning
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_NVIDIA", doctor.Path("/nowhere"))
    assert only("GPU").found == "none"
    monkeypatch.setattr(doctor, "_NVIDIA", doctor.Path(__file__))
    assert "there is an NVIDIA driver; torch needs CUDA 13.0" in only("GPU").found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert only("GPU").advice == "unset CUDA_VISIBLE_DEVICES"


def test_driver(monkeypatch):
    if not torch.cuda.is_available():
        assert check("driver") == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for version, state in (("580.159", OK), (None, NOTE)):
        monkeypatch.setattr(doctor, "machine", lambda device, version=version: {"driver": version})
        assert only("driver", CUDA).state == state


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.11.0+cu130", OK), ("2.13.0", OK), ("2.10.1", FAILURE), ("1.13", FAILURE), ("2.14.0.dev20261101", NOTE)],
)
def test_torch(version, state, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    found = only("torch")
    assert found.state == state
    assert found.found.startswith(f"{version}, git {torch.version.git_version[:12]}")


def test_triton(monkeypatch):
    triton = pytest.importorskip("triton")
    assert only("Triton", CUDA).state == OK
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert (only("Triton", CUDA).state, only("Triton").state) == (FAILURE, WARNING)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert (only("Triton", CUDA).state, only("Triton").state) == (FAILURE, WARNING)


# -- what changes the code that is compiled ----------------------------------------------------------------------------


def test_no_variable_is_set():
    assert only("compiler variables").state == OK


@pytest.mark.parametrize("name", VARIABLES)
def test_every_variable_is_reported(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    found = only("compiler variables")
    assert (found.name, found.state, found.found) == (name, VARIABLES[name][0], "set to 1")
    assert found.advice == (NOTHING if found.state == NOTE else f"unset {name}")
    monkeypatch.setenv(name, "/home/somebody/a tool")
    assert only("compiler variables").found == "set to (not shown)", "a path may name a person"


@pytest.mark.parametrize("value", ["", "0", "false", "OFF"])
def test_what_is_switched_off_is_not_reported(value, monkeypatch):
    monkeypatch.setenv("DISABLE_LLVM_OPT", value)
    assert only("compiler variables").state == OK


@pytest.mark.parametrize(("value", "reported"), [("", False), ("0", False), ("1", True), ("false", True)])
def test_what_torch_takes_for_a_yes(value, reported, monkeypatch):
    monkeypatch.setenv("PYTORCH_SUM_INNER_TREE", value)
    assert (only("compiler variables").name == "PYTORCH_SUM_INNER_TREE") == reported


NEWER = """
    TRITON_ROCPROFILER_SDK_INCLUDE_PATH TRITON_ROCPROFILER_SDK_LIB_PATH TRITON_SWAP_MIR_ENABLE_MISCHED
    TRITON_CUPTI_LIB_BLACKWELL_PATH TRITON_HIP_USE_EXPERT_SCHEDULING TRITON_PROFILE_METRIC_BUFFER_SIZE
    TRITON_AMD_CODEGEN_PATH TRITON_FPSAN_HOMOMORPHIC_CASTS TRITON_HSA_RUNTIME_PATH TRITON_ROCTX_LIBRARY
    TRITON_ROCTRACER_LIB_PATH TRITON_FORCE_DISABLE_FP_FUSION TRITON_PLUGIN_PATHS TRITON_DEFAULT_BACKEND
"""  # of Triton 3.8 and 3.9, whichever is installed here


@pytest.mark.parametrize("name", NEWER.split())
def test_variables_of_newer_tritons_are_known(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert "is not known here" not in only("compiler variables").meaning


def test_a_default_for_fusion_is_reported_either_way(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert only("compiler variables").name == "TRITON_DEFAULT_FP_FUSION"


def test_triton_variables_that_are_not_known(monkeypatch):
    monkeypatch.setenv("TRITON_HOME", "/tmp")
    monkeypatch.setenv("TRITON_HIP_USE_ASYNC_COPY", "1")
    assert only("compiler variables").state == OK, "these do no harm"
    monkeypatch.setenv("TRITON_OF_NEXT_YEAR", "1")
    assert (only("compiler variables").name, only("compiler variables").state) == ("TRITON_OF_NEXT_YEAR", NOTE)


def test_every_variable_that_the_installed_triton_reads_is_known(monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    groups = [group for group in vars(knobs).values() if isinstance(group, knobs.base_knobs)]
    names = [knob.key for group in groups for knob in group.knob_descriptors.values()]
    assert len(names) > 30
    for name in names:
        monkeypatch.setenv(name, "1")
    unknown = [f.name for f in check("compiler variables") if "is not known here" in f.meaning]
    assert unknown == []


def test_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [f.state for f in check("compiler variables", CUDA)] == [OK, WARNING]
    assert [f.state for f in check("compiler variables")] == [OK, OK]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    tmp_path.chmod(0o755)
    folder = tmp_path / "above" / "cache"
    folder.mkdir(parents=True, mode=0o755)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    return folder


def test_a_cache_of_ones_own(cache):
    found = only("Triton's cache")
    assert (found.state, found.found) == (OK, "in TRITON_CACHE_DIR: is yours alone to write")
    assert str(cache) not in str(found)
    cache.rmdir()
    assert only("Triton's cache").found == "in TRITON_CACHE_DIR: will be made at the first use"


def test_the_cache_in_triton_home_and_in_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert only("Triton's cache").found.startswith("in TRITON_HOME: will be made")
    monkeypatch.delenv("TRITON_HOME")
    assert all(f.found.startswith("~/.triton/cache: ") for f in check("Triton's cache"))


@posix
def test_a_cache_that_others_can_write(cache):
    cache.chmod(0o777)
    found = only("Triton's cache")
    assert found.state == FAILURE
    assert "anybody may write to it" in found.found
    cache.chmod(0o1777)
    assert only("Triton's cache").state == FAILURE, "the sticky bit keeps nobody from adding"
    cache.chmod(0o755)
    cache.parent.chmod(0o777)
    assert "anybody may write to a folder above it" in only("Triton's cache").found
    cache.parent.chmod(0o1777)
    assert only("Triton's cache").state == OK, "as in /tmp"


@posix
def test_a_cache_of_somebody_else(cache, monkeypatch):
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    states = {f.state for f in check("Triton's cache")}
    if mine:
        assert states == {FAILURE, WARNING}, "the cache, and folders above it"
    else:
        assert states == {OK}, "the administrator's folders are trusted"
        os.chown(cache, 12345, -1)
        assert "it belongs to somebody else" in only("Triton's cache").found


@posix
@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root may give a folder to a group")
def test_a_cache_of_a_group(cache):
    cache.chmod(0o775)
    os.chown(cache, -1, 12345)
    assert (only("Triton's cache").state, "a group may write to it" in only("Triton's cache").found) == (WARNING, True)


def test_a_cache_that_can_not_be_written(cache, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)
        assert only("Triton's cache").state == FAILURE
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    assert only("Triton's cache").state == WARNING
    cache.rmdir()
    cache.write_text("a file")
    assert only("Triton's cache").state == FAILURE


# -- what changes the unfused run's bits -------------------------------------------------------------------------------


def replaced():
    return {f.name: f for f in check("replaced ops")}


@pytest.mark.parametrize("key", ["CUDA", "AutogradCUDA", "Autograd", "ADInplaceOrView", "BackendSelect"])
def test_ops_replaced_in_python(key):
    before = replaced()
    assert "replaced ops" not in before or before["replaced ops"].state == OK
    lib = torch.library.Library("aten", "IMPL")
    try:
        lib.impl("_fused_rms_norm", lambda *args: args[:2], key)
        found = replaced()["replaced ops"]
    finally:
        lib._destroy()
    assert found.state == WARNING
    assert "_fused_rms_norm (tests/test_doctor.py:" in found.found
    assert replaced() == before


def test_functions_replaced_in_python(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: None)
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda *a, **k: None)
    found = replaced()["replaced ops"]
    assert found.state == WARNING
    assert "F.scaled_dot_product_attention (test_doctor)" in found.found
    assert "F.rms_norm" in found.found


def test_ops_replaced_by_torch_itself(monkeypatch):
    names = "topk", "sum.dim_IntList", "bmm", "scatter_add", "_fused_rms_norm_backward", "_fused_rms_norm"
    kernels = [(f"aten::{name}", "/somewhere/torch/_native/registry.py:297") for name in names]
    monkeypatch.setattr(doctor, "_python_kernels", lambda: iter(kernels))
    found = replaced()["replaced ops, by torch"]
    assert found.state == NOTE
    assert found.found.startswith("_fused_rms_norm (_native/registry.py:297), topk"), "the one that matters comes first"
    assert "stock's own rms_norm changes where CuTe DSL is installed" in found.meaning
    assert "whichever runs in this process" in found.meaning
    assert found.advice.startswith("TORCH_DISABLE_NATIVE_JIT=1")
    monkeypatch.setattr(doctor, "_python_kernels", lambda: iter(kernels[:-1]))
    found = replaced()["replaced ops, by torch"]
    assert (found.advice, "rms_norm changes" in found.meaning) == (NOTHING, False)
    monkeypatch.setattr(doctor, "_python_kernels", lambda: iter(()))
    assert replaced()["replaced ops"].state == OK


def test_packages_that_replace_ops(monkeypatch):
    stock = packages.version
    monkeypatch.setattr(packages, "version", lambda name: "4.4.1" if name == "nvidia-cutlass-dsl" else stock(name))
    found = replaced()["nvidia-cutlass-dsl"]
    assert (found.state, found.found) == (NOTE, "4.4.1 is installed")
    assert "F.rms_norm" in found.meaning
    assert (found.meaning.endswith("Here ATen's own runs"), found.advice) == (True, NOTHING)
    kernels = [("aten::_fused_rms_norm", "/somewhere/torch/_native/registry.py:297")]
    monkeypatch.setattr(doctor, "_python_kernels", lambda: iter(kernels))
    found = replaced()["nvidia-cutlass-dsl"]
    assert "Here" not in found.meaning
    assert found.advice.startswith("uninstall it")


@contextlib.contextmanager
def setting(name, value):
    """One of PyTorch's settings of matrix products, which monkeypatch can't put back."""
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def test_tf32():
    assert only("fp32 matrix products").state == OK
    with setting("allow_tf32", True):
        assert (only("fp32 matrix products").state, only("fp32 matrix products").found) == (NOTE, "high, TF32 on")
    with setting("fp32_precision", "tf32"):
        assert (only("fp32 matrix products").state, only("fp32 matrix products").found) == (NOTE, "tf32, TF32 on")
    assert only("fp32 matrix products").state == OK


def test_reduced_precision():
    assert only("reduced precision").state == OK
    with setting("allow_bf16_reduced_precision_reduction", False):
        assert (only("reduced precision").state, only("reduced precision").found) == (NOTE, "bf16 sums: False")


def test_cudnn(monkeypatch):
    assert only("cuDNN").state == OK
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert (only("cuDNN").state, only("cuDNN").advice) == (WARNING, "torch.backends.cudnn.benchmark = False")


def test_deterministic_algorithms(monkeypatch):
    assert only("deterministic algorithms").state == OK
    torch.use_deterministic_algorithms(True)
    try:
        assert only("deterministic algorithms").state == NOTE
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        assert only("deterministic algorithms").state == OK
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("given", "state"),
    [(None, OK), (":4096:8", NOTE), (":16:8:4096:2", NOTE), ("", WARNING), ("4096:8", WARNING), (":4096", WARNING)],
)
def test_cublas_workspace(given, state, monkeypatch):
    if given is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
    assert only("cuBLAS workspace").state == state


def test_attention(monkeypatch):
    cuda = torch.backends.cuda
    assert check("attention")[0].state == OK
    monkeypatch.setattr(cuda, "flash_sdp_enabled", lambda: False)
    assert (check("attention")[0].state, check("attention")[0].found) == (NOTE, "cuDNN, memory-efficient, math")
    for name in ("cudnn_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled"):
        monkeypatch.setattr(cuda, name, lambda: False)
    assert (check("attention")[0].state, check("attention")[0].found) == (FAILURE, "none")


@needs_diffusers
def test_attention_of_diffusers(monkeypatch):
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    assert (check("attention")[1].state, check("attention")[1].found) == (OK, "native")
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.FLEX)
    assert (check("attention")[1].state, check("attention")[1].found) == (NOTE, "flex")


# -- hosts, and what can be shown here and now -------------------------------------------------------------------------


def hosts_found(host):
    """The findings of a host by what they are of: `LTX-2.0`, `text connectors`, or its version."""
    found = [f for f in check("hosts") if f.name.startswith(f"{host} ")]
    assert all(f.state in STATES and f.found and f.meaning and f.advice for f in found)
    return {f.name.removeprefix(f"{host} ").partition(", ")[2] or f.name: f for f in found}


@needs_diffusers
def test_a_source_that_is_not_known(monkeypatch):
    from bitfuse.hosts import diffusers as adapter

    monkeypatch.setitem(adapter.READ, "LTX2PerturbedAttnProcessor", set())
    found = hosts_found("diffusers")
    assert found["LTX-2.0"].state == found["text connectors"].state == OK
    for version in ("LTX-2.3", "LTX-2.5"):
        assert found[version].state == WARNING
        assert "12 of 24 sites of a block; LTX2PerturbedAttnProcessor of diffusers" in found[version].found
        assert "is not a source that bitfuse knows" in found[version].found
        assert "use diffusers 0.38 to 0.42.1" in found[version].advice


@needs_diffusers
def test_a_connectors_source_that_is_not_known(monkeypatch):
    from bitfuse.hosts import diffusers_connectors as adapter

    monkeypatch.setitem(adapter.READ, "LTX2TransformerBlock1d.forward", set())
    found = hosts_found("diffusers")
    assert (found["LTX-2.0"].state, found["text connectors"].state) == (OK, WARNING)
    assert found["text connectors"].found.startswith("2 of 4 sites of a block each; LTX2TransformerBlock1d.forward of")


@needs_diffusers
def test_the_video_decoder(monkeypatch):
    from bitfuse.hosts import diffusers_vae as adapter

    found = hosts_found("diffusers")["video decoder"]
    assert (found.state, found.found) == (OK, "92 of 92 sites before and after convolutions")
    monkeypatch.setitem(adapter.READ, "LTX2VideoResnetBlock3d.forward", set())
    found = hosts_found("diffusers")["video decoder"]
    assert found.state == WARNING
    assert found.found.startswith("0 of 1 sites before and after convolutions; LTX2VideoResnetBlock3d.forward of")


@needs_diffusers
def test_the_video_encoder(monkeypatch):
    from bitfuse.hosts import diffusers_vae as adapter

    found = hosts_found("diffusers")["video encoder"]
    assert (found.state, found.found) == (OK, "94 of 94 sites before and after convolutions")
    monkeypatch.setitem(adapter.READ_OF_ENCODER, "LTX2VideoDownBlock3D.forward", set())
    found = hosts_found("diffusers")
    assert found["video decoder"].state == OK
    assert found["video encoder"].state == WARNING
    assert found["video encoder"].found.startswith("0 of 1 sites before and after convolutions; LTX2VideoDownBlock3D")


@needs_diffusers
def test_the_diffusion_decoder_and_where_the_host_itself_cannot_run(monkeypatch):
    pytest.importorskip("diffusers.models.autoencoders.ltx2_diffusion_decoder")
    from bitfuse.hosts import diffusers_diffusion_decoder as adapter

    found = hosts_found("diffusers")["diffusion decoder"]
    assert (found.state, found.found) == (OK, "16 of 16 sites of a block of each stage")
    (attention,) = (f for f in check("hosts") if f.name == "diffusers' diffusion decoder: attention")
    assert attention.state == NOTE
    assert "an 80 GB card" in attention.meaning
    assert "LTX2VideoVaeNeighborhoodNattenProcessor" in attention.advice
    monkeypatch.setitem(adapter.READ, "LTX2VideoVaeSwiGLU.forward", set())
    found = hosts_found("diffusers")["diffusion decoder"]
    assert found.state == WARNING
    assert found.found.startswith("11 of 16 sites of a block of each stage; LTX2VideoVaeSwiGLU.forward of diffusers")


def test_ltx_core_and_a_source_of_it_that_is_not_known(monkeypatch):
    pytest.importorskip("ltx_core")
    from bitfuse.hosts import ltx_core as adapter

    found = hosts_found("ltx-core")
    assert (found["LTX-2.0"].state, found["LTX-2.0"].found) == (OK, "16 of 16 sites of a block")
    decoder = found["video decoder"]
    assert (decoder.state, decoder.found) == (OK, "14 of 14 sites before and after convolutions")
    encoder = found["video encoder"]
    assert (encoder.state, encoder.found) == (OK, "13 of 13 sites before and after convolutions")
    monkeypatch.setitem(adapter.READ, "BasicAVTransformerBlock.forward", set())
    found = hosts_found("ltx-core")
    assert found["LTX-2.0"].state == WARNING
    assert "; BasicAVTransformerBlock.forward of ltx-core" in found["LTX-2.0"].found


def test_sglang_and_a_source_of_it_that_is_not_known(monkeypatch):
    sglang_host.upstream()  # imports it where torchvision is not installed
    version = importlib.metadata.version("sglang")
    from bitfuse.hosts import sglang as adapter

    (finding,) = hosts_found("SGLang").values()
    assert (finding.name, finding.state) == (f"SGLang {version}", OK)
    assert finding.found == "8 of 8 sources that bitfuse restates are known"
    monkeypatch.setitem(adapter.READ, "LTX2Attention.forward", set())
    (finding,) = hosts_found("SGLang").values()
    assert finding.state == WARNING
    unknown = f"LTX2Attention.forward of SGLang {version} is not a source that bitfuse knows ("
    assert finding.found.startswith(f"7 of 8 sources that bitfuse restates are known; {unknown}")


def test_an_sglang_that_does_not_import(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "sglang" else None)
    monkeypatch.setitem(sys.modules, "bitfuse.hosts.sglang", None)
    monkeypatch.delattr(bitfuse.hosts, "sglang", raising=False)
    sglang, others = check("hosts")
    assert (sglang.state, others.state) == (NOTE, NOTE)
    assert sglang.found.startswith("its LTX-2 can't be imported: ")
    assert (
        others.found
        == "not installed: diffusers (0.38 to 0.42.1), ltx-core (1.0.0 to 1.2.0), comfyui (0.24.1 to 0.30.0)"
    )


def test_no_host_at_all(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (none,) = check("hosts")
    assert (none.state, none.found) == (WARNING, "none of diffusers, ltx-core, sglang, comfyui is installed")


@needs_diffusers
def test_a_host_without_the_version(monkeypatch):
    def cannot(geometry):
        raise ValueError("diffusers 0.37.0 does not have LTX-2.3: its transformer takes no gated_attn.")

    monkeypatch.setattr(doctor.explain, "from_geometry", cannot)
    found = [f for name, f in hosts_found("diffusers").items() if name.startswith("LTX-")]
    assert [f.state for f in found] == [NOTE] * 3
    assert "does not have LTX-2.3" in found[1].found
    assert found[1].advice == "update diffusers, if you want this version"


@needs_diffusers
def test_a_stock_block_that_does_not_equal_itself(monkeypatch):
    draws = iter(range(100))
    outputs = lambda: (torch.zeros(2, 3), torch.full((2,), float(next(draws))))  # noqa: E731
    monkeypatch.setattr(seeded, "one_step", lambda model, inputs: outputs)
    found = only("a stock block, twice")
    assert (found.state, found.differs) == (FAILURE, True)
    assert "output 1 differs at [0]: 0x3f800000 where the reference has 0x00000000" in found.found
    assert doctor.Diagnosis([found]).exit_code == 1


@needs_diffusers
def test_a_stock_block_that_does_not_fit(monkeypatch):
    def cannot(*_):
        raise seeded.CannotRun("1 layers do not fit: a layer is 0.77 GB")

    monkeypatch.setattr(seeded, "geometry_for", cannot)
    assert (only("a stock block, twice").state, only("a stock block, twice").found) == (
        NOTE,
        "not tried: 1 layers do not fit: a layer is 0.77 GB",
    )


def routed(monkeypatch, reason, mismatch=None):
    monkeypatch.setattr(Operator, "route", lambda self, *args: Route(self.reference, reason(self), mismatch))
    return only("a proof")


def test_a_kernel_that_differs(monkeypatch):
    mismatch = Mismatch("differs at [0]: 0x1 where the reference has 0x0", (0,), "0x0", "0x1", 1)
    found = routed(monkeypatch, lambda self: mismatch.sentence, mismatch)
    assert (found.state, found.differs) == (FAILURE, True)
    assert found.found.startswith("0 of ")
    assert doctor.Diagnosis([found]).exit_code == 1


def test_operators_that_can_not_be_proved(monkeypatch):
    built = "the kernel can't be built or run here (RuntimeError: no)"
    found = routed(monkeypatch, lambda self: built)
    assert (found.state, found.differs) == (FAILURE, False), "nothing is fused at all"
    assert built in found.found
    found = routed(monkeypatch, lambda self: built if self.name == "head_gate" else None)
    assert found.state == WARNING
    assert f"head_gate: {built}" in found.found


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    diagnosis = doctor.run(Console(file=io.StringIO()))
    states = {f.name: f.state for f in diagnosis.findings}
    assert states["GPU 0"] == states["a stock block, twice"] == states["a proof"] == OK
    assert diagnosis.exit_code == 0
