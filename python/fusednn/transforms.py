"""Whether something other than autograd and the compiler looks on at a call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def under_transform(*tensors: Tensor | None) -> bool:
    """Whether vmap, torch.func.grad or forward-mode AD looks on: they see through torch's ops only."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def autocast_enabled(device: torch.device) -> bool:
    """Whether torch.autocast is on for tensors of this device; there is none for ``meta``."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def needs_torchs_ops(*tensors: Tensor | None) -> bool:
    """Whether the call is under a transform, or its tensors are not dense (sparse, mkldnn)."""
    return under_transform(*tensors) or any(t is not None and t.layout != torch.strided for t in tensors)


def may_need_backward(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow; torch.jit.trace assumes it, since its check traces without gradients."""
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return recorded or torch.jit.is_tracing()
