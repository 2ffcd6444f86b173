"""Softmax attention over the positions of an image, alone and inside a recurrence."""
