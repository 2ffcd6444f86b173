"""LSTM and GRU cells in plain PyTorch: the fallback on any machine and the oracle of every kernel.

    LSTM (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000)
        i, f, o = sigmoid(.)    g = tanh(.)    c' = f c + i g          h' = o tanh(c')
    GRU (Cho et al. 2014, in cuDNN's form: the reset gate multiplies the hidden product with its bias)
        r, z = sigmoid(.)       n = tanh(x_n + r h_n)                  h' = n + z (h - n)

The state may be wider than the weights (float32 beside bfloat16, as under autocast on a CPU). Gates are
computed in float32 or wider whatever the storage. Everything is differentiable, the backwards too: they are
the second derivative's way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.tensors import accumulation_dtype, where_needed
from . import formulas


def lstm_cell_forward(
    input: Tensor,  # [B, I]
    hx: Tensor,  # [B, H]
    cx: Tensor,  # [B, H]
    weight_ih: Tensor,  # [4H, I]
    weight_hh: Tensor,  # [4H, H]
    bias_ih: Tensor | None,  # [4H]
    bias_hh: Tensor | None,  # [4H]
    save_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h' and c' [B, H], and the activated gates [B, 4H] (empty unless ``save_gates``)."""
    dtype = accumulation_dtype(input.dtype, cx.dtype)
    state = torch.promote_types(input.dtype, cx.dtype)
    products = F.linear(input, weight_ih, bias_ih) + F.linear(hx.to(input.dtype), weight_hh, bias_hh)
    h, c, gates = formulas.lstm_update(products.to(dtype), cx.to(dtype))
    return h.to(state), c.to(state), gates.to(input.dtype) if save_gates else input.new_empty(0)


def lstm_cell_backward(
    grad_h: Tensor | None,  # [B, H]
    grad_c: Tensor | None,  # [B, H]
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    c: Tensor,  # [B, H], as the forward returned it
    gates: Tensor,  # [B, 4H], activated
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of input, hx, cx, weight_ih, weight_hh and of either bias; empty where masked."""
    dtype = accumulation_dtype(input.dtype, cx.dtype)
    zero = torch.zeros_like(c, dtype=dtype)
    d_h, d_c = (zero if g is None else g.to(dtype) for g in (grad_h, grad_c))
    d_gates, d_cx = formulas.lstm_update_backward(d_h, d_c, *(t.to(dtype) for t in (gates, cx, c)))
    d_gates = d_gates.to(input.dtype)
    grads = (
        lambda: d_gates @ weight_ih,
        lambda: (d_gates @ weight_hh).to(hx.dtype),
        lambda: d_cx.to(cx.dtype),
        lambda: d_gates.t() @ input,
        lambda: d_gates.t() @ hx.to(input.dtype),
        lambda: d_gates.sum(0),
    )
    return where_needed(grads, output_mask, input)


def gru_cell_forward(
    input: Tensor,  # [B, I]
    hx: Tensor,  # [B, H]
    weight_ih: Tensor,  # [3H, I]
    weight_hh: Tensor,  # [3H, H]
    bias_ih: Tensor | None,  # [3H]
    bias_hh: Tensor | None,  # [3H]
    save_gates: bool,
) -> tuple[Tensor, Tensor]:
    """Return h' [B, H] and the gates r, z, n and h_n [B, 4H] (empty unless ``save_gates``)."""
    dtype = accumulation_dtype(input.dtype, hx.dtype)
    state = torch.promote_types(input.dtype, hx.dtype)
    x = F.linear(input, weight_ih, bias_ih).to(dtype)
    r = F.linear(hx.to(input.dtype), weight_hh, bias_hh).to(dtype)
    h, gates = formulas.gru_update(x, r, hx.to(dtype))
    return h.to(state), gates.to(input.dtype) if save_gates else input.new_empty(0)


def gru_cell_backward(
    grad_h: Tensor,  # [B, H]
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    gates: Tensor,  # [B, 4H]: r, z, n, h_n
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of input, hx, weight_ih, weight_hh, bias_ih, bias_hh; empty where masked."""
    dtype = accumulation_dtype(input.dtype, hx.dtype)
    d_gates_x, d_gates_h, d_hx = formulas.gru_update_backward(*(t.to(dtype) for t in (grad_h, gates, hx)))
    d_gates_x, d_gates_h = d_gates_x.to(input.dtype), d_gates_h.to(input.dtype)
    grads = (
        lambda: d_gates_x @ weight_ih,
        lambda: (d_gates_h @ weight_hh).to(hx.dtype) + d_hx.to(hx.dtype),
        lambda: d_gates_x.t() @ input,
        lambda: d_gates_h.t() @ hx.to(input.dtype),
        lambda: d_gates_x.sum(0),
        lambda: d_gates_h.sum(0),
    )
    return where_needed(grads, output_mask, input)
