"""Audit: one fused call in so many is computed again by its reference, and the bits are compared on the device.

A proof speaks for a signature, on the battery's inputs and on the first call's. An audit looks at the calls of the run
itself, and never makes the CPU wait for the device: two small kernels put what they find into 32 bytes per output,
which are copied to pinned memory behind an event and looked at when that event has passed. A difference condemns the
kernel's signature for the rest of the process, and warns.

An audited call costs its reference once more, and 4 bytes read per element of half precision for the comparison: where
the chains are a third of a stock step, one call in 64 adds half a percent of a stock step, and a call that is not drawn
0.15 us on the CPU. Meanwhile it needs the memory of the reference's steps and results. On a CPU all happens at once.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitfuse.core import proof
from bitfuse.core.bits import BITS, Mismatch, as_tuple, bits_mismatch, form_mismatch, of_output
from bitfuse.core.kernel import kernel
from bitfuse.core.launch import Plan
from bitfuse.core.lines import error_line
from bitfuse.core.operator import Operator, Route

if TYPE_CHECKING:
    import triton.language as tl

PENDING = 64  # checks on their way from the device; a call that is due while there are so many is not audited
_LAUNCHES_KEPT = 256  # forms of outputs for which the comparison stays prepared

# Without its sign bit, every NaN is greater than infinity. Other dtypes have no NaN, or but one.
_INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000, torch.float64: 0x7FF << 52}


class BitfuseWarning(UserWarning):
    """What bitfuse found and put right as far as it could, and the user should know."""


@kernel  # n is specialised: where it is a multiple of 16, as in every model, 16 bytes are read at a time
def _compare_kernel(
    expected_ptr, found_ptr, record_ptr, n,
    MAGNITUDE: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rule of `compare`, on integer views. record: [elements that differ, n - index of the first, ...]."""
    start, lane = tl.program_id(0).to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    inside = lane < n - start
    expected = tl.load(expected_ptr + start + lane, mask=inside, other=0)
    found = tl.load(found_ptr + start + lane, mask=inside, other=0)
    a_number = ((expected & MAGNITUDE) <= INFINITY) | ((found & MAGNITUDE) <= INFINITY)
    differs = (expected != found) & a_number
    count = tl.sum(differs.to(tl.int32), axis=0)
    first = tl.min(tl.where(differs, lane, BLOCK), axis=0)
    tl.atomic_add(record_ptr, count.to(tl.int64), mask=count > 0)
    tl.atomic_max(record_ptr + 1, n - start - first, mask=count > 0)


@kernel(do_not_specialize=("n",))
def _look_up_kernel(expected_ptr, found_ptr, record_ptr, n):
    """record: [..., ..., expected bits at the first difference, found bits there], once all programs above are done."""
    differs = tl.load(record_ptr) > 0
    first = n - tl.load(record_ptr + 1)
    expected = tl.load(expected_ptr + first, mask=differs, other=0)
    found = tl.load(found_ptr + first, mask=differs, other=0)
    tl.store(record_ptr + 2, expected.to(tl.int64))
    tl.store(record_ptr + 3, found.to(tl.int64))


class Comparison:
    """`compare` for two tensors of one form, which leaves its answer on the device instead of waiting."""

    BLOCK = 2048

    def __init__(self) -> None:
        self._launches: dict[tuple, list[Callable[..., Any]]] = {}

    def __call__(self, expected: Tensor, found: Tensor, record: Tensor) -> None:
        """Write to `record`, int64 [4] of zeros: how many differ, numel - first index, expected and found bits there.

        expected, found    of one form (`form_mismatch`), of elements of 1 to 8 bytes; indices are those of the
                           flattened tensors, in order of index, whatever the strides
        """
        integers = BITS[expected.element_size()]
        a, b = expected.contiguous().view(integers), found.contiguous().view(integers)
        device = a.device
        key = (device, expected.dtype, a.numel(), a.data_ptr() % 16 == 0, b.data_ptr() % 16 == 0)
        with torch.cuda.device(device) if a.is_cuda else contextlib.nullcontext():
            if key not in self._launches:
                if len(self._launches) >= _LAUNCHES_KEPT:
                    self._launches.clear()
                plans = self.plans(expected.dtype, a.numel())
                self._launches[key] = [plan.bind((a, b, record), ()) for plan in plans]
            for launch in self._launches[key]:
                launch(a, b, record)

    def plans(self, dtype: torch.dtype, n: int) -> tuple[Plan, Plan]:
        """The two launches for tensors of this dtype and of n elements."""
        infinity = _INFINITY.get(dtype, 0)
        magnitude = (1 << (8 * dtype.itemsize - 1)) - 1 if infinity else 0
        constants = {"MAGNITUDE": magnitude, "INFINITY": infinity, "BLOCK": self.BLOCK}
        grid = (max(1, -(-n // self.BLOCK)), 1, 1)
        compare = Plan(_compare_kernel, grid, (n,), constants, num_warps=4, outputs=())
        return compare, Plan(_look_up_kernel, (1, 1, 1), (n,), {}, num_warps=1, outputs=())


@dataclass
class _Check:
    """A comparison that was launched: what it was of, and where its answer will be once the event has passed.

    `form` is set instead of an answer where the two differ in their form.
    """

    site: str
    operator: Operator
    route: Route
    forms: list[tuple[tuple[int, ...], int]]  # shape and element size of each output
    answer: Tensor  # int64 [outputs, 4], as `Comparison` writes it; in pinned memory
    event: torch.cuda.Event | None
    form: Mismatch | None = None

    def mismatch(self) -> Mismatch | None:
        if self.form is not None:
            return self.form
        for i, ((shape, size), (count, back, expected, found)) in enumerate(
            zip(self.forms, self.answer.tolist(), strict=True)
        ):
            if count:
                flat = torch.Size(shape).numel() - back
                mismatch = bits_mismatch(shape, size, flat, expected, found, count)
                return of_output(i, mismatch) if len(self.forms) > 1 else mismatch
        return None


class Auditor:
    """Audits one fused call in `every`: an observer of sites, shared by all sites of an accelerated model.

    One call is drawn of each run of `every` fused calls, whichever site or signature they are of: so an operator is
    looked at in proportion to its work and the cost is known beforehand; and because it is drawn, no site is missed
    for good where a step's number of calls and `every` have a common divisor. The draw is Python's own and new in
    each process: PyTorch's random numbers are untouched.

    every         at least 1
    calls         calls audited whose result is known
    sites         of which sites, and how many of each
    mismatches    calls that differed from the reference
    condemned     a sentence for each signature that is not used any more because of that
    skipped       calls that were due and not audited, by the reason
    """

    def __init__(self, every: int):
        self.every = every
        self.sites: Counter[str] = Counter()
        self._wrong: Counter[str] = Counter()  # calls that differed, by site
        self.condemned: list[str] = []
        self.skipped: Counter[str] = Counter()
        self._random = random.Random()
        self._place = every - 1  # of the audited call within the last run of `every`
        self._left = self._draw()
        self._pending: deque[_Check] = deque()
        self._compare = Comparison()
        self._patience = proof.Patience()  # with a comparison that can't be made
        self._lock = threading.RLock()  # a warning may be shown by the user's code, which may ask for a report

    def __call__(self, site: Any, operator: Operator, route: Route, args: tuple[Any, ...], result: Any) -> None:
        if route.reason is not None:
            return
        self._left -= 1
        if self._left > 0:
            return
        self._left = self._draw()
        if args[0].is_cuda and torch.cuda.is_current_stream_capturing():
            self.skipped["a CUDA graph was being captured"] += 1
            return
        # In one line, here and below: an interrupt between two lines, which a debugger may raise, could leave it held.
        with self._lock: self._audit(site.name, operator, route, args, as_tuple(result))  # fmt: skip  # noqa: E701

    @property
    def calls(self) -> int:
        return sum(self.sites.values())

    @property
    def mismatches(self) -> int:
        return sum(self._wrong.values())

    def settle(self) -> None:
        """Wait for what is on its way, and act on it."""
        with self._lock: self._look(wait=True)  # fmt: skip  # noqa: E701

    def as_dict(self) -> dict[str, Any]:
        return {
            "every": self.every,
            "calls": self.calls,
            "sites": len(self.sites),
            "mismatches": self.mismatches,
            "condemned": list(self.condemned),
            "skipped": dict(self.skipped),
        }

    def __str__(self) -> str:
        found = f"{self.mismatches} mismatches" if self.mismatches else "no mismatch"
        lines = [f"audit, 1 call in {self.every}: {self.calls} calls of {len(self.sites)} sites, {found}"]
        lines += [f"  condemned: {sentence}" for sentence in self.condemned]
        lines += [f"  {count} calls not audited: {reason}" for reason, count in self.skipped.items()]
        return "\n".join(lines)

    def _draw(self) -> int:
        """How many calls it is to the next audited one."""
        place = self._random.randrange(self.every)
        calls = self.every - self._place + place
        self._place = place
        return calls

    def _audit(
        self, site: str, operator: Operator, route: Route, args: tuple[Any, ...], found: tuple[Tensor, ...]
    ) -> None:
        self._look()
        if len(self._pending) >= PENDING:
            self.skipped[f"{PENDING} checks were still on their way from the device"] += 1
            return
        if self._patience.waiting:
            self.skipped["the comparison could not be made, and is tried again later"] += 1
            return
        start = time.perf_counter()
        try:
            check = self._check(site, operator, route, args, found)
        except torch.AcceleratorError:  # an asynchronous error of the device is never hidden
            raise
        except Exception as error:  # the call itself has its result, and goes on
            if isinstance(error, torch.OutOfMemoryError):
                reason = "the device had no memory left for the reference"
            else:
                reason = f"the comparison can't be made here ({error_line(error)})"
            self.skipped[reason] += 1
            self._patience.failed(proof.Verdict(False, reason, seconds=time.perf_counter() - start))
            return
        if check.form is not None:
            self._pending.appendleft(check)  # known already
        else:
            self._pending.append(check)
        self._look()

    def _check(
        self, site: str, operator: Operator, route: Route, args: tuple[Any, ...], found: tuple[Tensor, ...]
    ) -> _Check:
        """Launch it all, on the stream of the call, which has just written the result and will free the reference's."""
        forms = [(tuple(t.shape), t.element_size()) for t in found]
        with torch.no_grad():
            expected = as_tuple(operator.reference(*args))
            for i, (a, b) in enumerate(zip(expected, found, strict=True)):
                if (mismatch := form_mismatch(a, b)) is not None:
                    mismatch = of_output(i, mismatch) if len(found) > 1 else mismatch
                    return _Check(site, operator, route, forms, torch.empty(0, device="cpu"), None, mismatch)
            record = torch.zeros((len(found), 4), dtype=torch.int64, device=found[0].device)
            for a, b, row in zip(expected, found, record, strict=True):
                self._compare(a, b, row)
        return _Check(site, operator, route, forms, *self._send(record))

    def _send(self, record: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """The record on the CPU, to be read once the event has passed; None: at once."""
        if not record.is_cuda:
            return record, None
        answer = torch.empty(record.shape, dtype=record.dtype, device="cpu", pin_memory=True)
        with torch.cuda.device(record.device):
            answer.copy_(record, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return answer, event

    def _look(self, wait: bool = False) -> None:
        """Act on the checks that are done, in the order of the calls."""
        while self._pending:
            event = self._pending[0].event
            if event is not None and wait:
                event.synchronize()
            elif event is not None and not event.query():
                return
            self._judge(self._pending[0])

    def _judge(self, check: _Check) -> None:
        """Act on the first pending check, and take it from them. Where that is interrupted, it is done again."""
        mismatch, site, condemned = check.mismatch(), check.site, self.condemned
        if mismatch is not None:
            mismatch = replace(mismatch, sentence=f"{mismatch.sentence}, in an audited call at {site}")
            operator, route = check.operator, check.route
            sentence = f"{operator.name} by {route.tier}: {mismatch.sentence}"
            # not that of a call that was under way when the first mismatch was found
            if (operator.condemn(route, mismatch) or route.mismatch == mismatch) and sentence not in condemned:
                condemned = [*condemned, sentence]
        new, sites, wrong, differs = condemned[len(self.condemned) :], self.sites, self._wrong, mismatch is not None
        # One line, so that an interrupt finds all of it done or nothing.
        _, sites[site], wrong[site], self.condemned = self._pending.popleft(), sites[site] + 1, wrong[site] + differs, condemned  # fmt: skip  # noqa: E501
        for sentence in new:
            warnings.warn(
                f"{sentence}; bitfuse uses this kernel no more in this process, "
                "and what was computed since its first call may differ from stock",
                BitfuseWarning,
                stacklevel=2,
            )
