"""A call's tensors and numbers, checked and in the form that the kernels of attention take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..core.arguments import as_bytes, bits_of, constants, dense_rows, grid_of
from ..core.checks import Check
from .arguments import Constants, Inputs, KeyMask, Numbers, Rows, Scores
from .tiles import Tile, capability

MOST_LENGTH = 2**29  # of rows, keys, offsets and windows: positions are 32-bit numbers
MOST_WIDTH = 256
LOG2E = 1 / math.log(2)
WEIGHTS = ("none", "mean", "heads")


@dataclass(frozen=True)
class Call:
    """One call; query, key and value have dense rows, masks are bytes or numbers. See `of`."""

    op: str
    query: Tensor
    key: Tensor
    value: Tensor
    inputs: Inputs  # as kernels take them
    batch: int  # samples, or packed sequences
    extra: int  # columns
    max_rows: int  # of a sample
    max_columns: int
    scale: float
    window_left: int
    window_right: int
    position_offset: int
    softcap: float
    dropout_p: float
    weights: str

    @classmethod
    def of(cls, op: str, tensors: Sequence[Any], options: Sequence[Any]) -> Call:
        """From the op's tensors and options; raises RuntimeError if a shape, dtype or device misfits."""
        query, key, value, mask, key_mask, extra_key, extra_value, slopes, cu_q, cu_k, seed = tensors
        max_q, max_k, scale, left, right, offset, softcap, dropout_p, weights = options
        check = _check_heads(op, query, key, value)
        packed = cu_q is not None
        _check_packed(check, cu_q, cu_k, (mask, key_mask, extra_key, extra_value), weights)
        batch, heads, rows, _size = query.shape
        columns = key.shape[2]
        _check_mask(check, "mask", mask, (batch, heads, rows, columns), broadcast=True)
        _check_mask(check, "key_mask", key_mask, (batch, columns), broadcast=False)
        _check_extra(check, extra_key, extra_value, key, value)
        if weights not in WEIGHTS:
            raise ValueError(f"{op}: weights: got {weights!r}, expected one of {', '.join(WEIGHTS)}")
        if max(rows, columns, abs(offset)) >= MOST_LENGTH:
            raise check.error(f"got {rows} rows, {columns} keys and offset {offset}, expected less than 2^29")
        query, key, value = (dense_rows(t) for t in (query, key, value))
        mask = as_bytes(None if mask is None else mask.expand(batch, heads, rows, columns))
        key_mask = as_bytes(key_mask)
        inputs = Inputs(
            query=Rows.of(query),
            key=Rows.of(key),
            value=Rows.of(value),
            mask=Scores.of(mask),
            key_mask=None if key_mask is None else KeyMask(key_mask, *key_mask.stride()),
            extra_key=None if extra_key is None else extra_key.contiguous(),
            extra_value=None if extra_value is None else extra_value.contiguous(),
            slopes=check.dense("alibi_slopes", slopes, (heads,), torch.float32),
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            seed=seed.reshape(1) if seed is not None and dropout_p > 0 else None,
        )
        left, right = (window if window < MOST_LENGTH * 2 else -1 for window in (left, right))
        samples = (
            (cu_q.shape[0] - 1, min(max_q, rows), min(max_k, columns)) if packed else (batch, rows, columns)
        )
        extra = 0 if extra_key is None else extra_key.shape[1]
        return cls(
            op, query, key, value, inputs, samples[0], extra, *samples[1:], scale, left, right, offset,
            softcap, dropout_p, weights,
        )  # fmt: skip

    @property
    def heads(self) -> int:
        """Of the query."""
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        """Of key and value."""
        return self.key.shape[1]

    @property
    def packed(self) -> bool:
        """Whether samples are packed sequences."""
        return self.inputs.cu_seqlens_q is not None

    @property
    def wide(self) -> torch.dtype:
        """Of the arithmetic."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def natural(self) -> bool:
        """Whether scores are natural logarithms: numbers are added to them, or the dtype is wide."""
        masks = (self.inputs.mask, self.inputs.key_mask)
        added = any(mask is not None and mask.data.dtype != torch.uint8 for mask in masks)
        return added or self.query.dtype == self.wide

    @property
    def keep_scale(self) -> float:
        """What a weight that dropout keeps is multiplied by."""
        if self.inputs.seed is None:
            return 1.0
        return 0.0 if self.dropout_p >= 1 else 1 / (1 - self.dropout_p)

    def tile(self, kernel: str) -> Tile:
        """Blocks of `kernel`; of the shape of a sample alone, so that bits don't depend on B."""
        return Tile.of(
            kernel, self.query.shape[3], self.value.shape[3], self.query.element_size(),
            self.max_rows, self.max_columns, capability(),
            masked=self.inputs.mask is not None, padded=self.inputs.key_mask is not None,
            dropout=self.inputs.seed is not None, capped=self.softcap > 0,
        )  # fmt: skip

    def empty_rows(self) -> Tensor:
        """Uninitialised [B, H, L] of the arithmetic's dtype."""
        return torch.empty(self.query.shape[:3], dtype=self.wide, device=self.query.device)

    def launch(
        self, kernel: Any, blocks: str, programs: int, tiles: int, *arguments: Any,
        weight_scale: float = 1.0, **flags: bool,
    ) -> None:  # fmt: skip
        """Runs a kernel on the tensors and its own arguments; `tiles` of its `blocks` for each head."""
        if programs:
            numbers, compiled_for = self.numbers(tiles, weight_scale), self.compiled_for(blocks)
            grid = grid_of(self.op, programs)
            kernel[grid](self.inputs, *arguments, numbers=numbers, **flags, **compiled_for)

    def numbers(self, tiles: int, weight_scale: float = 1.0) -> Numbers:
        """The numbers of a grid with `tiles` for each head."""
        capped = self.softcap > 0
        return Numbers(
            heads=self.heads,
            group=self.heads // self.key_heads,
            rows=self.query.shape[2],
            columns=self.key.shape[2],
            total_rows=self.query.shape[2],
            tiles=tiles,
            scale=bits_of((self.softcap if capped else self.scale) * (1.0 if self.natural else LOG2E)),
            cap=bits_of(self.scale / self.softcap) if capped else None,
            keep_scale=bits_of(self.keep_scale),
            threshold=min(round(self.dropout_p * 2**32), 2**32 - 1),
            left=self.window_left if self.window_left >= 0 else None,
            right=self.window_right if self.window_right >= 0 else None,
            offset=self.position_offset,
            unscaled=bits_of(self.scale),
            weight_scale=bits_of(weight_scale),
        )

    def compiled_for(self, kernel: str) -> dict[str, Any]:
        """The constants `C` of a kernel, and Triton's options."""
        tile = self.tile(kernel)
        tf32 = torch.backends.cuda.matmul.allow_tf32 and self.query.dtype == torch.float32
        sizes = (self.query.shape[3], self.value.shape[3])
        blocks = (tile.rows, tile.columns, tile.width, tile.value_width)
        chosen = Constants(self.natural, "tf32" if tf32 else "ieee", self.extra, *sizes, *blocks)
        return {"C": constants(chosen), **tile.options}

    def row_tiles(self, kernel: str) -> int:
        """Of a sample."""
        return triton.cdiv(self.max_rows, self.tile(kernel).rows)

    def column_tiles(self, kernel: str) -> int:
        """Of a sample, without its extra columns."""
        return triton.cdiv(self.max_columns, self.tile(kernel).columns)


def _check_heads(op: str, query: Tensor, key: Tensor, value: Tensor) -> Check:
    for name, t in (("query", query), ("key", key), ("value", value)):
        check = Check.of(op, name, t, 4)
        if t.shape[3] > MOST_WIDTH:
            raise check.error(f"{name}: got head size {t.shape[3]}, expected at most {MOST_WIDTH}")
    check = Check(op, "query", query)
    batch, heads, _, size = query.shape
    groups, columns = key.shape[1:3]
    if (groups == 0) != (heads == 0) or (groups and heads % groups):
        raise check.error(f"key: got {groups} heads, expected a divisor of the query's {heads}")
    check("key", key, (batch, groups, columns, size))
    check("value", value, (batch, groups, columns, value.shape[3]))
    return check


def _check_packed(
    check: Check, cu_q: Tensor | None, cu_k: Tensor | None, others: Sequence[Tensor | None], weights: str
) -> None:
    if cu_q is None and cu_k is None:
        return
    if cu_q is None or cu_k is None:
        raise check.error("got one of cu_seqlens_q and cu_seqlens_k, expected both or neither")
    for name, t in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        check(name, t, (max(cu_q.numel(), 1),), torch.int32)
    batch = check.like.shape[0]
    if batch != 1 or any(t is not None for t in others) or weights != "none":
        raise check.error(
            f"packed sequences: got a batch of {batch}, expected 1, without masks, extra columns and weights"
        )
    if not (cu_q.is_contiguous() and cu_k.is_contiguous()):
        raise check.error("got strided cu_seqlens, expected contiguous ones")


def _check_mask(check: Check, name: str, mask: Tensor | None, shape: Sequence[int], broadcast: bool) -> None:
    if mask is None:
        return
    fits = mask.dim() == len(shape) and all(
        got == full or (broadcast and got == 1) for got, full in zip(mask.shape, shape, strict=True)
    )
    if not fits:
        sizes = f"{list(shape)}{', or 1 for any size' if broadcast else ''}"
        raise check.error(f"{name}: got shape {list(mask.shape)}, expected {sizes}")
    if mask.dtype not in (torch.bool, check.like.dtype):
        raise check.error(f"{name}: got dtype {mask.dtype}, expected torch.bool or {check.like.dtype}")
    check(name, mask, mask.shape, mask.dtype)


def _check_extra(
    check: Check, extra_key: Tensor | None, extra_value: Tensor | None, key: Tensor, value: Tensor
) -> None:
    if extra_key is None and extra_value is None:
        return
    if extra_key is None or extra_value is None:
        raise check.error("got one of extra_key and extra_value, expected both or neither")
    extra = extra_key.shape[1] if extra_key.dim() == 3 else 0
    if not 1 <= extra <= 16:
        raise check.error(f"extra_key: got shape {list(extra_key.shape)}, expected [G, X, D], X to 16")
    check("extra_key", extra_key, (key.shape[1], extra, key.shape[3]))
    check("extra_value", extra_value, (key.shape[1], extra, value.shape[3]))
