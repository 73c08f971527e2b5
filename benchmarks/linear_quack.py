"""quack's GEMM (quack-kernels 0.6.5, CuTe DSL) as an engine: a linear layer with what follows it, rounded as ATen
rounds. What this file needs is no dependency of bitfuse: it is in `carry-quack.txt`. Importing it imports that, which
from torch 2.13 on changes torch's own rms_norm on Hopper: so only an experiment does.

quack calls a function of an element of the fp32 accumulator when it traces a kernel. A rounding is a conversion to bf16
and back; what is one instruction of ours is written as one, so that no compiler fuses a product and a sum. Row vectors
(bias, gate) are pinned: where M is N, quack can't tell one from a column.

A launch is prepared once (`EpiMod.gemm` without launching gives a plan, `run_gemm_epi_plan` runs it). Without a GPU,
QUACK_ARCH=90 and CUTE_DSL_ARCH=sm_90a compile the same kernels; quack's own cache keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cutlass import BFloat16, Float32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import RowVecLoad
from quack.gemm_runtime.host import run_gemm_epi_plan
from torch import Tensor

Call = Callable[[], Tensor]

# -- what follows ------------------------------------------------------------------------------------------------------


def rounded(value):
    """To bf16 and back to fp32."""
    return value.to(BFloat16).to(Float32)


def short_gelu(value):
    """`bitfuse.core.numerics.gelu`, instruction by instruction."""
    return Float32(
        llvm.inline_asm(
            T.f32(),
            [Float32(value).ir_value()],
            """{
            .reg .f32 s, e;
            mul.rn.f32 s, $1, $1;
            fma.rn.f32 s, s, 0fBDD2D3E8, 0fC0135761;
            mul.rn.f32 e, $1, s;
            ex2.approx.ftz.f32 e, e;
            add.rn.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 e, e;
            add.rn.f32 e, e, 0f3E800000;
            add.rn.f32 e, e, 0fBE800000;
            mul.rn.f32 $0, $1, e;
            }""",
            "=f,f",
            has_side_effects=False,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
        )
    )


def _rows(*names: str) -> dict[str, Any]:
    return {name: RowVecLoad(name) for name in names}


@gemm_epilogue(ops=_rows("bias"))
def plain(acc, bias):
    return {"D": acc + bias}


@gemm_epilogue(ops=_rows("bias"))
def gelu(acc, bias):
    return {"D": short_gelu(rounded(acc + bias))}


@gemm_epilogue(ops=_rows("bias"))
def gelu_by_tanh(acc, bias):
    """Op for op as ATen has it, with CUDA's own tanh."""
    value = rounded(acc + bias)
    inner = Float32(0.7978845608028654) * (value + Float32(0.044715) * (value * value * value))
    return {"D": Float32(0.5) * value * (Float32(1.0) + cute.math.tanh(inner))}


@gemm_epilogue(ops=_rows("bias", "gate"))
def gated(acc, c, bias, gate):
    return {"D": c + rounded(rounded(acc + bias) * gate)}


FORMS = {"plain": plain, "gelu": gelu, "gelu by tanh": gelu_by_tanh, "gated": gated}

# -- kernels -----------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """One kernel in one configuration, with the interface of `linear.Way`.

    tile        rows and columns of one tile of the output; a cluster of two neighbours in `along` loads B or A once
    pingpong    two groups of warps take tiles by turns: one multiplies while the other does what follows
    schedule    "static": a program a multiprocessor, each with a fixed share of the tiles; "dynamic": each takes the
                next tile; "once": a program a tile
    dependent   begins while the kernel before it ends (programmatic dependent launch), and waits before it reads
    tanh        GELU op for op instead of the short one
    """

    tile: tuple[int, int]
    pingpong: bool
    along: str = "m"
    schedule: str = "static"
    dependent: bool = True
    tanh: bool = False

    @property
    def name(self) -> str:
        how = [f"quack {self.tile[0]}x{self.tile[1]}", "pingpong" if self.pingpong else "together"]
        how += [f"cluster along {self.along}"] if self.along != "m" else []
        how += [self.schedule] if self.schedule != "static" else []
        how += [] if self.dependent else ["launched after"]
        return " ".join([*how, "tanh"] if self.tanh else how)

    def fits(self, n: int, k: int) -> bool:
        return n % 8 == 0 and k % 8 == 0

    def call(self, given: Any, epilogue: str) -> Call:
        """A prepared launch on the tensors of a `linear.Layer`, into its y: compiled here, where it was not yet."""
        form = FORMS["gelu by tanh" if epilogue == "gelu" and self.tanh else epilogue]
        row_vectors = {"bias": given.bias} | ({"gate": given.gate} if epilogue == "gated" else {})
        residual = given.residual if epilogue == "gated" else None
        dynamic = self.schedule == "dynamic"
        count = torch.zeros(1, dtype=torch.int32, device=given.x.device) if dynamic else None
        cluster = (2, 1) if self.along == "m" else (1, 2)
        plan = form.gemm(
            given.x,
            given.w,
            given.y,
            residual,
            epi_args=row_vectors,
            tile_M=self.tile[0],
            tile_N=self.tile[1],
            cluster_M=cluster[0],
            cluster_N=cluster[1],
            pingpong=self.pingpong,
            persistent=self.schedule != "once",
            is_dynamic_persistent=dynamic,
            tile_count_semaphore=count,
            post_init_attrs=() if self.dependent else (("use_pdl", False),),
            _launch=False,
        )

        def call() -> Tensor:
            semaphore = None if count is None else count.zero_()  # each launch counts from 0
            run_gemm_epi_plan(plan, given.x, given.w, given.y, residual, row_vectors, tile_count_semaphore=semaphore)
            return given.y

        return call


# Those that are tried in steps; which layer got which is in `linear_steps.engines`.
CONFIGURATIONS = (Way((128, 192), True), Way((256, 192), False), Way((128, 256), False), Way((128, 208), True))
