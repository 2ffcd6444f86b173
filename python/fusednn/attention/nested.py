"""Nested tensors as packed sequences, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Sequences one after the other."""

    values: Tensor  # [T, E]
    cu_seqlens: Tensor  # [N + 1] int32: where each begins, and T
    max_seqlen: int

    def positions(self) -> Tensor:
        """Return where each vector stands in its sequence, [T] int64."""
        starts = self.cu_seqlens[:-1].long()
        lengths = self.cu_seqlens.diff()
        total = self.values.shape[0]
        every = torch.arange(total, device=self.values.device)
        return every - starts.repeat_interleave(lengths, output_size=total)

    def pad(self, x: Tensor) -> Tensor:
        """Return `x` [T, ...] as a batch [N, max_seqlen, ...], zeros after each sequence."""
        count = self.cu_seqlens.shape[0] - 1
        batch = x.new_zeros(count * self.max_seqlen, *x.shape[1:]).index_copy(0, self._rows(), x)
        return batch.view(count, self.max_seqlen, *x.shape[1:])

    def unpad(self, batch: Tensor) -> Tensor:
        """Return the sequences of a batch [N, max_seqlen, ...] one after the other, [T, ...]."""
        return batch.flatten(0, 1).index_select(0, self._rows())

    def _rows(self) -> Tensor:
        lengths, total = self.cu_seqlens.diff(), self.values.shape[0]
        sequence = torch.arange(len(lengths), device=self.values.device)
        return sequence.repeat_interleave(lengths, output_size=total) * self.max_seqlen + self.positions()

    def padding(self) -> Tensor:
        """Return a mask [N, max_seqlen] that is True beyond each sequence's end."""
        columns = torch.arange(self.max_seqlen, device=self.values.device)
        return columns >= self.cu_seqlens.diff().unsqueeze(1)


def pack(nested: Tensor, argument: str = "query") -> Packed:
    """Take the sequences of a nested tensor [N, *, E], strided or jagged; no copy if it is contiguous.

    Raises:
        RuntimeError: it has other dimensions.
    """
    if nested.dim() != 3:
        raise RuntimeError(
            f"{argument}: Expected a nested tensor to be 3-D [N, *, E], got {nested.dim()}-D instead"
        )
    if nested.layout == torch.jagged:
        return _pack_jagged(nested, argument)
    nested = nested.contiguous()
    sizes = nested._nested_tensor_size()  # [N, 2] on the CPU
    if sizes.shape[0] == 0:
        raise RuntimeError(f"{argument}: got a nested tensor of no sequences, expected some")
    ends = torch.zeros(sizes.shape[0] + 1, dtype=torch.int32)
    torch.cumsum(sizes[:, 0], 0, out=ends[1:])
    features = int(sizes[0, 1])
    if int(sizes[:, 1].max()) != features or int(sizes[:, 1].min()) != features:
        raise RuntimeError(f"{argument}: Expected all sequences to have the same features, got {sizes[:, 1]}")
    values = nested.values().view(-1, features)
    return Packed(values, ends.to(values.device), int(sizes[:, 0].max()))


def _pack_jagged(nested: Tensor, argument: str) -> Packed:
    if nested._ragged_idx != 1:  # type: ignore[attr-defined]
        raise RuntimeError(
            f"{argument}: Expected a nested tensor of [N, *, E], got size {list(nested.shape)}"
        )
    if nested.lengths() is not None:  # type: ignore[attr-defined]
        raise RuntimeError(f"{argument}: Expected a nested tensor without holes; contiguous() makes one")
    offsets = nested.offsets()  # type: ignore[attr-defined]
    longest = nested._get_max_seqlen()  # type: ignore[attr-defined]
    return Packed(nested.values(), offsets.to(torch.int32), longest)


def unpack(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` [T, F] as a nested tensor with the sequences and the layout of `like`."""
    if like.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(
            values,
            like.offsets(),  # type: ignore[attr-defined]
            min_seqlen=like._maybe_min_seqlen,  # type: ignore[attr-defined]
            max_seqlen=like._maybe_max_seqlen,  # type: ignore[attr-defined]
        )
    lengths = like._nested_tensor_size()[:, 0]
    features = values.shape[1]
    sizes = torch.stack((lengths, torch.full_like(lengths, features)), 1)
    strides = torch.tensor([[features, 1]]).expand(len(lengths), 2).contiguous()
    starts = (lengths.cumsum(0) - lengths) * features
    return torch._nested_view_from_buffer(values.contiguous().view(-1), sizes, strides, starts)


def check_same_sequences(key: Packed, value: Packed) -> None:
    """Raise AssertionError unless keys and values have the same lengths, where these can be read at once."""
    if key is value or key.cu_seqlens is value.cu_seqlens:
        return
    same = key.cu_seqlens.shape == value.cu_seqlens.shape and key.values.shape[0] == value.values.shape[0]
    if same and key.cu_seqlens.device.type == "cpu":
        same = torch.equal(key.cu_seqlens, value.cu_seqlens)
    if not same:
        raise AssertionError("value: Expected sequences of the same lengths as those of key")
