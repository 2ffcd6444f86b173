"""Run the tests on all cores: those of a plain Python, then those that Triton's interpreter runs.

    python tools/run_tests.py [--all] [options and paths for pytest]

Triton is interpreted or not by what TRITON_INTERPRET says when it is imported, hence two calls of pytest, the
second also after a failure of the first. Each has as many workers (pytest-xdist) as there are cores, eight at
most. Exit code 1 if a call failed, found no test or could not run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_WORKERS = 8
INTERRUPTED, NO_TESTS = 2, 5  # of pytest's exit codes
CALLS: dict[str, dict[str, str]] = {"plain": {}, "interpreter": {"TRITON_INTERPRET": "1"}}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers() -> list[str]:
    """Return pytest's options for one process a core."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(cores(), MOST_WORKERS)), "--dist", "worksteal"]


def environment(added: dict[str, str]) -> dict[str, str]:
    """Return that of a call. Each worker has two threads at least: with one, kernels don't share work."""
    threads = max(2, cores() // MOST_WORKERS)
    return {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads), **os.environ, **added}


def call(name: str, arguments: list[str]) -> tuple[int, str]:
    """Run pytest with its output passed on; return the exit code and the last line."""
    started, last = time.monotonic(), ""
    command = [sys.executable, "-u", "-m", "pytest", *workers(), *arguments]
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment(CALLS[name]), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert child.stdout is not None
    with child:
        try:
            for line in child.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
            code = child.wait()
        except KeyboardInterrupt:  # which pytest got too: it says what it has found
            print(child.stdout.read(), end="", flush=True)
            code = INTERRUPTED
    return code, f"{last} [{time.monotonic() - started:.0f} s]"


def absent(name: str) -> str | None:
    """Return why a call can't run here, or None."""
    needs_triton = "TRITON_INTERPRET" in CALLS[name]
    return "triton is not installed" if needs_triton and importlib.util.find_spec("triton") is None else None


def main(arguments: list[str]) -> int:
    """Run both calls; 0 if all passed."""
    chosen = any(
        a != "--all" for a in arguments
    )  # paths or -k may well leave one of the calls without a test
    summary, status = [], 0
    for name in CALLS:
        reason = absent(name)
        if reason is not None:
            failed, said = sys.platform == "linux", f"not run: {reason}"  # Linux has wheels of it
        else:
            print(f"{name}: pytest {' '.join(arguments)}", flush=True)
            code, said = call(name, arguments)
            failed = code != 0 and not (code == NO_TESTS and chosen)
            if code == INTERRUPTED:
                return 130
        summary.append(f"  {'FAILED' if failed else 'passed'}  {name}: {said}")
        status |= failed
    print("\nsummary", *summary, sep="\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
