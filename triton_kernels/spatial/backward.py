"""Gradients of the attention over positions, from the map alone.

    d a = d out's part + d map      d z = a (d a - sum_p a d a)      d s = d z / T
    d f = w^T d s + d out's part    d w = sum d s f    d term = d s    d T = -sum d z log(a / max a) / T

Tiling: a program takes BLOCK_P positions of a sample, all of them where it can, so that d a stays in
registers; else a kernel before makes d a and its sums. Additive scores continue in `spatial_additive`. Sums
over samples are two passes, without atomics: partials of each program, added in order by a second kernel.
Bytes moved of a sample: s (3 C P + 2 |d out|), s = item size, the second reading of features and d out from
the caches. Arithmetic in float32 (float64 for float64), offsets of 64 bits.
Limits: as those of `spatial_forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.storage import load, store
from .forward import SIZES
from .math import coordinate, row_of, temperature_of, tile_of, visible
from .scores import feature_tile, output_gradient


@triton.jit
def _map_gradient(
    features, grad, grad_map, n, p, shown, channels, positions, height, width,
    f_n, f_c, f_p, o_n, o_g, o_c, o_p, accumulator: tl.constexpr, OUTPUT: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The map's gradient d a [BLOCK_G, BLOCK_P]; 0 where masked."""
    g = tl.arange(0, BLOCK_G)[:, None]
    d = tl.zeros((BLOCK_G, BLOCK_P), accumulator)
    if grad is not None:
        if OUTPUT == "coordinates":
            d += load(grad, (n * MAPS + g) * 2, g < MAPS) * coordinate(p % width, width, accumulator)
            d += load(grad, (n * MAPS + g) * 2 + 1, g < MAPS) * coordinate(p // width, height, accumulator)
        else:
            for c0 in range(0, channels, BLOCK_C):
                c = c0 + tl.arange(0, BLOCK_C)[:, None]
                here = (c < channels) & shown
                f = feature_tile(features, n, c, p, here, f_n, f_c, f_p)
                for k in range(MAPS):
                    found = output_gradient(grad, n, k, c, p, here, channels, o_n, o_g, o_c, o_p, OUTPUT,
                                            MAPS)  # fmt: skip
                    d += tl.where(g == k, tl.sum(found * f, 0, keep_dims=True), 0.0)
    if grad_map is not None:
        d += load(grad_map, (n * MAPS + g) * positions + p, shown & (g < MAPS))
    return tl.where(shown & (g < MAPS), d, 0.0)


@triton.jit(do_not_specialize=SIZES)
def attention_map_gradient_kernel(
    features, mask, grad, grad_map, map, d_scores, stats, channels, positions, height, width, splits,
    f_n, f_c, f_p, o_n, o_g, o_c, o_p, mask_n, mask_p, OUTPUT: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The tile's d a, its sum a d a and largest a."""
    accumulator: tl.constexpr = d_scores.dtype.element_ty
    program = tl.program_id(0)
    n, p, present = tile_of(program, splits, positions, BLOCK_P)
    shown = visible(mask, n, p, present, mask_n, mask_p)
    d = _map_gradient(features, grad, grad_map, n, p, shown, channels, positions, height, width, f_n, f_c,
                      f_p, o_n, o_g, o_c, o_p, accumulator, OUTPUT, MAPS, BLOCK_G, BLOCK_C,
                      BLOCK_P)  # fmt: skip
    g = tl.arange(0, BLOCK_G)[:, None]
    at = (n * MAPS + g) * positions + p
    a = load(map, at, shown & (g < MAPS))
    store(d_scores, at, d, present & (g < MAPS))
    row = (program.to(tl.int64) * MAPS + g) * 2
    store(stats, row, tl.sum(a * d, 1, keep_dims=True), g < MAPS)
    store(stats, row + 1, tl.max(a, 1, keep_dims=True), g < MAPS)


@triton.jit
def _added_stats(stats, n, splits, g, MAPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Sum of a d a and largest a of each map [BLOCK_G, 1], over the sample's tiles in order."""
    first = stats + (n * splits * MAPS + g) * 2
    dot = tl.zeros((BLOCK_G, 1), stats.dtype.element_ty)
    largest = tl.zeros((BLOCK_G, 1), stats.dtype.element_ty)
    for j in range(splits):
        dot += load(first + j * MAPS * 2, 0, g < MAPS)
        theirs = load(first + j * MAPS * 2 + 1, 0, g < MAPS)
        largest = tl.where(theirs > largest, theirs, largest)
    return dot, largest


@triton.jit
def _logarithms(d_z, a, largest):
    """Sum of d z log(a / largest); in float64, as Triton's log of float32 is too coarse near 1."""
    ratio = a.to(tl.float64) / largest.to(tl.float64)
    log = tl.log(tl.where(d_z == 0, 1.0, ratio)).to(d_z.dtype)
    return tl.sum(d_z * log)


@triton.jit
def _feature_gradient(
    features, weight, grad, grad_features, partials, a, d_s, n, program, p, present, shown, channels,
    f_n, f_c, f_p, o_n, o_g, o_c, o_p, OUTPUT: tl.constexpr, MAPS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Positional: the features' gradient, and the tile's part of the weight's [G, C]."""
    for c0 in range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)[:, None]
        here = (c < channels) & shown
        if partials is not None:
            f = feature_tile(features, n, c, p, here, f_n, f_c, f_p)
            for k in range(MAPS):
                sums = tl.sum(f * row_of(d_s, k), 1, keep_dims=True)
                store(partials, (program.to(tl.int64) * MAPS + k) * channels + c, sums, c < channels)
        if grad_features is not None:
            d = tl.zeros((BLOCK_C, BLOCK_P), d_s.dtype)
            for k in range(MAPS):
                d += load(weight + k * channels, c, c < channels) * row_of(d_s, k)
                if grad is not None and OUTPUT != "coordinates":
                    d += row_of(a, k) * output_gradient(grad, n, k, c, p, here, channels, o_n, o_g, o_c, o_p,
                                                        OUTPUT, MAPS)  # fmt: skip
            to = n * f_n + c.to(tl.int64) * f_c + p * f_p
            store(grad_features, to, tl.where(here, d, 0.0), (c < channels) & present)


@triton.jit(do_not_specialize=SIZES)
def attention_backward_kernel(
    features, weight, mask, learned, grad, grad_map, map, d_scores, stats,
    grad_features, grad_term, weight_partials, temperature_partials, bits,
    channels, positions, height, width, splits, f_n, f_c, f_p, o_n, o_g, o_c, o_p, mask_n, mask_p,
    OUTPUT: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """What needs d s of a tile: all of positional scores. Given `d_scores`, it gets d s; it has d a if split.

    The gradients of features, term and temperature, and the weight's partials, may be None.
    """
    accumulator: tl.constexpr = tl.float64 if map.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    n, p, present = tile_of(program, splits, positions, BLOCK_P)
    shown = visible(mask, n, p, present, mask_n, mask_p)
    g = tl.arange(0, BLOCK_G)[:, None]
    at = (n * MAPS + g) * positions + p
    mine = present & (g < MAPS)
    a = load(map, at, shown & (g < MAPS))
    if stats is not None:
        d_a = load(d_scores, at, mine)
        dot, largest = _added_stats(stats, n, splits, g, MAPS, BLOCK_G)
    else:
        d_a = _map_gradient(features, grad, grad_map, n, p, shown, channels, positions, height, width,
                            f_n, f_c, f_p, o_n, o_g, o_c, o_p, accumulator, OUTPUT, MAPS, BLOCK_G, BLOCK_C,
                            BLOCK_P)  # fmt: skip
        dot, largest = tl.sum(a * d_a, 1, keep_dims=True), tl.max(a, 1, keep_dims=True)
    t = temperature_of(learned, bits, accumulator)
    d_z = tl.where(shown & (g < MAPS), a * (d_a - dot), 0.0)
    d_s = d_z / t
    if temperature_partials is not None:
        tl.store(temperature_partials + program, -_logarithms(d_z, a, largest) / t)
    if d_scores is not None:
        store(d_scores, at, d_s, mine)
    if grad_term is not None:
        store(grad_term, at, d_s, mine)
    if grad_features is not None or weight_partials is not None:
        _feature_gradient(features, weight, grad, grad_features, weight_partials, a, d_s, n, program, p,
                          present, shown, channels, f_n, f_c, f_p, o_n, o_g, o_c, o_p, OUTPUT, MAPS, BLOCK_C,
                          BLOCK_P)  # fmt: skip


@triton.jit(do_not_specialize=["count", "inner"])
def attention_add_partials_kernel(partials, sums, count, inner, BLOCK_J: tl.constexpr, BLOCK_I: tl.constexpr):
    """Sums [outer, inner] of partials [outer, count, inner], in one order."""
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    outer = tl.program_id(0).to(tl.int64)
    all = tl.zeros((BLOCK_J, BLOCK_I), partials.dtype.element_ty)
    for j0 in range(0, count, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)[:, None]
        all += load(partials, (outer * count + j) * inner + i, (j < count) & (i < inner))
    store(sums, outer * inner + i, tl.sum(all, 0, keep_dims=True), i < inner)
