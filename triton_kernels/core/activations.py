"""sigmoid and tanh from exp alone, for blocks of float32 or float64.

exp only ever sees -|x| or -2|x|: nothing overflows, both tails keep their relative accuracy, NaN stays NaN.

    sigmoid(x) = 1 / (1 + e) for x >= 0,  e / (1 + e) below,   e = exp(-|x|)
    tanh(x)    = sign(x) (1 - e) / (1 + e),                    e = exp(-2|x|)
    tanh(x)    = x + x^3 P(x^2) for |x| < 0.64, where 1 - e would cancel

P is a Chebyshev fit of (tanh(x) / x - 1) / x^2 over x^2 in [0, 0.64^2]: degree 5 for float32 (fit error
2.1e-9), degree 11 for float64 (6.7e-18).
"""

import triton
import triton.language as tl


@triton.jit
def exp_nonpositive(x):
    """exp(x) for x <= 0.

    In float32 the device's exp multiplies by log2(e) first, an error of |x| ulp; x = n ln(2) + r avoids it.
    The upper part of ln(2) has 16 bits, so that n * upper is exact with and without a fused multiply-add.
    """
    if x.dtype == tl.float64:
        e = tl.exp(x)
    else:
        x = tl.where(x < -104.0, -104.0, x)
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = (x - n * 0.693145751953125) - n * 1.4286068203094172e-06
        e = tl.exp(r) * tl.exp2(n)
    return e


@triton.jit
def _tanh_polynomial(t):
    if t.dtype == tl.float64:
        p = t * 6.223438646457427e-06 - 3.0650442181390976e-05
        p = p * t + 9.207182073834182e-05
        p = p * t - 0.00023733530872779266
        p = p * t + 0.0005895797741135292
        p = p * t - 0.0014557589970229322
        p = p * t + 0.0035921196181059045
        p = p * t - 0.008863234931023884
        p = p * t + 0.021869488510927782
        p = p * t - 0.05396825396770339
        p = p * t + 0.1333333333333286
        p = p * t - 0.3333333333333333
    else:
        p = t * 0.0022460036 - 0.00830169581
        p = p * t + 0.0217557009
        p = p * t - 0.0539575964
        p = p * t + 0.133332968
        p = p * t - 0.333333343
    return p


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    e = exp_nonpositive(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, a few ulp of the result everywhere."""
    size = tl.abs(x)
    e = exp_nonpositive(-2.0 * size)
    away = (1.0 - e) / (1.0 + e)
    t = tl.where(size < 0.64, x * x, 0.0)
    near = x + x * (t * _tanh_polynomial(t))
    return tl.where(size < 0.64, near, tl.where(x < 0, -away, away))
