"""Flops of the cells' ops for torch.utils.flop_counter: their matrix products, as it counts torch's."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from . import ops  # noqa: F401  registers torch.ops.fusednn.*

_fusednn = torch.ops.fusednn


def _product(input_shape, weight_shape) -> int:
    """Flops of ``[B, K]`` times ``[N, K]`` transposed, or of either gradient."""
    return 2 * input_shape[0] * weight_shape[0] * weight_shape[1]


@register_flop_formula(_fusednn.lstm_cell_forward)
def _(input, hx, cx, weight_ih, weight_hh, *_rest, **_kwargs) -> int:
    return _product(input, weight_ih) + _product(hx, weight_hh)


@register_flop_formula(_fusednn.gru_cell_forward)
def _(input, hx, weight_ih, weight_hh, *_rest, **_kwargs) -> int:
    return _product(input, weight_ih) + _product(hx, weight_hh)


@register_flop_formula(_fusednn.lstm_cell_backward)
def _(grad_h, grad_c, input, hx, cx, weight_ih, weight_hh, c, gates, output_mask, **_kwargs) -> int:
    d_input, d_hx, _, d_weight_ih, d_weight_hh, _ = output_mask
    return (d_input + d_weight_ih) * _product(input, weight_ih) + (d_hx + d_weight_hh) * _product(
        hx, weight_hh
    )


@register_flop_formula(_fusednn.gru_cell_backward)
def _(grad_h, input, hx, weight_ih, weight_hh, gates, output_mask, **_kwargs) -> int:
    d_input, d_hx, d_weight_ih, d_weight_hh, *_ = output_mask
    return (d_input + d_weight_ih) * _product(input, weight_ih) + (d_hx + d_weight_hh) * _product(
        hx, weight_hh
    )
