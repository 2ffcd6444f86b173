"""The command: it refuses wrong peers, names missing ones, and its exit code says so."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import double, doubling_case

import fusednn
from benchmarks import progress
from benchmarks.measure import Judge
from benchmarks.report import machine_line
from benchmarks.results import Document
from benchmarks.run import main

TIME = re.compile(r"\d (?:s|ms|µs|ns)\b")


def line_of(text: str, peer: str) -> str:
    (line,) = [line for line in text.splitlines() if re.match(rf"  {peer}(?:  |: )", line)]
    return line


def test_right_peers_are_timed_and_compared(run_bench):
    code, text, path = run_bench([doubling_case(reference=double)])
    assert code == 0
    case = Document.from_json(path.read_text()).cases[0]
    assert [p.name for p in case.peers if p.timing] == ["eager", "reference", "fusednn"]
    assert all(p.error == 0 and p.budget > 0 for p in case.peers if p.timing)
    assert TIME.search(line_of(text, "fusednn"))
    assert re.search(r"fusednn (is \d+\.\d+x as fast|takes \d+\.\d+x as long)", line_of(text, "eager"))


def planted_bug(x):
    return 2 * x + 1e-2


def planted_nan(x):
    return 2 * x / (x != x[0])


def inexact(x):
    return 2 * x * (1 + 1e-5)


def turns_wrong_after(calls: int):
    count = 0

    def call(x):
        nonlocal count
        count += 1
        return 2 * x if count <= calls else 3 * x

    return call


@pytest.mark.costly
@pytest.mark.in_turn
@pytest.mark.parametrize("peer", ["fusednn", "reference", "compile", "onnxruntime"])
@pytest.mark.parametrize("bug", [planted_bug, planted_nan])
def test_a_wrong_peer_gets_no_time_and_fails_the_run(run_bench, peer, bug):
    code, text, path = run_bench([doubling_case(**{peer: bug})])
    assert code == 1
    row = Document.from_json(path.read_text()).cases[0].peer(peer)
    assert (row.status, row.timing) == ("wrong", None)
    line = line_of(text, peer)
    assert "WRONG" in line
    assert not TIME.search(line)
    assert TIME.search(line_of(text, "eager"))


def test_a_peer_that_is_wrong_only_later_gets_no_time_either(run_bench):
    code, text, path = run_bench([doubling_case(fusednn=turns_wrong_after(3))])
    assert code == 1
    row = Document.from_json(path.read_text()).cases[0].peer("fusednn")
    assert (row.status, row.timing) == ("wrong", None)
    assert not TIME.search(line_of(text, "fusednn"))


def test_a_judgement_is_of_two_calls():
    case = doubling_case(fusednn=turns_wrong_after(1))
    workload = case.build(case, torch.device("cpu"))
    judge = Judge(case)
    judge.learn(workload)
    assert judge.verdict(workload.build("fusednn")).standing == "wrong"


@pytest.mark.parametrize(("peer", "code"), [("fusednn", 1), ("reference", 1), ("openvino", 0)])
def test_an_inexact_peer_gets_no_time(run_bench, peer, code):
    got, text, path = run_bench([doubling_case(**{peer: inexact})])
    assert got == code
    row = Document.from_json(path.read_text()).cases[0].peer(peer)
    assert (row.status, row.timing) == ("inexact", None)
    assert "INEXACT, y is off by" in line_of(text, peer)


def test_missing_and_left_out_peers_are_listed_with_their_reason(run_bench):
    code, text, path = run_bench([doubling_case()], "--no-compile")
    assert code == 0
    rows = Document.from_json(path.read_text()).cases[0]
    assert rows.peer("openvino").reason == "openvino is not installed"
    assert (rows.peer("openvino").status, rows.peer("compile").status) == ("missing", "skipped")
    assert "onnxruntime: not run, onnxruntime is not installed" in text
    assert "compile: not run, left out by an option" in text


def explode(x):
    raise RuntimeError("no kernel in /home/someone/cache/file.so, sorry\nmore")


@pytest.mark.parametrize(("peer", "code"), [("fusednn", 1), ("compile", 0)])
def test_a_peer_that_raises_is_listed_without_paths(run_bench, peer, code):
    got, text, path = run_bench([doubling_case(**{peer: explode})])
    assert got == code
    row = Document.from_json(path.read_text()).cases[0].peer(peer)
    assert row.status == "failed"
    assert row.reason == "RuntimeError: no kernel in file.so, sorry"
    assert "FAILED" in line_of(text, peer)


def test_without_a_right_eager_nothing_is_judged(run_bench):
    code, text, path = run_bench([doubling_case(eager=planted_bug)])
    assert code == 1
    assert not any(p.timing for p in Document.from_json(path.read_text()).cases[0].peers)
    assert "FAILED" in line_of(text, "eager")


def test_losing_is_printed_like_winning(run_bench):
    import time

    def slow(x):
        time.sleep(2e-3)
        return 2 * x

    _, text, _ = run_bench([doubling_case(fusednn=slow)])
    assert re.search(r"fusednn takes [1-9]\d*\.\d\dx as long", line_of(text, "eager"))
    assert re.search(r"against eager +0\.", text)
    assert "(0 faster, 1 slower, 0 unclear)" in text


def test_list_runs_nothing(capsys):
    assert main(["--list", "--case", "lstm_cell", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4
    assert all(line.startswith("lstm_cell") for line in lines[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "nothing is called this"], "no case matches"),
        (["--threads", "0"], "--threads: got 0, expected a number from 1 on"),
        (["--rounds", "-1"], "expected"),
        (["--peers", "eager,magic"], "got magic, expected some of eager, compile"),
    ],
)
def test_bad_options_say_what_to_do(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_measured_and_says_so(tmp_path):
    """A real SIGINT, sent when the first case is printed."""
    path = tmp_path / "out.json"
    options = [
        "--device",
        "cpu",
        "--family",
        "rnn",
        "--no-compile",
        "--rounds",
        "2",
        "--min-sample-ms",
        "0.1",
    ]
    child = subprocess.Popen(
        [sys.executable, "-m", "fusednn", "bench", *options, "--json", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(fusednn.__file__).parents[1])},
        # Whoever runs the tests in the background may have it ignored, which a child inherits.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    printed = []
    for line in child.stdout:
        printed.append(line)
        if "against the best of eager and compile" in line:
            child.send_signal(signal.SIGINT)
            break
    rest, errors = child.communicate(timeout=300)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    document = Document.from_json(path.read_text())
    assert document.settings["interrupted"]
    assert "Interrupted before all cases ran" in machine_line(document)
    assert 1 <= len(document.cases) < 20
    assert document.cases[0].name in "".join(printed)
    assert f"interrupted: {len(document.cases)} of 20 cases are measured" in rest
    assert "speed-up, geometric mean" in rest
    assert f"wrote {path}" in rest


def test_ctrl_c_before_the_first_case_writes_nothing(run_bench):
    def interrupt(x):
        raise KeyboardInterrupt

    code, text, path = run_bench([doubling_case(eager=interrupt)])
    assert code == 130
    assert "interrupted: 0 of 1 cases are measured" in text
    assert not path.exists()


def test_a_run_that_ends_is_not_marked_as_interrupted(run_bench):
    _, _, path = run_bench([doubling_case()])
    document = Document.from_json(path.read_text())
    assert not document.settings["interrupted"]
    assert "Interrupted" not in machine_line(document)


def test_the_time_left_is_shown(capsys):
    seconds = iter([0.0, 30.0, 90.0])
    bar = progress.Progress(4, clock=lambda: next(seconds))
    for name in ("a", "b", "c"):
        bar.start(name)
        bar.finish([name])
    assert capsys.readouterr().err.splitlines() == [
        "[1/4, time left: known after the first case] a",
        "[2/4, about 1 min 30 s left] b",
        "[3/4, about 1 min 30 s left] c",
    ]
