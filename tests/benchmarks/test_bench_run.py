"""The command: it refuses wrong peers, names missing ones, and its exit code says so."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import double, doubling_case

from benchmarks.measure import Judge
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
    assert re.search(r"fusednn +\d+\.\d+x", line_of(text, "eager"))


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
    assert re.search(r"fusednn +0\.\d+x slower", line_of(text, "eager"))
    assert re.search(r"against eager +0\.", text)
    assert "(0 faster, 1 slower, 0 unclear)" in text


def test_list_runs_nothing(capsys):
    assert main(["--list", "--case", "lstm", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4
    assert all(line.startswith("lstm_cell") for line in lines[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case", "nothing is called this"], "no case matches"),
        (["--peers", "eager,magic"], "got magic, expected some of eager, compile"),
    ],
)
def test_bad_options_say_what_to_do(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
