"""Networks built from fusednn's layers."""

from .driving_net import DrivingNet

__all__ = ["DrivingNet"]
