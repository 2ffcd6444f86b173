"""torch.ops.fusednn.{depthwise,separable}_conv2d_*, declared.

The training forward of a block returns what its backward needs beside the result, except the depthwise
product, which is cheap to make again: so what is kept stays below half of eager's. On devices a block is made
of the depthwise kernels and torch's products, where there is no fused kernel that can serve it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import native
from ..core.backends import Backend, cpu, cuda, launch, torchs, triton
from ..core.dispatch import Reasons
from ..core.gradients import Gradients
from ..core.op import Op
from ..core.tensors import accumulation_dtype, where_needed
from . import reference
from .shapes import output_format, output_size, saved_format


class _KernelProducts(reference.Products):
    """The products of a block on a device: depthwise by a backend's kernels, the others by torch."""

    def __init__(self, kernels: Any, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.kernels, self.dtype = kernels, dtype

    def depthwise(self, input, weight, bias, *options: Any) -> Tensor:
        call = depthwise_conv2d_forward.Call(input, weight, bias, *options)
        return launch(self.kernels, "depthwise_conv2d_forward", call)

    def depthwise_backward(self, d, input, weight, bias, *options: Any) -> tuple[Any, ...]:
        *geometry, output_mask = options
        operands = (d.to(self.dtype), input, weight, bias)
        call = depthwise_conv2d_backward.Call(*operands, *geometry, "none", list(output_mask))
        return launch(self.kernels, "depthwise_conv2d_backward", call)


def _composed(function: Callable[..., Any]) -> tuple[Backend, Backend]:
    """The devices' backends of a block: the fused kernel of the name where it can serve, else products."""

    def run(kernels: Any, call: Any) -> Any:
        name, weights = function.__name__, (call.depthwise_weight, call.pointwise_weight)
        dtype, wide = call.input.dtype, call.depthwise_weight.dtype
        if dtype != wide:  # folded weights, which are not rounded to 16 bits
            residual = None if call.residual is None else call.residual.to(wide)
            return run(kernels, call._replace(input=call.input.to(wide), residual=residual)).to(dtype)
        if hasattr(kernels, name) and not kernels.separable_conv2d_limits(call.input, *weights):
            return launch(kernels, name, call)
        return function(*call, products=_KernelProducts(kernels, call.input.dtype))

    direction = "backward" if function.__name__.endswith("backward") else "forward"
    options: dict[str, Any] = {"run": run, "kernel": f"depthwise_conv2d_{direction}"}
    return cuda(**options), triton(**options)


# Where torch's own depthwise convolution was measured to be faster: docs/design/011-depthwise-alone.md.


def _measured_channels_last(input: Tensor) -> bool:
    dense = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return input.dtype == torch.float32 and dense


def _slower_forward(call: Any) -> Reasons:
    if call.input.shape[1] == 1 and call.weight.shape[0] > 1:
        return ["with one input channel torch has a plain convolution, 2 to 5 times as fast"]
    plain = call.activation == "none" and max(call.weight.shape[2:]) <= 5
    if plain and _measured_channels_last(call.input):
        return ["channels-last and without an activation, torch is 1.2 to 1.9 times as fast up to 5x5"]
    return []


def _slower_backward(call: Any) -> Reasons:
    multiplier = call.weight.shape[0] // max(1, call.input.shape[1])
    if call.input.shape[1] == 1 and multiplier > 1:
        return ["with one input channel torch has a plain convolution, about twice as fast"]
    if multiplier > 1 and _measured_channels_last(call.input):
        return ["channels-last with a multiplier, torch is 1.2 to 1.8 times as fast"]
    return []


def _torchs_activation(call: Any) -> Reasons:
    return [] if call.activation == "none" else [f"torch's convolution has no activation {call.activation}"]


def _plan(call: Any) -> dict[str, Any]:
    """Return what the CPU's planner decided on: one pass or two kernels, bytes moved, tasks."""
    if call.input.numel() == 0:
        return {}
    weights = (call.depthwise_weight, call.pointwise_weight)
    geometry = (call.stride, call.padding, call.dilation)
    plan = native.extension.cpu.separable_conv2d_plan(
        call.input, *weights, call.residual is not None, *geometry
    )
    return {"path": "fused" if plan.pop("fused") else "two kernels", **plan}


def _output(call: Any, *weights: Tensor) -> Tensor:
    """Like a result: the first of the weights is depthwise, the last has a filter for each channel of it."""
    x = call.input
    size = output_size(x.shape[2:], weights[0].shape[2:], call.stride, call.padding, call.dilation)
    shape, fmt = (x.shape[0], weights[-1].shape[0], *size), output_format(x, *weights)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=fmt)


def _fake_gradients(call: Any, weight: Tensor, parameters: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    fmt = output_format(call.input, weight)
    makers: list[Any] = [lambda: torch.empty_like(call.input, memory_format=fmt)]
    makers += [lambda p=p: torch.empty_like(p) for p in parameters]
    return where_needed(makers, call.output_mask, call.input)


def _fake_backward(call: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(call, call.weight, (call.weight, call.weight.new_empty(call.weight.shape[0])))


def _fake_block(call: Any) -> Tensor:
    return _output(call, call.depthwise_weight, call.pointwise_weight)


def _fake_training(call: Any) -> tuple[Tensor, ...]:
    out, w1, w2 = _fake_block(call), call.depthwise_weight, call.pointwise_weight
    z2 = out.new_empty(0)
    if reference.needs_z2(call.has_norm2, call.pointwise_activation):
        z2 = torch.empty_like(out, memory_format=saved_format(call.input, w1, w2))
    wide = accumulation_dtype(call.input.dtype)
    sizes = (w1.shape[0] if call.has_norm1 else 0, w2.shape[0] if call.has_norm2 else 0)
    return out, z2, *(out.new_empty(size, dtype=wide) for size in sizes for _ in ("mean", "rstd"))


def _fake_training_backward(call: Any) -> tuple[Tensor, ...]:
    first = call._fields.index("depthwise_weight")
    return _fake_gradients(call, call.depthwise_weight, call[first : first + 8])


def _inference_gradients(
    call: Any, cotangents: Mapping[str, Any], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of a block that was run, or traced, for inference: its products are made again."""
    training = dict.fromkeys(separable_conv2d_train_forward.arguments)
    training |= call._asdict() | {"eps1": 0.0, "eps2": 0.0, "has_norm1": False, "has_norm2": False}
    training["residual"] = None
    found = separable_conv2d_train_forward.overload(*training.values())
    saved = dict(zip(separable_conv2d_train_forward.results, found, strict=True))
    mask = [*needs[:3], False, False, *needs[3:], False, False]
    known = training | saved | {"grad_out": cotangents["out"], "output_mask": mask}
    backward = separable_conv2d_train_backward
    grads = backward.overload(*(known[name] for name in backward.arguments))
    return *grads[:3], *grads[5:7]


_BLOCK = (
    "input", "depthwise_weight", "depthwise_bias", "norm1_weight", "norm1_bias", "pointwise_weight",
    "pointwise_bias", "norm2_weight", "norm2_bias",
)  # fmt: skip

depthwise_conv2d_backward = Op(
    reference.depthwise_conv2d_backward,
    ("grad_input", "grad_weight", "grad_bias"),
    fake=_fake_backward,
    backends=(
        cpu(slower=_slower_backward),
        cuda(),
        triton(),
        torchs(reference.torchs_depthwise_backward, limits=_torchs_activation),
    ),
    like="input",
)
depthwise_conv2d_forward = Op(
    reference.depthwise_conv2d_forward,
    ("output",),
    fake=lambda call: _output(call, call.weight),
    backends=(
        cpu(slower=_slower_forward),
        cuda(),
        triton(),
        torchs(reference.torchs_depthwise, limits=_torchs_activation),
    ),
    gradients=Gradients(depthwise_conv2d_backward),
)
separable_conv2d_train_backward = Op(
    reference.separable_conv2d_train_backward,
    tuple(f"grad_{name}" for name in _BLOCK),
    fake=_fake_training_backward,
    backends=(cpu(), *_composed(reference.separable_conv2d_train_backward)),
    like="input",
)
separable_conv2d_train_forward = Op(
    reference.separable_conv2d_train_forward,
    ("out", "z2", "mean1", "rstd1", "mean2", "rstd2"),
    fake=_fake_training,
    backends=(cpu(), *_composed(reference.separable_conv2d_train_forward)),
    gradients=Gradients(separable_conv2d_train_backward, passed={"residual": "out"}),
)
separable_conv2d_forward = Op(
    reference.separable_conv2d_forward,
    ("out",),
    fake=_fake_block,
    backends=(cpu(plan=_plan), *_composed(reference.separable_conv2d_forward)),
    gradients=Gradients(
        by=_inference_gradients,
        of=("input", "depthwise_weight", "depthwise_bias", "pointwise_weight", "pointwise_bias"),
        passed={"residual": "out"},
    ),
)
