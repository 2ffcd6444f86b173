"""Attention in plain PyTorch: the fallback, and the oracle of every kernel. One formula for everything.

    scores   s[i, j] = scale q_i . k_j                          (Vaswani et al. 2017)
             s = softcap tanh(s / softcap)                      (Bello et al. 2016; Gemma 2)
             s -= slope[h] |i + offset - j|                     (ALiBi, Press et al. 2022)
             s += mask[i, j] + key_mask[j]                      where those are numbers
    kept     where masks are True or above -inf, and i + offset - left <= j <= i + offset + right
    weights  p = exp(s - lse), lse = log sum over kept j of exp(s); 0 where not kept
    output   o_i = sum over kept j of p z v_j,  z = 0 or 1 / (1 - dropout_p)

A row that keeps nothing has output, weights and gradients 0 and lse -inf. What a row does not keep it does
not see: NaN and inf there reach neither its results nor its gradients. Scores and sums are float32 or wider,
and rounded once. docs/design/017-attention.md argues the contract.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.transforms import gradients_by_autograd, under_transform, without_autocast
from . import dropout
from .projection_reference import projection_backward as projection_backward
from .projection_reference import projection_forward as projection_forward

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
    with torch.no_grad():  # a formula, since in a compiled graph autograd does not record
        found = _gradients(grads, tensors, options)
        return tuple(
            torch.empty_like(t).copy_(g) if wanted else tensors[0].new_empty(0)
            for t, wanted, g in zip(tensors[:7], output_mask, found, strict=True)
        )


def _gradients(grads: Sequence[Any], tensors: Sequence[Any], options: Sequence[Any]) -> list[Any]:
    """Gradients of the first seven of the op's tensors, in the accumulation dtype; None of bool masks."""
    _, _, scale, *window, softcap, dropout_p, weights = options
    rest = (scale, tuple(window), softcap, tensors[10], dropout_p)
    wide = accumulation_dtype(tensors[0].dtype)
    g_out, g_lse, g_weights = (None if g is None else g.to(wide) for g in grads)
    if g_weights is not None and weights == "mean":
        g_weights = g_weights[:, None] / tensors[0].shape[1]
    if tensors[8] is None or tensors[9] is None:
        return _gradients_of_one((g_out, g_lse, g_weights), tensors[:8], rest)
    found: list[list[Tensor]] = [[t.new_empty(*t.shape[:2], 0, t.shape[3], dtype=wide)] for t in tensors[:3]]
    bounds = zip(_spans(tensors[8]), _spans(tensors[9]), strict=True)
    for n, (rows, columns) in enumerate(bounds):
        q, k, v = tensors[0][:, :, rows], tensors[1][:, :, columns], tensors[2][:, :, columns]
        given = (*(None if g is None else g[:, :, rows] for g in (g_out, g_lse)), None)
        of_one = _gradients_of_one(given, (q, k, v, None, None, None, None, tensors[7]), rest, first_batch=n)
        for parts, g in zip(found, of_one, strict=False):
            parts.append(g)
    return [*(torch.cat(parts, 2) for parts in found), *(None,) * 4]


def _gradients_of_one(grads, tensors, options, first_batch=0) -> list[Any]:
    g_out, g_lse, g_weights = grads
    query, _, _, mask, key_mask, extra_key, _, _ = tensors
    scale, softcap = options[0], options[2]
    q, k, v, capped, kept, p, _, z = _weights(*(*tensors, *options, first_batch))
    dp = torch.zeros_like(p)
    if g_out is not None:
        dp = dp + g_out @ v.mT
    if g_weights is not None:
        dp = dp + g_weights
    dp = (dp if z is None else dp * z).masked_fill(~kept, 0)
    ds = dp - (p * dp).sum(-1, keepdim=True)
    if g_lse is not None:
        ds = ds + g_lse[..., None]
    ds = (p * ds).masked_fill(~kept, 0)
    seen = ds[..., : ds.shape[-1] - (0 if extra_key is None else extra_key.shape[1])]
    d_mask = None if mask is None or mask.dtype == torch.bool else seen.sum_to_size(mask.shape)
    d_key_mask = None if key_mask is None or key_mask.dtype == torch.bool else seen.sum((1, 2))
    if softcap > 0:
        ds = (ds * (1 - (capped / softcap) ** 2)).masked_fill(~kept, 0)
    if g_out is None:
        g_out = p.new_zeros(*p.shape[:3], v.shape[3])
    d_query = _weighted_sum(ds, kept, k) * scale
    d_key = _weighted_sum(ds.mT, kept.mT, q) * scale
    d_value = _weighted_sum((p if z is None else p * z).mT, kept.mT, g_out)
    groups, columns = tensors[1].shape[1:3]
    d_key, d_value = (
        t.unflatten(1, (groups, query.shape[1] // max(groups, 1))).sum(2) for t in (d_key, d_value)
    )
    d_extra = (None, None)
    if extra_key is not None:
        d_extra = tuple(t[:, :, columns:].sum(0) for t in (d_key, d_value))
    return [d_query, d_key[:, :, :columns], d_value[:, :, :columns], d_mask, d_key_mask, *d_extra]


def differentiable_gradients(
    tensors: Sequence[Any], options: Sequence[Any], grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the first seven of the op's tensors, by autograd through the formula."""

    def forward(*first: Any) -> tuple[Tensor, ...]:
        return attention_forward(*first, *tensors[7:], *options)

    return gradients_by_autograd(forward, tensors[:7], grads, needs)


def _attend(*tensors_and_options, **first_batch):
    """Output, lse and weights of every head, in the accumulation dtype."""
    _, _, v, _, kept, p, lse, z = _weights(*tensors_and_options, **first_batch)
    if z is not None:
        p = p * z
    return _weighted_sum(p, kept, v), lse, p


def _weights(
    query, key, value, mask, key_mask, extra_key, extra_value, slopes, scale, window, softcap, seed,
    dropout_p, first_batch=0,
):  # fmt: skip
    """Queries, every head's keys and values; and of all columns scores after softcap, kept, p, lse, z."""
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
    capped = s
    bias, kept = _bias_and_kept(query, columns, mask, key_mask, slopes, window)
    if bias is not None:
        s = s + _with_extra(bias, columns, extra, 0)
    if kept is not None:
        s = s.masked_fill(~_with_extra(kept, columns, extra, True), -math.inf)
    p, lse, kept = _softmax(s)
    z = None
    if seed is not None and dropout_p > 0:
        drawn = dropout.kept_weights(seed, dropout_p, batch, heads, rows, columns + extra, first_batch)
        z = drawn.to(wide) * dropout.keep_scale(dropout_p)
    return q, k, v, capped, kept, p, lse, z


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


def _softmax(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and log sum exp over the last dimension, 0 and -inf in rows of -inf; where scores are above."""
    gone = s.detach() == -math.inf
    s = s.masked_fill(gone, -math.inf)  # no gradient there
    largest = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -math.inf)
    largest = largest.masked_fill(largest == -math.inf, 0)
    e = (s - largest).exp()
    total = e.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    p = (e / total).masked_fill(gone, 0)  # where the rest of the row is NaN, too
    return p, (largest + total.log()).masked_fill(nothing, -math.inf).squeeze(-1), ~gone


def _all_finite(t: Tensor) -> bool:
    """Whether a look at the values shows them finite; devices and transforms are not asked to look."""
    return t.device.type == "cpu" and not under_transform(t) and bool(t.detach().isfinite().all())


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Return ``q k^T``; a row's gradient does not see keys that are not finite and that it doesn't keep."""
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
