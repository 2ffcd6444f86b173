"""A core of the matrix on every instruction set that the machine has."""

import pytest
import torch

from fusednn.testing import poisoned_memory

from .cells import CELLS, DTYPES, assert_same_bits, check, fused_step, run, saturated_workload, workload

SHAPES = [(1, 5, 3), (3, 17, 9), (8, 33, 65), (33, 12, 31), (5, 130, 64)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(native, isa, cell, dtype, shape):
    assert native.isa() == isa
    work = workload(cell, *shape, dtype)
    with poisoned_memory():
        check(work)
        check(work, wanted=())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_saturated_gates(cell, scale):
    work = saturated_workload(cell, 9, scale)
    for results in (check(work), check(work.map(torch.neg))):
        assert all(t.isfinite().all() for t in results.values())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_storage_converts_every_value(cell, dtype):
    """Every bit pattern of a 16-bit state passes through a cell whose gates are one half."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    states = bits.view(dtype)[:, None]
    tensors = {"input": torch.zeros(2**16, 1, dtype=dtype)}
    tensors |= {"h": states} if cell == "gru" else {"h": torch.zeros_like(states), "c": states}
    rows = 4 if cell == "lstm" else 3
    tensors |= {
        "weight_ih": torch.zeros(rows, 1, dtype=dtype),
        "weight_hh": torch.zeros(rows, 1, dtype=dtype),
    }
    outputs = fused_step(cell, {**tensors, "bias_ih": None, "bias_hh": None})
    got = outputs[-1] if cell == "lstm" else outputs[0]
    # GRU: n + z (h - n), where 0 times an infinite h in the product makes NaN.
    expected = (0.5 * states.float()).to(dtype)
    if cell == "gru":
        expected = expected.where(states.isfinite(), torch.nan)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cell", CELLS)
def test_repeats_in_every_bit(isa, cell):
    work = workload(cell, 12, 40, 50)
    first = run(fused_step, work)
    for attempt in range(3):
        assert_same_bits(run(fused_step, work), first, f"{isa}, run {attempt + 2}")
