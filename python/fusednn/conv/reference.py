"""Depthwise convolution in plain PyTorch: the fallback on any machine and the oracle of every kernel.

    depthwise   out[n, c m + j, y, x] = act(b[c m + j] + sum over u, v of
                                            w[c m + j, 0, u, v] in[n, c, s y + d u - p, s x + d v - p])
    separable   out = act2(norm2(W2 act1(norm1(depthwise(in))))) + residual        (Howard et al. 2017)
    norm        (z - mean) rstd weight + bias, mean and rstd = 1 / sqrt(var + eps) over N, H, W
                (Ioffe & Szegedy 2015); a norm with frozen statistics is folded into the weights before it

Sums are taken in float32 or wider whatever the storage. Padding is (top, bottom, left, right), of zeros.
Everything is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.tensors import accumulation_dtype
from ..core.transforms import without_autocast
from .shapes import output_format, saved_format

_aten = torch.ops.aten

# Name: the function, and z's gradient for a gradient d. Both torch's, and so are kinks and NaN.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "none": (lambda z: z, lambda d, z: d),
    "relu": (F.relu, lambda d, z: _aten.threshold_backward(d, z, 0)),
    "relu6": (F.relu6, lambda d, z: _aten.hardtanh_backward(d, z, 0.0, 6.0)),
    "silu": (F.silu, lambda d, z: _aten.silu_backward(d, z)),
    "hardswish": (F.hardswish, lambda d, z: _aten.hardswish_backward(d, z)),
    "gelu": (F.gelu, lambda d, z: _aten.gelu_backward(d, z)),
    "gelu_tanh": (
        lambda z: F.gelu(z, approximate="tanh"),
        lambda d, z: _aten.gelu_backward(d, z, approximate="tanh"),
    ),
}


def _depthwise(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        input, top, left = F.pad(input, (left, right, top, bottom)), 0, 0
    return F.conv2d(input, weight, bias, stride, (top, left), dilation, groups=input.shape[1])


def _depthwise_backward(d, input, weight, stride, padding, dilation, output_mask) -> tuple[Tensor, ...]:
    """Gradients of input, weight and bias; None where masked."""
    top, bottom, left, right = padding
    symmetric = (top, left) == (bottom, right)
    if not symmetric:
        input = F.pad(input, (left, right, top, bottom))
    grad_input, *others = _aten.convolution_backward(
        d,
        input,
        weight,
        [weight.shape[0]],
        stride,
        [top, left] if symmetric else [0, 0],
        dilation,
        False,
        [0, 0],
        input.shape[1],
        list(output_mask),
    )
    if output_mask[0] and not symmetric:
        grad_input = F.pad(grad_input, (-left, -right, -top, -bottom))
    return grad_input, *others


def _wide(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.to(dtype) for t in tensors)


class Products:
    """The products of a block: torch's, in the accumulation dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = accumulation_dtype(dtype)

    def operands(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        """The operands of a pointwise product in the dtype that it is made in."""
        return _wide(self.dtype, *tensors)

    def depthwise(self, input, weight, bias, *options: Any) -> Tensor:
        """The activated depthwise product; `options` as depthwise_conv2d_forward's."""
        *geometry, activation = options
        return ACTIVATIONS[activation][0](_depthwise(*self.operands(input, weight, bias), *geometry))

    def depthwise_backward(self, d, input, weight, bias, *options: Any) -> tuple[Any, ...]:
        """Gradients of input, weight and bias; `options`: the geometry and which are wanted."""
        *geometry, output_mask = options
        arguments: Any = (*self.operands(d, input, weight), *geometry, output_mask)
        return _depthwise_backward(*arguments)


@without_autocast
def depthwise_conv2d_forward(
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C m, 1, kh, kw]
    bias: Tensor | None,  # [C m]
    stride: Sequence[int],
    padding: Sequence[int],  # top, bottom, left, right
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """Return the activated convolution [N, C m, H', W']."""
    x, w, b = _wide(accumulation_dtype(input.dtype), input, weight, bias)
    out = ACTIVATIONS[activation][0](_depthwise(x, w, b, stride, padding, dilation))
    return out.to(input.dtype).contiguous(memory_format=output_format(input, weight))


@without_autocast
def depthwise_conv2d_backward(
    grad_output: Tensor,  # [N, C m, H', W']
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of input, weight and bias; empty where masked."""
    d, x, w, b = _wide(accumulation_dtype(input.dtype), grad_output, input, weight, bias)
    if activation != "none":
        d = ACTIVATIONS[activation][1](d, _depthwise(x, w, b, stride, padding, dilation))
    grads = _depthwise_backward(d, x, w, stride, padding, dilation, output_mask)
    likes = (input, weight, weight.new_empty(weight.shape[0]))
    return _gradients_like(likes, grads, output_format(input, weight), output_mask)


def torchs_depthwise(call: Any) -> Tensor:
    """Torch's own convolution for a call of the forward, in the tensors' dtype."""
    return _depthwise(*call[:-1])


def torchs_depthwise_backward(call: Any) -> tuple[Tensor, ...]:
    """Torch's own gradients for a call of the backward, in the tensors' dtype."""
    operands = (call.grad_output, call.input, call.weight, call.stride, call.padding, call.dilation)
    grads = _depthwise_backward(*operands, call.output_mask)
    return tuple(call.input.new_empty(0) if g is None else g for g in grads)


def _gradients_like(likes: Sequence[Any], grads: Sequence[Any], fmt, output_mask) -> tuple[Tensor, ...]:
    """Give gradients the dtypes and strides of their tensors, the first one a format; empty where masked."""
    formats = (fmt, *[torch.preserve_format] * (len(likes) - 1))
    return tuple(
        _laid_out(g, like, its_format) if needed else likes[0].new_empty(0)
        for g, like, its_format, needed in zip(grads, likes, formats, output_mask, strict=True)
    )


def _laid_out(t: Any, like: Any, fmt: torch.memory_format) -> Tensor:
    """Give `t` the dtype of `like` and a format; preserve_format: the strides of ``empty_like(like)``."""
    t = t.to(like.dtype)
    if t.numel() == 0:  # a layout of nothing is kept by contiguous()
        return torch.empty_like(like, dtype=t.dtype, memory_format=fmt)
    if fmt is not torch.preserve_format:
        return t.contiguous(memory_format=fmt)
    strides = torch.empty_like(like, device="meta").stride()
    return t if t.stride() == strides else t.new_empty_strided(t.shape, strides).copy_(t)


@without_autocast
def separable_conv2d_forward(
    input: Tensor,  # [N, C, H, W]
    depthwise_weight: Tensor,  # [C m, 1, kh, kw]
    depthwise_bias: Tensor | None,  # [C m]
    pointwise_weight: Tensor,  # [C', C m, 1, 1]
    pointwise_bias: Tensor | None,  # [C']
    residual: Tensor | None,  # [N, C', H', W']
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    depthwise_activation: str,
    pointwise_activation: str,
    *,
    products: Products | None = None,
) -> Tensor:
    """Return ``act2(pointwise(act1(depthwise(input)))) + residual``, [N, C', H', W']."""
    products = products or Products(input.dtype)
    weights = (depthwise_weight, depthwise_bias)
    y = products.depthwise(input, *weights, stride, padding, dilation, depthwise_activation)
    z = F.conv2d(*products.operands(y, pointwise_weight, pointwise_bias))
    out = ACTIVATIONS[pointwise_activation][0](z.to(accumulation_dtype(input.dtype)))
    out = (out if residual is None else out + residual).to(input.dtype)
    return out.contiguous(memory_format=output_format(input, depthwise_weight, pointwise_weight))


def _statistics(z: Tensor, has_norm: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of z [N, C, H, W]; empty without a norm."""
    if not has_norm:
        return z.new_empty(0), z.new_empty(0)
    if z.numel() == 0:
        return z.new_zeros(z.shape[1]), z.new_zeros(z.shape[1])
    var, mean = torch.var_mean(z, dim=(0, 2, 3), correction=0)
    return mean, var


def _channels(t: Tensor) -> Tensor:
    return t[:, None, None]


def _normalised(z, mean, rstd, weight, bias, has_norm: bool) -> Tensor:
    if not has_norm:
        return z
    z = (z - _channels(mean)) * _channels(rstd)
    z = z if weight is None else z * _channels(weight)
    return z if bias is None else z + _channels(bias)


def _norm_backward(d, z, mean, rstd, weight, has_norm: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of z, of the norm's weight and of its bias: mean and variance are functions of z."""
    if not has_norm:
        return d, None, None
    xhat = (z - _channels(mean)) * _channels(rstd)
    d_weight, d_bias = (d * xhat).sum((0, 2, 3)), d.sum((0, 2, 3))
    count = max(z.numel() // z.shape[1], 1)
    d_z = d - _channels(d_bias / count) - xhat * _channels(d_weight / count)
    return d_z * _channels(rstd if weight is None else rstd * weight), d_weight, d_bias


@without_autocast
def separable_conv2d_train_forward(
    input: Tensor,  # [N, C, H, W]
    depthwise_weight: Tensor,  # [C m, 1, kh, kw]
    depthwise_bias: Tensor | None,  # [C m]
    norm1_weight: Tensor | None,  # [C m]
    norm1_bias: Tensor | None,  # [C m]
    pointwise_weight: Tensor,  # [C', C m, 1, 1]
    pointwise_bias: Tensor | None,  # [C']
    norm2_weight: Tensor | None,  # [C']
    norm2_bias: Tensor | None,  # [C']
    residual: Tensor | None,  # [N, C', H', W']
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    eps1: float,
    eps2: float,
    depthwise_activation: str,
    pointwise_activation: str,
    has_norm1: bool,
    has_norm2: bool,
    *,
    products: Products | None = None,
) -> tuple[Tensor, ...]:
    """Return the block's result, the pointwise product z2, and mean and rstd of both products.

    Statistics are of this batch; they are empty where there is no norm, and so is z2 where neither a norm nor
    an activation follows it, since no backward needs it.
    """
    dtype, wide = input.dtype, accumulation_dtype(input.dtype)
    products = products or Products(dtype)
    z1 = products.depthwise(input, depthwise_weight, depthwise_bias, stride, padding, dilation, "none")
    z1 = z1.to(dtype).to(wide)  # rounded as it is where it is kept
    mean1, var1 = _statistics(z1, has_norm1)
    rstd1 = (var1 + eps1).rsqrt()
    n1 = _normalised(z1, mean1, rstd1, norm1_weight, norm1_bias, has_norm1)
    y1 = ACTIVATIONS[depthwise_activation][0](n1)
    z2 = F.conv2d(*products.operands(y1, pointwise_weight, pointwise_bias)).to(dtype)
    mean2, var2 = _statistics(z2.to(wide), has_norm2)
    rstd2 = (var2 + eps2).rsqrt()
    n2 = _normalised(z2.to(wide), mean2, rstd2, norm2_weight, norm2_bias, has_norm2)
    out = ACTIVATIONS[pointwise_activation][0](n2)
    out = (out if residual is None else out + residual).to(dtype)
    tensors = (input, depthwise_weight, pointwise_weight)
    if needs_z2(has_norm2, pointwise_activation):
        z2 = _laid_out(z2, z2, saved_format(*tensors))
    else:
        z2 = z2.new_empty(0)
    return _laid_out(out, out, output_format(*tensors)), z2, mean1, rstd1, mean2, rstd2


def needs_z2(has_norm2: bool, pointwise_activation: str) -> bool:
    """Whether the backward reads the pointwise product."""
    return has_norm2 or pointwise_activation != "none"


@without_autocast
def separable_conv2d_train_backward(
    grad_out: Tensor,  # [N, C', H', W']
    input: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    z2: Tensor,  # [N, C', H', W'] or empty
    mean1: Tensor,
    rstd1: Tensor,
    mean2: Tensor,
    rstd2: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    depthwise_activation: str,
    pointwise_activation: str,
    has_norm1: bool,
    has_norm2: bool,
    output_mask: Sequence[bool],
    *,
    products: Products | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of the nine tensors from input to norm2_bias; empty where masked.

    That of the residual is ``grad_out``. The depthwise product z1, and y1 behind it, are made again.
    """
    dtype, wide = input.dtype, accumulation_dtype(input.dtype)
    products = products or Products(dtype)
    depthwise: Any = (input, depthwise_weight, depthwise_bias)
    z1 = products.depthwise(*depthwise, stride, padding, dilation, "none").to(dtype).to(wide)
    d, z2 = grad_out.to(wide), z2.to(wide)
    if pointwise_activation != "none":
        n2 = _normalised(z2, mean2, rstd2, norm2_weight, norm2_bias, has_norm2)
        d = ACTIVATIONS[pointwise_activation][1](d, n2)
    d, *d_norm2 = _norm_backward(d, z2, mean2, rstd2, norm2_weight, has_norm2)
    n1 = _normalised(z1, mean1, rstd1, norm1_weight, norm1_bias, has_norm1)
    y1 = ACTIVATIONS[depthwise_activation][0](n1)
    d_w2 = torch.einsum("nohw,nihw->oi", *products.operands(d, y1))[:, :, None, None]
    d_b2 = d.sum((0, 2, 3))
    d = F.conv_transpose2d(*products.operands(d, pointwise_weight)).to(wide)
    d = ACTIVATIONS[depthwise_activation][1](d, n1)
    d, *d_norm1 = _norm_backward(d, z1, mean1, rstd1, norm1_weight, has_norm1)
    d_depthwise = products.depthwise_backward(d, *depthwise, stride, padding, dilation, output_mask[:3])
    grads = (*d_depthwise, *d_norm1, d_w2, d_b2, *d_norm2)
    pointwise = (pointwise_weight, pointwise_bias, norm2_weight, norm2_bias)
    likes = (*depthwise, norm1_weight, norm1_bias, *pointwise)
    return _gradients_like(likes, grads, output_format(input, depthwise_weight), output_mask)
