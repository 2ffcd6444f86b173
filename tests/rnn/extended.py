"""The cells in numpy's long double, gradients written out: the oracle of float64 results.

Beside float64 kernels the float64 reference is no oracle, since it rounds as they do.
"""

from __future__ import annotations

import numpy as np
import torch

from .cells import Workload

Array = np.ndarray


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def extended_results(work: Workload) -> dict[str, torch.Tensor]:
    """Return every output and gradient of a step by name, rounded to float64 at the end."""
    tensors = {
        name: None if t is None else t.detach().cpu().numpy().astype(np.longdouble)
        for name, t in work.tensors.items()
    }
    batch, hidden = work.tensors["h"].shape
    grads = [
        np.zeros((batch, hidden), np.longdouble) if g is None else g.cpu().numpy().astype(np.longdouble)
        for g in work.grads
    ]
    with np.errstate(all="ignore"):
        results = (_lstm if work.cell == "lstm" else _gru)(tensors, grads)
    return {name: torch.from_numpy(value.astype(np.float64)) for name, value in results.items()}


def _products(t: dict[str, Array | None]) -> tuple[Array, Array]:
    x, h = t["input"] @ t["weight_ih"].T, t["h"] @ t["weight_hh"].T
    return (x if t["bias_ih"] is None else x + t["bias_ih"]), (
        h if t["bias_hh"] is None else h + t["bias_hh"]
    )


def _parameter_grads(t, d_x: Array, d_h: Array) -> dict[str, Array]:
    return {
        "grad of input": d_x @ t["weight_ih"],
        "grad of weight_ih": d_x.T @ t["input"],
        "grad of weight_hh": d_h.T @ t["h"],
        "grad of bias_ih": d_x.sum(0),
        "grad of bias_hh": d_h.sum(0),
    }


def _lstm(t, grads) -> dict[str, Array]:
    x, h = _products(t)
    i, f, g, o = np.split(x + h, 4, axis=1)
    i, f, g, o = _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o)
    c = f * t["c"] + i * g
    tanh_c = np.tanh(c)
    d_h, d_c = grads
    d_c = d_c + d_h * o * (1 - tanh_c**2)
    d = (d_c * g * i * (1 - i), d_c * t["c"] * f * (1 - f), d_c * i * (1 - g**2), d_h * tanh_c * o * (1 - o))
    d = np.concatenate(d, axis=1)
    return {
        "h'": o * tanh_c,
        "c'": c,
        "grad of h": d @ t["weight_hh"],
        "grad of c": d_c * f,
        **_parameter_grads(t, d, d),
    }


def _gru(t, grads) -> dict[str, Array]:
    x, h = _products(t)
    (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(x, 3, axis=1), np.split(h, 3, axis=1)
    r, z = _sigmoid(x_r + h_r), _sigmoid(x_z + h_z)
    n = np.tanh(x_n + r * h_n)
    (d_out,) = grads
    d_n = d_out * (1 - z) * (1 - n**2)
    d_z = d_out * (t["h"] - n) * z * (1 - z)
    d_r = d_n * h_n * r * (1 - r)
    d_x = np.concatenate((d_r, d_z, d_n), axis=1)
    d_h = np.concatenate((d_r, d_z, d_n * r), axis=1)
    return {
        "h'": n + z * (t["h"] - n),
        "grad of h": d_h @ t["weight_hh"] + d_out * z,
        **_parameter_grads(t, d_x, d_h),
    }
