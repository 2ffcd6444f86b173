"""Launchers of spatial attention, with the signatures of the ops: see `fusednn.spatial.reference`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core.checks import device_guard, gradients_in_order
from .additive import attention_additive_scores_kernel
from .arguments import Parts
from .call import Attention
from .forward import attention_combine_kernel, attention_forward_kernel
from .gradients import Gradients


def _additive_scores(call: Attention) -> Tensor:
    """[N, G, P], in the arithmetic's dtype."""
    scores, tile = call.empty_wide(call.batch, call.maps, call.positions), call.product_tile
    call.launch(attention_additive_scores_kernel, (call.batch * call.splits(tile),), tile, scores)
    return scores


def _launch_forward(call: Attention, attended: Tensor, map: Tensor) -> None:
    inputs, tile = call.inputs, call.tile
    if call.additive:
        inputs = inputs._replace(weight=None, term=_additive_scores(call), v=None)
    splits = call.splits(tile)
    parts = None
    if splits > 1:
        parts = Parts(
            weights=call.empty_wide(call.batch, call.maps, call.positions),
            stats=call.empty_wide(call.batch, splits, call.maps, 2),
            sums=call.empty_wide(call.batch, splits, call.maps, max(call.channels, 2)),
        )
    given = ((call.batch * splits,), tile, call.attended(attended), map, parts)
    call.launch(attention_forward_kernel, *given, inputs=inputs)
    if parts is not None:
        call.launch(attention_combine_kernel, *given, inputs=inputs)


def _forward(call: Attention) -> tuple[Tensor, Tensor]:
    """Attended features and map."""
    attended, map = call.empty(call.output_size, call.output_format), call.empty(call.map_size)
    if call.batch:
        with device_guard(call.like):
            _launch_forward(call, attended, map)
    return attended, map


def spatial_softmax_forward(
    logits: Tensor,
    mask: Tensor | None,
    learned_temperature: Tensor | None,
    temperature: float,
    coordinates: bool,
) -> tuple[Tensor, Tensor]:
    """The map [N, G, H, W], and (x, y) [N, G, 2] or an empty tensor, of logits [N, G, H, W].

    `mask` is bool [N, G, H W] or None. Raises RuntimeError if a shape, dtype or device does not fit.
    """
    op = "spatial_softmax_forward"
    xy, map = _forward(Attention.of_maps(op, logits, mask, learned_temperature, temperature, coordinates))
    return map, xy


def spatial_attention_forward(
    features: Tensor,
    weight: Tensor,
    hidden_term: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    learned_temperature: Tensor | None,
    temperature: float,
    output: str,
) -> tuple[Tensor, Tensor]:
    """Attended features and the map [N, G, H, W], of features [N, C, H, W].

    Positional: weight [G, C], hidden_term [N, G, H W] or None, v None. Additive: weight [A, C], hidden_term
    [N, A] or None, v [G, A]. `mask` is bool [N, H W] or None. The features are, by `output`, scale:
    [N, G C, H, W] in the memory format of those given; flatten: [N, G C H W]; sum: [N, G C]; coordinates:
    [N, G, 2]. Raises RuntimeError if a shape, dtype or device does not fit.
    """
    op = "spatial_attention_forward"
    return _forward(
        Attention.of(op, features, weight, hidden_term, v, mask, learned_temperature, temperature, output)
    )


def _needed(names: Sequence[str], output_mask: Sequence[bool]) -> set[str]:
    return {name for name, on in zip(names, output_mask, strict=True) if on}


def spatial_softmax_backward(
    grad_map: Tensor | None,
    grad_coordinates: Tensor | None,
    mask: Tensor | None,
    learned_temperature: Tensor | None,
    temperature: float,
    map: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and temperature, from the map alone; empty where `output_mask` says so."""
    op, names = "spatial_softmax_backward", ("term", "temperature")
    coordinates = grad_coordinates is not None
    call = Attention.of_maps(op, map, mask, learned_temperature, temperature, coordinates)
    needed = _needed(names, output_mask)
    found = Gradients(call, grad_coordinates, grad_map, map, needed).run() if needed else {}
    d_logits, d_temperature = gradients_in_order(found, names, map)
    return d_logits.view(map.shape) if output_mask[0] else d_logits, d_temperature


def spatial_attention_backward(
    grad_attended: Tensor | None,
    grad_map: Tensor | None,
    features: Tensor,
    weight: Tensor,
    hidden_term: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    learned_temperature: Tensor | None,
    temperature: float,
    output: str,
    map: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of features, weight, hidden_term, v and temperature, from the map; empty where masked."""
    op, names = "spatial_attention_backward", ("features", "weight", "term", "v", "temperature")
    call = Attention.of(op, features, weight, hidden_term, v, mask, learned_temperature, temperature, output)
    needed = _needed(names, output_mask)
    found = Gradients(call, grad_attended, grad_map, map, needed).run() if needed else {}
    return gradients_in_order(found, names, features)
