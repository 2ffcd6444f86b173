"""Attention over positions: scores, softmax and attended features.

    s = w f + term     a = softmax(s / T)     out = f a, or sums of f a or (x, y) a

Tiling: a program takes BLOCK_P positions of a sample, all of them where it can: scores [BLOCK_G, BLOCK_P] in
registers while channels come in, BLOCK_C at a time; the softmax; the map; features once more, from the
caches, for f a. Larger maps take `splits` programs: each makes weights exp((s - m) / T) of its own largest
score m, their sum and the sums that they weigh, and a second kernel brings all to the common m (an online
softmax), in a fixed order, without atomics. Without a weight the term is the scores: a softmax alone, or
additive scores, which `additive` made before.
Bytes moved: s (C P + G P + |out|) a sample, s = item size; split, 8 or 16 G P more, and scale and flatten
read the features again. Arithmetic in float32 (float64 for float64), offsets of 64 bits.
Limits: dense images; fewer than 2^29 positions, and 2^31 tiles in a batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.storage import load, store
from .arguments import Inputs
from .math import combined, coordinate, or_one, or_zero, place_of, row_of, temperature_of, weight_of
from .scores import feature_tile, scores


@triton.jit
def _weighed_sums(inputs, to, a, first, place, numbers, C: tl.constexpr):
    """Sums over the tile of a f, or of a (x, y); those of map k from to[first + k items] on."""
    if C.OUTPUT == "coordinates":
        g = tl.arange(0, C.BLOCK_G)[:, None]
        x, y = place.p % numbers.width, place.p // numbers.width
        sum_x = tl.sum(a * coordinate(x, numbers.width, a.dtype), 1, keep_dims=True)
        sum_y = tl.sum(a * coordinate(y, numbers.height, a.dtype), 1, keep_dims=True)
        store(to, first + g * 2, sum_x, g < C.MAPS)
        store(to, first + g * 2 + 1, sum_y, g < C.MAPS)
    else:
        channels = numbers.channels
        for c0 in range(0, channels, C.BLOCK_C):
            c = c0 + tl.arange(0, C.BLOCK_C)[:, None]
            f = feature_tile(inputs.features, place, c, (c < channels) & place.shown)
            for k in range(C.MAPS):
                sums = tl.sum(f * row_of(a, k), 1, keep_dims=True)
                store(to, first + k * channels + c, sums, c < channels)


@triton.jit
def _store_scaled(inputs, attended, a, place, channels, C: tl.constexpr):
    for c0 in range(0, channels, C.BLOCK_C):
        c = c0 + tl.arange(0, C.BLOCK_C)[:, None]
        f = feature_tile(inputs.features, place, c, (c < channels) & place.shown)
        to = place.n * attended.sample + c.to(tl.int64) * attended.channel + place.p * attended.position
        for k in range(C.MAPS):
            there = (c < channels) & place.present
            store(attended.data, to + k * attended.map, f * row_of(a, k), there)


@triton.jit(do_not_specialize=["numbers"])
def attention_forward_kernel(inputs, attended, map, parts, numbers, C: tl.constexpr):
    """Map and attended features, or, given `parts`, the tile's weights, their stats and sums."""
    inputs = Inputs(*inputs)
    accumulator: tl.constexpr = tl.float64 if map.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    place = place_of(program, inputs, numbers, C)
    t = temperature_of(inputs, numbers, accumulator)
    s = scores(inputs, place, numbers, accumulator, C)
    largest = tl.max(s, 1, keep_dims=True)
    a = weight_of(s - or_zero(largest), t)
    total = tl.sum(a, 1, keep_dims=True)
    g = tl.arange(0, C.BLOCK_G)[:, None]
    at = (place.n * C.MAPS + g) * numbers.positions + place.p
    if parts is not None:
        store(parts.weights, at, a, place.present & (g < C.MAPS))
        row = (program.to(tl.int64) * C.MAPS + g) * 2
        store(parts.stats, row, largest, g < C.MAPS)
        store(parts.stats, row + 1, total, g < C.MAPS)
    else:
        a = tl.where(place.shown, a / or_one(total), 0.0)
        store(map, at, a, place.present & (g < C.MAPS))
    if C.OUTPUT == "sum" or C.OUTPUT == "coordinates":
        items = numbers.channels if C.OUTPUT == "sum" else 2
        to = attended.data
        if parts is not None:
            to = parts.sums
        _weighed_sums(inputs, to, a, program.to(tl.int64) * C.MAPS * items, place, numbers, C)
    elif C.OUTPUT != "map" and parts is None:
        _store_scaled(inputs, attended, a, place, numbers.channels, C)


@triton.jit
def _combine_sums(parts, attended, n, splits, items, k, largest, total, t, C: tl.constexpr):
    """Map k's sums over all tiles; largest and total [BLOCK_G, 1]."""
    largest, total = tl.sum(row_of(largest, k)), tl.sum(row_of(total, k))
    for i0 in range(0, items, C.BLOCK_C):
        i = i0 + tl.arange(0, C.BLOCK_C)
        all = tl.zeros((C.BLOCK_C,), parts.sums.dtype.element_ty)
        for j in range(splits):
            row = (n * splits + j) * C.MAPS + k
            factor = weight_of(tl.load(parts.stats + row * 2) - or_zero(largest), t)
            all += load(parts.sums, row * items + i, i < items) * factor
        store(attended, (n * C.MAPS + k) * items + i, all / or_one(total), i < items)


@triton.jit(do_not_specialize=["numbers"])
def attention_combine_kernel(inputs, attended, map, parts, numbers, C: tl.constexpr):
    """Map and attended features from what the tiles of a sample made."""
    inputs = Inputs(*inputs)
    accumulator: tl.constexpr = parts.stats.dtype.element_ty
    program, splits = tl.program_id(0), numbers.splits
    n = (program // splits).to(tl.int64)
    t = temperature_of(inputs, numbers, accumulator)
    g = tl.arange(0, C.BLOCK_G)[:, None]
    largest, total = combined(parts.stats, n, splits, g, t, C)
    if C.OUTPUT == "sum" or C.OUTPUT == "coordinates":
        items = numbers.channels if C.OUTPUT == "sum" else 2
        if program % splits == 0:
            for k in range(C.MAPS):
                _combine_sums(parts, attended.data, n, splits, items, k, largest, total, t, C)
    own = tl.load(parts.stats + (program.to(tl.int64) * C.MAPS + g) * 2, mask=g < C.MAPS, other=0.0)
    factor = weight_of(own - or_zero(largest), t)
    place = place_of(program, inputs, numbers, C)  # after the loops, which have no registers to spare for it
    at = (n * C.MAPS + g) * numbers.positions + place.p
    a = load(parts.weights, at, place.shown & (g < C.MAPS)) * factor
    a = tl.where(place.shown, a / or_one(total), 0.0)
    store(map, at, a, place.present & (g < C.MAPS))
    if C.OUTPUT == "scale" or C.OUTPUT == "flatten":
        _store_scaled(inputs, attended, a, place, numbers.channels, C)
