"""Launches of the backward of spatial attention, and the sums of what its programs leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..core.checks import device_guard
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


class Gradients:
    """Gradients of one call; `run` returns those in `needed`: features, weight, term, v and temperature."""

    def __init__(
        self, call: Attention, grad: Tensor | None, grad_map: Tensor | None, map: Tensor, needed: set[str]
    ) -> None:
        check = call.check
        self.call, self.needed = call, needed
        self.tile = call.tile
        self.splits = call.splits(self.tile)
        self.programs = call.batch * self.splits
        if grad is not None:
            grad = check("grad_attended", grad, call.output_size).contiguous(memory_format=call.output_format)
        self.d_scores: Tensor | None = None
        self.incoming = Incoming(
            attended=None if grad is None else call.attended(grad),
            grad_map=check.dense("grad_map", grad_map, call.map_size),
            map=check.dense("map", map, call.map_size),
        )

    def run(self) -> dict[str, Tensor]:
        """Gradients by name."""
        with device_guard(self.call.like):
            found = self._of_scores()
            if self.d_scores is not None and self.call.additive:
                found |= AdditiveGradients(self, self.d_scores).run()
            return {name: t for name, t in found.items() if t is not None}

    def _partials(self, name: str, *size: int) -> Tensor | None:
        return self.call.empty_wide(self.programs, *size) if name in self.needed else None

    def _map_sums(self) -> Tensor | None:
        """Launch what makes d a and its sums, where a sample has many programs."""
        call = self.call
        if self.splits == 1:
            return None
        stats = call.empty_wide(self.programs, call.maps, 2)
        given = (self.incoming, self.d_scores, stats)
        call.launch(attention_map_gradient_kernel, (self.programs,), self.tile, *given)
        return stats

    def _of_scores(self) -> Found:
        """Launch what makes d s; the temperature's gradient, and all others if scores are positional."""
        call, tile, needed = self.call, self.tile, self.needed if not self.call.additive else set()
        if self.splits > 1 or call.additive:
            self.d_scores = call.empty_wide(call.batch, call.maps, call.positions)
        d_f = call.empty(call.like.shape, call.format) if "features" in needed else None
        d_term = call.empty((call.batch, call.maps, call.positions)) if "term" in needed else None
        weights = self._partials("weight", call.maps, call.channels) if needed else None
        temperatures = self._partials("temperature")
        if self.programs:
            stats = self._map_sums()
            gradients = (None if d_f is None else call.images(d_f), d_term, weights, temperatures)
            given = (self.incoming, self.d_scores, stats, *gradients)
            call.launch(attention_backward_kernel, (self.programs,), tile, *given)
        d_weight = added_up(weights, (call.maps, call.channels), call.like.dtype)
        d_t = None
        if call.inputs.learned is not None:
            d_t = added_up(temperatures, call.inputs.learned.shape, call.inputs.learned.dtype)
        return {"features": d_f, "term": d_term, "weight": d_weight, "temperature": d_t}


class AdditiveGradients:
    """Gradients of what additive scores are made of, from that of the scores."""

    def __init__(self, scores: Gradients, d_scores: Tensor) -> None:
        self.scores, self.call, self.needed, self.d_scores = scores, scores.call, scores.needed, d_scores
        self.tile = self.call.product_tile
        self.splits = self.call.splits(self.tile)
        self.programs = self.call.batch * self.splits

    def run(self) -> Found:
        """Gradients by name."""
        call, needed = self.call, self.needed
        if not needed - {"temperature"}:
            return {}
        d_energy = of_v = of_term = d_term = None
        if needed & {"features", "weight"}:
            d_energy = call.empty_wide(call.batch, call.rows, call.positions)
        if "v" in needed:
            of_v = call.empty_wide(self.programs, call.maps, call.rows)
        if "term" in needed:
            of_term = call.empty_wide(self.programs, call.rows)
        if self.programs:
            self._launch_energies(d_energy, of_v, of_term)
        if of_term is not None:
            d_term = added(of_term, call.batch, self.splits, (call.batch, call.rows), call.like.dtype)
        return {
            "features": self._features(d_energy) if "features" in needed else None,
            "weight": self._weight(d_energy) if "weight" in needed else None,
            "v": added_up(of_v, (call.maps, call.rows), call.like.dtype),
            "term": d_term,
        }

    def _launch_energies(self, d_energy: Tensor | None, of_v: Tensor | None, of_term: Tensor | None) -> None:
        call, tile = self.call, self.tile
        grid = (self.programs, triton.cdiv(call.rows, tile.rows))
        given = (self.d_scores, d_energy, of_v, of_term)
        call.launch(attention_energy_gradient_kernel, grid, tile, *given)

    def _features(self, d_energy: Tensor | None) -> Tensor:
        call, tile = self.call, self.tile
        found = call.empty(call.like.shape, call.format)
        grid = (self.programs, triton.cdiv(call.channels, tile.channels))
        given = (self.scores.incoming, d_energy, call.images(found))
        call.launch(attention_feature_gradient_kernel, grid, tile, *given, exact=False)
        return found

    def _weight(self, d_energy: Tensor | None) -> Tensor | None:
        """In two passes; the split is a function of the shape alone, so that results repeat."""
        call, tile = self.call, self.tile
        blocks = triton.cdiv(call.rows, tile.rows), triton.cdiv(call.channels, tile.channels)
        most = max(WANTED_PROGRAMS // (blocks[0] * blocks[1]), 1)
        steps = max(triton.cdiv(self.programs, most), 1)
        programs = triton.cdiv(self.programs, steps)
        partials = call.empty_wide(programs, call.rows, call.channels)
        grid = (programs, *blocks)
        given = (d_energy, partials, self.programs, steps)
        call.launch(attention_weight_gradient_kernel, grid, tile, *given, exact=False)
        return added_up(partials, (call.rows, call.channels), call.like.dtype)
