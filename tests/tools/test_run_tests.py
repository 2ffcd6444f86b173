"""The calls of pytest behind `make test`: a failure of either reaches the exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import run_tests

SUITE = """
import os, pytest

def test_plain(): assert "TRITON_INTERPRET" not in os.environ or os.environ["TRITON_INTERPRET"] != "1"

def test_interpreter(): assert os.environ["TRITON_INTERPRET"] == "1"

def test_threads(): assert int(os.environ["OMP_NUM_THREADS"]) >= 2
"""
CONFTEST = """
import os

def pytest_addoption(parser): parser.addoption("--all", action="store_true")

def pytest_collection_modifyitems(items):
    other = "plain" if os.environ.get("TRITON_INTERPRET") == "1" else "interpreter"
    items[:] = [i for i in items if not i.name.endswith(other)]
"""
NAMES = ["plain", "interpreter"]


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A folder with its own tests, run as if it were the repository."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q --strict-markers\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    monkeypatch.setattr(run_tests, "workers", list)
    for name in ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "OMP_NUM_THREADS", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"
    )  # they take longer to load than the tests to run
    return tmp_path


def test_all_pass(suite, capfd):
    (suite / "test_suite.py").write_text(SUITE)
    assert run_tests.main(["--all"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-3] == "summary"
    for name, line in zip(NAMES, lines[-2:], strict=True):
        assert line.startswith(f"  passed  {name}: 2 passed")


@pytest.mark.parametrize("name", NAMES)
def test_one_failure_fails_all_and_is_shown(suite, capfd, name):
    broken = SUITE.replace(f"def test_{name}():", f"def test_{name}(): assert 6 * 7 == 54;")
    (suite / "test_suite.py").write_text(broken)
    assert run_tests.main([]) == 1
    said = capfd.readouterr().out
    assert f"FAILED  {name}: 1 failed, 1 passed" in said
    assert "assert (6 * 7) == 54" in said
    assert said.count("passed  ") == 1


def test_a_crash_fails(suite, capfd):
    (suite / "test_suite.py").write_text(SUITE.replace("def test_plain():", "def test_plain(): os.abort();"))
    assert run_tests.main([]) == 1
    assert "FAILED  plain: " in capfd.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--all"]], ids=str)
def test_no_test_is_a_failure(suite, capfd, arguments):
    (suite / "test_suite.py").write_text("def test_of_interpreter(): pass\n")
    assert run_tests.main(arguments) == 1
    assert "FAILED  plain: no tests ran" in capfd.readouterr().out


def test_a_selection_may_leave_a_call_without_tests(suite):
    (suite / "test_suite.py").write_text(SUITE)
    assert run_tests.main(["-k", "test_plain"]) == 0


def test_without_triton_on_linux_the_interpreter_fails(suite, monkeypatch, capfd):
    (suite / "test_suite.py").write_text(SUITE)
    monkeypatch.setattr(run_tests.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run_tests.sys, "platform", "linux")
    assert run_tests.main([]) == 1
    assert "FAILED  interpreter: not run: triton is not installed" in capfd.readouterr().out


def test_an_interrupt_ends_it_with_what_was_found(suite):
    waiting = "def test_plain(): open('here', 'w').close(); import time; time.sleep(60);"
    (suite / "test_suite.py").write_text(SUITE.replace("def test_plain():", waiting))
    code = "import sys, pathlib, run_tests; run_tests.workers = list; "
    code += f"run_tests.ROOT = pathlib.Path({str(suite)!r})"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}; sys.exit(run_tests.main([]))"],
        cwd=run_tests.__file__.rpartition("/")[0],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A job in the background, whose children ignore the signal, may be what runs this test.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    end = time.monotonic() + 60
    while not (suite / "here").exists() and time.monotonic() < end:
        time.sleep(0.05)
    run_tests.os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "KeyboardInterrupt" in said
    assert "no tests ran" in said


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(run_tests.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(run_tests, "cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_tests.workers()[:2] == ["-n", "2"]
    assert run_tests.environment({})["OMP_NUM_THREADS"] == "2"
    monkeypatch.setattr(run_tests, "cores", lambda: 64)
    assert run_tests.workers()[:2] == ["-n", "8"]
    assert run_tests.environment({})["OMP_NUM_THREADS"] == "8"
