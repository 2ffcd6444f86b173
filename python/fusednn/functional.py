"""fusednn's operations as functions."""

from .attention.functional import scaled_dot_product_attention, varlen_attention
from .attention.luong import luong_attention
from .attention.rotary import alibi_slopes, rotary_embedding
from .conv.functional import depthwise_conv1d, depthwise_conv2d, depthwise_separable_conv2d
from .recurrence.functional import attention_lstm
from .rnn.functional import gru_cell, lstm_cell
from .spatial.functional import spatial_attention, spatial_softmax

__all__ = [
    "alibi_slopes",
    "attention_lstm",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_separable_conv2d",
    "gru_cell",
    "lstm_cell",
    "luong_attention",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "spatial_attention",
    "spatial_softmax",
    "varlen_attention",
]
