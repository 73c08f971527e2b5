"""What Triton and LLVM make of each kernel, for GPUs that are not here: no rounding more or less than is spelled."""

import functools
import json
import os
import subprocess
import sys

import pytest

from bitfuse import OPERATORS
from bitfuse.core.kernel import interpreter
from bitfuse.tools.prove import ptx

AUDITS = {(o.name, audit.case, o.tiers[audit.tier].name): audit for o in OPERATORS.values() for audit in o.audits}


def run(cache, *arguments: str, **environment: str) -> list[dict]:
    """`python -m bitfuse.ptx --json` in a process of its own, with nothing interpreted."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION")}
    done = subprocess.run(
        [sys.executable, "-m", "bitfuse.ptx", "--json", *arguments],
        env={**inherited, "TRITON_CACHE_DIR": str(cache), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def audited(triton_cache):
    """Every audit, and every mutant that only a compiler makes wrong, for one compute capability: compiled once."""
    return functools.cache(lambda capability: run(triton_cache, "--mutants", "--capability", str(capability)))


@pytest.fixture(params=[c if c == 90 else pytest.param(c, marks=pytest.mark.slow) for c in ptx.CAPABILITIES])
def rows(request, audited) -> list[dict]:
    return audited(request.param)


@pytest.fixture
def own(rows) -> dict[tuple, dict]:
    """The rows of the operators' own kernels, by the name of the operator, its case and its tier."""
    found = {(row["operator"], row["case"], row["tier"]): row for row in rows if row["mutant"] is None}
    assert set(found) == set(AUDITS)
    return found


def test_every_operator_is_audited():
    assert {name for name, _, _ in AUDITS} == set(OPERATORS)


def test_the_roundings_are_those_of_the_audit_and_no_others(own):
    for name, row in own.items():
        assert row["counted"] == row["expected"], name
        assert row["counts"]["branches"] == 0, name  # else a count of lines would not be a count of executions


# Of what the programs cover, how much is no output: the first frame that is dropped where a frame becomes two (of the
# three that are compiled for), and lanes beyond three colours
NOT_WRITTEN = {"upsample": 1 / 6, "unpatchify": 1 / 4}


def test_the_launch_covers_the_output_and_no_program_is_idle(own):
    """What makes "results per thread", read off the stores, the right factor for the audit."""
    for name, row in own.items():
        assert row["results"] > 0, name
        covered, programs = row["threads"] * row["results"], row["programs"]
        assert covered >= row["elements"], name
        assert (covered - covered // programs) * (1 - NOT_WRITTEN.get(row["operator"], 0)) < row["elements"], name


def test_nothing_is_flushed_approximated_or_left_to_ptxas(own):
    """But for what the audit itself names: the reciprocal square root of a row, or libdevice's exponential, whose
    flushed results vanish against the 1 that they are added to."""
    for name, row in own.items():
        asked = {*AUDITS[name].per_thread, *AUDITS[name].also}
        assert set(row["counts"]["flushing"]) <= set(asked), name
        for instruction in set(row["counts"]["rounding"]) - set(asked):
            assert ".rn" in instruction, f"{name}, {instruction}: approximate, or free for ptxas to contract"
            assert "approx" not in instruction, name
            assert "full" not in instruction, name


def test_each_operand_is_loaded_once_and_memory_accessed_16_bytes_at_a_time(own):
    """Or as the audit says."""
    for name, row in own.items():
        assert row["counts"]["loads"] == row["loads"], name
        assert row["counts"]["stores"] == row["stores"], name


# What ptxas keeps in 8 bytes of stack, with registers to spare (Triton 3.6 and 3.7.1).
STACK = {("qk_rms_norm_interleaved_rotary_per_op", 100): 8, ("rms_norm_modulate_native", 80): 8}
# Where fewer than 128 registers let more programs run at once. With another layout than Triton 3.6's, 3.7.1 took 136.
MOST_REGISTERS = {("pixel_norm_silu_pad", "768x512x121, 256 channels", 90): 96}


def test_nothing_spills(own):
    for name, row in own.items():
        assert row["counts"]["local"] == 0, name
        assert row["counts"]["stack"] <= STACK.get((row["operator"], row["capability"]), 0), name
        most = MOST_REGISTERS.get((row["operator"], row["case"], row["capability"]), 128)
        assert row["counts"]["registers"] <= most, name


def test_mutants_that_only_a_compiler_makes_wrong_are_counted_wrong(rows):
    """The negative control: left to itself, the compiler contracts, and the counts show it."""
    harmless = {(o.name, m.name): [str(d) for d in m.harmless_for] for o in OPERATORS.values() for m in o.mutants}
    dtypes = {(o.name, c.name): str(c.arguments("cpu", tokens=1)[0].dtype) for o in OPERATORS.values() for c in o.cases}
    seen = 0
    for row in rows:
        name, mutant = row["operator"], row["mutant"]
        if mutant is None or dtypes[name, row["case"]] in harmless[name, mutant]:
            continue
        seen += 1
        assert row["counted"] != row["expected"], (name, row["case"], row["capability"], mutant)
    assert seen >= 4


@pytest.mark.parametrize(
    "operators",
    [["head_gate", "split_rotary_per_op"], pytest.param(list(OPERATORS), marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_the_environment_does_not_change_a_rounding(operators, audited, triton_cache):
    """TRITON_DEFAULT_FP_FUSION flips kernels that don't say; ours do. It is 1 where it is not set, as for `audited`."""
    found = run(triton_cache, *operators, "--capability", "90", TRITON_DEFAULT_FP_FUSION="0")
    rows = {(row["operator"], row["case"], row["tier"]): row for row in audited(90) if row["mutant"] is None}
    assert found == [row for row in rows.values() if row["operator"] in operators]
    assert {row["operator"] for row in found} == set(operators)


def test_the_environment_does_change_a_kernel_that_does_not_say(tmp_path):
    """The control of the test above, in one cache of both as there."""
    program = """
import os
from dataclasses import replace
import bitfuse
from bitfuse.tools.prove import ptx
operator = bitfuse.OPERATORS["interleaved_rotary_fp32"]
tensors = operator.cases[0].arguments("cpu", tokens=16)
plan = replace(operator.plan(*tensors), options={})
for fusion in ({"TRITON_DEFAULT_FP_FUSION": "0"}, {}):
    os.environ.pop("TRITON_DEFAULT_FP_FUSION", None)
    os.environ.update(fusion)
    print("fma.rn.f32" in ptx.count(ptx.compile_for(plan, tensors, 90)).rounding)
"""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = {**inherited, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


# -- the counting itself ----------------------------------------------------------------------------------------------


def test_packed_results_count_when_they_are_used():
    counts = ptx.count_ptx("""
        mov.b64 %rd1, {%r1, %r2};
        cvt.u64.u32 %rd2, %r3;
        cvt.u64.u32 %rd3, %r4;
        shl.b64 %rd4, %rd3, 32;
        or.b64 %rd5, %rd2, %rd4;
        mul.rn.f32x2 %rd6, %rd1, %rd5;      // both lanes: one for each sum below
        sub.rn.f32x2 %rd7, %rd6, %rd5;      // the low lane alone
        add.rn.f32x2 %rd8, %rd6, %rd5;      // the high lane alone
        mov.b64 {%r5, _}, %rd7;
        mov.b64 {_, %r6}, %rd8;
        cvt.rn.bf16x2.f32 %r7, %r6, %r5;
        mul.rn.f32 %r8, %r1, %r2;           // read by nobody
        @%p1 st.global.b32 [ %rd9 + 0 ], { %r7 };
        """)
    assert counts.rounding == {"add.rn.f32": 2, "cvt.rn.bf16.f32": 2, "mul.rn.f32": 2}
    assert counts.stores == {4: 1}


def test_a_lane_that_only_a_dead_lane_reads_is_dead():
    counts = ptx.count_ptx("""
        mul.rn.f32x2 %rd3, %rd1, %rd2;
        add.rn.f32x2 %rd4, %rd3, %rd2;
        mov.b64 {%r1, _}, %rd4;
        st.global.b32 [%rd9], %r1;
        """)
    assert counts.rounding == {"add.rn.f32": 1, "mul.rn.f32": 1}


@pytest.mark.parametrize(
    ("a", "b", "c", "counted"),
    [
        ("%rs1", "%rs2", "%rs8", {"mul.rn.f32": 1, "cvt.rn.bf16.f32": 1}),
        ("%rs1", "0x3F80", "%rs2", {"add.rn.f32": 1, "cvt.rn.bf16.f32": 1}),
        ("%rs1", "%rs9", "%rs2", {"add.rn.f32": 1, "cvt.rn.bf16.f32": 1}),
        ("%rs1", "%rs2", "%rs3", {"fma.rn.bf16": 1}),
        ("%rs1", "%rs2", "%rs7", {"fma.rn.bf16": 1}),
    ],
)
def test_sm_80_spells_bf16_products_and_sums_as_fma(a, b, c, counted):
    counts = ptx.count_ptx(f"""
        mov.b16 %rs7, 0x0000;
        mov.b16 %rs8, 0x8000;
        mov.b16 %rs9, 0xBF80;
        fma.rn.bf16 %rs4, {a}, {b}, {c};
        st.global.b16 [%rd1], %rs4;
        """)
    assert counts.rounding == counted


@pytest.mark.parametrize("opcode", ["mul", "add"])
def test_bf16_products_and_sums_count_as_the_two_roundings_they_spare(opcode):
    counts = ptx.count_ptx(f"{opcode}.rn.bf16x2 %r4, %r1, %r2;\nst.global.b32 [%rd1], %r4;")
    assert counts.rounding == {f"{opcode}.rn.f32": 2, "cvt.rn.bf16.f32": 2}


@pytest.mark.parametrize(
    ("addend", "counted"),
    [("-2147450880", {"mul.rn.f32": 2, "cvt.rn.bf16.f32": 2}), ("32768", {"fma.rn.bf16": 2})],
)
def test_a_packed_constant_has_to_be_one_in_both_lanes(addend, counted):
    counts = ptx.count_ptx(f"""
        mov.b32 %r9, {addend};
        fma.rn.bf16x2 %r4, %r1, %r2, %r9;
        st.global.b32 [%rd1], %r4;
        """)
    assert counts.rounding == counted


def test_what_is_approximate_flushes_or_spills_shows():
    counts = ptx.count_ptx("""
        .local .align 8 .b8 __local_depot0[16];
        ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.nc.v2.b64 { %rd7, %rd8 }, [ %rd1 + 0 ];
        ld.global.b16 %rs1, [%rd1];
        rsqrt.approx.ftz.f32 %r5, %r1;
        div.full.f32 %r6, %r5, %r2;
        mul.f32 %r7, %r6, %r3;
        abs.ftz.f32 %r8, %r7;
        add.s32 %r9, %r8, 1;
        @%p1 bra $L1;
        st.global.v2.b32 [ %rd1 + 0 ], { %r9, %r4 };
        """)
    assert counts.rounding == {"div.full.f32": 1, "mul.f32": 1, "rsqrt.approx.ftz.f32": 1}
    assert counts.flushing == ("abs.ftz.f32", "rsqrt.approx.ftz.f32")
    assert counts.loads == {16: 2, 2: 1}
    assert counts.stores == {8: 1}
    assert (counts.branches, counts.local) == (1, 1)


def test_plans_of_the_interpreter_are_refused():
    operator = next(iter(OPERATORS.values()))
    tensors = operator.cases[0].arguments("cpu", tokens=1)
    with interpreter(), pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set"):
        ptx.compile_for(operator.plan(*tensors), tensors, 90)


def test_the_table_is_readable(triton_cache):
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bitfuse.ptx", "split_rotary_fp32", "--capability", "90"],
        env={**inherited, "TRITON_CACHE_DIR": str(triton_cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "split_rotary_fp32, video self-attention, 768x512x121 (one kernel)\n  sm_90" in done.stdout
    assert "fma.rn.f32" in done.stdout
    assert "as audited" in done.stdout


def test_an_unknown_operator_is_named():
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "bitfuse.ptx", "rope"], env=inherited, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown operator rope; accepted: " in done.stderr
