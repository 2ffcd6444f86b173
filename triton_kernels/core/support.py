"""When the Triton kernels can serve, and why not."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def _installation_reasons() -> tuple[str, ...]:
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed: pip install triton",)
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return (
            f"triton {triton.__version__} is installed, "
            f"{'.'.join(map(str, OLDEST_TRITON))} or newer is needed",
        )
    return ()


def _device_reasons(device: torch.device) -> list[str]:
    if device.type == "cuda":
        if torch.version.hip is not None:
            return ["ROCm devices are untested"]
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return [f"compute capability is {capability}, at least {OLDEST_CAPABILITY} is needed"]
        return []
    if device.type == "cpu" and interpreting():
        return []
    return [f"tensors are on {device}, expected a CUDA device (or the CPU under TRITON_INTERPRET=1)"]


def not_supported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the kernels can't take tensors of this device and dtype; empty if they can.

    float32, float64, float16 and bfloat16 work alike on devices and in the interpreter.
    """
    reasons = list(_installation_reasons())
    if dtype not in DTYPES:
        reasons.append(f"dtype is {dtype}, expected float32, float64, float16 or bfloat16")
    return reasons + _device_reasons(torch.device(device))
