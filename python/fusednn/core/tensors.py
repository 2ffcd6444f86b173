"""Dtypes and gradients as every family has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Dtype of sums and of pointwise arithmetic: the widest of the operands', float32 at least."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def where_needed(
    makers: Sequence[Callable[[], Tensor]], output_mask: Sequence[bool], like: Tensor
) -> tuple[Tensor, ...]:
    """Make the gradients that the mask asks for; an empty tensor stands for each other one."""
    return tuple(
        make() if needed else like.new_empty(0) for make, needed in zip(makers, output_mask, strict=True)
    )


def empty_gradients(
    tensors: Sequence[Tensor | None],
    output_mask: Sequence[bool],
    memory_format: torch.memory_format = torch.preserve_format,
) -> tuple[Tensor, ...]:
    """Uninitialised gradients like `tensors` where the mask asks for them, for a fake kernel."""
    like = next(t for t in tensors if t is not None)
    return tuple(
        torch.empty_like(t, memory_format=memory_format) if needed and t is not None else like.new_empty(0)
        for t, needed in zip(tensors, output_mask, strict=True)
    )
