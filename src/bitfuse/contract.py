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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bitfuse import proof
from bitfuse.kernel import EXACT, Kernel, interpreting

_ROUTES_KEPT = 4096  # layouts remembered per operator; a render uses a dozen


def _read_switch() -> bool:
    value = os.environ.get("BITFUSE", "1")
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable BITFUSE is {value!r}; accepted: 0 (off) or 1 (on, the default)")
    return value == "1"


_on = _read_switch()

# What may change what a PyTorch op does, read at every call: cheap, private names for public questions.
_autocast = torch._C._is_any_autocast_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.maybe_current_level


@dataclass(frozen=True)
class Plan:
    """One launch, except for its pointers: everything that is fixed by the shapes, strides and dtypes of a call.

    `scalars` follow the pointers (inputs, then the output) in the kernel's parameter list, `constants` come
    last; `shape`, `strides` and `dtype` are the output's, the same that the reference returns.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    scalars: tuple[int, ...]
    constants: dict[str, Any]
    num_warps: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=lambda: dict(EXACT))

    def signature(self, tensors: tuple[Tensor, ...]) -> tuple:
        """Everything the bits may depend on: what selects the compiled kernel. Token counts are not in it."""
        pointers = tuple((t.dtype, t.data_ptr() % 16 == 0) for t in tensors)
        names = self.kernel.parameters[len(tensors) + 1 :]
        scalars = tuple(
            _specialisation(value, self.kernel.fn.__annotations__.get(name))
            for value, name in zip(self.scalars, names, strict=False)
            if name not in self.kernel.do_not_specialize
        )
        constants = tuple((name, str(value)) for name, value in self.constants.items())
        kernel = (self.kernel.fn.__qualname__, constants, self.num_warps)
        return (kernel, tensors[0].device, pointers, self.dtype, scalars)

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)

    def bind(self, tensors: tuple[Tensor, ...], out: Tensor) -> Callable[..., Any]:
        """Compile for these tensors; returns run(*tensors, out), good for every call with the same layout."""
        if interpreting():
            launch = self.kernel.interpreted[self.grid]
            tail = (*self.scalars, *self.constants.values())
            return lambda *pointers: launch(*pointers, *tail)
        compiled = self.kernel.compiled.warmup(
            *tensors, out, *self.scalars, grid=self.grid, **self.constants, num_warps=self.num_warps, **self.options
        )
        # The compiled kernel's own runner skips the JIT's argument inspection, and addresses skip its inspection
        # of tensors: the route's key already fixes all that they would look at.
        runner, tail = compiled[self.grid], (*self.scalars, *self.constants.values())
        return lambda *tensors: runner(*[t.data_ptr() for t in tensors], *tail)


def _specialisation(value: int, annotation: str | None) -> str:
    """The class into which Triton's JIT puts an integer argument: one kernel is compiled per class."""
    if value == 1:
        return "1"
    width = "i32" if annotation is None and -(2**31) <= value < 2**31 else "i64"
    return width + ("/16" if value % 16 == 0 else "")


@dataclass(slots=True)
class Route:
    """Where calls of one layout go. `reason` is None when they are fused, else the sentence why not.

    `mismatch` is set where the reason is that the kernel was seen to differ from the reference.
    """

    run: Callable[..., Tensor]
    reason: str | None = None
    mismatch: proof.Mismatch | None = None

    @property
    def fused(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel: the operator's own with source edits and compiler options. The battery must catch it.

    `harmless_for` lists the dtypes of x (with the host's tables) for which the change alters no bit at all:
    fp16 products, for one, are exact in fp32 and in its range, so rounding them again changes nothing.
    `compiled_only` marks one that only a compiler makes wrong; the interpreter runs it as written.
    """

    name: str
    edits: tuple[tuple[str, str], ...] = ()
    options: dict[str, Any] = field(default_factory=lambda: dict(EXACT))
    harmless_for: tuple[torch.dtype, ...] = ()
    compiled_only: bool = False

    def plan(self, operator: Operator, *tensors: Tensor) -> Plan:
        plan = operator.plan(*tensors)
        return replace(plan, kernel=_edited(plan.kernel, self.edits), options=self.options)


@functools.cache
def _edited(kernel: Kernel, edits: tuple[tuple[str, str], ...]) -> Kernel:
    return kernel.edited(*edits)


@dataclass(frozen=True)
class Audit:
    """What the PTX for one of the operator's cases must hold: exact counts of rounding instructions per pair.

    `per_pair` maps an instruction (a packed one counts for as many results as it makes) to its count for one
    (x1, x2) pair; no other rounding instruction may appear.
    """

    case: str
    per_pair: dict[str, int]


@dataclass(eq=False)
class Operator:
    """An exact operator: the eager `reference` and a kernel that claims to equal it bit for bit.

    name        the reference's name, also `torch.ops.bitfuse.<name>`
    reference   the host's chain, op for op: specification, fallback, fake function, gradient, bench baseline
    source      whose chain it is: host, version, function
    why_not     sentences: why these tensors can't be fused. Raises ValueError where the shapes don't fit.
    plan        the launch for tensors that `why_not` has nothing against
    battery     (family, tensors) of the same signature as the given tensors: what a wrong kernel trips over
    cases       geometries for tests, `verify` and `bench`: the real LTX-2 ones by name, and odd ones
    mutants     wrong kernels that the battery must catch
    audits      cases whose PTX is counted, with the counts
    """

    reference: Callable[..., Tensor]
    source: str
    why_not: Callable[..., Iterator[str]]
    plan: Callable[..., Plan]
    battery: Callable[..., Iterable[tuple[str, tuple[Tensor, ...]]]]
    cases: tuple[Any, ...] = ()
    mutants: tuple[Mutant, ...] = ()
    audits: tuple[Audit, ...] = ()
    _routes: dict[tuple | None, Route] = field(default_factory=dict, repr=False)
    _launches: dict[tuple | None, Callable[..., Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.name = self.reference.__name__
        self.__doc__ = self.reference.__doc__
        _register(self)

    def __call__(self, *tensors: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler gets the PyTorch chain itself, and no graph break
            return self.reference(*tensors)
        return self.route(*tensors).run(*tensors)

    def route(self, *tensors: Tensor) -> Route:
        """Where a call with these tensors goes. A dictionary lookup, except the first time for a layout."""
        if (reason := next(around(), None)) is not None:  # asked before anything is asked of a tensor
            return Route(self.reference, reason)
        key = _layout(tensors)
        route = self._routes.get(key)
        if route is None:
            route, keep = self._decide(tensors)
            if keep:
                _remember(self._routes, key, route)
        return route

    def explain(self, *tensors: Tensor) -> list[str]:
        """All reasons why a call with these tensors would run the reference; empty when it would be fused."""
        reason = self.route(*tensors).reason
        return [] if reason is None else list(self.why_not(*tensors)) or [reason]

    def launch(self, *tensors: Tensor) -> Tensor:
        """The kernel, with no proof and no fallback: ValueError with every reason where it can't run."""
        key = _layout(tensors)
        run = self._launches.get(key)
        if run is None or next(around(), None) is not None:
            if reasons := list(self.why_not(*tensors)):
                raise ValueError(f"{self.name}: {'; '.join(reasons)}")
            run = self._runner(self.plan(*tensors), tensors)
            _remember(self._launches, key, run)
        return run(*tensors)

    def forget(self) -> None:
        """Drop what was decided and prepared, layout by layout; the proofs stay."""
        self._routes.clear()
        self._launches.clear()

    def verdict(self, *tensors: Tensor) -> proof.Verdict:
        """The proof for the kernel that these tensors would launch: from this process's memory, or made now."""
        return self._proved(self.plan(*tensors).signature(tensors), tensors)

    def _proved(self, signature: tuple, tensors: tuple[Tensor, ...]) -> proof.Verdict:
        if (verdict := proof.known(signature)) is not None:
            return verdict
        with _on_device(tensors[0]), torch.no_grad():
            return proof.prove(self, signature, tensors)

    def _decide(self, tensors: tuple[Tensor, ...]) -> tuple[Route, bool]:
        """The route, and whether to remember it."""
        reason = next(self.why_not(*tensors), None)
        if reason is not None:
            return Route(self.reference, reason), not _capturing(tensors[0])
        plan = self.plan(*tensors)
        signature = plan.signature(tensors)
        known = proof.known(signature) is not None
        verdict = self._proved(signature, tensors)
        if not verdict.equal:
            return Route(self.reference, verdict.sentence, verdict.mismatch), verdict.final
        route = Route(self._runner(plan, tensors))
        if not known and (mismatch := proof.compare_live(self, route.run, tensors)):
            proof.condemn(signature, mismatch)
            return Route(self.reference, mismatch.sentence, mismatch), True
        return route, True

    def _runner(self, plan: Plan, tensors: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        device = tensors[0].device
        with _on_device(tensors[0]):
            launch = plan.bind(tensors, plan.empty(device))
        shape, strides, dtype, index = plan.shape, plan.strides, plan.dtype, device.index

        def run(*tensors: Tensor) -> Tensor:
            out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            if index is None or index == torch.cuda.current_device():
                launch(*tensors, out)
            else:  # Triton launches on the current device, whatever the tensors' device is
                with torch.cuda.device(index):
                    launch(*tensors, out)
            return out

        return run


def _layout(tensors: tuple[Tensor, ...]) -> tuple | None:
    """All that a launch is prepared for, to be looked up by; None where there is no memory to lay out."""
    parts: list[Any] = [] if tensors[0].is_cuda else [interpreting()]
    grad = torch.is_grad_enabled()
    try:
        for t in tensors:
            address = t.data_ptr()
            if not address:  # empty, meta, or a wrapper
                return None
            parts += (
                type(t),
                t.shape,
                t.stride(),
                t.dtype,
                t.get_device() if t.is_cuda else t.device,  # an index hashes faster than a device
                address & 15,
                t.is_neg(),
                grad and t.requires_grad,
            )
    except (RuntimeError, NotImplementedError):  # fake tensors, other layouts than strided
        return None
    return tuple(parts)


def _remember(store: dict[tuple | None, Any], key: tuple | None, value: Any) -> None:
    if key is not None:
        if len(store) >= _ROUTES_KEPT:
            store.clear()
        store[key] = value


OPERATORS: dict[str, Operator] = {}
"""Every operator by name, in the order of definition."""


def _register(operator: Operator) -> None:
    """Make the operator `torch.ops.bitfuse.<name>`, its fake function and its gradient those of the reference."""
    OPERATORS[operator.name] = operator
    names = list(inspect.signature(operator.reference).parameters)
    schema = f"({', '.join(f'Tensor {name}' for name in names)}) -> Tensor"

    def forward(*tensors: Tensor) -> Tensor:
        with torch.no_grad():  # autograd has taken over outside this op
            return operator.route(*tensors).run(*tensors)

    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The vector-Jacobian product of the reference itself."""
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad
        twice = torch.is_grad_enabled()  # only when this gradient will be differentiated in its turn
        with torch.enable_grad():
            if not twice:
                inputs = [t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)]
            wanted = [t for t, n in zip(inputs, needed, strict=True) if n]
            grads = iter(torch.autograd.grad(operator.reference(*inputs), wanted, grad, create_graph=twice))
        return tuple(next(grads) if n else None for n in needed)

    op = torch.library.custom_op(f"bitfuse::{operator.name}", forward, mutates_args=(), schema=schema)
    op.register_fake(operator.reference)
    op.register_autograd(backward, setup_context=setup_context)


# -- sentences that every operator's `why_not` shares -----------------------------------------------------------


def around() -> Iterator[str]:
    """Why no kernel may run just now, whatever the tensors are: who else is watching PyTorch's ops."""
    if not _on:
        yield "bitfuse is off (BITFUSE=0 or bitfuse.disable())"
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


def plain(tensors: dict[str, Tensor]) -> Iterator[str]:
    """Why these named arguments are not plain tensors with memory of their own, if so."""
    for name, t in tensors.items():
        if type(t) not in (Tensor, torch.nn.Parameter):
            yield f"{name} is a {type(t).__name__}, not a plain tensor"
        elif torch._C._functorch.is_functorch_wrapped_tensor(t) or torch._is_functional_tensor(t):
            yield f"{name} is inside a functorch transform, and has no memory of its own"
        elif t.layout != torch.strided:
            yield f"{name} is a {t.layout} tensor, not a strided one"
        if t.is_neg() or t.is_conj():
            yield f"{name} is a lazy view (its negation or conjugation is still pending)"


def fitting(reference: Callable[..., Tensor], tensors: dict[str, Tensor], problem: str | None) -> Iterator[str]:
    """Turn a shape problem into ValueError where the reference would fail too, else into a reason."""
    if problem is None:
        return
    try:
        on_meta(reference, *tensors.values())
    except Exception:
        given = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"{reference.__name__}: {problem}; given {given}") from None
    yield f"{problem} (the PyTorch chain takes these shapes in its own way)"


def runnable(tensors: dict[str, Tensor]) -> Iterator[str]:
    """Why no kernel may run for these named arguments here and now."""
    yield from around()
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


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _watching_functions() -> bool:
    """Function modes other than `torch.set_default_device`'s, which touches factory functions only."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def on_meta(reference: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The reference's output without its values: shape, strides and dtype, and its own shape errors."""
    with torch.no_grad():
        return reference(*(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors))


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


def explain(operator: str | Operator, *tensors: Tensor) -> list[str]:
    """All reasons why `operator`, called with these tensors, would run the PyTorch chain; empty when it is fused.

    operator    an `Operator`, or its name: one of `bitfuse.OPERATORS`
    tensors     its arguments. Shapes that don't fit raise ValueError, as the call would.
    """
    if isinstance(operator, str):
        if operator not in OPERATORS:
            raise ValueError(f"operator is {operator!r}; accepted: {', '.join(OPERATORS)}")
        operator = OPERATORS[operator]
    return operator.explain(*tensors)


def _on_device(t: Tensor) -> Any:
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
