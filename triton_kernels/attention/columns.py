"""Gradients of attention that belong to keys: d k and d v.

    d v = (p z)^T g     d k = scale dr^T q,  dr and p as in `attention_rows`, transposed

Tiling: a program has BLOCK_N keys of one key head, which stay with their gradients; the rows of all query
heads that share the head come BLOCK_M at a time, so that nothing is added across programs: no atomics, and
the same bits every time. Scores are made transposed, [keys, rows], so that p and dr are the first operand of
a product as they lie in registers.
Bytes moved: k, v, d k and d v once; q and g of the group once for each tile of keys. Rows that don't exist
have an lse of inf, and so a weight of 0; what is computed for keys that don't exist or that their mask hides
stays in their own rows, and is not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import SIZES
from .math import (
    drawn_weights,
    kept_keys,
    load_tile,
    multiplied,
    number,
    products,
    raw_scores,
    row_tiles,
    sequence_of,
    store_tile,
    visible_scores,
)
from .rows import load_lse, score_gradient, weight_gradient


@triton.jit
def _column_step(
    state, q, k, v, g, n0, m0, head, rows, columns, sums, q_h, q_l, g_h, g_l, keep, scoring, position, masks,
    dropout,
    weights, MASKED: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The d k, still to be scaled, and d v with one more tile of rows, from m0, of one head."""
    d_k, d_v = state
    lse, low, delta, at_row, total_rows = sums
    h = head.to(tl.int64)
    i, j = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    here = i < rows
    q_tile = load_tile(q + h * q_h, i, q_l, here, D, BLOCK_D)
    s, t = raw_scores(products(k, q_tile, PRECISION), scoring)
    s, kept = visible_scores(s, i[None, :], j[:, None], rows, columns, head, position, masks, MASKED, NATURAL)
    at = at_row + h * total_rows + i
    own, lost = load_lse(lse, low, at, here, NATURAL)
    dp = tl.zeros((BLOCK_N, BLOCK_M), d_k.dtype)
    g_tile = None
    if g is not None:
        g_tile = load_tile(g + h * g_h, i, g_l, here, V, BLOCK_V)
        if KEYS:
            dp = products(v, g_tile, PRECISION)
    if weights[0] is not None:
        exists = here[None, :] & (j < columns)[:, None]
        dp += weight_gradient(weights, i[None, :], j[:, None], exists, head, d_k.dtype)
    drawn = None
    if dropout[0] is not None:
        drawn = tl.trans(drawn_weights(dropout, head, i, n0, BLOCK_M, BLOCK_N))
    dot = tl.load(delta + at, mask=here, other=0.0)
    _, pz, _, dr = score_gradient(
        s, kept, t, dp, drawn, keep, own[None, :], lost[None, :], dot[None, :], scoring[1], MASKED, NATURAL
    )
    if VALUES and g is not None:
        d_v = multiplied(pz, g_tile, d_v, PRECISION)
    if KEYS:
        d_k = multiplied(dr, q_tile, d_k, PRECISION)
    return d_k, d_v


@triton.jit(do_not_specialize=[*SIZES, "unscaled", "w_factor"])
def attention_columns_kernel(
    q, k, v, mask, key_mask, slopes, cu_seqlens_q, cu_seqlens_k, seed, lse, low, delta, g, w, d_k, d_v,
    heads, group, rows, columns, total_rows, tiles, scale, cap, keep_scale, threshold, left, right, offset,
    unscaled, w_factor, q_b, q_h, q_l, k_b, k_g, k_s, v_b, v_g, v_s, g_b, g_h, g_l, dk_b, dk_g, dk_s,
    dv_b, dv_g, dv_s, w_b, w_h, w_l, w_s, m_b, m_h, m_l, m_s, km_b, km_s,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The d k and d v of a tile of keys; one of them may be None."""
    wide: tl.constexpr = lse.dtype.element_ty
    groups = heads // group
    tile, g_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles % groups
    sequence = tl.program_id(0) // tiles // groups
    batch, first_row, first_key, rows, columns = sequence_of(
        sequence, cu_seqlens_q, cu_seqlens_k, rows, columns)  # fmt: skip
    n0 = tile * BLOCK_N
    if n0 >= columns:  # of a packed sequence
        return
    KEYS: tl.constexpr = d_k is not None
    VALUES: tl.constexpr = d_v is not None
    j = n0 + tl.arange(0, BLOCK_N)
    here = kept_keys(j, columns, key_mask, batch * km_b, km_s)
    at_key = g_head.to(tl.int64)
    k_tile = load_tile(k + batch * k_b + at_key * k_g + first_key * k_s, j, k_s, here, D, BLOCK_D)
    v_tile = None
    if KEYS and g is not None:
        v_tile = load_tile(v + batch * v_b + at_key * v_g + first_key * v_s, j, v_s, here, V, BLOCK_V)
    at_row = first_row + batch * heads * total_rows
    q += batch * q_b + first_row * q_l
    if g is not None:
        g += batch * g_b + first_row * g_l
    if w is not None:
        w += batch * w_b
    scoring, position = (scale, cap), (offset, left, right, slopes)
    masks = (mask, batch * m_b, m_h, m_l, m_s, key_mask, batch * km_b, km_s)
    dropout = (seed, threshold, sequence)
    weights, sums = (w, w_h, w_l, w_s, w_factor), (lse, low, delta, at_row, total_rows)
    keep = number(keep_scale, wide)
    state = (tl.zeros((BLOCK_N, BLOCK_D), wide), tl.zeros((BLOCK_N, BLOCK_V), wide))
    begin, end, full_begin, full_end = row_tiles(n0, rows, columns, position, BLOCK_M, BLOCK_N)
    if mask is not None or key_mask is not None:
        full_end = full_begin
    # One loop over the tiles of all heads: nested ones keep more in registers than there are.
    full = (full_end - full_begin) // BLOCK_M
    for step in range(group * full):
        head, m0 = g_head * group + step // full, full_begin + step % full * BLOCK_M
        state = _column_step(state, q, k_tile, v_tile, g, n0, m0, head, rows, columns, sums, q_h, q_l, g_h,
                             g_l, keep, scoring, position, masks, dropout, weights, False, KEYS, VALUES,
                             NATURAL, PRECISION, D, V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V)  # fmt: skip
    others = (end - begin) // BLOCK_M - full
    for step in range(group * others):
        head, m1 = g_head * group + step // others, begin + step % others * BLOCK_M
        m0 = tl.where(m1 < full_begin, m1, m1 + (full_end - full_begin))
        state = _column_step(state, q, k_tile, v_tile, g, n0, m0, head, rows, columns, sums, q_h, q_l, g_h,
                             g_l, keep, scoring, position, masks, dropout, weights, True, KEYS, VALUES,
                             NATURAL, PRECISION, D, V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V)  # fmt: skip
    sum_k, sum_v = state
    if d_k is not None:
        sum_k = tl.where(here[:, None], sum_k * number(unscaled, wide), 0.0)
        to = d_k + batch * dk_b + at_key * dk_g + first_key * dk_s
        store_tile(to, j, dk_s, sum_k, j < columns, D, BLOCK_D)
    if d_v is not None:
        sum_v = tl.where(here[:, None], sum_v, 0.0)
        to = d_v + batch * dv_b + at_key * dv_g + first_key * dv_s
        store_tile(to, j, dv_s, sum_v, j < columns, V, BLOCK_V)
