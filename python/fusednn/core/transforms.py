"""Whether something other than autograd and the compiler looks on at a call; second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

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


def autocast(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Cast floating tensors as torch.autocast does for torch's ops, if it is on where the first one is."""
    if not autocast_enabled(first.device):
        return first, *others
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        t if t is None or not t.dtype.is_floating_point or t.dtype == torch.float64 else t.to(dtype)
        for t in (first, *others)
    )


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the dtypes that a reference chose: autocast has had its say before the op."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor))
        if not autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def needs_torchs_ops(*tensors: Tensor | None) -> bool:
    """Whether the call is under a transform, or its tensors are not dense (sparse, mkldnn)."""
    return under_transform(*tensors) or any(t is not None and t.layout != torch.strided for t in tensors)


def may_need_backward(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow; torch.jit.trace assumes it, since its check traces without gradients."""
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return recorded or torch.jit.is_tracing()


def gradients_by_autograd(
    forward: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of ``forward(*tensors)``, a tuple of results, None where not needed.

    `grads` holds a gradient or None for each result. Aliases stand for the tensors, so that one that was
    computed from another is not followed back to it.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases: list[Any] = [None if t is None else t.view_as(t) for t in tensors]
        wanted = [a for a, needed in zip(aliases, needs, strict=True) if needed]
        results = forward(*aliases)
    pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
    if not pairs:
        return (None,) * len(needs)
    outputs, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=recorded, allow_unused=True))
    return tuple(next(found) if needed else None for needed in needs)
