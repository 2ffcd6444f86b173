"""Which children a block can fuse, and why not: anything else is called as the module that it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.children import against_calls, against_hooks
from ..core.tensors import HALVES
from . import checks
from .modules import DepthwiseConv2d

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_TENSORS = ("weight", "bias", "running_mean", "running_var")


def activation_of(module: nn.Module | None) -> str | None:
    """Name of the activation that a module of torch's computes; None if there is no fused one."""
    if module is None:
        return "none"
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    return _ACTIVATIONS.get(type(module))


def norm_of(module: nn.Module | None) -> nn.BatchNorm2d | None:
    """Return the norm to fuse; ``nn.Identity`` is none."""
    return module if type(module) is nn.BatchNorm2d else None


def check_children(children: Mapping[str, nn.Module | None], residual: bool) -> None:
    """Check that modules make a block.

    Raises:
        TypeError: a convolution is no ``nn.Conv2d``, or another child neither a module nor None.
        ValueError: the convolutions are not depthwise and 1×1 or don't fit each other, or a residual can't be
            added.
    """
    depthwise, pointwise = children["depthwise"], children["pointwise"]
    for name, conv in (("depthwise", depthwise), ("pointwise", pointwise)):
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{name}: got {type(conv).__name__}, expected a torch.nn.Conv2d")
    for name, child in children.items():
        if child is not None and not isinstance(child, nn.Module):
            raise TypeError(f"{name}: got {type(child).__name__}, expected a torch.nn.Module or None")
    assert isinstance(depthwise, nn.Conv2d)
    assert isinstance(pointwise, nn.Conv2d)
    if depthwise.groups != depthwise.in_channels:
        raise ValueError(
            f"depthwise: got groups={depthwise.groups}, expected in_channels = {depthwise.in_channels}"
        )
    reasons = _against_pointwise(pointwise)
    if reasons:
        raise ValueError(f"pointwise: {reasons[0]}")
    if pointwise.in_channels != depthwise.out_channels:
        raise ValueError(
            f"pointwise: got in_channels={pointwise.in_channels}, expected depthwise's out_channels = "
            f"{depthwise.out_channels}"
        )
    if residual and (depthwise.in_channels != pointwise.out_channels or max(depthwise.stride) > 1):
        raise ValueError(
            f"residual: got {depthwise.in_channels} -> {pointwise.out_channels} channels, stride "
            f"{depthwise.stride}, expected equal channels and stride 1"
        )


def against_children(children: Mapping[str, nn.Module | None]) -> list[str]:
    """Why these children can't be fused; empty if they can."""
    reasons = against_hooks(children)
    for name, child in children.items():
        if child is not None and not against_calls(child):
            reasons += [f"{name} {reason}" for reason in _KINDS[name](child)]
    return reasons


def _against_depthwise(child: nn.Module) -> list[str]:
    if type(child) not in (nn.Conv2d, DepthwiseConv2d):
        return [f"is a {type(child).__name__}, not a torch.nn.Conv2d"]
    if getattr(child, "activation", None) is not None:
        return ["has an activation of its own, before the norm"]
    return []


def _against_pointwise(child: nn.Module) -> list[str]:
    assert isinstance(child, nn.Conv2d)
    plain = child.kernel_size == (1, 1) and child.stride == (1, 1) and child.groups == 1
    if not plain or child.padding not in ((0, 0), "valid", "same"):
        return ["is no plain 1×1 convolution: expected kernel_size=1, stride=1, padding=0, groups=1"]
    return []


def _against_pointwise_child(child: nn.Module) -> list[str]:
    if type(child) is not nn.Conv2d:
        return [f"is a {type(child).__name__}, not a torch.nn.Conv2d"]
    return _against_pointwise(child)


def _against_norm(child: nn.Module) -> list[str]:
    if type(child) is nn.Identity:
        return []
    if type(child) is not nn.BatchNorm2d:
        return [f"is a {type(child).__name__}, not a torch.nn.BatchNorm2d"]
    if (child.running_mean is None) != (child.running_var is None):
        return ["has one running statistic without the other"]
    return []


def _against_activation(child: nn.Module) -> list[str]:
    return [] if activation_of(child) else [f"is a {type(child).__name__}, which has no fused form"]


_KINDS = {
    "depthwise": _against_depthwise,
    "norm1": _against_norm,
    "activation1": _against_activation,
    "pointwise": _against_pointwise_child,
    "norm2": _against_norm,
    "activation2": _against_activation,
}


def against_input(input, depthwise, norm1, _activation1, pointwise, norm2, _activation2) -> list[str]:
    """Why this input is left to torch's own layers, which have the words for it where it is wrong."""
    if not isinstance(input, Tensor) or input.dim() != 4:
        return ["got an input that is no batch of images"]
    if not input.dtype.is_floating_point:
        return [f"got input of {input.dtype}"]
    groups, filters = depthwise.groups, depthwise.weight.shape[0]
    if input.shape[1] != groups or filters % groups:
        return [f"got input of {input.shape[1]} channels, {filters} filters and {groups} groups"]
    dtype = checks.cast_dtype(input)
    wider = {dtype, torch.float32} if dtype in HALVES else {dtype}  # what a norm's tensors may have
    norms = {"norm1": norm_of(norm1), "norm2": norm_of(norm2)}
    for name, child in {"depthwise": depthwise, "pointwise": pointwise, **norms}.items():
        for t in (getattr(child, attribute, None) for attribute in _TENSORS):
            if t is None:
                continue
            if t.device != input.device:
                return [f"{name} is on {t.device}, the input on {input.device}"]
            if (t.dtype not in wider) if name in norms else (checks.cast_dtype(t) != dtype):
                return [f"{name} has {t.dtype} beside {dtype}"]
    return []
