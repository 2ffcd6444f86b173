"""What the kernels of attention share: places of a tile, products, scores, dropout.

A program has one tile of query rows or of keys of one head. Rows and columns are given as blocks [m, 1] and
[1, n], or [1, m] and [n, 1] where a tile is transposed. What is None costs nothing. In Triton 3.6 a tuple can
hold None only if it came with the kernel's arguments, and no function can return it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.activations import tanh
from ..core.storage import INTERPRETING, rounded
from .arguments import Place

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EXTRA_BLOCK = tl.constexpr(16)  # columns of the tile of extra ones: the least that a matrix product takes
CAREFUL_BLOCK = tl.constexpr(16)  # keys of a tile where values that are not finite are looked for


@triton.jit
def number(bits, dtype: tl.constexpr):
    """A number from a double's bits: a launch would narrow a float to float32. It passes 0 in 32 bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def place_of(sequence, head, inputs, numbers):
    """Where a head of sample or packed sequence `sequence` is."""
    batch = sequence.to(tl.int64)
    first_row = batch * 0
    first_key = batch * 0
    rows, columns = numbers.rows, numbers.columns
    if inputs.cu_seqlens_q is not None:
        first_row = tl.load(inputs.cu_seqlens_q + batch).to(tl.int64)
        first_key = tl.load(inputs.cu_seqlens_k + batch).to(tl.int64)
        rows = (tl.load(inputs.cu_seqlens_q + batch + 1) - first_row).to(tl.int32)
        columns = (tl.load(inputs.cu_seqlens_k + batch + 1) - first_key).to(tl.int32)
        batch = batch * 0
    return Place(sequence, batch, head, head // numbers.group, first_row, first_key, rows, columns)


@triton.jit
def in_head(place, head, key_head):
    """The same place in another head."""
    return Place(
        place.sequence, place.batch, head, key_head, place.first_row, place.first_key, place.rows,
        place.columns,
    )  # fmt: skip


@triton.jit
def place_of_rows(inputs, numbers):
    """That of a program with a tile of rows, which are the fastest axis of the grid."""
    outer = tl.program_id(0) // numbers.tiles
    return place_of(outer // numbers.heads, outer % numbers.heads, inputs, numbers)


@triton.jit
def query_rows(x, place):
    """Address of the head's rows of queries, or of what is laid out like them."""
    return x.data + place.batch * x.batch + place.head.to(tl.int64) * x.head + place.first_row * x.row


@triton.jit
def key_rows(x, place):
    """Address of the head's rows of keys, or of what is laid out like them."""
    return x.data + place.batch * x.batch + place.key_head.to(tl.int64) * x.head + place.first_key * x.row


@triton.jit
def sums_of_rows(index, place, numbers):
    """Where lse and the like [B, H, L] have rows `index`."""
    return (place.batch * numbers.heads + place.head) * numbers.total_rows + place.first_row + index


@triton.jit
def load_tile(base, index, stride, present, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `index` [n] of a matrix of SIZE columns: [n, BLOCK], 0 beyond SIZE and where not `present`."""
    d = tl.arange(0, BLOCK)[None, :]
    at = base + index.to(tl.int64)[:, None] * stride + d
    if present is None:
        x = tl.load(at) if SIZE == BLOCK else tl.load(at, mask=d < SIZE, other=0.0)
    elif SIZE == BLOCK:
        x = tl.load(at, mask=present[:, None], other=0.0)
    else:
        x = tl.load(at, mask=present[:, None] & (d < SIZE), other=0.0)
    return x


@triton.jit
def load_queries(x, place, index, present, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The head's queries `index`."""
    return load_tile(query_rows(x, place), index, x.row, present, SIZE, BLOCK)


@triton.jit
def load_keys(x, place, index, present, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The head's keys `index`."""
    return load_tile(key_rows(x, place), index, x.row, present, SIZE, BLOCK)


@triton.jit
def load_extra(base, place, EXTRA: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The head's extra columns [EXTRA_BLOCK, BLOCK]."""
    x = tl.arange(0, EXTRA_BLOCK)
    return load_tile(base + place.key_head.to(tl.int64) * EXTRA * SIZE, x, SIZE, x < EXTRA, SIZE, BLOCK)


@triton.jit
def store_tile(base, index, stride, x, present, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes rows `index` [n] of a matrix of SIZE columns, rounded to nearest."""
    d = tl.arange(0, BLOCK)[None, :]
    at = base + index.to(tl.int64)[:, None] * stride + d
    tl.store(at, rounded(x, base.dtype.element_ty), mask=present[:, None] & (d < SIZE))


@triton.jit
def products(x, y, PRECISION: tl.constexpr):
    """Products x y^T [m, n] of x [m, d] and y [n, d]."""
    if x.dtype == tl.float64:
        found = tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=tl.float64)
    elif INTERPRETING and x.dtype == tl.bfloat16:  # whose products the interpreter gets wrong
        found = tl.dot(x.to(tl.float32), tl.trans(y.to(tl.float32)), input_precision="ieee")
    else:
        found = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    return found


@triton.jit
def multiplied(x, y, sum, PRECISION: tl.constexpr):
    """Sum + x y, x [m, n] rounded to the type of y [n, d]."""
    x = rounded(x, y.dtype)
    if y.dtype == tl.float64:  # without out_dtype Triton 3.6 fails to compile
        sum = tl.dot(x, y, sum, input_precision="ieee", out_dtype=tl.float64)
    elif INTERPRETING and y.dtype == tl.bfloat16:
        sum = tl.dot(x.to(tl.float32), y.to(tl.float32), sum, input_precision="ieee")
    else:
        sum = tl.dot(x, y, sum, input_precision=PRECISION)
    return sum


@triton.jit
def all_finite(x):
    """Whether a block [m, n] has neither inf nor NaN."""
    return tl.max(tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1), 0) == 0


@triton.jit
def multiplied_where_seen(x, seen, y, sum, part, PRECISION: tl.constexpr):
    """Sum + x y, where what is not finite in y [n, d] counts only where it is `seen` [m, n], in three parts.

    Part 0 is the product of finite values, 1 and 2 are above 0 where a sum sees inf and -inf; NaN is both.
    """
    wide = y.to(sum.dtype)
    finite = tl.abs(wide) < float("inf")
    other_sign = tl.where(part == 2, -wide, wide) < 0
    odd = tl.where(finite | other_sign, 0.0, 1.0)
    x = tl.where(part == 0, x, tl.where(seen, 1.0, 0.0))
    y = tl.where(part == 0, tl.where(finite, wide, 0.0), odd).to(y.dtype)
    return multiplied(x, y, sum, PRECISION)


@triton.jit
def store_part(base, index, stride, x, part, present, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes part 0 of such a sum, or adds what the others say to what is there."""
    d = tl.arange(0, BLOCK)[None, :]
    at = base + index.to(tl.int64)[:, None] * stride + d
    here = present[:, None] & (d < SIZE)
    here = here & ((part == 0) | (x > 0))
    there = tl.load(at, mask=here & (part != 0), other=0.0).to(x.dtype)
    x = tl.where(part == 0, x, there + tl.where(part == 2, float("-inf"), float("inf")))
    tl.store(at, rounded(x, base.dtype.element_ty), mask=here)


@triton.jit
def raw_scores(products, numbers):
    """Scores before anything is added, and tanh of the softcap's argument where there is one."""
    t = products
    if numbers.cap is not None:
        t = tanh(products * number(numbers.cap, products.dtype))
    return t * number(numbers.scale, products.dtype), t


@triton.jit
def _added(s, kept, mask, at, here):
    """The scores with a mask's numbers, and what it keeps; a mask of bytes keeps what is not 0."""
    x = tl.load(mask + at, mask=here, other=0)
    if mask.dtype.element_ty == tl.uint8:
        kept = kept & (x != 0)
    else:
        x = x.to(s.dtype)
        s += x
        kept = kept & (x != float("-inf"))  # NaN takes part
    return s, kept


@triton.jit
def visible_scores(s, rows, cols, place, inputs, numbers, MASKED: tl.constexpr, C: tl.constexpr):
    """Scores with all that is added, -inf where not kept; and what is kept, which only MASKED finds out."""
    ahead = cols - rows - numbers.offset
    if inputs.slopes is not None:
        slope = tl.load(inputs.slopes + place.head).to(s.dtype)
        if not C.NATURAL:
            slope *= LOG2E
        s -= slope * tl.abs(ahead).to(s.dtype)
    kept = tl.full((1, 1), 1, tl.int1)
    if MASKED:
        kept = (cols < place.columns) & (rows < place.rows)
        if numbers.left is not None:
            kept = kept & (ahead >= -numbers.left)
        if numbers.right is not None:
            kept = kept & (ahead <= numbers.right)
        if inputs.mask is not None:
            at = place.batch * inputs.mask.batch + place.head.to(tl.int64) * inputs.mask.head
            at = at + rows.to(tl.int64) * inputs.mask.row + cols.to(tl.int64) * inputs.mask.column
            s, kept = _added(s, kept, inputs.mask.data, at, kept)
        if inputs.key_mask is not None:
            at_key = place.batch * inputs.key_mask.batch + cols.to(tl.int64) * inputs.key_mask.column
            s, kept = _added(s, kept, inputs.key_mask.data, at_key, cols < place.columns)
        s = tl.where(kept, s, float("-inf"))
    return s, kept


@triton.jit
def scores_of(x, y, rows, cols, place, inputs, numbers, MASKED: tl.constexpr, C: tl.constexpr):
    """Visible scores of x y^T, queries and keys or the reverse; what is kept; tanh of the softcap."""
    s, t = raw_scores(products(x, y, C.PRECISION), numbers)
    s, kept = visible_scores(s, rows, cols, place, inputs, numbers, MASKED, C)
    return s, kept, t


@triton.jit
def extra_scores(q, k, numbers, C: tl.constexpr):
    """Scores of the extra columns [m, EXTRA_BLOCK], which of them exist, tanh as `raw_scores` gives it."""
    s, t = raw_scores(products(q, k, C.PRECISION), numbers)
    exists = (tl.arange(0, EXTRA_BLOCK) < C.EXTRA)[None, :]
    kept = exists & (tl.zeros((q.shape[0], EXTRA_BLOCK), tl.int32) == 0)
    return tl.where(kept, s, float("-inf")), kept, t


@triton.jit
def kept_keys(index, place, inputs):
    """Which of the keys `index` [n] exist and are kept by their mask."""
    here = index < place.columns
    if inputs.key_mask is not None:
        mask = inputs.key_mask
        at = place.batch * mask.batch + index.to(tl.int64) * mask.column
        x = tl.load(mask.data + at, mask=here, other=0)
        here = here & (x != 0) if mask.data.dtype.element_ty == tl.uint8 else here & (x != float("-inf"))
    return here


@triton.jit
def weights_of(s, lse, low, NATURAL: tl.constexpr):
    """exp(s - lse); `low`: what lse has lost, to base 2, or None.

    Scores are logarithms to base 2, which saves a product, or natural: where masks are added, as the lowest
    number of a dtype times log2(e) would be -inf, and where float32's precision is asked for.
    """
    if NATURAL:
        e = s - lse
        if s.dtype == tl.float64:
            if low is not None:
                e -= low * LN2
            e = tl.exp(e)
        elif low is not None:
            e = tl.exp2(e * LOG2E - low)
        else:
            e = tl.exp2(e * LOG2E)
    else:
        e = tl.exp2(s - lse)
    return e


@triton.jit
def logarithm(x):
    """Natural, of a sum of weights."""
    return tl.log(x) if x.dtype == tl.float64 else tl.log2(x) * LN2


@triton.jit
def drawn_weights(rows, n0, place, inputs, numbers, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights [BLOCK_M, BLOCK_N] of rows [BLOCK_M] and columns from n0, a multiple of 4, dropout keeps.

    Philox4x32-10; the four words of a call serve neighbouring columns.
    """
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
    fours = (n0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :] + zero
    batch, seed = place.sequence + zero, tl.load(inputs.seed)
    w0, w1, w2, w3 = tl.philox(seed, fours, rows[:, None] + zero, place.head + zero, batch)
    least = numbers.threshold.to(tl.uint32)
    k0, k1, k2, k3 = (w0 >= least), (w1 >= least), (w2 >= least), (w3 >= least)
    even = tl.join(k0.to(tl.int8), k2.to(tl.int8))
    odd = tl.join(k1.to(tl.int8), k3.to(tl.int8))
    return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_N)) != 0


@triton.jit
def drawn_extra(rows, place, inputs, numbers, BLOCK_M: tl.constexpr):
    """Which weights [BLOCK_M, EXTRA_BLOCK] of the extra columns dropout keeps."""
    zero = tl.zeros((BLOCK_M, EXTRA_BLOCK), tl.int32)
    cols = (place.columns + tl.arange(0, EXTRA_BLOCK))[None, :] + zero
    batch, seed = place.sequence + zero, tl.load(inputs.seed)
    w0, w1, w2, w3 = tl.philox(seed, cols // 4, rows[:, None] + zero, place.head + zero, batch)
    word = cols % 4
    drawn = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return drawn >= numbers.threshold.to(tl.uint32)


@triton.jit
def tiles_between(begin, end, full_begin, full_end, BLOCK: tl.constexpr):
    """Multiples of BLOCK: those of all tiles, and within them those of tiles in which all is kept."""
    end = tl.cdiv(tl.maximum(end, 0), BLOCK) * BLOCK
    begin = tl.minimum(tl.maximum(begin, 0) // BLOCK * BLOCK, end)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_begin, 0), BLOCK) * BLOCK, begin), end)
    full_end = tl.minimum(tl.maximum(tl.maximum(full_end, 0) // BLOCK * BLOCK, full_begin), end)
    return begin, end, full_begin, full_end


@triton.jit
def key_tiles(m0, place, inputs, numbers, C: tl.constexpr):
    """The key tiles of the query rows from m0, as `tiles_between` gives them; a mask leaves none full."""
    first = m0 + numbers.offset
    last = tl.minimum(m0 + C.BLOCK_M, place.rows) - 1 + numbers.offset
    begin, end, full_begin, full_end = m0 * 0, place.columns, m0 * 0, place.columns
    if numbers.right is not None:
        end = tl.minimum(place.columns, last + numbers.right + 1)
        full_end = tl.minimum(place.columns, first + numbers.right + 1)
    if numbers.left is not None:
        begin = first - numbers.left
        full_begin = last - numbers.left
    begin, end, full_begin, full_end = tiles_between(begin, end, full_begin, full_end, C.BLOCK_N)
    if inputs.mask is not None or inputs.key_mask is not None:
        full_end = full_begin
    return begin, end, full_begin, full_end


@triton.jit
def row_tiles(n0, place, inputs, numbers, C: tl.constexpr):
    """The row tiles of the keys from n0; rows that don't exist have weight 0 without a mask."""
    first = n0 - numbers.offset
    last = tl.minimum(n0 + C.BLOCK_N, place.columns) - 1 - numbers.offset
    begin, end, full_begin = n0 * 0, place.rows, n0 * 0
    full_end = tl.cdiv(place.rows, C.BLOCK_M) * C.BLOCK_M
    if numbers.right is not None:
        begin = first - numbers.right
        full_begin = last - numbers.right
    if numbers.left is not None:
        end = tl.minimum(place.rows, last + numbers.left + 1)
        full_end = tl.minimum(full_end, first + numbers.left + 1)
    begin, end, full_begin, full_end = tiles_between(begin, end, full_begin, full_end, C.BLOCK_M)
    if inputs.mask is not None or inputs.key_mask is not None:
        full_end = full_begin
    return begin, end, full_begin, full_end


@triton.jit
def without_full(n, full_begin, full_end):
    """Multiple `n` of those that are not in full tiles, counted from the first."""
    return tl.where(n < full_begin, n, n + (full_end - full_begin))
