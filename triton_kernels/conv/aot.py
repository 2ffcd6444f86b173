"""Calls of the convolutions whose kernels are compiled ahead of time, to see that none spills."""

from __future__ import annotations

import torch

from ..core.aot import AotCase, empty, launch
from .launch import depthwise_conv2d_backward, depthwise_conv2d_forward
from .separable import separable_conv2d_forward

_LAST, _FIRST = torch.channels_last, torch.contiguous_format
_SHAPE, _CHANNELS = (8, 64, 56, 56), 64
_WIDE, _NARROW = (torch.float32, torch.float64), (torch.float16, torch.bfloat16)


def _image(format: torch.memory_format, dtype: torch.dtype) -> torch.Tensor:
    return empty(*_SHAPE, dtype=dtype).to(memory_format=format)


def _depthwise(
    format: torch.memory_format, size: int, stride: int, activation: str, *dtypes: torch.dtype
) -> AotCase:
    """Forward and backward with a kernel of `size` x `size`."""

    def call(dtype: torch.dtype) -> None:
        inputs = (_image(format, dtype), empty(_CHANNELS, 1, size, size, dtype=dtype),
                  empty(_CHANNELS, dtype=dtype))  # fmt: skip
        options = ((stride, stride), (size // 2,) * 4, (1, 1), activation)
        output = launch(depthwise_conv2d_forward, *inputs, *options)
        launch(depthwise_conv2d_backward, output, *inputs, *options, (True, True, True))

    return AotCase(f"depthwise/{str(format)[6:]} k{size} s{stride} {activation}", call, dtypes)


def _separable(
    format: torch.memory_format, outputs: int, *dtypes: torch.dtype, tf32: bool = False
) -> AotCase:
    """Inference of the block with everything that it can have."""

    def call(dtype: torch.dtype) -> None:
        weights = (
            empty(_CHANNELS, 1, 3, 3, dtype=dtype), empty(_CHANNELS, dtype=dtype),
            empty(outputs, _CHANNELS, 1, 1, dtype=dtype), empty(outputs, dtype=dtype),
        )  # fmt: skip
        residual = empty(_SHAPE[0], outputs, *_SHAPE[2:], dtype=dtype)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            options = ((1, 1), (1,) * 4, (1, 1), "relu6", "none")
            launch(separable_conv2d_forward, _image(format, dtype), *weights, residual, *options)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    name = f"separable/{str(format)[6:]} {outputs}{' tf32' if tf32 else ''}"
    return AotCase(name, call, dtypes)


AOT_CASES = [
    case
    for format in (_LAST, _FIRST)
    for case in (
        _depthwise(format, 3, 1, "silu", *_WIDE, *_NARROW),
        _depthwise(format, 3, 2, "relu6", *_WIDE, *_NARROW),
        _depthwise(format, 5, 1, "gelu", *_WIDE),
        _depthwise(format, 7, 1, "none", *_WIDE),
        _depthwise(format, 9, 1, "gelu_tanh", torch.float64),
        _separable(format, 16, torch.float32),
        _separable(format, 64, torch.float16),
        _separable(format, 128, torch.float32),
        _separable(format, 128, torch.float32, tf32=True),
        _separable(format, 256, torch.bfloat16),
    )
]
