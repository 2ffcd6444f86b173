"""Whether the backward is a derivative, to the second order."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fusednn.functional import attention_lstm

from .op_cases import op_cases

CHECKED = ("attention_lstm",)  # what the tests here differentiate


def sequence(case: str):
    """The recurrence of a sample call as a function of its leaves."""
    features, h, c, w, u, b, v, t, fixed, *rest = op_cases("attention_lstm_forward", torch.float64)[case]
    w_ih, w_hh, b_ih, b_hh, lengths, output, _cell, form, _save = rest
    leaves = (features, h, c, w, u, b, v, t, w_ih, w_hh, b_ih, b_hh)

    def function(features, h, c, w, u, b, v, t, w_ih, w_hh, b_ih, b_hh):
        hidden, maps, state = attention_lstm(
            features, h if c is None else (h, c), w, u, w_ih, w_hh, b, b_ih, b_hh, v=v,
            temperature=fixed if t is None else t, lengths=lengths, output=output, form=form,
        )  # fmt: skip
        return hidden, maps, *((state,) if c is None else state)

    return function, leaves


CASES = [case for case in op_cases("attention_lstm_forward") if case not in ("inference", "NHWC frames")]


@pytest.mark.natively
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(recurrence_place, case):
    function, leaves = sequence(case)
    assert gradcheck(function, leaves, fast_mode=recurrence_place.slow)


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("lstm flatten hoisted")])
def test_gradgradcheck(reference_place, case):
    assert gradgradcheck(*sequence(case), fast_mode=True)
