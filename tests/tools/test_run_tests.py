"""The pytest processes behind `make test`: a failure of any one reaches the exit code."""

from __future__ import annotations

import pytest
import run_tests

SUITE = """
import os, pytest

def test_house(): assert "TRITON_INTERPRET" not in os.environ

@pytest.mark.family
def test_families(): assert "TRITON_INTERPRET" not in os.environ

@pytest.mark.family
@pytest.mark.attention
def test_attention(): assert "TRITON_INTERPRET" not in os.environ

@pytest.mark.family
@pytest.mark.emulated
def test_emulated(): assert "TRITON_INTERPRET" not in os.environ

@pytest.mark.interpreter
def test_interpreter(): assert os.environ["TRITON_INTERPRET"] == "1"
"""
INI = """[pytest]
addopts = -q --strict-markers
markers =
  interpreter: in its own process
  family: of a layer
  attention: of the largest family
  emulated: in its own process, too
"""
NAMES = ["house", "attention", "families", "emulated", "interpreter"]


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


def test_all_pass(suite, capfd):
    (suite / "test_suite.py").write_text(SUITE)
    assert run_tests.main([]) == 0
    said = capfd.readouterr().out
    for name in NAMES:
        assert f"passed  {name}: 1 passed" in said


@pytest.mark.parametrize("name", NAMES)
def test_one_failure_fails_all_and_is_shown(suite, capfd, name):
    broken = SUITE.replace(f"def test_{name}():", f"def test_{name}(): assert 6 * 7 == 54;")
    (suite / "test_suite.py").write_text(broken)
    assert run_tests.main([]) == 1
    said = capfd.readouterr().out
    assert f"FAILED  {name}: 1 failed" in said
    assert "assert (6 * 7) == 54" in said
    assert said.count("passed  ") == len(NAMES) - 1


@pytest.mark.parametrize("cores", [1, 8])
def test_cores_decide_how_many_run_at_once(suite, capfd, monkeypatch, cores):
    """Each test waits for the other processes, for as long as they can be there at all."""
    meeting = (
        (
            "import time\n"
            "from pathlib import Path\n"
            "def meet(name):\n"
            "    here = Path(__file__).parent\n"
            "    (here / f'{name}.here').touch()\n"
            "    end = time.monotonic() + (20 if CORES > 1 else 0.5)\n"
            "    while time.monotonic() < end and len(list(here.glob('*.here'))) < ALL: time.sleep(0.02)\n"
            "    (here / f'{name}.met').write_text(str(len(list(here.glob('*.here')))))\n"
        )
        .replace("CORES", str(cores))
        .replace("ALL", str(len(NAMES)))
    )
    text = meeting + SUITE
    for name in NAMES:
        text = text.replace(f"def test_{name}(): assert", f"def test_{name}(): meet('{name}'); assert")
    (suite / "test_suite.py").write_text(text)
    monkeypatch.setattr(run_tests.os, "cpu_count", lambda: cores)
    assert run_tests.main([]) == 0
    met = sorted(int((suite / f"{name}.met").read_text()) for name in NAMES)
    every = len(NAMES)
    assert met == ([every] * every if cores > 1 else list(range(1, every + 1)))


def test_progress_is_said_now_and_then(suite, capfd, monkeypatch):
    slow = SUITE.replace("def test_house():", "def test_house(): import time; time.sleep(1.5);")
    (suite / "test_suite.py").write_text(slow)
    monkeypatch.setattr(run_tests, "REPORT_SECONDS", 0.3)
    assert run_tests.main([]) == 0
    assert "s] house 0%" in capfd.readouterr().out


def test_no_interpreter_test_is_a_failure(suite, capfd):
    (suite / "test_suite.py").write_text(SUITE.split("@pytest.mark.interpreter")[0])
    assert run_tests.main([]) == 1
    assert "FAILED  interpreter: 4 deselected" in capfd.readouterr().out


def test_a_selection_may_leave_a_process_without_tests(suite):
    (suite / "test_suite.py").write_text(SUITE)
    assert run_tests.main(["-k", "test_house"]) == 0


def test_without_triton_on_linux_the_interpreter_fails(suite, monkeypatch, capfd):
    (suite / "test_suite.py").write_text(SUITE)
    monkeypatch.setattr(run_tests.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run_tests.sys, "platform", "linux")
    assert run_tests.main([]) == 1
    assert "FAILED  interpreter: not run: triton is not installed" in capfd.readouterr().out
