"""torch.ops.fusednn.{lstm,gru}_cell_{forward,backward}, declared.

A forward returns its activated gates beside the results, for the backward alone, and empty unless
``save_gates``. On devices the kernels are those of the gates, and torch's matrix products stand around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.backends import Backend, cpu, cuda, triton
from ..core.dispatch import Reasons
from ..core.gradients import Gradients
from ..core.op import Op
from ..core.tensors import HALVES, empty_gradients, where_needed
from . import reference


def _against_states(call: Any) -> Reasons:
    states = (call.hx, getattr(call, "cx", call.hx))
    if {s.dtype for s in states} == {call.input.dtype}:
        return []
    return [f"got a state of {states[-1].dtype} beside input of {call.input.dtype}"]


def _against_wide_states(call: Any) -> Reasons:
    """A state may be float32 beside 16 bits, as under autocast."""
    states = {call.hx.dtype, getattr(call, "cx", call.hx).dtype}
    return [] if call.input.dtype in HALVES and states == {torch.float32} else _against_states(call)


def _backends(gates: str, run: Callable[[Any, Any], Any]) -> tuple[Backend, ...]:
    devices = {"run": run, "kernel": gates, "limits": _against_states}
    return cpu(limits=_against_wide_states), cuda(**devices), triton(**devices)


def _state(call: Any, previous: Tensor) -> Tensor:
    return previous.new_empty(call.hx.shape, dtype=torch.promote_types(call.input.dtype, previous.dtype))


def _product(input: Sequence[int], weight: Sequence[int]) -> int:
    """Flops of a product of these shapes, ``[B, K]`` times ``[N, K]`` transposed, or of either gradient."""
    return 2 * input[0] * weight[0] * weight[1]


def _flops(call: Any) -> int:
    return _product(call.input, call.weight_ih) + _product(call.hx, call.weight_hh)


def _backward_flops(call: Any) -> int:
    first = 3 if hasattr(call, "cx") else 2  # the weights' gradients follow the states'
    d_input, d_hx = call.output_mask[:2]
    d_weight_ih, d_weight_hh = call.output_mask[first : first + 2]
    inputs, states = _product(call.input, call.weight_ih), _product(call.hx, call.weight_hh)
    return (d_input + d_weight_ih) * inputs + (d_hx + d_weight_hh) * states


def _lstm_forward(kernels: Any, call: Any) -> tuple[Tensor, ...]:
    gates = torch.mm(call.input, call.weight_ih.t())  # [B, 4H]
    gates.addmm_(call.hx, call.weight_hh.t())
    h, c = kernels.lstm_gates_forward(gates, call.bias_ih, call.bias_hh, call.cx, call.save_gates)
    return h, c, gates if call.save_gates else call.input.new_empty(0)


def _lstm_backward(kernels: Any, call: Any) -> tuple[Tensor, ...]:
    d_gates, d_cx = kernels.lstm_gates_backward(call.grad_h, call.grad_c, call.gates, call.cx, call.c)
    grads = (
        lambda: d_gates @ call.weight_ih,
        lambda: d_gates @ call.weight_hh,
        lambda: d_cx,
        lambda: d_gates.t() @ call.input,
        lambda: d_gates.t() @ call.hx,
        lambda: d_gates.sum(0),
    )
    return where_needed(grads, call.output_mask, call.input)


def _gru_forward(kernels: Any, call: Any) -> tuple[Tensor, ...]:
    gates_x = torch.mm(call.input, call.weight_ih.t())  # [B, 3H]
    gates_h = torch.mm(call.hx, call.weight_hh.t())  # [B, 3H]
    return kernels.gru_gates_forward(gates_x, gates_h, call.bias_ih, call.bias_hh, call.hx, call.save_gates)


def _gru_backward(kernels: Any, call: Any) -> tuple[Tensor, ...]:
    d_gates_x, d_gates_h, d_hx = kernels.gru_gates_backward(call.grad_h, call.gates, call.hx)
    grads = (
        lambda: d_gates_x @ call.weight_ih,
        lambda: (d_gates_h @ call.weight_hh).add_(d_hx),  # addmm rounds worse on a CPU
        lambda: d_gates_x.t() @ call.input,
        lambda: d_gates_h.t() @ call.hx,
        lambda: d_gates_x.sum(0),
        lambda: d_gates_h.sum(0),
    )
    return where_needed(grads, call.output_mask, call.input)


def _fake_lstm_forward(call: Any) -> tuple[Tensor, ...]:
    sizes = (call.input.shape[0], call.weight_hh.shape[0]) if call.save_gates else (0,)
    return _state(call, call.cx), _state(call, call.cx), call.input.new_empty(sizes)


def _fake_lstm_backward(call: Any) -> tuple[Tensor, ...]:
    bias = call.weight_hh.new_empty(call.weight_hh.shape[0])
    tensors = (call.input, call.hx, call.cx, call.weight_ih, call.weight_hh, bias)
    return empty_gradients(tensors, call.output_mask, torch.contiguous_format)


def _fake_gru_forward(call: Any) -> tuple[Tensor, ...]:
    sizes = (call.input.shape[0], 4 * call.hx.shape[1]) if call.save_gates else (0,)
    return _state(call, call.hx), call.input.new_empty(sizes)


def _fake_gru_backward(call: Any) -> tuple[Tensor, ...]:
    bias = call.weight_hh.new_empty(call.weight_hh.shape[0])
    tensors = (call.input, call.hx, call.weight_ih, call.weight_hh, bias, bias)
    return empty_gradients(tensors, call.output_mask, torch.contiguous_format)


lstm_cell_backward = Op(
    reference.lstm_cell_backward,
    ("grad_input", "grad_hx", "grad_cx", "grad_weight_ih", "grad_weight_hh", "grad_bias"),
    fake=_fake_lstm_backward,
    backends=_backends("lstm_gates_backward", _lstm_backward),
    flops=_backward_flops,
)
lstm_cell_forward = Op(
    reference.lstm_cell_forward,
    ("h", "c", "gates"),
    fake=_fake_lstm_forward,
    backends=_backends("lstm_gates_forward", _lstm_forward),
    flops=_flops,
    gradients=Gradients(
        lstm_cell_backward,
        shared={"bias_ih": "bias", "bias_hh": "bias"},
        copied=("c",),
        saved_if="save_gates",
    ),
)
gru_cell_backward = Op(
    reference.gru_cell_backward,
    ("grad_input", "grad_hx", "grad_weight_ih", "grad_weight_hh", "grad_bias_ih", "grad_bias_hh"),
    fake=_fake_gru_backward,
    backends=_backends("gru_gates_backward", _gru_backward),
    like="input",
    flops=_backward_flops,
)
gru_cell_forward = Op(
    reference.gru_cell_forward,
    ("h", "gates"),
    fake=_fake_gru_forward,
    backends=_backends("gru_gates_forward", _gru_forward),
    flops=_flops,
    gradients=Gradients(gru_cell_backward, saved_if="save_gates"),
)
