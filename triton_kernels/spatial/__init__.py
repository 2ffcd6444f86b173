"""Spatial attention and softmax, forward and backward."""

from .launch import spatial_attention_backward as spatial_attention_backward
from .launch import spatial_attention_forward as spatial_attention_forward
from .launch import spatial_softmax_backward as spatial_softmax_backward
from .launch import spatial_softmax_forward as spatial_softmax_forward
