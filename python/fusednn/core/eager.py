"""The way past the dispatcher for plain calls on CPU tensors: docs/design/006-eager-shortcut.md.

A layer asks :func:`applies`, then the extension, which looks at tensors and shapes and has the autograd node.
Where it answers None, the layer takes the general way, which also words the errors: a shortcut never refuses.
A backward that is recorded itself, or mapped, goes through the layer's composite, in torch's ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import dispatch, native, settings
from .transforms import gradients_by_autograd

_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))
_composites: dict[str, Callable[..., Sequence[Tensor]]] = {}


def applies(*inputs: Any) -> bool:
    """Whether a call with these inputs may take the shortcut, as far as the layer itself doesn't matter."""
    return (
        native.extension is not None
        and not torch.compiler.is_compiling()
        and settings.backend() in ("auto", "cpu")
        and forward_ad._current_level < 0
        and not dispatch.explaining()
        and all(type(x) in _PLAIN for x in inputs)
    )


def composite(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function as the forward, in torch's ops, of the layer that the extension calls `name`.

    It takes the layer's tensors, then its options, and returns the results as a tuple.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _composites[name] = function
        return function

    return register


def gradients(
    name: str,
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    options: Sequence[Any],
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of a plain call; the extension's autograd node calls it.

    Args:
        name: of the composite.
        tensors: that the layer took.
        grads: of its results.
        needs: which gradients to return; the others are None.
        options: of the layer.
    """
    forward = _composites[name]
    return gradients_by_autograd(lambda *aliases: forward(*aliases, *options), tensors, grads, needs)
