"""Which gradients are asked for, how often, and whether they are derivatives, to the second order."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fusednn

from .cells import (
    CELLS,
    MODULES,
    STATES,
    TORCH_MODULES,
    Workload,
    check,
    fused_step,
    oracle_step,
    run,
    workload,
)

CHECKED = [f"{cell}_cell" for cell in CELLS]  # ops that gradcheck and gradgradcheck meet
every_cell = pytest.mark.parametrize("cell", CELLS)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["only h", "only c"])
@pytest.mark.parametrize("batch", [2, 9])
def test_through_one_result(place, used, batch):
    work = workload("lstm", batch, 7, 11, device=place.device)
    check(Workload("lstm", work.tensors, tuple(g if u else None for g, u in zip(work.grads, used))))


@every_cell
@pytest.mark.parametrize("batch", [2, 9])
def test_every_subset_of_frozen_arguments(place, cell, batch):
    work = workload(cell, batch, 3, 5, device=place.device)
    names = list(work.tensors)
    complete = run(fused_step, work)
    check(work)
    for size in (1, len(names) - 1) if place.slow else range(1, len(names)):
        for wanted in itertools.combinations(names, size):
            for name, t in run(fused_step, work, wanted).items():
                torch.testing.assert_close(
                    t, complete[name], msg=lambda text, n=f"{wanted} {name}": f"{n}: {text}"
                )


@every_cell
def test_modules_with_frozen_parameters(place, cell):
    ours, theirs = MODULES[cell](3, 5, device=place.device), TORCH_MODULES[cell](3, 5, device=place.device)
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(4, 3, device=place.device)
    for frozen in itertools.product([True, False], repeat=4):
        if all(frozen):
            continue
        for module in (ours, theirs):
            module.zero_grad()
            for parameter, freeze in zip(module.parameters(), frozen, strict=True):
                parameter.requires_grad_(not freeze)
            out = module(input)
            (out[0] if cell == "lstm" else out).sum().backward()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if b.grad is None:
                assert a.grad is None, name
            else:
                torch.testing.assert_close(a.grad, b.grad)


@every_cell
def test_backward_twice_over_a_retained_graph(place, cell):
    work = workload(cell, 9, 7, 11, device=place.device)
    tensors = {name: t.detach().requires_grad_() for name, t in work.tensors.items()}
    outputs = fused_step(cell, tensors)
    first = torch.autograd.grad(outputs, list(tensors.values()), work.grads, retain_graph=True)
    second = torch.autograd.grad(outputs, list(tensors.values()), work.grads)
    for a, b in zip(first, second, strict=True):
        assert a.equal(b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, list(tensors.values()), work.grads)


@every_cell
def test_an_argument_changed_before_backward_is_an_error(place, cell):
    work = workload(cell, 3, 7, 11, device=place.device)
    tensors = {name: t.clone().requires_grad_() for name, t in work.tensors.items()}
    outputs = fused_step(cell, tensors)
    with torch.no_grad():
        tensors["weight_hh"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, tensors["input"], work.grads)


@every_cell
@pytest.mark.parametrize("steps", [5])
def test_through_time(place, cell, steps):
    """Losses at some steps only, the state carried on, as in a decoder."""
    work = workload(cell, 4, 6, 8, torch.float64, place.device)
    results = []
    for step in (fused_step, oracle_step):
        leaves = {name: t.detach().requires_grad_() for name, t in work.tensors.items()}
        tensors, loss = dict(leaves), 0.0
        for t in range(steps):
            outputs = step(cell, tensors)
            tensors |= dict(zip(STATES[cell], outputs, strict=True))
            if t in (1, steps - 1):
                loss = loss + outputs[0].square().sum()
        results.append(torch.autograd.grad(loss, list(leaves.values())))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def _checkable(cell: str, batch: int, hidden: int, bias: bool, device: str):
    work = workload(cell, batch, 2, hidden, torch.float64, device, bias=bias)
    names = [name for name, t in work.tensors.items() if t is not None]

    def step(*values):
        return fused_step(cell, {**work.tensors, **dict(zip(names, values, strict=True))})

    return step, tuple(work.tensors[name].requires_grad_() for name in names)


@every_cell
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (8, 2)], ids=str)
def test_gradcheck(place, cell, bias, shape):
    if place.slow:
        shape = (min(shape[0], 3), min(shape[1], 2))  # the finite differences call a kernel for every element
    step, values = _checkable(cell, *shape, bias, place.device)
    assert gradcheck(step, values)


@every_cell
@pytest.mark.parametrize("bias", [True, False])
def test_gradgradcheck(place, cell, bias):
    step, values = _checkable(cell, 2, 2, bias, place.device)
    assert gradgradcheck(step, values)


@every_cell
def test_double_backward_through_a_penalty(place, cell):
    """A gradient penalty's gradients are those of the reference, in float32 too."""
    work = workload(cell, 9, 4, 6, device=place.device)
    results = []
    for step in (fused_step, oracle_step):
        tensors = {name: t.detach().requires_grad_() for name, t in work.tensors.items()}
        outputs = step(cell, tensors)
        (grad,) = torch.autograd.grad(sum(o.sum() for o in outputs), tensors["input"], create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), list(tensors.values()), allow_unused=True))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_backward_stays_on_the_forwards_backend(monkeypatch):
    """A forward made under use_backend is followed by that backend's backward, wherever it is called."""
    from fusednn.core import dispatch

    taken = []
    original = dispatch.Operation.choose

    def choose(self, *args):
        chosen = original(self, *args)
        taken.append((self.name, chosen.backend))
        return chosen

    monkeypatch.setattr(dispatch.Operation, "choose", choose)
    module = fusednn.LSTMCell(2, 3)
    with fusednn.use_backend("reference"):
        h, _ = module(torch.randn(1, 2))
    h.sum().backward()
    assert taken == [("lstm_cell_forward", "reference"), ("lstm_cell_backward", "reference")]
