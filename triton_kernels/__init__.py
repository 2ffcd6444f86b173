"""Triton kernels, a folder for each family; importing this package does not import Triton."""

if __name__ != "fusednn.triton_kernels":
    raise ImportError(
        f"got an import as {__name__}, expected fusednn.triton_kernels: there is one copy of it"
    )

from .core.support import not_supported_reasons

__all__ = ["not_supported_reasons"]
