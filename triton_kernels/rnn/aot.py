"""Calls of the gates whose kernels are compiled ahead of time, to see that none spills."""

from __future__ import annotations

import torch

from ..core.aot import AotCase, empty
from .gates import gru_gates_backward, gru_gates_forward, lstm_gates_backward, lstm_gates_forward

_BATCH = 64


def _lstm(dtype: torch.dtype, hidden: int) -> None:
    gates, cx = empty(_BATCH, 4 * hidden, dtype=dtype), empty(_BATCH, hidden, dtype=dtype)
    bias = empty(4 * hidden, dtype=dtype)
    h, c = lstm_gates_forward(gates, bias, bias, cx, True)
    lstm_gates_backward(h, c, gates, cx, c)


def _lstm_without_biases(dtype: torch.dtype) -> None:
    lstm_gates_forward(empty(_BATCH, 1024, dtype=dtype), None, None, empty(_BATCH, 256, dtype=dtype), False)


def _gru(dtype: torch.dtype, hidden: int) -> None:
    gates, hx = empty(_BATCH, 3 * hidden, dtype=dtype), empty(_BATCH, hidden, dtype=dtype)
    bias = empty(3 * hidden, dtype=dtype)
    h, saved = gru_gates_forward(gates, gates, bias, bias, hx, True)
    gru_gates_backward(h, saved, hx)


AOT_CASES = [
    AotCase("lstm/wide", lambda dtype: _lstm(dtype, 256)),
    AotCase("lstm/odd", lambda dtype: _lstm(dtype, 255)),
    AotCase("lstm/bare", _lstm_without_biases),
    AotCase("gru/wide", lambda dtype: _gru(dtype, 256)),
    AotCase("gru/odd", lambda dtype: _gru(dtype, 255)),
]
