"""Additive scores, and the gradients of their operands from that of the scores.

    s = v e    e = tanh(W f + u)    d e = (v^T d s) (1 - e e)    d v = sum d s e    d u = sum_p d e
    d f = W^T d e + d out's part    d W = sum d e f

Tiling: matrix products, a kernel each: s of BLOCK_P positions, one block e [BLOCK_A, BLOCK_P] after the
other; e made again, for d e; d f of [BLOCK_C, BLOCK_P]; d W of [BLOCK_A, BLOCK_C], over some of the samples,
in partials that `attention_add_partials_kernel` adds. W f of 16-bit types is made on tensor cores with
float32 sums, and so are products with d e, which is float32, as TF32: that holds the 16-bit operand exactly.
Products of float32 are exact unless torch.backends.cuda.matmul.allow_tf32.
Bytes moved of a sample, s = item size: forward s C P and 8 G P, features A / BLOCK_A times from the caches;
backward 12 A P (24 of float64) for d e, and features three times.
Limits: as those of `forward`; rows times channels below 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.storage import load, store
from .arguments import Incoming, Inputs
from .backward import store_features
from .math import multiplied, place_of
from .scores import energies, feature_tile, output_gradient


@triton.jit(do_not_specialize=["numbers"])
def attention_additive_scores_kernel(inputs, scores, numbers, C: tl.constexpr):
    """Scores [G, P] of a tile, in `scores`; those of masked positions have no meaning."""
    inputs = Inputs(*inputs)
    accumulator: tl.constexpr = scores.dtype.element_ty
    rows = numbers.rows
    place = place_of(tl.program_id(0), inputs, numbers, C)
    g = tl.arange(0, C.BLOCK_G)[:, None]
    s = tl.zeros((C.BLOCK_G, C.BLOCK_P), accumulator)
    for a0 in range(0, rows, C.BLOCK_A):
        e = energies(inputs, a0, place, numbers, accumulator, C)
        a = a0 + tl.arange(0, C.BLOCK_A)[:, None]
        for k in range(C.MAPS):
            products = load(inputs.v + k * rows, a, a < rows) * e
            s += tl.where(g == k, tl.sum(products, 0, keep_dims=True), 0.0)
    at = (place.n * C.MAPS + g) * numbers.positions + place.p
    store(scores, at, s, place.present & (g < C.MAPS))


@triton.jit(do_not_specialize=["numbers"])
def attention_energy_gradient_kernel(
    inputs, d_scores, d_energy, v_partials, term_partials, numbers, C: tl.constexpr
):
    """The tile's d e [A, P], and its parts of d v [G, A] and d u [A]; any of them may be None."""
    inputs = Inputs(*inputs)
    accumulator: tl.constexpr = d_scores.dtype.element_ty
    program, a0, rows = tl.program_id(0), tl.program_id(1) * C.BLOCK_A, numbers.rows
    place = place_of(program, inputs, numbers, C)
    a = a0 + tl.arange(0, C.BLOCK_A)[:, None]
    e = energies(inputs, a0, place, numbers, accumulator, C)
    e = tl.where(place.shown, e, 0.0)
    d_e = tl.zeros((C.BLOCK_A, C.BLOCK_P), accumulator)
    for k in range(C.MAPS):
        d_s = load(d_scores, (place.n * C.MAPS + k) * numbers.positions + place.p, place.present)
        d_e += load(inputs.v + k * rows, a, a < rows) * d_s
        if v_partials is not None:
            sums = tl.sum(d_s * e, 1, keep_dims=True)
            store(v_partials, (program.to(tl.int64) * C.MAPS + k) * rows + a, sums, a < rows)
    d_e = tl.where(place.shown, d_e * (1.0 - e * e), 0.0)
    if d_energy is not None:
        at = (place.n * rows + a) * numbers.positions + place.p
        store(d_energy, at, d_e, (a < rows) & place.present)
    if term_partials is not None:
        sums = tl.sum(d_e, 1, keep_dims=True)
        store(term_partials, program.to(tl.int64) * rows + a, sums, a < rows)


@triton.jit(do_not_specialize=["numbers"])
def attention_feature_gradient_kernel(inputs, incoming, d_energy, d_features, numbers, C: tl.constexpr):
    """The tile's d f."""
    inputs, incoming = Inputs(*inputs), Incoming(*incoming)
    channels, rows, positions = numbers.channels, numbers.rows, numbers.positions
    place = place_of(tl.program_id(0), inputs, numbers, C)
    c = tl.program_id(1) * C.BLOCK_C + tl.arange(0, C.BLOCK_C)[:, None]
    d = tl.zeros((C.BLOCK_C, C.BLOCK_P), d_energy.dtype.element_ty)
    for a0 in range(0, rows, C.BLOCK_A):
        a = a0 + tl.arange(0, C.BLOCK_A)
        w = load(inputs.weight, a[None, :] * channels + c, (a < rows)[None, :] & (c < channels))
        at = (place.n * rows + a[:, None]) * positions + place.p
        d = multiplied(w, load(d_energy, at, (a < rows)[:, None] & place.present), d, C.PRECISION)
    here = (c < channels) & place.shown
    if incoming.attended is not None and C.OUTPUT != "coordinates":
        for k in range(C.MAPS):
            found = output_gradient(incoming.attended, place, k, c, here, channels, C)
            d += load(incoming.map, (place.n * C.MAPS + k) * positions + place.p, place.shown) * found
    store_features(d_features, place, c, tl.where(here, d, 0.0), channels)


@triton.jit(do_not_specialize=["numbers", "tiles", "steps"])
def attention_weight_gradient_kernel(inputs, d_energy, partials, tiles, steps, numbers, C: tl.constexpr):
    """Sums d e f over `steps` of the `tiles` of all samples: partials [programs, A, C]."""
    inputs = Inputs(*inputs)
    channels, rows = numbers.channels, numbers.rows
    a = tl.program_id(1) * C.BLOCK_A + tl.arange(0, C.BLOCK_A)[:, None]
    c = tl.program_id(2) * C.BLOCK_C + tl.arange(0, C.BLOCK_C)
    sums = tl.zeros((C.BLOCK_A, C.BLOCK_C), partials.dtype.element_ty)
    first = tl.program_id(0) * steps
    for tile in range(first, tl.minimum(first + steps, tiles)):
        place = place_of(tile, inputs, numbers, C)
        at = (place.n * rows + a) * numbers.positions + place.p
        d_e = load(d_energy, at, (a < rows) & place.shown)
        f = feature_tile(inputs.features, place, c[:, None], (c < channels)[:, None] & place.shown)
        sums = multiplied(d_e, tl.trans(f), sums, C.PRECISION)
    to = (tl.program_id(0).to(tl.int64) * rows + a) * channels + c[None, :]
    store(partials, to, sums, (a < rows) & (c < channels)[None, :])
