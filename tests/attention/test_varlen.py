"""Packed sequences: against one by one, empty ones, bounds that are wrong."""

from typing import Any

import pytest
import torch

from fusednn.functional import scaled_dot_product_attention, varlen_attention

from .cases import DTYPES, check, fused_step, make_packed, run
from .conftest import trains

LENGTHS: dict[str, tuple[list[int], list[int]]] = {
    "one": ([5], [7]),
    "several": ([3, 9, 1], [4, 2, 6]),
    "self": ([16, 1, 17, 7], [16, 1, 17, 7]),
    "no rows": ([3, 0, 2], [4, 5, 1]),
    "no keys": ([3, 4, 2], [2, 0, 3]),
    "neither": ([0, 2, 0, 0], [0, 3, 0, 0]),
    "all empty": ([0, 0], [0, 0]),
    "no sequence": ([], []),
    "one key": ([20, 1, 65], [1, 70, 33]),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"window": (-1, 0)},
    "window": {"window": (2, 1)},
    "grouped": {"groups": 2, "value_size": 5},
    "everything": {"groups": 1, "window": (9, 0), "softcap": 2.0, "alibi": True, "dropout": 0.2},
}


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", LENGTHS)
def test_agrees_with_torch(place, case, options):
    check(make_packed(*LENGTHS[case], **OPTIONS[options], device=place.device), backward=trains(place))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["several", "no keys"])
def test_dtypes(place, case, dtype):
    work = make_packed(*LENGTHS[case], window=(-1, 0), groups=2, dtype=dtype, device=place.device)
    check(work, backward=trains(place))


def test_many(fast_place):
    """Hundreds of short sequences, of which most tiles hold one row or none."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(0, 6, (300,), generator=generator).tolist() for _ in range(2))
    check(make_packed(rows, columns, heads=2, device=fast_place.device), backward=trains(fast_place))


@pytest.mark.parametrize("case", ["several", "no keys", "neither"])
def test_a_longer_maximum_changes_nothing(place, case):
    work = make_packed(*LENGTHS[case], window=(-1, 0), device=place.device)
    wanted = None if trains(place) else ()
    longer = work.where(longest=(200, 131))
    expected, found = run(fused_step, work, wanted), run(fused_step, longer, wanted)
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, msg=lambda m, n=name: f"{n}: {m}")


def packed(device: str, requires_grad: bool = False):
    """Queries, keys, values and bounds as `varlen_attention` takes them."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = [4, 0, 6, 1], [3, 2, 6, 5]
    q, k, v = (
        torch.randn(sum(n), heads, size, generator=generator).to(device).requires_grad_(requires_grad)
        for n, heads, size in ((rows, 4, 8), (columns, 2, 8), (columns, 2, 3))
    )
    bounds = [torch.tensor([0, *n], device=device).cumsum(0) for n in (rows, columns)]
    return (q, k, v), bounds, (rows, columns)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "case", [{}, {"is_causal": True}, {"window": (2, 1), "softcap": 3.0, "scale": 0.2}], ids=str
)
def test_function(place, case, kind):
    """One by one, by the function of unpacked tensors, and lse with it."""
    (q, k, v), bounds, (rows, columns) = packed(place.device)
    bounds = [b.to(kind) for b in bounds]
    output, lse = varlen_attention(q, k, v, *bounds, **case, return_lse=True)
    assert varlen_attention(q, k, v, *bounds, 6, 6, **case).equal(output)
    assert output.shape == (11, 4, 3)
    assert lse.shape == (4, 11)
    parts = zip(q.split(rows), k.split(columns), v.split(columns), output.split(rows), lse.split(rows, 1))
    for *sequence, out, sums in parts:
        one = (t.transpose(0, 1) for t in sequence)
        expected, its_sums = scaled_dot_product_attention(*one, enable_gqa=True, return_lse=True, **case)
        torch.testing.assert_close(out.transpose(0, 1), expected)
        torch.testing.assert_close(sums, its_sums)


def test_gradients_of_the_function(training_place):
    (q, k, v), bounds, (rows, columns) = packed(training_place.device, requires_grad=True)
    output, lse = varlen_attention(q, k, v, *bounds, is_causal=True, return_lse=True)
    found = torch.autograd.grad(output.square().sum() + lse.sin().sum(), (q, k, v))
    total = torch.zeros((), device=q.device)
    for sequence in zip(q.split(rows), k.split(columns), v.split(columns)):
        one = (t.transpose(0, 1) for t in sequence)
        out, sums = scaled_dot_product_attention(*one, enable_gqa=True, is_causal=True, return_lse=True)
        total = total + out.square().sum() + sums.sin().sum()
    for a, b in zip(found, torch.autograd.grad(total, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def bounds_of(*numbers: int) -> torch.Tensor:
    """Bounds as int32."""
    return torch.tensor(numbers, dtype=torch.int32)


Q, K = torch.zeros(5, 2, 4), torch.zeros(6, 2, 4)
GOOD_Q, GOOD_K = bounds_of(0, 2, 5), bounds_of(0, 3, 6)
BAD = {
    "descend": ((Q, K, K, bounds_of(0, 6, 5), GOOD_K), RuntimeError, "cu_seqlens_q: got .* that ascend"),
    "start": ((Q, K, K, GOOD_Q, bounds_of(1, 3, 6)), RuntimeError, "cu_seqlens_k: got .* from 0 to 6"),
    "end": ((Q, K, K, bounds_of(0, 2, 6), GOOD_K), RuntimeError, "cu_seqlens_q: got .* from 0 to 5"),
    "short": ((Q, K, K, GOOD_Q, bounds_of(0, 3, 5)), RuntimeError, "cu_seqlens_k: got .* from 0 to 6"),
    "number": ((Q, K, K, bounds_of(0, 5), GOOD_K), RuntimeError, "cu_seqlens_k has shape"),
    "rank": ((Q, K, K, GOOD_Q[None], GOOD_K), RuntimeError, r"cu_seqlens_q: got .* of size \[N \+ 1\]"),
    "none": ((Q, K, K, bounds_of(), GOOD_K), RuntimeError, "cu_seqlens_q: got"),
    "dtype": ((Q, K, K, GOOD_Q.float(), GOOD_K), RuntimeError, "cu_seqlens_q: got torch.float32"),
    "list": ((Q, K, K, [0, 2, 5], GOOD_K), TypeError, "cu_seqlens_q to be a Tensor, got list"),
    "device": ((Q, K, K, GOOD_Q.to("meta"), GOOD_K), RuntimeError, "cu_seqlens_q on meta"),
    "rank of query": ((Q[0], K, K, GOOD_Q, GOOD_K), RuntimeError, "query to be 3D"),
    "rank of value": ((Q, K, K[None], GOOD_Q, GOOD_K), RuntimeError, "value to be 3D"),
    "heads": (
        (Q, K[:, :1].repeat(1, 3, 1), K[:, :1].repeat(1, 3, 1), GOOD_Q, GOOD_K),
        RuntimeError,
        "2 heads",
    ),
    "length of value": (
        (Q, K, K[:5], GOOD_Q, GOOD_K),
        RuntimeError,
        "key and value must have the same length",
    ),
    "size of key": (
        (Q, K[..., :3], K, GOOD_Q, GOOD_K),
        RuntimeError,
        "query and key must have the same last",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    args, error, match = BAD[name]
    with pytest.raises(error, match=match):
        varlen_attention(*args)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dropout_p": 1.5}, "dropout_p: got 1.5"),
        ({"window": (1, 2, 3)}, "window: got"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
    ],
)
def test_errors_of_options(options, match):
    with pytest.raises(ValueError, match=match):
        varlen_attention(Q, K, K, GOOD_Q, GOOD_K, **options)
