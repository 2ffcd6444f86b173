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
from .arguments import Inputs
from .math import (
    EXTRA_BLOCK,
    drawn_extra,
    drawn_weights,
    extra_scores,
    in_head,
    key_tiles,
    load_extra,
    load_keys,
    load_queries,
    number,
    place_of,
    scores_of,
    sums_of_rows,
    weights_of,
)
from .rows import load_lse


@triton.jit(do_not_specialize=["numbers", "column_tiles", "each"])
def attention_weights_kernel(inputs, lse, low, weights, column_tiles, each, numbers, C: tl.constexpr):
    """Mean weights [B, heads / each, L, S + EXTRA] over `each` heads, which are all, or 1."""
    inputs = Inputs(*inputs)
    wide: tl.constexpr = lse.dtype.element_ty
    column, outer = tl.program_id(0) % column_tiles, tl.program_id(0) // column_tiles
    m0, outer = (outer % numbers.tiles) * C.BLOCK_M, outer // numbers.tiles
    means = numbers.heads // each
    first_head = outer % means * each
    of_first = place_of(outer // means, first_head, inputs, numbers)
    i, n0 = m0 + tl.arange(0, C.BLOCK_M), column * C.BLOCK_N
    present, extra = i < of_first.rows, n0 >= of_first.columns
    keep = number(numbers.keep_scale, wide) / each.to(wide)
    sum, sum_extra = tl.zeros((C.BLOCK_M, C.BLOCK_N), wide), tl.zeros((C.BLOCK_M, EXTRA_BLOCK), wide)
    for member in range(each):
        head = first_head + member
        place = in_head(of_first, head, head // numbers.group)
        q = load_queries(inputs.query, place, i, present, C.D, C.BLOCK_D)
        at = sums_of_rows(i, place, numbers)
        own, lost = load_lse(lse, low, at, present, C.NATURAL)
        if C.EXTRA > 0:  # noqa: SIM102  # known when compiled
            if extra:
                k_extra = load_extra(inputs.extra_key, place, C.EXTRA, C.D, C.BLOCK_D)
                s_extra, _exists, _t_extra = extra_scores(q, k_extra, numbers, C)
                p_extra = weights_of(s_extra, own[:, None], lost[:, None], C.NATURAL)
                if inputs.seed is not None:
                    drawn = drawn_extra(i, place, inputs, numbers, C.BLOCK_M)
                    p_extra = tl.where(drawn, p_extra, 0.0)
                sum_extra += p_extra
        begin, end, _full_begin, _full_end = key_tiles(m0, place, inputs, numbers, C)
        if (n0 >= begin) & (n0 < end):
            j = n0 + tl.arange(0, C.BLOCK_N)
            k = load_keys(inputs.key, place, j, j < place.columns, C.D, C.BLOCK_D)
            s, kept, _t = scores_of(q, k, i[:, None], j[None, :], place, inputs, numbers, True, C)
            p = tl.where(kept, weights_of(s, own[:, None], lost[:, None], C.NATURAL), 0.0)
            if inputs.seed is not None:
                kept_tile = drawn_weights(i, n0, place, inputs, numbers, C.BLOCK_M, C.BLOCK_N)
                p = tl.where(kept_tile, p, 0.0)
            sum += p
    row = (of_first.batch * means + first_head // each) * of_first.rows + i
    to = weights + row.to(tl.int64)[:, None] * (of_first.columns + C.EXTRA)
    j = (n0 + tl.arange(0, C.BLOCK_N))[None, :]
    store(to, j, sum * keep, present[:, None] & (j < of_first.columns))
    if C.EXTRA > 0:  # noqa: SIM102  # known when compiled
        if extra:
            at_extra = tl.arange(0, EXTRA_BLOCK)[None, :]
            store(to, of_first.columns + at_extra, sum_extra * keep, present[:, None] & (at_extra < C.EXTRA))
