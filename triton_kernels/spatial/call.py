"""A call's tensors and numbers, checked and in the form that the kernels of spatial attention take."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..core.support import DTYPES, interpreting

OUTPUTS = ("scale", "flatten", "sum", "coordinates")
INT32_MAX = 2**31 - 1
# An interpreted program takes about the same time whatever its size.
SCALE = 16 if interpreting() else 1
TILE = 4096 * SCALE  # channels times positions of a program that scores them position by position
MOST_POSITIONS = 512 * SCALE
# Rows or positions of a matrix product, and its warps, by the bytes of an element: exact products of float32
# and float64 take many registers.
_PRODUCTS = {2: (64 * SCALE, 8), 4: (32 * SCALE, 8), 8: (16 * SCALE, 4)}


def _power_from(n: int, least: int, most: int) -> int:
    return min(max(triton.next_power_of_2(max(n, 1)), least), most)


@dataclass(frozen=True)
class Tile:
    """Blocks of a program and its options; see `of`."""

    maps: int
    rows: int
    channels: int
    positions: int
    warps: int

    @classmethod
    def of(cls, maps: int, channels: int, positions: int, item: int) -> Tile:
        """That of the softmax; of the shape of a sample alone, so that results repeat whatever the batch."""
        block_g = _power_from(maps, 1, INT32_MAX)
        tile = TILE if item < 8 else TILE // 2
        block_p = _power_from(positions, 16, max(min(MOST_POSITIONS, tile // 4 // block_g), 16))
        block_c = _power_from(channels, 1, max(tile // (block_p * max(block_g // 2, 1)), 1))
        return cls(block_g, 1, block_c, block_p, 8 if block_c * block_p > 2048 else 4)

    @classmethod
    def of_products(cls, maps: int, rows: int, channels: int, positions: int, item: int) -> Tile:
        """That of the matrix products of additive scores."""
        block_g = _power_from(maps, 1, INT32_MAX)
        side, warps = _PRODUCTS[item]
        depth = _power_from(channels, 16, max(side // 2, 16))
        block_p = max(_power_from(positions, 16, side) // max(block_g // 16, 1), 16)
        return cls(block_g, _power_from(rows, 16, side), depth, block_p, warps)

    def blocks(self, *names: str) -> dict[str, int]:
        """Arguments BLOCK_<letter> for the letters G, A, C and P."""
        sizes = {"G": self.maps, "A": self.rows, "C": self.channels, "P": self.positions}
        return {f"BLOCK_{name}": sizes[name] for name in names}

    @property
    def options(self) -> dict[str, Any]:
        """Triton's; fused multiply-adds are named because their default differs between versions."""
        return {"num_warps": self.warps, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Attention:
    """One call, all tensors dense; see `of` and `of_maps`."""

    op: str
    map_size: tuple[int, int, int, int]
    output: str
    batch: int
    maps: int
    rows: int
    channels: int
    like: Tensor
    features: Tensor | None
    weight: Tensor | None
    term: Tensor | None
    v: Tensor | None
    mask: Tensor | None
    learned: Tensor | None
    temperature: float
    format: torch.memory_format

    @classmethod
    def of_maps(
        cls, op: str, logits: Tensor, mask: Tensor | None, learned: Tensor | None, temperature: float,
        coordinates: bool,
    ) -> Attention:  # fmt: skip
        """Every map [N, G, H, W] a sample of its own, whose scores are its term."""
        _check_images(op, "logits", logits)
        n, g, height, width = logits.shape
        flat = _checked_mask(op, mask, (n, g, height * width), logits)
        return cls(
            op, (n, g, height, width), "coordinates" if coordinates else "map", n * g, 1, 1, 1, logits, None,
            None, logits.contiguous(), None, None if flat is None else flat.reshape(n * g, height * width),
            _checked_temperature(op, learned, logits), temperature, torch.contiguous_format,
        )  # fmt: skip

    @classmethod
    def of(
        cls, op: str, features: Tensor, weight: Tensor, term: Tensor | None, v: Tensor | None,
        mask: Tensor | None, learned: Tensor | None, temperature: float, output: str,
    ) -> Attention:  # fmt: skip
        """Attention over features [N, C, H, W]; raises RuntimeError if a shape, dtype or device misfits."""
        _check_images(op, "features", features)
        if output not in OUTPUTS:
            raise ValueError(f"{op}: output: got {output!r}, expected one of {', '.join(OUTPUTS)}")
        n, channels, height, width = features.shape
        rows, maps = weight.shape[0], (weight if v is None else v).shape[0]
        term_size = (n, maps, height * width) if v is None else (n, rows)
        fmt = suggest_memory_format(features)
        return cls(
            op, (n, maps, height, width), output, n, maps, rows, channels, features,
            features.contiguous(memory_format=fmt),
            checked(op, "weight", weight, (rows, channels), features),
            None if term is None else checked(op, "hidden_term", term, term_size, features),
            None if v is None else checked(op, "v", v, (maps, rows), features),
            _checked_mask(op, mask, (n, height * width), features),
            _checked_temperature(op, learned, features), temperature, fmt,
        )  # fmt: skip

    @property
    def positions(self) -> int:
        """Of a map."""
        return self.map_size[2] * self.map_size[3]

    @property
    def wide(self) -> torch.dtype:
        """Of the arithmetic."""
        return torch.promote_types(self.like.dtype, torch.float32)

    @property
    def last(self) -> bool:
        """Whether images are [N, H, W, C] in memory."""
        return self.format is torch.channels_last

    @property
    def tile(self) -> Tile:
        """Blocks of the programs of the softmax."""
        return Tile.of(self.maps, self.channels, self.positions, self.like.element_size())

    @property
    def product_tile(self) -> Tile:
        """Blocks of the programs of additive scores."""
        item = self.like.element_size()
        return Tile.of_products(self.maps, self.rows, self.channels, self.positions, item)

    def splits(self, tile: Tile) -> int:
        """Programs of a sample."""
        splits = triton.cdiv(self.positions, tile.positions)
        if splits * self.batch > INT32_MAX:
            raise RuntimeError(f"{self.op}: got {self.batch} samples of {splits} tiles, expected < 2^31")
        return splits

    @property
    def bits(self) -> int:
        """Those of the fixed temperature, as a double: a launch would narrow a float to float32."""
        t = max(self.temperature, torch.finfo(self.wide).tiny)
        return struct.unpack("<q", struct.pack("<d", t))[0]

    @property
    def feature_strides(self) -> tuple[int, int, int]:
        """Of sample, channel and position of dense features; torch's are arbitrary where a size is 1."""
        c, p = self.channels, self.positions
        return (c * p, 1, c) if self.last else (c * p, p, 1)

    @property
    def output_strides(self) -> tuple[int, int, int, int]:
        """Of sample, map, channel and position of features that maps have scaled."""
        g, c, p = self.maps, self.channels, self.positions
        return (g * c * p, c, 1, g * c) if self.last and self.output == "scale" else (g * c * p, c * p, p, 1)

    @property
    def mask_strides(self) -> tuple[int, int]:
        """Of sample and position."""
        return (0, 0) if self.mask is None else (self.mask.stride(0), self.mask.stride(1))

    @property
    def output_size(self) -> tuple[int, ...]:
        """Shape of the attended features."""
        n, g, height, width = self.map_size
        of_maps = g * self.channels
        sizes: dict[str, tuple[int, ...]] = {
            "map": (0,), "scale": (n, of_maps, height, width), "flatten": (n, of_maps * self.positions),
            "sum": (n, of_maps), "coordinates": (n, g, 2),
        }  # fmt: skip
        return sizes[self.output]

    @property
    def output_format(self) -> torch.memory_format:
        """Of the attended features."""
        return self.format if self.output == "scale" else torch.contiguous_format

    def empty(self, size: Sequence[int], format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """An uninitialised tensor of the call's dtype."""
        return torch.empty(tuple(size), dtype=self.like.dtype, device=self.like.device, memory_format=format)

    def empty_wide(self, *size: int) -> Tensor:
        """An uninitialised tensor of the arithmetic's dtype."""
        return torch.empty(size, dtype=self.wide, device=self.like.device)

    def precision(self, exact: bool) -> str:
        """How products are made: `exact` where both operands are of the features' type."""
        fast = torch.backends.cuda.matmul.allow_tf32 if exact or self.like.element_size() > 2 else True
        return "tf32" if fast and self.wide == torch.float32 else "ieee"


def _check_images(op: str, name: str, t: Tensor) -> None:
    if t.dim() != 4 or t.dtype not in DTYPES or 0 in t.shape[1:]:
        raise RuntimeError(
            f"{op}: {name}: got {t.dtype} of shape {list(t.shape)}, expected float32, float64, float16 or "
            "bfloat16 of 4 dimensions with channels and positions"
        )
    if t.shape[2] * t.shape[3] > INT32_MAX // 4:
        raise RuntimeError(f"{op}: {name}: got {list(t.shape)}, expected fewer than 2^29 positions")


def checked(
    op: str, name: str, t: Tensor, shape: Sequence[int], like: Tensor,
    format: torch.memory_format = torch.contiguous_format,
) -> Tensor:  # fmt: skip
    """`t`, dense, after checking that it has this shape, and the dtype and device of `like`."""
    if tuple(t.shape) != tuple(shape):
        raise RuntimeError(f"{op}: {name}: got shape {list(t.shape)}, expected {list(shape)}")
    if t.dtype != like.dtype or t.device != like.device:
        raise RuntimeError(
            f"{op}: {name}: got {t.dtype} on {t.device}, expected {like.dtype} on {like.device}"
        )
    return t.contiguous(memory_format=format)


def _checked_mask(op: str, mask: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if tuple(mask.shape) != tuple(shape) or mask.dtype != torch.bool or mask.device != like.device:
        raise RuntimeError(
            f"{op}: mask: got {mask.dtype} of shape {list(mask.shape)} on {mask.device}, expected torch.bool "
            f"of {list(shape)} on {like.device}"
        )
    return mask.view(torch.uint8)


def _checked_temperature(op: str, learned: Tensor | None, like: Tensor) -> Tensor | None:
    if learned is not None and (learned.numel() != 1 or learned.device != like.device):
        raise RuntimeError(
            f"{op}: temperature: got shape {list(learned.shape)} on {learned.device}, expected one number "
            f"on {like.device}"
        )
    return learned
