"""diffusers' diffusion decoder of LTX-2.5 (0.42.1): its blocks, and of its attentions what comes before the attention.

Two kinds of blocks: those of the four stages that make a context of the latents, and those that denoise pixels under
it. Both have an RMSNorm with a weight before a neighbourhood attention and before a SwiGLU feed-forward, and residuals
without gates. Each block and each feed-forward gets a forward of ours. An attention keeps its forward and its
processor, FlexAttention's or NATTEN's or somebody's own: ours is the method that all of them call, `project_qkv`.

The cosines and sines of the rotary embedding depend on the grid of tokens, which a stage's blocks share, and on
nothing else: the host computes them anew in each attention, twice; here `GridTables` keeps what its ops gave.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders import ltx2_diffusion_decoder as upstream
from torch import Tensor

from bitfuse.core.bits import compare
from bitfuse.core.conditions import HALVES, around, capturing
from bitfuse.hosts import ltx2, offload
from bitfuse.hosts.handle import Handle
from bitfuse.hosts.ltx2 import ABSENT, RotaryTrial, weights_of, why_gradient
from bitfuse.hosts.offload import weight_of
from bitfuse.hosts.part import Model, Part
from bitfuse.hosts.site import Site
from bitfuse.hosts.sources import Norms, calls_of, entries, functions, of_operators, own_method, ways, why_not_stock
from bitfuse.ops.adaln import RESIDUAL_RMS_NORM_MODULATE_WEIGHTED
from bitfuse.ops.grid_rotary import QK_RMS_NORM_GRID_ROTARY, turned_on_grid
from bitfuse.ops.swiglu import SWIGLU
from bitfuse.run.alone import alone
from bitfuse.run.swap import hooked, named, ours_in

_Decoder: Any = upstream.LTX2VideoDiffusionDecoderModel
_Attention: Any = upstream.LTX2VideoVaeNeighborhoodAttention
_Rope: Any = upstream.LTX2VideoVaeRotaryPosEmbed3D
_SwiGLU: Any = upstream.LTX2VideoVaeSwiGLU
_Block: Any = upstream.LTX2VideoVaeNABlock
_DiffusionBlock: Any = upstream.LTX2VideoVaeDiffusionNABlock

_PROJECTION = "LTX2VideoVaeNeighborhoodAttention.project_qkv"
_ROPE_METHODS = ("forward", "_rotate_axis", "_inv_freqs")
_ROPE = tuple(f"LTX2VideoVaeRotaryPosEmbed3D.{name}" for name in _ROPE_METHODS)
_MLP = "LTX2VideoVaeSwiGLU.forward"
_FORWARDS = {_Block: "LTX2VideoVaeNABlock.forward", _DiffusionBlock: "LTX2VideoVaeDiffusionNABlock.forward"}

# Upstream sources that were read and are restated here or in the operators' references (`source_hash`): 0.42.1.
READ = {
    _PROJECTION: {"897126aeb2c454ba"},
    "LTX2VideoVaeRotaryPosEmbed3D.forward": {"5533639de72857a7"},
    "LTX2VideoVaeRotaryPosEmbed3D._rotate_axis": {"68bd9c914ae07117"},
    "LTX2VideoVaeRotaryPosEmbed3D._inv_freqs": {"8a191d1da4390561"},
    _MLP: {"5e061fa0d774b672"},
    "LTX2VideoVaeNABlock.forward": {"f733be7b2ef5ec2b"},
    "LTX2VideoVaeDiffusionNABlock.forward": {"684386984215459c"},
}

_QK_NORMS = Norms(("norm_q", "norm_k"), torch.nn.RMSNorm, "torch.nn.RMSNorm", weighted=True)
_NORMS = {  # of each kind of block, those that are fused: norm1 of a block without modulation is one kernel by itself
    _Block: Norms(("norm2",), torch.nn.RMSNorm, "torch.nn.RMSNorm", weighted=True),
    _DiffusionBlock: Norms(("norm1", "norm2"), torch.nn.RMSNorm, "torch.nn.RMSNorm", weighted=True),
}
_MODULATIONS = (
    7  # rows of a block's table: scale, shift and gate of attention and feed-forward, and a gate of the context
)

# The functions that parts of ours leave out, by the kind of part.
LEFT_OUT = {
    "attention": [
        *entries(upstream, _PROJECTION, *_ROPE),
        *calls_of(_Rope, "LTX2VideoVaeRotaryPosEmbed3D"),
        *of_operators((QK_RMS_NORM_GRID_ROTARY,)),
    ],
    "feed-forward": [*entries(upstream, _MLP), *of_operators((SWIGLU,))],
    "block": [*entries(upstream, *_FORWARDS.values()), *of_operators((RESIDUAL_RMS_NORM_MODULATE_WEIGHTED,))],
}


# -- an attention's projections ----------------------------------------------------------------------------------------


class GridTables:
    """The cosines and sines of a grid of tokens, by the host's own ops: one set for all attentions of a stage.

    They are a function of the grid, of the rotary embedding's two settings and of the device, and nobody else gets
    hold of them, so a set is kept until the acceleration ends; of more than `_KEPT` the oldest goes. Each CUDA stream
    has its own, which its own kernels have written. Nothing is kept while a CUDA graph is captured or somebody watches
    the ops.
    """

    _KEPT = 64  # a tiled decode has some dozens of grids, of which a set takes up to 60 KB

    def __init__(self, handle: Handle):
        self._kept: dict[Any, tuple[Tensor, ...]] = {}
        clear = weakref.WeakMethod(self.clear)
        handle.on_restore(lambda: (found := clear()) is not None and found())

    def of(self, rope: Any, grid: Sequence[int], x: Tensor) -> tuple[Tensor, ...]:
        """cos and sin along frames, lines and columns, each [places, pairs], fp32, on x's device."""
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        split, inference = tuple(rope.rope_dim_split), torch.is_inference_mode_enabled()
        key = (tuple(grid), split, rope.base, x.device, stream, inference)
        found = self._kept.get(key)
        if found is None:
            found = _tables(rope, grid, x.device)
            if not capturing(x) and next(around(), None) is None:
                while len(self._kept) >= self._KEPT:
                    self._kept.pop(next(iter(self._kept)), None)
                self._kept[key] = found
        return found

    def clear(self) -> None:
        self._kept = {}


def _tables(rope: Any, grid: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    """As `LTX2VideoVaeRotaryPosEmbed3D.forward` and `_rotate_axis` compute them."""
    found = []
    for places, dim in zip(grid, rope.rope_dim_split, strict=True):
        positions = torch.arange(places, dtype=torch.float32, device=device)
        angles = positions[:, None] * rope._inv_freqs(dim, device)[None, :]
        found += [angles.cos(), angles.sin()]
    return tuple(found)


class ProjectQKV(Part):
    """`LTX2VideoVaeNeighborhoodAttention.project_qkv`, with norms, scale and rotary embedding in one kernel."""

    __slots__ = ("_tables", "_trial")
    kind, method = "attention", "project_qkv"

    def __init__(self, attn: Any, model: Model, site: Site, tables: GridTables, trial: RotaryTrial):
        super().__init__(attn, model, (site,))
        self._tables, self._trial = tables, trial

    def why_stock(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        reason = why_gradient(attn, args, kwargs) or _QK_NORMS.why_called(attn) or _why_rope_called(attn.rope)
        if reason is not None:
            return reason
        if not isinstance(attn.scale, float) or attn.norm_q.normalized_shape != (attn.head_dim,):
            return "its scale or its norms are not those that it was made with"
        return self._trial.why_stock(attn)

    def fused(self, attn: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, *grid, _ = hidden_states.shape
        tokens = batch, grid[0] * grid[1] * grid[2], attn.heads * attn.head_dim
        shape = (batch, *grid, attn.heads, attn.head_dim)
        query, key = attn.to_q(hidden_states), attn.to_k(hidden_states)
        value = attn.to_v(hidden_states).view(shape)
        weights = weight_of(attn.norm_q), weight_of(attn.norm_k)
        tables = self._tables.of(attn.rope, grid, query)
        (site,), eps = self.sites, attn.norm_q.eps
        query, key = site.call(
            QK_RMS_NORM_GRID_ROTARY, query.view(tokens), key.view(tokens), *weights, *tables, attn.scale, eps
        )
        return query.view(shape), key.view(shape), value


def _why_rope_called(rope: Any, *, hooks: bool = True) -> str | None:
    """Why the rotary embedding must be called, if so. When it is taken over a hook is no reason: it may go again."""
    kind = type(rope)
    if kind is not _Rope and not (issubclass(kind, _Rope) and ways(kind) == ways(_Rope)):
        return f"rope is a {named(kind)}, not diffusers' own"
    if hooks and hooked(rope):
        return "a hook is attached to rope, which is not called when it is fused"
    if not all(own_method(rope, name, _Rope) for name in _ROPE_METHODS[1:]):
        return "rope has a method of its own"
    if type(rope.base) not in (int, float):  # a tensor may be written to, which tables that are kept don't see
        return f"the base of rope is a {named(type(rope.base))}, not a number"
    return None


def _difference(attn: Any) -> str | None:
    """Why the operator can't stand in for the host's rotary embedding: tried in this process."""
    rope = attn.rope
    if (reason := _why_rope_called(rope, hooks=False)) is not None:
        return reason
    found = _rope_difference(tuple(rope.rope_dim_split), rope.base, attn.head_dim, *weights_of(attn))
    return None if found is None else f"the rotary embedding of diffusers and bitfuse's reference part here: {found}"


@functools.cache
def _rope_difference(
    split: tuple[int, ...], base: float, head_dim: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Where the host's rotary embedding and the operator's part, on a small grid; None: nowhere."""
    rope = _Rope(head_dim, base)
    if rope.rope_dim_split != split:
        return f"a head of {head_dim} is split into {split}"
    with torch.no_grad():
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(2, 3, 5, 7, 2, head_dim, generator=generator, device=device).to(dtype)
        mismatch = compare(rope(x), turned_on_grid(x, *_tables(rope, x.shape[1:4], device)))
    return None if mismatch is None else mismatch.sentence


# -- a feed-forward ----------------------------------------------------------------------------------------------------


class SwiGLU(Part):
    """`LTX2VideoVaeSwiGLU.forward`, in the host's own tiles: a matmul of other rows may have other bits."""

    __slots__ = ()
    kind = "feed-forward"

    def why_stock(self, mlp: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        return why_gradient(mlp, args, kwargs)

    def fused(self, mlp: Any, hidden_states: Tensor) -> Tensor:
        tiles = _tiles(hidden_states)
        if tiles is None:
            return self._of(mlp, hidden_states)
        flat = hidden_states.reshape(hidden_states.shape[0], -1, hidden_states.shape[-1])
        out = torch.empty_like(flat)
        for tile in tiles:
            out[:, tile] = self._of(mlp, flat[:, tile])
        return out.reshape(hidden_states.shape)

    def _of(self, mlp: Any, x: Tensor) -> Tensor:
        gate, up, (site,) = mlp.w_gate(x), mlp.w_up(x), self.sites
        rows = gate.shape[0], -1, gate.shape[-1]
        product = site.call(SWIGLU, gate.reshape(rows), up.reshape(rows)).view(gate.shape)
        del gate, up  # memory for the projection
        return mlp.w_down(product)

    def may_add(self, mlp: Any, x: Tensor, n: Tensor) -> bool:
        """Whether `add` does, and nobody would notice, what a call of the module and an addition do."""
        if type(mlp) is not _SwiGLU or hooked(mlp) or mlp.__dict__.get("forward") is not self:
            return False
        if x.dtype not in HALVES or n.dtype != x.dtype:
            return False  # the sum would be of another dtype
        if torch.is_grad_enabled() or next(around(), None) is not None or self.model.why_stock(self.kind) is not None:
            return False
        return self._another(mlp) is None

    def add(self, mlp: Any, x: Tensor, n: Tensor) -> Tensor:
        """x + the feed-forward of n, in the memory of x where that holds it.

        Tile by tile: the host puts its tiles together, which may round them, and then adds them.
        """
        tiles = _tiles(n)
        if tiles is None:
            y = self._of(mlp, n)
            return x.add_(y) if _alike(y, x) else x + y
        sums, normed = (t.view(t.shape[0], -1, t.shape[-1]) for t in (x, n))
        for tile in tiles:
            y, total = self._of(mlp, normed[:, tile]), sums[:, tile]
            if not _alike(y, total):
                put = torch.empty_like(total)
                put[:] = y
                y = put
            total.add_(y)
        return x


def _alike(y: Tensor, x: Tensor) -> bool:
    """Whether x += y has the bits of x + y: a layer that somebody has put there may give anything."""
    return type(y) is Tensor and (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)


def _tiles(x: Tensor) -> list[slice] | None:
    """The tokens of each tile; None where the host makes none of so few."""
    size, tokens = upstream._SWIGLU_TILE_SIZE, x.shape[1:-1].numel()
    if tokens <= size:
        return None
    return [slice(start, start + size) for start in range(0, tokens, size)]


# -- a block -----------------------------------------------------------------------------------------------------------


class _Stages(Part):
    """Base of a block's: residual add with the norm that follows it, and the feed-forward with its residual add."""

    __slots__ = ("named_sites",)
    kind = "block"
    norms: Norms

    def __init__(self, block: Any, model: Model, sites: dict[str, Site]):
        super().__init__(block, model, tuple(sites.values()))
        self.named_sites = sites

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if (reason := why_gradient(block, args, kwargs) or self.norms.why_called(block)) is not None:
            return reason
        x = args[0] if args else kwargs["hidden_states"]
        for name in self.norms.names:
            if (shape := getattr(block, name).normalized_shape) != x.shape[-1:]:  # upstream has an error for it
                return f"the normalized_shape of {name} is {shape} and the tokens are {x.shape[-1]} wide"
        return None

    def add_and_norm(
        self, block: Any, name: str, x: Tensor, y: Tensor, modulation: tuple[Any, ...] = ABSENT
    ) -> tuple[Tensor, Tensor]:
        """(x + y, its norm, modulated by scale and shift [B, 1, C] with their rows of the table [C])."""
        norm = getattr(block, name)
        if y.shape != x.shape:  # as a processor of somebody's own may have returned it
            x, y = torch.broadcast_tensors(x, y)
        operands = x.flatten(1, 3), y.flatten(1, 3), weight_of(norm), *modulation, norm.eps
        total, normed = self.named_sites[name].call(RESIDUAL_RMS_NORM_MODULATE_WEIGHTED, *operands)
        return total.view(x.shape), normed.view(x.shape)


class NABlock(_Stages):
    """In place of the forward of `LTX2VideoVaeNABlock`."""

    __slots__ = ()
    norms = _NORMS[_Block]

    def fused(self, block: Any, hidden_states: Tensor, block_mask: Any = None) -> Tensor:
        attended = block.attn(block.norm1(hidden_states), block_mask)
        x, n = self.add_and_norm(block, "norm2", hidden_states, attended)
        del hidden_states, attended  # memory for the feed-forward
        ours = ours_in(block.mlp)
        if isinstance(ours, SwiGLU) and ours.may_add(block.mlp, x, n) and alone(x):
            return ours.add(block.mlp, x, n)
        return x + block.mlp(n)


class DiffusionNABlock(_Stages):
    """In place of the forward of `LTX2VideoVaeDiffusionNABlock`."""

    __slots__ = ()
    norms = _NORMS[_DiffusionBlock]

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if block.num_mod_params != _MODULATIONS:
            return f"num_mod_params is {block.num_mod_params}; known: {_MODULATIONS}"
        for value in args[2] if len(args) > 2 else kwargs["modulation"]:
            if value.ndim != 5 or value.shape[1:4] != (1, 1, 1):  # of every frame, say, as a hook may make it
                return f"a modulation is {list(value.shape)}; known: [B, 1, 1, 1, C], one for all tokens"
        return super().why_stock(block, args, kwargs)

    def fused(
        self,
        block: Any,
        hidden_states: Tensor,
        latent_context: Tensor,
        modulation: tuple[Tensor, ...],
        block_mask: Any = None,
    ) -> Tensor:
        table = block.scale_shift_table
        values = [(modulation[row].flatten(1, 3), table[row]) for row in range(_MODULATIONS)]
        scale, shift, _, mlp_scale, mlp_shift, _, _ = values
        context = block.context_proj(latent_context)
        x, n = self.add_and_norm(block, "norm1", hidden_states, context, ltx2.modulation(scale, shift))
        del hidden_states, context
        attended = block.attn(n, block_mask)
        x, n = self.add_and_norm(block, "norm2", x, attended, ltx2.modulation(mlp_scale, mlp_shift))
        del attended  # memory for the feed-forward
        ours = ours_in(block.mlp)
        if isinstance(ours, SwiGLU) and ours.may_add(block.mlp, x, n) and alone(x):
            return ours.add(block.mlp, x, n)
        return x + block.mlp(n)


_OURS = {_Block: NABlock, _DiffusionBlock: DiffusionNABlock}

# -- taking over -------------------------------------------------------------------------------------------------------


def blocks(decoder: Any) -> Iterator[tuple[str, type, Any]]:
    """(name, kind, block) of every block of an `LTX2VideoDiffusionDecoderModel`, in the order in which they run."""
    for stage, of_stage in enumerate(decoder.decoder.det_stages):
        for index, block in enumerate(of_stage):
            yield f"diffusion_decoder.decoder.det_stages.{stage}.{index}", _Block, block
    for index, block in enumerate(decoder.decoder.diff_blocks):
        yield f"diffusion_decoder.decoder.diff_blocks.{index}", _DiffusionBlock, block


def accelerate(decoder: Any, shared: Model, host: str) -> None:
    """Take over the projections of every attention, every feed-forward and every block, noting each site."""
    handle, tables = shared.handle, GridTables(shared.handle)
    for name, kind, block in blocks(decoder):
        reason = next(_why_block_stays(block, kind, host), None)
        sites = {
            norm: Site(f"{name}.{norm}", RESIDUAL_RMS_NORM_MODULATE_WEIGHTED.name, reason)
            for norm in _NORMS[kind].names
        }
        trial = RotaryTrial(_difference)
        attention = Site(f"{name}.attn", QK_RMS_NORM_GRID_ROTARY.name)
        attention.declined = next(_why_attention_stays(block.attn, host), None) or trial.at_first(block.attn)
        feed_forward = Site(f"{name}.mlp", SWIGLU.name)
        feed_forward.declined = next(
            why_not_stock(block.mlp, _SwiGLU, "feed-forward", host, READ, functions(upstream, _MLP)), None
        )
        handle.sites += [*sites.values(), attention, feed_forward]
        if attention.declined is None:
            handle.put(block.attn, ProjectQKV(block.attn, shared, attention, tables, trial))
            for norm in _QK_NORMS.names:
                offload.install(getattr(block.attn, norm), handle)
        if feed_forward.declined is None:
            handle.put(block.mlp, SwiGLU(block.mlp, shared, (feed_forward,)))
        if reason is None:
            handle.put(block, _OURS[kind](block, shared, sites))
            for norm in sites:
                offload.install(getattr(block, norm), handle)


def _why_block_stays(block: Any, kind: type, host: str) -> Iterator[str]:
    yield from why_not_stock(block, kind, "block", host, READ, functions(upstream, _FORWARDS[kind]))
    if (reason := _NORMS[kind].why_called(block, hooks=False)) is not None:
        yield reason


def _why_attention_stays(attn: Any, host: str) -> Iterator[str]:
    yield from why_not_stock(attn, _Attention, "attention", host, READ, functions(upstream, _PROJECTION, *_ROPE))
    if "project_qkv" in vars(attn):
        yield "somebody has replaced the attention's project_qkv, and that is left in place"
    if (reason := _QK_NORMS.why_called(attn, hooks=False)) is not None:
        yield reason
