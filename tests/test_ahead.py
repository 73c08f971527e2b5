"""Kernels are compiled ahead: all of them, each once, in processes that leave them in Triton's cache."""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from bitfuse.core.launch import Plan
from bitfuse.ops.rope import SPLIT_FP32
from bitfuse.tools.prove import ahead, far, mutation

CPU = torch.device("cpu")


@pytest.fixture
def progress():
    with Progress(console=Console(file=io.StringIO())) as progress:
        yield progress


def _few():
    return {SPLIT_FP32: [case for case in SPLIT_FP32.cases if case.name in ("one token", "misaligned")]}


def _key(plan, args):
    return id(plan.kernel), plan.signature(args)


def test_cases_mutants_and_random_forms_are_among_them():
    made = [launch() for launch in ahead.launches(_few(), True, CPU)]
    kernels = {id(plan.kernel) for plan, _ in made if isinstance(plan, Plan)}
    args = SPLIT_FP32.cases[0].arguments("cpu", tokens=64)
    sites = [s for s in mutation.chosen([SPLIT_FP32])[SPLIT_FP32] if s.kind not in mutation.ADDRESSES]
    mutants = {id(m.plan(SPLIT_FP32, *args).kernel) for m in (*SPLIT_FP32.mutants, *(s.mutant for s in sites))}
    assert mutants < kernels
    without = list(ahead.launches(_few(), False, CPU))
    far_away = len(far.cases(SPLIT_FP32))
    assert len(without) == 2 + far_away + len(SPLIT_FP32.mutants) + len(sites) < len(made)


IN_A_PROCESS_THAT_COMPILES = """
import os, sys, torch
from pathlib import Path
from rich.progress import Progress
from bitfuse.tools.prove import ahead, ptx
from bitfuse.ops.rope import SPLIT_FP32

cache = Path(os.environ["TRITON_CACHE_DIR"])
few = {SPLIT_FP32: [case for case in SPLIT_FP32.cases if case.name in ("one token", "misaligned")]}
made = list(ahead.launches(few, False, torch.device("cpu")))[::3]
with ahead.on_disk(made, 90, Progress(disable=True)):
    pass
found = set(cache.iterdir())
for plan, args in (launch() for launch in made):
    ptx.compile_for(plan, args, 90)
print(len(found), len(set(cache.iterdir()) - found))
"""


def test_processes_leave_in_the_cache_what_this_one_would_compile(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", IN_A_PROCESS_THAT_COMPILES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    found, left = map(int, done.stdout.split())
    assert found > 5
    assert left == 0


def test_a_process_that_dies_or_hangs_or_a_kernel_that_does_not_compile_ends_nothing(progress, monkeypatch):
    monkeypatch.setattr(ahead, "compile_for", lambda *_: os._exit(3))
    with ahead.on_disk(list(ahead.launches(_few(), False, CPU)), 90, progress):
        pass
    monkeypatch.setattr(ahead, "compile_for", lambda *_: time.sleep(60))
    monkeypatch.setattr(ahead, "_PATIENCE", 0.5)
    start = time.monotonic()
    with ahead.on_disk(list(ahead.launches(_few(), False, CPU)), 90, progress):
        pass
    with pytest.raises(KeyboardInterrupt), ahead.on_disk(list(ahead.launches(_few(), False, CPU)), 90, progress):
        raise KeyboardInterrupt
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()
    monkeypatch.setattr(ahead, "compile_for", lambda *_: 1 / 0)
    made = list(ahead.launches(_few(), False, CPU))
    assert len(list(ahead._compile(made, 90, 0, 1))) == len(made)


def test_shares_are_all_of_it_and_each_kernel_is_compiled_once_in_a_process(monkeypatch):
    compiled = []
    monkeypatch.setattr(ahead, "compile_for", lambda plan, args, _: compiled.append(_key(plan, args)))
    made = list(ahead.launches({SPLIT_FP32: list(SPLIT_FP32.cases)}, False, CPU))
    assert sum(len(list(ahead._compile(made, 90, share, 3))) for share in range(3)) == len(made)
    assert set(compiled) == {_key(plan, args) for plan, args in (launch() for launch in made)}
    compiled.clear()
    list(ahead._compile(made, 90, 0, 1))
    assert len(compiled) == len(set(compiled)) < len(made)


def test_what_comes_in_several_calls_is_loaded_once_and_an_error_ends_nothing(progress, monkeypatch):
    made = [launch() for launch in ahead.launches({SPLIT_FP32: list(SPLIT_FP32.cases)}, True, CPU)]
    loaded = []

    def compile(plan, args):
        loaded.append(_key(plan, args))
        if len(loaded) == 1:
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(Plan, "compile", compile)
    ahead.load(list(filter(None, ahead._new(lambda launch=launch: launch for launch in made))), progress)
    assert len(loaded) == len(set(loaded)) < len(made)
    assert set(loaded) == {_key(plan, args) for plan, args in made if isinstance(plan, Plan)}
