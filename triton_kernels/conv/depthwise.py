"""Kernels of the depthwise convolution; their launchers are in `conv`.

    z[n, c, y, x] = b[c] + sum_{u, v} w[c, u, v] in[n, c / m, s y + d u - p, s x + d v - p]      out = act(z)

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

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
MOST_UNROLLED = 7  # taps of a row


def tile_size(kernel_width: int, item_bytes: int) -> int:
    """Elements of a program: 4 a thread; 2 where doubles or a long row of taps fill the registers."""
    return 256 if kernel_width > 3 or item_bytes == 8 else 512


@triton.jit
def place(first, count, height, width, BLOCK_P: tl.constexpr):
    """Images (64 bits), rows, columns and mask of the positions first ... first + BLOCK_P - 1 of `count`."""
    positions = first + tl.arange(0, BLOCK_P)
    row = positions // width
    image = row // height
    x = (positions - row * width).to(tl.int32)
    y = (row - image * height).to(tl.int32)
    return image, y, x, positions < count


@triton.jit
def add_tap(
    z, input, weight, u, v, plane, y, x, channels, height, width, in_y, in_x, dilation_h, dilation_w, mask,
    channel_mask, KH, KW: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """Adds the products of tap (u, v) to z; y and x are [BLOCK_P, 1], those of tap (0, 0)."""
    row, column = y + u * dilation_h, x + v * dilation_w
    here = mask & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    value = load(input, plane + row.to(tl.int64) * in_y + column.to(tl.int64) * in_x, here)
    tap = u * KW + v
    number = KH * KW - 1 - tap if FLIPPED else tap
    w = load(weight, channels * (KH * KW) + number, channel_mask)
    return z + tl.where(here, value * w, 0.0)


@triton.jit
def convolved(
    input, weight, bias, image, y, x, channels, mask, channel_mask, height, width, in_n, in_c, in_y, in_x,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w,
    KH, KW: tl.constexpr, MULTIPLIER: tl.constexpr, FLIPPED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """The convolution z at positions [BLOCK_P, 1] and channels [1, BLOCK_C]."""
    accumulator = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    z = tl.zeros((BLOCK_P, BLOCK_C), accumulator)
    if bias is not None:
        z += load(bias, channels, channel_mask)
    plane = image.to(tl.int64) * in_n + (channels // MULTIPLIER) * in_c
    y, x = y * stride_h - pad_top, x * stride_w - pad_left
    # KH is no constant, lest all rows of taps be unrolled, and every load kept in registers.
    for u in range(KH):
        if KW <= MOST:
            for v in tl.static_range(KW):
                z = add_tap(z, input, weight, u, v, plane, y, x, channels, height, width, in_y, in_x,
                            dilation_h, dilation_w, mask, channel_mask, KH, KW, FLIPPED)  # fmt: skip
        else:
            for v in range(KW):
                z = add_tap(z, input, weight, u, v, plane, y, x, channels, height, width, in_y, in_x,
                            dilation_h, dilation_w, mask, channel_mask, KH, KW, FLIPPED)  # fmt: skip
    return z


# A size of 1 would become a constant, which has no dtype; paddings and batches would make variants in vain.
_PLAIN = ["positions", "pad_top", "pad_left"]
_PLAIN_KH = [*_PLAIN, "KH"]


@triton.jit(do_not_specialize=_PLAIN_KH)
def depthwise_forward_kernel(
    input, weight, bias, grad, output, positions, channels, height, width, out_height, out_width,
    in_n, in_c, in_y, in_x, out_n, out_c, out_y, out_x,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, KH,
    KW: tl.constexpr, MULTIPLIER: tl.constexpr, FLIPPED: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """The output act(z), or, given the gradient of that, the gradient of z."""
    first = tl.program_id(0).to(positions.dtype) * BLOCK_P
    image, y, x, present = place(first, positions, out_height, out_width, BLOCK_P)
    image, y, x, present = image[:, None], y[:, None], x[:, None], present[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = present & (c < channels)
    z = convolved(input, weight, bias, image, y, x, c, mask, c < channels, height, width,
                  in_n, in_c, in_y, in_x, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w,
                  KH, KW, MULTIPLIER, FLIPPED, BLOCK_P, BLOCK_C, MOST)  # fmt: skip
    to = image.to(tl.int64) * out_n + y.to(tl.int64) * out_y + x.to(tl.int64) * out_x + c.to(tl.int64) * out_c
    if grad is not None:
        z = activation_gradient(load(grad, to, mask), z, ACTIVATION)
    else:
        z = activated(z, ACTIVATION)
    store(output, to, z, mask)


@triton.jit
def _gather_tap(
    sum, grad, weight, tap, image, y, x, c, out_height, out_width, out_n, out_c, out_y, out_x,
    stride_h, stride_w, dilation_h, dilation_w, mask, channel_mask,
    KH: tl.constexpr, KW: tl.constexpr, MULTIPLIER: tl.constexpr,
):  # fmt: skip
    row, column = y - tap // KW * dilation_h, x - tap % KW * dilation_w
    here = mask & (row >= 0) & (row % stride_h == 0) & (column >= 0) & (column % stride_w == 0)
    row, column = row // stride_h, column // stride_w
    here = here & (row < out_height) & (column < out_width)
    at = image.to(tl.int64) * out_n + row.to(tl.int64) * out_y + column.to(tl.int64) * out_x
    for j in range(MULTIPLIER):
        channel = c.to(tl.int64) * MULTIPLIER + j
        d = load(grad, at + channel * out_c, here)
        sum += tl.where(here, d * load(weight, channel * (KH * KW) + tap, channel_mask), 0.0)
    return sum


@triton.jit(do_not_specialize=_PLAIN)
def depthwise_gather_kernel(
    grad, weight, output, positions, channels, height, width, out_height, out_width,
    in_n, in_c, in_y, in_x, out_n, out_c, out_y, out_x,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, MULTIPLIER: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The input gradient, any stride and multiplier; positions and channels are the input's."""
    first = tl.program_id(0).to(positions.dtype) * BLOCK_P
    image, y, x, present = place(first, positions, height, width, BLOCK_P)
    image, y, x, present = image[:, None], y[:, None], x[:, None], present[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = present & (c < channels)
    accumulator = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    sum = tl.zeros((BLOCK_P, BLOCK_C), accumulator)
    for tap in range(KH * KW):
        sum = _gather_tap(sum, grad, weight, tap, image, y + pad_top, x + pad_left, c, out_height, out_width,
                          out_n, out_c, out_y, out_x, stride_h, stride_w, dilation_h, dilation_w, mask,
                          c < channels, KH, KW, MULTIPLIER)  # fmt: skip
    to = image.to(tl.int64) * in_n + y.to(tl.int64) * in_y + x.to(tl.int64) * in_x + c.to(tl.int64) * in_c
    store(output, to, sum, mask)


@triton.jit(do_not_specialize=[*_PLAIN, "steps"])
def depthwise_grad_weight_kernel(
    grad, input, partials, positions, channels, height, width, out_height, out_width,
    in_n, in_c, in_y, in_x, out_n, out_c, out_y, out_x,
    stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, steps,
    KH: tl.constexpr, KW: tl.constexpr, MULTIPLIER: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums partials[split, tap, c] over `steps` blocks of positions; row KH KW has the bias's gradient."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = c < channels
    taps = tl.program_id(2) * TAPS + tl.arange(0, TAPS)
    plane = (c // MULTIPLIER).to(tl.int64) * in_c
    accumulator = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros((TAPS, BLOCK_C), accumulator)
    bias = tl.zeros((BLOCK_C,), accumulator)
    for step in range(steps):
        first = (tl.program_id(0).to(positions.dtype) * steps + step) * BLOCK_P
        image, y, x, present = place(first, positions, out_height, out_width, BLOCK_P)
        mask = present[:, None] & channel_mask[None, :]
        at = image.to(tl.int64) * out_n + y.to(tl.int64) * out_y + x.to(tl.int64) * out_x
        d = load(grad, at[:, None] + c.to(tl.int64)[None, :] * out_c, mask)
        bias += tl.sum(d, 0)
        row = (y * stride_h - pad_top)[None, :] + (taps // KW * dilation_h)[:, None]
        column = (x * stride_w - pad_left)[None, :] + (taps % KW * dilation_w)[:, None]
        here = (row >= 0) & (row < height) & (column >= 0) & (column < width) & (taps < KH * KW)[:, None]
        here = here[:, :, None] & mask[None, :, :]
        source = image.to(tl.int64)[None, :] * in_n + row.to(tl.int64) * in_y + column.to(tl.int64) * in_x
        value = load(input, source[:, :, None] + plane[None, None, :], here)
        sums += tl.sum(tl.where(here, value * d[None, :, :], 0.0), 1)
    base = tl.program_id(0).to(tl.int64) * (KH * KW + 1)
    to = (base + taps)[:, None] * channels + c[None, :]
    tl.store(partials + to, sums, mask=(taps < KH * KW)[:, None] & channel_mask[None, :])
    if tl.program_id(2) == 0:
        tl.store(partials + (base + KH * KW) * channels + c, bias, mask=channel_mask)


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
