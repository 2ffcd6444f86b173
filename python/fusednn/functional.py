"""fusednn's operations as functions."""

from .attention.functional import scaled_dot_product_attention, varlen_attention
from .conv.functional import depthwise_conv1d, depthwise_conv2d, depthwise_separable_conv2d
from .rnn.functional import gru_cell, lstm_cell
from .spatial.functional import spatial_attention, spatial_softmax
from .spatial.sequence import attention_lstm

__all__ = [
    "attention_lstm",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_separable_conv2d",
    "gru_cell",
    "lstm_cell",
    "scaled_dot_product_attention",
    "spatial_attention",
    "spatial_softmax",
    "varlen_attention",
]
