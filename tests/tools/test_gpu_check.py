"""`make gpu-check` without a GPU: its plan, and how it goes on after a stage that fails or hangs."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import Stage


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_plan_fits_into_nine_minutes_and_names_every_stage(capsys):
    assert gpu_check.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    for stage in gpu_check.stages(Path("venv"), "python3"):
        assert f"{stage.name}: at most {stage.limit_s:.0f} s: OFFLINE=1 " in said
    assert "FUSEDNN_CUDA=1 FUSEDNN_CUDA_ARCHS=native" in said
    assert gpu_check.TOTAL_S < 540


def test_goes_on_after_a_failure_and_a_timeout(tmp_path):
    left_behind = tmp_path / "left_behind"
    log = io.StringIO()
    started = time.monotonic()
    outcomes = gpu_check.run_all(
        [
            Stage("fails", python("print('a reason'); raise SystemExit(3)"), 60),
            Stage("hangs", ["sh", "-c", f"(sleep 4; touch {left_behind}) & sleep 300"], 1),
            Stage(
                "works", python("import os; print(os.environ['OFFLINE'], os.environ['X'])"), 60, {"X": "y"}
            ),
        ],
        log,
    )
    assert [(o.status, o.code) for o in outcomes] == [("FAILED", 3), ("TIMED OUT", None), ("passed", 0)]
    assert outcomes[0].last_line == "a reason"
    assert outcomes[2].last_line == "1 y"
    assert "a reason" in log.getvalue()
    assert time.monotonic() - started < 60
    time.sleep(5)
    assert not left_behind.exists(), "a process of the stage that ran out of time went on"


def test_stops_after_an_essential_stage():
    outcomes = gpu_check.run_all(
        [Stage("device", python("raise SystemExit(1)"), 60, essential=True), Stage("next", python(""), 60)],
        io.StringIO(),
    )
    assert [o.status for o in outcomes] == ["FAILED", "NOT RUN"]
    assert "device failed" in str(outcomes[1])


def test_total_time_cuts_a_stage_short():
    stages = [Stage("long", python("import time; time.sleep(60)"), 60), Stage("late", python(""), 60)]
    outcomes = gpu_check.run_all(stages, io.StringIO(), total_s=2)
    assert [o.status for o in outcomes] == ["TIMED OUT", "NOT RUN"]


def test_results_of_this_run_are_copied(tmp_path, monkeypatch):
    results, report, out = tmp_path / "benchmarks/results", tmp_path / "report", tmp_path / "out"
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "RESULTS", results)
    monkeypatch.setattr(gpu_check, "REPORT", report)
    (results / "gpu").mkdir(parents=True)
    report.mkdir()
    (report / "log.txt").write_text("log")
    (results / "gpu/old.json").write_text("{}")
    since = time.time() + 5
    new = results / "gpu/new.json"
    new.write_text("{}")
    gpu_check.os.utime(new, (since + 1, since + 1))
    stage = Stage("works", [], 1)
    gpu_check.collect([gpu_check.Outcome(stage, "passed", 0, 1.0, "fine")], since, out)
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "new.json", "summary.txt"]
    assert "works" in (out / "summary.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_says_at_once_that_there_is_no_gpu():
    done = subprocess.run(python(gpu_check.DEVICE_CHECK), cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "sees no CUDA device" in done.stderr
