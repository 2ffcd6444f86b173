"""Gradients of attention that belong to keys: d k and d v.

    d v = (p z)^T g     d k = scale dr^T q,  dr and p as in `rows`, transposed

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

from .arguments import Incoming, Inputs
from .math import (
    drawn_weights,
    in_head,
    kept_keys,
    key_rows,
    load_keys,
    load_queries,
    multiplied,
    number,
    place_of,
    products,
    row_tiles,
    scores_of,
    store_tile,
    without_full,
)
from .rows import load_sums, score_gradient, weight_gradient


@triton.jit
def _column_step(
    state, k, v, n0, m0, place, inputs, incoming, numbers,
    MASKED: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The d k, still to be scaled, and d v with one more tile of rows, from m0, of one head."""
    d_k, d_v = state
    i, j = m0 + tl.arange(0, C.BLOCK_M), n0 + tl.arange(0, C.BLOCK_N)
    here = i < place.rows
    q = load_queries(inputs.query, place, i, here, C.D, C.BLOCK_D)
    s, kept, t = scores_of(k, q, i[None, :], j[:, None], place, inputs, numbers, MASKED, C)
    lse, low, delta = load_sums(incoming, i, here, place, numbers, C.NATURAL)
    dp = tl.zeros((C.BLOCK_N, C.BLOCK_M), d_k.dtype)
    g = None
    if incoming.output is not None:
        g = load_queries(incoming.output, place, i, here, C.V, C.BLOCK_V)
        if KEYS:
            dp = products(v, g, C.PRECISION)
    if incoming.weights is not None:
        exists = here[None, :] & (j < place.columns)[:, None]
        dp += weight_gradient(incoming, i[None, :], j[:, None], exists, place, numbers, d_k.dtype)
    drawn = None
    if inputs.seed is not None:
        drawn = tl.trans(drawn_weights(i, n0, place, inputs, numbers, C.BLOCK_M, C.BLOCK_N))
    pz, _, dr = score_gradient(
        s, kept, t, dp, drawn, lse[None, :], low[None, :], delta[None, :], numbers, MASKED, C.NATURAL
    )
    if VALUES and incoming.output is not None:
        d_v = multiplied(pz, g, d_v, C.PRECISION)
    if KEYS:
        d_k = multiplied(dr, q, d_k, C.PRECISION)
    return d_k, d_v


@triton.jit(do_not_specialize=["numbers"])
def attention_columns_kernel(inputs, incoming, d_k, d_v, numbers, C: tl.constexpr):
    """The d k and d v of a tile of keys; one of them may be None."""
    inputs, incoming = Inputs(*inputs), Incoming(*incoming)
    wide: tl.constexpr = incoming.lse.dtype.element_ty
    groups = numbers.heads // numbers.group
    tile, g = tl.program_id(0) % numbers.tiles, tl.program_id(0) // numbers.tiles % groups
    place = place_of(tl.program_id(0) // numbers.tiles // groups, g * numbers.group, inputs, numbers)
    n0 = tile * C.BLOCK_N
    if n0 >= place.columns:  # of a packed sequence
        return
    KEYS: tl.constexpr = d_k is not None
    VALUES: tl.constexpr = d_v is not None
    j = n0 + tl.arange(0, C.BLOCK_N)
    here = kept_keys(j, place, inputs)
    k = load_keys(inputs.key, place, j, here, C.D, C.BLOCK_D)
    v = None
    if KEYS and incoming.output is not None:
        v = load_keys(inputs.value, place, j, here, C.V, C.BLOCK_V)
    state = (tl.zeros((C.BLOCK_N, C.BLOCK_D), wide), tl.zeros((C.BLOCK_N, C.BLOCK_V), wide))
    begin, end, full_begin, full_end = row_tiles(n0, place, inputs, numbers, C)
    # One loop over the tiles of all heads: nested ones keep more in registers than there are.
    full = (full_end - full_begin) // C.BLOCK_M
    for step in range(numbers.group * full):
        head, m0 = g * numbers.group + step // full, full_begin + step % full * C.BLOCK_M
        at = in_head(place, head, g)
        state = _column_step(state, k, v, n0, m0, at, inputs, incoming, numbers, False, KEYS, VALUES, C)
    others = (end - begin) // C.BLOCK_M - full
    for step in range(numbers.group * others):
        head, m1 = g * numbers.group + step // others, begin + step % others * C.BLOCK_M
        m0 = without_full(m1, full_begin, full_end)
        at = in_head(place, head, g)
        state = _column_step(state, k, v, n0, m0, at, inputs, incoming, numbers, True, KEYS, VALUES, C)
    sum_k, sum_v = state
    present = j < place.columns
    if d_k is not None:
        sum_k = tl.where(here[:, None], sum_k * number(numbers.unscaled, wide), 0.0)
        store_tile(key_rows(d_k, place), j, d_k.row, sum_k, present, C.D, C.BLOCK_D)
    if d_v is not None:
        sum_v = tl.where(here[:, None], sum_v, 0.0)
        store_tile(key_rows(d_v, place), j, d_v.row, sum_v, present, C.V, C.BLOCK_V)
