"""Attend-and-recur: spatial attention inside an LSTM or a GRU, over whole sequences."""
