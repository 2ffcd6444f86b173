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
Limits: as those of `spatial_forward`; rows times channels below 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.storage import load, store
from .forward import SIZES
from .math import multiplied, tile_of, visible
from .scores import energies, feature_tile, output_gradient


@triton.jit(do_not_specialize=SIZES)
def attention_additive_scores_kernel(
    features, weight, term, v, mask, scores, channels, rows, positions, splits, f_n, f_c, f_p, mask_n,
    mask_p, PRECISION: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Scores [G, P] of a tile, in `scores`; those of masked positions have no meaning."""
    accumulator: tl.constexpr = scores.dtype.element_ty
    n, p, present = tile_of(tl.program_id(0), splits, positions, BLOCK_P)
    shown = visible(mask, n, p, present, mask_n, mask_p)
    g = tl.arange(0, BLOCK_G)[:, None]
    s = tl.zeros((BLOCK_G, BLOCK_P), accumulator)
    for a0 in range(0, rows, BLOCK_A):
        e = energies(features, weight, term, n, a0, p, shown, channels, rows, f_n, f_c, f_p, accumulator,
                     PRECISION, BLOCK_A, BLOCK_C, BLOCK_P)  # fmt: skip
        a = a0 + tl.arange(0, BLOCK_A)[:, None]
        for k in range(MAPS):
            products = load(v + k * rows, a, a < rows) * e
            s += tl.where(g == k, tl.sum(products, 0, keep_dims=True), 0.0)
    store(scores, (n * MAPS + g) * positions + p, s, present & (g < MAPS))


@triton.jit(do_not_specialize=SIZES)
def attention_energy_gradient_kernel(
    features, weight, term, v, mask, d_scores, d_energy, v_partials, term_partials,
    channels, rows, positions, splits, f_n, f_c, f_p, mask_n, mask_p,
    PRECISION: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The tile's d e [A, P], and its parts of d v [G, A] and d u [A]; any of them may be None."""
    accumulator: tl.constexpr = d_scores.dtype.element_ty
    program, a0 = tl.program_id(0), tl.program_id(1) * BLOCK_A
    n, p, present = tile_of(program, splits, positions, BLOCK_P)
    shown = visible(mask, n, p, present, mask_n, mask_p)
    a = a0 + tl.arange(0, BLOCK_A)[:, None]
    e = energies(features, weight, term, n, a0, p, shown, channels, rows, f_n, f_c, f_p, accumulator,
                 PRECISION, BLOCK_A, BLOCK_C, BLOCK_P)  # fmt: skip
    e = tl.where(shown, e, 0.0)
    d_e = tl.zeros((BLOCK_A, BLOCK_P), accumulator)
    for k in range(MAPS):
        d_s = load(d_scores, (n * MAPS + k) * positions + p, present)
        d_e += load(v + k * rows, a, a < rows) * d_s
        if v_partials is not None:
            sums = tl.sum(d_s * e, 1, keep_dims=True)
            store(v_partials, (program.to(tl.int64) * MAPS + k) * rows + a, sums, a < rows)
    d_e = tl.where(shown, d_e * (1.0 - e * e), 0.0)
    if d_energy is not None:
        store(d_energy, (n * rows + a) * positions + p, d_e, (a < rows) & present)
    if term_partials is not None:
        sums = tl.sum(d_e, 1, keep_dims=True)
        store(term_partials, program.to(tl.int64) * rows + a, sums, a < rows)


@triton.jit(do_not_specialize=SIZES)
def attention_feature_gradient_kernel(
    weight, mask, grad, map, d_energy, grad_features, channels, rows, positions, splits,
    f_n, f_c, f_p, o_n, o_g, o_c, o_p, mask_n, mask_p,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr, MAPS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The tile's d f."""
    n, p, present = tile_of(tl.program_id(0), splits, positions, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    d = tl.zeros((BLOCK_C, BLOCK_P), d_energy.dtype.element_ty)
    for a0 in range(0, rows, BLOCK_A):
        a = a0 + tl.arange(0, BLOCK_A)
        w = load(weight, a[None, :] * channels + c, (a < rows)[None, :] & (c < channels))
        d_e = load(d_energy, (n * rows + a[:, None]) * positions + p, (a < rows)[:, None] & present)
        d = multiplied(w, d_e, d, PRECISION)
    shown = visible(mask, n, p, present, mask_n, mask_p)
    here = (c < channels) & shown
    if grad is not None and OUTPUT != "coordinates":
        for k in range(MAPS):
            found = output_gradient(grad, n, k, c, p, here, channels, o_n, o_g, o_c, o_p, OUTPUT, MAPS)
            d += load(map, (n * MAPS + k) * positions + p, shown) * found
    to = n * f_n + c.to(tl.int64) * f_c + p * f_p
    store(grad_features, to, tl.where(here, d, 0.0), (c < channels) & present)


@triton.jit(do_not_specialize=[*SIZES, "tiles", "steps"])
def attention_weight_gradient_kernel(
    features, mask, d_energy, partials, channels, rows, positions, splits, tiles, steps,
    f_n, f_c, f_p, mask_n, mask_p, PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums d e f over `steps` of the `tiles` of all samples: partials [programs, A, C]."""
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)[:, None]
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_A, BLOCK_C), partials.dtype.element_ty)
    first = tl.program_id(0) * steps
    for tile in range(first, tl.minimum(first + steps, tiles)):
        n, p, present = tile_of(tile, splits, positions, BLOCK_P)
        shown = visible(mask, n, p, present, mask_n, mask_p)
        d_e = load(d_energy, (n * rows + a) * positions + p, (a < rows) & shown)
        here = (c < channels)[:, None] & shown
        f = feature_tile(features, n, c[:, None], p, here, f_n, f_c, f_p)
        sums = multiplied(d_e, tl.trans(f), sums, PRECISION)
    to = (tl.program_id(0).to(tl.int64) * rows + a) * channels + c[None, :]
    store(partials, to, sums, (a < rows) & (c < channels)[None, :])
