"""The convolutions on each backend, and when one can't serve: the family's rows of the dispatch table."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..core import native
from ..core.dispatch import Implementation, Operation, Reasons, no_plan, no_reasons
from . import reference
from .composite import Composite

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _against_dtype(input: Tensor) -> Reasons:
    if input.dtype not in _FLOATS:
        return [f"got input of {input.dtype}, expected float32, float64, bfloat16 or float16"]
    return []


def _triton_kernels() -> ModuleType:
    return importlib.import_module("fusednn.triton_kernels.conv")


def _against_cpu(name: str, input: Tensor) -> Reasons:
    if native.extension is None:
        return [native.unavailable_reason or "no extension"]
    if not hasattr(native.extension.cpu, name):
        return [f"this build's CPU kernels lack {name}"]
    if input.device.type != "cpu":
        return [f"got tensors on {input.device}, expected cpu"]
    return _against_dtype(input)


# Operations of a block that are made of the depthwise kernels and torch's products, and of which kernels.
_FORWARD, _BACKWARD = "depthwise_conv2d_forward", "depthwise_conv2d_backward"
_COMPOSED = {
    "separable_conv2d_forward": _FORWARD,
    "separable_conv2d_train_forward": _FORWARD,
    "separable_conv2d_train_backward": _BACKWARD,
}


def _cuda_kernels(input: Tensor) -> ModuleType:
    return native.cuda_modules[input.device.type]


_compositions = {"cuda": Composite(_cuda_kernels), "triton": Composite(lambda _input: _triton_kernels())}


def _run_kernels(backend: str, kernels: ModuleType, name: str, args: tuple[Any, ...]) -> Any:
    """Run the kernel of this name where it can serve; a block beyond it as depthwise kernel and products."""
    composed = name in _COMPOSED
    if not hasattr(kernels, name) or (composed and kernels.separable_conv2d_limits(*args[:2], args[3])):
        return reference.without_autocast(getattr(_compositions[backend], name))(*args)
    return getattr(kernels, name)(*args)


def _against_cuda(name: str, input: Tensor) -> Reasons:
    name = _COMPOSED.get(name, name)
    if not any(hasattr(module, name) for module in native.cuda_modules.values()):
        return [f"this build has no CUDA kernel for {name}"]
    if not hasattr(native.cuda_modules.get(input.device.type), name):
        return [f"got tensors on {input.device}, expected cuda"]
    return _against_dtype(input)


def _against_triton(name: str, input: Tensor) -> Reasons:
    try:
        support, kernels = importlib.import_module("fusednn.triton_kernels"), _triton_kernels()
    except ImportError as error:
        return [f"there is no Triton kernel for {name}: {error}"]
    if not hasattr(kernels, _COMPOSED.get(name, name)):
        return [f"there is no Triton kernel for {name}"]
    return support.not_supported_reasons(input.device, input.dtype) or _against_dtype(input)


def _separable_plan(
    input, w1, b1, w2, b2, residual, stride, padding, dilation, *_activations
) -> dict[str, Any]:
    """Return what the CPU's planner decided on: one pass or two kernels, bytes moved, tasks."""
    if input.numel() == 0:
        return {}
    plan = native.extension.cpu.separable_conv2d_plan(
        input, w1, w2, residual is not None, stride, padding, dilation
    )
    return {"path": "fused" if plan.pop("fused") else "two kernels", **plan}


# Where torch's own depthwise convolution was measured to be faster: docs/design/011-depthwise-alone.md.


def _measured_channels_last(input: Tensor) -> bool:
    dense = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return input.dtype == torch.float32 and dense


def _slower_forward(input, weight, _bias, _stride, _padding, _dilation, activation) -> Reasons:
    if input.shape[1] == 1 and weight.shape[0] > 1:
        return ["with one input channel torch has a plain convolution, 2 to 5 times as fast"]
    plain = activation == "none" and max(weight.shape[2:]) <= 5
    if plain and _measured_channels_last(input):
        return ["channels-last and without an activation, torch is 1.2 to 1.9 times as fast up to 5x5"]
    return []


def _slower_backward(_grad, input, weight, *_options) -> Reasons:
    multiplier = weight.shape[0] // max(1, input.shape[1])
    if input.shape[1] == 1 and multiplier > 1:
        return ["with one input channel torch has a plain convolution, about twice as fast"]
    if multiplier > 1 and _measured_channels_last(input):
        return ["channels-last with a multiplier, torch is 1.2 to 1.8 times as fast"]
    return []


def _operation(
    name: str,
    input_position: int = 0,
    cpu_plan: Callable[..., dict[str, Any]] = no_plan,
    slower_on_cpu: Callable[..., Reasons] = no_reasons,
) -> Operation:
    """Make the operation `name`, whose input is its argument at `input_position`."""

    def input_of(args: tuple[Any, ...]) -> Tensor:
        return args[input_position]

    def cuda(*args: Any) -> Any:
        return _run_kernels("cuda", _cuda_kernels(input_of(args)), name, args)

    return Operation(
        name,
        (
            Implementation(
                "cpu",
                lambda *args: getattr(native.extension.cpu, name)(*args),
                lambda *args: _against_cpu(name, input_of(args)),
                slower_on_cpu,
                cpu_plan,
            ),
            Implementation("cuda", cuda, lambda *args: _against_cuda(name, input_of(args))),
            Implementation(
                "triton",
                lambda *args: _run_kernels("triton", _triton_kernels(), name, args),
                lambda *args: _against_triton(name, input_of(args)),
            ),
            Implementation("reference", getattr(reference, name)),
        ),
    )


depthwise_conv2d_forward = _operation("depthwise_conv2d_forward", slower_on_cpu=_slower_forward)
depthwise_conv2d_backward = _operation("depthwise_conv2d_backward", 1, slower_on_cpu=_slower_backward)
separable_conv2d_forward = _operation("separable_conv2d_forward", cpu_plan=_separable_plan)
separable_conv2d_train_forward = _operation("separable_conv2d_train_forward")
separable_conv2d_train_backward = _operation("separable_conv2d_train_backward", 1)
