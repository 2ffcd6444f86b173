"""torch.ops.fusednn.{spatial_softmax,spatial_attention}_{forward,backward}, declared.

A forward returns the map beside its result, and the backward starts from it.
docs/design/012-spatial-attention.md argues the contract.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..core.backends import cpu, cuda, triton
from ..core.gradients import Gradients
from ..core.op import Op
from ..core.tensors import empty_gradients
from . import reference


def _fake_softmax(call: Any) -> tuple[Tensor, ...]:
    coordinates = (*call.logits.shape[:2], 2) if call.coordinates else (0,)
    return call.logits.new_empty(call.logits.shape), call.logits.new_empty(coordinates)


def _fake_softmax_backward(call: Any) -> tuple[Tensor, ...]:
    tensors = (call.map, call.learned_temperature)
    return empty_gradients(tensors, call.output_mask, torch.contiguous_format)


def _fake_attention(call: Any) -> tuple[Tensor, ...]:
    features = call.features
    n, c, height, width = features.shape
    g = (call.weight if call.v is None else call.v).shape[0]
    map = features.new_empty(n, g, height, width)
    if call.output == "scale":
        size, fmt = (n, g * c, height, width), suggest_memory_format(features)
        scaled = torch.empty(size, dtype=features.dtype, device=features.device, memory_format=fmt)
        return scaled, map
    sizes = {"flatten": (n, g * c * height * width), "sum": (n, g * c), "coordinates": (n, g, 2)}
    return features.new_empty(sizes[call.output]), map


def _fake_attention_backward(call: Any) -> tuple[Tensor, ...]:
    tensors = (call.features, call.weight, call.hidden_term, call.v, call.learned_temperature)
    grad, *others = empty_gradients(tensors, call.output_mask, torch.contiguous_format)
    if call.output_mask[0]:
        grad = torch.empty_like(call.features, memory_format=suggest_memory_format(call.features))
    return grad, *others


BACKENDS = (cpu(), cuda(), triton())

spatial_softmax_backward = Op(
    reference.spatial_softmax_backward,
    ("grad_logits", "grad_learned_temperature"),
    fake=_fake_softmax_backward,
    backends=BACKENDS,
)
spatial_softmax_forward = Op(
    reference.spatial_softmax_forward,
    ("map", "coordinates"),
    fake=_fake_softmax,
    backends=BACKENDS,
    gradients=Gradients(spatial_softmax_backward),
)
spatial_attention_backward = Op(
    reference.spatial_attention_backward,
    ("grad_features", "grad_weight", "grad_hidden_term", "grad_v", "grad_learned_temperature"),
    fake=_fake_attention_backward,
    backends=BACKENDS,
)
spatial_attention_forward = Op(
    reference.spatial_attention_forward,
    ("attended", "map"),
    fake=_fake_attention,
    backends=BACKENDS,
    gradients=Gradients(spatial_attention_backward),
)
