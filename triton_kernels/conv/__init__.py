"""Depthwise convolution and the depthwise-separable block."""

from .launch import depthwise_conv2d_backward as depthwise_conv2d_backward
from .launch import depthwise_conv2d_forward as depthwise_conv2d_forward
from .separable import separable_conv2d_forward as separable_conv2d_forward
from .separable import separable_conv2d_limits as separable_conv2d_limits
