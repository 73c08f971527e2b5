"""The steps of an LTX-2 transformer block and of its attentions, as hosts share them: calls of operators at sites.

A host's adapter restates its block's forward with a `Stream` for the video and one for the audio: the tokens, and what
is still to be added to them. What differs between hosts stays with them: the names of arguments, how attentions are
called, which samples are left out of one. Which modules are called, and in which order, is the host's (hooks, LoRA and
dropout notice it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitfuse.core.bits import compare
from bitfuse.core.conditions import around
from bitfuse.core.operator import Operator
from bitfuse.hosts.handle import Handle
from bitfuse.hosts.offload import weight_of
from bitfuse.hosts.part import Block, Model, rehearse_first
from bitfuse.hosts.site import Site
from bitfuse.hosts.sources import own_method
from bitfuse.ops.adaln import (
    GATED_RESIDUAL,
    MODULATE,
    RESIDUAL_RMS_NORM_MODULATE_COMPOSED,
    RESIDUAL_RMS_NORM_MODULATE_NATIVE,
    RESIDUAL_RMS_NORM_MODULATE_TWICE_COMPOSED,
    RESIDUAL_RMS_NORM_MODULATE_TWICE_NATIVE,
    RMS_NORM_MODULATE_COMPOSED,
    RMS_NORM_MODULATE_NATIVE,
)
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.qk_norm import QK_RMS_NORM
from bitfuse.run.swap import Forward, hooked_everywhere, modules_in, named, plain

Ada = tuple[Tensor, Tensor | None]  # an AdaLN value [B, T or 1, D] and the table row [D] that is added to it
Tables = tuple[Tensor, Tensor]  # cos and sin

ABSENT: tuple[Any, ...] = (None, None, None, None)  # no modulation
UNGATED: tuple[Any, Any] = (None, None)  # no gate


def modulation(scale: Ada, shift: Ada) -> tuple[Any, ...]:
    """scale, shift, scale_table, shift_table, as the operators take them."""
    return scale[0], shift[0], scale[1], shift[1]


# -- a block's steps ---------------------------------------------------------------------------------------------------


class NormOperators(NamedTuple):
    """The operators with a norm of a block: alone, after a residual add, and modulated twice after one."""

    norm: Operator
    residual: Operator
    twice: Operator


COMPOSED = NormOperators(
    RMS_NORM_MODULATE_COMPOSED, RESIDUAL_RMS_NORM_MODULATE_COMPOSED, RESIDUAL_RMS_NORM_MODULATE_TWICE_COMPOSED
)
"""Where the host writes its norm in PyTorch ops: diffusers' RMSNorm."""
NATIVE = NormOperators(
    RMS_NORM_MODULATE_NATIVE, RESIDUAL_RMS_NORM_MODULATE_NATIVE, RESIDUAL_RMS_NORM_MODULATE_TWICE_NATIVE
)
"""Where it calls `F.rms_norm`."""

VIDEO, AUDIO = "", "audio_"  # before the names of a stream's modules and sites
BETWEEN = {VIDEO: "audio_to_video_norm", AUDIO: "video_to_audio_norm"}


def block_operators(norms: NormOperators) -> tuple[Operator, ...]:
    """All that a block may call."""
    return *norms, MODULATE, GATED_RESIDUAL


def block_sites(norms: NormOperators, *, text: bool, streams: Sequence[str] = (VIDEO, AUDIO)) -> dict[str, Operator]:
    """The sites of a block by their names in it. `text`: whether the text is modulated (from LTX-2.3 on)."""
    found = {"norm1": norms.norm, "norm2": norms.residual}
    found |= {"text": MODULATE} if text else {}
    between = {BETWEEN[stream]: norms.twice for stream in streams} if len(streams) == 2 else {}
    after = {"norm3": norms.residual, "output": GATED_RESIDUAL}

    def of_each(sites: dict[str, Operator]) -> dict[str, Operator]:
        return {f"{stream}{site}": operator for site, operator in sites.items() for stream in streams}

    return of_each(found) | between | of_each(after)


class Stream:
    """One modality on its way through a block: its tokens, and what is still to be added to them.

    x          the tokens [B, T, D]
    ada        the block's AdaLN values of this modality, by their place in its table
    pending    (y, gate, gate_table, mask), y what an attention gave, as the residual operators take them; or None
    """

    __slots__ = ("_eps", "_ours", "_prefix", "ada", "pending", "x")

    def __init__(self, ours: AVBlock, prefix: str, x: Any, eps: float):
        self._ours, self._prefix, self._eps = ours, prefix, eps
        self.x = x
        self.ada: list[Ada] = []
        self.pending: tuple[Any, ...] | None = None

    def norm(self, site: str, scale: Ada, shift: Ada) -> Tensor:
        """The norm of the tokens, modulated; nothing is pending."""
        ours = self._ours
        site_ = ours.named_sites[self._prefix + site]
        return ours.call(site_, ours.norms.norm, self.x, *modulation(scale, shift), self._eps)

    def modulate(self, text: Tensor, scale: Ada, shift: Ada) -> Tensor:
        """The text that this modality attends to, modulated."""
        ours = self._ours
        return ours.call(ours.named_sites[f"{self._prefix}text"], MODULATE, text, *modulation(scale, shift))

    def add(self, y: Tensor, gate: tuple[Any, Any] = UNGATED, mask: Tensor | None = None) -> None:
        """Have y added to the tokens, times its gate and mask, with the norm that comes next."""
        self.pending = (y, *gate, mask)

    def add_and_norm(self, site: str, *modulations: tuple[Any, ...]) -> list[Tensor]:
        """Add to the tokens what is pending, if anything is; their norm under each of one or two modulations."""
        return self._add_and_norm(self._prefix + site, *modulations)

    def between(self, ada: Sequence[Ada], a2v: bool, v2a: bool) -> list[Tensor | None]:
        """The same for the attentions of video to audio and of audio to video; None for one that is left out."""
        wanted = [modulation(ada[i], ada[i + 1]) for i, runs in ((0, a2v), (2, v2a)) if runs]
        found = iter(self._add_and_norm(BETWEEN[self._prefix], *wanted))
        return [next(found) if runs else None for runs in (a2v, v2a)]

    def feed_forward(self, module: Any) -> None:
        """The block's last step: norm, feed-forward, and its gated residual."""
        ours, ada = self._ours, self.ada
        (n,) = self.add_and_norm("norm3", modulation(ada[4], ada[3]))
        output = ours.named_sites[f"{self._prefix}output"]
        self.x = ours.call(output, GATED_RESIDUAL, self.x, module(n), *ada[5])

    def _add_and_norm(self, site: str, *modulations: tuple[Any, ...]) -> list[Tensor]:
        ours, eps = self._ours, self._eps
        found, norms = ours.named_sites[site], ours.norms
        pending, self.pending = self.pending, None
        if pending is None:  # an attention that was left out
            return [ours.call(found, norms.norm, self.x, *m, eps) for m in modulations]
        if len(modulations) == 1:
            self.x, n = ours.call(found, norms.residual, self.x, *pending, *modulations[0], eps)
            return [n]
        first, second = modulations
        self.x, *normed = ours.call(found, norms.twice, self.x, *pending, *first, *second, eps)
        return normed


class AVBlock(Block):
    """Base of what stands in place of the forward of a block for video and audio.

    norms      its norms' operators
    host_class the host's class, `whose` it is in sentences, and the `methods` of it that are restated besides forward
    """

    __slots__ = ("_values", "_watched", "second_stream")
    norms: NormOperators
    host_class: Any
    whose: str
    methods: tuple[str, ...] = ()

    def __init__(
        self, block: Any, model: Model, sites: dict[str, Site], values: AdaLNValues, second: SecondStream | None
    ):
        super().__init__(block, model, sites)
        self._values, self.second_stream = values, second
        self._watched = None if second is None else Watched(block)

    def call(self, site: Site, operator: Operator, *args: Any) -> Any:
        return site.call(operator, *args)

    def why_watched(self, block: Any) -> str | None:
        """Who would notice that parts of the block run beside each other, in a sentence; None: nobody."""
        return None if self._watched is None else self._watched(block)

    def fork(self, block: Any, x: Tensor) -> Fork:
        """The block's two streams, or its one."""
        second = self.second_stream
        return Fork(x, None if second is None else second.of(x, lambda: self.why_watched(block)))

    def why_stock(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if (reason := why_gradient(block, args, kwargs)) is not None:
            return reason
        for name in self.methods:
            if not own_method(block, name, self.host_class):
                return f"the {name} of this {named(type(block))} is another than that of {self.whose} block"
        return None

    def values(self, table: Tensor, temb: Tensor) -> list[Ada]:
        """(value, table row) of each row of a table, not yet added: hosts add them in `get_ada_values`, say.

        table    [rows, D], on temb's device and in its dtype where the host has them so
        temb     [B, T or 1, rows * D]
        """
        return list(zip(self._values.of(temb, table.shape[0]), table.unbind(0), strict=True))


def why_gradient(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the host's own block must run where it is differentiated: a sum's gradient depends on how it was formed."""
    if not torch.is_grad_enabled():
        return None
    if any(t.requires_grad for t in (*_tensors(args), *_tensors(tuple(kwargs.values())), *block.parameters())):
        return "a gradient is required of the block's inputs or weights"
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in an argument: itself, in a tuple, in a dataclass."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(tuple(vars(value).values()))


def take_over_blocks(
    blocks: Sequence[Any],
    model: Model,
    ours: type[AVBlock],
    sites_of: Callable[[Any], dict[str, Operator]],
    why_left_alone: Callable[[Any], Iterator[str]],
    *,
    one_stream: bool = False,
    otherwise: Callable[[Any, str], None] = lambda block, name: None,
) -> None:
    """Give every block of a transformer a forward of ours, noting each site in the handle.

    otherwise    called with a block that is left alone, and its name
    """
    values, handle = AdaLNValues(), model.handle
    second = None if one_stream else SecondStream(handle.extras.second_stream.fall)
    for index, block in enumerate(blocks):
        name, reason = f"transformer_blocks.{index}", next(why_left_alone(block), None)
        sites = {site: Site(f"{name}.{site}", used.name, reason) for site, used in sites_of(block).items()}
        handle.sites += sites.values()
        if reason is None:
            handle.put(block, ours(block, model, sites, values, second))
        else:
            otherwise(block, name)
    if not one_stream:  # SGLang's, of which several ranks may run: a rehearsal was not tried there
        rehearse_first(blocks, handle)


class AdaLNValues:
    """The AdaLN values of the step under way, as views; one object serves all blocks of a model.

    All blocks of a step are handed the same `temb`, so its views are made once. They live as long as it does.
    """

    def __init__(self) -> None:
        self._views: dict[int, tuple[weakref.ref, tuple[Tensor, ...]]] = {}

    def of(self, temb: Tensor, count: int) -> tuple[Tensor, ...]:
        key = id(temb)
        found = self._views.get(key)
        if (
            found is None
            or found[0]() is not temb
            or len(found[1]) != count
            or found[1][0].data_ptr() != temb.data_ptr()  # `temb.data` was given other memory
        ):
            views = temb.unflatten(-1, (count, -1)).unbind(dim=2)  # never a copy, so on no stream
            self._views[key] = found = (weakref.ref(temb, lambda _: self._views.pop(key, None)), views)
        return found[1]


# -- a second CUDA stream ----------------------------------------------------------------------------------------------


class Watched:
    """Who would notice in which order the modules of a block run: a hook, or a forward that is not the class's or ours.

    Asked once per call of the block: of its modules as they are by then (a LoRA brings its own), and of all modules (as
    while `bitfuse.trace` listens). It holds the modules below the block and not the block, whose forward holds it: in a
    cycle, a model's weights would only be freed by Python's collector.
    """

    def __init__(self, block: Any):
        self._seen = _modules_of(block)

    def __call__(self, block: Any) -> str | None:
        if hooked_everywhere():
            return "a hook is registered for all modules"
        if torch.nn.Module.__call__ is not torch.nn.Module._wrapped_call_impl:
            return "torch.nn.Module.__call__ was replaced"
        names, below, attributes, seen = self._seen
        every = [block.__dict__, *attributes]
        children = [child for d in every for child in d["_modules"].values()]
        if len(children) != len(seen) or not all(map(operator.is_, children, seen)):
            self._seen = names, below, attributes, _ = _modules_of(block)
            every = [block.__dict__, *attributes]
        modules = [block, *below]
        for module, d in zip(modules, every, strict=True):
            if d["_forward_hooks"] or d["_forward_pre_hooks"]:
                return f"a hook is attached to {names[modules.index(module)]}"
            if "forward" in d and not isinstance(d["forward"], Forward) and not plain(module):
                name = names[modules.index(module)]
                return f"the forward of {name} was replaced, or a hook runs it (offload, casting)"
        return None


def _modules_of(block: Any) -> tuple[list[str], list[Any], list[dict[str, Any]], list[Any]]:
    """The names of a block and its modules, those below it, the dictionary of each, and the children of all of them."""
    found = dict(block.named_modules())
    children = [child for module in found.values() for child in module._modules.values()]
    below = list(found.values())[1:]
    return [name or "the block" for name in found], below, [module.__dict__ for module in below], children


class SecondStream:
    """A second CUDA stream for the audio half of each block: its kernels are too small to fill a GPU by themselves.

    Streams change when a kernel runs, not which kernel, so no bit. The second stream forks off at the start of a
    block, meets the first where video and audio look at each other, and joins it at the end. Whatever it allocates
    is freed to itself, and it allocates nothing before it has waited for the first stream: so no memory is used
    again while the other stream still reads it, without `record_stream`.

    Not where somebody is called along the way (hooks see streams as they please), and not for few tokens unless a CUDA
    graph is captured: there the CPU sets the pace, and switching streams takes its time.

    fall    told why it is not used where it would pay (`run.extra.Extra.fall`)
    """

    MIN_ROWS = 4096

    def __init__(self, fall: Callable[[str], None]) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._fall = fall

    def of(self, x: Tensor, why_watched: Callable[[], str | None]) -> torch.cuda.Stream | None:
        """The second stream, where it pays and is safe, else None."""
        if not x.is_cuda:
            return None
        if x.shape[0] * x.shape[1] < self.MIN_ROWS and not torch.cuda.is_current_stream_capturing():
            return None
        reason = "gradients are enabled; torch.no_grad() allows it" if torch.is_grad_enabled() else why_watched()
        if reason is not None:
            self._fall(reason)
            return None
        if x.device not in self._streams:
            self._streams[x.device] = torch.cuda.Stream(x.device)
        return self._streams[x.device]


class Fork:
    """The streams of one call of a block. `with fork.second:` puts work on the second one, where there is one."""

    __slots__ = ("_first", "_second", "second")

    def __init__(self, x: Tensor, second: torch.cuda.Stream | None):
        self._first, self._second = None if second is None else torch.cuda.current_stream(x.device), second
        self.second: Any = contextlib.nullcontext() if second is None else torch.cuda.stream(second)
        if self._first is not None and second is not None:
            second.wait_stream(self._first)

    def meet(self) -> None:
        """Each stream waits for what the other was given so far."""
        if self._first is not None and self._second is not None:
            met = self._second.record_event()
            self._second.wait_stream(self._first)
            self._first.wait_event(met)

    def join(self) -> None:
        """The first stream waits for the second."""
        if self._first is not None and self._second is not None:
            self._first.wait_stream(self._second)


# -- an attention's steps ----------------------------------------------------------------------------------------------

ATTENTIONS = {  # of a block, and whether their queries and keys are rotated: those to the text are normed only
    "attn1": True,
    "audio_attn1": True,
    "attn2": False,
    "audio_attn2": False,
    "audio_to_video_attn": True,
    "video_to_audio_attn": True,
}


class Rotary(NamedTuple):
    """A rotary function of a host, and the operators that equal it.

    home, name     the module in which it is, and its name there
    alone          the operator for one x [B, T, H * D]
    qk             the operator for queries and keys, with their norms before it
    apply          (function, x, cos, sin) to x rotated by the host's function
    interleaved    whether pairs stand next to each other: tables are [B, T, H * D] then, else [B, H, T, D / 2]
    table_dtype    None: x's
    """

    home: Any
    name: str
    alone: Operator
    qk: Operator
    apply: Callable[[Callable[..., Any], Tensor, Tensor, Tensor], Tensor]
    interleaved: bool = False
    table_dtype: torch.dtype | None = None

    def difference(self, host: str, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why operators can't stand in for the host's function: it is not their reference, tried in this process."""
        sizes, tables = (heads, head_dim), self.table_dtype or dtype
        function, how = getattr(self.home, self.name), (self.apply, self.alone, self.interleaved)
        found = rotary_difference(function, *how, *sizes, dtype, tables, device)
        return None if found is None else f"{self.name} of {host} and bitfuse's reference part here: {found}"


def attention_operators(rotary: Iterable[Rotary], *more: Operator) -> tuple[Operator, ...]:
    """All that an attention may call; `more` are the host's own, for a perturbation mask say."""
    return *(used for one in rotary for used in (one.alone, one.qk)), QK_RMS_NORM, HEAD_GATE, *more


def attentions(transformer: Any) -> Iterator[tuple[str, bool, Any, Any]]:
    """(name in the model, whether it rotates, block, attention) of every attention of a transformer."""
    for index, block in enumerate(transformer.transformer_blocks):
        for name, rotates in ATTENTIONS.items():
            if (attn := getattr(block, name, None)) is not None:
                yield f"transformer_blocks.{index}.{name}", rotates, block, attn


def attention_sites(handle: Handle, name: str, rotary: Rotary | None, *, gated: bool) -> tuple[Site, Site]:
    """New sites of an attention in the handle: Q/K norms, with the rotary embedding if it has one, and head gate."""
    site = Site(name, (QK_RMS_NORM if rotary is None else rotary.qk).name)
    gate_site = Site(f"{name}.gate", HEAD_GATE.name)
    handle.sites += [site, gate_site] if gated else [site]
    return site, gate_site


def norm_and_rotate(
    call: Callable[..., Any],
    rotate: Operator,
    q: Tensor,
    k: Tensor,
    q_norm: Any,
    k_norm: Any,
    tables: Tables | None,
    k_tables: Tables | None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, T, H * D], normed, and rotated where there are tables; `k_tables` None: by the same ones.

    call      of a site
    rotate    the operator for this layout of the tables
    """
    norms = weight_of(q_norm), weight_of(k_norm)
    if tables is None:
        return call(QK_RMS_NORM, q, k, *norms, q_norm.eps)
    own = UNGATED if k_tables is None else k_tables
    return call(rotate, q, k, *norms, *tables, *own, q_norm.eps)


def dispatch_mode_is_on() -> bool:
    """Whether a mode sees every PyTorch op (FakeTensorMode, say), under which a host's function can't be tried."""
    return torch._C._len_torch_dispatch_stack() > 0


class RotaryTrial:
    """The host's rotary function, tried against its operator's reference in this process: once, when it can be.

    difference    of an attention, as `Rotary.difference` gives it
    """

    __slots__ = ("_difference", "_due")

    def __init__(self, difference: Callable[[Any], str | None]):
        self._difference, self._due = difference, True

    def at_first(self, attn: Any) -> str | None:
        """When the attention is taken over: why it is left alone, if so. Put off where a mode sees every op."""
        self._due = dispatch_mode_is_on()
        return None if self._due else self._difference(attn)

    def why_stock(self, attn: Any) -> str | None:
        """When it is called: why the host's own must run, if so."""
        if not self._due:
            return None
        if dispatch_mode_is_on():
            return next(around(), None)
        reason = self._difference(attn)
        self._due = reason is not None
        return reason


@functools.cache
def rotary_difference(
    function: Callable[..., Any],
    apply: Callable[[Callable[..., Any], Tensor, Tensor, Tensor], Tensor],
    rotate: Operator,
    interleaved: bool,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Where the host's own rotary function and the operator's reference part, in this process; None: nowhere.

    function    the host's
    apply       (function, x, cos, sin) to x rotated by it, on the inputs of the operator's battery
    """
    x = torch.empty(2, 5, heads * head_dim, dtype=dtype, device=device)
    table = torch.empty(x.shape if interleaved else (2, 5, heads, head_dim // 2), dtype=table_dtype, device=device)
    table = table if interleaved else table.swapaxes(1, 2)
    with torch.no_grad():
        for family, args in rotate.battery(x, table, table):
            if mismatch := compare(apply(function, *args), rotate.reference(*args)):
                return f"{mismatch.sentence}, on the battery's '{family}' inputs"
    return None


def weights_of(module: torch.nn.Module) -> tuple[torch.dtype, torch.device]:
    """dtype and device on which a module will compute, by its weights (those that are quantised tell nothing)."""
    weights = [p for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16, torch.float32)]
    dtype = weights[0].dtype if weights else torch.bfloat16
    return dtype, next((p.device for p in weights if p.is_cuda), torch.device("cpu"))


# -- a model -----------------------------------------------------------------------------------------------------------


def models_in(parts: Iterable[Any], kind: type) -> list[Any]:
    """The models of this class among these parts, or inside them: in torch.compile's module, PeftModel, DDP or another
    wrapper, which may be a module or hold one as an attribute. Each once."""
    found = (model for module in modules_in(parts) for model in module.modules() if isinstance(model, kind))
    return list({id(model): model for model in found}.values())
