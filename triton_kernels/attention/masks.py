"""Gradient of a mask that is added to the scores: theirs, summed over what the mask is broadcast over.

    d mask = sum ds,  ds = p (dp - delta) as in `attention_rows`

Tiling: a program has one tile of the mask, whose sums stay in registers, and goes through `steps` of the
tiles of scores to which it is added: those of the samples, heads, tiles of rows and of keys in which the mask
has size 1. Few tiles of a small mask are split among programs: partials [splits, mask], which are then summed
in order. A mask that is full has no splits, and no memory beyond its gradient.
Bytes moved: q, k, v and g of every tile of scores; the gradient once, or `splits` times in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.storage import store
from .forward import SIZES
from .math import (
    drawn_weights,
    key_tiles,
    load_tile,
    number,
    products,
    raw_scores,
    visible_scores,
)
from .rows import load_lse, score_gradient, weight_gradient


@triton.jit
def _divided(n, size):
    """Remainder and quotient: the place in the fastest of the remaining dimensions, and the rest."""
    return n % size, n // size


@triton.jit(do_not_specialize=[*SIZES, "w_factor", "batch_size", "column_tiles", "steps", "splits"])
def attention_mask_gradient_kernel(
    q, k, v, mask, key_mask, slopes, cu_seqlens_q, cu_seqlens_k, seed, lse, low, delta, g, w, partials,
    heads, group, rows, columns, total_rows, tiles, scale, cap, keep_scale, threshold, left, right, offset,
    w_factor, batch_size, column_tiles, steps, splits,
    q_b, q_h, q_l, k_b, k_g, k_s, v_b, v_g, v_s, g_b, g_h, g_l,
    w_b, w_h, w_l, w_s, m_b, m_h, m_l, m_s, km_b, km_s,
    ONE_B: tl.constexpr, ONE_H: tl.constexpr, ONE_L: tl.constexpr, ONE_S: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Partials [splits, B, H, L, S], of size 1 where ONE_*; their type may be the mask's."""
    wide: tl.constexpr = lse.dtype.element_ty
    own_n, outer = _divided(tl.program_id(0), 1 if ONE_S else column_tiles)
    own_m, outer = _divided(outer, 1 if ONE_L else tiles)
    own_h, outer = _divided(outer, 1 if ONE_H else heads)
    own_b, split = _divided(outer, 1 if ONE_B else batch_size)
    all = split * 0 + 1
    if ONE_S:
        all *= column_tiles
    if ONE_L:
        all *= tiles
    if ONE_H:
        all *= heads
    if ONE_B:
        all *= batch_size
    keep = number(keep_scale, wide)
    sum = tl.zeros((BLOCK_M, BLOCK_N), wide)
    for step in range(split * steps, tl.minimum((split + 1) * steps, all)):
        n_tile, rest = _divided(step, column_tiles if ONE_S else 1)
        m_tile, rest = _divided(rest, tiles if ONE_L else 1)
        head, sequence = _divided(rest, heads if ONE_H else 1)
        head, sequence = own_h + head, own_b + sequence
        m0, n0 = (own_m + m_tile) * BLOCK_M, (own_n + n_tile) * BLOCK_N
        scoring, position = (scale, cap), (offset, left, right, slopes)
        begin, end, _full_begin, _full_end = key_tiles(m0, rows, columns, position, BLOCK_M, BLOCK_N)
        if (n0 >= begin) & (n0 < end):
            batch, h, g_head = sequence.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
            masks = (mask, batch * m_b, m_h, m_l, m_s, key_mask, batch * km_b, km_s)
            dropout = (seed, threshold, sequence)
            i, j = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
            q_tile = load_tile(q + batch * q_b + h * q_h, i, q_l, i < rows, D, BLOCK_D)
            k_tile = load_tile(k + batch * k_b + g_head * k_g, j, k_s, j < columns, D, BLOCK_D)
            s, t = raw_scores(products(q_tile, k_tile, PRECISION), scoring)
            s, kept = visible_scores(
                s, i[:, None], j[None, :], rows, columns, head, position, masks, True, NATURAL
            )
            dp = tl.zeros((BLOCK_M, BLOCK_N), wide)
            if g is not None:
                g_tile = load_tile(g + batch * g_b + h * g_h, i, g_l, i < rows, V, BLOCK_V)
                v_tile = load_tile(v + batch * v_b + g_head * v_g, j, v_s, j < columns, V, BLOCK_V)
                dp = products(g_tile, v_tile, PRECISION)
            if w is not None:
                weights = (w + batch * w_b, w_h, w_l, w_s, w_factor)
                dp += weight_gradient(weights, i[:, None], j[None, :], kept, head, wide)
            drawn = None
            if dropout[0] is not None:
                drawn = drawn_weights(dropout, head, i, n0, BLOCK_M, BLOCK_N)
            at = (batch * heads + h) * total_rows + i
            own, lost = load_lse(lse, low, at, i < rows, NATURAL)
            dot = tl.load(delta + at, mask=i < rows, other=0.0)[:, None]
            _p, _pz, ds, _dr = score_gradient(
                s, kept, t, dp, drawn, keep, own[:, None], lost[:, None], dot, scoring[1], True, NATURAL
            )
            sum += ds
    at = split.to(tl.int64)
    if not ONE_B:
        at = at * batch_size + own_b
    if not ONE_H:
        at = at * heads + own_h
    i, j = own_m * BLOCK_M + tl.arange(0, BLOCK_M), own_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if ONE_L:
        sum = tl.sum(sum, 0, keep_dims=True)
        row, here = at, (j < columns)[None, :]
    else:
        row, here = (at * rows + i)[:, None], (i < rows)[:, None] & (j < columns)[None, :]
    if ONE_S:
        sum = tl.sum(sum, 1, keep_dims=True)
        to = row + tl.zeros((1, 1), tl.int64)
        here = to >= 0 if ONE_L else (i < rows)[:, None]
    else:
        to = row * columns + j[None, :]
    store(partials, to, sum, here)
