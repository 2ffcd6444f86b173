"""Children whose tensors a layer reads: whether calling them would do more than that."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def against_calls(child: nn.Module) -> list[str]:
    """What attached to a child would be passed over."""
    own = vars(child)
    if any(own[hooks] for hooks in HOOKS):  # pruning and weight_norm are hooks, too
        return ["has hooks, which only a call of it runs"]
    if "forward" in own or "_conv_forward" in own:
        return ["has a forward that was assigned on the instance"]
    return []


def against_hooks(children: Mapping[str, nn.Module | None]) -> list[str]:
    """Why these children must be called: what is attached to them, or to every module."""
    if torch_module._has_any_global_hook():
        return ["a global module hook is registered, which must see every child"]
    present = [(name, child) for name, child in children.items() if child is not None]
    return [f"{name} {reason}" for name, child in present for reason in against_calls(child)]


def against_reading(children: Mapping[str, nn.Module | None], *kinds: type[nn.Module]) -> list[str]:
    """Why these children must be called, of which only calls of exactly these classes are known.

    A subclass may compute something else: one with adapters, a parametrized or a quantized one.
    """
    for name, child in children.items():
        if child is not None and type(child) not in kinds:
            return [f"{name} is a {type(child).__name__}, expected {' or '.join(k.__name__ for k in kinds)}"]
    return against_hooks(children)
