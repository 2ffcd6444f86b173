"""The JSON document, where it goes, and what it must not say."""

from __future__ import annotations

import getpass
import json
import platform

import pytest
import torch
from conftest import doubling_case

import benchmarks.run as bench
from benchmarks.ceilings import Ceilings
from benchmarks.machine import describe_machine, machine_slug, without_paths
from benchmarks.results import CaseResult, Document, PeerResult
from benchmarks.timing import Timing


def document(*cases: CaseResult) -> Document:
    machine = describe_machine(torch.device("cpu"))
    return Document(machine, {"rounds": 2}, [Ceilings(1e10, 1e11, "float32")], list(cases))


def case(family: str = "toy") -> CaseResult:
    timing = Timing(1e-3, 0.9e-3, 1.2e-3, 0.8e-3, calls=5, rounds=2)
    rows = [
        PeerResult("eager", "ok", "", 0.0, 1e-7, timing, peak_bytes=4096),
        PeerResult("fusednn", "wrong", "y is off by 1.0e-02, allowed 1.0e-07", note="cpu"),
        PeerResult("openvino", "missing", "openvino is not installed"),
    ]
    result = CaseResult.of(doubling_case(), rows)
    result.family = family
    return result


def test_round_trip():
    before = document(case())
    assert Document.from_json(before.to_json()) == before


def test_another_schema_and_unknown_fields_are_refused():
    body = json.loads(document(case()).to_json())
    with pytest.raises(ValueError, match="schema: got 0, expected 1"):
        Document.from_json(json.dumps({**body, "schema": 0}))
    body["cases"][0]["peers"][0]["extra"] = 1
    with pytest.raises(TypeError, match="extra"):
        Document.from_json(json.dumps(body))


@pytest.mark.parametrize("status", ["wrong", "inexact", "failed", "missing", "skipped"])
def test_only_a_verified_row_can_hold_a_time(status):
    with pytest.raises(ValueError, match="fusednn"):
        PeerResult("fusednn", status, timing=Timing(1, 1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="fusednn"):
        PeerResult("fusednn", "ok")


def test_the_machine_is_described_without_names_or_paths():
    machine = describe_machine(torch.device("cpu"))
    assert machine["threads"] == torch.get_num_threads()
    assert machine["versions"]["torch"] == torch.__version__
    text = json.dumps(machine)
    assert platform.node() not in text
    assert "/home" not in text
    assert f"/{getpass.getuser()}" not in text
    assert str(bench.RESULTS) not in text
    assert machine_slug(machine).replace("-", "").isalnum()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("can't open /home/me/x/lib.so: bad", "can't open lib.so: bad"),
        ("File '/tmp/a.py', line 3\nmore", "File 'a.py', line 3"),
        ("2/3 of ~/secret/key", "2/3 of key"),
        ("no path here", "no path here"),
        ("", ""),
    ],
)
def test_paths_are_cut(text, expected):
    assert without_paths(text) == expected


def test_a_file_per_family_local_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    both = document(case("one"), case("two"))
    assert bench.write(both, None) == [tmp_path / "local/one.json", tmp_path / "local/two.json"]
    slug = machine_slug(both.machine)
    assert bench.write(both, "") == [tmp_path / slug / "one.json", tmp_path / slug / "two.json"]
    assert bench.write(both, str(tmp_path / "all.json")) == [tmp_path / "all.json"]
    one = Document.from_json((tmp_path / "local/one.json").read_text())
    assert [c.family for c in one.cases] == ["one"]
    assert len(Document.from_json((tmp_path / "all.json").read_text()).cases) == 2
