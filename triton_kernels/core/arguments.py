"""What launchers of all families pass: numbers as bits, constants in a tuple, a grid within its limit.

Kernels take a few named tuples (docs/design/021-triton-tuples.md): tensors with their strides, whose
alignment and strides of 1 Triton compiles for; run-time numbers that are kept from that by
`do_not_specialize`; and `C`, constants. A tensor that is absent is None. Kernels make tuples of tuples again,
`inputs = Inputs(*inputs)`, since Triton 3.6 would lose the constants of the inner ones.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from .support import interpreting

INT32_MAX = 2**31 - 1
Constants = TypeVar("Constants", bound=tuple)


@lru_cache(typed=True)
def constants(values: Constants) -> Constants:
    """A named tuple in the form that kernels take as constants: Triton 3.6 compiles wrapped ones alone."""
    wrapped: Any = type(values)
    return values if interpreting() else wrapped(*map(tl.constexpr, values))


def bits_of(number: float) -> int:
    """The bits of a double: a launch would narrow a float to float32."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def dense_rows(t: Tensor) -> Tensor:
    """`t`, or a copy of it if its last dimension is strided."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask of bool as bytes."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def grid_of(op: str, programs: int) -> tuple[int]:
    """One axis, since the others end at 65,535."""
    if programs > INT32_MAX:
        raise RuntimeError(f"{op}: got {programs} tiles, expected fewer than 2^31")
    return (programs,)
