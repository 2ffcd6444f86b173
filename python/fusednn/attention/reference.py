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

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ..core.tensors import accumulation_dtype, where_needed
from ..core.transforms import under_transform, without_autocast
from . import dropout


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
    one = _Attention(
        query, key, value, mask, key_mask, extra_key, extra_value, alibi_slopes, dropout_seed, scale,
        (window_left, window_right, position_offset), softcap, dropout_p,
    )  # fmt: skip
    if cu_seqlens_q is None or cu_seqlens_k is None:
        output, lse, p = one.results()
        found = {"none": lambda: p.new_empty(0), "mean": lambda: p.mean(1), "heads": lambda: p}[weights]()
        return _by_rows(output.to(query.dtype)), lse, found.to(query.dtype)
    parts = [part.results() for _, part in one.sequences(cu_seqlens_q, cu_seqlens_k)]
    empty = query.new_empty(*query.shape[:2], 0, value.shape[3], dtype=one.wide)
    output = torch.cat([empty, *(output for output, _, _ in parts)], 2)
    lse = torch.cat([empty[..., 0], *(lse for _, lse, _ in parts)], 2)
    return _by_rows(output.to(query.dtype)), lse, query.new_empty(0)


@without_autocast
def attention_backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    grad_weights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    extra_key: Tensor | None,
    extra_value: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window_left: int,
    window_right: int,
    position_offset: int,
    softcap: float,
    dropout_p: float,
    weights: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value, mask, key_mask, extra_key, extra_value; empty where masked.

    The gradients of the results may each be None; the other arguments are the forward's, and its results.
    """
    differentiated: Any = (query, key, value, mask, key_mask, extra_key, extra_value)
    one = _Attention(
        query, key, value, mask, key_mask, extra_key, extra_value, alibi_slopes, dropout_seed, scale,
        (window_left, window_right, position_offset), softcap, dropout_p,
    )  # fmt: skip
    with torch.no_grad():  # a formula, since in a compiled graph autograd does not record
        given = (None if g is None else g.to(one.wide) for g in (grad_output, grad_lse, grad_weights))
        g_output, g_lse, g_weights = given
        if g_weights is not None and weights == "mean":
            g_weights = g_weights[:, None] / query.shape[1]
        if cu_seqlens_q is None or cu_seqlens_k is None:
            found = one.gradients(g_output, g_lse, g_weights)
        else:
            parts: list[list[Any]] = [
                [t.new_empty(*t.shape[:2], 0, t.shape[3], dtype=one.wide)] for t in differentiated[:3]
            ]
            for rows, part in one.sequences(cu_seqlens_q, cu_seqlens_k):
                g_out, g_sum = (None if g is None else g[:, :, rows] for g in (g_output, g_lse))
                for gradients, gradient in zip(parts, part.gradients(g_out, g_sum, None), strict=False):
                    gradients.append(gradient)
            found = [*(torch.cat(gradients, 2) for gradients in parts), *(None,) * 4]
        return tuple(
            torch.empty_like(t).copy_(g) if wanted else query.new_empty(0)
            for t, wanted, g in zip(differentiated, output_mask, found, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class _Attention:
    """Attention within sequences of one length: the op's arguments of these names."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    key_mask: Tensor | None
    extra_key: Tensor | None
    extra_value: Tensor | None
    alibi_slopes: Tensor | None
    dropout_seed: Tensor | None
    scale: float
    window: tuple[int, int, int]  # left, right, and the position of row 0
    softcap: float
    dropout_p: float
    first_batch: int = 0  # packed sequences count on

    @property
    def wide(self) -> torch.dtype:
        """Dtype of scores and sums."""
        return accumulation_dtype(self.query.dtype)

    def sequences(self, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, _Attention]]:
        """Rows of each packed sequence, and its attention."""
        for n, (rows, columns) in enumerate(zip(_spans(cu_seqlens_q), _spans(cu_seqlens_k), strict=True)):
            query, key, value = self.query[:, :, rows], self.key[:, :, columns], self.value[:, :, columns]
            yield rows, dataclasses.replace(self, query=query, key=key, value=value, first_batch=n)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output, lse and weights of every head, in the accumulation dtype."""
        _, _, v, _, kept, p, lse, z = self._weights()
        if z is not None:
            p = p * z
        return _weighted_sum(p, kept, v), lse, p

    def gradients(self, g_output: Tensor | None, g_lse: Tensor | None, g_weights: Tensor | None) -> list[Any]:
        """Gradients of the first seven tensors, in the accumulation dtype; None of bool masks."""
        q, k, v, capped, kept, p, _, z = self._weights()
        dp = torch.zeros_like(p)
        if g_output is not None:
            dp = dp + g_output @ v.mT
        if g_weights is not None:
            dp = dp + g_weights
        dp = (dp if z is None else dp * z).masked_fill(~kept, 0)
        ds = dp - (p * dp).sum(-1, keepdim=True)
        if g_lse is not None:
            ds = ds + g_lse[..., None]
        ds = (p * ds).masked_fill(~kept, 0)
        groups, columns = self.key.shape[1:3]
        seen, mask, key_mask = ds[..., :columns], self.mask, self.key_mask
        d_mask = None if mask is None or mask.dtype == torch.bool else seen.sum_to_size(mask.shape)
        d_key_mask = None if key_mask is None or key_mask.dtype == torch.bool else seen.sum((1, 2))
        if self.softcap > 0:
            ds = (ds * (1 - (capped / self.softcap) ** 2)).masked_fill(~kept, 0)
        if g_output is None:
            g_output = p.new_zeros(*p.shape[:3], v.shape[3])
        d_query = _weighted_sum(ds, kept, k) * self.scale
        d_key = _weighted_sum(ds.mT, kept.mT, q) * self.scale
        d_value = _weighted_sum((p if z is None else p * z).mT, kept.mT, g_output)
        d_key, d_value = (
            t.unflatten(1, (groups, q.shape[1] // max(groups, 1))).sum(2) for t in (d_key, d_value)
        )
        d_extra: Any = (None, None)
        if self.extra_key is not None:
            d_extra = (t[:, :, columns:].sum(0) for t in (d_key, d_value))
        return [d_query, d_key[:, :, :columns], d_value[:, :, :columns], d_mask, d_key_mask, *d_extra]

    def _weights(self) -> tuple[Any, ...]:
        """Queries, every head's keys and values; and of all columns scores after softcap, kept, p, lse, z."""
        batch, heads, rows, _ = self.query.shape
        columns, extra, wide = self.key.shape[2], 0, self.wide
        q, k, v = (t.to(wide) for t in (self.query, self.key, self.value))
        if self.extra_key is not None and self.extra_value is not None:
            extra = self.extra_key.shape[1]
            k = torch.cat([k, self.extra_key.to(wide).expand(batch, -1, -1, -1)], 2)
            v = torch.cat([v, self.extra_value.to(wide).expand(batch, -1, -1, -1)], 2)
        if heads != k.shape[1]:
            k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))

        s = _products(q, k) * self.scale  # [B, H, L, S + X]
        if self.softcap > 0:
            s = self.softcap * torch.tanh(s / self.softcap)
        capped = s
        bias, kept = self._bias_and_kept()
        if bias is not None:
            s = s + _with_extra(bias, columns, extra, 0)
        if kept is not None:
            s = s.masked_fill(~_with_extra(kept, columns, extra, True), -math.inf)
        p, lse, kept = _softmax(s)
        z = None
        if self.dropout_seed is not None and self.dropout_p > 0:
            sizes = (batch, heads, rows, columns + extra, self.first_batch)
            drawn = dropout.kept_weights(self.dropout_seed, self.dropout_p, *sizes)
            z = drawn.to(wide) * dropout.keep_scale(self.dropout_p)
        return q, k, v, capped, kept, p, lse, z

    def _bias_and_kept(self) -> tuple[Any, Any]:
        """What is added to the scores, and where they take part; each None or of sizes [B, H, L, S] or 1."""
        bias: Any = None
        kept: Any = None
        left, right, offset = self.window
        slopes, device = self.alibi_slopes, self.query.device
        if slopes is not None or left >= 0 or right >= 0:
            i = torch.arange(self.query.shape[2], device=device)[:, None] + offset
            distance = torch.arange(self.key.shape[2], device=device) - i  # [L, S]
            if slopes is not None:
                bias = (-slopes.to(self.wide)[:, None, None] * distance.abs())[None]
            if left >= 0:
                kept = (distance >= -left)[None, None]
            if right >= 0:
                seen = (distance <= right)[None, None]
                kept = seen if kept is None else kept & seen
        for given in (self.mask, None if self.key_mask is None else self.key_mask[:, None, None, :]):
            if given is None:
                continue
            here = given
            if given.dtype != torch.bool:
                here = given != -math.inf  # NaN takes part
                number = given.to(self.wide)
                bias = number if bias is None else bias + number
            kept = here if kept is None else kept & here
        return bias, kept


@without_autocast
def projection_forward(
    input: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor:
    """Return ``input weight^T + bias``, [M, N]."""
    return linear(input, weight, bias)


@without_autocast
def projection_backward(
    grad_output: Tensor,  # [M, N]
    input: Tensor,
    weight: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return the gradients of input, weight and bias; empty where masked."""
    products = (lambda: grad_output @ weight, lambda: grad_output.mT @ input, lambda: grad_output.sum(0))
    return where_needed(products, output_mask, grad_output)


def _with_extra(t: Tensor, columns: int, extra: int, value: Any) -> Tensor:
    """Continue [..., S] or [..., 1] over the extra columns with `value`."""
    if extra == 0:
        return t
    return pad(t.expand(*t.shape[:-1], columns), (0, extra), value=value)


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
