"""torch.ops.fusednn.{spatial_softmax,spatial_attention,attention_lstm}_*: schemas, fake kernels, autograd.

A forward returns what its backward needs beside the inputs: the map, and for the recurrence its gates and
cell states. A gradient that the mask leaves out is an empty tensor, since a schema can't return an optional
one. Where the backward itself must be differentiated, it is autograd's own, through the reference's torch
ops. docs/design/012-spatial-attention.md argues the contract; reference.py and recurrence.py have all shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..core import settings
from ..core.transforms import gradients_by_autograd, under_transform
from ..recurrence.reference import frame_format
from . import backends, reference
from .formulas import accumulation_dtype

_library = torch.library.Library("fusednn", "FRAGMENT")

_TEMPERATURE = "Tensor? learned_temperature, float temperature"
_ATTENTION = (
    "Tensor features, Tensor weight, Tensor? hidden_term, Tensor? v, Tensor? mask, "
    f"{_TEMPERATURE}, str output"
)
_LSTM_SCORES = (
    "Tensor features, Tensor h0, Tensor? c0, Tensor score_weight, Tensor hidden_weight, "
    f"Tensor? hidden_bias, Tensor? v, {_TEMPERATURE}, Tensor weight_ih, Tensor weight_hh"
)
_LSTM_OPTIONS = "Tensor? lengths, str output, str cell, str form"

_SCHEMAS = {
    "spatial_softmax_forward": f"(Tensor logits, Tensor? mask, {_TEMPERATURE}, bool coordinates) "
    "-> (Tensor, Tensor)",
    "spatial_softmax_backward": f"(Tensor? grad_map, Tensor? grad_coordinates, Tensor? mask, {_TEMPERATURE}, "
    "Tensor map, bool[2] output_mask) -> (Tensor, Tensor)",
    "spatial_attention_forward": f"({_ATTENTION}) -> (Tensor, Tensor)",
    "spatial_attention_backward": f"(Tensor? grad_attended, Tensor? grad_map, {_ATTENTION}, Tensor map, "
    "bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "attention_lstm_forward": f"({_LSTM_SCORES}, Tensor? bias_ih, Tensor? bias_hh, {_LSTM_OPTIONS}, "
    "bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "attention_lstm_backward": "(Tensor? grad_hidden, Tensor? grad_maps, Tensor? grad_h, Tensor? grad_c, "
    f"{_LSTM_SCORES}, {_LSTM_OPTIONS}, Tensor hidden, Tensor maps, Tensor gates, Tensor cells, "
    f"bool[12] output_mask) -> ({', '.join(['Tensor'] * 12)})",
}

for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(backends, _name), "CompositeExplicitAutograd")


def _fake_grads(output_mask, tensors) -> tuple[Tensor, ...]:
    like = next(t for t in tensors if t is not None)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if on else like.new_empty(0)
        for t, on in zip(tensors, output_mask, strict=True)
    )


@torch.library.register_fake("fusednn::spatial_softmax_forward", lib=_library)
def _(logits, mask, learned_temperature, temperature, coordinates):
    map = logits.new_empty(logits.shape)
    return map, logits.new_empty((*logits.shape[:2], 2) if coordinates else (0,))


@torch.library.register_fake("fusednn::spatial_softmax_backward", lib=_library)
def _(grad_map, grad_coordinates, mask, learned_temperature, temperature, map, output_mask):
    return _fake_grads(output_mask, (map, learned_temperature))


@torch.library.register_fake("fusednn::spatial_attention_forward", lib=_library)
def _(features, weight, hidden_term, v, mask, learned_temperature, temperature, output):
    n, c, height, width = features.shape
    g = (weight if v is None else v).shape[0]
    map = features.new_empty(n, g, height, width)
    if output == "scale":
        fmt = suggest_memory_format(features)
        size = (n, g * c, height, width)
        return torch.empty(size, dtype=features.dtype, device=features.device, memory_format=fmt), map
    sizes = {"flatten": (n, g * c * height * width), "sum": (n, g * c), "coordinates": (n, g, 2)}
    return features.new_empty(sizes[output]), map


@torch.library.register_fake("fusednn::spatial_attention_backward", lib=_library)
def _(
    grad_attended, grad_map, features, weight, hidden_term, v, mask, learned_temperature, temperature, output,
    map, output_mask,
):  # fmt: skip
    _, *others = _fake_grads(output_mask, (features, weight, hidden_term, v, learned_temperature))
    grad = features.new_empty(0)
    if output_mask[0]:
        grad = torch.empty_like(features, memory_format=suggest_memory_format(features))
    return grad, *others


@torch.library.register_fake("fusednn::attention_lstm_forward", lib=_library)
def _(
    features, h0, c0, score_weight, hidden_weight, hidden_bias, v, learned_temperature, temperature,
    weight_ih, weight_hh, bias_ih, bias_hh, lengths, output, cell, form, save,
):  # fmt: skip
    batch, steps, _, height, width = features.shape
    size = h0.shape[1]
    state = features.new_empty(batch, size)
    gates = (batch, steps, 4 * size) if save else (0,)
    cells = (batch, steps, size) if save and c0 is not None else (0,)
    wide = accumulation_dtype(features.dtype)
    return (
        features.new_empty(batch, steps, size),
        features.new_empty(batch, steps, 1, height, width),
        state,
        features.new_empty(0) if c0 is None else torch.empty_like(state),
        features.new_empty(gates, dtype=wide),
        features.new_empty(cells, dtype=wide),
    )


@torch.library.register_fake("fusednn::attention_lstm_backward", lib=_library)
def _(
    grad_hidden, grad_maps, grad_h, grad_c, features, h0, c0, score_weight, hidden_weight, hidden_bias, v,
    learned_temperature, temperature, weight_ih, weight_hh, lengths, output, cell, form, hidden, maps, gates,
    cells, output_mask,
):  # fmt: skip
    bias = weight_hh.new_empty(weight_hh.shape[0])
    tensors = (
        features, h0, c0, score_weight, hidden_weight, hidden_bias, v, learned_temperature,
        weight_ih, weight_hh, bias, bias,
    )  # fmt: skip
    _, *others = _fake_grads(output_mask, tensors)
    grad = features.new_empty(0)
    if output_mask[0]:
        frames = features.new_empty(features.shape[0] * features.shape[1], *features.shape[2:])
        grad = torch.empty_like(frames, memory_format=frame_format(features)).view(features.shape)
    return grad, *others


def _watched(*grads: Tensor | None) -> bool:
    """Whether the backward must be seen through: recorded, or its cotangents mapped or with tangents."""
    return torch.is_grad_enabled() or under_transform(*grads)


def _keep(grads, needs) -> tuple[Tensor | None, ...]:
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


def _softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, mask, learned, ctx.temperature, ctx.coordinates = inputs
    ctx.save_for_backward(logits, mask, learned, output[0])
    ctx.set_materialize_grads(False)
    ctx.backend = settings.backend()


def _softmax_backward(ctx: Any, grad_map: Tensor | None, grad_xy: Tensor | None) -> tuple[Any, ...]:
    logits, mask, learned, map = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
    if grad_map is None and grad_xy is None:
        return (None,) * 5
    if _watched(grad_map, grad_xy):
        forward = reference.spatial_softmax_forward
        d_logits, d_learned = gradients_by_autograd(
            lambda x, t: forward(x, mask, t, ctx.temperature, ctx.coordinates),
            (logits, learned),
            (grad_map, grad_xy),
            needs,
        )
    else:
        with settings.use_backend(ctx.backend):
            found = torch.ops.fusednn.spatial_softmax_backward(
                grad_map, grad_xy, mask, learned, ctx.temperature, map, needs
            )
        d_logits, d_learned = _keep(found, needs)
    return d_logits, None, d_learned, None, None


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.output = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)
    ctx.backend = settings.backend()


def _attention_backward(ctx: Any, grad: Tensor | None, grad_map: Tensor | None) -> tuple[Any, ...]:
    features, weight, term, v, mask, learned, map = ctx.saved_tensors
    needs = (*ctx.needs_input_grad[:4], ctx.needs_input_grad[5])
    if grad is None and grad_map is None:
        return (None,) * 8
    options = (ctx.temperature, ctx.output)
    if _watched(grad, grad_map):
        forward = reference.spatial_attention_forward
        found = gradients_by_autograd(
            lambda f, w, u, v, t: forward(f, w, u, v, mask, t, *options),
            (features, weight, term, v, learned),
            (grad, grad_map),
            needs,
        )
    else:
        with settings.use_backend(ctx.backend):
            op = torch.ops.fusednn.spatial_attention_backward
            grads = op(grad, grad_map, features, weight, term, v, mask, learned, *options, map, needs)
        found = _keep(grads, needs)
    return *found[:4], None, found[4], None, None


def _lstm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = (*inputs[:8], *inputs[9:14])  # lengths last
    ctx.temperature, ctx.options = inputs[8], inputs[14:17]
    hidden, maps, _h, c, gates, cells = output
    ctx.save_for_backward(*tensors, hidden, maps, gates, cells)
    ctx.mark_non_differentiable(gates, cells, *(() if tensors[2] is not None else (c,)))
    ctx.set_materialize_grads(False)
    ctx.backend = settings.backend()


def _lstm_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    *tensors, lengths, hidden, maps, gates, cells = ctx.saved_tensors
    needs = (*ctx.needs_input_grad[:8], *ctx.needs_input_grad[9:13])
    if all(g is None for g in grads[:4]):
        return (None,) * 18

    def forward(*t: Any, save: bool) -> tuple[Tensor, ...]:
        return reference.attention_lstm_forward(*t[:8], ctx.temperature, *t[8:], lengths, *ctx.options, save)

    if _watched(*grads[:4]):
        found = gradients_by_autograd(lambda *t: forward(*t, save=False)[:4], tensors, grads[:4], needs)
    else:
        if gates.numel() != 4 * hidden.numel():  # run or traced for inference
            hidden, maps, _, _, gates, cells = forward(*tensors, save=True)
        with settings.use_backend(ctx.backend):
            op = torch.ops.fusednn.attention_lstm_backward
            saved = (hidden, maps, gates, cells)
            operands = (*tensors[:8], ctx.temperature, *tensors[8:10], lengths, *ctx.options)
            found = _keep(op(*grads[:4], *operands, *saved, needs), needs)
    return *found[:8], None, *found[8:], *(None,) * 5


for _stem, _setup, _backward in (
    ("spatial_softmax", _softmax_setup, _softmax_backward),
    ("spatial_attention", _attention_setup, _attention_backward),
    ("attention_lstm", _lstm_setup, _lstm_backward),
):
    torch.library.register_autograd(
        f"fusednn::{_stem}_forward", _backward, setup_context=_setup, lib=_library
    )
