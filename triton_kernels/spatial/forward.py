"""Attention over positions: scores, softmax and attended features.

    s = w f + term     a = softmax(s / T)     out = f a, or sums of f a or (x, y) a

Tiling: a program takes BLOCK_P positions of a sample, all of them where it can: scores [BLOCK_G, BLOCK_P] in
registers while channels come in, BLOCK_C at a time; the softmax; the map; features once more, from the
caches, for f a. Larger maps take `splits` programs: each makes weights exp((s - m) / T) of its own largest
score m, their sum and the sums that they weigh, and a second kernel brings all to the common m (an online
softmax), in a fixed order, without atomics. Without a weight the term is the scores: a softmax alone, or
additive scores, which `spatial_additive` made before.
Bytes moved: s (C P + G P + |out|) a sample, s = item size; split, 8 or 16 G P more, and scale and flatten
read the features again. Arithmetic in float32 (float64 for float64), offsets of 64 bits.
Limits: dense images; fewer than 2^29 positions, and 2^31 tiles in a batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.storage import load, store
from .math import (
    combined,
    coordinate,
    or_one,
    or_zero,
    row_of,
    temperature_of,
    tile_of,
    visible,
    weight_of,
)
from .scores import feature_tile, scores

# A size of 1 would become a constant, which has no dtype.
SIZES = ["bits", "channels", "rows", "positions", "height", "width", "splits"]


@triton.jit
def _weighed_sums(
    features, to, a, n, first, p, shown, channels, height, width, f_n, f_c, f_p, OUTPUT: tl.constexpr,
    MAPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums over the tile of a f, or of a (x, y); those of map k from to[first + k items] on."""
    if OUTPUT == "coordinates":
        g = tl.arange(0, BLOCK_G)[:, None]
        x = tl.sum(a * coordinate(p % width, width, a.dtype), 1, keep_dims=True)
        y = tl.sum(a * coordinate(p // width, height, a.dtype), 1, keep_dims=True)
        store(to, first + g * 2, x, g < MAPS)
        store(to, first + g * 2 + 1, y, g < MAPS)
    else:
        for c0 in range(0, channels, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)[:, None]
            f = feature_tile(features, n, c, p, (c < channels) & shown, f_n, f_c, f_p)
            for k in range(MAPS):
                sums = tl.sum(f * row_of(a, k), 1, keep_dims=True)
                store(to, first + k * channels + c, sums, c < channels)


@triton.jit
def _store_scaled(
    features, attended, a, n, p, present, shown, channels, f_n, f_c, f_p, o_n, o_g, o_c, o_p,
    MAPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[:, None]
        f = feature_tile(features, n, c, p, (c < channels) & shown, f_n, f_c, f_p)
        to = n * o_n + c.to(tl.int64) * o_c + p * o_p
        for k in range(MAPS):
            store(attended, to + k * o_g, f * row_of(a, k), (c < channels) & present)


@triton.jit(do_not_specialize=SIZES)
def attention_forward_kernel(
    features, weight, term, mask, learned, attended, map, weights, stats, sums, bits,
    channels, positions, height, width, splits, f_n, f_c, f_p, o_n, o_g, o_c, o_p, mask_n, mask_p,
    OUTPUT: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Map and attended features, or, given `stats`, the tile's weights, their stats and sums."""
    accumulator: tl.constexpr = tl.float64 if map.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    n, p, present = tile_of(program, splits, positions, BLOCK_P)
    shown = visible(mask, n, p, present, mask_n, mask_p)
    t = temperature_of(learned, bits, accumulator)
    s = scores(features, weight, term, n, p, shown, channels, positions, f_n, f_c, f_p, accumulator,
               MAPS, BLOCK_G, BLOCK_C, BLOCK_P)  # fmt: skip
    largest = tl.max(s, 1, keep_dims=True)
    a = weight_of(s - or_zero(largest), t)
    total = tl.sum(a, 1, keep_dims=True)
    g = tl.arange(0, BLOCK_G)[:, None]
    at = (n * MAPS + g) * positions + p
    if stats is not None:
        store(weights, at, a, present & (g < MAPS))
        row = (program.to(tl.int64) * MAPS + g) * 2
        store(stats, row, largest, g < MAPS)
        store(stats, row + 1, total, g < MAPS)
    else:
        a = tl.where(shown, a / or_one(total), 0.0)
        store(map, at, a, present & (g < MAPS))
    if OUTPUT == "sum" or OUTPUT == "coordinates":
        items = channels if OUTPUT == "sum" else 2
        to = attended
        if stats is not None:
            to = sums
        _weighed_sums(features, to, a, n, program.to(tl.int64) * MAPS * items, p, shown, channels, height,
                      width, f_n, f_c, f_p, OUTPUT, MAPS, BLOCK_G, BLOCK_C, BLOCK_P)  # fmt: skip
    elif OUTPUT != "map" and stats is None:
        _store_scaled(features, attended, a, n, p, present, shown, channels, f_n, f_c, f_p,
                      o_n, o_g, o_c, o_p, MAPS, BLOCK_C)  # fmt: skip


@triton.jit
def _combine_sums(
    stats, sums, attended, n, splits, items, k, largest, total, t, MAPS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Map k's sums over all tiles; largest and total [BLOCK_G, 1]."""
    largest, total = tl.sum(row_of(largest, k)), tl.sum(row_of(total, k))
    for i0 in range(0, items, BLOCK_C):
        i = i0 + tl.arange(0, BLOCK_C)
        all = tl.zeros((BLOCK_C,), sums.dtype.element_ty)
        for j in range(splits):
            row = (n * splits + j) * MAPS + k
            factor = weight_of(tl.load(stats + row * 2) - or_zero(largest), t)
            all += load(sums, row * items + i, i < items) * factor
        store(attended, (n * MAPS + k) * items + i, all / or_one(total), i < items)


@triton.jit(do_not_specialize=SIZES)
def attention_combine_kernel(
    features, mask, learned, attended, map, weights, stats, sums, bits, channels, positions, splits,
    f_n, f_c, f_p, o_n, o_g, o_c, o_p, mask_n, mask_p,
    OUTPUT: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Map and attended features from what the tiles of a sample made."""
    accumulator: tl.constexpr = stats.dtype.element_ty
    program = tl.program_id(0)
    n, p, present = tile_of(program, splits, positions, BLOCK_P)
    shown = visible(mask, n, p, present, mask_n, mask_p)
    t = temperature_of(learned, bits, accumulator)
    g = tl.arange(0, BLOCK_G)[:, None]
    largest, total = combined(stats, n, splits, g, t, MAPS, BLOCK_G)
    own = tl.load(stats + (program.to(tl.int64) * MAPS + g) * 2, mask=g < MAPS, other=0.0)
    factor = weight_of(own - or_zero(largest), t)
    at = (n * MAPS + g) * positions + p
    a = load(weights, at, shown & (g < MAPS)) * factor
    a = tl.where(shown, a / or_one(total), 0.0)
    store(map, at, a, present & (g < MAPS))
    if OUTPUT == "sum" or OUTPUT == "coordinates":
        items = channels if OUTPUT == "sum" else 2
        if program % splits == 0:
            for k in range(MAPS):
                _combine_sums(stats, sums, attended, n, splits, items, k, largest, total, t, MAPS, BLOCK_C)
    elif OUTPUT != "map":
        _store_scaled(features, attended, a, n, p, present, shown, channels, f_n, f_c, f_p,
                      o_n, o_g, o_c, o_p, MAPS, BLOCK_C)  # fmt: skip
