"""Depthwise and depthwise-separable convolution as functions: check, then call the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check_same_kind, check_tensor, check_tensors
from ..core.transforms import autocast, autocast_enabled, may_need_backward, under_transform
from . import batch_norm, checks, ops
from .checks import IntOrPair
from .shapes import output_size


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    *,
    activation: str | None = None,
) -> Tensor:
    """Convolve each channel with filters of its own, as ``F.conv2d(..., groups=channels)``, and activate.

    ``out[n, c m + j] = activation(bias[c m + j] + weight[c m + j, 0] * input[n, c])``, m being the channel
    multiplier and ``*`` cross-correlation. The output's height is
    ``floor((H + 2 padding - dilation (kh - 1) - 1) / stride) + 1``, its width likewise.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        weight: ``[C m, 1, kh, kw]``.
        bias: ``[C m]`` or None.
        stride: an int or a pair.
        padding: zeros around the image: an int, a pair, ``"same"`` (stride 1 only) or ``"valid"``.
        dilation: an int or a pair.
        activation: None, ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"``, ``"gelu"`` or ``"gelu_tanh"``.

    Returns:
        ``[N, C m, H', W']`` or ``[C m, H', W']``, in the memory format that ``F.conv2d`` gives.

    Raises:
        RuntimeError: a size, dtype, device or option does not fit; the text names the argument.
        TypeError: an argument is of another type.
        ValueError: there is no such activation.
    """
    name = "depthwise_conv2d"
    checks.check_input(name, input)
    check_tensor(name, "weight", weight)
    check_tensor(name, "bias", bias, optional=True)
    act = checks.activation_name(name, "activation", activation)
    batch = input if input.dim() == 4 else input.unsqueeze(0)
    checks.check_depthwise(name, batch, weight, bias)
    options = checks.geometry(name, weight.shape[2:], stride, padding, dilation)
    out = _depthwise(name, batch, weight, bias, *options, act)
    return out if input.dim() == 4 else out.squeeze(0)


def depthwise_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    *,
    causal: bool = False,
    activation: str | None = None,
) -> Tensor:
    """Convolve each channel of a sequence with filters of its own, as ``F.conv1d``, and activate.

    Args:
        input: ``[N, C, L]`` or ``[C, L]``.
        weight: ``[C m, 1, k]``.
        bias: ``[C m]`` or None.
        stride: an int.
        padding: zeros at both ends: an int, ``"same"`` (stride 1 only) or ``"valid"``.
        dilation: an int.
        causal: pad by ``dilation (k - 1)`` at the front and not at the end, so that no output sees a later
            input; `padding` must be 0 then.
        activation: as :func:`depthwise_conv2d`.

    Returns:
        ``[N, C m, L']`` or ``[C m, L']``.

    Raises:
        RuntimeError: a size, dtype, device or option does not fit; the text names the argument.
        TypeError: an argument is of another type.
        ValueError: there is no such activation, or `causal` comes with padding.
    """
    name = "depthwise_conv1d"
    checks.check_input(name, input, dims=1)
    check_tensor(name, "weight", weight)
    check_tensor(name, "bias", bias, optional=True)
    act = checks.activation_name(name, "activation", activation)
    if weight.dim() != 3:
        raise RuntimeError(
            f"{name}: expected weight to be of size [channels * multiplier, 1, kernel], "
            f"got {list(weight.shape)}"
        )
    batch = (input if input.dim() == 3 else input.unsqueeze(0)).unsqueeze(2)  # [N, C, 1, L]
    weight = weight.unsqueeze(2)  # [C m, 1, 1, k]
    checks.check_depthwise(name, batch, weight, bias)
    along = {"stride": stride, "dilation": dilation, "padding": 0 if isinstance(padding, str) else padding}
    step, reach, end = (checks.pair(name, n, v, dims=1)[0] for n, v in along.items())
    ends = padding if isinstance(padding, str) else (0, end)
    strides, pads, dilations = checks.geometry(name, weight.shape[2:], (1, step), ends, (1, reach))
    if causal:
        if any(pads):
            raise ValueError(f"{name}: padding: got {padding!r}, expected 0 where causal=True pads the front")
        pads = (0, 0, reach * (weight.shape[3] - 1), 0)
    out = _depthwise(name, batch, weight, bias, strides, pads, dilations, act).squeeze(2).contiguous()
    return out if input.dim() == 3 else out.squeeze(0)


def _depthwise(name, input, weight, bias, stride, padding, dilation, activation) -> Tensor:
    checks.check_size(name, input, weight.shape[2:], padding, dilation)
    input, weight, bias = autocast(input, weight, bias)
    return ops.depthwise_conv2d_forward(input, weight, bias, stride, padding, dilation, activation)


def depthwise_separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair | str = 0,
    dilation: IntOrPair = 1,
    *,
    depthwise_activation: str | None = None,
    pointwise_activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution, activation, 1×1 convolution, activation, residual: in one pass for inference.

    ``act2(pointwise_weight @ act1(depthwise(input)) + pointwise_bias) + residual`` (Howard et al. 2017).
    Norms with frozen statistics belong into weights and biases; for others see
    ``fusednn.DepthwiseSeparableConv2d``.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        depthwise_weight: ``[C m, 1, kh, kw]``.
        pointwise_weight: ``[C', C m, 1, 1]``.
        depthwise_bias: ``[C m]`` or None.
        pointwise_bias: ``[C']`` or None.
        stride: of the depthwise convolution: an int or a pair.
        padding: likewise: an int, a pair, ``"same"`` (stride 1 only) or ``"valid"``; zeros.
        dilation: likewise: an int or a pair.
        depthwise_activation: as the activation of :func:`depthwise_conv2d`.
        pointwise_activation: likewise.
        residual: of the result's shape, or None.

    Returns:
        ``[N, C', H', W']`` or ``[C', H', W']``.

    Raises:
        RuntimeError: a size, dtype, device or option does not fit; the text names the argument.
        TypeError: an argument is of another type.
        ValueError: there is no such activation.
    """
    name = "depthwise_separable_conv2d"
    checks.check_input(name, input)
    check_tensors(name, depthwise_weight=depthwise_weight, pointwise_weight=pointwise_weight)
    others = {"pointwise_bias": pointwise_bias, "residual": residual}
    check_tensors(name, optional=True, depthwise_bias=depthwise_bias, **others)
    acts = (
        checks.activation_name(name, "depthwise_activation", depthwise_activation),
        checks.activation_name(name, "pointwise_activation", pointwise_activation),
    )
    batched = input.dim() == 4
    batch = input if batched else input.unsqueeze(0)
    checks.check_depthwise(name, batch, depthwise_weight, depthwise_bias)
    checks.check_pointwise(name, depthwise_weight, pointwise_weight, pointwise_bias)
    others["pointwise_weight"] = pointwise_weight
    check_same_kind(name, "input", batch, others.items(), autocast_enabled(batch.device))
    kernel = depthwise_weight.shape[2:]
    options = checks.geometry(name, kernel, stride, padding, dilation)
    checks.check_size(name, batch, kernel, *options[1:])
    if residual is not None:
        residual = residual if batched else residual.unsqueeze(0)
        checks.check_residual(name, batch, depthwise_weight, pointwise_weight, residual, options)
    cast = autocast(batch, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual)
    out = _separable(cast, options, acts)
    return out if batched else out.squeeze(0)


def _separable(tensors: Sequence[Any], options: Sequence[Sequence[int]], acts: Sequence[str]) -> Tensor:
    input, w1, b1, w2, b2, residual = tensors
    recorded = input.dtype.is_floating_point and may_need_backward(*tensors)
    if not recorded or under_transform(*tensors):
        return ops.separable_conv2d_forward(*tensors, *options, *acts)
    return separable_training(input, (w1, b1, w2, b2), None, None, residual, options, acts)


def separable_training(
    input: Tensor,
    weights: Sequence[Tensor | None],
    norm1: nn.BatchNorm2d | None,
    norm2: nn.BatchNorm2d | None,
    residual: Tensor | None,
    options: Sequence[Sequence[int]],
    activations: Sequence[str | None],
) -> Tensor:
    """The block of checked arguments, with norms that take the batch's statistics, and track them.

    Args:
        input: ``[N, C, H, W]``.
        weights: depthwise weight and bias, pointwise weight and bias.
        norm1: after the depthwise product, or None.
        norm2: after the pointwise product, or None.
        residual: of the result's shape, or None.
        options: stride, padding (top, bottom, left, right) and dilation.
        activations: names of both.

    Raises:
        ValueError: a norm would see one value per channel.
    """
    w1, b1, w2, b2 = weights
    assert w1 is not None
    assert w2 is not None
    size = output_size(input.shape[2:], w1.shape[2:], *options)
    for norm, w in ((norm1, w1), (norm2, w2)):
        batch_norm.check_batch(norm, torch.Size((input.shape[0], w.shape[0], *size)))
    g1, s1, eps1 = (None, None, 0.0) if norm1 is None else (norm1.weight, norm1.bias, norm1.eps)
    g2, s2, eps2 = (None, None, 0.0) if norm2 is None else (norm2.weight, norm2.bias, norm2.eps)
    out, _z2, mean1, rstd1, mean2, rstd2 = ops.separable_conv2d_train_forward(
        input, w1, b1, g1, s1, w2, b2, g2, s2, residual, *options, eps1, eps2, *activations,
        norm1 is not None, norm2 is not None,
    )  # fmt: skip
    count = input.shape[0] * size[0] * size[1]
    batch_norm.track(norm1, mean1, rstd1, count)
    batch_norm.track(norm2, mean2, rstd2, count)
    return out
