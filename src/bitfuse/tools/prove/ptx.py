"""What the compiler makes of a kernel, without a GPU: every rounding that will be executed, counted.

    python -m bitfuse.tools.prove.ptx                     # a table: every operator, kernel and compute capability
    python -m bitfuse.tools.prove.ptx --json --mutants    # for a program, with the mutants only a compiler makes wrong

A kernel is exact when it executes the roundings that its source spells, and no others; Triton, LLVM and ptxas
each stand between. `compile_for` compiles a plan for a GPU that need not be here and `count` reads the PTX: the
rounding instructions, the width of each access to memory, and, from the cubin, registers and spills.

LLVM respells arithmetic without changing its bits, so spellings of one rounding are counted under one name:

- A packed instruction counts once for each of its results that is used (`cvt.rn.bf16x2.f32`, `fma.rn.f32x2`):
  LLVM pads half-used pairs with lanes that nobody reads, and those round nothing.
- `sub` counts as `add`: one rounding of a + (-b).
- From Triton 3.7 and sm_100 on, `add.rn.f32.bf16` and `fma.rn.f32.bf16` count as `add.rn.f32` and `fma.rn.f32`:
  they take an operand in bf16, which is exact in fp32, and round their fp32 result once.
- `mul.rn.bf16` and `add.rn.bf16` count as the fp32 operation and `cvt.rn.bf16.f32`, as kernels here spell them: of
  bf16 operands the fp32 product is exact, and a sum that fp32 rounds comes out the same (24 >= 2 * 8 + 2 bits).
  Which ones LLVM shortens differs between Triton 3.6 and 3.7.
- sm_80 has neither; there they are `fma.rn.bf16` with the addend -0.0 or the factor 1.0 or -1.0.

`.rn` in a name matters: ptxas may contract `mul.f32` and `add.f32` into a fused multiply-add, but never
`mul.rn.f32` and `add.rn.f32`. Triton drops the `.rn` where FP fusion is on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.evidence import Audit
from bitfuse.core.kernel import interpreting
from bitfuse.core.launch import Plan
from bitfuse.core.operator import OPERATORS, Operator

CAPABILITIES = (80, 90, 100, 120)
"""One of each family that Triton compiles differently: A100, H100, B200, RTX 5090."""

TOKENS = 64  # of the calls that are compiled for: their number is not part of what is compiled


def compile_for(plan: Plan, args: tuple[Any, ...], capability: int) -> Any:
    """The `triton.compiler.CompiledKernel` that this plan's launch would compile on a GPU of that capability.

    Specialised by Triton's own launcher code, not by a copy of its rules. The plan must not have been made
    under TRITON_INTERPRET=1, where tiles are larger; ValueError if that is set.
    """
    if interpreting():
        raise ValueError("TRITON_INTERPRET=1 is set: plans are then made for the interpreter; unset it to compile")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    jit = plan.kernel.compiled
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(jit.signature, jit.params, backend)
    device = args[0].device
    extras = (torch.empty(16, dtype=dtype, device=device) for dtype in plan.extras)
    parameters = (*plan.filled((*plan.pointers(args), *extras, *plan.empty(device))), *plan.scalars)
    bound, specialization, options = bind(*parameters, **plan.constants, num_warps=plan.num_warps, **plan.options)
    options, signature, constants, attributes = jit._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(jit, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


# -- reading PTX -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """What one thread of a compiled kernel does. Exact where `branches` is 0, as then each line runs once.

    rounding    results that are used, by rounding instruction; every float operation that may round is here
    flushing    instructions that flush subnormals (.ftz), whatever they do
    loads       accesses to global memory by width in bytes
    stores
    branches    jumps in the PTX
    local       lines of PTX that mention .local memory
    registers   of the cubin, by cuobjdump; None where that tool is missing
    stack       bytes of stack, by cuobjdump; what registers spill to is there
    """

    rounding: dict[str, int]
    flushing: tuple[str, ...]
    loads: dict[int, int]
    stores: dict[int, int]
    branches: int
    local: int
    registers: int | None
    stack: int | None

    @property
    def stored_bytes(self) -> int:
        return sum(width * n for width, n in self.stores.items())


def count(compiled: Any) -> Counts:
    """Count what the PTX and the cubin of a compiled kernel hold. Needs no GPU."""
    registers, stack = _resources(compiled.asm["cubin"])
    return replace(count_ptx(compiled.asm["ptx"]), registers=registers, stack=stack)


def count_ptx(text: str) -> Counts:
    """`count` for PTX alone, as LLVM writes it: every register is written once, before it is read."""
    text = re.sub(r"//.*", "", text)
    instructions = list(_instructions(text))
    memory: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    for opcode, _ in instructions:
        parts = opcode.split(".")
        if parts[0] in memory and "global" in parts:
            memory[parts[0]][_access_bytes(parts)] += 1
    return Counts(
        rounding=dict(sorted(_rounding(instructions).items())),
        flushing=tuple(sorted({opcode for opcode, _ in instructions if ".ftz" in opcode})),
        loads=dict(memory["ld"]),
        stores=dict(memory["st"]),
        branches=sum(opcode.split(".")[0] in ("bra", "brx", "call") for opcode, _ in instructions),
        local=len(re.findall(r"\.local\b", text)),
        registers=None,
        stack=None,
    )


_FLOAT = re.compile(r"(?:bf|tf|f|e\dm)\d+(?:x\d)?")  # among the parts of an opcode
_ROUNDS_NOTHING = {"mov", "ld", "st", "neg", "abs", "setp", "set", "selp", "slct", "min", "max", "copysign", "testp"}
_NO_RESULT = {"st", "stmatrix", "red", "bra", "brx", "ret", "exit", "bar", "barrier", "membar", "fence", "trap", "call"}
_ALL = (1 << 64) - 1
_Instruction = tuple[str, list[list[str]]]


def _instructions(text: str) -> Iterator[_Instruction]:
    """(opcode, operands); an operand is the list of its registers or literals, one but for {%a, %b}."""
    for statement in re.split(r"[;\n]", text):
        found = re.match(r"\s*(?:@!?%\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)(?:\s+(.*))?$", statement)
        if found:
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", found[2] or "")
            yield found[1], [re.findall(r"[^,\s{}\[\]+]+", operand) for operand in operands]


def _rounding(instructions: list[_Instruction]) -> Counter[str]:
    """Results by rounding instruction, of those that reach memory or a branch.

    A walk from the end that keeps, for each register, which of its bits are read later on.
    """
    literals = {o[0][0]: o[1][0] for opcode, o in instructions if opcode.startswith("mov.") and len(o) == 2}
    found: Counter[str] = Counter()
    read: Counter[str] = Counter()  # register -> bits

    def use(operand: list[str], bits: int, width: int = 64) -> None:
        for i, register in enumerate(operand):
            read[register] |= (bits >> i * width) & ((1 << width) - 1)

    for opcode, operands in reversed(instructions):
        parts = opcode.split(".")
        if parts[0] in _NO_RESULT:
            for register in itertools.chain(*operands):
                read[register] = _ALL
            continue
        if not operands:
            continue
        target, *sources = operands
        packing = parts[0] == "mov"  # the one instruction that makes a wide register of several, or several of one
        width = _bits(parts[-1]) // len(target) if packing else 64
        bits = 0
        for i, register in enumerate(target):
            bits |= (read[register] & ((1 << width) - 1)) << (i * width if packing else 0)
        if not bits:
            continue
        lanes, lane_bits = _lanes(parts)
        if _rounds(parts):
            results = sum(bool(bits >> i * lane_bits & ((1 << lane_bits) - 1)) for i in range(lanes))
            for name in _names(opcode, sources, literals):
                found[name] += results
        for source in sources:
            if packing:
                use(source, bits, _bits(parts[-1]) // len(source))
            elif opcode == "or.b64" or (lanes > 1 and parts[0] != "cvt"):  # each bit, or lane, from its own place
                use(source, bits)
            elif opcode == "shl.b64" and sources[1][0].isdigit():
                use(source, bits >> int(sources[1][0]))
            else:
                for register in source:
                    read[register] = _ALL
    return found


def _rounds(parts: list[str]) -> bool:
    if not any(_FLOAT.fullmatch(p) for p in parts[1:]) or parts[0] in _ROUNDS_NOTHING:
        return False
    return parts[0] != "cvt" or bool({"rn", "rna", "rz", "rm", "rp", "rs", "rni", "rzi", "rmi", "rpi"} & set(parts))


def _names(opcode: str, sources: list[list[str]], literals: dict[str, str]) -> tuple[str, ...]:
    """The instruction without packing, `sub` as `add`, and operations on bf16 by the two roundings they spare."""
    name = re.sub(r"\b(\w+\d)x2\b", r"\1", opcode)  # not ex2
    name = re.sub(r"^sub\.", "add.", name)
    name = re.sub(r"^((?:add|fma)\.rn\.f32)\.(?:bf16|f16)$", r"\1", name)
    if name == "fma.rn.bf16":
        copies = 0x10001 if "x2" in opcode else 1
        a, b, c = (_literal(source[0], literals) for source in sources)
        if c == 0x8000 * copies:
            name = "mul.rn.bf16"
        elif {a, b} & {0x3F80 * copies, 0xBF80 * copies}:
            name = "add.rn.bf16"
    if name in ("mul.rn.bf16", "add.rn.bf16"):
        return name.replace("bf16", "f32"), "cvt.rn.bf16.f32"
    return (name,)


def _literal(operand: str, literals: dict[str, str]) -> int | None:
    text = literals.get(operand, operand)
    return int(text, 0) & 0xFFFFFFFF if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", text) else None


def _lanes(parts: list[str]) -> tuple[int, int]:
    """(results, bits of each): cvt names the type of its results first, everything else names one type."""
    for part in parts[1:]:
        if found := re.fullmatch(r"(?:bf|f)(\d+)x2", part):
            return 2, int(found[1])
    return 1, 64


def _bits(kind: str) -> int:
    found = re.fullmatch(r"[a-z]+(\d+)", kind)
    return int(found[1]) if found else 64


def _access_bytes(parts: list[str]) -> int:
    vector = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
    return vector * _bits(parts[-1]) // 8


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """(registers, bytes of stack and local memory)"""
    from triton import knobs

    try:
        tool = knobs.nvidia.cuobjdump.path
    except RuntimeError:  # a Triton that ships without it
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


# -- every operator's kernels, beside what is to be counted ----------------------------------------------------------


@dataclass(frozen=True)
class KernelCounts:
    """One kernel on one capability: what was counted, and what the operator's evidence (its `Audit`) says is to be.

    `mutant` names a wrong kernel, None the operator's own. `programs` and `threads` are those of the whole
    launch, which has to make the `elements` of the first output; one thread makes `results` of them. `expected`,
    `loads` and `stores` are what a thread is to do; `also` names instructions that are not counted.
    """

    operator: str
    case: str
    tier: str
    capability: int
    mutant: str | None
    programs: int
    threads: int
    elements: int
    results: int
    loads: Mapping[int, float]
    stores: Mapping[int, float]
    expected: dict[str, int]
    also: tuple[str, ...]
    counts: Counts

    @property
    def counted(self) -> dict[str, int]:
        return {name: n for name, n in self.counts.rounding.items() if name not in self.also}

    @property
    def as_expected(self) -> bool:
        return self.expected == self.counted


def kernel_counts(
    operators: Iterable[Operator], capabilities: Iterable[int] = CAPABILITIES, mutants: bool = False
) -> Iterator[KernelCounts]:
    """Compile and count every kernel that these operators' evidence has counts of; with `mutants`, also those that only
    a compiler makes wrong."""
    capabilities = tuple(capabilities)
    for operator in operators:
        for wanted in operator.audits:
            args = _arguments(operator, wanted)
            plans: dict[str | None, Plan | str] = {None: operator.tiers[wanted.tier].plan(*args)}
            if mutants:
                wrong = [m for m in operator.mutants if m.compiled_only and m.tier == wanted.tier]
                plans |= {m.name: m.plan(operator, *args) for m in wrong}
            for name, plan in plans.items():
                if isinstance(plan, str):
                    raise ValueError(f"{operator.name} counts {wanted.case!r}, which that tier can't do: {plan}")
                if "FUSED" in plan.constants:  # what CUDA builds of torch do from 2.11 on, whatever this CPU does
                    plan = replace(plan, constants={**plan.constants, "FUSED": True})
                for capability in capabilities:
                    counts = count(compile_for(plan, args, capability))
                    yield _compared(operator, wanted, plan, args, name, capability, counts)


def _compared(
    operator: Operator, wanted: Audit, plan: Plan, args: tuple[Any, ...], mutant: str | None, capability: int, c: Counts
) -> KernelCounts:
    elements = math.prod(max((out.shape for out in plan.outputs), key=math.prod))  # a padded one, where one is
    output_bytes = sum(math.prod(out.shape) * out.dtype.itemsize for out in plan.outputs)
    results = wanted.results or elements * c.stored_bytes // output_bytes
    once = sum(results * a.numel() * a.itemsize for a in args if isinstance(a, Tensor)) // elements
    expected: Counter[str] = Counter({name: n * results // wanted.per for name, n in wanted.counts.items()})
    expected += Counter(wanted.per_thread)
    return KernelCounts(
        operator.name,
        wanted.case,
        operator.tiers[wanted.tier].name,
        capability,
        mutant,
        programs=math.prod(plan.grid),
        threads=math.prod(plan.grid) * 32 * plan.num_warps,
        elements=elements,
        results=results,
        loads=wanted.loads or {16: once / 16},
        stores=wanted.stores or {16: c.stored_bytes / 16},
        expected=dict(sorted(expected.items())),
        also=wanted.also,
        counts=c,
    )


def _arguments(operator: Operator, wanted: Audit) -> tuple[Any, ...]:
    case = next((c for c in operator.cases if c.name == wanted.case), None)
    if case is None:
        raise ValueError(f"{operator.name} counts {wanted.case!r}, which is none of its cases")
    return case.arguments("cpu", tokens=TOKENS)


def _table(rows: Iterable[KernelCounts]) -> Iterator[str]:
    last = None
    for row in rows:
        if (row.operator, row.case, row.tier, row.mutant) != last:
            last = (row.operator, row.case, row.tier, row.mutant)
            yield f"\n{row.operator}, {row.case} ({row.tier}){f', mutant: {row.mutant}' if row.mutant else ''}"
        c = row.counts
        rounding = ", ".join(f"{n} {instruction}" for instruction, n in c.rounding.items())
        widths = ", ".join(
            f"{n} {what} of {w}" for what, d in (("ld", c.loads), ("st", c.stores)) for w, n in d.items()
        )
        verdict = "as audited" if row.as_expected else f"AUDIT: {row.expected}"
        if row.also:
            verdict += f", {', '.join(row.also)} not counted"
        extras = f"{c.registers} registers, {c.stack} bytes of stack"
        if c.flushing:
            extras += f", flushes: {', '.join(c.flushing)}"
        yield f"  sm_{row.capability:<4}{rounding}; {widths} bytes; {extras}; {verdict}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bitfuse.tools.prove.ptx", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("operators", nargs="*", help=f"default: all of {', '.join(OPERATORS)}")
    parser.add_argument("--capability", type=int, action="append", help=f"default: {CAPABILITIES}")
    parser.add_argument("--mutants", action="store_true", help="also the mutants that only a compiler makes wrong")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.operators if name not in OPERATORS]:
        parser.error(f"unknown operator {', '.join(unknown)}; accepted: {', '.join(OPERATORS)}")
    if interpreting():
        parser.error("TRITON_INTERPRET=1 is set, so nothing would be compiled as it runs; unset it")
    operators = [OPERATORS[name] for name in given.operators or OPERATORS]
    rows = kernel_counts(operators, given.capability or CAPABILITIES, given.mutants)
    if given.json:
        print(json.dumps([asdict(row) | {"counted": row.counted} for row in rows]))
    else:
        for line in _table(rows):
            print(line)


if __name__ == "__main__":
    import bitfuse.ops  # noqa: F401  (defines the operators)

    main()
