"""Attention in plain PyTorch: the fallback, and the oracle of every kernel. One formula for everything.

    scores   s[i, j] = scale q_i . k_j                          (Vaswani et al. 2017)
             s = softcap tanh(s / softcap)                      (Bello et al. 2016; Gemma 2)
             s -= slope[h] |i + offset - j|                     (ALiBi, Press et al. 2022)
             s += mask[i, j] + key_mask[j]                      where those are numbers
    kept     where masks are True or above -inf, and i + offset - left <= j <= i + offset + right
    weights  p = exp(s - lse), lse = log sum over kept j of exp(s); 0 where not kept
    output   o_i = sum over kept j of p z v_j,  z = 0 or 1 / (1 - dropout_p)

A row that keeps nothing has output, weights and gradients 0 and lse -inf. What a row does not keep it does not
see: NaN and inf there reach neither its results nor its gradients. Scores and sums are float32 or wider, and
rounded once. docs/design/017-attention.md argues the contract.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..transforms import gradients_by_autograd, under_transform, without_autocast
from . import dropout

WEIGHTS = ("none", "mean", "heads")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores and sums: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


@without_autocast
def attention_forward(
    query: Tensor,  # [B, H, L, D]; packed sequences: [1, H, T, D]
    key: Tensor,  # [B, G, S, D], G divides H
    value: Tensor,  # [B, G, S, V]
    mask: Tensor | None,  # bool (True takes part) or floating (added), each size that of [B, H, L, S] or 1
    key_mask: Tensor | None,  # [B, S], likewise
    extra_key: Tensor | None,  # [G, X, D]: columns after the S, which nothing hides
    extra_value: Tensor | None,  # [G, X, V]
    alibi_slopes: Tensor | None,  # [H]
    cu_seqlens_q: Tensor | None,  # [N + 1] int32: packed sequences
    cu_seqlens_k: Tensor | None,
    dropout_seed: Tensor | None,  # int64, one number
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window_left: int,  # -1: no limit
    window_right: int,  # 0: causal
    position_offset: int,  # of row 0 among the keys
    softcap: float,  # 0: none
    dropout_p: float,
    weights: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output [B, H, L, V], lse [B, H, L], and weights: [0], or of all S + X columns
    [B, L, S + X] (mean over heads) or [B, H, L, S + X].
    """
    window = (window_left, window_right, position_offset)
    options = (scale, window, softcap, dropout_seed, dropout_p)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        tensors = (query, key, value, mask, key_mask, extra_key, extra_value, alibi_slopes)
        output, lse, p = _attend(*tensors, *options)
        found = {"none": lambda: p.new_empty(0), "mean": lambda: p.mean(1), "heads": lambda: p}[weights]()
        return _by_rows(output.to(query.dtype)), lse, found.to(query.dtype)
    outputs, sums = [], []
    bounds = zip(_spans(cu_seqlens_q), _spans(cu_seqlens_k), strict=True)
    for n, (rows, columns) in enumerate(bounds):
        q, k, v = query[:, :, rows], key[:, :, columns], value[:, :, columns]
        output, lse, _ = _attend(q, k, v, None, None, None, None, alibi_slopes, *options, first_batch=n)
        outputs.append(output)
        sums.append(lse)
    empty = query.new_empty(*query.shape[:2], 0, value.shape[3], dtype=accumulation_dtype(query.dtype))
    output, lse = torch.cat([empty, *outputs], 2), torch.cat([empty[..., 0], *sums], 2)
    return _by_rows(output.to(query.dtype)), lse, query.new_empty(0)


@without_autocast
def attention_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value, mask, key_mask, extra_key, extra_value; empty where masked.

    The arguments are the three gradients, each may be None, the forward's eleven tensors, its output and lse,
    its options, and which gradients are wanted: the schema in ops.py.
    """
    grads, tensors, options, output_mask = args[:3], args[3:14], args[16:-1], args[-1]
    found = differentiable_gradients(tensors, options, grads, output_mask)
    like = [t if t is not None else tensors[0] for t in tensors[:7]]
    return tuple(
        t.new_empty(0) if not wanted else torch.zeros_like(t) if g is None else g
        for t, wanted, g in zip(like, output_mask, found, strict=True)
    )


def differentiable_gradients(
    tensors: Sequence[Any], options: Sequence[Any], grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the first seven of the op's tensors, by autograd through the formula."""

    def forward(*first: Any) -> tuple[Tensor, ...]:
        return attention_forward(*first, *tensors[7:], *options)

    return gradients_by_autograd(forward, tensors[:7], grads, needs)


def _attend(
    query, key, value, mask, key_mask, extra_key, extra_value, slopes, scale, window, softcap, seed, dropout_p,
    first_batch=0,
):  # fmt: skip
    """Output, lse and weights of every head, in the accumulation dtype."""
    batch, heads, rows, _ = query.shape
    columns, extra = key.shape[2], 0
    wide = accumulation_dtype(query.dtype)
    q, k, v = query.to(wide), key.to(wide), value.to(wide)
    if extra_key is not None and extra_value is not None:
        extra = extra_key.shape[1]
        k = torch.cat([k, extra_key.to(wide).expand(batch, -1, -1, -1)], 2)
        v = torch.cat([v, extra_value.to(wide).expand(batch, -1, -1, -1)], 2)
    if heads != k.shape[1]:
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))

    s = _products(q, k) * scale  # [B, H, L, S + X]
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    bias, kept = _bias_and_kept(query, columns, mask, key_mask, slopes, window)
    if bias is not None:
        s = s + _with_extra(bias, columns, extra, 0)
    if kept is not None:
        s = s.masked_fill(~_with_extra(kept, columns, extra, True), -math.inf)
    p, lse = _softmax(s)
    kept = p.detach() != 0
    if seed is not None and dropout_p > 0:
        drawn = dropout.kept_weights(seed, dropout_p, batch, heads, rows, columns + extra, first_batch)
        p = (p * dropout.keep_scale(dropout_p)).masked_fill(~drawn, 0)
    return _weighted_sum(p, kept, v), lse, p


def _bias_and_kept(query, columns, mask, key_mask, slopes, window):
    """What is added to the scores, and where they take part; each None or broadcastable to [B, H, L, S]."""
    bias, kept = None, None
    left, right, offset = window
    masks = (mask, None if key_mask is None else key_mask[:, None, None, :])
    if slopes is not None or left >= 0 or right >= 0:
        i = torch.arange(query.shape[2], device=query.device)[:, None] + offset
        distance = torch.arange(columns, device=query.device) - i  # [L, S]
        if slopes is not None:
            bias = -slopes.to(accumulation_dtype(query.dtype))[:, None, None] * distance.abs()
            bias = bias[None]
        if left >= 0:
            kept = (distance >= -left)[None, None]
        if right >= 0:
            seen = (distance <= right)[None, None]
            kept = seen if kept is None else kept & seen
    for given in masks:
        if given is None:
            continue
        here = given
        if given.dtype != torch.bool:
            here = given != -math.inf  # NaN takes part
            number = given.to(accumulation_dtype(query.dtype))
            bias = number if bias is None else bias + number
        kept = here if kept is None else kept & here
    return bias, kept


def _with_extra(t: Tensor, columns: int, extra: int, value: Any) -> Tensor:
    """Continue [..., S] or [..., 1] over the extra columns with `value`."""
    if extra == 0:
        return t
    return torch.nn.functional.pad(t.expand(*t.shape[:-1], columns), (0, extra), value=value)


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log sum exp over the last dimension; 0 and -inf in rows of nothing but -inf."""
    gone = s.detach() == -math.inf
    s = s.masked_fill(gone, -math.inf)  # no gradient there
    largest = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -math.inf)
    largest = largest.masked_fill(largest == -math.inf, 0)
    e = (s - largest).exp()
    total = e.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    return e / total, (largest + total.log()).masked_fill(nothing, -math.inf).squeeze(-1)


def _all_finite(t: Tensor) -> bool:
    """Whether a look at the values shows them finite; devices and transforms are not asked to look."""
    return t.device.type == "cpu" and not under_transform(t) and bool(t.detach().isfinite().all())


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Return ``q k^T``; a row's gradient does not see the keys that are not finite and that it doesn't keep."""
    if _all_finite(k):
        return q @ k.mT
    special = ~k.detach().isfinite().all(-1)  # [B, H, S]
    clean = q @ k.masked_fill(special[..., None], 0).mT
    return torch.where(special[:, :, None], (q @ k.mT).detach(), clean)


def _weighted_sum(p: Tensor, kept: Tensor, v: Tensor) -> Tensor:
    """Return ``p v``; a row sees values that are not finite only where it keeps them."""
    if _all_finite(v):
        return p @ v
    special = ~v.detach().isfinite()
    seen = kept.to(p.dtype) @ special.to(p.dtype) > 0
    return torch.where(seen, (p @ v).detach(), p @ v.masked_fill(special, 0))


def _by_rows(output: Tensor) -> Tensor:
    """Lay [B, H, L, V] out as [B, L, H, V], which the next product wants."""
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _spans(cu_seqlens: Tensor) -> list[slice]:
    bounds = cu_seqlens.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]
