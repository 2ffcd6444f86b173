"""Launchers of spatial attention, with the signatures of the ops of the same names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core.checks import device_guard, gradients_in_order
from .additive import attention_additive_scores_kernel
from .arguments import Parts
from .call import Attention
from .forward import attention_combine_kernel, attention_forward_kernel
from .gradients import Gradients

__all__ = [
    "spatial_attention_backward",
    "spatial_attention_forward",
    "spatial_softmax_backward",
    "spatial_softmax_forward",
]


def _additive_scores(call: Attention) -> Tensor:
    """[N, G, P], in the arithmetic's dtype."""
    scores, tile = call.empty_wide(call.batch, call.maps, call.positions), call.product_tile
    splits = call.splits(tile)
    attention_additive_scores_kernel[(call.batch * splits,)](
        call.inputs(), scores, call.numbers(splits), **call.compiled_for(tile)
    )
    return scores


def _launch_forward(call: Attention, attended: Tensor, map: Tensor) -> None:
    inputs, tile = call.inputs(), call.tile
    if call.v is not None:
        inputs = inputs._replace(weight=None, term=_additive_scores(call), v=None)
    splits = call.splits(tile)
    parts = None
    if splits > 1:
        parts = Parts(
            weights=call.empty_wide(call.batch, call.maps, call.positions),
            stats=call.empty_wide(call.batch, splits, call.maps, 2),
            sums=call.empty_wide(call.batch, splits, call.maps, max(call.channels, 2)),
        )
    grid, numbers, to = (call.batch * splits,), call.numbers(splits), call.attended(attended)
    attention_forward_kernel[grid](inputs, to, map, parts, numbers, **call.compiled_for(tile))
    if parts is not None:
        attention_combine_kernel[grid](inputs, to, map, parts, numbers, **call.compiled_for(tile))


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
    """Softmax over all positions.

    Args:
        logits: [N, G, H, W].
        mask: bool [N, G, H W] or None, True takes part.
        learned_temperature: one number, or None.
        temperature: where none is learned.
        coordinates: whether the expected (x, y) are asked for.

    Returns:
        The map [N, G, H, W], and (x, y) [N, G, 2] or an empty tensor.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.

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
    """Attention over all positions of features.

    Args:
        features: [N, C, H, W].
        weight: [G, C]; additive: [A, C].
        hidden_term: [N, G, H W] or None; additive: [N, A] or None.
        v: None: positional scores; additive: [G, A].
        mask: bool [N, H W] or None, True takes part.
        learned_temperature: one number, or None.
        temperature: where none is learned.
        output: scale, flatten, sum or coordinates.

    Returns:
        Attended features: [N, G C, H, W] in the features' memory format, [N, G C H W], [N, G C] or [N, G, 2];
        and the map [N, G, H, W].

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
        ValueError: there is no such output.

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
    """Gradients of `spatial_softmax_forward`.

    Args:
        grad_map: [N, G, H, W] or None.
        grad_coordinates: [N, G, 2] or None.
        mask: as in the forward, like the other arguments.
        learned_temperature: ...
        temperature: ...
        map: [N, G, H, W], as the forward returned it.
        output_mask: whether logits and temperature need their gradient.

    Returns:
        Gradients of logits and temperature; empty where masked.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.

    """
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
    """Gradients of `spatial_attention_forward`, from the map alone.

    Args:
        grad_attended: of the forward's first result, or None.
        grad_map: [N, G, H, W] or None.
        features: as in the forward, like the other arguments.
        weight: ...
        hidden_term: ...
        v: ...
        mask: ...
        learned_temperature: ...
        temperature: ...
        output: ...
        map: [N, G, H, W], as the forward returned it.
        output_mask: whether features, weight, hidden_term, v and temperature need their gradient.

    Returns:
        Their gradients; empty where masked.

    Raises:
        RuntimeError: a shape, dtype or device does not fit.
        ValueError: there is no such output.

    """
    op, names = "spatial_attention_backward", ("features", "weight", "term", "v", "temperature")
    call = Attention.of(op, features, weight, hidden_term, v, mask, learned_temperature, temperature, output)
    needed = _needed(names, output_mask)
    found = Gradients(call, grad_attended, grad_map, map, needed).run() if needed else {}
    return gradients_in_order(found, names, features)
