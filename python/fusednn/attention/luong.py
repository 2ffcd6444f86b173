"""The attention of a sequence-to-sequence decoder (Luong, Pham & Manning, 2015)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..core.checks import check_positive, check_same_kind, check_shape, choice
from ..core.transforms import autocast_enabled
from .functional import scaled_dot_product_attention

SCORES = ("dot", "general", "concat")
_NAME = "luong_attention"


def luong_attention(
    hidden: Tensor,
    source: Tensor,
    weight: Tensor | None = None,
    v: Tensor | None = None,
    *,
    source_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Compare decoder states with encoder outputs, softmax over these, and average them by it.

    The global attention of Luong, Pham & Manning (2015), eq. 7 and 8; for a decoder state h and encoder
    outputs s the score is

    * dot, ``h^T s``: no `weight`;
    * general, ``h^T W s``: `weight` W ``[Hd, He]``;
    * concat, ``v^T tanh(W [h; s])``: `weight` W ``[A, Hd + He]`` and `v` ``[A]``. It takes O(B·T·S·A) memory.

    Args:
        hidden: decoder states ``[B, T, Hd]``, or one step ``[B, Hd]``.
        source: encoder outputs ``[B, S, He]``; He is Hd for dot.
        weight: W_a of the paper, or None.
        v: v_a of the paper, or None.
        source_padding_mask: bool ``[B, S]``, True: not a part of the sequence; what `source` holds there is
            not read.

    Returns:
        The context ``[B, T, He]``, and weights ``[B, T, S]``, without T for one step; of the dtype of
        `hidden`, float32 accumulation. Where a sequence has nothing to attend to both are 0, and so are
        gradients.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.
    """
    _check(hidden, source, weight, v, source_padding_mask)
    if hidden.dim() == 2:
        context, weights = _attend(hidden.unsqueeze(1), source, weight, v, source_padding_mask)
        return context.squeeze(1), weights.squeeze(1)
    return _attend(hidden, source, weight, v, source_padding_mask)


class LuongAttention(nn.Module):
    r"""The attention of a sequence-to-sequence decoder (Luong, Pham & Manning, 2015; global attention).

    ``h~ = tanh(W_c [c; h])``, with the context c an average of the encoder's outputs s by weights
    ``softmax(score(h, s))``:

    * ``score="dot"``: ``h^T s``;
    * ``score="general"``: ``h^T W_a s``;
    * ``score="concat"``: ``v_a^T tanh(W_a [h; s])``.

    The decoder's step comes first and attention after it, so all steps of teacher forcing can be attended
    in one call ``[B, T, Hd]``; with input feeding, or in an inference loop, call it with one step
    ``[B, Hd]`` and give h~ to the next. Parameters are those of the paper: ``score.weight`` W_a, ``[Hd, He]``
    (general) or ``[A, Hd + He]`` (concat), ``v.weight`` v_a ``[1, A]``, ``combine.weight`` W_c
    ``[Hd, He + Hd]``. There are no biases.

    Args:
        hidden_size: Hd, of the decoder's states and h~.
        source_size: He, of the encoder's outputs; None for Hd.
        score: ``"dot"``, ``"general"`` or ``"concat"``.
        attention_size: A, of concat; None for Hd.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        hidden ``[B, T, Hd]`` or ``[B, Hd]``; source ``[B, S, He]``; source_padding_mask ``[B, S]`` bool,
        True: padding (as ``key_padding_mask`` of ``nn.MultiheadAttention``); lengths ``[B]`` integers.
        Returns ``h~`` of hidden's shape and weights ``[B, T, S]`` or ``[B, S]``.

    Dtypes:
        float32, float64; bfloat16 and float16 with scores, softmax and sums in float32.

    Raises:
        ValueError: there is no such score, a size does not suit it, or both a mask and lengths are given.
        RuntimeError: a shape, dtype or device does not fit; the text names the argument.
    """

    def __init__(
        self,
        hidden_size: int,
        source_size: int | None = None,
        *,
        score: str = "general",
        attention_size: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        name = "LuongAttention"
        choice(name, "score", score, SCORES)
        source_size = hidden_size if source_size is None else source_size
        rows = hidden_size if attention_size is None else attention_size
        check_positive(name, hidden_size=hidden_size, source_size=source_size, attention_size=rows)
        if score == "dot" and source_size != hidden_size:
            raise ValueError(
                f"{name}: source_size: got {source_size}, expected {hidden_size} for score='dot'"
            )
        super().__init__()
        self.hidden_size, self.source_size, self.score_kind = hidden_size, source_size, score
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.score, self.v = None, None
        if score == "general":
            self.score = nn.Linear(source_size, hidden_size, **factory)
        elif score == "concat":
            self.score = nn.Linear(hidden_size + source_size, rows, **factory)
            self.v = nn.Linear(rows, 1, **factory)
        self.combine = nn.Linear(source_size + hidden_size, hidden_size, **factory)

    def forward(
        self,
        hidden: Tensor,
        source: Tensor,
        source_padding_mask: Tensor | None = None,
        lengths: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the attention vector h~ and the weights.

        Args:
            hidden: the decoder's states, after its step.
            source: the encoder's outputs.
            source_padding_mask: True where there is padding.
            lengths: instead of it: how many outputs of each sequence count, from the first.
        """
        context, weights = self.context(hidden, source, source_padding_mask, lengths)
        return self.attention_vector(context, hidden), weights

    def context(
        self,
        hidden: Tensor,
        source: Tensor,
        source_padding_mask: Tensor | None = None,
        lengths: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the context ``[B, T, He]`` or ``[B, He]``, and the weights."""
        if lengths is not None:
            if source_padding_mask is not None:
                raise ValueError(
                    "LuongAttention: lengths: got a source_padding_mask too, expected one of them"
                )
            source_padding_mask = _padding(lengths, source)
        weight = None if self.score is None else self.score.weight
        v = None if self.v is None else self.v.weight.squeeze(0)
        return luong_attention(hidden, source, weight, v, source_padding_mask=source_padding_mask)

    def attention_vector(self, context: Tensor, hidden: Tensor) -> Tensor:
        """Return h~ of a context and the state that it was made for."""
        return torch.tanh(self.combine(torch.cat((context, hidden.to(context.dtype)), -1)))

    def extra_repr(self) -> str:
        """Say which scores."""
        return f"score={self.score_kind!r}"


def _attend(
    hidden: Tensor, source: Tensor, weight: Tensor | None, v: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return context [B, T, He] and weights [B, T, S] for hidden [B, T, Hd]."""
    if weight is not None and v is not None:
        return _additive(hidden, source, weight, v, padding)
    # (h^T W) s, not h^T (W s): T rows, not S
    query = hidden if weight is None else linear(hidden, weight.t())
    if autocast_enabled(source.device):
        source = source.to(query.dtype)
    keys = source.unsqueeze(1)  # one head
    context, weights = scaled_dot_product_attention(
        query.unsqueeze(1), keys, keys, scale=1.0, key_padding_mask=padding, return_weights="mean"
    )
    return context.squeeze(1), weights


def _additive(
    hidden: Tensor, source: Tensor, weight: Tensor, v: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    if padding is not None:
        source = source.masked_fill(padding.unsqueeze(-1), 0.0)
    of_hidden, of_source = weight.split((hidden.shape[-1], source.shape[-1]), 1)
    terms = linear(hidden, of_hidden).unsqueeze(2) + linear(source, of_source).unsqueeze(1)  # [B, T, S, A]
    scores = linear(torch.tanh(terms), v.unsqueeze(0)).squeeze(-1)
    if padding is None:
        weights = torch.softmax(scores, -1)
    else:
        masked = padding.unsqueeze(1)
        # sequences of padding only keep their scores, whose softmax has gradients to mask
        hidden_away = masked & ~masked.all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(hidden_away, float("-inf")), -1).masked_fill(masked, 0.0)
    weights = weights.to(scores.dtype)
    return torch.bmm(weights, source.to(weights.dtype)), weights


def _padding(lengths: Any, source: Tensor) -> Tensor:
    """Return where the source [B, S, He] is padding for lengths [B]."""
    lengths = torch.as_tensor(lengths, device=source.device)
    if lengths.dim() != 1 or lengths.dtype.is_floating_point or lengths.shape[0] != source.shape[0]:
        raise RuntimeError(
            f"LuongAttention: lengths: got {lengths.dtype} of size {list(lengths.shape)}, expected integers "
            f"[{source.shape[0]}]"
        )
    return torch.arange(source.shape[1], device=source.device) >= lengths.unsqueeze(1)


def _check(
    hidden: Tensor, source: Tensor, weight: Tensor | None, v: Tensor | None, padding: Tensor | None
) -> None:
    if hidden.dim() not in (2, 3):
        raise RuntimeError(f"{_NAME}: Expected hidden to be 2D or 3D, got size {list(hidden.shape)}")
    if source.dim() != 3 or source.shape[0] != hidden.shape[0]:
        raise RuntimeError(
            f"{_NAME}: source has size {list(source.shape)}, expected [{hidden.shape[0]}, S, He] "
            f"for hidden of size {list(hidden.shape)}"
        )
    if v is not None and weight is None:
        raise RuntimeError(f"{_NAME}: v: got one without weight, expected None")
    features, sources = hidden.shape[-1], source.shape[-1]
    expected: tuple[int, ...]
    if weight is None:
        if sources != features:
            raise RuntimeError(
                f"{_NAME}: source has {sources} features, expected {features} as hidden has, without weight"
            )
    else:
        rows = weight.shape[0]
        expected = (features, sources) if v is None else (rows, features + sources)
        why = f"hidden of size {list(hidden.shape)} and source of size {list(source.shape)}"
        check_shape(_NAME, "weight", weight, expected, why)
        check_shape(_NAME, "v", v, (rows,), f"{rows} rows of weight")
    others = (("source", source), ("weight", weight), ("v", v))
    check_same_kind(_NAME, "hidden", hidden, others, autocast_enabled(hidden.device))
    if padding is not None:
        expected = tuple(source.shape[:2])
        if padding.dtype != torch.bool or padding.shape != expected:
            raise RuntimeError(
                f"{_NAME}: source_padding_mask: got {padding.dtype} of size {list(padding.shape)}, expected "
                f"bool {list(expected)}, True: padding"
            )
