"""Multi-head attention, forward and backward."""

from .launch import attention_backward as attention_backward
from .launch import attention_forward as attention_forward
