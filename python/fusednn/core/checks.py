"""Checks of arguments that every family makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_tensor(name: str, argument: str, value: Any, optional: bool = False) -> None:
    """Raise TypeError unless `value` is a tensor, or None where it may be."""
    if not isinstance(value, Tensor) and not (optional and value is None):
        expected = "a Tensor or None" if optional else "a Tensor"
        raise TypeError(f"{name}: expected {argument} to be {expected}, got {type(value).__name__}")
