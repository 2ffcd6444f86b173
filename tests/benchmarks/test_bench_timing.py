"""Turns, samples and statistics, with a clock that the test controls."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from benchmarks import ceilings
from benchmarks.registry import Peer
from benchmarks.timing import calls_per_sample, interleave, percentile, wall_clock


def peer(name: str, **kwargs) -> Peer:
    return Peer(name, lambda: name, lambda result: {}, **kwargs)


def no_settle() -> None:
    pass


def test_peers_take_turns():
    log = []

    def clock(calls, call):
        log.append(call())
        return calls * 1e-2

    timings = interleave(
        [peer("A"), peer("B"), peer("C")], rounds=3, min_sample_s=1e-3, clock=clock, settle=no_settle
    )
    # One call each to calibrate, then in each round an untimed and a timed sample of every peer.
    assert log == list("ABC") + list("AABBCC") * 3
    assert all(t.rounds == 3 and t.median_s == pytest.approx(1e-2) for t in timings.values())


def test_other_threads_are_given_time_to_stop_before_every_sample():
    log = []
    clock = lambda calls, call: log.append(call()) or 1.0  # noqa: E731
    interleave(
        [peer("A"), peer("B")], rounds=1, min_sample_s=1e-3, clock=clock, settle=lambda: log.append("settle")
    )
    assert log == ["settle", "A", "settle", "B", "settle", "A", "A", "settle", "B", "B"]


def test_statistics_are_of_the_timed_samples_alone():
    timed = iter([5.0, 1.0, 3.0])
    count = 0

    def clock(calls, call):
        nonlocal count
        count += 1
        return next(timed) if count > 1 and count % 2 else 100.0

    timing = interleave([peer("A")], rounds=3, min_sample_s=1e-3, clock=clock, settle=no_settle)["A"]
    assert (timing.min_s, timing.median_s, timing.calls) == (1.0, 3.0, 1)
    assert (timing.p20_s, timing.p80_s) == pytest.approx((1.8, 4.2))


def test_percentile_interpolates():
    assert percentile([4, 1, 2, 3], 0.5) == 2.5
    assert percentile([7], 0.2) == 7
    assert percentile([0, 10], 0.8) == 8


def test_tiny_calls_are_batched_to_fill_a_sample():
    assert calls_per_sample(peer("A"), lambda calls, call: calls * 1e-6, 5e-3) == 5000
    assert calls_per_sample(peer("A"), lambda calls, call: calls * 0.1, 5e-3) == 1


def test_context_surrounds_the_calls_and_garbage_collection_is_off():
    seen = []
    depth = 0

    @contextlib.contextmanager
    def context():
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    def clock(calls, call):
        seen.append((depth, gc.isenabled()))
        return 1.0

    interleave([peer("A", context=context)], rounds=2, min_sample_s=1e-3, clock=clock, settle=no_settle)
    assert seen[0][0] == 1
    assert seen[1:] == [(1, False)] * 4
    assert depth == 0
    assert gc.isenabled()


def test_wall_clock_calls_as_often_as_told():
    log = []
    assert wall_clock(3, lambda: log.append(1)) > 0
    assert len(log) == 3


def test_ceilings_count_bytes_both_ways_and_flops_of_a_product(monkeypatch):
    monkeypatch.setattr(ceilings, "clock_for", lambda device: lambda calls, call: 0.5)
    found = ceilings.measure_ceilings(torch.device("cpu"), repeats=0)
    assert found.bandwidth == 2 * 2**28 / 0.5
    assert found.peak == 2 * 2048**3 / 0.5


def test_limit_is_the_slower_of_the_two_roofs():
    roof = ceilings.Ceilings(bandwidth=10.0, peak=100.0, dtype="float32")
    assert roof.limit_s(flops=200, traffic=10) == 2.0
    assert roof.limit_s(flops=200, traffic=50) == 5.0
    assert roof.best(ceilings.Ceilings(20.0, 50.0, "float32")) == ceilings.Ceilings(20.0, 100.0, "float32")
