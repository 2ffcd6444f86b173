"""Depthwise convolution and the depthwise-separable block."""

from .launch import depthwise_conv2d_backward, depthwise_conv2d_forward
from .separable import separable_conv2d_forward, separable_conv2d_limits

__all__ = [
    "depthwise_conv2d_backward",
    "depthwise_conv2d_forward",
    "separable_conv2d_forward",
    "separable_conv2d_limits",
]
