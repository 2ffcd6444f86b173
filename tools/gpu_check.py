"""Build, test and measure on a machine with a GPU: offline, in under nine minutes (`make gpu-check`).

A stage that fails or runs out of time is reported and the next one runs; without a device none does. Results
go to benchmarks/results/<gpu>/, a log and a summary to build/gpu-check/, and all of it to --out.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REPORT = ROOT / "build" / "gpu-check"
TOTAL_S = 520.0  # of the nine minutes: the rest is for starting and copying

DEVICE_CHECK = """
import sys
sys.path.insert(0, "tools")
import toolchain
try:
    import torch
except ImportError as error:
    sys.exit(f"no GPU check: this Python has no torch ({error}); choose another: make gpu-check PYTHON=...")
if not torch.cuda.is_available():
    sys.exit(f"no GPU check: torch {torch.__version__} sees no CUDA device")
if toolchain.nvcc() is None:
    sys.exit("no GPU check: nvcc is neither on PATH nor under CUDA_HOME")
major, minor = torch.cuda.get_device_capability()
name = torch.cuda.get_device_name()
print(f"{name}, sm_{major}{minor}, torch {torch.__version__}, CUDA {torch.version.cuda}")
"""


@dataclass(frozen=True)
class Stage:
    """A command, the seconds it may take, and whether the others need it."""

    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    essential: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: a word, its exit code (None: stopped), its time and its last line."""

    stage: Stage
    status: str
    code: int | None
    seconds: float
    last_line: str

    def __str__(self) -> str:
        """Give a line of the summary."""
        code = "-" if self.code is None else str(self.code)
        return (
            f"{self.stage.name:<18} {self.status:<10} exit {code:<4} {self.seconds:6.1f} s  {self.last_line}"
        )


def stages(venv: Path, base: str) -> list[Stage]:
    """List the stages in order."""
    python = str(venv / "bin" / "python")
    setup = [base, "tools/setup_env.py", "gpu", "--venv", str(venv)]
    build = {"FUSEDNN_NATIVE": "1", "FUSEDNN_CUDA": "1", "FUSEDNN_CUDA_ARCHS": "native"}
    measure = [python, "-m", "benchmarks.run", "--device", "cuda", "--json", ""]
    return [
        Stage("device", [base, "-c", DEVICE_CHECK], 60, essential=True),
        Stage("environment", setup, 60, essential=True),
        Stage("build", [*setup, "--build"], 180, build, essential=True),
        Stage("device tests", [python, "-m", "pytest", "-m", "gpu"], 150),
        Stage("quick benchmarks", [*measure, "--quick", "--no-compile"], 60),
        Stage("benchmarks", measure, 200),  # these replace the quick ones
    ]


def run(stage: Stage, limit_s: float, log: IO[str]) -> Outcome:
    """Run a stage with its output shown and logged; at the limit, stop it and all that it started."""
    print(f"\n== {stage.name} (at most {limit_s:.0f} s)", flush=True)
    log.write(f"== {stage.name}\n")
    lines: list[str] = []

    def pass_on(output: IO[str]) -> None:
        for line in output:
            sys.stdout.write(line)
            sys.stdout.flush()
            log.write(line)
            if line.strip():
                lines[:] = [line.strip()]

    started = time.monotonic()
    environment = {**os.environ, "OFFLINE": "1", "PYTHONUNBUFFERED": "1", **stage.environment}
    child = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = threading.Thread(target=pass_on, args=(child.stdout,), daemon=True)
    reader.start()
    try:
        code: int | None = child.wait(timeout=max(limit_s, 0.1))
        status = "passed" if code == 0 else "FAILED"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        code, status = None, "TIMED OUT"
    reader.join(timeout=5)
    return Outcome(stage, status, code, time.monotonic() - started, (lines or [""])[0][:160])


def run_all(planned: list[Stage], log: IO[str], total_s: float = TOTAL_S) -> list[Outcome]:
    """Run the stages within the time for all of them; what comes after a failed essential one is left out."""
    end = time.monotonic() + total_s
    outcomes: list[Outcome] = []
    broken: str | None = None
    for stage in planned:
        left = end - time.monotonic()
        if broken or left < 1:
            why = f"{broken} failed" if broken else "no time was left"
            outcomes.append(Outcome(stage, "NOT RUN", None, 0.0, why))
            continue
        outcomes.append(run(stage, min(stage.limit_s, left), log))
        if stage.essential and outcomes[-1].status != "passed":
            broken = stage.name
    return outcomes


def collect(outcomes: list[Outcome], since: float, out: Path | None) -> None:
    """Write the summary and copy it, the log and the results of this run to `out`."""
    summary = "\n".join(map(str, outcomes))
    print(f"\nsummary\n{summary}", flush=True)
    (REPORT / "summary.txt").write_text(summary + "\n")
    written = [p for p in sorted(RESULTS.rglob("*.json")) if p.stat().st_mtime >= since]
    for path in written:
        print(f"wrote {path.relative_to(ROOT)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for path in [*written, REPORT / "summary.txt", REPORT / "log.txt"]:
            shutil.copyfile(path, out / path.name)


def main(argv: list[str] | None = None) -> int:
    """Run the stages; 0 if every one passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--out", type=Path, help="a folder to copy the results to")
    parser.add_argument("--dry-run", action="store_true", help="print the stages and stop")
    args = parser.parse_args(argv)
    planned = stages(args.venv.absolute(), sys.executable)
    if args.dry_run:
        for stage in planned:
            variables = "".join(f"{name}={value} " for name, value in stage.environment.items())
            shown = ["<check>" if part is DEVICE_CHECK else part for part in stage.command]
            print(f"{stage.name}: at most {stage.limit_s:.0f} s: OFFLINE=1 {variables}{shlex.join(shown)}")
        return 0
    REPORT.mkdir(parents=True, exist_ok=True)
    since = time.time() - 1
    with (REPORT / "log.txt").open("w") as log:
        outcomes = run_all(planned, log)
    collect(outcomes, since, args.out)
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
