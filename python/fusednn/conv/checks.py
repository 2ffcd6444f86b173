"""Arguments of a convolution, checked with torch's kind of error, in the form that the ops take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.checks import check_same_kind, check_tensor
from ..core.transforms import autocast_enabled
from .reference import ACTIVATIONS
from .shapes import output_size

IntOrPair = int | Sequence[int]


def activation_name(name: str, argument: str, activation: str | None) -> str:
    """Return the op's name of an activation; None stands for the identity.

    Raises:
        ValueError: there is no such activation.
        TypeError: it is no string.
    """
    if activation is None:
        return "none"
    if not isinstance(activation, str):
        raise TypeError(f"{name}: expected {argument} to be a name or None, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: {argument}: got {activation!r}, expected None, {', '.join(ACTIVATIONS)}")
    return activation


def pair(name: str, argument: str, value: IntOrPair, dims: int = 2) -> tuple[int, int]:
    """Return the two sizes that an int or a pair stands for; of one dimension, the same size twice."""
    values = (value,) if isinstance(value, (int, torch.SymInt)) else value
    if isinstance(values, (str, bytes, Tensor)) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected {argument} to be an int or a pair, got {type(value).__name__}")
    if not all(isinstance(v, (int, torch.SymInt)) for v in values):
        raise TypeError(f"{name}: expected {argument} to hold ints, got {value}")
    if len(values) not in (1, dims):
        raise RuntimeError(
            f"{name}: expected {argument} to be a single integer value or a list of {dims} values to match "
            f"the convolution dimensions, but got {argument}={list(values)}"
        )
    return (values[0], values[-1])


def geometry(
    name: str,
    kernel: Sequence[int],
    stride: IntOrPair,
    padding: IntOrPair | str,
    dilation: IntOrPair,
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    """Return stride, padding (top, bottom, left, right) and dilation.

    Raises:
        RuntimeError: a value is out of range, or ``"same"`` comes with a stride.
        TypeError: an argument is no int and no pair of ints.
    """
    strides, dilations = pair(name, "stride", stride), pair(name, "dilation", dilation)
    for argument, values in (("stride", strides), ("dilation", dilations)):
        if min(values) <= 0:
            raise RuntimeError(f"{name}: non-positive {argument} is not supported: got {list(values)}")
    if isinstance(padding, str):
        return strides, _named_padding(name, padding, kernel, strides, dilations), dilations
    vertical, horizontal = pair(name, "padding", padding)
    if min(vertical, horizontal) < 0:
        raise RuntimeError(f"{name}: negative padding is not supported: got {[vertical, horizontal]}")
    return strides, (vertical, vertical, horizontal, horizontal), dilations


def _named_padding(name, padding, kernel, stride, dilation) -> tuple[int, int, int, int]:
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding != "same":
        raise RuntimeError(f"{name}: Invalid padding string: got {padding!r}, expected 'same' or 'valid'")
    if stride != (1, 1):
        raise RuntimeError(f"{name}: padding='same' is not supported for strided convolutions")
    vertical, horizontal = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    return (vertical // 2, vertical - vertical // 2, horizontal // 2, horizontal - horizontal // 2)


def check_input(name: str, input: Tensor, dims: int = 2) -> None:
    """Raise torch's error unless the input has the rank of a batch or of a sample."""
    check_tensor(name, "input", input)
    if input.dim() not in (dims + 1, dims + 2):
        raise RuntimeError(
            f"Expected {dims + 1}D (unbatched) or {dims + 2}D (batched) input to {name}, "
            f"but got input of size: {list(input.shape)}"
        )


def check_depthwise(name: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check a batch [N, C, H, W] against the weight [C m, 1, kh, kw] and the bias [C m]."""
    channels = input.shape[1]
    if weight.dim() != 4:
        raise RuntimeError(
            f"{name}: expected weight to be of size [channels * multiplier, 1, kernel height, "
            f"kernel width], got {list(weight.shape)}"
        )
    if weight.shape[1] != 1 or channels == 0 or weight.shape[0] % channels or weight.shape[0] < channels:
        raise RuntimeError(
            f"{name}: Given weight of size {list(weight.shape)}, expected weight to be of size "
            f"[{channels} * multiplier, 1, kernel height, kernel width] for input of size "
            f"{list(input.shape)}, which has {channels} channels"
        )
    check_bias(name, "bias", weight, bias)
    others = (("weight", weight), ("bias", bias))
    check_same_kind(name, "input", input, others, autocast_enabled(input.device))


def check_pointwise(name: str, depthwise: Tensor, pointwise: Tensor, bias: Tensor | None) -> None:
    """Check the pointwise weight [C', C m, 1, 1] and its bias [C'] against the depthwise weight."""
    if pointwise.dim() != 4 or pointwise.shape[1:] != (depthwise.shape[0], 1, 1):
        raise RuntimeError(
            f"{name}: Given depthwise_weight of size {list(depthwise.shape)}, expected pointwise_weight to "
            f"be of size [out_channels, {depthwise.shape[0]}, 1, 1], but got {list(pointwise.shape)} instead"
        )
    check_bias(name, "pointwise_bias", pointwise, bias)


def check_residual(name, input, depthwise, pointwise, residual, options) -> None:
    """Check that a residual has the shape of the block's result: nothing is broadcast."""
    size = output_size(input.shape[2:], depthwise.shape[2:], *options)
    expected = (input.shape[0], pointwise.shape[0], *size)
    if tuple(residual.shape) != expected:
        raise RuntimeError(f"{name}: residual has shape {list(residual.shape)}, expected {list(expected)}")


def check_bias(name: str, argument: str, weight: Tensor, bias: Tensor | None) -> None:
    """Check a bias against the weight that it belongs to."""
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"{name}: Given weight of size {list(weight.shape)}, expected {argument} to be 1-dimensional "
            f"with {weight.shape[0]} elements, but got {argument} of size {list(bias.shape)} instead"
        )


def check_size(name, input: Tensor, kernel: Sequence[int], padding: Sequence[int], dilation) -> None:
    """Raise torch's error where the dilated kernel does not fit into the padded input."""
    if min(kernel) <= 0:
        raise RuntimeError(f"{name}: expected kernel sizes of at least 1, got weight for {list(kernel)}")
    padded = [input.shape[2] + padding[0] + padding[1], input.shape[3] + padding[2] + padding[3]]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise RuntimeError(
            f"{name}: Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: "
            f"({reach[0]} x {reach[1]}). Kernel size can't be greater than actual input size"
        )
    if 0 in (input.shape[2], input.shape[3]):
        raise RuntimeError(f"{name}: expected a non-empty image, got input of size {list(input.shape)}")


def cast_dtype(t: Tensor) -> torch.dtype:
    """Dtype of a convolution's argument once torch.autocast has had its say: it spares float64."""
    if not autocast_enabled(t.device) or not t.is_floating_point() or t.dtype == torch.float64:
        return t.dtype
    return torch.get_autocast_dtype(t.device.type)
