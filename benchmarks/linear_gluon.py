"""Linear layers in Gluon for Hopper: three kinds of warps, so that what follows the matmul runs beside the next tile's.

One warp loads (TMA), eight multiply (wgmma), two do what follows. A tile's sum gets its bias and its one rounding in
the warps that multiplied, as `F.linear` has them; the rounded tile goes through shared memory, two bytes an element, to
the two that apply GELU, or gate and residual, and store it, while the next tile is multiplied. That handing-over is
cheap because ATen's chain rounds there anyhow. More than two would leave the eight fewer than the 154 registers that
ptxas wants at the kernel's entry for a wgmma of 64 x 256.

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
    given, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    x_desc, w_desc, x_tiles, w_tiles, ready, empty, m, n, k, tiles = given
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
    given, PART: gl.constexpr, PARTS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Rows PART * BM / PARTS and further of each tile."""
    bias_ptr, x_tiles, w_tiles, y_tiles, ready, empty, y_ready, y_empty, m, n, k, tiles = given
    ROWS: gl.constexpr = BM // PARTS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BN, 16])
    single: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    zeros = gl.zeros([ROWS, BN], gl.float32, layout)
    step = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, column = _tile(tile, m, n, BM, BN, GROUP)
        bias = gl.load(bias_ptr + column + gl.arange(0, BN, single))  # on its way while the tile is multiplied
        total = zeros
        for at in range(0, k, BK):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            x = x_tiles.index(stage).slice(PART * ROWS, ROWS, dim=0)
            w = w_tiles.index(stage).permute((1, 0))
            total = warpgroup_mma(x, w, total, use_acc=at > 0, is_async=True)
            # The product before this one is done: its operands' memory may be filled again.
            total = warpgroup_mma_wait(1, deps=[total])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=at > 0)
            step += 1
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        spread = gl.convert_layout(bias.to(gl.float32), gl.SliceLayout(0, layout))
        y = (total + spread[None, :]).to(gl.bfloat16)
        mbarrier.wait(y_empty.index(PART), (done & 1) ^ 1)
        y_tiles.index(PART).store(y)
        mbarrier.arrive(y_ready.index(PART))
        done += 1  # noqa: SIM113  (Triton has no enumerate)


@gluon.jit
def _gelu(v):
    """`linear_triton.gelu`."""
    twice = v * gl.fma(v * v, gl.full_like(v, -0.1029432395800235), gl.full_like(v, -2.302208198144325))
    power = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [twice], dtype=gl.float32, is_pure=True, pack=1
    )
    logistic = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=gl.float32, is_pure=True, pack=1
    )
    return v * ((logistic + 0.25) - 0.25)


@gluon.jit
def _finish(
    given, EPILOGUE: gl.constexpr, PARTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    y_desc, residual_ptr, gate_ptr, y_tiles, y_ready, y_empty, m, n, tiles = given
    # In shared memory a tile lies as strips of 64 columns, rows of 128 bytes: a piece is some rows of a strip.
    ROWS: gl.constexpr = 32
    WIDE: gl.constexpr = 64
    STRIP: gl.constexpr = BM // PARTS // ROWS  # pieces
    PIECES: gl.constexpr = STRIP * BN // WIDE
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _tile(tile, m, n, BM, BN, GROUP)
        for part in gl.static_range(PARTS):
            y_tile = y_tiles.index(part)
            mbarrier.wait(y_ready.index(part), done & 1)
            if EPILOGUE != PLAIN_:
                pieces = y_tile._reinterpret(gl.bfloat16, [PIECES, ROWS, WIDE], y_tile.type.layout)
                for i in range(PIECES):
                    here = pieces.index(i)
                    v = here.load(layout).to(gl.float32)
                    if EPILOGUE == GELU_:
                        here.store(_gelu(v).to(gl.bfloat16))
                    else:
                        columns = column + i // STRIP * WIDE + gl.arange(0, WIDE, gl.SliceLayout(0, layout))
                        rows = row + part * (BM // PARTS) + i % STRIP * ROWS
                        rows += gl.arange(0, ROWS, gl.SliceLayout(1, layout))
                        gate = gl.load(gate_ptr + columns).to(gl.float32)
                        at = rows.to(gl.int64)[:, None] * n + columns[None, :]
                        residual = gl.load(residual_ptr + at, mask=(rows < m)[:, None], other=0.0).to(gl.float32)
                        t = (v * gate[None, :]).to(gl.bfloat16).to(gl.float32)
                        here.store((residual + t).to(gl.bfloat16))
            fence_async_shared()
            tma.async_copy_shared_to_global(y_desc, [row + part * (BM // PARTS), column], y_tile)
            tma.store_wait(0)
            mbarrier.arrive(y_empty.index(part))
        done += 1  # noqa: SIM113  (Triton has no enumerate)


PLAIN_, GELU_ = gl.constexpr(PLAIN), gl.constexpr(GELU)


@gluon.jit
def deferred_kernel(
    x_desc, w_desc, y_desc, bias_ptr, residual_ptr, gate_ptr, m, n, k,
    EPILOGUE: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Persistent. What follows the matmul of a tile runs in warps of its own, beside the next tile.

    PARTS   1: eight warps multiply a tile together. 2: four warps each half of its rows, on their own, so that one half
            is handed over while the other is multiplied
    """
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    BK: gl.constexpr = x_desc.block_type.shape[1]
    tiles = gl.cdiv(m, BM) * gl.cdiv(n, BN)
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, BK], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, BK], w_desc.layout)
    y_tiles = gl.allocate_shared_memory(y_desc.dtype, [PARTS, BM // PARTS, BN], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    y_ready = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    y_empty = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=PARTS)
    for part in gl.static_range(PARTS):
        mbarrier.init(y_ready.index(part), count=1)
        mbarrier.init(y_empty.index(part), count=1)
    multiply = (bias_ptr, x_tiles, w_tiles, y_tiles, ready, empty, y_ready, y_empty, m, n, k, tiles)
    finish = (y_desc, residual_ptr, gate_ptr, y_tiles, y_ready, y_empty, m, n, tiles)
    load = (x_desc, w_desc, x_tiles, w_tiles, ready, empty, m, n, k, tiles)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    # Registers of a thread: 208 in the eight warps that multiply, 96 in the others, which are 65,536 together.
    if PARTS == 1:
        gl.warp_specialize(
            [
                (_multiply, (multiply, FIRST, PARTS, BM, BN, BK, STAGES, GROUP)),
                (_finish, (finish, EPILOGUE, PARTS, BM, BN, GROUP)),
                (_load, (load, BM, BN, BK, STAGES, GROUP)),
            ],
            [2, 1],
            [96, 96],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (multiply, FIRST, PARTS, BM, BN, BK, STAGES, GROUP)),
                (_multiply, (multiply, SECOND, PARTS, BM, BN, BK, STAGES, GROUP)),
                (_finish, (finish, EPILOGUE, PARTS, BM, BN, GROUP)),
                (_load, (load, BM, BN, BK, STAGES, GROUP)),
            ],
            [4, 2, 1],
            [208, 96, 96],
        )


def descriptor(t: torch.Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16))


def deferred(x, w, bias, y, residual, gate, epilogue, tile, stages, *, parts=1, group=8, programs=132):
    """(kernel, grid, arguments, options) of y = what follows(x @ w.T + bias), as `linear_triton.launch` gives them."""
    (m, k), n = x.shape, w.shape[0]
    bm, bn, bk = tile
    blocks = (x, [bm, bk]), (w, [bn, bk]), (y, [bm // parts, bn])
    args = (*(descriptor(t, block) for t, block in blocks), bias, residual, gate, m, n, k)
    grid = (min(programs, triton.cdiv(m, bm) * triton.cdiv(n, bn)),)
    options = {"num_warps": 8 // parts, "maxnreg": 168, "enable_fp_fusion": False}
    return deferred_kernel, grid, (*args, epilogue, parts, stages, group), options
