"""Activations of the convolutions and their derivatives.

For blocks of float32 or float64; NaN stays NaN.

silu        z s                        s = sigmoid(z)
hardswish   z min(max(z + 3, 0), 6) / 6
gelu        z (1 + erf(z / sqrt 2)) / 2                        (Hendrycks & Gimpel 2016)
gelu_tanh   z (1 + tanh(k (z + 0.044715 z^3))) / 2             k = sqrt(2 / pi)
"""

import triton
import triton.language as tl

from ..core.activations import exp_nonpositive, sigmoid, tanh


@triton.jit
def _normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_tanh_factor(z):
    return tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """The activation of z."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == "silu":
        z = z * sigmoid(z)
    elif ACTIVATION == "hardswish":
        z = z * tl.where(z < -3, 0.0, tl.where(z > 3, 6.0, z + 3.0)) / 6.0
    elif ACTIVATION == "gelu":
        z = z * _normal_cdf(z)
    elif ACTIVATION == "gelu_tanh":
        z = 0.5 * z * (1.0 + _gelu_tanh_factor(z))
    return z


@triton.jit
def activation_gradient(d, z, ACTIVATION: tl.constexpr):
    """d, the gradient of the activated z, taken back to z."""
    if ACTIVATION == "relu":
        d = tl.where(z <= 0, 0.0, d)
    elif ACTIVATION == "relu6":
        d = tl.where((z <= 0) | (z >= 6), 0.0, d)
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        d = d * s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "hardswish":
        d = tl.where(z <= -3, 0.0, tl.where(z < 3, d * (z / 3.0 + 0.5), d))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * exp_nonpositive(-0.5 * z * z)
        d = d * (_normal_cdf(z) + z * density)
    elif ACTIVATION == "gelu_tanh":
        t = _gelu_tanh_factor(z)
        slope = 0.7978845608028654 * (1.0 + 0.134145 * z * z)
        d = d * 0.5 * (1.0 + t + z * (1.0 - t * t) * slope)
    return d
