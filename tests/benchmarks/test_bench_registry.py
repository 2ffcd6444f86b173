"""The table of cases: unique, complete, and with costs that a hand calculation confirms."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import doubling_case

from benchmarks import registry
from benchmarks.cases.rnn import cell_bytes, cell_flops
from benchmarks.registry import load_cases, select_cases


def test_every_case_has_costs_and_a_name_that_tells_them_apart():
    cases = load_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.flops > 0, case.name
        assert case.bytes > 0, case.name
        assert case.name.endswith(f"-{case.mode}")
        assert case.torch_dtype.is_floating_point


def test_rnn_shapes_are_the_agreed_ones():
    shapes = {(c.shape["B"], c.shape["I"], c.shape["H"]) for c in load_cases() if c.family == "rnn"}
    assert shapes == {(1, 8, 8), (1, 128, 128), (32, 128, 128), (32, 512, 512), (4, 12800, 128)}


@pytest.mark.parametrize(
    ("cell", "mode", "flops", "elements"),
    [
        # B=2 I=3 H=5. LSTM: 20 x 3 + 20 x 5 weights = 160, 40 biases, x 6, h 10, c 10, h' 10, c' 10.
        ("lstm", "inference", 2 * 2 * 160, 160 + 40 + 6 + 10 + 10 + 10 + 10),
        # Saved and read again: 40 each; weights, x, h, c read again: 186; c' 10; gradients of 200 + 26.
        ("lstm", "training", 3 * 2 * 2 * 160, 246 + 40 + 40 + 186 + 10 + 226),
        # GRU: 15 x 8 = 120 weights, 30 biases, x 6, h 10, h' 10.
        ("gru", "inference", 2 * 2 * 120, 120 + 30 + 6 + 10 + 10),
        ("gru", "training", 3 * 2 * 2 * 120, 176 + 40 + 40 + 136 + 166),
    ],
)
def test_cell_costs_by_hand(cell, mode, flops, elements):
    assert cell_flops(cell, mode, 2, 3, 5) == flops
    assert cell_bytes(cell, mode, 2, 3, 5) == 4 * elements


def test_filters_combine():
    names = [c.name for c in select_cases(load_cases(), family="rnn", substring="gru", mode="training")]
    assert len(names) == 5
    assert all(name.startswith("gru") and name.endswith("training") for name in names)
    assert select_cases(load_cases(), family="no such family") == []


def test_the_small_suite_has_every_family_in_both_modes():
    quick = select_cases(load_cases(), quick=True)
    families = {path.stem for path in Path(registry.__file__).parent.glob("cases/[a-z]*.py")}
    assert {(c.family, c.mode) for c in quick} == {
        (f, m) for f in families for m in ("inference", "training")
    }
    assert len(families) >= 5
    assert len(quick) < len(load_cases()) / 3


def test_two_cases_of_one_name_are_refused(monkeypatch):
    import benchmarks.cases.rnn as rnn

    monkeypatch.setattr(rnn, "CASES", [doubling_case(), doubling_case()])
    with pytest.raises(ValueError, match="double-n7-inference"):
        registry.load_cases()
