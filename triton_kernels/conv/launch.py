"""Launchers of the convolutions, with the signatures of the ops: see `fusednn.conv.reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..core.arguments import constants
from ..core.checks import device_guard
from ..core.support import interpreting
from .arguments import Constants
from .depthwise import (
    OPTIONS,
    depthwise_add_splits_kernel,
    depthwise_forward_kernel,
    depthwise_gather_kernel,
    depthwise_grad_weight_kernel,
    tile_size,
)
from .geometry import Convolution

# An interpreted program takes about the same time whatever its size.
GATHER_TILE, WEIGHT_TILE = (32768, 65536) if interpreting() else (512, 4096)
MOST_TAPS = 16  # of a program of the weight gradient
WANTED_PROGRAMS = 2048
MOST_SPLITS = 256


def _tile(last: bool, channels: int, positions: int, size: int, most_positions: int = 512) -> tuple[int, int]:
    """Positions and channels of a program: long where memory is contiguous."""
    channels, positions = (triton.next_power_of_2(max(n, 1)) for n in (channels, positions))
    if last:
        block_c = min(channels, 64)
        return min(positions, size // block_c, most_positions), block_c
    block_p = min(positions, size, most_positions)
    return block_p, min(channels, size // block_p)


def _launch_forward(
    conv: Convolution, input: Tensor, bias: Tensor | None, grad: Tensor | None, output: Tensor,
    activation: str, flipped_pad: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """The convolution of `input`; with `flipped_pad`, that of a gradient with the flipped weight."""
    if output.numel() == 0:
        return
    positions, kw = conv.positions(output), conv.weight.shape[3]
    size = GATHER_TILE if interpreting() else tile_size(kw, input.element_size())
    blocks = _tile(conv.last, conv.channels, positions, size)
    flipped = flipped_pad is not None
    chosen = Constants(None, kw, conv.multiplier, *blocks, FLIPPED=flipped, ACTIVATION=activation)
    grid = (triton.cdiv(positions, blocks[0]), triton.cdiv(conv.channels, blocks[1]))
    with device_guard(input):
        depthwise_forward_kernel[grid](
            conv.image(input), conv.weight, bias, grad, conv.image(output), conv.channels,
            conv.window((1, 1) if flipped else None), conv.numbers(output, flipped_pad),
            C=constants(chosen), **OPTIONS,
        )  # fmt: skip


def depthwise_conv2d_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """The activated convolution of input [N, C, H, W] with weight [C m, 1, kh, kw], in torch's memory format.

    `padding` is that of top, bottom, left and right. Raises RuntimeError if a shape, dtype or device does not
    fit.
    """
    conv = Convolution.of("depthwise_conv2d_forward", input, weight, bias, stride, padding, dilation)
    output = conv.empty_result(conv.channels)
    _launch_forward(conv, conv.input, conv.bias, None, output, activation)
    return output


def _grad_before_activation(conv: Convolution, grad_output: Tensor, activation: str) -> Tensor:
    grad = conv.result_like("grad_output", grad_output, conv.channels)
    if activation == "none":
        return grad
    grad_z = conv.empty_result(conv.channels)
    _launch_forward(conv, conv.input, conv.bias, grad, grad_z, activation)
    return grad_z


def _grad_input(conv: Convolution, grad_z: Tensor) -> Tensor:
    out = torch.empty_like(conv.input, memory_format=conv.format)
    if out.numel() == 0:
        return out
    kernel = conv.weight.shape[2:]
    if conv.stride == (1, 1) and conv.multiplier == 1:
        top, left = (d * (k - 1) - p for d, k, p in zip(conv.dilation, kernel, conv.pad, strict=True))
        _launch_forward(conv, grad_z, None, None, out, "none", (top, left))
        return out
    channels, positions = conv.input.shape[1], conv.positions(out)
    blocks = _tile(conv.last, channels, positions, GATHER_TILE)
    grid = (triton.cdiv(positions, blocks[0]), triton.cdiv(channels, blocks[1]))
    with device_guard(grad_z):
        depthwise_gather_kernel[grid](
            conv.image(grad_z), conv.weight, conv.image(out), channels, conv.window(), conv.numbers(out),
            C=constants(Constants(*kernel, conv.multiplier, *blocks)), **OPTIONS,
        )  # fmt: skip
    return out


def _grad_weight(conv: Convolution, grad_z: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, empty where not needed, in two passes."""
    taps = conv.weight.shape[2] * conv.weight.shape[3]
    weight = grad_z.new_empty(conv.weight.shape if needs[0] else (0,))
    bias = grad_z.new_empty((conv.channels if needs[1] else 0,))
    if conv.channels == 0:
        return weight, bias
    group = min(triton.next_power_of_2(taps), MOST_TAPS)
    positions = conv.positions(grad_z)
    block_p, block_c = _tile(conv.last, min(conv.channels, 32), positions, WEIGHT_TILE // group, 64)
    # A function of the shape alone, so that results repeat.
    channel_blocks, tap_groups = triton.cdiv(conv.channels, block_c), triton.cdiv(taps, group)
    blocks = triton.cdiv(positions, block_p)
    most = min(max(WANTED_PROGRAMS // (channel_blocks * tap_groups), 1), MOST_SPLITS)
    steps = max(triton.cdiv(blocks, most), 1)
    splits = triton.cdiv(blocks, steps)
    wide = torch.promote_types(grad_z.dtype, torch.float32)
    partials = grad_z.new_empty(splits, taps + 1, conv.channels, dtype=wide)
    chosen = Constants(*conv.weight.shape[2:], conv.multiplier, block_p, block_c, TAPS=group)
    with device_guard(grad_z):
        if splits:
            depthwise_grad_weight_kernel[(splits, channel_blocks, tap_groups)](
                conv.image(grad_z), conv.image(conv.input), partials, conv.channels, steps, conv.window(),
                conv.numbers(grad_z), C=constants(chosen), **OPTIONS,
            )  # fmt: skip
        depthwise_add_splits_kernel[(triton.cdiv((taps + 1) * conv.channels, 128),)](
            partials, weight if needs[0] else None, bias if needs[1] else None, splits, conv.channels,
            TAPS=taps, BLOCK=128, **OPTIONS,
        )  # fmt: skip
    return weight, bias


def depthwise_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, empty where masked; the preactivation is computed again."""
    conv = Convolution.of("depthwise_conv2d_backward", input, weight, bias, stride, padding, dilation)
    nothing = input.new_empty(0)
    if not any(output_mask):
        return nothing, nothing.clone(), nothing.clone()
    grad_z = _grad_before_activation(conv, grad_output, activation)
    grad_input = _grad_input(conv, grad_z) if output_mask[0] else nothing
    if not any(output_mask[1:]):
        return grad_input, nothing.clone(), nothing.clone()
    grad_weight, grad_bias = _grad_weight(conv, grad_z, output_mask[1:])
    if output_mask[1]:
        like = torch.empty_like(weight)
        grad_weight = grad_weight if like.is_contiguous() else like.copy_(grad_weight)
    return grad_input, grad_weight, grad_bias
