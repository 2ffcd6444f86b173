"""What only the CUDA kernels of attention have: splits, groups of rows, packs, tiles of weights, limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusednn import testing
from fusednn.attention import reference
from fusednn.core import native as _native
from tests import places

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
cuda = places.fixture(lambda place: place.backend == "cuda")


@dataclasses.dataclass
class Work:
    """One call: the op's arguments in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    key_mask: Tensor | None = None
    extra_key: Tensor | None = None
    extra_value: Tensor | None = None
    alibi_slopes: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    dropout_seed: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    scale: float = 0.125
    window_left: int = -1
    window_right: int = -1
    position_offset: int = 0
    softcap: float = 0.0
    dropout_p: float = 0.0
    weights: str = "none"

    def arguments(self) -> list[Any]:
        """All of them, in order."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Work:
        """The same work with each tensor changed."""
        changed = {
            field.name: change(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changed)

    def to(self, dtype: torch.dtype) -> Work:
        """The same work with floating tensors of another dtype; slopes stay float32."""
        changed = self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
        return dataclasses.replace(changed, alibi_slopes=self.alibi_slopes)


def make(
    B=2, H=4, L=3, D=16, G=None, S=40, V=None, dtype=torch.float32, device="cpu", X=0, **options
) -> Work:
    """Random work of these sizes."""
    G, V = G or H, D if V is None else V

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64).to(dtype).to(device)

    work = Work(random(B, H, L, D), random(B, G, S, D), random(B, G, S, V), **options)
    if X:
        work.extra_key, work.extra_value = random(G, X, D), random(G, X, V)
    return work.map(lambda t: t.to(device))


def run(place: places.Place, work: Work) -> tuple[Tensor, ...]:
    """Output, lse and weights of the kernels; the work lies on the CPU or on the place's device."""
    there = work.map(lambda t: t if t.device.type == place.device else t.to(place.device))
    return _native.cuda_modules[place.device].attention_forward(*there.arguments())


def check(place: places.Place, work: Work) -> tuple[Tensor, ...]:
    """Run, and compare with the reference in float64 under the budgets."""
    found = run(place, work)
    assert found[0].transpose(1, 2).is_contiguous()
    oracle = reference.attention_forward(*work.to(torch.float64).arguments())
    same = reference.attention_forward(*work.arguments())
    for name, given, o, s in zip(("output", "lse", "weights"), found, oracle, same, strict=True):
        assert given.dtype == s.dtype, name
        f = given.cpu()
        if f.dtype == torch.float64:
            scale = max(1.0, o.nan_to_num(0, 0, 0).abs().max().item()) if o.numel() else 1.0
            torch.testing.assert_close(f, o, rtol=0, atol=1e-13 * scale, msg=lambda m, n=name: f"{n}: {m}")
        else:
            testing.assert_close_to_oracle(f, s, o, name)
    return found


def splits_of(place: places.Place, work: Work) -> int:
    """Blocks that share a row's keys."""
    return _native.cuda_modules[place.device].attention_forward_splits(*work.arguments())


SEED = torch.tensor(2**40 + 12345)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@every_dtype
@pytest.mark.parametrize("weights", ["mean", "heads"])
def test_every_option_at_once(cuda, dtype, weights):
    mask = torch.randn(1, 4, 5, 1, dtype=torch.float64).expand(2, 4, 5, 83).clone()
    mask[:, 1::2, ::2, ::3] = -math.inf
    key_mask = torch.rand(2, 83) < 0.8
    work = make(
        L=5, D=24, G=2, S=83, V=40, X=2, dtype=dtype, mask=mask.to(dtype), key_mask=key_mask,
        alibi_slopes=SLOPES, dropout_seed=SEED, window_left=60, window_right=5, position_offset=70,
        softcap=3.0, dropout_p=0.3, weights=weights,
    )  # fmt: skip
    check(cuda, work)


@every_dtype
@pytest.mark.parametrize("size", [1, 8, 40, 64, 80, 96, 128, 256])
def test_head_sizes(cuda, dtype, size):
    check(cuda, make(B=1, H=2, L=2, D=size, S=130, V=257 - size, dtype=dtype, weights="mean"))


@pytest.mark.parametrize("S", [1, 3, 4, 5, 63, 64, 65, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("X", [0, 1, 2])
def test_lengths_around_tiles(cuda, S, X):
    L = S % 70 + 1
    check(cuda, make(B=1, H=2, L=L, D=8, S=S, X=X, weights="heads", dropout_seed=SEED, dropout_p=0.5))


@pytest.mark.parametrize(
    "sizes", [{"L": 0}, {"S": 0}, {"B": 0}, {"V": 0}, {"D": 0}, {"L": 0, "S": 0}, {"S": 0, "X": 1}], ids=str
)
@pytest.mark.parametrize("weights", ["none", "mean", "heads"])
def test_nothing(cuda, sizes, weights):
    check(cuda, make(**sizes, weights=weights))


@every_dtype
def test_splits_agree_with_one(cuda, dtype):
    """Alone, a sample's 3000 keys are shared by blocks; in a batch of 600 they are not."""
    mask = torch.rand(1, 1, 2, 3000) < 0.5
    mask[:, :, 1, :1700] = False  # blocks that keep nothing
    alone = make(B=1, H=1, L=2, D=8, S=3000, dtype=dtype, mask=mask, dropout_seed=SEED, dropout_p=0.2)
    many = 600 if cuda.slow else 6000
    together = dataclasses.replace(
        alone,
        **{name: getattr(alone, name).expand(many, -1, -1, -1) for name in ("query", "key", "value", "mask")},
    )
    assert splits_of(cuda, alone) > 1
    assert splits_of(cuda, together) == 1
    split, whole = check(cuda, alone), run(cuda, together)
    for found, expected in zip(split[:2], whole[:2], strict=True):
        torch.testing.assert_close(found[0], expected[0])
    assert all(a.equal(b) for a, b in zip(split, run(cuda, alone), strict=True))


@pytest.mark.parametrize("X", [0, 2])
@pytest.mark.parametrize("S", [1024, 1025, 1283, 2047])
def test_splits_of_any_length(cuda, S, X):
    """The shares' ends, and the extra columns, which the last block takes."""
    work = make(B=1, H=2, G=1, L=1, D=8, S=S, X=X, dropout_seed=SEED, dropout_p=0.1, weights="mean")
    assert splits_of(cuda, work) > 1
    check(cuda, work)
    check(cuda, dataclasses.replace(work, window_left=700, window_right=0, position_offset=S - 9))
    nothing = dataclasses.replace(work, window_left=0, window_right=0, position_offset=S + 9)
    lse = check(cuda, nothing)[1]
    assert lse.eq(-math.inf).all() == (X == 0)


def test_large_scores_of_one_split(cuda):
    """The largest score rules: the weights of other shares vanish, and none overflows."""
    work = make(B=1, H=1, L=1, D=1, S=2000)
    work.query.fill_(1), work.key.fill_(-1000.0)
    work.key[..., 1500, :] = 3e5
    output = check(cuda, work)[0]
    assert output[0, 0, 0].equal(work.value[0, 0, 1500].to(output.device))
    work.key.fill_(-2e5)  # lse far below what exp can take
    assert check(cuda, work)[1] < -2e4


def test_groups_of_rows(cuda):
    """Rows of a block: of several heads, of several queries, and the last ones."""
    for H, G, L in [(8, 1, 1), (12, 4, 5), (9, 3, 1), (16, 1, 3), (1, 1, 17)]:
        check(cuda, make(B=1, H=H, G=G, L=L, S=50, window_right=0, position_offset=40, weights="mean"))


def test_more_samples_than_a_grid_is_high(cuda):
    """More than 65,535 samples times heads, in as few blocks as there can be, and as many of those."""
    check(cuda, make(B=8200, H=8, G=1, L=1, D=1, S=2))
    if not cuda.slow:
        check(cuda, make(B=16400, H=4, L=1, D=1, S=2, weights="heads"))


@every_dtype
@pytest.mark.parametrize("size", [16, 7])
def test_unaligned_storage(cuda, dtype, size):
    """Where packs would fit but for the address, single elements give the same bits."""

    def moved(t: Tensor) -> Tensor:
        storage = torch.empty(t.numel() + 1, dtype=t.dtype)
        return storage[1:].as_strided(t.shape, t.stride(), 1).copy_(t)

    work = make(D=size, S=140, X=1, dtype=dtype, weights="mean")
    for found, expected in zip(run(cuda, work.map(moved)), run(cuda, work), strict=True):
        assert found.equal(expected)


@every_dtype
def test_strides(cuda, dtype):
    """[B, L, H, D] in memory, a head across rows, expanded keys, masks with their columns apart."""
    rows = make(B=3, H=4, L=40, D=3, S=3, V=4, dtype=dtype).query.transpose(1, 2)  # [3, 40, 4, 3]
    work = make(B=3, H=4, L=40, D=8, S=40, dtype=dtype, weights="heads")
    work.query = work.query.transpose(1, 2).contiguous().transpose(1, 2)
    work.key = work.key.mT.contiguous().mT
    work.value = work.value[:1, :, :1].expand(3, -1, 40, -1)
    work.mask = rows.permute(0, 3, 1, 2)[..., :1].expand(-1, 1 if rows.shape[3] == 1 else -1, -1, 1)[:, :1]
    work.key_mask = (torch.rand(40, 3) < 0.9).T
    check(cuda, work)
    wide = torch.rand(1, 4, 40, 80) < 0.9
    check(cuda, dataclasses.replace(work, mask=wide[..., ::2], key_mask=None))
    check(cuda, dataclasses.replace(work, mask=wide[:, :1, :1, ::2]))


@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_a_row_does_not_keep_never_matters(cuda, dtype, bad):
    """NaN and inf in keys, values and masks, kept by other rows of the same block."""
    S, L = 600, 4
    work = make(B=1, H=2, G=1, L=L, D=8, S=S, dtype=dtype, weights="heads", X=1)
    kept = torch.rand(1, 2, L, S) < 0.5
    kept[:, :, :, 7], kept[:, :, 0, 7] = False, True
    kept[:, :, :, 300:310] = False
    mask = torch.zeros(1, 2, L, S, dtype=dtype).masked_fill(~kept, -math.inf)
    clean = run(cuda, dataclasses.replace(work, mask=mask))
    work.key[:, :, 7], work.value[:, :, 7] = bad, bad
    work.key[:, :, 300:305], work.value[:, :, 303:310] = bad, math.nan
    for given in (mask, kept):
        found = run(cuda, dataclasses.replace(work, mask=given))
        for f, c in zip(found, clean, strict=True):
            assert f[:, :, 1:].equal(c[:, :, 1:])
    # A mask's NaN where another one hides.
    key_mask = kept.any(2).any(1)
    work = dataclasses.replace(work, mask=mask.masked_fill(~key_mask[:, None, None], bad), key_mask=key_mask)
    for f, c in zip(run(cuda, work), clean, strict=True):
        assert f[:, :, 1:].equal(c[:, :, 1:])


@every_dtype
def test_rows_that_keep_nothing(cuda, dtype):
    work = make(L=6, S=70, dtype=dtype, weights="mean")
    work.mask = torch.ones(2, 1, 6, 1, dtype=torch.bool)
    work.mask[0, :, 2:4], work.mask[1] = False, False
    output, lse, weights = check(cuda, work)
    assert output[1].eq(0).all()
    assert lse[1].eq(-math.inf).all()
    assert weights[1].eq(0).all()
    lowest = torch.full((2, 1, 6, 1), torch.finfo(dtype).min, dtype=dtype)
    check(cuda, dataclasses.replace(work, mask=lowest))


def packed(lengths: list[tuple[int, int]], dtype: torch.dtype, **options) -> Work:
    """Sequences of these numbers of queries and keys, whose four heads share their keys."""
    queries, keys = zip(*lengths, strict=True)

    def ends(counts: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)

    return make(
        B=1, L=sum(queries), S=sum(keys), G=1, dtype=dtype, cu_seqlens_q=ends(queries),
        cu_seqlens_k=ends(keys), max_seqlen_q=max(queries), max_seqlen_k=max(keys), alibi_slopes=SLOPES,
        dropout_seed=SEED, dropout_p=0.25, **options,
    )  # fmt: skip


def check_packed(place: places.Place, work: Work) -> None:
    """Compare with the reference; rows behind the last sequence, which it doesn't have, are 0."""
    found = check(place, work)
    rows = work.query.shape[2]
    longer = dataclasses.replace(
        work, query=torch.cat([work.query, torch.full_like(work.query, math.nan)], 2)
    )
    output, lse, _ = run(place, longer)
    assert output[:, :, :rows].equal(found[0])
    assert lse[:, :, :rows].equal(found[1])
    assert output[:, :, rows:].eq(0).all()
    assert lse[:, :, rows:].eq(-math.inf).all()


@every_dtype
def test_packed_sequences(cuda, dtype):
    """One that is empty, one without keys, one without queries, one longer than a tile."""
    lengths = [(3, 5), (0, 0), (4, 0), (0, 7), (1, 150), (5, 129), (9, 3)]
    check_packed(cuda, packed(lengths, dtype, window_right=3))


@every_dtype
def test_packed_sequences_with_splits(cuda, dtype):
    work = packed([(2, 1500), (0, 0), (1, 129)], dtype, window_right=3, position_offset=1200)
    assert splits_of(cuda, work) > 1
    check_packed(cuda, work)


def test_dropout_everything(cuda):
    output, lse, weights = run(cuda, make(S=70, dropout_seed=SEED, dropout_p=1.0, weights="heads", X=1))
    assert output.eq(0).all()
    assert weights.eq(0).all()
    assert lse.isfinite().all()


def test_offsets_beyond_2_to_the_31(cuda):
    """Strides of 2^30 elements and more; what lies between is never touched."""
    rows, step = 4, 2**30
    if cuda.device == "cpu":
        storage = torch.from_numpy(np.zeros(rows * step, np.float16))  # pages exist where they were written
    else:
        storage = torch.zeros(rows * step, dtype=torch.float16, device=cuda.device)
    key = storage.as_strided((1, 1, rows, 8), (0, 0, step, 1))
    small = make(B=1, H=1, L=2, D=8, S=rows, dtype=torch.float16, weights="mean")
    key.copy_(small.key.to(cuda.device))
    far = dataclasses.replace(small, key=key, value=key)
    near = dataclasses.replace(small, value=small.key)
    for f, n in zip(run(cuda, far), run(cuda, near), strict=True):
        assert f.equal(n)


REFUSED = {
    "key: got shape": {"key": torch.zeros(2, 4, 40, 15)},
    "value: got": {"value": torch.zeros(2, 4, 41, 16)},
    "multiple": {"key": torch.zeros(2, 3, 40, 16), "value": torch.zeros(2, 3, 40, 16)},
    "head size": {"query": torch.zeros(2, 4, 3, 257), "key": torch.zeros(2, 4, 40, 257)},
    "expected Float|expected float": {"key": torch.zeros(2, 4, 40, 16, dtype=torch.float64)},
    "mask: got shape": {"mask": torch.zeros(2, 4, 3, 39)},
    "mask: got Int|mask: got int": {"mask": torch.zeros(2, 4, 3, 40, dtype=torch.int32)},
    "key_mask: got shape": {"key_mask": torch.zeros(40)},
    "both or neither": {"extra_key": torch.zeros(4, 1, 16)},
    "alibi_slopes": {"alibi_slopes": torch.zeros(3)},
    "dropout_seed": {"dropout_p": 0.5},
    "dropout_p": {"dropout_p": 1.5},
    "weights": {"weights": "some"},
    "expected 1 with cu_seqlens": {
        "cu_seqlens_q": torch.zeros(2, dtype=torch.int32),
        "cu_seqlens_k": torch.zeros(2, dtype=torch.int32),
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(cuda, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        run(cuda, dataclasses.replace(make(), **REFUSED[message]))
