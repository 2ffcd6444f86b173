"""A call's tensors and numbers, checked and in the form that the kernels of attention take."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..core.support import DTYPES
from .tiles import Tile, capability

INT32_MAX = 2**31 - 1
MOST_LENGTH = 2**29  # of rows, keys, offsets and windows: positions are 32-bit numbers
MOST_WIDTH = 256
LOG2E = 1 / math.log(2)
WEIGHTS = ("none", "mean", "heads")


def bits_of(number: float) -> int:
    """Those of a double, as a launch would narrow a float to float32."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def dense_rows(t: Tensor) -> Tensor:
    """`t`, or a copy of it if its last dimension is strided."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def strides_of(t: Tensor | None, names: Sequence[str]) -> dict[str, int]:
    """The first strides of `t` under `names`; 0 where there is no tensor."""
    return {name: 0 if t is None else t.stride(n) for n, name in enumerate(names)}


@dataclass(frozen=True)
class Call:
    """One call; query, key and value have dense rows, masks are bytes or numbers. See `of`."""

    op: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None  # expanded to [B, H, L, S]
    key_mask: Tensor | None
    extra_key: Tensor | None
    extra_value: Tensor | None
    alibi_slopes: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    dropout_seed: Tensor | None
    max_rows: int  # of a sample
    max_columns: int
    scale: float
    window_left: int
    window_right: int
    position_offset: int
    softcap: float
    dropout_p: float
    weights: str

    @classmethod
    def of(cls, op: str, tensors: Sequence[Any], options: Sequence[Any]) -> Call:
        """From the op's tensors and options; raises RuntimeError if a shape, dtype or device misfits."""
        query, key, value, mask, key_mask, extra_key, extra_value, slopes, cu_q, cu_k, seed = tensors
        max_q, max_k, scale, left, right, offset, softcap, dropout_p, weights = options
        _check_heads(op, query, key, value)
        packed = cu_q is not None
        _check_packed(op, query, cu_q, cu_k, (mask, key_mask, extra_key, extra_value), weights)
        batch, heads, rows, _size = query.shape
        columns = key.shape[2]
        _check_mask(op, "mask", mask, (batch, heads, rows, columns), query, broadcast=True)
        _check_mask(op, "key_mask", key_mask, (batch, columns), query, broadcast=False)
        _check_extra(op, extra_key, extra_value, query, key, value)
        if slopes is not None:
            _check(op, "alibi_slopes", slopes, (heads,), query, torch.float32)
        if weights not in WEIGHTS:
            raise ValueError(f"{op}: weights: got {weights!r}, expected one of {', '.join(WEIGHTS)}")
        if max(rows, columns, abs(offset)) >= MOST_LENGTH:
            raise RuntimeError(
                f"{op}: got {rows} rows, {columns} keys and offset {offset}, expected less than 2^29"
            )
        dropping = seed is not None and dropout_p > 0
        return cls(
            op, dense_rows(query), dense_rows(key), dense_rows(value),
            _bytes(None if mask is None else mask.expand(batch, heads, rows, columns)), _bytes(key_mask),
            None if extra_key is None else extra_key.contiguous(),
            None if extra_value is None else extra_value.contiguous(),
            None if slopes is None else slopes.contiguous(), cu_q, cu_k,
            seed.reshape(1) if dropping else None,
            min(max_q, rows) if packed else rows, min(max_k, columns) if packed else columns,
            scale, left if left < MOST_LENGTH * 2 else -1, right if right < MOST_LENGTH * 2 else -1, offset,
            softcap, dropout_p, weights,
        )  # fmt: skip

    @property
    def heads(self) -> int:
        """Of the query."""
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        """Of key and value."""
        return self.key.shape[1]

    @property
    def batch(self) -> int:
        """Samples, or packed sequences."""
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def extra(self) -> int:
        """Extra columns."""
        return 0 if self.extra_key is None else self.extra_key.shape[1]

    @property
    def wide(self) -> torch.dtype:
        """Of the arithmetic."""
        return torch.promote_types(self.query.dtype, torch.float32)

    @property
    def natural(self) -> bool:
        """Whether scores are natural logarithms: numbers are added to them, or the dtype is wide."""
        added = any(t is not None and t.dtype != torch.uint8 for t in (self.mask, self.key_mask))
        return added or self.query.dtype == self.wide

    @property
    def keep_scale(self) -> float:
        """What a weight that dropout keeps is multiplied by."""
        if self.dropout_seed is None:
            return 1.0
        return 0.0 if self.dropout_p >= 1 else 1 / (1 - self.dropout_p)

    def tile(self, kernel: str) -> Tile:
        """Blocks of `kernel`; of the shape of a sample alone, so that bits don't depend on B."""
        return Tile.of(
            kernel, self.query.shape[3], self.value.shape[3], self.query.element_size(),
            self.max_rows, self.max_columns, capability(),
            masked=self.mask is not None, padded=self.key_mask is not None,
            dropout=self.dropout_seed is not None, capped=self.softcap > 0,
        )  # fmt: skip

    def empty_rows(self) -> Tensor:
        """Uninitialised [B, H, L] of the arithmetic's dtype."""
        return torch.empty(self.query.shape[:3], dtype=self.wide, device=self.query.device)

    def grid(self, programs: int) -> tuple[int]:
        """One axis, which alone can have more than 65,535."""
        if programs > INT32_MAX:
            raise RuntimeError(f"{self.op}: got {programs} tiles, expected fewer than 2^31")
        return (programs,)

    def arguments(self, kernel: str, tiles: int) -> dict[str, Any]:
        """What all kernels take, of a grid with `tiles` for each head."""
        unit = 1.0 if self.natural else LOG2E
        capped = self.softcap > 0
        return {
            "q": self.query, "k": self.key, "v": self.value, "mask": self.mask, "key_mask": self.key_mask,
            "slopes": self.alibi_slopes, "cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k,
            "seed": self.dropout_seed, "heads": self.heads, "group": self.heads // self.key_heads,
            "rows": self.query.shape[2], "columns": self.key.shape[2], "total_rows": self.query.shape[2],
            "tiles": tiles, "scale": bits_of((self.softcap if capped else self.scale) * unit),
            "cap": bits_of(self.scale / self.softcap) if capped else None,
            "keep_scale": bits_of(self.keep_scale),
            "threshold": min(round(self.dropout_p * 2**32), 2**32 - 1),
            "left": self.window_left if self.window_left >= 0 else None,
            "right": self.window_right if self.window_right >= 0 else None, "offset": self.position_offset,
            **strides_of(self.query, ("q_b", "q_h", "q_l")), **strides_of(self.key, ("k_b", "k_g", "k_s")),
            **strides_of(self.value, ("v_b", "v_g", "v_s")),
            **strides_of(self.mask, ("m_b", "m_h", "m_l", "m_s")),
            **strides_of(self.key_mask, ("km_b", "km_s")),
            **self.constants(), **self.tile(kernel).arguments,
        }  # fmt: skip

    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for, beside their blocks."""
        tf32 = torch.backends.cuda.matmul.allow_tf32 and self.query.dtype == torch.float32
        return {
            "NATURAL": self.natural, "PRECISION": "tf32" if tf32 else "ieee",
            "D": self.query.shape[3], "V": self.value.shape[3],
        }  # fmt: skip

    def extras(self) -> dict[str, Any]:
        """Arguments of kernels that see extra columns."""
        return {"extra_key": self.extra_key, "extra_value": self.extra_value, "EXTRA": self.extra}

    def row_tiles(self, kernel: str) -> int:
        """Of a sample."""
        return triton.cdiv(self.max_rows, self.tile(kernel).rows)

    def column_tiles(self, kernel: str) -> int:
        """Of a sample, without its extra columns."""
        return triton.cdiv(self.max_columns, self.tile(kernel).columns)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _check(
    op: str, name: str, t: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    dtype = like.dtype if dtype is None else dtype
    if tuple(t.shape) != tuple(shape):
        raise RuntimeError(f"{op}: {name}: got shape {list(t.shape)}, expected {list(shape)}")
    if t.dtype != dtype or t.device != like.device:
        raise RuntimeError(f"{op}: {name}: got {t.dtype} on {t.device}, expected {dtype} on {like.device}")


def _check_heads(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 4 or t.dtype not in DTYPES:
            raise RuntimeError(
                f"{op}: {name}: got {t.dtype} of shape {list(t.shape)}, expected float32, "
                "float64, float16 or bfloat16 of 4 dimensions"
            )
        if t.shape[3] > MOST_WIDTH:
            raise RuntimeError(f"{op}: {name}: got head size {t.shape[3]}, expected at most {MOST_WIDTH}")
    batch, heads, _, size = query.shape
    groups, columns = key.shape[1:3]
    if (groups == 0) != (heads == 0) or (groups and heads % groups):
        raise RuntimeError(f"{op}: key: got {groups} heads, expected a divisor of the query's {heads}")
    _check(op, "key", key, (batch, groups, columns, size), query)
    _check(op, "value", value, (batch, groups, columns, value.shape[3]), query)


def _check_packed(
    op: str, query: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, others: Sequence[Tensor | None],
    weights: str,
) -> None:  # fmt: skip
    if cu_q is None and cu_k is None:
        return
    if cu_q is None or cu_k is None:
        raise RuntimeError(f"{op}: got one of cu_seqlens_q and cu_seqlens_k, expected both or neither")
    for name, t in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        _check(op, name, t, (max(cu_q.numel(), 1),), query, torch.int32)
    if query.shape[0] != 1 or any(t is not None for t in others) or weights != "none":
        raise RuntimeError(
            f"{op}: packed sequences: got a batch of {query.shape[0]}, expected 1, without masks, extra "
            "columns and weights"
        )
    if not (cu_q.is_contiguous() and cu_k.is_contiguous()):
        raise RuntimeError(f"{op}: got strided cu_seqlens, expected contiguous ones")


def _check_mask(
    op: str, name: str, mask: Tensor | None, shape: Sequence[int], query: Tensor, broadcast: bool
) -> None:
    if mask is None:
        return
    fits = mask.dim() == len(shape) and all(
        got == full or (broadcast and got == 1) for got, full in zip(mask.shape, shape, strict=True)
    )
    if not fits:
        sizes = f"{list(shape)}{', or 1 for any size' if broadcast else ''}"
        raise RuntimeError(f"{op}: {name}: got shape {list(mask.shape)}, expected {sizes}")
    if mask.dtype not in (torch.bool, query.dtype) or mask.device != query.device:
        raise RuntimeError(
            f"{op}: {name}: got {mask.dtype} on {mask.device}, expected torch.bool or {query.dtype} on "
            f"{query.device}"
        )


def _check_extra(
    op: str, extra_key: Tensor | None, extra_value: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> None:
    if extra_key is None and extra_value is None:
        return
    if extra_key is None or extra_value is None:
        raise RuntimeError(f"{op}: got one of extra_key and extra_value, expected both or neither")
    extra = extra_key.shape[1] if extra_key.dim() == 3 else 0
    if not 1 <= extra <= 16:
        raise RuntimeError(f"{op}: extra_key: got shape {list(extra_key.shape)}, expected [G, X, D], X to 16")
    _check(op, "extra_key", extra_key, (key.shape[1], extra, query.shape[3]), query)
    _check(op, "extra_value", extra_value, (key.shape[1], extra, value.shape[3]), query)
