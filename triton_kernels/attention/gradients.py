"""Launches of attention's backward: which kernels run for the gradients that are wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..core.arguments import dense_rows
from ..core.checks import device_guard, gradients_in_order, wanted
from .arguments import Incoming, Rows, Scores
from .call import Attention
from .columns import attention_columns_kernel
from .masks import attention_mask_gradient_kernel
from .rows import attention_delta_kernel, attention_rows_kernel
from .tiles import COLUMNS, ROWS, SCORES

NAMES = ("query", "key", "value", "mask", "key_mask", "extra_key", "extra_value")
WANTED_PROGRAMS = 512  # of a mask's gradient: a few for each multiprocessor of a large device
MOST_SPLITS = 128


class Gradients(Attention):
    """The gradients of a call: `delta` first, then each kernel that is needed."""

    def __init__(self, call: Any) -> None:
        """Raises RuntimeError as `Attention`."""
        super().__init__(call)
        weights = call.grad_weights if call.weights != "none" else None
        if weights is not None and call.weights == "mean":
            weights = weights[:, None].expand(-1, self.heads, -1, -1)
        self.needed = {n for n in wanted(NAMES, call.output_mask) if getattr(call, n) is not None}
        self.incoming = Incoming(
            lse=call.lse.contiguous(),
            low=self.empty_rows() if self.natural else None,
            delta=self.empty_rows(),
            output=Rows.of(None if call.grad_output is None else dense_rows(call.grad_output)),
            weights=Scores.of(weights),
        )

    def run(self) -> tuple[Tensor, ...]:
        """Gradients in the op's order, empty where there is none."""
        call, needed = self.call, self.needed
        found: dict[str, Tensor] = {}
        with device_guard(call.query):
            if needed:
                self._launch_delta()
            if needed & {"query", "extra_key", "extra_value"}:
                found |= self._rows()
            if needed & {"key", "value"}:
                found |= self._columns()
            if "mask" in needed:
                found["mask"] = self._mask(call.mask.shape)
            if "key_mask" in needed:
                batch, columns = call.key_mask.shape
                found["key_mask"] = self._mask((batch, 1, 1, columns)).view(batch, columns)
        found = {name: _laid_out(grad, getattr(call, name)) for name, grad in found.items()}
        return gradients_in_order(found, NAMES, call.query)

    def _like(self, name: str) -> Tensor | None:
        """Memory of a gradient, if needed; packed sequences need not cover all of it."""
        if name not in self.needed:
            return None
        return (torch.zeros_like if self.packed else torch.empty_like)(getattr(self, name))

    def _launch_delta(self) -> None:
        tiles, grad_lse = self.row_tiles(ROWS), self.call.grad_lse
        if grad_lse is not None:
            grad_lse = grad_lse.to(self.wide).contiguous()
        given = (Rows.of(dense_rows(self.call.output)), grad_lse, self.incoming)
        self.launch(attention_delta_kernel, ROWS, self.batch * self.heads * tiles, tiles, *given)

    def _rows(self) -> dict[str, Tensor]:
        """Gradient of the query, and of the extra columns."""
        batch, heads, tiles = self.batch, self.heads, self.row_tiles(ROWS)
        extras = {n: getattr(self.call, n) for n in ("extra_key", "extra_value") if n in self.needed}
        d_q = self._like("query")
        parts = {
            name: t.new_empty(batch, heads, tiles, *t.shape[1:], dtype=self.wide)
            for name, t in extras.items()
        }
        gradients = (Rows.of(d_q), parts.get("extra_key"), parts.get("extra_value"))
        self.launch(attention_rows_kernel, ROWS, batch * heads * tiles, tiles, self.incoming, *gradients)
        found = {} if d_q is None else {"query": d_q}
        groups = self.key_heads
        for name, t in extras.items():
            part = parts[name].view(batch, groups, heads // max(groups, 1), tiles, *t.shape[1:])
            found[name] = part.sum((0, 2, 3)).to(t.dtype)
        return found

    def _columns(self) -> dict[str, Tensor]:
        """Gradients of key and value."""
        tiles, found = self.column_tiles(COLUMNS), {name: self._like(name) for name in ("key", "value")}
        programs, gradients = self.batch * self.key_heads * tiles, map(Rows.of, found.values())
        self.launch(attention_columns_kernel, COLUMNS, programs, tiles, self.incoming, *gradients)
        return {name: t for name, t in found.items() if t is not None}

    def _mask(self, size: Sequence[int]) -> Tensor:
        """Gradient of a mask of this size, each that of [B, H, L, S] or 1."""
        query, tiles, columns = self.query, self.row_tiles(SCORES), self.column_tiles(SCORES)
        counts = (self.batch, self.heads, tiles, columns)  # of tiles of scores
        full = (*query.shape[:3], self.key.shape[2])
        ones = [n == 1 for n in size]
        own = math.prod(count for count, one in zip(counts, ones, strict=True) if not one)
        each = math.prod(count for count, one in zip(counts, ones, strict=True) if one)
        if own * each == 0 or 0 in full:
            return query.new_zeros(size)
        # A function of the shapes alone, so that results repeat.
        steps = triton.cdiv(each, min(max(WANTED_PROGRAMS // own, 1), each, MOST_SPLITS))
        splits = triton.cdiv(each, steps)
        partials = query.new_empty(splits, *size, dtype=query.dtype if splits == 1 else self.wide)
        flags = {f"ONE_{name}": one for name, one in zip("BHLS", ones, strict=True)}
        given = (self.incoming, partials, self.batch, columns, steps, splits)
        self.launch(attention_mask_gradient_kernel, SCORES, own * splits, tiles, *given, **flags)
        return partials[0] if splits == 1 else partials.sum(0).to(query.dtype)


def _laid_out(grad: Tensor, tensor: Tensor) -> Tensor:
    """The gradient in the memory layout that torch gives to what is like its tensor."""
    like = torch.empty_like(tensor)
    return grad if grad.stride() == like.stride() else like.copy_(grad)
