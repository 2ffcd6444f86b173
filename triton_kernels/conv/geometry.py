"""A convolution's tensors and numbers, checked and in the form that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.arguments import INT32_MAX
from ..core.checks import Check
from .arguments import Image, Numbers, Window


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """Format of torch's result: channels-last if the input or a weight is."""
    from torch._prims_common import suggest_memory_format

    last = torch.channels_last
    return last if any(suggest_memory_format(t) == last for t in tensors) else torch.contiguous_format


class Convolution:
    """Of a call: input [N, C, H, W], weight [C m, 1, kh, kw] and bias [C m], dense and in one format."""

    def __init__(self, call: Any, weight: Tensor, bias: Tensor | None, *other_weights: Tensor) -> None:
        """Raises RuntimeError if a shape, dtype or device does not fit."""
        self.check = check = Check.of_call(call, "input", 4)
        input, in_channels = call.input, call.input.shape[1]
        self.channels = weight.shape[0]  # of the result
        self.multiplier = self.channels // max(in_channels, 1)
        if weight.dim() != 4 or weight.shape[1] != 1 or self.channels % max(in_channels, 1):
            raise check.error(
                f"weight: got shape {list(weight.shape)}, expected [{in_channels} m, 1, kh, kw]"
            )
        self.stride, self.dilation = tuple(call.stride), tuple(call.dilation)
        self.pad = (call.padding[0], call.padding[2])  # top, left
        self.out_size = self._output_size(call, weight.shape[2:])
        self.format = memory_format(input, weight, *other_weights)
        self.last = self.format is torch.channels_last
        self.input = input.contiguous(memory_format=self.format)
        self.weight = check.dense("weight", weight, weight.shape)
        self.bias = check.dense("bias", bias, [self.channels])

    def _output_size(self, call: Any, kernel: Sequence[int]) -> tuple[int, int]:
        input, (top, bottom, left, right) = call.input, call.padding
        sizes = zip(
            input.shape[2:], (top + bottom, left + right), kernel, self.stride, self.dilation, strict=True
        )
        height, width = ((n + p - d * (k - 1) - 1) // s + 1 for n, p, k, s, d in sizes)
        if min(height, width) < 1:
            raise self.check.error(
                f"input: got shape {list(input.shape)} and padding {list(call.padding)}, expected at least "
                f"the kernel's reach, {list(kernel)} with dilation {list(self.dilation)}"
            )
        if max(input.shape[2], height) * input.shape[0] > INT32_MAX:
            raise self.check.error(f"input: got {list(input.shape)}, expected fewer than 2^31 rows")
        return height, width

    def result_like(self, name: str, t: Tensor, channels: int) -> Tensor:
        """`t`, images of the result's size, in its format."""
        shape = [self.input.shape[0], channels, *self.out_size]
        return self.check(name, t, shape).contiguous(memory_format=self.format)

    def empty_result(self, channels: int) -> Tensor:
        """Uninitialised images of the result's size."""
        shape = (self.input.shape[0], channels, *self.out_size)
        return torch.empty(shape, dtype=self.input.dtype, device=self.input.device, memory_format=self.format)

    def image(self, t: Tensor) -> Image:
        """Dense images in the call's format; torch's strides are arbitrary where a size is 1."""
        _, channels, height, width = t.shape
        strides = (1, width * channels, channels) if self.last else (height * width, width, 1)
        return Image(t, height * width * channels, *strides, height, width)

    def window(self, stride: tuple[int, int] | None = None) -> Window:
        """Stride, which may be another, and dilation."""
        return Window(*(stride or self.stride), *self.dilation)

    def positions(self, t: Tensor) -> int:
        """Of all images of `t`."""
        return t.shape[0] * t.shape[2] * t.shape[3]

    def numbers(self, t: Tensor, pad: tuple[int, int] | None = None) -> Numbers:
        """Run-time numbers of a kernel that goes through the positions of `t`."""
        return Numbers(self.positions(t), *(pad or self.pad), self.weight.shape[2])
