"""Launches of attention's backward: which kernels run for the gradients that are wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..core.arguments import dense_rows
from ..core.checks import device_guard
from .arguments import Incoming, Rows, Scores
from .call import Call
from .columns import attention_columns_kernel
from .masks import attention_mask_gradient_kernel
from .rows import attention_delta_kernel, attention_rows_kernel
from .tiles import COLUMNS, ROWS, SCORES

NAMES = ("query", "key", "value", "mask", "key_mask", "extra_key", "extra_value")
WANTED_PROGRAMS = 512  # of a mask's gradient: a few for each multiprocessor of a large device
MOST_SPLITS = 128


class Gradients:
    """One call's gradients: `delta` first, then each kernel that is needed."""

    def __init__(
        self, call: Call, grads: Sequence[Tensor | None], output: Tensor, lse: Tensor, needed: set[str]
    ) -> None:
        """From the call and what its forward gave; `grads` are those of output, lse and weights."""
        self.call, self.needed = call, needed
        grad_output, self.grad_lse, w = grads
        self.output = dense_rows(output)
        if self.grad_lse is not None:
            self.grad_lse = self.grad_lse.to(call.wide).contiguous()
        self.weight_scale = 1.0
        if w is not None and w.dim() == 3:  # of the mean of all heads
            w = w[:, None].expand(-1, call.heads, -1, -1)
            self.weight_scale = 1 / max(call.heads, 1)
        self.incoming = Incoming(
            lse=lse.contiguous(),
            low=call.empty_rows() if call.natural else None,
            delta=call.empty_rows(),
            output=Rows.of(None if grad_output is None else dense_rows(grad_output)),
            weights=Scores.of(w),
        )

    def run(self, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the tensors `shapes`, the op's own, that are needed."""
        call, needed = self.call, self.needed
        found: dict[str, Tensor] = {}
        with device_guard(call.query):
            self._launch_delta()
            extras: dict[str, Tensor] = {
                name: shapes[name] for name in ("extra_key", "extra_value") if name in needed
            }
            if "query" in needed or extras:
                found |= self._rows(extras)
            if "key" in needed or "value" in needed:
                found |= self._columns()
            for name in ("mask", "key_mask"):
                if name in needed:
                    t = shapes[name]
                    size = tuple(t.shape) if name == "mask" else (t.shape[0], 1, 1, t.shape[1])
                    found[name] = self._mask(size).view(t.shape)
        return found

    def _like(self, t: Tensor) -> Tensor:
        """Memory of a gradient; packed sequences need not cover all of it."""
        return torch.empty_like(t) if not self.call.packed else torch.zeros_like(t)

    def _launch(
        self, kernel: Any, blocks: str, programs: int, tiles: int, *arguments: Any, **flags: bool
    ) -> None:
        self.call.launch(kernel, blocks, programs, tiles, *arguments, weight_scale=self.weight_scale, **flags)

    def _launch_delta(self) -> None:
        call, tiles = self.call, self.call.row_tiles(ROWS)
        given = (Rows.of(self.output), self.grad_lse, self.incoming)
        self._launch(attention_delta_kernel, ROWS, call.batch * call.heads * tiles, tiles, *given)

    def _rows(self, extras: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradient of the query, and of the extra columns."""
        call, tiles = self.call, self.call.row_tiles(ROWS)
        batch, heads = call.batch, call.heads
        d_q = self._like(call.query) if "query" in self.needed else None
        parts = {
            name: t.new_empty(batch, heads, tiles, *t.shape[1:], dtype=call.wide)
            for name, t in extras.items()
        }
        gradients = (Rows.of(d_q), parts.get("extra_key"), parts.get("extra_value"))
        self._launch(attention_rows_kernel, ROWS, batch * heads * tiles, tiles, self.incoming, *gradients)
        found = {} if d_q is None else {"query": d_q}
        groups = call.key_heads
        for name, t in extras.items():
            part = parts[name].view(batch, groups, heads // max(groups, 1), tiles, *t.shape[1:])
            found[name] = part.sum((0, 2, 3)).to(t.dtype)
        return found

    def _columns(self) -> dict[str, Tensor]:
        """Gradients of key and value."""
        call, tiles = self.call, self.call.column_tiles(COLUMNS)
        d_k = self._like(call.key) if "key" in self.needed else None
        d_v = self._like(call.value) if "value" in self.needed else None
        programs, gradients = call.batch * call.key_heads * tiles, (Rows.of(d_k), Rows.of(d_v))
        self._launch(attention_columns_kernel, COLUMNS, programs, tiles, self.incoming, *gradients)
        return {name: t for name, t in (("key", d_k), ("value", d_v)) if t is not None}

    def _mask(self, size: tuple[int, ...]) -> Tensor:
        """Gradient of a mask of this size, each that of [B, H, L, S] or 1."""
        call, tiles, columns = self.call, self.call.row_tiles(SCORES), self.call.column_tiles(SCORES)
        counts = (call.batch, call.heads, tiles, columns)  # of tiles of scores
        full = (*call.query.shape[:3], call.key.shape[2])
        ones = [n == 1 for n in size]
        own = math.prod(count for count, one in zip(counts, ones, strict=True) if not one)
        each = math.prod(count for count, one in zip(counts, ones, strict=True) if one)
        if own * each == 0 or 0 in full:
            return call.query.new_zeros(size)
        # A function of the shapes alone, so that results repeat.
        steps = triton.cdiv(each, min(max(WANTED_PROGRAMS // own, 1), each, MOST_SPLITS))
        splits = triton.cdiv(each, steps)
        partials = call.query.new_empty(splits, *size, dtype=call.query.dtype if splits == 1 else call.wide)
        flags = {f"ONE_{name}": one for name, one in zip("BHLS", ones, strict=True)}
        self._launch(attention_mask_gradient_kernel, SCORES, own * splits, tiles, self.incoming, partials,
                     call.batch, columns, steps, splits, **flags)  # fmt: skip
        return partials[0] if splits == 1 else partials.sum(0).to(call.query.dtype)
