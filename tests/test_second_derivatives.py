"""A backward that is itself differentiated goes to the reference, on every backend.

So `gradgradcheck` runs on the reference alone (tests/<family>/test_gradients.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import registry

# Forwards or backwards that a backend lacks.
MISSING = {("cuda", "attention_forward"), ("triton", "attention_lstm_forward")}
DTYPES = {"projection_forward": torch.float32}  # of the CPU's kernels
FORWARDS = [name for name in registry.OPS if name.endswith("_forward")]


class Ops(TorchDispatchMode):
    """Notes the names of fusednn's ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note, and call."""
        if func.namespace == "fusednn":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def trained(name: str, device: str) -> tuple[Callable[[], Any], list[Tensor]]:
    """Return the op's largest sample call that has gradients, and the leaves."""

    def leaf(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        return a.detach().to(device).requires_grad_(a.is_floating_point() and a.requires_grad)

    found = [
        tuple(map(leaf, args)) for args in registry.cases_of(name, DTYPES.get(name, torch.float64)).values()
    ]
    found = [args for args in found if any(isinstance(a, Tensor) and a.requires_grad for a in args)]
    args = max(found, key=lambda args: sum(a.numel() for a in args if isinstance(a, Tensor)))
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return lambda: getattr(torch.ops.fusednn, name)(*args), leaves


def gradients(
    call: Callable[[], Any], leaves: list[Tensor], create_graph: bool
) -> tuple[list[Tensor], list[str]]:
    """Return the gradients of the results' sum of squares, and the ops that made them."""
    results = call()
    results = results if isinstance(results, tuple) else (results,)
    loss = sum(r.square().sum() for r in results if r.requires_grad and r.numel() and r.isfinite().all())
    with Ops() as ops:
        grads = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)
    return [g for g in grads if g is not None], ops.names


@pytest.mark.parametrize("name", FORWARDS)
def test_a_watched_backward_goes_to_the_reference(place, name):
    call, leaves = trained(name, place.device)
    if (place.backend, name) in MISSING:
        missing = (
            f"no (CUDA|Triton) kernel for {registry.stem_of(name)}_|has no {place.backend} implementation"
        )
        with pytest.raises(RuntimeError, match=missing):
            gradients(call, leaves, create_graph=False)
        return
    plain, ops = gradients(call, leaves, create_graph=False)
    watched, ops_watched = gradients(call, leaves, create_graph=True)
    assert ops[-1:] == [registry.backward_of(name)]
    assert registry.backward_of(name) not in ops_watched
    half = torch.finfo(leaves[0].dtype).eps ** 0.5
    torch.testing.assert_close(watched, plain, rtol=half, atol=half)
