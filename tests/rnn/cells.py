"""Workloads of the cells, and the same step by PyTorch, by the float64 oracle, and by fusednn."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fusednn
from fusednn.rnn import reference
from fusednn.testing import assert_close_to_oracle

CELLS = ("lstm", "gru")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GATES = {"lstm": 4, "gru": 3}
STATES = {"lstm": ("h", "c"), "gru": ("h",)}
MODULES = {"lstm": fusednn.LSTMCell, "gru": fusednn.GRUCell}
TORCH_MODULES = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell}
PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass(frozen=True)
class Workload:
    """One step's tensors by argument name, and the gradients of its results (None: not used)."""

    cell: str
    tensors: dict[str, Tensor | None]
    grads: tuple[Tensor | None, ...]

    def map(self, f: Callable[[Tensor], Tensor]) -> Workload:
        """Apply `f` to every tensor."""
        tensors = {name: None if t is None else f(t) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, grads=tuple(None if g is None else f(g) for g in self.grads))

    def with_(self, **tensors: Tensor | None) -> Workload:
        """Replace tensors by name."""
        return replace(self, tensors={**self.tensors, **tensors})


def workload(
    cell: str,
    batch: int,
    input_size: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = True,
    scale: float = 1.0,
) -> Workload:
    """Make a step whose values depend on its shape alone: inputs of `scale`, weights as torch's."""
    seed = zlib.crc32(repr((cell, batch, input_size, hidden, scale)).encode())
    generator = torch.Generator().manual_seed(seed)
    rows = GATES[cell] * hidden

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul_(scale).to(dtype).to(device)

    def uniform(*shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator, dtype=torch.float64).mul_(2).sub_(1)
        return values.div_(hidden**0.5).to(dtype).to(device)

    tensors = {"input": normal(batch, input_size)}
    tensors |= {state: normal(batch, hidden) for state in STATES[cell]}
    tensors |= {"weight_ih": uniform(rows, input_size), "weight_hh": uniform(rows, hidden)}
    tensors |= {name: uniform(rows) if bias else None for name in ("bias_ih", "bias_hh")}
    grads = tuple(normal(batch, hidden) / scale for _ in STATES[cell])
    return Workload(cell, tensors, grads)


def saturated_workload(
    cell: str, batch: int, scale: float, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Workload:
    """Make a step whose gates lie far beyond where exp overflows.

    Every product is exact in every dtype, since a gate near zero would magnify the luck of one rounding.
    """
    work = workload(cell, batch, 3, 21, dtype, device)
    tensors = {name: (t * 4).round().clamp(-4, 4) / 4 for name, t in work.tensors.items()}
    tensors["input"] = torch.where(work.tensors["input"] < 0, -1.0, 1.0).to(dtype) * scale
    tensors["weight_ih"] = (work.tensors["weight_ih"] * 2 * 21**0.5).round() / 2
    return work.with_(**tensors)


def states_of(tensors: dict[str, Tensor | None]):
    """Return `hx` as a cell takes it."""
    return (tensors["h"], tensors["c"]) if "c" in tensors else tensors["h"]


def _parameters(tensors: dict[str, Tensor | None]) -> list[Tensor | None]:
    return [tensors[name] for name in PARAMETERS]


def torch_step(cell: str, tensors: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    """PyTorch's own cell."""
    hx = states_of(tensors)
    if cell == "lstm":
        return torch.lstm_cell(tensors["input"], hx, *_parameters(tensors))
    return (torch.gru_cell(tensors["input"], hx, *_parameters(tensors)),)


def oracle_step(cell: str, tensors: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    """The reference; the oracle if its tensors are float64."""
    parameters = _parameters(tensors)
    if cell == "lstm":
        return reference.lstm_cell_forward(tensors["input"], tensors["h"], tensors["c"], *parameters, False)[
            :2
        ]
    return reference.gru_cell_forward(tensors["input"], tensors["h"], *parameters, False)[:1]


def fused_step(cell: str, tensors: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
    """fusednn, on the backend of the caller's choice."""
    hx = states_of(tensors)
    if cell == "lstm":
        return fusednn.functional.lstm_cell(tensors["input"], hx, *_parameters(tensors))
    return (fusednn.functional.gru_cell(tensors["input"], hx, *_parameters(tensors)),)


def run(step, work: Workload, wanted: Sequence[str] | None = None) -> dict[str, Tensor | None]:
    """Run a step forward and backward; return outputs by name and gradients as ``grad of <argument>``.

    `wanted` names the arguments that require a gradient (None: all; empty: inference).
    """
    present = [name for name, t in work.tensors.items() if t is not None]
    wanted = present if wanted is None else [name for name in present if name in wanted]
    # A tensor with stride tricks must stay as it is: gradients are asked of an alias, not of a copy.
    tensors = {
        name: t if t is None else t.detach().requires_grad_(name in wanted)
        for name, t in work.tensors.items()
    }
    with torch.set_grad_enabled(bool(wanted)):
        outputs = step(work.cell, tensors)
    results: dict[str, Tensor | None] = {
        f"{name}'": out.detach() for name, out in zip(STATES[work.cell], outputs, strict=True)
    }
    pairs = [(out, grad) for out, grad in zip(outputs, work.grads, strict=True) if grad is not None]
    if wanted and pairs:
        found = torch.autograd.grad(
            [out for out, _ in pairs],
            [tensors[name] for name in wanted],
            [grad for _, grad in pairs],
            allow_unused=True,
        )
        results |= {f"grad of {name}": grad for name, grad in zip(wanted, found, strict=True)}
    return results


def check(work: Workload, wanted: Sequence[str] | None = None, what: str = "") -> dict[str, Tensor | None]:
    """Run fusednn on the backend in force and check outputs and gradients against the oracle; return them."""
    actual = run(fused_step, work, wanted)
    compare(actual, work, wanted, what)
    return actual


def compare(
    actual: dict[str, Tensor | None], work: Workload, wanted: Sequence[str] | None = None, what: str = ""
) -> None:
    """Check results by name against the oracle's, within the budget that PyTorch's own cell sets."""
    same_dtype = run(torch_step, work, wanted)
    oracle = _oracle(work, wanted)
    assert actual.keys() == same_dtype.keys()
    for name, expected in same_dtype.items():
        if expected is None:
            assert actual[name] is None, f"{what}{name}: got a gradient, expected none"
            continue
        assert actual[name] is not None, f"{what}{name}: got no gradient"
        assert_close_to_oracle(actual[name], expected, oracle[name], what + name)


def _oracle(work: Workload, wanted: Sequence[str] | None) -> dict[str, Tensor | None]:
    if work.tensors["input"].dtype == torch.float64:
        from .extended import extended_results  # needs Workload

        return extended_results(work)
    return run(oracle_step, work.map(lambda t: t.detach().double()), wanted)


def assert_same_bits(a: dict[str, Tensor | None], b: dict[str, Tensor | None], what: str) -> None:
    """Check that two runs agree in every bit."""
    assert a.keys() == b.keys()
    for name, t in a.items():
        if t is not None:
            torch.testing.assert_close(
                t, b[name], rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: f"{what}: {n}\n{text}"
            )
