"""Gates of the LSTM and the GRU cell: everything of a step but its two matrix products.

    LSTM  [i|f|g|o] = gates + b_ih + b_hh
          c' = sigmoid(f) c + sigmoid(i) tanh(g)      h' = sigmoid(o) tanh(c')
    GRU   r, z = sigmoid(x + b_ih + h + b_hh)
          n = tanh(x_n + b_in + r (h_n + b_hn))       h' = n + z (h - n)

Tiling: one program per [BLOCK_B, BLOCK_H] tile of the state, 512 elements on 4 warps.
Bytes moved per hidden unit, s = item size: LSTM forward 7 s, and 4 s to save the gates, backward 13 s; GRU
forward 8 s, and 4 s to save, backward 13 s. Arithmetic in float32 (float64 for float64), 64-bit offsets.
Limits: contiguous tensors; 16-byte accesses need H to be a multiple of 16, odd H goes element by element.

The launchers have the signatures of the C++ extension's functions of the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..core.activations import sigmoid, tanh
from ..core.arguments import constants
from ..core.checks import Check, Given, device_guard
from ..core.storage import load, store

TILE = 512
WIDEST_BLOCK_H = 256
# Fused multiply-adds are named because their default differs between versions of Triton.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


class Blocks(NamedTuple):
    """Rows and columns of a tile."""

    BLOCK_B: Any
    BLOCK_H: Any


@triton.jit
def _tile(batch, hidden, C: tl.constexpr):
    """Rows [BLOCK_B, 1], columns [1, BLOCK_H] and mask of this program's tile."""
    blocks = (hidden + C.BLOCK_H - 1) // C.BLOCK_H
    program = tl.program_id(0).to(tl.int64)
    rows = (program // blocks) * C.BLOCK_B + tl.arange(0, C.BLOCK_B)[:, None]
    columns = (program % blocks) * C.BLOCK_H + tl.arange(0, C.BLOCK_H)[None, :]
    return rows, columns, (rows < batch) & (columns < hidden)


@triton.jit
def _biased(x, bias, other_bias, k, hidden, columns):
    """Adds to x gate k's part of two biases, each of which may be None."""
    if bias is not None:
        x += load(bias + k * hidden, columns, columns < hidden)
    if other_bias is not None:
        x += load(other_bias + k * hidden, columns, columns < hidden)
    return x


@triton.jit(do_not_specialize=["batch"])
def lstm_forward_kernel(
    gates, bias_ih, bias_hh, cx, h, c, batch, hidden, SAVE_GATES: tl.constexpr, C: tl.constexpr
):
    """Gates [B, 4H] (overwritten by the activated ones if SAVE_GATES), cx, h, c [B, H]."""
    rows, columns, mask = _tile(batch, hidden, C)
    state = rows * hidden + columns
    gate_i = rows * 4 * hidden + columns
    gate_f, gate_g, gate_o = gate_i + hidden, gate_i + 2 * hidden, gate_i + 3 * hidden

    i = _biased(load(gates, gate_i, mask), bias_ih, bias_hh, 0, hidden, columns)
    f = _biased(load(gates, gate_f, mask), bias_ih, bias_hh, 1, hidden, columns)
    g = _biased(load(gates, gate_g, mask), bias_ih, bias_hh, 2, hidden, columns)
    o = _biased(load(gates, gate_o, mask), bias_ih, bias_hh, 3, hidden, columns)
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c_next = f * load(cx, state, mask) + i * g

    store(h, state, o * tanh(c_next), mask)
    store(c, state, c_next, mask)
    if SAVE_GATES:
        store(gates, gate_i, i, mask)
        store(gates, gate_f, f, mask)
        store(gates, gate_g, g, mask)
        store(gates, gate_o, o, mask)


@triton.jit(do_not_specialize=["batch"])
def lstm_backward_kernel(grad_h, grad_c, gates, cx, c, grad_gates, grad_cx, batch, hidden, C: tl.constexpr):
    """gates, grad_gates [B, 4H], the rest [B, H]; grad_h and grad_c may be None."""
    rows, columns, mask = _tile(batch, hidden, C)
    state = rows * hidden + columns
    gate_i = rows * 4 * hidden + columns
    gate_f, gate_g, gate_o = gate_i + hidden, gate_i + 2 * hidden, gate_i + 3 * hidden

    i, f = load(gates, gate_i, mask), load(gates, gate_f, mask)
    g, o = load(gates, gate_g, mask), load(gates, gate_o, mask)
    tanh_c = tanh(load(c, state, mask))
    d_h = tl.zeros_like(tanh_c)
    if grad_h is not None:
        d_h = load(grad_h, state, mask)
    d_c = d_h * o * (1.0 - tanh_c * tanh_c)
    if grad_c is not None:
        d_c += load(grad_c, state, mask)

    store(grad_gates, gate_i, d_c * g * i * (1.0 - i), mask)
    store(grad_gates, gate_f, d_c * load(cx, state, mask) * f * (1.0 - f), mask)
    store(grad_gates, gate_g, d_c * i * (1.0 - g * g), mask)
    store(grad_gates, gate_o, d_h * tanh_c * o * (1.0 - o), mask)
    store(grad_cx, state, d_c * f, mask)


@triton.jit(do_not_specialize=["batch"])
def gru_forward_kernel(gates_x, gates_h, bias_ih, bias_hh, hx, h, gates, batch, hidden, C: tl.constexpr):
    """gates_x, gates_h [B, 3H], hx, h [B, H], gates [B, 4H] saved as r, z, n, h_n or None."""
    rows, columns, mask = _tile(batch, hidden, C)
    state = rows * hidden + columns
    r_at = rows * 3 * hidden + columns
    z_at, n_at = r_at + hidden, r_at + 2 * hidden

    r = _biased(load(gates_x, r_at, mask), bias_ih, None, 0, hidden, columns)
    r += _biased(load(gates_h, r_at, mask), bias_hh, None, 0, hidden, columns)
    z = _biased(load(gates_x, z_at, mask), bias_ih, None, 1, hidden, columns)
    z += _biased(load(gates_h, z_at, mask), bias_hh, None, 1, hidden, columns)
    x_n = _biased(load(gates_x, n_at, mask), bias_ih, None, 2, hidden, columns)
    h_n = _biased(load(gates_h, n_at, mask), bias_hh, None, 2, hidden, columns)
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(x_n + r * h_n)

    store(h, state, n + z * (load(hx, state, mask) - n), mask)
    if gates is not None:
        saved = rows * 4 * hidden + columns
        store(gates, saved, r, mask)
        store(gates, saved + hidden, z, mask)
        store(gates, saved + 2 * hidden, n, mask)
        store(gates, saved + 3 * hidden, h_n, mask)


@triton.jit(do_not_specialize=["batch"])
def gru_backward_kernel(
    grad_h, gates, hx, grad_gates_x, grad_gates_h, grad_hx, batch, hidden, C: tl.constexpr
):
    """grad_h, hx, grad_hx [B, H], gates [B, 4H], grad_gates_x, grad_gates_h [B, 3H]."""
    rows, columns, mask = _tile(batch, hidden, C)
    state = rows * hidden + columns
    saved = rows * 4 * hidden + columns
    r_at = rows * 3 * hidden + columns
    z_at, n_at = r_at + hidden, r_at + 2 * hidden

    r, z = load(gates, saved, mask), load(gates, saved + hidden, mask)
    n, h_n = load(gates, saved + 2 * hidden, mask), load(gates, saved + 3 * hidden, mask)
    d_h = load(grad_h, state, mask)
    d_x_n = d_h * (1.0 - z) * (1.0 - n * n)
    d_r = d_x_n * h_n * r * (1.0 - r)
    d_z = d_h * (load(hx, state, mask) - n) * z * (1.0 - z)

    store(grad_gates_x, r_at, d_r, mask)
    store(grad_gates_x, z_at, d_z, mask)
    store(grad_gates_x, n_at, d_x_n, mask)
    store(grad_gates_h, r_at, d_r, mask)
    store(grad_gates_h, z_at, d_z, mask)
    store(grad_gates_h, n_at, d_x_n * r, mask)
    store(grad_hx, state, d_h * z, mask)


def _blocks(hidden: int) -> Blocks:
    """The tile for a hidden size; whole rows are put together when one is short."""
    block_h = min(triton.next_power_of_2(hidden), WIDEST_BLOCK_H)
    return Blocks(TILE // block_h, block_h)


@dataclass(frozen=True)
class _Step:
    """A call of one step: its tensors are [B, some multiple of H]."""

    check: Check
    batch: int
    hidden: int

    @classmethod
    def of(cls, op: str, name: str, like: Tensor, multiple: int) -> _Step:
        """Raises RuntimeError unless `like` is [B, multiple * H]."""
        check = Check.of(op, name, like, 2)
        if like.shape[1] % multiple:
            shape = list(like.shape)
            raise check.error(f"{name}: got shape {shape}, expected a multiple of {multiple} columns")
        return cls(check, like.shape[0], like.shape[1] // multiple)

    def rows(self, name: str, t: Given, multiple: int) -> Given:
        """`t`, contiguous, after checking that it is [B, multiple * H]."""
        return self.check.dense(name, t, [self.batch, multiple * self.hidden])

    def bias(self, name: str, t: Given, multiple: int) -> Given:
        """`t`, contiguous, after checking that it is [multiple * H]."""
        return self.check.dense(name, t, [multiple * self.hidden])

    def empty_rows(self, multiple: int) -> Tensor:
        """An uninitialised [B, multiple * H]."""
        return self.check.like.new_empty(self.batch, multiple * self.hidden)

    def launch(self, kernel: Any, *tensors: Tensor | None, **flags: bool) -> None:
        """Runs a kernel over all tiles of the state."""
        if self.batch == 0 or self.hidden == 0:
            return
        blocks = _blocks(self.hidden)
        rows, columns = triton.cdiv(self.batch, blocks.BLOCK_B), triton.cdiv(self.hidden, blocks.BLOCK_H)
        with device_guard(self.check.like):
            kernel[(rows * columns,)](
                *tensors, self.batch, self.hidden, **flags, C=constants(blocks), **OPTIONS
            )


def lstm_gates_forward(
    gates: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None, cx: Tensor, save_gates: bool
) -> tuple[Tensor, Tensor]:
    """One LSTM step from the sum of both products: h and c, each [B, H].

    `gates` [B, 4H], in the order i, f, g, o, is overwritten by the activated ones if `save_gates`. Raises
    RuntimeError if a shape, dtype or device differs from what it asks for, or if it is not contiguous.
    """
    a = _Step.of("lstm_gates_forward", "gates", gates, 4)
    if not gates.is_contiguous():
        raise RuntimeError(
            f"lstm_gates_forward: gates: got strides {list(gates.stride())}, expected a contiguous tensor, "
            "since it is overwritten"
        )
    bias_ih, bias_hh, cx = a.bias("bias_ih", bias_ih, 4), a.bias("bias_hh", bias_hh, 4), a.rows("cx", cx, 1)
    h, c = a.empty_rows(1), a.empty_rows(1)
    a.launch(lstm_forward_kernel, gates, bias_ih, bias_hh, cx, h, c, SAVE_GATES=save_gates)
    return h, c


def lstm_gates_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, gates: Tensor, cx: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of one LSTM step: grad_gates [B, 4H], before activation, and grad_cx [B, H].

    `gates` are as the forward leaves them, `cx` the state before the step, `c` that after it; a gradient that
    is None is zero.
    """
    a = _Step.of("lstm_gates_backward", "gates", gates, 4)
    gates, cx, c = a.rows("gates", gates, 4), a.rows("cx", cx, 1), a.rows("c", c, 1)
    grad_h, grad_c = a.rows("grad_h", grad_h, 1), a.rows("grad_c", grad_c, 1)
    grad_gates, grad_cx = a.empty_rows(4), a.empty_rows(1)
    a.launch(lstm_backward_kernel, grad_h, grad_c, gates, cx, c, grad_gates, grad_cx)
    return grad_gates, grad_cx


def gru_gates_forward(
    gates_x: Tensor, gates_h: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None, hx: Tensor,
    save_gates: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One GRU step from its two products [B, 3H], in the order r, z, n: h [B, H] and the saved gates.

    Those are r, z, n, h_n as [B, 4H], or empty unless `save_gates`.
    """
    a = _Step.of("gru_gates_forward", "gates_x", gates_x, 3)
    gates_x, gates_h = a.rows("gates_x", gates_x, 3), a.rows("gates_h", gates_h, 3)
    bias_ih, bias_hh, hx = a.bias("bias_ih", bias_ih, 3), a.bias("bias_hh", bias_hh, 3), a.rows("hx", hx, 1)
    h = a.empty_rows(1)
    saved = a.empty_rows(4) if save_gates else None
    a.launch(gru_forward_kernel, gates_x, gates_h, bias_ih, bias_hh, hx, h, saved)
    return h, h.new_empty(0) if saved is None else saved


def gru_gates_backward(grad_h: Tensor, gates: Tensor, hx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one GRU step: grad_gates_x and grad_gates_h [B, 3H], and the direct term of grad_hx.

    To that [B, H] the caller adds grad_gates_h @ weight_hh.
    """
    a = _Step.of("gru_gates_backward", "gates", gates, 4)
    gates, grad_h, hx = a.rows("gates", gates, 4), a.rows("grad_h", grad_h, 1), a.rows("hx", hx, 1)
    grad_x, grad_recurrent, grad_hx = a.empty_rows(3), a.empty_rows(3), a.empty_rows(1)
    a.launch(gru_backward_kernel, grad_h, gates, hx, grad_x, grad_recurrent, grad_hx)
    return grad_x, grad_recurrent, grad_hx
