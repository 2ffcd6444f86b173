"""Attention inside an LSTM or a GRU, over whole sequences, in plain PyTorch.

    a_t = softmax((scores of f_t and h_{t-1}) / T)      x_t = flatten or sum of f_t a_t      (reference.py)
    h_t, c_t = cell(x_t, h_{t-1}, c_{t-1})

x_t is linear in the map, so that its product with weight_ih can be taken out of the recurrence:
W_ih x_t = sum over p of a_t[p] G_t[p], G_t[p] = W_ih[:, p] f_t[:, p], one batched product for all steps
("hoisted"; else "direct").

Where a sequence has ended (t >= its length) the state stays, hidden states and maps are 0, and nothing of the
frame is read. The backward walks the steps in reverse from the saved maps, states and gates; everything
that does not feed the recurrence is done for all steps at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..core.tensors import accumulation_dtype
from ..core.transforms import without_autocast
from ..rnn.formulas import gru_update, gru_update_backward, lstm_update, lstm_update_backward
from ..spatial import formulas
from . import plan


@dataclass
class _Sequence:
    """The operands, wide, with ended frames zeroed."""

    f: Tensor  # [B, T, C, P]
    w_score: Tensor  # [1, C]; additive: [A, C]
    w_hidden: Tensor  # [P, H]; additive: [A, H]
    b_hidden: Tensor | None  # [P]; additive: [A]
    v: Tensor | None  # additive: [1, A]
    t: Tensor | float
    w_ih: Tensor  # [J, C P]; sum: [J, C]
    w_hh: Tensor  # [J, H]
    active: Tensor | None  # [B, T] bool: the sequence has not ended
    flatten: bool
    hoisted: bool

    @classmethod
    def of(
        cls, features, w_score, w_hidden, b_hidden, v, learned, fixed, w_ih, w_hh, lengths, output, form
    ) -> _Sequence:
        """Widen, and choose the form."""
        wide = accumulation_dtype(features.dtype)
        active = None
        f = features.flatten(3)
        if lengths is not None:
            active = torch.arange(f.shape[1], device=f.device) < lengths.unsqueeze(1)
            f = f.masked_fill(~active[:, :, None, None], 0)
        form = plan.resolve(form, features.shape, w_ih.shape[0], output, features.element_size())
        b_hidden, v = (None if x is None else x.to(wide) for x in (b_hidden, v))
        t = formulas.wide_temperature(learned, fixed, wide)
        weights = {"w_score": w_score, "w_hidden": w_hidden, "w_ih": w_ih, "w_hh": w_hh}
        return cls(
            f=f.to(wide),
            b_hidden=b_hidden,
            v=v,
            t=t,
            active=active,
            flatten=output == "flatten",
            hoisted=form == "hoisted",
            **{name: w.to(wide) for name, w in weights.items()},
        )

    def weight_by_position(self) -> Tensor:
        """weight_ih as [J, C, P]; sum: [J, C, 1]."""
        rows, channels, positions = self.w_ih.shape[0], *self.f.shape[2:]
        return self.w_ih.reshape(rows, channels, positions if self.flatten else 1)

    def projected(self) -> Tensor:
        """G: what each position would add to the gates if all weight were on it, [B, T, P, J]."""
        if self.flatten:
            return torch.einsum("btcp,jcp->btpj", self.f, self.weight_by_position())
        return torch.einsum("btcp,jc->btpj", self.f, self.w_ih)

    def attended(self, f: Tensor, a: Tensor) -> Tensor:
        """The cell's input from frames [..., C, P] and maps [..., 1, P]."""
        return (f * a).flatten(-2) if self.flatten else (f * a).sum(-1)

    def still(self, t: int, now: Tensor, ended: Tensor | None = None) -> Tensor:
        """`now` in the rows that are active at step t, in the others `ended`, or 0."""
        if self.active is None:
            return now
        active = self.active[:, t].reshape(-1, *(1,) * (now.dim() - 1))
        return now.where(active, torch.zeros_like(now) if ended is None else ended)


def frame_format(features: Tensor) -> torch.memory_format:
    """Memory format of the frames [C, H, W] of [B, T, C, H, W]."""
    return suggest_memory_format(features[:, 0])


@without_autocast
def attention_lstm_forward(
    features: Tensor,  # [B, T, C, H, W]
    h0: Tensor,  # [B, Hd]
    c0: Tensor | None,  # [B, Hd]; gru: None
    score_weight: Tensor,  # [1, C]; additive: [A, C]
    hidden_weight: Tensor,  # [P, Hd]; additive: [A, Hd]
    hidden_bias: Tensor | None,  # [P]; additive: [A]
    v: Tensor | None,  # None: positional; additive: [1, A]
    learned_temperature: Tensor | None,  # one number
    temperature: float,  # where none is learned
    weight_ih: Tensor,  # [J, C P] (flatten) or [J, C] (sum), J = 4 Hd (lstm) or 3 Hd (gru)
    weight_hh: Tensor,  # [J, Hd]
    bias_ih: Tensor | None,  # [J]
    bias_hh: Tensor | None,  # [J]
    lengths: Tensor | None,  # [B] int64, 1 .. T
    output: str,  # flatten or sum
    cell: str,  # lstm or gru
    form: str,  # auto, hoisted or direct
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states [B, T, Hd], maps [B, T, 1, H, W] and the last h and c [B, Hd] (gru: c empty).

    And, wide, for the backward (empty unless `save`): gates [B, T, 4 Hd], activated, as the cells' ops have
    them, and the cell states [B, T, Hd] (gru: empty).
    """
    q = _Sequence.of(
        features, score_weight, hidden_weight, hidden_bias, v, learned_temperature, temperature,
        weight_ih, weight_hh, lengths, output, form,
    )  # fmt: skip
    b_ih, b_hh = (None if b is None else b.to(q.f.dtype) for b in (bias_ih, bias_hh))
    h, c = h0.to(q.f.dtype), None if c0 is None else c0.to(q.f.dtype)
    projected = q.projected() if q.hoisted else None
    products = formulas.image_scores(q.f, q.w_score)  # [B, T, 1 or A, P]
    hidden, maps, gates, cells = [], [], [], []
    for t in range(q.f.shape[1]):
        term = F.linear(h, q.w_hidden, q.b_hidden)  # [B, P]; additive: [B, A]
        if q.v is None:
            scores = products[:, t] + term.unsqueeze(1)  # [B, 1, P]
        else:
            scores = q.v @ formulas.additive_energy(products[:, t], term)
        a = formulas.masked_softmax(scores, None, q.t)
        if projected is None:
            x = F.linear(q.attended(q.f[:, t], a), q.w_ih, b_ih)
        else:
            x = (a @ projected[:, t]).squeeze(1)
            x = x if b_ih is None else x + b_ih
        r = F.linear(h, q.w_hh, b_hh)
        if c is None:
            h_next, now = gru_update(x, r, h)
        else:
            h_next, c_next, now = lstm_update(x + r, c)
            c = q.still(t, c_next, c)
            cells.append(c)
        hidden.append(q.still(t, h_next))
        h = q.still(t, h_next, h)
        maps.append(q.still(t, a))
        gates.append(now)
    dtype, size = features.dtype, features.shape
    none = h.new_empty(0)
    return (
        torch.stack(hidden, 1).to(dtype),
        torch.stack(maps, 1).to(dtype).reshape(*size[:2], 1, *size[3:]),
        h.to(dtype),
        none.to(dtype) if c is None else c.to(dtype, copy=True),
        torch.stack(gates, 1) if save else none,
        torch.stack(cells, 1) if save and cells else torch.empty_like(none),
    )


@without_autocast
def attention_lstm_backward(
    grad_hidden: Tensor | None,  # [B, T, Hd]
    grad_maps: Tensor | None,  # [B, T, 1, H, W]
    grad_h: Tensor | None,  # [B, Hd]
    grad_c: Tensor | None,  # [B, Hd]
    features: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    score_weight: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor | None,
    v: Tensor | None,
    learned_temperature: Tensor | None,
    temperature: float,
    weight_ih: Tensor,
    weight_hh: Tensor,
    lengths: Tensor | None,
    output: str,
    cell: str,
    form: str,
    hidden: Tensor,  # these four as the forward returned them
    maps: Tensor,
    gates: Tensor,
    cells: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients, empty where masked.

    Of the tensors in DIFFERENTIABLE, in that order.
    """
    q = _Sequence.of(
        features, score_weight, hidden_weight, hidden_bias, v, learned_temperature, temperature,
        weight_ih, weight_hh, lengths, output, form,
    )  # fmt: skip
    wide = q.f.dtype
    a = maps.to(wide).flatten(3)  # [B, T, 1, P]
    h_prev = torch.cat((h0.unsqueeze(1), hidden[:, :-1]), dim=1).to(wide)
    energy = None
    if q.v is not None:
        terms = F.linear(h_prev, q.w_hidden, q.b_hidden)  # [B, T, A]
        energy = formulas.additive_energy(formulas.image_scores(q.f, q.w_score), terms)  # [B, T, A, P]
    grads = tuple(None if g is None else g.to(wide) for g in (grad_hidden, grad_maps, grad_h, grad_c))
    steps, d_h, d_c = _walk_back(q, grads, h_prev, c0, a, energy, gates, cells)
    found = _deferred(q, steps, h_prev, a, energy) | {"h0": d_h, "c0": d_c}
    frames = found["features"].to(features.dtype).reshape(-1, *features.shape[2:])
    found["features"] = frames.contiguous(memory_format=frame_format(features)).view(features.shape)
    if output_mask[7]:
        assert learned_temperature is not None
        found["learned_temperature"] = formulas.temperature_gradient(steps.scaled, a, q.t).reshape(
            learned_temperature.shape
        )
    dtypes = {} if learned_temperature is None else {"learned_temperature": learned_temperature.dtype}
    return tuple(
        found[name].to(dtypes.get(name, features.dtype)) if on else features.new_empty(0)
        for name, on in zip(DIFFERENTIABLE, output_mask, strict=True)
    )


DIFFERENTIABLE = (
    "features", "h0", "c0", "score_weight", "hidden_weight", "hidden_bias", "v", "learned_temperature",
    "weight_ih", "weight_hh", "bias_ih", "bias_hh",
)  # fmt: skip


@dataclass
class _StepGradients:
    """Gradients of all steps: of both products of the cell, the scores and the term of the hidden state."""

    x: Tensor  # [B, T, J]
    r: Tensor  # [B, T, J]
    scaled: Tensor  # [B, T, 1, P], of scores / T
    term: Tensor  # [B, T, P]; additive: [B, T, A]


def _walk_back(q, grads, h_prev, c0, a, energy, gates, cells) -> tuple[_StepGradients, Tensor, Tensor]:
    """Go through the steps in reverse; return their gradients, and those of h0 and c0 (gru: empty)."""
    grad_hidden, grad_maps, grad_h, grad_c = grads
    d_h = torch.zeros_like(h_prev[:, 0]) if grad_h is None else grad_h
    d_c = torch.zeros_like(d_h) if grad_c is None else grad_c
    projected = q.projected() if q.hoisted else None
    taken: list[tuple[Tensor, ...]] = []
    for t in reversed(range(q.f.shape[1])):
        d_now = d_h if grad_hidden is None else d_h + grad_hidden[:, t]
        if c0 is None:
            d_x, d_r, d_past = gru_update_backward(d_now, gates[:, t], h_prev[:, t])
        else:
            c_prev = cells[:, t - 1] if t > 0 else c0.to(d_h.dtype)
            d_x, d_c_prev = lstm_update_backward(d_now, d_c, gates[:, t], c_prev, cells[:, t])
            d_r, d_past = d_x, torch.zeros_like(d_now)
            d_c = q.still(t, d_c_prev, d_c)
        if projected is not None:
            d_map = (projected[:, t] @ d_x.unsqueeze(2)).transpose(1, 2)  # [B, 1, P]
        else:
            d_attended = (d_x @ q.w_ih).reshape(len(d_x), q.f.shape[2], -1)  # [B, C, P]; sum: [B, C, 1]
            d_map = (d_attended * q.f[:, t]).sum(1, keepdim=True)
        if grad_maps is not None:
            d_map = d_map + grad_maps[:, t].flatten(2)
        d_scaled = formulas.softmax_backward(d_map, a[:, t], None)
        d_term = _term_gradient(q, d_scaled / q.t, None if energy is None else energy[:, t])
        d_past = d_past + d_r @ q.w_hh + d_term @ q.w_hidden
        d_h = q.still(t, d_past, d_h)
        taken.append(tuple(q.still(t, x) for x in (d_x, d_r, d_scaled, d_term)))
    steps = _StepGradients(*(torch.stack(x[::-1], 1) for x in zip(*taken, strict=True)))
    return steps, d_h, d_c if c0 is not None else d_h.new_empty(0)


def _term_gradient(q: _Sequence, d_s: Tensor, energy: Tensor | None) -> Tensor:
    """Gradient of the hidden state's term of a step: [B, P]; additive: [B, A]."""
    if q.v is None or energy is None:
        return d_s.squeeze(1)
    return ((q.v.t() @ d_s) * (1 - energy * energy)).sum(-1)


def _deferred(q: _Sequence, d: _StepGradients, h_prev: Tensor, a: Tensor, energy: Any) -> dict[str, Any]:
    """Gradients that no step waits for, as products over all steps."""
    d_s = d.scaled / q.t  # [B, T, 1, P]
    d_products, d_v = d_s, None
    if q.v is not None:
        d_v = formulas.sum_of_products(d_s.flatten(0, 1), energy.flatten(0, 1))
        d_products = (q.v.t() @ d_s) * (1 - energy * energy)  # [B, T, A, P]
    d_attended = torch.einsum("btj,jcp->btcp", d.x, q.weight_by_position())
    return {
        "features": d_attended * a + q.w_score.t() @ d_products,  # [B, T, C, P]
        "score_weight": formulas.sum_of_products(d_products.flatten(0, 1), q.f.flatten(0, 1)),
        "hidden_weight": torch.einsum("btk,bth->kh", d.term, h_prev),
        "hidden_bias": d.term.sum((0, 1)),
        "v": d_v,
        "weight_ih": torch.einsum("btj,btk->jk", d.x, q.attended(q.f, a)),
        "weight_hh": torch.einsum("btj,bth->jh", d.r, h_prev),
        "bias_ih": d.x.sum((0, 1)),
        "bias_hh": d.r.sum((0, 1)),
    }
