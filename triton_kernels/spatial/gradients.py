"""Launches of the backward of spatial attention, and the sums of what its programs leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..core.checks import device_guard, gradients_in_order, wanted
from .additive import (
    attention_energy_gradient_kernel,
    attention_feature_gradient_kernel,
    attention_weight_gradient_kernel,
)
from .arguments import Incoming
from .backward import (
    attention_add_partials_kernel,
    attention_backward_kernel,
    attention_map_gradient_kernel,
)
from .call import Attention

WANTED_PROGRAMS = 512  # of the additive scores' weight gradient
SUM_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
Found = dict[str, Tensor | None]


def added(partials: Tensor, outer: int, count: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Sums of partials [outer, count, inner] over count, as a tensor of `size`."""
    sums = partials.new_empty(tuple(size), dtype=dtype)
    if sums.numel() == 0:
        return sums
    inner = sums.numel() // outer
    block_i = min(triton.next_power_of_2(inner), 32)
    block_j = min(triton.next_power_of_2(max(count, 1)), 1024 // block_i)
    attention_add_partials_kernel[(outer, triton.cdiv(inner, block_i))](
        partials, sums, count, inner, BLOCK_J=block_j, BLOCK_I=block_i, **SUM_OPTIONS
    )
    return sums


def added_up(partials: Tensor | None, size: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Sum over all programs."""
    return None if partials is None else added(partials, 1, partials.shape[0], size, dtype)


def gradients(
    attention: Attention, call: Any, grad: Tensor | None, names: Sequence[str]
) -> tuple[Tensor, ...]:
    """Gradients of a call by `grad`, of what maps weigh, and by that of the map; empty where masked."""
    needed, like = wanted(names, call.output_mask), call.map
    if not needed:
        return gradients_in_order({}, names, like)
    incoming, d_scores = _incoming(attention, call, grad), None
    if attention.additive or attention.splits(attention.tile) > 1:
        d_scores = attention.empty_scores()
    with device_guard(like):
        found = _of_scores(attention, incoming, d_scores, needed)
        if d_scores is not None and attention.additive:
            found |= AdditiveGradients(attention, incoming, d_scores, needed).run()
    return gradients_in_order({name: t for name, t in found.items() if t is not None}, names, like)


def _incoming(attention: Attention, call: Any, grad: Tensor | None) -> Incoming:
    check, size = attention.check, attention.map_size
    if grad is not None:
        grad = check("grad_attended", grad, attention.output_size)
        grad = grad.contiguous(memory_format=attention.output_format)
    return Incoming(
        attended=None if grad is None else attention.attended(grad),
        grad_map=check.dense("grad_map", call.grad_map, size),
        map=check.dense("map", call.map, size),
    )


def _of_scores(attention: Attention, incoming: Incoming, d_scores: Tensor | None, needed: set[str]) -> Found:
    """Launch what makes d s; the temperature's gradient, and all others if scores are positional."""
    tile, like, learned = attention.tile, attention.like, attention.inputs.learned
    maps, channels, programs = attention.maps, attention.channels, attention.programs(tile)
    if attention.additive:
        needed = needed & {"temperature"}
    d_f = attention.empty(like.shape, attention.format) if "features" in needed else None
    d_term = attention.empty((attention.batch, maps, attention.positions)) if "term" in needed else None
    weights = attention.empty_wide(programs, maps, channels) if "weight" in needed else None
    temperatures = attention.empty_wide(programs) if "temperature" in needed else None
    stats = None
    if attention.splits(tile) > 1:
        stats = attention.empty_wide(programs, maps, 2)
        attention.launch(attention_map_gradient_kernel, (programs,), tile, incoming, d_scores, stats)
    found = (None if d_f is None else attention.images(d_f), d_term, weights, temperatures)
    attention.launch(attention_backward_kernel, (programs,), tile, incoming, d_scores, stats, *found)
    d_weight = added_up(weights, (maps, channels), like.dtype)
    d_t = None if learned is None else added_up(temperatures, learned.shape, learned.dtype)
    return {"features": d_f, "term": d_term, "weight": d_weight, "temperature": d_t}


class AdditiveGradients:
    """Gradients of what additive scores are made of, from that of the scores."""

    def __init__(self, attention: Attention, incoming: Incoming, d_scores: Tensor, needed: set[str]) -> None:
        self.attention, self.incoming, self.d_scores, self.needed = attention, incoming, d_scores, needed
        self.tile, self.dtype = attention.product_tile, attention.like.dtype
        self.programs = attention.programs(self.tile)
        self.blocks = triton.cdiv(attention.rows, self.tile.rows)  # of rows
        self.channel_blocks = triton.cdiv(attention.channels, self.tile.channels)

    def run(self) -> Found:
        """Gradients by name."""
        attention, needed = self.attention, self.needed
        if not needed - {"temperature"}:
            return {}
        batch, maps, rows = attention.batch, attention.maps, attention.rows
        d_energy = of_v = of_term = d_term = None
        if needed & {"features", "weight"}:
            d_energy = attention.empty_wide(batch, rows, attention.positions)
        if "v" in needed:
            of_v = attention.empty_wide(self.programs, maps, rows)
        if "term" in needed:
            of_term = attention.empty_wide(self.programs, rows)
        given = (self.d_scores, d_energy, of_v, of_term)
        attention.launch(attention_energy_gradient_kernel, (self.programs, self.blocks), self.tile, *given)
        if of_term is not None:
            d_term = added(of_term, batch, attention.splits(self.tile), (batch, rows), self.dtype)
        return {
            "features": self._features(d_energy) if "features" in needed else None,
            "weight": self._weight(d_energy) if "weight" in needed else None,
            "v": added_up(of_v, (maps, rows), self.dtype),
            "term": d_term,
        }

    def _features(self, d_energy: Tensor | None) -> Tensor:
        attention = self.attention
        found = attention.empty(attention.like.shape, attention.format)
        grid, given = (self.programs, self.channel_blocks), (self.incoming, d_energy, attention.images(found))
        attention.launch(attention_feature_gradient_kernel, grid, self.tile, *given, exact=False)
        return found

    def _weight(self, d_energy: Tensor | None) -> Tensor | None:
        """In two passes; the split is a function of the shape alone, so that results repeat."""
        attention, size = self.attention, (self.attention.rows, self.attention.channels)
        most = max(WANTED_PROGRAMS // (self.blocks * self.channel_blocks), 1)
        steps = max(triton.cdiv(self.programs, most), 1)
        programs = triton.cdiv(self.programs, steps)
        partials = attention.empty_wide(programs, *size)
        grid, given = (programs, self.blocks, self.channel_blocks), (d_energy, partials, self.programs, steps)
        attention.launch(attention_weight_gradient_kernel, grid, self.tile, *given, exact=False)
        return added_up(partials, size, self.dtype)
