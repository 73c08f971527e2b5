"""What an operator is, and how a call is routed: to a kernel that was proved here, or to the reference.

An `Operator` is an eager PyTorch function (the reference, which is the specification) and a kernel that claims to equal
it bit for bit. Whatever can't be fused runs the reference, for a reason that is a sentence. A call asks, in this order:

1. Is a compiler tracing? Then it gets the reference itself (`__call__`).
2. Has a function that the reference calls been replaced (`originals`)? Is bitfuse off, or does somebody want to see
   every PyTorch op (`conditions.around`)? Then the reference runs. This is asked at every call, and no answer is kept.
3. Was this layout decided before? A layout (`_layout`) is all that a launch is prepared for: the exact shapes,
   strides, dtypes, device and alignment of the tensors, the values of floats and ints, and for which ops Python code
   stands in for ATen's (`rerouted`). `_routes` has a `Route` for each that was decided, and the call takes it. Only a
   layout that is met for the first time comes to the questions below.
4. Are these the operator's kinds of arguments (`_check` raises TypeError), and does `why_not` name a reason against
   fusing them? The first that it names is the route's. Shapes that the reference rejects too raise ShapeError.
5. For each tier, in order: does it give a `Plan`, and is the kernel of that plan proved? A verdict is kept in
   `bitfuse.core.proof` for operator, tier and signature. A signature (`Plan.signature`) is coarser than a layout: the
   number of tokens is not in it, so one proof serves many layouts. Where there is no verdict yet, the battery runs.
6. Do the plan's outputs have the form that the reference gives its own for these very arguments (`compare_forms`)?
   And, if the battery has just run, are the bits of this call equal, too (`compare_live`)? Where Python code stands in
   for an op this is asked of every layout, as such code may choose by shape and alignment; and so it is where ATen
   itself chooses an order of additions by the shape (`Plan.by_shape`).

The first tier that passes 5 and 6 has the call. If none does, the reference has it, and the route says why not. The
route is kept for its layout, unless an error of the moment (no memory, no disk) stood in the way, a CUDA graph was
being captured, or the layout has no key. A kernel whose bits were seen to differ, by its battery, by `compare_live` or
by an audit later on, is not used again in this process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch import Tensor

from bitfuse.core import conditions, library, proof
from bitfuse.core.bits import Mismatch, Outputs, as_tuple
from bitfuse.core.conditions import around, described
from bitfuse.core.kernel import interpreting
from bitfuse.core.launch import Plan, few_bytes, on_device
from bitfuse.core.originals import Originals, called_by, rerouted

if TYPE_CHECKING:
    from bitfuse.core.evidence import Evidence

# The fields of `Evidence`, which is not imported here: `import bitfuse` loads no evidence
EVIDENCE_FIELDS = frozenset(
    ("battery", "cases", "mutants", "audits", "emulated", "witness", "emulated_witness", "retiled")
)
_ROUTES_KEPT = 4096  # layouts remembered per operator; a render uses a dozen


@dataclass(frozen=True)
class Tier:
    """One way to fuse an operator. `plan` gives the launch, or a sentence: why not this way for these arguments."""

    name: str
    plan: Callable[..., Plan | str]


@dataclass(slots=True)
class Route:
    """Where calls of one layout go: `run` is called with a call's arguments, and returns its result.

    What `run` raises passes to the caller, and the route stays: where there is no memory for the kernel's output there
    is none for the reference's either, and an error of the device must not be hidden.

    run            launches the kernel; or the reference
    reason         None when the calls are fused, else the sentence why not
    mismatch       set where the calls are not fused because a kernel was seen to differ from the reference
    tier           the name of the operator's tier that the calls are fused by
    passed_over    why the tiers before that one were not taken
    signature      of the kernel that the calls are fused by (`Plan.signature`): what was proved, and may be condemned
    lasts          whether the next call of this layout goes the same way. Not where an error of the moment stood in the
                   way of a proof, or somebody watches PyTorch's ops just now
    """

    run: Callable[..., Any]
    reason: str | None = None
    mismatch: Mismatch | None = None
    tier: str | None = None
    passed_over: tuple[str, ...] = ()
    signature: tuple | None = None
    lasts: bool = True

    @property
    def fused(self) -> bool:
        return self.reason is None


OPERATORS: dict[str, Operator] = {}
"""Every operator by name, in the order of definition."""


class Operator:
    """An exact operator: the eager `reference` and a kernel that claims to equal it bit for bit.

    It is called with its reference's parameters, by position: the first is a tensor, others may be tensors,
    optional tensors (None), floats and ints. A reference returns a new tensor or a tuple of two or more.
    `why_not`, the evidence's `battery` and each tier's `plan` take the same arguments, with the
    same defaults.

    name        the reference's name, also `torch.ops.bitfuse.<name>`
    reference   the host's chain, op for op: specification, fallback, fake function, gradient, bench baseline
    source      whose chain it is: host, version, function
    why_not     yields sentences: why these arguments can't be fused. Raises ShapeError where the shapes don't fit
    tiers       ways to fuse arguments that `why_not` has nothing against; the first that is proved equal is taken
    evidence    what it is proved by (`bitfuse.core.evidence`). By default it is `EVIDENCE[name]` of the module
                `NAME_evidence` beside the reference's module `NAME`, which is imported when a kernel is about to be
                proved. Its fields can be read as the operator's own: `operator.battery`
    originals   (owner, name, label) of each function that the reference calls and the kernel leaves out
                (`bitfuse.core.originals`). A call made directly runs the reference where one of them has been replaced
    """

    def __init__(
        self,
        reference: Callable[..., Outputs],
        source: str,
        *,
        why_not: Callable[..., Iterator[str]],
        tiers: tuple[Tier, ...],
        evidence: Evidence | None = None,
    ):
        self.reference, self.source, self.why_not, self.tiers = reference, source, why_not, tiers
        self.name, self.__doc__ = reference.__name__, reference.__doc__
        self._evidence = evidence
        self._routes: dict[tuple | None, Route] = {}
        self._launches: dict[tuple | None, Callable[..., Any]] = {}
        self._kinds = {name: kind for name, kind in get_type_hints(reference).items() if name != "return"}
        parameters = inspect.signature(reference).parameters.values()
        self._required = sum(parameter.default is parameter.empty for parameter in parameters)
        self.originals = called_by(reference)
        self._difference = Originals(self.originals).difference
        OPERATORS[self.name] = self
        library.register(self)

    def __repr__(self) -> str:
        return f"Operator({self.name})"

    @functools.cached_property
    def evidence(self) -> Evidence:
        if self._evidence is not None:
            return self._evidence
        return importlib.import_module(f"{self.reference.__module__}_evidence").EVIDENCE[self.name]

    def __getattr__(self, name: str) -> Any:
        """The fields of the evidence: `battery`, `cases`, `mutants` and so on."""
        if name in EVIDENCE_FIELDS:
            return getattr(self.evidence, name)
        raise AttributeError(f"an Operator has no attribute {name!r}")

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler gets the PyTorch chain itself, and no graph break
            return self.reference(*args)
        return self.route(*args).run(*args)

    def route(self, *args: Any) -> Route:
        """Where a call with these arguments goes: questions 2 to 6 at the head of this file.

        For a layout that was decided before it is a dictionary lookup. Raises TypeError where no tensor is given for
        one that is needed, ShapeError where the shapes don't fit.
        """
        if (replaced := self._difference()) is not None:
            return Route(self.reference, _replaced(replaced))
        # before anything is asked of a tensor
        if conditions.watched() and (reason := next(around(), None)) is not None:
            return Route(self.reference, reason, lasts=False)
        key = _layout(args)
        return self._routes.get(key) or self._decided(key, args)

    def routed(self, *args: Any) -> Route:
        """`route`, without a look at `originals`: a host's forward has looked at those of all its operators at once."""
        if conditions.watched() and (reason := next(around(), None)) is not None:
            return Route(self.reference, reason, lasts=False)
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
            route.lasts = keep
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
                raise TypeError(f"{self.name}: {name} is {described(value)}; accepted: {library.KINDS[kind]}")

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
        """The kernel of the first tier that gives a plan, not proved: ValueError with every reason where it can't run.

        For tests, `verify` and `bench`. The form of its outputs is compared with the reference's, its bits are not.
        """
        key = _layout(args)
        run = self._launches.get(key)
        if run is None or next(around(), None) is not None:
            self._check(args)
            if reasons := list(self._reasons(args)):
                raise ValueError(f"{self.name}: {'; '.join(reasons)}")
            plan = self.plan(*args)
            if (mismatch := proof.compare_forms(self.reference, plan, args)) is not None:
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

    def condemn(self, route: Route, mismatch: Mismatch) -> bool:
        """Use the kernel of a fused route no more in this process: it was seen to differ after it had been proved.

        Calls of its signature, of whatever layout, are decided anew: by the next tier that is proved, else by the
        reference, with the mismatch's sentence. A route that a caller still holds runs the reference from now on.
        False where that had been done before.
        """
        assert route.tier is not None, "only a fused route has a kernel to condemn"
        assert route.signature is not None, "only a fused route has a kernel to condemn"
        key, verdict, held = proof.key_of(self, route.tier, route.signature), proof.condemning(mismatch), self._routes
        if key in proof.refuted:
            self._routes = {}
            return False
        # In one line: an interrupt finds both done or neither. Other layouts are decided anew, too, which is rare.
        kept, self._routes = proof.condemned.setdefault(key, verdict), {}
        for other in (route, *list(held.values())):
            if (other.tier, other.signature) == (route.tier, route.signature):
                other.run = self.reference
                other.reason, other.mismatch = kept.sentence, kept.mismatch
        return kept is verdict

    def verdict(self, *args: Any) -> proof.Verdict:
        """The verdict on the kernel that these arguments would launch, found earlier in this process or now.

        It is of the first tier whose kernel is equal, or of the last. Nothing is asked of `why_not`.
        """
        for tier in self.tiers:
            _, verdict, _ = self._proved(tier, args)
            if verdict.equal:
                break
        return verdict

    def specification(
        self, tier: int, device: torch.device | str | None = None, emulated: bool = False
    ) -> Callable[..., Outputs]:
        """What the kernel of a tier is compared with: returns what that is to write, witnesses before outputs.

        That is the reference, and for the first tier its `witness` as well. Where the evidence has an `emulated`, that
        is in the reference's place for the first tier if `device` is a CPU, whose ATen adds up rows in another order
        than CUDA's, or if so told (`Evidence.as_one`). A proof in the process gives no device: on a CPU the kernel must
        equal what ATen computes there.
        """
        on_cpu = device is not None and torch.device(device).type == "cpu"
        emulate = self.emulated is not None and tier == 0 and (emulated or on_cpu)
        reference = self.emulated if emulate and self.emulated else self.reference
        witness = self.emulated_witness if emulate else self.witness
        if witness is None or tier > 0:
            return reference
        return lambda *args: (*witness(*args), *as_tuple(reference(*args)))

    def _reasons(self, args: tuple[Any, ...]) -> Iterator[str]:
        wrong = [
            f"{name} is a {type(value).__name__}; accepted: {library.KINDS[kind]}"
            for (name, kind), value in zip(self._kinds.items(), args, strict=False)
            if not isinstance(value, kind)
        ]
        return iter(wrong) if wrong else self.why_not(*args)

    def _proved(self, tier: Tier, args: tuple[Any, ...]) -> tuple[Plan | str, proof.Verdict, bool]:
        """(plan, or the tier's sentence why there is none; the verdict on its kernel; whether it was found just now)"""
        plan = tier.plan(*args)
        if isinstance(plan, str):
            return plan, proof.Verdict(False, plan), False
        signature = plan.signature(args)
        verdict = proof.known(self, tier, signature)
        if verdict is None or verdict.equal:  # a kernel that was proved may have failed since, while it was prepared
            verdict = proof.waiting(self, tier, signature) or verdict
        if verdict is not None:
            return plan, verdict, False
        with on_device(args[0]), torch.no_grad():
            return plan, proof.prove(self, tier, signature, *self._trial(tier, args)), True

    def _trial(self, tier: Tier, args: tuple[Any, ...]) -> tuple[Callable[..., Any], Callable[..., Any], Iterator[Any]]:
        """What `proof.prove` asks for these arguments: the specification, what plans a launch, and the battery.

        The evidence is imported when the first family is asked for. That is inside `run_battery`, which catches errors:
        a disk that fails at the import is then a reason to run the reference, and a later call tries again.
        """

        def chain(*given: Any) -> Outputs:
            with self._as_one(args) as emulated:
                return self.specification(self.tiers.index(tier), emulated=emulated)(*given)

        def plan_of(*given: Any) -> Plan | str:
            with self._as_one(args):
                return tier.plan(*given)

        def families() -> Iterator[tuple[str, tuple[Any, ...]]]:
            found = iter(self.battery(*args))
            while True:
                with self._as_one(args):
                    family = next(found, None)
                if family is None:
                    return
                yield family

        return chain, plan_of, families()

    def _as_one(self, args: tuple[Any, ...]) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(False) if self.evidence.as_one is None else self.evidence.as_one(*args)

    def _decide(self, args: tuple[Any, ...]) -> tuple[Route, bool]:
        """(the route, whether to keep it): questions 4 (but for `_check`) to 6 at the head of this file."""
        reason = next(self._reasons(args), None)
        if reason is not None:
            return Route(self.reference, reason), reason != conditions.OFF and not conditions.capturing(args[0])
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
        """(what the route is to run, a verdict): the launch of a kernel that is proved, or the reference where the
        verdict says why it may not be used for these arguments. `new`: it was proved just now."""
        start, signature = time.perf_counter(), plan.signature(args)
        parts = self.evidence.parts
        # of this layout alone; a reference in parts lays its outputs itself, whatever the layout of its arguments
        mismatch = proof.compare_forms(self.reference, plan, args) if parts is None else None
        if mismatch is not None:
            return self.reference, proof.Verdict(False, f"{mismatch.sentence}, for this layout of the arguments")
        try:
            run, live = self._runner(plan, args), None
            if parts is not None and (new or plan.by_shape):
                parts = functools.partial(parts, witness=bool(plan.witnesses))
                launch = functools.partial(_launched, plan)
                live = proof.compare_live(self.reference, launch, args, parts, plan.by_shape)
            elif new or any(rerouted(args[0].is_cuda)):
                live = proof.compare_live(self.reference, run, args)
            if live is not None and plan.by_shape:
                sentence = f"{live.sentence}, for this layout of the arguments"
                return self.reference, proof.Verdict(False, sentence, mismatch=live)
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
            with contextlib.suppress(Exception), on_device(args[0]), torch.no_grad(), self._as_one(args):
                _, small = next(iter(self.battery(*args)))
                if isinstance(plan := tier.plan(*small), Plan):
                    take(plan, small)

    def dry(self, take: Callable[[Plan, tuple[Any, ...]], object], *args: Any) -> Any:
        """What a call with these arguments returns, without values: nothing is launched. ValueError where it would run
        the reference. `take` is given the kernel that `route` would prove for them, as a launch on a few bytes."""
        if (reason := next(self._reasons(args), None)) is not None:
            raise ValueError(f"{self.name}: {reason}")
        plan, tier = self.plan(*args), self.tiers[0]
        if isinstance(first := tier.plan(*args), Plan) and proof.known(self, tier, first.signature(args)) is None:
            take(first.on_few_bytes(), tuple(few_bytes(a) if isinstance(a, Tensor) else a for a in args))
        outs = plan.empty(args[0].device)[len(plan.witnesses) :]
        return outs[0] if len(outs) == 1 else outs

    def _runner(self, plan: Plan, args: tuple[Any, ...]) -> Callable[..., Any]:
        """run(*args) for calls of this layout: new outputs, one launch; the witnesses are dropped."""
        device = args[0].device
        with on_device(args[0]):
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


def _launched(plan: Plan, *args: Any) -> tuple[Tensor, ...]:
    """What one launch of the plan writes, the witnesses too."""
    with on_device(args[0]):
        outs = plan.empty(args[0].device)
        plan.bind(args, outs)(*args, *outs)
    return outs


_VALUES = frozenset({type(None), float, int})


def _layout(args: tuple[Any, ...]) -> tuple | None:
    """The key of `_routes`: everything about the arguments that a launch is prepared for.

    None for tensors without memory or strides of their own (empty, meta, fake, sparse): those are decided at each call.
    """
    grad = torch.is_grad_enabled()
    try:
        on_gpu = args[0].is_cuda
        parts: list[Any] = [rerouted(on_gpu)] if on_gpu else [rerouted(on_gpu), interpreting()]
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


# -- the switch, and what was decided ----------------------------------------------------------------------------


def enable() -> None:
    """Switch bitfuse on (it is, unless BITFUSE=0 or `disable()`)."""
    _switch(True)


def disable() -> None:
    """Switch bitfuse off: every operator runs its reference, from the next call on."""
    _switch(False)


def _switch(on: bool) -> None:
    conditions.switch(on)
    for operator in OPERATORS.values():
        operator.forget()


def explain(operator: str | Operator, *args: Any) -> list[str]:
    """All reasons why `operator`, called with these arguments, would run the PyTorch chain; empty when it is fused.

    operator    an `Operator`, or its name: one of `bitfuse.OPERATORS`
    args        its arguments. Shapes that don't fit raise ShapeError, what is no tensor TypeError, as the call would
    """
    if not isinstance(operator, (str, Operator)):
        raise TypeError(f"operator is {described(operator)}; accepted: an Operator, or a name: {', '.join(OPERATORS)}")
    if isinstance(operator, str):
        if operator not in OPERATORS:
            raise ValueError(f"operator is {operator!r}; accepted: {', '.join(OPERATORS)}")
        operator = OPERATORS[operator]
    return operator.explain(*args)
