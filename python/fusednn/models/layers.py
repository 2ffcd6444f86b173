"""Layers of the networks that torch has already fast, put together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conv import batch_norm
from ..core import dispatch
from ..core.children import against_hooks
from ..core.transforms import autocast_enabled, may_need_backward, needs_torchs_ops


class ConvNormReLU(nn.Module):
    r"""A convolution, a BatchNorm and a ReLU, whose norm is folded into the convolution for inference.

    Zeros pad by half of the kernel. The children ``conv``, ``norm`` and ``activation`` are torch's layers.
    They are called one by one in training, where a gradient is wanted, and where one has hooks; otherwise
    torch's convolution is called with the folded weights. ``fusednn.explain`` shows which.

    Args:
        in_channels: of the input.
        out_channels: of the result.
        kernel_size: odd.
        stride: in both directions.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False, **factory)
        self.norm = nn.BatchNorm2d(out_channels, **factory)
        self.activation = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        """Return ``relu(norm(conv(input)))``."""
        if torch.compiler.is_compiling():
            return self.activation(self.norm(self.conv(input)))
        reasons = self._against_folding(input)
        if reasons:
            if dispatch.explaining():
                dispatch.record_choice("conv_norm_relu", "torch", {"folded": tuple(reasons)})
            return self.activation(self.norm(self.conv(input)))
        if dispatch.explaining():
            dispatch.record_choice("conv_norm_relu", "folded", {})
        weight, bias = self._folded()
        return F.conv2d(input, weight, bias, self.conv.stride, self.conv.padding).relu_()

    def _sources(self) -> tuple[Tensor | None, ...]:
        norm = self.norm
        tensors = (self.conv.weight, self.conv.bias)
        return (*tensors, norm.weight, norm.bias, norm.running_mean, norm.running_var)

    def _against_folding(self, input: Tensor) -> list[str]:
        conv, norm, activation = self.conv, self.norm, self.activation
        if not isinstance(input, Tensor) or input.dim() != 4:
            return ["got an input that is no batch of images"]
        if torch._C._len_torch_dispatch_stack() > 0:
            return ["a dispatch mode watches the call"]
        if (type(conv), type(norm), type(activation)) != (nn.Conv2d, nn.BatchNorm2d, nn.ReLU):
            return ["a child was replaced"]
        reasons = against_hooks({"conv": conv, "norm": norm, "activation": activation})
        if reasons:
            return reasons
        if batch_norm.uses_batch_statistics(norm) or norm.running_mean is None or norm.running_var is None:
            return ["the norm takes its statistics from the batch"]
        if conv.padding_mode != "zeros" or conv.groups != 1 or conv.dilation != (1, 1):
            return ["the convolution is no plain one"]
        sources = self._sources()
        if needs_torchs_ops(input, *sources) or may_need_backward(input, *sources):
            return ["a gradient is wanted, or a function transform is under way"]
        plain = all(t is None or (t.device, t.dtype) == (input.device, input.dtype) for t in sources)
        if not plain or autocast_enabled(input.device):
            return ["devices or dtypes differ"]
        return []

    def _folded(self) -> tuple[Tensor, Tensor]:
        conv = self.conv
        with torch.no_grad():
            weight, bias = batch_norm.fold(conv.weight, conv.bias, self.norm)
            assert bias is not None
            return weight.to(conv.weight), bias.to(conv.weight)
