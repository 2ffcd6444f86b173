"""What a case, a workload and a peer are, and where the cases are found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Mode = Literal["inference", "training"]
Outputs = dict[str, Tensor]

EAGER = "eager"
COMPILE = "compile"
REFERENCE = "reference"
FUSEDNN = "fusednn"
ONNXRUNTIME = "onnxruntime"
OPENVINO = "openvino"
EXPORTED = (ONNXRUNTIME, OPENVINO)
PEERS = (EAGER, COMPILE, REFERENCE, FUSEDNN, *EXPORTED)


class PeerMissing(Exception):
    """A peer can't take part on this machine or in this mode; the text says why."""


@dataclass(frozen=True)
class Peer:
    """One way to do a case's work.

    ``call`` is the timed work, all of it. It runs inside ``context()``, which is entered outside the timed
    span. ``outputs`` names the tensors that the last call computed; it is given what the call returned.
    ``reset`` drops what a call leaves behind (gradients).
    """

    name: str
    call: Callable[[], object]
    outputs: Callable[[object], Outputs]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    reset: Callable[[], None] = lambda: None
    note: str = ""


class Workload(Protocol):
    """A case on a device: weights and inputs that all of its peers share."""

    @property
    def peers(self) -> Sequence[str]:
        """Names of the peers that the case knows, in the order of the table."""
        ...

    def oracle(self) -> Outputs:
        """Return the right answer, computed in float64 on the CPU."""
        ...

    def build(self, peer: str) -> Peer:
        """Make the peer ready to be called.

        Raises:
            PeerMissing: it isn't installed, or doesn't serve this mode or device.

        """
        ...


@dataclass(frozen=True)
class Case:
    """A workload with its shapes and costs.

    ``flops`` counts a multiply-add as two, matrix products only. ``bytes`` is the least traffic: each tensor
    that a pass reads or writes, once. The family's module states both formulas.
    """

    name: str
    family: str
    mode: Mode
    shape: Mapping[str, int]
    dtype: str
    flops: int
    bytes: int
    build: Callable[[Case, torch.device], Workload]
    quick: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch's object."""
        return getattr(torch, self.dtype)


def load_cases() -> list[Case]:
    """Return the cases of every module in ``benchmarks.cases``, in order.

    Raises:
        ValueError: two cases share a name.

    """
    package = importlib.import_module("benchmarks.cases")
    cases: list[Case] = []
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        cases += importlib.import_module(f"benchmarks.cases.{found.name}").CASES
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"case names must be unique, got twice: {', '.join(twice)}")
    return cases


def select_cases(
    cases: Sequence[Case], *, family: str = "", substring: str = "", mode: str = "", quick: bool = False
) -> list[Case]:
    """Return the cases that match every filter given; an empty filter matches all."""
    return [
        case
        for case in cases
        if (not family or case.family == family)
        and substring in case.name
        and (not mode or case.mode == mode)
        and (not quick or case.quick)
    ]
