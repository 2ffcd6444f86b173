"""Kernels of the depthwise convolution; their launchers are in `launch`.

    z[n, c, y, x] = b[c] + sum_{u, v} w[c, u, v] in[n, c / m, s y + d u - p, s x + d v - p]
    out = act(z)

Tiling: a program makes [BLOCK_P, BLOCK_C] elements: positions of all images laid end to end, and channels.
Images are given by their strides, so that one kernel serves both memory formats; the launcher makes the tile
long where memory is contiguous. Arithmetic in float32 (float64 for float64), offsets of 64 bits.
Bytes moved: s (in + out) + s |w|, s = item size; overlapping windows come from the caches.
Limits: dense images; fewer than 2^31 rows in a batch, so that row numbers fit 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.storage import load, store
from .activations import activated, activation_gradient
from .arguments import Place

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
MOST_UNROLLED = tl.constexpr(7)  # taps of a row


def tile_size(kernel_width: int, item_bytes: int) -> int:
    """Elements of a program: 4 a thread; 2 where doubles or a long row of taps fill the registers."""
    return 256 if kernel_width > 3 or item_bytes == 8 else 512


@triton.jit
def place_of(program, numbers, image, BLOCK_P: tl.constexpr):
    """The positions [BLOCK_P] of block `program`, in images of this size."""
    positions = program.to(numbers.positions.dtype) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = positions // image.width
    n = row // image.height
    x = (positions - row * image.width).to(tl.int32)
    y = (row - n * image.height).to(tl.int32)
    return Place(n, y, x, positions < numbers.positions)


@triton.jit
def column_of(place):
    """The same as a column [BLOCK_P, 1], to be met by channels [1, BLOCK_C]."""
    return Place(place.image[:, None], place.y[:, None], place.x[:, None], place.present[:, None])


@triton.jit
def offset_of(image, n, y, x):
    """Where rows y and columns x of images n are, but for their channel."""
    return n.to(tl.int64) * image.n + y.to(tl.int64) * image.y + x.to(tl.int64) * image.x


@triton.jit
def _add_tap(
    z, input, weight, plane, place, channels, mask, channel_mask, u, v, window, numbers, C: tl.constexpr
):
    """Adds the products of tap (u, v) to z; `place` is that of tap (0, 0)."""
    row, column = place.y + u * window.dilation_h, place.x + v * window.dilation_w
    here = mask & (row >= 0) & (row < input.height) & (column >= 0) & (column < input.width)
    value = load(input.data, plane + row.to(tl.int64) * input.y + column.to(tl.int64) * input.x, here)
    tap = u * C.KW + v
    number = numbers.KH * C.KW - 1 - tap if C.FLIPPED else tap
    w = load(weight, channels * (numbers.KH * C.KW) + number, channel_mask)
    return z + tl.where(here, value * w, 0.0)


@triton.jit
def convolved(input, weight, bias, place, channels, mask, channel_mask, window, numbers, C: tl.constexpr):
    """The convolution z at positions [BLOCK_P, 1] and channels [1, BLOCK_C]."""
    accumulator = tl.float64 if input.data.dtype.element_ty == tl.float64 else tl.float32
    z = tl.zeros((C.BLOCK_P, C.BLOCK_C), accumulator)
    if bias is not None:
        z += load(bias, channels, channel_mask)
    plane = place.image.to(tl.int64) * input.n + (channels // C.MULTIPLIER) * input.c
    y, x = place.y * window.stride_h - numbers.pad_top, place.x * window.stride_w - numbers.pad_left
    corner = Place(place.image, y, x, place.present)
    for u in range(numbers.KH):
        if C.KW <= MOST_UNROLLED:
            for v in tl.static_range(C.KW):
                z = _add_tap(z, input, weight, plane, corner, channels, mask, channel_mask, u, v, window,
                             numbers, C)  # fmt: skip
        else:
            for v in range(C.KW):
                z = _add_tap(z, input, weight, plane, corner, channels, mask, channel_mask, u, v, window,
                             numbers, C)  # fmt: skip
    return z


@triton.jit(do_not_specialize=["numbers"])
def depthwise_forward_kernel(input, weight, bias, grad, output, channels, window, numbers, C: tl.constexpr):
    """The output act(z), or, given the gradient of that, the gradient of z."""
    place = column_of(place_of(tl.program_id(0), numbers, output, C.BLOCK_P))
    c = tl.program_id(1) * C.BLOCK_C + tl.arange(0, C.BLOCK_C)[None, :]
    mask = place.present & (c < channels)
    z = convolved(input, weight, bias, place, c, mask, c < channels, window, numbers, C)
    to = offset_of(output, place.image, place.y, place.x) + c.to(tl.int64) * output.c
    if grad is not None:
        z = activation_gradient(load(grad, to, mask), z, C.ACTIVATION)
    else:
        z = activated(z, C.ACTIVATION)
    store(output.data, to, z, mask)


@triton.jit
def _gather_tap(sum, grad, weight, tap, place, c, mask, channel_mask, window, C: tl.constexpr):
    row, column = place.y - tap // C.KW * window.dilation_h, place.x - tap % C.KW * window.dilation_w
    here = mask & (row >= 0) & (row % window.stride_h == 0) & (column >= 0) & (column % window.stride_w == 0)
    row, column = row // window.stride_h, column // window.stride_w
    here = here & (row < grad.height) & (column < grad.width)
    at = offset_of(grad, place.image, row, column)
    for j in range(C.MULTIPLIER):
        channel = c.to(tl.int64) * C.MULTIPLIER + j
        d = load(grad.data, at + channel * grad.c, here)
        sum += tl.where(here, d * load(weight, channel * (C.KH * C.KW) + tap, channel_mask), 0.0)
    return sum


@triton.jit(do_not_specialize=["numbers"])
def depthwise_gather_kernel(grad, weight, output, channels, window, numbers, C: tl.constexpr):
    """The input gradient, any stride and multiplier; positions and channels are the input's."""
    place = column_of(place_of(tl.program_id(0), numbers, output, C.BLOCK_P))
    c = tl.program_id(1) * C.BLOCK_C + tl.arange(0, C.BLOCK_C)[None, :]
    mask = place.present & (c < channels)
    accumulator = tl.float64 if grad.data.dtype.element_ty == tl.float64 else tl.float32
    sum = tl.zeros((C.BLOCK_P, C.BLOCK_C), accumulator)
    padded = Place(place.image, place.y + numbers.pad_top, place.x + numbers.pad_left, place.present)
    for tap in range(C.KH * C.KW):
        sum = _gather_tap(sum, grad, weight, tap, padded, c, mask, c < channels, window, C)
    to = offset_of(output, place.image, place.y, place.x) + c.to(tl.int64) * output.c
    store(output.data, to, sum, mask)


@triton.jit(do_not_specialize=["numbers", "steps"])
def depthwise_grad_weight_kernel(grad, input, partials, channels, steps, window, numbers, C: tl.constexpr):
    """Sums partials[split, tap, c] over `steps` blocks of positions; row KH KW has the bias's gradient."""
    c = tl.program_id(1) * C.BLOCK_C + tl.arange(0, C.BLOCK_C)
    channel_mask = c < channels
    taps = tl.program_id(2) * C.TAPS + tl.arange(0, C.TAPS)
    plane = (c // C.MULTIPLIER).to(tl.int64) * input.c
    accumulator = tl.float64 if input.data.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros((C.TAPS, C.BLOCK_C), accumulator)
    bias = tl.zeros((C.BLOCK_C,), accumulator)
    for step in range(steps):
        block = tl.program_id(0).to(numbers.positions.dtype) * steps + step
        place = place_of(block, numbers, grad, C.BLOCK_P)
        mask = place.present[:, None] & channel_mask[None, :]
        at = offset_of(grad, place.image, place.y, place.x)
        d = load(grad.data, at[:, None] + c.to(tl.int64)[None, :] * grad.c, mask)
        bias += tl.sum(d, 0)
        y, x = place.y * window.stride_h - numbers.pad_top, place.x * window.stride_w - numbers.pad_left
        row = y[None, :] + (taps // C.KW * window.dilation_h)[:, None]
        column = x[None, :] + (taps % C.KW * window.dilation_w)[:, None]
        here = (row >= 0) & (row < input.height) & (column >= 0) & (column < input.width)
        here = here & (taps < C.KH * C.KW)[:, None]
        here = here[:, :, None] & mask[None, :, :]
        source = offset_of(input, place.image[None, :], row, column)
        value = load(input.data, source[:, :, None] + plane[None, None, :], here)
        sums += tl.sum(tl.where(here, value * d[None, :, :], 0.0), 1)
    base = tl.program_id(0).to(tl.int64) * (C.KH * C.KW + 1)
    to = (base + taps)[:, None] * channels + c[None, :]
    tl.store(partials + to, sums, mask=(taps < C.KH * C.KW)[:, None] & channel_mask[None, :])
    if tl.program_id(2) == 0:
        tl.store(partials + (base + C.KH * C.KW) * channels + c, bias, mask=channel_mask)


@triton.jit(do_not_specialize=["splits", "channels"])
def depthwise_add_splits_kernel(
    partials, grad_weight, grad_bias, splits, channels, TAPS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sums of partials [splits, TAPS + 1, C] in the order of the splits."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = (TAPS + 1) * channels.to(tl.int64)
    sum = tl.zeros((BLOCK,), partials.dtype.element_ty)
    for split in range(splits):
        sum += tl.load(partials + split * count + i, mask=i < count, other=0.0)
    tap, c = i // channels, i % channels
    if grad_weight is not None:
        store(grad_weight, c * TAPS + tap, sum, tap < TAPS)
    if grad_bias is not None:
        store(grad_bias, c, sum, tap == TAPS)
