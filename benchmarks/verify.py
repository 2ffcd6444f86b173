"""Whether a peer's answer is right: no time is given for a wrong one.

A peer passes if, for every output and gradient, its largest error against the float64 oracle is at most twice
the error of eager PyTorch in the same dtype plus `FEW_ULP` ulp of the oracle's largest value. Eager itself must agree
with the oracle to half of the dtype's digits; else the case is wrong, and nothing can be judged by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FEW_ULP = 4


@dataclass(frozen=True)
class Verdict:
    """The tensor that came closest to its budget, or went furthest beyond it."""

    ok: bool
    error: float
    budget: float
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
) -> dict[str, float]:
    """Return the largest allowed error of each tensor.

    Raises:
        ValueError: eager disagrees with the oracle, so the case itself is broken.
    """
    if set(eager) != set(oracle):
        raise ValueError(f"eager: got tensors {sorted(eager)}, expected {sorted(oracle)}")
    eps = torch.finfo(dtype).eps
    budgets = {}
    for name, expected in oracle.items():
        scale = expected.abs().max().item() if expected.numel() else 0.0
        error = largest_error(eager[name], expected)
        if not error <= math.sqrt(eps) * scale:
            raise ValueError(f"eager: {name} is off by {error:.2e}, its largest value is {scale:.2e}")
        budgets[name] = 2 * error + FEW_ULP * eps * scale
    return budgets


def verify(
    got: Mapping[str, Tensor], oracle: Mapping[str, Tensor], budgets: Mapping[str, float], dtype: torch.dtype
) -> Verdict:
    """Compare one peer's tensors with the oracle's."""
    if set(got) != set(oracle):
        reason = f"got tensors {sorted(got)}, expected {sorted(oracle)}"
        return Verdict(False, math.inf, 0.0, reason)
    worst, worst_share, wrong = Verdict(True, 0.0, 0.0), -1.0, []
    for name, expected in oracle.items():
        error, budget = largest_error(got[name], expected), budgets[name]
        share = error / budget if budget else (math.inf if error else 0.0)
        reason = ""
        if got[name].dtype != dtype:
            share, reason = math.inf, f"{name} got {got[name].dtype}, expected {dtype}"
        elif got[name].shape != expected.shape:
            reason = f"{name} got shape {tuple(got[name].shape)}, expected {tuple(expected.shape)}"
        elif not share <= 1:
            reason = f"{name} is off by {error:.2e}, allowed {budget:.2e}"
        if reason:
            wrong.append(reason)
        if share > worst_share:
            worst, worst_share = Verdict(not reason, error, budget, reason), share
    return Verdict(not wrong, worst.error, worst.budget, "; ".join(wrong))
