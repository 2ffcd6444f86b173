"""fusednn's operations as functions."""

from .rnn.functional import gru_cell, lstm_cell

__all__ = ["gru_cell", "lstm_cell"]
