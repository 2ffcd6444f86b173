"""Attend-and-recur around children that must be called, one step after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.children import against_reading
from ..rnn.modules import GRUCell, LSTMCell
from ..spatial import checks, composite
from ..spatial.modules import SpatialAttention
from .functional import State

if TYPE_CHECKING:
    from .modules import AttentionLSTM


def against_children(module: AttentionLSTM) -> list[str]:
    """Why the layer can't read its children's weights; empty if it can."""
    reasons = against_reading({"cell": module.cell}, LSTMCell, GRUCell)
    reasons = reasons or against_reading({"attention": module.attention}, SpatialAttention)
    return reasons or [f"attention's {reason}" for reason in composite.against_children(module.attention)]


def recur(module: AttentionLSTM, features: Tensor, hx: State, lengths: Any) -> tuple[Tensor, Tensor, State]:
    """Return hidden states, maps and the last state; of ended sequences zeros, and the state stays."""
    ends = checks.lengths_of("AttentionLSTM", lengths, features)
    hidden, maps = [], []
    for t in range(features.shape[1]):
        frame = features[:, t]
        going = None if ends is None else (ends > t)[:, None]  # [B, 1]
        if going is not None:
            frame = frame.masked_fill(~going[:, :, None, None], 0)
        x, map = module.attention(frame, hx if isinstance(hx, Tensor) else hx[0])
        new = module.cell(x.flatten(1), hx)
        h = new if isinstance(new, Tensor) else new[0]
        if going is not None:
            h, map = h.masked_fill(~going, 0), map.masked_fill(~going[:, :, None, None], 0)
            new = _where(going, new, hx)
        hx = new
        hidden.append(h)
        maps.append(map)
    return torch.stack(hidden, 1), torch.stack(maps, 1), hx


def _where(going: Tensor, new: State, old: State) -> State:
    if isinstance(new, Tensor) or isinstance(old, Tensor):
        assert isinstance(new, Tensor)
        assert isinstance(old, Tensor)
        return torch.where(going, new, old)
    return torch.where(going, new[0], old[0]), torch.where(going, new[1], old[1])
