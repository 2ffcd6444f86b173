"""Arguments of spatial attention, checked with torch's kind of error, in the form that the ops take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_broadcasts, check_device, check_floating, check_shape, check_tensor
from ..core.transforms import under_transform


def check_images(name: str, argument: str, value: Any, layout: str) -> None:
    """Check rank, dtype and that there are positions; `layout` is e.g. ``"[N, C, H, W]"``."""
    check_tensor(name, argument, value)
    dims = layout.count(",") + 1
    if value.dim() != dims:
        raise RuntimeError(
            f"{name}: Expected {argument} to be {dims}D {layout}, but got size {list(value.shape)}"
        )
    check_floating(name, argument, value)
    if 0 in value.shape[-2:]:
        raise RuntimeError(f"{name}: expected {argument} to have positions, got size {list(value.shape)}")


def temperature(name: str, value: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """Return the op's two arguments: a learned temperature, or a fixed one.

    Raises:
        ValueError: a number that is not positive.
        RuntimeError: a tensor that isn't one floating-point number on the device.
        TypeError: neither.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.dtype.is_floating_point:
            raise RuntimeError(
                f"{name}: expected temperature to hold one floating-point number, "
                f"got {value.dtype} of size {list(value.shape)}"
            )
        check_device(name, "the input", device, "temperature", value)
        return value, 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{name}: expected temperature to be a number or a Tensor, got {type(value).__name__}"
        )
    if not value > 0:
        raise ValueError(f"{name}: temperature: got {value}, expected a positive number")
    return None, float(value)


def mask_of(name: str, mask: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor | None:
    """Return a mask that broadcasts to ``[N, G, H, W]`` as ``[N, G, P]``, without copying rows.

    Raises:
        RuntimeError: its shape, dtype or device does not fit.
    """
    if mask is None:
        return None
    check_tensor(name, "mask", mask)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"{name}: expected mask to be of dtype bool, True: takes part, got {mask.dtype}")
    check_device(name, "the input", device, "mask", mask)
    check_broadcasts(name, "mask", mask, shape)
    return mask.expand(*shape).flatten(2)


def lengths_of(name: str, lengths: Any, features: Tensor) -> Tensor | None:
    """Return the lengths of the sequences [B] as int64 on the features' device.

    Raises:
        RuntimeError: there is not one for each sequence, or one is not in 1 .. T.
        TypeError: they are no integers.
    """
    if lengths is None:
        return None
    batch, steps = features.shape[:2]
    empty = isinstance(lengths, (list, tuple)) and not lengths  # as_tensor would make it float32
    dtype = torch.int64 if empty else None
    given = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, dtype=dtype)
    if given.dtype.is_floating_point or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"{name}: expected lengths to be integers, got {given.dtype}")
    check_shape(name, "lengths", given, (batch,), f"features of size {list(features.shape)}")
    readable = type(given) is Tensor and not torch.compiler.is_compiling() and not under_transform(given)
    if given.device.type == "cpu" and readable:
        outside = [int(n) for n in given if not 1 <= n <= steps]
        if outside:
            raise RuntimeError(
                f"{name}: lengths: got {outside[0]}, expected 1 to {steps}, the number of steps"
            )
    return given.to(features.device, torch.int64)
