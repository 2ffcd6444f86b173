"""Attention to compute, and the same by PyTorch's own operations, straightforwardly."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusednn.attention import dropout
from fusednn.core import settings
from fusednn.testing import assert_close_to_oracle

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TENSORS = ("query", "key", "value", "mask", "key_mask", "extra_key", "extra_value")
SEED = 0x123456789ABCDEF

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """An attention's tensors, options, and the gradients of its results."""

    tensors: dict[str, Tensor | None]  # TENSORS
    grads: dict[str, Tensor]  # of output, lse, weights; those left out are None
    slopes: Tensor | None = None
    bounds: tuple[Tensor | None, Tensor | None] = (None, None)
    longest: tuple[int, int] = (0, 0)
    scale: float = 1.0
    window: tuple[int, int] = (-1, -1)
    offset: int = 0
    softcap: float = 0.0
    dropout: float = 0.0
    weights: str = "none"

    @property
    def seed(self) -> Tensor | None:
        """The seed of its dropout."""
        return torch.tensor([SEED], device=self.tensors["query"].device) if self.dropout else None

    @property
    def options(self) -> tuple[Any, ...]:
        """In the order of the ops."""
        return (
            *self.longest,
            self.scale,
            *self.window,
            self.offset,
            self.softcap,
            self.dropout,
            self.weights,
        )

    def map(self, f: Callable[[Tensor], Tensor]) -> Work:
        """Apply `f` to every floating tensor and gradient."""

        def one(t: Tensor | None) -> Tensor | None:
            return t if t is None or t.dtype == torch.bool else f(t)

        tensors = {name: one(t) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, grads={name: f(g) for name, g in self.grads.items()})

    def with_(self, **tensors: Tensor | None) -> Work:
        """Replace tensors by name."""
        return replace(self, tensors={**self.tensors, **tensors})

    def where(self, **options: Any) -> Work:
        """Replace anything else."""
        return replace(self, **options)


def _expand(t: Tensor, how: str, sizes: tuple[int, ...]) -> Tensor:
    if how == "expanded":
        return t.expand(sizes)
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "strided":
        return F.pad(t[..., None], (0, 2), value=1)[..., 0]
    return t


def make(
    batch: int = 2,
    heads: int = 4,
    rows: int = 9,
    columns: int = 13,
    size: int = 8,
    value_size: int | None = None,
    groups: int | None = None,
    mask: str = "",
    key_mask: str = "",
    extra: int = 0,
    alibi: bool = False,
    window: tuple[int, int] = (-1, -1),
    offset: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    weights: str = "none",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Work:
    """Make an attention whose values depend on its arguments alone.

    `mask` is ``"<bool|float> <sizes> [expanded|transposed|strided]"``: sizes such as ``b1ls`` or ``bhls``;
    `key_mask` is ``bool`` or ``float``. A floating mask has -inf in a sixth of its places, a bool mask False
    in a third. Queries, keys and values lie in memory as projections leave them: [B, L, H, D].
    """
    what = (batch, heads, rows, columns, size, value_size, groups, mask, key_mask, extra, window, weights)
    generator = torch.Generator().manual_seed(zlib.crc32(repr(what).encode()))
    groups, value_size = groups or heads, size if value_size is None else value_size

    def normal(*shape: int, wide: bool = False) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return (t.to(torch.promote_types(dtype, torch.float32)) if wide else t).to(device)

    def some(kind: str, *shape: int) -> Tensor:
        if kind == "bool":
            return (torch.rand(shape, generator=generator) > 1 / 3).to(device)
        gone = (torch.rand(shape, generator=generator) < 1 / 6).to(device)
        return normal(*shape).masked_fill(gone, -math.inf)

    def by_rows(heads: int, length: int, width: int) -> Tensor:
        return normal(batch, length, heads, width).transpose(1, 2)

    sizes = {"b": batch, "h": heads, "l": rows, "s": columns, "1": 1}
    given = None
    if mask:
        kind, letters, *how = mask.split()
        given = some(kind, *(sizes[letter] for letter in letters))
        given = _expand(given, how[0] if how else "", (batch, heads, rows, columns))
    tensors = {
        "query": by_rows(heads, rows, size),
        "key": by_rows(groups, columns, size),
        "value": by_rows(groups, columns, value_size),
        "mask": given,
        "key_mask": some(key_mask, batch, columns) if key_mask else None,
        "extra_key": normal(groups, extra, size) if extra else None,
        "extra_value": normal(groups, extra, value_size) if extra else None,
    }
    grads = {"output": by_rows(heads, rows, value_size), "lse": normal(batch, heads, rows, wide=True)}
    if weights != "none":
        lead = (batch,) if weights == "mean" else (batch, heads)
        grads["weights"] = normal(*lead, rows, columns + extra)
    slopes = (2.0 ** -torch.arange(1, heads + 1)).to(device) if alibi else None
    return Work(
        tensors, grads, slopes, scale=1 / math.sqrt(max(size, 1)), window=window, offset=offset,
        softcap=softcap, dropout=dropout, weights=weights,
    )  # fmt: skip


def make_packed(rows: Iterable[int], columns: Iterable[int], **options: Any) -> Work:
    """Make packed sequences of so many rows and columns; `options` are those of `make`."""
    rows, columns = list(rows), list(columns)
    work = make(1, rows=sum(rows), columns=sum(columns), **options)
    device = work.tensors["query"].device
    bounds = tuple(
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device) for n in (rows, columns)
    )
    return work.where(bounds=bounds, longest=(max(rows, default=0), max(columns, default=0)))


def fused_step(work: Work, tensors: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """fusednn, on the backend of the caller's choice."""
    op = torch.ops.fusednn.attention_forward
    return op(*tensors.values(), work.slopes, *work.bounds, work.seed, *work.options)


def torch_step(work: Work, tensors: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's own operations."""
    if work.bounds[0] is None or work.bounds[0].shape[0] == 1:
        return torch_attend(work, tensors)
    outputs, sums = [], []
    spans = zip(*(itertools.pairwise(b.tolist()) for b in work.bounds), strict=True)
    for number, ((first, last), (start, end)) in enumerate(spans):
        one = {
            **tensors,
            "query": tensors["query"][:, :, first:last],
            "key": tensors["key"][:, :, start:end],
            "value": tensors["value"][:, :, start:end],
        }
        output, lse, _ = torch_attend(work, one, number)
        outputs.append(output)
        sums.append(lse)
    return torch.cat(outputs, 2), torch.cat(sums, 2), tensors["query"].new_empty(0)


def torch_kept(work: Work, tensors: dict[str, Tensor | None]) -> Tensor:
    """Where a row sees a column: [B, H, L, S + X] or what broadcasts to it."""
    rows, columns = tensors["query"].shape[2], tensors["key"].shape[2]
    device = tensors["query"].device
    ahead = torch.arange(columns, device=device) - torch.arange(rows, device=device)[:, None] - work.offset
    kept = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=device)
    if work.window[0] >= 0:
        kept = kept & (ahead >= -work.window[0])
    if work.window[1] >= 0:
        kept = kept & (ahead <= work.window[1])
    mask, key_mask = tensors["mask"], tensors["key_mask"]
    for given in (mask, None if key_mask is None else key_mask[:, None, None]):
        if given is not None:
            kept = kept & (given if given.dtype == torch.bool else given != -math.inf)
    extra = 0 if tensors["extra_key"] is None else tensors["extra_key"].shape[1]
    return F.pad(kept, (0, extra), value=True)


def torch_attend(work: Work, tensors: dict[str, Tensor | None], number: int = 0) -> tuple[Tensor, ...]:
    """Attention over sequences of one length; `number` is that of a packed one."""
    q, k, v, mask, key_mask, extra_key, extra_value = tensors.values()
    batch, heads, rows, _ = q.shape
    columns, extra = k.shape[2], 0
    if extra_key is not None:
        extra = extra_key.shape[1]
        k = torch.cat([k, extra_key.expand(batch, -1, -1, -1)], 2)
        v = torch.cat([v, extra_value.expand(batch, -1, -1, -1)], 2)
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    s = (q @ k.mT) * work.scale
    if work.softcap:
        s = work.softcap * (s / work.softcap).tanh()
    if work.slopes is not None:
        place = torch.arange(rows, device=q.device)[:, None] + work.offset
        far = (torch.arange(columns, device=q.device) - place).abs()
        s = s - F.pad((work.slopes[:, None, None] * far).to(s.dtype), (0, extra))
    if mask is not None and mask.dtype != torch.bool:
        s = s + F.pad(mask, (0, extra))
    if key_mask is not None and key_mask.dtype != torch.bool:
        s = s + F.pad(key_mask, (0, extra))[:, None, None]
    kept = torch_kept(work, tensors).expand(s.shape)
    s = s.masked_fill(~kept, -math.inf)
    empty = ~kept.any(-1, keepdim=True)
    s = s.masked_fill(empty, 0)
    p = s.softmax(-1).masked_fill(empty, 0)
    lse = s.logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)
    if work.dropout:
        z = dropout.kept_weights(work.seed, work.dropout, batch, heads, rows, columns + extra, number)
        p = p * z * dropout.keep_scale(work.dropout)
    found = {"none": lambda: p.new_empty(0), "mean": lambda: p.mean(1), "heads": lambda: p}[work.weights]()
    return p @ v, lse, found


def run(step: Any, work: Work, wanted: Iterable[str] | None = None) -> Results:
    """Run forward and, for the tensors `wanted` (None: all), backward; ``grad of <tensor>`` among others."""
    floating = [n for n, t in work.tensors.items() if t is not None and t.dtype != torch.bool]
    names = [n for n in floating if wanted is None or n in wanted]
    tensors = {
        name: t if t is None else t.detach().requires_grad_(name in names) for name, t in work.tensors.items()
    }
    with torch.set_grad_enabled(bool(names)):
        found = dict(zip(("output", "lse", "weights"), step(work, tensors), strict=True))
    if work.weights == "none":
        del found["weights"]
    results = {name: t.detach() for name, t in found.items()}
    wide = torch.promote_types(work.tensors["query"].dtype, torch.float32)
    results["lse"] = results["lse"].to(wide)
    given = {n: g for n, g in work.grads.items() if n in found}
    if names:
        grads = torch.autograd.grad(
            [found[n] for n in given], [tensors[n] for n in names],
            [g.to(found[n].dtype) for n, g in given.items()], allow_unused=True,
        )  # fmt: skip
        for name, g in zip(names, grads, strict=True):
            results[f"grad of {name}"] = torch.zeros_like(tensors[name]) if g is None else g
    return results


def variants(work: Work) -> list[Work]:
    """The work, and others that differ in the signs of queries and values, unless it is large.

    PyTorch's largest error in a few numbers, or in a sum that cancels, is luck: in float32, where the ulps
    beside it leave little room. Where an interpreter or an emulator runs the kernels, there are none.
    """
    generator = torch.Generator().manual_seed(0)

    def other_signs(t: Tensor) -> Tensor:
        signs = torch.randint(2, t.shape, generator=generator).mul(2).sub(1).to(t)
        return torch.where(t.isfinite(), t * signs, t)

    query = work.tensors["query"]
    slow = settings.backend() in ("cuda", "triton") and query.device.type == "cpu"
    slow = slow or query.dtype != torch.float32 or query.numel() + work.tensors["key"].numel() > 4096
    count = 1 if slow else 8
    both = [{n: other_signs(work.tensors[n]) for n in ("query", "value")} for _ in range(count - 1)]
    return [work, *(work.with_(**tensors) for tensors in both)]


def check(work: Work, what: str = "", backward: bool = True) -> Results:
    """Check fusednn, on the backend in force, against PyTorch's operations; return its results."""
    works, wanted = variants(work), None if backward else ()
    actual = stacked(run(fused_step, w, wanted) for w in works)
    theirs = stacked(run(torch_step, w, wanted) for w in works)
    assert actual.keys() == theirs.keys()
    if work.tensors["query"].dtype == torch.float64:
        for name, expected in theirs.items():
            finite = expected[expected.isfinite()]
            scale = finite.abs().max().clamp(min=1) if finite.numel() else 1.0
            torch.testing.assert_close(
                actual[name] / scale,
                expected / scale,
                rtol=0,
                atol=1e-13,
                msg=lambda m, n=name: f"{what}{n}: {m}",
            )
    else:
        exact = stacked(run(torch_step, w.map(Tensor.double), wanted) for w in works)
        for name, oracle in exact.items():
            assert_close_to_oracle(actual[name], theirs[name], oracle, f"{what}{name}")
    return {name: t[0] for name, t in actual.items()}


def stacked(results: Iterable[Results]) -> Results:
    """Stack results by name."""
    found = list(results)
    return {name: torch.stack([r[name] for r in found]) for name in found[0]}
