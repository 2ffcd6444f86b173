"""The linear maps around attention: into heads and out of them, without copies."""

from __future__ import annotations

from collections.abc import Sequence

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
    inputs, d = (query, key, value), layer.embed_dim // layer.num_heads
    heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    runs = [[0]]  # of inputs that share a product
    for i in (1, 2):
        if len(layer.in_proj) == 1 and inputs[i] is inputs[i - 1]:
            runs[-1].append(i)
        else:
            runs.append([i])
    rows = [sum(heads[i] for i in run) * d for run in runs]
    weights: Sequence[Tensor] = layer.in_proj
    biases: Sequence[Tensor | None] = (layer.in_proj_bias,) * len(runs)
    if len(runs) > 1:  # split, not slices: its gradient is one cat
        weights = weights if len(weights) == 3 else weights[0].split(rows)
        biases = biases if layer.in_proj_bias is None else layer.in_proj_bias.split(rows)
    found: list[Tensor] = []
    for run, weight, bias in zip(runs, weights, biases):
        x = project(inputs[run[0]], weight, bias)
        x = x.view(*x.shape[:-1], weight.shape[0] // d, d)
        found += x.split([heads[i] for i in run], -2) if len(run) > 1 else (x,)
    q, k, v = found
    return q, k, v


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
