"""The gates of LSTM and GRU cells, forward and backward."""

from .gates import gru_gates_backward, gru_gates_forward, lstm_gates_backward, lstm_gates_forward

__all__ = ["gru_gates_backward", "gru_gates_forward", "lstm_gates_backward", "lstm_gates_forward"]
