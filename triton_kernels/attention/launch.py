"""Launchers of attention, with the signatures of the ops: see `fusednn.attention.reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.checks import device_guard, gradients_in_order
from .arguments import Rows
from .call import Call
from .forward import attention_forward_kernel
from .gradients import NAMES, Gradients
from .tiles import FORWARD, SCORES
from .weights import attention_weights_kernel


def _output_and_lse(call: Call, low: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output [B, H, L, V], [B, L, H, V] in memory, and lse [B, H, L]."""
    batch, heads, rows, _ = call.query.shape
    output = call.query.new_empty(batch, rows, heads, call.value.shape[3]).transpose(1, 2)
    lse = call.empty_rows()
    if call.packed:  # sequences need not cover all rows
        output.zero_()
        lse.fill_(-torch.inf)
    tiles = call.row_tiles(FORWARD)
    programs = call.batch * heads * tiles
    call.launch(attention_forward_kernel, FORWARD, programs, tiles, Rows.of(output), lse, low)
    return output, lse


def _weights(call: Call, lse: Tensor, low: Tensor | None) -> Tensor:
    batch, heads, rows, _ = call.query.shape
    outer = (batch,) if call.weights == "mean" else (batch, heads)
    weights = call.query.new_empty(*outer, rows, call.key.shape[2] + call.extra)
    tiles, columns = call.row_tiles(SCORES), call.column_tiles(SCORES) + (call.extra > 0)
    if weights.numel() == 0:
        return weights
    if heads == 0:
        return weights.fill_(torch.nan)  # as torch's mean of nothing
    each = heads if call.weights == "mean" else 1
    programs = weights.shape[:-2].numel() * tiles * columns
    call.launch(attention_weights_kernel, SCORES, programs, tiles, lse, low, weights, columns, each)
    return weights


def attention_forward(
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
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window_left: int,
    window_right: int,
    position_offset: int,
    softcap: float,
    dropout_p: float,
    weights: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, L, V], lse [B, H, L] and weights, of the arguments that the reference describes.

    Weights are those after dropout: [0] if none are asked for, their mean [B, L, S + X], or those of all
    heads [B, H, L, S + X]. Raises RuntimeError if a shape, dtype or device does not fit.
    """
    call = Call.of(
        "attention_forward",
        (query, key, value, mask, key_mask, extra_key, extra_value, alibi_slopes, cu_seqlens_q, cu_seqlens_k,
         dropout_seed),
        (max_seqlen_q, max_seqlen_k, scale, window_left, window_right, position_offset, softcap, dropout_p,
         weights),
    )  # fmt: skip
    low = call.empty_rows() if call.natural and weights != "none" else None
    with device_guard(query):
        output, lse = _output_and_lse(call, low)
        found = query.new_empty(0) if weights == "none" else _weights(call, lse, low)
    return output, lse, found


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
    """Gradients of `attention_forward`, whose weights are made again from lse; empty where masked.

    `output_mask` says whether query, key, value, mask, key_mask, extra_key and extra_value need theirs; that
    of a mask has its own shape. Raises RuntimeError if a shape, dtype or device does not fit.
    """
    given = dict(zip(NAMES, (query, key, value, mask, key_mask, extra_key, extra_value), strict=True))
    call = Call.of(
        "attention_backward",
        (*given.values(), alibi_slopes, cu_seqlens_q, cu_seqlens_k, dropout_seed),
        (max_seqlen_q, max_seqlen_k, scale, window_left, window_right, position_offset, softcap, dropout_p,
         weights),
    )  # fmt: skip
    needed = {name for name, on in zip(NAMES, output_mask, strict=True) if on and given[name] is not None}
    tensors = {name: t for name, t in given.items() if t is not None}
    grads = (grad_output, grad_lse, None if weights == "none" else grad_weights)
    found = Gradients(call, grads, output, lse, needed).run(tensors) if needed else {}
    found = {name: _laid_out(grad, tensors[name]) for name, grad in found.items()}
    return gradients_in_order(found, NAMES, query)


def _laid_out(grad: Tensor, tensor: Tensor) -> Tensor:
    """The gradient in the memory layout that torch gives to what is like its tensor."""
    like = torch.empty_like(tensor)
    return grad if grad.stride() == like.stride() else like.copy_(grad)
