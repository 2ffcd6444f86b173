"""The pieces that the reference's ops are made of: softmax over positions, scores, coordinates.

P = H W positions, G maps of a sample. All in plain PyTorch, differentiable, in the dtype of their arguments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide_temperature(learned: Tensor | None, fixed: float, dtype: torch.dtype) -> Tensor | float:
    """Return T for arithmetic in `dtype`: its smallest normal number or more, NaN unless positive."""
    tiny = torch.finfo(dtype).tiny
    if learned is None:
        return max(fixed, tiny)
    t = learned.to(dtype).reshape(())
    return t.clamp(min=tiny).where(t > 0, math.nan)


def masked_softmax(
    scores: Tensor,  # [..., P]
    mask: Tensor | None,  # [..., P], True: takes part
    temperature: Tensor | float,
) -> Tensor:
    """``softmax(scores / temperature)`` over the last dimension; 0 where there is nothing to attend to.

    The largest score is taken off before the division, so that no temperature overflows. Where a weight is 0,
    its score has no gradient, not 0 times an infinite one.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    below = scores - largest.masked_fill(largest == -math.inf, 0)  # at most 0
    t = temperature.detach() if isinstance(temperature, Tensor) else temperature
    gone = (below.detach() == -math.inf) | ((below.detach() / t).exp() == 0)
    weights = (below.masked_fill(gone, 0) / temperature).exp().masked_fill(gone, 0)
    total = weights.sum(-1, keepdim=True)
    map = weights / total.masked_fill(total == 0, 1)
    return map if mask is None else map.masked_fill(~mask, 0)


def softmax_backward(d_map: Tensor, map: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of ``scores / temperature`` from the map's, all [..., P]."""
    if mask is not None:
        d_map = d_map.masked_fill(~mask, 0)
    return map * (d_map - (d_map * map).sum(-1, keepdim=True))


def temperature_gradient(d_scaled: Tensor, map: Tensor, temperature: Tensor | float) -> Tensor:
    """Gradient of T from that of z = scores / T, both [..., P]: ``-sum(d z) / T``, a number.

    ``z = log map + lse``, and the gradients of a row sum to 0, so that any constant serves for lse. The one
    that makes the largest term 0 rounds least.
    """
    largest = map.amax(-1, keepdim=True)
    return -torch.xlogy(d_scaled, map / largest.masked_fill(largest == 0, 1)).sum() / temperature


def positions(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Coordinates (x, y) of all positions [P, 2], row by row.

    Position i of n lies at ``(2 i - (n - 1)) / (n - 1)``, rounded once: from -1 to 1, both reached; -1 if
    n = 1, as ``torch.linspace(-1, 1, n)``.
    """

    def axis(n: int) -> Tensor:
        i = torch.arange(n, dtype=dtype, device=device)
        return (2 * i - (n - 1)) / (n - 1) if n > 1 else i - 1

    y, x = torch.meshgrid(axis(height), axis(width), indexing="ij")
    return torch.stack((x.flatten(), y.flatten()), dim=1)


def expected_position(map: Tensor, height: int, width: int) -> Tensor:
    """(x, y) [..., 2] of maps [..., P]; summed rather than multiplied: the terms cancel."""
    xy = positions(height, width, map.dtype, map.device)
    return (map.unsqueeze(-1) * xy).sum(-2)


def image_scores(f: Tensor, weight: Tensor) -> Tensor:
    """What the scores owe to the features: [G or A, C] times [..., C, P]."""
    return torch.matmul(weight, f)


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """``sum over n of a[n] b[n]^T`` of [N, K, P] and [N, C, P]: [K, C].

    Each sample's product alone, then their sum: one product over all N P terms rounds several times as much.
    """
    return (a @ b.transpose(1, 2)).sum(0)


def additive_energy(products: Tensor, hidden_term: Tensor | None) -> Tensor:
    """``tanh(W f + U h)`` of [..., A, P] and [..., A]."""
    return (products if hidden_term is None else products + hidden_term.unsqueeze(-1)).tanh()
