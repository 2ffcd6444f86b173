"""Attention inside an LSTM or a GRU as a function: check, plan, then call the op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import dispatch
from ..core.transforms import autocast_enabled, may_need_backward
from ..spatial import checks
from . import ops, plan, reference

State = Tensor | tuple[Tensor, Tensor]


def attention_lstm(
    features: Tensor,
    hx: State,
    score_weight: Tensor,
    hidden_weight: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    hidden_bias: Tensor | None = None,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    v: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    lengths: Any = None,
    output: str = "flatten",
    form: str = "auto",
) -> tuple[Tensor, Tensor, State]:
    """Attend to each frame by the last hidden state and feed the attended features to a cell, step by step.

    For each step t: ``a_t = softmax(s(f_t, hidden_weight h + hidden_bias) / temperature)`` over positions, as
    :func:`fusednn.functional.spatial_attention` has it; ``h, c = cell(f_t a_t, h, c)`` (Kim & Canny 2017).
    The cell is an LSTM if `hx` is a pair, else a GRU.

    Args:
        features: ``[B, T, C, H, W]``, floating point.
        hx: ``(h, c)``, each ``[B, hidden]``; a GRU's: ``h``.
        score_weight: ``[1, C]``; with `v`: ``[A, C]``.
        hidden_weight: ``[H*W, hidden]``; with `v`: ``[A, hidden]``.
        weight_ih: ``[gates*hidden, C*H*W]`` (flatten) or ``[gates*hidden, C]`` (sum), rows as the cells'.
        weight_hh: ``[gates*hidden, hidden]``.
        hidden_bias: ``[H*W]`` (with `v`: ``[A]``) or None.
        bias_ih: ``[gates*hidden]`` or None.
        bias_hh: ``[gates*hidden]`` or None.
        v: ``[1, A]`` for additive scores, or None.
        temperature: a positive number, or a tensor that holds one, which gets a gradient.
        lengths: of the sequences, ``[B]`` integers from 1 to T, or None. From a sequence's end on, hidden
            states and maps are 0, nothing of the frames is read, and the state stays.
        output: ``"flatten"`` or ``"sum"``: the cell's input.
        form: ``"hoisted"``: the input's product with ``weight_ih`` is made for all steps and positions at
            once; ``"direct"``: in each step; ``"auto"``: what moves fewer bytes.

    Returns:
        Hidden states ``[B, T, hidden]``, maps ``[B, T, 1, H, W]`` and the state after the last step, in the
        form of `hx`; all differentiable.

    Under autocast everything but the temperature is cast to its dtype.

    Raises:
        RuntimeError: a shape, dtype, device or length does not fit; the text names the argument.
        TypeError: an argument is of another type.
        ValueError: there is no such output or form, or the temperature is not positive.
    """
    name = "attention_lstm"
    checks.check_images(name, "features", features, "[B, T, C, H, W]")
    checks.choice(name, "output", output, ("flatten", "sum"))
    checks.choice(name, "form", form, plan.FORMS)
    h0, c0 = _states(name, hx)
    weights = (score_weight, hidden_weight, hidden_bias, v, weight_ih, weight_hh, bias_ih, bias_hh)
    _check(name, features, h0, c0, weights, output)
    learned, fixed = checks.temperature(name, temperature, features.device)
    ends = checks.lengths_of(name, lengths, features)
    features, h0, c0, *scores, w_ih, w_hh, b_ih, b_hh = _autocast(features, h0, c0, *weights)
    cell = "gru" if c0 is None else "lstm"
    if not torch.compiler.is_compiling() and dispatch.explaining() and form == "auto":
        _record_plan(features, w_ih.shape[0], output)
    tensors = (features, h0, c0, *scores, learned, w_ih, w_hh, b_ih, b_hh)
    call: Any = ops.attention_lstm_forward
    if 0 in (features.shape[2], score_weight.shape[0], h0.shape[1]):  # nothing to look at, or to remember
        call = reference.attention_lstm_forward
    hidden, maps, h, c, *_ = call(
        *(features, h0, c0, *scores, learned, fixed, w_ih, w_hh, b_ih, b_hh),
        *(ends, output, cell, form, may_need_backward(*tensors)),
    )
    return hidden, maps, h if c0 is None else (h, c)


_WEIGHTS = (
    "score_weight", "hidden_weight", "hidden_bias", "v", "weight_ih", "weight_hh", "bias_ih", "bias_hh"
)  # fmt: skip


def _states(name: str, hx: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(hx, Tensor):
        return hx, None
    if not isinstance(hx, (tuple, list)) or not all(isinstance(s, Tensor) for s in hx):
        got = type(hx).__name__
        if isinstance(hx, (tuple, list)):
            got += f" of {', '.join(type(s).__name__ for s in hx)}"
        raise TypeError(f"{name}: expected hx to be a pair of Tensors (h, c), or a Tensor (GRU), got {got}")
    if len(hx) != 2:
        raise RuntimeError(f"{name}: hx: got {len(hx)} states, expected (h, c)")
    return hx[0], hx[1]


def _check(name: str, features: Tensor, h0: Tensor, c0: Tensor | None, weights: Any, output: str) -> None:
    score, v, w_hh = weights[0], weights[3], weights[5]
    batch, steps, channels, height, width = features.shape
    if steps == 0:
        raise RuntimeError(f"{name}: Expected sequence length to be larger than 0")
    optional = ("hidden_bias", "v", "bias_ih", "bias_hh")
    for argument, tensor in zip(_WEIGHTS, weights, strict=True):
        checks.check_tensor(name, argument, tensor, optional=argument in optional)
    if w_hh.dim() != 2:
        raise RuntimeError(f"{name}: Expected weight_hh to be 2D, got {w_hh.dim()}D instead")
    size = w_hh.shape[1]
    rows = size * (3 if c0 is None else 4)
    why = f"features of size {list(features.shape)} and weight_hh of size {list(w_hh.shape)}"
    energies = 1 if v is None else (score.shape[0] if score.dim() == 2 else 0)
    terms = height * width if v is None else energies
    inputs = channels * height * width if output == "flatten" else channels
    shapes = (
        (energies, channels), (terms, size), (terms,), (1, energies), (rows, inputs), (rows, size), (rows,),
        (rows,),
    )  # fmt: skip
    for argument, tensor, expected in zip(_WEIGHTS, weights, shapes, strict=True):
        checks.check_shape(name, argument, tensor, expected, why)
    states = (("hidden state", h0), ("cell state", c0))
    for argument, tensor in states:
        checks.check_shape(name, argument, tensor, (batch, size), why)
    checks.check_same_kind(name, "features", features, (*states, *zip(_WEIGHTS, weights, strict=True)))


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    features = tensors[0]
    assert features is not None
    if not autocast_enabled(features.device) or features.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(features.device.type)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def _record_plan(features: Tensor, rows: int, output: str) -> None:
    batch, steps, channels, height, width = features.shape
    found = plan.plan(batch, steps, channels, height * width, rows, output, features.element_size())
    dispatch.record_choice("attention_lstm form", found.form, found.reasons())
