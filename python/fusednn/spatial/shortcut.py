"""The layer's way past the dispatcher on CPU tensors: docs/design/006-eager-shortcut.md.

A plain call with positional scores (CPU tensors of one dtype, a state, no mask, nobody listening) goes
straight to the extension, which has the state's projection and the autograd node. Anything else, and anything
wrong, is left to the general way: the shortcut never refuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.overrides import has_torch_function

from ..core import native
from ..core.eager import applies, composite
from . import reference

if TYPE_CHECKING:
    from .modules import SpatialAttention

__all__ = ("applies", "attend")


def attend(module: SpatialAttention, features: Tensor, hidden: Any) -> tuple[Tensor, Tensor] | None:
    """Return the results of an unmasked call; None if it must be looked at in the general way."""
    projection = module.hidden
    if projection is None or module.v is not None or module.log_temperature is not None:
        return None
    if type(hidden) is not Tensor or features.shape[2:] != (module.height, module.width):
        return None
    tensors = (features, hidden, module.score.weight, projection.weight, projection.bias)
    if projection.bias is None or has_torch_function(tensors):
        return None
    return native.extension.cpu.try_spatial_attention(*tensors, module._fixed_temperature, module.output)


@composite("spatial_attention_layer")
def layer_composite(
    features: Tensor,  # [N, C, H, W]
    hidden: Tensor,  # [N, S]
    score: Tensor,  # [G, C, 1, 1]
    weight: Tensor,  # [G P, S]
    bias: Tensor,  # [G P]
    temperature: float,
    output: str,
) -> tuple[Tensor, ...]:
    """Return the attended features and the map of a plain call."""
    term = nn.functional.linear(hidden, weight, bias).unflatten(1, (score.shape[0], -1))
    return reference.spatial_attention_forward(
        features, score.flatten(1), term, None, None, None, temperature, output
    )
