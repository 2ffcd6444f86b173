"""A progress bar with tqdm where it is installed and there is a terminal; plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys


class Progress:
    """Counts the cases of a run; results go to stdout, progress to stderr."""

    def __init__(self, total: int) -> None:
        self._bar = None
        if sys.stderr.isatty():
            with contextlib.suppress(ModuleNotFoundError):
                from tqdm import tqdm

                self._bar = tqdm(total=total, file=sys.stderr, unit="case", leave=False, dynamic_ncols=True)
        self._total = total
        self._done = 0

    def start(self, name: str) -> None:
        """Show which case begins."""
        if self._bar is not None:
            self._bar.set_description(name)
        else:
            print(f"[{self._done + 1}/{self._total}] {name}", file=sys.stderr, flush=True)

    def finish(self, lines: list[str]) -> None:
        """Print a case's lines and count it."""
        self._done += 1
        text = "\n".join(lines)
        if self._bar is not None:
            self._bar.clear()
            print(text, flush=True)
            self._bar.update()
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
