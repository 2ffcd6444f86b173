"""Which attention weights dropout keeps: counter-based, so that every backend draws the same mask.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed on the seed, counts
``(column // 4, row, head, batch)``; word ``column % 4`` of its result decides on a weight, which is dropped
if its word lies below ``p 2^32``, rounded: the rate is exact to 2^-32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Words below it drop their weight."""
    return min(round(p * 2**32), _LOW)


def keep_scale(p: float) -> float:
    """What a weight that is kept is multiplied by; 0 where none is."""
    return 0.0 if p >= 1 else 1 / (1 - p)


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of a product of 32-bit words, which would overflow int64 in one piece."""
    low = (word & 0xFFFF) * factor
    high = (word >> 16) * factor + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four 32-bit words of a counter's words, all int64, of one broadcast shape; `seed` too."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def kept_weights(
    seed: Tensor,  # int64, one number
    p: float,
    batch: int,
    heads: int,
    rows: int,
    columns: int,
    first_batch: int = 0,  # packed sequences count on
) -> Tensor:
    """Return which weights [batch, heads, rows, columns] dropout keeps."""

    def count(n: int, dims: int, first: int = 0) -> Tensor:
        return torch.arange(first, first + n, device=seed.device).view(-1, *(1,) * dims)

    fours = (columns + 3) // 4
    counter = (count(fours, 0), count(rows, 1), count(heads, 2), count(batch, 3, first_batch))
    words = torch.stack(torch.broadcast_tensors(*philox(seed.reshape(()), counter)), -1)
    return words.flatten(-2)[..., :columns] >= threshold(p)
