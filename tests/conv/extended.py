"""Depthwise convolution in numpy's long double, tap by tap, gradients written out: the oracle of float64.

Independent of torch's convolution, whose float64 rounds as that of a kernel does.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from fusednn.conv import checks

from .cases import Work

Array = np.ndarray
_erf = np.vectorize(math.erf, otypes=[np.longdouble])
_ROOT_2, _ROOT_2_PI = np.sqrt(np.longdouble(2)), np.sqrt(2 / np.longdouble(np.pi))


def _gelu(z: Array) -> tuple[Array, Array]:
    cdf = (1 + _erf(z / _ROOT_2)) / 2 if z.size else z
    return z * cdf, cdf + z * np.exp(-z * z / 2) * _ROOT_2_PI / 2


def _gelu_tanh(z: Array) -> tuple[Array, Array]:
    t = np.tanh(_ROOT_2_PI * (z + np.longdouble("0.044715") * z**3))
    slope = _ROOT_2_PI * (1 + 3 * np.longdouble("0.044715") * z * z)
    return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t * t) * slope / 2


def _silu(z: Array) -> tuple[Array, Array]:
    s = 1 / (1 + np.exp(-z))
    return z * s, s * (1 + z * (1 - s))


# Value and derivative.
ACTIVATIONS = {
    None: lambda z: (z, np.ones_like(z)),
    "relu": lambda z: (np.maximum(z, 0), (z > 0).astype(z.dtype)),
    "relu6": lambda z: (np.clip(z, 0, 6), ((z > 0) & (z < 6)).astype(z.dtype)),
    "silu": _silu,
    "hardswish": lambda z: (
        z * np.clip(z + 3, 0, 6) / 6,
        np.where(z <= -3, 0, np.where(z < 3, z / 3 + np.longdouble(0.5), 1)),
    ),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


def extended_results(work: Work) -> dict[str, torch.Tensor]:
    """Return the output and every gradient by name, rounded to float64 at the end."""
    x, w, b = (
        None if t is None else t.detach().cpu().numpy().astype(np.longdouble) for t in work.tensors.values()
    )
    d = work.grad.cpu().numpy().astype(np.longdouble)
    options = {k: v for k, v in work.options.items() if k != "activation"}
    kernel = w.shape[2:]
    (s_y, s_x), (top, bottom, left, right), (d_y, d_x) = checks.geometry(
        "oracle", kernel, options.get("stride", 1), options.get("padding", 0), options.get("dilation", 1)
    )
    multiplier = w.shape[0] // x.shape[1]
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    rows, columns = d.shape[2:]

    def window(a: Array, u: int, v: int) -> Array:
        y, z = u * d_y, v * d_x
        return a[:, :, y : y + s_y * (rows - 1) + 1 : s_y, z : z + s_x * (columns - 1) + 1 : s_x]

    taps = [(u, v) for u in range(kernel[0]) for v in range(kernel[1])]
    product = np.zeros(d.shape, np.longdouble) + (0 if b is None else b[:, None, None])
    for u, v in taps:
        product += np.repeat(window(padded, u, v), multiplier, 1) * w[:, 0, u, v, None, None]
    out, slope = ACTIVATIONS[work.options.get("activation")](product)
    d = d * slope
    d_padded, d_w = np.zeros_like(padded), np.zeros_like(w)
    for u, v in taps:
        d_w[:, 0, u, v] = (d * np.repeat(window(padded, u, v), multiplier, 1)).sum((0, 2, 3))
        taken = (d * w[:, 0, u, v, None, None]).reshape(*x.shape[:2], multiplier, rows, columns).sum(2)
        window(d_padded, u, v)[...] += taken
    height, width = x.shape[2:]
    results = {
        "output": out,
        "grad of input": d_padded[:, :, top : top + height, left : left + width],
        "grad of weight": d_w,
        "grad of bias": d.sum((0, 2, 3)),
    }
    return {name: torch.from_numpy(value.astype(np.float64)) for name, value in results.items()}
