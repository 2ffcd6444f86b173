"""The layer's way past the dispatcher on CPU tensors: docs/design/006-eager-shortcut.md.

Self-attention of plain CPU tensors, without options, and with no mask but that of padding, goes straight to
the extension, which has both projections and the autograd node. Anything else, and anything wrong, is left
to the general way: the shortcut never refuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import has_torch_function

from ..core import eager, native
from . import ops, reference

if TYPE_CHECKING:
    from .modules import MultiheadAttention


def applies(query: Any, key: Any, value: Any) -> bool:
    """Whether a call with these inputs may take the shortcut, as far as the layer itself doesn't matter."""
    return query is key and key is value and eager.applies(query)


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
        *tensors,
        padding,
        layer.num_heads,
        layer.batch_first,
        weights,
        ops.FEWEST_PROJECTED_ROWS,
    )
    if found is None:
        return None
    return found[0], None if weights == "none" else found[1]


@eager.composite("multihead_attention_layer")
def layer_composite(
    input: Tensor,  # [B, L, E] or [L, B, E]
    in_weight: Tensor,  # [3 E, E]
    in_bias: Tensor | None,  # [3 E]
    out_weight: Tensor,  # [E, E]
    out_bias: Tensor | None,  # [E]
    key_mask: Tensor | None,  # [B, L], True takes part, or added
    heads: int,
    batch_first: bool,
    weights: str,
    _fewest_rows: int,
) -> tuple[Tensor, ...]:
    """Return the output and the weights of a plain call."""
    x = input if batch_first else input.transpose(0, 1)
    parts = linear(x, in_weight, in_bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scale = parts.shape[-1] ** -0.5
    output, _, found = reference.attention_forward(
        *parts.unbind(0), None, key_mask, *(None,) * 6, 0, 0, scale, -1, -1, 0, 0.0, 0.0, weights
    )
    output = linear(output.transpose(1, 2).flatten(2), out_weight, out_bias)
    return output if batch_first else output.transpose(0, 1), found
