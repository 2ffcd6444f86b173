"""torch.ops.fusednn.{lstm,gru}_cell_{forward,backward}: schemas, fake kernels, autograd.

A forward returns its activated gates beside the results, for the backward alone. A gradient that the mask
leaves out is an empty tensor, since a schema can't return an optional one. Where the backward itself must be
differentiated, it is done in the reference's torch ops, from the inputs.
"""

from __future__ import annotations

import torch

from ..core import settings
from ..core.transforms import under_transform
from . import backends, reference

_library = torch.library.Library("fusednn", "FRAGMENT")

_SCHEMAS = {
    "lstm_cell_forward": "(Tensor input, Tensor hx, Tensor cx, Tensor weight_ih, Tensor weight_hh, "
    "Tensor? bias_ih, Tensor? bias_hh, bool save_gates) -> (Tensor, Tensor, Tensor)",
    "lstm_cell_backward": "(Tensor? grad_h, Tensor? grad_c, Tensor input, Tensor hx, Tensor cx, "
    "Tensor weight_ih, Tensor weight_hh, Tensor c, Tensor gates, bool[6] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gru_cell_forward": "(Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh, "
    "Tensor? bias_ih, Tensor? bias_hh, bool save_gates) -> (Tensor, Tensor)",
    "gru_cell_backward": "(Tensor grad_h, Tensor input, Tensor hx, Tensor weight_ih, Tensor weight_hh, "
    "Tensor gates, bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}

for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(backends, _name), "CompositeExplicitAutograd")


@torch.library.register_fake("fusednn::lstm_cell_forward", lib=_library)
def _(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, save_gates):
    state = cx.new_empty(hx.shape, dtype=torch.promote_types(input.dtype, cx.dtype))
    gates = input.new_empty((input.shape[0], weight_hh.shape[0]) if save_gates else (0,))
    return state, torch.empty_like(state), gates


@torch.library.register_fake("fusednn::gru_cell_forward", lib=_library)
def _(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, save_gates):
    state = hx.new_empty(hx.shape, dtype=torch.promote_types(input.dtype, hx.dtype))
    gates = input.new_empty((input.shape[0], 4 * hx.shape[1]) if save_gates else (0,))
    return state, gates


def _fake_grads(output_mask, tensors):
    return tuple(
        t.new_empty(t.shape) if needed else t.new_empty(0)
        for t, needed in zip(tensors, output_mask, strict=True)
    )


@torch.library.register_fake("fusednn::lstm_cell_backward", lib=_library)
def _(grad_h, grad_c, input, hx, cx, weight_ih, weight_hh, c, gates, output_mask):
    bias = weight_hh.new_empty(weight_hh.shape[0])
    return _fake_grads(output_mask, (input, hx, cx, weight_ih, weight_hh, bias))


@torch.library.register_fake("fusednn::gru_cell_backward", lib=_library)
def _(grad_h, input, hx, weight_ih, weight_hh, gates, output_mask):
    bias = weight_hh.new_empty(weight_hh.shape[0])
    return _fake_grads(output_mask, (input, hx, weight_ih, weight_hh, bias, bias))


def _watched(*grads) -> bool:
    """Whether the backward must be seen through: recorded, or its cotangents mapped or with tangents."""
    return torch.is_grad_enabled() or under_transform(*grads)


def _lstm_setup(ctx, inputs, output) -> None:
    *tensors, _save_gates = inputs
    _h, c, gates = output
    # A copy of c: the caller may write into the result, as with torch's cell.
    ctx.save_for_backward(*tensors, c.detach().clone(), gates)
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)
    ctx.backend = settings.backend()


def _lstm_backward(ctx, grad_h, grad_c, _grad_gates):
    *tensors, c, gates = ctx.saved_tensors
    if grad_h is None and grad_c is None:
        return (None,) * 8
    if _watched(grad_h, grad_c):
        return *_keep(reference.lstm_cell_gradients((grad_h, grad_c), tensors), ctx.needs_input_grad), None
    if gates.numel() != 4 * c.numel():
        _, c, gates = reference.lstm_cell_forward(*(*tensors, True))
    *needs, n_bias_ih, n_bias_hh, _ = ctx.needs_input_grad
    mask = [*needs, n_bias_ih or n_bias_hh]
    with settings.use_backend(ctx.backend):
        *grads, bias = torch.ops.fusednn.lstm_cell_backward(grad_h, grad_c, *tensors[:5], c, gates, mask)
    return *_keep((*grads, bias, bias), ctx.needs_input_grad), None


def _gru_setup(ctx, inputs, output) -> None:
    *tensors, _save_gates = inputs
    _h, gates = output
    ctx.save_for_backward(*tensors, gates)
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)
    ctx.backend = settings.backend()


def _gru_backward(ctx, grad_h, _grad_gates):
    *tensors, gates = ctx.saved_tensors
    if grad_h is None:
        return (None,) * 7
    if _watched(grad_h):
        return *_keep(reference.gru_cell_gradients((grad_h,), tensors), ctx.needs_input_grad), None
    if gates.numel() != 4 * tensors[1].numel():
        _, gates = reference.gru_cell_forward(*(*tensors, True))
    *needs, _ = ctx.needs_input_grad
    with settings.use_backend(ctx.backend):
        grads = torch.ops.fusednn.gru_cell_backward(grad_h, *tensors[:4], gates, needs)
    return *_keep(grads, needs), None


def _keep(grads, needs):
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=False))


torch.library.register_autograd(
    "fusednn::lstm_cell_forward", _lstm_backward, setup_context=_lstm_setup, lib=_library
)
torch.library.register_autograd(
    "fusednn::gru_cell_forward", _gru_backward, setup_context=_gru_setup, lib=_library
)
