"""Rows with nothing to attend to, what must not leak, scores at the end of the range, and very much of it."""

import math
from itertools import pairwise

import pytest
import torch

from .cases import DTYPES, TENSORS, Work, check, fused_step, make, make_packed, run, torch_step
from .conftest import trains

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wanted(place) -> tuple[str, ...]:
    """Names of the tensors whose gradient the place's backend has."""
    return TENSORS if trains(place) else ()


def hide(work: Work, how: str, rows: torch.Tensor) -> Work:
    """Hide all keys from `rows` [B, H, L] (True: hidden), by a mask of its own; other rows see them all."""
    shape = (*rows.shape, work.tensors["key"].shape[2])
    hidden = rows[..., None].expand(shape)
    mask = ~hidden
    if how == "float":
        mask = torch.zeros(shape, dtype=work.tensors["query"].dtype, device=rows.device)
        mask = mask.masked_fill(hidden, -math.inf)
    return work.with_(mask=mask)


@every_dtype
@pytest.mark.parametrize("weights", ["none", "mean", "heads"])
@pytest.mark.parametrize("case", ["bool", "float"])
def test_rows_that_see_nothing(place, case, weights, dtype):
    """Output, weights and gradients 0, lse -inf; the other rows don't notice."""
    work = make(weights=weights, dtype=dtype, device=place.device)
    rows = torch.zeros(2, 4, 9, dtype=torch.bool, device=place.device)
    rows[0, :, 4], rows[1, 2], rows[0, 0, :8] = True, True, True
    work = hide(work, case, rows)
    found = check(work, backward=trains(place))
    assert found["output"][rows].eq(0).all()
    assert found["lse"][rows].eq(-math.inf).all()
    assert found["lse"][~rows].isfinite().all()
    if weights == "heads":
        assert found["weights"][rows].eq(0).all()
    if weights == "mean":
        assert found["weights"][0, 4].eq(0).all()
    if trains(place):
        assert found["grad of query"][rows].eq(0).all()
        for name in ("key", "value"):
            assert found[f"grad of {name}"][1, 2].eq(0).all()
        if case == "float":
            assert found["grad of mask"][rows].eq(0).all()


NOTHING = {
    "padding": lambda work: work.with_(key_mask=torch.zeros(2, 13, dtype=torch.bool)),
    "float padding": lambda work: work.with_(key_mask=torch.full((2, 13), -math.inf)),
    "bool mask": lambda work: work.with_(mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool)),
    "float mask": lambda work: work.with_(mask=torch.full((1, 4, 1, 13), -math.inf)),
    "window": lambda work: work.where(window=(3, 3), offset=100),
    "window before": lambda work: work.where(window=(-1, 0), offset=-9),
    "masks that exclude each other": lambda work: work.with_(
        mask=(torch.arange(13) < 6).view(1, 1, 1, 13), key_mask=(torch.arange(13) >= 6).expand(2, 13)
    ),
    "both finite": lambda work: work.with_(
        mask=torch.full((1, 1, 9, 13), torch.finfo(torch.float32).min),
        key_mask=torch.full((2, 13), torch.finfo(torch.float32).min),
    ),
}


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("weights", ["mean", "heads"])
@pytest.mark.parametrize("case", NOTHING)
def test_nothing_to_attend_to(place, case, weights):
    """All rows of it, by every means; finite masks too whose sum is -inf."""
    work = NOTHING[case](make(weights=weights))
    tensors = {n: t if t is None else t.to(place.device) for n, t in work.tensors.items()}
    grads = {n: g.to(place.device) for n, g in work.grads.items()}
    for name, t in run(fused_step, work.where(tensors=tensors, grads=grads), wanted(place)).items():
        assert t.eq(-math.inf if name == "lse" else 0).all(), name


@pytest.mark.parametrize("weights", ["mean", "heads"])
@pytest.mark.parametrize("case", ["bool", "window"])
def test_extra_columns_are_seen_by_all(place, case, weights):
    """Where nothing else is there: all of the weight, and the gradients are theirs."""
    work = make(extra=1, weights=weights, device=place.device)
    if case == "bool":
        work = work.with_(key_mask=torch.zeros(2, 13, dtype=torch.bool, device=place.device))
    else:
        work = work.where(window=(1, 1), offset=50)
    found = check(work, backward=trains(place))
    assert found["weights"][..., -1].eq(1).all()
    assert found["weights"][..., :-1].eq(0).all()
    torch.testing.assert_close(
        found["output"], work.tensors["extra_value"][:, 0, None].expand(2, 4, 9, 8), rtol=0, atol=0
    )


HIDERS = {
    "key mask": {"key_mask": "bool"},
    "float key mask": {"key_mask": "float"},
    "mask": {"mask": "bool 11ls"},
    "float mask": {"mask": "float b1ls"},
    "mask of heads": {"mask": "bool bhls"},
    "causal": {"window": (-1, 0)},
    "window": {"window": (2, 1), "offset": 3},
    "causal and padding": {"window": (-1, 0), "offset": 4, "key_mask": "bool"},
    "grouped": {"groups": 2, "mask": "float 1hls", "extra": 1},
    "dropout": {"key_mask": "bool", "dropout": 0.3},
}


def kept_of(work: Work) -> torch.Tensor:
    """Where rows see keys: [B, H, L, S], by the rules written out."""
    q, k, mask, key_mask = (work.tensors[n] for n in ("query", "key", "mask", "key_mask"))
    rows, columns = q.shape[2], k.shape[2]
    kept = torch.ones(q.shape[0], q.shape[1], rows, columns, dtype=torch.bool, device=q.device)
    for i in range(rows):
        for j in range(columns):
            at = i + work.offset
            if work.window[0] >= 0 and j < at - work.window[0]:
                kept[:, :, i, j] = False
            if work.window[1] >= 0 and j > at + work.window[1]:
                kept[:, :, i, j] = False
    if mask is not None:
        kept = kept & (mask if mask.dtype == torch.bool else mask != -math.inf)
    if key_mask is not None:
        kept = kept & (key_mask if key_mask.dtype == torch.bool else key_mask != -math.inf)[:, None, None]
    return kept


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("weights", ["mean", "heads", "none"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("case", HIDERS)
def test_hidden_keys_and_values_do_not_leak(place, case, poison, weights):
    """Keys and values of whatever kind: rows that don't see them have the results they had before.

    Gradients are looked at where no row sees them.
    """
    work = make(**HIDERS[case], weights=weights, device=place.device)
    kept = kept_of(work)
    groups = work.tensors["key"].shape[1]
    seen = kept.unflatten(1, (groups, -1)).any(2)  # [B, G, L, S]
    # A key that some row sees and another doesn't, and all that no row sees.
    bad = ~seen.any(2)  # [B, G, S]
    partly = seen.any(2) & ~seen.all(2)
    assert bad.any() or partly.any()
    bad[..., 5] |= partly[..., 5]
    clean = bad[..., None]
    poisoned = {n: work.tensors[n].masked_fill(clean, poison) for n in ("key", "value")}
    plain = {n: work.tensors[n].masked_fill(clean, 0) for n in ("key", "value")}
    per_head = bad.repeat_interleave(4 // groups, 1)
    rows = ~(kept & per_head[:, :, None]).any(-1)  # [B, H, L]: they see none of it
    assert rows.any()
    everywhere = rows.all(1)  # [B, L]
    grads = {n: g * (everywhere[..., None] if n == "weights" and weights == "mean" else
                     rows if n == "lse" else rows[..., None]) for n, g in work.grads.items()}  # fmt: skip
    all_see_none = bool(rows.all())
    names = wanted(place) if all_see_none else ()
    found = run(fused_step, work.with_(**poisoned).where(grads=grads), names)
    expected = run(fused_step, work.with_(**plain).where(grads=grads), names)
    for name, t in expected.items():
        got = found[name]
        if name in ("output", "lse") or (name == "weights" and weights == "heads"):
            got, t = got[rows], t[rows]
        elif name == "weights":
            got, t = got[everywhere], t[everywhere]
        assert got.isfinite().all() or t.isinf().any(), name
        torch.testing.assert_close(got, t, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("case", ["key", "value"])
def test_gradients_of_rows_that_do_not_see_it(training_place, case, poison):
    """Per row: one row sees a bad key, the others don't; their gradients are as without it."""
    work = make(mask="bool 11ls", weights="heads", device=training_place.device)
    mask = torch.ones_like(work.tensors["mask"])
    mask[..., 5] = False
    mask[..., 2, 5] = True  # only row 2 sees key 5
    work = work.with_(mask=mask)
    bad = work.tensors[case].clone()
    bad[:, :, 5] = poison
    grads = {name: g.clone() for name, g in work.grads.items()}
    for g in grads.values():
        g[:, :, 2] = 0
    others = [i for i in range(9) if i != 2]
    found = run(fused_step, work.with_(**{case: bad}).where(grads=grads), ("query",))
    expected = run(fused_step, work.where(grads=grads), ("query",))
    for name, t in expected.items():
        torch.testing.assert_close(
            found[name][:, :, others], t[:, :, others], msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not found["output"][:, :, 2].isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("case", ["mask", "key_mask"])
def test_hidden_places_of_masks_do_not_leak(place, case, poison):
    """A number of one mask at a place that the other, or the window, hides: NaN and inf included."""
    options = {"mask": "float b1ls", "key_mask": "bool"}
    if case == "key_mask":
        options = {"mask": "bool 111s", "key_mask": "float"}
    work = make(**options, window=(-1, 4), weights="heads", device=place.device)
    hidden = ~kept_of(work.with_(**{case: None}))  # by what else there is
    where = hidden[:, :1] if case == "mask" else hidden.all(2).all(1)
    assert where.any()
    given = work.tensors[case]
    found = run(fused_step, work.with_(**{case: given.masked_fill(where, poison)}), wanted(place))
    expected = run(fused_step, work.with_(**{case: given.masked_fill(where, -math.inf)}), wanted(place))
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, msg=lambda m, n=name: f"{n}: {m}")


@every_dtype
@pytest.mark.parametrize("case", ["mask", "key_mask"])
@pytest.mark.parametrize("value", ["lowest", "-inf"])
def test_masks_at_the_end_of_the_range(place, case, value, dtype):
    """finfo.min hides like -inf where a row sees something else; alone it is a number like any other."""
    work = make(mask="bool 11ls", key_mask="bool", dtype=dtype, weights="heads", device=place.device)
    kept = work.tensors[case]
    if case == "mask":
        kept = kept.clone()
        kept[..., 3, :] = False  # a row that sees nothing but the lowest number
    low = -math.inf if value == "-inf" else torch.finfo(dtype).min
    mask = torch.zeros(kept.shape, dtype=dtype, device=place.device).masked_fill(~kept, low)
    nothing = {"mask": None, "key_mask": None}
    found = run(fused_step, work.with_(**{**nothing, case: mask}), wanted(place))
    for name, t in found.items():
        assert not t.isnan().any(), name
    seen = kept.expand(2, 4, 9, 13) if case == "mask" else kept[:, None, None].expand(2, 4, 9, 13)
    rows = seen.any(-1)
    assert found["weights"][~seen & rows[..., None]].eq(0).all()
    alone = found["weights"][~rows].float()
    if value == "-inf":
        assert alone.eq(0).all()
    else:
        torch.testing.assert_close(alone.sum(-1), torch.ones_like(alone[..., 0]), rtol=0, atol=0.02)
    expected = run(fused_step, work.with_(**{**nothing, case: kept}), wanted(place))
    for name in ("output", "weights", "lse"):
        torch.testing.assert_close(found[name][rows], expected[name][rows], msg=lambda m, n=name: f"{n}: {m}")


def check_far(work: Work, largest: float, backward: bool) -> dict[str, torch.Tensor]:
    """Results as exact as torch's; gradients as exact as scores of that size and an lse in float32 allow."""
    check(work, backward=False)
    found = run(fused_step, work, None if backward else ())
    exact = run(torch_step, work.map(torch.Tensor.double), None if backward else ())
    eps = torch.finfo(torch.float32).eps * largest + 2 * torch.finfo(work.tensors["query"].dtype).eps
    for name in (n for n in found if n.startswith("grad")):
        atol = 4 * eps * exact[name].abs().max().item()
        torch.testing.assert_close(
            found[name].double(), exact[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [-300.0, -80.0, 80.0, 300.0])
def test_scores_far_from_zero(place, case, dtype):
    """An lse where exp(lse) over- or underflows float32: results and gradients as near 0."""
    work = make(key_mask="float", weights="mean", dtype=dtype, device=place.device)
    far = torch.full((2, 13), case, dtype=dtype, device=place.device)
    found = check_far(work.with_(key_mask=far), abs(case), trains(place))
    near = run(fused_step, work.with_(key_mask=torch.zeros_like(far)), ())
    torch.testing.assert_close(found["lse"], near["lse"] + case, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["weights"], near["weights"], rtol=0.02, atol=0.001)


@pytest.mark.parametrize("case", [1.0, 30.0, 1000.0])
def test_large_queries(place, case):
    """Scores from -1000s to 1000s: weights are nearly 0 and 1, nothing overflows."""
    work = make(weights="mean", key_mask="bool", window=(-1, 3), device=place.device)
    work = work.with_(query=work.tensors["query"] * case)
    scores = work.scale * work.tensors["query"] @ work.tensors["key"].mT
    for name, t in check_far(work, scores.abs().max().item(), trains(place)).items():
        assert (t.isfinite() | (t == -math.inf)).all(), name


def test_an_infinite_score_is_that_of_its_row(place):
    """+inf gives NaN in its own row, as torch's softmax, and in no other."""
    work = make(device=place.device)
    query = work.tensors["query"].clone()
    query[0, 1, 3] = math.inf
    found, expected = (run(fused_step, w, ()) for w in (work.with_(query=query), work))
    assert found["output"][0, 1, 3].isnan().all()
    others = torch.ones(2, 4, 9, dtype=torch.bool, device=place.device)
    others[0, 1, 3] = False
    torch.testing.assert_close(found["output"][others], expected["output"][others])


@pytest.mark.parametrize("case", ["rows", "padded", "one key head"])
def test_more_heads_than_a_grid_has_rows(fast_place, case):
    """Batch times heads beyond 65,535, the limit of a grid's second and third dimension."""
    options = {"rows": {}, "padded": {"key_mask": "bool", "weights": "mean"}, "one key head": {"groups": 1}}[
        case
    ]
    work = make(2185, 30, rows=2, columns=3, size=1, **options, device=fast_place.device)
    assert math.prod(work.tensors["query"].shape[:2]) > 65_535
    found = check(work, backward=trains(fast_place))
    assert found["output"][-1].ne(0).any()


@pytest.mark.parametrize("case", ["samples", "heads"])
def test_more_than_a_grid_of_one_dimension(fast_place, case):
    """65,540 samples, or heads."""
    sizes = (65_540, 1) if case == "samples" else (1, 65_540)
    check(make(*sizes, rows=1, columns=2, size=1, device=fast_place.device), backward=trains(fast_place))


EMPTY = {
    "samples": {"batch": 0},
    "rows": {"rows": 0},
    "keys": {"columns": 0},
    "keys but extra": {"columns": 0, "extra": 1},
    "head size": {"size": 0, "value_size": 3},
    "value size": {"value_size": 0},
    "everything": {"batch": 0, "rows": 0, "columns": 0, "size": 0},
}


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("options", [{}, {"mask": "float b1ls", "key_mask": "float"}], ids=["", "masked"])
@pytest.mark.parametrize("weights", ["none", "mean", "heads"])
@pytest.mark.parametrize("case", EMPTY)
def test_empty(place, case, weights, options):
    check(make(**EMPTY[case], weights=weights, **options, device=place.device), backward=trains(place))


REPEATED = {
    "masked": {"mask": "float 11ls", "key_mask": "float", "weights": "mean"},
    "grouped": {"groups": 1, "window": (-1, 0), "weights": "heads"},
    "dropout": {"dropout": 0.3, "extra": 2, "weights": "mean"},
}


@pytest.mark.natively
@pytest.mark.in_turn("case")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", REPEATED)
def test_the_same_bits_again(place, case, dtype):
    """The gradients that are sums over rows, heads and samples included."""
    sizes = {"rows": 70, "columns": 130} if not place.slow else {"rows": 17, "columns": 33}
    work = make(**sizes, **REPEATED[case], dtype=dtype, device=place.device)
    first = run(fused_step, work, wanted(place))
    for _ in range(2 if place.slow else 5):
        for name, t in run(fused_step, work, wanted(place)).items():
            assert t.equal(first[name]), name


def test_threads_change_no_more_than_rounding(fast_place):
    threads = torch.get_num_threads()
    work = make(3, 5, 70, 130, mask="float 1h1s", key_mask="float", weights="mean", device=fast_place.device)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(fused_step, work, wanted(fast_place)))
    finally:
        torch.set_num_threads(threads)
    for one, other in pairwise(found):
        for name, t in one.items():
            torch.testing.assert_close(
                other[name], t, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_sample_does_not_depend_on_others(place):
    """Alone, and in a batch with others: the same to rounding, with the dropout of its place in the batch."""
    work = make(3, key_mask="bool", weights="mean", device=place.device)
    whole = run(fused_step, work, ())
    for n in range(3):
        one = {name: t if t is None else t[n : n + 1] for name, t in work.tensors.items()}
        found = run(fused_step, work.where(tensors=one), ())
        for name, t in found.items():
            torch.testing.assert_close(t, whole[name][n : n + 1], msg=lambda m, k=name: f"{k}: {m}")


def test_what_lies_around_the_tensors_does_not_matter(place):
    """Packed rows before and after, and the rest of a larger tensor, are NaN."""
    work = make_packed([3, 2], [4, 3], device=place.device)

    def inside(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full([n + 2 for n in t.shape], math.nan, dtype=t.dtype, device=t.device)
        part = wide[tuple(slice(1, -1) for _ in t.shape)]
        return part.copy_(t)

    check(work.map(inside), backward=trains(place))
    check(
        make(mask="float bhls", key_mask="float", extra=1, device=place.device).map(inside),
        backward=trains(place),
    )
