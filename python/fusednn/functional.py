"""fusednn's operations as functions."""

from .conv.functional import depthwise_conv1d, depthwise_conv2d, depthwise_separable_conv2d
from .rnn.functional import gru_cell, lstm_cell

__all__ = ["depthwise_conv1d", "depthwise_conv2d", "depthwise_separable_conv2d", "gru_cell", "lstm_cell"]
