"""The family's ops on each backend, and when one can't serve: its rows of the dispatch table."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..core import native
from ..core.dispatch import Implementation, Operation, Reasons
from ..recurrence import plan
from . import reference

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _against_dtype(input: Tensor) -> Reasons:
    if input.dtype not in _FLOATS:
        return [f"got tensors of {input.dtype}, expected float32, float64, bfloat16 or float16"]
    return []


def _triton_kernels() -> ModuleType:
    return importlib.import_module("fusednn.triton_kernels.spatial")


def _with_form(args: tuple[Any, ...], features: int) -> tuple[Any, ...]:
    """Return a recurrence's arguments, the features at index `features`, with ``auto`` resolved."""
    f, w_ih = args[features], args[features + 9]
    form = -2 if features == 0 else -6
    output = args[form - 2]
    found = plan.resolve(args[form], f.shape, w_ih.shape[0], output, f.element_size())
    return (*args[:form], found, *args[form + 1 :])


def _against_cpu(name: str, input: Tensor) -> Reasons:
    if native.extension is None:
        return [native.unavailable_reason or "no extension"]
    if not hasattr(native.extension.cpu, name):
        return [f"this build's CPU kernels lack {name}"]
    if input.device.type != "cpu":
        return [f"got tensors on {input.device}, expected cpu"]
    return _against_dtype(input)


def _against_cuda(name: str, input: Tensor) -> Reasons:
    if not any(hasattr(module, name) for module in native.cuda_modules.values()):
        return [f"this build has no CUDA kernel for {name}"]
    if not hasattr(native.cuda_modules.get(input.device.type), name):
        return [f"got tensors on {input.device}, expected cuda"]
    return _against_dtype(input)


def _recurrence_limits(args: tuple[Any, ...], features: int) -> Reasons:
    """Return why the CUDA kernels of the recurrence can't serve a call whose features are at `features`."""
    f, _h0, c0, score, _hidden, _bias, v, _learned, _fixed, _w_ih, w_hh = args[features : features + 11]
    limits = native.cuda_modules[f.device.type].attention_lstm_limits
    return limits(f, score, w_hh, c0 is not None, v is not None)


MOST_STEP_BYTES = 4 * 2**20
"""Of weights that a block of the CUDA kernels reads in a step, for `auto`: a prediction (015)."""


def _too_many_weights(args: tuple[Any, ...], features: int) -> Reasons:
    """Return why torch's products, on all multiprocessors, should serve the steps of a wide state."""
    f, output, form = args[features], args[-4 if features == 0 else -8], args[-2 if features == 0 else -6]
    hidden_weight, w_ih, w_hh = (args[features + i] for i in (4, 9, 10))
    numbers = hidden_weight.numel() + w_hh.numel()
    if output == "sum" and plan.resolve(form, f.shape, w_ih.shape[0], output, f.element_size()) == "direct":
        numbers += w_ih.numel()
    read = numbers * f.element_size()
    if read <= MOST_STEP_BYTES:
        return []
    return [f"a step would read {read / 2**20:.3g} MiB of weights, expected at most {MOST_STEP_BYTES >> 20}"]


def _against_triton(name: str, input: Tensor) -> Reasons:
    try:
        support, kernels = importlib.import_module("fusednn.triton_kernels"), _triton_kernels()
    except ImportError as error:
        return [f"there is no Triton kernel for {name}: {error}"]
    if not hasattr(kernels, name):
        return [f"there is no Triton kernel for {name}"]
    return support.not_supported_reasons(input.device, input.dtype) or _against_dtype(input)


def _unchanged(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args


def _no_limits(_args: tuple[Any, ...]) -> Reasons:
    return []


def _operation(
    name: str,
    features_of: Callable[..., Tensor],
    native_arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]] = _unchanged,
    cuda_limits: Callable[[tuple[Any, ...]], Reasons] = _no_limits,
    cuda_slower: Callable[[tuple[Any, ...]], Reasons] = _no_limits,
) -> Operation:
    """Make the operation `name`; `features_of` picks the tensor that decides on device and dtype.

    `native_arguments` makes those of the CPU and CUDA kernels from the op's; `cuda_limits` says why a CUDA
    kernel that there is can't serve a call, `cuda_slower` why `auto` should not take it.
    """

    def cpu(*args: Any) -> Any:
        return getattr(native.extension.cpu, name)(*native_arguments(args))

    def cuda(*args: Any) -> Any:
        return getattr(native.cuda_modules[features_of(*args).device.type], name)(*native_arguments(args))

    def against_cuda(*args: Any) -> Reasons:
        return _against_cuda(name, features_of(*args)) or cuda_limits(args)

    return Operation(
        name,
        (
            Implementation("cpu", cpu, lambda *args: _against_cpu(name, features_of(*args))),
            Implementation("cuda", cuda, against_cuda, lambda *args: cuda_slower(args)),
            Implementation(
                "triton",
                lambda *args: getattr(_triton_kernels(), name)(*args),
                lambda *args: _against_triton(name, features_of(*args)),
            ),
            Implementation("reference", getattr(reference, name)),
        ),
    )


spatial_softmax_forward = _operation("spatial_softmax_forward", lambda logits, *_: logits)
spatial_softmax_backward = _operation("spatial_softmax_backward", lambda *args: args[5])
spatial_attention_forward = _operation("spatial_attention_forward", lambda features, *_: features)
spatial_attention_backward = _operation("spatial_attention_backward", lambda *args: args[2])
attention_lstm_forward = _operation(
    "attention_lstm_forward",
    lambda features, *_: features,
    lambda args: _with_form(args, features=0),
    lambda args: _recurrence_limits(args, features=0),
    lambda args: _too_many_weights(args, features=0),
)
attention_lstm_backward = _operation(
    "attention_lstm_backward",
    lambda *args: args[4],
    lambda args: _with_form(args, features=4),
    lambda args: _recurrence_limits(args, features=4),
    lambda args: _too_many_weights(args, features=4),
)
