"""Have the kernels that `verify` is going to launch compiled on all cores, before it needs one after the other.

There are 415 of them, with the long sweeps 920, at 0.25 s of one core or more. First each core compiles a share into
Triton's cache on disk, in a process of its own, as a third of the work is Triton's Python and threads would wait for
each other's. Then threads load them and build their launchers, for which Triton runs a C compiler. An error in either
is not lost: it shows again, with its reason, where the kernel is proved.
"""

# Triton's own AsyncCompileMode does not fit: what it hands to its executor are closures, which go to no other process,
# and it is done before a launcher is built.

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import select
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from rich.progress import Progress

from bitfuse.core.launch import Plan
from bitfuse.core.operator import Operator
from bitfuse.tools.prove import far, mutation, sweeps
from bitfuse.tools.prove.ptx import TOKENS, compile_for

_NEIGHBOURS = 4  # launches that follow each other often share a kernel: they go to one process, which sees that
_MOST = 32  # processes
_PATIENCE = 60.0  # seconds in which none of them is done with a launch
Launch = tuple[Plan | str, tuple[Any, ...]]
Chosen = dict[Operator, list[Any]]  # operators, and the cases of each


def launches(chosen: Chosen, deep: bool, device: torch.device) -> Iterator[Callable[[], Launch]]:
    """What makes the (plan, arguments) of each launch that is to come: cases, mutants, for sweeps random forms."""
    sites = mutation.chosen(list(chosen), mutation.FURTHER if deep else ())
    for operator, cases in chosen.items():
        for case, tier in itertools.product(cases, operator.tiers):
            yield functools.partial(_of_case, tier.plan, case, device)
        for case, tier in itertools.product(far.shortened(operator), operator.tiers):
            yield functools.partial(_of_case, tier.plan, case, device)
        for mutant in operator.mutants:
            plan = functools.partial(mutant.plan, operator)
            yield functools.partial(_of_case, plan, mutation.case_of(operator, mutant), device)
        for site in sites[operator]:
            if site.kind not in mutation.ADDRESSES:
                plan = functools.partial(site.mutant.plan, operator)
                yield functools.partial(_of_case, plan, mutation.layouts(operator)[0], device)
        if deep:
            for number, form in enumerate(sweeps.forms(operator, sweeps.ALL)):
                yield functools.partial(_of_form, operator, form, number, device)


def _of_case(plan: Callable[..., Plan | str], case: Any, device: torch.device) -> Launch:
    args = case.arguments(device, tokens=TOKENS)
    return plan(*args), args


def _of_form(operator: Operator, form: sweeps.Form, number: int, device: torch.device) -> Launch:
    args = form.arguments(device, random.Random(number))
    return next(operator.why_not(*args), None) or operator.tiers[0].plan(*args), args


def compile_ahead(chosen: Chosen, deep: bool, device: torch.device, progress: Progress) -> None:
    """Compile and load what will be launched on this GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    with on_disk(list(launches(chosen, deep, torch.device("cpu"))), 10 * major + minor, progress):
        distinct = list(filter(None, _new(launches(chosen, deep, device))))  # 10 s, and this process has nothing to do
    load(distinct, progress)


@contextlib.contextmanager
def on_disk(made_on_cpu: list[Callable[[], Launch]], capability: int, progress: Progress) -> Iterator[None]:
    """Compile for a GPU of this compute capability into Triton's cache, in forked processes that touch no GPU.

    They are waited for at the end of the block. Not started anew: importing PyTorch takes each seconds. One that dies
    or hangs leaves its share to `load`.
    """
    of = min(os.cpu_count() or 1, _MOST, -(-len(made_on_cpu) // _NEIGHBOURS))
    task = progress.add_task("compiling", total=len(made_on_cpu))
    reading, writing = os.pipe()

    def work(share: int) -> None:
        torch.set_num_threads(1)  # of PyTorch's threads none is left after a fork, and to wait for them is for ever
        for _ in _compile(made_on_cpu, capability, share, of):
            os.write(writing, b".")

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(share,), daemon=True) for share in range(of)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, of forks beside threads
        for process in processes:
            process.start()
    os.close(writing)
    try:
        yield
        with open(reading, "rb", buffering=0, closefd=False) as done:
            while select.select([done], [], [], _PATIENCE)[0]:
                if not (some := done.read(1 << 10)):  # no process is left that could write
                    break
                progress.advance(task, len(some))
    finally:
        for process in processes:
            process.kill()  # those that hang; the others have ended
            process.join()
        os.close(reading)
        progress.remove_task(task)


def _compile(made_on_cpu: list[Callable[[], Launch]], capability: int, share: int, of: int) -> Iterator[None]:
    """Every `of`-th group of neighbouring launches, from the `share`-th on; yields after each."""
    mine = (made for number, made in enumerate(made_on_cpu) if number // _NEIGHBOURS % of == share)
    for new in _new(mine):
        if new:
            with contextlib.suppress(Exception):  # see above
                compile_for(*new, capability)
        yield


def _new(made: Iterable[Callable[[], Launch]]) -> Iterator[tuple[Plan, tuple[Any, ...]] | None]:
    """Each launch; None where there is none, or where one before it runs the same compiled kernel."""
    seen = set()
    for launch in made:
        plan, args = launch()
        if isinstance(plan, Plan) and (key := (id(plan.kernel), plan.signature(args))) not in seen:
            seen.add(key)
            yield plan, args
        else:
            yield None


def load(distinct: list[tuple[Plan, tuple[Any, ...]]], progress: Progress) -> None:
    """Load each kernel from Triton's cache, or compile it, and build its launcher, in threads."""
    task = progress.add_task("loading", total=len(distinct))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for plan, args in distinct:
            _ = plan.kernel.compiled  # made here: two threads would make one each, with caches of their own
            done = pool.submit(plan.compile, args)
            done.add_done_callback(lambda _: progress.advance(task))
    progress.remove_task(task)
