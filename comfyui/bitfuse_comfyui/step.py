# SPDX-License-Identifier: GPL-3.0-or-later
"""What all blocks of one forward of the model are handed, brought into the form in which operators take it: once.

ComfyUI makes its rotary tables and its AdaLN timesteps anew for every forward of the model, and hands the same objects
to each of its 48 blocks. So what is made of them here is kept by the identity of the object until the forward ends.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from . import upstream
from .forms import tables_of

Frames = tuple[int, int]  # frames of a video, and tokens of each


class _Forward:
    """One forward of a model, and what is kept for as long as it is under way."""

    __slots__ = ("forms", "resident", "rows", "tables")

    def __init__(self) -> None:
        self.forms: dict[Any, Any] = {}  # what attentions have found for their shapes
        self.tables: dict[int, tuple[Any, tuple[Tensor, Tensor]]] = {}
        self.rows: dict[tuple[int, Frames | None], tuple[Any, Tensor]] = {}
        self.resident: bool | None = None


class Step:
    """The forward of a model that is under way in this thread, if one is: the innermost, where a node runs one in
    another's midst."""

    def __init__(self) -> None:
        self._here = threading.local()  # .forward
        self._with_weights: list[weakref.ref[Any]] = []  # modules

    @property
    def forward(self) -> _Forward | None:
        """None: nothing is kept, as nobody says when it ends."""
        return getattr(self._here, "forward", None)

    @contextlib.contextmanager
    def of(self, model: Any, pe: Any) -> Iterator[None]:
        """While this block is entered: the forward whose rotary tables these are."""
        around, forward = self.forward, _Forward()
        for one in (table for of_stream in pe for table in of_stream):
            _note(forward, one)
        if not self._with_weights:
            self._with_weights = [weakref.ref(module) for module in model.modules() if module._parameters]
        try:
            self._here.forward = forward
            yield
        finally:
            self._here.forward = around

    # -- rotary tables -------------------------------------------------------------------------------------------------

    def tables(self, pe: Any) -> tuple[Tensor, Tensor] | None:
        """cos and sin of an attention's `pe`, [B, H, T, D / 2] where halves are turned; None where they are not known:
        a matrix that somebody else has made may be any matrix."""
        if not upstream.BY_KITCHEN:
            return pe[0], pe[1]
        found = None if self.forward is None else self.forward.tables.get(id(pe))
        return found[1] if found is not None and found[0] is pe else None

    # -- AdaLN timesteps -----------------------------------------------------------------------------------------------

    def rows(self, timestep: Any, frames: Frames | None, batch: int) -> Tensor:
        """AdaLN's values of a timestep: [B, T or 1, D], or with `frames` [B * F, P or 1, D], for tokens seen so."""
        if not isinstance(timestep, upstream.av_model.CompressedTimestep) and frames is None:
            return timestep
        if self.forward is None:
            return _rows(timestep, frames, batch)
        key, rows = (id(timestep), frames), self.forward.rows
        found = rows.get(key)
        if found is None or found[0] is not timestep:
            rows[key] = found = timestep, _rows(timestep, frames, batch)
        return found[1]

    # -- weights -------------------------------------------------------------------------------------------------------

    def resident(self, device: torch.device) -> bool:
        """Whether all weights of the model are on this device: none is streamed to it while a block runs.

        Looked at once per forward: 0.3 ms for the 3,500 of 48 layers.
        """
        forward = self.forward
        if forward is None:
            return False
        if forward.resident is None:
            modules = (module for reference in self._with_weights if (module := reference()) is not None)
            weights = (t for module in modules for t in module._parameters.values() if t is not None)
            forward.resident = set(map(attrgetter("device"), weights)) == {device}
        return forward.resident


def _note(forward: _Forward, pe: Any) -> None:
    """Up to 0.27 the tables are cos and sin; from 0.30 on a matrix (c, -s; s, c) for each pair of channels."""
    if upstream.BY_KITCHEN:
        forward.tables[id(pe)] = pe, tables_of(*pe)


def plain(t: Tensor) -> Tensor:
    """A weight as a plain tensor, where its class is one that computes as those do: GGUF's loader keeps tables so.

    A class with rules of its own stays, and operators leave it to PyTorch.
    """
    kind: Any = type(t)
    if kind is Tensor or kind is torch.nn.Parameter:
        return t
    rules = [getattr(of.__torch_function__, "__func__", of.__torch_function__) for of in (kind, Tensor)]
    if rules[0] is not rules[1] or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # type: ignore[attr-defined]
        return t
    found = t.as_subclass(Tensor)
    return found if found.shape == t.shape else t  # one that is quantised says another


def _rows(timestep: Any, frames: Frames | None, batch: int) -> Tensor:
    compressed = isinstance(timestep, upstream.av_model.CompressedTimestep)
    data, each = (timestep.data, timestep.patches_per_frame) if compressed else (timestep, 1)
    if frames is None:
        return data
    count, per_frame = frames
    if each == per_frame and data.shape[1] == count:  # a row for each frame
        return data.reshape(batch * count, 1, -1)
    if each > 1:
        data = timestep.expand()
    if data.shape[1] == 1:
        return data.expand(batch, count, -1).reshape(batch * count, 1, -1)
    return data.reshape(batch * count, per_frame, -1)


def frames_of(tokens: int, *timesteps: Any) -> Frames | None:
    """How the video's tokens are to be seen, such that a row of AdaLN values serves each frame; None: as they are."""
    compressed = [one for one in timesteps if isinstance(one, upstream.av_model.CompressedTimestep)]
    seen = ((one.num_frames, one.patches_per_frame) for one in compressed if one.patches_per_frame > 1)
    return next((frames for frames in seen if frames[0] * frames[1] == tokens), None)
