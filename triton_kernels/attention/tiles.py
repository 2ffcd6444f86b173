"""Blocks of the programs of attention, by head size, dtype and device: a rule, not a search.

float16 and bfloat16 products run on tensor cores: tiles are as large as registers and shared memory allow.
float32 products are exact, from registers, and float64 ones are sums: small tiles, or they spill.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
from triton.runtime.driver import driver

from ..core.support import interpreting
from .arguments import Inputs

FORWARD, ROWS, COLUMNS, SCORES = "forward", "rows", "columns", "scores"  # kernels


@lru_cache
def _major_capability(_device: int) -> int:
    return driver.active.get_current_target().arch // 10


def major_capability() -> int:
    """That of the current device; of the oldest one for the interpreter."""
    return 8 if interpreting() else _major_capability(driver.active.get_current_device())


def _power(n: int, most: int) -> int:
    return min(max(triton.next_power_of_2(max(n, 1)), 16), most)


@dataclass(frozen=True)
class Tile:
    """Blocks of a program and its options; see `tile_of`."""

    rows: int
    columns: int
    width: int  # of query and key
    value_width: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Triton's; fused multiply-adds are named because their default differs between versions."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def tile_of(
    kernel: str, inputs: Inputs, size: int, value_size: int, rows: int, columns: int, capped: bool
) -> Tile:
    """Of FORWARD; ROWS and COLUMNS, backward of rows and of keys; SCORES, which keep no sums."""
    masked, padded = inputs.mask is not None, inputs.key_mask is not None
    dropout, item, major = inputs.seed is not None, inputs.query.data.element_size(), major_capability()
    width, value_width = _power(size, 256), _power(value_size, 256)
    widest = max(width, value_width)
    # Addresses, counters and the tanh's constants take registers, too.
    heavy = masked or dropout or (capped and kernel == ROWS)
    large = major in (9, 10)  # whose products read operands from shared or tensor memory
    warps, stages = 8, 2
    if item == 8:
        block_m, block_n, warps = 16, 16, 8 if kernel in (SCORES, FORWARD) else 4
    elif item == 4 and widest <= 64:
        block_m, block_n = 32, 32
        if kernel == FORWARD:
            warps, stages = 4, 1
    elif item == 4:
        block_m, block_n = 16, 16
    elif widest > 128:
        block_m, block_n = 16 if kernel == SCORES else 32, 32
        if kernel == FORWARD:
            block_n, warps = (64, 8) if major < 9 else (32, 4)
    elif kernel == FORWARD and large:
        block_m, block_n = 64 if heavy else 128, 32 if heavy or (padded and widest > 64) else 64
    elif kernel == FORWARD and heavy:
        block_m, block_n = 64 if widest <= 64 else 32, 32
    elif kernel == FORWARD:
        block_m, block_n, warps = 64, 64, 4 if widest <= 64 else 8
    elif kernel == COLUMNS and widest <= 64:
        block_m, block_n, warps = 32, 64 if large or not dropout else 32, 4
    elif kernel == COLUMNS and padded and not (heavy or large):
        block_m, block_n = 32, 64
    else:
        block_m, block_n = (32, 32) if heavy else (64, 64)
        if heavy and kernel == ROWS and not large:
            block_m = 16
        warps = 8 if widest > 64 else 4
    return Tile(_power(rows, block_m), _power(columns, block_n), width, value_width, warps, stages)
