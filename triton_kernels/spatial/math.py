"""What the kernels of spatial attention share: places of a tile, temperature, weights, coordinates.

Blocks are [maps or channels, positions]. A program has one tile of BLOCK_P positions of one sample; a sample
takes `splits` programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.activations import exp_nonpositive
from ..core.storage import INTERPRETING, load
from .arguments import Place


@triton.jit
def _rounded_quotient(x, y):
    """Quotient, rounded to nearest: Triton's x / y of float32 may be 2 ulp off."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def place_of(program, inputs, numbers, C: tl.constexpr):
    """The tile of program `program`."""
    n = program // numbers.splits
    p = (program - n * numbers.splits) * C.BLOCK_P + tl.arange(0, C.BLOCK_P)[None, :]
    n, p = n.to(tl.int64), p.to(tl.int64)
    present = p < numbers.positions
    shown = present
    if inputs.mask is not None:
        at = n * inputs.mask.sample + p * inputs.mask.position
        shown = shown & (tl.load(inputs.mask.data + at, mask=present, other=0) != 0)
    return Place(n, p, present, shown)


@triton.jit
def temperature_of(inputs, numbers, accumulator: tl.constexpr):
    """T, at least the smallest normal number; NaN unless positive."""
    if inputs.learned is not None:
        t = tl.load(inputs.learned).to(accumulator)
        tiny: tl.constexpr = 2.2250738585072014e-308 if accumulator == tl.float64 else 1.1754943508222875e-38
        t = tl.where(t > 0, tl.where(t < tiny, tiny, t), float("nan"))
    else:
        t = numbers.bits.to(tl.float64, bitcast=True).to(accumulator)
    return t


@triton.jit
def weight_of(below, t):
    """exp(below / T) of scores that are `below` the largest; 0 for -inf, at any T."""
    gone = below == float("-inf")
    return tl.where(gone, 0.0, exp_nonpositive(tl.where(gone, 0.0, below) / t))


@triton.jit
def or_zero(largest):
    """The largest score, or 0 where that is -inf: nothing is to be seen."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def or_one(total):
    """A sum of weights to divide by."""
    return tl.where(total == 0, 1.0, total)


@triton.jit
def coordinate(i, n, accumulator: tl.constexpr):
    """Position i of n: from -1 to 1, rounded once; -1 if n is 1."""
    steps = (n - 1).to(tl.int64)
    above = (2 * i.to(tl.int64) - steps).to(accumulator)
    most = tl.where(steps > 0, steps, 1).to(accumulator)
    return tl.where(steps > 0, _rounded_quotient(above, most), -1.0)


@triton.jit
def row_of(x, k):
    """Row k [1, BLOCK_P] of x [BLOCK_G, BLOCK_P]."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == k, x, 0.0), 0, keep_dims=True)


@triton.jit
def multiplied(x, y, sum, PRECISION: tl.constexpr):
    """Sum + x y, a matrix product; of float64 without tl.dot, which Triton 3.6 fails to compile."""
    if x.dtype == tl.float64:
        sum += tl.sum(x[:, :, None] * y[None, :, :], 1)
    else:
        if INTERPRETING and x.dtype == tl.bfloat16:  # whose products the interpreter gets wrong
            x, y = x.to(tl.float32), y.to(tl.float32)
        sum = tl.dot(x, y, sum, input_precision=PRECISION)
    return sum


@triton.jit
def combined(stats, n, splits, g, t, C: tl.constexpr):
    """Largest score and sum of weights of each map [BLOCK_G, 1], from its splits in order."""
    first = stats + (n * splits * C.MAPS + g) * 2
    mask = g < C.MAPS
    accumulator: tl.constexpr = stats.dtype.element_ty
    largest = tl.full((C.BLOCK_G, 1), float("-inf"), accumulator)
    for j in range(splits):
        theirs = tl.load(first + j * C.MAPS * 2, mask=mask, other=float("-inf"))
        largest = tl.where(theirs > largest, theirs, largest)
    total = tl.zeros((C.BLOCK_G, 1), accumulator)
    for j in range(splits):
        factor = weight_of(tl.load(first + j * C.MAPS * 2, mask=mask, other=0.0) - or_zero(largest), t)
        total += load(first + j * C.MAPS * 2 + 1, 0, mask) * factor
    return largest, total
