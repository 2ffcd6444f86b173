"""One step of ``nn.LSTMCell`` and ``nn.GRUCell``.

B = batch, I = input, H = hidden, G = gates (LSTM 4, GRU 3), S = states (LSTM h and c: 2, GRU h: 1).

flops, matrix products only, a multiply-add being two:
    forward    2 B G H (I + H)
    training   3 x forward: the product itself, its gradient to the inputs, its gradient to the weights

bytes, each tensor that a pass reads or writes counted once, e bytes an element:
    P = G H (I + H) + 2 G H        parameters
    A = B I + S B H                inputs
    O = S B H                      outputs
    forward    e (P + A + O)
    training   forward, 4 e B H saved and read again (LSTM i f g o, GRU r z n h_n), and
               e (P - 2 G H + A) read in the backward, e (P + A) gradients written;
               LSTM also reads its c' again: e B H
(The gradient of a sum is one number, expanded: no traffic.)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.registry import Case, Mode
from benchmarks.workload import ModuleWorkload, seeded_generator

Cell = Literal["lstm", "gru"]

GATES = {"lstm": 4, "gru": 3}
STATES = {"lstm": 2, "gru": 1}
SAVED = 4

SHAPES = [(1, 8, 8), (1, 128, 128), (32, 128, 128), (32, 512, 512), (4, 12800, 128)]
QUICK = [(1, 128, 128), (32, 128, 128)]


def cell_flops(cell: Cell, mode: Mode, batch: int, inputs: int, hidden: int) -> int:
    """Flops of one step; the module's text has the formula."""
    forward = 2 * batch * GATES[cell] * hidden * (inputs + hidden)
    return forward if mode == "inference" else 3 * forward


def cell_bytes(cell: Cell, mode: Mode, batch: int, inputs: int, hidden: int, itemsize: int = 4) -> int:
    """Bytes of one step; the module's text has the formula."""
    weights = GATES[cell] * hidden * (inputs + hidden)
    parameters = weights + 2 * GATES[cell] * hidden
    arguments = batch * inputs + STATES[cell] * batch * hidden
    state = batch * hidden
    elements = parameters + arguments + STATES[cell] * state
    if mode == "training":
        saved = SAVED * state
        read_again = weights + arguments + saved + (state if cell == "lstm" else 0)
        elements += saved + read_again + parameters + arguments
    return itemsize * elements


def _arrange_lstm(inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return inputs["x"], (inputs["h"], inputs["c"])


def _arrange_gru(inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return inputs["x"], inputs["h"]


def build_cell(case: Case, device: torch.device) -> ModuleWorkload:
    """Build the workload of a cell case: weights as ``torch.nn`` draws them, normal inputs and states."""
    cell = case.name.split("_")[0]
    batch, width, hidden = (case.shape[name] for name in ("B", "I", "H"))
    draw = seeded_generator(f"{cell} {batch} {width} {hidden}")
    sizes = {"x": width, "h": hidden, "c": hidden} if cell == "lstm" else {"x": width, "h": hidden}
    inputs = {
        name: torch.randn(batch, size, generator=draw, dtype=case.torch_dtype) for name, size in sizes.items()
    }
    module = (nn.LSTMCell if cell == "lstm" else nn.GRUCell)(width, hidden, dtype=case.torch_dtype)
    bound = hidden**-0.5
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-bound, bound, generator=draw)

    def fused(fusednn: ModuleType) -> nn.Module:
        return (fusednn.LSTMCell if cell == "lstm" else fusednn.GRUCell)(width, hidden)

    return ModuleWorkload(
        case,
        device,
        module=module,
        fused=fused,
        inputs=inputs,
        arrange=_arrange_lstm if cell == "lstm" else _arrange_gru,
        output_names=("h'", "c'") if cell == "lstm" else ("h'",),
    )


def _cell_case(cell: Cell, mode: Mode, shape: tuple[int, int, int]) -> Case:
    batch, inputs, hidden = shape
    return Case(
        name=f"{cell}_cell-b{batch}-i{inputs}-h{hidden}-{mode}",
        family="rnn",
        mode=mode,
        shape={"B": batch, "I": inputs, "H": hidden},
        dtype="float32",
        flops=cell_flops(cell, mode, *shape),
        bytes=cell_bytes(cell, mode, *shape),
        build=build_cell,
        quick=shape in QUICK,
    )


_MODES: tuple[Mode, ...] = ("inference", "training")
_CELLS: tuple[Cell, ...] = ("lstm", "gru")
CASES = [_cell_case(cell, mode, shape) for mode in _MODES for cell in _CELLS for shape in SHAPES]
