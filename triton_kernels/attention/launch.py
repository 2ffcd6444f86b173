"""Launchers of attention, which take the calls of its ops: see `fusednn.attention.reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.checks import device_guard
from .arguments import Rows
from .call import Attention
from .forward import attention_forward_kernel
from .gradients import Gradients
from .tiles import FORWARD, SCORES
from .weights import attention_weights_kernel


def _output_and_lse(attention: Attention, low: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [B, H, L, V], [B, L, H, V] in memory, and lse [B, H, L]."""
    query, value = attention.query, attention.value
    batch, heads, rows, _ = query.shape
    output = query.new_empty(batch, rows, heads, value.shape[3]).transpose(1, 2)
    lse = attention.empty_rows()
    if attention.packed:  # sequences need not cover all rows
        output.zero_()
        lse.fill_(-torch.inf)
    tiles = attention.row_tiles(FORWARD)
    programs = attention.batch * heads * tiles
    attention.launch(attention_forward_kernel, FORWARD, programs, tiles, Rows.of(output), lse, low)
    return output, lse


def _weights(attention: Attention, lse: Tensor, low: Tensor | None) -> Tensor:
    """Those after dropout: their mean [B, L, S + X], or those of all heads [B, H, L, S + X]."""
    batch, heads, rows, _ = attention.query.shape
    mean, extra = attention.call.weights == "mean", attention.extra
    outer = (batch,) if mean else (batch, heads)
    weights = attention.query.new_empty(*outer, rows, attention.key.shape[2] + extra)
    tiles, columns = attention.row_tiles(SCORES), attention.column_tiles(SCORES) + (extra > 0)
    if weights.numel() == 0:
        return weights
    if heads == 0:
        return weights.fill_(torch.nan)  # as torch's mean of nothing
    given = (lse, low, weights, columns, heads if mean else 1)
    programs = weights.shape[:-2].numel() * tiles * columns
    attention.launch(attention_weights_kernel, SCORES, programs, tiles, *given)
    return weights


def attention_forward(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse and weights, or [0]; raises RuntimeError if a shape, dtype or device misfits."""
    attention, wanted = Attention(call), call.weights != "none"
    low = attention.empty_rows() if attention.natural and wanted else None
    with device_guard(call.query):
        output, lse = _output_and_lse(attention, low)
        return output, lse, _weights(attention, lse, low) if wanted else call.query.new_empty(0)


def attention_backward(call: Any) -> tuple[Tensor, ...]:
    """Gradients, empty where masked; raises RuntimeError if a shape, dtype or device misfits."""
    return Gradients(call).run()
