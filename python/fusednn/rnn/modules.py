"""``nn.LSTMCell`` and ``nn.GRUCell`` on fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functional

torch.fx.wrap("_lstm_step")
torch.fx.wrap("_gru_step")


def _lstm_step(input, hx, hidden_size, weight_ih, weight_hh, bias_ih, bias_hh):
    """What ``LSTMCell`` does; one node for torch.fx, which can't follow the checks."""
    if input.dim() not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
    if hx is None:
        zeros = torch.zeros(input.size(0), hidden_size, dtype=input.dtype, device=input.device)
        hx = (zeros, zeros)
    elif not isinstance(hx, Tensor):
        for index, value in enumerate(hx):
            if value.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {value.dim()}D instead")
        if not batched:
            hx = tuple(value.unsqueeze(0) for value in hx)
    h, c = functional.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


def _gru_step(input, hx, hidden_size, weight_ih, weight_hh, bias_ih, bias_hh):
    """What ``GRUCell`` does; one node for torch.fx, which can't follow the checks."""
    if input.dim() not in (1, 2):
        raise ValueError(f"GRUCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is not None and hx.dim() not in (1, 2):
        raise ValueError(f"GRUCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
    if hx is None:
        hx = torch.zeros(input.size(0), hidden_size, dtype=input.dtype, device=input.device)
    elif not batched:
        hx = hx.unsqueeze(0)
    h = functional.gru_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    return h if batched else h.squeeze(0)


class LSTMCell(nn.LSTMCell):
    r"""A drop-in for :class:`torch.nn.LSTMCell`: same constructor, ``state_dict``, results and errors.

    Shapes:
        input ``[B, input_size]`` or ``[input_size]``; ``h``, ``c`` ``[B, hidden_size]`` or ``[hidden_size]``,
        zeros if ``hx`` is None; returns ``(h', c')`` of the state's shape.

    Dtypes:
        float32, float64; bfloat16 and float16 with float32 accumulation and gate arithmetic.

    Raises:
        ValueError: an input has the wrong rank.
        RuntimeError: a size, dtype or device does not fit; the text names the argument.
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the next ``(h, c)``."""
        parameters = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return _lstm_step(input, hx, self.hidden_size, *parameters)


class GRUCell(nn.GRUCell):
    r"""A drop-in for :class:`torch.nn.GRUCell`: same constructor, ``state_dict``, results and errors.

    Shapes:
        input ``[B, input_size]`` or ``[input_size]``; ``h`` ``[B, hidden_size]`` or ``[hidden_size]``, zeros
        if ``hx`` is None; returns ``h'`` of the state's shape.

    Dtypes:
        float32, float64; bfloat16 and float16 with float32 accumulation and gate arithmetic.

    Raises:
        ValueError: an input has the wrong rank.
        RuntimeError: a size, dtype or device does not fit; the text names the argument.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return the next ``h``."""
        parameters = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return _gru_step(input, hx, self.hidden_size, *parameters)
