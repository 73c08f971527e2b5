# SPDX-License-Identifier: GPL-3.0-or-later
"""In place of the forward of ComfyUI's attention: norms of queries and keys with their rotary embedding, and head gate.

Which chain the rotary embedding is depends on ComfyUI's version, and from 0.30 on on comfy-kitchen: on its version, and
on the backend that it picks for a device. So in the process the host's own functions are called on inputs that tell
chains apart, and compared with each operator's reference (`Forms`); and once more at the first call of each shape, by
which a compiled function may choose its way. Where none has their bits, the norms alone are fused and ComfyUI's own
function turns what they give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitfuse.core.bits import compare
from bitfuse.core.operator import Operator
from bitfuse.hosts import ltx2
from bitfuse.hosts.ltx2 import UNGATED, Rotary
from bitfuse.hosts.part import Model, Part
from bitfuse.hosts.site import Site
from bitfuse.ops.head_gate import HEAD_GATE
from bitfuse.ops.qk_norm import QK_RMS_NORM
from bitfuse.run.swap import hooked

from . import upstream
from .forms import FORMS
from .step import Step, plain

_RMSNorm: Any = upstream.ops.disable_weight_init.RMSNorm


class Forms:
    """The operators that have the bits of the host's rotary embedding, as far as it was asked for them."""

    def __init__(self) -> None:
        self._found: dict[Any, tuple[Rotary | None, str | None]] = {}
        self._at: dict[Any, str | None] = {}

    def of(self, attn: Any, split: bool, dtype: torch.dtype, device: torch.device) -> tuple[Rotary | None, str | None]:
        """(the form, None), or (None, why there is none)."""
        if device.type == "meta":  # nothing is computed there, by `bitfuse explain` say
            device = torch.device("cpu")
        key = split, attn.heads, attn.dim_head, dtype, device, _backends()
        if key not in self._found:
            if ltx2.dispatch_mode_is_on() or getattr(upstream.model_management, "in_training", False):
                return None, "the rotary embedding was not compared yet, and can't be under a mode or in training"
            self._found[key] = self._compare(attn, split, dtype, device)
        return self._found[key]

    def _compare(
        self, attn: Any, split: bool, dtype: torch.dtype, device: torch.device
    ) -> tuple[Rotary | None, str | None]:
        reasons = []
        for candidates in FORMS[split]:
            found = (one.difference(upstream.NAME, attn.heads, attn.dim_head, dtype, device) for one in candidates)
            reason = next((reason for reason in found if reason is not None), None)
            if reason is None:
                return candidates[0], None
            reasons.append(reason)
        if not reasons:
            return None, "no operator has this layout of the rotary embedding"
        more = f" (nor is any other of {len(reasons)} forms equal)" if len(reasons) > 1 else ""
        return None, f"{reasons[0]}{more}"

    def why_not_at(self, form: Rotary, q: Tensor, k: Tensor, pes: Any, tables: list[Any]) -> str | None:
        """Why this form can't stand in for the host's function for tensors of these shapes, as far as is known.

        pes       the tables of queries, and those of keys or None, as the host has them
        tables    cos and sin of queries, and of keys
        """
        forms = [(t.shape, t.stride()) for t in (q, k, *tables)]
        key = form.qk.name, q.dtype, q.device, pes[1] is None, *forms, _backends()
        if key not in self._at:
            if q.is_meta or not q.numel():
                return None
            if q.is_cuda and torch.cuda.is_current_stream_capturing():
                return "its bits are not compared for this shape yet, and can't be while a CUDA graph is captured"
            self._at[key] = _difference_at(form, q, k, pes, tables)
        return self._at[key]


def _difference_at(form: Rotary, q: Tensor, k: Tensor, pes: Any, tables: list[Any]) -> str | None:
    try:
        with torch.no_grad():
            found = turned_by_host(q, k, *pes)
            expected = form.alone.reference(q, *tables[:2]), form.alone.reference(k, *tables[2:])
            mismatch = compare(found, expected)
    except torch.OutOfMemoryError:
        return "there was no memory left to compare its bits for this shape"
    return (
        None
        if mismatch is None
        else f"for q {list(q.shape)} and k {list(k.shape)} it says otherwise: {mismatch.sentence}"
    )


def turned_by_host(q: Tensor, k: Tensor, pe: Any, k_pe: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys, as `CrossAttention.forward` turns them."""
    if upstream.BY_KITCHEN and k_pe is None and q.shape == k.shape:
        return upstream.model.apply_rotary_emb_qk(q, k, pe)
    turn = upstream.model.apply_rotary_emb
    return turn(q, pe), turn(k, pe if k_pe is None else k_pe)


def _backends() -> Any:
    """What comfy-kitchen chooses a backend by, besides the call: by hand, and by an override."""
    registry = getattr(upstream.kitchen, "registry", None) if upstream.BY_KITCHEN else None
    if registry is None:
        return None
    override = getattr(getattr(registry, "_thread_local", None), "backend_override", None)
    return override, *getattr(registry, "_disabled", ()), *getattr(registry, "_priority", ())


def rotary_operators() -> list[Rotary]:
    return [one for forms in FORMS.values() for candidates in forms for one in candidates]


class CrossAttention(Part):
    """In place of `CrossAttention.forward`."""

    __slots__ = ("_forms", "_step")
    kind = "attention"

    def __init__(self, attn: Any, model: Model, sites: tuple[Site, ...], forms: Forms):
        super().__init__(attn, model, sites)
        self._forms = forms
        self._step: Step = model.step  # type: ignore[attr-defined]

    def why_stock(self, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if torch.is_grad_enabled() and (reason := ltx2.why_gradient(attn, args, kwargs)) is not None:
            return reason
        return _why_norm_is_called(attn.q_norm, "q_norm") or _why_norm_is_called(attn.k_norm, "k_norm")

    def fused(
        self,
        attn: Any,
        x: Tensor,
        context: Tensor | None = None,
        mask: Any = None,
        pe: Any = None,
        k_pe: Any = None,
        transformer_options: Any = {},  # noqa: B006 - upstream's own default
    ) -> Tensor:
        q = attn.to_q(x)
        context = x if context is None else context
        k, v = attn.to_k(context), attn.to_v(context)
        q, k = self._normed(attn, q, k, pe, k_pe)

        attend: Callable[..., Tensor] = upstream.attention.optimized_attention
        given = {"attn_precision": attn.attn_precision, "transformer_options": transformer_options}
        if mask is None:
            out = attend(q, k, v, attn.heads, **given)
        elif isinstance(mask, upstream.model.GuideAttentionMask):
            out = upstream.model._attention_with_guide_mask(q, k, v, attn.heads, mask, **given)
        else:
            out = attend(q, k, v, attn.heads, mask=mask, **given)
        if attn.to_gate_logits is not None:
            out = self.sites[1].call(HEAD_GATE, out, attn.to_gate_logits(x))
        return attn.to_out(out)

    def _normed(self, attn: Any, q: Tensor, k: Tensor, pe: Any, k_pe: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed and turned."""
        site, weights, eps = self.sites[0], (_weight(attn.q_norm, q), _weight(attn.k_norm, k)), attn.q_norm.eps
        if pe is None:
            return site.call(QK_RMS_NORM, q, k, *weights, eps)
        operator, tables, reason = self._form(attn, q, k, pe, k_pe)
        if operator is not None:
            site.operator = operator.name
            return site.call(operator, q, k, *weights, *tables, eps)
        site.fall(f"the rotary embedding stays ComfyUI's, after the norms: {reason}")
        return turned_by_host(*site.call(QK_RMS_NORM, q, k, *weights, eps), pe, k_pe)

    def _form(self, attn: Any, q: Tensor, k: Tensor, pe: Any, k_pe: Any) -> tuple[Operator | None, Any, str | None]:
        """(operator, its tables, None), or (None, None, why there is none); looked for once per forward and shape."""
        forward = self._step.forward
        if forward is None:
            return self._look_for_form(attn, q, k, pe, k_pe)
        key = id(pe), id(k_pe), q.shape, k.shape, q.dtype, q.device, attn.heads, _backends()
        kept = forward.forms.get(key)
        if kept is None or kept[0] is not pe or kept[1] is not k_pe:
            forward.forms[key] = kept = pe, k_pe, self._look_for_form(attn, q, k, pe, k_pe)
        return kept[2]

    def _look_for_form(
        self, attn: Any, q: Tensor, k: Tensor, pe: Any, k_pe: Any
    ) -> tuple[Operator | None, Any, str | None]:
        split = pe[1] if upstream.BY_KITCHEN else len(pe) > 2 and pe[2]
        form, reason = self._forms.of(attn, split, q.dtype, q.device)
        if form is None:
            return None, None, reason
        tables, of_keys = self._step.tables(pe), None if k_pe is None else self._step.tables(k_pe)
        if tables is None or (of_keys is None and k_pe is not None):
            return None, None, "the rotary tables are not those that the model has made for this forward"
        reason = self._forms.why_not_at(form, q, k, (pe, k_pe), [*tables, *(of_keys or tables)])
        if reason is not None:
            return None, None, reason
        return form.qk, (*tables, *(of_keys or UNGATED)), None


def _why_norm_is_called(norm: Any, name: str) -> str | None:
    """Why a norm of queries or keys must be called all the same, if so."""
    kind: Any = type(norm)
    if not (
        isinstance(norm, _RMSNorm)
        and kind.forward is _RMSNorm.forward
        and kind.forward_comfy_cast_weights is _RMSNorm.forward_comfy_cast_weights
    ):
        return f"{name} is a {kind.__module__}.{kind.__qualname__}, not ComfyUI's own"
    if hooked(norm):
        return f"a hook or another's forward is attached to {name}, which is not called when it is fused"
    if norm.weight is None:
        return f"{name} has no weight"
    return None


def _weight(norm: Any, x: Tensor) -> Tensor:
    """The norm's weight as its forward would read it: cast, patched by a LoRA, brought to the device.

    One that was brought lies in a buffer that is used again for the next weight, so a copy of it is taken.
    """
    if not (norm.comfy_cast_weights or norm.weight_function or norm.bias_function):
        return plain(norm.weight)
    found, bias, stream = upstream.ops.cast_bias_weight(norm, x, offloadable=True)
    resident = norm.weight.device == x.device and not hasattr(norm, "_v")
    weight = plain(found if resident else found.clone())
    upstream.ops.uncast_bias_weight(norm, found, bias, stream)
    return weight
