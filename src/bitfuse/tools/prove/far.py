"""Offsets beyond 2^31 elements, without the memory for them: a kernel's last programs over planted tensors.

A call of 2^32 elements is described, not allocated. Of its launch the last programs are run in Triton's interpreter,
on pointers to a base of which only the window is there that these programs own: the last tokens of the last sample. An
offset that was computed in 32 bits leads elsewhere, and that is seen. Rows know nothing of each other, so what must
come out is what the reference makes of the window alone.

On a GPU the same call can be made for real (`for_real`): there the last tokens and the first are compared.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.bits import BITS, Mismatch, as_tuple, compare
from bitfuse.core.inputs import poisoned
from bitfuse.core.kernel import triton_dtype
from bitfuse.core.launch import Plan, named
from bitfuse.core.lines import error_line
from bitfuse.core.operator import Operator, Tier
from bitfuse.core.proof import Verdict
from bitfuse.core.volumes import channels_last
from bitfuse.ops.adaln import modulate
from bitfuse.ops.adaln_evidence import AdalnCase
from bitfuse.ops.grid_rotary_evidence import GridCase
from bitfuse.ops.head_gate_evidence import HeadGateCase
from bitfuse.ops.perturbed_attention_evidence import PerturbedCase
from bitfuse.ops.pixel_norm_evidence import PixelCase
from bitfuse.ops.qk_norm_evidence import QKCase
from bitfuse.ops.rope_evidence import RotaryCase
from bitfuse.ops.space_to_depth_evidence import DownsampleCase
from bitfuse.ops.swiglu_evidence import SwigluCase

WHAT = "offsets beyond 2^31 elements"
_BATCH, _WIDTH = 2, 256


def cases(operator: Operator) -> tuple[Any, ...]:
    """Cases of two samples, 256 wide, each token with values of its own, of as many tokens as it takes; none where it
    is not known how to make an operator's cases that long."""
    case = operator.cases[0]
    if isinstance(case, AdalnCase):
        there: dict[str, Any] = dict.fromkeys(
            ("per_token", "with_tables", "with_gate", "with_mask", "with_modulation"), True
        )
        rows = replace(case, name=WHAT, tokens=1 << 23, width=_WIDTH, batch=_BATCH, ada_rows=9, **there)
        return (rows, replace(rows, name=f"{WHAT}, rows apart", apart=True)) if case.reference is modulate else (rows,)
    if isinstance(case, (HeadGateCase, PerturbedCase)):
        return (replace(case, name=WHAT, tokens=1 << 23, batch=_BATCH, heads=4, head_dim=64),)
    if isinstance(case, PixelCase):
        names = named(case.reference, ())
        there = {"modulated": "scale" in names, "noisy": True, "whole": True, "inside": False}
        sizes: dict[str, Any] = {"front": 0, "edge": 0, "batch": 1, "up": (1, 2, 2), "patch": 2, "repeats": 2}
        if isinstance(case, DownsampleCase):  # of which each pixel becomes one, as there are as many after it
            sizes["up"] = (1, 1, 1)
        channels = _WIDTH if "eps" in names else 64  # of one program, where others than rows' kernels cut them up
        volume = replace(case, name=WHAT, channels=channels, sides=(2, 2, 1 << 24), **sizes, **there)
        apart = replace(volume, name=f"{WHAT}, between scales", sides=(1, 1, 1 << 12), batch=_BATCH)
        return (volume, apart) if "scale" in names else (volume,)
    if isinstance(case, SwigluCase):
        return (replace(case, name=WHAT, tokens=1 << 23, batch=_BATCH, width=_WIDTH),)
    if isinstance(case, GridCase):
        line: dict[str, Any] = {"frames": 1, "lines": 1, "columns": 1 << 24, "heads": 4, "head_dim": 64}
        return (replace(case, name=WHAT, batch=_BATCH, **line),)
    if isinstance(case, QKCase):
        queries = replace(case.queries, name=WHAT, tokens=1 << 25, batch=_BATCH, heads=4, head_dim=64)
        return (replace(case, name=WHAT, queries=queries, key_tokens=1 << 25),)
    if isinstance(case, RotaryCase):
        long = replace(case, name=WHAT, tokens=1 << 24, batch=_BATCH, heads=4, head_dim=64)
        last = replace(long, name=f"{WHAT}, tokens last", tokens=1 << 25, heads=1, head_dim=256, x_form="tokens last")
        return (long, last)
    return ()


def _of(case: Any, tokens: int, batch: int) -> Any:
    if isinstance(case, PixelCase):
        return replace(case, sides=(1, 1, tokens), batch=min(batch, case.batch))
    if isinstance(case, QKCase):
        return replace(case, queries=_of(case.queries, tokens, batch), key_tokens=tokens)
    if isinstance(case, GridCase):
        return replace(case, columns=tokens, batch=batch)
    return replace(case, tokens=tokens, batch=batch)


def _tokens(case: Any) -> int:
    if isinstance(case, PixelCase):
        return case.sides[2]
    if isinstance(case, GridCase):
        return case.columns
    return case.queries.tokens if isinstance(case, QKCase) else case.tokens


@functools.cache
def _forms(case: Any) -> tuple[Any, ...]:
    """The case's arguments without memory: tensors of which only the form is known."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        found = []
        for a in case.arguments("cpu"):
            if isinstance(a, Tensor) and a.ndim in (3, 5) and a.shape[0] == _BATCH and _tokens(case) not in a.shape:
                # a mask, a volume's scale
                a = torch.empty_strided(a.shape, ((1 << 31) + 3, *a.stride()[1:]), dtype=a.dtype)
            found.append(a)
        return tuple(found)


def planted(operator: Operator, tier: Tier, plan_of: Callable[..., Plan | str], case: Any) -> Verdict:
    """One case of `cases`, planted: whether the last programs of its launch equal the tier's specification on a CPU.

    plan_of    the tier's plan, or a mutant's. Needs the interpreter
    """
    start = time.perf_counter()
    forms, tokens = _forms(case), _tokens(case)
    plan = plan_of(*forms)
    if isinstance(plan, str):
        return Verdict(False, plan)
    blocks = 2 if isinstance(case, QKCase) else 1  # programs by turns of queries and of keys
    samples = _BATCH if plan.grid[1] == 1 else 1
    if isinstance(case, PixelCase):
        samples = case.batch * case.sides[0] * case.sides[1]
    window = max(1, tokens * samples * blocks // plan.grid[0])
    args = _of(case, window, 1).arguments("cpu")
    try:
        with torch.no_grad():
            expected = as_tuple(operator.specification(operator.tiers.index(tier), "cpu")(*args))
            fault, found = _run(plan, forms, args, expected, tokens, window, blocks)
    except Exception as error:
        return Verdict(False, f"the kernel can't be built or run here ({error_line(error)})", failed=True)
    mismatch = Mismatch(fault) if fault else compare(tuple(t.contiguous() for t in expected), found)
    seconds, elements = time.perf_counter() - start, sum(t.numel() for t in expected)
    if mismatch:
        return Verdict(False, f"{mismatch.sentence}, with {WHAT}", 1, elements, seconds, mismatch)
    return Verdict(True, "equal", 1, elements, seconds)


def _run(
    plan: Plan,
    forms: tuple[Any, ...],
    args: tuple[Any, ...],
    expected: tuple[Tensor, ...],
    tokens: int,
    window: int,
    blocks: int,
) -> tuple[str | None, tuple[Tensor, ...]]:
    """(what was reached for that is not there, the outputs' window)"""
    from bitfuse.tools.prove.planted import run_planted

    pointers: list[Any] = []

    def plant(shape: tuple[int, ...], strides: tuple[int, ...], t: Tensor) -> Any:
        found = _plant(f"tensor {len(pointers)}", (len(pointers) + 1) << 44, shape, strides, t)
        pointers.append(found)
        return found

    for form, small in zip(plan.pointers(forms), plan.pointers(args), strict=True):
        if form is None or small is None:
            pointers.append(None)
        else:
            plant(tuple(form.shape), form.stride(), small)
    for t in plan.before(*args) if plan.before else ():  # dense: [1, window, ...], of a volume in channels_last_3d
        whole = tuple(forms[0].shape)
        if t.ndim == 5:
            out = channels_last((whole[0], t.shape[1], *whole[2:]), t.dtype)
            plant(out.shape, out.strides, t.contiguous())
            continue
        shape = (_BATCH, tokens, *t.shape[2:])
        plant(shape, tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape))), t.contiguous())
    written = []
    for out, t in zip((*plan.witnesses, *plan.outputs), expected, strict=True):
        written.append(plant(out.shape, out.strides, poisoned(torch.empty(t.shape, dtype=t.dtype))))
    programs = [
        (x, plan.grid[1] - 1, z) for x in range(plan.grid[0] - blocks, plan.grid[0]) for z in range(plan.grid[2])
    ]
    fault = run_planted(
        plan.kernel.interpreted,
        plan.filled(p and p[0] for p in pointers),
        (*plan.scalars, *plan.constants.values()),
        plan.grid,
        programs,
    )
    return fault, tuple(_window(p, t) for p, t in zip(written, expected, strict=True))


def _plant(name: str, base: int, shape: tuple[int, ...], strides: tuple[int, ...], t: Tensor) -> tuple[Any, Any]:
    """(the planted tensor, which of its values each element of the window is)"""
    import numpy as np

    from bitfuse.tools.prove.planted import Planted

    offsets = np.zeros((1,) * t.ndim, dtype=np.int64)
    for dim, (n, stride) in enumerate(zip(shape, strides, strict=True)):
        along = np.arange(n - t.shape[dim], n, dtype=np.int64) * stride
        offsets = offsets + along.reshape([-1 if d == dim else 1 for d in range(t.ndim)])
    offsets = np.broadcast_to(offsets, tuple(t.shape)).reshape(-1)
    kept, first, place = np.unique(offsets, return_index=True, return_inverse=True)
    kinds = {torch.bfloat16: np.uint16, torch.float16: np.float16, torch.float32: np.float32}
    bits = t.contiguous().view(BITS[t.element_size()]).reshape(-1).numpy()
    values = bits[first].view(kinds[t.dtype])
    return Planted(name, triton_dtype(t.dtype), base, kept, values), place.reshape(-1)


def _window(planted: tuple[Any, Any], like: Tensor) -> Tensor:
    tensor, place = planted
    bits = torch.from_numpy(tensor.values[place].view(f"i{like.element_size()}"))
    return bits.view(like.dtype).view(like.shape)


# -- on a GPU ----------------------------------------------------------------------------------------------------------

_TOKENS = (1 << 22) + (1 << 16)  # of two samples, 256 wide: more than 2^31 elements


def shortened(operator: Operator) -> Iterator[Any]:
    """The cases of `for_real` with few tokens, for their kernels to be compiled ahead."""
    for case in cases(operator):
        yield _of(_real(case), 64, _BATCH)


def _real(case: Any) -> Any:
    """The case with values side by side in memory, each tensor no larger than its elements."""
    alone = isinstance(case, PixelCase) and case.batch == 1  # one sample of as many pixels as two
    tokens = 2 * _TOKENS if alone else _TOKENS
    return _of(replace(case, ada_rows=1) if isinstance(case, AdalnCase) else case, tokens, _BATCH)


def _places(shape: tuple[int, ...], tokens: int) -> tuple[int, int]:
    """(the dimension in which an output's tokens stand, how many places it has for each: an upsampler makes several)"""
    dim = next(dim for dim, n in enumerate(shape) if n >= tokens and n % tokens == 0)
    return dim, shape[dim] // tokens


def for_real(operator: Operator, tier: Tier, case: Any, device: torch.device) -> Verdict:
    """A call like the case's of 2^31 elements and more, with memory: its first tokens and its last, against the
    specification. What stands between is whatever was in memory, and is not compared."""
    start, window, elements = time.perf_counter(), 64, 0
    case = _real(case)
    tokens = _tokens(case)
    specification = operator.specification(operator.tiers.index(tier), device)
    try:
        with torch.no_grad():
            starts = (0, tokens - window)
            parts = [_of(case, window, _BATCH).arguments(device, seed=first) for first in starts]
            args = tuple(_filled(a, [p[i] for p in parts], starts, tokens, device) for i, a in enumerate(_forms(case)))
            # what serves all tokens is the first part's
            parts[1] = tuple(
                theirs if isinstance(a, Tensor) and tokens in a.shape else ours
                for a, ours, theirs in zip(args, *parts, strict=True)
            )
            plan = tier.plan(*args)
            if isinstance(plan, str):
                return Verdict(False, plan)
            outs = plan.empty(device)
            plan.bind(args, outs)(*args, *outs)
            for first, part in zip(starts, parts, strict=True):
                expected = tuple(t.contiguous() for t in as_tuple(specification(*part)))
                places = [_places(tuple(o.shape), tokens) for o in outs]
                found = tuple(
                    o.narrow(dim, first * each, window * each).contiguous()
                    for o, (dim, each) in zip(outs, places, strict=True)
                )
                elements += sum(t.numel() for t in expected)
                if mismatch := compare(expected, found):
                    sentence = f"{mismatch.sentence}, from token {first} on, with {WHAT}"
                    return Verdict(False, sentence, 1, elements, time.perf_counter() - start, mismatch)
    except torch.OutOfMemoryError:
        return Verdict(False, f"this GPU has not enough memory free for {WHAT}", final=False)
    return Verdict(True, "equal", 2, elements, time.perf_counter() - start)


def _filled(form: Any, parts: list[Any], starts: tuple[int, ...], tokens: int, device: torch.device) -> Any:
    """A tensor of this form in memory of its own, the parts in their places; what has no tokens is the first part's."""
    if not isinstance(form, Tensor) or tokens not in form.shape:
        return parts[0]
    t = torch.empty_strided(tuple(form.shape), form.stride(), dtype=form.dtype, device=device)
    for first, part in zip(starts, parts, strict=True):
        t.narrow(list(form.shape).index(tokens), first, part.shape[list(form.shape).index(tokens)]).copy_(part)
    return t
