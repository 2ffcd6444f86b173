"""Make the environment that the Makefile's commands run in, and build fusednn in it.

    python3 tools/setup_env.py test       make .venv from this Python, with what `make test` needs
    python3 tools/setup_env.py --build test       the same, then install and compile fusednn there

A torch that the chosen Python has already is used as it is, through a .pth file, since that Python may live
in a virtual environment itself. What is there already is never downloaded again; with OFFLINE=1 nothing is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import toolchain

ROOT = Path(__file__).resolve().parent.parent
RECORD = "fusednn-environment.json"  # in the environment: which Python it was made from, what is installed
BASE_PTH = "zz_fusednn_base.pth"  # last in the alphabet: the environment's own packages come first
MINIMUM_PYTHON = (3, 10)

# What each command needs: tables and extras of pyproject.toml. A missing optional one is only reported.
NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "build": (("torch", "native"), ()),
    "bench": (("torch", "native"), ("bench",)),
    "lint": (("torch", "lint"), ()),
    "test": (("torch", "native", "test"), ("triton",)),
    "gpu": (("torch", "native"), ("triton", "test", "bench")),
}

PROBE = """
import json, os, sys
result = {"sites": [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]}
try:
    import torch
    assert float((torch.ones(2) + 1).sum()) == 4
    result["torch"] = torch.__version__
except Exception as error:
    result["why"] = f"{type(error).__name__}: {error}"
print(json.dumps(result))
"""


@dataclass(frozen=True)
class Requirement:
    """A distribution, the versions that serve, and what to install where none does."""

    name: str
    serves: str
    installs: str

    @staticmethod
    def parse(text: str, installs: str | None = None) -> Requirement:
        """Read ``name>=1,<2``."""
        match = re.fullmatch(r"([A-Za-z0-9._-]+?)\s*((?:[=<>!~].*)?)", text.strip())
        if match is None:
            raise ValueError(f"got requirement {text!r}, expected a name and versions")
        return Requirement(match[1], match[2], installs or text)

    def against(self) -> str | None:
        """Return why this environment doesn't serve, or None."""
        try:
            version = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"
        return None if satisfies(version, self.serves) else f"got {version}, expected {self.serves}"


def satisfies(version: str, specifier: str) -> bool:
    """Compare release numbers only: ``2.13.0+cpu`` satisfies ``>=2.11`` and ``==2.13.0``."""
    return all(_satisfies_one(version, part.strip()) for part in specifier.split(",") if part.strip())


def _satisfies_one(version: str, part: str) -> bool:
    match = re.fullmatch(r"(==|>=|<)\s*([\d.]+?)(\.\*)?", part)
    if match is None:
        raise ValueError(f"got specifier {part!r}, expected ==, >= or < and numbers")
    got, wanted = _release(version), _release(match[2])
    if match[3]:
        return got[: len(wanted)] == wanted
    width = max(len(got), len(wanted))
    got, wanted = got + (0,) * (width - len(got)), wanted + (0,) * (width - len(wanted))
    return {"==": got == wanted, ">=": got >= wanted, "<": got < wanted}[match[1]]


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def read_pyproject(path: Path = ROOT / "pyproject.toml") -> dict[str, Any]:
    """Parse the file; Python 3.10 has no tomllib, and its pip brings one."""
    try:
        toml = importlib.import_module("tomllib")
    except ModuleNotFoundError:
        toml = importlib.import_module("pip._vendor.tomli")
    return toml.loads(path.read_text())


def requirements(group: str, pyproject: dict[str, Any]) -> list[Requirement]:
    """List what a group of :data:`NEEDS` stands for."""
    if group == "native":
        found = [Requirement.parse(text) for text in pyproject["build-system"]["requires"]]
        return [r for r in found if r.name not in ("cmake", "ninja") or _tool_missing(r.name)]
    table = pyproject["tool"]["fusednn"]["environment"]
    if group in table:
        return [Requirement.parse(table[group]["serves"], table[group]["installs"])]
    return [Requirement.parse(text) for text in pyproject["project"]["optional-dependencies"][group]]


def _tool_missing(name: str) -> bool:
    return bool(toolchain.against_cmake()) if name == "cmake" else toolchain.find_tool(name) is None


class Environment:
    """The virtual environment that this process runs in, and how to add to it."""

    def __init__(self, base: str, offline: bool) -> None:
        self.base, self.offline = base, offline
        self.site = Path(sysconfig.get_path("purelib"))
        self.pyproject = read_pyproject()
        self.record_path = Path(sys.prefix) / RECORD

    def serve(self, command: str) -> int:
        """Add what `command` needs; returns 1 if something that it can't do without is missing."""
        if any(r.against() for r in requirements("torch", self.pyproject)):
            self._use_torch_of_base()
        required, optional = NEEDS[command]
        missing = [line for group in required for line in self._add(group)]
        lacking = [line for group in optional for line in self._add(group)]
        for line in missing:
            print(f"missing, needed for {command}: {line}")
        for line in lacking:
            print(f"missing, {command} goes on without: {line}")
        return 1 if missing else 0

    def _use_torch_of_base(self) -> None:
        probe = subprocess.run([self.base, "-c", PROBE], capture_output=True, text=True)
        found: dict[str, Any] = (
            json.loads(probe.stdout) if probe.returncode == 0 else {"why": "it can't be run", "sites": []}
        )
        (torch,) = requirements("torch", self.pyproject)
        if "torch" in found and satisfies(found["torch"], torch.serves):
            (self.site / BASE_PTH).write_text("".join(f"{site}\n" for site in found["sites"]))
            sys.path += [site for site in found["sites"] if site not in sys.path]
            importlib.invalidate_caches()
            print(f"torch {found['torch']} of the chosen Python serves: used as it is")
        else:
            why = f"torch {found['torch']}" if "torch" in found else found["why"]
            print(f"the chosen Python has no torch that serves ({why}; wanted {torch.serves})")

    def _add(self, group: str) -> list[str]:
        wanted = [r for r in requirements(group, self.pyproject) if r.against()]
        if not wanted:
            return []
        failure = "OFFLINE=1: no index was asked" if self.offline else self._pip_install(group, wanted)
        importlib.invalidate_caches()
        return [
            f"{r.name} ({reason}; {failure or 'pip reported success'}); pip install '{r.installs}' adds it"
            for r in wanted
            if (reason := r.against())
        ]

    def _pip_install(self, group: str, wanted: list[Requirement]) -> str | None:
        options = []
        if group == "torch" and os.environ.get("TORCH_INDEX"):
            options = ["--index-url", os.environ["TORCH_INDEX"]]
        if group != "torch":
            options = ["-q"]  # torch is large: let pip show how far it is
        names = [r.installs for r in wanted]
        print(f"installing {' '.join(names)}", flush=True)
        return None if self._pip(["install", *options, *names]) == 0 else "pip failed, see above"

    def _pip(self, arguments: list[str], **variables: str) -> int:
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"  # whatever is asked for, torch stays
            constraints.write_text(f"torch=={_version_of('torch')}\n" if _version_of("torch") else "")
            command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
            return subprocess.call([*command, "-c", str(constraints)], env={**os.environ, **variables})

    def build(self) -> int:
        """Install fusednn in place unless it is, and compile what has changed."""
        environment = {"FUSEDNN_NATIVE": "1", **os.environ}
        status = subprocess.call(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment
        )
        return status or self._install_in_place()

    def _install_in_place(self) -> int:
        sources = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "setup.py"))
        key = hashlib.sha256(sources).hexdigest()
        here = importlib.metadata.distributions(name="fusednn", path=[str(self.site)])
        if any(here) and read_record(self.record_path).get("installed") == key:
            return 0
        # The extension lies in the package already: what is left to install is a pointer to it.
        arguments = ["install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e", str(ROOT)]
        status = self._pip(arguments, FUSEDNN_NATIVE="0")
        if status == 0:
            write_record(self.record_path, installed=key)
        return status


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_record(path: Path) -> dict[str, str]:
    """Return what an earlier run wrote about the environment; nothing if it was not made here."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_record(path: Path, **entries: str) -> None:
    """Add to what is known about the environment."""
    path.write_text(json.dumps({**read_record(path), **entries}, indent=2) + "\n")


def python_of(venv: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(venv: Path, base: str, keep: bool) -> str:
    """Create the environment, anew if another Python was chosen; returns the Python it was made from.

    A folder that was not made here is used as it is; `keep` says that no Python was chosen by name.
    """
    record = read_record(venv / RECORD)
    made_from = record.get("python", base)
    if python_of(venv).exists() and (keep or made_from == base):
        return made_from
    clear = ["--clear"] if record else []
    print(f"making {venv.name} with Python {sys.version.split()[0]}", flush=True)
    command = [base, "-m", "venv", *clear, str(venv)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        # Debian's Python without python3-venv: the base's own pip may serve instead.
        made = subprocess.run([*command, "--without-pip"], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"python -m venv failed; Debian and Ubuntu: apt install python3-venv\n{made.stderr}")
    write_record(venv / RECORD, python=base)
    return base


def main(argv: list[str] | None = None) -> int:
    """Make the environment and go on inside it; 0 if the command can run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=NEEDS)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--build", action="store_true", help="install and compile fusednn in it, too")
    parser.add_argument("--keep", action="store_true", help="take an existing one, whatever its Python")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inside:
        environment = Environment(args.inside, os.environ.get("OFFLINE", "0") not in ("", "0"))
        return environment.serve(args.command) or (environment.build() if args.build else 0)
    if sys.version_info < MINIMUM_PYTHON:
        raise SystemExit(
            f"got Python {sys.version.split()[0]}, expected 3.10 or newer: make PYTHON=python3.12"
        )
    venv = args.venv.absolute()
    inside = Path(sys.prefix).resolve() == venv.resolve()
    base = sys.executable if inside else make_venv(venv, sys.executable, args.keep)
    command = [str(python_of(venv)), __file__, args.command, "--venv", str(venv), "--inside", base]
    return subprocess.call([*command, *(["--build"] if args.build else [])])


if __name__ == "__main__":
    sys.exit(main())
