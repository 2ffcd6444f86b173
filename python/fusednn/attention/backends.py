"""Attention on each backend, and when one can't serve: the family's rows of the dispatch table."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..core import native
from ..core.dispatch import Implementation, Operation, Reasons
from . import reference

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

MOST_DECODED_ROWS = 16
"""Query rows up to which `auto` takes the CUDA kernel that splits the keys: a prediction (020)."""


def _against_dtype(query: Tensor) -> Reasons:
    if query.dtype not in _FLOATS:
        return [f"got tensors of {query.dtype}, expected float32, float64, bfloat16 or float16"]
    return []


def _triton_kernels() -> ModuleType:
    return importlib.import_module("fusednn.triton_kernels.attention")


def _against_cpu(name: str, query: Tensor) -> Reasons:
    if native.extension is None:
        return [native.unavailable_reason or "no extension"]
    if not hasattr(native.extension.cpu, name):
        return [f"this build's CPU kernels lack {name}"]
    if query.device.type != "cpu":
        return [f"got tensors on {query.device}, expected cpu"]
    return _against_dtype(query)


def _against_cuda(name: str, query: Tensor) -> Reasons:
    if not any(hasattr(module, name) for module in native.cuda_modules.values()):
        return [f"this build has no CUDA kernel for {name}"]
    if not hasattr(native.cuda_modules.get(query.device.type), name):
        return [f"got tensors on {query.device}, expected cuda"]
    return _against_dtype(query)


def _against_triton(name: str, query: Tensor) -> Reasons:
    try:
        support, kernels = importlib.import_module("fusednn.triton_kernels"), _triton_kernels()
    except ImportError as error:
        return [f"there is no Triton kernel for {name}: {error}"]
    if not hasattr(kernels, name):
        return [f"there is no Triton kernel for {name}"]
    return support.not_supported_reasons(query.device, query.dtype) or _against_dtype(query)


def _many_rows(query: Tensor) -> Reasons:
    if query.shape[2] <= MOST_DECODED_ROWS:
        return []
    return [f"got {query.shape[2]} query rows; the kernel is made for at most {MOST_DECODED_ROWS}"]


def _operation(name: str, first: int) -> Operation:
    """Make the operation `name`, whose argument `first` is the query."""

    def cpu(*args: Any) -> Any:
        return getattr(native.extension.cpu, name)(*args)

    def cuda(*args: Any) -> Any:
        return getattr(native.cuda_modules[args[first].device.type], name)(*args)

    return Operation(
        name,
        (
            Implementation("cpu", cpu, lambda *args: _against_cpu(name, args[first])),
            Implementation(
                "cuda",
                cuda,
                lambda *args: _against_cuda(name, args[first]),
                lambda *args: _many_rows(args[first]),
            ),
            Implementation(
                "triton",
                lambda *args: getattr(_triton_kernels(), name)(*args),
                lambda *args: _against_triton(name, args[first]),
            ),
            Implementation("reference", getattr(reference, name)),
        ),
    )


attention_forward = _operation("attention_forward", 0)
attention_backward = _operation("attention_backward", 3)

FEWEST_PROJECTED_ROWS = 64
"""Below it `auto` leaves projections to torch: packing a weight costs what the product saves (018)."""


def _against_projection(name: str, grad_or_input: Tensor) -> Reasons:
    reasons = _against_cpu(name, grad_or_input)
    if grad_or_input.dtype != torch.float32:
        reasons = [*reasons, f"got tensors of {grad_or_input.dtype}, expected float32"]
    return reasons


def _few_rows(rows: Any) -> Reasons:
    if rows >= FEWEST_PROJECTED_ROWS:
        return []
    return [f"got {rows} rows; torch's product is faster below {FEWEST_PROJECTED_ROWS}"]


def _products_are_torchs(*_args: Any) -> Reasons:
    return ["its products are torch's, which comes last"]


def _projection(name: str) -> Operation:
    def cpu(*args: Any) -> Any:
        return getattr(native.extension.cpu, name)(*args)

    torchs = getattr(reference, name)
    return Operation(
        name,
        (
            Implementation(
                "cpu",
                cpu,
                lambda *args: _against_projection(name, args[0]),
                lambda *args: _few_rows(args[0].shape[0]),
            ),
            # Where attention is asked for by name, the products around it are torch's.
            Implementation("cuda", torchs, unprofitable=_products_are_torchs),
            Implementation("triton", torchs, unprofitable=_products_are_torchs),
            Implementation("reference", torchs),
        ),
    )


projection_forward = _projection("projection_forward")
projection_backward = _projection("projection_backward")
