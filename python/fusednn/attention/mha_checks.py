"""Input of multi-head attention, checked in the order and with the types of error of torch's layer."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.transforms import autocast
from . import checks

NAME = "MultiheadAttention"


class Layer(NamedTuple):
    """What a MultiheadAttention brings to a call."""

    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    num_kv_heads: int
    batch_first: bool
    in_proj: tuple[Tensor, ...]  # [E + 2 * kv_dim, E], or weights of query, key and value
    in_proj_bias: Tensor | None  # [E + 2 * kv_dim]
    out_proj: tuple[Tensor, Tensor | None]
    bias_k: Tensor | None  # [1, 1, kv_dim]
    bias_v: Tensor | None
    add_zero_attn: bool
    dropout_p: float  # 0 in inference
    window: int | tuple[int, int] | None
    softcap: float | None
    rotary_base: float  # 0: none
    alibi: bool

    @property
    def extra_columns(self) -> bool:
        """Whether there are columns after the keys."""
        return self.bias_k is not None or self.add_zero_attn


def check_mask_dtypes(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, names: tuple[str, str]
) -> None:
    """Raise AssertionError unless masks are bool or floating; warn, as torch does, if one is either."""
    for name, mask in zip(names, (key_padding_mask, attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"{name}: got {mask.dtype}, only bool and floating types are supported")
    if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
        warnings.warn(
            f"Support for mismatched {names[0]} and {names[1]} is deprecated. "
            "Use same type for both instead.",
            stacklevel=3,
        )


def check_call(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """Raise what torch's layer raises for such input, naming the argument."""
    if key_padding_mask is not None or attn_mask is not None:
        check_mask_dtypes(key_padding_mask, attn_mask, ("key_padding_mask", "attn_mask"))
    _check_ranks(query, key, value, key_padding_mask, attn_mask)
    if is_causal and attn_mask is None:
        raise RuntimeError(
            f"{NAME}: is_causal is a hint on attn_mask: got is_causal=True and no attn_mask, expected one, "
            "e.g. of torch.nn.Transformer.generate_square_subsequent_mask"
        )
    check_features(layer, query, key, value)
    if query.dim() == 3:
        axis = 0 if layer.batch_first else 1
        batch, keys = query.shape[axis], key.shape[1 - axis]
        if key.shape[axis] != batch:
            raise RuntimeError(
                f"{NAME}: key has size {list(key.shape)}, expected a batch of {batch} for query of size "
                f"{list(query.shape)}"
            )
        length = query.shape[1 - axis]
    else:
        batch, length, keys = 1, query.shape[0], key.shape[0]
    if attn_mask is not None:
        _check_attn_mask(attn_mask, batch * layer.num_heads, length, keys, query.dim() == 3)
    if key_padding_mask is not None:
        expected = (batch, keys) if query.dim() == 3 else (keys,)
        if key_padding_mask.shape != expected:
            raise AssertionError(
                f"{NAME}: key_padding_mask has shape {list(key_padding_mask.shape)}, "
                f"expected {list(expected)}"
            )


def check_features(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise AssertionError unless the features are those that the projections take."""
    if query.shape[-1] != layer.embed_dim:
        raise AssertionError(
            f"{NAME}: query has {query.shape[-1]} features, expected embed_dim={layer.embed_dim}"
        )
    if key is not value and key.shape[:-1] != value.shape[:-1]:
        raise AssertionError(
            f"{NAME}: value has size {list(value.shape)}, expected the positions of key, "
            f"of size {list(key.shape)}"
        )
    for name, tensor, expected in (("key", key, layer.kdim), ("value", value, layer.vdim)):
        if tensor.shape[-1] != expected:
            # torch's product of packed weights raises RuntimeError, its check of separate ones AssertionError
            packed = len(layer.in_proj) == 1 and key.shape == value.shape
            raise (RuntimeError if packed else AssertionError)(
                f"{NAME}: {name} has {tensor.shape[-1]} features, expected {expected}"
            )


def _check_ranks(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> None:
    rank = query.dim()
    expected = (
        ("query", query, (2, 3), "unbatched or batched"),
        ("key", key, (rank,), "as query is"),
        ("value", value, (rank,), "as query is"),
        ("key_padding_mask", key_padding_mask, (rank - 1,), f"for a {rank}-D query"),
        ("attn_mask", attn_mask, (2, 3), "[L, S] or [B * num_heads, L, S]"),
    )
    for name, tensor, ranks, why in expected:
        if tensor is not None and tensor.dim() not in ranks:
            allowed = " or ".join(f"{r}-D" for r in ranks)
            raise AssertionError(
                f"{NAME}: Expected {name} to be {allowed} ({why}), got {tensor.dim()}-D instead"
            )


def _check_attn_mask(mask: Tensor, heads: int, length: int, keys: int, batched: bool) -> None:
    expected = (length, keys) if mask.dim() == 2 else (heads, length, keys)
    if mask.shape != expected:
        error = RuntimeError if batched or mask.dim() == 2 else AssertionError
        raise error(f"{NAME}: attn_mask has shape {list(mask.shape)}, expected {list(expected)}")


def masks_of(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return masks of checked shapes as the op takes them for the heads `q` [B, H, L, D].

    Raises:
        RuntimeError: a dtype or device does not fit.
    """
    _, mask, key_mask = autocast(q, attn_mask, key_padding_mask)
    if mask is not None:
        mask = checks.kept_of(NAME, "attn_mask", mask, q)
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (q.shape[0], q.shape[1]))
    if key_mask is not None:
        key_mask = checks.kept_of(NAME, "key_padding_mask", key_mask, q)
    return mask, key_mask


def check_nested(layer: Layer, inputs: tuple[Tensor, ...], masked: bool, is_causal: bool) -> None:
    """Raise AssertionError, as torch does, for nested tensors with what they don't go with."""
    reasons = []
    for name, tensor in zip(("query", "key", "value"), inputs):
        if not tensor.is_nested or tensor.layout != inputs[0].layout:
            reasons.append(f"{name}: got a tensor that is not nested or of another layout than query")
    if masked:
        reasons.append("key_padding_mask and attn_mask: expected None, the sequences have their lengths")
    if is_causal:
        reasons.append("is_causal: got True, a hint on attn_mask, expected False")
    if layer.extra_columns:
        reasons.append("add_bias_kv and add_zero_attn: expected False")
    if not layer.batch_first:
        reasons.append("batch_first: got False, expected True")
    if reasons:
        raise AssertionError(f"{NAME} with nested tensors: {'; '.join(reasons)}")


def check_options(
    head_dim: int,
    num_heads: int,
    num_kv_heads: int | None,
    window: int | tuple[int, int] | None,
    softcap: float | None,
    rotary: bool | float,
) -> None:
    """Raise ValueError, or TypeError for a window of no integers, for an option that can't be."""
    if num_kv_heads is not None and (num_kv_heads <= 0 or num_heads % num_kv_heads):
        raise ValueError(
            f"{NAME}: num_kv_heads: got {num_kv_heads}, expected a divisor of num_heads={num_heads}"
        )
    checks.window_of(NAME, window, causal=False)
    checks.softcap_of(NAME, softcap)
    if rotary is not False:
        if not rotary > 0:
            raise ValueError(f"{NAME}: rotary: got {rotary}, expected True, False or a positive base")
        if head_dim % 2:
            raise ValueError(f"{NAME}: rotary: got heads of {head_dim} features, expected an even number")
