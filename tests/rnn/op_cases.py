"""Sample calls of each op: opcheck runs them all, and the meta-test asks that no op lacks any."""

from __future__ import annotations

import torch

from fusednn.rnn import reference

from .cells import workload

OPS = ("lstm_cell_forward", "lstm_cell_backward", "gru_cell_forward", "gru_cell_backward")


def op_cases(name: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Return arguments of the op `name` by case."""
    cell, _, direction = name.split("_")
    return (_forward_cases if direction == "forward" else _backward_cases)(cell, dtype)


def _forward_cases(cell: str, dtype: torch.dtype) -> dict[str, tuple]:
    cases = {}
    for batch in (0, 1, 9):
        for bias in (True, False):
            values = tuple(workload(cell, batch, 3, 5, dtype, bias=bias).tensors.values())
            for save_gates in (True, False):
                cases[f"B={batch} bias={bias} save_gates={save_gates}"] = (*values, save_gates)
            grad = tuple(None if t is None else t.detach().requires_grad_() for t in values)
            cases[f"B={batch} bias={bias} trained"] = (*grad, True)
    return cases


def _backward_cases(cell: str, dtype: torch.dtype) -> dict[str, tuple]:
    cases = {}
    for batch in (0, 1, 9):
        work = workload(cell, batch, 3, 5, dtype)
        values = tuple(work.tensors.values())
        operands = values[:-2]
        for mask in ([True] * 6, [True, False, True, False, True, False], [False] * 6):
            if cell == "lstm":
                _, c, gates = reference.lstm_cell_forward(*values, save_gates=True)
                cases[f"B={batch} mask={mask}"] = (*work.grads, *operands, c, gates, mask)
                cases[f"B={batch} mask={mask} only c"] = (None, work.grads[1], *operands, c, gates, mask)
            else:
                _, gates = reference.gru_cell_forward(*values, save_gates=True)
                cases[f"B={batch} mask={mask}"] = (*work.grads, *operands, gates, mask)
    return cases
