"""Calls of attention whose kernels are compiled ahead of time, to see that none spills."""

from __future__ import annotations

from typing import Any

import torch

from ..core.aot import AotCase, empty, launch
from .launch import attention_backward, attention_forward

_BATCH, _HEADS, _KEY_HEADS, _LENGTH, _EXTRA = 2, 4, 2, 4096, 2
_VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {"window_right": 0},
    "padding": {"key_mask": torch.bool},
    "packed dropout": {"packed": True, "dropout_p": 0.1, "window_right": 0},
    "mask dropout": {"mask": True, "key_mask": torch.bool, "dropout_p": 0.1, "grad_lse": True},
    "mask": {"mask": True, "weights": "mean"},
    "extra softcap": {"extra": True, "softcap": 30.0, "window_left": 100, "window_right": 0},
}


def _call(
    dtype: torch.dtype, size: int, mask: bool = False, key_mask: torch.dtype | None = None,
    extra: bool = False, packed: bool = False, grad_lse: bool = False, weights: str = "none",
    window_left: int = -1, window_right: int = -1, softcap: float = 0.0, dropout_p: float = 0.0,
) -> None:  # fmt: skip
    """Forward and backward of attention with the options of a variant."""
    batch = 1 if packed else _BATCH
    wide = torch.promote_types(dtype, torch.float32)
    query = empty(batch, _HEADS, _LENGTH, size, dtype=dtype)
    key = value = empty(batch, _KEY_HEADS, _LENGTH, size, dtype=dtype)
    columns = empty(_KEY_HEADS, _EXTRA, size, dtype=dtype) if extra else None
    tensors = (
        query, key, value,
        empty(1, 1, _LENGTH, _LENGTH, dtype=dtype) if mask else None,
        None if key_mask is None else empty(batch, _LENGTH, dtype=key_mask),
        columns, columns,
        empty(_HEADS, dtype=torch.float32) if extra else None,
        *([empty(4, dtype=torch.int32) if packed else None] * 2),
        empty(1, dtype=torch.int64) if dropout_p else None,
    )  # fmt: skip
    options = (_LENGTH, _LENGTH, 0.125, window_left, window_right, 0, softcap, dropout_p, weights)
    output, lse, found = launch(attention_forward, *tensors, *options)
    grads = (
        output,
        empty(*lse.shape, dtype=wide) if grad_lse else None,
        found if weights != "none" else None,
    )
    needed = (True, True, True, mask, False, extra, extra)
    launch(attention_backward, *grads, *tensors, output, lse, *options, needed)


def _case(variant: str, size: int, *dtypes: torch.dtype) -> AotCase:
    return AotCase(
        f"attention/{variant} {size}", lambda dtype: _call(dtype, size, **_VARIANTS[variant]), dtypes
    )


AOT_CASES = [
    _case("causal", 64, torch.bfloat16, torch.float32, torch.float64),
    _case("causal", 128, torch.bfloat16),
    _case("causal", 256, torch.bfloat16),
    _case("padding", 80, torch.bfloat16),
    _case("packed dropout", 64, torch.float16),
    _case("mask dropout", 64, torch.float16),
    _case("mask dropout", 128, torch.float16),
    _case("extra softcap", 64, torch.bfloat16),
    _case("mask", 64, torch.float64),
    _case("mask", 128, torch.float32),
    _case("mask", 256, torch.bfloat16),
]
