"""What a family lists in AOT_CASES, so that tools/triton_aot.py can compile its kernels without a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusednn.core.op import OPS

from .support import DTYPES


@dataclass(frozen=True)
class AotCase:
    """A call of launchers on tensors of `meta`: every kernel that it launches is compiled as it would be.

    call: makes the call for a dtype.
    dtypes: those under test.
    """

    name: str
    call: Callable[[torch.dtype], object]
    dtypes: tuple[torch.dtype, ...] = DTYPES


def launch(launcher: Callable[[Any], Any], *arguments: Any) -> Any:
    """The results of an op's launcher."""
    return launcher(OPS[launcher.__name__].Call(*arguments))


def empty(*size: int, dtype: torch.dtype) -> Tensor:
    """A tensor without memory, whose address counts as aligned."""
    return torch.empty(size, dtype=dtype, device="meta")
