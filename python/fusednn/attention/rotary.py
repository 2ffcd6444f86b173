"""Where a token stands, told to attention: rotary embedding of queries and keys, slopes of ALiBi."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BASE = 10000.0

# Tables by what they depend on, the oldest out first. Not buffers: a module's state_dict stays torch's.
_TABLES: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}
_MOST_TABLES = 16


def rotary_embedding(
    x: Tensor, *, base: float = BASE, position_offset: int = 0, positions: Tensor | None = None
) -> Tensor:
    r"""Turn the vectors of a sequence by angles that grow with their positions (Su et al., 2021).

    With the halves ``x1, x2`` of a vector at position p (the pairs of GPT-NeoX), and for each i < D/2
    ``angle = p * base^(-2i/D)``: ``(x1 cos - x2 sin, x2 cos + x1 sin)``. The product of two vectors so turned
    depends on the distance between their positions only.

    Args:
        x: ``[..., L, D]``, floating point, D even.
        base: positive; angles of the last pair turn about this many times slower than those of the first.
        position_offset: of the first vector.
        positions: integers ``[L]``, for vectors that don't stand one after the other.

    Returns:
        A tensor like `x`. Angles are made in float64, products in float32 (float64 for float64).

    Raises:
        RuntimeError: `x` is not floating point, has no two dimensions, or D is odd.
        ValueError: base is not positive.
    """
    if x.dim() < 2 or not x.dtype.is_floating_point or x.shape[-1] % 2:
        raise RuntimeError(
            f"rotary_embedding: x: got {x.dtype} of size {list(x.shape)}, expected floating point of "
            "[..., L, D] with an even D"
        )
    if not base > 0:
        raise ValueError(f"rotary_embedding: base: got {base}, expected a positive number")
    if positions is None:
        return rotate(x, *rotary_tables(x, x.shape[-2], float(base), position_offset))
    cos, sin = tables_at((positions + position_offset).to(x.device), x.shape[-1] // 2, base, _wide(x))
    return rotate(x, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of `x` [..., D] by angles whose cosines and sines broadcast to [..., D/2]."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rotary_tables(x: Tensor, length: int, base: float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [length, D/2] for `x` [..., D], at positions from `offset` on."""
    half, dtype, device = x.shape[-1] // 2, _wide(x), x.device
    if offset < 0 or not _may_keep(device):
        positions = torch.arange(offset, offset + length, device=device)
        return tables_at(positions, half, base, dtype)
    key = ("rotary", half, base, dtype, device)
    kept = _TABLES.get(key)
    if kept is None or kept[0].shape[0] < offset + length:
        rows = 1 << (offset + length - 1).bit_length()  # grows seldom
        kept = _keep(key, lambda: tables_at(torch.arange(rows, device=device), half, base, dtype))
    cos, sin = kept
    return cos[offset : offset + length], sin[offset : offset + length]


def alibi_slopes(num_heads: int, device: Any = None) -> Tensor:
    r"""Return the slopes of ALiBi (Press et al., 2022) for any number of heads, ``[num_heads]`` float32.

    For a power of two n: ``2^(-8/n), 2^(-16/n), ..., 2^-8``. For others the slopes of the power of two below,
    then every other one of the power of two above, as in the paper's code.

    Raises:
        ValueError: num_heads is not positive.
    """
    if num_heads <= 0:
        raise ValueError(f"alibi_slopes: num_heads: got {num_heads}, expected a positive number")
    device = torch.device("cpu" if device is None else device)

    def make() -> tuple[Tensor]:
        return (torch.tensor(_slopes(num_heads), dtype=torch.float32, device=device),)

    if not _may_keep(device):
        return make()[0]
    key = ("alibi", num_heads, device)
    return (_TABLES.get(key) or _keep(key, make))[0]


def _slopes(heads: int) -> list[float]:
    below = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / below) for i in range(below)]
    return slopes + [2.0 ** (-8 * (2 * i + 1) / (2 * below)) for i in range(heads - below)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tables_at(positions: Tensor, half: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [L, half] at `positions` [L]."""
    exact = torch.float32 if positions.device.type == "mps" else torch.float64  # mps has no float64
    steps = torch.arange(half, device=positions.device, dtype=exact)
    angles = positions.to(exact).unsqueeze(-1) * base ** (steps * (-1.0 / half))  # [L, D/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _may_keep(device: torch.device) -> bool:
    """Whether tensors made now are plain ones that later calls may use."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _keep(key: tuple[Any, ...], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    with torch.inference_mode(False), torch.no_grad():  # autograd may save them
        tables = make()
    while len(_TABLES) >= _MOST_TABLES:
        _TABLES.pop(next(iter(_TABLES)), None)
    _TABLES[key] = tables
    return tables
