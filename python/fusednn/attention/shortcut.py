"""The layer's way past the dispatcher on CPU tensors: docs/design/006-eager-shortcut.md.

Self-attention of plain CPU tensors, without options, and with no mask but that of padding, goes straight to
the extension, which has both projections and the autograd node. Anything else, and anything wrong, is left
to the general way: the shortcut never refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.overrides import has_torch_function

from ..core import dispatch, native, settings
from ..core.transforms import gradients_by_autograd
from . import reference

if TYPE_CHECKING:
    from .modules import MultiheadAttention


def applies(query: Any, key: Any, value: Any) -> bool:
    """Whether a call with these inputs may take the shortcut, as far as the layer itself doesn't matter."""
    return (
        query is key
        and key is value
        and type(query) in (Tensor, nn.Parameter)
        and query.device.type == "cpu"
        and query.layout == torch.strided
        and native.extension is not None
        and hasattr(native.extension.cpu, "try_multihead_attention")
        and not torch.compiler.is_compiling()
        and settings.backend() in ("auto", "cpu")
        and forward_ad._current_level < 0
        and not dispatch.explaining()
    )


def attend(
    layer: MultiheadAttention, input: Tensor, padding: Tensor | None, weights: str
) -> tuple[Tensor, Tensor | None] | None:
    """Return the output and the weights, if any; None if the call must be looked at in the general way."""
    if not layer._qkv_same_embed_dim or layer.bias_k is not None or layer.add_zero_attn:
        return None
    if layer.training and layer.dropout > 0:
        return None
    out = layer.out_proj
    tensors = (input, layer.in_proj_weight, layer.in_proj_bias, out.weight, out.bias)
    if has_torch_function(tensors) or (padding is not None and type(padding) is not Tensor):
        return None
    found = native.extension.cpu.try_multihead_attention(
        *tensors, padding, layer.num_heads, layer.batch_first, weights
    )
    if found is None:
        return None
    return found[0], None if weights == "none" else found[1]


def layer_gradients(
    tensors: Sequence[Tensor | None],
    key_mask: Tensor | None,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    heads: int,
    batch_first: bool,
    weights: str,
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of a plain call; the extension's autograd node calls it.

    Args:
        tensors: input [B, L, E] or [L, B, E], the projections' weights and biases: in, in, out, out.
        key_mask: [B, L], True takes part, or added.
        grads: of the output and of the weights.
        needs: which gradients to return; the others are None.
        heads: of the layer.
        batch_first: which the input is.
        weights: as the op names them.
    """

    def forward(input, in_weight, in_bias, out_weight, out_bias):
        x = input if batch_first else input.transpose(0, 1)
        parts = linear(x, in_weight, in_bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        options = (None,) * 6
        scale = parts.shape[-1] ** -0.5
        output, _, found = reference.attention_forward(
            *parts.unbind(0), None, key_mask, *options, 0, 0, scale, -1, -1, 0, 0.0, 0.0, weights
        )
        output = linear(output.transpose(1, 2).flatten(2), out_weight, out_bias)
        return output if batch_first else output.transpose(0, 1), found

    return gradients_by_autograd(forward, tensors, grads, needs)
