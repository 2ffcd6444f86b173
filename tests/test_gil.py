"""Another Python thread makes progress while a kernel runs: for every op that has one in C++."""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import places, registry

# A kernel runs for so long that a busy machine's pauses of the other thread are short beside it.
LEAST_SECONDS = 0.08
TRIES = 5
# What has no batch: parameters and their statistics.
OF_THE_MODEL = re.compile(
    r"(?!grad_).*(weight|bias|norm|temperature|slopes|seqlens|seed|extra|mean\d|rstd\d)|v$"
)


class Ticks(threading.Thread):
    """Notes the time, every millisecond if it can."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.times: list[float] = []
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(0.001):
            self.times.append(time.perf_counter())

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def longest_pause(call: Callable[[], Any]) -> float:
    """Return for which share of a call's time the other thread stood still at a stretch."""
    ticks = Ticks()
    ticks.start()
    time.sleep(0.02)
    start = time.perf_counter()
    call()
    end = time.perf_counter()
    ticks.stop()
    marks = [start, *(t for t in ticks.times if start < t < end), end]
    return max(b - a for a, b in itertools.pairwise(marks)) / (end - start)


def lets_others_run(call: Callable[[], Any]) -> bool:
    """Whether, in one of a few tries, no pause was half as long as the call."""
    return any(longest_pause(call) < 0.5 for _ in range(TRIES))


def sample(name: str) -> tuple[Any, ...]:
    """Return the arguments of the sample call that has the most to compute."""
    cases = [
        tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        for args in registry.cases_of(name).values()
    ]

    def size(args: tuple[Any, ...]) -> tuple[int, int]:
        wanted = args[-1] if isinstance(args[-1], (list, tuple)) else ()
        return sum(map(bool, wanted)), sum(a.numel() for a in args if isinstance(a, Tensor))

    return max(cases, key=size)


def repeated(name: str, args: tuple[Any, ...], times: int) -> tuple[Any, ...]:
    """Return a call of so many times the samples."""
    named = list(zip(registry.arguments_of(name), args, strict=False))
    samples = {n: a for n, a in named if isinstance(a, Tensor) and a.dim() and not OF_THE_MODEL.match(n)}
    batch = max(a.shape[0] for a in samples.values())
    return tuple(
        a.repeat(times, *[1] * (a.dim() - 1)) if n in samples and a.shape[0] == batch else a for n, a in named
    )


def long_call(name: str) -> Callable[[], Any]:
    """Return a call of the op, on the backend in force, that takes long enough."""
    op, args, times = getattr(torch.ops.fusednn, name), sample(name), 1
    while times < 1 << 24:
        call = functools.partial(op, *repeated(name, args, times))
        call()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        if seconds > LEAST_SECONDS:
            return call
        times *= 2 if seconds > LEAST_SECONDS / 4 else 4
    raise AssertionError(f"{name}: no call took {LEAST_SECONDS} s")


@pytest.fixture
def one_thread():
    """Leave a core to the other thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_there_are_kernels():
    if places.REQUIRE_ALL:
        assert len(registry.kernels()) >= 24


@pytest.mark.parametrize(
    ("where", "name"), [pytest.param(p, op, id=f"{p.name}-{op}") for p, op in registry.kernels()]
)
def test_another_thread_makes_progress(one_thread, where, name):
    with places.running_on(where), torch.no_grad():
        assert lets_others_run(long_call(name)), f"{name} on {where.name} holds Python's lock while it runs"


def test_a_call_that_holds_the_lock_is_found():
    """Planted: the same call of C, with Python's lock and without."""
    microseconds = int(LEAST_SECONDS * 1e6)
    assert not lets_others_run(lambda: ctypes.PyDLL(None).usleep(microseconds))
    assert lets_others_run(lambda: ctypes.CDLL(None).usleep(microseconds))
