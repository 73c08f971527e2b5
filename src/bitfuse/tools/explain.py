"""What would be fused where, in a given LTX-2 model, without its weights and without a GPU: `bitfuse explain`.

The transformer is built from its config on PyTorch's meta device, where tensors have a shape and no memory. The host's
adapter takes it over as it would take over the real one, and one forward is run for its shapes alone: each operator
that is called is then asked for every reason against those arguments. What that can't tell is whether a kernel is
proved equal: that is found out on the GPU, at the kernel's first use. Of a pipeline's folder or Hub id the text
connectors and the decoders are looked at likewise (`tools/parts.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bitfuse import hosts
from bitfuse.core.conditions import runnable
from bitfuse.core.lines import error_line, visible
from bitfuse.core.operator import OPERATORS, Tier
from bitfuse.ops.convolution import CONVOLUTION
from bitfuse.tools import names, seeded
from bitfuse.tools.machine import machine
from bitfuse.tools.names import MAX_LAYERS, MAX_TOKENS
from bitfuse.tools.parts import Part, built, read
from bitfuse.tools.text import cell, say

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in names.DTYPES}

FUSED, CHAIN, LEFT_ALONE, NOT_CALLED = "to be fused", "PyTorch chain", "left alone", "not called"
UNSEEN = "not looked at"

_CLASS = "LTX2VideoTransformer3DModel"
_SIZES = (
    "num_layers",
    *(
        f"{side}{name}"
        for side in ("", "audio_")
        for name in ("in_channels", "num_attention_heads", "attention_head_dim", "cross_attention_dim")
    ),
)
_MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class SiteKind:
    """Sites that differ in their block's number only: what is called there, and which way it would go.

    name         the sites' name, the block's number as *
    operator     the operator's name, and `source` whose chain it is
    state        "to be fused", "PyTorch chain", "left alone" (not taken over), "not called" (in this forward), "not
                 looked at" (a function, called with tensors without values, which it gives back to the host)
    arguments    of the call, by name: shape, dtype, and strides where they are not a dense tensor's
    tier         the way to fuse it that is tried first, None where it would not be fused
    then         the ways that are tried after it, where it is not proved equal
    passed_over  why the tiers before it can't take these arguments
    reasons      every reason why it would not be fused
    count        how many sites are alike
    """

    name: str
    operator: str
    source: str
    state: str
    arguments: dict[str, str] = field(default_factory=dict)
    tier: str | None = None
    then: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    count: int = 1


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `here` says why nothing would be fused on this very machine, where that is so.

    not_used    besides sites, what is known not to be used before a forward, in sentences (`Report.not_used`)
    """

    model: str
    host: str
    geometry: str
    kinds: list[SiteKind]
    here: list[str]
    not_used: list[str] = field(default_factory=list)

    @property
    def seen(self) -> int:
        return sum(kind.count for kind in self.kinds)

    @property
    def fused(self) -> int:
        return sum(kind.count for kind in self.kinds if kind.state == FUSED)

    def as_dict(self) -> dict[str, Any]:
        found = {"machine": machine(), "sites_seen": self.seen, "sites_to_be_fused": self.fused}
        return {**asdict(self), **found}


# -- the model, on meta ----------------------------------------------------------------------------------------------


def from_config(model: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The transformer of a pipeline or of itself, on the meta device: only its config is read.

    model    a folder written by `save_pretrained` (of a pipeline or of its transformer), or an id on the Hub
    Raises ValueError for anything else, and where the config is not that of an LTX-2 transformer.
    """
    cls = _transformer_class()
    config = _read_folder(Path(model)) if os.path.exists(model) else _read_hub(cls, model)
    if (kind := config.get("_class_name")) != _CLASS:
        raise ValueError(f"MODEL {model}: its config is of a {str(kind)[:80]}; accepted: {_CLASS}")
    for size in _SIZES:
        given = config.get(size, 1)  # left out, it has upstream's default
        most = MAX_LAYERS if size == "num_layers" else _MAX_SIZE
        if type(given) is not int or not 1 <= given <= most:
            raise ValueError(f"MODEL {model}: {size} in its config is {given!r:.40}; accepted: 1 to {most}")
    return built(cls, config, dtype, f"MODEL {model}")


def from_version(version: str, layers: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """diffusers' transformer of LTX-2.0, 2.3 or 2.5 (also written ltx-2.0), on the meta device; else ValueError."""
    return from_geometry(of_version(version, layers), dtype)


def of_version(version: str, layers: int, host: str = "diffusers") -> seeded.Geometry:
    """The real sizes of LTX-2.0, 2.3 or 2.5 (also written ltx-2.0), with so many layers. ValueError for any other."""
    named = names.version(version)
    if named is None:
        accepted = ", ".join(f"ltx-{name}" for name in names.VERSIONS)
        raise ValueError(f"--random-weights {version} is not a version; accepted: {accepted}")
    if not 1 <= layers <= MAX_LAYERS:
        raise ValueError(f"--layers is {layers}; accepted: 1 to {MAX_LAYERS}")
    return replace(seeded.REAL, version=named, layers=layers, host=host)


def from_geometry(geometry: seeded.Geometry, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The transformer of these sizes, of its host, on the meta device. ValueError where the host has none."""
    if geometry.host != "diffusers" and dtype != torch.bfloat16:
        raise ValueError(f"--dtype {dtype} goes with --host diffusers; accepted for {geometry.host}: bfloat16")
    if geometry.host == "diffusers":
        _transformer_class()
    try:
        seeded.of_host(geometry.host).need(torch.device("meta"))
        built = seeded._on_meta(geometry)
    except seeded.CannotRun as why:
        raise ValueError(str(why)) from None
    built = torch.nn.Module.to(built, dtype).eval().requires_grad_(False)
    if geometry.host == "sglang":  # it switches autocast off around its norms, and the meta device has none
        with FakeTensorMode(allow_non_fake_inputs=True):
            built = built.to_empty(device="cpu")
    return built


def _transformer_class() -> Any:
    try:
        from diffusers import LTX2VideoTransformer3DModel
    except ImportError as error:  # of diffusers itself, or of the class in an old one
        raise ValueError(f"diffusers 0.37 or newer is needed ({error}): pip install 'bitfuse[diffusers]'") from None
    return LTX2VideoTransformer3DModel


def _read_folder(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError(
            f"MODEL {path} is a file; accepted: a folder with model_index.json or config.json, or a Hub id"
        )
    for folder in (path / "transformer", path):
        if (file := folder / "config.json").is_file():
            return read(file)
    raise ValueError(f"MODEL {path} holds no config; accepted: a folder with transformer/config.json or config.json")


def _read_hub(cls: Any, model: str) -> dict[str, Any]:
    if not names.is_hub_id(model):
        raise ValueError(
            f"MODEL {model} is no folder here; accepted: a pipeline's or transformer's folder, or a Hub id"
        )
    failures = []
    for subfolder in ("transformer", None):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return dict(cls.load_config(model, subfolder=subfolder))
        except Exception as error:  # no such id, no network, no right: the hub's client has many ways to say so
            failures.append(error_line(error))
    raise ValueError(f"MODEL {model} is no folder here, and its config can't be had from the Hub: {failures[0]}")


# -- what would happen -----------------------------------------------------------------------------------------------


def explain(
    model: Any,
    tokens: int = 6144,
    image_to_video: bool = False,
    name: str = "the model",
    geometry: seeded.Geometry | None = None,
    parts: Sequence[Part] = (),
) -> Explanation:
    """Which sites of a transformer on the meta device would be fused, and every reason why others would not.

    model             from `from_config`, `from_version` or `from_geometry`; left as it was
    geometry          what the model was made from; by default diffusers' config of the model says it
    tokens            video tokens of the forward that is looked at, 1 to 262144; audio and text as for 5 seconds
    image_to_video    the first frame is given: timesteps are per token
    parts             what else is looked at: the text connectors and decoders of the same pipeline (`tools/parts.py`)
    Raises ValueError for `tokens` out of range, and where the host itself can't run such a forward.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {model!r:.80}; accepted: a transformer, as from_config or from_version builds it")
    if type(tokens) is not int:
        raise TypeError(f"tokens is {tokens!r:.80}; accepted: a whole number, 1 to {MAX_TOKENS}")
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"--tokens is {tokens}; accepted: 1 to {MAX_TOKENS}")
    weight = next(model.parameters())
    without_values = getattr(weight, "fake_mode", contextlib.nullcontext())  # the meta device needs no mode
    geometry = geometry or _geometry(model.config)
    # one token a frame: the coordinates' values don't matter
    geometry = replace(geometry, frames=tokens, height=1, width=1, image_to_video=image_to_video)
    called = _InItsDtype(model) if geometry.host == "diffusers" else model

    def forward() -> None:
        with without_values:
            seeded.one_step(called, seeded.make_inputs(model, geometry, weight.device, seed=0))()

    sentence = f"{tokens} video, {geometry.audio_frames} audio and {geometry.text_tokens} text tokens, {weight.dtype}"
    looked_at = [_looked_at(model, forward, f"{name}: a forward of {tokens} tokens", without_values)]
    for part in parts:
        looked_at.append(_looked_at(part.model, part.forward, f"{name}: {part.sentence}", contextlib.nullcontext()))
        sentence += f"; {part.sentence}"
    kinds = [kind for found in looked_at for kind in found.kinds]
    not_used = [lost for found in looked_at for lost in found.not_used]
    here = "cuda" if torch.cuda.is_available() else "cpu"
    reasons = list(runnable({"x": torch.empty(1, device=here)}))
    return Explanation(name, looked_at[0].host, sentence, kinds, reasons, not_used)


@dataclass(frozen=True)
class _LookedAt:
    host: str
    kinds: list[SiteKind]
    not_used: list[str]


def _looked_at(model: Any, forward: Callable[[], object], doing: str, without_values: Any) -> _LookedAt:
    """What would be fused in this model, which is taken over for one forward and then left as it was.

    doing    the forward in words, for the error where the host itself can't run it
    """
    calls: dict[str, list[tuple[Any, tuple[Any, ...], str | None]]] = {}
    handle = hosts.accelerate(model)
    not_used = [f"{extra.name}: {reason}" for extra in handle.report().not_used for reason in extra.reasons]
    try:
        for site in handle.sites:
            calls[site.name] = []
            site.observers = (lambda s, op, route, args, _: calls[s.name].append((op, args, route.reason)),)
        with without_values:
            no_values = set(runnable({"x": torch.empty(1, device=next(model.parameters()).device)}))
        try:
            with torch.no_grad():
                forward()
        except Exception as error:
            raise ValueError(
                f"{doing} fails in {handle.host} ({error_line(error)}); accepted: a model that runs"
            ) from error
    finally:
        handle.restore()
    kinds: dict[Any, SiteKind] = {}
    for site in handle.sites:
        routed = {reason for _, _, reason in calls[site.name]}
        own = [reason for reason in site.fallen if reason not in routed]  # the adapter's, who then called no operator
        of_site: dict[Any, SiteKind] = {}  # of several calls that go the same way, in tiles say, the first
        for kind in _kinds(site, calls[site.name], own, no_values):
            of_site.setdefault(tuple(getattr(kind, f) for f in ("name", "operator", "state", "tier", "reasons")), kind)
        for way, kind in of_site.items():
            key = (*way, str(kind.arguments))
            kinds[key] = replace(kind, count=kinds[key].count + 1) if key in kinds else kind
    return _LookedAt(handle.host, list(kinds.values()), not_used)


class _InItsDtype:
    """The model, called with bf16 arguments, which are what the demo's are, in its own dtype."""

    def __init__(self, model: Any):
        self.model, self.forward = model, model.forward

    def __call__(self, **given: Any) -> Any:
        for name, value in given.items():
            if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                given[name] = value.to(self.model.dtype)
        return self.model(**given)


def _geometry(config: Any) -> seeded.Geometry:
    """The sizes of a model of diffusers and of a forward of it, audio and text as in the demo."""
    version = "2.0" if config.get("use_prompt_embeddings", True) else "2.3"
    if config.get("use_keyframes_abs_pos_embedding", False):
        version = "2.5"
    return replace(
        seeded.REAL,
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        audio_heads=config["audio_num_attention_heads"],
        audio_head_dim=config["audio_attention_head_dim"],
        channels=config["in_channels"],
        audio_channels=config["audio_in_channels"],
        caption_channels=config["caption_channels"],
        version=version,
    )


def _kinds(
    site: Any, calls: list[tuple[Any, tuple[Any, ...], str | None]], own: list[str], no_values: set[str]
) -> Iterator[SiteKind]:
    name = ".".join("*" if part.isdigit() else part for part in site.name.split("."))
    planned = CONVOLUTION if site.operator == CONVOLUTION.name else OPERATORS[site.operator]
    bare = SiteKind(name, planned.name, planned.source, LEFT_ALONE)
    if site.declined is not None:
        yield replace(bare, reasons=(site.declined,))
    elif own and no_values.issuperset(own):
        yield replace(bare, state=UNSEEN)
    elif own:
        yield replace(bare, state=CHAIN, reasons=tuple(own))
    elif not calls:
        yield replace(bare, state=NOT_CALLED)
    for operator, args, _ in calls:
        yield _decision(replace(bare, operator=operator.name, source=operator.source), operator, args)


def _decision(bare: SiteKind, operator: Any, args: tuple[Any, ...]) -> SiteKind:
    """Every reason of an `Operator` or of the convolution against these arguments, but for those that speak of tensors
    without values."""
    args = tuple(a if not isinstance(a, Tensor) or a.is_meta else _on_meta(a) for a in args)
    given = dict(zip(inspect.signature(operator.reference).parameters, args, strict=False))
    arguments = {name: _form(t) for name, t in given.items() if isinstance(t, Tensor)}
    with torch.no_grad():
        of_device = set(runnable(given))
        reasons = [reason for reason in operator.why_not(*args) if reason not in of_device]
        sentences = _sentences(operator, args) if not reasons else {}
    open_tiers = [tier for tier, sentence in sentences.items() if sentence is None]
    passed_over = tuple(f"{tier}: {sentence}" for tier, sentence in sentences.items() if sentence is not None)
    if not open_tiers:
        return replace(bare, state=CHAIN, arguments=arguments, reasons=(*reasons, *passed_over))
    tier, *then = open_tiers
    return replace(bare, state=FUSED, arguments=arguments, tier=tier, then=tuple(then), passed_over=passed_over)


def _sentences(operator: Any, args: tuple[Any, ...]) -> dict[str, str | None]:
    """By the ways to fuse it: why not this way, None where nothing is known against it."""
    if operator is CONVOLUTION:  # it has no plan: whether its layout alters a bit is seen on the GPU alone
        return {CONVOLUTION.tier: None}
    return {tier.name: _plan_sentence(tier, args) for tier in operator.tiers}


def _plan_sentence(tier: Tier, args: tuple[Any, ...]) -> str | None:
    """Why the tier can't take these arguments, None where nothing is known against it."""
    try:
        plan = tier.plan(*args)
    except NotImplementedError:  # it asks the device how an op rounds there, and meta computes nothing
        return None
    return plan if isinstance(plan, str) else None


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _form(t: Tensor) -> str:
    strides = "" if t.is_contiguous() else f", strides {list(t.stride())}"
    if strides and t.ndim == 5 and t.is_contiguous(memory_format=torch.channels_last_3d):
        strides = ", channels_last_3d"
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}{strides}"


# -- what is printed -------------------------------------------------------------------------------------------------

_BLOCKS = "transformer_blocks."
_COLOURS = {FUSED: "green", CHAIN: "yellow", LEFT_ALONE: "yellow", NOT_CALLED: "dim", UNSEEN: "dim"}


def show(console: Console, found: Explanation) -> None:
    """Print an explanation as a table, one row for sites that differ in their block's number only."""
    of_blocks = all(kind.name.startswith(_BLOCKS) for kind in found.kinds)
    table = Table(
        Column(f"sites of {_BLOCKS}*" if of_blocks else f"sites; the first ones of {_BLOCKS}*", overflow="fold"),
        Column("operator, first argument", overflow="fold"),
        "what would happen, and why",
        title=cell(found.model),
    )
    for kind in found.kinds:
        first = next(iter(kind.arguments.items()), None)
        operator = kind.operator if first is None else f"{kind.operator}\n{first[0]} {first[1]}"
        name = f"{kind.count} x {kind.name.removeprefix(f'{_BLOCKS}*.')}"
        table.add_row(cell(name), Text(visible(operator, "\n")), cell(_verdict(kind), _COLOURS[kind.state]))
    console.print(table)
    sources = {kind.operator: kind.source for kind in found.kinds}
    for operator, source in sources.items():
        say(console, f"{operator}: bit for bit the chain of {source}")
    sentence = (
        f"{found.fused} of {found.seen} sites of {found.host} would be fused ({found.geometry}). Nothing was loaded or "
        "computed: each kernel is still to be proved equal on the GPU, at its first use, and where it is not, the next "
        "way is tried and the PyTorch chain is the last. `handle.report()` then says which way each call went."
    )
    console.print(cell(sentence))
    for lost in found.not_used:
        console.print(cell(f"Not used, {lost}", "yellow"))
    for reason in found.here:
        console.print(cell(f"On this machine, here and now, nothing is fused: {reason}", "yellow"))


def _verdict(kind: SiteKind) -> str:
    if kind.tier is None:
        if kind.state == UNSEEN:
            return f"{kind.state}: the function gets its arguments only when there is something to compute"
        return f"{kind.state}: {'; '.join(kind.reasons)}" if kind.reasons else f"{kind.state} in such a forward"
    then = f", else by {', '.join(kind.then)}" if kind.then else ""
    passed = f" (not by {'; '.join(kind.passed_over)})" if kind.passed_over else ""
    return f"{kind.state} by {kind.tier}{then}{passed}"
