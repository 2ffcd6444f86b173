"""torch.ops.fusednn.attention_{forward,backward}: schemas, fake kernels, autograd.

The forward returns what its backward needs beside the inputs: output and lse. A gradient that the mask leaves
out is an empty tensor. Where the backward itself must be differentiated, it is autograd's own, through the
reference's torch ops. docs/design/017-attention.md argues the contract; reference.py has all shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import settings
from ..core.transforms import under_transform
from . import backends, reference

_library = torch.library.Library("fusednn", "FRAGMENT")

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? key_mask, Tensor? extra_key, "
    "Tensor? extra_value, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? dropout_seed"
)
_OPTIONS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, int window_left, int window_right, "
    "SymInt position_offset, float softcap, float dropout_p, str weights"
)
_DIFFERENTIABLE = 7  # of the tensors, from the first
_COUNT = 11  # tensors

_SCHEMAS = {
    "attention_forward": f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    "attention_backward": "(Tensor? grad_output, Tensor? grad_lse, Tensor? grad_weights, "
    f"{_TENSORS}, Tensor output, Tensor lse, {_OPTIONS}, bool[7] output_mask) "
    f"-> ({', '.join(['Tensor'] * 7)})",
}

for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(backends, _name), "CompositeExplicitAutograd")


def _by_rows(like: Tensor, batch: Any, heads: Any, rows: Any, size: Any) -> Tensor:
    return like.new_empty(batch, rows, heads, size).transpose(1, 2)


@torch.library.register_fake("fusednn::attention_forward", lib=_library)
def _(query, key, value, mask, key_mask, extra_key, *rest):
    batch, heads, rows, _ = query.shape
    columns = key.shape[2] + (0 if extra_key is None else extra_key.shape[1])
    sizes = {"none": (0,), "mean": (batch, rows, columns), "heads": (batch, heads, rows, columns)}
    wide = reference.accumulation_dtype(query.dtype)
    return (
        _by_rows(query, batch, heads, rows, value.shape[3]),
        query.new_empty(batch, heads, rows, dtype=wide),
        query.new_empty(sizes[rest[-1]]),
    )


@torch.library.register_fake("fusednn::attention_backward", lib=_library)
def _(grad_output, grad_lse, grad_weights, *rest):
    tensors, output_mask = rest[:_DIFFERENTIABLE], rest[-1]
    return tuple(
        tensors[0].new_empty(0) if not wanted else torch.empty_like(t)
        for t, wanted in zip(tensors, output_mask, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_COUNT], output[0], output[1])
    ctx.options = inputs[_COUNT:]
    ctx.set_materialize_grads(False)
    ctx.backend = settings.backend()
    if ctx.options[-1] == "none":
        ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    everything = ctx.saved_tensors  # once: activation checkpointing allows no more
    tensors, saved = everything[:_COUNT], everything[_COUNT:]
    nothing = (None,) * (_COUNT - _DIFFERENTIABLE + len(ctx.options))
    needs = ctx.needs_input_grad[:_DIFFERENTIABLE]
    if ctx.options[-1] == "none":
        grads = (*grads[:2], None)
    if all(g is None for g in grads):
        return (*(None,) * _DIFFERENTIABLE, *nothing)
    if torch.is_grad_enabled() or under_transform(*grads):
        found = reference.differentiable_gradients(tensors, ctx.options, grads, needs)
    else:
        with settings.use_backend(ctx.backend):
            op = torch.ops.fusednn.attention_backward
            given = op(*grads, *tensors, *saved, *ctx.options, needs)
        found = tuple(g if needed else None for g, needed in zip(given, needs, strict=True))
    return *found, *nothing


torch.library.register_autograd("fusednn::attention_forward", _backward, setup_context=_setup, lib=_library)
