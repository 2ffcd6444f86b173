"""Gradients of the attention over positions, from the map alone.

    d a = d out's part + d map      d z = a (d a - sum_p a d a)      d s = d z / T
    d f = w^T d s + d out's part    d w = sum d s f    d term = d s    d T = -sum d z log(a / max a) / T

Tiling: a program takes BLOCK_P positions of a sample, all of them where it can, so that d a stays in
registers; else a kernel before makes d a and its sums. Additive scores continue in `additive`. Sums
over samples are two passes, without atomics: partials of each program, added in order by a second kernel.
Bytes moved of a sample: s (3 C P + 2 |d out|), s = item size, the second reading of features and d out from
the caches. Arithmetic in float32 (float64 for float64), offsets of 64 bits.
Limits: as those of `forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.storage import load, store
from .arguments import Incoming, Inputs
from .math import coordinate, place_of, row_of, temperature_of
from .scores import feature_tile, output_gradient


@triton.jit
def _map_gradient(inputs, incoming, place, numbers, accumulator: tl.constexpr, C: tl.constexpr):
    """The map's gradient d a [BLOCK_G, BLOCK_P]; 0 where masked."""
    grad, channels = incoming.attended, numbers.channels
    g = tl.arange(0, C.BLOCK_G)[:, None]
    d = tl.zeros((C.BLOCK_G, C.BLOCK_P), accumulator)
    if grad is not None:
        if C.OUTPUT == "coordinates":
            x, y = place.p % numbers.width, place.p // numbers.width
            at = (place.n * C.MAPS + g) * 2
            d += load(grad.data, at, g < C.MAPS) * coordinate(x, numbers.width, accumulator)
            d += load(grad.data, at + 1, g < C.MAPS) * coordinate(y, numbers.height, accumulator)
        else:
            for c0 in range(0, channels, C.BLOCK_C):
                c = c0 + tl.arange(0, C.BLOCK_C)[:, None]
                here = (c < channels) & place.shown
                f = feature_tile(inputs.features, place, c, here)
                for k in range(C.MAPS):
                    found = output_gradient(grad, place, k, c, here, channels, C)
                    d += tl.where(g == k, tl.sum(found * f, 0, keep_dims=True), 0.0)
    if incoming.grad_map is not None:
        at_map = (place.n * C.MAPS + g) * numbers.positions + place.p
        d += load(incoming.grad_map, at_map, place.shown & (g < C.MAPS))
    return d


@triton.jit(do_not_specialize=["numbers"])
def attention_map_gradient_kernel(inputs, incoming, d_scores, stats, numbers, C: tl.constexpr):
    """The tile's d a, its sum a d a and largest a."""
    inputs, incoming = Inputs(*inputs), Incoming(*incoming)
    program = tl.program_id(0)
    place = place_of(program, inputs, numbers, C)
    d = _map_gradient(inputs, incoming, place, numbers, d_scores.dtype.element_ty, C)
    g = tl.arange(0, C.BLOCK_G)[:, None]
    at = (place.n * C.MAPS + g) * numbers.positions + place.p
    a = load(incoming.map, at, place.shown & (g < C.MAPS))
    store(d_scores, at, d, place.present & (g < C.MAPS))
    row = (program.to(tl.int64) * C.MAPS + g) * 2
    store(stats, row, tl.sum(a * d, 1, keep_dims=True), g < C.MAPS)
    store(stats, row + 1, tl.max(a, 1, keep_dims=True), g < C.MAPS)


@triton.jit
def _added_stats(stats, n, splits, g, C: tl.constexpr):
    """Sum of a d a and largest a of each map [BLOCK_G, 1], over the sample's tiles in order."""
    first = stats + (n * splits * C.MAPS + g) * 2
    dot = tl.zeros((C.BLOCK_G, 1), stats.dtype.element_ty)
    largest = tl.zeros((C.BLOCK_G, 1), stats.dtype.element_ty)
    for j in range(splits):
        dot += load(first + j * C.MAPS * 2, 0, g < C.MAPS)
        theirs = load(first + j * C.MAPS * 2 + 1, 0, g < C.MAPS)
        largest = tl.where(theirs > largest, theirs, largest)
    return dot, largest


@triton.jit
def _logarithms(d_z, a, largest):
    """Sum of d z log(a / largest); in float64, as Triton's log of float32 is too coarse near 1."""
    ratio = a.to(tl.float64) / largest.to(tl.float64)
    log = tl.log(tl.where(d_z == 0, 1.0, ratio)).to(d_z.dtype)
    return tl.sum(d_z * log)


@triton.jit
def _feature_gradient(inputs, incoming, to, partials, a, d_s, program, place, channels, C: tl.constexpr):
    """Positional: the features' gradient, and the tile's part of the weight's [G, C]."""
    for c0 in range(0, channels, C.BLOCK_C):
        c = c0 + tl.arange(0, C.BLOCK_C)[:, None]
        here = (c < channels) & place.shown
        if partials is not None:
            f = feature_tile(inputs.features, place, c, here)
            for k in range(C.MAPS):
                sums = tl.sum(f * row_of(d_s, k), 1, keep_dims=True)
                store(partials, (program.to(tl.int64) * C.MAPS + k) * channels + c, sums, c < channels)
        if to is not None:
            d = tl.zeros((C.BLOCK_C, C.BLOCK_P), d_s.dtype)
            for k in range(C.MAPS):
                d += load(inputs.weight + k * channels, c, c < channels) * row_of(d_s, k)
                if incoming.attended is not None and C.OUTPUT != "coordinates":
                    found = output_gradient(incoming.attended, place, k, c, here, channels, C)
                    d += row_of(a, k) * found
            store_features(to, place, c, tl.where(here, d, 0.0), channels)


@triton.jit
def store_features(to, place, c, x, channels):
    """Writes [BLOCK_C, BLOCK_P] of images."""
    at = place.n * to.sample + c.to(tl.int64) * to.channel + place.p * to.position
    store(to.data, at, x, (c < channels) & place.present)


@triton.jit(do_not_specialize=["numbers"])
def attention_backward_kernel(
    inputs, incoming, d_scores, stats, d_features, d_term, weight_partials, temperature_partials, numbers,
    C: tl.constexpr,
):  # fmt: skip
    """What needs d s of a tile: all of positional scores. Given `d_scores`, it gets d s; it has d a if split.

    The gradients of features, term and temperature, and the weight's partials, may be None.
    """
    inputs, incoming = Inputs(*inputs), Incoming(*incoming)
    accumulator: tl.constexpr = tl.float64 if incoming.map.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0)
    place = place_of(program, inputs, numbers, C)
    g = tl.arange(0, C.BLOCK_G)[:, None]
    at = (place.n * C.MAPS + g) * numbers.positions + place.p
    mine = place.present & (g < C.MAPS)
    a = load(incoming.map, at, place.shown & (g < C.MAPS))
    if stats is not None:
        d_a = load(d_scores, at, mine)
        dot, largest = _added_stats(stats, place.n, numbers.splits, g, C)
    else:
        d_a = _map_gradient(inputs, incoming, place, numbers, accumulator, C)
        dot, largest = tl.sum(a * d_a, 1, keep_dims=True), tl.max(a, 1, keep_dims=True)
    t = temperature_of(inputs, numbers, accumulator)
    d_z = tl.where(place.shown & (g < C.MAPS), a * (d_a - dot), 0.0)
    d_s = d_z / t
    if temperature_partials is not None:
        tl.store(temperature_partials + program, -_logarithms(d_z, a, largest) / t)
    if d_scores is not None:
        store(d_scores, at, d_s, mine)
    if d_term is not None:
        store(d_term, at, d_s, mine)
    if d_features is not None or weight_partials is not None:
        _feature_gradient(inputs, incoming, d_features, weight_partials, a, d_s, program, place,
                          numbers.channels, C)  # fmt: skip


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
