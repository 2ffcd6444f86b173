"""Spatial attention around children that must be called: torch's ops, and the softmax over positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.children import against_reading
from . import functional

if TYPE_CHECKING:
    from .modules import SpatialAttention


def against_children(module: SpatialAttention) -> list[str]:
    """Why the layer can't read its children's weights; empty if it can."""
    score, v = module.score, module.v
    reasons = against_reading({"score": score}, nn.Conv2d)
    reasons = reasons or against_reading({"hidden": module.hidden, "v": v}, nn.Linear)
    if reasons:
        return reasons
    pointwise = score.kernel_size == (1, 1) and score.stride == (1, 1) and score.groups == 1
    if score.bias is not None or not pointwise or score.padding not in ((0, 0), "valid", "same"):
        return ["score is no plain 1×1 convolution without a bias"]
    return ["v has a bias"] if v is not None and v.bias is not None else []


def attend(
    module: SpatialAttention, features: Tensor, hidden: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the attended features and the map; nothing of a masked position is read."""
    if mask is not None:
        features = features.masked_fill(mask.logical_not(), 0)
    scores = module.score(features)  # [N, G or A, H, W]
    if module.hidden is not None:
        state = features.new_zeros(features.shape[0], module.hidden_size) if hidden is None else hidden
        term = module.hidden(state)
        scores = scores + (term.view_as(scores) if module.v is None else term[:, :, None, None])
    if module.v is not None:
        scores = module.v(scores.tanh().movedim(1, -1)).movedim(-1, 1)
    temperature = module.temperature
    map, xy = functional.spatial_softmax(scores, mask=mask, temperature=temperature, return_coordinates=True)
    if module.output == "coordinates":
        return xy, map
    if module.output == "sum":
        return torch.einsum("nghw,nchw->ngc", map, features).flatten(1), map
    scaled = (map.unsqueeze(2) * features.unsqueeze(1)).flatten(1, 2)  # [N, G C, H, W]
    return scaled if module.output == "scale" else scaled.flatten(1), map
