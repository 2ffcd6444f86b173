"""Attention to compute, and the same by PyTorch's own operations, straightforwardly."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusednn
from fusednn.testing import assert_close_to_oracle, error_budget
from tests.places import INTERPRETED

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OUTPUTS = ("scale", "flatten", "sum", "coordinates")
SCORES = ("positional", "additive")


def interpreted(place: Any) -> bool:
    """Whether a call takes a tenth of a second, so that a test of many has to choose."""
    return place.name == "triton-interpreted"


@dataclass(frozen=True)
class Work:
    """An attention's tensors, options, and the gradients of its results."""

    tensors: dict[str, Tensor | None]  # features, weight, hidden_term, v, temperature
    mask: Tensor | None
    output: str
    grads: tuple[Tensor, Tensor]

    def map(self, f: Callable[[Tensor], Tensor]) -> Work:
        """Apply `f` to every tensor but the mask."""
        tensors = {name: None if t is None else f(t) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, grads=tuple(f(g) for g in self.grads))

    def with_(self, **tensors: Tensor | None) -> Work:
        """Replace tensors by name."""
        return replace(self, tensors={**self.tensors, **tensors})


def make(
    shape: tuple[int, int, int, int] = (2, 5, 4, 3),
    score: str = "positional",
    output: str = "scale",
    glimpses: int = 1,
    masked: bool = False,
    temperature: float | None = 0.7,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    last: bool = False,
) -> Work:
    """Make an attention over features [N, C, H, W] whose values depend on its arguments alone."""
    seed = zlib.crc32(repr((shape, score, output, glimpses, masked)).encode())
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(device)

    n, c, h, w = shape
    rows = 6
    features = normal(*shape)
    if last:
        features = features.contiguous(memory_format=torch.channels_last)
    if score == "positional":
        tensors = {
            "weight": normal(glimpses, c) / c**0.5,
            "hidden_term": normal(n, glimpses, h * w),
            "v": None,
        }
    else:
        tensors = {
            "weight": normal(rows, c) / c**0.5,
            "hidden_term": normal(n, rows),
            "v": normal(glimpses, rows),
        }
    t = None if temperature is None else torch.tensor(temperature, dtype=dtype, device=device)
    mask = torch.rand(n, 1, h, w, generator=generator).gt(0.3).to(device) if masked else None
    size = {
        "scale": (n, glimpses * c, h, w),
        "flatten": (n, glimpses * c * h * w),
        "sum": (n, glimpses * c),
        "coordinates": (n, glimpses, 2),
    }[output]
    grads = (normal(*size), normal(n, glimpses, h, w))
    return Work({"features": features, **tensors, "temperature": t}, mask, output, grads)


def torch_softmax(s: Tensor, mask: Tensor | None, temperature: Any) -> Tensor:
    """Softmax over all positions of [N, G, H, W]."""
    s = s / temperature
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    return s.flatten(2).softmax(-1).view_as(s)


def torch_coordinates(a: Tensor) -> Tensor:
    """Expected (x, y) of maps [N, G, H, W]."""
    x = torch.linspace(-1, 1, a.shape[3], dtype=a.dtype, device=a.device)
    y = torch.linspace(-1, 1, a.shape[2], dtype=a.dtype, device=a.device)
    return torch.stack(((a * x).sum((2, 3)), (a * y[:, None]).sum((2, 3))), -1)


def torch_attend(features: Tensor, a: Tensor, output: str) -> Tensor:
    """What a map [N, G, H, W] makes of features [N, C, H, W]."""
    if output == "coordinates":
        return torch_coordinates(a)
    scaled = torch.cat([features * m for m in a.split(1, dim=1)], dim=1)
    return {"scale": lambda: scaled, "flatten": lambda: scaled.flatten(1), "sum": lambda: scaled.sum((2, 3))}[
        output
    ]()


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """[G, C] times [N, C, H, W]."""
    return F.conv2d(x, weight[:, :, None, None])


def torch_step(work: Work, tensors: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """PyTorch's own operations."""
    features, weight, term, v, temperature = tensors.values()
    s = convolution(features, weight)
    if v is not None:
        s = convolution((s if term is None else s + term[:, :, None, None]).tanh(), v)
    elif term is not None:
        s = s + term.view_as(s)
    a = torch_softmax(s, work.mask, 1.0 if temperature is None else temperature)
    return torch_attend(features, a, work.output), a


def fused_step(work: Work, tensors: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """fusednn, on the backend of the caller's choice."""
    *operands, temperature = tensors.values()
    t = 1.0 if temperature is None else temperature
    return fusednn.functional.spatial_attention(*operands, mask=work.mask, temperature=t, output=work.output)


Results = dict[str, Tensor]


def run(step: Any, work: Work, wanted: tuple[str, ...] | None = None) -> Results:
    """Run forward and backward; return results and gradients as ``grad of <argument>``."""
    names = [n for n, t in work.tensors.items() if t is not None and (wanted is None or n in wanted)]
    tensors = {
        name: t if t is None else t.detach().requires_grad_(name in names) for name, t in work.tensors.items()
    }
    attended, a = step(work, tensors)
    results = {"attended": attended.detach(), "map": a.detach()}
    if names:
        found = torch.autograd.grad((attended, a), [tensors[n] for n in names], work.grads, allow_unused=True)
        results |= {
            f"grad of {n}": torch.zeros_like(tensors[n]) if g is None else g
            for n, g in zip(names, found, strict=True)
        }
    return results


def variants(work: Work) -> list[Work]:
    """The work, and others that differ in the signs of finite numbers, the more the smaller it is.

    PyTorch's largest error in a few numbers, or in a sum that cancels, is luck. In the interpreter calls are
    slow, and there are few.
    """
    generator = torch.Generator().manual_seed(0)
    count = 4 if INTERPRETED else 12 if work.tensors["features"].numel() > 64 else 96

    def other_signs(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        signs = torch.randint(2, t.shape, generator=generator).mul(2).sub(1).to(t)
        return torch.where(t.isfinite(), t * signs, t)

    operands = {name: work.tensors[name] for name in ("features", "hidden_term")}
    others = [{name: other_signs(t) for name, t in operands.items()} for _ in range(count - 1)]
    return [work, *(work.with_(**tensors) for tensors in others)]


def check(work: Work, what: str = "") -> Results:
    """Check fusednn, on the backend in force, against PyTorch's operations; return its results."""
    works = variants(work)
    actual = stacked(run(fused_step, w) for w in works)
    theirs = stacked(run(torch_step, w) for w in works)
    if work.tensors["features"].dtype == torch.float64:
        for name, expected in theirs.items():
            scale = expected.abs().max().clamp(min=1) if expected.numel() else 1.0
            torch.testing.assert_close(
                actual[name] / scale,
                expected / scale,
                rtol=0,
                atol=1e-13,
                msg=lambda m, n=name: f"{what}{n}: {m}",
            )
    else:
        oracle = stacked(run(torch_step, w.map(Tensor.double)) for w in works)
        for name, exact in oracle.items():
            assert_close_to_oracle(actual[name], theirs[name], exact, f"{what}{name}")
    return {name: t[0] for name, t in actual.items()}


def check_on_average(work: Work) -> None:
    """Check that the largest error of each result is within the budget, both in the mean over variants.

    In a sum over all positions PyTorch's largest error in a sample may be as good as none.
    """
    errors: dict[str, list[float]] = {}
    budgets: dict[str, list[float]] = {}
    for w in variants(work):
        actual, theirs = run(fused_step, w), run(torch_step, w)
        oracle = run(torch_step, w.map(Tensor.double))
        for name, exact in oracle.items():
            errors.setdefault(name, []).append((actual[name].double() - exact).abs().max().item())
            budgets.setdefault(name, []).append(error_budget(theirs[name], exact))
    for name in errors:
        assert sum(errors[name]) <= sum(budgets[name]), f"{name}: got {errors[name]}, budgets {budgets[name]}"


def stacked(results: Iterable[Results]) -> Results:
    """Stack results by name."""
    found = list(results)
    return {name: torch.stack([r[name] for r in found]) for name in found[0]}


def torch_sequence(
    module: fusednn.AttentionLSTM, features: Tensor, state: Any, lengths: list[int] | None = None
) -> tuple[Tensor, Tensor, Any]:
    """The recurrence as a loop over torch's operations, each sequence alone, as far as it goes."""
    lstm = isinstance(module.cell, nn.LSTMCell)
    hidden, maps, last = [], [], []
    for b, sample in enumerate(features):
        s = tuple(x[b : b + 1] for x in state) if lstm else state[b : b + 1]
        steps = len(sample) if lengths is None else lengths[b]
        outs, seen = [], []
        for f in sample[:steps]:
            s, a = torch_recur(module, f[None], s)
            outs.append(s[0] if lstm else s)
            seen.append(a)
        hidden.append(F.pad(torch.cat(outs), (0, 0, 0, len(sample) - steps)))
        maps.append(F.pad(torch.cat(seen), (0, 0, 0, 0, 0, 0, 0, len(sample) - steps)))
        last.append(s if lstm else (s,))
    ends = tuple(torch.cat(x) for x in zip(*last, strict=True))
    return torch.stack(hidden), torch.stack(maps), ends if lstm else ends[0]


def torch_recur(module: fusednn.AttentionLSTM, f: Tensor, state: Any) -> tuple[Any, Tensor]:
    """One step: the next state and the map."""
    attention, cell = module.attention, module.cell
    lstm = isinstance(state, tuple)
    term = F.linear(state[0] if lstm else state, attention.hidden.weight, attention.hidden.bias)
    s = F.conv2d(f, attention.score.weight)
    if attention.v is None:
        s = s + term.view_as(s)
    else:
        s = F.conv2d((s + term[:, :, None, None]).tanh(), attention.v.weight[:, :, None, None])
    a = torch_softmax(s, None, attention.temperature)
    x = torch_attend(f, a, attention.output)
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    return (torch.lstm_cell if lstm else torch.gru_cell)(x, state, *weights), a
