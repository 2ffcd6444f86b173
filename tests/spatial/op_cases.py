"""Sample calls of each op: opcheck runs them all, and the meta-test asks that no op lacks any."""

from __future__ import annotations

import torch
from torch import Tensor

from fusednn.recurrence.reference import attention_lstm_forward
from fusednn.spatial import reference

OPS = (
    "spatial_softmax_forward",
    "spatial_softmax_backward",
    "spatial_attention_forward",
    "spatial_attention_backward",
    "attention_lstm_forward",
    "attention_lstm_backward",
)
OUTPUTS = reference.OUTPUTS


def op_cases(name: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Return arguments of the op `name` by case."""
    return globals()[f"_{name}"](dtype)


def _normal(*size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size) + len(size))
    return torch.randn(size, generator=generator).to(dtype).requires_grad_()


def _temperature(dtype: torch.dtype) -> Tensor:
    return torch.tensor(0.7, dtype=dtype).requires_grad_()


def _half(*size: int) -> Tensor:
    return torch.arange(size[-1]).remainder(2).eq(0).expand(size)


def _spatial_softmax_forward(dtype: torch.dtype):
    cases = {}
    for n in (0, 2):
        logits = _normal(n, 3, 2, 4, dtype=dtype)
        t = _normal(dtype=dtype).detach().exp().requires_grad_()
        cases[f"N={n} map"] = (logits, None, None, 0.5, False)
        cases[f"N={n} masked"] = (logits, _half(n, 3, 8), t, 1.0, True)
    return cases


def _spatial_softmax_backward(dtype: torch.dtype):
    cases = {}
    for case, (logits, mask, t, fixed, coordinates) in _spatial_softmax_forward(dtype).items():
        with torch.no_grad():
            map, xy = reference.spatial_softmax_forward(logits, mask, t, fixed, coordinates)
        rest = (mask, t, fixed, map)
        cases[case] = (map.cos(), xy.cos() if coordinates else None, *rest, (True, t is not None))
        cases[f"{case} none"] = (None, None, *rest, (False, False))
    return cases


def _spatial_attention_forward(dtype: torch.dtype):
    cases = {}
    for n in (0, 2):
        for last in (False, True):
            features = _normal(n, 3, 2, 4, dtype=dtype)
            if last:
                features = features.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            for output in OUTPUTS:
                text = f"N={n} {'NHWC' if last else 'NCHW'} {output}"
                cases[f"{text} positional"] = (
                    features, _normal(2, 3, dtype=dtype), _normal(n, 2, 8, dtype=dtype), None, None, None,
                    0.5, output,
                )  # fmt: skip
                cases[f"{text} additive"] = (
                    features, _normal(5, 3, dtype=dtype), _normal(n, 5, dtype=dtype),
                    _normal(2, 5, dtype=dtype), _half(n, 8), _temperature(dtype), 1.0, output,
                )  # fmt: skip
            cases[f"N={n} no state"] = (
                features, _normal(2, 3, dtype=dtype), None, None, None, None, 1.0, "scale",
            )  # fmt: skip
    return cases


def _spatial_attention_backward(dtype: torch.dtype):
    cases = {}
    for case, args in _spatial_attention_forward(dtype).items():
        with torch.no_grad():
            attended, map = reference.spatial_attention_forward(*args)
        present = tuple(args[i] is not None for i in (0, 1, 2, 3, 5))
        cases[case] = (attended.cos(), map.cos(), *args, map, present)
        cases[f"{case} features"] = (attended.cos(), None, *args, map, (True, *(False,) * 4))
    return cases


def _attention_lstm_forward(dtype: torch.dtype):
    cases = {}
    b, t, c, h, w, size, rows = 2, 3, 3, 2, 2, 4, 5
    features = _normal(b, t, c, h, w, dtype=dtype)
    for cell, gates in (("lstm", 4), ("gru", 3)):
        for output, inputs in (("flatten", c * h * w), ("sum", c)):
            for form in ("hoisted", "direct"):
                states = (
                    _normal(b, size, dtype=dtype),
                    _normal(b, size, dtype=dtype) if cell == "lstm" else None,
                )
                j = gates * size
                cell_weights = (
                    _normal(j, inputs, dtype=dtype), _normal(j, size, dtype=dtype), _normal(j, dtype=dtype),
                    _normal(j, dtype=dtype),
                )  # fmt: skip
                positional = (
                    _normal(1, c, dtype=dtype),
                    _normal(h * w, size, dtype=dtype),
                    None,
                    None,
                    None,
                    0.5,
                )
                additive = (
                    _normal(rows, c, dtype=dtype), _normal(rows, size, dtype=dtype),
                    _normal(rows, dtype=dtype), _normal(1, rows, dtype=dtype), _temperature(dtype), 1.0,
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
