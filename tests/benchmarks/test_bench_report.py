"""The report: tables with wins and losses, and charts that are drawn."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import doubling_case

from benchmarks.ceilings import Ceilings
from benchmarks.machine import describe_machine
from benchmarks.report import main, markdown, readme
from benchmarks.results import CaseResult, Document, PeerResult
from benchmarks.summary import BEST_TORCH, best_torch, compare, means, seconds, speedup


def row(name: str, ms: float, spread: float = 0.02) -> PeerResult:
    from benchmarks.timing import Timing

    s = ms * 1e-3
    timing = Timing(s, s * (1 - spread), s * (1 + spread), s * (1 - spread), calls=1, rounds=9)
    return PeerResult(name, "ok", "", 1e-8, 1e-7, timing)


@pytest.fixture
def document() -> Document:
    wrong = PeerResult("openvino", "wrong", "y is off by 1.0e-02, allowed 1.0e-07")
    cases = [
        CaseResult.of(
            doubling_case("double-n7-inference"),
            [row("eager", 4), row("compile", 2), row("fusednn", 1), wrong],
        ),
        CaseResult.of(
            doubling_case("double-n9-inference"), [row("eager", 1), row("compile", 3), row("fusednn", 2)]
        ),
        CaseResult.of(
            doubling_case("double-n7-training", "training"), [row("eager", 1.02), row("fusednn", 1)]
        ),
    ]
    machine = describe_machine(torch.device("cpu"))
    return Document(machine, {"rounds": 9}, [Ceilings(1e10, 1e11, "float32")], cases)


def test_speedups_and_verdicts(document):
    won, lost, even = document.cases
    assert speedup(won, "eager") == pytest.approx(4)
    assert speedup(lost, "eager") == pytest.approx(0.5)
    assert speedup(won, "openvino") is None
    assert best_torch(won).name == "compile"
    assert best_torch(lost).name == "eager"
    assert speedup(won, BEST_TORCH) == pytest.approx(2)
    verdicts = [compare(c.peer("fusednn"), c.peer("eager")) for c in document.cases]
    assert verdicts == ["faster", "slower", "unclear"]
    assert compare(row("fusednn", 1, spread=0.5), row("eager", 1.5, spread=0.5)) == "unclear"
    assert compare(even.peer("fusednn"), even.peer("openvino")) == ""


def test_geometric_means_hold_the_losses(document):
    by_peer = {m.peer: m for m in means(document.cases[:2])}
    assert by_peer["eager"].geometric_mean == pytest.approx(math.sqrt(4 * 0.5))
    assert by_peer["compile"].geometric_mean == pytest.approx(math.sqrt(2 * 1.5))
    assert by_peer[BEST_TORCH].geometric_mean == pytest.approx(math.sqrt(2 * 0.5))
    assert (by_peer["eager"].faster, by_peer["eager"].slower, by_peer["eager"].cases) == (1, 1, 2)
    assert "openvino" not in by_peer


def test_markdown_has_every_row_and_every_reason(document):
    text = markdown(document)
    assert "| double N=7 | 4 ms | 2 ms | 1 ms | 5.6 ns | 0% | 4.00x | 2.00x |" in text
    assert "0.50x" in text
    assert "1.02x*" in text
    assert "openvino: WRONG, y is off by 1.0e-02, allowed 1.0e-07 (1 of 3 cases)" in text
    assert torch.__version__ in text


def test_peak_memory_has_a_table_where_it_was_measured(document):
    assert "peak memory" not in markdown(document)
    for peer, size in (("eager", 3 * 2**20), ("fusednn", 2**19)):
        document.cases[2].peer(peer).peak_bytes = size
    text = markdown(document)
    assert "| peak memory of a call, MiB | eager | fusednn |" in text
    assert "| double N=7 | 3.0 | 0.5 |" in text
    assert text.count("peak memory") == 1


def test_readme_table_is_square(document):
    lines = [line for line in readme(document).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 3 + 2
    assert "| **geometric mean, inference** |  | 1.41x | 1.73x |" in lines


def test_command_writes_table_and_charts(document, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = tmp_path / "toy.json"
    document.write(path)
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/toy.md").read_text() == markdown(document)
    for name in ("toy-speedup.png", "toy-roofline.png"):
        pixels = imread(tmp_path / "out" / name)
        assert min(pixels.shape[:2]) > 200
        assert len({tuple(p) for p in pixels.reshape(-1, pixels.shape[-1])[::7].tolist()}) > 3
    assert main([str(path), "--readme"]) == 0
    assert "| case | fusednn |" in capsys.readouterr().out


def test_a_document_without_a_single_time_still_reports(document, tmp_path):
    for case in document.cases:
        case.peers = [PeerResult("fusednn", "missing", "fusednn is not installed")]
    path = tmp_path / "toy.json"
    document.write(path)
    assert main([str(path)]) == 0
    assert "fusednn: not run, fusednn is not installed (3 of 3 cases)" in (tmp_path / "toy.md").read_text()
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.0, "2 s"),
        (1.5e-3, "1.5 ms"),
        (2.5e-5, "25 µs"),
        (3e-9, "3 ns"),
        (0.9996, "1000 ms"),
        (0.5, "500 ms"),
    ],
)
def test_times_read_well(value, text):
    assert seconds(value) == text
