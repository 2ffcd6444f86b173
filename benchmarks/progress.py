"""Where a run stands, on stderr; its results go to stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Progress:
    """Counts the cases of a run, and estimates the time left from those that are done."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._done = 0
        self._clock = clock
        self._started = clock()

    def start(self, name: str) -> None:
        """Say which case begins, and about how long all that are left will take."""
        left = "time left: known after the first case"
        if self._done:
            seconds = (self._clock() - self._started) / self._done * (self._total - self._done)
            left = f"about {_span(seconds)} left"
        print(f"[{self._done + 1}/{self._total}, {left}] {name}", file=sys.stderr, flush=True)

    def finish(self, lines: list[str]) -> None:
        """Print a case's lines and count it."""
        self._done += 1
        print("\n".join(lines), flush=True)


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
