"""Linear layers in Gluon for Hopper: three kinds of warps, so that what follows the matmul runs beside the next tile's.

One warp loads (TMA), eight multiply (wgmma), four do what follows. A tile's sum gets its bias and its one rounding in
the warps that multiplied, as `F.linear` has them; the rounded tile goes through shared memory, two bytes an element, to
the four that apply GELU, or gate and residual, and store it, while the next tile is multiplied. That handing-over is
cheap because ATen's chain rounds there anyhow.

Compiled for sm_90 by Triton 3.6 and 3.7. There is no interpreter for Gluon: only a GPU can show that it is right.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

PLAIN, GELU, GATED = 0, 1, 2


@gluon.jit
def _tile(tile, m, n, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """Row and column of the first element of a tile, in groups of GROUP rows of tiles, for the cache."""
    tiles_m, tiles_n = gl.cdiv(m, BM), gl.cdiv(n, BN)
    group = tile // (GROUP * tiles_n)
    rows = min(tiles_m - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_n)
    return (group * GROUP + within % rows) * BM, (within // rows) * BN


@gluon.jit
def _load(
    x_desc, w_desc, x_tiles, w_tiles, ready, empty, m, n, k, tiles,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _tile(tile, m, n, BM, BN, GROUP)
        for at in range(0, k, BK):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), x_desc.block_type.nbytes + w_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_desc, [row, at], ready.index(stage), x_tiles.index(stage))
            tma.async_copy_global_to_shared(w_desc, [column, at], ready.index(stage), w_tiles.index(stage))
            step += 1


@gluon.jit
def _multiply(
    bias_ptr, x_tiles, w_tiles, y_tile, ready, empty, y_ready, y_empty, m, n, k, tiles,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BN, 16])
    single: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    zeros = gl.zeros([BM, BN], gl.float32, layout)
    step = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, column = _tile(tile, m, n, BM, BN, GROUP)
        bias = gl.load(bias_ptr + column + gl.arange(0, BN, single))  # on its way while the tile is multiplied
        total = zeros
        for at in range(0, k, BK):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            total = warpgroup_mma(
                x_tiles.index(stage), w_tiles.index(stage).permute((1, 0)), total, use_acc=at > 0, is_async=True
            )
            # The product before this one is done: its operands' memory may be filled again.
            total = warpgroup_mma_wait(1, deps=[total])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=at > 0)
            step += 1
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        spread = gl.convert_layout(bias.to(gl.float32), gl.SliceLayout(0, layout))
        y = (total + spread[None, :]).to(gl.bfloat16)
        mbarrier.wait(y_empty, (done & 1) ^ 1)
        y_tile.store(y)
        mbarrier.arrive(y_ready)
        done += 1  # noqa: SIM113  (Triton has no enumerate)


# CUDA's tanhf with both of its branches computed and one chosen: the same instructions, so the same bits. With
# branches, each element of a thread waits for the one before.
_TANH = gl.constexpr("""{
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
}""")


@gluon.jit
def _gelu(v):
    """ATen's GELU with tanh: every operation rounded to fp32 on its own; CUDA's tanh."""
    inner = 0.7978845608028654 * (v + 0.044715 * (v * v * v))
    tanh = gl.inline_asm_elementwise(_TANH, "=f,f", [inner], dtype=gl.float32, is_pure=True, pack=1)
    return 0.5 * v * (1.0 + tanh)


@gluon.jit
def _finish(
    y_desc, residual_ptr, gate_ptr, y_tile, y_ready, y_empty, m, n, tiles, EPILOGUE: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    # In shared memory a tile lies as strips of 64 columns, rows of 128 bytes: a piece is some rows of a strip.
    ROWS: gl.constexpr = 32
    WIDE: gl.constexpr = 64
    pieces = y_tile._reinterpret(gl.bfloat16, [BM * BN // (ROWS * WIDE), ROWS, WIDE], y_tile.type.layout)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _tile(tile, m, n, BM, BN, GROUP)
        mbarrier.wait(y_ready, done & 1)
        if EPILOGUE != PLAIN_:
            for i in range(BM * BN // (ROWS * WIDE)):
                here = pieces.index(i)
                v = here.load(layout).to(gl.float32)
                if EPILOGUE == GELU_:
                    here.store(_gelu(v).to(gl.bfloat16))
                else:
                    columns = column + i // (BM // ROWS) * WIDE + gl.arange(0, WIDE, gl.SliceLayout(0, layout))
                    rows = row + i % (BM // ROWS) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
                    gate = gl.load(gate_ptr + columns).to(gl.float32)
                    at = rows.to(gl.int64)[:, None] * n + columns[None, :]
                    residual = gl.load(residual_ptr + at, mask=(rows < m)[:, None], other=0.0).to(gl.float32)
                    t = (v * gate[None, :]).to(gl.bfloat16).to(gl.float32)
                    here.store((residual + t).to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [row, column], y_tile)
        tma.store_wait(0)
        mbarrier.arrive(y_empty)
        done += 1  # noqa: SIM113  (Triton has no enumerate)


PLAIN_, GELU_ = gl.constexpr(PLAIN), gl.constexpr(GELU)


@gluon.jit
def deferred_kernel(
    x_desc, w_desc, y_desc, bias_ptr, residual_ptr, gate_ptr, m, n, k,
    EPILOGUE: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Persistent. What follows the matmul of a tile runs in warps of its own, beside the next tile."""
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    BK: gl.constexpr = x_desc.block_type.shape[1]
    tiles = gl.cdiv(m, BM) * gl.cdiv(n, BN)
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, BK], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, BK], w_desc.layout)
    y_tile = gl.allocate_shared_memory(y_desc.dtype, [BM, BN], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    y_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    y_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    mbarrier.init(y_ready, count=1)
    mbarrier.init(y_empty, count=1)
    gl.warp_specialize(
        [
            (_multiply, (bias_ptr, x_tiles, w_tiles, y_tile, ready, empty, y_ready, y_empty, m, n, k, tiles,
                         BM, BN, BK, STAGES, GROUP)),
            (_finish, (y_desc, residual_ptr, gate_ptr, y_tile, y_ready, y_empty, m, n, tiles, EPILOGUE, BM, BN, GROUP)),
            (_load, (x_desc, w_desc, x_tiles, w_tiles, ready, empty, m, n, k, tiles, BM, BN, BK, STAGES, GROUP)),
        ],
        [2, 1],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


def descriptor(t: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


def deferred(x, w, bias, y, residual, gate, epilogue, tile, stages, *, group=8, registers=96, programs=132):
    """(kernel, grid, arguments, options) of y = what follows(x @ w.T + bias), as `linear_triton.launch` gives them."""
    (m, k), n = x.shape, w.shape[0]
    bm, bn, bk = tile
    args = (descriptor(x, [bm, bk]), descriptor(w, [bn, bk]), descriptor(y, [bm, bn]), bias, residual, gate, m, n, k)
    grid = (min(programs, triton.cdiv(m, bm) * triton.cdiv(n, bn)),)
    options = {"num_warps": 8, "maxnreg": 168, "enable_fp_fusion": False}
    return deferred_kernel, grid, (*args, epilogue, stages, group, registers), options
