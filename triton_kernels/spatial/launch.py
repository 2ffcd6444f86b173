"""Launchers of spatial attention, which take the calls of its ops: see `fusednn.spatial.reference`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.checks import device_guard
from .additive import attention_additive_scores_kernel
from .arguments import Parts
from .call import Attention
from .forward import attention_combine_kernel, attention_forward_kernel
from .gradients import gradients


def _additive_scores(attention: Attention) -> Tensor:
    """[N, G, P], in the arithmetic's dtype."""
    scores, tile = attention.empty_scores(), attention.product_tile
    attention.launch(attention_additive_scores_kernel, (attention.programs(tile),), tile, scores)
    return scores


def _parts(attention: Attention) -> Parts | None:
    """What is left to be combined where a sample takes several programs."""
    splits = attention.splits(attention.tile)
    if splits == 1:
        return None
    batch, maps, channels = attention.batch, attention.maps, attention.channels
    return Parts(
        weights=attention.empty_scores(),
        stats=attention.empty_wide(batch, splits, maps, 2),
        sums=attention.empty_wide(batch, splits, maps, max(channels, 2)),
    )


def _forward(attention: Attention) -> tuple[Tensor, Tensor]:
    """Attended features and map."""
    attended = attention.empty(attention.output_size, attention.output_format)
    map, inputs, tile = attention.empty(attention.map_size), attention.inputs, attention.tile
    with device_guard(attention.like):
        if attention.additive:
            inputs = inputs._replace(weight=None, term=_additive_scores(attention), v=None)
        parts = _parts(attention)
        given = ((attention.programs(tile),), tile, attention.attended(attended), map, parts)
        attention.launch(attention_forward_kernel, *given, inputs=inputs)
        if parts is not None:
            attention.launch(attention_combine_kernel, *given, inputs=inputs)
    return attended, map


def spatial_softmax_forward(call: Any) -> tuple[Tensor, Tensor]:
    """The map, and (x, y) or an empty tensor; raises RuntimeError if a shape, dtype or device misfits."""
    xy, map = _forward(Attention.of_maps(call, "logits", call.coordinates))
    return map, xy


def spatial_attention_forward(call: Any) -> tuple[Tensor, Tensor]:
    """Attended features and the map; raises RuntimeError if a shape, dtype or device misfits."""
    return _forward(Attention.of(call))


def spatial_softmax_backward(call: Any) -> tuple[Tensor, ...]:
    """Gradients of logits and temperature, from the map alone; empty where masked."""
    attention = Attention.of_maps(call, "map", call.grad_coordinates is not None)
    d_logits, d_temperature = gradients(attention, call, call.grad_coordinates, ("term", "temperature"))
    return d_logits.view(call.map.shape) if call.output_mask[0] else d_logits, d_temperature


def spatial_attention_backward(call: Any) -> tuple[Tensor, ...]:
    """Gradients of features, weight, hidden_term, v and temperature, from the map; empty where masked."""
    names = ("features", "weight", "term", "v", "temperature")
    return gradients(Attention.of(call), call, call.grad_attended, names)
