"""Linear layers in Gluon for Hopper whose warps that multiply also do what follows, on the registers of the sum.

Registers allow a multiprocessor sums of 192 x 256 at once: 49,152 of its 65,536. They are held in three ways, each
group being four warps, loads and stores being TMA's and products wgmma's:

    pingpong    two groups, each with a tile of its own of 192 x 128: while one does what follows, the other multiplies
    together    two groups, each with half the columns of a tile of 192 x 256
    thirds      three groups, each with a third of the rows of a tile of 192 x 256

A tile's operands come from L2 once. For a layer of 6144 x 16384 x 4096 that is 10.7 GB with tiles of 192 x 128, 7.5 GB
with those of 192 x 256. From shared memory a product of 64 x 256 x 16 reads 10 KiB in 128 cycles, one of 64 x 128 x 16,
of which the first two ways are made, 6 KiB in 64. Sides of a tensor are powers of two, so 192 x 128 are three sums of
64 x 128, and not two of 192 columns. `thirds` has no warps that load: with 512 threads a thread would begin with 128
registers, and ptxas wants 154 there for a product of 64 x 256. Its first group loads what the others need, too.

Nothing keeps groups in step but the stages: one may do what follows while the others are some stages ahead or behind.

`linear.py --kinds thirds together pingpong` and `linear_steps.py --engine gluon` run them. Compiled for sm_90 by Triton
3.6 and 3.7. Programs don't share what they load: Gluon of 3.6 has no multicast, and that
of 3.7.1 is not used here. There is no interpreter for Gluon: only a GPU can show that it is right.
"""

from __future__ import annotations

import triton
from linear_gluon import GELU, PLAIN, _gelu, _tile, descriptor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

TILES = {"pingpong": (192, 128, 64), "together": (192, 256, 64), "thirds": (192, 256, 64)}
_ROWS, _PIECE, _BK = gl.constexpr(192), gl.constexpr(64), gl.constexpr(64)  # a piece: rows of one sum or one copy
_WIDE = gl.constexpr(128)  # columns that are stored at a time
_GELU = gl.constexpr(GELU)
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the latter before Triton 3.7


@gluon.jit
def _fill(memory, step, row, column, at, STAGES: gl.constexpr):
    """Ask for the operands of a step, once those of STAGES steps before have been read."""
    x_desc, w_desc, x_tiles, w_tiles, ready, empty = memory
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    bar = ready.index(stage)
    mbarrier.expect(bar, 3 * x_desc.block_type.nbytes + w_desc.block_type.nbytes)
    for i in gl.static_range(3):
        tma.async_copy_global_to_shared(x_desc, [row + i * _PIECE, at], bar, x_tiles.index(3 * stage + i))
    tma.async_copy_global_to_shared(w_desc, [column, at], bar, w_tiles.index(stage))


@gluon.jit
def _finish(total, bias_ptr, y_tile, y_desc, row, column, EPILOGUE: gl.constexpr):
    """64 x 128: bias, the one rounding, what follows, and on their way to memory."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _WIDE, 16])
    total = gl.convert_layout(total, layout, assert_trivial=True)
    bias = gl.load(bias_ptr + column + gl.arange(0, _WIDE, gl.SliceLayout(0, layout)))
    y = (total + bias.to(gl.float32)[None, :]).to(gl.bfloat16)
    if EPILOGUE == _GELU:
        y = _gelu(y.to(gl.float32)).to(gl.bfloat16)
    tma.store_wait(0)  # what was stored before has been read: one thread knows, the barrier tells the others
    _barrier()
    y_tile.store(y)
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, [row, column], y_tile)


# -- pingpong and together ---------------------------------------------------------------------------------------------


@gluon.jit
def _load(memory, sizes, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):
    """All steps of all tiles of this program, in the order in which the tensor core takes them."""
    m, n, k, tiles = sizes
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _tile(tile, m, n, _ROWS, BN, GROUP)
        for at in range(0, k, _BK):
            _fill(memory, step, row, column, at, STAGES)
            step += 1


@gluon.jit
def _multiply_half(
    given, sizes, EPILOGUE: gl.constexpr, PINGPONG: gl.constexpr, PART: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Pingpong: every second tile of this program. Together: columns PART * 128 and further of each."""
    bias_ptr, y_desc, x_tiles, w_tiles, y_tiles, ready, empty, turn = given
    m, n, k, tiles = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _WIDE, 16])
    zeros = gl.zeros([_PIECE, _WIDE], gl.float32, layout)
    y_tile = y_tiles.index(PART)
    first, stride, step, skipped = gl.program_id(0), gl.num_programs(0), 0, 0
    if PINGPONG:
        skipped = gl.cdiv(k, _BK)  # steps of the other group's tile
        first, stride, step = first + PART * stride, 2 * stride, PART * skipped
    done = 0
    for tile in range(first, tiles, stride):
        row, column = _tile(tile, m, n, _ROWS, BN, GROUP)
        if PINGPONG:
            # The other group has waited for each of its steps. A group that waited for a step before that could take
            # an older fill of the stage for it: a barrier tells odd from even, no more.
            mbarrier.wait(turn.index(PART), (done & 1) ^ (1 - PART))
        else:
            column += PART * _WIDE
        a = zeros
        b = zeros
        c = zeros
        for at in range(0, k, _BK):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            if PINGPONG:
                w = w_tiles.index(stage).permute((1, 0))
            else:
                w = w_tiles.index(stage).slice(PART * _WIDE, _WIDE, dim=0).permute((1, 0))
            a = warpgroup_mma(x_tiles.index(3 * stage), w, a, use_acc=at > 0, is_async=True)
            b = warpgroup_mma(x_tiles.index(3 * stage + 1), w, b, use_acc=at > 0, is_async=True)
            c = warpgroup_mma(x_tiles.index(3 * stage + 2), w, c, use_acc=at > 0, is_async=True)
            # The three of the step before are done: its operands' memory may be filled again.
            a, b, c = warpgroup_mma_wait(3, deps=[a, b, c])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=at > 0)
            step += 1
        if PINGPONG:
            mbarrier.arrive(turn.index(1 - PART))
        a, b, c = warpgroup_mma_wait(0, deps=[a, b, c])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        _finish(a, bias_ptr, y_tile, y_desc, row, column, EPILOGUE)
        _finish(b, bias_ptr, y_tile, y_desc, row + _PIECE, column, EPILOGUE)
        _finish(c, bias_ptr, y_tile, y_desc, row + 2 * _PIECE, column, EPILOGUE)
        step += skipped
        done += 1  # noqa: SIM113  (Triton has no enumerate)
    tma.store_wait(0)


@gluon.jit
def halves_kernel(
    x_desc, w_desc, y_desc, bias_ptr, m, n, k,
    EPILOGUE: gl.constexpr, PINGPONG: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Persistent: tile number program_id, and every num_programs further."""
    BN: gl.constexpr = w_desc.block_type.shape[0]
    tiles = gl.cdiv(m, _ROWS) * gl.cdiv(n, BN)
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [3 * STAGES, _PIECE, _BK], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, _BK], w_desc.layout)
    y_tiles = gl.allocate_shared_memory(y_desc.dtype, [2, _PIECE, _WIDE], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1 if PINGPONG else 2)
    for part in gl.static_range(2):
        mbarrier.init(turn.index(part), count=1)
    multiply = (bias_ptr, y_desc, x_tiles, w_tiles, y_tiles, ready, empty, turn)
    memory = (x_desc, w_desc, x_tiles, w_tiles, ready, empty)
    sizes = (m, n, k, tiles)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    # Registers of a thread: 240 in the two groups that multiply, 24 in the third, of which one warp loads.
    gl.warp_specialize(
        [
            (_multiply_half, (multiply, sizes, EPILOGUE, PINGPONG, FIRST, BN, STAGES, GROUP)),
            (_multiply_half, (multiply, sizes, EPILOGUE, PINGPONG, SECOND, BN, STAGES, GROUP)),
            (_load, (memory, sizes, BN, STAGES, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )


# -- thirds ------------------------------------------------------------------------------------------------------------


@gluon.jit
def _fill_next(memory, sizes, place, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr):
    """Fill the next stage, if a tile is left; what is to be filled after it."""
    m, n, k, tiles = sizes
    step, tile, at, row, column = place
    if tile < tiles:
        _fill(memory, step, row, column, at, STAGES)
    at += _BK
    if at >= k:
        at = 0
        tile += gl.num_programs(0)
        row, column = _tile(tile, m, n, _ROWS, BN, GROUP)
    return step + 1, tile, at, row, column


@gluon.jit
def _multiply_third(
    given, memory, sizes, EPILOGUE: gl.constexpr, PART: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Rows PART * 64 and further of each tile; the first of the groups fills a stage when all three have read it."""
    bias_ptr, y_desc, y_tiles = given
    _, _, x_tiles, w_tiles, ready, empty = memory
    m, n, k, tiles = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    zeros = gl.zeros([_PIECE, BN], gl.float32, layout)
    y_tile = y_tiles.index(PART)
    if PART == 0:
        row, column = _tile(gl.program_id(0), m, n, _ROWS, BN, GROUP)
        place = (0, gl.program_id(0), 0, row, column)
        for _ in range(STAGES):
            place = _fill_next(memory, sizes, place, BN, STAGES, GROUP)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, column = _tile(tile, m, n, _ROWS, BN, GROUP)
        total = zeros
        for at in range(0, k, _BK):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            w = w_tiles.index(stage).permute((1, 0))
            total = warpgroup_mma(x_tiles.index(3 * stage + PART), w, total, use_acc=at > 0, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=at > 0)
            if PART == 0:  # noqa: SIM102  (known when it is compiled, the other is not)
                if at > 0:
                    place = _fill_next(memory, sizes, place, BN, STAGES, GROUP)
            step += 1
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        if PART == 0:
            place = _fill_next(memory, sizes, place, BN, STAGES, GROUP)
        row += PART * _PIECE
        left, right = gl.split(gl.permute(gl.reshape(total, (_PIECE, 2, BN // 2)), (0, 2, 1)))
        _finish(left, bias_ptr, y_tile, y_desc, row, column, EPILOGUE)
        _finish(right, bias_ptr, y_tile, y_desc, row, column + BN // 2, EPILOGUE)
    tma.store_wait(0)


@gluon.jit
def thirds_kernel(
    x_desc, w_desc, y_desc, bias_ptr, m, n, k,
    EPILOGUE: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Persistent: tile number program_id, and every num_programs further."""
    BN: gl.constexpr = w_desc.block_type.shape[0]
    tiles = gl.cdiv(m, _ROWS) * gl.cdiv(n, BN)
    x_tiles = gl.allocate_shared_memory(x_desc.dtype, [3 * STAGES, _PIECE, _BK], x_desc.layout)
    w_tiles = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, _BK], w_desc.layout)
    y_tiles = gl.allocate_shared_memory(y_desc.dtype, [3, _PIECE, _WIDE], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=3)
    finish = (bias_ptr, y_desc, y_tiles)
    memory = (x_desc, w_desc, x_tiles, w_tiles, ready, empty)
    sizes = (m, n, k, tiles)
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    THIRD: gl.constexpr = 2
    gl.warp_specialize(
        [
            (_multiply_third, (finish, memory, sizes, EPILOGUE, FIRST, BN, STAGES, GROUP)),
            (_multiply_third, (finish, memory, sizes, EPILOGUE, SECOND, BN, STAGES, GROUP)),
            (_multiply_third, (finish, memory, sizes, EPILOGUE, THIRD, BN, STAGES, GROUP)),
        ],
        [4, 4],
        [168, 168],
    )


# -- launches ----------------------------------------------------------------------------------------------------------


def launch(kind, x, w, bias, y, epilogue, tile, stages, *, group=16, programs=132):
    """(kernel, grid, arguments, options) of y = what follows(x @ w.T + bias), as `linear_gluon.deferred` gives them.

    kind, tile    of `TILES`; N is a multiple of the tile's
    epilogue      GELU, or PLAIN: nothing follows
    """
    assert tuple(tile) == TILES[kind], (kind, tile)
    assert epilogue in (PLAIN, GELU), "gate and residual are not here"
    (m, k), n = x.shape, w.shape[0]
    bm, bn, bk = tile
    blocks = (x, [_PIECE.value, bk]), (w, [bn, bk]), (y, [_PIECE.value, _WIDE.value])
    args = (*(descriptor(t, block) for t, block in blocks), bias, m, n, k, epilogue)
    grid = (min(programs, triton.cdiv(m, bm) * triton.cdiv(n, bn)),)
    options = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": False}
    if kind == "thirds":
        return thirds_kernel, grid, (*args, stages, group), options
    return halves_kernel, grid, (*args, kind == "pingpong", stages, group), options
