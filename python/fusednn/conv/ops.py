"""torch.ops.fusednn.{depthwise,separable}_conv2d_*: schemas, fake kernels, autograd.

The training forward of a block returns what its backward needs beside the result, except the depthwise
product, which is cheap to make again: so what is kept stays below half of eager's. A gradient that the mask
leaves out is an empty tensor, since a schema can't return an optional one. Where the backward itself must be
differentiated, it is autograd's own, through the reference's torch ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import settings
from ..core.transforms import gradients_by_autograd
from . import backends, reference
from .shapes import output_format, output_size, saved_format

_library = torch.library.Library("fusednn", "FRAGMENT")

_GEOMETRY = "int[2] stride, int[4] padding, int[2] dilation"
_BLOCK = (
    "Tensor input, Tensor depthwise_weight, Tensor? depthwise_bias, Tensor? norm1_weight, "
    "Tensor? norm1_bias, Tensor pointwise_weight, Tensor? pointwise_bias, Tensor? norm2_weight, "
    "Tensor? norm2_bias"
)
_ACTIVATIONS = "str depthwise_activation, str pointwise_activation"

_SCHEMAS = {
    "depthwise_conv2d_forward": f"(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, str activation) "
    "-> Tensor",
    "depthwise_conv2d_backward": "(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, "
    f"{_GEOMETRY}, str activation, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    "separable_conv2d_forward": "(Tensor input, Tensor depthwise_weight, Tensor? depthwise_bias, "
    "Tensor pointwise_weight, Tensor? pointwise_bias, Tensor? residual, "
    f"{_GEOMETRY}, {_ACTIVATIONS}) -> Tensor",
    "separable_conv2d_train_forward": f"({_BLOCK}, Tensor? residual, {_GEOMETRY}, float eps1, float eps2, "
    f"{_ACTIVATIONS}, bool has_norm1, bool has_norm2) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "separable_conv2d_train_backward": f"(Tensor grad_out, {_BLOCK}, Tensor z2, Tensor mean1, "
    f"Tensor rstd1, Tensor mean2, Tensor rstd2, {_GEOMETRY}, {_ACTIVATIONS}, bool has_norm1, "
    "bool has_norm2, bool[9] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}

for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(backends, _name), "CompositeExplicitAutograd")


def _fake_output(input, weight, channels, stride, padding, dilation, *weights) -> Tensor:
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    fmt = output_format(input, weight, *weights)
    return torch.empty(
        (input.shape[0], channels, *size), dtype=input.dtype, device=input.device, memory_format=fmt
    )


def _fake_grads(input, weight, output_mask, parameters) -> tuple[Any, ...]:
    fmt = output_format(input, weight)
    grad_input = torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=fmt)
    like = (grad_input, *(None if p is None else torch.empty_like(p) for p in parameters))
    return tuple(g if needed else input.new_empty(0) for g, needed in zip(like, output_mask, strict=True))


@torch.library.register_fake("fusednn::depthwise_conv2d_forward", lib=_library)
def _(input, weight, bias, stride, padding, dilation, activation):
    return _fake_output(input, weight, weight.shape[0], stride, padding, dilation)


@torch.library.register_fake("fusednn::depthwise_conv2d_backward", lib=_library)
def _(grad_output, input, weight, bias, stride, padding, dilation, activation, output_mask):
    return _fake_grads(input, weight, output_mask, (weight, weight.new_empty(weight.shape[0])))


@torch.library.register_fake("fusednn::separable_conv2d_forward", lib=_library)
def _(input, w1, b1, w2, b2, residual, stride, padding, dilation, act1, act2):
    return _fake_output(input, w1, w2.shape[0], stride, padding, dilation, w2)


@torch.library.register_fake("fusednn::separable_conv2d_train_forward", lib=_library)
def _(
    input, w1, b1, g1, s1, w2, b2, g2, s2, residual, stride, padding, dilation,
    eps1, eps2, act1, act2, has_norm1, has_norm2,
):  # fmt: skip
    out = _fake_output(input, w1, w2.shape[0], stride, padding, dilation, w2)
    z2 = out.new_empty(0)
    if reference.needs_z2(has_norm2, act2):
        z2 = torch.empty_like(out, memory_format=saved_format(input, w1, w2))
    wide = reference.accumulation_dtype(input.dtype)
    sizes = (w1.shape[0] if has_norm1 else 0, w2.shape[0] if has_norm2 else 0)
    return out, z2, *(input.new_empty(size, dtype=wide) for size in sizes for _ in ("mean", "rstd"))


@torch.library.register_fake("fusednn::separable_conv2d_train_backward", lib=_library)
def _(
    grad_out, input, w1, b1, g1, s1, w2, b2, g2, s2, z2, mean1, rstd1, mean2, rstd2,
    stride, padding, dilation, act1, act2, has_norm1, has_norm2, output_mask,
):  # fmt: skip
    return _fake_grads(input, w1, output_mask, (w1, b1, g1, s1, w2, b2, g2, s2))


def _keep(grads: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if needed else None for g, needed in zip(grads, needs, strict=True))


def _depthwise_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(input, weight, bias)
    ctx.backend = settings.backend()


def _depthwise_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        forward = reference.depthwise_conv2d_forward
        grads = gradients_by_autograd(lambda *t: (forward(*t, *ctx.options),), tensors, (grad,), needs)
    else:
        with settings.use_backend(ctx.backend):
            op = torch.ops.fusednn.depthwise_conv2d_backward
            grads = _keep(op(grad, *tensors, *ctx.options, needs), needs)
    return *grads, None, None, None, None


def _inference_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = inputs[:5]
    ctx.options = inputs[6:]
    ctx.save_for_backward(*tensors)
    ctx.backend = settings.backend()


def _inference_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of a block that was run, or traced, for inference: its products are made again."""
    tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:5]
    if torch.is_grad_enabled():
        forward = reference.separable_conv2d_forward
        run = lambda *t: (forward(*t, None, *ctx.options),)  # noqa: E731
        grads = gradients_by_autograd(run, tensors, (grad,), needs)
    else:
        input, w1, b1, w2, b2 = tensors
        block = (input, w1, b1, None, None, w2, b2, None, None)
        *geometry, act1, act2 = ctx.options
        with settings.use_backend(ctx.backend):
            _, *saved = torch.ops.fusednn.separable_conv2d_train_forward(
                *block, None, *geometry, 0.0, 0.0, act1, act2, False, False
            )
            mask = [*needs[:3], False, False, *needs[3:], False, False]
            found = torch.ops.fusednn.separable_conv2d_train_backward(
                grad, *block, *saved, *geometry, act1, act2, False, False, mask
            )
        grads = _keep((*found[:3], *found[5:7]), needs)
    return *grads, grad if ctx.needs_input_grad[5] else None, *(None,) * len(ctx.options)


def separable_gradients(
    tensors: Sequence[Tensor | None], grad: Tensor, needs: Sequence[bool], options: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of the training forward; the extension's autograd node calls it too.

    Args:
        tensors: input, and each product's weight and bias with its norm's.
        grad: of the result.
        needs: which gradients to return; the others are None.
        options: the op's arguments after the residual.
    """
    forward = reference.separable_conv2d_train_forward
    return gradients_by_autograd(lambda *t: forward(*t, None, *options)[:1], tensors, (grad,), needs)


def _separable_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = inputs[:9]
    ctx.options = inputs[10:]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.backend = settings.backend()


def _separable_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * len(ctx.options)
    if grad is None:
        return *(None,) * 10, *nothing
    kept, needs = ctx.saved_tensors, ctx.needs_input_grad[:9]  # asked for once: checkpoint allows no more
    tensors, saved = kept[:9], kept[9:]
    stride, padding, dilation, _eps1, _eps2, *rest = ctx.options
    if torch.is_grad_enabled():
        grads = separable_gradients(tensors, grad, needs, ctx.options)
    else:
        with settings.use_backend(ctx.backend):
            op = torch.ops.fusednn.separable_conv2d_train_backward
            grads = _keep(op(grad, *tensors, *saved, stride, padding, dilation, *rest, needs), needs)
    return *grads, grad if ctx.needs_input_grad[9] else None, *nothing


torch.library.register_autograd(
    "fusednn::depthwise_conv2d_forward", _depthwise_backward, setup_context=_depthwise_setup, lib=_library
)
torch.library.register_autograd(
    "fusednn::separable_conv2d_forward", _inference_backward, setup_context=_inference_setup, lib=_library
)
torch.library.register_autograd(
    "fusednn::separable_conv2d_train_forward",
    _separable_backward,
    setup_context=_separable_setup,
    lib=_library,
)
