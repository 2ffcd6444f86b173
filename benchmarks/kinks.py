"""Inputs whose gradients don't hang on rounding: none puts a value next to a kink of ReLU6.

At 0 and 6 the derivative of ReLU6 jumps. A value that float64 puts on one side of a kink, and float32 on the
other, changes a gradient by a whole term: no peer is wrong then, torch's eager layers no less than ours, but
none agrees with the oracle. So training cases draw inputs for which no such value is near.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

KINKS = (0.0, 6.0)
# Some 40 ulp of a float32 near 6. What a block's float32 values are off by is ten times less.
MARGIN = 2e-5
# A nudge, in margins: it takes a value some margins away, and shifts statistics by a small part of one.
NUDGE = 25
GROWTH = 1.3  # of the nudge in a round: a value whose weight at the centre is tiny needs a longer push
ROUNDS = 20


@contextmanager
def _activation_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what each ReLU6 inside the module is given."""
    seen: list[Tensor] = []
    layers = [layer for layer in module.modules() if isinstance(layer, nn.ReLU6)]
    hooks = [layer.register_forward_pre_hook(lambda _layer, args: seen.append(args[0])) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def distance_from_kinks(module: nn.Module, x: Tensor) -> Tensor:
    """Return how near to a kink a pixel's nearest value comes as it enters a ReLU6, [N, H', W'].

    The module runs in float64, in its own mode; it stays as it was. All of its ReLU6 see images of one size.
    """
    exact = copy.deepcopy(module).double()
    with _activation_inputs(exact) as seen:
        exact(x.double())
    return torch.stack([(z - kink).abs().amin(1) for z in seen for kink in KINKS]).amin(0)


def clear_of_kinks(
    module: nn.Module, x: Tensor, stride: int, generator: torch.Generator, margin: float = MARGIN
) -> Tensor:
    """Return the input, nudged where needed so that no value that enters a ReLU6 is next to a kink.

    The pixel at the centre of such a value's window is given a little noise. That shifts each norm's
    statistics too, and so all other values: those within twice the margin are moved as well, or some would
    drift in.

    Args:
        module: a depthwise convolution that keeps the image's size but for `stride`, then others that do.
        x: ``[N, C, H, W]``, float32 or float64.
        stride: of the depthwise convolution.
        generator: draws the noise.
        margin: the distance to keep.

    Raises:
        ValueError: the input is of 16 bits, whose rounding is wider than the distances between values.
        RuntimeError: values are left next to a kink after 20 rounds.

    """
    if x.element_size() < 4:
        raise ValueError(f"x: got {x.dtype}, expected float32 or float64: 16 bits can't keep away")
    x = x.clone()
    for n_round in range(ROUNDS):
        distance = distance_from_kinks(module, x)
        if distance.amin() >= margin:
            return x
        n, row, column = (distance < 2 * margin).nonzero(as_tuple=True)
        noise = torch.randn(len(n), x.shape[1], generator=generator, dtype=x.dtype)
        x[n, :, row * stride, column * stride] += NUDGE * margin * GROWTH**n_round * noise
    if distance_from_kinks(module, x).amin() < margin:
        raise RuntimeError(f"x: values are left within {margin} of a kink after {ROUNDS} rounds")
    return x
