"""Wrong kernels made from an operator's own kernel, by kind: what `verify` must find wrong, every one.

`mutants` reads the source of a kernel and of the helpers that it calls, and yields one edit at a time: a rounding left
out, an operand read with another's strides, the last row not written. Nothing is listed by hand, so what a new
operator's kernel has is tried from its first day.

Some edits change no bit that anybody could see, and a sound rule says so (`judge`): the line is not run by any launch
of the layout, the two strides are one value that the signature fixes, the product is exact. Every other mutant must be
caught.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bitfuse.core import proof
from bitfuse.core.bits import Outputs
from bitfuse.core.evidence import Mutant
from bitfuse.core.kernel import Kernel, interpreter
from bitfuse.core.launch import Plan, named
from bitfuse.core.operator import Operator, Tier
from bitfuse.ops.adaln import modulate
from bitfuse.ops.adaln_evidence import AdalnCase
from bitfuse.ops.grid_rotary_evidence import GridCase
from bitfuse.ops.head_gate_evidence import HeadGateCase
from bitfuse.ops.perturbed_attention_evidence import PerturbedCase
from bitfuse.ops.pixel_norm_evidence import PixelCase
from bitfuse.ops.qk_norm_evidence import QKCase
from bitfuse.ops.rope_evidence import RotaryCase
from bitfuse.ops.swiglu_evidence import SwigluCase
from bitfuse.tools.prove import far

ROUNDING, CONTRACTION, FOLD, STATISTIC, EPS, DIVISOR = (
    "rounding", "contraction", "fold order", "statistic", "eps", "mean's divisor"
)  # fmt: skip
OPERAND, STRIDE, MASK, WIDTH, PAST, LEFT_OUT = (
    "operand", "stride", "mask", "offset width", "past the end", "left out"
)  # fmt: skip
KINDS = (ROUNDING, CONTRACTION, FOLD, STATISTIC, EPS, DIVISOR, OPERAND, STRIDE, MASK, WIDTH, PAST, LEFT_OUT)

ADDRESSES = frozenset((OPERAND, STRIDE, MASK, WIDTH))
"""Kinds that may reach farther than a guard zone: on a GPU that could end the process, so the interpreter judges them,
there too."""
FURTHER = frozenset(KINDS) - ADDRESSES
"""Kinds of which `--deep` runs every mutant, on a GPU, and not only those that show something new."""

# How kernels and helpers call what holds values: parameters with these names are fp32 tiles.
_VALUES = frozenset(
    ("n", "scale", "shift", "values", "value", "x", "x1", "x2", "c", "s", "y", "square", "w", "w1", "w2", "weight")
)
_RAN: set[tuple[str, int]] = set()
"""Lines of functions that a recording launch came by."""

# Calls that give fp32 tiles.
_GIVING = frozenset((
    "round_to", "load_ada", "divide", "reciprocal_root", "exponential", "negate", "multiply_add", "fold", "sum_of_two",
    "mean_square", "mean_square_of_head", "row_rstd", "modulate_row", "add_residual", "turn_neighbours", "turn_pairs",
    "multiply_add_bf16", "turn_one", "lerp", "norm_head", "rstd_of_head", "gelu", "silu", "sum_of_products",
    "weighted_sum",
))  # fmt: skip


# -- layouts -----------------------------------------------------------------------------------------------------------


def layouts(operator: Operator) -> tuple[Any, ...]:
    """Small cases of an operator, with every tensor that it may have, on which its mutants are tried.

    No tile divides their sizes and no stride is 0, so that a wrong mask or stride shows. In a second one, where there
    is one, the strides of 1 are in other places.
    """
    case = operator.cases[0]
    if isinstance(case, AdalnCase):
        there: dict[str, Any] = dict.fromkeys(
            ("per_token", "with_tables", "with_gate", "with_mask", "with_modulation"), True
        )
        sizes: dict[str, Any] = {"tokens": 21, "width": 640, "batch": 2, "ada_rows": 9, "mask_step": 3}
        rows = replace(case, name="mutants", real=False, **sizes, **there)
        return (rows, replace(rows, name="mutants, rows apart", apart=True)) if case.reference is modulate else (rows,)
    if isinstance(case, HeadGateCase):
        return (replace(case, name="mutants", tokens=21, batch=2, heads=3, head_dim=6, real=False),)
    if isinstance(case, PerturbedCase):
        sizes = {"tokens": 21, "batch": 3, "heads": 3, "head_dim": 6, "masks": (0.3, 0.5, 0.9), "mask_step": 3}
        return (replace(case, name="mutants", real=False, **sizes),)
    if isinstance(case, QKCase):
        queries = replace(case.queries, name="mutants", tokens=21, batch=2, heads=5, head_dim=128, real=False)
        return (replace(case, name="mutants", queries=queries, key_tokens=37, real=False),)
    if isinstance(case, GridCase):
        grid: dict[str, Any] = {"frames": 2, "lines": 3, "columns": 5, "batch": 2, "heads": 3, "head_dim": 40}
        return (replace(case, name="mutants", real=False, **grid),)
    if isinstance(case, SwigluCase):
        return (replace(case, name="mutants", tokens=21, batch=2, width=35, real=False),)
    if isinstance(case, PixelCase):
        volume: dict[str, Any] = {"channels": 42, "sides": (3, 4, 5), "batch": 2, "front": 2, "back": 1, "edge": 1}
        names = named(case.reference, ())
        volume["channels"] = 3 if "patch" in names else 44 if "height" in names else 42
        volume |= {"modulated": "scale" in names, "noisy": True, "inside": False}
        return (replace(case, name="mutants", real=False, **volume),)
    if isinstance(case, RotaryCase):
        small = replace(case, name="mutants", tokens=37, batch=2, heads=3, head_dim=40, real=False)
        return (small, replace(small, name="mutants, tokens last", x_form="tokens last"))
    return tuple(c for c in operator.cases if not c.real)[:1]


def case_of(operator: Operator, mutant: Mutant) -> Any:
    """The case that a mutant written by hand is held against: the one that it names, else the first layout."""
    return mutant.case_of(operator) if mutant.case else layouts(operator)[0]


# -- sites, by kind ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One change of a function's source: `old` at an AST node becomes `new`.

    line      of the statement, in the function's source
    swapped   (name, what stands for it) where a stride is replaced: a name of another stride, or a number
    exact     why the change alters no bit, where that is known
    unless    lines that take this reason away where they are run
    further   one of many of its kind at this node: for `--deep`
    """

    kind: str
    old: str
    new: str
    source: str
    edited: str
    line: int
    swapped: tuple[str, str] | None = None
    exact: str = ""
    unless: tuple[tuple[str, int], ...] = ()
    further: bool = False


class _Function:
    """A kernel's or helper's source with what the rules ask of it."""

    def __init__(self, kernel: Kernel, launched: Kernel, alike: dict[str, tuple[str, ...]]):
        self.source = kernel.source
        self.launched = launched
        self.whole = "".join(k.source for k in launched._tree())
        self.long = set(re.findall(r"(\w+): tl\.int64", launched.source))
        tree = ast.parse(self.source).body[0]
        assert isinstance(tree, ast.FunctionDef)
        self.tree = tree
        self.name = kernel.fn.__name__
        self.parameters = kernel.parameters
        strides = [p for p in launched.parameters if re.search(r"_(batch|token|head|lane)$", p)]
        self.strides = [name for name in strides if name in self.parameters]
        self.alike = alike if kernel is launched else {}
        self.parents: dict[Any, Any] = {
            child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)
        }
        self.lines = self.source.splitlines(keepends=True)
        self.bytes = [line.encode() for line in self.lines]  # the tree counts columns in bytes
        self.assigned: dict[str, list[ast.expr]] = {}
        target: Any
        value: Any
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                for t, v in zip(target.elts, value.elts, strict=True) if several else [(target, value)]:
                    if isinstance(t, ast.Name):
                        self.assigned.setdefault(t.id, []).append(v)
        self.floats = {p for p in self.parameters if p in _VALUES}
        for _ in range(3):
            self.floats |= {name for name, values in self.assigned.items() if any(map(self.is_float, values))}
        self.body: list[Any] = [node for statement in self.tree.body for node in ast.walk(statement)]

    def text(self, node: Any) -> str:
        first, last = node.lineno - 1, node.end_lineno - 1
        if first == last:
            return self.bytes[first][node.col_offset : node.end_col_offset].decode()
        head, tail = self.bytes[first][node.col_offset :], self.bytes[last][: node.end_col_offset]
        return b"".join([head, *self.bytes[first + 1 : last], tail]).decode()

    def recording(self) -> str:
        """The source with a statement before every other that notes its line."""
        lines = list(self.lines)
        for line in {node.lineno for node in self.body if isinstance(node, ast.stmt)}:
            text = lines[line - 1]
            if not text.lstrip().startswith(("elif ", '"""')):
                indent = text[: len(text) - len(text.lstrip())]
                noted = f'__import__("sys").modules["{__name__}"]._RAN.add(({self.name!r}, {line}))'
                lines[line - 1] = f"{indent}{noted}\n{text}"
        return "".join(lines)

    def is_float(self, node: Any) -> bool:
        """Whether this is an fp32 tile (not a number that is known when the kernel is compiled)."""
        if isinstance(node, ast.Name):
            return node.id in self.floats
        if isinstance(node, ast.BinOp):
            return self.is_float(node.left) or self.is_float(node.right)
        if isinstance(node, ast.IfExp):
            return self.is_float(node.body) or self.is_float(node.orelse)
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                return called.id in _GIVING
            if isinstance(called, ast.Attribute) and called.attr == "to":
                return "float32" in self.text(node.args[0])
            if isinstance(called, ast.Attribute) and called.attr in ("reshape", "join"):
                return self.is_float(node.args[0])
        return False

    def wide(self, cast: Any) -> str:
        """Why an index needs no cast of its own to 64 bits: it is only ever multiplied with arguments of 64 bits."""
        assignment = self.inside(cast, lambda n: isinstance(n, ast.Assign))
        if not isinstance(assignment, ast.Assign):
            return ""
        target, value = assignment.targets[0], assignment.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            target = next(t for t, v in zip(target.elts, value.elts, strict=True) if cast in ast.walk(v))
        name = self.text(target)
        factors = set(re.findall(rf"\b{name} \* (\w+)", self.whole))
        for factor in factors & self.assigned.keys():  # a name for one argument or another
            factors = factors - {factor} | {self.text(v) for v in self.assigned[factor]}
        if not factors or not factors <= self.long or re.search(rf"\* {name}\b", self.whole):
            return ""
        return f"{name} is only multiplied with arguments of 64 bits, and so in 64 bits"

    def beside_wide(self, cast: Any) -> str:
        """The same of a cast that stands in the product itself."""
        product = self.parents[cast]
        wide = _is(product, ast.Mult) and self.text(product.right) in self.long
        return f"{self.text(product.right)} is an argument of 64 bits, and so is the product" if wide else ""

    def stored(self, rounded: Any) -> dict[str, Any]:
        """Why a kernel without this rounding gives the same bits: its result is only stored, and the store rounds to
        the same dtype. That does not hold where one of the lines in `unless` is run, which use the result otherwise."""
        assignment = self.inside(rounded, lambda n: isinstance(n, ast.Assign))
        if not isinstance(assignment, ast.Assign) or assignment.value is not rounded:
            return {}
        others: list[tuple[str, int]] = []
        stored = False
        for node in self.reads(assignment):
            parent = self.parents[node]
            if isinstance(parent, ast.Attribute) and parent.attr == "to" and self.inside(node, _stores) is not None:
                stored = True
                continue
            kept = self.kept_by_the_kernel() if isinstance(parent, ast.Return) else None
            others += [(self.name, self.statement(node).lineno)] if kept is None else kept
        reason = "its result is only stored, and rounded there to the same dtype"
        return {"exact": reason, "unless": tuple(others)} if stored else {}

    def reads(self, assignment: Any) -> Iterator[Any]:
        """Where the assigned name is read further on."""
        name = self.text(assignment.targets[0])
        for node in self.body:
            read = isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)
            if read and node.lineno > assignment.end_lineno:
                yield node

    def kept_by_the_kernel(self) -> list[tuple[str, int]] | None:
        """Lines of the launched kernel that use what this helper returns; None where it is called in another way than
        by a statement of its own."""
        kernel = _Function(self.launched, self.launched, {})
        calls = [n for n in kernel.body if isinstance(n, (ast.Assign, ast.Expr)) and _called(n.value, self.name)]
        reads = [node for call in calls if isinstance(call, ast.Assign) for node in kernel.reads(call)]
        return [(kernel.name, kernel.statement(node).lineno) for node in reads] if calls else None

    def statement(self, node: Any) -> Any:
        return self.inside(node, lambda n: isinstance(n, ast.stmt))

    def in_row(self, node: Any) -> bool:
        """Whether an offset is made of constants and ranges alone: then it is a place in one row, below its width."""
        if any(_called(n, "program_id") or _called(n, "load") for n in ast.walk(node)):
            return False
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - {"tl", "lane"}
        loops = {self.text(n.target) for n in self.body if isinstance(n, ast.For)}
        given = {a.arg for a in self.tree.args.args if a.annotation and "constexpr" in self.text(a.annotation)}
        made = names - loops - given
        return all(name in self.assigned and all(map(self.in_row, self.assigned[name])) for name in made)

    def inside(self, node: Any, test: Callable[[Any], bool]) -> Any:
        """The nearest node around this one that the test holds for."""
        while (node := self.parents.get(node)) is not None and not test(node):
            pass
        return node

    def edit(self, kind: str, node: Any, new: str, **more: Any) -> Edit:
        first, last = node.lineno - 1, node.end_lineno - 1
        head = self.lines[first].encode()[: node.col_offset].decode()
        tail = self.lines[last].encode()[node.end_col_offset :].decode()
        edited = "".join([*self.lines[:first], head, new, tail, *self.lines[last + 1 :]])
        statement = node if isinstance(node, ast.stmt) else self.inside(node, lambda n: isinstance(n, ast.stmt))
        line = statement.lineno
        return Edit(kind, self.text(node), new, self.source, edited, line, **more)


def _called(node: Any, name: str) -> bool:
    """Whether this is a call of `name`, or of a method or attribute so called."""
    if not isinstance(node, ast.Call):
        return False
    return getattr(node.func, "id", None) == name or getattr(node.func, "attr", None) == name


def _stores(node: Any) -> bool:
    return _called(node, "store")


def _is(node: Any, operation: type[ast.operator]) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, operation)


def _power_of_2(node: Any) -> bool:
    value = node.operand.value if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant) else None
    value = node.value if isinstance(node, ast.Constant) else value
    return isinstance(value, float) and value in (0.5, 1.0, 2.0)


_BELOW_2_31 = ("row", "head", "entry", "number", "noise_at", "channel")
_FP32 = "the value is in fp32 already"
_ROUNDED_NEXT = "nothing but a conversion to the same dtype comes after it"
# Sums of which an operator's kernel only stores what they are in the dtype: rounding them before, or not, is the same.
# The line of residual_pad is needed by the norms that share it.
_IDLE = {
    "residual_pad": "round_to(x + residual, DTYPE)",
    "upsample": "x + tl.load(residual_ptr + residual_at + again, mask=here, other=0.0).to(tl.float32)",
    "downsample": "x.to(tl.float32) + mean",
    "unpatchify": "x + tl.load(bias_ptr + channel, mask=channel < USED * EACH, other=0.0).to(tl.float32)",
}


def _roundings(f: _Function) -> Iterator[Edit]:
    for node in f.body:
        if _called(node, "round_to"):
            inner, dtype = (f.text(a) for a in node.args)
            more = {"exact": _FP32} if dtype == "PRODUCT" else f.stored(node)
            yield f.edit(ROUNDING, node, f"({inner})", **more)
            yield f.edit(ROUNDING, node, _toward_zero(inner))
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)) and f.is_float(node):
            parent = f.parents[node]
            rounded = _called(parent, "round_to") or (isinstance(parent, ast.Attribute) and parent.attr == "to")
            of_exact = _is(node, ast.Mult) and any(map(_power_of_2, (node.left, node.right)))
            # what a helper returns is rounded to the same dtype by its caller next
            if not rounded and not of_exact and not isinstance(parent, ast.Return):
                yield f.edit(ROUNDING, node, f"({f.text(node)}).to(tl.bfloat16).to(tl.float32)")


def _toward_zero(value: str) -> str:
    """Source of an fp32 value cut off to the 16 bits of bf16."""
    return f"(({value}).to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)"


def _contractions(f: _Function) -> Iterator[Edit]:
    for node in f.body:
        if _called(node, "multiply_add"):
            flag = node.args[3]
            yield f.edit(CONTRACTION, flag, f"(not {f.text(flag)})")
        if _is(node, ast.Add) and f.is_float(node):
            for side, other in ((node.left, node.right), (node.right, node.left)):
                product: Any = f.assigned[side.id][-1] if isinstance(side, ast.Name) and side.id in f.assigned else side
                if _called(product, "round_to"):
                    product = product.args[0]
                if not (_is(product, ast.Mult) and f.is_float(product)) or other is product:
                    continue
                a, b = f.text(product.left), f.text(product.right)
                square = {"exact": "the square of a 16-bit value is exact in fp32"} if a == b else {}
                if isinstance(side, ast.Name) and side.id in (a, b):  # y = y * gate: what was multiplied is gone
                    continue
                yield f.edit(CONTRACTION, node, f"tl.fma({a}, {b}, {f.text(other)})", **square)


def _folds(f: _Function) -> Iterator[Edit]:
    for node in f.body:
        if _called(node, "sum_of_two") and _called(node.args[0], "reshape"):
            values, shape = node.args[0].args
            rows, _, size = (f.text(n) for n in shape.elts)
            if size != "1":
                new = f"sum_of_two(tl.trans(tl.reshape({f.text(values)}, ({rows}, {size}, 2)), (0, 2, 1)))"
                yield f.edit(FOLD, node, new)
        if _is(node, ast.Add) and f.is_float(node) and _is(node.left, ast.Add) and f.is_float(node.left):
            a, b, c = (f.text(n) for n in (node.left.left, node.left.right, node.right))
            yield f.edit(FOLD, node, f"({a} + ({b} + {c}))")


def _statistics(f: _Function) -> Iterator[Edit]:
    for node in f.body:
        if _called(node, "row_rstd"):
            pointer = next(n for n in ast.walk(node.args[0]) if isinstance(n, ast.Name) and n.id.endswith("_ptr"))
            for other in f.alike.get(pointer.id, ()):
                yield f.edit(STATISTIC, pointer, other)
        if _is(node, ast.Mult) and f.is_float(node) and f.text(node.left) == f.text(node.right):
            yield f.edit(STATISTIC, node, f"tl.abs({f.text(node.left)})")


def _epsilons(f: _Function) -> Iterator[Edit]:
    for node in f.body:
        if _called(node, "reciprocal_root") and _is(node.args[0], ast.Add):
            value, eps = f.text(node.args[0].left), f.text(node.args[0].right)
            yield f.edit(EPS, node, f"(reciprocal_root({value}) + {eps})")
            yield f.edit(EPS, node, f"reciprocal_root({value})")


def _divisors(f: _Function) -> Iterator[Edit]:
    for node in f.body:
        if isinstance(node, ast.Name) and node.id in ("N", "rows") and isinstance(node.ctx, ast.Load):
            division = f.inside(node, lambda n: _called(n, "divide"))
            if division is not None and node in ast.walk(division.args[1]):
                yield f.edit(DIVISOR, node, f"({node.id} - 1)")


def _operands(f: _Function) -> Iterator[Edit]:
    """A tensor of the same form read in place of another, a value of the same tile for another."""
    for node in f.body:
        if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load):
            continue
        if f.inside(node, lambda n: _called(n, "row_rstd")) is not None:
            continue
        # of a pointer that is only asked for its dtype, or for its presence, the other says the same
        asked = isinstance(f.parents[node], (ast.Attribute, ast.Compare))
        if f.alike.get(node.id) and not asked:
            yield f.edit(OPERAND, node, f.alike[node.id][0])
        operation = f.parents[node]
        if isinstance(operation, ast.BinOp) and f.is_float(operation) and node.id in f.floats:
            others = [p for p in f.parameters if p in f.floats and not re.search(rf"\b{p}\b", f.text(operation))]
            if others:
                yield f.edit(OPERAND, node, others[0])


def _strides(f: _Function) -> Iterator[Edit]:
    for node in f.body:
        if not isinstance(node, ast.Name) or node.id not in f.strides or not isinstance(node.ctx, ast.Load):
            continue
        if isinstance(f.parents[node], ast.Call):  # handed on: its use in the helper is the site
            continue
        dimension = node.id.rsplit("_", 1)[-1]
        same = [s for s in f.strides if s != node.id and s.rsplit("_", 1)[-1] == dimension]
        own = [s for s in f.strides if s != node.id and s.rsplit("_", 1)[0] == node.id.rsplit("_", 1)[0]]
        turn = f.strides.index(node.id) % max(1, len(same))
        for number, new in enumerate((*same[turn:], *same[:turn], *own[:1], "1", "0")):
            yield f.edit(
                STRIDE, node, new, swapped=(node.id, new), further=number > 0 and (new != "1" or "mask" not in node.id)
            )


def _masks(f: _Function) -> Iterator[Edit]:
    for node in f.body:
        if _called(node, "load") or _called(node, "store"):
            for keyword in node.keywords:
                if keyword.arg == "mask":
                    mask = f.text(keyword.value)
                    yield f.edit(MASK, keyword.value, f"(({mask}) == ({mask}))")
                    yield f.edit(MASK, keyword.value, f"(({mask}) == 0)")


def _widths(f: _Function) -> Iterator[Edit]:
    for node in f.body:
        if _called(node, "to") and f.text(node.args[0]) == "tl.int64":
            yield f.edit(WIDTH, node, f"({f.text(node.func.value)})", exact=f.wide(node) or f.beside_wide(node))
        added = _is(node, ast.Add) and isinstance(node.left, ast.Name) and node.left.id.endswith("_ptr")
        # the number of a row, head, entry or pixel is below 2^31, by `why_not`, and a place in a row below its width
        if added and f.text(node.right) not in _BELOW_2_31 and not f.in_row(node.right):
            yield f.edit(WIDTH, node.right, f"({f.text(node.right)}).to(tl.int32)")


def _ends(f: _Function) -> Iterator[Edit]:
    for node in f.body:
        if _called(node, "store"):
            yield f.edit(PAST, node.args[0], f"({f.text(node.args[0])}) + 1")
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Lt):
            bound = node.comparators[0]
            yield f.edit(PAST, bound, f"({f.text(bound)} + 1)")
            yield f.edit(LEFT_OUT, bound, f"({f.text(bound)} - 1)")


_RULES: tuple[Callable[[_Function], Iterator[Edit]], ...] = (
    _roundings, _contractions, _folds, _statistics, _epsilons, _divisors, _operands, _strides, _masks, _widths, _ends
)  # fmt: skip


# -- an operator's mutants, and what becomes of them -----------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A generated mutant. `place` names what it changes, which operators may share; `runs` are the layouts, by their
    numbers, in which a launch of the mutant's tier comes by its line."""

    mutant: Mutant
    edit: Edit
    place: tuple[str, str, str]
    runs: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self.edit.kind


def mutants(operator: Operator) -> tuple[Site, ...]:
    """Every mutant that the rules make of the operator's kernels, of lines that some launch runs."""
    return _mutants(operator, operator.tiers)


@functools.cache
def _mutants(operator: Operator, tiers: tuple[Tier, ...]) -> tuple[Site, ...]:
    found: dict[tuple[str, str], Site] = {}
    for number, tier in enumerate(tiers):
        args = layouts(operator)[0].arguments("cpu")
        plan = tier.plan(*args)
        if isinstance(plan, str):
            continue
        ran = [_ran(operator, tier, case) for case in layouts(operator)]
        for kernel in _kernels(plan):
            function = _Function(kernel, plan.kernel, _alike(plan, args))
            for rule in _RULES:
                for edit in rule(function):
                    runs = tuple(i for i, lines in enumerate(ran) if (function.name, edit.line) in lines)
                    if not runs:
                        continue
                    name = f"{edit.kind}: {_short(edit.old)} -> {_short(edit.new)} ({function.name}, line {edit.line})"
                    mutant = Mutant(name, ((edit.source, edit.edited),), tier=number, kind=edit.kind)
                    place = (function.name, edit.old, edit.new)
                    found.setdefault((edit.source, edit.edited), Site(mutant, edit, place, runs))
    return tuple(found.values())


def _kernels(plan: Plan) -> list[Kernel]:
    """The kernel and its helpers, but for the primitives: those are one instruction each, and tests of their own hold
    them against the hardware's."""
    return [k for k in dict.fromkeys(plan.kernel._tree()) if k.fn.__module__ != "bitfuse.core.numerics"]


@functools.cache
def _ran(operator: Operator, tier: Tier, case: Any) -> frozenset[tuple[str, int]]:
    """The lines that a launch of this layout comes by, by function, in the interpreter. What a kernel runs depends on
    its constants and on which program it is, never on values, so one launch tells."""
    args = case.arguments("cpu")
    with interpreter(), torch.no_grad():
        plan = tier.plan(*args)
        if isinstance(plan, str):
            return frozenset()
        edits = ((f.source, f.recording()) for f in (_Function(k, plan.kernel, {}) for k in _kernels(plan)))
        plan = replace(plan, kernel=plan.kernel.edited(*edits))
        _RAN.clear()
        outs = plan.empty(torch.device("cpu"))
        with contextlib.suppress(Exception):  # what can't be run at all says so where it is proved
            plan.bind(args, outs)(*args, *outs)
        return frozenset(_RAN)


def _short(text: str) -> str:
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _alike(plan: Plan, args: tuple[Any, ...]) -> dict[str, tuple[str, ...]]:
    """For each pointer of the kernel those to other tensors of the same shape and dtype."""
    forms: dict[str, Any] = {}
    for name, t in zip(plan.slots or plan.kernel.parameters, plan.pointers(args), strict=False):
        if name is not None:
            forms[name] = None if t is None else (t.dtype, tuple(t.shape))
    return {
        name: tuple(other for other, theirs in forms.items() if other != name and theirs == form)
        for name, form in forms.items()
        if form is not None
    }


def chosen(operators: Sequence[Operator], further: Collection[str] = ()) -> dict[Operator, list[Site]]:
    """Of each operator's mutants those that `verify` runs: of every kind that fits an operator one at least, and of
    every line that operators share each change once; of the kinds in `further` all."""
    done: set[tuple[str, str, str]] = set()
    found: dict[Operator, list[Site]] = {}
    for operator in operators:
        kinds: Counter[str] = Counter()
        found[operator] = []
        for site in sorted(mutants(operator), key=lambda s: s.place in done):  # first what no operator has shown
            new = site.place not in done and not site.edit.further
            if new or not kinds[site.kind] or site.kind in further:
                kinds[site.kind] += 1
                done.add(site.place)
                found[operator].append(site)
    return found


@dataclass(frozen=True)
class Judged:
    """`caught`, with the mismatch; or else `equivalent`, with the reason; or neither: it survived."""

    caught: bool
    equivalent: bool
    found: str


def judge(operator: Operator, site: Site, device: torch.device | str) -> Judged:
    """Run a mutant on every layout, by every tier that runs its line, until it is caught.

    On a GPU those of `ADDRESSES` run in the interpreter. So does a mutant that the GPU did not catch: a row too many,
    for example, shows only where a tile reaches beyond the last row, and in the interpreter tiles are larger.
    """
    if torch.device(device).type == "cuda" and site.kind not in ADDRESSES:
        found = _judged(operator, site, device)
        if found.caught:
            return found
    with interpreter():
        return _judged(operator, site, "cpu")


def _judged(operator: Operator, site: Site, device: torch.device | str) -> Judged:
    reasons: list[str] = []
    for case in (layouts(operator)[number] for number in site.runs):
        verdict = _verdict(operator, site, case, device)
        if verdict.mismatch is not None:
            return Judged(True, False, verdict.sentence)
        if not verdict.equal:  # a kernel that could not be run is no proof of anything
            return Judged(False, False, verdict.sentence)
        reasons.append(_harmless(operator, site, case))
    return Judged(False, all(reasons), "; ".join(dict.fromkeys(reasons)))


def _verdict(operator: Operator, site: Site, case: Any, device: torch.device | str) -> proof.Verdict:
    number, plan = site.mutant.tier, functools.partial(site.mutant.plan, operator)
    with torch.no_grad():
        if site.kind == WIDTH:
            verdicts = [far.planted(operator, operator.tiers[number], plan, long) for long in far.cases(operator)]
            return next((v for v in verdicts if not v.equal), verdicts[0])
        prepared = _prepared(operator, number, case, str(device))
        return proof.run_battery(prepared.reference, plan, prepared)


class _Prepared:
    """A battery and what its specification makes of it, kept from mutant to mutant: `run_battery` sees to it that none
    changes an argument."""

    def __init__(self, operator: Operator, number: int, args: tuple[Any, ...]):
        self._left = iter(operator.battery(*args))
        self._families: list[tuple[str, tuple[Any, ...]]] = []
        self._specification = operator.specification(number, args[0].device)
        self._expected: dict[int, Outputs] = {}  # by the identity of the first argument, which is kept

    def __iter__(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        yield from self._families
        for family in self._left:
            self._families.append(family)
            yield family

    def reference(self, *args: Any) -> Outputs:
        if id(args[0]) not in self._expected:
            self._expected[id(args[0])] = self._specification(*args)
        return self._expected[id(args[0])]


@functools.lru_cache(4)
def _prepared(operator: Operator, number: int, case: Any, device: str) -> _Prepared:
    return _Prepared(operator, number, case.arguments(device))


def _harmless(operator: Operator, site: Site, case: Any) -> str:
    """Why the edit alters no bit in this layout, by a rule; empty where no rule says so."""
    tier, edit, args = operator.tiers[site.mutant.tier], site.edit, case.arguments("cpu")
    plan = tier.plan(*args)
    assert isinstance(plan, Plan)
    if edit.swapped is not None:
        before, after = edit.swapped
        names = plan.kernel.parameters[-len(plan.scalars) - len(plan.constants) :]
        values = dict(zip(names, plan.scalars, strict=False))
        one, other = values[before], int(after) if after.isdigit() else values[after]
        if one == other and one in (0, 1):
            return f"the stride is {one}, which the signature fixes, and so is what stands for it"
        pointer = f"{before.rpartition('_')[0]}_ptr"
        there = (n for n, t in zip(plan.slots or names, plan.pointers(args), strict=False) if t is not None)
        if plan.slots and pointer in plan.kernel.parameters and pointer not in there:
            return f"it is a stride of {pointer}, which is None in every call of this operator"
    if edit.kind == ROUNDING and edit.old == _IDLE.get(operator.name) and "bitcast" not in edit.new:
        return _ROUNDED_NEXT
    if edit.exact == _FP32 and "fp32" not in str(plan.constants.get("PRODUCT")):
        return ""
    return "" if set(edit.unless) & _ran(operator, tier, case) else edit.exact
