"""Triton kernels, one module for each family; importing this package does not import Triton."""

from .support import not_supported_reasons

__all__ = ["not_supported_reasons"]
