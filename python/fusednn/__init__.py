"""Faster layers for PyTorch: import them instead of ``torch.nn``'s and change nothing else."""

from . import functional, models
from ._version import __version__
from .attention.luong import LuongAttention
from .attention.modules import MultiheadAttention
from .attention.transformer import TransformerEncoderLayer
from .conv.block import DepthwiseSeparableConv2d
from .conv.modules import DepthwiseConv1d, DepthwiseConv2d
from .core.dispatch import explain
from .core.settings import use_backend
from .recurrence.modules import AttentionLSTM
from .replace import replace_layers, restore_layers
from .rnn.modules import GRUCell, LSTMCell
from .spatial.modules import SpatialAttention

__all__ = [
    "AttentionLSTM",
    "DepthwiseConv1d",
    "DepthwiseConv2d",
    "DepthwiseSeparableConv2d",
    "GRUCell",
    "LSTMCell",
    "LuongAttention",
    "MultiheadAttention",
    "SpatialAttention",
    "TransformerEncoderLayer",
    "__version__",
    "explain",
    "functional",
    "models",
    "replace_layers",
    "restore_layers",
    "use_backend",
]
