"""The linear maps around attention in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear

from ..core.transforms import gradients_by_autograd, without_autocast


@without_autocast
def projection_forward(
    input: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor:
    """Return ``input weight^T + bias``, [M, N]."""
    return linear(input, weight, bias)


@without_autocast
def projection_backward(
    grad: Tensor,  # [M, N]
    input: Tensor,
    weight: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias; empty where masked."""
    products = (lambda: grad @ weight, lambda: grad.mT @ input, lambda: grad.sum(0))
    d_input, d_weight, d_bias = (
        f() if wanted else grad.new_empty(0) for f, wanted in zip(products, output_mask, strict=True)
    )
    return d_input, d_weight, d_bias


def differentiable_projection_gradients(
    input: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias by autograd, None where not needed."""
    return gradients_by_autograd(lambda *t: (linear(*t),), (input, weight, bias), (grad,), needs)
