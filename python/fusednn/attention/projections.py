"""The linear maps around attention: into heads and out of them, without copies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..core.transforms import autocast_enabled
from . import ops
from .mha_checks import Layer


def project(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``input weight^T + bias`` as ``torch.nn.functional.linear`` does.

    In float32 on the CPU it is an op of ours, which is faster there; elsewhere torch's.
    """
    if autocast_enabled(input.device):
        return linear(input, weight, bias)  # which casts a weight once
    rows = ops.projection_forward(input.reshape(-1, input.shape[-1]), weight, bias)
    return rows.view(*input.shape[:-1], weight.shape[0])


def project_in(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the heads of query [..., H, D], key and value [..., G, D], as views of products.

    Neighbours among query, key and value that are the same tensor share one product with the rows of the
    packed weight that belong to them.
    """
    h, g, d = layer.num_heads, layer.num_kv_heads, layer.embed_dim // layer.num_heads
    bias = layer.in_proj_bias
    if len(layer.in_proj) == 3:
        biases = (None, None, None) if bias is None else bias.split((h * d, g * d, g * d))
        q, k, v = (project(x, w, b) for x, w, b in zip((query, key, value), layer.in_proj, biases))
        return _heads(q, h, d), _heads(k, g, d), _heads(v, g, d)
    (weight,) = layer.in_proj
    if query is key and key is value:
        q, k, v = _heads(project(query, weight, bias), h + 2 * g, d).split((h, g, g), -2)
        return q, k, v
    if key is value:
        q, kv = _products(weight, bias, (query, key), (h * d, 2 * g * d))
        k, v = _heads(kv, 2 * g, d).split(g, -2)
        return _heads(q, h, d), k, v
    if query is key:
        qk, v = _products(weight, bias, (query, value), ((h + g) * d, g * d))
        q, k = _heads(qk, h + g, d).split((h, g), -2)
        return q, k, _heads(v, g, d)
    q, k, v = _products(weight, bias, (query, key, value), (h * d, g * d, g * d))
    return _heads(q, h, d), _heads(k, g, d), _heads(v, g, d)


def extra_columns(layer: Layer, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return keys and values [G, X, D] that every sample has after its own: learned ones, then zeros."""
    if not layer.extra_columns:
        return None, None
    g, d = layer.num_kv_heads, layer.embed_dim // layer.num_heads
    zeros = [key.new_zeros(g, 1, d)] if layer.add_zero_attn else []
    if layer.bias_k is None or layer.bias_v is None:
        return zeros[0], zeros[0]
    k, v = (b.to(key.dtype).view(g, 1, d) for b in (layer.bias_k, layer.bias_v))
    return (torch.cat([k, *zeros], 1), torch.cat([v, *zeros], 1)) if zeros else (k, v)


def _products(
    weight: Tensor, bias: Tensor | None, inputs: tuple[Tensor, ...], rows: tuple[int, ...]
) -> list[Tensor]:
    # split, not slices: its gradient is one cat
    biases = (None,) * len(rows) if bias is None else bias.split(rows)
    return [project(x, w, b) for x, w, b in zip(inputs, weight.split(rows), biases)]


def _heads(x: Tensor, heads: int, d: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, d)
