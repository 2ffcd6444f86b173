"""The matrix of the cells: dtype x backend x shape, outputs and every gradient against the oracle."""

import pytest
import torch

from .cells import (
    CELLS,
    DTYPES,
    MODULES,
    STATES,
    TORCH_MODULES,
    check,
    fused_step,
    oracle_step,
    run,
    torch_step,
    workload,
)
from .extended import extended_results

# Batch, input size, hidden size: every batch, every hidden size, and the corners where loops have tails.
SHAPES = [
    *((batch, 13, 17) for batch in (0, 1, 2, 3, 5, 7, 9, 33)),
    *((3, 7, hidden) for hidden in (1, 5, 63, 65, 129)),
    *((9, 1, hidden) for hidden in (1, 5, 17)),
    (1, 65, 63),
    (8, 16, 16),
    (33, 129, 5),
    (12, 300, 33),
]
LARGE = [(1000, 13, 17), (4, 21, 513), (97, 33, 65), (1, 4100, 9)]

every_cell = pytest.mark.parametrize("cell", CELLS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.in_turn("shape")
@every_cell
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(place, cell, dtype, shape):
    check(workload(cell, *shape, dtype, place.device))


@pytest.mark.in_turn("shape")
@every_cell
@every_dtype
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_matches_the_oracle_on_large_shapes(place, cell, dtype, shape):
    batch, input_size, hidden = shape
    if place.slow:
        batch, input_size, hidden = min(batch, 40), min(input_size, 300), min(hidden, 140)
    # Sums of thousands of products of size 1 would saturate all gates but one or two, and the largest error
    # would be the luck of one rounding.
    scale = 1 / 32 if input_size > 1000 else 1.0
    check(workload(cell, batch, input_size, hidden, dtype, place.device, scale=scale))


@every_cell
@every_dtype
@pytest.mark.parametrize("batch", [1, 9])
def test_without_bias(place, cell, dtype, batch):
    check(workload(cell, batch, 7, 19, dtype, place.device, bias=False))


@every_cell
@pytest.mark.parametrize("name", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("batch", [2, 9])
def test_with_one_bias(place, cell, name, batch):
    work = workload(cell, batch, 7, 19, device=place.device)
    tensors = {**work.tensors, name: None}
    with torch.no_grad():
        expected = torch_step(cell, {**work.tensors, name: torch.zeros_like(work.tensors[name])})
        actual = fused_step(cell, tensors)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@every_cell
@every_dtype
def test_forward_alone_is_the_training_forward(place, cell, dtype):
    """Without gradients nothing is saved, and the results keep their bits."""
    work = workload(cell, 9, 13, 33, dtype, place.device)
    trained, inferred = check(work), check(work, wanted=())
    for state in STATES[cell]:
        assert trained[f"{state}'"].equal(inferred[f"{state}'"])


@every_cell
@pytest.mark.parametrize("hx", [False, True], ids=["zeros", "given"])
@pytest.mark.parametrize("batch", [None, 0, 1, 4], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_modules(place, cell, hx, batch, bias):
    """Unbatched input, hx=None and bias=False give torch's results, shapes and gradients."""
    ours = MODULES[cell](6, 11, bias=bias, device=place.device)
    theirs = TORCH_MODULES[cell](6, 11, bias=bias, device=place.device)
    theirs.load_state_dict(ours.state_dict())
    shape = () if batch is None else (batch,)
    input = torch.randn(*shape, 6, device=place.device)
    states = tuple(torch.randn(*shape, 11, device=place.device) for _ in STATES[cell])
    results = []
    for module in (ours, theirs):
        x = input.clone().requires_grad_()
        s = tuple(t.clone().requires_grad_() for t in states)
        out = module(x, (s if cell == "lstm" else s[0]) if hx else None)
        out = out if isinstance(out, tuple) else (out,)
        sum((o * o).sum() for o in out).backward()
        results.append([*out, x.grad, *(t.grad for t in s if hx), *(p.grad for p in module.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()


@every_cell
def test_reference_is_torchs_cell_in_float64(cell):
    """The oracles themselves, against PyTorch's independent implementation."""
    work = workload(cell, 5, 7, 11, torch.float64)
    oracle, extended, torch_results = run(oracle_step, work), extended_results(work), run(torch_step, work)
    for name, expected in torch_results.items():
        torch.testing.assert_close(oracle[name], expected, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(extended[name], expected, rtol=1e-13, atol=1e-14)
