"""Depthwise convolution and the depthwise-separable block."""
