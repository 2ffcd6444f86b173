"""Whether the backwards are derivatives, to the second order."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fusednn
from fusednn.functional import spatial_attention, spatial_softmax

from .cases import OUTPUTS, SCORES, interpreted

# Where calls take long, gradcheck's fast mode: along random directions.
CHECKED = ("spatial_softmax", "spatial_attention")  # what the tests here differentiate


def leaf(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size) + len(size))
    return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()


def leaves_of(score: str) -> tuple:
    if score == "positional":
        return leaf(2, 3, 2, 3), leaf(2, 3), leaf(2, 2, 6), None, leaf(1).detach().exp().requires_grad_()
    return leaf(2, 3, 2, 3), leaf(4, 3), leaf(2, 4), leaf(2, 4), leaf(1).detach().exp().requires_grad_()


def attention(output: str, mask):
    return lambda *t: spatial_attention(*t[:4], temperature=t[4], mask=mask, output=output)


MASK = torch.tensor([[[[1, 0, 1], [1, 1, 0]]], [[[0, 0, 0], [0, 0, 0]]]], dtype=torch.bool)


@pytest.mark.natively
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["", "masked"])
def test_gradcheck(place, score, output, mask):
    assert gradcheck(attention(output, mask), leaves_of(score), fast_mode=interpreted(place))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["", "masked"])
def test_gradgradcheck(reference_place, score, output, mask):
    assert gradgradcheck(attention(output, mask), leaves_of(score))


def softmax(coordinates: bool):
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)

    def function(x, t):
        return spatial_softmax(x, mask=mask, temperature=t, return_coordinates=coordinates)

    return function, (leaf(2, 2, 2, 4), leaf(1).detach().exp().requires_grad_())


@pytest.mark.natively
@pytest.mark.parametrize("coordinates", [False, True])
def test_of_the_softmax(place, coordinates):
    assert gradcheck(*softmax(coordinates), fast_mode=interpreted(place))


@pytest.mark.parametrize("coordinates", [False, True])
def test_twice_of_the_softmax(reference_place, coordinates):
    assert gradgradcheck(*softmax(coordinates))


def test_a_gradient_penalty(place):
    """A second derivative in use: the map's entropy, and the gradient's norm of it."""
    module = fusednn.SpatialAttention(3, 4, 3, 3, dtype=torch.float64)
    x, h = leaf(2, 3, 3, 3), leaf(2, 4)
    _, a = module(x, h)
    entropy = -(a * a.log()).sum()
    (gradient,) = torch.autograd.grad(entropy, x, create_graph=True)
    gradient.square().sum().backward()
    s = module.score(x.detach().requires_grad_()) + module.hidden(h).view(2, 1, 3, 3)
    assert module.score.weight.grad.ne(0).any()
    assert s.shape == a.shape
