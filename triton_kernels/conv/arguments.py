"""The named tuples that the kernels of the convolutions take."""

from __future__ import annotations

from typing import Any, NamedTuple


class Image(NamedTuple):
    """Images [N, C, H, W], their strides and size: one kernel serves both memory formats."""

    data: Any
    n: Any
    c: Any
    y: Any
    x: Any
    height: Any
    width: Any


class Weights(NamedTuple):
    """Of a convolution; the bias may be None."""

    weight: Any
    bias: Any


class Window(NamedTuple):
    """Stride and dilation."""

    stride_h: Any
    stride_w: Any
    dilation_h: Any
    dilation_w: Any


class Numbers(NamedTuple):
    """Run-time numbers that paddings and batches would make variants of in vain."""

    positions: Any  # of all images
    pad_top: Any
    pad_left: Any
    KH: Any  # a constant would have all rows of taps unrolled, and every load kept in registers


class Constants(NamedTuple):
    """What kernels are compiled for."""

    KH: Any  # of the gradients, whose taps have a loop or a dimension of their own
    KW: Any
    MULTIPLIER: Any
    BLOCK_P: Any  # positions
    BLOCK_C: Any  # channels
    FLIPPED: Any = False
    ACTIVATION: Any = "none"
    TAPS: Any = 0  # of a program of the weight's gradient
    BLOCK_O: Any = 0  # output channels of a block
    ACTIVATION2: Any = "none"
    PRECISION: Any = "ieee"


class Place(NamedTuple):
    """Positions of a program: made in the kernel."""

    image: Any  # 64 bits
    y: Any
    x: Any
    present: Any
