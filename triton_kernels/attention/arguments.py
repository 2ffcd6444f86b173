"""The named tuples that the kernels of attention take."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Rows [B, H, n, d] that are dense in memory, and the strides of the other dimensions."""

    data: Any
    batch: Any
    head: Any
    row: Any

    @classmethod
    def of(cls, t: Tensor | None) -> Rows | None:
        """Of a tensor, if there is one."""
        return None if t is None else cls(t, *t.stride()[:3])


class Scores(NamedTuple):
    """What has an element for each score [B, H, L, S], and its strides."""

    data: Any
    batch: Any
    head: Any
    row: Any
    column: Any

    @classmethod
    def of(cls, t: Tensor | None) -> Scores | None:
        """Of a tensor, if there is one."""
        return None if t is None else cls(t, *t.stride())


class KeyMask(NamedTuple):
    """A mask [B, S] and its strides."""

    data: Any
    batch: Any
    column: Any


class Inputs(NamedTuple):
    """Tensors of a call; all but the first three may be None."""

    query: Any  # Rows
    key: Any  # Rows
    value: Any  # Rows
    mask: Any  # Scores, bytes or numbers
    key_mask: Any  # KeyMask, likewise
    extra_key: Any  # [G, X, D]
    extra_value: Any  # [G, X, V]
    slopes: Any  # [H]
    cu_seqlens_q: Any  # [N + 1]
    cu_seqlens_k: Any  # [N + 1]
    seed: Any  # [1]


class Incoming(NamedTuple):
    """What the backward is given, or has made for itself."""

    lse: Any  # [B, H, L]
    low: Any  # [B, H, L]: what lse has lost, to base 2; None unless scores are natural
    delta: Any  # [B, H, L]
    output: Any  # Rows: gradient, or None
    weights: Any  # Scores: gradient, or None


class Numbers(NamedTuple):
    """Run-time numbers; those that are not integers come as the bits of doubles."""

    heads: Any
    group: Any  # query heads of a key head
    rows: Any
    columns: Any
    total_rows: Any  # of lse: those of all packed sequences
    tiles: Any  # of a head
    scale: Any  # in the units of the scores; or the softcap
    cap: Any  # None, or the scale over the softcap
    keep_scale: Any  # of a weight that dropout keeps
    threshold: Any  # of dropout
    left: Any  # of the window; None: no limit
    right: Any
    offset: Any
    unscaled: Any  # the scale itself
    weight_scale: Any  # of the gradient of the weights


class Constants(NamedTuple):
    """What kernels are compiled for."""

    NATURAL: Any  # whether scores are natural logarithms, or to base 2
    PRECISION: Any
    EXTRA: Any  # extra columns
    D: Any
    V: Any
    BLOCK_M: Any  # rows of a tile
    BLOCK_N: Any  # columns
    BLOCK_D: Any
    BLOCK_V: Any


class Place(NamedTuple):
    """A head of a sample, or of a packed sequence: made in the kernel."""

    sequence: Any
    batch: Any  # in memory, 64 bits
    head: Any
    key_head: Any
    first_row: Any
    first_key: Any
    rows: Any
    columns: Any
