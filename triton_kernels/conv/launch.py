"""Launchers of the depthwise convolution, which take the calls of its ops: see `fusednn.conv.reference`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..core.arguments import constants
from ..core.checks import device_guard, gradients_in_order, wanted
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


def depthwise_conv2d_forward(call: Any) -> Tensor:
    """The activated convolution, in torch's format; RuntimeError if a shape, dtype or device misfits."""
    conv = Convolution(call, call.weight, call.bias)
    output = conv.empty_result(conv.channels)
    _launch_forward(conv, conv.input, conv.bias, None, output, call.activation)
    return output


def _grad_before_activation(conv: Convolution, call: Any) -> Tensor:
    """The gradient of the preactivation, which is computed again."""
    grad = conv.result_like("grad_output", call.grad_output, conv.channels)
    if call.activation == "none":
        return grad
    grad_z = conv.empty_result(conv.channels)
    _launch_forward(conv, conv.input, conv.bias, grad, grad_z, call.activation)
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


def _parameter_gradients(conv: Convolution, grad_z: Tensor, needed: set[str]) -> dict[str, Tensor]:
    """Gradients of weight and bias, where needed, in two passes."""
    taps = conv.weight.shape[2] * conv.weight.shape[3]
    sizes = {"weight": conv.weight.shape, "bias": (conv.channels,)}
    found = {name: grad_z.new_empty(size) for name, size in sizes.items() if name in needed}
    if not found or conv.channels == 0:
        return found
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
            partials, found.get("weight"), found.get("bias"), splits, conv.channels, TAPS=taps, BLOCK=128,
            **OPTIONS,
        )  # fmt: skip
    return found


def depthwise_conv2d_backward(call: Any) -> tuple[Tensor, ...]:
    """Gradients of input, weight and bias, empty where masked."""
    conv, names = Convolution(call, call.weight, call.bias), ("input", "weight", "bias")
    needed, found = wanted(names, call.output_mask), {}
    if needed:
        grad_z = _grad_before_activation(conv, call)
        if "input" in needed:
            found["input"] = _grad_input(conv, grad_z)
        found |= _parameter_gradients(conv, grad_z, needed)
    like = torch.empty_like(call.weight)
    if "weight" in found and not like.is_contiguous():
        found["weight"] = like.copy_(found["weight"])
    return gradients_in_order(found, names, call.input)
