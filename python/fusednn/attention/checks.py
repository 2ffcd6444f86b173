"""Arguments of attention, checked with torch's kind of error, in the form that the ops take."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_broadcasts, check_device, check_shape, check_tensor


def check_heads(name: str, query: int, key: int, value: int, grouped: bool) -> None:
    """Raise RuntimeError unless keys and values have one head for each of the query's, or for a group."""
    if key != value:
        raise RuntimeError(f"{name}: key and value must have as many heads, but got {key} and {value}")
    if query != key and not (grouped and key and query % key == 0):
        expected = "a multiple for enable_gqa=True" if grouped else "as many, or enable_gqa=True"
        raise RuntimeError(f"{name}: query has {query} heads and key {key}; expected {expected}")


def check_dropout(name: str, p: float) -> None:
    """Raise ValueError unless `p` is a probability."""
    if not 0 <= p <= 1:
        raise ValueError(f"{name}: dropout_p: got {p}, expected a probability between 0 and 1")


def softcap_of(name: str, softcap: float | None) -> float:
    """Return the op's number, 0 for none.

    Raises:
        ValueError: it is not positive.
    """
    if softcap is None:
        return 0.0
    if not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap: got {softcap}, expected a positive number or None")
    return float(softcap)


def window_of(name: str, window: int | Sequence[int | None] | None, causal: bool) -> tuple[int, int]:
    """Return how many positions to the left and to the right of its own a row sees; -1: all.

    Raises:
        TypeError: a number is not an integer.
        ValueError: a number is below -1, or there are not two.
    """
    pair = window if isinstance(window, (tuple, list)) else (window, window)
    if len(pair) != 2:
        raise ValueError(f"{name}: window: got {window}, expected a number or (left, right)")
    left, right = (-1 if side is None else operator.index(side) for side in pair)
    if left < -1 or right < -1:
        raise ValueError(
            f"{name}: window: got {window}, expected numbers of positions, -1 or None for no limit"
        )
    return left, 0 if causal else right


def slopes_of(name: str, slopes: Tensor | None, heads: int, device: torch.device) -> Tensor | None:
    """Return ALiBi's slopes [H] as the ops take them.

    Raises:
        RuntimeError: there is not one for each head, or they are elsewhere.
    """
    check_tensor(name, "alibi_slopes", slopes, optional=True)
    if slopes is None:
        return None
    if tuple(slopes.shape) != (heads,) or slopes.device != device:
        raise RuntimeError(
            f"{name}: alibi_slopes has shape {list(slopes.shape)} on {slopes.device}, "
            f"expected [{heads}] on {device}, one for each head"
        )
    if slopes.requires_grad:
        raise RuntimeError(
            f"{name}: alibi_slopes: got a tensor that requires a gradient, which it can't have"
        )
    return slopes.to(torch.float32)


def mask_kind(name: str, argument: str, mask: Tensor, query: Tensor) -> Tensor:
    """Return a mask as bool or of the query's dtype.

    Raises:
        RuntimeError: its dtype or device does not fit.
    """
    check_device(name, "query", query.device, argument, mask)
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise RuntimeError(
            f"{name}: expected {argument} to be of dtype bool, float32 or query's {query.dtype}, "
            f"got {mask.dtype}"
        )
    return mask if mask.dtype == torch.bool else mask.to(query.dtype)


def kept_of(name: str, argument: str, mask: Tensor, query: Tensor) -> Tensor:
    """Return a mask of torch.nn (True: ignored) as the ops take it (True: takes part).

    Raises:
        RuntimeError: its dtype or device does not fit.
    """
    mask = mask_kind(name, argument, mask, query)
    return ~mask if mask.dtype == torch.bool else mask


def mask_of(name: str, mask: Tensor | None, query: Tensor, scores: Sequence[Any]) -> Tensor | None:
    """Return a mask that broadcasts to ``scores`` [..., H, L, S] as 4-D, without copying what is broadcast.

    Raises:
        RuntimeError: its shape, dtype or device does not fit.
    """
    if mask is None:
        return None
    mask = mask_kind(name, "attn_mask", mask, query)
    check_broadcasts(name, "attn_mask", mask, scores)
    mask = mask.view(*(1,) * (max(len(scores), 4) - mask.dim()), *mask.shape)
    if mask.dim() > 4:  # several batch dimensions
        lead = scores[:-3] if any(n != 1 for n in mask.shape[:-3]) else (1,) * (mask.dim() - 3)
        mask = mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)
    return mask


def key_mask_of(name: str, padding: Tensor | None, query: Tensor, batch: Any, columns: Any) -> Tensor | None:
    """Return key_padding_mask [B, S] (True: padding) as the ops take it (True: takes part).

    Raises:
        RuntimeError: its shape, dtype or device does not fit.
    """
    if padding is None:
        return None
    check_shape(name, "key_padding_mask", padding, (batch, columns), "the keys")
    return kept_of(name, "key_padding_mask", padding, query)


def check_extra(name: str, key: Tensor, value: Tensor, extra_key: Any, extra_value: Any) -> None:
    """Raise RuntimeError unless virtual columns come as [G, X, D] and [G, X, V], or not at all."""
    if extra_key is None and extra_value is None:
        return
    if extra_key is None or extra_value is None:
        raise RuntimeError(f"{name}: expected both extra_key and extra_value, or neither")
    for argument, extra, like in (("extra_key", extra_key, key), ("extra_value", extra_value, value)):
        columns = extra_key.shape[1] if extra_key.dim() == 3 else "X"
        expected: list[Any] = [like.shape[1], columns, like.shape[3]]
        check_shape(name, argument, extra, expected, f"heads of size {list(like.shape)}")


def cu_seqlens_of(name: str, argument: str, cu_seqlens: Any, total: Any, device: torch.device) -> Tensor:
    """Return the bounds [N + 1] of packed sequences as int32.

    Raises:
        RuntimeError: they are not [N + 1] integers on the device, or don't ascend from 0 to the number of
            rows.
        TypeError: not a tensor.
    """
    check_tensor(name, argument, cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(
            f"{name}: {argument}: got {cu_seqlens.dtype} of size {list(cu_seqlens.shape)}, "
            "expected int32 or int64 of size [N + 1]"
        )
    check_device(name, "query", device, argument, cu_seqlens)
    if type(cu_seqlens) is Tensor and device.type == "cpu" and not torch.compiler.is_compiling():
        ascends = bool((cu_seqlens.diff() >= 0).all())
        if not ascends or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total:
            raise RuntimeError(
                f"{name}: {argument}: got {cu_seqlens.tolist()}, "
                f"expected numbers that ascend from 0 to {total}"
            )
    return cu_seqlens.to(torch.int32)
