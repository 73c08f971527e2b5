"""What an operator is, and how a call is routed: to a kernel that was proved here, or to the reference.

An `Operator` is an eager PyTorch function (the reference, which is the specification) and a kernel that
claims to equal it bit for bit. A call's exact layout is decided once and then found in a dictionary; the
decision asks the operator's one predicate, `why_not`, and then the proof of this process, on this device, for
the compiled kernel that the call would launch. Whatever can't be fused runs the reference, for a reason that
is a sentence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bitfuse import proof
from bitfuse.kernel import EXACT, Kernel, interpreting
from bitfuse.originals import Originals, called_by
from bitfuse.proof import Outputs

_ROUTES_KEPT = 4096  # layouts remembered per operator; a render uses a dozen


class ShapeError(ValueError, RuntimeError):
    """Arguments that fit neither the kernel nor the reference, for which PyTorch itself raises RuntimeError."""


_switch_value = os.environ.get("BITFUSE", "1")
_on = _switch_value == "1"
switch_error: str | None = None
"""What is wrong with the environment variable BITFUSE; `import bitfuse` raises it as ValueError."""
if _switch_value not in ("0", "1"):
    switch_error = f"the environment variable BITFUSE is {_switch_value!r}; accepted: 0 (off) or 1 (on, the default)"
_OFF = "bitfuse is off (BITFUSE=0 or bitfuse.disable())"


def __getattr__(name: str) -> Any:
    if name == "condemned":  # kernels condemned after their proof: what was captured before is not to be replayed
        return proof.condemnations()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# What may change what a PyTorch op does, read at every call: cheap, private names for public questions.
_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.maybe_current_level


class Out(NamedTuple):
    """The form of one output."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


def outputs_like(result: Outputs) -> tuple[Out, ...]:
    """The forms of what a reference returned, on meta for one: `outputs_like(on_meta(reference, x, weight, eps))`."""
    return tuple(Out(tuple(t.shape), t.stride(), t.dtype) for t in proof.as_tuple(result))


@dataclass(frozen=True)
class Plan:
    """One launch, except for its pointers: everything that is fixed by the shapes, strides and dtypes of a call.

    The kernel's parameters are, in this order: the call's tensors (None for an optional one that is absent or
    omitted; floats and ints of the call are not passed on), the `extras`, the witnesses, the outputs, `scalars`,
    `constants`.

    outputs    their forms, those of what the reference returns; one output is returned as it is, several as a tuple
    before     called with the call's arguments before each launch: statistics, say, computed by ATen. Returns the
               extras: fresh dense tensors
    extras     their dtypes
    witnesses  forms of what the kernel writes besides, for the proof alone to see: a row's statistic in fp32 shows a
               wrong order of additions that the rounded outputs hide. A call drops them
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    scalars: tuple[Any, ...]  # ints and floats
    constants: dict[str, Any]
    num_warps: int
    outputs: tuple[Out, ...]
    before: Callable[..., tuple[Tensor, ...]] | None = None
    extras: tuple[torch.dtype, ...] = ()
    witnesses: tuple[Out, ...] = ()
    options: dict[str, Any] = field(default_factory=lambda: dict(EXACT))

    def signature(self, args: tuple[Any, ...]) -> tuple:
        """Everything the bits and the outputs' form may depend on, as classes: token counts are not in it.

        What selects the compiled kernel; which strides are 0, so that one row serves many; and in which order the
        dimensions of each tensor lie in memory, by which PyTorch lays out the outputs.
        """
        pointers = tuple(
            t if t is None else (t.dtype, t.data_ptr() % 16 == 0, _order(t.shape, t.stride()))
            for t in self.pointers(args)
        )
        outs = tuple((out.dtype, _order(out.shape, out.strides)) for out in (*self.witnesses, *self.outputs))
        names = self.kernel.parameters[-len(self.scalars) - len(self.constants) :]
        scalars = tuple(
            _specialisation(value, self.kernel.fn.__annotations__.get(name), name in self.kernel.do_not_specialize)
            for value, name in zip(self.scalars, names, strict=False)
        )
        constants = tuple((name, str(value)) for name, value in self.constants.items())
        kernel = (self.kernel.fn.__qualname__, constants, self.num_warps, tuple(self.options.items()))
        return (kernel, args[0].device, pointers, self.extras, outs, scalars)

    def pointers(self, args: tuple[Any, ...]) -> list[Tensor | None]:
        """The call's tensors, those that it omits as None."""
        given = [a for a in args if a is None or isinstance(a, Tensor)]
        others = len(self.extras) + len(self.witnesses) + len(self.outputs) + len(self.scalars) + len(self.constants)
        return given + [None] * (len(self.kernel.parameters) - others - len(given))

    def empty(self, device: torch.device) -> tuple[Tensor, ...]:
        """Witnesses and outputs, to be written."""
        return tuple(out.empty(device) for out in (*self.witnesses, *self.outputs))

    def compile(self, args: tuple[Any, ...]) -> None:
        """Compile the kernel and load it onto the arguments' device, in any thread: `bind` then finds it."""
        with _on_device(args[0]):
            extras = (torch.empty(16, dtype=dtype, device=args[0].device) for dtype in self.extras)
            self._compiled((*self.pointers(args), *extras, *self.empty(args[0].device)))

    def bind(self, args: tuple[Any, ...], outs: tuple[Tensor, ...]) -> Callable[..., Any]:
        """Compile for these arguments; returns launch(*args, *outs), good for every call with the same layout."""
        before = self.before
        extras = before(*args) if before else ()
        if (found := tuple(t.dtype for t in extras)) != self.extras:
            raise TypeError(f"what comes before the launch gave {found}, not {self.extras}")
        pointers = self.pointers(args)
        run = self._compiled((*pointers, *extras, *outs))
        n, kept = len(args), [i for i, a in enumerate(args) if a is None or isinstance(a, Tensor)]
        omitted = [None] * (len(pointers) - len(kept))
        if before is None and not omitted and len(kept) == n:
            return run  # every argument is a pointer

        def launch(*given: Any) -> Any:
            extras = before(*given[:n]) if before else ()
            return run(*[given[i] for i in kept], *omitted, *extras, *given[n:])

        return launch

    def _compiled(self, pointers: tuple[Tensor | None, ...]) -> Callable[..., Any]:
        tail = (*self.scalars, *self.constants.values())
        if interpreting():
            interpreted = self.kernel.interpreted[self.grid]
            return lambda *pointers: interpreted(*pointers, *tail)
        compiled = self.kernel.compiled.warmup(
            *pointers, *self.scalars, grid=self.grid, **self.constants, num_warps=self.num_warps, **self.options
        )
        # The compiled kernel's own runner skips the JIT's argument inspection, and addresses skip its inspection
        # of tensors: the route's key already fixes all that they would look at.
        runner = compiled[self.grid]
        return lambda *pointers: runner(*[None if t is None else t.data_ptr() for t in pointers], *tail)


def _specialisation(value: int | float, annotation: str | None, by_width_alone: bool) -> str:
    """A float itself; of an integer, the class into which Triton's JIT puts it: one kernel is compiled per class.

    0 is a multiple of 16 to Triton, and here a class of its own: as a stride it reads one row for many.
    """
    if isinstance(value, float):
        return repr(value)
    width = "i32" if annotation is None and -(2**31) <= value < 2**31 else "i64"
    if by_width_alone:
        return width
    if value in (0, 1):
        return str(int(value))
    return width + ("/16" if value % 16 == 0 else "")


def _order(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(dimensions from the innermost in memory to the outermost, those that are expanded), as `lookalike` keeps them.

    The stride of a dimension of size 1, which may be anything, counts as what it would be in a dense tensor. The first
    dimension, the batch, is then the outermost, in whichever order the others are.
    """
    strides = list(stride)
    for dim in reversed(range(len(shape))):
        if shape[dim] == 1:
            strides[dim] = strides[dim + 1] * shape[dim + 1] if dim + 1 < len(shape) else 1
    if shape[:1] == (1,):
        strides[0] = 1 + max((s * n for s, n in zip(strides[1:], shape[1:], strict=True)), default=0)
    expanded = tuple(dim for dim, n in enumerate(strides) if n == 0 and shape[dim] > 1)
    order = sorted(set(range(len(shape))).difference(expanded), key=lambda dim: (strides[dim], -dim))
    return tuple(order), expanded


@dataclass(frozen=True)
class Tier:
    """One way to fuse an operator. `plan` gives the launch, or a sentence: why not this way for these arguments."""

    name: str
    plan: Callable[..., Plan | str]


@dataclass(slots=True)
class Route:
    """Where calls of one layout go. `reason` is None when they are fused, else the sentence why not.

    What `run` raises once a layout is decided passes to the caller, and the route stays: where there is no memory for
    the output there is none for the reference's, and an error of the device must not be hidden.

    mismatch       set where they are not fused and a kernel was seen to differ from the reference
    tier           the name of the operator's tier that they are fused by
    passed_over    why the tiers before that one were not taken
    signature      of the kernel that they are fused by: what was proved, and may be condemned
    """

    run: Callable[..., Any]
    reason: str | None = None
    mismatch: proof.Mismatch | None = None
    tier: str | None = None
    passed_over: tuple[str, ...] = ()
    signature: tuple | None = None

    @property
    def fused(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel: the operator's own with source edits and compiler options. The battery must catch it.

    harmless_for    dtypes of the first argument (the others as the host has them) for which the change alters no bit
                    at all: fp16 products, for one, are exact in fp32 and in its range, so rounding them again changes
                    nothing
    compiled_only   only a compiler makes it wrong; the interpreter runs it as written
    tier            index of the operator's tier whose kernel is edited
    case            name of the operator's case on which it does harm, where not on every one
    kind            of `mutation.KINDS` where it was generated
    """

    name: str
    edits: tuple[tuple[str, str], ...] = ()
    options: dict[str, Any] = field(default_factory=lambda: dict(EXACT))
    harmless_for: tuple[torch.dtype, ...] = ()
    compiled_only: bool = False
    tier: int = 0
    case: str | None = None
    kind: str = ""

    def case_of(self, operator: Operator) -> Any:
        """The operator's case that the battery catches this mutant on: the named one, or the first."""
        if self.case is None:
            return operator.cases[0]
        return {case.name: case for case in operator.cases}[self.case]

    def plan(self, operator: Operator, *args: Any) -> Plan | str:
        plan = operator.tiers[self.tier].plan(*args)
        if isinstance(plan, str):
            return plan
        return replace(plan, kernel=_edited(plan.kernel, self.edits), options=self.options)


def flushed(name: str) -> str:
    """For mutants: source of a value of this name whose subnormals in fp32 are set to zero."""
    return f"tl.where(tl.abs({name}) < 1.1754943508222875e-38, {name} * 0.0, {name})"


@functools.cache
def _edited(kernel: Kernel, edits: tuple[tuple[str, str], ...]) -> Kernel:
    return kernel.edited(*edits)


@dataclass(frozen=True)
class Audit:
    """What the PTX for one of the operator's cases must hold: exact counts of rounding instructions.

    No rounding instruction may appear that is named nowhere here. A packed one counts for as many results as it
    makes; a result is an element of the first output.

    counts        instructions for every `per` results
    per           2 for rotary embeddings, which make their results in pairs
    per_thread    further ones of each thread, however many results it makes: what is done once per row
    also          instructions that may appear any number of times: additions of a fold over the lanes of a row
    results       how many of them one thread makes; by default as many as it stores
    loads         what one thread reads from global memory: number of accesses by their width in bytes; by default
                  each operand once, 16 bytes at a time
    stores        likewise what it writes; by default 16 bytes at a time
    tier          index of the tier
    """

    case: str
    counts: dict[str, int]
    per: int = 1
    per_thread: dict[str, int] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    results: int | None = None
    loads: dict[int, int] | None = None
    stores: dict[int, int] | None = None
    tier: int = 0


@dataclass(eq=False)
class Operator:
    """An exact operator: the eager `reference` and a kernel that claims to equal it bit for bit.

    It is called with its reference's parameters, by position: the first is a tensor, others may be tensors,
    optional tensors (None), floats and ints. A reference returns a new tensor or a tuple of two or more.
    `why_not`, `battery` and each tier's `plan` have the reference's parameters, defaults included.

    name        the reference's name, also `torch.ops.bitfuse.<name>`
    reference   the host's chain, op for op: specification, fallback, fake function, gradient, bench baseline
    source      whose chain it is: host, version, function
    why_not     sentences: why these arguments can't be fused. Raises ShapeError where the shapes don't fit
    tiers       ways to fuse arguments that `why_not` has nothing against; the first that is proved equal is taken
    battery     (family, arguments) of the same signature as the given arguments: what a wrong kernel trips over
    cases       geometries for tests, `verify` and `bench`: the real LTX-2 ones by name, and odd ones. Each has a
                `name`, `real` and `arguments(device, tokens=None, seed=0)`
    mutants     wrong kernels that the battery must catch
    audits      cases whose PTX is counted, with the counts
    emulated    the reference with its reductions in the order of the first tier, which is CUDA's: on a CPU, whose
                ATen adds in another, the first tier is held against this
    witness     what the plans' `witnesses` must be, by the reference's own ops; `emulated_witness` beside `emulated`
    retiled     the same launch cut in other ways, which must not change a bit

    Besides, `originals` holds (owner, name, label) of each function that the reference calls and the kernel leaves out
    (`bitfuse.originals`). A call made directly runs the reference where one of them has been replaced since.
    """

    reference: Callable[..., Outputs]
    source: str
    why_not: Callable[..., Iterator[str]]
    tiers: tuple[Tier, ...]
    battery: Callable[..., Iterable[tuple[str, tuple[Any, ...]]]]
    cases: tuple[Any, ...] = ()
    mutants: tuple[Mutant, ...] = ()
    audits: tuple[Audit, ...] = ()
    emulated: Callable[..., Outputs] | None = None
    witness: Callable[..., tuple[Tensor, ...]] | None = None
    emulated_witness: Callable[..., tuple[Tensor, ...]] | None = None
    retiled: Callable[[Plan], Iterable[Plan]] | None = None
    _routes: dict[tuple | None, Route] = field(default_factory=dict, repr=False)
    _launches: dict[tuple | None, Callable[..., Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.name = self.reference.__name__
        self.__doc__ = self.reference.__doc__
        self._kinds = {name: kind for name, kind in get_type_hints(self.reference).items() if name != "return"}
        parameters = inspect.signature(self.reference).parameters.values()
        self._required = sum(parameter.default is parameter.empty for parameter in parameters)
        self.originals = called_by(self.reference)
        self._difference = Originals(self.originals).difference
        _register(self)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler gets the PyTorch chain itself, and no graph break
            return self.reference(*args)
        return self.route(*args).run(*args)

    def route(self, *args: Any) -> Route:
        """Where a call with these arguments goes. A dictionary lookup, except the first time for a layout.

        Raises TypeError where no tensor is given for one that is needed, ShapeError where the shapes don't fit.
        """
        if (replaced := self._difference()) is not None:
            return Route(self.reference, _replaced(replaced))
        if _watched() and (reason := next(around(), None)) is not None:  # before anything is asked of a tensor
            return Route(self.reference, reason)
        key = _layout(args)
        return self._routes.get(key) or self._decided(key, args)

    def routed(self, *args: Any) -> Route:
        """`route`, for callers who know that none of `originals` is replaced: a host looks once for a whole forward."""
        if _watched() and (reason := next(around(), None)) is not None:
            return Route(self.reference, reason)
        key = _layout(args)
        return self._routes.get(key) or self._decided(key, args)

    def _decided(self, key: tuple | None, args: tuple[Any, ...]) -> Route:
        """The route of a layout that is not decided yet.

        It is kept in the dictionary that was there before the decision began. A condemnation puts a new dictionary in
        its place, so that a decision under way, which may not have heard of it, is not kept.
        """
        self._check(args)
        while True:
            routes = self._routes
            route, keep = self._decide(args)
            if keep and key is not None:
                proof.remember(routes, key, route, _ROUTES_KEPT)
            if routes is self._routes:
                return route

    def _check(self, args: tuple[Any, ...]) -> None:
        """TypeError for a wrong number of arguments, and for what is no tensor where one is needed.

        A number in place of any tensor but the first is left to the reference, which may take it.
        """
        names = ", ".join(self._kinds)
        if not self._required <= len(args) <= len(self._kinds):
            takes = f"{self._required}" if self._required == len(self._kinds) else f"{self._required} or more"
            raise TypeError(f"{self.name}: given {len(args)} arguments; accepted: {takes} of {names}")
        for place, ((name, kind), value) in enumerate(zip(self._kinds.items(), args, strict=False)):
            numeric = place > 0 and isinstance(value, (int, float))
            if kind in (Tensor, Tensor | None) and not isinstance(value, kind) and not numeric:
                raise TypeError(f"{self.name}: {name} is {_described(value)}; accepted: {_KINDS[kind]}")

    def explain(self, *args: Any) -> list[str]:
        """All reasons why a call with these arguments would run the reference; empty when it would be fused."""
        self._check(args)
        reason = self.route(*args).reason
        if reason is None:
            return []
        replaced = self._difference()
        reasons = [*([] if replaced is None else [_replaced(replaced)]), *self._reasons(args)]
        return reasons or [reason]

    def launch(self, *args: Any) -> Any:
        """The kernel, with no proof and no fallback: ValueError with every reason where it can't run."""
        key = _layout(args)
        run = self._launches.get(key)
        if run is None or next(around(), None) is not None:
            self._check(args)
            if reasons := list(self._reasons(args)):
                raise ValueError(f"{self.name}: {'; '.join(reasons)}")
            plan = self.plan(*args)
            if (mismatch := proof.compare_forms(self, plan, args)) is not None:
                raise ValueError(f"{self.name}: {mismatch.sentence}, for this layout of the arguments")
            run = self._runner(plan, args)
            if key is not None:
                proof.remember(self._launches, key, run, _ROUTES_KEPT)
        return run(*args)

    def plan(self, *args: Any) -> Plan:
        """The launch of the first tier that can do these arguments; ValueError where none can."""
        declined = []
        for tier in self.tiers:
            plan = tier.plan(*args)
            if isinstance(plan, Plan):
                return plan
            declined.append(f"{tier.name}: {plan}")
        raise ValueError(f"{self.name}: {'; '.join(declined)}")

    def forget(self) -> None:
        """Drop what was decided and prepared, layout by layout; the proofs stay."""
        self._routes.clear()
        self._launches.clear()

    def condemn(self, route: Route, mismatch: proof.Mismatch) -> bool:
        """Use the kernel of a fused route no more in this process: it was seen to differ after it had been proved.

        Calls of its signature, of whatever layout, are decided anew: by the next tier that is proved, else by the
        reference, with the mismatch's sentence. A route that a caller still holds runs the reference from now on.
        False where that had been done before.
        """
        assert route.tier is not None, "only a fused route has a kernel to condemn"
        assert route.signature is not None, "only a fused route has a kernel to condemn"
        key, verdict, held = proof.key_of(self, route.tier, route.signature), proof.condemning(mismatch), self._routes
        if key in proof._refuted:
            self._routes = {}
            return False
        # In one line: an interrupt finds both done or neither. Other layouts are decided anew, too, which is rare.
        kept, self._routes = proof._condemned.setdefault(key, verdict), {}
        for other in (route, *list(held.values())):
            if (other.tier, other.signature) == (route.tier, route.signature):
                other.run = self.reference
                other.reason, other.mismatch = kept.sentence, kept.mismatch
        return kept is verdict

    def verdict(self, *args: Any) -> proof.Verdict:
        """The proof for the kernel that these arguments would launch: from this process's memory, or made now."""
        for tier in self.tiers:
            _, verdict, _ = self._proved(tier, args)
            if verdict.equal:
                break
        return verdict

    def specification(self, tier: int, device: torch.device | str | None = None) -> Callable[..., Outputs]:
        """What a tier is held against, the first tier's witnesses included: the reference, or on a CPU, where it is
        named, the first tier's `emulated`."""
        emulate = self.emulated is not None and tier == 0 and device is not None and torch.device(device).type == "cpu"
        reference = self.emulated if emulate and self.emulated else self.reference
        witness = self.emulated_witness if emulate else self.witness
        if witness is None or tier > 0:
            return reference
        return lambda *args: (*witness(*args), *proof.as_tuple(reference(*args)))

    def _reasons(self, args: tuple[Any, ...]) -> Iterator[str]:
        wrong = [
            f"{name} is a {type(value).__name__}; accepted: {_KINDS[kind]}"
            for (name, kind), value in zip(self._kinds.items(), args, strict=False)
            if not isinstance(value, kind)
        ]
        return iter(wrong) if wrong else self.why_not(*args)

    def _proved(self, tier: Tier, args: tuple[Any, ...]) -> tuple[Plan | str, proof.Verdict, bool]:
        """(plan, its verdict, whether that was found just now)"""
        plan = tier.plan(*args)
        if isinstance(plan, str):
            return plan, proof.Verdict(False, plan), False
        signature = plan.signature(args)
        verdict = proof.known(self, tier, signature)
        if verdict is None or verdict.equal:
            verdict = proof.waiting(self, tier, signature) or verdict
        if verdict is not None:
            return plan, verdict, False
        with _on_device(args[0]), torch.no_grad():
            return plan, proof.prove(self, tier, signature, args), True

    def _decide(self, args: tuple[Any, ...]) -> tuple[Route, bool]:
        """The route, and whether to remember it."""
        reason = next(self._reasons(args), None)
        if reason is not None:
            return Route(self.reference, reason), reason != _OFF and not _capturing(args[0])
        passed_over: list[str] = []
        mismatch, final = None, True
        for tier in self.tiers:
            plan, verdict, new = self._proved(tier, args)
            if isinstance(plan, Plan) and verdict.equal:
                run, verdict = self._prepared(tier, plan, args, new)
                if verdict.equal:
                    passed = tuple(passed_over)
                    return Route(run, tier=tier.name, passed_over=passed, signature=plan.signature(args)), final
            passed_over.append(verdict.sentence if len(self.tiers) == 1 else f"{tier.name}: {verdict.sentence}")
            mismatch, final = verdict.mismatch or mismatch, final and verdict.final
        return Route(self.reference, "; ".join(passed_over), mismatch), final

    def _prepared(
        self, tier: Tier, plan: Plan, args: tuple[Any, ...], new: bool
    ) -> tuple[Callable[..., Any], proof.Verdict]:
        """(what runs a proved kernel for this layout, whether it may): the reference where it may not, and why not."""
        start, signature = time.perf_counter(), plan.signature(args)
        if (mismatch := proof.compare_forms(self, plan, args)) is not None:  # of this layout alone
            return self.reference, proof.Verdict(False, f"{mismatch.sentence}, for this layout of the arguments")
        try:
            run = self._runner(plan, args)
            live = proof.compare_live(self, run, args) if new else None
        except torch.AcceleratorError:
            raise
        except Exception as error:
            failure = proof.failure(error, time.perf_counter() - start, "being prepared")
            if not failure.final:
                proof.postpone(self, tier, signature, failure)
            return self.reference, failure
        if live is None:
            return run, proof.Verdict(True, "equal")
        self.condemn(Route(run, tier=tier.name, signature=signature), live)
        return self.reference, proof.known(self, tier, signature) or proof.condemning(live)

    def rehearse(self, take: Callable[[Plan, tuple[Any, ...]], object], args: tuple[Any, ...]) -> None:
        """Give `take` the kernel that `route` would prove for these arguments, as a launch, where there is one."""
        tier = self.tiers[0]
        plan = next(self._reasons(args), None) or tier.plan(*args)
        if isinstance(plan, Plan) and proof.known(self, tier, plan.signature(args)) is None:
            # a small launch of the same kernel; why there is none will be said where it is to be proved
            with contextlib.suppress(Exception), _on_device(args[0]), torch.no_grad():
                _, small = next(iter(self.battery(*args)))
                if isinstance(plan := tier.plan(*small), Plan):
                    take(plan, small)

    def _runner(self, plan: Plan, args: tuple[Any, ...]) -> Callable[..., Any]:
        device = args[0].device
        with _on_device(args[0]):
            launch = plan.bind(args, plan.empty(device))
        (shape, strides, dtype), *others = (*plan.witnesses, *plan.outputs)
        index = device.index  # None on a CPU
        unseen, one = len(plan.witnesses), len(plan.outputs) == 1

        def run(*args: Any) -> Any:
            out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            outs = (out, *[other.empty(device) for other in others]) if others else (out,)
            if index is None or index == torch.cuda.current_device():
                launch(*args, *outs)
            else:  # Triton launches on the current device, whatever the tensors' device is
                with torch.cuda.device(index):
                    launch(*args, *outs)
            return outs[unseen] if one else outs[unseen:]

        return run


_VALUES = frozenset({type(None), float, int})


def _layout(args: tuple[Any, ...]) -> tuple | None:
    """All that a launch is prepared for, to be looked up by; None where there is no memory to lay out."""
    grad = torch.is_grad_enabled()
    try:
        parts: list[Any] = [] if args[0].is_cuda else [interpreting()]
        for t in args:
            kind = type(t)
            if kind in _VALUES:
                parts += (kind, t or str(t))  # 0.0 and -0.0 are equal, and so are 1 and 1.0
                continue
            address = t.data_ptr()
            if not address:  # empty, meta, or a wrapper
                return None
            parts += (
                kind,
                t.shape,
                t.stride(),
                t.dtype,
                t.get_device() if t.is_cuda else t.device,  # an index hashes faster than a device
                address & 15,
                t.is_neg(),
                grad and t.requires_grad,
            )
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, IndexError):
        return None  # fake tensors, other layouts than strided, no tensors
    return tuple(parts)


def _replaced(label: str) -> str:
    return f"{label} has been replaced since bitfuse was imported, and is left out by the kernel"


def _described(value: Any) -> str:
    """What was given, for messages: None, or the name of its class."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return "None" if value is None else f"a {name}"


OPERATORS: dict[str, Operator] = {}
"""Every operator by name, in the order of definition."""


# What a reference may declare a parameter to be: how torch.library calls it, and how a sentence does.
_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int"}
_KINDS = {Tensor: "a tensor", Tensor | None: "a tensor or None", float: "a float", int: "an int"}


def _schema(reference: Callable[..., Outputs]) -> str:
    hints = get_type_hints(reference)
    parameters = []
    for name, parameter in inspect.signature(reference).parameters.items():
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        parameters.append(f"{_SCHEMA[hints[name]]} {name}{default}")
    returned = hints["return"]
    several = get_args(returned)
    result = f"({', '.join(_SCHEMA[kind] for kind in several)})" if several else _SCHEMA[returned]
    return f"({', '.join(parameters)}) -> {result}"


def _register(operator: Operator) -> None:
    """Make the operator `torch.ops.bitfuse.<name>`, its fake function and its gradient those of the reference."""
    OPERATORS[operator.name] = operator

    def forward(*args: Any) -> Any:
        with torch.no_grad():  # autograd has taken over outside this op
            return operator.route(*args).run(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in inputs))
        ctx.values = [None if isinstance(a, Tensor) else a for a in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The vector-Jacobian product of the reference itself."""
        inputs = [v if t is None else t for t, v in zip(ctx.saved_tensors, ctx.values, strict=True)]
        needed = [*ctx.needs_input_grad, *[False] * len(inputs)][: len(inputs)]  # arguments left out need none
        twice = torch.is_grad_enabled()  # only when this gradient will be differentiated in its turn
        with torch.enable_grad():
            if not twice:
                inputs = [
                    a.detach().requires_grad_(n) if isinstance(a, Tensor) else a
                    for a, n in zip(inputs, needed, strict=True)
                ]
            wanted = [a for a, n in zip(inputs, needed, strict=True) if n]
            outs = proof.as_tuple(operator.reference(*inputs))
            pairs = [(out, g) for out, g in zip(outs, grads, strict=True) if g is not None and out.requires_grad]
            if not pairs:
                return (None,) * len(inputs)
            outs, cotangents = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outs, wanted, cotangents, create_graph=twice, allow_unused=True))
        return tuple(next(found) if n else None for n in needed)

    op = torch.library.custom_op(
        f"bitfuse::{operator.name}", forward, mutates_args=(), schema=_schema(operator.reference)
    )
    op.register_fake(operator.reference)
    op.register_autograd(backward, setup_context=setup_context)


# -- sentences that every operator's `why_not` shares -----------------------------------------------------------


def _watched() -> bool:
    """Whether `around` may have something to say: its questions, without the time that a generator takes."""
    return (
        not _on
        or torch.compiler.is_compiling()
        or _tracing() is not None
        or _dispatch_modes() > 0
        or _function_modes() > 0
        or _functorch_level() is not None
        or forward_ad._current_level >= 0
        or _autocast()
    )


def around() -> Iterator[str]:
    """Why no kernel may run just now, whatever the tensors are: who else is watching PyTorch's ops."""
    if not _on:
        yield _OFF
    if torch.compiler.is_compiling() or _tracing() is not None:
        yield "PyTorch is tracing; the tracer gets the PyTorch chain itself"
    if _dispatch_modes() or (_function_modes() and _watching_functions()):
        yield "a torch dispatch or function mode is active and wants to see every PyTorch op"
    if _functorch_level() is not None:
        yield "a functorch transform (vmap, grad, jvp, functionalize) is under way"
    if forward_ad._current_level >= 0:
        yield "forward-mode differentiation is under way"
    if _autocast():
        yield "autocast is on, and may change what the PyTorch chain computes"


def plain(arguments: dict[str, Any]) -> Iterator[str]:
    """Why the tensors among these named arguments are not plain ones with memory of their own, if so."""
    for name, t in _tensors(arguments).items():
        if type(t) not in (Tensor, torch.nn.Parameter):
            yield f"{name} is a {type(t).__name__}, not a plain tensor"
        elif torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._is_functional_tensor(t):
            yield f"{name} is inside a functorch transform, and has no memory of its own"
        elif t.layout != torch.strided:
            yield f"{name} is a {t.layout} tensor, not a strided one"
        if t.is_neg() or t.is_conj():
            yield f"{name} is a lazy view (its negation or conjugation is still pending)"


def fitting(reference: Callable[..., Outputs], arguments: dict[str, Any], problem: str | None) -> Iterator[str]:
    """Turn a shape problem into ShapeError where the reference would fail too, else into a reason."""
    if problem is None:
        return
    try:
        on_meta(reference, *arguments.values())
    except Exception:
        given = ", ".join(f"{name} {list(t.shape)}" for name, t in _tensors(arguments).items())
        raise ShapeError(f"{reference.__name__}: {problem}; given {given}") from None
    yield f"{problem} (the PyTorch chain takes these shapes in its own way)"


def runnable(arguments: dict[str, Any]) -> Iterator[str]:
    """Why no kernel may run for these named arguments here and now."""
    yield from around()
    tensors = _tensors(arguments)
    if importlib.util.find_spec("triton") is None:
        yield "Triton is not installed"
    first, *_ = tensors
    device = tensors[first].device
    for name, t in tensors.items():
        if t.device != device:
            yield f"{name} is on {t.device} and {first} on {device}"
    if device.type == "cpu" and not interpreting():
        yield "the tensors are on the CPU, where kernels run only in Triton's interpreter (TRITON_INTERPRET=1)"
    elif device.type not in ("cpu", "cuda"):
        yield f"the tensors are on {device}; kernels run on CUDA devices"
    elif device.type == "cuda" and interpreting():
        yield "TRITON_INTERPRET=1 is set, and the interpreter is for CPU tensors"
    if torch.is_grad_enabled() and (wanting := [name for name, t in tensors.items() if t.requires_grad]):
        yield f"a gradient is required of {', '.join(wanting)}"
    if tensors[first].numel() == 0:
        yield f"{first} is empty: there is nothing to compute"
    if _capturing(tensors[first]):  # a probe or a battery would wait for the device, which breaks the capture
        yield "this layout is not decided yet and a CUDA graph is being captured"


def _tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: a for name, a in arguments.items() if isinstance(a, Tensor)}


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _watching_functions() -> bool:
    """Function modes other than `torch.set_default_device`'s, which touches factory functions only."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def on_meta(reference: Callable[..., Any], *args: Any) -> Any:
    """What the reference returns, without values: shapes, strides and dtypes, and its own shape errors.

    Remembered by the forms of the arguments: PyTorch takes 1 to 3 ms for it, and a proof asks seven times.
    """
    return _on_meta(reference, *(_Form(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in args))


class _Form(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@functools.lru_cache(_ROUTES_KEPT)
def _on_meta(reference: Callable[..., Any], *args: Any) -> Any:
    forms = (torch.empty_strided(*a[:2], dtype=a.dtype, device="meta") if isinstance(a, _Form) else a for a in args)
    with torch.no_grad():
        return reference(*forms)


# -- the switch, and what was decided ----------------------------------------------------------------------------


def enable() -> None:
    """Switch bitfuse on (it is, unless BITFUSE=0 or `disable()`)."""
    _switch(True)


def disable() -> None:
    """Switch bitfuse off: every operator runs its reference, from the next call on."""
    _switch(False)


def _switch(on: bool) -> None:
    global _on
    _on = on
    for operator in OPERATORS.values():
        operator.forget()


def explain(operator: str | Operator, *args: Any) -> list[str]:
    """All reasons why `operator`, called with these arguments, would run the PyTorch chain; empty when it is fused.

    operator    an `Operator`, or its name: one of `bitfuse.OPERATORS`
    args        its arguments. Shapes that don't fit raise ShapeError, what is no tensor TypeError, as the call would
    """
    if not isinstance(operator, (str, Operator)):
        raise TypeError(f"operator is {_described(operator)}; accepted: an Operator, or a name: {', '.join(OPERATORS)}")
    if isinstance(operator, str):
        if operator not in OPERATORS:
            raise ValueError(f"operator is {operator!r}; accepted: {', '.join(OPERATORS)}")
        operator = OPERATORS[operator]
    return operator.explain(*args)


def _on_device(t: Tensor) -> Any:
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
