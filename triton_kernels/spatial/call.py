"""A call's tensors and numbers, checked and in the form that the kernels of spatial attention take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..core.arguments import INT32_MAX, as_bytes, bits_of, constants, grid_of
from ..core.checks import Check
from ..core.support import interpreting
from .arguments import Attended, Constants, Features, Inputs, Mask, Numbers

OUTPUTS = ("scale", "flatten", "sum", "coordinates")
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

    @property
    def options(self) -> dict[str, Any]:
        """Triton's; fused multiply-adds are named because their default differs between versions."""
        return {"num_warps": self.warps, "enable_fp_fusion": True}


class Attention:
    """One call, all tensors dense; see `of` and `of_maps`."""

    def __init__(
        self, call: Any, check: Check, inputs: Inputs, size: Sequence[int], output: str,
        format: torch.memory_format,
    ) -> None:  # fmt: skip
        """Of checked `inputs` and maps of this size."""
        n, g, height, width = self.map_size = tuple(size)
        self.check, self.like, self.inputs, self.temperature = check, check.like, inputs, call.temperature
        self.output, self.format, self.positions = output, format, height * width
        self.wide = torch.promote_types(self.like.dtype, torch.float32)  # of the arithmetic
        self.last = format is torch.channels_last  # images are [N, H, W, C] in memory
        self.additive = inputs.v is not None  # scores are
        self.batch, self.maps, self.rows, self.channels = n * g, 1, 1, 1
        if inputs.weight is not None:
            self.batch, self.maps, (self.rows, self.channels) = n, g, inputs.weight.shape

    @classmethod
    def of_maps(cls, call: Any, logits: str, coordinates: bool) -> Attention:
        """Every map [N, G, H, W] a sample of its own, whose scores are its term: the argument `logits`."""
        check = _check_images(call, logits)
        n, g, height, width = size = check.like.shape
        mask = check("mask", call.mask, (n, g, height * width), torch.bool)
        inputs = Inputs(
            features=None,
            weight=None,
            term=check.like.contiguous(),
            v=None,
            mask=_mask(None if mask is None else mask.reshape(n * g, height * width)),
            learned=_checked_temperature(check, call.learned_temperature),
        )
        output, format = "coordinates" if coordinates else "map", torch.contiguous_format
        return cls(call, check, inputs, size, output, format)

    @classmethod
    def of(cls, call: Any) -> Attention:
        """Attention over features [N, C, H, W]; raises RuntimeError if a shape, dtype or device misfits."""
        check = _check_images(call, "features")
        features, weight, v, output = call.features, call.weight, call.v, call.output
        if output not in OUTPUTS:
            raise ValueError(f"{check.op}: output: got {output!r}, expected one of {', '.join(OUTPUTS)}")
        n, channels, height, width = features.shape
        rows, maps = weight.shape[0], (weight if v is None else v).shape[0]
        format = suggest_memory_format(features)
        dense = features.contiguous(memory_format=format)
        term = (n, rows) if v is not None else (n, maps, height * width)
        inputs = Inputs(
            features=_images(dense, format is torch.channels_last),
            weight=check.dense("weight", weight, (rows, channels)),
            term=check.dense("hidden_term", call.hidden_term, term),
            v=check.dense("v", v, (maps, rows)),
            mask=_mask(check("mask", call.mask, (n, height * width), torch.bool)),
            learned=_checked_temperature(check, call.learned_temperature),
        )
        return cls(call, check, inputs, (n, maps, height, width), output, format)

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
        grid_of(self.check.op, splits * self.batch)
        return splits

    def programs(self, tile: Tile) -> int:
        """Of all samples."""
        return self.batch * self.splits(tile)

    def images(self, t: Tensor) -> Features:
        """Dense images in the call's format."""
        return _images(t, self.last)

    def attended(self, t: Tensor) -> Attended:
        """Attended features, or their gradient."""
        g, c, p = self.maps, self.channels, self.positions
        last = self.last and self.output == "scale"
        return Attended(t, g * c * p, *((c, 1, g * c) if last else (c * p, p, 1)))

    def launch(
        self, kernel: Any, grid: tuple[int, ...], tile: Tile, *arguments: Any, inputs: Inputs | None = None,
        exact: bool = True,
    ) -> None:  # fmt: skip
        """Runs a kernel on the tensors, or other `inputs`, and its own arguments."""
        if grid[0]:
            numbers, compiled_for = self.numbers(self.splits(tile)), self.compiled_for(tile, exact)
            kernel[grid](inputs or self.inputs, *arguments, numbers=numbers, **compiled_for)

    def numbers(self, splits: int) -> Numbers:
        """The numbers of a launch."""
        temperature = max(self.temperature, torch.finfo(self.wide).tiny)
        sizes = (self.channels, self.rows, self.positions, *self.map_size[2:])
        return Numbers(bits_of(temperature), *sizes, splits)

    def compiled_for(self, tile: Tile, exact: bool = True) -> dict[str, Any]:
        """The constants `C` and Triton's options; `exact`: products are of operands of the features' type."""
        fast = torch.backends.cuda.matmul.allow_tf32 if exact or self.like.element_size() > 2 else True
        precision = "tf32" if fast and self.wide == torch.float32 else "ieee"
        blocks = (tile.maps, tile.rows, tile.channels, tile.positions)
        return {"C": constants(Constants(self.output, self.maps, precision, *blocks)), **tile.options}

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

    def empty_scores(self) -> Tensor:
        """Uninitialised [N, G, P] of the arithmetic's dtype."""
        return self.empty_wide(self.batch, self.maps, self.positions)

    def empty_wide(self, *size: int) -> Tensor:
        """An uninitialised tensor of the arithmetic's dtype."""
        return torch.empty(size, dtype=self.wide, device=self.like.device)


def _images(t: Tensor, last: bool) -> Features:
    """Dense images; torch's strides are arbitrary where a size is 1."""
    c, p = t.shape[1], t.shape[2] * t.shape[3]
    return Features(t, c * p, *((1, c) if last else (p, 1)))


def _mask(mask: Tensor | None) -> Mask | None:
    return None if mask is None else Mask(as_bytes(mask), *mask.stride())


def _check_images(call: Any, name: str) -> Check:
    check = Check.of_call(call, name, 4)
    t = check.like
    if 0 in t.shape[1:]:
        raise check.error(f"{name}: got shape {list(t.shape)}, expected channels and positions")
    if t.shape[2] * t.shape[3] > INT32_MAX // 4:
        raise check.error(f"{name}: got {list(t.shape)}, expected fewer than 2^29 positions")
    return check


def _checked_temperature(check: Check, learned: Tensor | None) -> Tensor | None:
    if learned is not None and learned.numel() != 1:
        raise check.error(f"temperature: got shape {list(learned.shape)}, expected one number")
    return learned if learned is None else check("temperature", learned, learned.shape, learned.dtype)
