"""The cells on each backend, and when a backend can't serve: the family's rows of the dispatch table."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..core import native
from ..core.dispatch import Implementation, Operation, Reasons
from . import reference

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)


def _against_dtypes(input: Tensor, *states: Tensor, wide_state: bool) -> Reasons:
    if input.dtype not in _FLOATS:
        return [f"got input of {input.dtype}, expected float32, float64, bfloat16 or float16"]
    allowed = (input.dtype, torch.float32) if wide_state and input.dtype in _HALVES else (input.dtype,)
    for state in states:
        if state.dtype not in allowed or state.dtype != states[0].dtype:
            return [f"got a state of {state.dtype} beside input of {input.dtype}"]
    return []


def _against_cpu(input: Tensor, *states: Tensor) -> Reasons:
    if native.extension is None:
        return [native.unavailable_reason or "no extension"]
    if input.device.type != "cpu":
        return [f"got tensors on {input.device}, expected cpu"]
    return _against_dtypes(input, *states, wide_state=True)


def _against_cuda(input: Tensor, *states: Tensor) -> Reasons:
    if input.device.type not in native.cuda_modules:
        if not native.cuda_modules:
            return ["this build has no CUDA kernels"]
        return [f"got tensors on {input.device}, expected cuda"]
    return _against_dtypes(input, *states, wide_state=False)


def _against_triton(input: Tensor, *states: Tensor) -> Reasons:
    try:
        support = importlib.import_module("fusednn.triton_kernels")
    except ImportError as error:
        return [f"the Triton kernels are not installed: {error}"]
    return support.not_supported_reasons(input.device, input.dtype) or _against_dtypes(
        input, *states, wide_state=False
    )


class _Products:
    """The cells as torch's matrix products around a module of gate kernels."""

    def __init__(self, kernels: Callable[[Tensor], ModuleType]) -> None:
        self._kernels = kernels

    def lstm_cell_forward(self, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, save_gates):
        gates = torch.mm(input, weight_ih.t())  # [B, 4H]
        gates.addmm_(hx, weight_hh.t())
        h, c = self._kernels(input).lstm_gates_forward(gates, bias_ih, bias_hh, cx, save_gates)
        return h, c, gates if save_gates else input.new_empty(0)

    def lstm_cell_backward(
        self, grad_h, grad_c, input, hx, cx, weight_ih, weight_hh, c, gates, output_mask: Sequence[bool]
    ):
        d_gates, d_cx = self._kernels(input).lstm_gates_backward(grad_h, grad_c, gates, cx, c)
        grads = (
            lambda: d_gates @ weight_ih,
            lambda: d_gates @ weight_hh,
            lambda: d_cx,
            lambda: d_gates.t() @ input,
            lambda: d_gates.t() @ hx,
            lambda: d_gates.sum(0),
        )
        return reference.where_needed(grads, output_mask, input)

    def gru_cell_forward(self, input, hx, weight_ih, weight_hh, bias_ih, bias_hh, save_gates):
        gates_x = torch.mm(input, weight_ih.t())  # [B, 3H]
        gates_h = torch.mm(hx, weight_hh.t())  # [B, 3H]
        return self._kernels(input).gru_gates_forward(gates_x, gates_h, bias_ih, bias_hh, hx, save_gates)

    def gru_cell_backward(self, grad_h, input, hx, weight_ih, weight_hh, gates, output_mask: Sequence[bool]):
        d_gates_x, d_gates_h, d_hx = self._kernels(input).gru_gates_backward(grad_h, gates, hx)
        grads = (
            lambda: d_gates_x @ weight_ih,
            lambda: (d_gates_h @ weight_hh).add_(d_hx),  # addmm rounds worse on a CPU
            lambda: d_gates_x.t() @ input,
            lambda: d_gates_h.t() @ hx,
            lambda: d_gates_x.sum(0),
            lambda: d_gates_h.sum(0),
        )
        return reference.where_needed(grads, output_mask, input)


_cuda = _Products(lambda input: native.cuda_modules[input.device.type])
_triton_products = _Products(lambda _input: importlib.import_module("fusednn.triton_kernels.rnn"))


def _operation(name: str, states: Callable[..., tuple[Tensor, ...]]) -> Operation:
    """Make the operation `name`; `states` picks input and states out of its arguments for the predicates."""

    def cpu(*args):
        return getattr(native.extension.cpu, name)(*args)

    return Operation(
        name,
        (
            Implementation("cpu", cpu, lambda *args: _against_cpu(*states(*args))),
            Implementation("cuda", getattr(_cuda, name), lambda *args: _against_cuda(*states(*args))),
            Implementation(
                "triton", getattr(_triton_products, name), lambda *args: _against_triton(*states(*args))
            ),
            Implementation("reference", getattr(reference, name)),
        ),
    )


lstm_cell_forward = _operation("lstm_cell_forward", lambda input, hx, cx, *_: (input, hx, cx))
lstm_cell_backward = _operation(
    "lstm_cell_backward", lambda grad_h, grad_c, input, hx, cx, *_: (input, hx, cx)
)
gru_cell_forward = _operation("gru_cell_forward", lambda input, hx, *_: (input, hx))
gru_cell_backward = _operation("gru_cell_backward", lambda grad_h, input, hx, *_: (input, hx))
