"""The command line: what info says, what it keeps to itself, and how bench finds the benchmarks."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import fusednn
from fusednn import __main__ as command_line
from fusednn import info
from fusednn.core import native as _native
from fusednn.core import settings

# The package as this process found it: an editable install may belong to another folder.
PACKAGE_PARENT = Path(fusednn.__file__).parents[1]


def fusednn_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "fusednn", *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_json_is_what_collect_returns():
    done = fusednn_command("info", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"] == info.collect()["versions"]


def test_text_names_every_fact():
    facts = info.collect()
    text = info.report(facts)
    for heading in ("versions", "extension", "processor", "CUDA devices", "backends", "variables", "missing"):
        assert f"\n{heading}\n" in f"\n{text}\n"
    for name in (*facts["variables"], *facts["backends"], *facts["versions"]):
        assert name in text


def test_variables_are_those_of_settings(monkeypatch):
    monkeypatch.setenv("FUSEDNN_CPU_ISA", "baseline")
    monkeypatch.setenv("FUSEDNN_BACKND", "cpu")
    variables = info.collect()["variables"]
    assert variables["FUSEDNN_CPU_ISA"] == "baseline"
    assert variables["FUSEDNN_BACKND (unknown)"] == "cpu"
    assert "FUSEDNN_BACKEND" in variables
    for source in Path(settings.__file__).parent.rglob("*.py"):
        for name in info.re.findall(r"environ(?:\.get\(|\[)\"(FUSEDNN_\w+)\"", source.read_text()):
            assert name in variables, f"{source.name} reads {name}, which settings.py doesn't document"


def test_backends_are_those_of_settings():
    assert set(info.collect()["backends"]) == set(settings.BACKENDS) - {"auto"}


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_native, "unavailable_reason", "fusednn._C was not built")
    monkeypatch.setattr(_native, "cuda_modules", {})
    facts = info.collect()
    assert not facts["backends"]["cpu"]["available"]
    assert facts["backends"]["reference"]["available"]
    (entry,) = [e for e in facts["missing"] if e["what"] == "extension"]
    assert entry["command"] == _native.REMEDY
    assert entry["command"] in info.report(facts)


def test_refused_extension_names_its_switch():
    facts = json.loads(fusednn_command("info", "--json", FUSEDNN_NATIVE="0").stdout)
    assert facts["native"] == {"loaded": False, "reason": "FUSEDNN_NATIVE=0", "build": {}}
    (entry,) = [e for e in facts["missing"] if e["what"] == "extension"]
    assert entry["command"] == "unset FUSEDNN_NATIVE"


def test_missing_distribution_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(info, "_version", lambda _name: None)
    commands = [entry["command"] for entry in info.collect()["missing"]]
    assert "pip install openvino" in commands
    assert not any("torch" in command.split() for command in commands)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/someone/x/fusednn/_C.so: undefined symbol", "fusednn/_C.so: undefined symbol"),
        ("libfoo.so.1: cannot open shared object file", "libfoo.so.1: cannot open shared object file"),
        ("see '/opt/a b' and /usr/lib/libc.so", "see 'a b' and libc.so"),
        ("50/50", "50/50"),
        (None, None),
    ],
)
def test_paths_are_cut(text, expected):
    assert info._without_paths(text) == expected


def test_output_keeps_the_machine_private(monkeypatch):
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_native, "unavailable_reason", f"{Path(fusednn.__file__).parent}/_C.so: bad")
    text = json.dumps(info.collect())
    assert "fusednn/_C.so: bad" in text
    assert str(PACKAGE_PARENT) not in text
    assert str(Path.home()) not in text
    for private in (platform.node(), getpass.getuser()):
        assert f'"{private}"' not in text


def test_version():
    done = fusednn_command("--version")
    assert (done.returncode, done.stdout) == (0, f"fusednn {fusednn.__version__}\n")


def test_unknown_command():
    done = fusednn_command("inform")
    assert done.returncode == 2
    assert "got 'inform', expected info or bench" in done.stderr


def test_bench_without_a_checkout_says_where_it_is(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "checkout", lambda: None)
    assert command_line.main(["bench", "--list"]) == 2
    assert "source checkout" in capsys.readouterr().err


def test_bench_hands_its_options_over(monkeypatch, tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "run.py").write_text("def main(argv):\n    return 40 + len(argv)\n")
    monkeypatch.setattr(command_line, "checkout", lambda: tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    assert command_line.main(["bench", "--quick", "--list"]) == 42
    for name in ("benchmarks", "benchmarks.run"):
        sys.modules.pop(name, None)
