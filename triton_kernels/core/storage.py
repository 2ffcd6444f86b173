"""Elements between their storage type and the type of the arithmetic: float32, or float64 for float64."""

import triton
import triton.language as tl

from .support import interpreting

INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def load(ptr, offsets, mask):
    """Elements at ptr + offsets in the type of the arithmetic; 0 where masked."""
    x = tl.load(ptr + offsets, mask=mask, other=0.0)
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def _rounded_to_bfloat16(x):
    """The float32 x with the lower half of its bits 0, rounded to nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """The float x in a narrower type, rounded to nearest."""
    # Triton's interpreter truncates on the way to bfloat16, where devices round.
    if INTERPRETING and dtype == tl.bfloat16:
        x = _rounded_to_bfloat16(x)
    return x.to(dtype)


@triton.jit
def store(ptr, offsets, x, mask):
    """Stores x in the pointer's type, rounded to nearest."""
    tl.store(ptr + offsets, rounded(x, ptr.dtype.element_ty), mask=mask)
