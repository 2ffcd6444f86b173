"""The proof of LSTM and GRU."""
