"""Whether the backwards are derivatives, to the second order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fusednn.functional import scaled_dot_product_attention

from .cases import TENSORS, Work, fused_step, make
from .op_cases import op_cases, works

# Where calls take long, gradcheck's fast mode: along random directions.
CHECKED = ("attention", "projection")  # what the tests here differentiate

CASE = "M=4 K=3 N=5"

WORKS = {
    case: work
    for case, work in works(torch.float64).items()
    if work.tensors["query"].numel() and work.tensors["key"].numel()
}


def function_of(work: Work) -> tuple[Callable[..., Any], list[Tensor]]:
    """The attention as a function of its leaves; where lse is -inf it has no slope."""
    names = [n for n in TENSORS if (t := work.tensors[n]) is not None and t.dtype != torch.bool]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        output, lse, weights = fused_step(work, {**work.tensors, **dict(zip(names, leaves, strict=True))})
        lse = lse.masked_fill(lse.detach() == -torch.inf, 0)
        return (output, lse) if work.weights == "none" else (output, lse, weights)

    return function, [work.tensors[n].detach().clone().requires_grad_() for n in names]


def at(place, work: Work) -> Work:
    """The work with all of its tensors there."""
    bounds = tuple(None if b is None else b.to(place.device) for b in work.bounds)
    slopes = None if work.slopes is None else work.slopes.to(place.device)
    tensors = {n: None if t is None else t.to(place.device) for n, t in work.tensors.items()}
    return work.where(tensors=tensors, bounds=bounds, slopes=slopes)


@pytest.mark.natively
@pytest.mark.parametrize("case", WORKS)
def test_gradcheck(training_place, case):
    fast = training_place.slow or training_place.device != "cpu"
    assert gradcheck(*function_of(at(training_place, WORKS[case])), fast_mode=fast)


@pytest.mark.parametrize("case", WORKS)
def test_gradgradcheck(reference_place, case):
    assert gradgradcheck(*function_of(at(reference_place, WORKS[case])), fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_projections(bias):
    input, weight, b = (
        t.detach().requires_grad_() for t in op_cases("projection_forward", torch.float64)[CASE]
    )
    leaves = (input, weight, b) if bias else (input, weight)

    def function(*given: Tensor) -> Tensor:
        return torch.ops.fusednn.projection_forward(*given, *(() if bias else (None,)))

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("case", ["heads", "float mask"])
def test_gradgradcheck_of_every_element(reference_place, case):
    """Not along random directions."""
    options = {"heads": {}, "float mask": {"mask": "float 11ls", "key_mask": "bool", "window": (-1, 1)}}[case]
    sizes = {"batch": 1, "heads": 2, "rows": 2, "columns": 3, "size": 2, "weights": "heads"}
    work = at(reference_place, make(**sizes, **options, dtype=torch.float64))
    assert gradgradcheck(*function_of(work))


def test_empty_rows_in_the_second_order(training_place):
    """Rows that see nothing have second derivatives 0, not NaN."""
    work = at(training_place, make(key_mask="bool", weights="mean", dtype=torch.float64))
    work.tensors["key_mask"][0] = False
    function, leaves = function_of(work)
    found = torch.autograd.grad(sum(t.square().sum() for t in function(*leaves)), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in found), leaves)
    for g in (*found, *second):
        assert g.isfinite().all()
        assert g[0].eq(0).all()
        assert g[1].ne(0).any()


@pytest.mark.parametrize("name", ["key", "value"])
def test_hidden_nan_in_the_second_order(training_place, name):
    """Keys and values that no row sees reach neither first nor second derivatives."""
    work = at(training_place, make(key_mask="bool", weights="heads", dtype=torch.float64))
    hidden = ~work.tensors["key_mask"][:, None, :, None]
    found = []
    for poison in (torch.nan, 0.0):
        function, leaves = function_of(work.with_(**{name: work.tensors[name].masked_fill(hidden, poison)}))
        loss = sum(t.square().sum() for t in function(*leaves))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([*first, *second])
    torch.testing.assert_close(found[0], found[1])


def test_a_gradient_penalty(training_place):
    """A second derivative in use: the norm of the gradient of the weights' entropy."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    q, k, v = (t.to(training_place.device).requires_grad_() for t in (q, k, v))

    def penalty(weights: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(-(weights * weights.log()).sum(), q, create_graph=True)
        return gradient.square().sum()

    ours = penalty(scaled_dot_product_attention(q, k, v, return_weights="heads")[1])
    theirs = penalty((q @ k.mT / 2).softmax(-1))
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(p, (q, k)) for p in (ours, theirs))
    torch.testing.assert_close(found, expected)
