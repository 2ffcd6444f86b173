"""spatial_softmax: a softmax over positions, and expected coordinates."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fusednn.functional import spatial_softmax
from fusednn.testing import assert_close_to_oracle

from .cases import DTYPES, interpreted, torch_coordinates, torch_softmax

SHAPES = [(2, 3, 4, 5), (0, 2, 3, 3), (1, 1, 1, 1), (2, 4, 1, 7), (3, 2, 6, 1), (1, 2, 33, 31)]


def results(step, logits: Tensor, mask, t: Tensor, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Map, coordinates and the gradients of logits and temperature."""
    leaves = [x.detach().requires_grad_() for x in (logits, t)]
    out = step(leaves[0], mask, leaves[1])
    return [*(o.detach() for o in out), *torch.autograd.grad(out, leaves, grads)]


def fused(logits, mask, t):
    return spatial_softmax(logits, mask=mask, temperature=t, return_coordinates=True)


def composed(logits, mask, t):
    a = torch_softmax(logits, mask, t)
    return a, torch_coordinates(a)


@pytest.mark.in_turn("shape")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_torch(place, shape, masked, dtype):
    logits = torch.randn(shape, dtype=torch.float64).to(dtype)
    grads = tuple(torch.randn(s, dtype=torch.float64).to(dtype) for s in (shape, (*shape[:2], 2)))
    mask = torch.rand(shape) > 0.3 if masked else None
    if masked and mask.numel():
        mask[..., 0, 0] = True
    t = torch.tensor(0.6, dtype=dtype)
    mask, t, logits = (x if x is None else x.to(place.device) for x in (mask, t, logits))
    grads = tuple(g.to(place.device) for g in grads)
    wide = tuple(g.double() for g in grads)
    actual, expected, oracle = [], [], []
    for x in (logits, -logits, logits.flip(3), -logits.flip(2)):  # one alone can be luck
        actual.append(results(fused, x, mask, t, grads))
        expected.append(results(composed, x, mask, t, grads))
        oracle.append(results(composed, x.double(), mask, t.double(), wide))
    for i, name in enumerate(("map", "xy", "d logits", "d T")):
        found, theirs, exact = (torch.stack([r[i] for r in each]) for each in (actual, expected, oracle))
        if dtype == torch.float64:
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)
        else:
            assert_close_to_oracle(found, theirs, exact, name)


def test_map_alone(place):
    logits = torch.randn(2, 3, 4, 5, device=place.device)
    a = spatial_softmax(logits, temperature=2.0)
    torch.testing.assert_close(a, torch_softmax(logits, None, 2.0))
    torch.testing.assert_close(a.sum((2, 3)), torch.ones_like(a[..., 0, 0]))
    assert (a - (logits / 2).softmax(-1)).abs().max() > 0.1
    assert (a - (logits / 2).softmax(-2)).abs().max() > 0.1


def test_masks_of_single_maps(place):
    """Fully masked: zeros and no gradient, with NaN in it too; the others don't notice."""
    logits = torch.randn(2, 2, 3, 4, device=place.device)
    mask = torch.ones(2, 2, 3, 4, dtype=torch.bool, device=place.device)
    mask[1, 0] = False
    bad = logits.clone()
    bad[1, 0] = torch.nan
    grads = (torch.randn_like(logits), torch.randn(2, 2, 2, device=place.device))
    grads[0][1, 0] = torch.nan
    found, clean = (results(fused, x, mask, torch.tensor(0.5).to(x), grads) for x in (bad, logits))
    for name, a, b in zip(("map", "xy", "d logits", "d T"), found, clean, strict=True):
        assert a.equal(b), name
    for t in found[:3]:
        assert t[1, 0].eq(0).all()
        assert t[0].ne(0).any()


@pytest.mark.parametrize("size", [2, 3, 7, 20, 64, 1000])
def test_coordinates_are_those_of_linspace(place, size):
    """One-hot maps give the coordinates themselves: (2 i - (n - 1)) / (n - 1), rounded once."""
    logits = torch.full((size, 1, 2, size), -torch.inf, device=place.device)
    logits[:, 0, 1].fill_diagonal_(0)
    some = slice(None, None, 37) if interpreted(place) and size > 64 else slice(None)  # with the last
    _, xy = spatial_softmax(logits[some], return_coordinates=True)
    i = torch.arange(size, dtype=torch.float64)
    exact = ((2 * i - (size - 1)) / (size - 1)).float().to(place.device)
    assert xy[:, 0, 0].equal(exact[some])
    assert xy[:, 0, 1].eq(1).all()
    assert xy[0, 0, 0] == -1
    assert xy[-1, 0, 0] == 1
    assert exact.equal(-exact.flip(0))  # neither torch.linspace nor numpy's is always that symmetric
    torch.testing.assert_close(exact, torch.linspace(-1, 1, size, device=exact.device), rtol=0, atol=2e-7)
    torch.testing.assert_close(
        exact.cpu(), torch.from_numpy(np.linspace(-1, 1, size)).float(), rtol=0, atol=2e-7
    )


def test_extreme_logits(place):
    logits = torch.randn(2, 1, 3, 3, device=place.device) * 1e30
    a, xy = spatial_softmax(logits, temperature=1e-30, return_coordinates=True)
    assert a.flatten(2).amax(-1).eq(1).all()
    assert a.sum() == 2
    assert xy.isfinite().all()
    _, xy = spatial_softmax(torch.zeros(1, 1, 9, 9), temperature=1e30, return_coordinates=True)
    assert xy.abs().max() < 1e-6
