"""Gradients of attention that belong to query rows: before all, what the softmax subtracts; then d q.

    delta_i = g_i . out_i + sum_j p z w - grad_lse_i        p = exp(s - lse), made again
    dp = z (g v^T + w)    ds = p (dp - delta)    dr = ds (1 - tanh^2)    d q = scale dr k

Tiling: as the forward's, a program for BLOCK_M rows of one head, which stay; keys come BLOCK_N at a time.
Nothing is added across programs but the gradients of extra columns, [EXTRA, D] and [EXTRA, V] of each
program, which are summed in a fixed order afterwards.
Bytes moved: q, g and d q once, k and v once for each row tile. A row whose weights are so small a part of lse
that float32 lost them there (a mask of the lowest number: lse is that number, whatever the row's sum) has
what was lost in `low`: the first kernel sums such rows again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import SIZES
from .math import (
    CAREFUL_BLOCK,
    EXTRA_BLOCK,
    LOG2E,
    all_finite,
    drawn_extra,
    drawn_weights,
    extra_scores,
    kept_keys,
    key_tiles,
    load_tile,
    logarithm,
    multiplied,
    number,
    products,
    raw_scores,
    sequence_of,
    store_tile,
    visible_scores,
    weights_of,
)


@triton.constexpr_function
def limit_of(pointer):
    """Natural lse beyond which its rounding shows in the weights; float64 is always summed again."""
    return {64: 0.0, 32: 32.0, 16: 256.0}[pointer.element_ty.primitive_bitwidth]


@triton.jit
def load_lse(lse, low, at, here, NATURAL: tl.constexpr):
    """An lse in the units of the scores, inf, for weights of 0, where a row has none; `low` if NATURAL."""
    x = tl.load(lse + at, mask=here, other=float("inf"))
    x = tl.where(x == float("-inf"), float("inf"), x)
    lost = x
    if NATURAL:
        lost = tl.load(low + at, mask=here, other=0.0)
    else:
        x *= LOG2E
    return x, lost


@triton.jit
def weight_gradient(weights, rows, cols, here, head, wide: tl.constexpr):
    """Gradient of a tile's weights: (the sample's or None; strides of head, row, column; factor as bits)."""
    pointer, w_h, w_l, w_s, factor = weights
    at = head.to(tl.int64) * w_h + rows.to(tl.int64) * w_l + cols.to(tl.int64) * w_s
    return tl.load(pointer + at, mask=here, other=0.0).to(wide) * number(factor, wide)


@triton.jit
def score_gradient(
    s, kept, t, dp, drawn, keep_scale, lse, low, delta, cap, MASKED: tl.constexpr, NATURAL: tl.constexpr
):
    """Weights before and after dropout, the gradient of the scores, and that before the softcap."""
    p = weights_of(s, lse, low, NATURAL)
    if MASKED:
        p = tl.where(kept, p, 0.0)
    pz = p
    if drawn is not None:
        pz = tl.where(drawn, p * keep_scale, 0.0)
        dp = tl.where(drawn, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(kept, ds, 0.0)
    dr = ds
    if cap is not None:
        dr = ds * (1.0 - t * t)
    return p, pz, ds, dr


@triton.jit
def _sums(p, drawn, keep_scale, weights, rows, cols, here, head, state):
    """Sums of the weights, and of weights times their gradient."""
    total, dot = state
    total += tl.sum(p, 1)
    if weights[0] is not None:
        pz = p
        if drawn is not None:
            pz = tl.where(drawn, p * keep_scale, 0.0)
        dot += tl.sum(pz * weight_gradient(weights, rows, cols, here, head, p.dtype), 1)
    return total, dot


@triton.jit(do_not_specialize=SIZES)
def attention_delta_kernel(
    q, k, mask, key_mask, extra_key, slopes, cu_seqlens_q, cu_seqlens_k, seed, out, lse, g, grad_lse, w,
    delta, low,
    heads, group, rows, columns, total_rows, tiles, scale, cap, keep_scale, threshold, left, right, offset,
    w_factor, q_b, q_h, q_l, k_b, k_g, k_s, o_b, o_h, o_l, g_b, g_h, g_l, w_b, w_h, w_l, w_s,
    m_b, m_h, m_l, m_s, km_b, km_s,
    EXTRA: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The delta [B, H, L], and `low` where scores are natural; keys are visited only for w or a large lse."""
    wide: tl.constexpr = lse.dtype.element_ty
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles % heads
    sequence = tl.program_id(0) // tiles // heads
    batch, first_row, first_key, rows, columns = sequence_of(
        sequence, cu_seqlens_q, cu_seqlens_k, rows, columns)  # fmt: skip
    m0 = tile * BLOCK_M
    if m0 >= rows:  # of a packed sequence
        return
    i = m0 + tl.arange(0, BLOCK_M)
    h, g_head = head.to(tl.int64), (head // group).to(tl.int64)
    at = (batch * heads + h) * total_rows + first_row + i
    sum = tl.zeros((BLOCK_M,), wide)
    if g is not None:
        g_tile = load_tile(g + batch * g_b + h * g_h + first_row * g_l, i, g_l, i < rows, V, BLOCK_V)
        o_tile = load_tile(out + batch * o_b + h * o_h + first_row * o_l, i, o_l, i < rows, V, BLOCK_V)
        sum += tl.sum(g_tile.to(wide) * o_tile.to(wide), 1)
    if grad_lse is not None:
        sum -= tl.load(grad_lse + at, mask=i < rows, other=0.0)
    if w is not None:
        w += batch * w_b
    own = tl.load(lse + at, mask=i < rows, other=0.0)
    nothing = own == float("-inf")
    if NATURAL or w is not None:
        total, dot = tl.full((BLOCK_M,), 1.0, wide), tl.zeros((BLOCK_M,), wide)
        again = w is not None
        if not again:
            again = tl.max(tl.where(nothing, 0.0, tl.abs(own)), 0) > limit_of(q.dtype)
        if again:
            base = tl.where(nothing, float("inf"), own)
            if not NATURAL:
                base *= LOG2E
            state = (tl.zeros((BLOCK_M,), wide), dot)
            scoring, position = (scale, cap), (offset, left, right, slopes)
            masks = (mask, batch * m_b, m_h, m_l, m_s, key_mask, batch * km_b, km_s)
            dropout = (seed, threshold, sequence)
            weights = (w, w_h, w_l, w_s, w_factor)
            keep = number(keep_scale, wide)
            q_tile = load_tile(q + batch * q_b + h * q_h + first_row * q_l, i, q_l, i < rows, D, BLOCK_D)
            k += batch * k_b + g_head * k_g + first_key * k_s
            if EXTRA > 0:
                x = tl.arange(0, EXTRA_BLOCK)
                k_tile = load_tile(extra_key + g_head * EXTRA * D, x, D, x < EXTRA, D, BLOCK_D)
                s, kept, _ = extra_scores(q_tile, k_tile, scoring, EXTRA, PRECISION)
                drawn_there = None
                if dropout[0] is not None:
                    drawn_there = drawn_extra(dropout, head, i, columns, BLOCK_M)
                here = kept & (i < rows)[:, None]
                state = _sums(weights_of(s, base[:, None], None, NATURAL), drawn_there, keep, weights,
                              i[:, None], (columns + x)[None, :], here, head, state)  # fmt: skip
            begin, end, _, _ = key_tiles(m0, rows, columns, position, BLOCK_M, BLOCK_N)
            for n0 in range(begin, end, BLOCK_N):
                j = n0 + tl.arange(0, BLOCK_N)
                keys = load_tile(k, j, k_s, j < columns, D, BLOCK_D)
                raw, _t = raw_scores(products(q_tile, keys, PRECISION), scoring)
                s_tile, seen = visible_scores(
                    raw, i[:, None], j[None, :], rows, columns, head, position, masks, True, NATURAL
                )
                drawn = None
                if dropout[0] is not None:
                    drawn = drawn_weights(dropout, head, i, n0, BLOCK_M, BLOCK_N)
                p = tl.where(seen, weights_of(s_tile, base[:, None], None, NATURAL), 0.0)
                state = _sums(p, drawn, keep, weights, i[:, None], j[None, :], seen, head, state)
            total, dot = state
            total = tl.where(total > 0, total, 1.0)
            if NATURAL:
                dot /= total
        sum += dot
        if NATURAL:
            tl.store(low + at, logarithm(total) * LOG2E, mask=i < rows)
    tl.store(delta + at, tl.where(nothing, 0.0, sum), mask=i < rows)


@triton.jit
def _row_step(
    acc, q, g, lse, low, delta, keep, k, v, i, n0, head, rows, columns, k_s, v_s, scoring, position, masks,
    dropout,
    weights, MASKED: tl.constexpr, CAREFUL: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The d q with one more tile of keys, from n0, still to be scaled."""
    _, _, _, _, _, key_mask, km_at, km_s = masks
    j = n0 + tl.arange(0, BLOCK_N)
    here = None
    if MASKED:
        here = kept_keys(j, columns, key_mask, km_at, km_s)
    k_tile = load_tile(k, j, k_s, here, D, BLOCK_D)
    s, t = raw_scores(products(q, k_tile, PRECISION), scoring)
    s, kept = visible_scores(s, i[:, None], j[None, :], rows, columns, head, position, masks, MASKED, NATURAL)
    if g is not None:
        dp = products(g, load_tile(v, j, v_s, here, V, BLOCK_V), PRECISION)
    else:
        dp = tl.zeros((BLOCK_M, BLOCK_N), acc.dtype)
    if weights[0] is not None:
        exists = (i < rows)[:, None] & (j < columns)[None, :]
        dp += weight_gradient(weights, i[:, None], j[None, :], exists, head, acc.dtype)
    drawn = None
    if dropout[0] is not None:
        drawn = drawn_weights(dropout, head, i, n0, BLOCK_M, BLOCK_N)
    _p, _, _, dr = score_gradient(
        s, kept, t, dp, drawn, keep, lse[:, None], low[:, None], delta[:, None], scoring[1], MASKED, NATURAL
    )
    if CAREFUL:  # a row that sees a key that is not finite has NaN in dr, or a weight of 0
        clean = tl.where(tl.abs(k_tile.to(acc.dtype)) < float("inf"), k_tile.to(acc.dtype), 0.0)
        acc = multiplied(dr, clean.to(k_tile.dtype), acc, PRECISION)
    else:
        acc = multiplied(dr, k_tile, acc, PRECISION)
    return acc


@triton.jit
def _extra_step(
    acc, q, g, lse, low, delta, keep, extra_key, extra_value, d_extra_key, d_extra_value, i, head, rows,
    columns,
    scoring, dropout, weights, EXTRA: tl.constexpr, NATURAL: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, unscaled,
):  # fmt: skip
    """The same with the extra columns; their gradients from these rows are written."""
    x = tl.arange(0, EXTRA_BLOCK)
    k_tile = load_tile(extra_key, x, D, x < EXTRA, D, BLOCK_D)
    s, kept, t = extra_scores(q, k_tile, scoring, EXTRA, PRECISION)
    if g is not None:
        dp = products(g, load_tile(extra_value, x, V, x < EXTRA, V, BLOCK_V), PRECISION)
    else:
        dp = tl.zeros((BLOCK_M, EXTRA_BLOCK), acc.dtype)
    if weights[0] is not None:
        exists = kept & (i < rows)[:, None]
        dp += weight_gradient(weights, i[:, None], (columns + x)[None, :], exists, head, acc.dtype)
    drawn = None
    if dropout[0] is not None:
        drawn = drawn_extra(dropout, head, i, columns, BLOCK_M)
    _, pz, _, dr = score_gradient(
        s, kept, t, dp, drawn, keep, lse[:, None], low[:, None], delta[:, None], scoring[1], True, NATURAL
    )
    if d_extra_key is not None:
        found = multiplied(tl.trans(dr), q, tl.zeros((EXTRA_BLOCK, BLOCK_D), acc.dtype), PRECISION)
        store_tile(d_extra_key, x, D, found * unscaled, x < EXTRA, D, BLOCK_D)
    if d_extra_value is not None:
        found = tl.zeros((EXTRA_BLOCK, BLOCK_V), acc.dtype)
        if g is not None:
            found = multiplied(tl.trans(pz), g, found, PRECISION)
        store_tile(d_extra_value, x, V, found, x < EXTRA, V, BLOCK_V)
    return multiplied(dr, k_tile, acc, PRECISION)


@triton.jit(do_not_specialize=[*SIZES, "unscaled", "w_factor"])
def attention_rows_kernel(
    q, k, v, mask, key_mask, extra_key, extra_value, slopes, cu_seqlens_q, cu_seqlens_k, seed, lse, low,
    delta, g, w,
    d_q, d_extra_key, d_extra_value,
    heads, group, rows, columns, total_rows, tiles, scale, cap, keep_scale, threshold, left, right, offset,
    unscaled, w_factor, q_b, q_h, q_l, k_b, k_g, k_s, v_b, v_g, v_s, g_b, g_h, g_l, dq_b, dq_h, dq_l,
    w_b, w_h, w_l, w_s, m_b, m_h, m_l, m_s, km_b, km_s,
    EXTRA: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The d q of a tile of rows, and its parts of the extra columns' gradients; any of them may be None."""
    wide: tl.constexpr = lse.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles % heads
    sequence = tl.program_id(0) // tiles // heads
    batch, first_row, first_key, rows, columns = sequence_of(
        sequence, cu_seqlens_q, cu_seqlens_k, rows, columns)  # fmt: skip
    m0 = tile * BLOCK_M
    if m0 >= rows:  # of a packed sequence
        return
    i = m0 + tl.arange(0, BLOCK_M)
    h, g_head = head.to(tl.int64), (head // group).to(tl.int64)
    if w is not None:
        w += batch * w_b
    scoring, position = (scale, cap), (offset, left, right, slopes)
    masks = (mask, batch * m_b, m_h, m_l, m_s, key_mask, batch * km_b, km_s)
    dropout = (seed, threshold, sequence)
    weights = (w, w_h, w_l, w_s, w_factor)
    keep, last = number(keep_scale, wide), number(unscaled, wide)
    q_tile = load_tile(q + batch * q_b + h * q_h + first_row * q_l, i, q_l, i < rows, D, BLOCK_D)
    g_tile = None
    if g is not None:
        g_tile = load_tile(g + batch * g_b + h * g_h + first_row * g_l, i, g_l, i < rows, V, BLOCK_V)
    at = (batch * heads + h) * total_rows + first_row + i
    own, lost = load_lse(lse, low, at, i < rows, NATURAL)
    dot = tl.load(delta + at, mask=i < rows, other=0.0)
    k += batch * k_b + g_head * k_g + first_key * k_s
    v += batch * v_b + g_head * v_g + first_key * v_s
    acc = tl.zeros((BLOCK_M, BLOCK_D), wide)
    if EXTRA > 0:
        if d_extra_key is not None:
            d_extra_key += program * EXTRA * D
        if d_extra_value is not None:
            d_extra_value += program * EXTRA * V
        acc = _extra_step(acc, q_tile, g_tile, own, lost, dot, keep, extra_key + g_head * EXTRA * D,
                          extra_value + g_head * EXTRA * V, d_extra_key, d_extra_value, i, head, rows,
                          columns,
                          scoring, dropout, weights, EXTRA, NATURAL, PRECISION, D, V, BLOCK_M,
                          BLOCK_D,
                          BLOCK_V, last)  # fmt: skip
    if d_q is not None:
        begin, end, full_begin, full_end = key_tiles(m0, rows, columns, position, BLOCK_M, BLOCK_N)
        if mask is not None or key_mask is not None:
            full_end = full_begin
        for n0 in range(full_begin, full_end, BLOCK_N):
            acc = _row_step(acc, q_tile, g_tile, own, lost, dot, keep, k, v, i, n0, head, rows, columns, k_s,
                            v_s, scoring, position, masks, dropout, weights, False, False, NATURAL,
                            PRECISION, D, V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V)  # fmt: skip
        for n1 in range(begin, end - (full_end - full_begin), BLOCK_N):
            n0 = tl.where(n1 < full_begin, n1, n1 + (full_end - full_begin))
            acc = _row_step(acc, q_tile, g_tile, own, lost, dot, keep, k, v, i, n0, head, rows, columns, k_s,
                            v_s, scoring, position, masks, dropout, weights, True, False, NATURAL,
                            PRECISION, D, V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V)  # fmt: skip
        if mask is not None or left is not None or right is not None:
            again = not all_finite(acc)
            acc = tl.where(again, 0.0, acc)
            if EXTRA > 0:  # noqa: SIM102  # known when compiled
                if again:
                    acc = _extra_step(acc, q_tile, g_tile, own, lost, dot, keep,
                                      extra_key + g_head * EXTRA * D, extra_value + g_head * EXTRA * V, None,
                                      None, i, head, rows, columns, scoring, dropout, weights, EXTRA,
                                      NATURAL, PRECISION, D, V, BLOCK_M, BLOCK_D, BLOCK_V, last)  # fmt: skip
            for n0 in range(begin, tl.where(again, end, begin), CAREFUL_BLOCK):
                acc = _row_step(acc, q_tile, g_tile, own, lost, dot, keep, k, v, i, n0, head, rows, columns,
                                k_s, v_s, scoring, position, masks, dropout, weights, True, True, NATURAL,
                                PRECISION, D, V, BLOCK_M, CAREFUL_BLOCK, BLOCK_D,
                                BLOCK_V)  # fmt: skip
        store_tile(
            d_q + batch * dq_b + h * dq_h + first_row * dq_l, i, dq_l, acc * last, i < rows, D, BLOCK_D
        )
