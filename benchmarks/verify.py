"""Whether a peer's answer is right: no time is given for any other.

A peer is ``ok`` if, for every output and gradient, its largest error against the float64 oracle is at most
twice the error of eager PyTorch in the same dtype plus `FEW_ULP` ulp of the oracle's largest value. Beyond
that it is ``inexact`` while it agrees with the oracle to half of the dtype's digits (it rounds worse than
eager), else ``wrong``: another shape, another dtype, NaN, another function. Eager itself must agree to half
of the digits, or the case is broken and can't judge anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FEW_ULP = 4

Standing = Literal["ok", "inexact", "wrong"]
_WORSE: tuple[Standing, ...] = ("ok", "inexact", "wrong")


@dataclass(frozen=True)
class Budget:
    """The largest error allowed, and the one from which on it is no rounding."""

    allowed: float
    rounding: float


@dataclass(frozen=True)
class Verdict:
    """How a peer stands; `error` and `allowed` are those of the tensor that is worst against its budget."""

    standing: Standing
    error: float
    allowed: float
    reason: str = ""


def largest_error(got: Tensor, expected: Tensor) -> float:
    """Return max |got - expected| in float64; infinite where NaN, inf or another shape came."""
    if got.shape != expected.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    error = (got.detach().to("cpu", torch.float64) - expected).abs().max().item()
    return error if math.isfinite(error) else math.inf


def eager_budgets(
    eager: Mapping[str, Tensor], oracle: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Budget]:
    """Return the budget of each tensor.

    Raises:
        ValueError: eager disagrees with the oracle, so the case itself is broken.

    """
    if set(eager) != set(oracle):
        raise ValueError(f"eager: got tensors {sorted(eager)}, expected {sorted(oracle)}")
    eps = torch.finfo(dtype).eps
    budgets = {}
    for name, expected in oracle.items():
        scale = expected.abs().max().item() if expected.numel() else 0.0
        error, rounding = largest_error(eager[name], expected), math.sqrt(eps) * scale
        if not error <= rounding:
            raise ValueError(f"eager: {name} is off by {error:.2e}, its largest value is {scale:.2e}")
        budgets[name] = Budget(2 * error + FEW_ULP * eps * scale, rounding)
    return budgets


def verify(
    got: Mapping[str, Tensor], oracle: Mapping[str, Tensor], budgets: Mapping[str, Budget], dtype: torch.dtype
) -> Verdict:
    """Compare one peer's tensors with the oracle's."""
    if set(got) != set(oracle):
        return Verdict("wrong", math.inf, 0.0, f"got tensors {sorted(got)}, expected {sorted(oracle)}")
    verdicts = [_verify_one(name, got[name], oracle[name], budgets[name], dtype) for name in oracle]
    worst = max(verdicts, key=lambda v: (_WORSE.index(v.standing), _share(v)))
    reasons = "; ".join(v.reason for v in verdicts if v.reason)
    return Verdict(worst.standing, worst.error, worst.allowed, reasons)


def _verify_one(name: str, got: Tensor, expected: Tensor, budget: Budget, dtype: torch.dtype) -> Verdict:
    error = largest_error(got, expected)
    standing: Standing = (
        "ok" if error <= budget.allowed else "inexact" if error <= budget.rounding else "wrong"
    )
    reason = "" if standing == "ok" else f"{name} is off by {error:.2e}, allowed {budget.allowed:.2e}"
    if got.shape != expected.shape:
        reason = f"{name} got shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    elif got.dtype != dtype:
        standing, reason = "wrong", f"{name} got {got.dtype}, expected {dtype}"
    return Verdict(standing, error, budget.allowed, reason)


def _share(verdict: Verdict) -> float:
    if verdict.allowed:
        return verdict.error / verdict.allowed
    return math.inf if verdict.error else 0.0
