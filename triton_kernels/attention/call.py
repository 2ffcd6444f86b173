"""A call's tensors and numbers, checked and in the form that the kernels of attention take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..core.arguments import as_bytes, bits_of, constants, dense_rows, grid_of
from ..core.checks import Check
from .arguments import Constants, Inputs, KeyMask, Numbers, Rows, Scores
from .tiles import Tile, tile_of

MOST_LENGTH = 2**29  # of rows, keys, offsets and windows: positions are 32-bit numbers
MOST_WIDTH = 256
MOST_EXTRA = 16
LOG2E = 1 / math.log(2)
WEIGHTS = ("none", "mean", "heads")


class Attention:
    """A call's tensors and numbers: query, key and value have dense rows, masks are bytes or numbers."""

    def __init__(self, call: Any) -> None:
        """Raises RuntimeError if a shape, dtype or device misfits."""
        check = _checked(call)
        self.op, self.call = check.op, call
        self.query, self.key, self.value = (dense_rows(t) for t in (call.query, call.key, call.value))
        self.heads, self.key_heads = call.query.shape[1], call.key.shape[1]
        self.packed = call.cu_seqlens_q is not None
        self.extra = 0 if call.extra_key is None else call.extra_key.shape[1]  # columns
        # Samples, or packed sequences, and the most rows and columns of one.
        self.batch, self.rows, self.columns = call.query.shape[0], call.query.shape[2], call.key.shape[2]
        if self.packed:
            self.batch = call.cu_seqlens_q.shape[0] - 1
            self.rows = min(call.max_seqlen_q, self.rows)
            self.columns = min(call.max_seqlen_k, self.columns)
        self.inputs = self._inputs(check)
        self.wide = torch.promote_types(call.query.dtype, torch.float32)  # of the arithmetic
        # Scores are natural logarithms where numbers are added to them, or the dtype is wide.
        masks = (self.inputs.mask, self.inputs.key_mask)
        added = any(mask is not None and mask.data.dtype != torch.uint8 for mask in masks)
        self.natural = added or call.query.dtype == self.wide

    def _inputs(self, check: Check) -> Inputs:
        call, seed = self.call, self.call.dropout_seed
        extra = (self.key_heads, self.extra)
        scores = (*self.query.shape[:3], self.key.shape[2])
        mask = as_bytes(None if call.mask is None else call.mask.expand(scores))
        key_mask = as_bytes(call.key_mask)
        return Inputs(
            query=Rows.of(self.query),
            key=Rows.of(self.key),
            value=Rows.of(self.value),
            mask=Scores.of(mask),
            key_mask=None if key_mask is None else KeyMask(key_mask, *key_mask.stride()),
            extra_key=check.dense("extra_key", call.extra_key, (*extra, self.key.shape[3])),
            extra_value=check.dense("extra_value", call.extra_value, (*extra, self.value.shape[3])),
            slopes=check.dense("alibi_slopes", call.alibi_slopes, (self.heads,), torch.float32),
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
            seed=seed.reshape(1) if seed is not None and call.dropout_p > 0 else None,
        )

    @property
    def keep_scale(self) -> float:
        """What a weight that dropout keeps is multiplied by."""
        if self.inputs.seed is None:
            return 1.0
        return 0.0 if self.call.dropout_p >= 1 else 1 / (1 - self.call.dropout_p)

    def tile(self, kernel: str) -> Tile:
        """Blocks of `kernel`; of the shape of a sample alone, so that bits don't depend on B."""
        sizes = (self.query.shape[3], self.value.shape[3])
        return tile_of(kernel, self.inputs, *sizes, self.rows, self.columns, self.call.softcap > 0)

    def empty_rows(self) -> Tensor:
        """Uninitialised [B, H, L] of the arithmetic's dtype."""
        return torch.empty(self.query.shape[:3], dtype=self.wide, device=self.query.device)

    def launch(
        self, kernel: Any, blocks: str, programs: int, tiles: int, *arguments: Any, **flags: bool
    ) -> None:
        """Runs a kernel on the tensors and its own arguments; `tiles` of its `blocks` for each head."""
        if programs:
            numbers, compiled_for = self._numbers(tiles), self._compiled_for(blocks)
            grid = grid_of(self.op, programs)
            kernel[grid](self.inputs, *arguments, numbers=numbers, **flags, **compiled_for)

    def _numbers(self, tiles: int) -> Numbers:
        """The numbers of a grid with `tiles` for each head."""
        call, scale, cap = self.call, self.call.scale, None
        if call.softcap > 0:
            scale, cap = call.softcap, bits_of(call.scale / call.softcap)
        return Numbers(
            heads=self.heads,
            group=self.heads // self.key_heads,
            rows=self.query.shape[2],
            columns=self.key.shape[2],
            total_rows=self.query.shape[2],
            tiles=tiles,
            scale=bits_of(scale * (1.0 if self.natural else LOG2E)),
            cap=cap,
            keep_scale=bits_of(self.keep_scale),
            threshold=min(round(call.dropout_p * 2**32), 2**32 - 1),
            left=_bound(call.window_left),
            right=_bound(call.window_right),
            offset=call.position_offset,
            unscaled=bits_of(call.scale),
            weight_scale=bits_of(1 / self.heads if call.weights == "mean" else 1.0),
        )

    def _compiled_for(self, kernel: str) -> dict[str, Any]:
        """The constants `C` of a kernel, and Triton's options."""
        tile = self.tile(kernel)
        tf32 = torch.backends.cuda.matmul.allow_tf32 and self.query.dtype == torch.float32
        sizes = (self.query.shape[3], self.value.shape[3])
        blocks = (tile.rows, tile.columns, tile.width, tile.value_width)
        chosen = Constants(self.natural, "tf32" if tf32 else "ieee", self.extra, *sizes, *blocks)
        return {"C": constants(chosen), **tile.options}

    def row_tiles(self, kernel: str) -> int:
        """Of a sample."""
        return triton.cdiv(self.rows, self.tile(kernel).rows)

    def column_tiles(self, kernel: str) -> int:
        """Of a sample, without its extra columns."""
        return triton.cdiv(self.columns, self.tile(kernel).columns)


def _bound(window: int) -> int | None:
    return window if 0 <= window < MOST_LENGTH * 2 else None


def _checked(call: Any) -> Check:
    check = _check_heads(call)
    _check_packed(check, call)
    rows, columns = call.query.shape[2], call.key.shape[2]
    _check_mask(check, "mask", call.mask, (*call.query.shape[:3], columns), broadcast=True)
    _check_mask(check, "key_mask", call.key_mask, (call.query.shape[0], columns), broadcast=False)
    _check_extra(check, call)
    if call.weights not in WEIGHTS:
        raise ValueError(f"{check.op}: weights: got {call.weights!r}, expected one of {', '.join(WEIGHTS)}")
    offset = call.position_offset
    if max(rows, columns, abs(offset)) >= MOST_LENGTH:
        raise check.error(f"got {rows} rows, {columns} keys and offset {offset}, expected less than 2^29")
    return check


def _check_heads(call: Any) -> Check:
    for name in ("query", "key", "value"):
        check, size = Check.of_call(call, name, 4), getattr(call, name).shape[3]
        if size > MOST_WIDTH:
            raise check.error(f"{name}: got head size {size}, expected at most {MOST_WIDTH}")
    check = Check.of_call(call, "query", 4)
    batch, heads, _, size = call.query.shape
    groups, columns = call.key.shape[1:3]
    if (groups == 0) != (heads == 0) or (groups and heads % groups):
        raise check.error(f"key: got {groups} heads, expected a divisor of the query's {heads}")
    check("key", call.key, (batch, groups, columns, size))
    check("value", call.value, (batch, groups, columns, call.value.shape[3]))
    return check


def _check_both(check: Check, call: Any, *names: str) -> dict[str, Tensor]:
    """Tensors that are given together, or empty."""
    found = {name: getattr(call, name) for name in names if getattr(call, name) is not None}
    if found and len(found) < len(names):
        raise check.error(f"got one of {' and '.join(names)}, expected both or neither")
    return found


def _check_packed(check: Check, call: Any) -> None:
    bounds = _check_both(check, call, "cu_seqlens_q", "cu_seqlens_k")
    if not bounds:
        return
    for name, t in bounds.items():
        check(name, t, (max(t.numel(), 1),), torch.int32)
    batch, others = call.query.shape[0], (call.mask, call.key_mask, call.extra_key, call.extra_value)
    if batch != 1 or any(t is not None for t in others) or call.weights != "none":
        raise check.error(
            f"packed sequences: got a batch of {batch}, expected 1, without masks, extra columns and weights"
        )
    if not all(t.is_contiguous() for t in bounds.values()):
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


def _check_extra(check: Check, call: Any) -> None:
    for name, t in _check_both(check, call, "extra_key", "extra_value").items():
        if t.dim() != 3 or not 1 <= t.shape[1] <= MOST_EXTRA:
            raise check.error(f"{name}: got shape {list(t.shape)}, expected [G, X, D], X to {MOST_EXTRA}")
