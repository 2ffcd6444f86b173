"""``nn.BatchNorm2d`` beside a fused product: folded where its statistics are frozen, tracked where not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.tensors import accumulation_dtype


def uses_batch_statistics(norm: nn.BatchNorm2d | None) -> bool:
    """Whether the norm takes mean and variance from the batch rather than from its buffers."""
    return norm is not None and (norm.training or (norm.running_mean is None and norm.running_var is None))


def fold(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """Fold a norm with frozen statistics into the product before it; differentiable.

    Args:
        weight: ``[C, ...]``, the product's.
        bias: ``[C]`` or None.
        norm: of C channels; None leaves everything as it is.

    Returns:
        weight and bias of the product that gives ``norm(product)``, in float32 or wider.
    """
    if norm is None:
        return weight, bias
    assert norm.running_mean is not None
    assert norm.running_var is not None
    wide = accumulation_dtype(weight.dtype)
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()  # [C]
    scale = scale if norm.weight is None else scale * norm.weight.to(wide)
    shift = -norm.running_mean.to(wide) if bias is None else bias.to(wide) - norm.running_mean.to(wide)
    shift = shift * scale
    shift = shift if norm.bias is None else shift + norm.bias.to(wide)
    return weight.to(wide) * scale.view(-1, 1, 1, 1), shift


def check_batch(norm: nn.BatchNorm2d | None, size: torch.Size) -> None:
    """Raise torch's error where a variance would be that of one value.

    Raises:
        ValueError: the norm takes its statistics from a batch with one value per channel.
    """
    if uses_batch_statistics(norm) and size[0] * size[2] * size[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")


@torch.no_grad()
def track(norm: nn.BatchNorm2d | None, mean: Tensor, rstd: Tensor, count: int) -> None:
    """Update the running statistics as ``nn.BatchNorm2d`` does.

    Args:
        norm: None or a norm without tracking is left alone.
        mean: of the batch, ``[C]``.
        rstd: ``1 / sqrt(biased variance + eps)`` of the batch, ``[C]``.
        count: values per channel.
    """
    if norm is None or not norm.training or not norm.track_running_stats:
        return
    factor: Tensor | float = 0.0 if norm.momentum is None else norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a cumulative average; kept a tensor, which compiles
            factor = norm.num_batches_tracked.to(mean.dtype).reciprocal()
    if norm.running_mean is None or norm.running_var is None or count == 0:
        return
    variance = (rstd.square().reciprocal() - norm.eps).clamp(min=0)
    unbiased = variance * (count / (count - 1))
    for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.copy_(running * (1 - factor) + now * factor)
