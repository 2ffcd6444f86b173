"""The environment's decisions: what serves, what is asked of an index, which Python an environment is of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import setup_env
import toolchain


@pytest.mark.parametrize(
    ("version", "specifier", "expected"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("2.13.0+cpu", "==2.13.0", True),
        ("3.9.1", "==3.9.*", True),
        ("3.10.0", "==3.9.*", False),
        ("3.6", ">=3.6.0", True),
        ("1.5", ">=1,<2", True),
        ("2.0", ">=1,<2", False),
        ("1.0", "", True),
    ],
)
def test_satisfies(version, specifier, expected):
    assert setup_env.satisfies(version, specifier) is expected


def test_unreadable_specifier_is_an_error():
    with pytest.raises(ValueError, match=r"got specifier '~=1\.0'"):
        setup_env.satisfies("1.0", "~=1.0")


def test_requirement():
    parsed = setup_env.Requirement.parse("pytest-benchmark>=4")
    assert parsed == setup_env.Requirement("pytest-benchmark", ">=4", "pytest-benchmark>=4")
    assert setup_env.Requirement.parse("pytest").against() is None
    assert setup_env.Requirement.parse("pytest>=1000").against().startswith("got ")
    assert setup_env.Requirement.parse("no-such-thing").against() == "not installed"


@pytest.mark.parametrize("command", setup_env.NEEDS)
def test_every_need_is_in_pyproject(command):
    pyproject = setup_env.read_pyproject()
    required, optional = setup_env.NEEDS[command]
    for group in (*required, *optional):
        setup_env.requirements(group, pyproject)


def test_lint_tools_are_pinned():
    for requirement in setup_env.requirements("lint", setup_env.read_pyproject()):
        assert requirement.serves.startswith("=="), requirement.name


def test_torch_is_only_ever_installed_at_one_version():
    (torch,) = setup_env.requirements("torch", setup_env.read_pyproject())
    assert torch.installs == "torch==2.13.0"
    assert torch.serves == ">=2.11"


class Recorded(setup_env.Environment):
    """An environment whose pip calls are kept instead of made."""

    def __init__(self, offline: bool, site: Path, pyproject: dict) -> None:
        super().__init__(sys.executable, offline)
        self.site, self.pyproject, self.calls = site, pyproject, []

    def _pip(self, arguments, **variables):
        self.calls.append(arguments)
        return 0


def pyproject_with(**extras: list[str]) -> dict:
    environment = {
        "torch": {"serves": "torch>=2.11", "installs": "torch==2.13.0"},
        "triton": {"serves": "no-such-triton>=3.6", "installs": "no-such-triton==3.9.*"},
    }
    return {
        "build-system": {"requires": ["setuptools>=60", "cmake>=3.22", "ninja"]},
        "project": {"optional-dependencies": {"test": ["pytest"], "bench": [], "lint": [], **extras}},
        "tool": {"fusednn": {"environment": environment}},
    }


def test_what_is_there_is_not_asked_for(tmp_path, capsys):
    environment = Recorded(False, tmp_path, pyproject_with())
    assert environment.serve("bench") == 0
    assert environment.calls == []
    assert capsys.readouterr().out == ""


def test_only_the_missing_ones_are_asked_for(tmp_path, capsys):
    environment = Recorded(False, tmp_path, pyproject_with(test=["pytest", "no-such-thing>=2"]))
    assert environment.serve("test") == 1  # the recorded pip installs nothing
    assert [call[-1] for call in environment.calls] == ["no-such-thing>=2", "no-such-triton==3.9.*"]
    said = capsys.readouterr().out
    assert "missing, needed for test: no-such-thing (not installed" in said
    assert "missing, test goes on without: no-such-triton" in said


def test_offline_asks_nobody_and_goes_on_without_optional_ones(tmp_path, capsys):
    environment = Recorded(True, tmp_path, pyproject_with())
    assert environment.serve("test") == 0
    assert environment.calls == []
    assert (
        "OFFLINE=1: no index was asked); pip install 'no-such-triton==3.9.*' adds it"
        in capsys.readouterr().out
    )


def test_offline_stops_without_a_needed_one(tmp_path):
    environment = Recorded(True, tmp_path, pyproject_with(test=["no-such-thing"]))
    assert environment.serve("test") == 1
    assert environment.calls == []


def test_torch_never_changes_under_a_constraint(tmp_path, monkeypatch):
    import torch

    seen = []

    def call(command, env):
        seen.append((command, Path(command[command.index("-c") + 1]).read_text()))
        return 0

    monkeypatch.setattr(setup_env.subprocess, "call", call)
    setup_env.Environment(sys.executable, False)._pip(["install", "something"])
    ((command, constraints),) = seen
    assert command[1:5] == ["-m", "pip", "install", "something"]
    assert constraints == f"torch=={torch.__version__}\n"


def test_torch_of_the_chosen_python_is_used_through_a_pth_file(tmp_path, capsys):
    environment = Recorded(True, tmp_path, pyproject_with())
    environment._use_torch_of_base()
    import torch

    folders = (tmp_path / setup_env.BASE_PTH).read_text().splitlines()
    assert str(Path(torch.__file__).parents[1]) in folders
    assert "used as it is" in capsys.readouterr().out


def test_torch_that_is_too_old_is_left_alone(tmp_path, capsys):
    pyproject = pyproject_with()
    pyproject["tool"]["fusednn"]["environment"]["torch"]["serves"] = "torch>=1000"
    environment = Recorded(True, tmp_path, pyproject)
    environment._use_torch_of_base()
    assert not (tmp_path / setup_env.BASE_PTH).exists()
    assert "has no torch that serves" in capsys.readouterr().out


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder that stands for an environment, and the commands that would have made it."""
    commands = []
    python = setup_env.python_of(tmp_path)

    def run(command, **_options):
        commands.append(command)
        python.parent.mkdir(exist_ok=True)
        python.touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(setup_env.subprocess, "run", run)
    return tmp_path, commands


def test_environment_is_made_once(made):
    venv, commands = made
    assert setup_env.make_venv(venv, "/a/python", keep=False) == "/a/python"
    assert setup_env.make_venv(venv, "/a/python", keep=False) == "/a/python"
    assert commands == [["/a/python", "-m", "venv", str(venv)]]


def test_another_python_makes_it_anew_unless_it_was_not_named(made):
    venv, commands = made
    setup_env.make_venv(venv, "/a/python", keep=False)
    assert setup_env.make_venv(venv, "/b/python", keep=True) == "/a/python"
    assert setup_env.make_venv(venv, "/b/python", keep=False) == "/b/python"
    assert commands[1:] == [["/b/python", "-m", "venv", "--clear", str(venv)]]


def test_environment_of_someone_else_is_never_cleared(made):
    venv, commands = made
    setup_env.python_of(venv).parent.mkdir()
    setup_env.python_of(venv).touch()
    assert setup_env.make_venv(venv, "/b/python", keep=False) == "/b/python"
    assert commands == []


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in toolchain.against_compiler()[0]
    monkeypatch.setenv("CXX", "false")
    assert "can't compile C++20" in toolchain.against_compiler()[0]


def test_missing_and_old_cmake_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "find_tool", lambda name: None)
    assert "pip install cmake" in toolchain.against_cmake()[0]
    old = tmp_path / "cmake"
    old.write_text("#!/bin/sh\necho cmake version 3.5.1\n")
    old.chmod(0o755)
    monkeypatch.setattr(toolchain, "find_tool", lambda name: str(old))
    assert toolchain.against_cmake() == ["got cmake version 3.5.1, expected 3.22 or newer"]
