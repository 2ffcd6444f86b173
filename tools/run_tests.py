"""Run the tests: everything, then those of Triton's interpreter, which needs a process of its own.

    python tools/run_tests.py [options and paths for pytest]

Prints one summary at the end; exit code 1 if a process failed, found no test, or could not run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_TESTS = 5  # pytest's exit code


@dataclass(frozen=True)
class Process:
    """One pytest process: its tests and what its environment adds."""

    name: str
    marker: str
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None


PROCESSES = (
    Process("main", "not interpreter"),
    Process("interpreter", "interpreter", {"TRITON_INTERPRET": "1"}, needs="triton"),
)


@dataclass(frozen=True)
class Outcome:
    """How one process ended."""

    name: str
    passed: bool
    text: str


def run(process: Process, arguments: list[str]) -> Outcome:
    """Run one process, its output going through; the last line of pytest's is kept for the summary."""
    if process.needs and importlib.util.find_spec(process.needs) is None:
        has_wheels = sys.platform == "linux"
        return Outcome(process.name, not has_wheels, f"not run: {process.needs} is not installed")
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", process.marker, *arguments]
    print(f"{process.name}: pytest -m '{process.marker}'", flush=True)
    last = ""
    environment = {**os.environ, **process.environment}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    code = child.returncode
    # A choice of paths or of -k may well leave one of the processes without a test.
    passed = code == 0 or (code == NO_TESTS and bool(arguments))
    return Outcome(
        process.name, passed, f"{last or f'exit code {code}'} [{time.monotonic() - started:.0f} s]"
    )


def main(arguments: list[str]) -> int:
    """Run every process, also after a failure; 0 if all passed."""
    outcomes = [run(process, arguments) for process in PROCESSES]
    print("\nsummary")
    for outcome in outcomes:
        print(f"  {'passed' if outcome.passed else 'FAILED'}  {outcome.name}: {outcome.text}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
