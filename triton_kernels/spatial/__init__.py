"""Spatial attention and softmax, forward and backward."""

from .launch import (
    spatial_attention_backward,
    spatial_attention_forward,
    spatial_softmax_backward,
    spatial_softmax_forward,
)

__all__ = [
    "spatial_attention_backward",
    "spatial_attention_forward",
    "spatial_softmax_backward",
    "spatial_softmax_forward",
]
