"""The two pytest processes behind `make test`: a failure of either one reaches the exit code."""

from __future__ import annotations

import pytest
import run_tests

SUITE = """
import os, pytest

def test_main(): assert "TRITON_INTERPRET" not in os.environ

@pytest.mark.interpreter
def test_interpreter(): assert os.environ["TRITON_INTERPRET"] == "1"
"""
INI = "[pytest]\naddopts = -q --strict-markers\nmarkers =\n  interpreter: in its own process\n"


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A folder with its own tests, run as if it were the repository."""
    (tmp_path / "pytest.ini").write_text(INI)
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    monkeypatch.setattr(run_tests.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv(
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"
    )  # they take longer to load than the tests to run
    return tmp_path


def test_both_pass(suite, capfd):
    (suite / "test_suite.py").write_text(SUITE)
    assert run_tests.main([]) == 0
    said = capfd.readouterr().out
    assert "passed  main: 1 passed" in said
    assert "passed  interpreter: 1 passed" in said


@pytest.mark.parametrize(("name", "after"), [("main", "test_main"), ("interpreter", "test_interpreter")])
def test_one_failure_fails_all(suite, capfd, name, after):
    (suite / "test_suite.py").write_text(SUITE.replace(f"def {after}():", f"def {after}(): assert False;"))
    assert run_tests.main([]) == 1
    assert f"FAILED  {name}: 1 failed" in capfd.readouterr().out


def test_no_interpreter_test_is_a_failure(suite, capfd):
    (suite / "test_suite.py").write_text(SUITE.split("@pytest")[0])
    assert run_tests.main([]) == 1
    assert "FAILED  interpreter: 1 deselected" in capfd.readouterr().out


def test_a_selection_may_leave_a_process_without_tests(suite):
    (suite / "test_suite.py").write_text(SUITE)
    assert run_tests.main(["-k", "test_main"]) == 0


def test_without_triton_on_linux_the_interpreter_fails(suite, monkeypatch, capfd):
    (suite / "test_suite.py").write_text(SUITE)
    monkeypatch.setattr(run_tests.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run_tests.sys, "platform", "linux")
    assert run_tests.main([]) == 1
    assert "FAILED  interpreter: not run: triton is not installed" in capfd.readouterr().out
