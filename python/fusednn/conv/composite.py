"""The separable block on a device: a backend's depthwise kernels and torch's pointwise products.

It trains every block there, and serves the inference of those that the fused kernel can't take. Products are
in the tensors' dtype, as torch's own; statistics, norms and activations in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import (
    ACTIVATIONS,
    _laid_out,
    _norm_backward,
    _normalised,
    _statistics,
    accumulation_dtype,
    needs_z2,
)
from .shapes import output_format, saved_format


def _activated(z: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation][0](z)


def _normalised_batch(z: Tensor, weight, bias, eps: float, has_norm: bool) -> tuple[Tensor, ...]:
    """The product z after a norm by its own statistics, its mean and 1 / sqrt(var + eps)."""
    mean, var = _statistics(z, has_norm)
    rstd = (var + eps).rsqrt()
    return _normalised(z, mean, rstd, weight, bias, has_norm), mean, rstd


class Composite:
    """The block's operations; `kernels` gives the module that has the depthwise ones for an input."""

    def __init__(self, kernels: Callable[[Tensor], ModuleType]) -> None:
        self._kernels = kernels

    def separable_conv2d_forward(
        self, input, w1, b1, w2, b2, residual, stride, padding, dilation, act1, act2
    ) -> Tensor:
        """As the reference's: ``act2(pointwise(act1(depthwise(input)))) + residual``."""
        kernels = self._kernels(input)
        y = kernels.depthwise_conv2d_forward(input, w1, b1, stride, padding, dilation, act1)
        z = F.conv2d(y, w2, b2).to(accumulation_dtype(input.dtype))
        out = _activated(z, act2)
        out = (out if residual is None else out + residual).to(input.dtype)
        return out.contiguous(memory_format=output_format(input, w1, w2))

    def separable_conv2d_train_forward(
        self, input, w1, b1, g1, s1, w2, b2, g2, s2, residual, stride, padding, dilation,
        eps1, eps2, act1, act2, has_norm1, has_norm2,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """As the reference's: the result, the pointwise product, statistics of both products."""
        dtype, wide = input.dtype, accumulation_dtype(input.dtype)
        kernels = self._kernels(input)
        z1 = kernels.depthwise_conv2d_forward(input, w1, b1, stride, padding, dilation, "none")
        y1, mean1, rstd1 = _normalised_batch(z1.to(wide), g1, s1, eps1, has_norm1)
        z2 = F.conv2d(_activated(y1, act1).to(dtype), w2, b2)
        y2, mean2, rstd2 = _normalised_batch(z2.to(wide), g2, s2, eps2, has_norm2)
        out = _activated(y2, act2)
        out = (out if residual is None else out + residual).to(dtype)
        out = _laid_out(out, out, output_format(input, w1, w2))
        kept = needs_z2(has_norm2, act2)
        z2 = _laid_out(z2, z2, saved_format(input, w1, w2)) if kept else z2.new_empty(0)
        return out, z2, mean1, rstd1, mean2, rstd2

    def separable_conv2d_train_backward(
        self, grad_out, input, w1, b1, g1, s1, w2, b2, g2, s2, z2, mean1, rstd1, mean2, rstd2,
        stride, padding, dilation, act1, act2, has_norm1, has_norm2, output_mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """As the reference's: gradients of the nine tensors from input to the second norm's bias."""
        dtype, wide = input.dtype, accumulation_dtype(input.dtype)
        kernels = self._kernels(input)
        geometry: tuple[Any, ...] = (stride, padding, dilation)
        u1 = kernels.depthwise_conv2d_forward(input, w1, b1, *geometry, "none").to(wide)
        d, u2 = grad_out.to(wide), z2.to(wide)
        if act2 != "none":
            n2 = _normalised(u2, mean2, rstd2, g2, s2, has_norm2)
            d = ACTIVATIONS[act2][1](d, n2)
        d, d_g2, d_s2 = _norm_backward(d, u2, mean2, rstd2, g2, has_norm2)
        n1 = _normalised(u1, mean1, rstd1, g1, s1, has_norm1)
        d_b2 = d.sum((0, 2, 3))
        d = d.to(dtype)
        d_w2 = torch.einsum("nohw,nihw->oi", d, _activated(n1, act1).to(dtype))[:, :, None, None]
        d = ACTIVATIONS[act1][1](F.conv_transpose2d(d, w2).to(wide), n1)
        d, d_g1, d_s1 = _norm_backward(d, u1, mean1, rstd1, g1, has_norm1)
        d_x, d_w1, d_b1 = kernels.depthwise_conv2d_backward(
            d.to(dtype), input, w1, b1, *geometry, "none", list(output_mask[:3])
        )
        grads = (d_x, d_w1, d_b1, d_g1, d_s1, d_w2, d_b2, d_g2, d_s2)
        likes = (input, w1, b1, g1, s1, w2, b2, g2, s2)
        formats = (output_format(input, w1), *[torch.preserve_format] * 8)
        return tuple(
            _laid_out(g, like, fmt) if needed else input.new_empty(0)
            for g, like, fmt, needed in zip(grads, likes, formats, output_mask, strict=True)
        )
