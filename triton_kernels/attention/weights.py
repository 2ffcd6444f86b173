"""Attention weights from queries, keys and lse, averaged over heads or for each: a second pass.

    weights[i, j] = z exp(s - lse), mean over heads

Tiling: a program has BLOCK_M rows and BLOCK_N keys of a sample and goes through the heads, so that the mean
needs no memory of size heads x rows x keys; the weights of one head are the same kernel with a head for each
program. The extra columns are one more tile of columns.
Bytes moved: the weights once; q of all heads once for each tile of keys, k for each tile of rows, from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.storage import store
from .forward import SIZES
from .math import (
    EXTRA_BLOCK,
    drawn_extra,
    drawn_weights,
    extra_scores,
    key_tiles,
    load_tile,
    number,
    products,
    raw_scores,
    sequence_of,
    visible_scores,
    weights_of,
)
from .rows import load_lse


@triton.jit(do_not_specialize=[*SIZES, "column_tiles", "each"])
def attention_weights_kernel(
    q, k, mask, key_mask, extra_key, slopes, cu_seqlens_q, cu_seqlens_k, seed, lse, low, weights,
    heads, group, rows, columns, total_rows, tiles, scale, cap, keep_scale, threshold, left, right, offset,
    column_tiles, each, q_b, q_h, q_l, k_b, k_g, k_s, m_b, m_h, m_l, m_s, km_b, km_s,
    EXTRA: tl.constexpr, NATURAL: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Mean weights [B, heads / each, L, S + EXTRA] over `each` heads, which are all, or 1."""
    wide: tl.constexpr = lse.dtype.element_ty
    column, outer = tl.program_id(0) % column_tiles, tl.program_id(0) // column_tiles
    m0, outer = (outer % tiles) * BLOCK_M, outer // tiles
    first_head, sequence = outer % (heads // each) * each, outer // (heads // each)
    batch, _first_row, _first_key, rows, columns = sequence_of(
        sequence, cu_seqlens_q, cu_seqlens_k, rows, columns
    )
    i, n0 = m0 + tl.arange(0, BLOCK_M), column * BLOCK_N
    extra = n0 >= columns
    keep = number(keep_scale, wide) / each.to(wide)
    sum, sum_extra = tl.zeros((BLOCK_M, BLOCK_N), wide), tl.zeros((BLOCK_M, EXTRA_BLOCK), wide)
    scoring, position = (scale, cap), (offset, left, right, slopes)
    masks = (mask, batch * m_b, m_h, m_l, m_s, key_mask, batch * km_b, km_s)
    dropout = (seed, threshold, sequence)
    for member in range(each):
        head = first_head + member
        h, g_head = head.to(tl.int64), (head // group).to(tl.int64)
        q_tile = load_tile(q + batch * q_b + h * q_h, i, q_l, i < rows, D, BLOCK_D)
        own, lost = load_lse(lse, low, (batch * heads + h) * total_rows + i, i < rows, NATURAL)
        if EXTRA > 0:  # noqa: SIM102  # known when compiled
            if extra:
                x = tl.arange(0, EXTRA_BLOCK)
                extra_tile = load_tile(extra_key + g_head * EXTRA * D, x, D, x < EXTRA, D, BLOCK_D)
                s_extra, _exists, _t_extra = extra_scores(q_tile, extra_tile, scoring, EXTRA, PRECISION)
                p_extra = weights_of(s_extra, own[:, None], lost[:, None], NATURAL)
                if dropout[0] is not None:
                    p_extra = tl.where(drawn_extra(dropout, head, i, columns, BLOCK_M), p_extra, 0.0)
                sum_extra += p_extra
        begin, end, _full_begin, _full_end = key_tiles(m0, rows, columns, position, BLOCK_M, BLOCK_N)
        if (n0 >= begin) & (n0 < end):
            j = n0 + tl.arange(0, BLOCK_N)
            k_tile = load_tile(k + batch * k_b + g_head * k_g, j, k_s, j < columns, D, BLOCK_D)
            raw, _t = raw_scores(products(q_tile, k_tile, PRECISION), scoring)
            s, kept = visible_scores(
                raw, i[:, None], j[None, :], rows, columns, head, position, masks, True, NATURAL
            )
            p = tl.where(kept, weights_of(s, own[:, None], lost[:, None], NATURAL), 0.0)
            if dropout[0] is not None:
                p = tl.where(drawn_weights(dropout, head, i, n0, BLOCK_M, BLOCK_N), p, 0.0)
            sum += p
    to = weights + ((batch * (heads // each) + first_head // each) * rows + i).to(tl.int64)[:, None] * (
        columns + EXTRA
    )
    j = (n0 + tl.arange(0, BLOCK_N))[None, :]
    store(to, j, sum * keep, (i < rows)[:, None] & (j < columns))
    if EXTRA > 0:  # noqa: SIM102  # known when compiled
        if extra:
            at_extra = tl.arange(0, EXTRA_BLOCK)[None, :]
            store(to, columns + at_extra, sum_extra * keep, (i < rows)[:, None] & (at_extra < EXTRA))
