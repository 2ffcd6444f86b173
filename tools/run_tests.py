"""Run the tests in five pytest processes, as many at a time as there are cores for them.

    python tools/run_tests.py [options and paths for pytest]

house: builds, tools, dispatch. attention: the largest family of layers. families: the others. emulated: those
of the layers' tests that run CUDA kernels in the emulator. interpreter: those that Triton's interpreter runs,
which needs a process of its own.
The output of each is shown when it ends, and one summary at the end; exit code 1 if a process failed, found
no test, or could not run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS = 5  # pytest's exit code
REPORT_SECONDS = 20.0
# Threads of one process that wait for each other must not keep the cores from the other processes.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}


@dataclass(frozen=True)
class Process:
    """One pytest process: its tests and what its environment adds."""

    name: str
    marker: str
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None


# The longest first.
PROCESSES = (
    Process("house", "not interpreter and not family"),
    Process("interpreter", "interpreter", {"TRITON_INTERPRET": "1"}, needs="triton"),
    Process("attention", "not interpreter and not emulated and attention"),
    Process("families", "not interpreter and not emulated and family and not attention"),
    Process("emulated", "not interpreter and emulated and family"),
)


@dataclass(frozen=True)
class Outcome:
    """How one process ended."""

    name: str
    passed: bool
    text: str


class Running:
    """A process that was started; its output goes to a file."""

    def __init__(self, process: Process, arguments: list[str]) -> None:
        self.process = process
        self._arguments = arguments
        self._started = time.monotonic()
        self._log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  it outlives this
        self._child = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-m", process.marker, *arguments],
            cwd=ROOT,
            env={**ENVIRONMENT, **os.environ, **process.environment},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def output(self) -> str:
        """Return what it has said so far."""
        self._log.seek(0)
        return self._log.read()

    def progress(self) -> str:
        """Return its name and the share of its tests that have run."""
        shares = re.findall(r"\[ *(\d+)%\]", self.output())
        return f"{self.process.name} {shares[-1] if shares else 0}%"

    def outcome(self) -> Outcome | None:
        """Return how it ended, its last line for the summary; None while it runs."""
        code = self._child.poll()
        if code is None:
            return None
        lines = [line.strip() for line in self.output().splitlines() if line.strip()]
        # A choice of paths or of -k may well leave one of the processes without a test.
        passed = code == 0 or (code == NO_TESTS and bool(self._arguments))
        last = lines[-1] if lines else f"exit code {code}"
        return Outcome(self.process.name, passed, f"{last} [{time.monotonic() - self._started:.0f} s]")

    def stop(self) -> None:
        """End it if it still runs."""
        if self._child.poll() is None:
            self._child.terminate()
            self._child.wait()


def absent(process: Process) -> Outcome | None:
    """Return how a process ends that can't be started here, or None."""
    if process.needs is None or importlib.util.find_spec(process.needs) is not None:
        return None
    has_wheels = sys.platform == "linux"
    return Outcome(process.name, not has_wheels, f"not run: {process.needs} is not installed")


def run(processes: list[Process], arguments: list[str], at_once: int) -> list[Outcome]:
    """Run the processes, also after a failure, and show the output of each when it ends."""
    waiting = list(processes)
    running: list[Running] = []
    outcomes: list[Outcome] = []
    started = said = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(Running(waiting.pop(0), arguments))
            time.sleep(0.1)
            for one in list(running):
                outcome = one.outcome()
                if outcome is not None:
                    running.remove(one)
                    outcomes.append(outcome)
                    print(f"\n{one.process.name}: pytest -m '{one.process.marker}'")
                    print(one.output(), end="", flush=True)
            now = time.monotonic()
            if running and now - said >= REPORT_SECONDS:
                said = now
                print(f"[{now - started:4.0f} s] {', '.join(one.progress() for one in running)}", flush=True)
    finally:
        for one in running:
            one.stop()
    return outcomes


def main(arguments: list[str]) -> int:
    """Run every process; 0 if all passed."""
    outcomes = [outcome for outcome in map(absent, PROCESSES) if outcome is not None]
    gone = {outcome.name for outcome in outcomes}
    present = [process for process in PROCESSES if process.name not in gone]
    print(f"pytest in {len(present)} processes: {', '.join(process.name for process in present)}", flush=True)
    outcomes += run(present, arguments, at_once=max(1, min(len(present), os.cpu_count() or 1)))
    print("\nsummary")
    for outcome in outcomes:
        print(f"  {'passed' if outcome.passed else 'FAILED'}  {outcome.name}: {outcome.text}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
