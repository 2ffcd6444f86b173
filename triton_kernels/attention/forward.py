"""Attention: softmax of the scores of queries and keys, times values; nothing of rows x keys in memory.

    s = scale q k^T (softcap, ALiBi, masks)     lse = log sum exp s     out = exp(s - lse) z v,  z of dropout

Tiling: a program takes BLOCK_M query rows of one head, and walks over the keys, BLOCK_N at a time, with the
online softmax of FlashAttention-2 (Dao, 2023): largest score, sum and output [BLOCK_M, V] stay in registers
and are rescaled when a larger score comes; one division at the end. exp is exp2 with scale log2(e) folded
into one multiply-add. Bounds and window decide which key tiles are visited; those that all rows keep whole
need no comparison and have a loop of their own. A tile of rows whose output is not finite is made again, with
care that no row sees a value that it doesn't keep: 0 times NaN is NaN. Extra columns are one more tile,
before the others.
Bytes moved: each of q and out once; k and v once for each row tile, from L2 where the programs of a head run
side by side, which is why row tiles are the fastest axis of the grid; with a causal bound the longest first.
Arithmetic in float32 (float64 for float64), offsets of 64 bits.
Limits: D and V up to 256, dense in memory; fewer than 2^30 rows and keys, and 2^31 programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    CAREFUL_BLOCK,
    EXTRA_BLOCK,
    LN2,
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
    multiplied_where_seen,
    number,
    products,
    raw_scores,
    sequence_of,
    store_part,
    store_tile,
    visible_scores,
    weights_of,
)

# A size of 1 would become a constant, which has no dtype; and lengths change from call to call.
SIZES = ["heads", "group", "rows", "columns", "total_rows", "tiles", "scale", "cap", "keep_scale",
         "threshold",
         "left", "right", "offset"]  # fmt: skip


@triton.jit
def _online(s, largest, NATURAL: tl.constexpr):
    """The weights of a tile's scores, the largest score so far, and what earlier sums are to be scaled by."""
    new = tl.maximum(largest, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = weights_of(s, base[:, None], None, NATURAL)
    return p, new, weights_of(largest, base, None, NATURAL)


@triton.jit
def _attend(
    state, q, k, v, i, n0, head, rows, columns, k_s, v_s, scoring, position, masks, dropout,
    MASKED: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of weights and output of one more tile of keys, from n0."""
    largest, total, acc = state
    _, _, _, _, _, key_mask, km_at, km_s = masks
    j = n0 + tl.arange(0, BLOCK_N)
    here = None
    if MASKED:
        here = kept_keys(j, columns, key_mask, km_at, km_s)
    s, _ = raw_scores(products(q, load_tile(k, j, k_s, here, D, BLOCK_D), PRECISION), scoring)
    s, _kept = visible_scores(
        s, i[:, None], j[None, :], rows, columns, head, position, masks, MASKED, NATURAL
    )
    p, largest, factor = _online(s, largest, NATURAL)
    total = total * factor + tl.sum(p, 1)
    acc = acc * factor[:, None]
    if dropout[0] is not None:
        p = tl.where(drawn_weights(dropout, head, i, n0, BLOCK_M, BLOCK_N), p, 0.0)
    acc = multiplied(p, load_tile(v, j, v_s, here, V, BLOCK_V), acc, PRECISION)
    return largest, total, acc


@triton.jit
def _attend_carefully(
    acc, part, q, k, v, i, n0, head, rows, columns, k_s, v_s, scoring, position, masks, dropout, largest,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The output with one more tile of keys; rows, whose largest scores are known, see what they keep."""
    _, _, _, _, _, key_mask, km_at, km_s = masks
    j = n0 + tl.arange(0, BLOCK_N)
    here = kept_keys(j, columns, key_mask, km_at, km_s)
    s, _ = raw_scores(products(q, load_tile(k, j, k_s, here, D, BLOCK_D), PRECISION), scoring)
    s, kept = visible_scores(s, i[:, None], j[None, :], rows, columns, head, position, masks, True, NATURAL)
    p = weights_of(s, largest[:, None], None, NATURAL)
    seen = kept & (p != 0)
    if dropout[0] is not None:
        p = tl.where(drawn_weights(dropout, head, i, n0, BLOCK_M, BLOCK_N), p, 0.0)
    return multiplied_where_seen(p, seen, load_tile(v, j, v_s, here, V, BLOCK_V), acc, part, PRECISION)


@triton.jit
def _attend_extra(
    state, q, extra_key, extra_value, i, head, columns, scoring, dropout, EXTRA: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The same of the extra columns, [EXTRA, D] and [EXTRA, V]."""
    largest, total, acc = state
    x = tl.arange(0, EXTRA_BLOCK)
    k = load_tile(extra_key, x, D, x < EXTRA, D, BLOCK_D)
    s, _, _ = extra_scores(q, k, scoring, EXTRA, PRECISION)
    p, largest, factor = _online(s, largest, NATURAL)
    total = total * factor + tl.sum(p, 1)
    acc = acc * factor[:, None]
    if dropout[0] is not None:
        p = tl.where(drawn_extra(dropout, head, i, columns, BLOCK_M), p, 0.0)
    v = load_tile(extra_value, x, V, x < EXTRA, V, BLOCK_V)
    return largest, total, multiplied(p, v, acc, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def attention_forward_kernel(
    q, k, v, mask, key_mask, extra_key, extra_value, slopes, cu_seqlens_q, cu_seqlens_k, seed, out, lse, low,
    heads, group, rows, columns, total_rows, tiles, scale, cap, keep_scale, threshold, left, right, offset,
    q_b, q_h, q_l, k_b, k_g, k_s, v_b, v_g, v_s, o_b, o_h, o_l, m_b, m_h, m_l, m_s, km_b, km_s,
    EXTRA: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Output and lse of a tile of rows; and in `low`, if given, what lse has lost, to base 2."""
    wide: tl.constexpr = lse.dtype.element_ty
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles % heads
    sequence = tl.program_id(0) // tiles // heads
    batch, first_row, first_key, rows, columns = sequence_of(
        sequence, cu_seqlens_q, cu_seqlens_k, rows, columns)  # fmt: skip
    if right is not None:
        tile = tiles - 1 - tile
    m0 = tile * BLOCK_M
    if m0 >= rows:  # of a packed sequence
        return
    i = m0 + tl.arange(0, BLOCK_M)
    h, g = head.to(tl.int64), (head // group).to(tl.int64)
    k += batch * k_b + g * k_g + first_key * k_s
    v += batch * v_b + g * v_g + first_key * v_s
    q_tile = load_tile(q + batch * q_b + h * q_h + first_row * q_l, i, q_l, i < rows, D, BLOCK_D)
    scoring, position = (scale, cap), (offset, left, right, slopes)
    masks = (mask, batch * m_b, m_h, m_l, m_s, key_mask, batch * km_b, km_s)
    dropout = (seed, threshold, sequence)
    state = (tl.full((BLOCK_M,), float("-inf"), wide), tl.zeros((BLOCK_M,), wide),
             tl.zeros((BLOCK_M, BLOCK_V), wide))  # fmt: skip
    if EXTRA > 0:
        state = _attend_extra(state, q_tile, extra_key + g * EXTRA * D, extra_value + g * EXTRA * V, i,
                              head, columns, scoring, dropout, EXTRA, NATURAL, PRECISION, D, V, BLOCK_M,
                              BLOCK_D, BLOCK_V)  # fmt: skip
    begin, end, full_begin, full_end = key_tiles(m0, rows, columns, position, BLOCK_M, BLOCK_N)
    if mask is not None or key_mask is not None:
        full_end = full_begin
    for n0 in range(full_begin, full_end, BLOCK_N):
        state = _attend(state, q_tile, k, v, i, n0, head, rows, columns, k_s, v_s, scoring, position, masks,
                        dropout, False, NATURAL, PRECISION, D, V, BLOCK_M, BLOCK_N, BLOCK_D,
                        BLOCK_V)  # fmt: skip
    for n1 in range(begin, end - (full_end - full_begin), BLOCK_N):
        n0 = tl.where(n1 < full_begin, n1, n1 + (full_end - full_begin))
        state = _attend(state, q_tile, k, v, i, n0, head, rows, columns, k_s, v_s, scoring, position, masks,
                        dropout, True, NATURAL, PRECISION, D, V, BLOCK_M, BLOCK_N, BLOCK_D,
                        BLOCK_V)  # fmt: skip

    largest, total, acc = state
    scale_out = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    if seed is not None:
        scale_out *= number(keep_scale, wide)
    finite = all_finite(acc)
    out += batch * o_b + h * o_h + first_row * o_l
    acc = tl.where((total == 0)[:, None], 0.0, acc * scale_out[:, None])
    store_tile(out, i, o_l, acc, i < rows, V, BLOCK_V)
    base = tl.where(total == 0, 0.0, largest)
    if not NATURAL:
        base *= LN2
    at = (batch * heads + h) * total_rows + first_row + i
    more = logarithm(tl.where(total == 0, 1.0, total))
    log = base + more
    tl.store(lse + at, tl.where(total == 0, float("-inf"), log), mask=i < rows)
    if low is not None:
        tl.store(low + at, (more + (base - log)) * LOG2E, mask=i < rows)
    if mask is not None or left is not None or right is not None:
        base = tl.where(total == 0, 0.0, largest)
        for part in range(tl.where(finite, 0, 3)):
            sum = tl.zeros((BLOCK_M, BLOCK_V), wide)
            if EXTRA > 0:  # noqa: SIM102  # known when compiled
                if part == 0:
                    known = (largest, total, sum)
                    _same, _total, sum = _attend_extra(
                        known, q_tile, extra_key + g * EXTRA * D, extra_value + g * EXTRA * V, i, head,
                        columns,
                        scoring, dropout, EXTRA, NATURAL, PRECISION, D, V, BLOCK_M, BLOCK_D,
                        BLOCK_V)  # fmt: skip
            for n0 in range(begin, end, CAREFUL_BLOCK):
                sum = _attend_carefully(sum, part, q_tile, k, v, i, n0, head, rows, columns, k_s, v_s,
                                        scoring,
                                        position, masks, dropout, base, NATURAL, PRECISION, D, V, BLOCK_M,
                                        CAREFUL_BLOCK, BLOCK_D, BLOCK_V)  # fmt: skip
            sum = tl.where((total == 0)[:, None], 0.0, sum * tl.where(part == 0, scale_out, 1.0)[:, None])
            store_part(out, i, o_l, sum, part, i < rows, V, BLOCK_V)
