"""Attention over the positions of an image in plain PyTorch: the fallback, and the oracle of every kernel.

    scores       s = w f + hidden_term                       positional (Kim & Canny 2017)
                 s = v tanh(W f + hidden_term)               additive (Xu et al. 2015)
    map          a = softmax(s / T) over all P = H W positions where the mask is True; 0 elsewhere, and
                 everywhere if no position is left
    attended     scale: f a    flatten: the same, in C, H, W order    sum: sum over P of f a
                 coordinates: sum over P of (x, y) a         (soft-argmax, Levine et al. 2016)

A masked position's features, scores and gradients are not read, whatever they hold: they count as 0.
Scores, maps and sums are float32 or wider, and rounded once. The backwards take scores from the map alone.
Everything is differentiable. The recurrence is in ``recurrence.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..core.tensors import accumulation_dtype, where_needed
from ..core.transforms import without_autocast
from . import formulas

OUTPUTS = ("scale", "flatten", "sum", "coordinates")


@without_autocast
def spatial_softmax_forward(
    logits: Tensor,  # [N, G, H, W]
    mask: Tensor | None,  # [N, G, P] bool, True: takes part
    learned_temperature: Tensor | None,  # one number
    temperature: float,  # where none is learned
    coordinates: bool,
) -> tuple[Tensor, Tensor]:
    """Return the map [N, G, H, W] and, if asked for, the expected (x, y) [N, G, 2] (else empty)."""
    n, g, height, width = logits.shape
    wide = accumulation_dtype(logits.dtype)
    t = formulas.wide_temperature(learned_temperature, temperature, wide)
    a = formulas.masked_softmax(logits.to(wide).reshape(n, g, height * width), mask, t)
    xy = logits.new_empty(0)
    if coordinates:
        xy = formulas.expected_position(a, height, width).to(logits.dtype)
    return a.to(logits.dtype).reshape(logits.shape), xy


@without_autocast
def spatial_softmax_backward(
    grad_map: Tensor | None,  # [N, G, H, W]
    grad_coordinates: Tensor | None,  # [N, G, 2]
    mask: Tensor | None,
    learned_temperature: Tensor | None,
    temperature: float,
    map: Tensor,  # [N, G, H, W], as the forward returned it
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of logits and temperature; empty where masked."""
    n, g, height, width = map.shape
    wide = accumulation_dtype(map.dtype)
    t = formulas.wide_temperature(learned_temperature, temperature, wide)
    a = map.to(wide).reshape(n, g, height * width)
    d_map = torch.zeros_like(a) if grad_map is None else grad_map.to(wide).reshape(a.shape)
    if grad_coordinates is not None:
        xy = formulas.positions(height, width, wide, a.device)
        d_map = d_map + grad_coordinates.to(wide) @ xy.t()
    d_scaled = formulas.softmax_backward(d_map, a, mask)
    return (
        (d_scaled / t).to(map.dtype).reshape(map.shape) if output_mask[0] else map.new_empty(0),
        _temperature_gradient(d_scaled, a, t, learned_temperature) if output_mask[1] else map.new_empty(0),
    )


@without_autocast
def spatial_attention_forward(
    features: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [G, C]; additive: [A, C]
    hidden_term: Tensor | None,  # [N, G, P]; additive: [N, A]
    v: Tensor | None,  # None: positional; additive: [G, A]
    mask: Tensor | None,  # [N, P] bool, True: takes part
    learned_temperature: Tensor | None,  # one number
    temperature: float,  # where none is learned
    output: str,
) -> tuple[Tensor, Tensor]:
    """Return the attended features and the map [N, G, H, W].

    Attended: scale [N, G C, H, W] in the features' memory format, flatten [N, G C P], sum [N, G C],
    coordinates [N, G, 2].
    """
    wide = accumulation_dtype(features.dtype)
    f = _visible(features, mask).to(wide)  # [N, C, P]
    s, _ = _scores(f, weight.to(wide), hidden_term, v)
    t = formulas.wide_temperature(learned_temperature, temperature, wide)
    a = formulas.masked_softmax(s, None if mask is None else mask.unsqueeze(1), t)  # [N, G, P]
    map = a.to(features.dtype).reshape(a.shape[0], a.shape[1], *features.shape[2:])
    return _attend(f, a, features, output), map


def _visible(features: Tensor, mask: Tensor | None) -> Tensor:
    f = features.flatten(2)
    return f if mask is None else f.masked_fill(~mask.unsqueeze(1), 0)


def _scores(f: Tensor, weight: Tensor, hidden_term: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the scores [N, G, P] and, of the additive ones, tanh(W f + U h) [N, A, P] (else empty)."""
    products = formulas.image_scores(f, weight)
    term = None if hidden_term is None else hidden_term.to(f.dtype)
    if v is None:
        return products if term is None else products + term, f.new_empty(0)
    energy = formulas.additive_energy(products, term)
    return v.to(f.dtype) @ energy, energy


def _attend(f: Tensor, a: Tensor, features: Tensor, output: str) -> Tensor:
    n, c, height, width = features.shape
    g = a.shape[1]
    if output == "sum":
        return (a @ f.transpose(1, 2)).to(features.dtype).reshape(n, g * c)
    if output == "coordinates":
        return formulas.expected_position(a, height, width).to(features.dtype)
    scaled = (f.unsqueeze(1) * a.unsqueeze(2)).to(features.dtype)  # [N, G, C, P]
    if output == "flatten":
        return scaled.reshape(n, g * c * height * width)
    return scaled.reshape(n, g * c, height, width).contiguous(memory_format=suggest_memory_format(features))


@without_autocast
def spatial_attention_backward(
    grad_attended: Tensor | None,
    grad_map: Tensor | None,  # [N, G, H, W]
    features: Tensor,
    weight: Tensor,
    hidden_term: Tensor | None,
    v: Tensor | None,
    mask: Tensor | None,
    learned_temperature: Tensor | None,
    temperature: float,
    output: str,
    map: Tensor,  # [N, G, H, W], as the forward returned it
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of features, weight, hidden_term, v and temperature; empty where masked."""
    wide = accumulation_dtype(features.dtype)
    f, a, w = _visible(features, mask).to(wide), map.to(wide).flatten(2), weight.to(wide)
    t = formulas.wide_temperature(learned_temperature, temperature, wide)
    d_map, d_f = _attend_backward(grad_attended, f, a, features, output)
    if grad_map is not None:
        d_map = d_map + grad_map.to(wide).reshape(a.shape)
    d_scaled = formulas.softmax_backward(d_map, a, None if mask is None else mask.unsqueeze(1))
    d_s = d_scaled / t  # [N, G, P]
    if v is None:
        d_products = d_term = d_s
        d_v = d_s.new_empty(0)
    else:
        energy = formulas.additive_energy(w @ f, None if hidden_term is None else hidden_term.to(wide))
        d_v = formulas.sum_of_products(d_s, energy)
        d_products = (v.to(wide).t() @ d_s) * (1 - energy * energy)  # [N, A, P]
        d_term = d_products.sum(-1)

    def d_features() -> Tensor:
        found = d_f + w.t() @ d_products  # [N, C, P]
        found = found if mask is None else found.masked_fill(~mask.unsqueeze(1), 0)
        found = found.to(features.dtype).reshape(features.shape)
        return found.contiguous(memory_format=suggest_memory_format(features))

    grads: tuple[Callable[[], Tensor], ...] = (
        d_features,
        lambda: formulas.sum_of_products(d_products, f).to(weight.dtype),
        lambda: d_term.to(features.dtype),
        lambda: d_v.to(features.dtype),
        lambda: _temperature_gradient(d_scaled, a, t, learned_temperature),
    )
    return where_needed(grads, output_mask, features)


def _attend_backward(
    grad: Tensor | None, f: Tensor, a: Tensor, features: Tensor, output: str
) -> tuple[Tensor, Tensor]:
    """Gradients of the map [N, G, P] and, past the scores, of the features [N, C, P]."""
    n, c, height, width = features.shape
    g = a.shape[1]
    if grad is None:
        return torch.zeros_like(a), torch.zeros_like(f)
    grad = grad.to(f.dtype)
    if output == "coordinates":
        xy = formulas.positions(height, width, a.dtype, a.device)
        return grad @ xy.t(), torch.zeros_like(f)
    if output == "sum":
        grad = grad.reshape(n, g, c)
        return grad @ f, grad.transpose(1, 2) @ a
    grad = grad.reshape(n, g, c, height * width)
    return torch.einsum("ngcp,ncp->ngp", grad, f), torch.einsum("ngcp,ngp->ncp", grad, a)


def _temperature_gradient(d_scaled, a, t, learned: Tensor | None) -> Tensor:
    assert learned is not None
    return formulas.temperature_gradient(d_scaled, a, t).to(learned.dtype).reshape(learned.shape)
