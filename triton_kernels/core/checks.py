"""Argument checks and device guard of the launchers; the same messages as the C++ bindings give."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .support import DTYPES

Given = TypeVar("Given", Tensor, "Tensor | None")


@dataclass(frozen=True)
class Arguments:
    """Checks a call's other arguments against `like`, [B, multiple * H], which sets dtype, device, sizes."""

    op: str
    name: str
    like: Tensor
    batch: int
    hidden: int

    @classmethod
    def of(cls, op: str, name: str, like: Tensor, multiple: int) -> Arguments:
        """Raises RuntimeError if `like` can't set the sizes of the call."""
        if like.dim() != 2:
            raise RuntimeError(f"{op}: {name}: got shape {list(like.shape)}, expected 2 dimensions")
        if like.shape[1] % multiple:
            raise RuntimeError(
                f"{op}: {name}: got shape {list(like.shape)}, expected a multiple of {multiple} columns"
            )
        if like.dtype not in DTYPES:
            raise RuntimeError(
                f"{op}: {name}: got dtype {like.dtype}, expected float32, float64, float16 or bfloat16"
            )
        return cls(op, name, like, like.shape[0], like.shape[1] // multiple)

    def rows(self, name: str, tensor: Given, multiple: int) -> Given:
        """`tensor`, contiguous, after checking that it is [B, multiple * H]."""
        return self._checked(name, tensor, [self.batch, multiple * self.hidden])

    def bias(self, name: str, tensor: Given, multiple: int) -> Given:
        """`tensor`, contiguous, after checking that it is [multiple * H]."""
        return self._checked(name, tensor, [multiple * self.hidden])

    def empty_rows(self, multiple: int) -> Tensor:
        """An uninitialised [B, multiple * H]."""
        return self.like.new_empty(self.batch, multiple * self.hidden)

    def _checked(self, name: str, tensor: Given, shape: list[int]) -> Given:
        if tensor is None:
            return tensor
        if list(tensor.shape) != shape:
            raise RuntimeError(f"{self.op}: {name}: got shape {list(tensor.shape)}, expected {shape}")
        if tensor.dtype != self.like.dtype:
            raise RuntimeError(
                f"{self.op}: {name}: got dtype {tensor.dtype}, expected {self.like.dtype} as {self.name}"
            )
        if tensor.device != self.like.device:
            raise RuntimeError(
                f"{self.op}: {name}: got a tensor on {tensor.device}, "
                f"expected {self.like.device} as {self.name}"
            )
        return tensor.contiguous()


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
