"""``nn.TransformerEncoderLayer`` with fused attention inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from . import nested
from .mha_checks import check_mask_dtypes
from .modules import MultiheadAttention


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    r"""A drop-in for :class:`torch.nn.TransformerEncoderLayer`: same constructor, ``state_dict`` and results.

    Self-attention is :class:`fusednn.MultiheadAttention`, and so are its rules: a row of ``src`` that may
    attend to nothing gets no attention, where torch makes NaN of it. Training and inference take the same
    way; torch's inference-only ``_transformer_encoder_layer_fwd`` is not called. Inside
    ``nn.TransformerEncoder`` padded batches become nested tensors where torch does that, and the layer works
    on the packed rows.

    Args:
        d_model: E, features of the input.
        nhead: heads, a divisor of E.
        dim_feedforward: features between the two linear layers.
        dropout: probability, after attention, between the linear layers, after them, and of weights.
        activation: ``"relu"``, ``"gelu"`` or a function of a tensor, elementwise.
        layer_norm_eps: of both norms.
        batch_first: whether batched inputs are ``[B, L, E]``, not ``[L, B, E]``.
        norm_first: whether norms come before attention and linear layers, or after.
        bias: whether linear layers and norms add one.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        src ``[L, B, E]``, ``[B, L, E]`` with `batch_first`, ``[L, E]`` unbatched, or, with `batch_first`, a
        nested tensor ``[B, *, E]``; src_mask ``[L, L]`` or ``[B * nhead, L, L]``; src_key_padding_mask
        ``[B, L]`` or ``[L]``. Returns a tensor of src's shape.

    Raises:
        AssertionError: a rank, a number of features or a padding mask does not fit.
        RuntimeError: another size, dtype or device does not fit, ``is_causal`` comes without ``src_mask``, or
            there is no such activation.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        torchs: Any = (dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype)
        super().__init__(d_model, nhead, dim_feedforward, *torchs)
        # torch's layer with torch's initial values, by the rule of replace_layers: only the class changes
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the encoded sequence.

        Args:
            src: the sequence.
            src_mask: bool, True: ignored; or floating, added to the scores.
            src_key_padding_mask: likewise, of whole positions.
            is_causal: a hint that `src_mask` is causal, as in :class:`fusednn.MultiheadAttention`.
        """
        check_mask_dtypes(src_key_padding_mask, src_mask, ("src_key_padding_mask", "src_mask"))

        def attend(x: Tensor) -> Tensor:
            return self._sa_block(x, src_mask, src_key_padding_mask, is_causal)

        if not src.is_nested:
            return self._encode(src, attend)
        packed = nested.pack(src, "src").values  # [T, E]
        encoded = self._encode(packed, lambda x: nested.pack(attend(nested.unpack(x, src)), "src").values)
        return nested.unpack(encoded, src)

    def _encode(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:  # Xiong et al., 2020
            x = x + attend(self.norm1(x))
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + attend(x))
        return self.norm2(x + self._ff_block(x))
