"""Interleaved timing: peers take turns (A B C A B C), so a disturbance of the machine meets them all."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .registry import Peer

Call = Callable[[], object]
Clock = Callable[[int, Call], float]


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the rounds; a sample is `calls` calls in a row."""

    median_s: float
    p20_s: float
    p80_s: float
    min_s: float
    calls: int
    rounds: int


def wall_clock(calls: int, call: Call) -> float:
    """Return the seconds that `calls` calls take."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def cuda_clock(calls: int, call: Call) -> float:
    """Return the seconds between two events around `calls` calls on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return cuda_clock if device.type == "cuda" else wall_clock


def settle(limit_s: float = 0.25) -> None:
    """Wait until no thread of this process burns time.

    Idle worker threads spin for a while before they sleep (ONNX Runtime's for some 50 ms, OpenMP's for some
    5): they would take a core from the peer whose turn is next.
    """
    deadline = time.perf_counter() + limit_s
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(2e-3)
        if time.process_time() - before < 0.3e-3:
            return


def percentile(values: Sequence[float], share: float) -> float:
    """Return the linearly interpolated percentile; `share` is in [0, 1]."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def calls_per_sample(peer: Peer, clock: Clock, min_sample_s: float) -> int:
    """Return how many calls last about `min_sample_s`; warms the peer up on the way."""
    calls = 1
    while True:
        elapsed = clock(calls, peer.call)
        if elapsed >= min_sample_s / 4:
            return max(1, math.ceil(calls * min_sample_s / elapsed))
        calls *= 4


def interleave(
    peers: Sequence[Peer],
    *,
    rounds: int,
    min_sample_s: float,
    clock: Clock,
    settle: Callable[[], None] = settle,
) -> dict[str, Timing]:
    """Time every peer once a round, for `rounds` rounds, and return each one's timing by name."""
    calls = {}
    for peer in peers:
        settle()
        with peer.context():
            calls[peer.name] = calls_per_sample(peer, clock, min_sample_s)
    samples: dict[str, list[float]] = {peer.name: [] for peer in peers}
    with _no_garbage_collection():
        for _ in range(rounds):
            for peer in peers:
                settle()
                samples[peer.name].append(_sample(peer, calls[peer.name], clock))
    return {name: _timing(values, calls[name]) for name, values in samples.items()}


def _sample(peer: Peer, calls: int, clock: Clock) -> float:
    with peer.context():
        # Untimed: brings this peer's data back to the caches, and wakes its threads.
        clock(max(1, calls // 4), peer.call)
        return clock(calls, peer.call) / calls


def _timing(samples: Sequence[float], calls: int) -> Timing:
    return Timing(
        median_s=statistics.median(samples),
        p20_s=percentile(samples, 0.2),
        p80_s=percentile(samples, 0.8),
        min_s=min(samples),
        calls=calls,
        rounds=len(samples),
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
