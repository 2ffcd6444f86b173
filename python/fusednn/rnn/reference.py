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
    i, f, g, o = products.to(dtype).chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * cx.to(dtype) + i * g
    h = o * c.tanh()
    gates = torch.cat((i, f, g, o), dim=1).to(input.dtype) if save_gates else input.new_empty(0)
    return h.to(state), c.to(state), gates


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
    i, f, g, o = gates.to(dtype).chunk(4, dim=1)
    tanh_c = c.to(dtype).tanh()
    zero = torch.zeros_like(tanh_c)
    d_h = zero if grad_h is None else grad_h.to(dtype)
    d_c = (zero if grad_c is None else grad_c.to(dtype)) + d_h * o * (1 - tanh_c * tanh_c)
    d_gates = torch.cat(
        (
            d_c * g * i * (1 - i),
            d_c * cx.to(dtype) * f * (1 - f),
            d_c * i * (1 - g * g),
            d_h * tanh_c * o * (1 - o),
        ),
        dim=1,
    ).to(input.dtype)
    grads = (
        lambda: d_gates @ weight_ih,
        lambda: (d_gates @ weight_hh).to(hx.dtype),
        lambda: (d_c * f).to(cx.dtype),
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
    x_r, x_z, x_n = F.linear(input, weight_ih, bias_ih).to(dtype).chunk(3, dim=1)
    h_r, h_z, h_n = F.linear(hx.to(input.dtype), weight_hh, bias_hh).to(dtype).chunk(3, dim=1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    h = n + z * (hx.to(dtype) - n)
    gates = torch.cat((r, z, n, h_n), dim=1).to(input.dtype) if save_gates else input.new_empty(0)
    return h.to(state), gates


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
    r, z, n, h_n = gates.to(dtype).chunk(4, dim=1)
    d_h = grad_h.to(dtype)
    d_n = d_h * (1 - z) * (1 - n * n)
    d_z = d_h * (hx.to(dtype) - n) * z * (1 - z)
    d_r = d_n * h_n * r * (1 - r)
    d_gates_x = torch.cat((d_r, d_z, d_n), dim=1).to(input.dtype)
    d_gates_h = torch.cat((d_r, d_z, d_n * r), dim=1).to(input.dtype)
    grads = (
        lambda: d_gates_x @ weight_ih,
        lambda: (d_gates_h @ weight_hh).to(hx.dtype) + (d_h * z).to(hx.dtype),
        lambda: d_gates_x.t() @ input,
        lambda: d_gates_h.t() @ hx.to(input.dtype),
        lambda: d_gates_x.sum(0),
        lambda: d_gates_h.sum(0),
    )
    return where_needed(grads, output_mask, input)
