"""Output sizes and memory formats: what kernels, fakes and checks agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Return ``floor((n + p - d (k - 1) - 1) / s) + 1`` for each of the two dimensions.

    `padding` is (top, bottom, left, right).
    """
    height, width = (
        (size[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return height, width


def output_format(*tensors: Tensor) -> torch.memory_format:
    """Memory format that torch's convolution gives: channels-last if input or a weight is."""
    last = torch.channels_last
    return last if any(suggest_memory_format(t) == last for t in tensors) else torch.contiguous_format


def saved_format(*tensors: Tensor) -> torch.memory_format:
    """Memory format of what a block's training keeps: the result's; on the CPU the kernels' own."""
    return torch.channels_last if tensors[0].device.type == "cpu" else output_format(*tensors)
