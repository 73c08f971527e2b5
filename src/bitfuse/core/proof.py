"""Proof: run a battery, remember the verdict for as long as the process lives.

A battery (`Evidence.battery`) is a series of inputs made to trip wrong kernels, in families that have names ("ties",
"specials"). A kernel is proved when it gives the reference's bits on all of them. The verdict is kept by the names of
operator and tier and by the signature of the launch (`Plan.signature`), so it speaks of one compiled kernel, and of all
calls that launch it. Nothing here reads a file: what is written down (by `bitfuse verify`) is a document for people,
never a permission.

A kernel is refuted when its battery finds a mismatch, and condemned when it is seen to differ after its battery has
passed: on the user's tensors. Either way it is not used again in this process; other signatures are not touched.

The stores below are shared by threads, without a lock, as an interrupt could leave it locked: each change is one
operation on a dictionary, which Python does as a whole or not at all. `refuted` and `condemned` are asked first and
nothing is evicted from them, so that another thread's verdict, found at the same time, can't hide a mismatch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bitfuse.core.bits import (
    Mismatch,
    Outputs,
    Outside,
    Part,
    as_tuple,
    compare,
    compare_parts,
    form_mismatch,
    of_output,
)
from bitfuse.core.launch import Plan
from bitfuse.core.lines import error_line


class Named(Protocol):
    """An operator or a tier, of which a verdict remembers the name alone."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Verdict:
    """What was found of the kernel of one signature: whether it may be used, and the sentence why not.

    families    how many of the battery's families were compared, and `elements` in all
    mismatch    where its bits differ, if they do
    final       False where an error of the moment (no memory, no disk) left the question open: it is tried again
    failed      the kernel could not be built or run, though the tier had nothing against these arguments
    """

    equal: bool
    sentence: str
    families: int = 0
    elements: int = 0
    seconds: float = 0.0
    mismatch: Mismatch | None = None
    final: bool = True
    failed: bool = False


_KEPT = 4096  # verdicts, and failures; a render needs some dozens
_FREE_SECONDS = 1.0  # in which a kernel that fails by an error of the moment is tried at every call
_SHARE = 20  # beyond them, its tries may take one in so many seconds

_Key = tuple[str, str, tuple]  # names of operator and tier, signature

_verdicts: dict[_Key, Verdict] = {}  # what batteries found, the oldest first
refuted: dict[_Key, Verdict] = {}  # of these, the ones with a mismatch
condemned: dict[_Key, Verdict] = {}  # kernels that were seen to differ after their battery had passed
_failures: dict[_Key, Patience] = {}  # errors of the moment
_forgotten = 0  # condemnations that `forget` dropped


class Patience:
    """When to try again what failed by an error of the moment, such as a full disk or a full device.

    At every call until the failed tries have taken a second; then so seldom that they take a twentieth of the time, as
    an expensive try at every call would slow down a process whose disk stays full.
    """

    def __init__(self) -> None:
        self.spent = 0.0  # seconds
        self.verdict = Verdict(False, "not tried yet", final=False)
        self._not_before = 0.0

    def failed(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.spent += verdict.seconds
        if self.spent > _FREE_SECONDS:
            self._not_before = time.monotonic() + _SHARE * self.spent

    @property
    def waiting(self) -> bool:
        return time.monotonic() < self._not_before


def remember(store: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Keep the value; where there are `most` already, without the older half of them."""
    if len(store) >= most:
        for old in list(store)[: -(-most // 2)]:
            store.pop(old, None)
    store[key] = value


def key_of(operator: Named | str, tier: Named | str, signature: tuple) -> _Key:
    name, way = (one if isinstance(one, str) else one.name for one in (operator, tier))
    return name, way, signature


def known(operator: Named, tier: Named, signature: tuple) -> Verdict | None:
    """The verdict for this signature, if there is one. Of several, the one with a mismatch."""
    key = key_of(operator, tier, signature)
    return condemned.get(key) or refuted.get(key) or _verdicts.get(key)


def waiting(operator: Named | str, tier: Named | str, signature: tuple) -> Verdict | None:
    """The verdict of the last try, where that met an error of the moment and it is too early to try again.

    Whatever is tried in a process may ask so, and `postpone`, by names of its own.
    """
    patience = _failures.get(key_of(operator, tier, signature))
    return patience.verdict if patience is not None and patience.waiting else None


def verdicts() -> dict[tuple, Verdict]:
    """Every verdict of this process, by the names of operator and tier and the signature."""
    return {**_verdicts, **refuted, **condemned}


def forget() -> None:
    """Drop every verdict (for tests and measurements: each signature is proved again before use)."""
    global _forgotten
    _forgotten += len(condemned)
    for store in (_verdicts, refuted, condemned, _failures):
        store.clear()


def condemn(operator: Named, tier: Named, signature: tuple, mismatch: Mismatch) -> Verdict:
    """Never use this signature's kernel again in this process. `Operator.condemn` also drops the routes to it."""
    return condemned.setdefault(key_of(operator, tier, signature), condemning(mismatch))


def condemning(mismatch: Mismatch) -> Verdict:
    return Verdict(False, mismatch.sentence, mismatch=mismatch)


def condemnations() -> int:
    """How many kernels were condemned after their proof, in this process."""
    return _forgotten + len(condemned)


def prove(
    operator: Named,
    tier: Named,
    signature: tuple,
    reference: Callable[..., Outputs],
    plan_of: Callable[..., Plan | str],
    battery: Iterable[tuple[str, tuple[Any, ...]]],
) -> Verdict:
    """Run the battery for this signature of an operator's tier, and remember the verdict.

    If an interrupt ends the battery, nothing is remembered. If another thread has found a mismatch meanwhile, that is
    the verdict.
    """
    verdict = run_battery(reference, plan_of, battery, signature)
    key = key_of(operator, tier, signature)
    if verdict.mismatch is not None:
        refuted.setdefault(key, verdict)
    if verdict.final:
        remember(_verdicts, key, verdict, _KEPT)
        _failures.pop(key, None)
    else:
        postpone(operator, tier, signature, verdict)
    return known(operator, tier, signature) or verdict


def postpone(operator: Named | str, tier: Named | str, signature: tuple, failure: Verdict) -> None:
    """Note an error of the moment, which the next try may not meet (`Patience`)."""
    key = key_of(operator, tier, signature)
    patience = _failures.get(key) or Patience()
    patience.failed(failure)
    remember(_failures, key, patience, _KEPT)


def of_the_moment(error: BaseException) -> bool:
    """Whether an error says nothing of the kernel, only of the machine just now: no memory, no disk, no permission.

    Also where such an error is the cause of the given one, as Triton's compiler and interpreter raise their own.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, _MOMENTARY) or type(cause).__module__ == "subprocess":
            return True
        if isinstance(cause, RuntimeError) and any(words in str(cause).lower() for words in _NO_MEMORY):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


# How deep the caller's stack is, is of the moment, too; a compiler that was killed or had no disk raises an error of
# Python's `subprocess`, which no module here imports.
_MOMENTARY = (torch.OutOfMemoryError, MemoryError, OSError, RecursionError)
_NO_MEMORY = ("allocate memory", "defaultcpuallocator", "out of memory", "not enough memory", "cannot allocate")


def failure(error: Exception, seconds: float, doing: str) -> Verdict:
    """The verdict where a kernel raised this while it was `doing` ("being proved"): not final where it may pass."""
    final = not of_the_moment(error)
    if isinstance(error, torch.OutOfMemoryError):
        return Verdict(False, f"the device ran out of memory while it was {doing}", seconds=seconds, final=False)
    sentence = f"the kernel can't be built or run here ({error_line(error)})"
    return Verdict(False, sentence, seconds=seconds, final=final, failed=True)


def run_battery(
    reference: Callable[..., Outputs],
    plan_of: Callable[..., Plan | str],
    battery: Iterable[tuple[str, tuple[Any, ...]]],
    signature: tuple | None = None,
) -> Verdict:
    """Kernel against reference on every family of inputs; stops at the first mismatch.

    signature    that of the kernel which is to be proved. Inputs that would launch another one prove nothing of it, and
                 leave it unproved

    The kernel writes into outputs that stand between guard zones (`bitfuse.core.inputs`). A write outside of an output,
    into the gaps between its elements or into an input is a mismatch too. That is looked at once for each layout of
    inputs: where a kernel writes hangs on that, and on no value.
    Exceptions of a kernel are caught: one that can't be built here is a reason to run the reference, not a failure of
    the user's program. Errors of the device (`torch.AcceleratorError`) pass.
    """
    start, families, elements = time.perf_counter(), 0, 0
    layouts: set[Any] = set()

    def differing(mismatch: Mismatch, family: str) -> Verdict:
        sentence = f"{mismatch.sentence}, on the battery's '{family}' inputs"
        return Verdict(False, sentence, families, elements, time.perf_counter() - start, mismatch)

    try:
        # not at the top: a process that proves nothing needs none of it
        from bitfuse.core.inputs import changed, guarded, kept, trespass

        for family, args in battery:
            plan = plan_of(*args)
            if isinstance(plan, str):
                return Verdict(False, f"{plan} (the battery's '{family}' inputs)")
            if signature is not None and plan.signature(args) != signature:
                return Verdict(False, f"the battery has no '{family}' inputs of this layout, so it stays unproved")
            layout = tuple((a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in args)
            new = layout not in layouts
            layouts.add(layout)
            given = kept(args) if new else []
            outs = tuple(guarded(*out, args[0].device) for out in (*plan.witnesses, *plan.outputs))
            try:
                plan.bind(args, outs)(*args, *outs)
            except Outside as error:
                return differing(Mismatch(str(error)), family)
            if mismatch := changed(given):  # before the reference reads what it changed
                return differing(mismatch, family)
            expected = reference(*args)
            families, elements = families + 1, elements + sum(t.numel() for t in as_tuple(expected))
            if mismatch := compare(expected, outs if len(outs) > 1 else outs[0]) or (trespass(outs) if new else None):
                return differing(mismatch, family)
    except torch.AcceleratorError:  # an asynchronous error of the device is never hidden by a fallback
        raise
    except Exception as error:
        return failure(error, time.perf_counter() - start, "being proved")
    return Verdict(True, "equal", families, elements, time.perf_counter() - start)


def compare_live(
    reference: Callable[..., Outputs],
    run: Any,
    args: tuple[Any, ...],
    parts: Callable[..., Iterator[Part]] | None = None,
    needed: bool = False,
) -> Mismatch | None:
    """The call that asked for a proof, as further evidence: kernel against reference on the user's own tensors.

    parts     the reference piece by piece (`Evidence.parts`); `run` then gives a tuple, witnesses before outputs. What
              is large in the reference is made, and let go of, before that makes its outputs
    needed    raise where there is no memory for it: the layout by itself has no other proof
    """
    try:
        with torch.no_grad():
            if parts is None:
                return compare(reference(*args), run(*args))
            pieces = parts(*args)
            first = next(pieces, None)
            return None if first is None else compare_parts(itertools.chain((first,), pieces), run(*args))
    except Exception as error:
        if of_the_moment(error) and not needed:  # the battery has passed; a full device is no mismatch
            return None
        raise


def compare_forms(reference: Callable[..., Outputs], plan: Plan, args: tuple[Any, ...]) -> Mismatch | None:
    """The form (dtype, shape, strides) of the plan's outputs against what the reference returns for these arguments.

    A plan asks the reference for the form on the meta device, where PyTorch may choose other strides for the same
    operation than on a real one. Where there is no memory to run the reference, this is not compared: the battery has
    compared the form on inputs whose dimensions lie in the same order in memory.
    """
    try:
        with torch.no_grad():
            expected = as_tuple(reference(*args))
    except Exception as error:
        if of_the_moment(error):
            return None
        raise
    if len(expected) != len(plan.outputs):
        return Mismatch(f"there are {len(plan.outputs)} outputs where the reference has {len(expected)}")
    for i, (t, out) in enumerate(zip(expected, plan.outputs, strict=True)):
        here = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        if (mismatch := form_mismatch(here, out.empty(here.device))) is not None:
            return of_output(i, mismatch) if len(expected) > 1 else mismatch
    return None
