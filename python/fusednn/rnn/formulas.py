"""What a cell does between its products, in plain PyTorch: differentiable, in the arguments' dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def lstm_update(products: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return h', c' [B, H] and the activated i, f, g, o [B, 4H] from the sum of both products, [B, 4H]."""
    i, f, g, o = products.chunk(4, dim=1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, torch.cat((i, f, g, o), dim=1)


def lstm_update_backward(
    d_h: Tensor, d_c: Tensor, gates: Tensor, c: Tensor, c_next: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the products' sum [B, 4H] and of c [B, H]."""
    i, f, g, o = gates.chunk(4, dim=1)
    tanh_c = c_next.tanh()
    d_c = d_c + d_h * o * (1 - tanh_c * tanh_c)
    d_gates = (
        d_c * g * i * (1 - i),
        d_c * c * f * (1 - f),
        d_c * i * (1 - g * g),
        d_h * tanh_c * o * (1 - o),
    )
    return torch.cat(d_gates, dim=1), d_c * f


def gru_update(x: Tensor, r: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return h' [B, H] and r, z, n, h_n [B, 4H] from both products with their biases."""
    x_r, x_z, x_n = x.chunk(3, dim=1)
    h_r, h_z, h_n = r.chunk(3, dim=1)
    reset, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + reset * h_n).tanh()
    return n + z * (h - n), torch.cat((reset, z, n, h_n), dim=1)


def gru_update_backward(d_h: Tensor, gates: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of both products [B, 3H], and what of h's gradient passes neither."""
    reset, z, n, h_n = gates.chunk(4, dim=1)
    d_n = d_h * (1 - z) * (1 - n * n)
    d_z = d_h * (h - n) * z * (1 - z)
    d_reset = d_n * h_n * reset * (1 - reset)
    return torch.cat((d_reset, d_z, d_n), dim=1), torch.cat((d_reset, d_z, d_n * reset), dim=1), d_h * z
