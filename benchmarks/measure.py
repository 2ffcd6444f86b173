"""One case from end to end: build the peers, verify them, time those that are right, verify those again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from .machine import without_paths
from .memory import peak_bytes
from .registry import EAGER, Case, Outputs, Peer, PeerMissing, Workload
from .results import CaseResult, PeerResult
from .timing import Clock, Timing, clock_for, interleave
from .verify import Budget, Verdict, eager_budgets, verify

T = TypeVar("T")


def run_case(
    case: Case,
    peers: Sequence[str],
    device: torch.device,
    *,
    rounds: int,
    min_sample_s: float,
    memory: bool = False,
    clock: Clock | None = None,
) -> CaseResult:
    """Measure one case; every peer of its workload gets a row, whatever became of it."""
    reset_compiler()
    workload = case.build(case, device)
    judge = Judge(case)
    try:
        judge.learn(workload)
    except Exception as error:
        left = [PeerResult(n, "skipped", "eager can't judge it") for n in workload.peers if n != EAGER]
        return CaseResult.of(case, [PeerResult(EAGER, "failed", describe(error)), *left])
    rows: dict[str, PeerResult] = {}
    ready: list[Peer] = []
    for name in workload.peers:
        if name not in peers:
            rows[name] = PeerResult(name, "skipped", "left out by an option")
            continue
        peer = _attempt(rows, name, partial(workload.build, name))
        if peer is not None and _verified(rows, peer, judge):
            ready.append(peer)
    timings = _timed(rows, ready, rounds, min_sample_s, clock or clock_for(device))
    for peer in ready:
        # The calls between must not have changed the answer: caches went stale, a buffer was shared.
        if peer.name in timings and (verdict := _verified(rows, peer, judge)):
            row = PeerResult(
                peer.name, "ok", "", verdict.error, verdict.allowed, timings[peer.name], note=peer.note
            )
            rows[peer.name] = _with_memory(row, case, peer, device) if memory else row
    return CaseResult.of(case, [rows[name] for name in workload.peers])


class Judge:
    """Knows the oracle's answer and how far a peer may be from it."""

    def __init__(self, case: Case) -> None:
        self.dtype = case.torch_dtype
        self.oracle: Outputs = {}
        self.budgets: dict[str, Budget] = {}

    def learn(self, workload: Workload) -> None:
        """Compute the oracle and, from a fresh eager peer, the budgets."""
        self.oracle = workload.oracle()
        self.budgets = eager_budgets(answer(workload.build(EAGER)), self.oracle, self.dtype)

    def verdict(self, peer: Peer) -> Verdict:
        """Judge two calls in a row, and return the first that is not ok."""
        first = verify(answer(peer), self.oracle, self.budgets, self.dtype)
        return (
            first if first.standing != "ok" else verify(answer(peer), self.oracle, self.budgets, self.dtype)
        )


def answer(peer: Peer) -> Outputs:
    """Call a peer once and return its named tensors."""
    with peer.context():
        return peer.outputs(peer.call())


def reset_compiler() -> None:
    """Forget compiled code, so that no case inherits another's guards or recompile count."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def describe(error: Exception) -> str:
    """Return an error as one line without paths."""
    return f"{type(error).__name__}: {without_paths(str(error))}"


def _attempt(rows: dict[str, PeerResult], name: str, action: Callable[[], T]) -> T | None:
    try:
        return action()
    except PeerMissing as error:
        rows[name] = PeerResult(name, "missing", str(error))
    except Exception as error:
        rows[name] = PeerResult(name, "failed", describe(error))
    return None


def _verified(rows: dict[str, PeerResult], peer: Peer, judge: Judge) -> Verdict | None:
    verdict = _attempt(rows, peer.name, partial(judge.verdict, peer))
    if verdict is not None and verdict.standing != "ok":
        rows[peer.name] = PeerResult(peer.name, verdict.standing, verdict.reason, note=peer.note)
        return None
    return verdict


def _timed(
    rows: dict[str, PeerResult], peers: Sequence[Peer], rounds: int, min_sample_s: float, clock: Clock
) -> dict[str, Timing]:
    try:
        return interleave(peers, rounds=rounds, min_sample_s=min_sample_s, clock=clock)
    except Exception as error:
        for peer in peers:
            rows[peer.name] = PeerResult(peer.name, "failed", f"while timing, {describe(error)}")
        return {}


def _with_memory(row: PeerResult, case: Case, peer: Peer, device: torch.device) -> PeerResult:
    try:
        return replace(row, peak_bytes=peak_bytes(case, peer, device))
    except Exception as error:
        return replace(row, reason=f"memory unknown, {describe(error)}")
