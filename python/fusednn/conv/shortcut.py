"""The block's way past the dispatcher on CPU tensors: docs/design/006-eager-shortcut.md.

A plain call (CPU tensors of one dtype, children that are torch's own with nothing attached, nobody listening)
goes straight to the extension, which has the autograd node and the running statistics. Anything else, and
anything wrong, is left to the general way: the shortcut never refuses.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..core import eager, native
from ..core.children import HOOKS
from . import checks, eligibility, reference


def applies(input: Any) -> bool:
    """Whether a call with this input may take the shortcut, as far as the block itself doesn't matter."""
    return eager.applies(input) and not torch_module._has_any_global_hook()


@eager.composite("separable_conv2d_training")
def training_composite(*args: Any) -> tuple[Tensor, ...]:
    """Return the result of a block in training, given the op's arguments, as a tuple."""
    return reference.separable_conv2d_train_forward(*args)[:1]


class Shortcut:
    """What of a block the extension has to know, made again when the children's settings change."""

    def __init__(self) -> None:
        self._key: Any = None
        self._options: Any = None

    def options(self, children: Mapping[str, nn.Module | None], residual: bool) -> Any:
        """Return the extension's BlockOptions; None if the children must be looked at in the general way."""
        found: list[Any] = []
        for child in children.values():
            own = {} if child is None else vars(child)
            if any(own.get(name) for name in HOOKS) or "forward" in own or "_conv_forward" in own:
                return None
            found.append((type(child), *(own.get(name) for name in _SETTINGS)))
        key = (residual, children["depthwise"].weight.shape, found)  # type: ignore[union-attr]
        if key != self._key:
            self._options = None if eligibility.against_children(children) else _options(children, residual)
            self._key = copy.deepcopy(key)  # a list of the user's may be written to
        return self._options

    def __deepcopy__(self, memo: dict[int, Any]) -> Shortcut:
        return Shortcut()

    def __reduce__(self) -> tuple[type[Shortcut], tuple[()]]:
        return Shortcut, ()


# What BlockOptions, and the choice of children, depend on.
_SETTINGS = ("stride", "padding", "dilation", "groups", "kernel_size", "padding_mode", "approximate")


def _options(children: Mapping[str, nn.Module | None], residual: bool) -> Any:
    depthwise = children["depthwise"]
    assert isinstance(depthwise, nn.Conv2d)
    if depthwise.padding_mode != "zeros":
        return None
    geometry = checks.geometry(
        "depthwise_separable_conv2d",
        depthwise.weight.shape[2:],
        depthwise.stride,
        depthwise.padding,
        depthwise.dilation,
    )
    acts = (eligibility.activation_of(children[name]) for name in ("activation1", "activation2"))
    return native.extension.cpu.BlockOptions(depthwise.groups, *geometry, *acts, residual)


def batch_norm_fields(norm: nn.BatchNorm2d | None, uses_batch: bool) -> tuple[Any, ...]:
    """What the extension takes of a norm: its buffers, if it reads them or keeps them up to date."""
    if norm is None:
        return (False, None, None, None, None, None, None, 0.0)
    buffers: tuple[Any, ...] = (None, None, None)
    if not uses_batch or (norm.training and norm.track_running_stats):
        buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return (True, norm.weight, norm.bias, *buffers, norm.momentum, norm.eps)
