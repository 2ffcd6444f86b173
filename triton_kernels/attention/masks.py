"""Gradient of a mask that is added to the scores: theirs, summed over what the mask is broadcast over.

    d mask = sum ds,  ds = p (dp - delta) as in `rows`

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
from .arguments import Incoming, Inputs
from .math import drawn_weights, key_tiles, load_keys, load_queries, place_of, products, scores_of
from .rows import load_sums, score_gradient, weight_gradient


@triton.jit
def _divided(n, size):
    """Remainder and quotient: the place in the fastest of the remaining dimensions, and the rest."""
    return n % size, n // size


@triton.jit(do_not_specialize=["numbers", "batch_size", "column_tiles", "steps", "splits"])
def attention_mask_gradient_kernel(
    inputs, incoming, partials, batch_size, column_tiles, steps, splits, numbers,
    ONE_B: tl.constexpr, ONE_H: tl.constexpr, ONE_L: tl.constexpr, ONE_S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Partials [splits, B, H, L, S], of size 1 where ONE_*; their type may be the mask's."""
    inputs, incoming = Inputs(*inputs), Incoming(*incoming)
    wide: tl.constexpr = incoming.lse.dtype.element_ty
    heads, tiles, rows, columns = numbers.heads, numbers.tiles, numbers.rows, numbers.columns
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
    sum = tl.zeros((C.BLOCK_M, C.BLOCK_N), wide)
    for step in range(split * steps, tl.minimum((split + 1) * steps, all)):
        n_tile, rest = _divided(step, column_tiles if ONE_S else 1)
        m_tile, rest = _divided(rest, tiles if ONE_L else 1)
        head, sequence = _divided(rest, heads if ONE_H else 1)
        head, sequence = own_h + head, own_b + sequence
        m0, n0 = (own_m + m_tile) * C.BLOCK_M, (own_n + n_tile) * C.BLOCK_N
        place = place_of(sequence, head, inputs, numbers)
        begin, end, _full_begin, _full_end = key_tiles(m0, place, inputs, numbers, C)
        if (n0 >= begin) & (n0 < end):
            i, j = m0 + tl.arange(0, C.BLOCK_M), n0 + tl.arange(0, C.BLOCK_N)
            q = load_queries(inputs.query, place, i, i < rows, C.D, C.BLOCK_D)
            k = load_keys(inputs.key, place, j, j < columns, C.D, C.BLOCK_D)
            s, kept, t = scores_of(q, k, i[:, None], j[None, :], place, inputs, numbers, True, C)
            dp = tl.zeros((C.BLOCK_M, C.BLOCK_N), wide)
            if incoming.output is not None:
                g_tile = load_queries(incoming.output, place, i, i < rows, C.V, C.BLOCK_V)
                v = load_keys(inputs.value, place, j, j < columns, C.V, C.BLOCK_V)
                dp = products(g_tile, v, C.PRECISION)
            if incoming.weights is not None:
                dp += weight_gradient(incoming, i[:, None], j[None, :], kept, place, numbers, wide)
            # Before dropout draws: its words need the registers in which addresses would wait.
            lse, low, delta = load_sums(incoming, i, i < rows, place, numbers, C.NATURAL)
            drawn = None
            if inputs.seed is not None:
                drawn = drawn_weights(i, n0, place, inputs, numbers, C.BLOCK_M, C.BLOCK_N)
            _pz, ds, _dr = score_gradient(
                s, kept, t, dp, drawn, lse[:, None], low[:, None], delta[:, None], numbers, True, C.NATURAL
            )
            sum += ds
    at = split.to(tl.int64)
    if not ONE_B:
        at = at * batch_size + own_b
    if not ONE_H:
        at = at * heads + own_h
    i, j = own_m * C.BLOCK_M + tl.arange(0, C.BLOCK_M), own_n * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
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
