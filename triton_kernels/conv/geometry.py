"""A convolution's tensors and numbers, checked and in the form that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.support import DTYPES

INT32_MAX = 2**31 - 1


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """Format of torch's result: channels-last if the input or a weight is."""
    from torch._prims_common import suggest_memory_format

    last = torch.channels_last
    return last if any(suggest_memory_format(t) == last for t in tensors) else torch.contiguous_format


@dataclass(frozen=True)
class Convolution:
    """Input [N, C, H, W], weight [C m, 1, kh, kw] and bias [C m], dense and in one format; see `of`."""

    op: str
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    pad: tuple[int, int]  # top, left
    dilation: tuple[int, int]
    out_size: tuple[int, int]
    format: torch.memory_format

    @classmethod
    def of(
        cls,
        op: str,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        *other_weights: Tensor,
    ) -> Convolution:
        """Raises RuntimeError if a shape, dtype or device does not fit."""
        if input.dim() != 4 or input.dtype not in DTYPES:
            raise RuntimeError(
                f"{op}: input: got {input.dtype} of shape {list(input.shape)}, expected float32, float64, "
                "float16 or bfloat16 of 4 dimensions"
            )
        channels, in_channels = weight.shape[0], input.shape[1]
        if weight.dim() != 4 or weight.shape[1] != 1 or channels % max(in_channels, 1):
            raise RuntimeError(
                f"{op}: weight: got shape {list(weight.shape)}, expected [{in_channels} m, 1, kh, kw]"
            )
        top, bottom, left, right = padding
        sizes = zip(
            input.shape[2:], (top + bottom, left + right), weight.shape[2:], stride, dilation, strict=True
        )
        height, width = ((n + p - d * (k - 1) - 1) // s + 1 for n, p, k, s, d in sizes)
        if min(height, width) < 1:
            raise RuntimeError(
                f"{op}: input: got shape {list(input.shape)} and padding {list(padding)}, expected at least "
                f"the kernel's reach, {list(weight.shape[2:])} with dilation {list(dilation)}"
            )
        if max(input.shape[2], height) * input.shape[0] > INT32_MAX:
            raise RuntimeError(f"{op}: input: got {list(input.shape)}, expected fewer than 2^31 rows")
        fmt = memory_format(input, weight, *other_weights)
        found = cls(
            op,
            input.contiguous(memory_format=fmt),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            (stride[0], stride[1]),
            (top, left),
            (dilation[0], dilation[1]),
            (height, width),
            fmt,
        )
        found.checked("weight", weight, list(weight.shape))
        if bias is not None:
            found.checked("bias", bias, [channels])
        return found

    @property
    def channels(self) -> int:
        """Of the result."""
        return self.weight.shape[0]

    @property
    def multiplier(self) -> int:
        """Channels of the result for one of the input."""
        return self.channels // max(self.input.shape[1], 1)

    @property
    def last(self) -> bool:
        """Whether images are [N, H, W, C] in memory."""
        return self.format is torch.channels_last

    def checked(self, name: str, t: Tensor, shape: list[int]) -> Tensor:
        """`t`, after checking that it has this shape, and the input's dtype and device."""
        if list(t.shape) != shape:
            raise RuntimeError(f"{self.op}: {name}: got shape {list(t.shape)}, expected {shape}")
        if t.dtype != self.input.dtype or t.device != self.input.device:
            raise RuntimeError(
                f"{self.op}: {name}: got {t.dtype} on {t.device}, expected {self.input.dtype} on "
                f"{self.input.device} as input"
            )
        return t

    def image(self, name: str, t: Tensor, channels: int) -> Tensor:
        """`t`, an image of the result's size, in its format."""
        shape = [self.input.shape[0], channels, *self.out_size]
        return self.checked(name, t, shape).contiguous(memory_format=self.format)

    def empty_image(self, channels: int) -> Tensor:
        """An uninitialised image of the result's size."""
        shape = (self.input.shape[0], channels, *self.out_size)
        return torch.empty(shape, dtype=self.input.dtype, device=self.input.device, memory_format=self.format)

    def strides(self, channels: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Of dimensions N, C, H, W of a dense image, in elements; torch's are arbitrary where a size is 1."""
        if self.last:
            return height * width * channels, 1, width * channels, channels
        return height * width * channels, height * width, width, 1
