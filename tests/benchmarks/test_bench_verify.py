"""The check before every time: what passes, what is inexact, what is wrong."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.verify import FEW_ULP, Budget, eager_budgets, largest_error, verify

EPS = torch.finfo(torch.float32).eps
ORACLE = {"y": torch.tensor([1.0, -4.0], dtype=torch.float64)}
BUDGETS = {"y": Budget(allowed=1e-6, rounding=1e-3)}


def off_by(error: float) -> dict[str, torch.Tensor]:
    return {"y": (ORACLE["y"] + torch.tensor([error, 0.0])).float()}


def test_budget_is_twice_eagers_error_and_a_few_ulp_of_the_largest_value():
    eager = off_by(1e-6)
    error = largest_error(eager["y"], ORACLE["y"])
    budget = eager_budgets(eager, ORACLE, torch.float32)["y"]
    assert error > 0
    assert budget.allowed == pytest.approx(2 * error + FEW_ULP * EPS * 4)
    assert budget.rounding == pytest.approx(math.sqrt(EPS) * 4)


@pytest.mark.parametrize("error", [0.1, float("nan"), float("inf")])
def test_an_eager_that_disagrees_with_the_oracle_breaks_the_case(error):
    with pytest.raises(ValueError, match="eager: y is off"):
        eager_budgets(off_by(error), ORACLE, torch.float32)


@pytest.mark.parametrize(
    ("error", "standing"),
    [(0.0, "ok"), (9e-7, "ok"), (5e-6, "inexact"), (0.1, "wrong"), (math.nan, "wrong"), (math.inf, "wrong")],
)
def test_standing_by_error(error, standing):
    verdict = verify(off_by(error), ORACLE, BUDGETS, torch.float32)
    assert verdict.standing == standing
    assert bool(verdict.reason) == (standing != "ok")


def test_other_shape_dtype_or_names_are_wrong():
    right = ORACLE["y"].float()
    for got in ({"y": right[None]}, {"y": right.double()}, {"z": right}, {}, {"y": right, "z": right}):
        assert verify(got, ORACLE, BUDGETS, torch.float32).standing == "wrong"


def test_one_wrong_tensor_among_many_is_found_and_named():
    oracle = {name: ORACLE["y"] for name in "abc"}
    got = {name: ORACLE["y"].float() for name in "abc"}
    got["b"] = off_by(1.0)["y"]
    verdict = verify(got, oracle, dict.fromkeys("abc", BUDGETS["y"]), torch.float32)
    assert verdict.standing == "wrong"
    assert verdict.reason.startswith("b is off by 1")
    assert verdict.error == pytest.approx(1.0)


def test_an_empty_tensor_is_right():
    empty = {"y": torch.empty(0, 3, dtype=torch.float64)}
    budgets = eager_budgets({"y": torch.empty(0, 3)}, empty, torch.float32)
    assert verify({"y": torch.empty(0, 3)}, empty, budgets, torch.float32).standing == "ok"
