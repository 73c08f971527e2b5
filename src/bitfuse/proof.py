"""Proof: compare bits, run an operator's battery, remember the verdict for as long as the process lives.

Nothing here reads a file: what is written down (by `bitfuse verify`) is a document for people, never a
permission. A verdict belongs to one signature, so a mismatch condemns that compiled kernel and no other.

The stores below are shared by threads without a lock, which an interrupt could leave held: what must not be torn is one
operation on a dictionary. A mismatch has stores of its own, which are asked first and never evicted from, so that no
verdict of another thread can cover it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitfuse.kernel import Outside

if TYPE_CHECKING:
    from bitfuse.contract import Operator, Plan, Tier

Outputs = Tensor | tuple[Tensor, ...]
"""What a reference returns: a tensor, or a tuple of two or more."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size: integers of as many bytes
# A NaN no kernel writes, by element size: an output element left unwritten can't pass for a right one
_POISON = {2: 0x7FA5, 4: 0x7FA5A5A5, 8: 0x7FF5A5A5A5A5A5A5}
# Elements of poison before and after what a battery hands to a kernel: two rows of the widest operator
GUARD = 1 << 14


@dataclass(frozen=True)
class Mismatch:
    """Where two results part: a difference of form (dtype, shape, strides, device), or of bits and where first.

    `output` is the one of several that differs, the first of those that do.
    """

    sentence: str
    index: tuple[int, ...] = ()
    expected: str = ""
    found: str = ""
    count: int = 0
    output: int = 0


@dataclass(frozen=True)
class Verdict:
    """What a battery found for one signature. `final` is False where an error of the moment hid it.

    failed    the kernel could not be built or run, though the tier had nothing against these arguments
    """

    equal: bool
    sentence: str
    families: int = 0
    elements: int = 0
    seconds: float = 0.0
    mismatch: Mismatch | None = None
    final: bool = True
    failed: bool = False


def as_tuple(result: Outputs) -> tuple[Tensor, ...]:
    """The outputs of a reference, of which there may be one or several."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def compare(expected: Outputs, found: Outputs) -> Mismatch | None:
    """None when `found` is `expected` bit for bit: same dtype, shape, strides and device, and the same bits.

    Compared on integer views, so -0 and +0 differ; an element is NaN in one exactly where it is NaN in the
    other (the payload of a NaN is not defined by PyTorch itself and is not compared). Any dtype of 1 to 8
    bytes, any strides. Of tuples of tensors, each is compared. Waits for the device. TypeError for anything else.
    """
    for name, given in (("expected", expected), ("found", found)):
        several: Any = (given,) if isinstance(given, Tensor) else given
        if not isinstance(several, (tuple, list)):
            raise TypeError(f"{name} is {_kind(given)}; accepted: a tensor, or a tuple of tensors")
        for i, one in enumerate(several):
            if not isinstance(one, Tensor):
                raise TypeError(f"{name}[{i}] is {_kind(one)}; accepted: a tensor, or a tuple of tensors")
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        return _compare(expected, found)
    several, others = as_tuple(expected), as_tuple(found)
    if isinstance(expected, Tensor) or isinstance(found, Tensor) or len(several) != len(others):
        return Mismatch(f"there are {len(others)} outputs where the reference has {len(several)}")
    for i, (a, b) in enumerate(zip(several, others, strict=True)):
        if mismatch := _compare(a, b):
            return of_output(i, mismatch)
    return None


def _kind(given: object) -> str:
    """What a value is that is no tensor, in words."""
    kind = type(given)
    return "None" if given is None else f"a {kind.__module__}.{kind.__qualname__}".replace("a builtins.", "a ")


def of_output(i: int, mismatch: Mismatch) -> Mismatch:
    """The mismatch, said of one output of several."""
    which = f"output {i}" if mismatch.count else f"of output {i}"
    return replace(mismatch, sentence=f"{which} {mismatch.sentence}", output=i)


def form_mismatch(expected: Tensor, found: Tensor) -> Mismatch | None:
    """What differs but for the bits: dtype, shape, device or strides. Doesn't wait for the device."""
    for what in ("dtype", "shape", "device"):
        a, b = getattr(expected, what), getattr(found, what)
        if a != b:
            return Mismatch(f"the {what} is {b} where the reference has {a}")
    if _strides(expected) != _strides(found):
        return Mismatch(f"the strides are {found.stride()} where the reference has {expected.stride()}")
    return None


def _compare(expected: Tensor, found: Tensor) -> Mismatch | None:
    if (mismatch := form_mismatch(expected, found)) is not None:
        return mismatch
    if (bits := BITS.get(expected.element_size())) is None:
        raise TypeError(f"expected and found are of {expected.dtype}; accepted: dtypes of 1, 2, 4 or 8 bytes")
    differs = expected.view(bits) != found.view(bits)
    if expected.is_floating_point():
        differs &= ~(expected.isnan() & found.isnan())
    count = int(differs.sum())
    if not count:
        return None
    flat = int(differs.reshape(-1).to(torch.uint8).argmax())
    a, b = (int(t.reshape(-1)[flat].view(bits)) for t in (expected, found))
    return bits_mismatch(expected.shape, expected.element_size(), flat, a, b, count)


def bits_mismatch(shape: tuple[int, ...], size: int, flat: int, expected: int, found: int, count: int) -> Mismatch:
    """Of a tensor of this shape and element size in bytes: `count` elements differ, the first at the flat index.

    expected, found    its bits there, as integers of either sign
    """
    index = tuple(flat // math.prod(shape[dim + 1 :]) % n for dim, n in enumerate(shape))
    digits = 2 * size
    a, b = (f"0x{bits & (16**digits - 1):0{digits}x}" for bits in (expected, found))
    where = f"[{', '.join(map(str, index))}]"
    sentence = f"differs at {where}: {b} where the reference has {a} ({count} of {math.prod(shape)} elements)"
    return Mismatch(sentence, index, a, b, count)


def _strides(t: Tensor) -> tuple[int, ...]:
    """Strides that address anything: those of dimensions of size 0 and 1 say nothing."""
    return () if t.numel() == 0 else tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)


# -- verdicts -------------------------------------------------------------------------------------------------

_KEPT = 4096  # verdicts, and failures; a render needs some dozens
_FREE_SECONDS = 1.0  # in which a kernel that fails by an error of the moment is tried at every call
_SHARE = 20  # beyond them, its tries may take one in so many seconds

_Key = tuple[str, str, tuple]  # names of operator and tier, signature

_verdicts: dict[_Key, Verdict] = {}  # what batteries found, in the order of the proofs
_refuted: dict[_Key, Verdict] = {}  # those of them that found a mismatch
_condemned: dict[_Key, Verdict] = {}  # kernels that were seen to differ after their battery had passed
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


def key_of(operator: Operator, tier: Tier | str, signature: tuple) -> _Key:
    return operator.name, tier if isinstance(tier, str) else tier.name, signature


def known(operator: Operator, tier: Tier, signature: tuple) -> Verdict | None:
    """The verdict for this signature, if there is one. A mismatch stands, whatever else was found."""
    key = key_of(operator, tier, signature)
    return _condemned.get(key) or _refuted.get(key) or _verdicts.get(key)


def waiting(operator: Operator, tier: Tier, signature: tuple) -> Verdict | None:
    """What this signature failed by when it was last tried, where it is too early to try it again."""
    patience = _failures.get(key_of(operator, tier, signature))
    return patience.verdict if patience is not None and patience.waiting else None


def verdicts() -> dict[tuple, Verdict]:
    """Every verdict of this process, by the names of operator and tier and the signature."""
    return {**_verdicts, **_refuted, **_condemned}


def forget() -> None:
    """Drop every verdict (for tests and measurements: each signature is proved again before use)."""
    global _forgotten
    _forgotten += len(_condemned)
    for store in (_verdicts, _refuted, _condemned, _failures):
        store.clear()


def condemn(operator: Operator, tier: Tier, signature: tuple, mismatch: Mismatch) -> Verdict:
    """Never use this signature's kernel again in this process. `Operator.condemn` also drops the routes to it."""
    return _condemned.setdefault(key_of(operator, tier, signature), condemning(mismatch))


def condemning(mismatch: Mismatch) -> Verdict:
    return Verdict(False, mismatch.sentence, mismatch=mismatch)


def condemnations() -> int:
    """How many kernels were condemned after their proof, in this process."""
    return _forgotten + len(_condemned)


def prove(operator: Operator, tier: Tier, signature: tuple, like: tuple[Any, ...]) -> Verdict:
    """Run the operator's battery on the tier's kernel, for the signature of `like`, and remember the verdict.

    An interrupt leaves none behind. Where another thread has found a mismatch meanwhile, that is the verdict.
    """
    specification = operator.specification(operator.tiers.index(tier))
    verdict = run_battery(specification, tier.plan, operator.battery(*like), signature)
    key = key_of(operator, tier, signature)
    if verdict.mismatch is not None:
        _refuted.setdefault(key, verdict)
    if verdict.final:
        remember(_verdicts, key, verdict, _KEPT)
        _failures.pop(key, None)
    else:
        postpone(operator, tier, signature, verdict)
    return known(operator, tier, signature) or verdict


def postpone(operator: Operator, tier: Tier, signature: tuple, failure: Verdict) -> None:
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
    sentence = f"the kernel can't be built or run here ({said(error)})"
    return Verdict(False, sentence, seconds=seconds, final=final, failed=True)


def said(error: Exception) -> str:
    """The type of an error and its text, shortened to one line."""
    lines = str(error).strip().splitlines() or [""]  # Triton names the place first and the error last
    what = " ".join(dict.fromkeys((lines[0], lines[-1])))[:200]
    return f"{type(error).__name__}: {what}" if what else type(error).__name__


def run_battery(
    reference: Callable[..., Outputs],
    plan_of: Callable[..., Plan | str],
    battery: Iterable[tuple[str, tuple[Any, ...]]],
    signature: tuple | None = None,
) -> Verdict:
    """Kernel against reference on every family of inputs, into guarded outputs; stops at the first mismatch.

    A write outside of an output, into the gaps between its elements or into an input is a mismatch too.
    Exceptions of a kernel are caught: one that can't be built here is a reason to run the reference, not a failure of
    the user's program. Errors of the device (`torch.AcceleratorError`) pass.
    """
    start, families, elements = time.perf_counter(), 0, 0

    def differing(mismatch: Mismatch, family: str) -> Verdict:
        sentence = f"{mismatch.sentence}, on the battery's '{family}' inputs"
        return Verdict(False, sentence, families, elements, time.perf_counter() - start, mismatch)

    try:
        for family, args in battery:
            plan = plan_of(*args)
            if isinstance(plan, str):
                return Verdict(False, f"{plan} (the battery's '{family}' inputs)")
            if signature is not None and plan.signature(args) != signature:
                return Verdict(False, f"the battery has no '{family}' inputs of this layout, so it stays unproved")
            given = _kept(args)
            outs = tuple(guarded(*out, args[0].device) for out in (*plan.witnesses, *plan.outputs))
            try:
                plan.bind(args, outs)(*args, *outs)
            except Outside as error:
                return differing(Mismatch(str(error)), family)
            if mismatch := changed(given):  # before the reference reads what it changed
                return differing(mismatch, family)
            expected = reference(*args)
            families, elements = families + 1, elements + sum(t.numel() for t in as_tuple(expected))
            if mismatch := compare(expected, outs if len(outs) > 1 else outs[0]) or trespass(outs):
                return differing(mismatch, family)
    except torch.AcceleratorError:  # an asynchronous error of the device is never hidden by a fallback
        raise
    except Exception as error:
        return failure(error, time.perf_counter() - start, "being proved")
    return Verdict(True, "equal", families, elements, time.perf_counter() - start)


def compare_live(operator: Operator, run: Any, args: tuple[Any, ...]) -> Mismatch | None:
    """The call that asked for a proof, as further evidence: kernel against reference on the user's own tensors."""
    try:
        with torch.no_grad():
            return compare(operator.reference(*args), run(*args))
    except Exception as error:
        if of_the_moment(error):  # the battery has passed; a full device is no mismatch
            return None
        raise


def compare_forms(operator: Operator, plan: Plan, args: tuple[Any, ...]) -> Mismatch | None:
    """The form of the plan's outputs against what the reference returns for these very arguments.

    A plan takes the form from the reference on meta, where PyTorch may lay out the same operation otherwise than on a
    device. Where there is no memory for the reference's steps, the forms of the battery's inputs, whose dimensions
    have the same order in memory, are all the evidence.
    """
    try:
        with torch.no_grad():
            expected = as_tuple(operator.reference(*args))
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


# -- inputs -----------------------------------------------------------------------------------------------------


def poisoned(t: Tensor) -> Tensor:
    """Fill with a NaN pattern, in place."""
    if t.numel():
        t.view(BITS[t.element_size()]).fill_(_POISON[t.element_size()])
    return t


def guarded(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device, offset: int = 0
) -> Tensor:
    """A tensor of poison between guard zones of poison, all one allocation. It starts `offset` elements after where
    an allocation of its own would, which is aligned to more than 16 bytes."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else 0
    whole = poisoned(torch.empty(GUARD + offset + span + GUARD, dtype=dtype, device=device))
    return whole.as_strided(shape, strides, GUARD + offset)


def trespass(outs: tuple[Tensor, ...]) -> Mismatch | None:
    """Whether something was written around guarded outputs, or between their elements. Poisons them again."""
    for number, out in enumerate(outs):
        first = out.storage_offset()
        whole = torch.empty(0, dtype=out.dtype, device=out.device).set_(out.untyped_storage())
        poisoned(out)
        written = whole.view(BITS[out.element_size()]) != _POISON[out.element_size()]
        if count := int(written.sum()):
            at = int(written.to(torch.uint8).argmax()) - first
            last = sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True))
            place = (
                f"{-at} elements before its start" if at < 0
                else f"{at - last} elements after its end" if at > last
                else f"between its elements, {at} from its start"
            )  # fmt: skip
            sentence = f"output {number}: {count} elements are written that are not its own, the first {place}"
            return Mismatch(sentence, count=count, output=number)
    return None


def _kept(args: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    """(bytes of the memory that a tensor stands in, a copy of them), of each tensor among the arguments."""
    storages = {a.untyped_storage().data_ptr(): a.untyped_storage() for a in args if isinstance(a, Tensor)}
    whole = [torch.empty(0, dtype=torch.uint8, device=s.device).set_(s) for s in storages.values()]
    return [(t, t.clone()) for t in whole]


def changed(kept: list[tuple[Tensor, Tensor]]) -> Mismatch | None:
    """Whether a launch has written into its arguments."""
    for now, before in kept:
        if not torch.equal(now, before):
            return Mismatch(f"the launch has written into its arguments, {int((now != before).sum())} bytes")
    return None


def in_vectors(t: Tensor) -> bool:
    """Whether it starts at a multiple of four elements, as ATen's kernels ask of rows that they read in vectors of
    four. A tensor without memory is taken to."""
    return hasattr(t, "fake_mode") or t.data_ptr() % (4 * t.element_size()) == 0


def strides(t: Tensor) -> tuple[int, ...]:
    """The strides, those of dimensions of size 1 replaced by what they would be in a dense tensor.

    PyTorch lets the stride of such a dimension be anything; a launch that took it at its word would compile
    one kernel more for each whim.
    """
    found = list(t.stride())
    for dim in reversed(range(t.ndim)):
        if t.shape[dim] == 1:
            found[dim] = found[dim + 1] * t.shape[dim + 1] if dim + 1 < t.ndim else 1
    return tuple(found)


def lookalike(like: Tensor, values: Tensor, gap: int = 0) -> Tensor:
    """A tensor that holds `values` and looks to a kernel like `like`, poison around it and between its elements.

    Same dtype, same order of dimensions in memory, each stride in the same class (0, 1, multiple of 16 or not)
    and the base address as far from a multiple of 16 bytes as in `like`. Where `like` is expanded (stride 0), the
    values of index 0 are expanded. `values` has as many dimensions as `like` and any sizes.

    gap    times 16 elements are left free in every stride but that of 1: operands with different gaps have different
           strides, so that a kernel that reads one with the strides of another goes wrong
    """
    wanted = strides(like)
    expanded = [s == 0 and n > 1 for s, n in zip(wanted, like.shape, strict=True)]
    shape = list(values.shape)
    for dim, is_expanded in enumerate(expanded):
        if is_expanded:
            values = values.narrow(dim, 0, 1)
    found, span = [0] * like.ndim, 1
    for dim in sorted(range(like.ndim), key=lambda d: (wanted[d] != 1, wanted[d], -d)):
        if not expanded[dim]:
            if wanted[dim] != 1:
                span += 16 * gap
            if wanted[dim] % 16 == 0:
                span += -span % 16
            elif wanted[dim] != 1 and span % 16 in (0, 1):
                span += 2
            found[dim] = span
            span *= values.shape[dim]
    offset = like.data_ptr() % 16 // like.element_size()
    out = guarded(tuple(values.shape), tuple(found), like.dtype, like.device, offset)
    out.copy_(values)
    return out.expand(shape)
