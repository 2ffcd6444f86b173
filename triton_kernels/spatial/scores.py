"""Scores of positions from features.

    positional  s = w f + term [G, P]        additive  s = v tanh(W f + term [A])

Features are given by their strides of sample, channel and position, so that one kernel serves both memory
formats. Masked positions are not loaded: they count as 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.activations import tanh
from ..core.storage import load
from .math import multiplied


@triton.jit
def feature_tile(features, n, c, p, mask, f_n, f_c, f_p):
    """Features [BLOCK_C, BLOCK_P] in the type of the arithmetic."""
    return load(features + n * f_n, c.to(tl.int64) * f_c + p * f_p, mask)


@triton.jit
def weighted_channels(
    features, weight, n, p, shown, channels, f_n, f_c, f_p, accumulator: tl.constexpr,
    MAPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums w f over channels [BLOCK_G, BLOCK_P]; weight [G, C]."""
    g = tl.arange(0, BLOCK_G)[:, None]
    if MAPS == 1:
        sums = tl.zeros((BLOCK_C, BLOCK_P), accumulator)
    else:
        sums = tl.zeros((BLOCK_G, BLOCK_P), accumulator)
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[:, None]
        f = feature_tile(features, n, c, p, (c < channels) & shown, f_n, f_c, f_p)
        if MAPS == 1:
            sums += load(weight, c, c < channels) * f
        else:
            for k in range(MAPS):
                products = load(weight + k * channels, c, c < channels) * f
                sums += tl.where(g == k, tl.sum(products, 0, keep_dims=True), 0.0)
    if MAPS == 1:
        sums = tl.sum(sums, 0, keep_dims=True)
    return sums


@triton.jit
def energies(
    features, weight, term, n, a0, p, shown, channels, rows, f_n, f_c, f_p, accumulator: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The rows tanh(W f + term) from a0 on [BLOCK_A, BLOCK_P]; weight [A, C], term [N, A] or None."""
    a = a0 + tl.arange(0, BLOCK_A)[:, None]
    products = tl.zeros((BLOCK_A, BLOCK_P), accumulator)
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        here = (a < rows) & (c < channels)[None, :]
        w = tl.load(weight + a * channels + c[None, :], mask=here, other=0.0)
        at = n * f_n + c[:, None].to(tl.int64) * f_c + p * f_p
        f = tl.load(features + at, mask=(c < channels)[:, None] & shown, other=0.0)
        products = multiplied(w, f, products, PRECISION)
    if term is not None:
        products += load(term + n * rows, a, a < rows)
    return tanh(products)


@triton.jit
def scores(
    features, weight, term, n, p, shown, channels, positions, f_n, f_c, f_p, accumulator: tl.constexpr,
    MAPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_G, BLOCK_P], -inf where nothing is shown; without a weight, the term [G, P] itself."""
    here = shown & (tl.arange(0, BLOCK_G)[:, None] < MAPS)
    if weight is not None:
        s = weighted_channels(features, weight, n, p, shown, channels, f_n, f_c, f_p, accumulator,
                              MAPS, BLOCK_G, BLOCK_C, BLOCK_P)  # fmt: skip
    else:
        s = tl.zeros((BLOCK_G, BLOCK_P), accumulator)
    if term is not None:
        s += load(term, (n * MAPS + tl.arange(0, BLOCK_G)[:, None]) * positions + p, here)
    return tl.where(here, s, float("-inf"))


@triton.jit
def output_gradient(
    grad, n, k, c, p, mask, channels, o_n, o_g, o_c, o_p, OUTPUT: tl.constexpr, MAPS: tl.constexpr
):
    """The gradient of what map k weighs, [BLOCK_C, BLOCK_P], or, of a sum over positions, [BLOCK_C, 1]."""
    if OUTPUT == "sum":
        d = load(grad + (n * MAPS + k) * channels, c, c < channels)
    else:
        d = load(grad + n * o_n + k * o_g, c.to(tl.int64) * o_c + p * o_p, mask)
    return d
