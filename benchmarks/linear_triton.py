"""Linear layers in Triton with what follows them, rounded as ATen rounds: TMA descriptors made by the host, one fp32
sum along K, the bias added in fp32 before the one rounding, then each of ATen's ops with its own.

`persistent` keeps to one program a multiprocessor and flattens both loops, so that loads of the next tile run while a
tile is stored; `once` takes a tile a program, small enough for two programs a multiprocessor, of which one multiplies
while the other does what follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from bitfuse.core.kernel import kernel
from bitfuse.core.numerics import gelu, round_to

if TYPE_CHECKING:
    import triton.language as tl

PLAIN, GELU, GATED, ADDED = range(4)
"""What follows: nothing; GELU; times gate, plus residual; plus residual."""


def _tanh_twin(value):
    wide = value.to(tl.float64)  # as a CPU's ATen has it, to the last bit or the one before
    return (1.0 - 2.0 / (1.0 + tl.exp(2.0 * wide))).to(tl.float32)


@kernel(twin=_tanh_twin)
def tanh(value):
    """CUDA's tanhf with both of its branches computed and one chosen: the same instructions, so the same bits.

    With branches (`libdevice.tanh`) each element of a thread waits for the one before.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 a, far, square, near; .reg .pred q;
        abs.ftz.f32 a, $1;
        mul.rn.f32 far, a, 0f4038AA3B;
        ex2.approx.ftz.f32 far, far;
        add.rn.f32 far, far, 0f3F800000;
        rcp.approx.ftz.f32 far, far;
        fma.rn.ftz.f32 far, far, 0fC0000000, 0f3F800000;
        setp.ge.f32 q, a, 0f41102CB4;
        selp.f32 far, 0f3F800000, far, q;
        copysign.f32 far, $1, far;
        mul.rn.f32 square, $1, $1;
        fma.rn.ftz.f32 near, square, 0f3C80F082, 0fBD563CAE;
        fma.rn.ftz.f32 near, near, square, 0f3E085941;
        fma.rn.ftz.f32 near, near, square, 0fBEAAA9ED;
        fma.rn.ftz.f32 near, near, square, 0f00000000;
        fma.rn.ftz.f32 near, near, $1, $1;
        setp.ltu.f32 q, a, 0f3F19999A;
        selp.f32 $0, near, far, q;
        }""",
        "=f,f",
        [value],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


def _power_twin(value):
    return tl.exp2(value)


@kernel(twin=_power_twin)
def power(value):
    """2^value: `ex2.approx.ftz.f32`."""
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )


def _reciprocal_twin(value):
    return 1.0 / value


@kernel(twin=_reciprocal_twin)
def reciprocal(value):
    """1 / value: `rcp.approx.ftz.f32`."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@kernel
def gelu_by_tanh(value):
    """The same, op for op."""
    inner = 0.7978845608028654 * (value + 0.044715 * (value * value * value))
    return 0.5 * value * (1.0 + tanh(inner))


@kernel
def following(y, residual, gate, EPILOGUE: tl.constexpr):
    """What follows the layer, of its rounded output in fp32; to be rounded to bf16."""
    if EPILOGUE == 1:
        y = gelu(y)
    if EPILOGUE == 2:
        y = residual + round_to(y * gate[None, :], tl.bfloat16)
    if EPILOGUE == 3:
        y = residual + y
    return y


@kernel
def _store(total, y_desc, residual_desc, bias_ptr, gate_ptr, row, column, WIDE: tl.constexpr, EPILOGUE: tl.constexpr):
    columns = column + tl.arange(0, WIDE)
    bias = tl.load(bias_ptr + columns).to(tl.float32)
    y = round_to(total + bias[None, :], tl.bfloat16)
    residual, gate = y, bias
    if EPILOGUE >= 2:
        residual = residual_desc.load([row, column]).to(tl.float32)
    if EPILOGUE == 2:
        gate = tl.load(gate_ptr + columns).to(tl.float32)
    y_desc.store([row, column], following(y, residual, gate, EPILOGUE).to(tl.bfloat16))


@kernel
def _place(tile, m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile's first element: tiles go in groups of GROUP rows of tiles, for the cache."""
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    group = tile // (GROUP * tiles_n)
    rows = min(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return (group * GROUP + within % rows) * BM, (within // rows) * BN


@kernel
def persistent(
    x_desc, w_desc, y_desc, residual_desc, bias_ptr, gate_ptr, m, n, k,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """One program a multiprocessor; a tile is stored in halves, as a whole one needs registers that the sum holds."""
    tiles = tl.cdiv(m, BM) * tl.cdiv(n, BN)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        row, column = _place(tile, m, n, BM, BN, GROUP)
        total = tl.zeros((BM, BN), tl.float32)
        for step in range(tl.cdiv(k, BK)):
            x = x_desc.load([row, step * BK])
            w = w_desc.load([column, step * BK])
            total = tl.dot(x, w.T, total)
        first, second = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))
        _store(first, y_desc, residual_desc, bias_ptr, gate_ptr, row, column, BN // 2, EPILOGUE)
        _store(second, y_desc, residual_desc, bias_ptr, gate_ptr, row, column + BN // 2, BN // 2, EPILOGUE)


@kernel
def once(
    x_desc, w_desc, y_desc, residual_desc, bias_ptr, gate_ptr, m, n, k,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """A tile a program."""
    row, column = _place(tl.program_id(0), m, n, BM, BN, GROUP)
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(tl.cdiv(k, BK)):
        x = x_desc.load([row, step * BK])
        w = w_desc.load([column, step * BK])
        total = tl.dot(x, w.T, total)
    _store(total, y_desc, residual_desc, bias_ptr, gate_ptr, row, column, BN, EPILOGUE)


def launch(
    form: Any, x: Tensor, w: Tensor, bias: Tensor, y: Tensor, residual: Tensor, gate: Tensor, epilogue: int,
    tile: tuple[int, int, int], warps: int, stages: int, *, group: int = 8, programs: int = 132,
) -> tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """(kernel, grid, arguments, options) of y = what follows(x @ w.T + bias).

    x [M, K], w [N, K], y and residual [M, N], bias and gate [N], all bf16 and contiguous; N a multiple of the tile's
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), n = x.shape, w.shape[0]
    bm, bn, bk = tile
    wide = bn // 2 if form is persistent else bn
    blocks = ((x, bm, bk), (w, bn, bk), (y, bm, wide), (residual, bm, wide))
    descriptors = [TensorDescriptor.from_tensor(t, [rows, columns]) for t, rows, columns in blocks]
    tiles = -(-m // bm) * -(-n // bn)
    programs = min(programs, tiles) if form is persistent else tiles
    arguments = (*descriptors, bias, gate, m, n, k, epilogue, bm, bn, bk, group, programs if form is persistent else 0)
    return form, (programs, 1, 1), arguments, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}


# -- what the arithmetic is made of ------------------------------------------------------------------------------------


@kernel(twin=_tanh_twin)
def _far(value):
    """The branch of CUDA's tanhf for large values alone: half the instructions."""
    return tl.inline_asm_elementwise(
        """{
        .reg .f32 far;
        abs.ftz.f32 far, $1;
        mul.rn.f32 far, far, 0f4038AA3B;
        ex2.approx.ftz.f32 far, far;
        add.rn.f32 far, far, 0f3F800000;
        rcp.approx.ftz.f32 far, far;
        fma.rn.ftz.f32 far, far, 0fC0000000, 0f3F800000;
        copysign.f32 $0, $1, far;
        }""",
        "=f,f",
        [value],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@kernel
def gelu_forms(x_ptr, out_ptr, FORM: tl.constexpr):
    """GELU in other spellings, 1024 values a program: `GELU_FORMS`."""
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    v = tl.load(x_ptr + at).to(tl.float32)
    if FORM == 0:
        y = gelu(v)
    elif FORM == 1:
        y = gelu_by_tanh(v)
    elif FORM == 2:
        y = 0.5 * v * (1.0 + _far(0.7978845608028654 * (v + 0.044715 * (v * v * v))))
    else:
        y = v * reciprocal(1.0 + power(v * (-2.302208198144325 + -0.1029432395800235 * (v * v))))
    tl.store(out_ptr + at, y.to(tl.bfloat16))


GELU_FORMS = ("as in the kernels", "op for op", "tanh by its far branch", "the logistic function alone")


@kernel
def sums(x_ptr, w_ptr, out_ptr, n, k, BM: tl.constexpr, BN: tl.constexpr):
    """x @ w.T in fp32 [M, N], 16 products an instruction: what the tensor core itself gives, without cuBLAS."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    lane = tl.arange(0, 16)
    total = tl.zeros((BM, BN), tl.float32)
    for at in range(0, k, 16):
        x = tl.load(x_ptr + row[:, None] * k + at + lane[None, :])
        w = tl.load(w_ptr + column[None, :] * k + at + lane[:, None])
        total = tl.dot(x, w, total)
    tl.store(out_ptr + row[:, None] * n + column[None, :], total)
