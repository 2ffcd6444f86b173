"""All cases under pytest-benchmark, a group for each: ``pytest benchmarks -k spatial_attention``."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.measure import Judge, reset_compiler
from benchmarks.registry import EXPORTED, PEERS, Case, PeerMissing, Workload, load_cases
from benchmarks.timing import settle


@pytest.fixture(scope="module", params=load_cases(), ids=lambda case: case.name)
def judged(request: pytest.FixtureRequest) -> tuple[Case, Workload, Judge]:
    """Give a case's workload and its judge, shared by the case's peers."""
    case: Case = request.param
    reset_compiler()
    workload = case.build(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    judge = Judge(case)
    judge.learn(workload)
    return case, workload, judge


@pytest.mark.parametrize("name", PEERS)
def test_case(judged: tuple[Case, Workload, Judge], name: str, benchmark: BenchmarkFixture) -> None:
    """Verify a peer, then time it."""
    case, workload, judge = judged
    benchmark.group = case.name
    try:
        peer = workload.build(name)
    except PeerMissing as missing:
        pytest.skip(str(missing))
    verdict = judge.verdict(peer)
    if verdict.standing == "inexact" and name in EXPORTED:
        pytest.xfail(f"rounds worse than its budget: {verdict.reason}")
    assert verdict.standing == "ok", verdict.reason

    def call() -> None:
        peer.call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    settle()
    with peer.context():
        benchmark(call)
