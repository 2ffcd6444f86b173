"""Attention inside an LSTM or a GRU, as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..core import dispatch
from ..core.checks import check_positive, choice
from ..rnn.modules import GRUCell, LSTMCell
from ..spatial import checks
from ..spatial.modules import SpatialAttention
from . import composite, functional
from .functional import State

_CELLS: dict[str, type[LSTMCell] | type[GRUCell]] = {"lstm": LSTMCell, "gru": GRUCell}


class AttentionLSTM(nn.Module):
    r"""An LSTM or GRU that looks at an image in each step, where its last hidden state tells it to.

    For each step: a map over the frame's positions from the frame and h, softmaxed over all of them; the
    frame times the map, flattened or summed over positions; that into the cell (Kim & Canny 2017; Xu et al.
    2015).

    The attended features are linear in the map, so the cell's input product can be made for all steps and
    positions at once, outside of the recurrence; a plan on the bytes moved decides, and ``fusednn.explain``
    shows it. Children hold the parameters: ``attention`` (:class:`SpatialAttention`) and ``cell``
    (:class:`fusednn.LSTMCell` or :class:`fusednn.GRUCell`). They are called, step by step, only where that
    does more than their tensors say (hooks, another class).

    Args:
        in_channels: C.
        height: H.
        width: W.
        hidden_size: of the cell.
        score: ``"positional"`` or ``"additive"``, as in :class:`SpatialAttention`.
        output: the cell's input: ``"flatten"`` (C·H·W numbers) or ``"sum"`` (C).
        cell: ``"lstm"`` or ``"gru"``.
        temperature: of the softmax, positive.
        learn_temperature: whether it is a parameter.
        attention_size: rows of the additive scores' W and U; None for `hidden_size`.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        features ``[B, T, C, H, W]``, or a ``PackedSequence`` of frames ``[C, H, W]``; returns hidden states
        ``[B, T, hidden_size]`` and maps ``[B, T, 1, H, W]`` (packed if the features are), and the state,
        ``(h, c)`` or, of a GRU, ``h``, each ``[B, hidden_size]``.

    Raises:
        ValueError: an option has no such value.
        RuntimeError: a size, dtype, device or length does not fit; the text names the argument.
    """

    def __init__(
        self,
        in_channels: int,
        height: int,
        width: int,
        hidden_size: int,
        *,
        score: str = "positional",
        output: str = "flatten",
        cell: str = "lstm",
        temperature: float = 1.0,
        learn_temperature: bool = False,
        attention_size: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        name = "AttentionLSTM"
        choice(name, "output", output, ("flatten", "sum"))
        choice(name, "cell", cell, tuple(_CELLS))
        check_positive(name, in_channels=in_channels, height=height, width=width, hidden_size=hidden_size)
        super().__init__()
        self.in_channels, self.height, self.width, self.hidden_size = in_channels, height, width, hidden_size
        self.attention = SpatialAttention(
            in_channels,
            hidden_size,
            height,
            width,
            score=score,
            output=output,
            temperature=temperature,
            learn_temperature=learn_temperature,
            attention_size=attention_size,
            device=device,
            dtype=dtype,
        )
        inputs = in_channels * height * width if output == "flatten" else in_channels
        self.cell = _CELLS[cell](inputs, hidden_size, device=device, dtype=dtype)

    def forward(
        self, features: Tensor | PackedSequence, hx: State | None = None, lengths: Any = None
    ) -> tuple[Any, Any, State]:
        """Return hidden states, maps and the last state.

        Args:
            features: ``[B, T, C, H, W]`` or packed frames.
            hx: the state before the first step; None for zeros. Of packed sequences: in the order before
                packing, as for ``nn.LSTM``.
            lengths: of padded sequences, ``[B]`` integers from 1 to T. From a sequence's end on hidden states
                and maps are 0, the state stays, and what the frames hold is not read.
        """
        if isinstance(features, PackedSequence):
            return self._packed(features, hx, lengths)
        checks.check_images("AttentionLSTM", "features", features, "[B, T, C, H, W]")
        if tuple(features.shape[2:]) != (self.in_channels, self.height, self.width):
            raise RuntimeError(
                f"AttentionLSTM: features has size {list(features.shape)}, expected frames of "
                f"[{self.in_channels}, {self.height}, {self.width}]"
            )
        attention, cell = self.attention, self.cell
        reasons = composite.against_children(self)
        if reasons:
            if not torch.compiler.is_compiling():
                dispatch.record_composite("attention_lstm", reasons)
            return composite.recur(self, features, self._state(features, hx), lengths)
        assert attention.hidden is not None
        return functional.attention_lstm(
            features,
            self._state(features, hx),
            attention.score.weight.flatten(1),
            attention.hidden.weight,
            cell.weight_ih,
            cell.weight_hh,
            attention.hidden.bias,
            cell.bias_ih,
            cell.bias_hh,
            v=None if attention.v is None else attention.v.weight,
            temperature=attention.temperature,
            lengths=lengths,
            output=attention.output,
        )

    def step(self, features: Tensor, hx: State | None = None) -> tuple[Tensor, Tensor, State]:
        """Take one frame of each sequence: the same numbers as the sequence call.

        Args:
            features: ``[B, C, H, W]``.
            hx: the state that the last step returned; None for zeros.

        Returns:
            The hidden state ``[B, hidden_size]``, the map ``[B, 1, H, W]`` and the state.
        """
        checks.check_images("AttentionLSTM", "features", features, "[B, C, H, W]")
        hidden, maps, state = self(features.unsqueeze(1), hx)
        return hidden.squeeze(1), maps.squeeze(1), state

    def _state(self, features: Tensor, hx: State | None) -> State:
        if hx is not None:
            if isinstance(hx, Tensor) != isinstance(self.cell, GRUCell):
                expected = "a Tensor h" if isinstance(self.cell, GRUCell) else "a pair of Tensors (h, c)"
                raise TypeError(f"AttentionLSTM: expected hx to be {expected}, got {type(hx).__name__}")
            return hx
        zeros = features.new_zeros(features.shape[0], self.hidden_size)
        return zeros if isinstance(self.cell, GRUCell) else (zeros, zeros)

    def _packed(self, packed: PackedSequence, hx: State | None, lengths: Any) -> tuple[Any, Any, State]:
        """Pad, run, and pack again in the same order, as ``nn.LSTM`` does with a ``PackedSequence``."""
        if lengths is not None:
            raise RuntimeError("AttentionLSTM: lengths: got some, expected None: packed features have theirs")
        padded, ends = pad_packed_sequence(packed, batch_first=True)
        hidden, maps, state = self(padded, hx, ends)
        order = packed.sorted_indices
        by_length = ends if order is None else ends[order.to(ends.device)]

        def pack(t: Tensor) -> PackedSequence:
            t = t if order is None else t.index_select(0, order)
            data = pack_padded_sequence(t, by_length, batch_first=True).data
            return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)

        return pack(hidden), pack(maps), state
