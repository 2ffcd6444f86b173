"""Argument checks and device guard of the launchers; the same messages as the C++ bindings give."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .support import DTYPES

Given = TypeVar("Given", Tensor, "Tensor | None")


@dataclass(frozen=True)
class Check:
    """Checks the tensors of a call of `op` against one of them, `like`, which is its argument `name`."""

    op: str
    name: str
    like: Tensor

    @classmethod
    def of(cls, op: str, name: str, like: Tensor, dimensions: int) -> Check:
        """Raises RuntimeError if `like` has other dimensions or a dtype that kernels don't take."""
        check = cls(op, name, like)
        if like.dim() != dimensions:
            raise check.error(f"{name}: got shape {list(like.shape)}, expected {dimensions} dimensions")
        if like.dtype not in DTYPES:
            raise check.error(
                f"{name}: got dtype {like.dtype}, expected float32, float64, float16 or bfloat16"
            )
        return check

    @classmethod
    def of_call(cls, call: Any, name: str, dimensions: int) -> Check:
        """The same of an op's call, against its argument `name`."""
        return cls.of(type(call).__name__, name, getattr(call, name), dimensions)

    def error(self, message: str) -> RuntimeError:
        """An error of the call, to be raised."""
        return RuntimeError(f"{self.op}: {message}")

    def __call__(self, name: str, t: Given, shape: Sequence[int], dtype: torch.dtype | None = None) -> Given:
        """`t`, which may be None, if it has this shape, and dtype and device of `like`; else RuntimeError."""
        if t is None:
            return t
        if list(t.shape) != list(shape):
            raise self.error(f"{name}: got shape {list(t.shape)}, expected {list(shape)}")
        if t.dtype != (dtype or self.like.dtype):
            expected = dtype or f"{self.like.dtype} as {self.name}"
            raise self.error(f"{name}: got dtype {t.dtype}, expected {expected}")
        if t.device != self.like.device:
            raise self.error(
                f"{name}: got a tensor on {t.device}, expected {self.like.device} as {self.name}"
            )
        return t

    def dense(self, name: str, t: Given, shape: Sequence[int], dtype: torch.dtype | None = None) -> Given:
        """The same, contiguous."""
        t = self(name, t, shape, dtype)
        return t if t is None else t.contiguous()


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def wanted(names: Sequence[str], output_mask: Sequence[bool]) -> set[str]:
    """The names of the gradients that a backward is to make."""
    return {name for name, on in zip(names, output_mask, strict=True) if on}


def gradients_in_order(found: dict[str, Tensor], names: Sequence[str], like: Tensor) -> tuple[Tensor, ...]:
    """Gradients by name as an op returns them: empty where there is none."""
    return tuple(found[name] if name in found else like.new_empty(0) for name in names)
