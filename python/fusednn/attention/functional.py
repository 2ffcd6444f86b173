"""Scaled dot-product attention as functions: check, then call the op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_floating, check_same_kind, check_tensor, check_tensors
from ..core.transforms import autocast, autocast_enabled
from . import checks, ops

Window = int | Sequence[int | None] | None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
    return_weights: str | None = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    position_offset: int = 0,
) -> Any:
    """``softmax(scale q k^T + mask) v``: torch's ``scaled_dot_product_attention``, and more of it.

    Vaswani et al., "Attention is all you need" (2017), computed by tiles (Dao et al., 2022): the scores never
    leave the core. A row that has nothing to attend to gives 0, in the output, the weights and the gradients,
    where torch may give NaN; what is masked for a row never reaches it, NaN included.

    Args:
        query: ``[..., H, L, D]``, floating point. Leading dimensions broadcast.
        key: ``[..., H, S, D]``; with `enable_gqa` ``[..., G, S, D]``, G dividing H: query head h reads key
            head ``h // (H / G)``.
        value: ``[..., H or G, S, V]``.
        attn_mask: bool (True takes part) or floating point (added to the scores; gets a gradient),
            broadcastable to ``[..., H, L, S]``; what is broadcast is not copied.
        dropout_p: probability that a weight is set to 0; the others are divided by ``1 - dropout_p``. Drawn
            by counter (Philox) from one number of torch's generator: the same mask in every backend.
        is_causal: row i sees keys up to i (+ `position_offset`); may come together with a mask.
        scale: of the scores; None: ``1 / sqrt(D)``.
        enable_gqa: allow fewer key heads than query heads.
        key_padding_mask: ``[B, S]``, as in ``nn.MultiheadAttention``: bool, **True is padding, ignored**, or
            floating point, added to the scores of all heads and rows (gets a gradient).
        return_lse: return the log of the sum of exponentials of each row's scores, too.
        return_weights: ``"mean"``: also return the weights averaged over heads; ``"heads"``: each head's.
            After dropout, as ``nn.MultiheadAttention`` returns them. The average needs no ``[B, H, L, S]``.
        window: sliding window: a row sees that many keys to either side of its position, or (left, right);
            None and -1: no limit.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before masks are added (Gemma 2).
        alibi_slopes: ``[H]``: ``slope |i + position_offset - j|`` is taken off the scores (Press et al.,
            2022).
        extra_key: ``[G, X, D]``: X more columns, after the S of `key`, the same for every sample and never
            masked, such as ``nn.MultiheadAttention``'s ``bias_k``; with `extra_value`.
        extra_value: ``[G, X, V]``.
        position_offset: position of row 0 among the keys, for `is_causal`, `window` and `alibi_slopes`: 0 as
            in torch; ``S - L`` for the last rows of a sequence whose keys are kept.

    Returns:
        The output ``[..., H, L, V]`` in query's dtype; then, if asked for, lse ``[..., H, L]`` in float32
        (float64 for float64 input), -inf where there is nothing to attend to; then weights
        ``[..., L, S + X]`` or ``[..., H, L, S + X]``. A tuple if more than the output; all are
        differentiable.

    Under autocast all tensors are cast to the dtype of autocast, as torch does.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.
        TypeError: an argument is of another type.
        ValueError: a number or name is out of range.
    """
    name = "scaled_dot_product_attention"
    numbers: dict[str, Any] = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "position_offset": position_offset,
    }
    others: Any = (attn_mask, key_padding_mask, return_weights, alibi_slopes, extra_key, extra_value)
    if not return_lse and all(other is None for other in others) and _plain(query, key, value):
        return attend(name, query, key, value, **numbers, wanted=("output",))[0]
    check_tensors(name, query=query, key=key, value=value)
    check_tensors(name, optional=True, attn_mask=attn_mask, key_padding_mask=key_padding_mask)
    check_tensors(name, optional=True, extra_key=extra_key, extra_value=extra_value)
    query, key, value, attn_mask, key_padding_mask, extra_key, extra_value = autocast(
        query, key, value, attn_mask, key_padding_mask, extra_key, extra_value
    )
    others = (("key", key), ("value", value), ("extra_key", extra_key), ("extra_value", extra_value))
    check_floating(name, "query", query)
    check_same_kind(name, "query", query, others)
    if return_weights not in (None, "mean", "heads"):
        raise ValueError(f"{name}: return_weights: got {return_weights!r}, expected None, 'mean' or 'heads'")
    lead = _check_shapes(name, query, key, value, enable_gqa)
    q, k, v = (_four_dimensional(t, lead) for t in (query, key, value))
    checks.check_extra(name, k, v, extra_key, extra_value)
    wanted = {"output": True, "lse": return_lse, "weights": return_weights is not None}
    found = attend(
        name,
        q,
        k,
        v,
        checks.mask_of(name, attn_mask, query, (*lead, q.shape[1], q.shape[2], k.shape[2])),
        checks.key_mask_of(name, key_padding_mask, query, q.shape[0], k.shape[2]),
        extra_key,
        extra_value,
        checks.slopes_of(name, alibi_slopes, q.shape[1], query.device),
        **numbers,
        weights=return_weights or "none",
        wanted=[part for part in wanted if wanted[part]],
    )
    results = []
    for part, tensor in zip(wanted, found, strict=True):
        if not wanted[part]:
            continue
        if query.dim() < 4:
            tensor = tensor.squeeze(0)
            if query.dim() == 2 and not (part == "weights" and return_weights == "mean"):
                tensor = tensor.squeeze(0)
        elif len(lead) > 1:
            tensor = tensor.reshape(*lead, *tensor.shape[1:])
        results.append(tensor)
    return results[0] if len(results) == 1 else tuple(results)


def attend(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    longest: tuple[int, int] = (0, 0),
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    position_offset: int = 0,
    weights: str = "none",
    wanted: Sequence[str] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the op on tensors that were checked, in its form; numbers are looked at in the name of the caller.

    `bounds` and `longest` are of packed queries and keys. What is not `wanted` of output, lse and weights (by
    default all is) may be None.
    """
    checks.check_dropout(name, dropout_p)
    sides, cap = checks.window_of(name, window, is_causal), checks.softcap_of(name, softcap)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[3], 1))
    return ops.attention_forward(
        query, key, value, mask, key_mask, extra_key, extra_value, alibi_slopes, *bounds,
        _seed(dropout_p, query.device), *longest, scale, *sides, position_offset, cap, float(dropout_p),
        weights, wanted=wanted,
    )  # fmt: skip


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention within each of N sequences that lie packed, one after the other, without padding.

    Args:
        query: ``[T_q, H, D]``, the rows of all sequences.
        key: ``[T_k, G, D]``, G dividing H.
        value: ``[T_k, G, V]``.
        cu_seqlens_q: ``[N + 1]`` int32 or int64: sequence n has rows ``cu_seqlens_q[n]`` to
            ``cu_seqlens_q[n + 1]``.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: the longest sequence, or more; None: found from the bounds (which waits for a device).
        max_seqlen_k: the same of the keys.
        dropout_p: as in :func:`scaled_dot_product_attention`, and so are the arguments after it; positions
            count from each sequence's first row.
        is_causal: row i of a sequence sees its keys up to i.
        scale: of the scores.
        window: sliding window.
        softcap: of the scores.
        alibi_slopes: ``[H]``.
        return_lse: return lse ``[H, T_q]``, too.

    Returns:
        ``[T_q, H, V]``, or with lse a tuple.

    Raises:
        RuntimeError: a shape, dtype, device or bound does not fit; the text names the argument.
        TypeError: an argument is of another type.
        ValueError: a number is out of range.
    """
    name = "varlen_attention"
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, argument, tensor)
        if tensor.dim() != 3:
            raise RuntimeError(
                f"{name}: Expected {argument} to be 3D [rows, heads, size], but got size {list(tensor.shape)}"
            )
    query, key, value = autocast(query, key, value)
    check_floating(name, "query", query)
    check_same_kind(name, "query", query, (("key", key), ("value", value)))
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    _check_shapes(name, q, k, v, grouped=True)
    bounds_q = checks.cu_seqlens_of(name, "cu_seqlens_q", cu_seqlens_q, query.shape[0], query.device)
    bounds_k = checks.cu_seqlens_of(name, "cu_seqlens_k", cu_seqlens_k, key.shape[0], query.device)
    if bounds_q.shape != bounds_k.shape:
        raise RuntimeError(
            f"{name}: cu_seqlens_k has shape {list(bounds_k.shape)}, "
            f"expected {list(bounds_q.shape)} as cu_seqlens_q"
        )
    longest_q = _longest(name, "max_seqlen_q", bounds_q, max_seqlen_q)
    longest_k = _longest(name, "max_seqlen_k", bounds_k, max_seqlen_k)
    output, lse, _ = attend(
        name,
        q,
        k,
        v,
        alibi_slopes=checks.slopes_of(name, alibi_slopes, q.shape[1], query.device),
        bounds=(bounds_q, bounds_k),
        longest=(longest_q, longest_k),
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    found = output[0].transpose(0, 1)
    return (found, lse[0]) if return_lse else found


def _plain(query: Any, key: Any, value: Any) -> bool:
    """Whether nothing is left to check: a step of decoding takes as long as the checks."""
    tensors = (query, key, value)
    return (
        all(type(t) is Tensor and t.dim() == 4 for t in tensors)
        and query.shape[:2] == key.shape[:2]
        and query.shape[3] == key.shape[3]
        and key.shape[:3] == value.shape[:3]
        and query.dtype == key.dtype == value.dtype
        and query.dtype.is_floating_point
        and query.device == key.device == value.device
        and not torch.compiler.is_compiling()
        and not autocast_enabled(query.device)
    )


def _check_shapes(name: str, query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> tuple[Any, ...]:
    """Return the leading dimensions, before heads, that all broadcast to."""
    dims = query.dim()
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2 or tensor.dim() != dims:
            raise RuntimeError(
                f"{name}: Expected query, key and value of as many dimensions, at least 2, "
                f"but {argument} has size {list(tensor.shape)}"
            )
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            f"{name}: query and key must have the same last dimension, "
            f"but got sizes {list(query.shape)} and {list(key.shape)}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"{name}: key and value must have the same length, "
            f"but got sizes {list(key.shape)} and {list(value.shape)}"
        )
    if dims > 2:
        checks.check_heads(name, query.shape[-3], key.shape[-3], value.shape[-3], grouped)
    if dims < 4:
        return (1,)
    if dims == 4 and query.shape[0] == key.shape[0] == value.shape[0]:
        return (query.shape[0],)
    try:
        return tuple(torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value))))
    except RuntimeError as error:
        raise RuntimeError(f"{name}: batch dimensions of query, key and value differ: {error}") from None


def _four_dimensional(tensor: Tensor, lead: tuple[Any, ...]) -> Tensor:
    if tensor.dim() < 4:
        return tensor.view(*(1,) * (4 - tensor.dim()), *tensor.shape)
    if tensor.dim() == 4:
        return tensor if tensor.shape[0] == lead[0] else tensor.expand(*lead, -1, -1, -1)
    return tensor.expand(*lead, -1, -1, -1).flatten(0, -4)


def _seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """One number of torch's generator, drawn on the device, so that nothing waits for it."""
    if dropout_p <= 0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _longest(name: str, argument: str, bounds: Tensor, given: int | None) -> int:
    if given is not None and (bounds.device.type != "cpu" or torch.compiler.is_compiling()):
        return given
    longest = int(bounds.diff().max()) if bounds.shape[0] > 1 else 0
    if given is not None and given < longest:
        raise RuntimeError(f"{name}: {argument}: got {given}, but the longest sequence has {longest} rows")
    return longest if given is None else given
