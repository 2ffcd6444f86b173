"""torch.ops.fusednn.attention_lstm_{forward,backward}, declared.

The forward returns, beside its results, its gates and cell states for the backward.
docs/design/012-spatial-attention.md argues the contract.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import native
from ..core.backends import Backend, cpu, cuda
from ..core.dispatch import Reasons
from ..core.gradients import Gradients
from ..core.op import Op
from ..core.tensors import accumulation_dtype, empty_gradients
from . import plan, reference

MOST_STEP_BYTES = 4 * 2**20
"""Of weights that a block of the CUDA kernels reads in a step, for `auto`: a prediction (015)."""


def _form(call: Any) -> str:
    itemsize = call.features.element_size()
    return plan.resolve(call.form, call.features.shape, call.weight_ih.shape[0], call.output, itemsize)


def _with_form(call: Any) -> Any:
    return call._replace(form=_form(call))


def _cuda_limits(call: Any) -> Reasons:
    limits = native.cuda_modules[call.features.device.type].attention_lstm_limits
    shapes = (call.features, call.score_weight, call.weight_hh)
    return limits(*shapes, call.c0 is not None, call.v is not None)


def _too_many_weights(call: Any) -> Reasons:
    """Return why torch's products, on all multiprocessors, should serve the steps of a wide state."""
    numbers = call.hidden_weight.numel() + call.weight_hh.numel()
    if call.output == "sum" and _form(call) == "direct":
        numbers += call.weight_ih.numel()
    read = numbers * call.features.element_size()
    if read <= MOST_STEP_BYTES:
        return []
    return [f"a step would read {read / 2**20:.3g} MiB of weights, expected at most {MOST_STEP_BYTES >> 20}"]


def _fake_forward(call: Any) -> tuple[Tensor, ...]:
    features, has_cells = call.features, call.c0 is not None
    batch, steps, _, height, width = features.shape
    size = call.h0.shape[1]
    wide = accumulation_dtype(features.dtype)
    return (
        features.new_empty(batch, steps, size),
        features.new_empty(batch, steps, 1, height, width),
        features.new_empty(batch, size),
        features.new_empty((batch, size) if has_cells else (0,)),
        features.new_empty((batch, steps, 4 * size) if call.save else (0,), dtype=wide),
        features.new_empty((batch, steps, size) if call.save and has_cells else (0,), dtype=wide),
    )


def _fake_backward(call: Any) -> tuple[Tensor, ...]:
    features, bias = call.features, call.weight_hh.new_empty(call.weight_hh.shape[0])
    tensors = (
        *(features, call.h0, call.c0, call.score_weight, call.hidden_weight, call.hidden_bias, call.v),
        *(call.learned_temperature, call.weight_ih, call.weight_hh, bias, bias),
    )
    grad, *others = empty_gradients(tensors, call.output_mask, torch.contiguous_format)
    if call.output_mask[0]:
        frames = features.new_empty(features.shape[0] * features.shape[1], *features.shape[2:])
        frames = torch.empty_like(frames, memory_format=reference.frame_format(features))
        grad = frames.view(features.shape)
    return grad, *others


_BACKENDS: tuple[Backend, ...] = (
    cpu(arguments=_with_form),
    cuda(arguments=_with_form, limits=_cuda_limits, slower=_too_many_weights),
)

attention_lstm_backward = Op(
    reference.attention_lstm_backward,
    tuple(f"grad_{name}" for name in reference.DIFFERENTIABLE),
    fake=_fake_backward,
    backends=_BACKENDS,
)
attention_lstm_forward = Op(
    reference.attention_lstm_forward,
    ("hidden", "maps", "h", "c", "gates", "cells"),
    fake=_fake_forward,
    backends=_BACKENDS,
    gradients=Gradients(
        attention_lstm_backward,
        saved_if="save",
        constant=lambda call: ("c",) if call.c0 is None else (),
    ),
)
