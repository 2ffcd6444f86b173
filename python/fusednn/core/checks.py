"""Checks of arguments that every family makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def check_tensor(name: str, argument: str, value: Any, optional: bool = False) -> None:
    """Raise TypeError unless `value` is a tensor, or None where it may be."""
    if not isinstance(value, Tensor) and not (optional and value is None):
        expected = "a Tensor or None" if optional else "a Tensor"
        raise TypeError(f"{name}: expected {argument} to be {expected}, got {type(value).__name__}")


def check_tensors(name: str, *, optional: bool = False, **tensors: Any) -> None:
    """Check every argument as :func:`check_tensor` does."""
    for argument, value in tensors.items():
        check_tensor(name, argument, value, optional)


def check_floating(name: str, argument: str, tensor: Tensor) -> None:
    """Raise RuntimeError unless the tensor is floating point."""
    if not tensor.dtype.is_floating_point:
        raise RuntimeError(f"{name}: expected {argument} to be floating point, got {tensor.dtype}")


def check_device(name: str, first: str, device: torch.device, argument: str, tensor: Tensor) -> None:
    """Raise RuntimeError unless the tensor is on the device of the `first`."""
    if tensor.device != device:
        raise RuntimeError(
            f"{name}: expected all tensors on one device: "
            f"{first} is on {device}, {argument} on {tensor.device}"
        )


def check_same_kind(
    name: str,
    first: str,
    tensor: Tensor,
    others: Iterable[tuple[str, Tensor | None]],
    cast: bool = False,
    may_differ: Sequence[str] = (),
) -> None:
    """Raise RuntimeError unless every tensor is on one device and of one dtype.

    Floating dtypes may differ where autocast will `cast` them, and of the arguments `may_differ`.
    """
    for argument, other in others:
        if other is None:
            continue
        check_device(name, first, tensor.device, argument, other)
        floating = tensor.dtype.is_floating_point and other.dtype.is_floating_point
        free = (cast or argument in may_differ) and floating
        if other.dtype != tensor.dtype and not free:
            raise RuntimeError(
                f"{name}: {first} and {argument} must have the same dtype, "
                f"but got {tensor.dtype} and {other.dtype}"
            )


def check_shape(name: str, argument: str, tensor: Tensor | None, expected: Sequence[int], why: str) -> None:
    """Raise RuntimeError unless an argument that is given has the expected shape."""
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise RuntimeError(
            f"{name}: {argument} has shape {list(tensor.shape)}, expected {list(expected)} for {why}"
        )


def check_broadcasts(name: str, argument: str, tensor: Tensor, shape: Sequence[Any]) -> None:
    """Raise RuntimeError unless the tensor broadcasts to the shape."""
    sizes = zip(reversed(tensor.shape), reversed(shape))
    if tensor.dim() > len(shape) or not all(own in (1, size) for own, size in sizes):
        raise RuntimeError(
            f"{name}: {argument} has shape {list(tensor.shape)}, which does not broadcast to {list(shape)}"
        )


def check_positive(name: str, **sizes: int | None) -> None:
    """Raise ValueError unless every size is positive."""
    for argument, value in sizes.items():
        if value is None or value <= 0:
            raise ValueError(f"{name}: {argument}: got {value}, expected a positive number")


def choice(name: str, argument: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of the names allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: {argument}: got {value!r}, expected one of {', '.join(allowed)}")
