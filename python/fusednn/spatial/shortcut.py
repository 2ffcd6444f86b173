"""The layer's way past the dispatcher on CPU tensors: docs/design/006-eager-shortcut.md.

A plain call with positional scores (CPU tensors of one dtype, a state, no mask, nobody listening) goes
straight to the extension, which has the state's projection and the autograd node. Anything else, and anything
wrong, is left to the general way: the shortcut never refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from ..core import dispatch, native, settings
from ..core.transforms import gradients_by_autograd
from . import reference

if TYPE_CHECKING:
    from .modules import SpatialAttention


def applies(features: Any) -> bool:
    """Whether a call with these features may take the shortcut, as far as the layer itself doesn't matter."""
    return (
        type(features) in (Tensor, nn.Parameter)
        and native.extension is not None
        and hasattr(native.extension.cpu, "try_spatial_attention")
        and not torch.compiler.is_compiling()
        and settings.backend() in ("auto", "cpu")
        and forward_ad._current_level < 0
        and not dispatch.explaining()
    )


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


def layer_gradients(
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    temperature: float,
    output: str,
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of a plain call; the extension's autograd node calls it.

    Args:
        tensors: features [N, C, H, W], state [N, S], score weight [G, C, 1, 1], projection's weight
            [G P, S] and bias [G P].
        grads: of the attended features and of the map.
        needs: which gradients to return; the others are None.
        temperature: of the softmax.
        output: what the map makes of the features.
    """

    def forward(features, hidden, score, weight, bias):
        term = nn.functional.linear(hidden, weight, bias).unflatten(1, (score.shape[0], -1))
        options = (None, None, None, temperature, output)
        return reference.spatial_attention_forward(features, score.flatten(1), term, *options)

    return gradients_by_autograd(forward, tensors, grads, needs)
