"""torch.ops.fusednn.projection_{forward,backward}: schemas, fake kernels, autograd.

A gradient that the mask leaves out is an empty tensor. What they are for: docs/design/018-attention-cpu.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import settings
from ..core.transforms import under_transform
from . import backends
from .projection_reference import differentiable_projection_gradients

_library = torch.library.Library("fusednn", "FRAGMENT")

_SCHEMAS = {
    "projection_forward": "(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
    "projection_backward": "(Tensor grad, Tensor input, Tensor weight, bool[3] output_mask) "
    "-> (Tensor, Tensor, Tensor)",
}

for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(backends, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("fusednn::projection_forward", lib=_library)
def _(input, weight, bias):
    return input.new_empty(input.shape[0], weight.shape[0])


@torch.library.register_fake("fusednn::projection_backward", lib=_library)
def _(grad, input, weight, output_mask):
    sizes = (input.shape, weight.shape, weight.shape[:1])
    return tuple(
        input.new_empty(size if wanted else (0,)) for size, wanted in zip(sizes, output_mask, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.backend = settings.backend()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled() or under_transform(grad):
        return differentiable_projection_gradients(input, weight, bias, grad, needs)
    with settings.use_backend(ctx.backend):
        found = torch.ops.fusednn.projection_backward(grad, input, weight, needs)
    return tuple(g if needed else None for g, needed in zip(found, needs, strict=True))


torch.library.register_autograd("fusednn::projection_forward", _backward, setup_context=_setup, lib=_library)
