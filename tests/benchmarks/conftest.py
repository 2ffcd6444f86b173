"""Stand-ins: cases of one line each, and a `fusednn` package made of torch's own cells."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import benchmarks.run as bench
from benchmarks.ceilings import Ceilings
from benchmarks.registry import PEERS, Case, Mode, Outputs, Peer, PeerMissing

Function = Callable[[Tensor], Tensor]


class Doubling:
    """A workload whose peers should all return 2 x; a peer without a function is missing."""

    def __init__(self, functions: dict[str, Function]) -> None:
        self.functions = functions
        self.peers: Sequence[str] = PEERS
        self.x = torch.linspace(-1, 1, 7)

    def oracle(self) -> Outputs:
        return {"y": 2 * self.x.double()}

    def build(self, peer: str) -> Peer:
        if peer not in self.functions:
            raise PeerMissing(f"{peer} is not installed")
        return Peer(peer, lambda: self.functions[peer](self.x), lambda y: {"y": y.clone()})


def double(x: Tensor) -> Tensor:
    """Compute what every peer of `Doubling` should."""
    return 2 * x


def doubling_case(name: str = "double-n7-inference", mode: Mode = "inference", **functions: Function) -> Case:
    """Return a case where eager and fusednn are right, but for what `functions` replaces."""
    chosen = {"eager": double, "fusednn": double, **functions}
    return Case(
        name, "toy", mode, {"N": 7}, "float32", flops=7, bytes=56, build=lambda c, d: Doubling(chosen)
    )


@pytest.fixture
def run_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Return a function that runs the command on given cases: (exit code, stdout, path of the JSON file)."""
    monkeypatch.setattr(bench, "measure_ceilings", lambda device, dtype: Ceilings(1e10, 1e11, dtype))

    def run(cases: list[Case], *options: str) -> tuple[int, str, Path]:
        monkeypatch.setattr(bench, "load_cases", lambda: cases)
        path = tmp_path / "out.json"
        common = ["--device", "cpu", "--rounds", "2", "--min-sample-ms", "0.02", "--json", str(path)]
        code = bench.main([*common, *options])
        return code, capsys.readouterr().out, path

    return run


@pytest.fixture
def fake_fusednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Install a `fusednn` whose cells are torch's own, and which records the backends asked for."""

    class LSTMCell(nn.LSTMCell):
        pass

    class GRUCell(nn.GRUCell):
        pass

    package = types.ModuleType("fusednn")
    asked: list[str] = []

    @contextlib.contextmanager
    def use_backend(name: str) -> Iterator[None]:
        asked.append(name)
        yield

    vars(package).update(
        LSTMCell=LSTMCell,
        GRUCell=GRUCell,
        use_backend=use_backend,
        asked=asked,
        explain=lambda module, *inputs: (types.SimpleNamespace(backend="cpu"),),
    )
    monkeypatch.setitem(sys.modules, "fusednn", package)
    return package
