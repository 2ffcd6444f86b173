"""Sample calls of each op: opcheck runs them all, and the meta-test asks that no op lacks any."""

from __future__ import annotations

import torch

from fusednn.recurrence.reference import attention_lstm_forward
from tests.spatial.op_cases import normal, temperature

OPS = ("attention_lstm_forward", "attention_lstm_backward")


def op_cases(name: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Return arguments of the op `name` by case."""
    return globals()[f"_{name}"](dtype)


def _attention_lstm_forward(dtype: torch.dtype):
    cases = {}
    b, t, c, h, w, size, rows = 2, 3, 3, 2, 2, 4, 5
    features = normal(b, t, c, h, w, dtype=dtype)
    for cell, gates in (("lstm", 4), ("gru", 3)):
        for output, inputs in (("flatten", c * h * w), ("sum", c)):
            for form in ("hoisted", "direct"):
                states = (
                    normal(b, size, dtype=dtype),
                    normal(b, size, dtype=dtype) if cell == "lstm" else None,
                )
                j = gates * size
                cell_weights = (
                    normal(j, inputs, dtype=dtype), normal(j, size, dtype=dtype), normal(j, dtype=dtype),
                    normal(j, dtype=dtype),
                )  # fmt: skip
                positional = (
                    normal(1, c, dtype=dtype),
                    normal(h * w, size, dtype=dtype),
                    None,
                    None,
                    None,
                    0.5,
                )
                additive = (
                    normal(rows, c, dtype=dtype), normal(rows, size, dtype=dtype),
                    normal(rows, dtype=dtype), normal(1, rows, dtype=dtype), temperature(dtype), 1.0,
                )  # fmt: skip
                rest = (output, cell, form)
                text = f"{cell} {output} {form}"
                cases[f"{text} positional"] = (
                    features,
                    *states,
                    *positional,
                    *cell_weights,
                    None,
                    *rest,
                    True,
                )
                cases[f"{text} additive"] = (
                    features, *states, *additive, *cell_weights[:2], None, None, torch.tensor([3, 1]), *rest,
                    True,
                )  # fmt: skip
    cases["inference"] = (*cases["lstm flatten direct positional"][:-1], False)
    frames = (
        features.detach().flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (b, t))
    )
    cases["NHWC frames"] = (frames.requires_grad_(), *cases["lstm flatten direct positional"][1:])
    return cases


def _attention_lstm_backward(dtype: torch.dtype):
    cases = {}
    for case, args in _attention_lstm_forward(dtype).items():
        if case == "inference":
            continue
        with torch.no_grad():
            hidden, maps, h, c, gates, cells = attention_lstm_forward(*args)
        *operands, b_ih, b_hh, lengths, output, cell, form, _save = args
        grads = (hidden.cos(), maps.cos(), h.cos(), c.cos() if cell == "lstm" else None)
        tensors = (*operands[:8], *operands[9:], b_ih, b_hh)
        present = tuple(x is not None for x in tensors)
        saved = (hidden, maps, gates, cells)
        rest = (*operands, lengths, output, cell, form, *saved)
        cases[case] = (*grads, *rest, present)
        cases[f"{case} features"] = (grads[0], None, None, None, *rest, (True, *(False,) * 11))
    return cases
