"""What was proved is not proved again until something that went into it changes; failures are not kept."""

from __future__ import annotations

import sys
from pathlib import Path

import cuda_build_check as check
import proofs
import pytest

# A compiler of nothing: it notes that it ran, and names what it read.
COMPILER = """
import pathlib, sys
arguments = sys.argv[1:]
source = pathlib.Path(arguments[0])
header = source.with_name("a header.h")
with open(source.with_name("ran"), "a") as ran: ran.write("x")
rule = pathlib.Path(arguments[arguments.index("-MF") + 1])
rule.write_text("out: " + str(source) + " \\\\\\n " + str(header).replace(" ", "\\\\ ") + "\\n")
sys.exit("error" in header.read_text())
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Return a function that compiles a source with a header, and says how often the compiler ran."""
    monkeypatch.setattr(proofs, "FOLDER", tmp_path / "proofs")
    (tmp_path / "compiler.py").write_text(COMPILER)
    (tmp_path / "source").write_text("1")
    (tmp_path / "a header.h").write_text("1")

    def compiled(*flags: str, versions: str = "1") -> tuple[int, int]:
        proofs._digest.cache_clear()  # of a process, during which sources don't change
        command = [sys.executable, str(tmp_path / "compiler.py"), str(tmp_path / "source"), *flags]
        done = check.proved(command, "source", "host", versions)
        return done.returncode, len((tmp_path / "ran").read_text())

    return compiled


def test_what_is_unchanged_is_not_compiled_again(compiler):
    assert [compiler(), compiler(), compiler()] == [(0, 1)] * 3


@pytest.mark.parametrize("name", ["source", "a header.h"])
def test_a_changed_file_is_compiled_again(compiler, tmp_path: Path, name):
    compiler()
    (tmp_path / name).write_text("2")
    assert [compiler(), compiler()] == [(0, 2)] * 2


def test_other_flags_and_versions_are_other_proofs(compiler):
    assert compiler() == (0, 1)
    assert compiler("-O3") == (0, 2)
    assert compiler(versions="2") == (0, 3)
    assert compiler() == (0, 3)


def test_a_failure_is_not_kept(compiler, tmp_path: Path):
    (tmp_path / "a header.h").write_text("error")
    assert [compiler(), compiler()] == [(1, 1), (1, 2)]
    (tmp_path / "a header.h").write_text("mended")
    assert [compiler(), compiler()] == [(0, 3)] * 2


def test_a_spill_is_not_kept(compiler, monkeypatch):
    monkeypatch.setattr(check, "faults", lambda compilations: ["it spills"])
    assert [compiler()[1], compiler()[1]] == [1, 2]


def test_a_damaged_proof_is_none(compiler, tmp_path: Path):
    compiler()
    (proof,) = (tmp_path / "proofs").iterdir()
    proof.write_text("{")
    assert compiler() == (0, 2)
