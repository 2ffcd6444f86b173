"""Inference of the depthwise-separable block in one pass, norms folded into weights and biases.

    y[c, q]   = act1(b1[c] + sum_{u, v} w1[c, u, v] in[c / m, window of q])
    out[o, q] = act2(b2[o] + sum_c w2[o, c] y[c, q]) + residual[o, q]         q = a position of an image

Tiling: a program takes BLOCK_P positions of all images laid end to end and every output channel; makes y for
BLOCK_C channels at a time and multiplies it into the sums, which stay in registers, so y is never made twice.
Products: 16-bit types on tensor cores with float32 sums, y rounded to the type; float32 in full, or as TF32
where torch.backends.cuda.matmul.allow_tf32 says so.
Bytes moved: s (in + out + residual) + s |weights| a program (L2), s = item size; unfused adds 2 s N C H' W'.
Limits: O <= 256 (float32: 128), no float64, dense images, fewer than 2^31 rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.arguments import constants
from ..core.checks import device_guard
from ..core.storage import INTERPRETING, load, rounded, store
from .activations import activated
from .arguments import Constants, Weights
from .depthwise import column_of, convolved, offset_of, place_of
from .geometry import Convolution

MOST_OUTPUTS = {torch.float32: 128, torch.float16: 256, torch.bfloat16: 256}
BLOCK_P = 32


@triton.jit(do_not_specialize=["numbers"])
def separable_forward_kernel(
    input, depthwise, pointwise, residual, output, channels, outputs, window, numbers, C: tl.constexpr
):
    """Weights [C, KH, KW] and [O, C]; biases and residual may be None."""
    place = column_of(place_of(tl.program_id(0), numbers, output, C.BLOCK_P))
    dtype: tl.constexpr = input.data.dtype.element_ty
    o = tl.arange(0, C.BLOCK_O)
    sums = tl.zeros((C.BLOCK_P, C.BLOCK_O), tl.float32)
    for c0 in range(0, channels, C.BLOCK_C):
        c = c0 + tl.arange(0, C.BLOCK_C)
        row = c[None, :]
        mask = place.present & (row < channels)
        z = convolved(
            input, depthwise.weight, depthwise.bias, place, row, mask, row < channels, window, numbers, C
        )
        tile = rounded(tl.where(mask, activated(z, C.ACTIVATION), 0.0), dtype)
        there = (c < channels)[:, None] & (o < outputs)[None, :]
        weight = tl.load(pointwise.weight + o[None, :] * channels + c[:, None], mask=there, other=0.0)
        if INTERPRETING and dtype == tl.bfloat16:  # whose products the interpreter gets wrong
            tile, weight = tile.to(tl.float32), weight.to(tl.float32)
        sums = tl.dot(tile, weight, sums, input_precision=C.PRECISION)
    o = o[None, :]
    if pointwise.bias is not None:
        sums += load(pointwise.bias, o, o < outputs)
    sums = activated(sums, C.ACTIVATION2)
    to = offset_of(output, place.image, place.y, place.x) + o.to(tl.int64) * output.c
    mask = place.present & (o < outputs)
    if residual is not None:
        sums += load(residual, to, mask)
    store(output.data, to, sums, mask)


def separable_conv2d_limits(input: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> list[str]:
    """Why the fused kernel can't take such a call; empty if it can."""
    most, outputs = MOST_OUTPUTS.get(input.dtype, 0), pointwise_weight.shape[0]
    if outputs <= most:
        return []
    return [f"got {outputs} output channels, the fused kernel takes at most {most} of {input.dtype}"]


def separable_conv2d_forward(call: Any) -> Tensor:
    """The block's inference in one pass, in torch's memory format.

    Raises RuntimeError if a shape, dtype or device misfits, or if `separable_conv2d_limits` says why not.
    """
    weight1, weight2 = call.depthwise_weight, call.pointwise_weight
    conv = Convolution(call, weight1, call.depthwise_bias, weight2)
    for reason in separable_conv2d_limits(call.input, weight1, weight2):
        raise conv.check.error(reason)
    channels, outputs = conv.channels, weight2.shape[0]
    depthwise = Weights(conv.weight, conv.bias)
    pointwise = Weights(
        conv.check.dense("pointwise_weight", weight2, [outputs, channels, 1, 1]),
        conv.check.dense("pointwise_bias", call.pointwise_bias, [outputs]),
    )
    added = None if call.residual is None else conv.result_like("residual", call.residual, outputs)
    output = conv.empty_result(outputs)
    if output.numel() == 0:
        return output
    block_o = max(triton.next_power_of_2(outputs), 16)
    # Four elements of the depthwise tile a thread, all loads of a row being in flight.
    wide = block_o > 64 or call.input.dtype == torch.float32
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    chosen = Constants(
        None, conv.weight.shape[3], conv.multiplier, BLOCK_P, 32 if wide else 16, BLOCK_O=block_o,
        ACTIVATION=call.depthwise_activation, ACTIVATION2=call.pointwise_activation, PRECISION=precision,
    )  # fmt: skip
    with device_guard(call.input):
        separable_forward_kernel[(triton.cdiv(conv.positions(output), BLOCK_P),)](
            conv.image(conv.input), depthwise, pointwise, added, conv.image(output), channels, outputs,
            conv.window(), conv.numbers(output), C=constants(chosen), num_warps=8 if wide else 4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return output
