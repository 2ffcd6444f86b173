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

from .arguments import Incoming, Inputs
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
    load_extra,
    load_keys,
    load_queries,
    logarithm,
    multiplied,
    number,
    place_of_rows,
    products,
    query_rows,
    scores_of,
    store_tile,
    sums_of_rows,
    weights_of,
    without_full,
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
def weight_gradient(incoming, rows, cols, here, place, numbers, wide: tl.constexpr):
    """Gradient of a tile's weights."""
    w = incoming.weights
    at = place.head.to(tl.int64) * w.head + rows.to(tl.int64) * w.row + cols.to(tl.int64) * w.column
    x = tl.load(w.data + place.batch * w.batch + at, mask=here, other=0.0)
    return x.to(wide) * number(numbers.weight_scale, wide)


@triton.jit
def score_gradient(
    s, kept, t, dp, drawn, lse, low, delta, numbers, MASKED: tl.constexpr, NATURAL: tl.constexpr
):
    """Weights after dropout, the gradient of the scores, and that before the softcap."""
    p = weights_of(s, lse, low, NATURAL)
    if MASKED:
        p = tl.where(kept, p, 0.0)
    pz = p
    if drawn is not None:
        keep = number(numbers.keep_scale, s.dtype)
        pz = tl.where(drawn, p * keep, 0.0)
        dp = tl.where(drawn, dp * keep, 0.0)
    ds = p * (dp - delta)
    if MASKED:
        ds = tl.where(kept, ds, 0.0)
    dr = ds
    if numbers.cap is not None:
        dr = ds * (1.0 - t * t)
    return pz, ds, dr


@triton.jit
def _sums(p, drawn, keep, rows, cols, here, place, incoming, numbers, state):
    """Sums of the weights, and of weights times their gradient."""
    total, dot = state
    total += tl.sum(p, 1)
    if incoming.weights is not None:
        pz = p
        if drawn is not None:
            pz = tl.where(drawn, p * keep, 0.0)
        dot += tl.sum(pz * weight_gradient(incoming, rows, cols, here, place, numbers, p.dtype), 1)
    return total, dot


@triton.jit
def _sums_again(base, i, m0, place, inputs, incoming, numbers, wide: tl.constexpr, C: tl.constexpr):
    """The same over all columns, from weights exp(s - base)."""
    state = (tl.zeros((C.BLOCK_M,), wide), tl.zeros((C.BLOCK_M,), wide))
    keep = number(numbers.keep_scale, wide)
    present = i < place.rows
    q = load_queries(inputs.query, place, i, present, C.D, C.BLOCK_D)
    if C.EXTRA > 0:
        k_extra = load_extra(inputs.extra_key, place, C.EXTRA, C.D, C.BLOCK_D)
        s_extra, exists, _ = extra_scores(q, k_extra, numbers, C)
        drawn_there = None
        if inputs.seed is not None:
            drawn_there = drawn_extra(i, place, inputs, numbers, C.BLOCK_M)
        cols = (place.columns + tl.arange(0, EXTRA_BLOCK))[None, :]
        p_extra = weights_of(s_extra, base[:, None], None, C.NATURAL)
        state = _sums(p_extra, drawn_there, keep, i[:, None], cols, exists & present[:, None], place,
                      incoming, numbers, state)  # fmt: skip
    begin, end, _, _ = key_tiles(m0, place, inputs, numbers, C)
    for n0 in range(begin, end, C.BLOCK_N):
        j = n0 + tl.arange(0, C.BLOCK_N)
        k = load_keys(inputs.key, place, j, j < place.columns, C.D, C.BLOCK_D)
        s, seen, _t = scores_of(q, k, i[:, None], j[None, :], place, inputs, numbers, True, C)
        drawn = None
        if inputs.seed is not None:
            drawn = drawn_weights(i, n0, place, inputs, numbers, C.BLOCK_M, C.BLOCK_N)
        p = tl.where(seen, weights_of(s, base[:, None], None, C.NATURAL), 0.0)
        state = _sums(p, drawn, keep, i[:, None], j[None, :], seen, place, incoming, numbers, state)
    return state


@triton.jit(do_not_specialize=["numbers"])
def attention_delta_kernel(inputs, out, grad_lse, incoming, numbers, C: tl.constexpr):
    """Delta [B, H, L], and `low` if scores are natural; visits keys for weights' gradient or a large lse."""
    inputs, incoming = Inputs(*inputs), Incoming(*incoming)
    lse, g = incoming.lse, incoming.output
    wide: tl.constexpr = lse.dtype.element_ty
    place = place_of_rows(inputs, numbers)
    m0 = tl.program_id(0) % numbers.tiles * C.BLOCK_M
    if m0 >= place.rows:  # of a packed sequence
        return
    i = m0 + tl.arange(0, C.BLOCK_M)
    present = i < place.rows
    at = sums_of_rows(i, place, numbers)
    sum = tl.zeros((C.BLOCK_M,), wide)
    if g is not None:
        g_tile = load_queries(g, place, i, present, C.V, C.BLOCK_V)
        o_tile = load_queries(out, place, i, present, C.V, C.BLOCK_V)
        sum += tl.sum(g_tile.to(wide) * o_tile.to(wide), 1)
    if grad_lse is not None:
        sum -= tl.load(grad_lse + at, mask=present, other=0.0)
    own = tl.load(lse + at, mask=present, other=0.0)
    nothing = own == float("-inf")
    if C.NATURAL or incoming.weights is not None:
        total, dot = tl.full((C.BLOCK_M,), 1.0, wide), tl.zeros((C.BLOCK_M,), wide)
        again = incoming.weights is not None
        if not again:
            limit = limit_of(inputs.query.data.dtype)
            again = tl.max(tl.where(nothing, 0.0, tl.abs(own)), 0) > limit
        if again:
            base = tl.where(nothing, float("inf"), own)
            if not C.NATURAL:
                base *= LOG2E
            total, dot = _sums_again(base, i, m0, place, inputs, incoming, numbers, wide, C)
            total = tl.where(total > 0, total, 1.0)
            if C.NATURAL:
                dot /= total
        sum += dot
        if C.NATURAL:
            tl.store(incoming.low + at, logarithm(total) * LOG2E, mask=present)
    tl.store(incoming.delta + at, tl.where(nothing, 0.0, sum), mask=present)


@triton.jit
def load_sums(incoming, index, here, place, numbers, NATURAL: tl.constexpr):
    """Of rows `index`: lse in the units of the scores, what it has lost, and delta."""
    at = sums_of_rows(index, place, numbers)
    lse, low = load_lse(incoming.lse, incoming.low, at, here, NATURAL)
    return lse, low, tl.load(incoming.delta + at, mask=here, other=0.0)


@triton.jit
def _row_step(
    acc, q, g_tile, sums, i, n0, place, inputs, incoming, numbers,
    MASKED: tl.constexpr, CAREFUL: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The d q, still to be scaled, with one more tile of keys; CAREFUL: rows see what they keep."""
    BLOCK_N: tl.constexpr = CAREFUL_BLOCK if CAREFUL else C.BLOCK_N
    lse, low, delta = sums
    j = n0 + tl.arange(0, BLOCK_N)
    here = None
    if MASKED:
        here = kept_keys(j, place, inputs)
    k = load_keys(inputs.key, place, j, here, C.D, C.BLOCK_D)
    s, kept, t = scores_of(q, k, i[:, None], j[None, :], place, inputs, numbers, MASKED, C)
    if incoming.output is not None:
        dp = products(g_tile, load_keys(inputs.value, place, j, here, C.V, C.BLOCK_V), C.PRECISION)
    else:
        dp = tl.zeros((C.BLOCK_M, BLOCK_N), acc.dtype)
    if incoming.weights is not None:
        exists = (i < place.rows)[:, None] & (j < place.columns)[None, :]
        dp += weight_gradient(incoming, i[:, None], j[None, :], exists, place, numbers, acc.dtype)
    drawn = None
    if inputs.seed is not None:
        drawn = drawn_weights(i, n0, place, inputs, numbers, C.BLOCK_M, BLOCK_N)
    _p, _, dr = score_gradient(
        s, kept, t, dp, drawn, lse[:, None], low[:, None], delta[:, None], numbers, MASKED, C.NATURAL
    )
    if CAREFUL:  # a row that sees a key that is not finite has NaN in dr, or a weight of 0
        clean = tl.where(tl.abs(k.to(acc.dtype)) < float("inf"), k.to(acc.dtype), 0.0)
        acc = multiplied(dr, clean.to(k.dtype), acc, C.PRECISION)
    else:
        acc = multiplied(dr, k, acc, C.PRECISION)
    return acc


@triton.jit
def _extra_step(acc, q, g_tile, sums, i, place, inputs, incoming, numbers, d_key, d_value, C: tl.constexpr):
    """The same with the extra columns; their gradients from these rows are written, unless None."""
    lse, low, delta = sums
    x = tl.arange(0, EXTRA_BLOCK)
    k = load_extra(inputs.extra_key, place, C.EXTRA, C.D, C.BLOCK_D)
    s, kept, t = extra_scores(q, k, numbers, C)
    if incoming.output is not None:
        dp = products(g_tile, load_extra(inputs.extra_value, place, C.EXTRA, C.V, C.BLOCK_V), C.PRECISION)
    else:
        dp = tl.zeros((C.BLOCK_M, EXTRA_BLOCK), acc.dtype)
    if incoming.weights is not None:
        exists = kept & (i < place.rows)[:, None]
        cols = (place.columns + x)[None, :]
        dp += weight_gradient(incoming, i[:, None], cols, exists, place, numbers, acc.dtype)
    drawn = None
    if inputs.seed is not None:
        drawn = drawn_extra(i, place, inputs, numbers, C.BLOCK_M)
    pz, _, dr = score_gradient(
        s, kept, t, dp, drawn, lse[:, None], low[:, None], delta[:, None], numbers, True, C.NATURAL
    )
    if d_key is not None:
        found = multiplied(tl.trans(dr), q, tl.zeros((EXTRA_BLOCK, C.BLOCK_D), acc.dtype), C.PRECISION)
        found *= number(numbers.unscaled, acc.dtype)
        store_tile(d_key, x, C.D, found, x < C.EXTRA, C.D, C.BLOCK_D)
    if d_value is not None:
        found = tl.zeros((EXTRA_BLOCK, C.BLOCK_V), acc.dtype)
        if incoming.output is not None:
            found = multiplied(tl.trans(pz), g_tile, found, C.PRECISION)
        store_tile(d_value, x, C.V, found, x < C.EXTRA, C.V, C.BLOCK_V)
    return multiplied(dr, k, acc, C.PRECISION)


@triton.jit(do_not_specialize=["numbers"])
def attention_rows_kernel(inputs, incoming, d_q, d_extra_key, d_extra_value, numbers, C: tl.constexpr):
    """The d q of a tile of rows, and its parts of the extra columns' gradients; any of them may be None."""
    inputs, incoming = Inputs(*inputs), Incoming(*incoming)
    wide: tl.constexpr = incoming.lse.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    place = place_of_rows(inputs, numbers)
    m0 = tl.program_id(0) % numbers.tiles * C.BLOCK_M
    if m0 >= place.rows:  # of a packed sequence
        return
    i = m0 + tl.arange(0, C.BLOCK_M)
    present = i < place.rows
    q = load_queries(inputs.query, place, i, present, C.D, C.BLOCK_D)
    g_tile = None
    if incoming.output is not None:
        g_tile = load_queries(incoming.output, place, i, present, C.V, C.BLOCK_V)
    sums = load_sums(incoming, i, present, place, numbers, C.NATURAL)
    acc = tl.zeros((C.BLOCK_M, C.BLOCK_D), wide)
    if C.EXTRA > 0:
        if d_extra_key is not None:
            d_extra_key += program * C.EXTRA * C.D
        if d_extra_value is not None:
            d_extra_value += program * C.EXTRA * C.V
        acc = _extra_step(
            acc, q, g_tile, sums, i, place, inputs, incoming, numbers, d_extra_key, d_extra_value, C
        )
    if d_q is not None:
        begin, end, full_begin, full_end = key_tiles(m0, place, inputs, numbers, C)
        for n0 in range(full_begin, full_end, C.BLOCK_N):
            acc = _row_step(acc, q, g_tile, sums, i, n0, place, inputs, incoming, numbers, False, False, C)
        for n1 in range(begin, end - (full_end - full_begin), C.BLOCK_N):
            n0 = without_full(n1, full_begin, full_end)
            acc = _row_step(acc, q, g_tile, sums, i, n0, place, inputs, incoming, numbers, True, False, C)
        if inputs.mask is not None or numbers.left is not None or numbers.right is not None:
            again = not all_finite(acc)
            acc = tl.where(again, 0.0, acc)
            if C.EXTRA > 0:  # noqa: SIM102  # known when compiled
                if again:
                    acc = _extra_step(
                        acc, q, g_tile, sums, i, place, inputs, incoming, numbers, None, None, C
                    )
            for n0 in range(begin, tl.where(again, end, begin), CAREFUL_BLOCK):
                acc = _row_step(acc, q, g_tile, sums, i, n0, place, inputs, incoming, numbers, True, True, C)
        acc *= number(numbers.unscaled, wide)
        store_tile(query_rows(d_q, place), i, d_q.row, acc, present, C.D, C.BLOCK_D)
