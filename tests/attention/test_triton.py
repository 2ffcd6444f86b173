"""Attention's Triton kernels at their edges: tiles, masks, what must not leak, and what they write where."""

import pytest
import torch

from tests.places import ALL, INTERPRETED, running_on

from .triton_calls import SEED, check, forward, make, run

pytestmark = pytest.mark.interpreter
INTERPRETER = next(place for place in ALL if place.name == "triton-interpreted")
INF, NAN = torch.inf, torch.nan


@pytest.fixture
def kernels():
    """Return the launchers."""
    assert INTERPRETED
    with running_on(INTERPRETER):
        from fusednn.triton_kernels import attention

        yield attention


def bools(*size):
    return torch.rand(size) > 0.4


GROUPED = (1, 4, 2, 70, 90, 40, 24)
CASES = {
    "plain": {},
    "causal": {"window": (-1, 0)},
    "window": {"window": (3, 5), "offset": 4},
    "window without rows": {"window": (2, 1), "offset": -50},
    "float mask, softcap": {"mask": torch.randn(1, 2, 70, 1), "key_mask": bools(2, 90), "softcap": 3.0},
    "float key mask": {"key_mask": torch.randn(2, 90), "mask": bools(1, 1, 1, 90)},
    "extra columns": {"shape": GROUPED, "extra": 2, "alibi": True, "window": (-1, 0)},
    "dropout, heads": {"shape": GROUPED, "extra": 1, "dropout": 0.3, "weights": "heads", "window": (20, 0)},
    "mean of heads": {"extra": 2, "dropout": 0.3, "weights": "mean", "mask": torch.randn(2, 1, 70, 90)},
    "weights alone": {"weights": "mean", "without": ("output", "lse"), "mask": bools(2, 2, 70, 90)},
    "lse alone": {"without": ("output",), "key_mask": torch.randn(2, 90)},
    "float16": {"dtype": torch.float16, "window": (-1, 0), "dropout": 0.5},
    "bfloat16": {"dtype": torch.bfloat16, "mask": torch.randn(2, 1, 1, 90), "weights": "mean"},
}


@pytest.mark.parametrize("case", CASES)
def test_options(kernels, case):
    check(kernels, make(**CASES[case]))


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (15, 17), (16, 16), (33, 31), (1, 129), (129, 1), (65, 64)]
)
def test_lengths_around_tiles(kernels, rows, columns):
    check(kernels, make((1, 2, 1, rows, columns, 8, 8), window=(40, 3), dtype=torch.float16))


@pytest.mark.parametrize("offset", [-33, -31, -30, 30, 31, 32])
@pytest.mark.parametrize("window", [(-1, 0), (0, -1), (64, 1)], ids=str)
def test_bounds_around_tiles(kernels, window, offset):
    """Where a bound begins or ends a tile, of 32 here: one more or less is in the wrong loop."""
    check(kernels, make((1, 1, 1, 70, 100, 8, 8), window=window, offset=offset))


@pytest.mark.parametrize("size", [1, 8, 40, 64, 80, 96, 128, 256])
def test_head_sizes(kernels, size):
    check(kernels, make((1, 2, 2, 20, 37, size, max(size // 2, 1)), dtype=torch.bfloat16, window=(-1, 0)))


@pytest.mark.parametrize("shape", [(b, h, rows, s) for b in (1, 2) for h in (1, 2) for rows in (1, 18)
                                   for s in (1, 35)], ids=str)  # fmt: skip
def test_masks_of_every_shape(kernels, shape):
    check(kernels, make((2, 2, 1, 18, 35, 8, 8), mask=torch.randn(shape), window=(9, -1)))


def test_expanded_mask_has_a_full_gradient(kernels):
    work = make((2, 2, 1, 18, 35, 8, 8), mask=torch.randn(1, 1, 18, 1))
    work.tensors[3] = work.tensors[3].expand(2, 2, 18, 35)
    assert check(kernels, work)["grad of mask"].shape == (2, 2, 18, 35)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lowest_numbers_and_infinities_in_masks(kernels, dtype):
    mask = torch.zeros(1, 1, 20, 40)
    mask[:, :, 5], mask[:, :, 6], mask[:, :, 7, 20:] = torch.finfo(dtype).min, -INF, torch.finfo(dtype).min
    found = check(kernels, make((2, 2, 2, 20, 40, 8, 8), dtype, mask=mask, weights="heads"))
    assert found["weights"][:, :, 5].ne(0).all()
    assert found["output"][:, :, 6].eq(0).all()


@pytest.mark.parametrize("level", [-300.0, 300.0])
def test_large_scores(kernels, level):
    def change(tensors):
        q, k = tensors[:2]
        q[..., 0], k[..., 0] = 1.0, level

    check(kernels, make((1, 2, 2, 30, 40, 16, 16), scale=1.0, change=change, weights="mean"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_a_row_does_not_keep_it_does_not_see(kernels, dtype):
    """NaN and inf in keys and values: rows that don't keep them have the results of a call without."""
    keep, key_keep = bools(2, 1, 70, 90), torch.ones(2, 90, dtype=torch.bool)
    keep[:, :, :60, 30], keep[:, :, 60:, 30] = False, True  # seen by the last rows
    keep[:, :, :, 41], key_keep[:, 42] = False, False  # seen by none
    columns, odd = (30, 41, 42, 85), (NAN, INF, NAN, -INF)  # 85 is hidden by the window

    def hide(tensors):
        for t in tensors[1:3]:
            for j, x in zip(columns, odd, strict=True):
                t[:, :, j] = x

    options = {"dtype": dtype, "mask": keep, "key_mask": key_keep, "window": (-1, 10), "extra": 1}
    work = make(**options)
    clean = run(kernels, work)
    hide(work.tensors)
    found = run(kernels, work)
    sees = keep[:, 0, :, 30]  # [2, 70]
    close = {"rtol": 1e-2, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-5}
    seen = keep[:, 0] & key_keep[:, None] & (torch.arange(90) <= torch.arange(70)[:, None] + 10)
    touched = (seen & sees[..., None]).any(1)  # columns that a row of NaN keeps
    for name in ("output", "lse", "grad of query"):
        value, plain = (t[name].movedim(1, 2) for t in (found, clean))
        torch.testing.assert_close(value[~sees], plain[~sees], **close)
        assert value[sees].isnan().all(), name
    for name in ("grad of key", "grad of value"):
        value, plain = (t[name].movedim(1, 2) for t in (found, clean))
        torch.testing.assert_close(value[~touched], plain[~touched], **close)
        assert value[:, 41:43].eq(0).all()
        assert value[:, 85].eq(0).all()


def test_numbers_in_masks_that_are_not_kept(kernels):
    """NaN in a floating mask where the window or the other mask hides it."""
    mask = torch.randn(1, 1, 20, 40)
    key_mask = torch.ones(2, 40, dtype=torch.bool)
    key_mask[:, 3] = False
    work = make((2, 2, 1, 20, 40, 8, 8), mask=mask.clone(), key_mask=key_mask, window=(-1, 0), weights="mean")
    clean = run(kernels, work)
    work.tensors[3][..., 3], work.tensors[3][:, :, 2, 5:] = NAN, INF
    for name, value in run(kernels, work).items():
        assert value.equal(clean[name]), name


def test_values_that_rows_see_stay_infinite(kernels):
    def change(tensors):
        tensors[2][0, 0, 20, 3], tensors[2][0, 0, 22, 4], tensors[2][0, 0, 10, 4] = INF, INF, -INF

    work = make((1, 1, 1, 40, 40, 8, 8), window=(-1, 0), change=change)
    output = run(kernels, work)["output"][0, 0]
    assert output[20:, 3].eq(INF).all()
    assert output[10:22, 4].eq(-INF).all()
    assert output[22:, 4].isnan().all()
    assert output.isfinite().sum() == 40 * 8 - 20 - 30


def test_rows_of_nothing(kernels):
    found = check(kernels, make((2, 2, 1, 18, 35, 8, 8), mask=torch.zeros(1, 1, 18, 1, dtype=torch.bool),
                                weights="heads"))  # fmt: skip
    assert found["lse"].eq(-INF).all()
    for name, value in found.items():
        assert name == "lse" or value.eq(0).all(), name


@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 3, 4, 8, 8), (1, 2, 1, 0, 4, 8, 8), (1, 2, 1, 3, 0, 8, 8)], ids=str
)
def test_nothing(kernels, shape):
    b, h, _, rows, columns, _, _ = shape
    check(kernels, make(shape, mask=torch.zeros(1, 1, rows, 1), weights="mean"))
    check(kernels, make(shape, key_mask=torch.zeros(b, columns), window=(-1, 0)))
    found = run(kernels, make(shape, extra=1))
    assert found["output"].shape == (b, h, rows, 8)
    assert found["grad of extra_key"].isfinite().all()
    if columns == 0:
        assert found["output"].unique(dim=2).shape[2] == 1


def test_packed_sequences(kernels):
    bounds = ([0, 3, 3, 50, 60], [0, 40, 45, 45, 85])
    for dropout in (0.0, 0.5):
        check(kernels, make((1, 4, 2, 60, 85, 16, 16), packed=bounds, window=(30, 0), offset=2,
                            dropout=dropout,
                            alibi=True))  # fmt: skip


def test_dropout_draws_the_mask_of_every_backend(kernels):
    from fusednn.attention.dropout import kept_weights

    work = make((2, 3, 1, 20, 37, 8, 8), extra=2, dropout=0.4, weights="heads")
    drawn = kept_weights(torch.tensor(SEED), 0.4, 2, 3, 20, 39)
    assert run(kernels, work)["weights"].ne(0).equal(drawn)
    check(kernels, make((1, 1, 1, 5, 9, 8, 8), dropout=1.0))


def test_strided_and_expanded_tensors(kernels):
    work = make((2, 4, 2, 20, 37, 16, 16), mask=torch.randn(2, 4, 20, 37), weights="mean")
    plain = run(kernels, work)

    def strided(t):
        if t is None or t.dim() < 3:
            return t
        wide = t.new_full((*t.shape, 2), NAN)
        wide[..., 0] = t
        return wide[..., 0]

    moved = make((2, 4, 2, 20, 37, 16, 16), mask=torch.randn(2, 4, 20, 37), weights="mean")
    moved.tensors, moved.grads = [strided(t) for t in work.tensors], [strided(g) for g in work.grads]
    for name, value in run(kernels, moved).items():
        assert value.equal(plain[name]), name
    one = work.tensors[1][:1, :1].expand(2, 2, -1, -1)
    work.tensors[1] = one
    expanded = run(kernels, work)
    work.tensors[1] = one.contiguous()
    for name, value in run(kernels, work).items():
        assert value.equal(expanded[name]), name


def test_results_do_not_depend_on_the_batch(kernels):
    work = make((3, 2, 1, 20, 37, 8, 8), window=(-1, 0))
    alone = make((1, 2, 1, 20, 37, 8, 8), window=(-1, 0))
    alone.tensors = [t if t is None else t[1:2] for t in work.tensors]
    alone.grads = [g if g is None else g[1:2] for g in work.grads]
    found = run(kernels, work)
    for name, value in run(kernels, alone).items():
        assert value.equal(found[name][1:2]), name


def test_output_is_laid_out_by_rows(kernels):
    work = make((2, 4, 2, 20, 37, 16, 24))
    assert run(kernels, work)["output"].transpose(1, 2).is_contiguous()


def test_errors_name_the_argument(kernels):
    work = make((1, 4, 3, 5, 6, 8, 8))
    with pytest.raises(RuntimeError, match="key: got 3 heads, expected a divisor of the query's 4"):
        forward(kernels, work)
    work = make((1, 2, 1, 5, 6, 8, 8), mask=torch.zeros(1, 1, 5, 7))
    with pytest.raises(RuntimeError, match="mask: got shape"):
        forward(kernels, work)
    work = make((1, 2, 1, 5, 6, 257, 8))
    with pytest.raises(RuntimeError, match="query: got head size 257, expected at most 256"):
        forward(kernels, work)
