"""Calls of the launchers of attention; the check of all results against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusednn.attention import reference
from fusednn.core.op import OPS
from fusednn.testing import assert_close_to_oracle

RESULTS = ("output", "lse", "weights")
GRADIENTS = ("query", "key", "value", "mask", "key_mask", "extra_key", "extra_value")
SEED = 0x1234567_89ABCDEF


def _floating(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point()


@dataclass
class Work:
    """A call, and the gradients that come in."""

    tensors: list[Tensor | None]
    options: tuple[Any, ...]
    grads: list[Tensor | None] = field(default_factory=list)

    def needs(self) -> list[bool]:
        """Every gradient that there is."""
        return [_floating(t) for t in self.tensors[:7]]

    def double(self) -> Work:
        """The same in float64."""

        def wide(t: Tensor | None) -> Tensor | None:
            return t.double() if t is not None and _floating(t) else t

        slopes = self.tensors[7]
        tensors = [wide(t) for t in self.tensors]
        tensors[7] = slopes
        return Work(tensors, self.options, [wide(g) for g in self.grads])


def make(
    shape: tuple[int, int, int, int, int, int, int] = (2, 2, 1, 70, 90, 40, 24),  # B, H, G, L, S, D, V
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    extra: int = 0,
    alibi: bool = False,
    packed: tuple[list[int], list[int]] | None = None,
    window: tuple[int, int] = (-1, -1),
    offset: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    weights: str = "none",
    scale: float | None = None,
    without: tuple[str, ...] = (),  # results that get no gradient
    change: Callable[[list[Tensor | None]], None] | None = None,
) -> Work:
    """A call of random tensors; `change` may alter them in place."""
    b, h, g, rows, columns, d, v = shape

    def random(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64).to(dtype)

    def cast(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dtype == torch.bool else t.to(dtype)

    bounds = [None, None] if packed is None else [torch.tensor(p, dtype=torch.int32) for p in packed]
    longest = [0 if p is None else int(p.diff().max()) for p in bounds]
    tensors = [
        random(b, h, rows, d), random(b, g, columns, d), random(b, g, columns, v), cast(mask), cast(key_mask),
        random(g, extra, d) if extra else None, random(g, extra, v) if extra else None,
        torch.rand(h) if alibi else None, *bounds, torch.tensor(SEED) if dropout else None,
    ]  # fmt: skip
    if change is not None:
        change(tensors)
    options = (*longest, d**-0.5 if scale is None else scale, *window, offset, softcap, dropout, weights)
    full = columns + extra
    sizes = {
        "output": (b, h, rows, v),
        "lse": (b, h, rows),
        "mean": (b, rows, full),
        "heads": (b, h, rows, full),
    }
    grads = [None if name in without else random(*sizes[name]) for name in ("output", "lse")]
    grads[1] = None if grads[1] is None else grads[1].to(torch.promote_types(dtype, torch.float32))
    grads.append(random(*sizes[weights]) if weights != "none" else None)
    return Work(tensors, options, grads)


def forward(kernels: Any, work: Work) -> tuple[Tensor, ...]:
    """Output, lse and weights by the launcher."""
    return kernels.attention_forward(OPS["attention_forward"].Call(*work.tensors, *work.options))


def run(kernels: Any, work: Work) -> dict[str, Tensor]:
    """All results and gradients by the launchers."""
    results = forward(kernels, work)
    call = OPS["attention_backward"].Call(
        *work.grads, *work.tensors, results[0], results[1], *work.options, work.needs()
    )
    return _named(work, results, kernels.attention_backward(call))


def expected(work: Work) -> dict[str, Tensor]:
    """The same by the reference."""
    given = [t.detach().requires_grad_() if t is not None and _floating(t) else t for t in work.tensors]
    given[7] = work.tensors[7]
    results = reference.attention_forward(*work.tensors, *work.options)
    grads = reference.attention_backward(
        *work.grads, *given, results[0], results[1], *work.options, work.needs()
    )
    return _named(work, results, grads)


def _named(work: Work, results: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
    found = dict(zip(RESULTS, results, strict=True))
    if work.options[-1] == "none":
        del found["weights"]
    for name, grad, needed in zip(GRADIENTS, grads, work.needs(), strict=True):
        if needed:
            found[f"grad of {name}"] = grad
        else:
            assert grad.shape == (0,), name
    return found


def check(kernels: Any, work: Work) -> dict[str, Tensor]:
    """Compare the launchers with the reference within the budgets of the suite; return their results."""
    found, same, oracle = run(kernels, work), expected(work), expected(work.double())
    assert found.keys() == oracle.keys()
    for name, value in found.items():
        assert_close_to_oracle(value, same[name], oracle[name], name)
    return found
