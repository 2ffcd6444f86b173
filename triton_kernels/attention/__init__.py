"""Multi-head attention, forward and backward."""

from .launch import attention_backward, attention_forward

__all__ = ["attention_backward", "attention_forward"]
