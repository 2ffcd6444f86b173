"""LSTM and GRU cells as functions: check, then call the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..core import eager, native
from ..core.checks import check_floating, check_same_kind, check_tensor
from ..core.transforms import autocast_enabled, may_need_backward
from . import ops


@eager.composite("lstm_cell")
def lstm_cell_composite(*tensors: Any) -> tuple[Tensor, ...]:
    """Return h' and c', given the cell's seven tensors."""
    return ops.lstm_cell_forward.reference(*tensors, False)[:2]


@eager.composite("gru_cell")
def gru_cell_composite(*tensors: Any) -> tuple[Tensor, ...]:
    """Return h', given the cell's six tensors, as a tuple."""
    return ops.gru_cell_forward.reference(*tensors, False)[:1]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step, as ``torch.lstm_cell``.

    ``i, f, o = sigmoid(.)``, ``g = tanh(.)`` of
    ``input @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh``; ``c' = f c + i g``; ``h' = o tanh(c')``
    (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

    Args:
        input: ``[B, I]``, floating point.
        hx: the pair ``(h, c)``, each ``[B, H]``.
        weight_ih: ``[4H, I]``, rows in the order i, f, g, o.
        weight_hh: ``[4H, H]``.
        bias_ih: ``[4H]`` or None.
        bias_hh: ``[4H]`` or None.

    Returns:
        ``(h', c')``, each ``[B, H]``, of the state's dtype.

    Raises:
        ValueError: the rank of input or of a weight is wrong.
        RuntimeError: a size, a state's rank, dtype or device does not fit; the text names the argument.
        TypeError: an argument is no tensor, or ``hx`` no pair.
    """
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    tensors = (input, *(hx if isinstance(hx, (tuple, list)) else (hx,)), *parameters)
    if has_torch_function(tensors):
        return handle_torch_function(lstm_cell, tensors, input, hx, *parameters)
    if len(tensors) == 7 and type(hx) is tuple and eager.applies(*tensors):
        found = native.extension.cpu.try_lstm_cell(*tensors)
        if found is not None:
            return found
    if isinstance(hx, Tensor) or not isinstance(hx, (tuple, list)):
        raise TypeError(
            f"lstm_cell: expected hx to be a tuple of two tensors (h, c), got {type(hx).__name__}"
        )
    if len(hx) != 2:
        raise RuntimeError(f"lstm_cell expects two hidden states: got {len(hx)}, expected (h, c)")
    h, c = hx
    states = (("hidden0", h), ("hidden1", c))
    _check("lstm_cell", 4, input, states, *parameters)
    if autocast_enabled(input.device):
        input, (h, c), *parameters = _autocast(input, (h, c), *parameters)
    save_gates = may_need_backward(input, h, c, *parameters)
    h, c, _ = ops.lstm_cell_forward(input, h, c, *parameters, save_gates)
    return h, c


def gru_cell(
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    """One GRU step, as ``torch.gru_cell``.

    ``r, z = sigmoid(.)`` of the two products' sum; ``n = tanh(x_n + r h_n)``; ``h' = n + z (h - n)``, where
    ``h_n`` is the hidden product with its bias (Cho et al. 2014, in cuDNN's form).

    Args:
        input: ``[B, I]``, floating point.
        hx: the state ``[B, H]``.
        weight_ih: ``[3H, I]``, rows in the order r, z, n.
        weight_hh: ``[3H, H]``.
        bias_ih: ``[3H]`` or None.
        bias_hh: ``[3H]`` or None.

    Returns:
        ``h'``, ``[B, H]``, of the state's dtype.

    Raises:
        ValueError: the rank of input or of a weight is wrong.
        RuntimeError: a size, a state's rank, dtype or device does not fit; the text names the argument.
        TypeError: an argument is no tensor.
    """
    tensors = (input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    if has_torch_function(tensors):
        return handle_torch_function(gru_cell, tensors, *tensors)
    if eager.applies(*tensors):
        found = native.extension.cpu.try_gru_cell(*tensors)
        if found is not None:
            return found
    parameters = (weight_ih, weight_hh, bias_ih, bias_hh)
    _check("gru_cell", 3, input, (("hidden0", hx),), *parameters)
    if autocast_enabled(input.device):
        input, (hx,), *parameters = _autocast(input, (hx,), *parameters)
    save_gates = may_need_backward(input, hx, *parameters)
    return ops.gru_cell_forward(input, hx, *parameters, save_gates)[0]


def _check(
    name: str,
    gates: int,
    input: Tensor,
    states: tuple[tuple[str, Tensor], ...],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> None:
    """Check what every cell shares. The texts on sizes are torch's own."""
    tensors = (("input", input), *states, ("weight_ih", weight_ih), ("weight_hh", weight_hh))
    for argument, tensor in tensors:
        check_tensor(name, argument, tensor)
        if tensor.dim() != 2:
            error = RuntimeError if argument.startswith("hidden") else ValueError  # as torch's own cells
            raise error(f"{name}: Expected {argument} to be 2D, got {tensor.dim()}D instead")
    batch, input_size = input.shape
    rows, hidden = weight_hh.shape
    if rows != gates * hidden:
        raise RuntimeError(
            f"{name}: weight_hh first dim must be {gates} * hidden_size = {gates * hidden}, but got {rows}"
        )
    if weight_ih.shape[0] != rows:
        raise RuntimeError(
            f"{name}: weight_ih first dim must be {gates} * hidden_size = {rows}, "
            f"but got {weight_ih.shape[0]}"
        )
    if input_size != weight_ih.shape[1]:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input_size} expected {weight_ih.shape[1]}"
        )
    for argument, state in states:
        if state.shape[0] != batch:
            raise RuntimeError(
                f"Input batch size {batch} doesn't match {argument} batch size {state.shape[0]}"
            )
        if state.shape[1] != hidden:
            raise RuntimeError(
                f"{argument} has inconsistent hidden_size: got {state.shape[1]}, expected {hidden}"
            )
    biases = (("bias_ih", bias_ih), ("bias_hh", bias_hh))
    for argument, bias in biases:
        check_tensor(name, argument, bias, optional=True)
        if bias is not None and bias.shape != (rows,):
            raise RuntimeError(f"{name}: {argument} has shape {list(bias.shape)}, expected [{rows}]")
    check_floating(name, "input", input)
    cast = autocast_enabled(input.device)
    others = (*states, *tensors[-2:], *biases)
    check_same_kind(
        name, "input", input, others, cast, may_differ=("hidden1",)
    )  # the cell state may be wider


def _autocast(input, states, *parameters):
    """Cast as torch.autocast does for its own cells: a CPU state keeps its dtype, a GPU one is cast."""
    dtype = torch.get_autocast_dtype(input.device.type)
    eligible = input.dtype != torch.float64
    if not eligible:
        return (input, states, *parameters)
    if input.device.type == "cpu":
        wide = torch.promote_types(dtype, states[-1].dtype)
        states = tuple(s.to(wide) for s in states)
    else:
        states = tuple(s.to(dtype) for s in states)
    cast = (None if p is None else p.to(dtype) for p in parameters)
    return (input.to(dtype), states, *cast)
