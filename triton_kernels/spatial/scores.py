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
def feature_tile(features, place, c, mask):
    """Features [BLOCK_C, BLOCK_P] in the type of the arithmetic."""
    at = c.to(tl.int64) * features.channel + place.p * features.position
    return load(features.data + place.n * features.sample, at, mask)


@triton.jit
def weighted_channels(inputs, place, numbers, accumulator: tl.constexpr, C: tl.constexpr):
    """Sums w f over channels [BLOCK_G, BLOCK_P]; weight [G, C]."""
    channels = numbers.channels
    g = tl.arange(0, C.BLOCK_G)[:, None]
    if C.MAPS == 1:
        sums = tl.zeros((C.BLOCK_C, C.BLOCK_P), accumulator)
    else:
        sums = tl.zeros((C.BLOCK_G, C.BLOCK_P), accumulator)
    for c0 in range(0, channels, C.BLOCK_C):
        c = c0 + tl.arange(0, C.BLOCK_C)[:, None]
        f = feature_tile(inputs.features, place, c, (c < channels) & place.shown)
        if C.MAPS == 1:
            sums += load(inputs.weight, c, c < channels) * f
        else:
            for k in range(C.MAPS):
                products = load(inputs.weight + k * channels, c, c < channels) * f
                sums += tl.where(g == k, tl.sum(products, 0, keep_dims=True), 0.0)
    if C.MAPS == 1:
        sums = tl.sum(sums, 0, keep_dims=True)
    return sums


@triton.jit
def energies(inputs, a0, place, numbers, accumulator: tl.constexpr, C: tl.constexpr):
    """The rows tanh(W f + term) from a0 on [BLOCK_A, BLOCK_P]; weight [A, C], term [N, A] or None."""
    channels, rows, features = numbers.channels, numbers.rows, inputs.features
    a = a0 + tl.arange(0, C.BLOCK_A)[:, None]
    products = tl.zeros((C.BLOCK_A, C.BLOCK_P), accumulator)
    for c0 in range(0, channels, C.BLOCK_C):
        c = c0 + tl.arange(0, C.BLOCK_C)
        here = (a < rows) & (c < channels)[None, :]
        w = tl.load(inputs.weight + a * channels + c[None, :], mask=here, other=0.0)
        at = place.n * features.sample + c[:, None].to(tl.int64) * features.channel
        at = at + place.p * features.position
        f = tl.load(features.data + at, mask=(c < channels)[:, None] & place.shown, other=0.0)
        products = multiplied(w, f, products, C.PRECISION)
    if inputs.term is not None:
        products += load(inputs.term + place.n * rows, a, a < rows)
    return tanh(products)


@triton.jit
def scores(inputs, place, numbers, accumulator: tl.constexpr, C: tl.constexpr):
    """Scores [BLOCK_G, BLOCK_P], -inf where nothing is shown; without a weight, the term [G, P] itself."""
    g = tl.arange(0, C.BLOCK_G)[:, None]
    here = place.shown & (g < C.MAPS)
    if inputs.weight is not None:
        s = weighted_channels(inputs, place, numbers, accumulator, C)
    else:
        s = tl.zeros((C.BLOCK_G, C.BLOCK_P), accumulator)
    if inputs.term is not None:
        s += load(inputs.term, (place.n * C.MAPS + g) * numbers.positions + place.p, here)
    return tl.where(here, s, float("-inf"))


@triton.jit
def output_gradient(grad, place, k, c, mask, channels, C: tl.constexpr):
    """The gradient of what map k weighs, [BLOCK_C, BLOCK_P], or, of a sum over positions, [BLOCK_C, 1]."""
    if C.OUTPUT == "sum":
        d = load(grad.data + (place.n * C.MAPS + k) * channels, c, c < channels)
    else:
        at = c.to(tl.int64) * grad.channel + place.p * grad.position
        d = load(grad.data + place.n * grad.sample + k * grad.map, at, mask)
    return d
