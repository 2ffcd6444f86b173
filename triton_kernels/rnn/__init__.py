"""The gates of LSTM and GRU cells, forward and backward."""

from .gates import gru_gates_backward as gru_gates_backward
from .gates import gru_gates_forward as gru_gates_forward
from .gates import lstm_gates_backward as lstm_gates_backward
from .gates import lstm_gates_forward as lstm_gates_forward
