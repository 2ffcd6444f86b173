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

from .arguments import Inputs
from .math import (
    CAREFUL_BLOCK,
    LN2,
    LOG2E,
    all_finite,
    drawn_extra,
    drawn_weights,
    extra_scores,
    kept_keys,
    key_tiles,
    load_extra,
    load_keys,
    load_queries,
    logarithm,
    multiplied,
    multiplied_where_seen,
    number,
    place_of_rows,
    query_rows,
    scores_of,
    store_part,
    store_tile,
    sums_of_rows,
    weights_of,
    without_full,
)


@triton.jit
def _online(s, largest, NATURAL: tl.constexpr):
    """The weights of a tile's scores, the largest score so far, and what earlier sums are to be scaled by."""
    new = tl.maximum(largest, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    p = weights_of(s, base[:, None], None, NATURAL)
    return p, new, weights_of(largest, base, None, NATURAL)


@triton.jit
def _attend(state, q, i, n0, place, inputs, numbers, MASKED: tl.constexpr, C: tl.constexpr):
    """Largest score, sum of weights and output with one more tile of keys, from n0."""
    largest, total, acc = state
    j = n0 + tl.arange(0, C.BLOCK_N)
    here = None
    if MASKED:
        here = kept_keys(j, place, inputs)
    k = load_keys(inputs.key, place, j, here, C.D, C.BLOCK_D)
    s, _kept, _t = scores_of(q, k, i[:, None], j[None, :], place, inputs, numbers, MASKED, C)
    p, largest, factor = _online(s, largest, C.NATURAL)
    total = total * factor + tl.sum(p, 1)
    acc = acc * factor[:, None]
    if inputs.seed is not None:
        p = tl.where(drawn_weights(i, n0, place, inputs, numbers, C.BLOCK_M, C.BLOCK_N), p, 0.0)
    v = load_keys(inputs.value, place, j, here, C.V, C.BLOCK_V)
    return largest, total, multiplied(p, v, acc, C.PRECISION)


@triton.jit
def _attend_carefully(acc, part, q, i, n0, place, inputs, numbers, largest, C: tl.constexpr):
    """The output with one more tile of keys; rows, whose largest scores are known, see what they keep."""
    j = n0 + tl.arange(0, CAREFUL_BLOCK)
    here = kept_keys(j, place, inputs)
    k = load_keys(inputs.key, place, j, here, C.D, C.BLOCK_D)
    s, kept, _t = scores_of(q, k, i[:, None], j[None, :], place, inputs, numbers, True, C)
    p = weights_of(s, largest[:, None], None, C.NATURAL)
    seen = kept & (p != 0)
    if inputs.seed is not None:
        p = tl.where(drawn_weights(i, n0, place, inputs, numbers, C.BLOCK_M, CAREFUL_BLOCK), p, 0.0)
    v = load_keys(inputs.value, place, j, here, C.V, C.BLOCK_V)
    return multiplied_where_seen(p, seen, v, acc, part, C.PRECISION)


@triton.jit
def _attend_extra(state, q, i, place, inputs, numbers, C: tl.constexpr):
    """The same with the extra columns."""
    largest, total, acc = state
    k = load_extra(inputs.extra_key, place, C.EXTRA, C.D, C.BLOCK_D)
    s, _kept, _t = extra_scores(q, k, numbers, C)
    p, largest, factor = _online(s, largest, C.NATURAL)
    total = total * factor + tl.sum(p, 1)
    acc = acc * factor[:, None]
    if inputs.seed is not None:
        p = tl.where(drawn_extra(i, place, inputs, numbers, C.BLOCK_M), p, 0.0)
    v = load_extra(inputs.extra_value, place, C.EXTRA, C.V, C.BLOCK_V)
    return largest, total, multiplied(p, v, acc, C.PRECISION)


@triton.jit(do_not_specialize=["numbers"])
def attention_forward_kernel(inputs, out, lse, low, numbers, C: tl.constexpr):
    """Output and lse of a tile of rows; and in `low`, if given, what lse has lost, to base 2."""
    inputs = Inputs(*inputs)
    wide: tl.constexpr = lse.dtype.element_ty
    tile = tl.program_id(0) % numbers.tiles
    place = place_of_rows(inputs, numbers)
    if numbers.right is not None:
        tile = numbers.tiles - 1 - tile
    m0 = tile * C.BLOCK_M
    if m0 >= place.rows:  # of a packed sequence
        return
    i = m0 + tl.arange(0, C.BLOCK_M)
    present = i < place.rows
    q = load_queries(inputs.query, place, i, present, C.D, C.BLOCK_D)
    acc = tl.zeros((C.BLOCK_M, C.BLOCK_V), wide)
    state = (tl.full((C.BLOCK_M,), float("-inf"), wide), tl.zeros((C.BLOCK_M,), wide), acc)
    if C.EXTRA > 0:
        state = _attend_extra(state, q, i, place, inputs, numbers, C)
    begin, end, full_begin, full_end = key_tiles(m0, place, inputs, numbers, C)
    for n0 in range(full_begin, full_end, C.BLOCK_N):
        state = _attend(state, q, i, n0, place, inputs, numbers, False, C)
    for n1 in range(begin, end - (full_end - full_begin), C.BLOCK_N):
        n0 = without_full(n1, full_begin, full_end)
        state = _attend(state, q, i, n0, place, inputs, numbers, True, C)

    largest, total, acc = state
    nothing = total == 0
    scale_out = tl.where(nothing, 0.0, 1.0 / tl.where(nothing, 1.0, total))
    if inputs.seed is not None:
        scale_out *= number(numbers.keep_scale, wide)
    finite = all_finite(acc)
    to = query_rows(out, place)
    acc = tl.where(nothing[:, None], 0.0, acc * scale_out[:, None])
    store_tile(to, i, out.row, acc, present, C.V, C.BLOCK_V)
    base = tl.where(nothing, 0.0, largest)
    if not C.NATURAL:
        base *= LN2
    at = sums_of_rows(i, place, numbers)
    more = logarithm(tl.where(nothing, 1.0, total))
    log = base + more
    tl.store(lse + at, tl.where(nothing, float("-inf"), log), mask=present)
    if low is not None:
        tl.store(low + at, (more + (base - log)) * LOG2E, mask=present)
    if inputs.mask is not None or numbers.left is not None or numbers.right is not None:
        base = tl.where(nothing, 0.0, largest)
        for part in range(tl.where(finite, 0, 3)):
            sum = tl.zeros((C.BLOCK_M, C.BLOCK_V), wide)
            if C.EXTRA > 0:  # noqa: SIM102  # known when compiled
                if part == 0:
                    known = (largest, total, sum)
                    _same, _total, sum = _attend_extra(known, q, i, place, inputs, numbers, C)
            for n0 in range(begin, end, CAREFUL_BLOCK):
                sum = _attend_carefully(sum, part, q, i, n0, place, inputs, numbers, base, C)
            sum = tl.where(nothing[:, None], 0.0, sum * tl.where(part == 0, scale_out, 1.0)[:, None])
            store_part(to, i, out.row, sum, part, present, C.V, C.BLOCK_V)
