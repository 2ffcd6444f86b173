"""Strides, offsets and odd values: every argument in every layout, and rows that keep to themselves."""

import pytest
import torch
from torch import Tensor

from .cells import (
    CELLS,
    PARAMETERS,
    STATES,
    Workload,
    assert_same_bits,
    check,
    fused_step,
    run,
    saturated_workload,
    workload,
)

every_cell = pytest.mark.parametrize("cell", CELLS)


def every_other(t: Tensor) -> Tensor:
    """Values two apart in the last dimension."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype, device=t.device)
    wide[..., ::2] = t
    return wide[..., ::2]


def transposed(t: Tensor) -> Tensor:
    """Column-major order."""
    return t.t().contiguous().t() if t.dim() == 2 else every_other(t)


def padded_rows(t: Tensor) -> Tensor:
    """Dense rows that are further apart than they are long."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype, device=t.device)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def unaligned(t: Tensor) -> Tensor:
    """Contiguous, one element past an aligned address."""
    flat = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype, device=t.device)
    flat[1:] = t.flatten()
    return flat[1:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """Every row the same memory."""
    return t[:1].expand(t.shape)


def one_value(t: Tensor) -> Tensor:
    """Every element the same memory: strides of zero."""
    return t.flatten()[:1].view([1] * t.dim()).expand(t.shape)


LAYOUTS = (every_other, transposed, padded_rows, unaligned, expanded, one_value)


def arguments(cell: str) -> tuple[str, ...]:
    return ("input", *STATES[cell], *PARAMETERS)


@every_cell
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch", [3, 9])
def test_each_argument(place, cell, layout, batch):
    """Each argument alone in a layout."""
    work = workload(cell, batch, 6, 10, device=place.device)
    for name in arguments(cell):
        check(work.with_(**{name: layout(work.tensors[name])}), what=f"{name} {layout.__name__}: ")


@every_cell
@pytest.mark.parametrize("layout", [f for f in LAYOUTS if f is not one_value], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_all_arguments(place, cell, layout, dtype):
    """All arguments, and the gradients of the results, in a layout.

    Not one value each: all results would be one number, and PyTorch's error in it luck rather than a measure.
    """
    check(workload(cell, 9, 6, 10, dtype, place.device).map(layout))


@every_cell
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_gradients_of_results(place, cell, layout):
    """A sum's backward expands a scalar; others slice."""
    work = workload(cell, 9, 6, 10, device=place.device)
    grads = tuple(layout(g) for g in work.grads)
    check(Workload(cell, work.tensors, grads))


@every_cell
def test_results_are_contiguous_and_own_their_memory(place, cell):
    work = workload(cell, 9, 6, 10, device=place.device).map(transposed)
    pointers = {t.untyped_storage().data_ptr() for t in work.tensors.values()}
    with torch.no_grad():
        outputs = fused_step(cell, work.tensors)
    for out in outputs:
        assert out.is_contiguous()
        assert out.untyped_storage().data_ptr() not in pointers
        pointers.add(out.untyped_storage().data_ptr())


@every_cell
def test_arguments_are_left_as_they_were(place, cell):
    work = workload(cell, 9, 6, 10, device=place.device)
    before = work.map(torch.clone)
    run(fused_step, work)
    for name, t in work.tensors.items():
        assert t.equal(before.tensors[name]), name
    for grad, copy in zip(work.grads, before.grads, strict=True):
        assert grad.equal(copy)


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e4])
@pytest.mark.parametrize("batch", [2, 9])
def test_saturated_gates(place, cell, dtype, scale, batch):
    """Gates far beyond where exp overflows: no NaN, and the oracle's values."""
    work = saturated_workload(cell, batch, scale, dtype, place.device)
    for results in (check(work), check(work.map(torch.neg))):
        for name, t in results.items():
            assert t.isfinite().all(), name


@every_cell
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [3, 9])
def test_a_bad_row_keeps_to_itself(place, cell, value, dtype, batch):
    """Inf or NaN in one row of one operand reaches that row's results, and no other row's."""
    clean = workload(cell, batch, 6, 21, dtype, place.device)
    expected = run(fused_step, clean)
    row = batch - 2
    others = [i for i in range(batch) if i != row]
    for name in ("input", *STATES[cell]):
        bad = clean.map(torch.clone)
        bad.tensors[name][row, 1] = value
        check(bad, wanted=(), what=f"{value} in {name}: ")
        actual = run(fused_step, bad)
        rows = {k: t[others] for k, t in actual.items() if t.shape[0] == batch}
        assert_same_bits(rows, {k: expected[k][others] for k in rows}, f"{value} in {name}")


@pytest.mark.natively
@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 300, 70), (4, 60, 130), (40, 60, 70)], ids=str)
def test_repeats_in_every_bit(place, cell, dtype, shape):
    """Run to run and whatever ran before; our own products for one thread as for two.

    The other backends' products are torch's, whose sums may be cut otherwise for each number of threads.
    """
    work = workload(cell, *shape, dtype, place.device)
    before, first = torch.get_num_threads(), None
    try:
        for threads in (before, 1) if place.slow else (before, 1, 2, 3):
            torch.set_num_threads(threads)
            if first is None or place.backend != "cpu":
                first = run(fused_step, work)
            for attempt in range(2):
                assert_same_bits(run(fused_step, work), first, f"{threads} threads, run {attempt + 1}")
            assert_same_bits(run(fused_step, work.map(torch.clone)), first, f"{threads} threads, elsewhere")
    finally:
        torch.set_num_threads(before)
