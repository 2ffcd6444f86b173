"""Dropout: Philox as published, one mask for all backends, the rate, and the same mask in the backward."""

import math
from dataclasses import replace

import pytest
import torch

from fusednn.attention import dropout
from fusednn.functional import scaled_dot_product_attention

from .cases import SEED, check, fused_step, make, make_packed, run
from .conftest import trains

# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(number: int) -> int:
    """The int64 of these 64 bits."""
    return number - 2**64 if number >= 2**63 else number


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_as_published(counter, key, expected):
    seed = torch.tensor(signed(key[1] << 32 | key[0]))
    found = dropout.philox(seed, tuple(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in found) == expected


def test_philox_by_integers():
    """The mask of one weight, from Python's own integers."""

    def words(seed: int, counter: list[int]) -> list[int]:
        k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
        for _ in range(10):
            a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [b >> 32 ^ counter[1] ^ k0, b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ k1, a & 0xFFFFFFFF]
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        return counter

    p, batch, heads, rows, columns, first = 0.37, 2, 3, 4, 9, 5
    found = dropout.kept_weights(torch.tensor([SEED]), p, batch, heads, rows, columns, first)
    assert found.shape == (batch, heads, rows, columns)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
        word = words(SEED, [j // 4, i, h, b + first])[j % 4]
        assert bool(found[b, h, i, j]) == (word >= round(p * 2**32))


SEEDS = [0, 1, SEED, 2**32, 2**63 - 1, -1, -(2**40) - 7]


def with_seed(work, seed: int):
    """The op's arguments with another seed."""
    number = torch.tensor([seed], device=work.tensors["query"].device)
    return (*work.tensors.values(), work.slopes, *work.bounds, number, *work.options)


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", [(9, 13, 0), (17, 34, 0), (3, 66, 2), (5, 7, 1), (1, 1, 0)], ids=str)
def test_every_backend_draws_the_same_mask(place, case, seed):
    """Recovered from the weights of all heads: which are 0."""
    rows, columns, extra = case
    options = {"rows": rows, "columns": columns, "extra": extra, "groups": 2}
    work = make(3, dropout=0.4, weights="heads", device=place.device, **options)
    _, _, weights = torch.ops.fusednn.attention_forward(*with_seed(work, seed))
    kept = dropout.kept_weights(torch.tensor([seed]), 0.4, 3, 4, rows, columns + extra)
    assert weights.ne(0).equal(kept.to(place.device))


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("weights", ["none", "mean", "heads"])
@pytest.mark.parametrize("case", [(9, 13), (65, 70), (16, 129)], ids=str)
def test_output_and_weights_share_the_mask(place, case, weights):
    """Values that are a unit matrix make the output the weights."""
    rows, columns = case
    options = {"value_size": columns, "dropout": 0.3, "device": place.device}
    work = make(2, 2, rows, columns, weights=weights, **options)
    work = work.with_(value=torch.eye(columns, device=place.device).expand(2, 2, -1, -1))
    output, _, found = fused_step(work, work.tensors)
    kept = dropout.kept_weights(work.seed, 0.3, 2, 2, rows, columns)
    assert output.ne(0).equal(kept)
    if weights != "none":
        expected = output if weights == "heads" else output.mean(1)
        torch.testing.assert_close(found, expected)


def test_packed_sequences_count_from_their_own_start(place):
    """Row and column within the sequence, and its number as the sample's."""
    rows, columns = [3, 0, 5, 2], [6, 2, 9, 1]
    work = make_packed(rows, columns, dropout=0.4, value_size=9, device=place.device)
    value = torch.cat([torch.eye(9)[:n] for n in columns]).to(place.device).expand(1, 4, -1, -1)
    output, _, _ = fused_step(work, work.with_(value=value).tensors)
    for n, one in enumerate(output.split(rows, 2)):
        kept = dropout.kept_weights(work.seed, 0.4, 1, 4, rows[n], columns[n], n)
        assert one[..., : columns[n]].ne(0).equal(kept)
        assert one[..., columns[n] :].eq(0).all()


@pytest.mark.parametrize("p", [0.001, 0.004, 0.1, 0.5, 0.9, 0.999])
def test_rate(p):
    """Within three standard errors, of a number of weights whose rounding to 8 bits would show."""
    n = 2_000_000
    kept = dropout.kept_weights(torch.tensor(SEED), p, 2, 4, 500, 500)
    assert kept.numel() == n
    assert abs(kept.sum().item() / n - (1 - p)) < 3 * math.sqrt(p * (1 - p) / n)


def test_rate_of_a_backend(fast_place):
    p, n = 0.1, 2 * 4 * 300 * 300
    work = make(2, 4, 300, 300, dropout=p, weights="heads", device=fast_place.device)
    _, _, weights = fused_step(work, work.tensors)
    assert abs(weights.ne(0).float().mean().item() - (1 - p)) < 3 * math.sqrt(p * (1 - p) / n)


def test_neighbours_are_independent():
    """No row, column, head or sample repeats another, nor does a seed."""
    kept = dropout.kept_weights(torch.tensor(SEED), 0.5, 3, 4, 64, 64).double() - 0.5
    n = kept.numel()
    for dim in range(4):
        for shift in (1, 2, 3, 4):
            if kept.shape[dim] <= shift:
                continue
            a, b = (
                kept.narrow(dim, shift, kept.shape[dim] - shift),
                kept.narrow(dim, 0, kept.shape[dim] - shift),
            )
            assert abs((a * b).sum().item() * 4) < 4 * math.sqrt(a.numel()), (dim, shift)
    other = dropout.kept_weights(torch.tensor(SEED + 1), 0.5, 3, 4, 64, 64).double() - 0.5
    assert abs((kept * other).sum().item() * 4) < 4 * math.sqrt(n)


@pytest.mark.parametrize("weights", ["mean", "heads"])
def test_all_dropped(place, weights):
    """With p = 1: output, weights and gradients 0; lse is that of the scores."""
    work = make(dropout=1.0, weights=weights, mask="float b1ls", device=place.device)
    wanted = None if trains(place) else ()
    without = run(fused_step, replace(work, dropout=0.0), ())
    grads = {n: g for n, g in work.grads.items() if n != "lse"}
    for name, t in run(fused_step, work.where(grads=grads), wanted).items():
        if name == "lse":
            torch.testing.assert_close(t, without["lse"])
        else:
            assert t.eq(0).all(), name


@pytest.mark.parametrize("case", [2.0**-33, 2.0**-40, 1e-300])
def test_hardly_ever(place, case):
    """A probability below the words' resolution drops nothing."""
    work = make(dropout=case, weights="heads", device=place.device)
    found, expected = (run(fused_step, w, ()) for w in (work, replace(work, dropout=0.0)))
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t)


def test_no_dropout_draws_no_number():
    state = torch.get_rng_state()
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    scaled_dot_product_attention(x, x, x, dropout_p=0.0)
    assert torch.get_rng_state().equal(state)
    scaled_dot_product_attention(x, x, x, dropout_p=0.1)
    assert not torch.get_rng_state().equal(state)


def test_seeds_are_torchs(place):
    """manual_seed repeats a call; a second call draws others."""
    x = torch.randn(2, 2, 9, 8, device=place.device)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        for _ in range(2):
            found.append(scaled_dot_product_attention(x, x, x, dropout_p=0.5, return_weights="heads")[1])
    assert found[0].equal(found[2])
    assert found[1].equal(found[3])
    patterns = [found[i].ne(0) for i in (0, 1, 4, 5)]
    assert not any(a.equal(b) for i, a in enumerate(patterns) for b in patterns[i + 1 :])


@pytest.mark.in_turn("case")
@pytest.mark.parametrize("weights", ["none", "mean", "heads"])
@pytest.mark.parametrize("case", [0.1, 0.5, 0.9])
def test_backward_uses_the_same_mask(training_place, case, weights):
    """Gradients of the values are the dropped weights; and all agree with torch's, under this mask."""
    work = make(1, 2, 5, 18, dropout=case, weights=weights, device=training_place.device)
    check(work)
    ones = torch.zeros_like(work.grads["output"])
    ones[:, :, 3] = 1  # of row 3 alone
    found = run(fused_step, work.where(grads={"output": ones}), ("value",))
    kept = dropout.kept_weights(work.seed, case, 1, 2, 5, 18)[:, :, 3]
    assert found["grad of value"].ne(0).all(-1).equal(kept)


def test_a_mean_over_many_seeds_is_the_output_without(fast_place):
    """Kept weights are scaled up by what is dropped: nothing changes on average."""
    work = make(1, 2, 4, 6, dropout=0.25, device=fast_place.device)
    n = 800
    op = torch.ops.fusednn.attention_forward
    outputs = torch.stack([op(*with_seed(work, seed))[0].double() for seed in range(n)])
    expected = run(fused_step, replace(work, dropout=0.0), ())["output"]
    error = (outputs.mean(0) - expected).abs() / (outputs.std(0) / math.sqrt(n))
    assert error.max() < 5
